//! Who writes where. Results go to standard output; messages, warnings and the progress bar go to standard error.
//!
//! There is one terminal, so there is one bar, and it is global: a warning from deep inside the library must push it
//! aside, or the two lines run into each other.

use super::exit::Failure;
use indicatif::ProgressBar;
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// The bar that stands on the terminal now.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

fn bar() -> MutexGuard<'static, Option<ProgressBar>> {
    BAR.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Puts a bar on the terminal; the guard takes it away.
pub fn show(bar_shown: &ProgressBar) -> Shown {
    *bar() = Some(bar_shown.clone());
    Shown
}

/// A bar is on the terminal as long as this lives.
pub struct Shown;

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(bar) = bar().take() {
            bar.finish_and_clear();
        }
    }
}

/// Runs `write` with the bar out of the way.
fn beside_the_bar<R>(write: impl FnOnce() -> R) -> R {
    // A clone: the lock is not held while the bar draws.
    let bar = bar().clone();
    match bar {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// Writes a line to standard error. A standard error that is closed is nobody's problem.
pub fn message(line: &str) {
    beside_the_bar(|| drop(writeln!(io::stderr(), "{line}")));
}

/// Writes a line to standard output that the command can do without: training goes on when its reader has gone.
pub fn line(line: &str) {
    beside_the_bar(|| drop(writeln!(io::stdout(), "{line}")));
}

/// Writes a result to standard output. A reader that has gone (`| head`) has seen enough; anything else, a full disk
/// behind a redirection first of all, is an error.
pub fn result(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(anyhow::Error::from(error).context("cannot write to standard output")))
        }
        _ => Ok(()),
    }
}

/// Whether somebody watches standard error on a terminal that can move its cursor.
pub fn interactive() -> bool {
    io::stderr().is_terminal() && capable()
}

/// Whether standard output may hold colours (<https://no-color.org>).
pub fn colours() -> bool {
    io::stdout().is_terminal() && capable() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

fn capable() -> bool {
    std::env::var_os("TERM").is_some_and(|term| !term.is_empty() && term != "dumb")
}

/// Sends the library's warnings to standard error; `FINETUNED_LOG` chooses others (`info`, `finetuned::model=debug`).
pub fn listen() {
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::WARN.into())
        .with_env_var("FINETUNED_LOG")
        .from_env_lossy();
    // Fails only where a subscriber is set already: then that one listens.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .with_writer(|| Messages)
        .try_init();
}

/// Standard error beside the bar, as a writer.
struct Messages;

impl Write for Messages {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        beside_the_bar(|| io::stderr().write_all(bytes)).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
