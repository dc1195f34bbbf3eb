//! The states of a run and what leads from one to another. Pure: no clock, no disk, no bus.
//!
//! ```text
//!                 Pause                        Resume
//!            ┌──────────────► paused ◄──────┐ ────────► queued
//!            │                              │
//!   queued ──┼── Begin ──► preparing ──Training──► running ──Complete──► succeeded
//!     ▲  │   │               │  ▲            │ ▲     │
//!     │ Hold │               │  Begin     Hold │     │       Fail, from any of the three with a worker, and from
//!     │  ▼   │               │  │            ▼ │ Training    waiting when no attempt is left ──► failed
//!     │ waiting ◄────────────┼──┴─────── waiting     │
//!     │  │  ▲     Lost       │                       │       Cancel, from all that is not over ──► cancelled
//!     └──┘  │                ▼                       ▼          (through saving while there is a worker)
//!   Requeue └── Saved ──── saving ◄──── Stop(then) ──┘
//!                            │
//!                            └─ Saved: then = pause → paused, cancel → cancelled, requeue or shutdown → waiting
//! ```
//!
//! `waiting` stands twice because a run may wait with its worker parked (a short wait: it keeps its memory and goes on
//! at once) or without one. Which of the two it is, is not a state but [`Condition::worker`]; nothing of it is durable,
//! since no worker outlives its daemon. `preparing`, `running` and `saving` always have a worker; `queued`, `paused` and
//! the three last ones never.

use crate::reason::Reason;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a run is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// In the queue; another run has the device.
    Queued,
    /// Next in line, or begun, and something stands in the way.
    Waiting,
    /// The worker starts, reads the data and loads the base.
    Preparing,
    /// The worker trains or evaluates.
    Running,
    /// Stopped by a person; goes on when told to.
    Paused,
    /// The worker was told to stop and writes a checkpoint.
    Saving,
    /// Complete.
    Succeeded,
    /// Ended without a result.
    Failed,
    /// Ended by a person.
    Cancelled,
}

impl State {
    /// Every state.
    pub const ALL: [State; 9] = [
        State::Queued,
        State::Waiting,
        State::Preparing,
        State::Running,
        State::Paused,
        State::Saving,
        State::Succeeded,
        State::Failed,
        State::Cancelled,
    ];

    /// The stable word.
    pub fn word(self) -> &'static str {
        match self {
            State::Queued => "queued",
            State::Waiting => "waiting",
            State::Preparing => "preparing",
            State::Running => "running",
            State::Paused => "paused",
            State::Saving => "saving",
            State::Succeeded => "succeeded",
            State::Failed => "failed",
            State::Cancelled => "cancelled",
        }
    }

    /// Nothing follows.
    pub fn is_over(self) -> bool {
        matches!(self, State::Succeeded | State::Failed | State::Cancelled)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// What follows when the worker has saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// Paused.
    Pause,
    /// Cancelled.
    Cancel,
    /// Waiting: another run goes first, or the memory is needed elsewhere.
    Requeue,
    /// Waiting, for the next start of the daemon.
    Shutdown,
}

/// A state with what belongs to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Condition {
    /// The state.
    pub state: State,
    /// Why the run waits, is paused, saves, or ended as it did.
    pub reason: Option<Reason>,
    /// What follows `saving`; absent in every other state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub then: Option<Then>,
    /// Whether a worker works on the run.
    #[serde(skip)]
    pub worker: bool,
}

/// What happens to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// An attempt begins: a worker is being started.
    Begin,
    /// The worker is prepared, or no longer parked.
    Training,
    /// Something stands in the way.
    Hold(Reason),
    /// Nothing stands in the way any more, but another run goes first.
    Requeue,
    /// The worker is told to save and end.
    Stop(Then, Reason),
    /// The worker has ended as it was told.
    Saved,
    /// The worker has completed the run.
    Complete(Option<Reason>),
    /// The worker is gone; another attempt may do better.
    Lost(Reason),
    /// No attempt will do better.
    Fail(Reason),
    /// A client asks.
    Ask(Ask),
    /// The daemon has started: whatever worker there was is gone.
    Restart,
}

/// What a client may ask of a run that changes its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ask {
    /// Save and wait for [`Ask::Resume`].
    Pause,
    /// Go on.
    Resume,
    /// End.
    Cancel,
}

/// Why a request was refused, or an event is impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The run is over.
    #[error("the run has ended: it is {0}")]
    Over(State),
    /// Pause of a paused run.
    #[error("the run is paused already")]
    AlreadyPaused,
    /// Resume of a run that is not paused.
    #[error("the run is not paused: it is {0}")]
    NotPaused(State),
    /// Pause, resume or cancel of a run that is being cancelled.
    #[error("the run is being cancelled")]
    BeingCancelled,
    /// Checkpoint or evaluation of a run without a worker.
    #[error("the run is {0}: only a run that trains can do that")]
    NotActive(State),
    /// Removal of a run that is not over.
    #[error("the run is {0}: cancel it first")]
    NotOver(State),
    /// An event that cannot happen in this state: a defect of the caller.
    #[error("{event} cannot happen to a run that is {state}")]
    Impossible {
        /// The state.
        state: State,
        /// The event.
        event: &'static str,
    },
}

