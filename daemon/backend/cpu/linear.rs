//! Linear layers over a frozen weight with a LoRA beside it: forward, input gradient, adapter gradients.

use super::elementwise::{add_slice, round_bf16, round_slice, scale_slice};
use super::gemm::{Left, Operand, Output, Parallel, Strided, gemm};
use super::real::Real;
use super::{Cpu, CpuMatrix};
use crate::backend::philox::philox4x32;
use crate::backend::{Batch, Dropout, Projection, ProjectionBackward};
use rayon::prelude::*;

/// A dense operand rounded to bfloat16 as it is packed: the working copy of an fp32 master weight.
struct Rounded<O>(O);

impl<T: Real, O: Operand<T>> Operand<T> for Rounded<O> {
    fn pack(&self, first: usize, lines: usize, width: usize, start: usize, depth: usize, out: &mut [T]) {
        self.0.pack(first, lines, width, start, depth, out);
        out[..width * depth].iter_mut().for_each(|x| *x = x.round_bf16());
    }
}

/// `c (+)= a·b` with b a master weight, rounded first when computing in bfloat16.
fn multiply<T: Real>(round: bool, a: &Left<T>, n: usize, b: Strided<'_, T>, c: &mut [T], accumulate: bool) {
    let c = Output::new(c, n);
    if round { a.multiply(n, &Rounded(b), c, accumulate) } else { a.multiply(n, &b, c, accumulate) }
}

fn row_major<T>(data: &[T], cols: usize) -> Strided<'_, T> {
    Strided { data, line_stride: cols, depth_stride: 1 }
}

fn column_major<T>(data: &[T], cols: usize) -> Strided<'_, T> {
    Strided { data, line_stride: 1, depth_stride: cols }
}

/// `out = drop(x)`, or in place on a gradient: element (t, i) of a sequence survives when word
/// `(t·inputs + i) mod 4` of Philox block `(t·inputs + i) / 4` is at least p·2³².
fn apply_dropout<T: Real>(batch: &Batch, inputs: usize, dropout: Dropout, x: &mut [T]) {
    let threshold = (dropout.probability * 4_294_967_296.0) as u64;
    let keep = T::from_f64(1.0 / (1.0 - dropout.probability));
    for (s, offsets) in batch.sequence_offsets.windows(2).enumerate() {
        let key = batch.sequence_keys[s];
        let key = [key as u32, (key >> 32) as u32];
        let rows = &mut x[offsets[0] as usize * inputs..offsets[1] as usize * inputs];
        // Tasks start at multiples of 4 elements, so that none cuts a Philox block.
        rows.par_chunks_mut(4096).enumerate().for_each(|(chunk, rows)| {
            for (i, group) in rows.chunks_mut(4).enumerate() {
                let block = (chunk * 1024 + i) as u64;
                let words = philox4x32([block as u32, (block >> 32) as u32, dropout.module, 0], key);
                for (value, word) in group.iter_mut().zip(words) {
                    *value = if u64::from(word) >= threshold { *value * keep } else { T::ZERO };
                }
            }
        });
    }
}

