//! `finetunectl list` and `finetunectl show`.

use super::connect::Client;
use super::console::Colour;
use super::context::Context;
use super::exit::{Code, Exit, Failure};
use super::figures::{Figures, some, text_of};
use super::text;
use crate::bus::Dictionary;
use clap::Args;
use serde_json::{Value, json};
use std::time::Duration;

/// Runs that are over and listed without `--all`.
const LAST: usize = 10;

/// Arguments of `finetunectl list`.
#[derive(Args, Debug)]
pub struct ListArguments {
    /// Every run
    #[arg(long, short, conflicts_with = "unfinished")]
    all: bool,
    /// Only runs that are not over
    #[arg(long)]
    unfinished: bool,
}

/// Runs the command.
pub async fn command(arguments: &ListArguments, context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    // All of them, whatever is shown: an abbreviated id must fit no other run.
    let runs = runs(&client).await?;
    let last = match (arguments.all, arguments.unfinished) {
        (true, _) => usize::MAX,
        (_, true) => 0,
        _ => LAST,
    };
    let shown = select(&runs, last);
    if context.json {
        let runs: Vec<Value> = shown.iter().map(|run| run.json()).collect();
        context.console.json(json!({ "runs": runs }))?;
        return Ok(Exit::Done.into());
    }
    if !shown.is_empty() {
        let digits = text::digits(runs.iter().map(|run| run.id.as_str()));
        context.console.result(&page(&shown, digits, context.now_us(), |uid| context.user(uid)))?;
    }
    let hidden = runs.len() - shown.len();
    if runs.is_empty() {
        context.console.message("no runs; submit one with: finetunectl submit SPEC");
    } else if hidden > 0 {
        context
            .console
            .message(&format!("{} over and not shown; --all shows them", text::count(hidden, "run")));
    }
    Ok(Exit::Done.into())
}

/// Every run, oldest first.
pub async fn runs(client: &Client) -> Result<Vec<Figures>, Failure> {
    let runs = client.answer(client.manager.list_runs(Dictionary::new())).await?;
    Ok(runs.iter().map(Figures::new).collect())
}

/// Every run that is not over, and the `last` ones that are, in the same order.
fn select(runs: &[Figures], last: usize) -> Vec<&Figures> {
    let mut ends: Vec<u64> =
        runs.iter().filter(|run| run.is_over()).filter_map(|run| run.finished_us).collect();
    ends.sort_unstable_by(|a, b| b.cmp(a));
    let since = if last == 0 { u64::MAX } else { ends.get(last - 1).copied().unwrap_or(0) };
    runs.iter().filter(|run| !run.is_over() || (last > 0 && run.finished_us.unwrap_or(0) >= since)).collect()
}

/// The table.
fn page(runs: &[&Figures], digits: usize, now_us: u64, user: impl Fn(u32) -> String) -> String {
    let number = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.4}"));
    let due =
        |run: &Figures| Some(run.due(now_us)).filter(|due| !due.is_empty()).unwrap_or_else(|| "-".into());
    let rows: Vec<[String; 10]> = runs
        .iter()
        .map(|run| {
            [
                text::prefix(&run.id, digits).to_string(),
                run.name.clone(),
                run.state_and_reason(),
                run.percent(),
                run.steps(),
                number(run.loss),
                number(run.eval_loss),
                user(run.owner),
                text::age(Duration::from_micros(now_us.saturating_sub(run.created_us))),
                due(run),
            ]
        })
        .collect();
    let headers = ["ID", "NAME", "STATE", "DONE", "STEP", "LOSS", "EVAL", "OWNER", "AGE", "DEADLINE"];
    if runs.iter().any(|run| run.deadline_us.is_some()) {
        return text::table(headers, &rows);
    }
    // Most runs have no deadline, and need no column for it.
    let short: Vec<[String; 9]> = rows.into_iter().map(|[most @ .., _]| most).collect();
    let [most @ .., _] = headers;
    text::table(most, &short)
}

/// Arguments of `finetunectl show`.
#[derive(Args, Debug)]
pub struct ShowArguments {
    /// Name, id, or the beginning of an id
    run: String,
    /// Print the spec as it was submitted, and nothing else
    #[arg(long, conflicts_with = "resolved")]
    spec: bool,
    /// Print the spec with every default and the paths in force, and nothing else
    #[arg(long)]
    resolved: bool,
}

