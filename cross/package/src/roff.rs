//! The few requests of man(7) that the pages are written in.

use std::fmt::Write;

/// A page in the making.
#[derive(Default)]
pub struct Roff {
    text: String,
}

impl Roff {
    /// The text so far.
    pub fn into_text(self) -> String {
        self.text
    }

    /// A request with its arguments, each quoted.
    pub fn request(&mut self, name: &str, arguments: &[&str]) {
        let _ = write!(self.text, ".{name}");
        for argument in arguments {
            let _ = write!(self.text, " \"{}\"", escape(argument).replace('"', "\\(dq"));
        }
        self.text.push('\n');
    }

    /// Lines that are roff already.
    pub fn raw(&mut self, lines: &str) {
        let mut lines = lines.trim_end_matches('\n');
        // A heading has begun a paragraph already.
        if self.after_heading() {
            lines = lines.strip_prefix(".PP").map_or(lines, |rest| rest.trim_start_matches('\n'));
        }
        if !lines.is_empty() {
            self.text.push_str(lines);
            self.text.push('\n');
        }
    }

    fn after_heading(&self) -> bool {
        let last = self.text.lines().next_back().unwrap_or_default();
        last.starts_with(".SH") || last.starts_with(".SS")
    }

    /// A line of text with its fonts ([`escape`], [`bold`], …). One that a request could be mistaken for is guarded.
    pub fn line(&mut self, line: &str) {
        let line = line.trim();
        if line.is_empty() {
            return;
        }
        if line.starts_with(['.', '\'']) {
            self.text.push_str("\\&");
        }
        self.text.push_str(line);
        self.text.push('\n');
    }

    /// Text that keeps its lines.
    pub fn verbatim(&mut self, text: &str) {
        self.raw(".PP\n.RS 4\n.nf");
        for line in text.trim_end().lines() {
            let line = code(line);
            let guard = if line.starts_with(['.', '\'']) { "\\&" } else { "" };
            // An empty line would be a break in the middle of a display.
            let _ = writeln!(self.text, "{guard}{}", if line.is_empty() { "\\&" } else { &line });
        }
        self.raw(".fi\n.RE");
    }
}

/// Plain text.
pub fn escape(text: &str) -> String {
    text.replace('\\', "\\e")
}

/// Text that is typed: its hyphens are those of the keyboard, its quotes are straight.
pub fn code(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\e"),
            '-' => out.push_str("\\-"),
            '\'' => out.push_str("\\(aq"),
            '`' => out.push_str("\\(ga"),
            '^' => out.push_str("\\(ha"),
            '~' => out.push_str("\\(ti"),
            c => out.push(c),
        }
    }
    out
}

/// In bold, of what is escaped already.
pub fn bold(escaped: &str) -> String {
    format!("\\fB{escaped}\\fR")
}

/// In italics, of what is escaped already.
pub fn italic(escaped: &str) -> String {
    format!("\\fI{escaped}\\fR")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_taken_for_a_request() {
        let mut roff = Roff::default();
        roff.line(".hidden");
        roff.line("");
        roff.verbatim("'a\n\n--set x\\y");
        assert_eq!(roff.into_text(), "\\&.hidden\n.PP\n.RS 4\n.nf\n\\(aqa\n\\&\n\\-\\-set x\\ey\n.fi\n.RE\n");
    }

    #[test]
    fn a_heading_needs_no_paragraph() {
        let mut roff = Roff::default();
        roff.request("SH", &["A"]);
        roff.raw(".PP");
        roff.line("text");
        roff.raw(".PP");
        roff.line("more");
        assert_eq!(roff.into_text(), ".SH \"A\"\ntext\n.PP\nmore\n");
    }

    #[test]
    fn arguments_keep_their_quotes() {
        let mut roff = Roff::default();
        roff.request("SH", &["say \"no\""]);
        assert_eq!(roff.into_text(), ".SH \"say \\(dqno\\(dq\"\n");
    }
}
