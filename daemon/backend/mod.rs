//! The only door to arithmetic.
//!
//! [`Backend`] has one method per operation of a training step; its doc comment is the operation's contract: shapes,
//! whether the result is written (`=`) or added (`+=`), and what may depend on what. Every backend obeys two rules:
//!
//! * **Fixed order.** A sum has one order, whatever the number of threads or blocks. Same device, same build, same bits.
//! * **Rows are independent.** What an operation computes for a token depends on that token's sequence only, never on
//!   what else is in the micro-batch; sums over tokens (the adapter's gradients) are taken sequence by sequence, in
//!   order. So 8 × 1, 4 × 2 and 1 × 8 sequences give the same bits.
//!
//! M is the number of tokens of the micro-batch, H the hidden size, T the length of one example.

pub use frozen::{Absmax, Blob, DenseMatrix, Dtype, FrozenMatrix, Nf4Matrix};

pub mod cpu;
pub mod cuda;
mod frozen;
pub mod nf4;
pub mod philox;

/// One micro-batch on the host: one or more sequences, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Token ids, `[M]`.
    pub tokens: Vec<u32>,
    /// Position of each token in its example, `[M]`.
    pub positions: Vec<u32>,
    /// Token to predict at each position, or negative, `[M]`.
    pub targets: Vec<i32>,
    /// Offsets of the examples (attention stays inside one), starting with 0 and ending with M.
    pub cu_seqlens: Vec<u32>,
    /// Offsets of the sequences (gradients are summed one after the other), starting with 0 and ending with M.
    pub sequence_offsets: Vec<u32>,
    /// Dropout key of each sequence: a function of (seed, epoch, index), not of the place in the batch.
    pub sequence_keys: Vec<u64>,
    /// Positions that have a target, ascending.
    pub labelled: Vec<u32>,
}

impl Batch {
    /// M
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The sums of `losses`, one per labelled position, over each sequence: token by token in f64, one order.
    pub fn sum_by_sequence(&self, losses: &[f64]) -> Vec<f64> {
        let mut sums = vec![0.0; self.sequence_keys.len()];
        let mut sequence = 0;
        for (&position, loss) in self.labelled.iter().zip(losses) {
            while position >= self.sequence_offsets[sequence + 1] {
                sequence += 1;
            }
            sums[sequence] += loss;
        }
        sums
    }

    /// Appends one sequence.
    pub fn push(&mut self, tokens: &[u32], targets: &[i32], positions: &[u32], cu_seqlens: &[u32], key: u64) {
        assert!(tokens.len() == targets.len() && tokens.len() == positions.len());
        if self.sequence_offsets.is_empty() {
            self.sequence_offsets.push(0);
            self.cu_seqlens.push(0);
        }
        let base = self.tokens.len() as u32;
        self.labelled
            .extend((0..tokens.len() as u32).filter(|&t| targets[t as usize] >= 0).map(|t| base + t));
        self.tokens.extend_from_slice(tokens);
        self.targets.extend_from_slice(targets);
        self.positions.extend_from_slice(positions);
        self.cu_seqlens.extend(cu_seqlens.iter().skip(1).map(|&offset| base + offset));
        self.sequence_offsets.push(self.tokens.len() as u32);
        self.sequence_keys.push(key);
    }
}

/// Shape of one attention operation.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Multiplier of the scores, 1/√head_dim.
    pub scale: f64,
    /// Key j is visible to query i when `i - j < window` (and j ≤ i).
    pub window: Option<usize>,
}

/// Dropout on the input of a LoRA A, as PEFT applies it.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    /// Share of elements set to 0; the others are multiplied by 1/(1 − p).
    pub probability: f64,
    /// Distinguishes the modules; the key of the sequence and the element's index are mixed in.
    pub module: u32,
}

/// The adapter of one linear layer.
pub struct Lora<'a, B: Backend + ?Sized> {
    /// A, `[r, in]`.
    pub a: &'a B::Tensor,
    /// B, `[out, r]`.
    pub b: &'a B::Tensor,
    /// r
    pub rank: usize,
    /// alpha/r or alpha/√r.
    pub scale: f64,
    /// Dropout on X on its way into A.
    pub dropout: Option<Dropout>,
}