/// Runs the command.
pub async fn show(arguments: &ShowArguments, context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let run = client.find(&arguments.run).await?;
    let figures = Figures::new(&client.properties(run.inner()).await?);
    if arguments.spec || arguments.resolved {
        let details: Dictionary = client.call(run.inner(), "Describe", &(), None).await?;
        let key = if arguments.spec { "Spec" } else { "ResolvedSpec" };
        let spec = text_of(&details, key);
        let key = if arguments.spec { "spec" } else { "resolved_spec" };
        if context.json {
            context.console.json(json!({ key: spec }))?;
        } else {
            context.console.result(&text::printable_lines(&spec))?;
        }
        return Ok(Exit::Done.into());
    }
    // Who may not see the details sees the rest, and is not asked for a password.
    let details = match client.answer(run.describe()).await {
        Ok(details) => Some(details),
        Err(failure) if failure.exit == Exit::NotAuthorized => None,
        Err(failure) => return Err(failure),
    };
    if context.json {
        let details = details.as_ref().map(details_json);
        context.console.json(json!({ "run": figures.json(), "details": details }))?;
        return Ok(Exit::Done.into());
    }
    let dot = context.console.paint(Colour::of_state(&figures.state), "●");
    let mut rows = figures.fields(&context.user(figures.owner), context.now_us(), &context.zone);
    match &details {
        Some(details) => rows.extend(details_fields(details)),
        None => context.console.message("spec, directory and failure are shown to the owner only"),
    }
    context.console.result(&format!("{dot} {}\n{}", figures.title(), text::fields(&rows)))?;
    Ok(Exit::Done.into())
}

/// The summary as JSON; text that is none is kept as text.
fn summary(details: &Dictionary) -> Option<Value> {
    let text = text_of(details, "Summary");
    some(&text).map(|text| serde_json::from_str(text).unwrap_or_else(|_| text.into()))
}

fn details_json(details: &Dictionary) -> Value {
    let text = |key| Some(text_of(details, key)).filter(|text| !text.is_empty());
    json!({
        "message": text("Message"),
        "model": text("Model"),
        "directory": text("Directory"),
        "spec": text("Spec"),
        "resolved_spec": text("ResolvedSpec"),
        "summary": summary(details),
    })
}

fn details_fields(details: &Dictionary) -> Vec<(&'static str, String)> {
    let text = |key| text::printable_lines(&text_of(details, key));
    let mut rows =
        vec![("Model", text("Model")), ("Directory", text("Directory")), ("Message", text("Message"))];
    if let Some(Value::Object(figures)) = summary(details) {
        let lines: Vec<String> = figures
            .iter()
            .filter(|(_, value)| !value.is_null() && !value.is_object() && !value.is_array())
            .map(|(key, value)| {
                let value = value.as_str().map_or_else(|| value.to_string(), String::from);
                text::printable(&format!("{key} {value}"))
            })
            .collect();
        rows.push(("Summary", lines.join("\n")));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(id: &str, state: &str, finished_us: Option<u64>) -> Figures {
        Figures { id: id.into(), state: state.into(), finished_us, ..Figures::default() }
    }

    #[test]
    fn the_last_to_end_are_shown() {
        let runs = [
            run("a", "succeeded", Some(5)),
            run("b", "running", None),
            run("c", "failed", Some(9)),
            run("d", "cancelled", Some(1)),
        ];
        let ids = |last| select(&runs, last).iter().map(|run| run.id.as_str()).collect::<String>();
        assert_eq!([ids(0), ids(1), ids(2), ids(usize::MAX)], ["b", "bc", "abc", "abcd"]);
        assert!(select(&[], 3).is_empty());
    }

    #[test]
    fn names_do_not_reach_the_terminal_as_they_are() {
        let evil = Figures { name: "\x1b]0;x\x07".into(), ..run("0123456789ab", "queued", None) };
        let page = page(&[&evil], 4, 0, |uid| uid.to_string());
        assert!(page.contains(r"\u{1b}]0;x\u{7}"), "{page}");
    }
}
