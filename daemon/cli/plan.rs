//! `finetuned plan`: what a run would take, without training and without an output directory.
//!
//! Data and base are read as the run reads them (so they are in the cache afterwards); everything else is arithmetic on
//! shapes, on what earlier runs took, and on the hours and quotas of the daemon's configuration.

use super::arguments::{self, SpecArguments, ThreadArguments};
use super::console;
use super::exit::{Exit, Failure};
use super::progress::Progress;
use super::speed;
use crate::backend::Backend;
use crate::clock::{Clock, SystemClock, moment};
use crate::config::daemon::DaemonConfig;
use crate::config::spec::Spec;
use crate::config::{ConfigError, Mode};
use crate::plan::Speed;
use crate::plan::page::Page;
use crate::plan::roofline::Device;
use crate::plan::throughput::Origin;
use crate::scheduler::forecast::{self, Known, Outlook};
use crate::train::{device, prepare, probe, survey};
use crate::units::Joules;
use clap::Args;
use jiff::ZonedDateTime;
use std::path::Path;
use std::path::PathBuf;

/// Arguments of `finetuned plan`.
#[derive(Args, Debug)]
pub struct PlanArguments {
    #[command(flatten)]
    spec: SpecArguments,
    /// Compute some micro-batches to learn how fast they are (about ten seconds, and the memory of the run)
    #[arg(long)]
    probe: bool,
    /// Refuse a run that would not be complete by then: 06:00 (the next), "2026-11-28 06:00", +8h
    #[arg(long, value_name = "WHEN")]
    before: Option<String>,
    /// Predict the time on this board instead of this machine: agx-orin-64gb, agx-orin-64gb:MODE_50W
    #[arg(long, value_name = "BOARD[:MODE]", conflicts_with = "probe", value_parser = Device::parse)]
    on: Option<Device>,
    /// Hours and quotas of this configuration of the daemon [default: that of this machine]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    threads: ThreadArguments,
}

/// Runs the command.
pub fn command(arguments: &PlanArguments) -> Result<Exit, Failure> {
    arguments.threads.apply()?;
    let now = ZonedDateTime::now();
    let before = arguments.before.as_deref().map(|text| moment::parse(text, &now)).transpose();
    let before = before.map_err(|why| Failure::new(anyhow::anyhow!("--before: {why}")).exit(Exit::Usage))?;
    let mut outlook = arguments.outlook()?;
    outlook.machine = speed::machine();

    let spec = arguments.spec.load()?;
    let cache = arguments::cache_dir()?;
    let mut note = |text: String| console::message(&text);
    let chosen = device::choose(spec.train.backend, spec.model.compute_dtype, &cache, &mut note)?;
    device::with_backend!(chosen, backend => {
        plan(backend, &spec, arguments, outlook, &cache, before, &now)
    })
}

fn plan<B: Backend>(
    backend: B,
    spec: &Spec,
    arguments: &PlanArguments,
    outlook: Outlook,
    cache: &Path,
    before: Option<jiff::Timestamp>,
    now: &ZonedDateTime,
) -> Result<Exit, Failure> {
    let clock = SystemClock::new();
    let mut progress = Progress::of_preparation(&clock);
    let began = clock.monotonic();
    let prepared = prepare::prepare(spec, cache, None, &mut progress)?;
    let prepared_in = (clock.monotonic() - began).as_secs_f64();
    drop(progress);
    // Another board's memory is not known here.
    let available = prepare::available_memory(&backend).filter(|_| arguments.on.is_none());
    // Nor how long it prepares.
    let prepared_in = if arguments.on.is_none() { prepared_in } else { 0.0 };
    let survey = survey::survey(spec, &backend, &prepared, available, prepared_in);
    let mut records = speed::known()?;
    let fits = survey.facts.memory.fits != Some(false);
    if arguments.probe && fits {
        console::message(
            "probing: about ten seconds of computing, of which only the speed is kept (Ctrl-C ends it)",
        );
        let mut on = || false;
        let measured = probe::probe(spec, backend, prepared, &cache.join("probe"), &mut on, &clock);
        let measured = measured.map_err(Failure::new)?;
        let record = speed::record(measured, Origin::Probe, outlook.machine.clone());
        speed::remember(&record);
        // The page is about the machine as it is now, whatever it was in other nights.
        records = vec![record];
    }
    let speed = Speed::of(&records, &survey.setup, &outlook.machine, None);
    let known = Known {
        speed: speed.filter(|_| arguments.on.is_none()),
        probed: arguments.probe && fits,
        device: arguments.on.clone().or_else(|| speed::device(&survey.setup, &outlook.machine)),
    };
    let mut page = forecast::page(survey, &known, &outlook, before, now);
    if let Some(device) = &arguments.on {
        page.notes.push(format!(
            "steps and data are those of this machine, time is that of {}; memory is what the run would take here",
            device.name
        ));
    }
    console::result(&if arguments.json { json(&page)? } else { page.text() })?;
    verdict(&page)
}

fn json(page: &Page) -> Result<String, Failure> {
    let text = serde_json::to_string(page).map_err(Failure::new)?;
    Ok(text + "\n")
}

impl PlanArguments {
    /// What the daemon of this machine is bound to. It is for the daemon's runs, so a configuration that was not asked
    /// for and cannot be read is worth a warning.
    fn outlook(&self) -> Result<Outlook, Failure> {
        let environment = |name: &str| std::env::var_os(name);
        let config = DaemonConfig::load(self.config.as_deref(), Mode::System, &environment);
        let config = match (config, &self.config) {
            (Ok(config), _) => config,
            (Err(error @ ConfigError::Invalid(_)), Some(_)) => {
                return Err(Failure::new(error).exit(Exit::Usage));
            }
            (Err(error), Some(_)) => return Err(Failure::new(error)),
            (Err(error), None) => {
                console::message(&format!("warning: the daemon's hours and quotas are left out: {error}"));
                return Ok(Outlook::default());
            }
        };
        Ok(Outlook { window: config.window, budget: config.budget, spent: Joules(0.0), ..Outlook::default() })
    }
}

/// The exit code, with a warning where memory is tight.
fn verdict(page: &Page) -> Result<Exit, Failure> {
    let memory = &page.facts.memory;
    let mut refusals = page.refusals.iter();
    if let Some(first) = refusals.next() {
        let mut failure = Failure::new(anyhow::anyhow!("{}", first.message)).exit(Exit::Limits);
        failure.help.extend(first.changes.iter().cloned());
        for further in refusals {
            failure.help.push(format!("besides, {}: {}", further.message, further.changes.join(", or ")));
        }
        return Err(failure);
    }
    if let Some(available) = memory.available
        // Whatever else runs takes memory too, and the kernel's figure is an estimate.
        && memory.total.0 > available.0 / 10 * 9
    {
        console::message(&format!(
            "warning: the run would take {} of {available}; anything else that starts may end it",
            memory.total
        ));
    }
    Ok(Exit::Done)
}
