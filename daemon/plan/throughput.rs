//! How fast a configuration computes, from what was measured.
//!
//! A micro-batch of `w` GFLOP takes `each + per_gflop · w` seconds: what every micro-batch costs whatever its size
//! (dequantised weights, launches), and arithmetic. [`Costs`] keeps the five sums that a straight line through all
//! micro-batches needs, so that runs add up without their samples. How much a prediction may be wrong is how much the
//! records differ from each other, and at least a share that was chosen: too few predictions have been held against runs
//! to measure it (`docs/results.md`).
//!
//! | what is on record | taken | at least wrong by |
//! |---|---|---|
//! | the same configuration | the line, corrected by the median record | 10 %, of one record 15 % |
//! | the same base and adapter on this device, other lengths or micro-batches | the line, by GFLOP | 25 % |
//! | another model on this device | GFLOP per second | a factor of two |
//! | nothing of this device, but what it is | [the roofline](super::roofline) | a factor of two |

use super::roofline::Device;
use crate::units::{Joules, RunId};
use serde::{Deserialize, Serialize};

/// Records of one configuration that count: the newest.
const NEWEST: usize = 8;
/// Largest and smallest figure that a file may hold; beyond lies nonsense.
const PLAUSIBLE: f64 = 1e15;
/// A line needs so many micro-batches, and works that differ by this share of their mean (standard deviation).
const LINE_SAMPLES: u64 = 4;
const LINE_SPREAD: f64 = 0.05;
/// Share of a micro-batch's mean time that does not depend on its work; more than that is noise.
const MOST_CONSTANT: f64 = 0.9;
/// A forward pass alone reads the weights once, training twice.
const FORWARD_SHARE: f64 = 0.5;
/// Smallest errors, see the table above.
const ERROR_SAME: f64 = 0.10;
const ERROR_ONE: f64 = 0.15;
const ERROR_SAME_MODEL: f64 = 0.25;
const ERROR_SAME_DEVICE: f64 = 1.0;
const ERROR_PREDICTED: f64 = 1.0;

/// What determines how fast a run computes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Hash of the base's content.
    pub base: String,
    /// How its weights are held: `nf4-double`, `nf4`, `none`.
    pub weights: String,
    /// Rank, modules, layers and dropout of the adapter.
    pub adapter: String,
    /// Whether activations are computed again.
    pub recompute: bool,
    /// Longest sequence, in tokens.
    pub sequence_length: u64,
    /// Whether rows share sequences.
    pub packing: bool,
    /// Sequences of a micro-batch.
    pub micro_batch: u64,
    /// Backend and type of activations.
    pub backend: String,
    /// What is computed on, in words.
    pub device: String,
    /// Threads that compute.
    pub threads: u64,
}

/// The machine in the state in which it was measured. What is not known is like everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Board, in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub board: Option<String>,
    /// Power mode: `MODE_30W`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
}

impl Machine {
    fn is_like(&self, other: &Machine) -> bool {
        let alike = |a: &Option<String>, b: &Option<String>| a.is_none() || b.is_none() || a == b;
        alike(&self.board, &other.board) && alike(&self.mode, &other.mode)
    }
}

/// Sums over micro-batches: enough for a straight line through them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// Micro-batches.
    pub batches: u64,
    /// Σ work, GFLOP.
    pub gflop: f64,
    /// Σ work².
    pub gflop2: f64,
    /// Σ time, s.
    pub seconds: f64,
    /// Σ work · time.
    pub gflop_seconds: f64,
}

impl Costs {
    /// Takes in a micro-batch.
    pub fn add(&mut self, gflop: f64, seconds: f64) {
        self.merge(&Costs {
            batches: 1,
            gflop,
            gflop2: gflop * gflop,
            seconds,
            gflop_seconds: gflop * seconds,
        });
    }

    /// Takes in others.
    pub fn merge(&mut self, other: &Costs) {
        self.batches = self.batches.saturating_add(other.batches);
        self.gflop += other.gflop;
        self.gflop2 += other.gflop2;
        self.seconds += other.seconds;
        self.gflop_seconds += other.gflop_seconds;
    }

