//! A machine to try the governor on: two thermal masses, a power model, a fan, a sensor that may lie.
//!
//! ```text
//!   duty ──1 s periods──► power ──► die (2 to 6 s) ──► sink (40 s to 10 min) ──► air
//!                           │         │ noise, steps of the sensor, faults
//!                           ▼         ▼
//!                        meter      zone ──► Readings
//! ```
//!
//! Machines reach from a module without a heat sink (10 W, 8 °C/W, a minute) to an AGX Orin under full load (50 W, a
//! sink of ten minutes). Everything follows from the seed.

use finetuned::governor::readings::{Rail, Reading, Readings, Zone, ZoneRole};
use finetuned::units::{Celsius, Watts};
use std::time::Duration;

/// Step of the simulation, s.
pub const DT: f64 = 0.1;

/// SplitMix64 (Steele, Lea, Flood 2014).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn uniform(&mut self, from: f64, to: f64) -> f64 {
        from + (to - from) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Sum of uniform numbers, near enough to a normal one with this deviation.
    pub fn noise(&mut self, deviation: f64) -> f64 {
        (0..4).map(|_| self.uniform(-0.5, 0.5)).sum::<f64>() * deviation * 3f64.sqrt()
    }
}

/// A machine.
#[derive(Clone, Debug)]
pub struct Plant {
    /// Watts at rest, added by computing, and of somebody else.
    pub idle: f64,
    pub full: f64,
    pub other: f64,
    /// Die to sink, and sink to air with the fan at its middle, °C/W.
    pub die_resistance: f64,
    pub sink_resistance: f64,
    /// Time constant of the die, s, and heat capacity of the sink, J/°C.
    pub die_time: f64,
    pub sink_capacity: f64,
    /// Air, °C, and how far it drifts within an hour.
    pub ambient: f64,
    pub drift: f64,
    /// Factor of the sink's resistance that the fan makes.
    pub fan: f64,
    /// Temperatures: of the die above the sink, and of the sink.
    pub die: f64,
    pub sink: f64,
    /// Seconds since the start.
    pub at: f64,
}

impl Plant {
    /// A machine of one of three kinds, in balance at rest.
    pub fn draw(random: &mut Random) -> Plant {
        let kind = random.next() % 3;
        let (full, total, time, die) = match kind {
            // A module without a sink; one with a small sink; a developer kit with its fan.
            0 => (random.uniform(5.0, 10.0), random.uniform(5.0, 8.0), (40.0, 90.0), (0.8, 1.8)),
            1 => (random.uniform(10.0, 20.0), random.uniform(2.5, 4.0), (90.0, 240.0), (0.4, 0.9)),
            _ => (random.uniform(25.0, 50.0), random.uniform(0.9, 1.8), (200.0, 600.0), (0.15, 0.4)),
        };
        let die_resistance = random.uniform(die.0, die.1);
        let mut plant = Plant {
            idle: full * random.uniform(0.08, 0.25),
            full,
            other: 0.0,
            die_resistance,
            sink_resistance: total,
            die_time: random.uniform(2.0, 6.0),
            sink_capacity: random.uniform(time.0, time.1) / total,
            ambient: random.uniform(10.0, 45.0),
            drift: random.uniform(-3.0, 3.0),
            fan: 1.0,
            die: 0.0,
            sink: 0.0,
            at: 0.0,
        };
        plant.sink = plant.ambient + plant.idle * plant.sink_resistance;
        plant.die = plant.idle * plant.die_resistance;
        plant
    }

    /// Temperature of the die, °C.
    pub fn temperature(&self) -> f64 {
        self.die + self.sink
    }

    pub fn power(&self, computing: f64) -> f64 {
        self.idle + self.other + self.full * computing
    }

    /// Goes on by [`DT`], computing this share of it.
    pub fn step(&mut self, computing: f64) {
        let power = self.power(computing);
        let air = self.ambient + self.drift * (self.at / 3600.0 * std::f64::consts::TAU).sin();
        let out = (self.sink - air) / (self.sink_resistance * self.fan);
        self.sink += DT * (power - out) / self.sink_capacity;
        self.die += DT * (power * self.die_resistance - self.die) / self.die_time;
        self.at += DT;
    }

