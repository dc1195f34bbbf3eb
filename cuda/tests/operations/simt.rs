//! The stand-in computes what it promises and finds what it promises to find (`cuda/simt/self_test.cu`).

use crate::harness::{ReadBack, poisoned, random, simt, upload, upload_f32};
use finetuned_cuda::kernels::Kernel;
use finetuned_cuda::launcher::{Argument, Launch, Launcher};
use finetuned_cuda::simt::{Order, Simt};
use finetuned_cuda::{Buffer, Element, Error};
use half::bf16;

macro_rules! kernel {
    ($name:literal, $threads:literal) => {{
        static KERNEL: Kernel = Kernel {
            name: $name,
            file: "self_test.cu",
            threads: $threads,
            dynamic_shared: 0,
            registers: 255,
            blocks: 1,
        };
        &KERNEL
    }};
}

fn launch(simt: &Simt, kernel: &'static Kernel, arguments: &[Argument<'_>]) -> Result<(), Error> {
    let launch = Launch { kernel, grid: [1, 1, 1], shared: 0, arguments, within: &[] };
    // SAFETY: the stand-in checks everything itself; that is what is tested here.
    unsafe { simt.launch(&launch) }
}

fn input<T: Element>(buffer: &Buffer<T>) -> Argument<'static> {
    Argument::In(buffer.address(), (buffer.len() * size_of::<T>()) as u64)
}

fn output<T: Element>(buffer: &Buffer<T>) -> Argument<'static> {
    Argument::Out(buffer.address(), (buffer.len() * size_of::<T>()) as u64)
}

#[test]
fn mma_and_ldmatrix_have_the_layouts_of_the_isa() {
    let Some(simt) = simt() else { return };
    let device = simt.device();
    let (a, b, c) = (random(256, 1), random(128, 2), random(128, 3));
    let (da, db, dc) = (upload(&device, &a), upload(&device, &b), upload_f32(&device, &c));
    launch(&simt, kernel!("mma_through_ldmatrix", 32), &[output(&dc), input(&da), input(&db)]).unwrap();
    let found = dc.all().f64();
    for row in 0..16 {
        for col in 0..8 {
            let sum: f64 = (0..16).map(|k| a[row * 16 + k] * b[k * 8 + col]).sum();
            let (found, expected) = (found[row * 8 + col], c[row * 8 + col] + sum);
            assert!((found - expected).abs() < 1e-5, "({row}, {col}): {found} and not {expected}");
        }
    }
    let counters = simt.take_counters()["mma_through_ldmatrix"];
    assert_eq!((counters.mma, counters.ldmatrix, counters.cp_async), (1, 2, 48));
}

#[test]
fn reductions_reach_every_thread() {
    let Some(simt) = simt() else { return };
    let device = simt.device();
    let x = random(64, 4);
    let (dx, out) = (upload_f32(&device, &x), poisoned::<f32>(&device, 5));
    launch(&simt, kernel!("reductions", 64), &[output(&out), input(&dx)]).unwrap();
    let found = out.all().f64();
    assert!((found[0] - x.iter().sum::<f64>()).abs() < 1e-4, "{found:?}");
    assert_eq!(found[1], x.iter().copied().fold(f64::MIN, f64::max));
    assert_eq!(found[2], x[32..].iter().filter(|&&v| v > 0.0).count() as f64);
    assert_eq!((found[3], found[4]), (x[63], x[32]));
}

#[test]
fn copies_land_when_they_are_waited_for() {
    let Some(simt) = simt() else { return };
    let device = simt.device();
    let x = Buffer::from_slice(&device, &(0..256u32).collect::<Vec<_>>()).unwrap();
    let out = poisoned::<u32>(&device, 192);
    launch(&simt, kernel!("copies_land_in_order", 64), &[output(&out), input(&x)]).unwrap();
    let found = out.read(192).unwrap();
    for (i, found) in found.chunks(3).enumerate() {
        // Landed; still under way, so poison; one that copied nothing, so zeros.
        assert_eq!(found, [4 * i as u32, u32::MAX, 0]);
    }
}

#[test]
fn bank_conflicts_are_counted() {
    let Some(simt) = simt() else { return };
    simt.count(true);
    let device = simt.device();
    let out = poisoned::<u32>(&device, 64);
    for (stride, conflicts) in [(1, 0), (2, 1), (32, 31), (33, 0)] {
        launch(&simt, kernel!("strided", 64), &[output(&out), Argument::U32(stride)]).unwrap();
        let counters = simt.take_counters()["strided"];
        // Two warps; 64 stores of a warp to fill the array, without conflicts.
        assert_eq!(counters.bank_conflicts, 2 * conflicts, "stride {stride}");
        assert_eq!(counters.shared_accesses, 2 * (64 + 1));
        assert_eq!(counters.global_store_sectors, 2 * 4);
    }
}

/// What the stand-in says of a kernel with a mistake.
fn fault_of(
    kernel: &'static Kernel,
    arguments: impl Fn(&Buffer<f32>, &Buffer<f32>) -> Vec<Argument<'static>>,
) -> String {
    let Some(simt) = simt() else { return String::new() };
    let device = simt.device();
    let (out, x) = (poisoned::<f32>(&device, 64), upload_f32(&device, &[1.0; 64]));
    match launch(&simt, kernel, &arguments(&out, &x)) {
        Err(Error::Fault { fault, .. }) => fault,
        other => panic!("{}: {other:?} and no fault", kernel.name),
    }
}

