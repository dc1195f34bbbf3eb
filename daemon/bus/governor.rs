//! `org.finetuned.Finetuned1.Governor`, at [`ROOT`](super::ROOT): what the machine bears now, and leases of the device.

use super::Context;
use super::Dictionary;
use super::authority::Action;
use super::budget::{self, BudgetRequest};
use super::error::{Error, Result};
use super::input::{Options, name, no_options};
use super::manager::{MAX_NAME, MAX_WHY};
use crate::governor::View;
use crate::night::Nights;
use crate::runs::Inhibition;
use std::collections::HashMap;
use tokio::sync::Mutex;
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, OwnedFd, Variant, interface};

/// What there are several of.
fn lists(view: &View) -> Vec<(&'static str, Variant<'static>)> {
    let set_points = view.set_points.iter().copied().chain(std::iter::repeat(None));
    let zones: Vec<(String, String, f64, f64)> = view
        .readings
        .zones
        .iter()
        .zip(set_points)
        .map(|(zone, set)| {
            let (now, set) = (zone.temperature.value(), set.map_or(f64::NAN, |set| set.0));
            (zone.name.clone(), zone.role.word().into(), now.map_or(f64::NAN, |now| now.0), set)
        })
        .collect();
    let rails: Vec<(String, f64, bool)> = view
        .readings
        .rails
        .iter()
        .map(|rail| (rail.name.clone(), rail.power.value().map_or(f64::NAN, |power| power.0), rail.counted))
        .collect();
    let names: Vec<(String, f64)> = zones.iter().map(|(name, _, now, _)| (name.clone(), *now)).collect();
    let powers: Vec<(String, f64)> = rails.iter().map(|(name, power, _)| (name.clone(), *power)).collect();
    vec![
        ("Zones", names.into()),
        ("Rails", powers.into()),
        ("Notes", view.notes.clone().into()),
        ("ZoneDetails", zones.into()),
        ("RailDetails", rails.into()),
    ]
}

/// What there is one of, where it is known.
fn single(view: &View) -> impl Iterator<Item = (&'static str, Variant<'static>)> {
    fn known<T: Into<Variant<'static>>>(
        name: &'static str,
        value: Option<T>,
    ) -> Option<(&'static str, Variant<'static>)> {
        value.map(|value| (name, value.into()))
    }
    let readings = &view.readings;
    let alarms = readings.over_current;
    [
        known("PowerLimit", view.power_limit.map(|limit| limit.0)),
        known("IdlePower", view.idle.map(|idle| idle.0)),
        known("GpuLoad", readings.gpu_load),
        known("GpuClock", readings.gpu_clock.map(|(now, _)| now)),
        known("GpuClockLimit", readings.gpu_clock.map(|(_, limit)| limit)),
        known("MemoryClockCap", view.memory_clock_cap),
        known("FanDuty", readings.fan),
        known("AvailableMemory", readings.available_memory.map(|memory| memory.0)),
        known("MemoryPressure", readings.memory_pressure),
        known("Load", readings.load),
        known("ExternalPower", readings.external_power),
        known("Battery", readings.battery),
        known("Throttled", Some(readings.throttled)),
        known("UnderVoltageRate", alarms.map(|alarms| alarms.under_voltage)),
        known("OverCurrentRate", alarms.map(|alarms| alarms.average)),
        known("InstantOverCurrentRate", alarms.map(|alarms| alarms.instantaneous)),
    ]
    .into_iter()
    .flatten()
}
/// Whoever reads a record.
static READING: Mutex<()> = Mutex::const_new(());

/// The object.
pub struct Governor {
    pub(super) context: Context,
}

impl Governor {
    /// Has records of nights read by a thread that may wait for the disk, one at a time: reading one takes milliseconds,
    /// and a client that asks for many must not take a core.
    async fn on_disk<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Nights) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let _turn = READING.lock().await;
        let nights = self.context.nights.clone();
        let read = tokio::task::spawn_blocking(move || read(&nights)).await;
        read.map_err(|error| Error::Failed(format!("a thread of the daemon failed: {error}")))?
    }
}

#[interface(
    name = "org.finetuned.Finetuned1.Governor",
    proxy(
        default_service = "org.finetuned.Finetuned1",
        default_path = "/org/finetuned/Finetuned1",
        visibility = "pub",
    )
)]
impl Governor {
    /// Gives the device to the caller: the trainer parks before its next micro-step, and goes on when every copy of the
    /// returned descriptor is closed. Returns when nothing computes any more. `who` and `why` are for people. Options:
    /// `release-memory` (b: the worker saves and ends at once, too), `wait` (b: false returns at once).
    #[zbus(out_args("lease"))]
    async fn acquire_lease(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        who: String,
        why: String,
        options: Dictionary,
    ) -> Result<OwnedFd> {
        let caller = self.context.authority.allow(Action::Inhibit, &header, connection).await?;
        let mut options = Options::new(options);
        let release = options.take::<bool>("release-memory")?.unwrap_or(false);
        let wait = options.take::<bool>("wait")?.unwrap_or(true);
        options.finish()?;
        let who = name("the argument \"who\"", who, MAX_NAME)?;
        let why = name("the argument \"why\"", why, MAX_WHY)?;
        let (owner, sender) = (caller.uid, caller.sender);
        let lease = Inhibition { who, why, owner, sender, lease: true, release, wait };
        Ok(self.context.runs.inhibit(lease).await?.into())
    }

