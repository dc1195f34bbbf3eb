//! Plans: what a run would take, asked of a worker, and answered with the hours, the quotas and what earlier runs took.
//!
//! ```text
//!   Plan ──► inputs copied ──► worker surveys, and probes ──► page ──► reply
//!              │ refused          │ hold, shutdown, too long: its worker is killed
//!              ▼                  ▼
//!            reply              reply              …and then the copies are removed
//! ```
//!
//! One at a time. A survey computes without a permit, as a run that prepares does, so it waits for no hours, but nothing
//! is surveyed while the machine is too warm, short of memory or somebody's. A probe trains: it has the device to itself,
//! and only while a run would. No run begins meanwhile.

use super::{Message, Owner, forward, on_disk, wall_us};
use crate::checkpoint::FileError;
use crate::plan::history::{self, NAME};
use crate::plan::page::{Facts, Survey};
use crate::plan::roofline::Device;
use crate::plan::throughput::{Machine, Measured, Origin, PerToken, Record};
use crate::plan::{Page, Speed};
use crate::reason::Reason;
use crate::runs::session::{self, Ended, Event as SessionEvent, Pace, Session};
use crate::runs::view::{Change, PlanRequest, Reply, RequestError};
use crate::scheduler::forecast::{self, Known, Outlook};
use crate::units::RunId;
use crate::worker::protocol::{Finished, Report, Start, SurveyOrder, VERSION};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::Instant;

/// Longest time for a plan, from the copies to the last micro-batch of a probe.
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// A plan in the making.
pub(super) struct Planning {
    id: RunId,
    since: Instant,
    probe: bool,
    before: Option<Timestamp>,
    incoming: PathBuf,
    /// The base as the client's spec names it.
    base: String,
    /// Absent while the inputs are copied, and when its worker has been told to go.
    session: Option<Session>,
    /// The run that had memory when it was surveyed.
    beside: Option<RunId>,
    /// Its worker was started, and is not known to be gone.
    worker: bool,
    /// Absent when it is answered.
    reply: Option<Reply<String>>,
}

/// What the answer rests on.
struct Grounds {
    survey: Survey,
    measured: Option<Measured>,
    notes: Vec<String>,
    outlook: Outlook,
    before: Option<Timestamp>,
    history: PathBuf,
    now: ZonedDateTime,
    time_us: u64,
}

impl Planning {
    /// Whether it is the one with this id.
    pub(super) fn is(&self, id: &RunId) -> bool {
        self.id == *id
    }
}

impl Owner {
    /// Checks and has the files copied; [`Self::plan_inputs`] goes on.
    pub(super) fn plan(&mut self, request: PlanRequest, reply: Reply<String>) {
        let before = request.before_us.map(moment).transpose();
        let admitted = match before {
            Err(error) => Err(error),
            Ok(before) => self.plan_admitted(request.probe).map(|()| before),
        };
        let started = admitted.and_then(|before| Ok((before, self.new_id()?)));
        let (before, id) = match started {
            Ok(started) => started,
            Err(error) => return drop(reply.send(Err(error))),
        };
        let incoming = self.layout.incoming(&id);
        let (store, models) = (self.layout.inputs(), self.models.clone());
        let limits = self.options.config.limits.clone();
        let base = base_of(&request.submission.spec);
        let (events, submission, place) = (self.events.clone(), request.submission, incoming.clone());
        self.planning = Some(Planning {
            id: id.clone(),
            since: Instant::now(),
            probe: request.probe,
            before,
            incoming,
            base,
            session: None,
            beside: None,
            worker: false,
            reply: Some(reply),
        });
        tokio::task::spawn_blocking(move || {
            let taken = super::take(&submission, &place, &place, &store, &models, &limits);
            let text = taken.map(|taken| taken.spec.to_toml());
            let _ = events.blocking_send(Message::PlanInputs(id, text));
        });
    }

    fn plan_admitted(&self, probe: bool) -> Result<(), RequestError> {
        if self.stopping.is_some() {
            return Err(RequestError::ShuttingDown);
        }
        if self.planning.is_some() {
            return Err(RequestError::Busy("another plan is being made: try again when it is done".into()));
        }
        if let Some(error) = self.occupied().filter(|_| probe) {
            return Err(error);
        }
        match self.plan_held(probe) {
            None => Ok(()),
            Some(reason) if probe => Err(RequestError::Busy(format!(
                "nothing may train now ({reason}), so nothing is probed: plan without a probe, or later"
            ))),
            Some(reason) => Err(RequestError::Busy(format!("nothing is planned now ({reason}): try later"))),
        }
    }

