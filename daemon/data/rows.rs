//! Tokenised rows in a file that is mapped into memory.
//!
//! ```text
//! header    128 bytes, see [`Header`]
//! rows      for each row: its tokens (u32 each), then one bit a token saying whether it is learnt
//!           (bit t % 8 of byte t / 8), padded with zeros to 4 bytes
//! index     for each row: 48 bytes, see [`Entry`]; begins at a multiple of 8
//! report    JSON: what was found while the rows were made
//! ```
//!
//! All numbers are little-endian. `digest` in the header is SHA-256 over the SHA-256 of everything behind the header and
//! the header's other fields, and is verified on opening, so a file that was cut off, changed or written by another
//! version is never used: it is made again. A store is written to a temporary file, flushed to the disk and only then
//! renamed to the name that readers look for.
//!
//! Writing needs memory for one batch of rows only (the index goes to a second temporary file first); reading needs
//! what the system keeps of the mapped file.

use bytemuck::{Pod, Zeroable};
use memmap2::Mmap;
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

#[cfg(target_endian = "big")]
compile_error!("token stores are mapped as they lie on the disk: little-endian");

const MAGIC: [u8; 8] = *b"FTTOKENS";
/// Raised whenever the layout, or the tokens made from the same input, change.
pub(super) const VERSION: u32 = 1;
const HEADER: usize = 128;

/// The first 128 bytes.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u32,
    reserved: u32,
    rows: u64,
    tokens: u64,
    trainable: u64,
    index_at: u64,
    report_at: u64,
    report_len: u64,
    /// What the rows were made from.
    key: [u8; 32],
    digest: [u8; 32],
}

/// One row in the index.
#[derive(Clone, Copy, Pod, Zeroable, Debug)]
#[repr(C)]
pub(super) struct Entry {
    /// Byte at which the row begins in the file.
    at: u64,
    /// Line of the data file on which it stands.
    pub line: u64,
    pub tokens: u32,
    /// Learnt tokens.
    pub trainable: u32,
    /// Tokens cut off at the end.
    pub cut: u32,
    /// Which of the data files it is from.
    pub file: u32,
    /// First half of the SHA-256 of the tokens: equal rows have equal digests.
    pub digest: [u8; 16],
}

/// A token store cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The system refused.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The content is not what was written.
    #[error("{path} is damaged ({reason}); delete it, it is made again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io { action, path: path.into(), source }
}

/// Bytes a mask takes, padded so that the next row's tokens are aligned.
fn mask_bytes(tokens: usize) -> usize {
    tokens.div_ceil(8).next_multiple_of(4)
}

/// Which tokens of a row are learnt.
#[derive(Clone, Copy, Debug)]
pub struct Mask<'a> {
    bits: &'a [u8],
    len: usize,
}

impl Mask<'_> {
    /// Whether token `t` is learnt; false behind the end.
    pub fn get(&self, t: usize) -> bool {
        t < self.len && self.bits[t / 8] >> (t % 8) & 1 == 1
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// One flag a token.
    pub fn iter(&self) -> impl Iterator<Item = bool> + '_ {
        (0..self.len).map(|t| self.get(t))
    }
}

/// A name that no other writer of this process, or of another one, has.
pub(super) fn writer_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Writes a store row by row; nothing is left behind when it is dropped before [`Writer::finish`].
pub(super) struct Writer {
    path: PathBuf,
    rows_path: PathBuf,
    index_path: PathBuf,
    rows: Option<BufWriter<File>>,
    index: Option<BufWriter<File>>,
    hash: Sha256,
    at: u64,
    header: Header,
}

