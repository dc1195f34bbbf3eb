//! The governor's thread: reads the sensors, decides, and tells the owner of the runs and the bus.
//!
//! ```text
//!   every [board] interval:  Sensors::read ─┬─► control::step ─────┐
//!     (milliseconds on a bus of the board:  ├─► Holds::step ───────┼─► Ruling ──► owner of the runs (hold, duty)
//!      a thread of its own, not the         └─► Meter, Ledger, ────┘─► View ────► bus, status line
//!      daemon's)                                quota   └──────► Keeper ──► the night's account
//! ```
//!
//! The owner takes silence for a hold ([`door`]).

use super::nights::{Keeper, Round};
use crate::clock::Clock;
use crate::config::daemon::{DaemonConfig, WorkerConfig};
use crate::governor::control::{self, Decision, Level, State};
use crate::governor::door::{self, Activity, Door, Standing};
use crate::governor::energy::{self, Energy, Ledger, Meter, night_of};
use crate::governor::readings::Readings;
use crate::governor::sensors::Sensors;
use crate::governor::sensors::board::BoardTable;
use crate::governor::{Ruling, View};
use crate::night::Nights;
use crate::reason::Reason;
use crate::scheduler::conditions::{Holds, Own, Schedule};
use crate::units::RunId;
use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// A run that begins after the machine was idle for this long is begun cautiously: the temperatures of an idle machine
/// say nothing about what it does under load.
const IDLE: Duration = Duration::from_secs(30);

/// Wall-clock time beyond the monotonic one that is taken for a suspend.
const SLEPT: Duration = Duration::from_secs(5);

/// How often, at 50 ms, the end of the thread is looked for: an interval is at most a second.
const LAST_ROUNDS: u32 = 40;

/// Rounds between two looks at the cap of the memory's clock.
const CAP_ROUNDS: u32 = 20;

/// Smallest duty that a permit carries.
const SMALLEST_DUTY: f64 = 0.01;

