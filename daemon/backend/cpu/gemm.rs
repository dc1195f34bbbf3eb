//! C = A·B and C += A·B for every product of the trainer.
//!
//! The scheme is Goto's (ACM TOMS 34(3), 2008): A and B are copied ("packed") into panels that the innermost kernel
//! reads strictly forwards, the kernel holds an MR × NR tile of C in registers, and a KC-deep panel of B stays in the
//! first-level cache while the tiles of A stream past. What a library does not offer, and why this is ours
//! (`docs/decisions/own-cpu-gemm.md`):
//!
//! * **B may be a 4-bit matrix.** Its panel is dequantised while it is packed, so a full-precision copy of the weight
//!   never exists, in either orientation ([`Operand`]).
//! * **The order of every sum is fixed**: an element of C is Σ over blocks of [`DEPTH`] in ascending order of
//!   (fused multiply-adds in ascending order). It depends on neither M, N, the tile the element falls in, the number
//!   of threads, nor the vector width. So one token's result is the same in any batch, and the same bits come out on
//!   AVX2, AVX-512 and NEON machines.

use super::real::Real;
use super::team;
use std::cell::RefCell;
use std::ops::Range;

/// Depth of one panel: the kernel sums this many products in registers before it touches C. 256 × 32 columns of f32
/// are 32 KiB, two thirds of a 48 KiB first-level cache. Changing it changes the bits of every result.
pub const DEPTH: usize = 256;

/// Tiles of A that are worked on at a time: 32 × 12 rows at full depth are 384 KiB of f32.
const ROW_TILES: usize = 32;

/// A last block of up to this many is joined to the one before it: for so few products a pass over C is not worth it.
/// So an inner size that is a multiple of [`DEPTH`] plus a LoRA rank of up to 32 takes no pass more than without.
const JOINED: usize = 32;

/// Depth of the deepest block.
const MAX_DEPTH: usize = DEPTH + JOINED;

/// The blocks in which a sum over `k` products is taken, as `(start, depth)`: a function of `k` alone.
fn blocks(k: usize) -> impl Iterator<Item = (usize, usize)> {
    let joined = k > DEPTH && (1..=JOINED).contains(&(k % DEPTH));
    let count = k.div_ceil(DEPTH) - usize::from(joined);
    (0..count).map(move |i| (i * DEPTH, if i + 1 == count { k - i * DEPTH } else { DEPTH }))
}

/// Multiply-adds below which a product is done by the thread that asks for it: 2²⁰ take about 15 µs, and waking another
/// thread takes several.
const WORTH_SHARING: usize = 1 << 20;

/// Columns of B that one task packs at most (256 KiB of f32 at full depth: an eighth of a 2 MiB second-level cache).
const MAX_PANEL_COLS: usize = 256;

/// Depth up to which the whole of A is packed before the product starts.
pub const MAX_PACKED_DEPTH: usize = 32 * DEPTH;

/// Size of the tile of C that the kernel holds in registers.
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    /// MR
    pub rows: usize,
    /// NR
    pub cols: usize,
}

/// Something that can be packed as the left (A) or right (B) operand.
///
/// "Lines" are the rows of A or the columns of B; "depth" is the dimension that is summed over.
pub trait Operand<T: Real>: Sync {
    /// Writes `out[d * width + i] = operand(line first + i, depth start + d)` for `i < lines`, and zero for
    /// `lines <= i < width`, for all `d < depth`.
    fn pack(&self, first: usize, lines: usize, width: usize, start: usize, depth: usize, out: &mut [T]);

    /// Packs neighbouring tiles of `width` lines each, `[tile][depth][width]`, for an operand that is cheaper to read
    /// several tiles at a time.
    fn pack_tiles(
        &self,
        first: usize,
        lines: usize,
        width: usize,
        start: usize,
        depth: usize,
        out: &mut [T],
    ) {
        for (t, out) in out.chunks_exact_mut(width * depth).take(lines.div_ceil(width)).enumerate() {
            self.pack(first + t * width, (lines - t * width).min(width), width, start, depth, out);
        }
    }
}

/// A strided view of a dense operand: element (line, depth) is `data[line * line_stride + depth * depth_stride]`.
#[derive(Clone, Copy)]
pub struct Strided<'a, T> {
    /// The elements.
    pub data: &'a [T],
    /// Distance between neighbouring lines.
    pub line_stride: usize,
    /// Distance between neighbours along the summed dimension.
    pub depth_stride: usize,
}

impl<T: Real> Operand<T> for Strided<'_, T> {
    #[inline]
    fn pack(&self, first: usize, lines: usize, width: usize, start: usize, depth: usize, out: &mut [T]) {
        debug_assert!(out.len() >= width * depth);
        if self.line_stride == 1 && lines == width && (width == 12 || width == 32) {
            let from = &self.data[start * self.depth_stride + first..];
            if width == 12 {
                copy_rows::<T, 12>(from, self.depth_stride, depth, out);
            } else {
                copy_rows::<T, 32>(from, self.depth_stride, depth, out);
            }
        } else if self.line_stride == 1 {
            for d in 0..depth {
                let from = (start + d) * self.depth_stride + first;
                let (row, pad) = out[d * width..(d + 1) * width].split_at_mut(lines);
                row.copy_from_slice(&self.data[from..from + lines]);
                pad.fill(T::ZERO);
            }
        } else if self.depth_stride == 1 {
            transpose(lines, width, depth, out, |i| {
                let from = (first + i) * self.line_stride + start;
                &self.data[from..from + depth]
            });
        } else {
            for d in 0..depth {
                for i in 0..width {
                    out[d * width + i] = if i < lines {
                        self.data[(first + i) * self.line_stride + (start + d) * self.depth_stride]
                    } else {
                        T::ZERO
                    };
                }
            }
        }
    }
}

