//! Rounds of readings as CSV: a line each, for looking at a night and for replaying it.
//!
//! ```text
//! at,zone:tj-thermal:junction:required:passive=99:critical=104.5,rail:VDD_GPU_SOC:counted,power,gpu_load,…
//! 12.500000,54.25,3.15,9.8,0.42,…
//! 13.000000,lost@12.7,3.2@12.6,9.9,,…
//! ```
//!
//! * The header names the columns; the attributes of a zone and a rail are in their column's name. When parts appear or
//!   vanish, a new header follows, and holds from there on.
//! * A value that was read within [`FRESH`] of the round's end stands alone and is read back with the round's time; an
//!   older one has its time behind `@`. `offline` and `lost@SINCE` are what they say. An empty cell is no reading.
//! * Units: seconds (monotonic), degrees Celsius, watts, hertz, bytes, events per second; shares from 0 to 1.

use crate::governor::readings::{OverCurrent, Rail, Reading, Readings, Zone, ZoneRole};
use crate::units::{Bytes, Celsius, Watts};
use std::io;
use std::time::Duration;

/// A reading that is at most this old belongs to its round.
pub const FRESH: Duration = Duration::from_millis(100);

/// Columns after the zones and rails.
const COLUMNS: [&str; 15] = [
    "power",
    "gpu_load",
    "gpu_clock",
    "gpu_clock_limit",
    "throttled",
    "under_voltage",
    "over_current_average",
    "over_current_instantaneous",
    "fan",
    "external_power",
    "battery",
    "available_memory",
    "memory_pressure",
    "load",
    "mode",
];

/// Writes rounds.
pub struct TraceWriter<W: io::Write> {
    out: W,
    header: Vec<String>,
}

impl<W: io::Write> TraceWriter<W> {
    /// Writes to `out`, a whole line at a time.
    pub fn new(out: W) -> TraceWriter<W> {
        TraceWriter { out, header: Vec::new() }
    }

    /// Writes a round, after a header if the columns are not those of the round before.
    pub fn write(&mut self, readings: &Readings) -> io::Result<()> {
        let header = header(readings);
        let mut lines = csv::Writer::from_writer(Vec::new());
        if header != self.header {
            lines.write_record(&header)?;
            self.header = header;
        }
        lines.write_record(cells(readings))?;
        let lines = lines.into_inner().map_err(|error| io::Error::other(error.to_string()))?;
        self.out.write_all(&lines)?;
        self.out.flush()
    }
}

fn header(readings: &Readings) -> Vec<String> {
    let mut columns = vec!["at".to_string()];
    for zone in &readings.zones {
        let mut column = format!("zone:{}:{}", zone.name, zone.role.word());
        if zone.required {
            column.push_str(":required");
        }
        for (name, trip) in [("passive", zone.passive_trip), ("critical", zone.critical_trip)] {
            if let Some(Celsius(trip)) = trip {
                column.push_str(&format!(":{name}={trip}"));
            }
        }
        columns.push(column);
    }
    for rail in &readings.rails {
        columns.push(format!("rail:{}{}", rail.name, if rail.counted { ":counted" } else { "" }));
    }
    columns.extend(COLUMNS.map(str::to_string));
    columns
}

fn cells(readings: &Readings) -> Vec<String> {
    let at = readings.at;
    fn show<T: ToString>(value: Option<T>) -> String {
        value.map_or_else(String::new, |value| value.to_string())
    }
    let flag = |flag: bool| u8::from(flag);
    let mut cells = vec![seconds(at)];
    cells.extend(readings.zones.iter().map(|zone| cell(zone.temperature, at, |Celsius(t)| t)));
    cells.extend(readings.rails.iter().map(|rail| cell(rail.power, at, |Watts(w)| w)));
    let alarms = readings.over_current;
    cells.extend([
        readings.power.map_or_else(String::new, |power| cell(power, at, |Watts(w)| w)),
        show(readings.gpu_load),
        show(readings.gpu_clock.map(|(clock, _)| clock)),
        show(readings.gpu_clock.map(|(_, limit)| limit)),
        flag(readings.throttled).to_string(),
        show(alarms.map(|alarms| alarms.under_voltage)),
        show(alarms.map(|alarms| alarms.average)),
        show(alarms.map(|alarms| alarms.instantaneous)),
        show(readings.fan),
        show(readings.external_power.map(flag)),
        show(readings.battery),
        show(readings.available_memory.map(|Bytes(bytes)| bytes)),
        show(readings.memory_pressure),
        show(readings.load),
        show(readings.mode.clone()),
    ]);
    cells
}

