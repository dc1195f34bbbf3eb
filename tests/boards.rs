//! The governor's sensors on trees that look like boards: what is read, what happens when a file is missing, broken or
//! moved, and that no content of any file is believed or fatal.

#[path = "boards/arbitrary.rs"]
mod arbitrary;
#[path = "boards/commands.rs"]
mod commands;
#[path = "boards/decisions.rs"]
mod decisions;
#[path = "boards/faults.rs"]
mod faults;
#[path = "boards/tree.rs"]
mod tree;
#[path = "boards/values.rs"]
mod values;
