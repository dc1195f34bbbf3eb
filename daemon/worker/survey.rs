//! A survey instead of a run: what training would take, for the daemon's plans.
//!
//! ```text
//!   prepare ─► survey ─► probe, where asked for: before every micro-batch the permit is asked ─► surveyed
//!      nothing of it is kept but the caches, so a stop ends the process at once
//! ```

use super::failure;
use super::link::{Link, PermitGate, Teller};
use super::protocol::{Failed, Finished, Start, SurveyOrder};
use crate::backend::Backend;
use crate::config::spec::Spec;
use crate::plan::Measured;
use crate::train::gate::{Gate, Pace};
use crate::train::observer::{Event, Observer};
use crate::train::run::RunError;
use crate::train::{device, prepare, probe, survey};

/// Prepares and surveys.
pub fn survey(spec: &Spec, start: &Start, order: SurveyOrder, link: &Link) -> Result<Finished, Failed> {
    let failed = |error| failure::of_run(&RunError::Prepare(error));
    let mut note = |text| Teller(link).observe(Event::Note(text));
    let chosen = device::choose(spec.train.backend, spec.model.compute_dtype, &start.cache, &mut note);
    device::with_backend!(chosen.map_err(failed)?, backend => survey_on(backend, spec, start, order, link))
}

fn survey_on<B: Backend>(
    backend: B,
    spec: &Spec,
    start: &Start,
    order: SurveyOrder,
    link: &Link,
) -> Result<Finished, Failed> {
    let failed = |error| failure::of_run(&RunError::Prepare(error));
    let began = link.clock().monotonic();
    let prepared = prepare::prepare(spec, &start.cache, None, &mut Teller(link)).map_err(failed)?;
    let prepared_in = (link.clock().monotonic() - began).as_secs_f64();
    let survey = survey::survey(spec, &backend, &prepared, prepare::available_memory(&backend), prepared_in);
    let mut unmeasured = None;
    let mut measured = None;
    if order.probe && survey.facts.memory.fits != Some(false) {
        let mut gate = PermitGate::new(link);
        let mut batches = 0;
        let mut stop = || {
            batches += 1;
            // The beats tell how far it is.
            Teller(link).observe(Event::MicroStep { step: 0, done: batches, of: 0, tokens: 0 });
            is_stopped(&mut gate, link)
        };
        let scratch = start.cache.join("probe");
        match probe::probe(spec, backend, prepared, &scratch, &mut stop, link.clock()) {
            Ok(found) => measured = Some(Box::<Measured>::new(found)),
            Err(error) => unmeasured = Some(failure::with_causes(&error)),
        }
    }
    Ok(Finished::Surveyed { survey: Box::new(survey), measured, unmeasured })
}

/// Waits for leave to compute; whether there will be none.
fn is_stopped(gate: &mut PermitGate<'_>, link: &Link) -> bool {
    loop {
        match gate.pace() {
            Pace::Run => return false,
            Pace::Wait(duration) => link.clock().sleep(duration),
            Pace::Stop(_) => return true,
        }
    }
}
