//! The report as a page: one file without scripts and without anything from elsewhere, light or dark as the reader likes.
//!
//! Names, notes and reasons may come from anybody: everything that is not written here is escaped.

use super::SECOND;
use super::Use;
use super::chart::{self, Curve};
use super::figures::Point;
use super::report::{Range, Report, RunLine, Sums, UseSum};
use super::words::{clock, length, percent};
use crate::units::significant;
use jiff::tz::TimeZone;
use std::fmt::Write;

const STYLE: &str = "\
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f23;--soft:#667;--line:#d8dce2;--void:#eef0f3;\
--training:#2a9d4a;--evaluating:#1d9a9a;--preparing:#3d7fd9;--saving:#7c5cc4;--heat:#d6453d;--power:#e0822a;--lease:#cf4f9d;\
--hours:#9aa3af;--none:#b9c0ca;--off:#4b5563;--fault:#8f1d3f;--person:#c2a21a;--ramp:#a9cf78}\
@media(prefers-color-scheme:dark){:root{--ground:#14171a;--ink:#e6e8ea;--soft:#9aa3ad;--line:#343a41;--void:#22272c;\
--training:#3fbf63;--evaluating:#35bcbc;--preparing:#5b9bf0;--saving:#a184e6;--heat:#f0655c;--power:#f0a04e;--lease:#e873b8;\
--hours:#6b7480;--none:#545c66;--off:#8b95a3;--fault:#d1577c;--person:#d8bd45;--ramp:#7f9e55}}\
body{background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}\
h1{font-size:1.4rem;margin-bottom:0}h2{font-size:1.05rem;margin:2rem 0 .3rem}.sub,.tick{color:var(--soft);fill:var(--soft)}\
.lead{font-size:1.15rem}svg{width:100%;height:auto;display:block}.tick{font-size:11px}.grid{stroke:var(--line)}\
.ground{fill:var(--void)}.window{fill:var(--ink)}polyline{fill:none;stroke-width:1.6}.c-temperature{stroke:var(--heat)}\
.c-limit{stroke:var(--soft);stroke-dasharray:5 4}.c-power{stroke:var(--power)}.c-loss{stroke:var(--preparing)}\
table{border-collapse:collapse;width:100%}th{text-align:left;color:var(--soft);font-weight:normal}\
td,th{padding:.2rem .8rem .2rem 0;border-bottom:1px solid var(--line);vertical-align:top}.n{text-align:right}.n,td:first-child{white-space:nowrap}\
.scroll{overflow-x:auto}.swatch{width:.8em;height:.8em;display:inline-block;vertical-align:baseline;margin-right:.5em}\
.u-training{fill:var(--training)}.u-evaluating{fill:var(--evaluating)}.u-preparing{fill:var(--preparing)}\
.u-saving{fill:var(--saving)}.u-thermal,.u-quiet-hours{fill:var(--heat)}\
.u-power-budget,.u-energy-quota,.u-over-current,.u-on-battery,.u-battery-low{fill:var(--power)}\
.u-leased,.u-inhibited,.u-busy,.u-memory-pressure,.u-preempted{fill:var(--lease)}.u-outside-window{fill:var(--hours)}.u-ramp-up{fill:var(--ramp)}\
.u-no-run{fill:var(--none)}.u-off,.u-suspend,.u-clock-set,.u-shutdown,.u-daemon-restart,.u-daemon-lost{fill:var(--off)}\
.u-user{fill:var(--person)}.u-sensor-lost,.u-settings-lost,.u-backoff,.u-early-stopping,.u-diverged,.u-storage,.u-invalid-input,.u-changed,\
.u-does-not-fit,.u-out-of-memory,.u-crashed,.u-device,.u-hung,.u-protocol,.u-launch,.u-other{fill:var(--fault)}";

/// Text of others inside the page: no tag, no attribute and no direction of writing comes out of it.
pub fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                safe.push('\u{fffd}')
            }
            '\u{fffe}' | '\u{ffff}' => safe.push('\u{fffd}'),
            c if c.is_control() => safe.push('\u{fffd}'),
            c => safe.push(c),
        }
    }
    safe
}

