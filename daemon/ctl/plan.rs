//! `finetunectl plan`: what a run would take on the daemon's machine, inside its hours and quotas.

use super::connect::options;
use super::context::Context;
use super::exit::{Code, Exit, Failure};
use super::submit::Parcel;
use super::text;
use crate::plan::page::{Page, Refusal};
use clap::Args;
use std::path::PathBuf;
use zbus::Variant;

/// Arguments of `finetunectl plan`.
#[derive(Args, Debug)]
pub struct PlanArguments {
    /// The run's spec, a TOML file (docs/spec.md)
    #[arg(value_name = "SPEC")]
    pub spec: PathBuf,
    /// Override a key of the spec, such as train.max_steps=10; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Have some micro-batches computed to learn how fast they are (about ten seconds, while nothing trains)
    #[arg(long)]
    pub probe: bool,
    /// Refuse a run that would not be complete by then: 06:00 (the next), "2026-11-28 06:00", +8h
    #[arg(long, value_name = "WHEN")]
    pub before: Option<String>,
}

/// Runs the command.
pub async fn command(arguments: &PlanArguments, context: &Context) -> Result<Code, Failure> {
    let before = arguments
        .before
        .as_deref()
        .map(|text| context.moment(text).map_err(|why| Failure::new(Exit::Usage, format!("--before: {why}"))))
        .transpose()?;
    let parcel = Parcel::pack(&arguments.spec, &arguments.set)?;
    let client = context.client().await?;
    let mut options =
        options([("spec-name", parcel.name.as_str().into()), ("probe", arguments.probe.into())])?;
    if let Some(before) = before {
        options.insert("before".into(), Variant::from(before).try_into_owned().map_err(Failure::from)?);
    }
    let body = (parcel.text.as_str(), parcel.files, options);
    // The daemon reads the data before it answers, and the base.
    let json: String = client.call(client.manager.inner(), "Plan", &body, Some(context.patience())).await?;
    let page = match serde_json::from_str::<Page>(&json) {
        Ok(page) => page,
        Err(error) => {
            let failure = Failure::new(Exit::Error, "the daemon's plan is not understood").because(error);
            return Err(failure.help("finetunectl and the daemon are of two installations: update both"));
        }
    };
    if context.json {
        let value = serde_json::to_value(&page);
        context.console.json(value.map_err(|error| Failure::new(Exit::Error, error.to_string()))?)?;
    } else {
        for line in page.text().lines() {
            context.console.line(&text::printable(line))?;
        }
    }
    match refused(&page.refusals) {
        Some(failure) => Err(failure),
        None => Ok(Exit::Done.into()),
    }
}

/// The refusals as one failure: each is an error, and what would help.
fn refused(refusals: &[Refusal]) -> Option<Failure> {
    if refusals.is_empty() {
        return None;
    }
    let mut failure = Failure::silent(Exit::Limit);
    for refusal in refusals {
        failure.errors.push(refusal.message.clone());
        failure.help.extend(refusal.changes.iter().cloned());
    }
    Some(failure)
}
