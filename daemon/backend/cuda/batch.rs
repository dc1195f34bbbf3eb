//! A micro-batch on the GPU. Its buffers go back to the backend when it is dropped and serve the next one: batches come
//! and go in every micro-step, memory does not.

use crate::backend::Batch;
use finetuned_cuda::Buffer;
use finetuned_cuda::Error;
use finetuned_cuda::memory::Slabs;
use finetuned_cuda::ops::dropout::Sequences;
use std::cell::RefCell;
use std::ops::Deref;
use std::rc::Rc;

/// Room for a micro-batch of up to `capacity` tokens.
pub struct Buffers {
    capacity: usize,
    tokens: Buffer<u32>,
    positions: Buffer<u32>,
    targets: Buffer<i32>,
    labelled: Buffer<u32>,
    cu_seqlens: Buffer<u32>,
    sequence_offsets: Buffer<u32>,
    sequence_keys: Buffer<u64>,
}

impl Buffers {
    /// Bytes of a token in all of them.
    pub const TOKEN: usize = 6 * 4 + 8;

    /// Takes the memory.
    pub fn new(slabs: &mut Slabs, capacity: usize) -> Result<Buffers, Error> {
        Ok(Buffers {
            capacity,
            tokens: slabs.buffer(capacity)?,
            positions: slabs.buffer(capacity)?,
            targets: slabs.buffer(capacity)?,
            labelled: slabs.buffer(capacity)?,
            // No sequence and no example is empty, but for those of a batch of nothing.
            cu_seqlens: slabs.buffer(capacity + 1)?,
            sequence_offsets: slabs.buffer(capacity + 1)?,
            sequence_keys: slabs.buffer(capacity.max(1))?,
        })
    }
}

/// Buffers between two batches.
pub type Pool = Rc<RefCell<Vec<Buffers>>>;

/// Takes from the pool what is large enough, or from `slabs`.
pub fn room(pool: &Pool, slabs: &mut Slabs, wanted: usize) -> Result<Buffers, Error> {
    let mut free = pool.borrow_mut();
    if let Some(i) = free.iter().position(|buffers| buffers.capacity >= wanted) {
        return Ok(free.swap_remove(i));
    }
    drop(free);
    Buffers::new(slabs, wanted)
}

/// A micro-batch on the host and on the GPU.
pub struct CudaBatch {
    host: Batch,
    /// Token ids, `[M]`.
    pub tokens: Buffer<u32>,
    /// Positions, `[M]`.
    pub positions: Buffer<u32>,
    /// The targets of the labelled positions.
    pub targets: Buffer<i32>,
    /// Positions that have a target.
    pub labelled: Buffer<u32>,
    /// Offsets of the examples.
    pub cu_seqlens: Buffer<u32>,
    /// Tokens of the longest example.
    pub longest: usize,
    /// The sequences.
    pub sequences: Sequences,
    buffers: Option<Buffers>,
    pool: Pool,
}

impl CudaBatch {
    /// Copies a batch to the GPU.
    pub fn new(host: Batch, mut buffers: Buffers, pool: Pool) -> Result<CudaBatch, Error> {
        let targets: Vec<i32> = host.labelled.iter().map(|&at| host.targets[at as usize]).collect();
        buffers.tokens.write(&host.tokens)?;
        buffers.positions.write(&host.positions)?;
        buffers.targets.write(&targets)?;
        buffers.labelled.write(&host.labelled)?;
        buffers.cu_seqlens.write(&host.cu_seqlens)?;
        buffers.sequence_offsets.write(&host.sequence_offsets)?;
        buffers.sequence_keys.write(&host.sequence_keys)?;
        let longest = |offsets: &[u32]| offsets.windows(2).map(|ends| ends[1] - ends[0]).max().unwrap_or(0);
        Ok(CudaBatch {
            tokens: buffers.tokens.share(),
            positions: buffers.positions.share(),
            targets: buffers.targets.share(),
            labelled: buffers.labelled.share(),
            cu_seqlens: buffers.cu_seqlens.share(),
            longest: longest(&host.cu_seqlens) as usize,
            sequences: Sequences {
                offsets: buffers.sequence_offsets.share(),
                keys: buffers.sequence_keys.share(),
                count: host.sequence_keys.len(),
                longest: longest(&host.sequence_offsets) as usize,
                tokens: host.len(),
            },
            host,
            buffers: Some(buffers),
            pool,
        })
    }

    /// Number of labelled positions.
    pub fn labelled_positions(&self) -> usize {
        self.host.labelled.len()
    }

    /// What all positions are below.
    pub fn end(&self) -> usize {
        self.host.positions.iter().max().map_or(0, |&last| last as usize + 1)
    }

    /// Number of examples.
    pub fn examples(&self) -> usize {
        self.host.cu_seqlens.len().saturating_sub(1)
    }
}

impl Deref for CudaBatch {
    type Target = Batch;
    fn deref(&self) -> &Batch {
        &self.host
    }
}

impl Drop for CudaBatch {
    fn drop(&mut self) {
        self.pool.borrow_mut().extend(self.buffers.take());
    }
}
