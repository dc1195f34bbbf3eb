//! What share of the time training may compute. A pure function of what was known, what is read, what may be taken, and
//! the time; called about twice a second.
//!
//! ```text
//!             sensors answer, all clear         ramp done, or a limit speaks
//!   (start) ──────────────► Boot ─────────────────────┬──────────────► Nominal   duty 1
//!                            ▲                        │                 │   ▲
//!                            │                        │     a limit     ▼   │  duty 1 for 5 s
//!                            │                        └────────────►   Soft      duty held by the nearest limit
//!                            │                                           │
//!          below resume,     │       above the stop, a sensor lost, memory short, the supply fails,
//!          rested long       │       or less than the smallest duty for 20 s (from Boot and Nominal too)
//!          enough            │                                           ▼
//!                            ├───────────────────────────────────────  Hard      duty 0, memory kept
//!                            │                                           │  hotter still, or hot at rest
//!                            └─── the same, for five minutes ───────  Critical   duty 0, memory given back
//! ```
//!
//! **Soft.** Every limit (a zone's temperature, power, the fan in quiet hours) is a proportional-integral loop in its
//! incremental form: it changes its own share from the change of what it holds and from the distance to the set-point.
//! The smallest share is decided, and no loop's share may lie more than `HEADROOM` above it: nothing winds up, and a loop
//! takes over within moments; the headroom keeps the noise of the others out of the one that decides. Far below the
//! set-point a loop lets the temperature approach it as `distance / APPROACH`, so that the duty goes back before the
//! set-point is reached, not behind it.
//!
//! **Gain.** Chips answer to load by 5 to 50 °C within seconds, on sinks that follow within half a minute or ten. Boot
//! begins with a step of the duty and measures what it does in `ANSWER_AFTER`; the gain follows from that.
//!
//! **Hard.** Each hold within an hour rests longer than the one before (30 s, 2 min, 8 min, 15 min): a limit that cannot
//! be held makes few slow swings of temperature, not many.
//!
//! After a suspend begin with a new [`State`]: the monotonic clock stood still, the temperatures did not.

mod sensor;
mod supply;

pub use sensor::Trouble;

use super::readings::{Reading, Readings, Zone, ZoneRole};
use crate::config::budget::Budget;
use crate::reason::Reason;
use crate::units::{Celsius, Watts};
use sensor::{Sensor, Verdict};
use std::fmt;
use std::time::Duration;
use supply::{AlarmWatch, Memory, MemoryWatch};

/// Distance that a stop keeps from the lowest trip of the kernel, and a set-point from its stop, °C.
const BELOW_TRIP: f64 = 2.0;
const BELOW_STOP: f64 = 3.0;
/// A machine's own switching-off is kept away from by this much, °C: what a chip may rise before a stop works.
const BELOW_CRITICAL: f64 = 8.0;
/// Above the stop by this much for [`CRITICAL_FOR`], memory is given back too.
const CRITICAL_ABOVE: f64 = 3.0;
const CRITICAL_FOR: Duration = Duration::from_secs(2);
/// At rest for so long and still above the stop: something else heats, or nothing cools.
const HOT_AT_REST: Duration = Duration::from_secs(10);

/// Time constant of the filter before a temperature loop: about one period of the duty.
const FILTER: f64 = 0.75;
/// Distance to the set-point that is kept beside the ripple of the duty, °C.
const MARGIN: f64 = 0.9;
/// Largest ripple that is allowed for, °C, and the time constant of its average, s.
const RIPPLE: f64 = 2.5;
const RIPPLE_AVERAGE: f64 = 8.0;
/// Loops that are farther from their set-point than this do not speak, °C.
const NEAR: f64 = 25.0;
/// Time constant with which a set-point is approached, s.
const APPROACH: f64 = 20.0;
/// Time constant with which a temperature above its set-point is brought back, s.
const RETREAT: f64 = 7.0;
/// Wanted product of gain and answer; the gain's range and what it is before an answer was measured, 1/°C.
const ANSWER_GAIN: f64 = 1.5;
const GAINS: (f64, f64) = (0.02, 0.2);
const CAUTIOUS: f64 = 0.04;

