//! From what the governor sees in a round to the record of the night. Pure: time is passed in.
//!
//! ```text
//!                           both clocks went on alike           wall clock ahead           wall clock behind
//!   first round ──► counting ─────────────────────► counting ──────────────────► counting ──────────────────► counting
//!     off until now           used as it was, the first       suspend and clock-set         what it said before is
//!                             10 s of it at the duty          for what is missing           taken back
//!                                │
//!                                └── next noon ──► the next night's record begins, the last one is given back
//! ```

use super::figures::Point;
use super::record::{Record, Segment};
use super::{SECOND, Span, Use};
use crate::governor::door::{Doing, News, STALLED};
use crate::governor::energy::Energy;
use crate::reason::Reason;
use crate::units::RunId;
use jiff::civil::Date;
use std::time::Duration;

/// The clocks may drift apart by this much between two rounds, microseconds: time synchronisation slews by far less,
/// and what sleeps or sets the clock does it by more.
const DRIFT: i64 = 2 * SECOND;
/// Length of a point of the curves.
const MINUTE: i64 = 60 * SECOND;
/// Time of one round that temperatures and power are taken to have held for, at most: longer ones were not seen.
const SEEN: f64 = 10.0;

/// The moment of a round.
#[derive(Clone, Debug, PartialEq)]
pub struct Moment {
    /// Wall clock, in microseconds since 1970.
    pub at: i64,
    /// Monotonic clock.
    pub now: Duration,
    /// Time that the machine has slept since it was started, where that is known.
    pub suspended: Option<Duration>,
    /// The night it belongs to.
    pub date: Date,
    /// From noon to noon.
    pub night: Span,
    /// Name of the time zone.
    pub zone: String,
}

/// What a round found.
#[derive(Clone, Debug)]
pub struct Observation<'a> {
    /// When.
    pub moment: Moment,
    /// When runs may compute in this night.
    pub windows: &'a [Span],
    /// What is done with the time.
    pub doing: Doing,
    /// Share of the time that could be computed since the last round, 0 to 1.
    pub duty: f64,
    /// What it was limited by.
    pub limit: Option<Reason>,
    /// Zones and their temperatures.
    pub zones: Vec<(&'a str, f64)>,
    /// The temperature nearest to its set-point, and the set-point, °C.
    pub temperature: Option<(f64, f64)>,
    /// Power of the counted rails, W.
    pub power: Option<f64>,
    /// Power mode.
    pub mode: Option<&'a str>,
    /// What a person should know.
    pub notes: &'a [String],
    /// Steps and tokens since the daemon was started.
    pub steps: u64,
    /// See `steps`.
    pub tokens: u64,
    /// Energy of runs in this night, as the ledger has it.
    pub energy: Energy,
    /// The same for the run that computes.
    pub run: Option<(RunId, Energy)>,
    /// Quotas count all energy.
    pub gross: bool,
    /// What has happened since the last round.
    pub news: &'a News,
}

/// The account of the night that runs.
#[derive(Debug)]
pub struct Account {
    record: Record,
    last: Option<Last>,
    /// The minute that is not over.
    minute: Minute,
}

#[derive(Clone, Debug)]
struct Last {
    at: i64,
    now: Duration,
    suspended: Option<Duration>,
    steps: u64,
    tokens: u64,
}

#[derive(Debug, Default)]
struct Minute {
    point: Point,
    watt_seconds: f64,
    seconds: f64,
}

impl Account {
    /// The account as far as an earlier process, if there was one, has got with it.
    pub fn new(record: Record) -> Account {
        Account { record, last: None, minute: Minute::default() }
    }

    /// The record so far.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// For the store, which marks what is durable.
    pub fn record_mut(&mut self) -> &mut Record {
        &mut self.record
    }

