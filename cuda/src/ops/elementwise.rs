//! Flat operations of `elementwise.cu`.

use super::Operation;
use crate::error::Error;
use crate::kernels::{self, Kernel};
use crate::launcher::{Argument, Launch};
use crate::memory::{Buffer, Element};
use half::bf16;

/// Threads of a block (`FLAT_THREADS` in `vector.cuh`).
const THREADS: usize = 256;

/// `y += x`, `len` elements, rounded once.
pub fn add(len: usize, x: &Buffer<bf16>, y: &mut Buffer<bf16>) -> Result<(), Error> {
    let operation = Operation("add");
    operation.has("x", x, len)?;
    operation.has("y", y, len)?;
    flat(operation, &kernels::add_bf16, 8, len, y, &[x.input()])
}

/// `x *= factor`, `len` elements.
pub fn scale(len: usize, factor: f32, x: &mut Buffer<f32>) -> Result<(), Error> {
    let operation = Operation("scale");
    operation.has("x", x, len)?;
    flat(operation, &kernels::scale_f32, 4, len, x, &[Argument::F32(factor)])
}

/// `y = bf16(x)`, `len` elements.
pub fn cast_to_bf16(len: usize, x: &Buffer<f32>, y: &mut Buffer<bf16>) -> Result<(), Error> {
    let operation = Operation("cast to bf16");
    operation.has("x", x, len)?;
    operation.has("y", y, len)?;
    flat(operation, &kernels::cast_to_bf16, 4, len, y, &[x.input()])
}

/// `y = x`, `len` elements; exact.
pub fn cast_to_f32(len: usize, x: &Buffer<bf16>, y: &mut Buffer<f32>) -> Result<(), Error> {
    let operation = Operation("cast to f32");
    operation.has("x", x, len)?;
    operation.has("y", y, len)?;
    flat(operation, &kernels::cast_to_f32, 4, len, y, &[x.input()])
}

/// Launches a kernel whose parameters are the output, `more`, and the number of elements, of which a thread takes `run`.
pub(super) fn flat<T: Element>(
    operation: Operation,
    kernel: &'static Kernel,
    run: usize,
    len: usize,
    output: &mut Buffer<T>,
    more: &[Argument<'_>],
) -> Result<(), Error> {
    if len == 0 {
        return Ok(());
    }
    let grid = [operation.blocks(len, THREADS * run)?, 1, 1];
    let mut arguments = vec![output.output()];
    arguments.extend_from_slice(more);
    arguments.push(Argument::U64(len as u64));
    output.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })
}
