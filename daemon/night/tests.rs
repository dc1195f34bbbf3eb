//! The account tiles the night whatever happens to clocks, daemon and file.

use super::account::Moment;
use super::html::{escaped, page};
use super::report::{Report, Sums};
use super::store::{Nights, Store, dates, parse, read};
use super::words::remedy;
use super::{
    Account, NightError, Observation, Record, SECOND, Segment, Span, Use, bounds, zone_name, zone_named,
};
use crate::governor::door::{Doing, Held, News, RunNews};
use crate::governor::energy::{Energy, night_of};
use crate::reason::Reason;
use crate::units::{Joules, RunId};
use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::time::Duration;

const HOUR: i64 = 3600 * SECOND;

fn zone() -> TimeZone {
    TimeZone::get("Europe/Berlin").unwrap()
}

fn us(text: &str) -> i64 {
    text.parse::<ZonedDateTime>().unwrap().timestamp().as_microsecond()
}

fn date(text: &str) -> Date {
    text.parse().unwrap()
}

fn moment(at: i64, now: Duration) -> Moment {
    let date = night_of(&Timestamp::from_microsecond(at).unwrap().to_zoned_datetime(zone()));
    let night = bounds(date, &zone()).unwrap();
    Moment { at, now, suspended: None, date, night, zone: "Europe/Berlin".into() }
}

fn fresh(moment: &Moment) -> Record {
    Record::new(moment.date, moment.night, moment.zone.clone())
}

/// A machine, a daemon on it, and its disk.
struct World {
    at: i64,
    now: Duration,
    slept: Duration,
    /// Whether its clock can tell sleep from being set.
    tells: bool,
    account: Option<Account>,
    disk: BTreeMap<Date, Record>,
    windows: Vec<Span>,
    doing: Doing,
    duty: f64,
    limit: Option<Reason>,
    energy: f64,
    steps: u64,
    news: News,
}

impl World {
    fn new(at: i64) -> World {
        World {
            at,
            now: Duration::from_secs(1000),
            slept: Duration::ZERO,
            tells: false,
            account: None,
            disk: BTreeMap::new(),
            windows: Vec::new(),
            doing: Doing::default(),
            duty: 1.0,
            limit: None,
            energy: 0.0,
            steps: 0,
            news: News::default(),
        }
    }

    fn round(&mut self) {
        let suspended = self.tells.then_some(self.slept);
        let moment = Moment { suspended, ..moment(self.at, self.now) };
        let news = std::mem::take(&mut self.news);
        let energy = Energy { gross: Joules(self.energy), metered: self.energy / 20.0, ..Energy::default() };
        let seen = Observation {
            moment: moment.clone(),
            windows: &self.windows.iter().map(|window| window.within(moment.night)).collect::<Vec<_>>(),
            doing: self.doing,
            duty: self.duty,
            limit: self.limit,
            zones: vec![("tj-thermal", 71.5), ("cpu-thermal", 64.0)],
            temperature: Some((71.5, 85.0)),
            power: Some(20.0),
            mode: Some("MODE_30W"),
            notes: &[],
            steps: self.steps,
            tokens: self.steps * 100,
            energy,
            run: Some((RunId::from_bits([7; 6]), energy)),
            gross: true,
            news: &news,
        };
        let disk = &self.disk;
        let open = |moment: &Moment| disk.get(&moment.date).cloned().unwrap_or_else(|| fresh(moment));
        let account = self.account.get_or_insert_with(|| Account::new(open(&moment)));
        if let Some(ended) = account.observe(&seen, open) {
            assert_tiles(&ended);
            self.disk.insert(ended.date, ended);
        }
    }

    fn pass(&mut self, seconds: f64) {
        let duration = Duration::from_secs_f64(seconds);
        self.now += duration;
        self.at += duration.as_micros() as i64;
        self.round();
    }

    /// So long in rounds of half a second.
    fn go(&mut self, seconds: f64) {
        for _ in 0..(seconds * 2.0) as u64 {
            self.pass(0.5);
        }
    }

    fn restart(&mut self) {
        let record = self.record();
        self.disk.insert(record.date, record);
        self.account = None;
        self.steps = 0;
    }

    fn record(&self) -> Record {
        self.account.as_ref().unwrap().record().clone()
    }

    fn report(&self) -> Report {
        Report::new(&self.record(), false)
    }
}

/// Segments follow each other from noon on, and each is used for as long as it is.
fn assert_tiles(record: &Record) {
    let mut at = record.span.from;
    for segment in &record.segments {
        assert_eq!(segment.span.from, at, "a gap, or twice the same time");
        assert!(segment.is_sound(), "{segment:?}");
        at = segment.span.to;
    }
    assert_eq!(at, record.through());
    assert!(at <= record.span.to);
    let sum: i64 = record.uses(record.span).values().sum();
    assert_eq!(sum, at - record.span.from);
    for window in &record.windows {
        for edge in [window.from, window.to] {
            let over = record.segments.iter().find(|s| s.span.from < edge && edge < s.span.to);
            assert_eq!(over, None, "no segment reaches over the edge {edge}");
        }
    }
}

