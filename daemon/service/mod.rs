//! The daemon as a service: configuration, log, notification, signals, bus.
//!
//! ```text
//!   configuration ─► log ─► lock on the state directory ─► runs ─► bus ─► READY
//!                                                                          │
//!             ┌───────────────── serving ◄─────────────────────────────────┘
//!   SIGHUP    │ │ changes ─► log, status      watchdog ─► heartbeat of the runs' owner
//!   reload ◄──┘ │
//!               │ SIGTERM, SIGINT, or the bus is lost
//!               ▼
//!            stopping: the active run is saved, clients still see it ─► bus ends ─► end
//!               │ a second signal: end at once; the last checkpoint is intact
//! ```

mod budget;
mod governing;
mod log;
mod logind;
mod messages;
mod nights;
mod notify;
mod transitions;

use crate::bus::{Endpoint, LogSwitch, ServeError, Server, Service};
use crate::checkpoint::{LockError, OutputLock};
use crate::clock::simulated::{ClockFileError, SimulatedClock};
use crate::clock::{Clock, SystemClock};
use crate::config::daemon::{DaemonConfig, Launch, WorkerConfig};
use crate::config::settings::Layers;
use crate::config::{ConfigError, Loaded, Mode};
use crate::governor::View;
use crate::reason::Reason;
use crate::runs::{self, Change, Runs};
use crate::worker::launch::{ChildLauncher, Launcher, SocketLauncher};
use crate::worker::priorities::Priorities;
use budget::Keeper;
use governing::Governing;
use log::Log;
use notify::{Notifier, Watchdog, status_text};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use transitions::Transitions;

/// How often the service manager is asked for more time while a run is saved, and how much it is asked for.
const EXTEND_EVERY: Duration = Duration::from_secs(5);
const EXTEND_BY: Duration = Duration::from_secs(30);
/// How often the status line may change.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// Longest wait for threads that still copy when the daemon ends.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// What the command line says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceArguments {
    /// Read this file instead of the installed ones.
    pub config: Option<PathBuf>,
    /// Serve on the session bus.
    pub session: bool,
    /// Serve peers at these addresses.
    pub peers: Vec<String>,
    /// Replaces `storage.state_directory`.
    pub state_directory: Option<PathBuf>,
    /// Replaces `storage.cache_directory`.
    pub cache_directory: Option<PathBuf>,
    /// Where sysfs, procfs and the board's files are looked for; `/` when absent.
    pub sysfs_root: Option<PathBuf>,
    /// A file whose time governs instead of the machine's, beside a simulated board.
    pub simulated_clock: Option<PathBuf>,
}

impl ServiceArguments {
    /// One user's daemon, or the machine's.
    pub fn mode(&self) -> Mode {
        if self.session || !self.peers.is_empty() { Mode::Session } else { Mode::System }
    }

    /// Where is served: the system bus, unless something else is asked for.
    fn endpoints(&self) -> Vec<Endpoint> {
        let mut endpoints: Vec<Endpoint> = self.peers.iter().cloned().map(Endpoint::Peer).collect();
        match self.mode() {
            Mode::System => endpoints.push(Endpoint::System),
            Mode::Session if self.session => endpoints.push(Endpoint::Session),
            Mode::Session => {}
        }
        endpoints
    }

    /// The configuration with what the command line replaces.
    fn load(&self) -> Result<Loaded, ConfigError> {
        let replaced = |name: &str| match name {
            // A directory of the command line need not be known otherwise, for want of HOME.
            "STATE_DIRECTORY" if self.state_directory.is_some() => {
                self.state_directory.clone().map(PathBuf::into_os_string)
            }
            "CACHE_DIRECTORY" if self.cache_directory.is_some() => {
                self.cache_directory.clone().map(PathBuf::into_os_string)
            }
            name => std::env::var_os(name),
        };
        let mut loaded = Loaded::load(self.config.as_deref(), self.mode(), &replaced)?;
        if let Some(directory) = &self.state_directory {
            loaded.config.storage.state_directory = directory.clone();
        }
        if let Some(directory) = &self.cache_directory {
            loaded.config.storage.cache_directory = directory.clone();
        }
        Ok(loaded)
    }

