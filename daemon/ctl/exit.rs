//! How a command ends: the exit code, and what is said when it ends badly. Errors look as those of `finetuned`:
//!
//! ```text
//! error: there is no run "nihgt"
//!   because: …
//! help: `finetunectl list --all` shows every run
//! ```

use super::text::printable;
use crate::bus;
use crate::config::spec::SpecError;
use std::process::ExitCode;
use zbus::fdo;

/// The exit codes, as `--help` shows them. `docs/finetunectl.md` has the same list.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    error
  2    usage, or a mistake in the spec or in what was passed with it
  3    the run failed (submit --wait, watch, wait)
  4    no such run, model or night, or several runs fit
  5    not authorised
  6    no answer in time
  7    the daemon cannot be reached
  8    nothing to do: it is so already
  9    a limit of the daemon
  10   the run was cancelled (submit --wait, watch, wait)
  130  interrupted; a run goes on without its watcher";

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// As asked.
    Done = 0,
    /// Anything that has no code of its own.
    Error = 1,
    /// Usage, a mistake in the spec, or in a file that was passed.
    Usage = 2,
    /// The run that was waited for failed.
    RunFailed = 3,
    /// No such run or model, or several fit.
    NotFound = 4,
    /// The caller may not do that.
    NotAuthorized = 5,
    /// No answer in time, or a wait that took too long.
    Timeout = 6,
    /// No bus, no daemon, or it went away.
    Unreachable = 7,
    /// It is so already.
    NothingToDo = 8,
    /// A limit of the daemon's configuration.
    Limit = 9,
    /// The run that was waited for was cancelled.
    RunCancelled = 10,
    /// By Ctrl-C or SIGTERM.
    Interrupted = 130,
}

/// What the process ends with: one of ours, or the exit code of a command that was run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(pub u8);

impl From<Exit> for Code {
    fn from(exit: Exit) -> Code {
        Code(exit as u8)
    }
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> ExitCode {
        ExitCode::from(code.0)
    }
}

/// A command that ended badly.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// The last part of the D-Bus error's name, where the daemon refused.
    pub name: Option<&'static str>,
    /// What went wrong; several where they are independent of each other. Empty: there is nothing to say.
    pub errors: Vec<String>,
    /// Why.
    pub causes: Vec<String>,
    /// What may help.
    pub help: Vec<String>,
}

impl Failure {
    /// An error.
    pub fn new(exit: Exit, error: impl Into<String>) -> Failure {
        Failure { exit, name: None, errors: vec![error.into()], causes: Vec::new(), help: Vec::new() }
    }

    /// An end about which nothing needs to be said.
    pub fn silent(exit: Exit) -> Failure {
        Failure { errors: Vec::new(), ..Failure::new(exit, "") }
    }

    /// The same with a cause.
    pub fn because(mut self, cause: impl ToString) -> Failure {
        self.causes.push(cause.to_string());
        self
    }

    /// The same with a hint.
    pub fn help(mut self, hint: impl Into<String>) -> Failure {
        self.help.push(hint.into());
        self
    }

    /// What is printed, a line each, printable.
    pub fn lines(&self) -> Vec<String> {
        let part = |first: &'static str, text: &str| {
            let rest = " ".repeat(first.len());
            let lines: Vec<String> = text.lines().map(printable).collect();
            lines
                .into_iter()
                .enumerate()
                .map(|(i, line)| format!("{}{line}", if i == 0 { first } else { &rest }))
                .collect::<Vec<_>>()
        };
        let errors = self.errors.iter().flat_map(|text| part("error: ", text));
        let causes = self.causes.iter().flat_map(|text| part("  because: ", text));
        errors.chain(causes).chain(self.help.iter().flat_map(|text| part("help: ", text))).collect()
    }

    /// What happened, in one line.
    pub fn summary(&self) -> String {
        self.errors.join("; ")
    }
}

impl From<SpecError> for Failure {
    fn from(error: SpecError) -> Failure {
        match error {
            SpecError::Invalid(mistakes) => Failure {
                errors: mistakes.iter().map(ToString::to_string).collect(),
                ..Failure::silent(Exit::Usage)
            },
            other => Failure::new(Exit::Usage, other.to_string()),
        }
    }
}

