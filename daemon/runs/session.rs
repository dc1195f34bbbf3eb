//! A session: the daemon's side of one worker, from its start to the moment at which it is certainly gone.
//!
//! ```text
//!   launch ──► ready? ──► start ──► [ permits, orders ▼ ▲ reports ] ──► finished | failed ──► exit awaited ──► Ended
//!     │          │ 30 s                    │                                 │ 10 s
//!     ▼          ▼                         ├── silent for 15 s, or no progress in its phase ──► ABRT, KILL ──► Ended
//!   Ended      Ended                       ├── end of the stream, nonsense ──────────────────► KILL ───────► Ended
//!                                          └── told to stop while it prepares, for 2 s ──────► KILL ───────► Ended
//! ```
//!
//! The session says [`Event::Ended`] exactly once, last, and after the process has been waited for (a process that does
//! not even die of SIGKILL, in an uninterruptible call of a driver, is given up after a while and named in the log).
//! Whoever kills a worker loses at most the work since its last checkpoint: checkpoints appear whole or not at all.

use crate::clock::Clock;
use crate::config::daemon::WorkerConfig;
use crate::reason::Reason;
use crate::worker::launch::{Launcher, Process, Worker};
use crate::worker::protocol::{
    Beat, Failed, Finished, PERMIT, Permit, Phase, RENEWAL, Report, Request, SILENCE, Start, VERSION,
};
use crate::worker::wire::{Connection, WireError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, timeout};

/// Longest time from the launch to `ready`.
const READY: Duration = Duration::from_secs(30);

/// Longest silence of a worker that is there. It beats every second, from a thread of its own.
const QUIET: Duration = Duration::from_secs(15);

/// Longest time in [`Phase::Starting`]: an earlier worker of the run has this long to end.
const STARTING: Duration = Duration::from_secs(90);

/// A worker that prepares has nothing to save: told to stop, it gets this long.
const UNPREPARED: Duration = Duration::from_secs(2);

/// Longest time from the last word to the exit, and from SIGABRT to SIGKILL.
const EXIT: Duration = Duration::from_secs(10);

/// A worker that SIGKILL has not ended after this long hangs in the kernel.
const WEDGED: Duration = Duration::from_secs(60);

/// The daemon itself was stopped or suspended if its own ticks come this late.
const OVERSLEPT: Duration = Duration::from_secs(3);

/// What the worker is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Write a checkpoint.
    Checkpoint {
        /// Number of the request.
        request: u64,
    },
    /// Compute held-out loss.
    Evaluate {
        /// Number of the request.
        request: u64,
    },
    /// Save and end.
    Stop {
        /// Why.
        reason: Reason,
    },
}

/// What a session says.
#[derive(Debug)]
pub enum Event {
    /// From the worker.
    Report(Report),
    /// The worker is gone. The last event.
    Ended(Ended),
}

/// How a session ended.
#[derive(Debug)]
pub enum Ended {
    /// Well.
    Finished(Finished),
    /// Badly.
    Failed {
        /// The kind.
        reason: Reason,
        /// What was wrong, where, and what to do.
        message: String,
        /// Whether another attempt may do better.
        retry: bool,
    },
}

impl Ended {
    fn lost(reason: Reason, message: impl Into<String>) -> Ended {
        Ended::Failed { reason, message: message.into(), retry: true }
    }
}

/// The handle to a session.
#[derive(Debug)]
pub struct Session {
    orders: mpsc::UnboundedSender<Order>,
    pace: watch::Sender<Pace>,
}

/// What the permits say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// Whether the worker computes.
    pub run: bool,
    /// Share of the time, above 0 and at most 1.
    pub duty: f64,
    /// Number of the hold, of which the worker says that it is parked under it; zero where it computes.
    pub hold: u64,
}

impl Session {
    /// Tells the worker, when it listens. A session that has ended ignores it.
    pub fn order(&self, order: Order) {
        let _ = self.orders.send(order);
    }

    /// What the permits say from now on.
    pub fn pace(&self, pace: Pace) {
        self.pace.send_if_modified(|now| std::mem::replace(now, pace) != pace);
    }
}

/// Starts a worker and a session with it.
pub fn start(
    launcher: Arc<dyn Launcher>,
    clock: Arc<dyn Clock>,
    start: Start,
    config: WorkerConfig,
) -> (Session, mpsc::Receiver<Event>) {
    let (orders, order_box) = mpsc::unbounded_channel();
    let (set_pace, pace) = watch::channel(Pace { run: true, duty: 1.0, hold: 0 });
    let (events, event_box) = mpsc::channel(64);
    tokio::spawn(async move {
        let ended = match launcher.launch().await {
            Err(error) => Ended::lost(Reason::Launch, error.to_string()),
            Ok(Worker { connection, process }) => {
                let now = Instant::now();
                let mut talk = Talk {
                    process,
                    connection,
                    orders: order_box,
                    pace,
                    events: events.clone(),
                    clock,
                    config,
                    phase: Phase::Starting,
                    ticks: 0,
                    heard: now,
                    moved: now,
                    stop: None,
                };
                let over = talk.converse(start).await;
                talk.end(over).await
            }
        };
        let _ = events.send(Event::Ended(ended)).await;
    });
    (Session { orders, pace: set_pace }, event_box)
}

