//! A spec written back: as TOML that resolves to the same spec, and as the list of the keys that determine a result.
//!
//! The result of a run is a function of (base, data, spec, seed, backend). Which keys of the spec belong to that
//! function is decided here, by [`result_keys`]. Left out are
//!
//! * what only people see: `run.name`;
//! * what only changes when state is written or looked at: `checkpoint_every`, `keep_checkpoints`, and
//!   `evaluate_every` while nothing is held out (else it decides which steps' adapters stand for election as the best);
//! * what changes how, not what is computed: `gradient_checkpointing`, and the split of a batch into
//!   `micro_batch_size` × `gradient_accumulation_steps` (their product counts);
//! * paths: the contents behind them are hashed into the identity of base, data and starting adapter, so a model
//!   directory may move between two attempts;
//! * `backend`: `auto` may resolve differently on another day; the backend that computed is part of the identity;
//! * `on_bad_row`: a run that has started under `refuse` had no bad row.

use super::resolve::*;
use super::spec::*;
use std::fmt::Write;
use std::path::Path;

/// TOML's rendering of a string.
fn string(text: &str) -> String {
    toml::Value::String(text.to_string()).to_string()
}

/// Paths in a spec are UTF-8 (`resolve` sees to it).
fn path(path: &Path) -> String {
    string(&path.to_string_lossy())
}

/// The shortest text that parses to the same bits; always with a point or an exponent, so that TOML reads a float.
fn float(value: f64) -> String {
    format!("{value:?}")
}

fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}

