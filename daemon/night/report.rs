//! The report on a night: what `GetNight` answers and the pages show. Seconds are fractions of whole microseconds; those of
//! the uses add up to those that are accounted for.

use super::figures::{Figures, ModeSeen, NoteSeen, Point, Spread};
use super::record::{Record, Segment, Uses};
use super::{SECOND, Span, Use, words, zone_named};
use crate::reason::Reason;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of the JSON: what a key means changes only with it.
pub const SCHEMA: u32 = 1;

/// Times beyond this, in microseconds since 1970, are nonsense: the calendar ends at a fourth of it.
const FAR: i64 = 1 << 60;

/// The report. Unknown words and keys of a newer daemon are tolerated.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Date of its evening.
    pub night: String,
    /// The machine's time zone.
    pub zone: String,
    /// From noon, in microseconds since 1970.
    pub from_us: i64,
    /// To noon.
    pub to_us: i64,
    /// Until when time is accounted for.
    pub through_us: i64,
    /// Nothing is added any more.
    pub over: bool,
    /// What happened, in a sentence.
    pub headline: String,
    /// What would have helped, a sentence each.
    pub advice: Vec<String>,
    /// When runs may compute.
    pub windows: Vec<Span>,
    /// The account of the windows; of the whole night, where there is none.
    pub window: Sums,
    /// The account of the whole night.
    pub whole: Sums,
    /// Stretches of time that tile the night from its begin to `through_us`.
    pub intervals: Vec<Interval>,
    /// Mean share of the time that was computed while a run could; absent where none could.
    pub duty: Option<f64>,
    /// Steps that were done.
    pub steps: u64,
    /// Tokens that were trained on.
    pub tokens: u64,
    /// Energy of runs; absent on a machine without a meter.
    pub energy: Option<EnergySums>,
    /// The hottest zone, °C.
    pub temperature: Option<Range>,
    /// The greatest temperature of each zone, °C.
    pub zones: BTreeMap<String, f64>,
    /// Power of the counted rails, W.
    pub power: Option<Range>,
    /// Runs that had a worker.
    pub runs: Vec<RunLine>,
    /// Leases and holds.
    pub leases: Vec<LeaseLine>,
    /// Power modes, from when on.
    pub modes: Vec<ModeSeen>,
    /// What a person should know.
    pub notes: Vec<NoteSeen>,
    /// A point a minute, where something was measured.
    pub points: Vec<Point>,
    /// How often the daemon was started.
    pub starts: u32,
    /// Lines of the record that could not be read.
    pub damaged: usize,
    /// Time that was accounted for and taken back, because the clock was set back.
    pub undone_s: f64,
}

/// What time was used for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sums {
    /// Length.
    pub seconds: f64,
    /// The part that is accounted for: all of it once it is over.
    pub accounted_s: f64,
    /// By use, the greatest first; they add up to `accounted_s`.
    pub uses: Vec<UseSum>,
}

/// One use.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UseSum {
    /// `training`, `evaluating`, `preparing`, `saving`, or the word of a reason.
    pub what: String,
    /// Time.
    pub seconds: f64,
    /// Share of what is accounted for.
    pub share: f64,
}

/// A stretch of time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Interval {
    /// Begin.
    pub from_us: i64,
    /// End, which is the begin of the next.
    pub to_us: i64,
    /// What most of it was used for.
    pub what: String,
    /// Seconds by use; they add up to its length.
    pub uses: BTreeMap<String, f64>,
}

/// Energy of runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EnergySums {
    /// All of it, as the ledger has it.
    pub gross_j: f64,
    /// What is above the idle machine.
    pub above_idle_j: f64,
    /// Time of runs that the meter did not see: its energy is missing.
    pub unmetered_s: f64,
    /// Which of the two a quota counts: `gross` or `above-idle`.
    pub counted: String,
    /// Gross, for each token.
    pub j_per_token: Option<f64>,
    /// Gross, for each step.
    pub j_per_step: Option<f64>,
}

/// Least, mean and greatest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Range {
    /// Least.
    pub min: f64,
    /// Mean over time.
    pub mean: f64,
    /// Greatest.
    pub max: f64,
}

/// A run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunLine {
    /// Its id.
    pub id: String,
    /// Its name, as somebody gave it.
    pub name: String,
    /// Completed steps at its first and its last moment of this night.
    pub first_step: u64,
    /// See `first_step`.
    pub last_step: u64,
    /// Loss of its first and its last step of this night.
    pub first_loss: Option<f64>,
    /// See `first_loss`.
    pub last_loss: Option<f64>,
    /// How it stood at last.
    pub state: String,
    /// Why.
    pub reason: Option<String>,
    /// Energy, gross.
    pub gross_j: Option<f64>,
}

/// Leases and holds of one name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LeaseLine {
    /// The name that was given.
    pub who: String,
    /// How many began.
    pub count: u64,
    /// How long they were in force; those that overlap count twice.
    pub seconds: f64,
}

impl Sums {
    /// Time of a use.
    pub fn of(&self, usage: Use) -> f64 {
        self.uses.iter().find(|sum| sum.what == usage.word()).map_or(0.0, |sum| sum.seconds)
    }

