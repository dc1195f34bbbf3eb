//! A frozen matrix as an operand of a product: elements become floating-point numbers while they are packed.

use super::elementwise::round_slice;
use super::gemm::{Operand, transpose};
use super::real::Real;
use super::simd::{self, vectorized};
use crate::backend::{Absmax, Dtype, FrozenMatrix, Nf4Matrix};
use std::cell::RefCell;

/// The 16 values of NF4 (QLoRA, arXiv 2305.14314, appendix E; the literals are those of bitsandbytes).
#[rustfmt::skip]
pub const NF4: [f32; 16] = [
    -1.0, -0.696_192_8, -0.525_073_05, -0.394_917_5, -0.284_441_38, -0.184_773_43, -0.091_050_036, 0.0,
    0.079_580_3, 0.160_930_2, 0.246_112_3, 0.337_915_24, 0.440_709_83, 0.562_617, 0.722_956_84, 1.0,
];

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
    /// Rows of one panel before they are transposed: at most 32 × 256 elements (64 KiB of f64).
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
        let inputs = self.0.shape().1;
        for (d, row) in out[..depth * width].chunks_exact_mut(width).enumerate() {
            self.0.elements((start + d) * inputs + first, &mut row[..lines]);
            row[lines..].fill(T::ZERO);
        }
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
        for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            *o = T::from_f32(f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16));
        }
    }
}

fn from_f16<T: Real>(bytes: &[u8], out: &mut [T]) {
    for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *o = T::from_f32(half::f16::from_le_bytes([b[0], b[1]]).to_f32());
    }
}

/// The scale of block `block`.
#[inline]
fn absmax(m: &Nf4Matrix, block: usize) -> f32 {
    match &m.absmax {
        Absmax::Plain(blob) => {
            let b = &blob.as_bytes()[4 * block..4 * block + 4];
            f32::from_le_bytes([b[0], b[1], b[2], b[3]])
        }
        Absmax::Nested { codes, map, nested, nested_block, offset } => {
            map[usize::from(codes.as_bytes()[block])] * nested[block / nested_block] + offset
        }
    }
}

/// Elements `start ..` of an NF4 matrix: `NF4[code] · absmax`, a product of two f32 as in bitsandbytes.
fn nf4_elements<T: Real>(m: &Nf4Matrix, start: usize, out: &mut [T]) {
    let codes = m.codes.as_bytes();
    let mut at = start;
    let mut rest = out;
    while !rest.is_empty() {
        let block = at / m.block;
        let len = rest.len().min((block + 1) * m.block - at);
        let (span, tail) = rest.split_at_mut(len);
        let scale = absmax(m, block);
        #[cfg(target_arch = "x86_64")]
        if std::any::TypeId::of::<T>() == std::any::TypeId::of::<f32>()
            && at % 2 == 0
            && len % 16 == 0
            && simd::isa() == simd::Isa::Avx512
        {
            let bytes = &codes[at / 2..at / 2 + len / 2];
            // SAFETY: T is f32; 8 bytes are read per 16 elements written, both slices have that length.
            unsafe { span_avx512(bytes, scale, span.as_mut_ptr().cast(), len) };
            at += len;
            rest = tail;
            continue;
        }
        for (i, o) in span.iter_mut().enumerate() {
            let byte = codes[(at + i) / 2];
            let code = if (at + i).is_multiple_of(2) { byte >> 4 } else { byte & 15 };
            *o = T::from_f32(NF4[usize::from(code)] * scale);
        }
        at += len;
        rest = tail;
    }
}

/// 16 elements a turn: 8 bytes → 16 nibbles → one permutation of the table → one product.
///
/// # Safety
/// `bytes.len() == len / 2`, `len % 16 == 0`, `out` is valid for `len` writes, the machine has AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn span_avx512(bytes: &[u8], scale: f32, out: *mut f32, len: usize) {
    use std::arch::x86_64::*;
    // SAFETY: 16 floats are read from a table of 16; loads and stores stay inside `bytes` and `out` (see above).
    unsafe {
        let table = _mm512_mul_ps(_mm512_loadu_ps(NF4.as_ptr()), _mm512_set1_ps(scale));
        let low = _mm_set1_epi8(15);
        for i in 0..len / 16 {
            let packed = _mm_loadl_epi64(bytes.as_ptr().add(8 * i).cast());
            let first = _mm_and_si128(_mm_srli_epi16::<4>(packed), low);
            let second = _mm_and_si128(packed, low);
            let nibbles = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(first, second));
            _mm512_storeu_ps(out.add(16 * i), _mm512_permutexvar_ps(nibbles, table));
        }
    }
}
