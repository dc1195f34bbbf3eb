//! Drawings of a night as SVG inside a page: what the time was used for, and curves over the same hours. No scripts; the
//! colours are classes of the page's style.

use super::report::{Interval, Report, seconds};
use super::words::{clock, length};
use super::{SECOND, Span, Use};
use crate::units::significant;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Size of a drawing, in units of its own; it is scaled to the page's width.
const WIDTH: f64 = 960.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = 24.0;
const BAR: f64 = 56.0;
const CURVE: f64 = 150.0;
/// Room above a curve, for half a line of text.
const TOP: f64 = 12.0;
/// Room for the hours below a drawing.
const AXIS: f64 = 22.0;
/// Bars of a drawing: finer ones would be thinner than a pixel.
const COLUMNS: usize = 450;
/// Marks of the time axis, at most.
const MARKS: i64 = 10;
/// Distances of these marks, minutes.
const STEPS: [i64; 8] = [1, 5, 15, 30, 60, 120, 180, 360];
/// Points farther apart are not joined.
const GAP: i64 = 180 * SECOND;
/// Intervals of a value axis, about.
const LINES: f64 = 4.0;

/// What stretches of equal length were used for, in seconds by word; empty where nothing is accounted for.
pub fn columns(report: &Report, scene: Span, count: usize) -> Vec<(Span, BTreeMap<String, f64>)> {
    let edge = |i: usize| scene.from + (i128::from(scene.length()) * i as i128 / count.max(1) as i128) as i64;
    let mut columns: Vec<(Span, BTreeMap<String, f64>)> =
        (0..count).map(|i| (Span { from: edge(i), to: edge(i + 1) }, BTreeMap::new())).collect();
    let mut first = 0;
    for interval in &report.intervals {
        let span = Span { from: interval.from_us, to: interval.to_us };
        if span.length() == 0 {
            continue;
        }
        while first < columns.len() && columns[first].0.to <= span.from {
            first += 1;
        }
        for (column, sums) in columns[first..].iter_mut().take_while(|(column, _)| column.from < span.to) {
            let share = column.within(span).length() as f64 / span.length() as f64;
            for (what, seconds) in &interval.uses {
                *sums.entry(what.clone()).or_default() += seconds * share;
            }
        }
    }
    columns
}

/// The class of a word; one that is not known is drawn as something else.
pub fn class(word: &str) -> &'static str {
    Use::from_word(word).map_or("other", Use::word)
}

/// The order of drawing: work first, then reasons as they are listed.
fn order(word: &str) -> (usize, &str) {
    let work = ["training", "evaluating", "preparing", "saving"];
    (work.iter().position(|other| *other == word).unwrap_or(work.len()), word)
}

struct Axis<'a> {
    scene: Span,
    zone: &'a TimeZone,
}

impl Axis<'_> {
    fn x(&self, at: i64) -> f64 {
        let share = at.saturating_sub(self.scene.from) as f64 / self.scene.length().max(1) as f64;
        LEFT + share.clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT)
    }

    /// Full hours, or shorter steps for a shorter scene, of the local clock.
    fn marks(&self) -> Vec<i64> {
        let minutes = self.scene.length() / (60 * SECOND);
        let step = STEPS.into_iter().find(|step| minutes / step <= MARKS).unwrap_or(STEPS[STEPS.len() - 1]);
        let step = step * 60 * SECOND;
        let offset = |at: i64| {
            let at = Timestamp::from_microsecond(at).unwrap_or(Timestamp::UNIX_EPOCH);
            i64::from(self.zone.to_offset(at).seconds()) * SECOND
        };
        let mut marks = Vec::new();
        let mut at = self.scene.from;
        while marks.len() <= 2 * MARKS as usize {
            // What is missing to the next mark of the local clock; its offset may change on the way.
            at += (-(at + offset(at))).rem_euclid(step);
            if at > self.scene.to {
                break;
            }
            marks.push(at);
            at += 1;
        }
        marks
    }

    fn draw(&self, svg: &mut String, height: f64) {
        for at in self.marks() {
            let x = self.x(at);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{x:.1}\" y1=\"0\" x2=\"{x:.1}\" y2=\"{height}\"/>\
                 <text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                height + AXIS - 4.0,
                clock(at, self.zone)
            );
        }
    }
}

fn open(svg: &mut String, height: f64, label: &str) {
    let _ =
        write!(svg, "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{label}\">", height + AXIS);
}

/// What the time was used for: a bar for each stretch, divided as the time in it was.
pub fn timeline(report: &Report) -> String {
    let (scene, zone) = (report.scene(), report.time_zone());
    let axis = Axis { scene, zone: &zone };
    let mut svg = String::new();
    open(&mut svg, BAR, "What the time was used for");
    let full = WIDTH - LEFT - RIGHT;
    let _ = write!(
        svg,
        "<rect class=\"ground\" x=\"{LEFT}\" y=\"6\" width=\"{full}\" height=\"{}\"/>",
        BAR - 6.0
    );
    for window in &report.windows {
        let (from, to) = (axis.x(window.from), axis.x(window.to));
        let _ = write!(
            svg,
            "<rect class=\"window\" x=\"{from:.1}\" y=\"0\" width=\"{:.1}\" height=\"3\"><title>window {} to {}</title></rect>",
            to - from,
            clock(window.from, &zone),
            clock(window.to, &zone)
        );
    }
    for (span, uses) in bars(report, scene) {
        bar(&mut svg, &axis, span, &uses);
    }
    axis.draw(&mut svg, BAR);
    svg.push_str("</svg>");
    svg
}

