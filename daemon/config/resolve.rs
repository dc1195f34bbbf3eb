//! From keys to a [`Spec`]: every key's type, range and default, in one place and in the order of `docs/spec.md`.
//!
//! A key that is wrong is complained about and replaced by its default, so that the rest is checked too; a spec is only
//! returned when there was nothing to complain about.

use super::document::{Document, Entry, Mistake, Value, nearest};
use super::spec::*;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// Documents the keys.
const PAGE: &str = "docs/spec.md";
/// Largest rank. PEFT has no limit; above 256 an adapter stops being small.
const MAX_RANK: u64 = 256;
/// Longest sequence: 1 Mi tokens, beyond every supported model's positions.
const MAX_SEQUENCE: u64 = 1 << 20;
/// Most steps or warm-up steps: keeps every product with a batch size far from overflow.
const MAX_STEPS: u64 = 1_000_000_000;

pub(super) const QUANTIZATION: &[(&str, Quantization)] =
    &[("nf4", Quantization::Nf4), ("none", Quantization::None)];
pub(super) const COMPUTE_DTYPE: &[(&str, ComputeDtype)] =
    &[("auto", ComputeDtype::Auto), ("float32", ComputeDtype::Float32), ("bfloat16", ComputeDtype::Bfloat16)];
pub(super) const FORMAT: &[(&str, DataFormat)] = &[
    ("auto", DataFormat::Auto),
    ("messages", DataFormat::Messages),
    ("prompt-completion", DataFormat::PromptCompletion),
    ("text", DataFormat::Text),
    ("alpaca", DataFormat::Alpaca),
    ("sharegpt", DataFormat::Sharegpt),
];
pub(super) const TRAIN_ON: &[(&str, TrainOn)] =
    &[("assistant", TrainOn::Assistant), ("completion", TrainOn::Completion), ("all", TrainOn::All)];
pub(super) const ON_BAD_ROW: &[(&str, OnBadRow)] =
    &[("refuse", OnBadRow::Refuse), ("quarantine", OnBadRow::Quarantine)];
pub(super) const METHOD: &[(&str, Method)] = &[("sft", Method::Sft)];
pub(super) const OPTIMIZER: &[(&str, Optimizer)] = &[("adamw", Optimizer::Adamw)];
pub(super) const LR_SCHEDULER: &[(&str, LrScheduler)] =
    &[("constant", LrScheduler::Constant), ("linear", LrScheduler::Linear), ("cosine", LrScheduler::Cosine)];
pub(super) const GRADIENT_CHECKPOINTING: &[(&str, GradientCheckpointing)] = &[
    ("auto", GradientCheckpointing::Auto),
    ("none", GradientCheckpointing::None),
    ("full", GradientCheckpointing::Full),
];
pub(super) const BACKEND: &[(&str, BackendChoice)] =
    &[("auto", BackendChoice::Auto), ("cpu", BackendChoice::Cpu), ("cuda", BackendChoice::Cuda)];

/// Every `(section, key)` of a spec, in the order in which they are read.
#[cfg(test)]
pub(super) fn known_keys() -> Vec<(&'static str, &'static str)> {
    let mut document = Document::new("", "", PAGE, &[]);
    read(&mut document, "", Path::new("/"));
    document.known().to_vec()
}

/// The spec, or everything that is wrong with it. `file` names the file in messages and, without its extension, the
/// run where `run.name` is absent; relative paths start at `base_dir`, which must be absolute.
pub(super) fn resolve(
    text: &str,
    file: &str,
    base_dir: &Path,
    overrides: &[String],
) -> Result<Spec, Vec<Mistake>> {
    let mut document = Document::new(text, file, PAGE, overrides);
    if let Some(mistakes) = document.syntax_errors() {
        return Err(mistakes);
    }
    let spec = read(&mut document, file, base_dir);
    let mistakes = document.finish();
    if mistakes.is_empty() { Ok(spec) } else { Err(mistakes) }
}

