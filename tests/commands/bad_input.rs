//! Damaged and mistaken input: the message names the file and what to do, the exit code is the documented one, nothing
//! panics, and what a run had written before stays as it is.

use crate::support::{Bench, Said, assert_says, tree};

/// A bench with a run that was stopped after two steps, so that there is something to lose.
fn begun() -> Bench {
    let bench = Bench::new();
    bench.call(&["run", "spec.toml", "--set", "train.max_steps=2"]).success();
    bench
}

/// Resumes the run, which must fail and leave every checkpoint alone.
#[track_caller]
fn refused(bench: &Bench, code: i32, parts: &[&str]) {
    let before = tree(&bench.path("runs/tiny/checkpoints"));
    assert!(!before.is_empty());
    let said = bench.call(&["run", "spec.toml", "--resume", "--set", "train.max_steps=2"]);
    assert_says(&said.refusal(code), parts);
    assert!(tree(&bench.path("runs/tiny/checkpoints")) == before, "the checkpoints were touched");
}

#[test]
fn truncated_weights() {
    let bench = begun();
    bench.change("model/model.safetensors", |bytes| bytes.truncate(bytes.len() - 100));
    refused(&bench, 1, &["model/model.safetensors"]);
    bench.change("model/model.safetensors", |bytes| bytes.truncate(5));
    refused(&bench, 1, &["model/model.safetensors"]);
    bench.change("model/model.safetensors", Vec::clear);
    refused(&bench, 1, &["model/model.safetensors"]);
}

#[test]
fn a_flipped_bit_in_the_header_of_the_weights() {
    let bench = begun();
    // The length of the header, eight bytes, then the header.
    for (byte, bit) in [(0, 7), (3, 1), (7, 7), (8, 2), (9, 0)] {
        bench.change("model/model.safetensors", |bytes| bytes[byte] ^= 1 << bit);
        refused(&bench, 1, &["model/model.safetensors"]);
        bench.change("model/model.safetensors", |bytes| bytes[byte] ^= 1 << bit);
    }
}

/// Flips that may be harmless or not: never a crash, and an error names the model.
#[test]
fn flipped_bits_anywhere_in_the_weights() {
    let bench = Bench::new();
    let len = std::fs::metadata(bench.path("model/model.safetensors")).unwrap().len() as usize;
    let mut refusals = 0;
    for i in 0..48 {
        // Most of them in the header, which has about 2 KB.
        let (byte, bit) = if i % 4 == 3 { (i * 2617 % len, i % 8) } else { (8 + i * 41 % 2000, i % 8) };
        bench.change("model/model.safetensors", |bytes| bytes[byte] ^= 1 << bit);
        let said = bench.call(&["generate", "--model", "model", "--prompt", "a", "--max-new-tokens", "2"]);
        if said.code != Some(0) {
            assert_says(&said.refusal(1), &["model"]);
            refusals += 1;
        }
        bench.change("model/model.safetensors", |bytes| bytes[byte] ^= 1 << bit);
    }
    assert!(refusals > 24, "{refusals} of 48 flips were noticed");
}

#[test]
fn changed_weights_are_another_base() {
    let bench = begun();
    bench.change("model/model.safetensors", |bytes| *bytes.last_mut().unwrap() ^= 1);
    refused(&bench, 1, &["cannot resume", "the base model changed", "another --output"]);
}

#[test]
fn wrong_json() {
    let bench = begun();
    for name in ["model/config.json", "model/tokenizer.json", "model/tokenizer_config.json"] {
        let whole = std::fs::read(bench.path(name)).unwrap();
        bench.change(name, |bytes| bytes.truncate(bytes.len() / 2));
        refused(&bench, 1, &[name]);
        std::fs::write(bench.path(name), whole).unwrap();
    }
    bench.change("train.jsonl", |bytes| bytes.extend(b"{\"messages\": [}\n"));
    refused(&bench, 1, &["train.jsonl:25: "]);
}

