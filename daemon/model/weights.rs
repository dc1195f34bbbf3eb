//! The frozen base: from a Hugging Face directory to matrices that a backend can take.
//!
//! ```text
//!   config.json ─► what tensors there must be ─┐
//!   *.safetensors, mapped ─► what there is ────┴─► every difference, in one error
//!        │
//!        ├─ embedding, head, norms, biases: used as they lie in the file
//!        └─ seven linears a layer ── already NF4 ──► used as they lie in the file
//!                                 ├─ quantization = "none" ──► used as they lie in the file
//!                                 ├─ cached ──► mapped from the cache
//!                                 └─ else ──► quantised one by one, written to the cache, mapped from there
//! ```
//!
//! Quantising reads a matrix in pieces of 64 KiB and gives its pages back before the next one, and what is written to
//! the cache is not kept: at no time does the process hold more than one quantised matrix beside what it maps. Without
//! a usable cache directory the quantised matrices stay in memory.

use super::base_cache::{BaseCache, CacheError, Weight};
use super::bitsandbytes;
use super::config::{ConfigError, ModelConfig};
use super::digests::{Digests, hex};
use super::tensor_file::{Tensor, TensorFile, TensorFileError};
use crate::backend::nf4;
use crate::backend::{Absmax, FrozenMatrix, Nf4Matrix};
use crate::config::spec::Quantization;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const EMBEDDING: &str = "model.embed_tokens.weight";
const FINAL_NORM: &str = "model.norm.weight";
const LM_HEAD: &str = "lm_head.weight";

/// Largest index we read.
const MAX_INDEX: u64 = 64 << 20;

/// The frozen base.
#[derive(Clone, Debug)]
pub struct Base {
    /// Shape.
    pub config: ModelConfig,
    /// `[vocab_size, hidden_size]`, in the model's file.
    pub embedding: FrozenMatrix,
    /// Decoder layers.
    pub layers: Vec<BaseLayer>,
    /// Scale of the last norm, `[hidden_size]`.
    pub final_norm: Vec<f32>,
    /// `[vocab_size, hidden_size]`, never quantised; `None` when it is the embedding.
    pub lm_head: Option<FrozenMatrix>,
    /// SHA-256 of the content of `config.json` and of all weight files, in hexadecimal.
    pub hash: String,
    /// How the linear weights are held.
    pub quantization: Quantization,
    /// Whether the absmax values are quantised; of a checkpoint that came quantised, what it has.
    pub double_quant: bool,
    /// What the cache did.
    pub cache: CacheUse,
}

/// Weights of one decoder layer.
#[derive(Clone, Debug)]
pub struct BaseLayer {
    /// `[heads * head_dim, hidden_size]`
    pub q: BaseLinear,
    /// `[kv_heads * head_dim, hidden_size]`
    pub k: BaseLinear,
    /// `[kv_heads * head_dim, hidden_size]`
    pub v: BaseLinear,
    /// `[hidden_size, heads * head_dim]`
    pub o: BaseLinear,
    /// `[intermediate_size, hidden_size]`
    pub gate: BaseLinear,
    /// `[intermediate_size, hidden_size]`
    pub up: BaseLinear,
    /// `[hidden_size, intermediate_size]`
    pub down: BaseLinear,
    /// Scale of the norm before attention, `[hidden_size]`.
    pub input_norm: Vec<f32>,
    /// Scale of the norm before the feed-forward part, `[hidden_size]`.
    pub post_attention_norm: Vec<f32>,
    /// Scale of the norm of each query head, `[head_dim]`.
    pub q_norm: Option<Vec<f32>>,
    /// Scale of the norm of each key head, `[head_dim]`.
    pub k_norm: Option<Vec<f32>>,
}

impl BaseLayer {
    /// The seven linears, in the order of `LoraSpec::ALL_LINEAR`.
    pub fn linears(&self) -> [&BaseLinear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }
}

