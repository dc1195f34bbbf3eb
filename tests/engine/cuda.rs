//! The whole model on the CUDA backend: the kernels run on the stand-in, and on a GPU where there is one.
//!
//! Truth is transformers + PEFT in float32 (`golden.rs`). The backend computes in bfloat16, so its errors are held against
//! those of `Cpu::bfloat16()`, which rounds at the same places and sums in another order, and against twice those of the
//! naive bfloat16 computation where they were measured (`bfloat16_stays_near_the_truth`).

use super::golden::{FAMILIES, Golden, curve, gradients};
use super::support::*;
use finetuned::backend::cpu::Cpu;
use finetuned::backend::cuda::{ARITHMETIC, Cuda};
use finetuned::backend::{Backend, Role};
use finetuned::config::spec::{Quantization, Spec};
use finetuned::data::Sequence;
use finetuned::model::adapter::{Adapter, AdapterLayout};
use finetuned::model::decoder::{BatchShape, Decoder, KeyValueCache, Workspace};
use finetuned::model::memory::{self, MicroBatch};
use finetuned::model::weights::Base;
use finetuned::train::schedule::Schedule;
use finetuned::train::trainer::Trainer;
use finetuned_cuda::cubins::Cubins;
use finetuned_cuda::driver::{self, Driver};
use finetuned_cuda::launcher::{Address, Launch, Launcher, Mark};
use finetuned_cuda::simt::{self, Order, Simt};
use finetuned_cuda::{Device, Error, Properties};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};

/// Every device there is, by name.
fn devices() -> Vec<(&'static str, Device)> {
    let mut devices = Vec::new();
    match Simt::new() {
        Ok(simt) => devices.push(("stand-in", simt.device())),
        Err(why) => skipped("simt", &why),
    }
    if driver::is_there() {
        let cache = std::env::temp_dir().join("finetuned-test-kernels");
        let gpu = Driver::open(0, &Cubins::new(Vec::new(), Some(cache), None));
        devices.push(("GPU", Device::new(gpu.unwrap_or_else(|error| panic!("{error}")))));
    } else {
        skipped("gpu", "no CUDA driver");
    }
    devices
}