fn close(value: f64, expected: f64) {
    assert!((value - expected).abs() < 1e-3, "{value} for {expected}");
}

fn of(sums: &Sums, reason: Reason) -> f64 {
    sums.of(Use::Lost(reason))
}

#[test]
fn words_are_read_back() {
    let work = [Use::Training, Use::Evaluating, Use::Preparing, Use::Saving];
    let all = work.into_iter().chain(Reason::ALL.iter().map(|reason| Use::Lost(*reason)));
    let mut words = Vec::new();
    for usage in all {
        assert_eq!(Use::from_word(usage.word()), Some(usage));
        assert!(!words.contains(&usage.word()) && !usage.meaning().is_empty(), "{usage}");
        words.push(usage.word());
    }
    assert_eq!(Use::from_word("bored"), None);
    assert!(Reason::ALL.iter().all(|reason| remedy(*reason).len() > 10));
}

#[test]
fn a_night_is_divided_by_what_it_was_used_for() {
    let mut world = World::new(us("2026-11-24T21:00[Europe/Berlin]"));
    world.windows =
        vec![Span { from: us("2026-11-24T22:00[Europe/Berlin]"), to: us("2026-11-25T06:00[Europe/Berlin]") }];
    world.doing = Doing::Waiting(Reason::OutsideWindow);
    world.round();
    world.go(3600.0);
    (world.doing, world.duty, world.limit) = (Doing::Preparing, 1.0, None);
    world.go(60.0);
    (world.doing, world.duty, world.limit) = (Doing::Training, 0.6, Some(Reason::Thermal));
    world.go(3600.0);
    (world.duty, world.limit) = (1.0, None);
    world.go(1000.0);
    world.doing = Doing::Waiting(Reason::Leased);
    world.go(20.0);
    let report = world.report();
    assert_tiles(&world.record());
    close(report.window.of(Use::Training), 0.6 * 3600.0 + 1000.0);
    close(of(&report.window, Reason::Thermal), 0.4 * 3600.0);
    close(of(&report.window, Reason::Leased), 20.0);
    close(report.window.of(Use::Preparing), 60.0);
    close(of(&report.window, Reason::OutsideWindow), 0.0);
    close(of(&report.whole, Reason::OutsideWindow), 3600.0);
    close(of(&report.whole, Reason::Off), 9.0 * 3600.0);
    close(report.window.accounted_s, 4680.0);
    close(report.window.seconds, 8.0 * 3600.0);
    close(report.duty.unwrap(), (0.6 * 3600.0 + 1000.0) / 4600.0);
    assert_eq!(
        report.headline,
        "Trained 52 min 40 s of 1 h 18 min so far in the 8 h 0 min window (67.5 %); waited 24 min 0 s because of \
         thermal, 20 s because of leased; 1 min 0 s preparing."
    );
    assert_eq!(report.advice.len(), 1, "{:?}", report.advice);
    // Eight stretches: off, outside, preparing, throttled, free, leased.
    assert_eq!(report.intervals.len(), 6, "{:#?}", report.intervals);
}

#[test]
fn nothing_happened_names_what_was_in_the_way() {
    for (doing, sentence, help) in [
        (
            Doing::Waiting(Reason::NoRun),
            "Nothing was trained in the 1 h 0 min window: 1 h 0 min no-run (no run is there that could train).",
            "finetunectl submit SPEC",
        ),
        (
            Doing::Waiting(Reason::OnBattery),
            "Nothing was trained in the 1 h 0 min window: 1 h 0 min on-battery (there is no external power).",
            "external_power",
        ),
    ] {
        let mut world = World::new(us("2026-11-24T22:00[Europe/Berlin]"));
        let from = us("2026-11-24T22:00[Europe/Berlin]");
        world.windows = vec![Span { from, to: from + HOUR }];
        world.doing = doing;
        world.round();
        let report = world.report();
        assert_eq!(report.headline, "The window has not begun: it opens at 22:00.");
        world.go(3700.0);
        let report = world.report();
        assert_eq!(report.headline, sentence);
        assert!(report.advice.len() == 1 && report.advice[0].contains(help), "{:?}", report.advice);
    }
    // Nobody was there at all: the record of a past night ends where it was left.
    let mut world = World::new(us("2026-11-24T22:00[Europe/Berlin]"));
    world.round();
    let report = Report::new(&world.record(), true);
    assert!(report.over && report.window.uses.len() == 1, "{report:?}");
    close(of(&report.window, Reason::Off), 24.0 * 3600.0);
    assert!(
        report.headline.starts_with("Nothing was trained in the night: 1 d 0 h off ("),
        "{}",
        report.headline
    );
    assert!(report.advice[0].contains("systemctl status finetuned"));
}

