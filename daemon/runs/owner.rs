//! The task that owns every run.
//!
//! ```text
//!   commands (clients) ──┐                        ┌── record, journal: durable first
//!   session's events ────┼──► one at a time ──────┼── board, changes: then visible
//!   tick, 1 Hz ──────────┘        │               └── replies
//!                                 └──► schedule(): scheduler::turn ──► begin, park, go on, preempt, release
//! ```
//!
//! It never waits for a worker: a worker has a session (a task of its own, [`super::session`]) that sends events. It
//! does wait for the disk, in a thread of the blocking pool, so that the bus goes on answering from the board.
//!
//! A change that the disk refuses stays in memory, is not shown, and is tried again every second; nothing begins
//! meanwhile. So the order "durable, then visible" holds on a full disk, too.

mod planning;

use super::inputs;
use super::models::Models;
use super::record::{self, Entry, Figures, Kind, Layout, Position, Record};
use super::session::{self, Ended, Event as SessionEvent, Order, Pace, Session};
use super::state::{Ask, Event, Refusal, State, Then};
use super::view::{
    Board, Change, Command, Details, Inhibition, Inhibitor, Mark, Reply, RequestError, RunEnergy, RunView,
    Runs, Status, Submission,
};
use crate::checkpoint::FileError;
use crate::clock::Clock;
use crate::config::daemon::DaemonConfig;
use crate::governor::Ruling;
use crate::governor::door::{Doing, Door, RunNews};
use crate::governor::energy;
use crate::reason::Reason;
use crate::scheduler::window::Windows;
use crate::scheduler::{Active, Candidate, Turn, deadline, turn};
use crate::units::{Joules, RunId};
use crate::worker::launch::Launcher;
use crate::worker::protocol::{Finished, Phase, Report, Start};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use planning::{Planning, Share};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};

/// How often figures are written to disk while a run trains.
const FIGURES: Duration = Duration::from_secs(10);

/// Submissions that are copied at once, of one user and in all: each has a thread, which a file system that does not
/// answer keeps.
const COPIES_PER_USER: usize = 8;
const COPIES: usize = 64;

/// Runs of one user that are kept, those that are over counted.
const KEPT_PER_USER: usize = 10_000;

/// How often it is looked at whether runs will be done by their deadlines.
const DEADLINES: Duration = Duration::from_secs(30);

/// A deadline that is farther away is a slip: nobody lets a Jetson train for longer.
const FARTHEST_DEADLINE: Duration = Duration::from_secs(366 * 24 * 3600);

/// Checkpoints and evaluations that wait for a worker.
const REQUESTS: usize = 8;

/// Longest wait for the device to become free for a lease: callers on D-Bus give up after 25 s by default.
const LEASE: Duration = Duration::from_secs(20);

/// A run that prepares has this long when something holds: it computes without a permit, and has nothing to save.
const PREPARING_GRACE: Duration = Duration::from_secs(2);

/// Longest wait after a full disk: space comes back without notice.
const STORAGE_BACKOFF: Duration = Duration::from_secs(30);

/// What the runs need.
pub struct Options {
    /// Limits, worker, storage.
    pub config: DaemonConfig,
    /// Starts workers.
    pub launcher: Arc<dyn Launcher>,
    /// The governor's clock: for records, and for how long a hold lasts. Other waiting goes by tokio's time.
    pub clock: Arc<dyn Clock>,
    /// The clock that workers share, for their permits.
    pub workers_clock: Arc<dyn Clock>,
    /// What the governor says.
    pub governor: Door,
    /// Counts the owner's turns: who watches it (systemd's watchdog) knows that the daemon is not stuck.
    pub heartbeat: Arc<AtomicU64>,
}

/// Why the runs cannot be looked after.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The models cannot be listed.
    #[error("{0}")]
    Models(RequestError),
}

/// Reads what is there and starts the owner on the current runtime. Directories that are no runs are set aside, told,
/// and left alone.
pub fn start(options: Options) -> Result<Runs, StartError> {
    let layout = Layout::create(&options.config.storage.state_directory)?;
    let models = Models::open(layout.models(), options.config.storage.model_directories.clone())
        .map_err(StartError::Models)?;
    let mut runs = BTreeMap::new();
    let now_us = wall_us(&*options.clock);
    for directory in directories(&layout)? {
        match recover(&directory, now_us) {
            Ok((record, unsaved)) => {
                runs.insert(record.id.clone(), Run { unsaved, ..Run::new(record) });
            }
            Err(error) => {
                tracing::error!(error = %error, directory = %directory.display(), "this run is left alone: it cannot be read");
            }
        }
    }
    for (id, entry) in options.governor.booked() {
        if let Some(run) = runs.get_mut(&id) {
            run.energy = entry;
        }
    }
    if let Err(error) = inputs::sweep(&layout.inputs()) {
        tracing::warn!(%error, "inputs that no run uses were not removed");
    }
    let (commands, inbox) = mpsc::channel(64);
    let (changes, _) = broadcast::channel(1024);
    let (events, outbox) = mpsc::channel(256);
    let submitted = runs.values().map(|run: &Run| run.record.submitted).max().unwrap_or(0);
    let board = Board {
        runs: runs.values().map(|run| (run.record.id.clone(), run.view())).collect(),
        status: Status { active: None, state: "idle", reason: None, device: String::new(), unfinished: 0 },
        inhibitors: Vec::new(),
        models: models.list(),
    };
    let handle = Runs { commands, board: Arc::new(Mutex::new(board)), changes };
    let owner = Owner {
        layout,
        models: Arc::new(models),
        runs,
        active: None,
        holders: BTreeMap::new(),
        next_holder: 0,
        next_request: 0,
        submitted,
        arriving: BTreeMap::new(),
        planning: None,
        asleep: None,
        weighed: None,
        stopping: None,
        handle: handle.clone(),
        events,
        options,
    };
    tokio::spawn(owner.work(inbox, outbox));
    Ok(handle)
}

/// The directories of runs; what a submission or a removal left half done is deleted.
fn directories(layout: &Layout) -> Result<Vec<PathBuf>, FileError> {
    let root = layout.runs();
    let fail = |source| FileError::new("list", &root, source);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&root).map_err(fail)? {
        let path = entry.map_err(fail)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with(".incoming-") || name.starts_with(".trash-") {
            if let Err(error) = std::fs::remove_dir_all(&path) {
                tracing::warn!(%error, path = %path.display(), "left from an earlier daemon, and not removed");
            }
        } else if RunId::parse(name).is_some() {
            found.push(path);
        }
    }
    Ok(found)
}

/// A run as this daemon finds it: legal, without a worker, and durable; or still to be made so (true), where the disk
/// does not take it now.
fn recover(directory: &Path, now_us: u64) -> anyhow::Result<(Record, bool)> {
    let mut record = Record::read(directory)?;
    let mut written = record.mend(directory);
    let condition = record.condition.after(Event::Restart)?;
    if condition != record.condition {
        record.condition = condition;
        record.sequence += 1;
        record.changed_us = now_us;
        if condition.state.is_over() {
            record.finished_us = now_us;
        }
        written = written.and_then(|()| record.commit(directory));
    }
    if let Err(error) = &written {
        tracing::warn!(RUN_ID = %record.id, "{error}; it is tried again");
    }
    Ok((record, written.is_err()))
}

/// A run, and what of it is not on disk.
struct Run {
    record: Record,
    /// The record on disk is behind.
    unsaved: bool,
    /// When figures were last written.
    saved_at: Instant,
    /// No attempt before.
    not_before: Option<Instant>,
    /// How often in a row the disk refused its worker.
    refusals: u32,
    /// The end of the last step, unless something else has happened since.
    last_step: Option<Mark>,
    memory: u64,
    /// What it took in all, and in its last step.
    energy: energy::Entry,
    step_energy: Option<Joules>,
    /// What its worker said that it does.
    phase: Phase,
}

impl Run {
    fn new(record: Record) -> Run {
        Run {
            record,
            unsaved: false,
            saved_at: Instant::now(),
            not_before: None,
            refusals: 0,
            last_step: None,
            memory: 0,
            energy: energy::Entry::default(),
            step_energy: None,
            phase: Phase::Starting,
        }
    }

