//! Keeps the account of the night: what the governor's thread saw in a round goes into it, and to disk.
//!
//! ```text
//!   round ──► Observation ──► Account (shared with the bus) ──► nights/<date>.jsonl, every ten seconds
//!                                │ a window closes, the night ends, a start after it
//!                                └──► nights/<date>.html
//! ```
//!
//! A disk that refuses costs the record, never the round.

use crate::checkpoint::atomic_write;
use crate::clock::Clock;
use crate::config::budget::Window;
use crate::governor::door::Activity;
use crate::governor::energy::{Ledger, night_of};
use crate::governor::readings::Readings;
use crate::governor::{Ruling, View};
use crate::night::account::Moment;
use crate::night::store::{self, page_of};
use crate::night::{
    Account, NightError, Nights, Observation, Record, Report, Span, Store, bounds, html, zone_name,
};
use crate::reason::Reason;
use crate::scheduler::conditions::Schedule;
use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// Two questions for the time that lie this close were asked at one moment.
const TOGETHER: Duration = Duration::from_millis(200);
/// How often they are asked.
const TRIES: u32 = 5;

/// What was ruled in the round before, and so what held since.
#[derive(Clone, Copy, Debug)]
struct Ruled {
    duty: f64,
    limit: Option<Reason>,
}

/// The keeper of the account.
pub struct Keeper {
    nights: Nights,
    store: Store,
    ruled: Ruled,
    /// The hours that were asked for last, and what they mean in the night.
    windows: (Option<(Window, Moment)>, Vec<Span>),
    /// A window was open in the last round.
    open: bool,
    /// The disk refuses; it was said.
    refused: bool,
}

/// What a round found, and did.
pub struct Round<'a> {
    /// Time.
    pub clock: &'a dyn Clock,
    /// The hours.
    pub window: &'a Window,
    /// What the runs do.
    pub activity: &'a Activity,
    /// What was read.
    pub readings: &'a Readings,
    /// What was spent.
    pub ledger: &'a Ledger,
    /// Quotas count all energy.
    pub gross: bool,
    /// What holds from now on.
    pub ruling: &'a Ruling,
    /// What people see.
    pub view: &'a View,
}

impl Keeper {
    /// The keeper of the records below a directory. Reports on earlier nights that were not written are written now.
    pub fn new(directory: &Path, now: &dyn Clock) -> Keeper {
        let mut keeper = Keeper {
            nights: Nights::new(directory.to_path_buf()),
            store: Store::new(directory.to_path_buf()),
            ruled: Ruled { duty: 0.0, limit: None },
            windows: (None, Vec::new()),
            open: false,
            refused: false,
        };
        if let Some(moment) = moment(now) {
            keeper.catch_up(moment.date);
        }
        keeper
    }

    /// For who asks for a report.
    pub fn nights(&self) -> Nights {
        self.nights.clone()
    }

    /// Takes in a round.
    pub fn round(&mut self, round: &Round<'_>) {
        // At the ends of the calendar there is no night.
        let Some(moment) = moment(round.clock) else { return };
        self.look_up_windows(round.window, &moment);
        let ended = self.observe(round, &moment);
        let limit = round.ruling.hold.or(round.view.reason);
        let duty = if round.ruling.hold.is_some() { 0.0 } else { round.view.duty };
        self.ruled = Ruled { duty, limit };
        let open = self.windows.1.iter().any(|window| window.contains(moment.at));
        let closed = std::mem::replace(&mut self.open, open) && !open;
        if let Some(ended) = ended {
            self.finish(ended, moment.date);
        } else if closed {
            let record = self.nights.live().as_ref().map(|account| account.record().clone());
            let written = record.map_or(Ok(()), |record| self.write_page(&record, false));
            self.say(written);
        }
        let flushed = match self.nights.live().as_mut() {
            Some(account) => self.store.flush(account.record_mut(), moment.now),
            None => Ok(false),
        };
        match flushed {
            Ok(false) => {}
            flushed => self.say(flushed.map(|_| ())),
        }
    }

    /// The daemon ends: what is not on disk is written.
    pub fn end(&mut self) {
        let synced = match self.nights.live().as_mut() {
            Some(account) => self.store.sync(account.record_mut()),
            None => Ok(()),
        };
        self.say(synced);
    }

