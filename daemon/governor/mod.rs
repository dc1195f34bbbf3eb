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
pub mod readings;
pub mod sensors;

use crate::reason::Reason;

/// What the governor lets the runs do until its next word.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ruling {
    /// Why nothing may compute; absent when it may.
    pub hold: Option<Reason>,
    /// Share of the time that may be computed, above 0 and at most 1, while there is no hold.
    pub duty: f64,
    /// A held run gives its memory back at once.
    pub release: bool,
}

impl Ruling {
    /// Nothing is in the way.
    pub const FREE: Ruling = Ruling { hold: None, duty: 1.0, release: false };
}
