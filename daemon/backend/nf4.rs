//! 4-bit NormalFloat, bit for bit as bitsandbytes computes it on a CPU.
//!
//! A matrix is read row by row as one long run of elements and cut into blocks of 64. Each block is divided by its
//! largest magnitude (*absmax*), and every quotient is replaced by the index of the nearest of sixteen fixed codes
//! (QLoRA, arXiv 2305.14314, appendix E). Two codes share a byte, the first in the high nibble:
//!
//! ```text
//!   elements  x0 x1 x2 … x63 | x64 …            absmax   a0 = max|x0..x63|, a1 …
//!   codes     [c0 c1][c2 c3] …                  x ≈ NF4_CODES[c] · a
//! ```
//!
//! That is 4.5 bits an element. *Double quantisation* brings it to 4.127: the mean of all absmax values is subtracted
//! from them, and what is left is quantised once more, in blocks of 256, to the 256 values of a signed 8-bit floating
//! code with a variable exponent ("dynamic map", arXiv 1511.04561).
//!
//! **What "bit for bit" rests on.** Everything here is a single correctly rounded float32 operation at a time, and the
//! few places where the order or the choice is free follow bitsandbytes 0.50 on x86-64:
//!
//! * a full block is multiplied by `1 / absmax`, a last short block is divided by `absmax`;
//! * a quotient on the border between two codes takes the lower one; an odd last nibble holds the code of zero;
//! * the mean is PyTorch's single-threaded CPU sum (see `sum` below) divided by the count;
//! * nested codes come from a table of 65,536 steps over [-1, 1], not from an exact search for the nearest value.
//!
//! bitsandbytes on a GPU agrees on codes and plain absmax; it rounds nested codes exactly and sums in another order,
//! so there the nested codes may be neighbours. A checkpoint quantised elsewhere is read as it is.

use super::frozen::{Absmax, Blob, Nf4Matrix};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Arc, LazyLock};

/// Elements per block when we quantise.
pub const BLOCK: usize = 64;

/// Blocks per nested block when we quantise.
pub const NESTED_BLOCK: usize = 256;

/// The sixteen code values: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
pub const NF4_CODES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Borders between neighbouring codes; an element's code is the number of borders strictly below it.
const BORDERS: [f32; 15] = {
    let mut borders = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        borders[i] = (NF4_CODES[i] + NF4_CODES[i + 1]) / 2.0;
        i += 1;
    }
    borders
};

/// Code of zero, which fills the last nibble of an odd number of elements.
const ZERO: u8 = 7;

/// Smallest divisor: keeps the quotients of an all-zero block finite.
const TINY: f32 = 1e-38;

/// Elements that one task quantises: its float32 copy (64 KiB) and its codes stay in the second-level cache.
const CHUNK: usize = 256 * BLOCK;

/// An element that cannot be quantised, because it is infinite or not a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonFinite {
    /// Row of the first such element.
    pub row: usize,
    /// Its column.
    pub col: usize,
}

/// Sizes of an [`Nf4Matrix`] that contradict each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {found} instead of {expected}")]
pub struct Inconsistent {
    /// The part that is wrong.
    pub what: &'static str,
    /// Its size or value.
    pub found: usize,
    /// What the other parts ask for.
    pub expected: usize,
}

/// Quantises a row-major `[rows, cols]` matrix in parallel; the result does not depend on the number of threads.
///
/// # Errors
/// The first element that is infinite or NaN.
///
/// # Panics
/// When `values` does not have `rows * cols` elements.
pub fn quantize(
    values: &[f32],
    rows: usize,
    cols: usize,
    double_quant: bool,
) -> Result<Nf4Matrix, NonFinite> {
    assert_eq!(Some(values.len()), rows.checked_mul(cols), "values are not [{rows}, {cols}]");
    quantize_from(rows, cols, double_quant, |start, out| {
        out.copy_from_slice(&values[start..start + out.len()]);
    })
}

