//! What the supply and the memory say: a ceiling for the duty, or a hold.
//!
//! ```text
//!   memory    Ample ──below 1.25 × floor, or pressure──► Tight ──below the floor, 3 s──► Short ──30 s, or half──► Starved
//!             (full duty)                               (half duty)                     (pause)                  (release)
//!               └───────────────── above 1.5 × floor and no pressure, 30 s ─────────────────┘
//! ```
//!
//! Alarms of the supply lower the ceiling: each under-voltage or average over-current by a fifth, a rising rate of
//! instantaneous over-current by a tenth. It rises again, slowly, after ten minutes without any.

use crate::config::budget::Budget;
use crate::governor::readings::{OverCurrent, Readings};
use std::time::Duration;

/// Pressure (PSI `some avg10`) from which memory is tight, and short.
const TIGHT: f64 = 0.10;
const SHORT: f64 = 0.25;
/// Memory must be short for so long before that counts, and ample for so long before that does.
const SHORT_FOR: Duration = Duration::from_secs(3);
const CLEAR_FOR: Duration = Duration::from_secs(30);
/// After so long a pause that did not help, the worker's memory is wanted.
const STARVED_AFTER: Duration = Duration::from_secs(30);
/// Older readings say nothing about memory.
const OLD: Duration = Duration::from_secs(10);

/// How much memory the others have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Memory {
    /// Enough, or unknown.
    #[default]
    Ample,
    /// Near the floor.
    Tight,
    /// Below the floor.
    Short,
    /// Still below it after a pause, or far below.
    Starved,
}

/// The memory's level and since when it asks for another.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MemoryWatch {
    /// In force.
    pub level: Memory,
    /// Free memory and pressure have been read before.
    heard: (bool, bool),
    short_since: Option<Duration>,
    clear_since: Option<Duration>,
    /// When `level` became `Short`.
    paused: Option<Duration>,
}

impl MemoryWatch {
    /// Takes in one round.
    pub fn step(&mut self, readings: &Readings, budget: &Budget, now: Duration) {
        let fresh = now.saturating_sub(readings.at) < OLD;
        let available = readings.available_memory.filter(|_| fresh).map(|bytes| bytes.0 as f64);
        let pressure = readings.memory_pressure.filter(|p| fresh && p.is_finite());
        let floor = budget.memory_floor.0 as f64;
        let below = |factor: f64| available.is_some_and(|available| available < factor * floor);
        let above = |limit: f64| pressure.is_some_and(|pressure| pressure > limit);
        let since = |condition: bool, since: Option<Duration>| condition.then(|| since.unwrap_or(now));
        let lasts = |since: Option<Duration>, length: Duration| {
            since.is_some_and(|since| now.saturating_sub(since) >= length)
        };
        let short = below(1.0) || above(SHORT);
        self.short_since = since(short, self.short_since);
        self.heard = (self.heard.0 || available.is_some(), self.heard.1 || pressure.is_some());
        // What has spoken once and is silent says nothing against a pause, and nothing for its end.
        let mute = (self.heard.0 && available.is_none()) || (self.heard.1 && pressure.is_none());
        self.clear_since = since(!mute && !below(1.5) && !above(TIGHT / 2.0), self.clear_since);
        if lasts(self.clear_since, CLEAR_FOR) {
            self.level = Memory::Ample;
        } else if below(1.25) || above(TIGHT) {
            self.level = self.level.max(Memory::Tight);
        }
        if lasts(self.short_since, SHORT_FOR) {
            self.level = self.level.max(Memory::Short);
        }
        self.paused = since(self.level >= Memory::Short, self.paused);
        let helpless = short && lasts(self.paused, STARVED_AFTER);
        if self.level == Memory::Short && (helpless || below(0.5)) {
            self.level = Memory::Starved;
        }
    }
}

/// Events this far apart count as several.
const ALARM_APART: Duration = Duration::from_secs(5);
/// A step of the instantaneous alarm's back-off.
const STEP_APART: Duration = Duration::from_secs(30);
/// After so long without an alarm the ceiling rises, by this much a second.
const QUIET: Duration = Duration::from_secs(600);
const RISE: f64 = 0.05 / 60.0;
/// The ceiling's lowest values: of alarms that mean damage, and of the one that may be harmless.
const LOWEST: f64 = 0.2;
const LOWEST_INSTANTANEOUS: f64 = 0.5;
/// Instantaneous alarms a second from which the back-off begins whatever the rate was before: an Orin Nano was seen to
/// count 7.6 a second for an hour without any other symptom.
const INSTANTANEOUS: f64 = 9.0;

/// The ceiling that the supply's alarms leave.
#[derive(Clone, Debug, PartialEq)]
pub struct AlarmWatch {
    /// Ceiling of the duty, 0 to 1; 0 asks for a hold.
    pub ceiling: f64,
    alarmed: Option<Duration>,
    stepped: Option<Duration>,
    /// Rate of instantaneous alarms over half a minute, and over ten.
    fast: f64,
    slow: f64,
}