    /// Takes in a round. `open` is the record of a night as it is on disk, or a new one; it is asked for when a night
    /// begins (or comes back, where a clock was set back). Given back is the record of the night that ended.
    pub fn observe(
        &mut self,
        seen: &Observation<'_>,
        open: impl FnOnce(&Moment) -> Record,
    ) -> Option<Record> {
        let moment = &seen.moment;
        let pieces = self.pieces(seen);
        let mut ended = None;
        if moment.date == self.record.date && moment.night != self.record.span {
            // The time zone was changed: the same night has other noons.
            self.record = self.record.moved(moment.night, moment.zone.clone());
        }
        if moment.date != self.record.date {
            self.put(&pieces);
            self.end_minute();
            ended = Some(std::mem::replace(&mut self.record, open(moment)));
        }
        let from = self.record.through().min(moment.at);
        self.record.set_windows(seen.windows, from);
        self.put(&pieces);
        self.count(seen);
        self.last = Some(Last {
            at: moment.at,
            now: moment.now,
            suspended: moment.suspended,
            steps: seen.steps,
            tokens: seen.tokens,
        });
        ended
    }

    fn put(&mut self, (begin, pieces): &(i64, Vec<Segment>)) {
        // Where the clock says that the last round was: everything after it was another clock's.
        self.record.figures.undone_us += self.record.cut(*begin);
        for piece in pieces {
            // What lies before that stands: a clock that starts wrong and is then set says nothing about it.
            let rest = Span { from: self.record.through(), to: piece.span.to };
            if let Some(piece) = piece.clone().clipped(rest) {
                self.record.put(piece, Reason::ClockSet);
            }
        }
    }

    /// When the last round was, by the clock as it is now, and what the time since the last one was used for: that in
    /// which the clock jumped, too.
    fn pieces(&self, seen: &Observation<'_>) -> (i64, Vec<Segment>) {
        let moment = &seen.moment;
        let Some(last) = &self.last else {
            let off = Span { from: self.record.through().min(moment.at), to: moment.at };
            return (off.from, vec![Segment::whole(off, Use::Lost(Reason::Off))]);
        };
        let awake = micros(moment.now.saturating_sub(last.now));
        let passed = moment.at.saturating_sub(last.at);
        let ahead = passed.saturating_sub(awake);
        if passed >= 0 && ahead.abs() <= DRIFT {
            return (last.at, used(seen, Span { from: last.at, to: moment.at }));
        }
        let begin = moment.at.saturating_sub(awake);
        let mut pieces = Vec::new();
        if ahead > 0 {
            // A clock that cannot tell sleep from being set: sleep is what happens more often.
            let known = moment.suspended.zip(last.suspended);
            let slept = known.map_or(ahead, |(now, then)| micros(now.saturating_sub(then)).min(ahead));
            let woke = last.at + slept;
            pieces.push(Segment::whole(Span { from: last.at, to: woke }, Use::Lost(Reason::Suspend)));
            pieces.push(Segment::whole(Span { from: woke, to: begin }, Use::Lost(Reason::ClockSet)));
        }
        pieces.extend(used(seen, Span { from: begin, to: moment.at }));
        pieces.retain(|piece| piece.span.length() > 0);
        (begin, pieces)
    }

