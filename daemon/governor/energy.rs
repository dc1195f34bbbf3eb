//! Energy: integrated from the meter's power, kept per night and run, and held against the quota.
//!
//! ```text
//!   Readings.power ──Meter──► total (gross, idle's share, time without a meter)
//!                                │ difference between two moments
//!                                ├──► micro-step, step: joules per token
//!                                └──Ledger──► energy.jsonl: totals per night and run ──quota──► hold
//! ```
//!
//! A night goes from noon to noon of local time and has the date of its evening. What the meter did not see is not
//! invented: its time is counted as unmetered.
//!
//! The file has one JSON object a line: the totals of a night and run so far, so that the last line of a pair counts and
//! writing one twice does no harm. Lines are appended and synced at most every ten seconds, so a power cut loses at most
//! the energy of ten seconds. A last line that the cut tore is left out.

use crate::config::budget::Budget;
use crate::governor::readings::{Reading, Readings};
use crate::reason::Reason;
use crate::units::{Joules, RunId, Watts};
use jiff::ZonedDateTime;
use jiff::civil::Date;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Two readings farther apart than this have nothing between them that is known.
const GAP: Duration = Duration::from_secs(5);
/// A machine whose run has been parked for so long is idle.
const SETTLED: Duration = Duration::from_secs(10);
/// Time constant of the idle power's average, s.
const IDLE_AVERAGE: f64 = 60.0;
/// Power beyond this is nonsense, W.
const PLAUSIBLE: std::ops::Range<f64> = 0.0..100_000.0;
/// A meter that is silent for so long cannot keep a quota.
const SILENT: Duration = Duration::from_secs(10);
/// Time between two syncs of the ledger.
pub const SYNC: Duration = Duration::from_secs(10);
/// A ledger of this size, that is also twice as long as when that was last done, is written anew, without the lines that
/// later ones replace.
const COMPACT: u64 = 1 << 20;

/// An amount of energy, and how well it is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Energy {
    /// All of it.
    #[serde(rename = "gross_j")]
    pub gross: Joules,
    /// What the idle machine would have taken in the same time; zero while that is not known.
    #[serde(rename = "idle_j")]
    pub idle: Joules,
    /// Seconds that the meter saw.
    #[serde(rename = "metered_s")]
    pub metered: f64,
    /// Seconds that it did not see: their energy is missing.
    #[serde(rename = "unmetered_s")]
    pub unmetered: f64,
}

impl Energy {
    /// What a quota counts: everything, or what is above idle.
    pub fn counted(&self, gross: bool) -> Joules {
        if gross { self.gross } else { Joules((self.gross.0 - self.idle.0).max(0.0)) }
    }

    /// Joules per token; none without tokens.
    pub fn per_token(&self, tokens: u64, gross: bool) -> Option<Joules> {
        (tokens > 0).then(|| Joules(self.counted(gross).0 / tokens as f64))
    }
}

impl std::ops::Add for Energy {
    type Output = Energy;
    fn add(self, other: Energy) -> Energy {
        Energy {
            gross: self.gross + other.gross,
            idle: self.idle + other.idle,
            metered: self.metered + other.metered,
            unmetered: self.unmetered + other.unmetered,
        }
    }
}

impl std::ops::Sub for Energy {
    type Output = Energy;
    fn sub(self, other: Energy) -> Energy {
        Energy {
            gross: self.gross - other.gross,
            idle: self.idle - other.idle,
            metered: self.metered - other.metered,
            unmetered: self.unmetered - other.unmetered,
        }
    }
}

/// Integrates power.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meter {
    total: Energy,
    /// Last power that was read, and when.
    last: Option<(f64, Duration)>,
    /// Until when time is accounted for.
    at: Option<Duration>,
    /// Power of the machine at rest.
    idle: Option<f64>,
    parked: Option<Duration>,
}

