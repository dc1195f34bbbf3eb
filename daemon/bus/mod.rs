//! The runs on D-Bus.
//!
//! ```text
//!   connection (system bus, session bus, or a peer) ──► object server
//!     /org/finetuned/Finetuned1            Manager, ObjectManager
//!     /org/finetuned/Finetuned1/Run/<id>   Run
//!     /org/freedesktop/LogControl1         LogControl1
//!        each call ──► authority (who is it, may it) ──► Runs
//! ```
//!
//! The client's proxies, [`ManagerProxy`] and [`RunProxy`], come from the same declarations as the objects.
//! `docs/dbus/` describes the interface; a test compares it with what is served.

pub mod authority;
pub mod error;
pub mod manager;
pub mod run;

pub use error::Error;
pub use manager::ManagerProxy;
pub use run::RunProxy;

use std::collections::HashMap;
use zbus::OwnedVariant;

/// The name on the bus.
pub const NAME: &str = "org.finetuned.Finetuned1";

/// The path of the manager; runs lie below it.
pub const ROOT: &str = "/org/finetuned/Finetuned1";

/// Options of a call (`a{sv}`), and dictionaries in answers.
pub type Dictionary = HashMap<String, OwnedVariant>;
