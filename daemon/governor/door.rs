//! Between the governor's thread and the owner of the runs: rulings and what runs took one way, what the runs do the other.
//!
//! The owner must not mistake silence for leave: a governor whose thread has ended, or has made no round for
//! [`STALLED`] (a driver that hangs), holds everything.

use super::Ruling;
use super::energy::{Energy, Entry, Meter};
use crate::reason::Reason;
use crate::units::RunId;
use std::collections::BTreeMap;
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

/// What the meter says, for the runs' account.
#[derive(Debug, Default)]
struct Account {
    meter: Meter,
    /// What runs took in all, of those that took something since the owner looked last.
    booked: BTreeMap<RunId, Entry>,
}

/// The owner's side.
#[derive(Clone, Debug)]
pub struct Door {
    ruling: watch::Receiver<Ruling>,
    activity: Arc<Mutex<Activity>>,
    account: Arc<Mutex<Account>>,
    /// When the last round ended, in milliseconds of the clock.
    last: Arc<AtomicU64>,
}

/// The governor's side.
#[derive(Debug)]
pub struct Bench {
    ruling: watch::Sender<Ruling>,
    activity: Arc<Mutex<Activity>>,
    account: Arc<Mutex<Account>>,
    last: Arc<AtomicU64>,
}

/// Both sides, with the first ruling, made at `now`.
pub fn pair(first: Ruling, now: Duration) -> (Bench, Door) {
    let (sender, receiver) = watch::channel(first);
    let activity = Arc::new(Mutex::new(Activity::default()));
    let account = Arc::new(Mutex::new(Account::default()));
    let last = Arc::new(AtomicU64::new(now.as_millis() as u64));
    let bench =
        Bench { ruling: sender, activity: activity.clone(), account: account.clone(), last: last.clone() };
    (bench, Door { ruling: receiver, activity, account, last })
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

    /// What the meter says after a round, and what runs took in all: those that took something in it.
    pub fn account(&self, meter: &Meter, booked: impl IntoIterator<Item = (RunId, Entry)>) {
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        account.meter.clone_from(meter);
        account.booked.extend(booked);
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

    /// What the machine took until now; none without a meter that was heard lately. The difference of two is the energy
    /// between them.
    pub fn energy(&self, now: Duration) -> Option<Energy> {
        let account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        account.meter.sees(now).then(|| account.meter.total_at(now))
    }

    /// What runs took in all: those that took something since the last call.
    pub fn booked(&self) -> BTreeMap<RunId, Entry> {
        std::mem::take(&mut self.account.lock().unwrap_or_else(PoisonError::into_inner).booked)
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
    use crate::governor::readings::{Reading, Readings};
    use crate::units::{Joules, Watts};

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

    #[test]
    fn energy_between_two_moments_and_of_runs() {
        let at = Duration::from_secs_f64;
        let (bench, door) = pair(Ruling::FREE, at(100.0));
        assert_eq!((door.energy(at(100.0)), door.booked().len()), (None, 0), "no meter yet");
        let mut meter = Meter::default();
        for second in [100.0, 101.0] {
            let power = Some(Reading::Value { value: Watts(30.0), at: at(second) });
            meter.step(&Readings { at: at(second), power, ..Readings::default() }, true);
        }
        let run = RunId::from_bits([1; 6]);
        let entry = |gross| Entry { energy: Energy { gross: Joules(gross), ..Energy::default() }, tokens: 5 };
        bench.account(&meter, [(run.clone(), entry(20.0))]);
        bench.account(&meter, [(run.clone(), entry(30.0))]);
        let between = door.energy(at(101.5)).unwrap() - door.energy(at(101.1)).unwrap();
        assert!((between.gross.0 - 12.0).abs() < 1e-9, "0.4 s of 30 W: {between:?}");
        assert_eq!(door.energy(at(120.0)), None, "a meter that is silent says nothing");
        assert_eq!(door.booked(), BTreeMap::from([(run, entry(30.0))]), "the last word counts");
        assert!(door.booked().is_empty(), "told once");
    }
}
