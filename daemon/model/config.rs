//! A model's shape, from the `config.json` of its Hugging Face directory.
//!
//! Keys, defaults and their precedence are those of transformers 5.24 (`models/<family>/configuration_<family>.py`,
//! `modeling_rope_utils.py`), with two differences: what decides the size of a tensor must be written in the file
//! (transformers would fill in the numbers of some 7B model), and everything that we would compute differently is
//! refused by name. Rotary settings are read in both spellings: `rope_theta` + `rope_scaling`, and `rope_parameters`.
//!
//! Not read: `torch_dtype`/`dtype` (the files say what they hold) and dropout probabilities (zero in every published
//! model of these families).

use serde_json::{Map, Value};
use std::f64::consts::PI;
use std::path::{Path, PathBuf};

/// Largest width, vocabulary or context we take for real; keeps every product of two of them inside 64 bits.
const MAX_SIZE: u64 = 1 << 26;

/// Most layers we take for real.
const MAX_LAYERS: u64 = 1 << 12;

/// Largest `config.json` we read.
const MAX_FILE: u64 = 16 << 20;

/// Why a `config.json` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}; is this the directory of a Hugging Face model?", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not a JSON object.
    #[error("{}: not a JSON object: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        source: serde_json::Error,
    },
    /// A key that has no default is not there.
    #[error("{}: key `{key}` is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The key, with the objects it lies in.
        key: String,
    },
    /// A value is of the wrong type, out of range, or contradicts another.
    #[error("{}: `{key}` is {value}: {reason}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key, with the objects it lies in.
        key: String,
        /// What stands there, in JSON.
        value: String,
        /// What is expected.
        reason: String,
    },
    /// Something that we do not compute.
    #[error("{}: {what} `{found}` is not supported; supported: {supported}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Kind of thing.
        what: &'static str,
        /// Its name.
        found: String,
        /// What we do compute.
        supported: &'static str,
    },
}

/// Architecture family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, TinyLlama, SmolLM2.
    Llama,
    /// Mistral 7B, Nemo and their like: Llama with a sliding window.
    Mistral,
    /// Qwen2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: norms on q and k, explicit head size.
    Qwen3,
}

impl Family {
    const ALL: [Family; 4] = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];

    /// `model_type` of the family.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
        }
    }

    /// The family's class for language models, as `architectures` names it.
    pub fn architecture(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// Shape of a decoder. Sizes are in elements.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Architecture family.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even. `heads * head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest context the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// ε of every RMS norm.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// The output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// q, k and v have biases.
    pub attention_bias: bool,
    /// o has a bias.
    pub output_bias: bool,
    /// gate, up and down have biases.
    pub mlp_bias: bool,
    /// Queries and keys are normalised per head.
    pub qk_norm: bool,
    /// Sliding window of each layer, in tokens, the current one included; see [`Self::window`].
    pub windows: Vec<Option<usize>>,
    /// The linear weights in the files are already in bitsandbytes' NF4.
    pub prequantized: bool,
}