/// A frozen linear layer.
#[derive(Clone, Debug)]
pub struct BaseLinear {
    /// `[out, in]`
    pub weight: FrozenMatrix,
    /// `[out]`
    pub bias: Option<Vec<f32>>,
}

/// What the cache of quantised bases did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheUse {
    /// The linears were not quantised here.
    NotNeeded,
    /// They were mapped from this file.
    Hit(PathBuf),
    /// They were quantised, written to this file and mapped from it.
    Written(PathBuf),
    /// They were quantised and are held in memory, because the cache could not be written.
    Unusable(String),
}

/// Why a base cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// `config.json`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A safetensors file.
    #[error(transparent)]
    File(#[from] TensorFileError),
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// There are no weights.
    #[error("{}: neither {SINGLE} nor {INDEX}; {hint}", dir.display())]
    NoWeights {
        /// The model directory.
        dir: PathBuf,
        /// What to do.
        hint: &'static str,
    },
    /// The index of a sharded model.
    #[error("{}: {reason}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The tensors are not those of `config.json`.
    #[error("{}: {} of the tensors do not fit config.json:{}", dir.display(), problems.len(), lines(problems))]
    Tensors {
        /// The model directory.
        dir: PathBuf,
        /// All of them.
        problems: Vec<Problem>,
    },
    /// A weight is infinite or not a number.
    #[error("{}: tensor `{name}` holds infinity or NaN at {index:?}; the model is damaged", path.display())]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Where in it.
        index: Vec<usize>,
    },
    /// The checkpoint is 4-bit and the spec asks for unquantised weights.
    #[error(
        "{}: the checkpoint is already quantised to 4 bits by bitsandbytes, its unquantised weights are gone; set \
         quantization = \"nf4\", or take the model it was made from",
        dir.display()
    )]
    AlreadyQuantized {
        /// The model directory.
        dir: PathBuf,
    },
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(|p| format!("\n  {p}")).collect()
}

/// A tensor that is not as `config.json` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// It is not there.
    Missing {
        /// Its name.
        name: String,
    },
    /// It is there and should not be.
    Extra {
        /// Its name.
        name: String,
        /// File name.
        file: String,
    },
    /// It has another shape.
    Shape {
        /// Its name.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape that follows from the config.
        expected: Vec<usize>,
    },
    /// It is not f32, f16 or bf16.
    Dtype {
        /// Its name.
        name: String,
        /// Type in the file.
        found: String,
    },
    /// It is in two files.
    Duplicate {
        /// Its name.
        name: String,
        /// File names.
        files: [String; 2],
    },
    /// The index says that it is in a file which does not have it.
    NotInShard {
        /// Its name.
        name: String,
        /// File name.
        file: String,
    },
    /// Its 4-bit parts do not make sense.
    Quantized {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Missing { name } => write!(f, "missing    {name}"),
            Problem::Extra { name, file } => write!(f, "unexpected {name} (in {file})"),
            Problem::Shape { name, found, expected } => {
                write!(f, "shape      {name} is {found:?} instead of {expected:?}")
            }
            Problem::Dtype { name, found } => {
                write!(f, "type       {name} is {found} instead of F32, F16 or BF16")
            }
            Problem::Duplicate { name, files: [a, b] } => write!(f, "twice      {name} (in {a} and {b})"),
            Problem::NotInShard { name, file } => write!(f, "index      {name} is not in {file}"),
            Problem::Quantized { name, reason } => write!(f, "4-bit      {name}: {reason}"),
        }
    }
}

/// A linear of a layer, as the config describes it.
struct LinearShape {
    /// Within the layer, without `.weight`.
    name: &'static str,
    rows: usize,
    cols: usize,
    bias: bool,
}

