//! What decides which run has the device, and when. Pure: the owner of the runs asks after every event, and acts.

pub mod conditions;
pub mod deadline;
pub mod forecast;
mod queue;
pub mod window;

pub use queue::{Active, Candidate, Turn, turn};
