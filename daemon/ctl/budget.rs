//! `finetunectl budget`: what training may take, and where each limit comes from.

use super::connect::Client;
use super::context::Context;
use super::exit::{Code, Exit, Failure};
use super::figures::{ago, number_of, some, text_of, time};
use super::text;
use crate::bus::{Dictionary, GovernorProxy};
use crate::config::nearest;
use crate::reason::Reason;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::collections::HashMap;
use zbus::Variant;

/// Commands about the budget.
#[derive(Subcommand, Debug)]
pub enum BudgetCommand {
    /// Show every limit, its value, and where that comes from
    Show(ShowArguments),
    /// Change limits, all of them or none
    #[command(after_help = "\
Examples:
  finetunectl budget set power=25W energy_per_night=40Wh
  finetunectl budget set window.times=22:00-06:00
  finetunectl budget set 'times=[\"22:00-06:00\", \"sat,sun 00:00-24:00\"]'
  finetunectl budget set temperature=70 temperature_resume=60 --runtime

Values are those of the configuration file (docs/configuration.md), and are checked as there.")]
    Set(SetArguments),
    /// Take back what was set: the values of the files are in force again
    Reset(ResetArguments),
}

/// Arguments of `finetunectl budget show`.
#[derive(Args, Debug)]
pub struct ShowArguments {
    /// Only these: budget.power, power, or a whole section, window
    #[arg(value_name = "KEY")]
    keys: Vec<String>,
}

/// Arguments of `finetunectl budget set`.
#[derive(Args, Debug)]
pub struct SetArguments {
    /// A limit and its value, such as power=25W; the section (budget.power) may be left out
    #[arg(value_name = "KEY=VALUE", required = true)]
    changes: Vec<String>,
    /// Only until the daemon starts again
    #[arg(long)]
    runtime: bool,
}

