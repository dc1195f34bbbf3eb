//! `finetunectl watch` and `finetunectl wait`: until the run is over.
//!
//! ```text
//!                 ┌──── PropertiesChanged, or a look every 5 s ────┐
//!                 ▼                                                │
//!   look ──► following ──────────────────────────────────────► show it
//!                 │  │  │
//!                 │  │  └─ the daemon is away ──► look again each second; after a minute ──► exit 7
//!                 │  └──── Ctrl-C, SIGTERM ──► detached: the run goes on, exit 130
//!                 └─────── the run is over ──► exit 0, 3 or 10
//! ```
//!
//! A daemon that restarts goes on with its runs, so its watchers stay.

use super::connect::Client;
use super::console::Shown;
use super::context::Context;
use super::exit::{Code, Exit, Failure};
use super::figures::{Figures, meaning, some, text_of};
use super::records::losses;
use super::{list, text};
use crate::bus::{self, Dictionary, NAME, RunProxy};
use crate::units::{duration, significant};
use clap::Args;
use indicatif::ProgressStyle;
use serde_json::json;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};
use zbus::export::ordered_stream::OrderedStreamExt;
use zbus::message::Type;
use zbus::{MatchRule, MessageStream};

/// How often a run that says nothing is looked at.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// How long a daemon may be away.
const AWAY: Duration = Duration::from_secs(60);

/// How often a daemon that is away is looked for.
const RETRY: Duration = Duration::from_secs(1);

/// How often figures are printed where nobody watches a bar.
const LINE: Duration = Duration::from_secs(10);

/// Losses in the sparkline.
const SPARKS: usize = 24;

/// Parts of a run that the bar tells apart.
const PARTS: f64 = 10_000.0;

/// Arguments of `finetunectl watch`.
#[derive(Args, Debug)]
pub struct WatchArguments {
    /// Name, id, or the beginning of an id [default: the run that has the device, else the only one that is not over]
    run: Option<String>,
}

/// Arguments of `finetunectl wait`.
#[derive(Args, Debug)]
pub struct WaitArguments {
    /// Name, id, or the beginning of an id
    run: String,
}

/// Runs `watch`.
pub async fn command(arguments: &WatchArguments, context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let run = match &arguments.run {
        Some(wanted) => client.find(wanted).await?,
        None => active(&client).await?,
    };
    to_the_end(context, &client, &run).await
}

/// The run that somebody means who names none.
async fn active(client: &Client) -> Result<RunProxy<'static>, Failure> {
    let path = client.answer(client.manager.active_run()).await?;
    if Client::is_run(&path) {
        return client.run(path).await;
    }
    let unfinished: Vec<Figures> =
        list::runs(client).await?.into_iter().filter(|run| !run.is_over()).collect();
    match &unfinished[..] {
        [] => Err(Failure::new(Exit::NothingToDo, "there is nothing to watch: every run is over")
            .help("`finetunectl submit SPEC --watch` submits a run and watches it")),
        [one] => client.find(&one.id).await,
        several => {
            let error =
                format!("no run has the device, and {} are not over", text::count(several.len(), "run"));
            Err(Failure::new(Exit::NotFound, error).help("say which: `finetunectl list` shows them"))
        }
    }
}

/// Watches a run until it ends.
pub async fn to_the_end(context: &Context, client: &Client, run: &RunProxy<'_>) -> Result<Code, Failure> {
    let mut watcher = Watcher::new(context);
    if let View::Bar(_) = watcher.view {
        // The curve so far, for those who may see it; without a password.
        if let Ok(metrics) = client.answer(run.open_metrics(Dictionary::new())).await {
            watcher.losses = losses(metrics);
        }
    }
    let figures = follow(context, client, run, &mut watcher).await?;
    drop(watcher);
    conclude(context, client, run, &figures).await
}

/// Runs `wait`.
pub async fn wait(arguments: &WaitArguments, context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let run = client.find(&arguments.run).await?;
    wait_for(context, &client, &run, context.timeout).await
}

