//! What does change the result is refused between two attempts, with what was and what is; what does not, is not.

use super::fixture::{Bits, Fixture, checkpoints, expected, ignore, shared};
use finetuned::config::spec::Spec;
use finetuned::train::gate::Open;
use finetuned::train::run::RunError;
use std::path::Path;

/// Tries to go on in `output` under `spec`; the names of what is said to have changed.
fn refused(spec: &Spec, output: &Path) -> Vec<&'static str> {
    let before = std::fs::read_to_string(output.join("spec.resolved.toml")).unwrap();
    let outcome = shared().run(spec, output, true, &mut Open, &mut ignore);
    let Err(error @ RunError::Changed { .. }) = outcome else {
        panic!("this was not refused: {outcome:?}\n{}", spec.to_toml())
    };
    let message = error.to_string();
    let RunError::Changed { mismatch, differences, .. } = error else { unreachable!() };
    let spec_changed = mismatch.changes.iter().any(|(what, ..)| *what == "the spec");
    assert_eq!(spec_changed, differences.contains("in the spec: "), "{message}");
    for (what, before, now) in &mismatch.changes {
        assert_ne!(before, now);
        for part in [*what, before, now] {
            assert!(message.contains(part), "{message} does not say {part}");
        }
        let hashes = before.len() == 64 && now.len() == 64;
        assert!(hashes || *what == "the backend", "{what}: {before}, {now}");
    }
    let after = std::fs::read_to_string(output.join("spec.resolved.toml")).unwrap();
    assert_eq!(before, after, "a refused attempt leaves the spec of the run alone");
    mismatch.changes.into_iter().map(|(what, ..)| what).collect()
}

#[test]
fn a_changed_base_data_template_or_spec() {
    let fixture = shared();
    let output = fixture.output();
    let output = output.path();
    assert!(fixture.stop_after(20, &fixture.spec(&[]), output, false));

    // The same names with other contents, elsewhere.
    let other = Fixture::new(2, 2);
    let other_base = format!("model.base={:?}", other.path("model"));
    assert_eq!(refused(&fixture.spec(&[&other_base]), output), ["the base model"]);
    let other_data = format!("data.train=[{:?}]", other.path("train.jsonl"));
    assert_eq!(refused(&fixture.spec(&[&other_data]), output), ["the data"]);
    let template = Fixture::new(1, 1);
    let path = template.path("model/chat_template.jinja");
    let text = std::fs::read_to_string(&path).unwrap();
    let changed = text.replace("'<|im_end|>' + '\n'", "'<|im_end|>'");
    assert_ne!(text, changed);
    std::fs::write(&path, changed).unwrap();
    let other_template = format!("model.base={:?}", template.path("model"));
    assert_eq!(refused(&fixture.spec(&[&other_template]), output), ["the chat template"]);

    for key in [
        "run.seed=8",
        "model.compute_dtype=bfloat16",
        "model.double_quant=false",
        "data.sequence_length=145",
        "data.packing=false",
        "data.shuffle=false",
        "data.train_on=all",
        "data.eval_fraction=0.2",
        "lora.r=8",
        "lora.alpha=9",
        "lora.dropout=0.2",
        "lora.target_modules=[\"q_proj\"]",
        "lora.layers=0..1",
        "lora.use_rslora=true",
        "train.max_steps=8",
        "train.gradient_accumulation_steps=3",
        "train.learning_rate=6e-3",
        "train.lr_scheduler=linear",
        "train.warmup_steps=1",
        "train.weight_decay=0.02",
        "train.adam_beta1=0.8",
        "train.max_grad_norm=2.0",
        // The best adapter of the evaluations is the result, so their steps count.
        "train.evaluate_every=2",
    ] {
        let changed = refused(&fixture.spec(&[key]), output);
        assert!(changed.contains(&"the spec"), "{key}: {changed:?}");
    }

    // None of this touched the run.
    fixture.finish(&fixture.spec(&[]), output, true);
    assert_eq!(&Bits::of(output), expected());
}

/// The same contents elsewhere, and keys that only say when state is written.
#[test]
fn what_may_change_changes_nothing() {
    let fixture = shared();
    let moved = Fixture::new(1, 1);
    let base = format!("model.base={:?}", moved.path("model"));
    let data = format!("data.train=[{:?}]", moved.path("train.jsonl"));
    let output = fixture.output();
    assert!(fixture.stop_after(20, &fixture.spec(&[]), output.path(), false));
    let spec = fixture.spec(&[
        &base,
        &data,
        "run.name=other",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=1",
        "data.on_bad_row=quarantine",
        "train.backend=cpu",
    ]);
    fixture.finish(&spec, output.path(), true);
    assert_eq!(&Bits::of(output.path()), expected());
    let output = fixture.output();
    fixture.finish(&fixture.spec(&["train.checkpoint_every=0"]), output.path(), false);
    assert_eq!(&Bits::of(output.path()), expected());
}

#[test]
fn a_run_is_not_started_over_another() {
    let fixture = shared();
    let output = fixture.output();
    assert!(fixture.stop_after(9, &fixture.spec(&[]), output.path(), false));
    let before = checkpoints(output.path());
    let outcome = fixture.run(&fixture.spec(&[]), output.path(), false, &mut Open, &mut ignore);
    assert!(matches!(outcome, Err(RunError::Occupied { .. })), "{outcome:?}");
    assert_eq!(checkpoints(output.path()), before);
}
