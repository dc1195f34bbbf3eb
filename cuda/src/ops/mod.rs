//! One function an operation: the same functions as those of the CPU backend, on buffers of a device.
//!
//! A function checks every length against the shape, chooses kernel, tile and grid, and launches. An empty shape is
//! nothing to do. `M` is the number of tokens; a buffer may be longer than its shape and is used from the front.

pub mod adamw;
pub mod adapter_gradient;
pub mod attention;
pub mod cached_attention;
pub mod cross_entropy;
pub mod dropout;
pub mod elementwise;
pub mod linear;
pub mod nf4;
pub mod probe;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod small;
pub mod swiglu;

use crate::error::Error;
use crate::memory::{Buffer, Element};

/// Largest grid in x (CUDA C++ Programming Guide, "Compute Capabilities": 2³¹ − 1).
const MOST_BLOCKS: u64 = (1 << 31) - 1;

/// The name of an operation, with the checks that all have in common.
#[derive(Clone, Copy)]
pub(crate) struct Operation(pub &'static str);

impl Operation {
    pub fn error(self, what: impl Into<String>) -> Error {
        Error::Shape { operation: self.0, what: what.into() }
    }

    /// A product of sizes.
    pub fn product(self, sizes: &[usize]) -> Result<usize, Error> {
        sizes
            .iter()
            .try_fold(1usize, |product, &size| product.checked_mul(size))
            .filter(|&product| product <= isize::MAX as usize / 8)
            .ok_or_else(|| self.error(format!("{sizes:?} elements are too many")))
    }

    /// A size as the kernels take it.
    pub fn u32(self, name: &str, size: usize) -> Result<u32, Error> {
        u32::try_from(size).map_err(|_| self.error(format!("{name} is {size}, more than 2^32")))
    }

    /// That a buffer has at least `wanted` elements, at an address that vectors of 16 bytes can be read from.
    pub fn has<T: Element>(self, name: &str, buffer: &Buffer<T>, wanted: usize) -> Result<(), Error> {
        if buffer.len() < wanted {
            return Err(self.error(format!("{name} has {} elements, {wanted} are needed", buffer.len())));
        }
        if !buffer.address().0.is_multiple_of(16) {
            return Err(self.error(format!(
                "{name} starts at {:#x}, not at a multiple of 16 bytes",
                buffer.address().0
            )));
        }
        Ok(())
    }

    /// Blocks that `items` need at so many a block.
    pub fn blocks(self, items: usize, a_block: usize) -> Result<u32, Error> {
        let blocks = items.div_ceil(a_block) as u64;
        if blocks > MOST_BLOCKS {
            return Err(self.error(format!("{blocks} blocks, more than a grid can have")));
        }
        Ok(blocks as u32)
    }
}
