//! Between the governor's thread and the owner of the runs: rulings one way, what the runs do the other.
//!
//! The owner must not mistake silence for leave: a governor whose thread has ended, or has made no round for
//! [`STALLED`] (a driver that hangs), holds everything.

use super::Ruling;
use crate::reason::Reason;
use crate::units::RunId;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// A governor that is silent for this long counts as lost. A round takes milliseconds, and comes every half second.
pub const STALLED: Duration = Duration::from_secs(10);

/// What the runs do, for the energy's account.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// The run whose worker computes; absent while none does.
    pub run: Option<RunId>,
    /// Tokens that were trained on since the daemon started, by all runs.
    pub tokens: u64,
}

impl Activity {
    fn add(&mut self, tokens: u64) {
        self.tokens = self.tokens.saturating_add(tokens);
    }
}

/// The owner's side.
#[derive(Clone, Debug)]
pub struct Door {
    ruling: watch::Receiver<Ruling>,
    activity: Arc<Mutex<Activity>>,
    /// When the last round ended, in milliseconds of the clock.
    last: Arc<AtomicU64>,
}

/// The governor's side.
#[derive(Debug)]
pub struct Bench {
    ruling: watch::Sender<Ruling>,
    activity: Arc<Mutex<Activity>>,
    last: Arc<AtomicU64>,
}

/// Both sides, with the first ruling, made at `now`.
pub fn pair(first: Ruling, now: Duration) -> (Bench, Door) {
    let (sender, receiver) = watch::channel(first);
    let activity = Arc::new(Mutex::new(Activity::default()));
    let last = Arc::new(AtomicU64::new(now.as_millis() as u64));
    let bench = Bench { ruling: sender, activity: activity.clone(), last: last.clone() };
    (bench, Door { ruling: receiver, activity, last })
}

impl Bench {
    /// A round is over, with this result.
    pub fn rule(&self, ruling: Ruling, now: Duration) {
        self.last.store(now.as_millis() as u64, Ordering::Relaxed);
        self.ruling.send_if_modified(|before| {
            let changed = *before != ruling;
            *before = ruling;
            changed
        });
    }

    /// What the runs do.
    pub fn activity(&self) -> Activity {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the owner is gone.
    pub fn is_closed(&self) -> bool {
        self.ruling.is_closed()
    }
}

impl Door {
    /// What holds now.
    pub fn ruling(&self, now: Duration) -> Ruling {
        let last = Duration::from_millis(self.last.load(Ordering::Relaxed));
        let gone = self.ruling.has_changed().is_err();
        if gone || now.saturating_sub(last) > STALLED {
            return Ruling { hold: Some(Reason::SensorLost), ..Ruling::FREE };
        }
        self.ruling.borrow().clone()
    }

    /// Returns when there is another ruling; never, when there will be none.
    pub async fn changed(&mut self) {
        if self.ruling.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Tells the governor whose worker computes.
    pub fn computes(&self, run: Option<&RunId>) {
        let mut activity = self.activity.lock().unwrap_or_else(PoisonError::into_inner);
        if activity.run.as_ref() != run {
            activity.run = run.cloned();
        }
    }

    /// Tells the governor of tokens that were trained on.
    pub fn trained(&self, tokens: u64) {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner).add(tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_a_hold() {
        let at = Duration::from_secs;
        let (bench, door) = pair(Ruling::FREE, at(100));
        assert_eq!(door.ruling(at(105)), Ruling::FREE);
        assert_eq!(door.ruling(at(111)).hold, Some(Reason::SensorLost), "no round for 11 s");
        let slow = Ruling { duty: 0.5, ..Ruling::FREE };
        bench.rule(slow.clone(), at(112));
        assert_eq!(door.ruling(at(113)), slow);
        let run = RunId::from_bits([1; 6]);
        door.computes(Some(&run));
        door.trained(7);
        door.trained(5);
        assert_eq!(bench.activity(), Activity { run: Some(run), tokens: 12 });
        drop(bench);
        assert_eq!(door.ruling(at(113)).hold, Some(Reason::SensorLost), "its thread has ended");
    }
}
