//! What must not change a bit: threads, recompute, the split of a batch, stops at any point.

use super::fixture::{Bits, Counts, Fixture, expected, ignore, shared};
use finetuned::train::run::Outcome;

/// Every split of a step's 8 sequences.
const SPLITS: [[&str; 2]; 4] = [
    ["train.micro_batch_size=8", "train.gradient_accumulation_steps=1"],
    ["train.micro_batch_size=4", "train.gradient_accumulation_steps=2"],
    ["train.micro_batch_size=2", "train.gradient_accumulation_steps=4"],
    ["train.micro_batch_size=1", "train.gradient_accumulation_steps=8"],
];

fn with_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

/// What a run of the shared fixture leaves with `overrides`.
fn bits(fixture: &Fixture, overrides: &[&str]) -> Bits {
    let output = fixture.output();
    fixture.finish(&fixture.spec(overrides), output.path(), false);
    Bits::of(output.path())
}

#[test]
fn the_fixture_exercises_what_it_should() {
    let fixture = shared();
    let output = fixture.output();
    let mut gate = Counts::default();
    let outcome = fixture.run(
        &fixture.spec(&["train.micro_batch_size=1", "train.gradient_accumulation_steps=8"]),
        output.path(),
        false,
        &mut gate,
        &mut ignore,
    );
    let Ok(Outcome::Finished { summary, .. }) = outcome else { panic!("{outcome:?}") };
    eprintln!("{} pieces of work, {summary:#?}", gate.0);
    assert!(summary.epochs > 2.0, "several epochs, with a last step that is not full");
    assert!(gate.0 > 7 * 4, "several micro-steps a step");
    assert!(summary.best_eval_loss < summary.baseline_eval_loss, "it learns");
    assert_eq!(&Bits::of(output.path()), expected());
}

#[test]
fn one_two_and_five_threads() {
    for threads in [1, 2, 5] {
        let found = with_threads(threads, || bits(shared(), &[]));
        assert_eq!(&found, expected(), "{threads} threads");
    }
}

#[test]
fn recompute_and_every_split_of_the_batch() {
    for recompute in ["none", "full"] {
        for split in SPLITS {
            let recompute = format!("train.gradient_checkpointing={recompute}");
            let found = bits(shared(), &[split[0], split[1], &recompute]);
            assert_eq!(&found, expected(), "{split:?}, {recompute}");
        }
    }
}

#[test]
fn without_a_quantised_base_too() {
    let plain = "model.quantization=none";
    let first = with_threads(1, || bits(shared(), &[plain]));
    for (threads, split) in [(5, SPLITS[0]), (2, SPLITS[3])] {
        let found = with_threads(threads, || {
            bits(shared(), &[plain, split[0], split[1], "train.gradient_checkpointing=full"])
        });
        assert_eq!(found, first);
    }
    assert_ne!(first.adapter, expected().adapter);
}

/// Sums over tokens deeper than one block of the product.
#[test]
fn long_sequences() {
    let long = "data.sequence_length=512";
    let first = with_threads(1, || bits(shared(), &[long]));
    for (threads, split) in [(5, SPLITS[0]), (2, SPLITS[3])] {
        let found = with_threads(threads, || bits(shared(), &[long, split[0], split[1]]));
        assert_eq!(found, first);
    }
}

#[test]
fn another_seed_is_another_result() {
    let other = bits(shared(), &["run.seed=8"]);
    assert_ne!(other.adapter, expected().adapter);
    assert_ne!(other.metrics, expected().metrics);
}

/// Stops a run before every piece of work it has (the finest split: every sequence), and goes on under another split,
/// another recompute mode and another number of threads.
#[test]
fn stopping_anywhere_and_going_on_otherwise() {
    let fixture = shared();
    let finest = fixture.spec(&SPLITS[3]);
    let mut gate = Counts::default();
    let whole = fixture.output();
    fixture.run(&finest, whole.path(), false, &mut gate, &mut ignore).unwrap();
    for stop in 0..gate.0 {
        let output = fixture.output();
        assert!(fixture.stop_after(stop, &finest, output.path(), false));
        let i = stop as usize;
        let split = SPLITS[i % 4];
        let recompute = ["train.gradient_checkpointing=full", "train.gradient_checkpointing=none"][i / 4 % 2];
        let spec = fixture.spec(&[split[0], split[1], recompute]);
        with_threads([1, 2, 5][i % 3], || fixture.finish(&spec, output.path(), true));
        assert_eq!(&Bits::of(output.path()), expected(), "stopped before piece of work {stop}");
    }
}

/// A run that is stopped again and again after a few pieces of work: more than a step's, fewer than two steps'.
#[test]
fn many_short_attempts() {
    let fixture = shared();
    for (asks, split) in [(3, SPLITS[3]), (5, SPLITS[3]), (2, SPLITS[2]), (3, SPLITS[1])] {
        let spec = fixture.spec(&split);
        let output = fixture.output();
        let mut attempts = 1;
        while fixture.stop_after(asks, &spec, output.path(), attempts > 1) {
            attempts += 1;
            assert!(attempts < 100, "no progress with {asks} pieces of work an attempt");
        }
        assert!(attempts > 5, "{attempts} attempts");
        assert_eq!(&Bits::of(output.path()), expected(), "{attempts} attempts");
    }
}

/// Resuming a finished run changes nothing.
#[test]
fn resuming_a_finished_run() {
    let fixture = shared();
    let output = fixture.output();
    fixture.finish(&fixture.spec(&[]), output.path(), false);
    fixture.finish(&fixture.spec(&[]), output.path(), true);
    assert_eq!(&Bits::of(output.path()), expected());
}

#[test]
fn bfloat16() {
    let fixture = shared();
    let dtype = "model.compute_dtype=bfloat16";
    let first = with_threads(1, || bits(fixture, &[dtype]));
    assert_ne!(first.adapter, expected().adapter);
    for (i, split) in SPLITS.iter().enumerate() {
        let recompute = ["train.gradient_checkpointing=full", "train.gradient_checkpointing=none"][i % 2];
        let found = with_threads(i + 1, || bits(fixture, &[dtype, split[0], split[1], recompute]));
        assert_eq!(found, first, "{split:?}, {recompute}");
    }
    for (stop, before, after) in
        [(3, SPLITS[3], SPLITS[0]), (11, SPLITS[3], SPLITS[2]), (17, SPLITS[2], SPLITS[3])]
    {
        let output = fixture.output();
        let spec = fixture.spec(&[dtype, before[0], before[1]]);
        assert!(fixture.stop_after(stop, &spec, output.path(), false));
        let spec = fixture.spec(&[dtype, after[0], after[1], "train.gradient_checkpointing=full"]);
        fixture.finish(&spec, output.path(), true);
        assert_eq!(Bits::of(output.path()), first, "stopped before piece of work {stop}");
    }
}