/// [`quantize`] for a matrix that exists only piecewise in float32: `load(start, out)` writes the elements
/// `start..start + out.len()` (row-major) to `out`. It is called once for every element, from several threads, with
/// pieces of at most 64 KiB, so a half-precision source is never widened as a whole.
///
/// # Errors
/// The first element that is infinite or NaN.
pub fn quantize_from(
    rows: usize,
    cols: usize,
    double_quant: bool,
    load: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<Nf4Matrix, NonFinite> {
    let n = rows * cols;
    let mut codes: Arc<[u8]> = std::iter::repeat_n(0, n.div_ceil(2)).collect();
    let mut absmax = vec![0f32; n.div_ceil(BLOCK)];
    let bad = Arc::get_mut(&mut codes)
        .into_iter()
        .flat_map(|c| c.chunks_mut(CHUNK / 2))
        .zip(absmax.chunks_mut(CHUNK / BLOCK))
        .collect::<Vec<_>>()
        .into_par_iter()
        .enumerate()
        .map_init(
            || vec![0f32; CHUNK],
            |buffer, (chunk, (codes, absmax))| {
                let start = chunk * CHUNK;
                let values = &mut buffer[..(n - start).min(CHUNK)];
                load(start, values);
                quantize_chunk(values, codes, absmax);
                let bad_block = absmax.iter().position(|a| !a.is_finite())?;
                let in_block = values[bad_block * BLOCK..].iter().position(|v| !v.is_finite())?;
                Some(start + bad_block * BLOCK + in_block)
            },
        )
        .flatten()
        .min();
    if let Some(at) = bad {
        return Err(NonFinite { row: at / cols, col: at % cols });
    }
    let absmax = if double_quant { nest(absmax) } else { Absmax::Plain(f32_blob(&absmax)) };
    Ok(Nf4Matrix { rows, cols, block: BLOCK, codes: Blob::Owned(codes), absmax })
}

/// Quantises consecutive blocks; only the last may be short.
fn quantize_chunk(values: &[f32], codes: &mut [u8], absmax: &mut [f32]) {
    let (full, short) = values.as_chunks::<BLOCK>();
    let (full_codes, short_codes) = codes.split_at_mut(full.len() * (BLOCK / 2));
    for ((block, codes), absmax) in full.iter().zip(full_codes.as_chunks_mut().0).zip(&mut *absmax) {
        *absmax = magnitude(block);
        let scale = 1.0 / absmax.max(TINY);
        pack(&block.map(|v| v * scale), codes);
    }
    if let Some(last) = absmax.get_mut(full.len()) {
        let max = magnitude(short);
        *last = if max < TINY { TINY } else { max }; // not `max`, which would hide a NaN
        let code = |v: &f32| BORDERS.iter().filter(|&&border| v / *last > border).count() as u8;
        for (pair, byte) in short.chunks(2).zip(short_codes) {
            *byte = code(&pair[0]) << 4 | pair.get(1).map_or(ZERO, code);
        }
    }
}

/// Largest magnitude; infinite or NaN when an element is. Magnitudes of floats order as their bits do, with NaN above
/// infinity, and integer comparisons vectorise without worrying about NaN.
fn magnitude(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0i32, |max, v| max.max((v.to_bits() & 0x7fff_ffff) as i32)) as u32)
}

/// Codes of one block of quotients. Counting borders is 15 comparisons an element, but without a branch: the compiler
/// turns it into vector compares, several times faster than a search tree.
#[inline(always)]
fn pack(quotients: &[f32; BLOCK], codes: &mut [u8; BLOCK / 2]) {
    let mut count = [0i32; BLOCK];
    for (count, &q) in count.iter_mut().zip(quotients) {
        for border in BORDERS {
            *count = count.wrapping_add(i32::from(q > border)); // at most 15: a check would only stop the vectors
        }
    }
    for (byte, pair) in codes.iter_mut().zip(count.as_chunks::<2>().0) {
        *byte = (pair[0] << 4 | pair[1]) as u8;
    }
}

/// Double quantisation of the absmax values.
fn nest(mut absmax: Vec<f32>) -> Absmax {
    let offset = sum(&absmax) / absmax.len() as f32;
    absmax.iter_mut().for_each(|a| *a -= offset);
    let map = dynamic_map();
    let steps = &*STEPS;
    let mut codes: Arc<[u8]> = std::iter::repeat_n(0, absmax.len()).collect();
    let mut nested = Vec::with_capacity(absmax.len().div_ceil(NESTED_BLOCK));
    let out = Arc::get_mut(&mut codes).into_iter().flat_map(|c| c.chunks_mut(NESTED_BLOCK));
    for (values, codes) in absmax.chunks(NESTED_BLOCK).zip(out) {
        let max = magnitude(values);
        nested.push(max);
        if max > 0.0 {
            let scale = 1.0 / max;
            for (code, v) in codes.iter_mut().zip(values) {
                *code = steps[step(v * scale)];
            }
        }
    }
    Absmax::Nested {
        codes: Blob::Owned(codes),
        map: Arc::clone(map),
        nested: nested.into(),
        nested_block: NESTED_BLOCK,
        offset,
    }
}

