//! Causal attention of `attention.cu` and `attention_backward.cu`, for heads that are 64 wide or a multiple of 8 from 72 to
//! 128, and of `attention_any.cu` for all others.

use super::Operation;
use crate::error::Error;
use crate::kernels::{self, Kernel};
use crate::launcher::{Argument, Launch};
use crate::memory::Buffer;
use bytemuck::NoUninit;
use half::bf16;

/// Widest head (`COLUMNS` in `attention_any.cu`).
pub const MOST_HEAD_DIM: usize = 512;
/// Warps of a block of `attention_any.cu`: a query or a key each, a row of `delta` each.
const WARPS: usize = 4;
/// Tokens of a block of the kernels with tiles (`ROWS` in `attention_tiles.cuh`).
const ROWS: usize = 64;

/// Attention inside the examples of a packed batch. q, out `[tokens, heads, head_dim]`, k, v
/// `[tokens, kv_heads, head_dim]`, log_sum `[tokens, heads]`.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Tokens of the batch.
    pub tokens: usize,
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of the keys and values; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head, at most [`MOST_HEAD_DIM`].
    pub head_dim: usize,
    /// Multiplier of the scores, positive.
    pub scale: f32,
    /// Key j is seen by query i when `i − j < window` and `j ≤ i`.
    pub window: Option<usize>,
    /// Examples; there are `sequences + 1` offsets.
    pub sequences: usize,
    /// No example is longer. It bounds the grid: the tail of an example that is longer is left out.
    pub longest: usize,
}

/// `Attention` of `attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct Raw {
    sequences: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    window: u32,
    scale: f32,
}

/// Elements of the scratch of [`backward`]: a number for each query.
pub fn scratch_elements(tokens: usize, heads: usize) -> usize {
    tokens * heads
}

impl Shape {
    fn queries(&self, operation: Operation) -> Result<usize, Error> {
        operation.product(&[self.tokens, self.heads, self.head_dim])
    }

    fn keys(&self, operation: Operation) -> Result<usize, Error> {
        operation.product(&[self.tokens, self.kv_heads, self.head_dim])
    }

    /// The shape as the kernels take it.
    fn check(&self, operation: Operation) -> Result<Raw, Error> {
        let Shape { heads, kv_heads, head_dim, scale, window, .. } = *self;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(operation.error(format!("{heads} heads of queries cannot share {kv_heads} of keys")));
        }
        if head_dim == 0 || head_dim > MOST_HEAD_DIM {
            return Err(operation.error(format!("heads of {head_dim} elements, not of 1 to {MOST_HEAD_DIM}")));
        }
        if !(scale > 0.0 && scale.is_finite()) {
            return Err(operation.error(format!("a scale of {scale}, which is not a positive number")));
        }
        if window == Some(0) {
            return Err(operation.error("a window of 0, in which a query does not see its own key"));
        }
        // Differences of positions wrap around beyond all of them.
        if self.tokens > i32::MAX as usize {
            return Err(operation.error(format!("{} tokens, more than 2^31 - 1", self.tokens)));
        }
        if self.sequences.saturating_mul(self.longest) < self.tokens {
            let Shape { tokens, sequences, longest, .. } = *self;
            let what = format!("{sequences} examples of at most {longest} tokens are not {tokens} tokens");
            return Err(operation.error(what));
        }
        Ok(Raw {
            sequences: operation.u32("sequences", self.sequences)?,
            heads: operation.u32("heads", heads)?,
            kv_heads: operation.u32("kv_heads", kv_heads)?,
            head_dim: operation.u32("head_dim", head_dim)?,
            window: window.and_then(|window| u32::try_from(window).ok()).unwrap_or(u32::MAX),
            scale,
        })
    }

    /// Blocks of a kernel that takes tiles of `rows` tokens of one of `heads` heads: at least as many as there are tiles.
    fn grid(&self, operation: Operation, rows: usize, heads: usize) -> Result<[u32; 3], Error> {
        let Shape { tokens, sequences, longest, .. } = *self;
        // Σ ⌈len/rows⌉ is at most this, whatever the lengths; and no example has more tiles than the longest.
        let by_tokens = (tokens + operation.product(&[sequences, rows - 1])?) / rows;
        let by_longest = sequences.saturating_mul(longest.div_ceil(rows));
        Ok([operation.blocks(operation.product(&[by_tokens.min(by_longest), heads])?, 1)?, 1, 1])
    }

    fn is_empty(&self) -> bool {
        self.tokens == 0 || self.heads == 0
    }

    /// The kernels for heads of this width.
    fn kernels(&self) -> Kernels {
        let tiled = |forward, dkv, dq| Kernels { forward, dkv, dq, rows: ROWS, shared: None };
        // For each warp two rows and two chunks of 32 weights.
        let shared = (WARPS * (2 * self.head_dim + 2 * 32) * size_of::<f32>()) as u32;
        let any = |forward, dkv, dq| Kernels { forward, dkv, dq, rows: WARPS, shared: Some(shared) };
        use kernels as k;
        match self.head_dim {
            64 => tiled(&k::attention_64, &k::attention_dkv_64, &k::attention_dq_64),
            128 => tiled(&k::attention_128, &k::attention_dkv_128, &k::attention_dq_128),
            72..128 if self.head_dim.is_multiple_of(8) => {
                tiled(&k::attention_padded, &k::attention_dkv_padded, &k::attention_dq_padded)
            }
            d if d.is_multiple_of(8) => {
                any(&k::attention_any_8, &k::attention_any_dkv_8, &k::attention_any_dq_8)
            }
            _ => any(&k::attention_any_1, &k::attention_any_dkv_1, &k::attention_any_dq_1),
        }
    }
}

