//! The gated MLP's activation, of `swiglu.cu`.

use super::Operation;
use super::elementwise::flat;
use crate::error::Error;
use crate::kernels;
use crate::memory::Buffer;
use half::bf16;

/// `out = silu(gate)·up`, `len` elements.
pub fn swiglu(
    len: usize,
    gate: &Buffer<bf16>,
    up: &Buffer<bf16>,
    out: &mut Buffer<bf16>,
) -> Result<(), Error> {
    let operation = Operation("swiglu");
    operation.has("gate", gate, len)?;
    operation.has("up", up, len)?;
    operation.has("out", out, len)?;
    flat(operation, &kernels::swiglu, 8, len, out, &[gate.input(), up.input()])
}

/// In place: `gate` becomes its gradient, `up` becomes its gradient.
pub fn swiglu_backward(
    len: usize,
    dout: &Buffer<bf16>,
    gate: &mut Buffer<bf16>,
    up: &mut Buffer<bf16>,
) -> Result<(), Error> {
    let operation = Operation("swiglu_backward");
    operation.has("dout", dout, len)?;
    operation.has("gate", gate, len)?;
    operation.has("up", up, len)?;
    flat(operation, &kernels::swiglu_backward, 8, len, gate, &[up.output(), dout.input()])
}