/// Copies `depth` rows of W elements that lie `stride` apart. The constant makes it a few moves instead of a call.
#[inline]
fn copy_rows<T: Real, const W: usize>(from: &[T], stride: usize, depth: usize, out: &mut [T]) {
    for (d, row) in out.chunks_exact_mut(W).take(depth).enumerate() {
        row.copy_from_slice(&from[d * stride..d * stride + W]);
    }
}

/// `out[d * width + i] = line(i)[d]`, zero for `i >= lines`.
///
/// Works through 16 depths at a time so that the strided side stays within a few cache lines.
#[inline]
pub(super) fn transpose<'a, T: Real>(
    lines: usize,
    width: usize,
    depth: usize,
    out: &mut [T],
    line: impl Fn(usize) -> &'a [T],
) {
    #[cfg(target_arch = "x86_64")]
    if std::any::TypeId::of::<T>() == std::any::TypeId::of::<f32>()
        && super::simd::isa() == super::simd::Isa::Avx512
    {
        let mut pointers = [std::ptr::null::<f32>(); 64];
        if width <= 64 {
            for (i, pointer) in pointers.iter_mut().enumerate().take(lines) {
                let values = &line(i)[..depth];
                *pointer = values.as_ptr().cast();
            }
            assert!(out.len() >= width * depth && lines <= width);
            // SAFETY: T is f32; each pointer is valid for `depth` reads, `out` for `width * depth` writes.
            unsafe { transpose_avx512(&pointers[..lines], width, depth, out.as_mut_ptr().cast(), out.len()) };
            return;
        }
    }
    for i in 0..width {
        if i < lines {
            for (d, &value) in line(i)[..depth].iter().enumerate() {
                out[d * width + i] = value;
            }
        } else {
            for d in 0..depth {
                out[d * width + i] = T::ZERO;
            }
        }
    }
}

/// 16 × 16 blocks through registers: 64 shuffles move 256 elements.
///
/// # Safety
/// Every pointer of `lines` is valid for `depth` reads, `out` for `capacity` writes with
/// `capacity >= width * depth`, and `lines.len() <= width`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq")]
unsafe fn transpose_avx512(lines: &[*const f32], width: usize, depth: usize, out: *mut f32, capacity: usize) {
    use std::arch::x86_64::*;
    for d0 in (0..depth).step_by(16) {
        let depths = (depth - d0).min(16);
        let load_mask: __mmask16 = if depths == 16 { 0xffff } else { (1 << depths) - 1 };
        for i0 in (0..width).step_by(16) {
            let cols = (width - i0).min(16);
            let mut r = [_mm512_setzero_ps(); 16];
            for (i, register) in r.iter_mut().enumerate() {
                if let Some(&pointer) = lines.get(i0 + i) {
                    // SAFETY: the mask keeps the load inside the line's `depth` elements.
                    *register = unsafe { _mm512_maskz_loadu_ps(load_mask, pointer.add(d0)) };
                }
            }
            let mut t = [_mm512_setzero_ps(); 16];
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..4 {
                let [a, b, c, d] =
                    [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]].map(|v| _mm512_castps_pd(v));
                r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            // r[4q + j] holds, in its four 128-bit lanes l, depth 4l + j of lines 4q .. 4q+4.
            for j in 0..4 {
                let a = _mm512_shuffle_f32x4::<0b01_00_01_00>(r[j], r[4 + j]); // lanes 0,1 of q0 and q1
                let b = _mm512_shuffle_f32x4::<0b11_10_11_10>(r[j], r[4 + j]); // lanes 2,3
                let c = _mm512_shuffle_f32x4::<0b01_00_01_00>(r[8 + j], r[12 + j]);
                let d = _mm512_shuffle_f32x4::<0b11_10_11_10>(r[8 + j], r[12 + j]);
                t[j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, c);
                t[4 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, c);
                t[8 + j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(b, d);
                t[12 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(b, d);
            }
            let store_mask: __mmask16 = if cols == 16 { 0xffff } else { (1 << cols) - 1 };
            for (d, &row) in t.iter().enumerate().take(depths) {
                let at = (d0 + d) * width + i0;
                debug_assert!(at + cols <= capacity);
                // SAFETY: `at + cols <= width * depth <= capacity`, and the mask stores `cols` elements.
                unsafe { _mm512_mask_storeu_ps(out.add(at), store_mask, row) };
            }
        }
    }
}

/// A destination: row-major with a row stride.
pub struct Output<'a, T> {
    data: *mut T,
    len: usize,
    stride: usize,
    lifetime: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it is an exclusive borrow of a slice; tasks write disjoint tiles of it.
unsafe impl<T: Real> Sync for Output<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Real> Send for Output<'_, T> {}

impl<'a, T: Real> Output<'a, T> {
    /// Row `i`, column `j` is `data[i * stride + j]`.
    pub fn new(data: &'a mut [T], stride: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), stride, lifetime: std::marker::PhantomData }
    }

    /// Whether an `m × n` result fits.
    fn check(&self, m: usize, n: usize) {
        let needed = if m == 0 || n == 0 { 0 } else { (m - 1) * self.stride + n };
        assert!((self.stride >= n || m <= 1) && needed <= self.len, "destination too small for {m}×{n}");
    }

    /// The same memory from element `offset` on, to be written by one task while others write elsewhere.
    ///
    /// # Safety
    /// No two views that are alive at once are written at the same element.
    pub unsafe fn from(&self, offset: usize) -> Output<'_, T> {
        assert!(offset <= self.len);
        // SAFETY: inside the slice, just asserted.
        let data = unsafe { self.data.add(offset) };
        Output { data, len: self.len - offset, stride: self.stride, lifetime: std::marker::PhantomData }
    }

    /// `len` elements from `offset` on.
    ///
    /// # Safety
    /// As for [`Output::from`].
    #[allow(clippy::mut_from_ref)] // that is what the contract is about
    pub unsafe fn slice(&self, offset: usize, len: usize) -> &mut [T] {
        assert!(offset <= self.len && len <= self.len - offset);
        // SAFETY: inside the slice, just asserted; exclusive by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(offset), len) }
    }
}

thread_local! {
    /// Packed panels, one pair a thread, kept for the life of the thread.
    static PANELS: RefCell<(Vec<u64>, Vec<u64>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// An operand from depth `start` on.
struct Deeper<'a, T> {
    inner: &'a dyn Operand<T>,
    start: usize,
}

impl<T: Real> Operand<T> for Deeper<'_, T> {
    fn pack(&self, first: usize, lines: usize, width: usize, start: usize, depth: usize, out: &mut [T]) {
        self.inner.pack(first, lines, width, self.start + start, depth, out);
    }
    fn pack_tiles(
        &self,
        first: usize,
        lines: usize,
        width: usize,
        start: usize,
        depth: usize,
        out: &mut [T],
    ) {
        self.inner.pack_tiles(first, lines, width, self.start + start, depth, out);
    }
}

/// How many threads a product may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parallel {
    /// The whole pool.
    Pool,
    /// The calling thread only (inside a task of the pool).
    No,
}

