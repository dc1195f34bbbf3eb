//! `org.finetuned.Finetuned1.Manager`, at [`ROOT`](super::ROOT).

use super::authority::Action;
use super::error::{Error, Result};
use super::input::{Options, name, no_options, plain, shortened};
use super::{Context, Dictionary, run, same};
use crate::runs::{Inhibition, PlanRequest, Status, Submission};
use std::collections::HashMap;
use zbus::message::Header;
use zbus::{Connection, OwnedFd, OwnedObjectPath, Variant, interface};

/// Longest spec, in bytes.
const MAX_SPEC: usize = 64 * 1024;

/// Most files in one call; message buses pass no more descriptors by default.
const MAX_FILES: usize = 16;

/// Longest path that a spec may name, in bytes (`PATH_MAX`).
const MAX_PATH: usize = 4096;

/// Longest name of a spec, a model, a program, in bytes.
pub(super) const MAX_NAME: usize = 255;

/// Longest purpose of a hold, in bytes.
pub(super) const MAX_WHY: usize = 1024;

/// The object.
pub struct Manager {
    pub(super) context: Context,
}

/// The properties that change, as they are now.
pub(super) fn properties(status: &Status) -> Vec<(&'static str, Variant<'static>)> {
    vec![
        ("Device", status.device.clone().into()),
        ("ActiveRun", run::path(status.active.as_ref()).into()),
        ("State", status.state.into()),
        ("Reason", status.reason.map_or("", |reason| reason.word()).into()),
        ("UnfinishedRuns", status.unfinished.into()),
    ]
}

/// What has changed between two statuses.
pub(super) fn changed(before: &Status, now: &Status) -> HashMap<&'static str, Variant<'static>> {
    let before = properties(before);
    let mut now = properties(now);
    now.retain(|(name, value)| !before.iter().any(|(n, v)| n == name && same(v, value)));
    now.into_iter().collect()
}

