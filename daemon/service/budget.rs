//! Keeps the budget: files, and what was set above them while the daemon runs.
//!
//! ```text
//!   SetBudget, ResetBudget ──► checked with the rest ──► budget.toml, durable ──► governor, runs ──► who listens
//!   SIGHUP ──► files and budget.toml, read anew ───────────────────────────────┘
//! ```
//!
//! One change at a time; one that the disk refuses changes nothing.

use super::governing::Dial;
use super::messages;
use crate::bus::budget::Answer;
use crate::bus::{BudgetBook, BudgetError, BudgetRequest};
use crate::checkpoint::{FileError, atomic_write};
use crate::clock::Clock;
use crate::config::daemon::DaemonConfig;
use crate::config::settings::{self, Changed, Entry, Layers};
use crate::config::{Loaded, Mistake};
use crate::runs::Runs;
use std::sync::Arc;
use std::time::UNIX_EPOCH;
use tokio::sync::{Mutex, watch};

/// The keeper.
pub struct Keeper {
    layers: Mutex<Layers>,
    entries: watch::Sender<Arc<Vec<Entry>>>,
    dial: Dial,
    runs: Runs,
    clock: Arc<dyn Clock>,
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keeper").finish_non_exhaustive()
    }
}

impl Keeper {
    /// Keeps what the daemon has started with.
    pub fn new(layers: Layers, dial: Dial, runs: Runs, clock: Arc<dyn Clock>) -> Arc<Keeper> {
        let entries = watch::channel(Arc::new(layers.entries())).0;
        Arc::new(Keeper { layers: Mutex::new(layers), entries, dial, runs, clock })
    }

    /// Takes over files, and the file of settings, that were read anew; what is in force now. The
    /// runs are told by the caller.
    ///
    /// # Errors
    /// What is wrong with the settings; then nothing has changed.
    pub async fn reload(&self, files: Loaded) -> Result<DaemonConfig, String> {
        let mut layers = self.layers.lock().await;
        let next = layers.reopened(files)?;
        let config = next.config();
        self.dial.configure(&config);
        self.show(&next);
        let found = layers.lost().is_some() && next.lost().is_none();
        *layers = next;
        if found {
            tracing::info!(
                MESSAGE_ID = messages::BUDGET_CHANGED,
                "the settings that were lost are in force again"
            );
        }
        Ok(config)
    }

    async fn change(&self, request: BudgetRequest, uid: u32) -> Result<(), BudgetError> {
        let mut layers = self.layers.lock().await;
        let time_us = self.clock.wall().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_micros() as u64);
        let until = match &request {
            BudgetRequest::Change { runtime: true, .. } => ", until the daemon starts again",
            _ => "",
        };
        let (next, changed) = match request {
            BudgetRequest::Change { changes, runtime } => {
                layers.changed(&changes, runtime, (uid, time_us)).map_err(invalid)?
            }
            BudgetRequest::Clear => layers.cleared(),
        };
        if next.lasting() != layers.lasting() || layers.lost().is_some() {
            save(&layers, &next).await?;
        }
        let config = next.config();
        self.dial.configure(&config);
        // The governor holds the limits; the runs only foresee by them what will be late.
        if let Err(error) = self.runs.set_budget(config.budget, config.window).await {
            tracing::warn!("deadlines are still held against the hours of before: {error}");
        }
        self.show(&next);
        let given_up = layers.lost().is_some() && next.lost().is_none();
        *layers = next;
        if given_up {
            tracing::info!(
                MESSAGE_ID = messages::BUDGET_CHANGED,
                WHO = format!("user {uid}"),
                "settings that were lost were taken back by user {uid}: training may go on"
            );
        }
        tell(&changed, uid, until);
        Ok(())
    }

    fn show(&self, layers: &Layers) {
        let entries = layers.entries();
        self.entries.send_if_modified(|shown| {
            let differs = **shown != entries;
            if differs {
                *shown = Arc::new(entries);
            }
            differs
        });
    }
}

impl BudgetBook for Keeper {
    fn entries(&self) -> watch::Receiver<Arc<Vec<Entry>>> {
        self.entries.subscribe()
    }

    fn request(&self, request: BudgetRequest, uid: u32) -> Answer<'_> {
        Box::pin(self.change(request, uid))
    }
}

fn invalid(mistakes: Vec<Mistake>) -> BudgetError {
    BudgetError::Invalid(mistakes.iter().map(Mistake::to_string).collect::<Vec<_>>().join("\n"))
}

/// Makes settings durable. A file that could not be read is kept beside it, for who wants to know what stood in it.
async fn save(before: &Layers, next: &Layers) -> Result<(), BudgetError> {
    let (path, text) = (next.path().to_path_buf(), settings::render(next.lasting()));
    let aside = before.is_unreadable().then(|| path.with_extension("toml.damaged"));
    let write = move || {
        if let Some(aside) = &aside {
            match std::fs::rename(&path, aside) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(FileError::new("set aside", &path, source));
                }
                _ => {}
            }
        }
        atomic_write(&path, text.as_bytes())
    };
    match tokio::task::spawn_blocking(write).await {
        Ok(written) => written.map_err(|error| BudgetError::Storage(error.to_string())),
        Err(error) => Err(BudgetError::Storage(format!("a thread of the daemon failed: {error}"))),
    }
}

fn tell(changed: &[Changed], uid: u32, until: &str) {
    for Changed { key, before, now } in changed {
        tracing::info!(
            MESSAGE_ID = messages::BUDGET_CHANGED,
            WHO = format!("user {uid}"),
            "{key} was {before} and is {now}: changed by user {uid}{until}"
        );
    }
}

/// Says that settings are lost, as loud as it can be said.
pub fn warn_of_loss(layers: &Layers) {
    for line in layers.lost().unwrap_or_default().lines() {
        tracing::error!(
            MESSAGE_ID = messages::SETTINGS_LOST,
            "what was set while the daemon ran cannot be kept to, so nothing trains: {line}; correct it and reload the \
             daemon, or take it back with `finetunectl budget reset`"
        );
    }
}
