//! `finetuned config check`: reads the daemon's configuration and nothing else.

use super::console;
use super::exit::{Exit, Failure};
use crate::config::daemon::DaemonConfig;
use crate::config::settings::{self, Layers, Setting};
use crate::config::{ConfigError, Loaded, Mode};
use clap::{Args, Subcommand};
use jiff::Timestamp;
use std::io;
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
    /// Where the daemon keeps what was set while it ran, instead of [storage] state_directory
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

/// Runs the command.
pub fn command(command: &ConfigCommand) -> Result<Exit, Failure> {
    let ConfigCommand::Check(arguments) = command;
    let mode = if arguments.session { Mode::Session } else { Mode::System };
    let mut files =
        Loaded::load(arguments.file.as_deref(), mode, &|name| std::env::var_os(name)).map_err(failed)?;
    if let Some(directory) = &arguments.state_dir {
        files.config.storage.state_directory = std::path::absolute(directory).map_err(Failure::new)?;
    }
    let path = files.config.storage.state_directory.join(settings::FILE);
    if std::fs::File::open(&path).is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
        let by = "`finetunectl budget show` has it";
        console::message(&format!(
            "what was set while the daemon ran is not shown: {} is private; {by}",
            path.display()
        ));
        return print(&files.config, &|_| None);
    }
    let layers = Layers::open(files, mode);
    if let Some(problem) = layers.lost() {
        let error = anyhow::anyhow!("{problem}");
        return Err(Failure::new(error).exit(Exit::Usage).help(
            "the daemon starts, but nothing trains: correct the file and reload the daemon, or take back what was set \
             with `finetunectl budget reset`",
        ));
    }
    print(&layers.config(), &|key| layers.lasting().get(key).map(remark))
}

fn print(config: &DaemonConfig, remark: &dyn Fn(&str) -> Option<String>) -> Result<Exit, Failure> {
    for caution in config.cautions() {
        console::message(&format!("note: {caution}"));
    }
    console::result(&config.to_toml_with(remark))?;
    Ok(Exit::Done)
}

/// `set by user 1000 at 2026-11-25T02:43:00Z`.
fn remark(Setting { uid, time_us, .. }: &Setting) -> String {
    let time = i64::try_from(*time_us).ok().and_then(|us| Timestamp::from_microsecond(us).ok());
    let time = time.map_or(String::new(), |time| format!(" at {time:.0}"));
    format!("set by user {uid}{time}")
}

/// A configuration that is wrong, as the command line tells it.
pub fn failed(error: ConfigError) -> Failure {
    let exit = match error {
        ConfigError::Invalid(_) => Exit::Usage,
        ConfigError::Read { .. } => Exit::Error,
    };
    Failure::new(error).exit(exit)
}
