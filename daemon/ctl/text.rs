//! Text for people: pure functions from data to strings.

use crate::units::duration;
use std::fmt::Write;
use std::time::Duration;

/// Longest name in a table, in characters. `--json` has the whole.
const LONGEST: usize = 40;

/// Fewest digits of an abbreviated id.
const FEWEST_DIGITS: usize = 4;

/// Whether a character could move the cursor, change colours, or reorder what stands beside it.
pub fn hostile(c: char) -> bool {
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// One line of text from elsewhere, harmless on a terminal: control characters are written as escapes.
pub fn printable(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if hostile(c) { safe.extend(c.escape_default()) } else { safe.push(c) }
    }
    safe
}

/// The same for text of several lines: ends of lines and tabs stay.
pub fn printable_lines(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if hostile(c) && c != '\n' && c != '\t' { safe.extend(c.escape_default()) } else { safe.push(c) }
    }
    safe
}

/// At most so many characters, the last one an ellipsis where some were cut off.
pub fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_string();
    }
    text.chars().take(most.saturating_sub(1)).chain("…".chars()).collect()
}

/// How many digits tell these ids apart, at least four.
pub fn digits<'a>(ids: impl Iterator<Item = &'a str>) -> usize {
    let mut ids: Vec<&str> = ids.collect();
    ids.sort_unstable();
    ids.dedup();
    let shared = |a: &str, b: &str| a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    ids.windows(2).map(|pair| shared(pair[0], pair[1]) + 1).fold(FEWEST_DIGITS, usize::max)
}

/// The first so many characters.
pub fn prefix(text: &str, characters: usize) -> &str {
    text.char_indices().nth(characters).map_or(text, |(at, _)| &text[..at])
}

/// The last `width` values as a line of blocks between the least and the greatest of them; what is not finite is a gap.
pub fn sparkline(values: &[f64], width: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let shown = &values[values.len().saturating_sub(width)..];
    let finite = || shown.iter().copied().filter(|value| value.is_finite());
    let (least, greatest) =
        finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), v| (least.min(v), most.max(v)));
    shown
        .iter()
        .map(|&value| match value.is_finite() {
            true if greatest > least => {
                let level = (value - least) / (greatest - least) * (BLOCKS.len() - 1) as f64;
                BLOCKS[(level.round() as usize).min(BLOCKS.len() - 1)]
            }
            true => BLOCKS[0],
            false => ' ',
        })
        .collect()
}

/// A length of time in its largest unit, as a table has room for.
pub fn age(length: Duration) -> String {
    let s = length.as_secs();
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min", s / 60),
        3600..86400 => format!("{} h", s / 3600),
        _ => format!("{} d", s / 86400),
    }
}

/// `2 h 1 min left`.
pub fn left(seconds: u64) -> String {
    format!("{} left", duration(Duration::from_secs(seconds)))
}

/// `1 run`, `2 runs`.
pub fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Columns under their headers, two spaces apart; the last column is not padded. Cells are made printable and names are
/// cut where they would push everything else off the screen.
pub fn table<const N: usize>(headers: [&str; N], rows: &[[String; N]]) -> String {
    columns(headers, rows, LONGEST)
}

/// A [`table`] whose cells are cut at `longest` characters.
pub fn columns<const N: usize>(headers: [&str; N], rows: &[[String; N]], longest: usize) -> String {
    let cells: Vec<[String; N]> = std::iter::once(headers.map(String::from))
        .chain(rows.iter().map(|row| std::array::from_fn(|i| shorten(&printable(&row[i]), longest))))
        .collect();
    let width = |i: usize| cells.iter().map(|row| row[i].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &cells {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A page of labelled values, labels to the right, as `systemctl status` has them. Values may have several lines.
pub fn fields(rows: &[(&str, String)]) -> String {
    let shown = rows.iter().filter(|(_, value)| !value.is_empty());
    let width = shown.map(|(label, _)| label.chars().count()).max().unwrap_or(0) + 2;
    let mut text = String::new();
    for (label, value) in rows {
        for (i, line) in value.lines().enumerate() {
            let label = if i == 0 { format!("{label}:") } else { String::new() };
            let _ = writeln!(text, "{label:>0$} {line}", width + 1);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_characters_are_escaped() {
        assert_eq!(
            printable("naïve\x1b[31m\r\n\u{9b}31m\u{202e}x"),
            r"naïve\u{1b}[31m\r\n\u{9b}31m\u{202e}x"
        );
        assert_eq!(printable_lines("a\n\tb\x07"), "a\n\tb\\u{7}");
    }

    #[test]
    fn ids_are_as_long_as_they_must_be() {
        assert_eq!(digits([].into_iter()), 4);
        assert_eq!(digits(["0123456789ab", "9123456789ab"].into_iter()), 4);
        assert_eq!(digits(["0123456789ab", "ffffffffffff", "0123459789ab"].into_iter()), 7);
        assert_eq!(digits(["0123456789ab", "0123456789ab"].into_iter()), 4);
        assert_eq!(prefix("0123456789ab", 5), "01234");
        assert_eq!(prefix("äöü", 2), "äö");
        assert_eq!(prefix("ab", 5), "ab");
    }

    #[test]
    fn sparklines_go_from_least_to_greatest() {
        assert_eq!(sparkline(&[3.0, 2.0, 1.0, f64::NAN, 0.0], 9), "█▆▃ ▁");
        assert_eq!(sparkline(&[9.0, 1.0, 0.0], 2), "█▁");
        assert_eq!(sparkline(&[1.0, 1.0], 9), "▁▁");
        assert_eq!(sparkline(&[], 9), "");
        assert_eq!(sparkline(&[f64::INFINITY, -1.0], 9), " ▁");
    }

    #[test]
    fn ages_have_one_unit() {
        let shown = [0, 59, 60, 3599, 7200, 200_000].map(|s| age(Duration::from_secs(s)));
        assert_eq!(shown, ["0 s", "59 s", "1 min", "59 min", "2 h", "2 d"]);
    }

    #[test]
    fn columns_line_up() {
        let rows = [["a".into(), "1".into()], ["béé\n".into(), String::new()]];
        assert_eq!(table(["NAME", "N"], &rows), "NAME   N\na      1\nbéé\\n\n");
        let long = table(["NAME"], &[["x".repeat(50)]]);
        assert_eq!(long.lines().last().unwrap(), format!("{}…", "x".repeat(39)));
        assert_eq!(
            fields(&[("State", "running".into()), ("Error", "one\ntwo".into()), ("None", String::new())]),
            "  State: running\n  Error: one\n         two\n"
        );
    }
}
