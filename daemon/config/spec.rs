//! The run spec: one TOML file that describes one run. `docs/spec.md` documents every key.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A resolved spec: every default filled in, every path absolute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// `[run]`
    pub run: RunSpec,
    /// `[model]`
    pub model: ModelSpec,
    /// `[data]`
    pub data: DataSpec,
    /// `[lora]`
    pub lora: LoraSpec,
    /// `[train]`
    pub train: TrainSpec,
}

/// `[run]`: what the run is called, and the seed of everything random in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunSpec {
    /// Name shown to people.
    pub name: String,
    /// Seed of the shuffle, of LoRA's A and of dropout.
    pub seed: u64,
}

/// `[model]`: the frozen base.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// Hugging Face model directory.
    pub base: PathBuf,
    /// How the base's linear weights are held.
    pub quantization: Quantization,
    /// Quantise the absmax values too (nested blocks of 256).
    pub double_quant: bool,
    /// Type of activations.
    pub compute_dtype: ComputeDtype,
}

/// How the base's linear weights are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// 4-bit NormalFloat, blocks of 64 (QLoRA, arXiv 2305.14314).
    Nf4,
    /// As stored.
    None,
}

/// Type of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// float32 on the CPU, bfloat16 on CUDA.
    Auto,
    /// IEEE single precision.
    Float32,
    /// bfloat16 with float32 accumulation.
    Bfloat16,
}

/// `[data]`: rows, and how they become sequences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataSpec {
    /// Training files, in order.
    pub train: Vec<PathBuf>,
    /// Held-out file, if given.
    pub eval: Option<PathBuf>,
    /// Share of the training rows held out when `eval` is not given; 0 disables evaluation.
    pub eval_fraction: f64,
    /// Row format.
    pub format: DataFormat,
    /// Longest sequence, in tokens.
    pub sequence_length: usize,
    /// Fill sequences with several examples (no attention across them).
    pub packing: bool,
    /// Shuffle the rows every epoch.
    pub shuffle: bool,
    /// Which tokens are learnt.
    pub train_on: TrainOn,
    /// What to do with a malformed row.
    pub on_bad_row: OnBadRow,
}

/// Row format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DataFormat {
    /// Decide by the first rows.
    Auto,
    /// `messages` (and `tools`).
    Messages,
    /// `prompt` and `completion`.
    PromptCompletion,
    /// `text`.
    Text,
    /// `instruction`, `input`, `output`.
    Alpaca,
    /// `conversations`.
    Sharegpt,
}

/// Which tokens are learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// Every assistant turn, with its end-of-turn token.
    Assistant,
    /// The last assistant turn, or the completion.
    Completion,
    /// Every token.
    All,
}

/// What to do with a malformed row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRow {
    /// Refuse the file.
    Refuse,
    /// Write the row to `quarantine.jsonl` beside the results, count it, go on.
    Quarantine,
}

/// `[lora]`: the adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraSpec {
    /// Rank.
    pub r: usize,
    /// Scale numerator: the update is multiplied by alpha/r.
    pub alpha: f64,
    /// Dropout on the input of A.
    pub dropout: f64,
    /// Module names, already expanded (`all-linear` becomes all seven), in [`Self::ALL_LINEAR`] order.
    pub target_modules: Vec<String>,
    /// Scale by alpha/√r.
    pub use_rslora: bool,
    /// First (inclusive) and last (exclusive) adapted layer; `None` is all.
    pub layers: Option<(usize, usize)>,
    /// Existing PEFT adapter to start from.
    pub init_from: Option<PathBuf>,
}

impl LoraSpec {
    /// The seven linear layers of a Llama-like block, in the order of the forward pass.
    pub const ALL_LINEAR: [&'static str; 7] =
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

    /// The multiplier of B·A: alpha/r, or alpha/√r with `use_rslora`.
    pub fn scale(&self) -> f64 {
        if self.use_rslora { self.alpha / (self.r as f64).sqrt() } else { self.alpha / self.r as f64 }
    }
}

/// `[train]`: the loop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainSpec {
    /// Objective; only `sft` so far.
    pub method: Method,
    /// Passes over the data, when `max_steps` is not given.
    pub num_epochs: f64,
    /// Optimizer steps; overrides `num_epochs`.
    pub max_steps: Option<u64>,
    /// Sequences per micro-step.
    pub micro_batch_size: usize,
    /// Micro-steps per step.
    pub gradient_accumulation_steps: usize,
    /// Optimizer; only `adamw` so far.
    pub optimizer: Optimizer,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Shape of the learning rate after warm-up.
    pub lr_scheduler: LrScheduler,
    /// Warm-up steps; overrides `warmup_ratio`.
    pub warmup_steps: Option<u64>,
    /// Warm-up as a share of all steps.
    pub warmup_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Adam β₁.
    pub adam_beta1: f64,
    /// Adam β₂.
    pub adam_beta2: f64,
    /// Adam ε.
    pub adam_epsilon: f64,
    /// Global-norm clipping threshold; 0 disables.
    pub max_grad_norm: f64,
    /// Recompute activations in the backward pass.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Steps between evaluations; 0 means only before the first and after the last step.
    pub evaluate_every: u64,
    /// Steps between checkpoints; 0 means only when stopped and at the end.
    pub checkpoint_every: u64,
    /// Checkpoints kept (the best one is kept besides).
    pub keep_checkpoints: usize,
    /// Evaluations without improvement before the run ends; 0 disables.
    pub early_stopping_patience: u64,
    /// Where to compute.
    pub backend: BackendChoice,
}

/// Training objective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Supervised fine-tuning.
    Sft,
}

/// Optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// AdamW as `torch.optim.AdamW` defines it.
    Adamw,
}

/// Shape of the learning rate after warm-up, as transformers defines it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrScheduler {
    /// Stays at the peak.
    Constant,
    /// Falls linearly to 0.
    Linear,
    /// Half a cosine to 0.
    Cosine,
}

/// Recompute activations in the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GradientCheckpointing {
    /// `none` where the plan fits in the memory that is available, else `full`.
    Auto,
    /// Keep every activation.
    None,
    /// Keep each layer's input only.
    Full,
}

/// Where to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendChoice {
    /// CUDA where it is usable, else the CPU.
    Auto,
    /// This machine's CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}
