//! Crashes between any two events of a run, damaged checkpoints, and runs that diverge.

use super::fixture::{Bits, Counts, checkpoints, expected, ignore, shared};
use finetuned::checkpoint::Store;
use finetuned::config::spec::Spec;
use finetuned::train::gate::Open;
use finetuned::train::observer::Event;
use finetuned::train::run::{Outcome, RunError};
use std::path::Path;

/// Something that happens to a file.
type Damage = fn(&Path);

fn flip(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

fn cut(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
}

fn remove(path: &Path) {
    std::fs::remove_file(path).unwrap();
}

/// Goes on in `output`; how many checkpoints were said to be damaged.
fn finish_with_notes(output: &Path) -> usize {
    let mut damaged = 0;
    let mut observer = |event: Event| {
        if let Event::Note(text) = event {
            damaged += usize::from(text.contains("is damaged"));
        }
    };
    shared().run(&shared().spec(&[]), output, true, &mut Open, &mut observer).unwrap();
    damaged
}

#[test]
fn a_damaged_checkpoint_falls_back_to_the_one_before() {
    let fixture = shared();
    let damages: [(&str, Damage); 7] = [
        ("adapter.safetensors", flip),
        ("optimizer.safetensors", flip),
        ("gradients.safetensors", flip),
        ("gradients.safetensors", remove),
        ("state.json", flip),
        ("state.json", cut),
        ("MANIFEST.json", flip),
    ];
    for (file, damage) in damages {
        let output = fixture.output();
        let output = output.path();
        assert!(fixture.stop_after(17, &fixture.spec(&[]), output, false));
        let before = checkpoints(output);
        assert!(before.len() > 1, "{before:?}");
        let newest = before.last().unwrap();
        assert!(newest.join("gradients.safetensors").exists(), "{newest:?} is not inside a step");
        damage(&newest.join(file));
        assert_eq!(finish_with_notes(output), 1, "{file}");
        assert_eq!(&Bits::of(output), expected(), "{file}");
        assert!(!newest.exists() && output.join("checkpoints/quarantine").read_dir().unwrap().count() == 1);
    }
}

#[test]
fn without_a_good_checkpoint_the_run_begins_again() {
    let fixture = shared();
    let output = fixture.output();
    let output = output.path();
    assert!(fixture.stop_after(20, &fixture.spec(&[]), output, false));
    let all = checkpoints(output);
    all.iter().for_each(|checkpoint| flip(&checkpoint.join("adapter.safetensors")));
    assert_eq!(finish_with_notes(output), all.len());
    assert_eq!(&Bits::of(output), expected());
}

/// With a learning rate that throws the weights away, whatever is noticed first ends the run.
#[test]
fn a_run_that_diverges_leaves_its_last_good_checkpoint() {
    let fixture = shared();
    let common = ["train.warmup_steps=0", "train.lr_scheduler=constant", "train.checkpoint_every=1"];
    for (rate, every) in [("1e30", 100), ("1e30", 1), ("1e39", 100), ("1e39", 1), ("1e300", 0)] {
        let (rate, every) = (format!("train.learning_rate={rate}"), format!("train.evaluate_every={every}"));
        let output = fixture.output();
        let output = output.path();
        let mut overrides = common.to_vec();
        overrides.extend([rate.as_str(), every.as_str()]);
        let spec = fixture.spec(&overrides);
        let outcome = fixture.run(&spec, output, false, &mut Open, &mut ignore);
        let Err(RunError::Diverged { rows, last, value, step, what, .. }) = outcome else {
            panic!("{rate}, {every}: {outcome:?}")
        };
        assert!(!value.is_finite() && step > 0, "{what}");
        assert!(rows.contains("train.jsonl:"), "{what}: {rows}");
        let recovered = Store::open(&output.join("checkpoints")).unwrap().recover().unwrap();
        assert!(recovered.quarantined.is_empty());
        let (path, checkpoint) = recovered.latest.expect("a checkpoint");
        assert!(last.contains(path.to_str().unwrap()), "{last}");
        let good = checkpoint.parameters.iter().all(|tensor| tensor.data.iter().all(|x| x.is_finite()));
        assert!(good, "{rate}, {every}: {} holds what is not finite", path.display());
        assert!(!output.join("adapter").exists());
    }
}

/// The last step has no next one that could notice.
#[test]
fn a_last_step_that_diverges_leaves_no_adapter() {
    let fixture = shared();
    for fraction in ["data.eval_fraction=0", "data.eval_fraction=0.1"] {
        let output = fixture.output();
        let spec = fixture.spec(&[
            "train.warmup_steps=0",
            "train.lr_scheduler=constant",
            "train.learning_rate=1e39",
            "train.max_steps=1",
            fraction,
        ]);
        let outcome = fixture.run(&spec, output.path(), false, &mut Open, &mut ignore);
        assert!(matches!(outcome, Err(RunError::Diverged { .. })), "{fraction}: {outcome:?}");
        assert!(!output.path().join("adapter").exists());
    }
}

/// Ends the attempt as a crash would, at the `at`-th event that leaves something on the disk: nothing is written any
/// more. Whether it came to that.
fn crash(at: usize, spec: &Spec, output: &Path) -> bool {
    let mut events = 0;
    let mut observer = |event: Event| {
        let durable = matches!(
            event,
            Event::Started { .. } | Event::Step(_) | Event::Evaluated { .. } | Event::Committed { .. }
        );
        if durable {
            if events == at {
                std::panic::resume_unwind(Box::new("crash"));
            }
            events += 1;
        }
    };
    let attempt = std::panic::AssertUnwindSafe(|| {
        shared().run(spec, output, true, &mut Open, &mut observer).unwrap();
    });
    std::panic::catch_unwind(attempt).is_err()
}

/// A spec under which held-out loss gets worse at the end: the adapter is the best evaluation's, not the last step's.
fn overfitting() -> Spec {
    shared().spec(&[
        "data.eval=unlike.jsonl",
        "train.learning_rate=1e-2",
        "train.lr_scheduler=constant",
        "train.evaluate_every=2",
        "train.checkpoint_every=3",
        "train.keep_checkpoints=1",
    ])
}

#[test]
fn a_crash_after_any_event() {
    let fixture = shared();
    let spec = overfitting();
    let whole = fixture.output();
    fixture.finish(&spec, whole.path(), false);
    let whole = Bits::of(whole.path());
    let mut at = 0;
    loop {
        let output = fixture.output();
        if !crash(at, &spec, output.path()) {
            break;
        }
        // A second one, soon after the start.
        crash(1 + at % 3, &spec, output.path());
        fixture.finish(&spec, output.path(), true);
        assert_eq!(Bits::of(output.path()), whole, "crashed at event {at}");
        at += 1;
    }
    assert!(at > 12, "only {at} events");
}

/// Stopped at a piece of work, an evaluation's among them, resumed, and crashed soon after.
#[test]
fn a_stop_and_then_a_crash() {
    let fixture = shared();
    let spec = overfitting();
    let whole = fixture.output();
    let mut gate = Counts::default();
    let outcome = fixture.run(&spec, whole.path(), false, &mut gate, &mut ignore);
    let Ok(Outcome::Finished { summary, .. }) = outcome else { panic!("{outcome:?}") };
    assert!(0 < summary.adapter_step && summary.adapter_step < summary.steps, "{summary:#?}");
    let whole = Bits::of(whole.path());
    for stop in (0..gate.0).step_by(3) {
        let output = fixture.output();
        assert!(fixture.stop_after(stop, &spec, output.path(), false));
        crash(1 + stop as usize % 3, &spec, output.path());
        fixture.finish(&spec, output.path(), true);
        assert_eq!(Bits::of(output.path()), whole, "stopped before piece of work {stop}");
    }
}
