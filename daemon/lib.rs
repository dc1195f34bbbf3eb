//! finetuned: fine-tunes language models on the device, inside a thermal and a power budget.
//!
//! The modules are listed in the order in which data flows; an arrow only ever points down this list
//! (`tests/architecture.rs` reads the `use` lines and fails when one points back). `docs/architecture.md` has the
//! picture and the reasons.
#![warn(missing_docs)]

// Base: nothing of ours below these.
pub mod clock;
pub mod config;
pub mod reason;
pub mod units;

// From files to batches.
pub mod data;

// Arithmetic, and the model that is written in it.
pub mod backend;
pub mod model;

// Durable state and the formats others read.
pub mod checkpoint;

// What a run will take.
pub mod plan;

// The training loop.
pub mod train;

// The process that computes.
pub mod worker;

// What the machine can bear, and who is next.
pub mod governor;
pub mod night;
pub mod scheduler;

// Runs as a service, and their face on D-Bus.
pub mod runs;

pub mod bus;

pub mod service;

// What a person types.
pub mod cli;
pub mod ctl;
