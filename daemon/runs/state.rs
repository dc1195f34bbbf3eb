//! The states of a run and what leads from one to another. Pure: no clock, no disk, no bus.
//!
//! ```text
//!                 Pause                        Resume
//!            ┌──────────────► paused ◄──────┐ ────────► queued
//!            │                              │
//!   queued ──┼── Begin ──► preparing ──Training──► running ──Complete──► succeeded
//!     ▲  │   │               │  ▲            │ ▲     │
//!     │ Hold │               │  Begin     Hold │     │       Fail, from all that are not over but paused ──► failed
//!     │  ▼   │               │  │            ▼ │ Training
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
                Queued | Waiting | Running => Ok(Condition::waiting(reason, worker)),
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
                Queued | Waiting | Preparing | Running | Saving => Ok(Condition::new(Failed, Some(reason))),
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
            // By a person, or for the run's own quota.
            Some(Then::Pause) => Condition::new(State::Paused, Some(self.reason.unwrap_or(Reason::User))),
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Every condition that can come about.
    fn conditions() -> Vec<Condition> {
        let mut found = vec![Condition::submitted()];
        let mut next = 0;
        while next < found.len() {
            let condition = found[next];
            next += 1;
            for event in events() {
                if let Ok(after) = condition.after(event)
                    && !found.contains(&after)
                {
                    found.push(after);
                }
            }
        }
        found
    }

    fn events() -> Vec<Event> {
        let mut events = vec![
            Event::Begin,
            Event::Training,
            Event::Hold(Reason::Inhibited),
            Event::Requeue,
            Event::Saved,
            Event::Complete(None),
            Event::Lost(Reason::Backoff),
            Event::Fail(Reason::Diverged),
            Event::Restart,
        ];
        for then in [Then::Pause, Then::Cancel, Then::Requeue, Then::Shutdown] {
            events.push(Event::Stop(then, Reason::Preempted));
        }
        events.extend([Ask::Pause, Ask::Resume, Ask::Cancel].map(Event::Ask));
        events
    }

    /// What leads from where to where; the table in which a reader looks things up.
    #[rustfmt::skip]
    fn edges(from: State) -> &'static [State] {
        use State::*;
        match from {
            Queued => &[Waiting, Preparing, Paused, Failed, Cancelled],
            Waiting => &[Waiting, Queued, Preparing, Running, Saving, Paused, Succeeded, Failed, Cancelled],
            Preparing => &[Running, Saving, Waiting, Succeeded, Failed],
            Running => &[Waiting, Saving, Succeeded, Failed],
            Saving => &[Saving, Waiting, Paused, Succeeded, Failed, Cancelled],
            Paused => &[Queued, Cancelled],
            Succeeded | Failed | Cancelled => &[],
        }
    }

    #[test]
    fn the_edges_are_those_of_the_table_and_no_others() {
        let mut seen = std::collections::BTreeSet::new();
        for condition in conditions() {
            for event in events() {
                match condition.after(event) {
                    Ok(after) if after == condition => {}
                    Ok(after) => {
                        let allowed = edges(condition.state).contains(&after.state);
                        assert!(allowed, "{condition:?} became {after:?} by {event:?}");
                        seen.insert((condition.state, after.state));
                    }
                    Err(_) => {}
                }
            }
        }
        for from in State::ALL {
            for &to in edges(from) {
                assert!(seen.contains(&(from, to)), "nothing leads from {from} to {to}");
            }
        }
    }

    #[test]
    fn a_condition_is_consistent() {
        let all = conditions();
        assert!(all.len() > 15, "{}", all.len());
        for condition in all {
            let Condition { state, reason, then, worker } = condition;
            assert_eq!(then.is_some(), state == State::Saving, "{condition:?}");
            match state {
                State::Preparing | State::Running | State::Saving => assert!(worker, "{condition:?}"),
                State::Waiting => assert!(reason.is_some(), "a wait has a reason: {condition:?}"),
                _ => assert!(!worker, "{condition:?}"),
            }
            // What a crash leaves is legal, and a second crash changes nothing more.
            let stored = Condition { worker: false, ..condition };
            let restarted = stored.after(Event::Restart).unwrap();
            assert!(!restarted.worker, "{condition:?}");
            assert!(!matches!(restarted.state, State::Preparing | State::Running | State::Saving));
            assert_eq!(restarted.after(Event::Restart).unwrap(), restarted);
        }
    }

    #[test]
    fn a_person_is_never_told_of_impossible_events() {
        for condition in conditions() {
            for ask in [Ask::Pause, Ask::Resume, Ask::Cancel] {
                if let Err(refusal) = condition.after(Event::Ask(ask)) {
                    let own = match refusal {
                        Refusal::Over(state) => state.is_over(),
                        Refusal::AlreadyPaused => ask == Ask::Pause,
                        Refusal::NotPaused(_) => ask == Ask::Resume,
                        Refusal::BeingCancelled => condition.then == Some(Then::Cancel),
                        _ => false,
                    };
                    assert!(own, "{condition:?} refused {ask:?} with {refusal:?}");
                }
            }
        }
    }

    #[test]
    fn what_was_asked_for_survives_a_lost_worker_and_a_restart() {
        let running = [Event::Begin, Event::Training]
            .into_iter()
            .try_fold(Condition::submitted(), Condition::after)
            .unwrap();
        let pausing = running.after(Event::Ask(Ask::Pause)).unwrap();
        for end in [Event::Saved, Event::Lost(Reason::Crashed), Event::Restart] {
            assert_eq!(pausing.after(end).unwrap().state, State::Paused, "{end:?}");
        }
        let cancelling = pausing.after(Event::Ask(Ask::Cancel)).unwrap();
        for end in [Event::Saved, Event::Lost(Reason::Crashed), Event::Restart, Event::Fail(Reason::Diverged)]
        {
            assert_eq!(cancelling.after(end).unwrap().state, State::Cancelled, "{end:?}");
        }
        // A run that completes while it is told to stop has completed.
        assert_eq!(cancelling.after(Event::Complete(None)).unwrap().state, State::Succeeded);
        let resumed = pausing.after(Event::Ask(Ask::Resume)).unwrap();
        assert_eq!(resumed.after(Event::Saved).unwrap().state, State::Waiting);
    }

    proptest! {
        #[test]
        fn random_requests_and_events_keep_a_run_legal(choices in prop::collection::vec(0usize..64, 0..60)) {
            let events = events();
            let mut condition = Condition::submitted();
            for choice in choices {
                let event = events[choice % events.len()];
                match condition.after(event) {
                    Ok(after) => {
                        prop_assert!(after == condition || edges(condition.state).contains(&after.state));
                        prop_assert_eq!(after.then.is_some(), after.state == State::Saving);
                        condition = after;
                    }
                    Err(refusal) => prop_assert!(!refusal.to_string().is_empty()),
                }
            }
        }
    }
}
