//! What a person sees of a run: a bar on a terminal, plain lines otherwise.
//!
//! ```text
//!   training [=========>                ]  46/120  loss 1.2345  eval 1.3010  312 tok/s  2 min 10 s left
//!
//!   step 46/120 loss 1.2345 grad_norm 0.51 lr 2.0e-4 312 tok/s
//! ```
//!
//! Lines go to standard output, one per step: they can be piped, and a log shows them. The bar goes to standard error.
//! What should outlast the bar (evaluations, checkpoints, notes) is written above it.

use super::arguments::shown;
use super::console;
use crate::clock::Clock;
use crate::train::observer::{Event, Observer};
pub use crate::units::duration;
use crate::units::{Bytes, significant};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;

/// Parts of a step that the bar tells apart.
const PARTS: u64 = 1000;

/// Shows a run while it goes on.
pub struct Progress<'a> {
    view: View,
    clock: &'a dyn Clock,
    total: u64,
    /// What was announced last of the preparation.
    preparing: &'static str,
    /// Where this attempt started: position in parts of steps, and when.
    start: Option<(u64, Duration)>,
    loss: Option<f64>,
    eval_loss: Option<f64>,
    tokens_per_second: Option<f64>,
    counts: Counts,
}

/// What happened while it was shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Training began or went on.
    pub started: bool,
    /// It went on from a checkpoint.
    pub resumed: bool,
    /// Steps done in this attempt.
    pub steps: u64,
    /// Checkpoints written in this attempt.
    pub checkpoints: u64,
}

enum View {
    /// The second takes the bar away when it is dropped.
    Bar(ProgressBar, console::Shown),
    Lines,
    /// Notes on standard error, nothing else: standard output belongs to the command's result.
    Notes,
}

impl<'a> Progress<'a> {
    /// A bar where somebody watches, lines otherwise.
    pub fn new(clock: &'a dyn Clock) -> Self {
        Self::or_else(clock, View::Lines)
    }

    /// A bar where somebody watches, nothing but notes otherwise: for commands that prepare and do not train.
    pub fn of_preparation(clock: &'a dyn Clock) -> Self {
        Self::or_else(clock, View::Notes)
    }

    fn or_else(clock: &'a dyn Clock, view: View) -> Self {
        let view = if console::interactive() {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            // The time in a message that never changes would look like a hang: tick on.
            bar.enable_steady_tick(Duration::from_millis(500));
            let shown = console::show(&bar);
            View::Bar(bar, shown)
        } else {
            view
        };
        Self {
            view,
            clock,
            total: 0,
            preparing: "",
            start: None,
            loss: None,
            eval_loss: None,
            tokens_per_second: None,
            counts: Counts::default(),
        }
    }

    /// What happened so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    fn remember(&mut self, event: &Event) {
        match event {
            Event::Started { step, total, resumed, .. } => {
                self.counts.started = true;
                self.counts.resumed = *resumed;
                self.total = *total;
                self.start = Some((step * PARTS, self.clock.monotonic()));
            }
            Event::Step(record) => {
                self.counts.steps += 1;
                self.loss = Some(record.loss);
                self.tokens_per_second = Some(record.tokens_per_second);
            }
            Event::Evaluated { record, .. } => self.eval_loss = Some(record.eval_loss),
            Event::Committed { .. } => self.counts.checkpoints += 1,
            _ => {}
        }
    }

    /// The line of an event, if it has one.
    fn line(&self, event: &Event) -> Option<String> {
        let total = self.total;
        Some(match event {
            Event::Preparing { what, total: 0, .. } => (*what).to_string(),
            Event::Preparing { what, total, .. } if is_bytes(what) => format!("{what}: {}", Bytes(*total)),
            Event::Preparing { what, total, .. } => format!("{what}: {total} layers"),
            Event::Note(text) => format!("note: {text}"),
            Event::Started { step, total, resumed: true, .. } => format!("resumed at step {step}/{total}"),
            Event::Started { step, total, .. } => format!("start at step {step}/{total}"),
            Event::Step(r) => format!(
                "step {}/{total} loss {:.4} grad_norm {} lr {:.1e} {} tok/s",
                r.step,
                r.loss,
                significant(r.grad_norm, 2),
                r.learning_rate,
                significant(r.tokens_per_second, 3),
            ),
            Event::Evaluated { record: r, .. } => {
                format!("eval {}/{total} eval_loss {:.4}", r.step, r.eval_loss)
            }
            Event::Committed { path, .. } => format!("checkpoint {}", shown(path)),
            Event::Stopped(reason) => format!("stopped: {reason}"),
            Event::Refused { request, why } => format!("request {request} refused: {why}"),
            Event::MicroStep { .. } | Event::Evaluating(..) | Event::Saving | Event::Measured(_) => {
                return None;
            }
        })
    }

    /// The bar's figures.
    fn figures(&self, position: u64) -> String {
        let mut parts = vec![format!("{}/{}", position / PARTS, self.total)];
        parts.extend(self.loss.map(|loss| format!("loss {loss:.4}")));
        parts.extend(self.eval_loss.map(|loss| format!("eval {loss:.4}")));
        parts.extend(self.tokens_per_second.map(|speed| format!("{} tok/s", significant(speed, 3))));
        parts.extend(self.time_left(position).map(|left| format!("{} left", duration(left))));
        parts.join("  ")
    }

    /// Time left, at the pace of this attempt (its evaluations, checkpoints and waits included).
    fn time_left(&self, position: u64) -> Option<Duration> {
        let (from, started) = self.start?;
        let done = position.checked_sub(from).filter(|&done| done > 0)?;
        let elapsed = self.clock.monotonic().saturating_sub(started);
        let left = (self.total * PARTS).saturating_sub(position);
        Duration::try_from_secs_f64(elapsed.as_secs_f64() * left as f64 / done as f64).ok()
    }

    fn on_bar(&mut self, bar: &ProgressBar, event: &Event) {
        let training = |bar: &ProgressBar, position: u64, figures: String| {
            bar.set_length(self.total.max(1) * PARTS);
            bar.set_position(position);
            bar.set_prefix("training");
            bar.set_message(figures);
        };
        match event {
            Event::Preparing { what, done, total } => {
                bar.set_style(style(*total > 0));
                bar.set_length(*total);
                bar.set_position(*done);
                bar.set_prefix(*what);
                bar.set_message(if is_bytes(what) && *total > 0 {
                    format!("{} of {}", Bytes(*done), Bytes(*total))
                } else {
                    String::new()
                });
            }
            Event::Started { step, .. } => {
                bar.set_style(style(true));
                training(bar, step * PARTS, self.figures(step * PARTS));
            }
            Event::MicroStep { step, done, of, .. } => {
                let position = step * PARTS + PARTS * *done as u64 / (*of).max(1) as u64;
                training(bar, position, self.figures(position));
            }
            Event::Step(record) => training(bar, record.step * PARTS, self.figures(record.step * PARTS)),
            Event::Evaluating(done, of) => bar.set_prefix(format!("evaluating {done}/{of}")),
            Event::Evaluated { .. } | Event::Committed { .. } | Event::Refused { .. } | Event::Note(_) => {
                if let Some(line) = self.line(event) {
                    bar.println(line);
                }
                if matches!(event, Event::Evaluated { .. }) {
                    bar.set_prefix("training");
                }
            }
            Event::Saving | Event::Stopped(_) | Event::Measured(_) => {}
        }
    }
}

