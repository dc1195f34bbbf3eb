//! A run on disk.
//!
//! ```text
//!   <state directory>/
//!     lock                      one daemon at a time
//!     inputs/<sha256>           data files, linked into the runs that use them
//!     models/<name>/            models that were added
//!     runs/<id>/
//!       state.json              the record: where the run stands. Replaced whole
//!       journal.jsonl           what happened, appended
//!       spec.toml               as submitted            spec.resolved.toml   with defaults and the paths in force
//!       inputs/                 links to ../../inputs
//!       metrics.jsonl checkpoints/ adapter/ summary.json trainer_state.json   written by the worker
//!     runs/.incoming-<id>/      being put together: not yet a run          runs/.trash-<id>/   being deleted
//! ```
//!
//! `state.json` is the truth and is durable before anybody is told; the line in the journal follows. A daemon that
//! died between the two finds the record's number ahead of the journal's last and writes the line then.

use super::state::Condition;
use super::view::RunView;
use crate::checkpoint::{FileError, atomic_write};
use crate::reason::Reason;
use crate::units::RunId;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Version of `state.json`. A record of another version is refused and left alone.
const VERSION: u32 = 1;

/// Where runs, inputs and models lie.
#[derive(Clone, Debug)]
pub struct Layout {
    state: PathBuf,
}

impl Layout {
    /// Below a state directory, whose directories are made.
    pub fn create(state: &Path) -> Result<Layout, FileError> {
        let layout = Layout { state: state.to_path_buf() };
        for directory in [layout.runs(), layout.inputs(), layout.models()] {
            std::fs::create_dir_all(&directory)
                .map_err(|source| FileError::new("create", &directory, source))?;
        }
        Ok(layout)
    }

    /// Directory of the runs.
    pub fn runs(&self) -> PathBuf {
        self.state.join("runs")
    }

    /// Directory of a run.
    pub fn run(&self, id: &RunId) -> PathBuf {
        self.runs().join(id.as_str())
    }

    /// Where a run's directory is put together.
    pub fn incoming(&self, id: &RunId) -> PathBuf {
        self.runs().join(format!(".incoming-{id}"))
    }

    /// Where a run's directory is deleted.
    pub fn trash(&self, id: &RunId) -> PathBuf {
        self.runs().join(format!(".trash-{id}"))
    }

    /// Data files by content.
    pub fn inputs(&self) -> PathBuf {
        self.state.join("inputs")
    }

    /// Models that were added.
    pub fn models(&self) -> PathBuf {
        self.state.join("models")
    }
}

/// Where a run stands, as `state.json` holds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`VERSION`].
    version: u32,
    /// Grows with every change of state; the journal has the same number.
    pub sequence: u64,
    /// Id.
    pub id: RunId,
    /// Name, for people.
    pub name: String,
    /// Uid of who submitted it.
    pub owner: u32,
    /// Higher goes first.
    pub priority: i32,
    /// Number in the order of submission.
    pub submitted: u64,
    /// When it was submitted, in microseconds since 1970.
    pub created_us: u64,
    /// When its first attempt began; 0 before.
    pub started_us: u64,
    /// When it ended; 0 before.
    pub finished_us: u64,
    /// When its state last changed.
    pub changed_us: u64,
    /// State, reason, what follows.
    #[serde(flatten)]
    pub condition: Condition,
    /// The base: name of a registered model, or where a passed directory was kept.
    pub model: String,
    /// Attempts begun.
    pub attempts: u32,
    /// Attempts since the last one that got anywhere.
    pub fruitless: u32,
    /// The furthest point from which an attempt was seen to start, or that was durable later.
    pub position: Position,
    /// The last failure, in words.
    pub message: String,
    /// Figures of the last step that was seen.
    pub figures: Figures,
    /// When it should be done, in microseconds since 1970; 0 without a deadline.
    #[serde(default)]
    pub deadline_us: u64,
    /// It will not be done by then, and that is told.
    #[serde(default)]
    pub deadline_at_risk: bool,
}

/// A place in a run: completed steps, and sequences done within the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// Completed steps.
    pub step: u64,
    /// Sequences done within the next step.
    pub within: u64,
}

/// Figures of a run; those of the current attempt run ahead of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Completed steps.
    pub step: u64,
    /// Steps in all; 0 while unknown.
    pub total_steps: u64,
    /// Passes over the data.
    pub epoch: f64,
    /// Training loss of the last step.
    pub loss: Option<f64>,
    /// Last held-out loss.
    pub eval_loss: Option<f64>,
    /// Tokens per second of computing.
    pub tokens_per_second: Option<f64>,
    /// Steps of the last durable checkpoint.
    pub checkpoint_step: Option<u64>,
    /// Seconds a step takes, waiting left out: an average that forgets (weight 1/8 for the newest).
    pub seconds_per_step: Option<f64>,
}

impl Figures {
    /// 0 to 1.
    pub fn progress(&self) -> f64 {
        if self.total_steps == 0 { 0.0 } else { (self.step as f64 / self.total_steps as f64).min(1.0) }
    }
}