    fn count(&mut self, seen: &Observation<'_>) {
        let moment = &seen.moment;
        let last = self.last.clone();
        let figures = &mut self.record.figures;
        let seconds = match &last {
            Some(last) => moment.now.saturating_sub(last.now).as_secs_f64().min(SEEN),
            None => {
                figures.starts += 1;
                0.0
            }
        };
        let since = |now: u64, before: Option<u64>| now.saturating_sub(before.unwrap_or(0));
        figures.steps += since(seen.steps, last.as_ref().map(|last| last.steps));
        figures.tokens += since(seen.tokens, last.as_ref().map(|last| last.tokens));
        figures.energy = seen.energy;
        figures.gross = seen.gross;
        if matches!(seen.doing, Doing::Training | Doing::Evaluating) {
            figures.paced_us += (seconds * SECOND as f64) as i64;
            figures.computed_us += (seconds * seen.duty.clamp(0.0, 1.0) * SECOND as f64) as i64;
        }
        for (zone, temperature) in &seen.zones {
            figures.zone(zone, *temperature);
        }
        let hottest = seen.zones.iter().map(|zone| zone.1).filter(|t| t.is_finite()).reduce(f64::max);
        if let Some(hottest) = hottest {
            figures.hottest.add(hottest, seconds);
        }
        if let Some(power) = seen.power {
            figures.power.add(power, seconds);
        }
        if let Some(mode) = seen.mode {
            figures.mode(mode, moment.at);
        }
        for note in seen.notes {
            figures.note(note, moment.at, seconds);
        }
        for (id, run) in &seen.news.runs {
            figures.run(id, run);
        }
        for (who, held) in &seen.news.held {
            figures.held(who, *held);
        }
        if let Some((id, energy)) = &seen.run
            && let Some(run) = figures.runs.get_mut(id)
        {
            run.energy = *energy;
        }
        self.plot(seen, seconds);
    }

    /// Takes the round into the curves.
    fn plot(&mut self, seen: &Observation<'_>, seconds: f64) {
        let begin = seen.moment.at.div_euclid(MINUTE) * MINUTE;
        if begin != self.minute.point.at {
            self.end_minute();
            self.minute.point.at = begin;
        }
        let minute = &mut self.minute;
        if let Some((temperature, limit)) = seen.temperature.filter(|(t, _)| t.is_finite()) {
            let most = minute.point.temperature.map_or(temperature, |most| most.max(temperature));
            (minute.point.temperature, minute.point.limit) = (Some(most), Some(limit));
        }
        if let Some(power) = seen.power.filter(|power| power.is_finite()) {
            minute.watt_seconds += power * seconds;
            minute.seconds += seconds;
        }
        let trained = seen.news.runs.iter().filter(|(_, run)| run.state == "running");
        if let Some((id, loss)) = trained.filter_map(|(id, run)| Some((id, run.loss?))).next_back() {
            (minute.point.loss, minute.point.run) = (Some(loss), Some(id.clone()));
        }
    }

    /// Adds the minute to the record, if it holds something, and lies behind the last one.
    fn end_minute(&mut self) {
        let Minute { mut point, watt_seconds, seconds } = std::mem::take(&mut self.minute);
        point.power = (seconds > 0.0).then(|| watt_seconds / seconds);
        let empty = point.temperature.is_none() && point.power.is_none() && point.loss.is_none();
        let later = self.record.points.last().is_none_or(|last| last.at < point.at);
        if !empty && later && self.record.span.contains(point.at) {
            self.record.points.push(point);
        }
    }
}

/// Time in which the daemon was there, and what it was used for.
fn used(seen: &Observation<'_>, span: Span) -> Vec<Segment> {
    // A governor that was silent for longer held everything, and a worker without permits computes nothing.
    let heard = span.from.saturating_add(micros(STALLED)).min(span.to);
    let lit = Span { to: heard, ..span };
    let dark = Span { from: heard, ..span };
    let limit = Use::Lost(seen.limit.unwrap_or(Reason::RampUp));
    let first = match seen.doing {
        Doing::Waiting(reason) => Segment::whole(span, Use::Lost(reason)),
        Doing::Preparing => Segment::whole(span, Use::Preparing),
        Doing::Saving => Segment::whole(span, Use::Saving),
        Doing::Training => Segment::shared(lit, Use::Training, seen.duty, limit),
        Doing::Evaluating => Segment::shared(lit, Use::Evaluating, seen.duty, limit),
    };
    let paced = matches!(seen.doing, Doing::Training | Doing::Evaluating);
    let silent = Segment::whole(
        if paced { dark } else { Span { from: span.to, ..span } },
        Use::Lost(Reason::SensorLost),
    );
    [first, silent].into_iter().filter(|piece| piece.span.length() > 0).collect()
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
