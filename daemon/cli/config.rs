//! `finetuned config check`: reads the daemon's configuration and nothing else.

use super::console;
use super::exit::{Exit, Failure};
use crate::config::daemon::DaemonConfig;
use crate::config::{ConfigError, Mode};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Commands about the daemon's configuration.
#[derive(Subcommand, Debug)]
pub enum ConfigCommand {
    /// Print what is in force, every key, or what is wrong (exit code 2)
    Check(CheckArguments),
}

/// Arguments of `finetuned config check`.
#[derive(Args, Debug)]
pub struct CheckArguments {
    /// Read this file only, instead of those below /usr/lib/finetuned and /etc/finetuned
    file: Option<PathBuf>,
    /// The configuration of a daemon on the session bus, below $XDG_CONFIG_HOME/finetuned
    #[arg(long)]
    session: bool,
}

/// Runs the command.
pub fn command(command: &ConfigCommand) -> Result<Exit, Failure> {
    let ConfigCommand::Check(arguments) = command;
    let mode = if arguments.session { Mode::Session } else { Mode::System };
    let config = DaemonConfig::load(arguments.file.as_deref(), mode, &|name| std::env::var_os(name))
        .map_err(failed)?;
    console::result(&config.to_toml())?;
    Ok(Exit::Done)
}

/// A configuration that is wrong, as the command line tells it.
pub fn failed(error: ConfigError) -> Failure {
    let exit = match error {
        ConfigError::Invalid(_) => Exit::Usage,
        ConfigError::Read { .. } => Exit::Error,
    };
    Failure::new(error).exit(exit)
}
