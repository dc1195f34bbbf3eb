//! `finetunectl`: the client of the daemon. One module per command or family of commands; `docs/finetunectl.md` is the
//! user's side of it.
//!
//! ```text
//!   submit, list, watch, top, records, steer, status, night, budget, inhibit, model, adapter, doctor      the commands
//!      │             figures   a run as text and as JSON       text   layout, escapes
//!      ▼
//!   connect ──► bus::{ManagerProxy, RunProxy} ──► the daemon            console   who writes where
//!                                                                       exit      exit codes and error messages
//! ```
//!
//! Whatever comes from the bus was written by somebody else: it is escaped before it reaches the terminal.

mod adapter;
mod budget;
mod connect;
mod console;
mod context;
mod doctor;
mod exit;
mod figures;
mod inhibit;
mod list;
mod model;
mod night;
mod plan;
mod records;
mod status;
mod steer;
mod submit;
mod text;
mod top;
mod watch;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use clap::{CommandFactory, Parser, Subcommand};
use connect::Transport;
use console::Console;
use context::{Context, Interrupts};
use exit::{Code, EXIT_CODES, Exit, Failure};
use std::process::ExitCode;
use std::time::Duration;

/// Talks to finetuned, the fine-tuning daemon: submits runs, watches and steers them, fetches their adapters.
#[derive(Parser, Debug)]
#[command(name = "finetunectl", version, propagate_version = true, max_term_width = 100, after_help = EXIT_CODES)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Arguments of every command.
#[derive(clap::Args, Debug)]
#[command(next_help_heading = "Options of every command")]
struct Global {
    /// Talk to the daemon on the session bus
    #[arg(long, global = true, conflicts_with = "peer")]
    session: bool,
    /// Talk to a daemon that listens at ADDRESS (unix:path=…), without a bus [default: $FINETUNED_ADDRESS, if set]
    #[arg(long, global = true, value_name = "ADDRESS")]
    peer: Option<String>,
    /// How long to wait for an answer (for `wait`: for the end of the run) [default: 30; no limit where files are
    /// copied or something is computed]
    #[arg(long, global = true, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    /// Never let polkit ask for a password
    #[arg(long, global = true)]
    no_ask_password: bool,
    /// No colours
    #[arg(long, global = true)]
    no_color: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Put a run into the queue
    #[command(after_help = "\
Examples:
  finetunectl submit night.toml
  finetunectl submit night.toml --watch
  finetunectl submit night.toml --set train.max_steps=100 --priority 5
  finetunectl submit night.toml --deadline 06:00
  id=$(finetunectl submit night.toml) && finetunectl wait \"$id\"

The spec and every file that it names are read here, with your rights. A [model] base that is a plain name and no file here \
is a model that the daemon has (`finetunectl model list`).")]
    Submit(submit::SubmitArguments),
    /// Say what a run would take on the daemon's machine: memory, hours, nights, energy
    #[command(after_help = "\
Examples:
  finetunectl plan night.toml
  finetunectl plan night.toml --probe --before 06:00
  finetunectl plan night.toml --json | jq .calendar.finish

Nothing is trained. Exit code 9, and the smallest change that helps, when the run does not fit: in memory, in the quota of \
energy, or before the moment that is asked for.")]
    Plan(plan::PlanArguments),
    /// List the runs: those that are not over, and the last ones that are
    #[command(visible_alias = "ls")]
    List(list::ListArguments),
    /// Show one run
    Show(list::ShowArguments),
    /// Watch a run until it ends; Ctrl-C leaves it alone
    Watch(watch::WatchArguments),
    /// Wait for the end of a run
    Wait(watch::WaitArguments),
    /// Print what happened to a run
    Logs(records::LogsArguments),
    /// Print loss and speed of every step, and every evaluation
    Metrics(records::MetricsArguments),
    /// Save and stop runs until they are resumed
    Pause(steer::RunsArguments),
    /// Return paused runs to the queue
    Resume(steer::RunsArguments),
    /// End runs for good; their checkpoints stay until they are removed
    Cancel(steer::RunsArguments),
    /// Delete runs that are over, with all their files
    Remove(steer::RemoveArguments),
    /// Change a run's place in the queue: higher goes first
    Priority(steer::PriorityArguments),
    /// Say when a run should be done: of equal priority the earliest goes first
    #[command(after_help = "\
Examples:
  finetunectl deadline night '2026-11-27 06:00'
  finetunectl deadline night 06:00
  finetunectl deadline night +8h
  finetunectl deadline night none

A deadline that is missed ends nothing: the run goes on. That it will be missed is told beforehand.")]
    Deadline(steer::DeadlineArguments),
    /// Have a checkpoint written now
    Checkpoint(steer::RunArguments),
    /// Have held-out loss computed now, which changes nothing in the run
    Evaluate(steer::RunArguments),
    /// Show what the daemon is doing
    Status,
    /// Show what a night was used for: training, waiting and why, temperatures, energy
    #[command(after_help = "\
Examples:
  finetunectl night
  finetunectl night --date last --html night.html
  finetunectl night --date 2026-11-24 --json

A night goes from noon to noon and has the date of its evening. Without --date it is the one that runs, if a window of it has \
begun, else the last one.")]
    Night(night::NightArguments),
    /// What training may take, and when: heat, power, energy, hours
    #[command(subcommand)]
    Budget(budget::BudgetCommand),
    /// Show runs, temperatures, power and queue on a live page
    Top(top::TopArguments),
    /// Hold all training while a command runs, or until Ctrl-C
    #[command(after_help = "\
Examples:
  finetunectl inhibit --why docking -- ros2 run dock dock_node
  finetunectl inhibit --why 'a demonstration'

Ends with the exit code of the command (128 + N where signal N ended it, 127 where it is not there). The hold ends with \
this process, whatever happens to it.")]
    Inhibit(inhibit::InhibitArguments),
    /// Models that the daemon has
    #[command(subcommand)]
    Model(model::ModelCommand),
    /// Adapters that runs have made
    #[command(subcommand)]
    Adapter(adapter::AdapterCommand),
    /// Look for what may keep this machine from training, and say what to do
    Doctor,
}

