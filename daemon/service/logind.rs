//! logind: the machine does not sleep or go down before what trains is saved.
//!
//! ```text
//!                        PrepareForSleep,                 saved, or out of time
//!                        PrepareForShutdown (true)        (the lock is closed)
//!   away ──► locked ──────────────────────────► saving ─────────────────────────► let go
//!    ▲ logind    ▲                                │                                 │
//!    │ is there  └──────── (false): a new lock, and the runs go on ◄────────────────┘
//!    │                                            │                                 │
//!    └──── logind is gone for ABSENCE, or the bus: the runs go on ◄─────────────────┘
//! ```
//!
//! The lock is two descriptors that logind gives (`Inhibit("sleep", …, "delay")`, and the same for `"shutdown"`): the
//! machine waits until it is closed, for `InhibitDelayMaxUSec` at most (5 s by default). It is held all the time, not only
//! while something trains: a run may begin while logind already counts the locks, and one that is closed at once delays
//! nothing.
//!
//! What trains is saved and its worker ends. Memory survives a sleep, but what a GPU's driver keeps of a context need
//! not; a worker that is gone cannot find out. The next one costs a preparation.
//!
//! Signals count only when they come from the owner of logind's name, which zbus checks.

use super::messages;
use crate::reason::Reason;
use crate::runs::Runs;
use futures_util::StreamExt;
use std::future::{Future, pending};
use std::pin::Pin;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};
use zbus::fdo::{self, DBusProxy};
use zbus::names::{BusName, WellKnownName};
use zbus::proxy::CacheProperties;
use zbus::{Connection, OwnedFd};

/// logind's name.
const LOGIND: WellKnownName<'static> = WellKnownName::from_static_str_unchecked("org.freedesktop.login1");

/// What the lock delays. Each is asked for by itself, which polkit allows to everybody; for `sleep:shutdown` in one call
/// logind (249 to 252) asks polkit for a right that only a person at the machine has.
const WHAT: [&str; 2] = ["sleep", "shutdown"];

/// Longest wait for an answer; of polkit, too, which logind asks.
const PATIENCE: Duration = Duration::from_secs(10);

/// A bus, or a lock, that was not to be had is asked for again after this long.
const AGAIN: Duration = Duration::from_secs(60);

/// A logind that is away for this long does not put the machine to sleep. A restart takes less than a second; when the
/// machine goes down it may end before this daemon is told to.
const ABSENCE: Duration = Duration::from_secs(10);

/// The lock is closed this long before logind would stop waiting, or at half the time where that is longer: for the
/// bus, and for a signal that was read late.
const MARGIN: Duration = Duration::from_secs(1);

/// A lock that delays for longer, or for ever, counts as one of this length.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

#[zbus::proxy(
    interface = "org.freedesktop.login1.Manager",
    default_service = "org.freedesktop.login1",
    default_path = "/org/freedesktop/login1"
)]
trait Logind {
    fn inhibit(&self, what: &str, who: &str, why: &str, mode: &str) -> zbus::Result<OwnedFd>;

    /// How long a delay lock delays, in microseconds.
    #[zbus(property, name = "InhibitDelayMaxUSec")]
    fn inhibit_delay_max_usec(&self) -> zbus::Result<u64>;

    #[zbus(property)]
    fn preparing_for_sleep(&self) -> zbus::Result<bool>;

    #[zbus(property)]
    fn preparing_for_shutdown(&self) -> zbus::Result<bool>;

    #[zbus(signal)]
    fn prepare_for_sleep(&self, start: bool) -> zbus::Result<()>;

    #[zbus(signal)]
    fn prepare_for_shutdown(&self, start: bool) -> zbus::Result<()>;
}

/// Guards the runs until the task is ended.
pub(super) async fn guard(runs: Runs) {
    let mut said = String::new();
    loop {
        let error = match watch(&runs).await {
            Ok(()) => "the connection to the system bus has ended".into(),
            Err(error) => format!("no system bus: {error}"),
        };
        if said != error {
            tracing::debug!("{error}; a sleep or shutdown of the machine is not seen coming");
            said = error;
        }
        sleep(AGAIN).await;
    }
}