fn skipped(column: &str, why: &str) {
    eprintln!("SKIPPED: the model on {column}: {why}");
    let required = std::env::var("FINETUNED_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|name| name == column), "{column} is required: {why}");
}

/// The worst relative error of a gradient.
fn worst(golden: &Golden, variant: &str, found: &[Vec<f64>]) -> f64 {
    let truth = tensors(&golden.dir.join(variant).join("golden.safetensors"));
    let errors = found.iter().enumerate().map(|(i, gradient)| {
        let name = golden.layout.name(i);
        relative_error(gradient, &truth[&format!("grad.{name}")])
    });
    errors.fold(0.0, f64::max)
}

#[test]
fn losses_and_gradients_are_those_of_peft() {
    for (device_name, device) in devices() {
        for family in FAMILIES {
            for variant in ["none", "nf4"] {
                let golden = Golden::load(family, variant);
                let rows = golden.sequences("rows");
                let run = |recompute| {
                    let decoder = golden.decoder(Cuda::new(device.clone(), "test"));
                    let adapter = golden.adapter(&decoder.backend);
                    gradients(&golden, &decoder, &adapter, &rows, recompute)
                };
                let (losses, found) = run(false);
                let decoder = golden.decoder(Cpu::<f32>::bfloat16());
                let (_, of_cpu) =
                    gradients(&golden, &decoder, &golden.adapter(&decoder.backend), &rows, false);
                for (i, loss) in losses.iter().enumerate() {
                    let want = golden.json["loss_sum"][i].as_f64().unwrap();
                    assert!((loss / want - 1.0).abs() < 1e-2, "{family} {variant}: loss {loss}, not {want}");
                }
                let (error, bound) = (worst(&golden, variant, &found), worst(&golden, variant, &of_cpu));
                eprintln!("{device_name} {family} {variant}: {error:.2e}, the CPU's {bound:.2e}");
                assert!(
                    error < 2.0 * bound,
                    "{device_name} {family} {variant}: gradients are off by {error:e}, the CPU's by {bound:e}"
                );
                assert_eq!(run(true), (losses, found), "{device_name} {family} {variant}: recomputed");
            }
        }
    }
}

#[test]
fn ten_steps_are_those_of_peft() {
    let families =
        [("llama", "nf4"), ("llama3", "none"), ("mistral", "nf4"), ("qwen2", "none"), ("qwen3", "nf4")];
    for (device_name, device) in devices() {
        for (family, variant) in families {
            let golden = Golden::load(family, variant);
            let found = curve(&golden, &golden.decoder(Cuda::new(device.clone(), "test")));
            let of_cpu = curve(&golden, &golden.decoder(Cpu::<f32>::bfloat16()));
            eprintln!("{device_name} {family} {variant}: {found:?}, the CPU's {of_cpu:?}");
            // Two units in bfloat16's last place, 2⁻⁷, however lucky the CPU was.
            for (error, bound) in found.iter().zip(of_cpu) {
                assert!(
                    *error < (2.0 * bound).max(1.0 / 128.0),
                    "{device_name} {family} {variant}: off by {found:?}, the CPU by {of_cpu:?}"
                );
            }
        }
    }
}

/// Sequences that differ in length, with a row of packed examples among them.
fn sequences(golden: &Golden) -> Vec<Sequence> {
    let mut rows = golden.sequences("sequences");
    rows.truncate(4);
    let mut packed = rows[0].clone();
    packed.tokens.extend(&rows[1].tokens);
    packed.targets.extend(&rows[1].targets);
    packed.positions.extend(&rows[1].positions);
    packed.cu_seqlens.push(packed.tokens.len() as u32);
    rows.push(packed);
    rows.swap(1, 4);
    rows
}

/// A step of `sequences`, cut into micro-batches of `size`, with dropout: losses and the gradients' bits.
fn step(
    golden: &Golden,
    decoder: &Decoder<Cuda>,
    sequences: &[Sequence],
    size: usize,
) -> (Vec<f64>, Vec<u32>) {
    let mut layout: AdapterLayout = golden.layout.clone();
    layout.dropout = 0.1;
    let adapter = golden.adapter(&decoder.backend);
    let mut gradients = Adapter::zeros(&decoder.backend, &layout, Role::Sums);
    let tokens: usize = sequences.iter().map(|s| s.tokens.len()).sum();
    let mut work = Workspace::new(decoder, &layout, tokens, true);
    let mut losses = Vec::new();
    for (i, chunk) in sequences.chunks(size).enumerate() {
        let mut batch = finetuned::backend::Batch::default();
        for (j, s) in chunk.iter().enumerate() {
            let key = 7 + (i * size + j) as u64;
            batch.push(&s.tokens, &s.targets, &s.positions, &s.cu_seqlens, key);
        }
        let shape = BatchShape::of(&batch);
        let batch = decoder.batch(batch);
        losses.extend(decoder.loss_and_gradients(
            &batch,
            shape,
            &layout,
            &adapter,
            &mut gradients,
            &mut work,
        ));
    }
    let bits = |i: usize| gradients.read(&decoder.backend, &layout, i).into_iter().map(f32::to_bits);
    (losses, (0..layout.tensors()).flat_map(bits).collect())
}

#[test]
fn the_cut_into_micro_batches_does_not_change_a_bit() {
    for (device_name, device) in devices() {
        for (family, variant) in [("llama", "nf4"), ("qwen3", "none")] {
            let golden = Golden::load(family, variant);
            let decoder = golden.decoder(Cuda::new(device.clone(), "test"));
            let sequences = sequences(&golden);
            let whole = step(&golden, &decoder, &sequences, sequences.len());
            assert!(whole.1.iter().any(|bits| *bits != 0));
            for size in [1, 2, 3] {
                let cut = step(&golden, &decoder, &sequences, size);
                assert!(cut == whole, "{device_name} {family} {variant}: in micro-batches of {size}");
            }
        }
    }
}

/// On the stand-in, threads and blocks in three orders; on a GPU, twice.
#[test]
fn the_schedule_does_not_change_a_bit() {
    let golden = Golden::load("qwen2", "nf4");
    let Ok(simt) = Simt::new() else { return };
    let run = |device: Device| {
        let decoder = golden.decoder(Cuda::new(device, "test"));
        step(&golden, &decoder, &sequences(&golden), 2)
    };
    let first = run(simt.device());
    for order in [Order::Descending, Order::Shuffled(11)] {
        let other = Simt::new().unwrap();
        other.set_order(order);
        assert!(run(other.device()) == first, "{order:?}");
    }
    for (_, gpu) in devices().into_iter().filter(|(name, _)| *name == "GPU") {
        assert!(run(gpu.clone()) == run(gpu));
    }
}

/// A whole step, forward and back with dropout, with the kernels compiled for the address and undefined-behaviour
/// sanitizers, in a process of its own.
#[test]
fn a_step_runs_under_the_sanitizers() {
    let environment = match simt::sanitizer_environment() {
        Ok(environment) => environment,
        Err(why) => return skipped("sanitizers", &why),
    };
    if simt::sanitized() {
        return; // this is that process
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["cuda::cuda_bits_are_those_of_this_arithmetic", "--exact"])
        .envs(environment)
        .output()
        .unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    assert!(said.contains("1 passed"), "{said}");
}

/// A text that grows by one token at a time has the logits of the text as a whole.
#[test]
fn generation_is_the_model_of_training() {
    for (device_name, device) in devices() {
        for (family, variant) in [("llama", "nf4"), ("mistral", "none"), ("qwen3", "nf4")] {
            let golden = Golden::load(family, variant);
            let decoder = golden.decoder(Cuda::new(device.clone(), "test"));
            let adapter = golden.adapter(&decoder.backend);
            let row = &golden.sequences("rows")[0];
            let mut work = Workspace::for_evaluation(&decoder, &golden.layout, row.len());
            let whole = decoder.batch(batch(std::slice::from_ref(row)));
            let expected = decoder.all_logits(&whole, row.len(), &golden.layout, &adapter, &mut work);
            let mut cache = KeyValueCache::new(&decoder, row.len());
            let prompt = row.len() / 2;
            let pieces = std::iter::once(0..prompt).chain((prompt..row.len()).map(|t| t..t + 1));
            for piece in pieces {
                let last = piece.end - 1;
                let mut part = finetuned::backend::Batch::default();
                let positions: Vec<u32> = piece.clone().map(|t| t as u32).collect();
                let targets = vec![-1; piece.len()];
                part.push(&row.tokens[piece.clone()], &targets, &positions, &[0, piece.len() as u32], 0);
                let part = decoder.batch(part);
                let found = decoder.generate_step(
                    &part,
                    piece.len(),
                    &golden.layout,
                    &adapter,
                    &mut cache,
                    &mut work,
                );
                let as_f64 = |logits: &[f32]| logits.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
                let error = relative_error(&as_f64(&found), &as_f64(&expected[last]));
                assert!(error < 1.0 / 64.0, "{device_name} {family} {variant} at {last}: off by {error:e}");
            }
        }
    }
}

/// The gradients' very bits on the stand-in. When a change is meant to alter them, raise `ARITHMETIC` and write down the
/// new hash: runs that were begun with the old arithmetic are then not continued with the new one.
#[test]
fn cuda_bits_are_those_of_this_arithmetic() {
    use sha2::{Digest, Sha256};
    let Ok(simt) = Simt::new() else { return };
    if !cfg!(target_arch = "x86_64") {
        eprintln!(
            "skipped: the hash was taken on x86-64, whose C library the stand-in computes exponentials with"
        );
        return;
    }
    let golden = Golden::load("qwen3", "nf4");
    let decoder = golden.decoder(Cuda::new(simt.device(), "test"));
    assert!(decoder.backend.identity().starts_with("cuda bfloat16 arithmetic"));
    let (losses, bits) = step(&golden, &decoder, &sequences(&golden), 3);
    let mut hash = Sha256::new();
    losses.iter().for_each(|v| hash.update(v.to_le_bytes()));
    bits.iter().for_each(|v| hash.update(v.to_le_bytes()));
    let hash: String = hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
    assert_eq!((ARITHMETIC, hash.as_str()), (1, "9c607fb808d7b9d2"));
}

/// Another launcher, which counts what is allocated.
struct Counting {
    inner: Arc<Simt>,
    allocations: AtomicUsize,
    bytes: AtomicU64,
}

// SAFETY (of every call): the caller's promise is handed on as it is.
impl Launcher for Counting {
    fn properties(&self) -> &Properties {
        self.inner.properties()
    }
    fn allocate(&self, bytes: u64) -> Result<Address, Error> {
        self.allocations.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
        self.inner.allocate(bytes)
    }
    unsafe fn free(&self, address: Address) {
        unsafe { self.inner.free(address) }
    }
    unsafe fn copy_in(&self, to: Address, from: &[u8]) -> Result<(), Error> {
        unsafe { self.inner.copy_in(to, from) }
    }
    unsafe fn copy_out(&self, from: Address, to: &mut [u8]) -> Result<(), Error> {
        unsafe { self.inner.copy_out(from, to) }
    }
    unsafe fn copy(&self, to: Address, from: Address, bytes: u64) -> Result<(), Error> {
        unsafe { self.inner.copy(to, from, bytes) }
    }
    unsafe fn fill(&self, at: Address, byte: u8, bytes: u64) -> Result<(), Error> {
        unsafe { self.inner.fill(at, byte, bytes) }
    }
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        unsafe { self.inner.launch(launch) }
    }
    fn synchronize(&self) -> Result<(), Error> {
        self.inner.synchronize()
    }
    fn mark(&self) -> Result<Mark, Error> {
        self.inner.mark()
    }
    fn elapsed(&self, from: Mark, to: Mark) -> Result<f64, Error> {
        self.inner.elapsed(from, to)
    }
    fn free_memory(&self) -> Result<u64, Error> {
        self.inner.free_memory()
    }
}

