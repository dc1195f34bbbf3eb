//! Recorded nights, replayed: what is decided from moment to moment, and the energy. `tests/fixtures/traces/README.md` has
//! the format of what is expected.

use finetuned::config::budget::{Budget, Conditions, Window};
use finetuned::governor::control::{State, step};
use finetuned::governor::energy::Meter;
use finetuned::governor::sensors::trace;
use finetuned::reason::Reason;
use finetuned::scheduler::conditions::{Holds, Own, Schedule};
use finetuned::units::Watts;
use std::path::PathBuf;
use std::time::Duration;

/// What was decided in one round.
#[derive(Clone, Debug)]
struct Round {
    /// Seconds since the first round.
    at: f64,
    level: String,
    duty: f64,
    reason: Option<Reason>,
    notes: Vec<String>,
}

/// A time with one level and one reason.
#[derive(Debug)]
struct Span {
    from: f64,
    to: f64,
    level: String,
    duty: (f64, f64),
    reason: String,
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/traces").join(name)
}

/// The rounds of a trace under these rules, and the energy that the meter found.
fn replay(name: &str, budget: &Budget, conditions: &Conditions) -> (Vec<Round>, f64) {
    let file = std::fs::File::open(fixture(&format!("{name}.csv"))).unwrap();
    let schedule = Schedule::new(&Window::default()).unwrap();
    let midnight: jiff::ZonedDateTime = "2026-11-25T00:00[UTC]".parse().unwrap();
    let (mut state, mut holds, mut meter) = (State::default(), Holds::default(), Meter::default());
    let (mut rounds, mut start, mut last): (Vec<Round>, _, _) = (Vec::new(), None, Duration::ZERO);
    for readings in trace::read(file) {
        let readings = readings.unwrap();
        let now = readings.at;
        let since = now - *start.get_or_insert(now);
        let (next, decision) = step(&state, &readings, budget, now);
        let wall = midnight.checked_add(jiff::SignedDuration::try_from(since).unwrap()).unwrap();
        let own = Own { gpu: 0.0, load: 0.0 };
        let (after, outside) = holds.step(conditions, &schedule, &readings, own, &wall, now);
        (state, holds, last) = (next, after, now);
        meter.step(&readings, decision.duty > 0.0);
        rounds.push(Round {
            at: since.as_secs_f64(),
            level: format!("{:?}", decision.level).to_lowercase(),
            duty: if outside.is_some() { 0.0 } else { decision.duty },
            reason: outside.or(decision.reason),
            notes: decision.notes.iter().map(ToString::to_string).collect(),
        });
    }
    (rounds, meter.total_at(last).gross.0)
}

fn word(reason: Option<Reason>) -> &'static str {
    reason.map_or("-", Reason::word)
}

/// What was decided, in the format of what is expected.
fn summary(rounds: &[Round]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for round in rounds {
        let reason = word(round.reason);
        match spans.last_mut().filter(|span| span.level == round.level && span.reason == reason) {
            Some(span) => {
                span.to = round.at;
                span.duty = (span.duty.0.min(round.duty), span.duty.1.max(round.duty));
            }
            None => spans.push(Span {
                from: round.at,
                to: round.at,
                level: round.level.clone(),
                duty: (round.duty, round.duty),
                reason: reason.into(),
            }),
        }
    }
    spans
}

fn expected(name: &str) -> Vec<Span> {
    let text = std::fs::read_to_string(fixture(&format!("{name}.txt"))).unwrap();
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let range = |text: &str| {
        let (low, high) = text.split_once('-').unwrap_or((text, text));
        (low.parse().unwrap(), high.parse().unwrap())
    };
    lines
        .map(|line| {
            let [time, level, duty, reason] = line.split_whitespace().collect::<Vec<_>>()[..] else {
                panic!("{name}: {line}")
            };
            let (from, to) = range(time);
            Span { from, to, level: level.into(), duty: range(duty), reason: reason.into() }
        })
        .collect()
}

fn energy(name: &str) -> f64 {
    let text = std::fs::read_to_string(fixture("energy.txt")).unwrap();
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap()
}

/// Replays, compares with what is expected, and returns the rounds.
fn check(name: &str, budget: &Budget, conditions: &Conditions) -> Vec<Round> {
    let (rounds, joules) = replay(name, budget, conditions);
    println!("{name}:");
    for Span { from, to, level, duty, reason } in summary(&rounds) {
        println!("  {from:>5.1}-{to:<5.1} {level:<8} {:.2}-{:.2} {reason}", duty.0, duty.1);
    }
    let spans = expected(name);
    let mut covered = 0;
    for round in &rounds {
        let Some(span) = spans.iter().find(|span| (span.from..=span.to).contains(&round.at)) else {
            continue;
        };
        covered += 1;
        let fits = round.level == span.level
            && word(round.reason) == span.reason
            && (span.duty.0 - 0.005..=span.duty.1 + 0.005).contains(&round.duty);
        assert!(fits, "{name}: {round:?} where {span:?} is expected");
    }
    // Between two spans there may be some rounds of which nothing is said.
    assert!(covered * 100 >= rounds.len() * 93, "{name}: {covered} of {} rounds are expected", rounds.len());
    let truth = energy(name);
    println!("  energy {joules:.1} J, integral {truth:.1} J ({:+.2} %)", (joules / truth - 1.0) * 100.0);
    assert!((joules / truth - 1.0).abs() < 0.01, "{name}: {joules} J of {truth} J");
    rounds
}

#[test]
fn heating_is_held_then_stopped_and_goes_on_below_the_resume() {
    check("heating", &Budget::default(), &Conditions::default());
}

#[test]
fn what_gets_hotter_at_rest_gives_its_memory_back() {
    check("runaway", &Budget::default(), &Conditions::default());
}

#[test]
fn a_burst_of_over_current_lowers_the_ceiling_and_a_steady_count_does_not() {
    let rounds = check("over-current", &Budget::default(), &Conditions::default());
    assert!(rounds.last().unwrap().notes.iter().any(|note| note.contains("alarms")), "it says so");
}

#[test]
fn gated_is_not_lost_and_silence_is_a_stop() {
    let rounds = check("offline", &Budget::default(), &Conditions::default());
    let said = |at: f64| {
        let round = rounds.iter().find(|round| round.at >= at).unwrap();
        round.notes.iter().any(|note| note.contains("cannot be read"))
    };
    assert!(!said(41.0) && !said(61.0) && said(90.0));
}

#[test]
fn on_battery_nothing_trains_and_a_low_battery_must_charge_first() {
    let conditions = Conditions { external_power: true, ..Conditions::default() };
    check("battery", &Budget::default(), &conditions);
}

#[test]
fn a_mode_with_more_power_is_held_to_the_budget() {
    let budget = Budget { power: Some(Watts(35.0)), ..Budget::default() };
    check("mode", &budget, &Conditions::default());
}
