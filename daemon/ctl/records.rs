//! `finetunectl logs` and `finetunectl metrics`: the run's journal and its metrics, one JSON object a line, from
//! descriptors that the daemon opens.

use super::connect::Client;
use super::console::json_line;
use super::context::Context;
use super::exit::{Code, Exit, Failure};
use super::figures::{Figures, time};
use super::text;
use crate::bus::{Dictionary, RunProxy};
use crate::units::significant;
use clap::Args;
use jiff::tz::TimeZone;
use serde_json::Value;
use std::fs::File;
use std::io::{self, Read};
use std::time::Duration;
use tokio::time::sleep;
use zbus::OwnedFd;

/// How often a file is looked at that may have grown.
const POLL: Duration = Duration::from_millis(500);

/// Between two questions whether the run is over, in looks at the file.
const LOOKS: u32 = 4;

/// Longest line that is kept; a longer one is none of ours, and is cut.
const LONGEST: usize = 1 << 20;

/// Arguments of `finetunectl logs`.
#[derive(Args, Debug)]
pub struct LogsArguments {
    /// Name, id, or the beginning of an id
    run: String,
    /// Go on until the run is over
    #[arg(long, short)]
    follow: bool,
}

/// Arguments of `finetunectl metrics`.
#[derive(Args, Debug)]
pub struct MetricsArguments {
    /// Name, id, or the beginning of an id
    run: String,
    /// Print comma-separated values with a header
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// Go on until the run is over
    #[arg(long, short)]
    follow: bool,
}

/// Runs `logs`.
pub async fn logs(arguments: &LogsArguments, context: &Context) -> Result<Code, Failure> {
    let print = |record: &Value| match context.json {
        true => context.console.line(&json_line(record.clone())),
        false => context.console.line(&journal_line(record, &context.zone)),
    };
    stream(context, &arguments.run, "OpenLog", arguments.follow, print).await
}

/// Runs `metrics`.
pub async fn metrics(arguments: &MetricsArguments, context: &Context) -> Result<Code, Failure> {
    if arguments.csv {
        context.console.result(&csv_line(COLUMNS.map(String::from)))?;
    }
    let print = |record: &Value| match (context.json, arguments.csv) {
        (true, _) => context.console.line(&json_line(record.clone())),
        (_, true) => context.console.result(&csv_line(COLUMNS.map(|column| cell(record, column)))),
        _ => context.console.line(&metrics_line(record)),
    };
    stream(context, &arguments.run, "OpenMetrics", arguments.follow, print).await
}

/// Prints the records of a file, and with `follow` what is added to it until the run is over.
async fn stream(
    context: &Context,
    wanted: &str,
    method: &'static str,
    follow: bool,
    print: impl Fn(&Value) -> Result<(), Failure>,
) -> Result<Code, Failure> {
    let client = context.client().await?;
    let run = client.find(wanted).await?;
    tokio::select! {
        ended = print_records(&client, &run, method, follow, print) => ended.map(|()| Exit::Done.into()),
        _ = context.interrupts.next(), if follow => Err(Failure::silent(Exit::Interrupted)),
    }
}

async fn print_records(
    client: &Client,
    run: &RunProxy<'_>,
    method: &'static str,
    follow: bool,
    print: impl Fn(&Value) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut tail = open(client, run, method).await?;
    let mut seen = Seen::default();
    let mut attempts = None;
    loop {
        // First the question, then the file: what a run says last is in the file before it is over.
        let figures = if follow { Some(Figures::new(&client.properties(run.inner()).await?)) } else { None };
        if let Some(figures) = &figures
            && attempts.replace(figures.attempts).is_some_and(|before| before != figures.attempts)
        {
            // A new attempt cuts off what its checkpoint does not know, which makes another file of metrics.
            tail = open(client, run, method).await?;
            seen.reopened();
        }
        let last = figures.as_ref().is_none_or(Figures::is_over);
        for _ in 0..LOOKS {
            for line in tail.lines(last).map_err(unreadable)? {
                // What is no JSON is shown as it is.
                let record = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if seen.is_new(&record) {
                    print(&record)?;
                }
            }
            if last {
                return Ok(());
            }
            sleep(POLL).await;
        }
    }
}

fn unreadable(error: io::Error) -> Failure {
    Failure::new(Exit::Error, "cannot read what the daemon has opened").because(error)
}

async fn open(client: &Client, run: &RunProxy<'_>, method: &'static str) -> Result<Tail, Failure> {
    let file: OwnedFd = client.call(run.inner(), method, &Dictionary::new(), None).await?;
    Ok(Tail::new(file))
}

