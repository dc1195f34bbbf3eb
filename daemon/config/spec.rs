//! The run spec: one TOML file that describes one run. `docs/spec.md` documents every key.

use super::document::Mistake;
use super::{render, resolve};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};

/// Largest spec file; a longer one is no spec (a data file by mistake).
const MAX_BYTES: u64 = 1 << 20;

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

/// Why there is no spec.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file could not be read.
    #[error("cannot read the spec {path}: {source}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is far too long, or is not text.
    #[error("{path} is not a run spec: {problem}", path = .path.display())]
    NotASpec {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
    /// Everything that is wrong with the file and the overrides.
    #[error("{}", Lines(.0))]
    Invalid(Vec<Mistake>),
}

struct Lines<'a>(&'a [Mistake]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, mistake) in self.0.iter().enumerate() {
            write!(f, "{}{mistake}", if at == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl Spec {
    /// Reads a spec file. `overrides` are `section.key=value`, as `--set` takes them; relative paths, in the file and in
    /// the overrides, start at the spec's directory.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Spec, SpecError> {
        let read = |source| SpecError::Read { path: path.to_path_buf(), source };
        let not_a_spec = |problem| SpecError::NotASpec { path: path.to_path_buf(), problem };
        if std::fs::metadata(path).map_err(read)?.len() > MAX_BYTES {
            return Err(not_a_spec("it is larger than 1 MiB"));
        }
        let bytes = std::fs::read(path).map_err(read)?;
        let text = String::from_utf8(bytes).map_err(|_| not_a_spec("it is not UTF-8 text"))?;
        let absolute = std::path::absolute(path).map_err(read)?;
        let base_dir = absolute.parent().unwrap_or(Path::new("/"));
        Spec::parse(&text, &path.to_string_lossy(), base_dir, overrides)
    }

    /// Resolves the text of a spec. `file_name` names it in messages and, without its extension, names the run where
    /// `run.name` is absent; `base_dir`, absolute, is where relative paths start.
    pub fn parse(
        text: &str,
        file_name: &str,
        base_dir: &Path,
        overrides: &[String],
    ) -> Result<Spec, SpecError> {
        resolve::resolve(text, file_name, base_dir, overrides).map_err(SpecError::Invalid)
    }

    /// The spec as TOML, every key with the value in force; parses back to the same spec.
    pub fn to_toml(&self) -> String {
        render::to_toml(self)
    }

    /// SHA-256, in hexadecimal, over the keys that determine the bits of the result, and only those: a run may be
    /// resumed under a spec with the same hash. Contents behind paths are not in it; they have hashes of their own.
    pub fn result_hash(&self) -> String {
        render::result_hash(self)
    }

    /// The keys that determine the result and differ between this spec and a later one, each with both values.
    pub fn differences(&self, now: &Spec) -> Vec<String> {
        render::differences(self, now)
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LEAST: &str = "[model]\nbase = \"base\"\n[data]\ntrain = \"rows.jsonl\"\n";

    fn parse(text: &str, overrides: &[&str]) -> Result<Spec, SpecError> {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        Spec::parse(text, "night.toml", Path::new("/specs"), &overrides)
    }

    fn set(overrides: &[&str]) -> Spec {
        parse(LEAST, overrides).unwrap_or_else(|error| panic!("{overrides:?}: {error}"))
    }

    fn mistakes(text: &str, overrides: &[&str]) -> Vec<String> {
        match parse(text, overrides) {
            Err(SpecError::Invalid(mistakes)) => mistakes.iter().map(Mistake::to_string).collect(),
            other => panic!("expected mistakes, got {other:?}"),
        }
    }

    /// The defaults that the documentation promises, spelt out.
    #[test]
    fn defaults() {
        let spec = parse(LEAST, &[]).unwrap();
        let expected = Spec {
            run: RunSpec { name: "night".into(), seed: 42 },
            model: ModelSpec {
                base: "/specs/base".into(),
                quantization: Quantization::Nf4,
                double_quant: true,
                compute_dtype: ComputeDtype::Auto,
            },
            data: DataSpec {
                train: vec!["/specs/rows.jsonl".into()],
                eval: None,
                eval_fraction: 0.05,
                format: DataFormat::Auto,
                sequence_length: 1024,
                packing: true,
                shuffle: true,
                train_on: TrainOn::Assistant,
                on_bad_row: OnBadRow::Refuse,
            },
            lora: LoraSpec {
                r: 16,
                alpha: 32.0,
                dropout: 0.0,
                target_modules: LoraSpec::ALL_LINEAR.map(String::from).to_vec(),
                use_rslora: false,
                layers: None,
                init_from: None,
            },
            train: TrainSpec {
                method: Method::Sft,
                num_epochs: 1.0,
                max_steps: None,
                micro_batch_size: 1,
                gradient_accumulation_steps: 8,
                optimizer: Optimizer::Adamw,
                learning_rate: 2e-4,
                lr_scheduler: LrScheduler::Constant,
                warmup_steps: None,
                warmup_ratio: 0.03,
                weight_decay: 0.0,
                adam_beta1: 0.9,
                adam_beta2: 0.999,
                adam_epsilon: 1e-8,
                max_grad_norm: 1.0,
                gradient_checkpointing: GradientCheckpointing::Auto,
                evaluate_every: 100,
                checkpoint_every: 100,
                keep_checkpoints: 2,
                early_stopping_patience: 0,
                backend: BackendChoice::Auto,
            },
        };
        assert_eq!(spec, expected);
    }

    #[test]
    fn values_of_every_type_are_read() {
        let text = r#"
            run = { name = "a night", seed = 0x10 }
            model.base = "/models/llama"
            model.quantization = "none"
            [data]
            train = ["a.jsonl", "./sub/b.csv"]
            eval = "../held-out.jsonl"
            format = "prompt-completion"
            [lora]
            alpha = 8
            target_modules = ["v_proj", "q_proj"]
            layers = "8..24"
            init_from = "previous"
            [train]
            max_steps = 1_000
            warmup_steps = 0
            learning_rate = 1e-5
            max_grad_norm = 0
        "#;
        let spec = parse(text, &[]).unwrap();
        assert_eq!(spec.run, RunSpec { name: "a night".into(), seed: 16 });
        assert_eq!(spec.model.base, Path::new("/models/llama"));
        assert_eq!(spec.data.train, [Path::new("/specs/a.jsonl"), Path::new("/specs/sub/b.csv")]);
        assert_eq!(spec.data.eval.as_deref(), Some(Path::new("/specs/../held-out.jsonl")));
        assert_eq!(spec.data.eval_fraction, 0.0);
        assert_eq!(spec.lora.target_modules, ["q_proj", "v_proj"], "in the order of the forward pass");
        assert_eq!(spec.lora.layers, Some((8, 24)));
        assert_eq!((spec.train.max_steps, spec.train.num_epochs), (Some(1000), 1.0));
        assert_eq!((spec.train.warmup_steps, spec.train.warmup_ratio), (Some(0), 0.0));
        assert_eq!((spec.lora.alpha, spec.train.max_grad_norm), (8.0, 0.0));
    }

    #[test]
    fn every_mistake_is_named_with_its_place_and_what_is_allowed() {
        let text = "\
learning_rate = 1e-4
[run]
seed = -1
[model]
base = \"~/models/llama\"
quantization = \"nf5\"
[dataset]
train = \"a.jsonl\"
[lora]
r = 512
dropout = 1.0
target_modules = [\"q_porj\"]
layers = \"24..8\"
learning_rate = 1e-4
[train]
learning_rte = 1e-4
micro_batch_size = 1.5
adam_beta2 = \"big\"
num_epochs = 3
max_steps = 10
warmup_steps = 1
warmup_ratio = 0.1
weight_decay = nan
frobnicate = true
";
        assert_eq!(
            mistakes(text, &["train.backend=gpu", "lora.r", "train.seed=1"]),
            [
                "night.toml: data.train: required: the training file, or a list of files",
                "night.toml:1:1: learning_rate: unknown key; it belongs in [train]",
                "night.toml:3:1: run.seed = -1: allowed: a whole number from 0 to 9223372036854775807",
                "night.toml:5:1: model.base = \"~/models/llama\": `~` is not expanded here; write the whole path",
                "night.toml:6:1: model.quantization = \"nf5\": allowed: \"nf4\", \"none\"; did you mean \"nf4\"?",
                "night.toml:7:2: [dataset]: unknown section; did you mean [data]?",
                "night.toml:10:1: lora.r = 512: allowed: a whole number from 1 to 256",
                "night.toml:11:1: lora.dropout = 1.0: allowed: a number from 0 to below 1",
                "night.toml:12:1: lora.target_modules = [\"q_porj\"]: \"q_porj\" is not a module; allowed: \
                 \"all-linear\", or a list of \"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\", \"gate_proj\", \
                 \"up_proj\", \"down_proj\"; did you mean \"q_proj\"?",
                "night.toml:13:1: lora.layers = \"24..8\": allowed: \"all\", or \"FIRST..END\" without END, such as \
                 \"8..24\" for layers 8 to 23",
                "night.toml:14:1: lora.learning_rate: unknown key; it belongs in [train]",
                "night.toml:16:1: train.learning_rte: unknown key; did you mean `learning_rate`?",
                "night.toml:17:1: train.micro_batch_size = 1.5: allowed: a whole number from 1 to 4096",
                "night.toml:18:1: train.adam_beta2 = \"big\": allowed: a number from 0 to below 1; this is a string",
                "night.toml:20:1: train.max_steps: excludes train.num_epochs (night.toml:19:1); give one of the two",
                "night.toml:22:1: train.warmup_ratio: excludes train.warmup_steps (night.toml:21:1); give one of \
                 the two",
                "night.toml:23:1: train.weight_decay = nan: allowed: a finite number, 0 or more",
                "night.toml:24:1: train.frobnicate: unknown key; docs/spec.md lists every key",
                "--set lora.r: expected section.key=value, such as train.max_steps=10",
                "--set train.backend=gpu: train.backend = gpu: allowed: \"auto\", \"cpu\", \"cuda\"",
                "--set train.seed=1: train.seed: unknown key; it belongs in [run]",
            ]
        );
    }

    #[test]
    fn syntax_errors_are_all_named_and_nothing_else_is() {
        let found = mistakes("[run]\nname = \n[model]\nbase = \"x\n[nonsense]\n", &[]);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("night.toml:2:"), "{found:?}");
        assert!(found[1].starts_with("night.toml:4:"), "{found:?}");
        assert!(found.iter().all(|line| line.contains("not valid TOML")), "{found:?}");
        let twice = mistakes("[run]\nseed = 1\nseed = 2\n", &[]);
        assert!(twice[0].starts_with("night.toml:3:1: not valid TOML: duplicate key"), "{twice:?}");
    }

    #[test]
    fn columns_count_characters() {
        let found = mistakes(&format!("{LEAST}run = {{ name = \"é\", sed = 1 }}\n"), &[]);
        assert!(found[0].starts_with("night.toml:5:1: data.run:"), "{found:?}");
        let found = mistakes(&format!("run = {{ name = \"é\", sed = 1 }}\n{LEAST}"), &[]);
        assert_eq!(found, ["night.toml:1:21: run.sed: unknown key; did you mean `seed`?"]);
        let found = mistakes(&format!("{LEAST}[train]\n  max_step = 3\n"), &[]);
        assert_eq!(found, ["night.toml:6:3: train.max_step: unknown key; did you mean `max_steps`?"]);
    }

    #[test]
    fn a_section_that_is_not_one_is_named() {
        let found = mistakes("train = 3\n[[model]]\nbase = \"x\"\n", &[]);
        assert!(found.iter().any(|m| m.contains(":1:1: train: is a section: write [train]")), "{found:?}");
        assert!(found.iter().any(|m| m.contains(": model: is a section")), "{found:?}");
    }

    #[test]
    fn overrides_are_toml_values_or_bare_words() {
        let spec = set(&[
            "train.max_steps=10",
            "train.lr_scheduler=cosine",
            "run.name=2026-11-24",
            "data.train=[\"a.jsonl\", \"b.jsonl\"]",
            "data.shuffle = false",
            "model.base=/elsewhere/model",
            "train.learning_rate=1e-3",
        ]);
        assert_eq!(spec.train.max_steps, Some(10));
        assert_eq!(spec.train.lr_scheduler, LrScheduler::Cosine);
        assert_eq!(spec.run.name, "2026-11-24");
        assert_eq!(spec.data.train.len(), 2);
        assert!(!spec.data.shuffle);
        assert_eq!(spec.model.base, Path::new("/elsewhere/model"));
        assert_eq!(spec.train.learning_rate, 1e-3);
    }

    #[test]
    fn an_override_replaces_the_other_alternative_of_the_file() {
        let text = format!("{LEAST}eval = \"held.jsonl\"\n[train]\nnum_epochs = 3\nwarmup_steps = 7\n");
        let overrides = ["train.max_steps=10", "train.warmup_ratio=0.5", "data.eval_fraction=0.1"];
        let spec = parse(&text, &overrides).unwrap();
        assert_eq!((spec.train.max_steps, spec.train.warmup_ratio), (Some(10), 0.5));
        assert_eq!((spec.data.eval, spec.data.eval_fraction), (None, 0.1));
        let found = mistakes(&text, &["train.max_steps=10", "train.num_epochs=2"]);
        assert!(found[0].contains("give one of the two"), "{found:?}");
    }

    #[test]
    fn early_stopping_needs_something_to_look_at() {
        let stop = "train.early_stopping_patience=3";
        assert_eq!(set(&[stop]).train.early_stopping_patience, 3);
        let found = mistakes(LEAST, &[stop, "data.eval_fraction=0"]);
        assert!(found[0].contains("needs held-out rows"), "{found:?}");
        let found = mistakes(LEAST, &[stop, "train.evaluate_every=0"]);
        assert!(found[0].contains("needs evaluations during the run"), "{found:?}");
        let spec = format!("{LEAST}eval=\"h.jsonl\"\n");
        assert!(parse(&spec, &[stop]).is_ok());
    }

    #[test]
    fn load_names_the_file_and_starts_paths_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tonight.toml");
        match Spec::load(&path, &[]) {
            Err(error @ SpecError::Read { .. }) => {
                assert!(error.to_string().contains("tonight.toml"), "{error}")
            }
            other => panic!("{other:?}"),
        }
        std::fs::write(&path, LEAST).unwrap();
        let spec = Spec::load(&path, &[]).unwrap();
        assert_eq!(spec.run.name, "tonight");
        assert_eq!(spec.model.base, dir.path().join("base"));
        std::fs::write(&path, b"\xff\xfe").unwrap();
        assert!(matches!(Spec::load(&path, &[]), Err(SpecError::NotASpec { .. })));
        std::fs::write(&path, vec![b'#'; (MAX_BYTES + 1) as usize]).unwrap();
        assert!(matches!(Spec::load(&path, &[]), Err(SpecError::NotASpec { .. })));
    }

    #[test]
    fn the_documentation_lists_every_key_and_no_other() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/spec.md")).unwrap();
        let mut documented = Vec::new();
        let mut section = String::new();
        for line in text.lines() {
            if let Some(heading) = line.strip_prefix("## ") {
                section = heading.trim_matches(['`', '[', ']']).to_string();
            } else if let Some((key, _)) = line.strip_prefix("| `").and_then(|row| row.split_once('`')) {
                assert_eq!(line.matches(" | ").count(), 4, "key, type, default, range, effect: {line}");
                documented.push((section.clone(), key.to_string()));
            }
        }
        let mut known: Vec<_> = resolve::known_keys()
            .iter()
            .map(|(section, key)| (section.to_string(), key.to_string()))
            .collect();
        documented.sort();
        known.sort();
        assert_eq!(documented, known);
    }

