//! `finetuned bench`: how fast this machine is, kernel by kernel and as whole training steps, with random weights.
//!
//! The kernels are measured by [`finetuned_cuda::bench`], a step by [`crate::train::bench`]; here is what was asked for, what
//! is known of the machine meanwhile, and the two pages: text and JSON (schema 1).

use super::arguments::{self, ThreadArguments};
use super::console;
use super::exit::{Exit, Failure};
use crate::backend::cuda::tiles::{self, Entry};
use crate::clock::{Clock, SystemClock};
use crate::config::budget::Board;
use crate::config::spec::{BackendChoice, ComputeDtype};
use crate::governor::readings::{Reading, Readings, ZoneRole};
use crate::governor::sensors::Sensors;
use crate::train::bench::{self, BenchError, Step};
use crate::train::device;
use crate::units::significant;
use clap::{Args, ValueEnum};
use finetuned_cuda::bench::{Ceilings, Model, OPERATIONS, Options, Report, Row, Statistics, run, shapes};
use finetuned_cuda::cubins::{Cubins, SHIPPED};
use finetuned_cuda::driver::Driver;
use finetuned_cuda::{Device, kernels};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Version of the JSON: keys may be added, what a key means changes only with another number.
const SCHEMA: u32 = 1;
/// How often power is read while a step is measured.
const METERED: Duration = Duration::from_millis(200);
/// What stands before every figure of the stand-in.
const STAND_IN: &str = "stand-in: not a speed";

/// What is measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum On {
    /// The first GPU: its kernels and whole steps.
    Cuda,
    /// The CPU: whole steps.
    Cpu,
}

/// Arguments of `finetuned bench`.
#[derive(Args, Debug)]
pub struct BenchArguments {
    /// Measure this operation or kernel only, such as linear or gemm_nf4_nt_64x64, or step; may be given several times
    #[arg(long = "kernel", value_name = "NAME", num_args = 1.., value_parser = operation)]
    kernels: Vec<String>,
    /// Take the shapes of this model only, such as Llama-3.2-1B; may be given several times
    #[arg(long = "model", value_name = "NAME", num_args = 1.., value_parser = model)]
    models: Vec<Model>,
    /// Tokens of a micro-batch [default: 64 256 512 1024 2048; of a step 512 2048]
    #[arg(long, value_name = "M", num_args = 1.., value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    tokens: Vec<u32>,
    /// Take fewer sizes and samples: a tenth of the time, and no table of tiles
    #[arg(long)]
    quick: bool,
    /// What is measured on
    #[arg(long, value_enum, default_value = "cuda", value_name = "DEVICE")]
    device: On,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: ThreadArguments,
}

/// A whole training step, as a name beside those of the operations.
const STEP: &str = "step";

fn operation(text: &str) -> Result<String, String> {
    if text == STEP || OPERATIONS.contains(&text) || kernels::find(text).is_some() {
        return Ok(text.into());
    }
    Err(format!("there are {STEP}, {}, and the kernels of `finetuned kernels list`", OPERATIONS.join(", ")))
}

fn model(text: &str) -> Result<Model, String> {
    Model::named(text).ok_or_else(|| {
        let names: Vec<&str> = shapes::MODELS.iter().map(|model| model.name).collect();
        format!("there are the shapes of {}", names.join(", "))
    })
}

/// What the machine is and how it stands.
#[derive(Clone, Debug, PartialEq)]
struct Standing {
    board: String,
    readings: Readings,
}

/// A step of a model, or why there is none.
struct Line {
    model: &'static str,
    tokens: usize,
    recompute: bool,
    step: Result<Step, String>,
}

/// Everything.
struct Page {
    before: Standing,
    after: Standing,
    kernels: Option<Report>,
    steps: Vec<Line>,
}