impl ModelConfig {
    /// Reads `config.json` in `dir`.
    ///
    /// # Errors
    /// [`ConfigError`], which names the file and the key.
    pub fn load(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join("config.json");
        let text = read_bounded(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
        Self::parse(&text, &path)
    }

    /// [`Self::load`] from text; `path` is for messages.
    ///
    /// # Errors
    /// [`ConfigError`], which names the key.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let map: Map<String, Value> = serde_json::from_str(text)
            .map_err(|source| ConfigError::Json { path: path.to_owned(), source })?;
        let file = Object { path, prefix: String::new(), map: &map };
        let family = family(&file)?;

        let heads = file.size("num_attention_heads", MAX_SIZE)?;
        let kv_heads = file.optional_size("num_key_value_heads", MAX_SIZE)?.unwrap_or(heads);
        if heads % kv_heads != 0 {
            let reason = format!("must divide `num_attention_heads` ({heads})");
            return Err(file.wrong("num_key_value_heads", reason));
        }
        let hidden_size = file.size("hidden_size", MAX_SIZE)?;
        let head_dim = match file.optional_size("head_dim", MAX_SIZE)? {
            Some(size) => size,
            None if family == Family::Qwen3 => 128, // the class's default, whatever the hidden size
            None if hidden_size % heads == 0 => hidden_size / heads,
            None => {
                let reason = format!("must divide `hidden_size` ({hidden_size}) when there is no `head_dim`");
                return Err(file.wrong("num_attention_heads", reason));
            }
        };
        if head_dim % 2 != 0 {
            let key = if map.contains_key("head_dim") { "head_dim" } else { "num_attention_heads" };
            return Err(file.wrong(key, format!("heads of odd size {head_dim} cannot be rotated in pairs")));
        }
        if heads.checked_mul(head_dim).is_none_or(|width| width as u64 > MAX_SIZE) {
            return Err(
                file.wrong("num_attention_heads", format!("times a head size of {head_dim} is absurd"))
            );
        }

        let activation = file.string("hidden_act")?.unwrap_or("silu");
        if !matches!(activation, "silu" | "swish") {
            return Err(file.unsupported("activation (`hidden_act`)", activation, "silu"));
        }
        let rms_norm_eps = file.float("rms_norm_eps")?.unwrap_or(1e-6);
        if !(rms_norm_eps > 0.0 && rms_norm_eps < 1.0) {
            return Err(file.wrong("rms_norm_eps", "must lie between 0 and 1".into()));
        }

        let layers = file.size("num_hidden_layers", MAX_LAYERS)?;
        let max_position_embeddings = file.size("max_position_embeddings", MAX_SIZE)?;
        // Only Llama and Qwen3 have the switch; Llama's covers the output projection, as Qwen3's does.
        let attention_bias = file.boolean("attention_bias")?.unwrap_or(false);
        let switched = matches!(family, Family::Llama | Family::Qwen3) && attention_bias;
        Ok(ModelConfig {
            family,
            hidden_size,
            intermediate_size: file.size("intermediate_size", MAX_SIZE)?,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab_size: file.size("vocab_size", MAX_SIZE)?,
            max_position_embeddings,
            rms_norm_eps,
            rope: rope(&file, max_position_embeddings)?,
            tie_word_embeddings: file.boolean("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: switched || family == Family::Qwen2,
            output_bias: switched,
            mlp_bias: family == Family::Llama && file.boolean("mlp_bias")?.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            windows: windows(&file, family, layers)?,
            prequantized: prequantized(&file)?,
        })
    }

    /// How many tokens back layer `layer` sees, the current one included: query `q` attends to keys `k` with
    /// `q - window < k <= q`. `None` is all of them.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.windows.get(layer).copied().flatten()
    }
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How the series is stretched for contexts beyond those of pre-training.
    pub scaling: RopeScaling,
}

/// How the rotary frequencies are stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All by the same factor.
    Linear {
        /// Divisor of every frequency.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths by `factor`, short ones not at all, a linear transition between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high.
        high_freq_factor: f64,
        /// Context of pre-training, in tokens.
        original_max_position_embeddings: f64,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Dimensions that turn more often than this within the original context are not stretched.
        beta_fast: f64,
        /// Dimensions that turn less often than this are stretched fully.
        beta_slow: f64,
        /// Context of pre-training, in tokens.
        original_max_position_embeddings: f64,
        /// Round the ends of the transition to whole dimensions.
        truncate: bool,
        /// Multiplier of cosine and sine.
        attention_factor: f64,
    },
}