/// The intervals as they are, or columns where there are more of them than can be seen.
fn bars(report: &Report, scene: Span) -> Vec<(Span, BTreeMap<String, f64>)> {
    let seen =
        |interval: &&Interval| Span { from: interval.from_us, to: interval.to_us }.within(scene).length() > 0;
    if report.intervals.iter().filter(seen).count() > COLUMNS {
        return columns(report, scene, COLUMNS);
    }
    let span = |interval: &Interval| Span { from: interval.from_us, to: interval.to_us };
    report
        .intervals
        .iter()
        .filter(seen)
        .map(|interval| (span(interval).within(scene), interval.uses.clone()))
        .collect()
}

fn bar(svg: &mut String, axis: &Axis<'_>, span: Span, uses: &BTreeMap<String, f64>) {
    let total: f64 = uses.values().sum();
    if total <= 0.0 {
        return;
    }
    let (from, to) = (axis.x(span.from), axis.x(span.to));
    let mut parts: Vec<(&str, f64)> = uses.iter().map(|(what, seconds)| (what.as_str(), *seconds)).collect();
    parts.sort_by(|a, b| order(a.0).cmp(&order(b.0)));
    let title: Vec<String> =
        parts.iter().map(|(what, part)| format!("{} {:.0} %", class(what), part / total * 100.0)).collect();
    let title = format!(
        "{}–{} ({}): {}",
        clock(span.from, axis.zone),
        clock(span.to, axis.zone),
        length(seconds(span.length())),
        title.join(", ")
    );
    let mut y = BAR;
    for (what, part) in parts {
        let height = (BAR - 6.0) * part / total;
        y -= height;
        let _ = write!(
            svg,
            "<rect class=\"u-{}\" x=\"{from:.2}\" y=\"{y:.2}\" width=\"{:.2}\" height=\"{height:.2}\"><title>{title}</title></rect>",
            class(what),
            (to - from).max(0.3)
        );
    }
}

/// A curve: its class, and its points; one without a value breaks it.
pub struct Curve {
    /// `temperature`, `limit`, `power` or `loss`.
    pub class: &'static str,
    /// When, in microseconds since 1970, and how much.
    pub points: Vec<(i64, Option<f64>)>,
}

/// Curves over the hours of the timeline; none where there is nothing to draw.
pub fn curves(report: &Report, label: &str, unit: &str, curves: &[Curve]) -> Option<String> {
    let (scene, zone) = (report.scene(), report.time_zone());
    let inside = |at: i64| scene.from <= at && at <= scene.to;
    let values = || {
        let points = curves.iter().flat_map(|curve| &curve.points);
        points.filter(|(at, _)| inside(*at)).filter_map(|(_, value)| *value).filter(|value| value.is_finite())
    };
    let (least, most) = values()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), value| (least.min(value), most.max(value)));
    if least > most {
        return None;
    }
    let step = nice_step((most - least).max(most.abs() * 0.02).max(1e-6) / LINES);
    let (bottom, top) = ((least / step).floor() * step, (most / step).ceil() * step);
    let top = if top > bottom { top } else { bottom + step };
    let y = |value: f64| TOP + (top - value) / (top - bottom) * (CURVE - TOP);
    let axis = Axis { scene, zone: &zone };
    let mut svg = String::new();
    open(&mut svg, CURVE, label);
    let lines = ((top - bottom) / step).round() as usize;
    for i in 0..=lines.min(20) {
        let value = bottom + step * i as f64;
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{0:.1}\" x2=\"{1}\" y2=\"{0:.1}\"/>\
             <text class=\"tick\" x=\"{2}\" y=\"{3:.1}\" text-anchor=\"end\">{4}{unit}</text>",
            y(value),
            WIDTH - RIGHT,
            LEFT - 4.0,
            y(value) + 3.5,
            shown(value, step)
        );
    }
    axis.draw(&mut svg, CURVE);
    for curve in curves {
        for piece in pieces(curve, scene) {
            let points: Vec<String> =
                piece.iter().map(|(at, value)| format!("{:.1},{:.1}", axis.x(*at), y(*value))).collect();
            let _ = write!(svg, "<polyline class=\"c-{}\" points=\"{}\"/>", curve.class, points.join(" "));
        }
    }
    svg.push_str("</svg>");
    Some(svg)
}

/// 1, 2 or 5 times a power of ten, not below.
fn nice_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let step = [1.0, 2.0, 5.0].into_iter().find(|step| step * power >= least).unwrap_or(10.0);
    step * power
}

fn shown(value: f64, step: f64) -> String {
    let decimals = (-step.log10().floor()).clamp(0.0, 6.0) as usize;
    if value.abs() >= 1e6 { significant(value, 3) } else { format!("{value:.decimals$}") }
}

/// The stretches of a curve without a gap. A point alone is drawn as a dot of a minute.
fn pieces(curve: &Curve, scene: Span) -> Vec<Vec<(i64, f64)>> {
    let mut pieces: Vec<Vec<(i64, f64)>> = Vec::new();
    let mut open = false;
    for (at, value) in curve.points.iter().filter(|(at, _)| scene.from <= *at && *at <= scene.to) {
        let Some(value) = value.filter(|value| value.is_finite()) else {
            open = false;
            continue;
        };
        match pieces.last_mut() {
            Some(piece) if open && piece.last().is_some_and(|last| at.saturating_sub(last.0) <= GAP) => {
                piece.push((*at, value))
            }
            _ => pieces.push(vec![(*at, value)]),
        }
        open = true;
    }
    for piece in &mut pieces {
        if let [(at, value)] = piece[..] {
            piece.push((at.saturating_add(60 * SECOND), value));
        }
    }
    pieces
}
