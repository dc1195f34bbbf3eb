//! The CUDA backend: a thin adapter from [`Backend`] to `finetuned-cuda`, which knows shapes and buffers, not models.
//!
//! | | type |
//! |---|---|
//! | activations and their gradients | bf16 |
//! | adapter: master weights, gradients, moments; weights of norms, biases, log-sums | f32; a bf16 copy of the weights for the products |
//! | base | NF4 codes in the kernels' order, or bf16 |
//! | sums | fp32, or fp64 where the CPU's are |
//!
//! Memory comes from few large allocations, all of it before the second step. Operations are launched on one stream and
//! return before they are done; [`Backend::cross_entropy`] and [`Backend::synchronize`] wait. An error of CUDA ends the
//! process ([`failure`]).

mod batch;
pub mod failure;
mod tensor;
pub mod tiles;

pub use batch::CudaBatch;
pub use tensor::{CudaMatrix, CudaTensor};

use super::{
    Absmax, AdamW, AttentionShape, Backend, Batch, DenseMatrix, DeviceMemory, Dtype, FrozenMatrix, Nf4Matrix,
    Projection, ProjectionBackward, Role, StepShape,
};
use batch::{Buffers, Pool, room};
use finetuned_cuda::cubins::Cubins;
use finetuned_cuda::driver::Driver;
use finetuned_cuda::memory::Slabs;
use finetuned_cuda::ops::adapter_gradient::PartShape;
use finetuned_cuda::ops::{
    adamw, adapter_gradient, attention, cached_attention, cross_entropy, dropout, elementwise, linear, nf4,
    rms_norm, rope, rows, small, swiglu,
};
use finetuned_cuda::{Buffer, Device, Element, Error, Properties};
use half::bf16;
use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;
use tensor::{Flat, Parameter, whole};

/// Number of the arithmetic, as `cpu::ARITHMETIC`: raised by hand when a kernel's sums change their order or a formula
/// changes. `cuda_bits_are_those_of_this_arithmetic` in `tests/engine/cuda.rs` fails when the bits change and this does
/// not.
pub const ARITHMETIC: u32 = 1;

/// Memory that is left to everybody else where device memory is the system's: `memory_floor` of the daemon, by default.
const FLOOR: u64 = 1 << 30;

/// Logits that exist at a time: 256 MiB of f32, 512 rows of a vocabulary of 131,072. The head is read twice for each chunk
/// of rows, so chunks of 32 MiB, as the CPU has them, would read it 64 times for 2,048 tokens.
const LOGITS: usize = 64 << 20;

/// Partial sums of squares, and the norm behind them at a place that vectors can be read from.
const SQUARES: usize = adamw::PARTIALS + 32;

/// Rows of a prompt that meet the cache at a time.
const CACHED_ROWS: usize = 64;

/// Layers that share an input: q, k and v.
const GROUP: usize = 3;

/// The CUDA backend.
pub struct Cuda {
    device: Device,
    compilers: String,
    slabs: RefCell<Slabs>,
    scratch: RefCell<Scratch>,
    pool: Pool,
    angles: RefCell<Option<Angles>>,
    /// The longest example that was announced.
    longest: RefCell<usize>,
}

/// Rotary angles of positions below a number.
struct Angles {
    table: rope::Angles,
    frequencies: Vec<f32>,
    magnitude: f32,
}

/// A buffer that is as long as the longest use so far needed it.
struct Grown<T>(Option<Buffer<T>>);

impl<T: Element> Grown<T> {
    fn at_least(&mut self, slabs: &RefCell<Slabs>, len: usize) -> &mut Buffer<T> {
        if self.0.as_ref().is_none_or(|buffer| buffer.len() < len) {
            self.0 = None; // goes back before more is taken
        }
        self.0.get_or_insert_with(|| done(slabs.borrow_mut().buffer(len)))
    }
}

impl<T> Default for Grown<T> {
    fn default() -> Self {
        Grown(None)
    }
}

/// What operations use beside their arguments.
#[derive(Default)]
struct Scratch {
    dequantised: Option<linear::Scratch>,
    partials: Grown<f32>,
    attention: Grown<f32>,
    logits: Grown<f32>,
    losses: Grown<f64>,
    /// G of the layers of a group.
    down: [Grown<bf16>; GROUP],
    /// drop(X) of the layers of a group.
    dropped: [Grown<bf16>; GROUP],
    squares: Grown<f64>,
}

/// Elements of each part of [`Scratch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes {
    dequantised: usize,
    partials: usize,
    attention: usize,
    logits: usize,
    losses: usize,
    down: usize,
    dropped: [usize; GROUP],
}