impl Default for AlarmWatch {
    fn default() -> Self {
        Self { ceiling: 1.0, alarmed: None, stepped: None, fast: 0.0, slow: 0.0 }
    }
}

impl AlarmWatch {
    /// Takes in one round.
    pub fn step(&mut self, rates: Option<OverCurrent>, dt: f64, now: Duration) {
        let apart = |last: Option<Duration>, length: Duration| {
            last.is_none_or(|last| now.saturating_sub(last) >= length)
        };
        // Counters that cannot be read are no quiet time.
        let Some(rates) = rates else { return };
        if (rates.under_voltage > 0.0 || rates.average > 0.0) && apart(self.alarmed, ALARM_APART) {
            self.ceiling = if self.ceiling * 0.8 < LOWEST { 0.0 } else { self.ceiling * 0.8 };
            self.alarmed = Some(now);
            self.stepped = Some(now);
        }
        if rates.instantaneous.is_finite() && rates.instantaneous >= 0.0 {
            self.fast += (rates.instantaneous - self.fast) * (dt / 30.0).min(1.0);
            self.slow += (rates.instantaneous - self.slow) * (dt / 600.0).min(1.0);
        }
        let rising = self.fast > INSTANTANEOUS && self.fast > 1.1 * self.slow;
        if rising && apart(self.stepped, STEP_APART) && self.ceiling > LOWEST_INSTANTANEOUS {
            self.ceiling = (self.ceiling * 0.9).max(LOWEST_INSTANTANEOUS);
            self.stepped = Some(now);
        }
        if apart(self.stepped, QUIET) {
            self.ceiling = match self.ceiling {
                0.0 => LOWEST,
                ceiling => (ceiling + RISE * dt).min(1.0),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    #[test]
    fn memory_slows_then_pauses_then_releases() {
        let budget = Budget { memory_floor: Bytes(1000), ..Budget::default() };
        let mut watch = MemoryWatch::default();
        let mut at = 0;
        let mut run = |available: u64, pressure: f64, seconds: u64| {
            for _ in 0..seconds {
                at += 1;
                let readings = Readings {
                    at: Duration::from_secs(at),
                    available_memory: Some(Bytes(available)),
                    memory_pressure: Some(pressure),
                    ..Readings::default()
                };
                watch.step(&readings, &budget, Duration::from_secs(at));
            }
            watch.level
        };
        assert_eq!(run(2000, 0.0, 5), Memory::Ample);
        assert_eq!(run(1200, 0.0, 1), Memory::Tight);
        assert_eq!(run(1400, 0.0, 60), Memory::Tight, "between the thresholds nothing changes");
        assert_eq!(run(1600, 0.0, 31), Memory::Ample);
        assert_eq!(run(900, 0.0, 2), Memory::Tight);
        assert_eq!(run(900, 0.0, 2), Memory::Short);
        assert_eq!(run(900, 0.0, 31), Memory::Starved);
        assert_eq!(run(3000, 0.0, 29), Memory::Starved);
        assert_eq!(run(3000, 0.0, 2), Memory::Ample);
        assert_eq!(run(3000, 0.3, 4), Memory::Short, "pressure alone");
        assert_eq!(run(3000, f64::NAN, 31), Memory::Short, "silence ends no pause");
        assert_eq!(run(3000, 0.0, 31), Memory::Ample);
        assert_eq!(run(400, 0.0, 4), Memory::Starved, "far below");
    }

    #[test]
    fn alarms_lower_the_ceiling_and_time_lifts_it() {
        let alarm = |average, instantaneous| Some(OverCurrent { under_voltage: 0.0, average, instantaneous });
        let mut watch = AlarmWatch::default();
        let mut at = 0;
        let mut run = |rates, seconds: u64| {
            for _ in 0..seconds {
                at += 1;
                watch.step(rates, 1.0, Duration::from_secs(at));
            }
            watch.ceiling
        };
        assert_eq!(run(alarm(1.0, 0.0), 1), 0.8);
        assert_eq!(run(alarm(0.0, 0.0), 590), 0.8);
        assert_eq!(run(None, 60), 0.8, "counters that cannot be read are no quiet");
        let quiet = alarm(0.0, 0.0);
        assert!((0.8..0.9).contains(&run(quiet, 60)));
        assert_eq!(run(quiet, 600), 1.0);
        assert_eq!(run(alarm(1.0, 0.0), 60), 0.0, "a supply that goes on failing ends computing");
        assert!((LOWEST..0.22).contains(&run(quiet, 601)));
        run(quiet, 3000);
        assert_eq!(run(alarm(0.0, 7.6), 3600), 1.0, "what was seen to be harmless");
        run(quiet, 3600);
        let ceiling = run(alarm(0.0, 20.0), 200);
        assert!((0.5..0.9).contains(&ceiling), "{ceiling}");
        assert_eq!(run(alarm(f64::NAN, f64::NAN), 1), ceiling);
    }
}