/// Duty of the first step, how long after it the answer is read, and the ramp behind it, 1/s.
const FIRST: f64 = 0.4;
const ANSWER_AFTER: f64 = 3.0;
const RAMP: f64 = 0.1;
/// Fastest changes of the duty, 1/s.
const SLEW_UP: f64 = 0.1;
const SLEW_DOWN: f64 = 0.5;
/// How far a loop's share may lie above what is decided.
const HEADROOM: f64 = 0.15;
/// Time constant of the mean duty that a zone's movement is compared with, s.
const MEAN: f64 = 10.0;
/// Rise of the duty that a zone which does not move leaves, 1/s.
const STIFF_UP: f64 = 0.001;
/// Share of the duty that is left while a zone that stands still is probed.
const PROBE: f64 = 0.25;
/// Ceiling of the duty while memory is tight.
const TIGHT: f64 = 0.5;
/// Nothing limits again when the duty has been one for so long.
const DWELL: Duration = Duration::from_secs(5);
/// At the smallest duty for so long with a limit still exceeded: rest instead.
const FLOOR_FOR: Duration = Duration::from_secs(20);

/// First rest, the factor of each further one within [`REMEMBER`], and the longest.
const REST: Duration = Duration::from_secs(30);
const REST_FACTOR: u32 = 4;
const REST_LIMIT: Duration = Duration::from_secs(15 * 60);
const REMEMBER: Duration = Duration::from_secs(3600);
/// Everything must be well for so long before computing goes on; after Critical, for so long.
const CLEAR: Duration = Duration::from_secs(10);
const CLEAR_CRITICAL: Duration = Duration::from_secs(300);

/// Time constant of the average that the power limit is about, s; loop's proportional and integral gain, per unit of
/// relative power; share of the limit below which a rested machine may begin again.
const POWER_FILTER: f64 = 4.0;
const POWER_GAIN: f64 = 0.25;
const POWER_RATE: f64 = 0.06;
const POWER_RESUME: f64 = 0.9;
/// A meter that is silent for so long is lost; power beyond this is nonsense, W.
const METER_SILENT: Duration = Duration::from_secs(3);
const POWER_PLAUSIBLE: std::ops::Range<f64> = 0.0..100_000.0;
/// What the loops hold.
const LOOPS: [Reason; 3] = [Reason::Thermal, Reason::PowerBudget, Reason::QuietHours];
/// The fan's loop: gain per unit of fan duty, and time constant with which its ceiling is approached, s. A fan follows
/// the sink, which is slow; the distance that is kept is a step of a usual fan profile.
const FAN_GAIN: f64 = 8.0;
const FAN_APPROACH: f64 = 60.0;
const FAN_MARGIN: f64 = 0.05;

/// How near a limit the machine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Begins cautiously.
    #[default]
    Boot,
    /// Nothing limits.
    Nominal,
    /// A limit holds the duty below one.
    Soft,
    /// Nothing computes.
    Hard,
    /// Nothing computes, and the worker's memory is wanted.
    Critical,
}

/// Something that a person should know.
#[derive(Clone, Debug, PartialEq)]
pub enum Note {
    /// No thermal zone was ever seen: temperature limits are not kept.
    BlindToHeat,
    /// A power limit is set and no meter was ever seen.
    BlindToPower,
    /// A zone is not believed.
    Zone {
        /// Its name.
        name: String,
        /// What is wrong with it.
        trouble: Trouble,
    },
    /// The meter is silent.
    MeterLost,
    /// The kernel throttles CPU or GPU.
    Throttled,
    /// Alarms of the supply lowered the ceiling of the duty to this.
    Alarms(f64),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Note::BlindToHeat => f.write_str("this machine has no thermal zone: temperature is not limited"),
            Note::BlindToPower => f.write_str("this machine has no power meter: [budget] power is not kept"),
            Note::Zone { name, trouble: Trouble::Silent } => write!(f, "{name} cannot be read"),
            Note::Zone { name, trouble: Trouble::Stuck } => write!(f, "{name} does not move"),
            Note::Zone { name, trouble: Trouble::Fell } => write!(f, "{name} fell faster than a chip cools"),
            Note::MeterLost => f.write_str("the power meter cannot be read"),
            Note::Throttled => f.write_str("the kernel throttles"),
            Note::Alarms(ceiling) => {
                write!(f, "alarms of the supply: at most {:.0} % of the time", ceiling * 100.0)
            }
        }
    }
}

