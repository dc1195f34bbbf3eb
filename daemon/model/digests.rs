//! SHA-256 of large files, remembered: a second start must not read sixteen gigabytes to learn that nothing changed.
//!
//! The memory is `digests.json` in the cache directory. An entry holds while device, inode, size and the times of the
//! last change of content and of status are what they were. One case slips through such a comparison: a file that is
//! rewritten within the same tick of the clock in which it was hashed. As git does for its index, an entry is therefore
//! believed only when the file was last changed a second or more before `digests.json` was written; otherwise the file
//! is hashed again, once. Losing the memory costs time, nothing else: every failure to read or write it is only logged.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const NAME: &str = "digests.json";
const VERSION: u32 = 1;

/// Margin for the granularity of file times, in nanoseconds.
const MARGIN: i64 = 1_000_000_000;

/// What identifies a file's content without reading it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: i64,
    changed_ns: i64,
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        let ns = |seconds: i64, ns: i64| seconds.saturating_mul(1_000_000_000).saturating_add(ns);
        Stamp {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

#[derive(Clone, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    stamp: Stamp,
    sha256: String,
}

#[derive(Serialize, Deserialize)]
struct Memory {
    version: u32,
    files: BTreeMap<String, Entry>,
}

/// Remembered digests.
pub struct Digests {
    dir: PathBuf,
    files: BTreeMap<String, Entry>,
    changed: bool,
}

impl Digests {
    /// Reads the memory in `dir`; an absent, damaged or foreign one is empty.
    pub fn open(dir: &Path) -> Self {
        let mut digests = Digests { dir: dir.to_owned(), files: BTreeMap::new(), changed: false };
        let path = dir.join(NAME);
        let (Ok(metadata), Ok(text)) = (fs::metadata(&path), fs::read(&path)) else { return digests };
        match serde_json::from_slice::<Memory>(&text) {
            Ok(memory) if memory.version == VERSION => {
                let written = Stamp::of(&metadata).modified_ns;
                digests.files = memory.files;
                digests.files.retain(|path, entry| {
                    // Files of the cache itself are renamed into place complete and never written again.
                    entry.stamp.changed_ns.saturating_add(MARGIN) <= written
                        || Path::new(path).parent() == Some(dir)
                });
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "remembered digests are not readable")
            }
        }
        digests
    }

    /// The remembered digest of `path`, if the file is unchanged.
    pub fn recall(&self, path: &Path) -> Option<String> {
        let entry = self.files.get(path.to_str()?)?;
        (Stamp::of(&fs::metadata(path).ok()?) == entry.stamp).then(|| entry.sha256.clone())
    }

    /// Remembers that `path`, as it is now, has this digest.
    pub fn remember(&mut self, path: &Path, sha256: &str) {
        if let (Some(name), Ok(metadata)) = (path.to_str(), fs::metadata(path)) {
            let entry = Entry { stamp: Stamp::of(&metadata), sha256: sha256.to_owned() };
            self.files.insert(name.to_owned(), entry);
            self.changed = true;
        }
    }

    /// The digest of `path` in hexadecimal, and whether it had to be computed. A file that changes while it is read is
    /// not remembered.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn digest(&mut self, path: &Path) -> std::io::Result<(String, bool)> {
        if let Some(digest) = self.recall(path) {
            return Ok((digest, false));
        }
        let mut file = File::open(path)?;
        let before = Stamp::of(&file.metadata()?);
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                n => hasher.update(&buffer[..n]),
            }
        }
        let digest = hex(&hasher.finalize());
        if before == Stamp::of(&fs::metadata(path)?) {
            self.remember(path, &digest);
        }
        Ok((digest, true))
    }

    /// Writes the memory, if it changed, without the files that are gone.
    ///
    /// # Errors
    /// Those of writing; the old memory is intact then.
    pub fn save(&mut self) -> std::io::Result<()> {
        if !self.changed {
            return Ok(());
        }
        let mut files = self.files.clone();
        files.retain(|path, _| fs::metadata(path).is_ok());
        fs::create_dir_all(&self.dir)?;
        let temporary = temporary(&self.dir, NAME);
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(&Memory { version: VERSION, files })?)?;
            file.sync_all()?;
            fs::rename(&temporary, self.dir.join(NAME))
        };
        let result = write();
        if result.is_err() {
            fs::remove_file(&temporary).ok(); // nothing to lose: it is ours and incomplete
        }
        self.changed = result.is_err();
        result
    }
}

/// A name in `dir` that no other writer uses, of this process or another.
pub fn temporary(dir: &Path, name: &str) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    dir.join(format!(".{name}.{}-{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)))
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Moves the memory's own time ahead, as if it had been written later.
    fn age(dir: &Path) {
        let memory = File::options().write(true).open(dir.join(NAME)).unwrap();
        let later = memory.metadata().unwrap().modified().unwrap() + std::time::Duration::from_secs(5);
        memory.set_modified(later).unwrap();
    }

    #[test]
    fn digests_are_remembered_until_the_file_changes() {
        let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = dir.path().join("weights");
        fs::write(&path, "abc").unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let mut digests = Digests::open(cache.path());
        assert_eq!(digests.digest(&path).unwrap(), (abc.into(), true));
        assert_eq!(digests.digest(&path).unwrap(), (abc.into(), false));
        digests.save().unwrap();
        // Written in the same second as the file: not believed.
        assert_eq!(Digests::open(cache.path()).digest(&path).unwrap(), (abc.into(), true));
        age(cache.path());
        let mut digests = Digests::open(cache.path());
        assert_eq!(digests.digest(&path).unwrap(), (abc.into(), false));
        // Same size, other content.
        fs::write(&path, "abd").unwrap();
        let (digest, computed) = digests.digest(&path).unwrap();
        assert!(computed && digest != abc);
    }

    #[test]
    fn damaged_memory_is_empty_memory() {
        let cache = tempfile::tempdir().unwrap();
        let path = cache.path().join("file");
        fs::write(&path, "abc").unwrap();
        for text in ["", "{", "[]", "{\"version\":2,\"files\":{}}", "\u{0}\u{0}"] {
            fs::write(cache.path().join(NAME), text).unwrap();
            let mut digests = Digests::open(cache.path());
            assert!(digests.digest(&path).unwrap().1);
            digests.save().unwrap();
            assert!(Digests::open(cache.path()).recall(&path).is_some());
        }
    }

    #[test]
    fn vanished_files_are_forgotten() {
        let cache = tempfile::tempdir().unwrap();
        let path = cache.path().join("file");
        fs::write(&path, "abc").unwrap();
        let mut digests = Digests::open(cache.path());
        digests.digest(&path).unwrap();
        fs::remove_file(&path).unwrap();
        digests.save().unwrap();
        assert!(!fs::read_to_string(cache.path().join(NAME)).unwrap().contains("file\""));
    }
}
