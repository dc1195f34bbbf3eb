//! An owner for tests of the bus: it has no disk and no worker, and does what it is told.

use super::state::{Condition, Event, Refusal, State};
use super::view::{
    Board, Change, Command, Details, Inhibitor, ModelView, Reply, RequestError, RunView, Runs, Status,
};
use crate::units::RunId;
use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use tokio::sync::{broadcast, mpsc};

/// What the fake knows and remembers.
#[derive(Clone)]
pub struct Fake {
    runs: Runs,
    heard: Arc<Mutex<Vec<String>>>,
    /// Plans that are never made.
    endless: Arc<Mutex<Vec<Reply<String>>>>,
}

/// An id that ends in `number`.
pub fn id(number: u8) -> RunId {
    RunId::from_bits([0xab, 0, 0, 0, 0, number])
}

/// A queued run of `owner`.
pub fn queued(number: u8, owner: u32) -> RunView {
    RunView {
        id: id(number),
        name: format!("run-{number}"),
        state: State::Queued,
        reason: None,
        owner,
        priority: 0,
        created_us: 1_000_000 + u64::from(number),
        started_us: 0,
        finished_us: 0,
        step: 0,
        total_steps: 0,
        epoch: 0.0,
        loss: None,
        eval_loss: None,
        tokens_per_second: None,
        progress: 0.0,
        remaining_seconds: None,
        attempts: 0,
        checkpoint_step: None,
        memory_bytes: 0,
        energy: Default::default(),
        deadline_us: 0,
        deadline_at_risk: false,
    }
}

/// Starts the fake; it ends with the runtime. `lag` is how many changes a receiver may be behind.
pub fn start(lag: usize) -> (Runs, Fake) {
    let (commands, mut orders) = mpsc::channel(16);
    let status = Status { active: None, state: "idle", reason: None, device: String::new(), unfinished: 0 };
    let board = Board { runs: BTreeMap::new(), status, inhibitors: Vec::new(), models: Vec::new() };
    let runs = Runs { commands, board: Arc::new(Mutex::new(board)), changes: broadcast::channel(lag).0 };
    let fake = Fake { runs: runs.clone(), heard: Arc::default(), endless: Arc::default() };
    let owner = fake.clone();
    tokio::spawn(async move {
        while let Some(command) = orders.recv().await {
            owner.obey(command);
        }
    });
    (runs, fake)
}

impl Fake {
    /// What was asked so far.
    pub fn heard(&self) -> Vec<String> {
        self.heard.lock().unwrap().clone()
    }

    /// Plans that are never made, and how many of them nobody waits for any more.
    pub fn endless(&self) -> (usize, usize) {
        let endless = self.endless.lock().unwrap();
        (endless.len(), endless.iter().filter(|reply| reply.is_closed()).count())
    }

    /// A new run.
    pub fn add(&self, view: RunView) {
        let id = view.id.clone();
        self.runs.board().runs.insert(id.clone(), view);
        self.tell(Change::Added(id));
    }

    /// Changes a run, and tells what `change` makes of its id.
    pub fn update(&self, id: &RunId, edit: impl FnOnce(&mut RunView), change: fn(RunId) -> Change) {
        edit(self.runs.board().runs.get_mut(id).unwrap());
        self.tell(change(id.clone()));
    }

    /// Takes a run away.
    pub fn remove(&self, id: &RunId) {
        self.runs.board().runs.remove(id);
        self.tell(Change::Removed(id.clone()));
    }

    /// Changes the status.
    pub fn status(&self, edit: impl FnOnce(&mut Status)) {
        edit(&mut self.runs.board().status);
        self.tell(Change::Status);
    }

    /// Registers a model.
    pub fn model(&self, model: ModelView) {
        self.runs.board().models.push(model);
    }

    fn tell(&self, change: Change) {
        let _ = self.runs.changes.send(change);
    }

    fn hear(&self, what: String) {
        self.heard.lock().unwrap().push(what);
    }

    fn checked(
        &self,
        id: &RunId,
        fits: impl Fn(State) -> Result<(), Refusal>,
    ) -> Result<RunView, RequestError> {
        let view = self.runs.view(id)?;
        fits(view.state)?;
        Ok(view)
    }

