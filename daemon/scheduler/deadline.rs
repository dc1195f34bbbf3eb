//! Whether a run will be done by its deadline: what is left of it, against the hours that are left.
//!
//! ```text
//!              the hours that are left are fewer than what is left of the run
//!   in time ─────────────────────────────────────────────────────────────────► at risk
//!           ◄─────────────────────────────────────────────────────────────────
//!              they are more again, by SLACK of it
//! ```
//!
//! Runs that go first, pauses and what the governor will do are not known ahead: a run that is not at risk may still be
//! late. Pure: the time is passed in.

use super::window::Windows;
use jiff::{SignedDuration, Timestamp, ZonedDateTime};
use std::time::Duration;

/// Share of what is left that must be spare before a run counts as in time again: the pace of steps wavers by less.
const SLACK: f64 = 0.05;

/// Whether a run is at risk of being late. `left` is the training that is left, where it is known; `was` is what this said
/// before.
pub fn at_risk(
    left: Option<Duration>,
    deadline: Timestamp,
    times: &Windows,
    now: &ZonedDateTime,
    was: bool,
) -> bool {
    // Before the first steps nothing is known but that it takes some time.
    let left = left.unwrap_or(Duration::from_secs(1));
    let needed = if was { left.mul_f64(1.0 + SLACK) } else { left };
    let needed = SignedDuration::try_from(needed).unwrap_or(SignedDuration::MAX);
    !times.are_open_for(now, deadline, needed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::ToSpan;

    fn nights() -> Windows {
        Windows::open_unless_given(&["22:00-06:00".to_string()]).unwrap()
    }

    fn at(text: &str) -> ZonedDateTime {
        text.parse().unwrap()
    }

    fn hours(hours: u64) -> Option<Duration> {
        Some(Duration::from_secs(hours * 3600))
    }

    #[test]
    fn only_the_hours_before_the_deadline_count() {
        let now = at("2026-11-24T12:00[Europe/Berlin]");
        // Two nights of eight hours.
        let deadline = at("2026-11-26T08:00[Europe/Berlin]").timestamp();
        let says = |left, was| at_risk(left, deadline, &nights(), &now, was);
        assert!(!says(hours(16), false));
        assert!(says(hours(17), false));
        assert!(says(hours(16), true), "as long as it is that close");
        assert!(!says(hours(15), true));
        assert!(!says(None, false), "nothing is known before the first steps");
        let always = Windows::open_unless_given(&[]).unwrap();
        assert!(!at_risk(hours(17), deadline, &always, &now, false));
    }

    #[test]
    fn a_deadline_that_has_passed_or_has_no_hours_before_it_is_at_risk() {
        let now = at("2026-11-24T12:00[UTC]");
        let before = |deadline| at_risk(None, deadline, &nights(), &now, false);
        assert!(before(now.timestamp() - 1.seconds()));
        assert!(before(now.timestamp()));
        assert!(before(now.timestamp() + 9.hours()), "before the night begins");
        assert!(!before(now.timestamp() + 11.hours()));
        let finished = at_risk(hours(0), now.timestamp() - 1.seconds(), &nights(), &now, false);
        assert!(!finished, "nothing is left to be late");
    }

    #[test]
    fn work_for_ages_is_no_overflow() {
        let now = at("2026-11-24T12:00[UTC]");
        assert!(at_risk(Some(Duration::MAX / 2), now.timestamp() + 10.hours(), &nights(), &now, true));
    }
}
