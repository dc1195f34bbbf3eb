//! The only door to arithmetic.

pub use frozen::{Absmax, Blob, DenseMatrix, Dtype, FrozenMatrix, Nf4Matrix};

pub mod nf4;

mod frozen;
