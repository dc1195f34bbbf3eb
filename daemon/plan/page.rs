//! The page that tells what a run will take, as JSON (schema 1) and as text. Daemon, command line and client have the
//! same.

use super::roofline::EFFICIENCY;
use super::throughput::{Likeness, Parts, Setup, Workload};
use crate::units::{Bytes, Joules, duration, significant};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt::Write;
use std::time::Duration;

/// Version of the JSON: keys may be added, what a key means changes only with another number.
pub const SCHEMA: u32 = 1;

/// Nights that the text shows; the JSON has all.
const SHOWN_NIGHTS: usize = 14;

/// What can be told without knowing how fast the machine is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Name of the run.
    pub run: String,
    /// The base.
    pub base: BaseFacts,
    /// The adapter.
    pub adapter: AdapterFacts,
    /// Parameters.
    pub parameters: Parameters,
    /// Rows.
    pub data: DataFacts,
    /// Steps.
    pub steps: Steps,
    /// Memory.
    pub memory: Memory,
    /// The smallest change after which it would fit in memory, where it does not.
    pub change: Option<Change>,
}

/// The base.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BaseFacts {
    /// Its directory.
    pub path: String,
    /// Hash of its content.
    pub hash: String,
    /// `model_type` of its config.
    pub model_type: String,
    /// Blocks.
    pub layers: u64,
    /// Width.
    pub hidden_size: u64,
    /// Tokens.
    pub vocab_size: u64,
    /// `nf4` or `none`.
    pub quantization: String,
    /// Whether the absmax values are quantised, too.
    pub double_quant: bool,
}

/// The adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterFacts {
    /// Rank.
    pub r: u64,
    /// Scale, as the spec has it.
    pub alpha: f64,
    /// Modules.
    pub target_modules: Vec<String>,
    /// First layer and the one after the last; absent for all.
    pub layers: Option<(u64, u64)>,
}

/// Parameters.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Parameters {
    /// Of the adapter.
    pub trainable: u64,
    /// Of base and adapter.
    pub total: u64,
    /// Their quotient.
    pub share: f64,
}

/// Rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataFacts {
    /// Those that are learnt.
    pub train: Rows,
    /// Those that are held out.
    pub eval: Option<Rows>,
}

/// A set of rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rows {
    /// Rows.
    pub rows: u64,
    /// Tokens.
    pub tokens: u64,
    /// Learnt tokens.
    pub trainable_tokens: u64,
    /// What else `data inspect` tells.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// Steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Steps {
    /// In all.
    pub total: u64,
    /// Passes over the data.
    pub epochs: f64,
    /// Tokens of an epoch.
    pub tokens_per_epoch: u64,
    /// Sequences of an epoch.
    pub sequences_per_epoch: u64,
    /// Sequences of a whole step.
    pub sequences_per_step: u64,
    /// Sequences of a micro-batch.
    pub micro_batch_size: u64,
    /// Longest sequence.
    pub sequence_length: u64,
}

/// Memory by part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Parts.
    pub parts: Vec<MemoryPart>,
    /// Their sum.
    pub total: Bytes,
    /// What there is.
    pub available: Option<Bytes>,
    /// Whether it fits.
    pub fits: Option<bool>,
    /// Whether activations are computed again.
    pub recompute: bool,
    /// `train.gradient_checkpointing`.
    pub gradient_checkpointing: String,
    /// The largest micro-batch.
    pub micro_batch: MicroBatchFacts,
}

/// What memory is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MemoryPart {
    /// In words.
    pub name: String,
    /// How much.
    pub bytes: Bytes,
}

/// A micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MicroBatchFacts {
    /// Tokens.
    pub tokens: u64,
    /// Of them learnt.
    pub labelled: u64,
    /// Longest example.
    pub longest: u64,
}

/// A change of the spec and the memory it leads to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// `key=value`, as `--set` takes it.
    pub set: Vec<String>,
    /// Memory with it.
    pub total: Bytes,
    /// Whether the run has the same result.
    pub same_result: bool,
}

/// What a trainer makes of a spec, for whoever predicts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Survey {
    /// The facts.
    pub facts: Facts,
    /// What the run does.
    pub workload: Workload,
    /// What determines its speed.
    pub setup: Setup,
    /// Seconds that reading data and base took now.
    pub prepared_in: f64,
}

/// Where the speed comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Basis {
    /// A probe that was made for this page.
    Probe,
    /// The same configuration, measured before.
    Same,
    /// The same base and adapter, scaled by arithmetic.
    SameModel,
    /// Another model on this device, scaled by arithmetic.
    SameDevice,
    /// Nothing was measured: the roofline of the device.
    Roofline,
}

impl From<Likeness> for Basis {
    fn from(likeness: Likeness) -> Basis {
        match likeness {
            Likeness::Same => Basis::Same,
            Likeness::SameModel => Basis::SameModel,
            Likeness::SameDevice => Basis::SameDevice,
            Likeness::Predicted => Basis::Roofline,
        }
    }
}

