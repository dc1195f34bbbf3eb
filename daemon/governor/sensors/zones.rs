//! Temperatures: thermal zones by their type, never by their number, and the hardware monitor of a PC's processor.
//!
//! ```text
//!              read                    fault                         read
//!   (new) ──────────────► Value ◄───────────────────► Lost since … ◄──────── (required, missing)
//!     │ EAGAIN              ▲  EAGAIN / read
//!     └───────► Offline ◄───┘
//! ```
//!
//! **Stand-in.** On some boards `tj` is disabled: it is listed, but its temperature is empty. As long as it has never
//! been read (or is switched off), a zone `die-maximum` takes its place: the maximum of the zones of the die that can be
//! read. It is lost when a required zone of the die is. A `tj` that is missing or that was there once has no stand-in: it
//! is lost.

use super::board::{BoardTable, prefix};
use super::files::{Fault, Files};
use super::{Scan, settle};
use crate::governor::readings::{Reading, Zone, ZoneRole};
use crate::units::Celsius;
use std::time::Duration;

const THERMAL: &str = "sys/class/thermal";

/// Name of the zone that stands in for a junction that cannot be read.
pub const STAND_IN: &str = "die-maximum";

/// Temperatures that a sensor can mean, in thousandths of a degree: what silicon and boards survive, with room.
pub const VALID: std::ops::RangeInclusive<i64> = -40_000..=150_000;

/// Hardware monitors of processors, for machines whose thermal zones do not have the junction.
const PROCESSOR_MONITORS: &[&str] = &["coretemp", "k10temp", "zenpower"];

/// The zones of a machine.
#[derive(Debug, Default)]
pub struct Zones {
    known: Vec<Known>,
}

#[derive(Debug)]
struct Known {
    name: String,
    role: ZoneRole,
    required: bool,
    place: Option<Place>,
    passive: Option<Celsius>,
    critical: Option<Celsius>,
    /// It had a value once.
    seen: bool,
    /// It is there but disabled, and never had a value.
    disabled: bool,
    lost: Option<Duration>,
}

/// Where a zone is now, and how to tell that it still is the same one.
#[derive(Debug)]
struct Place {
    temperature: String,
    label: String,
    says: String,
}

/// A zone that a scan came across.
struct Found {
    name: String,
    role: ZoneRole,
    required: bool,
    place: Place,
    trips: (Option<Celsius>, Option<Celsius>),
}

impl Scan for Zones {
    fn scan(&mut self, files: &dyn Files, board: &BoardTable, _now: Duration) {
        let mut found = thermal_zones(files, board);
        if board.is_generic() && !found.iter().any(|zone| zone.role == ZoneRole::Junction) {
            found.extend(processor_monitors(files));
        }
        for known in &mut self.known {
            known.place = None;
        }
        for zone in found {
            if let Some(known) = self.known.iter_mut().find(|known| known.name == zone.name) {
                known.place = Some(zone.place);
                (known.passive, known.critical) = zone.trips;
                continue;
            }
            // One that was missing under the name that it was expected to have. It is known by another one now.
            self.known.retain(|old| old.seen || !old.required || prefix(&old.name) != prefix(&zone.name));
            self.known.push(Known {
                place: Some(zone.place),
                passive: zone.trips.0,
                critical: zone.trips.1,
                ..Known::new(zone.name, zone.role, zone.required)
            });
        }
        for rule in board.zones.iter().filter(|rule| rule.required) {
            if !self.known.iter().any(|zone| prefix(&zone.name) == rule.prefix) {
                self.known.push(Known::new(format!("{}-thermal", rule.prefix), rule.role, true));
            }
        }
    }
}