    fn obey(&self, command: Command) {
        let active = |state| match state {
            State::Running => Ok(()),
            state => Err(Refusal::NotActive(state)),
        };
        let over = |state: State| if state.is_over() { Ok(()) } else { Err(Refusal::NotOver(state)) };
        match command {
            Command::Submit(submission, reply) => {
                let files: Vec<String> = submission
                    .files
                    .into_iter()
                    .map(|(name, file)| {
                        format!("{name}={}", std::io::read_to_string(std::fs::File::from(file)).unwrap())
                    })
                    .collect();
                self.hear(format!(
                    "submit {:?} by {} files [{}] priority {} deadline {} hold {} spec {:?}",
                    submission.spec_name,
                    submission.owner,
                    files.join(" "),
                    submission.priority,
                    submission.deadline_us,
                    submission.hold,
                    submission.spec
                ));
                if submission.spec.contains("wrong") {
                    let _ = reply.send(Err(RequestError::InvalidSpec("line 1: wrong".into())));
                    return;
                }
                let number = 100 + self.runs.board().runs.len() as u8;
                self.add(queued(number, submission.owner));
                let _ = reply.send(Ok(id(number)));
            }
            Command::Plan(request, reply) => {
                let submission = request.submission;
                let files: Vec<&str> = submission.files.iter().map(|(name, _)| name.as_str()).collect();
                self.hear(format!(
                    "plan {:?} by {} files {files:?} probe {} before {:?}",
                    submission.spec_name, submission.owner, request.probe, request.before_us
                ));
                if submission.spec == "endless" {
                    return self.endless.lock().unwrap().push(reply);
                }
                let _ = reply.send(match submission.spec.as_str() {
                    "wrong" => Err(RequestError::InvalidSpec("line 1: wrong".into())),
                    _ => Ok("{\"schema\":1}".into()),
                });
            }
            Command::Ask(id, ask, reply) => {
                let asked = self.runs.view(&id).and_then(|view| {
                    let before = Condition {
                        state: view.state,
                        reason: view.reason,
                        then: None,
                        worker: matches!(view.state, State::Preparing | State::Running | State::Saving),
                    };
                    Ok(before.after(Event::Ask(ask))?)
                });
                let answer = asked.map(|after| {
                    let edit = |view: &mut RunView| (view.state, view.reason) = (after.state, after.reason);
                    self.update(&id, edit, Change::State);
                });
                let _ = reply.send(answer);
            }
            Command::Remove(id, reply) => {
                let _ = reply.send(self.checked(&id, over).map(|_| self.remove(&id)));
            }
            Command::SetPriority(id, priority, reply) => {
                let answer = self.checked(&id, |_| Ok(())).map(|_| {
                    self.update(&id, |view| view.priority = priority, Change::State);
                });
                let _ = reply.send(answer);
            }
            Command::SetDeadline(id, deadline_us, reply) => {
                let answer = self.checked(&id, |_| Ok(())).map(|_| {
                    self.update(&id, |view| view.deadline_us = deadline_us, Change::State);
                });
                let _ = reply.send(answer);
            }
            Command::Checkpoint(id, reply) => {
                let _ = reply.send(self.checked(&id, active).map(|view| view.step));
            }
            Command::Evaluate(id, reply) => {
                let _ = reply.send(self.checked(&id, active).map(|_| 1.25));
            }
            Command::Details(id, reply) => {
                let details =
                    |view: RunView| Details { spec: format!("# {}", view.name), ..Details::default() };
                let _ = reply.send(self.checked(&id, |_| Ok(())).map(details));
            }
            Command::OpenMetrics(id, reply) => {
                let _ = reply.send(self.checked(&id, |_| Ok(())).map(|_| file("metrics\n")));
            }
            Command::OpenJournal(id, reply) => {
                let _ = reply.send(self.checked(&id, |_| Ok(())).map(|_| file("journal\n")));
            }
            Command::OpenAdapter(id, reply) => {
                let files = |_| vec![("adapter_config.json".to_string(), file("{}"))];
                let _ = reply.send(self.checked(&id, over).map(files));
            }
            Command::Inhibit(inhibition, reply) => {
                self.hear(format!("inhibit by {}", inhibition.sender));
                let held = Inhibitor {
                    who: inhibition.who,
                    why: inhibition.why,
                    owner: inhibition.owner,
                    lease: inhibition.lease,
                    since_us: 7,
                };
                self.runs.board().inhibitors.push(held);
                let _ = reply.send(Ok(file("")));
            }
            Command::AddModel(name, _, reply) => {
                let model =
                    ModelView { name, directory: "/models/x".into(), bytes: 1, architecture: String::new() };
                self.model(model.clone());
                let _ = reply.send(Ok(model));
            }
            Command::RemoveModel(name, reply) => {
                let mut board = self.runs.board();
                let known = board.models.iter().any(|model| model.name == name);
                board.models.retain(|model| model.name != name);
                let missing = || RequestError::NoSuchModel(format!("there is no model {name:?}"));
                let _ = reply.send(known.then_some(()).ok_or_else(missing));
            }
            Command::Configure(_, reply) | Command::SetBudget(_, reply) => {
                let _ = reply.send(Ok(()));
            }
            Command::Suspend(_, done) | Command::Shutdown(_, done) => {
                let _ = done.send(());
            }
            Command::Wake => {}
        }
    }
}

/// An open file with this content.
pub fn file(content: &str) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content.as_bytes()).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file.into()
}
