//! When a run will be complete: its computing laid over the hours, and over the energy of each night.
//!
//! ```text
//!   for each night (noon to noon): for each stretch that is open
//!       prepare (where the worker was ended since) ─► compute, at the duty
//!       until  complete │ the hours end │ the night's energy │ the run's energy │ the deadline
//! ```
//!
//! Pure: the time is passed in. Hours are those of the calendar, clock changes included ([`super::window`]).

use super::conditions::Schedule;
use super::window::Windows;
use crate::config::budget::{Budget, Window};
use crate::governor::energy::night_of;
use crate::plan::page::{self, Calendar, EnergyFacts, Limit, Night, Page, Refusal, Survey, Time, length};
use crate::plan::roofline::Device;
use crate::plan::throughput::{Likeness, Machine, Speed, Workload};
use crate::units::Joules;
use jiff::civil::Date;
use jiff::{SignedDuration, Timestamp, ToSpan, ZonedDateTime};

/// Farther ahead than a year nobody plans, and hours repeat every week.
const MOST_NIGHTS: usize = 366;
/// Nights without any progress after which there will be none: the hours of four weeks, and a clock change.
const FRUITLESS_NIGHTS: usize = 30;
/// A pause that the worker survives (`worker.keep_when_held` by default): going on costs no preparation.
const KEPT: SignedDuration = SignedDuration::from_secs(600);

/// What is to be computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// Steps.
    pub steps: u64,
    /// Seconds of computing at full duty, without preparation.
    pub seconds: f64,
    /// Seconds of each preparation.
    pub prepare: f64,
    /// Share of the time that it may compute.
    pub duty: f64,
    /// Power while it computes, as the quotas count it, in W; absent where nothing is known, and no quota then holds.
    pub watts: Option<f64>,
}

/// What it is laid over.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// The hours.
    pub times: &'a Windows,
    /// Energy of a night.
    pub per_night: Option<Joules>,
    /// What is gone of tonight's.
    pub spent: Joules,
    /// Energy of the run.
    pub per_run: Option<Joules>,
    /// Nothing is computed later.
    pub until: Option<Timestamp>,
}

/// How it goes.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// Nights in which something is computed.
    pub nights: Vec<Night>,
    /// When it is complete.
    pub finish: Option<Timestamp>,
    /// What is in the way of that; absent when it is complete.
    pub obstacle: Option<Obstacle>,
    /// Seconds of computing done, without preparation.
    pub done: f64,
    /// Energy, preparation included, as the quotas count it.
    pub joules: Option<Joules>,
}

/// Why it is never complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// The hours never open.
    Closed,
    /// They are shorter than the preparation.
    TooShort,
    /// A night's energy does not last for the preparation.
    NightQuota,
    /// The run's energy does not last.
    RunQuota,
    /// It would take longer than a year.
    TooLong,
    /// The deadline comes first.
    Deadline,
}

/// Lays `demand` over `limits`, beginning at `now`.
pub fn forecast(demand: &Demand, limits: &Limits<'_>, now: &ZonedDateTime) -> Forecast {
    let mut walk = Walk {
        demand,
        limits,
        at: now.clone(),
        done: 0.0,
        steps: 0,
        spent: 0.0,
        ran_until: None,
        nights: Vec::new(),
        idle_nights: 0,
    };
    let ended = walk.go();
    let (finish, obstacle) = match ended {
        Ok(finish) => (Some(finish), None),
        Err(obstacle) => (None, Some(obstacle)),
    };
    let joules = demand.watts.map(|_| Joules(walk.spent));
    Forecast { nights: walk.nights, finish, obstacle, done: walk.done, joules }
}

struct Walk<'a> {
    demand: &'a Demand,
    limits: &'a Limits<'a>,
    at: ZonedDateTime,
    /// Seconds of computing, steps and joules so far.
    done: f64,
    steps: u64,
    spent: f64,
    /// When the worker last computed.
    ran_until: Option<Timestamp>,
    nights: Vec<Night>,
    idle_nights: usize,
}

/// A night in the making.
struct Tonight {
    date: Date,
    end: Timestamp,
    from: Option<Timestamp>,
    to: Timestamp,
    open: f64,
    computing: f64,
    /// Joules left of the quota.
    left: f64,
    spent: f64,
    limit: Limit,
}

