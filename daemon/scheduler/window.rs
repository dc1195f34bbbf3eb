//! Hours of the week on a calendar: when they are open, and when that changes.
//!
//! Hours are local time. Where the clock is set forward, hours that would begin or end in the missing hour do so as much
//! later; where it is set back, they begin at the first and end at the first of the two equal times (`compatible` in RFC
//! 5545's and jiff's words). So a night is an hour shorter or longer, and never opens twice.

use crate::config::times::{DAY, Hours, HoursError};
use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan, ZonedDateTime};

/// How far ahead a change is looked for: a week, and the days that hours may reach over its ends.
const DAYS_AHEAD: i64 = 9;
/// Hours of this many days before may still be open: they last at most two days of the calendar, and a time zone may skip
/// one.
const DAYS_BEHIND: i64 = 3;

/// A set of hours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    hours: Vec<Hours>,
    /// Whether it is open where no hours are given.
    always: bool,
}

impl Windows {
    /// Hours of which none means always: `[window] times`.
    ///
    /// # Errors
    /// The first text that is no hours.
    pub fn open_unless_given(texts: &[String]) -> Result<Windows, HoursError> {
        Windows::parse(texts, true)
    }

    /// Hours of which none means never: `[window] quiet`.
    ///
    /// # Errors
    /// The first text that is no hours.
    pub fn closed_unless_given(texts: &[String]) -> Result<Windows, HoursError> {
        Windows::parse(texts, false)
    }

    fn parse(texts: &[String], open: bool) -> Result<Windows, HoursError> {
        let hours = texts.iter().map(|text| Hours::parse(text)).collect::<Result<Vec<_>, _>>()?;
        Ok(Windows { always: open && hours.is_empty(), hours })
    }

    /// Whether it is open.
    pub fn at(&self, now: &ZonedDateTime) -> bool {
        self.always || self.around(now).iter().any(|(from, to)| contains(*from, *to, now.timestamp()))
    }

    /// When it opens or closes next; none if never.
    pub fn next_change(&self, now: &ZonedDateTime) -> Option<Timestamp> {
        if self.always {
            return None;
        }
        let open = self.around(now);
        let at = now.timestamp();
        match open.iter().find(|(from, to)| contains(*from, *to, at)) {
            // Hours that reach beyond the week have no end: they meet themselves.
            Some((_, to)) => (to.duration_since(at) < SignedDuration::from_hours(8 * 24)).then_some(*to),
            None => open.iter().map(|(from, _)| *from).find(|from| *from > at),
        }
    }

    /// How long it is open between now and a deadline: what is left of it to compute in.
    pub fn open_before(&self, now: &ZonedDateTime, deadline: Timestamp) -> SignedDuration {
        self.open(now, deadline, SignedDuration::MAX)
    }

    /// Whether it is open for at least so long between now and a deadline.
    pub fn are_open_for(&self, now: &ZonedDateTime, deadline: Timestamp, needed: SignedDuration) -> bool {
        self.open(now, deadline, needed) >= needed
    }

    /// How long it is open before a deadline, looking no further than where it is enough.
    fn open(&self, now: &ZonedDateTime, deadline: Timestamp, enough: SignedDuration) -> SignedDuration {
        let mut left = SignedDuration::ZERO;
        let mut at = now.clone();
        while left < enough && at.timestamp() < deadline {
            let until = self.next_change(&at).map_or(deadline, |change| change.min(deadline));
            if self.at(&at) {
                left = left.saturating_add(until.duration_since(at.timestamp()));
            }
            at = until.to_zoned_datetime(now.time_zone().clone());
        }
        left
    }

    /// The times between two moments in which it is open, in order, none touching the next.
    pub fn between(&self, from: Timestamp, to: Timestamp, zone: &TimeZone) -> Vec<(Timestamp, Timestamp)> {
        let mut open = Vec::new();
        let mut at = from;
        while at < to {
            let local = at.to_zoned_datetime(zone.clone());
            let until = self.next_change(&local).map_or(to, |change| change.min(to));
            if self.at(&local) {
                open.push((at, until));
            }
            at = until;
        }
        open
    }

