//! The governor in a closed loop with simulated machines: overshoot, throughput, swings; sensors that lie; readings that
//! make no sense. The figures are printed (`cargo test --test governor -- --nocapture`).

#[path = "governor/plant.rs"]
mod plant;
#[path = "governor/traces.rs"]
mod traces;

use finetuned::config::budget::Budget;
use finetuned::governor::control::{Decision, Level, Note, State, step};
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
    /// What else the sensors say.
    also: fn(&Plant, &mut Readings),
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
        Loop {
            plant,
            thermometer,
            random,
            budget,
            state: State::default(),
            decision: Decision::default(),
            also: |_, _| {},
        }
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
                let mut read = readings(&self.plant, &mut self.thermometer, metered, now, &mut self.random);
                (self.also)(&self.plant, &mut read);
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
/// Lets a machine work for ten minutes, then its sensor lie for so long, then tell the truth again.
fn with_fault(seed: u64, fault: Fault, lasts: f64) -> (Outcome, Outcome, Decision, Decision) {
    let mut machine = Loop::draw(seed);
    // Hot machines, so that the lie matters.
    machine.plant.ambient = 40.0;
    machine.plant.sink = 40.0 + machine.plant.idle * machine.plant.sink_resistance;
    machine.run(600.0, |_, _, _| {});
    let before = machine.decision.clone();
    let during = machine.run(lasts, |_, thermometer, _| thermometer.fault = Some(fault));
    let at_end = machine.decision.clone();
    let after = machine.run(1800.0, |_, thermometer, _| thermometer.fault = None);
    assert!(before.duty > 0.0, "seed {seed} does not compute before the fault: {before:?}");
    (during, after, at_end, machine.decision)
}

#[test]
fn a_sensor_that_lies_ends_in_a_pause() {
    let faults = [
        Fault::Missing,
        Fault::Offline,
        Fault::Stale,
        Fault::Vanished,
        Fault::Says(f64::NAN),
        Fault::Says(f64::INFINITY),
        Fault::Says(-256.0),
        Fault::Says(1e9),
        Fault::Jump(50.0),
        Fault::Jump(-50.0),
        Fault::Stuck,
    ];
    for fault in faults {
        // What the value itself does not show takes a minute, or with a coarse sensor six.
        let lasts = if fault == Fault::Stuck { 420.0 } else { 60.0 };
        let results = all(0..60, |seed| with_fault(seed, fault, lasts).0);
        let hottest = results.iter().map(|(_, o)| o.hottest).fold(0.0, f64::max);
        println!("{fault:?}: hottest {hottest:.1} °C");
        for seed in 0..60 {
            let (during, after, at_end, recovered) = with_fault(seed, fault, lasts);
            assert_eq!(at_end.duty, 0.0, "{fault:?}, seed {seed}: {at_end:?}");
            assert!(
                matches!(at_end.reason, Some(Reason::SensorLost | Reason::Thermal)),
                "{fault:?}, seed {seed}: {at_end:?}"
            );
            assert!(during.hottest < TRIP, "{fault:?}, seed {seed}: {during:?}");
            assert!(recovered.duty > 0.0, "{fault:?}, seed {seed}, half an hour later: {recovered:?}");
            assert!(after.hottest < TRIP && after.overshoot <= 1.5, "{fault:?}, seed {seed}: {after:?}");
            if fault != Fault::Stuck {
                // Three seconds of doubt, two for a period in progress.
                let share = during.duty * lasts;
                assert!(share <= 5.0, "{fault:?}, seed {seed}: computed {share:.1} s");
            }
        }
    }
}

#[test]
fn short_lies_are_survived() {
    let lie = |thermometer: &mut Thermometer, random: &mut Random| {
        if random.uniform(0.0, 1.0) < 0.5 / 900.0 {
            let faults =
                [Fault::Missing, Fault::Stale, Fault::Says(f64::NAN), Fault::Jump(-50.0), Fault::Jump(50.0)];
            thermometer.fault = Some(faults[(random.next() % 5) as usize]);
        } else if random.uniform(0.0, 1.0) < 0.2 {
            thermometer.fault = None;
        }
    };
    let outcomes = all(0..300, |seed| {
        let mut around = surroundings();
        Loop::draw(seed).run(3600.0, move |plant, thermometer, random| {
            around(plant, thermometer, random);
            lie(thermometer, random);
        })
    });
    let most = |of: fn(&Outcome) -> f64| outcomes.iter().map(|(_, o)| of(o)).fold(0.0, f64::max);
    let mean = outcomes.iter().map(|(_, o)| o.duty / o.oracle).sum::<f64>() / outcomes.len() as f64;
    println!(
        "four lies an hour: overshoot {:.2} °C, hottest {:.2} °C, swings {}, throughput {mean:.3} of the oracle",
        most(|o| o.overshoot),
        most(|o| o.hottest),
        most(|o| o.swings)
    );
    assert!(most(|o| o.overshoot) <= 1.5);
    assert!(most(|o| o.hottest) < TRIP);
    assert!(most(|o| o.swings) <= 6.0);
}