impl Meter {
    /// Takes in one round. `computing` says whether a run had a duty above zero since the round before.
    pub fn step(&mut self, readings: &Readings, computing: bool) {
        let now = readings.at;
        self.parked = (!computing).then(|| self.parked.unwrap_or(now));
        let read = match readings.power {
            Some(Reading::Value { value: Watts(watts), at }) if PLAUSIBLE.contains(&watts) => {
                Some((watts, at))
            }
            _ => None,
        };
        let Some((watts, at)) = read else {
            return self.skip(now);
        };
        match self.last {
            // The same reading again.
            Some((_, last)) if at <= last => return self.skip(now),
            Some((before, last)) if at - last <= GAP => {
                let seconds = (at - last).as_secs_f64();
                self.total.gross.0 += (before + watts) / 2.0 * seconds;
                self.total.idle.0 += self.idle.unwrap_or(0.0).min((before + watts) / 2.0) * seconds;
                self.total.metered += seconds;
            }
            Some((_, last)) => self.total.unmetered += (at - last).as_secs_f64(),
            None => {
                let since = self.at.unwrap_or(at);
                self.total.unmetered += at.saturating_sub(since).as_secs_f64();
            }
        }
        let rested = self.parked.is_some_and(|since| at.saturating_sub(since) >= SETTLED);
        if rested {
            let seconds = self.last.map_or(0.5, |(_, last)| at.saturating_sub(last).as_secs_f64());
            let weight = 1.0 - (-seconds / IDLE_AVERAGE).exp();
            self.idle = Some(self.idle.map_or(watts, |idle| idle + (watts - idle) * weight));
        }
        self.last = Some((watts, at));
        self.at = Some(at);
    }

    /// A round without a new reading. Its time is accounted for with the next one, or, without a meter, now.
    fn skip(&mut self, now: Duration) {
        if self.last.is_none() {
            self.total.unmetered += now.saturating_sub(self.at.unwrap_or(now)).as_secs_f64();
            self.at = Some(now);
        }
    }

    /// Everything until a moment shortly after the last round: the power is taken to have gone on. The difference of
    /// two such totals is the energy of a micro-step, a step or a run.
    pub fn total_at(&self, now: Duration) -> Energy {
        let mut total = self.total;
        let Some((watts, at)) = self.last else { return total };
        let since = now.saturating_sub(at);
        if since <= GAP {
            total.gross.0 += watts * since.as_secs_f64();
            total.idle.0 += self.idle.unwrap_or(0.0).min(watts) * since.as_secs_f64();
            total.metered += since.as_secs_f64();
        } else {
            total.unmetered += since.as_secs_f64();
        }
        total
    }

    /// Power of the machine at rest, once a run was parked for a while.
    pub fn idle(&self) -> Option<Watts> {
        self.idle.map(Watts)
    }

    /// Whether there is a meter, and it was heard lately.
    pub fn sees(&self, now: Duration) -> bool {
        self.last.is_some_and(|(_, at)| now.saturating_sub(at) < SILENT)
    }
}

/// Whether a quota forbids computing: it is used up, or a meter that it needs is silent. To be asked before every
/// micro-step: what is spent is then at most the quota and one micro-step.
///
/// A machine that never had a meter counts nothing, and so never reaches a quota; `BlindToPower` says so.
pub fn quota(budget: &Budget, night: &Energy, run: &Energy, meter: &Meter, now: Duration) -> Option<Reason> {
    let limits = [(budget.energy_per_night, night), (budget.energy_per_run, run)];
    let mut limits = limits.iter().filter_map(|(limit, spent)| limit.map(|limit| (limit, spent))).peekable();
    limits.peek()?;
    if limits.any(|(limit, spent)| spent.counted(budget.energy_gross) >= limit) {
        return Some(Reason::EnergyQuota);
    }
    (meter.last.is_some() && !meter.sees(now)).then_some(Reason::SensorLost)
}

/// The night that a moment belongs to: from noon to noon, named by the date of its evening.
pub fn night_of(now: &ZonedDateTime) -> Date {
    let date = now.date();
    if now.hour() < 12 { date.yesterday().unwrap_or(date) } else { date }
}

