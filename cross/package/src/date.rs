//! A moment as the formats want it written, without a time zone to depend on.

/// A moment, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    year: u64,
    month: u64,
    day: u64,
    /// Within the day.
    second: u64,
}

impl Date {
    /// Seconds since 1970. Days to civil date: the algorithm of Fliegel and Van Flandern (CACM 11(10), 1968).
    pub fn from_epoch(seconds: u64) -> Date {
        let julian = seconds / 86_400 + 2_440_588;
        let mut l = julian + 68_569;
        let n = 4 * l / 146_097;
        l -= (146_097 * n).div_ceil(4);
        let i = 4000 * (l + 1) / 1_461_001;
        l = l + 31 - 1461 * i / 4;
        let j = 80 * l / 2447;
        let day = l - 2447 * j / 80;
        let month = j + 2 - 12 * (j / 11);
        Date { year: 100 * (n - 49) + i + j / 11, month, day, second: seconds % 86_400 }
    }

    /// `2026-11-25`
    pub fn day(self) -> String {
        format!("{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }

    /// `2026-11-25T02:42:47Z`
    pub fn second(self) -> String {
        let (hours, minutes, seconds) = (self.second / 3600, self.second / 60 % 60, self.second % 60);
        format!("{}T{hours:02}:{minutes:02}:{seconds:02}Z", self.day())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(Date::from_epoch(0).second(), "1970-01-01T00:00:00Z");
        assert_eq!(Date::from_epoch(951_782_400).day(), "2000-02-29");
        assert_eq!(Date::from_epoch(951_868_799).second(), "2000-02-29T23:59:59Z");
        assert_eq!(Date::from_epoch(951_868_800).day(), "2000-03-01");
        assert_eq!(Date::from_epoch(1_795_574_567).second(), "2026-11-25T02:42:47Z");
        assert_eq!(Date::from_epoch(4_107_542_400).day(), "2100-03-01");
    }
}
