//! Draws the page. Pure: the same model and size give the same cells.
//!
//! ```text
//!   at least 110 × 24          at least 20 rows           fewer rows
//!   ┌ head ─────────────┐      ┌ head ────────┐           ┌ head ────────┐
//!   │ run     │ heat    │      │ run          │           │ run, 3 rows  │
//!   │  curve  │ power   │      │  curve       │           │ machine, 2   │
//!   │─────────│ machine │      │ heat │ power │           │ queue        │
//!   │ queue   │         │      │ machine, 2   │           │ keys         │
//!   └ keys ─────────────┘      │ queue        │           └──────────────┘
//!                              └ keys ────────┘
//! ```

use super::ascii;
use super::model::{Data, Machine, Model, Over, Rail, Zone};
use super::series::Series;
use crate::ctl::figures::{Figures, meaning, some, time};
use crate::ctl::text;
use crate::units::{Bytes, duration, significant};
use jiff::tz::TimeZone;
use ratatui::Frame;
use ratatui::buffer::Buffer;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{
    Axis, Block, BorderType, Chart, Clear, Dataset, GraphType, Paragraph, Sparkline, SparklineBar,
};

/// From this size on the machine stands beside the runs.
const WIDE: (u16, u16) = (110, 24);
/// From this height on there are curves.
const TALL: u16 = 20;
/// Smallest page.
const SMALLEST: (u16, u16) = (24, 5);
/// Temperature at which a bar begins, °C, and what of it lies above the set-point.
const COLD: f64 = 20.0;
const ABOVE: f64 = 1.1;
/// Rows of a history where there is room.
const HISTORY: u16 = 6;
/// So near its set-point a temperature is worth a look, °C.
const NEAR: f64 = 5.0;

const TITLE: Style = Style::new().add_modifier(Modifier::BOLD);
const FAINT: Style = Style::new().fg(Color::DarkGray);
const GOOD: Style = Style::new().fg(Color::Green);
const WATCH: Style = Style::new().fg(Color::Yellow);
const BAD: Style = Style::new().fg(Color::Red);
const CURVE: Style = Style::new().fg(Color::Cyan);
const POWER: Style = Style::new().fg(Color::Magenta);

/// The keys, as the last row has them and as the help explains them.
const KEYS: [(&str, &str, &str); 8] = [
    ("q", "quit", "leave; also Esc and Ctrl-C. Runs go on"),
    ("↑↓", "run", "choose a run; also j and k, g for the first and G for the last"),
    ("p", "pause", "save the run and stop it until it is resumed"),
    ("r", "resume", "return a paused run to the queue"),
    ("c", "cancel", "end the run for good; asks first"),
    ("space", "freeze", "hold the page still; again to go on"),
    ("?", "help", "this page; any key closes it"),
    ("^Z", "", "back to the shell; fg returns"),
];

/// Draws everything.
pub fn draw(frame: &mut Frame, model: &Model) {
    let area = frame.area();
    if area.width < SMALLEST.0 || area.height < SMALLEST.1 {
        let text = format!("{} × {} at least", SMALLEST.0, SMALLEST.1);
        frame.render_widget(Paragraph::new(text), area);
    } else {
        page(frame, area, model);
        match &model.over {
            Over::Help => help(frame, area),
            Over::Nothing | Over::Cancel { .. } => {}
        }
    }
    finish(frame.buffer_mut(), model);
}

/// Takes away what the terminal cannot show.
fn finish(buffer: &mut Buffer, model: &Model) {
    for cell in &mut buffer.content {
        if !model.look.colours {
            (cell.fg, cell.bg) = (Color::Reset, Color::Reset);
        }
        if model.look.ascii && !cell.symbol().is_ascii() {
            cell.set_char(ascii::of(cell.symbol()));
        }
    }
}

