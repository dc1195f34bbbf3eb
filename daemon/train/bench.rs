//! How fast a whole step is: micro-steps and an update of a model of known shape, with random weights and random tokens.
//!
//! Nothing is read but the shape, so what is measured is arithmetic and memory traffic. Weights are NF4 with double
//! quantisation, as a run has them by default; every token is labelled, and examples are of one length.

use super::prepare;
use super::schedule::Schedule;
use super::trainer::Trainer;
use super::workload;
use crate::backend::{Absmax, Backend, Blob, DenseMatrix, Dtype, FrozenMatrix, Nf4Matrix};
use crate::clock::Clock;
use crate::config::spec::{Quantization, Spec};
use crate::data::Sequence;
use crate::model::adapter::{AdapterLayout, Module};
use crate::model::config::{ConfigError, ModelConfig};
use crate::model::decoder::Decoder;
use crate::model::memory::{self, MicroBatch};
use crate::model::traffic::{NF4, Traffic};
use crate::model::weights::{Base, BaseLayer, BaseLinear, CacheUse};
use crate::model::work::{Parts, Work, block};
use crate::units::Bytes;
use finetuned_cuda::bench::{Model, Statistics};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Elements of a block of scales, and scales of a nested block.
const BLOCK: usize = 64;
const NESTED_BLOCK: usize = 256;
/// Micro-steps that do not count: memory is taken, caches fill, clocks rise.
const WARM_UP: usize = 1;
/// Micro-steps that are measured whatever they take.
const LEAST: usize = 3;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Shape.
    pub model: Model,
    /// Tokens of a micro-batch.
    pub tokens: usize,
    /// Longest example.
    pub longest: usize,
    /// Rank of the adapter, on all linear layers.
    pub rank: usize,
    /// Whether activations are computed again.
    pub recompute: bool,
    /// Micro-steps.
    pub samples: usize,
    /// How long, unless `LEAST` micro-steps take longer.
    pub limit: Duration,
}

/// What a step took.
#[derive(Clone, Debug)]
pub struct Step {
    /// What the backend says that it computes on.
    pub device: String,
    /// What the bits depend on.
    pub backend: String,
    /// Seconds of a micro-step.
    pub micro_step: Statistics,
    /// Seconds of an update, with the norm of the gradient.
    pub update: Statistics,
    /// Work of a micro-step, GFLOP.
    pub work: Parts,
    /// What it moves at least, GB.
    pub gigabytes: f64,
    /// Energy of the micro-steps that were measured, where there is a meter, and their tokens.
    pub joules: Option<f64>,
    /// Tokens of all measured micro-steps.
    pub tokens: u64,
    /// Memory that it took: of the device, where it has its own, else of the process.
    pub memory: Option<Bytes>,
}

impl Step {
    /// Tokens a second of training, without the update.
    pub fn tokens_per_second(&self, tokens: usize) -> f64 {
        tokens as f64 / self.micro_step.median
    }

    /// Joules of a thousand tokens.
    pub fn joules_per_thousand(&self) -> Option<f64> {
        self.joules.filter(|_| self.tokens > 0).map(|joules| 1e3 * joules / self.tokens as f64)
    }
}

/// Why a step was not measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// It would not fit.
    #[error("it would take {needed}, and {available} are available")]
    TooLarge {
        /// What the plan says.
        needed: Bytes,
        /// What there is.
        available: Bytes,
    },
    /// Nothing to compute.
    #[error("a micro-batch of no tokens")]
    Empty,
    /// The shape is none.
    #[error(transparent)]
    Shape(#[from] ConfigError),
    /// The update has no constants.
    #[error("the defaults of a spec cannot be read: {0}")]
    Spec(String),
    /// The gradient is not finite: what was measured is no training.
    #[error("the gradient of random weights is not finite")]
    NotFinite,
}

