//! `finetuned run`.

use crate::fixture::sha256;
use crate::support::{Bench, PROGRAM, Said, assert_says, tree};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command};

#[test]
fn a_run_says_what_it_does_and_leaves_its_results() {
    let bench = Bench::new();
    let out = bench.call(&["run", "spec.toml"]).success();
    let steps: Vec<&str> = out.lines().filter(|line| line.starts_with("step ")).collect();
    assert_eq!(steps.len(), 7, "{out}");
    for (i, step) in steps.iter().enumerate() {
        let words: Vec<&str> = step.split(' ').collect();
        assert_eq!([words[1], words[2]], [format!("{}/7", i + 1).as_str(), "loss"], "{step}");
        assert!(words[3].parse::<f64>().unwrap() > 0.0, "{step}");
        assert_eq!([words[4], words[6], words[9]], ["grad_norm", "lr", "tok/s"], "{step}");
    }
    assert_says(
        &out,
        &["eval 0/7 eval_loss ", "checkpoint runs/tiny/checkpoints/00000006", "adapter    runs/tiny"],
    );
    assert_eq!(out.lines().filter(|line| line.starts_with("eval ")).count(), 4);

    let results = bench.path("runs/tiny");
    assert_eq!(
        std::fs::read(results.join("spec.toml")).unwrap(),
        std::fs::read(bench.path("spec.toml")).unwrap()
    );
    let summary: Value =
        serde_json::from_slice(&std::fs::read(results.join("summary.json")).unwrap()).unwrap();
    let before = summary["baseline_eval_loss"].as_f64().unwrap();
    assert_says(&out, &[&format!("loss {before:.4} before"), "7 steps", "at the peak"]);
    for file in ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl"] {
        assert!(results.join(file).exists(), "{file}");
    }
}

#[test]
fn a_finished_run_is_left_alone_and_resuming_it_is_nothing_to_do() {
    let bench = Bench::new();
    bench.call(&["run", "spec.toml", "--output", "out put"]).success();
    let adapter = sha256(&bench.path("out put/adapter/adapter_model.safetensors"));
    let files = tree(&bench.path("out put"));
    let said = bench.call(&["run", "spec.toml", "--output", "out put"]).refusal(1);
    assert_says(
        &said,
        &["out put already holds a run", "help: continue it with: ", "--output 'out put' --resume"],
    );
    assert!(tree(&bench.path("out put")) == files, "the results were touched");
    let said = bench.call(&["run", "spec.toml", "--output", "out put", "--resume"]);
    assert_eq!(said.code, Some(8), "{said:#?}");
    assert_says(&said.err, &["nothing to do"]);
    assert_says(&said.out, &["finished   7 steps", "adapter    out put/adapter"]);
    assert_eq!(sha256(&bench.path("out put/adapter/adapter_model.safetensors")), adapter);
}

#[test]
fn resume_starts_where_there_is_nothing() {
    let bench = Bench::new();
    bench.call(&["run", "spec.toml", "--resume", "--set", "train.max_steps=1"]).success();
}

/// Sends a signal when the third step is reported; what was said in all.
fn interrupted(mut child: Child, signal: Signal) -> Said {
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut said = String::new();
    while !said.contains("step 3/") {
        assert_ne!(out.read_line(&mut said).unwrap(), 0, "ended early: {said}");
    }
    kill_process(Pid::from_child(&child), signal).unwrap();
    out.read_to_string(&mut said).unwrap();
    let mut output = child.wait_with_output().unwrap();
    output.stdout = said.into_bytes();
    Said::of(output)
}

