//! The runs on D-Bus.
//!
//! ```text
//!   connection (system bus, session bus, or a peer) ──► object server
//!     /org/finetuned/Finetuned1            Manager, ObjectManager
//!     /org/finetuned/Finetuned1/Run/<id>   Run
//!     /org/freedesktop/LogControl1         LogControl1
//!        each call ──► authority (who is it, may it) ──► Runs
//!        each change of a run ──► publisher of each connection ──► signals
//! ```
//!
//! [`server`] makes the connections, `publish` keeps the objects of one connection in step with the runs.
//! The client's proxies, [`ManagerProxy`] and [`RunProxy`], come from the same declarations as the objects.
//! `docs/dbus/` describes the interface; a test compares it with what is served.

pub mod authority;
pub mod budget;
pub mod error;
pub mod governor;
mod input;
pub mod log_control;
pub mod manager;
mod peer;
mod publish;
pub mod run;
pub mod server;
mod slots;
#[cfg(test)]
mod tests;

pub use budget::{BudgetBook, BudgetError, BudgetRequest};
pub use error::Error;
pub use governor::GovernorProxy;
pub use log_control::{LogSwitch, LogTarget};
pub use manager::ManagerProxy;
pub use run::RunProxy;
pub use server::{Endpoint, ServeError, Server, Service};

use crate::governor::View;
use crate::night::Nights;
use crate::runs::Runs;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::watch;
use zbus::{OwnedVariant, Variant};

/// The name on the bus.
pub const NAME: &str = "org.finetuned.Finetuned1";

/// The path of the manager; runs lie below it.
pub const ROOT: &str = "/org/finetuned/Finetuned1";

/// Options of a call (`a{sv}`), and dictionaries in answers.
pub type Dictionary = HashMap<String, OwnedVariant>;

/// Calls that may wait for the end of a run, of all connections.
const WAITS: u32 = 256;

/// What every object of a connection needs.
#[derive(Clone, Debug)]
struct Context {
    runs: Runs,
    /// What the governor sees and decides.
    governor: watch::Receiver<Arc<View>>,
    /// What may be taken, and who changes it.
    budget: Arc<dyn BudgetBook>,
    nights: Nights,
    authority: Arc<authority::Authority>,
    waits: Arc<slots::Slots>,
}

/// Whether two values of a property are the same; NaN, which says "not known yet", is itself.
fn same(a: &Variant<'_>, b: &Variant<'_>) -> bool {
    match (a, b) {
        (Variant::F64(a), Variant::F64(b)) => a.to_bits() == b.to_bits(),
        (a, b) => a == b,
    }
}
