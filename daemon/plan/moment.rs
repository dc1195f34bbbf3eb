//! A moment as a person writes it: `06:00`, `2026-11-28 06:00`, `2026-11-28T06:00+01:00`.

use jiff::civil::{DateTime, Time};
use jiff::{Timestamp, ToSpan, ZonedDateTime};

/// The moment that a text means, seen from `now`. A time alone is the next such time; what has no offset is local, and
/// compatible with RFC 5545 where the clock is set.
///
/// # Errors
/// A text that is none of these, or a moment beyond the calendar.
pub fn parse(text: &str, now: &ZonedDateTime) -> Result<Timestamp, String> {
    let text = text.trim();
    let bad = || {
        format!("{text:?} is no moment: write 06:00 (the next), 2026-11-28 06:00, or 2026-11-28T06:00+01:00")
    };
    if let Ok(timestamp) = text.parse::<Timestamp>() {
        return Ok(timestamp);
    }
    let local = |at: DateTime| now.time_zone().to_timestamp(at).map_err(|_| bad());
    if text.len() <= "23:59:59".len() {
        let time: Time = text.parse().map_err(|_| bad())?;
        let today = local(now.date().to_datetime(time))?;
        if today > now.timestamp() {
            return Ok(today);
        }
        let tomorrow = now.date().checked_add(1.days()).map_err(|_| bad())?;
        return local(tomorrow.to_datetime(time));
    }
    local(text.parse().map_err(|_| bad())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_write_moments_in_several_ways() {
        let now: ZonedDateTime = "2026-11-27T22:30[Europe/Berlin]".parse().unwrap();
        for (text, expected) in [
            ("06:00", "2026-11-28T05:00:00Z"),
            ("23:00", "2026-11-27T22:00:00Z"),
            ("22:30", "2026-11-28T21:30:00Z"),
            ("2026-11-28 06:00", "2026-11-28T05:00:00Z"),
            ("2026-11-28T06:00", "2026-11-28T05:00:00Z"),
            ("2026-11-28T06:00-05:00", "2026-11-28T11:00:00Z"),
            ("2026-11-28T06:00:00Z", "2026-11-28T06:00:00Z"),
            ("2026-11-28", "2026-11-27T23:00:00Z"),
        ] {
            assert_eq!(parse(text, &now).map(|at| at.to_string()), Ok(expected.to_string()), "{text}");
        }
        for bad in ["", "soon", "25:00", "6", "2026-13-01", "2026-11-28T06:00 tomorrow", "99999-01-01"] {
            assert!(parse(bad, &now).unwrap_err().contains("is no moment"), "{bad}");
        }
    }
}
