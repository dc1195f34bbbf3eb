//! What is neither heat, nor a rail, nor the GPU: alarms of the supply, throttling, fan, supply, memory, load, power mode.

use super::board::BoardTable;
use super::files::{ATTRIBUTE, CONFIGURATION, Fault, Files};
use super::{Scan, monitors};
use crate::governor::readings::{OverCurrent, Readings};
use crate::units::Bytes;
use std::time::Duration;

const SUPPLIES: &str = "sys/class/power_supply";
const THERMAL: &str = "sys/class/thermal";

/// Counters of over-current events since the boot, in the order of [`OverCurrent`]: hwmon `soctherm_oc`,
/// `oc<N>_event_cnt`. What OC1 to OC3 are is that of Orin.
#[derive(Debug, Default)]
pub struct Alarms {
    directory: Option<String>,
    before: [Option<u64>; 3],
    at: Duration,
    last: Option<OverCurrent>,
    faulty: bool,
}

impl Scan for Alarms {
    fn scan(&mut self, files: &dyn Files, _board: &BoardTable, now: Duration) {
        let found = monitors(files).into_iter().find(|(_, name)| name == "soctherm_oc");
        let directory = found.map(|(directory, _)| directory);
        if let Some(directory) = directory
            && self.directory.as_ref() != Some(&directory)
        {
            self.before = [1, 2, 3].map(|n| events(files, &directory, n).ok());
            self.at = now;
            self.directory = Some(directory);
        }
    }
}

impl Alarms {
    /// Rates since the round before.
    pub fn read(&mut self, files: &dyn Files, now: Duration) -> Option<OverCurrent> {
        let directory = self.directory.as_ref()?;
        let time = now.saturating_sub(self.at).as_secs_f64();
        if time < 1e-3 {
            return self.last;
        }
        let events = [1, 2, 3].map(|n| events(files, directory, n));
        self.faulty = events.iter().all(Result::is_err);
        if self.faulty {
            self.last = None;
            return None;
        }
        let mut rates = [0.0; 3];
        for ((rate, before), now) in rates.iter_mut().zip(&mut self.before).zip(events) {
            let now = now.ok();
            // A counter that went back was reset with its driver: no event can be told from that.
            if let (Some(before), Some(now)) = (*before, now) {
                *rate = now.saturating_sub(before) as f64 / time;
            }
            *before = now.or(*before);
        }
        self.at = now;
        let [under_voltage, average, instantaneous] = rates;
        self.last = Some(OverCurrent { under_voltage, average, instantaneous });
        self.last
    }

    /// Whether the counters were there and are no longer.
    pub fn faulty(&self) -> bool {
        self.faulty
    }

    /// Whether there are counters.
    pub fn found(&self) -> bool {
        self.directory.is_some()
    }
}

fn events(files: &dyn Files, directory: &str, n: u32) -> Result<u64, Fault> {
    files.integer_in(&format!("{directory}/oc{n}_event_cnt"), 0..=i64::MAX).map(|events| events as u64)
}

/// Cooling devices that slow CPU or GPU down when their state is not 0.
#[derive(Debug, Default)]
pub struct Throttles {
    states: Vec<String>,
}

impl Scan for Throttles {
    fn scan(&mut self, files: &dyn Files, _board: &BoardTable, _now: Duration) {
        let devices = files.list(THERMAL).into_iter().filter(|entry| entry.starts_with("cooling_device"));
        self.states = devices
            .map(|entry| format!("{THERMAL}/{entry}"))
            .filter(|device| files.name(&format!("{device}/type")).is_ok_and(|kind| throttles(&kind)))
            .map(|device| format!("{device}/cur_state"))
            .collect();
    }
}

/// `cpu-throttle-alert`, `cpufreq-cpu0`, `devfreq-17000000.gpu`; not the fan, and not `hot-surface-alert`.
fn throttles(kind: &str) -> bool {
    let kind = kind.to_ascii_lowercase();
    kind.ends_with("-throttle-alert") || kind.contains("cpufreq-") || kind.contains("devfreq-")
}

impl Throttles {
    /// Whether one of them works now.
    pub fn read(&self, files: &dyn Files) -> bool {
        self.states.iter().any(|state| files.integer(state).is_ok_and(|state| state > 0))
    }

