//! The memory plan against what the process took: within 10 % of its largest resident set.

use crate::support::Bench;
use serde_json::Value;
use std::path::Path;

/// On the model that ships with the source: with the tiny fixture the program itself would be nearly all there is to
/// predict.
#[test]
fn the_plan_is_within_ten_percent_of_the_peak() {
    if !cfg!(target_os = "linux") {
        eprintln!("skipped: the peak is read from /proc");
        return;
    }
    let bench = Bench::new();
    let spec = Path::new(env!("CARGO_MANIFEST_DIR")).join("daemon/demo/demo.toml");
    let spec = spec.to_str().unwrap();
    // The first process quantises the base, which is not part of training: it is not measured.
    let settings = [
        "train.max_steps=1",
        "train.micro_batch_size=1",
        "train.micro_batch_size=8",
        "train.gradient_checkpointing=full",
        "data.sequence_length=1024",
        "lora.dropout=0.1",
        "model.quantization=none",
        "data.packing=false",
    ];
    for (i, setting) in settings.into_iter().enumerate() {
        let output = format!("out-{i}");
        let arguments = ["run", spec, "--output", &output, "--set", "train.max_steps=2", "--set", setting];
        bench
            .call(&[&arguments[..], &["--set", "train.evaluate_every=0", "--threads", "2"]].concat())
            .success();
        let summary = std::fs::read_to_string(bench.path(&output).join("summary.json")).unwrap();
        let summary: Value = serde_json::from_str(&summary).unwrap();
        let (peak, planned) = (
            summary["peak_memory_bytes"].as_f64().unwrap(),
            summary["planned_memory_bytes"].as_f64().unwrap(),
        );
        let ratio = planned / peak;
        assert!(i == 0 || (0.9..1.1).contains(&ratio), "{setting}: {planned} planned, {peak} taken");
    }
}