impl Rope {
    /// Radians per token of each pair of dimensions, `head_dim / 2` values.
    ///
    /// The steps and their float32 roundings are those of transformers; only the powers of theta are computed in
    /// float64 and rounded, which PyTorch's float32 `pow` may miss by one unit in the last place.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let theta = f64::from(self.theta as f32);
        let powers =
            (0..head_dim / 2).map(|i| theta.powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32);
        match self.scaling {
            RopeScaling::Default => powers.map(|p| 1.0 / p).collect(),
            RopeScaling::Linear { factor } => powers.map(|p| 1.0 / p / factor as f32).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: context,
            } => powers
                .map(|p| {
                    let frequency = 1.0 / p;
                    // PyTorch divides a number by a tensor as number · (1 / tensor).
                    let wavelength = (2.0 * PI) as f32 * (1.0 / frequency);
                    let factor = factor as f32;
                    if wavelength > (context / low) as f32 {
                        frequency / factor
                    } else if wavelength < (context / high) as f32 {
                        frequency
                    } else {
                        let smooth = (context as f32 * (1.0 / wavelength) - low as f32) / (high - low) as f32;
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                })
                .collect(),
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings: context,
                truncate,
                ..
            } => {
                // The dimension that turns `rotations` times within the original context.
                let dimension = |rotations: f64| {
                    head_dim as f64 * (context / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
                };
                let (low, high) = (dimension(beta_fast), dimension(beta_slow));
                let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                let width = if low == high { 0.001 } else { high - low };
                powers
                    .enumerate()
                    .map(|(i, p)| {
                        let kept = 1.0 - ((i as f32 - low as f32) / width as f32).clamp(0.0, 1.0);
                        1.0 / (factor as f32 * p) * (1.0 - kept) + 1.0 / p * kept
                    })
                    .collect()
            }
        }
    }

    /// Multiplier of cosine and sine; 1 except for YaRN.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }
}

/// Decides by `architectures`, else by `model_type`; when both are there they must agree.
fn family(file: &Object) -> Result<Family, ConfigError> {
    const SUPPORTED: &str = "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM";
    let by_type = match file.string("model_type")? {
        Some(name) => match Family::ALL.into_iter().find(|f| f.model_type() == name) {
            Some(family) => Some(family),
            None => return Err(file.unsupported("model type", name, "llama, mistral, qwen2, qwen3")),
        },
        None => None,
    };
    let class = match file.get("architectures") {
        None => None,
        Some(Value::Array(names)) => match names.first() {
            None => None,
            Some(Value::String(name)) => Some(name.as_str()),
            Some(_) => return Err(file.wrong("architectures", "must be a list of names".into())),
        },
        Some(_) => return Err(file.wrong("architectures", "must be a list of names".into())),
    };
    let by_class = match class {
        Some(name) => match Family::ALL.into_iter().find(|f| f.architecture() == name) {
            Some(family) => Some(family),
            None => return Err(file.unsupported("architecture", name, SUPPORTED)),
        },
        None => None,
    };
    match (by_class, by_type) {
        (Some(a), Some(b)) if a != b => {
            Err(file.wrong("architectures", format!("contradicts `model_type` ({})", b.model_type())))
        }
        (Some(family), _) | (None, Some(family)) => Ok(family),
        (None, None) => Err(file.missing("architectures")),
    }
}

/// Sliding window of each layer.
fn windows(file: &Object, family: Family, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    const DEFAULT: usize = 4096; // of the Mistral and Qwen classes, when the key is absent
    let window = |file: &Object| match file.map.get("sliding_window") {
        None => Ok(Some(DEFAULT)),
        Some(Value::Null) => Ok(None),
        Some(_) => file.optional_size("sliding_window", u64::MAX >> 1),
    };
    match family {
        Family::Llama => Ok(vec![None; layers]),
        Family::Mistral => Ok(vec![window(file)?; layers]),
        Family::Qwen2 | Family::Qwen3 => {
            let used = file.boolean("use_sliding_window")?.unwrap_or(false);
            let window = if used { window(file)? } else { None };
            match file.get("layer_types") {
                None => {
                    let first = file.count("max_window_layers")?.unwrap_or(28);
                    Ok((0..layers).map(|i| window.filter(|_| i as u64 >= first)).collect())
                }
                Some(Value::Array(types)) if types.len() == layers => types
                    .iter()
                    .map(|kind| match kind.as_str() {
                        Some("full_attention") => Ok(None),
                        Some("sliding_attention") => Ok(window),
                        _ => Err(file.unsupported(
                            "layer type (`layer_types`)",
                            kind,
                            "full_attention, sliding_attention",
                        )),
                    })
                    .collect(),
                Some(_) => {
                    Err(file.wrong("layer_types", format!("must be a list of {layers} names, one a layer")))
                }
            }
        }
    }
}

