//! The closed list of reasons why a run is not training. A reason is a stable word: it appears in metrics, journals
//! and on the bus, and scripts may match on it. Readers tolerate words they do not know.

use serde::de::{self, Deserialize, Deserializer};
use serde::ser::{Serialize, Serializer};
use std::fmt;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $word:literal,)*) => {
        /// Why a run waits, is paused, or ended.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            /// Every reason, in the order of the documentation.
            pub const ALL: &[Reason] = &[$(Reason::$name,)*];

            /// The stable word.
            pub fn word(self) -> &'static str {
                match self {
                    $(Reason::$name => $word,)*
                }
            }
        }
    };
}

reasons! {
    /// A person asked: a signal in the foreground, a call on the bus.
    User = "user",
    /// Somebody holds an inhibitor.
    Inhibited = "inhibited",
    /// Somebody has a lease of the device.
    Leased = "leased",
    /// Too warm.
    Thermal = "thermal",
    /// Too much power.
    PowerBudget = "power-budget",
    /// The night's, or the run's, energy is used up.
    EnergyQuota = "energy-quota",
    /// The supply dips or its current is limited.
    OverCurrent = "over-current",
    /// A sensor that the budget needs is silent.
    SensorLost = "sensor-lost",
    /// Memory is short.
    MemoryPressure = "memory-pressure",
    /// It is not the time for training.
    OutsideWindow = "outside-window",
    /// Settings that were made earlier cannot be kept to.
    SettingsLost = "settings-lost",
    /// No external power.
    OnBattery = "on-battery",
    /// The battery is low.
    BatteryLow = "battery-low",
    /// The machine is busy with something else.
    Busy = "busy",
    /// The fan would be too loud.
    QuietHours = "quiet-hours",
    /// The machine is about to sleep.
    Suspend = "suspend",
    /// A run with a higher priority has the device.
    Preempted = "preempted",
    /// The worker failed; the next attempt comes after a pause.
    Backoff = "backoff",
    /// The daemon starts again after it, or the machine, went down.
    DaemonRestart = "daemon-restart",
    /// The daemon or the machine is going down.
    Shutdown = "shutdown",
    /// The worker no longer hears from the daemon.
    DaemonLost = "daemon-lost",
    /// Held-out loss stopped improving.
    EarlyStopping = "early-stopping",
    /// Loss, gradient or adapter was not finite.
    Diverged = "diverged",
    /// No space, or the disk refused a write.
    Storage = "storage",
    /// The spec, the data or the model cannot be used.
    InvalidInput = "invalid-input",
    /// What a checkpoint was made from has changed.
    Changed = "changed",
    /// The run does not fit in this machine's memory.
    DoesNotFit = "does-not-fit",
    /// The kernel ended the worker for memory.
    OutOfMemory = "out-of-memory",
    /// The worker died.
    Crashed = "crashed",
    /// The GPU reported an error, or cannot be used.
    Device = "device",
    /// The worker went silent, or made no progress.
    Hung = "hung",
    /// The worker said something that the protocol does not know.
    Protocol = "protocol",
    /// The worker could not be started.
    Launch = "launch",
    /// No run is there that could train.
    NoRun = "no-run",
    /// The daemon, or the machine, was off, or left no record.
    Off = "off",
    /// The machine's clock was set, and what lies between was not lived through.
    ClockSet = "clock-set",
    /// The share of the time rises slowly after a rest, until it is known what the machine bears.
    RampUp = "ramp-up",
}

impl Reason {
    /// The reason with this word.
    pub fn from_word(word: &str) -> Option<Reason> {
        Reason::ALL.iter().copied().find(|reason| reason.word() == word)
    }

    /// What it means, for people.
    pub fn meaning(self) -> &'static str {
        match self {
            Reason::User => "somebody asked for it",
            Reason::Inhibited => "somebody holds all training",
            Reason::Leased => "an inference task has the device",
            Reason::Thermal => "it is too warm: it goes on when it has cooled",
            Reason::PowerBudget => "the power budget is used up",
            Reason::EnergyQuota => "the energy of the night, or of the run, is used up",
            Reason::OverCurrent => "the supply dips or its current is limited: look at cable and adapter",
            Reason::SensorLost => "a sensor that the budget needs is silent: `finetuned sensors` says which",
            Reason::MemoryPressure => "memory is short",
            Reason::OutsideWindow => "it is not the time for training: see `[window]`",
            Reason::SettingsLost => "what was set earlier is lost: `finetunectl budget show` says more",
            Reason::OnBattery => "there is no external power",
            Reason::BatteryLow => "the battery is low",
            Reason::Busy => "the machine is busy with something else",
            Reason::QuietHours => "the fan would be too loud",
            Reason::Suspend => "the machine is about to sleep, or slept",
            Reason::Preempted => "a run with a higher priority goes first",
            Reason::Backoff => "the last attempt failed; the next one comes after a pause",
            Reason::DaemonRestart => "the daemon has started again",
            Reason::Shutdown => "the daemon or the machine is going down",
            Reason::DaemonLost => "the worker lost the daemon",
            Reason::EarlyStopping => "held-out loss stopped improving",
            Reason::Diverged => "loss, gradient or adapter was not finite: try a lower learning_rate",
            Reason::Storage => "the disk is full or refused a write",
            Reason::InvalidInput => "the spec, the data or the model cannot be used",
            Reason::Changed => "what the checkpoint was made from has changed",
            Reason::DoesNotFit => {
                "it does not fit in this machine's memory: `finetuned plan` says what would"
            }
            Reason::OutOfMemory => "memory ran out: the kernel ended the worker, or the GPU had no more",
            Reason::Device => {
                "the GPU reported an error: what it computed since the last checkpoint is not used"
            }
            Reason::Crashed => "the worker died",
            Reason::Hung => "the worker made no progress",
            Reason::Protocol => "daemon and worker do not understand each other",
            Reason::Launch => "the worker could not be started",
            Reason::NoRun => "no run is there that could train",
            Reason::Off => "the daemon or the machine was off, or left no record",
            Reason::ClockSet => "the clock was set",
            Reason::RampUp => "the share of the time rises slowly after a rest",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}

impl<'de> Deserialize<'de> for Reason {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Reason, D::Error> {
        let word = String::deserialize(deserializer)?;
        Reason::from_word(&word).ok_or_else(|| de::Error::custom(format!("{word:?} is no reason")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_distinct_and_read_back() {
        for (i, &reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(Reason::from_word(reason.word()), Some(reason));
            assert!(Reason::ALL[..i].iter().all(|other| other.word() != reason.word()), "{reason} twice");
            assert!(reason.word().chars().all(|c| c.is_ascii_lowercase() || c == '-'), "{reason}");
            let json = serde_json::to_string(&reason).unwrap();
            assert_eq!(serde_json::from_str::<Reason>(&json).unwrap(), reason);
        }
        assert!(serde_json::from_str::<Reason>("\"bored\"").is_err());
    }
}
