//! The handle to the runs: what clients of the owner may ask, and what they see.

use super::state::{Ask, Refusal, State};
use crate::config::budget::{Budget, Window};
use crate::config::daemon::DaemonConfig;
use crate::governor::energy::{Energy, Entry};
use crate::reason::Reason;
use crate::units::{Joules, RunId};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{broadcast, mpsc, oneshot};

/// A run to be.
#[derive(Debug)]
pub struct Submission {
    /// The text of the spec.
    pub spec: String,
    /// File name of the spec, for messages; without its extension, the run's name where the spec has none.
    pub spec_name: String,
    /// Every file and directory that the spec names, opened by the client: the path as the spec writes it, and the
    /// descriptor. A model that is registered is named in the spec and not here.
    pub files: Vec<(String, OwnedFd)>,
    /// Who submits.
    pub owner: u32,
    /// Higher goes first; 0 is usual.
    pub priority: i32,
    /// When it should be done, in microseconds since 1970; 0 for never mind.
    pub deadline_us: u64,
    /// Begin as paused.
    pub hold: bool,
}

/// A run that may be: what would it take?
#[derive(Debug)]
pub struct PlanRequest {
    /// The run. Priority and hold do not matter.
    pub submission: Submission,
    /// Compute some micro-batches to learn how fast they are.
    pub probe: bool,
    /// When it should be complete, in microseconds since 1970.
    pub before_us: Option<u64>,
}

/// What is visible of a run. Durable before it is visible, but for the figures of the current attempt.
#[derive(Clone, Debug, PartialEq)]
pub struct RunView {
    /// Id.
    pub id: RunId,
    /// Name, for people.
    pub name: String,
    /// State.
    pub state: State,
    /// Why the run waits, is paused, saves, or ended as it did.
    pub reason: Option<Reason>,
    /// Uid of who submitted it.
    pub owner: u32,
    /// Higher goes first.
    pub priority: i32,
    /// When it was submitted, in microseconds since 1970.
    pub created_us: u64,
    /// When its first attempt began; 0 before.
    pub started_us: u64,
    /// When it ended; 0 before.
    pub finished_us: u64,
    /// Completed steps.
    pub step: u64,
    /// Steps in all; 0 while unknown.
    pub total_steps: u64,
    /// Passes over the data, with a fraction.
    pub epoch: f64,
    /// Training loss of the last step.
    pub loss: Option<f64>,
    /// Last held-out loss.
    pub eval_loss: Option<f64>,
    /// Tokens per second of computing.
    pub tokens_per_second: Option<f64>,
    /// 0 to 1.
    pub progress: f64,
    /// Seconds of training left at the pace of the last steps.
    pub remaining_seconds: Option<u64>,
    /// Attempts begun.
    pub attempts: u32,
    /// Steps of the last durable checkpoint; absent before the first.
    pub checkpoint_step: Option<u64>,
    /// Resident memory of the worker, in bytes; 0 without one.
    pub memory_bytes: u64,
    /// What it took.
    pub energy: RunEnergy,
    /// When it should be done, in microseconds since 1970; 0 without a deadline.
    pub deadline_us: u64,
    /// It will not be done by then.
    pub deadline_at_risk: bool,
}

/// What a run took, as far as a meter saw it: nothing is known without one.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RunEnergy {
    /// All that the machine took while the run's worker computed, over all attempts.
    pub gross: Option<Joules>,
    /// What of it the idle machine would not have taken; absent while the power of the idle machine is not known.
    pub above_idle: Option<Joules>,
    /// Gross, per token that was trained on (again, after a crash, counts again).
    pub per_token: Option<Joules>,
    /// Gross, from the end of the step before to the end of the last one; absent where that is not one step's work: after
    /// a wait, an evaluation, or the beginning of an attempt within a step.
    pub last_step: Option<Joules>,
}

impl RunEnergy {
    /// Of a run's entry in the ledger, and of its last step.
    pub fn new(entry: &Entry, last_step: Option<Joules>) -> RunEnergy {
        let Entry { energy, tokens } = entry;
        if energy.metered == 0.0 {
            return RunEnergy { last_step, ..RunEnergy::default() };
        }
        RunEnergy {
            gross: Some(energy.gross),
            above_idle: (energy.idle.0 > 0.0).then(|| energy.counted(false)),
            per_token: energy.per_token(*tokens, true),
            last_step,
        }
    }
}

