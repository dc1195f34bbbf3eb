//! The gradients of adapters, of `adapter_gradient.cu`.

use super::Operation;
use super::dropout::Sequences;
use crate::device::Properties;
use crate::error::Error;
use crate::kernels;
use crate::launcher::{Argument, Launch};
use crate::memory::Buffer;
use bytemuck::{Pod, Zeroable};
use half::bf16;

/// Tokens whose products are summed by themselves (`CHUNK` in `adapter_gradient.cu`).
pub const CHUNK: usize = 256;
/// Columns of a wide operand in a block (`WIDE`).
const WIDE: usize = 128;
/// Columns of thin operands in a block (`THIN`).
const THIN: usize = 64;
/// Thin operands of a job (`SEGMENTS`), which is also the number of layers of a group.
const SEGMENTS: usize = 3;
/// Jobs of a launch, and gradients (`JOBS`).
const JOBS: usize = 6;
/// Elements of a block of `adapter_gradient_sum`.
const SUMMED: usize = 256 * 4;
/// Largest grid in y and z (CUDA C++ Programming Guide, "Compute Capabilities").
const MOST_IN_Y: usize = 65_535;
/// From so many tiles an SM on, blocks walk all chunks themselves. Derived: a block has two stages of up to 12 KiB under way
/// and memory wants 200 GB/s · 1 µs = 200 KB of them, which two blocks on each of 16 SMs (or of 8, in 30 W mode) exceed
/// without the traffic of scratch. To be replaced by a measurement.
const WHOLE_FROM: usize = 2;

/// One layer of a group that shares its input.
#[derive(Debug)]
pub struct Part<'a> {
    /// Columns of dY.
    pub outputs: usize,
    /// r
    pub rank: usize,
    /// dY, `[tokens, outputs]`.
    pub dy: &'a Buffer<bf16>,
    /// U = scale·drop(X)·Aᵀ, `[tokens, r]`.
    pub down: &'a Buffer<bf16>,
    /// G = scale·dY·B, `[tokens, r]`.
    pub gradient: &'a Buffer<bf16>,
    /// drop(X), `[tokens, inputs]`, where this layer has dropout; X otherwise.
    pub input: Option<&'a Buffer<bf16>>,
    /// dA, `[r, inputs]`, `+=`.
    pub da: Option<&'a mut Buffer<f32>>,
    /// dB, `[outputs, r]`, `+=`.
    pub db: Option<&'a mut Buffer<f32>>,
}

/// Sizes of a [`Part`].
#[derive(Clone, Copy, Debug)]
pub struct PartShape {
    /// Columns of dY.
    pub outputs: usize,
    /// r
    pub rank: usize,
    /// Whether its input is its own (dropout).
    pub own_input: bool,
}

impl Part<'_> {
    /// Its sizes.
    pub fn shape(&self) -> PartShape {
        PartShape { outputs: self.outputs, rank: self.rank, own_input: self.input.is_some() }
    }
}

/// `Segment` of `adapter_gradient.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Segment {
    thin: u64,
    gradient: u64,
    partial: u64,
    across: u32,
    along: u32,
    stride: u32,
    first: u32,
    columns: u32,
    run: u32,
    tile: u32,
    padding: u32,
}

/// `Job`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Job {
    wide: u64,
    width: u32,
    first_block: u32,
    segments: u32,
    tiles: u32,
    segment: [Segment; SEGMENTS],
}

/// `Jobs`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Jobs {
    job: [Job; JOBS],
    count: u32,
    padding: u32,
}

/// `Gradient`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Gradient {
    gradient: u64,
    partial: u64,
    count: u64,
}

impl Job {
    fn over(wide: &Buffer<bf16>, width: u32) -> Job {
        Job { wide: wide.address().0, width, ..Job::zeroed() }
    }

    /// Takes a segment, if there is room for it.
    fn take(&mut self, segment: Segment) -> bool {
        let room = THIN as u32 / 8 - self.tiles;
        if self.segments as usize == SEGMENTS || segment.columns.div_ceil(8) > room {
            return false;
        }
        self.segment[self.segments as usize] = Segment { tile: self.tiles, ..segment };
        self.segments += 1;
        self.tiles += segment.columns.div_ceil(8);
        true
    }
}

/// A thin operand and its gradient, before it is cut into segments.
struct Thin {
    thin: u64,
    gradient: Gradient,
    rank: u32,
    across: u32,
    along: u32,
}

