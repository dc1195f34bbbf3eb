//! One process at a time works on an output directory: an flock on `<output>/lock`. The kernel releases it with the
//! process, however that ends, so a lock is never stale. The file holds the holder's process id, for the message only.

use rustix::fs::FlockOperation;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

/// The right to work on an output directory; given up when dropped.
#[derive(Debug)]
pub struct OutputLock {
    /// The file stays: removing it would let two processes lock two files of one name.
    file: File,
}

impl Drop for OutputLock {
    fn drop(&mut self) {
        // Closing alone would not do while a child that is just being started still shares the open file.
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}

/// Why the lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process works there.
    #[error(
        "{directory} is in use by another finetuned ({holder}): wait until it ends, stop it, or choose another \
         --output",
        directory = .directory.display(),
        holder = holder(.pid)
    )]
    Held {
        /// The output directory.
        directory: PathBuf,
        /// The other process, where its id could be read.
        pid: Option<u32>,
    },
    /// The directory or the lock file cannot be used.
    #[error("cannot lock the output directory {directory}: {source}", directory = .directory.display())]
    Io {
        /// The output directory.
        directory: PathBuf,
        /// The system's words.
        source: io::Error,
    },
}

fn holder(pid: &Option<u32>) -> String {
    match pid {
        Some(pid) => format!("process {pid}"),
        None => "process unknown".to_string(),
    }
}

impl OutputLock {
    /// Takes the lock of an output directory, which is created when absent. Does not wait.
    pub fn acquire(directory: &Path) -> Result<OutputLock, LockError> {
        let fail = |source| LockError::Io { directory: directory.to_path_buf(), source };
        std::fs::create_dir_all(directory).map_err(fail)?;
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(directory.join("lock"))
            .map_err(fail)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let _ = file.take(32).read_to_string(&mut text);
                return Err(LockError::Held {
                    directory: directory.to_path_buf(),
                    pid: text.trim().parse().ok(),
                });
            }
            Err(error) => return Err(fail(error.into())),
        }
        // A full disk must not stand in the way: the id only helps the message above.
        let _ = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(OutputLock { file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_holds_it_and_the_third_gets_it() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("runs/one");
        let first = OutputLock::acquire(&output).unwrap();
        let error = OutputLock::acquire(&output).unwrap_err();
        assert!(matches!(&error, LockError::Held { pid: Some(pid), .. } if *pid == std::process::id()));
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
        assert!(error.to_string().contains("runs/one"), "{error}");
        drop(first);
        OutputLock::acquire(&output).unwrap();
    }

    #[test]
    fn a_directory_that_cannot_be_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, b"").unwrap();
        assert!(matches!(OutputLock::acquire(&file.join("output")), Err(LockError::Io { .. })));
    }
}
