//! `finetuned plan`: what a run would take, without training and without an output directory.
//!
//! Data and base are read as the run reads them (so they are in the cache afterwards); everything else is arithmetic on
//! shapes. Where the plan does not fit in the memory that is available, the smallest change that would is looked for,
//! from what costs nothing but time to what changes the result:
//!
//! 1. recompute activations (same bits, about a third slower);
//! 2. a smaller micro-batch with as many more micro-steps (same bits);
//! 3. shorter sequences (rows are cut: another result).

use super::arguments::{self, SpecArguments, ThreadArguments};
use super::console;
use super::exit::{Exit, Failure};
use super::progress::Progress;
use crate::backend::Backend;
use crate::clock::SystemClock;
use crate::config::spec::{GradientCheckpointing, Quantization, Spec};
use crate::model::memory::MemoryPlan;
use crate::train::prepare::{self, Prepared, StepCount};
use crate::units::Bytes;
use clap::Args;
use serde_json::{Value, json};
use std::fmt::Write;

/// Arguments of `finetuned plan`.
#[derive(Args, Debug)]
pub struct PlanArguments {
    #[command(flatten)]
    spec: SpecArguments,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: ThreadArguments,
}

/// Runs the command.
pub fn command(arguments: &PlanArguments) -> Result<Exit, Failure> {
    arguments.threads.apply()?;
    let spec = arguments.spec.load()?;
    let backend = prepare::cpu_backend(&spec)?;
    let clock = SystemClock::new();
    let mut progress = Progress::of_preparation(&clock);
    let prepared = prepare::prepare(&spec, &arguments::cache_dir()?, None, &mut progress)?;
    drop(progress);
    let plan = Plan::new(&spec, &backend, &prepared, prepare::available_memory());
    console::result(&if arguments.json { format!("{}\n", plan.json()) } else { plan.text() })?;
    plan.verdict()
}

/// What a run would take.
struct Plan<'a> {
    spec: &'a Spec,
    prepared: &'a Prepared,
    steps: StepCount,
    memory: MemoryPlan,
    available: Option<Bytes>,
    /// What would make it fit, if it does not.
    change: Option<Change>,
}

/// A change of the spec and the memory it leads to.
#[derive(Clone, Debug, PartialEq)]
struct Change {
    /// `key=value`, as `--set` takes it.
    set: Vec<String>,
    total: Bytes,
    same_result: bool,
}