/// The training losses in a file of metrics.
pub fn losses(metrics: OwnedFd) -> Vec<f64> {
    let lines = Tail::new(metrics).lines(true).unwrap_or_default();
    lines.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok()?.get("loss")?.as_f64()).collect()
}

/// A file that grows, line by line.
pub struct Tail {
    file: File,
    partial: Vec<u8>,
}

impl Tail {
    /// The file from its beginning.
    pub fn new(file: OwnedFd) -> Tail {
        Tail { file: File::from(std::os::fd::OwnedFd::from(file)), partial: Vec::new() }
    }

    /// The lines that were completed since the last time. `last`: nothing more will come, so a line without its end is
    /// a line, too.
    pub fn lines(&mut self, last: bool) -> io::Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let read = match self.file.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for part in buffer[..read].split_inclusive(|&byte| byte == b'\n') {
                let room = LONGEST.saturating_sub(self.partial.len());
                self.partial.extend_from_slice(&part[..part.len().min(room)]);
                if part.ends_with(b"\n") {
                    self.complete(&mut lines);
                }
            }
        }
        if last {
            self.complete(&mut lines);
        }
        Ok(lines)
    }

    fn complete(&mut self, lines: &mut Vec<String>) {
        let line = String::from_utf8_lossy(&self.partial).trim_end_matches(['\n', '\0']).to_string();
        self.partial.clear();
        if !line.is_empty() {
            lines.push(line);
        }
    }
}

/// What was printed, so that a file that is opened again is not printed twice. Only records with a step and without a
/// time (metrics) are compared.
#[derive(Default)]
struct Seen {
    /// Greatest step, of steps and of evaluations, before the file was opened again.
    before: [Option<u64>; 2],
    /// Greatest step so far.
    now: [Option<u64>; 2],
    /// Records of the journal: printed before, and read since.
    journal: [u64; 2],
}

impl Seen {
    fn reopened(&mut self) {
        self.before = self.now;
        self.journal = [self.journal[0].max(self.journal[1]), 0];
    }

    fn is_new(&mut self, record: &Value) -> bool {
        if record.get("time_us").is_some() || record.get("step").is_none() {
            // The journal is only ever added to: as many records as were printed come again.
            self.journal[1] += 1;
            return self.journal[1] > self.journal[0];
        }
        let kind = usize::from(record.get("eval_loss").is_some());
        let step = record["step"].as_u64();
        self.now[kind] = self.now[kind].max(step);
        self.before[kind] < step
    }
}

/// A record of the journal for people: `2026-11-24 21:00:00  waiting (inhibited)`.
fn journal_line(record: &Value, zone: &TimeZone) -> String {
    let text = |key: &str| record.get(key).and_then(Value::as_str);
    let when = record.get("time_us").and_then(Value::as_u64);
    let message = |before: String| match text("message") {
        Some(message) if !before.is_empty() => format!("{before}: {message}"),
        Some(message) => message.to_string(),
        None => before,
    };
    let reason = |state: &str| match text("reason") {
        Some(reason) if !reason.is_empty() => format!("{state} ({reason})"),
        _ => state.to_string(),
    };
    let step = record.get("step").and_then(Value::as_u64);
    let what = match (text("kind"), when) {
        (Some("state"), Some(_)) => message(reason(text("state").unwrap_or("state"))),
        (Some("failure"), Some(_)) => message(reason("failure")),
        (Some("note"), Some(_)) => message("note".into()),
        (Some("checkpoint"), Some(_)) => {
            message(step.map_or_else(|| "checkpoint".into(), |step| format!("checkpoint at step {step}")))
        }
        // Kinds of a later version, and what is no record at all.
        _ => record.as_str().map_or_else(|| record.to_string(), String::from),
    };
    let what = text::printable(&what);
    match when {
        Some(us) => format!("{}  {what}", time(us, zone)),
        None => what,
    }
}

/// A record of the metrics for people, as `finetuned run` prints it.
fn metrics_line(record: &Value) -> String {
    let number = |key: &str| record.get(key).and_then(Value::as_f64);
    let loss = |key: &str| number(key).map_or_else(|| "NaN".into(), |loss| format!("{loss:.4}"));
    let Some(step) = record.get("step").and_then(Value::as_u64) else {
        return text::printable(&record.as_str().map_or_else(|| record.to_string(), String::from));
    };
    if record.get("eval_loss").is_some() {
        return format!("eval {step} eval_loss {}", loss("eval_loss"));
    }
    let mut line = format!("step {step} loss {}", loss("loss"));
    for (label, value) in [
        (" grad_norm ", number("grad_norm").map(|norm| significant(norm, 2))),
        (" lr ", number("learning_rate").map(|rate| format!("{rate:.1e}"))),
        (" ", number("tokens_per_second").map(|speed| format!("{} tok/s", significant(speed, 3)))),
    ] {
        line.extend(value.map(|value| format!("{label}{value}")));
    }
    line
}