impl Walk<'_> {
    fn go(&mut self) -> Result<Timestamp, Obstacle> {
        let mut spent = self.limits.spent.0;
        for _ in 0..MOST_NIGHTS {
            let mut tonight = self.begin(std::mem::take(&mut spent))?;
            let finish = self.night(&mut tonight)?;
            let limit = tonight.limit;
            self.end(tonight, finish.is_some());
            if let Some(finish) = finish {
                return Ok(finish);
            }
            match limit {
                Limit::EnergyOfRun => return Err(Obstacle::RunQuota),
                Limit::Deadline => return Err(Obstacle::Deadline),
                _ => {}
            }
            if self.idle_nights >= FRUITLESS_NIGHTS {
                let quota = limit == Limit::EnergyQuota;
                return Err(if quota { Obstacle::NightQuota } else { Obstacle::TooShort });
            }
        }
        Err(Obstacle::TooLong)
    }

    fn begin(&self, spent: f64) -> Result<Tonight, Obstacle> {
        let date = night_of(&self.at);
        // Beyond the calendar's end there are no nights.
        let next = date.tomorrow().map_err(|_| Obstacle::TooLong)?;
        let noon = self.at.time_zone().to_timestamp(next.at(12, 0, 0, 0)).map_err(|_| Obstacle::TooLong)?;
        let end = self.limits.until.map_or(noon, |until| noon.min(until));
        let left = match (self.limits.per_night, self.demand.watts) {
            (Some(quota), Some(_)) => quota.0 - spent,
            _ => f64::INFINITY,
        };
        let limit = if end < noon { Limit::Deadline } else { Limit::Window };
        Ok(Tonight { date, end, from: None, to: end, open: 0.0, computing: 0.0, left, spent: 0.0, limit })
    }

    /// Computes until the night ends; when the run is complete, if it is.
    fn night(&mut self, tonight: &mut Tonight) -> Result<Option<Timestamp>, Obstacle> {
        let before = self.done;
        let mut finish = None;
        while self.at.timestamp() < tonight.end && finish.is_none() {
            let change = self.limits.times.next_change(&self.at);
            let stop = change.map_or(tonight.end, |change| change.min(tonight.end));
            if !self.limits.times.at(&self.at) {
                if change.is_none() {
                    return Err(Obstacle::Closed);
                }
                self.move_to(stop);
                continue;
            }
            tonight.open += seconds_between(self.at.timestamp(), stop);
            match self.stretch(tonight, stop) {
                Stretch::Complete(at) => finish = Some(at),
                Stretch::Over => self.move_to(stop),
                Stretch::Spent(limit) => {
                    tonight.limit = limit;
                    self.move_to(tonight.end);
                }
            }
        }
        // A deadline may have passed before the first night began.
        self.move_to(tonight.end.max(self.at.timestamp()));
        self.idle_nights = if self.done > before { 0 } else { self.idle_nights + 1 };
        Ok(finish)
    }

    /// Computes from now to `stop`, as far as energy lasts.
    fn stretch(&mut self, tonight: &mut Tonight, stop: Timestamp) -> Stretch {
        let now = self.at.timestamp();
        let Demand { seconds, prepare, duty, watts, .. } = *self.demand;
        let parked = self.ran_until.is_some_and(|until| now.duration_since(until) <= KEPT);
        let prepare = if parked { 0.0 } else { prepare };
        let of_run = match (self.limits.per_run, watts) {
            (Some(quota), Some(_)) => quota.0 - self.spent,
            _ => f64::INFINITY,
        };
        let scarce = if of_run <= tonight.left { Limit::EnergyOfRun } else { Limit::EnergyQuota };
        let energy = tonight.left.min(of_run);
        let lasting = watts.map_or(f64::INFINITY, |watts| energy / watts.max(f64::MIN_POSITIVE));
        let open = seconds_between(now, stop);
        let prepared = prepare.min(open).min(lasting.max(0.0));
        let whole = prepared >= prepare;
        let wanted = seconds - self.done;
        let by_hours = if whole { (open - prepared).max(0.0) * duty } else { 0.0 };
        let by_energy = (lasting - prepared).max(0.0);
        let computed = if whole { wanted.min(by_hours).min(by_energy) } else { 0.0 };
        if prepared + computed > 0.0 {
            tonight.from = tonight.from.or(Some(now));
            tonight.to = later(now, prepared + computed / duty).min(stop);
            self.ran_until = Some(tonight.to);
        }
        self.done += computed;
        tonight.computing += prepared + computed;
        if let Some(watts) = watts {
            let joules = (prepared + computed) * watts;
            tonight.left -= joules;
            tonight.spent += joules;
            self.spent += joules;
        }
        if whole && computed >= wanted {
            Stretch::Complete(tonight.to)
        } else if lasting - prepared <= computed {
            Stretch::Spent(scarce)
        } else {
            Stretch::Over
        }
    }

    fn move_to(&mut self, at: Timestamp) {
        self.at = at.to_zoned_datetime(self.at.time_zone().clone());
    }

    fn end(&mut self, tonight: Tonight, complete: bool) {
        let Some(from) = tonight.from else { return };
        let Demand { steps, seconds, .. } = *self.demand;
        let share = if seconds > 0.0 { self.done / seconds } else { 1.0 };
        let until = if complete { steps } else { ((steps as f64 * share) as u64).clamp(self.steps, steps) };
        let zone = self.at.time_zone();
        self.nights.push(Night {
            date: tonight.date.to_string(),
            from: shown(from, zone),
            to: shown(tonight.to, zone),
            open: tonight.open,
            computing: tonight.computing,
            steps: until - self.steps,
            joules: self.demand.watts.map(|_| Joules(tonight.spent)),
            limit: if complete { Limit::Complete } else { tonight.limit },
        });
        self.steps = until;
    }
}

