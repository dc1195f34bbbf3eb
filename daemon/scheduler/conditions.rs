//! Whether it is the time, and the machine free: the holds that come from outside the worker.
//!
//! ```text
//!               limit crossed (at once; load: averaged over a minute)
//!     clear ─────────────────────────────────────────────────────────► held
//!           ◄─────────────────────────────────────────────────────────
//!               well within the limit again, for a while: supply 10 s, battery 5 % more, load 80 % of it for a minute
//! ```
//!
//! What has spoken once and is silent, or says nonsense, ends no hold: it is not clear again.
//!
//! The hours have no such dwell: they say when they change. Pure: the time is passed in.

use super::window::Windows;
use crate::config::budget::{Conditions, Window};
use crate::config::times::HoursError;
use crate::governor::readings::Readings;
use crate::reason::Reason;
use jiff::ZonedDateTime;
use std::time::Duration;

/// External power counts as back after so long.
const SUPPLY_BACK: Duration = Duration::from_secs(10);
/// Charge above the smallest that lets a run go on.
const BATTERY_BACK: f64 = 0.05;
/// Time constant of the load's average, s.
const LOAD_AVERAGE: f64 = 60.0;
/// Share of the load's limit below which the machine counts as free again, after so long.
const LOAD_BACK: f64 = 0.8;
const LOAD_BACK_AFTER: Duration = Duration::from_secs(60);
/// Older readings change nothing.
const OLD: Duration = Duration::from_secs(10);

/// The hours of the configuration, read.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// When runs may compute.
    pub times: Windows,
    quiet: Windows,
    quiet_fan: f64,
}

impl Schedule {
    /// Reads the hours.
    ///
    /// # Errors
    /// The first text that is no hours.
    pub fn new(window: &Window) -> Result<Schedule, HoursError> {
        Ok(Schedule {
            times: Windows::open_unless_given(&window.times)?,
            quiet: Windows::closed_unless_given(&window.quiet)?,
            quiet_fan: window.quiet_fan,
        })
    }

    /// Ceiling of the fan's duty now, for `Budget::fan`.
    pub fn fan_ceiling(&self, now: &ZonedDateTime) -> Option<f64> {
        self.quiet.at(now).then_some(self.quiet_fan)
    }
}

/// What a run of ours adds to the readings now.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Own {
    /// GPU load, 0 to 1: the duty of a run on the GPU.
    pub gpu: f64,
    /// Load per core: threads that compute, by duty, divided by cores.
    pub load: f64,
}

/// What is known from earlier rounds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Holds {
    at: Option<Duration>,
    supply: Held,
    battery: Held,
    busy: Held,
    /// Averages of others' GPU load and of our own load.
    gpu: Option<f64>,
    own: f64,
    /// What has spoken.
    heard: Heard,
}

/// Sources that have spoken since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Heard {
    supply: bool,
    battery: bool,
    load: bool,
}

/// One hold.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Held {
    held: bool,
    clear_since: Option<Duration>,
}

impl Held {
    /// `wrong` holds; `right`, for so long, lets go; in between nothing changes.
    fn step(&mut self, wrong: bool, right: bool, after: Duration, now: Duration) {
        self.clear_since = right.then(|| self.clear_since.unwrap_or(now));
        let cleared = self.clear_since.is_some_and(|since| now.saturating_sub(since) >= after);
        self.held = wrong || (self.held && !cleared);
    }
}

impl Holds {
    /// One round: what is known after it, and why a run may not compute, or `None` when it may. `wall` is the wall-clock
    /// time in the local zone, `now` the monotonic one.
    pub fn step(
        &self,
        conditions: &Conditions,
        schedule: &Schedule,
        readings: &Readings,
        own: Own,
        wall: &ZonedDateTime,
        now: Duration,
    ) -> (Holds, Option<Reason>) {
        let mut next = self.clone();
        let dt = self.at.map_or(0.0, |at| now.saturating_sub(at).as_secs_f64()).min(LOAD_AVERAGE);
        next.at = Some(now);
        if now.saturating_sub(readings.at) < OLD {
            next.take(conditions, readings, own, dt, now);
        }
        let reason =
            if !schedule.times.at(wall) { Some(Reason::OutsideWindow) } else { next.unfit(conditions) };
        (next, reason)
    }

    /// Why the machine is not free for us, whatever the time is; as of the last round.
    pub fn unfit(&self, conditions: &Conditions) -> Option<Reason> {
        if self.supply.held && conditions.external_power {
            Some(Reason::OnBattery)
        } else if self.battery.held {
            Some(Reason::BatteryLow)
        } else {
            self.busy.held.then_some(Reason::Busy)
        }
    }

