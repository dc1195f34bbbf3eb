//! The two ways to start a worker, and its place in line.

use crate::daemon::{Daemon, Leave, PROGRAM, start};
use crate::fixture::{Bits, expected, shared};
use finetuned::worker::launch::{ChildLauncher, Exit, LaunchError, Launcher, SocketLauncher};
use finetuned::worker::priorities::Priorities;
use finetuned::worker::protocol::{Finished, Report, VERSION};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::thread::JoinHandle;

/// What systemd does for a socket with Accept=yes: a worker for a connection, which is its standard input. Returns how
/// the worker ended.
fn accept_one(listener: UnixListener) -> JoinHandle<ExitStatus> {
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        // As systemd accepts it.
        stream.set_nonblocking(true).unwrap();
        let mut command = Command::new(PROGRAM);
        command.arg("worker").stdin(OwnedFd::from(stream)).stdout(Stdio::null()).stderr(Stdio::inherit());
        let mut child = command.spawn().unwrap();
        drop(command);
        child.wait().unwrap()
    })
}

#[test]
fn from_behind_a_socket() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("worker.socket");
    let launcher = SocketLauncher::new(socket.clone());
    let acceptor = accept_one(UnixListener::bind(&socket).unwrap());
    let mut daemon = Daemon::launch(&launcher);
    let ready = daemon.ready();
    assert_eq!(daemon.process.id(), None);
    daemon.process.identify(ready.pid).unwrap();
    assert_eq!(daemon.process.id(), Some(ready.pid));
    let output = shared().output();
    daemon.send(&start(shared(), output.path(), &[]));
    daemon.leave = Leave::Run;
    let last = daemon.last_word();
    assert!(matches!(last, Report::Finished(Finished::Complete { .. })), "{last:?}");
    assert_eq!(daemon.exit(), Exit::Unknown);
    assert_eq!(acceptor.join().unwrap().code(), Some(0));
    assert_eq!(&Bits::of(output.path()), expected());

    // A stranger can be killed, once it is known.
    std::fs::remove_file(&socket).unwrap();
    let acceptor = accept_one(UnixListener::bind(&socket).unwrap());
    let mut daemon = Daemon::launch(&launcher);
    let ready = daemon.ready();
    daemon.process.identify(ready.pid).unwrap();
    daemon.process.kill();
    assert_eq!(daemon.exit(), Exit::Unknown);
    assert_eq!(acceptor.join().unwrap().signal(), Some(libc::SIGKILL));

    // One that is not known ends with its connection.
    std::fs::remove_file(&socket).unwrap();
    let acceptor = accept_one(UnixListener::bind(&socket).unwrap());
    let mut daemon = Daemon::launch(&launcher);
    daemon.ready();
    daemon.connection = None;
    assert_eq!(acceptor.join().unwrap().code(), Some(0));
}

#[test]
fn what_cannot_be_started() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let launcher = ChildLauncher::new("/nowhere/finetuned".into(), Priorities::default());
    let error = runtime.block_on(launcher.launch()).unwrap_err();
    assert!(
        matches!(error, LaunchError::Spawn { .. }) && error.to_string().contains("/nowhere/finetuned"),
        "{error}"
    );
    let error = runtime.block_on(SocketLauncher::new("/nowhere/worker.socket".into()).launch()).unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(error, LaunchError::Connect { .. }) && text.contains("/nowhere/worker.socket"),
        "{text}"
    );
}

#[test]
fn a_child_is_ready_and_last_in_line() {
    let mut daemon = Daemon::start();
    let ready = daemon.ready();
    assert_eq!(ready.version, VERSION);
    assert_eq!(Some(ready.pid), daemon.process.id());
    assert!(ready.device.starts_with("CPU ("), "{}", ready.device);
    daemon.process.identify(ready.pid).unwrap();
    assert!(daemon.process.identify(ready.pid + 1).is_err());
    // Its threads are there from the first beat on.
    daemon.until(|report| matches!(report, Report::Beat(_)));
    let proc = std::path::PathBuf::from(format!("/proc/{}", ready.pid));
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap();
    assert_eq!(read(proc.join("oom_score_adj")).trim(), "900");
    let mut threads = 0;
    for task in std::fs::read_dir(proc.join("task")).unwrap() {
        let task = task.unwrap();
        let stat = read(task.path().join("stat"));
        // The name, which may hold anything, ends with the last parenthesis; nice is field 19.
        let nice: i32 = stat.rsplit(')').next().unwrap().split_whitespace().nth(16).unwrap().parse().unwrap();
        assert!(nice >= 10, "{stat}");
        let tid: libc::c_int = task.file_name().to_str().unwrap().parse().unwrap();
        // SAFETY: ioprio_get(IOPRIO_WHO_PROCESS, thread) takes two integers and returns one.
        let io = unsafe { libc::syscall(libc::SYS_ioprio_get, 1, tid) };
        assert_eq!(io >> 13, 3, "the idle class");
        threads += 1;
    }
    assert!(threads >= 4, "{threads} threads");
    // A process group of its own: Ctrl-C in the daemon's terminal does not reach it.
    let stat = read(proc.join("stat"));
    let group: u32 = stat.rsplit(')').next().unwrap().split_whitespace().nth(2).unwrap().parse().unwrap();
    assert_eq!(group, ready.pid);
    // Standard output says nothing, and standard input is not the socket any more.
    for fd in [0, 1] {
        assert_eq!(std::fs::read_link(proc.join(format!("fd/{fd}"))).unwrap().to_str(), Some("/dev/null"));
    }
}

#[test]
fn a_launcher_may_ask_for_other_priorities() {
    let priorities = Priorities { nice: 15, oom_score_adjust: 950 };
    let mut daemon = Daemon::launch(&ChildLauncher::new(PROGRAM.into(), priorities));
    let ready = daemon.ready();
    let score = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", ready.pid)).unwrap();
    assert_eq!(score.trim(), "950");
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", ready.pid)).unwrap();
    let nice: i32 = stat.rsplit(')').next().unwrap().split_whitespace().nth(16).unwrap().parse().unwrap();
    assert!(nice >= 15, "{stat}");
}
