//! The CPU backend: a product for machines without a GPU, and the reference every other backend is held against.
//!
//! `Cpu<f32>` trains; `Cpu<f64>` runs the same code in double precision, for finite differences and as the oracle. All
//! heavy work is [`gemm`], with the 4-bit weights dequantised while a panel is packed. Results do not depend on the
//! number of threads (`gemm` and every reduction have one order), nor, on machines with fused multiply-add, on the
//! vector width.

pub mod elementwise;
pub mod gemm;
pub mod real;
pub mod simd;

mod attention;
mod linear;
mod loss;
mod matrix;
mod team;

pub use matrix::CpuMatrix;

use super::{
    AdamW, AttentionShape, Backend, Batch, FrozenMatrix, Parameter, Projection, ProjectionBackward, Role,
    StepShape,
};
use crate::backend::cpu::gemm::{Output, Parallel, Strided};
use elementwise::Angles;
use real::Real;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, OnceLock};

/// Number of the arithmetic: raised by hand with every change of the order or the formula of a sum, of a polynomial, or of
/// the dropout generator. A checkpoint made with another number is not continued: its result would be that of neither.
/// `bits_are_those_of_this_arithmetic` in `tests/engine/golden.rs` fails when the bits change and this does not.
pub const ARITHMETIC: u32 = 1;

/// The CPU backend, computing in `T`.
pub struct Cpu<T: Real> {
    /// Round every stored activation, and every operand of a product, to bfloat16 (sums stay in `T`): the arithmetic
    /// of the CUDA backend, for comparison with it.
    bf16: bool,
    /// Buffers between uses; they grow to what the longest batch needs.
    free: Mutex<Vec<Vec<T>>>,
}

impl<T: Real> Cpu<T> {
    /// A backend computing in `T` throughout.
    pub fn new() -> Self {
        Self { bf16: false, free: Mutex::new(Vec::new()) }
    }

    /// A backend that rounds activations and weights to bfloat16 and sums in `T`.
    pub fn bfloat16() -> Self {
        Self { bf16: true, ..Self::new() }
    }

    /// A buffer of `len` elements with arbitrary content, for the length of one operation.
    fn scratch(&self, len: usize) -> Scratch<'_, T> {
        let mut free = self.free.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // The smallest that is large enough, else the largest (it grows).
        let best = free
            .iter()
            .enumerate()
            .filter(|(_, b)| b.len() >= len)
            .min_by_key(|(_, b)| b.len())
            .or_else(|| free.iter().enumerate().max_by_key(|(_, b)| b.len()))
            .map(|(i, _)| i);
        let mut buffer = best.map(|i| free.swap_remove(i)).unwrap_or_default();
        drop(free);
        if buffer.len() < len {
            buffer = vec![T::ZERO; len]; // its content is of no use: do not copy it
        }
        Scratch { owner: &self.free, buffer, len }
    }

    /// A scratch buffer for one task of the pool.
    fn strip(&self, len: usize) -> Scratch<'_, T> {
        self.scratch(len)
    }
}

/// What this machine's CPU is, in words: `CPU (x86-64, AVX-512, 2 cores)`.
pub fn device() -> String {
    let vectors = match simd::isa() {
        simd::Isa::Avx512 => "x86-64, AVX-512",
        simd::Isa::Avx2 => "x86-64, AVX2",
        simd::Isa::Baseline if cfg!(target_arch = "aarch64") => "aarch64, NEON",
        simd::Isa::Baseline => "no vector extensions",
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("CPU ({vectors}, {cores} {})", if cores == 1 { "core" } else { "cores" })
}

impl<T: Real> Default for Cpu<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// A micro-batch, and what is computed from it once: all rotary embeddings of a model have one set of angles.
pub struct CpuBatch<T> {
    batch: Batch,
    angles: OnceLock<Angles<T>>,
}

impl<T> Deref for CpuBatch<T> {
    type Target = Batch;
    fn deref(&self) -> &Batch {
        &self.batch
    }
}

/// A buffer on loan; goes back when dropped.
struct Scratch<'a, T> {
    owner: &'a Mutex<Vec<Vec<T>>>,
    buffer: Vec<T>,
    len: usize,
}

impl<T> Deref for Scratch<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.buffer[..self.len]
    }
}

impl<T> DerefMut for Scratch<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.buffer[..self.len]
    }
}

impl<T> Drop for Scratch<'_, T> {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        self.owner.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(buffer);
    }
}

impl<T: Real> Backend for Cpu<T> {
    type Tensor = Vec<T>;
    type Matrix = CpuMatrix;
    type Batch = CpuBatch<T>;

