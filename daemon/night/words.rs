//! What happened in one sentence, and what would have helped.

use super::report::{Report, Sums, UseSum};
use super::{SECOND, Span, Use};
use crate::reason::Reason;
use crate::units::duration;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::time::Duration;

/// Reasons that the sentence names.
const NAMED: usize = 3;
/// Share of the time from which on a reason is worth advice.
const WORTH_ADVICE: f64 = 0.1;
/// Seconds below which nothing is said.
const NOTHING: f64 = 0.5;

/// Seconds as people say them.
pub fn length(seconds: f64) -> String {
    // Rounded to what is shown, so that 59.97 s is a minute.
    let seconds = seconds.max(0.0);
    let shown = if seconds < 9.95 { (seconds * 10.0).round() / 10.0 } else { seconds.round() };
    duration(Duration::try_from_secs_f64(shown).unwrap_or(Duration::MAX))
}

/// A share as people read it: nothing and all are said of nothing and all only.
pub fn percent(share: f64) -> String {
    match share * 100.0 {
        percent if percent > 0.0 && percent < 0.05 => "< 0.1 %".to_string(),
        percent if (99.95..100.0).contains(&percent) => "> 99.9 %".to_string(),
        percent => format!("{percent:.1} %"),
    }
}

/// A moment as the clock on the wall shows it.
pub fn clock(at: i64, zone: &TimeZone) -> String {
    match Timestamp::from_microsecond(at) {
        Ok(at) => at.to_zoned_datetime(zone.clone()).strftime("%H:%M").to_string(),
        Err(_) => format!("{at} µs"),
    }
}

/// What happened.
pub fn headline(report: &Report) -> String {
    let sums = &report.window;
    let begins = report.windows.iter().map(|window| window.from).min();
    if sums.accounted_s < NOTHING {
        return match begins {
            Some(from) if from >= report.through_us => {
                format!("The window has not begun: it opens at {}.", clock(from, &report.time_zone()))
            }
            _ => "The night has only just begun.".to_string(),
        };
    }
    let trained = sums.of(Use::Training);
    let head = if trained >= NOTHING {
        format!("Trained {} {}", length(trained), of_what(report))
    } else {
        format!("Nothing was trained {}", in_what(report))
    };
    let lost: Vec<String> = lost(sums)
        .take(NAMED)
        .map(|(reason, sum)| match trained >= NOTHING {
            true => format!("{} because of {reason}", length(sum.seconds)),
            false => format!("{} {reason} ({})", length(sum.seconds), reason.meaning()),
        })
        .collect();
    let joined = match trained >= NOTHING {
        true if !lost.is_empty() => format!("; waited {}", lost.join(", ")),
        false if !lost.is_empty() => format!(": {}", lost.join("; ")),
        _ => String::new(),
    };
    let work: Vec<String> = [Use::Preparing, Use::Evaluating, Use::Saving]
        .into_iter()
        .map(|usage| (usage, sums.of(usage)))
        .filter(|(_, seconds)| *seconds >= NOTHING)
        .map(|(usage, seconds)| format!("{} {usage}", length(seconds)))
        .collect();
    let work = if work.is_empty() { String::new() } else { format!("; {}", work.join(", ")) };
    format!("{head}{joined}{work}.")
}

/// What would have helped, for the reasons that took most.
pub fn advice(report: &Report) -> Vec<String> {
    let sums = &report.window;
    lost(sums)
        .filter(|(_, sum)| sum.share >= WORTH_ADVICE && sum.seconds >= NOTHING)
        .take(NAMED)
        .map(|(reason, _)| format!("{reason}: {}", remedy(reason)))
        .collect()
}

/// Reasons for which nothing was computed, the greatest first.
fn lost(sums: &Sums) -> impl Iterator<Item = (Reason, &UseSum)> {
    sums.uses
        .iter()
        .filter(|sum| sum.seconds >= NOTHING)
        .filter_map(|sum| Some((Reason::from_word(&sum.what)?, sum)))
}