impl Sizes {
    fn of(device: &Device, s: StepShape) -> Sizes {
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let (h, f) = (s.hidden, s.intermediate);
        // All of a block: what its recomputation has dequantised serves its input gradients, too.
        let block = [(q, h), (kv, h), (kv, h), (h, q), (f, h), (f, h), (h, f)];
        let widest = s.intermediate.max(s.hidden).max(q);
        let dropped = |width| if s.dropout { s.tokens * width } else { 0 };
        // Sequences shorter than the longest make room for no more of them than those.
        let sequences = s.tokens.div_ceil(s.longest.max(1));
        let partials = |inputs, outputs: &[usize]| {
            let part = |&outputs| PartShape { outputs, rank: s.rank, own_input: s.dropout };
            let parts: Vec<PartShape> = outputs.iter().map(part).collect();
            adapter_gradient::scratch_elements(device.properties(), s.tokens, sequences, inputs, &parts)
        };
        let rows = chunk(s.vocabulary).min(s.labelled);
        Sizes {
            dequantised: s.block.map_or(0, |of| linear::scratch_needed(device, s.tokens, of, &block)),
            partials: [partials(h, &[q, kv, kv]), partials(q, &[h]), partials(h, &[f, f]), partials(f, &[h])]
                .into_iter()
                .fold(0, usize::max),
            attention: attention::scratch_elements(s.tokens, s.heads),
            logits: rows * cross_entropy::stride(s.vocabulary),
            losses: s.labelled,
            down: s.tokens * s.rank,
            dropped: [dropped(widest), dropped(s.hidden), dropped(s.hidden)],
        }
    }

    fn bytes(self, tokens: usize) -> u64 {
        let halves = self.dequantised + GROUP * self.down + self.dropped.iter().sum::<usize>();
        let floats = self.partials + self.attention + self.logits;
        (2 * halves + 4 * floats + 8 * self.losses + tokens * Buffers::TOKEN) as u64
    }
}

/// Labelled tokens whose logits exist at a time: a multiple of eight, so that each chunk begins where vectors can be read.
fn chunk(vocabulary: usize) -> usize {
    (LOGITS / vocabulary.max(1)).clamp(16, 512) / 8 * 8
}

/// What an operation returned, or the end of the process.
fn done<T>(result: Result<T, Error>) -> T {
    result.unwrap_or_else(|error| failure::end(&error))
}

impl Cuda {
    /// A backend on the first GPU. `cubins` says where its kernels come from, `tiles` is the file in which `finetuned bench`
    /// leaves what it measured.
    ///
    /// # Errors
    /// What is missing, or what CUDA said.
    pub fn open(cubins: &Cubins, tiles: &Path) -> Result<Cuda, Error> {
        let driver = Driver::open(0, cubins)?;
        let compilers = driver.compilers().join(" ");
        let device = Device::new(driver);
        let (tuned, problems) = tiles::read(tiles, device.properties()).unwrap_or_else(|error| {
            tracing::warn!("{error}");
            Default::default()
        });
        problems.iter().for_each(|problem| tracing::warn!("{}: {problem}", tiles.display()));
        Ok(Cuda::new(device.with_tiles(tuned), &compilers))
    }

    /// A backend on `device`, whose kernels `compilers` made.
    pub fn new(device: Device, compilers: &str) -> Cuda {
        let kept = if device.properties().integrated { FLOOR } else { 0 };
        Cuda {
            slabs: RefCell::new(Slabs::new(&device, kept)),
            device,
            compilers: compilers.to_string(),
            scratch: RefCell::default(),
            pool: Pool::default(),
            angles: RefCell::new(None),
            longest: RefCell::new(0),
        }
    }

    fn buffer<T: Element>(&self, len: usize) -> Buffer<T> {
        done(self.slabs.borrow_mut().buffer(len))
    }

    /// A buffer of zeros.
    fn cleared<T: Element>(&self, len: usize) -> Buffer<T> {
        let mut buffer = self.buffer(len);
        done(buffer.fill(0));
        buffer
    }

    fn upload<T: Element>(&self, values: &[T]) -> Buffer<T> {
        let mut buffer = self.buffer(values.len());
        done(buffer.write(values));
        buffer
    }

