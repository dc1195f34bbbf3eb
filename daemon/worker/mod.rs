//! The process that computes: one per attempt of a run.

pub mod protocol;