/// Steps of the table that stands in for the search of the nearest nested code.
const NESTED_STEPS: usize = 65_536;

/// Which step of [-1, 1] a quotient falls on.
fn step(quotient: f32) -> usize {
    ((quotient.clamp(-1.0, 1.0) + 1.0) * 0.5 * (NESTED_STEPS - 1) as f32 + 0.5) as u16 as usize
}

/// Nested code of each step.
static STEPS: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let map = dynamic_map();
    let mut code = 0;
    (0..NESTED_STEPS)
        .map(|i| {
            let value = -1.0 + (2.0 * i as f32) / (NESTED_STEPS - 1) as f32;
            while code < 255 && 0.5 * (map[code] + map[code + 1]) < value {
                code += 1;
            }
            code as u8
        })
        .collect()
});

/// The signed 8-bit dynamic map, ascending: for every power of ten from 1e-6 to 1, the midpoints of 1, 2, 4 … 64 equal
/// parts of [0.1, 1] times that power, with both signs; and 0 and 1.
pub fn dynamic_map() -> &'static Arc<[f32; 256]> {
    static MAP: LazyLock<Arc<[f32; 256]>> = LazyLock::new(|| {
        let mut map = [0f32; 256];
        let mut at = 0;
        for exponent in 0..7 {
            let parts = 1usize << exponent;
            // The powers as nearest float32 of the decimal, which repeated multiplication would miss.
            let power = [1e-6f32, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0][exponent];
            for part in 0..parts {
                let middle = (boundary(part, parts) + boundary(part + 1, parts)) / 2.0;
                map[at] = power * middle;
                map[at + 1] = -power * middle;
                at += 2;
            }
        }
        map[at] = 0.0;
        map[at + 1] = 1.0;
        map.sort_by(f32::total_cmp);
        Arc::new(map)
    });
    &MAP
}

/// Boundary `i` of `parts` equal parts of [0.1, 1], rounded as `torch.linspace` does: counted from the nearer end, with
/// one rounding for product and sum (PyTorch's vector kernels use fused multiply-add).
fn boundary(i: usize, parts: usize) -> f32 {
    let step = (1.0f32 - 0.1) / parts as f32;
    if i < parts.div_ceil(2) { step.mul_add(i as f32, 0.1) } else { (-step).mul_add((parts - i) as f32, 1.0) }
}

/// Sum in the order of PyTorch's CPU kernel on one thread (`cascade_sum`, vectors of 8 lanes): the values are read as
/// rows of 32, four vectors side by side; the 32 columns are summed by a cascade of four levels, each of which is
/// emptied into the next after `2^power` additions, which keeps the rounding error small; then the four vectors are
/// added, then what did not fill a row, then the lanes.
fn sum(values: &[f32]) -> f32 {
    const LANES: usize = 8;
    const ROW: usize = 4 * LANES;
    const LEVELS: usize = 4;
    let (vectors, rest) = values.as_chunks::<LANES>();
    let (rows, extra) = values[..vectors.len() * LANES].as_chunks::<ROW>();

    let mut level = [[0f32; ROW]; LEVELS];
    let power = 4.max((rows.len().next_power_of_two().trailing_zeros() as usize) / LEVELS);
    let whole = rows.len() >> power << power;
    for (i, row) in rows.iter().enumerate() {
        for (total, v) in level[0].iter_mut().zip(row) {
            *total += v;
        }
        let done = i + 1;
        if done > whole {
            continue;
        }
        for j in 1..LEVELS {
            if done & ((1 << (j * power)) - 1) != 0 {
                break;
            }
            let (below, above) = level.split_at_mut(j);
            for (total, v) in above[0].iter_mut().zip(&mut below[j - 1]) {
                *total += std::mem::take(v);
            }
        }
    }
    let (first, above) = level.split_at_mut(1);
    for above in above {
        for (total, v) in first[0].iter_mut().zip(above) {
            *total += *v;
        }
    }
    let [columns, ..] = level;
    let (columns, _) = columns.as_chunks::<LANES>();
    let mut lanes = columns[0];
    let mut add = |vector: &[f32]| lanes.iter_mut().zip(vector).for_each(|(total, v)| *total += v);
    extra.chunks(LANES).for_each(&mut add);
    columns[1..].iter().for_each(|vector| add(vector));
    let tail = rest.iter().fold(0.0, |total, v| total + v);
    lanes.iter().fold(tail, |total, v| total + v)
}

