//! The ceilings of a device, by `probe.cu`: no part of training, but what its kernels are measured against.

use super::Operation;
use crate::error::Error;
use crate::kernels;
use crate::launcher::{Argument, Launch};
use crate::memory::Buffer;

/// Threads of a block (`THREADS` in `probe.cu`).
const THREADS: usize = 256;
/// Words of 16 bytes of a thread (`RUN`).
const RUN: usize = 4;
/// Products of a warp and round (`CHAINS`), of 2 · 16 · 8 · 16 operations each.
const OPERATIONS: f64 = 4.0 * 4096.0;

/// Elements of `out` of [`mma`]: a block on each multiprocessor.
pub fn mma_elements(multiprocessors: usize) -> usize {
    multiprocessors * THREADS
}

/// `rounds` rounds of products from registers in every warp of as many blocks as `out` has room for; how many floating-point
/// operations that is.
pub fn mma(rounds: u32, out: &mut Buffer<f32>) -> Result<f64, Error> {
    let operation = Operation("mma probe");
    let blocks = out.len() / THREADS;
    if blocks == 0 {
        return Err(operation.error(format!("out has {} elements, {THREADS} are needed", out.len())));
    }
    let arguments = [out.output(), Argument::U32(rounds)];
    let grid = [operation.blocks(blocks, 1)?, 1, 1];
    let kernel = &kernels::probe_mma;
    out.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })?;
    Ok(f64::from(rounds) * OPERATIONS * (blocks * THREADS / 32) as f64)
}

/// `to = from`, all whole words of 16 bytes of both; how many bytes are read and written.
pub fn copy(from: &Buffer<u8>, to: &mut Buffer<u8>) -> Result<f64, Error> {
    let operation = Operation("copy probe");
    let words = from.len().min(to.len()) / 16;
    if words == 0 {
        return Ok(0.0);
    }
    operation.has("from", from, 16 * words)?;
    let arguments = [to.output(), from.input(), Argument::U64(words as u64)];
    let grid = [operation.blocks(words, THREADS * RUN)?, 1, 1];
    let kernel = &kernels::probe_copy;
    to.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })?;
    Ok(32.0 * words as f64)
}
