//! A run as the bus shows it, and as text and JSON show it.

use super::text;
use crate::bus::Dictionary;
use crate::reason::Reason;
use crate::units::{Bytes, duration, significant};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};
use std::time::Duration;
use zbus::OwnedVariant;

/// The properties of a run. What the bus has no value for (0, NaN or 2⁶⁴ − 1 there) is absent here.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    /// Twelve hexadecimal digits.
    pub id: String,
    /// Name, as it was given: print it with care.
    pub name: String,
    /// Uid.
    pub owner: u32,
    /// Microseconds since 1970, as all times here.
    pub created_us: u64,
    /// When its first attempt began.
    pub started_us: Option<u64>,
    /// When it ended.
    pub finished_us: Option<u64>,
    /// The word of its state.
    pub state: String,
    /// Why; empty when there is nothing to say.
    pub reason: String,
    /// Higher goes first.
    pub priority: i32,
    /// Completed steps.
    pub step: u64,
    /// Steps in all.
    pub total_steps: Option<u64>,
    /// Passes over the data.
    pub epoch: f64,
    /// Training loss of the last step.
    pub loss: Option<f64>,
    /// Last held-out loss.
    pub eval_loss: Option<f64>,
    /// Tokens per second of computing.
    pub tokens_per_second: Option<f64>,
    /// 0 to 1.
    pub progress: f64,
    /// Seconds of training left.
    pub remaining_seconds: Option<u64>,
    /// Attempts begun.
    pub attempts: u32,
    /// Completed steps of the last durable checkpoint.
    pub checkpoint_step: Option<u64>,
    /// Resident memory of the worker.
    pub memory_bytes: u64,
    /// Joules that the machine took while its worker computed.
    pub energy_j: Option<f64>,
    /// The same without what the idle machine would have taken.
    pub energy_above_idle_j: Option<f64>,
    /// Per token that was trained on.
    pub joules_per_token: Option<f64>,
    /// Of the last step.
    pub step_energy_j: Option<f64>,
    /// When it should be done.
    pub deadline_us: Option<u64>,
    /// It will not be done by then.
    pub deadline_at_risk: bool,
}

impl Figures {
    /// The run with these properties.
    pub fn new(properties: &Dictionary) -> Figures {
        let mut figures = Figures::default();
        figures.apply(properties);
        figures
    }

    /// Takes over the properties that are given; unknown ones, and those of a type that is not expected, are ignored.
    pub fn apply(&mut self, properties: &Dictionary) {
        for (name, value) in properties {
            match name.as_str() {
                "Id" => set(&mut self.id, string(value)),
                "Name" => set(&mut self.name, string(value)),
                "Owner" => set(&mut self.owner, u32::try_from(value).ok()),
                "Created" => set(&mut self.created_us, u64::try_from(value).ok()),
                "Started" => set(&mut self.started_us, u64::try_from(value).ok().map(unless(0))),
                "Finished" => set(&mut self.finished_us, u64::try_from(value).ok().map(unless(0))),
                "State" => set(&mut self.state, string(value)),
                "Reason" => set(&mut self.reason, string(value)),
                "Priority" => set(&mut self.priority, i32::try_from(value).ok()),
                "Step" => set(&mut self.step, u64::try_from(value).ok()),
                "TotalSteps" => set(&mut self.total_steps, u64::try_from(value).ok().map(unless(0))),
                "Epoch" => set(&mut self.epoch, f64::try_from(value).ok().filter(|v| v.is_finite())),
                "Loss" => set(&mut self.loss, f64::try_from(value).ok().map(finite)),
                "EvalLoss" => set(&mut self.eval_loss, f64::try_from(value).ok().map(finite)),
                "TokensPerSecond" => {
                    set(&mut self.tokens_per_second, f64::try_from(value).ok().map(finite));
                }
                "Progress" => {
                    let share = f64::try_from(value).ok().filter(|v| v.is_finite());
                    set(&mut self.progress, share.map(|share| share.clamp(0.0, 1.0)));
                }
                "RemainingSeconds" => {
                    set(&mut self.remaining_seconds, u64::try_from(value).ok().map(unless(u64::MAX)));
                }
                "Attempts" => set(&mut self.attempts, u32::try_from(value).ok()),
                "CheckpointStep" => {
                    set(&mut self.checkpoint_step, u64::try_from(value).ok().map(unless(u64::MAX)));
                }
                "Deadline" => set(&mut self.deadline_us, u64::try_from(value).ok().map(unless(0))),
                "DeadlineAtRisk" => set(&mut self.deadline_at_risk, bool::try_from(value).ok()),
                "MemoryBytes" => set(&mut self.memory_bytes, u64::try_from(value).ok()),
                "Energy" => set(&mut self.energy_j, f64::try_from(value).ok().map(finite)),
                "EnergyAboveIdle" => {
                    set(&mut self.energy_above_idle_j, f64::try_from(value).ok().map(finite));
                }
                "JoulesPerToken" => set(&mut self.joules_per_token, f64::try_from(value).ok().map(finite)),
                "StepEnergy" => set(&mut self.step_energy_j, f64::try_from(value).ok().map(finite)),
                _ => {}
            }
        }
    }