impl<T: Real> Cpu<T> {
    pub(super) fn linear_forward(
        &self,
        batch: &Batch,
        inputs: usize,
        x: &[T],
        projections: &mut [Projection<'_, Self>],
    ) {
        let m = batch.len();
        let x = &x[..m * inputs];
        let left = Left::pack(m, inputs, &row_major(x, inputs));
        for p in projections {
            let outputs = p.weight.shape().0;
            debug_assert_eq!(p.weight.shape().1, inputs);
            if let (Some(lora), Some(down)) = (&p.lora, p.down.as_deref_mut()) {
                let r = lora.rank;
                let down = &mut down[..m * r];
                let a = row_major(&lora.a[..r * inputs], inputs);
                match lora.dropout {
                    None => multiply(self.bf16, &left, r, a, down, false),
                    Some(dropout) => {
                        let dropped = self.dropped(batch, inputs, dropout, x);
                        let left = Left::pack(m, inputs, &row_major(&dropped, inputs));
                        multiply(self.bf16, &left, r, a, down, false);
                    }
                }
                scale_slice(T::from_f64(lora.scale), down);
                if self.bf16 {
                    round_slice(down);
                }
            }
            let Some(output) = p.output.as_deref_mut() else { continue };
            let output = &mut output[..m * outputs];
            left.multiply(outputs, &p.weight.by_rows(), Output::new(output, outputs), false);
            if let (Some(lora), Some(down)) = (&p.lora, p.down.as_deref()) {
                let r = lora.rank;
                let down = Left::pack(m, r, &row_major(&down[..m * r], r));
                multiply(self.bf16, &down, outputs, row_major(&lora.b[..outputs * r], r), output, true);
            }
            if let Some(bias) = p.bias {
                output.par_chunks_mut(outputs).for_each(|row| add_slice(bias, row));
            }
            if self.bf16 {
                round_bf16(output);
            }
        }
    }

    pub(super) fn linear_gradients(
        &self,
        batch: &Batch,
        inputs: usize,
        x: &[T],
        projections: &mut [ProjectionBackward<'_, Self>],
        mut dx: Option<&mut [T]>,
    ) {
        let m = batch.len();
        let x = &x[..m * inputs];
        let mut started = false;
        for p in projections {
            let outputs = p.weight.shape().0;
            let dy = &p.output_gradient[..m * outputs];
            let left = Left::pack(m, outputs, &row_major(dy, outputs));
            if let Some(dx) = dx.as_deref_mut() {
                left.multiply(
                    inputs,
                    &p.weight.by_columns(),
                    Output::new(&mut dx[..m * inputs], inputs),
                    started,
                );
                started = true;
            }
            let Some(lora) = &p.lora else { continue };
            let r = lora.rank;
            // G = scale·dY·B, [M, r]
            let mut g = self.scratch(m * r);
            multiply(self.bf16, &left, r, column_major(&lora.b[..outputs * r], r), &mut g, false);
            drop(left);
            scale_slice(T::from_f64(lora.scale), &mut g);
            if self.bf16 {
                round_slice(&mut g);
            }
            let mut dropped = lora.dropout.map(|dropout| self.dropped(batch, inputs, dropout, x));
            let input = dropped.as_deref().unwrap_or(x);
            // Sequence by sequence, so that the sum over tokens does not know how the batch was cut.
            for offsets in batch.sequence_offsets.windows(2) {
                let (first, last) = (offsets[0] as usize, offsets[1] as usize);
                let t = last - first;
                if let (Some(db), Some(down)) = (p.b_gradient.as_deref_mut(), p.down) {
                    let a = column_major(&dy[first * outputs..last * outputs], outputs);
                    let b = column_major(&down[first * r..last * r], r);
                    gemm(Parallel::Pool, outputs, r, t, &a, &b, Output::new(&mut db[..outputs * r], r), true);
                }
                if let Some(da) = p.a_gradient.as_deref_mut() {
                    let a = column_major(&g[first * r..last * r], r);
                    let b = column_major(&input[first * inputs..last * inputs], inputs);
                    gemm(
                        Parallel::Pool,
                        r,
                        inputs,
                        t,
                        &a,
                        &b,
                        Output::new(&mut da[..r * inputs], inputs),
                        true,
                    );
                }
            }
            if let Some(dx) = dx.as_deref_mut() {
                let dx = &mut dx[..m * inputs];
                let g = Left::pack(m, r, &row_major(&g, r));
                let a = column_major(&lora.a[..r * inputs], inputs);
                match (lora.dropout, dropped.as_deref_mut()) {
                    (Some(dropout), Some(through)) => {
                        multiply(self.bf16, &g, inputs, a, through, false);
                        apply_dropout(batch, inputs, dropout, through);
                        super::elementwise::add(through, false, dx);
                    }
                    _ => multiply(self.bf16, &g, inputs, a, dx, true),
                }
            }
        }
        if self.bf16
            && let Some(dx) = dx
        {
            round_bf16(&mut dx[..m * inputs]);
        }
    }

    /// A copy of x after dropout.
    fn dropped(&self, batch: &Batch, inputs: usize, dropout: Dropout, x: &[T]) -> super::Scratch<'_, T> {
        let mut copy = self.scratch(x.len());
        copy.copy_from_slice(x);
        apply_dropout(batch, inputs, dropout, &mut copy);
        if self.bf16 {
            round_bf16(&mut copy);
        }
        copy
    }

    /// `out[t] = table[token t]`
    pub(super) fn embed_rows(&self, batch: &Batch, table: &CpuMatrix, hidden: usize, out: &mut [T]) {
        out[..batch.len() * hidden]
            .par_chunks_mut(hidden)
            .zip(&batch.tokens)
            .for_each(|(row, &token)| table.elements(token as usize * hidden, row));
    }
}
