//! The bus over pairs of connections, in front of a fake owner of the runs.

mod buses;
mod interface;
mod methods;
mod peers;
mod signals;

use super::authority::{Authority, Posed};
use super::budget::{Answer, BudgetBook, BudgetError, BudgetRequest};
use super::log_control::{LogSwitch, LogTarget};
use super::publish::{Ended, Pace};
use super::server::Service;
use super::{Context, Error, GovernorProxy, ManagerProxy, ROOT, RunProxy};
use crate::config::daemon::{Authorization, AuthorizationConfig, LimitsConfig};
use crate::config::settings::{Entry, Layers};
use crate::config::{Loaded, Mode};
use crate::runs::fake::{self, Fake};
use crate::units::RunId;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::task::JoinHandle;
use tracing::Level;
use zbus::connection::Builder;
use zbus::proxy::CacheProperties;
use zbus::{Connection, DBusError};

/// The daemon's own user, a member of the group, another one, and somebody.
const OWN: u32 = 990;
const ADA: u32 = 1001;
const BOB: u32 = 1002;
const EVE: u32 = 1003;
/// The group.
const MEMBERS: u32 = 42;

/// A log that remembers.
struct Log(Mutex<(Level, LogTarget)>);

impl LogSwitch for Log {
    fn level(&self) -> Level {
        self.0.lock().unwrap().0
    }
    fn set_level(&self, level: Level) -> Result<(), String> {
        self.0.lock().unwrap().0 = level;
        Ok(())
    }
    fn target(&self) -> LogTarget {
        self.0.lock().unwrap().1
    }
    fn set_target(&self, target: LogTarget) -> Result<(), String> {
        match target {
            LogTarget::Journal => Err("there is no journal here".into()),
            target => {
                self.0.lock().unwrap().1 = target;
                Ok(())
            }
        }
    }
}

/// A budget without a file.
#[derive(Debug)]
struct Book {
    layers: Mutex<Layers>,
    entries: tokio::sync::watch::Sender<Arc<Vec<Entry>>>,
}

impl Book {
    fn new() -> Book {
        let config = crate::config::daemon::DaemonConfig::defaults(Mode::System, &|_| None);
        let mut files = Loaded { config, places: Default::default() };
        files.config.storage.state_directory = "/absent".into();
        let layers = Layers::open(files, Mode::System);
        let entries = tokio::sync::watch::channel(Arc::new(layers.entries())).0;
        Book { layers: Mutex::new(layers), entries }
    }
}

impl BudgetBook for Book {
    fn entries(&self) -> tokio::sync::watch::Receiver<Arc<Vec<Entry>>> {
        self.entries.subscribe()
    }

    fn request(&self, request: BudgetRequest, uid: u32) -> Answer<'_> {
        let mut layers = self.layers.lock().unwrap();
        let next = match request {
            BudgetRequest::Clear => Ok(layers.cleared()),
            BudgetRequest::Change { changes, runtime } => layers.changed(&changes, runtime, (uid, 7)),
        };
        let done = next.map_err(|mistakes| BudgetError::Invalid(mistakes[0].to_string())).map(|(next, _)| {
            self.entries.send_replace(Arc::new(next.entries()));
            *layers = next;
        });
        Box::pin(async move { done })
    }
}

/// A daemon's face, without the daemon.
struct Bench {
    service: Service,
    fake: Fake,
    group_file: tempfile::NamedTempFile,
}

/// A client.
struct Client {
    connection: Connection,
    /// Uid and groups that the daemon takes the client for.
    who: Posed,
    server: JoinHandle<Result<Ended, String>>,
}

impl Bench {
    fn new(method: Authorization) -> Bench {
        Bench::with(method, 64, LimitsConfig::default())
    }

    fn with(method: Authorization, lag: usize, limits: LimitsConfig) -> Bench {
        let (runs, fake) = fake::start(lag);
        let group_file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(group_file.path(), format!("finetuned:x:{MEMBERS}:\n")).unwrap();
        let config = AuthorizationConfig { method, group: "finetuned".into() };
        let log = Arc::new(Log(Mutex::new((Level::INFO, LogTarget::Console))));
        let governor = tokio::sync::watch::channel(Default::default()).1;
        let mut service = Service::new(runs, governor, Arc::new(Book::new()), config, &limits, log);
        service.pace = Pace {
            figures: Duration::from_millis(200),
            send: Duration::from_millis(500),
            probe: Duration::from_millis(200),
        };
        Bench { service, fake, group_file }
    }

    /// Serves the other end of the socket that is returned.
    fn serve(&self, uid: u32, groups: &[u32]) -> (UnixStream, Posed, JoinHandle<Result<Ended, String>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let who = Arc::new(Mutex::new((uid, groups.to_vec())));
        let authority =
            Authority::posing(self.service.authorization.clone(), OWN, who.clone(), self.group_file.path());
        let context = Context {
            runs: self.service.runs.clone(),
            governor: self.service.governor.clone(),
            budget: self.service.budget.clone(),
            nights: self.service.nights.clone(),
            authority: Arc::new(authority),
            waits: self.service.waits.clone(),
        };
        let service = self.service.clone();
        let server = tokio::spawn(async move { super::peer::converse(ours, context, &service).await });
        (theirs, who, server)
    }

    async fn client(&self, uid: u32, groups: &[u32]) -> Client {
        let (stream, who, server) = self.serve(uid, groups);
        let connection = Builder::unix_stream(stream).p2p().build().await.unwrap();
        Client { connection, who, server }
    }
}

impl Client {
    fn becomes(&self, uid: u32, groups: &[u32]) {
        *self.who.lock().unwrap() = (uid, groups.to_vec());
    }

    async fn manager(&self) -> ManagerProxy<'static> {
        ManagerProxy::builder(&self.connection).cache_properties(CacheProperties::No).build().await.unwrap()
    }

    async fn governor(&self) -> GovernorProxy<'static> {
        GovernorProxy::builder(&self.connection).cache_properties(CacheProperties::No).build().await.unwrap()
    }

    async fn run(&self, id: &RunId) -> RunProxy<'static> {
        RunProxy::builder(&self.connection)
            .path(super::run::path(Some(id)))
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .unwrap()
    }
}

/// The last part of an error's name, and its text.
#[track_caller]
fn refusal<T: std::fmt::Debug>(answer: Result<T, Error>) -> (String, String) {
    let error = answer.unwrap_err();
    let name = error.name().to_string();
    let name = name.strip_prefix("org.finetuned.Finetuned1.Error.").unwrap_or(&name).to_string();
    (name, error.description().unwrap_or_default().to_string())
}

/// Tries until it is so, for at most 5 s.
async fn eventually(what: &str, mut so: impl AsyncFnMut() -> bool) {
    for _ in 0..500 {
        if so().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

/// The path of a run, as text.
fn path_of(number: u8) -> String {
    format!("{ROOT}/Run/{}", fake::id(number))
}
