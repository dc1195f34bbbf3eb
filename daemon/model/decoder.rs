//! A Llama-like decoder with LoRA: forward and backward passes, written out.
//!
//! Block l, with h the hidden state and every linear layer as in [`Backend::linear`]:
//!
//! ```text
//!   n = rms(h)            q, k, v = linear(n)        (q, k = rms per head: Qwen3)   q, k = rope(q, k)
//!   a = attention(q,k,v)  m = h + linear_o(a)
//!   n = rms(m)            g, u = linear(n)           h' = m + linear_down(silu(g)·u)
//! ```
//!
//! Kept for the backward pass: h, q, k, v, a, its log-sums, m, g, u and the r-wide products with A. The norms' outputs
//! and silu(g)·u are rebuilt (elementwise, about 2 % of a block's time for a third of its memory). With recompute,
//! only h is kept and the block is run again, but for the down projection, whose output nobody needs.
//!
//! The base gets no gradients; the backward pass ends at the lowest adapted layer.

use super::adapter::{Adapter, AdapterLayout, Module};
use super::config::ModelConfig;
use super::weights::{Base, BaseLinear};
use crate::backend::{AttentionShape, Backend, Batch, Projection, ProjectionBackward};

/// A linear layer of the base on its device.
struct Linear<B: Backend> {
    weight: B::Matrix,
    bias: Option<B::Tensor>,
}

/// One block of the base on its device.
struct Layer<B: Backend> {
    input_norm: B::Tensor,
    post_attention_norm: B::Tensor,
    q_norm: Option<B::Tensor>,
    k_norm: Option<B::Tensor>,
    /// In the order of [`Module::ALL`].
    linears: Vec<Linear<B>>,
}

/// The frozen base on a device.
pub struct Decoder<B: Backend> {
    /// Where it computes.
    pub backend: B,
    /// Its shape.
    pub config: ModelConfig,
    frequencies: Vec<f32>,
    magnitude: f32,
    embedding: B::Matrix,
    layers: Vec<Layer<B>>,
    final_norm: B::Tensor,
    head: Option<B::Matrix>,
}

/// What a block keeps for its backward pass.
struct Kept<B: Backend> {
    q_raw: Option<B::Tensor>,
    k_raw: Option<B::Tensor>,
    q: B::Tensor,
    k: B::Tensor,
    v: B::Tensor,
    attention: B::Tensor,
    log_sum: B::Tensor,
    middle: B::Tensor,
    gate: B::Tensor,
    up: B::Tensor,
    /// scale·X·Aᵀ of each adapted module.
    down: [Option<B::Tensor>; 7],
}

impl<B: Backend> Kept<B> {
    fn new(backend: &B, config: &ModelConfig, rank: usize, tokens: usize, adapted: [bool; 7]) -> Self {
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let zeros = |cols: usize| backend.zeros(tokens * cols);
        Self {
            q_raw: config.qk_norm.then(|| zeros(q)),
            k_raw: config.qk_norm.then(|| zeros(kv)),
            q: zeros(q),
            k: zeros(kv),
            v: zeros(kv),
            attention: zeros(q),
            log_sum: backend.floats(tokens * config.heads),
            middle: zeros(config.hidden_size),
            gate: zeros(config.intermediate_size),
            up: zeros(config.intermediate_size),
            down: adapted.map(|yes| yes.then(|| zeros(rank))),
        }
    }
}

/// Every activation and gradient of a micro-batch, allocated once for the largest one.
pub struct Workspace<B: Backend> {
    /// Largest micro-batch, in tokens.
    pub capacity: usize,
    recompute: bool,
    /// Hidden state before each block, and after the last.
    hidden: Vec<B::Tensor>,
    /// One per block, or one for all with recompute.
    kept: Vec<Kept<B>>,
    normed: B::Tensor,
    activated: B::Tensor,
    labelled: B::Tensor,
    labelled_normed: B::Tensor,
    /// `None` when it was made for evaluation only.
    gradients: Option<GradientBuffers<B>>,
}

struct GradientBuffers<B: Backend> {
    hidden: B::Tensor,
    normed: B::Tensor,
    activated: B::Tensor,
    attention: B::Tensor,
    q: B::Tensor,
    k: B::Tensor,
    v: B::Tensor,
    labelled: B::Tensor,
    labelled_normed: B::Tensor,
}