/// Little-endian bytes of float32 values.
fn f32_blob(values: &[f32]) -> Blob {
    let mut bytes = Vec::with_capacity(values.len() * 4);
    values.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()));
    Blob::Owned(bytes.into())
}

impl Nf4Matrix {
    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        (self.rows * self.cols).div_ceil(self.block)
    }

    /// Scale of block `block`.
    ///
    /// # Panics
    /// When there is no such block.
    pub fn absmax_at(&self, block: usize) -> f32 {
        match &self.absmax {
            Absmax::Plain(blob) => f32_at(blob.as_bytes(), block),
            Absmax::Nested { codes, map, nested, nested_block, offset } => {
                map[codes.as_bytes()[block] as usize] * nested[block / nested_block] + offset
            }
        }
    }

    /// Writes the float32 values of `rows` to `out`, `[rows.len(), cols]`.
    ///
    /// # Panics
    /// When `rows` or `out` does not fit the matrix.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert_eq!(out.len(), rows.len() * self.cols, "output of {} rows of {}", rows.len(), self.cols);
        self.dequantize_from(rows.start * self.cols, out);
    }

    /// Writes the float32 values of the elements from `at` on, in row-major order, to `out`.
    ///
    /// # Panics
    /// When the matrix ends before `out` does.
    pub fn dequantize_from(&self, mut at: usize, mut out: &mut [f32]) {
        let codes = self.codes.as_bytes();
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") && at.is_multiple_of(16) && self.block.is_multiple_of(16) {
            // Whole groups of 16, several blocks a call: what a call costs is spread over a row.
            let mut scales = [0.0; 32];
            while out.len() >= 16 {
                let skip = at % self.block;
                let len = (out.len() / 16 * 16).min(scales.len() * self.block - skip);
                let blocks = (skip + len).div_ceil(self.block);
                for (i, scale) in scales[..blocks].iter_mut().enumerate() {
                    *scale = self.absmax_at(at / self.block + i);
                }
                let (part, rest) = out.split_at_mut(len);
                let (bytes, _) = codes[at / 2..(at + len) / 2].as_chunks::<8>();
                let (lines, _) = part.as_chunks_mut::<16>();
                // SAFETY: the processor has what the function was compiled for.
                unsafe {
                    x86::expand_blocks_avx512(bytes, &scales[..blocks], self.block / 16, skip / 16, lines)
                };
                at += len;
                out = rest;
            }
        }
        while !out.is_empty() {
            let block = at / self.block;
            let (part, rest) = out.split_at_mut(((block + 1) * self.block - at).min(out.len()));
            let absmax = self.absmax_at(block);
            // Scaling the sixteen codes instead of every element gives the same product for a quarter of the work.
            expand(codes, at, &NF4_CODES.map(|code| code * absmax), part);
            at += part.len();
            out = rest;
        }
    }

    /// Whether every part has the size that the shape asks for, so that no other method can index out of range.
    ///
    /// # Errors
    /// The first part that does not.
    pub fn check(&self) -> Result<(), Inconsistent> {
        let expect = |what, found, expected| {
            if found == expected { Ok(()) } else { Err(Inconsistent { what, found, expected }) }
        };
        let Some(n) = self.rows.checked_mul(self.cols) else {
            return Err(Inconsistent { what: "number of rows", found: self.rows, expected: 0 });
        };
        // Odd blocks would straddle bytes; bitsandbytes' smallest is 32.
        expect("block size (a multiple of 32), remainder", self.block % 32, 0)?;
        expect("block size of zero blocks", usize::from(self.block == 0), 0)?;
        expect("bytes of codes", self.codes.as_bytes().len(), n.div_ceil(2))?;
        let blocks = n.div_ceil(self.block);
        match &self.absmax {
            Absmax::Plain(blob) => expect("bytes of absmax", blob.as_bytes().len(), blocks * 4),
            Absmax::Nested { codes, nested, nested_block, .. } => {
                expect("nested block size of zero blocks", usize::from(*nested_block == 0), 0)?;
                expect("codes of absmax", codes.as_bytes().len(), blocks)?;
                expect("nested absmax values", nested.len(), blocks.div_ceil(*nested_block))
            }
        }
    }
}

