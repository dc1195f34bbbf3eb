//! From files to sequences.
//!
//! ```text
//!  source    rows of a file, one at a time (JSON Lines, JSON array, CSV)
//!    ▼
//!  record    five row formats become a conversation, a prompt with its completion, or a text
//!    ▼
//!  example   tokens, and which of them are learnt   ◄── template, tokenizer
//!    ▼
//!  rows      the token store: made once, mapped afterwards
//!    ▼
//!  plan      order of an epoch, rows packed into sequences   ──► sequence
//! ```
//!
//! [`prepare()`] drives the first four. `docs/data.md` is the user's side of it.

pub use plan::{EpochPlan, WINDOW};
pub use prepare::{DataError, PreparedData, Progress, Stage, prepare};
pub use report::{Bin, DataReport, FileReport, Marks, SplitReport, inspect, inspect_json};
pub use rows::{Mask, StoreError, TokenRows};
pub use sequence::{IGNORE, Sequence};
pub use source::{MAX_ROW_BYTES, SourceError};
pub use template::TemplateError;
pub use tokenizer::{ChatTokenizer, TokenizerError};

mod example;
mod plan;
mod prepare;
mod record;
mod report;
mod rows;
mod sequence;
mod source;
mod template;
mod tokenizer;

#[cfg(test)]
mod golden;