/// A length of time in seconds, with a fraction where need be.
fn seconds(text: &str) -> Result<Duration, String> {
    let problem = || format!("{text:?} is no number of seconds above 0");
    let seconds: f64 = text.parse().map_err(|_| problem())?;
    Duration::try_from_secs_f64(seconds).ok().filter(|length| !length.is_zero()).ok_or_else(problem)
}

/// The command line as it is declared, for the manual page and the completions.
pub fn declaration() -> clap::Command {
    Arguments::command()
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let context = arguments.global.context();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => runtime.block_on(dispatch(&arguments.command, &context)),
        Err(error) => Err(Failure::new(Exit::Error, "cannot start").because(error)),
    };
    finish(ended, &context).into()
}

/// Says what went wrong, if anything did.
fn finish(ended: Result<Code, Failure>, context: &Context) -> Code {
    ended.unwrap_or_else(|failure| {
        context.console.failure(&failure);
        failure.exit.into()
    })
}

impl Global {
    fn context(&self) -> Context {
        // What is typed goes before what the environment says.
        let address = self.peer.clone().or_else(|| std::env::var("FINETUNED_ADDRESS").ok());
        let transport = match address {
            _ if self.session => Transport::Session,
            Some(address) if !address.is_empty() => Transport::Peer(address),
            _ => Transport::System,
        };
        Context {
            transport,
            console: Console::standard(self.no_color),
            clock: Box::new(crate::clock::SystemClock::new()),
            zone: jiff::tz::TimeZone::system(),
            timeout: self.timeout,
            ask_password: !self.no_ask_password,
            json: self.json,
            root: "/".into(),
            interrupts: Interrupts::Signals,
        }
    }
}

async fn dispatch(command: &Command, context: &Context) -> Result<Code, Failure> {
    match command {
        Command::Submit(arguments) => submit::command(arguments, context).await,
        Command::Plan(arguments) => plan::command(arguments, context).await,
        Command::List(arguments) => list::command(arguments, context).await,
        Command::Show(arguments) => list::show(arguments, context).await,
        Command::Watch(arguments) => watch::command(arguments, context).await,
        Command::Wait(arguments) => watch::wait(arguments, context).await,
        Command::Logs(arguments) => records::logs(arguments, context).await,
        Command::Metrics(arguments) => records::metrics(arguments, context).await,
        Command::Pause(arguments) => steer::command(steer::Order::Pause, &arguments.runs, context).await,
        Command::Resume(arguments) => steer::command(steer::Order::Resume, &arguments.runs, context).await,
        Command::Cancel(arguments) => steer::command(steer::Order::Cancel, &arguments.runs, context).await,
        Command::Remove(arguments) => steer::remove(arguments, context).await,
        Command::Priority(arguments) => steer::priority(arguments, context).await,
        Command::Deadline(arguments) => steer::deadline(arguments, context).await,
        Command::Checkpoint(arguments) => steer::checkpoint(arguments, context).await,
        Command::Evaluate(arguments) => steer::evaluate(arguments, context).await,
        Command::Status => status::command(context).await,
        Command::Night(arguments) => night::command(arguments, context).await,
        Command::Budget(command) => budget::command(command, context).await,
        Command::Top(arguments) => top::command(arguments, context).await,
        Command::Inhibit(arguments) => inhibit::command(arguments, context).await,
        Command::Model(command) => model::command(command, context).await,
        Command::Adapter(command) => adapter::command(command, context).await,
        Command::Doctor => doctor::command(context).await,
    }
}