/// All memory is there before the first step but for the table of rotary angles (sines and cosines), and nothing is taken
/// after it, however the micro-batches differ.
#[test]
fn no_step_takes_memory() {
    let Ok(simt) = Simt::new() else { return };
    let counting =
        Arc::new(Counting { inner: simt, allocations: AtomicUsize::new(0), bytes: AtomicU64::new(0) });
    let golden = Golden::load("qwen2", "nf4");
    let mut layout = golden.layout.clone();
    layout.dropout = 0.1;
    let rows = sequences(&golden);
    let longest = rows.iter().map(|s| s.tokens.len()).max().unwrap();
    let capacity = 3 * longest;

    let backend = Cuda::new(Device::new(counting.clone()), "test");
    let cache = tempfile::tempdir().unwrap();
    let model = golden.dir.join("model");
    let base = Base::load(&model, Quantization::Nf4, true, cache.path(), &mut |_, _| {}).unwrap();
    let largest = MicroBatch { tokens: capacity, labelled: capacity, longest };
    let shape = memory::step_shape(&base, &layout, largest);
    let planned = backend.scratch_bytes(shape);
    backend.reserve(shape);
    let reserved = counting.bytes.load(Relaxed);
    assert!(reserved >= planned, "{reserved} bytes were reserved, {planned} planned");
    let decoder = Decoder::new(backend, base);
    let mut trainer = Trainer::new(decoder, layout, 5, capacity, true);
    let spec =
        Spec::parse("[model]\nbase = \"x\"\n[data]\ntrain = [\"y\"]\n", "t", Path::new("/"), &[]).unwrap();
    let schedule = Schedule::new(&spec.train, 4);
    let prepared = counting.allocations.load(Relaxed);
    let mut counts = Vec::new();
    for step in 0..3 {
        let mut labelled = 0;
        for size in [3, 1, 2] {
            let part: Vec<_> = rows.iter().cycle().skip(step + size).take(size).cloned().zip(7..).collect();
            labelled += trainer.micro_step(&part, 0.0).labelled;
        }
        let norm = trainer.gradient_norm(labelled);
        trainer.update(&spec.train, &schedule, step as u64, labelled, norm);
        counts.push(counting.allocations.load(Relaxed) - prepared);
    }
    assert!(counts[0] <= 2, "{counts:?}");
    assert_eq!(counts, [counts[0]; 3]);
}
