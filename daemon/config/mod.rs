//! The TOML files a person writes.
//!
//! ```text
//!  text + --set overrides ──document──► keys with their places ──resolve──► Spec ──render──► text, hash, differences
//! ```
//!
//! `spec` holds the values, `document` knows TOML and where each key stands, `resolve` knows every key with its type,
//! range and default, `render` writes a spec back and says which keys determine a result.
//!
//! The daemon's own configuration goes the same way: `daemon` and `budget` hold the values, `load` finds the files and
//! knows the keys, `settings` lays single keys over them while the daemon runs, `times` reads hours of the week.

pub mod budget;
pub mod daemon;
mod document;
mod load;
mod render;
mod resolve;
pub mod settings;
pub mod spec;
pub mod times;

pub use document::{Mistake, Place, nearest};
pub use load::{ConfigError, Loaded, Mode};
