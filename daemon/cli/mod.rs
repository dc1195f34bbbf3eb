//! The command line of `finetuned`. One module per command; `docs/cli.md` is the user's side of it.
//!
//! ```text
//!   arguments   what several commands share: the spec, threads, directories
//!   run, plan, generate, demo, data, spec      the commands
//!   progress    the bar or the lines of a run        interrupt   Ctrl-C
//!   console     who writes where                     exit        exit codes and error messages
//! ```

mod arguments;
mod console;
mod exit;
mod interrupt;
mod progress;
mod run;

use clap::{Parser, Subcommand};
use exit::{EXIT_CODES, Exit, Failure};
use std::process::ExitCode;

/// Fine-tunes language models on the device: a Hugging Face model directory and a file of conversations become a
/// LoRA adapter that PEFT, llama.cpp and vLLM can load.
#[derive(Parser, Debug)]
#[command(name = "finetuned", version, propagate_version = true, max_term_width = 100, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Train what a spec describes, in the foreground
    #[command(after_help = "\
Examples:
  finetuned run night.toml
  finetuned run night.toml --resume
  finetuned run night.toml --set train.max_steps=10 --output /tmp/try

Ctrl-C writes a checkpoint and ends; --resume continues, to the same bits.")]
    Run(run::RunArguments),
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    console::listen();
    match dispatch(&arguments.command) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            failure.print();
            failure.exit.into()
        }
    }
}

fn dispatch(command: &Command) -> Result<Exit, Failure> {
    match command {
        Command::Run(arguments) => run::command(arguments),
    }
}