fn only_out(out: &Buffer<f32>, _: &Buffer<f32>) -> Vec<Argument<'static>> {
    vec![output(out)]
}

#[track_caller]
fn assert_says(fault: &str, parts: &[&str]) {
    if simt().is_some() {
        for part in parts {
            assert!(fault.contains(part), "`{fault}` does not say `{part}`");
        }
    }
}

#[test]
fn accesses_outside_a_buffer_are_caught() {
    let fault =
        fault_of(kernel!("reads_past_the_end", 32), |out, x| vec![output(out), input(x), Argument::U32(64)]);
    assert_says(
        &fault,
        &["self_test.cu:", "read of 4 bytes at offset 256 of a buffer of 256 bytes", "block 0,0,0, thread 0"],
    );
    let fault = fault_of(kernel!("writes_before_the_start", 32), only_out);
    assert_says(&fault, &["write of 4 bytes at offset -4 of a buffer of 256 bytes"]);
    let fault = fault_of(kernel!("reads_misaligned", 32), |out, x| vec![output(out), input(x)]);
    assert_says(&fault, &["read of 16 bytes", "not aligned"]);
    let fault = fault_of(kernel!("reads_past_shared", 32), only_out);
    assert_says(&fault, &["read of 4 bytes at offset 128 of a shared array of 128 bytes"]);
}

#[test]
fn lanes_that_do_not_take_part_are_caught() {
    assert_says(
        &fault_of(kernel!("shuffles_in_half_a_warp", 32), only_out),
        &["__shfl_xor_sync", "names lanes that have exited (00000001)"],
    );
    assert_says(
        &fault_of(kernel!("disagrees_on_the_mask", 32), only_out),
        &["with mask ffff0000 while lanes"],
    );
    assert_says(
        &fault_of(kernel!("disagrees_on_the_operation", 32), only_out),
        &["__shfl_down_sync", "__shfl_xor_sync"],
    );
    assert_says(&fault_of(kernel!("half_the_block_at_a_barrier", 64), only_out), &["exit", "barrier"]);
    assert_says(
        &fault_of(kernel!("two_barriers_at_a_time", 64), only_out),
        &["__syncthreads, while 32 threads wait"],
    );
}

#[test]
fn races_in_shared_memory_are_caught() {
    assert_says(&fault_of(kernel!("races", 64), only_out), &["race:", "without a barrier"]);
    assert_says(&fault_of(kernel!("races_in_a_loop", 64), only_out), &["race:", "without a barrier"]);
    let fault = fault_of(kernel!("leaves_a_copy", 64), |out, x| vec![output(out), input(x)]);
    assert_says(&fault, &["this copy is still under way"]);
}

#[test]
fn shared_memory_begins_as_nan() {
    let Some(simt) = simt() else { return };
    let out = Buffer::from_slice(&simt.device(), &[0f32; 64]).unwrap();
    launch(&simt, kernel!("reads_what_nobody_wrote", 64), &[output(&out)]).unwrap();
    assert!(out.read(64).unwrap().iter().all(|v| v.is_nan()));
}

#[test]
fn arguments_are_held_against_the_kernel() {
    let an_output = |out: &Buffer<f32>, _: &Buffer<f32>| vec![output(out), output(out)];
    assert_says(
        &fault_of(kernel!("reads_misaligned", 32), an_output),
        &["argument 1 is Out", "the parameter an input"],
    );
    assert_says(&fault_of(kernel!("reads_misaligned", 32), only_out), &["1 arguments for 2 parameters"]);
    let same = |out: &Buffer<f32>, _: &Buffer<f32>| vec![output(out), input(out)];
    assert_says(&fault_of(kernel!("reads_misaligned", 32), same), &["an input overlaps an output"]);
}

#[test]
fn a_result_that_depends_on_the_schedule_is_seen() {
    let Some(simt) = simt() else { return };
    let device = simt.device();
    let run = |order| {
        simt.set_order(order);
        let (out, turn) = (poisoned::<f32>(&device, 8), Buffer::from_slice(&device, &[0u32]).unwrap());
        let arguments = [output(&out), output(&turn)];
        let kernel = kernel!("sums_in_any_order", 32);
        let launch = Launch { kernel, grid: [8, 1, 1], shared: 0, arguments: &arguments, within: &[] };
        // SAFETY: as above.
        unsafe { simt.launch(&launch) }.unwrap();
        out.read(8).unwrap()
    };
    let ascending = run(Order::Ascending);
    assert_eq!(ascending, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    assert_eq!(run(Order::Descending), [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]);
    assert_ne!(run(Order::Shuffled(3)), ascending);
}

/// Nearest, ties to even, as the instruction: against the crate that the CPU backend rounds with.
#[test]
fn rounding_is_that_of_the_cpu_backend() {
    let Some(simt) = simt() else { return };
    let device = simt.device();
    let x: Vec<f32> = (0..100_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect();
    let from = Buffer::from_slice(&device, &x).unwrap();
    let mut to = poisoned::<bf16>(&device, x.len());
    finetuned_cuda::ops::elementwise::cast_to_bf16(x.len(), &from, &mut to).unwrap();
    for (x, y) in x.iter().zip(to.read(x.len()).unwrap()) {
        assert!(y == bf16::from_f32(*x) || (x.is_nan() && y.is_nan()), "{x} became {y}");
    }
}