    /// Room for at least so many dequantised elements.
    fn room_to_dequantise<'a>(
        &self,
        scratch: &'a mut Option<linear::Scratch>,
        elements: usize,
    ) -> &'a mut linear::Scratch {
        if scratch.as_ref().is_none_or(|scratch| scratch.elements() < elements) {
            *scratch = None; // goes back before more is taken
        }
        scratch.get_or_insert_with(|| linear::Scratch::new(self.buffer(elements)))
    }

    /// Room for what products of `m` rows with a group of weights have to dequantise.
    fn room_for<'a, 'm>(
        &self,
        scratch: &'a mut Option<linear::Scratch>,
        m: usize,
        weights: impl Iterator<Item = &'m CudaMatrix>,
    ) -> &'a mut linear::Scratch {
        let (mut quantised, mut blocks, mut dense) = (Vec::new(), Vec::new(), false);
        for matrix in weights {
            match matrix.weight.block() {
                Some(block) => {
                    quantised.push(matrix.weight.shape());
                    blocks.push(block);
                }
                None => dense = true,
            }
        }
        let needed = match blocks.first() {
            None => 0,
            // A group with a weight that is dense, as some checkpoints have, is dequantised as a whole.
            Some(&first) if dense || blocks.iter().any(|&block| block != first) => {
                linear::scratch_elements(&quantised)
            }
            Some(&block) => linear::scratch_needed(&self.device, m, block, &quantised),
        };
        self.room_to_dequantise(scratch, needed)
    }

    /// Room for a head, which is dequantised where it is quantised at all.
    fn room_for_head<'a>(
        &self,
        scratch: &'a mut Option<linear::Scratch>,
        head: &CudaMatrix,
    ) -> &'a mut linear::Scratch {
        let needed = head.weight.block().map_or(0, |_| linear::scratch_elements(&[head.weight.shape()]));
        self.room_to_dequantise(scratch, needed)
    }

    /// The projections of a few rows.
    fn linear_of_few(
        &self,
        rows: usize,
        inputs: usize,
        x: &Buffer<bf16>,
        projections: &mut [Projection<'_, Self>],
        room: &mut linear::Scratch,
    ) {
        let mut downs: Vec<linear::Forward<'_>> = projections
            .iter_mut()
            .filter_map(|p| {
                let (lora, down) = p.lora.as_ref().zip(p.down.as_deref_mut())?;
                let (a, b, down) = (lora.a.working(), lora.b.working(), down.activation_mut());
                let (rank, scale) = (lora.rank, lora.scale as f32);
                let lora = Some(linear::Lora { a, b, rank, scale, down, input: None });
                Some(linear::Forward { weight: &p.weight.weight, bias: None, lora, y: None })
            })
            .collect();
        done(linear::forward(rows, inputs, x, &mut downs, room));
        drop(downs);
        for p in projections {
            let Some(y) = p.output.as_deref_mut() else { continue };
            let adapter = p.lora.as_ref().zip(p.down.as_deref()).map(|(lora, down)| small::Adapter {
                rank: lora.rank,
                down: down.activation(),
                b: lora.b.working(),
            });
            let bias = p.bias.map(CudaTensor::float);
            done(small::product(rows, x, &p.weight.weight, adapter, bias, y.activation_mut()));
        }
    }

    fn nf4(&self, matrix: &Nf4Matrix) -> linear::Matrix {
        let Nf4Matrix { rows, cols, block, codes, absmax } = matrix;
        let absmax = match absmax {
            Absmax::Plain(values) => nf4::Absmax::Plain(self.upload(&floats(values.as_bytes()))),
            Absmax::Nested { codes, map, nested, nested_block, offset } => nf4::Absmax::Nested {
                codes: self.upload(codes.as_bytes()),
                map: self.upload(&map[..]),
                nested: self.upload(nested),
                nested_block: *nested_block,
                offset: *offset,
            },
        };
        // As they are stored, only for as long as they are brought into the kernels' order.
        let stored = done(Buffer::from_slice(&self.device, codes.as_bytes()));
        let packed = self.buffer(linear::Matrix::packed_bytes(*rows, *cols, *block));
        let matrix = done(linear::Matrix::nf4(*rows, *cols, *block, &stored, packed, absmax));
        done(self.device.synchronize());
        matrix
    }

    /// `drop(X)` of the projections that drop it out, each in its own buffer.
    fn drop_inputs<'a>(
        &self,
        batch: &CudaBatch,
        inputs: usize,
        x: &Buffer<bf16>,
        dropouts: impl Iterator<Item = Option<super::Dropout>>,
        buffers: &'a mut [Grown<bf16>; GROUP],
    ) -> [Option<&'a Buffer<bf16>>; GROUP] {
        let mut dropped = [None; GROUP];
        for ((slot, buffer), wanted) in dropped.iter_mut().zip(buffers).zip(dropouts) {
            let Some(super::Dropout { probability, module }) = wanted else { continue };
            let out = buffer.at_least(&self.slabs, batch.len() * inputs);
            done(dropout::dropout(&batch.sequences, inputs, probability, module, x, out));
            *slot = Some(&*out);
        }
        dropped
    }

    fn with_angles<R>(
        &self,
        batch: &CudaBatch,
        frequencies: &[f32],
        magnitude: f32,
        f: impl FnOnce(&rope::Angles) -> R,
    ) -> R {
        let wanted = batch.end();
        let mut angles = self.angles.borrow_mut();
        let fits = |angles: &Angles| {
            angles.table.longest() >= wanted
                && angles.frequencies == frequencies
                && angles.magnitude == magnitude
        };
        if !angles.as_ref().is_some_and(fits) {
            // A text that is generated grows by a token at a time: not a table for each.
            let longest = wanted.max(*self.longest.borrow()).next_power_of_two();
            *angles = None;
            *angles = Some(Angles {
                table: done(rope::Angles::new(&self.device, longest, frequencies, magnitude)),
                frequencies: frequencies.to_vec(),
                magnitude,
            });
        }
        match &*angles {
            Some(angles) => f(&angles.table),
            None => unreachable!("made above"),
        }
    }
}

