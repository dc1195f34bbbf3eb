//! `finetunectl status`: the daemon at a glance.

use super::connect::Client;
use super::console::Colour;
use super::context::Context;
use super::exit::{Code, Exit, Failure};
use super::figures::{Figures, ago, meaning, some, text_of, time};
use super::text;
use crate::bus::Dictionary;
use jiff::tz::TimeZone;
use serde_json::{Value, json};
use zbus::OwnedObjectPath;

/// A hold in force.
struct Inhibitor {
    who: String,
    why: String,
    uid: u32,
    since_us: u64,
}

/// Runs the command.
pub async fn command(context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let daemon = client.properties(client.manager.inner()).await?;
    let path =
        daemon.get("ActiveRun").and_then(|path| OwnedObjectPath::try_from(path.try_clone().ok()?).ok());
    let active = match path {
        Some(path) if Client::is_run(&path) => {
            let run = client.run(path).await?;
            match client.properties(run.inner()).await {
                Ok(properties) => Some(Figures::new(&properties)),
                // It was removed, or its place taken, since.
                Err(failure) if failure.exit == Exit::NotFound => None,
                Err(failure) => return Err(failure),
            }
        }
        _ => None,
    };
    let governor = client.governor().await;
    let notes = client.notes().await;
    let inhibitors = client.answer(client.manager.list_inhibitors()).await?;
    let inhibitors: Vec<Inhibitor> = inhibitors
        .into_iter()
        .map(|(who, why, uid, since_us)| Inhibitor { who, why, uid, since_us })
        .collect();
    if context.json {
        context.console.json(json(&daemon, active.as_ref(), governor.as_ref(), &notes, &inhibitors))?;
    } else {
        let dot = context.console.paint(Colour::of_state(&text_of(&daemon, "State")), "●");
        let now = context.now_us();
        let governor = governor.as_ref().map(governor_line);
        let notes = notes.iter().map(|note| text::printable(note)).collect::<Vec<_>>().join("\n");
        let page =
            page(&daemon, active.as_ref(), (governor, notes), &inhibitors, now, &context.zone, |uid| {
                context.user(uid)
            });
        context.console.result(&format!("{dot} {page}"))?;
    }
    Ok(Exit::Done.into())
}

fn unfinished(daemon: &Dictionary) -> u32 {
    daemon.get("UnfinishedRuns").and_then(|value| u32::try_from(value).ok()).unwrap_or(0)
}

fn number(properties: &Dictionary, key: &str) -> Option<f64> {
    properties.get(key).and_then(|value| f64::try_from(value).ok()).filter(|number| number.is_finite())
}

/// What the governor sees and decides: `62 % of the time (thermal), 84.6 °C of 85.0 °C, 31.2 W, MODE_30W`.
fn governor_line(governor: &Dictionary) -> String {
    let text = |key| text::printable(&text_of(governor, key));
    let mut line = match number(governor, "Duty") {
        Some(duty) if duty < 0.01 => "nothing computes".to_string(),
        Some(duty) => format!("{:.0} % of the time", duty * 100.0),
        None => text("Level"),
    };
    if let Some(reason) = some(&text("Reason")) {
        line.push_str(&format!(" ({reason})"));
    }
    match (number(governor, "Temperature"), number(governor, "TemperatureLimit")) {
        (Some(now), Some(limit)) => line.push_str(&format!(", {now:.1} °C of {limit:.1} °C")),
        _ => line.push_str(", blind to heat: there is no thermal zone"),
    }
    line.extend(number(governor, "Power").map(|power| format!(", {power:.1} W")));
    line.extend(some(&text("Mode")).map(|mode| format!(", {mode}")));
    line
}

fn governor_json(governor: &Dictionary) -> Value {
    let text = |key| Some(text_of(governor, key)).filter(|text| !text.is_empty());
    json!({
        "board": text("Board"),
        "mode": text("Mode"),
        "level": text("Level"),
        "duty": number(governor, "Duty"),
        "reason": text("Reason"),
        "temperature": number(governor, "Temperature"),
        "temperature_limit": number(governor, "TemperatureLimit"),
        "power_w": number(governor, "Power"),
    })
}

