//! Rust source as a list of tokens, good enough to find paths and calls: comments, strings and characters are gone,
//! everything else is an identifier, `::`, or one punctuation character.

use std::iter::Peekable;
use std::str::Chars;

/// A token and the line it stands on, from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub text: String,
    pub line: usize,
}

impl Token {
    pub fn is_identifier(&self) -> bool {
        self.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
    }
}

struct Reader<'a> {
    chars: Peekable<Chars<'a>>,
    line: usize,
}

impl Reader<'_> {
    fn next(&mut self) -> Option<char> {
        let c = self.chars.next();
        self.line += usize::from(c == Some('\n'));
        c
    }

    fn take_if(&mut self, wanted: char) -> bool {
        let found = self.chars.peek() == Some(&wanted);
        if found {
            self.next();
        }
        found
    }

    fn skip_line(&mut self) {
        while self.chars.peek().is_some_and(|&c| c != '\n') {
            self.next();
        }
    }

    /// Block comments nest.
    fn skip_block_comment(&mut self) {
        let mut depth = 1;
        while depth > 0 {
            match self.next() {
                Some('/') if self.take_if('*') => depth += 1,
                Some('*') if self.take_if('/') => depth -= 1,
                Some(_) => {}
                None => return,
            }
        }
    }

    /// After the opening quote.
    fn skip_string(&mut self) {
        while let Some(c) = self.next() {
            match c {
                '\\' => {
                    self.next();
                }
                '"' => return,
                _ => {}
            }
        }
    }

    /// After `r`: `#`s, a quote, anything, a quote and as many `#`s.
    fn skip_raw_string(&mut self) {
        let mut hashes = 0;
        while self.take_if('#') {
            hashes += 1;
        }
        if !self.take_if('"') {
            return; // r#identifier
        }
        while let Some(c) = self.next() {
            if c == '"' && (0..hashes).all(|_| self.take_if('#')) {
                return;
            }
        }
    }

    /// After `'`: a character, or a lifetime (which is skipped too: no rule looks at one).
    fn skip_quote(&mut self) {
        match self.next() {
            Some('\\') => {
                self.next();
                while self.next().is_some_and(|c| c != '\'') {}
            }
            Some(c) if !self.take_if('\'') && (c.is_alphanumeric() || c == '_') => {
                while self.chars.peek().is_some_and(|c| c.is_alphanumeric() || *c == '_') {
                    self.next();
                }
            }
            _ => {}
        }
    }
}

/// The tokens of `source`.
pub fn tokens(source: &str) -> Vec<Token> {
    let mut reader = Reader { chars: source.chars().peekable(), line: 1 };
    let mut tokens = Vec::new();
    loop {
        let line = reader.line;
        let Some(c) = reader.next() else { return tokens };
        let mut push = |text: String| tokens.push(Token { text, line });
        match c {
            '/' if reader.take_if('/') => reader.skip_line(),
            '/' if reader.take_if('*') => reader.skip_block_comment(),
            '"' => reader.skip_string(),
            '\'' => reader.skip_quote(),
            ':' if reader.take_if(':') => push("::".into()),
            c if c.is_alphanumeric() || c == '_' => {
                let mut word = String::from(c);
                while let Some(&next) = reader.chars.peek() {
                    if !(next.is_alphanumeric() || next == '_') {
                        break;
                    }
                    word.push(next);
                    reader.next();
                }
                match (word.as_str(), reader.chars.peek()) {
                    ("r" | "br" | "cr", Some('"' | '#')) => reader.skip_raw_string(),
                    ("b" | "c", Some('"')) => {} // the quote is next
                    _ => push(word),
                }
            }
            c if c.is_whitespace() => {}
            c => push(c.into()),
        }
    }
}

/// Index of the token that closes the bracket at `open`, or the end.
fn closing(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => {
                depth -= 1;
                if depth == 0 {
                    return i;
                }
            }
            _ => {}
        }
    }
    tokens.len()
}

/// The tokens without what is compiled for tests only, and the names of the modules that are (`#[cfg(test)] mod x;`).
pub fn without_tests(tokens: &[Token]) -> (Vec<Token>, Vec<String>) {
    let (mut kept, mut modules) = (Vec::new(), Vec::new());
    let text = |i: usize| tokens.get(i).map_or("", |t: &Token| t.text.as_str());
    let mut i = 0;
    while i < tokens.len() {
        let is_attribute = text(i) == "#" && text(i + 1) == "[";
        let end = if is_attribute { closing(tokens, i + 1) } else { i };
        let inside: Vec<&str> = tokens[i..end].iter().map(|t| t.text.as_str()).collect();
        let for_tests = inside.starts_with(&["#", "[", "cfg", "(", "test", ")"])
            || inside.starts_with(&["#", "[", "cfg", "(", "all", "(", "test", ","]);
        if !for_tests {
            kept.push(tokens[i].clone());
            i += 1;
            continue;
        }
        // The item ends with its first `;` or with the brace that closes its body.
        i = end + 1;
        let mut named = false;
        while i < tokens.len() {
            match text(i) {
                "mod" => named = true,
                ";" => {
                    if named {
                        modules.push(text(i - 1).to_string());
                    }
                    break;
                }
                "{" => {
                    i = closing(tokens, i);
                    break;
                }
                "(" | "[" => i = closing(tokens, i),
                _ => {}
            }
            i += 1;
        }
        i += 1;
    }
    (kept, modules)
}
