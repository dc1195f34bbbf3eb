//! `org.finetuned.Finetuned1.Run`, at `/org/finetuned/Finetuned1/Run/<id>`.

use super::authority::Caller;
use super::error::{Error, Result};
use super::input::{no_options, shortened};
use super::{Context, Dictionary, same};
use crate::runs::{Ask, RunView};
use crate::units::{Joules, RunId};
use futures_util::StreamExt;
use std::collections::HashMap;
use std::num::NonZeroUsize;
use zbus::message::Header;
use zbus::names::BusName;
use zbus::{Connection, MatchRule, MessageStream, OwnedFd, OwnedObjectPath, Variant, fdo, interface};

/// The path of a run; `/` for none.
pub fn path(id: Option<&RunId>) -> OwnedObjectPath {
    let text = id.map_or_else(|| "/".to_string(), |id| format!("{}/Run/{id}", super::ROOT));
    // An id is hexadecimal, which a path may hold.
    OwnedObjectPath::try_from(text).unwrap_or_default()
}

/// The id in a run's path.
pub(super) fn id(path: &OwnedObjectPath) -> Result<RunId> {
    path.as_str()
        .strip_prefix(super::ROOT)
        .and_then(|rest| rest.strip_prefix("/Run/"))
        .and_then(RunId::parse)
        .ok_or_else(|| Error::NoSuchRun(format!("{:?} is not the path of a run", shortened(path.as_str()))))
}

/// The object.
pub struct Run {
    pub(super) id: RunId,
    pub(super) context: Context,
    /// The run as it was when the object was made: what is read between the run's removal and the object's.
    pub(super) first: RunView,
}

/// Every property, as it is now. What is not known yet has the value that the interface says.
pub(super) fn properties(view: &RunView) -> Vec<(&'static str, Variant<'static>)> {
    vec![
        ("Id", view.id.to_string().into()),
        ("Name", view.name.clone().into()),
        ("Owner", view.owner.into()),
        ("Created", view.created_us.into()),
        ("Started", view.started_us.into()),
        ("Finished", view.finished_us.into()),
        ("State", view.state.word().into()),
        ("Reason", view.reason.map_or("", |reason| reason.word()).into()),
        ("Priority", view.priority.into()),
        ("Step", view.step.into()),
        ("TotalSteps", view.total_steps.into()),
        ("Epoch", view.epoch.into()),
        ("Loss", view.loss.unwrap_or(f64::NAN).into()),
        ("EvalLoss", view.eval_loss.unwrap_or(f64::NAN).into()),
        ("TokensPerSecond", view.tokens_per_second.unwrap_or(f64::NAN).into()),
        ("Progress", view.progress.into()),
        ("RemainingSeconds", view.remaining_seconds.unwrap_or(u64::MAX).into()),
        ("Attempts", view.attempts.into()),
        ("CheckpointStep", view.checkpoint_step.unwrap_or(u64::MAX).into()),
        ("MemoryBytes", view.memory_bytes.into()),
        ("Energy", joules(view.energy.gross).into()),
        ("EnergyAboveIdle", joules(view.energy.above_idle).into()),
        ("JoulesPerToken", joules(view.energy.per_token).into()),
        ("StepEnergy", joules(view.energy.last_step).into()),
        ("Deadline", view.deadline_us.into()),
        ("DeadlineAtRisk", view.deadline_at_risk.into()),
    ]
}

fn joules(energy: Option<Joules>) -> f64 {
    energy.map_or(f64::NAN, |energy| energy.0)
}

/// What has changed between two views of a run.
pub(super) fn changed(before: &RunView, now: &RunView) -> HashMap<&'static str, Variant<'static>> {
    let before = properties(before);
    let mut now = properties(now);
    now.retain(|(name, value)| !before.iter().any(|(n, v)| n == name && same(v, value)));
    now.into_iter().collect()
}