/// Little-endian floats.
fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&word| f32::from_le_bytes(word)).collect()
}

/// A dense matrix in bf16.
fn halves(matrix: &DenseMatrix) -> Vec<bf16> {
    let bytes = matrix.data.as_bytes();
    match matrix.dtype {
        Dtype::Bf16 => bytes.as_chunks().0.iter().map(|&half| bf16::from_le_bytes(half)).collect(),
        Dtype::F32 => floats(bytes).into_iter().map(bf16::from_f32).collect(),
        Dtype::F16 => {
            let halves = bytes.as_chunks().0.iter();
            halves.map(|&half| bf16::from_f32(half::f16::from_le_bytes(half).to_f32())).collect()
        }
    }
}

fn attention_shape(batch: &CudaBatch, shape: AttentionShape) -> attention::Shape {
    attention::Shape {
        tokens: batch.len(),
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        scale: shape.scale as f32,
        window: shape.window,
        sequences: batch.examples(),
        longest: batch.longest,
    }
}

impl Backend for Cuda {
    type Tensor = CudaTensor;
    type Matrix = CudaMatrix;
    type Batch = CudaBatch;

    fn identity(&self) -> String {
        let sm = self.device.properties().sm;
        format!("cuda bfloat16 arithmetic {ARITHMETIC} sm_{sm} {}", self.compilers)
    }

    fn device(&self) -> String {
        describe(self.device.properties())
    }

    fn activation_size(&self) -> usize {
        2
    }

    fn parameter_size(&self) -> usize {
        4 * 4 + 2
    }

    fn matrix_bytes(&self, matrix: &FrozenMatrix) -> u64 {
        match matrix {
            FrozenMatrix::Dense(m) => 2 * (m.rows * m.cols) as u64,
            FrozenMatrix::Nf4(m) => {
                linear::Matrix::packed_bytes(m.rows, m.cols, m.block) as u64 + m.absmax.bytes()
            }
        }
    }

    fn memory(&self) -> Option<DeviceMemory> {
        let properties = self.device.properties();
        let own = !properties.integrated;
        own.then(|| DeviceMemory { total: properties.memory, available: done(self.device.free_memory()) })
    }

    fn scratch_bytes(&self, shape: StepShape) -> u64 {
        Sizes::of(&self.device, shape).bytes(shape.tokens)
    }

    fn reserve(&self, shape: StepShape) {
        let sizes = Sizes::of(&self.device, shape);
        let mut scratch = self.scratch.borrow_mut();
        let Scratch { dequantised, partials, attention, logits, losses, down, dropped, squares } =
            &mut *scratch;
        self.room_to_dequantise(dequantised, sizes.dequantised);
        partials.at_least(&self.slabs, sizes.partials);
        attention.at_least(&self.slabs, sizes.attention);
        logits.at_least(&self.slabs, sizes.logits);
        losses.at_least(&self.slabs, sizes.losses);
        for (buffer, len) in dropped.iter_mut().zip(sizes.dropped) {
            buffer.at_least(&self.slabs, len);
        }
        for buffer in down {
            buffer.at_least(&self.slabs, sizes.down);
        }
        squares.at_least(&self.slabs, SQUARES);
        let buffers = done(room(&self.pool, &mut self.slabs.borrow_mut(), shape.tokens));
        self.pool.borrow_mut().push(buffers);
        *self.longest.borrow_mut() = shape.longest;
    }

    fn zeros(&self, len: usize) -> CudaTensor {
        CudaTensor::Activation(self.cleared(len))
    }

