//! The training loop: schedule, micro-step, step, evaluation, and the run from spec to results; and the answers of what was
//! trained.

pub mod answer;
pub mod device;
pub mod gate;
pub mod observer;
pub mod prepare;
pub mod probe;
pub mod run;
pub mod schedule;
pub mod survey;
pub mod trainer;
pub mod workload;
