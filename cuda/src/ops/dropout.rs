//! Dropout of `dropout.cu`.

use super::Operation;
use crate::error::Error;
use crate::kernels;
use crate::launcher::{Argument, Launch};
use crate::memory::Buffer;
use half::bf16;

/// Threads of a block (`FLAT_THREADS` in `vector.cuh`).
const THREADS: usize = 256;
/// Largest grid in y (CUDA C++ Programming Guide, "Compute Capabilities").
const MOST_SEQUENCES: usize = 65_535;

/// The sequences of a micro-batch on the device.
#[derive(Debug)]
pub struct Sequences {
    /// Where each begins, in tokens, and the number of all tokens; ascending.
    pub offsets: Buffer<u32>,
    /// The key of each.
    pub keys: Buffer<u64>,
    /// How many there are.
    pub count: usize,
    /// Tokens of the longest.
    pub longest: usize,
    /// Tokens of all.
    pub tokens: usize,
}

/// `out = drop(x)`, `[tokens, inputs]`: an element survives, multiplied by 1/(1 − p), when its random word is at least
/// p·2³², and is 0 otherwise. `module` tells the layers apart. The caller has checked the offsets.
pub fn dropout(
    sequences: &Sequences,
    inputs: usize,
    probability: f64,
    module: u32,
    x: &Buffer<bf16>,
    out: &mut Buffer<bf16>,
) -> Result<(), Error> {
    let operation = Operation("dropout");
    if !(0.0..1.0).contains(&probability) {
        return Err(operation.error(format!("the probability is {probability}, not in [0, 1)")));
    }
    let len = operation.product(&[sequences.tokens, inputs])?;
    operation.has("x", x, len)?;
    operation.has("out", out, len)?;
    operation.has("offsets", &sequences.offsets, sequences.count + 1)?;
    operation.has("keys", &sequences.keys, sequences.count)?;
    if sequences.count > MOST_SEQUENCES {
        return Err(operation.error(format!("{} sequences, more than {MOST_SEQUENCES}", sequences.count)));
    }
    let (kernel, run) =
        if inputs.is_multiple_of(4) { (&kernels::dropout_4, 4) } else { (&kernels::dropout_1, 1) };
    let widest = operation.product(&[sequences.longest, inputs])?;
    if widest == 0 || sequences.count == 0 {
        return Ok(());
    }
    let arguments = [
        out.output(),
        x.input(),
        sequences.offsets.input(),
        sequences.keys.input(),
        Argument::U32(operation.u32("inputs", inputs)?),
        Argument::U32(module),
        Argument::U64((probability * 4_294_967_296.0) as u64),
        Argument::F32((1.0 / (1.0 - probability)) as f32),
    ];
    let grid = [operation.blocks(widest, THREADS * run)?, sequences.count as u32, 1];
    out.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })
}
