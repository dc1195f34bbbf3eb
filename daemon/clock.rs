//! The only source of time. Everything that measures or waits takes a [`Clock`], so that tests can move it.

use std::time::{Duration, Instant, SystemTime};

/// Monotonic time for measuring, wall-clock time for records, and waiting.
pub trait Clock: Send + Sync {
    /// Monotonic time since an arbitrary start.
    fn monotonic(&self) -> Duration;
    /// Wall-clock time, for records only: it may jump.
    fn wall(&self) -> SystemTime;
    /// Blocks the calling thread.
    fn sleep(&self, duration: Duration);
}

/// The machine's clock.
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock whose monotonic time starts now.
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
    fn wall(&self) -> SystemTime {
        SystemTime::now()
    }
    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}