impl<B: Backend> Workspace<B> {
    /// Buffers for micro-batches of up to `capacity` tokens.
    pub fn new(decoder: &Decoder<B>, layout: &AdapterLayout, capacity: usize, recompute: bool) -> Self {
        Self::build(decoder, layout, capacity, recompute, true)
    }

    /// Buffers for the forward pass alone.
    pub fn for_evaluation(decoder: &Decoder<B>, layout: &AdapterLayout, capacity: usize) -> Self {
        Self::build(decoder, layout, capacity, true, false)
    }

    fn build(
        decoder: &Decoder<B>,
        layout: &AdapterLayout,
        capacity: usize,
        recompute: bool,
        train: bool,
    ) -> Self {
        let (backend, config) = (&decoder.backend, &decoder.config);
        let (h, f) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let zeros = |cols: usize| backend.zeros(capacity * cols);
        let adapted = |layer: usize| Module::ALL.map(|module| layout.site(layer, module).is_some());
        let kept = if recompute {
            let any =
                (0..config.layers).map(adapted).fold([false; 7], |a, b| std::array::from_fn(|i| a[i] | b[i]));
            vec![Kept::new(backend, config, layout.rank, capacity, any)]
        } else {
            (0..config.layers)
                .map(|l| Kept::new(backend, config, layout.rank, capacity, adapted(l)))
                .collect()
        };
        Self {
            capacity,
            recompute,
            // Without a backward pass two hidden states take turns.
            hidden: (0..if train { config.layers + 1 } else { 2 }).map(|_| zeros(h)).collect(),
            kept,
            normed: zeros(h),
            activated: zeros(f),
            labelled: zeros(h),
            labelled_normed: zeros(h),
            gradients: train.then(|| GradientBuffers {
                hidden: zeros(h),
                normed: zeros(h),
                activated: zeros(f),
                attention: zeros(q),
                q: zeros(q),
                k: zeros(kv),
                v: zeros(kv),
                labelled: zeros(h),
                labelled_normed: zeros(h),
            }),
        }
    }

    /// Place of the state before block `layer` (or after the last).
    fn slot(&self, layer: usize) -> usize {
        if self.gradients.is_some() { layer } else { layer % 2 }
    }
}

impl<B: Backend> Decoder<B> {
    /// Takes a loaded base to a device.
    pub fn new(backend: B, base: Base) -> Self {
        let tensor = |values: &[f32]| {
            let mut tensor = backend.floats(values.len());
            backend.write(&mut tensor, values);
            tensor
        };
        let linear = |linear: BaseLinear| Linear {
            weight: backend.matrix(linear.weight),
            bias: linear.bias.as_deref().map(tensor),
        };
        let config = base.config;
        let layers = base
            .layers
            .into_iter()
            .map(|layer| Layer {
                input_norm: tensor(&layer.input_norm),
                post_attention_norm: tensor(&layer.post_attention_norm),
                q_norm: layer.q_norm.as_deref().map(tensor),
                k_norm: layer.k_norm.as_deref().map(tensor),
                linears: [layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down]
                    .into_iter()
                    .map(linear)
                    .collect(),
            })
            .collect();
        Self {
            frequencies: config.rope.inverse_frequencies(config.head_dim),
            magnitude: config.rope.attention_factor(),
            embedding: backend.matrix(base.embedding),
            layers,
            final_norm: tensor(&base.final_norm),
            head: base.lm_head.map(|head| backend.matrix(head)),
            config,
            backend,
        }
    }

    fn head(&self) -> &B::Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    fn attention_shape(&self, layer: usize) -> AttentionShape {
        AttentionShape {
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
            scale: 1.0 / (self.config.head_dim as f64).sqrt(),
            window: self.config.window(layer),
        }
    }

    /// Takes a micro-batch to the device.
    pub fn batch(&self, batch: Batch) -> B::Batch {
        self.backend.batch(batch)
    }

    /// The loss of a micro-batch (Σ over its labelled tokens of −log p, one f64 per sequence), without gradients.
    pub fn loss(
        &self,
        batch: &B::Batch,
        shape: BatchShape,
        layout: &AdapterLayout,
        adapter: &Adapter<B>,
        work: &mut Workspace<B>,
    ) -> Vec<f64> {
        self.forward(batch, shape.tokens, layout, adapter, work, Purpose::Evaluate);
        self.normalise_labelled(batch, shape, work);
        self.backend.cross_entropy(batch, self.config.hidden_size, &work.labelled_normed, self.head(), None)
    }