#[test]
fn sleep_and_a_clock_that_was_set_are_told_apart() {
    for tells in [true, false] {
        let mut world = World::new(us("2026-11-24T23:00[Europe/Berlin]"));
        world.tells = tells;
        world.doing = Doing::Training;
        world.round();
        world.go(60.0);
        // Slept for 100 s, and the clock was set forward by 50 s.
        world.slept += Duration::from_secs(100);
        world.at += 150 * SECOND;
        world.go(60.0);
        let report = world.report();
        assert_tiles(&world.record());
        close(report.whole.of(Use::Training), 120.0);
        close(of(&report.whole, Reason::Suspend), if tells { 100.0 } else { 150.0 });
        close(of(&report.whole, Reason::ClockSet), if tells { 50.0 } else { 0.0 });
        assert_eq!(report.undone_s, 0.0);
    }
}

#[test]
fn a_clock_that_is_set_back_takes_back_what_it_said() {
    let mut world = World::new(us("2026-11-24T23:00[Europe/Berlin]"));
    world.doing = Doing::Training;
    world.round();
    world.go(100.0);
    world.at -= 40 * SECOND;
    world.go(10.0);
    let report = world.report();
    assert_tiles(&world.record());
    close(report.undone_s, 40.0);
    close(report.whole.of(Use::Training), 70.0);
    // To yesterday's night, and after the time server has answered to tonight's again.
    world.at = us("2026-11-23T20:00[Europe/Berlin]");
    world.go(10.0);
    assert_eq!(world.record().date, date("2026-11-23"));
    world.at = us("2026-11-24T23:30[Europe/Berlin]");
    world.go(10.0);
    let report = world.report();
    assert_tiles(&world.record());
    assert_eq!(report.night, "2026-11-24");
    close(report.whole.of(Use::Training), 10.0);
    let others = of(&report.whole, Reason::ClockSet) + of(&report.whole, Reason::Suspend);
    close(others + of(&report.whole, Reason::Off), 11.5 * 3600.0);
}

#[test]
fn a_time_zone_without_a_name_is_its_offset() {
    let noon = us("2026-11-24T12:00[UTC]");
    for (offset, name) in [("<+0530>-5:30", "+05:30"), ("<-03>3", "-03:00")] {
        let unnamed = TimeZone::posix(offset).unwrap();
        assert_eq!(zone_name(&unnamed, noon), name);
        let known = zone_named(name).unwrap();
        assert_eq!(bounds(date("2026-11-24"), &known), bounds(date("2026-11-24"), &unnamed));
    }
    assert_eq!(zone_name(&zone(), noon), "Europe/Berlin");
    assert_eq!(zone_named("Europe/Berlin"), Some(zone()));
    assert_eq!(zone_named("nowhere"), None);
}

#[test]
fn another_time_zone_is_on_disk_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::new(dir.path().join("nights"));
    let begin = moment(us("2026-11-24T20:00[Europe/Berlin]"), Duration::ZERO);
    let mut record = fresh(&begin);
    record.put(Segment::whole(Span { from: begin.night.from, to: begin.at }, Use::Training), Reason::Off);
    store.sync(&mut record).unwrap();
    let athens = TimeZone::get("Europe/Athens").unwrap();
    let mut moved = record.moved(bounds(begin.date, &athens).unwrap(), "Europe/Athens".into());
    store.sync(&mut moved).unwrap();
    let found = read(store.directory(), begin.date, &zone()).unwrap().unwrap();
    assert_eq!((found.zone.as_str(), found.span), ("Europe/Athens", moved.span));
    assert_eq!(found.segments, moved.segments);
}

#[test]
fn a_clock_that_starts_wrong_takes_nothing_back() {
    let mut world = World::new(us("2026-11-24T23:00[Europe/Berlin]"));
    world.doing = Doing::Training;
    world.round();
    world.go(100.0);
    let before = world.report();
    world.restart();
    // No battery keeps the clock: it starts days ago, until the time server has answered.
    world.at = us("2026-11-20T20:00[Europe/Berlin]");
    world.round();
    world.go(10.0);
    assert_eq!(world.record().date, date("2026-11-20"));
    world.at = us("2026-11-24T23:10[Europe/Berlin]");
    world.go(10.0);
    let report = world.report();
    assert_tiles(&world.record());
    assert_eq!((report.night.as_str(), report.undone_s), ("2026-11-24", 0.0));
    close(report.whole.of(Use::Training), before.whole.of(Use::Training) + 10.0);
    close(of(&report.whole, Reason::Off), of(&before.whole, Reason::Off));
    close(of(&report.whole, Reason::ClockSet) + of(&report.whole, Reason::Suspend), 500.0);
}

#[test]
fn a_governor_that_hung_trained_nothing() {
    let mut world = World::new(us("2026-11-24T23:00[Europe/Berlin]"));
    (world.doing, world.duty) = (Doing::Training, 1.0);
    world.round();
    world.pass(100.0);
    let report = world.report();
    close(report.whole.of(Use::Training), 10.0);
    close(of(&report.whole, Reason::SensorLost), 90.0);
}