    /// The line through all, by least squares; through the origin and the mean where the works hardly differ. `None`
    /// without any work.
    pub fn line(&self) -> Option<Line> {
        if !self.is_sound() || self.batches == 0 || self.gflop <= 0.0 || self.seconds <= 0.0 {
            return None;
        }
        let n = self.batches as f64;
        let (work, time) = (self.gflop / n, self.seconds / n);
        let variance = self.gflop2 / n - work * work;
        let through_origin = Line { each: 0.0, per_gflop: time / work };
        if self.batches < LINE_SAMPLES || variance <= (LINE_SPREAD * work).powi(2) {
            return Some(through_origin);
        }
        let slope = (self.gflop_seconds / n - work * time) / variance;
        let each = (time - slope * work).clamp(0.0, MOST_CONSTANT * time);
        Some(Line { each, per_gflop: (time - each) / work })
    }

    fn is_sound(&self) -> bool {
        sound(&[self.gflop, self.gflop2, self.seconds, self.gflop_seconds])
    }
}

fn sound(values: &[f64]) -> bool {
    values.iter().all(|value| value.is_finite() && (0.0..PLAUSIBLE).contains(value))
}

/// Seconds of a micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Line {
    /// Whatever its size.
    pub each: f64,
    /// For each GFLOP.
    pub per_gflop: f64,
}

impl Line {
    /// Seconds of so many micro-batches with so much work in all.
    pub fn seconds(&self, amount: &Amount) -> f64 {
        self.each * amount.batches as f64 + self.per_gflop * amount.gflop
    }
}

/// Something that was done several times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spent {
    /// How often.
    pub times: u64,
    /// Seconds in all.
    pub seconds: f64,
}

impl Spent {
    /// Once more.
    pub fn add(&mut self, seconds: f64) {
        self.merge(&Spent { times: 1, seconds });
    }

    fn merge(&mut self, other: &Spent) {
        self.times = self.times.saturating_add(other.times);
        self.seconds += other.seconds;
    }

    fn mean(&self) -> Option<f64> {
        (self.times > 0).then(|| self.seconds / self.times as f64)
    }
}

/// What a run, or a probe, took.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The configuration.
    pub setup: Setup,
    /// Tokens of the micro-batches that were learnt from.
    pub tokens: u64,
    /// Micro-batches of training.
    pub train: Costs,
    /// Micro-batches of evaluation.
    pub eval: Costs,
    /// Updates of the adapter.
    pub updates: Spent,
    /// Checkpoints.
    pub saves: Spent,
    /// Preparations: reading data and base, up to the first micro-batch.
    pub preparations: Spent,
}

impl Measured {
    /// Nothing yet.
    pub fn nothing(setup: Setup) -> Measured {
        Measured {
            setup,
            tokens: 0,
            train: Costs::default(),
            eval: Costs::default(),
            updates: Spent::default(),
            saves: Spent::default(),
            preparations: Spent::default(),
        }
    }

    fn merge(&mut self, other: &Measured) {
        self.tokens = self.tokens.saturating_add(other.tokens);
        self.train.merge(&other.train);
        self.eval.merge(&other.eval);
        self.updates.merge(&other.updates);
        self.saves.merge(&other.saves);
        self.preparations.merge(&other.preparations);
    }

    /// Seconds of computing, without preparation.
    fn seconds(&self) -> f64 {
        self.train.seconds + self.eval.seconds + self.updates.seconds + self.saves.seconds
    }

    /// What was taken since the last time, which begins anew; `None` where nothing was trained.
    pub fn take(&mut self) -> Option<Measured> {
        let nothing = Measured::nothing(self.setup.clone());
        (self.train.batches > 0).then(|| std::mem::replace(self, nothing))
    }
}

/// Where a record comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A run.
    Run,
    /// A probe.
    Probe,
}

/// A line of the history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// When it was written, in microseconds since 1970.
    pub time_us: u64,
    /// Where it comes from.
    pub origin: Origin,
    /// The daemon's run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunId>,
    /// The machine.
    #[serde(flatten)]
    pub machine: Machine,
    /// Share of the time that the governor let it compute, of the time in which nothing held it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duty: Option<f64>,
    /// The set-points under which it did, as one text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<String>,
    /// Energy of a token of the whole run so far, where there was a meter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub energy: Option<PerToken>,
    /// The figures.
    #[serde(flatten)]
    pub measured: Measured,
}

