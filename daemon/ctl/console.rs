//! Who writes where: results go to standard output; messages, hints and the progress bar go to standard error.

use super::exit::{Exit, Failure};
use super::text::hostile;
use indicatif::{ProgressBar, ProgressDrawTarget};
use serde_json::Value;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::sync::Mutex;

/// Version of the JSON that is printed: what a key means changes only with it.
pub const SCHEMA: u32 = 1;

/// Where text goes.
pub struct Console {
    target: Target,
    /// Colours on standard output.
    colours: bool,
    /// The bar that stands on the terminal now.
    bar: Mutex<Option<ProgressBar>>,
}

enum Target {
    Standard,
    /// Standard output and standard error of a test.
    #[cfg(test)]
    Memory(std::sync::Arc<Mutex<(String, String)>>),
}

impl Console {
    /// The process's own streams.
    pub fn standard(no_colour: bool) -> Console {
        let colours = !no_colour && colours(|name| std::env::var_os(name), io::stdout().is_terminal());
        Console { target: Target::Standard, colours, bar: Mutex::new(None) }
    }

    /// Into memory.
    #[cfg(test)]
    pub fn memory(text: std::sync::Arc<Mutex<(String, String)>>) -> Console {
        Console { target: Target::Memory(text), colours: false, bar: Mutex::new(None) }
    }

    /// Writes a result to standard output. When its reader has gone (`| head`) it has seen enough, and the command ends;
    /// anything else, a full disk behind a redirection first of all, is an error.
    pub fn result(&self, text: &str) -> Result<(), Failure> {
        let write = || match &self.target {
            Target::Standard => {
                let mut out = io::stdout().lock();
                out.write_all(text.as_bytes()).and_then(|()| out.flush())
            }
            #[cfg(test)]
            Target::Memory(memory) => {
                memory.lock().unwrap().0.push_str(text);
                Ok(())
            }
        };
        match self.beside_the_bar(write) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::silent(Exit::Done)),
            Err(error) => Err(Failure::new(Exit::Error, "cannot write to standard output").because(error)),
        }
    }

    /// Writes a line to standard output.
    pub fn line(&self, line: &str) -> Result<(), Failure> {
        self.result(&format!("{line}\n"))
    }

    /// Writes a JSON object, with its schema, as a line to standard output.
    pub fn json(&self, value: Value) -> Result<(), Failure> {
        self.line(&json_line(value))
    }

    /// Writes a line to standard error. A standard error that is closed is nobody's problem.
    pub fn message(&self, line: &str) {
        self.beside_the_bar(|| match &self.target {
            Target::Standard => drop(writeln!(io::stderr(), "{line}")),
            #[cfg(test)]
            Target::Memory(memory) => {
                let _ = writeln!(memory.lock().unwrap().1, "{line}");
            }
        });
    }

    /// Writes what went wrong.
    pub fn failure(&self, failure: &Failure) {
        for line in failure.lines() {
            self.message(&line);
        }
    }

    /// Asks a question on the terminal; no terminal, no answer.
    pub fn ask(&self, question: &str) -> Option<bool> {
        if !matches!(self.target, Target::Standard)
            || !io::stdin().is_terminal()
            || !io::stderr().is_terminal()
        {
            return None;
        }
        let _ = write!(io::stderr(), "{question} [y/N] ");
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).ok()?;
        Some(matches!(answer.trim(), "y" | "Y" | "yes"))
    }

    /// A bar, where somebody watches standard error on a terminal that can move its cursor.
    pub fn bar(&self) -> Option<Shown<'_>> {
        let capable = std::env::var_os("TERM").is_some_and(|term| !term.is_empty() && term != "dumb");
        if !matches!(self.target, Target::Standard) || !io::stderr().is_terminal() || !capable {
            return None;
        }
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
        *self.held() = Some(bar.clone());
        Some(Shown { bar, console: self })
    }

    /// Whether standard output takes colours.
    pub fn colours(&self) -> bool {
        self.colours
    }

    /// Text in a colour, where standard output takes colours.
    pub fn paint(&self, colour: Colour, text: &str) -> String {
        if self.colours { format!("\x1b[{}m{text}\x1b[0m", colour as u8) } else { text.to_string() }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Option<ProgressBar>> {
        self.bar.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn beside_the_bar<R>(&self, write: impl FnOnce() -> R) -> R {
        // A clone: the lock is not held while the bar draws.
        let bar = self.held().clone();
        match bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

/// A bar is on the terminal as long as this lives.
pub struct Shown<'a> {
    /// The bar.
    pub bar: ProgressBar,
    console: &'a Console,
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        self.console.held().take();
        self.bar.finish_and_clear();
    }
}

/// The few colours there are, as SGR parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// It is not well.
    Red = 31,
    /// It is well.
    Green = 32,
    /// It waits, or is not as it should be.
    Yellow = 33,
    /// It is over, or idle.
    Grey = 90,
}

impl Colour {
    /// The colour of a state, of a run or of the daemon.
    pub fn of_state(state: &str) -> Colour {
        match state {
            "active" | "preparing" | "running" | "saving" | "succeeded" => Colour::Green,
            "waiting" | "paused" | "stopping" => Colour::Yellow,
            "failed" => Colour::Red,
            _ => Colour::Grey,
        }
    }
}

/// Whether to colour: <https://no-color.org>, and `CLICOLOR_FORCE` against the look at the terminal.
fn colours(variable: impl Fn(&str) -> Option<std::ffi::OsString>, terminal: bool) -> bool {
    let set = |name: &str| variable(name).is_some_and(|value| !value.is_empty());
    let forced = set("CLICOLOR_FORCE") && variable("CLICOLOR_FORCE").is_some_and(|value| value != "0");
    let capable = set("TERM") && variable("TERM").is_some_and(|term| term != "dumb");
    !set("NO_COLOR") && (forced || (terminal && capable))
}

/// An object as one line, `schema` first. JSON escapes control characters up to U+001F; the others that a terminal could
/// obey stand only in strings, where an escape means the same.
pub fn json_line(value: Value) -> String {
    let mut object = serde_json::Map::new();
    object.insert("schema".into(), SCHEMA.into());
    match value {
        Value::Object(keys) => object.extend(keys.into_iter().filter(|(key, _)| key != "schema")),
        other => drop(object.insert("value".into(), other)),
    }
    let text = Value::Object(object).to_string();
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if hostile(c) {
            let _ = write!(safe, "\\u{:04x}", c as u32);
        } else {
            safe.push(c);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn json_is_harmless_and_means_the_same() {
        let value = json!({"name": "a\u{1b}\u{7f}\u{9b}\u{202e}é", "schema": 7});
        let line = json_line(value.clone());
        assert_eq!(line, "{\"schema\":1,\"name\":\"a\\u001b\\u007f\\u009b\\u202eé\"}");
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["name"], value["name"]);
    }

    #[test]
    fn colours_follow_the_conventions() {
        let with = |set: &[(&str, &str)], terminal| {
            colours(|name| set.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into()), terminal)
        };
        assert!(with(&[("TERM", "xterm")], true));
        assert!(!with(&[("TERM", "xterm")], false));
        assert!(!with(&[("TERM", "dumb")], true));
        assert!(!with(&[("TERM", "xterm"), ("NO_COLOR", "1")], true));
        assert!(with(&[("CLICOLOR_FORCE", "1")], false));
        assert!(!with(&[("CLICOLOR_FORCE", "0")], false));
        assert!(!with(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")], false));
    }
}
