//! From a spec to everything a run computes with: tokens, base, adapter layout, memory plan.

use crate::backend::Backend;
use crate::checkpoint::{AdapterConfig, NamedTensor, PeftError, read_adapter};
use crate::config::spec::{GradientCheckpointing, LoraSpec, Spec};
use crate::data::{
    self, ChatTokenizer, DataError, EpochPlan, PreparedData, Stage, TokenRows, TokenizerError,
};
use crate::model::adapter::{AdapterLayout, Module};
use crate::model::config::ModelConfig;
use crate::model::memory::{self, MemoryPlan, MicroBatch};
use crate::model::weights::{Base, WeightsError};
use crate::train::observer::{Event, Observer};
use crate::units::Bytes;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Why a run could not be prepared. Nothing was trained or written.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// Tokenizer or chat template.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Data files.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The base.
    #[error(transparent)]
    Base(#[from] WeightsError),
    /// The adapter named by `lora.init_from`.
    #[error(transparent)]
    Adapter(#[from] PeftError),
    /// The spec asks for something that this model or machine does not have.
    #[error("{key} = {value}: {why}")]
    Unfit {
        /// Key of the spec.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// The GPU that was asked for, or that is there, cannot be used.
    #[error("the GPU cannot be used: {0}")]
    Device(#[source] finetuned_cuda::Error),
    /// The tokenizer makes ids that the model has no embedding for.
    #[error(
        "{base}: the tokenizer gave token {token}, but the model's vocabulary has {vocabulary} entries: \
         tokenizer.json does not belong to this model",
        base = .base.display()
    )]
    Vocabulary {
        /// Model directory.
        base: PathBuf,
        /// The id.
        token: u32,
        /// `vocab_size`.
        vocabulary: usize,
    },
}

/// Everything a run computes with.
pub struct Prepared {
    /// Tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    /// Rows.
    pub data: PreparedData,
    /// The frozen base.
    pub base: Base,
    /// Where the adapter sits.
    pub layout: AdapterLayout,
    /// The adapter to start from, in the order of the layout, with its content hash.
    pub initial: Option<(Vec<Vec<f32>>, String)>,
}

/// Reads and checks everything that `spec` names.
pub fn prepare(
    spec: &Spec,
    cache: &Path,
    quarantine: Option<&Path>,
    observer: &mut dyn Observer,
) -> Result<Prepared, PrepareError> {
    let config = ModelConfig::load(&spec.model.base).map_err(WeightsError::from)?;
    let layout = layout(spec, &config)?;
    let tokenizer = ChatTokenizer::load(&spec.model.base)?;
    if spec.data.sequence_length > config.max_position_embeddings {
        observer.observe(Event::Note(format!(
            "sequence_length = {} is longer than the {} positions the base was trained for",
            spec.data.sequence_length, config.max_position_embeddings
        )));
    }
    let mut report = |progress: data::Progress| observer.observe(reading(&progress));
    let data =
        data::prepare(&spec.data, spec.run.seed, &tokenizer, &cache.join("tokens"), quarantine, &mut report)?;
    for rows in std::iter::once(&data.train).chain(&data.eval) {
        if let Some(token) = largest_token(rows)
            && token as usize >= config.vocab_size
        {
            return Err(PrepareError::Vocabulary {
                base: spec.model.base.clone(),
                token,
                vocabulary: config.vocab_size,
            });
        }
    }
    let initial = match &spec.lora.init_from {
        Some(dir) => Some(initial_adapter(dir, spec, &layout)?),
        None => None,
    };
    let mut report = |layer: usize, layers: usize| {
        observer.observe(Event::Preparing { what: "loading base", done: layer as u64, total: layers as u64 });
    };
    let base = Base::load(
        &spec.model.base,
        spec.model.quantization,
        spec.model.double_quant,
        &cache.join("bases"),
        &mut report,
    )?;
    Ok(Prepared { tokenizer, data, base, layout, initial })
}

/// The event of a piece of reading.
pub fn reading(progress: &data::Progress) -> Event {
    let what = match progress.stage {
        Stage::Hashing => "hashing data",
        Stage::Tokenising => "reading data",
    };
    Event::Preparing { what, done: progress.bytes, total: progress.total }
}

fn largest_token(rows: &TokenRows) -> Option<u32> {
    (0..rows.len()).filter_map(|i| rows.row(i).0.iter().copied().max()).max()
}

/// The layout that `[lora]` describes, for a model of this shape.
pub fn layout(spec: &Spec, config: &ModelConfig) -> Result<AdapterLayout, PrepareError> {
    let lora = &spec.lora;
    if let Some((first, last)) = lora.layers
        && (first >= last || last > config.layers)
    {
        return Err(PrepareError::Unfit {
            key: "lora.layers",
            value: format!("\"{first}..{last}\""),
            why: format!("the model has layers 0..{}; the end is exclusive", config.layers),
        });
    }
    let modules: Vec<Module> =
        Module::ALL.into_iter().filter(|m| lora.target_modules.iter().any(|t| t == m.name())).collect();
    Ok(AdapterLayout::new(config, lora.r, lora.scale(), lora.dropout, &modules, lora.layers))
}

/// The adapter's description for PEFT.
pub fn adapter_config(spec: &Spec) -> AdapterConfig {
    AdapterConfig {
        r: spec.lora.r,
        alpha: spec.lora.alpha,
        dropout: spec.lora.dropout,
        target_modules: spec.lora.target_modules.clone(),
        use_rslora: spec.lora.use_rslora,
        layers_to_transform: spec.lora.layers.map(|(first, last)| (first..last).collect()),
        base_model_name_or_path: Some(spec.model.base.display().to_string()),
        revision: None,
    }
}

/// Reads `lora.init_from` and holds it against the spec.
fn initial_adapter(
    dir: &Path,
    spec: &Spec,
    layout: &AdapterLayout,
) -> Result<(Vec<Vec<f32>>, String), PrepareError> {
    let (config, tensors) = read_adapter(dir)?;
    let unfit = |why: String| PrepareError::Unfit {
        key: "lora.init_from",
        value: format!("\"{}\"", dir.display()),
        why,
    };
    let wanted = adapter_config(spec);
    let mut differences = Vec::new();
    if config.r != wanted.r {
        differences.push(format!("its r is {}, lora.r is {}", config.r, wanted.r));
    }
    let scale =
        LoraSpec { r: config.r, alpha: config.alpha, use_rslora: config.use_rslora, ..spec.lora.clone() }
            .scale();
    if scale != layout.scale {
        differences.push(format!(
            "it scales by {scale} (alpha {}, use_rslora {}), the spec by {} (alpha {}, use_rslora {})",
            config.alpha, config.use_rslora, layout.scale, wanted.alpha, wanted.use_rslora
        ));
    }
    if config.target_modules != wanted.target_modules {
        differences.push(format!(
            "its target modules are {:?}, the spec's {:?}",
            config.target_modules, wanted.target_modules
        ));
    }
    let values = in_layout_order(layout, &tensors).unwrap_or_else(|why| {
        differences.push(why);
        Vec::new()
    });
    if !differences.is_empty() {
        return Err(unfit(format!("this adapter does not fit: {}", differences.join("; "))));
    }
    let mut hash = Sha256::new();
    for (i, tensor) in values.iter().enumerate() {
        hash.update(layout.name(i).as_bytes());
        tensor.iter().for_each(|v| hash.update(v.to_le_bytes()));
    }
    let hash = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    Ok((values, hash))
}

/// Tensors by name, in the order of the layout; exactly those.
pub fn in_layout_order(layout: &AdapterLayout, tensors: &[NamedTensor]) -> Result<Vec<Vec<f32>>, String> {
    let mut by_name: std::collections::HashMap<&str, &NamedTensor> =
        tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    let mut values = Vec::with_capacity(layout.tensors());
    let mut problems = Vec::new();
    for i in 0..layout.tensors() {
        let name = layout.name(i);
        match by_name.remove(name.as_str()) {
            Some(t) if t.shape == layout.shape(i) => values.push(t.data.clone()),
            Some(t) => problems.push(format!("{name} is {:?}, not {:?}", t.shape, layout.shape(i))),
            None => problems.push(format!("{name} is missing")),
        }
    }
    problems.extend(by_name.keys().map(|name| format!("{name} is not part of this run")));
    problems.sort();
    let more = problems.len().saturating_sub(8);
    problems.truncate(8);
    if more > 0 {
        problems.push(format!("and {more} more"));
    }
    if problems.is_empty() { Ok(values) } else { Err(problems.join("; ")) }
}

/// The largest micro-batch that a run can meet.
pub fn largest_micro_batch(spec: &Spec, data: &PreparedData) -> MicroBatch {
    let longest = (0..data.train.len()).map(|i| data.train.row_len(i)).max().unwrap_or(0);
    let eval =
        data.eval.as_ref().map_or(0, |rows| (0..rows.len()).map(|i| rows.row_len(i)).max().unwrap_or(0));
    let longest = longest.max(eval).min(spec.data.sequence_length);
    let n = spec.train.micro_batch_size;
    if !spec.data.packing {
        return MicroBatch { tokens: n * longest, labelled: n * longest, longest };
    }
    // Packed sequences are as long as the fullest one of the plans.
    let (mut tokens, mut labelled) = (longest, 0);
    for (rows, shuffle) in
        std::iter::once((&data.train, spec.data.shuffle)).chain(data.eval.iter().map(|e| (e, false)))
    {
        let plan = EpochPlan::new(rows, spec.data.sequence_length, true, shuffle, spec.run.seed, 0);
        for i in 0..plan.len() {
            let sequence: usize =
                plan.rows(i).iter().map(|&r| rows.row_len(r as usize).min(spec.data.sequence_length)).sum();
            tokens = tokens.max(sequence);
            labelled = labelled.max(plan.labelled(rows, i));
        }
    }
    // Later epochs pack differently: nothing is longer than the limit.
    if spec.train.num_epochs > 1.0 || spec.train.max_steps.is_some() {
        labelled = (labelled * spec.data.sequence_length).div_ceil(tokens.max(1));
        tokens = spec.data.sequence_length.min(data.train.total_tokens() as usize).max(tokens);
    }
    MicroBatch { tokens: n * tokens, labelled: n * labelled.min(tokens), longest }
}

/// Bytes of the whole base.
pub fn base_bytes<B: Backend>(backend: &B, base: &Base) -> Bytes {
    let of = |matrix| backend.matrix_bytes(matrix);
    let mut bytes = of(&base.embedding) + base.lm_head.as_ref().map_or(0, of);
    for layer in &base.layers {
        for linear in [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down] {
            bytes += of(&linear.weight) + linear.bias.as_ref().map_or(0, |b| 4 * b.len() as u64);
        }
    }
    Bytes(bytes)
}

/// The memory plan, with recompute as the spec says (`auto`: only where keeping activations would take more than
/// three quarters of what is available).
pub fn memory_plan<B: Backend>(spec: &Spec, backend: &B, prepared: &Prepared) -> MemoryPlan {
    let batch = largest_micro_batch(spec, &prepared.data);
    let config = &prepared.base.config;
    let scratch = Bytes(backend.scratch_bytes(memory::step_shape(&prepared.base, &prepared.layout, batch)));
    let base = base_bytes(backend, &prepared.base);
    let program = resident_program();
    let plan = |recompute| {
        let (element, parameter) = (backend.activation_size(), backend.parameter_size());
        memory::plan(config, &prepared.layout, batch, recompute, element, parameter, base, scratch, program)
    };
    match spec.train.gradient_checkpointing {
        GradientCheckpointing::None => plan(false),
        GradientCheckpointing::Full => plan(true),
        GradientCheckpointing::Auto => {
            let keep = plan(false);
            match available_memory(backend) {
                Some(Bytes(available)) if keep.total().0 > available / 4 * 3 => plan(true),
                _ => keep,
            }
        }
    }
}

/// Memory that can be taken: the device's where it has its own, else what the kernel thinks can be taken without swapping.
pub fn available_memory<B: Backend>(backend: &B) -> Option<Bytes> {
    backend.memory().map(|memory| Bytes(memory.available)).or_else(|| memory_line("MemAvailable:"))
}

/// Memory of the device, where it has its own, or of the machine.
pub fn total_memory<B: Backend>(backend: &B) -> Option<Bytes> {
    backend.memory().map(|memory| Bytes(memory.total)).or_else(|| memory_line("MemTotal:"))
}

fn memory_line(name: &str) -> Option<Bytes> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| Bytes(kib << 10))
}