    /// How many there are.
    pub fn found(&self) -> usize {
        self.states.len()
    }
}

/// The duty of the fan: hwmon `pwmfan`.
#[derive(Debug, Default)]
pub struct Fan {
    duty: Option<String>,
    faulty: bool,
}

impl Scan for Fan {
    fn scan(&mut self, files: &dyn Files, _board: &BoardTable, _now: Duration) {
        if let Some((directory, _)) = monitors(files).into_iter().find(|(_, name)| name == "pwmfan") {
            self.duty = Some(format!("{directory}/pwm1"));
        }
    }
}

impl Fan {
    /// Duty, 0 to 1.
    pub fn read(&mut self, files: &dyn Files) -> Option<f64> {
        let read = files.integer_in(self.duty.as_ref()?, 0..=255);
        self.faulty = read.is_err();
        Some(read.ok()? as f64 / 255.0)
    }

    /// Whether the fan was there and is no longer.
    pub fn faulty(&self) -> bool {
        self.faulty
    }

    /// Whether there is one.
    pub fn found(&self) -> bool {
        self.duty.is_some()
    }
}

/// An entry of `power_supply`.
#[derive(Debug)]
pub struct Supply {
    /// Its directory.
    pub directory: String,
    /// Its name: `BAT0`.
    pub name: String,
    /// A battery of the machine; else a source from outside.
    pub battery: bool,
    /// A mains adapter: it is either this or a battery that feeds the machine.
    mains: bool,
}

/// What feeds the machine. Batteries of mice and the like are left out.
pub fn supplies(files: &dyn Files) -> Vec<Supply> {
    let mut found = Vec::new();
    for name in files.list(SUPPLIES) {
        let directory = format!("{SUPPLIES}/{name}");
        let Ok(kind) = files.name(&format!("{directory}/type")) else { continue };
        let of_a_device = files.name(&format!("{directory}/scope")).is_ok_and(|scope| scope == "Device");
        let (battery, mains) = (kind == "Battery", kind == "Mains");
        if !of_a_device && (battery || mains || kind.starts_with("USB")) {
            found.push(Supply { directory, name, battery, mains });
        }
    }
    found
}

/// External power, and the charge of the battery that has least.
///
/// A Jetson with a barrel jack has USB supplies that are all off line while it runs on the jack, which nothing reports.
/// So only a mains adapter that is off, or USB that is off beside a battery, mean that there is no external power; and a
/// battery that discharges, where nothing else speaks.
pub fn supply(files: &dyn Files, supplies: &[Supply]) -> (Option<bool>, Option<f64>) {
    let battery = supplies.iter().any(|supply| supply.battery);
    let mut external = None;
    for supply in supplies.iter().filter(|supply| !supply.battery) {
        // 1 is on line; 2 too, with a programmable voltage.
        match files.integer_in(&format!("{}/online", supply.directory), 0..=2) {
            Ok(0) if supply.mains || battery => external = external.or(Some(false)),
            Ok(0) | Err(_) => {}
            Ok(_) => external = Some(true),
        }
    }
    let batteries = || supplies.iter().filter(|supply| supply.battery);
    let discharges = |supply: &Supply| {
        files.name(&format!("{}/status", supply.directory)).is_ok_and(|status| status == "Discharging")
    };
    let external = external.or_else(|| batteries().any(discharges).then_some(false));
    let charge = batteries()
        .filter_map(|supply| files.integer_in(&format!("{}/capacity", supply.directory), 0..=100).ok())
        .min();
    (external, charge.map(|charge| charge as f64 / 100.0))
}

/// Memory and load, into the readings.
pub fn system(files: &dyn Files, readings: &mut Readings) {
    readings.available_memory = available_memory(files);
    readings.memory_pressure = pressure(files);
    readings.load = load(files);
}

/// `MemAvailable` of `/proc/meminfo`, which is in KiB.
fn available_memory(files: &dyn Files) -> Option<Bytes> {
    let text = files.text("proc/meminfo", ATTRIBUTE).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024).map(Bytes)
}

/// `avg10` of `some` of `/proc/pressure/memory`, which is in per cent.
fn pressure(files: &dyn Files) -> Option<f64> {
    let text = files.text("proc/pressure/memory", ATTRIBUTE).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let average = line.split_ascii_whitespace().find_map(|field| field.strip_prefix("avg10="))?;
    let percent: f64 = average.parse().ok()?;
    (0.0..=100.0).contains(&percent).then_some(percent / 100.0)
}

