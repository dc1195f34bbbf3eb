//! `finetunectl top`: a live page in the terminal.
//!
//! ```text
//!   the daemon ──► feed ──Update──►┐                        ┌──► draw ──► screen
//!        ▲                         ├──► model (pure) ───────┤
//!        └── obey ◄──order──┐      │                        └──► selected run ──► feed
//!                           └──────┼── Action ◄── Key ◄── screen (a thread of its own)
//!                                  └── a second: the time
//! ```

mod ascii;
mod draw;
mod feed;
mod model;
mod screen;
mod series;
#[cfg(test)]
mod tests;

use super::context::Context;
use super::exit::{Code, Exit, Failure};
use crate::ctl::figures::some;
use clap::Args;
use model::{Action, Look, Model};
use screen::{Said, Screen};
use std::io::IsTerminal;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

/// Nothing is drawn more often than this, but for keys.
const FRAME: Duration = Duration::from_millis(100);

/// Size of the page of `--once` where there is no terminal.
const PAGE: (u16, u16) = (100, 30);

/// Largest page of `--once`, in columns and in rows.
const LARGEST: u16 = 1000;

/// Shortest and longest interval, in seconds.
const INTERVALS: std::ops::RangeInclusive<f64> = 0.2..=3600.0;

/// Arguments of `finetunectl top`.
#[derive(Args, Debug)]
pub struct TopArguments {
    /// How often temperatures and power are read
    #[arg(long, short = 'd', value_name = "SECONDS", default_value = "1", value_parser = interval_of)]
    interval: Duration,
    /// Print the page once, as plain text, and end [size: the terminal's, else $COLUMNS × $LINES, else 100 × 30]
    #[arg(long)]
    once: bool,
    /// Only characters that every terminal knows [default where the locale is not UTF-8]
    #[arg(long)]
    ascii: bool,
}

fn interval_of(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| INTERVALS.contains(seconds));
    let problem =
        || format!("{text:?} is no number of seconds from {} to {}", INTERVALS.start(), INTERVALS.end());
    seconds.map(Duration::from_secs_f64).ok_or_else(problem)
}

/// Runs the command.
pub async fn command(arguments: &TopArguments, context: &Context) -> Result<Code, Failure> {
    if context.json {
        return Err(Failure::new(Exit::Usage, "top is a page for people and has no JSON")
            .help("`finetunectl status --json`, `finetunectl list --json`"));
    }
    let look = Look {
        colours: context.console.colours(),
        ascii: arguments.ascii || !utf8(|name| std::env::var(name).ok()),
    };
    let mut model = Model::new(look, context.zone.clone());
    model.at(context.clock.monotonic(), context.now_us());
    if arguments.once {
        return once(context, model).await;
    }
    let client = {
        terminal()?;
        feed::connect(context).await?
    };
    let (news, updates) = mpsc::channel(64);
    let (select, selected) = watch::channel(None);
    let (order, orders) = mpsc::channel(4);
    let (screen, keys) = Screen::open().map_err(no_terminal)?;
    let mut page = Page { context, model, screen, select, order };
    tokio::select! {
        ended = page.show(updates, keys) => ended,
        // Neither ends before the page does.
        _ = feed::feed(context, client, arguments.interval, news.clone(), selected) => Ok(Exit::Done.into()),
        () = feed::obey(context, orders, news) => Ok(Exit::Done.into()),
    }
}

fn no_terminal(error: std::io::Error) -> Failure {
    Failure::new(Exit::Error, "cannot use this terminal").because(error).help(INSTEAD)
}

const INSTEAD: &str = "`finetunectl status` prints the same once, `finetunectl top --once` the page as text";

/// A page needs a terminal, for what it shows and for its keys.
fn terminal() -> Result<(), Failure> {
    let refused = |what: &str| Err(Failure::new(Exit::Usage, what).help(INSTEAD));
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        return refused("top needs a terminal, for its page and for its keys");
    }
    match std::env::var("TERM").as_deref() {
        Err(_) | Ok("" | "dumb") => {
            refused("top needs a terminal that can move its cursor; $TERM names none")
        }
        Ok(_) => Ok(()),
    }
}

