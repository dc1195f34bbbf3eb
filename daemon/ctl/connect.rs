//! The way to the daemon: a bus or a socket, and calls with a limit of time.

use super::exit::{Exit, Failure};
use crate::bus::{Dictionary, GovernorProxy, ManagerProxy, NAME, ROOT, RunProxy};
use serde::Serialize;
use std::future::Future;
use std::time::Duration;
use zbus::proxy::{CacheProperties, MethodFlags};
use zbus::wire::{DynamicDeserialize, DynamicType};
use zbus::{Connection, OwnedObjectPath, OwnedVariant, Variant};

/// Where the daemon is.
#[derive(Clone, Debug)]
pub enum Transport {
    /// On the system bus.
    System,
    /// On the session bus.
    Session,
    /// At an address, without a bus between.
    Peer(String),
    /// A connection that is there already.
    #[cfg(test)]
    Ready(Connection),
}

impl Transport {
    /// A connection to the bus, or to the daemon itself.
    pub async fn connect(&self, limit: Duration) -> Result<Connection, Failure> {
        let builder = match self {
            Transport::System => zbus::connection::Builder::system(),
            Transport::Session => zbus::connection::Builder::session(),
            Transport::Peer(address) => {
                zbus::connection::Builder::address(peer_address(address).as_str()).p2p()
            }
            #[cfg(test)]
            Transport::Ready(connection) => return Ok(connection.clone()),
        };
        within(limit, builder.build()).await
    }

    /// In words.
    pub fn describe(&self) -> String {
        match self {
            Transport::System => "the system bus".into(),
            Transport::Session => "the session bus".into(),
            Transport::Peer(address) => peer_address(address),
            #[cfg(test)]
            Transport::Ready(_) => "a socket pair".into(),
        }
    }

    /// The command line that asks the same daemon, ready for a shell.
    pub fn again(&self, words: &str) -> String {
        match self {
            Transport::Session => format!("finetunectl --session {words}"),
            Transport::Peer(address) => {
                format!("finetunectl --peer '{}' {words}", address.replace('\'', r"'\''"))
            }
            _ => format!("finetunectl {words}"),
        }
    }
}

/// An address as D-Bus writes it; a path stands for the socket there.
fn peer_address(address: &str) -> String {
    if address.starts_with('/') { format!("unix:path={address}") } else { address.to_string() }
}

/// The answer, if it comes in time.
pub async fn within<T, E>(limit: Duration, answer: impl Future<Output = Result<T, E>>) -> Result<T, Failure>
where
    Failure: From<E>,
{
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answer.map_err(Failure::from),
        Err(_) => {
            let error = format!("no answer within {} s", limit.as_secs_f64());
            Err(Failure::new(Exit::Timeout, error).help(
                "wait longer with --timeout SECONDS, or see what the daemon does: `journalctl -u finetuned`",
            ))
        }
    }
}

/// The daemon.
pub struct Client {
    /// The connection.
    pub connection: Connection,
    /// Its manager.
    pub manager: ManagerProxy<'static>,
    limit: Duration,
    limit_of_calls: Duration,
    flags: MethodFlags,
}

impl Client {
    /// The daemon behind a connection. `ask_password` lets polkit ask the user, where it has a way to; `limit_of_calls`
    /// is how long an answer may then take, `limit` how long others may.
    pub async fn new(
        connection: Connection,
        limit: Duration,
        limit_of_calls: Duration,
        ask_password: bool,
    ) -> Result<Client, Failure> {
        let manager = ManagerProxy::builder(&connection)
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .map_err(Failure::from)?;
        let flags = if ask_password { MethodFlags::ALLOW_INTERACTIVE_AUTH } else { MethodFlags::empty() };
        Ok(Client { connection, manager, limit, limit_of_calls, flags })
    }