fn page(frame: &mut Frame, area: Rect, model: &Model) {
    let [top, body, bottom] =
        Layout::vertical([Constraint::Length(1), Constraint::Fill(1), Constraint::Length(1)]).areas(area);
    head(frame, top, model);
    let data = model.data();
    let nothing = Machine::default();
    let machine = data.machine.as_ref().unwrap_or(&nothing);
    if area.width >= WIDE.0 && area.height >= WIDE.1 {
        wide(frame, body, model, machine);
    } else if area.height >= TALL {
        tall(frame, body, model, machine);
    } else {
        let rows = [Constraint::Length(3), Constraint::Length(2), Constraint::Fill(1)];
        let [run, strip, queue] = Layout::vertical(rows).areas(body);
        run_lines(frame, run, model);
        machine_strip(frame, strip, data, machine);
        queue_rows(frame, queue, model);
    }
    foot(frame, bottom, model);
}

fn wide(frame: &mut Frame, body: Rect, model: &Model, machine: &Machine) {
    let data = model.data();
    let [left, right] = Layout::horizontal([Constraint::Fill(3), Constraint::Fill(2)]).areas(body);
    let queue_height = (data.runs.len() as u16).saturating_add(3).min(left.height / 3).max(4);
    let [run, queue] = Layout::vertical([Constraint::Fill(1), Constraint::Length(queue_height)]).areas(left);
    run_panel(frame, run, model);
    queue_panel(frame, queue, model);
    let lines = machine_lines(data, machine);
    let machine_height = (lines.len() as u16 + 2).min(right.height / 2);
    // Rows, a history, a frame.
    let [zones, rails] =
        [machine.zones.len(), machine.rails.len()].map(|rows| rows.min(100) as u16 + HISTORY + 2);
    let ample = zones + rails + machine_height <= right.height;
    let rows = match ample {
        true => [Constraint::Length(zones), Constraint::Length(rails), Constraint::Fill(1)],
        false => [Constraint::Fill(zones), Constraint::Fill(rails), Constraint::Length(machine_height)],
    };
    let [heat, power, machine_area] = Layout::vertical(rows).areas(right);
    heat_panel(frame, heat, data, machine);
    power_panel(frame, power, data, machine);
    let text: Vec<Line> = lines.into_iter().map(Fact::line).collect();
    let inner = framed(frame, machine_area, Line::from(" Machine "));
    frame.render_widget(Paragraph::new(text), inner);
}

fn tall(frame: &mut Frame, body: Rect, model: &Model, machine: &Machine) {
    let data = model.data();
    let meters = (body.height / 3).clamp(5, 12);
    let queue = (data.runs.len() as u16).saturating_add(1).min(body.height / 4).max(2);
    let [run, middle, strip, queue] = Layout::vertical([
        Constraint::Fill(1),
        Constraint::Length(meters),
        Constraint::Length(2),
        Constraint::Length(queue),
    ])
    .areas(body);
    run_panel(frame, run, model);
    let [heat, power] = Layout::horizontal([Constraint::Fill(1), Constraint::Fill(1)]).areas(middle);
    heat_panel(frame, heat, data, machine);
    power_panel(frame, power, data, machine);
    machine_strip(frame, strip, data, machine);
    queue_rows(frame, queue, model);
}

// ── Head and foot ───────────────────────────────────────────────────────────────────────────────────────────────────

fn head(frame: &mut Frame, area: Rect, model: &Model) {
    let data = model.data();
    let clock = time(data.now_us, &model.zone.clone().unwrap_or(TimeZone::UTC));
    let clock = clock.split(' ').nth(1).unwrap_or_default().to_string();
    let [left, right] =
        Layout::horizontal([Constraint::Fill(1), Constraint::Length(clock.len() as u16 + 1)]).areas(area);
    let mut spans = vec![Span::styled(format!("finetuned {}", text::printable(&data.version)), TITLE)];
    if let Some((since, why)) = &data.away {
        let gone = duration(data.now.saturating_sub(*since));
        let why = text::printable(why);
        spans.push(Span::styled(format!("  away for {gone}: {why}; looked for each second"), BAD));
    } else {
        let mut state = text::printable(&data.state);
        if let Some(reason) = some(&data.reason) {
            state.push_str(&format!(" ({})", text::printable(reason)));
        }
        spans.push(Span::styled(format!("  ● {state}"), state_style(&data.state)));
        let machine = data.machine.as_ref();
        let board = machine.map(|machine| machine.board.as_str());
        let mode = machine.map(|machine| machine.mode.as_str());
        let parts = [board, mode, Some(data.device.as_str())].into_iter().flatten().filter_map(some);
        let used: usize = spans.iter().map(Span::width).sum();
        let parts = fitting(parts.map(text::printable), usize::from(left.width).saturating_sub(used + 2));
        spans.push(Span::raw(format!("  {parts}")));
    }
    frame.render_widget(Line::from(spans), left);
    frame.render_widget(Line::from(clock).alignment(Alignment::Right), right);
}