/// Runs the command.
pub fn command(arguments: &BenchArguments) -> Result<Exit, Failure> {
    arguments.threads.apply()?;
    let clock = Arc::new(SystemClock::new());
    let mut sensors = Sensors::open(Path::new("/"), &Board::default(), clock.clone());
    let board = sensors.board().name.to_string();
    let mut standing = || Standing { board: board.clone(), readings: sensors.read() };
    let before = standing();
    let kernels = match arguments.device {
        On::Cuda => Some(kernels_of_gpu(arguments)?),
        On::Cpu => None,
    };
    let steps = if arguments.wants_steps() { steps(arguments, &*clock)? } else { Vec::new() };
    let page = Page { before, after: standing(), kernels, steps };
    if let Some(report) = page.kernels.as_ref().filter(|_| !arguments.quick) {
        keep(report, page.before.readings.mode.clone())?;
    }
    console::result(&if arguments.json { format!("{}\n", page.json()) } else { page.text() })?;
    Ok(Exit::Done)
}

impl BenchArguments {
    fn wants_kernels(&self) -> bool {
        self.kernels.is_empty() || self.kernels.iter().any(|name| name != STEP)
    }

    fn wants_steps(&self) -> bool {
        self.kernels.is_empty() || self.kernels.iter().any(|name| name == STEP)
    }

    fn models(&self) -> Vec<Model> {
        match (self.models.is_empty(), self.device) {
            (false, _) => self.models.clone(),
            // Minutes a step for the larger ones.
            (true, On::Cpu) => shapes::MODELS.iter().take(1).copied().collect(),
            (true, On::Cuda) => shapes::MODELS.to_vec(),
        }
    }

    fn options(&self) -> Options {
        let options = if self.quick { Options::quick() } else { Options::default() };
        let tokens = match self.tokens.as_slice() {
            [] => options.tokens,
            asked => asked.iter().map(|tokens| *tokens as usize).collect(),
        };
        // Without any operation the ceilings remain.
        let models = if self.wants_kernels() { self.models() } else { Vec::new() };
        Options { models, tokens, kernels: self.kernels.clone(), ..options }
    }

    /// Tokens of the micro-batches of steps.
    fn of_steps(&self) -> Vec<usize> {
        match (self.tokens.as_slice(), self.quick) {
            ([], true) => vec![512],
            ([], false) if self.device == On::Cpu => vec![256, 1024],
            ([], false) => vec![512, 2048],
            (asked, _) => asked.iter().map(|tokens| *tokens as usize).collect(),
        }
    }
}

fn kernels_of_gpu(arguments: &BenchArguments) -> Result<Report, Failure> {
    let cache = arguments::cache_dir()?.join("kernels");
    let driver = Driver::open(0, &Cubins::new(vec![SHIPPED.into()], Some(cache), None));
    let driver = driver.map_err(|error| {
        Failure::new(error).help("--device cpu measures the steps of this machine's CPU, without a GPU")
    })?;
    let mut progress = |title: &str| {
        console::message(title);
        true
    };
    run(&Device::new(driver), &arguments.options(), &mut progress).map_err(Failure::new)
}

/// Writes the table of tiles, if there is one. A disk that refuses it is worth a warning.
fn keep(report: &Report, mode: Option<String>) -> Result<(), Failure> {
    if report.tiles.is_empty() || report.stand_in {
        return Ok(());
    }
    let path = arguments::cache_dir()?.join(tiles::NAME);
    let measured = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    match tiles::write(&path, Entry::new(&report.device, measured, mode, &report.tiles)) {
        Ok(()) => console::message(&format!("the fastest tiles of this device are in {}", path.display())),
        Err(error) => console::message(&format!("warning: the table of tiles is not kept: {error}")),
    }
    Ok(())
}