impl Zones {
    /// One round. Returns whether something that was there could not be read.
    pub fn read(&mut self, files: &dyn Files, now: &dyn Fn() -> Duration, zones: &mut Vec<Zone>) -> bool {
        let mut faulty = false;
        let mut junction = false;
        let mut disabled = Vec::new();
        for zone in &mut self.known {
            let read = zone.temperature(files);
            let read = match read {
                // An empty temperature of a zone that never had one: disabled, not lost.
                Err(Fault::Empty | Fault::Offline) if zone.role == ZoneRole::Junction && !zone.seen => {
                    zone.disabled = true;
                    Err(Fault::Offline)
                }
                read => read,
            };
            zone.seen |= read.is_ok();
            zone.disabled &= !zone.seen;
            let temperature = settle(read, now(), &mut zone.lost);
            faulty |= zone.lost.is_some();
            if zone.role == ZoneRole::Junction {
                match temperature {
                    Reading::Offline => disabled.push(zone.required),
                    _ => junction = true,
                }
            }
            if !zone.disabled {
                zones.push(zone.reading(temperature));
            }
        }
        if !junction && let Some(zone) = stand_in(zones, disabled.contains(&true)) {
            zones.insert(0, zone);
        }
        faulty
    }

    /// How many zones were found, and which of those that must be there are missing.
    pub fn found(&self) -> (usize, Vec<&str>) {
        let missing = self.known.iter().filter(|zone| zone.place.is_none()).map(|zone| zone.name.as_str());
        (self.known.iter().filter(|zone| zone.place.is_some()).count(), missing.collect())
    }

    /// Whether a junction is there but disabled, so that another zone stands in for it.
    pub fn junction_is_disabled(&self) -> bool {
        self.known.iter().any(|zone| zone.disabled)
    }
}

impl Known {
    fn new(name: String, role: ZoneRole, required: bool) -> Known {
        Known {
            name,
            role,
            required,
            place: None,
            passive: None,
            critical: None,
            seen: false,
            disabled: false,
            lost: None,
        }
    }

    fn temperature(&self, files: &dyn Files) -> Result<Celsius, Fault> {
        let place = self.place.as_ref().ok_or(Fault::Missing)?;
        // Numbers are given again when a driver is loaded again: what is here now may be another zone.
        if files.name(&place.label)? != place.says {
            return Err(Fault::Missing);
        }
        files.integer_in(&place.temperature, VALID).map(celsius)
    }

    fn reading(&self, temperature: Reading<Celsius>) -> Zone {
        Zone {
            name: self.name.clone(),
            role: self.role,
            temperature,
            passive_trip: self.passive,
            critical_trip: self.critical,
            required: self.required,
        }
    }
}

fn celsius(thousandths: i64) -> Celsius {
    Celsius(thousandths as f64 / 1000.0)
}

/// `kind`, or `kind#2` when the name is taken: a PC has several `acpitz`.
fn numbered(kind: &str, found: &[Found]) -> String {
    match found.iter().filter(|zone| zone.place.says.eq_ignore_ascii_case(kind)).count() {
        0 => kind.to_string(),
        before => format!("{kind}#{}", before + 1),
    }
}

fn thermal_zones(files: &dyn Files, board: &BoardTable) -> Vec<Found> {
    let mut found = Vec::new();
    for entry in files.list(THERMAL).into_iter().filter(|entry| entry.starts_with("thermal_zone")) {
        let zone = format!("{THERMAL}/{entry}");
        let label = format!("{zone}/type");
        let Ok(says) = files.name(&label) else { continue };
        let kind = says.to_ascii_lowercase();
        let (role, required) = board.zone(&kind);
        found.push(Found {
            name: numbered(&kind, &found),
            role,
            required,
            place: Place { temperature: format!("{zone}/temp"), label, says },
            trips: trips(files, &zone),
        });
    }
    found
}

