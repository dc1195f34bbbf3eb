//! The records on disk, `nights/<date>.jsonl`, and what is asked of them.
//!
//! ```text
//!   {"night":{"version":1,"date":…,"from_us":…,"to_us":…,"zone":…}}     first
//!   {"windows":[…]}  {"segment":{…}}  {"point":{…}}  {"figures":{…}}     appended and synced, at most every ten seconds
//! ```
//!
//! Of `night`, `windows` and `figures` the last line counts. A segment replaces all that reaches beyond its begin. So a
//! line that is written twice does no harm, and a power cut loses at most what was not synced; a last line that it tore is
//! left out. A file that has grown is written anew, without what later lines replace.

use super::figures::{Figures, Point};
use super::record::{Record, Segment};
use super::report::Report;
use super::{Account, Span, bounds, zone_name};
use jiff::civil::Date;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Time between two syncs.
const SYNC: Duration = Duration::from_secs(10);
/// A file of this size is written anew: a night of syncs appends some megabytes, of which later lines replace most.
const COMPACT: u64 = 2 << 20;
/// A longer file is none of ours; what is behind is left out.
const LONGEST: u64 = 16 << 20;
/// Nights that are kept: a quarter of a year, to compare a season's heat with.
pub const KEPT: usize = 92;
/// Version of the files.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Head {
    version: u32,
    date: String,
    #[serde(flatten)]
    span: Span,
    zone: String,
}

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    Night(Head),
    Windows(Vec<Span>),
    Segment(Segment),
    Point(Point),
    Figures(Box<Figures>),
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum NightError {
    /// No date.
    #[error("{0:?} is no night: give the date of its evening (2026-11-24), \"now\", \"last\", or nothing")]
    NotADate(String),
    /// Nothing is known of it.
    #[error("there is no record of the night {0}")]
    NoSuchNight(String),
    /// A file cannot be read.
    #[error("cannot {action} the record {path}: {source}", path = .path.display())]
    File {
        /// Operation, as a verb.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
}

/// The file of a date.
fn file_of(directory: &Path, date: Date) -> PathBuf {
    directory.join(format!("{date}.jsonl"))
}

/// The page of a date.
pub fn page_of(directory: &Path, date: Date) -> PathBuf {
    directory.join(format!("{date}.html"))
}

/// Dates with a record, in order.
///
/// # Errors
/// The directory cannot be listed. One that is not there holds nothing.
pub fn dates(directory: &Path) -> Result<Vec<Date>, NightError> {
    let fail = |source| NightError::File { action: "list", path: directory.to_path_buf(), source };
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(fail)?,
    };
    let mut dates = Vec::new();
    for entry in entries {
        let name = entry.map_err(fail)?.file_name();
        let stem = name.to_str().and_then(|name| name.strip_suffix(".jsonl"));
        dates.extend(stem.and_then(|stem| stem.parse::<Date>().ok()));
    }
    dates.sort();
    Ok(dates)
}

/// The record of a date; none where there is no file. Without a first line the night is that of `zone`.
///
/// # Errors
/// The file system refuses.
pub fn read(directory: &Path, date: Date, zone: &TimeZone) -> Result<Option<Record>, NightError> {
    let path = file_of(directory, date);
    let fail = |source| NightError::File { action: "read", path: path.clone(), source };
    let mut content = Vec::new();
    match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.and_then(|file| file.take(LONGEST).read_to_end(&mut content)).map_err(fail)?,
    };
    Ok(parse(&content, date, zone))
}

