//! How fast the kernels are: each alone, on the shapes of real models, beside the ceilings of the same device in the same run.
//!
//! ```text
//!   for each sample      restore what the operation overwrites ─► flush the caches ─► mark ─► the operation ─► mark
//!   for each operation   two samples that do not count, then up to `samples` of them or `seconds`, three at least
//!   for the ceilings     probe_mma, probe_copy, in the same way
//! ```
//!
//! * Weights and activations are pseudorandom, never 0 (zeros take less power, and clock higher), in two sets that take turns.
//! * Flushing is writing a buffer of twice the second-level cache, and at least 32 MiB. It also keeps the device busy while
//!   the host launches what is measured, so the time between the marks is the device's and not the launches'.
//! * Operations and bytes are counted from shapes: what is needed, not what a kernel happens to do. A 4-bit weight that is
//!   dequantised first counts what that reads and writes.
//! * A figure is a median, with the range of the middle half.
//!
//! On the stand-in everything runs and nothing is a speed ([`Report::stand_in`]).

mod cases;
pub mod shapes;
mod statistics;

pub use cases::OPERATIONS;
pub use shapes::Model;
pub use statistics::Statistics;

use crate::device::{Device, Properties};
use crate::error::Error;
use crate::memory::{Buffer, Element};
use crate::ops::probe;
use crate::tuned::{Choice, TABLES, fastest};
use half::bf16;
use std::time::{Duration, Instant};

/// Input sets that take turns.
const SETS: usize = 2;
/// Samples that do not count.
const WARM_UP: usize = 2;
/// Samples that are taken whatever they take.
const LEAST: usize = 3;
/// A flush writes at least so many bytes.
const FLUSH: u64 = 32 << 20;
/// Elements of random data that are made on the host; longer buffers repeat them.
const RANDOM: usize = 1 << 20;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Shapes.
    pub models: Vec<Model>,
    /// Rows of a micro-batch (tokens).
    pub tokens: Vec<usize>,
    /// Tokens of an example: what attention is over.
    pub longest: usize,
    /// Only these, by name of operation or kernel; empty: all.
    pub kernels: Vec<String>,
    /// Samples of an operation.
    pub samples: usize,
    /// Seconds of an operation, unless `LEAST` samples take longer.
    pub seconds: f64,
    /// Bytes that a flush writes; `None`: by the size of the cache.
    pub flush: Option<u64>,
    /// Rounds of the probe of the tensor cores.
    pub rounds: u32,
    /// Bytes that the probe of the memory copies.
    pub copied: usize,
    /// Rank of the adapter.
    pub rank: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            models: shapes::MODELS.to_vec(),
            tokens: vec![64, 256, 512, 1024, 2048],
            longest: 1024,
            kernels: Vec::new(),
            samples: 15,
            seconds: 0.5,
            flush: None,
            rounds: 4096,
            copied: 256 << 20,
            rank: 16,
        }
    }
}

impl Options {
    /// A tenth of the time: two numbers of rows, few samples.
    pub fn quick() -> Options {
        Options { tokens: vec![256, 1024], samples: 5, seconds: 0.1, ..Options::default() }
    }

    /// Whether an operation or a kernel was asked for.
    fn wants(&self, operation: &str, kernel: &str) -> bool {
        self.kernels.is_empty() || self.kernels.iter().any(|name| name == operation || name == kernel)
    }
}

/// What one operation took.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Which, of [`OPERATIONS`].
    pub operation: &'static str,
    /// The kernel, where a table chooses one.
    pub kernel: Option<&'static str>,
    /// Whose shapes.
    pub model: &'static str,
    /// Rows (tokens); 0 where there are none.
    pub tokens: usize,
    /// The shape, in words.
    pub shape: String,
    /// Seconds.
    pub seconds: Statistics,
    /// Work, in floating-point operations; 0 where it is bound by memory.
    pub operations: f64,
    /// Bytes that have to move.
    pub bytes: f64,
}