/// How a stretch ended.
enum Stretch {
    Complete(Timestamp),
    Over,
    Spent(Limit),
}

fn seconds_between(from: Timestamp, to: Timestamp) -> f64 {
    to.duration_since(from).as_secs_f64()
}

/// A moment so many seconds later; at most a year, which no stretch is.
fn later(at: Timestamp, seconds: f64) -> Timestamp {
    let nanoseconds = (seconds.clamp(0.0, 366.0 * 86_400.0) * 1e9) as i64;
    at.checked_add(nanoseconds.nanoseconds()).unwrap_or(at)
}

/// Local time with its offset, to the second.
fn shown(at: Timestamp, zone: &jiff::tz::TimeZone) -> String {
    at.to_zoned_datetime(zone.clone()).strftime("%Y-%m-%dT%H:%M:%S%:z").to_string()
}

/// What holds on this machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outlook {
    /// The hours.
    pub window: Window,
    /// The budget.
    pub budget: Budget,
    /// What runs have taken of tonight's energy, as the quota counts it.
    pub spent: Joules,
    /// Board and power mode.
    pub machine: Machine,
}

impl Outlook {
    /// The set-points that the duty hangs on, as one text.
    pub fn set_points(budget: &Budget) -> String {
        let power = budget.power.map_or(String::new(), |power| format!(", {power}"));
        format!("{}{power}", budget.temperature)
    }
}

/// What is known of the speed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    /// Speed; absent where nothing was measured.
    pub speed: Option<Speed>,
    /// Whether it was measured for this page.
    pub probed: bool,
    /// What is computed on, for a prediction where nothing was measured; absent where nothing can be predicted.
    pub device: Option<Device>,
}

impl Known {
    /// The speed of a workload that was just prepared in so many seconds: as measured, or else as predicted.
    fn of(&self, work: &Workload, prepared_in: f64) -> Option<Speed> {
        let predicted = || self.device.as_ref().map(|device| Speed::predicted(work, device));
        self.speed.clone().or_else(predicted).map(|speed| speed.prepared_in(prepared_in))
    }
}

/// The page of a run that would begin at `now`, and should be complete before `before`.
pub fn page(
    survey: Survey,
    known: &Known,
    outlook: &Outlook,
    before: Option<Timestamp>,
    now: &ZonedDateTime,
) -> Page {
    let mut page = Page {
        schema: page::SCHEMA,
        facts: survey.facts,
        time: None,
        energy: None,
        calendar: None,
        refusals: Vec::new(),
        notes: Vec::new(),
    };
    page.refusals.extend(memory(&page.facts));
    let work = survey.workload;
    let device = known.device.as_ref().filter(|_| known.speed.is_none());
    let Some(speed) = known.of(&work, survey.prepared_in) else {
        if before.is_some() {
            page.notes.push("whether it is complete in time is not known without the speed".into());
        }
        return page;
    };
    let parts = speed.parts(&work);
    let duty = speed.duty.unwrap_or(1.0);
    let stretched = 1.0 + speed.error;
    let basis = if known.probed && speed.likeness == Likeness::Same {
        page::Basis::Probe
    } else {
        speed.likeness.into()
    };
    page.time = Some(Time {
        seconds: parts.total(),
        between: (parts.total() / stretched, parts.total() * stretched),
        parts,
        tokens_per_second: work.tokens as f64 / parts.train.max(1e-9),
        tokens: work.tokens,
        basis,
        device: device.map(|device| device.name.clone()),
        records: speed.records,
        measured_tokens: speed.tokens,
        duty,
        duty_known: speed.duty.is_some(),
    });
    let computing = parts.total() - parts.prepare;
    page.energy = speed.watts.map(|(gross, above_idle)| EnergyFacts {
        gross: Joules(gross * parts.total()),
        above_idle: Joules(above_idle * parts.total()),
        per_token: Joules(gross * parts.total() / work.tokens.max(1) as f64),
    });
    let watts =
        speed.watts.map(|(gross, above_idle)| if outlook.budget.energy_gross { gross } else { above_idle });
    let demand = Demand { steps: work.steps, seconds: computing, prepare: parts.prepare, duty, watts };
    match Schedule::new(&outlook.window) {
        Ok(schedule) => {
            let limits = Limits {
                times: &schedule.times,
                per_night: outlook.budget.energy_per_night,
                spent: outlook.spent,
                per_run: outlook.budget.energy_per_run,
                until: None,
            };
            let plan = Plan { demand, limits, before, now };
            page.calendar = Some(plan.calendar(stretched));
            page.refusals.extend(plan.refusal());
        }
        // The configuration was checked when it was read.
        Err(error) => page.notes.push(format!("the hours cannot be read: {error}")),
    }
    let quota = outlook.budget.energy_per_night.or(outlook.budget.energy_per_run);
    if quota.is_some() && page.energy.is_none() {
        page.notes.push(
            "there is a quota of energy, and nothing is known of what this run takes: it is left out".into(),
        );
    }
    page
}