    /// The times around now in which it is open, in order, none touching the next.
    fn around(&self, now: &ZonedDateTime) -> Vec<(Timestamp, Timestamp)> {
        let zone = now.time_zone();
        let mut open = Vec::new();
        for day in -DAYS_BEHIND..=DAYS_AHEAD {
            // Beyond the calendar's ends nothing is open.
            let Ok(date) = now.date().checked_add(day.days()) else { continue };
            let weekday = usize::from(date.weekday().to_monday_zero_offset().unsigned_abs());
            for hours in self.hours.iter().filter(|hours| hours.days.get(weekday) == Some(&true)) {
                if let (Some(from), Some(to)) = (moment(date, hours.from, zone), moment(date, hours.to, zone))
                    && from < to
                {
                    open.push((from, to));
                }
            }
        }
        open.sort();
        let mut merged: Vec<(Timestamp, Timestamp)> = Vec::new();
        for (from, to) in open {
            match merged.last_mut() {
                Some((_, end)) if from <= *end => *end = to.max(*end),
                _ => merged.push((from, to)),
            }
        }
        merged
    }
}

fn contains(from: Timestamp, to: Timestamp, at: Timestamp) -> bool {
    from <= at && at < to
}

/// So many minutes of the wall clock after a date's midnight.
fn moment(date: Date, minutes: u16, zone: &TimeZone) -> Option<Timestamp> {
    let date = date.checked_add(i64::from(minutes / DAY).days()).ok()?;
    let minutes = minutes % DAY;
    // Both are below 60.
    let time = date.at((minutes / 60) as i8, (minutes % 60) as i8, 0, 0);
    zone.to_timestamp(time).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(texts: &[&str]) -> Windows {
        Windows::open_unless_given(&texts.iter().map(|text| text.to_string()).collect::<Vec<_>>()).unwrap()
    }

    fn at(text: &str) -> ZonedDateTime {
        text.parse().unwrap()
    }

    /// Local time of the next change.
    fn change(windows: &Windows, now: &str) -> String {
        let now = at(now);
        windows.next_change(&now).map_or("never".into(), |change| {
            change.to_zoned_datetime(now.time_zone().clone()).strftime("%a %d %H:%M %z").to_string()
        })
    }

    #[test]
    fn nights_go_over_midnight_and_follow_the_weekday_of_their_beginning() {
        let nights = windows(&["22:00-06:00"]);
        for (now, open) in [
            ("2026-11-24T21:59:59[Europe/Berlin]", false),
            ("2026-11-24T22:00[Europe/Berlin]", true),
            ("2026-11-25T05:59:59[Europe/Berlin]", true),
            ("2026-11-25T06:00[Europe/Berlin]", false),
        ] {
            assert_eq!(nights.at(&at(now)), open, "{now}");
        }
        assert_eq!(change(&nights, "2026-11-24T12:00[Europe/Berlin]"), "Tue 24 22:00 +0100");
        assert_eq!(change(&nights, "2026-11-25T03:00[Europe/Berlin]"), "Wed 25 06:00 +0100");
        // 27 November 2026 is a Friday.
        let friday = windows(&["fri 22:00-06:00"]);
        assert!(friday.at(&at("2026-11-28T05:00[UTC]")), "Saturday morning belongs to Friday night");
        assert!(!friday.at(&at("2026-11-27T05:00[UTC]")));
        assert_eq!(change(&friday, "2026-11-28T06:00[UTC]"), "Fri 04 22:00 +0000");
    }

    #[test]
    fn hours_that_touch_are_one_and_the_whole_week_never_changes() {
        let weekend = windows(&["sat,sun 00:00-24:00", "mon-fri 22:00-06:00"]);
        assert_eq!(change(&weekend, "2026-11-27T23:00[UTC]"), "Mon 30 00:00 +0000");
        assert!(!weekend.at(&at("2026-11-30T00:00[UTC]")));
        for always in [windows(&[]), windows(&["00:00-24:00"]), windows(&["00:00-12:00", "12:00-24:00"])] {
            assert!(always.at(&at("2026-11-27T23:00[UTC]")));
            assert_eq!(change(&always, "2026-11-27T23:00[UTC]"), "never");
        }
        let never = Windows::closed_unless_given(&[]).unwrap();
        assert!(!never.at(&at("2026-11-27T23:00[UTC]")));
        assert_eq!(change(&never, "2026-11-27T23:00[UTC]"), "never");
    }

    #[test]
    fn the_clock_may_be_set_forward_and_back() {
        let nights = windows(&["22:00-06:00"]);
        let night = |from: &str| nights.open_before(&at(from), at(from).timestamp() + 20.hours());
        // Berlin sets the clock forward on 29 March 2026 at 02:00, and back on 25 October at 03:00.
        assert_eq!(night("2026-03-28T20:00[Europe/Berlin]"), SignedDuration::from_hours(7));
        assert_eq!(night("2026-10-24T20:00[Europe/Berlin]"), SignedDuration::from_hours(9));
        assert_eq!(change(&nights, "2026-03-28T23:00[Europe/Berlin]"), "Sun 29 06:00 +0200");
        let gap = windows(&["02:30-05:00"]);
        assert_eq!(change(&gap, "2026-03-29T01:00[Europe/Berlin]"), "Sun 29 03:30 +0200");
        assert_eq!(
            change(&windows(&["02:15-02:45"]), "2026-03-29T03:20[Europe/Berlin]"),
            "Sun 29 03:45 +0200"
        );
        // 02:30 comes twice; the hours begin at the first and do not end before the end.
        let fold = windows(&["02:30-05:00"]);
        assert_eq!(change(&fold, "2026-10-25T01:00[Europe/Berlin]"), "Sun 25 02:30 +0200");
        assert!(fold.at(&at("2026-10-25T02:10+01:00[Europe/Berlin]")), "the second 02:10");
        assert_eq!(change(&fold, "2026-10-25T02:40+02:00[Europe/Berlin]"), "Sun 25 05:00 +0100");
        // Samoa had no 30 December 2011.
        let samoa = windows(&["thu 22:00-06:00"]);
        assert!(samoa.at(&at("2011-12-29T23:00[Pacific/Apia]")));
    }

    #[test]
    fn every_change_is_a_change_for_a_year_of_every_kind() {
        for zone in ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"] {
            for texts in
                [&["22:00-06:00"][..], &["mon-fri 01:30-02:30", "sat 12:00-11:59"], &["sun 00:00-24:00"]]
            {
                let windows = windows(texts);
                let mut now = at(&format!("2026-01-01T00:00[{zone}]"));
                let mut changes = 0;
                while let Some(next) = windows.next_change(&now).filter(|_| now.year() == 2026) {
                    assert!(next > now.timestamp());
                    let before = (next - 1.seconds()).to_zoned_datetime(now.time_zone().clone());
                    let next = next.to_zoned_datetime(now.time_zone().clone());
                    assert_eq!(windows.at(&before), windows.at(&now), "{texts:?} {now}");
                    assert_ne!(windows.at(&next), windows.at(&now), "{texts:?} {now}");
                    (now, changes) = (next, changes + 1);
                }
                assert!(changes >= 100, "{texts:?} in {zone}: {changes}");
            }
        }
    }

    #[test]
    fn the_open_times_of_a_night_are_cut_to_it() {
        let noon = |day: i8| at(&format!("2026-11-{day}T12:00[UTC]")).timestamp();
        let hours = |texts: &[&str]| -> Vec<(i64, i64)> {
            let since = |at: Timestamp| at.duration_since(noon(24)).as_hours();
            let open = windows(texts).between(noon(24), noon(25), &TimeZone::UTC);
            open.into_iter().map(|(from, to)| (since(from), since(to))).collect()
        };
        assert_eq!(hours(&["22:00-06:00"]), [(10, 18)]);
        assert_eq!(hours(&["08:00-14:00", "20:00-21:00"]), [(0, 2), (8, 9), (20, 24)]);
        assert_eq!(hours(&["fri 22:00-06:00"]), [], "a Tuesday");
        assert_eq!([hours(&[]), hours(&["00:00-24:00"])], [[(0, 24)], [(0, 24)]]);
    }

    #[test]
    fn what_is_left_before_a_deadline_is_counted() {
        let nights = windows(&["22:00-06:00"]);
        let now = at("2026-11-24T12:00[UTC]");
        let left = |hours: i64| nights.open_before(&now, now.timestamp() + hours.hours()).as_hours();
        assert_eq!([0, 10, 12, 24, 48].map(left), [0, 0, 2, 8, 16]);
        for hours in 0..60 {
            let deadline = now.timestamp() + hours.hours();
            let open = nights.open_before(&now, deadline);
            for (more, enough) in [(-1, true), (0, true), (1, false)] {
                let needed = open + SignedDuration::from_secs(more);
                assert_eq!(nights.are_open_for(&now, deadline, needed), enough, "{hours} h, {more} s");
            }
        }
        assert_eq!(windows(&[]).open_before(&now, now.timestamp() + 5.hours()).as_hours(), 5);
    }
}
