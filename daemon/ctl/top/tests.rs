//! The page as text at several sizes, keys, and content that nobody meant.

use super::draw::{draw, text_of};
use super::model::*;
use super::{interval_of, size, utf8};
use crate::bus::Dictionary;
use crate::ctl::fake::{Bench, NOW_US, World};
use crate::ctl::figures::Figures;
use crate::ctl::steer::Order;
use jiff::tz::TimeZone;
use proptest::prelude::*;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::style::Color;
use serde_json::json;
use std::time::Duration;
use zbus::{OwnedVariant, Variant};

fn dictionary<const N: usize>(entries: [(&str, Variant<'static>); N]) -> Dictionary {
    let own = |value: Variant<'static>| OwnedVariant::try_from(value).unwrap();
    entries.into_iter().map(|(key, value)| (key.to_string(), own(value))).collect()
}

fn night() -> Figures {
    Figures {
        id: "3f2a91c04d7e".into(),
        name: "night".into(),
        created_us: NOW_US - 1,
        state: "running".into(),
        step: 46,
        total_steps: Some(120),
        epoch: 0.77,
        loss: Some(1.23451),
        eval_loss: Some(1.301),
        tokens_per_second: Some(312.4),
        progress: 0.3833,
        remaining_seconds: Some(130),
        attempts: 2,
        checkpoint_step: Some(40),
        memory_bytes: 5 << 30,
        energy_j: Some(44_400.0),
        joules_per_token: Some(0.3149),
        ..Figures::default()
    }
}

fn run(id: &str, state: &str, reason: &str, priority: i32) -> Figures {
    Figures {
        id: id.into(),
        name: id.into(),
        state: state.into(),
        reason: reason.into(),
        priority,
        ..Figures::default()
    }
}

fn machine() -> Machine {
    let zone = |name: &str, now, set| {
        let junction = name == "tj-thermal";
        Zone { name: name.into(), junction, now, set }
    };
    let rail = |name: &str, watts, counted| Rail { name: name.into(), watts, counted };
    Machine {
        board: "agx-orin-64gb".into(),
        mode: "MODE_30W".into(),
        level: "soft".into(),
        reason: "thermal".into(),
        duty: Some(0.62),
        temperature: Some((84.6, 85.0)),
        power: Some(31.24),
        power_limit: Some(40.0),
        idle: Some(9.1),
        night: Some(123.4),
        quota: Some(400.0),
        zones: vec![
            zone("cpu-thermal", Some(79.0), Some(85.0)),
            zone("cv0-thermal", None, Some(85.0)),
            zone("tj-thermal", Some(84.6), Some(85.0)),
            zone("tboard-thermal", Some(52.0), None),
        ],
        rails: vec![
            rail("VDDQ_VDD2_1V8AO", Some(1.2), false),
            rail("VDD_GPU_SOC", Some(21.0), true),
            rail("VDD_CPU_CV", Some(4.1), true),
            rail("VIN_SYS_5V0", None, true),
        ],
        gpu_load: Some(0.97),
        gpu_clock: Some(918_000_000),
        gpu_clock_limit: Some(1_300_500_000),
        memory_clock_cap: Some(3_199_000_000),
        fan: Some(0.4),
        memory: Some(24 << 30),
        memory_pressure: Some(0.02),
        external_power: Some(true),
        alarms: Some([0.0, 0.5, 0.0]),
        ..Machine::default()
    }
}

/// A night in the middle of its work, a minute after the page was opened.
fn model() -> Model {
    let mut model = Model::new(Look { colours: true, ascii: false }, TimeZone::UTC);
    for second in 0..60u32 {
        model.at(Duration::from_secs(second.into()), NOW_US);
        let mut machine = machine();
        machine.temperature = Some((60.0 + f64::from(second) * 0.4, 85.0));
        machine.power = Some(10.0 + f64::from(second) * 0.36);
        model.apply(Update::Machine(Box::new(machine)));
    }
    model.apply(Update::Machine(Box::new(machine())));
    model.apply(Update::Daemon(dictionary([
        ("Version", "0.1.0".into()),
        ("State", "active".into()),
        ("Device", "Orin (8 SMs)".into()),
    ])));
    let over = Figures {
        finished_us: Some(5),
        step: 9,
        total_steps: Some(9),
        progress: 1.0,
        ..run("aa0000000001", "succeeded", "", 0)
    };
    let waiting = run("bb0000000001", "waiting", "leased", -1);
    model.apply(Update::Runs(vec![over, run("cc0000000001", "queued", "", 5), night(), waiting]));
    model.apply(Update::Holds(vec![("planner".into(), "a question".into())]));
    let records = (1..=46).map(|step| json!({"step": step, "loss": 5.0 / f64::from(step) + 1.0}));
    let records = records.chain([json!({"step": 40, "eval_loss": 1.301}), json!("no record")]).collect();
    model.apply(Update::Metrics("3f2a91c04d7e".into(), records, true));
    model
}

/// Frames are compared as they are. `FINETUNED_BLESS=1` writes them anew: look at what has changed before you commit.
#[track_caller]
fn same_as(name: &str, text: &str) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("daemon/ctl/top/frames").join(name);
    if std::env::var_os("FINETUNED_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(text == expected, "{} differs from what is drawn now:\n{text}", path.display());
}

#[test]
fn the_page_at_several_sizes() {
    for (width, height) in [(60, 16), (80, 24), (120, 40), (200, 60)] {
        same_as(&format!("{width}x{height}.txt"), &text_of(&model(), width, height));
    }
    // What the documents show is what is drawn.
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/finetunectl.md");
    let page = std::fs::read_to_string(page).unwrap();
    let shown = page.contains(&text_of(&model(), 80, 24)) || std::env::var_os("FINETUNED_BLESS").is_some();
    assert!(shown, "docs/finetunectl.md shows another page than frames/80x24.txt");
    let mut ascii = model();
    ascii.look.ascii = true;
    let text = text_of(&ascii, 80, 24);
    assert!(text.is_ascii());
    same_as("ascii.txt", &text);
}

#[test]
fn the_page_of_a_daemon_that_is_away_and_of_one_with_nothing_to_do() {
    let mut model = Model::new(Look::default(), TimeZone::UTC);
    model.at(Duration::from_secs(5), NOW_US);
    same_as("nothing.txt", &text_of(&model, 80, 20));
    model.apply(Update::Away("it hung up\x1b[2J".into()));
    model.at(Duration::from_secs(17), NOW_US);
    model.apply(Update::Away("nobody listens".into()));
    let text = text_of(&model, 80, 20);
    assert!(text.starts_with("finetuned   away for 12 s: nobody listens; looked for each second"), "{text}");
    model.apply(Update::Daemon(dictionary([("State", "idle".into())])));
    assert!(text_of(&model, 80, 20).starts_with("finetuned   ● idle"));
}

#[test]
fn colours_are_there_only_where_they_are_wanted() {
    let colours = |model: &Model| {
        let mut terminal = Terminal::new(TestBackend::new(120, 40)).unwrap();
        terminal.draw(|frame| draw(frame, model)).unwrap();
        let cells = terminal.backend().buffer().content.clone();
        cells.iter().filter(|cell| (cell.fg, cell.bg) != (Color::Reset, Color::Reset)).count()
    };
    let mut model = model();
    assert!(colours(&model) > 100);
    model.look.colours = false;
    assert_eq!(colours(&model), 0);
}

#[test]
fn the_device_comes_to_the_runs_in_the_order_of_the_page() {
    let mut model = model();
    let ids = |model: &Model| model.data().runs.iter().map(|run| run.id[..2].to_string()).collect::<String>();
    assert_eq!(ids(&model), "3fccbbaa");
    let path = zbus::OwnedObjectPath::try_from("/org/finetuned/Finetuned1/Run/bb0000000001").unwrap();
    model.apply(Update::Daemon(dictionary([("ActiveRun", path.into())])));
    assert_eq!((ids(&model).as_str(), model.selected().unwrap().id.as_str()), ("bb3fccaa", "bb0000000001"));
    model.apply(Update::Run("cc0000000001".into(), dictionary([("State", "failed".into())])));
    assert_eq!(model.data().unfinished, 2);
}

#[test]
fn keys_choose_and_steer() {
    let mut model = model();
    let chosen = |model: &Model| model.selected().unwrap().id[..2].to_string();
    assert_eq!(model.key(Key::Down), None);
    assert_eq!(chosen(&model), "cc");
    model.key(Key::Last);
    model.key(Key::Down);
    assert_eq!(chosen(&model), "aa");
    model.key(Key::First);
    model.key(Key::Up);
    assert_eq!(chosen(&model), "3f");
    let id = || "3f2a91c04d7e".to_string();
    assert_eq!(model.key(Key::Char('p')), Some(Action::Order(Order::Pause, id())));
    assert_eq!(model.key(Key::Char('r')), Some(Action::Order(Order::Resume, id())));
    // Cancelling asks first, and only y is yes.
    assert_eq!(model.key(Key::Char('c')), None);
    assert!(text_of(&model, 80, 24).contains("Cancel night (3f2a91c04d7e) for good?"));
    assert_eq!(model.key(Key::Quit), None);
    assert!(text_of(&model, 80, 24).contains("was not cancelled"));
    model.key(Key::Char('c'));
    assert_eq!(model.key(Key::Char('y')), Some(Action::Order(Order::Cancel, id())));
    assert_eq!(model.over, Over::Nothing);
    model.key(Key::Char('?'));
    assert!(text_of(&model, 80, 24).contains("Keys"));
    assert_eq!(model.key(Key::Char('p')), None, "it closes the help");
    assert_eq!(model.key(Key::Quit), Some(Action::Quit));
}

#[test]
fn a_run_that_is_gone_is_not_steered() {
    let mut model = Model::new(Look::default(), TimeZone::UTC);
    for key in [Key::Char('p'), Key::Char('c'), Key::Down, Key::Char('y')] {
        assert_eq!(model.key(key), None, "{key:?}");
    }
}

#[test]
fn a_frozen_page_stands_still() {
    let mut model = model();
    model.key(Key::Char(' '));
    let before = text_of(&model, 120, 40);
    model.at(Duration::from_secs(90), NOW_US + 30_000_000);
    model.apply(Update::Runs(Vec::new()));
    model.apply(Update::Machine(Box::default()));
    assert_eq!(text_of(&model, 120, 40), before);
    assert!(before.contains(" frozen "));
    model.key(Key::Char(' '));
    assert!(model.data().runs.is_empty());
}

#[test]
fn the_curve_begins_anew_with_another_file() {
    let mut model = model();
    let (run, record) = ("3f2a91c04d7e".to_string(), json!({"step": 41, "loss": 2.0}));
    model.apply(Update::Metrics(run.clone(), vec![record.clone()], false));
    assert_eq!(model.data().curve.train.points().len(), 47);
    model.apply(Update::Metrics(run.clone(), vec![record], true));
    assert_eq!(model.data().curve.train.points(), [(41.0, 2.0)]);
    model.apply(Update::NoMetrics(run, "its loss is shown to its owner only".into()));
    assert!(text_of(&model, 80, 24).contains("no curve: its loss is shown to its owner only"));
}

#[test]
fn readings_of_the_bus() {
    let zones = vec![("tj-thermal".to_string(), "junction".to_string(), 84.5, f64::NAN)];
    let readings = dictionary([
        ("ZoneDetails", zones.into()),
        ("RailDetails", vec![("VDD".to_string(), f64::NAN, true)].into()),
        ("GpuClock", 5u64.into()),
        ("ExternalPower", false.into()),
        ("Notes", vec!["warm".to_string()].into()),
        ("FanDuty", "loud".into()),
    ]);
    let machine = Machine::new(&dictionary([("Duty", 0.5.into()), ("Power", f64::NAN.into())]), &readings);
    let zone = Zone { name: "tj-thermal".into(), junction: true, now: Some(84.5), set: None };
    assert_eq!(machine.zones, [zone]);
    assert_eq!(machine.rails, [Rail { name: "VDD".into(), watts: None, counted: true }]);
    let rest = (machine.gpu_clock, machine.external_power, machine.duty, machine.power, machine.fan);
    assert_eq!(rest, (Some(5), Some(false), Some(0.5), None, None));
    assert_eq!(machine.notes, ["warm"]);
}

#[test]
fn a_page_needs_a_size_and_a_locale() {
    let none = |_: &str| None;
    assert_eq!((size(None, none), size(Some((80, 25)), none)), ((100, 30), (80, 25)));
    assert_eq!(size(Some((0, 0)), |_| Some("40".into())), (40, 40));
    assert_eq!(size(None, |_| Some("60000".into())), (1000, 1000));
    let locale =
        |name: &'static str, value: &'static str| move |of: &str| (of == name).then(|| value.to_string());
    assert!(utf8(locale("LANG", "de_DE.UTF-8")) && utf8(locale("LC_ALL", "C.utf8")));
    assert!(!utf8(none) && !utf8(locale("LC_CTYPE", "POSIX")));
    assert_eq!(interval_of("0.5"), Ok(Duration::from_millis(500)));
    assert!(interval_of("0").is_err() && interval_of("NaN").is_err() && interval_of("soon").is_err());
}

#[tokio::test]
async fn the_page_once() {
    let bench = Bench::new(World {
        runs: vec![night()],
        active: Some("3f2a91c04d7e".into()),
        state: "active",
        metrics: "{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"loss\":1.5}\n".into(),
        ..World::default()
    })
    .await;
    let ran = bench.run(&["top", "--once"]).await;
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    for part in ["finetuned 0.1.0", "night (3f2a91c04d7e)", "38 %", "loss 1.2345", "12.3 Wh"] {
        assert!(ran.out.contains(part), "no {part:?} in\n{}", ran.out);
    }
    assert_eq!(bench.shared.world().calls, ["OpenMetrics 3f2a91c04d7e"]);
    let ran = bench.run(&["top", "--json"]).await;
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("finetunectl status --json"), "{}", ran.err);
}

prop_compose! {
    fn any_run()(
        id in "[0-9a-f]{0,12}|\\PC{0,4}",
        name in any::<String>(),
        state in prop_oneof!["running", "waiting", "queued", "succeeded", "failed", any::<String>()],
        reason in prop_oneof!["", "thermal", any::<String>()],
        numbers in any::<[f64; 5]>(),
        (step, total, left, priority) in any::<(u64, Option<u64>, Option<u64>, i32)>(),
    ) -> Figures {
        let [epoch, loss, speed, progress, energy] = numbers;
        Figures {
            id, name, state, reason, step, priority, epoch, progress,
            total_steps: total,
            remaining_seconds: left,
            loss: Some(loss),
            eval_loss: Some(loss),
            tokens_per_second: Some(speed),
            energy_j: Some(energy),
            joules_per_token: Some(energy),
            memory_bytes: step,
            finished_us: total,
            ..Figures::default()
        }
    }
}

prop_compose! {
    fn any_machine()(
        texts in any::<[String; 5]>(),
        numbers in any::<[Option<f64>; 8]>(),
        (now, set) in any::<(f64, f64)>(),
        zones in prop::collection::vec((any::<String>(), any::<Option<f64>>(), any::<Option<f64>>()), 0..30),
        rails in prop::collection::vec((any::<String>(), any::<Option<f64>>(), any::<bool>()), 0..30),
        (clock, memory) in any::<(Option<u64>, Option<u64>)>(),
        alarms in any::<Option<[f64; 3]>>(),
        notes in prop::collection::vec(any::<String>(), 0..5),
    ) -> Machine {
        let [board, mode, level, reason, _] = texts;
        let [duty, power, limit, idle, night, quota, fan, load] = numbers;
        Machine {
            board, mode, level, reason, duty, power, idle, night, quota, fan, load, memory, alarms, notes,
            power_limit: limit,
            temperature: Some((now, set)),
            gpu_clock: clock,
            gpu_clock_limit: clock,
            zones: zones.into_iter().map(|(name, now, set)| Zone { name, junction: false, now, set }).collect(),
            rails: rails.into_iter().map(|(name, watts, counted)| Rail { name, watts, counted }).collect(),
            ..Machine::default()
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn nothing_that_is_said_breaks_the_page(
        (width, height) in (0u16..220, 0u16..70),
        runs in prop::collection::vec(any_run(), 0..40),
        machines in prop::collection::vec(any_machine(), 0..4),
        losses in prop::collection::vec((any::<f64>(), any::<f64>()), 0..60),
        words in any::<[String; 4]>(),
        keys in "[ ?cpkjG]{0,6}",
        ascii in any::<bool>(),
    ) {
        let mut model = Model::new(Look { colours: true, ascii }, TimeZone::UTC);
        let first = runs.first().map(|run| run.id.clone()).unwrap_or_default();
        let [version, state, who, why] = words;
        model.apply(Update::Daemon(dictionary([("Version", version.into()), ("State", state.into())])));
        model.apply(Update::Holds(vec![(who, why.clone())]));
        model.apply(Update::Runs(runs));
        for (second, machine) in machines.into_iter().enumerate() {
            model.at(Duration::from_secs(second as u64), u64::MAX);
            model.apply(Update::Machine(Box::new(machine)));
        }
        let records = losses.iter().map(|(step, loss)| json!({"step": step, "loss": loss, "eval_loss": loss}));
        model.apply(Update::Metrics(first, records.collect(), true));
        for key in keys.chars() {
            model.key(Key::Char(key));
            let text = text_of(&model, width, height);
            let hostile = text.chars().find(|c| *c != '\n' && crate::ctl::text::hostile(*c));
            prop_assert!(hostile.is_none(), "{hostile:?} in {text:?}");
            prop_assert!(!ascii || text.is_ascii(), "{text:?}");
        }
        model.apply(Update::Away(why));
        text_of(&model, width, height);
    }
}

#[test]
fn a_queue_of_ten_thousand_is_drawn_in_time() {
    let mut model = model();
    let runs = (0..10_000).map(|i| run(&format!("{i:012x}"), "queued", "", i % 7)).collect();
    model.apply(Update::Runs(runs));
    model.key(Key::Last);
    let began = std::time::Instant::now();
    let text = text_of(&model, 120, 40);
    assert!(text.contains("Queue: 10000 runs") && text.contains('▶'), "{text}");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}
