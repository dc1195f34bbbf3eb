//! What a run tells while it goes on. The command line turns it into a progress bar, the worker into messages.

use crate::plan::Measured;
use crate::reason::Reason;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// One optimizer step, as it stands in `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Number of completed steps.
    pub step: u64,
    /// Passes over the data so far, with a fraction.
    pub epoch: f64,
    /// Σ −log p over the step's labelled tokens, divided by their number.
    pub loss: f64,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Tokens of the step, masked ones included.
    pub tokens: u64,
    /// Tokens per second of computing (waiting at the gate is not counted).
    pub tokens_per_second: f64,
}

/// One evaluation, as it stands in `metrics.jsonl`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationRecord {
    /// Completed steps.
    pub step: u64,
    /// Held-out loss per labelled token.
    pub eval_loss: f64,
}

/// Something that happened in a run.
#[derive(Clone, Debug)]
pub enum Event {
    /// A stage of the preparation began or went on: what, and how much of how much.
    Preparing {
        /// "reading data", "loading base", …
        what: &'static str,
        /// Done so far.
        done: u64,
        /// Of how much; 0 when unknown.
        total: u64,
    },
    /// Something the user should know that is no error.
    Note(String),
    /// Training starts (or goes on) at `step` of `total`.
    Started {
        /// Completed steps.
        step: u64,
        /// Sequences done within the next step.
        within: u64,
        /// Steps in all.
        total: u64,
        /// Whether a checkpoint was found.
        resumed: bool,
    },
    /// A micro-step was done.
    MicroStep {
        /// Completed steps.
        step: u64,
        /// Sequences done within the current step.
        done: usize,
        /// Sequences of the current step.
        of: usize,
        /// Tokens computed.
        tokens: usize,
    },
    /// A step was done.
    Step(StepRecord),
    /// An evaluation goes on: sequences done, of how many.
    Evaluating(usize, usize),
    /// An evaluation was done.
    Evaluated {
        /// What was found.
        record: EvaluationRecord,
        /// The request it answers; absent for an evaluation of the run's own.
        request: Option<u64>,
    },
    /// A checkpoint, or the results, are being written.
    Saving,
    /// A checkpoint is durable.
    Committed {
        /// Its directory.
        path: PathBuf,
        /// Its completed steps.
        step: u64,
        /// Sequences done within the step after it.
        within: u64,
        /// The request it answers, if any.
        request: Option<u64>,
    },
    /// What the run took since the last time this was told, for predictions.
    Measured(Box<Measured>),
    /// A request cannot be honoured; the run goes on.
    Refused {
        /// The request.
        request: u64,
        /// Why.
        why: String,
    },
    /// The gate asked for a stop; state is durable.
    Stopped(Reason),
}

/// Listens to a run.
pub trait Observer {
    /// Called on the training thread: be quick.
    fn observe(&mut self, event: Event);
}

/// Ignores everything.
pub struct Silent;

impl Observer for Silent {
    fn observe(&mut self, _: Event) {}
}

impl<F: FnMut(Event)> Observer for F {
    fn observe(&mut self, event: Event) {
        self(event)
    }
}