    fn identity(&self) -> String {
        let compute = if self.bf16 { "bfloat16" } else { T::NAME };
        // Without fused multiply-add a product rounds twice per term: other bits.
        let fused = cfg!(target_arch = "aarch64") || simd::isa() != simd::Isa::Baseline;
        format!("cpu {compute} arithmetic {ARITHMETIC}{}", if fused { "" } else { " unfused" })
    }

    fn device(&self) -> String {
        device()
    }

    fn activation_size(&self) -> usize {
        size_of::<T>()
    }

    fn parameter_size(&self) -> usize {
        4 * size_of::<T>()
    }

    fn matrix_bytes(&self, matrix: &FrozenMatrix) -> u64 {
        matrix.bytes()
    }

    fn scratch_bytes(&self, s: StepShape) -> u64 {
        let threads = team::threads();
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let widest = s.intermediate.max(s.hidden).max(q).max(kv);
        // The left operands of a linear layer's backward pass, dY and (with dropout) the dropped X, and G.
        let packed = s.tokens * (widest + s.rank * 2 + if s.dropout { 2 * widest } else { 0 });
        // Private panels of A and B, and the rows of B before they are transposed.
        let panels = threads * gemm::panel_elements(s.longest);
        // Attention: a strip of scores and one of their gradients a thread; per-head gradients of k and v.
        let attention = threads * 2 * attention::QUERIES.min(s.longest) * s.longest + 2 * s.tokens * q;
        // The vocabulary: the logits of a chunk, and their packed copy, a piece at a time.
        let rows = loss::chunk(s.vocabulary).min(s.labelled);
        let logits = rows * (s.vocabulary + gemm::MAX_PACKED_DEPTH.min(s.vocabulary));
        // Buffers are kept between uses, each kind at its largest.
        ((packed + panels + attention + logits) * size_of::<T>()) as u64
    }

    /// The logits are by far the largest piece of scratch, and differ in size from batch to batch: growing them would
    /// leave holes in the heap. The rest reaches its size within a few steps.
    fn reserve(&self, s: StepShape) {
        drop(self.scratch(loss::chunk(s.vocabulary).min(s.labelled) * s.vocabulary));
    }

    fn zeros(&self, len: usize) -> Vec<T> {
        vec![T::ZERO; len]
    }

    fn floats(&self, len: usize) -> Vec<T> {
        self.zeros(len)
    }

    fn parameters(&self, lens: &[usize], _: Role) -> Vec<Vec<T>> {
        lens.iter().map(|&len| self.zeros(len)).collect()
    }

    fn write(&self, tensor: &mut Vec<T>, values: &[f32]) {
        tensor.iter_mut().zip(values).for_each(|(t, &v)| *t = T::from_f32(v));
    }

    fn read(&self, tensor: &Vec<T>, len: usize) -> Vec<f32> {
        tensor[..len].iter().map(|v| v.to_f32()).collect()
    }

    fn clear_all(&self, tensors: &mut [Vec<T>]) {
        tensors.iter_mut().for_each(|tensor| tensor.fill(T::ZERO));
    }

    fn synchronize(&self) {}

    fn matrix(&self, matrix: FrozenMatrix) -> CpuMatrix {
        CpuMatrix { frozen: matrix, round: self.bf16 }
    }

    fn batch(&self, batch: Batch) -> CpuBatch<T> {
        CpuBatch { batch, angles: OnceLock::new() }
    }

    fn embed(&self, batch: &CpuBatch<T>, table: &CpuMatrix, hidden: usize, out: &mut Vec<T>) {
        self.embed_rows(batch, table, hidden, out);
    }

    fn add(&self, len: usize, x: &Vec<T>, y: &mut Vec<T>) {
        elementwise::add(&x[..len], self.bf16, &mut y[..len]);
    }

    fn rms_norm(&self, rows: usize, cols: usize, x: &Vec<T>, weight: &Vec<T>, epsilon: f64, y: &mut Vec<T>) {
        let len = rows * cols;
        elementwise::rms_norm(cols, &x[..len], weight, epsilon, self.bf16, &mut y[..len]);
    }

    fn rms_norm_backward(
        &self,
        rows: usize,
        cols: usize,
        x: &Vec<T>,
        weight: &Vec<T>,
        epsilon: f64,
        dy: &Vec<T>,
        dx: &mut Vec<T>,
        accumulate: bool,
    ) {
        let len = rows * cols;
        let (x, dy, dx) = (&x[..len], &dy[..len], &mut dx[..len]);
        elementwise::rms_norm_backward(cols, x, weight, epsilon, dy, self.bf16, dx, accumulate);
    }