    fn choice(words: &'static [&'static str]) -> BoxedStrategy<String> {
        proptest::sample::select(words).prop_map(|word| format!("\"{word}\"")).boxed()
    }

    fn float(range: std::ops::Range<f64>) -> BoxedStrategy<String> {
        range.prop_map(|x| format!("{x:?}")).boxed()
    }

    fn path_text() -> BoxedStrategy<String> {
        "[^\u{0}~][^\u{0}]{0,20}".prop_map(|path| toml::Value::String(path).to_string()).boxed()
    }

    /// Every key with a strategy for its text. Alternatives are separated by the caller.
    fn any_key() -> Vec<(&'static str, BoxedStrategy<String>)> {
        let integer = |range: std::ops::RangeInclusive<u64>| range.prop_map(|n| n.to_string()).boxed();
        let boolean = || any::<bool>().prop_map(|b| b.to_string()).boxed();
        vec![
            ("run.name", "[^\\p{C}]{0,30}x".prop_map(|name| toml::Value::String(name).to_string()).boxed()),
            ("run.seed", integer(0..=i64::MAX as u64)),
            ("model.quantization", choice(&["nf4", "none"])),
            ("model.double_quant", boolean()),
            ("model.compute_dtype", choice(&["auto", "float32", "bfloat16"])),
            ("data.eval", path_text()),
            ("data.eval_fraction", float(0.0..1.0)),
            ("data.format", choice(&["auto", "messages", "prompt-completion", "text", "alpaca", "sharegpt"])),
            ("data.sequence_length", integer(2..=1 << 20)),
            ("data.packing", boolean()),
            ("data.shuffle", boolean()),
            ("data.train_on", choice(&["assistant", "completion", "all"])),
            ("data.on_bad_row", choice(&["refuse", "quarantine"])),
            ("lora.r", integer(1..=256)),
            ("lora.alpha", float(1e-300..1e300)),
            ("lora.dropout", float(0.0..1.0)),
            (
                "lora.target_modules",
                proptest::sample::subsequence(LoraSpec::ALL_LINEAR.to_vec(), 1..=7)
                    .prop_map(|names| format!("{names:?}"))
                    .boxed(),
            ),
            ("lora.use_rslora", boolean()),
            ("lora.layers", (0..50u32, 1..50u32).prop_map(|(a, n)| format!("\"{a}..{}\"", a + n)).boxed()),
            ("lora.init_from", path_text()),
            ("train.num_epochs", float(1e-3..100.0)),
            ("train.max_steps", integer(1..=1_000_000_000)),
            ("train.micro_batch_size", integer(1..=4096)),
            ("train.gradient_accumulation_steps", integer(1..=65_536)),
            ("train.learning_rate", float(1e-12..1.0)),
            ("train.lr_scheduler", choice(&["constant", "linear", "cosine"])),
            ("train.warmup_steps", integer(0..=1_000_000_000)),
            ("train.warmup_ratio", float(0.0..1.0)),
            ("train.weight_decay", float(0.0..10.0)),
            ("train.adam_beta1", float(0.0..1.0)),
            ("train.adam_beta2", float(0.0..1.0)),
            ("train.adam_epsilon", float(1e-300..1.0)),
            ("train.max_grad_norm", float(0.0..100.0)),
            ("train.gradient_checkpointing", choice(&["auto", "none", "full"])),
            ("train.evaluate_every", integer(1..=1000)),
            ("train.checkpoint_every", integer(0..=1000)),
            ("train.keep_checkpoints", integer(1..=1000)),
            ("train.backend", choice(&["auto", "cpu", "cuda"])),
        ]
    }

    fn any_spec() -> impl Strategy<Value = Spec> {
        let keys: Vec<_> =
            any_key().into_iter().map(|(key, text)| (Just(key), proptest::option::of(text))).collect();
        let train = proptest::collection::vec(path_text(), 1..3);
        (keys, path_text(), train, any::<[bool; 3]>()).prop_map(|(keys, base, train, first)| {
            let pairs = [
                ("data.eval", "data.eval_fraction"),
                ("train.num_epochs", "train.max_steps"),
                ("train.warmup_steps", "train.warmup_ratio"),
            ];
            let dropped: Vec<_> =
                pairs.iter().zip(first).map(|((a, b), first)| if first { *b } else { *a }).collect();
            let mut text = format!("model.base = {base}\ndata.train = [{}]\n", train.join(", "));
            for (key, value) in keys {
                if let Some(value) = value.filter(|_| !dropped.contains(&key)) {
                    text += &format!("{key} = {value}\n");
                }
            }
            match Spec::parse(&text, "any.toml", Path::new("/specs"), &[]) {
                Ok(spec) => spec,
                // Two equal file names in one list are a mistake; take one.
                Err(error) if error.to_string().contains("twice") => set(&[]),
                Err(error) => panic!("{text}\n{error}"),
            }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        /// The resolved spec parses back to itself, bit for bit, from any directory.
        #[test]
        fn a_resolved_spec_parses_back(spec in any_spec()) {
            let text = spec.to_toml();
            let back = Spec::parse(&text, "other.toml", Path::new("/elsewhere"), &[]).unwrap();
            prop_assert_eq!(&back, &spec, "{}", text);
            prop_assert_eq!(back.result_hash(), spec.result_hash());
            prop_assert_eq!(back.to_toml(), text);
        }

        /// No text makes the reader panic.
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC{0,80}", set in "[a-z.]{0,12}=?\\PC{0,12}") {
            let _ = Spec::parse(&text, "x", Path::new("/"), &[set]);
        }
    }

    /// For every key, two values, and whether the result hangs on it. `every_key_is_classified` keeps it complete.
    const EFFECT: &[(&str, &str, &str, bool)] = &[
        ("run.name", "a", "b", false),
        ("run.seed", "1", "2", true),
        ("model.base", "a", "b", false),
        ("model.quantization", "nf4", "none", true),
        ("model.double_quant", "true", "false", true),
        ("model.compute_dtype", "float32", "bfloat16", true),
        ("data.train", "a", "b", false),
        ("data.eval", "a", "b", false),
        ("data.eval_fraction", "0.1", "0.2", true),
        ("data.format", "text", "alpaca", true),
        ("data.sequence_length", "16", "32", true),
        ("data.packing", "true", "false", true),
        ("data.shuffle", "true", "false", true),
        ("data.train_on", "assistant", "all", true),
        ("data.on_bad_row", "refuse", "quarantine", false),
        ("lora.r", "1", "2", true),
        ("lora.alpha", "1", "2", true),
        ("lora.dropout", "0.1", "0.2", true),
        ("lora.target_modules", "[\"q_proj\"]", "[\"k_proj\"]", true),
        ("lora.use_rslora", "true", "false", true),
        ("lora.layers", "all", "0..4", true),
        ("lora.init_from", "a", "b", false),
        ("train.num_epochs", "1", "2", true),
        ("train.max_steps", "1", "2", true),
        ("train.micro_batch_size", "1", "2", true),
        ("train.gradient_accumulation_steps", "1", "2", true),
        ("train.learning_rate", "1e-4", "2e-4", true),
        ("train.lr_scheduler", "linear", "cosine", true),
        ("train.warmup_steps", "1", "2", true),
        ("train.warmup_ratio", "0.1", "0.2", true),
        ("train.weight_decay", "0.1", "0.2", true),
        ("train.adam_beta1", "0.1", "0.2", true),
        ("train.adam_beta2", "0.1", "0.2", true),
        ("train.adam_epsilon", "0.1", "0.2", true),
        ("train.max_grad_norm", "0.1", "0.2", true),
        ("train.gradient_checkpointing", "none", "full", false),
        ("train.evaluate_every", "1", "2", true),
        ("train.checkpoint_every", "1", "2", false),
        ("train.keep_checkpoints", "1", "2", false),
        ("train.early_stopping_patience", "1", "2", true),
        ("train.backend", "cpu", "cuda", false),
    ];

    /// Keys with a single allowed value so far.
    const SINGLE: &[&str] = &["train.method", "train.optimizer"];

    #[test]
    fn every_key_is_classified() {
        let mut classified: Vec<&str> = EFFECT.iter().map(|(key, ..)| *key).collect();
        classified.extend(SINGLE);
        classified.sort();
        let mut known: Vec<String> =
            resolve::known_keys().iter().map(|(section, key)| format!("{section}.{key}")).collect();
        known.sort();
        assert_eq!(classified, known);
        let mut rendered: Vec<String> =
            render::keys(&set(&[])).iter().map(|(section, key, _)| format!("{section}.{key}")).collect();
        rendered.sort();
        assert_eq!(rendered, known);
    }

    #[test]
    fn the_hash_hangs_on_exactly_the_keys_that_determine_the_result() {
        for (key, before, now, matters) in EFFECT {
            let before = set(&[&format!("{key}={before}")]);
            let now = set(&[&format!("{key}={now}")]);
            assert_ne!(before, now, "{key}");
            assert_eq!(before.result_hash() != now.result_hash(), *matters, "{key}");
            let differences = before.differences(&now);
            assert_eq!(!differences.is_empty(), *matters, "{key}: {differences:?}");
            if *matters {
                assert!(differences[0].contains(key), "{key}: {differences:?}");
            }
        }
    }

    #[test]
    fn what_a_key_means_depends_on_the_others() {
        let hash = |overrides: &[&str]| set(overrides).result_hash();
        let split = |micro: u32, accumulate: u32| {
            let micro = format!("train.micro_batch_size={micro}");
            hash(&[&micro, &format!("train.gradient_accumulation_steps={accumulate}")])
        };
        assert_eq!(split(8, 1), split(1, 8));
        assert_eq!(split(8, 1), split(4, 2));
        assert_ne!(split(8, 1), split(4, 1));

        // Which adapter is the best depends on when it was looked for.
        let evaluations = |of: &str| {
            let hash = |every| hash(&[of, &format!("train.evaluate_every={every}")]);
            (hash(1), hash(2))
        };
        let (one, two) = evaluations("data.eval=a");
        assert_ne!(one, two);
        let (one, two) = evaluations("data.eval_fraction=0");
        assert_eq!(one, two);

        let none = "model.quantization=none";
        assert_eq!(hash(&[none, "model.double_quant=true"]), hash(&[none, "model.double_quant=false"]));
        assert_ne!(hash(&["data.eval=a"]), hash(&["data.eval_fraction=0"]));

        let before = set(&["train.max_steps=10", "train.learning_rate=1e-3"]);
        let now = set(&["train.num_epochs=2", "train.learning_rate=2e-3"]);
        assert_eq!(
            before.differences(&now),
            [
                "train.max_steps was 10, is now (not given)",
                "train.learning_rate was 0.001, is now 0.002",
                "train.num_epochs was (not given), is now 2.0",
            ]
        );
    }

    /// Changing what the hash covers makes every checkpoint in the field refuse to resume: do it knowingly, and raise
    /// the version in its first line.
    #[test]
    fn the_hash_is_stable() {
        assert_eq!(
            set(&[]).result_hash(),
            "7743697471e3a851c49a7e3bdaf6fc87a7018a2e7241d1f170697cb1b2733e2a"
        );
    }
}
