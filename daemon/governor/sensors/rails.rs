//! Power: INA3221 monitors (Jetson), RAPL counters (PC), a battery's gauge.
//!
//! | source | power |
//! |---|---|
//! | INA3221, hwmon | `in<N>_input` mV × `curr<N>_input` mA; there is no `power<N>_input` |
//! | RAPL, powercap | difference of `energy_uj` over time; wraps at `max_energy_range_uj` |
//! | battery, power_supply | `power_now` µW while it discharges |
//!
//! Which rails are counted: those that the configuration names; else those of the board's table; else `VDD_IN` (a whole
//! module) where there is one, or every rail of an INA3221, or every processor package. A rail that is counted and not
//! there is lost, so the power is lost, too: better no figure than half of one.

use super::board::BoardTable;
use super::files::{Fault, Files};
use super::{Scan, settle};
use crate::config::budget;
use crate::governor::readings::{Rail, Reading};
use crate::units::Watts;
use std::time::Duration;

const POWERCAP: &str = "sys/class/powercap";
const INA3221: &str = "ina3221";
const INA3221_DRIVER: &str = "sys/bus/i2c/drivers/ina3221";

/// A register of an INA3221 takes half a millisecond over I²C: it is not read more often than this.
pub const SLOW: Duration = Duration::from_millis(200);

/// Shortest time over which a power is made of two energies.
const SHORT: Duration = Duration::from_millis(50);

/// More than a rail of any of these machines carries, in watts: what is above is nonsense.
const MOST: f64 = 10_000.0;

/// The rails of a machine.
#[derive(Debug)]
pub struct Rails {
    known: Vec<Known>,
    named: Option<Vec<String>>,
    factor: f64,
    offset: Watts,
    next: Duration,
    denied: bool,
}

#[derive(Debug)]
struct Known {
    name: String,
    source: Source,
    counted: bool,
    last: Reading<Watts>,
    lost: Option<Duration>,
}

#[derive(Debug)]
enum Source {
    /// It was there, or should be.
    Absent,
    /// A channel of an INA3221; `label` must still say the rail's name.
    Ina { directory: String, channel: u32, label: String },
    /// A zone of RAPL: energy in µJ and when, at the reading before.
    Rapl { directory: String, before: Option<(u64, Duration)> },
    /// A battery.
    Battery { directory: String },
}

impl Rails {
    /// No rails yet, counted as the configuration wants it.
    pub fn new(board: &budget::Board) -> Rails {
        Rails {
            known: Vec::new(),
            named: board.rails.clone(),
            factor: board.power_factor,
            offset: board.power_offset,
            next: Duration::ZERO,
            denied: false,
        }
    }

    /// One round. Within [`SLOW`] of the round before, the readings of that round, with their age.
    pub fn read(
        &mut self,
        files: &dyn Files,
        now: &dyn Fn() -> Duration,
        rails: &mut Vec<Rail>,
    ) -> Option<Reading<Watts>> {
        if now() >= self.next {
            for rail in &mut self.known {
                let read = rail.source.power(&rail.name, files, now());
                rail.last = match read {
                    // Too soon for a difference: what was known stays.
                    Ok(None) => rail.last,
                    Ok(Some(power)) => settle(Ok(power), now(), &mut rail.lost),
                    Err(fault) => settle(Err(fault), now(), &mut rail.lost),
                };
            }
            self.next = now() + SLOW;
        }
        rails.extend(self.known.iter().map(|rail| Rail {
            name: rail.name.clone(),
            power: rail.last,
            counted: rail.counted,
        }));
        self.sum()
    }

    /// Whether something that was there could not be read.
    pub fn faulty(&self) -> bool {
        self.known.iter().any(|rail| rail.lost.is_some())
    }

    /// Names of the rails that are there, with `*` after those that are counted, and of those that should be.
    pub fn found(&self) -> (Vec<String>, Vec<&str>) {
        let there = self.known.iter().filter(|rail| !matches!(rail.source, Source::Absent));
        let missing = self.known.iter().filter(|rail| matches!(rail.source, Source::Absent));
        (
            there.map(|rail| format!("{}{}", rail.name, if rail.counted { "*" } else { "" })).collect(),
            missing.map(|rail| rail.name.as_str()).collect(),
        )
    }

    /// Whether there is a meter that only root may read.
    pub fn denied(&self) -> bool {
        self.denied
    }