    /// Nothing follows.
    pub fn is_over(&self) -> bool {
        matches!(self.state.as_str(), "succeeded" | "failed" | "cancelled")
    }

    /// The object that every `--json` shows of a run.
    pub fn json(&self) -> Value {
        json!({
            "id": self.id,
            "name": self.name,
            "owner": self.owner,
            "state": self.state,
            "reason": some(&self.reason),
            "priority": self.priority,
            "created_us": self.created_us,
            "started_us": self.started_us,
            "finished_us": self.finished_us,
            "step": self.step,
            "total_steps": self.total_steps,
            "epoch": self.epoch,
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "tokens_per_second": self.tokens_per_second,
            "progress": self.progress,
            "remaining_seconds": self.remaining_seconds,
            "attempts": self.attempts,
            "checkpoint_step": self.checkpoint_step,
            "memory_bytes": self.memory_bytes,
            "energy_j": self.energy_j,
            "energy_above_idle_j": self.energy_above_idle_j,
            "joules_per_token": self.joules_per_token,
            "step_energy_j": self.step_energy_j,
            "deadline_us": self.deadline_us,
            "deadline_at_risk": self.deadline_at_risk,
        })
    }

    /// `waiting (inhibited)`.
    pub fn state_and_reason(&self) -> String {
        match self.reason.as_str() {
            "" => self.state.clone(),
            reason => format!("{} ({reason})", self.state),
        }
    }

    /// The run as messages name it: `night (3f2a91c04d7e)`, printable.
    pub fn title(&self) -> String {
        let (name, id) = (text::printable(&self.name), text::printable(&self.id));
        if name.is_empty() { id } else { format!("{name} ({id})") }
    }

    /// `46/120`, or `46` while the number of steps is unknown.
    pub fn steps(&self) -> String {
        match self.total_steps {
            Some(total) => format!("{}/{total}", self.step),
            None => self.step.to_string(),
        }
    }

    /// `38 %`. Rounded down: 100 % is complete.
    pub fn percent(&self) -> String {
        format!("{:.0} %", (self.progress * 100.0).floor())
    }

    /// `46/120  loss 1.2345  eval 1.3010  312 tok/s  2 min 10 s left`, as far as known.
    pub fn line(&self) -> String {
        let mut parts = vec![self.steps()];
        parts.extend(self.loss.map(|loss| format!("loss {loss:.4}")));
        parts.extend(self.eval_loss.map(|loss| format!("eval {loss:.4}")));
        parts.extend(self.tokens_per_second.map(|speed| format!("{} tok/s", significant(speed, 3))));
        if !self.is_over() {
            parts.extend(self.remaining_seconds.map(text::left));
            parts.extend(self.deadline_at_risk.then(|| "deadline at risk".into()));
        }
        parts.join("  ")
    }

    /// `12.3 Wh (9.10 Wh above idle), 0.31 J/token, 42 J in the last step`, as far as known.
    pub fn energy(&self) -> String {
        // Less than a millijoule is rounding.
        let whole = |joules: f64| if joules < 1e-3 { 0.0 } else { joules };
        let hours = |joules: f64| format!("{} Wh", significant(whole(joules) / 3600.0, 3));
        let Some(gross) = self.energy_j else { return String::new() };
        let mut parts = vec![match self.energy_above_idle_j {
            Some(above) => format!("{} ({} above idle)", hours(gross), hours(above)),
            None => hours(gross),
        }];
        parts.extend(self.joules_per_token.map(|joules| format!("{} J/token", significant(joules, 2))));
        parts.extend(
            self.step_energy_j.map(|joules| format!("{} J in the last step", significant(joules, 2))),
        );
        parts.join(", ")
    }