    /// The time by which is governed and recorded.
    fn clock(&self) -> Result<Arc<dyn Clock>, ClockFileError> {
        Ok(match &self.simulated_clock {
            Some(path) => Arc::new(SimulatedClock::open(path)?),
            None => Arc::new(SystemClock::new()),
        })
    }
}

/// Why the daemon does not run, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// No log.
    #[error("cannot start the log: {0}")]
    Log(String),
    /// Something of the process: the runtime, signals, the service manager's socket.
    #[error("cannot {action}: {source}")]
    Process {
        /// Operation, as a verb.
        action: &'static str,
        /// The system's words.
        source: io::Error,
    },
    /// A directory cannot be used.
    #[error(
        "cannot use the directory {path}: {source}; give another one, with --state-dir, --cache-dir or in [storage]",
        path = .path.display()
    )]
    Directory {
        /// Which.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// Another daemon.
    #[error(
        "another finetuned{} works on {directory}; stop it first, or give this one another --state-dir",
        .pid.map_or(String::new(), |pid| format!(" (process {pid})")),
        directory = .directory.display()
    )]
    Locked {
        /// The state directory.
        directory: PathBuf,
        /// The other one, where known.
        pid: Option<u32>,
    },
    /// The runs.
    #[error("cannot take up the runs in {directory}: {why}", directory = .directory.display())]
    Runs {
        /// The state directory.
        directory: PathBuf,
        /// What is in the way.
        why: String,
    },
    /// The bus.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The file of a simulated clock.
    #[error(transparent)]
    Clock(#[from] ClockFileError),
}