impl From<bus::Error> for Failure {
    fn from(error: bus::Error) -> Failure {
        use bus::Error::*;
        let named = |exit, name, text: String| Failure { name: Some(name), ..Failure::new(exit, text) };
        match error {
            ZBus(error) => error.into(),
            NoSuchRun(text) => named(Exit::NotFound, "NoSuchRun", text).help(WHICH_RUN),
            AmbiguousRun(text) => {
                named(Exit::NotFound, "AmbiguousRun", text).help("give the id, or more of its digits")
            }
            NoSuchModel(text) => named(Exit::NotFound, "NoSuchModel", text)
                .help("`finetunectl model list` shows the registered ones"),
            NoSuchNight(text) => named(Exit::NotFound, "NoSuchNight", text)
                .help("`finetunectl night --list` shows which there are"),
            // Every mistake, a line each.
            InvalidSpec(text) => Failure {
                errors: text.lines().map(String::from).collect(),
                ..named(Exit::Usage, "InvalidSpec", String::new())
            },
            InvalidInput(text) => named(Exit::Usage, "InvalidInput", text),
            NotAuthorized(text) => named(Exit::NotAuthorized, "NotAuthorized", text).help(NOT_AUTHORIZED),
            LimitExceeded(text) => named(Exit::Limit, "LimitExceeded", text).help(LIMITS),
            NoSpace(text) => named(Exit::Error, "NoSpace", text).help(SPACE),
            AlreadyOver(text) => named(Exit::NothingToDo, "AlreadyOver", text),
            AlreadyPaused(text) => named(Exit::NothingToDo, "AlreadyPaused", text),
            NotPaused(text) => named(Exit::NothingToDo, "NotPaused", text),
            BeingCancelled(text) => named(Exit::NothingToDo, "BeingCancelled", text),
            NotActive(text) => {
                named(Exit::Error, "NotActive", text).help("`finetunectl watch RUN` shows when it trains")
            }
            NotOver(text) => {
                named(Exit::Error, "NotOver", text).help("wait for its end, or `finetunectl cancel RUN`")
            }
            Busy(text) => named(Exit::Error, "Busy", text).help("try again"),
            Failed(text) => named(Exit::Error, "Failed", text),
            ShuttingDown(text) => named(Exit::Unreachable, "ShuttingDown", text)
                .help("try again when it is up: `systemctl status finetuned`"),
        }
    }
}

const WHICH_RUN: &str =
    "`finetunectl list --all` shows every run; RUN is a name, an id, or the beginning of an id";

const LIMITS: &str =
    "wait until something ends, remove what is not needed, or raise the key in [limits] of finetuned.toml";

const SPACE: &str =
    "free space where the daemon keeps its runs: `finetunectl remove RUN` deletes a run that is over";

const NOT_AUTHORIZED: &str = "a member of group finetuned may submit runs and steer its own: \
     `sudo usermod -aG finetuned $USER`, then log in again; others' runs, models and holds need an administrator \
     (polkit actions org.finetuned.Finetuned1.*: `pkaction` lists them)";

const UNREACHABLE: &str = "is it running? `systemctl status finetuned`; a daemon of your own is reached with --session, \
     one on a socket with --peer; `finetunectl doctor` looks at everything";