impl Row {
    /// FLOP/s of the median.
    pub fn flops(&self) -> f64 {
        self.operations / self.seconds.median
    }

    /// B/s of the median.
    pub fn bandwidth(&self) -> f64 {
        self.bytes / self.seconds.median
    }
}

/// What the device does at most, measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// `mma.sync` from registers, FLOP/s.
    pub mma: f64,
    /// A copy, B/s read and written.
    pub copy: f64,
}

/// Everything that was measured.
#[derive(Clone, Debug)]
pub struct Report {
    /// The device.
    pub device: Properties,
    /// Whether it is the stand-in: then no time is a speed.
    pub stand_in: bool,
    /// Its ceilings.
    pub ceilings: Ceilings,
    /// The operations.
    pub rows: Vec<Row>,
    /// The fastest kernel of each table, where all of its kernels were measured.
    pub tiles: Vec<Choice>,
    /// Shapes that do not fit in memory, and were left out.
    pub left_out: Vec<String>,
}

/// Measures. `progress` hears what comes next, and ends it by returning false.
///
/// # Errors
/// What CUDA says. A shape that does not fit in memory is no error: it is left out and said.
pub fn run(
    device: &Device,
    options: &Options,
    progress: &mut dyn FnMut(&str) -> bool,
) -> Result<Report, Error> {
    let mut bench = Bench::new(device, options)?;
    let ceilings = bench.ceilings()?;
    let (mut rows, mut left_out) = (Vec::new(), Vec::new());
    'all: for model in &options.models {
        for operation in OPERATIONS {
            let sizes = if cases::has_rows(operation) { &options.tokens[..] } else { &[0] };
            for &tokens in sizes {
                let title = match tokens {
                    0 => format!("{} {operation}", model.name),
                    _ => format!("{} {operation}, {tokens} tokens", model.name),
                };
                if !cases::may_have(options, operation) {
                    continue;
                }
                if !progress(&title) {
                    break 'all;
                }
                match cases::measure(&mut bench, model, operation, tokens, &mut rows) {
                    Err(error) if error.is_out_of_memory() && !error.is_sticky() => left_out.push(title),
                    measured => measured?,
                }
            }
        }
    }
    let tiles = tiles(&rows);
    let stand_in = device.is_stand_in();
    Ok(Report { device: device.properties().clone(), stand_in, ceilings, rows, tiles, left_out })
}

/// The fastest kernels, of the tables whose every kernel was measured at every number of rows.
fn tiles(rows: &[Row]) -> Vec<Choice> {
    let mut choices = Vec::new();
    for (operation, table) in TABLES {
        let measured: Vec<(usize, &'static str, f64)> = rows
            .iter()
            .filter(|row| row.operation == *operation)
            .filter_map(|row| Some((row.tokens, row.kernel?, row.seconds.median)))
            .collect();
        let complete = measured.iter().all(|(m, ..)| {
            table.iter().all(|row| measured.iter().any(|(of, name, _)| of == m && *name == row.kernel.name))
        });
        if complete {
            choices.extend(fastest(operation, &measured));
        }
    }
    choices
}

/// A part of a sample.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// What the operation overwrites is made whole; not measured.
    Restore,
    /// The operation.
    Run,
}

/// What measuring needs.
struct Bench<'a> {
    device: &'a Device,
    options: &'a Options,
    flush: Buffer<u8>,
    flushes: u8,
    random: u64,
}