/// The kernels that serve a width of heads. A sum's order is a function of the width, so there is no other choice.
struct Kernels {
    forward: &'static Kernel,
    dkv: &'static Kernel,
    dq: &'static Kernel,
    /// Tokens of a block.
    rows: usize,
    /// Dynamic shared memory, where it is not that of the table.
    shared: Option<u32>,
}

impl Kernels {
    fn shared(&self, kernel: &Kernel) -> u32 {
        self.shared.unwrap_or(kernel.dynamic_shared)
    }
}

/// `out = softmax(scale · q·kᵀ)·v`, and the natural logarithm of every query's sum of exponentials in `log_sum`.
///
/// The caller has checked that `cu_seqlens` ascends from 0 to `tokens`.
pub fn forward(
    shape: Shape,
    cu_seqlens: &Buffer<u32>,
    q: &Buffer<bf16>,
    k: &Buffer<bf16>,
    v: &Buffer<bf16>,
    out: &mut Buffer<bf16>,
    log_sum: &mut Buffer<f32>,
) -> Result<(), Error> {
    let operation = Operation("attention");
    let raw = shape.check(operation)?;
    operation.has("cu_seqlens", cu_seqlens, shape.sequences + 1)?;
    operation.has("q", q, shape.queries(operation)?)?;
    operation.has("k", k, shape.keys(operation)?)?;
    operation.has("v", v, shape.keys(operation)?)?;
    operation.has("out", out, shape.queries(operation)?)?;
    operation.has("log_sum", log_sum, shape.tokens * shape.heads)?;
    if shape.is_empty() {
        return Ok(());
    }
    let arguments = [
        out.output(),
        log_sum.output(),
        q.input(),
        k.input(),
        v.input(),
        cu_seqlens.input(),
        Argument::Struct(bytemuck::bytes_of(&raw)),
    ];
    let kernels = shape.kernels();
    q.device().launch(&Launch {
        kernel: kernels.forward,
        grid: shape.grid(operation, kernels.rows, shape.heads)?,
        shared: kernels.shared(kernels.forward),
        arguments: &arguments,
        within: &[],
    })
}

/// The gradients of [`forward`] from its inputs, its results and the gradient of `out`; all three `=`.
///
/// `scratch` has [`scratch_elements`]; what it holds is of no use afterwards.
pub fn backward(
    shape: Shape,
    cu_seqlens: &Buffer<u32>,
    q: &Buffer<bf16>,
    k: &Buffer<bf16>,
    v: &Buffer<bf16>,
    out: &Buffer<bf16>,
    log_sum: &Buffer<f32>,
    dout: &Buffer<bf16>,
    scratch: &mut Buffer<f32>,
    dq: &mut Buffer<bf16>,
    dk: &mut Buffer<bf16>,
    dv: &mut Buffer<bf16>,
) -> Result<(), Error> {
    let operation = Operation("attention_backward");
    let raw = shape.check(operation)?;
    let (queries, keys) = (shape.queries(operation)?, shape.keys(operation)?);
    let rows = shape.tokens * shape.heads;
    operation.has("cu_seqlens", cu_seqlens, shape.sequences + 1)?;
    for (name, buffer, len) in
        [("q", q, queries), ("k", k, keys), ("v", v, keys), ("out", out, queries), ("dout", dout, queries)]
    {
        operation.has(name, buffer, len)?;
    }
    operation.has("log_sum", log_sum, rows)?;
    operation.has("scratch", scratch, scratch_elements(shape.tokens, shape.heads))?;
    operation.has("dq", dq, queries)?;
    operation.has("dk", dk, keys)?;
    operation.has("dv", dv, keys)?;
    if shape.is_empty() {
        return Ok(());
    }
    let device = q.device();
    device.launch(&Launch {
        kernel: if shape.head_dim.is_multiple_of(4) {
            &kernels::attention_delta_4
        } else {
            &kernels::attention_delta_1
        },
        grid: [operation.blocks(rows, WARPS)?, 1, 1],
        shared: 0,
        arguments: &[
            scratch.output(),
            out.input(),
            dout.input(),
            Argument::U64(rows as u64),
            Argument::U32(raw.head_dim),
        ],
        within: &[],
    })?;
    let inputs = [
        q.input(),
        k.input(),
        v.input(),
        dout.input(),
        log_sum.input(),
        scratch.input(),
        cu_seqlens.input(),
        Argument::Struct(bytemuck::bytes_of(&raw)),
    ];
    let kernels = shape.kernels();
    let launch = |kernel, heads, outputs: &[Argument<'static>]| {
        let arguments: Vec<_> = outputs.iter().chain(&inputs).copied().collect();
        let (grid, shared) = (shape.grid(operation, kernels.rows, heads)?, kernels.shared(kernel));
        device.launch(&Launch { kernel, grid, shared, arguments: &arguments, within: &[] })
    };
    launch(kernels.dkv, shape.kv_heads, &[dk.output(), dv.output()])?;
    launch(kernels.dq, shape.heads, &[dq.output()])
}
