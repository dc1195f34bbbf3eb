//! What daemon and worker say to each other: one JSON object per line over a stream socket, which is the worker's
//! standard input.
//!
//! ```text
//!   daemon                                   worker
//!     │ ◄──────────────── ready ────────────── │   version, process id, device
//!     │ ─── start ───────────────────────────► │   version, the run's directory and spec
//!     │ ─── permit (every 0.5 s) ────────────► │   compute or wait, until when
//!     │ ◄──────────────── beat (every 1 s) ─── │   phase, and a counter that moves with the work
//!     │ ◄── started, step, eval, committed ─── │
//!     │ ◄─────────────── parked ────────────── │   after the last micro-step under a permit that holds
//!     │ ◄────────────── measured ───────────── │   at a checkpoint, and at the end: what it took
//!     │ ─── checkpoint, evaluate, stop ──────► │   answered by committed, evaluated, refused
//!     │ ◄──────── finished | failed ────────── │   the last word; the worker exits
//! ```
//!
//! No permit, no computing: a permit says until when (on `CLOCK_MONOTONIC`, which both share) and reaches at most
//! [`PERMIT`] ahead, so a daemon that dies or hangs stops the work by itself. A line that is too long or that does not
//! parse ends the conversation. Fields may be added; a reader ignores those it does not know.

use crate::plan::Measured;
use crate::plan::page::Survey;
use crate::reason::Reason;
use crate::train::observer::{EvaluationRecord, StepRecord};
use crate::train::run::Summary;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Version of the protocol. Both sides refuse another one.
pub const VERSION: u32 = 3;

/// Longest permit.
pub const PERMIT: Duration = Duration::from_secs(2);

/// How often the daemon renews the permit.
pub const RENEWAL: Duration = Duration::from_millis(500);

/// How often a worker beats, whatever it does.
pub const BEAT: Duration = Duration::from_secs(1);

/// A worker that has heard nothing for this long stops, as if told to.
pub const SILENCE: Duration = Duration::from_secs(10);

/// A worker that has heard nothing for this long exits, even in the middle of a commit (which an exit cannot tear).
pub const ORPHANED: Duration = Duration::from_secs(45);

/// Longest line, in bytes, without its end. A summary or a step is below 2 KiB; a spec may have 64.
pub const MAX_LINE: usize = 256 * 1024;

/// From the daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Begin, or go on from the last checkpoint. Sent once.
    Start(Start),
    /// What the next micro-steps may do.
    Permit(Permit),
    /// Write a checkpoint at the next chance; also by a run that waits; answered by [`Report::Committed`], or by
    /// [`Report::Refused`], with this number.
    Checkpoint {
        /// Number of the request.
        request: u64,
    },
    /// Evaluate at the next chance, for information only: it changes nothing in the run. Answered by
    /// [`Report::Evaluated`] or [`Report::Refused`] with this number, unless the run ends before.
    Evaluate {
        /// Number of the request.
        request: u64,
    },
    /// Write a checkpoint and end.
    Stop {
        /// Why.
        reason: Reason,
    },
}

/// What to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Start {
    /// [`VERSION`].
    pub version: u32,
    /// The run, for messages.
    pub run: String,
    /// The run's directory: results and checkpoints go there, relative paths of the spec start there.
    pub directory: PathBuf,
    /// Quantised bases and tokens.
    pub cache: PathBuf,
    /// The resolved spec.
    pub spec: String,
    /// Threads to compute with; one per core when absent.
    pub threads: Option<usize>,
    /// Do not train: say what training would take.
    pub survey: Option<SurveyOrder>,
}

/// How to survey a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SurveyOrder {
    /// Compute some micro-batches and measure them; like everything that computes, under a permit.
    pub probe: bool,
}