#[test]
fn a_machine_that_heats_at_rest_stays_off_until_it_has_been_cool_for_minutes() {
    let mut machine = Loop::draw(3);
    machine.run(600.0, |_, _, _| {});
    // Somebody else's load, beyond what the machine can cool.
    let plant = &machine.plant;
    let other = (110.0 - plant.ambient) / (plant.sink_resistance + plant.die_resistance) - plant.idle;
    let mut stopped = None;
    for second in 0..1800 {
        machine.run(1.0, |plant, _, _| plant.other = other);
        if machine.decision.duty == 0.0 && stopped.is_none() {
            stopped = Some(second);
        }
    }
    assert!(stopped.is_some());
    assert_eq!(machine.decision.level, Level::Critical);
    assert!(machine.decision.release && machine.decision.reason == Some(Reason::Thermal));
    let mut cool = 0;
    while machine.decision.duty == 0.0 {
        machine.run(1.0, |plant, _, _| plant.other = 0.0);
        cool += usize::from(machine.plant.temperature() < 75.0);
        assert!(cool < 1000);
    }
    assert!(cool >= 299, "{cool} s below the temperature at which computing goes on");
}

#[test]
fn a_machine_without_sensors_trains_and_says_that_it_is_blind() {
    let mut state = State::default();
    let mut decision = Decision::default();
    for i in 0..120 {
        let now = Duration::from_millis(500 * i);
        (state, decision) =
            step(&state, &Readings { at: now, ..Readings::default() }, &Budget::default(), now);
    }
    assert_eq!((decision.duty, decision.level, decision.reason), (1.0, Level::Nominal, None));
    assert!(decision.blind && decision.notes.len() == 1, "{decision:?}");
}

#[test]
fn a_meter_that_a_power_limit_needs_must_be_heard() {
    let mut machine = Loop::draw(1);
    machine.budget.power = Some(Watts(machine.plant.idle + 0.5 * machine.plant.full));
    machine.run(300.0, |_, _, _| {});
    assert_eq!((machine.decision.level, machine.decision.reason), (Level::Soft, Some(Reason::PowerBudget)));
    machine.also = |_, readings| readings.power = Some(Reading::Lost { since: readings.at });
    machine.run(2.0, |_, _, _| {});
    assert!(machine.decision.duty > 0.0, "a moment is nothing");
    machine.run(3.0, |_, _, _| {});
    assert_eq!((machine.decision.duty, machine.decision.reason), (0.0, Some(Reason::SensorLost)));
    machine.also = |_, _| {};
    machine.run(60.0, |_, _, _| {});
    assert!(machine.decision.duty > 0.0);
    // Without a limit nobody needs the meter.
    machine.budget.power = None;
    machine.also = |_, readings| readings.power = None;
    machine.run(60.0, |_, _, _| {});
    assert!(machine.decision.duty > 0.0 && machine.decision.reason != Some(Reason::SensorLost));
    // A machine that never had one says so.
    let mut machine = Loop::draw(1);
    machine.budget.power = Some(Watts(10.0));
    machine.also = |_, readings| readings.power = None;
    machine.run(60.0, |_, _, _| {});
    assert!(machine.decision.notes.contains(&Note::BlindToPower), "{:?}", machine.decision);
}

