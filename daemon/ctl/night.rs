//! `finetunectl night`: the report on a night, as text, as JSON and as a page.

use super::console::Colour;
use super::context::Context;
use super::exit::{Code, Exit, Failure};
use super::text;
use crate::bus::{Dictionary, GovernorProxy};
use crate::night::Use;
use crate::night::chart::columns;
use crate::night::html::{losses, page, remarks};
use crate::night::report::{Range, Report, Sums};
use crate::night::words::{clock, length, percent};
use crate::units::significant;
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use zbus::proxy::CacheProperties;

/// Characters of the line of time.
const WIDTH: usize = 60;

/// Share of training from which on a character shows how much it was, and not why there was none.
const MOSTLY: f64 = 0.5;

/// Arguments of `finetunectl night`.
#[derive(Args, Debug)]
pub struct NightArguments {
    /// The date of its evening (2026-11-24), `last` for the one before the one that runs, or `now` (`today`)
    #[arg(long, value_name = "DATE", default_value = "", hide_default_value = true)]
    date: String,
    /// Write the report as a page to FILE, `-` for standard output
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    html: Option<PathBuf>,
    /// List the nights that there is a report on
    #[arg(long, conflicts_with_all = ["html", "date"])]
    list: bool,
}

/// Runs the command.
pub async fn command(arguments: &NightArguments, context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let governor = GovernorProxy::builder(&client.connection)
        .cache_properties(CacheProperties::No)
        .build()
        .await
        .map_err(Failure::from)?;
    if arguments.list {
        let nights = client.answer(governor.list_nights()).await?;
        match context.json {
            true => context.console.json(json!({ "nights": nights }))?,
            false => nights.iter().try_for_each(|night| context.console.line(&text::printable(night)))?,
        }
        return Ok(Exit::Done.into());
    }
    let wanted = match arguments.date.as_str() {
        "today" | "tonight" => "now".to_string(),
        "yesterday" => "last".to_string(),
        date => date.to_string(),
    };
    let answer = client.answer(governor.get_night(wanted, Dictionary::new())).await?;
    if context.json {
        let report: Value = serde_json::from_str(&answer).map_err(unreadable)?;
        context.console.json(report)?;
        return Ok(Exit::Done.into());
    }
    let report: Report = serde_json::from_str(&answer).map_err(unreadable)?;
    match &arguments.html {
        Some(file) if file.as_os_str() == "-" => context.console.result(&page(&report))?,
        Some(file) => {
            let failed = format!("cannot write {}", file.display());
            std::fs::write(file, page(&report))
                .map_err(|error| Failure::new(Exit::Error, failed).because(error))?;
        }
        None => {
            let colour = if report.window.of(Use::Training) > 0.0 { Colour::Green } else { Colour::Yellow };
            let dot = context.console.paint(colour, "●");
            context.console.result(&format!("{dot} {}", text_page(&report)))?;
        }
    }
    Ok(Exit::Done.into())
}

fn unreadable(error: serde_json::Error) -> Failure {
    Failure::new(Exit::Error, "the daemon's report cannot be read").because(error)
}

/// The report as text.
fn text_page(report: &Report) -> String {
    let mut page = format!("The night of {}\n", text::printable(&report.night));
    for line in std::iter::once(&report.headline).chain(&report.advice) {
        let _ = writeln!(page, "  {}", text::printable(line));
    }
    let marks = Marks::of(&report.window);
    let _ = writeln!(page, "\n  {}\n", bar(report, &marks));
    let _ = writeln!(page, "{}", indented(&uses(&report.window, &marks)));
    if report.whole != report.window {
        let _ =
            writeln!(page, "  The whole night, noon to noon:\n{}", indented(&uses(&report.whole, &marks)));
    }
    page.push_str(&text::fields(&figures(report)));
    if !report.runs.is_empty() {
        let _ = writeln!(page, "\n{}", indented(&runs(report)).trim_end());
    }
    if !report.leases.is_empty() {
        let _ = writeln!(page, "\n{}", indented(&leases(report)).trim_end());
    }
    page
}

fn indented(block: &str) -> String {
    block.lines().map(|line| format!("  {line}\n")).collect()
}

/// A letter for each use that is not training, in the order of the table.
struct Marks(BTreeMap<String, char>);

impl Marks {
    fn of(sums: &Sums) -> Marks {
        let uses = sums.uses.iter().map(|sum| sum.what.clone()).filter(|what| what != Use::Training.word());
        Marks(uses.zip('a'..='z').collect())
    }

    fn of_word(&self, word: &str) -> char {
        match word {
            word if word == Use::Training.word() => '█',
            word => self.0.get(word).copied().unwrap_or('·'),
        }
    }
}

