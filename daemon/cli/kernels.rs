//! `finetuned kernels build` and `finetuned kernels list`: the CUDA kernels, compiled ahead of time for a package, and what
//! the compiler made of them. Neither needs a GPU; both need NVRTC where there is no cubin yet.

use super::arguments;
use super::console;
use super::exit::{Exit, Failure};
use clap::{Args, Subcommand};
use finetuned_cuda::Error;
use finetuned_cuda::compile::{Compiler, VARIABLE};
use finetuned_cuda::cubin::{self, Usage};
use finetuned_cuda::cubins::{self, Cubins, SHIPPED};
use finetuned_cuda::kernels::{self, Kernel};
use finetuned_cuda::source::{self, FILES};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::PathBuf;

/// The architecture of an Orin.
const ORIN: u32 = 87;
/// Ampere, the first with the instructions that the kernels use.
const OLDEST: u32 = 80;

/// What is done with the kernels.
#[derive(Debug, Subcommand)]
pub enum KernelsCommand {
    /// Compile all of them to cubins, for a package
    #[command(after_help = "\
Example:
  finetuned kernels build --arch sm_87 --output /usr/lib/finetuned/kernels")]
    Build(BuildArguments),
    /// Show registers, shared memory and spills of each
    #[command(after_help = "\
Examples:
  finetuned kernels list
  finetuned kernels list --arch sm_87 --arch sm_90 --json")]
    List(ListArguments),
}

/// Which GPUs, and which compiler.
#[derive(Args, Debug)]
pub struct TargetArguments {
    /// Compile for this architecture, such as sm_87 (Orin); may be given several times
    #[arg(long = "arch", value_name = "SM", value_parser = architecture, default_value = "sm_87")]
    architectures: Vec<u32>,
    /// The NVRTC library to compile with [default: $FINETUNED_NVRTC, else where the system has it]
    #[arg(long, value_name = "FILE")]
    nvrtc: Option<PathBuf>,
}

/// Arguments of `finetuned kernels build`.
#[derive(Args, Debug)]
pub struct BuildArguments {
    #[command(flatten)]
    target: TargetArguments,
    /// The directory to write the cubins to; it is made if need be
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

/// Arguments of `finetuned kernels list`.
#[derive(Args, Debug)]
pub struct ListArguments {
    #[command(flatten)]
    target: TargetArguments,
    /// Look for cubins here first
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// `sm_87`
fn architecture(text: &str) -> Result<u32, String> {
    match text.strip_prefix("sm_").and_then(|digits| digits.parse().ok()) {
        Some(sm) if sm >= OLDEST => Ok(sm),
        Some(_) => Err(format!("the kernels need sm_{OLDEST} (Ampere) or newer")),
        None => Err("an architecture is written as sm_87".to_string()),
    }
}

/// Runs the command.
pub fn command(command: &KernelsCommand) -> Result<Exit, Failure> {
    match command {
        KernelsCommand::Build(arguments) => build(arguments),
        KernelsCommand::List(arguments) => list(arguments),
    }
}

fn failure(error: Error) -> Failure {
    let no_compiler = match &error {
        Error::NoCompiler { .. } => true,
        Error::NoCubin { cause, .. } => matches!(**cause, Error::NoCompiler { .. }),
        _ => false,
    };
    let failure = Failure::new(error);
    if no_compiler {
        failure.help(format!(
            "install NVRTC (on a Jetson: apt install cuda-nvrtc-12-6; elsewhere: pip install nvidia-cuda-nvrtc-cu12) and \
             name the library with --nvrtc or {VARIABLE}"
        ))
    } else {
        failure
    }
}

fn build(arguments: &BuildArguments) -> Result<Exit, Failure> {
    let target = &arguments.target;
    let compiler = Compiler::load(target.nvrtc.as_deref()).map_err(failure)?;
    for &sm in &target.architectures {
        for source in FILES {
            let (path, bytes) = cubins::build(&compiler, source, sm, &arguments.output).map_err(failure)?;
            console::result(&format!("{} ({} bytes)\n", path.display(), bytes.len()))?;
        }
    }
    Ok(Exit::Done)
}

/// A kernel on an architecture.
struct Row {
    kernel: &'static Kernel,
    sm: u32,
    usage: Usage,
    compiler: String,
}

fn list(arguments: &ListArguments) -> Result<Exit, Failure> {
    let shipped = arguments.directory.iter().cloned().chain([PathBuf::from(SHIPPED)]).collect();
    let cache = arguments::cache_dir()?.join("kernels");
    let cubins = Cubins::new(shipped, Some(cache), arguments.target.nvrtc.clone());
    let mut rows = Vec::new();
    for &sm in &arguments.target.architectures {
        for source in FILES {
            rows.extend(rows_of(&cubins, source, sm).map_err(failure)?);
        }
    }
    console::result(&if arguments.json { format!("{}\n", as_json(&rows)) } else { as_text(&rows) })?;
    Ok(Exit::Done)
}

fn rows_of(cubins: &Cubins, source: &'static source::Source, sm: u32) -> Result<Vec<Row>, Error> {
    let cubin = cubins.find(source, sm)?;
    let found = cubin::usage(source.name, &cubin.bytes)?;
    kernels::ALL
        .iter()
        .filter(|kernel| kernel.file == source.name)
        .map(|kernel| {
            let usage = found.iter().find(|usage| usage.kernel == kernel.name).cloned();
            let usage = usage.ok_or(Error::MissingKernel { file: kernel.file, kernel: kernel.name })?;
            Ok(Row { kernel, sm, usage, compiler: cubin.compiler.clone() })
        })
        .collect()
}

impl Row {
    /// Blocks on an SM, where the SM's limits are known.
    fn blocks(&self) -> Option<u32> {
        (self.sm == ORIN).then(|| self.kernel.occupancy_sm87(self.usage.registers, self.usage.shared))
    }
}

fn as_text(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<28} {:>6} {:>8} {:>10} {:>8} {:>8} {:>7} {:>7}  {}\n",
        "kernel", "arch", "threads", "registers", "shared", "spills", "blocks", "code", "compiler"
    );
    for row in rows {
        let blocks = row.blocks().map_or_else(|| "-".to_string(), |blocks| blocks.to_string());
        // A text of one's own cannot fail to be written to.
        let _ = writeln!(
            text,
            "{:<28} {:>6} {:>8} {:>10} {:>8} {:>8} {:>7} {:>7}  {}",
            row.kernel.name,
            format!("sm_{}", row.sm),
            row.kernel.threads,
            row.usage.registers,
            row.usage.shared + row.kernel.dynamic_shared,
            row.usage.stack,
            blocks,
            row.usage.code,
            row.compiler,
        );
    }
    text
}

