//! A frozen matrix as an operand of a product: elements become floating-point numbers while they are packed.

use super::elementwise::round_slice;
use super::gemm::{Operand, transpose};
use super::real::Real;
use super::simd::vectorized;
use crate::backend::{Dtype, FrozenMatrix, Nf4Matrix};
use std::any::TypeId;
use std::cell::RefCell;

/// A frozen matrix on the CPU: the bytes stay as they are stored (and mapped, where they are mapped).
pub struct CpuMatrix {
    /// The stored matrix.
    pub frozen: FrozenMatrix,
    /// Round every element to bfloat16 on its way out, as the bf16 compute type demands.
    pub round: bool,
}

impl CpuMatrix {
    /// `(outputs, inputs)`.
    pub fn shape(&self) -> (usize, usize) {
        self.frozen.shape()
    }

    /// Writes elements `start ..` of the flattened matrix.
    pub fn elements<T: Real>(&self, start: usize, out: &mut [T]) {
        match &self.frozen {
            FrozenMatrix::Dense(m) => {
                let size = m.dtype.size();
                let bytes = &m.data.as_bytes()[start * size..(start + out.len()) * size];
                match m.dtype {
                    Dtype::F32 => from_f32(bytes, out),
                    Dtype::Bf16 => from_bf16(bytes, out),
                    Dtype::F16 => from_f16(bytes, out),
                }
            }
            FrozenMatrix::Nf4(m) => nf4_elements(m, start, out),
        }
        if self.round {
            round_slice(out);
        }
    }

    /// Wᵀ as the right operand: lines are outputs, the sum runs over inputs (Y = X·Wᵀ).
    pub fn by_rows(&self) -> ByRows<'_> {
        ByRows(self)
    }

    /// W as the right operand: lines are inputs, the sum runs over outputs (dX = dY·W).
    pub fn by_columns(&self) -> ByColumns<'_> {
        ByColumns(self)
    }
}

/// See [`CpuMatrix::by_rows`].
pub struct ByRows<'a>(&'a CpuMatrix);

thread_local! {
    /// Rows of one panel before they are transposed or dealt out to tiles: at most 32 × 288 elements.
    static ROWS: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

impl<T: Real> Operand<T> for ByRows<'_> {
    fn pack(&self, first: usize, lines: usize, width: usize, start: usize, depth: usize, out: &mut [T]) {
        let inputs = self.0.shape().1;
        ROWS.with_borrow_mut(|storage| {
            let rows = super::gemm::as_reals::<T>(storage, lines * depth);
            for (i, row) in rows.chunks_exact_mut(depth).enumerate() {
                self.0.elements((first + i) * inputs + start, row);
            }
            let rows = &*rows;
            transpose(lines, width, depth, out, |i| &rows[i * depth..(i + 1) * depth]);
        });
    }
}

/// See [`CpuMatrix::by_columns`].
pub struct ByColumns<'a>(&'a CpuMatrix);

impl<T: Real> Operand<T> for ByColumns<'_> {
    fn pack(&self, first: usize, lines: usize, width: usize, start: usize, depth: usize, out: &mut [T]) {
        self.pack_tiles(first, lines, width, start, depth, out);
    }

    /// A row of W is dequantised across all tiles at once: a call for every 32 elements would cost as much as the
    /// elements themselves.
    fn pack_tiles(
        &self,
        first: usize,
        lines: usize,
        width: usize,
        start: usize,
        depth: usize,
        out: &mut [T],
    ) {
        let inputs = self.0.shape().1;
        ROWS.with_borrow_mut(|storage| {
            let tiles = lines.div_ceil(width);
            let row = super::gemm::as_reals::<T>(storage, tiles * width);
            row[lines..].fill(T::ZERO);
            for d in 0..depth {
                self.0.elements((start + d) * inputs + first, &mut row[..lines]);
                for (t, piece) in row.chunks_exact(width).enumerate() {
                    let at = (t * depth + d) * width;
                    out[at..at + width].copy_from_slice(piece);
                }
            }
        });
    }
}

vectorized! {
    fn from_f32(bytes: &[u8], out: &mut [T]) {
        for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
            *o = T::from_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        }
    }
}

vectorized! {
    fn from_bf16(bytes: &[u8], out: &mut [T]) {
        // As words the loop becomes a load, a shift and a store; byte by byte it takes ten times as long.
        if let Ok(words) = bytemuck::try_cast_slice::<u8, u16>(bytes) {
            for (o, &word) in out.iter_mut().zip(words) {
                *o = T::from_f32(f32::from_bits(u32::from(u16::from_le(word)) << 16));
            }
        } else {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = T::from_f32(f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16));
            }
        }
    }
}

fn from_f16<T: Real>(bytes: &[u8], out: &mut [T]) {
    for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *o = T::from_f32(half::f16::from_le_bytes([b[0], b[1]]).to_f32());
    }
}

/// Elements `start ..` of an NF4 matrix.
fn nf4_elements<T: Real>(m: &Nf4Matrix, start: usize, out: &mut [T]) {
    if TypeId::of::<T>() == TypeId::of::<f32>() {
        // SAFETY: T is f32.
        m.dequantize_from(start, unsafe {
            std::slice::from_raw_parts_mut(out.as_mut_ptr().cast(), out.len())
        });
        return;
    }
    let mut values = [0.0; 256];
    for (i, out) in out.chunks_mut(256).enumerate() {
        let values = &mut values[..out.len()];
        m.dequantize_from(start + 256 * i, values);
        out.iter_mut().zip(values).for_each(|(o, &mut v)| *o = T::from_f32(v));
    }
}