/// How long it computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Time {
    /// Seconds of computing, if nothing slows it down.
    pub seconds: f64,
    /// At least, and at most, as far as is known.
    pub between: (f64, f64),
    /// By part.
    pub parts: Parts,
    /// Tokens per second of training.
    pub tokens_per_second: f64,
    /// Tokens that are learnt from.
    pub tokens: u64,
    /// Where that comes from.
    pub basis: Basis,
    /// The device that it was predicted for; absent where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Runs and probes that it rests on.
    pub records: u64,
    /// Their tokens.
    pub measured_tokens: u64,
    /// Share of the time that it may compute.
    pub duty: f64,
    /// Whether the duty is that of earlier runs; else it is taken to be 1.
    pub duty_known: bool,
}

/// What it takes from the supply.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EnergyFacts {
    /// In all.
    #[serde(rename = "joules")]
    pub gross: Joules,
    /// Above what the idle machine takes.
    #[serde(rename = "joules_above_idle")]
    pub above_idle: Joules,
    /// Of a token, in all.
    #[serde(rename = "joules_per_token")]
    pub per_token: Joules,
}

/// What ends the computing of a night.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// The run is complete.
    Complete,
    /// The hours.
    Window,
    /// The night's energy.
    EnergyQuota,
    /// The run's energy.
    EnergyOfRun,
    /// The deadline.
    Deadline,
}

/// A night, from noon to noon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Night {
    /// Date of its evening.
    pub date: String,
    /// When computing begins, local time with offset.
    pub from: String,
    /// When it ends.
    pub to: String,
    /// Seconds between that are open.
    pub open: f64,
    /// Seconds of computing, preparation included.
    pub computing: f64,
    /// Steps.
    pub steps: u64,
    /// Energy, as the quota counts it.
    pub joules: Option<Joules>,
    /// What ends it.
    pub limit: Limit,
}

/// When.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calendar {
    /// When it would begin: now.
    pub now: String,
    /// When it would be complete; absent: never.
    pub finish: Option<String>,
    /// The same with the shortest and the longest time.
    pub between: Option<(String, String)>,
    /// Every night in which it computes.
    pub nights: Vec<Night>,
    /// The latest moment that was asked for.
    pub before: Option<String>,
}

/// Why it cannot be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    /// `does-not-fit`, `energy-quota`, `outside-window`, `deadline`.
    pub reason: String,
    /// In words.
    pub message: String,
    /// What would make it possible, each by itself, the smallest first.
    pub changes: Vec<String>,
}

/// The page.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Page {
    /// [`SCHEMA`].
    pub schema: u32,
    /// What is known whatever the speed.
    #[serde(flatten)]
    pub facts: Facts,
    /// How long; absent where nothing on this device was measured, nor can be predicted.
    pub time: Option<Time>,
    /// Energy; absent without a meter or an earlier run.
    pub energy: Option<EnergyFacts>,
    /// When; absent with the time.
    pub calendar: Option<Calendar>,
    /// Why it cannot be; empty when it can.
    pub refusals: Vec<Refusal>,
    /// What a person should know.
    pub notes: Vec<String>,
}

impl Page {
    /// As text, a line each part.
    pub fn text(&self) -> String {
        let mut text = self.facts.text();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<10} {value}");
        };
        match &self.time {
            Some(time) => time.lines(&mut line),
            None => {
                line("time", "unknown: nothing was measured on this device yet; --probe measures it".into())
            }
        }
        if let Some(energy) = &self.energy {
            line("energy", energy.text());
        }
        if let Some(calendar) = &self.calendar {
            calendar.lines(&mut line);
        }
        for note in &self.notes {
            line("note", note.clone());
        }
        text
    }
}

impl Facts {
    fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<10} {value}");
        };
        let Facts { base, adapter, parameters, data, steps, memory, .. } = self;
        let held = match (base.quantization.as_str(), base.double_quant) {
            ("nf4", true) => "nf4 with double quantisation",
            ("nf4", false) => "nf4",
            _ => "not quantised",
        };
        line("run", self.run.clone());
        line(
            "base",
            format!(
                "{}: {}, {} layers, hidden size {}, vocabulary {}, {held}",
                base.path, base.model_type, base.layers, base.hidden_size, base.vocab_size
            ),
        );
        let layers =
            adapter.layers.map_or(String::new(), |(first, last)| format!(", layers {first}..{last}"));
        let modules = adapter.target_modules.join(", ");
        line("adapter", format!("r {}, alpha {} on {modules}{layers}", adapter.r, adapter.alpha));
        line(
            "parameters",
            format!(
                "{} trainable of {} ({:.3} %)",
                grouped(parameters.trainable),
                grouped(parameters.total),
                100.0 * parameters.share
            ),
        );
        line(
            "data",
            format!(
                "{} rows, {} tokens, {} of them learnt; {} rows held out",
                grouped(data.train.rows),
                grouped(data.train.tokens),
                grouped(data.train.trainable_tokens),
                data.eval.as_ref().map_or("no".into(), |eval| grouped(eval.rows)),
            ),
        );
        let accumulation = steps.sequences_per_step / steps.micro_batch_size.max(1);
        line(
            "sequences",
            format!(
                "{} an epoch, of at most {} tokens; {} × {accumulation} a step",
                grouped(steps.sequences_per_epoch),
                steps.sequence_length,
                steps.micro_batch_size,
            ),
        );
        line("steps", format!("{} ({:.2} epochs)", grouped(steps.total), steps.epochs));
        for (i, part) in memory.parts.iter().enumerate() {
            let name = if i == 0 { "memory" } else { "" };
            line(name, format!("{:<31} {:>10}", part.name, part.bytes.to_string()));
        }
        let available = memory.available.map_or(String::new(), |bytes| format!(" of {bytes} available"));
        line("", format!("{:<31} {:>10}{available}", "total", memory.total.to_string()));
        let how = if memory.recompute { "activations are computed again" } else { "activations are kept" };
        line("recompute", format!("{how} (gradient_checkpointing = \"{}\")", memory.gradient_checkpointing));
        text
    }
}

