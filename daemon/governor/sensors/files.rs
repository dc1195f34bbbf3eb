//! Files of the kernel, read without ever waiting and without trusting a byte of them.
//!
//! Everything lies under a root, so that a tree in a temporary directory is a board. Links stay inside that root even
//! when they are absolute, as `/proc/device-tree` and `/etc/nvpmodel.conf` are.

use rustix::fs::{CWD, Dir, Mode, OFlags, ResolveFlags, fstat, open, openat2};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Most that is read of a file of sysfs or procfs, in bytes. An attribute of sysfs is a page at most.
pub const ATTRIBUTE: usize = 4096;

/// Most that is read of a configuration file.
pub const CONFIGURATION: usize = 64 * 1024;

/// Most entries of a directory that are looked at.
const ENTRIES: usize = 1024;

/// Longest name that is taken from a file, in characters.
const NAME: usize = 64;

/// Why there is no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// There is no such file.
    #[error("not there")]
    Missing,
    /// The part is switched off (EAGAIN of a power-gated block).
    #[error("switched off")]
    Offline,
    /// Reading it needs rights.
    #[error("may not be read without more rights")]
    Denied,
    /// It is empty.
    #[error("empty")]
    Empty,
    /// It holds something that it cannot mean.
    #[error("holds {0:?}, which is no sensible value")]
    Nonsense(String),
    /// It is no regular file.
    #[error("is not a regular file")]
    NotAFile,
    /// The kernel or the driver refused.
    #[error("cannot be read: {0}")]
    Failed(Errno),
}

impl Fault {
    /// What an error of `open` means. EAGAIN is no statement about a sensor here.
    fn of_open(errno: Errno) -> Fault {
        match errno {
            Errno::NOENT | Errno::NOTDIR => Fault::Missing,
            Errno::ACCESS | Errno::PERM => Fault::Denied,
            other => Fault::Failed(other),
        }
    }

    /// What an error of `read` means.
    fn of_read(errno: Errno) -> Fault {
        match errno {
            Errno::AGAIN => Fault::Offline,
            Errno::ACCESS | Errno::PERM => Fault::Denied,
            other => Fault::Failed(other),
        }
    }
}

/// Where sensors are read. Paths are relative to the root: `sys/class/hwmon`.
pub trait Files: Send {
    /// The first `limit` bytes of a regular file.
    fn read(&self, path: &str, limit: usize) -> Result<Vec<u8>, Fault>;

    /// Names in a directory, `zone2` before `zone10`; none where it cannot be read.
    fn list(&self, path: &str) -> Vec<String>;
}

/// The files below a directory; `/` is this machine.
#[derive(Clone, Debug)]
pub struct Below {
    root: PathBuf,
}

impl Below {
    /// The files below `root`.
    pub fn new(root: &Path) -> Below {
        Below { root: root.to_path_buf() }
    }

    /// Opens without waiting: a FIFO or a device that somebody put there blocks nobody.
    fn open(&self, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if self.root != Path::new("/") {
            let root = open(&self.root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            match openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
                // A kernel before 5.6, or a filter of system calls.
                Err(Errno::NOSYS | Errno::PERM) => {}
                opened => return opened,
            }
        }
        rustix::fs::openat(CWD, self.root.join(path), flags, Mode::empty())
    }
}