/// The record in a file's content.
pub(super) fn parse(content: &[u8], date: Date, zone: &TimeZone) -> Option<Record> {
    let night = bounds(date, zone)?;
    let mut record = Record::new(date, night, zone_name(zone, night.from));
    let mut begun = false;
    let mut lines = content.split_inclusive(|byte| *byte == b'\n').peekable();
    while let Some(line) = lines.next() {
        let whole = line.ends_with(b"\n");
        let read = serde_json::from_slice::<Line>(line).ok().filter(|_| whole);
        let taken = match read {
            Some(Line::Night(head)) => {
                let fits = head.version == VERSION && head.date == date.to_string() && head.span.length() > 0;
                if fits && !begun {
                    record = Record { damaged: record.damaged, ..Record::new(date, head.span, head.zone) };
                    begun = true;
                }
                fits
            }
            Some(Line::Windows(windows)) => {
                let mut windows = windows;
                windows.sort();
                record.windows.clear();
                record.set_windows(&windows, record.span.from);
                true
            }
            Some(Line::Segment(segment)) => record.restore(segment),
            Some(Line::Point(point)) => {
                record.points.retain(|other| other.at < point.at);
                record.points.push(point);
                true
            }
            Some(Line::Figures(figures)) => {
                record.figures = *figures;
                true
            }
            // The last line may be torn by a power cut; an empty one is the end of a write that failed.
            None => lines.peek().is_none() || line == b"\n",
        };
        record.damaged += usize::from(!taken);
    }
    // Points of a clock that was set back later.
    let through = record.through();
    record.points.retain(|point| point.at < through);
    record.durable = (0, 0);
    Some(record)
}

/// Writes the record of the night that runs.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    /// The file of this date is open.
    open: Option<Open>,
    synced: Option<Duration>,
}

#[derive(Debug)]
struct Open {
    date: Date,
    /// The night as its first line has it.
    night: (Span, String),
    file: File,
    length: u64,
    windows: Vec<Span>,
}

impl Open {
    /// Whether what is new can be added to it.
    fn takes(&self, record: &Record) -> bool {
        let (span, zone) = &self.night;
        self.date == record.date && (*span, zone) == (record.span, &record.zone) && self.length <= COMPACT
    }
}

impl Store {
    /// Below this directory, which is made when something is written.
    pub fn new(directory: PathBuf) -> Store {
        Store { directory, open: None, synced: None }
    }

    /// Where the records are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes what has changed, if the last sync is ten seconds old. Whether it did.
    ///
    /// # Errors
    /// The file system refuses. Nothing is lost yet: the next call writes everything anew.
    pub fn flush(&mut self, record: &mut Record, now: Duration) -> Result<bool, NightError> {
        if self.synced.is_some_and(|synced| now.saturating_sub(synced) < SYNC) {
            return Ok(false);
        }
        // A refusal is tried again in ten seconds, not at once.
        self.synced = Some(now);
        self.sync(record)?;
        Ok(true)
    }

    /// Writes what has changed at once.
    ///
    /// # Errors
    /// As [`Store::flush`].
    pub fn sync(&mut self, record: &mut Record) -> Result<(), NightError> {
        let path = file_of(&self.directory, record.date);
        let open = self.open.take().filter(|open| open.takes(record));
        let written = match open {
            Some(open) => append(open, record),
            None => rewrite(&self.directory, &path, record),
        };
        self.open = Some(written.map_err(|source| NightError::File { action: "write", path, source })?);
        record.durable = (record.segments.len().saturating_sub(1), record.points.len());
        Ok(())
    }

