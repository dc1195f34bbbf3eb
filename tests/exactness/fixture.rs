//! A model directory, a data set and a spec, made in code; runs over them; and what a run leaves, to be compared.

use finetuned::backend::philox::Philox;
use finetuned::clock::SystemClock;
use finetuned::config::spec::Spec;
use finetuned::reason::Reason;
use finetuned::train::gate::{Gate, Open, Pace};
use finetuned::train::observer::{Event, Observer};
use finetuned::train::run::{Outcome, RunError, RunPaths, run};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const HIDDEN: usize = 32;
/// More than one block of the product's depth (256), and no multiple of it.
const INTERMEDIATE: usize = 288;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;
/// Every byte, and three control tokens.
const VOCABULARY: usize = 259;

/// Small enough for a run in a fraction of a second; packing, dropout, accumulation, evaluation and several epochs are
/// on. 8 sequences a step; an epoch has a step more that is not full.
const SPEC: &str = r#"
[run]
name = "tiny"
seed = 7

[model]
base = "model"

[data]
train = "train.jsonl"
eval_fraction = 0.1
sequence_length = 144

[lora]
r = 4
alpha = 8
dropout = 0.1

[train]
max_steps = 7
micro_batch_size = 2
gradient_accumulation_steps = 4
learning_rate = 5e-3
lr_scheduler = "cosine"
warmup_ratio = 0.2
weight_decay = 0.01
gradient_checkpointing = "none"
evaluate_every = 3
checkpoint_every = 2
"#;

/// A directory with everything a run reads.
pub struct Fixture {
    directory: tempfile::TempDir,
}

/// The fixture that most tests share. Nothing may change its files.
pub fn shared() -> &'static Fixture {
    static SHARED: OnceLock<Fixture> = OnceLock::new();
    SHARED.get_or_init(|| Fixture::new(1, 1))
}

/// What the uninterrupted run over the shared fixture leaves.
pub fn expected() -> &'static Bits {
    static EXPECTED: OnceLock<Bits> = OnceLock::new();
    EXPECTED.get_or_init(|| {
        let output = shared().output();
        shared().finish(&shared().spec(&[]), output.path(), false);
        Bits::of(output.path())
    })
}

impl Fixture {
    /// Weights and rows from these seeds.
    pub fn new(weights: u64, rows: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let model = directory.path().join("model");
        std::fs::create_dir(&model).unwrap();
        let write = |name: &str, value: Value| std::fs::write(model.join(name), value.to_string()).unwrap();
        write("config.json", config());
        write("tokenizer.json", tokenizer());
        write("tokenizer_config.json", json!({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}));
        std::fs::write(model.join("chat_template.jinja"), TEMPLATE).unwrap();
        std::fs::write(model.join("model.safetensors"), weights_file(weights)).unwrap();
        std::fs::write(directory.path().join("train.jsonl"), conversations(rows)).unwrap();
        std::fs::write(directory.path().join("unlike.jsonl"), unlike()).unwrap();
        std::fs::write(directory.path().join("spec.toml"), SPEC).unwrap();
        Self { directory }
    }

    /// A file of the fixture.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The spec with some keys changed.
    pub fn spec(&self, overrides: &[&str]) -> Spec {
        let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
        Spec::load(&self.path("spec.toml"), &overrides).unwrap()
    }

    /// A fresh output directory.
    pub fn output(&self) -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    /// Runs `spec`.
    pub fn run(
        &self,
        spec: &Spec,
        output: &Path,
        resume: bool,
        gate: &mut dyn Gate,
        observer: &mut dyn Observer,
    ) -> Result<Outcome, RunError> {
        let paths = RunPaths { output: output.to_path_buf(), cache: self.path("cache") };
        run(spec, &paths, resume, gate, observer, &SystemClock::new())
    }

    /// Runs `spec` to its end.
    pub fn finish(&self, spec: &Spec, output: &Path, resume: bool) {
        let outcome = self.run(spec, output, resume, &mut Open, &mut ignore);
        assert!(matches!(outcome, Ok(Outcome::Finished { .. })), "{outcome:?}");
    }

    /// Runs `spec` until the gate has been asked `asks` times; whether it was stopped (else it finished).
    pub fn stop_after(&self, asks: u64, spec: &Spec, output: &Path, resume: bool) -> bool {
        let mut gate = ClosesAfter { asks };
        match self.run(spec, output, resume, &mut gate, &mut ignore) {
            Ok(Outcome::Stopped { reason: Reason::User, checkpoint }) => {
                assert!(checkpoint.join("MANIFEST.json").exists());
                true
            }
            Ok(Outcome::Finished { .. }) => false,
            other => panic!("{other:?}"),
        }
    }
}

/// An observer that listens to nothing.
pub fn ignore(_: Event) {}

/// A gate that lets this many pieces of work through.
pub struct ClosesAfter {
    pub asks: u64,
}

impl Gate for ClosesAfter {
    fn pace(&mut self) -> Pace {
        if self.asks == 0 {
            return Pace::Stop(Reason::User);
        }
        self.asks -= 1;
        Pace::Run
    }
}

/// A gate that is open and counts how often it is asked.
#[derive(Default)]
pub struct Counts(pub u64);

impl Gate for Counts {
    fn pace(&mut self) -> Pace {
        self.0 += 1;
        Pace::Run
    }
}