/// `c = a·b` (or `c += a·b`), `[m, n] = [m, k]·[k, n]`.
///
/// # Panics
/// When `c` is too small for `m × n` with its stride.
pub fn gemm<T: Real>(
    parallel: Parallel,
    m: usize,
    n: usize,
    k: usize,
    a: &dyn Operand<T>,
    b: &dyn Operand<T>,
    c: Output<'_, T>,
    accumulate: bool,
) {
    if k == 0 {
        c.check(m, n);
        for i in 0..if accumulate { 0 } else { m } {
            // SAFETY: inside the bounds just checked; `c` is borrowed exclusively.
            unsafe { c.slice(i * c.stride, n) }.fill(T::ZERO);
        }
    } else if parallel == Parallel::No || team::threads() == 1 || m * n * k < WORTH_SHARING {
        gemm_on_one_thread(m, n, k, a, b, c, accumulate);
    } else {
        // A gradient through the vocabulary sums over 100,000 rows: pack A piece by piece. Whole blocks of DEPTH, so
        // the order of the sum stays what it is.
        let mut start = 0;
        while start < k {
            // A rest that `blocks` would join stays with what it is joined to.
            let rest = k - start;
            let depth = if rest <= MAX_PACKED_DEPTH + JOINED { rest } else { MAX_PACKED_DEPTH };
            let left = Left::pack(m, depth, &Deeper { inner: a, start });
            // SAFETY: one view at a time.
            let c = unsafe { c.from(0) };
            left.multiply(n, &Deeper { inner: b, start }, c, accumulate || start > 0);
            start += depth;
        }
    }
}

fn gemm_on_one_thread<T: Real>(
    m: usize,
    n: usize,
    k: usize,
    a: &dyn Operand<T>,
    b: &dyn Operand<T>,
    c: Output<'_, T>,
    accumulate: bool,
) {
    c.check(m, n);
    let Tile { rows: mr, cols: nr } = T::TILE;
    let (m_tiles, n_tiles) = (m.div_ceil(mr), n.div_ceil(nr));
    let max_panel = (MAX_PANEL_COLS / nr).max(1);
    // A is packed a depth block at a time; the panel of B inside it.
    let depth = MAX_DEPTH.min(k);
    with_panels::<T, _>(m_tiles * mr * depth, max_panel.min(n_tiles) * nr * depth, |pa, pb| {
        for (start, depth) in blocks(k) {
            for t in 0..m_tiles {
                let lines = (m - t * mr).min(mr);
                a.pack(t * mr, lines, mr, start, depth, &mut pa[t * mr * depth..(t + 1) * mr * depth]);
            }
            for panel in (0..n_tiles).step_by(max_panel) {
                let tiles = panel..(panel + max_panel).min(n_tiles);
                pack_b(b, n, tiles.clone(), start, depth, pb);
                multiply_tiles(
                    m,
                    n,
                    0..m_tiles,
                    tiles,
                    depth,
                    pa,
                    mr * depth,
                    pb,
                    &c,
                    accumulate || start > 0,
                );
            }
        }
    });
}

