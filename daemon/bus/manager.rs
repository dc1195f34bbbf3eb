//! `org.finetuned.Finetuned1.Manager`, at [`ROOT`](super::ROOT).

use super::Dictionary;
use super::authority::{Action, Authority};
use super::error::{Error, Result};
use crate::runs::Runs;
use std::collections::HashMap;
use std::sync::Arc;
use zbus::message::Header;
use zbus::{Connection, OwnedFd, OwnedObjectPath, interface};

/// The object.
pub struct Manager {
    pub(super) runs: Runs,
    pub(super) authority: Arc<Authority>,
}

#[interface(
    name = "org.finetuned.Finetuned1.Manager",
    proxy(
        default_service = "org.finetuned.Finetuned1",
        default_path = "/org/finetuned/Finetuned1",
        visibility = "pub",
    )
)]
impl Manager {
    /// Takes a run into the queue. `spec` is the text of a run spec. `files` holds every file and directory that the
    /// spec names, opened for reading, under the path that the spec writes; a model that is not in it is looked up
    /// among the registered ones. Options: `spec-name` (s), `priority` (i), `hold` (b: begin as paused).
    #[zbus(out_args("run"))]
    async fn submit(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        spec: String,
        files: HashMap<String, OwnedFd>,
        options: Dictionary,
    ) -> Result<OwnedObjectPath> {
        let _ = (
            spec,
            files,
            options,
            self.authority.allow(Action::Submit, &header, connection).await?,
            &self.runs,
        );
        Err(Error::Failed("not built yet".into()))
    }

    /// All runs, oldest first, each with the properties of the Run interface and `Path` (o). Options: `unfinished` (b).
    #[zbus(out_args("runs"))]
    async fn list_runs(&self, options: Dictionary) -> Result<Vec<Dictionary>> {
        let _ = options;
        Err(Error::Failed("not built yet".into()))
    }

    /// The run with this id, this beginning of an id, or this name.
    #[zbus(out_args("run"))]
    async fn find_run(&self, name: String) -> Result<OwnedObjectPath> {
        let _ = name;
        Err(Error::Failed("not built yet".into()))
    }

    /// Changes a run's place in the queue: higher goes first.
    async fn set_priority(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        run: OwnedObjectPath,
        priority: i32,
    ) -> Result<()> {
        let _ = (header, connection, run, priority);
        Err(Error::Failed("not built yet".into()))
    }

    /// Holds all training until every copy of the returned descriptor is closed. `what` is `run`; `who` and `why` are
    /// for people.
    #[zbus(out_args("inhibitor"))]
    async fn inhibit(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        what: String,
        who: String,
        why: String,
        options: Dictionary,
    ) -> Result<OwnedFd> {
        let _ = (header, connection, what, who, why, options);
        Err(Error::Failed("not built yet".into()))
    }

    /// The holds in force: who, why, uid, since (microseconds since 1970).
    #[zbus(out_args("inhibitors"))]
    async fn list_inhibitors(&self) -> Result<Vec<(String, String, u32, u64)>> {
        Err(Error::Failed("not built yet".into()))
    }

    /// The registered models: `Name` (s), `Directory` (s), `Bytes` (t), `Architecture` (s).
    #[zbus(out_args("models"))]
    async fn list_models(&self) -> Result<Vec<Dictionary>> {
        Err(Error::Failed("not built yet".into()))
    }

    /// Copies a model directory, opened by the caller, to the registered ones.
    async fn add_model(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        name: String,
        directory: OwnedFd,
        options: Dictionary,
    ) -> Result<()> {
        let _ = (header, connection, name, directory, options);
        Err(Error::Failed("not built yet".into()))
    }

    /// Removes a model that was added and that no unfinished run uses.
    async fn remove_model(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        name: String,
    ) -> Result<()> {
        let _ = (header, connection, name);
        Err(Error::Failed("not built yet".into()))
    }

    /// Version of the daemon.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").into()
    }

    /// What is computed on, in words; empty before the first worker has said so.
    #[zbus(property)]
    fn device(&self) -> String {
        self.runs.status().device
    }

    /// The run that has the device; `/` when none has.
    #[zbus(property)]
    fn active_run(&self) -> OwnedObjectPath {
        super::run::path(self.runs.status().active.as_ref())
    }

    /// `idle`, `active`, `waiting` or `stopping`.
    #[zbus(property)]
    fn state(&self) -> String {
        self.runs.status().state.into()
    }

    /// Why nothing trains although there is something to train: a word of the closed list; empty when it does not
    /// apply.
    #[zbus(property)]
    fn reason(&self) -> String {
        self.runs.status().reason.map_or("", |reason| reason.word()).into()
    }

    /// Runs that are not over.
    #[zbus(property)]
    fn unfinished_runs(&self) -> u32 {
        self.runs.status().unfinished
    }
}