fn cell<T>(reading: Reading<T>, round: Duration, number: impl Fn(T) -> f64) -> String {
    match reading {
        Reading::Value { value, at } if round.abs_diff(at) <= FRESH => number(value).to_string(),
        Reading::Value { value, at } => format!("{}@{}", number(value), seconds(at)),
        Reading::Offline => "offline".to_string(),
        Reading::Lost { since } => format!("lost@{}", seconds(since)),
    }
}

/// To the nanosecond, so that a time is the same when it is read back.
fn seconds(time: Duration) -> String {
    format!("{}.{:09}", time.as_secs(), time.subsec_nanos())
}

/// What is wrong with a trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file could not be read, or is no CSV.
    #[error("cannot read the trace: {0}")]
    Csv(#[from] csv::Error),
    /// A line has the wrong number of cells.
    #[error("line {line} of the trace has {cells} cells, its header has {columns}")]
    Cells {
        /// The line.
        line: u64,
        /// Its cells.
        cells: usize,
        /// Columns of the header in force.
        columns: usize,
    },
    /// The header is not one.
    #[error("line {line} of the trace: {column:?} is no column of a trace (record-sensors writes one)")]
    Header {
        /// The line.
        line: u64,
        /// The column, or what stands where one should.
        column: String,
    },
    /// A cell does not hold what its column has.
    #[error("line {line} of the trace: {cell:?} is no value of {column}")]
    Cell {
        /// The line.
        line: u64,
        /// The column.
        column: String,
        /// The cell.
        cell: String,
    },
}

/// Reads rounds back, one after the other.
pub fn read<R: io::Read>(input: R) -> impl Iterator<Item = Result<Readings, TraceError>> {
    let lines = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(input);
    let mut columns: Vec<Column> = Vec::new();
    lines.into_records().filter_map(move |record| {
        let record = match record {
            Ok(record) => record,
            Err(error) => return Some(Err(error.into())),
        };
        let line = record.position().map_or(0, |position| position.line());
        if record.get(0) == Some("at") {
            columns.clear();
            for column in &record {
                match Column::parse(column) {
                    Some(column) => columns.push(column),
                    None => return Some(Err(TraceError::Header { line, column: column.to_string() })),
                }
            }
            return None;
        }
        Some(round(&columns, &record, line))
    })
}

enum Column {
    At,
    Zone(Zone),
    Rail(Rail),
    Other(&'static str),
}

impl Column {
    fn parse(text: &str) -> Option<Column> {
        if text == "at" {
            return Some(Column::At);
        }
        if let Some(rest) = text.strip_prefix("zone:") {
            return zone(rest).map(Column::Zone);
        }
        if let Some(rest) = text.strip_prefix("rail:") {
            let (name, counted) = rest.strip_suffix(":counted").map_or((rest, false), |name| (name, true));
            return Some(Column::Rail(Rail { name: name.to_string(), power: Reading::Offline, counted }));
        }
        COLUMNS.iter().find(|column| **column == text).map(|column| Column::Other(column))
    }