/// The seven linears, in the order of `LoraSpec::ALL_LINEAR`.
fn linear_shapes(config: &ModelConfig) -> [LinearShape; 7] {
    let (hidden, inter) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let shape = |name, rows, cols, bias| LinearShape { name, rows, cols, bias };
    [
        shape("self_attn.q_proj", q, hidden, config.attention_bias),
        shape("self_attn.k_proj", kv, hidden, config.attention_bias),
        shape("self_attn.v_proj", kv, hidden, config.attention_bias),
        shape("self_attn.o_proj", hidden, q, config.output_bias),
        shape("mlp.gate_proj", inter, hidden, config.mlp_bias),
        shape("mlp.up_proj", inter, hidden, config.mlp_bias),
        shape("mlp.down_proj", hidden, inter, config.mlp_bias),
    ]
}

impl Base {
    /// Loads the model in `dir`.
    ///
    /// `double_quant` counts only for weights that are quantised here. `progress(done, layers)` is called before the
    /// first layer and after each. A cache directory that cannot be used costs time and memory but is no error; see
    /// [`CacheUse`].
    ///
    /// # Errors
    /// [`WeightsError`]; all tensors that do not fit the config are in one.
    pub fn load(
        dir: &Path,
        quantization: Quantization,
        double_quant: bool,
        cache_dir: &Path,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Base, WeightsError> {
        let config = ModelConfig::load(dir)?;
        if config.prequantized && quantization == Quantization::None {
            return Err(WeightsError::AlreadyQuantized { dir: dir.to_owned() });
        }
        let (files, mut problems) = Files::open(dir)?;
        let quantized = check(&config, &files, &mut problems);
        if !problems.is_empty() {
            return Err(WeightsError::Tensors { dir: dir.to_owned(), problems });
        }
        let mut digests = Digests::open(cache_dir);
        let (hash, new) = identity(dir, &files, &mut digests)?;
        progress(0, config.layers);

        let (weights, cache) = if config.prequantized || quantization == Quantization::None {
            let weights = weights_as_stored(&config, &files, quantized, new, progress)?;
            (weights, CacheUse::NotNeeded)
        } else {
            let cache = BaseCache::new(cache_dir, &hash, double_quant);
            quantized_weights(&config, &files, double_quant, &cache, &mut digests, progress)?
        };
        let layers = weights
            .as_chunks::<7>()
            .0
            .iter()
            .enumerate()
            .map(|(i, weights)| layer(&config, &files, i, weights.clone()))
            .collect::<Result<Vec<_>, _>>()?;
        let lm_head = if config.tie_word_embeddings { None } else { Some(files.dense(LM_HEAD, new)?) };
        let double_quant = layers.iter().flat_map(BaseLayer::linears).any(|l| is_nested(&l.weight));
        let base = Base {
            embedding: files.dense(EMBEDDING, new)?,
            final_norm: files.vector(FINAL_NORM)?,
            lm_head,
            hash,
            quantization,
            double_quant,
            layers,
            config,
            cache,
        };
        // Only now: remembered digests say that the weights were found finite.
        if let Err(error) = digests.save() {
            tracing::warn!(dir = %cache_dir.display(), %error, "digests of the model's files are not remembered");
        }
        Ok(base)
    }

    /// Number of parameters as PEFT counts those of the base: all of them, a tied head once, a 4-bit weight by its
    /// elements.
    pub fn total_parameters(&self) -> u64 {
        let matrix = |m: &FrozenMatrix| {
            let (rows, cols) = m.shape();
            rows as u64 * cols as u64
        };
        let vector = |v: &[f32]| v.len() as u64;
        let layer = |layer: &BaseLayer| {
            let linears = layer.linears().map(|l| matrix(&l.weight) + l.bias.as_deref().map_or(0, vector));
            let norms = [Some(&layer.input_norm), Some(&layer.post_attention_norm)]
                .into_iter()
                .chain([layer.q_norm.as_ref(), layer.k_norm.as_ref()])
                .flatten();
            linears.iter().sum::<u64>() + norms.map(|n| vector(n)).sum::<u64>()
        };
        matrix(&self.embedding)
            + self.lm_head.as_ref().map_or(0, matrix)
            + vector(&self.final_norm)
            + self.layers.iter().map(layer).sum::<u64>()
    }
}

fn is_nested(matrix: &FrozenMatrix) -> bool {
    matches!(matrix, FrozenMatrix::Nf4(Nf4Matrix { absmax: Absmax::Nested { .. }, .. }))
}

/// The mapped weight files of a model.
struct Files {
    dir: PathBuf,
    files: Vec<TensorFile>,
    /// Tensor name to position in `files`.
    places: HashMap<String, usize>,
}

impl Files {
    /// Maps `model.safetensors`, or else every shard of the index. Contradictions between index and shards are returned
    /// beside, to be reported with all others.
    fn open(dir: &Path) -> Result<(Files, Vec<Problem>), WeightsError> {
        let single = dir.join(SINGLE);
        let index = dir.join(INDEX);
        let (names, map) = if single.exists() {
            (BTreeSet::from([SINGLE.to_owned()]), BTreeMap::new())
        } else if index.exists() {
            let map = read_index(&index)?;
            (map.values().cloned().collect(), map)
        } else {
            let has_bin = std::fs::read_dir(dir)
                .is_ok_and(|d| d.flatten().any(|e| e.path().extension().is_some_and(|e| e == "bin")));
            let hint = if has_bin {
                "there are only .bin files: convert the model to safetensors (transformers: save_pretrained)"
            } else {
                "is this the directory of a Hugging Face model?"
            };
            return Err(WeightsError::NoWeights { dir: dir.to_owned(), hint });
        };
        let mut all = Files { dir: dir.to_owned(), files: Vec::new(), places: HashMap::new() };
        let mut problems = Vec::new();
        for name in names {
            let file = TensorFile::open(&dir.join(&name))?;
            for tensor in file.names() {
                if let Some(&other) = all.places.get(&tensor) {
                    let files = [file_name(all.files[other].path()), name.clone()];
                    problems.push(Problem::Duplicate { name: tensor, files });
                } else {
                    all.places.insert(tensor, all.files.len());
                }
            }
            all.files.push(file);
        }
        for (tensor, file) in map {
            if all.places.get(&tensor).is_none_or(|&place| file_name(all.files[place].path()) != file) {
                problems.push(Problem::NotInShard { name: tensor, file });
            }
        }
        Ok((all, problems))
    }

    fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        self.files[*self.places.get(name)?].tensor(name)
    }

    /// A tensor that [`check`] has seen.
    fn checked(&self, name: &str) -> Result<Tensor<'_>, WeightsError> {
        self.tensor(name).ok_or_else(|| self.problem(Problem::Missing { name: name.to_owned() }))
    }

    fn problem(&self, problem: Problem) -> WeightsError {
        WeightsError::Tensors { dir: self.dir.clone(), problems: vec![problem] }
    }

    /// A dense matrix; with `search`, looked through for values that are not finite.
    fn dense(&self, name: &str, search: bool) -> Result<FrozenMatrix, WeightsError> {
        let tensor = self.checked(name)?;
        if let Some(at) = search.then(|| tensor.first_non_finite()).flatten() {
            return Err(non_finite(&tensor, name, at));
        }
        let matrix = tensor.matrix().ok_or_else(|| {
            self.problem(Problem::Dtype {
                name: name.to_owned(),
                found: format!("{:?}", tensor.stored_dtype()),
            })
        })?;
        Ok(FrozenMatrix::Dense(matrix))
    }

    /// A vector in float32, all finite.
    fn vector(&self, name: &str) -> Result<Vec<f32>, WeightsError> {
        let tensor = self.checked(name)?;
        let values = tensor.to_f32();
        match values.iter().position(|v| !v.is_finite()) {
            Some(at) => Err(non_finite(&tensor, name, at)),
            None => Ok(values),
        }
    }
}