/// One linear layer in a group that shares its input.
pub struct Projection<'a, B: Backend + ?Sized> {
    /// W, `[out, in]`.
    pub weight: &'a B::Matrix,
    /// Bias, `[out]`.
    pub bias: Option<&'a B::Tensor>,
    /// The adapter, if this layer has one.
    pub lora: Option<Lora<'a, B>>,
    /// Y, `[M, out]`; `None` computes `down` only (a recomputed layer whose output nobody reads).
    pub output: Option<&'a mut B::Tensor>,
    /// scale · drop(X)·Aᵀ, `[M, r]`: kept for the backward pass. Present exactly when `lora` is.
    pub down: Option<&'a mut B::Tensor>,
}

/// The backward half of a [`Projection`].
pub struct ProjectionBackward<'a, B: Backend + ?Sized> {
    /// W, `[out, in]`.
    pub weight: &'a B::Matrix,
    /// The adapter.
    pub lora: Option<Lora<'a, B>>,
    /// dY, `[M, out]`.
    pub output_gradient: &'a B::Tensor,
    /// What the forward pass kept, `[M, r]`.
    pub down: Option<&'a B::Tensor>,
    /// dA, `[r, in]`, `+=`.
    pub a_gradient: Option<&'a mut B::Tensor>,
    /// dB, `[out, r]`, `+=`.
    pub b_gradient: Option<&'a mut B::Tensor>,
}

/// Constants of one AdamW update (`torch.optim.AdamW`).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// β₁
    pub beta1: f64,
    /// β₂
    pub beta2: f64,
    /// ε
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u64,
    /// Multiplier of the accumulated gradient: 1/labelled tokens × clipping.
    pub gradient_scale: f64,
}

/// One adapter tensor with what its update needs.
pub struct Parameter<'a, B: Backend + ?Sized> {
    /// The master weight.
    pub value: &'a mut B::Tensor,
    /// The accumulated gradient.
    pub gradient: &'a B::Tensor,
    /// First moment.
    pub m: &'a mut B::Tensor,
    /// Second moment.
    pub v: &'a mut B::Tensor,
}

/// What adapter parameters are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The weights: products read them.
    Weights,
    /// Gradients or moments.
    Sums,
}

/// Memory of a device that has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All of it, in bytes.
    pub total: u64,
    /// What can still be taken.
    pub available: u64,
}

/// Arithmetic on one device. See the module's head comment for the rules.
pub trait Backend {
    /// A flat array of activations or adapter weights. Activations are allocated for the largest micro-batch and used
    /// from the front.
    type Tensor;
    /// A frozen matrix, ready for this device.
    type Matrix;
    /// A micro-batch, ready for this device.
    type Batch;

    /// What the bits depend on besides the inputs: device, compute type.
    fn identity(&self) -> String;
    /// What it computes on, in words: `CPU (x86-64, AVX-512, 2 cores)`.
    fn device(&self) -> String;
    /// Bytes of one activation element.
    fn activation_size(&self) -> usize;
    /// Bytes of an adapter parameter with its gradient, both moments and whatever copy the products want.
    fn parameter_size(&self) -> usize;
    /// Bytes that a frozen matrix keeps in use once it is taken.
    fn matrix_bytes(&self, matrix: &FrozenMatrix) -> u64;
    /// The memory that all of it comes from, where that is not the system's.
    fn memory(&self) -> Option<DeviceMemory> {
        None
    }

    /// Bytes that the operations of a step hold beside their arguments, at most at a time.
    fn scratch_bytes(&self, shape: StepShape) -> u64;

    /// Takes the scratch memory of steps of up to this shape, so that a longer batch later does not have to.
    fn reserve(&self, shape: StepShape);

