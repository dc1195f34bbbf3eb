//! Where the daemon's log goes, and how much of it.
//!
//! ```text
//!   event ──► filter (reloadable) ──┬──► journal   with its fields: RUN_ID, STEP, REASON, MESSAGE_ID
//!                                   └──► console   standard error, a line each
//! ```
//!
//! Both outputs always see spans, so that either can take over in the middle of one; the one that is the target sees
//! events. At the start that is the journal where systemd has connected standard error to it (`JOURNAL_STREAM`), else
//! the console.

use crate::bus::{LogSwitch, LogTarget};
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, reload};

/// The program's name in the journal.
const IDENTIFIER: &str = "finetuned";

/// The log's level and target, changeable while the daemon runs.
#[derive(Debug)]
pub struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    level: Mutex<Level>,
    target: Arc<AtomicU8>,
    has_journal: bool,
}

/// Sends the log of this process where it belongs. `level` is one of the configuration's words; `directives`, from the
/// environment, replace it where they are given.
///
/// # Errors
/// When the process has a log already.
pub fn listen(level: &str, directives: Option<String>, under_systemd: bool) -> Result<Arc<Log>, String> {
    let journal = tracing_journald::layer().ok();
    let (log, subscriber) = build(level, directives, under_systemd, journal, io::stderr);
    subscriber.try_init().map_err(|error| error.to_string())?;
    Ok(log)
}

/// The log and the subscriber that feeds it.
fn build<W>(
    level: &str,
    directives: Option<String>,
    under_systemd: bool,
    journal: Option<tracing_journald::Layer>,
    console: W,
) -> (Arc<Log>, impl Subscriber + Send + Sync + 'static)
where
    W: for<'w> tracing_subscriber::fmt::MakeWriter<'w> + Send + Sync + 'static,
{
    let level = parse_level(level);
    let has_journal = journal.is_some();
    let first = if has_journal && under_systemd { LogTarget::Journal } else { LogTarget::Console };
    let target = Arc::new(AtomicU8::new(number(first)));
    let first_filter = match directives {
        Some(directives) => EnvFilter::new(directives),
        None => filter(level),
    };
    let (filter, handle) = reload::Layer::new(first_filter);
    let journal = journal.map(|layer| {
        let inner = layer.with_field_prefix(None).with_syslog_identifier(IDENTIFIER.into());
        Output { inner, of: LogTarget::Journal, target: target.clone() }
    });
    let console = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .fmt_fields(Fields)
        .with_writer(console);
    let console = Output { inner: console, of: LogTarget::Console, target: target.clone() };
    let subscriber = tracing_subscriber::registry().with(filter).with(journal).with(console);
    (Arc::new(Log { filter: handle, level: Mutex::new(level), target, has_journal }), subscriber)
}

fn parse_level(word: &str) -> Level {
    word.parse().unwrap_or(Level::INFO)
}

/// What is logged at a level: of others' code warnings at most, it is told by its own variables.
fn filter(level: Level) -> EnvFilter {
    let others = level.min(Level::WARN);
    EnvFilter::new(format!("{others},finetuned={level}"))
}

fn number(target: LogTarget) -> u8 {
    LogTarget::ALL.iter().position(|known| *known == target).unwrap_or(0) as u8
}

impl LogSwitch for Log {
    fn level(&self) -> Level {
        *self.level.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_level(&self, level: Level) -> Result<(), String> {
        self.filter.reload(filter(level)).map_err(|error| error.to_string())?;
        *self.level.lock().unwrap_or_else(PoisonError::into_inner) = level;
        Ok(())
    }

    fn target(&self) -> LogTarget {
        let number = self.target.load(Ordering::Relaxed) as usize;
        LogTarget::ALL.get(number).copied().unwrap_or(LogTarget::Console)
    }

    fn set_target(&self, target: LogTarget) -> Result<(), String> {
        if target == LogTarget::Journal && !self.has_journal {
            return Err(
                "there is no journal on this machine, or it was not there when the daemon started".into()
            );
        }
        self.target.store(number(target), Ordering::Relaxed);
        Ok(())
    }
}

/// An output that writes events while it is the target.
struct Output<L> {
    inner: L,
    of: LogTarget,
    target: Arc<AtomicU8>,
}

impl<S, L> Layer<S> for Output<L>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    L: Layer<S>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        self.inner.on_new_span(attributes, id, context);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        self.inner.on_record(id, values, context);
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        if self.target.load(Ordering::Relaxed) == number(self.of) {
            self.inner.on_event(event, context);
        }
    }
}