/// Runs the daemon until it is told to end.
///
/// # Errors
/// [`ServiceError`]: at the start, and when the bus is lost; the active run is saved then, too.
pub fn run(arguments: ServiceArguments) -> Result<(), ServiceError> {
    let files = match arguments.load() {
        Ok(files) => files,
        Err(error) => {
            // For the journal; a person at a terminal reads the error that is returned.
            if under_systemd() && log::listen("info", None, true).is_ok() {
                refuse(&error);
            }
            return Err(error.into());
        }
    };
    let directives = ["FINETUNED_LOG", "RUST_LOG"].iter().find_map(|name| std::env::var(name).ok());
    let log = log::listen(&files.config.log.level, directives, under_systemd()).map_err(ServiceError::Log)?;
    let fail = |action| move |source| ServiceError::Process { action, source };
    let notifier =
        Notifier::new(std::env::var_os("NOTIFY_SOCKET")).map_err(fail("reach the service manager"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(fail("start the runtime"))?;
    let ended = runtime.block_on(serve(&arguments, files, log, notifier));
    // A copy from a file system that hangs must not hold the daemon.
    runtime.shutdown_timeout(LAST_WAIT);
    ended
}

/// Whether standard error goes to the journal.
fn under_systemd() -> bool {
    std::env::var_os("JOURNAL_STREAM").is_some()
}

fn refuse(error: impl std::fmt::Display) {
    for line in error.to_string().lines() {
        tracing::error!(MESSAGE_ID = messages::CONFIGURATION_REFUSED, "the configuration is refused: {line}");
    }
}

async fn serve(
    arguments: &ServiceArguments,
    files: Loaded,
    log: Arc<Log>,
    mut notifier: Notifier,
) -> Result<(), ServiceError> {
    // Before anything that takes time: a signal from here on is answered, not deadly.
    let mut signals = Signals::listen()?;
    let _lock = lock(&files.config)?;
    let layers = Layers::open(files, arguments.mode());
    budget::warn_of_loss(&layers);
    let config = layers.config();
    let heartbeat = Arc::new(AtomicU64::new(0));
    let root = arguments.sysfs_root.clone().unwrap_or_else(|| PathBuf::from("/"));
    let clock = arguments.clock()?;
    let governing = Governing::start(&config, root, clock.clone())
        .map_err(|source| ServiceError::Process { action: "start the governor", source })?;
    let runs = start_runs(&config, &governing, clock.clone(), heartbeat.clone())?;
    let keeper = Keeper::new(layers, governing.dial.clone(), runs.clone(), clock);
    let guard = tokio::spawn(logind::guard(runs.clone()));
    let service = Service::new(
        runs.clone(),
        governing.view.clone(),
        keeper.clone(),
        config.authorization.clone(),
        &config.limits,
        log.clone(),
    )
    .with_nights(governing.nights.clone());
    let mut server = match Server::start(&arguments.endpoints(), service).await {
        Ok(server) => server,
        Err(error) => {
            runs.shutdown(Reason::Shutdown).await;
            return Err(error.into());
        }
    };
    let watchdog = sd_notify::watchdog_enabled().map(|period| (period / 2, Watchdog::new(heartbeat)));
    let mut follower = Follower::new(&runs, governing.view.clone(), watchdog);
    notifier.ready();
    notifier.status(follower.status(&runs));
    tracing::info!(
        MESSAGE_ID = messages::DAEMON_STARTED,
        "finetuned {} serves {}",
        env!("CARGO_PKG_VERSION"),
        arguments.endpoints().iter().map(Endpoint::to_string).collect::<Vec<_>>().join(", ")
    );

    let mut config = config;
    let lost = loop {
        tokio::select! {
            asked = signals.next() => match asked {
                Asked::End => break None,
                Asked::Reload => {
                    notifier.reloading();
                    reload(arguments, &mut config, &log, &runs, &keeper).await;
                    notifier.ready();
                }
            },
            error = server.failed() => break Some(error),
            () = follower.follow(&runs, &mut notifier) => {}
        }
    };

    notifier.stopping();
    match &lost {
        None => {
            tracing::info!(MESSAGE_ID = messages::DAEMON_STOPPING, "told to end; the active run is saved")
        }
        Some(error) => {
            tracing::error!(MESSAGE_ID = messages::DAEMON_STOPPING, %error, "the active run is saved")
        }
    }
    if save(&runs, &mut signals, &mut follower, &mut notifier).await {
        server.stop().await;
    } else {
        tracing::warn!("told to end a second time: the work since the last checkpoint is lost");
    }
    // Not before: the machine waits for what is being saved.
    guard.abort();
    governing.end();
    lost.map_or(Ok(()), |error| Err(error.into()))
}

/// Has the active run saved; false when a further signal did not let it.
async fn save(runs: &Runs, signals: &mut Signals, follower: &mut Follower, notifier: &mut Notifier) -> bool {
    let shutdown = runs.shutdown(Reason::Shutdown);
    tokio::pin!(shutdown);
    let mut extend = interval(EXTEND_EVERY);
    loop {
        tokio::select! {
            () = &mut shutdown => return true,
            asked = signals.next() => {
                if asked == Asked::End {
                    return false;
                }
            }
            _ = extend.tick() => notifier.extend(EXTEND_BY),
            () = follower.follow(runs, notifier) => {}
        }
    }
}

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// SIGTERM, SIGINT.
    End,
    /// SIGHUP.
    Reload,
}

/// The signals that the daemon answers.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    reload: Signal,
}

impl Signals {
    fn listen() -> Result<Signals, ServiceError> {
        let listen = |kind| {
            signal(kind).map_err(|source| ServiceError::Process { action: "listen to signals", source })
        };
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            reload: listen(SignalKind::hangup())?,
        })
    }

    /// The next signal.
    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::End,
            _ = self.interrupt.recv() => Asked::End,
            _ = self.reload.recv() => Asked::Reload,
        }
    }
}

/// What goes on beside the requests: the log of what happens to the runs, the status line, the watchdog.
struct Follower {
    changes: broadcast::Receiver<Change>,
    governor: watch::Receiver<Arc<View>>,
    transitions: Transitions,
    /// Something has changed since the status line was written.
    stale: bool,
    status: tokio::time::Interval,
    watchdog: Option<(tokio::time::Interval, Watchdog)>,
    silent: bool,
}