    /// The last round of the sensors. A value that this machine does not have, or that could not be read, is NaN in a list
    /// and has no key otherwise. `Zones` (a(sd): name, °C), `Rails` (a(sd): name, watts), `Notes` (as); `ZoneDetails`
    /// (a(ssdd): name, `junction`, `die` or `board`, °C, set-point in °C), `RailDetails` (a(sdb): name, watts, whether
    /// `Power` counts it); `PowerLimit` and `IdlePower` (d, watts); `GpuLoad` (d, 0 to 1), `GpuClock`, `GpuClockLimit` and
    /// `MemoryClockCap` (t, hertz); `FanDuty` (d, 0 to 1); `AvailableMemory` (t, bytes), `MemoryPressure` (d, 0 to 1);
    /// `Load` (d, per core); `ExternalPower` (b), `Battery` (d, 0 to 1); `Throttled` (b); `UnderVoltageRate`,
    /// `OverCurrentRate` and `InstantOverCurrentRate` (d, events per second).
    #[zbus(out_args("readings"))]
    async fn get_readings(&self) -> Result<Dictionary> {
        let view = self.context.governor.borrow().clone();
        let mut readings = Dictionary::new();
        for (name, value) in lists(&view).into_iter().chain(single(&view)) {
            readings.insert(name.into(), value.try_into_owned()?);
        }
        Ok(readings)
    }

    /// Every key of `[budget]`, `[window]` and `[conditions]`, in the order of the documentation: `Key` (s:
    /// `section.key`), `Value`, `Default`, `Files` (s, TOML: in force, when nobody says anything, without what was set),
    /// `Source` (s: `default`, `file`, `set`, `runtime`), `Place` (s: `FILE:LINE` of `file`), and where it was set, `Uid`
    /// (u) and `Time` (t, microseconds since 1970).
    #[zbus(out_args("budget"))]
    async fn get_budget(&self) -> Result<Vec<Dictionary>> {
        let entries = self.context.budget.entries().borrow().clone();
        entries.iter().map(budget::dictionary).collect()
    }

    /// Gives keys other values: all of them or none. `changes` has values in TOML, or as bare words, by `section.key`; an
    /// empty one takes the key back. Options: `runtime` (b: until the daemon starts again).
    async fn set_budget(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        changes: HashMap<String, String>,
        options: Dictionary,
    ) -> Result<()> {
        let caller = self.context.authority.allow(Action::Configure, &header, connection).await?;
        let mut options = Options::new(options);
        let runtime = options.take::<bool>("runtime")?.unwrap_or(false);
        options.finish()?;
        let given = |value: String| Some(value).filter(|value| !value.trim().is_empty());
        let changes = changes.into_iter().map(|(key, value)| (key, given(value))).collect();
        Ok(self.context.budget.request(BudgetRequest::Change { changes, runtime }, caller.uid).await?)
    }

    /// Takes keys back: the values of the files are in force again. No keys are all keys.
    async fn reset_budget(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        keys: Vec<String>,
    ) -> Result<()> {
        let caller = self.context.authority.allow(Action::Configure, &header, connection).await?;
        let request = match &keys[..] {
            [] => BudgetRequest::Clear,
            _ => BudgetRequest::Change {
                changes: keys.into_iter().map(|key| (key, None)).collect(),
                runtime: false,
            },
        };
        Ok(self.context.budget.request(request, caller.uid).await?)
    }

