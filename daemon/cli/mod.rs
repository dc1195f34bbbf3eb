//! The command line of `finetuned`. One module per command; `docs/cli.md` is the user's side of it.
//!
//! ```text
//!   arguments   what several commands share: the spec, threads, directories
//!   run, plan, generate, demo, data, spec, config, sensors, kernels, bench      the commands
//!   daemon      without a command                   worker   what the daemon starts; hidden
//!   progress    the bar or the lines of a run        interrupt   Ctrl-C
//!   speed       the record of speed
//!   console     who writes where                     exit        exit codes and error messages
//! ```

mod arguments;
mod bench;
mod config;
mod console;
mod daemon;
mod data;
mod demo;
mod exit;
mod generate;
mod interrupt;
mod kernels;
mod plan;
mod progress;
mod run;
mod sensors;
mod spec;
mod speed;
mod worker;

use crate::backend::cuda;
use clap::{CommandFactory, Parser, Subcommand};
use exit::{EXIT_CODES, Exit, Failure};
use std::process::ExitCode;

/// Fine-tunes language models on the device: a Hugging Face model directory and a file of conversations become a
/// LoRA adapter that PEFT, llama.cpp and vLLM can load.
#[derive(Parser, Debug)]
#[command(name = "finetuned", version, propagate_version = true, max_term_width = 100, after_help = EXIT_CODES)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    daemon: daemon::DaemonArguments,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Train what a spec describes, in the foreground
    #[command(after_help = "\
Examples:
  finetuned run night.toml
  finetuned run night.toml --resume
  finetuned run night.toml --set train.max_steps=10 --output try

Ctrl-C writes a checkpoint and ends; --resume continues, to the same bits.")]
    Run(run::RunArguments),
    /// Say what a run would take: parameters, tokens, steps, memory by part, hours, nights
    #[command(after_help = "\
Examples:
  finetuned plan night.toml
  finetuned plan night.toml --probe --before 06:00
  finetuned plan night.toml --set data.sequence_length=2048
  finetuned plan night.toml --json | jq .memory.total

Nothing is trained. Exit code 9, and the smallest change that helps, when the run does not fit: in memory, in the quota of \
energy, or before the moment that is asked for.")]
    Plan(plan::PlanArguments),
    /// Ask a model, with or without an adapter
    #[command(after_help = "\
Examples:
  finetuned generate --model SmolLM2-135M-Instruct --prompt 'Where is the charging dock?'
  finetuned generate --model SmolLM2-135M-Instruct --adapter runs/night/adapter --prompt '…'
  finetuned generate --model stories --raw --prompt 'Once upon a time' --temperature 0.8 --top-p 0.9 --seed 7")]
    Generate(generate::GenerateArguments),
    /// Teach the model that ships with this program a new task, in about a minute
    #[command(after_help = "\
Example:
  finetuned demo && finetuned run finetuned-demo/demo.toml --set lora.r=4 --output finetuned-demo/runs/r4")]
    Demo(demo::DemoArguments),
    /// Look at the data of a spec
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Look at a spec
    #[command(subcommand)]
    Spec(spec::SpecCommand),
    /// Look at the daemon's configuration
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Show what can be read of this machine: temperatures, power, clocks, supply
    #[command(after_help = "\
Examples:
  finetuned sensors
  finetuned sensors --watch
  finetuned sensors --json | jq .readings.power

Reads files of the kernel only, starts no program and needs no rights.")]
    Sensors(sensors::SensorsArguments),
    /// Record what the sensors say, a line of CSV for every round
    #[command(after_help = "\
Example:
  finetuned record-sensors --output night.csv --interval 1s --duration 8h")]
    RecordSensors(sensors::RecordArguments),
    /// Compile the CUDA kernels, and look at them
    #[command(subcommand)]
    Kernels(kernels::KernelsCommand),
    /// Measure how fast this machine is: kernels, and whole training steps
    #[command(after_help = "\
Examples:
  finetuned bench --quick
  finetuned bench --model Llama-3.2-1B --tokens 512 2048
  finetuned bench --kernel linear input-gradient --json > bench.json
  finetuned bench --device cpu

Weights and tokens are random: nothing has to be there but the machine.")]
    Bench(bench::BenchArguments),
    /// Train for the daemon at standard input
    #[command(hide = true)]
    Worker(worker::WorkerArguments),
}

/// The command line as it is declared, for the manual page and the completions.
pub fn declaration() -> clap::Command {
    Arguments::command()
}

/// Runs the command line.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let trains = matches!(arguments.command, Some(Command::Run(_)));
    cuda::failure::set_last_word(Box::new(move |error| {
        let exit = Exit::of_device(error);
        let mut failure = Failure::new(anyhow::anyhow!("{error}")).exit(exit);
        if trains {
            failure = failure.help("nothing was written since the last checkpoint: --resume goes on from it");
        }
        failure.print();
        exit as i32
    }));
    let done = match &arguments.command {
        Some(command) => {
            console::listen();
            dispatch(command)
        }
        // The daemon's log is its own.
        None => daemon::command(&arguments.daemon),
    };
    match done {
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
        Command::Plan(arguments) => plan::command(arguments),
        Command::Generate(arguments) => generate::command(arguments),
        Command::Demo(arguments) => demo::command(arguments),
        Command::Data(command) => data::command(command),
        Command::Spec(command) => spec::command(command),
        Command::Config(command) => config::command(command),
        Command::Sensors(arguments) => sensors::show(arguments),
        Command::RecordSensors(arguments) => sensors::record(arguments),
        Command::Kernels(command) => kernels::command(command),
        Command::Bench(arguments) => bench::command(arguments),
        Command::Worker(arguments) => worker::command(arguments),
    }
}