/// A line of `journal.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// When, in microseconds since 1970.
    pub time_us: u64,
    /// What it tells.
    pub kind: Kind,
    /// Number of the record that it goes with; only for changes of state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// The new state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<super::State>,
    /// Its reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Completed steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// In words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// What a line of the journal tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The state changed.
    State,
    /// The worker remarked something.
    Note,
    /// A worker was lost.
    Failure,
}

/// Why a directory under `runs/` is not a run.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file could not be read.
    #[error("cannot read {path}: {source}", path = .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is no record.
    #[error("{path} is damaged: {problem}", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The file was written by another version.
    #[error("{path} has version {found}, this finetuned knows {VERSION}", path = .path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
}

impl Record {
    /// A run that was just submitted.
    pub fn submitted(id: RunId, name: String, owner: u32, model: String, now_us: u64) -> Record {
        Record {
            version: VERSION,
            sequence: 1,
            id,
            name,
            owner,
            priority: 0,
            submitted: 0,
            created_us: now_us,
            started_us: 0,
            finished_us: 0,
            changed_us: now_us,
            condition: Condition::submitted(),
            model,
            attempts: 0,
            fruitless: 0,
            position: Position::default(),
            message: String::new(),
            figures: Figures::default(),
            deadline_us: 0,
            deadline_at_risk: false,
        }
    }

    /// Training that is left at the pace of the last steps, in seconds.
    pub fn remaining_seconds(&self) -> Option<u64> {
        let Figures { step, total_steps, seconds_per_step, .. } = self.figures;
        let seconds = seconds_per_step.filter(|_| total_steps > 0)?;
        Some((seconds * total_steps.saturating_sub(step) as f64).ceil() as u64)
    }

    /// What everybody may see of it, but for its energy.
    pub fn view(&self, memory_bytes: u64) -> RunView {
        let figures = &self.figures;
        RunView {
            id: self.id.clone(),
            name: self.name.clone(),
            state: self.condition.state,
            reason: self.condition.reason,
            owner: self.owner,
            priority: self.priority,
            created_us: self.created_us,
            started_us: self.started_us,
            finished_us: self.finished_us,
            step: figures.step,
            total_steps: figures.total_steps,
            epoch: figures.epoch,
            loss: figures.loss,
            eval_loss: figures.eval_loss,
            tokens_per_second: figures.tokens_per_second,
            progress: figures.progress(),
            remaining_seconds: self.remaining_seconds(),
            attempts: self.attempts,
            checkpoint_step: figures.checkpoint_step,
            memory_bytes,
            energy: super::view::RunEnergy::default(),
            deadline_us: self.deadline_us,
            deadline_at_risk: self.deadline_at_risk && !self.condition.state.is_over(),
        }
    }

    /// The line of the journal that goes with this record.
    pub fn entry(&self) -> Entry {
        Entry {
            time_us: self.changed_us,
            kind: Kind::State,
            sequence: Some(self.sequence),
            state: Some(self.condition.state),
            reason: self.condition.reason,
            step: Some(self.figures.step),
            message: if self.condition.state == super::State::Failed {
                self.message.clone()
            } else {
                String::new()
            },
        }
    }

    /// Reads a run's record.
    pub fn read(directory: &Path) -> Result<Record, RecordError> {
        let path = directory.join("state.json");
        let text = std::fs::read(&path).map_err(|source| RecordError::Read { path: path.clone(), source })?;
        let damaged = |problem: String| RecordError::Damaged { path: path.clone(), problem };
        let json: serde_json::Value =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        match json.get("version").and_then(serde_json::Value::as_u64) {
            Some(version) if version == u64::from(VERSION) => {}
            Some(found) => return Err(RecordError::Version { path, found }),
            None => return Err(damaged("it has no version".into())),
        }
        let record: Record = serde_json::from_value(json).map_err(|error| damaged(error.to_string()))?;
        let named = directory.file_name().and_then(|name| name.to_str());
        if named != Some(record.id.as_str()) {
            return Err(damaged(format!("it is the record of run {}", record.id)));
        }
        Ok(record)
    }

    /// Makes the record durable, without a line in the journal.
    pub fn write(&self, directory: &Path) -> Result<(), FileError> {
        let mut json = serde_json::to_vec_pretty(self).map_err(|error| {
            FileError::new("write", &directory.join("state.json"), io::Error::other(error))
        })?;
        json.push(b'\n');
        atomic_write(&directory.join("state.json"), &json)
    }

    /// Makes a change of state durable: the record, then the line.
    pub fn commit(&self, directory: &Path) -> Result<(), FileError> {
        self.write(directory)?;
        append(directory, &self.entry())
    }