    /// The values of these keys, or where they come from, have changed.
    #[zbus(signal)]
    pub(super) async fn budget_changed(emitter: &SignalEmitter<'_>, keys: Vec<String>) -> zbus::Result<()>;

    /// The report on a night, as JSON with `"schema": 1`. `date` is that of its evening, `now`, `last`, or empty: the night
    /// that runs, if one of its windows has begun, else the last one.
    #[zbus(out_args("report"))]
    async fn get_night(&self, date: String, options: Dictionary) -> Result<String> {
        no_options(options)?;
        self.on_disk(move |nights| {
            let report = nights.report(&date)?;
            serde_json::to_string(&report).map_err(|error| Error::Failed(format!("no JSON: {error}")))
        })
        .await
    }

    /// The dates of the nights that there is a report on, in order.
    #[zbus(out_args("nights"))]
    async fn list_nights(&self) -> Result<Vec<String>> {
        self.on_disk(|nights| Ok(nights.list()?.iter().map(ToString::to_string).collect())).await
    }

    /// The board's name.
    #[zbus(property(emits_changed_signal = "const"))]
    fn board(&self) -> String {
        self.context.governor.borrow().board.clone()
    }

    /// Power mode, such as `MODE_30W`; empty where there is none.
    #[zbus(property(emits_changed_signal = "false"))]
    fn mode(&self) -> String {
        self.context.governor.borrow().mode.clone().unwrap_or_default()
    }

    /// `boot`, `nominal`, `soft`, `hard` or `critical`.
    #[zbus(property(emits_changed_signal = "false"))]
    fn level(&self) -> String {
        format!("{:?}", self.context.governor.borrow().level).to_lowercase()
    }

    /// Share of the time that may be computed, 0 to 1.
    #[zbus(property(emits_changed_signal = "false"))]
    fn duty(&self) -> f64 {
        self.context.governor.borrow().duty
    }

    /// Why the duty is below 1: a word of the closed list, or empty.
    #[zbus(property(emits_changed_signal = "false"))]
    fn reason(&self) -> String {
        self.context.governor.borrow().reason.map_or("", |reason| reason.word()).into()
    }

    /// No thermal zone was ever seen: temperature is not limited.
    #[zbus(property(emits_changed_signal = "false"))]
    fn blind(&self) -> bool {
        self.context.governor.borrow().blind
    }

    /// The temperature nearest to its set-point, in °C; NaN where none is known.
    #[zbus(property(emits_changed_signal = "false"))]
    fn temperature(&self) -> f64 {
        self.context.governor.borrow().temperature.map_or(f64::NAN, |(now, _)| now.0)
    }

    /// The set-point of that temperature, in °C; NaN where none is known.
    #[zbus(property(emits_changed_signal = "false"))]
    fn temperature_limit(&self) -> f64 {
        self.context.governor.borrow().temperature.map_or(f64::NAN, |(_, limit)| limit.0)
    }

    /// Power of the counted rails, in watts; NaN where there is no meter.
    #[zbus(property(emits_changed_signal = "false"))]
    fn power(&self) -> f64 {
        self.context.governor.borrow().power.map_or(f64::NAN, |power| power.0)
    }

    /// Energy that runs took this night (noon to noon), in watt-hours, as the quota counts it; NaN where there is no
    /// meter.
    #[zbus(property(emits_changed_signal = "false"))]
    fn night_energy(&self) -> f64 {
        self.context.governor.borrow().night.map_or(f64::NAN, |energy| energy.watt_hours())
    }

    /// The night's quota, in watt-hours; NaN where there is none.
    #[zbus(property(emits_changed_signal = "false"))]
    fn night_quota(&self) -> f64 {
        self.context.governor.borrow().quota.map_or(f64::NAN, |quota| quota.watt_hours())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::governor::readings::{OverCurrent, Rail, Reading, Readings, Zone, ZoneRole};
    use crate::units::{Bytes, Celsius, Watts};
    use std::collections::BTreeMap;
    use std::time::Duration;

    fn read<T>(value: T) -> Reading<T> {
        Reading::Value { value, at: Duration::ZERO }
    }

    fn zone(name: &str, role: ZoneRole, temperature: Reading<Celsius>) -> Zone {
        let name = name.into();
        Zone { name, role, temperature, passive_trip: None, critical_trip: None, required: false }
    }

    #[test]
    fn what_is_known_has_a_key() {
        let nothing: Vec<&str> = single(&View::default()).map(|(name, _)| name).collect();
        assert_eq!(nothing, ["Throttled"]);
        let readings = Readings {
            zones: vec![
                zone("tj-thermal", ZoneRole::Junction, read(Celsius(84.5))),
                zone("cv0-thermal", ZoneRole::Die, Reading::Offline),
            ],
            rails: vec![Rail { name: "VDD_GPU_SOC".into(), power: read(Watts(12.0)), counted: true }],
            gpu_load: Some(0.9),
            gpu_clock: Some((918_000_000, 1_300_500_000)),
            throttled: true,
            over_current: Some(OverCurrent { average: 0.5, ..OverCurrent::default() }),
            fan: Some(0.4),
            external_power: Some(true),
            battery: Some(0.8),
            available_memory: Some(Bytes(1 << 30)),
            memory_pressure: Some(0.01),
            load: Some(0.2),
            ..Readings::default()
        };
        let view = View {
            readings,
            set_points: vec![Some(Celsius(85.0))],
            power_limit: Some(Watts(30.0)),
            idle: Some(Watts(9.0)),
            memory_clock_cap: Some(3_199_000_000),
            ..View::default()
        };
        let text: BTreeMap<&str, String> = lists(&view)
            .into_iter()
            .chain(single(&view))
            .map(|(name, value)| (name, value.to_string()))
            .collect();
        assert_eq!(text.len(), 21, "{text:?}");
        assert_eq!(
            text["ZoneDetails"],
            r#"[("tj-thermal", "junction", 84.5, 85.), ("cv0-thermal", "die", NaN, NaN)]"#
        );
        assert_eq!(text["Zones"], r#"[("tj-thermal", 84.5), ("cv0-thermal", NaN)]"#);
        assert_eq!(text["RailDetails"], r#"[("VDD_GPU_SOC", 12., true)]"#);
        assert_eq!(
            (text["GpuClock"].as_str(), text["OverCurrentRate"].as_str()),
            ("uint64 918000000", "0.5")
        );
    }
}
