//! The daemon's configuration. `docs/configuration.md` documents every key.

use super::budget::{Board, Budget, Conditions, Window};
use crate::units::Bytes;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Everything that `finetuned.toml` and its drop-ins say, defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct DaemonConfig {
    /// `[storage]`
    pub storage: StorageConfig,
    /// `[limits]`
    pub limits: LimitsConfig,
    /// `[worker]`
    pub worker: WorkerConfig,
    /// `[authorization]`
    pub authorization: AuthorizationConfig,
    /// `[log]`
    pub log: LogConfig,
    /// `[budget]`
    pub budget: Budget,
    /// `[window]`
    pub window: Window,
    /// `[conditions]`
    pub conditions: Conditions,
    /// `[board]`
    pub board: Board,
    /// Why nothing may compute, whatever the keys say: settings that were made earlier are lost. No key.
    pub settings_lost: Option<String>,
}

/// Less memory than this, left to others, is told: an idle desktop takes more.
const LITTLE_MEMORY: Bytes = Bytes(256 << 20);
/// A smallest charge below this is told: batteries suffer from less, and what is left may not bring a robot home.
const LITTLE_CHARGE: f64 = 0.1;

impl DaemonConfig {
    /// Which keys leave little or nothing of a protection, in words. Allowed, and never silent.
    pub fn cautions(&self) -> Vec<String> {
        let mut cautions = Vec::new();
        let Board { power_factor, power_offset, .. } = self.board;
        if power_factor < 1.0 || power_offset.0 < 0.0 {
            cautions.push(format!(
                "[board] power_factor = {power_factor} and power_offset = {power_offset} count less power than the rails say: \
                 limits of power and energy hold less"
            ));
        }
        if self.budget.memory_floor < LITTLE_MEMORY {
            cautions.push(format!(
                "[budget] memory_floor = {} leaves little memory to everybody else",
                self.budget.memory_floor
            ));
        }
        if self.conditions.minimum_battery < LITTLE_CHARGE {
            let percent = self.conditions.minimum_battery * 100.0;
            cautions.push(format!(
                "[conditions] minimum_battery lets training drain a battery to {percent:.0} %"
            ));
        }
        if !self.window.quiet.is_empty() && self.window.quiet_fan >= 1.0 {
            cautions.push("[window] quiet_fan = 1 makes quiet hours hold nothing".into());
        }
        cautions
    }
}

/// `[storage]`: where things lie.
#[derive(Clone, Debug, PartialEq)]
pub struct StorageConfig {
    /// Runs, inputs, models that were added.
    pub state_directory: PathBuf,
    /// Quantised bases and tokens; may be deleted at any time.
    pub cache_directory: PathBuf,
    /// Further directories whose subdirectories are models, read only.
    pub model_directories: Vec<PathBuf>,
}

/// `[limits]`: what one user, and all together, may take.
#[derive(Clone, Debug, PartialEq)]
pub struct LimitsConfig {
    /// Unfinished runs of one user.
    pub runs_per_user: u32,
    /// Unfinished runs.
    pub runs: u32,
    /// Bytes of one input file.
    pub input_bytes: u64,
    /// Bytes of all files of a model that is passed or added.
    pub model_bytes: u64,
    /// Inhibitors of one connection.
    pub inhibitors_per_sender: u32,
    /// Inhibitors.
    pub inhibitors: u32,
    /// Calls of one connection that wait for their answer.
    pub waits_per_sender: u32,
}

/// `[worker]`: how workers are started and how long they may be silent.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerConfig {
    /// How a worker is started.
    pub launch: Launch,
    /// Threads to compute with; one per core when absent.
    pub threads: Option<usize>,
    /// Nice level, 0 to 19.
    pub nice: i32,
    /// Added to the worker's out-of-memory score, 0 to 1000.
    pub oom_score_adjust: i32,
    /// Attempts without progress before a run fails.
    pub attempts: u32,
    /// Wait before the second attempt; doubled for each further one.
    pub backoff: Duration,
    /// Longest wait between attempts.
    pub backoff_limit: Duration,
    /// Longest time without progress while preparing.
    pub prepare_timeout: Duration,
    /// Longest time without progress within a step or an evaluation.
    pub step_timeout: Duration,
    /// Longest time for a checkpoint.
    pub save_timeout: Duration,
    /// A held run keeps its worker this long, then the memory is given back.
    pub keep_when_held: Duration,
}

/// How a worker is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Launch {
    /// As a child process.
    Child,
    /// By connecting to a socket behind which a new worker answers (`finetuned-worker.socket`).
    Socket(PathBuf),
}

/// `[authorization]`: who decides who may do what.
#[derive(Clone, Debug, PartialEq)]
pub struct AuthorizationConfig {
    /// The judge.
    pub method: Authorization,
    /// Group whose members may submit and manage their own runs, where polkit does not decide.
    pub group: String,
}

/// The judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Authorization {
    /// polkit, on the system bus.
    Polkit,
    /// Membership in a group; root may do everything.
    Group,
    /// The daemon's own user, and root, may do everything; nobody else anything.
    Owner,
}

/// `[log]`
#[derive(Clone, Debug, PartialEq)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub level: String,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            runs_per_user: 64,
            runs: 256,
            input_bytes: 4 << 30,
            model_bytes: 64 << 30,
            inhibitors_per_sender: 10,
            inhibitors: 100,
            waits_per_sender: 32,
        }
    }
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            launch: Launch::Child,
            threads: None,
            nice: 10,
            oom_score_adjust: 900,
            attempts: 5,
            backoff: Duration::from_secs(5),
            backoff_limit: Duration::from_secs(15 * 60),
            prepare_timeout: Duration::from_secs(600),
            step_timeout: Duration::from_secs(120),
            save_timeout: Duration::from_secs(120),
            keep_when_held: Duration::from_secs(600),
        }
    }
}