#[test]
fn memory_is_left_to_others_and_given_back() {
    let mut machine = Loop::draw(2);
    let floor = machine.budget.memory_floor;
    assert_eq!(floor, Bytes(1 << 30));
    machine.also = |_, readings| readings.available_memory = Some(Bytes(2 << 30));
    machine.run(60.0, |_, _, _| {});
    assert!(machine.decision.duty > 0.5);
    machine.also = |_, readings| readings.available_memory = Some(Bytes(1200 << 20));
    machine.run(5.0, |_, _, _| {});
    assert_eq!((machine.decision.duty, machine.decision.reason), (0.5, Some(Reason::MemoryPressure)));
    machine.also = |_, readings| readings.available_memory = Some(Bytes(900 << 20));
    machine.run(5.0, |_, _, _| {});
    assert_eq!((machine.decision.duty, machine.decision.reason), (0.0, Some(Reason::MemoryPressure)));
    assert!(!machine.decision.release);
    machine.run(40.0, |_, _, _| {});
    assert!(machine.decision.release);
    machine.also = |_, readings| readings.available_memory = Some(Bytes(4 << 30));
    machine.run(60.0, |_, _, _| {});
    assert!(machine.decision.duty > 0.0 && !machine.decision.release);
}

#[test]
fn a_machine_that_begins_short_of_memory_says_so() {
    let mut machine = Loop::draw(2);
    machine.also = |_, readings| readings.available_memory = Some(Bytes(1200 << 20));
    machine.run(60.0, |_, _, _| {});
    let Decision { duty, reason, level, .. } = machine.decision;
    assert_eq!((duty, reason, level), (0.5, Some(Reason::MemoryPressure), Level::Soft));
}

#[test]
fn the_fan_stays_below_its_ceiling_in_quiet_hours() {
    let outcomes = all(0..100, |seed| {
        let mut machine = Loop::draw(seed);
        machine.plant.ambient = machine.plant.ambient.min(25.0);
        machine.plant.sink = machine.plant.ambient + machine.plant.idle * machine.plant.sink_resistance;
        machine.budget.fan = Some(0.4);
        // A fan that follows the sink: off below 40 °C, full at 80 °C.
        machine.also = |plant, readings| readings.fan = Some(((plant.sink - 40.0) / 40.0).clamp(0.0, 1.0));
        let loudest = std::cell::Cell::new(0.0f64);
        let outcome =
            machine.run(3600.0, |plant, _, _| loudest.set(loudest.get().max((plant.sink - 40.0) / 40.0)));
        assert!(loudest.get() <= 0.4, "seed {seed}: the fan reaches {:.3}", loudest.get());
        outcome
    });
    let worst = outcomes.iter().map(|(_, o)| o.duty).fold(1.0, f64::min);
    println!("quiet hours: fan below its ceiling, smallest mean duty {worst:.2}");
    assert!(worst > 0.1);
}

#[test]
fn alarms_of_the_supply_slow_down_and_then_stop() {
    let mut machine = Loop::draw(4);
    machine.run(60.0, |_, _, _| {});
    machine.also =
        |_, readings| readings.over_current = Some(OverCurrent { under_voltage: 2.0, ..Default::default() });
    machine.run(0.5, |_, _, _| {});
    assert!(machine.decision.duty <= 0.8 && machine.decision.notes.contains(&Note::Alarms(0.8)));
    machine.run(60.0, |_, _, _| {});
    assert_eq!((machine.decision.duty, machine.decision.reason), (0.0, Some(Reason::OverCurrent)));
    machine.also = |_, readings| readings.over_current = Some(OverCurrent::default());
    machine.run(500.0, |_, _, _| {});
    assert_eq!(machine.decision.duty, 0.0, "ten minutes");
    machine.run(200.0, |_, _, _| {});
    assert!(machine.decision.duty > 0.0);
}

#[test]
fn trips_of_the_machine_lower_the_limits() {
    let zone = |passive: f64, temperature: f64, at| Zone {
        name: "x86_pkg_temp".into(),
        role: ZoneRole::Junction,
        temperature: Reading::Value { value: Celsius(temperature), at },
        passive_trip: Some(Celsius(passive)),
        critical_trip: None,
        required: false,
    };
    let decide = |passive, temperature: f64| {
        let mut state = State::default();
        let mut decision = Decision::default();
        for i in 0..80 {
            let now = Duration::from_millis(500 * i);
            let zones = vec![zone(passive, temperature + 0.1 * (i % 3) as f64, now)];
            let readings = Readings { at: now, zones, ..Readings::default() };
            (state, decision) = step(&state, &readings, &Budget::default(), now);
        }
        decision
    };
    assert!(decide(99.0, 79.0).duty > 0.9);
    assert_eq!(decide(80.0, 79.0).duty, 0.0, "the stop lies two degrees below the trip");
    assert_eq!(decide(80.0, 70.0).temperature.unwrap().1, Celsius(75.0));
}

