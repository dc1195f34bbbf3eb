//! What the service manager is told (sd_notify(3)), and the watchdog.
//!
//! ```text
//!   READY=1 ──► STATUS=…, WATCHDOG=1 … ──► STOPPING=1, EXTEND_TIMEOUT_USEC=… while a checkpoint is written
//!                 ▲        │ SIGHUP
//!                 └────────┴ RELOADING=1, MONOTONIC_USEC=…, then READY=1
//! ```
//!
//! The watchdog is fed only while the owner of the runs makes turns: a daemon whose main loop lives while its owner
//! hangs is to be restarted, too. Without `NOTIFY_SOCKET` all of it does nothing.

use crate::runs::{RunView, Status};
use crate::units::Celsius;
use sd_notify::NotifyState;
use std::ffi::OsString;
use std::fmt::Write;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Digits of a run's id in the status line: enough for a person.
const SHORT_ID: usize = 4;

/// A line to the service manager, if there is one.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<UnixDatagram>,
    status: String,
}

impl Notifier {
    /// Of this process: `address` is the content of `NOTIFY_SOCKET`, a path or, after an `@`, an abstract name.
    pub fn new(address: Option<OsString>) -> io::Result<Notifier> {
        let socket = match address.filter(|address| !address.is_empty()) {
            None => None,
            Some(address) => {
                let address = match address.as_bytes() {
                    [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
                    path => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path))?,
                };
                let socket = UnixDatagram::unbound()?;
                socket.connect_addr(&address)?;
                // A service manager that does not read must not hold the daemon.
                socket.set_nonblocking(true)?;
                Some(socket)
            }
        };
        Ok(Notifier { socket, status: String::new() })
    }

    fn send(&self, states: &[NotifyState<'_>]) {
        let Some(socket) = &self.socket else { return };
        let mut message = String::new();
        for state in states {
            // Writing to a String cannot fail.
            let _ = writeln!(message, "{state}");
        }
        if let Err(error) = socket.send(message.as_bytes()) {
            tracing::debug!(%error, "the service manager does not listen");
        }
    }

    /// The daemon serves.
    pub fn ready(&self) {
        self.send(&[NotifyState::Ready]);
    }

    /// The configuration is read again; [`Notifier::ready`] ends it.
    pub fn reloading(&self) {
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.send(&[NotifyState::Reloading, now]),
            Err(_) => self.send(&[NotifyState::Reloading]),
        }
    }

    /// The daemon ends.
    pub fn stopping(&self) {
        self.send(&[NotifyState::Stopping]);
    }

    /// The daemon needs this much longer.
    pub fn extend(&self, by: Duration) {
        let micros = u32::try_from(by.as_micros()).unwrap_or(u32::MAX);
        self.send(&[NotifyState::ExtendTimeoutUsec(micros)]);
    }

    /// The daemon lives.
    pub fn alive(&self) {
        self.send(&[NotifyState::Watchdog]);
    }

    /// One line about what the daemon does; sent when it differs from the last one.
    pub fn status(&mut self, text: String) {
        if text != self.status {
            self.send(&[NotifyState::Status(&text)]);
            self.status = text;
        }
    }
}

/// Decides whether the watchdog is fed.
#[derive(Debug)]
pub struct Watchdog {
    heartbeat: Arc<AtomicU64>,
    last: u64,
}

impl Watchdog {
    /// Fed while `heartbeat` grows between two looks. The first look counts from here.
    pub fn new(heartbeat: Arc<AtomicU64>) -> Watchdog {
        let last = heartbeat.load(Ordering::Relaxed);
        Watchdog { heartbeat, last }
    }

    /// Whether there was a beat since the last look.
    pub fn beats(&mut self) -> bool {
        let now = self.heartbeat.load(Ordering::Relaxed);
        std::mem::replace(&mut self.last, now) != now
    }
}