/// What is decided for the next half second.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// Share of the time that may be computed, 0 to 1; 0 parks.
    pub duty: f64,
    /// Why it is below one. None while Boot ramps up.
    pub reason: Option<Reason>,
    /// The worker should give its memory back.
    pub release: bool,
    /// Where the state machine is.
    pub level: Level,
    /// No thermal zone was ever seen.
    pub blind: bool,
    /// Temperature that is nearest to its set-point, and the set-point.
    pub temperature: Option<(Celsius, Celsius)>,
    /// What a person should know.
    pub notes: Vec<Note>,
}

/// What is known from earlier rounds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    at: Option<Duration>,
    level: Level,
    /// When `level` began, or began to be in doubt.
    since: Duration,
    /// Duty that was decided, and its mean over some seconds.
    duty: f64,
    mean: f64,
    /// Shares of the loops: temperature, power, fan.
    shares: [f64; 3],
    zones: Vec<ZoneState>,
    boot: Option<BootState>,
    /// Duty before a probe.
    probed: Option<f64>,
    /// Gain of the temperature loops, 1/°C.
    gain: Option<f64>,
    hold: Option<Hold>,
    /// When holds of the last hour began.
    holds: Vec<Duration>,
    /// Since when the smallest duty has been too much.
    floored: Option<Duration>,
    /// Limit that shaped the duty last.
    limit: Option<Reason>,
    power: Option<Average>,
    power_read: Option<Duration>,
    fan: Option<f64>,
    memory: MemoryWatch,
    alarms: AlarmWatch,
}

impl State {
    /// Where the state machine is.
    pub fn level(&self) -> Level {
        self.level
    }

    /// What is held in each of the zones of the last round, in their order; none in a zone without a limit.
    pub fn set_points(&self, zones: &[Zone]) -> Vec<Option<Celsius>> {
        let held = |i: usize, zone: &Zone| {
            let number = zones[..i].iter().filter(|other| other.name == zone.name).count();
            let known = self.zones.iter().find(|known| known.number == number && known.name == zone.name)?;
            known.limits.map(|limits| Celsius(limits.set))
        };
        zones.iter().enumerate().map(|(i, zone)| held(i, zone)).collect()
    }
}

/// A filtered value and the one before.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Average {
    now: f64,
    before: f64,
}

impl Average {
    fn step(average: Option<Average>, value: f64, dt: f64, constant: f64) -> Average {
        match average {
            Some(Average { now, .. }) => {
                Average { now: now + (value - now) * (1.0 - (-dt / constant).exp()), before: now }
            }
            None => Average { now: value, before: value },
        }
    }

    fn change(self) -> f64 {
        self.now - self.before
    }
}

#[derive(Clone, Debug, PartialEq)]
struct ZoneState {
    name: String,
    /// Which of the zones of this name.
    number: usize,
    role: ZoneRole,
    required: bool,
    limits: Option<Limits>,
    sensor: Sensor,
    /// Temperature as the loop sees it.
    filtered: Option<Average>,
    /// How far readings lie above it where they do, on average: half the ripple that the duty makes.
    ripple: f64,
}

/// Limits of one zone, °C.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Limits {
    set: f64,
    stop: f64,
    resume: f64,
}

#[derive(Clone, Debug, PartialEq)]
struct BootState {
    since: Duration,
    /// Temperature of the nearest zone before the step.
    before: Option<f64>,
    measured: bool,
}

