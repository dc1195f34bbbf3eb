//! A safetensors file mapped into memory.
//!
//! ```text
//!   0        8            8 + n
//!   │ n: u64 │ JSON header │ tensors, one after the other, to the end of the file │
//! ```
//!
//! Nothing is read through the mapping that the header has not been checked for: its tensors must cover the rest of the
//! file exactly, without gap or overlap, so a truncated file is found here and not by a signal in the middle of a step.
//! (A file that somebody truncates *later* still ends the process; that is why models are loaded by the worker.)

use crate::backend::{Blob, DenseMatrix, Dtype};
use half::slice::HalfFloatSliceExt;
use memmap2::{Mmap, UncheckedAdvice};
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorInfo};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest header we parse: a hundred thousand tensors take about 10 MiB, and parsing takes several times that.
const MAX_HEADER: u64 = 16 << 20;

/// Why a safetensors file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TensorFileError {
    /// The file cannot be opened or mapped.
    #[error("{}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not what its header says.
    #[error(
        "{}: {reason} (file of {length} bytes); it is damaged or was not copied completely, fetch it again",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        length: u64,
        /// What is wrong.
        reason: String,
    },
}

/// A mapped file whose header has been checked.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Arc<Mmap>,
    metadata: Metadata,
    /// Offset of the first tensor.
    data: usize,
}

impl TensorFile {
    /// Maps `path` and checks its header against its length.
    ///
    /// # Errors
    /// [`TensorFileError`], which names the file.
    pub fn open(path: &Path) -> Result<Self, TensorFileError> {
        let open = |source| TensorFileError::Open { path: path.to_owned(), source };
        // Asked before opening: opening a pipe would wait for its writer.
        if !std::fs::metadata(path).map_err(open)?.is_file() {
            return Err(open(std::io::Error::other("not a regular file")));
        }
        let file = File::open(path).map_err(open)?;
        let length = file.metadata().map_err(open)?.len();
        let damaged = |reason: String| TensorFileError::Damaged { path: path.to_owned(), length, reason };
        if length < 8 {
            return Err(damaged("too short for a safetensors header".into()));
        }
        // SAFETY: the mapping is shared and read-only; what a concurrent writer of the file can do to it is described
        // in the head comment.
        let map = unsafe { Mmap::map(&file) }.map_err(open)?;
        let header = map.first_chunk::<8>().map_or(u64::MAX, |n| u64::from_le_bytes(*n));
        if header > MAX_HEADER || header > length - 8 {
            return Err(damaged(format!("header of {header} bytes")));
        }
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|e| damaged(format!("safetensors header: {e}")))?;
        Ok(TensorFile { path: path.to_owned(), map: Arc::new(map), metadata, data: 8 + header })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header's text and where it starts.
    pub fn header(&self) -> (&[u8], usize) {
        (&self.map[8..self.data], 8)
    }

    /// An entry of the header's free-form table.
    pub fn note(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Names of all tensors, in the order of the file.
    pub fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        self.metadata.info(name).map(|info| Tensor { file: self, info })
    }
}

/// A tensor in a [`TensorFile`].
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    file: &'a TensorFile,
    info: &'a TensorInfo,
}