/// The page.
pub fn page(report: &Report) -> String {
    let zone = report.time_zone();
    let night = escaped(&report.night);
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\
         <title>finetuned: the night of {night}</title><style>{STYLE}</style></head><body>\n\
         <h1>The night of {night}</h1><p class=\"sub\">{}</p>\n<p class=\"lead\">{}</p>\n",
        subtitle(report, &zone),
        escaped(&report.headline)
    );
    list(&mut html, report.advice.iter().map(|line| escaped(line)));
    html.push_str(&chart::timeline(report));
    html.push('\n');
    uses(&mut html, "The time", &report.window);
    if report.whole != report.window {
        uses(&mut html, "The whole night, noon to noon", &report.whole);
    }
    figures(&mut html, report);
    graphs(&mut html, report);
    runs(&mut html, report);
    others(&mut html, report, &zone);
    html.push_str("</body></html>\n");
    html
}

fn subtitle(report: &Report, zone: &TimeZone) -> String {
    let windows: Vec<String> = report
        .windows
        .iter()
        .map(|window| format!("{}–{}", clock(window.from, zone), clock(window.to, zone)))
        .collect();
    let windows = match windows.len() {
        0 => "no window".to_string(),
        _ if report.windows.len() > 8 => format!("{} windows", report.windows.len()),
        _ => format!("window {}", windows.join(", ")),
    };
    let until = match report.over {
        true => "complete".to_string(),
        false => format!("until {}, it goes on", clock(report.through_us, zone)),
    };
    escaped(&format!("{windows}, {}; {until}", report.zone))
}

fn list(html: &mut String, lines: impl Iterator<Item = String>) {
    let lines: Vec<String> = lines.map(|line| format!("<li>{line}</li>")).collect();
    if !lines.is_empty() {
        let _ = writeln!(html, "<ul>{}</ul>", lines.concat());
    }
}

/// A table; cells are HTML. Columns whose header begins with `#` hold numbers.
fn table(html: &mut String, title: &str, headers: &[&str], rows: &[Vec<String>]) {
    if rows.is_empty() {
        return;
    }
    let class = |header: &str| if header.starts_with('#') { " class=\"n\"" } else { "" };
    let head: Vec<String> = headers
        .iter()
        .map(|header| format!("<th{}>{}</th>", class(header), header.trim_start_matches('#')))
        .collect();
    let _ = write!(
        html,
        "<h2>{title}</h2><div class=\"scroll\"><table><thead><tr>{}</tr></thead><tbody>",
        head.concat()
    );
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(headers)
            .map(|(cell, header)| format!("<td{}>{cell}</td>", class(header)))
            .collect();
        let _ = write!(html, "<tr>{}</tr>", cells.concat());
    }
    html.push_str("</tbody></table></div>\n");
}

fn uses(html: &mut String, title: &str, sums: &Sums) {
    let row = |sum: &UseSum| {
        let meaning = Use::from_word(&sum.what).map_or("", Use::meaning);
        let swatch = format!(
            "<svg class=\"swatch\" viewBox=\"0 0 8 8\" aria-hidden=\"true\"><rect class=\"u-{}\" width=\"8\" height=\"8\"/></svg>",
            chart::class(&sum.what)
        );
        vec![
            format!("{swatch}{}", escaped(&sum.what)),
            length(sum.seconds),
            escaped(&percent(sum.share)),
            escaped(meaning),
        ]
    };
    let rows: Vec<Vec<String>> = sums.uses.iter().map(row).collect();
    table(html, title, &["What", "#Time", "#Share", ""], &rows);
}

fn range(range: &Range, unit: &str) -> String {
    format!("{:.1} to {:.1} {unit}, mean {:.1} {unit}", range.min, range.max, range.mean)
}

fn figures(html: &mut String, report: &Report) {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut row = |name: &str, value: String| rows.push(vec![name.to_string(), value]);
    row("Steps", format!("{} steps, {} tokens", report.steps, report.tokens));
    if let Some(duty) = report.duty {
        row("Duty", format!("{:.0} % of the time in which a run could train", duty * 100.0));
    }
    if let Some(energy) = &report.energy {
        let mut text = format!(
            "{} Wh of runs, {} Wh above idle",
            significant(energy.gross_j / 3600.0, 3),
            significant(energy.above_idle_j / 3600.0, 3)
        );
        let per =
            |value: Option<f64>, what| value.map(|value| format!(", {} J a {what}", significant(value, 3)));
        text.extend(per(energy.j_per_token, "token"));
        text.extend(per(energy.j_per_step, "step"));
        if energy.unmetered_s >= 1.0 {
            text.push_str(&format!("; {} without a meter are missing", length(energy.unmetered_s)));
        }
        row("Energy", text);
    }
    if let Some(power) = &report.power {
        row("Power", range(power, "W"));
    }
    if let Some(temperature) = &report.temperature {
        row("Hottest zone", range(temperature, "°C"));
    }
    let zones: Vec<String> =
        report.zones.iter().map(|(name, most)| format!("{} {most:.1} °C", escaped(name))).collect();
    if !zones.is_empty() {
        row("Greatest of each", zones.join(", "));
    }
    table(html, "Figures", &["", ""], &rows);
}