impl Condition {
    /// A run that was just submitted.
    pub fn submitted() -> Condition {
        Condition::new(State::Queued, None)
    }

    fn new(state: State, reason: Option<Reason>) -> Condition {
        let worker = matches!(state, State::Preparing | State::Running | State::Saving);
        Condition { state, reason, then: None, worker }
    }

    fn waiting(reason: Reason, worker: bool) -> Condition {
        Condition { worker, ..Condition::new(State::Waiting, Some(reason)) }
    }

    /// What the run is after `event`.
    pub fn after(self, event: Event) -> Result<Condition, Refusal> {
        use State::*;
        let Condition { state, worker, .. } = self;
        let impossible = |event| Err(Refusal::Impossible { state, event });
        if state.is_over() {
            return match event {
                // What a worker still says after its run was ended for another cause is late, not wrong.
                Event::Restart => Ok(self),
                _ => Err(Refusal::Over(state)),
            };
        }
        match event {
            Event::Ask(ask) => self.asked(ask),
            Event::Begin => match state {
                Queued | Waiting if !worker => Ok(Condition::new(Preparing, None)),
                _ => impossible("the begin of an attempt"),
            },
            Event::Training => match state {
                Preparing => Ok(Condition::new(Running, None)),
                Waiting if worker => Ok(Condition::new(Running, None)),
                _ => impossible("the start of training"),
            },
            Event::Hold(reason) => match state {
                Queued | Waiting | Preparing | Running => Ok(Condition::waiting(reason, worker)),
                _ => impossible("a hold"),
            },
            Event::Requeue => match state {
                Waiting if !worker => Ok(Condition::new(Queued, None)),
                _ => impossible("a return to the queue"),
            },
            Event::Stop(then, reason) => match state {
                _ if !worker || state == Saving => impossible("a stop"),
                _ => Ok(Condition { then: Some(then), ..Condition::new(Saving, Some(reason)) }),
            },
            Event::Saved => match state {
                Saving => Ok(self.settled(self.reason.unwrap_or(Reason::User))),
                _ => impossible("the end of saving"),
            },
            Event::Complete(reason) if worker => Ok(Condition::new(Succeeded, reason)),
            Event::Complete(_) => impossible("completion"),
            Event::Lost(_) if !worker => impossible("the loss of a worker"),
            Event::Lost(reason) if state == Saving => Ok(self.settled(reason)),
            Event::Lost(reason) => Ok(Condition::waiting(reason, false)),
            Event::Fail(_) if self.then == Some(Then::Cancel) => {
                Ok(Condition::new(Cancelled, Some(Reason::User)))
            }
            Event::Fail(reason) => match state {
                Waiting | Preparing | Running | Saving => Ok(Condition::new(Failed, Some(reason))),
                _ => impossible("a failure"),
            },
            Event::Restart => match state {
                Queued | Paused => Ok(self),
                Saving => Ok(self.settled(Reason::DaemonRestart)),
                _ => Ok(Condition::waiting(Reason::DaemonRestart, false)),
            },
        }
    }

    /// What follows `saving` once the worker is gone; `reason` is that of a wait.
    fn settled(self, reason: Reason) -> Condition {
        match self.then {
            Some(Then::Pause) => Condition::new(State::Paused, Some(Reason::User)),
            Some(Then::Cancel) => Condition::new(State::Cancelled, Some(Reason::User)),
            Some(Then::Requeue | Then::Shutdown) | None => Condition::waiting(reason, false),
        }
    }

    fn asked(self, ask: Ask) -> Result<Condition, Refusal> {
        use State::*;
        let saving = |then| Condition { then: Some(then), ..Condition::new(Saving, Some(Reason::User)) };
        let cancelling = self.then == Some(Then::Cancel);
        match ask {
            _ if cancelling => Err(Refusal::BeingCancelled),
            Ask::Pause => match self.state {
                Paused => Err(Refusal::AlreadyPaused),
                Saving if self.then == Some(Then::Pause) => Err(Refusal::AlreadyPaused),
                _ if self.worker => Ok(saving(Then::Pause)),
                _ => Ok(Condition::new(Paused, Some(Reason::User))),
            },
            Ask::Resume => match self.state {
                Paused => Ok(Condition::new(Queued, None)),
                // The worker is on its way out; a new one will go on where it stopped.
                Saving if self.then == Some(Then::Pause) => Ok(saving(Then::Requeue)),
                state => Err(Refusal::NotPaused(state)),
            },
            Ask::Cancel if self.worker => Ok(saving(Then::Cancel)),
            Ask::Cancel => Ok(Condition::new(Cancelled, Some(Reason::User))),
        }
    }
}
