//! The command line of `finetuned`.

use crate::clock::SystemClock;
use crate::config::spec::Spec;
use crate::train::gate::UntilRaised;
use crate::train::observer::Event;
use crate::train::run::{Outcome, RunPaths, run};
use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

#[derive(Parser)]
#[command(name = "finetuned", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a spec in the foreground.
    Run {
        spec: PathBuf,
        #[arg(long)]
        resume: bool,
        #[arg(long)]
        output: Option<PathBuf>,
        #[arg(long = "set")]
        set: Vec<String>,
    },
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let Command::Run { spec, resume, output, set } = Arguments::parse().command;
    let spec = match Spec::load(&spec, &set) {
        Ok(spec) => spec,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(2);
        }
    };
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        let _ = signal_hook::flag::register(signal, flag.clone());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).unwrap_or_else(|| "cache".into());
    let paths = RunPaths {
        output: output.unwrap_or_else(|| PathBuf::from("runs").join(&spec.run.name)),
        cache: cache.join("finetuned"),
    };
    let mut observer = |event: Event| match event {
        Event::MicroStep { .. } | Event::Preparing { .. } | Event::Evaluating(..) => {}
        other => println!("{other:?}"),
    };
    match run(&spec, &paths, resume, &mut UntilRaised(flag), &mut observer, &SystemClock::new()) {
        Ok(Outcome::Finished { summary, adapter }) => {
            println!("{summary:?} {}", adapter.display());
            ExitCode::SUCCESS
        }
        Ok(Outcome::Stopped { .. }) => ExitCode::from(130),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
