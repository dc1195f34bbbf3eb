//! A probe: some micro-batches of a run are computed and measured, and nothing of it is kept.
//!
//! ```text
//!   one micro-batch, not counted ─► the longest, the shortest, the middle one, quarters, eighths, … ─► one update
//!     (reads the base in)              until they are known (KNOWN, ROUNDS) or LIMIT is over           two of evaluation
//!                                                                                                      one checkpoint
//! ```
//!
//! It costs [`LIMIT`] at most, or `LEAST` micro-batches and the one before where these take longer; a stop is heard
//! between two micro-batches. The memory is that of the run.

use super::prepare::{self, Prepared};
use super::run::{dropout_key, fresh_state, save};
use super::trainer::Trainer;
use super::workload::{self, micro_batches};
use crate::backend::Backend;
use crate::checkpoint::{CheckpointError, Identity, LockError, OutputLock, Store};
use crate::clock::Clock;
use crate::config::spec::Spec;
use crate::data::{EpochPlan, Sequence, TokenRows};
use crate::model::decoder::Decoder;
use crate::model::memory;
use crate::model::work::Work;
use crate::plan::Measured;
use crate::units::Bytes;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

/// How long micro-batches are computed, unless `LEAST` of them take longer.
pub const LIMIT: Duration = Duration::from_secs(10);
/// So many are computed in any case: a line needs more than two points.
const LEAST: usize = 4;
/// Computed so long, and each so often, they are known.
const KNOWN: Duration = Duration::from_secs(2);
const ROUNDS: usize = 3;
/// Different micro-batches that are made; then the first come again.
const DIFFERENT: usize = 33;

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It would not fit.
    #[error("a probe takes the memory of the run: {needed}, and {available} are available")]
    TooLarge {
        /// What the plan says.
        needed: Bytes,
        /// What there is.
        available: Bytes,
    },
    /// There is nothing to compute.
    #[error("the run has no micro-batch to measure")]
    Empty,
    /// It was told to stop.
    #[error("the probe was stopped")]
    Stopped,
    /// Another probe would make both slower.
    #[error(transparent)]
    Busy(#[from] LockError),
    /// The checkpoint could not be written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// Computes and measures. `scratch` is a directory for a checkpoint, of one probe at a time; `stop` is asked before every
/// micro-batch.
///
/// # Errors
/// See [`ProbeError`].
pub fn probe<B: Backend>(
    spec: &Spec,
    backend: B,
    prepared: Prepared,
    scratch: &Path,
    stop: &mut dyn FnMut() -> bool,
    clock: &dyn Clock,
) -> Result<Measured, ProbeError> {
    let _lock = OutputLock::acquire(scratch)?;
    let plan = prepare::memory_plan(spec, &backend, &prepared);
    if let Some(available) = prepare::available_memory(&backend).filter(|available| plan.total() > *available)
    {
        return Err(ProbeError::TooLarge { needed: plan.total(), available });
    }
    let Prepared { tokenizer, data, base, layout, .. } = prepared;
    drop(tokenizer);
    let mut measured = Measured::nothing(workload::setup(spec, &backend, &base, &layout, plan.recompute));
    let work = Work::new(&base.config, &layout, plan.recompute);
    let largest = prepare::largest_micro_batch(spec, &data);
    backend.reserve(memory::step_shape(&base, &layout, largest));
    let decoder = Decoder::new(backend, base);
    let mut trainer = Trainer::new(decoder, layout, spec.run.seed, largest.tokens.max(1), plan.recompute);

    let train =
        Batches::new(spec, &data.train, prepare::sequences_per_step(spec), spec.data.shuffle, |load| {
            work.train(load)
        });
    let first = train.order.first().ok_or(ProbeError::Empty)?.clone();
    if stop() {
        return Err(ProbeError::Stopped);
    }
    let mut labelled = trainer.micro_step(&train.sequences(first), 0.0).labelled;
    let began = clock.monotonic();
    for (i, range) in train.order.iter().cycle().enumerate() {
        let took = clock.monotonic().saturating_sub(began);
        let known = took >= KNOWN && i >= ROUNDS * train.order.len();
        if i >= LEAST && (took >= LIMIT || known) {
            break;
        }
        if stop() {
            return Err(ProbeError::Stopped);
        }
        let started = clock.monotonic();
        let batch = train.sequences(range.clone());
        let found = trainer.micro_step(&batch, 0.0);
        let seconds = (clock.monotonic() - started).as_secs_f64();
        let load = workload::of_sequences(batch.iter().map(|(sequence, _)| sequence));
        measured.train.add(work.train(load), seconds);
        measured.tokens += found.tokens;
        labelled += found.labelled;
    }

    let started = clock.monotonic();
    let norm = trainer.gradient_norm(labelled.max(1));
    if norm.is_finite() {
        let schedule = super::schedule::Schedule::new(&spec.train, 1);
        trainer.update(&spec.train, &schedule, 0, labelled.max(1), norm);
        measured.updates.add((clock.monotonic() - started).as_secs_f64());
    }
    if let Some(rows) = data.eval.as_ref().filter(|rows| !rows.is_empty()) {
        let size = spec.train.micro_batch_size;
        let eval = Batches::new(spec, rows, size, false, |load| work.evaluate(load));
        for range in eval.order.iter().take(2) {
            if stop() {
                return Err(ProbeError::Stopped);
            }
            let started = clock.monotonic();
            let batch = eval.sequences(range.clone());
            trainer.evaluate(&batch, 0.0);
            let seconds = (clock.monotonic() - started).as_secs_f64();
            let load = workload::of_sequences(batch.iter().map(|(sequence, _)| sequence));
            measured.eval.add(work.evaluate(load), seconds);
        }
    }
    let started = clock.monotonic();
    let directory = scratch.join("checkpoints");
    // A crash may have left one.
    let _ = std::fs::remove_dir_all(&directory);
    let saved = checkpoint(&directory, &trainer);
    measured.saves.add((clock.monotonic() - started).as_secs_f64());
    let _ = std::fs::remove_dir_all(&directory);
    saved?;
    Ok(measured)
}

fn checkpoint<B: Backend>(directory: &Path, trainer: &Trainer<B>) -> Result<(), CheckpointError> {
    let nobody = Identity {
        base: String::new(),
        data: String::new(),
        template: String::new(),
        tokenizer: String::new(),
        spec: String::new(),
        init_adapter: None,
        backend: String::new(),
    };
    save(&Store::open(directory)?, &fresh_state(nobody), trainer).map(drop)
}

/// The micro-batches of an epoch, in the order in which they tell most.
struct Batches<'a> {
    rows: &'a TokenRows,
    plan: EpochPlan,
    seed: u64,
    order: Vec<Range<usize>>,
}

