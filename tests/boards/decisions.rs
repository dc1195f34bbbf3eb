//! What the governor decides when single files are damaged: never a panic, never a wait, never more than with the file as
//! it was; and nothing at all, within three seconds, when a temperature is missing that it needs.

use crate::arbitrary::{check, files};
use crate::tree::Tree;
use finetuned::config::budget::{Budget, Conditions, Window};
use finetuned::governor::control::{State, step};
use finetuned::governor::sensors::Sensors;
use finetuned::governor::sensors::files::Fault;
use finetuned::reason::Reason;
use finetuned::scheduler::conditions::{Holds, Own, Schedule};
use finetuned::units::{Bytes, Celsius, Watts};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::Errno;
use std::path::Path;
use std::time::{Duration, Instant};

/// What becomes of a file.
#[derive(Clone, Debug)]
enum Damage {
    Content(Vec<u8>),
    Missing,
    Directory,
    /// Nobody writes into it: who opens or reads it as a file waits for ever.
    Fifo,
    /// A link to itself.
    Loop,
    /// What a plain file cannot do.
    Fault(Fault),
}

impl Damage {
    /// How a kernel shows a sensor that is switched off.
    fn is_absence(&self) -> bool {
        match self {
            // A text ends at its first NUL.
            Damage::Content(content) => {
                content.split(|byte| *byte == 0).next().is_none_or(|text| text.trim_ascii().is_empty())
            }
            Damage::Fault(fault) => matches!(fault, Fault::Offline),
            _ => false,
        }
    }
}

fn damages() -> Vec<Damage> {
    let texts = [
        "",
        "\n",
        "NaN",
        "-inf",
        "--5",
        "1e99",
        "52 000",
        "0x1000",
        "\u{feff}52000",
        "٥٢٠٠٠",
        "99999999999999999999",
        "-9223372036854775808",
        "9223372036854775807",
        "\u{0}52000",
    ];
    let mut all: Vec<Damage> = texts.iter().map(|text| Damage::Content(text.as_bytes().to_vec())).collect();
    all.push(Damage::Content(vec![0xff; 16]));
    all.push(Damage::Content(vec![b'9'; 100_000]));
    all.extend([Damage::Missing, Damage::Directory, Damage::Fifo, Damage::Loop]);
    all.extend([Fault::Denied, Fault::Failed(Errno::IO), Fault::Offline].map(Damage::Fault));
    all
}

/// A damaged file; whole again when it goes.
struct Damaged<'a> {
    tree: &'a Tree,
    path: &'a str,
    whole: Vec<u8>,
}

impl<'a> Damaged<'a> {
    fn new(tree: &'a Tree, path: &'a str, damage: &Damage) -> Damaged<'a> {
        let file = tree.path(path);
        let whole = std::fs::read(&file).unwrap();
        match damage {
            Damage::Content(content) => std::fs::write(&file, content).unwrap(),
            Damage::Fault(fault) => tree.fail(path, fault.clone()),
            other => {
                std::fs::remove_file(&file).unwrap();
                match other {
                    Damage::Directory => std::fs::create_dir(&file).unwrap(),
                    Damage::Fifo => mknodat(CWD, &file, FileType::Fifo, Mode::RWXU, 0).unwrap(),
                    Damage::Loop => std::os::unix::fs::symlink(&file, &file).unwrap(),
                    _ => {}
                }
            }
        }
        Damaged { tree, path, whole }
    }
}

impl Drop for Damaged<'_> {
    fn drop(&mut self) {
        let file = self.tree.path(self.path);
        self.tree.heal(self.path);
        if file.is_dir() {
            std::fs::remove_dir(&file).unwrap();
        } else {
            let _ = std::fs::remove_file(&file);
        }
        std::fs::write(&file, &self.whole).unwrap();
    }
}

/// A machine at work, and under which rules.
struct Bench {
    tree: Tree,
    budget: Budget,
    conditions: Conditions,
    /// Zones' files with what they hold.
    zones: Vec<(String, i64)>,
    /// After some time of work.
    warm: (State, Holds, Duration),
}

