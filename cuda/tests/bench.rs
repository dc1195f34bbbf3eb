//! The bench of the kernels, on the stand-in: everything runs, is counted and is chosen as on a GPU. Its times are no speeds.

use finetuned_cuda::bench::{Model, OPERATIONS, Options, run};
use finetuned_cuda::simt::Simt;
use finetuned_cuda::tuned::{TABLES, Tuned};
use std::collections::BTreeSet;

fn tiny() -> Options {
    let model = Model {
        name: "tiny",
        hidden: 64,
        intermediate: 128,
        layers: 2,
        heads: 2,
        kv_heads: 1,
        head_dim: 64,
        vocabulary: 40,
        tied: true,
    };
    Options {
        models: vec![model],
        tokens: vec![8],
        longest: 5,
        kernels: Vec::new(),
        samples: 3,
        seconds: 0.0,
        flush: Some(1 << 10),
        rounds: 1,
        copied: 1 << 12,
        rank: 8,
    }
}

fn stand_in() -> Option<std::sync::Arc<Simt>> {
    match Simt::new() {
        Ok(simt) => Some(simt),
        Err(why) => {
            let required =
                std::env::var("FINETUNED_REQUIRE").is_ok_and(|list| list.split(',').any(|c| c == "simt"));
            assert!(!required, "{why}");
            eprintln!("SKIPPED: the bench: {why}");
            None
        }
    }
}

#[test]
fn every_operation_is_measured_and_counted() {
    let Some(simt) = stand_in() else { return };
    let mut heard = 0;
    let report = run(&simt.device(), &tiny(), &mut |_| {
        heard += 1;
        true
    })
    .unwrap();
    assert!(report.stand_in);
    assert_eq!(heard, OPERATIONS.len());
    assert!(report.left_out.is_empty());
    let found: BTreeSet<&str> = report.rows.iter().map(|row| row.operation).collect();
    assert_eq!(found, OPERATIONS.iter().copied().collect());
    assert!(report.ceilings.mma > 0.0 && report.ceilings.copy > 0.0);
    for row in &report.rows {
        assert!(row.seconds.count == 3 && row.seconds.median > 0.0 && row.bytes > 0.0, "{row:?}");
    }

    // gate and up: 8 rows of 64 columns with 2 · 128 outputs, rank 8. 2 · 8 · (16,384 + 8 · 2 · 192) operations; X, Y, A, B,
    // twice U in bf16, and the weights: 0.516 or 4.516 bytes each.
    let of = |kernel: &str| {
        let mut rows =
            report.rows.iter().filter(|row| row.operation == "linear" && row.kernel == Some(kernel));
        rows.find(|row| row.shape == "gate,up [8×64]·[128+128]").unwrap()
    };
    let halves = 8.0 * (64.0 + 256.0) + 8.0 * 2.0 * 192.0 + 2.0 * 8.0 * 8.0 * 2.0;
    let (fused, plain) = (of("gemm_nf4_nt_32x64"), of("gemm_nt_128x128"));
    assert_eq!(fused.operations, 2.0 * 8.0 * (16_384.0 + 8.0 * 2.0 * 192.0));
    assert!((fused.bytes - (2.0 * halves + 0.515_869 * 16_384.0)).abs() < 1.0, "{}", fused.bytes);
    assert!((plain.bytes - fused.bytes - 4.0 * 16_384.0).abs() < 1e-6);

    // Two sequences of 5 and 3 tokens: 34 squares, 128 columns, 2 operations; backward 2.5 times that.
    let attention = |name| report.rows.iter().find(|row| row.operation == name).unwrap().operations;
    assert_eq!(attention("attention"), 2.0 * 34.0 * 128.0);
    assert_eq!(attention("attention-backward"), 5.0 * 34.0 * 128.0);

    // All kernels of all tables were measured, so each has a measured table, which is one that can be read.
    let (tuned, problems) = Tuned::new(&report.tiles);
    assert!(problems.is_empty(), "{problems:?}");
    for (name, table) in TABLES {
        let row = tuned.row(name, 8).unwrap_or_else(|| panic!("{name}"));
        assert!(table.iter().any(|of| std::ptr::eq(of, row)));
    }
}

#[test]
fn only_what_was_asked_for_is_measured_and_every_sample_dequantises() {
    let Some(simt) = stand_in() else { return };
    let options = Options { kernels: vec!["gemm_nt_128x128".into()], ..tiny() };
    simt.count(true);
    let report = run(&simt.device(), &options, &mut |_| true).unwrap();
    assert!(report.rows.iter().all(|row| row.kernel == Some("gemm_nt_128x128")), "{:?}", report.rows);
    let operations: BTreeSet<&str> = report.rows.iter().map(|row| row.operation).collect();
    assert_eq!(operations, BTreeSet::from(["linear", "linear-bf16"]));
    assert!(report.tiles.is_empty(), "a table of one kernel is no table: {:?}", report.tiles);
    // Two samples that do not count and three that do, of 7 weights.
    let counters = simt.take_counters();
    let unpacked: u64 = 5 * (128 * 64 + 2 * 64 * 64 + 64 * 128 + 2 * 128 * 64 + 64 * 128);
    assert_eq!(counters["gemm_unpack"].global_store_bytes, 2 * unpacked);
}

#[test]
fn it_ends_when_it_is_told_to() {
    let Some(simt) = stand_in() else { return };
    let options = Options { kernels: vec!["rope".into(), "swiglu".into()], ..tiny() };
    let mut heard = Vec::new();
    let report = run(&simt.device(), &options, &mut |title| {
        heard.push(title.to_string());
        heard.len() < 2
    })
    .unwrap();
    assert_eq!(heard, ["tiny rope, 8 tokens", "tiny swiglu, 8 tokens"]);
    assert_eq!(report.rows.len(), 1);
}
