//! The record of speed of foreground runs, in the cache directory.

use super::arguments;
use super::exit::Failure;
use crate::clock::{Clock, SystemClock};
use crate::config::budget::Board;
use crate::governor::sensors::Sensors;
use crate::plan::Measured;
use crate::plan::history::{self, NAME};
use crate::plan::roofline::Device;
use crate::plan::throughput::{Machine, Origin, Record, Setup};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

/// This machine, as far as its files tell.
pub fn machine() -> Machine {
    let mut sensors = Sensors::open(Path::new("/"), &Board::default(), Arc::new(SystemClock::new()));
    let mode = sensors.read().mode;
    Machine { board: Some(sensors.board().name.to_string()), mode }
}

/// What the roofline knows of the GPU that a run computes on; `None` of a run on the CPU. Multiprocessors and clock are
/// those that the driver reports now, else those of the board's power mode.
pub fn device(setup: &Setup, machine: &Machine) -> Option<Device> {
    if !setup.backend.starts_with("cuda") {
        return None;
    }
    let Ok(gpu) = finetuned_cuda::driver::properties(0) else { return Device::of_machine(setup, machine) };
    let bandwidth = if gpu.integrated {
        // What the driver says of this memory's clock is not to be relied upon; the board is known, or nothing is.
        let sensors = Sensors::open(Path::new("/"), &Board::default(), Arc::new(SystemClock::new()));
        if !sensors.board().name.starts_with("agx-orin") {
            return None;
        }
        let cap = sensors.limits().memory.map_or(ORIN_MEMORY, |clock| clock as f64);
        Device::orin_bandwidth(cap.min(ORIN_MEMORY))
    } else {
        finetuned_cuda::driver::memory_bandwidth(0).ok()? as f64
    };
    let clock = 1e3 * f64::from(gpu.clock_khz);
    Device::of_gpu(&gpu.name, gpu.sm, gpu.multiprocessors, clock, bandwidth)
}

/// Highest clock of an AGX Orin's memory, in Hz: that of a power mode that does not cap it.
const ORIN_MEMORY: f64 = 3.2e9;

/// The file.
pub fn path() -> Result<PathBuf, Failure> {
    Ok(arguments::cache_dir()?.join(NAME))
}

/// What is on record. A record that cannot be read is worth a warning and no more.
pub fn known() -> Result<Vec<Record>, Failure> {
    let path = path()?;
    let (records, damaged) = history::read(&path).unwrap_or_else(|error| {
        tracing::warn!("{error}");
        (Vec::new(), 0)
    });
    if damaged > 0 {
        tracing::warn!("{damaged} lines of {} cannot be read and are left out", path.display());
    }
    Ok(records)
}

/// A record of now.
pub fn record(measured: Measured, origin: Origin, machine: Machine) -> Record {
    let since = SystemClock::new().wall().duration_since(UNIX_EPOCH).unwrap_or_default();
    Record {
        time_us: since.as_micros() as u64,
        origin,
        run: None,
        machine,
        duty: None,
        budget: None,
        energy: None,
        measured,
    }
}

/// Puts a record down, if the disk takes it.
pub fn remember(record: &Record) {
    let Ok(path) = path() else { return };
    let made = path.parent().map_or(Ok(()), std::fs::create_dir_all);
    let written = made.map_err(anyhow::Error::from);
    let written = written.and_then(|()| history::append(&path, record).map_err(anyhow::Error::from));
    if let Err(error) = written {
        tracing::warn!("the speed of this run is not on record: {error:#}");
    }
}
