//! A run from spec to results.
//!
//! ```text
//!   prepare ──► resume or begin ──► loop:  evaluate if due ──► commit if due ──► step ──┐
//!                                     ▲                                                 │
//!                                     └─────────────────────────────────────────────────┘
//!   gate says stop (asked before every micro-step and every held-out batch) ──► commit ──► Stopped
//!   gate has a request (asked at the same places) ──► commit or evaluate, aside ──► go on
//!   last step done, or no improvement for long enough ──► adapter, summary ──► Finished
//!   loss, gradient or adapter not finite ──► Diverged (nothing is committed: the last checkpoint is good)
//! ```
//!
//! The result is a function of (base, data, spec, seed, backend): everything in [`TrainingState`] and the four sets of
//! tensors is in the checkpoint, and nothing else influences a bit.

use super::device;
use super::gate::{Gate, Pace, Request};
use super::observer::{EvaluationRecord, Event, Observer, StepRecord};
use super::prepare::{self, PrepareError, Prepared};
use super::schedule::Schedule;
use super::trainer::Trainer;
use super::workload;
use crate::backend::Backend;
use crate::checkpoint::{
    self, CheckpointError, CheckpointRef, FileError, Identity, IdentityMismatch, LockError, MetricsError,
    MetricsLog, OutputLock, PeftError, Store, TensorRef, TrainerState, TrainingState,
};
use crate::clock::Clock;
use crate::config::spec::Spec;
use crate::data::{EpochPlan, Sequence, TokenRows};
use crate::model::adapter::Adapter;
use crate::model::decoder::Decoder;
use crate::model::memory::{self, MemoryPlan};
use crate::model::work::Work;
use crate::plan::Measured;
use crate::plan::throughput::Amount;
use crate::reason::Reason;
use crate::units::Bytes;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Computing after which what it took is told, at the next checkpoint: a crash loses no more of it.
const TELL_EVERY: f64 = 60.0;

/// The spec with its defaults, beside the results.
const RESOLVED_SPEC: &str = "spec.resolved.toml";

/// The keys in which `spec` differs from the one that `output` holds, in words; empty where none can be read.
fn changes_since(output: &Path, spec: &Spec) -> String {
    let path = output.join(RESOLVED_SPEC);
    let before = std::fs::read_to_string(&path)
        .ok()
        .and_then(|text| Spec::parse(&text, &path.display().to_string(), output, &[]).ok());
    let differences = before.map(|before| before.differences(spec)).unwrap_or_default();
    if differences.is_empty() {
        String::new()
    } else {
        format!("\n  in the spec: {}", differences.join("; "))
    }
}

/// Where a run reads and writes.
#[derive(Clone, Debug)]
pub struct RunPaths {
    /// Results and checkpoints.
    pub output: PathBuf,
    /// Quantised bases and tokens, shared between runs.
    pub cache: PathBuf,
}

/// Why a run ended without a result.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Nothing was trained.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// The machine does not have the memory. Nothing was written.
    #[error("the run takes {needed}, the machine has {total}: `finetuned plan` says what would fit")]
    TooLarge {
        /// What the plan says.
        needed: Bytes,
        /// What there is.
        total: Bytes,
    },
    /// The output directory is in use.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The output directory holds another run's results.
    #[error(
        "{output} already holds a run: continue it with --resume, or choose another --output",
        output = .output.display()
    )]
    Occupied {
        /// The directory.
        output: PathBuf,
    },
    /// The checkpoint was made from something else.
    #[error("cannot resume {checkpoint}: {mismatch}{differences}", checkpoint = .checkpoint.display())]
    Changed {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// What differs.
        mismatch: IdentityMismatch,
        /// The keys of the spec that differ, with both values, as a line of its own.
        differences: String,
    },
    /// The checkpoint's tensors are not those of this run.
    #[error("cannot resume {checkpoint}: {why}", checkpoint = .checkpoint.display())]
    Misfit {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// What differs.
        why: String,
    },
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A result could not be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The metrics could not be written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The adapter could not be written.
    #[error(transparent)]
    Adapter(#[from] PeftError),
    /// A loss, the gradient or the adapter is not finite.
    #[error(
        "{what} is {value} in step {step} (epoch {epoch}, rows {rows}): the run stops here; {last}. A lower \
         learning_rate or max_grad_norm, or removing those rows, may help"
    )]
    Diverged {
        /// "the loss", "the held-out loss", "the gradient norm" or "the adapter's norm".
        what: &'static str,
        /// NaN or infinity.
        value: f64,
        /// The step that was being computed, from 1; for a held-out loss the step after which it was, from 0.
        step: u64,
        /// Its epoch, from 0.
        epoch: u64,
        /// The rows of the micro-step or step, as file:line.
        rows: String,
        /// The last good checkpoint, in words.
        last: String,
    },
}