impl Thin {
    fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let run = [8, 4, 2].into_iter().find(|&run| self.rank.is_multiple_of(run)).unwrap_or(1);
        (0..self.rank).step_by(THIN).map(move |first| Segment {
            thin: self.thin,
            gradient: self.gradient.gradient,
            partial: self.gradient.partial,
            across: self.across,
            along: self.along,
            stride: self.rank,
            first,
            columns: (self.rank - first).min(THIN as u32),
            run,
            ..Segment::zeroed()
        })
    }
}

/// Whether blocks add to the gradients themselves, all chunks of all sequences. A question of the grid: the order of the sum
/// is the same.
fn whole(properties: &Properties, inputs: usize, parts: &[PartShape]) -> bool {
    let tiles = |width: usize, rank: usize| width.div_ceil(WIDE) * rank.div_ceil(THIN);
    let own: usize = parts
        .iter()
        .map(|p| tiles(p.outputs, p.rank) + if p.own_input { tiles(inputs, p.rank) } else { 0 })
        .sum();
    let shared: usize = parts.iter().filter(|p| !p.own_input).map(|p| p.rank.next_multiple_of(8)).sum();
    own + tiles(inputs, shared) >= WHOLE_FROM * properties.multiprocessors as usize
}

/// Slots of scratch for that many tokens in that many sequences.
fn slots(tokens: usize, sequences: usize) -> usize {
    tokens / CHUNK + sequences
}

/// Elements of scratch that [`adapter_gradients`] needs on a device for a group of layers. Grows with `tokens` and
/// `sequences`.
pub fn scratch_elements(
    properties: &Properties,
    tokens: usize,
    sequences: usize,
    inputs: usize,
    parts: &[PartShape],
) -> usize {
    if whole(properties, inputs, parts) {
        return 0;
    }
    let gradient = |rows: usize, columns: usize| rows.saturating_mul(columns).div_ceil(4).saturating_mul(4);
    let slot = parts
        .iter()
        .flat_map(|p| [gradient(p.rank, inputs), gradient(p.outputs, p.rank)])
        .fold(0, usize::saturating_add);
    slot.saturating_mul(slots(tokens, sequences))
}

