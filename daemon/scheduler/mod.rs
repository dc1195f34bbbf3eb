//! What decides which run has the device. Pure: the owner of the runs asks after every event, and acts.

mod queue;

pub use queue::{Active, Candidate, Turn, turn};
