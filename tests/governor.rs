//! The governor in a closed loop with simulated machines: overshoot, throughput, swings; sensors that lie; readings that
//! make no sense. The figures are printed (`cargo test --test governor -- --nocapture`).

#[path = "governor/plant.rs"]
mod plant;

use finetuned::config::budget::Budget;
use finetuned::governor::control::{Decision, Level, State, step};
use finetuned::governor::readings::*;
use finetuned::reason::Reason;
use finetuned::units::{Bytes, Celsius, Watts};
use plant::{DT, Fault, Plant, Random, Swings, Thermometer, readings};
use proptest::prelude::*;
use std::time::Duration;

/// Seconds of simulated time between two rounds of the governor, in steps of the plant.
const ROUND: usize = 5;
/// Where the kernel of an AGX Orin begins to throttle.
const TRIP: f64 = 99.0;

/// What a run of the loop came to.
#[derive(Clone, Copy, Debug, Default)]
struct Outcome {
    /// Largest temperature above the set-point while something computed, °C.
    overshoot: f64,
    /// Hottest, °C.
    hottest: f64,
    /// Mean share that computed, and that of the oracle.
    duty: f64,
    oracle: f64,
    /// Swings of more than 10 °C an hour.
    swings: f64,
    /// Largest mean power over 10 s relative to its limit, after the first minute.
    power: f64,
    /// Distinct moments at which computing was forbidden.
    holds: usize,
}

/// The machine, the governor and the oracle, for so many seconds. `disturb` is called each round.
struct Loop {
    plant: Plant,
    thermometer: Thermometer,
    random: Random,
    budget: Budget,
    state: State,
    decision: Decision,
}

impl Loop {
    fn draw(seed: u64) -> Loop {
        let mut random = Random(seed);
        let plant = Plant::draw(&mut random);
        let resolution = [0.03125, 0.5, 1.0][(random.next() % 3) as usize];
        let thermometer = Thermometer::new(random.uniform(0.02, 0.25), resolution);
        let mut budget = Budget::default();
        if random.next().is_multiple_of(3) {
            let share = random.uniform(0.3, 1.1);
            budget.power = Some(Watts(plant.idle + share * plant.full));
        }
        Loop { plant, thermometer, random, budget, state: State::default(), decision: Decision::default() }
    }

    fn run(
        &mut self,
        seconds: f64,
        mut disturb: impl FnMut(&mut Plant, &mut Thermometer, &mut Random),
    ) -> Outcome {
        let mut outcome = Outcome::default();
        let mut best = self.plant.clone();
        let mut swings = Swings::new(10.0);
        let set = self.budget.temperature.0;
        let limit = self.budget.power.map(|power| power.0);
        let (mut metered, mut average) = (self.plant.idle, self.plant.idle);
        let steps = (seconds / DT).round() as usize;
        let start = self.plant.at;
        for i in 0..steps {
            if i % ROUND == 0 {
                disturb(&mut self.plant, &mut self.thermometer, &mut self.random);
                (best.fan, best.other) = (self.plant.fan, self.plant.other);
                let now = Duration::from_secs_f64(1000.0 + self.plant.at);
                let read = readings(&self.plant, &mut self.thermometer, metered, now, &mut self.random);
                let held = self.decision.duty == 0.0;
                (self.state, self.decision) = step(&self.state, &read, &self.budget, now);
                outcome.holds += usize::from(self.decision.duty == 0.0 && !held);
                metered = 0.0;
            }
            // The worker computes the first share of each second.
            let phase = (i % 10) as f64 / 10.0;
            let computing = ((self.decision.duty - phase) * 10.0).clamp(0.0, 1.0);
            let power = self.plant.power(computing);
            metered += power / ROUND as f64;
            average += (power - average) * DT / 10.0;
            self.plant.step(computing);
            let allowed = best.oracle(set, limit);
            best.step(allowed);
            let temperature = self.plant.temperature();
            outcome.hottest = outcome.hottest.max(temperature);
            if self.decision.duty > 0.0 {
                outcome.overshoot = outcome.overshoot.max(temperature - set);
            }
            if let (Some(limit), true) = (limit, self.plant.at - start > 60.0) {
                outcome.power = outcome.power.max(average / limit);
            }
            outcome.duty += computing / steps as f64;
            outcome.oracle += allowed / steps as f64;
            swings.take(temperature);
        }
        outcome.swings = swings.count as f64 * 3600.0 / seconds.max(3600.0);
        outcome
    }
}