fn steps(arguments: &BenchArguments, clock: &dyn Clock) -> Result<Vec<Line>, Failure> {
    let cache = arguments::cache_dir()?;
    let choice = match arguments.device {
        On::Cuda => BackendChoice::Cuda,
        On::Cpu => BackendChoice::Cpu,
    };
    let mut lines = Vec::new();
    for model in arguments.models() {
        for tokens in arguments.of_steps() {
            for recompute in [true, false] {
                let how = if recompute { "recomputing" } else { "keeping activations" };
                console::message(&format!("{} step, {tokens} tokens, {how}", model.name));
                let options = bench::Options {
                    model,
                    tokens,
                    longest: 1024,
                    rank: 16,
                    recompute,
                    samples: if arguments.quick { 3 } else { 10 },
                    limit: Duration::from_secs(if arguments.quick { 2 } else { 10 }),
                };
                let mut note = |text: String| console::message(&text);
                let chosen = device::choose(choice, ComputeDtype::Auto, &cache, &mut note)?;
                let step = device::with_backend!(chosen, backend => measured(backend, &options, clock));
                lines.push(Line { model: model.name, tokens, recompute, step });
            }
        }
    }
    Ok(lines)
}

fn measured<B: crate::backend::Backend>(
    backend: B,
    options: &bench::Options,
    clock: &dyn Clock,
) -> Result<Step, String> {
    // The base lies in the memory of the machine before it does in the device's.
    let estimate = bench::base_estimate(&options.model).map_err(|error| error.to_string())?;
    let available = crate::train::prepare::available_memory(&backend);
    if let Some(available) = available.filter(|available| estimate > *available) {
        return Err(BenchError::TooLarge { needed: estimate, available }.to_string());
    }
    let meter = Meter::start();
    let step = bench::step(backend, options, clock, &mut || meter.joules());
    step.map_err(|error| error.to_string())
}

/// Energy since it was started, where the machine has a meter of power: a thread reads it and adds it up.
struct Meter {
    joules: Arc<Mutex<Option<f64>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Meter {
    fn start() -> Meter {
        let joules = Arc::new(Mutex::new(None));
        let stop = Arc::new(AtomicBool::new(false));
        let (sum, ended) = (joules.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let clock = Arc::new(SystemClock::new());
            let mut sensors = Sensors::open(Path::new("/"), &Board::default(), clock.clone());
            let mut last = None;
            while !ended.load(Ordering::Relaxed) {
                let power = watts(&sensors.read());
                let now = clock.monotonic();
                if let Some(power) = power {
                    let mut sum = sum.lock().unwrap_or_else(PoisonError::into_inner);
                    // Between two readings the mean of both.
                    let since = last.map_or(0.0, |(at, before): (Duration, f64)| {
                        (now.saturating_sub(at)).as_secs_f64() * (power + before) / 2.0
                    });
                    *sum = Some(sum.unwrap_or(0.0) + since);
                }
                last = power.map(|power| (now, power));
                std::thread::sleep(METERED);
            }
        });
        Meter { joules, stop, thread: Some(thread) }
    }