impl<'a> Tensor<'a> {
    /// The file it lies in.
    pub fn path(&self) -> &'a Path {
        &self.file.path
    }

    /// Element type as the file says it.
    pub fn stored_dtype(&self) -> safetensors::Dtype {
        self.info.dtype
    }

    /// Element type, when it is one that we compute with.
    pub fn dtype(&self) -> Option<Dtype> {
        match self.info.dtype {
            safetensors::Dtype::F32 => Some(Dtype::F32),
            safetensors::Dtype::F16 => Some(Dtype::F16),
            safetensors::Dtype::BF16 => Some(Dtype::Bf16),
            _ => None,
        }
    }

    /// Sizes of the dimensions.
    pub fn shape(&self) -> &'a [usize] {
        &self.info.shape
    }

    /// Its bytes, little-endian.
    pub fn bytes(&self) -> &'a [u8] {
        &self.file.map[self.range()]
    }

    /// Its bytes, shared with the mapping.
    pub fn blob(&self) -> Blob {
        Blob::Mapped(Arc::clone(&self.file.map), self.range())
    }

    /// The tensor as a matrix in the mapping; `None` when it is not a float matrix. Copied when the file has it at an
    /// address that is not a multiple of its element's size.
    pub fn matrix(&self) -> Option<DenseMatrix> {
        let (&[rows, cols], dtype) = (self.shape(), self.dtype()?) else { return None };
        let aligned = self.bytes().as_ptr().align_offset(dtype.size()) == 0;
        let data = if aligned { self.blob() } else { Blob::Owned(self.bytes().into()) };
        Some(DenseMatrix { rows, cols, dtype, data })
    }

    /// Writes elements `start..start + out.len()` to `out` in float32, which is exact; zeros when the tensor is not of
    /// floats.
    pub fn widen(&self, start: usize, out: &mut [f32]) {
        let Some(dtype) = self.dtype() else { return out.fill(0.0) };
        let bytes = &self.bytes()[start * dtype.size()..][..out.len() * dtype.size()];
        match dtype {
            Dtype::F32 => {
                for (v, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *v = f32::from_le_bytes(*b);
                }
            }
            Dtype::Bf16 => {
                for (v, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *v = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
                }
            }
            Dtype::F16 => {
                // Converting a slice uses the processor's instruction, converting one value does not.
                let mut halves = [half::f16::ZERO; 256];
                for (out, bytes) in out.chunks_mut(256).zip(bytes.chunks(512)) {
                    for (h, b) in halves.iter_mut().zip(bytes.as_chunks().0) {
                        *h = half::f16::from_le_bytes(*b);
                    }
                    halves[..out.len()].convert_to_f32_slice(out);
                }
            }
        }
    }

    /// All elements in float32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.shape().iter().product()];
        self.widen(0, &mut values);
        values
    }

    /// Index of the first element that is infinite or NaN. Reads the tensor once, in parallel, without keeping its
    /// pages.
    pub fn first_non_finite(&self) -> Option<usize> {
        const PIECE: usize = 4 << 20;
        let dtype = self.dtype()?;
        let pieces = self.bytes().len().div_ceil(PIECE);
        let found = (0..pieces).into_par_iter().filter_map(|piece| {
            let range = piece * PIECE..((piece + 1) * PIECE).min(self.bytes().len());
            let bytes = &self.bytes()[range.clone()];
            // An exponent of all ones.
            let half = |mask: u16| {
                let all = bytes.as_chunks().0;
                let bad = |b: &[u8; 2]| u16::from_le_bytes(*b) & mask == mask;
                // The fold has no early exit, so it vectorises; the search runs at most once.
                if all.iter().fold(false, |any, b| any | bad(b)) { all.iter().position(bad) } else { None }
            };
            let at = match dtype {
                Dtype::Bf16 => half(0x7f80),
                Dtype::F16 => half(0x7c00),
                Dtype::F32 => bytes
                    .as_chunks()
                    .0
                    .iter()
                    .position(|b| u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000),
            };
            self.release_range(range.clone());
            at.map(|at| range.start / dtype.size() + at)
        });
        found.min()
    }

    /// Gives the tensor's pages back: they count as this process's memory while it has them mapped in. The kernel keeps
    /// what it likes in its cache, and a later access reads again.
    pub fn release(&self) {
        self.release_range(0..self.bytes().len());
    }

    fn release_range(&self, part: Range<usize>) {
        let range = self.range();
        // SAFETY: dropping pages of a shared read-only file mapping only makes the next access read the file again.
        let result = unsafe {
            self.file.map.unchecked_advise_range(
                UncheckedAdvice::DontNeed,
                range.start + part.start,
                part.len(),
            )
        };
        if let Err(error) = result {
            tracing::debug!(path = %self.file.path.display(), %error, "pages could not be given back");
        }
    }

    fn range(&self) -> Range<usize> {
        let (start, end) = self.info.data_offsets;
        self.file.data + start..self.file.data + end
    }
}
