//! The products of generation, of `small.cu`: up to [`MOST_ROWS`] rows against a frozen weight, bound by the time that the
//! weight takes to be read.

use super::Operation;
use super::nf4::Absmax;
use crate::error::Error;
use crate::kernels;
use crate::launcher::{Argument, Launch};
use crate::memory::Buffer;
use half::bf16;

/// Most rows of x (`ROWS` in `small.cu`).
pub const MOST_ROWS: usize = 8;
/// Outputs of a block (`OUTPUTS`).
const OUTPUTS: usize = 32;
/// Outputs of a block where a warp takes one (`WARPS`).
const OUTPUTS_BY_ELEMENTS: usize = 4;

/// A frozen weight, `[outputs, inputs]`, row-major.
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    /// bf16.
    Dense(&'a Buffer<bf16>),
    /// 4-bit NormalFloat in bitsandbytes' order: two codes a byte, the first element in the high nibble.
    Nf4 {
        /// Codes, `[outputs · inputs / 2]`.
        codes: &'a Buffer<u8>,
        /// Elements that share a scale, a power of two from 32 on.
        block: usize,
        /// The scales.
        absmax: &'a Absmax,
    },
}

/// The adapter of a layer, after its first product.
#[derive(Clone, Copy, Debug)]
pub struct Adapter<'a> {
    /// r
    pub rank: usize,
    /// U = scale·X·Aᵀ, `[rows, r]`.
    pub down: &'a Buffer<bf16>,
    /// B, `[outputs, r]`.
    pub b: &'a Buffer<bf16>,
}

/// What a product is made of.
struct Product<'a> {
    operation: Operation,
    rows: usize,
    inputs: usize,
    outputs: usize,
    x: &'a Buffer<bf16>,
    /// First element of x that counts.
    first: usize,
    adapter: Option<Adapter<'a>>,
    bias: Option<&'a Buffer<f32>>,
}

impl Product<'_> {
    /// `y` and `logits` are the two places of the result, one of which is null.
    fn launch(&self, weight: Weight<'_>, y: Argument<'_>, logits: Argument<'_>) -> Result<(), Error> {
        let Product { operation, rows, inputs, outputs, .. } = *self;
        let len = operation.product(&[outputs, inputs])?;
        let rank = self.adapter.map_or(0, |adapter| adapter.rank);
        if let Some(Adapter { rank, down, b }) = self.adapter {
            operation.has("down", down, operation.product(&[rows, rank])?)?;
            operation.has("b", b, operation.product(&[outputs, rank])?)?;
        }
        if let Some(bias) = self.bias {
            operation.has("bias", bias, outputs)?;
        }
        let mut arguments = vec![
            y,
            logits,
            self.x.input(),
            Argument::U64(self.first as u64),
            self.adapter.map_or(Argument::Null, |adapter| adapter.down.input()),
            self.adapter.map_or(Argument::Null, |adapter| adapter.b.input()),
            self.bias.map_or(Argument::Null, Buffer::input),
            Argument::U32(rows as u32),
            Argument::U32(operation.u32("inputs", inputs)?),
            Argument::U32(operation.u32("outputs", outputs)?),
            Argument::U32(operation.u32("rank", rank)?),
        ];
        let (raw, within);
        let (by_runs, by_elements, run) = match weight {
            Weight::Dense(weight) => {
                operation.has("weight", weight, len)?;
                arguments.push(weight.input());
                within = vec![];
                (&kernels::small_dense, &kernels::small_elements_dense, 8)
            }
            Weight::Nf4 { codes, block, absmax } => {
                if block < 32 || !block.is_power_of_two() {
                    let what = format!("blocks of {block} elements, not of a power of two from 32 on");
                    return Err(operation.error(what));
                }
                operation.has("codes", codes, len.div_ceil(2))?;
                (raw, within) = absmax.raw(operation, len.div_ceil(block))?;
                let shift = block.trailing_zeros();
                let raw = Argument::Struct(bytemuck::bytes_of(&raw));
                arguments.extend([codes.input(), raw, Argument::U32(shift)]);
                (&kernels::small_nf4, &kernels::small_elements_nf4, 32)
            }
        };
        if rows == 0 || outputs == 0 {
            return Ok(());
        }
        let (kernel, a_block) =
            if inputs.is_multiple_of(run) { (by_runs, OUTPUTS) } else { (by_elements, OUTPUTS_BY_ELEMENTS) };
        let grid = [operation.blocks(outputs, a_block)?, 1, 1];
        self.x.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &within })
    }
}

/// `y = bf16(x·Wᵀ + U·Bᵀ + bias)`, x `[rows, inputs]`, y `[rows, outputs]`. A row of y depends on its row of x alone, to the
/// bit.
///
/// # Errors
/// More than [`MOST_ROWS`] rows; a buffer that is shorter than its shape; blocks of scales that are not a power of two from
/// 32 on.
pub fn product(
    rows: usize,
    inputs: usize,
    outputs: usize,
    x: &Buffer<bf16>,
    weight: Weight<'_>,
    adapter: Option<Adapter<'_>>,
    bias: Option<&Buffer<f32>>,
    y: &mut Buffer<bf16>,
) -> Result<(), Error> {
    let operation = Operation("small product");
    if rows > MOST_ROWS {
        return Err(operation.error(format!("{rows} rows, more than {MOST_ROWS}")));
    }
    operation.has("x", x, operation.product(&[rows, inputs])?)?;
    operation.has("y", y, operation.product(&[rows, outputs])?)?;
    let product = Product { operation, rows, inputs, outputs, x, first: 0, adapter, bias };
    product.launch(weight, y.output(), Argument::Null)
}

/// Logits of row `row` of h, `[.., hidden]`, over a vocabulary: `logits = h[row]·Wᵀ` in fp32, W `[vocabulary, hidden]`.
///
/// # Errors
/// As [`product`].
pub fn logits_row(
    row: usize,
    hidden: usize,
    vocabulary: usize,
    h: &Buffer<bf16>,
    head: Weight<'_>,
    logits: &mut Buffer<f32>,
) -> Result<(), Error> {
    let operation = Operation("logits of a row");
    let first = operation.product(&[row, hidden])?;
    operation.has("h", h, operation.product(&[row.saturating_add(1), hidden])?)?;
    operation.has("logits", logits, vocabulary)?;
    let (adapter, bias) = (None, None);
    let product =
        Product { operation, rows: 1, inputs: hidden, outputs: vocabulary, x: h, first, adapter, bias };
    product.launch(head, Argument::Null, logits.output())
}