impl Files for Below {
    fn read(&self, path: &str, limit: usize) -> Result<Vec<u8>, Fault> {
        let file = self.open(path, OFlags::empty()).map_err(Fault::of_open)?;
        let status = fstat(&file).map_err(Fault::Failed)?;
        if rustix::fs::FileType::from_raw_mode(status.st_mode) != rustix::fs::FileType::RegularFile {
            return Err(Fault::NotAFile);
        }
        let mut bytes = vec![0; limit];
        let mut filled = 0;
        while filled < limit {
            match rustix::io::read(&file, &mut bytes[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Fault::of_read(errno)),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    fn list(&self, path: &str) -> Vec<String> {
        let Ok(directory) = self.open(path, OFlags::DIRECTORY) else { return Vec::new() };
        let Ok(entries) = Dir::new(directory) else { return Vec::new() };
        let mut names: Vec<String> = entries
            .take(ENTRIES)
            .map_while(Result::ok)
            .filter_map(|entry| entry.file_name().to_str().ok().map(str::to_string))
            .filter(|name| name != "." && name != "..")
            .collect();
        names.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
        names
    }
}

/// What is asked of files, whatever they are.
impl dyn Files + '_ {
    /// The text of a file: what follows a NUL, and white space around the rest, is left out.
    pub fn text(&self, path: &str, limit: usize) -> Result<String, Fault> {
        let bytes = self.read(path, limit)?;
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        Ok(String::from_utf8_lossy(&bytes[..end]).trim().to_string())
    }

    /// A name: one line of printable ASCII (anything else becomes `?`), never empty.
    pub fn name(&self, path: &str) -> Result<String, Fault> {
        let text = self.text(path, ATTRIBUTE)?;
        let line = text.lines().next().unwrap_or_default().trim();
        if line.is_empty() {
            return Err(Fault::Empty);
        }
        Ok(printable(line))
    }

    /// A decimal integer.
    pub fn integer(&self, path: &str) -> Result<i64, Fault> {
        let text = self.text(path, ATTRIBUTE)?;
        if text.is_empty() {
            return Err(Fault::Empty);
        }
        text.parse().map_err(|_| Fault::Nonsense(excerpt(&text)))
    }

    /// An integer within bounds.
    pub fn integer_in(&self, path: &str, bounds: std::ops::RangeInclusive<i64>) -> Result<i64, Fault> {
        let value = self.integer(path)?;
        if bounds.contains(&value) { Ok(value) } else { Err(Fault::Nonsense(value.to_string())) }
    }
}

/// The beginning of a text, for a message.
fn excerpt(text: &str) -> String {
    text.chars().take(20).collect()
}

/// At most [`NAME`] characters, all printable ASCII.
fn printable(text: &str) -> String {
    text.chars().take(NAME).map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn below(directory: &tempfile::TempDir) -> Box<dyn Files> {
        Box::new(Below::new(directory.path()))
    }

    #[test]
    fn errors_of_the_kernel_have_a_meaning() {
        assert_eq!(Fault::of_read(Errno::AGAIN), Fault::Offline);
        assert_eq!(Fault::of_open(Errno::AGAIN), Fault::Failed(Errno::AGAIN));
        assert_eq!(Fault::of_open(Errno::NOENT), Fault::Missing);
        assert_eq!(Fault::of_open(Errno::ACCESS), Fault::Denied);
        for errno in [Errno::IO, Errno::NODEV, Errno::INVAL, Errno::NODATA] {
            assert_eq!(Fault::of_read(errno), Fault::Failed(errno));
        }
    }

    #[test]
    fn only_regular_files_are_read_and_nothing_waits() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("five"), " 5\n").unwrap();
        std::fs::write(directory.path().join("empty"), "").unwrap();
        std::fs::write(directory.path().join("text"), "warm").unwrap();
        std::fs::write(directory.path().join("binary"), b"7\0\xff\xfe").unwrap();
        std::fs::create_dir(directory.path().join("directory")).unwrap();
        rustix::fs::mkfifoat(CWD, directory.path().join("fifo"), Mode::RUSR).unwrap();
        let files = below(&directory);
        assert_eq!(files.integer("five"), Ok(5));
        assert_eq!(files.integer_in("five", 6..=9), Err(Fault::Nonsense("5".into())));
        assert_eq!(files.integer("empty"), Err(Fault::Empty));
        assert_eq!(files.integer("text"), Err(Fault::Nonsense("warm".into())));
        assert_eq!(files.integer("binary"), Ok(7));
        assert_eq!(files.integer("directory"), Err(Fault::NotAFile));
        assert_eq!(files.integer("fifo"), Err(Fault::NotAFile));
        assert_eq!(files.integer("none"), Err(Fault::Missing));
        assert_eq!(files.integer("five/none"), Err(Fault::Missing));
    }

    #[test]
    fn a_file_is_read_up_to_the_limit() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("long"), vec![b'9'; 100_000]).unwrap();
        assert_eq!(below(&directory).read("long", ATTRIBUTE).map(|bytes| bytes.len()), Ok(ATTRIBUTE));
        assert!(matches!(below(&directory).integer("long"), Err(Fault::Nonsense(_))));
    }

    #[test]
    fn links_stay_below_the_root() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("etc")).unwrap();
        std::fs::write(directory.path().join("etc/hostname"), "inside").unwrap();
        symlink("/etc/hostname", directory.path().join("absolute")).unwrap();
        symlink("../../../../../../etc/hostname", directory.path().join("relative")).unwrap();
        let files = below(&directory);
        assert_eq!(files.name("absolute").as_deref(), Ok("inside"));
        assert_eq!(files.name("relative").as_deref(), Ok("inside"));
    }

    #[test]
    fn names_are_printable_and_directories_in_order() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("n10"), "a\x1b[31mb\nc").unwrap();
        std::fs::write(directory.path().join("n2"), "x".repeat(500)).unwrap();
        let files = below(&directory);
        assert_eq!(files.list(""), Vec::<String>::new(), "an empty path names nothing");
        assert_eq!(files.list("."), ["n2", "n10"]);
        assert_eq!(files.name("n10").as_deref(), Ok("a?[31mb"));
        assert_eq!(files.name("n2").map(|name| name.len()), Ok(NAME));
    }
}