/// The governor, as the rest of the service sees it.
pub struct Governing {
    /// For the owner of the runs.
    pub door: Door,
    /// For the bus and the status line.
    pub view: watch::Receiver<Arc<View>>,
    /// For who changes the budget.
    pub dial: Dial,
    /// For who asks for the report on a night.
    pub nights: Nights,
    ending: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Governing {
    /// Reads the sensors below `root` once, decides, and starts the thread.
    pub fn start(config: &DaemonConfig, root: PathBuf, clock: Arc<dyn Clock>) -> io::Result<Governing> {
        let ledger =
            Ledger::open(&config.storage.state_directory.join("energy.jsonl")).map_err(io::Error::other)?;
        if ledger.damaged() > 0 {
            tracing::warn!(
                "{} lines of energy.jsonl could not be read: their energy is missing",
                ledger.damaged()
            );
        }
        let shared = Arc::new(Mutex::new(config.clone()));
        let sensors = Sensors::open(&root, &config.board, clock.clone());
        let mut rounds = Rounds {
            machine: remarks(&sensors, &root),
            sensors,
            config: shared.clone(),
            clock: clock.clone(),
            state: State::default(),
            holds: Holds::default(),
            meter: Meter::default(),
            ledger,
            keeper: Keeper::new(&config.storage.state_directory.join("nights"), &*clock),
            booked: (Energy::default(), 0),
            idle_since: Some(Duration::ZERO),
            last: None,
            memory_clock_cap: (0, None),
        };
        let nights = rounds.keeper.nights();
        let (ruling, view) = rounds.round(&Activity::default());
        for note in &view.notes {
            tracing::warn!("governor: {note}");
        }
        let (bench, door) = door::pair(ruling, clock.monotonic());
        bench.account(&rounds.meter, rounds.ledger.runs());
        bench.stand(standing(&view));
        let (set_view, view) = watch::channel(Arc::new(view));
        let ending = Arc::new(AtomicBool::new(false));
        let told = ending.clone();
        let thread = std::thread::Builder::new().name("governor".into()).spawn(move || {
            loop {
                if bench.is_closed() || told.load(Ordering::Relaxed) {
                    if let Err(error) = rounds.ledger.sync() {
                        tracing::warn!("{error}");
                    }
                    rounds.keeper.end();
                    return;
                }
                let interval = lock(&rounds.config).board.interval;
                rounds.clock.sleep(interval);
                let activity = bench.activity(rounds.clock.monotonic());
                let (ruling, view) = rounds.round(&activity);
                let took = activity.run.map(|run| (run.clone(), rounds.ledger.run(&run)));
                bench.account(&rounds.meter, took);
                bench.stand(standing(&view));
                bench.rule(ruling, rounds.clock.monotonic());
                tell(&set_view, &view);
                set_view.send_replace(Arc::new(view));
            }
        })?;
        Ok(Governing { door, view, dial: Dial(shared), nights, ending, thread })
    }

    /// Ends the thread, with its ledger written. A thread that hangs in a driver is left behind.
    pub fn end(self) {
        self.ending.store(true, Ordering::Relaxed);
        for _ in 0..LAST_ROUNDS {
            if self.thread.is_finished() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        tracing::warn!("the governor's thread hangs: the last seconds of energy are not on record");
    }
}

/// Sets the governor's budget.
#[derive(Clone, Debug)]
pub struct Dial(Arc<Mutex<DaemonConfig>>);

impl Dial {
    /// Takes over another budget, from the next round on. The board stays what it was at the start.
    pub fn configure(&self, config: &DaemonConfig) {
        let mut now = lock(&self.0);
        let board = now.board.clone();
        *now = DaemonConfig { board, ..config.clone() };
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether it is this machine, as what it is, that is governed.
fn remarks(sensors: &Sensors, root: &Path) -> Vec<String> {
    let mut remarks = Vec::new();
    if root != Path::new("/") {
        remarks.push(format!(
            "--sysfs-root: the sensors are files below {}, not this machine's",
            root.display()
        ));
    }
    let (taken, found) = (sensors.board().name, BoardTable::of(sensors.identity()).name);
    if taken != found {
        remarks.push(format!("[board] name = {taken:?}, but the machine says that it is {found:?}"));
    }
    remarks
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

fn standing(view: &View) -> Standing {
    Standing { board: view.board.clone(), mode: view.mode.clone(), night: view.night.unwrap_or_default() }
}

struct Rounds {
    sensors: Sensors,
    /// What a person should know of the machine that is governed, as long as the daemon runs.
    machine: Vec<String>,
    config: Arc<Mutex<DaemonConfig>>,
    clock: Arc<dyn Clock>,
    state: State,
    holds: Holds,
    meter: Meter,
    ledger: Ledger,
    keeper: Keeper,
    /// What the ledger knows of the meter's total, and of the tokens.
    booked: (Energy, u64),
    /// Since when no worker has computed.
    idle_since: Option<Duration>,
    /// The last round, on both clocks.
    last: Option<(Duration, SystemTime)>,
    /// Rounds until the cap of the memory's clock is read again, and the cap.
    memory_clock_cap: (u32, Option<u64>),
}

impl Rounds {
    fn round(&mut self, activity: &Activity) -> (Ruling, View) {
        let readings = self.sensors.read();
        let (now, wall) = (self.clock.monotonic(), self.clock.wall());
        let computing = activity.run.is_some();
        if self.has_slept(now, wall) {
            self.state = State::default();
        }
        self.begin_cautiously(computing, now);
        let config = lock(&self.config).clone();
        let cautions = config.cautions();
        let mut budget = config.budget;
        let schedule = Schedule::new(&config.window);
        let local = Timestamp::try_from(wall).unwrap_or(Timestamp::UNIX_EPOCH);
        let local = local.to_zoned_datetime(TimeZone::system());
        budget.fan = schedule.as_ref().ok().and_then(|schedule| schedule.fan_ceiling(&local));

        let (state, decision) = control::step(&self.state, &readings, &budget, now);
        self.state = state;
        let own =
            Own { gpu: 0.0, load: if computing { self.share(&config.worker) * decision.duty } else { 0.0 } };
        let outside = match &schedule {
            Ok(schedule) => {
                let (holds, hold) =
                    self.holds.step(&config.conditions, schedule, &readings, own, &local, now);
                self.holds = holds;
                hold
            }
            // The configuration was checked when it was read; what cannot be kept to must not be passed over.
            Err(_) => Some(Reason::OutsideWindow),
        };
        self.book(&readings, activity, night_of(&local), now);
        let night = self.ledger.night(night_of(&local)).energy;
        // A run's own quota is no hold: a hold would end with the activity that it ended.
        let of_run = |run: &RunId| self.ledger.run(run).energy.counted(budget.energy_gross);
        let spent_run =
            activity.run.clone().filter(|run| budget.energy_per_run.is_some_and(|most| of_run(run) >= most));
        let spent = energy::quota(&budget, &night, &Energy::default(), &self.meter, now);

        let mut ruling = ruling(&decision);
        // What lasts longest is said first.
        let lost = config.settings_lost.as_ref().map(|_| Reason::SettingsLost);
        let machine = self.holds.unfit(&config.conditions).or(ruling.hold);
        ruling.unfit = lost.or(spent.filter(|spent| *spent != Reason::EnergyQuota)).or(machine);
        ruling.hold = lost.or(outside).or(spent).or(ruling.hold);
        ruling.spent = spent_run;
        let mut view = view(self.sensors.board().name, &readings, &decision);
        view.set_points = self.state.set_points(&readings.zones);
        view.power_limit = budget.power;
        view.idle = self.meter.idle();
        view.memory_clock_cap = self.memory_clock_cap();
        if ruling.hold.is_some() {
            (view.duty, view.reason) = (0.0, ruling.hold);
        }
        view.night = readings.power.is_some().then(|| night.counted(budget.energy_gross));
        view.quota = budget.energy_per_night;
        view.notes.extend(self.clock.notice().map(str::to_string));
        if readings.power.is_none() && (budget.energy_per_night.or(budget.energy_per_run)).is_some() {
            view.notes.push("this machine has no power meter: no quota of energy is kept".into());
        }
        view.notes.extend(self.machine.iter().cloned().chain(cautions));
        if let Some(why) = &config.settings_lost {
            let why = why.lines().collect::<Vec<_>>().join("; ");
            view.notes.push(format!(
                "settings are lost, so nothing trains until `finetunectl budget reset`: {why}"
            ));
        }
        self.keeper.round(&Round {
            clock: &*self.clock,
            window: &config.window,
            activity,
            readings: &readings,
            ledger: &self.ledger,
            gross: budget.energy_gross,
            ruling: &ruling,
            view: &view,
        });
        (ruling, view)
    }

    /// Books what was spent since the last round.
    fn book(&mut self, readings: &Readings, activity: &Activity, night: Date, now: Duration) {
        self.meter.step(readings, activity.run.is_some());
        let (energy, tokens) = (self.meter.total_at(now), activity.tokens);
        let (energy_before, tokens_before) = std::mem::replace(&mut self.booked, (energy, tokens));
        self.ledger.add(night, activity.run.as_ref(), energy - energy_before, tokens - tokens_before);
        if let Err(error) = self.ledger.flush(now) {
            tracing::warn!("{error}");
        }
    }

    /// The cap of the memory's clock: it changes with the power mode, which is seldom.
    fn memory_clock_cap(&mut self) -> Option<u64> {
        let (rounds, cap) = &mut self.memory_clock_cap;
        match rounds.checked_sub(1) {
            Some(left) => *rounds = left,
            None => (*rounds, *cap) = (CAP_ROUNDS, self.sensors.limits().memory),
        }
        *cap
    }

    /// Share of the machine's cores on which a worker computes.
    fn share(&self, worker: &WorkerConfig) -> f64 {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        worker.threads.map_or(1.0, |threads| (threads as f64 / cores as f64).min(1.0))
    }

    /// Whether the machine was suspended since the last round: the wall clock has gone further than the monotonic one.
    /// A clock that was set forward looks the same, and costs a cautious beginning.
    fn has_slept(&mut self, now: Duration, wall: SystemTime) -> bool {
        let last = self.last.replace((now, wall));
        last.is_some_and(|(then, before)| {
            let passed = wall.duration_since(before).unwrap_or_default();
            passed.saturating_sub(now.saturating_sub(then)) > SLEPT
        })
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
        unfit: None,
        duty: decision.duty.clamp(SMALLEST_DUTY, 1.0),
        release: decision.release,
        spent: None,
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
        readings: readings.clone(),
        notes: decision.notes.iter().map(ToString::to_string).collect(),
        ..View::default()
    }
}
