//! LoRA adapters in the layout of PEFT: a directory with
//!
//! ```text
//!   adapter_config.json          the hyperparameters, under PEFT's names
//!   adapter_model.safetensors    base_model.model.model.layers.{i}.self_attn.{q,k,v,o}_proj.lora_A.weight  [r, in]
//!                                base_model.model.model.layers.{i}.mlp.{gate,up,down}_proj.lora_B.weight   [out, r]
//!   README.md                    a model card
//! ```
//!
//! PEFT finds the adapted modules by `target_modules` and, where only some layers are adapted, by `layers_to_transform`
//! with `layers_pattern` "layers" (the name before the index in `model.layers.3.`). Reading accepts what this program
//! can compute and refuses the rest by name: silently ignoring a key such as `use_dora` would train something else.

use super::commit::{FileError, NewDirectory};
use super::filesystem::{Disk, FileSystem};
use super::tensors::{self, NamedTensor, TensorError, TensorRef};
use crate::config::spec::LoraSpec;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const CARD: &str = "README.md";

/// Version of PEFT whose reader this layout was checked against.
const PEFT_VERSION: &str = "0.21.2";

/// Largest adapter_config.json that is read; a real one is about a kilobyte.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// An adapter's hyperparameters.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Rank.
    pub r: usize,
    /// Scale numerator (`lora_alpha`).
    pub alpha: f64,
    /// Dropout on the input of A while training (`lora_dropout`).
    pub dropout: f64,
    /// Adapted modules, in the order of [`LoraSpec::ALL_LINEAR`].
    pub target_modules: Vec<String>,
    /// Scale by alpha/√r.
    pub use_rslora: bool,
    /// Adapted layers, ascending; `None` is all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// The base the adapter belongs to: a directory or a model's name.
    pub base_model_name_or_path: Option<String>,
    /// Revision of the base.
    pub revision: Option<String>,
}

/// The two matrices of a LoRA pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Factor {
    /// `[r, in]`
    A,
    /// `[out, r]`
    B,
}

/// The modules that live in `self_attn`; the others live in `mlp`.
const ATTENTION: [&str; 4] = ["q_proj", "k_proj", "v_proj", "o_proj"];

/// PEFT's key of a matrix; `module` is one of [`LoraSpec::ALL_LINEAR`].
pub fn key(layer: usize, module: &str, factor: Factor) -> String {
    let block = if ATTENTION.contains(&module) { "self_attn" } else { "mlp" };
    format!("base_model.model.model.layers.{layer}.{block}.{module}.lora_{factor:?}.weight")
}

/// What a key of PEFT names: `(layer, index into ALL_LINEAR, factor)`.
pub fn parse_key(name: &str) -> Option<(usize, usize, Factor)> {
    let rest = name.strip_prefix("base_model.model.model.layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let mut parts = rest.split('.');
    let (_block, module, factor) = (parts.next()?, parts.next()?, parts.next()?);
    let factor = match factor {
        "lora_A" => Factor::A,
        "lora_B" => Factor::B,
        _ => return None,
    };
    let layer = layer.parse().ok()?;
    let index = LoraSpec::ALL_LINEAR.iter().position(|known| *known == module)?;
    // Whatever differs from the one spelling is another tensor.
    (key(layer, module, factor) == name).then_some((layer, index, factor))
}

/// Why an adapter cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum PeftError {
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file of the adapter is not what its name says.
    #[error("{path}: {problem}", path = .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A tensor cannot be read or written.
    #[error("{path}: {source}", path = .path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: TensorError,
    },
    /// A valid adapter that uses what this program does not compute.
    #[error(
        "{path}: {key} = {value} is not supported ({expected}); make a plain LoRA adapter of it with PEFT first",
        path = .path.display()
    )]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Key of the configuration, or tensor.
        key: String,
        /// Its value.
        value: String,
        /// What would be.
        expected: &'static str,
    },
    /// Configuration and tensors disagree; everything that does.
    #[error("{path} does not fit its {CONFIG}:\n  {}", .problems.join("\n  "), path = .path.display())]
    Mismatch {
        /// The file of tensors.
        path: PathBuf,
        /// One line each.
        problems: Vec<String>,
    },
}