    fn joules(&self) -> Option<f64> {
        *self.joules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A reader that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

fn watts(readings: &Readings) -> Option<f64> {
    match readings.power {
        Some(Reading::Value { value, .. }) => Some(value.0),
        _ => None,
    }
}

/// The hottest point that is read.
fn celsius(readings: &Readings) -> Option<f64> {
    let junction = readings.zones.iter().filter(|zone| zone.role == ZoneRole::Junction);
    let values = junction.filter_map(|zone| match zone.temperature {
        Reading::Value { value, .. } => Some(value.0),
        _ => None,
    });
    values.reduce(f64::max)
}

impl Standing {
    fn json(&self) -> Value {
        let Standing { board, readings } = self;
        json!({
            "board": board,
            "mode": readings.mode,
            "gpu_clock_hz": readings.gpu_clock.map(|(clock, _)| clock),
            "gpu_clock_limit_hz": readings.gpu_clock.map(|(_, limit)| limit),
            "temperature_c": celsius(readings),
            "power_w": watts(readings),
            "throttled": readings.throttled,
            "load": readings.load,
        })
    }

    fn text(&self) -> String {
        let Standing { board, readings } = self;
        let mut parts = vec![board.clone()];
        parts.extend(readings.mode.clone());
        parts.extend(readings.gpu_clock.map(|(clock, limit)| {
            format!("GPU at {:.0} of {:.0} MHz", clock as f64 / 1e6, limit as f64 / 1e6)
        }));
        parts.extend(celsius(readings).map(|celsius| format!("{celsius:.1} °C")));
        parts.extend(watts(readings).map(|watts| format!("{watts:.1} W")));
        if readings.throttled {
            parts.push("throttled".into());
        }
        parts.join(", ")
    }
}

fn seconds(statistics: &Statistics) -> Value {
    json!({
        "median": statistics.median,
        "least": statistics.least,
        "lower_quartile": statistics.lower,
        "upper_quartile": statistics.upper,
        "samples": statistics.count,
    })
}

impl Page {
    fn ceilings(&self) -> Option<Ceilings> {
        self.kernels.as_ref().map(|report| report.ceilings)
    }

    fn json(&self) -> Value {
        let stand_in = self.kernels.as_ref().is_some_and(|report| report.stand_in);
        json!({
            "schema": SCHEMA,
            "stand_in": if stand_in { Value::from(STAND_IN) } else { Value::Null },
            "before": self.before.json(),
            "after": self.after.json(),
            "gpu": self.kernels.as_ref().map(|report| json!({
                "name": report.device.name,
                "sm": report.device.sm,
                "multiprocessors": report.device.multiprocessors,
                "clock_khz": report.device.clock_khz,
                "l2_bytes": report.device.l2,
                "driver": report.device.driver,
                "mma_flops": report.ceilings.mma,
                "copy_bytes_per_second": report.ceilings.copy,
            })),
            "kernels": self.kernels.iter().flat_map(kernels_json).collect::<Vec<Value>>(),
            "left_out": self.kernels.as_ref().map_or(Vec::new(), |report| report.left_out.clone()),
            "tiles": self.kernels.iter().flat_map(|report| &report.tiles).map(|choice| json!({
                "operation": choice.operation, "up_to": choice.up_to, "kernel": choice.kernel,
            })).collect::<Vec<Value>>(),
            "steps": self.steps.iter().map(|line| line.json(self.ceilings())).collect::<Vec<Value>>(),
        })
    }

    fn text(&self) -> String {
        let mut text = String::new();
        // A text of one's own cannot fail to be written to.
        let _ = writeln!(text, "machine    {}", self.before.text());
        let _ = writeln!(text, "after      {}", self.after.text());
        if let Some(report) = &self.kernels {
            kernels_text(report, &mut text);
        }
        if !self.steps.is_empty() {
            let _ = writeln!(
                text,
                "\n{:<14} {:>6} {:<9} {:>10} {:>9} {:>9} {:>8} {:>7} {:>10} {:>9}",
                "step",
                "tokens",
                "recompute",
                "ms",
                "spread %",
                "tokens/s",
                "TFLOP/s",
                "of mma",
                "memory",
                "J/1000"
            );
            self.steps.iter().for_each(|line| line.text(self.ceilings(), &mut text));
        }
        text
    }
}

fn kernels_json(report: &Report) -> impl Iterator<Item = Value> + '_ {
    report.rows.iter().map(|row| {
        json!({
            "operation": row.operation,
            "kernel": row.kernel,
            "model": row.model,
            "tokens": row.tokens,
            "shape": row.shape,
            "seconds": seconds(&row.seconds),
            "flop": row.operations,
            "bytes": row.bytes,
            "flops": row.flops(),
            "bytes_per_second": row.bandwidth(),
            "of_mma": row.flops() / report.ceilings.mma,
            "of_copy": row.bandwidth() / report.ceilings.copy,
        })
    })
}

fn kernels_text(report: &Report, text: &mut String) {
    let device = &report.device;
    let _ = writeln!(
        text,
        "gpu        {}, sm_{}, {} multiprocessors, {:.0} MHz{}",
        device.name,
        device.sm,
        device.multiprocessors,
        f64::from(device.clock_khz) / 1e3,
        if report.stand_in { format!(" ({STAND_IN})") } else { String::new() }
    );
    let _ = writeln!(
        text,
        "ceilings   {} TFLOP/s (mma.sync from registers), {} GB/s (copy, read and written)",
        significant(report.ceilings.mma / 1e12, 3),
        significant(report.ceilings.copy / 1e9, 3)
    );
    if report.rows.is_empty() {
        return;
    }
    let _ = writeln!(
        text,
        "\n{:<20} {:<22} {:<14} {:>10} {:>8} {:>8} {:>7} {:>8} {:>7}  shape",
        "operation", "kernel", "model", "µs", "spread %", "TFLOP/s", "of mma", "GB/s", "of copy"
    );
    for row in &report.rows {
        let Row { operation, kernel, model, shape, .. } = row;
        let (tera, of_mma) = match row.operations > 0.0 {
            true => (
                significant(row.flops() / 1e12, 3),
                format!("{:.1} %", 100.0 * row.flops() / report.ceilings.mma),
            ),
            false => ("-".into(), "-".into()),
        };
        let _ = writeln!(
            text,
            "{operation:<20} {:<22} {model:<14} {:>10} {:>8.1} {tera:>8} {of_mma:>7} {:>8} {:>7}  {shape}",
            kernel.unwrap_or("-"),
            significant(1e6 * row.seconds.median, 4),
            100.0 * row.seconds.spread(),
            significant(row.bandwidth() / 1e9, 3),
            format!("{:.1} %", 100.0 * row.bandwidth() / report.ceilings.copy),
        );
    }
    for title in &report.left_out {
        let _ = writeln!(text, "{title}: not enough memory");
    }
    for choice in &report.tiles {
        let rows = choice.up_to.map_or("more".into(), |up_to| format!("up to {up_to}"));
        let _ = writeln!(text, "fastest    {} of {rows} rows: {}", choice.operation, choice.kernel);
    }
}

impl Line {
    fn json(&self, ceilings: Option<Ceilings>) -> Value {
        let Line { model, tokens, recompute, step } = self;
        let mut value = json!({ "model": model, "tokens": tokens, "recompute": recompute });
        let more = match step {
            Err(why) => json!({ "not_measured": why }),
            Ok(step) => json!({
                "device": step.device,
                "backend": step.backend,
                "seconds": seconds(&step.micro_step),
                "update_seconds": seconds(&step.update),
                "tokens_per_second": step.tokens_per_second(*tokens),
                "gflop": {
                    "linear": step.work.linear,
                    "input_gradient": step.work.input_gradient,
                    "adapter": step.work.adapter,
                    "attention": step.work.attention,
                    "head": step.work.head,
                    "recompute": step.work.recompute,
                    "total": step.work.total(),
                },
                "flops": 1e9 * step.work.total() / step.micro_step.median,
                "gigabytes": step.gigabytes,
                "of_mma": ceilings.map(|of| 1e9 * step.work.total() / step.micro_step.median / of.mma),
                "of_copy": ceilings.map(|of| 1e9 * step.gigabytes / step.micro_step.median / of.copy),
                "memory_bytes": step.memory.map(|bytes| bytes.0),
                "joules_per_1000_tokens": step.joules_per_thousand(),
            }),
        };
        if let (Value::Object(all), Value::Object(more)) = (&mut value, more) {
            all.extend(more);
        }
        value
    }

