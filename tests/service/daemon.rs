//! A daemon for a test: in directories of its own, on a private bus or a socket, ended with the test.

use crate::fixture::Fixture;
use finetuned::bus::{ManagerProxy, RunProxy};
use std::collections::HashMap;
use std::fs::File;
use std::future::Future;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use zbus::{Connection, OwnedObjectPath, OwnedVariant};

const FINETUNED: &str = env!("CARGO_BIN_EXE_finetuned");
const FINETUNECTL: &str = env!("CARGO_BIN_EXE_finetunectl");

/// What everything in these tests may take; a test that waits longer has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where the daemon can be reached.
pub enum Transport {
    /// A socket of its own.
    Peer,
    /// The system bus at this address.
    Bus(String),
}

/// A daemon.
pub struct Daemon {
    home: tempfile::TempDir,
    transport: Transport,
    /// Where it looks for sensors, if not at the machine's own.
    sysfs_root: Option<PathBuf>,
    /// The file of its clock, if that is not the machine's.
    clock: Option<PathBuf>,
    process: Option<Child>,
}

impl Daemon {
    /// Starts one on a socket. `config` is added to the test's own configuration.
    pub fn peer(config: &str) -> Daemon {
        Daemon::start_on(Transport::Peer, config)
    }

    /// Starts one on a socket, whose sensors are below `root`.
    pub fn governed(root: &Path, config: &str) -> Daemon {
        Daemon::launch(Transport::Peer, Some(root.to_path_buf()), None, config)
    }

    /// The same by the time of a clock file, in UTC.
    pub fn simulated(root: &Path, clock: &Path, config: &str) -> Daemon {
        Daemon::launch(Transport::Peer, Some(root.to_path_buf()), Some(clock.to_path_buf()), config)
    }

    /// Starts one with this transport.
    pub fn start_on(transport: Transport, config: &str) -> Daemon {
        Daemon::launch(transport, None, None, config)
    }

    fn launch(
        transport: Transport,
        sysfs_root: Option<PathBuf>,
        clock: Option<PathBuf>,
        config: &str,
    ) -> Daemon {
        let home = tempfile::tempdir().unwrap();
        let mut daemon = Daemon { home, transport, sysfs_root, clock, process: None };
        daemon.configure(config);
        daemon.start();
        daemon
    }

    /// Writes its configuration. A daemon that runs reads it when it is told to.
    pub fn configure(&self, config: &str) {
        let peer = matches!(self.transport, Transport::Peer);
        let method = if peer { "[authorization]\nmethod = \"owner\"\n" } else { "" };
        std::fs::write(self.path("finetuned.toml"), format!("{method}{config}\n")).unwrap();
    }

    /// Starts the process (again), and waits until it answers.
    pub fn start(&mut self) {
        assert!(self.process.is_none(), "it runs already");
        let log = File::options().append(true).create(true).open(self.path("log")).unwrap();
        let mut command = Command::new(FINETUNED);
        command
            .arg("--config")
            .arg(self.path("finetuned.toml"))
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--cache-dir")
            .arg(self.path("cache"))
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        match &self.transport {
            // The machine that runs the tests may sleep when it likes.
            Transport::Peer => command
                .arg("--peer")
                .arg(self.address())
                .env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}", self.path("no-bus").display())),
            Transport::Bus(address) => command.env("DBUS_SYSTEM_BUS_ADDRESS", address),
        };
        if let Some(root) = &self.sysfs_root {
            command.arg("--sysfs-root").arg(root);
        }
        if let Some(clock) = &self.clock {
            command.arg("--simulated-clock").arg(clock).env("TZ", "UTC");
        }
        self.process = Some(command.spawn().unwrap());
        block_on(async {
            let began = Instant::now();
            loop {
                if let Ok(manager) = self.try_manager().await
                    && manager.version().await.is_ok()
                {
                    return;
                }
                assert!(began.elapsed() < PATIENCE, "the daemon does not answer:\n{}", self.log());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
    }

    /// A file of the daemon's home.
    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// The directory of a run.
    pub fn run_directory(&self, id: &str) -> PathBuf {
        self.path("state/runs").join(id)
    }

    /// What the daemon has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().unwrap().id()
    }

    /// The socket's address.
    pub fn address(&self) -> String {
        format!("unix:path={}", self.path("socket").display())
    }

    /// A new connection.
    pub async fn connection(&self) -> zbus::Result<Connection> {
        match &self.transport {
            Transport::Peer => {
                let stream = std::os::unix::net::UnixStream::connect(self.path("socket"))?;
                zbus::connection::Builder::unix_stream(stream).p2p().build().await
            }
            Transport::Bus(address) => zbus::connection::Builder::address(address.as_str()).build().await,
        }
    }

    async fn try_manager(&self) -> zbus::Result<ManagerProxy<'static>> {
        ManagerProxy::new(&self.connection().await?).await
    }

