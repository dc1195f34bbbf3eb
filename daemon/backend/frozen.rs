//! Frozen matrices of the base as they lie in memory or in a mapped file, before a backend takes them.

use memmap2::Mmap;
use std::ops::Range;
use std::sync::Arc;

/// Bytes that are owned, or a range of a file mapped into memory.
#[derive(Clone, Debug)]
pub enum Blob {
    /// Owned bytes.
    Owned(Arc<[u8]>),
    /// A range of a mapped file.
    Mapped(Arc<Mmap>, Range<usize>),
}

impl Blob {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Blob::Owned(bytes) => bytes,
            Blob::Mapped(map, range) => &map[range.clone()],
        }
    }
}

/// Element type of a dense matrix, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// float32
    F32,
    /// float16
    F16,
    /// bfloat16
    Bf16,
}

impl Dtype {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// A frozen matrix, `[rows, cols]`, row-major: `rows` are outputs, as in `torch.nn.Linear.weight`.
#[derive(Clone, Debug)]
pub enum FrozenMatrix {
    /// As stored.
    Dense(DenseMatrix),
    /// 4-bit NormalFloat.
    Nf4(Nf4Matrix),
}

impl FrozenMatrix {
    /// `(rows, cols)`.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            FrozenMatrix::Dense(m) => (m.rows, m.cols),
            FrozenMatrix::Nf4(m) => (m.rows, m.cols),
        }
    }

    /// Bytes of its values or codes and scales, as stored.
    pub fn bytes(&self) -> u64 {
        match self {
            FrozenMatrix::Dense(m) => m.data.as_bytes().len() as u64,
            FrozenMatrix::Nf4(m) => m.codes.as_bytes().len() as u64 + m.absmax.bytes(),
        }
    }
}

/// A dense frozen matrix.
#[derive(Clone, Debug)]
pub struct DenseMatrix {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Element type.
    pub dtype: Dtype,
    /// `rows * cols * dtype.size()` bytes, row-major.
    pub data: Blob,
}

/// A matrix in bitsandbytes' NF4 layout: the elements in row-major order are cut into blocks of `block` elements
/// (the last may be shorter), each scaled by its absolute maximum.
#[derive(Clone, Debug)]
pub struct Nf4Matrix {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Elements per block; 64 when we quantise, others occur in checkpoints.
    pub block: usize,
    /// Two codes a byte, the first element in the high nibble; `(rows * cols).div_ceil(2)` bytes.
    pub codes: Blob,
    /// One scale per block.
    pub absmax: Absmax,
}

/// Scales of the blocks of an [`Nf4Matrix`]; there are `(rows * cols).div_ceil(block)`.
#[derive(Clone, Debug)]
pub enum Absmax {
    /// One f32 a block, little-endian.
    Plain(Blob),
    /// Double quantisation: `absmax[i] = map[codes[i]] * nested[i / nested_block] + offset`, in f32, in that order.
    Nested {
        /// One code a block.
        codes: Blob,
        /// Values of the codes.
        map: Arc<[f32; 256]>,
        /// One f32 per nested block.
        nested: Arc<[f32]>,
        /// Blocks per nested block (256).
        nested_block: usize,
        /// Mean of the absmax values, subtracted before they were quantised.
        offset: f32,
    },
}

impl Absmax {
    /// Bytes of the scales, as stored.
    pub fn bytes(&self) -> u64 {
        match self {
            Absmax::Plain(blob) => blob.as_bytes().len() as u64,
            Absmax::Nested { codes, map, nested, .. } => {
                (codes.as_bytes().len() + size_of_val(&map[..]) + size_of_val(&nested[..])) as u64
            }
        }
    }
}