/// Arguments of `finetunectl budget reset`.
#[derive(Args, Debug)]
pub struct ResetArguments {
    /// Only these
    #[arg(value_name = "KEY")]
    keys: Vec<String>,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

/// Runs the command.
pub async fn command(command: &BudgetCommand, context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let governor = client.governor_object().await?;
    let before = entries(&client, &governor).await?;
    let lost = is_lost(&client, &governor).await;
    let (keys, changed) = match command {
        BudgetCommand::Show(arguments) => {
            show(&before, &arguments.keys, context)?;
            for note in client.notes().await {
                context.console.message(&format!("note: {}", text::printable(&note)));
            }
            return Ok(Exit::Done.into());
        }
        BudgetCommand::Set(arguments) => {
            let changes = changes(&before, &arguments.changes)?;
            let mut options = Dictionary::new();
            if arguments.runtime {
                options
                    .insert("runtime".into(), Variant::from(true).try_into_owned().map_err(Failure::from)?);
            }
            let keys: Vec<String> = changes.keys().cloned().collect();
            (keys, client.call::<()>(governor.inner(), "SetBudget", &(changes, options), None).await)
        }
        BudgetCommand::Reset(arguments) => {
            let all = arguments.keys.is_empty();
            if all
                && !arguments.yes
                && context.console.ask("take back everything that was set?") == Some(false)
            {
                return Err(Failure::new(Exit::NothingToDo, "nothing was taken back"));
            }
            let keys = arguments.keys.iter().map(|key| resolve(&before, key));
            let keys = keys.collect::<Result<Vec<_>, _>>()?;
            let done = client.call::<()>(governor.inner(), "ResetBudget", &(&keys,), None).await;
            (if all { set_keys(&before) } else { keys }, done)
        }
    };
    changed.map_err(line_by_line)?;
    let now = entries(&client, &governor).await?;
    let shown: Vec<(&Limit, &Limit)> =
        before.iter().zip(&now).filter(|(_, limit)| keys.contains(&limit.key)).collect();
    if context.json {
        let limits: Vec<Value> = shown.iter().map(|(_, now)| now.json()).collect();
        context.console.json(json!({ "budget": limits }))?;
        return Ok(Exit::Done.into());
    }
    if lost && matches!(command, BudgetCommand::Reset(_)) {
        // What stood in them is not known, so no limit is shown to change.
        context.console.message("the settings that were lost are taken back: what the files say is in force");
    } else if shown.is_empty() {
        context.console.message("nothing was set");
    }
    for (before, now) in shown {
        let (was, is) = (before.friendly(), now.friendly());
        let line = if was == is { format!("{is}, as before") } else { format!("{was} → {is}") };
        context.console.line(&text::printable(&format!("{}: {line}", now.key)))?;
    }
    Ok(Exit::Done.into())
}

/// A key of the budget. Values are TOML.
#[derive(Debug)]
struct Limit {
    key: String,
    value: String,
    default: String,
    files: String,
    source: String,
    place: String,
    uid: u32,
    time_us: u64,
}

async fn entries(client: &Client, governor: &GovernorProxy<'static>) -> Result<Vec<Limit>, Failure> {
    let budget = client.answer(governor.get_budget()).await?;
    let limit = |entry: &Dictionary| Limit {
        key: text_of(entry, "Key"),
        value: text_of(entry, "Value"),
        default: text_of(entry, "Default"),
        files: text_of(entry, "Files"),
        source: text_of(entry, "Source"),
        place: text_of(entry, "Place"),
        uid: entry.get("Uid").and_then(|uid| u32::try_from(uid).ok()).unwrap_or(0),
        time_us: number_of(entry, "Time"),
    };
    Ok(budget.iter().map(limit).collect())
}

/// Whether nothing trains because settings are lost.
async fn is_lost(client: &Client, governor: &GovernorProxy<'static>) -> bool {
    client.answer(governor.reason()).await.is_ok_and(|reason| reason == Reason::SettingsLost.word())
}

/// Keys that were set.
fn set_keys(limits: &[Limit]) -> Vec<String> {
    limits.iter().filter(|limit| limit.is_set()).map(|limit| limit.key.clone()).collect()
}

/// The key that a person means. What has a section goes to the daemon as it is, which says what is wrong with it.
fn resolve(limits: &[Limit], given: &str) -> Result<String, Failure> {
    if given.contains('.') {
        return Ok(given.to_string());
    }
    match limits.iter().find(|limit| limit.name() == given) {
        Some(limit) => Ok(limit.key.clone()),
        None => Err(unknown(limits, given)),
    }
}

fn unknown(limits: &[Limit], given: &str) -> Failure {
    let short = nearest(given, limits.iter().map(Limit::name));
    let near = nearest(given, limits.iter().map(|limit| limit.key.as_str())).or(short);
    let help = near.map_or_else(
        || "`finetunectl budget show` lists every key".to_string(),
        |near| format!("did you mean {near}? `finetunectl budget show` lists every key"),
    );
    Failure::new(Exit::Usage, format!("the budget has no key {given:?}")).help(help)
}

fn changes(limits: &[Limit], given: &[String]) -> Result<HashMap<String, String>, Failure> {
    let mut changes = HashMap::new();
    for text in given {
        let Some((key, value)) = text.split_once('=') else {
            let error = format!("{text:?} is no KEY=VALUE, such as power=25W");
            return Err(Failure::new(Exit::Usage, error).help(
                "`finetunectl budget reset KEY` takes a key back, `finetunectl budget show KEY` shows it",
            ));
        };
        let key = resolve(limits, key.trim())?;
        if changes.insert(key.clone(), value.trim().to_string()).is_some() {
            return Err(Failure::new(Exit::Usage, format!("{key} is given twice")));
        }
    }
    Ok(changes)
}

/// Mistakes come a line each.
fn line_by_line(mut failure: Failure) -> Failure {
    failure.errors = failure.errors.iter().flat_map(|text| text.lines()).map(String::from).collect();
    failure
}

fn show(limits: &[Limit], keys: &[String], context: &Context) -> Result<(), Failure> {
    let fits = |limit: &Limit, key: &str| limit.key == key || limit.name() == key || limit.section() == key;
    if let Some(key) = keys.iter().find(|key| !limits.iter().any(|limit| fits(limit, key))) {
        return Err(unknown(limits, key));
    }
    let shown = limits.iter().filter(|limit| keys.is_empty() || keys.iter().any(|key| fits(limit, key)));
    if context.json {
        let limits: Vec<Value> = shown.map(Limit::json).collect();
        return context.console.json(json!({ "budget": limits }));
    }
    let rows: Vec<[String; 3]> =
        shown.map(|limit| [limit.key.clone(), limit.friendly(), limit.from(context)]).collect();
    // Paths and hours are of use only as a whole.
    context.console.result(&text::columns(["KEY", "VALUE", "FROM"], &rows, usize::MAX))
}

impl Limit {
    fn is_set(&self) -> bool {
        matches!(self.source.as_str(), "set" | "runtime")
    }