fn any_number() -> impl Strategy<Value = f64> {
    prop_oneof![
        5 => -50.0..160.0f64,
        1 => proptest::num::f64::ANY,
        1 => Just(f64::NAN),
        1 => Just(f64::INFINITY),
    ]
}

fn any_reading() -> impl Strategy<Value = Reading<f64>> {
    let time = (0u64..200_000).prop_map(Duration::from_millis);
    prop_oneof![
        4 => (any_number(), time.clone()).prop_map(|(value, at)| Reading::Value { value, at }),
        1 => Just(Reading::Offline),
        1 => time.prop_map(|since| Reading::Lost { since }),
    ]
}

fn typed<T>(reading: Reading<f64>, unit: fn(f64) -> T) -> Reading<T> {
    match reading {
        Reading::Value { value, at } => Reading::Value { value: unit(value), at },
        Reading::Offline => Reading::Offline,
        Reading::Lost { since } => Reading::Lost { since },
    }
}

prop_compose! {
    fn any_zone()(
        name in "[a-c]", role in 0..3usize, temperature in any_reading(),
        trips in proptest::collection::vec(proptest::option::of(any_number()), 2), required: bool,
    ) -> Zone {
        Zone {
            name,
            role: [ZoneRole::Junction, ZoneRole::Die, ZoneRole::Board][role],
            temperature: typed(temperature, Celsius),
            passive_trip: trips[0].map(Celsius),
            critical_trip: trips[1].map(Celsius),
            required,
        }
    }
}

prop_compose! {
    fn any_readings()(
        at in 0u64..200_000, zones in proptest::collection::vec(any_zone(), 0..4),
        power in proptest::option::of(any_reading()), numbers in proptest::collection::vec(any_number(), 6),
        available in proptest::option::of(any::<u64>()), throttled: bool,
    ) -> Readings {
        Readings {
            at: Duration::from_millis(at),
            zones,
            power: power.map(|power| typed(power, Watts)),
            over_current: Some(OverCurrent {
                under_voltage: numbers[0], average: numbers[1], instantaneous: numbers[2],
            }),
            fan: Some(numbers[3]),
            memory_pressure: Some(numbers[4]),
            load: Some(numbers[5]),
            available_memory: available.map(Bytes),
            throttled,
            ..Readings::default()
        }
    }
}

prop_compose! {
    fn any_budget()(
        numbers in proptest::collection::vec(any_number(), 6), power: bool, floor: u64,
    ) -> Budget {
        Budget {
            temperature: Celsius(numbers[0]),
            temperature_stop: Celsius(numbers[1]),
            temperature_resume: Celsius(numbers[2]),
            power: power.then_some(Watts(numbers[3])),
            duty_floor: numbers[4],
            fan: Some(numbers[5]),
            memory_floor: Bytes(floor),
            ..Budget::default()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn nothing_that_is_read_panics_or_leaves_the_range(
        rounds in proptest::collection::vec((any_readings(), 0u64..200_000), 1..40), budget in any_budget(),
    ) {
        let mut state = State::default();
        for (readings, now) in rounds {
            let decision;
            (state, decision) = step(&state, &readings, &budget, Duration::from_millis(now));
            prop_assert!((0.0..=1.0).contains(&decision.duty), "{decision:?}");
            prop_assert!(decision.duty > 0.0 || decision.reason.is_some(), "{decision:?}");
            prop_assert!(!decision.release || decision.duty == 0.0);
            prop_assert_eq!(decision.duty == 0.0, decision.level >= Level::Hard);
            let hot = readings.zones.iter().any(|zone| match zone.temperature {
                Reading::Value { value, at } => {
                    zone.role == ZoneRole::Junction
                        && at <= Duration::from_millis(now)
                        && at + Duration::from_secs(2) > Duration::from_millis(now)
                        && (95.0..150.0).contains(&value.0)
                }
                _ => false,
            });
            prop_assert!(!hot || decision.duty == 0.0 , "hot, and computing: {decision:?}");
            let nonsense = readings.zones.iter().all(|zone| match zone.temperature {
                Reading::Value { value, .. } => value.0.is_nan(),
                _ => true,
            });
            let chip = readings.zones.iter().any(|zone| zone.role == ZoneRole::Junction);
            // At most three seconds on what was read before.
            if nonsense && chip {
                let later = Duration::from_millis(now) + Duration::from_secs(4);
                let (_, decision) = step(&state, &readings, &budget, later);
                prop_assert_eq!(decision.duty, 0.0);
            }
        }
    }
}