/// The `i`-th little-endian float32.
fn f32_at(bytes: &[u8], i: usize) -> f32 {
    let b = &bytes[i * 4..i * 4 + 4];
    f32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// Elements `at..at + out.len()` of one block, whose scaled codes are `table`.
fn expand(codes: &[u8], at: usize, table: &[f32; 16], out: &mut [f32]) {
    let lookup = |i: usize| {
        let byte = codes[i / 2];
        table[usize::from(if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 })]
    };
    let mut done = 0;
    if at.is_multiple_of(2) {
        let (lines, _) = out.as_chunks_mut::<16>();
        let (bytes, _) = codes[at / 2..].as_chunks::<8>();
        done = lines.len() * 16;
        expand_lines(&bytes[..lines.len()], table, lines);
    }
    for (i, v) in out[done..].iter_mut().enumerate() {
        *v = lookup(at + done + i);
    }
}

/// Whole groups of 8 bytes to 16 values.
fn expand_lines(bytes: &[[u8; 8]], table: &[f32; 16], out: &mut [[f32; 16]]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has what the function was compiled for.
            return unsafe { x86::expand_avx512(bytes, table, out) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { x86::expand_avx2(bytes, table, out) };
        }
    }
    expand_portable(bytes, table, out);
}

/// [`expand_lines`] for any processor.
fn expand_portable(bytes: &[[u8; 8]], table: &[f32; 16], out: &mut [[f32; 16]]) {
    for (bytes, out) in bytes.iter().zip(out) {
        for (byte, pair) in bytes.iter().zip(out.as_chunks_mut::<2>().0) {
            *pair = [table[usize::from(byte >> 4)], table[usize::from(byte & 15)]];
        }
    }
}