/// What a finished run found, as it stands in `summary.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Name of the run.
    pub name: String,
    /// Completed steps.
    pub steps: u64,
    /// Passes over the data.
    pub epochs: f64,
    /// Held-out loss before the first step.
    pub baseline_eval_loss: Option<f64>,
    /// Lowest held-out loss.
    pub best_eval_loss: Option<f64>,
    /// Step of the lowest held-out loss.
    pub best_step: Option<u64>,
    /// Held-out loss after the last step.
    pub last_eval_loss: Option<f64>,
    /// Loss of the last step.
    pub last_loss: Option<f64>,
    /// Step whose adapter is in `adapter/`: the best one where there is held-out data, else the last.
    pub adapter_step: u64,
    /// Whether held-out loss stopped improving.
    pub stopped_early: bool,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seconds of computing, over all attempts.
    pub seconds: f64,
    /// Tokens per second of computing.
    pub tokens_per_second: f64,
    /// Largest resident set of this attempt, in bytes.
    pub peak_memory_bytes: Option<u64>,
    /// What the plan had predicted, in bytes.
    pub planned_memory_bytes: u64,
    /// Adapter parameters.
    pub trainable_parameters: u64,
    /// All parameters, as PEFT counts them.
    pub total_parameters: u64,
}

/// How a run ended.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// All done; the adapter is written.
    Finished {
        /// What was found.
        summary: Box<Summary>,
        /// PEFT adapter directory.
        adapter: PathBuf,
    },
    /// Stopped by the gate; continues from this checkpoint.
    Stopped {
        /// Why.
        reason: Reason,
        /// The checkpoint.
        checkpoint: PathBuf,
    },
}

/// Runs `spec`. With `resume`, continues where a checkpoint is there and starts where none is.
pub fn run(
    spec: &Spec,
    paths: &RunPaths,
    resume: bool,
    gate: &mut dyn Gate,
    observer: &mut dyn Observer,
    clock: &dyn Clock,
) -> Result<Outcome, RunError> {
    let began = clock.monotonic();
    let _lock = OutputLock::acquire(&paths.output)?;
    let checkpoints = paths.output.join("checkpoints");
    let occupied = paths.output.join("metrics.jsonl").exists() || checkpoints.exists();
    if occupied && !resume {
        return Err(RunError::Occupied { output: paths.output.clone() });
    }
    let mut note = |text| observer.observe(Event::Note(text));
    let chosen = device::choose(spec.train.backend, spec.model.compute_dtype, &paths.cache, &mut note)?;
    device::with_backend!(chosen, backend => {
        run_on(backend, spec, paths, resume, &checkpoints, gate, observer, clock, began)
    })
}

fn run_on<B: Backend>(
    backend: B,
    spec: &Spec,
    paths: &RunPaths,
    resume: bool,
    checkpoints: &Path,
    gate: &mut dyn Gate,
    observer: &mut dyn Observer,
    clock: &dyn Clock,
    began: Duration,
) -> Result<Outcome, RunError> {
    let quarantine = paths.output.join("quarantine.jsonl");
    let prepared = prepare::prepare(spec, &paths.cache, Some(&quarantine), observer)?;
    let plan = prepare::memory_plan(spec, &backend, &prepared);
    if let Some(total) = prepare::total_memory(&backend).filter(|total| plan.total() > *total) {
        return Err(RunError::TooLarge { needed: plan.total(), total });
    }
    if let Some(available) = prepare::available_memory(&backend).filter(|available| plan.total() > *available)
    {
        observer.observe(Event::Note(format!(
            "the run takes {}, and {available} is available: `finetuned plan` says what would fit",
            plan.total()
        )));
    }
    let store = Store::open(checkpoints)?;
    let run = Run::new(spec, paths, backend, prepared, plan, store, resume, observer)?;
    // Only now: a spec that a resume refuses must not replace the one that the results come from.
    checkpoint::atomic_write(&paths.output.join(RESOLVED_SPEC), spec.to_toml().as_bytes())?;
    run.drive(began, gate, observer, clock)
}

