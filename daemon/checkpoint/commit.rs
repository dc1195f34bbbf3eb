//! How a file or a directory appears whole or not at all, whatever happens in between.
//!
//! ```text
//!   1  mkdir  PLACE/../.tmp-NAME                  nothing under the final name yet
//!   2  each file: create exclusively, write, fsync
//!   3  fsync  .tmp-NAME                           the names inside it are durable
//!   4  read every file back from the medium, compare sizes and SHA-256
//!   5  rename .tmp-NAME → NAME                    the one moment at which it appears
//!   6  fsync  PLACE/..                            the rename is durable; only now is it announced
//! ```
//!
//! An existing directory is replaced by swapping the two names (`RENAME_EXCHANGE`), so that a reader finds the old or
//! the new one at every moment; where a file system cannot swap, the old one steps aside as `.old-NAME` first, and
//! [`settle`] puts it back should the process die between the two renames. A failed fsync condemns the temporary
//! directory: it is removed, and a new attempt starts with new files.

use super::filesystem::{FileSystem, Freshness, Name, NewFile};
use sha2::{Digest, Sha256};
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

const TEMPORARY: &str = ".tmp-";
const ASIDE: &str = ".old-";

/// A file operation failed. What stood under the final name before is still there.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// No space, or the quota is used up.
    #[error(
        "the disk is full: cannot {action} {path} ({source}); free some space and resume, nothing that was written \
         before is lost",
        path = .path.display()
    )]
    DiskFull {
        /// Operation, as a verb.
        action: &'static str,
        /// What was being written.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// Anything else the system said.
    #[error("cannot {action} {path}: {source}", path = .path.display())]
    Io {
        /// Operation, as a verb.
        action: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// What was read back is not what was written.
    #[error("{path} was written, but reads back differently: the disk or its controller is failing", path = .path.display())]
    ReadBack {
        /// The file.
        path: PathBuf,
    },
}

impl FileError {
    /// Wraps the system's error.
    pub fn new(action: &'static str, path: &Path, source: io::Error) -> FileError {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                FileError::DiskFull { action, path, source }
            }
            _ => FileError::Io { action, path, source },
        }
    }
}

/// Names a file's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileRecord {
    /// Name within the directory.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A file being written; counts and hashes what goes into it.
pub(super) struct HashingFile {
    file: Box<dyn NewFile>,
    hasher: Sha256,
    size: u64,
}

impl HashingFile {
    /// Appends all bytes.
    pub fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }
}

/// A directory that is being written beside its place. Dropped before [`Self::publish`] has succeeded, it is removed.
pub(super) struct NewDirectory<'a> {
    files: &'a dyn FileSystem,
    temporary: PathBuf,
    place: PathBuf,
    records: Vec<FileRecord>,
    published: bool,
}