/// Table look-up in a register: one permutation yields sixteen elements, five to ten times as fast as sixteen loads.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Sixteen nibbles, one a byte, in element order.
    #[target_feature(enable = "sse2")]
    fn nibbles(bytes: &[u8; 8]) -> __m128i {
        let packed = _mm_set_epi64x(0, i64::from_le_bytes(*bytes));
        let mask = _mm_set1_epi8(15);
        let high = _mm_and_si128(_mm_srli_epi16::<4>(packed), mask);
        _mm_unpacklo_epi8(high, _mm_and_si128(packed, mask))
    }

    #[target_feature(enable = "avx512f")]
    pub fn expand_avx512(bytes: &[[u8; 8]], table: &[f32; 16], out: &mut [[f32; 16]]) {
        // SAFETY: sixteen floats are read and written, which is what the arrays hold; both instructions take any
        // alignment.
        unsafe {
            let table = _mm512_loadu_ps(table.as_ptr());
            for (bytes, out) in bytes.iter().zip(out) {
                let index = _mm512_cvtepu8_epi32(nibbles(bytes));
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutexvar_ps(index, table));
            }
        }
    }

    /// Groups of sixteen from several blocks of `per_block` groups each, of which the first `skip` are left out.
    #[target_feature(enable = "avx512f")]
    pub fn expand_blocks_avx512(
        bytes: &[[u8; 8]],
        scales: &[f32],
        per_block: usize,
        skip: usize,
        out: &mut [[f32; 16]],
    ) {
        // SAFETY: as above.
        let codes = unsafe { _mm512_loadu_ps(super::NF4_CODES.as_ptr()) };
        let (mut bytes, mut out, mut left) = (bytes, out, per_block - skip);
        for &scale in scales {
            let table = _mm512_mul_ps(codes, _mm512_set1_ps(scale));
            let count = left.min(out.len());
            let (now, later) = bytes.split_at(count);
            let (lines, rest) = out.split_at_mut(count);
            for (bytes, line) in now.iter().zip(lines) {
                let index = _mm512_cvtepu8_epi32(nibbles(bytes));
                // SAFETY: as above.
                unsafe { _mm512_storeu_ps(line.as_mut_ptr(), _mm512_permutexvar_ps(index, table)) };
            }
            (bytes, out, left) = (later, rest, per_block);
        }
    }

    #[target_feature(enable = "avx2")]
    pub fn expand_avx2(bytes: &[[u8; 8]], table: &[f32; 16], out: &mut [[f32; 16]]) {
        // SAFETY: as above, eight floats at a time.
        unsafe {
            let low = _mm256_loadu_ps(table.as_ptr());
            let high = _mm256_loadu_ps(table.as_ptr().add(8));
            for (bytes, out) in bytes.iter().zip(out) {
                let nibbles = nibbles(bytes);
                for (half, nibbles) in [nibbles, _mm_srli_si128::<8>(nibbles)].into_iter().enumerate() {
                    let index = _mm256_cvtepu8_epi32(nibbles);
                    // The permutation reads three bits; the fourth, moved to the sign, chooses the half of the table.
                    let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index));
                    let values = _mm256_blendv_ps(
                        _mm256_permutevar8x32_ps(low, index),
                        _mm256_permutevar8x32_ps(high, index),
                        upper,
                    );
                    _mm256_storeu_ps(out.as_mut_ptr().add(half * 8), values);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use safetensors::SafeTensors;
    use sha2::{Digest, Sha256};

    /// `tests/golden/make_nf4.py` writes it with bitsandbytes.
    const GOLDEN: &[u8] =
        include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/nf4.safetensors"));

    fn floats(bytes: &[u8]) -> Vec<f32> {
        (0..bytes.len() / 4).map(|i| f32_at(bytes, i)).collect()
    }

    fn le_bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    /// The formula of `ramp` in the Python script.
    fn ramp(rows: usize, cols: usize) -> Vec<f32> {
        (0..rows * cols)
            .map(|i| {
                let mixed = (i as u32).wrapping_mul(2_654_435_761);
                let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(2_246_822_519);
                let value = (mixed >> 8) as f32 / (1 << 24) as f32 - 0.5;
                value * (-((i / cols % 7) as f32)).exp2()
            })
            .collect()
    }

    fn dequantize(matrix: &Nf4Matrix) -> Vec<f32> {
        let mut out = vec![0.0; matrix.rows * matrix.cols];
        matrix.dequantize_rows(0..matrix.rows, &mut out);
        out
    }

    #[test]
    fn tables_equal_bitsandbytes() {
        let golden = SafeTensors::deserialize(GOLDEN).unwrap();
        assert_eq!(le_bytes(&NF4_CODES), golden.tensor("nf4_codes").unwrap().data());
        assert_eq!(le_bytes(&dynamic_map()[..]), golden.tensor("dynamic_map").unwrap().data());
    }

    #[test]
    fn codes_scales_and_values_equal_bitsandbytes() {
        let golden = SafeTensors::deserialize(GOLDEN).unwrap();
        let mut cases = 0;
        for (name, tensor) in golden.tensors() {
            let (case, values, rows, cols) = match name.rsplit_once('/') {
                Some((case, "values")) => (case, floats(tensor.data()), tensor.shape()[0], tensor.shape()[1]),
                Some((case, "ramp")) => {
                    let size = |i: usize| tensor.data()[i * 4..i * 4 + 4].try_into().map(u32::from_le_bytes);
                    let (rows, cols) = (size(0).unwrap() as usize, size(1).unwrap() as usize);
                    (case, ramp(rows, cols), rows, cols)
                }
                _ => continue,
            };
            cases += 1;
            for (kind, double_quant) in [("plain", false), ("nested", true)] {
                let matrix = quantize(&values, rows, cols, double_quant).unwrap();
                matrix.check().unwrap();
                let expect = |part: &str, bytes: &[u8]| {
                    let found = match golden.tensor(&format!("{case}/{kind}/{part}")) {
                        Ok(tensor) => bytes == tensor.data(),
                        Err(_) => {
                            let tensor = golden.tensor(&format!("{case}/{kind}/{part}_sha256")).unwrap();
                            Sha256::digest(bytes)[..] == *tensor.data()
                        }
                    };
                    assert!(found, "{case}/{kind}/{part} differs");
                };
                match &matrix.absmax {
                    Absmax::Plain(absmax) => expect("absmax", absmax.as_bytes()),
                    Absmax::Nested { codes, nested, offset, .. } => {
                        expect("offset", &le_bytes(&[*offset]));
                        expect("nested_absmax", &le_bytes(nested));
                        expect("absmax", codes.as_bytes());
                    }
                }
                expect("codes", matrix.codes.as_bytes());
                let digest = Sha256::digest(le_bytes(&dequantize(&matrix)));
                let tensor = golden.tensor(&format!("{case}/{kind}/dequantized")).unwrap();
                assert_eq!(digest[..], *tensor.data(), "{case}/{kind}: dequantised values differ");
            }
        }
        assert!(cases >= 19, "only {cases} cases in the golden file");
    }

    #[test]
    fn any_rows_equal_the_same_rows_of_the_whole() {
        for (rows, cols) in [(6, 50), (5, 33), (7, 64), (4, 172), (3, 1)] {
            let matrix = quantize(&ramp(rows, cols), rows, cols, true).unwrap();
            let whole = dequantize(&matrix);
            for start in 0..=rows {
                for end in start..=rows {
                    let mut part = vec![f32::NAN; (end - start) * cols];
                    matrix.dequantize_rows(start..end, &mut part);
                    assert_eq!(
                        part,
                        whole[start * cols..end * cols],
                        "rows {start}..{end} of [{rows}, {cols}]"
                    );
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_expands_alike() {
        let bytes: Vec<[u8; 8]> = (0..64u8)
            .map(|i| std::array::from_fn(|j| i.wrapping_mul(37) ^ (j as u8).wrapping_mul(41)))
            .collect();
        let table = NF4_CODES.map(|c| c * 0.37);
        let mut portable = vec![[0.0; 16]; bytes.len()];
        expand_portable(&bytes, &table, &mut portable);
        assert_eq!(
            portable[0][..2],
            [table[usize::from(bytes[0][0] >> 4)], table[usize::from(bytes[0][0] & 15)]]
        );
        let mut found = vec![[0.0; 16]; bytes.len()];
        expand_lines(&bytes, &table, &mut found);
        assert_eq!(found, portable);
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            let mut found = vec![[0.0; 16]; bytes.len()];
            // SAFETY: the processor has AVX2.
            unsafe { x86::expand_avx2(&bytes, &table, &mut found) };
            assert_eq!(found, portable);
        }
    }

    #[test]
    fn number_of_threads_does_not_matter() {
        let values = ramp(301, 517);
        let in_pool = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let matrix = pool.install(|| quantize(&values, 301, 517, true).unwrap());
            (matrix.codes.as_bytes().to_vec(), dequantize(&matrix))
        };
        assert_eq!(in_pool(1), in_pool(5));
    }

    #[test]
    fn first_non_finite_element_is_named() {
        let mut values = ramp(300, 100);
        values[29_950] = f32::NAN;
        values[20_123] = f32::NEG_INFINITY;
        values[20_124] = f32::NAN;
        assert_eq!(quantize(&values, 300, 100, true).unwrap_err(), NonFinite { row: 201, col: 23 });
        // Also in a last short block.
        let mut values = ramp(1, 70);
        values[69] = f32::NAN;
        assert_eq!(quantize(&values, 1, 70, false).unwrap_err(), NonFinite { row: 0, col: 69 });
    }

    #[test]
    fn contradictory_sizes_are_found() {
        let good = quantize(&ramp(10, 70), 10, 70, true).unwrap();
        good.check().unwrap();
        assert_eq!(Nf4Matrix { cols: 72, ..good.clone() }.check().unwrap_err().what, "bytes of codes");
        assert_eq!(Nf4Matrix { block: 128, ..good.clone() }.check().unwrap_err().what, "codes of absmax");
        assert!(Nf4Matrix { block: 0, ..good.clone() }.check().is_err());
        assert!(Nf4Matrix { rows: usize::MAX, ..good.clone() }.check().is_err());
        let plain = quantize(&ramp(10, 70), 10, 70, false).unwrap();
        assert_eq!(Nf4Matrix { absmax: plain.absmax, ..good.clone() }.check(), Ok(()));
        let short = Absmax::Plain(Blob::Owned(vec![0; 40].into()));
        assert_eq!(Nf4Matrix { absmax: short, ..good }.check().unwrap_err().what, "bytes of absmax");
    }

    proptest! {
        /// No element moves by more than half the widest gap between codes, plus rounding.
        #[test]
        fn error_is_bounded_by_the_gap(values in prop::collection::vec(-1e3f32..1e3, 1..400)) {
            let matrix = quantize(&values, 1, values.len(), false).unwrap();
            for (i, (v, q)) in values.iter().zip(dequantize(&matrix)).enumerate() {
                let gap = 0.152 * matrix.absmax_at(i / BLOCK);
                prop_assert!((v - q).abs() <= gap * 1.001, "element {i}: {v} became {q}");
            }
        }
    }
}