#[derive(Clone, Debug, PartialEq)]
struct Hold {
    since: Duration,
    reason: Reason,
    critical: bool,
    clear_since: Option<Duration>,
    above_since: Option<Duration>,
    rest: Duration,
}

/// What a round says of all zones together.
#[derive(Default)]
struct Heat {
    /// Largest excess over the stop, and over the resume temperature.
    over_stop: Option<f64>,
    over_resume: Option<f64>,
    /// Temperature that is nearest to its set-point, and the set-point.
    nearest: Option<(f64, f64)>,
    /// A zone that must be there is not believed.
    lost: bool,
    /// Smallest change of the duty that a zone proposes.
    proposal: Option<f64>,
    /// A temperature was extrapolated, or is missing.
    doubt: bool,
    /// A zone near its set-point does not move.
    stiff: bool,
    /// A zone has not moved for minutes: it must show that it follows the duty.
    probe: bool,
    notes: Vec<Note>,
    blind: bool,
}

/// One round: what is known after it, and what is decided.
pub fn step(state: &State, readings: &Readings, budget: &Budget, now: Duration) -> (State, Decision) {
    // A monotonic clock does not go back. If one did, "silent since" would lie in the future: nothing is known then.
    let back = state.at.is_some_and(|at| now < at);
    let mut next = if back { State::default() } else { state.clone() };
    // A round that comes late must not make a leap; a clock that stands makes none.
    let dt = state.at.map_or(0.5, |at| now.saturating_sub(at).as_secs_f64()).min(2.0);
    next.at = Some(now);
    let decision = next.decide(readings, &sane(budget), dt, now);
    (next, decision)
}

/// The budget with nonsense replaced by defaults: a governor does not rely on the reader of a file.
fn sane(budget: &Budget) -> Budget {
    let mut sane = budget.clone();
    let default = Budget::default();
    let pick = |value: f64, range: std::ops::RangeInclusive<f64>, default: f64| {
        if range.contains(&value) { value } else { default }
    };
    let stop = pick(budget.temperature_stop.0, 10.0..=Budget::STOP_LIMIT.0, default.temperature_stop.0);
    let set = pick(budget.temperature.0, 0.0..=Budget::STOP_LIMIT.0, default.temperature.0).min(stop);
    let resume =
        pick(budget.temperature_resume.0, -20.0..=Budget::STOP_LIMIT.0, default.temperature_resume.0);
    sane.temperature_stop = Celsius(stop);
    sane.temperature = Celsius(set);
    sane.temperature_resume = Celsius(resume);
    sane.duty_floor = pick(budget.duty_floor, 0.01..=0.9, default.duty_floor);
    sane.power = budget.power.filter(|power| power.0 > 0.0 && power.0.is_finite());
    sane.fan = budget.fan.filter(|fan| (0.0..=1.0).contains(fan));
    sane
}

impl Limits {
    /// Limits of a zone: the budget's, lowered where the machine's own trips are near. A part of the board without trips
    /// has none: what it bears is not known, and the chip beside it is the hotter one.
    fn of(zone: &Zone, budget: &Budget) -> Option<Limits> {
        let known =
            |trip: Option<Celsius>| trip.map(|trip| trip.0).filter(|trip| (20.0..200.0).contains(trip));
        let (passive, critical) = (known(zone.passive_trip), known(zone.critical_trip));
        let stop = budget.temperature_stop.0;
        let trips = [passive.map(|trip| trip - BELOW_TRIP), critical.map(|trip| trip - BELOW_CRITICAL)];
        let lowest = trips.into_iter().flatten().fold(f64::INFINITY, f64::min);
        if zone.role == ZoneRole::Board && lowest == f64::INFINITY {
            return None;
        }
        let stop = stop.min(lowest);
        let set = budget.temperature.0.min(stop - BELOW_STOP);
        Some(Limits { set, stop, resume: budget.temperature_resume.0.min(set - BELOW_STOP) })
    }
}