impl From<zbus::Error> for Failure {
    fn from(error: zbus::Error) -> Failure {
        let unreachable = |cause: String| {
            Failure::new(Exit::Unreachable, "the daemon cannot be reached").because(cause).help(UNREACHABLE)
        };
        match &error {
            zbus::Error::InputOutput(_) | zbus::Error::Handshake(_) | zbus::Error::Connection(..) => {
                unreachable(error.to_string())
            }
            zbus::Error::Address(_) => Failure::new(Exit::Usage, "no such address of a bus")
                .because(error.to_string())
                .help("an address looks like unix:path=/run/finetuned/peer.sock"),
            zbus::Error::MethodError(name, text, _) => {
                let text = text.clone().unwrap_or_default();
                Failure::new(Exit::Error, format!("the daemon answered {}: {text}", name.as_str()))
            }
            zbus::Error::FDO(of_bus) => match &**of_bus {
                fdo::Error::ServiceUnknown(text)
                | fdo::Error::NameHasNoOwner(text)
                | fdo::Error::Disconnected(text)
                | fdo::Error::NoServer(text)
                | fdo::Error::NoReply(text)
                | fdo::Error::TimedOut(text)
                | fdo::Error::Timeout(text)
                | fdo::Error::IOError(text)
                | fdo::Error::SpawnFailed(text)
                | fdo::Error::SpawnExecFailed(text)
                | fdo::Error::SpawnForkFailed(text)
                | fdo::Error::SpawnChildExited(text)
                | fdo::Error::SpawnChildSignaled(text)
                | fdo::Error::SpawnServiceNotFound(text) => unreachable(text.clone()),
                fdo::Error::AccessDenied(text)
                | fdo::Error::AuthFailed(text)
                | fdo::Error::InteractiveAuthorizationRequired(text) => {
                    Failure::new(Exit::NotAuthorized, "the bus, or polkit, does not allow it")
                        .because(text)
                        .help(NOT_AUTHORIZED)
                }
                fdo::Error::LimitsExceeded(text) => {
                    Failure::new(Exit::Limit, "a limit of the bus").because(text)
                }
                // A run's object goes with the run.
                fdo::Error::UnknownObject(text) => {
                    Failure::new(Exit::NotFound, "the run is not there any more")
                        .because(text)
                        .help("`finetunectl list --all` shows every run")
                }
                fdo::Error::UnknownMethod(text)
                | fdo::Error::UnknownInterface(text)
                | fdo::Error::UnknownProperty(text)
                | fdo::Error::InvalidArgs(text) => {
                    Failure::new(Exit::Error, "daemon and finetunectl do not understand each other")
                        .because(text)
                        .help("`finetunectl doctor` compares their versions")
                }
                other => Failure::new(Exit::Error, "the call failed").because(other),
            },
            _ => Failure::new(Exit::Error, "the call failed").because(&error),
        }
    }
}

impl From<fdo::Error> for Failure {
    fn from(error: fdo::Error) -> Failure {
        zbus::Error::from(error).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_printed_line_by_line() {
        let failure = Failure::new(Exit::Error, "one\ntwo\x1b").because("three").help("four");
        assert_eq!(failure.lines(), ["error: one", "       two\\u{1b}", "  because: three", "help: four"]);
        let spec = Failure::from(bus::Error::InvalidSpec("a:1:1: x\na:2:1: y".into()));
        assert_eq!(spec.lines(), ["error: a:1:1: x", "error: a:2:1: y"]);
        assert!(Failure::silent(Exit::Done).lines().is_empty());
    }

    #[test]
    fn every_code_is_documented() {
        let page = include_str!("../../docs/finetunectl.md");
        for exit in [
            Exit::Done,
            Exit::Error,
            Exit::Usage,
            Exit::RunFailed,
            Exit::NotFound,
            Exit::NotAuthorized,
            Exit::Timeout,
            Exit::Unreachable,
            Exit::NothingToDo,
            Exit::Limit,
            Exit::RunCancelled,
            Exit::Interrupted,
        ] {
            let code = exit as u8;
            assert!(EXIT_CODES.contains(&format!("\n  {code} ")), "{code} is not in --help");
            assert!(page.contains(&format!("| {code} |")), "{code} is not in docs/finetunectl.md");
        }
    }

    #[test]
    fn errors_of_the_bus_have_their_codes() {
        let of = |error: fdo::Error| Failure::from(error).exit;
        assert_eq!(of(fdo::Error::ServiceUnknown("x".into())), Exit::Unreachable);
        assert_eq!(of(fdo::Error::AccessDenied("x".into())), Exit::NotAuthorized);
        assert_eq!(of(fdo::Error::UnknownObject("x".into())), Exit::NotFound);
        assert_eq!(of(fdo::Error::LimitsExceeded("x".into())), Exit::Limit);
        assert_eq!(of(fdo::Error::UnknownMethod("x".into())), Exit::Error);
        let gone = zbus::Error::from(std::io::Error::other("gone"));
        assert_eq!(Failure::from(gone).exit, Exit::Unreachable);
    }
}