/// The parts, two spaces apart, up to the first one that has no room.
fn fitting(parts: impl IntoIterator<Item = String>, width: usize) -> String {
    let mut line = String::new();
    for part in parts {
        let next = if line.is_empty() { part } else { format!("{line}  {part}") };
        if Span::raw(next.as_str()).width() > width {
            break;
        }
        line = next;
    }
    line
}

fn foot(frame: &mut Frame, area: Rect, model: &Model) {
    if let Over::Cancel { title, .. } = &model.over {
        let question = format!(" Cancel {title} for good? Its checkpoints stay. y, or any other key ");
        let style = Style::new().add_modifier(Modifier::REVERSED);
        return frame.render_widget(Line::styled(question, style), area);
    }
    let mut spans = Vec::new();
    if model.is_frozen() {
        spans.push(Span::styled(" frozen ", Style::new().add_modifier(Modifier::REVERSED)));
        spans.push(Span::raw("  "));
    }
    if let Some(message) = model.message() {
        spans.push(Span::styled(text::printable(message), WATCH));
        return frame.render_widget(Line::from(spans), area);
    }
    for (key, word, _) in KEYS.iter().filter(|(_, word, _)| !word.is_empty()) {
        spans.push(Span::styled(*key, TITLE));
        spans.push(Span::styled(format!(" {word}  "), FAINT));
    }
    frame.render_widget(Line::from(spans), area);
}

fn help(frame: &mut Frame, area: Rect) {
    let lines: Vec<Line> = KEYS
        .iter()
        .map(|(key, _, words)| {
            Line::from(vec![Span::styled(format!("{key:>6}  "), TITLE), Span::raw(*words)])
        })
        .collect();
    let (width, height) = (78.min(area.width), (lines.len() as u16 + 2).min(area.height));
    let place =
        Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 2, width, height };
    frame.render_widget(Clear, place);
    let inner = framed(frame, place, Line::from(" Keys "));
    frame.render_widget(Paragraph::new(lines), inner);
}

/// Draws a frame; what is left within it.
fn framed(frame: &mut Frame, area: Rect, title: Line<'_>) -> Rect {
    let block = Block::bordered().border_type(BorderType::Rounded).border_style(FAINT).title(title);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    inner
}

// ── The run ─────────────────────────────────────────────────────────────────────────────────────────────────────────

fn state_style(state: &str) -> Style {
    match state {
        "active" | "preparing" | "running" | "saving" | "succeeded" => GOOD,
        "waiting" | "paused" | "stopping" => WATCH,
        "failed" => BAD,
        _ => FAINT,
    }
}

/// `waiting (thermal): it is too warm: it goes on when it has cooled`.
fn state_line(run: &Figures) -> Line<'static> {
    let mut spans =
        vec![Span::styled(text::printable(&run.state_and_reason()), state_style(&run.state).patch(TITLE))];
    spans.extend(meaning(&run.reason).map(|meaning| Span::raw(format!(": {meaning}"))));
    Line::from(spans)
}

fn progress_line(run: &Figures, width: u16) -> Line<'static> {
    let mut after = format!(" {:>5}  step {}", run.percent(), run.steps());
    if !run.is_over() {
        after.extend(run.remaining_seconds.map(|seconds| format!("  {}", text::left(seconds))));
    }
    let bar_width = (width as usize).saturating_sub(after.chars().count()).min(100);
    let mut spans = bar(bar_width, run.progress, None, state_style(&run.state));
    spans.push(Span::raw(after));
    Line::from(spans)
}

