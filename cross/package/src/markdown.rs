//! The documents of `docs/` as roff: the part of CommonMark that they use, and tables.
//!
//! A table becomes a list of terms, since a terminal is too narrow for five columns: its first column is the term, the
//! middle ones stand beside it, and the last one is the text. Links to other documents become the pages that those are
//! installed as.

use crate::manual::PAGES;
use crate::roff::{Roff, bold, code, escape, italic};
use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};

/// Documents that are installed as pages.
const INSTALLED: [(&str, &str); 5] = [
    ("spec.md", "finetuned-spec"),
    ("configuration.md", "finetuned.toml"),
    ("cli.md", "finetuned"),
    ("finetunectl.md", "finetunectl"),
    ("dbus", "org.finetuned.Finetuned1"),
];

/// Where the other documents are installed.
const DOCUMENTS: &str = "/usr/share/doc/finetuned";

/// The whole document: what stands before its first section is the DESCRIPTION.
pub fn document(text: &str, roff: &mut Roff) {
    roff.request("SH", &["DESCRIPTION"]);
    Writer::new(roff, true).write(text);
}

/// The sections only.
pub fn sections(text: &str, roff: &mut Roff) {
    Writer::new(roff, false).write(text);
}

struct Writer<'a> {
    roff: &'a mut Roff,
    /// Text of the paragraph, the item, the cell or the heading in the making.
    line: String,
    /// Whether what comes is written.
    wanted: bool,
    fonts: Vec<&'static str>,
    link: Option<(String, usize)>,
    lists: usize,
    /// A bullet stands before the next paragraph, which needs no break of its own.
    fresh_item: bool,
    code: Option<String>,
    table: Table,
}

#[derive(Default)]
struct Table {
    heads: Vec<String>,
    cells: Vec<String>,
}

impl<'a> Writer<'a> {
    fn new(roff: &'a mut Roff, introduction: bool) -> Writer<'a> {
        Writer {
            roff,
            line: String::new(),
            wanted: introduction,
            fonts: Vec::new(),
            link: None,
            lists: 0,
            fresh_item: false,
            code: None,
            table: Table::default(),
        }
    }

    fn write(mut self, text: &str) {
        for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
            self.event(event);
        }
    }

    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Start(tag) => self.start(tag),
            Event::End(tag) => self.end(tag),
            Event::Text(text) => match &mut self.code {
                Some(code) => code.push_str(&text),
                None => self.line.push_str(&escape(&text)),
            },
            Event::Code(text) => {
                let outer = self.fonts.last().copied().unwrap_or("\\fR");
                self.line.push_str(&format!("\\fB{}{outer}", breakable(&text)));
            }
            Event::SoftBreak | Event::HardBreak => self.line.push(' '),
            // Comments for other readers, footnotes, rules: the documents have none that a page would miss.
            _ => {}
        }
    }

    fn start(&mut self, tag: Tag<'_>) {
        match tag {
            Tag::Heading { level, .. } => {
                self.line.clear();
                if level != HeadingLevel::H1 {
                    self.wanted = true;
                }
            }
            Tag::Strong | Tag::Emphasis => {
                let font = if matches!(tag, Tag::Strong) { "\\fB" } else { "\\fI" };
                self.fonts.push(font);
                self.line.push_str(font);
            }
            Tag::Link { dest_url, .. } => self.link = Some((dest_url.to_string(), self.line.len())),
            Tag::List(_) => {
                // A list within an item ends the item's own text.
                self.paragraph();
                self.lists += 1;
                if self.lists > 1 {
                    self.request(".RS 4");
                }
            }
            Tag::Item => {
                self.request(".IP \\(bu 2");
                self.fresh_item = true;
            }
            Tag::CodeBlock(_) => {
                self.paragraph();
                self.code = Some(String::new());
            }
            Tag::Table(_) => self.table = Table::default(),
            Tag::TableHead | Tag::TableRow => self.table.cells.clear(),
            _ => {}
        }
    }

    fn end(&mut self, tag: TagEnd) {
        match tag {
            TagEnd::Heading(level) => self.heading(level),
            TagEnd::Paragraph | TagEnd::Item => self.paragraph(),
            TagEnd::Strong | TagEnd::Emphasis => {
                self.fonts.pop();
                self.line.push_str(self.fonts.last().copied().unwrap_or("\\fR"));
            }
            TagEnd::Link => self.end_link(),
            TagEnd::List(_) => {
                self.lists -= 1;
                self.fresh_item = false;
                if self.lists > 0 {
                    self.request(".RE");
                }
            }
            TagEnd::CodeBlock => {
                let text = self.code.take().unwrap_or_default();
                if self.wanted {
                    self.roff.verbatim(&text);
                }
            }
            TagEnd::TableCell => {
                let cell = std::mem::take(&mut self.line);
                self.table.cells.push(cell.trim().to_string());
            }
            TagEnd::TableHead => self.table.heads = std::mem::take(&mut self.table.cells),
            TagEnd::TableRow => self.row(),
            _ => {}
        }
    }

    fn request(&mut self, line: &str) {
        if self.wanted {
            self.roff.raw(line);
        }
    }

    fn paragraph(&mut self) {
        let line = std::mem::take(&mut self.line);
        if line.trim().is_empty() || !self.wanted {
            return;
        }
        if !std::mem::take(&mut self.fresh_item) {
            self.roff.raw(if self.lists > 0 { ".IP" } else { ".PP" });
        }
        self.roff.line(&line);
    }

    fn heading(&mut self, level: HeadingLevel) {
        let line = std::mem::take(&mut self.line);
        let plain = line.replace("\\fB", "").replace("\\fR", "").replace("\\-", "-");
        match level {
            // The name of the page says it.
            HeadingLevel::H1 => {}
            HeadingLevel::H2 => self.roff.request("SH", &[&capitals(&plain)]),
            _ => self.roff.request("SS", &[&plain]),
        }
    }

    fn end_link(&mut self) {
        let Some((url, start)) = self.link.take() else { return };
        let text = self.line.split_off(start);
        let target = url.split('#').next().unwrap_or_default().trim_end_matches('/');
        let file = target.rsplit('/').next().unwrap_or_default();
        if target.contains("://") {
            self.line.push_str(&format!("{text} <{}>", breakable(&url)));
        } else if let Some((_, page)) = INSTALLED.iter().find(|(document, _)| *document == file) {
            let section = PAGES.iter().find(|(name, ..)| name == page).map_or(0, |(_, section, _)| *section);
            self.line.push_str(&format!("{}({section})", bold(&code(page))));
        } else if target.is_empty() {
            self.line.push_str(&text);
        } else if file.ends_with(".md") {
            self.line.push_str(&italic(&code(&format!("{DOCUMENTS}/{file}"))));
        } else {
            self.line.push_str(&text);
        }
    }

    /// A row of a table as a term and its text.
    fn row(&mut self) {
        let cells = std::mem::take(&mut self.table.cells);
        if !self.wanted {
            return;
        }
        let [term, middle @ .., text] = cells.as_slice() else { return };
        let beside: Vec<String> = middle
            .iter()
            .zip(self.table.heads.iter().skip(1))
            .filter(|(cell, _)| !cell.is_empty())
            .map(|(cell, head)| match head.as_str() {
                "type" | "" => cell.clone(),
                head => format!("{head} {cell}"),
            })
            .collect();
        self.roff.raw(".TP");
        let term = if term.is_empty() { "\\&" } else { term };
        self.roff.line(&if beside.is_empty() {
            term.to_string()
        } else {
            format!("{term} ({})", beside.join("; "))
        });
        self.roff.line(if text.is_empty() { "\\&" } else { text });
    }
}

