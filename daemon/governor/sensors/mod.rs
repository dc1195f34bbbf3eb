//! Sensors: what can be read of a machine below `/sys` and `/proc`, as [`Readings`].
//!
//! ```text
//!   files ── bounded reads below a root          board ── what must be there, what is counted
//!     ▲
//!     ├── zones     temperatures        ├── gpu       clock, load, limits
//!     ├── rails     power               └── machine   alarms, throttling, fan, supply, memory, load, mode
//!                                       trace ── rounds as CSV, and back
//! ```
//!
//! A round ([`Sensors::read`]) blocks: an I²C register takes half a millisecond, and a sick driver longer. It belongs on
//! a thread of its own. No program is started, nothing is written, no rights are needed; what only root may read is left
//! out.
//!
//! Parts are found by name. They are looked for again every [`RESCAN`], and soon (then ever less often) after a round
//! in which something was lost: numbers change when a driver is loaded again, and some nodes appear late in a boot.
//!
//! ```text
//!              a part is lost                        round without faults
//!   regular ───────────────────► looking again after 1, 2, 4, … 30 s ───────────────────► regular
//! ```

pub mod board;
pub mod files;
mod gpu;
mod machine;
mod rails;
pub mod trace;
mod zones;

use self::board::{BoardTable, Identity};
use self::files::{Below, Fault, Files};
use super::readings::{Reading, Readings};
use crate::clock::Clock;
use crate::config::budget;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

pub use self::gpu::Limits;
pub use self::zones::STAND_IN;

/// Longest time between two searches for parts.
pub const RESCAN: Duration = Duration::from_secs(30);

/// First search after a part was lost.
const SOON: Duration = Duration::from_secs(1);

/// A group of parts that is looked for.
trait Scan {
    /// Finds what is there now. What was there stays known.
    fn scan(&mut self, files: &dyn Files, board: &BoardTable, now: Duration);
}

/// The sensors of a machine.
pub struct Sensors {
    files: Box<dyn Files>,
    clock: Arc<dyn Clock>,
    board: &'static BoardTable,
    unknown_board: Option<String>,
    identity: Identity,
    zones: zones::Zones,
    rails: rails::Rails,
    gpu: gpu::Gpu,
    alarms: machine::Alarms,
    throttles: machine::Throttles,
    fan: machine::Fan,
    supplies: Vec<machine::Supply>,
    mode: machine::Mode,
    rescan: Duration,
    patience: Duration,
    cost: Cost,
}

/// What a round took, by group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Looking for parts; most rounds do not.
    pub scan: Duration,
    /// Thermal zones and cooling devices.
    pub zones: Duration,
    /// Rails.
    pub rails: Duration,
    /// The GPU's clock and load.
    pub gpu: Duration,
    /// Alarms, fan, supply, memory, load, mode.
    pub machine: Duration,
}

impl Cost {
    /// The whole round.
    pub fn total(&self) -> Duration {
        self.groups().iter().map(|(_, time)| *time).sum()
    }

    /// Every group with its name.
    pub fn groups(&self) -> [(&'static str, Duration); 5] {
        [
            ("scan", self.scan),
            ("zones", self.zones),
            ("rails", self.rails),
            ("gpu", self.gpu),
            ("machine", self.machine),
        ]
    }
}

/// Whether something can be read here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// It can; what was found.
    Yes(String),
    /// It cannot; why.
    No(String),
    /// Not now; what it waits for.
    Later(String),
}

impl Sensors {
    /// The sensors of the machine whose files are below `root` (`/` is this one). Nothing that is or is not there is an
    /// error: see [`Sensors::probe`].
    pub fn open(root: &Path, board: &budget::Board, clock: Arc<dyn Clock>) -> Sensors {
        Sensors::over(Box::new(Below::new(root)), board, clock)
    }

    /// The same over other files.
    pub fn over(files: Box<dyn Files>, config: &budget::Board, clock: Arc<dyn Clock>) -> Sensors {
        let identity = Identity::read(&*files);
        let named = config.name.as_deref().map(|name| (name, BoardTable::named(name)));
        let (board, unknown_board) = match named {
            Some((_, Some(board))) => (board, None),
            Some((name, None)) => {
                let board = BoardTable::of(&identity);
                tracing::warn!("no board is named {name:?}: this one is taken for {}", board.name);
                (board, Some(name.to_string()))
            }
            None => (BoardTable::of(&identity), None),
        };
        let mut sensors = Sensors {
            files,
            clock,
            board,
            unknown_board,
            identity,
            zones: zones::Zones::default(),
            rails: rails::Rails::new(config),
            gpu: gpu::Gpu::default(),
            alarms: machine::Alarms::default(),
            throttles: machine::Throttles::default(),
            fan: machine::Fan::default(),
            supplies: Vec::new(),
            mode: machine::Mode::default(),
            rescan: Duration::ZERO,
            patience: SOON,
            cost: Cost::default(),
        };
        sensors.scan();
        sensors
    }

