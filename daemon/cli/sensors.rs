//! `finetuned sensors` and `finetuned record-sensors`: what the governor would see on this machine, and a record of it.

use super::exit::{Exit, Failure};
use super::{config, console, progress};
use crate::clock::{Clock, SystemClock};
use crate::config::daemon::DaemonConfig;
use crate::config::{Mode, budget};
use crate::governor::readings::{Reading, Readings};
use crate::governor::sensors::board::{BOARDS, BoardTable};
use crate::governor::sensors::trace::TraceWriter;
use crate::governor::sensors::{Probe, Sensors};
use crate::units::{Bytes, Celsius, Watts};
use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Time between two rounds of `--watch`.
const WATCH: Duration = Duration::from_secs(1);

/// Time between the first two rounds: counters of energy make a power of two readings.
const SETTLE: Duration = Duration::from_millis(250);

/// Which machine is looked at.
#[derive(Args, Debug)]
pub struct MachineArguments {
    /// Read the files below this directory instead of this machine's
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Take it for this board, whatever is configured or found
    #[arg(long, value_name = "NAME", value_parser = board_name)]
    board: Option<String>,
    /// Read [board] of this configuration only [default: the daemon's, but for --root]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Arguments of `finetuned sensors`.
#[derive(Args, Debug)]
pub struct SensorsArguments {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Repeat it every second, until Ctrl-C
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    machine: MachineArguments,
}

/// Arguments of `finetuned record-sensors`.
#[derive(Args, Debug)]
pub struct RecordArguments {
    /// The file to write; it must not exist
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Time between two rounds [default: [board] interval of the configuration, 500ms]
    #[arg(long, value_name = "TIME", value_parser = interval)]
    interval: Option<Duration>,
    /// When to end [default: at Ctrl-C]
    #[arg(long, value_name = "TIME", value_parser = length)]
    duration: Option<Duration>,
    #[command(flatten)]
    machine: MachineArguments,
}

fn board_name(name: &str) -> Result<String, String> {
    match BoardTable::named(name) {
        Some(board) => Ok(board.name.to_string()),
        None => {
            let names: Vec<&str> = BOARDS.iter().map(|board| board.name).collect();
            Err(format!("there are {}", names.join(", ")))
        }
    }
}

/// `500ms`, `90s`, `30min`, `8h`.
fn length(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, u64); 4] = [("ms", 1), ("s", 1000), ("min", 60_000), ("h", 3_600_000)];
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
    number
        .parse::<u64>()
        .ok()
        .zip(factor)
        .and_then(|(number, factor)| number.checked_mul(factor))
        .map(Duration::from_millis)
        .ok_or_else(|| "a time is a whole number with ms, s, min or h: 500ms, 8h".to_string())
}

fn interval(text: &str) -> Result<Duration, String> {
    let allowed = Duration::from_millis(10)..=Duration::from_secs(3600);
    length(text).and_then(|interval| {
        if allowed.contains(&interval) { Ok(interval) } else { Err("from 10ms to 1h".to_string()) }
    })
}

impl MachineArguments {
    /// The sensors, as the daemon would read them, and how often it would.
    fn open(&self, clock: Arc<dyn Clock>) -> Result<(Sensors, Duration), Failure> {
        // A wrong directory would otherwise look like a machine without sensors.
        std::fs::read_dir(&self.root)
            .with_context(|| format!("cannot read the directory {}", self.root.display()))
            .map_err(Failure::new)?;
        let mut board = self.configured()?;
        board.name = self.board.clone().or(board.name);
        Ok((Sensors::open(&self.root, &board, clock), board.interval))
    }

    /// `[board]` of the daemon's configuration. What this machine's files say is not said of another one's.
    fn configured(&self) -> Result<budget::Board, Failure> {
        if self.config.is_none() && self.root != Path::new("/") {
            return Ok(budget::Board::default());
        }
        let loaded = DaemonConfig::load(self.config.as_deref(), Mode::System, &|name| std::env::var_os(name));
        loaded.map(|config| config.board).map_err(config::failed)
    }
}

