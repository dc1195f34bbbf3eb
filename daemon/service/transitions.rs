//! Tells the log what happens to the runs: from the changes, with an id of the catalogue where an operator may act.
//!
//! ```text
//!   change ──► view of the run ──compared with what was told before──► one event, or none
//! ```
//!
//! Changes say only where to look. A receiver that lagged looks everywhere, so that nothing but an intermediate state is
//! ever missed; what a run had done before this daemon started is not told again.

use super::messages;
use crate::reason::Reason;
use crate::runs::{Change, Inhibitor, RunView, Runs, State};
use crate::units::RunId;
use std::collections::BTreeMap;
use tracing::Level;

/// What was last told about a run.
#[derive(Clone, Debug, PartialEq)]
struct Seen {
    state: State,
    reason: Option<Reason>,
    attempts: u32,
    checkpoint_step: Option<u64>,
    deadline_at_risk: bool,
}

impl Seen {
    fn of(view: &RunView) -> Seen {
        Seen {
            state: view.state,
            reason: view.reason,
            attempts: view.attempts,
            checkpoint_step: view.checkpoint_step,
            deadline_at_risk: view.deadline_at_risk,
        }
    }
}

/// One event of the log.
#[derive(Debug, PartialEq)]
struct Told {
    level: Level,
    id: Option<&'static str>,
    text: String,
}

/// Follows the runs.
#[derive(Debug, Default)]
pub struct Transitions {
    runs: BTreeMap<RunId, Seen>,
    inhibitors: Vec<Inhibitor>,
}

impl Transitions {
    /// From here on.
    pub fn new(runs: &Runs) -> Transitions {
        let seen = runs.views().iter().map(|view| (view.id.clone(), Seen::of(view))).collect();
        Transitions { runs: seen, inhibitors: runs.inhibitors() }
    }

    /// Tells what a change has changed.
    pub fn note(&mut self, change: &Change, runs: &Runs) {
        match change {
            Change::Added(id) | Change::State(id) | Change::Figures(id) => {
                if let Ok(view) = runs.view(id) {
                    self.look(&view);
                }
            }
            Change::Removed(id) => {
                if self.runs.remove(id).is_some() {
                    tracing::info!(RUN_ID = %id, "a run was removed");
                }
            }
            Change::Status => self.look_at_inhibitors(runs.inhibitors()),
        }
    }

    /// Tells what has changed since the last look, whatever it is.
    pub fn look_everywhere(&mut self, runs: &Runs) {
        let views = runs.views();
        self.runs.retain(|id, _| views.iter().any(|view| view.id == *id));
        for view in &views {
            self.look(view);
        }
        self.look_at_inhibitors(runs.inhibitors());
    }

    fn look(&mut self, view: &RunView) {
        let now = Seen::of(view);
        let before = self.runs.insert(view.id.clone(), now.clone());
        for told in compare(before.as_ref(), &now, view) {
            say(&told, view);
        }
    }

    fn look_at_inhibitors(&mut self, now: Vec<Inhibitor>) {
        for hold in now.iter().filter(|hold| !self.inhibitors.contains(hold)) {
            tracing::info!(
                MESSAGE_ID = messages::INHIBITOR_TAKEN,
                WHO = hold.who,
                WHY = hold.why,
                "training is held"
            );
        }
        for hold in self.inhibitors.iter().filter(|hold| !now.contains(hold)) {
            tracing::info!(MESSAGE_ID = messages::INHIBITOR_RELEASED, WHO = hold.who, "a hold has ended");
        }
        self.inhibitors = now;
    }
}

/// What is to be told about a run that was `before` and is `now`.
fn compare(before: Option<&Seen>, now: &Seen, view: &RunView) -> Vec<Told> {
    let mut told = Vec::new();
    let mut tell = |level, id, text: String| told.push(Told { level, id, text });
    let name = &view.name;
    if before.is_none() {
        tell(Level::INFO, Some(messages::RUN_SUBMITTED), format!("run {name:?} was submitted"));
    }
    // At debug: there are many, and nobody has to act.
    if let Some(step) = now.checkpoint_step
        && before.is_none_or(|before| before.checkpoint_step.is_none_or(|known| known < step))
    {
        let text = format!("run {name:?} has a checkpoint at step {step}");
        tell(Level::DEBUG, Some(messages::CHECKPOINT_WRITTEN), text);
    }
    if now.deadline_at_risk && before.is_none_or(|before| !before.deadline_at_risk) {
        let left = view.remaining_seconds;
        let left = left
            .map_or("it has yet to show its pace".into(), |left| format!("{left} s of training are left"));
        let text = format!("run {name:?} will not be done by its deadline: {left}");
        tell(Level::WARN, Some(messages::DEADLINE_AT_RISK), text);
    }
    let moved =
        before.is_none_or(|b| (b.state, b.reason, b.attempts) != (now.state, now.reason, now.attempts));
    if !moved {
        return told;
    }
    let had_worker =
        before.is_some_and(|b| matches!(b.state, State::Preparing | State::Running | State::Saving));
    let why = now.reason.map_or(String::new(), |reason| format!(": {reason}"));
    match now.state {
        // A run that was just submitted is told already.
        State::Queued if before.is_none() => {}
        State::Queued => tell(Level::INFO, None, format!("run {name:?} is queued again")),
        State::Waiting if had_worker && now.reason.is_some_and(is_loss) => {
            let text = format!("the worker of run {name:?} is gone{why}");
            tell(Level::WARN, Some(messages::WORKER_LOST), text);
        }
        State::Waiting => {
            tell(Level::INFO, Some(messages::RUN_WAITING), format!("run {name:?} is waiting{why}"));
        }
        State::Preparing => {
            let text = format!("run {name:?} begins attempt {}", now.attempts.max(1));
            tell(Level::INFO, Some(messages::RUN_STARTED), text);
        }
        State::Running => tell(Level::INFO, None, format!("run {name:?} trains")),
        State::Saving => tell(Level::INFO, None, format!("run {name:?} is being saved{why}")),
        State::Paused => {
            tell(Level::INFO, Some(messages::RUN_PAUSED), format!("run {name:?} is paused"));
        }
        State::Succeeded => {
            let text = format!("run {name:?} has succeeded after {} steps", view.step);
            tell(Level::INFO, Some(messages::RUN_SUCCEEDED), text);
        }
        State::Failed => {
            tell(Level::ERROR, Some(messages::RUN_FAILED), format!("run {name:?} has failed{why}"));
        }
        State::Cancelled => {
            tell(Level::INFO, Some(messages::RUN_CANCELLED), format!("run {name:?} was cancelled"));
        }
    }
    told
}