    /// The deadline as a table has room for it: `in 5 h`, `in 5 h, at risk`, `missed`; empty without one.
    pub fn due(&self, now_us: u64) -> String {
        let Some(deadline) = self.deadline_us else { return String::new() };
        let done = self.finished_us.unwrap_or(now_us);
        match deadline.checked_sub(done) {
            None => "missed".into(),
            Some(_) if self.is_over() => "kept".into(),
            Some(left) => {
                let risk = if self.deadline_at_risk { ", at risk" } else { "" };
                format!("in {}{risk}", text::age(Duration::from_micros(left)))
            }
        }
    }

    /// The page of `show`, without the head. `now_us` is the time, in microseconds since 1970.
    pub fn fields(&self, owner: &str, now_us: u64, zone: &TimeZone) -> Vec<(&'static str, String)> {
        let when = |us| format!("{} ({})", time(us, zone), ago(us, now_us));
        let share =
            |total| format!("step {} of {total} ({}), epoch {:.2}", self.step, self.percent(), self.epoch);
        let mut state = self.state_and_reason();
        if let Some(meaning) = meaning(&self.reason) {
            state.push_str(&format!(": {meaning}"));
        }
        let losses =
            [self.loss.map(|l| format!("{l:.4}")), self.eval_loss.map(|l| format!("{l:.4} held out"))];
        let speed = self.tokens_per_second.map(|speed| format!("{} tok/s", significant(speed, 3)));
        let left = self.remaining_seconds.filter(|_| !self.is_over()).map(text::left);
        let join = |parts: Vec<Option<String>>| parts.into_iter().flatten().collect::<Vec<_>>().join(", ");
        let text = |value: Option<String>| value.unwrap_or_default();
        vec![
            ("State", text::printable(&state)),
            ("Progress", self.total_steps.map_or_else(|| self.step.to_string(), share)),
            ("Loss", join(losses.into())),
            ("Speed", join(vec![speed, left])),
            ("Energy", self.energy()),
            ("Checkpoint", text(self.checkpoint_step.map(|step| format!("step {step}")))),
            ("Memory", text((self.memory_bytes > 0).then(|| Bytes(self.memory_bytes).to_string()))),
            ("Attempts", self.attempts.to_string()),
            ("Priority", self.priority.to_string()),
            ("Deadline", self.deadline(now_us, zone)),
            ("Owner", text::printable(owner)),
            ("Submitted", when(self.created_us)),
            ("Started", text(self.started_us.map(when))),
            ("Ended", text(self.finished_us.map(when))),
        ]
    }