/// Runs `finetuned sensors`.
pub fn show(arguments: &SensorsArguments) -> Result<Exit, Failure> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let (mut sensors, _) = arguments.machine.open(clock.clone())?;
    sensors.read();
    clock.sleep(SETTLE);
    loop {
        let readings = sensors.read();
        let shown = if arguments.json {
            format!("{}\n", as_json(&sensors, &readings))
        } else {
            as_text(&sensors, &readings)
        };
        if !arguments.watch {
            console::result(&shown)?;
            return Ok(Exit::Done);
        }
        let mut out = io::stdout().lock();
        match out.write_all(shown.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => {}
            // Whoever watched has gone.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Exit::Done),
            Err(error) => {
                let error = anyhow::Error::from(error).context("cannot write to standard output");
                return Err(Failure::new(error));
            }
        }
        drop(out);
        clock.sleep(WATCH);
    }
}

/// Runs `finetuned record-sensors`.
pub fn record(arguments: &RecordArguments) -> Result<Exit, Failure> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let (mut sensors, usual) = arguments.machine.open(clock.clone())?;
    let interval = arguments.interval.unwrap_or(usual);
    let path = &arguments.output;
    let file = OpenOptions::new().write(true).create_new(true).open(path).map_err(|error| {
        let exists = error.kind() == io::ErrorKind::AlreadyExists;
        let failure =
            Failure::new(anyhow::Error::from(error).context(format!("cannot create {}", path.display())));
        if exists { failure.help("a recording is never overwritten: give another --output") } else { failure }
    })?;
    let mut trace = TraceWriter::new(file);
    let start = clock.monotonic();
    let mut due = start;
    loop {
        trace
            .write(&sensors.read())
            .with_context(|| format!("cannot write to {}", path.display()))
            .map_err(Failure::new)?;
        due += interval;
        let now = clock.monotonic();
        // Rounds that came too late are left out, not made up for.
        due = due.max(now);
        if arguments.duration.is_some_and(|duration| due >= start + duration) {
            return Ok(Exit::Done);
        }
        clock.sleep(due - now);
    }
}

fn as_text(sensors: &Sensors, readings: &Readings) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<24} {value}");
    };
    let at = readings.at;
    for zone in &readings.zones {
        let mut value = state(zone.temperature, at, |Celsius(t)| format!("{t:.1} °C"));
        for (name, trip) in [("throttles at", zone.passive_trip), ("off at", zone.critical_trip)] {
            if let Some(Celsius(trip)) = trip {
                let _ = write!(value, ", {name} {trip:.0}");
            }
        }
        line(&zone.name, format!("{value} ({})", zone.role.word()));
    }
    let watts = |power| state(power, at, |Watts(w)| format!("{w:.2} W"));
    for rail in &readings.rails {
        line(&format!("{}{}", rail.name, if rail.counted { "*" } else { "" }), watts(rail.power));
    }
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let facts = [
        ("power", readings.power.map(watts)),
        ("GPU load", readings.gpu_load.map(percent)),
        (
            "GPU clock",
            readings
                .gpu_clock
                .map(|(clock, limit)| format!("{} of {} MHz", clock / 1_000_000, limit / 1_000_000)),
        ),
        ("throttled", Some(if readings.throttled { "yes" } else { "no" }.to_string())),
        (
            "supply alarms",
            readings.over_current.map(|alarms| {
                format!(
                    "under-voltage {:.2}/s, over-current {:.2}/s average, {:.2}/s instantaneous",
                    alarms.under_voltage, alarms.average, alarms.instantaneous
                )
            }),
        ),
        ("fan", readings.fan.map(percent)),
        ("external power", readings.external_power.map(|there| if there { "yes" } else { "no" }.to_string())),
        ("battery", readings.battery.map(percent)),
        ("available memory", readings.available_memory.map(|bytes| bytes.to_string())),
        ("memory pressure", readings.memory_pressure.map(percent)),
        ("load per core", readings.load.map(|load| format!("{load:.2}"))),
        ("power mode", readings.mode.clone()),
    ];
    for (name, value) in facts {
        if let Some(value) = value {
            line(name, value);
        }
    }
    text.push_str("\nWhat can be read here\n");
    for (what, probe) in sensors.probe() {
        let (word, said) = match probe {
            Probe::Yes(said) => ("yes", said),
            Probe::No(said) => ("no", said),
            Probe::Later(said) => ("later", said),
        };
        let _ = writeln!(text, "  {what:<22} {word:<6} {said}");
    }
    let cost = sensors.cost();
    let groups = cost.groups().into_iter().filter(|(_, time)| !time.is_zero());
    let groups: Vec<String> = groups.map(|(name, time)| format!("{name} {}", ms(time))).collect();
    let _ = writeln!(text, "\nA round takes {}: {}", ms(cost.total()), groups.join(", "));
    text
}

fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

fn state<T>(reading: Reading<T>, now: Duration, show: impl Fn(T) -> String) -> String {
    match reading {
        Reading::Value { value, .. } => show(value),
        Reading::Offline => "offline".to_string(),
        Reading::Lost { since } => format!("lost for {}", progress::duration(now.saturating_sub(since))),
    }
}

fn as_json(sensors: &Sensors, readings: &Readings) -> Value {
    let at = readings.at;
    fn value<T>(reading: Reading<T>, now: Duration, number: fn(T) -> f64) -> Value {
        match reading {
            Reading::Value { value, .. } => json!(number(value)),
            Reading::Offline => json!("offline"),
            Reading::Lost { since } => json!({ "lost_for": now.saturating_sub(since).as_secs_f64() }),
        }
    }
    let watts = |power| value(power, at, |Watts(w)| w);
    let zones: Vec<Value> = readings
        .zones
        .iter()
        .map(|zone| {
            json!({
                "name": zone.name,
                "role": zone.role.word(),
                "required": zone.required,
                "temperature": value(zone.temperature, at, |Celsius(t)| t),
                "passive_trip": zone.passive_trip,
                "critical_trip": zone.critical_trip,
            })
        })
        .collect();
    let rails: Vec<Value> = readings
        .rails
        .iter()
        .map(|rail| json!({ "name": rail.name, "counted": rail.counted, "power": watts(rail.power) }))
        .collect();
    let probe: Vec<Value> = sensors
        .probe()
        .into_iter()
        .map(|(what, probe)| {
            let (word, said) = match probe {
                Probe::Yes(said) => ("yes", said),
                Probe::No(said) => ("no", said),
                Probe::Later(said) => ("later", said),
            };
            json!({ "what": what, "found": word, "detail": said })
        })
        .collect();
    let identity = sensors.identity();
    let limits = sensors.limits();
    let cost = sensors.cost();
    let cost: serde_json::Map<String, Value> = std::iter::once(("total", cost.total()))
        .chain(cost.groups())
        .map(|(name, time)| (name.to_string(), json!(time.as_secs_f64() * 1e3)))
        .collect();
    json!({
        "schema": 1,
        "board": sensors.board().name,
        "identity": {
            "model": identity.model,
            "module": identity.module,
            "compatible": identity.compatible,
            "l4t": identity.l4t,
            "jetpack": identity.jetpack,
        },
        "limits": {
            "gpu_minimum": limits.gpu_minimum,
            "gpu_maximum": limits.gpu_maximum,
            "gated_tpcs": limits.gated.map(u64::count_ones),
            "memory_clock": limits.memory,
        },
        "readings": {
            "at": at.as_secs_f64(),
            "zones": zones,
            "rails": rails,
            "power": readings.power.map(watts),
            "gpu_load": readings.gpu_load,
            "gpu_clock": readings.gpu_clock.map(|(clock, _)| clock),
            "gpu_clock_limit": readings.gpu_clock.map(|(_, limit)| limit),
            "throttled": readings.throttled,
            "over_current": readings.over_current.map(|alarms| json!({
                "under_voltage": alarms.under_voltage,
                "average": alarms.average,
                "instantaneous": alarms.instantaneous,
            })),
            "fan": readings.fan,
            "external_power": readings.external_power,
            "battery": readings.battery,
            "available_memory": readings.available_memory.map(|Bytes(bytes)| bytes),
            "memory_pressure": readings.memory_pressure,
            "load": readings.load,
            "mode": readings.mode,
        },
        "probe": probe,
        "cost_ms": cost,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(length("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(length("8h"), Ok(Duration::from_secs(8 * 3600)));
        for bad in ["", "5", "ms", "-5s", "1.5s", "5 s", "99999999999999999999h", "9999999999999999999h"] {
            assert!(length(bad).is_err(), "{bad:?}");
        }
        assert!(interval("1ms").is_err() && interval("2h").is_err() && interval("10ms").is_ok());
    }
}
