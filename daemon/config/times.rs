//! Hours of the week as a person writes them: `22:00-06:00`, `sat,sun 00:00-24:00`, `mon-fri 18:30-07:00`.
//!
//! ```text
//!   hours := [ days " " ] HH:MM "-" HH:MM        days := day ["-" day] { "," day ["-" day] }
//!   day   := mon | tue | wed | thu | fri | sat | sun
//! ```
//!
//! The days are those on which the hours begin: `fri 22:00-06:00` ends on Saturday morning. Only text and numbers here;
//! what they mean on a calendar is the scheduler's part.

use std::fmt;

/// The days' names, Monday first.
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
/// Minutes of a day.
pub const DAY: u16 = 24 * 60;

/// Hours that come back every week.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hours {
    /// Whether they begin on this day, Monday first.
    pub days: [bool; 7],
    /// Begin, in minutes after midnight of the wall clock: 0 to 1439.
    pub from: u16,
    /// End, in minutes after the same midnight: above `from`; above 1440 it lies on the next day.
    pub to: u16,
}

/// Why a text is no hours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoursError {
    text: String,
    /// Character at which it goes wrong, from 1.
    position: usize,
    problem: String,
}

impl fmt::Display for HoursError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HoursError { text, position, problem } = self;
        write!(
            f,
            "{text:?}: at character {position}: {problem}; allowed: \"22:00-06:00\", or with days before it, \
             \"mon-fri 18:30-07:00\", \"sat,sun 00:00-24:00\""
        )
    }
}

impl std::error::Error for HoursError {}

impl Hours {
    /// Reads hours.
    ///
    /// # Errors
    /// The text, the place and what is allowed.
    pub fn parse(text: &str) -> Result<Hours, HoursError> {
        let mut reader = Reader { text, at: 0 };
        reader.blanks();
        let days = if reader.rest().starts_with(|c: char| c.is_ascii_digit()) {
            [true; 7]
        } else {
            let days = reader.days()?;
            if !reader.rest().starts_with(' ') {
                return reader.fail("a blank and the time come after the days");
            }
            reader.blanks();
            days
        };
        let from_at = reader.at;
        let from = reader.clock()?;
        if from == DAY {
            reader.at = from_at;
            return reader.fail("nothing begins at 24:00; the day after begins at 00:00");
        }
        reader.blanks();
        if !reader.eat("-") {
            return reader.fail("a `-` comes between begin and end");
        }
        reader.blanks();
        let to_at = reader.at;
        let to = reader.clock()?;
        reader.blanks();
        if !reader.rest().is_empty() {
            return reader.fail("nothing comes after the end");
        }
        if from == to {
            reader.at = to_at;
            return reader.fail("begin and end are the same; the whole day is 00:00-24:00");
        }
        Ok(Hours { days, from, to: if to > from { to } else { to + DAY } })
    }
}

struct Reader<'a> {
    text: &'a str,
    /// Bytes that were read.
    at: usize,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn fail<T>(&self, problem: &str) -> Result<T, HoursError> {
        let position = self.text[..self.at].chars().count() + 1;
        // A configuration may hold anything; a message shows a line of it.
        let text = self.text.chars().take(60).collect();
        Err(HoursError { text, position, problem: problem.to_string() })
    }

    fn eat(&mut self, word: &str) -> bool {
        let there = self.rest().starts_with(word);
        if there {
            self.at += word.len();
        }
        there
    }

    fn blanks(&mut self) {
        while self.eat(" ") {}
    }

    fn days(&mut self) -> Result<[bool; 7], HoursError> {
        let mut days = [false; 7];
        loop {
            let first = self.day()?;
            let last = if self.eat("-") { self.day()? } else { first };
            // `fri-mon` goes over the end of the week.
            let mut day = first;
            days[day] = true;
            while day != last {
                day = (day + 1) % 7;
                days[day] = true;
            }
            if !self.eat(",") {
                return Ok(days);
            }
        }
    }

    fn day(&mut self) -> Result<usize, HoursError> {
        let word = self.rest().get(..3).unwrap_or_default().to_ascii_lowercase();
        match DAYS.iter().position(|day| *day == word) {
            Some(day) => {
                self.at += 3;
                Ok(day)
            }
            None => self.fail("a time (HH:MM) or a day (mon, tue, wed, thu, fri, sat, sun) is expected"),
        }
    }

    /// `HH:MM`, up to 24:00, in minutes.
    fn clock(&mut self) -> Result<u16, HoursError> {
        let start = self.at;
        let hours = self.two_digits();
        let colon = self.eat(":");
        let minutes = self.two_digits();
        match (hours, colon, minutes) {
            (Some(hours), true, Some(minutes)) if minutes < 60 && hours * 60 + minutes <= DAY => {
                Ok(hours * 60 + minutes)
            }
            _ => {
                self.at = start;
                self.fail("a time from 00:00 to 24:00 is expected, two digits each")
            }
        }
    }

    fn two_digits(&mut self) -> Option<u16> {
        let digits = self.rest().get(..2).filter(|word| word.bytes().all(|b| b.is_ascii_digit()))?;
        self.at += 2;
        digits.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn days(text: &str) -> [bool; 7] {
        DAYS.map(|day| text.contains(day))
    }

    #[test]
    fn hours_are_read() {
        let read = |text: &str| Hours::parse(text).unwrap();
        assert_eq!(read("22:00-06:00"), Hours { days: [true; 7], from: 1320, to: 1440 + 360 });
        assert_eq!(read("00:00-24:00"), Hours { days: [true; 7], from: 0, to: 1440 });
        assert_eq!(read("22:00-00:00").to, 1440);
        assert_eq!(read("sat,sun 08:00-09:30"), Hours { days: days("sat sun"), from: 480, to: 570 });
        assert_eq!(read(" Mon-Fri  18:30 - 07:00 ").days, days("mon tue wed thu fri"));
        assert_eq!(read("fri-mon,wed 00:01-00:02").days, days("fri sat sun mon wed"));
    }

    #[test]
    fn a_mistake_is_named_with_its_place() {
        for (text, position, words) in [
            ("", 1, "a time (HH:MM) or a day"),
            ("nights", 1, "a time (HH:MM) or a day"),
            ("mon,22:00-06:00", 5, "a time (HH:MM) or a day"),
            ("mon22:00-06:00", 4, "a blank"),
            ("22:00", 6, "a `-`"),
            ("22-06", 1, "two digits"),
            ("9:00-10:00", 1, "two digits"),
            ("22:60-06:00", 1, "two digits"),
            ("22:00-24:01", 7, "00:00 to 24:00"),
            ("24:00-06:00", 1, "nothing begins at 24:00"),
            ("06:00-06:00", 7, "the whole day"),
            ("06:00-07:00 daily", 13, "nothing comes after"),
            ("sö 06:00-07:00", 1, "a day"),
            ("06:0é-07:00", 1, "two digits"),
        ] {
            let error = Hours::parse(text).unwrap_err();
            assert_eq!(error.position, position, "{error}");
            assert!(error.problem.contains(words), "{error}");
            assert!(error.to_string().contains("22:00-06:00"), "{error}");
        }
    }
}
