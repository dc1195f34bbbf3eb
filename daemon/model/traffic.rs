//! How many bytes a micro-batch moves between memory and the chip, from shapes alone: what the arithmetic of [`super::work`]
//! has to be fed with.
//!
//! Weights are read once a pass, whatever the number of tokens. A linear layer over a 4-bit weight takes one of two ways:
//!
//! ```text
//!   fused          reads 0.516 B a weight                                           every pass
//!   dequantised    reads 0.516 B, writes 2 B, and the product reads 2 B             every pass
//!     with scratch   the same, but what a block's recomputation has written its input gradients read once more
//! ```
//!
//! Activations are counted as the kernels are launched, in bf16 elements of a token and block that are read or written
//! (d the width, q = heads · head_dim, k = kv_heads · head_dim, f the width of the feed-forward part); what stays in the
//! caches within a kernel is not counted again.
//!
//! | | forward | backward |
//! |---|---|---|
//! | norms, with the residual | 8 d | 8 d; 4 d to have their outputs again |
//! | q, k, v | d, q + 2 k; d for A | q + 2 k, d; d, q + 2 k for A and B |
//! | rotation | 2 q + 2 k | 2 q + 2 k |
//! | attention | 2 q + 2 k | 6 q + 6 k |
//! | o | q, d; q for A | d, q; q, d for A and B |
//! | gate, up | d, 2 f; d for A | 2 f, d; d, 2 f for A and B |
//! | SwiGLU | 3 f | 5 f; 3 f to have its output again |
//! | down | f, d; f for A | d, f; f, d for A and B |
//!
//! The backward pass of attention reads q, k, v and the output's gradient in both of its kernels, and the output once.
//! The recomputation is a forward pass without what follows the down projection. A labelled token costs 16 bytes a
//! word of the vocabulary (logits written in fp32, read twice, their gradient written and read in bf16), and every
//! [`CHUNK`] of them the head twice.

use super::adapter::{AdapterLayout, Module};
use super::config::ModelConfig;
use super::work::{Load, Recompute, block};

/// Bytes of a weight in NF4 with double quantisation: 4 bits, 8 for every 64 weights, 32 for every 16,384.
pub const NF4: f64 = (4.0 + 8.0 / 64.0 + 32.0 / (64.0 * 256.0)) / 8.0;
/// Bytes of a bf16.
const BF16: f64 = 2.0;
/// Labelled tokens whose logits exist at a time.
pub const CHUNK: f64 = 512.0;
/// Bytes that a logit moves.
const LOGIT: f64 = 16.0;

/// How a 4-bit weight is multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Dequantised in the product.
    Fused,
    /// Dequantised to memory before every product.
    Dequantised,
    /// Dequantised to memory before the forward pass, and once for recomputation and input gradient together.
    SharedScratch,
}

/// Bytes of `weights` weights in NF4 over the three passes of a micro-batch with recomputation.
pub fn weight_bytes(weights: f64, path: Path) -> f64 {
    const PASSES: f64 = 3.0;
    weights
        * match path {
            Path::Fused => PASSES * NF4,
            Path::Dequantised => PASSES * (NF4 + 2.0 * BF16),
            Path::SharedScratch => 2.0 * (NF4 + BF16) + PASSES * BF16,
        }
}

/// Bytes by unit of [`Load`], for one model and adapter: the least that the kernels move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traffic {
    /// Of the weights: forward, and all that training adds.
    weights: (f64, f64),
    /// Of a token's activations, likewise.
    token: (f64, f64),
    /// Of a labelled token, forward; the gradient adds as much of the head, and what is in [`LOGIT`].
    vocabulary: f64,
    head: f64,
}