/// A left operand, packed once for several products: X for q, k and v and their adapters.
///
/// It may have a tail, filled in later: `[X | U]` meets `[W | B]ᵀ` in one product, and a LoRA's up projection is a few
/// more terms of the sums that are being taken anyway.
pub struct Left<T: Real> {
    m: usize,
    k: usize,
    tail: usize,
    /// `[tile][k + tail][MR]`
    packed: Shared<T>,
}

impl<T: Real> Left<T> {
    /// Packs A, `[m, k]`, with all threads.
    pub fn pack(m: usize, k: usize, a: &dyn Operand<T>) -> Self {
        Self::with_tail(m, k, 0, a)
    }

    /// Packs A, `[m, k]`, and leaves room for a tail of `tail` columns.
    pub fn with_tail(m: usize, k: usize, tail: usize, a: &dyn Operand<T>) -> Self {
        let packed = Shared::new(m.div_ceil(T::TILE.rows) * T::TILE.rows * (k + tail));
        let mut left = Self { m, k, tail, packed };
        left.fill(0, k, a);
        left
    }

    /// Fills in the tail, `[m, tail]`.
    pub fn set_tail(&mut self, a: &dyn Operand<T>) {
        self.fill(self.k, self.tail, a);
    }

    fn fill(&mut self, start: usize, depth: usize, a: &dyn Operand<T>) {
        let (m, mr) = (self.m, T::TILE.rows);
        if depth == 0 {
            return;
        }
        team::chunks(mr * (self.k + self.tail), &mut self.packed, |t, out| {
            let lines = (m - t * mr).min(mr);
            for (d, depth) in blocks(depth) {
                a.pack(t * mr, lines, mr, d, depth, &mut out[(start + d) * mr..(start + d + depth) * mr]);
            }
        });
    }

    /// `c = a·b` or `c += a·b` without the tail, with all threads; b is `[k, n]`.
    ///
    /// # Panics
    /// When `c` is too small for `m × n` with its stride.
    pub fn multiply(&self, n: usize, b: &dyn Operand<T>, c: Output<'_, T>, accumulate: bool) {
        self.multiply_depth(self.k, n, b, c, accumulate);
    }

    /// `c = [a | tail]·[b; b_tail]` or `+=`, with all threads; b is `[k, n]`, b_tail `[tail, n]`.
    ///
    /// # Panics
    /// When `c` is too small for `m × n` with its stride.
    pub fn multiply_with_tail(
        &self,
        n: usize,
        b: &dyn Operand<T>,
        b_tail: &dyn Operand<T>,
        c: Output<'_, T>,
        accumulate: bool,
    ) {
        let b = Joined { first: b, split: self.k, second: b_tail };
        self.multiply_depth(self.k + self.tail, n, &b, c, accumulate);
    }

    fn multiply_depth(&self, k: usize, n: usize, b: &dyn Operand<T>, c: Output<'_, T>, accumulate: bool) {
        let m = self.m;
        c.check(m, n);
        let Tile { rows: mr, cols: nr } = T::TILE;
        let threads = if m * n * k < WORTH_SHARING { 1 } else { team::threads() };
        let (m_tiles, n_tiles) = (m.div_ceil(mr), n.div_ceil(nr));
        let panel = |tiles: usize| tiles * nr * MAX_DEPTH.min(k);
        if threads == 1 {
            let width = (MAX_PANEL_COLS / nr).clamp(1, n_tiles.max(1));
            with_panels::<T, _>(0, panel(width), |_, pb| {
                for first in (0..n_tiles).step_by(width) {
                    let tiles = first..(first + width).min(n_tiles);
                    self.columns(k, n, b, tiles, pb, &c, accumulate);
                }
            });
        } else if n_tiles >= 2 * threads {
            // Wide: each task owns some columns of C and packs its part of B. About four tasks a thread where there
            // are enough columns, so that a slow thread does not hold up all.
            let width = n_tiles.div_ceil(4 * threads).clamp(1, (MAX_PANEL_COLS / nr).max(1));
            team::run(n_tiles.div_ceil(width), |task| {
                let tiles = task * width..((task + 1) * width).min(n_tiles);
                with_panels::<T, _>(0, panel(tiles.len()), |_, pb| {
                    self.columns(k, n, b, tiles, pb, &c, accumulate);
                });
            });
        } else {
            // Narrow (a LoRA product): all of B is packed once; each task owns some rows of C.
            let mut packed = Shared::new(n_tiles * nr * k);
            for (start, depth) in blocks(k) {
                pack_b(b, n, 0..n_tiles, start, depth, &mut packed[start * n_tiles * nr..]);
            }
            let (pa, pb) = (&self.packed[..], &packed[..]);
            let stride = mr * (self.k + self.tail);
            let height = m_tiles.div_ceil(4 * threads).max(1);
            team::run(m_tiles.div_ceil(height), |task| {
                let rows = task * height..((task + 1) * height).min(m_tiles);
                for (start, depth) in blocks(k) {
                    let (pa, pb) = (&pa[start * mr..], &pb[start * n_tiles * nr..]);
                    let add = accumulate || start > 0;
                    multiply_tiles(m, n, rows.clone(), 0..n_tiles, depth, pa, stride, pb, &c, add);
                }
            });
        }
    }