    fn linear(
        &self,
        batch: &CpuBatch<T>,
        inputs: usize,
        x: &Vec<T>,
        projections: &mut [Projection<'_, Self>],
    ) {
        self.linear_forward(batch, inputs, x, projections);
    }

    fn linear_backward(
        &self,
        batch: &CpuBatch<T>,
        inputs: usize,
        x: &Vec<T>,
        projections: &mut [ProjectionBackward<'_, Self>],
        dx: Option<&mut Vec<T>>,
    ) {
        self.linear_gradients(batch, inputs, x, projections, dx.map(|dx| &mut dx[..]));
    }

    fn rope(
        &self,
        batch: &CpuBatch<T>,
        heads: usize,
        head_dim: usize,
        frequencies: &[f32],
        magnitude: f32,
        inverse: bool,
        x: &mut Vec<T>,
    ) {
        let angles = batch.angles.get_or_init(|| Angles::new(&batch.positions, frequencies, magnitude));
        let x = &mut x[..batch.len() * heads * head_dim];
        elementwise::rope(angles, heads, head_dim, inverse, self.bf16, x);
    }

    fn attention(
        &self,
        batch: &CpuBatch<T>,
        shape: AttentionShape,
        q: &Vec<T>,
        k: &Vec<T>,
        v: &Vec<T>,
        out: &mut Vec<T>,
        log_sum: &mut Vec<T>,
    ) {
        self.attention_forward(batch, shape, q, k, v, out, log_sum);
    }

    fn attention_backward(
        &self,
        batch: &CpuBatch<T>,
        shape: AttentionShape,
        q: &Vec<T>,
        k: &Vec<T>,
        v: &Vec<T>,
        out: &Vec<T>,
        log_sum: &Vec<T>,
        dout: &Vec<T>,
        dq: &mut Vec<T>,
        dk: &mut Vec<T>,
        dv: &mut Vec<T>,
    ) {
        self.attention_gradients(batch, shape, q, k, v, out, log_sum, dout, dq, dk, dv);
    }

    fn attention_cached(
        &self,
        shape: AttentionShape,
        rows: usize,
        past: usize,
        q: &Vec<T>,
        k_cache: &Vec<T>,
        v_cache: &Vec<T>,
        out: &mut Vec<T>,
    ) {
        self.attention_over_cache(shape, rows, past, q, k_cache, v_cache, out);
    }

    fn copy_into(&self, len: usize, source: &Vec<T>, destination: &mut Vec<T>, offset: usize) {
        destination[offset..offset + len].copy_from_slice(&source[..len]);
    }

    fn swiglu(&self, len: usize, gate: &Vec<T>, up: &Vec<T>, out: &mut Vec<T>) {
        elementwise::swiglu(&gate[..len], &up[..len], self.bf16, &mut out[..len]);
    }

    fn swiglu_backward(&self, len: usize, dout: &Vec<T>, gate: &mut Vec<T>, up: &mut Vec<T>) {
        elementwise::swiglu_backward(&dout[..len], self.bf16, &mut gate[..len], &mut up[..len]);
    }

    fn gather_labelled(&self, batch: &CpuBatch<T>, cols: usize, x: &Vec<T>, out: &mut Vec<T>) {
        for (row, &position) in out.chunks_exact_mut(cols).zip(&batch.labelled) {
            row.copy_from_slice(&x[position as usize * cols..][..cols]);
        }
    }

    fn scatter_labelled(&self, batch: &CpuBatch<T>, cols: usize, x: &Vec<T>, out: &mut Vec<T>) {
        out[..batch.len() * cols].fill(T::ZERO);
        for (row, &position) in x.chunks_exact(cols).zip(&batch.labelled) {
            out[position as usize * cols..][..cols].copy_from_slice(row);
        }
    }

    fn cross_entropy(
        &self,
        batch: &CpuBatch<T>,
        hidden: usize,
        h: &Vec<T>,
        head: &CpuMatrix,
        dh: Option<&mut Vec<T>>,
    ) -> Vec<f64> {
        self.loss(batch, hidden, h, head, dh.map(|dh| &mut dh[..]))
    }

    fn logits(&self, hidden: usize, h: &Vec<T>, row: usize, head: &CpuMatrix) -> Vec<f32> {
        let vocabulary = head.shape().0;
        let mut logits = self.scratch(vocabulary);
        let x = Strided { data: &h[row * hidden..(row + 1) * hidden], line_stride: hidden, depth_stride: 1 };
        let to = Output::new(&mut logits, vocabulary);
        gemm::gemm(Parallel::Pool, 1, vocabulary, hidden, &x, &head.by_rows(), to, false);
        logits.iter().map(|v| v.to_f32()).collect()
    }

    fn square_sum(&self, tensors: &[&Vec<T>]) -> f64 {
        tensors.iter().map(|t| elementwise::square_sum(t)).sum()
    }

    fn adamw(&self, constants: AdamW, parameters: &mut [Parameter<'_, Self>]) {
        for p in parameters {
            elementwise::adamw(constants, p.value, p.gradient, p.m, p.v);
        }
    }
}