impl Traffic {
    /// The traffic of this model with this adapter, whose weights take `weight` bytes each ([`NF4`], or 2).
    pub fn new(
        config: &ModelConfig,
        layout: &AdapterLayout,
        recompute: impl Into<Recompute>,
        weight: f64,
    ) -> Traffic {
        let (d, f) = (config.hidden_size as f64, config.intermediate_size as f64);
        let (q, k) = ((config.heads * config.head_dim) as f64, (config.kv_heads * config.head_dim) as f64);
        let forward = 14.0 * d + 7.0 * q + 6.0 * k + 7.0 * f;
        let backward = 20.0 * d + 12.0 * q + 12.0 * k + 14.0 * f;
        let again = match recompute.into() {
            Recompute::Nothing => 0.0,
            Recompute::Blocks => forward,
            // Neither is the product made nor its output added to the residual; A still reads its input.
            Recompute::BlocksButDown => forward - 3.0 * d - f,
        };
        let layers = config.layers as f64;
        let behind = layout.lowest_layer().map_or(0.0, |lowest| (config.layers - lowest) as f64);
        let (rows, columns) = Module::Down.shape(config);
        let block = block(config) as f64;
        let block_again = match (again == 0.0, again == forward) {
            (true, _) => 0.0,
            (_, true) => block,
            _ => block - (rows * columns) as f64,
        };
        Traffic {
            weights: (layers * block * weight, behind * (block + block_again) * weight),
            token: (BF16 * layers * forward, BF16 * behind * (backward + again)),
            vocabulary: config.vocab_size as f64,
            head: BF16 * (config.vocab_size * config.hidden_size) as f64,
        }
    }

    /// Training on a micro-batch, GB.
    pub fn train(&self, load: Load) -> f64 {
        let labelled = load.labelled as f64;
        let head = 2.0 * self.head * (labelled / CHUNK).ceil() + labelled * LOGIT * self.vocabulary;
        (self.weights.0 + self.weights.1 + load.tokens as f64 * (self.token.0 + self.token.1) + head) / 1e9
    }

    /// Loss of a micro-batch, GB: the logits are written and read once.
    pub fn evaluate(&self, load: Load) -> f64 {
        let labelled = load.labelled as f64;
        let head = self.head * (labelled / CHUNK).ceil() + labelled * 8.0 * self.vocabulary;
        (self.weights.0 + load.tokens as f64 * self.token.0 + head) / 1e9
    }
}

#[cfg(test)]
mod tests {
    use super::super::work::block;
    use super::super::work::tests::{close, everywhere, llama_1b, llama_3b, llama_8b, qwen_half};
    use super::*;

    /// Counted by hand, GB over three passes: fused, dequantised.
    #[test]
    fn weights_are_read_as_often_as_a_hand_counts() {
        let models = [
            (qwen_half(), 0.554, 4.85),
            (llama_1b(), 1.5, 13.2),
            (llama_3b(), 4.4, 38.2),
            (llama_8b(), 10.8, 94.6),
        ];
        for (config, fused, dequantised) in models {
            let weights = (config.layers * block(&config)) as f64;
            close(weight_bytes(weights, Path::Fused) / 1e9, fused);
            close(weight_bytes(weights, Path::Dequantised) / 1e9, dequantised);
            // One of three times is not written and not read packed.
            let saved = weight_bytes(weights, Path::Dequantised) - weight_bytes(weights, Path::SharedScratch);
            close(saved, weights * (NF4 + 2.0));
        }
        close(NF4 * 8.0, 4.127);
    }

    /// Llama-3.2-1B at 2,048 tokens, by hand. A block: forward 14·2048 + 7·2048 + 6·512 + 7·8192 = 103,424 elements, again
    /// 3·2048 + 8192 fewer, backward 32·2048 + 12·512 + 14·8192 = 186,368. 16 blocks of 378,880 elements: 12.12 MB a token.
    /// Weights 3 · 973.1 M, of which 268.4 M once less, at 0.516 B. Head 8 · 525.3 MB and 2048 · 16 · 128,256 B.
    #[test]
    fn a_micro_batch_moves_what_a_hand_counts() {
        let config = llama_1b();
        let layout = everywhere(&config);
        let load = Load::full(2, 1024);
        let train = |recompute: Recompute| Traffic::new(&config, &layout, recompute, NF4).train(load);
        close(train(Recompute::BlocksButDown), 24.83 + (3.0 * 973.1 - 268.4) * 0.516 / 1e3 + 4.203 + 4.203);
        let blocks = train(Recompute::Blocks) - train(Recompute::BlocksButDown);
        close(blocks, (14_336.0 * 2.0 * 16.0 * 2048.0 + 268.4e6 * 0.516) / 1e9);
        // Without labels and tokens the weights remain.
        let nothing = Load::default();
        let kept = Traffic::new(&config, &layout, Recompute::Nothing, 2.0);
        close(kept.train(nothing), 2.0 * 973.1 * 2.0 / 1e3);
        close(kept.evaluate(nothing), 973.1 * 2.0 / 1e3);
    }
}