/// Measures. `joules` is the reading of a meter of energy, where there is one.
///
/// # Errors
/// See [`BenchError`].
pub fn step<B: Backend>(
    backend: B,
    options: &Options,
    clock: &dyn Clock,
    joules: &mut dyn FnMut() -> Option<f64>,
) -> Result<Step, BenchError> {
    if options.tokens == 0 {
        return Err(BenchError::Empty);
    }
    let config = config(&options.model)?;
    let layout = AdapterLayout::new(&config, options.rank, 1.0, 0.0, &Module::ALL, None);
    let spec = Spec::parse("[model]\nbase = \"b\"\n[data]\ntrain = \"t\"\n", "bench", Path::new("/"), &[])
        .map_err(|error| BenchError::Spec(error.to_string()))?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let batches: Vec<Vec<(Sequence, u64)>> =
        (0..2).map(|_| sequences(options, config.vocab_size, &mut random)).collect();
    let load = workload::of_sequences(batches.iter().take(1).flatten().map(|(sequence, _)| sequence));
    let largest = MicroBatch {
        tokens: options.tokens,
        labelled: load.labelled as usize,
        longest: options.longest.min(options.tokens),
    };
    let before = backend.memory().map(|memory| memory.available);
    let base = base(config.clone(), &mut random);
    let shape = memory::step_shape(&base, &layout, largest);
    let plan = memory::plan(
        &config,
        &layout,
        largest,
        options.recompute,
        backend.activation_size(),
        backend.parameter_size(),
        prepare::base_bytes(&backend, &base),
        Bytes(backend.scratch_bytes(shape)),
        Bytes(0),
    );
    if let Some(available) = prepare::available_memory(&backend).filter(|available| plan.total() > *available)
    {
        return Err(BenchError::TooLarge { needed: plan.total(), available });
    }
    let (device, identity) = (backend.device(), backend.identity());
    backend.reserve(shape);
    let decoder = Decoder::new(backend, base);
    let mut trainer = Trainer::new(decoder, layout.clone(), 1, options.tokens, options.recompute);

    let (mut micro_steps, mut updates, mut tokens) = (Vec::new(), Vec::new(), 0);
    let (mut began, mut metered) = (clock.monotonic(), None);
    for i in 0..WARM_UP + options.samples.max(LEAST) {
        if i == WARM_UP {
            (began, metered) = (clock.monotonic(), joules());
        }
        if i >= WARM_UP + LEAST && clock.monotonic().saturating_sub(began) >= options.limit {
            break;
        }
        let started = clock.monotonic();
        let found = trainer.micro_step(&batches[i % batches.len()], 0.0);
        let seconds = (clock.monotonic().saturating_sub(started)).as_secs_f64();
        if i >= WARM_UP {
            micro_steps.push(seconds);
            tokens += found.tokens;
        }
    }
    let joules = joules().zip(metered).map(|(after, before)| after - before);
    let schedule = Schedule::new(&spec.train, 10);
    for i in 0..LEAST as u64 {
        // An update clears what it used up.
        let labelled = trainer.micro_step(&batches[0], 0.0).labelled.max(1);
        let started = clock.monotonic();
        let norm = trainer.gradient_norm(labelled);
        if !norm.is_finite() {
            return Err(BenchError::NotFinite);
        }
        trainer.update(&spec.train, &schedule, i, labelled, norm);
        trainer.decoder.backend.synchronize();
        updates.push((clock.monotonic().saturating_sub(started)).as_secs_f64());
    }
    let after = trainer.decoder.backend.memory().map(|memory| memory.available);
    let statistics = |samples: &[f64]| Statistics::of(samples).ok_or(BenchError::Empty);
    Ok(Step {
        device,
        backend: identity,
        micro_step: statistics(&micro_steps)?,
        update: statistics(&updates)?,
        work: Work::new(&config, &layout, options.recompute).parts(load),
        gigabytes: Traffic::new(&config, &layout, options.recompute, NF4).train(load),
        joules,
        tokens,
        memory: before
            .zip(after)
            .map(|(before, after)| Bytes(before.saturating_sub(after)))
            .or_else(resident),
    })
}

/// Bytes that the weights of a model take in NF4, with its embedding and head in bf16.
pub fn base_estimate(model: &Model) -> Result<Bytes, ConfigError> {
    let config = config(model)?;
    let heads = if config.tie_word_embeddings { 1 } else { 2 };
    let linear = (config.layers * block(&config)) as f64 * NF4;
    Ok(Bytes(linear as u64 + (2 * heads * config.vocab_size * config.hidden_size) as u64))
}

/// Resident memory of this process.
fn resident() -> Option<Bytes> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| Bytes(kib << 10))
}

/// A model as its `config.json` would have it.
fn config(model: &Model) -> Result<ModelConfig, ConfigError> {
    let text = serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocabulary,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": model.tied,
        "hidden_act": "silu",
    });
    ModelConfig::parse(&text.to_string(), Path::new("config.json"))
}

/// xorshift64 (Marsaglia, Journal of Statistical Software 8(14), 2003).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(len);
        bytes
    }
}

/// Examples of the longest length, the last one shorter, each a sequence.
fn sequences(options: &Options, vocabulary: usize, random: &mut Random) -> Vec<(Sequence, u64)> {
    (0..options.tokens)
        .step_by(options.longest.max(1))
        .map(|first| {
            let length = (options.tokens - first).min(options.longest.max(1));
            let tokens: Vec<u32> =
                (0..length).map(|_| (random.next() % vocabulary.max(1) as u64) as u32).collect();
            (Sequence::single(&tokens, &vec![true; length]), random.next())
        })
        .collect()
}

