//! What a run will take: what is known of speed and energy, and the page that tells it.
//!
//! ```text
//!   a run, a probe ──Measured──► throughput.jsonl ──┐
//!                                   history         ├─ throughput: Speed, with the error it has shown ──┐
//!   spec, data, base ──► Workload, Facts ───────────┘                                                 ├──► page
//!   hours, quotas, deadline ──► nights (scheduler::forecast) ─────────────────────────────────────────┘
//! ```
//!
//! Where nothing was measured, `roofline` predicts a speed from what the device is, and the page says so.
//!
//! Nothing here computes or reads a model: the trainer makes [`Measured`] and [`Facts`], the worker passes them on, and
//! daemon, command line and client read the same [`page::Page`].

pub mod history;
pub mod page;
pub mod roofline;
pub mod throughput;

pub use page::{Facts, Page};
pub use throughput::{Measured, Record, Setup, Speed, Workload};