#[test]
fn nights_of_23_and_25_hours_are_tiled() {
    for (night, hours) in [("2026-03-28", 23.0), ("2026-10-24", 25.0), ("2026-11-24", 24.0)] {
        let mut world = World::new(us(&format!("{night}T12:00[Europe/Berlin]")));
        world.doing = Doing::Training;
        world.round();
        while world.record().date == date(night) {
            world.pass(9.7);
        }
        let report = Report::new(&world.disk[&date(night)], true);
        close(report.whole.accounted_s, hours * 3600.0);
        close(report.whole.of(Use::Training), hours * 3600.0);
        assert_eq!(report.whole.seconds, hours * 3600.0);
        assert!(report.over);
        // The time after noon is in the next night, from its first moment on.
        assert!(world.record().uses(world.record().span).keys().eq([Use::Training].iter()));
    }
}

#[test]
fn a_reason_that_flaps_makes_few_segments_and_no_sum_wrong() {
    let mut world = World::new(us("2026-11-24T12:00[Europe/Berlin]"));
    world.round();
    let mut trained = 0.0;
    for i in 0..(24 * 7200 - 10) {
        world.doing = if i % 3 == 0 { Doing::Waiting(Reason::Leased) } else { Doing::Training };
        world.duty = if i % 2 == 0 { 1.0 } else { 0.5 };
        trained += if i % 3 == 0 { 0.0 } else { 0.5 * world.duty };
        world.limit = (i % 5 == 0).then_some(Reason::Thermal);
        world.pass(0.5);
    }
    let record = world.record();
    assert_tiles(&record);
    assert!(record.segments.len() < 2600, "{}", record.segments.len());
    close(world.report().whole.of(Use::Training), trained);
    let json = serde_json::to_string(&world.report()).unwrap();
    assert!(json.len() < 2 << 20, "{} bytes", json.len());
    assert!(page(&world.report()).len() < 1 << 20, "{} bytes", page(&world.report()).len());
    // Hours that are changed every half second.
    let mut world = World::new(us("2026-11-24T12:00[Europe/Berlin]"));
    world.round();
    for i in 0..10_000 {
        world.windows = if i % 2 == 0 { vec![] } else { vec![Span { from: 0, to: i64::MAX / 2 }] };
        world.pass(0.5);
    }
    assert!(world.record().segments.len() < 1000, "{}", world.record().segments.len());
}

#[test]
fn hours_that_change_leave_the_past_as_it_was() {
    let from = us("2026-11-24T22:00[Europe/Berlin]");
    let mut world = World::new(from);
    world.windows = vec![Span { from, to: from + 8 * HOUR }];
    world.doing = Doing::Training;
    world.round();
    world.go(600.0);
    world.windows = vec![Span { from: from + HOUR, to: from + 2 * HOUR }];
    world.doing = Doing::Waiting(Reason::OutsideWindow);
    world.go(600.0);
    let report = world.report();
    assert_tiles(&world.record());
    let lengths: Vec<i64> = report.windows.iter().map(|window| window.length() / SECOND).collect();
    assert_eq!(lengths, [600, 3600]);
    close(report.window.of(Use::Training), 600.0);
    close(of(&report.window, Reason::OutsideWindow), 0.0);
}

#[test]
fn another_time_zone_is_another_noon() {
    let mut world = World::new(us("2026-11-24T23:00[Europe/Berlin]"));
    world.doing = Doing::Training;
    world.round();
    world.go(100.0);
    let before = world.record();
    for hours in [-3, 3] {
        let span = Span { from: before.span.from + hours * HOUR, to: before.span.to + hours * HOUR };
        let moved = before.moved(span, "Elsewhere".into());
        assert_tiles(&moved);
        assert_eq!(moved.through(), before.through());
        close(Report::new(&moved, false).whole.of(Use::Training), 100.0);
    }
}