    /// The loss of a micro-batch, and the gradients of its sum added to `gradients`.
    pub fn loss_and_gradients(
        &self,
        batch: &B::Batch,
        shape: BatchShape,
        layout: &AdapterLayout,
        adapter: &Adapter<B>,
        gradients: &mut Adapter<B>,
        work: &mut Workspace<B>,
    ) -> Vec<f64> {
        let h = self.config.hidden_size;
        self.forward(batch, shape.tokens, layout, adapter, work, Purpose::Train);
        self.normalise_labelled(batch, shape, work);
        let last = work.slot(self.config.layers);
        let Some(buffers) = work.gradients.as_mut() else {
            unreachable!("a workspace for evaluation has no gradients");
        };
        let losses = self.backend.cross_entropy(
            batch,
            h,
            &work.labelled_normed,
            self.head(),
            Some(&mut buffers.labelled_normed),
        );
        debug_assert!(last == self.config.layers);
        self.backend.rms_norm_backward(
            shape.labelled,
            h,
            &work.labelled,
            &self.final_norm,
            self.config.rms_norm_eps,
            &buffers.labelled_normed,
            &mut buffers.labelled,
            false,
        );
        self.backend.scatter_labelled(batch, h, &buffers.labelled, &mut buffers.hidden);
        let Some(lowest) = layout.lowest_layer() else { return losses };
        for layer in (lowest..self.config.layers).rev() {
            if work.recompute {
                self.forward_layer(
                    batch,
                    shape.tokens,
                    layer,
                    layout,
                    adapter,
                    work,
                    Attend::Batch,
                    Purpose::Rebuild,
                );
            }
            self.backward_layer(
                batch,
                shape.tokens,
                layer,
                layer == lowest,
                layout,
                adapter,
                gradients,
                work,
            );
        }
        losses
    }

    /// The logits of every position, `[tokens, vocabulary]` (for comparison with other implementations: it is what
    /// training avoids).
    pub fn all_logits(
        &self,
        batch: &B::Batch,
        tokens: usize,
        layout: &AdapterLayout,
        adapter: &Adapter<B>,
        work: &mut Workspace<B>,
    ) -> Vec<Vec<f32>> {
        let h = self.config.hidden_size;
        self.forward(batch, tokens, layout, adapter, work, Purpose::Evaluate);
        let last = work.slot(self.config.layers);
        let epsilon = self.config.rms_norm_eps;
        self.backend.rms_norm(tokens, h, &work.hidden[last], &self.final_norm, epsilon, &mut work.normed);
        (0..tokens).map(|t| self.backend.logits(h, &work.normed, t, self.head())).collect()
    }

    fn normalise_labelled(&self, batch: &B::Batch, shape: BatchShape, work: &mut Workspace<B>) {
        let h = self.config.hidden_size;
        let last = work.slot(self.config.layers);
        self.backend.gather_labelled(batch, h, &work.hidden[last], &mut work.labelled);
        self.backend.rms_norm(
            shape.labelled,
            h,
            &work.labelled,
            &self.final_norm,
            self.config.rms_norm_eps,
            &mut work.labelled_normed,
        );
    }

    fn forward(
        &self,
        batch: &B::Batch,
        tokens: usize,
        layout: &AdapterLayout,
        adapter: &Adapter<B>,
        work: &mut Workspace<B>,
        purpose: Purpose,
    ) {
        assert!(tokens <= work.capacity, "{tokens} tokens in a workspace for {}", work.capacity);
        self.backend.embed(batch, &self.embedding, self.config.hidden_size, &mut work.hidden[0]);
        for layer in 0..self.config.layers {
            self.forward_layer(batch, tokens, layer, layout, adapter, work, Attend::Batch, purpose);
        }
    }

