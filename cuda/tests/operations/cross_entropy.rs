use crate::harness::{ReadBack, counted, everywhere, poisoned, random, rounded_once};
use finetuned_cuda::ops::cross_entropy::{cross_entropy, stride};
use finetuned_cuda::{Buffer, Device, Error};
use half::bf16;

/// Rows and vocabulary: one word, fewer than a run, one step of a block (4096) and its neighbours, a real one.
const SHAPES: [(usize, usize); 9] =
    [(0, 10), (1, 1), (2, 5), (3, 300), (2, 4095), (2, 4096), (2, 4097), (3, 12_288), (1, 49_152)];

/// Logits with their stride; between vocabulary and stride lies NaN.
fn logits(rows: usize, vocabulary: usize) -> Vec<f32> {
    let values = random(rows * vocabulary, 7);
    let mut logits = Vec::new();
    for row in 0..rows {
        logits.extend(values[row * vocabulary..][..vocabulary].iter().map(|&v| (v * 4.0 + 30.0) as f32));
        logits.resize((row + 1) * stride(vocabulary), f32::NAN);
    }
    logits
}

fn targets(rows: usize, vocabulary: usize) -> Vec<i32> {
    (0..rows).map(|r| ((r + 1) * 7919 % vocabulary) as i32).collect()
}

/// Loss and gradient of each row.
fn oracle(vocabulary: usize, logits: &[f32], targets: &[i32]) -> (Vec<f64>, Vec<f64>) {
    let (mut losses, mut gradient) = (Vec::new(), Vec::new());
    for (row, &target) in logits.chunks_exact(stride(vocabulary)).zip(targets) {
        let row: Vec<f64> = row[..vocabulary].iter().map(|&v| v.into()).collect();
        let most = row.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = row.iter().map(|v| (v - most).exp()).sum();
        losses.push(sum.ln() - (row[target as usize] - most));
        gradient.extend(
            row.iter()
                .enumerate()
                .map(|(i, v)| (v - most).exp() / sum - if i as i32 == target { 1.0 } else { 0.0 }),
        );
        gradient.resize(gradient.len() + stride(vocabulary) - vocabulary, 0.0);
    }
    (losses, gradient)
}

/// The gradient, from where the logits lay: every other half row.
fn gradient_of(device_logits: &Buffer<f32>, rows: usize, vocabulary: usize) -> Vec<f64> {
    let values = device_logits.read(rows * stride(vocabulary)).unwrap();
    let halves: &[bf16] = bytemuck::cast_slice(&values);
    halves
        .chunks_exact(2 * stride(vocabulary))
        .flat_map(|row| row[..stride(vocabulary)].iter().map(|v| v.to_f64()))
        .collect()
}

fn run(
    device: &Device,
    rows: usize,
    vocabulary: usize,
    gradient: bool,
) -> Result<(Buffer<f32>, Buffer<f64>), Error> {
    let mut logits = Buffer::from_slice(device, &logits(rows, vocabulary))?;
    let targets = Buffer::from_slice(device, &targets(rows, vocabulary))?;
    let mut loss = poisoned(device, rows);
    cross_entropy(rows, vocabulary, &mut logits, &targets, &mut loss, gradient)?;
    Ok((logits, loss))
}

#[test]
fn loss_and_gradient_are_those_of_double_precision() {
    for (rows, vocabulary) in SHAPES {
        let (losses, gradients) = oracle(vocabulary, &logits(rows, vocabulary), &targets(rows, vocabulary));
        everywhere(
            |device| {
                let (logits, loss) = run(device, rows, vocabulary, true)?;
                let (_, alone) = run(device, rows, vocabulary, false)?;
                let gradient = gradient_of(&logits, rows, vocabulary);
                Ok(vec![
                    ("loss", loss.all()),
                    ("gradient", crate::harness::Values::F64(gradient)),
                    ("loss alone", alone.all()),
                ])
            },
            |device, outputs| {
                let what = format!("{device}: cross-entropy of {rows} × {vocabulary}");
                assert_eq!(
                    outputs[0].1, outputs[2].1,
                    "{what}: the loss depends on the gradient being asked for"
                );
                for (found, expected) in outputs[0].1.f64().iter().zip(&losses) {
                    assert!(
                        (found - expected).abs() <= 3e-6 * (1.0 + expected.abs()),
                        "{what}: {found}, {expected}"
                    );
                }
                rounded_once(&what, &outputs[1].1.f64(), &gradients);
            },
        );
    }
}

/// A NaN among the logits reaches the loss.
#[test]
fn what_is_not_a_number_is_not_hidden() {
    everywhere(
        |device| {
            let mut values = logits(2, 5000);
            values[stride(5000) + 4321] = f32::NAN;
            let mut logits = Buffer::from_slice(device, &values)?;
            let targets = Buffer::from_slice(device, &[1, 2])?;
            let mut loss = poisoned(device, 2);
            cross_entropy(2, 5000, &mut logits, &targets, &mut loss, false)?;
            Ok(vec![("loss", loss.all())])
        },
        |device, outputs| {
            let loss = outputs[0].1.f64();
            assert!(loss[0].is_finite() && loss[1].is_nan(), "{device}: {loss:?}");
        },
    );
}

#[test]
fn the_gradient_takes_ten_bytes_an_element() {
    let (rows, vocabulary) = (2, 49_152);
    let n = (rows * vocabulary) as u64;
    let Some(counters) = counted(|device| run(device, rows, vocabulary, true).map(|_| ())) else { return };
    let found = counters["cross_entropy_gradient"];
    // Each of 512 threads reads the target and its logit; the row is read twice and crosses the bus once.
    assert_eq!(found.global_load_bytes, 8 * n + (rows * 512 * 8) as u64);
    assert_eq!(found.global_store_bytes, 2 * n + 8 * rows as u64);
    assert!(found.bus_bytes() <= (4 + 2) * n + 32 * 4 * rows as u64);
    assert_eq!(found.bank_conflicts, 0);
}
