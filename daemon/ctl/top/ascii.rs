//! The page on terminals that know ASCII alone.

/// What stands for a symbol.
pub fn of(symbol: &str) -> char {
    let c = symbol.chars().next().unwrap_or(' ');
    match c {
        '─' | '━' => '-',
        '│' | '┃' => '|',
        '╭' | '╮' | '╰' | '╯' | '┌' | '┐' | '└' | '┘' | '├' | '┤' | '┬' | '┴' | '┼' => {
            '+'
        }
        '█' | '▉' | '▊' | '▋' | '▌' | '▇' => '#',
        '▆' | '▅' => '=',
        '▄' | '▃' => '-',
        '▂' | '▁' => '_',
        '▍' | '▎' | '▏' | '·' => '.',
        '▶' => '>',
        '●' | '•' => '*',
        '↑' => '^',
        '↓' => 'v',
        '×' => 'x',
        '°' => ' ',
        '…' => '~',
        '\u{2800}'..='\u{28ff}' => dots(c as u32 & 0xff),
        _ => '?',
    }
}

/// A braille cell: where its dots lie.
fn dots(bits: u32) -> char {
    // Rows from above: dots 1 and 4, 2 and 5, 3 and 6, 7 and 8.
    let (above, below) = (bits & 0b0001_1011 != 0, bits & 0b1110_0100 != 0);
    match (above, below) {
        (true, true) => ':',
        (true, false) => '\'',
        (false, true) => '.',
        (false, false) => ' ',
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_has_a_sign() {
        assert_eq!(
            ["█", "╭", "⠁", "⣀", "⣿", "⠀", "é", "漢"].map(of),
            ['#', '+', '\'', '.', ':', ' ', '?', '?']
        );
        assert!((0x80..0x3_0000).filter_map(char::from_u32).all(|c| of(&c.to_string()).is_ascii()));
    }
}