impl Record {
    /// Whether the figures can be figures: a file may say anything.
    pub fn is_sound(&self) -> bool {
        let m = &self.measured;
        let spent = [m.updates.seconds, m.saves.seconds, m.preparations.seconds];
        m.train.line().is_some()
            && m.eval.is_sound()
            && sound(&spent)
            && self.duty.is_none_or(|duty| duty > 0.0 && duty <= 1.0)
            && self.energy.is_none_or(|energy| sound(&[energy.gross.0, energy.above_idle.0]))
    }

    /// Power while it computed or prepared, in W: gross, and above idle.
    fn watts(&self) -> Option<(f64, f64)> {
        let Measured { preparations, .. } = self.measured;
        // What a run's tokens took, its preparations took a part of.
        let (energy, seconds) = (self.energy?, self.measured.seconds() + preparations.seconds);
        let rate = self.measured.tokens as f64 / seconds;
        (rate.is_finite() && rate > 0.0).then_some((energy.gross.0 * rate, energy.above_idle.0 * rate))
    }
}

/// How much there is of something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Amount {
    /// Micro-batches.
    pub batches: u64,
    /// Work, GFLOP.
    pub gflop: f64,
    /// What it moves between memory and chip, GB.
    pub gigabytes: f64,
}

impl std::ops::AddAssign for Amount {
    fn add_assign(&mut self, other: Amount) {
        self.batches = self.batches.saturating_add(other.batches);
        self.gflop += other.gflop;
        self.gigabytes += other.gigabytes;
    }
}

/// Everything that a run does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// Steps.
    pub steps: u64,
    /// Tokens that are learnt from.
    pub tokens: u64,
    /// Micro-batches of training.
    pub train: Amount,
    /// Evaluations.
    pub evaluations: u64,
    /// Micro-batches of all evaluations.
    pub eval: Amount,
    /// Checkpoints, where every evaluation finds the adapter better.
    pub saves: u64,
}

/// How near the records are to what is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Likeness {
    /// The same configuration.
    Same,
    /// The same base and adapter on this device; another shape of micro-batches.
    SameModel,
    /// Another model on this device.
    SameDevice,
    /// There are none: the roofline's prediction.
    Predicted,
}

/// The likeness of two configurations; `None` of different devices.
fn likeness(a: &Setup, b: &Setup) -> Option<Likeness> {
    if (&a.backend, &a.device, a.threads) != (&b.backend, &b.device, b.threads) {
        None
    } else if a == b {
        Some(Likeness::Same)
    } else if (&a.base, &a.weights, &a.adapter) == (&b.base, &b.weights, &b.adapter) {
        Some(Likeness::SameModel)
    } else {
        Some(Likeness::SameDevice)
    }
}

/// How fast a configuration computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Speed {
    train: Line,
    eval: Line,
    update: f64,
    save: f64,
    prepare: f64,
    /// What it rests on.
    pub likeness: Likeness,
    /// How many records.
    pub records: u64,
    /// Tokens of these records.
    pub tokens: u64,
    /// It may take longer by this share, or as many times shorter.
    pub error: f64,
    /// Share of the time that the governor let such runs compute under this budget, where that is known.
    pub duty: Option<f64>,
    /// Power while it computes, in W: gross, and above idle.
    pub watts: Option<(f64, f64)>,
}

/// Seconds of computing, by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Parts {
    /// Reading data and base.
    pub prepare: f64,
    /// Training.
    pub train: f64,
    /// Evaluations.
    pub evaluate: f64,
    /// Checkpoints.
    pub save: f64,
}

impl Parts {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.prepare + self.train + self.evaluate + self.save
    }
}