    /// How it stands, for the night's account.
    fn news(&self) -> RunNews {
        let record = &self.record;
        let state = record.condition.state;
        let worked = matches!(state, State::Preparing | State::Running | State::Saving | State::Failed);
        RunNews {
            name: record.name.clone(),
            state: state.word(),
            reason: record.condition.reason,
            active: worked || state == State::Succeeded,
            step: record.figures.step,
            loss: record.figures.loss,
        }
    }

    /// What its worker does with the time.
    fn doing(&self) -> Doing {
        let condition = self.record.condition;
        match condition.state {
            State::Preparing => Doing::Preparing,
            State::Saving => Doing::Saving,
            State::Waiting => Doing::Waiting(condition.reason.unwrap_or(Reason::Inhibited)),
            _ => match self.phase {
                Phase::Starting | Phase::Preparing => Doing::Preparing,
                Phase::Evaluating => Doing::Evaluating,
                Phase::Saving => Doing::Saving,
                Phase::Parked | Phase::Training => Doing::Training,
            },
        }
    }

    /// What everybody may see of it.
    fn view(&self) -> RunView {
        RunView { energy: RunEnergy::new(&self.energy, self.step_energy), ..self.record.view(self.memory) }
    }

    fn ready(&self, now: Instant) -> bool {
        matches!(self.record.condition.state, State::Queued | State::Waiting)
            && self.not_before.is_none_or(|at| at <= now)
    }
}

/// The run with a worker.
struct ActiveRun {
    id: RunId,
    session: Session,
    /// Since when it is to be parked.
    parked: Option<Parked>,
    /// Number of the hold it is, or was last, to be parked under, and of the last one under which it said it was.
    holds: u64,
    still: u64,
    checkpoints: HashMap<u64, Reply<u64>>,
    evaluations: HashMap<u64, Reply<f64>>,
    /// How much of the time it may compute.
    share: Share,
}

impl ActiveRun {
    /// Whether its worker has said that nothing computes, and has had no leave since.
    fn is_still(&self) -> bool {
        self.parked.is_some() && self.still == self.holds
    }
}

/// When a run was parked: by the time that the worker lives in, and by the governor's clock.
#[derive(Clone, Copy)]
struct Parked {
    since: Instant,
    held_since: Duration,
}

struct Holder {
    inhibitor: Inhibitor,
    sender: String,
    lease: bool,
    /// Memory is wanted, too.
    release: bool,
    /// Answered when the device is free.
    waiting: Option<Waiting>,
}

/// A lease that is not granted yet.
struct Waiting {
    lease: OwnedFd,
    until: Instant,
    reply: Reply<OwnedFd>,
}

/// What the owner hears from its own tasks.
pub(super) enum Message {
    /// From the session of this run.
    Session(RunId, SessionEvent),
    /// Every copy of an inhibitor's descriptor is closed.
    Released(u64),
    /// A submission was copied, or not.
    Taken(Box<Arrival>),
    /// A model was copied or removed.
    Models(Box<dyn FnOnce() + Send>),
    /// Files of a removed run were deleted.
    Swept,
    /// The inputs of a plan were copied, or not: the spec with their paths.
    PlanInputs(RunId, Result<String, RequestError>),
}

/// A submission whose files are in place.
pub(super) struct Arrival {
    record: Record,
    incoming: PathBuf,
    taken: Result<inputs::Taken, RequestError>,
    reply: Reply<RunId>,
}

struct Owner {
    layout: Layout,
    models: Arc<Models>,
    runs: BTreeMap<RunId, Run>,
    active: Option<ActiveRun>,
    holders: BTreeMap<u64, Holder>,
    next_holder: u64,
    next_request: u64,
    submitted: u64,
    /// Submissions that are being copied, with their users.
    arriving: BTreeMap<RunId, u32>,
    planning: Option<Planning>,
    /// The machine sleeps or goes down: why nothing begins, and who waits until nothing computes.
    asleep: Option<(Reason, Vec<oneshot::Sender<()>>)>,
    /// When deadlines were last looked at; absent when something about them has changed.
    weighed: Option<Instant>,
    stopping: Option<(Reason, Vec<oneshot::Sender<()>>)>,
    handle: Runs,
    events: mpsc::Sender<Message>,
    options: Options,
}

impl Owner {
    async fn work(mut self, mut commands: mpsc::Receiver<Command>, mut events: mpsc::Receiver<Message>) {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.schedule().await;
        loop {
            let next = self.next_attempt();
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    // Every handle is gone, ours included: cannot happen, since we hold one.
                    None => return,
                },
                message = events.recv() => if let Some(message) = message { self.message(message).await },
                _ = tick.tick() => self.tick().await,
                () = self.options.governor.changed() => {}
                _ = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {}
            }
            self.schedule().await;
            self.options.heartbeat.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// When the first backoff is over.
    fn next_attempt(&self) -> Option<Instant> {
        let now = Instant::now();
        self.runs.values().filter_map(|run| run.not_before.filter(|at| *at > now)).min()
    }

    // ── What clients ask ────────────────────────────────────────────────────────────────────────────────────────────

    async fn command(&mut self, command: Command) {
        // A client that no longer waits for its answer is no concern of ours: results of `send` are ignored.
        match command {
            Command::Submit(submission, reply) => self.submit(*submission, reply),
            Command::Plan(request, reply) => self.plan(*request, reply),
            Command::Ask(id, ask, reply) => {
                let _ = reply.send(self.ask(&id, ask).await);
            }
            Command::Remove(id, reply) => {
                let _ = reply.send(self.remove(&id).await);
            }
            Command::SetPriority(id, priority, reply) => {
                let _ = reply.send(self.set_priority(&id, priority).await);
            }
            Command::SetDeadline(id, deadline_us, reply) => {
                let _ = reply.send(self.set_deadline(&id, deadline_us).await);
            }
            Command::Checkpoint(id, reply) => {
                self.next_request += 1;
                let request = self.next_request;
                match self.training(&id) {
                    Ok(active) => {
                        active.checkpoints.insert(request, reply);
                        active.session.order(Order::Checkpoint { request });
                    }
                    Err(error) => drop(reply.send(Err(error))),
                }
            }
            Command::Evaluate(id, reply) => {
                self.next_request += 1;
                let request = self.next_request;
                match self.training(&id) {
                    Ok(active) => {
                        active.evaluations.insert(request, reply);
                        active.session.order(Order::Evaluate { request });
                    }
                    Err(error) => drop(reply.send(Err(error))),
                }
            }
            Command::Details(id, reply) => {
                let _ = reply.send(self.details(&id).await);
            }
            Command::OpenMetrics(id, reply) => {
                let _ = reply.send(self.open(&id, "metrics.jsonl").await);
            }
            Command::OpenJournal(id, reply) => {
                let _ = reply.send(self.open(&id, "journal.jsonl").await);
            }
            Command::OpenAdapter(id, reply) => {
                let _ = reply.send(self.open_adapter(&id).await);
            }
            Command::Inhibit(inhibition, reply) => self.inhibit(inhibition, reply),
            Command::AddModel(name, directory, reply) => {
                self.change_models(reply, move |models, limits| models.add(&name, directory, &limits))
            }
            Command::RemoveModel(name, reply) => match self.model_in_use(&name) {
                Some(error) => drop(reply.send(Err(error))),
                None => self.change_models(reply, move |models, _| models.remove(&name)),
            },
            Command::Configure(config, reply) => {
                let _ = reply.send(self.configure(*config).await);
            }
            Command::SetBudget(changed, reply) => {
                (self.options.config.budget, self.options.config.window) = *changed;
                self.weighed = None;
                let _ = reply.send(Ok(()));
            }
            Command::Suspend(reason, done) => {
                let (why, waiting) = self.asleep.get_or_insert_with(|| (reason, Vec::new()));
                *why = reason;
                waiting.push(done);
            }
            Command::Wake => self.asleep = None,
            Command::Shutdown(reason, done) => self.shutdown(reason, done).await,
        }
    }