/// Guards the runs while there is a bus.
async fn watch(runs: &Runs) -> zbus::Result<()> {
    let bus = zbus::connection::Builder::system().method_timeout(PATIENCE).build().await?;
    // Listen first, ask then: nothing falls between the two.
    let logind = LogindProxy::builder(&bus).cache_properties(CacheProperties::No).build().await?;
    let mut sleeps = logind.receive_prepare_for_sleep().await?;
    let mut shutdowns = logind.receive_prepare_for_shutdown().await?;
    let mut owners = logind.inner().receive_owner_changed().await?;
    let present = is_present(&bus).await?;
    let mut guard = Guard {
        runs,
        logind: logind.clone(),
        lock: None,
        limit: Duration::ZERO,
        coming: Coming::default(),
        saving: None,
        absent: None,
        retry: None,
        said: String::new(),
    };
    if present {
        guard.arrived().await;
    } else {
        tracing::debug!("no logind: a sleep or shutdown of the machine is not seen coming");
    }
    loop {
        let (absent, retry) = (guard.absent, guard.retry);
        tokio::select! {
            biased;
            owner = owners.next() => match owner {
                Some(Some(_)) => guard.arrived().await,
                Some(None) => guard.absent = Some(Instant::now() + ABSENCE),
                None => break,
            },
            signal = sleeps.next() => match signal {
                Some(signal) => if let Ok(told) = signal.args() {
                    guard.told(Coming { sleep: told.start, ..guard.coming }).await;
                },
                None => break,
            },
            signal = shutdowns.next() => match signal {
                Some(signal) => if let Ok(told) = signal.args() {
                    guard.told(Coming { shutdown: told.start, ..guard.coming }).await;
                },
                None => break,
            },
            saved = guard.saved() => guard.let_go(saved),
            () = until(absent) => {
                guard.absent = None;
                guard.told(Coming::default()).await;
            }
            () = until(retry) => guard.take_lock().await,
        }
    }
    if guard.coming.reason().is_some() {
        runs.wake().await;
    }
    Ok(())
}

async fn is_present(bus: &Connection) -> zbus::Result<bool> {
    Ok(DBusProxy::new(bus).await?.name_has_owner(BusName::WellKnown(LOGIND)).await?)
}

async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => pending().await,
    }
}

/// What the machine is about to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Coming {
    sleep: bool,
    shutdown: bool,
}

impl Coming {
    /// Why nothing may train.
    fn reason(self) -> Option<Reason> {
        if self.shutdown { Some(Reason::Shutdown) } else { self.sleep.then_some(Reason::Suspend) }
    }
}

/// Until when saving may take, with a lock that delays for `limit`.
fn allowed(limit: Duration) -> Duration {
    limit - MARGIN.min(limit / 2)
}

/// What trains is being saved.
struct Saving<'a> {
    since: Instant,
    until: Instant,
    done: Pin<Box<dyn Future<Output = ()> + Send + 'a>>,
}

/// A descriptor for each of [`WHAT`].
type Lock = [OwnedFd; WHAT.len()];

struct Guard<'a> {
    runs: &'a Runs,
    logind: LogindProxy<'static>,
    lock: Option<Lock>,
    /// How long the lock delays.
    limit: Duration,
    coming: Coming,
    saving: Option<Saving<'a>>,
    /// When a logind that is away counts as gone.
    absent: Option<Instant>,
    /// When a lock that was refused is asked for again.
    retry: Option<Instant>,
    /// Why it was refused, said once.
    said: String,
}