impl Bench {
    fn new(tree: Tree, budget: Budget, conditions: Conditions) -> Bench {
        // Nobody waits for memory.
        tree.write("proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n");
        let zone =
            |path: &String| path.starts_with("sys/class/thermal/thermal_zone") && path.ends_with("/temp");
        let zones = paths(&tree).into_iter().filter(zone);
        let held = |path: String| {
            let value = std::fs::read_to_string(tree.path(&path)).unwrap().trim().parse().ok()?;
            Some((path, value))
        };
        let zones = zones.filter_map(held).collect();
        let mut bench = Bench { tree, budget, conditions, zones, warm: Default::default() };
        let start = Duration::from_secs(100);
        let mut state = (State::default(), Holds::default());
        bench.tree.clock.set(start);
        let mut sensors = bench.tree.sensors();
        for round in 0..160 {
            bench.round(&mut sensors, &mut state, round, "", Duration::from_millis(500));
        }
        bench.warm = (state.0, state.1, start + Duration::from_secs(80));
        bench
    }

    /// One round: what may be computed, and why not more.
    fn round(
        &self,
        sensors: &mut Sensors,
        state: &mut (State, Holds),
        round: usize,
        damaged: &str,
        every: Duration,
    ) -> (f64, Option<Reason>) {
        use finetuned::clock::Clock;
        // Temperatures that move a little, as they do.
        for (n, (path, value)) in self.zones.iter().enumerate().filter(|(_, (path, _))| path != damaged) {
            let offset = [0, 31, -31, 62, -62][(round + n) % 5];
            std::fs::write(self.tree.path(path), format!("{}\n", value + offset)).unwrap();
        }
        self.tree.clock.advance(every);
        let began = Instant::now();
        let readings = sensors.read();
        assert!(began.elapsed() < Duration::from_secs(5), "reading {damaged} waits");
        check(&readings);
        let now = self.tree.clock.monotonic();
        let schedule = Schedule::new(&Window::default()).unwrap();
        let noon = "2026-11-25T12:00[UTC]".parse().unwrap();
        let (next, decision) = step(&state.0, &readings, &self.budget, now);
        let own = Own::default();
        let (holds, hold) = state.1.step(&self.conditions, &schedule, &readings, own, &noon, now);
        *state = (next, holds);
        if hold.is_some() { (0.0, hold) } else { (decision.duty, decision.reason) }
    }

    /// The duty of each round after a file was damaged in the middle of the work.
    fn meanwhile(&self, damage: Option<(&str, &Damage)>, rounds: usize, every: Duration) -> Vec<f64> {
        let (state, holds, at) = self.warm.clone();
        let mut state = (state, holds);
        self.tree.clock.set(at);
        let mut sensors = self.tree.sensors();
        let path = damage.map_or("", |(path, _)| path);
        self.round(&mut sensors, &mut state, 0, path, every);
        let _damaged = damage.map(|(path, damage)| Damaged::new(&self.tree, path, damage));
        (1..=rounds).map(|n| self.round(&mut sensors, &mut state, n, path, every).0).collect()
    }

    /// The duty of each round of a daemon that starts with a damaged file.
    fn beginning(&self, path: &str, damage: &Damage, rounds: usize) -> Vec<f64> {
        let _damaged = Damaged::new(&self.tree, path, damage);
        self.tree.clock.set(Duration::from_secs(100));
        let mut sensors = self.tree.sensors();
        let mut state = Default::default();
        let every = Duration::from_millis(500);
        (0..rounds).map(|n| self.round(&mut sensors, &mut state, n, path, every).0).collect()
    }
}

/// Every regular file of a tree, as the sensors name it.
fn paths(tree: &Tree) -> Vec<String> {
    let relative = |path: &Path| path.strip_prefix(tree.root()).unwrap().to_str().unwrap().to_string();
    files(tree.root()).iter().map(|path| relative(path)).collect()
}

/// A board, and the files of the temperatures that it cannot do without.
type Board = (fn() -> Tree, &'static [&'static str]);
const BOARDS: [Board; 4] = [
    (Tree::agx_orin_jp6, &["0", "1", "8"]),
    (Tree::agx_orin_jp5, &["0", "1", "8"]),
    // Without tj its place is taken by the chip's parts.
    (Tree::orin_nx, &["0", "1"]),
    (Tree::pc, &["1"]),
];