    fn new(length: i64, uses: &Uses) -> Sums {
        let accounted: i64 = uses.values().sum();
        let mut uses: Vec<(Use, i64)> = uses.iter().map(|(usage, us)| (*usage, *us)).collect();
        uses.sort_by_key(|(usage, us)| (-us, *usage));
        let sum = |(usage, us): (Use, i64)| UseSum {
            what: usage.word().to_string(),
            seconds: seconds(us),
            share: us as f64 / accounted.max(1) as f64,
        };
        Sums {
            seconds: seconds(length),
            accounted_s: seconds(accounted),
            uses: uses.into_iter().map(sum).collect(),
        }
    }
}

impl Report {
    /// The report on a record. What nobody saw of a night that is over was off.
    pub fn new(record: &Record, over: bool) -> Report {
        let mut padded;
        let record = if over && record.through() < record.span.to {
            padded = record.clone();
            let rest = Span { from: record.through(), to: record.span.to };
            padded.put(Segment::whole(rest, Use::Lost(Reason::Off)), Reason::Off);
            &padded
        } else {
            record
        };
        let whole = record.uses(record.span);
        let mut in_windows = Uses::new();
        for window in &record.windows {
            record
                .uses(*window)
                .into_iter()
                .for_each(|(usage, us)| *in_windows.entry(usage).or_default() += us);
        }
        let length: i64 = record.windows.iter().map(|window| window.length()).sum();
        let whole = Sums::new(record.span.length(), &whole);
        let window = if length > 0 { Sums::new(length, &in_windows) } else { whole.clone() };
        let figures = &record.figures;
        let mut report = Report {
            schema: SCHEMA,
            night: record.date.to_string(),
            zone: record.zone.clone(),
            from_us: record.span.from,
            to_us: record.span.to,
            through_us: record.through(),
            over: record.through() >= record.span.to,
            windows: record.windows.clone(),
            window,
            whole,
            intervals: record.segments.iter().map(interval).collect(),
            duty: (figures.paced_us > 0).then(|| figures.computed_us as f64 / figures.paced_us as f64),
            steps: figures.steps,
            tokens: figures.tokens,
            energy: energy(figures),
            temperature: range(&figures.hottest),
            zones: figures.zones.clone(),
            power: range(&figures.power),
            runs: runs(figures),
            leases: leases(figures),
            modes: figures.modes.clone(),
            notes: figures.notes.clone(),
            points: record.points.clone(),
            starts: figures.starts,
            damaged: record.damaged,
            undone_s: seconds(figures.undone_us),
            ..Report::default()
        };
        report.headline = words::headline(&report);
        report.advice = words::advice(&report);
        report
    }

    /// The machine's time zone; UTC where this machine does not know it.
    pub fn time_zone(&self) -> TimeZone {
        zone_named(&self.zone).unwrap_or(TimeZone::UTC)
    }

    /// The stretch of time that is worth looking at: from the first window to the last one, or the whole night.
    pub fn scene(&self) -> Span {
        let from = self.windows.iter().map(|window| window.from).min();
        let to = self.windows.iter().map(|window| window.to).max();
        let sane = |at: i64| at.clamp(-FAR, FAR);
        Span { from: sane(from.unwrap_or(self.from_us)), to: sane(to.unwrap_or(self.to_us)) }
    }
}

/// Microseconds in seconds.
pub fn seconds(us: i64) -> f64 {
    us as f64 / SECOND as f64
}

fn interval(segment: &Segment) -> Interval {
    Interval {
        from_us: segment.span.from,
        to_us: segment.span.to,
        what: segment.main().word().to_string(),
        uses: segment.uses.iter().map(|(usage, us)| (usage.word().to_string(), seconds(*us))).collect(),
    }
}

fn energy(figures: &Figures) -> Option<EnergySums> {
    let energy = &figures.energy;
    if energy.metered <= 0.0 && figures.power.mean().is_none() {
        return None;
    }
    let per = |count: u64| (count > 0).then(|| energy.gross.0 / count as f64);
    Some(EnergySums {
        gross_j: energy.gross.0,
        above_idle_j: energy.counted(false).0,
        unmetered_s: energy.unmetered,
        counted: if figures.gross { "gross" } else { "above-idle" }.to_string(),
        j_per_token: per(figures.tokens),
        j_per_step: per(figures.steps),
    })
}

fn range(spread: &Spread) -> Option<Range> {
    spread.mean().map(|mean| Range { min: spread.min, mean, max: spread.max })
}

fn runs(figures: &Figures) -> Vec<RunLine> {
    let line = |(id, run): (&crate::units::RunId, &super::figures::RunNight)| RunLine {
        id: id.to_string(),
        name: run.name.clone(),
        first_step: run.first_step,
        last_step: run.last_step,
        first_loss: run.first_loss,
        last_loss: run.last_loss,
        state: run.state.clone(),
        reason: run.reason.clone(),
        gross_j: (run.energy.metered > 0.0).then_some(run.energy.gross.0),
    };
    figures.runs.iter().map(line).collect()
}

fn leases(figures: &Figures) -> Vec<LeaseLine> {
    let line = |(who, lease): (&String, &super::figures::Lease)| LeaseLine {
        who: who.clone(),
        count: lease.count,
        seconds: seconds(lease.time),
    };
    figures.leases.iter().map(line).collect()
}
