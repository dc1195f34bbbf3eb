//! `finetuned data inspect`: what a run would learn from, before it does.

use super::arguments::{self, SpecArguments, ThreadArguments};
use super::console;
use super::exit::{Exit, Failure};
use super::progress::Progress;
use crate::clock::SystemClock;
use crate::data::{self, ChatTokenizer, Marks};
use crate::train::observer::Observer;
use crate::train::prepare::{self, PrepareError};
use clap::{Args, Subcommand};

/// Commands about data.
#[derive(Subcommand, Debug)]
pub enum DataCommand {
    /// Show rows, formats, token lengths, what is cut, and some rows with their learnt part marked
    #[command(after_help = "\
Examples:
  finetuned data inspect night.toml
  finetuned data inspect night.toml --rows 20 | less
  finetuned data inspect night.toml --json | jq .report.train.share_truncated")]
    Inspect(InspectArguments),
}

/// Arguments of `finetuned data inspect`.
#[derive(Args, Debug)]
pub struct InspectArguments {
    #[command(flatten)]
    spec: SpecArguments,
    /// Rows that are shown, spread over the file
    #[arg(long, value_name = "N", default_value_t = 3)]
    rows: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: ThreadArguments,
}

/// Runs the command.
pub fn command(command: &DataCommand) -> Result<Exit, Failure> {
    let DataCommand::Inspect(arguments) = command;
    arguments.threads.apply()?;
    let spec = arguments.spec.load()?;
    let cache = arguments::cache_dir()?.join("tokens");
    let tokenizer = ChatTokenizer::load(&spec.model.base).map_err(PrepareError::from)?;
    let clock = SystemClock::new();
    let mut progress = Progress::of_preparation(&clock);
    let mut report = |done: data::Progress| progress.observe(prepare::reading(&done));
    // The rows are the same as in the run, so the token store is too: the run will find it.
    let data = data::prepare(&spec.data, spec.run.seed, &tokenizer, &cache, None, &mut report)
        .map_err(PrepareError::from)?;
    drop(progress);
    let text = if arguments.json {
        let mut object = data::inspect_json(&data, &tokenizer, arguments.rows);
        if let Some(object) = object.as_object_mut() {
            object.insert("schema".into(), 1.into());
        }
        format!("{object}\n")
    } else {
        let marks = if console::colours() { Marks::Ansi } else { Marks::Brackets };
        data::inspect(&data, &tokenizer, arguments.rows, marks)
    };
    console::result(&text)?;
    Ok(Exit::Done)
}
