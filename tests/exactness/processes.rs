//! The binary: signals that ask it to stop, and kills that do not ask.

use super::fixture::{Bits, checkpoints, expected, shared};
use finetuned::backend::philox::Philox;
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Starts `finetuned run` over the shared fixture; it begins where there is nothing and goes on where there is.
fn start(output: &Path, overrides: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_finetuned"));
    command.arg("run").arg(shared().path("spec.toml")).arg("--resume").arg("--output").arg(output);
    for set in overrides {
        command.args(["--set", set]);
    }
    command
        .env("FINETUNED_CACHE_DIR", shared().path("cache-of-the-binary"))
        .env("XDG_CACHE_HOME", shared().path("cache-of-the-binary"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Whether the run is complete: now (0), or it was before (8).
fn complete(status: ExitStatus) -> bool {
    matches!(status.code(), Some(0 | 8))
}

/// Waits for the end; prints what it said when the run is not complete.
fn end(child: Child) -> ExitStatus {
    let output = child.wait_with_output().unwrap();
    if !complete(output.status) {
        eprintln!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    output.status
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Nothing half written is left.
fn assert_swept(output: &Path) {
    for directory in [output.to_path_buf(), output.join("checkpoints")] {
        for entry in std::fs::read_dir(directory).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(!name.starts_with(".tmp-") && !name.starts_with(".old-"), "{name} is left");
        }
    }
}

/// Sleeps, unless the child ends before; whether it still runs.
fn alive_after(child: &mut Child, delay: Duration) -> bool {
    let until = Instant::now() + delay;
    loop {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        let Some(left) = until.checked_duration_since(Instant::now()) else { return true };
        std::thread::sleep(left.min(Duration::from_millis(1)));
    }
}

#[test]
fn sigint_and_sigterm() {
    let mut stopped = 0;
    for (i, delay) in [0, 3, 10, 30, 60, 100, 150, 200].into_iter().enumerate() {
        let output = shared().output();
        let output = output.path();
        let mut child = start(output, &[]);
        // The submitted spec is kept when training starts. Before that a signal ends the process at once.
        while !output.join("spec.toml").exists() {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it began");
            std::thread::sleep(Duration::from_millis(1));
        }
        if alive_after(&mut child, Duration::from_millis(delay)) {
            signal(&child, [Signal::INT, Signal::TERM][i % 2]);
            let status = end(child);
            assert!(status.code().is_some(), "it must end by itself: {status}");
            if !complete(status) {
                stopped += 1;
                assert!(!checkpoints(output).is_empty());
                assert!(!output.join("adapter").exists());
            }
        }
        assert!(complete(end(start(output, &[]))));
        assert_eq!(&Bits::of(output), expected(), "signalled {delay} ms after its start");
        assert_swept(output);
    }
    assert!(stopped > 2, "only {stopped} of the signals came in time");
}

#[test]
fn kills_at_random_moments() {
    const KILLS: usize = 24;
    let output = shared().output();
    let started = Instant::now();
    assert!(end(start(output.path(), &[])).success());
    let whole = started.elapsed();
    assert_eq!(&Bits::of(output.path()), expected(), "the binary and the library");

    let mut random = Philox::new(0x5eed, 0);
    let (mut kills, mut runs, mut most) = (0, 0, 0);
    while kills < KILLS {
        let output = shared().output();
        let output = output.path();
        let mut of_this_run = 0;
        loop {
            // What is free to change between two attempts does change.
            let every = ["train.checkpoint_every=1", "train.checkpoint_every=2"][kills % 2];
            let recompute =
                ["train.gradient_checkpointing=none", "train.gradient_checkpointing=full"][kills / 2 % 2];
            let mut child = start(output, &[every, recompute]);
            // More often early than late, so that a run is killed several times.
            let share = random.next_f32();
            let delay = Duration::from_millis(2) + whole.mul_f32(share * share);
            if !alive_after(&mut child, delay) {
                assert!(complete(end(child)));
                break;
            }
            signal(&child, Signal::KILL);
            child.wait().unwrap();
            (kills, of_this_run) = (kills + 1, of_this_run + 1);
            assert!(of_this_run < 200, "no progress");
        }
        assert_eq!(&Bits::of(output), expected(), "after {of_this_run} kills");
        assert_swept(output);
        (runs, most) = (runs + 1, most.max(of_this_run));
    }
    eprintln!("{kills} kills in {runs} runs, at most {most} in one; a whole run takes {whole:?}");
}