fn figures_line(run: &Figures, width: u16) -> Line<'static> {
    let mut parts = Vec::new();
    parts.extend(run.loss.map(|loss| format!("loss {loss:.4}")));
    parts.extend(run.eval_loss.map(|loss| format!("eval {loss:.4}")));
    parts.extend(run.tokens_per_second.map(|speed| format!("{} tok/s", significant(speed, 3))));
    parts.extend(run.energy_j.map(|joules| format!("{} Wh", significant(joules / 3600.0, 3))));
    parts.extend(run.joules_per_token.map(|joules| format!("{} J/token", significant(joules, 2))));
    parts.extend((run.memory_bytes > 0).then(|| Bytes(run.memory_bytes).to_string()));
    parts.extend((run.epoch > 0.0).then(|| format!("epoch {:.2}", run.epoch)));
    parts.extend(run.checkpoint_step.map(|step| format!("checkpoint {step}")));
    parts.extend((run.attempts > 1).then(|| format!("attempt {}", run.attempts)));
    Line::from(fitting(parts, width.into()))
}

const NO_RUN: &str = "no run; submit one with: finetunectl submit SPEC";

/// The run in three rows.
fn run_lines(frame: &mut Frame, area: Rect, model: &Model) {
    let Some(run) = model.selected() else {
        return frame.render_widget(Paragraph::new(NO_RUN), area);
    };
    let mut first = vec![Span::styled(format!("{}  ", run.title()), TITLE)];
    first.extend(state_line(run).spans);
    let lines = vec![Line::from(first), progress_line(run, area.width), figures_line(run, area.width)];
    frame.render_widget(Paragraph::new(lines), area);
}

fn run_panel(frame: &mut Frame, area: Rect, model: &Model) {
    let Some(run) = model.selected() else {
        let inner = framed(frame, area, Line::from(" Run "));
        return frame.render_widget(Paragraph::new(NO_RUN), inner);
    };
    let title = Line::from(vec![Span::raw(" Run "), Span::styled(format!("{} ", run.title()), TITLE)]);
    let inner = framed(frame, area, title);
    let [lines, curve] = Layout::vertical([Constraint::Length(3), Constraint::Fill(1)]).areas(inner);
    let text = vec![state_line(run), progress_line(run, inner.width), figures_line(run, inner.width)];
    frame.render_widget(Paragraph::new(text), lines);
    loss_curve(frame, curve, model.data(), run);
}

fn loss_curve(frame: &mut Frame, area: Rect, data: &Data, run: &Figures) {
    if area.height < 3 {
        return;
    }
    let curve = Some(&data.curve).filter(|curve| curve.run == run.id);
    let refused = curve.and_then(|curve| curve.refused.as_deref());
    let (train, eval) = match curve {
        Some(curve) if !curve.train.is_empty() || !curve.eval.is_empty() => (&curve.train, &curve.eval),
        _ => {
            let why = refused.map_or_else(|| "no loss yet".into(), |why| format!("no curve: {why}"));
            return frame.render_widget(Line::styled(text::printable(&why), FAINT), area);
        }
    };
    let (raw, smooth, eval) = (train.points(), train.smooth(), eval.points());
    let all = || raw.iter().chain(&eval);
    let (low, high) =
        all().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), p| (low.min(p.1), high.max(p.1)));
    // A flat curve lies in the middle.
    let (low, high) = if high > low { (low, high) } else { (low - 0.5, high + 0.5) };
    let last = all().fold(1.0, |last: f64, point| last.max(point.0));
    let last = run.total_steps.map_or(last, |total| last.max(total as f64));
    let sets = vec![
        Dataset::default().marker(Marker::Braille).graph_type(GraphType::Scatter).style(FAINT).data(&raw),
        Dataset::default().marker(Marker::Braille).graph_type(GraphType::Line).style(CURVE).data(&smooth),
        Dataset::default().marker(Marker::Dot).graph_type(GraphType::Scatter).style(WATCH).data(&eval),
    ];
    let labels = |low: String, high: String| [Line::styled(low, FAINT), Line::styled(high, FAINT)];
    let loss = |loss: f64| significant(loss, 4);
    let chart = Chart::new(sets)
        .legend_position(None)
        .x_axis(
            Axis::default()
                .bounds([0.0, last])
                .style(FAINT)
                .labels(labels("0".into(), format!("step {last:.0}"))),
        )
        .y_axis(Axis::default().bounds([low, high]).style(FAINT).labels(labels(loss(low), loss(high))));
    frame.render_widget(chart, area);
}