#[test]
fn an_adapter_config_that_is_no_json() {
    let bench = begun();
    bench.change("runs/tiny/adapter/adapter_config.json", |bytes| bytes.truncate(20));
    let said =
        bench.call(&["generate", "--model", "model", "--adapter", "runs/tiny/adapter", "--prompt", "a"]);
    assert_says(&said.refusal(1), &["runs/tiny/adapter/adapter_config.json"]);
}

#[test]
fn missing_files() {
    let bench = begun();
    for name in ["model/tokenizer.json", "model/config.json", "model/model.safetensors", "train.jsonl"] {
        let aside = bench.path("aside");
        std::fs::rename(bench.path(name), &aside).unwrap();
        // Without weights it is the directory that is named.
        refused(&bench, 1, &[name.strip_suffix("/model.safetensors").unwrap_or(name)]);
        std::fs::rename(&aside, bench.path(name)).unwrap();
    }
    let said = bench.call(&["run", "nowhere.toml"]).refusal(2);
    assert_says(&said, &["nowhere.toml", "No such file"]);
    let said = bench.call(&["run", "spec.toml", "--set", "model.base=nowhere", "--output", "o"]).refusal(1);
    assert_says(&said, &["nowhere/config.json", "is this the directory of a Hugging Face model?"]);
}

#[test]
fn an_unknown_key() {
    let bench = begun();
    let spec = std::fs::read_to_string(bench.path("spec.toml")).unwrap();
    let line = 1 + spec.lines().position(|line| line.starts_with("learning_rate")).unwrap();
    std::fs::write(bench.path("spec.toml"), spec.replace("learning_rate", "learning_rat")).unwrap();
    refused(
        &bench,
        2,
        &[&format!("error: spec.toml:{line}:1: train.learning_rat"), "did you mean `learning_rate`?"],
    );
}

#[test]
fn an_architecture_that_is_not_computed() {
    let bench = begun();
    bench.change("model/config.json", |bytes| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        *bytes = text.replace("llama", "mamba").replace("LlamaForCausalLM", "MambaForCausalLM").into_bytes();
    });
    refused(&bench, 1, &["model/config.json", "amba", "not supported", "llama"]);
}

#[test]
fn keys_that_the_model_does_not_have() {
    let bench = Bench::new();
    let said = bench.call(&["run", "spec.toml", "--set", "lora.layers=1..9"]).refusal(2);
    assert_says(&said, &["lora.layers", "1..9", "0..2"]);
    if !finetuned_cuda::driver::is_there() {
        let said = bench.call(&["run", "spec.toml", "--set", "train.backend=cuda"]).refusal(4);
        assert_says(&said, &["the GPU cannot be used", "libcuda.so.1", "train.backend = \"cpu\""]);
    }
}

#[test]
fn an_output_that_cannot_be_written() {
    let bench = Bench::new();
    // The superuser may write anywhere, but not below a file.
    let said = bench.call(&["run", "spec.toml", "--output", "train.jsonl/out"]).refusal(1);
    assert_says(&said, &["train.jsonl/out", "Not a directory"]);
}

#[test]
fn a_cache_that_cannot_be_written() {
    let bench = Bench::new();
    let mut command = bench.command(&["run", "spec.toml"]);
    command.env("FINETUNED_CACHE_DIR", bench.path("train.jsonl"));
    let said = Said::of(command.output().unwrap()).refusal(1);
    assert_says(&said, &["train.jsonl", "help: set FINETUNED_CACHE_DIR"]);
    let mut command = bench.command(&["run", "spec.toml"]);
    command.env_remove("FINETUNED_CACHE_DIR").env_remove("XDG_CACHE_HOME").env_remove("HOME");
    assert_says(&Said::of(command.output().unwrap()).refusal(2), &["help: set FINETUNED_CACHE_DIR"]);
}