    fn known(&self, id: &RunId) -> Result<&Run, RequestError> {
        self.runs.get(id).ok_or_else(|| RequestError::NoSuchRun(id.to_string()))
    }

    /// The session of a run that trains or could at once.
    fn training(&mut self, id: &RunId) -> Result<&mut ActiveRun, RequestError> {
        let state = self.known(id)?.record.condition.state;
        let refused = Refusal::NotActive(state);
        match &mut self.active {
            Some(active) if active.id == *id && matches!(state, State::Running | State::Waiting) => {
                let waiting = active.checkpoints.len() + active.evaluations.len();
                if waiting >= REQUESTS {
                    return Err(RequestError::Limit(format!(
                        "{waiting} checkpoints and evaluations of run {id} wait already"
                    )));
                }
                Ok(active)
            }
            _ => Err(refused.into()),
        }
    }

    /// Checks the limits and has the files copied; [`Self::arrived`] does the rest.
    fn submit(&mut self, submission: Submission, reply: Reply<RunId>) {
        if let Err(error) = self.admit(&submission) {
            let _ = reply.send(Err(error));
            return;
        }
        let id = match self.new_id() {
            Ok(id) => id,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let now_us = wall_us(&*self.options.clock);
        let mut record =
            Record::submitted(id.clone(), String::new(), submission.owner, String::new(), now_us);
        self.submitted += 1;
        record.submitted = self.submitted;
        record.priority = submission.priority;
        record.deadline_us = submission.deadline_us;
        if submission.hold {
            // A run that was just submitted can always be paused.
            if let Ok(condition) = record.condition.after(Event::Ask(Ask::Pause)) {
                record.condition = condition;
            }
        }
        let (incoming, place) = (self.layout.incoming(&id), self.layout.run(&id));
        let (store, models) = (self.layout.inputs(), self.models.clone());
        let limits = self.options.config.limits.clone();
        let events = self.events.clone();
        self.arriving.insert(id.clone(), submission.owner);
        tokio::task::spawn_blocking(move || {
            let taken = take(&submission, &incoming, &place, &store, &models, &limits);
            let arrival = Arrival { record, incoming, taken, reply };
            let _ = events.blocking_send(Message::Taken(Box::new(arrival)));
        });
    }

    fn admit(&self, submission: &Submission) -> Result<(), RequestError> {
        if self.stopping.is_some() {
            return Err(RequestError::ShuttingDown);
        }
        self.check_deadline(submission.deadline_us)?;
        let copying = self.arriving.values().filter(|user| **user == submission.owner).count();
        if copying >= COPIES_PER_USER || self.arriving.len() >= COPIES {
            return Err(RequestError::Limit(format!(
                "{copying} submissions of user {}, {} of all, are being copied: wait for one of them",
                submission.owner,
                self.arriving.len()
            )));
        }
        let kept = self.runs.values().filter(|run| run.record.owner == submission.owner).count() + copying;
        if kept >= KEPT_PER_USER {
            return Err(RequestError::Limit(format!(
                "user {} has {kept} runs, those that are over counted: remove some first",
                submission.owner
            )));
        }
        let limits = &self.options.config.limits;
        let unfinished = || self.runs.values().filter(|run| !run.record.condition.state.is_over());
        let own = unfinished().filter(|run| run.record.owner == submission.owner).count() + copying;
        if own >= limits.runs_per_user as usize {
            return Err(RequestError::Limit(format!(
                "user {} has {own} unfinished runs, the limit (limits.runs_per_user) is {}",
                submission.owner, limits.runs_per_user
            )));
        }
        let all = unfinished().count() + self.arriving.len();
        if all >= limits.runs as usize {
            return Err(RequestError::Limit(format!(
                "there are {all} unfinished runs, the limit (limits.runs) is {}",
                limits.runs
            )));
        }
        Ok(())
    }

    /// An id that no run has.
    fn new_id(&self) -> Result<RunId, RequestError> {
        loop {
            let mut bits = [0; RunId::LENGTH / 2];
            let filled = rustix::rand::getrandom(&mut bits, rustix::rand::GetRandomFlags::empty());
            match filled {
                Ok(n) if n == bits.len() => {}
                Ok(_) | Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    return Err(RequestError::Failed(format!("no random numbers for a run's id: {error}")));
                }
            }
            let id = RunId::from_bits(bits);
            if id != energy::plans() && !self.runs.contains_key(&id) && !self.layout.run(&id).exists() {
                return Ok(id);
            }
        }
    }