// ── The machine ─────────────────────────────────────────────────────────────────────────────────────────────────────

/// A row of blocks, filled up to `share`, with a mark at `mark`.
fn bar(width: usize, share: f64, mark: Option<f64>, style: Style) -> Vec<Span<'static>> {
    const PARTS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    let at = |share: f64| if share.is_finite() { share.clamp(0.0, 1.0) * width as f64 } else { 0.0 };
    let filled = at(share);
    let mark = mark.map(|mark| (at(mark) as usize).min(width.saturating_sub(1)));
    let cell = |i: usize| match filled - i as f64 {
        left if left >= 1.0 => '█',
        left if left <= 0.0 => '·',
        left => match PARTS[((left * 8.0) as usize).min(7)] {
            ' ' => '·',
            part => part,
        },
    };
    (0..width)
        .map(|i| match mark == Some(i) {
            true => Span::styled("┃", TITLE),
            false => {
                let c = cell(i);
                Span::styled(c.to_string(), if c == '·' { FAINT } else { style })
            }
        })
        .collect()
}

/// The history of a figure, as a row of bars between two values.
fn history(frame: &mut Frame, area: Rect, series: &Series, (low, high): (f64, f64), style: Style) {
    if area.height == 0 || area.width == 0 {
        return;
    }
    const LEVELS: f64 = 1000.0;
    let level = |value: f64| {
        let share = if high > low { (value - low) / (high - low) } else { 0.0 };
        // Something is always seen of what was read.
        (share.clamp(0.02, 1.0) * LEVELS) as u64
    };
    let bars = series.columns(area.width.into());
    let bars = bars.into_iter().map(|value| SparklineBar::from(value.map(level)));
    let sparkline = Sparkline::default().max(LEVELS as u64).style(style).absent_value_symbol(" ").data(bars);
    frame.render_widget(sparkline, area);
}

fn heat_style(now: f64, set: Option<f64>) -> Style {
    match set {
        Some(set) if now >= set => BAD,
        Some(set) if now >= set - NEAR => WATCH,
        _ => GOOD,
    }
}

fn heat_panel(frame: &mut Frame, area: Rect, data: &Data, machine: &Machine) {
    let mut title = vec![Span::raw(" Heat ")];
    if let Some((now, set)) = machine.temperature {
        title.push(Span::styled(format!("{now:.1} °C of {set:.1} "), heat_style(now, Some(set))));
    }
    let inner = framed(frame, area, Line::from(title));
    if machine.zones.is_empty() {
        let why = if machine.blind { "no thermal zone: blind to heat" } else { "not known" };
        return frame.render_widget(Line::styled(why, WATCH), inner);
    }
    let (rows, below) = split_history(inner, machine.zones.len());
    let zones = chosen(&machine.zones, rows.height.into());
    let names = zones.iter().map(|zone| text::printable(&zone.name).chars().count()).max().unwrap_or(0);
    let names = names.min(16).min(rows.width as usize / 3);
    let left_out = machine.zones.len() - zones.len();
    let lines = more(&zones, left_out, |zone| {
        let name = text::shorten(&text::printable(&zone.name), names);
        let mut spans = vec![Span::raw(format!("{name:names$} "))];
        let Some(now) = zone.now else {
            spans.push(Span::styled(format!("{:>8}", "-"), FAINT));
            return Line::from(spans);
        };
        let style = heat_style(now, zone.set);
        spans.push(Span::styled(format!("{now:>5.1} °C "), style));
        let set = zone.set.map_or_else(|| format!("{:5}", ""), |set| format!(" {set:>4.0}"));
        let width = (rows.width as usize).saturating_sub(names + 15);
        let (low, high) = (COLD, zone.set.unwrap_or(100.0).max(COLD + 1.0) * ABOVE);
        let share = |value: f64| (value - low) / (high - low);
        spans.extend(bar(width, share(now), zone.set.map(share), style));
        spans.push(Span::styled(set, FAINT));
        Line::from(spans)
    });
    frame.render_widget(Paragraph::new(lines), rows);
    let set = machine.temperature.map_or(100.0, |(_, set)| set);
    history(frame, below, &data.temperatures, (COLD, set * ABOVE), CURVE);
}

