//! Cross-entropy of `cross_entropy.cu`.

use super::Operation;
use crate::error::Error;
use crate::kernels;
use crate::launcher::{Argument, Launch};
use crate::memory::Buffer;

/// Elements from one row of the logits to the next: rows begin at multiples of 32 bytes.
pub fn stride(vocabulary: usize) -> usize {
    vocabulary.next_multiple_of(8)
}

/// −log softmax(row)\[target\] of `rows` rows of logits `[rows, stride(vocabulary)]`, to `loss`, and (if asked) the gradient
/// softmax − onehot in the place of the logits: row r of it is bf16 `[stride]` from the byte where row r of the logits began,
/// with zeros from the vocabulary to the stride. The caller has checked that every target lies inside the vocabulary.
pub fn cross_entropy(
    rows: usize,
    vocabulary: usize,
    logits: &mut Buffer<f32>,
    targets: &Buffer<i32>,
    loss: &mut Buffer<f64>,
    gradient: bool,
) -> Result<(), Error> {
    let operation = Operation("cross_entropy");
    let stride = stride(vocabulary);
    operation.has("logits", logits, operation.product(&[rows, stride])?)?;
    operation.has("targets", targets, rows)?;
    operation.has("loss", loss, rows)?;
    if rows == 0 {
        return Ok(());
    }
    if vocabulary == 0 {
        return Err(operation.error("a vocabulary of nothing"));
    }
    let kernel = if gradient { &kernels::cross_entropy_gradient } else { &kernels::cross_entropy_loss };
    let arguments = [
        loss.output(),
        logits.output(),
        targets.input(),
        Argument::U32(operation.u32("vocabulary", vocabulary)?),
        Argument::U32(operation.u32("stride", stride)?),
    ];
    let grid = [operation.blocks(rows, 1)?, 1, 1];
    loss.device().launch(&Launch { kernel, grid, shared: 0, arguments: &arguments, within: &[] })
}
