//! The governor: what the machine can bear, and so how much of the time training may compute.
//!
//! ```text
//!   sysfs under a root ──sensors──► Readings ──control──► Decision (duty, reason) ──► permits
//!                                      │
//!                                      └──energy──► joules per step, run and night
//! ```
//!
//! Reading is in `sensors`, which knows boards; deciding is in `control`, a pure function of state, readings, budget and
//! time.

pub mod control;
pub mod energy;
pub mod readings;