/// A run in progress.
struct Run<'a, B: Backend> {
    spec: &'a Spec,
    output: &'a Path,
    trainer: Trainer<B>,
    train: TokenRows,
    eval: Option<(TokenRows, EpochPlan)>,
    schedule: Schedule,
    total_steps: u64,
    epochs: f64,
    total_parameters: u64,
    planned: Bytes,
    store: Store,
    metrics: MetricsLog,
    state: TrainingState,
    /// Plan of the state's epoch.
    plan: EpochPlan,
    /// Step of the latest evaluation.
    evaluated: Option<u64>,
    last_checkpoint: Option<PathBuf>,
    /// Requests for an evaluation that wait for the gate to open.
    wanted: Vec<u64>,
    last_loss: Option<f64>,
    /// Seconds computed, and tokens, within the current step by this attempt.
    step_seconds: f64,
    step_tokens: u64,
    work: Work,
    /// What was computed since it was told.
    measured: Measured,
    /// Work (GFLOP) and seconds of the attempt's first micro-batch. It reads the base from the disk, so what it took
    /// longer than the others belongs to the preparation.
    first: Option<(f64, f64)>,
}

impl<'a, B: Backend> Run<'a, B> {
    fn new(
        spec: &'a Spec,
        paths: &'a RunPaths,
        backend: B,
        prepared: Prepared,
        plan: MemoryPlan,
        store: Store,
        resume: bool,
        observer: &mut dyn Observer,
    ) -> Result<Self, RunError> {
        let Prepared { tokenizer, data, base, layout, initial } = prepared;
        let identity = Identity {
            base: base.hash.clone(),
            data: data.hash.clone(),
            template: tokenizer.template_hash(),
            tokenizer: tokenizer.tokenizer_hash(),
            spec: spec.result_hash(),
            init_adapter: initial.as_ref().map(|(_, hash)| hash.clone()),
            backend: backend.identity(),
        };
        let steps = prepare::count_steps(spec, &data.train);
        let largest = prepare::largest_micro_batch(spec, &data);
        let capacity = largest.tokens.max(1);
        let total_parameters = base.total_parameters() + layout.parameters();
        drop(tokenizer); // tens of megabytes, not needed while training
        backend.reserve(memory::step_shape(&base, &layout, largest));
        let setup = workload::setup(spec, &backend, &base, &layout, plan.recompute);
        let work = Work::new(&base.config, &layout, plan.recompute);
        let decoder = Decoder::new(backend, base);
        let mut trainer = Trainer::new(decoder, layout, spec.run.seed, capacity, plan.recompute);
        if let Some((values, _)) = initial {
            set(&trainer.decoder.backend, &mut trainer.adapter, &values);
        }
        let mut found = None;
        if resume {
            let recovered = store.recover()?;
            for bad in recovered.quarantined {
                observer.observe(Event::Note(format!(
                    "checkpoint {} is damaged ({}): set aside",
                    bad.path.display(),
                    bad.why
                )));
            }
            found = recovered.latest;
        }
        let resumed = found.is_some();
        let metrics_path = paths.output.join("metrics.jsonl");
        let (state, metrics, last_checkpoint) = match found {
            Some((path, found)) => {
                found.state.identity.check(&identity).map_err(|mismatch| RunError::Changed {
                    checkpoint: path.clone(),
                    mismatch,
                    differences: changes_since(&paths.output, spec),
                })?;
                let misfit = |why| RunError::Misfit { checkpoint: path.clone(), why };
                let layout = &trainer.layout;
                let state = &found.state;
                if found.gradients.is_empty() != (state.micro_step == 0)
                    || state.sequence_index < state.micro_step
                {
                    return Err(misfit(
                        "its gradients and its position within the step contradict each other".into(),
                    ));
                }
                let order = |tensors: &[_]| prepare::in_layout_order(layout, tensors).map_err(misfit);
                let (parameters, m, v) =
                    (order(&found.parameters)?, order(&found.adam_m)?, order(&found.adam_v)?);
                let gradients =
                    if found.gradients.is_empty() { None } else { Some(order(&found.gradients)?) };
                let backend = &trainer.decoder.backend;
                set(backend, &mut trainer.adapter, &parameters);
                set(backend, &mut trainer.m, &m);
                set(backend, &mut trainer.v, &v);
                if let Some(gradients) = gradients {
                    set(backend, &mut trainer.gradients, &gradients);
                }
                let state = found.state;
                let evaluated = last_evaluation(&state) == Some(state.step);
                let metrics = MetricsLog::resume(&metrics_path, state.step, evaluated)?;
                (state, metrics, Some(path))
            }
            None => (fresh_state(identity), MetricsLog::create(&metrics_path)?, None),
        };
        // Only now: an attempt that was refused leaves the spec of the run alone.
        checkpoint::atomic_write(&paths.output.join("spec.resolved.toml"), spec.to_toml().as_bytes())?;
        observer.observe(Event::Started {
            step: state.step,
            within: state.micro_step,
            total: steps.total,
            resumed,
        });
        let eval = data.eval.filter(|rows| !rows.is_empty()).map(|rows| {
            let plan =
                EpochPlan::new(&rows, spec.data.sequence_length, spec.data.packing, false, spec.run.seed, 0);
            (rows, plan)
        });
        let evaluated = last_evaluation(&state);
        let last_loss =
            state.log_history.iter().rev().find_map(|entry| entry.get("loss").and_then(|l| l.as_f64()));
        Ok(Self {
            spec,
            output: &paths.output,
            plan: epoch_plan(spec, &data.train, state.epoch),
            train: data.train,
            eval,
            schedule: Schedule::new(&spec.train, steps.total),
            total_steps: steps.total,
            epochs: steps.epochs,
            total_parameters,
            planned: plan.total(),
            store,
            metrics,
            state,
            evaluated,
            last_checkpoint,
            wanted: Vec::new(),
            last_loss,
            step_seconds: 0.0,
            step_tokens: 0,
            work,
            measured: Measured::nothing(setup),
            first: None,
            trainer,
        })
    }

