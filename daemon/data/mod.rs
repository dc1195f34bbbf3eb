//! From files to sequences: sources → records → tokens with a mask → packed sequences in a seeded order.

pub use sequence::{IGNORE, Sequence};

mod sequence;