/// Why the conversation is over.
enum Over {
    /// The worker said its last word.
    Finished(Finished),
    /// The same, less well.
    Failed(Failed),
    /// The stream has ended.
    Closed,
    /// The worker hangs: how.
    Hung(String),
    /// The worker says what the protocol does not know, or does not listen.
    Nonsense(String),
    /// It was told to stop and has nothing to save.
    Dismissed,
    /// What it should be told does not fit the protocol.
    Unsendable(String),
}

struct Talk {
    process: Process,
    connection: Connection,
    orders: mpsc::UnboundedReceiver<Order>,
    pace: watch::Receiver<Pace>,
    events: mpsc::Sender<Event>,
    clock: Arc<dyn Clock>,
    config: WorkerConfig,
    phase: Phase,
    ticks: u64,
    /// When the worker last said anything.
    heard: Instant,
    /// When it last got anywhere, or changed its phase.
    moved: Instant,
    /// When, and why, it was told to stop.
    stop: Option<(Instant, Reason)>,
}

impl Talk {
    async fn converse(&mut self, start: Start) -> Over {
        // Who has not begun has nothing to save, and whoever wants the device does not wait for its first word.
        let Talk { connection, pace, .. } = &mut *self;
        let abandoned = async { while pace.changed().await.is_ok() {} };
        let first = tokio::select! {
            first = timeout(READY, connection.next()) => first,
            () = abandoned => return Over::Dismissed,
        };
        match first {
            Err(_) => return Over::Hung(format!("it did not say ready within {} s", READY.as_secs())),
            Ok(Ok(Report::Ready(ready))) if ready.version == VERSION => {
                if let Err(error) = self.process.identify(ready.pid) {
                    return Over::Nonsense(error.to_string());
                }
                self.tell_owner(Report::Ready(ready)).await;
            }
            Ok(Ok(Report::Ready(ready))) => {
                return Over::Nonsense(format!(
                    "it speaks version {} of the protocol, and this daemon version {VERSION}: after an upgrade, \
                     restart the daemon",
                    ready.version
                ));
            }
            Ok(Ok(Report::Failed(failed))) => return Over::Failed(failed),
            Ok(Ok(report)) => return Over::Nonsense(format!("its first word was not ready: {report:?}")),
            Ok(Err(WireError::Closed)) => return Over::Closed,
            Ok(Err(error)) => return Over::Nonsense(error.to_string()),
        }
        if let Err(over) = self.tell_worker(Request::Start(start)) {
            return over;
        }
        self.heard = Instant::now();
        self.moved = self.heard;
        let mut tick = tokio::time::interval(RENEWAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ticked = Instant::now();
        loop {
            let done = tokio::select! {
                biased;
                report = self.connection.next() => self.hear(report).await,
                order = self.orders.recv() => match order {
                    Some(order) => self.pass_on(order),
                    // The owner is gone, and with it the daemon.
                    None => Err(Over::Dismissed),
                },
                changed = self.pace.changed() => match changed {
                    Ok(()) => self.permit(),
                    Err(_) => Err(Over::Dismissed),
                },
                _ = tick.tick() => {
                    if ticked.elapsed() > OVERSLEPT {
                        // We slept, so what we have not heard is no fault of the worker's.
                        self.heard = Instant::now();
                        self.moved = self.heard;
                    }
                    ticked = Instant::now();
                    match self.overdue() {
                        Some(over) => Err(over),
                        None => self.permit(),
                    }
                }
            };
            if let Err(over) = done {
                return over;
            }
        }
    }

    async fn hear(&mut self, report: Result<Report, WireError>) -> Result<(), Over> {
        self.heard = Instant::now();
        let report = match report {
            Ok(report) => report,
            Err(WireError::Closed | WireError::Cut { .. } | WireError::Io(_)) => return Err(Over::Closed),
            Err(error @ WireError::Stalled) => return Err(Over::Hung(error.to_string())),
            Err(error) => return Err(Over::Nonsense(error.to_string())),
        };
        match report {
            Report::Finished(finished) => return Err(Over::Finished(finished)),
            Report::Failed(failed) => return Err(Over::Failed(failed)),
            Report::Ready(_) => return Err(Over::Nonsense("it said ready twice".into())),
            Report::Beat(Beat { phase, ticks, .. }) => {
                if phase != self.phase || ticks != self.ticks {
                    self.moved = self.heard;
                    (self.phase, self.ticks) = (phase, ticks);
                }
            }
            // The next beat may be a second away, and a worker that trains has something to save.
            Report::Started(_) => (self.moved, self.phase) = (self.heard, Phase::Training),
            // Whatever it reports, it got somewhere.
            _ => self.moved = self.heard,
        }
        self.tell_owner(report).await;
        Ok(())
    }

    fn pass_on(&mut self, order: Order) -> Result<(), Over> {
        let request = match order {
            Order::Checkpoint { request } => Request::Checkpoint { request },
            Order::Evaluate { request } => Request::Evaluate { request },
            Order::Stop { reason } => {
                self.stop.get_or_insert((Instant::now(), reason));
                Request::Stop { reason }
            }
        };
        self.tell_worker(request)
    }

    fn permit(&mut self) -> Result<(), Over> {
        let Pace { run, duty, hold } = *self.pace.borrow_and_update();
        let until_ms = (self.clock.monotonic() + PERMIT).as_millis() as u64;
        self.tell_worker(Request::Permit(Permit { run, duty, until_ms, hold }))
    }

    /// Never waits: a worker that does not read is found out after a while.
    fn tell_worker(&mut self, request: Request) -> Result<(), Over> {
        self.connection.send(&request).map_err(|error| match error {
            WireError::Unsendable { .. } => Over::Unsendable(error.to_string()),
            error => Over::Hung(error.to_string()),
        })
    }

    async fn tell_owner(&self, report: Report) {
        let _ = self.events.send(Event::Report(report)).await;
    }

    /// Whether the worker has used up its time.
    fn overdue(&self) -> Option<Over> {
        let now = Instant::now();
        let (quiet, still) = (now - self.heard, now - self.moved);
        if quiet > QUIET {
            return Some(Over::Hung(format!("it was silent for {} s", quiet.as_secs())));
        }
        let unprepared = matches!(self.phase, Phase::Starting | Phase::Preparing);
        if let Some((since, _)) = self.stop {
            if unprepared && now - since > UNPREPARED {
                return Some(Over::Dismissed);
            }
            let limit = self.config.step_timeout + self.config.save_timeout;
            if now - since > limit {
                return Some(Over::Hung(format!("told to stop, it went on for {} s", limit.as_secs())));
            }
        }
        let limit = match self.phase {
            Phase::Starting => STARTING,
            Phase::Preparing => self.config.prepare_timeout,
            Phase::Training | Phase::Evaluating => self.config.step_timeout,
            Phase::Saving => self.config.save_timeout,
            Phase::Parked => return None,
        };
        (still > limit).then(|| {
            let doing = match self.phase {
                Phase::Starting => "starting",
                Phase::Preparing => "preparing",
                Phase::Training => "training",
                Phase::Evaluating => "evaluating",
                _ => "saving",
            };
            Over::Hung(format!("it got no further for {} s while {doing}", still.as_secs()))
        })
    }

    /// Sees the process out.
    async fn end(self, over: Over) -> Ended {
        let Talk { connection, mut process, stop, .. } = self;
        // The only hold on a process that is not known; and an end that every worker understands.
        drop(connection);
        match over {
            Over::Finished(finished) => {
                see_out(&mut process, EXIT).await;
                Ended::Finished(finished)
            }
            Over::Failed(Failed { reason, message, retry }) => {
                see_out(&mut process, EXIT).await;
                Ended::Failed { reason, message, retry }
            }
            Over::Dismissed => {
                see_out(&mut process, Duration::ZERO).await;
                Ended::Finished(Finished::Stopped {
                    reason: stop.map_or(Reason::Shutdown, |(_, reason)| reason),
                })
            }
            Over::Hung(how) => {
                // SIGABRT first: where core dumps are kept, this one says where it hung.
                process.abort();
                see_out(&mut process, EXIT).await;
                Ended::lost(Reason::Hung, format!("the worker hung: {how}; it was ended"))
            }
            Over::Nonsense(what) => {
                see_out(&mut process, Duration::ZERO).await;
                Ended::lost(Reason::Protocol, format!("the worker was not understood and was ended: {what}"))
            }
            Over::Unsendable(what) => {
                see_out(&mut process, Duration::ZERO).await;
                Ended::Failed { reason: Reason::Protocol, message: what, retry: false }
            }
            Over::Closed => match timeout(SILENCE, process.wait()).await {
                Ok(exit) => Ended::lost(process.reason(exit), format!("the worker died: {exit}")),
                Err(_) => {
                    see_out(&mut process, Duration::ZERO).await;
                    Ended::lost(Reason::Crashed, "the worker closed its connection without a last word")
                }
            },
        }
    }
}

/// Gives a process some time to exit, then kills it; returns when it is gone.
async fn see_out(process: &mut Process, grace: Duration) {
    if timeout(grace, process.wait()).await.is_ok() {
        return;
    }
    process.kill();
    if timeout(WEDGED, process.wait()).await.is_err() {
        tracing::error!(
            "a worker (process {:?}) is still there {} s after SIGKILL: it hangs in the kernel, and its memory is \
             lost until a reboot",
            process.id(),
            WEDGED.as_secs()
        );
    }
}
