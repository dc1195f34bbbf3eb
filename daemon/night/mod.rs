//! The night's account: what every second was used for, and the report on it.
//!
//! ```text
//!   a round of the governor ──account──► Record (segments that tile the night, figures, a point a minute)
//!                                          │  ▲
//!                                  store   ▼  │ after a restart
//!                              nights/<date>.jsonl          Report ◄── record ──► words   one sentence, advice
//!                                                             ├──► JSON (GetNight, `finetunectl night --json`)
//!                                                             └──html──► nights/<date>.html, `night --html`
//! ```
//!
//! Nothing is guessed. A second that nobody saw (the daemon was off, the machine slept, the clock was set) is accounted to
//! that. A second of training at a duty of 0.6 is 0.6 s of training and 0.4 s lost to the reason that limits the duty.
//!
//! Times are microseconds since 1970 and sums are whole numbers, so that they add up exactly.

pub mod account;
pub mod chart;
pub mod figures;
pub mod html;
pub mod record;
pub mod report;
pub mod store;
pub mod words;

#[cfg(test)]
mod tests;

pub use account::{Account, Observation};
pub use figures::Figures;
pub use record::{Record, Segment};
pub use report::Report;
pub use store::{NightError, Nights, Store};

use crate::reason::Reason;
use jiff::civil::Date;
use jiff::fmt::strtime::BrokenDownTime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use serde::de::{self, Deserialize, Deserializer};
use serde::ser::{Serialize, Serializer};
use std::fmt;

/// Microseconds of a second.
pub const SECOND: i64 = 1_000_000;

/// What time was used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Use {
    /// Training.
    Training,
    /// Computing held-out loss.
    Evaluating,
    /// Reading data, loading the base.
    Preparing,
    /// Writing checkpoints and results.
    Saving,
    /// Nothing, for this reason.
    Lost(Reason),
}

impl Use {
    /// The stable word: that of the reason, where nothing was computed.
    pub fn word(self) -> &'static str {
        match self {
            Use::Training => "training",
            Use::Evaluating => "evaluating",
            Use::Preparing => "preparing",
            Use::Saving => "saving",
            Use::Lost(reason) => reason.word(),
        }
    }

    /// The use with this word.
    pub fn from_word(word: &str) -> Option<Use> {
        let work = [Use::Training, Use::Evaluating, Use::Preparing, Use::Saving];
        let of_work = work.into_iter().find(|usage| usage.word() == word);
        of_work.or_else(|| Reason::from_word(word).map(Use::Lost))
    }

    /// In words.
    pub fn meaning(self) -> &'static str {
        match self {
            Use::Training => "a run trained",
            Use::Evaluating => "a run computed held-out loss",
            Use::Preparing => "a run read its data and loaded its base",
            Use::Saving => "a run wrote a checkpoint or its results",
            Use::Lost(reason) => reason.meaning(),
        }
    }

    /// Whether something was computed or written for a run.
    pub fn is_work(self) -> bool {
        !matches!(self, Use::Lost(_))
    }
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl Serialize for Use {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}

impl<'de> Deserialize<'de> for Use {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Use, D::Error> {
        let word = String::deserialize(deserializer)?;
        Use::from_word(&word).ok_or_else(|| de::Error::custom(format!("{word:?} is no use of time")))
    }
}

/// A stretch of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Span {
    /// Begin, in microseconds since 1970.
    #[serde(rename = "from_us")]
    pub from: i64,
    /// End; it does not belong to it.
    #[serde(rename = "to_us")]
    pub to: i64,
}

impl Span {
    /// Its length in microseconds; 0 where the end is before the begin.
    pub fn length(self) -> i64 {
        self.to.saturating_sub(self.from).max(0)
    }

    /// What both have.
    pub fn within(self, other: Span) -> Span {
        Span { from: self.from.max(other.from), to: self.to.min(other.to) }
    }

    /// Whether a moment lies in it.
    pub fn contains(self, at: i64) -> bool {
        self.from <= at && at < self.to
    }
}

/// The name of a time zone, or, where it has none (a file of rules that nobody named), its offset at a moment: `+05:30`.
pub fn zone_name(zone: &TimeZone, at: i64) -> String {
    let at = Timestamp::from_microsecond(at).unwrap_or(Timestamp::UNIX_EPOCH);
    let offset = || at.to_zoned_datetime(zone.clone()).strftime("%:z").to_string();
    zone.iana_name().map_or_else(offset, str::to_string)
}

/// The time zone with such a name; none that this machine does not know.
pub fn zone_named(name: &str) -> Option<TimeZone> {
    let offset = || Some(BrokenDownTime::parse("%:z", name).ok()?.offset()?.to_time_zone());
    TimeZone::get(name).ok().or_else(offset)
}

/// From noon to noon, in a time zone: 23, 24 or 25 hours. None at the ends of the calendar.
pub fn bounds(date: Date, zone: &TimeZone) -> Option<Span> {
    let noon = |date: Date| zone.to_timestamp(date.at(12, 0, 0, 0)).ok().map(Timestamp::as_microsecond);
    Some(Span { from: noon(date)?, to: noon(date.checked_add(1.day()).ok()?)? })
}
