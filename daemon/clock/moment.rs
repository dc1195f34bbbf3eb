//! Moments as a person writes them: `2026-11-27 06:00`, `06:00`, `+8h`, or with an offset.

use jiff::civil::{DateTime, Time};
use jiff::{SignedDuration, Timestamp, ToSpan, ZonedDateTime};

/// Units after a `+`, the largest first, in seconds.
const UNITS: [(&str, u64); 4] = [("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)];

/// The moment that a text means, seen from `now`: a time with its offset (`2026-11-27T06:00+01:00`), a local time
/// (`2026-11-27 06:00`; where the clock is set, as RFC 5545 has it), the next time that a clock here shows it (`06:00`), or
/// so long from now (`+1d 8h`).
///
/// # Errors
/// A text that is none of these, or a moment beyond the calendar.
pub fn parse(text: &str, now: &ZonedDateTime) -> Result<Timestamp, String> {
    let text = text.trim();
    let moment = match text.strip_prefix('+') {
        Some(length) => seconds(length)
            .and_then(|seconds| now.timestamp().checked_add(SignedDuration::from_secs(seconds)).ok()),
        None => (text.parse::<Timestamp>().ok())
            .or_else(|| now.time_zone().to_timestamp(text.parse::<DateTime>().ok()?).ok())
            .or_else(|| next(text.parse().ok()?, now)),
    };
    moment.ok_or_else(|| {
        format!(
            "{text:?} is no moment: write a local one (\"2026-11-27 06:00\", \"06:00\"), one with its offset \
             (2026-11-27T06:00+01:00), or how long from now (+8h, +1d12h, +90min)"
        )
    })
}

/// When a clock shows this time next.
fn next(time: Time, now: &ZonedDateTime) -> Option<Timestamp> {
    let zone = now.time_zone();
    let on = |days: i64| zone.to_timestamp(now.date().checked_add(days.days()).ok()?.to_datetime(time)).ok();
    on(0).filter(|today| *today > now.timestamp()).or_else(|| on(1))
}

/// `8h`, `1d 12h`, `90min`: whole numbers, each with its unit, in all more than nothing.
fn seconds(text: &str) -> Option<i64> {
    let mut rest = text.trim();
    let mut total = 0u64;
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?);
        let (unit, after) =
            after.split_at(after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len()));
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit)?;
        total = total.checked_add(number.parse::<u64>().ok()?.checked_mul(*factor)?)?;
        rest = after.trim_start();
    }
    i64::try_from(total).ok().filter(|seconds| *seconds > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_in_every_way() {
        // A Wednesday.
        let now: ZonedDateTime = "2026-11-25T12:30[Europe/Berlin]".parse().unwrap();
        let read = |text: &str| parse(text, &now).map(|at| at.to_string());
        for (text, moment) in [
            ("2026-11-27 06:00", "2026-11-27T05:00:00Z"),
            ("2026-11-27T06:00", "2026-11-27T05:00:00Z"),
            ("2026-11-27T06:00:30", "2026-11-27T05:00:30Z"),
            ("2026-11-27T06:00+00:00", "2026-11-27T06:00:00Z"),
            ("2026-11-27T06:00-05:00", "2026-11-27T11:00:00Z"),
            ("2026-11-27T06:00Z", "2026-11-27T06:00:00Z"),
            ("2026-11-27", "2026-11-26T23:00:00Z"),
            ("2026-07-01 06:00", "2026-07-01T04:00:00Z"),
            ("06:00", "2026-11-26T05:00:00Z"),
            ("23:59", "2026-11-25T22:59:00Z"),
            ("12:30", "2026-11-26T11:30:00Z"),
            ("+8h", "2026-11-25T19:30:00Z"),
            ("+1d 12h30min", "2026-11-27T00:00:00Z"),
            (" +90s ", "2026-11-25T11:31:30Z"),
        ] {
            assert_eq!(read(text), Ok(moment.to_string()), "{text}");
        }
        for bad in [
            "",
            "soon",
            "6",
            "+",
            "+0h",
            "+8",
            "+8 parsecs",
            "-8h",
            "25:00",
            "2026-13-01 06:00",
            "2026-11-28T06:00 tomorrow",
            "99999-01-01",
            "+99999999999999d",
        ] {
            let error = read(bad).unwrap_err();
            assert!(error.contains("is no moment: write"), "{bad}: {error}");
        }
    }
}