/// The files of a spec by their paths, where both are of a size that is taken.
fn spec_and_files(
    spec: &str,
    files: HashMap<String, OwnedFd>,
) -> Result<Vec<(String, std::os::fd::OwnedFd)>> {
    if spec.len() > MAX_SPEC {
        return Err(Error::InvalidSpec(format!(
            "the spec has {} bytes: {MAX_SPEC} is the most that is taken",
            spec.len()
        )));
    }
    if files.len() > MAX_FILES {
        return Err(Error::InvalidInput(format!(
            "{} files were passed: {MAX_FILES} is the most that one call takes; pass a directory, or add the model with \
             AddModel and name it in the spec",
            files.len()
        )));
    }
    let mut named = Vec::with_capacity(files.len());
    for (path, file) in files {
        named.push((name("the path of a file", path, MAX_PATH)?, file.into()));
    }
    named.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(named)
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
    /// among the registered ones. Options: `spec-name` (s), `priority` (i; above 0
    /// only for those who may manage all runs), `deadline` (t: when it should be done, in microseconds since 1970),
    /// `hold` (b: begin as paused).
    #[zbus(out_args("run"))]
    async fn submit(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        spec: String,
        files: HashMap<String, OwnedFd>,
        options: Dictionary,
    ) -> Result<OwnedObjectPath> {
        let caller = self.context.authority.allow(Action::Submit, &header, connection).await?;
        let named = spec_and_files(&spec, files)?;
        let mut options = Options::new(options);
        let spec_name = options.take::<String>("spec-name")?.unwrap_or_default();
        let priority = options.take::<i32>("priority")?.unwrap_or(0);
        let deadline_us = options.take::<u64>("deadline")?.unwrap_or(0);
        let hold = options.take::<bool>("hold")?.unwrap_or(false);
        options.finish()?;
        if priority > 0 {
            self.context.authority.allow(Action::ManageAll, &header, connection).await?;
        }
        let spec_name = plain("the option \"spec-name\"", spec_name, MAX_NAME)?;
        let owner = caller.uid;
        let submission = Submission { spec, spec_name, files: named, owner, priority, deadline_us, hold };
        let id = self.context.runs.submit(submission).await?;
        // The caller may use the object at once, on this connection.
        run::export(connection, &self.context, &id).await?;
        Ok(run::path(Some(&id)))
    }

    /// What a run would take on this machine: memory, and from what earlier runs took, hours, nights and energy. `spec` and
    /// `files` are those of Submit. Options: `spec-name` (s), `probe` (b: compute some micro-batches to learn how fast they
    /// are, which takes about ten seconds and only goes while nothing trains), `before` (t: the moment at which it should
    /// be complete, in microseconds since 1970). `plan` is a JSON object of schema 1.
    #[zbus(out_args("plan"))]
    async fn plan(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        spec: String,
        files: HashMap<String, OwnedFd>,
        options: Dictionary,
    ) -> Result<String> {
        let caller = self.context.authority.allow(Action::Submit, &header, connection).await?;
        let files = spec_and_files(&spec, files)?;
        let mut options = Options::new(options);
        let spec_name = options.take::<String>("spec-name")?.unwrap_or_default();
        let probe = options.take::<bool>("probe")?.unwrap_or(false);
        let before_us = options.take::<u64>("before")?;
        options.finish()?;
        let spec_name = plain("the option \"spec-name\"", spec_name, MAX_NAME)?;
        let submission = Submission {
            spec,
            spec_name,
            files,
            owner: caller.uid,
            priority: 0,
            deadline_us: 0,
            hold: false,
        };
        let request = PlanRequest { submission, probe, before_us };
        tokio::select! {
            plan = self.context.runs.plan(request) => Ok(plan?),
            // Nobody waits for it any more, and it has the device.
            () = run::gone(&caller, connection) => Err(Error::Failed("the caller is gone".into())),
        }
    }

    /// All runs, oldest first, each with the properties of the Run interface and `Path` (o). Options: `unfinished` (b).
    #[zbus(out_args("runs"))]
    async fn list_runs(&self, options: Dictionary) -> Result<Vec<Dictionary>> {
        let mut options = Options::new(options);
        let unfinished = options.take::<bool>("unfinished")?.unwrap_or(false);
        options.finish()?;
        let views = self.context.runs.views();
        let mut listed = Vec::with_capacity(views.len());
        for view in views.iter().filter(|view| !(unfinished && view.state.is_over())) {
            let mut entry = Dictionary::new();
            entry.insert("Path".into(), Variant::from(run::path(Some(&view.id))).try_into_owned()?);
            for (name, value) in run::properties(view) {
                entry.insert(name.into(), value.try_into_owned()?);
            }
            listed.push(entry);
        }
        Ok(listed)
    }

    /// The run with this id, this beginning of an id, or this name.
    #[zbus(out_args("run"))]
    async fn find_run(
        &self,
        #[zbus(connection)] connection: &Connection,
        name: String,
    ) -> Result<OwnedObjectPath> {
        let wanted = plain("the name of the run", name, MAX_NAME)?;
        let id = self.context.runs.find(&wanted)?;
        run::export(connection, &self.context, &id).await?;
        Ok(run::path(Some(&id)))
    }

    /// Changes a run's place in the queue: higher goes first. A priority above 0 may take the device from the runs of
    /// others, and is for those who may manage all runs.
    async fn set_priority(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        run: OwnedObjectPath,
        priority: i32,
    ) -> Result<()> {
        let id = run::id(&run)?;
        let owner = self.context.runs.view(&id)?.owner;
        let authority = &self.context.authority;
        if priority > 0 {
            authority.allow(Action::ManageAll, &header, connection).await?;
        } else {
            authority.allow_run(owner, &header, connection).await?;
        }
        Ok(self.context.runs.set_priority(&id, priority).await?)
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
        let caller = self.context.authority.allow(Action::Inhibit, &header, connection).await?;
        no_options(options)?;
        if what != "run" {
            return Err(Error::InvalidInput(format!(
                "{:?} cannot be inhibited: only \"run\" can",
                shortened(&what)
            )));
        }
        let who = name("the argument \"who\"", who, MAX_NAME)?;
        let why = name("the argument \"why\"", why, MAX_WHY)?;
        let (owner, sender) = (caller.uid, caller.sender);
        let inhibition = Inhibition { who, why, owner, sender, lease: false, release: false, wait: false };
        Ok(self.context.runs.inhibit(inhibition).await?.into())
    }

    /// The holds in force: who, why, uid, since (microseconds since 1970).
    #[zbus(out_args("inhibitors"))]
    async fn list_inhibitors(&self) -> Result<Vec<(String, String, u32, u64)>> {
        let inhibitors = self.context.runs.inhibitors();
        Ok(inhibitors.into_iter().map(|held| (held.who, held.why, held.owner, held.since_us)).collect())
    }

    /// The registered models: `Name` (s), `Directory` (s), `Bytes` (t), `Architecture` (s).
    #[zbus(out_args("models"))]
    async fn list_models(&self) -> Result<Vec<Dictionary>> {
        let mut listed = Vec::new();
        for model in self.context.runs.models() {
            let entry: [(&str, Variant); 4] = [
                ("Name", model.name.into()),
                ("Directory", model.directory.into()),
                ("Bytes", model.bytes.into()),
                ("Architecture", model.architecture.into()),
            ];
            let mut listing = Dictionary::new();
            for (name, value) in entry {
                listing.insert(name.into(), value.try_into_owned()?);
            }
            listed.push(listing);
        }
        Ok(listed)
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
        self.context.authority.allow(Action::Configure, &header, connection).await?;
        no_options(options)?;
        let model = self::name("the name of the model", name, MAX_NAME)?;
        self.context.runs.add_model(model, directory.into()).await?;
        Ok(())
    }

    /// Removes a model that was added and that no unfinished run uses.
    async fn remove_model(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        name: String,
    ) -> Result<()> {
        self.context.authority.allow(Action::Configure, &header, connection).await?;
        let model = self::name("the name of the model", name, MAX_NAME)?;
        Ok(self.context.runs.remove_model(model).await?)
    }

    /// Version of the daemon.
    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").into()
    }

    /// What is computed on, in words; empty before the first worker has said so.
    #[zbus(property)]
    fn device(&self) -> String {
        self.context.runs.status().device
    }

    /// The run that has the device; `/` when none has.
    #[zbus(property)]
    fn active_run(&self) -> OwnedObjectPath {
        super::run::path(self.context.runs.status().active.as_ref())
    }

    /// `idle`, `active`, `waiting` or `stopping`.
    #[zbus(property)]
    fn state(&self) -> String {
        self.context.runs.status().state.into()
    }

    /// Why nothing trains although there is something to train: a word of the closed list; empty when it does not
    /// apply.
    #[zbus(property)]
    fn reason(&self) -> String {
        self.context.runs.status().reason.map_or("", |reason| reason.word()).into()
    }

    /// Runs that are not over.
    #[zbus(property)]
    fn unfinished_runs(&self) -> u32 {
        self.context.runs.status().unfinished
    }
}
