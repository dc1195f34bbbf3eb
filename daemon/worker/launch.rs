//! Starts workers, and knows how they ended.
//!
//! ```text
//!   ChildLauncher   socketpair, fork, exec `finetuned worker`      the process is a child: its end is known
//!   SocketLauncher  connect; behind the socket somebody starts     the process is a stranger until `ready` names it
//!                   `finetuned worker` for each connection         (Process::identify), and its exit code stays unknown
//!                   (systemd: Accept=yes)
//! ```
//!
//! Either way the worker's standard input is the other end of the connection, and a worker whose connection is closed
//! ends by itself.

use super::priorities::Priorities;
use super::wire::Connection;
use crate::reason::Reason;
use rustix::process::{Pid, PidfdFlags, Signal, getuid, pidfd_open, pidfd_send_signal};
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::net::UnixStream;

/// How often is looked whether a process has ended that is no child. Its connection has told so already; this is for what
/// it still holds.
const LOOK: Duration = Duration::from_millis(100);

/// A worker to be.
pub type Launching<'a> = Pin<Box<dyn Future<Output = Result<Worker, LaunchError>> + Send + 'a>>;

/// Starts workers.
pub trait Launcher: Send + Sync {
    /// Starts one. It has still to say `ready`.
    fn launch(&self) -> Launching<'_>;
}

/// A worker that was started.
#[derive(Debug)]
pub struct Worker {
    /// The conversation.
    pub connection: Connection,
    /// The process.
    pub process: Process,
}

/// Why no worker was started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// No socket pair.
    #[error("cannot make a connection for a worker: {0}")]
    Connection(io::Error),
    /// No child.
    #[error("cannot start the worker {program}: {source}", program = .program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody accepts.
    #[error(
        "cannot connect to {socket}: {source}; is the unit that starts workers (finetuned-worker.socket) active?",
        socket = .socket.display()
    )]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Starts workers as child processes.
#[derive(Clone, Debug)]
pub struct ChildLauncher {
    program: PathBuf,
    priorities: Priorities,
}

impl ChildLauncher {
    /// Children of this program, which must have the command `worker`.
    pub fn new(program: PathBuf, priorities: Priorities) -> ChildLauncher {
        ChildLauncher { program, priorities }
    }

    /// Children of the running program, where it is now: one that is replaced later, by an update, serves the workers
    /// from then on, and the protocol's version tells whether it can.
    pub fn of_this_program(priorities: Priorities) -> io::Result<ChildLauncher> {
        Ok(ChildLauncher::new(std::env::current_exe()?, priorities))
    }

    fn start(&self) -> Result<Worker, LaunchError> {
        let pair = || {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            Ok((UnixStream::from_std(ours)?, theirs))
        };
        let (ours, theirs) = pair().map_err(LaunchError::Connection)?;
        let before = OutOfMemoryKills::now();
        let mut command = tokio::process::Command::new(&self.program);
        command
            .arg("worker")
            .args(["--nice", &self.priorities.nice.to_string()])
            .args(["--oom-score-adjust", &self.priorities.oom_score_adjust.to_string()])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            // Ctrl-C in a terminal reaches the daemon alone, which decides.
            .process_group(0);
        let spawn = |source| LaunchError::Spawn { program: self.program.clone(), source };
        let child = command.spawn().map_err(spawn)?;
        // The child cannot have been reaped yet, so the number is still its own.
        let handle = child.id().and_then(|pid| Handle::open(pid).ok());
        let process = Process { kind: Kind::Child(child), handle, killed: false, before };
        Ok(Worker { connection: Connection::new(ours), process })
    }
}

impl Launcher for ChildLauncher {
    fn launch(&self) -> Launching<'_> {
        Box::pin(async { self.start() })
    }
}

/// Starts workers by connecting to a socket.
#[derive(Clone, Debug)]
pub struct SocketLauncher {
    socket: PathBuf,
}