/// What is typed; where it would be too long for a line it may be broken after commas and slashes.
fn breakable(text: &str) -> String {
    /// Half a line of a page.
    const SHORT: usize = 40;
    let text = code(text);
    if text.len() < SHORT { text } else { text.replace(',', ",\\:").replace('/', "/\\:") }
}

/// The name of a section as manual pages write it; the name of a table of a file stays as it is typed.
fn capitals(heading: &str) -> String {
    if heading.starts_with('[') { heading.to_string() } else { heading.to_uppercase() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roff(text: &str) -> String {
        let mut roff = Roff::default();
        document(text, &mut roff);
        roff.into_text()
    }

    #[test]
    fn prose_lists_and_examples() {
        let text = roff(
            "# Title\n\nOne `--flag`,\n**bold [spec](spec.md)** and [there](https://example.org/a-b).\n\n* a\n  b\n* c\n\n## Two\n\n    x -1\n",
        );
        assert_eq!(
            text,
            ".SH \"DESCRIPTION\"\nOne \\fB\\-\\-flag\\fR, \\fBbold \\fBfinetuned\\-spec\\fR(5)\\fR and there \
             <https://example.org/a\\-b>.\n.IP \\(bu 2\na b\n.IP \\(bu 2\nc\n.SH \"TWO\"\n.RS 4\n.nf\nx \\-1\n.fi\n.RE\n"
        );
    }

    #[test]
    fn a_table_is_a_list_of_terms() {
        let text = roff(
            "| key | type | default | effect |\n|---|---|---|---|\n| `a_b` | integer | `1` | .Counts. |\n| `c` | path | | none |\n",
        );
        let expected =
            ".TP\n\\fBa_b\\fR (integer; default \\fB1\\fR)\n\\&.Counts.\n.TP\n\\fBc\\fR (path)\nnone\n";
        assert!(text.ends_with(expected), "{text}");
    }
}
