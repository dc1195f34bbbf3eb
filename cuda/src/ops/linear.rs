//! Matrix products of `gemm.cu` and `gemm_nf4.cu`: linear layers over a frozen weight with a LoRA beside it, their input
//! gradient, and the logits.
//!
//! A group of layers that share their input (q, k, v; gate, up) is one launch, with a narrow one before it where the down
//! products of their LoRA are not made beside it. `docs/kernels.md` has the paths; all of them give the same bits, so which one is taken is a matter of
//! speed alone, and a row's result does not depend on the rows beside it.

use super::Operation;
use super::dropout::Sequences;
use super::nf4::{Absmax, RawAbsmax, dequantize};
use crate::device::Device;
use crate::error::Error;
use crate::kernels::{self, Kernel};
use crate::launcher::{Address, Argument, Launch};
use crate::memory::Buffer;
use crate::tiles::{Provenance, Row, select};
use bytemuck::{Pod, Zeroable};
use half::bf16;
use std::sync::atomic::{AtomicU64, Ordering};

/// Layers of a group at most (`MOST_PARTS` in `gemm.cuh`).
pub const MOST_PARTS: usize = 3;
/// Outputs of a unit (`PANEL` in `gemm_units.cuh`).
const PANEL: usize = 32;
/// Inputs of a unit (`UNIT` in `gemm_units.cuh`).
const UNIT: usize = 16;
/// Depth of a tile (`DEPTH` in `gemm.cuh`).
const DEPTH: u32 = 32;
/// Codes that a block of `gemm_pack` moves: 8 warps, 8 rows × 4 units each.
const PACKED_WARPS: usize = 8;
/// Copies in [`Scratch`] begin at multiples of so many elements, 256 bytes.
const ALIGNMENT: usize = 128;

/// A frozen weight W `[outputs, inputs]`.
#[derive(Debug)]
pub struct Matrix {
    /// Never given to another matrix: what [`Scratch`] knows a copy by.
    identity: u64,
    outputs: usize,
    inputs: usize,
    values: Values,
}

/// How a [`Matrix`] lies in memory.
#[derive(Debug)]
pub(crate) enum Values {
    Dense(Buffer<bf16>),
    Nf4 { block: usize, packed: Buffer<u8>, absmax: Absmax },
}

/// Whether the kernels have an order of their own for such a weight; else it is kept row-major, and dequantised before it
/// is multiplied.
fn in_units(inputs: usize, block: usize) -> bool {
    inputs.is_multiple_of(block)
}

impl Matrix {
    const OPERATION: Operation = Operation("matrix");

    fn new(outputs: usize, inputs: usize, values: Values) -> Matrix {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Matrix { identity: NEXT.fetch_add(1, Ordering::Relaxed), outputs, inputs, values }
    }

    /// A weight in bf16, row-major.
    ///
    /// # Errors
    /// When `values` is shorter than the shape.
    pub fn dense(outputs: usize, inputs: usize, values: Buffer<bf16>) -> Result<Matrix, Error> {
        let len = Self::OPERATION.product(&[outputs, inputs])?;
        Self::OPERATION.has("values", &values, len)?;
        Ok(Matrix::new(outputs, inputs, Values::Dense(values)))
    }

    /// A weight in NF4 with a scale for every `block` elements, a power of two from 32 on. `codes` are row-major, as
    /// bitsandbytes has them, and not needed afterwards; `packed` gets them in the order of the kernels and has
    /// [`Matrix::packed_bytes`].
    ///
    /// # Errors
    /// When a buffer is shorter than that, or the block is none.
    pub fn nf4(
        outputs: usize,
        inputs: usize,
        block: usize,
        codes: &Buffer<u8>,
        mut packed: Buffer<u8>,
        absmax: Absmax,
    ) -> Result<Matrix, Error> {
        let operation = Self::OPERATION;
        if block < 32 || !block.is_power_of_two() {
            return Err(
                operation.error(format!("blocks of {block} elements, not of a power of two from 32 on"))
            );
        }
        let len = operation.product(&[outputs, inputs])?;
        operation.has("codes", codes, len.div_ceil(2))?;
        operation.has("packed", &packed, Self::packed_bytes(outputs, inputs, block))?;
        absmax.raw(operation, len.div_ceil(block))?;
        operation.u32("blocks of scales", len.div_ceil(block))?;
        if len > 0 && in_units(inputs, block) {
            let groups =
                operation.product(&[outputs.next_multiple_of(PANEL) / 8, (inputs / UNIT).div_ceil(4)])?;
            let arguments = [
                packed.output(),
                codes.input(),
                Argument::U32(operation.u32("outputs", outputs)?),
                Argument::U32(operation.u32("inputs", inputs)?),
            ];
            let grid = [operation.blocks(groups, PACKED_WARPS)?, 1, 1];
            let kernel = &kernels::gemm_pack;
            codes.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })?;
        } else {
            packed.copy_from(codes, len.div_ceil(2), 0)?;
        }
        Ok(Matrix::new(outputs, inputs, Values::Nf4 { block, packed, absmax }))
    }

    /// Bytes of `packed` for [`Matrix::nf4`]: half a byte an element, with the outputs rounded up to a multiple of 32.
    pub fn packed_bytes(outputs: usize, inputs: usize, block: usize) -> usize {
        let rows = if in_units(inputs, block.max(1)) { outputs.next_multiple_of(PANEL) } else { outputs };
        rows.saturating_mul(inputs).div_ceil(2)
    }

    /// Outputs and inputs.
    pub fn shape(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    fn len(&self) -> usize {
        self.outputs * self.inputs
    }

    /// Its elements; NF4 is in units where it [`Matrix::fuses`], else row-major.
    pub(crate) fn values(&self) -> &Values {
        &self.values
    }

    /// Whether the kernels can dequantise it on its way.
    pub(crate) fn fuses(&self) -> bool {
        matches!(self.values, Values::Nf4 { block, .. } if in_units(self.inputs, block))
    }
}

