//! Serves the runs on buses and to peers.
//!
//! ```text
//!   bus:   connect ──► all objects ──► name ──► publisher ──┐
//!   peers: listen ──► each: handshake ──► publisher         ├──► failed(): the bus, or the name on it, is lost
//!                                                           ┘
//! ```
//!
//! The name comes last: who sees it finds every object. A bus that is lost does not come back by itself; the service
//! then ends, and systemd starts it again.

use super::authority::{Authority, Origin};
use super::budget::BudgetBook;
use super::governor::Governor;
use super::log_control::{self, LogControl, LogSwitch};
use super::manager::Manager;
use super::peer::Listener;
use super::publish::{Pace, publish};
use super::run::{self, Run};
use super::slots::Slots;
use super::{Context, NAME, ROOT, WAITS};
use crate::config::daemon::{AuthorizationConfig, LimitsConfig};
use crate::governor::View;
use crate::night::Nights;
use crate::runs::{RunView, Runs};
use futures_util::StreamExt;
use std::fmt;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use zbus::connection::Builder;
use zbus::fdo::{self, RequestNameFlags};
use zbus::{Connection, MatchRule, MessageStream};

/// Longest time to give the name back at the end.
const FAREWELL: Duration = Duration::from_secs(1);

/// Where to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// The system bus; `DBUS_SYSTEM_BUS_ADDRESS` names another one.
    System,
    /// The session bus.
    Session,
    /// The bus at this address, as if it were the system bus.
    Bus(String),
    /// A socket for peers: `unix:path=…` or `unix:abstract=…`.
    Peer(String),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::System => f.write_str("system bus"),
            Endpoint::Session => f.write_str("session bus"),
            Endpoint::Bus(address) => write!(f, "bus at {address}"),
            Endpoint::Peer(address) => write!(f, "socket {address}"),
        }
    }
}

/// Why it cannot be served, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No connection.
    #[error("cannot connect to the {bus}: {source}")]
    Connect {
        /// Where.
        bus: Endpoint,
        /// What failed.
        source: zbus::Error,
    },
    /// Another process has the name.
    #[error("another process has the name {NAME} on the {bus}: another finetuned runs; stop it first")]
    NameTaken {
        /// Where.
        bus: Endpoint,
    },
    /// The bus does not give the name.
    #[error(
        "the {bus} does not give the name {NAME}: {source}. Its policy (org.finetuned.Finetuned1.conf) must be \
         installed, and it lets only the user finetuned have it"
    )]
    NameRefused {
        /// Where.
        bus: Endpoint,
        /// What failed.
        source: zbus::Error,
    },
    /// No socket.
    #[error("cannot listen at {address}: {why}")]
    Listen {
        /// Where.
        address: String,
        /// What is in the way.
        why: String,
    },
    /// The bus, or the name on it, is gone.
    #[error("the {bus} is lost: {why}")]
    Lost {
        /// Where.
        bus: Endpoint,
        /// What happened.
        why: String,
    },
}

/// What is served.
#[derive(Clone)]
pub struct Service {
    pub(super) runs: Runs,
    pub(super) governor: watch::Receiver<Arc<View>>,
    pub(super) budget: Arc<dyn BudgetBook>,
    pub(super) nights: Nights,
    pub(super) authorization: AuthorizationConfig,
    pub(super) waits: Arc<Slots>,
    pub(super) log: Arc<dyn LogSwitch>,
    pub(super) pace: Pace,
}

impl Service {
    /// The runs, under these rules.
    pub fn new(
        runs: Runs,
        governor: watch::Receiver<Arc<View>>,
        budget: Arc<dyn BudgetBook>,
        authorization: AuthorizationConfig,
        limits: &LimitsConfig,
        log: Arc<dyn LogSwitch>,
    ) -> Service {
        let waits = Arc::new(Slots::new(limits.waits_per_sender, WAITS));
        let nights = Nights::default();
        Service { runs, governor, budget, nights, authorization, waits, log, pace: Pace::default() }
    }

    /// The same with reports on nights.
    pub fn with_nights(self, nights: Nights) -> Service {
        Service { nights, ..self }
    }
}

/// Everything that is served. Dropping it ends all connections.
pub struct Server {
    tasks: JoinSet<()>,
    buses: Vec<Connection>,
    failures: mpsc::Receiver<ServeError>,
}

