//! What the sensors said: values with their unit and their age, whatever the board.

use crate::units::{Bytes, Celsius, Watts};
use std::time::Duration;

/// A value, or why there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reading<T> {
    /// Read at this moment (`Clock::monotonic`).
    Value {
        /// What was read.
        value: T,
        /// When.
        at: Duration,
    },
    /// The part is switched off (EAGAIN of a gated block): no error, and no temperature.
    Offline,
    /// It should be there and cannot be read, or said nonsense, since this moment.
    Lost {
        /// Since when.
        since: Duration,
    },
}

/// What a temperature is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ZoneRole {
    /// The hottest point of the chip (`tj`), or the best stand-in: what the budget's set-point is about.
    Junction,
    /// A part of the chip: CPU, GPU, SoC.
    Die,
    /// The board or its surroundings.
    Board,
}

impl ZoneRole {
    /// The stable word, in traces and JSON.
    pub fn word(self) -> &'static str {
        match self {
            ZoneRole::Junction => "junction",
            ZoneRole::Die => "die",
            ZoneRole::Board => "board",
        }
    }
}

/// A thermal zone.
#[derive(Clone, Debug, PartialEq)]
pub struct Zone {
    /// Type as the kernel names it, in lower case: `tj-thermal`.
    pub name: String,
    /// What it is of.
    pub role: ZoneRole,
    /// Temperature.
    pub temperature: Reading<Celsius>,
    /// Where the kernel starts to throttle (lowest passive trip), read at start.
    pub passive_trip: Option<Celsius>,
    /// Where the machine switches itself off (lowest critical trip), read at start.
    pub critical_trip: Option<Celsius>,
    /// The board's table says that it must be there.
    pub required: bool,
}

/// A power rail, or another meter of power.
#[derive(Clone, Debug, PartialEq)]
pub struct Rail {
    /// Label: `VDD_GPU_SOC`, `package-0`.
    pub name: String,
    /// Power.
    pub power: Reading<Watts>,
    /// Whether the sum that the budget is about takes it in.
    pub counted: bool,
}

/// Counters of the supply's alarms, per second, over the time since the reading before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct OverCurrent {
    /// Under-voltage events (Orin: OC1).
    pub under_voltage: f64,
    /// Average over-current events (OC2).
    pub average: f64,
    /// Instantaneous over-current events (OC3): thousands an hour may be harmless.
    pub instantaneous: f64,
}

/// Everything that was read in one round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Readings {
    /// When the round ended (`Clock::monotonic`).
    pub at: Duration,
    /// Thermal zones. Empty on a machine that has none: the governor is then blind to heat, and says so.
    pub zones: Vec<Zone>,
    /// Rails. Empty on a machine without meters.
    pub rails: Vec<Rail>,
    /// Factor and offset turn the sum of the counted rails into the power that the budget is about.
    pub power: Option<Reading<Watts>>,
    /// GPU load of everybody, 0 to 1.
    pub gpu_load: Option<f64>,
    /// GPU clock and its present limit, in hertz.
    pub gpu_clock: Option<(u64, u64)>,
    /// A cooling device throttles CPU or GPU now.
    pub throttled: bool,
    /// Alarm rates; absent where there are no counters.
    pub over_current: Option<OverCurrent>,
    /// Fan duty, 0 to 1.
    pub fan: Option<f64>,
    /// Whether external power is there; absent on a machine that cannot tell (it then counts as there).
    pub external_power: Option<bool>,
    /// Charge of the battery, 0 to 1.
    pub battery: Option<f64>,
    /// Memory that can be had without swapping.
    pub available_memory: Option<Bytes>,
    /// Share of the last ten seconds in which some task waited for memory (PSI `some avg10`), 0 to 1.
    pub memory_pressure: Option<f64>,
    /// Load average over one minute, divided by the number of cores.
    pub load: Option<f64>,
    /// Power mode, in words: `MODE_30W`.
    pub mode: Option<String>,
}