/// `out` = a weight in NF4 as bf16, row-major.
fn unpack(
    operation: Operation,
    (outputs, inputs): (usize, usize),
    block: usize,
    packed: &Buffer<u8>,
    absmax: &Absmax,
    out: &mut Buffer<bf16>,
) -> Result<(), Error> {
    let len = outputs * inputs;
    if !in_units(inputs, block) {
        return dequantize(len, block, packed, absmax, out);
    }
    let (raw, within) = absmax.raw(operation, len / block)?;
    let groups = operation.product(&[outputs.div_ceil(4), inputs.div_ceil(64)])?;
    if groups == 0 {
        return Ok(());
    }
    let arguments = [
        out.output(),
        packed.input(),
        Argument::Struct(bytemuck::bytes_of(&raw)),
        Argument::U32(block.trailing_zeros()),
        Argument::U32(operation.u32("outputs", outputs)?),
        Argument::U32(operation.u32("inputs", inputs)?),
    ];
    let grid = [operation.blocks(groups, PACKED_WARPS)?, 1, 1];
    let kernel = &kernels::gemm_unpack;
    out.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &within })
}

/// Elements of [`Scratch`] that a group of weights `(outputs, inputs)` needs when it is dequantised: those of all of them at
/// a time. With the elements of all groups of a decoder layer, what a layer's recomputation has dequantised is still
/// there for its input gradients; with those of the largest group it is dequantised again.
pub fn scratch_elements(group: &[(usize, usize)]) -> usize {
    group
        .iter()
        .map(|&(outputs, inputs)| place(outputs.saturating_mul(inputs)))
        .fold(0, usize::saturating_add)
}

/// Elements of [`Scratch`] that products of `m` rows with a group of weights in NF4 need: [`scratch_elements`], or none where
/// the kernels dequantise on their way. `block` is the number of elements that share a scale.
pub fn scratch_needed(device: &Device, m: usize, block: usize, group: &[(usize, usize)]) -> usize {
    // Rows of dY that do not begin at multiples of 16 bytes are for the general kernel.
    let units = group.iter().all(|&(outputs, inputs)| in_units(inputs, block) && outputs.is_multiple_of(8));
    let fused = |table: &'static [Row]| of_table(device, table, m).is_some_and(is_fused);
    let tables: [&'static [Row]; 4] = [&FORWARD_NF4, &FORWARD_NF4_LORA, &GRADIENT_NF4, &GRADIENT_NF4_LORA];
    if units && tables.into_iter().all(fused) { 0 } else { scratch_elements(group) }
}

impl Matrix {
    /// What [`scratch_needed`] is asked about this matrix: nothing for a dense one.
    pub fn block(&self) -> Option<usize> {
        match self.values {
            Values::Dense(_) => None,
            Values::Nf4 { block, .. } => Some(block),
        }
    }
}

impl Scratch {
    /// Elements of its memory.
    pub fn elements(&self) -> usize {
        self.buffer.len()
    }
}

fn place(elements: usize) -> usize {
    elements.checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX)
}

/// Memory for dequantised weights, which remembers what it holds.
///
/// A weight is frozen and its identity is never given to another one, so a copy stays right until its memory is used
/// again; then all of them are forgotten.
#[derive(Debug)]
pub struct Scratch {
    buffer: Buffer<bf16>,
    /// Identity and first element of every copy.
    held: Vec<(u64, usize)>,
    /// Where the next one goes.
    next: usize,
}

impl Scratch {
    /// With the memory of a plan; see [`scratch_elements`]. Of no elements when no weight is in NF4.
    pub fn new(buffer: Buffer<bf16>) -> Scratch {
        Scratch { buffer, held: Vec::new(), next: 0 }
    }

    fn find(&self, matrix: &Matrix) -> Option<usize> {
        self.held.iter().find(|(identity, _)| *identity == matrix.identity).map(|&(_, start)| start)
    }

    /// The values of all of these in bf16: of dense ones their own, of the others copies, which stay until the next call.
    fn dense(&mut self, operation: Operation, matrices: &[&Matrix]) -> Result<Vec<Buffer<bf16>>, Error> {
        let quantized = || matrices.iter().filter(|matrix| matches!(matrix.values, Values::Nf4 { .. }));
        let missing =
            quantized().filter(|matrix| self.find(matrix).is_none()).map(|matrix| place(matrix.len()));
        if self.next + missing.sum::<usize>() > self.buffer.len() {
            self.held.clear();
            self.next = 0;
            let needed: usize = quantized().map(|matrix| place(matrix.len())).sum();
            if needed > self.buffer.len() {
                return Err(operation.error(format!(
                    "the scratch has {} elements, dequantising these weights needs {needed}",
                    self.buffer.len()
                )));
            }
        }
        let mut values = Vec::with_capacity(matrices.len());
        for matrix in matrices {
            let buffer = match &matrix.values {
                Values::Dense(own) => own.slice(0, matrix.len())?,
                Values::Nf4 { block, packed, absmax } => match self.find(matrix) {
                    Some(start) => self.buffer.slice(start, matrix.len())?,
                    None => {
                        let mut copy = self.buffer.slice(self.next, matrix.len())?;
                        unpack(operation, matrix.shape(), *block, packed, absmax, &mut copy)?;
                        self.held.push((matrix.identity, self.next));
                        self.next += place(matrix.len());
                        copy
                    }
                },
            };
            values.push(buffer);
        }
        Ok(values)
    }
}

/// The adapter of a layer on its way forward.
#[derive(Debug)]
pub struct Lora<'a> {
    /// A, `[rank, inputs]`.
    pub a: &'a Buffer<bf16>,
    /// B, `[outputs, rank]`.
    pub b: &'a Buffer<bf16>,
    /// r
    pub rank: usize,
    /// alpha/r or alpha/√r.
    pub scale: f32,
    /// U = bf16(scale·X·Aᵀ), `[m, rank]`, `=`.
    pub down: &'a mut Buffer<bf16>,
    /// X after dropout, `[m, inputs]`, when U is made of it.
    pub input: Option<&'a Buffer<bf16>>,
}

/// One layer of a group.
#[derive(Debug)]
pub struct Forward<'a> {
    /// W
    pub weight: &'a Matrix,
    /// `[outputs]`
    pub bias: Option<&'a Buffer<f32>>,
    /// The adapter.
    pub lora: Option<Lora<'a>>,
    /// Y, `[m, outputs]`, `=`; `None` makes U only.
    pub y: Option<&'a mut Buffer<bf16>>,
}

