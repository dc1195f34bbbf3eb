//! metrics.jsonl: one JSON object a line, appended as the run goes; every object has a `step`.
//!
//! The file is a log, not state: it is synced before each checkpoint, and a resumed run first cuts off what its
//! checkpoint does not know yet, so that in the end each step stands in it once. What a crash tore (a last line without
//! its end, or blocks of zeros after a power cut) can only lie behind the last sync and is cut off with it.

use super::commit::{FileError, atomic_write};
use serde_json::Value;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A metrics file open for appending.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

/// Why a metrics file cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// A record without a step could not be cut off on resuming.
    #[error("a metrics record needs an integer \"step\": {0}")]
    NoStep(Value),
}

impl MetricsLog {
    /// Starts an empty file; what an earlier run left under the name is gone.
    pub fn create(path: &Path) -> Result<MetricsLog, MetricsError> {
        atomic_write(path, b"")?;
        MetricsLog::append_to(path)
    }

    /// Goes on with a file, up to and including the records of `step` (the steps that the checkpoint has completed).
    /// The evaluation after `step` stays only when the checkpoint knows it (`evaluated`): one that was stopped before
    /// it, or in it, evaluates again.
    pub fn resume(path: &Path, step: u64, evaluated: bool) -> Result<MetricsLog, MetricsError> {
        let content = match std::fs::read(path) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return MetricsLog::create(path),
            Err(source) => return Err(FileError::new("read", path, source).into()),
        };
        let kept: Vec<u8> = content
            .split_inclusive(|byte| *byte == b'\n')
            .filter(|line| line.ends_with(b"\n"))
            .filter(|line| {
                let Ok(record) = serde_json::from_slice::<Value>(line) else { return false };
                let unknown = |of| of == step && !evaluated && record.get("eval_loss").is_some();
                record["step"].as_u64().is_some_and(|of| of <= step && !unknown(of))
            })
            .flatten()
            .copied()
            .collect();
        if kept != content {
            atomic_write(path, &kept)?;
        }
        MetricsLog::append_to(path)
    }

    fn append_to(path: &Path) -> Result<MetricsLog, MetricsError> {
        let file = File::options()
            .append(true)
            .create(true)
            .open(path)
            .map_err(|source| FileError::new("open", path, source))?;
        Ok(MetricsLog { path: path.to_path_buf(), file })
    }

    /// Appends one record, in one write.
    pub fn append(&mut self, record: &Value) -> Result<(), MetricsError> {
        if record["step"].as_u64().is_none() {
            return Err(MetricsError::NoStep(record.clone()));
        }
        let line = format!("{record}\n");
        self.file
            .write_all(line.as_bytes())
            .map_err(|source| FileError::new("append to", &self.path, source))?;
        Ok(())
    }

    /// Makes what was appended durable. Call it before a checkpoint is committed.
    pub fn sync(&mut self) -> Result<(), MetricsError> {
        self.file.sync_data().map_err(|source| FileError::new("fsync", &self.path, source))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn steps(path: &Path) -> Vec<u64> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["step"].as_u64().unwrap())
            .collect()
    }

    #[test]
    fn a_resumed_run_has_each_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        for step in 0..=7 {
            log.append(&json!({"step": step, "loss": 0.1})).unwrap();
        }
        drop(log);
        let mut log = MetricsLog::resume(&path, 4, false).unwrap();
        for step in 5..=9 {
            log.append(&json!({"step": step, "loss": 0.1})).unwrap();
        }
        log.sync().unwrap();
        assert_eq!(steps(&path), (0..=9).collect::<Vec<_>>());
    }

    #[test]
    fn an_evaluation_that_will_be_done_again_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let lines =
            "{\"step\":3,\"eval_loss\":2.0}\n{\"step\":4,\"loss\":1.0}\n{\"step\":4,\"eval_loss\":1.5}\n";
        for (evaluated, expected) in [(true, &[3, 4, 4][..]), (false, &[3, 4])] {
            std::fs::write(&path, lines).unwrap();
            MetricsLog::resume(&path, 4, evaluated).unwrap();
            assert_eq!(steps(&path), expected);
        }
    }

    #[test]
    fn what_a_crash_tore_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        for torn in [
            &b"{\"step\":3,\"lo"[..],
            b"{\"step\":3}",
            b"\0\0\0\0",
            b"\0\0\n{\"step\":9}\n",
            b"[]\n7\n\xff\n",
        ] {
            std::fs::write(&path, [b"{\"step\":1}\n{\"step\":2}\n", torn].concat()).unwrap();
            MetricsLog::resume(&path, 3, true).unwrap().append(&json!({"step": 3})).unwrap();
            assert_eq!(steps(&path), [1, 2, 3], "{torn:?}");
        }
    }

    #[test]
    fn a_file_that_is_gone_starts_anew_and_a_record_needs_a_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::resume(&path, 4, true).unwrap();
        log.append(&json!({"step": 5})).unwrap();
        assert!(matches!(log.append(&json!({"loss": 1.0})), Err(MetricsError::NoStep(_))));
        assert_eq!(steps(&path), [5]);
        MetricsLog::create(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }
}