/// As many zones as there is room for, with a row for how many are left out: those nearest to their set-points. They stand
/// as the kernel has them, the chip as a whole first, so that they do not change places with every tenth of a degree.
fn chosen(zones: &[Zone], rows: usize) -> Vec<&Zone> {
    let mut order: Vec<usize> = (0..zones.len()).collect();
    if zones.len() > rows {
        let room = |i: &usize| zones[*i].now.zip(zones[*i].set).map_or(f64::INFINITY, |(now, set)| set - now);
        order.sort_by(|a, b| room(a).total_cmp(&room(b)));
        order.truncate(rows.saturating_sub(1));
    }
    order.sort_by_key(|i| (!zones[*i].junction, *i));
    order.into_iter().map(|i| &zones[i]).collect()
}

fn power_panel(frame: &mut Frame, area: Rect, data: &Data, machine: &Machine) {
    let mut title = vec![Span::raw(" Power ")];
    if let Some(power) = machine.power {
        let over = machine.power_limit.is_some_and(|limit| power > limit);
        let limit = machine.power_limit.map(|limit| format!("of {limit:.1} ")).unwrap_or_default();
        title.push(Span::styled(format!("{power:.1} W {limit}"), if over { BAD } else { POWER }));
    }
    let inner = framed(frame, area, Line::from(title));
    if machine.rails.is_empty() {
        return frame.render_widget(Line::styled("no power meter", FAINT), inner);
    }
    let (rows, below) = split_history(inner, machine.rails.len());
    let watts = machine.rails.iter().filter_map(|rail| rail.watts);
    let most = watts.chain(machine.power_limit).chain(machine.power).fold(1.0, f64::max);
    let names =
        machine.rails.iter().map(|rail| text::printable(&rail.name).chars().count()).max().unwrap_or(0);
    let names = names.min(16).min(rows.width as usize / 3);
    let mut rails: Vec<&Rail> = machine.rails.iter().collect();
    rails.sort_by_key(|rail| !rail.counted);
    if rails.len() > rows.height.into() {
        rails.truncate(usize::from(rows.height).saturating_sub(1));
    }
    let left_out = machine.rails.len() - rails.len();
    let lines = more(&rails, left_out, |rail| {
        let name = text::shorten(&text::printable(&rail.name), names);
        // What is not counted is part of what is, or beside it.
        let style = if rail.counted { Style::new() } else { FAINT };
        let mut spans = vec![Span::styled(format!("{name:names$} "), style)];
        let Some(watts) = rail.watts else {
            spans.push(Span::styled(format!("{:>8}", "-"), FAINT));
            return Line::from(spans);
        };
        spans.push(Span::styled(format!("{watts:>6.1} W "), style));
        let width = (rows.width as usize).saturating_sub(names + 10);
        spans.extend(bar(width, watts / most, None, if rail.counted { POWER } else { FAINT }));
        Line::from(spans)
    });
    frame.render_widget(Paragraph::new(lines), rows);
    let high = data.powers.points().iter().fold(machine.power_limit.unwrap_or(1.0), |most, p| most.max(p.1));
    history(frame, below, &data.powers, (0.0, high), POWER);
}

/// Room for so many rows, and what is left for their history: two rows at least, where there are five.
fn split_history(area: Rect, rows: usize) -> (Rect, Rect) {
    let left = area.height.saturating_sub(rows as u16).max(if area.height >= 5 { 2 } else { 0 });
    let [above, below] = Layout::vertical([Constraint::Fill(1), Constraint::Length(left)]).areas(area);
    (above, below)
}

/// A line each, and how many are left out.
fn more<T>(items: &[T], left_out: usize, line: impl Fn(&T) -> Line<'static>) -> Vec<Line<'static>> {
    let mut lines: Vec<Line> = items.iter().map(line).collect();
    if left_out > 0 {
        lines.push(Line::styled(format!("and {left_out} more"), FAINT));
    }
    lines
}

/// Something to know of the machine.
struct Fact {
    label: &'static str,
    text: String,
    style: Style,
}

impl Fact {
    fn line(self) -> Line<'static> {
        Line::from(vec![
            Span::styled(format!("{:>9}  ", self.label), FAINT),
            Span::styled(self.text, self.style),
        ])
    }
}