    /// The manager, over a new connection.
    pub async fn manager(&self) -> ManagerProxy<'static> {
        self.try_manager().await.unwrap()
    }

    /// A run, over the connection of `manager`.
    pub async fn run(&self, manager: &ManagerProxy<'static>, path: &OwnedObjectPath) -> RunProxy<'static> {
        let builder = RunProxy::builder(manager.inner().connection());
        builder.path(path.clone()).cache_properties(zbus::proxy::CacheProperties::No).build().await.unwrap()
    }

    /// finetunectl with these arguments.
    pub fn ctl(&self, arguments: &[&str]) -> Output {
        self.ctl_command(arguments).output().unwrap()
    }

    /// The same, not yet run.
    pub fn ctl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(FINETUNECTL);
        match &self.transport {
            Transport::Peer => command.arg("--peer").arg(self.address()),
            Transport::Bus(address) => command.env("DBUS_SYSTEM_BUS_ADDRESS", address),
        };
        command.args(arguments).env_remove("RUST_LOG").stdin(Stdio::null());
        command
    }

    /// Sends the daemon a signal, by name.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Waits for its end; the exit code, if it was none of a signal's.
    pub fn wait(&mut self) -> Option<i32> {
        let mut process = self.process.take().unwrap();
        let began = Instant::now();
        loop {
            if let Some(status) = process.try_wait().unwrap() {
                return status.code();
            }
            if began.elapsed() > PATIENCE {
                let _ = process.kill();
                panic!("the daemon does not end:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.signal("KILL");
        assert_eq!(self.wait(), None);
    }

    /// The processes that work for this daemon: those whose parent it is.
    pub fn workers(&self) -> Vec<u32> {
        children(self.pid())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let workers = children(process.id());
            let _ = process.kill();
            let _ = process.wait();
            for worker in workers {
                let _ =
                    Command::new("kill").args(["-KILL", &worker.to_string()]).stderr(Stdio::null()).status();
            }
        }
        if std::thread::panicking() {
            eprintln!("── the daemon's log:\n{}", self.log());
        }
    }
}

/// Sends a signal of a name.
pub fn signal(pid: u32, name: &str) {
    let status =
        Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).stderr(Stdio::null()).status();
    assert!(status.is_ok());
}

/// Whether a process is there and no zombie.
pub fn alive(pid: u32) -> bool {
    state_of(pid).is_some_and(|state| state != 'Z' && state != 'X')
}

fn state_of(pid: u32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The live children of a process.
pub fn children(parent: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").unwrap();
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|&pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let fields: Vec<&str> =
                stat.rsplit_once(") ").map_or(vec![], |(_, rest)| rest.split(' ').collect());
            fields.len() > 1 && fields[1] == parent.to_string() && fields[0] != "Z"
        })
        .collect()
}

/// Runs a future on a runtime of its own.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Asks again and again until there is an answer.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(began.elapsed() < PATIENCE, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until a run is in one of these states; the one it is in.
pub async fn reaches(run: &RunProxy<'static>, states: &[&str]) -> String {
    eventually(&format!("{states:?}"), || async {
        let state = run.state().await.unwrap();
        let over = ["succeeded", "failed", "cancelled"].contains(&state.as_str());
        if states.contains(&state.as_str()) {
            return Some(state);
        }
        if over {
            let told = run.describe().await.ok().and_then(|mut details| details.remove("Message"));
            panic!("the run is {state} ({}), not {states:?}: {told:?}", run.reason().await.unwrap());
        }
        None
    })
    .await
}

/// The text of the fixture's spec with some keys changed, paths as the fixture has them.
pub fn spec_text(fixture: &Fixture, overrides: &[&str]) -> String {
    fixture.spec(overrides).to_toml()
}

/// Submits over the bus, as an application would: the spec's text and the descriptors of what it names.
pub async fn submit(
    manager: &ManagerProxy<'static>,
    fixture: &Fixture,
    overrides: &[&str],
    options: HashMap<String, OwnedVariant>,
) -> finetuned::bus::error::Result<OwnedObjectPath> {
    let files = [fixture.path("model"), fixture.path("train.jsonl")];
    let files = files.map(|path| (path.display().to_string(), zbus::OwnedFd::from(opened(&path))));
    manager.submit(spec_text(fixture, overrides), files.into(), options).await
}

/// The D-Bus name of an error, without its prefix.
pub fn name<T: std::fmt::Debug>(result: finetuned::bus::error::Result<T>) -> String {
    let error = result.unwrap_err();
    zbus::DBusError::name(&error).as_str().rsplit('.').next().unwrap().to_string()
}

/// A file or directory, opened for reading.
pub fn opened(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

/// A private bus of the type of the system bus, with the project's policy, on which our own uid may own the name.
pub struct Bus {
    _home: tempfile::TempDir,
    process: Child,
    /// Its address.
    pub address: String,
}

impl Bus {
    /// Starts one; `None`, and a line that says so, where there is no dbus-daemon.
    pub fn start(extra: &str) -> Option<Bus> {
        let home = tempfile::tempdir().unwrap();
        let policy = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/org.finetuned.Finetuned1.conf");
        let policy = std::fs::read_to_string(policy).unwrap();
        // The user `finetuned` need not exist here; whoever runs the tests takes its place.
        let own = format!("user=\"{}\"", rustix::process::getuid().as_raw());
        let policy = policy.replace("user=\"finetuned\"", &own);
        // The group neither: its lines are left out (libdbus refuses a group that it does not know).
        std::fs::write(home.path().join("policy.conf"), policy).unwrap();
        let config = format!(
            r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={socket}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
    {extra}
  </policy>
  <include>{policy}</include>
</busconfig>
"#,
            socket = home.path().join("bus").display(),
            policy = home.path().join("policy.conf").display(),
        );
        std::fs::write(home.path().join("bus.conf"), config).unwrap();
        let started = Command::new("dbus-daemon")
            .arg(format!("--config-file={}", home.path().join("bus.conf").display()))
            .args(["--nofork", "--print-address=1"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn();
        let mut process = match started {
            Ok(process) => process,
            Err(error) => {
                println!("SKIPPED: no private bus: dbus-daemon: {error}");
                return None;
            }
        };
        let mut address = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut address).unwrap();
        assert!(address.starts_with("unix:"), "dbus-daemon said {address:?}");
        Some(Bus { _home: home, process, address: address.trim().to_string() })
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
