//! A time that a file gives, for simulations: a night passes in a minute, a suspend in a moment.
//!
//! ```text
//!   simulator ──replaces──► clock file ──read at every question──► SimulatedClock ──► governor, hours, records
//!       ▲                                                               │
//!       └────────────── <clock file>.waits ◄────written by sleep────────┘
//! ```
//!
//! The file is one JSON object, replaced whole (written beside its place and renamed):
//!
//! ```json
//! {"origin_us": 81726354, "monotonic_us": 3600000000, "wall_us": 1795618800000000, "rate": 60}
//! ```
//!
//! When the machine's `CLOCK_MONOTONIC` was at `origin_us`, the simulated one was at `monotonic_us` and the wall clock at
//! `wall_us` (since 1970); from then on both go `rate` times as fast. A rate of 0 stands still until the next file, so
//! that a simulator can go step by step. A suspend is a `wall_us` that has gone further than `monotonic_us`, as with
//! `CLOCK_MONOTONIC` of Linux; nothing here asks `CLOCK_BOOTTIME`.
//!
//! The monotonic time never goes back, whatever the file says: after an anchor in the past it stands until the file's
//! time has caught up.
//!
//! What a thread waits for in [`Clock::sleep`] is written to `<clock file>.waits`, as microseconds of the simulated
//! monotonic time, 20 digits and a newline. A simulator that goes step by step sees there that everything up to that
//! moment is done.

use super::{Clock, SystemClock};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// Fastest simulated time that is taken for meant.
const FASTEST: f64 = 1e6;

/// How often a sleeping thread looks at the file: that of a clock that stands is waited for by somebody.
const LOOK: Duration = Duration::from_micros(200);
/// How often at most it looks while the clock goes.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What a clock file says.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Anchor {
    /// `CLOCK_MONOTONIC` of the machine, in microseconds.
    pub origin_us: u64,
    /// Simulated monotonic time at that moment, in microseconds.
    pub monotonic_us: u64,
    /// Simulated wall-clock time at that moment, in microseconds since 1970.
    pub wall_us: u64,
    /// Simulated seconds that pass in a second.
    pub rate: f64,
}