/// Where a run stood at the end of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Mark {
    /// When.
    pub at: tokio::time::Instant,
    /// Completed steps.
    pub step: u64,
    /// What the machine had taken; absent without a meter, and where the step had begun before.
    pub energy: Option<Energy>,
}

impl Mark {
    /// What the step between two marks took. Readings correct what was taken to go on, by less than a reading's time of
    /// power: a step that is shorter may come out as nothing.
    pub fn step_energy(before: Option<Mark>, now: Mark) -> Option<Joules> {
        let before = before.filter(|before| before.step + 1 == now.step)?;
        let spent = now.energy? - before.energy?;
        (spent.unmetered == 0.0).then(|| Joules(spent.gross.0.max(0.0)))
    }
}

/// What only the owner of a run, or who may manage all, gets to see.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Details {
    /// The last failure, in words; empty when there was none.
    pub message: String,
    /// The spec as submitted.
    pub spec: String,
    /// The spec with every default and the paths in force.
    pub resolved_spec: String,
    /// The base: the name of a registered model, or where a passed directory was kept.
    pub model: String,
    /// Figures of a succeeded run, as JSON (`summary.json`); empty before.
    pub summary: String,
    /// The run's directory.
    pub directory: String,
}

/// What is visible of the daemon.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// The run that has the device.
    pub active: Option<RunId>,
    /// `idle`, `active`, `waiting` or `stopping`.
    pub state: &'static str,
    /// Why nothing trains although there is something to train.
    pub reason: Option<Reason>,
    /// What is computed on, in words.
    pub device: String,
    /// Runs that are not over.
    pub unfinished: u32,
}

/// Asks for a hold of all training.
#[derive(Clone, Debug)]
pub struct Inhibition {
    /// The program, for people.
    pub who: String,
    /// The purpose, for people.
    pub why: String,
    /// Who asks.
    pub owner: u32,
    /// The connection that asks: its limit is counted by it.
    pub sender: String,
    /// It is a lease: an inference task takes the device.
    pub lease: bool,
    /// The memory of the held run is wanted, too.
    pub release: bool,
    /// Answer when nothing computes any more, not before.
    pub wait: bool,
}

/// A hold in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Inhibitor {
    /// The program.
    pub who: String,
    /// The purpose.
    pub why: String,
    /// Who asked.
    pub owner: u32,
    /// It is a lease.
    pub lease: bool,
    /// Since when, in microseconds since 1970.
    pub since_us: u64,
}

/// A registered model.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ModelView {
    /// Name, as specs use it.
    pub name: String,
    /// Where it lies.
    pub directory: String,
    /// Size of its files.
    pub bytes: u64,
    /// First entry of `architectures` in its config.
    pub architecture: String,
}

/// Something visible has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A run was submitted.
    Added(RunId),
    /// A run's state or reason has changed: to be told at once.
    State(RunId),
    /// A run's figures have changed: to be told when convenient.
    Figures(RunId),
    /// A run was removed.
    Removed(RunId),
    /// [`Status`] or the inhibitors have changed.
    Status,
}

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// No such run.
    #[error("there is no run {0}")]
    NoSuchRun(String),
    /// Several runs fit.
    #[error("{name:?} fits several runs: {candidates}")]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// The first few that fit.
        candidates: String,
    },
    /// No such model.
    #[error("{0}")]
    NoSuchModel(String),
    /// The spec is wrong: every mistake, a line each.
    #[error("{0}")]
    InvalidSpec(String),
    /// A file that the spec names was not passed, or is not what it should be.
    #[error("{0}")]
    InvalidInput(String),
    /// The run's state does not allow it.
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// A limit of the configuration.
    #[error("{0}")]
    Limit(String),
    /// No space, or the disk refused a write.
    #[error("{0}")]
    Storage(String),
    /// The device did not become free in time.
    #[error("{0}")]
    Busy(String),
    /// The worker was gone, or could not do it.
    #[error("{0}")]
    Failed(String),
    /// The daemon is going down.
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