    /// An activation of `len` zeros. Memory is taken here, in the next two and in [`Backend::reserve`].
    fn zeros(&self, len: usize) -> Self::Tensor;
    /// `len` zeros that are never rounded to the type of activations: weights of norms, biases, log-sums.
    fn floats(&self, len: usize) -> Self::Tensor;
    /// Zeros for one value per adapter parameter: a tensor of each length, never rounded either. What belongs together is
    /// made together: [`Backend::clear_all`], [`Backend::square_sum`] and [`Backend::adamw`] take all tensors of a call, in
    /// its order.
    fn parameters(&self, lens: &[usize], role: Role) -> Vec<Self::Tensor>;
    /// Copies from the host; `values` may be shorter than the tensor.
    fn write(&self, tensor: &mut Self::Tensor, values: &[f32]);
    /// Copies the first `len` elements to the host.
    fn read(&self, tensor: &Self::Tensor, len: usize) -> Vec<f32>;
    /// Sets every element of [`Backend::parameters`] to 0.
    fn clear_all(&self, tensors: &mut [Self::Tensor]);
    /// Waits until nothing computes any more: operations may return before they are done.
    fn synchronize(&self);
    /// Takes a frozen matrix.
    fn matrix(&self, matrix: FrozenMatrix) -> Self::Matrix;
    /// Takes a micro-batch.
    fn batch(&self, batch: Batch) -> Self::Batch;

    /// `out[t] = table[tokens[t]]`, `[M, H]`.
    fn embed(&self, batch: &Self::Batch, table: &Self::Matrix, hidden: usize, out: &mut Self::Tensor);

    /// `y += x`, `len` elements.
    fn add(&self, len: usize, x: &Self::Tensor, y: &mut Self::Tensor);

    /// RMSNorm (arXiv 1910.07467): `y = x / √(mean(x²) + ε) · w`, per row of `[rows, cols]`.
    fn rms_norm(
        &self,
        rows: usize,
        cols: usize,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        epsilon: f64,
        y: &mut Self::Tensor,
    );
    /// `x += delta`, then [`Backend::rms_norm`] of x: the same bits as the two operations, the sum read once.
    fn add_rms_norm(
        &self,
        rows: usize,
        cols: usize,
        delta: &Self::Tensor,
        x: &mut Self::Tensor,
        weight: &Self::Tensor,
        epsilon: f64,
        y: &mut Self::Tensor,
    ) {
        self.add(rows * cols, delta, x);
        self.rms_norm(rows, cols, x, weight, epsilon, y);
    }
    /// With s = 1/√(mean(x²) + ε) and g = dy·w: `dx = s·g − x·s³·mean(g·x)`; `+=` when `accumulate`.
    fn rms_norm_backward(
        &self,
        rows: usize,
        cols: usize,
        x: &Self::Tensor,
        weight: &Self::Tensor,
        epsilon: f64,
        dy: &Self::Tensor,
        dx: &mut Self::Tensor,
        accumulate: bool,
    );