impl State {
    fn decide(&mut self, readings: &Readings, budget: &Budget, dt: f64, now: Duration) -> Decision {
        self.memory.step(readings, budget, now);
        self.alarms.step(readings.over_current, dt, now);
        let mut heat = self.feel(readings, budget, dt, now);
        let meter_lost = self.meter(readings, budget, dt, now);
        let mut notes = std::mem::take(&mut heat.notes);
        if meter_lost {
            notes.push(Note::MeterLost);
        } else if budget.power.is_some() && self.power.is_none() {
            notes.push(Note::BlindToPower);
        }
        if readings.throttled {
            notes.push(Note::Throttled);
        }
        if self.alarms.ceiling < 1.0 {
            notes.push(Note::Alarms(self.alarms.ceiling));
        }

        let cause = self.cause(&heat, meter_lost);
        match (&self.hold, cause) {
            (None, Some(cause)) => self.stop(cause, now),
            (Some(_), cause) => self.rest(&heat, budget, cause, now),
            (None, None) => {}
        }
        if self.hold.is_none() {
            self.go(&heat, readings, budget, dt, now);
        }
        let release = self.memory.level == Memory::Starved || self.level == Level::Critical;
        let reason = match &self.hold {
            Some(hold) => Some(hold.reason),
            None if self.duty < 1.0 => self.limit,
            None => None,
        };
        Decision {
            duty: self.duty,
            reason,
            release: release && self.hold.is_some(),
            level: self.level,
            blind: heat.blind,
            temperature: heat.nearest.map(|(temperature, set)| (Celsius(temperature), Celsius(set))),
            notes,
        }
    }

    /// Takes in the zones.
    fn feel(&mut self, readings: &Readings, budget: &Budget, dt: f64, now: Duration) -> Heat {
        let mut heat = Heat::default();
        let mut seen = vec![false; self.zones.len()];
        for (i, zone) in readings.zones.iter().enumerate() {
            let number = readings.zones[..i].iter().filter(|other| other.name == zone.name).count();
            let known = self.zones.iter().position(|k| k.number == number && k.name == zone.name);
            let known = known.unwrap_or_else(|| {
                self.zones.push(ZoneState {
                    name: zone.name.clone(),
                    number,
                    role: zone.role,
                    required: zone.required,
                    limits: None,
                    sensor: Sensor::new(),
                    filtered: None,
                    ripple: 0.0,
                });
                seen.push(false);
                self.zones.len() - 1
            });
            let state = &mut self.zones[known];
            seen[known] = true;
            state.role = zone.role;
            state.required = zone.required;
            state.limits = Limits::of(zone, budget);
        }
        let gain = self.gain.unwrap_or(CAUTIOUS);
        self.mean += (self.duty - self.mean) * (1.0 - (-dt / MEAN).exp());
        let duty = if self.duty == 0.0 { 0.0 } else { self.mean };
        let junction = self.zones.iter().any(|zone| zone.role == ZoneRole::Junction);
        heat.blind = !self.zones.iter().any(|zone| zone.role != ZoneRole::Board);
        for (zone, seen) in self.zones.iter_mut().zip(&seen) {
            let listed = if *seen {
                readings.zones.iter().filter(|listed| listed.name == zone.name).nth(zone.number)
            } else {
                None
            };
            // A zone that is no longer in the list has vanished.
            let reading = listed.map_or(Reading::Lost { since: now }, |listed| listed.temperature);
            let verdict = zone.sensor.step(&reading, duty, now);
            // Where no zone stands for the whole chip, every part of it must be known.
            let needed =
                zone.required || zone.role == ZoneRole::Junction || (zone.role == ZoneRole::Die && !junction);
            heat.doubt |= !matches!(verdict, Verdict::Live(_) | Verdict::Offline);
            let temperature = match verdict {
                Verdict::Live(temperature) | Verdict::Hot(temperature) => temperature.0,
                Verdict::Offline => {
                    zone.filtered = None;
                    continue;
                }
                Verdict::Lost(trouble) => {
                    zone.filtered = None;
                    heat.lost |= needed;
                    heat.notes.push(Note::Zone { name: zone.name.clone(), trouble });
                    continue;
                }
            };
            let Some(limits) = zone.limits else { continue };
            heat.feel(zone, temperature, limits, gain, dt);
            heat.probe |= needed && zone.sensor.wants_probe(now);
            heat.stiff |= limits.set - temperature < NEAR && zone.sensor.stiff(now);
        }
        if heat.blind {
            heat.notes.push(Note::BlindToHeat);
        }
        heat
    }