    /// Names of the rails that count.
    fn counted(&self, board: &BoardTable, found: &[Found]) -> Vec<String> {
        if let Some(named) = &self.named {
            return named.clone();
        }
        if !board.rails.is_empty() {
            return board.rails.iter().map(|name| name.to_string()).collect();
        }
        let of = |counts: fn(&Source) -> bool| -> Vec<String> {
            found.iter().filter(|(_, source)| counts(source)).map(|(name, _)| name.clone()).collect()
        };
        let monitored = of(|source| matches!(source, Source::Ina { .. }));
        match monitored.iter().find(|name| *name == "VDD_IN") {
            Some(module) => vec![module.clone()],
            None if monitored.is_empty() => of(|source| matches!(source, Source::Rapl { .. })),
            None => monitored,
        }
    }

    /// Factor × sum + offset; as old as the oldest part. A rail that is switched off takes nothing.
    fn sum(&self) -> Option<Reading<Watts>> {
        let counted = || self.known.iter().filter(|rail| rail.counted).map(|rail| rail.last);
        counted().next()?;
        let lost = counted().filter_map(|power| match power {
            Reading::Lost { since } => Some(since),
            _ => None,
        });
        if let Some(since) = lost.min() {
            return Some(Reading::Lost { since });
        }
        let mut total = None;
        for power in counted() {
            if let Reading::Value { value: Watts(watts), at } = power {
                let (sum, oldest) = total.unwrap_or((0.0, at));
                total = Some((sum + watts, at.min(oldest)));
            }
        }
        let Some((sum, at)) = total else { return Some(Reading::Offline) };
        let watts = self.factor * sum + self.offset.0;
        if !watts.is_finite() {
            return Some(Reading::Lost { since: at });
        }
        Some(Reading::Value { value: Watts(watts.max(0.0)), at })
    }
}

impl Scan for Rails {
    fn scan(&mut self, files: &dyn Files, board: &BoardTable, now: Duration) {
        let mut found = ina3221(files);
        let (packages, denied) = rapl(files, now);
        self.denied = denied;
        found.extend(packages);
        found.extend(batteries(files));
        let counted = self.counted(board, &found);
        let missing = counted.iter().filter(|name| !found.iter().any(|(there, _)| there == *name));
        found.extend(missing.cloned().map(|name| (name, Source::Absent)).collect::<Vec<_>>());
        for known in &mut self.known {
            // A counter that stayed keeps what it counted.
            let gone =
                !found.iter().any(|(name, source)| *name == known.name && source.is_place_of(&known.source));
            if gone {
                known.source = Source::Absent;
            }
        }
        for (name, source) in found {
            match self.known.iter_mut().find(|known| known.name == name) {
                Some(known) if matches!(known.source, Source::Absent) => known.source = source,
                Some(_) => {}
                None => {
                    let counted = counted.contains(&name);
                    let last = Reading::Offline;
                    self.known.push(Known { name, source, counted, last, lost: None });
                }
            }
        }
        // What counts was decided when a rail was first seen, unless there was nothing to count then.
        if !self.known.iter().any(|rail| rail.counted) {
            for rail in &mut self.known {
                rail.counted = counted.contains(&rail.name);
            }
        }
        self.next = Duration::ZERO;
    }
}

impl Source {
    /// Whether both are the same file.
    fn is_place_of(&self, other: &Source) -> bool {
        match (self, other) {
            (
                Source::Ina { directory, channel, .. },
                Source::Ina { directory: other, channel: other_channel, .. },
            ) => directory == other && channel == other_channel,
            (Source::Rapl { directory, .. }, Source::Rapl { directory: other, .. })
            | (Source::Battery { directory }, Source::Battery { directory: other }) => directory == other,
            _ => false,
        }
    }