    /// Some columns of C: packs its part of B a depth block at a time.
    fn columns(
        &self,
        k: usize,
        n: usize,
        b: &dyn Operand<T>,
        tiles: Range<usize>,
        pb: &mut [T],
        c: &Output<'_, T>,
        accumulate: bool,
    ) {
        let (m, mr) = (self.m, T::TILE.rows);
        let stride = mr * (self.k + self.tail);
        for (start, depth) in blocks(k) {
            pack_b(b, n, tiles.clone(), start, depth, pb);
            let (pa, add) = (&self.packed[start * mr..], accumulate || start > 0);
            multiply_tiles(m, n, 0..m.div_ceil(mr), tiles.clone(), depth, pa, stride, pb, c, add);
        }
    }
}

/// Two operands one below the other: the second continues the summed dimension at `split`.
struct Joined<'a, T> {
    first: &'a dyn Operand<T>,
    split: usize,
    second: &'a dyn Operand<T>,
}

impl<T: Real> Operand<T> for Joined<'_, T> {
    fn pack(&self, first: usize, lines: usize, width: usize, start: usize, depth: usize, out: &mut [T]) {
        let above = self.split.saturating_sub(start).min(depth);
        if above > 0 {
            self.first.pack(first, lines, width, start, above, out);
        }
        if above < depth {
            let start = start + above - self.split;
            self.second.pack(first, lines, width, start, depth - above, &mut out[above * width..]);
        }
    }

    fn pack_tiles(
        &self,
        first: usize,
        lines: usize,
        width: usize,
        start: usize,
        depth: usize,
        out: &mut [T],
    ) {
        if start + depth <= self.split {
            return self.first.pack_tiles(first, lines, width, start, depth, out);
        }
        for (t, out) in out.chunks_exact_mut(width * depth).take(lines.div_ceil(width)).enumerate() {
            self.pack(first + t * width, (lines - t * width).min(width), width, start, depth, out);
        }
    }
}

/// Packs column tiles of B: `[tile][depth][NR]`.
fn pack_b<T: Real>(
    b: &dyn Operand<T>,
    n: usize,
    tiles: Range<usize>,
    start: usize,
    depth: usize,
    out: &mut [T],
) {
    let nr = T::TILE.cols;
    let (first, last) = (tiles.start * nr, (tiles.end * nr).min(n));
    b.pack_tiles(first, last - first, nr, start, depth, out);
}

/// The tiles `rows` × `cols` of C. The tiles of A lie `a_stride` elements apart in `pa`; `pb` starts with the first of
/// `cols`.
fn multiply_tiles<T: Real>(
    m: usize,
    n: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    depth: usize,
    pa: &[T],
    a_stride: usize,
    pb: &[T],
    c: &Output<'_, T>,
    accumulate: bool,
) {
    let Tile { rows: mr, cols: nr } = T::TILE;
    // The tile of B stays in the first-level cache while a block of A streams past it, and the block in the second while
    // the tiles of B take turns: with a long batch all of A would come from the third every time.
    for first in rows.clone().step_by(ROW_TILES) {
        let block = first..(first + ROW_TILES).min(rows.end);
        for (j, b) in cols.clone().zip(pb.chunks_exact(nr * depth)) {
            for i in block.clone() {
                let a = &pa[i * a_stride..i * a_stride + mr * depth];
                store_tile(m, n, i, j, depth, a.as_ptr(), b.as_ptr(), c, accumulate);
            }
        }
    }
}

/// One tile of C: straight into C when it is whole, through a buffer at the edges.
#[inline]
fn store_tile<T: Real>(
    m: usize,
    n: usize,
    i: usize,
    j: usize,
    depth: usize,
    a: *const T,
    b: *const T,
    c: &Output<'_, T>,
    accumulate: bool,
) {
    let Tile { rows: mr, cols: nr } = T::TILE;
    let (rows, cols) = ((m - i * mr).min(mr), (n - j * nr).min(nr));
    // SAFETY: the panels hold `depth` packed rows (checked by the slices they were cut from); the tile lies inside
    // the m × n destination that `gemm` checked, and no other task writes it.
    unsafe {
        let to = c.data.add(i * mr * c.stride + j * nr);
        if rows == mr && cols == nr {
            T::tile_product(depth, a, b, to, c.stride, false, accumulate);
        } else {
            let mut edge = [T::ZERO; 12 * 32];
            debug_assert!(mr * nr <= edge.len());
            if accumulate {
                for r in 0..rows {
                    std::ptr::copy_nonoverlapping(to.add(r * c.stride), edge.as_mut_ptr().add(r * nr), cols);
                }
            }
            T::tile_product(depth, a, b, edge.as_mut_ptr(), nr, cols <= nr / 2, accumulate);
            for r in 0..rows {
                std::ptr::copy_nonoverlapping(edge.as_ptr().add(r * nr), to.add(r * c.stride), cols);
            }
        }
    }
}