/// The mask of a dropout (`ops::dropout`).
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    /// The sequences of the rows.
    pub sequences: &'a Sequences,
    /// p
    pub probability: f64,
    /// Tells the layers apart.
    pub module: u32,
}

/// The adapter of a layer on its way back.
#[derive(Debug)]
pub struct LoraBackward<'a> {
    /// A, `[rank, inputs]`.
    pub a: &'a Buffer<bf16>,
    /// B, `[outputs, rank]`.
    pub b: &'a Buffer<bf16>,
    /// r
    pub rank: usize,
    /// alpha/r or alpha/√r.
    pub scale: f32,
    /// G = bf16(scale·dY·B), `[m, rank]`, `=`.
    pub gradient: &'a mut Buffer<bf16>,
    /// The dropout that X went through on its way into A.
    pub dropout: Option<Mask<'a>>,
}

/// The backward half of a [`Forward`].
#[derive(Debug)]
pub struct Backward<'a> {
    /// W
    pub weight: &'a Matrix,
    /// dY, `[m, outputs]`.
    pub dy: &'a Buffer<bf16>,
    /// The adapter.
    pub lora: Option<LoraBackward<'a>>,
}

/// For each part: U = bf16(scale·X·Aᵀ) and Y = bf16(X·Wᵀ + U·Bᵀ + bias), X `[m, inputs]`; sums in fp32. `scratch` is used for
/// weights in NF4 only.
///
/// # Errors
/// When a buffer is shorter than its shape, the parts are more than [`MOST_PARTS`] or have other inputs, or the scratch is
/// too small.
pub fn forward(
    m: usize,
    inputs: usize,
    x: &Buffer<bf16>,
    parts: &mut [Forward<'_>],
    scratch: &mut Scratch,
) -> Result<(), Error> {
    forward_with(None, m, inputs, x, parts, scratch)
}

/// dX = bf16(Σ over the parts of dY·W, then Σ of mask(G·A)) with G = bf16(scale·dY·B), `[m, inputs]`, `=`; sums in fp32, and one
/// rounding for the whole group. Without `dx`, the G's only.
///
/// # Errors
/// As [`forward`]; and when there are no parts, or masks of different sequences.
pub fn input_gradient(
    m: usize,
    inputs: usize,
    parts: &mut [Backward<'_>],
    dx: Option<&mut Buffer<bf16>>,
    scratch: &mut Scratch,
) -> Result<(), Error> {
    input_gradient_with(None, m, inputs, parts, dx, scratch)
}

const DERIVED_SMALL: Provenance = Provenance::Derived {
    from: "up to 32 rows a product reads W and computes next to nothing: the fewest rows that fill an mma twice",
};
const DERIVED_MEDIUM: Provenance = Provenance::Derived {
    from: "16 SMs: with 128 × 128, 256 rows of 1024 outputs are 16 blocks of the 32 that fit; with 64 × 64 they are 64 of 64",
};
const DERIVED_LARGE: Provenance = Provenance::Derived {
    from: "an SM of sm_87 does 1024 multiply-adds a clock: a tile of 128 × 128 × 32 takes 512 clocks and 384 of shared memory, \
           one of 64 × 64 half as many clocks for each byte",
};
const DERIVED_FUSED: Provenance = Provenance::Derived {
    from: "M* = 2.516·F/(2·0.8·BW)·e/(1−e) of the roofline, with e = 0.8 for the fused kernel against the plain one: 980 rows \
           on an Orin in MAXN; below it reading 0.5 bytes an element beats writing and reading 2 more",
};

const fn row(up_to: usize, tile_m: usize, tile_n: usize, kernel: &'static Kernel, from: Provenance) -> Row {
    Row { sm: None, up_to, tile_m, tile_n, kernel, provenance: from }
}
const ALL: usize = usize::MAX;

/// X·Wᵀ of a dense weight, or a dequantised one.
pub static FORWARD: [Row; 3] = [
    row(32, 32, 64, &kernels::gemm_nt_32x64, DERIVED_SMALL),
    row(256, 64, 64, &kernels::gemm_nt_64x64, DERIVED_MEDIUM),
    row(ALL, 128, 128, &kernels::gemm_nt_128x128, DERIVED_LARGE),
];
/// X·Wᵀ of a weight in NF4; the last row dequantises it first.
pub static FORWARD_NF4: [Row; 4] = [
    row(32, 32, 64, &kernels::gemm_nf4_nt_32x64, DERIVED_SMALL),
    row(256, 64, 64, &kernels::gemm_nf4_nt_64x64, DERIVED_MEDIUM),
    row(1024, 128, 128, &kernels::gemm_nf4_nt_128x128, DERIVED_FUSED),
    row(ALL, 128, 128, &kernels::gemm_nt_128x128, DERIVED_FUSED),
];
/// dY·W of a dense weight, or a dequantised one.
pub static GRADIENT: [Row; 3] = [
    row(32, 32, 64, &kernels::gemm_nn_32x64, DERIVED_SMALL),
    row(256, 64, 64, &kernels::gemm_nn_64x64, DERIVED_MEDIUM),
    row(ALL, 128, 128, &kernels::gemm_nn_128x128, DERIVED_LARGE),
];
/// dY·W of a weight in NF4; the last row dequantises it first.
pub static GRADIENT_NF4: [Row; 4] = [
    row(32, 32, 64, &kernels::gemm_nf4_nn_32x64, DERIVED_SMALL),
    row(256, 64, 64, &kernels::gemm_nf4_nn_64x64, DERIVED_MEDIUM),
    row(1024, 128, 128, &kernels::gemm_nf4_nn_128x128, DERIVED_FUSED),
    row(ALL, 128, 128, &kernels::gemm_nn_128x128, DERIVED_FUSED),
];
/// [`FORWARD`] with the down products beside it.
pub static FORWARD_LORA: [Row; 3] = [
    row(32, 32, 64, &kernels::gemm_nt_lora_32x64, DERIVED_SMALL),
    row(256, 64, 64, &kernels::gemm_nt_lora_64x64, DERIVED_MEDIUM),
    row(ALL, 128, 128, &kernels::gemm_nt_lora_128x128, DERIVED_LARGE),
];
/// [`FORWARD_NF4`] with the down products beside it.
pub static FORWARD_NF4_LORA: [Row; 4] = [
    row(32, 32, 64, &kernels::gemm_nf4_nt_lora_32x64, DERIVED_SMALL),
    row(256, 64, 64, &kernels::gemm_nf4_nt_lora_64x64, DERIVED_MEDIUM),
    row(1024, 128, 128, &kernels::gemm_nf4_nt_lora_128x128, DERIVED_FUSED),
    row(ALL, 128, 128, &kernels::gemm_nt_lora_128x128, DERIVED_FUSED),
];
/// [`GRADIENT`] with the down products beside it.
pub static GRADIENT_LORA: [Row; 3] = [
    row(32, 32, 64, &kernels::gemm_nn_lora_32x64, DERIVED_SMALL),
    row(256, 64, 64, &kernels::gemm_nn_lora_64x64, DERIVED_MEDIUM),
    row(ALL, 128, 128, &kernels::gemm_nn_lora_128x128, DERIVED_LARGE),
];
/// [`GRADIENT_NF4`] with the down products beside it.
pub static GRADIENT_NF4_LORA: [Row; 4] = [
    row(32, 32, 64, &kernels::gemm_nf4_nn_lora_32x64, DERIVED_SMALL),
    row(256, 64, 64, &kernels::gemm_nf4_nn_lora_64x64, DERIVED_MEDIUM),
    row(1024, 128, 128, &kernels::gemm_nf4_nn_lora_128x128, DERIVED_FUSED),
    row(ALL, 128, 128, &kernels::gemm_nn_lora_128x128, DERIVED_FUSED),
];

/// A place for the down products: beside the main product, for groups of up to so many rows and columns.
struct Beside {
    rows: usize,
    columns: usize,
    #[allow(dead_code)] // for whoever reads the table
    provenance: Provenance,
}

/// When the down products are made beside the main one; otherwise by a launch of their own.
static BESIDE: [Beside; 2] = [
    Beside {
        rows: 64,
        columns: ALL,
        provenance: Provenance::Derived {
            from: "the main product waits for W; a launch of its own would take 64 dependent tiles of some 0.1 µs for 2048 inputs",
        },
    },
    Beside {
        rows: ALL,
        columns: 1536,
        provenance: Provenance::Derived {
            from: "16 columns beside 128 are 12.5 % of the main product in every block; reading X once more is 188/columns of it \
                   (32 TFLOP/s, 170 GB/s: 75 % and 83 % of an Orin in MAXN)",
        },
    },
];

/// Rank that the kernels with the down products beside them have room for (`WIDTH` in `gemm.cuh`).
const WIDTH: usize = 16;

fn is_beside(row: &Row) -> bool {
    row.kernel.name.contains("_lora_")
}

/// h·Wᵀ in fp32.
pub static LOGITS: [Row; 2] = [
    row(32, 32, 64, &kernels::gemm_nt_f32_32x64, DERIVED_SMALL),
    row(ALL, 128, 128, &kernels::gemm_nt_f32_128x128, DERIVED_LARGE),
];
const DERIVED_NARROW: Provenance = Provenance::Derived {
    from: "r columns: bound by reading X; 7 tiles of 64 rows in flight are 28 KiB a block, and 204.8 GB/s times 0.8 µs are \
           10 KiB for each of 16 SMs",
};
static DOWN: Row = row(ALL, 64, 16, &kernels::gemm_nt_64x16, DERIVED_NARROW);
static DOWN_GRADIENT: Row = row(ALL, 64, 16, &kernels::gemm_nn_64x16, DERIVED_NARROW);
const GENERAL: Provenance =
    Provenance::Derived { from: "takes every shape, and no other kernel takes these" };
/// For rows that do not begin at multiples of 16 bytes.
pub static FORWARD_GENERAL: Row = row(ALL, 64, 64, &kernels::gemm_nt_general, GENERAL);
/// The same for dY·W.
pub static GRADIENT_GENERAL: Row = row(ALL, 64, 64, &kernels::gemm_nn_general, GENERAL);
/// The same for logits.
pub static LOGITS_GENERAL: Row = row(ALL, 64, 64, &kernels::gemm_nt_f32_general, GENERAL);
static NARROW_GENERAL: Row = row(ALL, 64, 64, &kernels::gemm_nn_narrow_general, GENERAL);

/// Whether the kernel of a row dequantises on its way.
fn is_fused(row: &Row) -> bool {
    row.kernel.file == "gemm_nf4.cu"
}

/// `Part` of `gemm.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct RawPart {
    left: u64,
    right: u64,
    packed: u64,
    absmax: RawAbsmax,
    bias: u64,
    down: u64,
    up: u64,
    narrow: u64,
    made: u64,
    out: u64,
    threshold: u64,
    left_stride: u32,
    depth: u32,
    columns: u32,
    rank: u32,
    out_stride: u32,
    block_shift: u32,
    first_tile: u32,
    first_step: u32,
    row_blocks: u32,
    module: u32,
    scale: f32,
    keep: f32,
    made_scale: f32,
    padding: u32,
}

/// `Group` of `gemm.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct RawGroup {
    parts: [RawPart; MOST_PARTS],
    offsets: u64,
    keys: u64,
    sequences: u32,
    count: u32,
    m: u32,
    n_tiles: u32,
    steps: u32,
    padding: u32,
}