    fn drive(
        mut self,
        began: Duration,
        gate: &mut dyn Gate,
        observer: &mut dyn Observer,
        clock: &dyn Clock,
    ) -> Result<Outcome, RunError> {
        self.measured.preparations.add((clock.monotonic() - began).as_secs_f64());
        loop {
            if self.state.micro_step == 0 {
                let mut improved = false;
                if self.evaluation_due() {
                    match self.evaluate(gate, observer, clock)? {
                        Ok(better) => improved = better,
                        Err(reason) => return self.stop(reason, observer, clock),
                    }
                }
                let every = self.spec.train.checkpoint_every;
                let due = every > 0 && self.state.step > 0 && self.state.step.is_multiple_of(every);
                let finished = self.finished();
                if due || improved || finished {
                    self.commit(None, observer, clock)?;
                }
                if finished {
                    self.tell_measured(observer);
                    observer.observe(Event::Saving);
                    return self.finish();
                }
            }
            if let Err(reason) = self.step(gate, observer, clock)? {
                return self.stop(reason, observer, clock);
            }
        }
    }

    fn stopped_early(&self) -> bool {
        let patience = self.spec.train.early_stopping_patience;
        patience > 0 && self.state.evals_without_improvement >= patience
    }

    fn finished(&self) -> bool {
        self.state.step >= self.total_steps || self.stopped_early()
    }

    fn evaluation_due(&self) -> bool {
        let every = self.spec.train.evaluate_every;
        let step = self.state.step;
        let due = step == 0 || step >= self.total_steps || (every > 0 && step.is_multiple_of(every));
        self.eval.is_some() && due && self.evaluated != Some(step)
    }

    /// Waits until the gate lets the next piece of work through. Checkpoints that are wanted are written meanwhile;
    /// evaluations compute, so they are noted in [`Self::wanted`] for when the gate is open.
    fn wait(
        &mut self,
        gate: &mut dyn Gate,
        observer: &mut dyn Observer,
        clock: &dyn Clock,
    ) -> Result<Result<(), Reason>, RunError> {
        loop {
            match gate.request() {
                Some(Request::Checkpoint(request)) => match self.commit(Some(request), observer, clock) {
                    Ok(_) => {}
                    // The store holds what it held before: no reason to end a run that may yet get its space.
                    Err(RunError::Checkpoint(error)) => {
                        observer.observe(Event::Refused { request, why: error.to_string() });
                    }
                    Err(error) => return Err(error),
                },
                Some(Request::Evaluate(request)) => self.wanted.push(request),
                None => match gate.pace() {
                    Pace::Run => return Ok(Ok(())),
                    Pace::Wait(duration) => clock.sleep(duration),
                    Pace::Stop(reason) => return Ok(Err(reason)),
                },
            }
        }
    }

    /// [`Self::wait`], and the evaluations that are wanted. They leave no trace in the run.
    fn wait_and_serve(
        &mut self,
        gate: &mut dyn Gate,
        observer: &mut dyn Observer,
        clock: &dyn Clock,
    ) -> Result<Result<(), Reason>, RunError> {
        loop {
            if let Err(reason) = self.wait(gate, observer, clock)? {
                return Ok(Err(reason));
            }
            if self.wanted.is_empty() {
                return Ok(Ok(()));
            }
            if self.eval.is_none() {
                for request in self.wanted.drain(..) {
                    let why = "the run has no held-out rows: its spec needs data.eval or data.eval_fraction";
                    observer.observe(Event::Refused { request, why: why.into() });
                }
                continue;
            }
            match self.held_out_loss(gate, observer, clock)? {
                Ok(record) => self.answer(record, observer),
                Err(reason) => return Ok(Err(reason)),
            }
        }
    }

