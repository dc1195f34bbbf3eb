//! A disk that is full while a checkpoint is written: a clear error, the checkpoint before intact, and with some room
//! the run goes on to the same bits. The disk is a small tmpfs in a mount namespace of its own, which takes the
//! superuser or unprivileged user namespaces; without either the test says that it was skipped.

use crate::fixture::sha256;
use crate::support::{Bench, PROGRAM, Said, assert_says};
use std::process::Command;

/// Runs in the namespace: fills the disk during a run, then makes room and resumes. `$1` is the program.
const SCRIPT: &str = r#"
set -e
mkdir disk
mount -t tmpfs -o size=400k none disk
set +e
"$1" run spec.toml --output disk/out >first.out 2>first.err
echo $? >first.code
set -e
ls disk/out/checkpoints >first.list
mount -o remount,size=20m none disk
"$1" run spec.toml --output disk/out --resume >second.out
cp -r disk/out out
"#;

#[test]
fn a_full_disk_loses_nothing() {
    let bench = Bench::new();
    let allowed = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"])
        .output()
        .is_ok_and(|output| output.status.success());
    if !allowed {
        return eprintln!("SKIPPED: mounting a tmpfs in a namespace of its own is not allowed here");
    }
    let mut script = Command::new("unshare");
    script.args(["--map-root-user", "--mount", "sh", "-c", SCRIPT, "sh", PROGRAM]);
    script.current_dir(bench.path("")).env("FINETUNED_CACHE_DIR", bench.path("cache"));
    Said::of(script.output().unwrap()).success();

    let read = |name: &str| std::fs::read_to_string(bench.path(name)).unwrap();
    let said = read("first.err");
    assert_eq!(read("first.code").trim(), "1", "{said}");
    assert_says(&said, &["error: the disk is full", "disk/out/checkpoints", "help: ", "--resume"]);
    assert!(!said.contains("panicked"), "{said}");
    // There was a checkpoint, and the run went on from it.
    assert!(!read("first.list").trim().is_empty());
    assert_says(&read("second.out"), &["resumed at step ", "finished   7 steps"]);
    bench.call(&["run", "spec.toml", "--output", "whole"]).success();
    let adapter = |output: &str| sha256(&bench.path(output).join("adapter/adapter_model.safetensors"));
    assert_eq!(adapter("out"), adapter("whole"));
}
