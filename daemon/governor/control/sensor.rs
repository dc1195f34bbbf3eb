//! How far one thermal zone is to be believed.
//!
//! ```text
//!               read                        not read (silent, nonsense, stale, frozen)
//!   Unknown ───────────► Live ◄────────────────────────────► Hot ──── after 3 s ────► Lost
//!      │  never read               read again          the last value, rising
//!      └─► Lost                      Live ──fell by 35 °C at once──► Suspect (counts as Lost) ──comes back──► Live
//! ```
//!
//! Silence counts as heat: the last value is taken to rise by 3 °C a second. What jumps upwards is acted on at once; a fall
//! that no chip can do is not believed, and neither is a value that does not move at all while the duty does.

use crate::governor::readings::Reading;
use crate::units::Celsius;
use std::time::Duration;

/// A value of this age is still fresh: two rounds of reading at the longest interval that the configuration allows.
const FRESH: Duration = Duration::from_secs(2);
/// Silent for so long, a zone is lost.
const SILENT: Duration = Duration::from_secs(3);
/// Rise that is taken for possible while nothing is heard, °C per second: a chip under full load that nothing cools.
const SLEW: f64 = 3.0;
/// What a sensor of a computer can mean, °C.
const PLAUSIBLE: std::ops::RangeInclusive<f64> = -40.0..=150.0;
/// A fall between two readings that no chip can do, °C.
const FALL: f64 = 35.0;
/// A chip that nobody saw may have cooled by this, °C per second.
const UNSEEN: f64 = 1.0;
/// A smaller fall is believed after so many readings.
const FALL_SMALL: f64 = 10.0;
const FALL_READINGS: u32 = 2;
/// A fall takes back a leap that was as large, to within this, °C.
const LEAP_ALIKE: f64 = 12.0;
/// A suspect zone is believed again after a rise like the fall, or near the value that was last believed, °C.
const RETURN_RISE: f64 = 25.0;
const RETURN_NEAR: f64 = 20.0;
/// A value that has not moved for so long is suspicious, if the duty moved by this much meanwhile, or if the zone used to
/// move all the time.
const FROZEN: Duration = Duration::from_secs(60);
const FROZEN_DUTY: f64 = 0.15;
const LIVELY: f64 = 0.3;
/// A sensor with steps of this size may well stand still: it counts as frozen only against a larger change of the duty,
/// and when it has stood still for [`PROBE`], that change is made on purpose. °C.
const COARSE: f64 = 0.2;
const FROZEN_DUTY_COARSE: f64 = 0.2;
const PROBE: Duration = Duration::from_secs(300);
/// A value that has not moved for so long is no ground for more duty.
const STIFF: Duration = Duration::from_secs(10);

/// What is known of a zone from earlier rounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Sensor {
    /// Last value that was believed, and when it was read.
    believed: Option<(f64, Duration)>,
    /// When the zone was last heard.
    heard: Option<Duration>,
    /// Readings in a row that lie well below what is believed.
    below: u32,
    /// Fell too far at once.
    suspect: bool,
    /// The last rise that was as large as no chip's, °C, until it is taken back: by a fall of the same size.
    leap: Option<f64>,
    /// Raw value of the reading before, and since when it has been exactly that.
    raw: Option<(f64, Duration)>,
    /// Smallest and largest duty since then.
    duties: (f64, f64),
    /// How often it has been read since then.
    still: i32,
    /// Share of the readings that differed from the one before, over about a minute; as it was before the value stood
    /// still.
    lively: f64,
    /// Smallest step between two readings, °C: what the sensor can tell apart.
    grain: f64,
    /// Since when it is switched off.
    offline: Option<Duration>,
}

/// What a round says of a zone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    /// Believed.
    Live(Celsius),
    /// Not heard for less than three seconds: the last value, extrapolated upwards.
    Hot(Celsius),
    /// Switched off: no temperature, and no harm.
    Offline,
    /// Not to be believed, and why.
    Lost(Trouble),
}

/// What is wrong with a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// It says nothing, or nonsense.
    Silent,
    /// Its value does not move.
    Stuck,
    /// Its value fell faster than a chip cools.
    Fell,
}

impl Sensor {
    /// A zone that has not been heard.
    pub fn new() -> Sensor {
        Sensor {
            believed: None,
            heard: None,
            below: 0,
            suspect: false,
            leap: None,
            raw: None,
            duties: (1.0, 0.0),
            still: 0,
            lively: 0.0,
            grain: 0.0,
            offline: None,
        }
    }