/// Rotary settings, in either spelling.
fn rope(file: &Object, max_position_embeddings: usize) -> Result<Rope, ConfigError> {
    const SUPPORTED: &str = "default, linear, llama3, yarn";
    // `rope_scaling` wins over `rope_parameters`; theta inside wins over theta beside.
    let inner = match file.object("rope_scaling")? {
        Some(object) if !object.map.is_empty() => Some(object),
        _ => file.object("rope_parameters")?,
    };
    let empty = Map::new();
    let inner = inner.unwrap_or(Object { path: file.path, prefix: "rope_parameters.".into(), map: &empty });
    if let Some((key, _)) = inner.map.iter().find(|(_, v)| v.is_object()) {
        return Err(inner.unsupported("rotary embedding per layer type", key, "one for all layers"));
    }
    let theta = inner.float("rope_theta")?.or(file.float("rope_theta")?).unwrap_or(10_000.0);
    if !(theta > 1.0 && theta.is_finite()) {
        let holder = if inner.get("rope_theta").is_some() { &inner } else { file };
        return Err(holder.wrong("rope_theta", "must be greater than 1".into()));
    }
    for object in [&inner, file] {
        if object.float("partial_rotary_factor")?.is_some_and(|f| f != 1.0) {
            return Err(object.wrong("partial_rotary_factor", "only whole heads are rotated here".into()));
        }
    }
    let kind = inner.string("rope_type")?.or(inner.string("type")?).unwrap_or("default");
    let factor = |default: Option<f64>| {
        let factor = match inner.float("factor")?.or(default) {
            Some(factor) => factor,
            None => return Err(inner.missing("factor")),
        };
        if factor >= 1.0 && factor.is_finite() {
            Ok(factor)
        } else {
            Err(inner.wrong("factor", "must be at least 1".into()))
        }
    };
    let positive = |key: &'static str| match inner.float(key)? {
        None => Ok(None),
        Some(value) if value > 0.0 && value.is_finite() => Ok(Some(value)),
        Some(_) => Err(inner.wrong(key, "must be positive".into())),
    };
    // A value beside the rotary settings wins over one inside.
    let original = || -> Result<f64, ConfigError> {
        let beside = file.optional_size("original_max_position_embeddings", MAX_SIZE)?;
        let inside = inner.optional_size("original_max_position_embeddings", MAX_SIZE)?;
        Ok(beside.or(inside).unwrap_or(max_position_embeddings) as f64)
    };
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: factor(None)? },
        "llama3" => {
            let required = |key| positive(key)?.ok_or_else(|| inner.missing(key));
            let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
            if high <= low {
                let reason = format!("must be greater than `low_freq_factor` ({low})");
                return Err(inner.wrong("high_freq_factor", reason));
            }
            RopeScaling::Llama3 {
                factor: factor(None)?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original()?,
            }
        }
        "yarn" => {
            let original = original()?;
            let null_factor = inner.map.get("factor").is_some_and(Value::is_null);
            let factor = factor(null_factor.then_some(max_position_embeddings as f64 / original))?;
            let magnitude = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
            let attention_factor = match positive("attention_factor")? {
                Some(factor) => factor,
                None => match (inner.float("mscale")?, inner.float("mscale_all_dim")?) {
                    (Some(a), Some(b)) if a != 0.0 && b != 0.0 => magnitude(a) / magnitude(b),
                    _ => magnitude(1.0),
                },
            };
            RopeScaling::Yarn {
                factor,
                beta_fast: positive("beta_fast")?.unwrap_or(32.0),
                beta_slow: positive("beta_slow")?.unwrap_or(1.0),
                original_max_position_embeddings: original,
                truncate: inner.boolean("truncate")?.unwrap_or(true),
                attention_factor,
            }
        }
        other => return Err(inner.unsupported("rope type", other, SUPPORTED)),
    };
    Ok(Rope { theta, scaling })
}