/// Runs `seeds` of a scenario on all cores.
fn all(seeds: std::ops::Range<u64>, scenario: impl Fn(u64) -> Outcome + Sync) -> Vec<(u64, Outcome)> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()) as u64;
    let (seeds, scenario) = (&seeds, &scenario);
    std::thread::scope(|scope| {
        let parts: Vec<_> = (0..threads)
            .map(|part| {
                scope.spawn(move || {
                    let own = seeds.clone().filter(move |seed| seed % threads == part);
                    own.map(|seed| (seed, scenario(seed))).collect::<Vec<_>>()
                })
            })
            .collect();
        parts.into_iter().flat_map(|part| part.join().unwrap()).collect()
    })
}

/// Fan steps, and small steps of other load.
fn surroundings() -> impl FnMut(&mut Plant, &mut Thermometer, &mut Random) {
    let mut fan = 1.0f64;
    move |plant, _, random| {
        if random.uniform(0.0, 1.0) < 0.5 / 400.0 {
            fan = [0.75, 1.0, 1.35][(random.next() % 3) as usize];
        }
        // A fan takes seconds to change its speed.
        plant.fan += (fan - plant.fan) * 0.2;
        if random.uniform(0.0, 1.0) < 0.5 / 300.0 {
            plant.other = plant.full * random.uniform(0.0, 0.05);
        }
    }
}

#[test]
fn a_thousand_machines_stay_at_their_set_points() {
    let outcomes = all(0..1000, |seed| Loop::draw(seed).run(3600.0, surroundings()));
    let mut ratios: Vec<f64> = outcomes.iter().map(|(_, o)| o.duty / o.oracle).collect();
    ratios.sort_by(f64::total_cmp);
    let most = |of: fn(&Outcome) -> f64| {
        outcomes.iter().map(|(seed, o)| (of(o), *seed)).max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
    };
    let (overshoot, swings, power) = (most(|o| o.overshoot), most(|o| o.swings), most(|o| o.power));
    let hottest = most(|o| o.hottest);
    let limited = outcomes.iter().filter(|(_, o)| o.oracle < 0.98).count();
    println!("machines                     {} ({limited} limited by heat or power)", outcomes.len());
    println!("overshoot over set-point     at most {:.2} °C (seed {})", overshoot.0, overshoot.1);
    println!("hottest                      {:.2} °C (seed {})", hottest.0, hottest.1);
    println!("throughput / oracle          min {:.3}, median {:.3}", ratios[0], ratios[ratios.len() / 2]);
    println!("swings above 10 °C an hour   at most {} (seed {})", swings.0, swings.1);
    println!("power over its limit         at most {:.3} of it, 10 s (seed {})", power.0, power.1);
    println!("holds                        {}", outcomes.iter().map(|(_, o)| o.holds).sum::<usize>());
    assert!(limited > 300, "the machines hardly need a governor");
    assert!(overshoot.0 <= 1.5, "{overshoot:?}");
    assert!(hottest.0 < TRIP);
    assert!(
        ratios[0] >= 0.9,
        "{:?}",
        outcomes.iter().min_by(|a, b| (a.1.duty / a.1.oracle).total_cmp(&(b.1.duty / b.1.oracle)))
    );
    assert!(swings.0 <= 6.0, "{swings:?}");
}