impl Time {
    fn lines(&self, line: &mut impl FnMut(&str, String)) {
        let records = self.records;
        let runs =
            if records == 1 { "one run or probe".into() } else { format!("{records} runs and probes") };
        let basis = match self.basis {
            Basis::Probe => "from a probe made now".into(),
            Basis::Same => format!("from {runs} of this configuration"),
            Basis::SameModel => {
                format!("scaled from {runs} of this base with other lengths or micro-batches")
            }
            Basis::SameDevice => format!("scaled from {runs} of another model: little more than a guess"),
            Basis::Roofline => format!(
                "predicted by the roofline of {} at {:.0} % of its bound, not measured",
                self.device.as_deref().unwrap_or("this device"),
                100.0 * EFFICIENCY
            ),
        };
        let speed = significant(self.tokens_per_second, 3);
        let measured = match self.basis {
            Basis::Roofline => String::new(),
            _ => format!(" ({} tokens)", grouped(self.measured_tokens)),
        };
        line("speed", format!("{speed} tokens/s, {basis}{measured}"));
        let (least, most) = self.between;
        let parts = [
            ("training", self.parts.train),
            ("evaluation", self.parts.evaluate),
            ("checkpoints", self.parts.save),
            ("preparation", self.parts.prepare),
        ];
        let parts: Vec<String> = parts
            .iter()
            .filter(|(_, seconds)| *seconds > 0.0)
            .map(|(name, seconds)| format!("{name} {}", length(*seconds)))
            .collect();
        line(
            "time",
            format!("{} of computing ({} to {})", length(self.seconds), length(least), length(most)),
        );
        line("", parts.join(", "));
        if self.duty_known {
            line(
                "duty",
                format!("{:.0} % of the time, as earlier runs under this budget", 100.0 * self.duty),
            );
        }
    }
}

impl EnergyFacts {
    fn text(&self) -> String {
        format!(
            "{} Wh, {} Wh of them above idle; {} J a token",
            significant(self.gross.watt_hours(), 3),
            significant(self.above_idle.watt_hours(), 3),
            significant(self.per_token.0, 3)
        )
    }
}

impl Calendar {
    fn lines(&self, line: &mut impl FnMut(&str, String)) {
        for (i, night) in self.nights.iter().take(SHOWN_NIGHTS).enumerate() {
            line(if i == 0 { "nights" } else { "" }, night.text());
        }
        let more = self.nights.len().saturating_sub(SHOWN_NIGHTS);
        if more > 0 {
            line("", format!("and {more} more"));
        }
        let finish = self.finish.as_ref().map_or("never".into(), |finish| {
            let between = self.between.as_ref().filter(|(least, most)| minute(least) != minute(most));
            let between = between
                .map_or(String::new(), |(least, most)| format!(" ({} to {})", minute(least), minute(most)));
            format!("{}{between}, if it began now", minute(finish))
        });
        line("finish", finish);
    }
}

impl Night {
    fn text(&self) -> String {
        let clock = |moment: &str| moment.get(11..16).unwrap_or(moment).to_string();
        let energy = self
            .joules
            .map_or(String::new(), |joules| format!(", {} Wh", significant(joules.watt_hours(), 3)));
        let end = match self.limit {
            Limit::Complete => "complete",
            Limit::Window => "the hours end",
            Limit::EnergyQuota => "the night's energy is used up",
            Limit::EnergyOfRun => "the run's energy is used up",
            Limit::Deadline => "the deadline",
        };
        format!(
            "{} {}-{}, {} of computing, {} steps{energy}: {end}",
            self.date,
            clock(&self.from),
            clock(&self.to),
            length(self.computing),
            grouped(self.steps)
        )
    }
}

/// The day and the minute of a moment in RFC 3339.
fn minute(moment: &str) -> String {
    moment.get(..16).unwrap_or(moment).replace('T', " ")
}

/// Seconds, in words.
pub fn length(seconds: f64) -> String {
    // Longer than a Duration is longer than anybody waits.
    duration(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

/// A number with its thousands apart.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_apart() {
        assert_eq!([0, 999, 1000, 1234567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