/// Whether the files hold bitsandbytes NF4; any other quantisation is refused.
fn prequantized(file: &Object) -> Result<bool, ConfigError> {
    const SUPPORTED: &str = "bitsandbytes nf4, or unquantised weights";
    let Some(quantization) = file.object("quantization_config")? else { return Ok(false) };
    let four_bit = quantization.boolean("load_in_4bit")?.unwrap_or(false);
    match quantization.string("quant_method")? {
        Some("bitsandbytes") => {}
        None if four_bit => {} // written before the key existed
        method => {
            let found = method.unwrap_or("(no `quant_method`)");
            return Err(file.unsupported("quantization_config", found, SUPPORTED));
        }
    }
    if !four_bit {
        return Err(file.unsupported("quantization_config", "bitsandbytes 8-bit", SUPPORTED));
    }
    match quantization.string("bnb_4bit_quant_type")?.unwrap_or("fp4") {
        "nf4" => Ok(true),
        other => Err(file.unsupported("quantization_config", format!("bitsandbytes {other}"), SUPPORTED)),
    }
}

/// Reads a small text file; a device, a pipe or a huge file is refused instead of read.
fn read_bounded(path: &Path) -> std::io::Result<String> {
    let metadata = std::fs::metadata(path)?;
    let refuse = |reason: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, reason.to_owned());
    if !metadata.is_file() {
        return Err(refuse("not a regular file"));
    }
    if metadata.len() > MAX_FILE {
        return Err(refuse("larger than 16 MiB"));
    }
    std::fs::read_to_string(path)
}