    /// The deadline of the page: `2026-11-27 06:00:00 (in 8 h 0 min): it will not be done by then`.
    pub fn deadline(&self, now_us: u64, zone: &TimeZone) -> String {
        let Some(deadline) = self.deadline_us else { return String::new() };
        let remark = match self.due(now_us).as_str() {
            "missed" => ": missed".to_string(),
            "kept" => ": kept".to_string(),
            _ if self.deadline_at_risk => {
                ": it will not be done by then at this pace, in the hours that are left".into()
            }
            _ => String::new(),
        };
        format!("{} ({}){remark}", time(deadline, zone), distance(deadline, now_us))
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn string(value: &OwnedVariant) -> Option<String> {
    <&str>::try_from(value).ok().map(String::from)
}

fn unless(nothing: u64) -> impl Fn(u64) -> Option<u64> {
    move |value| (value != nothing).then_some(value)
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

/// The text, unless it is empty.
pub fn some(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

/// A text out of a dictionary; empty where there is none.
pub fn text_of(dictionary: &Dictionary, key: &str) -> String {
    dictionary.get(key).and_then(string).unwrap_or_default()
}

/// A number out of a dictionary; 0 where there is none.
pub fn number_of(dictionary: &Dictionary, key: &str) -> u64 {
    dictionary.get(key).and_then(|value| u64::try_from(value).ok()).unwrap_or(0)
}

/// A time of the bus as a person writes it.
pub fn time(us: u64, zone: &TimeZone) -> String {
    let timestamp = i64::try_from(us).ok().and_then(|us| Timestamp::from_microsecond(us).ok());
    match timestamp {
        Some(timestamp) => {
            timestamp.to_zoned_datetime(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string()
        }
        None => format!("{us} µs"),
    }
}

/// `2 h 1 min ago`. A clock that was set back makes it now.
pub fn ago(us: u64, now_us: u64) -> String {
    format!("{} ago", duration(Duration::from_secs(now_us.saturating_sub(us) / 1_000_000)))
}

/// `in 2 h 1 min`, or how long ago.
fn distance(us: u64, now_us: u64) -> String {
    match us.checked_sub(now_us) {
        Some(ahead) => format!("in {}", duration(Duration::from_secs(ahead / 1_000_000))),
        None => ago(us, now_us),
    }
}

/// A reason in words. Words that are not known have none.
pub fn meaning(reason: &str) -> Option<&'static str> {
    Reason::from_word(reason).map(Reason::meaning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_words() {
        for reason in Reason::ALL {
            assert!(meaning(reason.word()).is_some(), "{reason}");
        }
        assert_eq!(meaning("bored"), None);
    }

    #[test]
    fn absent_values_are_absent() {
        let value = |v: zbus::Variant<'static>| OwnedVariant::try_from(v).unwrap();
        let properties = Dictionary::from([
            ("Loss".into(), value(f64::NAN.into())),
            ("CheckpointStep".into(), value(u64::MAX.into())),
            ("RemainingSeconds".into(), value(u64::MAX.into())),
            ("TotalSteps".into(), value(0u64.into())),
            ("Finished".into(), value(0u64.into())),
            ("Step".into(), value("no number".into())),
            ("Novel".into(), value(1u8.into())),
            ("Progress".into(), value(7.0f64.into())),
        ]);
        let figures = Figures::new(&properties);
        assert_eq!(figures, Figures { progress: 1.0, ..Figures::default() });
        let json = figures.json();
        for key in ["loss", "checkpoint_step", "remaining_seconds", "total_steps", "finished_us", "reason"] {
            assert!(json[key].is_null(), "{key}");
        }
    }

    #[test]
    fn values_stay_until_they_change() {
        let mut figures = Figures { loss: Some(1.0), step: 3, ..Figures::default() };
        let nan = OwnedVariant::try_from(zbus::Variant::from(f64::NAN)).unwrap();
        figures.apply(&Dictionary::from([("Loss".into(), nan)]));
        assert_eq!((figures.loss, figures.step), (None, 3));
    }

    #[test]
    fn times_are_readable() {
        assert_eq!(time(1_700_000_000_000_000, &TimeZone::UTC), "2023-11-14 22:13:20");
        assert_eq!(time(u64::MAX, &TimeZone::UTC), format!("{} µs", u64::MAX));
        assert_eq!(ago(5_000_000, 65_000_000), "1 min 0 s ago");
        assert_eq!(ago(5_000_000, 0), "0.0 s ago");
        assert_eq!(distance(65_000_000, 5_000_000), "in 1 min 0 s");
        assert_eq!(distance(5_000_000, 65_000_000), "1 min 0 s ago");
    }

    #[test]
    fn energy_as_far_as_it_is_known() {
        let mut figures = Figures { joules_per_token: Some(0.3149), ..Figures::default() };
        assert_eq!(figures.energy(), "", "no meter");
        figures.energy_j = Some(44_400.0);
        assert_eq!(figures.energy(), "12.3 Wh, 0.31 J/token");
        (figures.energy_above_idle_j, figures.step_energy_j) = (Some(32_760.0), Some(41.6));
        assert_eq!(figures.energy(), "12.3 Wh (9.10 Wh above idle), 0.31 J/token, 42 J in the last step");
    }

    #[test]
    fn a_deadline_is_ahead_kept_or_missed() {
        let hours = |hours: u64| hours * 3_600_000_000;
        let run =
            |state: &str| Figures { state: state.into(), deadline_us: Some(hours(10)), ..Figures::default() };
        assert_eq!(run("running").due(hours(5)), "in 5 h");
        assert_eq!(Figures { deadline_at_risk: true, ..run("running") }.due(hours(5)), "in 5 h, at risk");
        assert_eq!(Figures { deadline_at_risk: true, ..run("running") }.due(hours(11)), "missed");
        assert_eq!(Figures { finished_us: Some(hours(9)), ..run("succeeded") }.due(hours(99)), "kept");
        assert_eq!(Figures { finished_us: Some(hours(11)), ..run("succeeded") }.due(hours(99)), "missed");
        assert_eq!(Figures::default().due(hours(5)), "");
    }

    #[test]
    fn percent_is_whole_only_when_complete() {
        let at = |progress| Figures { progress, ..Figures::default() }.percent();
        assert_eq!([at(0.0), at(0.999), at(1.0)], ["0 %", "99 %", "100 %"]);
    }
}
