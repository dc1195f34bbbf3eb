//! The closed list of reasons why a run is not training. A reason is a stable word: it appears in metrics, journals
//! and on the bus, and scripts may match on it. Readers tolerate words they do not know.

use std::fmt;

/// Why a run waits, is paused, or ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// A person asked: a signal in the foreground, a call on the bus.
    User,
    /// Held-out loss stopped improving.
    EarlyStopping,
    /// Loss or gradient was not finite.
    Diverged,
    /// No space, or the disk refused a write.
    Storage,
}

impl Reason {
    /// The stable word.
    pub fn word(self) -> &'static str {
        match self {
            Reason::User => "user",
            Reason::EarlyStopping => "early-stopping",
            Reason::Diverged => "diverged",
            Reason::Storage => "storage",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}