/// Lowest passive and lowest critical trip of a zone.
///
/// A passive trip that only raises `hot-surface-alert` (L4T has one at 70 °C) is a notice for those who touch the case:
/// nothing is throttled there, so it does not count.
fn trips(files: &dyn Files, zone: &str) -> (Option<Celsius>, Option<Celsius>) {
    let entries = files.list(zone);
    let number = |entry: &str, before: &str, after: &str| -> Option<u32> {
        entry.strip_prefix(before)?.strip_suffix(after)?.parse().ok()
    };
    // Which cooling devices act on which trip.
    let mut bound: Vec<(i64, String)> = Vec::new();
    for device in entries.iter().filter_map(|entry| number(entry, "cdev", "_trip_point")) {
        let trip = files.integer(&format!("{zone}/cdev{device}_trip_point"));
        let kind = files.name(&format!("{zone}/cdev{device}/type"));
        if let (Ok(trip), Ok(kind)) = (trip, kind) {
            bound.push((trip, kind.to_ascii_lowercase()));
        }
    }
    let (mut passive, mut critical) = (None, None);
    let lower = |lowest: &mut Option<i64>, trip: i64| *lowest = Some(lowest.map_or(trip, |l| l.min(trip)));
    for k in entries.iter().filter_map(|entry| number(entry, "trip_point_", "_type")) {
        let Ok(kind) = files.name(&format!("{zone}/trip_point_{k}_type")) else { continue };
        let Ok(trip) = files.integer_in(&format!("{zone}/trip_point_{k}_temp"), VALID) else { continue };
        let mut devices = bound.iter().filter(|(trip, _)| *trip == i64::from(k)).peekable();
        let notice = devices.peek().is_some() && devices.all(|(_, kind)| kind == "hot-surface-alert");
        match kind.as_str() {
            "passive" if !notice => lower(&mut passive, trip),
            "critical" => lower(&mut critical, trip),
            _ => {}
        }
    }
    (passive.map(celsius), critical.map(celsius))
}

/// The temperature of the processor as a whole, from hardware monitors: `coretemp`'s package, `k10temp`'s `Tctl`.
fn processor_monitors(files: &dyn Files) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    for (directory, chip) in super::monitors(files) {
        if !PROCESSOR_MONITORS.contains(&chip.as_str()) {
            continue;
        }
        for entry in files.list(&directory) {
            let Some(sensor) = entry.strip_suffix("_label").filter(|sensor| sensor.starts_with("temp"))
            else {
                continue;
            };
            let label = format!("{directory}/{entry}");
            let Ok(says) = files.name(&label) else { continue };
            let package = says.to_ascii_lowercase();
            if !(package.starts_with("package") || package == "tctl") {
                continue;
            }
            let name = format!("{chip} {package}");
            if found.iter().any(|zone| zone.name == name) {
                continue;
            }
            let critical = files.integer_in(&format!("{directory}/{sensor}_crit"), VALID).ok().map(celsius);
            found.push(Found {
                name,
                role: ZoneRole::Junction,
                required: false,
                place: Place { temperature: format!("{directory}/{sensor}_input"), label, says },
                trips: (None, critical),
            });
        }
    }
    found
}

/// What takes the place of the junction: the maximum of the die.
fn stand_in(zones: &[Zone], required: bool) -> Option<Zone> {
    let die: Vec<&Zone> = zones.iter().filter(|zone| zone.role == ZoneRole::Die).collect();
    let lowest = |trip: fn(&Zone) -> Option<Celsius>| {
        die.iter().filter_map(|zone| trip(zone)).reduce(|a, b| if b < a { b } else { a })
    };
    let lost = |zones: &mut dyn Iterator<Item = &&Zone>| {
        zones
            .filter_map(|zone| match zone.temperature {
                Reading::Lost { since } => Some(since),
                _ => None,
            })
            .min()
    };
    let mut hottest: Option<(Celsius, Duration)> = None;
    for zone in &die {
        if let Reading::Value { value, at } = zone.temperature
            && hottest.is_none_or(|(most, _)| value > most)
        {
            hottest = Some((value, at));
        }
    }
    let temperature = match (lost(&mut die.iter().filter(|zone| zone.required)), hottest) {
        (Some(since), _) => Reading::Lost { since },
        (None, Some((value, at))) => Reading::Value { value, at },
        (None, None) => lost(&mut die.iter()).map_or(Reading::Offline, |since| Reading::Lost { since }),
    };
    (!die.is_empty()).then(|| Zone {
        name: STAND_IN.to_string(),
        role: ZoneRole::Junction,
        temperature,
        passive_trip: lowest(|zone| zone.passive_trip),
        critical_trip: lowest(|zone| zone.critical_trip),
        required,
    })
}