fn hertz(hertz: u64) -> String {
    if hertz < 1_000_000_000 {
        format!("{:.0} MHz", hertz as f64 / 1e6)
    } else {
        format!("{:.2} GHz", hertz as f64 / 1e9)
    }
}

fn share(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// What there is to know, the most important first.
fn machine_lines(data: &Data, machine: &Machine) -> Vec<Fact> {
    let mut facts = Vec::new();
    let mut fact = |label, text: String, style| {
        if !text.is_empty() {
            facts.push(Fact { label, text: text::printable(&text), style });
        }
    };
    let style = match machine.duty {
        Some(duty) if duty < 0.01 => BAD,
        Some(duty) if duty < 1.0 => WATCH,
        _ => GOOD,
    };
    let level = some(&machine.level).map(|level| format!(", {level}")).unwrap_or_default();
    fact("duty", format!("{}{level}", machine.pace()), style);
    fact("why", meaning(&machine.reason).unwrap_or_default().into(), style);
    let night = machine.night.map(|night| match machine.quota {
        Some(quota) => format!("{night:.1} Wh of {quota:.0}"),
        None => format!("{night:.1} Wh"),
    });
    let spent = machine.night.zip(machine.quota).is_some_and(|(night, quota)| night >= quota);
    fact("night", night.unwrap_or_default(), if spent { WATCH } else { Style::new() });
    let pressed = machine.memory_pressure.filter(|pressure| *pressure >= 0.01);
    let memory = machine.memory.map(|memory| match pressed {
        Some(pressure) => format!("{} free, pressure {}", Bytes(memory), share(pressure)),
        None => format!("{} free", Bytes(memory)),
    });
    fact("memory", memory.unwrap_or_default(), if pressed.is_some() { WATCH } else { Style::new() });
    let clock = machine.gpu_clock.map(|now| match machine.gpu_clock_limit {
        Some(limit) => format!("{} of {}", hertz(now), hertz(limit)),
        None => hertz(now),
    });
    let gpu = [machine.gpu_load.map(share), clock].into_iter().flatten().collect::<Vec<_>>().join("  ");
    fact("GPU", gpu, Style::new());
    fact("EMC cap", machine.memory_clock_cap.map(hertz).unwrap_or_default(), Style::new());
    fact(
        "load",
        machine.load.map(|load| format!("{} of the cores", share(load))).unwrap_or_default(),
        Style::new(),
    );
    fact("fan", machine.fan.map(share).unwrap_or_default(), Style::new());
    let battery = machine.battery.map(|battery| format!("battery {}", share(battery)));
    let external = machine.external_power.map(|there| if there { "external" } else { "no external power" });
    let supply = external.map(String::from).into_iter().chain(battery).collect::<Vec<_>>().join(", ");
    fact("supply", supply, if machine.external_power == Some(false) { WATCH } else { Style::new() });
    fact("idle", machine.idle.map(|idle| format!("{idle:.1} W")).unwrap_or_default(), Style::new());
    let names = ["under-voltage", "over-current", "instantaneous over-current"];
    let rates = machine.alarms.unwrap_or_default();
    let alarms: Vec<String> = names
        .iter()
        .zip(rates)
        .filter(|(_, rate)| *rate > 0.0)
        .map(|(name, rate)| format!("{name} {}/s", significant(rate, 2)))
        .chain(machine.throttled.then(|| "throttled by the kernel".to_string()))
        .collect();
    fact("alarms", alarms.join(", "), BAD);
    for (who, why) in &data.holds {
        fact("held by", format!("{who}: {why}"), WATCH);
    }
    for note in &machine.notes {
        fact("note", note.clone(), WATCH);
    }
    facts
}

/// The same in a few rows, as far as it fits.
fn machine_strip(frame: &mut Frame, area: Rect, data: &Data, machine: &Machine) {
    let mut facts = Vec::new();
    if area.height < 3
        && let Some((now, set)) = machine.temperature
    {
        let text = format!("{now:.1} °C of {set:.1}");
        facts.push(Fact { label: "heat", text, style: heat_style(now, Some(set)) });
    }
    if let Some(power) = machine.power {
        let text = format!("{power:.1} W");
        facts.push(Fact { label: "power", text, style: POWER });
    }
    let known = machine_lines(data, machine);
    // What is not well goes before what is; the reason's meaning comes where there is room.
    let rank = |fact: &Fact| match fact.label {
        "duty" | "alarms" | "held by" => 0,
        "heat" | "power" => 1,
        "why" => 3,
        _ => 2,
    };
    facts.extend(known);
    facts.sort_by_key(rank);
    let mut lines = vec![Line::default()];
    for fact in facts {
        let spans = [
            Span::styled(format!("{} ", fact.label), FAINT),
            Span::styled(format!("{}  ", fact.text), fact.style),
        ];
        let width: usize = spans.iter().map(Span::width).sum();
        let full =
            lines.last().is_some_and(|line| line.width() > 0 && line.width() + width > area.width.into());
        if full {
            if lines.len() >= area.height.into() {
                continue;
            }
            lines.push(Line::default());
        }
        if let Some(line) = lines.last_mut() {
            line.spans.extend(spans);
        }
    }
    frame.render_widget(Paragraph::new(lines), area);
}

// ── The queue ───────────────────────────────────────────────────────────────────────────────────────────────────────

fn queue_panel(frame: &mut Frame, area: Rect, model: &Model) {
    let waiting = text::count(model.data().unfinished, "run");
    let inner = framed(frame, area, Line::from(format!(" Queue: {waiting} ")));
    queue_rows(frame, inner, model);
}

fn queue_rows(frame: &mut Frame, area: Rect, model: &Model) {
    let data = model.data();
    if area.height == 0 || data.runs.is_empty() {
        return;
    }
    let digits = text::digits(data.runs.iter().map(|run| run.id.as_str())).min(12);
    let roomy = area.width >= 100;
    let names = if roomy { 20 } else { 12 };
    let row = |mark: &str, id: &str, name: &str, done: &str, steps: &str, loss: &str| {
        let steps = if roomy { format!("  {steps:>11}") } else { String::new() };
        format!("{mark} {id:digits$}  {name:names$}  {done:>5}{steps}  {loss:>7}  ")
    };
    let title = row(" ", "ID", "NAME", "DONE", "STEP", "LOSS") + "STATE";
    let mut lines = vec![Line::styled(title, FAINT)];
    let height = usize::from(area.height).saturating_sub(1);
    let selected = model.selected().map(|run| run.id.as_str());
    let at = data.runs.iter().position(|run| Some(run.id.as_str()) == selected).unwrap_or(0);
    let first = at.saturating_sub(height.saturating_sub(1));
    for run in data.runs.iter().skip(first).take(height) {
        let chosen = Some(run.id.as_str()) == selected;
        let id = text::printable(text::prefix(&run.id, digits));
        let name = text::shorten(&text::printable(&run.name), names);
        let loss = run.loss.map_or_else(|| "-".into(), |loss| format!("{loss:.4}"));
        let mark = if chosen { "▶" } else { " " };
        let line = row(mark, &id, &name, &run.percent(), &run.steps(), &loss);
        let style = if chosen { TITLE } else { Style::new() };
        let mut spans = vec![Span::styled(line, style)];
        spans.push(Span::styled(text::printable(&run.state_and_reason()), state_style(&run.state)));
        spans.extend(meaning(&run.reason).map(|meaning| Span::styled(format!(": {meaning}"), FAINT)));
        lines.push(Line::from(spans));
    }
    frame.render_widget(Paragraph::new(lines), area);
}

/// The page as lines of text, for those who want one and no more.
pub fn text_of(model: &Model, width: u16, height: u16) -> String {
    let backend = ratatui::backend::TestBackend::new(width, height);
    // Drawing into memory does not fail.
    let Ok(mut terminal) = ratatui::Terminal::new(backend);
    let Ok(frame) = terminal.draw(|frame| draw(frame, model));
    let mut text = String::new();
    for row in frame.buffer.content.chunks(width.max(1).into()) {
        let mut line = String::new();
        let mut covered = 0;
        for cell in row {
            // The second half of a wide character has no text of its own.
            if covered == 0 {
                line.push_str(cell.symbol());
                covered = Span::raw(cell.symbol()).width().max(1);
            }
            covered -= 1;
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
