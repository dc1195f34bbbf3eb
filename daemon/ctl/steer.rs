//! `finetunectl pause`, `resume`, `cancel`, `remove`, `priority`, `deadline`, `checkpoint` and `evaluate`.

use super::connect::Client;
use super::context::Context;
use super::exit::{Code, Exit, Failure};
use super::figures::Figures;
use super::text;
use crate::bus::Dictionary;
use clap::Args;
use serde_json::{Value, json};
use zbus::OwnedObjectPath;

/// What is asked of several runs at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Save and stop.
    Pause,
    /// Go on.
    Resume,
    /// End.
    Cancel,
    /// Delete.
    Remove,
}

impl Order {
    /// The method of a run that does it.
    pub fn method(self) -> &'static str {
        match self {
            Order::Pause => "Pause",
            Order::Resume => "Resume",
            Order::Cancel => "Cancel",
            Order::Remove => "Remove",
        }
    }

    /// In a word.
    pub fn word(self) -> &'static str {
        match self {
            Order::Pause => "pause",
            Order::Resume => "resume",
            Order::Cancel => "cancel",
            Order::Remove => "remove",
        }
    }
}

/// Several runs.
#[derive(Args, Debug)]
pub struct RunsArguments {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<String>,
}

/// One run.
#[derive(Args, Debug)]
pub struct RunArguments {
    /// Name, id, or the beginning of an id
    run: String,
}