    /// For each projection: `Y = X·Wᵀ + bias + scale·(drop(X)·Aᵀ)·Bᵀ`, X `[M, in]`.
    fn linear(
        &self,
        batch: &Self::Batch,
        inputs: usize,
        x: &Self::Tensor,
        projections: &mut [Projection<'_, Self>],
    );
    /// With U the kept `down` and G = scale·dY·B: `dB += dYᵀ·U`, `dA += Gᵀ·drop(X)`,
    /// `dX = Σ over the projections of dY·W + drop'(G·A)`. The base gets no gradient. `dx = None` skips dX.
    fn linear_backward(
        &self,
        batch: &Self::Batch,
        inputs: usize,
        x: &Self::Tensor,
        projections: &mut [ProjectionBackward<'_, Self>],
        dx: Option<&mut Self::Tensor>,
    );

    /// Rotary position embedding in place, on `[M, heads, head_dim]`: element i of the first half is paired with
    /// element i of the second (the layout of Hugging Face checkpoints); the angle is `position · frequencies[i]`, in
    /// f32 as transformers computes it; both are multiplied by `magnitude` (1 but for YaRN). `inverse` rotates back
    /// (the gradient).
    fn rope(
        &self,
        batch: &Self::Batch,
        heads: usize,
        head_dim: usize,
        frequencies: &[f32],
        magnitude: f32,
        inverse: bool,
        x: &mut Self::Tensor,
    );

    /// Causal attention inside each example. q `[M, heads, d]`, k and v `[M, kv_heads, d]`, out `[M, heads, d]`;
    /// `log_sum` `[M, heads]` keeps the logarithm of each query's sum of exponentials. Scratch is linear in T.
    fn attention(
        &self,
        batch: &Self::Batch,
        shape: AttentionShape,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        out: &mut Self::Tensor,
        log_sum: &mut Self::Tensor,
    );
    /// The gradients of [`Backend::attention`] from its inputs and results; all three `=`.
    fn attention_backward(
        &self,
        batch: &Self::Batch,
        shape: AttentionShape,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        out: &Self::Tensor,
        log_sum: &Self::Tensor,
        dout: &Self::Tensor,
        dq: &mut Self::Tensor,
        dk: &mut Self::Tensor,
        dv: &mut Self::Tensor,
    );
    /// Attention of `rows` new tokens of one example at positions `past ..` over `past + rows` cached keys and values
    /// (those of the new tokens are in the cache already). For generation; `out` as in [`Backend::attention`].
    fn attention_cached(
        &self,
        shape: AttentionShape,
        rows: usize,
        past: usize,
        q: &Self::Tensor,
        k_cache: &Self::Tensor,
        v_cache: &Self::Tensor,
        out: &mut Self::Tensor,
    );
    /// `destination[offset .. offset + len] = source[.. len]`.
    fn copy_into(&self, len: usize, source: &Self::Tensor, destination: &mut Self::Tensor, offset: usize);

    /// `out = silu(gate)·up`, silu(x) = x/(1 + e⁻ˣ); `len` elements.
    fn swiglu(&self, len: usize, gate: &Self::Tensor, up: &Self::Tensor, out: &mut Self::Tensor);
    /// In place: `gate` becomes its gradient, `up` becomes its gradient.
    fn swiglu_backward(
        &self,
        len: usize,
        dout: &Self::Tensor,
        gate: &mut Self::Tensor,
        up: &mut Self::Tensor,
    );

    /// `out[i] = x[labelled[i]]`, rows of `cols`.
    fn gather_labelled(&self, batch: &Self::Batch, cols: usize, x: &Self::Tensor, out: &mut Self::Tensor);
    /// `out = 0`, then `out[labelled[i]] = x[i]`, `[M, cols]`.
    fn scatter_labelled(&self, batch: &Self::Batch, cols: usize, x: &Self::Tensor, out: &mut Self::Tensor);

    /// Σ over labelled tokens of −log `softmax(h·Wᵀ)[target]`, h `[labelled, H]`, W `[vocabulary, H]`, and (if asked)
    /// `dh = (softmax − onehot)·W`, not yet divided by the number of tokens. Works in chunks of tokens: the logits of
    /// a whole sequence never exist. The loss is returned as one f64 per sequence of the batch.
    fn cross_entropy(
        &self,
        batch: &Self::Batch,
        hidden: usize,
        h: &Self::Tensor,
        head: &Self::Matrix,
        dh: Option<&mut Self::Tensor>,
    ) -> Vec<f64>;
    /// Logits of row `row` of h `[.., H]`, for generation.
    fn logits(&self, hidden: usize, h: &Self::Tensor, row: usize, head: &Self::Matrix) -> Vec<f32>;

    /// Σ x² over all tensors of [`Backend::parameters`], in a fixed order, in f64.
    fn square_sum(&self, tensors: &[&Self::Tensor]) -> f64;
    /// One AdamW step on every parameter: `p −= lr·wd·p; m = β₁m + (1−β₁)g; v = β₂v + (1−β₂)g²;
    /// p −= lr/(1−β₁ᵗ) · m/(√v/√(1−β₂ᵗ) + ε)`.
    fn adamw(&self, constants: AdamW, parameters: &mut [Parameter<'_, Self>]);
}

/// Sizes on which the scratch memory of a step depends.
#[derive(Clone, Copy, Debug)]
pub struct StepShape {
    /// Tokens of the micro-batch.
    pub tokens: usize,
    /// Positions with a target.
    pub labelled: usize,
    /// Longest example.
    pub longest: usize,
    /// H
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Vocabulary.
    pub vocabulary: usize,
    /// r
    pub rank: usize,
    /// Whether LoRA inputs are dropped out.
    pub dropout: bool,
    /// Elements that share a scale, where the base is in NF4.
    pub block: Option<usize>,
}