impl Speed {
    /// What the records say about `setup` on `machine`, with the governor under `budget`. `None` without any record of
    /// this device.
    pub fn of(records: &[Record], setup: &Setup, machine: &Machine, budget: Option<&str>) -> Option<Speed> {
        let near = |record: &&Record| record.is_sound() && record.machine.is_like(machine);
        let known = records
            .iter()
            .filter(near)
            .filter_map(|record| Some((likeness(&record.measured.setup, setup)?, record)));
        let mut known: Vec<(Likeness, &Record)> = known.collect();
        let likeness = known.iter().map(|(likeness, _)| *likeness).min()?;
        known.retain(|(of, _)| *of == likeness);
        known.sort_by_key(|(_, record)| std::cmp::Reverse(record.time_us));
        known.truncate(NEWEST);
        let records: Vec<&Record> = known.into_iter().map(|(_, record)| record).collect();

        let mut all = Measured::nothing(setup.clone());
        records.iter().for_each(|record| all.merge(&record.measured));
        let line = all.train.line()?;
        let (correction, spread) = correction(&records, line);
        let train = Line { each: line.each * correction, per_gflop: line.per_gflop * correction };
        let train = if likeness == Likeness::SameDevice {
            // What a micro-batch of another model costs beside its work is not this one's.
            Line { each: 0.0, per_gflop: all.train.seconds / all.train.gflop * correction }
        } else {
            train
        };
        let forward = Line { each: train.each * FORWARD_SHARE, per_gflop: train.per_gflop };
        let smallest = match (likeness, records.len()) {
            (Likeness::Same, 1) => ERROR_ONE,
            (Likeness::Same, _) => ERROR_SAME,
            (Likeness::SameModel, _) => ERROR_SAME_MODEL,
            (Likeness::SameDevice, _) => ERROR_SAME_DEVICE,
            (Likeness::Predicted, _) => ERROR_PREDICTED,
        };
        let duties = records.iter().filter(|record| budget.is_some() && record.budget.as_deref() == budget);
        let duties = duties.filter_map(|record| record.duty).collect::<Vec<f64>>();
        Some(Speed {
            train,
            eval: all.eval.line().filter(|_| likeness != Likeness::SameDevice).unwrap_or(forward),
            update: all.updates.mean().unwrap_or(0.0),
            save: all.saves.mean().unwrap_or(0.0),
            prepare: all.preparations.mean().unwrap_or(0.0),
            likeness,
            records: records.len() as u64,
            tokens: all.tokens,
            error: spread.max(smallest),
            duty: median(duties),
            watts: {
                let watts = || records.iter().filter_map(|record| record.watts());
                median(watts().map(|(gross, _)| gross).collect())
                    .zip(median(watts().map(|(_, above_idle)| above_idle).collect()))
            },
        })
    }

    /// What the roofline of a device says about a workload. The update, checkpoints and the preparation are not in it, and
    /// nothing is known of power.
    pub fn predicted(work: &Workload, device: &Device) -> Speed {
        let (train, eval) = device.predict_workload(work);
        let line = |seconds: f64, gflop: f64| Line {
            each: 0.0,
            per_gflop: if gflop > 0.0 { seconds / gflop } else { 0.0 },
        };
        Speed {
            train: line(train, work.train.gflop),
            eval: line(eval, work.eval.gflop),
            update: 0.0,
            save: 0.0,
            prepare: 0.0,
            likeness: Likeness::Predicted,
            records: 0,
            tokens: 0,
            error: ERROR_PREDICTED,
            duty: None,
            watts: None,
        }
    }

    /// The same where the preparation was just measured.
    pub fn prepared_in(mut self, seconds: f64) -> Speed {
        if self.prepare == 0.0 || self.likeness == Likeness::SameDevice {
            self.prepare = seconds;
        }
        self
    }

    /// Seconds of computing that a workload takes.
    pub fn parts(&self, work: &Workload) -> Parts {
        Parts {
            prepare: self.prepare,
            train: self.train.seconds(&work.train) + self.update * work.steps as f64,
            evaluate: self.eval.seconds(&work.eval),
            save: self.save * work.saves as f64,
        }
    }
}

/// What the median record took, as a multiple of what the line says, and how far the others are from it.
fn correction(records: &[&Record], line: Line) -> (f64, f64) {
    let ratios: Vec<f64> = records
        .iter()
        .map(|record| {
            let train = record.measured.train;
            train.seconds
                / line.seconds(&Amount { batches: train.batches, gflop: train.gflop, gigabytes: 0.0 })
        })
        .filter(|ratio| ratio.is_finite())
        .collect();
    let middle = median(ratios.clone()).unwrap_or(1.0);
    let spread = ratios.iter().map(|ratio| (ratio / middle - 1.0).abs()).fold(0.0, f64::max);
    (middle, spread)
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match (values.get(n / 2), n % 2) {
        (None, _) => None,
        (Some(upper), 1) => Some(*upper),
        (Some(upper), _) => Some((values[n / 2 - 1] + upper) / 2.0),
    }
}

