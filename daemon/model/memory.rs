//! How much memory a run takes, by part, from shapes alone: every buffer is known before the first step.

use super::adapter::{AdapterLayout, Module};
use super::config::ModelConfig;
use super::weights::Base;
use crate::backend::{FrozenMatrix, StepShape};
use crate::units::Bytes;

/// One line of a [`MemoryPlan`].
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Part {
    /// What the memory is for.
    pub name: &'static str,
    /// How much.
    pub bytes: Bytes,
}

/// Memory of a run, by part.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct MemoryPlan {
    /// Parts, largest concern first.
    pub parts: Vec<Part>,
    /// Whether activations are recomputed.
    pub recompute: bool,
}

impl MemoryPlan {
    /// The sum.
    pub fn total(&self) -> Bytes {
        self.parts.iter().map(|p| p.bytes).sum()
    }
}

/// Largest micro-batch, as far as memory is concerned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MicroBatch {
    /// Tokens.
    pub tokens: usize,
    /// Positions with a target.
    pub labelled: usize,
    /// Longest example, in tokens.
    pub longest: usize,
}

/// Elements that [`super::decoder::Workspace`] holds per token: `(kept for the backward pass, shared)`.
fn elements_per_token(config: &ModelConfig, layout: &AdapterLayout, recompute: bool) -> (usize, usize) {
    let (h, f) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let raw = if config.qk_norm { q + kv } else { 0 };
    let block = raw + q + 2 * kv + q + config.heads + h + 2 * f;
    let adapted = |layer: usize| Module::ALL.iter().filter(|&&m| layout.site(layer, m).is_some()).count();
    let kept = if recompute {
        let any =
            Module::ALL.iter().filter(|&&m| (0..config.layers).any(|l| layout.site(l, m).is_some())).count();
        block + any * layout.rank
    } else {
        (0..config.layers).map(|l| block + adapted(l) * layout.rank).sum()
    };
    let hidden = (config.layers + 1) * h;
    // normed, activated; gradients of hidden, normed, activated, attention, q, k, v.
    let shared = h + f + 2 * h + f + 2 * q + 2 * kv;
    (hidden + kept, shared)
}

/// The plan of a run. `element` and `parameter` are the backend's sizes of an activation and of an adapter parameter
/// with all that belongs to it, `base` is what the base's matrices take, `scratch` what the backend's operations need for
/// `StepShape` at a time, `program` what the process holds besides (code, tokenizer).
pub fn plan(
    config: &ModelConfig,
    layout: &AdapterLayout,
    batch: MicroBatch,
    recompute: bool,
    element: usize,
    parameter: usize,
    base: Bytes,
    scratch: Bytes,
    program: Bytes,
) -> MemoryPlan {
    let (kept, shared) = elements_per_token(config, layout, recompute);
    // Labelled rows: the hidden state, its norm, and the gradients of both.
    let labelled = 4 * batch.labelled * config.hidden_size;
    let bytes = |elements: usize| Bytes((elements * element) as u64);
    let parameters = layout.parameters() as usize;
    MemoryPlan {
        parts: vec![
            Part { name: "base", bytes: base },
            Part { name: "adapter, gradients, optimizer", bytes: Bytes((parameter * parameters) as u64) },
            // Host copies of the adapter, the moments and (inside a step) the gradients, while they are written.
            Part { name: "checkpoint while written", bytes: Bytes(4 * 4 * parameters as u64) },
            Part { name: "activations", bytes: bytes(kept * batch.tokens) },
            Part { name: "gradients of activations", bytes: bytes(shared * batch.tokens + labelled) },
            Part { name: "logits and scratch", bytes: scratch },
            Part { name: "program and tokenizer", bytes: program },
        ],
        recompute,
    }
}

/// Shape of a step as the backend needs it for its scratch.
pub fn step_shape(base: &Base, layout: &AdapterLayout, batch: MicroBatch) -> StepShape {
    let config = &base.config;
    StepShape {
        block: base.layers.iter().flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]).find_map(
            |linear| match &linear.weight {
                FrozenMatrix::Nf4(matrix) => Some(matrix.block),
                FrozenMatrix::Dense(_) => None,
            },
        ),
        tokens: batch.tokens,
        labelled: batch.labelled,
        longest: batch.longest,
        hidden: config.hidden_size,
        intermediate: config.intermediate_size,
        heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        vocabulary: config.vocab_size,
        rank: layout.rank,
        dropout: layout.dropout > 0.0,
    }
}