impl SocketLauncher {
    /// Workers from behind this socket.
    pub fn new(socket: PathBuf) -> SocketLauncher {
        SocketLauncher { socket }
    }

    async fn connect(&self) -> Result<Worker, LaunchError> {
        let before = OutOfMemoryKills::now();
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| LaunchError::Connect { socket: self.socket.clone(), source })?;
        let process = Process { kind: Kind::Stranger, handle: None, killed: false, before };
        Ok(Worker { connection: Connection::new(stream), process })
    }
}

impl Launcher for SocketLauncher {
    fn launch(&self) -> Launching<'_> {
        Box::pin(self.connect())
    }
}

/// The process of a worker. A child that is dropped before it was waited for is reaped by the runtime.
#[derive(Debug)]
pub struct Process {
    kind: Kind,
    handle: Option<Handle>,
    /// By us.
    killed: bool,
    before: OutOfMemoryKills,
}

#[derive(Debug)]
enum Kind {
    Child(tokio::process::Child),
    Stranger,
}

/// Why the process that `ready` names is not taken for the worker's.
#[derive(Debug, thiserror::Error)]
pub enum IdentifyError {
    /// It is not the child that was started.
    #[error("the worker says that it is process {said}, but it was started as process {started}")]
    NotTheChild {
        /// As it says.
        said: u32,
        /// As it was started.
        started: u32,
    },
    /// It is this process.
    #[error("the worker says that it is process {0}, which is the daemon")]
    Ourselves(u32),
    /// There is no such process, or it is not ours to see.
    #[error("the worker says that it is process {pid}, which cannot be watched: {source}")]
    Unseen {
        /// As it says.
        pid: u32,
        /// What the system said.
        source: io::Error,
    },
    /// It runs as somebody else.
    #[error("the worker says that it is process {pid}, which belongs to user {owner}, not {ours}")]
    Foreign {
        /// As it says.
        pid: u32,
        /// Its user.
        owner: u32,
        /// The daemon's user.
        ours: u32,
    },
}

impl Process {
    /// The process id, where it is known.
    pub fn id(&self) -> Option<u32> {
        self.handle.as_ref().map(|handle| handle.pid)
    }

    /// Takes note of the process that the worker's `ready` names. For a worker from behind a socket this is what
    /// [`Self::kill`] and [`Self::wait`] rest on; without it, closing the connection is the only lever there is.
    pub fn identify(&mut self, pid: u32) -> Result<(), IdentifyError> {
        if let Kind::Child(_) = self.kind {
            return match self.id() {
                Some(started) if started != pid => Err(IdentifyError::NotTheChild { said: pid, started }),
                _ => Ok(()),
            };
        }
        if pid == std::process::id() {
            return Err(IdentifyError::Ourselves(pid));
        }
        let unseen = |source| IdentifyError::Unseen { pid, source };
        let handle = Handle::open(pid).map_err(unseen)?;
        let owner = std::fs::metadata(format!("/proc/{pid}")).map_err(unseen)?.uid();
        // It lives after the look at its owner, so it was its own number that was looked at.
        handle.check_alive().map_err(unseen)?;
        let ours = getuid().as_raw();
        if owner != ours {
            return Err(IdentifyError::Foreign { pid, owner, ours });
        }
        self.handle = Some(handle);
        Ok(())
    }

    /// Ends the process at once (SIGKILL). Nothing happens where it has ended, or is not known.
    pub fn kill(&mut self) {
        self.killed = true;
        self.signal(Signal::KILL);
    }

    /// Ends the process with a core dump, where those are kept (SIGABRT): for a worker that hangs.
    pub fn abort(&mut self) {
        self.signal(Signal::ABORT);
    }

    fn signal(&mut self, signal: Signal) {
        match (&self.handle, &mut self.kind) {
            (Some(handle), _) => handle.signal(signal),
            // A kernel without pidfd.
            (None, Kind::Child(child)) => drop(child.start_kill()),
            (None, Kind::Stranger) => {}
        }
    }

