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

/// Room for a micro-batch of up to `capacity` tokens: one buffer, which one copy fills.
pub struct Buffers {
    capacity: usize,
    words: Buffer<u32>,
}

/// Every part begins at a multiple of so many words, 256 bytes.
const ALIGNMENT: usize = 64;

impl Buffers {
    /// Bytes of a token in all parts: its id, position and target, its place among the labelled, the ends of an example
    /// and of a sequence, and a sequence's key.
    pub const TOKEN: usize = 4 * 8;

    /// Takes the memory.
    pub fn new(slabs: &mut Slabs, capacity: usize) -> Result<Buffers, Error> {
        // Six parts of words and one of double words; a list of ends is longer by one, and each may begin later.
        let words = capacity * 8 + 2 + 7 * ALIGNMENT;
        Ok(Buffers { capacity, words: slabs.buffer(words)? })
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
        let parts: [&[u32]; 7] = [
            &host.tokens,
            &host.positions,
            bytemuck::cast_slice(&targets),
            &host.labelled,
            &host.cu_seqlens,
            &host.sequence_offsets,
            bytemuck::cast_slice(&host.sequence_keys),
        ];
        let mut words = Vec::new();
        let mut places = Vec::with_capacity(parts.len());
        for part in parts {
            words.resize(words.len().next_multiple_of(ALIGNMENT), 0);
            places.push((words.len(), part.len()));
            words.extend_from_slice(part);
        }
        buffers.words.write(&words)?;
        let part = |i: usize| {
            let (start, len) = places[i];
            buffers.words.slice(start, len)
        };
        let longest = |offsets: &[u32]| offsets.windows(2).map(|ends| ends[1] - ends[0]).max().unwrap_or(0);
        Ok(CudaBatch {
            tokens: part(0)?,
            positions: part(1)?,
            targets: part(2)?.cast(),
            labelled: part(3)?,
            cu_seqlens: part(4)?,
            longest: longest(&host.cu_seqlens) as usize,
            sequences: Sequences {
                offsets: part(5)?,
                keys: part(6)?.cast(),
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