/// `8 h 0 min window`.
fn window(report: &Report) -> String {
    let whole = Span { from: report.from_us, to: report.to_us };
    match report.windows[..] {
        [] => "night".to_string(),
        [one] if one == whole => "night".to_string(),
        [one] => format!("{} window", length(one.length() as f64 / SECOND as f64)),
        _ => format!("{} in {} windows", length(report.window.seconds), report.windows.len()),
    }
}

fn of_what(report: &Report) -> String {
    let sums = &report.window;
    let share = sums.of(Use::Training) / sums.accounted_s;
    let so_far = match sums.accounted_s < sums.seconds - NOTHING {
        true => format!("of {} so far in the {}", length(sums.accounted_s), window(report)),
        false => format!("of the {}", window(report)),
    };
    format!("{so_far} ({})", percent(share))
}

fn in_what(report: &Report) -> String {
    let sums = &report.window;
    match sums.accounted_s < sums.seconds - NOTHING {
        true => format!("so far ({}) in the {}", length(sums.accounted_s), window(report)),
        false => format!("in the {}", window(report)),
    }
}

/// What to do about a reason.
pub fn remedy(reason: Reason) -> &'static str {
    match reason {
        Reason::NoRun => "submit a run: `finetunectl submit SPEC`",
        Reason::User => "`finetunectl resume RUN` returns a paused run to the queue",
        Reason::Inhibited | Reason::Leased => {
            "`finetunectl status` shows who holds the device; the leases of the night are listed with who had them"
        }
        Reason::Thermal => {
            "more air, a lower power mode (nvpmodel), or a higher [budget] temperature: more of the time, or faster in it"
        }
        Reason::PowerBudget => "raise [budget] power, or choose a lower power mode (nvpmodel)",
        Reason::EnergyQuota => "raise [budget] energy_per_night or energy_per_run",
        Reason::OverCurrent => "look at the supply: adapter, cable, and the power mode that it has to carry",
        Reason::SensorLost => "`finetuned sensors` shows which sensor is silent",
        Reason::MemoryPressure => {
            "free memory, choose a smaller model or batch, or lower [budget] memory_floor"
        }
        Reason::OutsideWindow => "[window] times says when runs may compute",
        Reason::SettingsLost => {
            "`finetunectl budget show` says what was lost, `finetunectl budget reset` goes on without it"
        }
        Reason::OnBattery => "connect external power, or set [conditions] external_power = false",
        Reason::BatteryLow => "charge the battery, or lower [conditions] minimum_battery",
        Reason::Busy => {
            "something else uses the machine: see [conditions] maximum_load and maximum_gpu_load, or move the window"
        }
        Reason::QuietHours => "raise [window] quiet_fan, or shorten the quiet hours",
        Reason::Suspend => "keep the machine awake at night: it slept (systemctl status sleep.target)",
        Reason::Off => "`systemctl status finetuned` and `journalctl -u finetuned` say since when, and why",
        Reason::ClockSet => {
            "wait for the time before the daemon starts (systemd-time-wait-sync.service), or give the clock a battery"
        }
        Reason::RampUp => "nothing: the duty rises as soon as the machine is known to bear it",
        Reason::Storage => {
            "free space in the state directory: `finetunectl remove RUN` deletes a run that is over"
        }
        Reason::Preempted => "`finetunectl priority RUN N` changes who goes first",
        Reason::Shutdown | Reason::DaemonRestart | Reason::DaemonLost => {
            "`journalctl -u finetuned` says why the daemon ended"
        }
        Reason::Backoff
        | Reason::EarlyStopping
        | Reason::Diverged
        | Reason::InvalidInput
        | Reason::Changed
        | Reason::DoesNotFit
        | Reason::OutOfMemory
        | Reason::Crashed
        | Reason::Device
        | Reason::Hung
        | Reason::Protocol
        | Reason::Launch => {
            "`finetunectl show RUN` has the failure in words, `finetunectl logs RUN` what led to it"
        }
    }
}
