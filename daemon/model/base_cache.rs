//! The quantised base on disk, so that it is quantised once and mapped ever after.
//!
//! One file per (base, settings): `base-<key>.safetensors` in the cache directory, where the key is the SHA-256 of the
//! base's identity, the quantisation settings and the version of this format. It holds the linear weights of the
//! decoder layers under bitsandbytes' names ([`super::bitsandbytes`]), nothing else; embeddings, norms and biases stay
//! in the model's own files. The header has one note, `finetuned-base`:
//!
//! ```text
//!   1 key=<64 hex digits> sha256=<64 hex digits>
//! ```
//!
//! where `sha256` is the digest of the whole file with these 64 digits set to `0`.
//!
//! **Writing.** Under a temporary name, weight by weight while the base is being quantised (the sizes of all parts follow
//! from the shapes, so the header comes first); then the digest is patched in, the file fsynced, renamed, the directory
//! fsynced. A crash leaves at most a temporary file; a lock on it tells it from one that is still being written, and the
//! next writer removes it. Two writers of the same base do not meet: each renames its own complete file.
//!
//! **Reading.** The header is checked against the file's length and the key against the name on every start. The digest
//! is verified once per file, and [`Digests`] remembers that, because hashing 4 GB would cost seconds on every start.

use super::bitsandbytes;
use super::digests::{Digests, hex, temporary};
use super::tensor_file::{TensorFile, TensorFileError};
use crate::backend::Nf4Matrix;
use rustix::fs::FlockOperation;
use safetensors::tensor::{Metadata, TensorInfo};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const NOTE: &str = "finetuned-base";
const VERSION: u32 = 1;
const ZEROS: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// A temporary file younger than this may be one whose writer has not locked it yet.
const ABANDONED_AFTER: Duration = Duration::from_secs(60);

/// Why a cached base is not used. None of these is fatal: the base is quantised again.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The directory or the file cannot be written or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// Directory or file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is not a readable safetensors file.
    #[error(transparent)]
    File(#[from] TensorFileError),
    /// The file is not what its name says, or its digest is wrong.
    #[error("{}: {reason}", path.display())]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
}

/// Name and shape of a weight in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// Full name, as in the model's files.
    pub name: String,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

/// One base in a cache directory.
pub struct BaseCache {
    dir: PathBuf,
    key: String,
}

impl BaseCache {
    /// The place for the base `hash`, quantised to NF4 with or without double quantisation.
    pub fn new(dir: &Path, hash: &str, double_quant: bool) -> Self {
        let settings = format!("finetuned base {VERSION}\n{hash}\nnf4 64 {double_quant} 256\n");
        BaseCache { dir: dir.to_owned(), key: hex(&Sha256::digest(settings)) }
    }

    /// The file, whether it is there or not.
    pub fn path(&self) -> PathBuf {
        self.dir.join(format!("base-{}.safetensors", &self.key[..32]))
    }

    /// Maps the file; `None` when there is none.
    ///
    /// # Errors
    /// [`CacheError`] when the file is there and must not be used.
    pub fn open(&self, digests: &mut Digests) -> Result<Option<TensorFile>, CacheError> {
        let path = self.path();
        if let Err(source) = fs::metadata(&path) {
            return match source.kind() {
                std::io::ErrorKind::NotFound => Ok(None),
                _ => Err(CacheError::Io { path, source }),
            };
        }
        let file = TensorFile::open(&path)?;
        let wrong = |reason| CacheError::Wrong { path: path.clone(), reason };
        let note = file.note(NOTE).ok_or_else(|| wrong("not a cached base"))?;
        let sha256 = note
            .strip_prefix(&format!("{VERSION} key={} sha256=", self.key))
            .filter(|digits| digits.len() == ZEROS.len() && digits.is_ascii())
            .ok_or_else(|| wrong("cached for another base, or by another version"))?;
        if digests.recall(&path).as_deref() != Some(sha256) {
            if digest(&file, sha256).map_err(|source| CacheError::Io { path: path.clone(), source })?
                != sha256
            {
                return Err(wrong("its checksum is wrong: the file was damaged after it was written"));
            }
            digests.remember(&path, sha256);
        }
        Ok(Some(file))
    }