    fn text(&self, ceilings: Option<Ceilings>, text: &mut String) {
        let Line { model, tokens, recompute, step } = self;
        let how = if *recompute { "yes" } else { "no" };
        let _ = match step {
            Err(why) => writeln!(text, "{model:<14} {tokens:>6} {how:<9} not measured: {why}"),
            Ok(step) => writeln!(
                text,
                "{model:<14} {tokens:>6} {how:<9} {:>10} {:>9.1} {:>9} {:>8} {:>7} {:>10} {:>9}",
                significant(1e3 * step.micro_step.median, 4),
                100.0 * step.micro_step.spread(),
                significant(step.tokens_per_second(*tokens), 4),
                significant(step.work.total() / 1e3 / step.micro_step.median, 3),
                ceilings.map_or("-".into(), |of| {
                    format!("{:.1} %", 1e11 * step.work.total() / step.micro_step.median / of.mma)
                }),
                step.memory.map_or("-".into(), |bytes| bytes.to_string()),
                step.joules_per_thousand().map_or("-".into(), |joules| significant(joules, 3)),
            ),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::work::Parts;
    use crate::units::{Bytes, Watts};
    use clap::Parser;
    use finetuned_cuda::simt::Simt;
    use finetuned_cuda::tuned::Choice;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        bench: BenchArguments,
    }

    fn parse(words: &[&str]) -> Result<BenchArguments, String> {
        let words = ["bench"].iter().chain(words);
        Command::try_parse_from(words).map(|command| command.bench).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_measured_is_what_was_asked_for() {
        let all = parse(&[]).unwrap();
        assert!(all.wants_kernels() && all.wants_steps());
        assert_eq!(all.options().models.len(), shapes::MODELS.len());
        let some = ["--kernel", "linear", "rms-norm", "--tokens", "64", "--model", "llama-3.2-1b", "--quick"];
        let some = parse(&some).unwrap();
        assert!(some.wants_kernels() && !some.wants_steps());
        let options = some.options();
        assert_eq!((options.tokens, options.samples), (vec![64], 5));
        assert_eq!(options.models[0].name, "Llama-3.2-1B");
        let step = parse(&["--kernel", "step", "--device", "cpu"]).unwrap();
        assert!(!step.wants_kernels() && step.wants_steps());
        assert!(step.options().models.is_empty());
        assert_eq!(step.models().len(), 1);
        let error = parse(&["--kernel", "convolution"]).err().unwrap();
        assert!(error.contains("there are step, nf4-dequantise"), "{error}");
        assert!(parse(&["--model", "GPT-5"]).err().unwrap().contains("SmolLM2-135M"));
        assert!(parse(&["--tokens", "0"]).is_err());
    }

    fn statistics(median: f64) -> Statistics {
        Statistics { count: 5, least: median * 0.9, lower: median * 0.95, median, upper: median * 1.05 }
    }

    fn page() -> Page {
        let readings = Readings {
            power: Some(Reading::Value { value: Watts(20.0), at: Duration::ZERO }),
            mode: Some("MODE_50W".into()),
            gpu_clock: Some((800_000_000, 816_000_000)),
            ..Readings::default()
        };
        let standing = Standing { board: "agx-orin-64gb".into(), readings };
        let device = finetuned_cuda::Properties {
            name: "Orin".into(),
            sm: 87,
            multiprocessors: 16,
            clock_khz: 816_000,
            shared_per_block: 0,
            shared_per_multiprocessor: 0,
            l2: 4 << 20,
            integrated: true,
            memory: 64 << 30,
            driver: 12_060,
        };
        let row = |operation, kernel, operations, bytes| Row {
            operation,
            kernel,
            model: "Llama-3.2-1B",
            tokens: 256,
            shape: "[256×2048]".into(),
            seconds: statistics(1e-3),
            operations,
            bytes,
        };
        let report = Report {
            device,
            stand_in: false,
            ceilings: Ceilings { mma: 20e12, copy: 160e9 },
            rows: vec![row("linear", Some("gemm_nt_128x128"), 10e9, 1e6), row("rms-norm", None, 0.0, 80e6)],
            tiles: vec![Choice { operation: "linear".into(), up_to: None, kernel: "gemm_nt_128x128".into() }],
            left_out: vec!["Llama-3-8B logits, 256 tokens".into()],
        };
        let step = Step {
            device: "Orin".into(),
            backend: "cuda bfloat16".into(),
            micro_step: statistics(0.5),
            update: statistics(0.01),
            work: Parts { linear: 500.0, head: 250.0, ..Parts::default() },
            gigabytes: 17.0,
            joules: Some(60.0),
            tokens: 3072,
            memory: Some(Bytes(2 << 30)),
        };
        let line = |step| Line { model: "Llama-3.2-1B", tokens: 1024, recompute: true, step };
        let steps = vec![line(Ok(step)), line(Err("it would take too much".into()))];
        Page { before: standing.clone(), after: standing, kernels: Some(report), steps }
    }

    #[test]
    fn the_json_has_figures_with_their_conditions() {
        let json = page().json();
        assert_eq!((&json["schema"], &json["stand_in"]), (&1.into(), &Value::Null));
        assert_eq!(json["before"]["mode"], "MODE_50W");
        assert_eq!(json["after"]["power_w"], 20.0);
        assert_eq!(json["before"]["gpu_clock_limit_hz"], 816_000_000);
        assert_eq!(json["gpu"]["multiprocessors"], 16);
        let linear = &json["kernels"][0];
        // 10 GFLOP in 1 ms, of 20 TFLOP/s.
        assert_eq!((linear["flops"].as_f64(), linear["of_mma"].as_f64()), (Some(1e13), Some(0.5)));
        assert_eq!(linear["seconds"]["samples"], 5);
        // 80 MB in 1 ms, of 160 GB/s.
        assert_eq!(json["kernels"][1]["of_copy"], 0.5);
        assert!(json["kernels"][1]["kernel"].is_null());
        assert_eq!(json["tiles"][0]["up_to"], Value::Null);
        let step = &json["steps"][0];
        assert_eq!(step["tokens_per_second"], 2048.0);
        assert_eq!((&step["gflop"]["total"], &step["flops"]), (&750.0.into(), &1.5e12.into()));
        // 60 J for 3,072 tokens.
        assert_eq!(step["joules_per_1000_tokens"], 60.0 * 1e3 / 3072.0);
        assert_eq!(step["memory_bytes"], 2u64 << 30);
        // 1.5 of 20 TFLOP/s, 34 of 160 GB/s.
        assert_eq!((&step["of_mma"], &step["of_copy"]), (&0.075.into(), &0.2125.into()));
        assert_eq!(json["steps"][1]["not_measured"], "it would take too much");
    }

    #[test]
    fn the_text_has_them_too() {
        let text = page().text();
        for expected in [
            "agx-orin-64gb, MODE_50W, GPU at 800 of 816 MHz, 20.0 W",
            "Orin, sm_87, 16 multiprocessors, 816 MHz\n",
            "ceilings   20.0 TFLOP/s (mma.sync from registers), 160 GB/s",
            "gemm_nt_128x128",
            "50.0 %",
            "2048",
            "2.0 GiB",
            "19.5",
            "7.5 %",
            "not measured: it would take too much",
            "Llama-3-8B logits, 256 tokens: not enough memory",
            "fastest    linear of more rows: gemm_nt_128x128",
        ] {
            assert!(text.contains(expected), "{expected}\n{text}");
        }
    }

    /// The whole of it on the stand-in, which is called what it is wherever a figure stands.
    #[test]
    fn figures_of_the_stand_in_say_what_they_are() {
        let Ok(simt) = Simt::new() else {
            eprintln!("SKIPPED: there is no C++ compiler");
            return;
        };
        let model = Model { name: "tiny", hidden: 64, intermediate: 64, layers: 1, ..shapes::MODELS[0] };
        let options = Options {
            models: vec![model],
            tokens: vec![4],
            kernels: vec!["rms-norm".into()],
            flush: Some(1024),
            rounds: 1,
            copied: 4096,
            ..Options::quick()
        };
        let report = run(&simt.device(), &options, &mut |_| true).unwrap();
        let page = Page { kernels: Some(report), steps: Vec::new(), ..page() };
        assert_eq!(page.json()["stand_in"], STAND_IN);
        assert!(page.text().contains("MHz (stand-in: not a speed)"), "{}", page.text());
        assert_eq!(page.json()["kernels"].as_array().unwrap().len(), 1);
    }
}