/// Why a file is no clock.
#[derive(Debug, thiserror::Error)]
pub enum ClockFileError {
    /// It cannot be read.
    #[error("cannot read the simulated clock {path}: {source}", path = .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// It says nothing that a clock could.
    #[error(
        "{path} is no simulated clock: {why}; it must be {{\"origin_us\": …, \"monotonic_us\": …, \"wall_us\": …, \
         \"rate\": …}}",
        path = .path.display()
    )]
    Nonsense {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

impl Anchor {
    /// Reads a clock file.
    ///
    /// # Errors
    /// The file cannot be read, or is no clock.
    pub fn read(path: &Path) -> Result<Anchor, ClockFileError> {
        let text = std::fs::read(path)
            .map_err(|source| ClockFileError::Unreadable { path: path.to_path_buf(), source })?;
        let nonsense = |why: String| ClockFileError::Nonsense { path: path.to_path_buf(), why };
        let anchor: Anchor = serde_json::from_slice(&text).map_err(|error| nonsense(error.to_string()))?;
        if !(0.0..=FASTEST).contains(&anchor.rate) {
            return Err(nonsense(format!("rate is {}, not from 0 to {FASTEST}", anchor.rate)));
        }
        Ok(anchor)
    }

    /// Replaces a clock file whole.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let beside = beside(path, ".next");
        std::fs::write(&beside, serde_json::to_vec(self).map_err(std::io::Error::other)?)?;
        std::fs::rename(&beside, path)
    }

    /// Simulated monotonic time at a moment of the machine's.
    pub fn monotonic(&self, machine: Duration) -> Duration {
        let passed = machine.saturating_sub(Duration::from_micros(self.origin_us)).as_secs_f64() * self.rate;
        // A product beyond what a duration holds is as far as it goes.
        let passed = Duration::try_from_secs_f64(passed).unwrap_or(Duration::MAX);
        Duration::from_micros(self.monotonic_us).saturating_add(passed)
    }

    /// The wall-clock time that goes with a simulated monotonic one.
    fn wall(&self, monotonic: Duration) -> SystemTime {
        let at_zero = i128::from(self.wall_us) - i128::from(self.monotonic_us);
        let micros = at_zero + monotonic.as_micros() as i128;
        let since = Duration::from_micros(u64::try_from(micros.max(0)).unwrap_or(u64::MAX));
        SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// The time that a file gives.
#[derive(Debug)]
pub struct SimulatedClock {
    path: PathBuf,
    machine: SystemClock,
    known: Mutex<Known>,
    waits: Option<File>,
    /// The file could not be read the last time.
    lost: AtomicBool,
    notice: String,
}

/// The last of everything.
#[derive(Debug)]
struct Known {
    anchor: Anchor,
    monotonic: Duration,
}

impl SimulatedClock {
    /// The clock of this file.
    ///
    /// # Errors
    /// The file is no clock.
    pub fn open(path: &Path) -> Result<SimulatedClock, ClockFileError> {
        let anchor = Anchor::read(path)?;
        let waits = beside(path, ".waits");
        let opened = File::options().create(true).truncate(false).write(true).open(&waits);
        if let Err(error) = &opened {
            tracing::warn!("cannot open {}: {error}; nobody sees what is waited for", waits.display());
        }
        Ok(SimulatedClock {
            path: path.to_path_buf(),
            machine: SystemClock::new(),
            known: Mutex::new(Known { anchor, monotonic: Duration::ZERO }),
            waits: opened.ok(),
            lost: AtomicBool::new(false),
            notice: format!("the time is SIMULATED, it comes from {}: for no real machine", path.display()),
        })
    }

    /// The file's word, and the time by it. A file that cannot be read leaves the clock going as it went.
    fn now(&self) -> (Anchor, Duration) {
        let read = Anchor::read(&self.path);
        if let Err(error) = &read
            && !self.lost.load(Ordering::Relaxed)
        {
            tracing::warn!("{error}; the clock goes on as it went");
        }
        self.lost.store(read.is_err(), Ordering::Relaxed);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.anchor = read.unwrap_or(known.anchor);
        known.monotonic = known.monotonic.max(known.anchor.monotonic(self.machine.monotonic()));
        (known.anchor, known.monotonic)
    }

    fn tell(&self, until: Duration) {
        if let Some(file) = &self.waits {
            // Only a simulator reads it, which then sees that time does not get on.
            let _ = file.write_all_at(format!("{:020}\n", until.as_micros()).as_bytes(), 0);
        }
    }
}

impl Clock for SimulatedClock {
    fn monotonic(&self) -> Duration {
        self.now().1
    }

    fn wall(&self) -> SystemTime {
        let (anchor, monotonic) = self.now();
        anchor.wall(monotonic)
    }

    fn sleep(&self, duration: Duration) {
        let until = self.monotonic().saturating_add(duration);
        self.tell(until);
        loop {
            let (anchor, now) = self.now();
            if now >= until {
                return;
            }
            let wait = (until - now).as_secs_f64() / anchor.rate;
            let wait = if wait.is_finite() { Duration::try_from_secs_f64(wait).ok() } else { Some(LOOK) };
            self.machine.sleep(wait.unwrap_or(LOOK_AGAIN).clamp(LOOK, LOOK_AGAIN));
        }
    }

    fn notice(&self) -> Option<&str> {
        Some(&self.notice)
    }
}

/// What a thread waits for on the clock of this file; absent before the first wait.
pub fn waited_for(path: &Path) -> Option<Duration> {
    let text = std::fs::read_to_string(beside(path, ".waits")).ok()?;
    text.strip_suffix('\n')?.parse().ok().map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        directory: tempfile::TempDir,
    }

    impl Bench {
        fn new() -> Bench {
            Bench { directory: tempfile::tempdir().unwrap() }
        }

        fn path(&self) -> PathBuf {
            self.directory.path().join("clock")
        }

        fn anchor(&self, monotonic: u64, wall: u64, rate: f64) {
            let origin_us = SystemClock::new().monotonic().as_micros() as u64;
            let (monotonic_us, wall_us) = (monotonic * 1_000_000, wall * 1_000_000);
            Anchor { origin_us, monotonic_us, wall_us, rate }.write(&self.path()).unwrap();
        }

        fn open(&self) -> SimulatedClock {
            SimulatedClock::open(&self.path()).unwrap()
        }
    }

    fn wall(clock: &SimulatedClock) -> u64 {
        clock.wall().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
    }

    #[test]
    fn time_goes_at_its_rate() {
        let anchor =
            Anchor { origin_us: 5_000_000, monotonic_us: 100_000_000, wall_us: 7_000_000, rate: 60.0 };
        assert_eq!(anchor.monotonic(Duration::from_secs(5)), Duration::from_secs(100));
        assert_eq!(anchor.monotonic(Duration::from_secs(7)), Duration::from_secs(220));
        assert_eq!(anchor.monotonic(Duration::ZERO), Duration::from_secs(100), "not before it begins");
        let at = anchor.wall(Duration::from_secs(220));
        assert_eq!(at, SystemTime::UNIX_EPOCH + Duration::from_secs(127));
        assert!(Anchor { rate: 1e6, ..anchor }.monotonic(Duration::MAX) > Duration::from_secs(1 << 60));
        // A wall clock before 1970, or beyond all dates, is none that panics.
        let _ = Anchor { monotonic_us: u64::MAX, wall_us: 0, ..anchor }.wall(Duration::ZERO);
        let _ = Anchor { monotonic_us: 0, wall_us: u64::MAX, ..anchor }.wall(Duration::MAX);
    }

    #[test]
    fn a_clock_that_stands_goes_in_steps_and_sleepers_tell_what_they_wait_for() {
        let bench = Bench::new();
        bench.anchor(1000, 50_000, 0.0);
        let clock = bench.open();
        assert_eq!((clock.monotonic(), wall(&clock)), (Duration::from_secs(1000), 50_000));
        assert!(clock.notice().unwrap().contains("SIMULATED"));
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| {
                clock.sleep(Duration::from_secs(3));
                clock.monotonic()
            });
            while waited_for(&bench.path()) != Some(Duration::from_secs(1003)) {
                std::thread::yield_now();
            }
            bench.anchor(1002, 50_002, 0.0);
            std::thread::sleep(Duration::from_millis(20));
            assert!(!sleeper.is_finished(), "a second too early");
            bench.anchor(1007, 50_007, 0.0);
            assert_eq!(sleeper.join().unwrap(), Duration::from_secs(1007));
        });
        assert_eq!(wall(&clock), 50_007);
    }

    #[test]
    fn it_never_goes_back_and_a_suspend_moves_the_wall_clock_only() {
        let bench = Bench::new();
        bench.anchor(1000, 50_000, 500.0);
        let clock = bench.open();
        let mut before = clock.monotonic();
        // The simulator slows down, and anchors by a time that it read some moments ago.
        for (monotonic, rate) in [(900, 3.0), (1000, 0.0), (1001, 1000.0), (1000, 60.0), (1100, 0.0)] {
            bench.anchor(monotonic, 49_000 + monotonic, rate);
            for _ in 0..50 {
                let now = clock.monotonic();
                assert!(now >= before, "{now:?} after {before:?}");
                before = now;
            }
        }
        bench.anchor(5000, 54_000, 0.0);
        assert_eq!((clock.monotonic(), wall(&clock)), (Duration::from_secs(5000), 54_000));
        bench.anchor(5000, 57_600, 0.0);
        assert_eq!((clock.monotonic(), wall(&clock)), (Duration::from_secs(5000), 57_600), "an hour's sleep");
    }

    #[test]
    fn what_is_no_clock_is_refused_at_first_and_ignored_later() {
        let bench = Bench::new();
        let refused = || SimulatedClock::open(&bench.path()).unwrap_err().to_string();
        assert!(refused().starts_with("cannot read the simulated clock"), "{}", refused());
        for (content, why) in [
            ("", "EOF"),
            ("{}", "missing field"),
            (r#"{"origin_us":1,"monotonic_us":1,"wall_us":1,"rate":-1}"#, "rate is -1"),
            (r#"{"origin_us":1,"monotonic_us":1,"wall_us":1,"rate":1e300}"#, "not from 0 to"),
            (r#"{"origin_us":-1,"monotonic_us":1,"wall_us":1,"rate":1}"#, "invalid value"),
            (r#"{"origin_us":1,"monotonic_us":1,"wall_us":1,"rate":1,"x":2}"#, "unknown field"),
        ] {
            std::fs::write(bench.path(), content).unwrap();
            assert!(refused().contains(why) && refused().contains("is no simulated clock"), "{}", refused());
        }
        bench.anchor(10, 10, 0.0);
        let clock = bench.open();
        std::fs::write(bench.path(), "torn").unwrap();
        assert_eq!(clock.monotonic(), Duration::from_secs(10));
        std::fs::remove_file(bench.path()).unwrap();
        assert_eq!(clock.monotonic(), Duration::from_secs(10));
        bench.anchor(11, 11, 0.0);
        assert_eq!(clock.monotonic(), Duration::from_secs(11));
    }
}
