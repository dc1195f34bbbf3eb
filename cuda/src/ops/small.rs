//! The products of generation, of `small.cu`: up to [`MOST_ROWS`] rows against a frozen weight, bound by the time that the
//! weight takes to be read.

use super::Operation;
use super::linear::{Matrix, Values};
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
    x: &'a Buffer<bf16>,
    /// First element of x that counts.
    first: usize,
    weight: &'a Matrix,
    adapter: Option<Adapter<'a>>,
    bias: Option<&'a Buffer<f32>>,
}

impl Product<'_> {
    /// `y` and `logits` are the two places of the result, one of which is null.
    fn launch(&self, y: Argument<'_>, logits: Argument<'_>) -> Result<(), Error> {
        let Product { operation, rows, .. } = *self;
        let (outputs, inputs) = self.weight.shape();
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
        let (by_runs, by_elements, runs) = match self.weight.values() {
            Values::Dense(values) => {
                arguments.push(values.input());
                within = vec![];
                (&kernels::small_dense, &kernels::small_elements_dense, inputs.is_multiple_of(8))
            }
            Values::Nf4 { block, packed, absmax } => {
                (raw, within) = absmax.raw(operation, (outputs * inputs).div_ceil(*block))?;
                let raw = Argument::Struct(bytemuck::bytes_of(&raw));
                arguments.extend([packed.input(), raw, Argument::U32(block.trailing_zeros())]);
                (&kernels::small_nf4, &kernels::small_elements_nf4, self.weight.fuses())
            }
        };
        if rows == 0 || outputs == 0 {
            return Ok(());
        }
        let (kernel, a_block) = if runs { (by_runs, OUTPUTS) } else { (by_elements, OUTPUTS_BY_ELEMENTS) };
        let grid = [operation.blocks(outputs, a_block)?, 1, 1];
        self.x.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &within })
    }
}

/// `y = bf16(x·Wᵀ + U·Bᵀ + bias)`, W `[outputs, inputs]`, x `[rows, inputs]`, y `[rows, outputs]`; sums in fp32. A row of y
/// depends on its row of x alone, to the bit. (The products of [`linear`](super::linear) sum in another order: their
/// last bits are others.)
///
/// # Errors
/// More than [`MOST_ROWS`] rows, or a buffer that is shorter than its shape.
pub fn product(
    rows: usize,
    x: &Buffer<bf16>,
    weight: &Matrix,
    adapter: Option<Adapter<'_>>,
    bias: Option<&Buffer<f32>>,
    y: &mut Buffer<bf16>,
) -> Result<(), Error> {
    let operation = Operation("small product");
    let (outputs, inputs) = weight.shape();
    if rows > MOST_ROWS {
        return Err(operation.error(format!("{rows} rows, more than {MOST_ROWS}")));
    }
    operation.has("x", x, operation.product(&[rows, inputs])?)?;
    operation.has("y", y, operation.product(&[rows, outputs])?)?;
    let product = Product { operation, rows, x, first: 0, weight, adapter, bias };
    product.launch(y.output(), Argument::Null)
}

/// Logits of row `row` of h, `[.., hidden]`: `logits = h[row]·Wᵀ` in fp32, W `[vocabulary, hidden]`.
///
/// # Errors
/// When a buffer is shorter than its shape.
pub fn logits_row(
    row: usize,
    h: &Buffer<bf16>,
    head: &Matrix,
    logits: &mut Buffer<f32>,
) -> Result<(), Error> {
    let operation = Operation("logits of a row");
    let (vocabulary, hidden) = head.shape();
    let first = operation.product(&[row, hidden])?;
    operation.has("h", h, operation.product(&[row.saturating_add(1), hidden])?)?;
    operation.has("logits", logits, vocabulary)?;
    let product = Product { operation, rows: 1, x: h, first, weight: head, adapter: None, bias: None };
    product.launch(Argument::Null, logits.output())
}