impl<'a> Plan<'a> {
    fn new<B: Backend>(
        spec: &'a Spec,
        backend: &B,
        prepared: &'a Prepared,
        available: Option<Bytes>,
    ) -> Plan<'a> {
        let memory = prepare::memory_plan(spec, backend, prepared);
        let change = match available {
            Some(available) if memory.total() > available => {
                let total = |spec: &Spec| prepare::memory_plan(spec, backend, prepared).total();
                smallest_change(spec, memory.recompute, available, total)
            }
            _ => None,
        };
        let steps = prepare::count_steps(spec, &prepared.data.train);
        Plan { spec, prepared, steps, memory, available, change }
    }

    fn fits(&self) -> Option<bool> {
        self.available.map(|available| self.memory.total() <= available)
    }

    /// Parameters of the adapter, and of adapter and base.
    fn parameters(&self) -> (u64, u64) {
        let trainable = self.prepared.layout.parameters();
        (trainable, self.prepared.base.total_parameters() + trainable)
    }

    fn text(&self) -> String {
        let (spec, config) = (self.spec, &self.prepared.base.config);
        let (trainable, total) = self.parameters();
        let report = &self.prepared.data.report;
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<10} {value}");
        };
        line("run", spec.run.name.clone());
        line(
            "base",
            format!(
                "{}: {}, {} layers, hidden size {}, vocabulary {}, {}",
                spec.model.base.display(),
                config.family.model_type(),
                config.layers,
                config.hidden_size,
                config.vocab_size,
                held(self.prepared)
            ),
        );
        line(
            "adapter",
            format!(
                "r {}, alpha {} on {}{}",
                spec.lora.r,
                spec.lora.alpha,
                spec.lora.target_modules.join(", "),
                spec.lora.layers.map_or(String::new(), |(first, last)| format!(", layers {first}..{last}")),
            ),
        );
        line(
            "parameters",
            format!(
                "{} trainable of {} ({:.3} %)",
                grouped(trainable),
                grouped(total),
                100.0 * trainable as f64 / total as f64
            ),
        );
        line(
            "data",
            format!(
                "{} rows, {} tokens, {} of them learnt; {} rows held out",
                grouped(report.train.rows),
                grouped(report.train.tokens),
                grouped(report.train.trainable_tokens),
                report.eval.as_ref().map_or("no".into(), |eval| grouped(eval.rows)),
            ),
        );
        line(
            "sequences",
            format!(
                "{} an epoch, of at most {} tokens; {} × {} a step",
                grouped(self.steps.sequences_per_epoch),
                spec.data.sequence_length,
                spec.train.micro_batch_size,
                spec.train.gradient_accumulation_steps
            ),
        );
        line("steps", format!("{} ({:.2} epochs)", grouped(self.steps.total), self.steps.epochs));
        for (i, part) in self.memory.parts.iter().enumerate() {
            let name = if i == 0 { "memory" } else { "" };
            line(name, format!("{:<31} {:>10}", part.name, part.bytes.to_string()));
        }
        let available = self.available.map_or(String::new(), |bytes| format!(" of {bytes} available"));
        line("", format!("{:<31} {:>10}{available}", "total", self.memory.total().to_string()));
        let how =
            if self.memory.recompute { "activations are computed again" } else { "activations are kept" };
        let setting = match spec.train.gradient_checkpointing {
            GradientCheckpointing::Auto => "auto",
            GradientCheckpointing::None => "none",
            GradientCheckpointing::Full => "full",
        };
        line("recompute", format!("{how} (gradient_checkpointing = \"{setting}\")"));
        text
    }

    fn json(&self) -> Value {
        let (spec, config) = (self.spec, &self.prepared.base.config);
        let (trainable, total) = self.parameters();
        let report = &self.prepared.data.report;
        let batch = prepare::largest_micro_batch(spec, &self.prepared.data);
        json!({
            "schema": 1,
            "run": spec.run.name,
            "base": {
                "path": spec.model.base,
                "hash": self.prepared.base.hash,
                "model_type": config.family.model_type(),
                "layers": config.layers,
                "hidden_size": config.hidden_size,
                "vocab_size": config.vocab_size,
                "quantization": self.prepared.base.quantization,
                "double_quant": self.prepared.base.double_quant,
            },
            "parameters": {
                "trainable": trainable,
                "total": total,
                "share": trainable as f64 / total as f64,
            },
            "data": { "train": report.train, "eval": report.eval },
            "steps": {
                "total": self.steps.total,
                "epochs": self.steps.epochs,
                "tokens_per_epoch": self.steps.tokens_per_epoch,
                "sequences_per_epoch": self.steps.sequences_per_epoch,
                "sequences_per_step": prepare::sequences_per_step(spec),
            },
            "memory": {
                "parts": self.memory.parts,
                "total": self.memory.total(),
                "available": self.available,
                "fits": self.fits(),
                "recompute": self.memory.recompute,
                "micro_batch": {
                    "tokens": batch.tokens,
                    "labelled": batch.labelled,
                    "longest": batch.longest,
                },
            },
            "change": self.change.as_ref().map(|change| json!({
                "set": change.set,
                "total": change.total,
                "same_result": change.same_result,
            })),
        })
    }

    /// The exit code, with a warning where memory is tight.
    fn verdict(&self) -> Result<Exit, Failure> {
        let (total, Some(available)) = (self.memory.total(), self.available) else { return Ok(Exit::Done) };
        if total <= available {
            // Whatever else runs takes memory too, and the kernel's figure is an estimate.
            if total.0 > available.0 / 10 * 9 {
                console::message(&format!(
                    "warning: the run would take {total} of {available}; anything else that starts may end it"
                ));
            }
            return Ok(Exit::Done);
        }
        let failure = Failure::new(anyhow::anyhow!(
            "this run does not fit: it would take {total}, {available} are available"
        ))
        .exit(Exit::Limits);
        Err(match &self.change {
            Some(Change { set, total, same_result }) => {
                let flags: Vec<String> = set.iter().map(|set| format!("--set {set}")).collect();
                let result = if *same_result { "the result is the same" } else { "longer rows would be cut" };
                failure.help(format!("{} takes {total}; {result}", flags.join(" ")))
            }
            None => failure.help("no shorter sequence makes it fit: free memory, or take a smaller base"),
        })
    }
}

