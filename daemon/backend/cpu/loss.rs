//! Cross-entropy over the vocabulary, in token chunks, with the gradient made in the forward pass.

use super::elementwise::{maximum, round_slice, sum};
use super::gemm::{Output, Parallel, Strided, gemm};
use super::real::Real;
use super::simd::vectorized;
use super::team;
use super::{Cpu, CpuMatrix};
use crate::backend::Batch;

/// Logits that exist at a time: 8 Mi elements, 32 MiB of f32. A vocabulary of 49,152 gives chunks of 170 tokens, deep
/// enough for the product to run at full rate; one of 152,064 still 55.
pub const LOGITS: usize = 8 << 20;

/// Labelled tokens per chunk.
pub fn chunk(vocabulary: usize) -> usize {
    (LOGITS / vocabulary).clamp(16, 512)
}

vectorized! {
    /// −log softmax(row)[target]; the row becomes softmax − onehot if the gradient is wanted.
    fn softmax_minus_onehot(row: &mut [T], target: usize, want_gradient: bool) -> f64 {
        let top = maximum(row);
        let at_target = row[target] - top;
        for x in row.iter_mut() {
            *x = (*x - top).exp();
        }
        let total = sum(row);
        if want_gradient {
            let inverse = T::ONE / total;
            for x in row.iter_mut() {
                *x *= inverse;
            }
            row[target] -= T::ONE;
        }
        // A NaN among the logits survives `maximum` only by luck: it cannot hide in the sum.
        total.ln().to_f64() - at_target.to_f64()
    }
}

impl<T: Real> Cpu<T> {
    pub(super) fn loss(
        &self,
        batch: &Batch,
        hidden: usize,
        h: &[T],
        head: &CpuMatrix,
        mut dh: Option<&mut [T]>,
    ) -> Vec<f64> {
        let vocabulary = head.shape().0;
        let count = batch.labelled.len();
        let step = chunk(vocabulary);
        let mut losses = vec![0.0; count];
        let mut logits = self.scratch(step.min(count) * vocabulary);
        for first in (0..count).step_by(step) {
            let rows = (count - first).min(step);
            let logits = &mut logits[..rows * vocabulary];
            let x = &h[first * hidden..(first + rows) * hidden];
            let a = Strided { data: x, line_stride: hidden, depth_stride: 1 };
            let to = Output::new(logits, vocabulary);
            gemm(Parallel::Pool, rows, vocabulary, hidden, &a, &head.by_rows(), to, false);
            let want_gradient = dh.is_some();
            let targets = &batch.labelled[first..first + rows];
            let rows_view = Output::new(logits, vocabulary);
            team::chunks(1, &mut losses[first..first + rows], |i, loss| {
                // SAFETY: row i belongs to task i.
                let row = unsafe { rows_view.slice(i * vocabulary, vocabulary) };
                let target = batch.targets[targets[i] as usize] as usize;
                loss[0] = softmax_minus_onehot(row, target, want_gradient);
                if want_gradient && self.bf16 {
                    round_slice(row);
                }
            });
            if let Some(dh) = dh.as_deref_mut() {
                let dh = &mut dh[first * hidden..(first + rows) * hidden];
                let a = Strided { data: &logits[..], line_stride: vocabulary, depth_stride: 1 };
                let to = Output::new(dh, hidden);
                gemm(Parallel::Pool, rows, hidden, vocabulary, &a, &head.by_columns(), to, false);
                if self.bf16 {
                    super::elementwise::round_bf16(dh);
                }
            }
        }
        batch.sum_by_sequence(&losses)
    }
}