    /// A probe trains, and so needs the device for itself.
    fn occupied(&self) -> Option<RequestError> {
        let active = self.active.as_ref()?;
        Some(RequestError::Busy(format!(
            "run {} has the device: a probe needs it; plan without one, or pause the run",
            active.id
        )))
    }

    /// Why a plan may not go on. A survey waits for no hours and no energy.
    fn plan_held(&self, probe: bool) -> Option<Reason> {
        if probe { self.held().0 } else { self.claimed().or(self.ruling().unfit) }
    }

    /// The inputs are there, or not: a worker is started.
    pub(super) async fn plan_inputs(&mut self, id: RunId, taken: Result<String, RequestError>) {
        // A run may have begun while the inputs were copied.
        let (occupied, beside) = (self.occupied(), self.active.as_ref().map(|active| active.id.clone()));
        let Some(planning) = self.planning.as_mut().filter(|planning| planning.id == id) else {
            // It was given up.
            return self.remove_copies(self.layout.incoming(&id)).await;
        };
        if planning.reply.is_none() {
            return self.plan_over().await;
        }
        let taken = match occupied.filter(|_| planning.probe) {
            Some(error) => Err(error),
            None => taken,
        };
        let spec = match taken {
            Ok(spec) => spec,
            Err(error) => {
                self.plan_answer(Err(error));
                return self.plan_over().await;
            }
        };
        let start = Start {
            version: VERSION,
            run: id.to_string(),
            spec,
            directory: planning.incoming.clone(),
            cache: self.options.config.storage.cache_directory.clone(),
            threads: self.options.config.worker.threads,
            survey: Some(SurveyOrder { probe: planning.probe }),
        };
        let (session, events) = session::start(
            self.options.launcher.clone(),
            self.options.workers_clock.clone(),
            start,
            self.options.config.worker.clone(),
        );
        (planning.session, planning.worker, planning.beside) = (Some(session), true, beside);
        tokio::spawn(forward(id, events, self.events.clone()));
    }

    /// What its worker says.
    pub(super) async fn plan_event(&mut self, event: SessionEvent) {
        let SessionEvent::Ended(ended) = event else {
            if let SessionEvent::Report(Report::Ready(ready)) = event {
                self.handle.board().status.device = ready.device;
                self.tell(Change::Status);
            }
            return;
        };
        match ended {
            Ended::Finished(Finished::Surveyed { survey, measured, unmeasured }) => {
                self.plan_surveyed(*survey, measured.map(|measured| *measured), unmeasured);
            }
            Ended::Finished(_) => {
                self.plan_answer(Err(RequestError::Failed(
                    "the worker ended before the plan was made".into(),
                )));
            }
            Ended::Failed { reason: Reason::InvalidInput, message, .. } => {
                self.plan_answer(Err(RequestError::InvalidInput(message)));
            }
            Ended::Failed { reason, message, .. } => {
                self.plan_answer(Err(RequestError::Failed(format!(
                    "no plan was made ({reason}): {message}"
                ))));
            }
        }
        self.plan_over().await;
    }

    fn plan_surveyed(&mut self, mut survey: Survey, measured: Option<Measured>, unmeasured: Option<String>) {
        let Some(planning) = &mut self.planning else { return };
        let Some(reply) = planning.reply.take() else { return };
        // Where the copy lay is nobody's business.
        survey.facts.base.path.clone_from(&planning.base);
        let mut notes = Vec::from_iter(unmeasured.map(|why| format!("nothing was measured: {why}")));
        notes.extend(planning.beside.as_ref().and_then(|run| beside(&mut survey.facts, run)));
        let now = Timestamp::try_from(self.options.clock.wall()).unwrap_or(Timestamp::UNIX_EPOCH);
        let grounds = Grounds {
            survey,
            measured,
            notes,
            outlook: self.outlook(),
            before: self.planning.as_ref().and_then(|planning| planning.before),
            history: self.history(),
            now: now.to_zoned_datetime(TimeZone::system()),
            time_us: wall_us(&*self.options.clock),
        };
        tokio::task::spawn_blocking(move || reply.send(answer(grounds)));
    }

