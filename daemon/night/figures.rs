//! What is counted beside the time: energy, steps, temperatures, power, runs, leases.
//!
//! Everything is bounded: names of clients and runs, notes and changes of the power mode are others' doing.

use crate::governor::door::{Held, RunNews};
use crate::governor::energy::Energy;
use crate::units::RunId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Runs, holders, notes and changes of mode that a night keeps.
const RUNS: usize = 64;
const HOLDERS: usize = 32;
const NOTES: usize = 32;
const MODES: usize = 64;
const ZONES: usize = 64;

/// Least, greatest and mean of a quantity over time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// Integral over time.
    sum: f64,
    /// How long it was known, in seconds.
    pub seconds: f64,
}

impl Spread {
    /// Takes in a value that held for so many seconds. Nonsense is left out.
    pub fn add(&mut self, value: f64, seconds: f64) {
        if !value.is_finite() {
            return;
        }
        let first = self.seconds == 0.0;
        self.min = if first { value } else { self.min.min(value) };
        self.max = if first { value } else { self.max.max(value) };
        self.sum += value * seconds;
        self.seconds += seconds;
    }

    /// The mean; absent before the first value.
    pub fn mean(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.sum / self.seconds)
    }
}

/// A run that had a worker this night.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunNight {
    /// Name, for people.
    pub name: String,
    /// Completed steps when it was first seen.
    pub first_step: u64,
    /// Completed steps when it was last seen.
    pub last_step: u64,
    /// Loss of the first step of this night.
    pub first_loss: Option<f64>,
    /// Loss of the last step.
    pub last_loss: Option<f64>,
    /// How it stood when it was last seen.
    pub state: String,
    /// Why.
    pub reason: Option<String>,
    /// Energy it took, as the ledger has it.
    #[serde(flatten)]
    pub energy: Energy,
}

/// Leases and holds of one name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// How many began.
    pub count: u64,
    /// How long they were in force, in microseconds; those of one name that overlap count twice.
    #[serde(rename = "time_us")]
    pub time: i64,
}

/// Something that a person should know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NoteSeen {
    /// In words.
    pub text: String,
    /// When it was first so.
    #[serde(rename = "first_us")]
    pub first: i64,
    /// For how many seconds it was so.
    pub seconds: f64,
}

/// The power mode from a moment on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModeSeen {
    /// When it was first seen.
    #[serde(rename = "at_us")]
    pub at: i64,
    /// In words.
    pub mode: String,
}

/// The figures of a night.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// Energy of runs, as the ledger has it.
    #[serde(flatten)]
    pub energy: Energy,
    /// Quotas count all energy, not that above idle.
    pub gross: bool,
    /// Tokens that were trained on.
    pub tokens: u64,
    /// Steps that were done.
    pub steps: u64,
    /// Time with a run that could train or evaluate, and the part of it in which it did, in microseconds.
    pub paced_us: i64,
    /// See `paced_us`.
    pub computed_us: i64,
    /// The hottest zone, °C.
    pub hottest: Spread,
    /// Power of the counted rails, W.
    pub power: Spread,
    /// The greatest temperature of each zone, °C.
    pub zones: BTreeMap<String, f64>,
    /// Runs that had a worker, by id.
    pub runs: BTreeMap<RunId, RunNight>,
    /// Leases and holds, by who had them.
    pub leases: BTreeMap<String, Lease>,
    /// Power modes.
    pub modes: Vec<ModeSeen>,
    /// What a person should know.
    pub notes: Vec<NoteSeen>,
    /// How often the daemon was started this night.
    pub starts: u32,
    /// Time that was accounted for and taken back, because the clock was set back, in microseconds.
    pub undone_us: i64,
}

impl Figures {
    /// A run has changed.
    pub fn run(&mut self, id: &RunId, news: &RunNews) {
        if !news.active && !self.runs.contains_key(id)
            || self.runs.len() >= RUNS && !self.runs.contains_key(id)
        {
            return;
        }
        let fresh = || RunNight { name: news.name.clone(), first_step: news.step, ..RunNight::default() };
        let run = self.runs.entry(id.clone()).or_insert_with(fresh);
        run.last_step = news.step;
        if news.step > run.first_step {
            run.first_loss = run.first_loss.or(news.loss);
            run.last_loss = news.loss.or(run.last_loss);
        }
        run.state = news.state.to_string();
        run.reason = news.reason.map(|reason| reason.word().to_string());
    }

    /// Somebody had a lease or hold.
    pub fn held(&mut self, who: &str, held: Held) {
        if self.leases.contains_key(who) || self.leases.len() < HOLDERS {
            let lease = self.leases.entry(who.to_string()).or_default();
            lease.count = lease.count.saturating_add(held.count);
            let time = i64::try_from(held.time.as_micros()).unwrap_or(i64::MAX);
            lease.time = lease.time.saturating_add(time);
        }
    }

    /// A zone has this temperature.
    pub fn zone(&mut self, name: &str, temperature: f64) {
        if !temperature.is_finite() {
            return;
        }
        let room = self.zones.len() < ZONES;
        match self.zones.get_mut(name) {
            Some(most) => *most = most.max(temperature),
            None if room => drop(self.zones.insert(name.to_string(), temperature)),
            None => {}
        }
    }

    /// The power mode is this one.
    pub fn mode(&mut self, mode: &str, at: i64) {
        if self.modes.last().is_none_or(|last| last.mode != mode) && self.modes.len() < MODES {
            self.modes.push(ModeSeen { at, mode: mode.to_string() });
        }
    }

    /// Something is so, for so many seconds.
    pub fn note(&mut self, text: &str, at: i64, seconds: f64) {
        let room = self.notes.len() < NOTES;
        match self.notes.iter_mut().find(|note| note.text == text) {
            Some(note) => note.seconds += seconds,
            None if room => {
                self.notes.push(NoteSeen { text: text.to_string(), first: at, seconds });
            }
            None => {}
        }
    }
}

/// A minute, for the curves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Point {
    /// Its begin.
    #[serde(rename = "at_us")]
    pub at: i64,
    /// The greatest temperature of the zone that is nearest to its set-point, °C.
    pub temperature: Option<f64>,
    /// The set-point.
    pub limit: Option<f64>,
    /// Mean power, W.
    pub power: Option<f64>,
    /// Loss of the last step in it.
    pub loss: Option<f64>,
    /// Of this run.
    pub run: Option<RunId>,
}
