//! Durable state, and the formats that others read.
//!
//! ```text
//!  store       checkpoints: commit, find the newest good one, prune      ─┐
//!  peft        adapter/ as PEFT reads it                                  ├─► commit ─► filesystem
//!  trainer_state, metrics, lock                                          ─┘   (how a file or a directory appears
//!  manifest, tensors, state: the files inside a checkpoint                     whole or not at all)
//! ```
//!
//! The promise of this module: what it has reported as written survives a kill and a power cut at any moment, and what
//! is damaged afterwards is noticed before it is used. `docs/formats.md` describes every file.

pub mod filesystem;
pub mod lock;
pub mod metrics;
pub mod peft;
pub mod trainer_state;

mod commit;
mod manifest;
mod state;
mod store;
mod tensors;

#[cfg(test)]
mod simulated;

pub use commit::{FileError, atomic_write};
pub use lock::{LockError, OutputLock};
pub use metrics::{MetricsError, MetricsLog};
pub use peft::{AdapterConfig, PeftError, read_adapter, write_adapter};
pub use state::{Identity, IdentityMismatch, TrainingState};
pub use store::{Checkpoint, CheckpointError, CheckpointRef, Quarantined, Store};
pub use tensors::{NamedTensor, TensorError, TensorRef};
pub use trainer_state::TrainerState;
