//! Causal attention without a T × T matrix.
//!
//! A task takes [`QUERIES`] queries of one head against all keys they may see: the scores of that strip are the only
//! ones that exist at a time (QUERIES × T numbers a thread). The backward pass rebuilds the probabilities of a strip
//! from the kept log-sums (FlashAttention, arXiv 2205.14135, section 3.1) and, per head, walks the strips in order, so
//! that the sums for keys and values have one order. With grouped queries the heads of a group are then added in order.

use super::Cpu;
use super::elementwise::{dot, maximum, round_slice, scale_slice, sum};
use super::gemm::{Output, Parallel, Strided, gemm};
use super::real::Real;
use super::simd::vectorized;
use super::team;
use crate::backend::{AttentionShape, Batch};

/// Queries per strip. 64 × 1,024 scores are 256 KiB of f32: they fit the second-level cache.
pub const QUERIES: usize = 64;

/// A strip: queries `first .. last` of the example at `start` see keys `low .. last` (offsets in the example).
#[derive(Clone, Copy)]
struct Strip {
    start: usize,
    first: usize,
    last: usize,
    low: usize,
}

/// The strips of an example, in order.
fn strips(start: usize, len: usize, window: Option<usize>) -> impl Iterator<Item = Strip> {
    (0..len).step_by(QUERIES).map(move |first| {
        let last = (first + QUERIES).min(len);
        let low = window.map_or(0, |w| (first + 1).saturating_sub(w));
        Strip { start, first, last, low }
    })
}

/// Which keys (relative to `low`) query `i` (relative to `first`) sees.
fn visible(strip: Strip, i: usize, window: Option<usize>) -> std::ops::Range<usize> {
    let query = strip.first + i;
    let low = window.map_or(0, |w| (query + 1).saturating_sub(w));
    low - strip.low..query + 1 - strip.low
}

impl<T: Real> Cpu<T> {
    pub(super) fn attention_forward(
        &self,
        batch: &Batch,
        shape: AttentionShape,
        q: &[T],
        k: &[T],
        v: &[T],
        out: &mut [T],
        log_sum: &mut [T],
    ) {
        let AttentionShape { heads, kv_heads, head_dim: d, .. } = shape;
        let group = heads / kv_heads;
        let m = batch.len();
        let (q_cols, kv_cols) = (heads * d, kv_heads * d);
        let out = Output::new(&mut out[..m * q_cols], q_cols);
        let log_sums = Output::new(&mut log_sum[..m * heads], heads);
        let tasks: Vec<(Strip, usize)> = batch
            .cu_seqlens
            .windows(2)
            .flat_map(|w| strips(w[0] as usize, (w[1] - w[0]) as usize, shape.window))
            .flat_map(|strip| (0..heads).map(move |h| (strip, h)))
            .collect();
        team::run(tasks.len(), |task| {
            let (strip, h) = tasks[task];
            let (rows, keys) = (strip.last - strip.first, strip.last - strip.low);
            let mut scores = self.strip(rows * keys);
            self.scores(shape, strip, h, q, k, &mut scores);
            let first_row = strip.start + strip.first;
            for (i, row) in scores.chunks_exact_mut(keys).enumerate() {
                let log = softmax(row, visible(strip, i, shape.window));
                // SAFETY: one element per (query, head), and each belongs to one task.
                unsafe { log_sums.slice((first_row + i) * heads + h, 1)[0] = log };
            }
            if self.bf16 {
                round_slice(&mut scores);
            }
            let probabilities = Strided { data: &scores[..], line_stride: keys, depth_stride: 1 };
            let at = (strip.start + strip.low) * kv_cols + h / group * d;
            let values = Strided { data: &v[at..], line_stride: 1, depth_stride: kv_cols };
            // SAFETY: rows of this strip, columns of this head: no other task's.
            let to = unsafe { out.from(first_row * q_cols + h * d) };
            gemm(Parallel::No, rows, d, keys, &probabilities, &values, to, false);
            if self.bf16 {
                for i in 0..rows {
                    // SAFETY: as above.
                    let row = unsafe { out.slice((first_row + i) * q_cols + h * d, d) };
                    round_slice(row);
                }
            }
        });
    }

