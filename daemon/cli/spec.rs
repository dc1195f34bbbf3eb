//! `finetuned spec check`: reads a spec and nothing else.

use super::arguments::SpecArguments;
use super::console;
use super::exit::{Exit, Failure};
use clap::{Args, Subcommand};

/// Commands about specs.
#[derive(Subcommand, Debug)]
pub enum SpecCommand {
    /// Say what is wrong with a spec (exit code 2), or OK; its files are not opened
    Check(CheckArguments),
}

/// Arguments of `finetuned spec check`.
#[derive(Args, Debug)]
pub struct CheckArguments {
    #[command(flatten)]
    spec: SpecArguments,
    /// Print the spec with every default filled in, instead of OK
    #[arg(long)]
    resolved: bool,
}

/// Runs the command.
pub fn command(command: &SpecCommand) -> Result<Exit, Failure> {
    let SpecCommand::Check(arguments) = command;
    let spec = arguments.spec.load()?;
    console::result(&if arguments.resolved { spec.to_toml() } else { "OK\n".to_string() })?;
    Ok(Exit::Done)
}
