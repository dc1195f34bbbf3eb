use crate::harness::{ReadBack, Values, counted, everywhere, poisoned, random, same_bits, upload_f32};
use finetuned_cuda::ops::adamw::{PARTIALS, Parameters, Step, adamw, adamw_clipped, square_sum};
use finetuned_cuda::{Buffer, Device};
use half::bf16;

/// One element, beyond a block of threads (1024 elements), several chunks, chunks of more than that.
const SIZES: [usize; 6] = [0, 1, 3, 1025, 20_001, 262_147];

fn step(number: u64, max_norm: f64) -> Step {
    Step {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: number,
        scale: 1.0 / 37.0,
        max_norm,
    }
}

fn parameters(device: &Device, len: usize) -> Parameters {
    Parameters {
        value: upload_f32(device, &random(len, 1)),
        working: poisoned(device, len),
        m: upload_f32(device, &vec![0.0; len]),
        v: upload_f32(device, &vec![0.0; len]),
    }
}

/// Two steps as the CPU backend computes them, in f32, given the norms.
fn expected(len: usize, gradient: &[f64], max_norm: f64, norm: f64) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut p: Vec<f32> = random(len, 1).iter().map(|&v| v as f32).collect();
    let (mut m, mut v) = (vec![0f32; len], vec![0f32; len]);
    for number in 1..=2 {
        let s = step(number, max_norm);
        let clip = if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let scale = (clip * s.scale) as f32;
        let (bias1, bias2) = (1.0 - 0.9f64.powi(number as i32), 1.0 - 0.999f64.powi(number as i32));
        for i in 0..len {
            let g = gradient[i] as f32 * scale;
            m[i] = 0.9f64 as f32 * m[i] + (1.0 - 0.9f64) as f32 * g;
            v[i] = 0.999f64 as f32 * v[i] + (1.0 - 0.999f64) as f32 * (g * g);
            let denominator = v[i].sqrt() / bias2.sqrt() as f32 + 1e-8f64 as f32;
            p[i] = p[i] * (1.0 - 1e-3 * 0.01f64) as f32 - (1e-3 / bias1) as f32 * (m[i] / denominator);
        }
    }
    (p, m, v)
}

#[test]
fn two_steps_are_those_of_the_cpu_to_the_bit() {
    for len in SIZES {
        let gradient = random(len, 2);
        for max_norm in [0.0, 0.25, 1e9] {
            if len > 100_000 && max_norm == 0.0 {
                continue;
            }
            let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt() / 37.0;
            let (p, m, v) = expected(len, &gradient, max_norm, norm);
            let working = Values::Bf16(p.iter().map(|&p| bf16::from_f32(p)).collect());
            everywhere(
                |device| {
                    let (gradient, mut state) = (upload_f32(device, &gradient), parameters(device, len));
                    let (mut partial, mut norm) = (poisoned(device, PARTIALS), poisoned(device, 1));
                    for number in 1..=2 {
                        adamw(step(number, max_norm), len, &gradient, &mut state, &mut partial, &mut norm)?;
                    }
                    Ok(vec![
                        ("value", state.value.all()),
                        ("m", state.m.all()),
                        ("v", state.v.all()),
                        ("working", state.working.all()),
                        ("norm", norm.all()),
                    ])
                },
                |device, outputs| {
                    let what = format!("{device}: adamw of {len}, clipped to {max_norm}");
                    if len == 0 {
                        return;
                    }
                    same_bits(&what, &outputs[0].1, &Values::F32(p.clone()));
                    same_bits(&what, &outputs[1].1, &Values::F32(m.clone()));
                    same_bits(&what, &outputs[2].1, &Values::F32(v.clone()));
                    same_bits(&what, &outputs[3].1, &working);
                    let found = outputs[4].1.f64()[0];
                    assert!((found - norm).abs() <= 1e-12 * norm, "{what}: norm {found} and not {norm}");
                },
            );
        }
    }
}

/// The working copy that clipping leaves is finite, and a gradient that is not shows in the norm.
#[test]
fn a_gradient_that_is_not_finite_shows_in_the_norm() {
    everywhere(
        |device| {
            let mut values = random(5000, 2);
            values[4999] = f64::NAN;
            let (gradient, mut state) = (upload_f32(device, &values), parameters(device, 5000));
            let (mut partial, mut norm) = (poisoned(device, PARTIALS), poisoned(device, 1));
            adamw(step(1, 1.0), 5000, &gradient, &mut state, &mut partial, &mut norm)?;
            Ok(vec![("norm", norm.all())])
        },
        |device, outputs| assert!(outputs[0].1.f64()[0].is_nan(), "{device}"),
    );
}

#[test]
fn a_step_moves_thirty_four_bytes_a_parameter() {
    let len = 64 * 1024;
    let counters = counted(|device| {
        let (gradient, mut state) = (upload_f32(device, &random(len, 2)), parameters(device, len));
        let (mut partial, mut norm) = (poisoned(device, PARTIALS), poisoned(device, 1));
        adamw(step(1, 1.0), len, &gradient, &mut state, &mut partial, &mut norm)
    });
    let Some(counters) = counters else { return };
    let n = len as u64;
    assert_eq!(counters["square_sum"].global_load_bytes, 4 * n);
    let found = counters["adamw"];
    let partials = 8 * 64;
    assert_eq!(found.bus_bytes(), 30 * n + partials + 32);
    // Every sector that a warp touches is used whole.
    assert_eq!(32 * found.global_store_sectors, 14 * n + 32);
}

#[test]
fn the_sum_of_squares_has_one_order_for_a_length() {
    everywhere(
        |device| {
            let x = upload_f32(device, &random(70_001, 3));
            let mut partial: Buffer<f64> = poisoned(device, PARTIALS);
            let parts = square_sum(70_001, &x, &mut partial)?;
            Ok(vec![("partial", partial.slice(0, parts)?.all())])
        },
        |device, outputs| {
            let (found, sum) = (outputs[0].1.f64(), random(70_001, 3).iter().map(|v| v * v).sum::<f64>());
            assert_eq!(found.len(), 69, "{device}: chunks of 1024");
            assert!((found.iter().sum::<f64>() - sum).abs() <= 1e-12 * sum, "{device}");
        },
    );
}

#[test]
fn a_step_whose_norm_is_known_needs_no_sum() {
    let len = 5000;
    let gradient = random(len, 2);
    let (p, m, v) = expected(len, &gradient, 0.0, 0.0);
    everywhere(
        |device| {
            let (gradient, mut state) = (upload_f32(device, &gradient), parameters(device, len));
            // Nothing of it may be read.
            let (partial, mut norm) = (poisoned(device, PARTIALS), poisoned(device, 1));
            for number in 1..=2 {
                adamw_clipped(step(number, 0.0), len, &gradient, &mut state, &partial, &mut norm)?;
            }
            let refused = adamw_clipped(step(1, 1.0), len, &gradient, &mut state, &partial, &mut norm);
            assert!(refused.unwrap_err().to_string().contains("without a norm"));
            Ok(vec![("value", state.value.all()), ("m", state.m.all()), ("v", state.v.all())])
        },
        |device, outputs| {
            for (output, expected) in outputs.iter().zip([&p, &m, &v]) {
                same_bits(&format!("{device}: {}", output.0), &output.1, &Values::F32(expected.clone()));
            }
        },
    );
}
