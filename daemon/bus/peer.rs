//! Connections without a bus: a socket at which clients call directly.
//!
//! ```text
//!   socket ──accept──► (64 at most) ──handshake, 10 s──► objects, publisher ──► closed
//!                            │                                │
//!                            └─ one too many: dropped         └─ does not read: shut down
//! ```
//!
//! The socket file has mode 0600: the daemon's own user and root get in, which is whom the owner's rules let do anything.
//! Who calls is read from the socket's credentials, and judged as on a bus.

use super::Context;
use super::authority::{Authority, Origin};
use super::publish::{Ended, publish};
use super::server::{ServeError, Service, objects};
use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use zbus::Guid;
use zbus::address::transport::{Transport, UnixSocket};
use zbus::connection::Builder;

/// Most connections at a time.
pub(super) const CONNECTIONS: usize = 64;

/// Longest handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// A socket that is listened at. Its file goes away with it.
pub(super) struct Listener {
    listener: UnixListener,
    address: String,
    /// The file, and its device and inode: the file of another daemon is left alone.
    file: Option<(PathBuf, (u64, u64))>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, identity)) = &self.file
            && identity_of(path).is_some_and(|found| found == *identity)
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn identity_of(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|found| (found.dev(), found.ino()))
}

impl Listener {
    /// Listens at `unix:path=…` or `unix:abstract=…`. A socket file that nobody answers at is replaced.
    pub fn bind(address: &str) -> Result<Listener, ServeError> {
        let failed = |why: String| ServeError::Listen { address: address.to_string(), why };
        // Clients disagree on whether such a path is to be unescaped (zbus does not).
        if address.contains('%') {
            return Err(failed("a path with escaped characters is not supported: choose a plain one".into()));
        }
        let parsed = zbus::Address::try_from(address).map_err(|error| failed(error.to_string()))?;
        let place = match parsed.transport() {
            Transport::Unix(unix) => unix.path().clone(),
            _ => return Err(failed("only unix:path=… and unix:abstract=… can be listened at".into())),
        };
        let (at, path) = match &place {
            UnixSocket::File(path) => {
                clear(path).map_err(failed)?;
                (SocketAddrUnix::new(path.as_path()), Some(path.clone()))
            }
            UnixSocket::Abstract(name) => (SocketAddrUnix::new_abstract_name(name.as_bytes()), None),
            _ => return Err(failed("only unix:path=… and unix:abstract=… can be listened at".into())),
        };
        let bound = || {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // The file gets the socket's mode, less the umask, so it is never open to others, not even for a moment.
            fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            bind(&socket, &at?)?;
            listen(&socket, BACKLOG)?;
            Ok::<_, rustix::io::Errno>(socket)
        };
        let socket = bound().map_err(|error| failed(error.to_string()))?;
        let listener = UnixListener::from_std(socket.into()).map_err(|error| failed(error.to_string()))?;
        let file = path.and_then(|path| identity_of(&path).map(|identity| (path, identity)));
        Ok(Listener { listener, address: address.to_string(), file })
    }

    /// Serves whoever connects, until it is dropped.
    pub async fn serve(self, service: Service) {
        let mut peers = JoinSet::new();
        let mut number = 0u64;
        loop {
            let stream = tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        // Mostly a lack of descriptors, which passes.
                        tracing::warn!("cannot accept a connection at {}: {error}", self.address);
                        sleep(Duration::from_secs(1)).await;
                        continue;
                    }
                },
                Some(_) = peers.join_next() => continue,
            };
            if peers.len() >= CONNECTIONS {
                tracing::warn!("{} has {CONNECTIONS} connections: another one is dropped", self.address);
                continue;
            }
            number += 1;
            let name = format!("peer-{number}");
            match stream.into_std() {
                Ok(stream) => {
                    peers.spawn(attend(stream, name, service.clone()));
                }
                Err(error) => tracing::warn!("{name}: {error}"),
            }
        }
    }
}

/// Makes place for a socket file, or says who is in the way.
fn clear(path: &Path) -> Result<(), String> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.to_string()),
        Ok(found) if !found.file_type().is_socket() => {
            return Err("there is a file which is no socket: remove it, or choose another path".into());
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err("another process listens there: stop it, or choose another path".into()),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|error| format!("the stale socket cannot be removed: {error}"))
        }
        Err(error) => Err(format!("another process may listen there: {error}")),
    }
}

/// Serves one peer until its connection ends.
async fn attend(stream: UnixStream, name: String, service: Service) {
    let authority = Authority::new(service.authorization.clone(), Origin::Peer(name.clone()));
    let context = Context {
        runs: service.runs.clone(),
        governor: service.governor.clone(),
        budget: service.budget.clone(),
        nights: service.nights.clone(),
        authority: Arc::new(authority),
        waits: service.waits.clone(),
    };
    match converse(stream, context, &service).await {
        Ok(Ended::Closed) => tracing::debug!("{name}: closed"),
        Ok(ended) => tracing::warn!("{name} is dropped: {ended}"),
        Err(why) => tracing::debug!("{name}: no connection: {why}"),
    }
}

/// Handshake, objects, signals.
pub(super) async fn converse(
    stream: UnixStream,
    context: Context,
    service: &Service,
) -> Result<Ended, String> {
    // A second handle: it can end the connection while somebody waits to write to it.
    let handle = stream.try_clone().map_err(|error| error.to_string())?;
    let changes = context.runs.changes();
    let (views, status) = (context.runs.views(), context.runs.status());
    let builder = Builder::unix_stream(stream).server(Guid::generate()).p2p();
    let building = objects(builder, &context, &service.log, &views).build();
    let connection = timeout(HANDSHAKE, building)
        .await
        .map_err(|_| format!("no handshake within {} s", HANDSHAKE.as_secs()))?
        .map_err(|error| error.to_string())?;
    let ended = publish(&connection, &context, changes, views, status, service.pace).await;
    let _ = handle.shutdown(Shutdown::Both);
    Ok(ended)
}