/// Energy of a token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PerToken {
    /// All of it.
    pub gross: Joules,
    /// Above what the idle machine takes.
    pub above_idle: Joules,
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn setup() -> Setup {
        Setup {
            base: "b".into(),
            weights: "nf4".into(),
            adapter: "r8 q_proj".into(),
            recompute: false,
            sequence_length: 256,
            packing: true,
            micro_batch: 1,
            backend: "cpu".into(),
            device: "CPU".into(),
            threads: 2,
        }
    }

    /// A record of micro-batches that take 10 ms and 2 ms for each GFLOP, times `factor`.
    pub fn record(time_us: u64, factor: f64) -> Record {
        let mut measured = Measured::nothing(setup());
        for gflop in [10.0, 20.0, 30.0, 40.0] {
            measured.train.add(gflop, (0.01 + 0.002 * gflop) * factor);
            measured.tokens += 100;
        }
        measured.updates.add(0.5);
        measured.saves.add(2.0);
        measured.preparations.add(3.0);
        Record {
            time_us,
            origin: Origin::Run,
            run: None,
            machine: Machine::default(),
            duty: None,
            budget: None,
            energy: None,
            measured,
        }
    }

    fn close(value: f64, expected: f64) {
        assert!((value - expected).abs() <= 1e-9 * expected.abs().max(1.0), "{value} for {expected}");
    }

    #[test]
    fn a_line_is_found_and_predicts_every_part() {
        let work = Workload {
            steps: 4,
            tokens: 1000,
            train: Amount { batches: 100, gflop: 5000.0, gigabytes: 0.0 },
            evaluations: 2,
            eval: Amount { batches: 10, gflop: 100.0, gigabytes: 0.0 },
            saves: 3,
        };
        let speed = Speed::of(&[record(1, 1.0)], &setup(), &Machine::default(), None).unwrap();
        let parts = speed.parts(&work);
        // 100 · 0.01 + 5000 · 0.002 + 4 · 0.5; a forward pass costs half of what each costs.
        close(parts.train, 13.0);
        close(parts.evaluate, 10.0 * 0.005 + 0.2);
        close(parts.save, 6.0);
        close(parts.total(), 3.0 + 13.0 + 0.25 + 6.0);
        assert_eq!((speed.likeness, speed.error), (Likeness::Same, ERROR_ONE));
    }

    #[test]
    fn a_prediction_is_the_bound_at_60_per_cent() {
        let device = Device { name: "a chip".into(), flops: 1e12, bandwidth: 1e11 };
        let work = Workload {
            train: Amount { batches: 7, gflop: 3000.0, gigabytes: 100.0 },
            eval: Amount { batches: 3, gflop: 300.0, gigabytes: 60.0 },
            evaluations: 1,
            ..Workload::default()
        };
        let speed = Speed::predicted(&work, &device);
        let parts = speed.parts(&work);
        // 3 s of arithmetic, 1 s of bytes; 0.3 s and 0.6 s.
        close(parts.train, 3.0 / 0.6);
        close(parts.evaluate, 0.6 / 0.6);
        close(parts.total(), 6.0);
        assert_eq!((speed.likeness, speed.error), (Likeness::Predicted, ERROR_PREDICTED));
        let nothing = Workload::default();
        close(Speed::predicted(&nothing, &device).parts(&nothing).total(), 0.0);
    }

    #[test]
    fn works_that_do_not_differ_make_a_rate() {
        let mut costs = Costs::default();
        (0..100).for_each(|i| costs.add(10.0, 0.03 + 0.001 * f64::from(i % 2)));
        let line = costs.line().unwrap();
        assert_eq!(line.each, 0.0);
        close(line.per_gflop, 0.00305);
        assert_eq!(Costs::default().line(), None);
        // Times that fall as work grows are noise: no time is below zero.
        let mut falling = Costs::default();
        (1..10).for_each(|i| falling.add(f64::from(i), 1.0 / f64::from(i)));
        let line = falling.line().unwrap();
        assert!(line.each >= 0.0 && line.per_gflop > 0.0, "{line:?}");
    }

    #[test]
    fn a_night_on_a_busy_machine_does_not_move_the_median() {
        let records = [record(1, 1.0), record(2, 1.02), record(3, 3.0)];
        let speed = Speed::of(&records, &setup(), &Machine::default(), None).unwrap();
        let work =
            Workload { train: Amount { batches: 4, gflop: 100.0, gigabytes: 0.0 }, ..Workload::default() };
        close(speed.parts(&work).train, 0.24 * 1.02);
        assert!(speed.error > 1.9, "but it is told: {}", speed.error);
        // Only the newest count.
        let many: Vec<Record> = (0..20).map(|i| record(i, if i < 12 { 9.0 } else { 1.0 })).collect();
        let speed = Speed::of(&many, &setup(), &Machine::default(), None).unwrap();
        close(speed.parts(&work).train, 0.24);
        assert_eq!((speed.records, speed.error), (8, ERROR_SAME));
    }

    #[test]
    fn the_nearest_configuration_is_taken_and_its_distance_told() {
        let longer = Setup { sequence_length: 1024, recompute: true, ..setup() };
        let other = Setup { base: "c".into(), ..setup() };
        let elsewhere = Setup { device: "GPU".into(), ..setup() };
        let records = [record(1, 1.0)];
        let of = |setup: &Setup| Speed::of(&records, setup, &Machine::default(), None);
        assert_eq!(of(&longer).unwrap().likeness, Likeness::SameModel);
        let scaled = of(&other).unwrap();
        assert_eq!(scaled.likeness, Likeness::SameDevice);
        // 0.24 s for 100 GFLOP.
        let work =
            Workload { train: Amount { batches: 1, gflop: 1000.0, gigabytes: 0.0 }, ..Workload::default() };
        close(scaled.parts(&work).train, 2.4);
        assert_eq!(of(&elsewhere), None);
        let mode = |mode: &str| Machine { mode: Some(mode.into()), ..Machine::default() };
        let slow = [Record { machine: mode("MODE_15W"), ..record(1, 1.0) }];
        assert_eq!(Speed::of(&slow, &setup(), &mode("MODE_30W"), None), None);
        assert!(Speed::of(&slow, &setup(), &Machine::default(), None).is_some());
    }

    #[test]
    fn the_duty_is_that_of_the_same_budget() {
        let with = |duty: f64, budget: &str| Record {
            duty: Some(duty),
            budget: Some(budget.into()),
            ..record(1, 1.0)
        };
        let records = [with(0.4, "85 °C"), with(0.6, "85 °C"), with(0.9, "95 °C")];
        let of = |budget| Speed::of(&records, &setup(), &Machine::default(), budget).unwrap().duty;
        assert_eq!(of(Some("85 °C")), Some(0.5));
        assert_eq!((of(Some("60 °C")), of(None)), (None, None));
    }

    #[test]
    fn power_is_what_the_tokens_took_while_it_prepared_and_computed() {
        // 400 tokens of 10 J in 3 s of preparation and 0.24 + 0.5 + 2 s of computing.
        let energy = Some(PerToken { gross: Joules(10.0), above_idle: Joules(8.0) });
        let metered = Record { energy, ..record(1, 1.0) };
        let speed = Speed::of(&[metered, record(2, 1.0)], &setup(), &Machine::default(), None).unwrap();
        let (gross, above_idle) = speed.watts.unwrap();
        close(gross, 4000.0 / 5.74);
        close(above_idle, 3200.0 / 5.74);
        // The same run again takes the same energy.
        let work = Workload {
            steps: 1,
            train: Amount { batches: 4, gflop: 100.0, gigabytes: 0.0 },
            saves: 1,
            ..Workload::default()
        };
        close(gross * speed.parts(&work).total(), 4000.0);
    }

    #[test]
    fn nonsense_is_not_believed() {
        let mut bad = record(1, 1.0);
        bad.measured.train.seconds = f64::NAN;
        assert!(!bad.is_sound());
        let mut bad = record(1, 1.0);
        bad.measured.saves.seconds = -1.0;
        assert!(!bad.is_sound());
        assert!(!Record { duty: Some(0.0), ..record(1, 1.0) }.is_sound());
        assert_eq!(Speed::of(&[bad], &setup(), &Machine::default(), None), None);
    }
}