#[test]
fn runs_and_leases_are_listed_with_their_part_of_the_night() {
    let mut world = World::new(us("2026-11-24T23:00[Europe/Berlin]"));
    let id = RunId::from_bits([7; 6]);
    let news = |step, loss, state| RunNews {
        name: "night".into(),
        state,
        reason: None,
        active: true,
        step,
        loss: Some(loss),
    };
    world.round();
    world.doing = Doing::Training;
    // The loss that it brought from last night is none of this one's.
    world.news.runs.insert(id.clone(), news(40, 9.0, "preparing"));
    world.news.held.insert("planner".into(), Held { count: 1, time: Duration::from_millis(300) });
    world.pass(0.5);
    for step in 41..=50 {
        world.steps += 1;
        world.energy += 600.0;
        world.news.runs.insert(id.clone(), news(step, 1.0 / step as f64, "running"));
        world.go(30.0);
    }
    let waiting = RunNews {
        active: false,
        state: "waiting",
        reason: Some(Reason::OutsideWindow),
        ..news(50, 0.02, "")
    };
    world.news.runs.insert(id.clone(), waiting);
    world.news.runs.insert(RunId::from_bits([8; 6]), RunNews::default());
    world.news.held.insert("planner".into(), Held { count: 1, time: Duration::from_millis(700) });
    world.pass(0.5);
    let report = world.report();
    assert_eq!(report.runs.len(), 1, "one that never had a worker is none of this night's");
    let run = &report.runs[0];
    assert_eq!((run.first_step, run.last_step), (40, 50));
    assert_eq!((run.first_loss, run.last_loss), (Some(1.0 / 41.0), Some(0.02)));
    assert_eq!((run.state.as_str(), run.reason.as_deref()), ("waiting", Some("outside-window")));
    assert_eq!(run.gross_j, Some(6000.0));
    let lease = &report.leases[0];
    assert_eq!((lease.who.as_str(), lease.count, lease.seconds), ("planner", 2, 1.0));
    assert_eq!((report.steps, report.tokens), (10, 1000));
    let energy = report.energy.as_ref().unwrap();
    assert_eq!((energy.gross_j, energy.j_per_step, energy.j_per_token), (6000.0, Some(600.0), Some(6.0)));
    assert_eq!(report.points.len(), 5, "a point a minute: {:?}", report.points);
    assert_eq!(report.points[2].limit, Some(85.0));
    assert_eq!(report.modes.len(), 1);
    close(report.temperature.unwrap().max, 71.5);
    // After a restart it goes on from there.
    world.restart();
    world.pass(30.0);
    let report = world.report();
    assert_eq!((report.steps, report.starts, report.runs.len()), (10, 2, 1));
    close(of(&report.whole, Reason::Off), 11.0 * 3600.0 + 30.0);
}

#[test]
fn a_file_is_read_back_whatever_is_cut_off_or_damaged() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::new(directory.path().join("nights"));
    let mut world = World::new(us("2026-11-24T22:30[Europe/Berlin]"));
    let from = us("2026-11-24T23:00[Europe/Berlin]");
    world.windows = vec![Span { from, to: from + HOUR }];
    world.round();
    let mut synced = Vec::new();
    for i in 0..600 {
        world.doing = [Doing::Training, Doing::Waiting(Reason::Leased), Doing::Saving][i / 40 % 3];
        world.steps += 1;
        world.go(5.0);
        let account = world.account.as_mut().unwrap();
        if store.flush(account.record_mut(), world.now).unwrap() {
            let length = std::fs::metadata(store.directory().join("2026-11-24.jsonl")).unwrap().len();
            synced.push((length as usize, account.record().through()));
        }
    }
    assert_eq!(synced.len(), 300, "one sync in ten seconds");
    store.sync(world.account.as_mut().unwrap().record_mut()).unwrap();
    let night = date("2026-11-24");
    let whole = read(store.directory(), night, &zone()).unwrap().unwrap();
    let record = world.record();
    assert_eq!(
        (&whole.segments, &whole.figures, &whole.points, &whole.windows, whole.damaged, whole.span),
        (&record.segments, &record.figures, &record.points, &record.windows, 0, record.span)
    );
    let content = std::fs::read(store.directory().join("2026-11-24.jsonl")).unwrap();
    for cut in (0..=content.len()).filter(|cut| cut % 997 == 0 || content.len() - cut < 700) {
        for tail in [&[][..], &[0; 7][..]] {
            let torn = parse(&[&content[..cut], tail].concat(), night, &zone()).unwrap();
            assert_tiles(&torn);
            assert_eq!(torn.damaged, 0, "cut at {cut}");
            let safe =
                synced.iter().rfind(|(length, _)| *length <= cut).map_or(record.span.from, |safe| safe.1);
            assert!(torn.through() >= safe, "cut at {cut}: what was synced is there");
        }
    }
    // A damaged line costs itself, and is counted.
    let mut lines: Vec<String> = String::from_utf8(content).unwrap().lines().map(String::from).collect();
    lines[3] = "{\"segment\":{\"from_us\":5,\"to_us\":1,\"uses_us\":{}}}".into();
    lines[5] = "nonsense".into();
    lines[7] =
        "{\"segment\":{\"from_us\":1764000000000000,\"to_us\":1764000001000000,\"uses_us\":{\"leased\":7}}}"
            .into();
    let damaged = parse((lines.join("\n") + "\n").as_bytes(), night, &zone()).unwrap();
    assert_tiles(&damaged);
    assert_eq!(damaged.damaged, 3);
    // Without its first line it has the noon of the machine's zone.
    let headless = parse((lines[1..].join("\n") + "\n").as_bytes(), night, &zone()).unwrap();
    assert_eq!(headless.span, record.span);
    // When the night is over, it is written without what was replaced.
    let long = std::fs::metadata(store.directory().join("2026-11-24.jsonl")).unwrap().len();
    store.finish(world.account.as_mut().unwrap().record_mut()).unwrap();
    let short = std::fs::metadata(store.directory().join("2026-11-24.jsonl")).unwrap().len();
    assert!(short * 10 < long, "{short} of {long}");
    assert_eq!(read(store.directory(), night, &zone()).unwrap().unwrap().segments, record.segments);
}

