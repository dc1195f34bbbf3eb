//! The daemon as a process: what it tells the service manager, how it answers signals, and what stops it from starting.
//! No bus is needed: it serves a socket.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// Far beyond what a slow machine needs.
const PATIENCE: Duration = Duration::from_secs(60);

struct Daemon {
    child: Option<Child>,
    notify: UnixDatagram,
}

/// The program with an environment of its own.
fn program(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_finetuned"));
    command.env_clear().env("HOME", dir).current_dir(dir).stdin(Stdio::null());
    command
}

/// A daemon whose directories and socket lie in `dir`.
fn daemon(dir: &Path) -> Command {
    let mut command = program(dir);
    command
        .arg("--config")
        .arg(dir.join("finetuned.toml"))
        .arg("--peer")
        .arg(format!("unix:path={}", dir.join("socket").display()))
        .arg("--state-dir")
        .arg(dir.join("state"))
        .arg("--cache-dir")
        .arg(dir.join("cache"));
    command
}

impl Daemon {
    fn start(dir: &Path) -> Daemon {
        let notify = UnixDatagram::bind(dir.join("notify")).unwrap();
        notify.set_read_timeout(Some(PATIENCE)).unwrap();
        let child = daemon(dir)
            .env("NOTIFY_SOCKET", dir.join("notify"))
            .env("WATCHDOG_USEC", "2000000")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Daemon { child: Some(child), notify }
    }

    /// Waits until the service manager is told something that begins like this.
    fn wait_for(&self, beginning: &str) {
        let mut buffer = [0; 1024];
        let mut heard = Vec::new();
        loop {
            let read = self
                .notify
                .recv(&mut buffer)
                .unwrap_or_else(|error| panic!("{beginning} did not come: {error}; heard: {heard:?}"));
            let text = String::from_utf8_lossy(&buffer[..read]).into_owned();
            if text.starts_with(beginning) {
                return;
            }
            heard.push(text);
        }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(self.child.as_ref().unwrap());
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn end(mut self) -> Output {
        self.child.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_daemon_lives_as_its_service_manager_expects() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("finetuned.toml");
    std::fs::write(&config, "[log]\nlevel = \"info\"\n").unwrap();
    let first = Daemon::start(dir.path());
    first.wait_for("READY=1\n");
    first.wait_for("STATUS=idle\n");
    first.wait_for("WATCHDOG=1\n");
    first.wait_for("WATCHDOG=1\n");

    let second = daemon(dir.path()).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let said = errors(&second);
    assert!(said.contains("another finetuned (process ") && said.contains("--state-dir"), "{said}");

    std::fs::write(&config, "[log]\nlevel = \"debug\"\n[limits]\nruns = 3\n[worker]\nnice = 12\n").unwrap();
    first.signal(rustix::process::Signal::HUP);
    first.wait_for("RELOADING=1\nMONOTONIC_USEC=");
    first.wait_for("READY=1\n");
    std::fs::write(&config, "[log]\nlevl = \"debug\"\n").unwrap();
    first.signal(rustix::process::Signal::HUP);
    first.wait_for("READY=1\n");

    first.signal(rustix::process::Signal::TERM);
    first.wait_for("STOPPING=1\n");
    let ended = first.end();
    let said = errors(&ended);
    assert_eq!(ended.status.code(), Some(0), "{said}");
    for words in [
        " serves socket unix:path=",
        "worker.nice has changed, and takes effect with the next start",
        "the configuration is refused: ",
        "did you mean `level`?",
        "told to end",
    ] {
        assert!(said.contains(words), "{words:?} is not in {said}");
    }
}

#[test]
fn a_configuration_with_a_mistake_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("finetuned.toml"), "[limits]\nruns = 0\ninput_bytes = \"4GB\"\n").unwrap();
    let started = daemon(dir.path()).output().unwrap();
    let checked = program(dir.path()).args(["config", "check", "finetuned.toml"]).output().unwrap();
    for output in [&started, &checked] {
        assert_eq!(output.status.code(), Some(2));
        let said = errors(output);
        assert!(said.contains("finetuned.toml:2:1: limits.runs = 0: allowed"), "{said}");
        assert!(said.contains("finetuned.toml:3:1: limits.input_bytes"), "{said}");
    }
    assert!(!dir.path().join("state").exists());
    let fine = program(dir.path()).args(["config", "check", "--session"]).output().unwrap();
    let shown = String::from_utf8_lossy(&fine.stdout).into_owned();
    let state = dir.path().join(".local/state/finetuned");
    assert!(shown.contains(&format!("state_directory = \"{}\"", state.display())), "{shown}");
    assert_eq!(fine.status.code(), Some(0));
}
