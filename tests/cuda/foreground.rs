//! `finetuned run` and `finetuned generate`.

use crate::fixture::{Bits, shared};
use crate::support::{Said, assert_nothing_published, call, stand_in, train, undisturbed};
use finetuned_cuda::libcuda::Libcuda;
use std::path::Path;

/// Checkpoints that were announced on standard output.
fn announced(said: &Said) -> usize {
    said.out.lines().filter(|line| line.starts_with("checkpoint ")).count()
}

/// Resumes where nothing fails any more.
#[track_caller]
fn assert_resumes(stand_in: &Libcuda, output: &Path) {
    let said = train(stand_in, output, &[], &[]);
    assert_eq!(said.code, Some(0), "{}\n{}", said.out, said.err);
    assert_eq!(&Bits::of(output), &undisturbed(stand_in).0);
}

/// Kernels fail while the base is taken to the device, in the first step, between two checkpoints and at the very end: at
/// once, or on the device, so that a later call says it.
#[test]
fn a_run_whose_kernel_fails_ends_and_the_next_goes_on_to_the_same_bits() {
    let Some(stand_in) = stand_in() else { return };
    let launches = undisturbed(stand_in).1.count("cuLaunchKernel");
    let mut seen = Vec::new();
    for (code, how, share) in [(719, '~', 0), (700, '@', 45), (716, '~', 80), (715, '~', 100)] {
        let number = (launches * share / 100).max(1);
        let output = shared().output();
        let fail = format!("{code}{how}cuLaunchKernel:{number}");
        let said = train(stand_in, output.path(), &[], &[("FINETUNED_LIBCUDA_FAIL", &fail)]);
        let error = said.refusal(4);
        assert!(error.contains(&format!("CUDA error {code} (CUDA_ERROR_")), "{fail}: {error}");
        assert!(error.contains("help: ") && error.contains("--resume goes on from it"), "{error}");
        assert_eq!(said.calls.last().unwrap().2, code, "{fail}: the device was used after it had failed");
        assert_nothing_published(output.path(), announced(&said));
        seen.push(announced(&said));
        assert_resumes(stand_in, output.path());
    }
    // The first ended before any checkpoint, the last before the last of them.
    let all = announced(&undisturbed(stand_in).1);
    assert!(seen[0] == 0 && seen[1] > 0 && seen[3] + 1 == all, "{seen:?} of {all}");
}

#[test]
fn memory_that_runs_out_is_a_limit() {
    let Some(stand_in) = stand_in() else { return };
    let taken = undisturbed(stand_in).1.count("cuMemAlloc");
    for number in [1, taken] {
        let output = shared().output();
        let fail = format!("2@cuMemAlloc:{number}");
        let said = train(stand_in, output.path(), &[], &[("FINETUNED_LIBCUDA_FAIL", &fail)]);
        let error = said.refusal(9);
        assert!(error.contains("bytes of device memory") && error.contains("out of memory"), "{error}");
        assert_nothing_published(output.path(), announced(&said));
    }
}

/// No memory is taken after the first step: what fits then fits to the end.
#[test]
fn no_step_but_the_first_takes_memory() {
    let Some(stand_in) = stand_in() else { return };
    let calls = &undisturbed(stand_in).1.calls;
    let last_of =
        |name: &str| calls.iter().rposition(|(called, ..)| called.trim_end_matches("_v2") == name).unwrap();
    let updates: Vec<usize> =
        (0..calls.len()).filter(|&i| calls[i].0 == "cuLaunchKernel" && calls[i].1 == "adamw").collect();
    assert_eq!(updates.len(), 3, "one a step");
    assert!(
        last_of("cuMemAlloc") < updates[0],
        "taken at call {}, updates at {updates:?}",
        last_of("cuMemAlloc")
    );
}

#[test]
fn a_gpu_that_cannot_be_used_is_an_error_or_a_note() {
    let Some(stand_in) = stand_in() else { return };
    for (device, sentence) in [
        ("driver=11040", "the CUDA driver supports 11.4, and 12.2 (JetPack 6) is needed"),
        ("devices=0", "no CUDA device 0: the driver knows 0"),
        ("sm=72", "has compute capability 7.2, and 8.0 (Ampere) is needed"),
    ] {
        let environment = [("FINETUNED_LIBCUDA_DEVICE", device)];
        let output = shared().output();
        let said = train(stand_in, output.path(), &[], &environment);
        assert!(said.refusal(4).contains(sentence), "{}", said.err);
        assert_nothing_published(output.path(), 0);
        let said = train(stand_in, output.path(), &["train.backend=auto", "train.max_steps=1"], &environment);
        assert_eq!(said.code, Some(0), "{}", said.err);
        let all = said.out.clone() + &said.err;
        let note = all.lines().find(|line| line.contains("computing on the CPU: "));
        assert!(note.is_some_and(|note| note.contains(sentence)), "{all}");
    }
}

/// A device that reports an error while it is opened is no reason to compute on the CPU.
#[test]
fn a_gpu_that_fails_when_it_is_opened_is_an_error_with_auto_too() {
    let Some(stand_in) = stand_in() else { return };
    for (fail, code) in
        [("999@cuInit:1", 4), ("214@cuModuleLoadData:2", 4), ("2@cuDevicePrimaryCtxRetain:1", 9)]
    {
        let output = shared().output();
        let environment = [("FINETUNED_LIBCUDA_FAIL", fail)];
        let said = train(stand_in, output.path(), &["train.backend=auto"], &environment);
        let error = said.refusal(code);
        assert!(error.starts_with("error: the GPU cannot be used: "), "{error}");
        assert_nothing_published(output.path(), 0);
    }
}

#[test]
fn an_answer_ends_where_the_gpu_fails() {
    let Some(stand_in) = stand_in() else { return };
    let ask = [
        "generate",
        "--model",
        "model",
        "--backend",
        "cuda",
        "--prompt",
        "add 1 and 2",
        "--max-new-tokens",
        "4",
    ];
    let whole = call(stand_in, &ask, &[]);
    assert_eq!(whole.code, Some(0), "{}", whole.err);
    let launches = whole.count("cuLaunchKernel");
    let fail = format!("719@cuLaunchKernel:{launches}");
    let said = call(stand_in, &ask, &[("FINETUNED_LIBCUDA_FAIL", &fail)]);
    assert!(said.err.contains("CUDA error 719"), "{}", said.err);
    assert_eq!(said.code, Some(4));
    assert!(!said.err.contains("--resume"), "{}", said.err);
}