/// For each part: `dB += dYᵀ·U` and `dA += Gᵀ·drop(X)`. Every chunk of [`CHUNK`] tokens of a sequence, counted from its
/// start, is summed by itself; chunks are added in order, so that the result does not depend on how sequences were dealt to
/// calls. At most three parts. `scratch` has [`scratch_elements`].
///
/// # Errors
/// When a buffer is shorter than its shape, or there are too many parts.
pub fn adapter_gradients(
    sequences: &Sequences,
    inputs: usize,
    x: &Buffer<bf16>,
    parts: &mut [Part<'_>],
    scratch: &mut Buffer<f32>,
) -> Result<(), Error> {
    let operation = Operation("adapter_gradients");
    let tokens = sequences.tokens;
    if parts.len() > SEGMENTS {
        return Err(operation.error(format!("{} parts, more than {SEGMENTS}", parts.len())));
    }
    operation.has("offsets", &sequences.offsets, sequences.count + 1)?;
    if parts.iter().any(|part| part.input.is_none() && part.da.is_some()) {
        operation.has("x", x, operation.product(&[tokens, inputs])?)?;
    }
    let shapes: Vec<PartShape> = parts.iter().map(Part::shape).collect();
    let width = operation.u32("inputs", inputs)?;

    let mut within = vec![];
    let mut gradients: Vec<Gradient> = vec![];
    let mut slot = 0;
    let mut gradient_of = |name: &str, buffer: &mut Buffer<f32>, sizes: [usize; 2]| {
        let count = operation.product(&sizes)?;
        operation.has(name, buffer, count)?;
        let gradient = Gradient { gradient: buffer.address().0, partial: slot as u64, count: count as u64 };
        slot += count.next_multiple_of(4); // each starts at a multiple of 16 bytes
        gradients.push(gradient);
        within.push(buffer.output());
        Ok::<_, Error>(gradient)
    };
    // X with all that goes with it first, then each layer's own.
    let mut shared: Vec<Thin> = vec![];
    let mut own: Vec<(&Buffer<bf16>, u32, Thin)> = vec![];
    for part in parts.iter_mut() {
        let rank = operation.u32("rank", part.rank)?;
        let outputs = operation.u32("outputs", part.outputs)?;
        let thin_len = operation.product(&[tokens, part.rank])?;
        if let Some(da) = part.da.as_deref_mut() {
            operation.has("gradient of down", part.gradient, thin_len)?;
            let gradient = gradient_of("da", da, [part.rank, inputs])?;
            let thin = part.gradient.address().0;
            let thin = Thin { thin, gradient, rank, across: 1, along: width };
            match part.input {
                None => shared.push(thin),
                Some(input) => {
                    operation.has("input", input, operation.product(&[tokens, inputs])?)?;
                    own.push((input, width, thin));
                }
            }
        }
        if let Some(db) = part.db.as_deref_mut() {
            operation.has("dy", part.dy, operation.product(&[tokens, part.outputs])?)?;
            operation.has("down", part.down, thin_len)?;
            let gradient = gradient_of("db", db, [part.outputs, part.rank])?;
            let thin = Thin { thin: part.down.address().0, gradient, rank, across: rank, along: 1 };
            own.push((part.dy, outputs, thin));
        }
    }
    let mut jobs: Vec<Job> = vec![];
    let mut fill = |wide: &Buffer<bf16>, width: u32, thin: &mut dyn Iterator<Item = Segment>| {
        let mut job = Job::over(wide, width);
        for segment in thin {
            if !job.take(segment) {
                jobs.push(job);
                job = Job::over(wide, width);
                job.take(segment);
            }
        }
        jobs.push(job);
    };
    fill(x, width, &mut shared.iter().flat_map(Thin::segments));
    for (wide, width, thin) in &own {
        fill(wide, *width, &mut thin.segments());
    }
    jobs.retain(|job| job.segments > 0 && job.width > 0);
    if tokens == 0 || sequences.count == 0 || jobs.is_empty() {
        return Ok(());
    }

    let chunks = sequences.longest.div_ceil(CHUNK);
    // A chunk alone is added to the gradients as well as to scratch.
    let split = !whole(x.device().properties(), inputs, &shapes) && (chunks > 1 || sequences.count > 1);
    let slot_elements = Argument::U64(slot as u64);
    let count = Argument::U32(operation.u32("the number of sequences", sequences.count)?);
    if split {
        operation.has("scratch", scratch, operation.product(&[slot, slots(tokens, sequences.count)])?)?;
        if chunks > MOST_IN_Y || sequences.count > MOST_IN_Y {
            let what = format!("{} sequences in {chunks} chunks, more than {MOST_IN_Y}", sequences.count);
            return Err(operation.error(what));
        }
    }
    within.extend(parts.iter().flat_map(|part| [part.dy, part.down, part.gradient]).map(Buffer::input));
    within.extend(parts.iter().map(|part| part.input.unwrap_or(x).input()));
    for lot in jobs.chunks_mut(JOBS) {
        let mut blocks = 0;
        let mut table = Jobs::zeroed();
        for (job, to) in lot.iter_mut().zip(&mut table.job) {
            job.first_block = operation.blocks(blocks, 1)?;
            blocks += (job.width as usize).div_ceil(WIDE);
            *to = *job;
        }
        table.count = lot.len() as u32;
        let arguments = [
            if split { scratch.output() } else { Argument::Null },
            sequences.offsets.input(),
            Argument::Struct(bytemuck::bytes_of(&table)),
            count,
            slot_elements,
        ];
        let [y, z] = if split { [chunks as u32, sequences.count as u32] } else { [1, 1] };
        let grid = [operation.blocks(blocks, 1)?, y, z];
        let kernel = &kernels::adapter_gradient;
        x.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &within })?;
    }
    if !split {
        return Ok(());
    }
    let longest = gradients.iter().map(|gradient| gradient.count as usize).max().unwrap_or(0);
    let mut table = [Gradient::zeroed(); JOBS];
    table[..gradients.len()].copy_from_slice(&gradients);
    let arguments = [
        Argument::Struct(bytemuck::cast_slice(&table)),
        scratch.input(),
        sequences.offsets.input(),
        count,
        slot_elements,
    ];
    let grid = [operation.blocks(longest, SUMMED)?, gradients.len() as u32, 1];
    let kernel = &kernels::adapter_gradient_sum;
    x.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &within })
}