/// Plain kernel: any element type, any machine.
///
/// # Safety
/// See [`Real::tile_product`].
pub(super) unsafe fn tile_product_plain<T: Real, const MR: usize, const NR: usize>(
    depth: usize,
    a: *const T,
    b: *const T,
    c: *mut T,
    ldc: usize,
    accumulate: bool,
) {
    let mut sum = [[T::ZERO; NR]; MR];
    for d in 0..depth {
        // SAFETY: within the packed panels.
        let (a, b) = unsafe {
            (std::slice::from_raw_parts(a.add(d * MR), MR), std::slice::from_raw_parts(b.add(d * NR), NR))
        };
        for i in 0..MR {
            for j in 0..NR {
                sum[i][j] += a[i] * b[j];
            }
        }
    }
    for (i, row) in sum.iter().enumerate() {
        for (j, &value) in row.iter().enumerate() {
            // SAFETY: within the tile.
            unsafe {
                let to = c.add(i * ldc + j);
                *to = if accumulate { *to + value } else { value };
            }
        }
    }
}

/// # Safety
/// See [`Real::tile_product`].
#[inline]
pub(super) unsafe fn tile_product_f32(
    depth: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    half: bool,
    accumulate: bool,
) {
    let columns: &[usize] = if half { &[0] } else { &[0, 16] };
    #[cfg(target_arch = "x86_64")]
    match super::simd::isa() {
        // SAFETY: the caller's contract; the features are there.
        super::simd::Isa::Avx512 if half => {
            return unsafe { tile_avx512::<1>(depth, a, b, c, ldc, accumulate) };
        }
        // SAFETY: as above.
        super::simd::Isa::Avx512 => return unsafe { tile_avx512::<2>(depth, a, b, c, ldc, accumulate) },
        super::simd::Isa::Avx2 => {
            // 16 registers hold a 6 × 16 tile: four passes.
            for i in [0, 6] {
                for &j in columns {
                    // SAFETY: sub-tiles of the caller's tile and panels.
                    unsafe { tile_avx2(depth, a.add(i), b.add(j), c.add(i * ldc + j), ldc, accumulate) };
                }
            }
            return;
        }
        super::simd::Isa::Baseline => {}
    }
    #[cfg(target_arch = "aarch64")]
    {
        for i in [0, 6] {
            for &j in columns {
                // SAFETY: sub-tiles of the caller's tile and panels.
                unsafe { tile_neon(depth, a.add(i), b.add(j), c.add(i * ldc + j), ldc, accumulate) };
            }
        }
        return;
    }
    // SAFETY: the caller's contract.
    #[allow(unreachable_code)]
    unsafe {
        tile_product_plain::<f32, 12, 32>(depth, a, b, c, ldc, accumulate)
    }
}

/// 12 × 16·W of the 12 × 32 tile. Whole: 24 accumulators, 2 registers of B, one broadcast of A: 27 of 32 registers; 24
/// multiply-adds for 14 loads. Half, for a LoRA rank of up to 16: 12 for 13 loads, still nearly twice as fast.
///
/// # Safety
/// See [`Real::tile_product`]; the machine has AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn tile_avx512<const W: usize>(
    depth: usize,
    a: *const f32,
    b: *const f32,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
) {
    use std::arch::x86_64::*;
    // SAFETY: all pointers stay inside the panels and the tile of the caller's contract.
    unsafe {
        let mut sum = [[_mm512_setzero_ps(); W]; 12];
        let (mut pa, mut pb) = (a, b);
        for _ in 0..depth {
            let b: [_; W] = std::array::from_fn(|j| _mm512_loadu_ps(pb.add(16 * j)));
            for i in 0..12 {
                let x = _mm512_set1_ps(*pa.add(i));
                for j in 0..W {
                    sum[i][j] = _mm512_fmadd_ps(x, b[j], sum[i][j]);
                }
            }
            pa = pa.add(12);
            pb = pb.add(32);
        }
        for (i, row) in sum.iter().enumerate() {
            for (j, &value) in row.iter().enumerate() {
                let to = c.add(i * ldc + 16 * j);
                let value = if accumulate { _mm512_add_ps(_mm512_loadu_ps(to), value) } else { value };
                _mm512_storeu_ps(to, value);
            }
        }
    }
}

/// A 6 × 16 quarter of the 12 × 32 tile: 12 accumulators, 2 registers of B, one broadcast: 15 of 16 registers.
///
/// # Safety
/// See [`Real::tile_product`] (panels 12 and 32 wide); the machine has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_avx2(depth: usize, a: *const f32, b: *const f32, c: *mut f32, ldc: usize, accumulate: bool) {
    use std::arch::x86_64::*;
    // SAFETY: all pointers stay inside the panels and the tile of the caller's contract.
    unsafe {
        let mut sum = [[_mm256_setzero_ps(); 2]; 6];
        let (mut pa, mut pb) = (a, b);
        for _ in 0..depth {
            let b0 = _mm256_loadu_ps(pb);
            let b1 = _mm256_loadu_ps(pb.add(8));
            for i in 0..6 {
                let x = _mm256_broadcast_ss(&*pa.add(i));
                sum[i][0] = _mm256_fmadd_ps(x, b0, sum[i][0]);
                sum[i][1] = _mm256_fmadd_ps(x, b1, sum[i][1]);
            }
            pa = pa.add(12);
            pb = pb.add(32);
        }
        for (i, row) in sum.iter().enumerate() {
            for (j, &value) in row.iter().enumerate() {
                let to = c.add(i * ldc + 8 * j);
                let value = if accumulate { _mm256_add_ps(_mm256_loadu_ps(to), value) } else { value };
                _mm256_storeu_ps(to, value);
            }
        }
    }
}