    /// Takes in the power; whether a meter that is needed is lost.
    fn meter(&mut self, readings: &Readings, budget: &Budget, dt: f64, now: Duration) -> bool {
        let read = match readings.power {
            Some(Reading::Value { value: Watts(watts), at })
                if POWER_PLAUSIBLE.contains(&watts) && now.saturating_sub(at) < METER_SILENT =>
            {
                Some(watts)
            }
            _ => None,
        };
        match read {
            Some(watts) => {
                self.power = Some(Average::step(self.power, watts, dt, POWER_FILTER));
                self.power_read = Some(now);
            }
            None => self.power = self.power.map(|power| Average { before: power.now, ..power }),
        }
        let silent = self.power_read.is_some_and(|read| now.saturating_sub(read) >= METER_SILENT);
        silent && budget.power.is_some()
    }

    /// What forbids computing now.
    fn cause(&self, heat: &Heat, meter_lost: bool) -> Option<Reason> {
        if heat.over_stop.is_some_and(|over| over >= 0.0) {
            Some(Reason::Thermal)
        } else if heat.lost || meter_lost {
            Some(Reason::SensorLost)
        } else if self.memory.level >= Memory::Short {
            Some(Reason::MemoryPressure)
        } else if self.alarms.ceiling <= 0.0 {
            Some(Reason::OverCurrent)
        } else {
            None
        }
    }

    fn enter(&mut self, level: Level, now: Duration) {
        if self.level != level {
            self.level = level;
            self.since = now;
        }
    }

    fn stop(&mut self, reason: Reason, now: Duration) {
        self.holds.retain(|held| now.saturating_sub(*held) < REMEMBER);
        let earlier = self.holds.len().min(3) as u32;
        // A machine that has not computed yet has nothing to rest from.
        let rest =
            if self.at.is_some() && self.duty == 0.0 && self.boot.is_none() && self.level == Level::Boot {
                Duration::ZERO
            } else {
                self.holds.push(now);
                (REST * REST_FACTOR.pow(earlier)).min(REST_LIMIT)
            };
        self.duty = 0.0;
        self.boot = None;
        self.probed = None;
        self.floored = None;
        self.limit = None;
        self.hold =
            Some(Hold { since: now, reason, critical: false, clear_since: None, above_since: None, rest });
        self.enter(Level::Hard, now);
    }

    fn rest(&mut self, heat: &Heat, budget: &Budget, cause: Option<Reason>, now: Duration) {
        let power = self.power.map(|power| power.now);
        let Some(hold) = &mut self.hold else { return };
        let over = heat.over_stop.unwrap_or(f64::NEG_INFINITY);
        let lasts =
            |since: Option<Duration>, length| since.is_some_and(|since| now.saturating_sub(since) >= length);
        let since = |condition: bool, since: Option<Duration>| condition.then(|| since.unwrap_or(now));
        hold.above_since = since(over >= CRITICAL_ABOVE, hold.above_since);
        let hot_at_rest = over >= 0.0 && now.saturating_sub(hold.since) >= HOT_AT_REST;
        hold.critical |= lasts(hold.above_since, CRITICAL_FOR) || hot_at_rest;
        if let Some(cause) = cause {
            hold.reason = cause;
        }
        let cool = heat.over_resume.is_none_or(|over| over < 0.0);
        let spare = match (budget.power, power) {
            (Some(limit), Some(power)) => power < POWER_RESUME * limit.0,
            _ => true,
        };
        hold.clear_since = since(cause.is_none() && cool && spare, hold.clear_since);
        let clear = if hold.critical { CLEAR_CRITICAL } else { CLEAR.min(hold.rest) };
        let rested = now.saturating_sub(hold.since) >= hold.rest;
        let level = if hold.critical { Level::Critical } else { Level::Hard };
        if rested && lasts(hold.clear_since, clear) {
            self.hold = None;
            self.enter(Level::Boot, now);
        } else {
            self.enter(level, now);
        }
    }

