//! `finetuned` without a command: the daemon.

use super::config;
use super::exit::{Exit, Failure};
use crate::service::{self, ServiceArguments, ServiceError};
use clap::Args;
use std::path::PathBuf;

/// Arguments of the daemon.
#[derive(Args, Debug)]
pub struct DaemonArguments {
    /// Read this configuration only, instead of the files below /usr/lib/finetuned and /etc/finetuned
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Serve on the session bus instead of the system bus
    #[arg(long)]
    session: bool,
    /// Serve peers at this address, such as unix:path=/run/finetuned.sock, without a bus or beside --session
    #[arg(long, value_name = "ADDRESS")]
    peer: Vec<String>,
    /// Where runs and their inputs lie
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where quantised bases and tokens lie
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Look for sensors below this directory instead of /: for trying a budget on a simulated board
    #[arg(long, value_name = "DIR")]
    sysfs_root: Option<PathBuf>,
    /// Follow the clock in this file (docs/decisions/simulated-time.md): for simulations only
    #[arg(long, value_name = "FILE", hide = true, requires = "sysfs_root")]
    simulated_clock: Option<PathBuf>,
}

/// Runs the daemon.
pub fn command(arguments: &DaemonArguments) -> Result<Exit, Failure> {
    let absolute = |directory: &Option<PathBuf>| {
        directory.as_deref().map(std::path::absolute).transpose().map_err(Failure::new)
    };
    let arguments = ServiceArguments {
        config: arguments.config.clone(),
        session: arguments.session,
        peers: arguments.peer.clone(),
        state_directory: absolute(&arguments.state_dir)?,
        cache_directory: absolute(&arguments.cache_dir)?,
        sysfs_root: absolute(&arguments.sysfs_root)?,
        simulated_clock: arguments.simulated_clock.clone(),
    };
    match service::run(arguments) {
        Ok(()) => Ok(Exit::Done),
        Err(ServiceError::Config(error)) => {
            Err(config::failed(error).help("`finetuned config check` reads it without starting the daemon"))
        }
        Err(error) => Err(Failure::new(error)),
    }
}