    /// Power now; `None` when it is too early to tell.
    fn power(&mut self, rail: &str, files: &dyn Files, now: Duration) -> Result<Option<Watts>, Fault> {
        match self {
            Source::Absent => Err(Fault::Missing),
            Source::Ina { directory, channel, label } => {
                // After the driver was bound again this may be another chip.
                if files.name(label)? != rail {
                    return Err(Fault::Missing);
                }
                // 26 V and, with the smallest shunt in use, less than 100 A. A current may be negative by an offset.
                let millivolts = files.integer_in(&format!("{directory}/in{channel}_input"), 0..=60_000)?;
                let milliamperes =
                    files.integer_in(&format!("{directory}/curr{channel}_input"), -10_000..=100_000)?;
                Ok(Some(Watts((millivolts * milliamperes).max(0) as f64 / 1e6)))
            }
            Source::Rapl { directory, before } => {
                let energy = files.integer_in(&format!("{directory}/energy_uj"), 0..=i64::MAX)? as u64;
                let Some((old, then)) = *before else {
                    *before = Some((energy, now));
                    return Ok(None);
                };
                let time = now.saturating_sub(then);
                if time < SHORT {
                    return Ok(None);
                }
                *before = Some((energy, now));
                let joules = match energy.checked_sub(old) {
                    Some(difference) => difference,
                    None => {
                        let range = files.integer(&format!("{directory}/max_energy_range_uj"))?;
                        // It wrapped, or (when that would be too much) was reset: then this round has no figure.
                        match u64::try_from(range).ok().and_then(|range| range.checked_sub(old)) {
                            Some(rest) => rest.saturating_add(energy),
                            None => return Ok(None),
                        }
                    }
                } as f64
                    / 1e6;
                let watts = joules / time.as_secs_f64();
                if watts <= MOST {
                    Ok(Some(Watts(watts)))
                } else {
                    Err(Fault::Nonsense(format!("{watts:.0} W")))
                }
            }
            Source::Battery { directory } => {
                if files.name(&format!("{directory}/status"))? != "Discharging" {
                    return Err(Fault::Offline);
                }
                let microwatts =
                    files.integer_in(&format!("{directory}/power_now"), 0..=(MOST * 1e6) as i64)?;
                Ok(Some(Watts(microwatts as f64 / 1e6)))
            }
        }
    }
}

type Found = (String, Source);

/// Channels with a label, but for those that are not connected (`NC`). Channel 7 is a sum of shunt voltages.
fn ina3221(files: &dyn Files) -> Vec<Found> {
    let mut directories: Vec<String> = super::monitors(files)
        .into_iter()
        .filter(|(_, name)| name == INA3221)
        .map(|(directory, _)| directory)
        .collect();
    if directories.is_empty() {
        for device in files.list(INA3221_DRIVER) {
            let monitors = format!("{INA3221_DRIVER}/{device}/hwmon");
            let names = files.list(&monitors);
            directories.extend(names.into_iter().map(|name| format!("{monitors}/{name}")));
        }
    }
    let mut found: Vec<Found> = Vec::new();
    for directory in directories {
        for channel in 1..=3 {
            let labels = ["in", "curr"].map(|kind| format!("{directory}/{kind}{channel}_label"));
            let Some((label, name)) =
                labels.into_iter().find_map(|label| files.name(&label).ok().map(|name| (label, name)))
            else {
                continue;
            };
            let connected = !name.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == "NC");
            if connected && !found.iter().any(|(there, _)| *there == name) {
                found.push((name, Source::Ina { directory: directory.clone(), channel, label }));
            }
        }
    }
    found
}

/// Packages of RAPL, and whether there are some that may not be read.
fn rapl(files: &dyn Files, now: Duration) -> (Vec<Found>, bool) {
    let mut denied = false;
    let mut found: Vec<Found> = Vec::new();
    for entry in files.list(POWERCAP) {
        let package = entry.strip_prefix("intel-rapl:").is_some_and(|number| !number.contains(':'));
        let directory = format!("{POWERCAP}/{entry}");
        let Ok(name) = files.name(&format!("{directory}/name")) else { continue };
        if !package || !name.starts_with("package") || found.iter().any(|(there, _)| *there == name) {
            continue;
        }
        match files.integer_in(&format!("{directory}/energy_uj"), 0..=i64::MAX) {
            Ok(energy) => {
                found.push((name, Source::Rapl { directory, before: Some((energy as u64, now)) }));
            }
            Err(fault) => denied |= fault == Fault::Denied,
        }
    }
    (found, denied)
}

fn batteries(files: &dyn Files) -> Vec<Found> {
    super::machine::supplies(files)
        .into_iter()
        .filter(|supply| supply.battery && files.integer(&format!("{}/power_now", supply.directory)).is_ok())
        .map(|supply| (supply.name, Source::Battery { directory: supply.directory }))
        .collect()
}