#[test]
fn no_file_makes_it_train_more_and_a_needed_temperature_stops_it_within_three_seconds() {
    std::thread::scope(|scope| {
        for (tree, needed) in BOARDS {
            scope.spawn(move || {
                let bench = Bench::new(tree(), Budget::default(), Conditions::default());
                let half = Duration::from_millis(500);
                let whole = bench.meanwhile(None, 7, half);
                assert!(whole.iter().all(|duty| *duty > 0.9), "{whole:?}");
                let needed: Vec<String> =
                    needed.iter().map(|n| format!("sys/class/thermal/thermal_zone{n}/temp")).collect();
                let mut cases = 0;
                for (n, path) in paths(&bench.tree).into_iter().enumerate() {
                    // All kinds where a temperature is needed, elsewhere a quarter of them, others for every file.
                    let (first, every) = if needed.contains(&path) { (0, 1) } else { (n % 4, 4) };
                    for damage in damages().into_iter().skip(first).step_by(every) {
                        let duties = bench.meanwhile(Some((&path, &damage)), 7, half);
                        let more = duties.iter().zip(&whole).any(|(duty, whole)| *duty > whole + 0.01);
                        assert!(!more, "{path} {damage:?}: {duties:?} for {whole:?}");
                        if needed.contains(&path) {
                            assert_eq!(duties.last(), Some(&0.0), "{path} {damage:?}: {duties:?}");
                            let fresh = bench.beginning(&path, &damage, 8);
                            let stops = fresh.last() == Some(&0.0);
                            // Empty from the start is how a board says that it has no such sensor: another stands in.
                            assert!(
                                stops || damage.is_absence(),
                                "{path} {damage:?} at the start: {fresh:?}"
                            );
                        }
                        cases += 1;
                    }
                }
                println!("{} files, {cases} cases", paths(&bench.tree).len());
            });
        }
    });
}

#[test]
fn no_damage_ends_a_hold() {
    let hot = Budget {
        temperature: Celsius(40.0),
        temperature_stop: Celsius(43.0),
        temperature_resume: Celsius(35.0),
        ..Budget::default()
    };
    let hungry = Budget { power: Some(Watts(2.0)), ..Budget::default() };
    let crowded = Budget { memory_floor: Bytes(60_000_000 << 10), ..Budget::default() };
    let unplugged = Conditions { external_power: true, ..Conditions::default() };
    let low = Conditions { minimum_battery: 0.95, ..Conditions::default() };
    let busy = Conditions { maximum_load: Some(0.1), ..Conditions::default() };
    let none = Conditions::default;
    type Case = (fn() -> Tree, Budget, Conditions);
    let cases: [Case; 6] = [
        (Tree::agx_orin_jp6, hot, none()),
        (Tree::agx_orin_jp6, hungry, none()),
        (Tree::pc, crowded, none()),
        (Tree::pc, Budget::default(), unplugged),
        (Tree::pc, Budget::default(), low),
        (Tree::pc, Budget::default(), busy),
    ];
    std::thread::scope(|scope| {
        for (tree, budget, conditions) in cases {
            scope.spawn(move || {
                let tree = tree();
                if conditions.external_power {
                    tree.write("sys/class/power_supply/AC/online", "0\n");
                }
                let bench = Bench::new(tree, budget, conditions);
                let second = Duration::from_secs(1);
                assert!(bench.meanwhile(None, 45, second).iter().all(|duty| *duty == 0.0), "it is held");
                for (n, path) in paths(&bench.tree).iter().enumerate() {
                    // One of each kind, another for every file.
                    for damage in damages().iter().skip(n % 7).step_by(7) {
                        let duties = bench.meanwhile(Some((path, damage)), 45, second);
                        let trains = duties.iter().position(|duty| *duty > 0.0);
                        assert_eq!(trains, None, "{path} {damage:?}: it trains after so many seconds");
                    }
                }
            });
        }
    });
}

#[test]
fn an_adapter_that_cannot_be_read_is_no_power_beside_a_battery_that_discharges() {
    let conditions = Conditions { external_power: true, ..Conditions::default() };
    let tree = Tree::pc();
    tree.write("sys/class/power_supply/AC/online", "0\n");
    let bench = Bench::new(tree, Budget::default(), conditions);
    for path in ["sys/class/power_supply/AC/online", "sys/class/power_supply/AC/type"] {
        for damage in damages() {
            let duties = bench.beginning(path, &damage, 20);
            assert!(duties.iter().all(|duty| *duty == 0.0), "{path} {damage:?}: {duties:?}");
        }
    }
}