/// What the daemon does, in one line: `run 7f3a step 120/400 loss 1.83, 71.0 °C`.
pub fn status_text(status: &Status, active: Option<&RunView>, temperature: Option<Celsius>) -> String {
    let Some(run) = active else {
        return match (status.unfinished, status.reason) {
            (0, _) => status.state.to_string(),
            (unfinished, Some(reason)) => format!("{}: {reason}; {unfinished} unfinished", status.state),
            (unfinished, None) => format!("{}; {unfinished} unfinished", status.state),
        };
    };
    let id = run.id.as_str();
    let mut text = format!("run {}", id.get(..SHORT_ID).unwrap_or(id));
    // Writing to a String cannot fail.
    if run.state != crate::runs::State::Running {
        let _ = write!(text, " {}", run.state);
        if let Some(reason) = run.reason {
            let _ = write!(text, " ({reason})");
        }
    }
    if run.total_steps > 0 {
        let _ = write!(text, " step {}/{}", run.step, run.total_steps);
    }
    if let Some(loss) = run.loss {
        let _ = write!(text, " loss {loss:.2}");
    }
    if let Some(temperature) = temperature {
        let _ = write!(text, ", {temperature}");
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::reason::Reason;
    use crate::runs::State;
    use crate::units::RunId;

    /// A run in the middle of its work.
    pub(in crate::service) fn running() -> RunView {
        RunView {
            id: RunId::parse("7f3a00112233").unwrap(),
            name: "night".into(),
            state: State::Running,
            reason: None,
            owner: 1000,
            priority: 0,
            created_us: 1,
            started_us: 2,
            finished_us: 0,
            step: 120,
            total_steps: 400,
            epoch: 0.3,
            loss: Some(1.8349),
            eval_loss: None,
            tokens_per_second: None,
            progress: 0.3,
            remaining_seconds: None,
            attempts: 1,
            checkpoint_step: None,
            memory_bytes: 0,
            energy: Default::default(),
            deadline_us: 0,
            deadline_at_risk: false,
        }
    }

    pub(in crate::service) fn status(state: &'static str, reason: Option<Reason>, unfinished: u32) -> Status {
        Status { active: None, state, reason, device: "cpu".into(), unfinished }
    }

    #[test]
    fn the_status_is_one_short_line() {
        let active = status("active", None, 1);
        assert_eq!(status_text(&active, Some(&running()), None), "run 7f3a step 120/400 loss 1.83");
        let warm = status_text(&active, Some(&running()), Some(Celsius(71.04)));
        assert_eq!(warm, "run 7f3a step 120/400 loss 1.83, 71.0 °C");
        let preparing = RunView { state: State::Preparing, total_steps: 0, loss: None, ..running() };
        assert_eq!(status_text(&active, Some(&preparing), None), "run 7f3a preparing");
        let saving = RunView { state: State::Saving, reason: Some(Reason::User), ..running() };
        assert_eq!(
            status_text(&active, Some(&saving), None),
            "run 7f3a saving (user) step 120/400 loss 1.83"
        );
        assert_eq!(status_text(&status("idle", None, 0), None, None), "idle");
        let held = status("waiting", Some(Reason::Inhibited), 3);
        assert_eq!(status_text(&held, None, None), "waiting: inhibited; 3 unfinished");
    }

    fn listener(name: &str) -> (UnixDatagram, OsString, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        (socket, path.into_os_string(), dir)
    }

    pub(in crate::service) fn receive(socket: &UnixDatagram) -> Option<String> {
        let mut buffer = [0; 512];
        let read = socket.recv(&mut buffer).ok()?;
        Some(String::from_utf8(buffer[..read].to_vec()).unwrap())
    }

    #[test]
    fn the_service_manager_hears_every_word() {
        let (socket, address, _dir) = listener("notify");
        let mut notifier = Notifier::new(Some(address)).unwrap();
        notifier.ready();
        assert_eq!(receive(&socket).unwrap(), "READY=1\n");
        notifier.status("idle".into());
        assert_eq!(receive(&socket).unwrap(), "STATUS=idle\n");
        notifier.status("idle".into());
        notifier.alive();
        assert_eq!(receive(&socket).unwrap(), "WATCHDOG=1\n", "the same status is not told twice");
        notifier.reloading();
        let reloading = receive(&socket).unwrap();
        assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
        notifier.stopping();
        notifier.extend(Duration::from_secs(30));
        assert_eq!(receive(&socket).unwrap(), "STOPPING=1\n");
        assert_eq!(receive(&socket).unwrap(), "EXTEND_TIMEOUT_USEC=30000000\n");
        drop(socket);
        notifier.alive();
    }

    #[test]
    fn abstract_sockets_and_none_are_fine_and_a_missing_one_is_an_error() {
        let name = format!("finetuned-notify-test-{}", std::process::id());
        let socket =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name.as_bytes()).unwrap()).unwrap();
        Notifier::new(Some(format!("@{name}").into())).unwrap().ready();
        assert_eq!(receive(&socket).unwrap(), "READY=1\n");
        Notifier::new(None).unwrap().ready();
        Notifier::new(Some(OsString::new())).unwrap().ready();
        assert!(Notifier::new(Some("/absent/notify".into())).is_err());
    }

    #[test]
    fn the_watchdog_is_fed_only_while_the_owner_makes_turns() {
        let heartbeat = Arc::new(AtomicU64::new(7));
        let mut watchdog = Watchdog::new(heartbeat.clone());
        assert!(!watchdog.beats());
        heartbeat.fetch_add(1, Ordering::Relaxed);
        assert!(watchdog.beats());
        assert!(!watchdog.beats());
    }
}