    /// One block.
    fn forward_layer(
        &self,
        batch: &B::Batch,
        tokens: usize,
        layer: usize,
        layout: &AdapterLayout,
        adapter: &Adapter<B>,
        work: &mut Workspace<B>,
        attend: Attend<'_, B>,
        purpose: Purpose,
    ) {
        let (b, c, w) = (&self.backend, &self.config, &self.layers[layer]);
        let (h, f, d) = (c.hidden_size, c.intermediate_size, c.head_dim);
        let (from, to) = (work.slot(layer), work.slot(layer + 1));
        let kept = &mut work.kept[if work.recompute { 0 } else { layer }];
        let [down_q, down_k, down_v, down_o, down_gate, down_up, down_down] = &mut kept.down;
        let training = purpose != Purpose::Evaluate;
        let complete = purpose != Purpose::Rebuild;
        macro_rules! projection {
            ($module:expr, $output:expr, $down:expr) => {
                project(
                    &w.linears[$module as usize],
                    layout.lora(adapter, layer, $module, training),
                    $output,
                    $down,
                )
            };
        }

        b.rms_norm(tokens, h, &work.hidden[from], &w.input_norm, c.rms_norm_eps, &mut work.normed);
        {
            let q = kept.q_raw.as_mut().unwrap_or(&mut kept.q);
            let k = kept.k_raw.as_mut().unwrap_or(&mut kept.k);
            let mut group = [
                projection!(Module::Q, Some(q), down_q),
                projection!(Module::K, Some(k), down_k),
                projection!(Module::V, Some(&mut kept.v), down_v),
            ];
            b.linear(batch, h, &work.normed, &mut group);
        }
        if let (Some(norm), Some(raw)) = (&w.q_norm, &kept.q_raw) {
            b.rms_norm(tokens * c.heads, d, raw, norm, c.rms_norm_eps, &mut kept.q);
        }
        if let (Some(norm), Some(raw)) = (&w.k_norm, &kept.k_raw) {
            b.rms_norm(tokens * c.kv_heads, d, raw, norm, c.rms_norm_eps, &mut kept.k);
        }
        b.rope(batch, c.heads, d, &self.frequencies, self.magnitude, false, &mut kept.q);
        b.rope(batch, c.kv_heads, d, &self.frequencies, self.magnitude, false, &mut kept.k);
        let shape = self.attention_shape(layer);
        match attend {
            Attend::Batch => {
                b.attention(batch, shape, &kept.q, &kept.k, &kept.v, &mut kept.attention, &mut kept.log_sum);
            }
            Attend::Cached { past, keys, values } => {
                let cols = c.kv_heads * d;
                b.copy_into(tokens * cols, &kept.k, keys, past * cols);
                b.copy_into(tokens * cols, &kept.v, values, past * cols);
                b.attention_cached(shape, tokens, past, &kept.q, keys, values, &mut kept.attention);
            }
        }
        let mut output = [projection!(Module::O, Some(&mut kept.middle), down_o)];
        b.linear(batch, c.heads * d, &kept.attention, &mut output);

        let (middle, normed) = (&mut kept.middle, &mut work.normed);
        let epsilon = c.rms_norm_eps;
        b.add_rms_norm(tokens, h, &work.hidden[from], middle, &w.post_attention_norm, epsilon, normed);
        let mut group = [
            projection!(Module::Gate, Some(&mut kept.gate), down_gate),
            projection!(Module::Up, Some(&mut kept.up), down_up),
        ];
        b.linear(batch, h, &work.normed, &mut group);
        b.swiglu(tokens * f, &kept.gate, &kept.up, &mut work.activated);
        let output = complete.then_some(&mut work.hidden[to]);
        b.linear(batch, f, &work.activated, &mut [projection!(Module::Down, output, down_down)]);
        if complete {
            b.add(tokens * h, &kept.middle, &mut work.hidden[to]);
        }
    }