    /// Takes in one round. `duty` is what was decided before, as a mean over some seconds; 0 only when nothing computes.
    pub fn step(&mut self, reading: &Reading<Celsius>, duty: f64, now: Duration) -> Verdict {
        let heard = match *reading {
            Reading::Value { value, at }
                if PLAUSIBLE.contains(&value.0) && at <= now + FRESH && now.saturating_sub(at) < SILENT =>
            {
                Some((value.0, at))
            }
            _ => None,
        };
        if matches!(reading, Reading::Offline) {
            let since = *self.offline.get_or_insert(now);
            // A block that computes is not switched off: after a while such an answer is nonsense.
            if duty == 0.0 || now.saturating_sub(since) < SILENT {
                self.heard = Some(now);
                self.below = 0;
                return Verdict::Offline;
            }
            return Verdict::Lost(Trouble::Silent);
        }
        self.offline = None;
        let Some((value, at)) = heard else { return self.silent(now) };
        // The same reading again is no news; it only grows old.
        if self.heard != Some(at) {
            self.hear(value, at, duty);
        }
        if self.suspect {
            return Verdict::Lost(Trouble::Fell);
        }
        if self.frozen(now) {
            return Verdict::Lost(Trouble::Stuck);
        }
        let believed = self.believed.map_or(value, |(value, _)| value);
        match now.saturating_sub(at) {
            age if age <= FRESH => Verdict::Live(Celsius(believed)),
            age => Verdict::Hot(Celsius(believed + SLEW * (age - FRESH).as_secs_f64())),
        }
    }

    /// Smallest step between two readings, °C; at most one.
    pub fn grain(&self) -> f64 {
        self.grain.min(1.0)
    }

    /// Whether the value has not moved for a while: then it is no ground for more duty.
    pub fn stiff(&self, now: Duration) -> bool {
        self.raw.is_some_and(|(_, since)| now.saturating_sub(since) >= STIFF)
    }

    /// Whether a lower duty for some seconds should show that the zone still follows.
    pub fn wants_probe(&self, now: Duration) -> bool {
        self.raw.is_some_and(|(_, since)| now.saturating_sub(since) >= PROBE)
    }

    fn silent(&self, now: Duration) -> Verdict {
        let Some(((believed, _), heard)) = self.believed.zip(self.heard) else {
            return Verdict::Lost(Trouble::Silent);
        };
        let age = now.saturating_sub(heard);
        if age >= SILENT || self.suspect {
            return Verdict::Lost(if self.suspect { Trouble::Fell } else { Trouble::Silent });
        }
        Verdict::Hot(Celsius(believed + SLEW * age.as_secs_f64()))
    }

    fn hear(&mut self, value: f64, at: Duration, duty: f64) {
        let gap = at.saturating_sub(self.heard.unwrap_or(at)).as_secs_f64();
        // After a silence, or when the value stood still against all reason, the chip may have cooled unseen.
        let fall = if self.frozen(at) { f64::INFINITY } else { FALL + UNSEEN * gap };
        self.heard = Some(at);
        let before = self.raw;
        match before {
            Some((raw, _)) if raw == value => {
                self.duties = (self.duties.0.min(duty), self.duties.1.max(duty));
                self.still = self.still.saturating_add(1);
            }
            _ => {
                if let Some((raw, _)) = before {
                    let step = (value - raw).abs();
                    self.grain = if self.grain == 0.0 { step } else { self.grain.min(step) };
                }
                self.raw = Some((value, at));
                self.duties = (duty, duty);
                self.lively = 0.99f64.powi(self.still + 1) * self.lively + 0.01;
                self.still = 0;
            }
        }
        let Some((believed, _)) = self.believed else {
            self.believed = Some((value, at));
            return;
        };
        let rise = value - before.map_or(value, |(raw, _)| raw);
        let returns = self.suspect;
        if self.suspect {
            if rise < RETURN_RISE && value < believed - RETURN_NEAR {
                return;
            }
            self.suspect = false;
        } else if value < believed - fall && -rise > fall {
            if self.leap.is_none_or(|leap| (-rise - leap).abs() > LEAP_ALIKE) {
                self.suspect = true;
                return;
            }
        } else if value < believed - FALL_SMALL {
            self.below += 1;
            if self.below < FALL_READINGS {
                return;
            }
        }
        if returns {
            // The rise that ends a lie is none: it must not excuse the next fall.
            self.leap = None;
        } else if rise > FALL {
            self.leap = Some(rise);
        } else if self.leap.is_some_and(|leap| -rise >= leap / 2.0) {
            // Taken back. Cooling slowly takes nothing back.
            self.leap = None;
        }
        self.below = 0;
        self.believed = Some((value, at));
    }

    fn frozen(&self, now: Duration) -> bool {
        let Some((_, since)) = self.raw else { return false };
        let (least, most) = self.duties;
        // A sensor that never moved has shown no steps, and may have fine ones.
        let coarse = self.grain >= COARSE;
        let enough = if coarse { FROZEN_DUTY_COARSE } else { FROZEN_DUTY };
        now.saturating_sub(since) >= FROZEN && (most - least >= enough || (!coarse && self.lively > LIVELY))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds values half a second apart, `None` being silence; returns the verdicts.
    fn feed(sensor: &mut Sensor, start: f64, values: &[Option<f64>], duty: f64) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        for (i, value) in values.iter().enumerate() {
            let now = Duration::from_secs_f64(start + i as f64 * 0.5);
            let reading = match value {
                Some(value) => Reading::Value { value: Celsius(*value), at: now },
                None => Reading::Lost { since: now },
            };
            verdicts.push(sensor.step(&reading, duty, now));
        }
        verdicts
    }

