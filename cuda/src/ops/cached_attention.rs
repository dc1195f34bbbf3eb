//! Attention over cached keys and values, of `cached_attention.cu`.

use super::Operation;
use crate::error::Error;
use crate::kernels;
use crate::launcher::{Argument, Launch};
use crate::memory::Buffer;
use bytemuck::NoUninit;
use half::bf16;

/// Keys that a block takes (`CHUNK` in `cached_attention.cu`).
const CHUNK: usize = 128;
/// Query heads of a block (`HEADS`).
const HEADS: usize = 4;
/// Largest grid in y and z (CUDA C++ Programming Guide, "Compute Capabilities").
const MOST_IN_Y: usize = 65_535;

/// Heads, and what a query sees.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Multiplier of the scores.
    pub scale: f32,
    /// Key j is visible to query i when `i - j < window` (and j ≤ i).
    pub window: Option<usize>,
}

/// `Shape` of `cached_attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct RawShape {
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    window: u32,
    past: u32,
    chunks: u32,
    tiles: u32,
    scale: f32,
}

impl Shape {
    /// Most chunks that a query sees of so many keys: with a window, those that it touches.
    fn chunks(self, keys: usize) -> usize {
        let all = keys.div_ceil(CHUNK);
        self.window.map_or(all, |window| all.min(window.saturating_sub(1) / CHUNK + 2))
    }

    /// Elements of scratch for a row.
    fn scratch_row(self, keys: usize) -> usize {
        self.heads.saturating_mul(self.chunks(keys)).saturating_mul(self.head_dim.saturating_add(2))
    }
}

/// Elements of scratch that [`cached_attention`] takes to compute `rows` rows at a time over up to `keys` keys. With fewer it
/// takes more launches, with too few for one row it refuses.
pub fn scratch_elements(shape: Shape, rows: usize, keys: usize) -> usize {
    shape.scratch_row(keys).saturating_mul(rows)
}

/// `out = softmax(scale·q·kᵀ)·v` for `rows` new tokens at positions `past ..`, over the `past + rows` keys and values of their
/// text (those of the new tokens among them). q and out `[rows, heads, head_dim]`, k and v
/// `[past + rows, kv_heads, head_dim]`. A row is the same, to the bit, however many there are.
///
/// # Errors
/// When heads are not groups of a key head, a window sees nothing, or a buffer is shorter than its shape.
pub fn cached_attention(
    shape: Shape,
    rows: usize,
    past: usize,
    q: &Buffer<bf16>,
    k: &Buffer<bf16>,
    v: &Buffer<bf16>,
    out: &mut Buffer<bf16>,
    scratch: &mut Buffer<f32>,
) -> Result<(), Error> {
    let operation = Operation("cached attention");
    let Shape { heads, kv_heads, head_dim, scale, window } = shape;
    if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(operation.error(format!("{heads} heads are no multiple of {kv_heads} key heads")));
    }
    if window == Some(0) {
        return Err(operation.error("a window of no keys"));
    }
    let keys = past.saturating_add(rows);
    let len = operation.product(&[rows, heads, head_dim])?;
    operation.has("q", q, len)?;
    operation.has("out", out, len)?;
    let cached = operation.product(&[keys, kv_heads, head_dim])?;
    operation.has("k", k, cached)?;
    operation.has("v", v, cached)?;
    operation.u32("the number of keys", keys.saturating_add(CHUNK))?;
    if len == 0 {
        return Ok(());
    }
    let a_row = operation.product(&[shape.scratch_row(keys)])?;
    operation.has("scratch", scratch, a_row)?;
    let (tiles, chunks) = ((heads / kv_heads).div_ceil(HEADS), shape.chunks(keys));
    let in_y = operation.product(&[kv_heads, tiles])?;
    if in_y > MOST_IN_Y {
        return Err(operation.error(format!("{in_y} tiles of heads, more than {MOST_IN_Y}")));
    }
    let raw = RawShape {
        heads: operation.u32("heads", heads)?,
        kv_heads: operation.u32("kv_heads", kv_heads)?,
        head_dim: operation.u32("head_dim", head_dim)?,
        window: window.map_or(0, |window| window.min(u32::MAX as usize) as u32),
        past: past as u32,
        chunks: operation.u32("chunks", chunks)?,
        tiles: tiles as u32,
        scale,
    };
    let at_a_time = (scratch.len() / a_row).min(rows).min(MOST_IN_Y);
    // Statistics first: they are read in pairs, whatever head_dim is.
    let slots = at_a_time * heads * chunks;
    let mut statistics = scratch.slice(0, 2 * slots)?;
    let mut values = scratch.slice(2 * slots, slots * head_dim)?;
    let device = q.device();
    let kernel =
        if head_dim.is_multiple_of(8) { &kernels::cached_attention_8 } else { &kernels::cached_attention_1 };
    for first in (0..rows).step_by(at_a_time) {
        let lot = (rows - first).min(at_a_time) as u32;
        let shape = Argument::Struct(bytemuck::bytes_of(&raw));
        let first = Argument::U32(first as u32);
        let arguments = [values.output(), statistics.output(), q.input(), k.input(), v.input(), shape, first];
        let grid = [operation.blocks(chunks, 1)?, in_y as u32, lot];
        device.launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })?;
        let arguments = [out.output(), values.input(), statistics.input(), shape, first];
        let grid = [operation.blocks(heads, 1)?, lot, 1];
        let kernel = &kernels::cached_attention_combine;
        device.launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })?;
    }
    Ok(())
}