    /// Answers the evaluations that are wanted: the adapter is that of `record`.
    fn answer(&mut self, record: EvaluationRecord, observer: &mut dyn Observer) {
        for request in self.wanted.drain(..) {
            observer.observe(Event::Evaluated { record, request: Some(request) });
        }
    }

    /// Held-out loss of the adapter as it is; changes nothing.
    fn held_out_loss(
        &mut self,
        gate: &mut dyn Gate,
        observer: &mut dyn Observer,
        clock: &dyn Clock,
    ) -> Result<Result<EvaluationRecord, Reason>, RunError> {
        let (mut loss_sum, mut labelled) = (0.0, 0);
        let n = self.spec.train.micro_batch_size;
        let sequences = self.eval.as_ref().map_or(0, |(_, plan)| plan.len());
        for first in (0..sequences).step_by(n) {
            if let Err(reason) = self.wait(gate, observer, clock)? {
                return Ok(Err(reason));
            }
            let Some((rows, plan)) = &self.eval else { break };
            observer.observe(Event::Evaluating(first, plan.len()));
            let started = clock.monotonic();
            let batch: Vec<_> =
                (first..plan.len().min(first + n)).map(|i| (plan.sequence(rows, i), 0)).collect();
            let found = self.trainer.evaluate(&batch, loss_sum);
            let seconds = (clock.monotonic() - started).as_secs_f64();
            let load = workload::of_sequences(batch.iter().map(|(sequence, _)| sequence));
            match self.first {
                None => self.first = Some((self.work.evaluate(load), seconds)),
                Some(_) => self.measured.eval.add(self.work.evaluate(load), seconds),
            }
            loss_sum = found.loss_sum;
            if !loss_sum.is_finite() {
                let spec = &self.spec.data;
                let files = spec.eval.as_ref().map_or(&spec.train[..], std::slice::from_ref);
                let of = first..plan.len().min(first + n);
                let rows = origins(plan, rows, files, of);
                return Err(self.diverged("the held-out loss", loss_sum, self.state.step, rows));
            }
            labelled += found.labelled;
        }
        Ok(Ok(EvaluationRecord { step: self.state.step, eval_loss: loss_sum / labelled.max(1) as f64 }))
    }

    /// Held-out loss as part of the run; whether it is the best so far.
    fn evaluate(
        &mut self,
        gate: &mut dyn Gate,
        observer: &mut dyn Observer,
        clock: &dyn Clock,
    ) -> Result<Result<bool, Reason>, RunError> {
        let record = match self.held_out_loss(gate, observer, clock)? {
            Ok(record) => record,
            Err(reason) => return Ok(Err(reason)),
        };
        let state = &mut self.state;
        if state.step == 0 {
            state.baseline_loss = Some(record.eval_loss);
        }
        state.last_eval_loss = Some(record.eval_loss);
        let improved = state.best_eval_loss.is_none_or(|best| record.eval_loss < best);
        if improved {
            state.best_eval_loss = Some(record.eval_loss);
            state.best_step = Some(state.step);
            state.evals_without_improvement = 0;
        } else {
            state.evals_without_improvement += 1;
        }
        let epoch = self.epoch_fraction();
        self.state.log_history.push(serde_json::json!({
            "epoch": epoch, "eval_loss": record.eval_loss, "step": record.step
        }));
        self.metrics.append(&serde_json::json!({ "step": record.step, "eval_loss": record.eval_loss }))?;
        self.evaluated = Some(self.state.step);
        observer.observe(Event::Evaluated { record, request: None });
        self.answer(record, observer);
        Ok(Ok(improved))
    }

    /// Epochs passed, with a fraction.
    fn epoch_fraction(&self) -> f64 {
        self.state.epoch as f64 + self.state.sequence_index as f64 / self.plan.len().max(1) as f64
    }