    /// Moves the duty.
    fn go(&mut self, heat: &Heat, readings: &Readings, budget: &Budget, dt: f64, now: Duration) {
        let floor = budget.duty_floor;
        let (mut change, mut limit) = self.share(heat, readings, budget, dt);
        let mut target = self.duty;
        if self.level == Level::Boot {
            if self.first_step(heat, now) {
                target = FIRST;
                self.shares = [FIRST; 3];
                (change, limit) = (0.0, None);
            }
            change = change.min(RAMP * dt);
        }
        target += change.max(-SLEW_DOWN * dt);
        if heat.probe {
            // Back at once when the zone moves: the shares stay where they are.
            let before = *self.probed.get_or_insert(self.duty.max(target));
            target = before * PROBE;
            self.shares = [before; 3];
            limit = Some(Reason::SensorLost);
        } else if let Some(before) = self.probed.take() {
            target = before;
        }

        let mut ceiling = 1.0f64;
        let mut capped = false;
        let memory = if self.memory.level == Memory::Tight { TIGHT } else { 1.0 };
        for (value, reason) in [(memory, Reason::MemoryPressure), (self.alarms.ceiling, Reason::OverCurrent)]
        {
            if value < ceiling && value <= target {
                limit = Some(reason);
                capped = true;
            }
            ceiling = ceiling.min(value);
        }
        let wanted = target.min(ceiling);
        self.duty = wanted.clamp(floor.min(ceiling), 1.0);
        // Below the smallest duty a share is as wrong as above the largest.
        self.shares = self.shares.map(|share| share.max(self.duty.min(floor)));
        self.limit = limit.or(self.limit);

        let hot = heat.nearest.is_some_and(|(temperature, set)| temperature > set);
        let hungry = budget.power.zip(self.power).is_some_and(|(limit, power)| power.now > limit.0);
        let loud = budget.fan.zip(self.fan).is_some_and(|(ceiling, fan)| fan > ceiling);
        let exceeded = wanted < floor && (hot || hungry || loud);
        self.floored = exceeded.then(|| self.floored.unwrap_or(now));
        if self.floored.is_some_and(|floored| now.saturating_sub(floored) >= FLOOR_FOR) {
            return self.stop(self.limit.unwrap_or(Reason::Thermal), now);
        }
        // Whatever keeps Boot's ramp from its end, not only what turns it back: else Boot would last, without a reason.
        let speaks = limit.is_some() && (change < 0.0 || capped || heat.stiff || heat.probe);
        self.judge(speaks, now);
    }

    /// Moves the loops' shares. The change of the duty that the smallest asks for, and what holds it.
    fn share(&mut self, heat: &Heat, readings: &Readings, budget: &Budget, dt: f64) -> (f64, Option<Reason>) {
        let mut proposals = [SLEW_UP * dt; 3];
        if let Some(proposal) = heat.proposal {
            proposals[0] = proposal;
        }
        if let (Some(limit), Some(power)) = (budget.power, self.power) {
            let relative = (limit.0 - power.now) / limit.0;
            proposals[1] = POWER_RATE * relative * dt - POWER_GAIN * power.change() / limit.0;
        }
        let fan = readings.fan.filter(|fan| (0.0..=1.0).contains(fan));
        if let (Some(ceiling), Some(fan)) = (budget.fan, fan) {
            let change = fan - self.fan.unwrap_or(fan);
            let distance = ceiling - FAN_MARGIN - fan;
            proposals[2] = FAN_GAIN * (distance * dt / FAN_APPROACH - change);
        }
        self.fan = fan;
        let mut change = SLEW_UP * dt;
        let mut limit = None;
        for (i, reason) in LOOPS.into_iter().enumerate() {
            self.shares[i] = (self.shares[i] + proposals[i]).min(self.duty + HEADROOM);
            if self.shares[i] - self.duty < change {
                change = self.shares[i] - self.duty;
                limit = Some(reason);
            }
        }
        if heat.stiff && change > STIFF_UP * dt {
            return (STIFF_UP * dt, Some(Reason::Thermal));
        }
        (change, limit)
    }

