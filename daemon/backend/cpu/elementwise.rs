//! Operations on one row or one element at a time: norms, rotary embedding, SwiGLU, the optimizer.

use super::real::Real;
use super::simd::vectorized;
use super::team::{chunk_of, chunks, chunks2, chunks3};
use crate::backend::AdamW;

/// Rows per task: small enough to balance, large enough that a task outweighs its scheduling.
const ROWS: usize = 16;
/// Elements per task of a flat operation.
const FLAT: usize = 16 * 1024;

/// Σ xᵢ·yᵢ in 16 interleaved partial sums, then pairwise: one order on every machine, and it vectorises.
#[inline(always)]
pub fn dot<T: Real>(x: &[T], y: &[T]) -> T {
    let mut lanes = [T::ZERO; 16];
    let (xs, ys) = (x.chunks_exact(16), y.chunks_exact(16));
    let (xr, yr) = (xs.remainder(), ys.remainder());
    for (a, b) in xs.zip(ys) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i];
        }
    }
    for (i, (&a, &b)) in xr.iter().zip(yr).enumerate() {
        lanes[i] += a * b;
    }
    fold(lanes)
}

/// Σ xᵢ in the order of [`dot`].
#[inline(always)]
pub fn sum<T: Real>(x: &[T]) -> T {
    let mut lanes = [T::ZERO; 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder();
    for a in chunks {
        for i in 0..16 {
            lanes[i] += a[i];
        }
    }
    for (i, &a) in rest.iter().enumerate() {
        lanes[i] += a;
    }
    fold(lanes)
}

/// The largest element, −∞ of none.
#[inline(always)]
pub fn maximum<T: Real>(x: &[T]) -> T {
    let mut lanes = [T::NEG_INFINITY; 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder();
    for a in chunks {
        for i in 0..16 {
            lanes[i] = lanes[i].larger(a[i]);
        }
    }
    for (i, &a) in rest.iter().enumerate() {
        lanes[i] = lanes[i].larger(a);
    }
    lanes.into_iter().fold(T::NEG_INFINITY, T::larger)
}

#[inline(always)]
fn fold<T: Real>(mut lanes: [T; 16]) -> T {
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// 1/√(mean(x²) + ε)
#[inline(always)]
fn inverse_rms<T: Real>(x: &[T], epsilon: T) -> T {
    T::ONE / (dot(x, x) / T::from_f64(x.len() as f64) + epsilon).sqrt()
}

vectorized! {
    fn rms_norm_rows(cols: usize, x: &[T], weight: &[T], epsilon: T, y: &mut [T]) {
        for (y, x) in y.chunks_exact_mut(cols).zip(x.chunks_exact(cols)) {
            let s = inverse_rms(x, epsilon);
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * s * w;
            }
        }
    }
}

/// See [`crate::backend::Backend::rms_norm`].
pub fn rms_norm<T: Real>(cols: usize, x: &[T], weight: &[T], epsilon: f64, round: bool, y: &mut [T]) {
    let chunk = ROWS * cols;
    chunks(chunk, y, |i, y| {
        rms_norm_rows(cols, chunk_of(chunk, i, x), weight, T::from_f64(epsilon), y);
        if round {
            round_slice(y);
        }
    });
}

vectorized! {
    fn rms_norm_backward_rows(
        cols: usize,
        x: &[T],
        weight: &[T],
        epsilon: T,
        dy: &[T],
        g: &mut [T],
        dx: &mut [T],
        accumulate: bool,
    ) {
        let n = T::from_f64(cols as f64);
        for ((dx, x), dy) in dx.chunks_exact_mut(cols).zip(x.chunks_exact(cols)).zip(dy.chunks_exact(cols)) {
            let s = inverse_rms(x, epsilon);
            for ((g, &dy), &w) in g.iter_mut().zip(dy).zip(weight) {
                *g = dy * w;
            }
            let c = dot(g, x) / n * (s * s * s);
            if accumulate {
                for ((dx, &g), &x) in dx.iter_mut().zip(g.iter()).zip(x) {
                    *dx += s * g - c * x;
                }
            } else {
                for ((dx, &g), &x) in dx.iter_mut().zip(g.iter()).zip(x) {
                    *dx = s * g - c * x;
                }
            }
        }
    }
}

/// See [`crate::backend::Backend::rms_norm_backward`].
pub fn rms_norm_backward<T: Real>(
    cols: usize,
    x: &[T],
    weight: &[T],
    epsilon: f64,
    dy: &[T],
    round: bool,
    dx: &mut [T],
    accumulate: bool,
) {
    let chunk = ROWS * cols;
    chunks(chunk, dx, |i, dx| {
        let mut g = vec![T::ZERO; cols];
        let (x, dy) = (chunk_of(chunk, i, x), chunk_of(chunk, i, dy));
        rms_norm_backward_rows(cols, x, weight, T::from_f64(epsilon), dy, &mut g, dx, accumulate);
        if round {
            round_slice(dx);
        }
    });
}

vectorized! {
    /// Rotates the heads of one token.
    fn rotate(head_dim: usize, cos: &[T], sin: &[T], row: &mut [T]) {
        for head in row.chunks_exact_mut(head_dim) {
            let (a, b) = head.split_at_mut(head_dim / 2);
            for (((a, b), &cos), &sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                let (p, q) = (*a, *b);
                *a = p * cos - q * sin;
                *b = q * cos + p * sin;
            }
        }
    }
}

/// Cosines and sines of every token's angles, `[M, frequencies]` each: the same for all heads and blocks.
#[derive(Default)]
pub struct Angles<T> {
    cos: Vec<T>,
    sin: Vec<T>,
}

impl<T: Real> Angles<T> {
    /// The angle is a product in f32, as transformers has it; its sine and cosine come from double precision.
    pub fn new(positions: &[u32], frequencies: &[f32], magnitude: f32) -> Self {
        let half = frequencies.len();
        let values = |of: fn(f64) -> f64| {
            let mut values = vec![T::ZERO; positions.len() * half];
            chunks(ROWS * half.max(1), &mut values, |i, values| {
                let positions = chunk_of(ROWS, i, positions);
                for (values, &position) in values.chunks_exact_mut(half).zip(positions) {
                    for (v, f) in values.iter_mut().zip(frequencies) {
                        *v = T::from_f32(of(f64::from(position as f32 * f)) as f32 * magnitude);
                    }
                }
            });
            values
        };
        Self { cos: values(f64::cos), sin: values(f64::sin) }
    }
}

/// See [`crate::backend::Backend::rope`].
pub fn rope<T: Real>(
    angles: &Angles<T>,
    heads: usize,
    head_dim: usize,
    inverse: bool,
    round: bool,
    x: &mut [T],
) {
    let half = head_dim / 2;
    chunks(ROWS * heads * head_dim, x, |i, x| {
        let mut signed = vec![T::ZERO; half];
        let (cos, sin) = (chunk_of(ROWS * half, i, &angles.cos), chunk_of(ROWS * half, i, &angles.sin));
        let rows = x.chunks_exact_mut(heads * head_dim);
        for ((row, cos), sin) in rows.zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half)) {
            signed.iter_mut().zip(sin).for_each(|(s, &sin)| *s = if inverse { -sin } else { sin });
            rotate(head_dim, cos, &signed, row);
        }
        if round {
            round_slice(x);
        }
    });
}