/// A 6 × 16 quarter of the 12 × 32 tile: 24 accumulators, 4 registers of B, one of A: 29 of 32 registers.
///
/// # Safety
/// See [`Real::tile_product`] (panels 12 and 32 wide).
#[cfg(target_arch = "aarch64")]
unsafe fn tile_neon(depth: usize, a: *const f32, b: *const f32, c: *mut f32, ldc: usize, accumulate: bool) {
    use std::arch::aarch64::*;
    // SAFETY: all pointers stay inside the panels and the tile of the caller's contract.
    unsafe {
        let mut sum = [[vdupq_n_f32(0.0); 4]; 6];
        let (mut pa, mut pb) = (a, b);
        for _ in 0..depth {
            let b = [vld1q_f32(pb), vld1q_f32(pb.add(4)), vld1q_f32(pb.add(8)), vld1q_f32(pb.add(12))];
            for i in 0..6 {
                let x = vdupq_n_f32(*pa.add(i));
                for j in 0..4 {
                    sum[i][j] = vfmaq_f32(sum[i][j], x, b[j]);
                }
            }
            pa = pa.add(12);
            pb = pb.add(32);
        }
        for (i, row) in sum.iter().enumerate() {
            for (j, &value) in row.iter().enumerate() {
                let to = c.add(i * ldc + 4 * j);
                let value = if accumulate { vaddq_f32(vld1q_f32(to), value) } else { value };
                vst1q_f32(to, value);
            }
        }
    }
}

/// Runs `f` with this thread's panels of at least the given sizes. Not re-entrant: an operand's `pack` must not call
/// [`gemm`].
fn with_panels<T: Real, R>(a: usize, b: usize, f: impl FnOnce(&mut [T], &mut [T]) -> R) -> R {
    PANELS.with_borrow_mut(|(pa, pb)| f(as_reals(pa, a), as_reals(pb, b)))
}

/// `len` elements of `storage`, which grows as needed and is never zeroed again.
pub(super) fn as_reals<T: Real>(storage: &mut Vec<u64>, len: usize) -> &mut [T] {
    let words = (len * size_of::<T>()).div_ceil(8);
    if storage.len() < words {
        storage.resize(words, 0);
    }
    // SAFETY: u64 is at least as aligned as f32 and f64, every bit pattern is a float, and the length fits.
    unsafe { std::slice::from_raw_parts_mut(storage.as_mut_ptr().cast(), len) }
}

thread_local! {
    /// Panels that all threads read, kept between uses by the thread that calls.
    static SHARED: RefCell<Vec<Vec<u64>>> = const { RefCell::new(Vec::new()) };
}

/// A panel on loan from [`SHARED`], with arbitrary content.
struct Shared<T> {
    storage: Vec<u64>,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Real> Shared<T> {
    fn new(len: usize) -> Self {
        let words = (len * size_of::<T>()).div_ceil(8);
        let mut storage = SHARED.with_borrow_mut(|free| {
            // The smallest that is large enough, else the largest.
            let fits = free.iter().enumerate().filter(|(_, s)| s.len() >= words).min_by_key(|(_, s)| s.len());
            let best = fits.or_else(|| free.iter().enumerate().max_by_key(|(_, s)| s.len())).map(|(i, _)| i);
            best.map(|i| free.swap_remove(i)).unwrap_or_default()
        });
        as_reals::<T>(&mut storage, len);
        Shared { storage, len, element: std::marker::PhantomData }
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        SHARED.with_borrow_mut(|free| free.push(std::mem::take(&mut self.storage)));
    }
}

impl<T: Real> std::ops::Deref for Shared<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: as in `as_reals`; `new` made it long enough.
        unsafe { std::slice::from_raw_parts(self.storage.as_ptr().cast(), self.len) }
    }
}

impl<T: Real> std::ops::DerefMut for Shared<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        as_reals(&mut self.storage, self.len)
    }
}