/// What a request is answered with.
pub(super) type Reply<T> = oneshot::Sender<Result<T, RequestError>>;

/// What the owner can be asked.
pub(super) enum Command {
    Submit(Box<Submission>, Reply<RunId>),
    Plan(Box<PlanRequest>, Reply<String>),
    Ask(RunId, Ask, Reply<()>),
    Remove(RunId, Reply<()>),
    SetPriority(RunId, i32, Reply<()>),
    SetDeadline(RunId, u64, Reply<()>),
    Checkpoint(RunId, Reply<u64>),
    Evaluate(RunId, Reply<f64>),
    Details(RunId, Reply<Details>),
    OpenMetrics(RunId, Reply<OwnedFd>),
    OpenJournal(RunId, Reply<OwnedFd>),
    OpenAdapter(RunId, Reply<Vec<(String, OwnedFd)>>),
    Inhibit(Inhibition, Reply<OwnedFd>),
    AddModel(String, OwnedFd, Reply<ModelView>),
    RemoveModel(String, Reply<()>),
    Configure(Box<DaemonConfig>, Reply<()>),
    SetBudget(Box<(Budget, Window)>, Reply<()>),
    Suspend(Reason, oneshot::Sender<()>),
    Wake,
    Shutdown(Reason, oneshot::Sender<()>),
}

/// What everybody may read.
#[derive(Debug)]
pub(super) struct Board {
    pub runs: BTreeMap<RunId, RunView>,
    pub status: Status,
    pub inhibitors: Vec<Inhibitor>,
    pub models: Vec<ModelView>,
}

/// A handle to the runs.
#[derive(Clone, Debug)]
pub struct Runs {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) board: Arc<Mutex<Board>>,
    pub(super) changes: broadcast::Sender<Change>,
}

