//! A TOML document as a list of keys, each with its value and the place where it was written, so that every complaint
//! can name file, line and column (or the `--set` that caused it).
//!
//! Reading is by asking: [`Document::take`] removes a key and remembers that it was asked for. What is left at the end
//! was asked for by nobody, that is, unknown; and the list of what was asked for is the list of known keys, so the two
//! cannot drift apart. Complaints are collected, not returned one by one: a person sees all of them at once.

use std::collections::BTreeMap;
use std::fmt;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Where something was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A file; line and column (in characters) start at 1.
    File {
        /// As the caller named it.
        file: String,
        /// Line.
        line: usize,
        /// Column.
        column: usize,
    },
    /// A `--set` override, as given.
    Override(String),
    /// The file as a whole: something is absent.
    Whole(String),
    /// What the caller has just asked for, who knows where that stands.
    Request,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { file, line, column } => write!(f, "{file}:{line}:{column}"),
            Place::Override(text) => write!(f, "--set {text}"),
            Place::Whole(file) => f.write_str(file),
            Place::Request => Ok(()),
        }
    }
}

/// One thing that is wrong with a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Where.
    pub place: Place,
    /// `section.key`, or what stands in its place; empty for a syntax error.
    pub key: String,
    /// The value as it was written, where the value is what is wrong.
    pub value: Option<String>,
    /// What is wrong and what is allowed.
    pub problem: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.place != Place::Request {
            write!(f, "{}: ", self.place)?;
        }
        match (self.key.as_str(), &self.value) {
            ("", _) => write!(f, "{}", self.problem),
            (key, None) => write!(f, "{key}: {}", self.problem),
            (key, Some(value)) => write!(f, "{key} = {value}: {}", self.problem),
        }
    }
}

/// A TOML value, owned.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A string.
    String(String),
    /// An integer. TOML promises 64 bits; what is larger is kept as a float and fails every integer's range.
    Integer(i64),
    /// A float, possibly infinite or NaN.
    Float(f64),
    /// A boolean.
    Boolean(bool),
    /// An array.
    Array(Vec<Value>),
    /// A date or a table: no key takes one. Holds TOML's word for it.
    Other(&'static str),
}

impl Value {
    fn from_toml(value: &DeValue<'_>) -> Value {
        match value {
            DeValue::String(text) => Value::String(text.to_string()),
            DeValue::Integer(n) => match i64::from_str_radix(n.as_str(), n.radix()) {
                Ok(n) => Value::Integer(n),
                Err(_) => Value::Float(n.as_str().parse().unwrap_or(f64::INFINITY)),
            },
            DeValue::Float(n) => Value::Float(n.as_str().parse().unwrap_or(f64::NAN)),
            DeValue::Boolean(b) => Value::Boolean(*b),
            DeValue::Array(items) => {
                Value::Array(items.iter().map(|item| Value::from_toml(item.get_ref())).collect())
            }
            DeValue::Datetime(_) => Value::Other("date"),
            DeValue::Table(_) => Value::Other("table"),
        }
    }

    /// What the value is, in words that fit after "not".
    pub fn kind(&self) -> &'static str {
        match self {
            Value::String(_) => "a string",
            Value::Integer(_) => "an integer",
            Value::Float(_) => "a float",
            Value::Boolean(_) => "a boolean",
            Value::Array(_) => "a list",
            Value::Other("date") => "a date",
            Value::Other(_) => "a table",
        }
    }
}

/// A key's value, where the key stands, and how the value was written.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The value.
    pub value: Value,
    /// Where the value stands.
    pub place: Place,
    /// The value's text, shortened, for messages.
    pub shown: String,
    /// The text after `=` when the value comes from an override: a key that takes a string takes it as it is.
    pub override_text: Option<String>,
}

/// Longest value quoted in a message, in characters.
const SHOWN: usize = 60;

/// A document being read.
pub struct Document {
    file: String,
    /// The page that documents the keys.
    page: &'static str,
    /// `(section, key)` to its value; a key outside every section has the section "".
    entries: BTreeMap<(String, String), Entry>,
    /// Section headers, by name, for complaints about sections that nobody knows.
    sections: BTreeMap<String, Place>,
    asked: Vec<(&'static str, &'static str)>,
    /// Where those stand that were asked for and there.
    taken: Vec<(&'static str, &'static str, Place)>,
    mistakes: Vec<Mistake>,
    broken: bool,
}

