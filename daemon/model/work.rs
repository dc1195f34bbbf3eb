//! How much arithmetic a micro-batch is, from shapes alone, in floating-point operations (a multiplication and an
//! addition are two).
//!
//! With P weights of the blocks, V·d of the head, L blocks, examples of T tokens, dq = heads · head_dim, and P_lora
//! adapter weights, a token takes
//!
//! ```text
//!   forward    2·P + 2·T·dq·L (causal attention) + 2·P_lora
//!   backward   2·P (the base is frozen) + 2.5 · attention + 4·P_lora, of the blocks from the lowest adapted one
//!   recompute  a forward pass of these blocks, but for the products of the down projection, which nobody reads
//!   head       2·V·d forward, 2·V·d backward, for each labelled token
//! ```
//!
//! Attention backward is five products of the size of its forward pass's two (Dao et al., arXiv 2205.14135).

use super::adapter::{AdapterLayout, Module};
use super::config::ModelConfig;

/// What there is to compute in a micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Tokens.
    pub tokens: u64,
    /// Σ length² over its examples.
    pub squares: u64,
    /// Positions with a target.
    pub labelled: u64,
}

impl Load {
    /// Examples of `length` tokens, all of them labelled.
    pub fn full(examples: u64, length: u64) -> Load {
        Load { tokens: examples * length, squares: examples * length * length, labelled: examples * length }
    }
}

impl std::ops::AddAssign for Load {
    fn add_assign(&mut self, other: Load) {
        self.tokens += other.tokens;
        self.squares += other.squares;
        self.labelled += other.labelled;
    }
}

/// What of the forward pass is computed again for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing: all activations are kept.
    Nothing,
    /// Whole blocks: what a framework does that does not look into them.
    Blocks,
    /// Blocks without the output of their down projection: what [`super::decoder`] does.
    BlocksButDown,
}

impl From<bool> for Recompute {
    /// As the decoder takes it.
    fn from(recompute: bool) -> Recompute {
        if recompute { Recompute::BlocksButDown } else { Recompute::Nothing }
    }
}

/// Arithmetic of a micro-batch by part, in GFLOP.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Parts {
    /// Products with the base, forward.
    pub linear: f64,
    /// Products with the base, for the gradients of their inputs.
    pub input_gradient: f64,
    /// Products with the adapter, and its gradients.
    pub adapter: f64,
    /// Attention, forward and backward.
    pub attention: f64,
    /// Logits and their gradient.
    pub head: f64,
    /// Everything that is computed a second time.
    pub recompute: f64,
}

impl Parts {
    /// The sum.
    pub fn total(&self) -> f64 {
        self.linear + self.input_gradient + self.adapter + self.attention + self.head + self.recompute
    }
}

/// Operations of a pass: of a token with the base, of a token with the adapter, and of a square.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Pass {
    linear: f64,
    adapter: f64,
    attention: f64,
}

/// Operations by unit of [`Load`], for one model and adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    forward: Pass,
    backward: Pass,
    recompute: Pass,
    /// A labelled position's logits.
    head: f64,
}

impl Work {
    /// The work of this model with this adapter.
    pub fn new(config: &ModelConfig, layout: &AdapterLayout, recompute: impl Into<Recompute>) -> Work {
        let (layers, width) = (config.layers as f64, (config.heads * config.head_dim) as f64);
        let weights = 2.0 * block(config) as f64;
        let adapter = layout.parameters() as f64;
        let behind = layout.lowest_layer().map_or(0.0, |lowest| (config.layers - lowest) as f64);
        let again =
            Pass { linear: behind * weights, adapter: 2.0 * adapter, attention: behind * 2.0 * width };
        let down = Module::Down.shape(config);
        let adapted = layout.sites.iter().filter(|site| site.module == Module::Down).count();
        Work {
            forward: Pass {
                linear: layers * weights,
                adapter: 2.0 * adapter,
                attention: layers * 2.0 * width,
            },
            backward: Pass {
                linear: behind * weights,
                adapter: 4.0 * adapter,
                attention: 2.5 * behind * 2.0 * width,
            },
            recompute: match recompute.into() {
                Recompute::Nothing => Pass::default(),
                Recompute::Blocks => again,
                // The product with A is needed for the gradient of B.
                Recompute::BlocksButDown => Pass {
                    linear: again.linear - behind * 2.0 * product(down) as f64,
                    adapter: again.adapter - 2.0 * (adapted * layout.rank * down.0) as f64,
                    ..again
                },
            },
            head: 2.0 * (config.vocab_size * config.hidden_size) as f64,
        }
    }

    /// Training on a micro-batch, by part.
    pub fn parts(&self, load: Load) -> Parts {
        let (tokens, squares) = (load.tokens as f64 / 1e9, load.squares as f64 / 1e9);
        let Work { forward, backward, recompute, head } = self;
        Parts {
            linear: tokens * forward.linear,
            input_gradient: tokens * backward.linear,
            adapter: tokens * (forward.adapter + backward.adapter),
            attention: squares * (forward.attention + backward.attention),
            head: 2.0 * load.labelled as f64 * head / 1e9,
            recompute: tokens * (recompute.linear + recompute.adapter) + squares * recompute.attention,
        }
    }