#[inline(always)]
fn sigmoid<T: Real>(x: T) -> T {
    T::ONE / (T::ONE + (-x).exp())
}

vectorized! {
    fn swiglu_slice(gate: &[T], up: &[T], out: &mut [T]) {
        for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
            *o = g * sigmoid(g) * u;
        }
    }
}

/// See [`crate::backend::Backend::swiglu`].
pub fn swiglu<T: Real>(gate: &[T], up: &[T], round: bool, out: &mut [T]) {
    chunks(FLAT, out, |i, out| {
        swiglu_slice(chunk_of(FLAT, i, gate), chunk_of(FLAT, i, up), out);
        if round {
            round_slice(out);
        }
    });
}

vectorized! {
    fn swiglu_backward_slice(dout: &[T], gate: &mut [T], up: &mut [T]) {
        for ((g, u), &d) in gate.iter_mut().zip(up.iter_mut()).zip(dout) {
            let (x, s) = (*g, sigmoid(*g));
            // d silu/dx = s·(1 + x·(1 − s))
            *g = d * *u * (s * (T::ONE + x * (T::ONE - s)));
            *u = d * (x * s);
        }
    }
}

/// See [`crate::backend::Backend::swiglu_backward`].
pub fn swiglu_backward<T: Real>(dout: &[T], round: bool, gate: &mut [T], up: &mut [T]) {
    chunks2(FLAT, gate, up, |i, gate, up| {
        swiglu_backward_slice(chunk_of(FLAT, i, dout), gate, up);
        if round {
            round_slice(gate);
            round_slice(up);
        }
    });
}

