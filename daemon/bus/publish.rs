//! Keeps the objects and the signals of one connection in step with the runs.
//!
//! ```text
//!   Added    ─► object is served          ─► InterfacesAdded
//!   Removed  ─► object is served no more  ─► InterfacesRemoved
//!   State    ─► at once                  ┐
//!   Figures  ─► at once, when the last   ├─► one PropertiesChanged of all that differs from what was told last;
//!               signal is a second old;  │   none when nothing does
//!               else when it will be     ┘
//!   Status   ─► at once: PropertiesChanged of the manager
//!   budget   ─► at once: BudgetChanged of the governor
//!   (lagged) ─► all of it, from the views
//! ```
//!
//! Each connection has a publisher of its own, so that one that is slow holds up nobody else. zbus writes a message
//! before it returns and keeps no queue of its own: a connection that does not take a message within [`Pace::send`] is
//! given up.

use super::error::{Error, Result};
use super::governor::Governor;
use super::{Context, ROOT, budget, manager, run};
use crate::config::settings::Entry;
use crate::runs::{Change, RunView, Status};
use crate::units::RunId;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout};
use zbus::names::InterfaceName;
use zbus::object_server::{Interface, SignalEmitter};
use zbus::{Connection, ObjectPath, Variant, fdo};

/// How often and how patiently.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    /// Least time between two signals about a run, but for changes of its state.
    pub figures: Duration,
    /// Longest time for what follows one change.
    pub send: Duration,
    /// How often a connection is asked whether its messages get through, although there is nothing to tell.
    pub probe: Duration,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { figures: Duration::from_secs(1), send: Duration::from_secs(5), probe: Duration::from_secs(10) }
    }
}

/// Why a publisher has ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    /// The other side has closed the connection.
    #[error("it was closed")]
    Closed,
    /// The other side does not read.
    #[error("the other side does not read what it is sent")]
    Slow,
    /// Sending failed.
    #[error("{0}")]
    Failed(zbus::Error),
}

/// What was told of a run.
struct Shown {
    view: RunView,
    at: Instant,
}

struct Publisher<'a> {
    connection: &'a Connection,
    context: &'a Context,
    pace: Pace,
    shown: BTreeMap<RunId, Shown>,
    status: Status,
    budget: Arc<Vec<Entry>>,
    /// Runs with figures that have not been told, and when they will be.
    due: BTreeMap<RunId, Instant>,
}

/// What to do next.
enum Next {
    Tell(Change),
    Resync,
    Due,
    Budget(Arc<Vec<Entry>>),
    Probe,
}

/// Tells of changes until the connection ends. `views` are the runs that are served already, `status` is what the
/// manager says already, and `changes` were subscribed to before either was read.
pub(super) async fn publish(
    connection: &Connection,
    context: &Context,
    mut changes: broadcast::Receiver<Change>,
    views: Vec<RunView>,
    status: Status,
    pace: Pace,
) -> Ended {
    let at = Instant::now();
    let shown = views.into_iter().map(|view| (view.id.clone(), Shown { view, at })).collect();
    let mut entries = context.budget.entries();
    let budget = entries.borrow_and_update().clone();
    let mut publisher = Publisher { connection, context, pace, shown, status, budget, due: BTreeMap::new() };
    let mut probe = interval_at(at + pace.probe, pace.probe);
    probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let due = publisher.due.values().min().copied();
        let next = tokio::select! {
            () = connection.closed() => return Ended::Closed,
            change = changes.recv() => match change {
                Ok(change) => Next::Tell(change),
                Err(RecvError::Lagged(_)) => Next::Resync,
                Err(RecvError::Closed) => {
                    connection.closed().await;
                    return Ended::Closed;
                }
            },
            () = at_time(due) => Next::Due,
            Ok(()) = entries.changed() => Next::Budget(entries.borrow_and_update().clone()),
            _ = probe.tick() => Next::Probe,
        };
        match timeout(pace.send, publisher.follow(next)).await {
            Ok(Ok(())) => {}
            Ok(Err(Error::ZBus(error))) if is_hang_up(&error) => return Ended::Closed,
            Ok(Err(Error::ZBus(error))) => return Ended::Failed(error),
            // The run was removed in the meantime, which the next change says.
            Ok(Err(_)) => {}
            Err(_) => return Ended::Slow,
        }
    }
}