#[test]
fn a_disk_that_refuses_costs_nothing_when_it_is_back() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("nights");
    std::fs::write(&place, "in the way").unwrap();
    let mut store = Store::new(place.clone());
    let mut world = World::new(us("2026-11-24T22:30[Europe/Berlin]"));
    world.round();
    world.go(30.0);
    let record = world.account.as_mut().unwrap().record_mut();
    let error = store.flush(record, world.now).unwrap_err().to_string();
    assert!(error.contains("2026-11-24.jsonl"), "{error}");
    std::fs::remove_file(&place).unwrap();
    world.go(30.0);
    assert!(store.flush(world.account.as_mut().unwrap().record_mut(), world.now).unwrap());
    let back = read(&place, date("2026-11-24"), &zone()).unwrap().unwrap();
    assert_eq!(back.segments, world.record().segments);
}

#[test]
fn old_nights_are_removed() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::new(directory.path().to_path_buf());
    let mut day = date("2026-01-01");
    for _ in 0..100 {
        std::fs::write(directory.path().join(format!("{day}.jsonl")), "").unwrap();
        std::fs::write(directory.path().join(format!("{day}.html")), "").unwrap();
        day = day.tomorrow().unwrap();
    }
    std::fs::write(directory.path().join("notes.txt"), "a person's").unwrap();
    store.prune().unwrap();
    let kept = dates(directory.path()).unwrap();
    assert_eq!((kept.len(), kept[0]), (super::store::KEPT, date("2026-01-09")));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2 * super::store::KEPT + 1);
}

#[test]
fn a_night_is_found_by_date_and_by_word() {
    let directory = tempfile::tempdir().unwrap();
    let nights = Nights::new(directory.path().to_path_buf());
    assert!(matches!(nights.report(""), Err(NightError::NoSuchNight(_))));
    let mut store = Store::new(directory.path().to_path_buf());
    let mut world = World::new(us("2026-11-23T22:00[Europe/Berlin]"));
    world.round();
    world.go(20.0);
    store.finish(world.account.as_mut().unwrap().record_mut()).unwrap();
    let mut world = World::new(us("2026-11-24T13:00[Europe/Berlin]"));
    let from = us("2026-11-24T22:00[Europe/Berlin]");
    world.windows = vec![Span { from, to: from + HOUR }];
    world.round();
    *nights.live() = world.account.take();
    let night = |wanted: &str| nights.report(wanted).map(|report| report.night).map_err(|e| e.to_string());
    assert_eq!(night("").unwrap(), "2026-11-23", "the window of tonight has not begun");
    assert_eq!(night("last").unwrap(), "2026-11-23");
    assert_eq!(night("now").unwrap(), "2026-11-24");
    assert_eq!(night("2026-11-24").unwrap(), "2026-11-24");
    assert!(nights.report("2026-11-23").unwrap().over);
    assert_eq!(night("2026-11-22").unwrap_err(), "there is no record of the night 2026-11-22");
    for word in ["yesterday", "2026-13-01", "../../etc/passwd", "2026-11-24T12:00"] {
        assert!(matches!(nights.report(word), Err(NightError::NotADate(_))), "{word}");
    }
    assert_eq!(nights.list().unwrap(), [date("2026-11-23"), date("2026-11-24")]);
    world.account = nights.live().take();
    world.at = from;
    world.round();
    *nights.live() = world.account.take();
    world.at = from + 10 * SECOND;
    assert_eq!(night("").unwrap(), "2026-11-23", "it begins now");
    world.account = nights.live().take();
    world.round();
    *nights.live() = world.account.take();
    assert_eq!(night("").unwrap(), "2026-11-24");
}

/// Tags open and close as in XML, and attributes are quoted.
fn assert_well_formed(html: &str) {
    let body = html.strip_prefix("<!DOCTYPE html>\n").unwrap();
    let mut open: Vec<&str> = Vec::new();
    let mut rest = body;
    while let Some(at) = rest.find('<') {
        let text = &rest[..at];
        assert!(!text.contains('>') || open.last() == Some(&"style"), "a lone > in {text:?}");
        let end = at + rest[at..].find('>').expect("a tag that ends");
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
        } else {
            let name = tag.split([' ', '/']).next().unwrap();
            assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()), "{tag:?}");
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag:?}");
            assert!(!["script", "iframe", "link", "img", "object"].contains(&name), "{tag:?}");
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
    }
    assert!(open.is_empty(), "{open:?} stay open");
    for c in html.split('&').skip(1) {
        assert!(
            ["amp;", "lt;", "gt;", "quot;", "#39;"].iter().any(|entity| c.starts_with(entity)),
            "&{c:.9}"
        );
    }
    for elsewhere in ["http:", "https:", "src=", "url(", "@import", "javascript"] {
        assert!(!html.contains(elsewhere), "{elsewhere}");
    }
}