    /// A run's object.
    pub async fn run(&self, path: OwnedObjectPath) -> Result<RunProxy<'static>, Failure> {
        RunProxy::builder(&self.connection)
            .path(path)
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .map_err(Failure::from)
    }

    /// The run that a person means.
    pub async fn find(&self, wanted: &str) -> Result<RunProxy<'static>, Failure> {
        let path = self.answer(self.manager.find_run(wanted.to_string())).await?;
        self.run(path).await
    }

    /// The answer to a call that everybody may make.
    pub async fn answer<T, E>(&self, answer: impl Future<Output = Result<T, E>>) -> Result<T, Failure>
    where
        Failure: From<E>,
    {
        within(self.limit, answer).await
    }

    /// A call for which polkit may want a password. `limit`, where it is not the usual one, for answers that come when
    /// something is done.
    pub async fn call<R>(
        &self,
        proxy: &zbus::Proxy<'_>,
        method: &'static str,
        arguments: &(impl Serialize + DynamicType),
        limit: Option<Duration>,
    ) -> Result<R, Failure>
    where
        R: for<'d> DynamicDeserialize<'d>,
    {
        let call = async {
            let reply = proxy.call_with_flags(method, self.flags, arguments).await;
            // The conversion that the generated methods make: names of errors become errors.
            reply.map_err(crate::bus::Error::from)
        };
        let reply: Option<R> = within(limit.unwrap_or(self.limit_of_calls), call).await?;
        reply.ok_or_else(|| Failure::new(Exit::Error, format!("{method} was not answered")))
    }

    /// Every property of an object of ours, at once.
    pub async fn properties(&self, proxy: &zbus::Proxy<'_>) -> Result<Dictionary, Failure> {
        let properties = zbus::fdo::PropertiesProxy::builder(&self.connection)
            .destination(NAME)
            .path(proxy.path())
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .map_err(Failure::from)?;
        self.answer(properties.get_all(proxy.interface().clone())).await
    }

    /// The governor.
    pub async fn governor_object(&self) -> Result<GovernorProxy<'static>, Failure> {
        GovernorProxy::builder(&self.connection)
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .map_err(Failure::from)
    }

    /// What the governor sees and decides; `None` of a daemon that does not tell.
    pub async fn governor(&self) -> Option<Dictionary> {
        let governor = self.governor_object().await.ok()?;
        self.properties(governor.inner()).await.ok().filter(|properties| !properties.is_empty())
    }

    /// What a person should know of the governor; nothing of a daemon that does not tell.
    pub async fn notes(&self) -> Vec<String> {
        let Ok(governor) = self.governor_object().await else { return Vec::new() };
        let mut readings = self.answer(governor.get_readings()).await.unwrap_or_default();
        readings.remove("Notes").and_then(|notes| Vec::try_from(notes).ok()).unwrap_or_default()
    }

    /// Whether a path names a run: `/` stands for none.
    pub fn is_run(path: &OwnedObjectPath) -> bool {
        path.as_str().starts_with(&format!("{ROOT}/Run/"))
    }
}

/// Options of a call.
pub fn options<const N: usize>(options: [(&str, Variant<'_>); N]) -> Result<Dictionary, Failure> {
    options
        .into_iter()
        .map(|(name, value)| Ok((name.to_string(), OwnedVariant::try_from(value).map_err(Failure::from)?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_an_address() {
        assert_eq!(peer_address("/run/x"), "unix:path=/run/x");
        assert_eq!(peer_address("unix:abstract=x"), "unix:abstract=x");
        assert_eq!(Transport::Session.again("watch ab12"), "finetunectl --session watch ab12");
        assert_eq!(Transport::Peer("/a b".into()).again("list"), "finetunectl --peer '/a b' list");
    }

    #[tokio::test]
    async fn nobody_at_an_address_is_unreachable() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nobody").display().to_string();
        let failure = Transport::Peer(socket).connect(Duration::from_secs(5)).await.unwrap_err();
        assert_eq!(failure.exit, Exit::Unreachable, "{:?}", failure.lines());
        let failure = Transport::Peer("nonsense".into()).connect(Duration::from_secs(5)).await.unwrap_err();
        assert_eq!(failure.exit, Exit::Usage, "{:?}", failure.lines());
    }

    #[tokio::test]
    async fn an_answer_that_does_not_come_is_a_timeout() {
        let never = std::future::pending::<Result<(), Failure>>();
        let failure = within(Duration::from_millis(1), never).await.unwrap_err();
        assert_eq!(failure.exit, Exit::Timeout);
    }
}