    /// The largest share that keeps the die at this temperature and the power at this one, computed from what only the
    /// plant itself knows.
    pub fn oracle(&self, temperature: f64, power: Option<f64>) -> f64 {
        let mut free = self.clone();
        free.step(0.0);
        let mut loaded = self.clone();
        loaded.step(1.0);
        let gain = loaded.temperature() - free.temperature();
        let cool = (temperature - free.temperature()) / gain;
        let fed = power.map_or(1.0, |power| (power - self.idle - self.other) / self.full);
        cool.min(fed).clamp(0.0, 1.0)
    }
}

/// What a sensor does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// An error on every read.
    Missing,
    /// The block says that it is switched off.
    Offline,
    /// No round brings a new reading.
    Stale,
    /// Always the value of the moment at which it began.
    Stuck,
    /// Far from the truth by this.
    Jump(f64),
    /// This number.
    Says(f64),
    /// The zone is no longer in the list.
    Vanished,
}

/// The zone's sensor.
#[derive(Clone, Debug)]
pub struct Thermometer {
    /// Deviation of its noise, and its steps, °C.
    pub noise: f64,
    pub resolution: f64,
    /// What is wrong now.
    pub fault: Option<Fault>,
    /// Last reading that went well.
    last: Option<(f64, Duration)>,
}

impl Thermometer {
    pub fn new(noise: f64, resolution: f64) -> Thermometer {
        Thermometer { noise, resolution, fault: None, last: None }
    }

    fn read(&mut self, truth: f64, now: Duration, random: &mut Random) -> Option<Reading<Celsius>> {
        let value = truth + random.noise(self.noise);
        let value = (value / self.resolution).round() * self.resolution;
        let at = |value: f64, at: Duration| Some(Reading::Value { value: Celsius(value), at });
        let (held, held_at) = self.last.unwrap_or((value, now));
        match self.fault {
            None => {
                self.last = Some((value, now));
                at(value, now)
            }
            Some(Fault::Missing) => Some(Reading::Lost { since: now }),
            Some(Fault::Offline) => Some(Reading::Offline),
            Some(Fault::Stale) => at(held, held_at),
            Some(Fault::Stuck) => at(held, now),
            Some(Fault::Jump(by)) => at(value + by, now),
            Some(Fault::Says(value)) => at(value, now),
            Some(Fault::Vanished) => None,
        }
    }
}

/// A round of readings of a machine with one zone and one meter. `power` is what the meter averaged since the round
/// before.
pub fn readings(
    plant: &Plant,
    thermometer: &mut Thermometer,
    power: f64,
    now: Duration,
    random: &mut Random,
) -> Readings {
    let zone = |temperature| Zone {
        name: "tj-thermal".into(),
        role: ZoneRole::Junction,
        temperature,
        passive_trip: Some(Celsius(99.0)),
        critical_trip: Some(Celsius(104.5)),
        required: true,
    };
    let meter = Reading::Value { value: Watts(power), at: now };
    Readings {
        at: now,
        zones: thermometer.read(plant.temperature(), now, random).map(zone).into_iter().collect(),
        rails: vec![Rail { name: "VDD_IN".into(), power: meter, counted: true }],
        power: Some(meter),
        ..Readings::default()
    }
}

/// Full swings of more than `size` up and down again, counted as each reversal is confirmed.
pub struct Swings {
    size: f64,
    low: f64,
    high: f64,
    rising: bool,
    /// Swings so far.
    pub count: usize,
}

impl Swings {
    pub fn new(size: f64) -> Swings {
        Swings { size, low: f64::INFINITY, high: f64::NEG_INFINITY, rising: true, count: 0 }
    }

    pub fn take(&mut self, value: f64) {
        if self.rising {
            self.high = self.high.max(value);
            if value < self.high - self.size {
                self.rising = false;
                self.low = value;
                self.count += 1;
            }
        } else {
            self.low = self.low.min(value);
            if value > self.low + self.size {
                self.rising = true;
                self.high = value;
            }
        }
    }
}