#[test]
fn the_page_is_whole_and_shows_no_ones_tags() {
    let evil = "<script>alert(\"1\")</script>&amp;'\u{202e}\u{7}\u{9b}";
    assert_eq!(
        escaped(evil),
        "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;amp;&#39;\u{fffd}\u{fffd}\u{fffd}"
    );
    let mut world = World::new(us("2026-11-24T22:00[Europe/Berlin]"));
    world.round();
    let news = RunNews {
        name: evil.into(),
        active: true,
        state: "running",
        step: 1,
        loss: Some(2.0),
        ..RunNews::default()
    };
    for i in 0..40u8 {
        world.doing = if i % 4 == 3 { Doing::Waiting(Reason::Leased) } else { Doing::Training };
        (world.duty, world.limit) = (0.7, Some(Reason::Thermal));
        world.news.runs.insert(RunId::from_bits([i % 3; 6]), RunNews { step: i.into(), ..news.clone() });
        world.news.held.insert(evil.into(), Held { count: 1, time: Duration::from_secs(1) });
        world.energy += 100.0;
        world.go(45.0);
    }
    let mut report = world.report();
    for text in [&mut report.headline, &mut report.night, &mut report.zone] {
        text.push_str(evil);
    }
    report.advice.push(evil.into());
    report.zones.insert(evil.into(), 50.0);
    report.notes.push(super::figures::NoteSeen { text: evil.into(), first: report.from_us, seconds: 3.0 });
    report.modes.push(super::figures::ModeSeen { at: i64::MAX, mode: evil.into() });
    report.window.uses[0].what = evil.into();
    report.intervals[1].uses.insert(evil.into(), 9.0);
    report.runs[0].state = evil.into();
    report.runs[0].reason = Some(evil.into());
    let html = page(&report);
    assert_well_formed(&html);
    for what in [
        "<polyline class=\"c-temperature\"",
        "c-limit",
        "c-power",
        "c-loss",
        "u-training",
        "u-thermal",
        "u-leased",
    ] {
        assert!(html.contains(what), "{what}");
    }
    // Every use has a colour, and a report of nothing is a page, too.
    for reason in Reason::ALL {
        assert!(html.contains(&format!(".u-{}", reason.word())), "{reason} has no colour");
    }
    assert_well_formed(&page(&Report::default()));
    assert_well_formed(&page(&Report { from_us: i64::MIN, to_us: i64::MAX, ..Report::default() }));
}

#[test]
fn json_is_read_back_and_tolerates_what_is_new() {
    let mut world = World::new(us("2026-11-24T22:00[Europe/Berlin]"));
    world.doing = Doing::Training;
    world.round();
    world.go(100.0);
    let report = world.report();
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    assert!(json.starts_with("{\"schema\":1,\"night\":\"2026-11-24\""), "{json}");
    let newer = json.replace("\"schema\":1,", "\"schema\":1,\"moon\":{\"phase\":0.3},");
    let newer = newer.replace("\"what\":\"training\"", "\"what\":\"dreaming\"");
    let read: Report = serde_json::from_str(&newer).unwrap();
    assert_well_formed(&page(&read));
}

/// What may happen to a machine at night.
#[derive(Clone, Debug)]
enum Happening {
    Passes { millis: u64 },
    Does { doing: u8, duty: f64, limit: u8 },
    Sleeps { seconds: u32, tells: bool },
    IsSet { by: i32 },
    Restarts { after: u16 },
    Hours { from: u8, hours: u8 },
}

fn happenings() -> impl Strategy<Value = Vec<Happening>> {
    let one = prop_oneof![
        8 => (0u64..20_000).prop_map(|millis| Happening::Passes { millis }),
        4 => (0u64..4_000_000).prop_map(|millis| Happening::Passes { millis }),
        6 => (0u8..40, 0.0f64..1.2, 0u8..40).prop_map(|(doing, duty, limit)| Happening::Does { doing, duty, limit }),
        1 => (0u32..40_000, any::<bool>()).prop_map(|(seconds, tells)| Happening::Sleeps { seconds, tells }),
        1 => (-100_000i32..100_000).prop_map(|by| Happening::IsSet { by }),
        2 => (0u16..60_000).prop_map(|after| Happening::Restarts { after }),
        1 => (0u8..24, 1u8..10).prop_map(|(from, hours)| Happening::Hours { from, hours }),
    ];
    prop::collection::vec(one, 1..120)
}