/// A launch that is being put together.
struct Product {
    operation: Operation,
    group: RawGroup,
    within: Vec<Argument<'static>>,
}

fn address(argument: Argument<'static>) -> u64 {
    match argument {
        Argument::In(Address(address), _) | Argument::Out(Address(address), _) => address,
        _ => 0,
    }
}

impl Product {
    fn new(operation: Operation, m: usize) -> Result<Product, Error> {
        let group = RawGroup { m: operation.u32("m", m)?, ..RawGroup::default() };
        Ok(Product { operation, group, within: Vec::with_capacity(16) })
    }

    /// Notes a buffer; gives its address.
    fn pass(&mut self, argument: Argument<'static>) -> u64 {
        self.within.push(argument);
        address(argument)
    }

    /// Adds a part; the buffers are passed already.
    fn part(&mut self) -> &mut RawPart {
        self.group.count += 1;
        let part = &mut self.group.parts[self.group.count as usize - 1];
        part.scale = 1.0;
        part
    }

    /// Launches what was put together, if it is anything. `sum`: the parts are summed, and the columns are those of one.
    fn launch(mut self, device: &Device, row: &Row, sum: bool) -> Result<(), Error> {
        let tiles = |part: &RawPart| part.columns.div_ceil(row.tile_n as u32);
        let (count, mut n_tiles, mut steps) = (self.group.count as usize, 0u32, 0u32);
        for (i, part) in self.group.parts.iter_mut().enumerate() {
            (part.first_tile, part.first_step) = if sum { (0, steps) } else { (n_tiles, 0) };
            if i >= count {
                (part.first_tile, part.first_step) = (u32::MAX, u32::MAX);
                continue;
            }
            steps += part.depth.div_ceil(DEPTH);
            n_tiles = if sum { tiles(part) } else { n_tiles + tiles(part) };
        }
        self.group.steps = steps;
        let m_tiles = (self.group.m as usize).div_ceil(row.tile_m);
        if n_tiles == 0 || m_tiles == 0 {
            return Ok(());
        }
        self.group.n_tiles = n_tiles;
        let blocks = self.operation.product(&[m_tiles, n_tiles as usize])?;
        let arguments = [Argument::Struct(bytemuck::bytes_of(&self.group))];
        device.launch(&Launch {
            kernel: row.kernel,
            grid: [self.operation.blocks(blocks, 1)?, 1, 1],
            shared: row.kernel.dynamic_shared,
            arguments: &arguments,
            within: &self.within,
        })
    }
}