    /// The night is over: its record is written without what later lines replaced. One that turned out to hold nothing
    /// (the clock was wrong) is removed.
    ///
    /// # Errors
    /// As [`Store::flush`].
    pub fn finish(&mut self, record: &mut Record) -> Result<(), NightError> {
        self.open = None;
        let path = file_of(&self.directory, record.date);
        if record.segments.is_empty() {
            return match std::fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    Err(NightError::File { action: "remove", path, source })
                }
                _ => Ok(()),
            };
        }
        self.sync(record)?;
        self.open = None;
        Ok(())
    }

    /// Removes the oldest nights beyond [`KEPT`].
    ///
    /// # Errors
    /// The file system refuses.
    pub fn prune(&self) -> Result<(), NightError> {
        let dates = dates(&self.directory)?;
        for date in dates.iter().take(dates.len().saturating_sub(KEPT)) {
            for path in [page_of(&self.directory, *date), file_of(&self.directory, *date)] {
                match std::fs::remove_file(&path) {
                    Err(source) if source.kind() != io::ErrorKind::NotFound => {
                        return Err(NightError::File { action: "remove", path, source });
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

fn push(text: &mut String, line: &Line) -> io::Result<()> {
    text.push_str(&serde_json::to_string(line).map_err(io::Error::other)?);
    text.push('\n');
    Ok(())
}

/// Lines for what is not durable.
fn changes(record: &Record, windows: Option<&[Span]>) -> io::Result<String> {
    let mut text = String::new();
    if windows != Some(&record.windows[..]) {
        push(&mut text, &Line::Windows(record.windows.clone()))?;
    }
    let (segments, points) = record.durable;
    for segment in record.segments.iter().skip(segments) {
        push(&mut text, &Line::Segment(segment.clone()))?;
    }
    for point in record.points.iter().skip(points) {
        push(&mut text, &Line::Point(point.clone()))?;
    }
    push(&mut text, &Line::Figures(Box::new(record.figures.clone())))?;
    Ok(text)
}

fn append(mut open: Open, record: &Record) -> io::Result<Open> {
    let text = changes(record, Some(&open.windows))?;
    open.file.write_all(text.as_bytes())?;
    open.file.sync_data()?;
    open.length += text.len() as u64;
    open.windows.clone_from(&record.windows);
    Ok(open)
}

/// Writes a new file in the place of the old one. A crash leaves the old file or the new one.
fn rewrite(directory: &Path, path: &Path, record: &mut Record) -> io::Result<Open> {
    if !directory.is_dir() {
        std::fs::create_dir_all(directory)?;
        if let Some(parent) = directory.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            File::open(parent)?.sync_all()?;
        }
    }
    record.durable = (0, 0);
    let mut text = String::new();
    let (date, zone) = (record.date.to_string(), record.zone.clone());
    push(&mut text, &Line::Night(Head { version: VERSION, date, span: record.span, zone }))?;
    text.push_str(&changes(record, None)?);
    let beside = path.with_extension("jsonl.new");
    let mut file = File::create(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    File::open(directory)?.sync_all()?;
    let file = File::options().append(true).open(path)?;
    Ok(Open {
        date: record.date,
        night: (record.span, record.zone.clone()),
        file,
        length: text.len() as u64,
        windows: record.windows.clone(),
    })
}

/// The nights, for who asks for a report.
#[derive(Clone, Debug, Default)]
pub struct Nights {
    directory: PathBuf,
    live: Arc<Mutex<Option<Account>>>,
}

impl Nights {
    /// Those below a directory; the one that runs is put in by whoever observes it.
    pub fn new(directory: PathBuf) -> Nights {
        Nights { directory, live: Arc::default() }
    }

    /// The account of the night that runs.
    pub fn live(&self) -> std::sync::MutexGuard<'_, Option<Account>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The report on a night. `wanted` is a date, `now` (the night that runs), `last` (the one before it that has a
    /// record), or empty: the one that runs if one of its windows has begun, else the last one. Reads files.
    ///
    /// # Errors
    /// [`NightError`].
    pub fn report(&self, wanted: &str) -> Result<Report, NightError> {
        let live = self.live().as_ref().map(|account| account.record().clone());
        let last = |before: Option<Date>| -> Result<Option<Date>, NightError> {
            Ok(dates(&self.directory)?.into_iter().rfind(|date| before.is_none_or(|before| *date < before)))
        };
        let none = |what: &str| NightError::NoSuchNight(what.to_string());
        let now = live.as_ref().map(|record| record.date);
        let date = match wanted {
            "now" => now.ok_or_else(|| none("now"))?,
            "last" => last(now)?.ok_or_else(|| none("before this one"))?,
            "" => match &live {
                Some(record) if record.windows.iter().any(|window| window.from < record.through()) => {
                    record.date
                }
                _ => last(now)?.or(now).ok_or_else(|| none("now"))?,
            },
            text => {
                let date = text.parse().ok().filter(|date: &Date| date.to_string() == text);
                date.ok_or_else(|| NightError::NotADate(text.chars().take(40).collect()))?
            }
        };
        if let Some(live) = live.filter(|live| live.date == date) {
            return Ok(Report::new(&live, false));
        }
        let record = read(&self.directory, date, &TimeZone::system())?;
        let record = record.ok_or_else(|| none(&date.to_string()))?;
        Ok(Report::new(&record, now.is_none_or(|now| date < now)))
    }

    /// The nights with a report, in order. Reads a directory.
    ///
    /// # Errors
    /// [`NightError`].
    pub fn list(&self) -> Result<Vec<Date>, NightError> {
        let mut dates = dates(&self.directory)?;
        dates.extend(self.live().as_ref().map(|account| account.record().date));
        dates.sort();
        dates.dedup();
        Ok(dates)
    }
}
