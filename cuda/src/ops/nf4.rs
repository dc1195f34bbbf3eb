//! NF4 of `nf4.cu`: quantisation on the device, and dequantisation to bf16.

use super::Operation;
use crate::error::Error;
use crate::kernels::{self, Kernel};
use crate::launcher::{Argument, Launch};
use crate::memory::{Buffer, Element};
use bytemuck::{Pod, Zeroable};
use half::bf16;

/// Elements of a block of scales when we quantise (`BLOCK` in `nf4.cu`).
pub const BLOCK: usize = 64;
/// Scales of a nested block when we quantise (`NESTED_BLOCK` in `nf4.cu`).
pub const NESTED_BLOCK: usize = 256;
/// Elements of a block of threads: 256 threads with four runs of 8.
const DEQUANTIZED: usize = 256 * 4 * 8;
/// Warps of a block, a block of scales each.
const QUANTIZED: usize = 8;

/// Scales of the blocks.
#[derive(Debug)]
pub enum Absmax {
    /// One a block.
    Plain(Buffer<f32>),
    /// `map[codes[b]] · nested[b / nested_block] + offset`, in f32, in that order.
    Nested {
        /// One a block.
        codes: Buffer<u8>,
        /// Values of the 256 codes.
        map: Buffer<f32>,
        /// One a nested block.
        nested: Buffer<f32>,
        /// Blocks of a nested block, a power of two.
        nested_block: usize,
        /// Mean of the scales.
        offset: f32,
    },
}

/// `Absmax` of `nf4.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
pub(crate) struct RawAbsmax {
    plain: u64,
    codes: u64,
    map: u64,
    nested: u64,
    nested_shift: u32,
    offset: f32,
}

impl Absmax {
    /// As the kernels take it, and the buffers that it refers to; checked for `blocks` blocks.
    pub(crate) fn raw(
        &self,
        operation: Operation,
        blocks: usize,
    ) -> Result<(RawAbsmax, Vec<Argument<'static>>), Error> {
        match self {
            Absmax::Plain(absmax) => {
                operation.has("absmax", absmax, blocks)?;
                let plain = absmax.address().0;
                let raw = RawAbsmax { plain, codes: 0, map: 0, nested: 0, nested_shift: 0, offset: 0.0 };
                Ok((raw, vec![absmax.input()]))
            }
            Absmax::Nested { codes, map, nested, nested_block, offset } => {
                if !nested_block.is_power_of_two() {
                    return Err(
                        operation.error(format!("nested blocks of {nested_block}, not of a power of two"))
                    );
                }
                operation.has("codes of absmax", codes, blocks)?;
                operation.has("map of absmax", map, 256)?;
                operation.has("nested absmax", nested, blocks.div_ceil(*nested_block))?;
                let raw = RawAbsmax {
                    plain: 0,
                    codes: codes.address().0,
                    map: map.address().0,
                    nested: nested.address().0,
                    nested_shift: nested_block.trailing_zeros(),
                    offset: *offset,
                };
                Ok((raw, vec![codes.input(), map.input(), nested.input()]))
            }
        }
    }
}

/// `out = bf16(NF4[code] · absmax)`, `count` elements in blocks of `block`, a power of two from 32 on.
pub fn dequantize(
    count: usize,
    block: usize,
    codes: &Buffer<u8>,
    absmax: &Absmax,
    out: &mut Buffer<bf16>,
) -> Result<(), Error> {
    let operation = Operation("nf4 dequantize");
    if block < 32 || !block.is_power_of_two() {
        return Err(operation.error(format!("blocks of {block} elements, not of a power of two from 32 on")));
    }
    operation.has("codes", codes, count.div_ceil(2))?;
    operation.has("out", out, count)?;
    let (raw, within) = absmax.raw(operation, count.div_ceil(block))?;
    if count == 0 {
        return Ok(());
    }
    let arguments = [
        out.output(),
        codes.input(),
        Argument::Struct(bytemuck::bytes_of(&raw)),
        Argument::U32(block.trailing_zeros()),
        Argument::U64(count as u64),
    ];
    let grid = [operation.blocks(count, DEQUANTIZED)?, 1, 1];
    let kernel = &kernels::nf4_dequantize;
    out.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &within })
}

/// An element type that can be quantised.
pub trait Quantizable: Element {
    #[doc(hidden)]
    fn kernel() -> &'static Kernel;
}

impl Quantizable for f32 {
    fn kernel() -> &'static Kernel {
        &kernels::nf4_quantize_f32
    }
}

impl Quantizable for bf16 {
    fn kernel() -> &'static Kernel {
        &kernels::nf4_quantize_bf16
    }
}

/// Quantises `count` elements in blocks of [`BLOCK`]: codes and one scale a block. A scale that is not finite says that an
/// element of its block was not.
pub fn quantize<T: Quantizable>(
    count: usize,
    x: &Buffer<T>,
    codes: &mut Buffer<u8>,
    absmax: &mut Buffer<f32>,
) -> Result<(), Error> {
    let operation = Operation("nf4 quantize");
    let blocks = count.div_ceil(BLOCK);
    operation.has("x", x, count)?;
    operation.has("codes", codes, count.div_ceil(2))?;
    operation.has("absmax", absmax, blocks)?;
    if count == 0 {
        return Ok(());
    }
    let arguments = [codes.output(), absmax.output(), x.input(), Argument::U64(count as u64)];
    let grid = [operation.blocks(blocks, QUANTIZED)?, 1, 1];
    x.device().launch(&Launch { kernel: T::kernel(), grid, shared: 0, arguments: &arguments, within: &[] })
}

/// Double quantisation of `blocks` scales: their mean to `offset[0]`, codes, and one scale for every [`NESTED_BLOCK`]
/// codes. `map` has the 256 values of the codes, ascending.
pub fn nest(
    blocks: usize,
    absmax: &Buffer<f32>,
    map: &Buffer<f32>,
    offset: &mut Buffer<f32>,
    codes: &mut Buffer<u8>,
    nested: &mut Buffer<f32>,
) -> Result<(), Error> {
    let operation = Operation("nf4 nest");
    operation.has("absmax", absmax, blocks)?;
    operation.has("map", map, 256)?;
    operation.has("offset", offset, 1)?;
    operation.has("codes", codes, blocks)?;
    operation.has("nested", nested, blocks.div_ceil(NESTED_BLOCK))?;
    if blocks == 0 {
        return Ok(());
    }
    let device = absmax.device();
    let arguments = [offset.output(), absmax.input(), Argument::U64(blocks as u64)];
    let kernel = &kernels::absmax_mean;
    device.launch(&Launch { kernel, grid: [1, 1, 1], shared: 0, arguments: &arguments, within: &[] })?;
    let arguments = [
        codes.output(),
        nested.output(),
        absmax.input(),
        offset.input(),
        map.input(),
        Argument::U64(blocks as u64),
    ];
    let grid = [operation.blocks(blocks, NESTED_BLOCK)?, 1, 1];
    let kernel = &kernels::absmax_nest;
    device.launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })
}