    /// A submission whose files are in place becomes a run.
    async fn arrived(&mut self, arrival: Arrival) {
        let Arrival { mut record, incoming, taken, reply } = arrival;
        self.arriving.remove(&record.id);
        let place = self.layout.run(&record.id);
        let admitted = match taken {
            Ok(_) if self.stopping.is_some() => Err(RequestError::ShuttingDown),
            Ok(taken) => {
                record.name = taken.name;
                record.model = taken.model;
                let written = record.clone();
                let (from, to) = (incoming.clone(), place.clone());
                on_disk(move || publish(&written, &from, &to)).await
            }
            Err(error) => Err(error),
        };
        match admitted {
            Ok(()) => {
                let id = record.id.clone();
                self.handle.board().runs.insert(id.clone(), record.view(0));
                self.runs.insert(id.clone(), Run::new(record));
                self.weighed = None;
                self.tell(Change::Added(id.clone()));
                let _ = reply.send(Ok(id));
            }
            Err(error) => {
                let swept = on_disk(move || match std::fs::remove_dir_all(&incoming) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        Err(FileError::new("remove", &incoming, error))
                    }
                    _ => Ok(()),
                });
                if let Err(error) = swept.await {
                    tracing::warn!(%error, "what was copied for a refused run stays until the next start");
                }
                self.sweep();
                let _ = reply.send(Err(error));
            }
        }
    }

    async fn ask(&mut self, id: &RunId, ask: Ask) -> Result<(), RequestError> {
        self.known(id)?;
        if self.stopping.is_some() && ask == Ask::Resume {
            return Err(RequestError::ShuttingDown);
        }
        let before = self.change(id, Event::Ask(ask)).await?;
        if let Some(run) = self.runs.get_mut(id) {
            if ask == Ask::Resume {
                // A person who resumes has done something about it: all attempts are there again, and at once.
                run.record.fruitless = 0;
                run.not_before = None;
            }
            if before.state != State::Saving && run.record.condition.state == State::Saving {
                self.stop_worker(id, Reason::User);
            }
        }
        Ok(())
    }

    fn stop_worker(&mut self, id: &RunId, reason: Reason) {
        if let Some(active) = self.active.as_mut().filter(|active| active.id == *id) {
            active.session.order(Order::Stop { reason });
        }
    }

    async fn remove(&mut self, id: &RunId) -> Result<(), RequestError> {
        let state = self.known(id)?.record.condition.state;
        if !state.is_over() {
            return Err(Refusal::NotOver(state).into());
        }
        let (from, to) = (self.layout.run(id), self.layout.trash(id));
        let moved = to.clone();
        on_disk(move || {
            std::fs::rename(&from, &moved).map_err(|error| FileError::new("remove", &from, error))?;
            // It is gone for everybody who looks; at worst a power cut brings it back.
            if let Err(error) = sync_parent(&from) {
                tracing::warn!(%error, path = %from.display(), "a removal is not durable yet");
            }
            Ok(())
        })
        .await?;
        self.runs.remove(id);
        self.handle.board().runs.remove(id);
        self.tell(Change::Removed(id.clone()));
        tracing::info!(RUN_ID = %id, "removed");
        let events = self.events.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = std::fs::remove_dir_all(&to) {
                tracing::warn!(%error, path = %to.display(), "a removed run's files stay until the next start");
            }
            let _ = events.blocking_send(Message::Swept);
        });
        Ok(())
    }

    /// Removes inputs that no run uses, in the background. A submission in progress links before the store's copy
    /// could be taken for unused: `inputs` takes care of that.
    fn sweep(&self) {
        let store = self.layout.inputs();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = inputs::sweep(&store) {
                tracing::warn!(%error, "inputs that no run uses were not removed");
            }
        });
    }

    async fn set_priority(&mut self, id: &RunId, priority: i32) -> Result<(), RequestError> {
        self.edit(id, |record| record.priority = priority).await
    }

    async fn set_deadline(&mut self, id: &RunId, deadline_us: u64) -> Result<(), RequestError> {
        self.check_deadline(deadline_us)?;
        self.edit(id, |record| (record.deadline_us, record.deadline_at_risk) = (deadline_us, false)).await?;
        self.weighed = None;
        Ok(())
    }

    fn check_deadline(&self, deadline_us: u64) -> Result<(), RequestError> {
        let now_us = wall_us(&*self.options.clock);
        let farthest = now_us.saturating_add(FARTHEST_DEADLINE.as_micros() as u64);
        let problem = match deadline_us {
            0 => return Ok(()),
            past if past <= now_us => "lies in the past: give a later time, or none",
            far if far > farthest => "lies more than a year ahead: give an earlier time, or none",
            _ => return Ok(()),
        };
        Err(RequestError::InvalidInput(format!("the deadline {problem}")))
    }

    /// Changes something in the record of a run that is not over, that is not its state.
    async fn edit(&mut self, id: &RunId, edit: impl FnOnce(&mut Record)) -> Result<(), RequestError> {
        let record = &self.known(id)?.record;
        if record.condition.state.is_over() {
            return Err(Refusal::Over(record.condition.state).into());
        }
        let mut changed = record.clone();
        edit(&mut changed);
        let directory = self.layout.run(id);
        let written = changed.clone();
        on_disk(move || written.write(&directory)).await?;
        if let Some(run) = self.runs.get_mut(id) {
            run.record = changed;
        }
        self.show(id, Change::Figures(id.clone()));
        Ok(())
    }

    async fn details(&self, id: &RunId) -> Result<Details, RequestError> {
        let record = &self.known(id)?.record;
        let directory = self.layout.run(id);
        let (message, model) = (record.message.clone(), record.model.clone());
        let read = move || {
            let text = |name: &str| match std::fs::read_to_string(directory.join(name)) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
                other => other.map_err(|error| FileError::new("read", &directory.join(name), error)),
            };
            Ok(Details {
                message,
                model,
                spec: text("spec.toml")?,
                resolved_spec: text("spec.resolved.toml")?,
                summary: text("summary.json")?,
                directory: directory.display().to_string(),
            })
        };
        on_disk(read).await
    }

    async fn open(&self, id: &RunId, name: &'static str) -> Result<OwnedFd, RequestError> {
        self.known(id)?;
        let path = self.layout.run(id).join(name);
        on_disk(move || record::open_to_read(&path).map_err(|error| FileError::new("open", &path, error)))
            .await
    }

    async fn open_adapter(&self, id: &RunId) -> Result<Vec<(String, OwnedFd)>, RequestError> {
        let state = self.known(id)?.record.condition.state;
        if state != State::Succeeded {
            return Err(RequestError::Failed(format!(
                "run {id} has no adapter: it is {state}, and an adapter is written when a run succeeds"
            )));
        }
        let directory = self.layout.run(id).join("adapter");
        on_disk(move || {
            let fail = |source| FileError::new("open", &directory, source);
            let mut files = Vec::new();
            for entry in std::fs::read_dir(&directory).map_err(fail)? {
                let entry = entry.map_err(fail)?;
                let file =
                    File::open(entry.path()).map_err(|error| FileError::new("open", &entry.path(), error))?;
                files.push((entry.file_name().to_string_lossy().into_owned(), OwnedFd::from(file)));
            }
            Ok(files)
        })
        .await
    }

    fn inhibit(&mut self, inhibition: Inhibition, reply: Reply<OwnedFd>) {
        let wait = inhibition.wait;
        let (number, lease) = match self.take_hold(inhibition) {
            Ok(taken) => taken,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let until = Instant::now() + LEASE;
        match self.holders.get_mut(&number).filter(|_| wait) {
            Some(holder) => holder.waiting = Some(Waiting { lease, until, reply }),
            None => drop(reply.send(Ok(lease))),
        }
    }

    /// Answers leases: those for which the device is free now, and those that have waited too long.
    fn grant_leases(&mut self) {
        let now = Instant::now();
        // The worker of a plan computes without a permit, and cannot be parked: it must be gone.
        let free = self.is_device_free();
        let still = self.surveys().is_none() && self.active.as_ref().is_none_or(ActiveRun::is_still);
        let mut refused = Vec::new();
        for (number, holder) in &mut self.holders {
            let granted = if holder.release { free } else { still };
            let late = |waiting: &mut Waiting| granted || waiting.until <= now;
            let Some(Waiting { lease, reply, .. }) = holder.waiting.take_if(late) else { continue };
            if granted {
                // Nobody there to take it: its descriptor is closed here, and that releases it.
                let _ = reply.send(Ok(lease));
            } else {
                refused.push(*number);
                let _ = reply.send(Err(RequestError::Busy(format!(
                    "what trains did not let go of the device within {} s, and goes on; a micro-step may take as long \
                     (train.micro_batch_size), or the worker prepares or saves: try again, or ask with wait = false",
                    LEASE.as_secs()
                ))));
            }
        }
        for number in refused {
            self.drop_hold(number);
        }
    }

    /// A hold is over; whose it was.
    fn drop_hold(&mut self, number: u64) -> Option<Inhibitor> {
        let Holder { inhibitor, .. } = self.holders.remove(&number)?;
        self.options.governor.released(number, self.options.clock.monotonic());
        self.show_holders();
        Some(inhibitor)
    }

    /// The number of a new hold, and the descriptor that keeps it.
    fn take_hold(&mut self, inhibition: Inhibition) -> Result<(u64, OwnedFd), RequestError> {
        let limits = &self.options.config.limits;
        let own = self.holders.values().filter(|holder| holder.sender == inhibition.sender).count();
        for (taken, limit, key) in [
            (own, limits.inhibitors_per_sender, "limits.inhibitors_per_sender"),
            (self.holders.len(), limits.inhibitors, "limits.inhibitors"),
        ] {
            if taken >= limit as usize {
                return Err(RequestError::Limit(format!(
                    "{taken} inhibitors are in force, the limit ({key}) is {limit}"
                )));
            }
        }
        let failed = |error: std::io::Error| RequestError::Failed(format!("cannot make a pipe: {error}"));
        let (ours, theirs) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        let ours = tokio::net::unix::pipe::Receiver::from_owned_fd(ours).map_err(failed)?;
        let number = self.next_holder;
        self.next_holder += 1;
        let inhibitor = Inhibitor {
            who: inhibition.who,
            why: inhibition.why,
            owner: inhibition.owner,
            lease: inhibition.lease,
            since_us: wall_us(&*self.options.clock),
        };
        tracing::info!(
            who = inhibitor.who,
            why = inhibitor.why,
            owner = inhibitor.owner,
            "training is inhibited"
        );
        let Inhibition { sender, lease, release, .. } = inhibition;
        self.options.governor.holds(number, &inhibitor.who, self.options.clock.monotonic());
        self.holders.insert(number, Holder { inhibitor, sender, lease, release, waiting: None });
        self.show_holders();
        let events = self.events.clone();
        tokio::spawn(async move {
            released(ours).await;
            let _ = events.send(Message::Released(number)).await;
        });
        Ok((number, theirs))
    }

    fn show_holders(&mut self) {
        self.handle.board().inhibitors =
            self.holders.values().map(|holder| holder.inhibitor.clone()).collect();
        self.tell(Change::Status);
    }

    /// Has the models changed in a thread of their own: copying one takes minutes.
    fn change_models<T: Send + 'static>(
        &self,
        reply: Reply<T>,
        change: impl FnOnce(&Models, crate::config::daemon::LimitsConfig) -> Result<T, RequestError>
        + Send
        + 'static,
    ) {
        let (models, limits) = (self.models.clone(), self.options.config.limits.clone());
        let (handle, events) = (self.handle.clone(), self.events.clone());
        tokio::task::spawn_blocking(move || {
            let result = change(&models, limits);
            let list = models.list();
            // The list is shown before the caller hears that it has changed.
            let show = Box::new(move || {
                handle.board().models = list;
                let _ = reply.send(result);
            });
            let _ = events.blocking_send(Message::Models(show));
        });
    }

    fn model_in_use(&self, name: &str) -> Option<RequestError> {
        let user = self.runs.values().find(|run| {
            let record = &run.record;
            !record.condition.state.is_over() && record.model == name
        })?;
        let record = &user.record;
        Some(RequestError::Limit(format!(
            "run {} ({}) needs the model {name}: cancel it first",
            record.id, record.name
        )))
    }

    /// Takes over what can change while runs are there: limits, the worker's figures (for the next attempt), hours, the
    /// directories of models.
    async fn configure(&mut self, config: DaemonConfig) -> Result<(), RequestError> {
        let models = Arc::new(self.models.with(config.storage.model_directories.clone()));
        let listed = models.clone();
        let list = on_disk(move || Ok(listed.list())).await?;
        self.handle.board().models = list;
        self.models = models;
        let launch = std::mem::replace(&mut self.options.config.worker, config.worker).launch;
        self.options.config.worker.launch = launch;
        self.options.config.limits = config.limits;
        self.options.config.budget = config.budget;
        self.options.config.window = config.window;
        self.weighed = None;
        self.options.config.storage.model_directories = config.storage.model_directories;
        self.tell(Change::Status);
        Ok(())
    }

    async fn shutdown(&mut self, reason: Reason, done: oneshot::Sender<()>) {
        match &mut self.stopping {
            Some((_, waiting)) => waiting.push(done),
            None => self.stopping = Some((reason, vec![done])),
        }
        let Some(id) = self.active.as_ref().map(|active| active.id.clone()) else { return };
        let stopping = |run: &Run| run.record.condition.state == State::Saving;
        if !self.runs.get(&id).is_some_and(stopping) {
            self.happened(&id, Event::Stop(Then::Shutdown, reason)).await;
            self.stop_worker(&id, reason);
        }
    }

    // ── What the owner's own tasks say ──────────────────────────────────────────────────────────────────────────────

    async fn message(&mut self, message: Message) {
        match message {
            Message::Session(id, event) => {
                if self.planning.as_ref().is_some_and(|planning| planning.is(&id)) {
                    return self.plan_event(event).await;
                }
                // A session speaks until it has ended, and there is one at a time.
                if self.active.as_ref().is_some_and(|active| active.id == id) {
                    match event {
                        SessionEvent::Report(report) => self.report(&id, report).await,
                        SessionEvent::Ended(ended) => self.ended(&id, ended).await,
                    }
                }
            }
            Message::Released(number) => {
                if let Some(inhibitor) = self.drop_hold(number) {
                    tracing::info!(who = inhibitor.who, owner = inhibitor.owner, "an inhibitor was released");
                }
            }
            Message::Taken(arrival) => self.arrived(*arrival).await,
            Message::Models(show) => {
                show();
                self.tell(Change::Status);
            }
            Message::Swept => self.sweep(),
            Message::PlanInputs(id, taken) => self.plan_inputs(id, taken).await,
        }
    }

    async fn report(&mut self, id: &RunId, report: Report) {
        let now = Instant::now();
        let meter = self.options.governor.energy(self.options.clock.monotonic());
        let Some(run) = self.runs.get_mut(id) else { return };
        let figures = &mut run.record.figures;
        match report {
            Report::Ready(ready) => {
                let mut board = self.handle.board();
                if board.status.device != ready.device {
                    board.status.device = ready.device;
                    drop(board);
                    self.tell(Change::Status);
                }
            }
            Report::Beat(beat) => {
                run.phase = beat.phase;
                if run.memory != beat.memory {
                    run.memory = beat.memory;
                    self.show(id, Change::Figures(id.clone()));
                }
            }
            Report::Started(started) => {
                figures.step = started.step;
                figures.total_steps = started.total;
                // Within a step: what it took before is not known here.
                let energy = meter.filter(|_| started.within == 0);
                run.last_step = Some(Mark { at: now, step: started.step, energy });
                run.phase = Phase::Training;
                let position = Position { step: started.step, within: started.within };
                run.record.advance(position);
                if started.resumed {
                    run.record.figures.checkpoint_step = Some(started.step);
                }
                // One that was told to stop while it prepared may have been prepared before it heard.
                if run.record.condition.state == State::Preparing {
                    self.happened(id, Event::Training).await;
                }
            }
            Report::Step(step) => {
                self.options.governor.trained(step.tokens);
                figures.step = step.step;
                figures.epoch = step.epoch;
                figures.loss = Some(step.loss).filter(|loss| loss.is_finite());
                figures.tokens_per_second = Some(step.tokens_per_second).filter(|rate| rate.is_finite());
                let mark = Mark { at: now, step: step.step, energy: meter };
                let before = run.last_step.replace(mark);
                figures.paced(before, mark);
                run.step_energy = Mark::step_energy(before, mark);
                self.show(id, Change::Figures(id.clone()));
                self.write_figures(id, false).await;
            }
            Report::Evaluated { record, request } => {
                figures.eval_loss = Some(record.eval_loss).filter(|loss| loss.is_finite());
                run.last_step = None; // the time of an evaluation is none of the steps'
                if let (Some(active), Some(request)) = (&mut self.active, request)
                    && let Some(reply) = active.evaluations.remove(&request)
                {
                    let _ = reply.send(Ok(record.eval_loss));
                }
                self.show(id, Change::Figures(id.clone()));
            }
            Report::Committed { step, within, request } => {
                figures.checkpoint_step = Some(step);
                run.refusals = 0;
                run.record.advance(Position { step, within });
                if let (Some(active), Some(request)) = (&mut self.active, request)
                    && let Some(reply) = active.checkpoints.remove(&request)
                {
                    let _ = reply.send(Ok(step));
                }
                self.show(id, Change::Figures(id.clone()));
                self.write_figures(id, false).await;
            }
            Report::Refused { request, why } => {
                if let Some(active) = &mut self.active {
                    let refused = || RequestError::Failed(why);
                    if let Some(reply) = active.evaluations.remove(&request) {
                        let _ = reply.send(Err(refused()));
                    } else if let Some(reply) = active.checkpoints.remove(&request) {
                        let _ = reply.send(Err(refused()));
                    }
                }
            }
            Report::Parked { hold } => {
                if let Some(active) = &mut self.active {
                    active.still = hold;
                }
            }
            Report::Measured(measured) => self.remember(id, *measured).await,
            Report::Note { text } => {
                tracing::info!(RUN_ID = %id, "{text}");
                self.note(id, Kind::Note, text).await;
            }
            // The session ends with these; they come as `Ended`.
            Report::Finished(_) | Report::Failed(_) => {}
        }
    }

    async fn ended(&mut self, id: &RunId, ended: Ended) {
        let Some(active) = self.active.take() else { return };
        // Dropped replies would say that the daemon goes down.
        let gone =
            || RequestError::Failed("the worker ended before it could do that: see the run's state".into());
        active.checkpoints.into_values().for_each(|reply| drop(reply.send(Err(gone()))));
        active.evaluations.into_values().for_each(|reply| drop(reply.send(Err(gone()))));
        let Some(run) = self.runs.get_mut(id) else { return };
        run.memory = 0;
        run.last_step = None;
        let saving = run.record.condition.state == State::Saving;
        match ended {
            Ended::Finished(Finished::Complete { summary }) => {
                run.record.figures.step = summary.steps;
                run.record.figures.eval_loss = summary.best_eval_loss.or(run.record.figures.eval_loss);
                let early = summary.stopped_early.then_some(Reason::EarlyStopping);
                self.happened(id, Event::Complete(early)).await;
            }
            Ended::Finished(Finished::Surveyed { .. }) => {
                // A defect of the worker's: nobody asked for that.
                let event = if saving { Event::Saved } else { Event::Lost(Reason::Protocol) };
                self.happened(id, event).await;
            }
            Ended::Finished(Finished::Stopped { reason }) => {
                run.record.fruitless = 0;
                if !saving {
                    // Nobody here told it to: it lost sight of us for a while, or the system ends it.
                    run.not_before = Some(Instant::now() + self.options.config.worker.backoff);
                }
                self.happened(id, if saving { Event::Saved } else { Event::Lost(reason) }).await;
            }
            Ended::Failed { reason, message, retry } => {
                tracing::warn!(RUN_ID = %id, REASON = reason.word(), retry, "the worker failed: {message}");
                run.record.message = message.clone();
                let attempts = self.options.config.worker.attempts;
                // A full disk is nobody's fault and may last: it is waited for, not counted.
                let storage = reason == Reason::Storage;
                if storage {
                    run.record.fruitless = run.record.fruitless.saturating_sub(1);
                    run.refusals = run.refusals.saturating_add(1);
                }
                let exhausted = !storage && run.record.fruitless >= attempts;
                if retry && exhausted {
                    run.record.message =
                        format!("{attempts} attempts in a row got no further; the last one: {message}");
                }
                let pause = self.backoff(id, storage);
                if let Some(run) = self.runs.get_mut(id) {
                    run.not_before = Some(Instant::now() + pause);
                }
                self.note(id, Kind::Failure, message).await;
                let event = match retry && !exhausted {
                    true if storage => Event::Lost(Reason::Storage),
                    true => Event::Lost(Reason::Backoff),
                    false => Event::Fail(reason),
                };
                self.happened(id, event).await;
            }
        }
    }

    /// The wait before the next attempt.
    fn backoff(&self, id: &RunId, storage: bool) -> Duration {
        let worker = &self.options.config.worker;
        let count = |run: &Run| if storage { run.refusals } else { run.record.fruitless };
        let failures = self.runs.get(id).map_or(0, count);
        let doubled = worker.backoff.saturating_mul(1 << failures.saturating_sub(1).min(20));
        let limit = if storage { worker.backoff_limit.min(STORAGE_BACKOFF) } else { worker.backoff_limit };
        doubled.min(limit)
    }

    async fn tick(&mut self) {
        let unsaved: Vec<RunId> =
            self.runs.iter().filter(|(_, run)| run.unsaved).map(|(id, _)| id.clone()).collect();
        for id in unsaved {
            self.save(&id).await;
        }
        if let Some(id) = self.active.as_ref().map(|active| active.id.clone()) {
            self.write_figures(&id, false).await;
        }
        self.show_energy();
        if self.weighed.is_none_or(|at| at.elapsed() >= DEADLINES) {
            self.weighed = Some(Instant::now());
            self.weigh_deadlines().await;
        }
    }

    /// Shows what runs took since it was looked at last.
    fn show_energy(&mut self) {
        for (id, entry) in self.options.governor.booked() {
            let Some(run) = self.runs.get_mut(&id) else { continue };
            let before = RunEnergy::new(&std::mem::replace(&mut run.energy, entry), None);
            // Without a meter there is nothing to tell each second.
            if before != RunEnergy::new(&run.energy, None) {
                self.show(&id, Change::Figures(id.clone()));
            }
        }
    }

    /// Looks at whether every run will be done by its deadline.
    async fn weigh_deadlines(&mut self) {
        // The configuration was checked when it was read.
        let Ok(times) = Windows::open_unless_given(&self.options.config.window.times) else { return };
        let now = Timestamp::try_from(self.options.clock.wall()).unwrap_or(Timestamp::UNIX_EPOCH);
        let now = now.to_zoned_datetime(TimeZone::system());
        let mut changed = Vec::new();
        let due = self.runs.iter_mut().filter(|(_, run)| run.record.deadline_us > 0);
        for (id, Run { record, .. }) in due.filter(|(_, run)| !run.record.condition.state.is_over()) {
            let deadline = i64::try_from(record.deadline_us).unwrap_or(i64::MAX);
            let deadline = Timestamp::from_microsecond(deadline).unwrap_or(Timestamp::MAX);
            let left = record.remaining_seconds().map(Duration::from_secs);
            let at_risk = deadline::at_risk(left, deadline, &times, &now, record.deadline_at_risk);
            if at_risk != record.deadline_at_risk {
                record.deadline_at_risk = at_risk;
                changed.push(id.clone());
            }
        }
        for id in changed {
            self.write_figures(&id, true).await;
            self.show(&id, Change::Figures(id.clone()));
        }
    }

    // ── What follows ────────────────────────────────────────────────────────────────────────────────────────────────

    /// Does what the scheduler says, and answers who waited for it. Called after everything that may have changed its
    /// mind.
    async fn schedule(&mut self) {
        self.pace_plan().await;
        self.take_turn().await;
        if self.is_device_free()
            && let Some((_, waiting)) = &mut self.asleep
        {
            waiting.drain(..).for_each(|done| done.send(()).unwrap_or_default());
        }
        self.grant_leases();
    }

    /// Whether no worker is there, of a run or of a plan.
    fn is_device_free(&self) -> bool {
        self.active.is_none() && self.surveys().is_none()
    }

    async fn take_turn(&mut self) {
        if self.stopping.is_some() {
            if self.is_device_free()
                && let Some((_, waiting)) = &mut self.stopping
            {
                waiting.drain(..).for_each(|done| done.send(()).unwrap_or_default());
            }
            return self.show_status();
        }
        self.pause_when_spent().await;
        let now = Instant::now();
        let (hold, release) = self.held();
        let active = self.active.as_ref().and_then(|active| {
            let record = &self.runs.get(&active.id)?.record;
            let stopping = record.condition.state == State::Saving;
            Some(Active { id: active.id.clone(), priority: record.priority, stopping })
        });
        let device_free = self.is_device_free();
        // A disk that refuses a record would refuse the next one.
        let disk = self.runs.values().all(|run| !run.unsaved);
        let candidates: Vec<Candidate> = self
            .runs
            .values()
            .filter(|run| active.as_ref().is_none_or(|active| active.id != run.record.id))
            .filter(|run| !run.record.condition.state.is_over())
            .map(|run| Candidate {
                id: run.record.id.clone(),
                priority: run.record.priority,
                deadline: Some(run.record.deadline_us).filter(|deadline| *deadline > 0),
                submitted: run.record.submitted,
                ready: disk && run.ready(now),
            })
            .collect();
        let turn = turn(&candidates, active.as_ref(), hold);
        match &turn {
            Turn::Begin(id) if device_free => self.begin(&id.clone()).await,
            Turn::Wait(id, reason) => self.hold(&id.clone(), *reason).await,
            Turn::Preempt(_) => self.give_up_device(Reason::Preempted).await,
            Turn::Park(reason) => self.park(*reason, release).await,
            Turn::Go => self.go_on().await,
            Turn::Begin(_) | Turn::Idle | Turn::Stopping => {}
        }
        // Those that were next and no longer are go back to the queue.
        let chosen = match &turn {
            Turn::Begin(id) | Turn::Wait(id, _) => Some(id),
            _ => None,
        };
        let back: Vec<RunId> = candidates
            .iter()
            .filter(|candidate| candidate.ready && Some(&candidate.id) != chosen)
            .filter(|candidate| {
                self.runs.get(&candidate.id).is_some_and(|run| run.record.condition.state == State::Waiting)
            })
            .map(|candidate| candidate.id.clone())
            .collect();
        for id in back {
            self.happened(&id, Event::Requeue).await;
        }
        self.show_status();
    }

    async fn hold(&mut self, id: &RunId, reason: Reason) {
        let as_is = |run: &Run| {
            run.record.condition.state == State::Waiting && run.record.condition.reason == Some(reason)
        };
        if !self.runs.get(id).is_some_and(as_is) {
            self.happened(id, Event::Hold(reason)).await;
        }
    }

    fn ruling(&self) -> Ruling {
        self.options.governor.ruling(self.options.clock.monotonic())
    }

    /// A run that has used up its own energy is paused, with that reason, until a person resumes it.
    async fn pause_when_spent(&mut self) {
        let Some(spent) = self.ruling().spent else { return };
        let running = |run: &Run| run.record.condition.state == State::Running;
        let active = self.active.as_ref().is_some_and(|active| active.id == spent);
        if active && self.runs.get(&spent).is_some_and(running) {
            self.happened(&spent, Event::Stop(Then::Pause, Reason::EnergyQuota)).await;
            self.stop_worker(&spent, Reason::EnergyQuota);
        }
    }

    /// Why nothing may compute, and whether memory is to be given back at once.
    fn held(&self) -> (Option<Reason>, bool) {
        let ruling = self.ruling();
        // What a GPU keeps over a sleep is the driver's business: no worker is left to find out.
        let release = self.asleep.is_some() || self.holders.values().any(|holder| holder.release);
        (self.claimed().or(ruling.hold), release || (ruling.hold.is_some() && ruling.release))
    }

    /// Why nothing may compute, whatever the governor says: the machine sleeps, or somebody has it.
    fn claimed(&self) -> Option<Reason> {
        match &self.asleep {
            Some((reason, _)) => Some(*reason),
            None if self.holders.values().any(|holder| holder.lease) => Some(Reason::Leased),
            None => (!self.holders.is_empty()).then_some(Reason::Inhibited),
        }
    }

    async fn park(&mut self, reason: Reason, release: bool) {
        let Some(active) = &mut self.active else { return };
        if active.parked.is_none() {
            active.holds += 1;
        }
        active.session.pace(Pace { run: false, duty: 1.0, hold: active.holds });
        active.share.paced(None);
        let now = self.options.clock.monotonic();
        let parked = *active.parked.get_or_insert_with(|| Parked { since: Instant::now(), held_since: now });
        let id = active.id.clone();
        let state = self.runs.get(&id).map(|run| run.record.condition.state);
        let impatient = match state {
            Some(State::Preparing) => parked.since.elapsed() >= PREPARING_GRACE,
            _ => now.saturating_sub(parked.held_since) >= self.options.config.worker.keep_when_held,
        };
        if release || impatient {
            return self.give_up_device(reason).await;
        }
        if matches!(state, Some(State::Running | State::Waiting)) {
            self.hold(&id, reason).await;
        }
    }

    async fn go_on(&mut self) {
        let duty = self.ruling().duty;
        let Some(active) = &mut self.active else { return };
        active.session.pace(Pace { run: true, duty, hold: 0 });
        active.share.paced(Some(duty));
        let id = active.id.clone();
        if active.parked.take().is_some() {
            if let Some(run) = self.runs.get_mut(&id) {
                run.last_step = None;
            }
            if self.runs.get(&id).is_some_and(|run| run.record.condition.state == State::Waiting) {
                self.happened(&id, Event::Training).await;
            }
        }
    }

    async fn give_up_device(&mut self, reason: Reason) {
        let Some(id) = self.active.as_ref().map(|active| active.id.clone()) else { return };
        self.happened(&id, Event::Stop(Then::Requeue, reason)).await;
        self.stop_worker(&id, reason);
    }

    /// Begins an attempt.
    async fn begin(&mut self, id: &RunId) {
        let attempts = self.options.config.worker.attempts;
        let now_us = wall_us(&*self.options.clock);
        let Some(run) = self.runs.get_mut(id) else { return };
        if run.record.fruitless >= attempts {
            // Every one of these attempts ended without a word: the daemon or the machine went down with it.
            let message = format!(
                "{attempts} attempts in a row began at step {} and got no further, and each time the daemon or the \
                 machine went down: look into the system's log for why, then submit the run again",
                run.record.position.step
            );
            return self.fail(id, Reason::Crashed, message).await;
        }
        let directory = self.layout.run(id);
        let path = directory.join("spec.resolved.toml");
        let read = on_disk(move || {
            std::fs::read_to_string(&path).map_err(|error| FileError::new("read", &path, error))
        });
        let spec = match read.await {
            Ok(spec) => spec,
            Err(error) => {
                // It may pass: too many open files, a disk that recovers.
                tracing::warn!(RUN_ID = %id, "{error}");
                if let Some(run) = self.runs.get_mut(id) {
                    run.record.message = error.to_string();
                    run.not_before = Some(Instant::now() + STORAGE_BACKOFF);
                }
                return self.hold(id, Reason::Storage).await;
            }
        };
        let Some(run) = self.runs.get_mut(id) else { return };
        run.record.attempts += 1;
        run.record.fruitless += 1;
        if run.record.started_us == 0 {
            run.record.started_us = now_us;
        }
        run.not_before = None;
        self.happened(id, Event::Begin).await;
        if self.runs.get(id).is_none_or(|run| run.unsaved) {
            // Not durable: the attempt must not begin. `tick` tries again, and the run then waits.
            if let Some(run) = self.runs.get_mut(id)
                && let Ok(condition) = run.record.condition.after(Event::Lost(Reason::Storage))
            {
                run.record.condition = condition;
                run.record.attempts -= 1;
                run.record.fruitless -= 1;
            }
            return;
        }
        let start = Start {
            version: crate::worker::protocol::VERSION,
            run: id.to_string(),
            spec,
            directory,
            cache: self.options.config.storage.cache_directory.clone(),
            threads: self.options.config.worker.threads,
            survey: None,
        };
        let (session, events) = session::start(
            self.options.launcher.clone(),
            self.options.workers_clock.clone(),
            start,
            self.options.config.worker.clone(),
        );
        let (id, inbox) = (id.clone(), self.events.clone());
        self.active = Some(ActiveRun {
            id: id.clone(),
            session,
            parked: None,
            holds: 0,
            still: 0,
            checkpoints: HashMap::new(),
            evaluations: HashMap::new(),
            share: Share::default(),
        });
        tokio::spawn(forward(id, events, inbox));
    }

    /// Fails a run that has no worker.
    async fn fail(&mut self, id: &RunId, reason: Reason, message: String) {
        let Some(run) = self.runs.get_mut(id) else { return };
        run.record.message = message;
        self.happened(id, Event::Fail(reason)).await;
    }

    /// Applies an event of the daemon's own to a run.
    async fn happened(&mut self, id: &RunId, event: Event) {
        match self.change(id, event).await {
            Ok(_) => {}
            Err(RequestError::Storage(error)) => {
                tracing::error!(RUN_ID = %id, "{error}; the change is kept in memory and tried again");
            }
            // A defect of ours: the state stays as it is, and legal.
            Err(error) => tracing::error!(RUN_ID = %id, ?event, "{error}"),
        }
    }

    /// Applies an event; the condition before it. Durable and visible when this returns `Ok`. A client's request that
    /// the disk refuses changes nothing; an event of our own stands, and is made durable later.
    async fn change(&mut self, id: &RunId, event: Event) -> Result<super::state::Condition, RequestError> {
        let now_us = wall_us(&*self.options.clock);
        let run = self.runs.get_mut(id).ok_or_else(|| RequestError::NoSuchRun(id.to_string()))?;
        let before = run.record.clone();
        let condition = before.condition.after(event)?;
        let record = &mut run.record;
        record.condition = condition;
        record.sequence += 1;
        record.changed_us = now_us;
        if condition.state.is_over() {
            record.finished_us = now_us;
        }
        let written = record.clone();
        let directory = self.layout.run(id);
        let saved = on_disk(move || written.commit(&directory)).await;
        let run = self.runs.get_mut(id).ok_or_else(|| RequestError::NoSuchRun(id.to_string()))?;
        match (saved, event) {
            (Ok(()), _) => {
                run.unsaved = false;
                run.saved_at = Instant::now();
                self.show(id, Change::State(id.clone()));
                Ok(before.condition)
            }
            (Err(error), Event::Ask(_)) => {
                run.record = before;
                // The record may have reached the disk and only its line not: write the old one over it.
                run.unsaved = true;
                Err(error)
            }
            (Err(error), _) => {
                run.unsaved = true;
                Err(error)
            }
        }
    }

    /// Writes a record that the disk refused before.
    async fn save(&mut self, id: &RunId) {
        let Some(run) = self.runs.get_mut(id) else { return };
        run.record.sequence += 1;
        let written = run.record.clone();
        let directory = self.layout.run(id);
        match on_disk(move || written.commit(&directory)).await {
            Ok(()) => {
                if let Some(run) = self.runs.get_mut(id) {
                    run.unsaved = false;
                    run.saved_at = Instant::now();
                }
                self.show(id, Change::State(id.clone()));
            }
            Err(error) => tracing::debug!(RUN_ID = %id, "{error}"),
        }
    }

    /// Writes the figures now and then, so that a daemon that comes back shows them before a worker does.
    async fn write_figures(&mut self, id: &RunId, now: bool) {
        let Some(run) = self.runs.get_mut(id) else { return };
        if run.unsaved || (!now && run.saved_at.elapsed() < FIGURES) {
            return;
        }
        run.saved_at = Instant::now();
        let written = run.record.clone();
        let directory = self.layout.run(id);
        if let Err(error) = on_disk(move || written.write(&directory)).await {
            tracing::warn!(RUN_ID = %id, "{error}");
        }
    }

    /// Adds a line to a run's journal. Notes are for people: a disk that refuses one is worth a warning.
    async fn note(&mut self, id: &RunId, kind: Kind, message: String) {
        let Some(run) = self.runs.get(id) else { return };
        let entry = Entry {
            time_us: wall_us(&*self.options.clock),
            kind,
            sequence: None,
            state: None,
            reason: None,
            step: Some(run.record.figures.step),
            message,
        };
        let directory = self.layout.run(id);
        if let Err(error) = on_disk(move || record::append(&directory, &entry)).await {
            tracing::warn!(RUN_ID = %id, "{error}");
        }
    }

    /// Makes a run's record visible.
    fn show(&mut self, id: &RunId, change: Change) {
        let Some(run) = self.runs.get(id) else { return };
        if run.unsaved {
            return;
        }
        self.handle.board().runs.insert(id.clone(), run.view());
        self.options.governor.stands(id, run.news());
        self.tell(change);
    }

    /// Makes the daemon's own status visible.
    fn show_status(&mut self) {
        let unfinished = self.runs.values().filter(|run| !run.record.condition.state.is_over());
        let (mut count, mut waiting) = (0, None);
        for run in unfinished {
            count += 1;
            if run.record.condition.state == State::Waiting {
                waiting = waiting.or(run.record.condition.reason);
            }
        }
        let active = self.active.as_ref().map(|active| active.id.clone());
        let parked = active.as_ref().and_then(|id| self.runs.get(id));
        let parked = parked.is_some_and(|run| run.record.condition.state == State::Waiting);
        let (state, reason) = match &self.stopping {
            Some((reason, _)) => ("stopping", Some(*reason)),
            None if active.is_some() && !parked => ("active", None),
            None if waiting.is_some() => ("waiting", waiting),
            None => ("idle", None),
        };
        // A worker that prepares or saves computes, too; only a parked one does not.
        let computes = active.as_ref().and_then(|id| self.runs.get(id));
        let computes = computes.is_some_and(|run| run.record.condition.state != State::Waiting);
        let planned = self.surveys().map(|_| energy::plans());
        let computing = active.as_ref().filter(|_| computes).or(planned.as_ref());
        self.options.governor.computes(computing, self.doing());
        let mut board = self.handle.board();
        let device = board.status.device.clone();
        let status = Status { active, state, reason, device, unfinished: count };
        if board.status != status {
            board.status = status;
            drop(board);
            self.tell(Change::Status);
        }
    }

    /// What is done with the time, for the night's account.
    fn doing(&self) -> Doing {
        let active = self.active.as_ref().and_then(|active| self.runs.get(&active.id));
        if let Some(run) = active {
            return run.doing();
        }
        if let Some((reason, _)) = &self.stopping {
            return Doing::Waiting(*reason);
        }
        let unfinished = || self.runs.values().filter(|run| !run.record.condition.state.is_over());
        let reason_in = |state: State| {
            unfinished()
                .map(|run| run.record.condition)
                .find(|condition| condition.state == state)
                .map(|condition| condition.reason.unwrap_or(Reason::User))
        };
        let reason = if let Some(reason) = reason_in(State::Waiting) {
            reason
        } else if unfinished().any(|run| run.unsaved) {
            Reason::Storage
        } else if unfinished().any(|run| run.record.condition.state == State::Queued) {
            Reason::Backoff
        } else {
            reason_in(State::Paused).unwrap_or(Reason::NoRun)
        };
        Doing::Waiting(reason)
    }

    fn tell(&self, change: Change) {
        // Nobody listening is fine.
        let _ = self.handle.changes.send(change);
    }
}

