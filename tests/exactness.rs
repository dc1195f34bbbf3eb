//! The promise of the engine: a run's result is a function of (base, data, spec, seed, backend), to the last bit.
//!
//! A tiny model of random weights is trained for a few steps, again and again, while everything that must not matter is
//! changed: threads, recompute, the split of a batch, stops, kills, damaged checkpoints. What must be equal is the
//! adapter's file, the last checkpoint's weights and moments, and every number of `metrics.jsonl`.

#[path = "exactness/damage.rs"]
mod damage;
#[path = "exactness/fixture.rs"]
mod fixture;
#[path = "exactness/processes.rs"]
mod processes;
#[path = "exactness/refusals.rs"]
mod refusals;
#[path = "exactness/requests.rs"]
mod requests;
#[path = "exactness/same_bits.rs"]
mod same_bits;
