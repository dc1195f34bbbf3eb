//! Between the governor's thread and the owner of the runs: rulings one way, "a worker computes" the other.
//!
//! The owner must not mistake silence for leave: a governor whose thread has ended, or has made no round for
//! [`STALLED`] (a driver that hangs), holds everything.

use super::Ruling;
use crate::reason::Reason;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;

/// A governor that is silent for this long counts as lost. A round takes milliseconds, and comes every half second.
pub const STALLED: Duration = Duration::from_secs(10);

/// The owner's side.
#[derive(Clone, Debug)]
pub struct Door {
    ruling: watch::Receiver<Ruling>,
    computing: Arc<AtomicBool>,
    /// When the last round ended, in milliseconds of the clock.
    last: Arc<AtomicU64>,
}

/// The governor's side.
#[derive(Debug)]
pub struct Bench {
    ruling: watch::Sender<Ruling>,
    computing: Arc<AtomicBool>,
    last: Arc<AtomicU64>,
}

/// Both sides, with the first ruling, made at `now`.
pub fn pair(first: Ruling, now: Duration) -> (Bench, Door) {
    let (sender, receiver) = watch::channel(first);
    let computing = Arc::new(AtomicBool::new(false));
    let last = Arc::new(AtomicU64::new(now.as_millis() as u64));
    let bench = Bench { ruling: sender, computing: computing.clone(), last: last.clone() };
    (bench, Door { ruling: receiver, computing, last })
}

impl Bench {
    /// A round is over, with this result.
    pub fn rule(&self, ruling: Ruling, now: Duration) {
        self.last.store(now.as_millis() as u64, Ordering::Relaxed);
        self.ruling.send_if_modified(|before| std::mem::replace(before, ruling) != ruling);
    }

    /// Whether a worker computes.
    pub fn computing(&self) -> bool {
        self.computing.load(Ordering::Relaxed)
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
            return Ruling { hold: Some(Reason::SensorLost), duty: 1.0, release: false };
        }
        *self.ruling.borrow()
    }

    /// Returns when there is another ruling; never, when there will be none.
    pub async fn changed(&mut self) {
        if self.ruling.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Tells the governor whether a worker computes.
    pub fn tell(&self, computing: bool) {
        self.computing.store(computing, Ordering::Relaxed);
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
        bench.rule(slow, at(112));
        assert_eq!(door.ruling(at(113)), slow);
        door.tell(true);
        assert!(bench.computing());
        drop(bench);
        assert_eq!(door.ruling(at(113)).hold, Some(Reason::SensorLost), "its thread has ended");
    }
}