    /// One round: reads everything that is due. Blocks as long as the drivers do.
    pub fn read(&mut self) -> Readings {
        let clock = self.clock.clone();
        let mut stopwatch = Stopwatch::start(&*clock);
        let mut cost = Cost::default();
        if clock.monotonic() >= self.rescan {
            self.scan();
            cost.scan = stopwatch.lap();
        }
        let files = &*self.files;
        let now = || clock.monotonic();
        let mut readings = Readings::default();

        let mut faulty = self.zones.read(files, &now, &mut readings.zones);
        readings.throttled = self.throttles.read(files);
        cost.zones = stopwatch.lap();

        readings.power = self.rails.read(files, &now, &mut readings.rails);
        faulty |= self.rails.faulty();
        cost.rails = stopwatch.lap();

        (readings.gpu_load, readings.gpu_clock) = self.gpu.read(files);
        faulty |= self.gpu.faulty();
        cost.gpu = stopwatch.lap();

        readings.over_current = self.alarms.read(files, now());
        readings.fan = self.fan.read(files);
        faulty |= self.alarms.faulty() || self.fan.faulty();
        (readings.external_power, readings.battery) = machine::supply(files, &self.supplies);
        machine::system(files, &mut readings);
        readings.mode = self.mode.read(files);
        cost.machine = stopwatch.lap();

        readings.at = clock.monotonic();
        if !faulty {
            self.patience = SOON;
        } else if self.rescan > readings.at + self.patience {
            self.rescan = readings.at + self.patience;
            self.patience = (self.patience * 2).min(RESCAN);
        }
        self.cost = cost;
        readings
    }

    /// What the last round took.
    pub fn cost(&self) -> Cost {
        self.cost
    }

