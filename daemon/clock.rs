//! The only source of time. Everything that measures or waits takes a [`Clock`], so that tests can move it.

pub mod moment;
pub mod simulated;

use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, SystemTime};

/// Monotonic time for measuring, wall-clock time for records, and waiting.
pub trait Clock: Send + Sync {
    /// Monotonic time since an arbitrary start that all processes of the machine share (`CLOCK_MONOTONIC`, which
    /// stands still while the machine is suspended).
    fn monotonic(&self) -> Duration;
    /// Wall-clock time, for records only: it may jump.
    fn wall(&self) -> SystemTime;
    /// How long the machine has been suspended since it was started; absent where the clock cannot tell. What it grows by
    /// while `wall` runs ahead of `monotonic` is sleep, the rest is a clock that was set.
    fn suspended(&self) -> Option<Duration> {
        None
    }
    /// Blocks the calling thread.
    fn sleep(&self, duration: Duration);
    /// What a person must know about this time; absent when it is the machine's.
    fn notice(&self) -> Option<&str> {
        None
    }
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl SystemClock {
    /// The machine's clock.
    pub fn new() -> Self {
        Self
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        let now = clock_gettime(ClockId::Monotonic);
        Duration::new(now.tv_sec.max(0) as u64, now.tv_nsec as u32)
    }
    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
    fn suspended(&self) -> Option<Duration> {
        let boot = clock_gettime(ClockId::Boottime);
        let boot = Duration::new(boot.tv_sec.max(0) as u64, boot.tv_nsec as u32);
        Some(boot.saturating_sub(self.monotonic()))
    }
    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}