/// Writes an adapter directory whole, replacing one that is there. The tensors' names are PEFT's keys.
pub fn write_adapter(
    directory: &Path,
    config: &AdapterConfig,
    tensors: &[TensorRef<'_>],
) -> Result<(), PeftError> {
    write_adapter_with_card(directory, config, tensors, &[])
}

/// [`write_adapter`] with facts about the training (`("Held-out loss", "1.92")`), one line each, for the model card.
pub fn write_adapter_with_card(
    directory: &Path,
    config: &AdapterConfig,
    tensors: &[TensorRef<'_>],
    facts: &[(&str, String)],
) -> Result<(), PeftError> {
    write_on(&Disk, directory, config, tensors, facts)
}

fn write_on(
    files: &dyn FileSystem,
    directory: &Path,
    config: &AdapterConfig,
    tensors: &[TensorRef<'_>],
    facts: &[(&str, String)],
) -> Result<(), PeftError> {
    let path = directory.join(WEIGHTS);
    let shapes = tensors.iter().map(|tensor| (tensor.name, tensor.shape));
    let problems = check(config, shapes);
    if !problems.is_empty() {
        return Err(PeftError::Mismatch { path, problems });
    }
    let tensors: Vec<_> = tensors.iter().map(|tensor| ("", *tensor)).collect();
    let header = tensors::header(&tensors).map_err(|source| PeftError::Tensor { path, source })?;
    let mut new = NewDirectory::begin(files, directory)?;
    new.file(WEIGHTS, |out| tensors::write(out, &header, &tensors))?;
    new.file(CONFIG, |out| out.write_all(config_json(config).as_bytes()))?;
    new.file(CARD, |out| out.write_all(card(config, facts).as_bytes()))?;
    Ok(new.publish()?)
}

/// The text of adapter_config.json: sorted and indented, as PEFT writes it.
fn config_json(config: &AdapterConfig) -> String {
    // PEFT declares lora_alpha as an integer and computes with whatever it finds.
    let alpha = config.alpha;
    let alpha = if alpha.fract() == 0.0 && alpha < 1e15 { json!(alpha as u64) } else { json!(alpha) };
    let mut value = json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        // PEFT refuses a pattern without layers.
        "layers_pattern": config.layers_to_transform.as_ref().map(|_| "layers"),
        "layers_to_transform": config.layers_to_transform,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": config.r,
        "rank_pattern": {},
        "revision": config.revision,
        "target_modules": config.target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": config.use_rslora,
    });
    value.sort_all_objects();
    format!("{value:#}\n")
}

/// The model card: what the adapter is, in the metadata the Hub reads and in a few lines a person does.
fn card(config: &AdapterConfig, facts: &[(&str, String)]) -> String {
    let base = config.base_model_name_or_path.as_deref().unwrap_or("unknown");
    let layers = match &config.layers_to_transform {
        None => "all".to_string(),
        Some(layers) => layers.iter().map(usize::to_string).collect::<Vec<_>>().join(", "),
    };
    let scale = if config.use_rslora { "alpha / √r" } else { "alpha / r" };
    let mut text = format!(
        "---\nbase_model: {}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n- finetuned\n---\n\n\
         # LoRA adapter\n\n\
         Trained by finetuned {} for the base model `{base}`. It only makes sense on exactly that base, with its \
         tokenizer and chat template.\n\n\
         - Rank {}, alpha {} (scale {scale}), dropout {} while training\n\
         - Modules: {}\n\
         - Layers: {layers}\n",
        json!(base), // a JSON string is a YAML string
        env!("CARGO_PKG_VERSION"),
        config.r,
        config.alpha,
        config.dropout,
        config.target_modules.join(", "),
    );
    for (name, value) in facts {
        text += &format!("- {name}: {value}\n");
    }
    text + "\nNothing else has been evaluated: test it on your own task before you rely on it.\n"
}

/// Reads an adapter directory. Tensors come as f32, in the order of layers, modules ([`LoraSpec::ALL_LINEAR`]) and A, B.
pub fn read_adapter(directory: &Path) -> Result<(AdapterConfig, Vec<NamedTensor>), PeftError> {
    let config_path = directory.join(CONFIG);
    let size =
        std::fs::metadata(&config_path).map_err(|source| FileError::new("read", &config_path, source))?.len();
    if size > MAX_CONFIG_BYTES {
        let problem = format!("{size} bytes are no adapter configuration");
        return Err(PeftError::Format { path: config_path, problem });
    }
    let text = std::fs::read(&config_path).map_err(|source| FileError::new("read", &config_path, source))?;
    let mut config = parse_config(&text, &config_path)?;

    let path = directory.join(WEIGHTS);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error)
            if error.kind() == io::ErrorKind::NotFound && directory.join("adapter_model.bin").exists() =>
        {
            let problem =
                "only adapter_model.bin is there, a pickle, which can run code when it is read; convert it \
                           to safetensors with PEFT"
                    .to_string();
            return Err(PeftError::Format { path, problem });
        }
        Err(source) => return Err(FileError::new("read", &path, source).into()),
    };
    let mut tensors =
        tensors::parse(&bytes).map_err(|source| PeftError::Tensor { path: path.clone(), source })?;
    if let Some(stranger) = tensors.iter().find(|tensor| parse_key(&tensor.name).is_none()) {
        return Err(PeftError::Unsupported {
            path,
            key: "tensor".to_string(),
            value: stranger.name.clone(),
            expected: "expected only lora_A and lora_B of the seven linear layers of a decoder block",
        });
    }
    tensors.sort_by_key(|tensor| parse_key(&tensor.name));
    if config.target_modules.is_empty() {
        // The configuration has a pattern, or "all-linear": the modules are those that are there.
        let found: BTreeSet<usize> = tensors
            .iter()
            .filter_map(|tensor| parse_key(&tensor.name))
            .map(|(_, module, _)| module)
            .collect();
        config.target_modules = found.iter().map(|at| LoraSpec::ALL_LINEAR[*at].to_string()).collect();
    }
    let mut problems = check(&config, tensors.iter().map(|tensor| (tensor.name.as_str(), &tensor.shape[..])));
    problems.extend(
        tensors
            .iter()
            .filter(|tensor| tensor.data.iter().any(|x| !x.is_finite()))
            .map(|tensor| format!("{} holds values that are not finite", tensor.name)),
    );
    if problems.is_empty() { Ok((config, tensors)) } else { Err(PeftError::Mismatch { path, problems }) }
}

