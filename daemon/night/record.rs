//! The record of one night: segments that tile it from its noon to the last moment that is accounted for.
//!
//! ```text
//!   noon                                                   through                     noon
//!   │ off      │ training 0.6 │ leased │ training │ mixed  │                            │
//!   └──────────┴──────────────┴────────┴──────────┴────────┘                            │
//!                        edges of the windows: no segment reaches over one
//! ```
//!
//! A segment says how many microseconds of it were used for what, and these add up to its length. Time that is used as
//! before extends the last segment. A segment that is too short to stand alone takes in what follows, so a reason that
//! flaps makes few segments and no sum wrong.

use super::figures::{Figures, Point};
use super::{SECOND, Span, Use};
use crate::reason::Reason;
use jiff::civil::Date;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Shortest segment, and the shortest one once there are [`MANY`]: at most `MANY` + 25 h / 1 min of them in a night.
const SHORTEST: i64 = 10 * SECOND;
const SHORTEST_OF_MANY: i64 = 60 * SECOND;
/// Segments from which on they are longer.
const MANY: usize = 1000;
/// Beyond it the last segment takes in everything: hours that are changed all the time make edges without end.
const MOST: usize = 4000;
/// Windows of a night that are kept apart. Hours can be changed while they last, which cuts them.
const WINDOWS: usize = 200;

/// How microseconds were used.
pub type Uses = BTreeMap<Use, i64>;

/// A stretch of time and what it was used for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// When.
    #[serde(flatten)]
    pub span: Span,
    /// Microseconds by use; their sum is the length.
    #[serde(rename = "uses_us")]
    pub uses: Uses,
}

impl Segment {
    /// All of it for one use.
    pub fn whole(span: Span, usage: Use) -> Segment {
        Segment { span, uses: BTreeMap::from([(usage, span.length())]) }
    }

    /// A share of it, 0 to 1, for one use and the rest for another.
    pub fn shared(span: Span, usage: Use, share: f64, rest: Use) -> Segment {
        let length = span.length();
        let first = ((length as f64 * share.clamp(0.0, 1.0)).round() as i64).clamp(0, length);
        let uses = [(usage, first), (rest, length - first)].into_iter().filter(|(_, us)| *us > 0).collect();
        Segment { span, uses }
    }

    /// It has a length, and its uses add up to it.
    pub fn is_sound(&self) -> bool {
        let sum = self.uses.values().try_fold(0i64, |sum, us| sum.checked_add(*us));
        let length = self.span.to.checked_sub(self.span.from);
        self.uses.values().all(|us| *us > 0) && length.is_some_and(|length| length > 0) && sum == length
    }

    /// What it was used for most.
    pub fn main(&self) -> Use {
        let most = self.uses.iter().max_by_key(|(_, us)| **us);
        most.map_or(Use::Lost(Reason::Off), |(usage, _)| *usage)
    }

    /// The two parts before and after a moment inside of it. Uses are divided as the time is, to the microsecond.
    fn split(self, at: i64) -> (Segment, Segment) {
        let (length, first) = (self.span.length(), at - self.span.from);
        let floor = |us: i64| (i128::from(us) * i128::from(first) / i128::from(length.max(1))) as i64;
        let mut before: Uses = self.uses.iter().map(|(usage, us)| (*usage, floor(*us))).collect();
        let mut missing = first - before.values().sum::<i64>();
        for (usage, us) in &self.uses {
            if let Some(part) = before.get_mut(usage).filter(|part| missing > 0 && **part < *us) {
                *part += 1;
                missing -= 1;
            }
        }
        let mut after = self.uses;
        for (usage, part) in &before {
            after.entry(*usage).and_modify(|us| *us -= part);
        }
        before.retain(|_, us| *us > 0);
        after.retain(|_, us| *us > 0);
        let [before_span, after_span] = [Span { to: at, ..self.span }, Span { from: at, ..self.span }];
        (Segment { span: before_span, uses: before }, Segment { span: after_span, uses: after })
    }

    /// The part of it that lies in a stretch of time.
    pub fn clipped(self, to: Span) -> Option<Segment> {
        let common = self.span.within(to);
        if common.length() == 0 {
            return None;
        }
        let mut segment = self;
        if common.from > segment.span.from {
            segment = segment.split(common.from).1;
        }
        if common.to < segment.span.to {
            segment = segment.split(common.to).0;
        }
        Some(segment)
    }

    fn absorb(&mut self, next: Segment) {
        self.span.to = next.span.to;
        for (usage, us) in next.uses {
            *self.uses.entry(usage).or_default() += us;
        }
    }

    fn is_used_as(&self, other: &Segment) -> bool {
        self.uses.keys().eq(other.uses.keys())
    }
}

/// The record of a night.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Date of its evening.
    pub date: Date,
    /// Noon to noon.
    pub span: Span,
    /// Name of the time zone, as the IANA has it, or its offset where it has none.
    pub zone: String,
    /// When runs may compute: in order, none touching the next.
    pub windows: Vec<Span>,
    /// What time was used for, without a gap from the first noon on.
    pub segments: Vec<Segment>,
    /// Everything else that is counted.
    pub figures: Figures,
    /// A point a minute.
    pub points: Vec<Point>,
    /// Lines of the file that could not be read.
    pub damaged: usize,
    /// Segments before this one are on disk as they are here; and so are points before this one.
    pub(super) durable: (usize, usize),
}