fn non_finite(tensor: &Tensor, name: &str, at: usize) -> WeightsError {
    let index = match tensor.shape() {
        [_, cols] => vec![at / cols, at % cols],
        _ => vec![at],
    };
    WeightsError::NonFinite { path: tensor.path().to_owned(), name: name.to_owned(), index }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// `weight_map` of an index: tensor name to file name.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, WeightsError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let read = |source| WeightsError::Read { path: path.to_owned(), source };
    let wrong = |reason: String| WeightsError::Index { path: path.to_owned(), reason };
    if std::fs::metadata(path).map_err(read)?.len() > MAX_INDEX {
        return Err(wrong("larger than 64 MiB".into()));
    }
    let text = std::fs::read(path).map_err(read)?;
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| wrong(format!("not an index of safetensors files (`weight_map` of names): {e}")))?;
    // A model must not reach outside its directory.
    match index.weight_map.iter().find(|(_, file)| Path::new(file).file_name() != Some(file.as_ref())) {
        Some((tensor, file)) => {
            Err(wrong(format!("`{tensor}` is in {file:?}, which is not a plain file name")))
        }
        None if index.weight_map.is_empty() => Err(wrong("`weight_map` is empty".into())),
        None => Ok(index.weight_map),
    }
}

/// Compares what is there with what `config` asks for, and adds every difference to `problems`. Returns the 4-bit
/// weights of a checkpoint that came quantised, by name.
fn check(config: &ModelConfig, files: &Files, problems: &mut Vec<Problem>) -> HashMap<String, Nf4Matrix> {
    let mut seen = BTreeSet::new();
    let mut dense = |name: String, expected: &[usize]| {
        match files.tensor(&name) {
            None => problems.push(Problem::Missing { name: name.clone() }),
            Some(tensor) => {
                if tensor.shape() != expected {
                    let (found, expected) = (tensor.shape().to_vec(), expected.to_vec());
                    problems.push(Problem::Shape { name: name.clone(), found, expected });
                }
                if tensor.dtype().is_none() {
                    let found = format!("{:?}", tensor.stored_dtype());
                    problems.push(Problem::Dtype { name: name.clone(), found });
                }
            }
        }
        seen.insert(name);
    };
    let hidden = config.hidden_size;
    dense(EMBEDDING.into(), &[config.vocab_size, hidden]);
    dense(FINAL_NORM.into(), &[hidden]);
    if !config.tie_word_embeddings {
        dense(LM_HEAD.into(), &[config.vocab_size, hidden]);
    }
    let mut four_bit = Vec::new();
    for i in 0..config.layers {
        dense(norm_name(i, "input_layernorm"), &[hidden]);
        dense(norm_name(i, "post_attention_layernorm"), &[hidden]);
        if config.qk_norm {
            dense(norm_name(i, "self_attn.q_norm"), &[config.head_dim]);
            dense(norm_name(i, "self_attn.k_norm"), &[config.head_dim]);
        }
        for linear in linear_shapes(config) {
            let name = weight_name(i, linear.name);
            let has = |suffix: &str| files.tensor(&format!("{name}{suffix}")).is_some();
            // A 4-bit checkpoint may keep some linears as they were.
            if config.prequantized && (has(bitsandbytes::STATE) || has(bitsandbytes::FP4_STATE)) {
                four_bit.push((name, linear.rows, linear.cols));
            } else {
                dense(name, &[linear.rows, linear.cols]);
            }
            if linear.bias {
                dense(bias_name(i, linear.name), &[linear.rows]);
            }
        }
    }
    let mut matrices = HashMap::new();
    for (name, rows, cols) in four_bit {
        let result = if files.tensor(&format!("{name}{}", bitsandbytes::FP4_STATE)).is_some() {
            Err("quantisation type `fp4` is not supported; supported: nf4".into())
        } else {
            bitsandbytes::read(|part| files.tensor(part), &name, rows, cols)
        };
        seen.insert(name.clone());
        seen.extend(bitsandbytes::SUFFIXES.map(|suffix| format!("{name}{suffix}")));
        seen.insert(format!("{name}{}", bitsandbytes::FP4_STATE));
        match result {
            Ok(matrix) => {
                matrices.insert(name, matrix);
            }
            Err(reason) => problems.push(Problem::Quantized { name, reason }),
        }
    }
    // In the order of the files, which is the order a person would look in.
    for file in &files.files {
        for name in file.names() {
            let harmless = name.ends_with(".rotary_emb.inv_freq") // a constant that old versions saved
                || config.tie_word_embeddings && name == LM_HEAD; // a copy of the embedding
            if !harmless && !seen.contains(&name) {
                problems.push(Problem::Extra { name, file: file_name(file.path()) });
            }
        }
    }
    matrices
}

