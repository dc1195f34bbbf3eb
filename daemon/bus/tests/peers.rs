//! Connections of peers: the socket, its limits, and peers that misbehave.

use super::*;
use crate::bus::server::{Endpoint, ServeError, Server};
use crate::runs::fake::{id, queued};
use crate::runs::{Change, State};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::time::Instant;
use tokio::time::{sleep, timeout};

/// Authenticates by hand, as the user of this process.
fn shake_hands(stream: &mut UnixStream) {
    let uid = rustix::process::geteuid().as_raw().to_string();
    let uid: String = uid.bytes().map(|byte| format!("{byte:02x}")).collect();
    write!(stream, "\0AUTH EXTERNAL {uid}\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n").unwrap();
}

#[tokio::test]
async fn a_peer_that_never_reads_is_dropped_and_holds_up_nobody() {
    let mut bench = Bench::new(Authorization::Owner);
    // Much more than an answer takes on a busy machine, so that the one is told from the other.
    bench.service.pace.send = Duration::from_secs(3);
    bench.fake.add(queued(1, ADA));
    let (mut deaf, _, server) = bench.serve(EVE, &[]);
    shake_hands(&mut deaf);
    let other = bench.client(BOB, &[]).await;
    let run = other.run(&id(1)).await;
    let began = Instant::now();
    let mut flips = 0u32;
    while !server.is_finished() {
        flips += 1;
        assert!(began.elapsed() < Duration::from_secs(30), "it is never dropped");
        let state = if flips.is_multiple_of(2) { State::Queued } else { State::Running };
        bench.fake.update(&id(1), |view| view.state = state, Change::State);
        if flips.is_multiple_of(16) {
            // The other one is answered all the time.
            let answer = timeout(Duration::from_millis(1500), run.state()).await;
            assert!(answer.is_ok_and(|state| state.is_ok()), "after {flips}");
        }
        tokio::task::yield_now().await;
    }
    assert!(matches!(server.await.unwrap(), Ok(Ended::Slow)));
    // It is cut off for good: what was in the buffer, then the end.
    deaf.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let read = tokio::task::spawn_blocking(move || deaf.read_to_end(&mut Vec::new()));
    assert!(read.await.unwrap().is_ok());
    assert!(!other.server.is_finished());
}

#[tokio::test]
async fn a_peer_that_asks_and_never_reads_the_answers_is_dropped() {
    let bench = Bench::new(Authorization::Owner);
    bench.fake.add(queued(1, ADA));
    let (mut deaf, _, server) = bench.serve(EVE, &[]);
    shake_hands(&mut deaf);
    deaf.set_nonblocking(true).unwrap();
    let mut deaf = tokio::net::UnixStream::from_std(deaf).unwrap();
    let call = zbus::Message::method_call(ROOT, "Introspect")
        .interface("org.freedesktop.DBus.Introspectable")
        .build(&())
        .unwrap();
    let flood = async {
        loop {
            // The daemon may stop reading in the middle; then nothing more is sent.
            let sent = tokio::io::AsyncWriteExt::write_all(&mut deaf, call.data()).await;
            if sent.is_err() {
                std::future::pending::<()>().await;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        ended = server => assert!(matches!(ended.unwrap(), Ok(Ended::Slow))),
        () = flood => {}
        () = sleep(Duration::from_secs(10)) => panic!("it is never dropped"),
    }
}

fn socket() -> (tempfile::TempDir, String, std::path::PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let address = format!("unix:path={}", path.display());
    (directory, address, path)
}

async fn connect(address: &str) -> zbus::Result<Connection> {
    Builder::address(address).p2p().build().await
}

#[tokio::test]
async fn peers_connect_to_a_socket_of_the_owner() {
    let bench = Bench::new(Authorization::Owner);
    bench.fake.add(queued(1, ADA));
    let (_directory, address, path) = socket();
    let endpoint = [Endpoint::Peer(address.clone())];
    let server = Server::start(&endpoint, bench.service.clone()).await.unwrap();
    let found = std::fs::symlink_metadata(&path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    let one = connect(&address).await.unwrap();
    let two = connect(&address).await.unwrap();
    for connection in [&one, &two] {
        let manager = ManagerProxy::new(connection).await.unwrap();
        assert_eq!(manager.list_runs(Default::default()).await.unwrap().len(), 1);
        // This process is the daemon's user, whom the owner's rules let do it.
        manager.set_priority(crate::bus::run::path(Some(&id(1))), 1).await.unwrap();
    }
    // Somebody listens there already.
    match Server::start(&endpoint, bench.service.clone()).await.err().unwrap() {
        ServeError::Listen { why, .. } => assert!(why.contains("another process listens"), "{why}"),
        other => panic!("{other}"),
    }
    assert!(path.exists());
    server.stop().await;
    assert!(!path.exists());
    assert!(connect(&address).await.is_err());
    timeout(Duration::from_secs(5), one.closed()).await.unwrap();
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_any_other_file_is_not() {
    let bench = Bench::new(Authorization::Owner);
    let (_directory, address, path) = socket();
    let endpoint = [Endpoint::Peer(address.clone())];
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let server = Server::start(&endpoint, bench.service.clone()).await.unwrap();
    drop(connect(&address).await.unwrap());
    // A file that has taken the socket's place in the meantime is not ours to remove.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    server.stop().await;
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    match Server::start(&endpoint, bench.service.clone()).await.err().unwrap() {
        ServeError::Listen { why, .. } => assert!(why.contains("no socket"), "{why}"),
        other => panic!("{other}"),
    }
    for bad in ["tcp:host=localhost,port=0", "unix:path=/nonexistent/x", "unix:path=/a%20b", "nonsense"] {
        let started = Server::start(&[Endpoint::Peer(bad.into())], bench.service.clone()).await;
        assert!(matches!(started.err(), Some(ServeError::Listen { .. })), "{bad}");
    }
}

#[tokio::test]
async fn abstract_sockets_and_the_limit_of_connections() {
    let bench = Bench::new(Authorization::Owner);
    let address = format!("unix:abstract=finetuned-test-{}", std::process::id());
    let _server = Server::start(&[Endpoint::Peer(address.clone())], bench.service.clone()).await.unwrap();
    let mut connections = Vec::new();
    for _ in 0..crate::bus::peer::CONNECTIONS {
        connections.push(connect(&address).await.unwrap());
    }
    assert!(connect(&address).await.is_err(), "one too many");
    drop(connections.pop());
    eventually("there is a place again", async || connect(&address).await.is_ok()).await;
}
