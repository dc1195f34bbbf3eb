//! Between the governor's thread and the owner of the runs: rulings and what runs took one way, what the runs do the other.
//!
//! The owner must not mistake silence for leave: a governor whose thread has ended, or has made no round for
//! [`STALLED`] (a driver that hangs), holds everything.

use super::Ruling;
use super::energy::{Energy, Entry, Meter};
use crate::reason::Reason;
use crate::units::{Joules, RunId};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// A governor that is silent for this long counts as lost. A round takes milliseconds, and comes every half second.
pub const STALLED: Duration = Duration::from_secs(10);

/// Runs, and holders of a lease or hold, that are remembered between two rounds; later ones are left out of the night's
/// account. A governor that hangs must not fill the memory.
const REMEMBERED: usize = 64;

/// What the runs do, for the accounts of energy and of the night.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Activity {
    /// The run whose worker computes; absent while none does.
    pub run: Option<RunId>,
    /// Tokens that were trained on since the daemon started, by all runs.
    pub tokens: u64,
    /// Steps that were done since the daemon started, by all runs.
    pub steps: u64,
    /// What is done with the time.
    pub doing: Doing,
    /// What has happened since the last round.
    pub news: News,
}

/// What is done with the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Nothing computes.
    Waiting(Reason),
    /// A worker reads data and loads the base; the duty does not slow it.
    Preparing,
    /// A worker trains.
    Training,
    /// A worker computes held-out loss.
    Evaluating,
    /// A worker writes a checkpoint or the results.
    Saving,
}

impl Default for Doing {
    fn default() -> Doing {
        Doing::Waiting(Reason::NoRun)
    }
}

/// What has happened since a round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct News {
    /// Runs that changed, as they are now.
    pub runs: BTreeMap<RunId, RunNews>,
    /// Leases and holds, by who had them.
    pub held: BTreeMap<String, Held>,
}

/// A run, as it is now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunNews {
    /// Name, for people.
    pub name: String,
    /// The word of its state.
    pub state: &'static str,
    /// Why it is in it.
    pub reason: Option<Reason>,
    /// It has, or had until just now, a worker; or it failed without one.
    pub active: bool,
    /// Completed steps.
    pub step: u64,
    /// Loss of the last step.
    pub loss: Option<f64>,
}

/// Leases, or holds of all training, of one name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// How many began.
    pub count: u64,
    /// How long they were in force.
    pub time: Duration,
}

/// The same between the two sides, with what is still in force.
#[derive(Debug, Default)]
struct Shared {
    activity: Activity,
    /// By number: who, and until when its time is told.
    holders: BTreeMap<u64, (String, Duration)>,
}

impl Shared {
    /// Tells the time of a holder until now.
    fn hold(&mut self, who: &str, count: u64, time: Duration) {
        let held = &mut self.activity.news.held;
        if held.contains_key(who) || held.len() < REMEMBERED {
            let entry = held.entry(who.to_string()).or_default();
            entry.count += count;
            entry.time += time;
        }
    }

    /// Takes the news, with the time of the holders until now.
    fn take(&mut self, now: Duration) -> Activity {
        let mut holders = std::mem::take(&mut self.holders);
        for (who, since) in holders.values_mut() {
            self.hold(who, 0, now.saturating_sub(*since));
            *since = now.max(*since);
        }
        self.holders = holders;
        let news = std::mem::take(&mut self.activity.news);
        Activity { news, ..self.activity.clone() }
    }
}

/// What the meter says, for the runs' account.
#[derive(Debug, Default)]
struct Account {
    meter: Meter,
    /// What runs took in all, of those that took something since the owner looked last.
    booked: BTreeMap<RunId, Entry>,
    standing: Standing,
}

/// Where the governor stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standing {
    /// The board's name.
    pub board: String,
    /// Power mode, where the board has one.
    pub mode: Option<String>,
    /// What runs have taken of the night's energy, as the quota counts it.
    pub night: Joules,
}

/// The owner's side.
#[derive(Clone, Debug)]
pub struct Door {
    ruling: watch::Receiver<Ruling>,
    shared: Arc<Mutex<Shared>>,
    account: Arc<Mutex<Account>>,
    /// When the last round ended, in milliseconds of the clock.
    last: Arc<AtomicU64>,
}

/// The governor's side.
#[derive(Debug)]
pub struct Bench {
    ruling: watch::Sender<Ruling>,
    shared: Arc<Mutex<Shared>>,
    account: Arc<Mutex<Account>>,
    last: Arc<AtomicU64>,
}

