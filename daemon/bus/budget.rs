//! The budget as the bus reads and changes it: which keys, which values, whose.
//!
//! Who keeps it is the service; the objects have it as a [`BudgetBook`].

use super::Dictionary;
use super::error::{Error, Result};
use crate::config::Place;
use crate::config::settings::{Changes, Entry, Setting, Source};
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::watch;
use zbus::Variant;

/// What is asked of the book.
#[derive(Clone, Debug, PartialEq)]
pub enum BudgetRequest {
    /// Keys get other values, or those of the files; all of them or none.
    Change {
        /// Which.
        changes: Changes,
        /// Until the daemon starts again.
        runtime: bool,
    },
    /// Every key gets the value of the files.
    Clear,
}

/// Why nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum BudgetError {
    /// Every mistake, a line each.
    #[error("{0}")]
    Invalid(String),
    /// The disk refused it.
    #[error("{0}")]
    Storage(String),
}

impl From<BudgetError> for Error {
    fn from(error: BudgetError) -> Error {
        let text = error.to_string();
        match error {
            BudgetError::Invalid(_) => Error::InvalidInput(text),
            BudgetError::Storage(_) => Error::NoSpace(text),
        }
    }
}

/// The answer to a request.
pub type Answer<'a> = Pin<Box<dyn Future<Output = std::result::Result<(), BudgetError>> + Send + 'a>>;

/// Keeps the budget.
pub trait BudgetBook: Send + Sync + fmt::Debug {
    /// Every key as it is, in the order of the documentation, and word of changes.
    fn entries(&self) -> watch::Receiver<Arc<Vec<Entry>>>;

    /// Does what user `uid` asks. Durable, where it is meant to last, and in force when answered.
    fn request(&self, request: BudgetRequest, uid: u32) -> Answer<'_>;
}

/// An entry as the bus has it.
pub(super) fn dictionary(entry: &Entry) -> Result<Dictionary> {
    let place = match &entry.source {
        Source::File(Place::File { file, line, .. }) => format!("{file}:{line}"),
        Source::File(place) => place.to_string(),
        _ => String::new(),
    };
    let mut fields: Vec<(&str, Variant)> = vec![
        ("Key", entry.key.clone().into()),
        ("Value", entry.value.clone().into()),
        ("Default", entry.default.clone().into()),
        ("Files", entry.files.clone().into()),
        ("Source", entry.source.word().into()),
        ("Place", place.into()),
    ];
    if let Source::Set(Setting { uid, time_us, .. }) | Source::Runtime(Setting { uid, time_us, .. }) =
        &entry.source
    {
        fields.extend([("Uid", (*uid).into()), ("Time", (*time_us).into())]);
    }
    fields.into_iter().map(|(name, value)| Ok((name.to_string(), value.try_into_owned()?))).collect()
}

/// The keys whose value or source differ.
pub(super) fn differing(before: &[Entry], now: &[Entry]) -> Vec<String> {
    let pairs = before.iter().zip(now).filter(|(before, now)| before != now);
    pairs.map(|(_, now)| now.key.clone()).collect()
}