impl Writer {
    /// Begins a store that will be called `path`.
    pub fn create(path: &Path, key: [u8; 32]) -> Result<Self, StoreError> {
        let mut header = Header::zeroed();
        (header.magic, header.version, header.key) = (MAGIC, VERSION, key);
        // Two runs may prepare the same data at once: each writes its own file, and the contents are the same.
        let writer = writer_name();
        let beside = |suffix: &str| path.with_extension(format!("{suffix}-{writer}.tmp"));
        let (rows_path, index_path) = (beside("rows"), beside("index"));
        let create = |path: &Path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(path)
                .map_err(io_error("create", path))
        };
        let mut writer = Self {
            path: path.into(),
            rows: Some(BufWriter::with_capacity(1 << 18, create(&rows_path)?)),
            index: None,
            rows_path,
            index_path,
            hash: Sha256::new(),
            at: HEADER as u64,
            header,
        };
        writer.index = Some(BufWriter::with_capacity(1 << 16, create(&writer.index_path)?));
        if let Some(rows) = &mut writer.rows {
            rows.write_all(&[0; HEADER]).map_err(io_error("write", &writer.rows_path))?;
        }
        Ok(writer)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.hash.update(bytes);
        self.at += bytes.len() as u64;
        let Some(rows) = &mut self.rows else { return Ok(()) };
        rows.write_all(bytes).map_err(io_error("write", &self.rows_path))
    }

    /// Appends a row.
    pub fn push(
        &mut self,
        file: u32,
        line: u64,
        tokens: &[u32],
        mask: &[bool],
        cut: u32,
    ) -> Result<(), StoreError> {
        let mut bits = vec![0u8; mask_bytes(tokens.len())];
        for (t, _) in mask.iter().enumerate().filter(|(_, m)| **m) {
            bits[t / 8] |= 1 << (t % 8);
        }
        let bytes: &[u8] = bytemuck::cast_slice(tokens);
        let mut digest = [0; 16];
        digest.copy_from_slice(&Sha256::digest(bytes)[..16]);
        let trainable = mask.iter().filter(|m| **m).count();
        let entry = Entry {
            at: self.at,
            line,
            tokens: tokens.len() as u32,
            trainable: trainable as u32,
            cut,
            file,
            digest,
        };
        self.append(bytes)?;
        self.append(&bits)?;
        self.header.rows += 1;
        self.header.tokens += tokens.len() as u64;
        self.header.trainable += trainable as u64;
        let Some(index) = &mut self.index else { return Ok(()) };
        index.write_all(bytemuck::bytes_of(&entry)).map_err(io_error("write", &self.index_path))
    }

    /// Completes the store, makes it durable and gives it its name.
    pub fn finish(mut self, report: &[u8]) -> Result<(), StoreError> {
        let padding = (self.at.next_multiple_of(8) - self.at) as usize;
        self.append(&[0; 8][..padding])?;
        self.header.index_at = self.at;
        if let Some(index) = self.index.take() {
            let path = self.index_path.clone();
            let (write, read) = (io_error("write", &path), io_error("read", &path));
            let mut index = index.into_inner().map_err(|e| write(e.into_error()))?;
            index.seek(SeekFrom::Start(0)).map_err(&read)?;
            let mut buffer = vec![0; 1 << 16];
            loop {
                let n = index.read(&mut buffer).map_err(&read)?;
                if n == 0 {
                    break;
                }
                self.append(&buffer[..n])?;
            }
        }
        self.header.report_at = self.at;
        self.header.report_len = report.len() as u64;
        self.append(report)?;
        let body: [u8; 32] = std::mem::take(&mut self.hash).finalize().into();
        self.header.digest = digest(&self.header, body);
        let write = io_error("write", &self.rows_path);
        if let Some(rows) = self.rows.take() {
            let mut file = rows.into_inner().map_err(|e| write(e.into_error()))?;
            file.seek(SeekFrom::Start(0)).map_err(&write)?;
            file.write_all(bytemuck::bytes_of(&self.header)).map_err(&write)?;
            file.sync_all().map_err(&write)?;
        }
        fs::rename(&self.rows_path, &self.path).map_err(io_error("rename", &self.rows_path))?;
        let directory = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|d| d.sync_all()).map_err(io_error("flush", directory))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // After `finish` the first is gone already. What cannot be removed is only a leftover in a cache.
        let _ = fs::remove_file(&self.rows_path);
        let _ = fs::remove_file(&self.index_path);
    }
}

fn digest(header: &Header, body: [u8; 32]) -> [u8; 32] {
    let mut header = *header;
    header.digest = [0; 32];
    Sha256::new().chain_update(body).chain_update(bytemuck::bytes_of(&header)).finalize().into()
}

#[derive(Debug)]
enum Backing {
    Mapped(Mmap),
    /// Eight-byte elements, so that it is aligned as a mapping is.
    Memory(Vec<u64>),
}

impl Backing {
    fn bytes(&self) -> &[u8] {
        match self {
            Backing::Mapped(map) => map,
            Backing::Memory(words) => bytemuck::cast_slice(words),
        }
    }
}

/// A verified store.
#[derive(Debug)]
struct Store {
    backing: Backing,
    rows: usize,
    index_at: usize,
    key: [u8; 32],
    report: std::ops::Range<usize>,
}

