//! `org.freedesktop.LogControl1`, at `/org/freedesktop/LogControl1`: the log's level and target while the daemon runs
//! (`systemctl service-log-level finetuned debug`). The interface is systemd's (org.freedesktop.LogControl1(5)), and so
//! are its words.

use super::Context;
use super::authority::Action;
use super::error::{Error, Result};
use super::input::shortened;
use std::sync::Arc;
use tracing::Level;
use zbus::message::Header;
use zbus::{Connection, interface};

/// The path of the object.
pub const PATH: &str = "/org/freedesktop/LogControl1";

/// Where the log goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogTarget {
    /// The systemd journal.
    Journal,
    /// Standard error.
    Console,
    /// Nowhere.
    Null,
}

impl LogTarget {
    /// Every target.
    pub const ALL: [LogTarget; 3] = [LogTarget::Journal, LogTarget::Console, LogTarget::Null];

    /// The stable word.
    pub fn word(self) -> &'static str {
        match self {
            LogTarget::Journal => "journal",
            LogTarget::Console => "console",
            LogTarget::Null => "null",
        }
    }
}

/// What turns the log up, down and elsewhere.
pub trait LogSwitch: Send + Sync {
    /// The most detailed level that is logged.
    fn level(&self) -> Level;
    /// Changes it; an error says why that is not possible.
    fn set_level(&self, level: Level) -> std::result::Result<(), String>;
    /// Where the log goes.
    fn target(&self) -> LogTarget;
    /// Changes it; an error says why that is not possible.
    fn set_target(&self, target: LogTarget) -> std::result::Result<(), String>;
}

/// The object.
pub struct LogControl {
    pub(super) context: Context,
    pub(super) log: Arc<dyn LogSwitch>,
}

/// syslog's words, from the least to the most detail, and what they mean here.
const LEVELS: [(&str, Level); 8] = [
    ("emerg", Level::ERROR),
    ("alert", Level::ERROR),
    ("crit", Level::ERROR),
    ("err", Level::ERROR),
    ("warning", Level::WARN),
    ("notice", Level::INFO),
    ("info", Level::INFO),
    ("debug", Level::DEBUG),
];

/// The word for a level. `trace` has none of its own: it is the most detail there is.
fn word(level: Level) -> &'static str {
    match level {
        Level::ERROR => "err",
        Level::WARN => "warning",
        Level::INFO => "info",
        _ => "debug",
    }
}

impl LogControl {
    /// Lets the caller change the log. A call that does not come from the bus (which has no header) changes nothing.
    async fn allow(&self, header: Option<Header<'_>>, connection: &Connection) -> Result<()> {
        let header = header.ok_or_else(|| Error::NotAuthorized("the call has no header".into()))?;
        self.context.authority.allow(Action::Configure, &header, connection).await?;
        Ok(())
    }
}

#[interface(name = "org.freedesktop.LogControl1")]
impl LogControl {
    /// `emerg`, `alert`, `crit`, `err`, `warning`, `notice`, `info` or `debug`.
    #[zbus(property(emits_changed_signal = "false"))]
    fn log_level(&self) -> String {
        word(self.log.level()).into()
    }

    #[zbus(property)]
    async fn set_log_level(
        &self,
        wanted: String,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<()> {
        self.allow(header, connection).await?;
        let known = LEVELS.iter().find(|(word, _)| *word == wanted);
        let Some((_, level)) = known else {
            return Err(Error::InvalidInput(format!(
                "{:?} is no log level: use one of {}",
                shortened(&wanted),
                LEVELS.map(|(word, _)| word).join(", ")
            )));
        };
        self.log.set_level(*level).map_err(Error::Failed)?;
        tracing::info!("log level is {wanted}");
        Ok(())
    }

    /// `journal`, `console` (standard error) or `null`.
    #[zbus(property(emits_changed_signal = "false"))]
    fn log_target(&self) -> String {
        self.log.target().word().into()
    }

    #[zbus(property)]
    async fn set_log_target(
        &self,
        wanted: String,
        #[zbus(header)] header: Option<Header<'_>>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<()> {
        self.allow(header, connection).await?;
        let Some(target) = LogTarget::ALL.into_iter().find(|target| target.word() == wanted) else {
            return Err(Error::InvalidInput(format!(
                "{:?} is no log target: use one of {}",
                shortened(&wanted),
                LogTarget::ALL.map(LogTarget::word).join(", ")
            )));
        };
        self.log.set_target(target).map_err(Error::Failed)
    }

    /// The daemon's name in the log.
    #[zbus(property(emits_changed_signal = "false"))]
    fn syslog_identifier(&self) -> String {
        "finetuned".into()
    }
}