/// Waits for the end of a run: the daemon answers when it has come.
pub async fn wait_for(
    context: &Context,
    client: &Client,
    run: &RunProxy<'_>,
    limit: Option<Duration>,
) -> Result<Code, Failure> {
    let figures = Figures::new(&client.properties(run.inner()).await?);
    let end = async {
        let mut away: Option<Instant> = None;
        loop {
            match run.wait().await.map_err(Failure::from) {
                Ok(_) => return Ok(()),
                Err(failure) if !may_return(client, &failure) => return Err(failure),
                Err(failure) => {
                    // A wait that was cut off after hours is the beginning of an absence, not the end of one.
                    let since = *away.get_or_insert_with(Instant::now);
                    if since.elapsed() > AWAY + RETRY {
                        return Err(failure);
                    }
                    sleep(RETRY).await;
                    if client.properties(run.inner()).await.is_ok() {
                        away = None;
                    }
                }
            }
        }
    };
    let late = || {
        let error =
            format!("{} is not over after {} s", figures.title(), limit.unwrap_or_default().as_secs_f64());
        Failure::new(Exit::Timeout, error).help("it goes on; wait for it again, or watch it")
    };
    tokio::select! {
        ended = end => ended?,
        () = sleep(limit.unwrap_or_default()), if limit.is_some() => return Err(late()),
        _ = context.interrupts.next() => return Err(detach(context, &figures)),
    }
    let figures = Figures::new(&client.properties(run.inner()).await?);
    if context.json {
        context.console.json(json!({ "run": figures.json() }))?;
    }
    conclude(context, client, run, &figures).await
}

/// Whether the daemon may come back: one on a bus is started again, a connection of its own is gone for good.
fn may_return(client: &Client, failure: &Failure) -> bool {
    client.connection.is_bus() && matches!(failure.exit, Exit::Unreachable | Exit::Timeout)
}

/// Shows a run until it is over.
async fn follow(
    context: &Context,
    client: &Client,
    run: &RunProxy<'_>,
    watcher: &mut Watcher<'_>,
) -> Result<Figures, Failure> {
    // First listen, then look: nothing that changes between the two is missed.
    let mut changes = changes(client, run).await?;
    let mut figures = Figures::new(&client.properties(run.inner()).await?);
    watcher.show(&figures)?;
    let interrupted = context.interrupts.next();
    tokio::pin!(interrupted);
    let mut heartbeat = interval_at(Instant::now() + HEARTBEAT, HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !figures.is_over() {
        let next = async {
            let message = tokio::select! {
                message = changes.next() => message.ok_or_else(cut)?.map_err(Failure::from)?,
                _ = heartbeat.tick() => return look(context, client, run).await,
            };
            let changed: Result<(String, Dictionary, Vec<String>), _> = message.body().deserialize();
            match changed {
                Ok((_, changed, invalidated)) if invalidated.is_empty() => {
                    let mut figures = figures.clone();
                    figures.apply(&changed);
                    Ok(figures)
                }
                _ => look(context, client, run).await,
            }
        };
        tokio::select! {
            next = next => figures = next?,
            _ = &mut interrupted => {
                watcher.finish();
                return Err(detach(context, &figures));
            }
        }
        watcher.show(&figures)?;
    }
    Ok(figures)
}

/// The connection was closed at the other end.
fn cut() -> Failure {
    zbus::Error::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset)).into()
}

/// The signals of a run.
async fn changes(client: &Client, run: &RunProxy<'_>) -> Result<MessageStream, Failure> {
    let rule = MatchRule::builder()
        .msg_type(Type::Signal)
        .path(run.inner().path())
        .interface("org.freedesktop.DBus.Properties")
        .member("PropertiesChanged")
        .add_arg(run.inner().interface().as_str());
    // On a bus anybody may send signals. Without one nobody else can, and none has a sender.
    let rule = if client.connection.is_bus() { rule.sender(NAME) } else { rule };
    let rule = rule.build().map_err(Failure::from)?;
    client.answer(MessageStream::for_match_rule(rule, &client.connection, None)).await
}

/// The run as it is now; waits for a daemon that is away.
async fn look(context: &Context, client: &Client, run: &RunProxy<'_>) -> Result<Figures, Failure> {
    let since = Instant::now();
    let mut said = false;
    loop {
        match client.properties(run.inner()).await {
            Ok(properties) => return Ok(Figures::new(&properties)),
            Err(failure) if may_return(client, &failure) && since.elapsed() < AWAY => {
                if !said {
                    context.console.message("the daemon is away; its runs go on when it is back");
                    said = true;
                }
                sleep(RETRY).await;
            }
            Err(failure) => return Err(failure),
        }
    }
}

fn detach(context: &Context, figures: &Figures) -> Failure {
    let again = context.transport.again(&format!("watch {}", text::printable(&figures.id)));
    context.console.message(&format!("{} goes on; watch it again with: {again}", figures.title()));
    Failure::silent(Exit::Interrupted)
}

