//! The only door to arithmetic.

pub use frozen::{Absmax, Blob, DenseMatrix, Dtype, FrozenMatrix, Nf4Matrix};

mod frozen;
