//! How long a base takes to load, and how much memory; a measurement, so it runs only when asked:
//!
//! ```text
//! FINETUNED_MODEL=DIR cargo test --test base_load -- --ignored --nocapture
//! ```

use finetuned::backend::{FrozenMatrix, nf4};
use finetuned::config::spec::Quantization;
use finetuned::model::weights::Base;
use std::path::Path;
use std::time::Instant;

/// A line of `/proc/self/status`, in MiB.
fn status(key: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|l| l.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}

#[test]
#[ignore = "a measurement; needs FINETUNED_MODEL"]
fn load_twice() {
    let model = std::env::var("FINETUNED_MODEL").expect("FINETUNED_MODEL is the directory of a model");
    let cache = tempfile::tempdir().unwrap();
    for (what, cache) in [
        ("first, quantised into the cache", cache.path()),
        ("second, from the cache", cache.path()),
        ("third, from the cache", cache.path()),
        ("without a cache", Path::new("/dev/null/none")),
    ] {
        std::fs::write("/proc/self/clear_refs", "5").unwrap(); // start the peak anew
        let start = Instant::now();
        let base = Base::load(Path::new(&model), Quantization::Nf4, true, cache, &mut |_, _| {}).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "{what}: {seconds:.3} s, peak {:.0} MiB, then {:.0} MiB ({:.0} MiB of it not file-backed); {} parameters, {:?}",
            status("VmHWM"),
            status("VmRSS"),
            status("RssAnon"),
            base.total_parameters(),
            base.cache
        );
    }
}

#[test]
#[ignore = "a measurement"]
fn throughput() {
    let (rows, cols) = (4096, 4096);
    let values: Vec<f32> = (0..rows * cols).map(|i| ((i * 7919) % 1009) as f32 / 1009.0 - 0.5).collect();
    let mut out = vec![0.0; rows * cols];
    for _ in 0..3 {
        let start = Instant::now();
        let matrix = nf4::quantize(&values, rows, cols, true).unwrap();
        let quantized = start.elapsed().as_secs_f64();
        let start = Instant::now();
        matrix.dequantize_rows(0..rows, &mut out);
        let dequantized = start.elapsed().as_secs_f64();
        let rate = |seconds: f64| (rows * cols) as f64 / seconds / 1e6;
        println!(
            "quantise {:.0} M elements/s on {} threads, dequantise {:.0} M elements/s on one",
            rate(quantized),
            std::thread::available_parallelism().unwrap(),
            rate(dequantized)
        );
    }
}

/// A checkpoint that bitsandbytes quantised (FINETUNED_BNB_MODEL) has the same values as the model it was made from
/// (FINETUNED_MODEL), quantised here.
#[test]
#[ignore = "needs FINETUNED_MODEL and FINETUNED_BNB_MODEL"]
fn a_bitsandbytes_checkpoint_equals_what_we_quantise() {
    let load = |variable: &str, double_quant: bool| {
        let model = std::env::var(variable).expect("directory of a model");
        let none = Path::new("/dev/null/none");
        Base::load(Path::new(&model), Quantization::Nf4, double_quant, none, &mut |_, _| {}).unwrap()
    };
    let theirs = load("FINETUNED_BNB_MODEL", true);
    let ours = load("FINETUNED_MODEL", theirs.double_quant);
    let mut matrices = 0;
    for (theirs, ours) in theirs.layers.iter().zip(&ours.layers) {
        for (theirs, ours) in theirs.linears().into_iter().zip(ours.linears()) {
            let (FrozenMatrix::Nf4(theirs), FrozenMatrix::Nf4(ours)) = (&theirs.weight, &ours.weight) else {
                panic!("a weight is not quantised")
            };
            assert!(theirs.codes.as_bytes() == ours.codes.as_bytes());
            assert!((0..ours.blocks()).all(|i| ours.absmax_at(i).to_bits() == theirs.absmax_at(i).to_bits()));
            matrices += 1;
        }
    }
    println!("{matrices} matrices have the same bits, double quantisation {}", theirs.double_quant);
}