impl Store {
    fn new(backing: Backing, path: &Path) -> Result<Self, StoreError> {
        let damaged = |reason| StoreError::Damaged { path: path.into(), reason };
        let bytes = backing.bytes();
        if bytes.len() < HEADER {
            return Err(damaged("shorter than its header"));
        }
        let header: Header = bytemuck::pod_read_unaligned(&bytes[..HEADER]);
        if header.magic != MAGIC {
            return Err(damaged("not a token store"));
        }
        if header.version != VERSION {
            return Err(damaged("of another version"));
        }
        if header.digest != digest(&header, Sha256::digest(&bytes[HEADER..]).into()) {
            return Err(damaged("its checksum does not match"));
        }
        // The digest says that this is what we wrote; the bounds are checked all the same, for everything below
        // slices by them.
        let place = |at: u64, len: u64| {
            let (at, len) = (usize::try_from(at).ok()?, usize::try_from(len).ok()?);
            let end = at.checked_add(len)?;
            (at >= HEADER && end <= bytes.len()).then_some(at..end)
        };
        let index_len = header.rows.checked_mul(size_of::<Entry>() as u64);
        let index =
            index_len.and_then(|len| place(header.index_at, len)).filter(|r| r.start.is_multiple_of(8));
        let report = place(header.report_at, header.report_len);
        let (Some(index), Some(report)) = (index, report) else {
            return Err(damaged("its index lies outside of it"));
        };
        let entries: &[Entry] = bytemuck::cast_slice(&bytes[index.clone()]);
        let fits = |e: &Entry| {
            let len = e.tokens as usize * 4 + mask_bytes(e.tokens as usize);
            e.at.is_multiple_of(4) && place(e.at, len as u64).is_some()
        };
        if header.rows > u64::from(u32::MAX) || !entries.iter().all(fits) {
            return Err(damaged("a row lies outside of it"));
        }
        let rows = entries.len();
        Ok(Self { rows, index_at: index.start, key: header.key, report, backing })
    }

    fn entries(&self) -> &[Entry] {
        bytemuck::cast_slice(&self.backing.bytes()[self.index_at..][..self.rows * size_of::<Entry>()])
    }
}

/// Tokenised rows, memory-mapped from a token store file; files larger than memory stream through it.
///
/// Cheap to clone: several views can share one store.
#[derive(Clone, Debug)]
pub struct TokenRows {
    store: Arc<Store>,
    /// Rows of the store that this view has, in its order; all when `None`.
    selection: Option<Arc<[u32]>>,
    tokens: u64,
    trainable: u64,
}

