//! The GPU's clock and load, what is gated of it, and the cap of the memory's clock. NVML knows none of these on Orin.

use super::Scan;
use super::board::BoardTable;
use super::files::{Fault, Files};
use std::time::Duration;

const DEVFREQ: &str = "sys/class/devfreq";

/// Names of GPUs in the device tree, beside those that contain `gpu`.
const NAMES: &[&str] = &["ga10b", "gv11b", "gp10b", "gb10b"];

/// Where the load is on older releases that do not have it below the device.
const LOADS: &[&str] = &["sys/devices/platform/gpu.0/load", "sys/devices/gpu.0/load"];

/// The cap of the memory's clock in hertz: JetPack 6 and later, JetPack 5.
const MEMORY_CAPS: &[&str] = &["sys/kernel/nvpmodel_clk_cap/emc", "sys/kernel/nvpmodel_emc_cap/emc_iso_cap"];

/// Clocks that can be meant, in hertz.
const CLOCKS: std::ops::RangeInclusive<i64> = 0..=10_000_000_000;

/// The GPU of a machine.
#[derive(Debug, Default)]
pub struct Gpu {
    /// Directory of the devfreq device, its name, and the file of its load.
    place: Option<(String, String, Option<String>)>,
    lost: bool,
}

/// Limits that a power mode or `jetson_clocks` sets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Lowest clock of the GPU, in hertz. Equal to the highest: somebody pinned it (`jetson_clocks`).
    pub gpu_minimum: Option<u64>,
    /// Highest clock of the GPU, in hertz.
    pub gpu_maximum: Option<u64>,
    /// Gated TPCs, a bit each.
    pub gated: Option<u64>,
    /// Cap of the memory's clock, in hertz.
    pub memory: Option<u64>,
}

impl Scan for Gpu {
    fn scan(&mut self, files: &dyn Files, _board: &BoardTable, _now: Duration) {
        let found = files.list(DEVFREQ).into_iter().find(|entry| {
            let node = files.name(&format!("{DEVFREQ}/{entry}/device/of_node/name"));
            // Without a device tree's node: the entry's own name, `17000000.gpu`.
            let name = node.unwrap_or_else(|_| entry.clone()).to_ascii_lowercase();
            name.contains("gpu") || NAMES.iter().any(|gpu| name == *gpu || name.ends_with(&format!(".{gpu}")))
        });
        if let Some(entry) = found {
            let directory = format!("{DEVFREQ}/{entry}");
            let loads = [format!("{directory}/device/load")].into_iter();
            let mut loads = loads.chain(LOADS.iter().map(|load| load.to_string()));
            let load = loads.find(|load| !matches!(files.integer(load), Err(Fault::Missing)));
            self.place = Some((directory, entry, load));
        }
    }
}

impl Gpu {
    /// Load of everybody (0 to 1), and clock with its limit in hertz.
    pub fn read(&mut self, files: &dyn Files) -> (Option<f64>, Option<(u64, u64)>) {
        let Some((directory, _, load)) = &self.place else { return (None, None) };
        let load = load.as_ref().and_then(|load| files.integer_in(load, 0..=1000).ok());
        let clock = clock(files, directory, "cur_freq");
        let limit = clock_or_fault(files, directory, "max_freq");
        self.lost = matches!(limit, Err(Fault::Missing | Fault::Failed(_)));
        (load.map(|load| load as f64 / 1000.0), clock.zip(limit.ok()))
    }

    /// Whether the GPU was there and is no longer.
    pub fn faulty(&self) -> bool {
        self.lost
    }

    /// Name of the devfreq device.
    pub fn name(&self) -> Option<&str> {
        self.place.as_ref().map(|(_, name, _)| name.as_str())
    }

    /// Limits, now.
    pub fn limits(&self, files: &dyn Files) -> Limits {
        let directory = self.place.as_ref().map(|(directory, ..)| directory.as_str());
        let frequency = |name| directory.and_then(|directory| clock(files, directory, name));
        Limits {
            gpu_minimum: frequency("min_freq"),
            gpu_maximum: frequency("max_freq"),
            gated: directory.and_then(|directory| mask(files, &format!("{directory}/device/tpc_pg_mask"))),
            memory: MEMORY_CAPS
                .iter()
                .find_map(|cap| files.integer_in(cap, 1..=*CLOCKS.end()).ok())
                .map(|hertz| hertz as u64),
        }
    }
}

fn clock(files: &dyn Files, directory: &str, name: &str) -> Option<u64> {
    clock_or_fault(files, directory, name).ok()
}

fn clock_or_fault(files: &dyn Files, directory: &str, name: &str) -> Result<u64, Fault> {
    files.integer_in(&format!("{directory}/{name}"), CLOCKS).map(|hertz| hertz as u64)
}

/// A mask in decimal or, with `0x` or a letter in it, hexadecimal digits.
fn mask(files: &dyn Files, path: &str) -> Option<u64> {
    let text = files.name(path).ok()?;
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok().or_else(|| u64::from_str_radix(&text, 16).ok()),
    }
}
