//! Learning-rate schedules, as transformers defines them (`optimization.py`: `get_constant_schedule_with_warmup`,
//! `get_linear_schedule_with_warmup`, `get_cosine_schedule_with_warmup`).

use crate::config::spec::{LrScheduler, TrainSpec};

/// Learning rate as a function of the step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    kind: LrScheduler,
    peak: f64,
    warmup: u64,
    total: u64,
}

impl Schedule {
    /// The schedule of a run of `total` steps. A warm-up ratio is rounded up, as `TrainingArguments.get_warmup_steps`
    /// does.
    pub fn new(spec: &TrainSpec, total: u64) -> Self {
        let warmup = spec.warmup_steps.unwrap_or_else(|| (total as f64 * spec.warmup_ratio).ceil() as u64);
        Self { kind: spec.lr_scheduler, peak: spec.learning_rate, warmup, total }
    }

    /// Learning rate of the update that follows `step` completed updates.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let factor = if step < self.warmup {
            step as f64 / self.warmup.max(1) as f64
        } else {
            match self.kind {
                LrScheduler::Constant => 1.0,
                LrScheduler::Linear => {
                    self.total.saturating_sub(step) as f64
                        / self.total.saturating_sub(self.warmup).max(1) as f64
                }
                LrScheduler::Cosine => {
                    let progress =
                        (step - self.warmup) as f64 / self.total.saturating_sub(self.warmup).max(1) as f64;
                    // Half a cosine: cycles = 0.5 in transformers.
                    (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
                }
            }
        };
        self.peak * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: LrScheduler) -> Schedule {
        Schedule { kind, peak: 2.0, warmup: 4, total: 12 }
    }

    #[test]
    fn warm_up_starts_at_zero_and_reaches_the_peak() {
        for kind in [LrScheduler::Constant, LrScheduler::Linear, LrScheduler::Cosine] {
            let s = schedule(kind);
            assert_eq!((0..=4).map(|i| s.learning_rate(i)).collect::<Vec<_>>(), [0.0, 0.5, 1.0, 1.5, 2.0]);
        }
    }

    #[test]
    fn the_tail_has_the_shape_of_its_name() {
        assert_eq!(schedule(LrScheduler::Constant).learning_rate(11), 2.0);
        assert_eq!(schedule(LrScheduler::Linear).learning_rate(8), 1.0);
        assert_eq!(schedule(LrScheduler::Linear).learning_rate(12), 0.0);
        assert!((schedule(LrScheduler::Cosine).learning_rate(8) - 1.0).abs() < 1e-15);
        assert!(schedule(LrScheduler::Cosine).learning_rate(12) < 1e-15);
    }
}