/// Totals of one night and run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Energy.
    #[serde(flatten)]
    pub energy: Energy,
    /// Tokens that were trained on.
    #[serde(default)]
    pub tokens: u64,
}

impl Entry {
    fn add(&mut self, other: &Entry) {
        self.energy = self.energy + other.energy;
        self.tokens = self.tokens.saturating_add(other.tokens);
    }
}

/// A line of the file.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    /// `2026-11-24`.
    night: String,
    /// Absent: the time in which no run had the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    run: Option<RunId>,
    #[serde(flatten)]
    entry: Entry,
}

/// Why the ledger cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the energy ledger {path}: {source}", path = .path.display())]
pub struct LedgerError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

type Key = (Date, Option<RunId>);

/// What plans take is booked under this id, which no run has.
pub fn plans() -> RunId {
    RunId::from_bits([0; RunId::LENGTH / 2])
}

/// The durable record.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    length: u64,
    /// How long it was when it was last written anew.
    compacted: u64,
    entries: BTreeMap<Key, Entry>,
    /// Changed since the last sync.
    changed: BTreeSet<Key>,
    synced: Option<Duration>,
    /// The last write failed and may have left half a line.
    torn: bool,
    damaged: usize,
}

impl Ledger {
    /// Opens a ledger, or begins one. The directory must exist.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn open(path: &Path) -> Result<Ledger, LedgerError> {
        let fail = |action| move |source| LedgerError { action, path: path.to_path_buf(), source };
        let content = match std::fs::read(path) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(fail("read")(source)),
        };
        let mut entries = BTreeMap::new();
        let mut damaged = 0;
        let mut lines = content.split_inclusive(|byte| *byte == b'\n').peekable();
        while let Some(line) = lines.next() {
            let whole = line.ends_with(b"\n");
            let read = serde_json::from_slice::<Line>(line).ok().filter(|read| whole && sound(&read.entry));
            let night = read.as_ref().and_then(|read| read.night.parse().ok());
            match night.zip(read) {
                Some((night, read)) => {
                    entries.insert((night, read.run), read.entry);
                }
                // The last line may be torn by a power cut; an empty one is the end of a write that failed.
                _ if lines.peek().is_none() || line == b"\n" => {}
                _ => damaged += 1,
            }
        }
        // Without room it goes on behind what is there: a full disk must not keep the daemon from starting.
        let (file, torn) = match rewrite(path, &entries) {
            Ok(file) => (file, false),
            Err(error) => {
                tracing::warn!(%error, "the energy ledger was not written anew");
                let opened = File::options().append(true).create(true).open(path);
                (opened.map_err(fail("open"))?, true)
            }
        };
        let length = file.metadata().map_err(fail("read"))?.len();
        Ok(Ledger {
            path: path.to_path_buf(),
            file,
            length,
            compacted: if torn { 0 } else { length },
            entries,
            changed: BTreeSet::new(),
            synced: None,
            torn,
            damaged,
        })
    }

    /// Lines that could not be read, beside a torn last one.
    pub fn damaged(&self) -> usize {
        self.damaged
    }

    /// Adds what was spent and done since the last time. Durable after the next [`Ledger::flush`].
    pub fn add(&mut self, night: Date, run: Option<&RunId>, energy: Energy, tokens: u64) {
        let more = Entry { energy, tokens };
        if !sound(&more) {
            return;
        }
        let key = (night, run.cloned());
        self.entries.entry(key.clone()).or_default().add(&more);
        self.changed.insert(key);
    }

    /// Writes what has changed, if the last sync is ten seconds old. Whether it did.
    ///
    /// # Errors
    /// The file system refuses. Nothing is lost yet: the next call writes the totals again.
    pub fn flush(&mut self, now: Duration) -> Result<bool, LedgerError> {
        let due = self.synced.is_none_or(|synced| now.saturating_sub(synced) >= SYNC);
        if !due || self.changed.is_empty() {
            return Ok(false);
        }
        // A refusal is tried again in ten seconds, not at once.
        self.synced = Some(now);
        self.sync()?;
        Ok(true)
    }

    /// Writes what has changed at once: before the daemon ends, or a run does.
    ///
    /// # Errors
    /// As [`Ledger::flush`].
    pub fn sync(&mut self) -> Result<(), LedgerError> {
        let written = if self.length > COMPACT.max(self.compacted.saturating_mul(2)) {
            rewrite(&self.path, &self.entries).and_then(|file| {
                self.length = file.metadata()?.len();
                self.compacted = self.length;
                self.file = file;
                Ok(())
            })
        } else {
            self.append()
        };
        self.torn = written.is_err();
        written.map_err(|source| LedgerError { action: "write", path: self.path.clone(), source })?;
        self.changed.clear();
        Ok(())
    }

    fn append(&mut self) -> io::Result<()> {
        let mut text = String::new();
        if self.torn {
            text.push('\n');
        }
        for key in &self.changed {
            if let Some(entry) = self.entries.get(key) {
                text.push_str(&line(key, entry)?);
            }
        }
        self.file.write_all(text.as_bytes())?;
        self.file.sync_data()?;
        self.length += text.len() as u64;
        Ok(())
    }

    /// What runs took in a night.
    pub fn night(&self, night: Date) -> Entry {
        self.sum(|(of, run)| *of == night && run.is_some())
    }

    /// What a run took in a night.
    pub fn entry(&self, night: Date, run: &RunId) -> Entry {
        self.entries.get(&(night, Some(run.clone()))).cloned().unwrap_or_default()
    }

    /// What a run took, over all nights.
    pub fn run(&self, run: &RunId) -> Entry {
        self.sum(|(_, of)| of.as_ref() == Some(run))
    }

    /// What every run took, over all nights.
    pub fn runs(&self) -> BTreeMap<RunId, Entry> {
        let mut runs: BTreeMap<RunId, Entry> = BTreeMap::new();
        for ((_, run), entry) in &self.entries {
            if let Some(run) = run {
                runs.entry(run.clone()).or_default().add(entry);
            }
        }
        runs
    }

    /// The nights on record, in order.
    pub fn nights(&self) -> Vec<Date> {
        self.entries.keys().map(|(night, _)| *night).collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn sum(&self, of: impl Fn(&Key) -> bool) -> Entry {
        let mut sum = Entry::default();
        self.entries.iter().filter(|(key, _)| of(key)).for_each(|(_, entry)| sum.add(entry));
        sum
    }
}

