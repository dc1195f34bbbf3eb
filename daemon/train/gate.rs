//! The gate: asked before every micro-step whether to compute, wait or stop, and whether anybody wants something of
//! the run in between. In the foreground it listens to signals; in the worker it holds the daemon's permit.

use crate::reason::Reason;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What the next micro-step may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Compute.
    Run,
    /// Wait this long, then ask again.
    Wait(Duration),
    /// Write a checkpoint and end the attempt.
    Stop(Reason),
}

/// Work that is wanted between two micro-steps. It never changes a result either. Each has a number, by which its
/// answer is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Write a checkpoint where the run stands, inside a step if need be.
    Checkpoint(u64),
    /// Compute held-out loss, for information only: the run does not remember it.
    Evaluate(u64),
}

/// Decides the pace. Pacing never changes a result: it moves micro-steps in time and nothing else.
pub trait Gate {
    /// The pace of the next micro-step.
    fn pace(&mut self) -> Pace;

    /// The next piece of work that is wanted, each once. A checkpoint computes nothing and is written even while the gate
    /// is closed; an evaluation waits until it opens.
    fn request(&mut self) -> Option<Request> {
        None
    }
}

/// A gate that is always open.
pub struct Open;

impl Gate for Open {
    fn pace(&mut self) -> Pace {
        Pace::Run
    }
}

/// Open until a flag is raised (by a signal handler).
pub struct UntilRaised(pub Arc<AtomicBool>);

impl Gate for UntilRaised {
    fn pace(&mut self) -> Pace {
        if self.0.load(Ordering::Relaxed) { Pace::Stop(Reason::User) } else { Pace::Run }
    }
}