    fn floats(&self, len: usize) -> CudaTensor {
        CudaTensor::Float(self.cleared(len))
    }

    fn parameters(&self, lens: &[usize], role: Role) -> Vec<CudaTensor> {
        let starts: Vec<usize> = lens
            .iter()
            .scan(0, |next, len| {
                let start = *next;
                *next = (start + len).next_multiple_of(Flat::ALIGNMENT);
                Some(start)
            })
            .collect();
        let end = starts.last().zip(lens.last()).map_or(0, |(start, len)| start + len);
        let flat = Arc::new(Flat {
            value: self.cleared(end),
            working: (role == Role::Weights).then(|| self.cleared(end)),
            parts: lens.len(),
        });
        let part = |(index, (&start, &len)): (usize, (&usize, &usize))| {
            CudaTensor::Parameter(Parameter {
                value: done(flat.value.slice(start, len)),
                working: flat.working.as_ref().map(|working| done(working.slice(start, len))),
                flat: flat.clone(),
                index,
            })
        };
        starts.iter().zip(lens).enumerate().map(part).collect()
    }

    fn write(&self, tensor: &mut CudaTensor, values: &[f32]) {
        let len = values.len();
        match tensor {
            CudaTensor::Activation(buffer) => {
                let values: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
                done(buffer.write(&values));
            }
            CudaTensor::Float(buffer) => done(buffer.write(values)),
            CudaTensor::Parameter(Parameter { value, working, .. }) => {
                done(value.write(values));
                if let Some(working) = working {
                    done(elementwise::cast_to_bf16(len, value, working));
                }
            }
        }
    }

    fn read(&self, tensor: &CudaTensor, len: usize) -> Vec<f32> {
        match tensor {
            CudaTensor::Activation(buffer) => done(buffer.read(len)).into_iter().map(bf16::to_f32).collect(),
            CudaTensor::Float(buffer) | CudaTensor::Parameter(Parameter { value: buffer, .. }) => {
                done(buffer.read(len))
            }
        }
    }

    fn clear_all(&self, tensors: &mut [CudaTensor]) {
        if let Some(flat) = whole(&*tensors) {
            done(flat.value.share().fill(0));
        }
    }

    fn synchronize(&self) {
        done(self.device.synchronize());
    }

    fn matrix(&self, matrix: FrozenMatrix) -> CudaMatrix {
        match &matrix {
            FrozenMatrix::Nf4(matrix) => CudaMatrix { weight: self.nf4(matrix), rows: None },
            FrozenMatrix::Dense(dense) => {
                let values = self.upload(&halves(dense));
                let rows = Some(values.share());
                CudaMatrix { weight: done(linear::Matrix::dense(dense.rows, dense.cols, values)), rows }
            }
        }
    }

    fn batch(&self, batch: Batch) -> CudaBatch {
        let wanted = batch.len().max(batch.sequence_keys.len());
        let buffers = done(room(&self.pool, &mut self.slabs.borrow_mut(), wanted));
        done(CudaBatch::new(batch, buffers, self.pool.clone()))
    }

    fn embed(&self, batch: &CudaBatch, table: &CudaMatrix, hidden: usize, out: &mut CudaTensor) {
        let Some(table) = &table.rows else { unreachable!("tables of embeddings are not quantised") };
        done(rows::gather(batch.len(), hidden, &batch.tokens, table, out.activation_mut()));
    }

    fn add(&self, len: usize, x: &CudaTensor, y: &mut CudaTensor) {
        done(elementwise::add(len, x.activation(), y.activation_mut()));
    }

    fn rms_norm(
        &self,
        rows: usize,
        cols: usize,
        x: &CudaTensor,
        weight: &CudaTensor,
        epsilon: f64,
        y: &mut CudaTensor,
    ) {
        let shape = rms_norm::Shape { rows, cols, epsilon: epsilon as f32 };
        done(rms_norm::rms_norm(shape, x.activation(), weight.float(), y.activation_mut()));
    }

    fn add_rms_norm(
        &self,
        rows: usize,
        cols: usize,
        delta: &CudaTensor,
        x: &mut CudaTensor,
        weight: &CudaTensor,
        epsilon: f64,
        y: &mut CudaTensor,
    ) {
        let shape = rms_norm::Shape { rows, cols, epsilon: epsilon as f32 };
        let (delta, x, y) = (delta.activation(), x.activation_mut(), y.activation_mut());
        done(rms_norm::rms_norm_residual(shape, x, delta, weight.float(), y));
    }