fn reason(number: u8) -> Reason {
    Reason::ALL[usize::from(number) % Reason::ALL.len()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever happens, at every moment the night is tiled up to now, and what passed while the daemon was there and the
    /// clock went on evenly is accounted to the microsecond.
    #[test]
    fn time_is_tiled_whatever_happens(start in 0i64..400 * 24, events in happenings()) {
        let mut world = World::new(us("2026-01-01T00:00[Europe/Berlin]") + start * HOUR);
        world.round();
        for event in events {
            match event {
                Happening::Passes { millis } => world.pass(millis as f64 / 1000.0),
                Happening::Does { doing, duty, limit } => {
                    world.doing = match doing {
                        0..8 => Doing::Training,
                        8 => Doing::Preparing,
                        9 => Doing::Evaluating,
                        10 => Doing::Saving,
                        other => Doing::Waiting(reason(other)),
                    };
                    (world.duty, world.limit) = (duty, (limit > 5).then(|| reason(limit)));
                    world.pass(0.5);
                }
                Happening::Sleeps { seconds, tells } => {
                    world.tells = tells;
                    world.slept += Duration::from_secs(seconds.into());
                    world.at += i64::from(seconds) * SECOND;
                    world.pass(0.5);
                }
                Happening::IsSet { by } => {
                    world.at += i64::from(by) * SECOND;
                    world.pass(0.5);
                }
                Happening::Restarts { after } => {
                    world.restart();
                    world.at += i64::from(after) * SECOND;
                    world.round();
                }
                Happening::Hours { from, hours } => {
                    let from = world.record().span.from + i64::from(from) * HOUR;
                    world.windows = vec![Span { from, to: from + i64::from(hours) * HOUR }];
                }
            }
            let record = world.record();
            assert_tiles(&record);
            prop_assert_eq!(record.through(), world.at, "accounted for until now");
            let report = Report::new(&record, false);
            for sums in [&report.whole, &report.window] {
                let sum: f64 = sums.uses.iter().map(|sum| sum.seconds).sum();
                prop_assert!((sum - sums.accounted_s).abs() < 1e-3, "{sum} of {}", sums.accounted_s);
            }
            let over = Report::new(&record, true);
            prop_assert!((over.whole.accounted_s - over.whole.seconds).abs() < 1e-3);
            prop_assert!((over.window.accounted_s - over.window.seconds).abs() < 1e-3, "{over:?}");
            let json = serde_json::to_string(&report).unwrap();
            let read: Report = serde_json::from_str(&json).unwrap();
            prop_assert_eq!(&read, &report);
        }
        assert_well_formed(&page(&world.report()));
    }

    /// A segment is divided to the microsecond.
    #[test]
    fn parts_are_the_whole(uses in prop::collection::vec((0u8..40, 1i64..1_000_000_000), 1..8), cut in 0.0f64..1.0) {
        let uses: super::record::Uses = uses.into_iter().map(|(usage, us)| (Use::Lost(reason(usage)), us)).collect();
        let length: i64 = uses.values().sum();
        let whole = Segment { span: Span { from: 1000, to: 1000 + length }, uses };
        let at = 1000 + (cut * length as f64) as i64;
        let parts: Vec<Segment> = [Span { from: 0, to: at }, Span { from: at, to: i64::MAX }]
            .into_iter()
            .filter_map(|span| whole.clone().clipped(span))
            .collect();
        let mut sum = super::record::Uses::new();
        for part in &parts {
            prop_assert!(part.is_sound(), "{part:?}");
            part.uses.iter().for_each(|(usage, us)| *sum.entry(*usage).or_default() += us);
        }
        prop_assert_eq!(sum, whole.uses);
    }

    /// No content of a file makes it panic, or makes a record that does not tile.
    #[test]
    fn any_content_is_a_record(lines in prop::collection::vec(prop_oneof![
        "[ -~]{0,60}",
        (any::<i64>(), any::<i64>(), any::<i64>()).prop_map(|(from, to, us)| format!(
            "{{\"segment\":{{\"from_us\":{from},\"to_us\":{to},\"uses_us\":{{\"training\":{us}}}}}}}"
        )),
        (0i64..100_000, 0i64..100_000).prop_map(|(from, length)| {
            let from = us("2026-11-24T12:00[Europe/Berlin]") + from * SECOND;
            let us = length * SECOND;
            format!("{{\"segment\":{{\"from_us\":{from},\"to_us\":{},\"uses_us\":{{\"leased\":{us}}}}}}}", from + us)
        }),
        (any::<i64>(), any::<i64>()).prop_map(|(from, to)| format!("{{\"windows\":[{{\"from_us\":{from},\"to_us\":{to}}}]}}")),
        any::<i64>().prop_map(|at| format!("{{\"point\":{{\"at_us\":{at},\"power\":3.5}}}}")),
    ], 0..20)) {
        let record = parse(lines.join("\n").as_bytes(), date("2026-11-24"), &zone()).unwrap();
        let mut at = record.span.from;
        for segment in &record.segments {
            prop_assert!(segment.is_sound() && segment.span.from == at);
            at = segment.span.to;
        }
        assert_well_formed(&page(&Report::new(&record, true)));
    }
}