/// An event's fields on the console: the message, then the others in parentheses. Ids of messages are for programs.
struct Fields;

impl<'writer> FormatFields<'writer> for Fields {
    fn format_fields<R: RecordFields>(&self, mut writer: Writer<'writer>, fields: R) -> std::fmt::Result {
        let mut line = Line::default();
        fields.record(&mut line);
        writer.write_str(&line.message)?;
        match line.others.as_slice() {
            [] => Ok(()),
            others => write!(writer, " ({})", others.join(", ")),
        }
    }
}

#[derive(Default)]
struct Line {
    message: String,
    others: Vec<String>,
}

impl Line {
    fn add(&mut self, field: &Field, value: String) {
        // Other programs' bytes must not move a terminal's cursor.
        let plain = |text: String| text.replace(|c: char| c.is_control() && c != '\n', "\u{fffd}");
        match field.name() {
            "message" => self.message = plain(value),
            "MESSAGE_ID" => {}
            name => self.others.push(format!("{} {}", name.to_lowercase(), plain(value))),
        }
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.to_string());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.add(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Memory {
        fn take(&self) -> Vec<String> {
            let bytes = std::mem::take(&mut *self.0.lock().unwrap());
            String::from_utf8(bytes).unwrap().lines().map(|line| line.trim().to_string()).collect()
        }
    }

    fn say() {
        tracing::debug!("small");
        tracing::info!(MESSAGE_ID = "0123", RUN_ID = %"7f3a", STEP = 12u64, "a run\u{1b}[2J");
        tracing::error!(target: "zbus", "of others");
        tracing::info!(target: "zbus", "chatter");
    }

    const RUN: &str = "INFO a run\u{fffd}[2J (run_id 7f3a, step 12)";

    #[test]
    fn level_and_target_change_while_it_runs() {
        let memory = Memory::default();
        let writer = memory.clone();
        let (log, subscriber) = build("info", None, true, None, move || writer.clone());
        tracing::subscriber::with_default(subscriber, || {
            assert_eq!((log.level(), log.target()), (Level::INFO, LogTarget::Console), "there is no journal");
            say();
            assert_eq!(memory.take(), [RUN, "ERROR of others"]);
            log.set_level(Level::DEBUG).unwrap();
            say();
            assert_eq!(memory.take(), ["DEBUG small", RUN, "ERROR of others"]);
            log.set_level(Level::ERROR).unwrap();
            say();
            assert_eq!(memory.take(), ["ERROR of others"]);
            assert_eq!(log.level(), Level::ERROR);
            log.set_target(LogTarget::Null).unwrap();
            say();
            assert_eq!(memory.take(), Vec::<String>::new());
            let error = log.set_target(LogTarget::Journal).unwrap_err();
            assert!(error.contains("there is no journal"), "{error}");
            assert_eq!(log.target(), LogTarget::Null);
            log.set_target(LogTarget::Console).unwrap();
            tracing::info_span!("within", x = 1).in_scope(say);
            assert_eq!(memory.take().len(), 1);
        });
    }

    #[test]
    fn directives_replace_the_level() {
        let memory = Memory::default();
        let writer = memory.clone();
        let (_, subscriber) = build("info", Some("zbus=info".into()), false, None, move || writer.clone());
        tracing::subscriber::with_default(subscriber, || {
            say();
            assert_eq!(memory.take(), ["ERROR of others", "INFO chatter"]);
        });
    }
}