/// A JSON object with its place, for messages.
struct Object<'a> {
    path: &'a Path,
    /// Keys of the objects around this one, each followed by a dot.
    prefix: String,
    map: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    /// A value that is there and not null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing { path: self.path.to_owned(), key: format!("{}{key}", self.prefix) }
    }

    fn wrong(&self, key: &str, reason: String) -> ConfigError {
        let mut value = self.map.get(key).unwrap_or(&Value::Null).to_string();
        if value.len() > 80 {
            value = value.chars().take(77).chain("...".chars()).collect();
        }
        ConfigError::Value { path: self.path.to_owned(), key: format!("{}{key}", self.prefix), value, reason }
    }

    fn unsupported(&self, what: &'static str, found: impl ToString, supported: &'static str) -> ConfigError {
        ConfigError::Unsupported { path: self.path.to_owned(), what, found: found.to_string(), supported }
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => {
                convert(value).map(Some).ok_or_else(|| self.wrong(key, format!("must be {expected}")))
            }
        }
    }

    fn string(&self, key: &str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(key, "a string", Value::as_str)
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn float(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn count(&self, key: &str) -> Result<Option<u64>, ConfigError> {
        self.typed(key, "a whole number", Value::as_u64)
    }

    fn object(&self, key: &str) -> Result<Option<Object<'a>>, ConfigError> {
        let map = self.typed(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Object { path: self.path, prefix: format!("{}{key}.", self.prefix), map }))
    }

    /// A whole number from 1 to `max`.
    fn optional_size(&self, key: &str, max: u64) -> Result<Option<usize>, ConfigError> {
        let convert = |value: &Value| {
            let size = value.as_u64().filter(|size| (1..=max).contains(size))?;
            usize::try_from(size).ok()
        };
        self.typed(key, &format!("a whole number from 1 to {max}"), convert)
    }

    fn size(&self, key: &str, max: u64) -> Result<usize, ConfigError> {
        self.optional_size(key, max)?.ok_or_else(|| self.missing(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn base() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
            "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8,
            "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32"
        })
    }

    /// `base` with keys replaced; a key set to `"-"` is taken out.
    fn with(changes: Value) -> Result<ModelConfig, ConfigError> {
        let mut config = base();
        for (key, value) in changes.as_object().unwrap() {
            if value == "-" {
                config.as_object_mut().unwrap().remove(key);
            } else {
                config[key] = value.clone();
            }
        }
        ModelConfig::parse(&config.to_string(), Path::new("dir/config.json"))
    }

    fn message(changes: Value) -> String {
        with(changes).unwrap_err().to_string()
    }

    #[test]
    fn a_llama_config_is_read_with_its_defaults() {
        let config = with(json!({})).unwrap();
        assert_eq!(config.family, Family::Llama);
        assert_eq!((config.heads, config.kv_heads, config.head_dim), (8, 4, 8));
        assert_eq!((config.layers, config.vocab_size, config.intermediate_size), (5, 512, 172));
        assert_eq!(config.rope, Rope { theta: 10_000.0, scaling: RopeScaling::Default });
        assert_eq!(config.rms_norm_eps, 1e-5);
        assert_eq!(config.windows, [None; 5]);
        assert!(!(config.tie_word_embeddings || config.attention_bias || config.mlp_bias || config.qk_norm));
        assert_eq!(with(json!({"num_key_value_heads": "-"})).unwrap().kv_heads, 8);
        let biased = with(json!({"attention_bias": true, "mlp_bias": true})).unwrap();
        assert!(biased.attention_bias && biased.output_bias && biased.mlp_bias);
        assert_eq!(with(json!({"architectures": null})).unwrap().family, Family::Llama);
        assert_eq!(with(json!({"model_type": "-"})).unwrap().family, Family::Llama);
    }

    #[test]
    fn families_differ_as_their_transformers_classes_do() {
        let qwen2 =
            json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_bias": false});
        let qwen2 = with(qwen2).unwrap();
        assert!(qwen2.attention_bias && !qwen2.output_bias && !qwen2.qk_norm);
        let qwen3 = with(json!({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})).unwrap();
        assert!(qwen3.qk_norm && !qwen3.attention_bias);
        assert_eq!(qwen3.head_dim, 128);
        let mistral =
            json!({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 16});
        assert_eq!(with(mistral).unwrap().head_dim, 16);
    }

    #[test]
    fn sliding_windows_follow_the_family() {
        let windows = |class: &str, changes: Value| {
            let mut all = json!({"architectures": [class], "model_type": "-"});
            all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            with(all).map(|c| (0..6).map(|i| c.window(i)).collect::<Vec<_>>())
        };
        let none = vec![None; 6];
        let w = Some(32);
        assert_eq!(windows("LlamaForCausalLM", json!({"sliding_window": 32})).unwrap(), none);
        let mistral = windows("MistralForCausalLM", json!({"sliding_window": 32})).unwrap();
        assert_eq!(mistral, [w, w, w, w, w, None]);
        assert_eq!(windows("MistralForCausalLM", json!({"sliding_window": null})).unwrap(), none);
        assert_eq!(windows("MistralForCausalLM", json!({})).unwrap()[0], Some(4096));
        for class in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
            assert_eq!(
                windows(class, json!({"sliding_window": 32, "use_sliding_window": false})).unwrap(),
                none
            );
            let used = json!({"sliding_window": 32, "use_sliding_window": true, "max_window_layers": 3});
            assert_eq!(windows(class, used).unwrap(), [None, None, None, w, w, None]);
            let types =
                ["sliding_attention", "full_attention", "full_attention", "full_attention", "full_attention"];
            let listed = json!({"sliding_window": 32, "use_sliding_window": true, "layer_types": types});
            assert_eq!(windows(class, listed).unwrap(), [w, None, None, None, None, None]);
            let short = windows(class, json!({"layer_types": ["full_attention"]})).unwrap_err();
            assert!(short.to_string().contains("layer_types"), "{short}");
        }
    }

    #[test]
    fn rotary_frequencies_equal_transformers() {
        let golden: Vec<Value> = serde_json::from_str(include_str!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/rope.json"
        )))
        .unwrap();
        assert!(golden.len() >= 8);
        let (mut equal, mut all) = (0, 0);
        for case in golden {
            let config = ModelConfig::parse(&case["config"].to_string(), Path::new("config.json")).unwrap();
            let found = config.rope.inverse_frequencies(config.head_dim);
            let expected = case["inverse_frequencies"].as_array().unwrap();
            assert_eq!(found.len(), expected.len());
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                let distance = i64::from(found.to_bits()) - expected.as_i64().unwrap();
                // `pow` may differ by one unit, and YaRN adds two terms made of it.
                assert!(distance.abs() <= 3, "{:?} pair {i}: {distance} units off", config.rope);
                equal += usize::from(distance == 0);
                all += 1;
            }
            let factor = case["attention_factor"].as_f64().unwrap() as f32;
            assert_eq!(config.rope.attention_factor(), factor);
        }
        assert!(equal * 10 >= all * 7, "only {equal} of {all} frequencies have the same bits");
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        let refused = |changes: Value, words: &[&str]| {
            let message = message(changes);
            for word in ["dir/config.json"].iter().chain(words) {
                assert!(message.contains(word), "{message:?} does not name {word:?}");
            }
        };
        refused(
            json!({"architectures": ["GPT2LMHeadModel"], "model_type": "-"}),
            &["GPT2LMHeadModel", "Qwen3ForCausalLM"],
        );
        refused(
            json!({"architectures": ["LlamaForSequenceClassification"]}),
            &["LlamaForSequenceClassification"],
        );
        refused(json!({"model_type": "gemma2"}), &["gemma2", "mistral"]);
        refused(json!({"model_type": "qwen2"}), &["LlamaForCausalLM", "qwen2"]);
        refused(json!({"hidden_act": "gelu"}), &["gelu", "silu"]);
        refused(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), &["dynamic", "yarn"]);
        refused(json!({"rope_parameters": {"rope_type": "longrope"}}), &["longrope"]);
        refused(
            json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
            &["full_attention"],
        );
        refused(json!({"partial_rotary_factor": 0.5}), &["partial_rotary_factor", "0.5"]);
        refused(
            json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
            &["gptq", "bitsandbytes nf4"],
        );
        refused(
            json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": true}}),
            &["8-bit"],
        );
        let fp4 = json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "fp4"});
        refused(json!({"quantization_config": fp4}), &["fp4"]);
        let nf4 = json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
        assert!(with(json!({"quantization_config": nf4})).unwrap().prequantized);
    }

    #[test]
    fn wrong_values_are_named_with_their_key() {
        for key in
            ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
        {
            for bad in [json!(0), json!(-3), json!("64"), json!(1.5), json!([1]), json!(u64::MAX)] {
                let message = message(json!({key: bad}));
                assert!(message.contains(key) && message.contains(&bad.to_string()), "{message}");
            }
            assert_eq!(message(json!({key: "-"})), format!("dir/config.json: key `{key}` is missing"));
        }
        for (changes, word) in [
            (json!({"num_key_value_heads": 3}), "num_attention_heads"),
            (json!({"num_attention_heads": 24}), "hidden_size"),
            (json!({"hidden_size": 56}), "odd size 7"),
            (json!({"head_dim": 9}), "odd size 9"),
            (json!({"head_dim": 1 << 26}), "absurd"),
            (json!({"rms_norm_eps": "small"}), "rms_norm_eps"),
            (json!({"rms_norm_eps": -1e-6}), "rms_norm_eps"),
            (json!({"rope_theta": 0}), "rope_theta"),
            (json!({"tie_word_embeddings": 1}), "true or false"),
            (json!({"architectures": "LlamaForCausalLM"}), "list of names"),
            (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor"),
            (json!({"rope_scaling": {"type": "linear", "factor": 0.5}}), "at least 1"),
            (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8}}), "low_freq_factor"),
            (json!({"rope_scaling": 7}), "an object"),
        ] {
            let message = message(changes);
            assert!(message.contains(word), "{message:?} does not say {word:?}");
        }
    }

    #[test]
    fn text_that_is_no_config_is_an_error() {
        let parse = |text: &str| ModelConfig::parse(text, Path::new("config.json")).unwrap_err().to_string();
        assert!(parse("{\"hidden_size\": 64,").contains("line 1"));
        assert!(parse("[]").contains("not a JSON object"));
        assert!(parse(&"[".repeat(100_000)).contains("not a JSON object"));
        let dir = tempfile::tempdir().unwrap();
        let message = ModelConfig::load(dir.path()).unwrap_err().to_string();
        assert!(message.contains("config.json") && message.contains("model?"), "{message}");
        std::fs::create_dir(dir.path().join("config.json")).unwrap();
        assert!(ModelConfig::load(dir.path()).unwrap_err().to_string().contains("not a regular file"));
    }
}