impl<'a> Batches<'a> {
    fn new(
        spec: &Spec,
        rows: &'a TokenRows,
        per_step: usize,
        shuffle: bool,
        work: impl Fn(crate::model::work::Load) -> f64,
    ) -> Batches<'a> {
        let data = &spec.data;
        let plan = EpochPlan::new(rows, data.sequence_length, data.packing, shuffle, spec.run.seed, 0);
        let mut batches: Vec<(f64, Range<usize>)> =
            micro_batches(plan.len(), per_step, spec.train.micro_batch_size)
                .map(|range| (work(workload::load(rows, &plan, range.clone(), data.sequence_length)), range))
                .collect();
        batches.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let order = telling(batches.len()).into_iter().filter_map(|i| batches.get(i));
        let order = order.map(|(_, range)| range.clone()).collect();
        Batches { rows, plan, seed: spec.run.seed, order }
    }

    fn sequences(&self, range: Range<usize>) -> Vec<(Sequence, u64)> {
        range.map(|i| (self.plan.sequence(self.rows, i), dropout_key(self.seed, 0, i))).collect()
    }
}

/// Which of `n` sorted things are looked at, and in which order: the last, the first, the middle, quarters, eighths, …
fn telling(n: usize) -> Vec<usize> {
    let Some(last) = n.checked_sub(1) else { return Vec::new() };
    let (mut order, mut seen) = (vec![last], BTreeSet::from([last]));
    if seen.insert(0) {
        order.push(0);
    }
    let mut parts = 2;
    while order.len() < n.min(DIFFERENT) {
        for part in (1..parts).step_by(2) {
            let at = (last as u128 * part as u128 / parts as u128) as usize;
            if order.len() < DIFFERENT && seen.insert(at) {
                order.push(at);
            }
        }
        parts *= 2;
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_are_looked_at_first_and_then_between_them() {
        assert!(telling(0).is_empty());
        assert_eq!(telling(1), [0]);
        assert_eq!(telling(2), [1, 0]);
        assert_eq!(telling(9), [8, 0, 4, 2, 6, 1, 3, 5, 7]);
        for n in [3, 7, 32, 33, 34, 1_000_003] {
            let order = telling(n);
            assert_eq!(order.len(), n.min(DIFFERENT), "{n}");
            assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), order.len(), "each once");
            assert!(order.iter().all(|i| *i < n));
        }
    }
}