impl<'a> NewDirectory<'a> {
    /// Starts a directory that will appear as `place`, whose parent exists.
    pub fn begin(files: &'a dyn FileSystem, place: &Path) -> Result<NewDirectory<'a>, FileError> {
        let temporary = beside(place, TEMPORARY);
        remove_tree(files, &temporary)?;
        settle(files, place)?;
        files.create_dir(&temporary).map_err(|source| FileError::new("create", &temporary, source))?;
        Ok(NewDirectory {
            files,
            temporary,
            place: place.to_path_buf(),
            records: Vec::new(),
            published: false,
        })
    }

    /// Writes one file and makes it durable.
    pub fn file(
        &mut self,
        name: &str,
        write: impl FnOnce(&mut HashingFile) -> io::Result<()>,
    ) -> Result<(), FileError> {
        let path = self.temporary.join(name);
        let fail = |action, source| FileError::new(action, &path, source);
        let file = self.files.create_file(&path).map_err(|source| fail("create", source))?;
        let mut file = HashingFile { file, hasher: Sha256::new(), size: 0 };
        write(&mut file).map_err(|source| fail("write", source))?;
        file.file.sync().map_err(|source| fail("fsync", source))?;
        let sha256 = hex(&file.hasher.finalize());
        self.records.push(FileRecord { name: name.to_string(), size: file.size, sha256 });
        Ok(())
    }

    /// What was written so far.
    pub fn records(&self) -> &[FileRecord] {
        &self.records
    }

    /// Steps 3 to 6. When this returns, the directory is in place and durable.
    pub fn publish(mut self) -> Result<(), FileError> {
        let files = self.files;
        let parent = parent(&self.place);
        files.sync_dir(&self.temporary).map_err(|source| FileError::new("fsync", &self.temporary, source))?;
        for record in &self.records {
            let path = self.temporary.join(&record.name);
            let read = read_and_hash(files, &path, Freshness::Medium, record.size, |_| {})
                .map_err(|source| FileError::new("read back", &path, source))?;
            if read != (record.size, record.sha256.clone()) {
                return Err(FileError::ReadBack { path });
            }
        }
        let replaced = self.take_place()?;
        if let Err(source) = files.sync_dir(parent) {
            // Not known to be durable: back to what was there before.
            self.give_place_back(replaced);
            return Err(FileError::new("fsync", parent, source));
        }
        self.published = true;
        // The new one stands; what cannot be removed now is removed by the next sweep.
        let _ = match replaced {
            Replaced::Nothing => Ok(()),
            Replaced::Exchanged => remove_tree(files, &self.temporary),
            Replaced::SetAside(aside) => remove_tree(files, &aside),
        };
        Ok(())
    }

    fn take_place(&self) -> Result<Replaced, FileError> {
        let files = self.files;
        let fail = |source| FileError::new("rename into place", &self.place, source);
        match files.rename_new(&self.temporary, &self.place) {
            Ok(()) => return Ok(Replaced::Nothing),
            Err(error) if is_taken(&error) => {}
            Err(source) => return Err(fail(source)),
        }
        match files.exchange(&self.temporary, &self.place) {
            Ok(()) => return Ok(Replaced::Exchanged),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(source) => return Err(fail(source)),
        }
        let aside = beside(&self.place, ASIDE);
        files.rename_new(&self.place, &aside).map_err(fail)?;
        match files.rename_new(&self.temporary, &self.place) {
            Ok(()) => Ok(Replaced::SetAside(aside)),
            Err(source) => {
                let _ = files.rename_new(&aside, &self.place);
                Err(fail(source))
            }
        }
    }

    fn give_place_back(&self, replaced: Replaced) {
        let files = self.files;
        let _ = match replaced {
            Replaced::Nothing => files.rename_new(&self.place, &self.temporary),
            Replaced::Exchanged => files.exchange(&self.temporary, &self.place),
            Replaced::SetAside(aside) => files
                .rename_new(&self.place, &self.temporary)
                .and_then(|()| files.rename_new(&aside, &self.place)),
        };
    }
}

/// What stood in the place of a directory, and where it is now.
enum Replaced {
    Nothing,
    /// Under the temporary name.
    Exchanged,
    /// Under this name.
    SetAside(PathBuf),
}

impl Drop for NewDirectory<'_> {
    fn drop(&mut self) {
        if !self.published {
            let _ = remove_tree(self.files, &self.temporary);
        }
    }
}

fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty)
}

/// The directory that holds `path`.
pub(super) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn beside(place: &Path, prefix: &str) -> PathBuf {
    let mut name = OsString::from(prefix);
    name.push(place.file_name().unwrap_or_else(|| OsStr::new("unnamed")));
    place.with_file_name(name)
}

/// Writes a single file so that `path` holds the old or the new content, never a part, and the new content is durable
/// when this returns.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    atomic_write_on(&super::filesystem::Disk, path, bytes)
}

/// [`atomic_write`] on any file system.
pub(super) fn atomic_write_on(files: &dyn FileSystem, path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let temporary = beside(path, TEMPORARY);
    let written = (|| {
        match files.remove_file(&temporary) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(FileError::new("remove", &temporary, source));
            }
            _ => {}
        }
        let mut file =
            files.create_file(&temporary).map_err(|source| FileError::new("create", &temporary, source))?;
        file.write_all(bytes).map_err(|source| FileError::new("write", path, source))?;
        file.sync().map_err(|source| FileError::new("fsync", path, source))?;
        files
            .rename_over(&temporary, path)
            .map_err(|source| FileError::new("rename into place", path, source))
    })();
    if written.is_err() {
        let _ = files.remove_file(&temporary);
    }
    written?;
    files.sync_dir(parent(path)).map_err(|source| FileError::new("fsync", parent(path), source))
}

/// Removes a file or a directory with all it holds; nothing there is fine.
pub(super) fn remove_tree(files: &dyn FileSystem, path: &Path) -> Result<(), FileError> {
    let fail = |source| FileError::new("remove", path, source);
    match files.list(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => files.remove_file(path).map_err(fail),
        Err(source) => Err(fail(source)),
        Ok(names) => {
            for Name { name, is_directory } in names {
                let inner = path.join(name);
                if is_directory {
                    remove_tree(files, &inner)?;
                } else {
                    files.remove_file(&inner).map_err(|source| FileError::new("remove", &inner, source))?;
                }
            }
            files.remove_dir(path).map_err(fail)
        }
    }
}