impl Observer for Progress<'_> {
    fn observe(&mut self, event: Event) {
        self.remember(&event);
        if let View::Bar(bar, _) = &self.view {
            let bar = bar.clone();
            return self.on_bar(&bar, &event);
        }
        if let View::Notes = self.view {
            if let Event::Note(text) = event {
                console::message(&format!("note: {text}"));
            }
            return;
        }
        if let Event::Preparing { what, .. } = event {
            if self.preparing == what {
                return;
            }
            self.preparing = what;
        }
        if let Some(line) = self.line(&event) {
            console::line(&line);
        }
    }
}

/// Whether the amounts of a stage of the preparation are bytes; else they are layers.
fn is_bytes(what: &str) -> bool {
    what.ends_with("data")
}

fn style(known: bool) -> ProgressStyle {
    let template = if known { "{prefix} [{bar:26}] {wide_msg}" } else { "{prefix} {spinner} {wide_msg}" };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::observer::{EvaluationRecord, StepRecord};
    use std::sync::Mutex;
    use std::time::SystemTime;

    struct Hand(Mutex<Duration>);

    impl Clock for Hand {
        fn monotonic(&self) -> Duration {
            *self.0.lock().unwrap()
        }
        fn wall(&self) -> SystemTime {
            SystemTime::UNIX_EPOCH
        }
        fn sleep(&self, duration: Duration) {
            *self.0.lock().unwrap() += duration;
        }
    }

    fn step(step: u64) -> Event {
        Event::Step(StepRecord {
            step,
            epoch: 0.1,
            loss: 1.23451,
            grad_norm: 0.512,
            learning_rate: 2e-4,
            tokens: 624,
            tokens_per_second: 312.4,
        })
    }

    #[test]
    fn lines_hold_what_a_log_needs() {
        let clock = Hand(Mutex::default());
        let mut progress = Progress { view: View::Lines, ..Progress::new(&clock) };
        let started = Event::Started { step: 10, within: 3, total: 120, resumed: true };
        progress.remember(&started);
        assert_eq!(progress.line(&started).unwrap(), "resumed at step 10/120");
        assert_eq!(
            progress.line(&step(12)).unwrap(),
            "step 12/120 loss 1.2345 grad_norm 0.51 lr 2.0e-4 312 tok/s"
        );
        let record = EvaluationRecord { step: 12, eval_loss: 2.0 };
        let eval = Event::Evaluated { record, request: None };
        assert_eq!(progress.line(&eval).unwrap(), "eval 12/120 eval_loss 2.0000");
        assert_eq!(progress.line(&Event::Evaluating(0, 3)), None);
    }

    #[test]
    fn time_left_is_told_from_this_attempt() {
        let clock = Hand(Mutex::default());
        let mut progress = Progress { view: View::Lines, ..Progress::new(&clock) };
        clock.sleep(Duration::from_secs(100)); // preparing does not count
        progress.remember(&Event::Started { step: 10, within: 0, total: 30, resumed: true });
        assert_eq!(progress.time_left(10 * PARTS), None);
        clock.sleep(Duration::from_secs(60));
        progress.remember(&step(15));
        // 5 steps took 60 s; 15 are left.
        assert_eq!(progress.time_left(15 * PARTS), Some(Duration::from_secs(180)));
        assert_eq!(progress.figures(15 * PARTS), "15/30  loss 1.2345  312 tok/s  3 min 0 s left");
        assert_eq!(progress.counts(), Counts { started: true, resumed: true, steps: 1, checkpoints: 0 });
    }
}