/// Both sides, with the first ruling, made at `now`.
pub fn pair(first: Ruling, now: Duration) -> (Bench, Door) {
    let (sender, receiver) = watch::channel(first);
    let shared = Arc::new(Mutex::new(Shared::default()));
    let account = Arc::new(Mutex::new(Account::default()));
    let last = Arc::new(AtomicU64::new(now.as_millis() as u64));
    let bench =
        Bench { ruling: sender, shared: shared.clone(), account: account.clone(), last: last.clone() };
    (bench, Door { ruling: receiver, shared, account, last })
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

    /// Where the governor stands after a round.
    pub fn stand(&self, standing: Standing) {
        self.account.lock().unwrap_or_else(PoisonError::into_inner).standing = standing;
    }

    /// What the runs do, with what has happened since the last call.
    pub fn activity(&self, now: Duration) -> Activity {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).take(now)
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
            let lost = Some(Reason::SensorLost);
            return Ruling { hold: lost, unfit: lost, ..Ruling::FREE };
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

    /// Where the governor stands.
    pub fn standing(&self) -> Standing {
        self.account.lock().unwrap_or_else(PoisonError::into_inner).standing.clone()
    }

    /// What runs took in all: those that took something since the last call.
    pub fn booked(&self) -> BTreeMap<RunId, Entry> {
        std::mem::take(&mut self.account.lock().unwrap_or_else(PoisonError::into_inner).booked)
    }

    /// Tells the governor whose worker computes, and what is done with the time.
    pub fn computes(&self, run: Option<&RunId>, doing: Doing) {
        let activity = &mut self.shared().activity;
        activity.doing = doing;
        if activity.run.as_ref() != run {
            activity.run = run.cloned();
        }
    }

    /// Tells the governor of a step, and of tokens that were trained on.
    pub fn trained(&self, tokens: u64) {
        let activity = &mut self.shared().activity;
        activity.tokens = activity.tokens.saturating_add(tokens);
        activity.steps = activity.steps.saturating_add(1);
    }

    /// Tells the governor how a run stands.
    pub fn stands(&self, run: &RunId, news: RunNews) {
        let runs = &mut self.shared().activity.news.runs;
        if runs.contains_key(run) || runs.len() < REMEMBERED {
            let active = runs.get(run).is_some_and(|before| before.active);
            runs.insert(run.clone(), RunNews { active: active || news.active, ..news });
        }
    }

    /// Tells the governor of a lease or hold that begins.
    pub fn holds(&self, number: u64, who: &str, now: Duration) {
        let mut shared = self.shared();
        shared.hold(who, 1, Duration::ZERO);
        shared.holders.insert(number, (who.to_string(), now));
    }

    /// Tells the governor that it is over.
    pub fn released(&self, number: u64, now: Duration) {
        let mut shared = self.shared();
        if let Some((who, since)) = shared.holders.remove(&number) {
            shared.hold(&who, 0, now.saturating_sub(since));
        }
    }

    fn shared(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::governor::readings::{Reading, Readings};
    use crate::units::Watts;

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
        door.computes(Some(&run), Doing::Training);
        door.trained(7);
        door.trained(5);
        let told = bench.activity(at(113));
        assert_eq!(
            told,
            Activity { run: Some(run), tokens: 12, steps: 2, doing: Doing::Training, news: News::default() }
        );
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

    #[test]
    fn news_is_told_once_and_leases_to_the_moment() {
        let at = Duration::from_millis;
        let (bench, door) = pair(Ruling::FREE, at(0));
        let run = RunId::from_bits([1; 6]);
        door.stands(&run, RunNews { active: true, step: 3, ..RunNews::default() });
        door.stands(&run, RunNews { state: "waiting", step: 4, ..RunNews::default() });
        door.holds(1, "planner", at(100));
        // Shorter than a round, and seen all the same.
        door.holds(2, "vision", at(200));
        door.released(2, at(230));
        let news = bench.activity(at(500)).news;
        assert_eq!(
            news.runs[&run],
            RunNews { active: true, state: "waiting", step: 4, ..RunNews::default() }
        );
        assert_eq!(news.held["planner"], Held { count: 1, time: at(400) });
        assert_eq!(news.held["vision"], Held { count: 1, time: at(30) });
        door.released(1, at(600));
        door.released(1, at(700));
        let news = bench.activity(at(1000)).news;
        assert_eq!(news.held, BTreeMap::from([("planner".into(), Held { count: 0, time: at(100) })]));
        assert_eq!(bench.activity(at(1500)).news, News::default());
        for i in 0..1000 {
            door.holds(i, &format!("client {i}"), at(1500));
            door.released(i, at(1500));
        }
        assert_eq!(bench.activity(at(2000)).news.held.len(), REMEMBERED);
    }
}