    /// Starts to write the file with `weights`, which must then be appended in this order.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub fn create(&self, weights: &[Weight], double_quant: bool) -> Result<Writer, CacheError> {
        let io = |source| CacheError::Io { path: self.dir.clone(), source };
        fs::create_dir_all(&self.dir).map_err(io)?;
        remove_abandoned(&self.dir);
        let mut tensors = Vec::new();
        let mut end = 0;
        for Weight { name, rows, cols } in weights {
            for (suffix, dtype, shape) in bitsandbytes::layout(*rows, *cols, double_quant) {
                let start = end;
                end += shape.iter().product::<usize>() * dtype.bitsize() / 8;
                tensors.push((
                    format!("{name}{suffix}"),
                    TensorInfo { dtype, shape, data_offsets: (start, end) },
                ));
            }
        }
        let note = format!("{VERSION} key={} sha256={ZEROS}", self.key);
        let metadata = Metadata::new(Some(HashMap::from([(NOTE.to_owned(), note)])), tensors)
            .map_err(|e| io(std::io::Error::other(e)))?;
        let mut header = serde_json::to_vec(&metadata).map_err(|e| io(e.into()))?;
        header.resize(header.len().next_multiple_of(64) + 56, b' '); // the first tensor starts at a multiple of 64
        let digits = find(&header, ZEROS.as_bytes()).ok_or_else(|| io(std::io::Error::other("no digits")))?;

        let temporary = temporary(&self.dir, "base");
        let io = |source| CacheError::Io { path: temporary.clone(), source };
        let file = File::options().write(true).create_new(true).open(&temporary).map_err(io)?;
        let mut writer = Writer {
            out: BufWriter::with_capacity(1 << 20, file),
            hasher: Sha256::new(),
            temporary: Some(temporary.clone()),
            path: self.path(),
            digits: 8 + digits as u64,
        };
        rustix::fs::flock(writer.out.get_ref(), FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| io(e.into()))?;
        writer.write(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        writer.write(&header).map_err(io)?;
        Ok(writer)
    }
}

/// A cache file being written. Dropped before [`Self::commit`], it leaves nothing behind.
pub struct Writer {
    out: BufWriter<File>,
    hasher: Sha256,
    temporary: Option<PathBuf>,
    path: PathBuf,
    /// Where in the file the digest goes.
    digits: u64,
}

impl Writer {
    /// Appends the next weight.
    ///
    /// # Errors
    /// [`CacheError::Io`]; the writer is of no use then.
    pub fn append(&mut self, matrix: &Nf4Matrix) -> Result<(), CacheError> {
        bitsandbytes::parts(matrix, |bytes| self.write(bytes))
            .map_err(|source| CacheError::Io { path: self.path.clone(), source })
    }

    /// Makes the file durable and visible under its name.
    ///
    /// # Errors
    /// [`CacheError::Io`].
    pub fn commit(mut self, digests: &mut Digests) -> Result<(), CacheError> {
        let digest = hex(&std::mem::take(&mut self.hasher).finalize());
        self.finish(&digest).map_err(|source| CacheError::Io { path: self.path.clone(), source })?;
        digests.remember(&self.path, &digest);
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.hasher.update(bytes);
        self.out.write_all(bytes)
    }

    fn finish(&mut self, digest: &str) -> std::io::Result<()> {
        self.out.flush()?;
        let file = self.out.get_ref();
        file.write_all_at(digest.as_bytes(), self.digits)?;
        file.sync_all()?;
        if let Some(temporary) = &self.temporary {
            fs::rename(temporary, &self.path)?;
        }
        self.temporary = None;
        if let Some(dir) = self.path.parent() {
            File::open(dir)?.sync_all()?;
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary
            && let Err(error) = fs::remove_file(temporary)
        {
            tracing::warn!(path = %temporary.display(), %error, "incomplete cache file was not removed");
        }
    }
}

/// Digest of a cache file with its own digits, `sha256`, set to zeros. Reads the file instead of the mapping, whose
/// pages would count as this process's memory.
fn digest(file: &TensorFile, sha256: &str) -> std::io::Result<String> {
    let (header, start) = file.header();
    let mut text = header.to_vec();
    let Some(at) = find(&text, sha256.as_bytes()) else { return Ok(String::new()) };
    text[at..at + ZEROS.len()].copy_from_slice(ZEROS.as_bytes());
    let mut hasher = Sha256::new();
    hasher.update((text.len() as u64).to_le_bytes());
    hasher.update(&text);
    let source = File::open(file.path())?;
    let mut at = (start + text.len()) as u64;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match source.read_at(&mut buffer, at)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => {
                hasher.update(&buffer[..n]);
                at += n as u64;
            }
        }
    }
}

/// Where `needle` first occurs.
fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len()).position(|window| window == needle)
}

/// Removes temporary files whose writer is gone: old ones that nobody holds a lock on.
fn remove_abandoned(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|n| n.starts_with(".base.") && n.ends_with(".tmp"));
        let old = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
        if !ours || old().is_none_or(|age| age < ABANDONED_AFTER) {
            continue;
        }
        if let Ok(file) = File::open(entry.path())
            && rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
            && fs::remove_file(entry.path()).is_ok()
        {
            tracing::info!(path = %entry.path().display(), "removed an incomplete cached base");
        }
    }
}