/// Columns of `metrics --csv`: keys of a step and of an evaluation.
const COLUMNS: [&str; 8] =
    ["step", "epoch", "loss", "eval_loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"];

fn cell(record: &Value, column: &str) -> String {
    match record.get(column) {
        Some(Value::Number(number)) => number.to_string(),
        _ => String::new(),
    }
}

/// A line of numbers and names of columns: nothing in it needs quotes.
fn csv_line(cells: [String; 8]) -> String {
    format!("{}\n", cells.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, Write};

    fn record(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_journal_is_readable() {
        let line = |text: &str| journal_line(&record(text), &TimeZone::UTC);
        let lines = [
            r#"{"time_us":1700000000000000,"kind":"state","state":"waiting","reason":"inhibited"}"#,
            r#"{"time_us":1700000000000000,"kind":"state","state":"running","reason":"","message":"again"}"#,
            r#"{"time_us":1700000000000000,"kind":"failure","reason":"crashed","message":"signal 11\u001b"}"#,
            r#"{"time_us":1700000000000000,"kind":"checkpoint","step":40}"#,
            r#"{"time_us":1700000000000000,"kind":"note","message":"hello"}"#,
            r#"{"time_us":1700000000000000,"kind":"weather","rain":1}"#,
            r#"{"kind":"note","message":"no time"}"#,
        ]
        .map(line);
        assert_eq!(
            lines,
            [
                "2023-11-14 22:13:20  waiting (inhibited)",
                "2023-11-14 22:13:20  running: again",
                "2023-11-14 22:13:20  failure (crashed): signal 11\\u{1b}",
                "2023-11-14 22:13:20  checkpoint at step 40",
                "2023-11-14 22:13:20  note: hello",
                "2023-11-14 22:13:20  {\"time_us\":1700000000000000,\"kind\":\"weather\",\"rain\":1}",
                "{\"kind\":\"note\",\"message\":\"no time\"}",
            ]
        );
        assert_eq!(journal_line(&Value::String("x\x07".into()), &TimeZone::UTC), "x\\u{7}");
    }

    #[test]
    fn metrics_read_as_those_of_a_run_in_the_foreground() {
        let step = record(
            r#"{"step":12,"epoch":0.1,"loss":1.23451,"grad_norm":0.512,"learning_rate":2e-4,"tokens":624,"tokens_per_second":312.4}"#,
        );
        assert_eq!(metrics_line(&step), "step 12 loss 1.2345 grad_norm 0.51 lr 2.0e-4 312 tok/s");
        assert_eq!(csv_line(COLUMNS.map(|c| cell(&step, c))), "12,0.1,1.23451,,0.512,0.0002,624,312.4\n");
        let eval = record(r#"{"step":12,"eval_loss":null}"#);
        assert_eq!(metrics_line(&eval), "eval 12 eval_loss NaN");
        assert_eq!(csv_line(COLUMNS.map(|c| cell(&eval, c))), "12,,,,,,,\n");
    }

    #[test]
    fn lines_come_when_they_are_complete() {
        let mut file = tempfile::tempfile().unwrap();
        let mut writer = file.try_clone().unwrap();
        // A descriptor of its own would have its own offset; the clone shares it, so it is put back.
        let mut write = |text: &str, at: u64| {
            writer.seek(io::SeekFrom::End(0)).unwrap();
            writer.write_all(text.as_bytes()).unwrap();
            writer.seek(io::SeekFrom::Start(at)).unwrap();
        };
        write("one\ntw", 0);
        file.rewind().unwrap();
        let mut tail = Tail { file, partial: Vec::new() };
        assert_eq!(tail.lines(false).unwrap(), ["one"]);
        write("o\n\nthree", 6);
        assert_eq!(tail.lines(false).unwrap(), ["two"]);
        assert_eq!(tail.lines(true).unwrap(), ["three"]);
        assert!(tail.lines(true).unwrap().is_empty());
    }

    #[test]
    fn a_file_that_is_opened_again_is_not_printed_twice() {
        let mut seen = Seen::default();
        let (one, two) = (record(r#"{"step":1,"loss":1}"#), record(r#"{"step":2,"loss":1}"#));
        let eval = record(r#"{"step":1,"eval_loss":1}"#);
        let note = record(r#"{"time_us":1,"kind":"note"}"#);
        assert!([&one, &eval, &note, &note].map(|record| seen.is_new(record)).iter().all(|&new| new));
        seen.reopened();
        let again = [&one, &eval, &two, &note, &note, &note].map(|record| seen.is_new(record));
        assert_eq!(again, [false, false, true, false, false, true]);
    }
}