    /// Waits for the end; cancel safe. A process that is not known counts as ended.
    pub async fn wait(&mut self) -> Exit {
        match (&mut self.kind, &self.handle) {
            (Kind::Child(child), _) => child.wait().await.map_or(Exit::Unknown, Exit::from),
            (Kind::Stranger, Some(handle)) => {
                handle.ended().await;
                Exit::Unknown
            }
            (Kind::Stranger, None) => Exit::Unknown,
        }
    }

    /// Why a worker that said no last word has ended like this.
    pub fn reason(&self, exit: Exit) -> Reason {
        let killed = match exit {
            Exit::Signal(signal) => signal == libc::SIGKILL,
            Exit::Unknown => true,
            Exit::Code(_) => false,
        };
        if killed && !self.killed && OutOfMemoryKills::now().more_than(&self.before) {
            Reason::OutOfMemory
        } else {
            Reason::Crashed
        }
    }
}

/// A process that cannot be mistaken for a later one of the same number.
#[derive(Debug)]
struct Handle {
    pid: u32,
    pidfd: OwnedFd,
}

impl Handle {
    fn open(pid: u32) -> io::Result<Handle> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let raw = raw.ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty())?;
        Ok(Handle { pid, pidfd })
    }

    fn signal(&self, signal: Signal) {
        // It fails only for a process that has ended.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// An error when the process has ended: a pidfd is readable from then on.
    fn check_alive(&self) -> io::Result<()> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&Timespec::default()))? {
            0 => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    }

    /// Returns when the process has ended.
    async fn ended(&self) {
        while self.check_alive().is_ok() {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(i32),
    /// It was not our child.
    Unknown,
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Exit {
        match (status.code(), status.signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, Some(signal)) => Exit::Signal(signal),
            (None, None) => Exit::Unknown,
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exit code {code}"),
            Exit::Signal(signal) => match signal_name(*signal) {
                Some(name) => write!(f, "killed by signal {signal} ({name})"),
                None => write!(f, "killed by signal {signal}"),
            },
            Exit::Unknown => f.write_str("ended; how is not known"),
        }
    }
}

/// The signals that end processes without being asked to.
fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        libc::SIGKILL => "SIGKILL",
        libc::SIGTERM => "SIGTERM",
        libc::SIGABRT => "SIGABRT",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGBUS => "SIGBUS",
        libc::SIGILL => "SIGILL",
        libc::SIGFPE => "SIGFPE",
        libc::SIGSYS => "SIGSYS",
        libc::SIGINT => "SIGINT",
        libc::SIGHUP => "SIGHUP",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGXFSZ => "SIGXFSZ",
        _ => return None,
    })
}

/// How often the kernel has killed for memory: on the machine (/proc/vmstat, which counts the limits of control groups
/// too), and in the daemon's own control group, where a child of it lives. A kill that falls between two looks may have
/// hit another process; the reason is a good guess and no more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct OutOfMemoryKills {
    machine: Option<u64>,
    group: Option<u64>,
}

impl OutOfMemoryKills {
    fn now() -> OutOfMemoryKills {
        let read = |path: &Path| counter(&std::fs::read_to_string(path).ok()?, "oom_kill");
        let group = std::fs::read_to_string("/proc/self/cgroup").ok();
        let group = group.as_deref().and_then(own_group).map(|group| group.join("memory.events"));
        OutOfMemoryKills {
            machine: read(Path::new("/proc/vmstat")),
            group: group.and_then(|path| read(&path)),
        }
    }

    fn more_than(&self, before: &OutOfMemoryKills) -> bool {
        let rose = |now: Option<u64>, before: Option<u64>| now > before && before.is_some();
        rose(self.machine, before.machine) || rose(self.group, before.group)
    }
}