impl<'a> Bench<'a> {
    fn new(device: &'a Device, options: &'a Options) -> Result<Bench<'a>, Error> {
        let bytes = options.flush.unwrap_or_else(|| FLUSH.max(2 * u64::from(device.properties().l2)));
        Ok(Bench {
            device,
            options,
            flush: Buffer::new(device, bytes as usize)?,
            flushes: 0,
            random: 0x9e37_79b9_7f4a_7c15,
        })
    }

    /// Seconds of an operation.
    fn measure(
        &mut self,
        mut operation: impl FnMut(Phase, usize) -> Result<(), Error>,
    ) -> Result<Statistics, Error> {
        let began = Instant::now();
        let limit = Duration::from_secs_f64(self.options.seconds.max(0.0));
        let mut samples = Vec::new();
        for i in 0..WARM_UP + self.options.samples.max(LEAST) {
            if i >= WARM_UP + LEAST && began.elapsed() >= limit {
                break;
            }
            let set = i % SETS;
            operation(Phase::Restore, set)?;
            self.flushes = self.flushes.wrapping_add(1);
            self.flush.fill(self.flushes)?;
            let from = self.device.mark()?;
            operation(Phase::Run, set)?;
            let to = self.device.mark()?;
            let seconds = self.device.elapsed(from, to)?;
            if i >= WARM_UP {
                samples.push(seconds);
            }
        }
        // A time of nothing has no quotient.
        let samples: Vec<f64> = samples.into_iter().map(|seconds| seconds.max(1e-9)).collect();
        let nothing = || Error::Shape { operation: "bench", what: "no sample has a time".into() };
        Statistics::of(&samples).ok_or_else(nothing)
    }

    fn ceilings(&mut self) -> Result<Ceilings, Error> {
        let multiprocessors = self.device.properties().multiprocessors as usize;
        let mut out = Buffer::<f32>::new(self.device, probe::mma_elements(multiprocessors))?;
        let (rounds, mut operations) = (self.options.rounds, 0.0);
        let mma = self.measure(|phase, _| {
            if phase == Phase::Run {
                operations = probe::mma(rounds, &mut out)?;
            }
            Ok(())
        })?;
        let from = self.bytes(self.options.copied)?;
        let mut to = Buffer::<u8>::new(self.device, self.options.copied)?;
        let mut bytes = 0.0;
        let copy = self.measure(|phase, _| {
            if phase == Phase::Run {
                bytes = probe::copy(&from, &mut to)?;
            }
            Ok(())
        })?;
        Ok(Ceilings { mma: operations / mma.median, copy: bytes / copy.median })
    }

    /// The next word of a generator (xorshift64, Marsaglia, Journal of Statistical Software 8(14), 2003).
    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// A buffer of `len` elements, of which the first are made and the others repeat them.
    fn repeated<T: Element>(
        &mut self,
        len: usize,
        mut make: impl FnMut(u64) -> T,
    ) -> Result<Buffer<T>, Error> {
        let some: Vec<T> = (0..len.min(RANDOM)).map(|_| make(self.next())).collect();
        let mut buffer = Buffer::new(self.device, len)?;
        buffer.write(&some)?;
        let mut filled = some.len();
        while filled < len {
            let more = filled.min(len - filled);
            let first = buffer.slice(0, more)?;
            buffer.copy_from(&first, more, filled)?;
            filled += more;
        }
        Ok(buffer)
    }

    /// Codes.
    fn bytes(&mut self, len: usize) -> Result<Buffer<u8>, Error> {
        self.repeated(len, |random| (random >> 32) as u8)
    }

    /// Activations: of either sign, between a half and two in magnitude.
    fn halves(&mut self, len: usize) -> Result<Buffer<bf16>, Error> {
        self.repeated(len, |random| bf16::from_bits(((random >> 32) as u16 & 0x80ff) | 0x3f00))
    }

    /// The same in fp32.
    fn floats(&mut self, len: usize) -> Result<Buffer<f32>, Error> {
        self.repeated(len, |random| f32::from_bits(((random >> 32) as u32 & 0x80ff_ffff) | 0x3f00_0000))
    }

    /// Positive ones.
    fn scales(&mut self, len: usize) -> Result<Buffer<f32>, Error> {
        self.repeated(len, |random| f32::from_bits(((random >> 32) as u32 & 0x00ff_ffff) | 0x3c00_0000))
    }

    /// Room for results.
    fn room<T: Element>(&self, len: usize) -> Result<Buffer<T>, Error> {
        let mut buffer = Buffer::new(self.device, len)?;
        buffer.fill(0)?;
        Ok(buffer)
    }
}
