use crate::harness::{
    ReadBack, close, counted, everywhere, poisoned, random, round, same_bits, upload, upload_f32,
};
use finetuned_cuda::ops::rms_norm::{Shape, rms_norm, rms_norm_backward, rms_norm_residual};

/// Rows and columns: one element, odd ones, beyond what a lane keeps (2048 forward, 1024 backward), real models.
const SHAPES: [(usize, usize); 10] =
    [(0, 64), (1, 1), (3, 7), (1, 8), (9, 72), (5, 250), (17, 576), (2, 2048), (3, 2056), (8, 4096)];
const EPSILON: f64 = 1e-5;

/// y of rows, with `r` applied to every intermediate result.
fn forward(cols: usize, x: &[f64], w: &[f64], r: fn(f64) -> f64) -> Vec<f64> {
    let mut y = Vec::new();
    for row in x.chunks_exact(cols) {
        let sum = row.iter().fold(0.0, |sum, &v| r(sum + r(v * v)));
        let s = r(1.0 / r(sum / cols as f64 + EPSILON).sqrt());
        y.extend(row.iter().zip(w).map(|(&v, &w)| r(r(v * s) * w)));
    }
    y
}

fn backward(
    cols: usize,
    x: &[f64],
    w: &[f64],
    dy: &[f64],
    old: Option<&[f64]>,
    r: fn(f64) -> f64,
) -> Vec<f64> {
    let mut dx = Vec::new();
    for (row, dy) in x.chunks_exact(cols).zip(dy.chunks_exact(cols)) {
        let sum = row.iter().fold(0.0, |sum, &v| r(sum + r(v * v)));
        let s = r(1.0 / r(sum / cols as f64 + EPSILON).sqrt());
        let g: Vec<f64> = dy.iter().zip(w).map(|(&d, &w)| r(d * w)).collect();
        let dot = g.iter().zip(row).fold(0.0, |sum, (&g, &v)| r(sum + r(g * v)));
        let c = r(r(dot / cols as f64) * r(s * s * s));
        dx.extend(g.iter().zip(row).map(|(&g, &v)| r(r(s * g) - r(c * v))));
    }
    if let Some(old) = old {
        dx.iter_mut().zip(old).for_each(|(d, old)| *d = r(*d + old));
    }
    dx
}

fn exact(value: f64) -> f64 {
    value
}

fn shape(rows: usize, cols: usize) -> Shape {
    Shape { rows, cols, epsilon: EPSILON as f32 }
}

#[test]
fn forward_is_that_of_double_precision() {
    for (rows, cols) in SHAPES {
        let (x, w) = (random(rows * cols, 1), random(cols, 2));
        let (oracle, naive) = (forward(cols, &x, &w, exact), forward(cols, &x, &w, round));
        everywhere(
            |device| {
                let (x, w) = (upload(device, &x), upload_f32(device, &w));
                let mut y = poisoned(device, rows * cols);
                rms_norm(shape(rows, cols), &x, &w, &mut y)?;
                Ok(vec![("y", y.all())])
            },
            |device, outputs| {
                let what = format!("{device}: rms_norm of {rows} × {cols}");
                close(&what, &outputs[0].1.f64(), &oracle, &naive);
            },
        );
    }
}

/// Fused or one after the other: the same bits, in x and in y.
#[test]
fn the_residual_is_added_first_and_rounded() {
    for (rows, cols) in SHAPES {
        let (x, delta, w) = (random(rows * cols, 1), random(rows * cols, 3), random(cols, 2));
        let summed: Vec<f64> = x.iter().zip(&delta).map(|(x, d)| round(x + d)).collect();
        everywhere(
            |device| {
                let (mut x, delta) = (upload(device, &x), upload(device, &delta));
                let (summed, w) = (upload(device, &summed), upload_f32(device, &w));
                let (mut y, mut z) = (poisoned(device, rows * cols), poisoned(device, rows * cols));
                rms_norm_residual(shape(rows, cols), &mut x, &delta, &w, &mut y)?;
                rms_norm(shape(rows, cols), &summed, &w, &mut z)?;
                Ok(vec![("x", x.all()), ("y", y.all()), ("summed", summed.all()), ("z", z.all())])
            },
            |device, outputs| {
                let what = format!("{device}: rms_norm with residual of {rows} × {cols}");
                same_bits(&what, &outputs[0].1, &outputs[2].1);
                same_bits(&what, &outputs[1].1, &outputs[3].1);
            },
        );
    }
}

#[test]
fn backward_is_that_of_double_precision_and_adds_when_asked() {
    for (rows, cols) in SHAPES {
        let (x, w, dy, old) =
            (random(rows * cols, 1), random(cols, 2), random(rows * cols, 3), random(rows * cols, 4));
        for old in [None, Some(&old)] {
            let old = old.map(|old| &old[..]);
            let oracle = backward(cols, &x, &w, &dy, old, exact);
            let naive = backward(cols, &x, &w, &dy, old, round);
            everywhere(
                |device| {
                    let (x, w, dy) = (upload(device, &x), upload_f32(device, &w), upload(device, &dy));
                    let mut dx = match old {
                        Some(old) => upload(device, old),
                        None => poisoned(device, rows * cols),
                    };
                    rms_norm_backward(shape(rows, cols), &x, &w, &dy, &mut dx, old.is_some())?;
                    Ok(vec![("dx", dx.all())])
                },
                |device, outputs| {
                    // One element: the gradient is what rounding leaves of a difference, in any precision.
                    if cols > 1 {
                        let what =
                            format!("{device}: rms_norm_backward of {rows} × {cols}, {}", old.is_some());
                        close(&what, &outputs[0].1.f64(), &oracle, &naive);
                    }
                },
            );
        }
    }
}

/// 4, 8, 6 and 8 bytes an element, beside the weight, for rows that stay in registers; every sector fetched once.
#[test]
fn traffic_is_that_of_the_head_comment() {
    let (rows, cols) = (64, 1024);
    let n = (rows * cols) as u64;
    let counters = counted(|device| {
        let (mut x, delta) =
            (upload(device, &random(rows * cols, 1)), upload(device, &random(rows * cols, 2)));
        let (w, mut y) = (upload_f32(device, &random(cols, 3)), poisoned(device, rows * cols));
        rms_norm(shape(rows, cols), &x, &w, &mut y)?;
        rms_norm_residual(shape(rows, cols), &mut x, &delta, &w, &mut y)?;
        let mut dx = upload(device, &random(rows * cols, 4));
        rms_norm_backward(shape(rows, cols), &x, &w, &y, &mut dx, false)?;
        rms_norm_backward(shape(rows, cols), &x, &w, &y, &mut dx, true)
    });
    let Some(counters) = counters else { return };
    for (kernel, bytes) in [
        ("rms_norm_8", 4),
        ("rms_norm_residual_8", 8),
        ("rms_norm_backward_8", 6),
        ("rms_norm_backward_add_8", 8),
    ] {
        let found = counters[kernel];
        assert_eq!(found.bus_bytes(), bytes * n + 4 * cols as u64, "{kernel}");
        // The weight is read by every row, from the caches, twice in the backward pass; eight floats of a lane are two
        // loads, each of which touches every sector.
        let weights = 8 * n * if kernel.contains("backward") { 2 } else { 1 };
        assert_eq!(
            32 * (found.global_load_sectors + found.global_store_sectors),
            bytes * n + weights,
            "{kernel}"
        );
    }
}
