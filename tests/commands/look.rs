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
fn a_plan_knows_the_speed_from_a_probe_and_then_from_runs() {
    let bench = Bench::new();
    let unknown = bench.call(&["plan", "spec.toml", "--json"]).json();
    assert!(unknown["time"].is_null() && unknown["calendar"].is_null());
    assert_says(&bench.call(&["plan", "spec.toml"]).success(), &["time       unknown", "--probe"]);

    let probed = bench.call(&["plan", "spec.toml", "--probe", "--json"]).json();
    assert_eq!(probed["time"]["basis"], "probe");
    assert_eq!(probed["time"]["records"], 1);
    assert!(probed["time"]["seconds"].as_f64().unwrap() > 0.0);
    let nights = probed["calendar"]["nights"].as_array().unwrap();
    assert_eq!(nights.iter().map(|night| night["steps"].as_u64().unwrap()).sum::<u64>(), 7);
    assert!(!bench.path("runs").exists() && !bench.path("cache/probe/checkpoints").exists());

    bench.call(&["run", "spec.toml"]).success();
    let text = bench.call(&["plan", "spec.toml"]).success();
    assert_says(
        &text,
        &["tokens/s, from 2 runs and probes of this configuration", "finish     ", "if it began now"],
    );
    // Another shape of the same model is scaled, and a damaged record is no obstacle.
    bench.change("cache/throughput.jsonl", |bytes| bytes.extend_from_slice(b"{\"torn"));
    let text = bench.call(&["plan", "spec.toml", "--set", "data.sequence_length=64"]).success();
    assert_says(&text, &["scaled from 2 runs and probes of this base"]);
}

#[test]
fn a_plan_predicts_what_nobody_measured_and_says_so() {
    let bench = Bench::new();
    let on = ["plan", "spec.toml", "--on", "agx-orin-64gb:50W"];
    let text = bench.call(&on).success();
    assert_says(
        &text,
        &[
            "tokens/s, predicted by the roofline of agx-orin-64gb in MODE_50W at 60 % of its bound, not measured",
            "of computing",
            "finish     ",
            "time is that of agx-orin-64gb in MODE_50W; memory is what the run would take here",
        ],
    );
    let plan = bench.call(&[&on[..], &["--json"]].concat()).json();
    assert_eq!(plan["time"]["basis"], "roofline");
    assert_eq!(plan["time"]["device"], "agx-orin-64gb in MODE_50W");
    assert_eq!(plan["time"]["records"], 0);
    let seconds = plan["time"]["seconds"].as_f64().unwrap();
    let between = &plan["time"]["between"];
    assert_eq!((between[0].as_f64().unwrap(), between[1].as_f64().unwrap()), (seconds / 2.0, seconds * 2.0));
    assert!(plan["memory"]["available"].is_null() && plan["energy"].is_null());
    // The CPU of this machine is not predicted, and what was measured here says nothing about the board.
    assert!(bench.call(&["plan", "spec.toml", "--json"]).json()["time"].is_null());
    bench.call(&["plan", "spec.toml", "--probe"]).success();
    assert_eq!(bench.call(&[&on[..], &["--json"]].concat()).json()["time"]["seconds"], seconds);
    let slow = bench.call(&["plan", "spec.toml", "--on", "agx-orin-64gb:MODE_15W", "--json"]).json();
    assert!(slow["time"]["seconds"].as_f64().unwrap() > seconds);
    let said = bench.call(&["plan", "spec.toml", "--on", "toaster"]).refusal(2);
    assert_says(&said, &["no figures of \"toaster\"", "agx-orin-64gb:MAXN"]);
}

#[test]
fn a_bench_says_what_there_is_to_measure() {
    let bench = Bench::new();
    for (arguments, expected) in [
        (["bench", "--kernel", "convolution"], "there are step, nf4-dequantise, linear"),
        (["bench", "--model", "GPT-5"], "SmolLM2-135M, Qwen2.5-0.5B, Llama-3.2-1B"),
        (["bench", "--tokens", "0"], "0 is not in 1.."),
        (["bench", "--device", "abacus"], "cuda, cpu"),
    ] {
        assert_says(&bench.call(&arguments).refusal(2), &[expected]);
    }
}

#[test]
fn a_plan_that_misses_its_moment_says_how_many_steps_would_not() {
    let bench = Bench::new();
    bench.call(&["plan", "spec.toml", "--probe"]).success();
    let long = ["plan", "spec.toml", "--set", "train.max_steps=100000000", "--before"];
    let later = jiff::Timestamp::now() + std::time::Duration::from_secs(26 * 3600);
    let later = later.to_string();
    let said = bench.call(&[&long[..], &[&later]].concat());
    assert_eq!(said.code, Some(9), "{said:#?}");
    assert_says(
        &said.err,
        &["error: it would be complete at ", "help: --set train.max_steps=", "hours that are longer"],
    );
    let steps = said.err.split("train.max_steps=").nth(1).unwrap().lines().next().unwrap();
    let steps = format!("train.max_steps={}", steps.parse::<u64>().unwrap() * 9 / 10);
    bench.call(&["plan", "spec.toml", "--set", &steps, "--before", &later]).success();
    let said = bench.call(&["plan", "spec.toml", "--before", "soon"]).refusal(2);
    assert_says(&said, &["--before: \"soon\" is no moment"]);

    // The hours of the daemon.
    std::fs::write(bench.path("hours.toml"), "[window]\ntimes = [\"00:00-00:01\"]\n").unwrap();
    let long = &long[..4];
    let said = bench.call(&[long, &["--config", "hours.toml"]].concat());
    assert_eq!(said.code, Some(9), "{said:#?}");
    assert_says(&said.err, &["it would take longer than a year"]);
    std::fs::write(bench.path("hours.toml"), "[window]\ntimes = [\"soon\"]\n").unwrap();
    assert_says(&bench.call(&["plan", "spec.toml", "--config", "hours.toml"]).refusal(2), &["window.times"]);
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