    /// The backward pass of one block: the gradient of its output is in the gradient buffer, and is replaced by that
    /// of its input (unless `lowest`: nothing below it is trained). Uses up the block's kept gate and up.
    fn backward_layer(
        &self,
        batch: &B::Batch,
        tokens: usize,
        layer: usize,
        lowest: bool,
        layout: &AdapterLayout,
        adapter: &Adapter<B>,
        gradients: &mut Adapter<B>,
        work: &mut Workspace<B>,
    ) {
        let (b, c, w) = (&self.backend, &self.config, &self.layers[layer]);
        let (h, f, d) = (c.hidden_size, c.intermediate_size, c.head_dim);
        let from = work.slot(layer);
        let kept = &mut work.kept[if work.recompute { 0 } else { layer }];
        let Some(g) = work.gradients.as_mut() else { unreachable!("checked by the caller") };
        let adapted = |module| layout.site(layer, module).is_some();
        // In the lowest block the pass ends with its first adapted part.
        let below_attention = !lowest || [Module::Q, Module::K, Module::V].into_iter().any(adapted);
        let below_mlp = below_attention || adapted(Module::O);
        let below_down = below_mlp || adapted(Module::Gate) || adapted(Module::Up);
        let mut slots = gradient_slots(layout, layer, gradients);
        macro_rules! backward {
            ($module:expr, $output_gradient:expr, $down:expr) => {{
                let (a_gradient, b_gradient) = slots[$module as usize].take().unzip();
                ProjectionBackward {
                    weight: &w.linears[$module as usize].weight,
                    lora: layout.lora(adapter, layer, $module, true),
                    output_gradient: $output_gradient,
                    down: $down,
                    a_gradient,
                    b_gradient,
                }
            }};
        }
        let [down_q, down_k, down_v, down_o, down_gate, down_up, down_down] = &kept.down;

        b.swiglu(tokens * f, &kept.gate, &kept.up, &mut work.activated);
        let mut group = [backward!(Module::Down, &g.hidden, down_down.as_ref())];
        b.linear_backward(batch, f, &work.activated, &mut group, below_down.then_some(&mut g.activated));
        if !below_down {
            return;
        }
        b.swiglu_backward(tokens * f, &g.activated, &mut kept.gate, &mut kept.up);
        b.rms_norm(tokens, h, &kept.middle, &w.post_attention_norm, c.rms_norm_eps, &mut work.normed);
        let mut group = [
            backward!(Module::Gate, &kept.gate, down_gate.as_ref()),
            backward!(Module::Up, &kept.up, down_up.as_ref()),
        ];
        b.linear_backward(batch, h, &work.normed, &mut group, below_mlp.then_some(&mut g.normed));
        if !below_mlp {
            return;
        }
        b.rms_norm_backward(
            tokens,
            h,
            &kept.middle,
            &w.post_attention_norm,
            c.rms_norm_eps,
            &g.normed,
            &mut g.hidden,
            true,
        );
        let mut group = [backward!(Module::O, &g.hidden, down_o.as_ref())];
        let to = below_attention.then_some(&mut g.attention);
        b.linear_backward(batch, c.heads * d, &kept.attention, &mut group, to);
        if !below_attention {
            return;
        }
        b.attention_backward(
            batch,
            self.attention_shape(layer),
            &kept.q,
            &kept.k,
            &kept.v,
            &kept.attention,
            &kept.log_sum,
            &g.attention,
            &mut g.q,
            &mut g.k,
            &mut g.v,
        );
        b.rope(batch, c.heads, d, &self.frequencies, self.magnitude, true, &mut g.q);
        b.rope(batch, c.kv_heads, d, &self.frequencies, self.magnitude, true, &mut g.k);
        // The gradients before the norm per head go into buffers that are free by now.
        if let (Some(norm), Some(raw)) = (&w.q_norm, &kept.q_raw) {
            b.rms_norm_backward(tokens * c.heads, d, raw, norm, c.rms_norm_eps, &g.q, &mut kept.q, false);
        }
        if let (Some(norm), Some(raw)) = (&w.k_norm, &kept.k_raw) {
            b.rms_norm_backward(tokens * c.kv_heads, d, raw, norm, c.rms_norm_eps, &g.k, &mut kept.k, false);
        }
        let (dq, dk) = if c.qk_norm { (&kept.q, &kept.k) } else { (&g.q, &g.k) };
        b.rms_norm(tokens, h, &work.hidden[from], &w.input_norm, c.rms_norm_eps, &mut work.normed);
        let mut group = [
            backward!(Module::Q, dq, down_q.as_ref()),
            backward!(Module::K, dk, down_k.as_ref()),
            backward!(Module::V, &g.v, down_v.as_ref()),
        ];
        b.linear_backward(batch, h, &work.normed, &mut group, (!lowest).then_some(&mut g.normed));
        if !lowest {
            let x = &work.hidden[from];
            b.rms_norm_backward(tokens, h, x, &w.input_norm, c.rms_norm_eps, &g.normed, &mut g.hidden, true);
        }
    }