/// Load over a minute, per core that is on line.
fn load(files: &dyn Files) -> Option<f64> {
    let text = files.text("proc/loadavg", ATTRIBUTE).ok()?;
    let load: f64 = text.split_ascii_whitespace().next()?.parse().ok()?;
    let cores = cores(&files.text("sys/devices/system/cpu/online", ATTRIBUTE).ok()?)?;
    (0.0..1e6).contains(&load).then_some(load / f64::from(cores))
}

/// How many numbers a list such as `0-3,8` has.
fn cores(list: &str) -> Option<u32> {
    let mut cores = 0u32;
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        cores += u32::from(last.checked_sub(first)?) + 1;
    }
    Some(cores).filter(|&cores| cores > 0)
}

/// The power mode of a Jetson.
///
/// The tool itself is never started: from a service's mount namespace it refuses, and changes its status file all the
/// same.
#[derive(Debug, Default)]
pub struct Mode {
    /// Number and name of every mode, from `/etc/nvpmodel.conf`.
    names: Vec<(u32, String)>,
}

impl Scan for Mode {
    fn scan(&mut self, files: &dyn Files, _board: &BoardTable, _now: Duration) {
        self.names = power_models(&files.text("etc/nvpmodel.conf", CONFIGURATION).unwrap_or_default());
    }
}

impl Mode {
    /// Name of the mode in force: `MODE_30W`; `mode 2` when the number has no name.
    pub fn read(&self, files: &dyn Files) -> Option<String> {
        let status = files.name("var/lib/nvpmodel/status").ok()?;
        let number: u32 = status.strip_prefix("pmode:")?.trim().parse().ok()?;
        let named = self.names.iter().find(|(id, _)| *id == number).map(|(_, name)| name.clone());
        Some(named.unwrap_or_else(|| format!("mode {number}")))
    }
}

/// The modes of an `nvpmodel.conf`: lines `< POWER_MODEL ID=2 NAME=MODE_30W >`.
fn power_models(text: &str) -> Vec<(u32, String)> {
    let mut models = Vec::new();
    for line in text.lines() {
        let Some(fields) = line.trim().strip_prefix('<').and_then(|rest| rest.trim_end().strip_suffix('>'))
        else {
            continue;
        };
        let mut fields = fields.split_ascii_whitespace();
        if fields.next() != Some("POWER_MODEL") {
            continue;
        }
        let (mut id, mut name) = (None, None);
        for field in fields {
            match field.split_once('=') {
                Some(("ID", value)) => id = value.parse().ok(),
                Some(("NAME", value)) if value.bytes().all(|byte| byte.is_ascii_graphic()) => {
                    name = Some(value)
                }
                _ => {}
            }
        }
        if let (Some(id), Some(name)) = (id, name) {
            models.push((id, name.chars().take(64).collect()));
        }
    }
    models
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_found_in_their_file() {
        let text = "# < POWER_MODEL ID=9 NAME=COMMENT >\n\
            < PARAM TYPE=FILE NAME=CPU_ONLINE >\n\
            < POWER_MODEL ID=0 NAME=MAXN >\n CPU_ONLINE CORE_0 1\n\
            <POWER_MODEL ID=2 NAME=MODE_30W>\n\
            < POWER_MODEL NAME=NONE >\n< POWER_MODEL ID=x NAME=Y >\n\
            < PM_CONFIG DEFAULT=2 >\n";
        assert_eq!(power_models(text), [(0, "MAXN".into()), (2, "MODE_30W".into())]);
    }

    #[test]
    fn cores_are_counted() {
        assert_eq!(cores("0-3,8"), Some(5));
        assert_eq!(cores("0"), Some(1));
        for bad in ["", "3-0", "a", "0-99999999", "-1", "1-"] {
            assert_eq!(cores(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn only_what_slows_down_throttles() {
        for kind in ["cpu-throttle-alert", "devfreq-17000000.gpu", "cpufreq-cpu4", "thermal-cpufreq-0"] {
            assert!(throttles(kind), "{kind}");
        }
        for kind in ["pwm-fan", "hot-surface-alert", "Processor", ""] {
            assert!(!throttles(kind), "{kind}");
        }
    }
}
