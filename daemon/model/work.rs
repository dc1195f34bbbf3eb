//! How much arithmetic a micro-batch is, from shapes alone, in floating-point operations (a multiplication and an
//! addition are two).
//!
//! With P weights of the blocks, V·d of the head, L blocks, examples of T tokens, dq = heads · head_dim, and P_lora
//! adapter weights, a token takes
//!
//! ```text
//!   forward    2·P + 2·T·dq·L (causal attention) + 2·P_lora
//!   backward   2·P (the base is frozen) + 2.5 · attention + 4·P_lora, of the blocks from the lowest adapted one
//!   recompute  a forward pass of these blocks
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

impl std::ops::AddAssign for Load {
    fn add_assign(&mut self, other: Load) {
        self.tokens += other.tokens;
        self.squares += other.squares;
        self.labelled += other.labelled;
    }
}

/// Operations by unit of [`Load`], for one model and adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Forward pass of a token, and of a square.
    forward: (f64, f64),
    /// All that training adds to it.
    backward: (f64, f64),
    /// A labelled position's logits.
    head: f64,
}

impl Work {
    /// The work of this model with this adapter.
    pub fn new(config: &ModelConfig, layout: &AdapterLayout, recompute: bool) -> Work {
        let block: usize = Module::ALL.iter().map(|module| product(module.shape(config))).sum();
        let attention = 2.0 * (config.heads * config.head_dim) as f64;
        let layers = config.layers as f64;
        let adapter = layout.parameters() as f64;
        let weights = 2.0 * block as f64;
        let forward = (layers * weights + 2.0 * adapter, layers * attention);
        let behind = layout.lowest_layer().map_or(0.0, |lowest| (config.layers - lowest) as f64);
        let mut backward = (behind * weights + 4.0 * adapter, 2.5 * behind * attention);
        if recompute {
            backward.0 += behind * weights + 2.0 * adapter;
            backward.1 += behind * attention;
        }
        Work { forward, backward, head: 2.0 * (config.vocab_size * config.hidden_size) as f64 }
    }

    /// Training on a micro-batch, GFLOP.
    pub fn train(&self, load: Load) -> f64 {
        self.evaluate(load)
            + giga(load, self.backward)
            + giga(Load { tokens: load.labelled, squares: 0, labelled: 0 }, (self.head, 0.0))
    }

    /// Loss of a micro-batch, GFLOP.
    pub fn evaluate(&self, load: Load) -> f64 {
        giga(load, self.forward) + load.labelled as f64 * self.head / 1e9
    }
}

fn product((rows, columns): (usize, usize)) -> usize {
    rows * columns
}

fn giga(load: Load, (token, square): (f64, f64)) -> f64 {
    (load.tokens as f64 * token + load.squares as f64 * square) / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Qwen2.5-0.5B: 24 blocks, hidden 896, 14 heads of 64, 2 of them keys, intermediate 4864, vocabulary 151,936.
    fn qwen() -> ModelConfig {
        let text = r#"{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896,
            "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
            "tie_word_embeddings": true, "hidden_act": "silu", "torch_dtype": "bfloat16"}"#;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        ModelConfig::load(dir.path()).unwrap()
    }

    /// A token of full sequences of 1,024 labelled tokens, in GFLOP.
    fn per_token(recompute: bool, layers: Option<(usize, usize)>) -> (f64, f64) {
        let config = qwen();
        let layout = AdapterLayout::new(&config, 16, 1.0, 0.0, &Module::ALL, layers);
        let work = Work::new(&config, &layout, recompute);
        let load = Load { tokens: 1024, squares: 1024 * 1024, labelled: 1024 };
        (work.train(load) / 1024.0, work.evaluate(load) / 1024.0)
    }

    #[test]
    fn the_work_of_a_token_is_what_a_hand_counts() {
        let close = |value: f64, expected: f64| {
            assert!((value / expected - 1.0).abs() < 0.01, "{value} GFLOP, not {expected}");
        };
        // P = 24 · (896·896·2 + 2·896·128 + 3·896·4864) = 357.8 M; V·d = 136.1 M; P_lora = 8.8 M at r 16.
        // Forward 0.7156 + 0.0440 + 0.0176, backward 0.7156 + 0.1101 + 0.0352, head 0.2723 twice.
        close(per_token(false, None).1, 0.7772 + 0.2723);
        close(per_token(false, None).0, 0.7772 + 0.8609 + 0.5446);
        close(per_token(true, None).0, 2.0 * 0.7772 + 0.8609 + 0.5446);
        // An adapter on the upper half only: the backward pass, and P_lora, are halved.
        close(per_token(true, Some((12, 24))).0, 0.7684 + 0.5 * 0.8609 + 0.5 * 0.7772 + 0.5446);
    }
}