impl Record {
    /// Nothing is accounted for yet.
    pub fn new(date: Date, span: Span, zone: String) -> Record {
        Record {
            date,
            span,
            zone,
            windows: Vec::new(),
            segments: Vec::new(),
            figures: Figures::default(),
            points: Vec::new(),
            damaged: 0,
            durable: (0, 0),
        }
    }

    /// Until when time is accounted for.
    pub fn through(&self) -> i64 {
        self.segments.last().map_or(self.span.from, |last| last.span.to)
    }

    /// Accounts for the time from [`Record::through`] on, or, after a clock was set back, from an earlier moment on. What
    /// lies outside the night is left out, a gap before it is accounted to `gap`.
    pub fn put(&mut self, segment: Segment, gap: Reason) {
        let Some(segment) = segment.clipped(self.span) else { return };
        self.cut(segment.span.from);
        let hole = Span { from: self.through(), to: segment.span.from };
        if hole.length() > 0 {
            self.append(Segment::whole(hole, Use::Lost(gap)));
        }
        self.append(segment);
    }

    /// Takes back what is accounted for after a moment: the clock that said so was wrong. How much that was, in
    /// microseconds.
    pub fn cut(&mut self, at: i64) -> i64 {
        let undone = self.cut_segments(at);
        if undone > 0 {
            self.points.retain(|point| point.at < at);
            self.durable.1 = self.durable.1.min(self.points.len());
        }
        undone
    }

    fn cut_segments(&mut self, at: i64) -> i64 {
        let undone = (self.through() - at.max(self.span.from)).max(0);
        if undone == 0 {
            return 0;
        }
        while let Some(last) = self.segments.pop() {
            if last.span.from < at {
                let kept = if at < last.span.to { last.split(at).0 } else { last };
                self.segments.push(kept);
                break;
            }
        }
        self.durable.0 = self.durable.0.min(self.segments.len().saturating_sub(1));
        undone
    }

    /// Adds a segment at the end, in pieces where it reaches over the edge of a window.
    fn append(&mut self, segment: Segment) {
        let mut rest = segment;
        while let Some(edge) = self.edge_in(rest.span) {
            let (before, after) = rest.split(edge);
            self.join(before);
            rest = after;
        }
        self.join(rest);
    }

    fn edge_in(&self, span: Span) -> Option<i64> {
        self.edges().filter(|edge| span.from < *edge && *edge < span.to).min()
    }

    fn edges(&self) -> impl Iterator<Item = i64> {
        self.windows.iter().flat_map(|window| [window.from, window.to])
    }

    fn join(&mut self, segment: Segment) {
        let count = self.segments.len();
        let shortest = if count < MANY { SHORTEST } else { SHORTEST_OF_MANY };
        let at_edge = self.edges().any(|edge| edge == segment.span.from);
        match self.segments.last_mut() {
            Some(last)
                if count >= MOST
                    || (!at_edge && (last.is_used_as(&segment) || last.span.length() < shortest)) =>
            {
                last.absorb(segment);
            }
            _ => self.segments.push(segment),
        }
        self.durable.0 = self.durable.0.min(self.segments.len() - 1);
    }

    /// Takes over the hours of the configuration, from a moment on: what was open before it stays so. Whether that
    /// changed anything.
    pub fn set_windows(&mut self, windows: &[Span], from: i64) -> bool {
        let before = Span { from: self.span.from, to: from };
        let after = Span { from, to: self.span.to };
        let old = self.windows.iter().map(|window| window.within(before));
        let new = windows.iter().map(|window| window.within(after));
        let mut merged: Vec<Span> = Vec::new();
        for window in old.chain(new).filter(|window| window.length() > 0) {
            match merged.last_mut() {
                Some(last) if window.from <= last.to => last.to = last.to.max(window.to),
                _ => merged.push(window),
            }
        }
        let changed = merged != self.windows && merged.len() <= WINDOWS;
        if changed {
            self.windows = merged;
        }
        changed
    }

    /// What a stretch of time was used for, until [`Record::through`].
    pub fn uses(&self, span: Span) -> Uses {
        let mut sum = Uses::new();
        for segment in &self.segments {
            if let Some(part) = segment.clone().clipped(span) {
                for (usage, us) in part.uses {
                    *sum.entry(usage).or_default() += us;
                }
            }
        }
        sum
    }

    /// The same between other noons.
    pub(super) fn moved(&self, span: Span, zone: String) -> Record {
        let mut record = Record::new(self.date, span, zone);
        record.set_windows(&self.windows, span.from);
        for segment in &self.segments {
            record.put(segment.clone(), Reason::Off);
        }
        record.points = self.points.iter().filter(|point| span.contains(point.at)).cloned().collect();
        Record { figures: self.figures.clone(), damaged: self.damaged, ..record }
    }

    /// A segment out of a file; false when it is none of this night.
    pub(super) fn restore(&mut self, segment: Segment) -> bool {
        let fits = segment.is_sound() && segment.span.within(self.span) == segment.span;
        if fits {
            self.cut_segments(segment.span.from);
            let hole = Span { from: self.through(), to: segment.span.from };
            if hole.length() > 0 {
                self.append(Segment::whole(hole, Use::Lost(Reason::Off)));
            }
            self.segments.push(segment);
        }
        fits
    }
}
