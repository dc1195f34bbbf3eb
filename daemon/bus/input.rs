//! What callers pass: options and texts. Nothing that is unknown, of another type or unfit for a terminal gets through.

use super::Dictionary;
use super::error::{Error, Result};
use zbus::{OwnedVariant, Type, Variant};

/// Options of a call. Each is taken once; what is left at the end is refused.
pub(super) struct Options {
    given: Dictionary,
    known: Vec<&'static str>,
}

impl Options {
    pub fn new(given: Dictionary) -> Options {
        Options { given, known: Vec::new() }
    }

    /// The option `name`, if it is given.
    pub fn take<T>(&mut self, name: &'static str) -> Result<Option<T>>
    where
        T: TryFrom<OwnedVariant> + Type,
    {
        self.known.push(name);
        let Some(value) = self.given.remove(name) else { return Ok(None) };
        let found = Variant::from(value.try_clone()?).value_signature().to_string();
        match T::try_from(value) {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(Error::InvalidInput(format!(
                "option {name:?} has the type {found:?}: pass it as {:?}",
                T::SIGNATURE.to_string()
            ))),
        }
    }

    /// Refuses what was not taken.
    pub fn finish(self) -> Result<()> {
        let mut unknown: Vec<&String> = self.given.keys().collect();
        unknown.sort();
        let Some(first) = unknown.first() else { return Ok(()) };
        let known = match &self.known[..] {
            [] => "this call has none".to_string(),
            known => format!("this call knows {}", known.join(", ")),
        };
        Err(Error::InvalidInput(format!("{:?} is no option: {known}", shortened(first))))
    }
}

/// Refuses every option.
pub(super) fn no_options(given: Dictionary) -> Result<()> {
    Options::new(given).finish()
}

/// `text` if it can be shown to a person: at most `limit` bytes, without control characters and without characters
/// that turn the direction of writing, which could make one text look like another.
pub(super) fn plain(what: &str, text: String, limit: usize) -> Result<String> {
    if text.len() > limit {
        return Err(Error::InvalidInput(format!(
            "{what} has {} bytes: {limit} is the most that is taken",
            text.len()
        )));
    }
    match text.chars().find(|&c| c.is_control() || turns(c)) {
        Some(c) => Err(Error::InvalidInput(format!(
            "{what} contains the control character U+{:04X}: remove it",
            u32::from(c)
        ))),
        None => Ok(text),
    }
}

/// Like [`plain`], and not empty.
pub(super) fn name(what: &str, text: String, limit: usize) -> Result<String> {
    if text.trim().is_empty() {
        return Err(Error::InvalidInput(format!("{what} is empty")));
    }
    plain(what, text, limit)
}

/// Marks, embeddings, overrides and isolates of bidirectional text, and separators of lines and paragraphs.
fn turns(c: char) -> bool {
    matches!(c, '\u{200E}' | '\u{200F}' | '\u{061C}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
}

/// The beginning of a text that may be long, for a message.
pub(super) fn shortened(text: &str) -> String {
    match text.char_indices().nth(64) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dictionary(entries: Vec<(&str, Variant<'static>)>) -> Dictionary {
        entries.into_iter().map(|(k, v)| (k.to_string(), v.try_into_owned().unwrap())).collect()
    }

    fn message(error: Error) -> String {
        match error {
            Error::InvalidInput(text) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_are_taken_by_type_and_the_rest_is_refused() {
        let mut options = Options::new(dictionary(vec![("hold", true.into()), ("priority", 3i32.into())]));
        assert_eq!(options.take::<bool>("hold").unwrap(), Some(true));
        assert_eq!(options.take::<i32>("priority").unwrap(), Some(3));
        assert_eq!(options.take::<String>("spec-name").unwrap(), None);
        options.finish().unwrap();

        let mut options = Options::new(dictionary(vec![("hold", "yes".into())]));
        let text = message(options.take::<bool>("hold").unwrap_err());
        assert_eq!(text, "option \"hold\" has the type \"s\": pass it as \"b\"");

        let mut options = Options::new(dictionary(vec![("prio", 3i32.into())]));
        options.take::<bool>("hold").unwrap();
        options.take::<i32>("priority").unwrap();
        let text = message(options.finish().unwrap_err());
        assert_eq!(text, "\"prio\" is no option: this call knows hold, priority");

        let text = message(no_options(dictionary(vec![("x", 1u32.into())])).unwrap_err());
        assert_eq!(text, "\"x\" is no option: this call has none");
    }

    #[test]
    fn texts_are_short_and_plain() {
        assert_eq!(plain("who", "Küche, Roboter 7".into(), 64).unwrap(), "Küche, Roboter 7");
        for bad in ["a\u{1b}[31mb", "a\nb", "a\u{0}b", "a\u{202E}b", "a\u{2066}b", "a\u{85}b"] {
            assert!(message(plain("who", bad.into(), 64).unwrap_err()).contains("U+"), "{bad:?}");
        }
        assert!(message(plain("who", "x".repeat(65), 64).unwrap_err()).contains("65 bytes"));
        assert!(message(name("who", " ".into(), 64).unwrap_err()).contains("empty"));
        assert_eq!(shortened(&"é".repeat(100)), format!("{}…", "é".repeat(64)));
    }
}