    fn look_up_windows(&mut self, window: &Window, moment: &Moment) {
        let same =
            |(of, at): &(Window, Moment)| of == window && at.night == moment.night && at.zone == moment.zone;
        if self.windows.0.as_ref().is_some_and(same) {
            return;
        }
        let at = |us: i64| Timestamp::from_microsecond(us).unwrap_or(Timestamp::UNIX_EPOCH);
        // Hours that cannot be read are never open; that they cannot was said when they were read.
        let open = Schedule::new(window).map(|schedule| {
            schedule.times.between(at(moment.night.from), at(moment.night.to), &TimeZone::system())
        });
        let span = |(from, to): (Timestamp, Timestamp)| Span {
            from: from.as_microsecond(),
            to: to.as_microsecond(),
        };
        let open = open.unwrap_or_default().into_iter().map(span).collect();
        self.windows = (Some((window.clone(), moment.clone())), open);
    }

    fn observe(&mut self, round: &Round<'_>, moment: &Moment) -> Option<Record> {
        let Round { activity, readings, ledger, view, .. } = round;
        let zones = readings.zones.iter();
        let seen = Observation {
            moment: moment.clone(),
            windows: &self.windows.1,
            doing: activity.doing,
            duty: self.ruled.duty,
            limit: self.ruled.limit,
            zones: zones.filter_map(|zone| Some((zone.name.as_str(), zone.temperature.value()?.0))).collect(),
            temperature: view.temperature.map(|(now, limit)| (now.0, limit.0)),
            power: view.power.map(|power| power.0),
            mode: readings.mode.as_deref(),
            notes: &view.notes,
            steps: activity.steps,
            tokens: activity.tokens,
            energy: ledger.night(moment.date).energy,
            run: activity.run.clone().map(|run| {
                let energy = ledger.entry(moment.date, &run).energy;
                (run, energy)
            }),
            gross: round.gross,
            news: &activity.news,
        };
        let store = &self.store;
        let open = |moment: &Moment| open(store, moment);
        let mut live = self.nights.live();
        live.get_or_insert_with(|| Account::new(open(moment))).observe(&seen, open)
    }

    /// A night is over.
    fn finish(&mut self, mut record: Record, tonight: Date) {
        let stored = self.store.finish(&mut record);
        self.say(stored);
        // A clock that was set back ends a night that is still to come.
        if record.date < tonight {
            tracing::info!("the night of {}: {}", record.date, Report::new(&record, true).headline);
            let written = self.write_page(&record, true);
            self.say(written);
        }
        let pruned = self.store.prune();
        self.say(pruned);
    }

    fn write_page(&self, record: &Record, over: bool) -> Result<(), NightError> {
        let path = page_of(self.store.directory(), record.date);
        let page = html::page(&Report::new(record, over));
        let fail = |source| NightError::File { action: "write", path: path.clone(), source };
        std::fs::create_dir_all(self.store.directory()).map_err(fail)?;
        atomic_write(&path, page.as_bytes()).map_err(|error| fail(std::io::Error::other(error)))
    }

    /// Writes the pages of nights that ended while no daemon was there.
    fn catch_up(&mut self, tonight: Date) {
        let directory = self.store.directory().to_path_buf();
        let missing = |date: &Date| {
            let modified = |path: &Path| path.metadata().and_then(|file| file.modified()).ok();
            let record = modified(&directory.join(format!("{date}.jsonl")));
            *date < tonight && modified(&page_of(&directory, *date)).is_none_or(|page| Some(page) < record)
        };
        let written = store::dates(&directory).and_then(|dates| {
            for date in dates.iter().filter(|date| missing(date)) {
                if let Some(record) = store::read(&directory, *date, &TimeZone::system())? {
                    self.write_page(&record, true)?;
                }
            }
            self.store.prune()
        });
        self.say(written);
    }

    /// Says once that the disk refuses, and once that it does no longer.
    fn say(&mut self, written: Result<(), NightError>) {
        match written {
            Ok(()) => self.refused = false,
            Err(error) => {
                if !std::mem::replace(&mut self.refused, true) {
                    tracing::warn!("{error}; the night's report will miss what was not written");
                }
            }
        }
    }
}