impl Document {
    /// Splits `text` and the overrides (`section.key=value`) into keys. Syntax errors become mistakes.
    /// `page` documents the keys, for those who are far from every one of them.
    pub fn new(text: &str, file: &str, page: &'static str, overrides: &[String]) -> Document {
        let mut document = Document {
            file: file.to_string(),
            page,
            entries: BTreeMap::new(),
            sections: BTreeMap::new(),
            asked: Vec::new(),
            taken: Vec::new(),
            mistakes: Vec::new(),
            broken: false,
        };
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            document.broken = true;
            let place = match error.span() {
                Some(span) => place_of(text, file, span.start),
                None => Place::Whole(file.to_string()),
            };
            document.complain(place, "", format!("not valid TOML: {}", error.message()));
        }
        for (name, value) in table.get_ref() {
            let section = name.get_ref().to_string();
            let place = place_of(text, file, name.span().start);
            match value.get_ref() {
                DeValue::Table(keys) => {
                    for (key, value) in keys {
                        let entry = entry_in_file(text, file, key.span().start, value);
                        document.entries.insert((section.clone(), key.get_ref().to_string()), entry);
                    }
                    document.sections.insert(section, place);
                }
                _ => {
                    let entry = entry_in_file(text, file, name.span().start, value);
                    document.entries.insert((String::new(), section), entry);
                }
            }
        }
        for text in overrides {
            document.set(text);
        }
        document
    }

    /// The mistakes, when the file is not even TOML: what was recovered may mislead, so nothing else should be said.
    pub fn syntax_errors(&mut self) -> Option<Vec<Mistake>> {
        self.broken.then(|| std::mem::take(&mut self.mistakes))
    }

    fn set(&mut self, text: &str) {
        let place = Place::Override(text.to_string());
        let Some((path, raw)) = text.split_once('=') else {
            return self.complain(place, "", "expected section.key=value, such as train.max_steps=10".into());
        };
        let (path, raw) = (path.trim(), raw.trim());
        if !path.contains('.') {
            return self.complain(place, path, "expected section.key, such as train.max_steps".into());
        }
        self.insert(path, raw, place);
    }

    /// Gives a key, `section.key`, a value as an override has it: TOML, or a bare word.
    pub fn insert(&mut self, path: &str, raw: &str, place: Place) {
        let Some((section, key)) = path.split_once('.') else {
            return self.complain(place, path, "expected section.key".into());
        };
        let value = match DeValue::parse(raw) {
            Ok(value) => Value::from_toml(value.get_ref()),
            // A bare word is a string, so that a shell needs no quotes inside quotes.
            Err(_) if !raw.is_empty() && !raw.starts_with(['"', '\'', '[', '{']) => {
                Value::String(raw.to_string())
            }
            Err(error) => {
                let problem = format!("the value is not valid TOML: {}", error.message());
                return self.complain(place, path, problem);
            }
        };
        let entry =
            Entry { value, place: place.clone(), shown: shorten(raw), override_text: Some(raw.to_string()) };
        self.sections.entry(section.to_string()).or_insert(place);
        self.entries.insert((section.to_string(), key.to_string()), entry);
    }

    /// Adds a complaint.
    pub fn complain(&mut self, place: Place, key: &str, problem: String) {
        self.mistakes.push(Mistake { place, key: key.to_string(), value: None, problem });
    }

    /// Complains about a key's value.
    pub fn complain_value(&mut self, section: &str, key: &str, entry: &Entry, problem: String) {
        let (key, value) = (format!("{section}.{key}"), Some(entry.shown.clone()));
        self.mistakes.push(Mistake { place: entry.place.clone(), key, value, problem });
    }

    /// Complains that something is absent.
    pub fn complain_absent(&mut self, section: &str, key: &str, problem: &str) {
        let place = match self.sections.get(section) {
            Some(place) => place.clone(),
            None => Place::Whole(self.file.clone()),
        };
        self.complain(place, &format!("{section}.{key}"), problem.to_string());
    }

    /// Takes a key out of the document.
    pub fn take(&mut self, section: &'static str, key: &'static str) -> Option<Entry> {
        self.asked.push((section, key));
        let entry = self.entries.remove(&(section.to_string(), key.to_string()))?;
        self.taken.push((section, key, entry.place.clone()));
        Some(entry)
    }

    /// Where the keys stand that were taken so far.
    pub fn taken(&self) -> &[(&'static str, &'static str, Place)] {
        &self.taken
    }

    /// Two keys of which at most one may be given. An override of one replaces the other where that stands in the
    /// file, so that `--set train.max_steps=10` works on a spec that counts epochs.
    pub fn exclusive(&mut self, section: &'static str, first: &'static str, second: &'static str) {
        let key = |name: &str| (section.to_string(), name.to_string());
        let (Some(a), Some(b)) = (self.entries.get(&key(first)), self.entries.get(&key(second))) else {
            return;
        };
        match (a.override_text.is_some(), b.override_text.is_some()) {
            (true, false) => drop(self.entries.remove(&key(second))),
            (false, true) => drop(self.entries.remove(&key(first))),
            _ => {
                let (place, other) = (b.place.clone(), a.place.clone());
                let problem = format!("excludes {section}.{first} ({other}); give one of the two");
                self.complain(place, &format!("{section}.{second}"), problem);
            }
        }
    }

    /// Every `(section, key)` that was asked for so far, in order.
    #[cfg(test)]
    pub fn known(&self) -> &[(&'static str, &'static str)] {
        &self.asked
    }

    /// Complains about everything that nobody asked for, and returns all mistakes, in the order of the file.
    pub fn finish(mut self) -> Vec<Mistake> {
        let known_sections: Vec<&str> = {
            let mut names: Vec<&str> = self.asked.iter().map(|(section, _)| *section).collect();
            names.dedup();
            names
        };
        for (section, place) in std::mem::take(&mut self.sections) {
            if known_sections.contains(&section.as_str()) {
                continue;
            }
            self.entries.retain(|(of, _), _| *of != section);
            let hint = match nearest(&section, known_sections.iter().copied()) {
                Some(name) => format!("; did you mean [{name}]?"),
                None => format!("; known: {}", known_sections.join(", ")),
            };
            self.complain(place, &format!("[{section}]"), format!("unknown section{hint}"));
        }
        for ((section, key), entry) in std::mem::take(&mut self.entries) {
            if section.is_empty() && known_sections.contains(&key.as_str()) {
                let problem = format!("is a section: write [{key}] on a line of its own, then its keys");
                self.complain(entry.place, &key, problem);
                continue;
            }
            let elsewhere = self.asked.iter().find(|(_, known)| *known == key).map(|(section, _)| *section);
            let here = self.asked.iter().filter(|(of, _)| *of == section).map(|(_, key)| *key);
            let hint = match (elsewhere, nearest(&key, here)) {
                (Some(home), _) => format!("it belongs in [{home}]"),
                (None, Some(near)) => format!("did you mean `{near}`?"),
                (None, None) => match nearest(&key, self.asked.iter().map(|(_, key)| *key)) {
                    Some(near) => {
                        let home =
                            self.asked.iter().find(|(_, key)| *key == near).map_or("", |(home, _)| *home);
                        format!("did you mean `{near}` in [{home}]?")
                    }
                    None => format!("{} lists every key", self.page),
                },
            };
            let name = if section.is_empty() { key } else { format!("{section}.{key}") };
            self.complain(entry.place, &name, format!("unknown key; {hint}"));
        }
        self.mistakes.sort_by_key(|mistake| match &mistake.place {
            Place::Whole(_) => (0, 0, 0),
            Place::File { line, column, .. } => (1, *line, *column),
            Place::Override(_) | Place::Request => (2, 0, 0),
        });
        self.mistakes
    }
}

/// An entry whose place is that of its key: line and key are what a person looks for.
fn entry_in_file(text: &str, file: &str, key_start: usize, value: &Spanned<DeValue<'_>>) -> Entry {
    Entry {
        value: Value::from_toml(value.get_ref()),
        place: place_of(text, file, key_start),
        shown: shorten(text.get(value.span()).unwrap_or_default()),
        override_text: None,
    }
}

fn place_of(text: &str, file: &str, offset: usize) -> Place {
    let before = text.get(..offset.min(text.len())).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    Place::File {
        file: file.to_string(),
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
    }
}

fn shorten(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    if line.chars().count() <= SHOWN && line.len() == text.len() {
        return line.to_string();
    }
    line.chars().take(SHOWN).chain("…".chars()).collect()
}

/// The candidate a typing mistake away from `word`, if there is one. Jaro-Winkler above 0.8 accepts one or two slips in
/// a word of this length and no unrelated word.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    candidates
        .map(|candidate| (strsim::jaro_winkler(&word, candidate), candidate))
        .filter(|(score, _)| *score > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}