/// The value of `name` in lines of names and values.
fn counter(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// The directory of the control group in /proc/self/cgroup (version 2: the line that begins with `0::`).
fn own_group(cgroup: &str) -> Option<PathBuf> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new("/sys/fs/cgroup").join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_in_words() {
        assert_eq!(Exit::Signal(9).to_string(), "killed by signal 9 (SIGKILL)");
        assert_eq!(Exit::Signal(40).to_string(), "killed by signal 40");
        assert_eq!(Exit::Code(134).to_string(), "exit code 134");
        assert_eq!(Exit::from(ExitStatus::from_raw(9)), Exit::Signal(9));
        assert_eq!(Exit::from(ExitStatus::from_raw(3 << 8)), Exit::Code(3));
    }

    #[test]
    fn kills_for_memory_are_counted() {
        let vmstat = "oom_kill_disable 1\noom_kill 7\nnr_free_pages 12\n";
        assert_eq!(counter(vmstat, "oom_kill"), Some(7));
        assert_eq!(counter("low 0\noom 1\noom_kill 2\noom_group_kill 0\n", "oom_kill"), Some(2));
        assert_eq!(counter("pgfault 1\n", "oom_kill"), None);
        assert_eq!(
            own_group("1:name=x:/y\n0::/system.slice/finetuned.service\n"),
            Some("/sys/fs/cgroup/system.slice/finetuned.service".into())
        );
        let kills = |machine, group| OutOfMemoryKills { machine, group };
        assert!(kills(Some(8), None).more_than(&kills(Some(7), None)));
        assert!(kills(None, Some(1)).more_than(&kills(None, Some(0))));
        assert!(!kills(Some(7), Some(1)).more_than(&kills(Some(7), Some(1))));
        assert!(!kills(Some(7), None).more_than(&kills(None, None)));
    }

    fn process(kind: Kind, before: OutOfMemoryKills) -> Process {
        Process { kind, handle: None, killed: false, before }
    }

    #[test]
    fn a_kill_for_memory_is_told_from_ours() {
        let now = OutOfMemoryKills::now();
        let fewer = OutOfMemoryKills { machine: now.machine.map(|n| n.wrapping_sub(1)), ..now };
        if now.machine.is_some_and(|n| n > 0) {
            let mut process = process(Kind::Stranger, fewer);
            assert_eq!(process.reason(Exit::Signal(libc::SIGKILL)), Reason::OutOfMemory);
            assert_eq!(process.reason(Exit::Signal(libc::SIGSEGV)), Reason::Crashed);
            assert_eq!(process.reason(Exit::Code(101)), Reason::Crashed);
            process.kill();
            assert_eq!(process.reason(Exit::Signal(libc::SIGKILL)), Reason::Crashed);
        }
        let never = OutOfMemoryKills { machine: Some(u64::MAX), group: Some(u64::MAX) };
        assert_eq!(process(Kind::Stranger, never).reason(Exit::Signal(libc::SIGKILL)), Reason::Crashed);
    }

    #[test]
    fn a_process_must_be_another_and_ours() {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let mut process = process(Kind::Stranger, OutOfMemoryKills::default());
            let error = process.identify(std::process::id()).unwrap_err();
            assert!(matches!(error, IdentifyError::Ourselves(_)), "{error}");
            assert!(matches!(process.identify(0), Err(IdentifyError::Unseen { .. })));
            assert!(matches!(process.identify(u32::MAX), Err(IdentifyError::Unseen { .. })));
            assert_eq!(process.wait().await, Exit::Unknown);
            let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
            process.identify(child.id()).unwrap();
            process.kill();
            assert_eq!(process.wait().await, Exit::Unknown);
            assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
            // Init belongs to root; a test of root cannot tell.
            if !getuid().is_root() {
                assert!(matches!(process.identify(1), Err(IdentifyError::Foreign { .. })));
            }
        });
    }
}