    /// One optimizer step, from wherever the state is within it.
    fn step(
        &mut self,
        gate: &mut dyn Gate,
        observer: &mut dyn Observer,
        clock: &dyn Clock,
    ) -> Result<Result<(), Reason>, RunError> {
        if self.state.sequence_index as usize >= self.plan.len() {
            self.state.epoch += 1;
            self.state.sequence_index = 0;
            self.plan = epoch_plan(self.spec, &self.train, self.state.epoch);
        }
        let first = self.state.sequence_index as usize - self.state.micro_step as usize;
        let last = (first + prepare::sequences_per_step(self.spec)).min(self.plan.len());
        while (self.state.sequence_index as usize) < last {
            if let Err(reason) = self.wait_and_serve(gate, observer, clock)? {
                return Ok(Err(reason));
            }
            let from = self.state.sequence_index as usize;
            let to = (from + self.spec.train.micro_batch_size).min(last);
            let started = clock.monotonic();
            let batch: Vec<(Sequence, u64)> = (from..to)
                .map(|i| {
                    (self.plan.sequence(&self.train, i), dropout_key(self.spec.run.seed, self.state.epoch, i))
                })
                .collect();
            let found = self.trainer.micro_step(&batch, self.state.loss_sum);
            let seconds = (clock.monotonic() - started).as_secs_f64();
            let gflop = self.work.train(workload::of_sequences(batch.iter().map(|(sequence, _)| sequence)));
            if self.first.is_none() {
                self.first = Some((gflop, seconds));
            } else {
                self.measured.train.add(gflop, seconds);
                self.measured.tokens += found.tokens;
            }
            if !found.loss_sum.is_finite() {
                return Err(self.diverged_in_step("the loss", found.loss_sum, from..to));
            }
            let state = &mut self.state;
            state.loss_sum = found.loss_sum;
            state.labelled += found.labelled;
            state.tokens_in_step += found.tokens;
            state.total_tokens += found.tokens;
            state.total_seconds += seconds;
            state.sequence_index = to as u64;
            state.micro_step = (to - first) as u64;
            self.step_seconds += seconds;
            self.step_tokens += found.tokens;
            observer.observe(Event::MicroStep {
                step: state.step,
                done: to - first,
                of: last - first,
                tokens: found.tokens as usize,
            });
        }
        let started = clock.monotonic();
        let labelled = self.state.labelled.max(1);
        let norm = self.trainer.gradient_norm(labelled);
        if !norm.is_finite() {
            return Err(self.diverged_in_step("the gradient norm", norm, first..last));
        }
        let update = self.trainer.update(&self.spec.train, &self.schedule, self.state.step, labelled, norm);
        let norm = self.trainer.adapter_norm();
        if !norm.is_finite() {
            return Err(self.diverged_in_step("the adapter's norm", norm, first..last));
        }
        let seconds = (clock.monotonic() - started).as_secs_f64();
        self.measured.updates.add(seconds);
        self.state.total_seconds += seconds;
        self.step_seconds += seconds;
        let tokens = self.state.tokens_in_step;
        self.state.step += 1;
        self.state.micro_step = 0;
        let record = StepRecord {
            step: self.state.step,
            epoch: self.epoch_fraction(),
            loss: self.state.loss_sum / labelled as f64,
            grad_norm: update.grad_norm,
            learning_rate: update.learning_rate,
            tokens,
            tokens_per_second: self.step_tokens as f64 / self.step_seconds.max(1e-9),
        };
        self.state.loss_sum = 0.0;
        self.state.labelled = 0;
        self.state.tokens_in_step = 0;
        self.step_seconds = 0.0;
        self.step_tokens = 0;
        self.last_loss = Some(record.loss);
        self.state.log_history.push(serde_json::json!({
            "epoch": record.epoch,
            "grad_norm": record.grad_norm,
            "learning_rate": record.learning_rate,
            "loss": record.loss,
            "step": record.step,
        }));
        if let Ok(line) = serde_json::to_value(&record) {
            self.metrics.append(&line)?;
        }
        observer.observe(Event::Step(record));
        Ok(Ok(()))
    }

    fn diverged_in_step(&self, what: &'static str, value: f64, sequences: Range<usize>) -> RunError {
        let rows = origins(&self.plan, &self.train, &self.spec.data.train, sequences);
        self.diverged(what, value, self.state.step + 1, rows)
    }

    fn diverged(&self, what: &'static str, value: f64, step: u64, rows: String) -> RunError {
        RunError::Diverged {
            what,
            value,
            step,
            epoch: self.state.epoch,
            rows,
            last: match &self.last_checkpoint {
                Some(path) => format!("the last good checkpoint is {}", path.display()),
                None => "there is no checkpoint yet".into(),
            },
        }
    }

    fn stop(
        mut self,
        reason: Reason,
        observer: &mut dyn Observer,
        clock: &dyn Clock,
    ) -> Result<Outcome, RunError> {
        let checkpoint = self.commit(None, observer, clock)?;
        self.tell_measured(observer);
        observer.observe(Event::Stopped(reason));
        Ok(Outcome::Stopped { reason, checkpoint })
    }