/// Arguments of `finetunectl remove`.
#[derive(Args, Debug)]
pub struct RemoveArguments {
    /// Names, ids, or beginnings of ids
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<String>,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

/// Arguments of `finetunectl priority`.
#[derive(Args, Debug)]
pub struct PriorityArguments {
    /// Name, id, or the beginning of an id
    run: String,
    /// Higher goes first; 0 is usual
    #[arg(value_name = "N", allow_negative_numbers = true)]
    priority: i32,
}

/// Arguments of `finetunectl deadline`.
#[derive(Args, Debug)]
pub struct DeadlineArguments {
    /// Name, id, or the beginning of an id
    run: String,
    /// When: '2026-11-27 06:00', 06:00 (the next one), +8h, or none
    #[arg(value_name = "WHEN")]
    deadline: String,
}

/// Asks the same of every run. One that refuses does not keep the others from it; the exit code is that of the first
/// that did, where being so already counts last.
pub async fn command(order: Order, runs: &[String], context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let mut objects = Vec::new();
    let mut exit = Exit::Done;
    for wanted in runs {
        match give(order, wanted, &client).await {
            Ok(figures) => {
                if order == Order::Remove {
                    objects.push(
                        json!({ "id": figures.id, "name": figures.name, "removed": true, "error": null }),
                    );
                } else {
                    objects.push(with_error(figures.json(), Value::Null));
                }
                if !context.json {
                    let now =
                        if order == Order::Remove { "removed".into() } else { figures.state_and_reason() };
                    context.console.line(&format!("{}: {}", figures.title(), text::printable(&now)))?;
                }
            }
            Err(mut failure) => {
                // A wire that is cut is cut for the others, too.
                if failure.exit == Exit::Unreachable {
                    return Err(failure);
                }
                if exit == Exit::Done || exit == Exit::NothingToDo {
                    exit = failure.exit;
                }
                let error = json!({
                    "name": failure.name,
                    "message": failure.summary(),
                    "exit_code": failure.exit as u8,
                });
                objects.push(with_error(json!({ "run": wanted }), error));
                failure.errors = vec![format!("cannot {} {wanted}: {}", order.word(), failure.summary())];
                context.console.failure(&failure);
            }
        }
    }
    if context.json {
        context.console.json(json!({ "runs": objects }))?;
    }
    Ok(exit.into())
}

fn with_error(mut object: Value, error: Value) -> Value {
    object["error"] = error;
    object
}

/// Asks it of one run: the run afterwards, or for one that is gone, before.
async fn give(order: Order, wanted: &str, client: &Client) -> Result<Figures, Failure> {
    let run = client.find(wanted).await?;
    let before = match order {
        Order::Remove => Some(Figures::new(&client.properties(run.inner()).await?)),
        _ => None,
    };
    client.call::<()>(run.inner(), order.method(), &Dictionary::new(), None).await?;
    match before {
        Some(figures) => Ok(figures),
        None => Ok(Figures::new(&client.properties(run.inner()).await?)),
    }
}

/// Runs `remove`: asks first, where there is somebody to ask.
pub async fn remove(arguments: &RemoveArguments, context: &Context) -> Result<Code, Failure> {
    let question = format!("delete {} with all files?", text::printable(&arguments.runs.join(", ")));
    if !arguments.yes && context.console.ask(&question) == Some(false) {
        return Err(Failure::new(Exit::NothingToDo, "nothing was removed"));
    }
    command(Order::Remove, &arguments.runs, context).await
}

/// Runs `priority`.
pub async fn priority(arguments: &PriorityArguments, context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let run = client.find(&arguments.run).await?;
    let path = OwnedObjectPath::from(run.inner().path().to_owned());
    client.call::<()>(client.manager.inner(), "SetPriority", &(path, arguments.priority), None).await?;
    let figures = Figures::new(&client.properties(run.inner()).await?);
    if context.json {
        context.console.json(json!({ "run": figures.json() }))?;
    } else {
        context.console.line(&format!("{}: priority {}", figures.title(), figures.priority))?;
    }
    Ok(Exit::Done.into())
}

/// Runs `deadline`.
pub async fn deadline(arguments: &DeadlineArguments, context: &Context) -> Result<Code, Failure> {
    let deadline = moment(&arguments.deadline, context)?;
    let client = context.client().await?;
    let run = client.find(&arguments.run).await?;
    client.call::<()>(run.inner(), "SetDeadline", &(deadline,), None).await?;
    let figures = Figures::new(&client.properties(run.inner()).await?);
    if context.json {
        context.console.json(json!({ "run": figures.json() }))?;
    } else {
        let shown = figures.deadline(context.now_us(), &context.zone);
        let shown = if shown.is_empty() { "no deadline".into() } else { format!("deadline {shown}") };
        context.console.line(&format!("{}: {shown}", figures.title()))?;
    }
    Ok(Exit::Done.into())
}

/// The moment that a person means, as the bus has it; 0 for `none`.
pub fn moment(text: &str, context: &Context) -> Result<u64, Failure> {
    match text.trim() {
        "none" => Ok(0),
        text => context.moment(text).map_err(|problem| Failure::new(Exit::Usage, problem)),
    }
}

/// Runs `checkpoint`.
pub async fn checkpoint(arguments: &RunArguments, context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let run = client.find(&arguments.run).await?;
    let figures = Figures::new(&client.properties(run.inner()).await?);
    let patience = Some(context.patience());
    let step: u64 = client.call(run.inner(), "Checkpoint", &Dictionary::new(), patience).await?;
    if context.json {
        context.console.json(json!({ "id": figures.id, "step": step }))?;
    } else {
        context.console.line(&format!("{}: checkpoint at step {step}", figures.title()))?;
    }
    Ok(Exit::Done.into())
}

/// Runs `evaluate`.
pub async fn evaluate(arguments: &RunArguments, context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let run = client.find(&arguments.run).await?;
    let figures = Figures::new(&client.properties(run.inner()).await?);
    let patience = Some(context.patience());
    let loss: f64 = client.call(run.inner(), "Evaluate", &Dictionary::new(), patience).await?;
    if context.json {
        let loss = loss.is_finite().then_some(loss);
        context.console.json(json!({ "id": figures.id, "eval_loss": loss }))?;
    } else {
        context.console.line(&format!("{}: eval_loss {loss:.4}", figures.title()))?;
    }
    Ok(Exit::Done.into())
}