/// A weight as an operand: where it lies, as the chosen kernel reads it.
enum Operand<'a> {
    Dense(Buffer<bf16>),
    Packed { block: usize, packed: &'a Buffer<u8>, absmax: &'a Absmax },
}

/// The weights of a group for a kernel.
fn operands<'a>(
    operation: Operation,
    row: &Row,
    matrices: &[&'a Matrix],
    scratch: &mut Scratch,
) -> Result<Vec<Operand<'a>>, Error> {
    if !is_fused(row) {
        return Ok(scratch.dense(operation, matrices)?.into_iter().map(Operand::Dense).collect());
    }
    matrices
        .iter()
        .map(|matrix| match &matrix.values {
            Values::Nf4 { block, packed, absmax } if in_units(matrix.inputs, *block) => {
                Ok(Operand::Packed { block: *block, packed, absmax })
            }
            _ => Err(operation.error(format!("{} takes weights in NF4 only", row.kernel.name))),
        })
        .collect()
}

impl Product {
    /// Sets the adapter of a part: `up` comes after `down`, which was made of `narrow`, or is made beside the product.
    fn adapter(
        &mut self,
        row: &Row,
        part: &mut RawPart,
        up: &Buffer<bf16>,
        narrow: &Buffer<bf16>,
        down: &mut Buffer<bf16>,
        rank: usize,
        scale: f32,
    ) -> Result<(), Error> {
        part.rank = self.operation.u32("rank", rank)?;
        part.up = self.pass(up.input());
        if is_beside(row) {
            (part.narrow, part.made) = (self.pass(narrow.input()), self.pass(down.output()));
            part.made_scale = scale;
        } else {
            part.down = self.pass(down.input());
        }
        Ok(())
    }

    /// Sets the right operand of the part that was added last.
    fn right(&mut self, matrix: &Matrix, operand: &Operand<'_>) -> Result<(), Error> {
        let at = self.group.count as usize - 1;
        match operand {
            Operand::Dense(values) => self.group.parts[at].right = self.pass(values.input()),
            Operand::Packed { block, packed, absmax } => {
                let (raw, within) = absmax.raw(self.operation, matrix.len() / block)?;
                self.within.extend(within);
                let packed = self.pass(packed.input());
                let row_blocks = self.operation.u32("blocks of a row", matrix.inputs / block)?;
                let part = &mut self.group.parts[at];
                (part.absmax, part.packed) = (raw, packed);
                (part.block_shift, part.row_blocks) = (block.trailing_zeros(), row_blocks);
            }
        }
        Ok(())
    }
}

/// The row for a product: that of the table, or the general one where rows do not begin at multiples of 16 bytes.
fn choose(
    device: &Device,
    asked: Option<&'static Row>,
    table: &'static [Row],
    general: &'static Row,
    aligned: bool,
    m: usize,
    columns: usize,
) -> &'static Row {
    match asked {
        _ if !aligned => general,
        Some(row) => row,
        None => of_table(device, table, m)
            .map_or(general, |row| filling(device.properties().multiprocessors, table, row, m, columns)),
    }
}

/// The row of a table for `m` rows: as measured on this device, else as the program has it.
fn of_table(device: &Device, table: &'static [Row], m: usize) -> Option<&'static Row> {
    device.tuned().instead_of(table, m).or_else(|| select(table, device.properties(), m))
}

/// The row, or one with smaller tiles where its blocks would leave multiprocessors idle: the largest tile that gives each a
/// block, else the one that gives the most of them one. Whether it dequantises on its way stays as it was.
fn filling(
    multiprocessors: u32,
    table: &'static [Row],
    row: &'static Row,
    m: usize,
    columns: usize,
) -> &'static Row {
    let blocks = |row: &Row| m.div_ceil(row.tile_m) * columns.div_ceil(row.tile_n);
    let enough = multiprocessors as usize;
    if blocks(row) >= enough {
        return row;
    }
    let others = || table.iter().filter(|other| is_fused(other) == is_fused(row) && other.sm == row.sm);
    let area = |row: &&Row| row.tile_m * row.tile_n;
    let filled = others().filter(|other| blocks(other) >= enough).max_by_key(area);
    filled.or_else(|| others().max_by_key(|other| (blocks(other), area(other)))).unwrap_or(row)
}

/// What decides between the tables of a product with LoRA.
struct Adapters {
    /// Whether there are any, and the kernels have room for them all. (A weight of no elements has no tile to be beside.)
    fit: bool,
    m: usize,
    columns: usize,
}

impl Adapters {
    /// Whether the down products are to be made beside the main one.
    fn beside(&self) -> bool {
        self.fit && BESIDE.iter().any(|place| self.m <= place.rows && self.columns <= place.columns)
    }

    /// Refuses a row that was asked for and has no room.
    fn check(&self, operation: Operation, row: &Row) -> Result<(), Error> {
        if is_beside(row) && !self.fit {
            let what =
                format!("{} takes adapters of up to rank {WIDTH} on the input itself", row.kernel.name);
            return Err(operation.error(what));
        }
        Ok(())
    }
}