fn as_json(rows: &[Row]) -> Value {
    let kernels: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "name": row.kernel.name,
                "file": row.kernel.file,
                "arch": format!("sm_{}", row.sm),
                "threads": row.kernel.threads,
                "registers": row.usage.registers,
                "static_shared_bytes": row.usage.shared,
                "dynamic_shared_bytes": row.kernel.dynamic_shared,
                "stack_bytes": row.usage.stack,
                "code_bytes": row.usage.code,
                "blocks_per_sm": row.blocks(),
                "compiler": row.compiler,
            })
        })
        .collect();
    json!({ "schema": 1, "kernels": kernels })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_architecture_is_written_as_the_compiler_writes_it() {
        assert_eq!(architecture("sm_87"), Ok(87));
        assert_eq!(architecture("sm_75").unwrap_err(), "the kernels need sm_80 (Ampere) or newer");
        for wrong in ["87", "sm87", "sm_", "compute_87", "sm_8.7"] {
            assert_eq!(architecture(wrong).unwrap_err(), "an architecture is written as sm_87", "{wrong}");
        }
    }

    #[test]
    fn a_row_says_what_a_kernel_takes() {
        let usage = Usage { kernel: "add_bf16".into(), registers: 26, shared: 64, stack: 0, code: 640 };
        let row =
            |sm| Row { kernel: &kernels::add_bf16, sm, usage: usage.clone(), compiler: "nvrtc12.6".into() };
        let rows = [row(87), row(90)];
        let text = as_text(&rows);
        let cells: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(cells[1], ["add_bf16", "sm_87", "256", "26", "64", "0", "6", "640", "nvrtc12.6"]);
        assert_eq!(cells[2][6], "-");
        let json = as_json(&rows);
        assert_eq!(json["kernels"][0]["registers"], 26);
        assert_eq!(json["kernels"][0]["blocks_per_sm"], 6);
        assert!(json["kernels"][1]["blocks_per_sm"].is_null());
    }
}
