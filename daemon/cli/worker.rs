//! `finetuned worker`: what the daemon starts to train. It is not for people and not in `--help`.

use super::exit::{Exit, Failure};
use crate::worker::main::{Ended, main};
use crate::worker::priorities::Priorities;
use clap::Args;

/// Arguments of `finetuned worker`.
#[derive(Args, Debug)]
pub struct WorkerArguments {
    /// Nice level; a higher one stays
    #[arg(long, value_name = "LEVEL", default_value_t = Priorities::default().nice,
          value_parser = clap::value_parser!(i32).range(0..=19))]
    nice: i32,
    /// Score of the out-of-memory killer; a higher one stays
    #[arg(long, value_name = "SCORE", default_value_t = Priorities::default().oom_score_adjust,
          value_parser = clap::value_parser!(i32).range(0..=1000))]
    oom_score_adjust: i32,
}

/// Runs the command.
pub fn command(arguments: &WorkerArguments) -> Result<Exit, Failure> {
    let priorities = Priorities { nice: arguments.nice, oom_score_adjust: arguments.oom_score_adjust };
    match main(priorities).map_err(|error| Failure::new(error).exit(Exit::Usage))? {
        Ended::Well => Ok(Exit::Done),
        Ended::Badly => Ok(Exit::Error),
    }
}