    #[test]
    fn silence_is_heat_and_then_loss() {
        let mut sensor = Sensor::new();
        assert_eq!(feed(&mut sensor, 0.0, &[None], 0.0), [Verdict::Lost(Trouble::Silent)], "never heard");
        let mut values = vec![Some(80.0)];
        values.extend([None; 7]);
        let verdicts = feed(&mut sensor, 1.0, &values, 1.0);
        assert_eq!(verdicts[0], Verdict::Live(Celsius(80.0)));
        assert_eq!(verdicts[2], Verdict::Hot(Celsius(83.0)));
        assert_eq!(verdicts[6], Verdict::Lost(Trouble::Silent), "after 3 s");
        for nonsense in [f64::NAN, f64::INFINITY, -256.0, 1e9] {
            let verdicts = feed(&mut sensor, 10.0, &[Some(80.0), Some(nonsense)], 1.0);
            assert!(matches!(verdicts[1], Verdict::Hot(_)), "{nonsense}");
        }
    }

    #[test]
    fn a_reading_that_is_not_renewed_grows_hot() {
        let mut sensor = Sensor::new();
        let reading = Reading::Value { value: Celsius(80.0), at: Duration::ZERO };
        let verdicts = [0.0, 2.0, 2.5, 3.0].map(|t| sensor.step(&reading, 1.0, Duration::from_secs_f64(t)));
        assert_eq!(verdicts[1], Verdict::Live(Celsius(80.0)));
        assert_eq!(verdicts[2], Verdict::Hot(Celsius(81.5)));
        assert_eq!(verdicts[3], Verdict::Lost(Trouble::Silent));
    }

    #[test]
    fn jumps_up_count_at_once_and_falls_late_or_never() {
        let mut sensor = Sensor::new();
        let verdicts = feed(&mut sensor, 0.0, &[Some(80.0), Some(130.0)], 1.0);
        assert_eq!(verdicts[1], Verdict::Live(Celsius(130.0)));
        let verdicts = feed(&mut sensor, 1.0, &[Some(129.0), Some(76.0)], 0.0);
        assert_eq!(verdicts[1], Verdict::Live(Celsius(76.0)), "the leap is taken back");
        let mut sensor = Sensor::new();
        let verdicts = feed(&mut sensor, 0.0, &[Some(80.0), Some(65.0), Some(64.0)], 1.0);
        assert_eq!(verdicts[1..], [Verdict::Live(Celsius(80.0)), Verdict::Live(Celsius(64.0))]);
        let mut sensor = Sensor::new();
        let fell = [Some(80.0), Some(30.0), Some(30.5), None, Some(29.0), Some(79.0)];
        let verdicts = feed(&mut sensor, 0.0, &fell, 1.0);
        assert_eq!(verdicts[1..5], [Verdict::Lost(Trouble::Fell); 4]);
        assert_eq!(verdicts[5], Verdict::Live(Celsius(79.0)), "came back");
        let again = feed(&mut sensor, 3.0, &[Some(80.0), Some(30.0)], 1.0);
        assert_eq!(again[1], Verdict::Lost(Trouble::Fell), "and lies again");
    }

    #[test]
    fn a_value_that_never_moves_is_lost() {
        let still = [Some(60.0); 130];
        assert_eq!(
            feed(&mut Sensor::new(), 0.0, &still, 1.0)[129],
            Verdict::Live(Celsius(60.0)),
            "a coarse one"
        );
        let mut sensor = Sensor::new();
        feed(&mut sensor, 0.0, &still[..10], 0.2);
        assert_eq!(feed(&mut sensor, 5.0, &still, 0.6)[129], Verdict::Lost(Trouble::Stuck), "the duty moved");
        let mut sensor = Sensor::new();
        let noisy: Vec<_> = (0..200).map(|i| Some(60.0 + 0.03 * (i % 5) as f64)).collect();
        feed(&mut sensor, 0.0, &noisy, 1.0);
        assert!(!sensor.stiff(Duration::from_secs(100)));
        let verdicts = feed(&mut sensor, 100.0, &still, 1.0);
        assert!(sensor.stiff(Duration::from_secs(165)));
        assert!(matches!(verdicts[110], Verdict::Live(_)));
        assert_eq!(verdicts[129], Verdict::Lost(Trouble::Stuck), "it used to move");
        assert_eq!(feed(&mut sensor, 166.0, &[Some(59.0)], 0.0), [Verdict::Live(Celsius(59.0))]);
    }

    #[test]
    fn a_gated_block_is_offline_while_nothing_computes() {
        let mut sensor = Sensor::new();
        let verdict =
            |sensor: &mut Sensor, duty, t| sensor.step(&Reading::Offline, duty, Duration::from_secs(t));
        assert_eq!(verdict(&mut sensor, 0.0, 0), Verdict::Offline);
        assert_eq!(verdict(&mut sensor, 0.0, 100), Verdict::Offline);
        assert_eq!(verdict(&mut sensor, 0.5, 101), Verdict::Lost(Trouble::Silent));
    }
}