fn base(config: ModelConfig, random: &mut Random) -> Base {
    let linear = |module: Module, random: &mut Random| {
        let (rows, cols) = module.shape(&config);
        BaseLinear { weight: quantised(rows, cols, random), bias: None }
    };
    let (h, v) = (config.hidden_size, config.vocab_size);
    let layers = (0..config.layers)
        .map(|_| BaseLayer {
            q: linear(Module::Q, random),
            k: linear(Module::K, random),
            v: linear(Module::V, random),
            o: linear(Module::O, random),
            gate: linear(Module::Gate, random),
            up: linear(Module::Up, random),
            down: linear(Module::Down, random),
            input_norm: vec![1.0; h],
            post_attention_norm: vec![1.0; h],
            q_norm: None,
            k_norm: None,
        })
        .collect();
    Base {
        embedding: dense(v, h, random),
        layers,
        final_norm: vec![1.0; h],
        lm_head: (!config.tie_word_embeddings).then(|| dense(v, h, random)),
        hash: String::new(),
        quantization: Quantization::Nf4,
        double_quant: true,
        cache: CacheUse::NotNeeded,
        config,
    }
}

/// Random codes and scales: weights with a mean square of about 1/cols, so that activations keep their size.
fn quantised(rows: usize, cols: usize, random: &mut Random) -> FrozenMatrix {
    let count = rows * cols;
    let blocks = count.div_ceil(BLOCK);
    // The sixteen values of NF4, each as often, have a root mean square of 0.56; the codes of the scales a mean of a half.
    let scale = 2.0 / (0.56 * (cols as f32).sqrt());
    FrozenMatrix::Nf4(Nf4Matrix {
        rows,
        cols,
        block: BLOCK,
        codes: Blob::Owned(random.bytes(count.div_ceil(2)).into()),
        absmax: Absmax::Nested {
            codes: Blob::Owned(random.bytes(blocks).into()),
            map: Arc::new(std::array::from_fn(|i| (i + 1) as f32 / 256.0)),
            nested: vec![scale; blocks.div_ceil(NESTED_BLOCK)].into(),
            nested_block: NESTED_BLOCK,
            offset: 0.0,
        },
    })
}

/// bf16 of either sign, between 1/128 and 1/32 in magnitude.
fn dense(rows: usize, cols: usize, random: &mut Random) -> FrozenMatrix {
    let mut data = random.bytes(2 * rows * cols);
    for half in data.as_chunks_mut::<2>().0 {
        let bits = (u16::from_le_bytes(*half) & 0x80ff) | 0x3c00;
        *half = bits.to_le_bytes();
    }
    FrozenMatrix::Dense(DenseMatrix { rows, cols, dtype: Dtype::Bf16, data: Blob::Owned(data.into()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::backend::cuda::Cuda;
    use crate::clock::SystemClock;
    use crate::model::work::Load;
    use finetuned_cuda::simt::Simt;

    const TINY: Model = Model {
        name: "tiny",
        hidden: 64,
        intermediate: 128,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        vocabulary: 96,
        tied: true,
    };

    fn options(tokens: usize, recompute: bool) -> Options {
        let limit = Duration::ZERO;
        Options { model: TINY, tokens, longest: 8, rank: 8, recompute, samples: 3, limit }
    }

    #[test]
    fn a_step_on_the_cpu_is_measured_with_what_it_takes() {
        let mut readings = [100.0, 106.0].into_iter();
        let mut meter = || readings.next();
        let options = options(20, true);
        let found = step(Cpu::<f32>::new(), &options, &SystemClock::new(), &mut meter).unwrap();
        assert_eq!((found.micro_step.count, found.update.count), (3, 3));
        assert!(found.micro_step.median > 0.0 && found.tokens_per_second(20) > 0.0);
        assert_eq!(found.tokens, 60);
        // 6 J for 60 tokens.
        assert_eq!(found.joules_per_thousand(), Some(100.0));
        assert!(found.memory.is_some_and(|bytes| bytes.0 > 1 << 20));
        // Examples of 8, 8 and 4 tokens, of which the last has no label.
        let load = Load { tokens: 20, squares: 144, labelled: 17 };
        let config = config(&TINY).unwrap();
        let layout = AdapterLayout::new(&config, 8, 1.0, 0.0, &Module::ALL, None);
        assert_eq!(found.work, Work::new(&config, &layout, true).parts(load));
        assert!(found.backend.starts_with("cpu"), "{}", found.backend);
    }

    /// The whole step of the CUDA backend, on the stand-in.
    #[test]
    fn a_step_on_the_stand_in_runs() {
        let Ok(simt) = Simt::new() else {
            eprintln!("SKIPPED: there is no C++ compiler");
            return;
        };
        let backend = Cuda::new(simt.device(), "stand-in");
        let found = step(backend, &options(8, false), &SystemClock::new(), &mut || None).unwrap();
        assert!(found.device.contains("stand-in"), "{}", found.device);
        assert_eq!((found.joules, found.tokens), (None, 24));
        assert!(found.micro_step.median > 0.0);
    }

    #[test]
    fn nothing_is_refused_and_a_base_is_estimated() {
        let none = options(0, false);
        let found = step(Cpu::<f32>::new(), &none, &SystemClock::new(), &mut || None);
        assert!(matches!(found, Err(BenchError::Empty)));
        let llama = Model::named("Llama-3.2-1B").unwrap();
        // 973.1 M · 0.516 + 525.3 MB.
        assert_eq!(base_estimate(&llama).unwrap().0 / 1_000_000, 1027);
    }
}