    /// The board that was found or configured.
    pub fn board(&self) -> &'static BoardTable {
        self.board
    }

    /// What the machine says that it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Limits that a power mode sets, read now.
    pub fn limits(&self) -> Limits {
        self.gpu.limits(&*self.files)
    }

    /// What can be read here and what cannot, a line each.
    pub fn probe(&self) -> Vec<(&'static str, Probe)> {
        let files = &*self.files;
        let jetson = !self.board.is_generic();
        let missing = |why: &str| {
            // A node that a Jetson has may appear late in the boot.
            if jetson { Probe::Later(format!("{why} (yet)")) } else { Probe::No(why.to_string()) }
        };
        let limits = self.limits();
        let mhz = |hertz: u64| hertz as f64 / 1e6;
        let mut lines = vec![
            ("board", self.probe_board()),
            ("temperatures", self.probe_zones()),
            ("power rails", self.probe_rails()),
        ];
        lines.push((
            "supply alarms",
            if self.alarms.found() {
                Probe::Yes("under-voltage and over-current counters".into())
            } else {
                missing("no counters of over-current events")
            },
        ));
        lines.push((
            "throttling",
            match self.throttles.found() {
                0 => missing("no cooling device that slows CPU or GPU down"),
                n => Probe::Yes(format!("{n} cooling devices")),
            },
        ));
        lines.push((
            "GPU clock",
            match (self.gpu.name(), limits.gpu_minimum, limits.gpu_maximum) {
                (Some(name), Some(low), Some(high)) if low == high => {
                    Probe::Yes(format!("{name}, pinned at {:.0} MHz (jetson_clocks?)", mhz(high)))
                }
                (Some(name), _, Some(high)) => Probe::Yes(format!("{name}, up to {:.0} MHz", mhz(high))),
                (Some(name), ..) => Probe::Later(format!("{name} has no limit of its clock yet")),
                (None, ..) => missing("no GPU below /sys/class/devfreq"),
            },
        ));
        lines.push((
            "gated TPCs",
            match limits.gated {
                Some(mask) => Probe::Yes(format!("{} (mask {mask})", mask.count_ones())),
                None => Probe::No("no mask".into()),
            },
        ));
        lines.push((
            "memory clock",
            match limits.memory {
                Some(hertz) => Probe::Yes(format!("capped at {:.0} MHz", mhz(hertz))),
                None => Probe::No("no cap that may be read".into()),
            },
        ));
        lines.push((
            "power mode",
            self.mode.read(files).map_or_else(|| missing("no state of nvpmodel"), Probe::Yes),
        ));
        lines
            .push(("fan", if self.fan.found() { Probe::Yes("pwmfan".into()) } else { missing("no pwmfan") }));
        let supplies: Vec<&str> = self.supplies.iter().map(|supply| supply.name.as_str()).collect();
        lines.push((
            "power supply",
            match supplies.as_slice() {
                [] => Probe::No("nothing reports it; external power is taken for granted".into()),
                names => Probe::Yes(names.join(", ")),
            },
        ));
        let mut system = Readings::default();
        machine::system(files, &mut system);
        let there = |there: bool, path: &str| {
            if there { Probe::Yes(path.into()) } else { Probe::No(format!("{path} cannot be read")) }
        };
        lines.push(("available memory", there(system.available_memory.is_some(), "/proc/meminfo")));
        lines.push(("memory pressure", there(system.memory_pressure.is_some(), "/proc/pressure/memory")));
        lines.push(("load", there(system.load.is_some(), "/proc/loadavg")));
        lines
    }

    fn probe_board(&self) -> Probe {
        let said = self.identity.describe();
        match (&self.unknown_board, said) {
            (Some(name), _) => {
                let names: Vec<&str> = board::BOARDS.iter().map(|board| board.name).collect();
                Probe::No(format!(
                    "no board is named {name:?} (there are {}); taken for {}",
                    names.join(", "),
                    self.board.name
                ))
            }
            (None, Ok(said)) => Probe::Yes(format!("{}: {said}", self.board.name)),
            (None, Err(_)) => Probe::Yes(format!("{}: no device tree", self.board.name)),
        }
    }

    fn probe_zones(&self) -> Probe {
        let stand_in = if self.zones.junction_is_disabled() {
            format!("; the junction is disabled, {STAND_IN} stands in for it")
        } else {
            String::new()
        };
        match self.zones.found() {
            (0, missing) if missing.is_empty() => Probe::No("no thermal zones".into()),
            (n, missing) if missing.is_empty() => Probe::Yes(format!("{n} zones{stand_in}")),
            (n, missing) => Probe::No(format!("{n} zones, {} missing", missing.join(", "))),
        }
    }

    fn probe_rails(&self) -> Probe {
        match self.rails.found() {
            (there, missing) if there.is_empty() && missing.is_empty() && self.rails.denied() => {
                Probe::No("energy counters that only root may read".into())
            }
            (there, missing) if there.is_empty() && missing.is_empty() => Probe::No("no meters".into()),
            (there, missing) if missing.is_empty() => Probe::Yes(format!("{} (* counted)", there.join(", "))),
            (_, missing) => Probe::No(format!("{} missing", missing.join(", "))),
        }
    }

    fn scan(&mut self) {
        let (files, board, now) = (&*self.files, self.board, self.clock.monotonic());
        let groups: [&mut dyn Scan; 7] = [
            &mut self.zones,
            &mut self.rails,
            &mut self.gpu,
            &mut self.alarms,
            &mut self.throttles,
            &mut self.fan,
            &mut self.mode,
        ];
        for group in groups {
            group.scan(files, board, now);
        }
        self.supplies = machine::supplies(files);
        self.rescan = now + RESCAN;
    }
}

/// Measures the parts of a round.
struct Stopwatch<'a> {
    clock: &'a dyn Clock,
    since: Duration,
}

impl<'a> Stopwatch<'a> {
    fn start(clock: &'a dyn Clock) -> Stopwatch<'a> {
        Stopwatch { clock, since: clock.monotonic() }
    }

    fn lap(&mut self) -> Duration {
        let now = self.clock.monotonic();
        now.saturating_sub(std::mem::replace(&mut self.since, now))
    }
}

/// A reading of what was read now, given since when it is lost.
fn settle<T>(read: Result<T, Fault>, now: Duration, lost: &mut Option<Duration>) -> Reading<T> {
    match read {
        Ok(value) => {
            *lost = None;
            Reading::Value { value, at: now }
        }
        Err(Fault::Offline) => {
            *lost = None;
            Reading::Offline
        }
        Err(_) => Reading::Lost { since: *lost.get_or_insert(now) },
    }
}

/// Hardware monitors with their name: `(sys/class/hwmon/hwmon3, ina3221)`.
fn monitors(files: &dyn Files) -> Vec<(String, String)> {
    const MONITORS: &str = "sys/class/hwmon";
    let directories = files.list(MONITORS).into_iter().map(|entry| format!("{MONITORS}/{entry}"));
    directories
        .filter_map(|directory| files.name(&format!("{directory}/name")).ok().map(|name| (directory, name)))
        .collect()
}