/// Serves the object of a run on a connection, if it is not served yet. ObjectManager tells of it.
pub(super) async fn export(connection: &Connection, context: &Context, id: &RunId) -> Result<()> {
    let server = connection.object_server();
    let place = path(Some(id));
    if server.interface::<_, Run>(&*place).await.is_ok() {
        return Ok(());
    }
    let first = context.runs.view(id)?;
    server.at(&*place, Run { id: id.clone(), context: context.clone(), first }).await?;
    // Removed in between: whoever listens for removals has been there already.
    if context.runs.view(id).is_err() {
        withdraw(connection, id).await?;
    }
    Ok(())
}

/// Ends the object of a run, if it is served.
pub(super) async fn withdraw(connection: &Connection, id: &RunId) -> zbus::Result<()> {
    match connection.object_server().remove::<Run, _>(&*path(Some(id))).await {
        Ok(_) | Err(zbus::Error::InterfaceNotFound) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Returns when the caller has left its connection: nobody waits for the answer any more.
pub(super) async fn gone(caller: &Caller, connection: &Connection) {
    let left = async {
        let rule = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender("org.freedesktop.DBus")
            .interface("org.freedesktop.DBus")
            .member("NameOwnerChanged")
            .arg(0, caller.sender.as_str())
            .build()?;
        let mut changes = MessageStream::for_match_rule(rule, connection, NonZeroUsize::new(4)).await?;
        // It may have left before the rule was there.
        let sender = BusName::try_from(caller.sender.as_str())?;
        if fdo::DBusProxy::new(connection).await?.name_has_owner(sender).await? {
            changes.next().await;
        }
        Ok::<(), zbus::Error>(())
    };
    if connection.is_bus() && left.await.is_ok() {
        return;
    }
    // A peer is gone when its connection is. A broker that does not answer will end the connection, too.
    connection.closed().await;
}

impl Run {
    /// The run as it is now.
    fn view(&self) -> RunView {
        self.context.runs.view(&self.id).unwrap_or_else(|_| self.first.clone())
    }

    /// Lets the caller steer this run.
    async fn allow(&self, header: &Header<'_>, connection: &Connection) -> Result<()> {
        let owner = self.context.runs.view(&self.id)?.owner;
        self.context.authority.allow_run(owner, header, connection).await?;
        Ok(())
    }

    /// Lets the caller read what is private in this run.
    async fn allow_reading(&self, header: &Header<'_>, connection: &Connection) -> Result<()> {
        let owner = self.context.runs.view(&self.id)?.owner;
        self.context.authority.allow_reading(owner, header, connection).await?;
        Ok(())
    }
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
        self.allow(&header, connection).await?;
        no_options(options)?;
        Ok(self.context.runs.change(&self.id, Ask::Pause).await?)
    }

    /// Returns a paused run to the queue.
    async fn resume(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<()> {
        self.allow(&header, connection).await?;
        no_options(options)?;
        Ok(self.context.runs.change(&self.id, Ask::Resume).await?)
    }

    /// Ends the run. Its checkpoints stay until `Remove`.
    async fn cancel(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<()> {
        self.allow(&header, connection).await?;
        no_options(options)?;
        Ok(self.context.runs.change(&self.id, Ask::Cancel).await?)
    }

    /// Writes a checkpoint now; answered with its completed steps when it is durable.
    #[zbus(out_args("step"))]
    async fn checkpoint(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<u64> {
        self.allow(&header, connection).await?;
        no_options(options)?;
        Ok(self.context.runs.checkpoint(&self.id).await?)
    }

    /// Computes held-out loss now, which changes nothing in the run; answered with it.
    #[zbus(out_args("loss"))]
    async fn evaluate(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<f64> {
        self.allow(&header, connection).await?;
        no_options(options)?;
        Ok(self.context.runs.evaluate(&self.id).await?)
    }

    /// Changes when the run should be done, in microseconds since 1970; 0 takes its deadline away.
    async fn set_deadline(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        deadline: u64,
    ) -> Result<()> {
        self.allow(&header, connection).await?;
        Ok(self.context.runs.set_deadline(&self.id, deadline).await?)
    }

    /// Answered when the run is over, with its last state and reason. Turn your client's timeout off.
    #[zbus(out_args("state", "reason"))]
    async fn wait(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(String, String)> {
        let caller = self.context.authority.caller(&header, connection).await?;
        let Some(_slot) = self.context.waits.take(&caller.sender) else {
            return Err(Error::LimitExceeded(format!(
                "{} calls of one connection may wait at a time ([limits] waits_per_sender in finetuned.toml), and \
                 {} of all: watch the property State instead",
                self.context.waits.each(),
                super::WAITS
            )));
        };
        let view = tokio::select! {
            view = self.context.runs.wait(&self.id) => view?,
            () = gone(&caller, connection) => return Err(Error::Failed("the caller is gone".into())),
        };
        Ok((view.state.word().into(), view.reason.map_or("", |reason| reason.word()).into()))
    }

    /// What only the owner, or who may manage all, gets to see: `Message` (s: the last failure), `Spec` (s: as
    /// submitted), `ResolvedSpec` (s), `Model` (s), `Summary` (s: JSON, once succeeded), `Directory` (s).
    #[zbus(out_args("details"))]
    async fn describe(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Dictionary> {
        self.allow_reading(&header, connection).await?;
        let details = self.context.runs.details(&self.id).await?;
        let entries = [
            ("Message", details.message),
            ("Spec", details.spec),
            ("ResolvedSpec", details.resolved_spec),
            ("Model", details.model),
            ("Summary", details.summary),
            ("Directory", details.directory),
        ];
        let mut described = Dictionary::new();
        for (name, text) in entries {
            described.insert(name.into(), Variant::from(text).try_into_owned()?);
        }
        Ok(described)
    }

    /// `metrics.jsonl`, opened for reading: one JSON object per step and per evaluation. It grows while the run trains.
    #[zbus(out_args("metrics"))]
    async fn open_metrics(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<OwnedFd> {
        self.allow_reading(&header, connection).await?;
        no_options(options)?;
        Ok(self.context.runs.open_metrics(&self.id).await?.into())
    }

    /// `journal.jsonl`, opened for reading: one JSON object per change of state and per remark.
    #[zbus(out_args("log"))]
    async fn open_log(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<OwnedFd> {
        self.allow_reading(&header, connection).await?;
        no_options(options)?;
        Ok(self.context.runs.open_journal(&self.id).await?.into())
    }

    /// The files of a succeeded run's adapter (PEFT layout), opened for reading, by name.
    #[zbus(out_args("files"))]
    async fn open_adapter(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<HashMap<String, OwnedFd>> {
        self.allow_reading(&header, connection).await?;
        no_options(options)?;
        let files = self.context.runs.open_adapter(&self.id).await?;
        Ok(files.into_iter().map(|(name, file)| (name, file.into())).collect())
    }

    /// Deletes a run that is over, with all its files.
    async fn remove(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: Dictionary,
    ) -> Result<()> {
        self.allow(&header, connection).await?;
        no_options(options)?;
        Ok(self.context.runs.remove(&self.id).await?)
    }

    /// Twelve hexadecimal digits.
    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> String {
        self.id.to_string()
    }

    /// Name, for people.
    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> String {
        self.view().name
    }

    /// Uid of who submitted it.
    #[zbus(property(emits_changed_signal = "const"))]
    fn owner(&self) -> u32 {
        self.view().owner
    }

    /// When it was submitted, in microseconds since 1970.
    #[zbus(property(emits_changed_signal = "const"))]
    fn created(&self) -> u64 {
        self.view().created_us
    }

    /// When its first attempt began, in microseconds since 1970; 0 before.
    #[zbus(property)]
    fn started(&self) -> u64 {
        self.view().started_us
    }

    /// When it ended, in microseconds since 1970; 0 before.
    #[zbus(property)]
    fn finished(&self) -> u64 {
        self.view().finished_us
    }

    /// `queued`, `waiting`, `preparing`, `running`, `paused`, `saving`, `succeeded`, `failed` or `cancelled`.
    #[zbus(property)]
    fn state(&self) -> String {
        self.view().state.word().into()
    }

    /// Why it waits, is paused, saves, or ended as it did: a word of the closed list, or empty.
    #[zbus(property)]
    fn reason(&self) -> String {
        self.view().reason.map_or("", |reason| reason.word()).into()
    }

    /// Higher goes first.
    #[zbus(property)]
    fn priority(&self) -> i32 {
        self.view().priority
    }

    /// Completed steps.
    #[zbus(property)]
    fn step(&self) -> u64 {
        self.view().step
    }

    /// Steps in all; 0 while unknown.
    #[zbus(property)]
    fn total_steps(&self) -> u64 {
        self.view().total_steps
    }

    /// Passes over the data, with a fraction.
    #[zbus(property)]
    fn epoch(&self) -> f64 {
        self.view().epoch
    }

    /// Training loss of the last step; NaN before the first.
    #[zbus(property)]
    fn loss(&self) -> f64 {
        self.view().loss.unwrap_or(f64::NAN)
    }

    /// Last held-out loss; NaN before the first.
    #[zbus(property)]
    fn eval_loss(&self) -> f64 {
        self.view().eval_loss.unwrap_or(f64::NAN)
    }

    /// Tokens per second of computing; NaN while unknown.
    #[zbus(property)]
    fn tokens_per_second(&self) -> f64 {
        self.view().tokens_per_second.unwrap_or(f64::NAN)
    }

    /// 0 to 1.
    #[zbus(property)]
    fn progress(&self) -> f64 {
        self.view().progress
    }

    /// Seconds of training left at the pace of the last steps; 2⁶⁴ − 1 while unknown.
    #[zbus(property)]
    fn remaining_seconds(&self) -> u64 {
        self.view().remaining_seconds.unwrap_or(u64::MAX)
    }

    /// Attempts begun.
    #[zbus(property)]
    fn attempts(&self) -> u32 {
        self.view().attempts
    }

    /// Completed steps of the last durable checkpoint; 2⁶⁴ − 1 before the first.
    #[zbus(property)]
    fn checkpoint_step(&self) -> u64 {
        self.view().checkpoint_step.unwrap_or(u64::MAX)
    }

    /// Resident memory of the worker, in bytes; 0 without one.
    #[zbus(property)]
    fn memory_bytes(&self) -> u64 {
        self.view().memory_bytes
    }

    /// Joules that the machine took while this run's worker computed, over all attempts; NaN without a meter.
    #[zbus(property)]
    fn energy(&self) -> f64 {
        joules(self.view().energy.gross)
    }

    /// The same without what the idle machine would have taken; NaN while that is not known.
    #[zbus(property)]
    fn energy_above_idle(&self) -> f64 {
        joules(self.view().energy.above_idle)
    }

    /// `Energy` per token that was trained on; NaN without either.
    #[zbus(property)]
    fn joules_per_token(&self) -> f64 {
        joules(self.view().energy.per_token)
    }

    /// Joules of the last step, from the end of the step before it; NaN where that is not one step's work (after a wait,
    /// an evaluation, the beginning of an attempt within a step) and without a meter.
    #[zbus(property)]
    fn step_energy(&self) -> f64 {
        joules(self.view().energy.last_step)
    }

    /// When it should be done, in microseconds since 1970; 0 without a deadline.
    #[zbus(property)]
    fn deadline(&self) -> u64 {
        self.view().deadline_us
    }

    /// At the pace of the last steps, and with the hours that are left, it will not be done by its deadline.
    #[zbus(property)]
    fn deadline_at_risk(&self) -> bool {
        self.view().deadline_at_risk
    }
}