fn memory(facts: &page::Facts) -> Option<Refusal> {
    let (total, available) = (facts.memory.total, facts.memory.available?);
    if facts.memory.fits != Some(false) {
        return None;
    }
    let changes = match &facts.change {
        Some(page::Change { set, total, same_result }) => {
            let flags: Vec<String> = set.iter().map(|set| format!("--set {set}")).collect();
            let result = if *same_result { "the result is the same" } else { "longer rows would be cut" };
            vec![format!("{} takes {total}; {result}", flags.join(" "))]
        }
        None => vec!["no shorter sequence makes it fit: free memory, or take a smaller base".into()],
    };
    Some(Refusal {
        reason: "does-not-fit".into(),
        message: format!("this run does not fit: it would take {total}, {available} are available"),
        changes,
    })
}

/// A run over its hours and its quotas.
struct Plan<'a> {
    demand: Demand,
    limits: Limits<'a>,
    before: Option<Timestamp>,
    now: &'a ZonedDateTime,
}

impl Plan<'_> {
    fn forecast(&self, demand: Demand, limits: Limits<'_>) -> Forecast {
        forecast(&demand, &limits, self.now)
    }

    /// The demand if everything took so many times as long.
    fn stretched(&self, factor: f64) -> Demand {
        let Demand { seconds, prepare, .. } = self.demand;
        Demand { seconds: seconds * factor, prepare: prepare * factor, ..self.demand }
    }

    fn calendar(&self, stretched: f64) -> Calendar {
        let zone = self.now.time_zone();
        let likely = self.forecast(self.demand, self.limits);
        let ends = [1.0 / stretched, stretched]
            .map(|factor| self.forecast(self.stretched(factor), self.limits).finish);
        let [least, most] = ends.map(|finish| finish.map(|at| shown(at, zone)));
        Calendar {
            now: shown(self.now.timestamp(), zone),
            finish: likely.finish.map(|at| shown(at, zone)),
            between: least.zip(most),
            nights: likely.nights,
            before: self.before.map(|before| shown(before, zone)),
        }
    }

    /// Why it is never complete, or too late, and what would help.
    fn refusal(&self) -> Option<Refusal> {
        let found = self.forecast(self.demand, self.limits);
        match (found.obstacle, found.finish, self.before) {
            (Some(obstacle), ..) => Some(self.never(obstacle, &found)),
            (None, Some(finish), Some(before)) if finish > before => Some(self.late(finish, before)),
            _ => None,
        }
    }

    /// Fewer steps, as many as are done.
    fn fewer_steps(&self, done: f64) -> Option<String> {
        let steps = (self.demand.steps as f64 * done / self.demand.seconds.max(f64::MIN_POSITIVE)) as u64;
        (steps > 0).then(|| format!("--set train.max_steps={steps}"))
    }

    fn never(&self, obstacle: Obstacle, found: &Forecast) -> Refusal {
        let refusal = |reason: &str, message: String, changes: Vec<String>| Refusal {
            reason: reason.into(),
            message,
            changes,
        };
        let prepare = length(self.demand.prepare);
        let quota = |joules: Option<Joules>| joules.map_or(0.0, Joules::watt_hours);
        match obstacle {
            Obstacle::Closed => refusal(
                "outside-window",
                "the hours of [window] never open".into(),
                vec!["times = [\"22:00-06:00\"] in [window]".into()],
            ),
            Obstacle::TooShort => refusal(
                "outside-window",
                format!("the hours of [window] are shorter than the {prepare} that preparing the run takes"),
                vec![format!("hours that are longer than {prepare}")],
            ),
            Obstacle::NightQuota => refusal(
                "energy-quota",
                format!(
                    "{:.1} Wh a night (budget.energy_per_night) do not last for more than preparing the run",
                    quota(self.limits.per_night)
                ),
                self.night_quota(None).into_iter().collect(),
            ),
            Obstacle::RunQuota => {
                let all = self.forecast(self.demand, Limits { per_run: None, ..self.limits });
                let needed = all.joules.map_or(0.0, Joules::watt_hours);
                let higher = format!("energy_per_run = {} in [budget]", watt_hours(needed));
                refusal(
                    "energy-quota",
                    format!(
                        "it would take {needed:.1} Wh, and a run may take {:.1} (budget.energy_per_run)",
                        quota(self.limits.per_run)
                    ),
                    self.fewer_steps(found.done).into_iter().chain([higher]).collect(),
                )
            }
            Obstacle::TooLong | Obstacle::Deadline => refusal(
                "deadline",
                "it would take longer than a year".into(),
                self.fewer_steps(found.done).into_iter().collect(),
            ),
        }
    }

    fn late(&self, finish: Timestamp, before: Timestamp) -> Refusal {
        let zone = self.now.time_zone();
        let until = self.forecast(self.demand, Limits { until: Some(before), ..self.limits });
        let mut changes: Vec<String> = self.fewer_steps(until.done).into_iter().collect();
        match self.night_quota(Some(before)) {
            Some(quota) => changes.push(quota),
            None => {
                let missing = (self.demand.seconds - until.done) / self.demand.duty;
                changes.push(format!("hours that are longer, by {} in all before then", length(missing)));
            }
        }
        Refusal {
            reason: "deadline".into(),
            message: format!(
                "it would be complete at {}, later than {}",
                shown(finish, zone),
                shown(before, zone)
            ),
            changes,
        }
    }

    /// The smallest quota of a night, to a tenth of a watt-hour, with which it is complete, and in time. `None` where no
    /// quota helps.
    fn night_quota(&self, before: Option<Timestamp>) -> Option<String> {
        self.limits.per_night.zip(self.demand.watts)?;
        let helps = |tenths: u64| {
            let per_night = Some(Joules::from_watt_hours(tenths as f64 / 10.0));
            let finish = self.forecast(self.demand, Limits { per_night, ..self.limits }).finish;
            finish.is_some_and(|finish| before.is_none_or(|before| finish <= before))
        };
        let all = self.forecast(self.demand, Limits { per_night: None, ..self.limits }).joules?;
        let (mut short, mut enough) = (0, ((all + self.limits.spent).watt_hours() * 10.0).ceil() as u64 + 1);
        if !helps(enough) {
            return None;
        }
        while enough - short > 1 {
            let middle = short + (enough - short) / 2;
            if helps(middle) {
                enough = middle;
            } else {
                short = middle;
            }
        }
        Some(format!("energy_per_night = {} in [budget]", watt_hours(enough as f64 / 10.0)))
    }
}

