//! How a command ends: the exit code, and what is said when it ends badly.
//!
//! An error is printed with its causes, one a line, and with what may help:
//!
//! ```text
//! error: cannot resume runs/night/checkpoints/00000040: …
//!   because: …
//! help: start it anew with another --output
//! ```
//!
//! Library errors often quote their cause in their own text; such a cause is not printed twice.

use super::{arguments, console};
use crate::config::spec::SpecError;
use crate::data::DataError;
use crate::train::prepare::PrepareError;
use crate::train::run::RunError;
use std::process::ExitCode;

/// The exit codes, as `--help` shows them. `docs/cli.md` has the same list.
pub const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    error: a file, the disk, the model
  2    usage, or a mistake in the spec
  3    the run failed: its loss, gradient or adapter was not finite
  4    the GPU failed, or cannot be used: --resume continues from the checkpoint
  8    nothing to do: the run had finished before
  9    limits: the plan does not fit (memory, energy, time)
  130  interrupted: --resume continues from the checkpoint";

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// As asked.
    Done = 0,
    /// A file, the disk, the model.
    Error = 1,
    /// Usage, or a mistake in the spec.
    Usage = 2,
    /// Loss, gradient or adapter was not finite.
    RunFailed = 3,
    /// The GPU reported an error, or cannot be used.
    Device = 4,
    /// The run had finished before.
    NothingToDo = 8,
    /// The plan does not fit: memory, energy, time.
    Limits = 9,
    /// Stopped by a signal; the state is in a checkpoint.
    Interrupted = 130,
}

impl Exit {
    /// Of an error of the GPU.
    pub fn of_device(error: &finetuned_cuda::Error) -> Exit {
        if error.is_out_of_memory() { Exit::Limits } else { Exit::Device }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// A command that ended badly.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What went wrong.
    pub error: anyhow::Error,
    /// What may help.
    pub help: Vec<String>,
}

impl Failure {
    /// An error of the ordinary kind.
    pub fn new(error: impl Into<anyhow::Error>) -> Failure {
        Failure { exit: Exit::Error, error: error.into(), help: Vec::new() }
    }

    /// The same with another exit code.
    pub fn exit(self, exit: Exit) -> Failure {
        Failure { exit, ..self }
    }

    /// The same with a hint.
    pub fn help(mut self, hint: impl Into<String>) -> Failure {
        self.help.push(hint.into());
        self
    }

    /// Prints it to standard error.
    pub fn print(&self) {
        for line in self.lines() {
            console::message(&line);
        }
    }

    fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        match self.error.downcast_ref() {
            // Mistakes in a spec are independent of each other: each is an error.
            Some(SpecError::Invalid(mistakes)) => {
                lines.extend(mistakes.iter().map(|mistake| format!("error: {mistake}")));
            }
            _ => {
                let mut said = self.error.to_string();
                lines.push(format!("error: {said}"));
                for cause in self.error.chain().skip(1) {
                    let cause = cause.to_string();
                    if !said.contains(&cause) {
                        lines.push(format!("  because: {cause}"));
                        said = cause;
                    }
                }
            }
        }
        lines.extend(self.help.iter().map(|hint| format!("help: {hint}")));
        lines
    }
}

impl From<SpecError> for Failure {
    fn from(error: SpecError) -> Failure {
        Failure::new(error).exit(Exit::Usage)
    }
}

impl From<PrepareError> for Failure {
    fn from(error: PrepareError) -> Failure {
        let exit = match &error {
            PrepareError::Unfit { .. } => Exit::Usage,
            PrepareError::Device(error) => Exit::of_device(error),
            _ => Exit::Error,
        };
        let in_cache = match (&error, arguments::cache_dir()) {
            (PrepareError::Data(DataError::Write { path, .. }), Ok(cache)) => path.starts_with(cache),
            (PrepareError::Data(DataError::Store(_)), _) => true,
            _ => false,
        };
        let no_gpu = matches!(error, PrepareError::Device(_));
        let failure = Failure::new(error).exit(exit);
        if no_gpu {
            failure.help("train.backend = \"cpu\" computes without it, much slower")
        } else if in_cache {
            failure.help("set FINETUNED_CACHE_DIR to a directory with room that can be written")
        } else {
            failure
        }
    }
}

impl From<RunError> for Failure {
    fn from(error: RunError) -> Failure {
        match error {
            RunError::Prepare(error) => error.into(),
            RunError::Diverged { .. } => Failure::new(error).exit(Exit::RunFailed),
            RunError::Misfit { .. } => Failure::new(error)
                .help("bring back what the checkpoint was made from, or start anew with another --output"),
            other => Failure::new(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read the book: {source}")]
    struct Outer {
        source: Middle,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("page 7 is torn")]
    struct Middle {
        source: std::io::Error,
    }

    #[test]
    fn causes_are_printed_once() {
        let source = Middle { source: std::io::Error::other("a dog ate it") };
        let failure = Failure::new(Outer { source }).help("feed the dog");
        assert_eq!(
            failure.lines(),
            ["error: cannot read the book: page 7 is torn", "  because: a dog ate it", "help: feed the dog"]
        );
    }

    #[test]
    fn every_code_is_documented() {
        let page = include_str!("../../docs/cli.md");
        for exit in [
            Exit::Done,
            Exit::Error,
            Exit::Usage,
            Exit::RunFailed,
            Exit::Device,
            Exit::NothingToDo,
            Exit::Limits,
            Exit::Interrupted,
        ] {
            let code = exit as u8;
            assert!(EXIT_CODES.contains(&format!("\n  {code} ")), "{code} is not in --help");
            assert!(page.contains(&format!("| {code} |")), "{code} is not in docs/cli.md");
        }
    }
}