    /// Makes the state durable, and the records that go with it.
    fn commit(
        &mut self,
        request: Option<u64>,
        observer: &mut dyn Observer,
        clock: &dyn Clock,
    ) -> Result<PathBuf, RunError> {
        let began = clock.monotonic();
        observer.observe(Event::Saving);
        self.metrics.sync()?;
        let path = save(&self.store, &self.state, &self.trainer)?;
        self.last_checkpoint = Some(path.clone());
        checkpoint::atomic_write(&self.output.join("trainer_state.json"), self.trainer_state().as_bytes())?;
        self.store.prune(self.spec.train.keep_checkpoints.max(1), self.state.best_step)?;
        observer.observe(Event::Committed {
            path: path.clone(),
            step: self.state.step,
            within: self.state.micro_step,
            request,
        });
        self.measured.saves.add((clock.monotonic() - began).as_secs_f64());
        if self.measured.train.seconds >= TELL_EVERY {
            self.tell_measured(observer);
        }
        Ok(path)
    }

    /// Tells what was computed since the last time.
    fn tell_measured(&mut self, observer: &mut dyn Observer) {
        if self.measured.preparations.times > 0
            && let (Some((gflop, seconds)), Some(line)) = (self.first, self.measured.train.line())
        {
            let usual = line.seconds(&Amount { batches: 1, gflop, gigabytes: 0.0 });
            self.measured.preparations.seconds += (seconds - usual).max(0.0);
        }
        if let Some(measured) = self.measured.take() {
            observer.observe(Event::Measured(Box::new(measured)));
        }
    }

    fn trainer_state(&self) -> String {
        let s = &self.state;
        TrainerState {
            best_global_step: s.best_step,
            best_metric: s.best_eval_loss,
            best_model_checkpoint: s
                .best_step
                .map(|step| self.output.join("checkpoints").join(format!("{step:08}")).display().to_string()),
            epoch: self.epoch_fraction(),
            eval_steps: self.spec.train.evaluate_every,
            global_step: s.step,
            log_history: s.log_history.clone(),
            max_steps: self.total_steps,
            num_input_tokens_seen: s.total_tokens,
            num_train_epochs: self.epochs.ceil() as u64,
            save_steps: self.spec.train.checkpoint_every,
            train_batch_size: Some(self.spec.train.micro_batch_size as u64),
            ..TrainerState::default()
        }
        .to_json()
    }

    fn finish(self) -> Result<Outcome, RunError> {
        let s = &self.state;
        let layout = &self.trainer.layout;
        // The best adapter where there is held-out data to tell, else the last.
        let best = match s.best_step.filter(|&step| step != s.step) {
            None => None,
            Some(step) => match self.store.at_step(step) {
                Ok(best) => Some((step, best)),
                // Better the last adapter than none at all.
                Err(error @ (CheckpointError::Damaged { .. } | CheckpointError::File(_))) => {
                    tracing::warn!("{error}: adapter/ is that of the last step, not of the best");
                    None
                }
                Err(error) => return Err(error.into()),
            },
        };
        let (adapter_step, values) = match best {
            None => {
                let backend = &self.trainer.decoder.backend;
                let values = (0..layout.tensors()).map(|i| self.trainer.adapter.read(backend, layout, i));
                (s.step, values.collect::<Vec<_>>())
            }
            Some((step, best)) => {
                let checkpoint = self.output.join("checkpoints").join(format!("{step:08}"));
                let values = prepare::in_layout_order(layout, &best.parameters)
                    .map_err(|why| RunError::Misfit { checkpoint, why })?;
                (step, values)
            }
        };
        let names: Vec<String> = (0..layout.tensors()).map(|i| layout.name(i)).collect();
        let shapes: Vec<[usize; 2]> = (0..layout.tensors()).map(|i| layout.shape(i)).collect();
        let tensors = borrow(&names, &shapes, &values);
        let adapter = self.output.join("adapter");
        let summary = Summary {
            name: self.spec.run.name.clone(),
            steps: s.step,
            epochs: self.epoch_fraction(),
            baseline_eval_loss: s.baseline_loss,
            best_eval_loss: s.best_eval_loss,
            best_step: s.best_step,
            last_eval_loss: s.last_eval_loss,
            last_loss: self.last_loss,
            adapter_step,
            stopped_early: self.stopped_early() && s.step < self.total_steps,
            tokens: s.total_tokens,
            seconds: s.total_seconds,
            tokens_per_second: s.total_tokens as f64 / s.total_seconds.max(1e-9),
            peak_memory_bytes: prepare::peak_memory().map(|b| b.0),
            planned_memory_bytes: self.planned.0,
            trainable_parameters: layout.parameters(),
            total_parameters: self.total_parameters,
        };
        let loss = |value: Option<f64>| value.map_or("none".into(), |l| format!("{l:.4}"));
        let facts = [
            ("Steps", s.step.to_string()),
            ("Tokens", s.total_tokens.to_string()),
            ("Held-out loss before", loss(s.baseline_loss)),
            ("Held-out loss after", loss(s.best_eval_loss.or(s.last_eval_loss))),
        ];
        checkpoint::peft::write_adapter_with_card(
            &adapter,
            &prepare::adapter_config(self.spec),
            &tensors,
            &facts,
        )?;
        let mut json = serde_json::to_vec_pretty(&summary).unwrap_or_default();
        json.push(b'\n');
        checkpoint::atomic_write(&self.output.join("summary.json"), &json)?;
        Ok(Outcome::Finished { summary: Box::new(summary), adapter })
    }
}