    /// Paces a probe, and ends a plan that may not go on.
    pub(super) async fn pace_plan(&mut self) {
        let Some(planning) = &self.planning else { return };
        let held = self.plan_held(planning.probe);
        let late = planning.since.elapsed() > LIMIT;
        let refused = match (&planning.reply, held) {
            (None, _) => None,
            // Nobody waits for it any more.
            (Some(reply), _) if reply.is_closed() => Some(RequestError::Busy("the plan was given up".into())),
            _ if self.stopping.is_some() => Some(RequestError::ShuttingDown),
            (_, Some(reason)) => {
                Some(RequestError::Busy(format!("the plan was ended ({reason}): try later")))
            }
            (_, None) if late => {
                Some(RequestError::Failed(format!("no plan was made within {} s", LIMIT.as_secs())))
            }
            (_, None) => None,
        };
        if let Some(refused) = refused {
            self.plan_answer(Err(refused));
            // Whoever has no session any more is killed; it has nothing to save.
            if let Some(planning) = &mut self.planning {
                planning.session = None;
            }
        }
        if late && self.surveys().is_none() {
            // A file system that does not answer keeps its thread, and no one else.
            self.planning = None;
        }
        let duty = self.ruling().duty;
        let run = self.held().0.is_none();
        if let Some(session) = self.planning.as_ref().and_then(|planning| planning.session.as_ref()) {
            session.pace(Pace { run, duty, hold: 0 });
        }
    }

    /// The plan whose worker is there, until it is known to be gone. What it takes is booked under its own id, and so counts to the night.
    pub(super) fn surveys(&self) -> Option<&RunId> {
        self.planning.as_ref().filter(|planning| planning.worker).map(|planning| &planning.id)
    }

    fn plan_answer(&mut self, answer: Result<String, RequestError>) {
        if let Some(reply) = self.planning.as_mut().and_then(|planning| planning.reply.take()) {
            let _ = reply.send(answer);
        }
    }

    /// Its worker, if it had one, is gone: removes the copies.
    async fn plan_over(&mut self) {
        if let Some(Planning { incoming, .. }) = self.planning.take() {
            self.remove_copies(incoming).await;
        }
    }

    async fn remove_copies(&mut self, incoming: PathBuf) {
        let swept = on_disk(move || match std::fs::remove_dir_all(&incoming) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(FileError::new("remove", &incoming, error))
            }
            _ => Ok(()),
        });
        if let Err(error) = swept.await {
            tracing::warn!(%error, "what was copied for a plan stays until the next start");
        }
        self.sweep();
    }

    /// The record of speed.
    fn history(&self) -> PathBuf {
        self.options.config.storage.state_directory.join(NAME)
    }

    fn outlook(&self) -> Outlook {
        let standing = self.options.governor.standing();
        let config = &self.options.config;
        Outlook {
            window: config.window.clone(),
            budget: config.budget.clone(),
            spent: standing.night,
            machine: Machine { board: Some(standing.board), mode: standing.mode },
        }
    }

    /// Puts on record what a run took. A disk that refuses it is worth a warning.
    pub(super) async fn remember(&mut self, id: &RunId, measured: Measured) {
        let Outlook { budget, machine, .. } = self.outlook();
        let entry = self.runs.get(id).map(|run| run.energy.clone()).unwrap_or_default();
        let of_token = |gross| entry.energy.per_token(entry.tokens, gross);
        let energy = of_token(true).zip(of_token(false)).filter(|(gross, _)| gross.0 > 0.0);
        let record = Record {
            time_us: wall_us(&*self.options.clock),
            origin: Origin::Run,
            run: Some(id.clone()),
            machine,
            duty: self.active.as_mut().and_then(|active| active.share.take()),
            budget: Some(Outlook::set_points(&budget)),
            energy: energy.map(|(gross, above_idle)| PerToken { gross, above_idle }),
            measured,
        };
        let path = self.history();
        let written = tokio::task::spawn_blocking(move || history::append(&path, &record)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(RUN_ID = %id, "{error}");
        }
    }
}

/// A moment in microseconds since 1970.
fn moment(us: u64) -> Result<Timestamp, RequestError> {
    let at = i64::try_from(us).ok().and_then(|us| Timestamp::from_microsecond(us).ok());
    at.ok_or_else(|| RequestError::InvalidInput("the option \"before\" is beyond the calendar".into()))
}

/// The base that a spec names, as it writes it.
fn base_of(spec: &str) -> String {
    let base = spec.parse::<toml::Table>().ok().and_then(|spec| {
        let base = spec.get("model")?.get("base")?.as_str()?;
        Some(base.replace(char::is_control, "\u{fffd}"))
    });
    base.unwrap_or_default()
}

/// Memory that a run had while another was surveyed is free when that one begins, and how much it was is not known: a run
/// that does not fit into the rest is not refused.
fn beside(facts: &mut Facts, run: &RunId) -> Option<String> {
    let memory = &mut facts.memory;
    let available = memory.available.filter(|_| memory.fits == Some(false))?;
    (memory.fits, facts.change) = (None, None);
    Some(format!(
        "{available} are available beside run {run}, which has memory of its own: whether this one fits when that is \
         over is not known"
    ))
}