    /// Logits after the last of `batch`'s tokens, which stand at positions `cache.len()..` of one text.
    pub fn generate_step(
        &self,
        batch: &B::Batch,
        tokens: usize,
        layout: &AdapterLayout,
        adapter: &Adapter<B>,
        cache: &mut KeyValueCache<B>,
        work: &mut Workspace<B>,
    ) -> Vec<f32> {
        let (b, c) = (&self.backend, &self.config);
        let h = c.hidden_size;
        let past = cache.len;
        assert!(past + tokens <= cache.capacity, "key-value cache is full");
        b.embed(batch, &self.embedding, h, &mut work.hidden[0]);
        for (layer, (keys, values)) in cache.layers.iter_mut().enumerate() {
            let attend = Attend::Cached { past, keys, values };
            self.forward_layer(batch, tokens, layer, layout, adapter, work, attend, Purpose::Evaluate);
        }
        cache.len += tokens;
        let last = work.slot(c.layers);
        b.rms_norm(tokens, h, &work.hidden[last], &self.final_norm, c.rms_norm_eps, &mut work.normed);
        b.logits(h, &work.normed, tokens - 1, self.head())
    }
}

/// What a block is run for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Dropout off.
    Evaluate,
    /// Dropout on.
    Train,
    /// Again, for the backward pass: as in training, but the block's output is not needed.
    Rebuild,
}

/// Which keys and values the queries meet.
enum Attend<'a, B: Backend> {
    /// Those of the micro-batch, example by example.
    Batch,
    /// One text, of which `past` tokens are in the cache already.
    Cached { past: usize, keys: &'a mut B::Tensor, values: &'a mut B::Tensor },
}

/// A linear layer with its adapter as the backend takes it.
fn project<'a, B: Backend>(
    linear: &'a Linear<B>,
    lora: Option<crate::backend::Lora<'a, B>>,
    output: Option<&'a mut B::Tensor>,
    down: &'a mut Option<B::Tensor>,
) -> Projection<'a, B> {
    let down = if lora.is_some() { down.as_mut() } else { None };
    Projection { weight: &linear.weight, bias: linear.bias.as_ref(), lora, output, down }
}

/// The gradients of A and B of each module of a block.
fn gradient_slots<'a, B: Backend>(
    layout: &AdapterLayout,
    layer: usize,
    gradients: &'a mut Adapter<B>,
) -> [Option<(&'a mut B::Tensor, &'a mut B::Tensor)>; 7] {
    let mut slots = [const { None }; 7];
    let sites: Vec<_> =
        Module::ALL.into_iter().filter_map(|m| layout.site(layer, m).map(|s| (s, m))).collect();
    let Some(&(first, _)) = sites.first() else { return slots };
    // The sites of a block are neighbours, in order.
    let mut pairs = gradients.tensors[2 * first..2 * (first + sites.len())].chunks_exact_mut(2);
    for (_, module) in sites {
        if let Some([a, b]) = pairs.next() {
            slots[module as usize] = Some((a, b));
        }
    }
    slots
}

/// Sizes of a micro-batch that the host needs to know.
#[derive(Clone, Copy, Debug)]
pub struct BatchShape {
    /// Tokens.
    pub tokens: usize,
    /// Positions with a target.
    pub labelled: usize,
}

impl BatchShape {
    /// The sizes of `batch`.
    pub fn of(batch: &Batch) -> Self {
        Self { tokens: batch.len(), labelled: batch.labelled.len() }
    }
}

/// Keys and values of one text, per block.
pub struct KeyValueCache<B: Backend> {
    layers: Vec<(B::Tensor, B::Tensor)>,
    len: usize,
    capacity: usize,
}

impl<B: Backend> KeyValueCache<B> {
    /// Room for `capacity` tokens.
    pub fn new(decoder: &Decoder<B>, capacity: usize) -> Self {
        let cols = decoder.config.kv_heads * decoder.config.head_dim;
        let zeros = || decoder.backend.zeros(capacity * cols);
        Self { layers: (0..decoder.config.layers).map(|_| (zeros(), zeros())).collect(), len: 0, capacity }
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is in the cache.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