impl Record {
    /// Notes that the run is known to have got this far; attempts before it were not in vain.
    fn advance(&mut self, position: Position) {
        if position > self.position {
            self.position = position;
            // The attempt that got here counts itself again when it began.
            self.fruitless = self.fruitless.min(1);
        }
    }
}

impl Figures {
    /// Takes the time between two steps into the average.
    fn paced(&mut self, before: Option<Mark>, now: Mark) {
        let Some(before) = before.filter(|before| before.step < now.step) else { return };
        let seconds = (now.at - before.at).as_secs_f64() / (now.step - before.step) as f64;
        self.seconds_per_step = Some(match self.seconds_per_step {
            Some(average) => average + (seconds - average) / 8.0,
            None => seconds,
        });
    }
}

/// Puts a run's directory together.
fn take(
    submission: &Submission,
    incoming: &Path,
    place: &Path,
    store: &Path,
    models: &Models,
    limits: &crate::config::daemon::LimitsConfig,
) -> Result<inputs::Taken, RequestError> {
    let storage = |error: FileError| RequestError::Storage(error.to_string());
    std::fs::create_dir(incoming).map_err(|error| storage(FileError::new("create", incoming, error)))?;
    let taken = inputs::take(submission, incoming, place, store, models, limits)?;
    let write = |name: &str, text: &str| {
        crate::checkpoint::atomic_write(&incoming.join(name), text.as_bytes()).map_err(storage)
    };
    write("spec.toml", &submission.spec)?;
    write("spec.resolved.toml", &taken.spec.to_toml())?;
    Ok(taken)
}