/// The smallest change after which `total` is within `available`.
fn smallest_change(
    spec: &Spec,
    recompute: bool,
    available: Bytes,
    total: impl Fn(&Spec) -> Bytes,
) -> Option<Change> {
    let mut changed = spec.clone();
    let mut set = Vec::new();
    let found = |set: &[String], total, same_result| Some(Change { set: set.to_vec(), total, same_result });

    if !recompute {
        changed.train.gradient_checkpointing = GradientCheckpointing::Full;
        set.push("train.gradient_checkpointing=full".to_string());
        let bytes = total(&changed);
        if bytes <= available {
            return found(&set, bytes, true);
        }
    }
    let product = prepare::sequences_per_step(spec);
    let kept = set.clone();
    for size in (1..spec.train.micro_batch_size).rev().filter(|size| product.is_multiple_of(*size)) {
        changed.train.micro_batch_size = size;
        changed.train.gradient_accumulation_steps = product / size;
        set.clone_from(&kept);
        set.push(format!("train.micro_batch_size={size}"));
        set.push(format!("train.gradient_accumulation_steps={}", product / size));
        let bytes = total(&changed);
        if bytes <= available {
            return found(&set, bytes, true);
        }
    }
    // The longest multiple of 64 that fits, by bisection: memory grows with the length.
    const UNIT: usize = 64;
    let mut at = |units: usize| {
        changed.data.sequence_length = units * UNIT;
        total(&changed)
    };
    let (mut fits, mut too_long) = (0, spec.data.sequence_length.div_ceil(UNIT));
    while too_long - fits > 1 {
        let middle = fits + (too_long - fits) / 2;
        if at(middle) <= available {
            fits = middle;
        } else {
            too_long = middle;
        }
    }
    if fits == 0 {
        return None;
    }
    let bytes = at(fits);
    set.push(format!("data.sequence_length={}", fits * UNIT));
    found(&set, bytes, false)
}

/// How the base's weights are held.
fn held(prepared: &Prepared) -> &'static str {
    match (prepared.base.quantization, prepared.base.double_quant) {
        (Quantization::Nf4, true) => "nf4 with double quantisation",
        (Quantization::Nf4, false) => "nf4",
        (Quantization::None, _) => "not quantised",
    }
}

/// A number with its thousands apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A model of memory: what is kept, times micro-batch, times length.
    fn total(spec: &Spec) -> Bytes {
        let kept = if spec.train.gradient_checkpointing == GradientCheckpointing::Full { 1 } else { 8 };
        Bytes(1000 + (kept * spec.train.micro_batch_size * spec.data.sequence_length) as u64)
    }

    fn change(available: u64) -> Option<(Vec<String>, bool)> {
        let text = "[model]\nbase = \"b\"\n[data]\ntrain = \"t\"\n[train]\nmicro_batch_size = 6\n\
                    gradient_accumulation_steps = 2\n";
        let spec = Spec::parse(text, "a.toml", Path::new("/"), &[]).unwrap();
        let change = smallest_change(&spec, false, Bytes(available), total)?;
        assert!(change.total.0 <= available);
        Some((change.set, change.same_result))
    }

    #[test]
    fn the_smallest_change_is_offered() {
        let set = |texts: &[&str], same| Some((texts.iter().map(|s| s.to_string()).collect(), same));
        let full = "train.gradient_checkpointing=full";
        assert_eq!(change(1000 + 6 * 1024), set(&[full], true));
        // Five micro-batches do not divide the twelve sequences of a step.
        let four = [full, "train.micro_batch_size=4", "train.gradient_accumulation_steps=3"];
        assert_eq!(change(1000 + 6 * 1024 - 1), set(&four, true));
        let one = [full, "train.micro_batch_size=1", "train.gradient_accumulation_steps=12"];
        assert_eq!(change(1000 + 1024), set(&one, true));
        let short = [one[0], one[1], one[2], "data.sequence_length=448"];
        assert_eq!(change(1000 + 500), set(&short, false));
        assert_eq!(change(1000 + 63), None);
    }

    #[test]
    fn thousands_are_apart() {
        assert_eq!([0, 999, 1000, 1234567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