impl TokenRows {
    /// Maps and verifies a store. `Ok(None)` when there is none, or it was made from something else.
    pub(super) fn open(path: &Path, key: [u8; 32]) -> Result<Option<Self>, StoreError> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io_error("open", path)(e)),
        };
        // SAFETY: the file is ours, complete and never written to again: a new store gets a new file by rename. Whoever
        // truncates a file in our cache directory while it is mapped ends the process by SIGBUS, as with any mapping.
        let map = unsafe { Mmap::map(&file) }.map_err(io_error("map", path))?;
        let store = Store::new(Backing::Mapped(map), path)?;
        Ok((store.key == key).then(|| Self::view(Arc::new(store), None)))
    }

    /// Rows that live in memory: tokens, and for each whether it is learnt.
    ///
    /// # Panics
    /// When a row's mask does not have its length.
    pub fn from_examples(examples: &[(Vec<u32>, Vec<bool>)]) -> Self {
        let mut words: Vec<u8> = Vec::new();
        let mut index = Vec::new();
        words.resize(HEADER, 0);
        for (line, (tokens, mask)) in (1..).zip(examples) {
            assert_eq!(tokens.len(), mask.len());
            let learnt = |t: usize| mask[t] && t > 0;
            let trainable = (0..mask.len()).filter(|&t| learnt(t)).count();
            let mut digest = [0; 16];
            digest.copy_from_slice(&Sha256::digest(bytemuck::cast_slice::<u32, u8>(tokens))[..16]);
            let tokens_len = tokens.len() as u32;
            let at = words.len() as u64;
            index.push(Entry {
                at,
                line,
                tokens: tokens_len,
                trainable: trainable as u32,
                cut: 0,
                file: 0,
                digest,
            });
            words.extend_from_slice(bytemuck::cast_slice(tokens));
            let mut bits = vec![0u8; mask_bytes(tokens.len())];
            for t in (0..mask.len()).filter(|&t| learnt(t)) {
                bits[t / 8] |= 1 << (t % 8);
            }
            words.extend_from_slice(&bits);
        }
        words.resize(words.len().next_multiple_of(8), 0);
        let index_at = words.len();
        words.extend_from_slice(bytemuck::cast_slice(&index));
        let end = words.len();
        let memory = words.chunks(8).map(bytemuck::pod_read_unaligned).collect();
        let store = Store {
            backing: Backing::Memory(memory),
            rows: index.len(),
            index_at,
            key: [0; 32],
            report: end..end,
        };
        Self::view(Arc::new(store), None)
    }

    fn view(store: Arc<Store>, selection: Option<Arc<[u32]>>) -> Self {
        let rows = Self { store, selection, tokens: 0, trainable: 0 };
        let (mut tokens, mut trainable) = (0u64, 0u64);
        for i in 0..rows.len() {
            let entry = rows.entry(i);
            tokens += u64::from(entry.tokens);
            trainable += u64::from(entry.trainable);
        }
        Self { tokens, trainable, ..rows }
    }

    /// A view of some rows of this one's store. The numbers are rows of the store.
    pub(super) fn select(&self, rows: Vec<u32>) -> Self {
        Self::view(self.store.clone(), Some(rows.into()))
    }

    /// The JSON that was kept with the rows.
    pub(super) fn stored_report(&self) -> &[u8] {
        &self.store.backing.bytes()[self.store.report.clone()]
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.selection.as_ref().map_or(self.store.rows, |s| s.len())
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn entry(&self, i: usize) -> &Entry {
        let row = self.selection.as_ref().map_or(i, |s| s[i] as usize);
        &self.store.entries()[row]
    }

    /// Tokens of row `i`, and which of them are learnt. The first never is: nothing stands before it.
    pub fn row(&self, i: usize) -> (&[u32], Mask<'_>) {
        let entry = self.entry(i);
        let (at, len) = (entry.at as usize, entry.tokens as usize);
        let bytes = self.store.backing.bytes();
        let mask_at = at + 4 * len;
        let mask = Mask { bits: &bytes[mask_at..mask_at + mask_bytes(len)], len };
        (bytemuck::cast_slice(&bytes[at..mask_at]), mask)
    }

    /// Number of tokens of row `i`.
    pub fn row_len(&self, i: usize) -> usize {
        self.entry(i).tokens as usize
    }

    /// Where row `i` comes from: which of the data files (in the spec's order), and the line, from 1.
    pub fn origin(&self, i: usize) -> (usize, u64) {
        let entry = self.entry(i);
        (entry.file as usize, entry.line)
    }

    /// Tokens of all rows.
    pub fn total_tokens(&self) -> u64 {
        self.tokens
    }

    /// Learnt tokens of all rows.
    pub fn trainable_tokens(&self) -> u64 {
        self.trainable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path) -> [u8; 32] {
        let key = [7; 32];
        let mut writer = Writer::create(path, key).unwrap();
        writer.push(0, 3, &[1, 2, 3], &[false, true, true], 0).unwrap();
        writer.push(1, 9, &[5; 33], &[true; 33], 2).unwrap();
        writer.finish(b"{}").unwrap();
        key
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tokens");
        let key = write(&path);
        let rows = TokenRows::open(&path, key).unwrap().unwrap();
        assert_eq!((rows.len(), rows.total_tokens(), rows.trainable_tokens()), (2, 36, 35));
        let (tokens, mask) = rows.row(0);
        assert_eq!((tokens, mask.iter().collect::<Vec<_>>()), (&[1, 2, 3][..], vec![false, true, true]));
        let (tokens, mask) = rows.row(1);
        assert_eq!((tokens, mask.iter().filter(|m| *m).count(), mask.get(33)), (&[5; 33][..], 33, false));
        assert_eq!((rows.origin(1), rows.stored_report()), ((1, 9), &b"{}"[..]));
        let second = rows.select(vec![1]);
        assert_eq!((second.len(), second.total_tokens(), second.row_len(0)), (1, 33, 33));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "temporary files are gone");
        assert!(TokenRows::open(&path, [8; 32]).unwrap().is_none());
        assert!(TokenRows::open(&dir.path().join("b"), key).unwrap().is_none());
    }

    #[test]
    fn an_unfinished_store_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&dir.path().join("a.tokens"), [0; 32]).unwrap();
        writer.push(0, 1, &[1], &[true], 0).unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tokens");
        let key = write(&path);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&path, &bad).unwrap();
            assert!(matches!(TokenRows::open(&path, key), Err(StoreError::Damaged { .. })), "byte {at}");
        }
        for length in [1, HEADER - 1, HEADER, HEADER + 5, good.len() - 1] {
            fs::write(&path, &good[..length]).unwrap();
            assert!(
                matches!(TokenRows::open(&path, key), Err(StoreError::Damaged { .. })),
                "length {length}"
            );
        }
    }

    #[test]
    fn memory_and_file_hold_the_same() {
        let rows = TokenRows::from_examples(&[
            (vec![1, 2], vec![true, true]),
            (vec![], vec![]),
            (vec![9; 9], vec![true; 9]),
        ]);
        assert_eq!((rows.len(), rows.total_tokens(), rows.trainable_tokens()), (3, 11, 9));
        assert_eq!(rows.row(0).1.iter().collect::<Vec<_>>(), [false, true]);
        assert_eq!(rows.row(2).0, [9; 9]);
    }
}