/// What a run that is over came to.
async fn conclude(
    context: &Context,
    client: &Client,
    run: &RunProxy<'_>,
    figures: &Figures,
) -> Result<Code, Failure> {
    let id = text::printable(&figures.id);
    match figures.state.as_str() {
        "succeeded" => {
            if !context.json {
                context.console.line(&success(figures))?;
                let export = context.transport.again(&format!("adapter export {id} DIR"));
                context.console.message(&format!("fetch its adapter with: {export}"));
            }
            Ok(Exit::Done.into())
        }
        "cancelled" => Err(Failure::new(Exit::RunCancelled, format!("{} was cancelled", figures.title()))),
        _ => {
            let mut failure =
                Failure::new(Exit::RunFailed, format!("{} failed ({})", figures.title(), figures.reason));
            // Only its owner gets to see what was wrong; nobody is asked for a password for it.
            let details = client.answer::<_, bus::Error>(run.describe()).await;
            let message = details.map(|details| text_of(&details, "Message")).unwrap_or_default();
            if let Some(cause) = some(&message).or(meaning(&figures.reason)) {
                failure = failure.because(cause);
            }
            let logs = context.transport.again(&format!("logs {id}"));
            Err(failure.help(format!("what happened, in order: {logs}")))
        }
    }
}

fn success(figures: &Figures) -> String {
    let mut parts = vec![format!("{} steps", figures.step)];
    parts.extend(figures.loss.map(|loss| format!("loss {loss:.4}")));
    parts.extend(figures.eval_loss.map(|loss| format!("held out {loss:.4}")));
    if let (Some(started), Some(finished)) = (figures.started_us, figures.finished_us) {
        let length = Duration::from_micros(finished.saturating_sub(started));
        parts.push(format!("{} after its start", duration(length)));
    }
    if let Some(energy) = figures.energy_j {
        parts.push(format!("{} Wh", significant(energy / 3600.0, 3)));
    }
    if figures.reason == "early-stopping" {
        parts.push("stopped early: no improvement any more".into());
    }
    format!("{} succeeded: {}", figures.title(), parts.join(", "))
}

/// Shows a run while it goes on.
struct Watcher<'a> {
    context: &'a Context,
    view: View<'a>,
    /// Training losses, oldest first.
    losses: Vec<f64>,
    /// What was shown last.
    last: Option<Figures>,
    /// When the last line was printed.
    printed: Duration,
}

enum View<'a> {
    Bar(Shown<'a>),
    Lines,
    Json,
}

impl<'a> Watcher<'a> {
    fn new(context: &'a Context) -> Watcher<'a> {
        let view = if context.json {
            View::Json
        } else if let Some(shown) = context.console.bar() {
            let style = ProgressStyle::with_template("{wide_msg}\n[{bar:40}] {prefix}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ");
            shown.bar.set_style(style);
            shown.bar.set_length(PARTS as u64);
            View::Bar(shown)
        } else {
            View::Lines
        };
        Watcher { context, view, losses: Vec::new(), last: None, printed: Duration::ZERO }
    }

    fn show(&mut self, figures: &Figures) -> Result<(), Failure> {
        if self.last.as_ref() == Some(figures) {
            return Ok(());
        }
        let last = self.last.replace(figures.clone());
        if last.as_ref().is_none_or(|last| last.step != figures.step) {
            self.losses.extend(figures.loss);
        }
        let changed = |of: fn(&Figures) -> String| last.as_ref().is_none_or(|last| of(last) != of(figures));
        let state = text::printable(&figures.state_and_reason());
        match &self.view {
            View::Json => self.context.console.json(json!({ "run": figures.json() }))?,
            View::Bar(shown) => {
                shown.bar.set_position((figures.progress * PARTS) as u64);
                shown.bar.set_message(format!("{state}  {}", figures.line()));
                shown.bar.set_prefix(text::sparkline(&self.losses, SPARKS));
            }
            View::Lines => {
                let now = self.context.clock.monotonic();
                let due = now.saturating_sub(self.printed) >= LINE;
                if changed(Figures::state_and_reason) || due {
                    self.context.console.line(&format!("{state}  {}", figures.line()))?;
                    self.printed = now;
                }
            }
        }
        Ok(())
    }

    /// Takes the bar away.
    fn finish(&mut self) {
        self.view = View::Lines;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn success_is_told_in_one_line() {
        let figures = Figures {
            id: "0123456789ab".into(),
            name: "night".into(),
            reason: "early-stopping".into(),
            step: 80,
            loss: Some(1.0),
            eval_loss: Some(1.25),
            started_us: Some(1_000_000),
            finished_us: Some(131_000_000),
            energy_j: Some(5_400.0),
            ..Figures::default()
        };
        assert_eq!(
            success(&figures),
            "night (0123456789ab) succeeded: 80 steps, loss 1.0000, held out 1.2500, 2 min 10 s after its start, \
             1.50 Wh, stopped early: no improvement any more"
        );
    }
}
