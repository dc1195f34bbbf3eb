//! `finetuned run`: a spec in the foreground, from files to adapter.

use super::arguments::{self, SpecArguments, ThreadArguments, command_line, directory_name, shown};
use super::console;
use super::exit::{Exit, Failure};
use super::interrupt::Interrupt;
use super::progress::{Counts, Progress, duration};
use super::speed;
use crate::checkpoint;
use crate::clock::SystemClock;
use crate::config::spec::Spec;
use crate::plan::throughput::Origin;
use crate::train::observer::{Event, Observer};
use crate::train::run::{Outcome, RunError, RunPaths, Summary, run};
use crate::units::Bytes;
use clap::Args;
use std::ffi::OsString;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Arguments of `finetuned run`.
#[derive(Args, Debug)]
pub struct RunArguments {
    #[command(flatten)]
    spec: SpecArguments,
    /// Go on from the last checkpoint; start where there is none
    #[arg(long)]
    resume: bool,
    /// Directory of the results [default: runs/NAME beside the spec]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    #[command(flatten)]
    threads: ThreadArguments,
}

/// Runs the command.
pub fn command(arguments: &RunArguments) -> Result<Exit, Failure> {
    arguments.threads.apply()?;
    let spec = arguments.spec.load()?;
    let beside = arguments.spec.path.parent().unwrap_or(Path::new(""));
    let output = arguments.output.clone();
    let output = output.unwrap_or_else(|| beside.join("runs").join(directory_name(&spec.run.name)));
    let foreground = Foreground {
        submitted: arguments.spec.path.clone(),
        spec,
        output,
        resume: arguments.resume,
        again: arguments.again(),
    };
    let done = foreground.run()?;
    if let Some(finished) = &done.finished {
        console::result(&finished.report())?;
    }
    Ok(done.exit)
}

impl RunArguments {
    /// The command line that continues this run.
    fn again(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec![arguments::program(), "run".into()];
        words.extend(self.spec.again());
        if let Some(output) = &self.output {
            words.extend(["--output".into(), output.into()]);
        }
        words.extend(self.threads.again());
        words.push("--resume".into());
        words
    }
}

/// A run in the foreground.
pub struct Foreground {
    /// The spec's file.
    pub submitted: PathBuf,
    /// The spec.
    pub spec: Spec,
    /// Where the results go.
    pub output: PathBuf,
    /// Go on from a checkpoint.
    pub resume: bool,
    /// The command line that continues it.
    pub again: Vec<OsString>,
}

/// How it ended.
pub struct Done {
    /// Done, nothing to do, or interrupted.
    pub exit: Exit,
    /// What it found, unless it was interrupted.
    pub finished: Option<Finished>,
}

/// What a finished run found.
pub struct Finished {
    /// The figures.
    pub summary: Summary,
    /// PEFT adapter directory.
    pub adapter: PathBuf,
}

impl Foreground {
    /// Trains, showing progress and listening to signals.
    pub fn run(&self) -> Result<Done, Failure> {
        let clock = SystemClock::new();
        let paths = RunPaths { output: self.output.clone(), cache: arguments::cache_dir()? };
        // An earlier attempt that ended well leaves its figures; one that was cut short does not.
        let had_finished = self.output.join("summary.json").exists();
        let interrupt = Interrupt::listen()?;
        let mut gate = interrupt.gate();
        let mut progress = Progress::new(&clock);
        let machine = speed::machine();
        let mut observer = |event: Event| {
            if let Event::Measured(measured) = event {
                let record = speed::record(*measured, Origin::Run, machine.clone());
                return speed::remember(&record);
            }
            if matches!(event, Event::Started { .. }) {
                interrupt.training_starts();
                self.keep_spec();
            }
            progress.observe(event);
        };
        let outcome = run(&self.spec, &paths, self.resume, &mut gate, &mut observer, &clock);
        let counts = progress.counts();
        drop(progress);
        match outcome {
            Ok(Outcome::Finished { summary, adapter }) => {
                let nothing = counts.resumed && counts.steps == 0 && had_finished;
                if nothing {
                    console::message(&format!(
                        "nothing to do: the run in {} had finished; its adapter was written again, as it was",
                        shown(&self.output)
                    ));
                }
                let exit = if nothing { Exit::NothingToDo } else { Exit::Done };
                Ok(Done { exit, finished: Some(Finished { summary: *summary, adapter }) })
            }
            Ok(Outcome::Stopped { reason, checkpoint }) => {
                console::message(&format!(
                    "stopped ({reason}); the state is in {}\ncontinue with: {}",
                    shown(&checkpoint),
                    command_line(&self.again)
                ));
                Ok(Done { exit: Exit::Interrupted, finished: None })
            }
            Err(error) => Err(self.explain(error, counts)),
        }
    }

    /// Keeps the spec as it was submitted beside the one with the defaults filled in. It is for people, so a spec that
    /// has meanwhile gone, or a disk that refuses, is worth a warning and no more.
    fn keep_spec(&self) {
        let copy = self.output.join("spec.toml");
        let kept = std::fs::read(&self.submitted)
            .map_err(anyhow::Error::from)
            .and_then(|text| checkpoint::atomic_write(&copy, &text).map_err(anyhow::Error::from));
        if let Err(error) = kept {
            tracing::warn!(spec = %self.submitted.display(), %error, "the spec was not copied to the results");
        }
    }

    /// Adds what to do now.
    fn explain(&self, error: RunError, counts: Counts) -> Failure {
        let again = command_line(&self.again);
        let occupied = matches!(error, RunError::Occupied { .. });
        let broken = matches!(
            error,
            RunError::Checkpoint(_) | RunError::File(_) | RunError::Metrics(_) | RunError::Adapter(_)
        );
        let failure = Failure::from(error);
        if occupied {
            failure.help(format!("continue it with: {again}"))
        } else if broken && counts.started {
            failure.help(format!("when that is mended, continue from the last checkpoint with: {again}"))
        } else {
            failure
        }
    }
}

impl Finished {
    /// The figures for people.
    pub fn report(&self) -> String {
        let s = &self.summary;
        let mut text = String::new();
        let early = if s.stopped_early { ", stopped early: no improvement any more" } else { "" };
        let _ = writeln!(
            text,
            "finished   {} steps, {:.2} epochs, {} tokens in {} ({:.0} tok/s){early}",
            s.steps,
            s.epochs,
            s.tokens,
            duration(Duration::try_from_secs_f64(s.seconds).unwrap_or_default()),
            s.tokens_per_second,
        );
        let _ = writeln!(text, "held-out   {}", self.held_out());
        if let Some(peak) = s.peak_memory_bytes {
            let planned = Bytes(s.planned_memory_bytes);
            let _ = writeln!(text, "memory     {} at the peak, {planned} planned", Bytes(peak));
        }
        let _ = writeln!(text, "adapter    {}", shown(&self.adapter));
        text
    }

    /// Held-out loss before and after, in words.
    fn held_out(&self) -> String {
        let s = &self.summary;
        match (s.baseline_eval_loss, s.best_eval_loss, s.best_step) {
            (Some(before), Some(best), Some(0)) => format!(
                "loss {before:.4} before; no step made it better than {best:.4}: the adapter changes nothing"
            ),
            (Some(before), Some(after), Some(step)) => {
                format!("loss {before:.4} before, {after:.4} after (step {step}, the one in adapter/)")
            }
            _ => "no held-out rows: nothing tells whether the adapter is better than the base".into(),
        }
    }
}
