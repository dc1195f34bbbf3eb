//! The governor: what the machine can bear, and so how much of the time training may compute.
//!
//! ```text
//!   sysfs under a root ──sensors──► Readings ──control──► Decision (duty, reason) ──► permits
//!                                      │
//!                                      └──energy──► joules per step, run and night
//! ```
//!
//! Reading is in `sensors`, which knows boards; deciding is in `control`, a pure function of state, readings, budget and
//! time.

pub mod control;
pub mod door;
pub mod energy;
pub mod readings;
pub mod sensors;

use crate::reason::Reason;
use crate::units::{Celsius, Joules, RunId, Watts};

/// What the governor lets the runs do until its next word.
#[derive(Clone, Debug, PartialEq)]
pub struct Ruling {
    /// Why nothing may compute; absent when it may.
    pub hold: Option<Reason>,
    /// Why the machine is not fit for any work of ours, whatever the hours and the quotas say; absent when it is. What
    /// waits for neither, as a survey does, goes by it.
    pub unfit: Option<Reason>,
    /// Share of the time that may be computed, above 0 and at most 1, while there is no hold.
    pub duty: f64,
    /// A held run gives its memory back at once.
    pub release: bool,
    /// This run has used up its own energy: it is paused, which lets others go on.
    pub spent: Option<RunId>,
}

impl Ruling {
    /// Nothing is in the way.
    pub const FREE: Ruling = Ruling { hold: None, unfit: None, duty: 1.0, release: false, spent: None };
}

/// What the governor sees and decides, for people and the bus.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// The board's name, in words.
    pub board: String,
    /// Power mode, where the board has one: `MODE_30W`.
    pub mode: Option<String>,
    /// Where the control's state machine is.
    pub level: control::Level,
    /// Share of the time that may be computed.
    pub duty: f64,
    /// Why it is below one, or zero.
    pub reason: Option<Reason>,
    /// No thermal zone was ever seen.
    pub blind: bool,
    /// The temperature nearest to its set-point, and the set-point.
    pub temperature: Option<(Celsius, Celsius)>,
    /// Power of the counted rails.
    pub power: Option<Watts>,
    /// Everything that was read.
    pub readings: readings::Readings,
    /// Temperature that is held in each zone of the readings, in their order; absent where none is.
    pub set_points: Vec<Option<Celsius>>,
    /// Power that is held.
    pub power_limit: Option<Watts>,
    /// Power of the machine at rest, once it has rested.
    pub idle: Option<Watts>,
    /// Cap that the power mode sets to the memory's clock, in hertz.
    pub memory_clock_cap: Option<u64>,
    /// Energy that runs took this night, as the quota counts it; absent on a machine without a meter.
    pub night: Option<Joules>,
    /// The quota of a night.
    pub quota: Option<Joules>,
    /// What a person should know.
    pub notes: Vec<String>,
}

impl Default for View {
    fn default() -> View {
        View {
            board: String::new(),
            mode: None,
            level: control::Level::Boot,
            duty: 0.0,
            reason: None,
            blind: false,
            temperature: None,
            power: None,
            readings: readings::Readings::default(),
            set_points: Vec::new(),
            power_limit: None,
            idle: None,
            memory_clock_cap: None,
            night: None,
            quota: None,
            notes: Vec::new(),
        }
    }
}

impl<T> readings::Reading<T> {
    /// The value, if there is one.
    pub fn value(self) -> Option<T> {
        match self {
            readings::Reading::Value { value, .. } => Some(value),
            readings::Reading::Offline | readings::Reading::Lost { .. } => None,
        }
    }
}