impl Follower {
    fn new(
        runs: &Runs,
        governor: watch::Receiver<Arc<View>>,
        watchdog: Option<(Duration, Watchdog)>,
    ) -> Follower {
        let every = |period: Duration| {
            let mut ticks = tokio::time::interval_at(Instant::now() + period, period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        };
        Follower {
            changes: runs.changes(),
            governor,
            transitions: Transitions::new(runs),
            stale: false,
            status: every(STATUS_EVERY),
            watchdog: watchdog
                .map(|(period, watchdog)| (every(period.max(Duration::from_millis(1))), watchdog)),
            silent: false,
        }
    }

    fn status(&self, runs: &Runs) -> String {
        let status = runs.status();
        let active = status.active.as_ref().and_then(|id| runs.view(id).ok());
        let temperature = self.governor.borrow().temperature.map(|(now, _)| now);
        status_text(&status, active.as_ref(), temperature)
    }

    /// Waits for the next thing to do and does it. May be dropped while it waits.
    async fn follow(&mut self, runs: &Runs, notifier: &mut Notifier) {
        let fed = async {
            match &mut self.watchdog {
                Some((ticks, watchdog)) => {
                    ticks.tick().await;
                    watchdog.beats()
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            change = self.changes.recv() => {
                match change {
                    Ok(change) => self.transitions.note(&change, runs),
                    Err(RecvError::Lagged(_)) => self.transitions.look_everywhere(runs),
                    // The owner is gone, which only happens at the end.
                    Err(RecvError::Closed) => std::future::pending().await,
                }
                self.stale = true;
            }
            _ = self.status.tick(), if self.stale => {
                self.stale = false;
                notifier.status(self.status(runs));
            }
            alive = fed => {
                if alive {
                    notifier.alive();
                } else if !self.silent {
                    tracing::error!("the owner of the runs makes no turns: the watchdog is not fed");
                }
                self.silent = !alive;
            }
        }
    }
}

/// One daemon at a time works on a state directory.
fn lock(config: &DaemonConfig) -> Result<OutputLock, ServiceError> {
    for path in [&config.storage.state_directory, &config.storage.cache_directory] {
        // Other users have no business here. Directories that are there keep their mode: systemd has set it.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|source| ServiceError::Directory { path: path.clone(), source })?;
    }
    OutputLock::acquire(&config.storage.state_directory).map_err(|error| match error {
        LockError::Held { directory, pid } => ServiceError::Locked { directory, pid },
        LockError::Io { directory, source } => ServiceError::Directory { path: directory, source },
    })
}

fn start_runs(
    config: &DaemonConfig,
    governing: &Governing,
    clock: Arc<dyn Clock>,
    heartbeat: Arc<AtomicU64>,
) -> Result<Runs, ServiceError> {
    let launcher: Arc<dyn Launcher> = match &config.worker.launch {
        Launch::Child => {
            let priorities =
                Priorities { nice: config.worker.nice, oom_score_adjust: config.worker.oom_score_adjust };
            let launcher = ChildLauncher::of_this_program(priorities);
            let find = |source| ServiceError::Process { action: "find this program for workers", source };
            Arc::new(launcher.map_err(find)?)
        }
        Launch::Socket(path) => Arc::new(SocketLauncher::new(path.clone())),
    };
    let options = runs::Options {
        config: config.clone(),
        launcher,
        clock,
        workers_clock: Arc::new(SystemClock::new()),
        governor: governing.door.clone(),
        heartbeat,
    };
    runs::start(options).map_err(|error| ServiceError::Runs {
        directory: config.storage.state_directory.clone(),
        why: error.to_string(),
    })
}

/// Reads the configuration again. What cannot change while the daemon runs is told; with a mistake nothing changes.
async fn reload(
    arguments: &ServiceArguments,
    config: &mut DaemonConfig,
    log: &Log,
    runs: &Runs,
    keeper: &Keeper,
) {
    let files = match arguments.load() {
        Ok(files) => files,
        Err(error) => return refuse(&error),
    };
    let new = match keeper.reload(files).await {
        Ok(new) => new,
        Err(problem) => return refuse(problem),
    };
    for key in config.differences(&new) {
        if key == "log.level" {
            let changed = new.log.level.parse().map_err(|_| "no level".to_string());
            match changed.and_then(|level| log.set_level(level)) {
                Ok(()) => config.log.level = new.log.level.clone(),
                Err(error) => tracing::error!(error, "the level of the log stays as it was"),
            }
        } else if !takes_effect_at_once(&key) {
            tracing::warn!("{key} has changed, and takes effect with the next start of the daemon");
        }
    }
    config.budget = new.budget.clone();
    config.window = new.window.clone();
    config.conditions = new.conditions.clone();
    match runs.configure(new.clone()).await {
        Ok(()) => {
            config.limits = new.limits;
            config.worker = WorkerConfig { launch: config.worker.launch.clone(), ..new.worker };
            config.storage.model_directories = new.storage.model_directories;
        }
        Err(error) => tracing::error!("limits, worker and models stay as they were: {error}"),
    }
    tracing::info!("the configuration was read again");
}

/// Whether [`Runs::configure`] takes a key over. The limit of waiting calls is the bus's, and nice level and
/// out-of-memory score are the launcher's.
fn takes_effect_at_once(key: &str) -> bool {
    let kept = ["limits.waits_per_sender", "worker.launch", "worker.nice", "worker.oom_score_adjust"];
    let live = ["limits.", "worker.", "budget.", "window.", "conditions."];
    let live = live.iter().any(|section| key.starts_with(section)) || key == "storage.model_directories";
    live && !kept.contains(&key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(dir: &std::path::Path) -> ServiceArguments {
        std::fs::write(dir.join("finetuned.toml"), "[log]\nlevel = \"warn\"\n").unwrap();
        ServiceArguments {
            config: Some(dir.join("finetuned.toml")),
            peers: vec![format!("unix:path={}", dir.join("socket").display())],
            state_directory: Some(dir.join("state")),
            cache_directory: Some(dir.join("cache")),
            ..ServiceArguments::default()
        }
    }

    #[test]
    fn where_is_served_follows_the_flags() {
        let peers = vec!["unix:path=/run/x".to_string()];
        let peer = Endpoint::Peer("unix:path=/run/x".into());
        let none = ServiceArguments::default();
        assert_eq!((none.mode(), none.endpoints()), (Mode::System, vec![Endpoint::System]));
        let session = ServiceArguments { session: true, ..none.clone() };
        assert_eq!((session.mode(), session.endpoints()), (Mode::Session, vec![Endpoint::Session]));
        let alone = ServiceArguments { peers: peers.clone(), ..none };
        assert_eq!((alone.mode(), alone.endpoints()), (Mode::Session, vec![peer.clone()]));
        let both = ServiceArguments { peers, ..session };
        assert_eq!(both.endpoints(), [peer, Endpoint::Session]);
    }

    #[test]
    fn the_command_line_replaces_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let arguments = arguments(dir.path());
        let other = "[storage]\nstate_directory = \"/elsewhere\"\n";
        std::fs::write(dir.path().join("finetuned.toml"), other).unwrap();
        let config = arguments.load().unwrap().config;
        assert_eq!(config.storage.state_directory, dir.path().join("state"));
        assert_eq!(config.storage.cache_directory, dir.path().join("cache"));
    }

    #[test]
    fn a_second_daemon_is_told_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let config = arguments(dir.path()).load().unwrap().config;
        let _first = lock(&config).unwrap();
        let error = lock(&config).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("another finetuned (process {}) works on", std::process::id()))
                && error.contains("--state-dir"),
            "{error}"
        );
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::metadata(dir.path().join("state")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let mut blocked = config;
        blocked.storage.cache_directory = dir.path().join("finetuned.toml/below");
        let error = lock(&blocked).unwrap_err().to_string();
        assert!(error.contains("cannot use the directory") && error.contains("--cache-dir"), "{error}");
    }
}