/// Keys whose only supported value is "not used", spelt in any of the ways PEFT spells it.
const UNUSED: &[&str] = &[
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "exclude_modules",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
];

/// Initialisations that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) move a part of the
/// base into the adapter: on the plain base such an adapter is something else.
const HARMLESS_INIT: &[&str] = &["gaussian", "orthogonal", "eva"];

/// The configuration; without modules where it has a pattern in place of their names.
fn parse_config(text: &[u8], path: &Path) -> Result<AdapterConfig, PeftError> {
    let format = |problem: String| PeftError::Format { path: path.to_path_buf(), problem };
    let map: Map<String, Value> =
        serde_json::from_slice(text).map_err(|error| format(format!("not a JSON object: {error}")))?;
    let unsupported = |key: &str, expected: &'static str| PeftError::Unsupported {
        path: path.to_path_buf(),
        key: key.to_string(),
        value: map.get(key).unwrap_or(&Value::Null).to_string(),
        expected,
    };
    let get = |key: &str| map.get(key).unwrap_or(&Value::Null);
    if get("peft_type") != "LORA" {
        return Err(unsupported("peft_type", "expected \"LORA\""));
    }
    for key in UNUSED {
        let unused = match get(key) {
            Value::Null | Value::Bool(false) => true,
            Value::Object(map) => map.is_empty(),
            Value::Array(list) => list.is_empty(),
            _ => false,
        };
        if !unused {
            return Err(unsupported(key, "expected it unset"));
        }
    }
    if !matches!(get("bias"), Value::Null) && get("bias") != "none" {
        return Err(unsupported("bias", "expected \"none\""));
    }
    match get("init_lora_weights") {
        Value::Null | Value::Bool(_) => {}
        Value::String(name) if HARMLESS_INIT.contains(&name.as_str()) => {}
        _ => return Err(unsupported("init_lora_weights", "it changes the base")),
    }
    match get("layers_pattern") {
        Value::Null => {}
        Value::String(pattern) if pattern == "layers" || pattern.is_empty() => {}
        Value::Array(patterns) if patterns.iter().all(|pattern| pattern == "layers") => {}
        _ => return Err(unsupported("layers_pattern", "expected \"layers\"")),
    }
    let layer = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
    let layers_to_transform = match get("layers_to_transform") {
        Value::Null => None,
        Value::Array(layers) if layers.is_empty() => None,
        Value::Array(layers) => {
            let layers: Option<BTreeSet<usize>> = layers.iter().map(layer).collect();
            Some(layers.ok_or_else(|| unsupported("layers_to_transform", "expected layer numbers"))?)
        }
        one => Some(BTreeSet::from([
            layer(one).ok_or_else(|| unsupported("layers_to_transform", "expected layer numbers"))?
        ])),
    };
    let target_modules = match get("target_modules") {
        Value::Array(names) => {
            let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
            let known = |name: &&str| LoraSpec::ALL_LINEAR.contains(name);
            let all_known = Some(names.len()) == get("target_modules").as_array().map(Vec::len)
                && !names.is_empty()
                && names.iter().all(known);
            if !all_known {
                return Err(unsupported("target_modules", "expected names of the seven linear layers"));
            }
            let sorted = LoraSpec::ALL_LINEAR.iter().filter(|module| names.contains(module));
            sorted.map(|module| module.to_string()).collect()
        }
        Value::String(_) => Vec::new(),
        _ => return Err(unsupported("target_modules", "expected names of the seven linear layers")),
    };
    let number = |key: &str, default: f64| match get(key) {
        Value::Null => Ok(default),
        value => value
            .as_f64()
            .filter(|x| x.is_finite() && *x >= 0.0)
            .ok_or_else(|| format(format!("{key} = {value}: expected a number, 0 or more"))),
    };
    // Absent keys have PEFT's defaults.
    let r = match get("r") {
        Value::Null => 8,
        value => layer(value)
            .filter(|r| (1..=1 << 16).contains(r))
            .ok_or_else(|| format(format!("r = {value}: expected a whole number above 0")))?,
    };
    let text_of = |key: &str| get(key).as_str().map(String::from);
    Ok(AdapterConfig {
        r,
        alpha: number("lora_alpha", 8.0)?,
        dropout: number("lora_dropout", 0.0)?,
        target_modules,
        use_rslora: get("use_rslora").as_bool().unwrap_or(false),
        layers_to_transform: layers_to_transform.map(|layers| layers.into_iter().collect()),
        base_model_name_or_path: text_of("base_model_name_or_path"),
        revision: text_of("revision"),
    })
}

