//! `finetuned demo`, from nothing to an answer.

use crate::support::{Bench, assert_says};

#[test]
fn the_demo_teaches_its_model() {
    let bench = Bench::new();
    let out = bench.call(&["demo", "--output", "d"]).success();
    assert_says(&out, &["Before:", "Training:", "After, on the same prompts:", "3 of 3 as intended"]);
    let eval = |step: &str| -> f64 {
        let line = out.lines().find_map(|line| line.strip_prefix(&format!("eval {step} eval_loss ")));
        line.unwrap_or_else(|| panic!("{step}: {out}")).parse().unwrap()
    };
    assert!(eval("150/150") < eval("0/150") / 10.0, "{out}");
    assert!(bench.path("d/runs/demo/adapter/adapter_model.safetensors").exists());
    // The command that it offers gives the answer that it showed.
    let offered = out.lines().last().unwrap().trim();
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", offered]).current_dir(bench.path("")).env("FINETUNED_CACHE_DIR", bench.path("cache"));
    let answer = String::from_utf8(shell.output().unwrap().stdout).unwrap();
    assert!(answer.starts_with('{') && out.contains(answer.trim()), "{answer}");
}

#[test]
fn a_demo_that_was_changed_is_not_overwritten() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("d")).unwrap();
    std::fs::write(bench.path("d/demo.toml"), "mine").unwrap();
    let said = bench.call(&["demo", "--output", "d"]).refusal(1);
    assert_says(&said, &["d/demo.toml", "help: "]);
    assert_eq!(std::fs::read(bench.path("d/demo.toml")).unwrap(), b"mine");
}