fn read(document: &mut Document, file: &str, base_dir: &Path) -> Spec {
    let mut keys = Keys { document, base_dir };
    let run = read_run(&mut keys, file);
    let model = read_model(&mut keys);
    let data = read_data(&mut keys);
    let lora = read_lora(&mut keys);
    let train = read_train(&mut keys, &data);
    Spec { run, model, data, lora, train }
}

fn read_run(keys: &mut Keys, file: &str) -> RunSpec {
    let stem = Path::new(file).file_stem().map(|stem| stem.to_string_lossy().into_owned());
    let stem = stem.filter(|stem| is_name(stem));
    RunSpec {
        name: keys.name("run", "name").or(stem).unwrap_or_else(|| "run".to_string()),
        seed: keys.integer("run", "seed", 0..=i64::MAX as u64).unwrap_or(42),
    }
}

fn read_model(keys: &mut Keys) -> ModelSpec {
    let base = keys.path("model", "base");
    if base == Given::Absent {
        keys.document.complain_absent("model", "base", "required: the Hugging Face model directory to adapt");
    }
    ModelSpec {
        base: base.into_option().unwrap_or_default(),
        quantization: keys.choice("model", "quantization", QUANTIZATION),
        double_quant: keys.boolean("model", "double_quant", true),
        compute_dtype: keys.choice("model", "compute_dtype", COMPUTE_DTYPE),
    }
}

fn read_data(keys: &mut Keys) -> DataSpec {
    let train = keys.paths("data", "train");
    if train == Given::Absent {
        keys.document.complain_absent("data", "train", "required: the training file, or a list of files");
    }
    keys.document.exclusive("data", "eval", "eval_fraction");
    let eval = keys.path("data", "eval").into_option();
    let eval_fraction = keys.float("data", "eval_fraction", BELOW_ONE);
    DataSpec {
        train: train.into_option().unwrap_or_default(),
        eval_fraction: if eval.is_some() { 0.0 } else { eval_fraction.unwrap_or(0.05) },
        eval,
        format: keys.choice("data", "format", FORMAT),
        sequence_length: keys.integer("data", "sequence_length", 2..=MAX_SEQUENCE).unwrap_or(1024) as usize,
        packing: keys.boolean("data", "packing", true),
        shuffle: keys.boolean("data", "shuffle", true),
        train_on: keys.choice("data", "train_on", TRAIN_ON),
        on_bad_row: keys.choice("data", "on_bad_row", ON_BAD_ROW),
    }
}

fn read_lora(keys: &mut Keys) -> LoraSpec {
    LoraSpec {
        r: keys.integer("lora", "r", 1..=MAX_RANK).unwrap_or(16) as usize,
        alpha: keys.float("lora", "alpha", POSITIVE).unwrap_or(32.0),
        dropout: keys.float("lora", "dropout", BELOW_ONE).unwrap_or(0.0),
        target_modules: keys.target_modules(),
        use_rslora: keys.boolean("lora", "use_rslora", false),
        layers: keys.layers(),
        init_from: keys.path("lora", "init_from").into_option(),
    }
}