/// A file, or a meter, may say anything: totals of a ledger only grow, and are numbers.
fn sound(entry: &Entry) -> bool {
    let Energy { gross, idle, metered, unmetered } = entry.energy;
    [gross.0, idle.0, metered, unmetered].iter().all(|value| value.is_finite() && *value >= 0.0)
}

fn line((night, run): &Key, entry: &Entry) -> io::Result<String> {
    let line = Line { night: night.to_string(), run: run.clone(), entry: entry.clone() };
    Ok(serde_json::to_string(&line).map_err(io::Error::other)? + "\n")
}

/// Writes the totals into a new file in the place of the old one, and opens it for appending. A crash leaves the old file
/// or the new one.
fn rewrite(path: &Path, entries: &BTreeMap<Key, Entry>) -> io::Result<File> {
    let beside = path.with_extension("jsonl.new");
    let mut text = String::new();
    for (key, entry) in entries {
        text.push_str(&line(key, entry)?);
    }
    let mut file = File::create(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        File::open(directory)?.sync_all()?;
    }
    File::options().append(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seconds(at: f64) -> Duration {
        Duration::from_secs_f64(at)
    }

    fn round(at: f64, watts: Option<f64>) -> Readings {
        let now = seconds(at);
        let power =
            watts.map_or(Reading::Lost { since: now }, |w| Reading::Value { value: Watts(w), at: now });
        Readings { at: now, power: Some(power), ..Readings::default() }
    }

    fn close(value: f64, expected: f64, relative: f64) {
        assert!((value - expected).abs() <= relative * expected.abs(), "{value} for {expected}");
    }

    #[test]
    fn the_sum_over_steps_is_the_integral() {
        let power = |t: f64| 20.0 + 10.0 * (t / 7.0).sin() + if t % 60.0 < 20.0 { 15.0 } else { 0.0 };
        let mut meter = Meter::default();
        let mut integral = 0.0;
        let mut steps = Vec::new();
        let mut mark = Energy::default();
        for i in 0..36_000 {
            let t = i as f64 * 0.1;
            if i % 5 == 0 {
                meter.step(&round(t, Some(power(t))), true);
            }
            // Micro-steps end where they like, between two rounds.
            if i % 17 == 0 {
                let total = meter.total_at(seconds(t));
                steps.push((total - mark).gross.0);
                mark = total;
            }
            integral += power(t) * 0.1;
        }
        close(steps.iter().sum(), integral, 0.01);
        close(meter.total_at(seconds(3600.0)).gross.0, integral, 0.01);
        close(mark.per_token(1000, true).unwrap().0, integral / 1000.0, 0.01);
        assert_eq!(mark.per_token(0, true), None);
    }

    #[test]
    fn gaps_are_marked_and_not_invented() {
        let mut meter = Meter::default();
        for i in 0..=20 {
            meter.step(&round(i as f64 * 0.5, Some(10.0)), true);
        }
        for bad in [None, Some(f64::NAN), Some(-5.0), Some(1e9)] {
            meter.step(&round(10.5, bad), true);
        }
        assert_eq!(meter.total_at(seconds(10.0)).gross, Joules(100.0));
        assert!(meter.sees(seconds(19.0)) && !meter.sees(seconds(20.0)));
        meter.step(&round(40.0, Some(10.0)), true);
        let total = meter.total_at(seconds(40.0));
        assert_eq!((total.gross.0, total.metered, total.unmetered), (100.0, 10.0, 30.0));
        // A short gap is bridged.
        meter.step(&round(43.0, Some(20.0)), true);
        assert_eq!(meter.total_at(seconds(43.0)).gross.0, 145.0);
        let mut blind = Meter::default();
        for i in 0..=20 {
            blind.step(&Readings { at: seconds(i as f64), ..Readings::default() }, true);
        }
        assert_eq!(blind.total_at(seconds(20.0)).unmetered, 20.0);
    }

    #[test]
    fn idle_power_is_what_the_parked_machine_takes() {
        let mut meter = Meter::default();
        for i in 0..200 {
            meter.step(&round(i as f64 * 0.5, Some(if i < 100 { 30.0 } else { 8.0 })), i < 100);
        }
        assert_eq!(meter.idle(), Some(Watts(8.0)), "the first seconds of a rest are not idle");
        let mark = meter.total_at(seconds(100.0));
        for i in 200..=300 {
            meter.step(&round(i as f64 * 0.5, Some(30.0)), true);
        }
        let spent = meter.total_at(seconds(150.0)) - mark;
        close(spent.counted(true).0, 1500.0, 0.01);
        close(spent.counted(false).0, 1100.0, 0.01);
    }

    #[test]
    fn a_quota_ends_within_one_micro_step() {
        let budget = Budget { energy_per_night: Some(Joules(1000.0)), ..Budget::default() };
        let mut meter = Meter::default();
        let mut longest = 0.0f64;
        let mut t = 0.0;
        let stopped = loop {
            let before = meter.total_at(seconds(t));
            if let Some(reason) = quota(&budget, &before, &before, &meter, seconds(t)) {
                break reason;
            }
            for _ in 0..3 {
                meter.step(&round(t, Some(40.0 + t % 7.0)), true);
                t += 0.5;
            }
            longest = longest.max((meter.total_at(seconds(t)) - before).gross.0);
        };
        let spent = meter.total_at(seconds(t)).gross.0;
        assert_eq!(stopped, Reason::EnergyQuota);
        assert!(spent >= 1000.0 && spent <= 1000.0 + longest, "{spent}, micro-steps of up to {longest}");
        let nothing = Energy::default();
        assert_eq!(quota(&budget, &nothing, &nothing, &meter, seconds(t + 60.0)), Some(Reason::SensorLost));
        assert_eq!(quota(&Budget::default(), &nothing, &nothing, &meter, seconds(t + 60.0)), None);
        assert_eq!(
            quota(&budget, &nothing, &nothing, &Meter::default(), seconds(t)),
            None,
            "never had a meter"
        );
        let per_run = Budget { energy_per_run: Some(Joules(10.0)), energy_gross: false, ..Budget::default() };
        let run = Energy { gross: Joules(30.0), idle: Joules(21.0), ..Energy::default() };
        assert_eq!(quota(&per_run, &nothing, &run, &meter, seconds(t)), None, "9 J above idle");
    }

    #[test]
    fn a_night_goes_from_noon_to_noon() {
        let night = |text: &str| night_of(&text.parse().unwrap()).to_string();
        assert_eq!(night("2026-11-24T12:00[Europe/Berlin]"), "2026-11-24");
        assert_eq!(night("2026-11-25T11:59:59[Europe/Berlin]"), "2026-11-24");
        assert_eq!(night("2026-11-25T12:00[Europe/Berlin]"), "2026-11-25");
    }

    fn joules(gross: f64) -> Energy {
        Energy { gross: Joules(gross), metered: 1.0, ..Energy::default() }
    }

    #[test]
    fn the_ledger_survives_a_cut_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("energy.jsonl");
        let (tonight, run): (Date, _) =
            ("2026-11-24".parse().unwrap(), RunId::parse("0123456789ab").unwrap());
        let mut ledger = Ledger::open(&path).unwrap();
        let mut durable = vec![(0, 0.0)];
        for i in 0..25u64 {
            ledger.add(tonight, Some(&run), joules(10.0), 5);
            ledger.add(tonight, None, joules(3.0), 0);
            if ledger.flush(Duration::from_secs(i)).unwrap() {
                let spent = ledger.run(&run).energy.gross.0;
                durable.push((std::fs::metadata(&path).unwrap().len() as usize, spent));
            }
        }
        assert_eq!(durable.len(), 4, "one sync in ten seconds");
        let content = std::fs::read(&path).unwrap();
        // Every byte of the last lines, and some of the others: each cut is opened three times and synced.
        for cut in (0..=content.len()).filter(|cut| cut % 13 == 0 || content.len() - cut < 60) {
            let path = dir.path().join("cut.jsonl");
            // A cut may also leave zeros where bytes were to come.
            for tail in [&[][..], &[0; 7][..]] {
                std::fs::write(&path, [&content[..cut], tail].concat()).unwrap();
                let mut again = Ledger::open(&path).unwrap();
                let kept = again.run(&run).energy.gross.0;
                let acknowledged = durable.iter().rfind(|(length, _)| *length <= cut).unwrap().1;
                assert!(kept >= acknowledged && kept <= 250.0, "{cut}: {kept} of {acknowledged}");
                assert_eq!(again.damaged(), 0);
                again.add(tonight, Some(&run), joules(1.0), 0);
                again.sync().unwrap();
                drop(again);
                assert_eq!(Ledger::open(&path).unwrap().run(&run).energy.gross.0, kept + 1.0);
            }
        }
        assert!(durable.last().unwrap().1 >= 200.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn whatever_a_line_holds_is_damage_and_takes_nothing_from_the_others(
            line in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..60),
                "[-{}\\[\\]\":,.0-9a-zE_ ]{0,60}".prop_map(String::into_bytes),
                (any::<f64>(), any::<f64>()).prop_map(|(gross, idle)| format!(
                    "{{\"night\":\"2026-11-24\",\"gross_j\":{gross:e},\"idle_j\":{idle:e},\"metered_s\":1,\
                     \"unmetered_s\":0}}"
                ).into_bytes()),
            ],
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("energy.jsonl");
            let run = RunId::parse("00000000000a").unwrap();
            let tonight: Date = "2026-11-24".parse().unwrap();
            let mut ledger = Ledger::open(&path).unwrap();
            ledger.add(tonight, Some(&run), joules(10.0), 5);
            ledger.sync().unwrap();
            let sound = std::fs::read(&path).unwrap();
            std::fs::write(&path, [&line[..], b"\n", &sound[..], &line[..]].concat()).unwrap();
            let ledger = Ledger::open(&path).unwrap();
            prop_assert_eq!(ledger.run(&run).energy.gross, Joules(10.0));
            let night = ledger.night(tonight).energy;
            prop_assert!(night.gross.0.is_finite() && night.gross >= Joules(10.0));
        }
    }

    #[test]
    fn a_ledger_that_holds_much_is_not_written_anew_each_time() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("energy.jsonl");
        let tonight: Date = "2026-11-24".parse().unwrap();
        let run = |i: u64| RunId::parse(&format!("{i:012x}")).unwrap();
        let mut ledger = Ledger::open(&path).unwrap();
        (0..12_000).for_each(|i| ledger.add(tonight, Some(&run(i)), joules(1.0), 1));
        ledger.sync().unwrap();
        drop(ledger);
        let mut ledger = Ledger::open(&path).unwrap();
        let file = || std::fs::metadata(&path).unwrap();
        let before = file();
        assert!(before.len() > COMPACT, "{}", before.len());
        for _ in 0..3 {
            ledger.add(tonight, Some(&run(7)), joules(1.0), 1);
            ledger.sync().unwrap();
        }
        assert_eq!(file().ino(), before.ino(), "lines were added to it");
        (0..2).for_each(|_| {
            (0..12_000).for_each(|i| ledger.add(tonight, Some(&run(i)), joules(1.0), 1));
            ledger.sync().unwrap();
        });
        ledger.add(tonight, Some(&run(7)), joules(1.0), 1);
        ledger.sync().unwrap();
        assert!(file().len() < before.len() + COMPACT / 2, "{} after {}", file().len(), before.len());
        assert_eq!(Ledger::open(&path).unwrap().run(&run(7)).energy.gross, Joules(7.0));
    }

    #[test]
    fn nights_and_runs_are_summed_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("energy.jsonl");
        let night = |text: &str| text.parse::<Date>().unwrap();
        let [a, b] = ["00000000000a", "00000000000b"].map(|id| RunId::parse(id).unwrap());
        let mut ledger = Ledger::open(&path).unwrap();
        ledger.add(night("2026-11-23"), Some(&a), joules(1.0), 10);
        ledger.add(night("2026-11-24"), Some(&a), joules(2.0), 20);
        ledger.add(night("2026-11-24"), Some(&b), joules(4.0), 40);
        ledger.add(night("2026-11-24"), None, joules(8.0), 0);
        ledger.add(night("2026-11-24"), Some(&b), joules(f64::NAN), 1);
        ledger.sync().unwrap();
        for ledger in [ledger, Ledger::open(&path).unwrap()] {
            assert_eq!(ledger.run(&a), Entry { energy: Energy { metered: 2.0, ..joules(3.0) }, tokens: 30 });
            let runs = [a.clone(), b.clone()].map(|id| (id.clone(), ledger.run(&id)));
            assert_eq!(ledger.runs(), runs.into());
            assert_eq!(ledger.night(night("2026-11-24")).energy.gross, Joules(6.0));
            assert_eq!(ledger.night(night("2026-11-22")), Entry::default());
            assert_eq!(ledger.nights(), [night("2026-11-23"), night("2026-11-24")]);
        }
        let mut content = std::fs::read_to_string(&path).unwrap();
        content.insert_str(0, "{\"night\":\"2026-11-23\",\"gross_j\":-1}\n");
        std::fs::write(&path, content).unwrap();
        let mut ledger = Ledger::open(&path).unwrap();
        assert_eq!((ledger.damaged(), ledger.run(&a).tokens), (1, 30));
        ledger.length = COMPACT + 1;
        ledger.add(night("2026-11-24"), Some(&b), joules(1.0), 0);
        ledger.sync().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 4, "written anew");
        assert_eq!(Ledger::open(&path).unwrap().run(&b).energy.gross, Joules(5.0));
    }
}