/// The page, as JSON.
fn answer(grounds: Grounds) -> Result<String, RequestError> {
    let Grounds { survey, measured, notes, outlook, before, history, now, time_us } = grounds;
    let (records, damaged) = history::read(&history).unwrap_or_else(|error| {
        tracing::warn!("{error}");
        (Vec::new(), 0)
    });
    if damaged > 0 {
        tracing::warn!("{damaged} lines of {} cannot be read and are left out", history.display());
    }
    let set_points = Outlook::set_points(&outlook.budget);
    let of = |records: &[Record]| Speed::of(records, &survey.setup, &outlook.machine, Some(&set_points));
    let mut speed = of(&records);
    let probed = measured.is_some();
    if let Some(measured) = measured {
        let machine = outlook.machine.clone();
        let (duty, budget, energy) = (None, None, None);
        let record =
            Record { time_us, origin: Origin::Probe, run: None, machine, duty, budget, energy, measured };
        if let Err(error) = history::append(&history, &record) {
            tracing::warn!("{error}");
        }
        // It says how fast the machine is now, and nothing about heat and energy.
        let (duty, watts) = speed.map_or((None, None), |speed| (speed.duty, speed.watts));
        speed = of(&[record]);
        if let Some(speed) = &mut speed {
            (speed.duty, speed.watts) = (duty, watts);
        }
    }
    let device = Device::of_machine(&survey.setup, &outlook.machine);
    let mut page: Page = forecast::page(survey, &Known { speed, probed, device }, &outlook, before, &now);
    page.notes.extend(notes);
    serde_json::to_string(&page)
        .map_err(|error| RequestError::Failed(format!("the plan cannot be written: {error}")))
}

/// The share of the time that the governor let a run compute, while nothing held it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Share {
    computing: f64,
    seconds: f64,
    last: Option<(Instant, f64)>,
}

impl Share {
    /// From now on it may compute at this duty; `None`: not at all, which does not count.
    pub fn paced(&mut self, duty: Option<f64>) {
        let now = Instant::now();
        if let Some((since, duty)) = self.last {
            let seconds = (now - since).as_secs_f64();
            self.seconds += seconds;
            self.computing += seconds * duty;
        }
        self.last = duty.map(|duty| (now, duty));
    }

    /// The share since the last time this was asked.
    fn take(&mut self) -> Option<f64> {
        self.paced(self.last.map(|(_, duty)| duty));
        let share = (self.seconds > 0.0).then(|| self.computing / self.seconds);
        (self.computing, self.seconds) = (0.0, 0.0);
        share
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;

    #[test]
    fn what_a_run_beside_it_holds_refuses_no_plan() {
        let rows = |n: u64| {
            serde_json::json!({
                "rows": n, "tokens": n, "trainable_tokens": n, "dropped_overlap": 0, "duplicates": 0, "tokens_cut": 0,
                "share_truncated": 0.0, "share_masked": 0.5, "median": 1, "p95": 1, "longest": 1, "histogram": [],
            })
        };
        let mut facts: Facts = serde_json::from_value(serde_json::json!({
            "run": "tiny",
            "base": {
                "path": "model", "hash": "e2", "model_type": "llama", "layers": 2, "hidden_size": 32, "vocab_size": 259,
                "quantization": "nf4", "double_quant": true,
            },
            "adapter": { "r": 4, "alpha": 8.0, "target_modules": ["q_proj"], "layers": null },
            "parameters": { "trainable": 1, "total": 10, "share": 0.1 },
            "data": { "train": rows(22), "eval": null },
            "steps": {
                "total": 7, "epochs": 2.0, "tokens_per_epoch": 9, "sequences_per_epoch": 8, "sequences_per_step": 8,
                "micro_batch_size": 2, "sequence_length": 144,
            },
            "memory": {
                "parts": [], "total": 4096, "available": 1024, "fits": false, "recompute": true,
                "gradient_checkpointing": "auto", "micro_batch": { "tokens": 288, "labelled": 144, "longest": 109 },
            },
            "change": { "set": ["data.sequence_length=64"], "total": 1000, "same_result": false },
        }))
        .unwrap();
        let run = RunId::from_bits([7; 6]);
        let note = beside(&mut facts, &run).unwrap();
        assert!(note.starts_with("1.0 KiB are available beside run 070707070707"), "{note}");
        assert_eq!((facts.memory.fits, facts.memory.available), (None, Some(Bytes(1024))));
        assert_eq!(facts.change, None);
        facts.memory.fits = Some(true);
        assert_eq!(beside(&mut facts, &run), None, "what fits beside it fits");
        assert_eq!(facts.memory.fits, Some(true));
    }
}