/// Elements of the private panels that one thread keeps: A for a strip of attention over `longest` keys, B for the
/// widest task, and B's rows before they are transposed.
pub fn panel_elements(longest: usize) -> usize {
    longest.div_ceil(12) * 12 * MAX_DEPTH.min(longest) + MAX_PANEL_COLS * MAX_DEPTH + 32 * MAX_DEPTH
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers<T: Real>(count: usize, seed: u64) -> Vec<T> {
        let mut state = seed;
        (0..count)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                T::from_f64(((state >> 33) as f64 / (1u64 << 31) as f64) * 2.0 - 1.0)
            })
            .collect()
    }

    fn row_major<T: Real>(data: &[T], cols: usize) -> Strided<'_, T> {
        Strided { data, line_stride: cols, depth_stride: 1 }
    }

    fn check<T: Real>(m: usize, n: usize, k: usize, tolerance: f64) {
        let a = numbers::<T>(m * k, 1);
        let b = numbers::<T>(k * n, 2);
        let start = numbers::<T>(m * n, 3);
        for accumulate in [false, true] {
            let mut expected = vec![0.0; m * n];
            for i in 0..m {
                for j in 0..n {
                    let mut sum = if accumulate { start[i * n + j].to_f64() } else { 0.0 };
                    for d in 0..k {
                        sum += a[i * k + d].to_f64() * b[d * n + j].to_f64();
                    }
                    expected[i * n + j] = sum;
                }
            }
            for parallel in [Parallel::No, Parallel::Pool] {
                let mut c = start.clone();
                let b_cols = Strided { data: &b[..], line_stride: 1, depth_stride: n };
                gemm(parallel, m, n, k, &row_major(&a, k), &b_cols, Output::new(&mut c, n), accumulate);
                for (got, want) in c.iter().zip(&expected) {
                    let error = (got.to_f64() - want).abs();
                    assert!(error <= tolerance * (k as f64).sqrt().max(1.0), "{m}×{n}×{k}: {error}");
                }
            }
        }
    }

    #[test]
    fn products_of_odd_sizes_are_right() {
        for &(m, n, k) in &[
            (1, 1, 1),
            (1, 33, 7),
            (13, 1, 257),
            (12, 32, 256),
            (25, 65, 300),
            (7, 200, 513),
            (100, 16, 64),
            (5, 3, 0),
        ] {
            check::<f32>(m, n, k, 2e-6);
            check::<f64>(m, n, k, 1e-14);
        }
    }

    #[test]
    fn blocks_cover_the_sum_and_join_a_short_rest() {
        let of = |k| blocks(k).collect::<Vec<_>>();
        assert_eq!(of(0), []);
        assert_eq!(of(5), [(0, 5)]);
        assert_eq!(of(256), [(0, 256)]);
        assert_eq!(of(288), [(0, 288)]);
        assert_eq!(of(289), [(0, 256), (256, 33)]);
        assert_eq!(
            of(1536 + 16),
            [0, 256, 512, 768, 1024, 1280].map(|s| (s, if s == 1280 { 272 } else { 256 }))
        );
    }

    #[test]
    fn a_tail_is_a_second_product() {
        let (m, n, k, r) = (30, 70, 300, 5);
        let (x, w) = (numbers::<f64>(m * k, 1), numbers::<f64>(n * k, 2));
        let (u, b) = (numbers::<f64>(m * r, 3), numbers::<f64>(n * r, 4));
        let mut left = Left::with_tail(m, k, r, &row_major(&x, k));
        left.set_tail(&row_major(&u, r));
        let (mut one, mut two) = (vec![0.0; m * n], vec![0.0; m * n]);
        left.multiply_with_tail(n, &row_major(&w, k), &row_major(&b, r), Output::new(&mut one, n), false);
        left.multiply(n, &row_major(&w, k), Output::new(&mut two, n), false);
        gemm(Parallel::No, m, n, r, &row_major(&u, r), &row_major(&b, r), Output::new(&mut two, n), true);
        for (a, b) in one.iter().zip(&two) {
            assert!((a - b).abs() < 1e-12);
        }
    }

    /// The vocabulary's product is packed piece by piece; a single thread does it in one go.
    #[test]
    fn a_very_deep_sum_has_one_order() {
        for k in [MAX_PACKED_DEPTH + 7, MAX_PACKED_DEPTH + 40, 2 * MAX_PACKED_DEPTH + 30] {
            let (m, n) = (14, 40);
            let (a, b) = (numbers::<f32>(m * k, 4), numbers::<f32>(n * k, 5));
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut c = vec![0.0; m * n];
                let (a, b) = (row_major(&a, k), row_major(&b, k));
                pool.install(|| gemm(Parallel::Pool, m, n, k, &a, &b, Output::new(&mut c, n), false));
                c
            };
            assert!(run(1) == run(3), "{k}");
        }
    }

    #[test]
    fn an_element_does_not_depend_on_the_batch_or_the_threads() {
        let (m, n, k) = (53, 130, 600);
        let (a, b) = (numbers::<f32>(m * k, 4), numbers::<f32>(n * k, 5));
        let run = |threads: usize, rows: Range<usize>| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut c = vec![0.0; rows.len() * n];
            pool.install(|| {
                let a = row_major(&a[rows.start * k..rows.end * k], k);
                gemm(Parallel::Pool, rows.len(), n, k, &a, &row_major(&b, k), Output::new(&mut c, n), false)
            });
            c.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        let whole = run(1, 0..m);
        for threads in [1, 2, 5] {
            assert!(whole == run(threads, 0..m), "{threads} threads");
            for row in [0, 11, 12, 52] {
                assert!(whole[row * n..(row + 1) * n] == run(threads, row..row + 1)[..], "row {row}");
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn both_vector_widths_give_the_same_bits() {
        if super::super::simd::isa() != super::super::simd::Isa::Avx512 {
            eprintln!("skipped: no AVX-512 here");
            return;
        }
        let (a, b) = (numbers::<f32>(256 * 12, 6), numbers::<f32>(256 * 32, 7));
        let (mut wide, mut narrow) = (vec![1.0; 12 * 32], vec![1.0; 12 * 32]);
        // SAFETY: panels and tiles have the sizes of the contract; the features are there.
        unsafe {
            tile_avx512::<2>(256, a.as_ptr(), b.as_ptr(), wide.as_mut_ptr(), 32, true);
            for i in [0, 6] {
                for j in [0, 16] {
                    tile_avx2(
                        256,
                        a.as_ptr().add(i),
                        b.as_ptr().add(j),
                        narrow.as_mut_ptr().add(i * 32 + j),
                        32,
                        true,
                    );
                }
            }
        }
        assert_eq!(wide, narrow);
    }
}
