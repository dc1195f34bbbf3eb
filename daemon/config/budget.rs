//! What training may take: `[budget]`, `[window]`, `[conditions]` and `[board]` of the daemon's configuration.

use crate::units::{Bytes, Celsius, Joules, Watts};
use std::time::Duration;

/// `[budget]`: heat, power, energy, memory. The defaults keep an AGX Orin below every trip of its kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Budget {
    /// Junction temperature that is held (soft).
    pub temperature: Celsius,
    /// Above it nothing computes (hard).
    pub temperature_stop: Celsius,
    /// Below it computing goes on after a stop.
    pub temperature_resume: Celsius,
    /// Power of the counted rails that is held; absent holds none.
    pub power: Option<Watts>,
    /// Energy of one night (noon to noon, local time), above idle or gross as `energy_gross` says.
    pub energy_per_night: Option<Joules>,
    /// Energy of one run.
    pub energy_per_run: Option<Joules>,
    /// Count gross energy, not that above idle.
    pub energy_gross: bool,
    /// Memory that is left to everybody else.
    pub memory_floor: Bytes,
    /// Lowest share of the time that is worth computing; below it the run pauses instead.
    pub duty_floor: f64,
    /// Ceiling of the fan's duty, 0 to 1. No key: the daemon sets it to `[window] quiet_fan` while quiet hours last.
    pub fan: Option<f64>,
}

/// `[window]`: when.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// `"22:00-06:00"`, `"sat,sun 00:00-24:00"`, local time; empty is always.
    pub times: Vec<String>,
    /// Local times in which the fan may not be louder than `quiet_fan`.
    pub quiet: Vec<String>,
    /// Ceiling of the fan's duty in quiet hours, 0 to 1.
    pub quiet_fan: f64,
}

/// `[conditions]`: under which circumstances.
#[derive(Clone, Debug, PartialEq)]
pub struct Conditions {
    /// Only with external power.
    pub external_power: bool,
    /// Smallest charge of a battery, 0 to 1, whatever the supply.
    pub minimum_battery: f64,
    /// Largest GPU load of others, 0 to 1, averaged over a minute; 1 does not care.
    pub maximum_gpu_load: f64,
    /// Largest load average of others per core; absent does not care.
    pub maximum_load: Option<f64>,
}

/// The names of `[board] name`: one for each table of `governor::sensors::board`, where a test compares them.
pub const BOARDS: &[&str] =
    &["agx-orin-64gb", "agx-orin-32gb", "agx-orin-industrial", "orin-nx", "orin-nano", "generic"];

/// `[board]`: what the machine is, where the probe is wrong.
#[derive(Clone, Debug, PartialEq)]
pub struct Board {
    /// Name of a board table; absent probes.
    pub name: Option<String>,
    /// Labels of the rails that are counted; absent takes the board's.
    pub rails: Option<Vec<String>>,
    /// Multiplies the sum of the rails.
    pub power_factor: f64,
    /// Added to it.
    pub power_offset: Watts,
    /// Time between two rounds of reading.
    pub interval: Duration,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            temperature: Celsius(85.0),
            temperature_stop: Celsius(95.0),
            temperature_resume: Celsius(75.0),
            power: None,
            energy_per_night: None,
            energy_per_run: None,
            energy_gross: true,
            memory_floor: Bytes(1 << 30),
            duty_floor: 0.05,
            fan: None,
        }
    }
}

impl Budget {
    /// No configuration lets the chip compute above this. The kernel of an AGX Orin throttles from 99 °C (passive trips
    /// of cpu, gpu, cv and soc in the device tree of p3701) and its firmware from 101 °C; a stop needs a few degrees
    /// before it works. Where the trips of a machine are lower, `governor::control` lowers the stop further.
    pub const STOP_LIMIT: Celsius = Celsius(95.0);
}

impl Default for Window {
    fn default() -> Self {
        Self { times: Vec::new(), quiet: Vec::new(), quiet_fan: 0.3 }
    }
}

impl Default for Conditions {
    fn default() -> Self {
        Self { external_power: false, minimum_battery: 0.3, maximum_gpu_load: 1.0, maximum_load: None }
    }
}

impl Default for Board {
    fn default() -> Self {
        Self {
            name: None,
            rails: None,
            power_factor: 1.0,
            power_offset: Watts(0.0),
            interval: Duration::from_millis(500),
        }
    }
}