/// Whether the locale's characters are UTF-8: the first of these variables that is set decides.
fn utf8(variable: impl Fn(&str) -> Option<String>) -> bool {
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().filter_map(variable).find(|set| !set.is_empty());
    let locale = locale.unwrap_or_default().to_ascii_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

/// Prints the page once.
async fn once(context: &Context, mut model: Model) -> Result<Code, Failure> {
    let client = feed::connect(context).await?;
    let (news, mut updates) = mpsc::channel(64);
    feed::once(&client, &news).await?;
    while let Ok(update) = updates.try_recv() {
        model.apply(update);
    }
    if let Some(id) = model.selected().map(|run| run.id.clone()) {
        feed::curve(&client, &news, &id).await?;
        while let Ok(update) = updates.try_recv() {
            model.apply(update);
        }
    }
    model.look.colours = false;
    let shown = std::io::stdout().is_terminal();
    let shown = shown.then(|| ratatui::crossterm::terminal::size().ok()).flatten();
    let (width, height) = size(shown, |name| std::env::var(name).ok());
    context.console.result(&draw::text_of(&model, width, height))?;
    Ok(Exit::Done.into())
}

/// Columns and rows of a page that nobody watches.
fn size(terminal: Option<(u16, u16)>, variable: impl Fn(&str) -> Option<String>) -> (u16, u16) {
    let set = |name: &str| variable(name).and_then(|text| text.parse::<u16>().ok()).filter(|size| *size > 0);
    let given = set("COLUMNS").zip(set("LINES"));
    let terminal = terminal.filter(|(width, height)| *width > 0 && *height > 0);
    let (width, height) = given.or(terminal).unwrap_or(PAGE);
    (width.min(LARGEST), height.min(LARGEST))
}

/// The page on the terminal.
struct Page<'a> {
    context: &'a Context,
    model: Model,
    screen: Screen,
    select: watch::Sender<Option<String>>,
    order: mpsc::Sender<(super::steer::Order, String, String)>,
}

impl Page<'_> {
    async fn show(
        &mut self,
        mut updates: mpsc::Receiver<model::Update>,
        mut keys: mpsc::Receiver<Said>,
    ) -> Result<Code, Failure> {
        let interrupted = self.context.interrupts.next();
        tokio::pin!(interrupted);
        let hung_up = signal_of(SignalKind::hangup());
        tokio::pin!(hung_up);
        let quit = signal_of(SignalKind::quit());
        tokio::pin!(quit);
        let mut second = interval(Duration::from_secs(1));
        second.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut drawn = Instant::now();
        let mut stale = true;
        loop {
            tokio::select! {
                said = keys.recv() => match said {
                    Some(Said::Key(key)) => {
                        if let Some(action) = self.model.key(key)
                            && let Some(end) = self.act(action)?
                        {
                            return Ok(end);
                        }
                        self.draw()?;
                        (drawn, stale) = (Instant::now(), false);
                    }
                    Some(Said::Resized) => stale = true,
                    None => return Err(Failure::new(Exit::Error, "the terminal is gone")),
                },
                update = updates.recv() => if let Some(update) = update {
                    self.model.apply(update);
                    stale = true;
                },
                _ = second.tick() => stale = true,
                () = sleep_until(drawn + FRAME), if stale => {
                    self.draw()?;
                    (drawn, stale) = (Instant::now(), false);
                }
                _ = &mut interrupted => return Err(Failure::silent(Exit::Interrupted)),
                () = &mut hung_up => return Err(Failure::silent(Exit::Interrupted)),
                () = &mut quit => return Err(Failure::silent(Exit::Interrupted)),
            }
        }
    }

    /// Does what a key asks for; the end, if that is it.
    fn act(&mut self, action: Action) -> Result<Option<Code>, Failure> {
        match action {
            Action::Quit => return Ok(Some(Exit::Done.into())),
            Action::Suspend => self.screen.suspend().map_err(no_terminal)?,
            Action::Order(order, id) => {
                let run = self.model.data().runs.iter().find(|run| run.id == id);
                let title = run.map_or_else(|| id.clone(), |run| run.title());
                if self.order.try_send((order, id, title)).is_err() {
                    self.model.apply(model::Update::Told(
                        "one thing after the other: an order is under way".into(),
                    ));
                }
            }
        }
        Ok(None)
    }

    fn draw(&mut self) -> Result<(), Failure> {
        self.model.at(self.context.clock.monotonic(), self.context.now_us());
        self.screen.draw(&self.model).map_err(no_terminal)?;
        let id = self.model.selected().and_then(|run| some(&run.id)).map(String::from);
        self.select.send_if_modified(|before| {
            let changed = *before != id;
            *before = id;
            changed
        });
        Ok(())
    }
}

/// Returns when the signal comes. From the first poll on it no longer ends the process.
async fn signal_of(kind: SignalKind) {
    match signal(kind) {
        Ok(mut signal) => drop(signal.recv().await),
        // Then it keeps its usual effect.
        Err(_) => std::future::pending().await,
    }
}