    fn name(&self) -> &str {
        self.key.split_once('.').map_or(&self.key, |(_, name)| name)
    }

    fn section(&self) -> &str {
        self.key.split_once('.').map_or("", |(section, _)| section)
    }

    fn friendly(&self) -> String {
        friendly(self.name(), &self.value)
    }

    /// Where the value comes from: `default`, `/etc/finetuned/finetuned.toml:3`, `set by robot …, 5 min 0 s ago`.
    fn from(&self, context: &Context) -> String {
        let until = if self.source == "runtime" { ", until the daemon starts again" } else { "" };
        match self.source.as_str() {
            "file" => self.place.clone(),
            "set" | "runtime" => format!(
                "set by {} {}, {}{until}",
                context.user(self.uid),
                time(self.time_us, &context.zone),
                ago(self.time_us, context.now_us())
            ),
            other => other.to_string(),
        }
    }

    fn json(&self) -> Value {
        json!({
            "key": self.key,
            "value": as_json(&self.value),
            "default": as_json(&self.default),
            "files": as_json(&self.files),
            "source": self.source,
            "place": some(&self.place),
            "uid": self.is_set().then_some(self.uid),
            "time_us": self.is_set().then_some(self.time_us),
        })
    }
}

/// TOML as JSON; text that is none stays text.
fn as_json(value: &str) -> Value {
    let parsed = value.parse::<toml::Value>().ok();
    parsed.and_then(|value| serde_json::to_value(value).ok()).unwrap_or_else(|| value.into())
}

/// A value as a person writes it, with its unit; the configuration reads all of them, but for the words for none.
fn friendly(name: &str, value: &str) -> String {
    match (value.parse(), name) {
        (Ok(toml::Value::String(text)), _) => with_space(&text),
        (Ok(toml::Value::Array(items)), "times") if items.is_empty() => "always".into(),
        (Ok(toml::Value::Array(items)), _) if items.is_empty() => "never".into(),
        (Ok(toml::Value::Array(items)), _) => {
            items.iter().map(|item| item.as_str().unwrap_or("?")).collect::<Vec<_>>().join("; ")
        }
        (Ok(number), "temperature" | "temperature_stop" | "temperature_resume") => format!("{number} °C"),
        (Ok(number), "duty_floor" | "quiet_fan" | "minimum_battery" | "maximum_gpu_load") => {
            let share = number.as_float().or(number.as_integer().map(|whole| whole as f64));
            share.map_or_else(|| value.to_string(), |share| format!("{} %", rounded(share * 100.0)))
        }
        _ => value.to_string(),
    }
}

/// At most four decimals, and none that is zero.
fn rounded(value: f64) -> String {
    format!("{value:.4}").trim_end_matches('0').trim_end_matches('.').to_string()
}

/// `25 W` of `25W`: a blank between number and unit.
fn with_space(text: &str) -> String {
    match text.find(|c: char| c.is_alphabetic()) {
        Some(at) if at > 0 && text[..at].parse::<f64>().is_ok() => format!("{} {}", &text[..at], &text[at..]),
        _ => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_as_a_person_writes_them() {
        for (name, value, shown) in [
            ("power", "\"25.5W\"", "25.5 W"),
            ("power", "\"none\"", "none"),
            ("energy_per_night", "\"40Wh\"", "40 Wh"),
            ("memory_floor", "\"1GiB\"", "1 GiB"),
            ("temperature", "85", "85 °C"),
            ("duty_floor", "0.05", "5 %"),
            ("maximum_gpu_load", "1", "100 %"),
            ("minimum_battery", "0.29", "29 %"),
            ("times", "[]", "always"),
            ("quiet", "[]", "never"),
            ("times", "[\"22:00-06:00\", \"sat 00:00-24:00\"]", "22:00-06:00; sat 00:00-24:00"),
            ("external_power", "true", "true"),
            ("novel", "{nonsense", "{nonsense"),
        ] {
            assert_eq!(friendly(name, value), shown, "{name} = {value}");
        }
        assert_eq!(as_json("[\"a\"]"), json!(["a"]));
        assert_eq!(as_json("{nonsense"), json!("{nonsense"));
    }
}
