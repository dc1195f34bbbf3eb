//! The optimizer of `adamw.cu`: all adapters in flat arrays, two launches a step.

use super::Operation;
use crate::error::Error;
use crate::kernels;
use crate::launcher::{Argument, Launch};
use crate::memory::Buffer;
use bytemuck::NoUninit;
use half::bf16;

/// Threads of a block and elements of a thread at a time (`FLAT_THREADS` in `vector.cuh`, `RUN` in `adamw.cu`).
const BLOCK: usize = 256 * 4;
/// Partial sums at most (`PARTIALS` in `adamw.cu`): one for each thread of the block that adds them.
pub const PARTIALS: usize = 256;

/// Constants of one update, as in `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// β₁
    pub beta1: f64,
    /// β₂
    pub beta2: f64,
    /// ε
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u64,
    /// Multiplier of the accumulated gradient before clipping: 1/labelled tokens.
    pub scale: f64,
    /// The norm is clipped to this; 0 for never.
    pub max_norm: f64,
}

/// `Constants` of `adamw.cu`.
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct Constants {
    scale: f64,
    max_norm: f64,
    step_size: f32,
    root: f32,
    decay: f32,
    beta1: f32,
    beta2: f32,
    rest1: f32,
    rest2: f32,
    epsilon: f32,
}

impl Step {
    fn constants(self) -> Constants {
        let step = self.step.min(i32::MAX as u64) as i32;
        let (bias1, bias2) = (1.0 - self.beta1.powi(step), 1.0 - self.beta2.powi(step));
        Constants {
            scale: self.scale,
            max_norm: self.max_norm,
            step_size: (self.learning_rate / bias1) as f32,
            root: bias2.sqrt() as f32,
            decay: (1.0 - self.learning_rate * self.weight_decay) as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            rest1: (1.0 - self.beta1) as f32,
            rest2: (1.0 - self.beta2) as f32,
            epsilon: self.epsilon as f32,
        }
    }
}

/// Σ x² of `len` elements in [`PARTIALS`] parts or fewer; how many it are. The order depends on `len` alone.
pub fn square_sum(len: usize, x: &Buffer<f32>, partial: &mut Buffer<f64>) -> Result<usize, Error> {
    let operation = Operation("square_sum");
    operation.has("x", x, len)?;
    let chunk = len.div_ceil(PARTIALS).next_multiple_of(BLOCK);
    let parts = len.div_ceil(chunk.max(1));
    operation.has("partial", partial, parts)?;
    if parts == 0 {
        return Ok(0);
    }
    let arguments = [partial.output(), x.input(), Argument::U64(len as u64), Argument::U64(chunk as u64)];
    let grid = [operation.blocks(parts, 1)?, 1, 1];
    let kernel = &kernels::square_sum;
    x.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })?;
    Ok(parts)
}

/// The flat arrays of all adapters.
#[derive(Debug)]
pub struct Parameters {
    /// Master weights.
    pub value: Buffer<f32>,
    /// Their bf16 copy, which the kernels multiply with.
    pub working: Buffer<bf16>,
    /// First moments.
    pub m: Buffer<f32>,
    /// Second moments.
    pub v: Buffer<f32>,
}

/// One step: `p −= lr·wd·p; m = β₁m + (1−β₁)g; v = β₂v + (1−β₂)g²; p −= lr/(1−β₁ᵗ) · m/(√v/√(1−β₂ᵗ) + ε)` with g scaled and
/// clipped by the norm of all `len` elements, which goes to `norm[0]` (before clipping). `partial` holds [`PARTIALS`]
/// elements of scratch.
pub fn adamw(
    step: Step,
    len: usize,
    gradient: &Buffer<f32>,
    parameters: &mut Parameters,
    partial: &mut Buffer<f64>,
    norm: &mut Buffer<f64>,
) -> Result<(), Error> {
    let parts = square_sum(len, gradient, partial)?;
    launch(step, len, gradient, parameters, partial, parts, norm)
}

/// [`adamw`] where the norm is known and `step.scale` has the clipping in it: one launch. `step.max_norm` is 0; `partial` and
/// `norm` are not read, and `norm[0]` is 0 afterwards.
pub fn adamw_clipped(
    step: Step,
    len: usize,
    gradient: &Buffer<f32>,
    parameters: &mut Parameters,
    partial: &Buffer<f64>,
    norm: &mut Buffer<f64>,
) -> Result<(), Error> {
    if step.max_norm != 0.0 {
        return Err(
            Operation("adamw").error(format!("clips to {}, without a norm to clip by", step.max_norm))
        );
    }
    launch(step, len, gradient, parameters, partial, 0, norm)
}

/// The update, with a norm of `parts` partial sums.
fn launch(
    step: Step,
    len: usize,
    gradient: &Buffer<f32>,
    parameters: &mut Parameters,
    partial: &Buffer<f64>,
    parts: usize,
    norm: &mut Buffer<f64>,
) -> Result<(), Error> {
    let operation = Operation("adamw");
    operation.has("gradient", gradient, len)?;
    operation.has("value", &parameters.value, len)?;
    operation.has("working", &parameters.working, len)?;
    operation.has("m", &parameters.m, len)?;
    operation.has("v", &parameters.v, len)?;
    operation.has("norm", norm, 1)?;
    if len == 0 {
        return Ok(());
    }
    let constants = step.constants();
    let arguments = [
        parameters.value.output(),
        parameters.working.output(),
        parameters.m.output(),
        parameters.v.output(),
        norm.output(),
        gradient.input(),
        partial.input(),
        Argument::U32(parts as u32),
        Argument::Struct(bytemuck::bytes_of(&constants)),
        Argument::U64(len as u64),
    ];
    let grid = [operation.blocks(len, BLOCK)?, 1, 1];
    gradient.device().launch(&Launch {
        kernel: &kernels::adamw,
        grid,
        shared: 0,
        arguments: &arguments,
        within: &[],
    })
}