impl Runs {
    /// What everybody may read. Held for the blink of an eye, never across an await.
    pub(super) fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, RequestError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| RequestError::ShuttingDown)?;
        answer.await.map_err(|_| RequestError::ShuttingDown)?
    }

    /// A run as it is now.
    pub fn view(&self, id: &RunId) -> Result<RunView, RequestError> {
        self.board().runs.get(id).cloned().ok_or_else(|| RequestError::NoSuchRun(id.to_string()))
    }

    /// All runs, in the order in which they were submitted.
    pub fn views(&self) -> Vec<RunView> {
        let mut views: Vec<RunView> = self.board().runs.values().cloned().collect();
        views.sort_by(|a, b| (a.created_us, &a.id).cmp(&(b.created_us, &b.id)));
        views
    }

    /// The run with this id, this beginning of an id, or this name; of several with one name, the one that is not over.
    pub fn find(&self, wanted: &str) -> Result<RunId, RequestError> {
        let views = self.views();
        let exactly = |view: &&RunView| view.id.as_str() == wanted || view.name == wanted;
        let mut found: Vec<&RunView> = views.iter().filter(exactly).collect();
        if found.is_empty() && !wanted.is_empty() {
            found = views.iter().filter(|view| view.id.as_str().starts_with(wanted)).collect();
        }
        if found.len() > 1 && found.iter().filter(|view| !view.state.is_over()).count() == 1 {
            found.retain(|view| !view.state.is_over());
        }
        match &found[..] {
            [] => Err(RequestError::NoSuchRun(wanted.to_string())),
            [one] => Ok(one.id.clone()),
            several => {
                let mut candidates: Vec<String> =
                    several.iter().rev().take(5).map(|view| format!("{} ({})", view.id, view.name)).collect();
                if several.len() > candidates.len() {
                    candidates.push("…".into());
                }
                Err(RequestError::Ambiguous { name: wanted.to_string(), candidates: candidates.join(", ") })
            }
        }
    }

    /// The daemon as it is now.
    pub fn status(&self) -> Status {
        self.board().status.clone()
    }

    /// The holds in force.
    pub fn inhibitors(&self) -> Vec<Inhibitor> {
        self.board().inhibitors.clone()
    }

    /// The registered models.
    pub fn models(&self) -> Vec<ModelView> {
        self.board().models.clone()
    }

    /// Changes from now on. A receiver that lags is told so and reads the views again.
    pub fn changes(&self) -> broadcast::Receiver<Change> {
        self.changes.subscribe()
    }

    /// Waits until the run is over, or the daemon goes down.
    pub async fn wait(&self, id: &RunId) -> Result<RunView, RequestError> {
        let mut changes = self.changes();
        loop {
            let view = self.view(id)?;
            if view.state.is_over() {
                return Ok(view);
            }
            if self.status().state == "stopping" {
                return Err(RequestError::ShuttingDown);
            }
            // A lag only means that changes were missed: look again. The channel never closes, since we hold it.
            let _ = changes.recv().await;
        }
    }

    /// Takes a run into the queue. Its files are copied; it is durable when this returns.
    pub async fn submit(&self, submission: Submission) -> Result<RunId, RequestError> {
        self.ask(|reply| Command::Submit(Box::new(submission), reply)).await
    }

    /// What a run would take, as JSON ([`crate::plan::Page`]).
    pub async fn plan(&self, request: PlanRequest) -> Result<String, RequestError> {
        self.ask(|reply| Command::Plan(Box::new(request), reply)).await
    }

    /// Pauses, resumes or cancels. Durable when this returns; a worker may still be saving.
    pub async fn change(&self, id: &RunId, ask: Ask) -> Result<(), RequestError> {
        self.ask(|reply| Command::Ask(id.clone(), ask, reply)).await
    }

    /// Deletes a run that is over, with all its files.
    pub async fn remove(&self, id: &RunId) -> Result<(), RequestError> {
        self.ask(|reply| Command::Remove(id.clone(), reply)).await
    }

    /// Changes a run's place in the queue.
    pub async fn set_priority(&self, id: &RunId, priority: i32) -> Result<(), RequestError> {
        self.ask(|reply| Command::SetPriority(id.clone(), priority, reply)).await
    }

    /// Changes when a run should be done, in microseconds since 1970; 0 takes its deadline away.
    pub async fn set_deadline(&self, id: &RunId, deadline_us: u64) -> Result<(), RequestError> {
        self.ask(|reply| Command::SetDeadline(id.clone(), deadline_us, reply)).await
    }

    /// Has a checkpoint written; its completed steps.
    pub async fn checkpoint(&self, id: &RunId) -> Result<u64, RequestError> {
        self.ask(|reply| Command::Checkpoint(id.clone(), reply)).await
    }

    /// Has held-out loss computed. It changes nothing in the run.
    pub async fn evaluate(&self, id: &RunId) -> Result<f64, RequestError> {
        self.ask(|reply| Command::Evaluate(id.clone(), reply)).await
    }

    /// What is not for everybody.
    pub async fn details(&self, id: &RunId) -> Result<Details, RequestError> {
        self.ask(|reply| Command::Details(id.clone(), reply)).await
    }

    /// `metrics.jsonl`, for reading.
    pub async fn open_metrics(&self, id: &RunId) -> Result<OwnedFd, RequestError> {
        self.ask(|reply| Command::OpenMetrics(id.clone(), reply)).await
    }

    /// `journal.jsonl`, for reading.
    pub async fn open_journal(&self, id: &RunId) -> Result<OwnedFd, RequestError> {
        self.ask(|reply| Command::OpenJournal(id.clone(), reply)).await
    }

    /// The files of a succeeded run's adapter, for reading.
    pub async fn open_adapter(&self, id: &RunId) -> Result<Vec<(String, OwnedFd)>, RequestError> {
        self.ask(|reply| Command::OpenAdapter(id.clone(), reply)).await
    }

    /// Holds all training until every copy of the returned descriptor is closed. With [`Inhibition::wait`] it returns
    /// when nothing computes any more; if that takes too long, nothing is held and the error is
    /// [`RequestError::Busy`].
    pub async fn inhibit(&self, inhibition: Inhibition) -> Result<OwnedFd, RequestError> {
        self.ask(|reply| Command::Inhibit(inhibition, reply)).await
    }

    /// Copies a model directory to the registered ones.
    pub async fn add_model(&self, name: String, directory: OwnedFd) -> Result<ModelView, RequestError> {
        self.ask(|reply| Command::AddModel(name, directory, reply)).await
    }

    /// Removes a registered model that no unfinished run uses.
    pub async fn remove_model(&self, name: String) -> Result<(), RequestError> {
        self.ask(|reply| Command::RemoveModel(name, reply)).await
    }

    /// Takes over what can change while runs are there: `[limits]`, `[worker]` but for `launch`, `[window]` (for deadlines),
    /// and `storage.model_directories`.
    pub async fn configure(&self, config: DaemonConfig) -> Result<(), RequestError> {
        self.ask(|reply| Command::Configure(Box::new(config), reply)).await
    }

    /// Takes over another budget and other hours: deadlines and plans are held against them.
    pub async fn set_budget(&self, budget: Budget, window: Window) -> Result<(), RequestError> {
        self.ask(|reply| Command::SetBudget(Box::new((budget, window)), reply)).await
    }

    /// Has the active run saved because the machine sleeps or goes down; returns when there is no worker any more.
    /// Nothing is started until [`Runs::wake`]. A second reason replaces the first.
    pub async fn suspend(&self, reason: Reason) {
        let (done, finished) = oneshot::channel();
        if self.commands.send(Command::Suspend(reason, done)).await.is_ok() {
            let _ = finished.await;
        }
    }

    /// Ends what [`Runs::suspend`] began.
    pub async fn wake(&self) {
        // The owner only ends with the daemon.
        let _ = self.commands.send(Command::Wake).await;
    }

    /// Has the active run saved; returns when there is no worker any more. Nothing is started afterwards.
    pub async fn shutdown(&self, reason: Reason) {
        let (done, finished) = oneshot::channel();
        if self.commands.send(Command::Shutdown(reason, done)).await.is_ok() {
            let _ = finished.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    fn joules(gross: f64) -> Energy {
        Energy { gross: Joules(gross), metered: 1.0, ..Energy::default() }
    }

    #[test]
    fn energy_is_known_where_a_meter_saw_it() {
        let entry = |energy, tokens| Entry { energy, tokens };
        assert_eq!(RunEnergy::new(&Entry::default(), None), RunEnergy::default());
        let blind = Energy { unmetered: 9.0, ..Energy::default() };
        assert_eq!(RunEnergy::new(&entry(blind, 7), None), RunEnergy::default());
        let first = RunEnergy::new(&entry(joules(30.0), 0), None);
        assert_eq!((first.gross, first.above_idle, first.per_token), (Some(Joules(30.0)), None, None));
        let known = Energy { idle: Joules(10.0), ..joules(30.0) };
        let known = RunEnergy::new(&entry(known, 60), Some(Joules(2.0)));
        assert_eq!((known.above_idle, known.per_token), (Some(Joules(20.0)), Some(Joules(0.5))));
        assert_eq!(known.last_step, Some(Joules(2.0)));
    }

    #[test]
    fn a_step_is_the_difference_of_two_totals() {
        let at = Instant::now();
        let mark = |step, energy| Mark { at, step, energy };
        let step = |before, now| Mark::step_energy(Some(before), now);
        assert_eq!(step(mark(3, Some(joules(10.0))), mark(4, Some(joules(14.5)))), Some(Joules(4.5)));
        assert_eq!(step(mark(3, Some(joules(10.0))), mark(5, Some(joules(14.5)))), None, "two steps");
        assert_eq!(step(mark(3, None), mark(4, Some(joules(14.5)))), None, "it began before");
        assert_eq!(step(mark(3, Some(joules(10.0))), mark(4, None)), None, "the meter fell silent");
        let gap = Energy { unmetered: 7.0, ..joules(14.0) };
        assert_eq!(step(mark(3, Some(joules(10.0))), mark(4, Some(gap))), None, "a part was not seen");
        assert_eq!(step(mark(3, Some(joules(10.0))), mark(4, Some(joules(9.9)))), Some(Joules(0.0)));
        assert_eq!(Mark::step_energy(None, mark(4, Some(joules(1.0)))), None);
    }
}