    /// Boot's step of the duty and its answer. Whether the step still lasts.
    fn first_step(&mut self, heat: &Heat, now: Duration) -> bool {
        let nearest = heat.nearest.map(|(temperature, _)| temperature);
        let boot = self.boot.get_or_insert(BootState { since: now, before: nearest, measured: false });
        if heat.doubt {
            // What is not read cannot be compared.
            boot.before = None;
        }
        let early = now.saturating_sub(boot.since).as_secs_f64() < ANSWER_AFTER;
        if early && heat.over_stop.is_none_or(|over| over < -BELOW_STOP) {
            return true;
        }
        if !boot.measured {
            boot.measured = true;
            if let (Some(before), Some(after)) = (boot.before, nearest) {
                let answer = (after - before) / FIRST;
                self.gain = Some((ANSWER_GAIN / answer.max(1e-3)).clamp(GAINS.0, GAINS.1));
            }
        }
        false
    }

    /// Finds the level while something computes.
    fn judge(&mut self, limited: bool, now: Duration) {
        let settled = now.saturating_sub(self.since) >= DWELL;
        match self.level {
            Level::Boot if self.boot.as_ref().is_none_or(|boot| !boot.measured) => {}
            Level::Boot if self.duty >= 1.0 => self.enter(Level::Nominal, now),
            Level::Boot if limited => self.enter(Level::Soft, now),
            Level::Nominal if self.duty < 1.0 => self.enter(Level::Soft, now),
            // The dwell begins again with every moment below one.
            Level::Soft if self.duty < 1.0 => self.since = now,
            Level::Soft if settled => self.enter(Level::Nominal, now),
            _ => {}
        }
        match self.level {
            Level::Boot => self.limit = None,
            _ => self.boot = None,
        }
    }
}

impl Heat {
    /// Takes in the temperature of a zone.
    fn feel(&mut self, zone: &mut ZoneState, temperature: f64, limits: Limits, gain: f64, dt: f64) {
        let larger = |old: Option<f64>, new: f64| Some(old.map_or(new, |old: f64| old.max(new)));
        self.over_stop = larger(self.over_stop, temperature - limits.stop);
        self.over_resume = larger(self.over_resume, temperature - limits.resume);
        let nearer = self.nearest.is_none_or(|(nearest, set)| nearest - set < temperature - limits.set);
        if nearer {
            self.nearest = Some((temperature, limits.set));
        }
        let filtered = Average::step(zone.filtered, temperature, dt, FILTER);
        zone.filtered = Some(filtered);
        let above = (temperature - filtered.now).clamp(0.0, RIPPLE);
        zone.ripple += (2.0 * above - zone.ripple) * (dt / RIPPLE_AVERAGE).min(1.0);
        let margin = MARGIN + zone.ripple.min(RIPPLE) + zone.sensor.grain() / 2.0;
        let distance = limits.set - margin - filtered.now;
        if distance < NEAR {
            // Above the set-point itself there is no time to lose.
            let approach = if filtered.now > limits.set { RETREAT } else { APPROACH };
            let proposal = gain * (distance * dt / approach - filtered.change());
            self.proposal = Some(self.proposal.map_or(proposal, |other| other.min(proposal)));
        }
    }
}
