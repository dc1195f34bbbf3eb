//! `org.finetuned.Finetuned1.Run`, at `/org/finetuned/Finetuned1/Run/<id>`.

use super::Dictionary;
use super::authority::Authority;
use super::error::{Error, Result};
use crate::runs::Runs;
use crate::units::RunId;
use std::collections::HashMap;
use std::sync::Arc;
use zbus::message::Header;
use zbus::{Connection, OwnedFd, OwnedObjectPath, interface};

/// The path of a run; `/` for none.
pub fn path(id: Option<&RunId>) -> OwnedObjectPath {
    let text = id.map_or_else(|| "/".to_string(), |id| format!("{}/Run/{id}", super::ROOT));
    // An id is hexadecimal, which a path may hold.
    OwnedObjectPath::try_from(text).unwrap_or_default()
}

/// The object.
pub struct Run {
    pub(super) id: RunId,
    #[allow(dead_code)]
    pub(super) runs: Runs,
    #[allow(dead_code)]
    pub(super) authority: Arc<Authority>,
}

#[interface(
    name = "org.finetuned.Finetuned1.Run",
    proxy(default_service = "org.finetuned.Finetuned1", visibility = "pub")
)]
impl Run {
    /// Saves and stops until `Resume`. Durable when answered; the worker may still be saving.
    async fn pause(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<()> {
        let _ = (header, connection, options);
        Err(Error::Failed("not built yet".into()))
    }

    /// Returns a paused run to the queue.
    async fn resume(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<()> {
        let _ = (header, connection, options);
        Err(Error::Failed("not built yet".into()))
    }

    /// Ends the run. Its checkpoints stay until `Remove`.
    async fn cancel(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<()> {
        let _ = (header, connection, options);
        Err(Error::Failed("not built yet".into()))
    }

    /// Writes a checkpoint now; answered with its completed steps when it is durable.
    #[zbus(out_args("step"))]
    async fn checkpoint(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<u64> {
        let _ = (header, connection, options);
        Err(Error::Failed("not built yet".into()))
    }

    /// Computes held-out loss now, which changes nothing in the run; answered with it.
    #[zbus(out_args("loss"))]
    async fn evaluate(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<f64> {
        let _ = (header, connection, options);
        Err(Error::Failed("not built yet".into()))
    }

    /// Answered when the run is over, with its last state and reason. Turn your client's timeout off.
    #[zbus(out_args("state", "reason"))]
    async fn wait(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(String, String)> {
        let _ = (header, connection);
        Err(Error::Failed("not built yet".into()))
    }

    /// What only the owner, or who may manage all, gets to see: `Message` (s: the last failure), `Spec` (s: as
    /// submitted), `ResolvedSpec` (s), `Model` (s), `Summary` (s: JSON, once succeeded), `Directory` (s).
    #[zbus(out_args("details"))]
    async fn describe(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Dictionary> {
        let _ = (header, connection);
        Err(Error::Failed("not built yet".into()))
    }

    /// `metrics.jsonl`, opened for reading: one JSON object per step and per evaluation. It grows while the run trains.
    #[zbus(out_args("metrics"))]
    async fn open_metrics(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<OwnedFd> {
        let _ = (header, connection, options);
        Err(Error::Failed("not built yet".into()))
    }

    /// `journal.jsonl`, opened for reading: one JSON object per change of state and per remark.
    #[zbus(out_args("log"))]
    async fn open_log(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<OwnedFd> {
        let _ = (header, connection, options);
        Err(Error::Failed("not built yet".into()))
    }

    /// The files of a succeeded run's adapter (PEFT layout), opened for reading, by name.
    #[zbus(out_args("files"))]
    async fn open_adapter(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<HashMap<String, OwnedFd>> {
        let _ = (header, connection, options);
        Err(Error::Failed("not built yet".into()))
    }

    /// Deletes a run that is over, with all its files.
    async fn remove(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<()> {
        let _ = (header, connection, options);
        Err(Error::Failed("not built yet".into()))
    }

    /// Twelve hexadecimal digits.
    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> String {
        self.id.to_string()
    }

    /// Name, for people.
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        String::new()
    }

    /// Uid of who submitted it.
    #[zbus(property(emits_changed_signal = "const"))]
    fn owner(&self) -> u32 {
        0
    }

    /// When it was submitted, in microseconds since 1970.
    #[zbus(property(emits_changed_signal = "const"))]
    fn created(&self) -> u64 {
        0
    }

    /// When its first attempt began, in microseconds since 1970; 0 before.
    #[zbus(property)]
    fn started(&self) -> u64 {
        0
    }

    /// When it ended, in microseconds since 1970; 0 before.
    #[zbus(property)]
    fn finished(&self) -> u64 {
        0
    }

    /// `queued`, `waiting`, `preparing`, `running`, `paused`, `saving`, `succeeded`, `failed` or `cancelled`.
    #[zbus(property)]
    fn state(&self) -> String {
        String::new()
    }

    /// Why it waits, is paused, saves, or ended as it did: a word of the closed list, or empty.
    #[zbus(property)]
    fn reason(&self) -> String {
        String::new()
    }

    /// Higher goes first.
    #[zbus(property)]
    fn priority(&self) -> i32 {
        0
    }

    /// Completed steps.
    #[zbus(property)]
    fn step(&self) -> u64 {
        0
    }

    /// Steps in all; 0 while unknown.
    #[zbus(property)]
    fn total_steps(&self) -> u64 {
        0
    }

    /// Passes over the data, with a fraction.
    #[zbus(property)]
    fn epoch(&self) -> f64 {
        0.0
    }

    /// Training loss of the last step; NaN before the first.
    #[zbus(property)]
    fn loss(&self) -> f64 {
        0.0
    }

    /// Last held-out loss; NaN before the first.
    #[zbus(property)]
    fn eval_loss(&self) -> f64 {
        0.0
    }

    /// Tokens per second of computing; NaN while unknown.
    #[zbus(property)]
    fn tokens_per_second(&self) -> f64 {
        0.0
    }

    /// 0 to 1.
    #[zbus(property)]
    fn progress(&self) -> f64 {
        0.0
    }

    /// Seconds of training left at the pace of the last steps; 2⁶⁴ − 1 while unknown.
    #[zbus(property)]
    fn remaining_seconds(&self) -> u64 {
        0
    }

    /// Attempts begun.
    #[zbus(property)]
    fn attempts(&self) -> u32 {
        0
    }

    /// Completed steps of the last durable checkpoint; 2⁶⁴ − 1 before the first.
    #[zbus(property)]
    fn checkpoint_step(&self) -> u64 {
        0
    }

    /// Resident memory of the worker, in bytes; 0 without one.
    #[zbus(property)]
    fn memory_bytes(&self) -> u64 {
        0
    }
}