/// The time as a line: blocks where mostly trained was, as high as the share of it, else the letter of what was instead.
fn bar(report: &Report, marks: &Marks) -> String {
    const BLOCKS: [char; 4] = ['▅', '▆', '▇', '█'];
    let scene = report.scene();
    let cell = |uses: &BTreeMap<String, f64>| {
        let total: f64 = uses.values().sum();
        if total <= 0.0 {
            return ' ';
        }
        let share = uses.get(Use::Training.word()).copied().unwrap_or(0.0) / total;
        if share >= MOSTLY {
            let level = (share - MOSTLY) / (1.0 - MOSTLY) * (BLOCKS.len() - 1) as f64;
            return BLOCKS[(level.round() as usize).min(BLOCKS.len() - 1)];
        }
        let others = uses.iter().filter(|(what, _)| *what != Use::Training.word());
        others.max_by(|a, b| a.1.total_cmp(b.1)).map_or('·', |(what, _)| marks.of_word(what))
    };
    let line: String = columns(report, scene, WIDTH).iter().map(|(_, uses)| cell(uses)).collect();
    let zone = report.time_zone();
    format!("{} {line} {}", clock(scene.from, &zone), clock(scene.to, &zone))
}

fn uses(sums: &Sums, marks: &Marks) -> String {
    let rows: Vec<[String; 3]> = sums
        .uses
        .iter()
        .map(|sum| {
            let mark = marks.of_word(&sum.what);
            [format!("{mark} {}", sum.what), length(sum.seconds), percent(sum.share)]
        })
        .collect();
    let table = text::table(["  WHAT", "TIME", "SHARE"], &rows);
    let width = table.lines().map(|line| line.chars().count()).max().unwrap_or(0);
    // The last column may be long, and is not cut.
    let meanings = sums.uses.iter().map(|sum| Use::from_word(&sum.what).map_or("", Use::meaning));
    let lines = table.lines().zip(std::iter::once("").chain(meanings));
    lines.map(|(line, meaning)| format!("{}\n", format!("{line:width$}  {meaning}").trim_end())).collect()
}

fn range(range: &Range, unit: &str) -> String {
    format!("{:.1} to {:.1} {unit}, mean {:.1} {unit}", range.min, range.max, range.mean)
}

fn figures(report: &Report) -> Vec<(&'static str, String)> {
    let zone = report.time_zone();
    let per = |value: Option<f64>, what| value.map(|value| format!(", {} J a {what}", significant(value, 3)));
    let energy = report.energy.as_ref().map(|energy| {
        let watt_hours = |joules: f64| significant(joules / 3600.0, 3);
        let [all, above] = [energy.gross_j, energy.above_idle_j].map(watt_hours);
        let mut text = format!("{all} Wh of runs, {above} Wh above idle");
        text.extend(per(energy.j_per_token, "token"));
        text.extend(per(energy.j_per_step, "step"));
        if energy.unmetered_s >= 1.0 {
            let _ = write!(text, "\n{} without a meter are missing", length(energy.unmetered_s));
        }
        text
    });
    let hottest = report.zones.iter().map(|(name, most)| format!("{} {most:.1} °C", text::printable(name)));
    let hottest: Vec<String> = hottest.collect();
    let modes: Vec<String> = report
        .modes
        .iter()
        .map(|mode| format!("{} from {}", text::printable(&mode.mode), clock(mode.at, &zone)))
        .collect();
    let notes: Vec<String> = report
        .notes
        .iter()
        .map(|note| {
            let (text, first) = (text::printable(&note.text), clock(note.first, &zone));
            format!("{text}, for {} from {first}", length(note.seconds))
        })
        .collect();
    let steps = format!(
        "{}, {}",
        text::count(report.steps as usize, "step"),
        text::count(report.tokens as usize, "token")
    );
    let or_empty = |text: Option<String>| text.unwrap_or_default();
    vec![
        ("Done", steps),
        (
            "Duty",
            or_empty(
                report
                    .duty
                    .map(|duty| format!("{:.0} % of the time in which a run could train", duty * 100.0)),
            ),
        ),
        ("Energy", or_empty(energy)),
        ("Power", or_empty(report.power.as_ref().map(|power| range(power, "W")))),
        ("Hottest zone", or_empty(report.temperature.as_ref().map(|celsius| range(celsius, "°C")))),
        ("Greatest of each", hottest.join(", ")),
        ("Power mode", modes.join(", ")),
        ("Noted", notes.join("\n")),
        ("Record", remarks(report).join("\n")),
    ]
}

fn runs(report: &Report) -> String {
    let rows: Vec<[String; 6]> = report
        .runs
        .iter()
        .map(|run| {
            let reason = run.reason.as_ref().map_or(String::new(), |reason| format!(" ({reason})"));
            [
                run.name.clone(),
                text::prefix(&run.id, 6).to_string(),
                format!("{} to {}", run.first_step, run.last_step),
                losses(run).unwrap_or_else(|| "-".to_string()),
                run.gross_j
                    .map_or("-".to_string(), |joules| format!("{} Wh", significant(joules / 3600.0, 3))),
                format!("{}{reason}", run.state),
            ]
        })
        .collect();
    text::table(["RUN", "ID", "STEPS", "LOSS", "ENERGY", "AT LAST"], &rows)
}

fn leases(report: &Report) -> String {
    let row = |lease: &crate::night::report::LeaseLine| {
        [lease.who.clone(), lease.count.to_string(), length(lease.seconds)]
    };
    let rows: Vec<[String; 3]> = report.leases.iter().map(row).collect();
    text::table(["LEASES AND HOLDS OF", "COUNT", "TIME"], &rows)
}
