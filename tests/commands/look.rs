//! `finetuned plan`, `data inspect` and `spec check`: commands that look and do not touch.

use crate::support::{Bench, assert_says};

#[test]
fn a_plan_tells_what_the_run_then_takes() {
    let bench = Bench::new();
    let plan = bench.call(&["plan", "spec.toml", "--json"]).json();
    assert!(!bench.path("runs").exists());
    assert_eq!(plan["schema"], 1);
    // r · (in + out) of every linear layer: q 32→32, k and v 32→16, o 32→32, gate and up 32→288, down 288→32.
    let trainable = 2 * 4 * (64 + 48 + 48 + 64 + 320 + 320 + 320);
    assert_eq!(plan["parameters"]["trainable"], trainable);
    assert_eq!(plan["steps"]["total"], 7);
    assert_eq!(plan["memory"]["fits"], true);
    let parts = plan["memory"]["parts"].as_array().unwrap();
    let sum: u64 = parts.iter().map(|part| part["bytes"].as_u64().unwrap()).sum();
    assert_eq!(plan["memory"]["total"], sum);

    let text = bench.call(&["plan", "spec.toml"]).success();
    assert_says(&text, &["9,472 trainable of ", "steps      7 (", "activations", "total", "available"]);

    bench.call(&["run", "spec.toml"]).success();
    let summary = std::fs::read(bench.path("runs/tiny/summary.json")).unwrap();
    let summary: serde_json::Value = serde_json::from_slice(&summary).unwrap();
    assert_eq!(summary["trainable_parameters"], plan["parameters"]["trainable"]);
    assert_eq!(summary["total_parameters"], plan["parameters"]["total"]);
    assert_eq!(summary["steps"], plan["steps"]["total"]);
}

#[test]
fn a_plan_that_does_not_fit_says_what_would() {
    let bench = Bench::new();
    // A row of 50,000 tokens, 4,096 of them at a time: terabytes.
    let row = format!("{{\"prompt\": \"say a\", \"completion\": \"{}\"}}\n", "a".repeat(50_000));
    std::fs::write(bench.path("long.jsonl"), row.repeat(2)).unwrap();
    let set = [
        "data.train=long.jsonl",
        "data.eval_fraction=0",
        "data.packing=false",
        "data.sequence_length=60000",
        "train.micro_batch_size=4096",
        "train.gradient_accumulation_steps=1",
    ];
    let mut arguments = vec!["plan", "spec.toml"];
    arguments.extend(set.iter().flat_map(|set| ["--set", set]));
    let said = bench.call(&arguments);
    assert_eq!(said.code, Some(9), "{said:#?}");
    assert_says(&said.out, &["total", "TiB of "]);
    assert_says(&said.err, &["error: this run does not fit", "help: --set ", "the result is the same"]);
    // What it offers does fit.
    let help = said.err.lines().find_map(|line| line.strip_prefix("help: ")).unwrap();
    let offered = help.split(" takes ").next().unwrap();
    assert_says(offered, &["train.gradient_checkpointing=full", "train.micro_batch_size="]);
    arguments.extend(offered.split(' '));
    bench.call(&arguments).success();
}

#[test]
fn data_is_shown_with_what_is_learnt() {
    let bench = Bench::new();
    let text = bench.call(&["data", "inspect", "spec.toml", "--rows", "2"]).success();
    assert_says(&text, &["24 rows, messages format (detected)", "train.jsonl:", "tokens per row: median"]);
    assert_eq!(text.matches("── ").count(), 2);
    // The mark begins after the header of the assistant's turn and takes the end-of-turn token in.
    assert_says(&text, &["<|im_start|>assistant\n[[", "<|im_end|>]]"]);
    let json = bench.call(&["data", "inspect", "spec.toml", "--rows", "2", "--json"]).json();
    assert_eq!(json["schema"], 1);
    assert_eq!(json["samples"].as_array().unwrap().len(), 2);
    assert_eq!(json["report"]["files"][0]["rows"], 24);
    assert!(!bench.path("runs").exists());
}

#[test]
fn a_spec_is_checked_without_its_files() {
    let bench = Bench::new();
    assert_eq!(bench.call(&["spec", "check", "spec.toml"]).success(), "OK\n");
    let resolved = bench.call(&["spec", "check", "spec.toml", "--resolved", "--set", "lora.r=8"]).success();
    assert_says(&resolved, &["r = 8\n", "adam_beta2 = 0.999\n"]);
    let said = bench
        .call(&["spec", "check", "spec.toml", "--set", "lora.rank=8", "--set", "lora.alpha=x"])
        .refusal(2);
    assert_eq!(said.lines().filter(|line| line.starts_with("error: ")).count(), 2, "{said}");
}