/// Everything about a finished run that must not depend on how it went.
#[derive(Debug, PartialEq)]
pub struct Bits {
    /// SHA-256 of `adapter/adapter_model.safetensors`.
    pub adapter: String,
    /// SHA-256 of the last checkpoint's weights and of its moments.
    pub last: [String; 2],
    /// `metrics.jsonl` without what is measured by the clock: every step and every evaluation, exactly once, in order.
    pub metrics: Vec<Value>,
}

impl Bits {
    /// Of the run in `output`.
    pub fn of(output: &Path) -> Self {
        let checkpoints = checkpoints(output);
        let last = checkpoints.last().unwrap_or_else(|| panic!("{} has no checkpoint", output.display()));
        Self {
            adapter: sha256(&output.join("adapter/adapter_model.safetensors")),
            last: ["adapter.safetensors", "optimizer.safetensors"].map(|file| sha256(&last.join(file))),
            metrics: metrics(output),
        }
    }
}

/// The lines of `metrics.jsonl` without `tokens_per_second`.
pub fn metrics(output: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let parse = |line: &str| -> Value {
        let mut value: Value = serde_json::from_str(line).unwrap();
        value.as_object_mut().unwrap().remove("tokens_per_second");
        value
    };
    text.lines().map(parse).collect()
}

/// The checkpoints of a run, oldest first.
pub fn checkpoints(output: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(output.join("checkpoints")) else { return Vec::new() };
    let mut paths: Vec<PathBuf> =
        entries.map(|e| e.unwrap().path()).filter(|p| p.join("MANIFEST.json").exists()).collect();
    // 00000002.5 lies between 00000002 and 00000003.
    let position = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        let (step, within) = name.split_once('.').unwrap_or((&name, "0"));
        (step.parse::<u64>().unwrap_or(0), within.parse::<u64>().unwrap_or(0))
    };
    paths.sort_by_key(position);
    paths
}

pub fn sha256(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    Sha256::digest(bytes).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// ChatML.
const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] \
                        + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' \
                        }}{% endif %}";

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": false,
    })
}

/// One token a byte, as GPT-2 writes bytes, and three control tokens.
fn tokenizer() -> Value {
    let mut vocabulary = serde_json::Map::new();
    let mut beyond = 0x100;
    for byte in 0..=255u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let letter = if printable {
            char::from(byte)
        } else {
            beyond += 1;
            char::from_u32(beyond - 1).unwrap()
        };
        vocabulary.insert(letter.to_string(), json!(byte));
    }
    let control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let added: Vec<Value> = control
        .iter()
        .zip(256..)
        .map(|(content, id)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true
            })
        })
        .collect();
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": []
        }
    })
}

/// Uniform weights of the size an initialisation would give them.
fn weights_file(seed: u64) -> Vec<u8> {
    let mut random = Philox::new(seed, 0);
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    let mut add = |name: String, shape: &[usize], center: f32| {
        let width = 1.5 / (shape[shape.len() - 1] as f32).sqrt();
        let values = (0..shape.iter().product()).flat_map(|_| {
            let value = center + (2.0 * random.next_f32() - 1.0) * width;
            value.to_le_bytes()
        });
        tensors.insert(name, (shape.to_vec(), values.collect()));
    };
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    add("model.embed_tokens.weight".into(), &[VOCABULARY, HIDDEN], 0.0);
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("self_attn.q_proj", [q, HIDDEN]),
            ("self_attn.k_proj", [kv, HIDDEN]),
            ("self_attn.v_proj", [kv, HIDDEN]),
            ("self_attn.o_proj", [HIDDEN, q]),
            ("mlp.gate_proj", [INTERMEDIATE, HIDDEN]),
            ("mlp.up_proj", [INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", [HIDDEN, INTERMEDIATE]),
        ] {
            add(format!("model.layers.{layer}.{name}.weight"), &shape, 0.0);
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            add(format!("model.layers.{layer}.{name}.weight"), &[HIDDEN], 1.0);
        }
    }
    add("model.norm.weight".into(), &[HIDDEN], 1.0);
    add("lm_head.weight".into(), &[VOCABULARY, HIDDEN], 0.0);
    let views: Vec<(&String, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, (shape, bytes))| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()))
        .collect();
    safetensors::serialize(views, None).unwrap()
}

/// Short conversations about sums, of many lengths.
fn conversations(seed: u64) -> String {
    let mut random = Philox::new(seed, 1);
    let mut text = String::new();
    for _ in 0..24 {
        let (a, b) = (random.next_u32() % 100, random.next_u32() % 100);
        let polite = "please ".repeat(random.next_u32() as usize % 4);
        let reason = "because it is so, ".repeat(random.next_u32() as usize % 3);
        let row = json!({"messages": [
            {"role": "user", "content": format!("{polite}add {a} and {b}")},
            {"role": "assistant", "content": format!("{reason}{a} and {b} are {}.", a + b)},
        ]});
        writeln!(text, "{row}").unwrap();
    }
    text
}

/// Conversations that the others help with a little, and then no more: held-out loss over them falls and rises.
fn unlike() -> String {
    let mut random = Philox::new(3, 2);
    let mut text = String::new();
    for i in 0..4 {
        let letters: String = (0..24).map(|_| char::from(b'A' + (random.next_u32() % 26) as u8)).collect();
        let row = json!({"messages": [
            {"role": "user", "content": format!("add {i} and {i}")},
            {"role": "assistant", "content": format!("{letters} and {letters} are {i}.")},
        ]});
        writeln!(text, "{row}").unwrap();
    }
    text
}
