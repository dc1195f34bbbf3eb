//! Runs: their states, their directories, and the task that owns them.
//!
//! ```text
//!   clients ──► Runs (a handle) ──requests──► owner ──► record, journal (durable)  ──► views, changes
//!                                              │ ▲
//!                                   launch ──► worker (protocol)
//! ```
//!
//! One task, `owner`, owns every run and every file of `runs/`; everybody else holds a [`Runs`], asks through it and
//! reads [`RunView`]s. A view never runs ahead of the disk: a state is durable before it is shown.

mod copy;
#[cfg(test)]
pub mod fake;
pub mod inputs;
pub mod models;
pub mod state;

mod owner;
mod record;
mod session;
mod view;

pub use owner::{Options, start};
pub use state::{Ask, Refusal, State};
pub use view::{
    Change, Details, Inhibition, Inhibitor, ModelView, PlanRequest, RequestError, RunEnergy, RunView, Runs,
    Status, Submission,
};
