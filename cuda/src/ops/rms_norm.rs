//! RMSNorm of `rms_norm.cu`.

use super::Operation;
use crate::error::Error;
use crate::kernels::{self, Kernel};
use crate::launcher::{Argument, Launch};
use crate::memory::Buffer;
use half::bf16;

/// Rows of a block (`ROWS` in `rms_norm.cu`).
const ROWS: usize = 8;

/// Rows of a row-major array that are normalised.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// ε
    pub epsilon: f32,
}

impl Shape {
    fn check(self, operation: Operation, weight: &Buffer<f32>) -> Result<usize, Error> {
        if self.cols == 0 && self.rows > 0 {
            return Err(operation.error("rows of no elements have no mean"));
        }
        operation.has("weight", weight, self.cols)?;
        operation.product(&[self.rows, self.cols])
    }

    fn launch(
        self,
        operation: Operation,
        weight: &Buffer<f32>,
        by_runs: &'static Kernel,
        by_elements: &'static Kernel,
        buffers: &[Argument<'_>],
    ) -> Result<(), Error> {
        if self.rows == 0 {
            return Ok(());
        }
        let kernel = if self.cols.is_multiple_of(8) { by_runs } else { by_elements };
        let grid = [operation.blocks(self.rows, ROWS)?, 1, 1];
        let mut arguments = buffers.to_vec();
        arguments.extend([
            weight.input(),
            Argument::U32(operation.u32("rows", self.rows)?),
            Argument::U32(operation.u32("cols", self.cols)?),
            Argument::F32(self.epsilon),
        ]);
        weight.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })
    }
}

/// `y = x / √(mean(x²) + ε) · w`, per row; sums in fp32.
pub fn rms_norm(
    shape: Shape,
    x: &Buffer<bf16>,
    weight: &Buffer<f32>,
    y: &mut Buffer<bf16>,
) -> Result<(), Error> {
    let operation = Operation("rms_norm");
    let len = shape.check(operation, weight)?;
    operation.has("x", x, len)?;
    operation.has("y", y, len)?;
    let buffers = [y.output(), x.input()];
    shape.launch(operation, weight, &kernels::rms_norm_8, &kernels::rms_norm_1, &buffers)
}

/// `x = bf16(x + delta)`, then [`rms_norm`] of it: the residual stream is read and written once for both.
pub fn rms_norm_residual(
    shape: Shape,
    x: &mut Buffer<bf16>,
    delta: &Buffer<bf16>,
    weight: &Buffer<f32>,
    y: &mut Buffer<bf16>,
) -> Result<(), Error> {
    let operation = Operation("rms_norm with residual");
    let len = shape.check(operation, weight)?;
    operation.has("x", x, len)?;
    operation.has("delta", delta, len)?;
    operation.has("y", y, len)?;
    let buffers = [y.output(), x.output(), delta.input()];
    shape.launch(operation, weight, &kernels::rms_norm_residual_8, &kernels::rms_norm_residual_1, &buffers)
}

/// With s = 1/√(mean(x²) + ε) and g = dy·w: `dx = s·g − x·s³·mean(g·x)`; `+=` when `accumulate`.
pub fn rms_norm_backward(
    shape: Shape,
    x: &Buffer<bf16>,
    weight: &Buffer<f32>,
    dy: &Buffer<bf16>,
    dx: &mut Buffer<bf16>,
    accumulate: bool,
) -> Result<(), Error> {
    let operation = Operation("rms_norm_backward");
    let len = shape.check(operation, weight)?;
    operation.has("x", x, len)?;
    operation.has("dy", dy, len)?;
    operation.has("dx", dx, len)?;
    let buffers = [dx.output(), dy.input(), x.input()];
    let (by_runs, by_elements) = match accumulate {
        false => (&kernels::rms_norm_backward_8, &kernels::rms_norm_backward_1),
        true => (&kernels::rms_norm_backward_add_8, &kernels::rms_norm_backward_add_1),
    };
    shape.launch(operation, weight, by_runs, by_elements, &buffers)
}