/// One of the four tables of a product.
fn table_for(tables: [&'static [Row]; 4], matrices: &[&Matrix], beside: bool) -> &'static [Row] {
    let [dense, dense_lora, nf4, nf4_lora] = tables;
    match (matrices.iter().all(|matrix| matrix.fuses()), beside) {
        (false, false) => dense,
        (false, true) => dense_lora,
        (true, false) => nf4,
        (true, true) => nf4_lora,
    }
}

fn check_parts(operation: Operation, count: usize) -> Result<(), Error> {
    if count > MOST_PARTS {
        return Err(operation.error(format!("{count} layers in a group, more than {MOST_PARTS}")));
    }
    Ok(())
}

fn check_weight(operation: Operation, weight: &Matrix, inputs: usize) -> Result<(), Error> {
    if weight.inputs != inputs {
        let what = format!("a weight of {} inputs in a group of {inputs}", weight.inputs);
        return Err(operation.error(what));
    }
    Ok(())
}

fn check_rank(operation: Operation, rank: usize) -> Result<(), Error> {
    if rank == 0 {
        return Err(operation.error("a LoRA of rank 0"));
    }
    Ok(())
}

/// [`forward`] by the kernel of a row, for tests.
#[doc(hidden)]
pub fn forward_with(
    row: Option<&'static Row>,
    m: usize,
    inputs: usize,
    x: &Buffer<bf16>,
    parts: &mut [Forward<'_>],
    scratch: &mut Scratch,
) -> Result<(), Error> {
    let operation = Operation("linear");
    check_parts(operation, parts.len())?;
    operation.has("x", x, operation.product(&[m, inputs])?)?;
    for part in parts.iter() {
        let outputs = part.weight.outputs;
        check_weight(operation, part.weight, inputs)?;
        if let Some(bias) = part.bias {
            operation.has("bias", bias, outputs)?;
        }
        if let Some(lora) = &part.lora {
            check_rank(operation, lora.rank)?;
            operation.has("a", lora.a, operation.product(&[lora.rank, inputs])?)?;
            operation.has("b", lora.b, operation.product(&[outputs, lora.rank])?)?;
            operation.has("down", lora.down, operation.product(&[m, lora.rank])?)?;
            if let Some(input) = lora.input {
                operation.has("input of the LoRA", input, m * inputs)?;
            }
        }
        if let Some(y) = &part.y {
            operation.has("y", y, operation.product(&[m, outputs])?)?;
        }
    }
    if m == 0 {
        return Ok(());
    }
    let device = x.device();
    let aligned = inputs.is_multiple_of(8);
    let wanted: Vec<usize> = (0..parts.len()).filter(|&i| parts[i].y.is_some()).collect();
    let matrices: Vec<&Matrix> = wanted.iter().map(|&i| parts[i].weight).collect();
    let loras = || wanted.iter().filter_map(|&i| parts[i].lora.as_ref());
    let adapters = Adapters {
        fit: loras().next().is_some()
            && loras().all(|lora| lora.rank <= WIDTH && lora.input.is_none())
            && matrices.iter().all(|matrix| matrix.len() > 0),
        m,
        columns: matrices.iter().map(|matrix| matrix.outputs).sum(),
    };
    let tables = [&FORWARD[..], &FORWARD_LORA, &FORWARD_NF4, &FORWARD_NF4_LORA];
    let table = table_for(tables, &matrices, adapters.beside());
    let columns = matrices.iter().map(|matrix| matrix.outputs).sum();
    let row = choose(device, row, table, &FORWARD_GENERAL, aligned, m, columns);
    adapters.check(operation, row)?;
    let operands = operands(operation, row, &matrices, scratch)?;

    let mut narrow = Product::new(operation, m)?;
    for part in parts.iter_mut() {
        let Some(lora) = part.lora.as_mut() else { continue };
        if is_beside(row) && part.y.is_some() {
            continue;
        }
        let left = narrow.pass(lora.input.unwrap_or(x).input());
        let (right, out) = (narrow.pass(lora.a.input()), narrow.pass(lora.down.output()));
        let (depth, rank) = (operation.u32("inputs", inputs)?, operation.u32("rank", lora.rank)?);
        *narrow.part() = RawPart {
            left,
            right,
            out,
            left_stride: depth,
            depth,
            columns: rank,
            out_stride: rank,
            scale: lora.scale,
            ..RawPart::default()
        };
    }
    narrow.launch(device, if aligned { &DOWN } else { &FORWARD_GENERAL }, false)?;
    if wanted.is_empty() {
        return Ok(());
    }
    let mut product = Product::new(operation, m)?;
    let x = product.pass(x.input());
    for (&i, operand) in wanted.iter().zip(&operands) {
        let part = &mut parts[i];
        let (depth, columns) =
            (operation.u32("inputs", inputs)?, operation.u32("outputs", part.weight.outputs)?);
        let mut raw = RawPart { left: x, left_stride: depth, depth, columns, ..RawPart::default() };
        (raw.scale, raw.out_stride) = (1.0, columns);
        if let Some(bias) = part.bias {
            raw.bias = product.pass(bias.input());
        }
        if let Some(lora) = &mut part.lora {
            product.adapter(row, &mut raw, lora.b, lora.a, lora.down, lora.rank, lora.scale)?;
        }
        if let Some(y) = part.y.as_deref_mut() {
            raw.out = product.pass(y.output());
        }
        *product.part() = raw;
        product.right(part.weight, operand)?;
    }
    product.launch(device, row, false)
}

/// [`input_gradient`] by the kernel of a row, for tests.
#[doc(hidden)]
pub fn input_gradient_with(
    row: Option<&'static Row>,
    m: usize,
    inputs: usize,
    parts: &mut [Backward<'_>],
    dx: Option<&mut Buffer<bf16>>,
    scratch: &mut Scratch,
) -> Result<(), Error> {
    let operation = Operation("input gradient");
    check_parts(operation, parts.len())?;
    let mut masked: Option<&Sequences> = None;
    for part in parts.iter() {
        let outputs = part.weight.outputs;
        check_weight(operation, part.weight, inputs)?;
        operation.has("dy", part.dy, operation.product(&[m, outputs])?)?;
        if let Some(lora) = &part.lora {
            check_rank(operation, lora.rank)?;
            operation.has("a", lora.a, operation.product(&[lora.rank, inputs])?)?;
            operation.has("b", lora.b, operation.product(&[outputs, lora.rank])?)?;
            operation.has("gradient of the LoRA", lora.gradient, operation.product(&[m, lora.rank])?)?;
            if let Some(mask) = &lora.dropout {
                check_mask(operation, mask, m)?;
                if masked.is_some_and(|other| !std::ptr::eq(other, mask.sequences)) {
                    return Err(operation.error("masks of different sequences in one group"));
                }
                masked = Some(mask.sequences);
            }
        }
    }
    let Some(device) = parts.first().map(|part| part.dy.device().clone()) else {
        return Err(operation.error("a group of no layers has no gradient"));
    };

    if let Some(dx) = &dx {
        operation.has("dx", dx, operation.product(&[m, inputs])?)?;
    }
    if m == 0 {
        return Ok(());
    }
    let matrices: Vec<&Matrix> = parts.iter().map(|part| part.weight).collect();
    let outputs_aligned = matrices.iter().all(|matrix| matrix.outputs.is_multiple_of(8));
    let ranks = || parts.iter().filter_map(|part| part.lora.as_ref()).map(|lora| lora.rank);
    let ranks_aligned = ranks().all(|rank| rank.is_multiple_of(8));
    let adapters = Adapters {
        fit: ranks().next().is_some()
            && ranks_aligned
            && ranks().all(|rank| rank <= WIDTH)
            && matrices.iter().all(|matrix| matrix.len() > 0),
        m,
        columns: inputs,
    };
    let tables = [&GRADIENT[..], &GRADIENT_LORA, &GRADIENT_NF4, &GRADIENT_NF4_LORA];
    let table = table_for(tables, &matrices, adapters.beside());
    let aligned = outputs_aligned && inputs.is_multiple_of(8);
    let row = choose(&device, row, table, &GRADIENT_GENERAL, aligned, m, inputs);
    adapters.check(operation, row)?;
    let operands = dx.as_ref().map(|_| operands(operation, row, &matrices, scratch)).transpose()?;

    if !is_beside(row) || dx.is_none() {
        let mut narrow = Product::new(operation, m)?;
        for part in parts.iter_mut() {
            let Some(lora) = part.lora.as_mut() else { continue };
            let (left, right) = (narrow.pass(part.dy.input()), narrow.pass(lora.b.input()));
            let out = narrow.pass(lora.gradient.output());
            let (depth, rank) =
                (operation.u32("outputs", part.weight.outputs)?, operation.u32("rank", lora.rank)?);
            *narrow.part() = RawPart {
                left,
                right,
                out,
                left_stride: depth,
                depth,
                columns: rank,
                out_stride: rank,
                scale: lora.scale,
                ..RawPart::default()
            };
        }
        let tiled = outputs_aligned && ranks_aligned;
        narrow.launch(&device, if tiled { &DOWN_GRADIENT } else { &NARROW_GENERAL }, false)?;
    }

    let (Some(dx), Some(operands)) = (dx, operands) else { return Ok(()) };
    let mut product = Product::new(operation, m)?;
    let dx = product.pass(dx.output());
    for (part, operand) in parts.iter_mut().zip(&operands) {
        let (depth, columns) =
            (operation.u32("outputs", part.weight.outputs)?, operation.u32("inputs", inputs)?);
        let left = product.pass(part.dy.input());
        let mut raw = RawPart { left, left_stride: depth, depth, columns, out: dx, ..RawPart::default() };
        (raw.scale, raw.out_stride) = (1.0, columns);
        if let Some(lora) = &mut part.lora {
            product.adapter(row, &mut raw, lora.a, lora.b, lora.gradient, lora.rank, lora.scale)?;
            if let Some(mask) = &lora.dropout {
                raw.threshold = (mask.probability * 4_294_967_296.0) as u64;
                raw.keep = (1.0 / (1.0 - mask.probability)) as f32;
                raw.module = mask.module;
            }
        }
        *product.part() = raw;
        product.right(part.weight, operand)?;
    }
    if let Some(sequences) = masked {
        product.group.offsets = product.pass(sequences.offsets.input());
        product.group.keys = product.pass(sequences.keys.input());
        product.group.sequences = operation.u32("sequences", sequences.count)?;
    }
    product.launch(&device, row, true)
}

fn check_mask(operation: Operation, mask: &Mask<'_>, m: usize) -> Result<(), Error> {
    let Mask { sequences, probability, .. } = mask;
    if !(0.0..1.0).contains(probability) {
        return Err(operation.error(format!("the probability is {probability}, not in [0, 1)")));
    }
    if sequences.tokens != m {
        return Err(operation.error(format!("sequences of {} tokens for {m} rows", sequences.tokens)));
    }
    operation.has("offsets", &sequences.offsets, sequences.count + 1)?;
    operation.has("keys", &sequences.keys, sequences.count)
}

/// out = h·Wᵀ in fp32, h `[m, hidden]`, W `[vocabulary, hidden]`; row r of `out` begins at `r·stride` and its elements from the
/// vocabulary to the stride are left as they are. A head in NF4 is dequantised in `scratch`.
///
/// # Errors
/// As [`forward`]; and when the stride is shorter than the vocabulary.
pub fn logits(
    m: usize,
    hidden: usize,
    h: &Buffer<bf16>,
    head: &Matrix,
    out: &mut Buffer<f32>,
    stride: usize,
    scratch: &mut Scratch,
) -> Result<(), Error> {
    logits_with(None, m, hidden, h, head, out, stride, scratch)
}

/// [`logits`] by the kernel of a row, for tests.
#[doc(hidden)]
pub fn logits_with(
    row: Option<&'static Row>,
    m: usize,
    hidden: usize,
    h: &Buffer<bf16>,
    head: &Matrix,
    out: &mut Buffer<f32>,
    stride: usize,
    scratch: &mut Scratch,
) -> Result<(), Error> {
    let operation = Operation("logits");
    check_weight(operation, head, hidden)?;
    check_stride(operation, head, stride)?;
    operation.has("h", h, operation.product(&[m, hidden])?)?;
    operation.has("out", out, operation.product(&[m, stride])?)?;
    if m == 0 {
        return Ok(());
    }
    let device = h.device();
    let vocabulary = head.outputs;
    let row = choose(device, row, &LOGITS, &LOGITS_GENERAL, hidden.is_multiple_of(8), m, vocabulary);
    let operands = operands(operation, row, &[head], scratch)?;
    let mut product = Product::new(operation, m)?;
    let (left, out) = (product.pass(h.input()), product.pass(out.output()));
    let (depth, columns) = (operation.u32("hidden", hidden)?, operation.u32("vocabulary", head.outputs)?);
    let out_stride = operation.u32("stride", stride)?;
    let raw = RawPart { left, out, left_stride: depth, depth, columns, out_stride, ..RawPart::default() };
    *product.part() = RawPart { scale: 1.0, ..raw };
    product.right(head, &operands[0])?;
    product.launch(device, row, false)
}

/// dh = bf16(d·W), `[m, hidden]`, `=`. d is what [`ops::cross_entropy`](super::cross_entropy::cross_entropy) leaves: row r is
/// bf16 from the byte where row r of the logits began, with zeros from the vocabulary to its next multiple of 8.
///
/// # Errors
/// As [`logits`].
pub fn logits_gradient(
    m: usize,
    hidden: usize,
    d: &Buffer<f32>,
    stride: usize,
    head: &Matrix,
    dh: &mut Buffer<bf16>,
    scratch: &mut Scratch,
) -> Result<(), Error> {
    logits_gradient_with(None, m, hidden, d, stride, head, dh, scratch)
}

/// [`logits_gradient`] by the kernel of a row, for tests.
#[doc(hidden)]
pub fn logits_gradient_with(
    row: Option<&'static Row>,
    m: usize,
    hidden: usize,
    d: &Buffer<f32>,
    stride: usize,
    head: &Matrix,
    dh: &mut Buffer<bf16>,
    scratch: &mut Scratch,
) -> Result<(), Error> {
    let operation = Operation("logits gradient");
    check_weight(operation, head, hidden)?;
    check_stride(operation, head, stride)?;
    operation.has("d", d, operation.product(&[m, stride])?)?;
    operation.has("dh", dh, operation.product(&[m, hidden])?)?;
    if m == 0 {
        return Ok(());
    }
    let device = d.device();
    let aligned = hidden.is_multiple_of(8) && stride.is_multiple_of(4);
    let row = choose(device, row, &GRADIENT, &GRADIENT_GENERAL, aligned, m, hidden);
    let operands = operands(operation, row, &[head], scratch)?;
    let mut product = Product::new(operation, m)?;
    let (left, out) = (product.pass(d.input()), product.pass(dh.output()));
    let (depth, columns) = (operation.u32("vocabulary", head.outputs)?, operation.u32("hidden", hidden)?);
    let left_stride = operation.u32("stride", 2 * stride)?;
    let raw = RawPart { left, out, left_stride, depth, columns, out_stride: columns, ..RawPart::default() };
    *product.part() = RawPart { scale: 1.0, ..raw };
    product.right(head, &operands[0])?;
    product.launch(device, row, true)
}

fn check_stride(operation: Operation, head: &Matrix, stride: usize) -> Result<(), Error> {
    if stride < head.outputs.next_multiple_of(8) {
        return Err(operation.error(format!(
            "rows of {stride} elements for a vocabulary of {}, which takes {}",
            head.outputs,
            head.outputs.next_multiple_of(8)
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiles::complete;

    const TABLES: [&[Row]; 9] = [
        &FORWARD,
        &FORWARD_LORA,
        &FORWARD_NF4,
        &FORWARD_NF4_LORA,
        &GRADIENT,
        &GRADIENT_LORA,
        &GRADIENT_NF4,
        &GRADIENT_NF4_LORA,
        &LOGITS,
    ];

    #[test]
    fn every_table_has_a_row_for_everything() {
        for table in TABLES {
            assert!(complete(table));
        }
    }

    /// A row's tile is that of its kernel, which has it in its name.
    #[test]
    fn tiles_are_those_of_the_kernels() {
        for row in TABLES.into_iter().flatten().chain([&DOWN, &DOWN_GRADIENT]) {
            let tile = format!("_{}x{}", row.tile_m, row.tile_n);
            assert!(row.kernel.name.ends_with(&tile), "{} in a row of {tile}", row.kernel.name);
        }
    }

    #[test]
    fn scratch_is_that_of_all_weights_of_a_group() {
        assert_eq!(scratch_elements(&[]), 0);
        assert_eq!(scratch_elements(&[(1, 1), (64, 64)]), 128 + 4096);
        assert_eq!(scratch_elements(&[(usize::MAX, 2)]), usize::MAX);
    }

    /// Half a byte an element; in the kernels' order with whole panels of 32 outputs.
    #[test]
    fn packed_weights_have_their_bytes() {
        assert_eq!(Matrix::packed_bytes(64, 128, 64), 64 * 128 / 2);
        assert_eq!(Matrix::packed_bytes(33, 128, 64), 64 * 128 / 2);
        assert_eq!(Matrix::packed_bytes(3, 33, 64), 50);
    }

    /// 512 rows of 2,048 columns are 64 blocks of 128 × 128: enough for an Orin, not for 132 multiprocessors.
    #[test]
    fn smaller_tiles_where_multiprocessors_would_idle() {
        let tile = |multiprocessors, m, columns| {
            let row = filling(multiprocessors, &FORWARD, &FORWARD[2], m, columns);
            (row.tile_m, row.tile_n)
        };
        assert_eq!(tile(16, 512, 2048), (128, 128));
        assert_eq!(tile(132, 512, 2048), (64, 64));
        assert_eq!(tile(132, 512, 576), (32, 64), "72 blocks of 64 × 64, 144 of 32 × 64");
        assert_eq!(tile(132, 64, 64), (32, 64), "no tile fills it: the most blocks");
        let fused = filling(132, &FORWARD_NF4, &FORWARD_NF4[2], 512, 2048);
        assert!(is_fused(fused) && fused.tile_m == 64);
        // What is dequantised first stays so.
        assert!(!is_fused(filling(132, &FORWARD_NF4, &FORWARD_NF4[3], 128, 128)));
    }
}