/// Whether a run that waits for this reason has lost its worker, when it had one.
fn is_loss(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Backoff
            | Reason::Crashed
            | Reason::Device
            | Reason::Hung
            | Reason::OutOfMemory
            | Reason::Protocol
            | Reason::Launch
            | Reason::DaemonLost
    )
}

fn say(told: &Told, view: &RunView) {
    let Told { level, id, text } = told;
    let (run, state, reason, step) = (&view.id, view.state.word(), view.reason.map(Reason::word), view.step);
    // The macros take a level that is known when they are compiled.
    macro_rules! say {
        ($at:expr) => {
            tracing::event!(
                $at,
                MESSAGE_ID = id,
                RUN_ID = %run,
                STATE = state,
                REASON = reason,
                STEP = step,
                "{text}"
            )
        };
    }
    match *level {
        Level::ERROR => say!(Level::ERROR),
        Level::WARN => say!(Level::WARN),
        Level::INFO => say!(Level::INFO),
        _ => say!(Level::DEBUG),
    }
}

#[cfg(test)]
mod tests {
    use super::super::notify::tests::running;
    use super::*;

    /// What is told along a sequence of views: ids, and the level where it is not `info`.
    fn tell(views: &[RunView]) -> Vec<(Level, Option<&'static str>)> {
        let mut before: Option<Seen> = None;
        let mut all = Vec::new();
        for view in views {
            let now = Seen::of(view);
            all.extend(compare(before.as_ref(), &now, view).into_iter().map(|t| (t.level, t.id)));
            before = Some(now);
        }
        all
    }

    fn at(state: State, reason: Option<Reason>) -> RunView {
        RunView { state, reason, checkpoint_step: None, ..running() }
    }

    #[test]
    fn a_whole_life_is_told_once_each() {
        let life = [
            at(State::Queued, None),
            at(State::Queued, None),
            at(State::Preparing, None),
            at(State::Running, None),
            RunView { step: 121, ..at(State::Running, None) },
            RunView { checkpoint_step: Some(121), ..at(State::Running, None) },
            RunView { checkpoint_step: Some(121), ..at(State::Saving, Some(Reason::User)) },
            RunView { checkpoint_step: Some(130), ..at(State::Paused, Some(Reason::User)) },
            RunView { checkpoint_step: Some(130), ..at(State::Queued, None) },
            RunView { checkpoint_step: Some(130), ..at(State::Succeeded, None) },
        ];
        let info = |id| (Level::INFO, id);
        assert_eq!(
            tell(&life),
            [
                info(Some(messages::RUN_SUBMITTED)),
                info(Some(messages::RUN_STARTED)),
                info(None),
                (Level::DEBUG, Some(messages::CHECKPOINT_WRITTEN)),
                info(None),
                (Level::DEBUG, Some(messages::CHECKPOINT_WRITTEN)),
                info(Some(messages::RUN_PAUSED)),
                info(None),
                info(Some(messages::RUN_SUCCEEDED)),
            ]
        );
    }

    #[test]
    fn a_deadline_at_risk_is_told_once() {
        let late = RunView { deadline_us: 9, deadline_at_risk: true, ..at(State::Running, None) };
        let step = RunView { step: 121, ..late.clone() };
        let told = tell(&[at(State::Running, None), late.clone(), step, at(State::Running, None), late]);
        let risks: Vec<_> = told.iter().filter(|(_, id)| *id == Some(messages::DEADLINE_AT_RISK)).collect();
        assert_eq!(risks.len(), 2, "once each time that it comes to be so");
        assert_eq!(risks[0].0, Level::WARN);
    }

    #[test]
    fn a_lost_worker_is_not_just_waiting() {
        let running = at(State::Running, None);
        let lost = tell(&[running.clone(), at(State::Waiting, Some(Reason::Backoff))]);
        assert_eq!(lost.last(), Some(&(Level::WARN, Some(messages::WORKER_LOST))));
        let held = tell(&[running.clone(), at(State::Waiting, Some(Reason::Inhibited))]);
        assert_eq!(held.last(), Some(&(Level::INFO, Some(messages::RUN_WAITING))));
        let queued = tell(&[at(State::Queued, None), at(State::Waiting, Some(Reason::Backoff))]);
        assert_eq!(queued.last(), Some(&(Level::INFO, Some(messages::RUN_WAITING))));
        let failed = tell(&[running, at(State::Failed, Some(Reason::Diverged))]);
        assert_eq!(failed.last(), Some(&(Level::ERROR, Some(messages::RUN_FAILED))));
    }
}