impl Server {
    /// Serves at every endpoint. When this returns, the names are there and the sockets answer.
    pub async fn start(endpoints: &[Endpoint], service: Service) -> Result<Server, ServeError> {
        let (failed, failures) = mpsc::channel(endpoints.len().max(1));
        let mut server = Server { tasks: JoinSet::new(), buses: Vec::new(), failures };
        for endpoint in endpoints {
            match endpoint {
                Endpoint::Peer(address) => {
                    server.tasks.spawn(Listener::bind(address)?.serve(service.clone()));
                }
                bus => server.serve_bus(bus, &service, failed.clone()).await?,
            }
        }
        Ok(server)
    }

    async fn serve_bus(
        &mut self,
        bus: &Endpoint,
        service: &Service,
        failed: mpsc::Sender<ServeError>,
    ) -> Result<(), ServeError> {
        let connect = |source| ServeError::Connect { bus: bus.clone(), source };
        let (builder, origin) = match bus {
            Endpoint::Session => (Builder::session(), Origin::Bus),
            Endpoint::Bus(address) => (Builder::address(address.as_str()), Origin::SystemBus),
            Endpoint::System | Endpoint::Peer(_) => (Builder::system(), Origin::SystemBus),
        };
        let context = Context {
            runs: service.runs.clone(),
            governor: service.governor.clone(),
            budget: service.budget.clone(),
            nights: service.nights.clone(),
            authority: Arc::new(Authority::new(service.authorization.clone(), origin)),
            waits: service.waits.clone(),
        };
        let changes = context.runs.changes();
        let (views, status) = (context.runs.views(), context.runs.status());
        let connection = objects(builder, &context, &service.log, &views).build().await.map_err(connect)?;
        let mut lost = name_lost(&connection).await.map_err(connect)?;
        match connection.request_name_with_flags(NAME, RequestNameFlags::DO_NOT_QUEUE).await {
            Ok(_) => {}
            Err(zbus::Error::NameTaken) => return Err(ServeError::NameTaken { bus: bus.clone() }),
            Err(source) => return Err(ServeError::NameRefused { bus: bus.clone(), source }),
        }
        self.buses.push(connection.clone());
        let (bus, pace) = (bus.clone(), service.pace);
        self.tasks.spawn(async move {
            let why = tokio::select! {
                ended = publish(&connection, &context, changes, views, status, pace) => {
                    format!("the connection to it ended: {ended}")
                }
                // An error is the end of the connection, which the other branch says better.
                Some(Ok(_)) = lost.next() => format!("it took the name {NAME} away"),
            };
            let _ = failed.send(ServeError::Lost { bus, why }).await;
        });
        Ok(())
    }

    /// Returns when a bus can no longer be served. Peers that come and go are no failure.
    pub async fn failed(&mut self) -> ServeError {
        match self.failures.recv().await {
            Some(error) => error,
            // Only peers are served.
            None => std::future::pending().await,
        }
    }

    /// Gives the names back and ends all connections. Calls that wait are answered by the end of their connection.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
        for connection in self.buses.drain(..) {
            let _ = timeout(FAREWELL, connection.release_name(NAME)).await;
            let _ = timeout(FAREWELL, connection.close()).await;
        }
    }
}

/// A stream with an item when the bus takes the name away.
async fn name_lost(connection: &Connection) -> zbus::Result<MessageStream> {
    let rule = MatchRule::builder()
        .msg_type(zbus::message::Type::Signal)
        .sender("org.freedesktop.DBus")
        .interface("org.freedesktop.DBus")
        .member("NameLost")
        .arg(0, NAME)
        .build()?;
    MessageStream::for_match_rule(rule, connection, NonZeroUsize::new(4)).await
}

/// Gives a connection its objects.
pub(super) fn objects<'a>(
    builder: Builder<'a>,
    context: &Context,
    log: &Arc<dyn LogSwitch>,
    views: &[RunView],
) -> Builder<'a> {
    let mut builder = builder
        .serve_at(ROOT, Manager { context: context.clone() })
        .serve_at(ROOT, Governor { context: context.clone() })
        .serve_at(ROOT, fdo::ObjectManager)
        .serve_at(log_control::PATH, LogControl { context: context.clone(), log: log.clone() });
    for view in views {
        let object = Run { id: view.id.clone(), context: context.clone(), first: view.clone() };
        builder = builder.serve_at(run::path(Some(&view.id)), object);
    }
    builder
}