/// Makes a directory that was put together a run: all of it, or nothing.
fn publish(record: &Record, incoming: &Path, place: &Path) -> Result<(), FileError> {
    record.commit(incoming)?;
    let fail = |source| FileError::new("publish", place, source);
    std::fs::rename(incoming, place).map_err(fail)?;
    sync_parent(place).map_err(|error| {
        // Refused is refused: the next daemon must not find a run there.
        let _ = std::fs::rename(place, incoming);
        fail(error)
    })
}

fn sync_parent(path: &Path) -> std::io::Result<()> {
    path.parent().map_or(Ok(()), |parent| File::open(parent)?.sync_all())
}

/// Runs disk work on the blocking pool.
async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
) -> Result<T, RequestError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| RequestError::Storage(error.to_string())),
        Err(error) => Err(RequestError::Failed(format!("a thread of the daemon failed: {error}"))),
    }
}

/// Passes on what a session says.
async fn forward(id: RunId, mut events: mpsc::Receiver<SessionEvent>, inbox: mpsc::Sender<Message>) {
    let mut ended = false;
    while let Some(event) = events.recv().await {
        ended |= matches!(event, SessionEvent::Ended(_));
        if inbox.send(Message::Session(id.clone(), event)).await.is_err() {
            return;
        }
    }
    if !ended {
        // A defect of the session's; the run must not hang on it.
        let message = "the daemon's side of the worker has failed".into();
        let event = SessionEvent::Ended(Ended::Failed { reason: Reason::Crashed, message, retry: true });
        let _ = inbox.send(Message::Session(id, event)).await;
    }
}

/// Waits until nobody holds the other end of a pipe.
async fn released(ours: tokio::net::unix::pipe::Receiver) {
    let mut ignored = [0; 64];
    loop {
        if ours.readable().await.is_err() {
            return;
        }
        match ours.try_read(&mut ignored) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// Microseconds since 1970.
fn wall_us(clock: &dyn Clock) -> u64 {
    clock.wall().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}