    fn take(&mut self, conditions: &Conditions, readings: &Readings, own: Own, dt: f64, now: Duration) {
        let external = readings.external_power;
        self.heard.supply |= external.is_some();
        // A machine that never could tell counts as having power.
        let clear = external.unwrap_or(!self.heard.supply);
        self.supply.step(external == Some(false), clear, SUPPLY_BACK, now);
        // A charge that is no number is as good as none: there the supply's own word must do.
        let battery = readings.battery.filter(|charge| charge.is_finite());
        self.heard.battery |= battery.is_some();
        let least = conditions.minimum_battery;
        // A battery that is full goes on, however high the limit is.
        let enough = (least + BATTERY_BACK).min(1.0);
        self.battery.step(
            battery.is_some_and(|charge| charge < least),
            battery.map_or(!self.heard.battery, |charge| charge >= enough),
            Duration::ZERO,
            now,
        );

        let weight = 1.0 - (-dt / LOAD_AVERAGE).exp();
        self.own += (own.load - self.own) * weight;
        let others = readings.gpu_load.filter(|load| load.is_finite()).map(|load| (load - own.gpu).max(0.0));
        if let Some(others) = others {
            let average = self.gpu.unwrap_or(0.0);
            self.gpu = Some(average + (others - average) * weight);
        }
        // The kernel's load average is one over a minute already.
        let load = readings.load.filter(|load| load.is_finite()).map(|load| (load - self.own).max(0.0));
        self.heard.load |= load.is_some();
        let mute = self.heard.load && load.is_none() && conditions.maximum_load.is_some();
        let cares = conditions.maximum_gpu_load < 1.0;
        let measured = [
            self.gpu.filter(|_| cares).map(|gpu| (gpu, conditions.maximum_gpu_load)),
            load.zip(conditions.maximum_load),
        ];
        let measured = || measured.iter().flatten();
        self.busy.step(
            measured().any(|(value, limit)| value > limit),
            !mute && measured().all(|(value, limit)| *value <= LOAD_BACK * limit),
            LOAD_BACK_AFTER,
            now,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine {
        conditions: Conditions,
        schedule: Schedule,
        readings: Readings,
        own: Own,
        wall: ZonedDateTime,
        holds: Holds,
        at: u64,
    }

    impl Machine {
        fn new(conditions: Conditions, window: Window) -> Machine {
            Machine {
                conditions,
                schedule: Schedule::new(&window).unwrap(),
                readings: Readings::default(),
                own: Own::default(),
                wall: "2026-11-24T23:00[UTC]".parse().unwrap(),
                holds: Holds::default(),
                at: 100,
            }
        }

        fn run(&mut self, seconds: u64) -> Option<Reason> {
            let mut reason = None;
            for _ in 0..seconds {
                self.at += 1;
                let now = Duration::from_secs(self.at);
                self.readings.at = now;
                (self.holds, reason) = self.holds.step(
                    &self.conditions,
                    &self.schedule,
                    &self.readings,
                    self.own,
                    &self.wall,
                    now,
                );
            }
            reason
        }
    }

    #[test]
    fn the_hours_hold_and_the_quiet_ones_limit_the_fan() {
        let window =
            Window { times: vec!["22:00-06:00".into()], quiet: vec!["23:30-05:00".into()], quiet_fan: 0.2 };
        let mut machine = Machine::new(Conditions::default(), window);
        assert_eq!(machine.run(1), None);
        assert_eq!(machine.schedule.fan_ceiling(&machine.wall), None);
        machine.wall = "2026-11-25T00:00[UTC]".parse().unwrap();
        assert_eq!(machine.schedule.fan_ceiling(&machine.wall), Some(0.2));
        machine.wall = "2026-11-25T06:00[UTC]".parse().unwrap();
        assert_eq!(machine.run(1), Some(Reason::OutsideWindow));
        let error = Schedule::new(&Window { times: vec!["noon".into()], ..Window::default() });
        assert!(error.unwrap_err().to_string().contains("\"noon\": at character 1"));
    }

    #[test]
    fn what_is_wrong_with_the_machine_is_known_outside_the_hours_too() {
        let window = Window { times: vec!["22:00-06:00".into()], ..Window::default() };
        let mut machine = Machine::new(Conditions::default(), window);
        machine.wall = "2026-11-24T15:00[UTC]".parse().unwrap();
        assert_eq!(machine.run(1), Some(Reason::OutsideWindow));
        assert_eq!(machine.holds.unfit(&machine.conditions), None);
        machine.readings.battery = Some(0.1);
        assert_eq!(machine.run(1), Some(Reason::OutsideWindow));
        assert_eq!(machine.holds.unfit(&machine.conditions), Some(Reason::BatteryLow));
    }

    #[test]
    fn a_supply_that_flaps_holds_until_it_stays() {
        let mut machine =
            Machine::new(Conditions { external_power: true, ..Conditions::default() }, Window::default());
        assert_eq!(machine.run(1), None, "a machine that cannot tell counts as having power");
        for _ in 0..5 {
            machine.readings.external_power = Some(false);
            assert_eq!(machine.run(1), Some(Reason::OnBattery));
            machine.readings.external_power = Some(true);
            assert_eq!(machine.run(8), Some(Reason::OnBattery));
        }
        assert_eq!(machine.run(3), None);
        machine.conditions.external_power = false;
        machine.readings.external_power = Some(false);
        assert_eq!(machine.run(1), None);
    }

    #[test]
    fn a_battery_must_charge_a_little_before_it_is_used_again() {
        let mut machine = Machine::new(Conditions::default(), Window::default());
        for (charge, reason) in [
            (0.31, None),
            (0.29, Some(Reason::BatteryLow)),
            (0.31, Some(Reason::BatteryLow)),
            (0.35, None),
            (0.31, None),
            (f64::NAN, None),
        ] {
            machine.readings.battery = Some(charge);
            assert_eq!(machine.run(1), reason, "{charge}");
        }
        machine.conditions.minimum_battery = 1.0;
        machine.readings.battery = Some(0.99);
        assert_eq!(machine.run(1), Some(Reason::BatteryLow));
        machine.readings.battery = Some(1.0);
        assert_eq!(machine.run(1), None);
    }

    #[test]
    fn others_who_work_hold_and_our_own_work_does_not() {
        let conditions =
            Conditions { maximum_gpu_load: 0.3, maximum_load: Some(0.5), ..Conditions::default() };
        let mut machine = Machine::new(conditions, Window::default());
        machine.readings.gpu_load = Some(0.9);
        machine.own.gpu = 0.8;
        assert_eq!(machine.run(600), None, "it is our own");
        machine.own.gpu = 0.0;
        assert_eq!(machine.run(5), None, "a moment is nothing");
        assert_eq!(machine.run(60), Some(Reason::Busy));
        machine.readings.gpu_load = Some(0.0);
        assert_eq!(machine.run(90), Some(Reason::Busy));
        assert_eq!(machine.run(120), None);
        machine.readings.load = Some(0.6);
        assert_eq!(machine.run(1), Some(Reason::Busy));
        machine.readings.load = Some(0.45);
        assert_eq!(machine.run(300), Some(Reason::Busy), "not well within the limit");
        machine.readings.load = Some(0.3);
        assert_eq!(machine.run(62), None);
        machine.readings.load = Some(1.0);
        machine.own.load = 1.0;
        machine.holds.own = 1.0;
        assert_eq!(machine.run(60), None);
    }

    #[test]
    fn who_has_spoken_and_is_silent_ends_no_hold() {
        let conditions =
            Conditions { external_power: true, maximum_load: Some(0.5), ..Conditions::default() };
        let mut machine = Machine::new(conditions, Window::default());
        machine.readings.external_power = Some(false);
        assert_eq!(machine.run(1), Some(Reason::OnBattery));
        machine.readings.external_power = None;
        assert_eq!(machine.run(600), Some(Reason::OnBattery));
        machine.readings.external_power = Some(true);
        assert_eq!(machine.run(12), None);
        machine.readings.battery = Some(0.1);
        machine.run(1);
        machine.readings.battery = None;
        assert_eq!(machine.run(600), Some(Reason::BatteryLow));
        machine.readings.battery = Some(0.9);
        machine.readings.load = Some(0.9);
        assert_eq!(machine.run(1), Some(Reason::Busy));
        machine.readings.load = None;
        assert_eq!(machine.run(600), Some(Reason::Busy));
        machine.readings.load = Some(0.1);
        assert_eq!(machine.run(62), None);
        // What was no hold does not become one.
        (machine.readings.external_power, machine.readings.battery, machine.readings.load) =
            (None, None, None);
        assert_eq!(machine.run(600), None);
    }

    #[test]
    fn old_readings_change_nothing() {
        let mut machine = Machine::new(Conditions::default(), Window::default());
        machine.readings.battery = Some(0.1);
        assert_eq!(machine.run(1), Some(Reason::BatteryLow));
        machine.readings.battery = None;
        let later = Duration::from_secs(machine.at + 60);
        let (_, reason) = machine.holds.step(
            &machine.conditions,
            &machine.schedule,
            &machine.readings,
            machine.own,
            &machine.wall,
            later,
        );
        assert_eq!(reason, Some(Reason::BatteryLow));
    }
}