/// Leave to compute, for a moment.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Permit {
    /// Compute; else wait for the next permit.
    pub run: bool,
    /// Share of the time that may be computed, above 0 and at most 1: after a micro-step of `t` the worker rests for
    /// `t · (1 − duty) / duty`.
    #[serde(default = "whole")]
    pub duty: f64,
    /// Until when, as milliseconds of `CLOCK_MONOTONIC`.
    pub until_ms: u64,
    /// Number of the hold, where there is no leave to compute: answered by [`Report::Parked`], once. Zero otherwise.
    #[serde(default)]
    pub hold: u64,
}

fn whole() -> f64 {
    1.0
}

/// What the worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Waiting for `start`, or for an earlier worker of the run to end.
    Starting,
    /// Reading data, loading the base.
    Preparing,
    /// Waiting for a permit.
    Parked,
    /// Computing a micro-step.
    Training,
    /// Computing held-out loss.
    Evaluating,
    /// Writing a checkpoint or the results.
    Saving,
}

/// From the worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    /// The worker is there. Its first word.
    Ready(Ready),
    /// The worker is alive.
    Beat(Beat),
    /// Prepared; training starts or goes on.
    Started(Started),
    /// A step was done.
    Step(StepRecord),
    /// Held-out loss was computed.
    Evaluated {
        /// What was found.
        record: EvaluationRecord,
        /// The request it answers; absent for an evaluation of the run's own.
        request: Option<u64>,
    },
    /// A checkpoint is durable.
    Committed {
        /// Its completed steps.
        step: u64,
        /// Sequences done within the step after it.
        within: u64,
        /// The request it answers, if any.
        request: Option<u64>,
    },
    /// A request cannot be honoured; the run goes on.
    Refused {
        /// The request.
        request: u64,
        /// Why.
        why: String,
    },
    /// Nothing computes any more, under this hold: the micro-step before it has ended.
    Parked {
        /// Its number.
        hold: u64,
    },
    /// What the run took since the last time this was told.
    Measured(Box<Measured>),
    /// Something a person should know that is no error.
    Note {
        /// In words.
        text: String,
    },
    /// The attempt ended well. The last word.
    Finished(Finished),
    /// The attempt ended badly. The last word.
    Failed(Failed),
}

/// Who the worker is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ready {
    /// [`VERSION`].
    pub version: u32,
    /// Process id.
    pub pid: u32,
    /// What it computes on, in words: `CPU (x86-64, AVX-512, 2 cores)`.
    pub device: String,
}

/// A sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Beat {
    /// What the worker is doing.
    pub phase: Phase,
    /// Grows whenever the training thread gets anywhere; a worker whose counter stands still hangs.
    pub ticks: u64,
    /// Completed steps.
    pub step: u64,
    /// Done of the phase's work (sequences of the step, rows read, …).
    pub done: u64,
    /// Of how much; 0 when unknown.
    pub of: u64,
    /// Resident memory, in bytes.
    pub memory: u64,
}

/// Where training starts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Started {
    /// Completed steps.
    pub step: u64,
    /// Sequences done within the next step.
    pub within: u64,
    /// Steps in all.
    pub total: u64,
    /// Whether a checkpoint was found.
    pub resumed: bool,
}

/// How an attempt ended well.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "how")]
pub enum Finished {
    /// The run is complete; the adapter is written.
    Complete {
        /// What was found.
        summary: Box<Summary>,
    },
    /// The run was surveyed, and nothing trained.
    Surveyed {
        /// What was found.
        survey: Box<Survey>,
        /// What was measured, if that was asked for and possible.
        measured: Option<Box<Measured>>,
        /// Why it was not possible.
        unmeasured: Option<String>,
    },
    /// Told to stop; the state is in a checkpoint (where there was any state).
    Stopped {
        /// Why.
        reason: Reason,
    },
}

/// How an attempt ended badly.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failed {
    /// The kind.
    pub reason: Reason,
    /// What was wrong, where, and what to do.
    pub message: String,
    /// Whether another attempt may do better.
    pub retry: bool,
}