/// The record of a night as far as it is on disk, else a new one.
fn open(store: &Store, moment: &Moment) -> Record {
    let fresh = || Record::new(moment.date, moment.night, moment.zone.clone());
    match store::read(store.directory(), moment.date, &TimeZone::system()) {
        Ok(record) => {
            let record = record.unwrap_or_else(fresh);
            if record.damaged > 0 {
                tracing::warn!(
                    "{} lines of the record of the night {} could not be read",
                    record.damaged,
                    moment.date
                );
            }
            record
        }
        Err(error) => {
            tracing::warn!("{error}; the night's account begins anew");
            fresh()
        }
    }
}

/// Both clocks at one moment: a thread that is put aside between the two questions asks again.
fn together(clock: &dyn Clock) -> (Duration, SystemTime) {
    let mut before = clock.monotonic();
    for _ in 0..TRIES {
        let (wall, after) = (clock.wall(), clock.monotonic());
        if after.saturating_sub(before) <= TOGETHER {
            return (before, wall);
        }
        before = after;
    }
    (before, clock.wall())
}

fn moment(clock: &dyn Clock) -> Option<Moment> {
    let (now, wall) = together(clock);
    let suspended = clock.suspended();
    let zone = TimeZone::system();
    let at = Timestamp::try_from(wall).ok()?;
    let date = night_of(&at.to_zoned_datetime(zone.clone()));
    let night = bounds(date, &zone)?;
    Some(Moment { at: at.as_microsecond(), now, suspended, date, night, zone: zone_name(&zone, night.from) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::governor::control::Level;
    use crate::governor::door::Doing;
    use crate::governor::energy::Meter;
    use crate::governor::readings::Reading;
    use crate::night::Use;
    use crate::units::{RunId, Watts};
    use std::sync::Mutex;

    /// A clock that a test moves: monotonic and wall time.
    struct Hand(Mutex<(Duration, SystemTime)>);

    impl Hand {
        fn pass(&self, time: Duration) {
            let mut at = self.0.lock().unwrap();
            *at = (at.0 + time, at.1 + time);
        }
    }

    impl Clock for Hand {
        fn monotonic(&self) -> Duration {
            self.0.lock().unwrap().0
        }
        fn wall(&self) -> SystemTime {
            self.0.lock().unwrap().1
        }
        fn sleep(&self, _: Duration) {}
    }

    struct Bench {
        directory: tempfile::TempDir,
        clock: Hand,
        keeper: Keeper,
        ledger: Ledger,
        meter: Meter,
        booked: crate::governor::energy::Energy,
        window: Window,
        doing: Doing,
        duty: f64,
    }

    impl Bench {
        /// Half a minute before a night's noon, wherever the machine is.
        fn before_noon() -> Bench {
            let directory = tempfile::tempdir().unwrap();
            let noon = "2026-11-25T12:00".parse::<jiff::civil::DateTime>().unwrap();
            let noon = TimeZone::system().to_timestamp(noon).unwrap();
            let noon = Duration::from_micros(noon.as_microsecond().unsigned_abs());
            let wall = SystemTime::UNIX_EPOCH + noon - Duration::from_secs(30);
            let clock = Hand(Mutex::new((Duration::from_secs(500), wall)));
            Bench {
                keeper: Keeper::new(&directory.path().join("nights"), &clock),
                ledger: Ledger::open(&directory.path().join("energy.jsonl")).unwrap(),
                meter: Meter::default(),
                booked: Default::default(),
                window: Window { times: vec!["09:00-11:59".into()], ..Window::default() },
                doing: Doing::Training,
                duty: 0.5,
                directory,
                clock,
            }
        }

        fn round(&mut self) {
            let now = self.clock.monotonic();
            let power = Some(Reading::Value { value: Watts(30.0), at: now });
            let readings = Readings { at: now, power, ..Readings::default() };
            let run = RunId::from_bits([3; 6]);
            self.meter.step(&readings, true);
            let total = self.meter.total_at(now);
            let night = moment(&self.clock).unwrap().date;
            self.ledger.add(night, Some(&run), total - self.booked, 0);
            self.booked = total;
            let view = View {
                level: Level::Soft,
                duty: self.duty,
                reason: Some(Reason::PowerBudget),
                power: Some(Watts(30.0)),
                ..View::default()
            };
            let activity = Activity { run: Some(run), doing: self.doing, ..Activity::default() };
            self.keeper.round(&Round {
                clock: &self.clock,
                window: &self.window,
                activity: &activity,
                readings: &readings,
                ledger: &self.ledger,
                gross: true,
                ruling: &Ruling { duty: self.duty, ..Ruling::FREE },
                view: &view,
            });
        }

        fn go(&mut self, rounds: u32) {
            for _ in 0..rounds {
                self.clock.pass(Duration::from_millis(500));
                self.round();
            }
        }
    }

    #[test]
    fn a_night_that_ends_is_complete_on_disk_and_the_next_one_begins() {
        let mut bench = Bench::before_noon();
        bench.round();
        bench.go(120);
        let nights = bench.keeper.nights();
        let (before, after) = (nights.report("2026-11-24").unwrap(), nights.report("now").unwrap());
        assert!(before.over && !after.over);
        assert_eq!((before.night.as_str(), after.night.as_str()), ("2026-11-24", "2026-11-25"));
        for report in [&before, &after] {
            assert!((report.whole.of(Use::Training) - 15.0).abs() < 0.3, "{:?}", report.whole);
            assert!(
                (report.whole.of(Use::Lost(Reason::PowerBudget)) - 15.0).abs() < 0.3,
                "{:?}",
                report.whole
            );
            let night: Date = report.night.parse().unwrap();
            let energy = bench.ledger.night(night).energy;
            let told = report.energy.as_ref().unwrap();
            assert_eq!(told.gross_j, energy.gross.0, "the ledger's");
            assert!((told.gross_j - 900.0).abs() < 30.0, "30 W for 30 s: {told:?}");
        }
        let page = bench.directory.path().join("nights/2026-11-24.html");
        assert!(std::fs::read_to_string(page).unwrap().contains("complete"));
        // Another daemon goes on with it.
        bench.keeper.end();
        bench.keeper = Keeper::new(&bench.directory.path().join("nights"), &bench.clock);
        bench.clock.pass(Duration::from_secs(60));
        bench.round();
        let report = bench.keeper.nights().report("now").unwrap();
        assert!((report.whole.of(Use::Lost(Reason::Off)) - 60.0).abs() < 1e-6, "{:?}", report.whole);
        assert_eq!((report.starts, report.damaged), (1, 0), "{:?}", report.whole);
    }

    #[test]
    fn a_page_is_written_when_a_window_closes_and_what_was_missed_at_the_start() {
        let mut bench = Bench::before_noon();
        bench.window.times = vec!["09:00-11:59".into(), "12:01-12:02".into()];
        bench.go(320);
        let page = |bench: &Bench, night: &str| {
            std::fs::read_to_string(bench.directory.path().join(format!("nights/{night}.html")))
        };
        assert!(page(&bench, "2026-11-25").unwrap().contains("it goes on"), "a window closed at 12:02");
        std::fs::remove_file(bench.directory.path().join("nights/2026-11-24.html")).unwrap();
        Keeper::new(&bench.directory.path().join("nights"), &bench.clock);
        assert!(page(&bench, "2026-11-24").unwrap().contains("complete"));
    }

    #[test]
    fn a_disk_that_refuses_does_not_stop_the_rounds() {
        let mut bench = Bench::before_noon();
        std::fs::write(bench.directory.path().join("nights"), "in the way").unwrap();
        bench.round();
        bench.go(120);
        assert!(bench.keeper.refused);
        let report = bench.keeper.nights().report("now").unwrap();
        assert!((report.whole.of(Use::Training) - 15.0).abs() < 0.3, "{:?}", report.whole);
        std::fs::remove_file(bench.directory.path().join("nights")).unwrap();
        bench.go(30);
        assert!(!bench.keeper.refused);
        assert!(bench.directory.path().join("nights/2026-11-25.jsonl").exists());
    }
}