vectorized! {
    /// `y += x`, on one thread.
    pub fn add_slice(x: &[T], y: &mut [T]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }
}

/// `y += x`
pub fn add<T: Real>(x: &[T], round: bool, y: &mut [T]) {
    chunks(FLAT, y, |i, y| {
        add_slice(chunk_of(FLAT, i, x), y);
        if round {
            round_slice(y);
        }
    });
}

vectorized! {
    /// `x *= factor`, on one thread.
    pub fn scale_slice(factor: T, x: &mut [T]) {
        for x in x {
            *x *= factor;
        }
    }
}

vectorized! {
    /// Rounds to bfloat16 in place, on one thread.
    pub fn round_slice(x: &mut [T]) {
        for x in x {
            *x = x.round_bf16();
        }
    }
}

/// Rounds to bfloat16 in place.
pub fn round_bf16<T: Real>(x: &mut [T]) {
    chunks(FLAT, x, |_, x| round_slice(x));
}

/// The constants of [`AdamW`] in the element type.
#[derive(Clone, Copy)]
struct AdamWConstants<T> {
    step_size: T,
    root: T,
    decay: T,
    beta1: T,
    beta2: T,
    rest1: T,
    rest2: T,
    epsilon: T,
    scale: T,
}

vectorized! {
    fn adamw_slice(c: AdamWConstants<T>, value: &mut [T], gradient: &[T], m: &mut [T], v: &mut [T]) {
        for (((value, &gradient), m), v) in value.iter_mut().zip(gradient).zip(m).zip(v) {
            let g = gradient * c.scale;
            *m = c.beta1 * *m + c.rest1 * g;
            *v = c.beta2 * *v + c.rest2 * (g * g);
            let denominator = v.sqrt() / c.root + c.epsilon;
            *value = *value * c.decay - c.step_size * (*m / denominator);
        }
    }
}

/// See [`crate::backend::Backend::adamw`]. The order of operations is that of `torch.optim.AdamW` with one tensor at a
/// time: decay, moments, then the step.
pub fn adamw<T: Real>(c: AdamW, value: &mut [T], gradient: &[T], m: &mut [T], v: &mut [T]) {
    let step = c.step.min(i32::MAX as u64) as i32;
    let bias1 = 1.0 - c.beta1.powi(step);
    let bias2 = 1.0 - c.beta2.powi(step);
    let constants = AdamWConstants {
        step_size: T::from_f64(c.learning_rate / bias1),
        root: T::from_f64(bias2.sqrt()),
        decay: T::from_f64(1.0 - c.learning_rate * c.weight_decay),
        beta1: T::from_f64(c.beta1),
        beta2: T::from_f64(c.beta2),
        rest1: T::from_f64(1.0 - c.beta1),
        rest2: T::from_f64(1.0 - c.beta2),
        epsilon: T::from_f64(c.epsilon),
        scale: T::from_f64(c.gradient_scale),
    };
    chunks3(FLAT, value, m, v, |i, value, m, v| {
        adamw_slice(constants, value, chunk_of(FLAT, i, gradient), m, v);
    });
}

/// Σ x² in f64: blocks of `FLAT` elements in order, whatever the number of threads.
pub fn square_sum<T: Real>(x: &[T]) -> f64 {
    let mut partial = vec![0.0; x.len().div_ceil(FLAT)];
    chunks(1, &mut partial, |i, sum| {
        let mut lanes = [0.0_f64; 8];
        for chunk in chunk_of(FLAT, i, x).chunks(8) {
            for (lane, v) in lanes.iter_mut().zip(chunk) {
                *lane += v.to_f64() * v.to_f64();
            }
        }
        sum[0] = lanes.iter().sum();
    });
    partial.iter().sum()
}