/// What the process holds now, without mapped weights and tokens (they are counted as what they are): code, tokenizer,
/// whatever the allocator keeps.
fn resident_program() -> Bytes {
    let Ok(maps) = std::fs::read_to_string("/proc/self/smaps") else { return Bytes(0) };
    let mut counted = true;
    let mut kib = 0;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if !first.ends_with(':') {
            let path = line.split_whitespace().nth(5).unwrap_or("");
            counted = !(path.ends_with(".safetensors") || path.ends_with(".tokens"));
        } else if first == "Rss:" && counted {
            kib += words.next().and_then(|w| w.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Bytes(kib << 10)
}

/// What the process holds now.
pub fn resident_memory() -> Option<Bytes> {
    status_line("VmRSS:")
}

/// The largest resident set this process has had.
pub fn peak_memory() -> Option<Bytes> {
    status_line("VmHWM:")
}

fn status_line(name: &str) -> Option<Bytes> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| Bytes(kib << 10))
}

/// Steps of a run and of each of its epochs.
#[derive(Clone, Debug, PartialEq)]
pub struct StepCount {
    /// Steps in all.
    pub total: u64,
    /// Epochs they take, the last perhaps in part.
    pub epochs: f64,
    /// Tokens of the first epoch.
    pub tokens_per_epoch: u64,
    /// Sequences of the first epoch.
    pub sequences_per_epoch: u64,
}

