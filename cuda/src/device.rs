//! A device: its properties, read at start and never assumed, and the launcher behind it.

use crate::error::Error;
use crate::launcher::{Address, Launch, Launcher, Mark};
use crate::tuned::Tuned;
use std::sync::Arc;

/// What a device says of itself. An Orin in its shipped 30 W mode has 8 SMs, not 16, at half the clock: nothing here is
/// a constant of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// The maker's name for it.
    pub name: String,
    /// Compute capability, 10 · major + minor.
    pub sm: u32,
    /// Streaming multiprocessors that are switched on.
    pub multiprocessors: u32,
    /// Highest clock, in kHz.
    pub clock_khz: u32,
    /// Shared memory that a block may ask for, in bytes.
    pub shared_per_block: u32,
    /// Shared memory of an SM, in bytes.
    pub shared_per_multiprocessor: u32,
    /// Second-level cache, in bytes.
    pub l2: u32,
    /// Whether device memory is the memory of the system.
    pub integrated: bool,
    /// Device memory, in bytes.
    pub memory: u64,
    /// Version of the driver's API, 1000 · major + 10 · minor; 0 for the stand-in.
    pub driver: u32,
}

/// A device that operations run on. A copy is the same device.
#[derive(Clone)]
pub struct Device {
    launcher: Arc<dyn Launcher>,
    tuned: Arc<Tuned>,
}

impl Device {
    /// The device behind a launcher.
    pub fn new(launcher: Arc<dyn Launcher>) -> Device {
        Device { launcher, tuned: Arc::default() }
    }

    /// The same device with tables of tiles that were measured on it. They change no result.
    pub fn with_tiles(self, tuned: Tuned) -> Device {
        Device { tuned: Arc::new(tuned), ..self }
    }

    /// The measured tables.
    pub(crate) fn tuned(&self) -> &Tuned {
        &self.tuned
    }

    /// What it is.
    pub fn properties(&self) -> &Properties {
        self.launcher.properties()
    }

    /// Waits for everything launched so far.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.launcher.synchronize()
    }

    /// Marks a place in the order of calls.
    pub fn mark(&self) -> Result<Mark, Error> {
        self.launcher.mark()
    }

    /// Waits for the later mark; the seconds between both.
    pub fn elapsed(&self, from: Mark, to: Mark) -> Result<f64, Error> {
        self.launcher.elapsed(from, to)
    }

    /// Whether it is the stand-in, whose times are no speeds of anything.
    pub fn is_stand_in(&self) -> bool {
        self.properties().driver == 0
    }

    /// Memory that can still be taken, in bytes.
    pub fn free_memory(&self) -> Result<u64, Error> {
        self.launcher.free_memory()
    }

    pub(crate) fn launcher(&self) -> &dyn Launcher {
        &*self.launcher
    }

    /// The one place where a checked operation becomes a launch.
    pub(crate) fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        // SAFETY: launches are made by `ops` alone, from buffers of this crate, which are allocated for as long as they
        // live, after the operation has checked every length against its shape.
        unsafe { self.launcher.launch(launch) }
    }

    pub(crate) fn allocate(&self, bytes: u64) -> Result<Allocation, Error> {
        let address = self.launcher.allocate(bytes)?;
        Ok(Allocation { device: self.clone(), address, bytes })
    }
}

/// A piece of device memory; goes back when dropped.
pub(crate) struct Allocation {
    device: Device,
    pub(crate) address: Address,
    pub(crate) bytes: u64,
}

impl Allocation {
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated by this launcher, freed once; buffers keep their allocation alive.
        unsafe { self.device.launcher.free(self.address) }
    }
}
