//! The training loop: schedule, micro-step, step, evaluation, and the run from spec to results; the answers of what was
//! trained, and how fast a step is.

pub mod answer;
pub mod bench;
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