    /// Training on a micro-batch, GFLOP.
    pub fn train(&self, load: Load) -> f64 {
        self.parts(load).total()
    }

    /// Loss of a micro-batch, GFLOP.
    pub fn evaluate(&self, load: Load) -> f64 {
        let Pass { linear, adapter, attention } = self.forward;
        let passes = load.tokens as f64 * (linear + adapter) + load.squares as f64 * attention;
        (passes + load.labelled as f64 * self.head) / 1e9
    }
}

/// Weights of a block.
pub fn block(config: &ModelConfig) -> usize {
    Module::ALL.iter().map(|module| product(module.shape(config))).sum()
}

fn product((rows, columns): (usize, usize)) -> usize {
    rows * columns
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::path::Path;

    /// The shape of a model, from the keys of its `config.json`.
    fn config(sizes: [usize; 7], tied: bool) -> ModelConfig {
        let [hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary] = sizes;
        let text = format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": {hidden},
            "intermediate_size": {intermediate}, "num_hidden_layers": {layers}, "num_attention_heads": {heads},
            "num_key_value_heads": {kv_heads}, "head_dim": {head_dim}, "vocab_size": {vocabulary},
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "tie_word_embeddings": {tied}, "hidden_act": "silu"}}"#
        );
        ModelConfig::parse(&text, Path::new("config.json")).unwrap()
    }

    pub fn qwen_half() -> ModelConfig {
        config([896, 4864, 24, 14, 2, 64, 151_936], true)
    }

    pub fn llama_1b() -> ModelConfig {
        config([2048, 8192, 16, 32, 8, 64, 128_256], true)
    }

    pub fn llama_3b() -> ModelConfig {
        config([3072, 8192, 28, 24, 8, 128, 128_256], true)
    }

    pub fn llama_8b() -> ModelConfig {
        config([4096, 14_336, 32, 32, 8, 128, 128_256], false)
    }

    /// An adapter of rank 16 on every linear layer.
    pub fn everywhere(config: &ModelConfig) -> AdapterLayout {
        AdapterLayout::new(config, 16, 1.0, 0.0, &Module::ALL, None)
    }

    #[track_caller]
    pub fn close(value: f64, expected: f64) {
        assert!((value / expected - 1.0).abs() < 0.01, "{value}, not {expected}");
    }

    /// Counted by hand: P, V·d and P_lora in millions; GFLOP of a token of full sequences of 1,024 labelled tokens.
    #[test]
    fn the_work_of_a_token_is_what_a_hand_counts() {
        let models = [
            (qwen_half(), [357.8, 136.1, 8.8], [0.78, 0.86, 0.54], [2.18, 2.96, 2.75]),
            (llama_1b(), [973.1, 262.7, 11.272_192], [2.04, 2.16, 1.05], [5.25, 7.28, 6.74]),
            (llama_3b(), [2818.6, 394.0, 24.3], [5.86, 6.18, 1.58], [13.61, 19.47, 18.07]),
            (llama_8b(), [6979.3, 525.3, 41.9], [14.31, 14.80, 2.10], [31.21, 45.52, 41.76]),
        ];
        let load = Load::full(2, 1024);
        let token = |gflop: f64| gflop / load.tokens as f64;
        for (config, [blocks, head, adapter], [forward, backward, logits], totals) in models {
            let layout = everywhere(&config);
            close((config.layers * block(&config)) as f64 / 1e6, blocks);
            close((config.vocab_size * config.hidden_size) as f64 / 1e6, head);
            close(layout.parameters() as f64 / 1e6, adapter);
            let kinds = [Recompute::Nothing, Recompute::Blocks, Recompute::BlocksButDown];
            let works = kinds.map(|kind| Work::new(&config, &layout, kind));
            let parts = works[0].parts(load);
            close(token(works[0].evaluate(load)), forward + logits / 2.0);
            close(token(parts.total() - works[0].evaluate(load)), backward + logits / 2.0);
            close(token(parts.head), logits);
            for (work, total) in works.iter().zip(totals) {
                close(token(work.train(load)), total);
            }
        }
    }

    #[test]
    fn an_adapter_on_the_upper_half_halves_what_is_behind() {
        let config = qwen_half();
        let half = AdapterLayout::new(&config, 16, 1.0, 0.0, &Module::ALL, Some((12, 24)));
        let load = Load::full(1, 1024);
        let of = |layout: &AdapterLayout| Work::new(&config, layout, true).parts(load);
        let (all, upper) = (of(&everywhere(&config)), of(&half));
        assert_eq!((upper.linear, upper.head), (all.linear, all.head));
        close(upper.input_gradient, all.input_gradient / 2.0);
        close(upper.adapter, all.adapter / 2.0);
        close(upper.recompute, all.recompute / 2.0);
        close(upper.attention, all.attention * (1.0 + 1.25) / 3.5);
        let none = AdapterLayout::new(&config, 16, 1.0, 0.0, &[], None);
        close(Work::new(&config, &none, true).train(load), all.linear + all.attention / 3.5 + all.head);
    }
}