/// Whether the other side went away while something was on its way to it, which is how every short-lived client ends.
fn is_hang_up(error: &zbus::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    matches!(error, zbus::Error::InputOutput(error)
        if matches!(error.kind(), BrokenPipe | ConnectionReset | NotConnected))
}

async fn at_time(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

impl Publisher<'_> {
    async fn follow(&mut self, next: Next) -> Result<()> {
        match next {
            Next::Tell(Change::Added(id) | Change::State(id)) => self.tell(&id).await,
            Next::Tell(Change::Figures(id)) => {
                match self.shown.get(&id).map(|shown| shown.at + self.pace.figures) {
                    Some(moment) if moment > Instant::now() => {
                        self.due.insert(id, moment);
                        Ok(())
                    }
                    _ => self.tell(&id).await,
                }
            }
            Next::Tell(Change::Removed(id)) => self.forget(&id).await,
            Next::Tell(Change::Status) => self.tell_status().await,
            Next::Due => {
                let now = Instant::now();
                let due: Vec<RunId> =
                    self.due.iter().filter(|(_, at)| **at <= now).map(|(id, _)| id.clone()).collect();
                for id in due {
                    self.tell(&id).await?;
                }
                Ok(())
            }
            Next::Resync => {
                let views = self.context.runs.views();
                let removed: Vec<RunId> = self
                    .shown
                    .keys()
                    .filter(|id| !views.iter().any(|view| view.id == **id))
                    .cloned()
                    .collect();
                for id in removed {
                    self.forget(&id).await?;
                }
                for view in views {
                    self.tell(&view.id).await?;
                }
                self.tell_status().await
            }
            Next::Budget(now) => {
                let keys = budget::differing(&self.budget, &now);
                self.budget = now;
                if keys.is_empty() {
                    return Ok(());
                }
                let emitter = SignalEmitter::new(self.connection, ROOT)?;
                Ok(Governor::budget_changed(&emitter, keys).await?)
            }
            // Takes the lock that every sender holds while it writes: it is free when messages get through.
            Next::Probe => {
                let _ = self.connection.peer_creds().await;
                Ok(())
            }
        }
    }

    /// Tells what is new in a run, all in one signal, or of a new run.
    async fn tell(&mut self, id: &RunId) -> Result<()> {
        self.due.remove(id);
        let Ok(view) = self.context.runs.view(id) else { return Ok(()) };
        let at = Instant::now();
        match self.shown.get_mut(id) {
            Some(shown) => {
                let changed = run::changed(&shown.view, &view);
                if changed.is_empty() {
                    return Ok(());
                }
                *shown = Shown { view, at };
                self.emit(&run::path(Some(id)), run::Run::name(), changed).await
            }
            None => {
                self.shown.insert(id.clone(), Shown { view, at });
                run::export(self.connection, self.context, id).await
            }
        }
    }

    async fn forget(&mut self, id: &RunId) -> Result<()> {
        self.due.remove(id);
        self.shown.remove(id);
        Ok(run::withdraw(self.connection, id).await?)
    }

    async fn tell_status(&mut self) -> Result<()> {
        let status = self.context.runs.status();
        let changed = manager::changed(&self.status, &status);
        self.status = status;
        if changed.is_empty() {
            return Ok(());
        }
        self.emit(&ObjectPath::try_from(ROOT)?, manager::Manager::name(), changed).await
    }

    async fn emit(
        &self,
        path: &ObjectPath<'_>,
        interface: InterfaceName<'_>,
        changed: HashMap<&str, Variant<'_>>,
    ) -> Result<()> {
        let emitter = SignalEmitter::new(self.connection, path)?;
        Ok(fdo::Properties::properties_changed(&emitter, interface, changed, Cow::Borrowed(&[])).await?)
    }
}