fn graphs(html: &mut String, report: &Report) {
    let of = |class, value: fn(&Point) -> Option<f64>| Curve {
        class,
        points: report.points.iter().map(|point| (point.at, value(point))).collect(),
    };
    // A curve of losses breaks where another run begins.
    let mut losses = Vec::new();
    let mut before = None;
    for point in report.points.iter().filter(|point| point.loss.is_some()) {
        if before.is_some() && before != point.run.as_ref() {
            losses.push((point.at.saturating_sub(SECOND), None));
        }
        before = point.run.as_ref();
        losses.push((point.at, point.loss));
    }
    let graphs = [
        (
            "Temperature nearest to its set-point (dashed)",
            "°",
            vec![of("temperature", |point| point.temperature), of("limit", |point| point.limit)],
        ),
        ("Power", " W", vec![of("power", |point| point.power)]),
        ("Loss", "", vec![Curve { class: "loss", points: losses }]),
    ];
    for (title, unit, curves) in graphs {
        if let Some(svg) = chart::curves(report, title, unit, &curves) {
            let _ = writeln!(html, "<h2>{title}</h2>{svg}");
        }
    }
}

/// Loss at the begin and at the end; none where no step was done.
pub fn losses(run: &RunLine) -> Option<String> {
    Some(format!("{:.4} to {:.4}", run.first_loss?, run.last_loss?))
}

fn runs(html: &mut String, report: &Report) {
    let rows: Vec<Vec<String>> = report
        .runs
        .iter()
        .map(|run| {
            let reason =
                run.reason.as_ref().map_or(String::new(), |reason| format!(" ({})", escaped(reason)));
            vec![
                format!("{} <span class=\"sub\">{}</span>", escaped(&run.name), escaped(&run.id)),
                format!("{} to {}", run.first_step, run.last_step),
                losses(run).unwrap_or_else(|| "–".to_string()),
                run.gross_j
                    .map_or("–".to_string(), |joules| format!("{} Wh", significant(joules / 3600.0, 3))),
                format!("{}{reason}", escaped(&run.state)),
            ]
        })
        .collect();
    table(html, "Runs", &["Run", "#Steps", "#Loss", "#Energy", "At last"], &rows);
}

fn others(html: &mut String, report: &Report, zone: &TimeZone) {
    let leases: Vec<Vec<String>> = report
        .leases
        .iter()
        .map(|lease| vec![escaped(&lease.who), lease.count.to_string(), length(lease.seconds)])
        .collect();
    table(html, "Leases and holds", &["Who", "#Count", "#Time"], &leases);
    let modes: Vec<Vec<String>> =
        report.modes.iter().map(|mode| vec![clock(mode.at, zone), escaped(&mode.mode)]).collect();
    table(html, "Power modes", &["From", "Mode"], &modes);
    let notes: Vec<Vec<String>> = report
        .notes
        .iter()
        .map(|note| vec![clock(note.first, zone), length(note.seconds), escaped(&note.text)])
        .collect();
    table(html, "What the governor noted", &["First at", "#Time", "Note"], &notes);
    list(html, remarks(report).iter().map(|line| escaped(line)));
}

/// What has to be said about the record itself.
pub fn remarks(report: &Report) -> Vec<String> {
    let mut remarks = Vec::new();
    if report.starts > 1 {
        remarks.push(format!("The daemon was started {} times.", report.starts));
    }
    if report.damaged > 0 {
        remarks.push(format!(
            "{} lines of the record could not be read: what they said is missing.",
            report.damaged
        ));
    }
    if report.undone_s >= 1.0 {
        remarks.push(format!(
            "The clock was set back: {} that were accounted for are counted anew.",
            length(report.undone_s)
        ));
    }
    remarks
}
