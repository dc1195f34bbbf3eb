//! `throughput.jsonl`: what runs and probes took, a JSON object a line, the newest last.
//!
//! Lines are appended and synced; several processes may do so (a lock beside the file keeps them apart). What cannot be
//! read is left out and counted, and a torn last line is closed by the next append. A file that has grown is written
//! anew with the newest records of each configuration. Everything in it can be measured again, so a file that is gone
//! costs a probe and no more.

use super::throughput::{Record, Setup};
use rustix::fs::{FlockOperation, flock};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Name of the file, in the daemon's state directory and in the cache of foreground runs.
pub const NAME: &str = "throughput.jsonl";

/// A file of this size is written anew.
const COMPACT: u64 = 256 << 10;
/// Nobody writes more; what is beyond is not read.
const MOST: u64 = 4 << 20;
/// Records that are kept: of one configuration and machine, and in all.
const KEPT_OF_ONE: usize = 8;
const KEPT: usize = 128;

/// Why the history cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the record of speed {path}: {source}", path = .path.display())]
pub struct HistoryError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// What is on record, oldest first, and how many lines could not be read. A missing file is empty.
///
/// # Errors
/// The file system refuses.
pub fn read(path: &Path) -> Result<(Vec<Record>, usize), HistoryError> {
    let fail = |source| HistoryError { action: "read", path: path.to_path_buf(), source };
    let mut content = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(MOST).read_to_end(&mut content).map_err(fail)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
        Err(error) => return Err(fail(error)),
    };
    Ok(parse(&content))
}

fn parse(content: &[u8]) -> (Vec<Record>, usize) {
    let mut records = Vec::new();
    let mut damaged = 0;
    for line in content.split_inclusive(|byte| *byte == b'\n') {
        match serde_json::from_slice::<Record>(line) {
            Ok(record) if record.is_sound() => records.push(record),
            // An empty line closes one that was torn; the last one may be torn itself.
            _ if line == b"\n" || !line.ends_with(b"\n") => {}
            _ => damaged += 1,
        }
    }
    (records, damaged)
}

/// Adds a record, durable when this returns. One that is not [sound](Record::is_sound) is left out.
///
/// # Errors
/// The file system refuses; what was on record still is.
pub fn append(path: &Path, record: &Record) -> Result<(), HistoryError> {
    if !record.is_sound() {
        return Ok(());
    }
    let fail = |action| move |source| HistoryError { action, path: path.to_path_buf(), source };
    let lock = File::create(path.with_extension("lock")).map_err(fail("lock"))?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|error| fail("lock")(error.into()))?;
    let length = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(fail("read")(error)),
    };
    if length > COMPACT {
        let (mut records, _) = read(path)?;
        records.push(record.clone());
        return rewrite(path, &newest(records)).map_err(fail("write"));
    }
    add(path, record).map_err(fail("write"))
}

fn add(path: &Path, record: &Record) -> io::Result<()> {
    let mut file = File::options().read(true).append(true).create(true).open(path)?;
    let new = file.metadata()?.len() == 0;
    let mut text = line(record)?;
    if is_torn(&mut file)? {
        text.insert(0, '\n');
    }
    file.write_all(text.as_bytes())?;
    file.sync_data()?;
    if new { sync_directory(path) } else { Ok(()) }
}

/// Makes a name durable.
fn sync_directory(path: &Path) -> io::Result<()> {
    match path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

/// Whether the last line has no end.
fn is_torn(file: &mut File) -> io::Result<bool> {
    use std::io::{Seek, SeekFrom};
    if file.metadata()?.len() == 0 {
        return Ok(false);
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last != [b'\n'])
}

fn line(record: &Record) -> io::Result<String> {
    Ok(serde_json::to_string(record).map_err(io::Error::other)? + "\n")
}

/// The records that are kept, in their order.
fn newest(records: Vec<Record>) -> Vec<Record> {
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut kept: Vec<Record> = Vec::new();
    for record in records.into_iter().rev().take(MOST as usize) {
        let count = seen.entry(key(&record)).or_default();
        *count += 1;
        if *count <= KEPT_OF_ONE && kept.len() < KEPT {
            kept.push(record);
        }
    }
    kept.reverse();
    kept
}

fn key(record: &Record) -> String {
    let setup: &Setup = &record.measured.setup;
    format!("{setup:?} {:?}", record.machine)
}

/// Writes a new file in the place of the old one. A crash leaves the old one or the new one.
fn rewrite(path: &Path, records: &[Record]) -> io::Result<()> {
    let beside = path.with_extension("jsonl.new");
    let mut file = File::create(&beside)?;
    for record in records {
        file.write_all(line(record)?.as_bytes())?;
    }
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    sync_directory(path)
}

#[cfg(test)]
mod tests {
    use super::super::throughput::tests::record;
    use super::*;

    #[test]
    fn what_was_added_is_read_whatever_was_torn() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        assert_eq!(read(&path).unwrap(), (Vec::new(), 0));
        let records: Vec<Record> = (0..3).map(|i| record(i, 1.0 + i as f64)).collect();
        for record in &records {
            append(&path, record).unwrap();
        }
        assert_eq!(read(&path).unwrap(), (records.clone(), 0));
        let content = std::fs::read(&path).unwrap();
        for cut in (0..=content.len()).step_by(7) {
            for tail in [&[][..], &[0; 5][..], b"{}\n", "[]\n\u{fffd}".as_bytes()] {
                std::fs::write(&path, [&content[..cut], tail].concat()).unwrap();
                append(&path, &record(9, 1.0)).unwrap();
                let (found, damaged) = read(&path).unwrap();
                let whole = content[..cut].iter().filter(|byte| **byte == b'\n').count();
                assert!(found.len() > whole, "{cut}: {} of {whole}", found.len());
                assert_eq!(found[..whole], records[..whole]);
                assert_eq!(found.last(), Some(&record(9, 1.0)));
                assert!(damaged <= 2, "{cut}: {damaged}");
            }
        }
    }

    #[test]
    fn it_stays_small_and_forgets_the_oldest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let of = |i: u64, base: u64| {
            let mut record = record(i, 1.0);
            record.measured.setup.base = format!("{base:0>60}");
            record
        };
        for i in 0..1200 {
            append(&path, &of(i, i % 3)).unwrap();
        }
        let length = std::fs::metadata(&path).unwrap().len();
        assert!(length < COMPACT + 2048, "{length}");
        let (found, damaged) = read(&path).unwrap();
        assert_eq!((found.last().unwrap().time_us, damaged), (1199, 0));
        assert!((0..3).all(|base| found.iter().filter(|r| **r == of(r.time_us, base)).count() >= 8));
        // Not a number: nothing to write down.
        let mut bad = record(1, 1.0);
        bad.measured.train.seconds = f64::INFINITY;
        append(&path, &bad).unwrap();
        assert_eq!(read(&path).unwrap().0.len(), found.len());
    }

    #[test]
    fn several_processes_may_write_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    (0..25).for_each(|i| append(path, &record(thread * 100 + i, 1.0)).unwrap())
                });
            }
        });
        let (found, damaged) = read(&path).unwrap();
        assert_eq!((found.len(), damaged), (100, 0));
    }
}