    /// `scores = scale · Q·Kᵀ` of one strip and head, `[rows, keys]`.
    fn scores(&self, shape: AttentionShape, strip: Strip, h: usize, q: &[T], k: &[T], scores: &mut [T]) {
        let AttentionShape { heads, kv_heads, head_dim: d, .. } = shape;
        let (q_cols, kv_cols) = (heads * d, kv_heads * d);
        let (rows, keys) = (strip.last - strip.first, strip.last - strip.low);
        let queries = Strided {
            data: &q[(strip.start + strip.first) * q_cols + h * d..],
            line_stride: q_cols,
            depth_stride: 1,
        };
        let at = (strip.start + strip.low) * kv_cols + h / (heads / kv_heads) * d;
        let columns = Strided { data: &k[at..], line_stride: kv_cols, depth_stride: 1 };
        gemm(Parallel::No, rows, keys, d, &queries, &columns, Output::new(scores, keys), false);
        scale_slice(T::from_f64(shape.scale), scores);
    }

    pub(super) fn attention_gradients(
        &self,
        batch: &Batch,
        shape: AttentionShape,
        q: &[T],
        k: &[T],
        v: &[T],
        out: &[T],
        log_sum: &[T],
        dout: &[T],
        dq: &mut [T],
        dk: &mut [T],
        dv: &mut [T],
    ) {
        let AttentionShape { heads, kv_heads, head_dim: d, .. } = shape;
        let group = heads / kv_heads;
        let m = batch.len();
        let (q_cols, kv_cols) = (heads * d, kv_heads * d);
        // Gradients of keys and values per query head, [2, M, heads, d].
        let mut parts = self.scratch(2 * m * q_cols);
        let (dk_parts, dv_parts) = parts.split_at_mut(m * q_cols);
        let dk_view = Output::new(dk_parts, q_cols);
        let dv_view = Output::new(dv_parts, q_cols);
        let dq_view = Output::new(&mut dq[..m * q_cols], q_cols);
        let scale = T::from_f64(shape.scale);
        let mut tasks: Vec<(usize, usize, usize)> = batch
            .cu_seqlens
            .windows(2)
            .flat_map(|w| (0..heads).map(move |h| (w[0] as usize, (w[1] - w[0]) as usize, h)))
            .collect();
        // Longest first: the last task to start should be a short one.
        tasks.sort_by_key(|&(start, len, h)| (std::cmp::Reverse(len), start, h));
        team::run(tasks.len(), |task| {
            let (start, len, h) = tasks[task];
            for i in start..start + len {
                // SAFETY: this example's rows, this head's columns.
                unsafe {
                    dk_view.slice(i * q_cols + h * d, d).fill(T::ZERO);
                    dv_view.slice(i * q_cols + h * d, d).fill(T::ZERO);
                }
            }
            for strip in strips(start, len, shape.window) {
                let (rows, keys) = (strip.last - strip.first, strip.last - strip.low);
                let first_row = start + strip.first;
                let mut p = self.strip(rows * keys);
                let mut ds = self.strip(rows * keys);
                self.scores(shape, strip, h, q, k, &mut p);
                let gradients = Strided {
                    data: &dout[first_row * q_cols + h * d..],
                    line_stride: q_cols,
                    depth_stride: 1,
                };
                let kv_at = (start + strip.low) * kv_cols + h / group * d;
                let values = Strided { data: &v[kv_at..], line_stride: kv_cols, depth_stride: 1 };
                // dP = dO·Vᵀ
                gemm(Parallel::No, rows, keys, d, &gradients, &values, Output::new(&mut ds, keys), false);
                for (i, (p, ds)) in p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys)).enumerate() {
                    let at = (first_row + i) * q_cols + h * d;
                    let log = log_sum[(first_row + i) * heads + h];
                    let seen = visible(strip, i, shape.window);
                    softmax_backward(log, &dout[at..at + d], &out[at..at + d], scale, seen, p, ds);
                }
                if self.bf16 {
                    round_slice(&mut p);
                    round_slice(&mut ds);
                }
                // SAFETY (all three): this example's rows, this head's columns.
                let (to_q, to_k, to_v) = unsafe {
                    (
                        dq_view.from(first_row * q_cols + h * d),
                        dk_view.from((start + strip.low) * q_cols + h * d),
                        dv_view.from((start + strip.low) * q_cols + h * d),
                    )
                };
                // dQ = dS·K, dK += dSᵀ·Q, dV += Pᵀ·dO
                let ds_rows = Strided { data: &ds[..], line_stride: keys, depth_stride: 1 };
                let key_columns = Strided { data: &k[kv_at..], line_stride: 1, depth_stride: kv_cols };
                gemm(Parallel::No, rows, d, keys, &ds_rows, &key_columns, to_q, false);
                let ds_columns = Strided { data: &ds[..], line_stride: 1, depth_stride: keys };
                let q_columns =
                    Strided { data: &q[first_row * q_cols + h * d..], line_stride: 1, depth_stride: q_cols };
                gemm(Parallel::No, keys, d, rows, &ds_columns, &q_columns, to_k, true);
                let p_columns = Strided { data: &p[..], line_stride: 1, depth_stride: keys };
                let do_columns = Strided {
                    data: &dout[first_row * q_cols + h * d..],
                    line_stride: 1,
                    depth_stride: q_cols,
                };
                gemm(Parallel::No, keys, d, rows, &p_columns, &do_columns, to_v, true);
            }
        });
        let (dk_parts, dv_parts) = parts.split_at(m * q_cols);
        for (to, parts) in [(dk, dk_parts), (dv, dv_parts)] {
            team::chunks(16 * kv_cols, &mut to[..m * kv_cols], |i, to| {
                let parts = team::chunk_of(16 * q_cols, i, parts);
                for (to, parts) in to.chunks_exact_mut(kv_cols).zip(parts.chunks_exact(q_cols)) {
                    for (kv, to) in to.chunks_exact_mut(d).enumerate() {
                        to.copy_from_slice(&parts[kv * group * d..][..d]);
                        for h in kv * group + 1..(kv + 1) * group {
                            super::elementwise::add_slice(&parts[h * d..], to);
                        }
                    }
                }
                if self.bf16 {
                    round_slice(to);
                }
            });
        }
        if self.bf16 {
            super::elementwise::round_bf16(&mut dq[..m * q_cols]);
        }
    }

    pub(super) fn attention_over_cache(
        &self,
        shape: AttentionShape,
        rows: usize,
        past: usize,
        q: &[T],
        k: &[T],
        v: &[T],
        out: &mut [T],
    ) {
        let AttentionShape { heads, kv_heads, head_dim: d, .. } = shape;
        let group = heads / kv_heads;
        let (q_cols, kv_cols) = (heads * d, kv_heads * d);
        let scale = T::from_f64(shape.scale);
        team::chunks(d, &mut out[..rows * q_cols], |task, out| {
            let (t, h) = (task / heads, task % heads);
            let query = &q[t * q_cols + h * d..][..d];
            let position = past + t;
            let low = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let column = h / group * d;
            let mut scores = self.strip(position + 1 - low);
            one_query(
                query,
                &k[low * kv_cols + column..],
                &v[low * kv_cols + column..],
                kv_cols,
                scale,
                &mut scores,
                out,
            );
            if self.bf16 {
                round_slice(out);
            }
        });
    }
}

