//! `org.finetuned.Finetuned1.Governor`, at [`ROOT`](super::ROOT): what the machine bears now, and leases of the device.

use super::Context;
use super::Dictionary;
use super::authority::Action;
use super::error::{Error, Result};
use super::input::{Options, name, no_options};
use super::manager::{MAX_NAME, MAX_WHY};
use crate::night::Nights;
use crate::runs::Inhibition;
use tokio::sync::Mutex;
use zbus::message::Header;
use zbus::{Connection, OwnedFd, Variant, interface};

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
    /// returned descriptor is closed. `who` and `why` are for people. Options: `release-memory` (b: the worker saves and
    /// ends at once, too).
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
        options.finish()?;
        let who = name("the argument \"who\"", who, MAX_NAME)?;
        let why = name("the argument \"why\"", why, MAX_WHY)?;
        let lease = Inhibition { who, why, owner: caller.uid, sender: caller.sender, lease: true, release };
        Ok(self.context.runs.inhibit(lease).await?.into())
    }

    /// The last round of the sensors: `Zones` (a(sd), °C), `Rails` (a(sd), watts; NaN where one cannot be read), `Notes`
    /// (as).
    #[zbus(out_args("readings"))]
    async fn get_readings(&self) -> Result<Dictionary> {
        let view = self.context.governor.borrow().clone();
        let zones: Vec<(String, f64)> =
            view.zones.iter().map(|(name, value)| (name.clone(), value.map_or(f64::NAN, |t| t.0))).collect();
        let rails: Vec<(String, f64)> =
            view.rails.iter().map(|(name, value)| (name.clone(), value.map_or(f64::NAN, |p| p.0))).collect();
        let entries: [(&str, Variant); 3] =
            [("Zones", zones.into()), ("Rails", rails.into()), ("Notes", view.notes.clone().into())];
        let mut readings = Dictionary::new();
        for (name, value) in entries {
            readings.insert(name.into(), value.try_into_owned()?);
        }
        Ok(readings)
    }

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
