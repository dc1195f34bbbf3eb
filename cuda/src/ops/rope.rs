//! Rotary position embedding of `rope.cu`.

use super::Operation;
use crate::device::Device;
use crate::error::Error;
use crate::kernels;
use crate::launcher::{Argument, Launch};
use crate::memory::Buffer;
use half::bf16;

/// Threads of a block (`FLAT_THREADS` in `vector.cuh`).
const THREADS: usize = 256;

/// Cosines and sines of all positions, `[longest, half]` each: made once, the same for all layers.
#[derive(Debug)]
pub struct Angles {
    cos: Buffer<f32>,
    sin: Buffer<f32>,
    half: usize,
    longest: usize,
}

impl Angles {
    /// The angle is the product of position and frequency in f32, as transformers has it; its sine and cosine come from
    /// double precision and are multiplied by `magnitude` in f32. There are `head_dim / 2` frequencies.
    pub fn new(
        device: &Device,
        longest: usize,
        frequencies: &[f32],
        magnitude: f32,
    ) -> Result<Angles, Error> {
        let operation = Operation("rope");
        operation.product(&[longest, frequencies.len()])?;
        let table = |of: fn(f64) -> f64| {
            let values: Vec<f32> = (0..longest)
                .flat_map(|position| {
                    frequencies.iter().map(move |f| of(f64::from(position as f32 * f)) as f32 * magnitude)
                })
                .collect();
            Buffer::from_slice(device, &values)
        };
        Ok(Angles { cos: table(f64::cos)?, sin: table(f64::sin)?, half: frequencies.len(), longest })
    }

    /// Positions that there are.
    pub fn longest(&self) -> usize {
        self.longest
    }
}

/// Rotates q `[tokens, heads, 2·half]` and k `[tokens, kv_heads, 2·half]` in place; `inverse` rotates back (the gradient).
/// The caller has checked that every position is below [`Angles::longest`]. `k` may be left out, with `kv_heads` 0.
pub fn rope(
    angles: &Angles,
    positions: &Buffer<u32>,
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    inverse: bool,
    q: &mut Buffer<bf16>,
    k: Option<&mut Buffer<bf16>>,
) -> Result<(), Error> {
    let operation = Operation("rope");
    let half = angles.half;
    operation.has("q", q, operation.product(&[tokens, heads, 2, half])?)?;
    operation.has("positions", positions, tokens)?;
    let k = match k {
        Some(k) => {
            operation.has("k", k, operation.product(&[tokens, kv_heads, 2, half])?)?;
            k.output()
        }
        None if kv_heads > 0 => return Err(operation.error(format!("{kv_heads} heads of keys and no keys"))),
        None => Argument::Null,
    };
    let (kernel, run) = if half.is_multiple_of(8) { (&kernels::rope_8, 8) } else { (&kernels::rope_1, 1) };
    let threads = operation.product(&[tokens, heads + kv_heads, half / run])?;
    if threads == 0 {
        return Ok(());
    }
    operation.u32("the number of threads", threads + THREADS)?;
    let arguments = [
        q.output(),
        k,
        positions.input(),
        angles.cos.input(),
        angles.sin.input(),
        Argument::U32(operation.u32("tokens", tokens)?),
        Argument::U32(operation.u32("heads", heads)?),
        Argument::U32(operation.u32("kv_heads", kv_heads)?),
        Argument::U32(operation.u32("half", half)?),
        Argument::F32(if inverse { -1.0 } else { 1.0 }),
    ];
    let grid = [operation.blocks(threads, THREADS)?, 1, 1];
    q.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })
}