fn read_train(keys: &mut Keys, data: &DataSpec) -> TrainSpec {
    let method = keys.choice("train", "method", METHOD);
    keys.document.exclusive("train", "num_epochs", "max_steps");
    let num_epochs = keys.float("train", "num_epochs", EPOCHS).unwrap_or(1.0);
    let max_steps = keys.integer("train", "max_steps", 1..=MAX_STEPS);
    let micro_batch_size = keys.integer("train", "micro_batch_size", 1..=4096).unwrap_or(1) as usize;
    let gradient_accumulation_steps =
        keys.integer("train", "gradient_accumulation_steps", 1..=65_536).unwrap_or(8) as usize;
    let optimizer = keys.choice("train", "optimizer", OPTIMIZER);
    let learning_rate = keys.float("train", "learning_rate", POSITIVE).unwrap_or(2e-4);
    let lr_scheduler = keys.choice("train", "lr_scheduler", LR_SCHEDULER);
    keys.document.exclusive("train", "warmup_steps", "warmup_ratio");
    let warmup_steps = keys.integer("train", "warmup_steps", 0..=MAX_STEPS);
    let warmup_ratio = keys.float("train", "warmup_ratio", SHARE);
    let train = TrainSpec {
        method,
        num_epochs: if max_steps.is_some() { 1.0 } else { num_epochs },
        max_steps,
        micro_batch_size,
        gradient_accumulation_steps,
        optimizer,
        learning_rate,
        lr_scheduler,
        warmup_ratio: if warmup_steps.is_some() { 0.0 } else { warmup_ratio.unwrap_or(0.03) },
        warmup_steps,
        weight_decay: keys.float("train", "weight_decay", NOT_NEGATIVE).unwrap_or(0.0),
        adam_beta1: keys.float("train", "adam_beta1", BELOW_ONE).unwrap_or(0.9),
        adam_beta2: keys.float("train", "adam_beta2", BELOW_ONE).unwrap_or(0.999),
        adam_epsilon: keys.float("train", "adam_epsilon", POSITIVE).unwrap_or(1e-8),
        max_grad_norm: keys.float("train", "max_grad_norm", NOT_NEGATIVE).unwrap_or(1.0),
        gradient_checkpointing: keys.choice("train", "gradient_checkpointing", GRADIENT_CHECKPOINTING),
        evaluate_every: keys.integer("train", "evaluate_every", 0..=MAX_STEPS).unwrap_or(100),
        checkpoint_every: keys.integer("train", "checkpoint_every", 0..=MAX_STEPS).unwrap_or(100),
        keep_checkpoints: keys.integer("train", "keep_checkpoints", 1..=1000).unwrap_or(2) as usize,
        early_stopping_patience: keys.integer("train", "early_stopping_patience", 0..=MAX_STEPS).unwrap_or(0),
        backend: keys.choice("train", "backend", BACKEND),
    };
    if train.early_stopping_patience > 0 {
        let problem = match (&data.eval, data.eval_fraction, train.evaluate_every) {
            (None, 0.0, _) => "needs held-out rows: give data.eval, or a data.eval_fraction above 0",
            (_, _, 0) => "needs evaluations during the run: give a train.evaluate_every above 0",
            _ => "",
        };
        if !problem.is_empty() {
            keys.document.complain_absent("train", "early_stopping_patience", problem);
        }
    }
    train
}

/// What a float may be.
struct Range {
    allowed: &'static str,
    holds: fn(f64) -> bool,
}

const POSITIVE: &Range = &Range { allowed: "a finite number above 0", holds: |x| x > 0.0 };
const NOT_NEGATIVE: &Range = &Range { allowed: "a finite number, 0 or more", holds: |x| x >= 0.0 };
const BELOW_ONE: &Range =
    &Range { allowed: "a number from 0 to below 1", holds: |x| (0.0..1.0).contains(&x) };
const SHARE: &Range = &Range { allowed: "a number from 0 to 1", holds: |x| (0.0..=1.0).contains(&x) };
const EPOCHS: &Range =
    &Range { allowed: "a number above 0, at most 100000", holds: |x| x > 0.0 && x <= 100_000.0 };

/// A key that is wrong is not absent: nobody wants to hear that it is required, too.
#[derive(PartialEq)]
enum Given<T> {
    Absent,
    Wrong,
    Right(T),
}

impl<T> Given<T> {
    fn into_option(self) -> Option<T> {
        match self {
            Given::Right(value) => Some(value),
            Given::Absent | Given::Wrong => None,
        }
    }
}

/// Typed access to a document's keys: `None` where a key is absent or wrong (and complained about).
struct Keys<'a> {
    document: &'a mut Document,
    base_dir: &'a Path,
}

