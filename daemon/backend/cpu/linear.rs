//! Linear layers over a frozen weight with a LoRA beside it: forward, input gradient, adapter gradients.

use super::elementwise::{add_slice, round_bf16, round_slice, scale_slice};
use super::gemm::{Left, Operand, Output, Parallel, Strided, gemm};
use super::real::Real;
use super::team;
use super::{Cpu, CpuMatrix};
use crate::backend::philox::philox4x32;
use crate::backend::{Batch, Dropout, Projection, ProjectionBackward};

/// A master weight as an operand: rounded to bfloat16 as it is packed when computing in bfloat16 (the working copy).
struct Master<'a, T> {
    values: Strided<'a, T>,
    round: bool,
}

impl<T: Real> Operand<T> for Master<'_, T> {
    fn pack(&self, first: usize, lines: usize, width: usize, start: usize, depth: usize, out: &mut [T]) {
        self.values.pack(first, lines, width, start, depth, out);
        if self.round {
            round_slice(&mut out[..width * depth]);
        }
    }
}

/// `c = a·b` with b a master weight, `[m, n]`.
fn multiply<T: Real>(round: bool, a: &Left<T>, n: usize, b: Strided<'_, T>, c: &mut [T]) {
    a.multiply(n, &Master { values: b, round }, Output::new(c, n), false);
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
        team::chunks(4096, rows, |chunk, rows| {
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
        let rank =
            projections.iter().filter_map(|p| p.lora.as_ref()).map(|lora| lora.rank).max().unwrap_or(0);
        let mut left = Left::with_tail(m, inputs, rank, &row_major(x, inputs));
        for p in projections {
            let outputs = p.weight.shape().0;
            debug_assert_eq!(p.weight.shape().1, inputs);
            if let (Some(lora), Some(down)) = (&p.lora, p.down.as_deref_mut()) {
                let r = lora.rank;
                debug_assert_eq!(r, rank, "the layers of a group have one rank");
                let down = &mut down[..m * r];
                let a = row_major(&lora.a[..r * inputs], inputs);
                match lora.dropout {
                    None => multiply(self.bf16, &left, r, a, down),
                    Some(dropout) => {
                        let dropped = self.dropped(batch, inputs, dropout, x);
                        let left = Left::pack(m, inputs, &row_major(&dropped, inputs));
                        multiply(self.bf16, &left, r, a, down);
                    }
                }
                scale_slice(T::from_f64(lora.scale), down);
                if self.bf16 {
                    round_slice(down);
                }
            }
            let Some(output) = p.output.as_deref_mut() else { continue };
            let output = &mut output[..m * outputs];
            let to = Output::new(output, outputs);
            match (&p.lora, p.down.as_deref()) {
                (Some(lora), Some(down)) => {
                    left.set_tail(&row_major(&down[..m * rank], rank));
                    let b = row_major(&lora.b[..outputs * rank], rank);
                    left.multiply_with_tail(outputs, &p.weight.by_rows(), &self.master(b), to, false);
                }
                _ => left.multiply(outputs, &p.weight.by_rows(), to, false),
            }
            if let Some(bias) = p.bias {
                team::chunks(16 * outputs, output, |_, rows| {
                    rows.chunks_exact_mut(outputs).for_each(|row| add_slice(bias, row));
                });
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
            let rank = p.lora.as_ref().map_or(0, |lora| lora.rank);
            let mut left = Left::with_tail(m, outputs, rank, &row_major(dy, outputs));
            let mut g = self.scratch(m * rank);
            if let Some(lora) = &p.lora {
                // G = scale·dY·B, [M, r]
                multiply(self.bf16, &left, rank, column_major(&lora.b[..outputs * rank], rank), &mut g);
                scale_slice(T::from_f64(lora.scale), &mut g);
                if self.bf16 {
                    round_slice(&mut g);
                }
            }
            if let Some(dx) = dx.as_deref_mut() {
                let to = Output::new(&mut dx[..m * inputs], inputs);
                let weight = p.weight.by_columns();
                match &p.lora {
                    // dX = [dY | G]·[W; A]
                    Some(lora) if lora.dropout.is_none() => {
                        left.set_tail(&row_major(&g, rank));
                        let a = self.master(column_major(&lora.a[..rank * inputs], inputs));
                        left.multiply_with_tail(inputs, &weight, &a, to, started);
                    }
                    _ => left.multiply(inputs, &weight, to, started),
                }
                started = true;
            }
            drop(left);
            let Some(lora) = &p.lora else { continue };
            let r = rank;
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
            // With dropout G·A goes back through the mask before it is added.
            if let (Some(dx), Some(dropout), Some(through)) =
                (dx.as_deref_mut(), lora.dropout, dropped.as_deref_mut())
            {
                let g = Left::pack(m, r, &row_major(&g, r));
                multiply(self.bf16, &g, inputs, column_major(&lora.a[..r * inputs], inputs), through);
                apply_dropout(batch, inputs, dropout, through);
                super::elementwise::add(through, false, &mut dx[..m * inputs]);
            }
        }
        if self.bf16
            && let Some(dx) = dx
        {
            round_bf16(&mut dx[..m * inputs]);
        }
    }

    /// A master weight as an operand.
    fn master<'a>(&self, values: Strided<'a, T>) -> Master<'a, T> {
        Master { values, round: self.bf16 }
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
        team::chunks(hidden, &mut out[..batch.len() * hidden], |t, row| {
            table.elements(batch.tokens[t] as usize * hidden, row);
        });
    }
}