/// Counts the steps of a run: an epoch's last step may have fewer sequences than the others.
pub fn count_steps(spec: &Spec, rows: &TokenRows) -> StepCount {
    let per_step = sequences_per_step(spec) as u64;
    let plan = |epoch| {
        EpochPlan::new(
            rows,
            spec.data.sequence_length,
            spec.data.packing,
            spec.data.shuffle,
            spec.run.seed,
            epoch,
        )
    };
    let steps_in = |plan: &EpochPlan| (plan.len() as u64).div_ceil(per_step).max(1);
    let first = plan(0);
    let steps_of_first = steps_in(&first);
    // Without packing all epochs are alike; with it they differ by a sequence or two.
    let steps_of =
        |epoch| if spec.data.packing && epoch > 0 { steps_in(&plan(epoch)) } else { steps_of_first };
    let tokens_per_epoch =
        (0..rows.len()).map(|i| rows.row_len(i).min(spec.data.sequence_length) as u64).sum::<u64>();
    let (mut total, mut epochs) = (0, 0.0);
    match spec.train.max_steps {
        Some(max) => {
            let mut epoch = 0;
            let mut left = max;
            while left > 0 {
                let steps = steps_of(epoch);
                let taken = left.min(steps);
                epochs += taken as f64 / steps as f64;
                left -= taken;
                epoch += 1;
                if epoch == 64 {
                    // Only the number shown to people hangs on it: not worth planning thousands of epochs.
                    epochs += left as f64 / steps_of_first as f64;
                    left = 0;
                }
            }
            total = max;
        }
        None => {
            let whole = spec.train.num_epochs.floor() as u64;
            for epoch in 0..whole {
                total += steps_of(epoch);
            }
            let rest = spec.train.num_epochs - whole as f64;
            if rest > 0.0 {
                total += (rest * steps_of(whole) as f64).ceil() as u64;
            }
            epochs = spec.train.num_epochs;
        }
    }
    StepCount { total, epochs, tokens_per_epoch, sequences_per_epoch: first.len() as u64 }
}

/// Sequences of a whole step.
pub fn sequences_per_step(spec: &Spec) -> usize {
    spec.train.micro_batch_size * spec.train.gradient_accumulation_steps
}