    /// Brings the journal to the record: cuts a torn last line, writes the line that is missing.
    pub fn mend(&self, directory: &Path) -> Result<(), FileError> {
        let path = directory.join("journal.jsonl");
        let fail = |source| FileError::new("mend", &path, source);
        let mut file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return append(directory, &self.entry()),
            Err(error) => return Err(fail(error)),
        };
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(fail)?;
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        if whole < text.len() {
            file.set_len(whole as u64).map_err(fail)?;
            file.seek(SeekFrom::End(0)).map_err(fail)?;
            file.sync_data().map_err(fail)?;
        }
        let entries = text[..whole].split(|&byte| byte == b'\n');
        let last = entries
            .filter_map(|line| serde_json::from_slice::<Entry>(line).ok())
            .filter_map(|entry| entry.sequence)
            .max();
        if last.is_none_or(|last| last < self.sequence) { append(directory, &self.entry()) } else { Ok(()) }
    }
}

/// Appends a line to the journal, durably.
pub fn append(directory: &Path, entry: &Entry) -> Result<(), FileError> {
    let path = directory.join("journal.jsonl");
    let fail = |source| FileError::new("append to", &path, source);
    let mut line = serde_json::to_vec(entry).map_err(|error| fail(io::Error::other(error)))?;
    line.push(b'\n');
    let mut file = File::options().append(true).create(true).open(&path).map_err(fail)?;
    file.write_all(&line).and_then(|()| file.sync_data()).map_err(fail)
}

/// Opens a file of a run for a client: for reading, and made empty where it is not there yet.
pub fn open_to_read(path: &Path) -> io::Result<OwnedFd> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            File::options().append(true).create(true).open(path)?;
            File::open(path)
        }
        opened => opened,
    }
    .map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use super::super::state::{Event, State, Then};
    use super::*;

    fn record() -> Record {
        let id = RunId::from_bits([1, 2, 3, 4, 5, 6]);
        Record::submitted(id, "night".into(), 1000, "smollm2".into(), 7)
    }

    fn home() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("010203040506");
        std::fs::create_dir(&home).unwrap();
        (dir, home)
    }

    #[test]
    fn a_record_reads_back_without_its_worker() {
        let (_dir, home) = home();
        let mut record = record();
        record.condition = record.condition.after(Event::Begin).unwrap();
        record.condition = record.condition.after(Event::Stop(Then::Pause, Reason::User)).unwrap();
        record.figures.loss = Some(0.1 + 0.2);
        record.commit(&home).unwrap();
        let back = Record::read(&home).unwrap();
        assert_eq!(back.figures, record.figures);
        assert_eq!((back.condition.state, back.condition.then), (State::Saving, Some(Then::Pause)));
        assert!(!back.condition.worker, "no worker outlives its daemon");
    }

    #[test]
    fn a_record_without_a_deadline_reads_as_one_that_has_none() {
        let (_dir, home) = home();
        let mut record = record();
        (record.deadline_us, record.deadline_at_risk) = (9, true);
        record.write(&home).unwrap();
        assert_eq!(Record::read(&home).unwrap().view(0).deadline_us, 9);
        let text = std::fs::read_to_string(home.join("state.json")).unwrap();
        let older: String = text.lines().filter(|line| !line.contains("deadline")).collect();
        std::fs::write(home.join("state.json"), older.replace("},}", "}}")).unwrap();
        let back = Record::read(&home).unwrap();
        assert_eq!((back.deadline_us, back.deadline_at_risk), (0, false));
    }

    #[test]
    fn what_is_no_record_is_refused_with_its_path() {
        let (_dir, home) = home();
        let says = |text: &str| {
            std::fs::write(home.join("state.json"), text).unwrap();
            Record::read(&home).unwrap_err().to_string()
        };
        assert!(says("{").contains("010203040506/state.json is damaged"));
        assert!(says("{\"version\":2}").contains("has version 2"));
        assert!(says("{}").contains("no version"));
        let mut other = record();
        other.id = RunId::from_bits([0; 6]);
        assert!(says(&serde_json::to_string(&other).unwrap()).contains("record of run 000000000000"));
    }

    #[test]
    fn the_journal_is_brought_to_the_record() {
        let (_dir, home) = home();
        let mut record = record();
        record.commit(&home).unwrap();
        let lines = || std::fs::read_to_string(home.join("journal.jsonl")).unwrap().lines().count();
        record.mend(&home).unwrap();
        assert_eq!(lines(), 1, "nothing was missing");
        // The daemon died after the record and in the middle of the line.
        record.sequence = 2;
        record.condition = record.condition.after(Event::Hold(Reason::Inhibited)).unwrap();
        record.write(&home).unwrap();
        let mut file = File::options().append(true).open(home.join("journal.jsonl")).unwrap();
        file.write_all(b"{\"time_us\":1,\"kin").unwrap();
        record.mend(&home).unwrap();
        assert_eq!(lines(), 2);
        let text = std::fs::read_to_string(home.join("journal.jsonl")).unwrap();
        let last: Entry = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        assert_eq!(last, record.entry());
    }

    #[test]
    fn the_time_left_follows_from_the_pace() {
        let mut record = record();
        assert_eq!(record.view(0).remaining_seconds, None);
        record.figures.total_steps = 100;
        record.figures.step = 40;
        record.figures.seconds_per_step = Some(0.5);
        let view = record.view(9);
        assert_eq!((view.remaining_seconds, view.progress, view.memory_bytes), (Some(30), 0.4, 9));
    }
}
