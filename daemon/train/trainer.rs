//! The micro-step, the step and the evaluation of one adapter on one base.
//!
//! ```text
//!            ┌────────── micro_step (0..n) ──────────┐
//!   step s ──┤ gradients += ∂(Σ −log p)/∂adapter     ├── update: scale by 1/labelled, clip, AdamW ──► step s+1
//!            └─ loss_sum += , labelled += , cursor += ┘         gradients = 0, sums = 0
//! ```
//!
//! Gradients are those of the *sum* over labelled tokens; the division by their number happens once, in the update.
//! So the result does not depend on how the step was cut into micro-steps, and a checkpoint may be taken between any
//! two of them.

use super::schedule::Schedule;
use crate::backend::{AdamW, Backend, Batch, Parameter, Role};
use crate::config::spec::TrainSpec;
use crate::data::Sequence;
use crate::model::adapter::{Adapter, AdapterLayout};
use crate::model::decoder::{BatchShape, Decoder, Workspace};

/// Everything that a step changes, besides counters: weights, moments, accumulated gradients.
pub struct Trainer<B: Backend> {
    /// The frozen base.
    pub decoder: Decoder<B>,
    /// Where the adapter sits.
    pub layout: AdapterLayout,
    /// Master weights.
    pub adapter: Adapter<B>,
    /// Gradient of the loss *sum* of the current step so far.
    pub gradients: Adapter<B>,
    /// AdamW's first moment.
    pub m: Adapter<B>,
    /// AdamW's second moment.
    pub v: Adapter<B>,
    work: Workspace<B>,
}

/// What a micro-step found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MicroStep {
    /// Σ −log p over the labelled tokens of each sequence, added in order to the sum it was given.
    pub loss_sum: f64,
    /// Labelled tokens.
    pub labelled: u64,
    /// Tokens.
    pub tokens: u64,
}

/// What an update did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Learning rate used.
    pub learning_rate: f64,
}

impl<B: Backend> Trainer<B> {
    /// A trainer with a fresh adapter for micro-batches of up to `capacity` tokens.
    pub fn new(
        decoder: Decoder<B>,
        layout: AdapterLayout,
        seed: u64,
        capacity: usize,
        recompute: bool,
    ) -> Self {
        let adapter = Adapter::initial(&decoder.backend, &layout, seed);
        let zeros = || Adapter::zeros(&decoder.backend, &layout, Role::Sums);
        let (gradients, m, v) = (zeros(), zeros(), zeros());
        let work = Workspace::new(&decoder, &layout, capacity, recompute);
        Self { decoder, layout, adapter, gradients, m, v, work }
    }

    /// Adds the gradients of `sequences` to the step's, and their loss to `loss_sum`, in order.
    pub fn micro_step(&mut self, sequences: &[(Sequence, u64)], loss_sum: f64) -> MicroStep {
        let (batch, shape) = collect(sequences);
        let batch = self.decoder.batch(batch);
        let losses = self.decoder.loss_and_gradients(
            &batch,
            shape,
            &self.layout,
            &self.adapter,
            &mut self.gradients,
            &mut self.work,
        );
        // What is asked next is the gate, and whoever closes it wants the device at rest.
        self.decoder.backend.synchronize();
        MicroStep {
            loss_sum: losses.iter().fold(loss_sum, |sum, loss| sum + loss),
            labelled: shape.labelled as u64,
            tokens: shape.tokens as u64,
        }
    }

    /// Σ −log p over the labelled tokens of `sequences`, added in order to `loss_sum`.
    pub fn evaluate(&mut self, sequences: &[(Sequence, u64)], loss_sum: f64) -> MicroStep {
        let (batch, shape) = collect(sequences);
        let batch = self.decoder.batch(batch);
        let losses = self.decoder.loss(&batch, shape, &self.layout, &self.adapter, &mut self.work);
        MicroStep {
            loss_sum: losses.iter().fold(loss_sum, |sum, loss| sum + loss),
            labelled: shape.labelled as u64,
            tokens: shape.tokens as u64,
        }
    }

    /// The norm of the step's gradient, before it is applied: `labelled` is the number of tokens it is a sum over.
    pub fn gradient_norm(&self, labelled: u64) -> f64 {
        let tensors: Vec<_> = self.gradients.tensors.iter().collect();
        self.decoder.backend.square_sum(&tensors).sqrt() / labelled as f64
    }

    /// The norm of the adapter: finite exactly when every weight is (a square of an f32 fits in an f64).
    pub fn adapter_norm(&self) -> f64 {
        let tensors: Vec<_> = self.adapter.tensors.iter().collect();
        self.decoder.backend.square_sum(&tensors).sqrt()
    }

    /// Applies the step's gradient and clears it. `step` counts completed updates; the norm must be finite.
    pub fn update(
        &mut self,
        spec: &TrainSpec,
        schedule: &Schedule,
        step: u64,
        labelled: u64,
        norm: f64,
    ) -> Update {
        let learning_rate = schedule.learning_rate(step);
        // torch.nn.utils.clip_grad_norm_
        let clip = if spec.max_grad_norm > 0.0 { (spec.max_grad_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let constants = AdamW {
            learning_rate,
            beta1: spec.adam_beta1,
            beta2: spec.adam_beta2,
            epsilon: spec.adam_epsilon,
            weight_decay: spec.weight_decay,
            step: step + 1,
            gradient_scale: clip / labelled as f64,
        };
        let tensors = self.adapter.tensors.iter_mut().zip(&self.gradients.tensors);
        let moments = self.m.tensors.iter_mut().zip(self.v.tensors.iter_mut());
        let mut parameters: Vec<_> = tensors
            .zip(moments)
            .map(|((value, gradient), (m, v))| Parameter::<B> { value, gradient, m, v })
            .collect();
        self.decoder.backend.adamw(constants, &mut parameters);
        self.decoder.backend.clear_all(&mut self.gradients.tensors);
        Update { grad_norm: norm, learning_rate }
    }
}

/// Sequences with their dropout keys as one micro-batch.
fn collect(sequences: &[(Sequence, u64)]) -> (Batch, BatchShape) {
    let mut batch = Batch::default();
    for (s, key) in sequences {
        batch.push(&s.tokens, &s.targets, &s.positions, &s.cu_seqlens, *key);
    }
    let shape = BatchShape::of(&batch);
    (batch, shape)
}