fn json(
    daemon: &Dictionary,
    active: Option<&Figures>,
    governor: Option<&Dictionary>,
    notes: &[String],
    inhibitors: &[Inhibitor],
) -> Value {
    let text = |key| Some(text_of(daemon, key)).filter(|text| !text.is_empty());
    let inhibitors: Vec<Value> = inhibitors
        .iter()
        .map(|i| json!({ "who": i.who, "why": i.why, "uid": i.uid, "since_us": i.since_us }))
        .collect();
    json!({
        "version": text("Version"),
        "state": text("State"),
        "reason": text("Reason"),
        "device": text("Device"),
        "active_run": active.map(Figures::json),
        "unfinished_runs": unfinished(daemon),
        "governor": governor.map(governor_json),
        "notes": notes,
        "inhibitors": inhibitors,
    })
}

fn page(
    daemon: &Dictionary,
    active: Option<&Figures>,
    (governor, notes): (Option<String>, String),
    inhibitors: &[Inhibitor],
    now_us: u64,
    zone: &TimeZone,
    user: impl Fn(u32) -> String,
) -> String {
    let text = |key| text::printable(&text_of(daemon, key));
    let mut state = text("State");
    if let Some(reason) = some(&text("Reason")) {
        state.push_str(&format!(" ({reason})"));
        state.extend(meaning(reason).map(|meaning| format!(": {meaning}")));
    }
    let device = some(&text("Device")).map_or_else(|| "not known before the first run".into(), String::from);
    let run = active.map_or_else(
        || "none has the device".into(),
        |run| {
            let state = text::printable(&run.state_and_reason());
            format!("{}\n{state}  {}  {}", run.title(), run.percent(), run.line())
        },
    );
    let waiting = (unfinished(daemon) as usize).saturating_sub(usize::from(active.is_some()));
    let holds: Vec<String> = inhibitors
        .iter()
        .map(|hold| {
            let (who, why) = (text::printable(&hold.who), text::printable(&hold.why));
            let user = text::printable(&user(hold.uid));
            format!(
                "{who} ({user}): {why}, since {} ({})",
                time(hold.since_us, zone),
                ago(hold.since_us, now_us)
            )
        })
        .collect();
    let rows = [
        ("State", state),
        ("Device", device),
        ("Governor", governor.unwrap_or_default()),
        ("Notes", notes),
        ("Run", run),
        ("Queue", text::count(waiting, "run")),
        ("Held by", holds.join("\n")),
    ];
    format!("finetuned {}\n{}", text("Version"), text::fields(&rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbus::{OwnedVariant, Variant};

    #[test]
    fn the_governor_in_a_line() {
        let properties = |list: &[(&str, Variant<'static>)]| -> Dictionary {
            let own = |value: &Variant<'static>| OwnedVariant::try_from(value.try_clone().unwrap()).unwrap();
            list.iter().map(|(name, value)| (name.to_string(), own(value))).collect()
        };
        let warm = properties(&[
            ("Duty", 0.62.into()),
            ("Reason", "thermal".into()),
            ("Temperature", 84.6.into()),
            ("TemperatureLimit", 85.0.into()),
            ("Power", 31.24.into()),
            ("Mode", "MODE_30W".into()),
        ]);
        assert_eq!(governor_line(&warm), "62 % of the time (thermal), 84.6 °C of 85.0 °C, 31.2 W, MODE_30W");
        assert_eq!(governor_json(&warm)["power_w"], 31.24);
        let blind = properties(&[
            ("Duty", 0.0.into()),
            ("Reason", "outside-window".into()),
            ("Temperature", f64::NAN.into()),
            ("Power", f64::NAN.into()),
            ("Mode", "".into()),
        ]);
        let line = governor_line(&blind);
        assert_eq!(line, "nothing computes (outside-window), blind to heat: there is no thermal zone");
        assert_eq!(governor_json(&blind)["temperature"], Value::Null);
    }
}
