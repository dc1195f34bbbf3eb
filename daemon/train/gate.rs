//! The gate: asked before every micro-step whether to compute, wait or stop. In the foreground it listens to signals;
//! in the worker it holds the daemon's permit.

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

/// Decides the pace. Pacing never changes a result: it moves micro-steps in time and nothing else.
pub trait Gate {
    /// The pace of the next micro-step.
    fn pace(&mut self) -> Pace;
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
