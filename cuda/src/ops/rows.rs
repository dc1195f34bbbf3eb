//! Rows by index, of `rows.cu`.

use super::Operation;
use crate::error::Error;
use crate::kernels::{self, Kernel};
use crate::launcher::{Argument, Launch};
use crate::memory::Buffer;
use half::bf16;

/// Threads of a block (`FLAT_THREADS` in `vector.cuh`).
const THREADS: usize = 256;

/// `out[i] = table[index[i]]`, `rows` rows of `cols`: the embedding, or the labelled rows. The caller has checked that
/// every index is below the table's rows.
pub fn gather(
    rows: usize,
    cols: usize,
    index: &Buffer<u32>,
    table: &Buffer<bf16>,
    out: &mut Buffer<bf16>,
) -> Result<(), Error> {
    let operation = Operation("gather of rows");
    operation.has("out", out, operation.product(&[rows, cols])?)?;
    launch(operation, &kernels::gather_rows_8, &kernels::gather_rows_1, rows, cols, index, table, out)
}

/// `out = 0`, `[all, cols]`, then `out[index[i]] = x[i]` for `rows` rows. The caller has checked that every index is below
/// `all` and comes once.
pub fn scatter(
    rows: usize,
    cols: usize,
    all: usize,
    index: &Buffer<u32>,
    x: &Buffer<bf16>,
    out: &mut Buffer<bf16>,
) -> Result<(), Error> {
    let operation = Operation("scatter of rows");
    let whole = operation.product(&[all, cols])?;
    operation.has("out", out, whole)?;
    operation.has("x", x, operation.product(&[rows, cols])?)?;
    out.slice(0, whole)?.fill(0)?;
    launch(operation, &kernels::scatter_rows_8, &kernels::scatter_rows_1, rows, cols, index, x, out)
}

fn launch(
    operation: Operation,
    by_runs: &'static Kernel,
    by_elements: &'static Kernel,
    rows: usize,
    cols: usize,
    index: &Buffer<u32>,
    from: &Buffer<bf16>,
    to: &mut Buffer<bf16>,
) -> Result<(), Error> {
    operation.has("index", index, rows)?;
    operation.has("source", from, 0)?;
    let (kernel, run) = if cols.is_multiple_of(8) { (by_runs, 8) } else { (by_elements, 1) };
    let threads = operation.product(&[rows, cols / run])?;
    if threads == 0 {
        return Ok(());
    }
    operation.u32("the number of threads", threads + THREADS)?;
    let arguments = [
        to.output(),
        from.input(),
        index.input(),
        Argument::U32(operation.u32("rows", rows)?),
        Argument::U32(operation.u32("cols", cols)?),
    ];
    let grid = [operation.blocks(threads, THREADS)?, 1, 1];
    to.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })
}