fn weight_name(layer: usize, linear: &str) -> String {
    format!("model.layers.{layer}.{linear}.weight")
}

fn bias_name(layer: usize, linear: &str) -> String {
    format!("model.layers.{layer}.{linear}.bias")
}

fn norm_name(layer: usize, norm: &str) -> String {
    format!("model.layers.{layer}.{norm}.weight")
}

/// SHA-256 over the names and digests of `config.json` and all weight files, and whether any of these had to be
/// computed, that is, whether this content is new here.
fn identity(dir: &Path, files: &Files, digests: &mut Digests) -> Result<(String, bool), WeightsError> {
    let mut all = Sha256::new();
    let mut new = false;
    // Absolute, so that the memory of digests does not depend on the working directory.
    let dir =
        std::path::absolute(dir).map_err(|source| WeightsError::Read { path: dir.to_owned(), source })?;
    let names =
        std::iter::once("config.json".to_owned()).chain(files.files.iter().map(|f| file_name(f.path())));
    for name in names {
        let path = dir.join(&name);
        let (digest, computed) =
            digests.digest(&path).map_err(|source| WeightsError::Read { path, source })?;
        new |= computed;
        all.update(format!("{digest}  {name}\n"));
    }
    Ok((hex(&all.finalize()), new))
}

/// All linear weights, layer by layer, as the files have them.
fn weights_as_stored(
    config: &ModelConfig,
    files: &Files,
    mut quantized: HashMap<String, Nf4Matrix>,
    search: bool,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<FrozenMatrix>, WeightsError> {
    let mut weights = Vec::new();
    for i in 0..config.layers {
        for linear in linear_shapes(config) {
            let name = weight_name(i, linear.name);
            weights.push(match quantized.remove(&name) {
                Some(matrix) => FrozenMatrix::Nf4(matrix),
                None => files.dense(&name, search)?,
            });
        }
        progress(i + 1, config.layers);
    }
    Ok(weights)
}

/// All linear weights, layer by layer, in NF4: from the cache, or quantised into it, or quantised into memory.
fn quantized_weights(
    config: &ModelConfig,
    files: &Files,
    double_quant: bool,
    cache: &BaseCache,
    digests: &mut Digests,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(Vec<FrozenMatrix>, CacheUse), WeightsError> {
    let names: Vec<Weight> = (0..config.layers)
        .flat_map(|i| {
            linear_shapes(config).map(|l| Weight { name: weight_name(i, l.name), rows: l.rows, cols: l.cols })
        })
        .collect();
    let mut quantize = |take: &mut dyn FnMut(Nf4Matrix) -> Result<(), CacheError>| {
        for (i, weight) in names.iter().enumerate() {
            take(quantize_tensor(files, weight, double_quant)?)?;
            if (i + 1) % 7 == 0 {
                progress((i + 1) / 7, config.layers);
            }
        }
        Ok::<_, Stop>(())
    };

    match cache.open(digests).and_then(|file| file.map(|file| map_weights(&file, &names, cache)).transpose())
    {
        Ok(Some(weights)) => {
            progress(config.layers, config.layers);
            return Ok((weights, CacheUse::Hit(cache.path())));
        }
        Ok(None) => {}
        Err(error) => tracing::warn!(%error, "cached base is not used; quantising again"),
    }
    let mut through_cache = || {
        let mut writer = cache.create(&names, double_quant)?;
        quantize(&mut |matrix| writer.append(&matrix))?;
        writer.commit(digests)?;
        match cache.open(digests)? {
            Some(file) => Ok(map_weights(&file, &names, cache)?),
            None => {
                Err(Stop::Cache(CacheError::Wrong { path: cache.path(), reason: "removed while in use" }))
            }
        }
    };
    match through_cache() {
        Ok(weights) => Ok((weights, CacheUse::Written(cache.path()))),
        Err(Stop::Weights(error)) => Err(error),
        Err(Stop::Cache(error)) => {
            tracing::warn!(%error, "the quantised base cannot be cached; it is held in memory");
            let mut weights = Vec::with_capacity(names.len());
            match quantize(&mut |matrix| {
                weights.push(FrozenMatrix::Nf4(matrix));
                Ok(())
            }) {
                Err(Stop::Weights(error)) => Err(error),
                Ok(()) | Err(Stop::Cache(_)) => Ok((weights, CacheUse::Unusable(error.to_string()))),
            }
        }
    }
}

/// Why quantising through the cache ended early.
enum Stop {
    /// The base is at fault.
    Weights(WeightsError),
    /// The cache is; the base can still be quantised into memory.
    Cache(CacheError),
}

impl From<WeightsError> for Stop {
    fn from(error: WeightsError) -> Self {
        Stop::Weights(error)
    }
}

impl From<CacheError> for Stop {
    fn from(error: CacheError) -> Self {
        Stop::Cache(error)
    }
}

/// Quantises one tensor and gives its pages back.
fn quantize_tensor(files: &Files, weight: &Weight, double_quant: bool) -> Result<Nf4Matrix, WeightsError> {
    let tensor = files.checked(&weight.name)?;
    let matrix =
        nf4::quantize_from(weight.rows, weight.cols, double_quant, |start, out| tensor.widen(start, out))
            .map_err(|bad| non_finite(&tensor, &weight.name, bad.row * weight.cols + bad.col))?;
    tensor.release();
    Ok(matrix)
}

/// All weights of a cache file.
fn map_weights(
    file: &TensorFile,
    names: &[Weight],
    cache: &BaseCache,
) -> Result<Vec<FrozenMatrix>, CacheError> {
    names
        .par_iter()
        .map(|weight| {
            bitsandbytes::read(|part| file.tensor(part), &weight.name, weight.rows, weight.cols)
                .map(FrozenMatrix::Nf4)
                .map_err(|reason| {
                    tracing::warn!(weight = weight.name, reason, "cached weight");
                    CacheError::Wrong { path: cache.path(), reason: "its weights are not those of this base" }
                })
        })
        .collect()
}

/// Layer `i` around its seven weights, which come in the order of [`linear_shapes`].
fn layer(
    config: &ModelConfig,
    files: &Files,
    i: usize,
    weights: [FrozenMatrix; 7],
) -> Result<BaseLayer, WeightsError> {
    let biases = linear_shapes(config)
        .map(|linear| linear.bias.then(|| files.vector(&bias_name(i, linear.name))).transpose());
    let [q, k, v, o, gate, up, down] = weights;
    let [q_bias, k_bias, v_bias, o_bias, gate_bias, up_bias, down_bias] = biases;
    let head_norm = |name| config.qk_norm.then(|| files.vector(&norm_name(i, name))).transpose();
    Ok(BaseLayer {
        q: BaseLinear { weight: q, bias: q_bias? },
        k: BaseLinear { weight: k, bias: k_bias? },
        v: BaseLinear { weight: v, bias: v_bias? },
        o: BaseLinear { weight: o, bias: o_bias? },
        gate: BaseLinear { weight: gate, bias: gate_bias? },
        up: BaseLinear { weight: up, bias: up_bias? },
        down: BaseLinear { weight: down, bias: down_bias? },
        input_norm: files.vector(&norm_name(i, "input_layernorm"))?,
        post_attention_norm: files.vector(&norm_name(i, "post_attention_layernorm"))?,
        q_norm: head_norm("self_attn.q_norm")?,
        k_norm: head_norm("self_attn.k_norm")?,
    })
}

#[cfg(test)]
mod tests;