/// Everything in which the tensors differ from what the configuration promises: names, ranks, completeness, and the
/// same shape of a module in every layer.
fn check<'a>(config: &AdapterConfig, tensors: impl Iterator<Item = (&'a str, &'a [usize])>) -> Vec<String> {
    let mut problems = Vec::new();
    let mut found: BTreeSet<(usize, usize, Factor)> = BTreeSet::new();
    let mut widths: BTreeMap<(usize, Factor), (usize, &str)> = BTreeMap::new();
    for (name, shape) in tensors {
        let Some((layer, module, factor)) = parse_key(name) else {
            problems.push(format!("{name} is not the name of a LoRA matrix"));
            continue;
        };
        found.insert((layer, module, factor));
        let (rank, width) = match (factor, shape) {
            (Factor::A, [r, width]) => (*r, *width),
            (Factor::B, [width, r]) => (*r, *width),
            _ => {
                problems.push(format!("{name} has the shape {shape:?}; a matrix has two dimensions"));
                continue;
            }
        };
        if rank != config.r {
            problems.push(format!(
                "{name} has the shape {shape:?}, rank {rank}; the configuration says r = {}",
                config.r
            ));
        }
        match widths.get(&(module, factor)) {
            Some((other, of)) if *other != width => {
                problems.push(format!(
                    "{name} has the shape {shape:?}, but {of} has {other} where this has {width}"
                ));
            }
            Some(_) => {}
            None => drop(widths.insert((module, factor), (width, name))),
        }
    }
    let layers: BTreeSet<usize> = match &config.layers_to_transform {
        Some(layers) => layers.iter().copied().collect(),
        None => found.iter().map(|(layer, ..)| *layer).collect(),
    };
    if layers.is_empty() {
        problems.push("there is no LoRA matrix".to_string());
    }
    if config.layers_to_transform.is_none()
        && let Some(last) = layers.last()
        && last.checked_add(1) != Some(layers.len())
    {
        let present: Vec<String> = layers.iter().map(usize::to_string).collect();
        problems.push(format!("only layers {} are there; the configuration says all", present.join(", ")));
    }
    for layer in &layers {
        for module in &config.target_modules {
            for factor in [Factor::A, Factor::B] {
                let name = key(*layer, module, factor);
                if !parse_key(&name).is_some_and(|wanted| found.remove(&wanted)) {
                    problems.push(format!("{name} is missing"));
                }
            }
        }
    }
    for (layer, module, factor) in found {
        let name = key(layer, LoraSpec::ALL_LINEAR[module], factor);
        problems.push(format!("{name} is there, but the configuration does not adapt it"));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::super::simulated::{Fault, Faulty};
    use super::*;
    use std::sync::Arc;

    fn config() -> AdapterConfig {
        AdapterConfig {
            r: 2,
            alpha: 4.0,
            dropout: 0.1,
            target_modules: vec!["q_proj".into(), "down_proj".into()],
            use_rslora: false,
            layers_to_transform: None,
            base_model_name_or_path: Some("models/tiny".into()),
            revision: None,
        }
    }

    /// Random-looking matrices for every pair; inputs of 3, outputs of 5.
    fn tensors(config: &AdapterConfig, layers: &[usize]) -> Vec<NamedTensor> {
        let mut tensors = Vec::new();
        for layer in layers {
            for module in &config.target_modules {
                for (factor, shape) in [(Factor::A, [config.r, 3]), (Factor::B, [5, config.r])] {
                    let start = tensors.len() as f32 / 3.0;
                    let data = (0..shape[0] * shape[1]).map(|i| start - i as f32 / 7.0).collect();
                    tensors.push(NamedTensor {
                        name: key(*layer, module, factor),
                        shape: shape.to_vec(),
                        data,
                    });
                }
            }
        }
        tensors
    }

    fn refs(tensors: &[NamedTensor]) -> Vec<TensorRef<'_>> {
        tensors.iter().map(NamedTensor::as_ref).collect()
    }

    fn edit(directory: &Path, key: &str, value: Value) {
        let path = directory.join(CONFIG);
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        std::fs::write(path, config.to_string()).unwrap();
    }

    #[test]
    fn keys_are_spelt_as_peft_spells_them() {
        assert_eq!(
            key(3, "q_proj", Factor::A),
            "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
        );
        assert_eq!(
            key(11, "up_proj", Factor::B),
            "base_model.model.model.layers.11.mlp.up_proj.lora_B.weight"
        );
        for (index, module) in LoraSpec::ALL_LINEAR.iter().enumerate() {
            for factor in [Factor::A, Factor::B] {
                assert_eq!(parse_key(&key(7, module, factor)), Some((7, index, factor)));
            }
        }
        for other in [
            "base_model.model.model.layers.3.mlp.q_proj.lora_A.weight",
            "base_model.model.model.layers.03.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight",
            "base_model.model.model.layers.3.self_attn.q_proj.lora_magnitude_vector",
            "base_model.model.lm_head.lora_A.weight",
        ] {
            assert_eq!(parse_key(other), None, "{other}");
        }
    }

    #[test]
    fn an_adapter_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter");
        let some = AdapterConfig {
            layers_to_transform: Some(vec![1, 3]),
            use_rslora: true,
            alpha: 2.5,
            revision: Some("main".into()),
            ..config()
        };
        for (config, layers) in [(config(), vec![0, 1, 2]), (some, vec![1, 3])] {
            let written = tensors(&config, &layers);
            let mut shuffled = refs(&written);
            shuffled.reverse();
            write_adapter(&path, &config, &shuffled).unwrap();
            assert_eq!(read_adapter(&path).unwrap(), (config, written));
        }
        let names: BTreeSet<_> = std::fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(names, [CONFIG, WEIGHTS, CARD].map(String::from).into());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn the_configuration_has_every_key_of_the_format() {
        let value: Value = serde_json::from_str(&config_json(&config())).unwrap();
        let keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            keys,
            [
                "alpha_pattern",
                "auto_mapping",
                "base_model_name_or_path",
                "bias",
                "fan_in_fan_out",
                "inference_mode",
                "init_lora_weights",
                "layers_pattern",
                "layers_to_transform",
                "lora_alpha",
                "lora_dropout",
                "modules_to_save",
                "peft_type",
                "peft_version",
                "r",
                "rank_pattern",
                "revision",
                "target_modules",
                "task_type",
                "use_dora",
                "use_rslora"
            ]
        );
        assert_eq!(value["layers_pattern"], Value::Null);
        assert_eq!(value["lora_alpha"], json!(4), "an integer, as PEFT declares it");
        let some = AdapterConfig { layers_to_transform: Some(vec![1]), alpha: 0.5, ..config() };
        let value: Value = serde_json::from_str(&config_json(&some)).unwrap();
        assert_eq!((&value["layers_pattern"], &value["lora_alpha"]), (&json!("layers"), &json!(0.5)));
    }

    #[test]
    fn the_card_says_what_it_is_and_what_it_was_not_tested_for() {
        let text = card(&config(), &[("Held-out loss", "1.92".to_string())]);
        assert!(text.starts_with("---\nbase_model: \"models/tiny\"\nlibrary_name: peft\n"), "{text}");
        for part in
            ["Rank 2, alpha 4", "q_proj, down_proj", "- Held-out loss: 1.92", "test it on your own task"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn what_is_not_plain_lora_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter");
        let cases = [
            ("peft_type", json!("IA3")),
            ("peft_type", Value::Null),
            ("use_dora", json!(true)),
            ("rank_pattern", json!({"q_proj": 4})),
            ("alpha_pattern", json!({"q_proj": 4})),
            ("modules_to_save", json!(["lm_head"])),
            ("bias", json!("lora_only")),
            ("fan_in_fan_out", json!(true)),
            ("lora_bias", json!(true)),
            ("trainable_token_indices", json!([1])),
            ("layer_replication", json!([[0, 1]])),
            ("init_lora_weights", json!("pissa")),
            ("layers_pattern", json!("blocks")),
            ("layers_to_transform", json!([-1])),
            ("target_modules", json!(["q_proj", "lm_head"])),
            ("target_modules", json!([])),
        ];
        for (key, value) in cases {
            write_adapter(&path, &config(), &refs(&tensors(&config(), &[0]))).unwrap();
            edit(&path, key, value.clone());
            match read_adapter(&path) {
                Err(error @ PeftError::Unsupported { .. }) => {
                    let text = error.to_string();
                    assert!(text.contains(&format!("{key} = {value}")) && text.contains(CONFIG), "{text}");
                }
                other => panic!("{key} = {value}: {other:?}"),
            }
        }
        for (key, value) in [("r", json!(0)), ("lora_alpha", json!("x")), ("lora_dropout", json!(-1))] {
            write_adapter(&path, &config(), &refs(&tensors(&config(), &[0]))).unwrap();
            edit(&path, key, value.clone());
            assert!(matches!(read_adapter(&path), Err(PeftError::Format { .. })), "{key} = {value}");
        }
    }

    #[test]
    fn what_peft_spells_differently_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter");
        let written = tensors(&config(), &[1]);
        let one = AdapterConfig { layers_to_transform: Some(vec![1]), ..config() };
        write_adapter(&path, &one, &refs(&written)).unwrap();
        edit(&path, "layers_to_transform", json!(1));
        edit(&path, "layers_pattern", Value::Null);
        edit(&path, "target_modules", json!(".*(q_proj|down_proj)"));
        edit(&path, "init_lora_weights", json!("gaussian"));
        edit(&path, "a_key_of_tomorrow", json!({"x": 1}));
        assert_eq!(read_adapter(&path).unwrap(), (one, written));
    }

    #[test]
    fn half_precision_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter");
        let one = AdapterConfig { target_modules: vec!["q_proj".into()], ..config() };
        write_adapter(&path, &one, &refs(&tensors(&one, &[0]))).unwrap();
        let half: Vec<_> = [1.5, -2.0, 0.25, 4.0, 8.0, -0.5].map(half::f16::from_f32).to_vec();
        let wide: Vec<_> = (0..10).map(|i| half::bf16::from_f32(i as f32)).collect();
        use safetensors::tensor::{Dtype, TensorView};
        let a = TensorView::new(Dtype::F16, vec![2, 3], bytemuck::cast_slice(&half)).unwrap();
        let b = TensorView::new(Dtype::BF16, vec![5, 2], bytemuck::cast_slice(&wide)).unwrap();
        let file = [(key(0, "q_proj", Factor::A), a), (key(0, "q_proj", Factor::B), b)];
        std::fs::write(path.join(WEIGHTS), safetensors::serialize(file, None).unwrap()).unwrap();
        let (_, read) = read_adapter(&path).unwrap();
        assert_eq!(read[0].data, [1.5, -2.0, 0.25, 4.0, 8.0, -0.5]);
        assert_eq!(read[1].data, (0..10).map(|i| i as f32).collect::<Vec<_>>());
    }

    #[test]
    fn tensors_that_do_not_fit_are_all_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter");
        let problems = |config: &AdapterConfig, tensors: &[NamedTensor]| match write_adapter(
            &path,
            config,
            &refs(tensors),
        ) {
            Err(PeftError::Mismatch { problems, .. }) => problems.join("\n"),
            other => panic!("{other:?}"),
        };
        let mut wrong = tensors(&config(), &[0, 1]);
        wrong[0].shape = vec![3, 2];
        wrong[5].shape = vec![10];
        wrong.remove(2);
        let text = problems(&config(), &wrong);
        assert!(
            text.contains("layers.0.self_attn.q_proj.lora_A.weight has the shape [3, 2], rank 3"),
            "{text}"
        );
        assert!(text.contains("has the shape [10]; a matrix has two dimensions"), "{text}");
        assert!(text.contains("layers.0.mlp.down_proj.lora_A.weight is missing"), "{text}");

        let mut uneven = tensors(&config(), &[0, 1]);
        uneven[4].shape = vec![2, 4];
        uneven[4].data = vec![0.0; 8];
        assert!(problems(&config(), &uneven).contains("where this has 4"));
        assert!(problems(&config(), &tensors(&config(), &[0, 2])).contains("only layers 0, 2 are there"));
        assert!(problems(&config(), &[]).contains("there is no LoRA matrix"));
        let one = AdapterConfig { target_modules: vec!["q_proj".into()], ..config() };
        assert!(problems(&one, &tensors(&config(), &[0])).contains("does not adapt it"));
        assert!(!path.exists());
    }

    #[test]
    fn damaged_files_are_errors_that_name_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("adapter");
        let fresh = || write_adapter(&path, &config(), &refs(&tensors(&config(), &[0]))).unwrap();
        let refused = |name: &str| {
            let text = read_adapter(&path).unwrap_err().to_string();
            assert!(text.contains(name), "{text}");
        };
        refused(CONFIG);
        fresh();
        std::fs::write(path.join(CONFIG), "[1]").unwrap();
        refused(CONFIG);
        fresh();
        let bytes = std::fs::read(path.join(WEIGHTS)).unwrap();
        std::fs::write(path.join(WEIGHTS), &bytes[..bytes.len() - 1]).unwrap();
        refused(WEIGHTS);
        let mut not_finite = bytes.clone();
        let end = not_finite.len();
        not_finite[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(path.join(WEIGHTS), not_finite).unwrap();
        refused("not finite");
        std::fs::rename(path.join(WEIGHTS), path.join("adapter_model.bin")).unwrap();
        refused("pickle");
    }

    #[test]
    fn a_kill_while_replacing_leaves_the_old_or_the_new_adapter() {
        let (first, second) = (config(), AdapterConfig { alpha: 64.0, ..config() });
        let weights = tensors(&config(), &[0]);
        let mut operations = usize::MAX;
        let mut at = 0;
        while at <= operations {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("adapter");
            write_adapter(&path, &first, &refs(&weights)).unwrap();
            let files = Faulty::new(Arc::new(Disk), Fault::Dead(at));
            let done = write_on(&files, &path, &second, &refs(&weights), &[]).is_ok();
            if done {
                operations = at;
            }
            let (found, _) = read_adapter(&path).unwrap();
            assert!(found == second || (!done && found == first), "operation {at}");
            write_adapter(&path, &second, &refs(&weights)).unwrap();
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "operation {at}");
            at += 1;
        }
        assert!(operations > 10, "{operations}");
    }
}