/// An energy as the configuration writes it, rounded up to a tenth of a watt-hour.
fn watt_hours(value: f64) -> String {
    format!("{:.1}", (value * 10.0 - 1e-6).ceil() / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::times::Hours;
    use proptest::prelude::*;

    const HOUR: f64 = 3600.0;

    fn windows(texts: &[&str]) -> Windows {
        Windows::open_unless_given(&texts.iter().map(|text| text.to_string()).collect::<Vec<_>>()).unwrap()
    }

    fn at(text: &str) -> ZonedDateTime {
        text.parse().unwrap()
    }

    fn demand(steps: u64, hours: f64) -> Demand {
        Demand { steps, seconds: hours * HOUR, prepare: 0.0, duty: 1.0, watts: None }
    }

    fn limits(times: &Windows) -> Limits<'_> {
        Limits { times, per_night: None, spent: Joules(0.0), per_run: None, until: None }
    }

    /// Date, clock times, hours of computing and steps of each night.
    fn nights(forecast: &Forecast) -> Vec<(String, f64, u64, Limit)> {
        let of = |night: &Night| {
            let clock = |moment: &str| moment[11..16].to_string();
            let when = format!("{} {}-{}", night.date, clock(&night.from), clock(&night.to));
            (when, (night.computing / 36.0).round() / 100.0, night.steps, night.limit)
        };
        forecast.nights.iter().map(of).collect()
    }

    fn night(when: &str, hours: f64, steps: u64, limit: Limit) -> (String, f64, u64, Limit) {
        (when.to_string(), hours, steps, limit)
    }

    #[test]
    fn a_run_is_laid_over_its_nights() {
        let hours = windows(&["22:00-06:00"]);
        let now = at("2026-11-24T15:00[Europe/Berlin]");
        // 20 hours: 8, 8 and 4.
        let found = forecast(&demand(1000, 20.0), &limits(&hours), &now);
        assert_eq!(
            nights(&found),
            [
                night("2026-11-24 22:00-06:00", 8.0, 400, Limit::Window),
                night("2026-11-25 22:00-06:00", 8.0, 400, Limit::Window),
                night("2026-11-26 22:00-02:00", 4.0, 200, Limit::Complete),
            ]
        );
        assert_eq!(found.finish, Some(at("2026-11-27T02:00[Europe/Berlin]").timestamp()));
        // Half the time, and six minutes of preparation every night: (8 − 0.1) · 0.5 a night.
        let slow = Demand { duty: 0.5, prepare: 360.0, ..demand(79, 7.9) };
        let found = forecast(&slow, &limits(&hours), &now);
        assert_eq!(
            nights(&found),
            [
                night("2026-11-24 22:00-06:00", 4.05, 39, Limit::Window),
                night("2026-11-25 22:00-06:00", 4.05, 40, Limit::Complete),
            ]
        );
        // It begins in the middle of the night, and no hours are always.
        let found = forecast(&demand(3, 1.5), &limits(&hours), &at("2026-11-25T05:00[Europe/Berlin]"));
        assert_eq!(
            nights(&found)[0],
            night("2026-11-24 05:00-06:00", 1.0, 2, Limit::Window),
            "two of three steps in an hour of one and a half"
        );
        let always = windows(&[]);
        let found = forecast(&demand(3, 30.0), &limits(&always), &now);
        assert_eq!(found.finish, Some(at("2026-11-25T21:00[Europe/Berlin]").timestamp()));
        assert_eq!(found.nights.len(), 2, "the night changes at noon");
    }

    #[test]
    fn the_clock_is_set_in_the_night() {
        let hours = windows(&["22:00-06:00"]);
        // Berlin: 7 hours in the night to 29 March 2026, 9 in that to 25 October.
        for (evening, expected) in [("2026-03-28", 7.0), ("2026-10-24", 9.0), ("2026-06-01", 8.0)] {
            let now = at(&format!("{evening}T20:00[Europe/Berlin]"));
            let found = forecast(&demand(100, 20.0), &limits(&hours), &now);
            assert_eq!(found.nights[0].computing / HOUR, expected, "{evening}");
        }
    }

    #[test]
    fn the_energy_of_a_night_ends_it_and_that_of_the_run_for_good() {
        let hours = windows(&["22:00-06:00"]);
        let now = at("2026-11-24T15:00[UTC]");
        // 20 W: 40 Wh are two hours. Tonight 10 Wh are gone already.
        let demand = Demand { watts: Some(20.0), ..demand(50, 5.0) };
        let wh = Joules::from_watt_hours;
        let quota = Limits { per_night: Some(wh(40.0)), spent: wh(10.0), ..limits(&hours) };
        let found = forecast(&demand, &quota, &now);
        assert_eq!(
            nights(&found),
            [
                night("2026-11-24 22:00-23:30", 1.5, 15, Limit::EnergyQuota),
                night("2026-11-25 22:00-00:00", 2.0, 20, Limit::EnergyQuota),
                night("2026-11-26 22:00-23:30", 1.5, 15, Limit::Complete),
            ]
        );
        assert_eq!(found.joules, Some(wh(100.0)));
        let of_run = Limits { per_run: Some(wh(60.0)), ..limits(&hours) };
        let found = forecast(&demand, &of_run, &now);
        assert_eq!((found.obstacle, found.done), (Some(Obstacle::RunQuota), 3.0 * HOUR));
        assert_eq!(nights(&found), [night("2026-11-24 22:00-01:00", 3.0, 30, Limit::EnergyOfRun)]);
    }

    #[test]
    fn what_can_never_be_is_said_with_its_reason() {
        let now = at("2026-11-24T15:00[UTC]");
        let never = |demand: Demand, times: &Windows, per_night: Option<f64>| {
            let limits = Limits { per_night: per_night.map(Joules), ..limits(times) };
            forecast(&demand, &limits, &now).obstacle
        };
        let closed = Windows::closed_unless_given(&[]).unwrap();
        assert_eq!(never(demand(5, 1.0), &closed, None), Some(Obstacle::Closed));
        let short = windows(&["22:00-22:10"]);
        let prepares = Demand { prepare: 601.0, watts: Some(10.0), ..demand(5, 1.0) };
        assert_eq!(never(prepares, &short, None), Some(Obstacle::TooShort));
        let nights = windows(&["22:00-06:00"]);
        assert_eq!(never(prepares, &nights, Some(6009.0)), Some(Obstacle::NightQuota));
        assert_eq!(never(prepares, &nights, Some(60_090.0)), None);
        assert_eq!(never(demand(5, 5000.0), &nights, None), Some(Obstacle::TooLong));
        // A window of one day a week is slow, not shut.
        assert_eq!(never(demand(5, 20.0), &windows(&["sun 02:00-03:00"]), None), None);
    }

    fn plan<'a>(
        demand: Demand,
        limits: Limits<'a>,
        before: Option<&str>,
        now: &'a ZonedDateTime,
    ) -> Plan<'a> {
        Plan { demand, limits, before: before.map(|text| at(text).timestamp()), now }
    }

    /// The demand of so many steps of a run.
    fn of_steps(demand: Demand, steps: u64) -> Demand {
        Demand { steps, seconds: demand.seconds * steps as f64 / demand.steps as f64, ..demand }
    }

    #[test]
    fn a_prediction_takes_the_preparation_that_was_measured() {
        let device = Some(Device { name: "a chip".into(), flops: 1e12, bandwidth: 1e11 });
        let known = Known { device, ..Known::default() };
        let work = Workload::default();
        assert_eq!(known.of(&work, 7.0).unwrap().parts(&work).prepare, 7.0);
        assert_eq!(Known::default().of(&work, 7.0), None);
    }

    #[test]
    fn the_changes_that_are_offered_do_help() {
        let hours = windows(&["22:00-06:00"]);
        let now = at("2026-11-24T15:00[UTC]");
        let demand = Demand { watts: Some(20.0), prepare: 60.0, ..demand(1000, 5.0) };
        let wh = Joules::from_watt_hours;

        // Two hours a night are too few to be complete on the 26th.
        let before = Some("2026-11-26T12:00[UTC]");
        let quota = Limits { per_night: Some(wh(40.0)), ..limits(&hours) };
        let refusal = plan(demand, quota, before, &now).refusal().unwrap();
        assert_eq!(refusal.reason, "deadline");
        // 2 · 40 Wh at 20 W are 4 h, two minutes of them preparation; 2.5 h and a minute need 50.4 Wh a night.
        assert_eq!(refusal.changes, ["--set train.max_steps=793", "energy_per_night = 50.4 in [budget]"]);
        assert_eq!(plan(of_steps(demand, 793), quota, before, &now).refusal(), None);
        assert!(plan(of_steps(demand, 794), quota, before, &now).refusal().is_some());
        let higher = |tenths: f64| Limits { per_night: Some(wh(tenths)), ..quota };
        assert_eq!(plan(demand, higher(50.4), before, &now).refusal(), None);
        assert!(plan(demand, higher(50.3), before, &now).refusal().is_some());

        // No quota is in the way of this one: the hours are.
        let before = Some("2026-11-25T01:00[UTC]");
        let refusal = plan(demand, limits(&hours), before, &now).refusal().unwrap();
        assert_eq!(
            refusal.changes,
            ["--set train.max_steps=596", "hours that are longer, by 2 h 1 min in all before then"]
        );
        assert_eq!(plan(of_steps(demand, 596), limits(&hours), before, &now).refusal(), None);
        assert_eq!(plan(demand, limits(&windows(&["19:00-06:00"])), before, &now).refusal(), None);

        let of_run = |quota: f64| Limits { per_run: Some(wh(quota)), ..limits(&hours) };
        let refusal = plan(demand, of_run(60.0), None, &now).refusal().unwrap();
        assert_eq!(refusal.reason, "energy-quota");
        // 5 h and a minute at 20 W.
        assert_eq!(refusal.changes, ["--set train.max_steps=596", "energy_per_run = 100.4 in [budget]"]);
        assert_eq!(plan(of_steps(demand, 596), of_run(60.0), None, &now).refusal(), None);
        assert_eq!(plan(demand, of_run(100.4), None, &now).refusal(), None);
        assert!(plan(demand, of_run(100.3), None, &now).refusal().is_some());
        let small = plan(demand, Limits { per_night: Some(wh(0.3)), ..limits(&hours) }, None, &now);
        assert_eq!(small.refusal().unwrap().changes, ["energy_per_night = 0.7 in [budget]"]);
    }

    /// Twenty nights, step by step: a loop over every second of the calendar agrees with the arithmetic.
    #[test]
    fn twenty_simulated_nights_agree() {
        let hours = windows(&["mon-fri 22:30-05:15", "sat,sun 12:30-17:00"]);
        // The clock is set back on 25 October.
        let now = at("2026-10-12T09:00[Europe/Berlin]");
        let demand =
            Demand { steps: 5000, seconds: 70.0 * HOUR, prepare: 90.0, duty: 0.8, watts: Some(30.0) };
        let quota = Joules::from_watt_hours(150.0);
        let limits = Limits { per_night: Some(quota), ..limits(&hours) };
        let found = forecast(&demand, &limits, &now);

        let (mut done, mut at, mut ran, mut prepared) = (0.0, now.clone(), i64::MIN, 0.0);
        let (mut night, mut spent) = (night_of(&now), 0.0);
        let mut seen = std::collections::BTreeSet::new();
        while done < demand.seconds {
            if night_of(&at) != night {
                (night, spent) = (night_of(&at), 0.0);
            }
            if hours.at(&at) && spent < quota.0 {
                let second = at.timestamp().as_second();
                if second > ran.saturating_add(600) {
                    prepared = 0.0;
                }
                ran = second;
                seen.insert(night);
                if prepared < demand.prepare {
                    prepared += 1.0;
                    spent += 30.0;
                } else {
                    done += demand.duty;
                    spent += 30.0 * demand.duty;
                }
            }
            at = at.timestamp().checked_add(1.seconds()).unwrap().to_zoned_datetime(at.time_zone().clone());
        }
        let finish = found.finish.unwrap();
        let off = finish.duration_since(at.timestamp()).as_secs_f64().abs();
        assert!(seen.len() >= 15, "{}", seen.len());
        assert_eq!(found.nights.len(), seen.len());
        assert!(off < 60.0, "{off} s after {} nights", seen.len());
        println!("{} nights, finish {off} s from that of the simulation", seen.len());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn nights_tile_sums_are_totals_and_more_is_sooner(
            steps in 1u64..5000,
            hours in 0.01f64..60.0,
            prepare in 0.0f64..1200.0,
            duty in 0.05f64..1.0,
            watts in prop::option::of(1.0f64..60.0),
            quota in prop::option::of(5.0f64..500.0),
            spent in 0.0f64..10.0,
            from in 0u16..24,
            length in 1u16..23,
            start in 0i64..2_000_000,
        ) {
            let text = |length: u16| format!("{from:02}:00-{:02}:00", (from + length) % 24);
            prop_assume!(Hours::parse(&text(length)).is_ok());
            let narrow = windows(&[&text(length)]);
            let wide = if length + 1 < 24 { windows(&[&text(length + 1)]) } else { windows(&[]) };
            let now = Timestamp::from_second(1_790_000_000 + start * 30).unwrap();
            let now = now.to_zoned_datetime(jiff::tz::TimeZone::get("Europe/Berlin").unwrap());
            let demand = Demand { steps, seconds: hours * HOUR, prepare, duty, watts };
            let with = |times, quota: Option<f64>| {
                let per_night = quota.map(Joules::from_watt_hours);
                forecast(&demand, &Limits { per_night, spent: Joules(spent * 3600.0), ..limits(times) }, &now)
            };
            let found = with(&narrow, quota);
            for pair in found.nights.windows(2) {
                prop_assert!(pair[0].to <= pair[1].from || pair[0].date < pair[1].date);
            }
            for night in &found.nights {
                prop_assert!(night.from <= night.to || night.from[..10] < night.to[..10]);
                prop_assert!(night.computing <= night.open + 1e-6);
                if let (Some(joules), Some(quota)) = (night.joules, quota) {
                    prop_assert!(joules.watt_hours() <= quota + 1e-6);
                }
            }
            let computed: f64 = found.nights.iter().map(|night| night.computing).sum();
            prop_assert!(computed >= found.done - 1e-6);
            if let Some(joules) = found.joules {
                let sum: f64 = found.nights.iter().filter_map(|night| night.joules).map(|joules| joules.0).sum();
                prop_assert!((sum - joules.0).abs() <= 1e-6 * joules.0.max(1.0));
                prop_assert!((computed * watts.unwrap() - joules.0).abs() <= 1e-6 * joules.0.max(1.0));
            }
            if found.finish.is_some() {
                prop_assert_eq!(found.nights.iter().map(|night| night.steps).sum::<u64>(), steps);
                prop_assert!((found.done - demand.seconds).abs() < 1e-6 * demand.seconds.max(1.0));
                // More hours, or a higher quota, are never later. Hours that reach over noon, where a quota begins anew, may
                // be: what is prepared for their short end is prepared again in the evening.
                let over_noon = (from + 1..from + length + 1).any(|hour| hour % 24 == 12);
                let more_hours = (!over_noon || quota.is_none()).then(|| with(&wide, quota));
                let more_energy = [with(&narrow, quota.map(|quota| quota + 5.0)), with(&narrow, None)];
                for better in more_hours.into_iter().chain(more_energy) {
                    prop_assert!(better.finish.is_some());
                    prop_assert!(better.finish <= found.finish, "{:?} {:?}", better.finish, found.finish);
                }
            }
        }
    }
}