    fn name(&self) -> &str {
        match self {
            Column::At => "at",
            Column::Zone(zone) => &zone.name,
            Column::Rail(rail) => &rail.name,
            Column::Other(name) => name,
        }
    }
}

/// `NAME:ROLE[:required][:passive=T][:critical=T]`. A name may have colons in it, so it is read from behind.
fn zone(text: &str) -> Option<Zone> {
    let trip = |text: &str| text.parse().ok().filter(|t: &f64| t.is_finite()).map(Celsius);
    let (mut rest, mut required, mut passive_trip, mut critical_trip) = (text, false, None, None);
    loop {
        let (before, last) = rest.rsplit_once(':')?;
        if let Some(celsius) = last.strip_prefix("critical=") {
            critical_trip = Some(trip(celsius)?);
        } else if let Some(celsius) = last.strip_prefix("passive=") {
            passive_trip = Some(trip(celsius)?);
        } else if last == "required" {
            required = true;
        } else {
            let roles = [ZoneRole::Junction, ZoneRole::Die, ZoneRole::Board];
            let role = roles.into_iter().find(|role| role.word() == last)?;
            let temperature = Reading::Offline;
            return Some(Zone {
                name: before.to_string(),
                role,
                temperature,
                passive_trip,
                critical_trip,
                required,
            });
        }
        rest = before;
    }
}

fn round(columns: &[Column], record: &csv::StringRecord, line: u64) -> Result<Readings, TraceError> {
    if columns.is_empty() {
        let column = record.get(0).unwrap_or_default().to_string();
        return Err(TraceError::Header { line, column });
    }
    if columns.len() != record.len() {
        return Err(TraceError::Cells { line, cells: record.len(), columns: columns.len() });
    }
    let mut readings = Readings::default();
    let (mut clock, mut limit) = (None, None);
    let mut alarms = [None; 3];
    for (column, text) in columns.iter().zip(record) {
        let wrong = || TraceError::Cell { line, column: column.name().to_string(), cell: text.to_string() };
        let share =
            || optional(text, |text| number(text).filter(|n| (0.0..=1.0).contains(n))).ok_or_else(wrong);
        let positive = || optional(text, |text| number(text).filter(|n| *n >= 0.0)).ok_or_else(wrong);
        let whole = || optional(text, |text| text.parse::<u64>().ok()).ok_or_else(wrong);
        let flag = || {
            optional(text, |text| match text {
                "0" => Some(false),
                "1" => Some(true),
                _ => None,
            })
            .ok_or_else(wrong)
        };
        match column {
            Column::At => readings.at = time(text).ok_or_else(wrong)?,
            Column::Zone(zone) => {
                let temperature = reading(text, readings.at, Celsius).ok_or_else(wrong)?;
                readings.zones.push(Zone { temperature, ..zone.clone() });
            }
            Column::Rail(rail) => {
                let power = reading(text, readings.at, Watts).ok_or_else(wrong)?;
                readings.rails.push(Rail { power, ..rail.clone() });
            }
            Column::Other("power") => {
                readings.power =
                    optional(text, |text| reading(text, readings.at, Watts)).ok_or_else(wrong)?;
            }
            Column::Other("gpu_load") => readings.gpu_load = share()?,
            Column::Other("gpu_clock") => clock = whole()?,
            Column::Other("gpu_clock_limit") => limit = whole()?,
            Column::Other("throttled") => readings.throttled = flag()?.ok_or_else(wrong)?,
            Column::Other("under_voltage") => alarms[0] = positive()?,
            Column::Other("over_current_average") => alarms[1] = positive()?,
            Column::Other("over_current_instantaneous") => alarms[2] = positive()?,
            Column::Other("fan") => readings.fan = share()?,
            Column::Other("external_power") => readings.external_power = flag()?,
            Column::Other("battery") => readings.battery = share()?,
            Column::Other("available_memory") => readings.available_memory = whole()?.map(Bytes),
            Column::Other("memory_pressure") => readings.memory_pressure = share()?,
            Column::Other("load") => readings.load = positive()?,
            Column::Other("mode") => readings.mode = (!text.is_empty()).then(|| text.to_string()),
            // `Column::parse` makes no others.
            Column::Other(_) => return Err(wrong()),
        }
    }
    readings.gpu_clock = clock.zip(limit);
    if let [Some(under_voltage), Some(average), Some(instantaneous)] = alarms {
        readings.over_current = Some(OverCurrent { under_voltage, average, instantaneous });
    }
    Ok(readings)
}

/// An empty cell is `Some(None)`, a wrong one `None`.
fn optional<T>(text: &str, parse: impl FnOnce(&str) -> Option<T>) -> Option<Option<T>> {
    if text.is_empty() { Some(None) } else { parse(text).map(Some) }
}

fn number(text: &str) -> Option<f64> {
    text.parse().ok().filter(|number: &f64| number.is_finite())
}

/// Seconds with at most nine decimals.
fn time(text: &str) -> Option<Duration> {
    let (seconds, decimals) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(seconds) || !digits(decimals) || decimals.len() > 9 {
        return None;
    }
    Some(Duration::new(seconds.parse().ok()?, format!("{decimals:0<9}").parse().ok()?))
}

fn reading<T>(text: &str, round: Duration, unit: fn(f64) -> T) -> Option<Reading<T>> {
    match text.split_once('@') {
        None if text == "offline" => Some(Reading::Offline),
        None => Some(Reading::Value { value: unit(number(text)?), at: round }),
        Some(("lost", since)) => Some(Reading::Lost { since: time(since)? }),
        Some((value, at)) => Some(Reading::Value { value: unit(number(value)?), at: time(at)? }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(rounds: &[Readings]) -> Vec<Readings> {
        let mut written = Vec::new();
        let mut writer = TraceWriter::new(&mut written);
        for readings in rounds {
            writer.write(readings).unwrap();
        }
        read(written.as_slice()).collect::<Result<_, _>>().unwrap()
    }

    fn readings() -> impl Strategy<Value = Readings> {
        let time = || (0u64..1 << 40).prop_map(Duration::from_nanos);
        let value = |round: Duration| {
            prop_oneof![
                (-40.0..150.0f64).prop_map(move |t| Reading::Value { value: t, at: round }),
                (-40.0..150.0f64, 0..1u64 << 40).prop_map(move |(t, age)| Reading::Value {
                    value: t,
                    at: round + FRESH + Duration::from_nanos(age + 1),
                }),
                Just(Reading::Offline),
                (0..1u64 << 40).prop_map(|since| Reading::Lost { since: Duration::from_nanos(since) }),
            ]
        };
        let celsius = |reading| match reading {
            Reading::Value { value, at } => Reading::Value { value: Celsius(value), at },
            Reading::Offline => Reading::Offline,
            Reading::Lost { since } => Reading::Lost { since },
        };
        let watts = |reading| match reading {
            Reading::Value { value, at } => Reading::Value { value: Watts(value), at },
            Reading::Offline => Reading::Offline,
            Reading::Lost { since } => Reading::Lost { since },
        };
        let role = || prop_oneof![Just(ZoneRole::Junction), Just(ZoneRole::Die), Just(ZoneRole::Board)];
        let trip = || proptest::option::of((0.0..150.0f64).prop_map(Celsius));
        time().prop_flat_map(move |at| {
            let zone = ("[ -~]{1,12}", role(), value(at), trip(), trip(), any::<bool>()).prop_map(
                move |(name, role, reading, passive_trip, critical_trip, required)| Zone {
                    name,
                    role,
                    temperature: celsius(reading),
                    passive_trip,
                    critical_trip,
                    required,
                },
            );
            let rail = ("[A-Z0-9_,\"]{1,12}", value(at), any::<bool>())
                .prop_map(move |(name, reading, counted)| Rail { name, power: watts(reading), counted });
            let share = || proptest::option::of(0.0..=1.0f64);
            (
                proptest::collection::vec(zone, 0..4),
                proptest::collection::vec(rail, 0..4),
                proptest::option::of(value(at).prop_map(watts)),
                (share(), share(), share(), share(), proptest::option::of(0.0..100.0f64)),
                (any::<bool>(), any::<Option<bool>>(), any::<Option<(u64, u64)>>(), any::<Option<u64>>()),
                proptest::option::of((0.0..1e4f64, 0.0..1e4f64, 0.0..1e4f64)),
                proptest::option::of("[ -~]{1,12}"),
            )
                .prop_map(move |(zones, rails, power, shares, facts, alarms, mode)| Readings {
                    at,
                    zones,
                    rails,
                    power,
                    gpu_load: shares.0,
                    fan: shares.1,
                    battery: shares.2,
                    memory_pressure: shares.3,
                    load: shares.4,
                    throttled: facts.0,
                    external_power: facts.1,
                    gpu_clock: facts.2,
                    available_memory: facts.3.map(Bytes),
                    over_current: alarms.map(|(under_voltage, average, instantaneous)| OverCurrent {
                        under_voltage,
                        average,
                        instantaneous,
                    }),
                    mode,
                })
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn what_is_written_is_read_back(rounds in proptest::collection::vec(readings(), 1..5)) {
            prop_assert_eq!(round_trip(&rounds), rounds);
        }

        #[test]
        fn arbitrary_text_is_an_error_or_readings(text in "(at,power\n)?[-a-z0-9@.,:\n\"]{0,60}") {
            for _ in read(text.as_bytes()) {}
        }
    }

    #[test]
    fn a_mistake_is_named_with_its_line() {
        let message = |text: &str| {
            let error = read(text.as_bytes()).find_map(Result::err);
            error.map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(
            message("at,power\n1.0,5\n2.0,warm\n"),
            "line 3 of the trace: \"warm\" is no value of power"
        );
        assert_eq!(message("at,power\n1.0\n"), "line 2 of the trace has 1 cells, its header has 2");
        assert!(message("at,colour\n").contains("line 1 of the trace: \"colour\" is no column"));
        assert!(message("1.0,5\n").contains("line 1 of the trace: \"1.0\" is no column"));
        for cell in ["nan", "inf", "lost@", "5@-1", "5@x", ""] {
            let said = message(&format!("at,zone:tj:junction\n1.0,{cell}\n"));
            assert!(said.contains("line 2"), "{cell:?}: {said}");
        }
    }
}