impl Guard<'_> {
    /// logind is there, perhaps anew: then it may have forgotten what it was about to do, and has it said nowhere.
    async fn arrived(&mut self) {
        self.absent = None;
        let coming = Coming {
            sleep: self.logind.preparing_for_sleep().await.unwrap_or(false),
            shutdown: self.logind.preparing_for_shutdown().await.unwrap_or(false),
        };
        if coming == Coming::default() && self.coming == coming {
            return self.take_lock().await;
        }
        self.told(coming).await;
    }

    /// The machine is about to do this.
    async fn told(&mut self, coming: Coming) {
        let before = std::mem::replace(&mut self.coming, coming);
        match (before.reason(), coming.reason()) {
            (before, Some(reason)) if before != Some(reason) => self.save(reason),
            (Some(_), None) => {
                self.saving = None;
                // The lock first: a run that goes on is not without one.
                self.take_lock().await;
                tracing::info!("the machine is awake: training may go on");
                self.runs.wake().await;
            }
            _ => {}
        }
    }

    fn save(&mut self, reason: Reason) {
        let (runs, since) = (self.runs, Instant::now());
        tracing::info!(REASON = reason.word(), "the machine is about to {}", verb(reason));
        self.retry = None;
        // What is still allowed of an earlier one is not extended.
        let until = self.saving.as_ref().map_or(since + allowed(self.limit), |saving| saving.until);
        self.saving = Some(Saving { since, until, done: Box::pin(runs.suspend(reason)) });
    }

    /// Waits until what trains is saved (true), or there is no more time (false).
    async fn saved(&mut self) -> bool {
        match &mut self.saving {
            Some(Saving { until, done, .. }) => tokio::time::timeout_at(*until, done).await.is_ok(),
            None => pending().await,
        }
    }

    fn let_go(&mut self, saved: bool) {
        let Some(Saving { since, .. }) = self.saving.take() else { return };
        let took = since.elapsed().as_secs_f64();
        if self.lock.take().is_some() && !saved {
            let reason = self.coming.reason().unwrap_or(Reason::Suspend);
            tracing::warn!(
                MESSAGE_ID = messages::NOT_SAVED_IN_TIME,
                REASON = reason.word(),
                "the machine is about to {} and what trains is not saved after {took:.1} s, which is all that logind \
                 allows (InhibitDelayMaxSec): its last checkpoint is intact, the work since then may be lost",
                verb(reason)
            );
        } else if saved {
            tracing::info!("nothing trains any more, after {took:.1} s");
        }
    }

    /// Takes a lock, in place of the one that there may be.
    async fn take_lock(&mut self) {
        self.retry = None;
        match ask_for_lock(&self.logind).await {
            Ok((lock, limit)) => {
                self.limit = Duration::from_micros(limit).min(LONGEST);
                self.lock = Some(lock);
                self.said.clear();
                tracing::debug!("logind waits for us, for {:.1} s at most", self.limit.as_secs_f64());
            }
            Err(error) => {
                self.lock = None;
                self.retry = Some(Instant::now() + AGAIN);
                let error = refusal(&error);
                if self.said != error {
                    tracing::warn!(
                        "logind gives no delay lock, so the machine may sleep or go down before a run is saved: {error}"
                    );
                    self.said = error;
                }
            }
        }
    }
}

/// A lock, and how many microseconds it delays.
async fn ask_for_lock(logind: &LogindProxy<'static>) -> zbus::Result<(Lock, u64)> {
    let ask = |what| logind.inhibit(what, "finetuned", "saves what it trains", "delay");
    let lock = [ask(WHAT[0]).await?, ask(WHAT[1]).await?];
    Ok((lock, logind.inhibit_delay_max_usec().await?))
}

fn verb(reason: Reason) -> &'static str {
    if reason == Reason::Suspend { "sleep" } else { "go down" }
}

fn refusal(error: &zbus::Error) -> String {
    match fdo::Error::from(error.clone()) {
        fdo::Error::AccessDenied(text) => format!(
            "{text} (polkit allows org.freedesktop.login1.inhibit-delay-sleep and -shutdown to everybody, unless a rule \
             of this machine says otherwise)"
        ),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shutdown_outweighs_a_sleep() {
        let coming = |sleep, shutdown| Coming { sleep, shutdown }.reason();
        assert_eq!(coming(false, false), None);
        assert_eq!(coming(true, false), Some(Reason::Suspend));
        assert_eq!(coming(false, true), Some(Reason::Shutdown));
        assert_eq!(coming(true, true), Some(Reason::Shutdown));
    }

    #[test]
    fn there_is_always_time_and_always_a_margin() {
        let at = Duration::from_millis;
        assert_eq!(allowed(at(5000)), at(4000));
        assert_eq!(allowed(at(1000)), at(500));
        assert_eq!(allowed(Duration::ZERO), Duration::ZERO);
    }
}
