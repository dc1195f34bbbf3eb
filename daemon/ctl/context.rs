//! What every command has at hand: the way to the daemon, the console, the time, Ctrl-C. Tests put in their own.

use super::connect::{Client, Transport};
use super::console::Console;
use super::exit::Failure;
use crate::clock::{Clock, moment};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};
use tokio::signal::unix::{SignalKind, signal};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(30);

/// How long it may take where polkit may ask a person for a password first.
const LIMIT_OF_A_PERSON: Duration = Duration::from_secs(120);

/// Longer than anybody waits.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// What every command has at hand.
pub struct Context {
    /// Where the daemon is.
    pub transport: Transport,
    /// Where text goes.
    pub console: Console,
    /// Time.
    pub clock: Box<dyn Clock>,
    /// Of the times that are printed.
    pub zone: TimeZone,
    /// `--timeout`.
    pub timeout: Option<Duration>,
    /// polkit may ask for a password.
    pub ask_password: bool,
    /// `--json`.
    pub json: bool,
    /// Where the machine's files are, `/`.
    pub root: PathBuf,
    /// Ctrl-C.
    pub interrupts: Interrupts,
}

impl Context {
    /// The daemon.
    pub async fn client(&self) -> Result<Client, Failure> {
        let connection = self.transport.connect(self.limit()).await?;
        let limit = if self.ask_password { LIMIT_OF_A_PERSON } else { LIMIT };
        Client::new(connection, self.limit(), self.timeout.unwrap_or(limit), self.ask_password).await
    }

    /// How long an answer may take.
    pub fn limit(&self) -> Duration {
        self.timeout.unwrap_or(LIMIT)
    }

    /// How long an answer may take that comes when something is copied or computed.
    pub fn patience(&self) -> Duration {
        self.timeout.unwrap_or(FOR_EVER)
    }

    /// Microseconds since 1970.
    pub fn now_us(&self) -> u64 {
        let since = self.clock.wall().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    }

    /// A moment that a person wrote, in microseconds since 1970.
    pub fn moment(&self, text: &str) -> Result<u64, String> {
        let now = Timestamp::try_from(self.clock.wall()).unwrap_or(Timestamp::UNIX_EPOCH);
        let at = moment::parse(text, &now.to_zoned_datetime(self.zone.clone()))?;
        u64::try_from(at.as_microsecond()).map_err(|_| format!("{text:?} was before 1970"))
    }

    /// A file of the machine.
    pub fn file(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Who has this uid: the name in `/etc/passwd`, else the number.
    pub fn user(&self, uid: u32) -> String {
        name_of(&self.file("/etc/passwd"), uid).unwrap_or_else(|| uid.to_string())
    }
}

/// The name beside a number in a file such as `/etc/passwd` or `/etc/group` (`name:password:number:…`).
pub fn name_of(file: &Path, number: u32) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let number = number.to_string();
    text.lines().find_map(|line| {
        let mut parts = line.split(':');
        let (name, _, of) = (parts.next()?, parts.next()?, parts.next()?);
        (of == number).then(|| name.to_string())
    })
}

/// What interrupts a command that listens.
pub enum Interrupts {
    /// SIGINT and SIGTERM.
    Signals,
    /// A test.
    #[cfg(test)]
    Notified(std::sync::Arc<tokio::sync::Notify>),
}

/// What came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// Ctrl-C, which a command in the foreground has heard, too.
    Keyboard,
    /// SIGTERM, which was sent to this process alone.
    Terminate,
}

impl Interrupts {
    /// Returns when the command is interrupted. From the first poll on the signals no longer end the process.
    pub async fn next(&self) -> Interrupt {
        match self {
            Interrupts::Signals => {
                let (Ok(mut keyboard), Ok(mut terminate)) =
                    (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
                else {
                    // Then the signals keep their usual effect.
                    return std::future::pending().await;
                };
                tokio::select! {
                    _ = keyboard.recv() => Interrupt::Keyboard,
                    _ = terminate.recv() => Interrupt::Terminate,
                }
            }
            #[cfg(test)]
            Interrupts::Notified(notify) => {
                notify.notified().await;
                Interrupt::Keyboard
            }
        }
    }
}