fn word<T: PartialEq>(value: T, table: &[(&'static str, T)]) -> String {
    // Every table lists every value of its type; `every_value_has_a_word` holds it to that.
    table.iter().find(|(_, known)| *known == value).map_or(String::new(), |(word, _)| format!("\"{word}\""))
}

fn layers(range: Option<(usize, usize)>) -> String {
    match range {
        None => "\"all\"".to_string(),
        Some((first, end)) => format!("\"{first}..{end}\""),
    }
}

fn modules(lora: &LoraSpec) -> String {
    if lora.target_modules == LoraSpec::ALL_LINEAR {
        "\"all-linear\"".to_string()
    } else {
        list(lora.target_modules.iter().map(|module| string(module)))
    }
}

/// Every key with its value: `(section, key, value)`. A key that is not in force (the unused one of an alternative, an
/// optional path) has no value.
pub(super) fn keys(spec: &Spec) -> Vec<(&'static str, &'static str, Option<String>)> {
    let Spec { run, model, data, lora, train } = spec;
    let epochs = train.max_steps.is_none();
    let ratio = train.warmup_steps.is_none();
    vec![
        ("run", "name", Some(string(&run.name))),
        ("run", "seed", Some(run.seed.to_string())),
        ("model", "base", Some(path(&model.base))),
        ("model", "quantization", Some(word(model.quantization, QUANTIZATION))),
        ("model", "double_quant", Some(model.double_quant.to_string())),
        ("model", "compute_dtype", Some(word(model.compute_dtype, COMPUTE_DTYPE))),
        ("data", "train", Some(list(data.train.iter().map(|file| path(file))))),
        ("data", "eval", data.eval.as_deref().map(path)),
        ("data", "eval_fraction", data.eval.is_none().then(|| float(data.eval_fraction))),
        ("data", "format", Some(word(data.format, FORMAT))),
        ("data", "sequence_length", Some(data.sequence_length.to_string())),
        ("data", "packing", Some(data.packing.to_string())),
        ("data", "shuffle", Some(data.shuffle.to_string())),
        ("data", "train_on", Some(word(data.train_on, TRAIN_ON))),
        ("data", "on_bad_row", Some(word(data.on_bad_row, ON_BAD_ROW))),
        ("lora", "r", Some(lora.r.to_string())),
        ("lora", "alpha", Some(float(lora.alpha))),
        ("lora", "dropout", Some(float(lora.dropout))),
        ("lora", "target_modules", Some(modules(lora))),
        ("lora", "use_rslora", Some(lora.use_rslora.to_string())),
        ("lora", "layers", Some(layers(lora.layers))),
        ("lora", "init_from", lora.init_from.as_deref().map(path)),
        ("train", "method", Some(word(train.method, METHOD))),
        ("train", "num_epochs", epochs.then(|| float(train.num_epochs))),
        ("train", "max_steps", train.max_steps.map(|steps| steps.to_string())),
        ("train", "micro_batch_size", Some(train.micro_batch_size.to_string())),
        ("train", "gradient_accumulation_steps", Some(train.gradient_accumulation_steps.to_string())),
        ("train", "optimizer", Some(word(train.optimizer, OPTIMIZER))),
        ("train", "learning_rate", Some(float(train.learning_rate))),
        ("train", "lr_scheduler", Some(word(train.lr_scheduler, LR_SCHEDULER))),
        ("train", "warmup_steps", train.warmup_steps.map(|steps| steps.to_string())),
        ("train", "warmup_ratio", ratio.then(|| float(train.warmup_ratio))),
        ("train", "weight_decay", Some(float(train.weight_decay))),
        ("train", "adam_beta1", Some(float(train.adam_beta1))),
        ("train", "adam_beta2", Some(float(train.adam_beta2))),
        ("train", "adam_epsilon", Some(float(train.adam_epsilon))),
        ("train", "max_grad_norm", Some(float(train.max_grad_norm))),
        ("train", "gradient_checkpointing", Some(word(train.gradient_checkpointing, GRADIENT_CHECKPOINTING))),
        ("train", "evaluate_every", Some(train.evaluate_every.to_string())),
        ("train", "checkpoint_every", Some(train.checkpoint_every.to_string())),
        ("train", "keep_checkpoints", Some(train.keep_checkpoints.to_string())),
        ("train", "early_stopping_patience", Some(train.early_stopping_patience.to_string())),
        ("train", "backend", Some(word(train.backend, BACKEND))),
    ]
}

/// The resolved spec as TOML.
pub(super) fn to_toml(spec: &Spec) -> String {
    let mut text = String::from("# The spec as it was resolved: every key with the value in force.\n");
    let mut current = "";
    for (section, key, value) in keys(spec) {
        if section != current {
            current = section;
            // Writing to a String cannot fail.
            let _ = write!(text, "\n[{section}]\n");
        }
        let _ = match value {
            Some(value) => writeln!(text, "{key} = {value}"),
            None => writeln!(text, "# {key}: not given"),
        };
    }
    text
}

/// The keys that determine the bits of the result, as `(name, value)`, in a fixed order.
pub(super) fn result_keys(spec: &Spec) -> Vec<(String, String)> {
    let nf4 = spec.model.quantization == Quantization::Nf4;
    let held_out = spec.data.eval.is_some() || spec.data.eval_fraction > 0.0;
    let mut result = Vec::new();
    for (section, key, value) in keys(spec) {
        let counts = match (section, key) {
            ("run", "name") | ("model", "base") | ("data", "train" | "on_bad_row") => false,
            ("lora", "init_from") => false,
            ("train", "checkpoint_every" | "keep_checkpoints" | "gradient_checkpointing" | "backend") => {
                false
            }
            ("train", "evaluate_every") => held_out,
            ("model", "double_quant") => nf4,
            _ => true,
        };
        let Some(value) = value.filter(|_| counts) else { continue };
        match (section, key) {
            // Where the held-out rows come from counts, not the file's path.
            ("data", "eval") => result.push(("data.eval".to_string(), "given".to_string())),
            ("train", "micro_batch_size") => {
                let batch = spec.train.micro_batch_size * spec.train.gradient_accumulation_steps;
                let name = "train.micro_batch_size × train.gradient_accumulation_steps";
                result.push((name.to_string(), batch.to_string()));
            }
            ("train", "gradient_accumulation_steps") => {}
            _ => result.push((format!("{section}.{key}"), value)),
        }
    }
    result
}

/// SHA-256 over the result keys, one `name = value` a line after a line that names the version of this list.
pub(super) fn result_hash(spec: &Spec) -> String {
    use sha2::{Digest, Sha256};
    let mut hasher = Sha256::new();
    hasher.update(b"finetuned spec 1\n");
    for (name, value) in result_keys(spec) {
        hasher.update(format!("{name} = {value}\n"));
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The result keys in which two specs differ, with both values.
pub(super) fn differences(before: &Spec, now: &Spec) -> Vec<String> {
    let (before, now) = (result_keys(before), result_keys(now));
    let find = |keys: &[(String, String)], name: &str| {
        keys.iter()
            .find(|(known, _)| known == name)
            .map_or("(not given)".to_string(), |(_, value)| value.clone())
    };
    let mut names: Vec<&String> = before.iter().map(|(name, _)| name).collect();
    names.extend(
        now.iter().map(|(name, _)| name).filter(|name| !before.iter().any(|(known, _)| known == *name)),
    );
    names
        .into_iter()
        .map(|name| (name, find(&before, name), find(&now, name)))
        .filter(|(_, before, now)| before != now)
        .map(|(name, before, now)| format!("{name} was {before}, is now {now}"))
        .collect()
}