/// Writes a checkpoint of everything that a step changes.
pub(super) fn save<B: Backend>(
    store: &Store,
    state: &TrainingState,
    trainer: &Trainer<B>,
) -> Result<PathBuf, CheckpointError> {
    let (layout, backend) = (&trainer.layout, &trainer.decoder.backend);
    let names: Vec<String> = (0..layout.tensors()).map(|i| layout.name(i)).collect();
    let shapes: Vec<[usize; 2]> = (0..layout.tensors()).map(|i| layout.shape(i)).collect();
    let read = |adapter: &Adapter<B>| -> Vec<Vec<f32>> {
        (0..layout.tensors()).map(|i| adapter.read(backend, layout, i)).collect()
    };
    let (parameters, m, v) = (read(&trainer.adapter), read(&trainer.m), read(&trainer.v));
    let gradients = if state.micro_step == 0 { Vec::new() } else { read(&trainer.gradients) };
    store.commit(&CheckpointRef {
        state,
        parameters: borrow(&names, &shapes, &parameters),
        adam_m: borrow(&names, &shapes, &m),
        adam_v: borrow(&names, &shapes, &v),
        gradients: borrow(&names, &shapes, &gradients),
    })
}

/// Tensors in the order of a layout as the checkpoint takes them.
fn borrow<'t>(names: &'t [String], shapes: &'t [[usize; 2]], values: &'t [Vec<f32>]) -> Vec<TensorRef<'t>> {
    let named = names.iter().zip(shapes).zip(values);
    named.map(|((name, shape), data)| TensorRef { name, shape, data }).collect()
}

fn set<B: Backend>(backend: &B, adapter: &mut Adapter<B>, values: &[Vec<f32>]) {
    for (tensor, values) in adapter.tensors.iter_mut().zip(values) {
        backend.write(tensor, values);
    }
}

/// The rows of some sequences as file:line, the first few of them.
fn origins(plan: &EpochPlan, rows: &TokenRows, files: &[PathBuf], sequences: Range<usize>) -> String {
    let mut origins: Vec<String> = sequences
        .flat_map(|i| plan.rows(i))
        .map(|&row| {
            let (file, line) = rows.origin(row as usize);
            format!("{}:{line}", files.get(file).map(|p| p.display().to_string()).unwrap_or_default())
        })
        .collect();
    let more = origins.len().saturating_sub(8);
    origins.truncate(8);
    if more > 0 {
        origins.push(format!("and {more} more"));
    }
    origins.join(", ")
}

fn epoch_plan(spec: &Spec, rows: &TokenRows, epoch: u64) -> EpochPlan {
    let data = &spec.data;
    EpochPlan::new(rows, data.sequence_length, data.packing, data.shuffle, spec.run.seed, epoch)
}

/// Dropout key of a sequence: a function of the run and of the sequence's place in it, not of the batch.
pub(super) fn dropout_key(seed: u64, epoch: u64, index: usize) -> u64 {
    // splitmix64's finaliser (Steele et al., OOPSLA 2014) over the three numbers.
    let mut z =
        seed ^ epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (index as u64).wrapping_mul(0xd1b5_4a32_d192_ed03);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Step of the latest evaluation that a state knows.
fn last_evaluation(state: &TrainingState) -> Option<u64> {
    let of = |entry: &serde_json::Value| entry.get("eval_loss").and(entry.get("step")?.as_u64());
    state.log_history.iter().rev().find_map(of)
}

pub(super) fn fresh_state(identity: Identity) -> TrainingState {
    TrainingState {
        step: 0,
        micro_step: 0,
        epoch: 0,
        sequence_index: 0,
        loss_sum: 0.0,
        labelled: 0,
        tokens_in_step: 0,
        total_tokens: 0,
        total_seconds: 0.0,
        best_eval_loss: None,
        best_step: None,
        evals_without_improvement: 0,
        baseline_loss: None,
        last_eval_loss: None,
        log_history: Vec::new(),
        identity,
    }
}