#[test]
fn a_signal_stops_it_and_the_command_it_prints_continues_it() {
    let bench = Bench::new();
    // Long enough that the signal always comes in the middle.
    let arguments = [
        "run",
        "spec.toml",
        "--set",
        "train.max_steps=120",
        "--set",
        "train.evaluate_every=0",
        "--threads",
        "1",
    ];
    let uninterrupted = [&arguments[..], &["--output", "whole"]].concat();
    bench.call(&uninterrupted).success();
    for signal in [Signal::INT, Signal::TERM] {
        let child = bench.command(&arguments).spawn().unwrap();
        let said = interrupted(child, signal);
        assert_eq!(said.code, Some(130), "{said:#?}");
        assert_says(&said.err, &["stopping: ", "stopped (user); the state is in runs/tiny/checkpoints/"]);
        let again = said.err.lines().find_map(|line| line.strip_prefix("continue with: ")).unwrap();
        assert!(again.starts_with(PROGRAM) && again.ends_with("--threads 1 --resume"), "{again}");
        let mut shell = Command::new("sh");
        shell.args(["-c", again]).current_dir(bench.path("")).env("FINETUNED_CACHE_DIR", bench.path("cache"));
        let out = Said::of(shell.output().unwrap()).success();
        assert_says(&out, &["resumed at step ", "finished   120 steps"]);
        let adapter = |output: &str| sha256(&bench.path(output).join("adapter/adapter_model.safetensors"));
        assert_eq!(adapter("runs/tiny"), adapter("whole"));
        std::fs::remove_dir_all(bench.path("runs")).unwrap();
    }
}

#[test]
fn a_run_that_diverges_has_its_own_exit_code() {
    let bench = Bench::new();
    let set = ["--set", "train.learning_rate=1e30", "--set", "train.lr_scheduler=constant"];
    let said =
        bench.call(&[&["run", "spec.toml", "--set", "train.max_grad_norm=0"][..], &set].concat()).refusal(3);
    assert_says(&said, &["train.jsonl:", "learning_rate"]);
}

#[test]
fn it_trains_on_when_nobody_reads_its_output() {
    let bench = Bench::new();
    let mut child = bench.command(&["run", "spec.toml"]).spawn().unwrap();
    drop(child.stdout.take());
    let said = Said::of(child.wait_with_output().unwrap());
    assert_eq!(said.code, Some(0), "{said:#?}");
    assert!(bench.path("runs/tiny/adapter/adapter_model.safetensors").exists());
}

#[test]
fn on_a_terminal_there_is_a_bar() {
    let bench = Bench::new();
    let mut script = Command::new("script");
    let command = format!("'{PROGRAM}' run spec.toml >summary.txt");
    script.args(["-q", "-e", "-c", &command, "/dev/null"]).current_dir(bench.path(""));
    script.env("FINETUNED_CACHE_DIR", bench.path("cache")).env("TERM", "xterm").env_remove("NO_COLOR");
    let output = match script.stdin(std::process::Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => return eprintln!("SKIPPED: util-linux's `script` gives the terminal: {error}"),
    };
    let said = Said::of(output);
    assert_eq!(said.code, Some(0), "{said:#?}");
    assert_says(&said.out, &["training [", "] ", "7/7  loss ", "tok/s", "eval 0/7 eval_loss "]);
    assert!(!said.out.contains("step 1/7 loss"), "lines and a bar: {}", said.out);
    let summary = std::fs::read_to_string(bench.path("summary.txt")).unwrap();
    assert!(summary.starts_with("finished   7 steps"), "{summary}");
}

#[test]
fn every_command_explains_itself() {
    let bench = Bench::new();
    let out = bench.call(&["--help"]).success();
    assert_says(&out, &["run", "plan", "generate", "demo", "data", "Exit codes:", "130"]);
    for command in ["run", "plan", "generate", "demo"] {
        let out = bench.call(&[command, "--help"]).success();
        assert_says(&out, &["Usage: finetuned ", "Example"]);
    }
    let out = bench.call(&["--version"]).success();
    assert_eq!(out, format!("finetuned {}\n", env!("CARGO_PKG_VERSION")));
    bench.call(&["walk"]).refusal(2);
}
