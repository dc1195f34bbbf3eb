//! Quantities with their unit in the type.

use std::fmt;
use std::time::Duration;

/// A number of bytes. Displays in binary multiples, as `free -h` does.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        if unit == 0 { write!(f, "{} B", self.0) } else { write!(f, "{value:.1} {}", UNITS[unit]) }
    }
}

impl std::ops::Add for Bytes {
    type Output = Bytes;
    fn add(self, other: Bytes) -> Bytes {
        Bytes(self.0 + other.0)
    }
}

impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Bytes>>(iter: I) -> Bytes {
        Bytes(iter.map(|b| b.0).sum())
    }
}

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident, $unit:literal, $digits:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub f64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:.*} {}", f.precision().unwrap_or($digits), self.0, $unit)
            }
        }

        impl std::ops::Add for $name {
            type Output = $name;
            fn add(self, other: $name) -> $name {
                $name(self.0 + other.0)
            }
        }

        impl std::ops::Sub for $name {
            type Output = $name;
            fn sub(self, other: $name) -> $name {
                $name(self.0 - other.0)
            }
        }
    };
}

quantity!(
    /// A temperature, or a difference of two.
    Celsius, "°C", 1
);
quantity!(
    /// Power.
    Watts, "W", 1
);
quantity!(
    /// Energy.
    Joules, "J", 0
);

impl Joules {
    /// From watt-hours.
    pub fn from_watt_hours(watt_hours: f64) -> Joules {
        Joules(watt_hours * 3600.0)
    }

    /// In watt-hours.
    pub fn watt_hours(self) -> f64 {
        self.0 / 3600.0
    }
}

/// Names a run for ever: twelve lower-case hexadecimal digits, drawn at random when it is submitted. Random, and not a
/// time, so that the first two or three digits are enough for a person to name it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(transparent)]
pub struct RunId(String);

impl RunId {
    /// Digits of an id.
    pub const LENGTH: usize = 12;

    /// The id with these digits, if they are one.
    pub fn parse(text: &str) -> Option<RunId> {
        let digit = |c: char| matches!(c, '0'..='9' | 'a'..='f');
        (text.len() == RunId::LENGTH && text.chars().all(digit)).then(|| RunId(text.to_string()))
    }

    /// The id of these 48 bits.
    pub fn from_bits(bits: [u8; RunId::LENGTH / 2]) -> RunId {
        RunId(bits.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for RunId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<RunId, D::Error> {
        let text = String::deserialize(deserializer)?;
        RunId::parse(&text).ok_or_else(|| serde::de::Error::custom(format!("{text:?} is no run id")))
    }
}

/// A number with at least so many significant digits, and no decimals that mean nothing.
pub fn significant(value: f64, digits: usize) -> String {
    if !value.is_finite() || value == 0.0 {
        return format!("{value}");
    }
    let decimals = digits as i32 - 1 - value.abs().log10().floor() as i32;
    if decimals > 6 { format!("{value:.1e}") } else { format!("{value:.*}", decimals.max(0) as usize) }
}

/// A length of time in its two largest units.
pub fn duration(length: Duration) -> String {
    let s = length.as_secs();
    match s {
        0..10 => format!("{:.1} s", length.as_secs_f64()),
        10..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86400, s % 86400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_display_in_binary_multiples() {
        assert_eq!(Bytes(0).to_string(), "0 B");
        assert_eq!(Bytes(1023).to_string(), "1023 B");
        assert_eq!(Bytes(1536).to_string(), "1.5 KiB");
        assert_eq!(Bytes(3 << 30).to_string(), "3.0 GiB");
    }

    #[test]
    fn run_ids_are_twelve_digits() {
        let id = RunId::from_bits([0, 1, 0xab, 0xff, 0x10, 9]);
        assert_eq!(id.as_str(), "0001abff1009");
        assert_eq!(RunId::parse("0001abff1009"), Some(id));
        for bad in ["", "0001abff100", "0001abff10099", "0001ABFF1009", "../etc/passw", "0001abff100/"] {
            assert_eq!(RunId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn numbers_read_well() {
        let shown = [0.0, 0.512, 12.34, 1234.5, 0.00123, 1e-9, f64::NAN].map(|v| significant(v, 2));
        assert_eq!(shown, ["0", "0.51", "12", "1234", "0.0012", "1.0e-9", "NaN"]);
        let shown = [5, 130, 7260, 90000].map(|s| duration(Duration::from_secs(s)));
        assert_eq!(shown, ["5.0 s", "2 min 10 s", "2 h 1 min", "1 d 1 h"]);
    }
}
