//! The file operations that durable writing is made of, as a trait, so that tests can stop after any one of them, let
//! one of them fail, or take the power away and forget what was not synced (`simulated`). [`Disk`] is the real one.

use rustix::fs::{Advice, AtFlags, CWD, Mode, OFlags, RenameFlags};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

/// A file that was just created.
pub trait NewFile {
    /// Appends all bytes.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Makes content and size durable (fsync). After an error the content is lost: Linux may drop the dirty pages and
    /// report success the next time, so the file must be given up, never synced again.
    fn sync(&mut self) -> io::Result<()>;
}

/// Where to read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Wherever the kernel has it.
    Cached,
    /// From the medium, as far as the kernel can be asked to: to see what really arrived there.
    Medium,
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    /// The name.
    pub name: OsString,
    /// Whether it is a directory (a link to one is not).
    pub is_directory: bool,
}

/// File operations. Paths are full paths; no operation follows a symbolic link in the last component.
pub trait FileSystem: Send + Sync {
    /// Creates a directory whose parent exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Creates a file; `AlreadyExists` where one is.
    fn create_file(&self, path: &Path) -> io::Result<Box<dyn NewFile>>;
    /// Opens a file for reading.
    fn open(&self, path: &Path, freshness: Freshness) -> io::Result<Box<dyn Read>>;
    /// Names in a directory, sorted.
    fn list(&self, path: &Path) -> io::Result<Vec<Name>>;
    /// Renames; `NotFound` where there is nothing to rename, else `AlreadyExists` (or `DirectoryNotEmpty`) where the
    /// target exists.
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Renames a file over another, atomically.
    fn rename_over(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Swaps two names, atomically. `Unsupported` where the file system cannot.
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// The machine's file systems.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

struct DiskFile(File);

impl NewFile for DiskFile {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }
    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_all()
    }
}

impl FileSystem for Disk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // The umask decides who else may read.
        let file = rustix::fs::openat(CWD, path, flags, Mode::from_raw_mode(0o666))?;
        Ok(Box::new(DiskFile(File::from(file))))
    }

    fn open(&self, path: &Path, freshness: Freshness) -> io::Result<Box<dyn Read>> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::openat(CWD, path, flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        if freshness == Freshness::Medium {
            // Clean pages are dropped, so the read below comes from the device. Advice only: a file system that keeps
            // its pages (tmpfs) still answers correctly.
            let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
        }
        Ok(Box::new(file))
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Name>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(path)? {
            let entry = entry?;
            names.push(Name { name: entry.file_name(), is_directory: entry.file_type()?.is_dir() });
        }
        names.sort();
        Ok(names)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // A file system without the flag (vfat, NFS). Only directories that are not empty come here, and rename(2)
            // refuses to replace a directory that is not empty; what is left open is a target that is an empty
            // directory, which nobody misses.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => std::fs::rename(from, to),
            result => Ok(result?),
        }
    }

    fn rename_over(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        match rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE) {
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::XDEV) => {
                Err(io::ErrorKind::Unsupported.into())
            }
            result => Ok(result?),
        }
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
        Ok(rustix::fs::fsync(&directory)?)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(CWD, path, AtFlags::REMOVEDIR)?)
    }
}