vectorized! {
    /// Softmax over `seen`, zero outside; returns the logarithm of the sum of exponentials.
    fn softmax(row: &mut [T], seen: std::ops::Range<usize>) -> T {
        row[..seen.start].fill(T::ZERO);
        row[seen.end..].fill(T::ZERO);
        let row = &mut row[seen];
        let top = maximum(row);
        for x in row.iter_mut() {
            *x = (*x - top).exp();
        }
        let total = sum(row);
        let inverse = T::ONE / total;
        for x in row.iter_mut() {
            *x *= inverse;
        }
        top + total.ln()
    }
}

vectorized! {
    /// One query's row: scores in `p` become probabilities, dP in `ds` becomes scale·dS with
    /// dS = P∘(dP − rowsum(dO∘O)); zero where the query does not look.
    fn softmax_backward(
        log_sum: T,
        dout: &[T],
        out: &[T],
        scale: T,
        seen: std::ops::Range<usize>,
        p: &mut [T],
        ds: &mut [T],
    ) {
        let delta = dot(dout, out);
        p[..seen.start].fill(T::ZERO);
        p[seen.end..].fill(T::ZERO);
        ds[..seen.start].fill(T::ZERO);
        ds[seen.end..].fill(T::ZERO);
        for (p, ds) in p[seen.clone()].iter_mut().zip(ds[seen].iter_mut()) {
            *p = (*p - log_sum).exp();
            *ds = *p * (*ds - delta) * scale;
        }
    }
}

vectorized! {
    /// Attention of one query of one head over as many keys as `scores` has elements; rows of k and v lie `stride`
    /// apart.
    fn one_query(query: &[T], k: &[T], v: &[T], stride: usize, scale: T, scores: &mut [T], out: &mut [T]) {
        let d = query.len();
        for (j, s) in scores.iter_mut().enumerate() {
            *s = dot(query, &k[j * stride..j * stride + d]) * scale;
        }
        let top = maximum(scores);
        for s in scores.iter_mut() {
            *s = (*s - top).exp();
        }
        let inverse = T::ONE / sum(scores);
        out.fill(T::ZERO);
        for (j, &s) in scores.iter().enumerate() {
            let p = s * inverse;
            for (o, &x) in out.iter_mut().zip(&v[j * stride..j * stride + d]) {
                *o += p * x;
            }
        }
    }
}