/// Takes a directory out of sight before it is removed, so that a half-removed one never stands under a real name.
/// The caller syncs the parent, then removes what this returns.
pub(super) fn set_aside_for_removal(files: &dyn FileSystem, path: &Path) -> Result<PathBuf, FileError> {
    let trash = beside(path, TEMPORARY);
    remove_tree(files, &trash)?;
    files.rename_new(path, &trash).map_err(|source| FileError::new("remove", path, source))?;
    Ok(trash)
}

/// Finishes or undoes an interrupted replacement of `place`: what was set aside comes back when nothing took its place.
fn settle(files: &dyn FileSystem, place: &Path) -> Result<(), FileError> {
    let aside = beside(place, ASIDE);
    match files.rename_new(&aside, place) {
        Ok(()) => {
            let parent = parent(place);
            files.sync_dir(parent).map_err(|source| FileError::new("fsync", parent, source))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if is_taken(&error) => remove_tree(files, &aside),
        Err(source) => Err(FileError::new("restore", place, source)),
    }
}

/// Cleans up in `directory`, which is ours alone, what interrupted writes left behind.
pub(super) fn sweep(files: &dyn FileSystem, directory: &Path) -> Result<(), FileError> {
    let names = files.list(directory).map_err(|source| FileError::new("list", directory, source))?;
    for Name { name, .. } in names {
        let Some(name) = name.to_str() else { continue };
        if let Some(real) = name.strip_prefix(ASIDE) {
            settle(files, &directory.join(real))?;
        } else if name.starts_with(TEMPORARY) {
            remove_tree(files, &directory.join(name))?;
        }
    }
    Ok(())
}

/// Reads a file piece by piece; returns its size and SHA-256. A file of more than `limit` bytes is not read to its end;
/// the size returned is then above `limit`.
pub(super) fn read_and_hash(
    files: &dyn FileSystem,
    path: &Path,
    freshness: Freshness,
    limit: u64,
    mut piece: impl FnMut(&[u8]),
) -> io::Result<(u64, String)> {
    let mut file = files.open(path, freshness)?;
    let mut hasher = Sha256::new();
    let mut size = 0;
    let mut buffer = vec![0; 1 << 16];
    while size <= limit {
        let read = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&buffer[..read]);
        piece(&buffer[..read]);
        size += read as u64;
    }
    Ok((size, hex(&hasher.finalize())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("summary.json");
        atomic_write(&path, b"one").unwrap();
        std::fs::write(dir.path().join(".tmp-summary.json"), b"left by a crash").unwrap();
        atomic_write(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_survives_a_power_cut_at_any_operation() {
        use super::super::simulated::{Fault, Faulty, Medium};
        use std::sync::Arc;
        let path = Path::new("/summary.json");
        let read = |medium: &Medium| {
            let mut content = Vec::<u8>::new();
            read_and_hash(medium, path, Freshness::Cached, 1 << 20, |piece| content.extend(piece)).unwrap();
            content
        };
        let (old, new) = ([b'a'; 100], [b'b'; 90]);
        for operation in 0.. {
            let medium = Medium::new(true);
            atomic_write_on(&medium, path, &old).unwrap();
            let files = Faulty::new(Arc::new(medium.clone()), Fault::Dead(operation));
            let acknowledged = atomic_write_on(&files, path, &new).is_ok();
            for seed in 0..100 {
                let found = read(&medium.power_cut(seed));
                assert!(
                    found == new || (!acknowledged && found == old),
                    "operation {operation}, seed {seed}"
                );
            }
            if acknowledged {
                assert!(operation > 4, "create, write, fsync, rename, fsync: {operation}");
                return;
            }
        }
    }

    #[test]
    fn errors_name_the_path_and_a_full_disk() {
        let missing = Path::new("/nonexistent-directory/x.json");
        let error = atomic_write(missing, b"").unwrap_err();
        assert!(error.to_string().contains("/nonexistent-directory/"), "{error}");
        let full = FileError::new("write", missing, rustix::io::Errno::NOSPC.into());
        assert!(matches!(full, FileError::DiskFull { .. }));
        assert!(full.to_string().contains("the disk is full"), "{full}");
        let quota = FileError::new("write", missing, rustix::io::Errno::DQUOT.into());
        assert!(matches!(quota, FileError::DiskFull { .. }));
    }

    #[test]
    fn a_directory_that_was_set_aside_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let files = super::super::filesystem::Disk;
        std::fs::create_dir(dir.path().join(".old-adapter")).unwrap();
        std::fs::write(dir.path().join(".old-adapter/file"), b"old").unwrap();
        std::fs::create_dir_all(dir.path().join(".tmp-adapter/half")).unwrap();
        sweep(&files, dir.path()).unwrap();
        assert_eq!(std::fs::read(dir.path().join("adapter/file")).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