    fn rms_norm_backward(
        &self,
        rows: usize,
        cols: usize,
        x: &CudaTensor,
        weight: &CudaTensor,
        epsilon: f64,
        dy: &CudaTensor,
        dx: &mut CudaTensor,
        accumulate: bool,
    ) {
        let shape = rms_norm::Shape { rows, cols, epsilon: epsilon as f32 };
        let (x, dy, dx) = (x.activation(), dy.activation(), dx.activation_mut());
        done(rms_norm::rms_norm_backward(shape, x, weight.float(), dy, dx, accumulate));
    }

    fn linear(
        &self,
        batch: &CudaBatch,
        inputs: usize,
        x: &CudaTensor,
        projections: &mut [Projection<'_, Self>],
    ) {
        let x = x.activation();
        let mut scratch = self.scratch.borrow_mut();
        let Scratch { dequantised, dropped, .. } = &mut *scratch;
        // The products of a few rows sum in another order. Where nothing is labelled no gradient and no loss depends on
        // that, and the tokens of an answer are computed one by one.
        if batch.len() <= small::MOST_ROWS && batch.labelled_positions() == 0 {
            let room = self.room_to_dequantise(dequantised, 0);
            return self.linear_of_few(batch.len(), inputs, x, projections, room);
        }
        let room = self.room_for(dequantised, batch.len(), projections.iter().map(|p| p.weight));
        let dropouts = projections.iter().map(|p| p.lora.as_ref().and_then(|lora| lora.dropout));
        let dropped = self.drop_inputs(batch, inputs, x, dropouts, dropped);
        let mut parts: Vec<linear::Forward<'_>> = projections
            .iter_mut()
            .zip(dropped)
            .map(|(p, input)| linear::Forward {
                weight: &p.weight.weight,
                bias: p.bias.map(CudaTensor::float),
                lora: p.lora.as_ref().zip(p.down.as_deref_mut()).map(|(lora, down)| linear::Lora {
                    a: lora.a.working(),
                    b: lora.b.working(),
                    rank: lora.rank,
                    scale: lora.scale as f32,
                    down: down.activation_mut(),
                    input,
                }),
                y: p.output.as_deref_mut().map(CudaTensor::activation_mut),
            })
            .collect();
        done(linear::forward(batch.len(), inputs, x, &mut parts, room));
    }

    fn linear_backward(
        &self,
        batch: &CudaBatch,
        inputs: usize,
        x: &CudaTensor,
        projections: &mut [ProjectionBackward<'_, Self>],
        dx: Option<&mut CudaTensor>,
    ) {
        let (m, x) = (batch.len(), x.activation());
        let mut scratch = self.scratch.borrow_mut();
        let Scratch { dequantised, dropped, down, partials, .. } = &mut *scratch;
        let room = self.room_for(dequantised, m, projections.iter().map(|p| p.weight));
        let mut gradients: Vec<Option<&mut Buffer<bf16>>> = down
            .iter_mut()
            .zip(&*projections)
            .map(|(buffer, p)| p.lora.as_ref().map(|lora| buffer.at_least(&self.slabs, m * lora.rank)))
            .collect();
        let mut parts: Vec<linear::Backward<'_>> = projections
            .iter()
            .zip(&mut gradients)
            .map(|(p, gradient)| linear::Backward {
                weight: &p.weight.weight,
                dy: p.output_gradient.activation(),
                lora: p.lora.as_ref().zip(gradient.as_deref_mut()).map(|(lora, gradient)| {
                    linear::LoraBackward {
                        a: lora.a.working(),
                        b: lora.b.working(),
                        rank: lora.rank,
                        scale: lora.scale as f32,
                        gradient,
                        dropout: lora.dropout.map(|dropout| linear::Mask {
                            sequences: &batch.sequences,
                            probability: dropout.probability,
                            module: dropout.module,
                        }),
                    }
                }),
            })
            .collect();
        done(linear::input_gradient(m, inputs, &mut parts, dx.map(CudaTensor::activation_mut), room));
        drop(parts);
        let dropouts = projections.iter().map(|p| p.lora.as_ref().and_then(|lora| lora.dropout));
        let dropped = self.drop_inputs(batch, inputs, x, dropouts, dropped);
        let mut parts: Vec<adapter_gradient::Part<'_>> = projections
            .iter_mut()
            .zip(gradients)
            .zip(dropped)
            .filter_map(|((p, gradient), input)| {
                Some(adapter_gradient::Part {
                    outputs: p.weight.weight.shape().0,
                    rank: p.lora.as_ref()?.rank,
                    dy: p.output_gradient.activation(),
                    down: p.down?.activation(),
                    gradient: gradient?,
                    input,
                    da: p.a_gradient.as_deref_mut().map(CudaTensor::float_mut),
                    db: p.b_gradient.as_deref_mut().map(CudaTensor::float_mut),
                })
            })
            .collect();
        let shapes: Vec<PartShape> = parts.iter().map(adapter_gradient::Part::shape).collect();
        let needed = adapter_gradient::scratch_elements(
            self.device.properties(),
            m,
            batch.sequences.count,
            inputs,
            &shapes,
        );
        let partials = partials.at_least(&self.slabs, needed);
        done(adapter_gradient::adapter_gradients(&batch.sequences, inputs, x, &mut parts, partials));
    }

    fn rope(
        &self,
        batch: &CudaBatch,
        heads: usize,
        head_dim: usize,
        frequencies: &[f32],
        magnitude: f32,
        inverse: bool,
        x: &mut CudaTensor,
    ) {
        debug_assert_eq!(2 * frequencies.len(), head_dim);
        self.with_angles(batch, frequencies, magnitude, |angles| {
            let x = x.activation_mut();
            done(rope::rope(angles, &batch.positions, batch.len(), heads, 0, inverse, x, None));
        });
    }

    fn attention(
        &self,
        batch: &CudaBatch,
        shape: AttentionShape,
        q: &CudaTensor,
        k: &CudaTensor,
        v: &CudaTensor,
        out: &mut CudaTensor,
        log_sum: &mut CudaTensor,
    ) {
        let shape = attention_shape(batch, shape);
        let (q, k, v) = (q.activation(), k.activation(), v.activation());
        let (out, log_sum) = (out.activation_mut(), log_sum.float_mut());
        done(attention::forward(shape, &batch.cu_seqlens, q, k, v, out, log_sum));
    }

    fn attention_backward(
        &self,
        batch: &CudaBatch,
        shape: AttentionShape,
        q: &CudaTensor,
        k: &CudaTensor,
        v: &CudaTensor,
        out: &CudaTensor,
        log_sum: &CudaTensor,
        dout: &CudaTensor,
        dq: &mut CudaTensor,
        dk: &mut CudaTensor,
        dv: &mut CudaTensor,
    ) {
        let shape = attention_shape(batch, shape);
        let mut scratch = self.scratch.borrow_mut();
        let len = attention::scratch_elements(shape.tokens, shape.heads);
        let scratch = scratch.attention.at_least(&self.slabs, len);
        done(attention::backward(
            shape,
            &batch.cu_seqlens,
            q.activation(),
            k.activation(),
            v.activation(),
            out.activation(),
            log_sum.float(),
            dout.activation(),
            scratch,
            dq.activation_mut(),
            dk.activation_mut(),
            dv.activation_mut(),
        ));
    }

    fn attention_cached(
        &self,
        shape: AttentionShape,
        rows: usize,
        past: usize,
        q: &CudaTensor,
        k_cache: &CudaTensor,
        v_cache: &CudaTensor,
        out: &mut CudaTensor,
    ) {
        let (q, k, v) = (q.activation(), k_cache.activation(), v_cache.activation());
        let shape = cached_attention::Shape {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            scale: shape.scale as f32,
            window: shape.window,
        };
        let mut scratch = self.scratch.borrow_mut();
        // A prompt is many rows: a few at a time do.
        let needed = cached_attention::scratch_elements(shape, rows.min(CACHED_ROWS), past + rows);
        let scratch = scratch.attention.at_least(&self.slabs, needed);
        let out = out.activation_mut();
        done(cached_attention::cached_attention(shape, rows, past, q, k, v, out, scratch));
    }

    fn copy_into(&self, len: usize, source: &CudaTensor, destination: &mut CudaTensor, offset: usize) {
        done(destination.activation_mut().copy_from(source.activation(), len, offset));
    }

    fn swiglu(&self, len: usize, gate: &CudaTensor, up: &CudaTensor, out: &mut CudaTensor) {
        done(swiglu::swiglu(len, gate.activation(), up.activation(), out.activation_mut()));
    }

    fn swiglu_backward(&self, len: usize, dout: &CudaTensor, gate: &mut CudaTensor, up: &mut CudaTensor) {
        let (gate, up) = (gate.activation_mut(), up.activation_mut());
        done(swiglu::swiglu_backward(len, dout.activation(), gate, up));
    }

    fn gather_labelled(&self, batch: &CudaBatch, cols: usize, x: &CudaTensor, out: &mut CudaTensor) {
        let rows = batch.labelled_positions();
        done(rows::gather(rows, cols, &batch.labelled, x.activation(), out.activation_mut()));
    }

    fn scatter_labelled(&self, batch: &CudaBatch, cols: usize, x: &CudaTensor, out: &mut CudaTensor) {
        let rows = batch.labelled_positions();
        let (x, out) = (x.activation(), out.activation_mut());
        done(rows::scatter(rows, cols, batch.len(), &batch.labelled, x, out));
    }

    fn cross_entropy(
        &self,
        batch: &CudaBatch,
        hidden: usize,
        h: &CudaTensor,
        head: &CudaMatrix,
        dh: Option<&mut CudaTensor>,
    ) -> Vec<f64> {
        let vocabulary = head.weight.shape().0;
        let (count, stride) = (batch.labelled_positions(), cross_entropy::stride(vocabulary));
        let step = chunk(vocabulary);
        let mut scratch = self.scratch.borrow_mut();
        let Scratch { dequantised, logits, losses, .. } = &mut *scratch;
        let room = self.room_for_head(dequantised, head);
        let logits = logits.at_least(&self.slabs, step.min(count) * stride);
        let losses = losses.at_least(&self.slabs, count);
        let mut dh = dh.map(CudaTensor::activation_mut);
        for first in (0..count).step_by(step) {
            let rows = (count - first).min(step);
            let h = done(h.activation().slice(first * hidden, rows * hidden));
            done(linear::logits(rows, hidden, &h, &head.weight, logits, stride, room));
            let targets = done(batch.targets.slice(first, rows));
            let mut loss = done(losses.slice(first, rows));
            done(cross_entropy::cross_entropy(rows, vocabulary, logits, &targets, &mut loss, dh.is_some()));
            if let Some(dh) = dh.as_deref_mut() {
                let mut dh = done(dh.slice(first * hidden, rows * hidden));
                done(linear::logits_gradient(rows, hidden, logits, stride, &head.weight, &mut dh, room));
            }
        }
        let losses = done(losses.read(count));
        batch.sum_by_sequence(&losses)
    }

    fn logits(&self, hidden: usize, h: &CudaTensor, row: usize, head: &CudaMatrix) -> Vec<f32> {
        let (vocabulary, inputs) = head.weight.shape();
        debug_assert_eq!(inputs, hidden);
        let mut scratch = self.scratch.borrow_mut();
        let logits = scratch.logits.at_least(&self.slabs, vocabulary);
        done(small::logits_row(row, h.activation(), &head.weight, logits));
        done(logits.read(vocabulary))
    }

    fn square_sum(&self, tensors: &[&CudaTensor]) -> f64 {
        let Some(flat) = whole(tensors.iter().copied()) else { return 0.0 };
        let mut scratch = self.scratch.borrow_mut();
        let partials = scratch.squares.at_least(&self.slabs, SQUARES);
        let parts = done(adamw::square_sum(flat.value.len(), &flat.value, partials));
        done(partials.read(parts)).iter().sum()
    }

    fn adamw(&self, constants: AdamW, parameters: &mut [super::Parameter<'_, Self>]) {
        let Some(value) = whole(parameters.iter().map(|p| &*p.value)) else { return };
        let (Some(gradient), Some(m), Some(v)) = (
            whole(parameters.iter().map(|p| p.gradient)),
            whole(parameters.iter().map(|p| &*p.m)),
            whole(parameters.iter().map(|p| &*p.v)),
        ) else {
            return;
        };
        let Some(working) = &value.working else { unreachable!("weights have a copy for the products") };
        let step = adamw::Step {
            learning_rate: constants.learning_rate,
            beta1: constants.beta1,
            beta2: constants.beta2,
            epsilon: constants.epsilon,
            weight_decay: constants.weight_decay,
            step: constants.step,
            scale: constants.gradient_scale,
            max_norm: 0.0, // the trainer has clipped
        };
        let mut parameters = adamw::Parameters {
            value: value.value.share(),
            working: working.share(),
            m: m.value.share(),
            v: v.value.share(),
        };
        let mut scratch = self.scratch.borrow_mut();
        let partials = scratch.squares.at_least(&self.slabs, SQUARES);
        let mut norm = done(partials.slice(adamw::PARTIALS, 1));
        let partials = done(partials.slice(0, adamw::PARTIALS));
        let len = value.value.len();
        done(adamw::adamw_clipped(step, len, &gradient.value, &mut parameters, &partials, &mut norm));
    }
}

/// A GPU in words: `GPU (Orin, sm_87, 16 SMs at 1300 MHz)`.
pub fn describe(properties: &Properties) -> String {
    let Properties { name, sm, multiprocessors, clock_khz, .. } = properties;
    format!("GPU ({name}, sm_{sm}, {multiprocessors} SMs at {} MHz)", clock_khz / 1000)
}