impl Keys<'_> {
    fn wrong(&mut self, section: &str, key: &str, entry: &Entry, allowed: &str) {
        let problem = match entry.value {
            Value::Integer(_) | Value::Float(_) => format!("allowed: {allowed}"),
            _ => format!("allowed: {allowed}; this is {}", entry.value.kind()),
        };
        self.document.complain_value(section, key, entry, problem);
    }

    fn integer(
        &mut self,
        section: &'static str,
        key: &'static str,
        range: RangeInclusive<u64>,
    ) -> Option<u64> {
        let entry = self.document.take(section, key)?;
        match entry.value {
            Value::Integer(n) if n >= 0 && range.contains(&(n as u64)) => Some(n as u64),
            _ => {
                let allowed = format!("a whole number from {} to {}", range.start(), range.end());
                self.wrong(section, key, &entry, &allowed);
                None
            }
        }
    }

    fn float(&mut self, section: &'static str, key: &'static str, range: &Range) -> Option<f64> {
        let entry = self.document.take(section, key)?;
        let number = match entry.value {
            Value::Integer(n) => n as f64,
            Value::Float(x) => x,
            _ => f64::NAN,
        };
        if number.is_finite() && (range.holds)(number) {
            return Some(number + 0.0); // -0.0 becomes 0.0: one spec, one spelling
        }
        self.wrong(section, key, &entry, range.allowed);
        None
    }

    fn boolean(&mut self, section: &'static str, key: &'static str, default: bool) -> bool {
        let Some(entry) = self.document.take(section, key) else { return default };
        match entry.value {
            Value::Boolean(value) => return value,
            _ => self.wrong(section, key, &entry, "true or false"),
        }
        default
    }

    /// One of the words of `table`; the first is the default.
    fn choice<T: Copy>(&mut self, section: &'static str, key: &'static str, table: &[(&str, T)]) -> T {
        let default = table[0].1;
        let Some(entry) = self.document.take(section, key) else { return default };
        let words = || table.iter().map(|(word, _)| *word);
        let word = match &entry.value {
            Value::String(word) => word,
            _ => {
                self.wrong(section, key, &entry, &quoted(words()));
                return default;
            }
        };
        if let Some((_, value)) = table.iter().find(|(known, _)| known == word) {
            return *value;
        }
        let hint = match nearest(word, words()) {
            Some(near) => format!("; did you mean \"{near}\"?"),
            None => String::new(),
        };
        self.document.complain_value(section, key, &entry, format!("allowed: {}{hint}", quoted(words())));
        default
    }

    fn name(&mut self, section: &'static str, key: &'static str) -> Option<String> {
        let entry = self.document.take(section, key)?;
        let allowed = "a string of 1 to 200 characters without control characters";
        match text_of(&entry) {
            Some(text) if is_name(&text) => Some(text),
            Some(_) => {
                self.document.complain_value(section, key, &entry, format!("allowed: {allowed}"));
                None
            }
            None => {
                self.wrong(section, key, &entry, allowed);
                None
            }
        }
    }

    fn path(&mut self, section: &'static str, key: &'static str) -> Given<PathBuf> {
        let Some(entry) = self.document.take(section, key) else { return Given::Absent };
        let Some(text) = text_of(&entry) else {
            self.wrong(section, key, &entry, "a path, as a string");
            return Given::Wrong;
        };
        match self.absolute(&text) {
            Ok(path) => Given::Right(path),
            Err(problem) => {
                self.document.complain_value(section, key, &entry, problem.to_string());
                Given::Wrong
            }
        }
    }

    fn paths(&mut self, section: &'static str, key: &'static str) -> Given<Vec<PathBuf>> {
        let Some(entry) = self.document.take(section, key) else { return Given::Absent };
        let texts: Option<Vec<String>> = match &entry.value {
            Value::Array(items) if !items.is_empty() => items.iter().map(string_of).collect(),
            Value::Array(_) => None,
            _ => text_of(&entry).map(|text| vec![text]),
        };
        let Some(texts) = texts else {
            self.wrong(section, key, &entry, "a path, or a list of at least one path");
            return Given::Wrong;
        };
        let mut paths = Vec::with_capacity(texts.len());
        for text in &texts {
            match self.absolute(text) {
                Ok(path) if paths.contains(&path) => {
                    self.document.complain_value(
                        section,
                        key,
                        &entry,
                        format!("{text:?} stands in it twice"),
                    );
                    return Given::Wrong;
                }
                Ok(path) => paths.push(path),
                Err(problem) => {
                    self.document.complain_value(section, key, &entry, problem.to_string());
                    return Given::Wrong;
                }
            }
        }
        Given::Right(paths)
    }

    /// The path from the root, without `.` components. `..` stays: what it means depends on symbolic links.
    fn absolute(&self, text: &str) -> Result<PathBuf, &'static str> {
        if text.is_empty() {
            return Err("the path is empty");
        }
        if text.contains('\0') {
            return Err("a path cannot contain a NUL character");
        }
        if text == "~" || text.starts_with("~/") {
            return Err("`~` is not expanded here; write the whole path");
        }
        let path: PathBuf = self.base_dir.join(text).components().collect();
        match path.to_str() {
            Some(_) => Ok(path),
            None => Err(
                "the spec's directory has a name that is not UTF-8, which TOML cannot hold; move the spec",
            ),
        }
    }

    fn target_modules(&mut self) -> Vec<String> {
        let all = || LoraSpec::ALL_LINEAR.map(String::from).to_vec();
        let Some(entry) = self.document.take("lora", "target_modules") else { return all() };
        let allowed = format!("\"all-linear\", or a list of {}", quoted(LoraSpec::ALL_LINEAR.into_iter()));
        let names: Option<Vec<String>> = match &entry.value {
            Value::String(word) if word == "all-linear" => return all(),
            Value::Array(items) if !items.is_empty() => items.iter().map(string_of).collect(),
            _ => None,
        };
        let Some(names) = names else {
            self.document.complain_value("lora", "target_modules", &entry, format!("allowed: {allowed}"));
            return all();
        };
        for (at, name) in names.iter().enumerate() {
            let problem = if !LoraSpec::ALL_LINEAR.contains(&name.as_str()) {
                let hint = match nearest(name, LoraSpec::ALL_LINEAR.into_iter()) {
                    Some(near) => format!("; did you mean \"{near}\"?"),
                    None => String::new(),
                };
                format!("{name:?} is not a module; allowed: {allowed}{hint}")
            } else if names[..at].contains(name) {
                format!("{name:?} stands in it twice")
            } else {
                continue;
            };
            self.document.complain_value("lora", "target_modules", &entry, problem);
        }
        all().into_iter().filter(|module| names.contains(module)).collect()
    }

    fn layers(&mut self) -> Option<(usize, usize)> {
        let entry = self.document.take("lora", "layers")?;
        let range = match &entry.value {
            Value::String(word) if word == "all" => return None,
            Value::String(word) => word.split_once("..").and_then(|(first, end)| {
                let first = first.trim().parse::<u32>().ok()?;
                let end = end.trim().parse::<u32>().ok()?;
                (first < end).then_some((first as usize, end as usize))
            }),
            _ => None,
        };
        if range.is_none() {
            let allowed =
                "allowed: \"all\", or \"FIRST..END\" without END, such as \"8..24\" for layers 8 to 23";
            self.document.complain_value("lora", "layers", &entry, allowed.to_string());
        }
        range
    }
}

/// What a person can read on one line.
fn is_name(text: &str) -> bool {
    !text.trim().is_empty() && text.chars().count() <= 200 && !text.chars().any(char::is_control)
}

fn string_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        _ => None,
    }
}

/// A string; from an override also what looks like a number or a date (`--set run.name=42`).
fn text_of(entry: &Entry) -> Option<String> {
    match (&entry.value, &entry.override_text) {
        (Value::String(text), _) => Some(text.clone()),
        (Value::Array(_), _) | (_, None) => None,
        (_, Some(raw)) => Some(raw.clone()),
    }
}

fn quoted<'a>(words: impl Iterator<Item = &'a str>) -> String {
    words.map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ")
}
