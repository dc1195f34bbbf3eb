//! The governor's thread: reads the sensors, decides, and tells the owner of the runs and the bus.
//!
//! ```text
//!   every [board] interval:  Sensors::read ──► control::step ──► Ruling ──► owner of the runs (hold, duty)
//!                                  │                └──────────► View ────► bus, status line
//!                                  ▼
//!                            milliseconds on a bus of the board: a thread of its own, never the daemon's
//! ```
//!
//! The owner takes silence for a hold ([`door`]).

use crate::clock::Clock;
use crate::config::daemon::DaemonConfig;
use crate::governor::control::{self, Decision, Level, State};
use crate::governor::door::{self, Door};
use crate::governor::readings::Readings;
use crate::governor::sensors::Sensors;
use crate::governor::{Ruling, View};
use crate::reason::Reason;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// A run that begins after the machine was idle for this long is begun cautiously: the temperatures of an idle machine
/// say nothing about what it does under load.
const IDLE: Duration = Duration::from_secs(30);

/// Smallest duty that a permit carries.
const SMALLEST_DUTY: f64 = 0.01;

/// The governor, as the rest of the service sees it.
pub struct Governing {
    /// For the owner of the runs.
    pub door: Door,
    /// For the bus and the status line.
    pub view: watch::Receiver<Arc<View>>,
    config: Arc<Mutex<DaemonConfig>>,
}

impl Governing {
    /// Reads the sensors below `root` once, decides, and starts the thread.
    pub fn start(config: &DaemonConfig, root: PathBuf, clock: Arc<dyn Clock>) -> io::Result<Governing> {
        let shared = Arc::new(Mutex::new(config.clone()));
        let mut rounds = Rounds {
            sensors: Sensors::open(&root, &config.board, clock.clone()),
            config: shared.clone(),
            clock: clock.clone(),
            state: State::default(),
            idle_since: Some(Duration::ZERO),
        };
        let (ruling, view) = rounds.round(false);
        for note in &view.notes {
            tracing::warn!("governor: {note}");
        }
        let (bench, door) = door::pair(ruling, clock.monotonic());
        let (set_view, view) = watch::channel(Arc::new(view));
        std::thread::Builder::new().name("governor".into()).spawn(move || {
            while !bench.is_closed() {
                let interval = lock(&rounds.config).board.interval;
                rounds.clock.sleep(interval);
                let (ruling, view) = rounds.round(bench.computing());
                bench.rule(ruling, rounds.clock.monotonic());
                tell(&set_view, &view);
                set_view.send_replace(Arc::new(view));
            }
        })?;
        Ok(Governing { door, view, config: shared })
    }

    /// Takes over another budget. The board stays what it was at the start.
    pub fn configure(&self, config: &DaemonConfig) {
        let mut now = lock(&self.config);
        let board = now.board.clone();
        *now = DaemonConfig { board, ..config.clone() };
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Logs what is new and worth it.
fn tell(before: &watch::Sender<Arc<View>>, now: &View) {
    let before = before.borrow();
    for note in now.notes.iter().filter(|note| !before.notes.contains(note)) {
        tracing::warn!("governor: {note}");
    }
    if before.level != now.level && now.level >= Level::Hard {
        let reason = now.reason.map_or("", Reason::word);
        tracing::warn!(REASON = reason, "governor: {:?}: nothing computes ({reason})", now.level);
    }
}

struct Rounds {
    sensors: Sensors,
    config: Arc<Mutex<DaemonConfig>>,
    clock: Arc<dyn Clock>,
    state: State,
    /// Since when no worker has computed.
    idle_since: Option<Duration>,
}

impl Rounds {
    fn round(&mut self, computing: bool) -> (Ruling, View) {
        let readings = self.sensors.read();
        let now = self.clock.monotonic();
        self.begin_cautiously(computing, now);
        let budget = lock(&self.config).budget.clone();
        let (state, decision) = control::step(&self.state, &readings, &budget, now);
        self.state = state;
        let ruling = ruling(&decision);
        let view = view(self.sensors.board().name, &readings, &decision);
        (ruling, view)
    }

    /// Forgets what an idle machine seemed to bear, unless something is wrong with it.
    fn begin_cautiously(&mut self, computing: bool, now: Duration) {
        match (computing, self.idle_since) {
            (true, Some(since)) => {
                self.idle_since = None;
                if now.saturating_sub(since) >= IDLE && self.state.level() < Level::Hard {
                    self.state = State::default();
                }
            }
            (false, None) => self.idle_since = Some(now),
            _ => {}
        }
    }
}

fn ruling(decision: &Decision) -> Ruling {
    let parked = decision.duty < SMALLEST_DUTY;
    Ruling {
        hold: parked.then(|| decision.reason.unwrap_or(Reason::Thermal)),
        duty: decision.duty.clamp(SMALLEST_DUTY, 1.0),
        release: decision.release,
    }
}

fn view(board: &str, readings: &Readings, decision: &Decision) -> View {
    View {
        board: board.to_string(),
        mode: readings.mode.clone(),
        level: decision.level,
        duty: decision.duty,
        reason: decision.reason,
        blind: decision.blind,
        temperature: decision.temperature,
        power: readings.power.and_then(|power| power.value()),
        zones: readings.zones.iter().map(|zone| (zone.name.clone(), zone.temperature.value())).collect(),
        rails: readings.rails.iter().map(|rail| (rail.name.clone(), rail.power.value())).collect(),
        notes: decision.notes.iter().map(ToString::to_string).collect(),
    }
}
