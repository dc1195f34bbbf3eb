//! What the page shows, and what keys and the bus change in it. No I/O: the feed sends [`Update`]s, the screen sends
//! [`Key`]s, and `draw` draws it.
//!
//! ```text
//!          space                                  c                        y
//!   live ◄───────► frozen              browsing ────► asked ─────────────────► Action::Order(Cancel)
//!   (updates go on behind it)             │  ▲          │ any other key
//!                                         │  └──────────┘
//!                                         └── ? ──► help ── any key ──► browsing
//! ```

use super::series::Series;
use crate::bus::Dictionary;
use crate::ctl::figures::{Figures, some, text_of};
use crate::ctl::steer::Order;
use crate::ctl::text;
use jiff::tz::TimeZone;
use serde_json::Value;
use std::time::Duration;
use zbus::OwnedVariant;

/// Runs that are over and shown.
const OVER: usize = 5;

/// Steps and losses beyond this are nonsense, and would leave nothing to see of the rest.
const LARGEST: f64 = 1e9;

/// How long a message stays.
const MESSAGE: Duration = Duration::from_secs(8);

/// A thermal zone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Zone {
    /// Type as the kernel names it.
    pub name: String,
    /// It stands for the whole chip.
    pub junction: bool,
    /// °C.
    pub now: Option<f64>,
    /// What is held in it, °C.
    pub set: Option<f64>,
}

/// A power rail.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rail {
    /// Label.
    pub name: String,
    /// Power.
    pub watts: Option<f64>,
    /// The limit of power counts it.
    pub counted: bool,
}

/// What the governor says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Machine {
    /// Board, power mode, level and reason, as the bus has them.
    pub board: String,
    pub mode: String,
    pub level: String,
    pub reason: String,
    /// Share of the time, 0 to 1.
    pub duty: Option<f64>,
    /// There is no thermal zone.
    pub blind: bool,
    /// The temperature that is nearest to its set-point, and the set-point, °C.
    pub temperature: Option<(f64, f64)>,
    /// Watts.
    pub power: Option<f64>,
    pub power_limit: Option<f64>,
    pub idle: Option<f64>,
    /// Watt-hours.
    pub night: Option<f64>,
    pub quota: Option<f64>,
    pub zones: Vec<Zone>,
    pub rails: Vec<Rail>,
    /// 0 to 1.
    pub gpu_load: Option<f64>,
    /// Hertz.
    pub gpu_clock: Option<u64>,
    pub gpu_clock_limit: Option<u64>,
    pub memory_clock_cap: Option<u64>,
    /// 0 to 1.
    pub fan: Option<f64>,
    /// Bytes.
    pub memory: Option<u64>,
    /// 0 to 1.
    pub memory_pressure: Option<f64>,
    /// Per core.
    pub load: Option<f64>,
    pub external_power: Option<bool>,
    /// 0 to 1.
    pub battery: Option<f64>,
    pub throttled: bool,
    /// Under-voltage, average and instantaneous over-current, events per second.
    pub alarms: Option<[f64; 3]>,
    /// What a person should know.
    pub notes: Vec<String>,
}

fn number(dictionary: &Dictionary, key: &str) -> Option<f64> {
    dictionary.get(key).and_then(|value| f64::try_from(value).ok()).filter(|number| number.is_finite())
}

fn count(dictionary: &Dictionary, key: &str) -> Option<u64> {
    dictionary.get(key).and_then(|value| u64::try_from(value).ok())
}

fn truth(dictionary: &Dictionary, key: &str) -> Option<bool> {
    dictionary.get(key).and_then(|value| bool::try_from(value).ok())
}

fn list<T>(dictionary: &Dictionary, key: &str) -> Vec<T>
where
    Vec<T>: TryFrom<OwnedVariant>,
{
    let value = dictionary.get(key).and_then(|value| value.try_clone().ok());
    value.and_then(|value| Vec::try_from(value).ok()).unwrap_or_default()
}

impl Machine {
    /// From the governor's properties and readings. A daemon that tells less leaves more open.
    pub fn new(properties: &Dictionary, readings: &Dictionary) -> Machine {
        let finite = |value: f64| value.is_finite().then_some(value);
        let zone = |(name, role, now, set): (String, String, f64, f64)| Zone {
            junction: role == "junction",
            name,
            now: finite(now),
            set: finite(set),
        };
        let rail = |(name, watts, counted): (String, f64, bool)| Rail { name, watts: finite(watts), counted };
        let rates = ["UnderVoltageRate", "OverCurrentRate", "InstantOverCurrentRate"]
            .map(|key| number(readings, key));
        Machine {
            board: text_of(properties, "Board"),
            mode: text_of(properties, "Mode"),
            level: text_of(properties, "Level"),
            reason: text_of(properties, "Reason"),
            duty: number(properties, "Duty"),
            blind: truth(properties, "Blind").unwrap_or(false),
            temperature: number(properties, "Temperature").zip(number(properties, "TemperatureLimit")),
            power: number(properties, "Power"),
            power_limit: number(readings, "PowerLimit"),
            idle: number(readings, "IdlePower"),
            night: number(properties, "NightEnergy"),
            quota: number(properties, "NightQuota"),
            zones: list(readings, "ZoneDetails").into_iter().map(zone).collect(),
            rails: list(readings, "RailDetails").into_iter().map(rail).collect(),
            gpu_load: number(readings, "GpuLoad"),
            gpu_clock: count(readings, "GpuClock"),
            gpu_clock_limit: count(readings, "GpuClockLimit"),
            memory_clock_cap: count(readings, "MemoryClockCap"),
            fan: number(readings, "FanDuty"),
            memory: count(readings, "AvailableMemory"),
            memory_pressure: number(readings, "MemoryPressure"),
            load: number(readings, "Load"),
            external_power: truth(readings, "ExternalPower"),
            battery: number(readings, "Battery"),
            throttled: truth(readings, "Throttled").unwrap_or(false),
            alarms: match rates {
                [Some(a), Some(b), Some(c)] => Some([a, b, c]),
                _ => None,
            },
            notes: list(readings, "Notes"),
        }
    }
}

/// The curve of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// The run.
    pub run: String,
    /// Training loss over steps.
    pub train: Series,
    /// Held-out loss over steps.
    pub eval: Series,
    /// Why there is none.
    pub refused: Option<String>,
}

/// Everything that comes from the daemon.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Data {
    /// Since when the daemon is away, and why.
    pub away: Option<(Duration, String)>,
    /// Version, state, reason and device of the daemon.
    pub version: String,
    pub state: String,
    pub reason: String,
    pub device: String,
    /// The run that has the device.
    pub active: String,
    /// Those that are shown, in their order.
    pub runs: Vec<Figures>,
    /// Runs that are not over.
    pub unfinished: usize,
    /// Who holds all training, and why.
    pub holds: Vec<(String, String)>,
    /// The governor; absent before its first word.
    pub machine: Option<Machine>,
    /// Temperature and power since the page was opened, over seconds.
    pub temperatures: Series,
    pub powers: Series,
    /// Loss of the selected run.
    pub curve: Curve,
    /// Microseconds since 1970.
    pub now_us: u64,
    /// The same on the clock that does not jump.
    pub now: Duration,
}

/// How it looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// With colours.
    pub colours: bool,
    /// Without characters beyond ASCII.
    pub ascii: bool,
}

/// What lies over the page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Over {
    /// Nothing.
    #[default]
    Nothing,
    /// The keys.
    Help,
    /// A question: whether to cancel this run.
    Cancel {
        /// Id.
        id: String,
        /// Name and id, printable.
        title: String,
    },
}

/// The page.
#[derive(Clone, Debug, Default)]
pub struct Model {
    live: Data,
    frozen: Option<Box<Data>>,
    /// Every run that is there, as the bus listed it.
    all: Vec<Figures>,
    /// The run that a person chose; else the active one is shown.
    chosen: Option<String>,
    /// What lies over the page.
    pub over: Over,
    /// Something to tell, and until when.
    message: Option<(String, Duration)>,
    /// How it looks.
    pub look: Look,
    /// Of the clock; UTC where there is none.
    pub zone: Option<TimeZone>,
}

/// News from the daemon.
#[derive(Debug)]
pub enum Update {
    /// It is there. Every property of the manager.
    Daemon(Dictionary),
    /// It is away, in words.
    Away(String),
    /// Every run.
    Runs(Vec<Figures>),
    /// Properties of a run that have changed.
    Run(String, Dictionary),
    /// Holds in force: who, and why.
    Holds(Vec<(String, String)>),
    /// What the governor says.
    Machine(Box<Machine>),
    /// Records of a run's metrics that are new; `true`: all of them, from the first on.
    Metrics(String, Vec<Value>, bool),
    /// A run's metrics cannot be had, in words.
    NoMetrics(String, String),
    /// What became of an order, in words.
    Told(String),
}

/// A key, as far as it means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    Up,
    Down,
    First,
    Last,
    /// Esc, q, Ctrl-C.
    Quit,
    /// Ctrl-Z.
    Suspend,
    Char(char),
}

/// What is to be done outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// End.
    Quit,
    /// Give the terminal back until the shell continues it.
    Suspend,
    /// Have the daemon do something to the run with this id.
    Order(Order, String),
}

impl Model {
    /// An empty page.
    pub fn new(look: Look, zone: TimeZone) -> Model {
        Model { look, zone: Some(zone), ..Model::default() }
    }

    /// What is shown: what is, or what was when it was frozen.
    pub fn data(&self) -> &Data {
        self.frozen.as_deref().unwrap_or(&self.live)
    }

    /// Whether it stands still.
    pub fn is_frozen(&self) -> bool {
        self.frozen.is_some()
    }

    /// The time.
    pub fn at(&mut self, now: Duration, now_us: u64) {
        (self.live.now, self.live.now_us) = (now, now_us);
        self.message.take_if(|(_, until)| *until < now);
    }

    /// Something to tell.
    pub fn message(&self) -> Option<&str> {
        self.message.as_ref().map(|(message, _)| message.as_str())
    }

    /// The run that is shown large.
    pub fn selected(&self) -> Option<&Figures> {
        let data = self.data();
        let by_id = |id: &str| data.runs.iter().find(|run| run.id == id);
        self.chosen.as_deref().and_then(by_id).or_else(|| by_id(&data.active)).or_else(|| data.runs.first())
    }

    /// Takes in news.
    pub fn apply(&mut self, update: Update) {
        match update {
            Update::Daemon(properties) => self.apply_daemon(&properties),
            Update::Away(why) => {
                let since = self.live.away.take().map_or(self.live.now, |(since, _)| since);
                self.live.away = Some((since, why));
            }
            Update::Runs(runs) => {
                self.all = runs;
                self.arrange();
            }
            Update::Run(id, changed) => {
                if let Some(run) = self.all.iter_mut().find(|run| run.id == id) {
                    run.apply(&changed);
                    self.arrange();
                }
            }
            Update::Holds(holds) => self.live.holds = holds,
            Update::Machine(machine) => {
                let seconds = self.live.now.as_secs_f64();
                if let Some((now, _)) = machine.temperature {
                    self.live.temperatures.push(seconds, now);
                }
                if let Some(power) = machine.power {
                    self.live.powers.push(seconds, power);
                }
                self.live.machine = Some(*machine);
            }
            Update::Metrics(run, records, anew) => {
                let curve = &mut self.live.curve;
                if anew || curve.run != run {
                    *curve = Curve { run, ..Curve::default() };
                }
                records.iter().for_each(|record| curve.take(record));
            }
            Update::NoMetrics(run, why) => {
                self.live.curve = Curve { run, refused: Some(why), ..Curve::default() };
            }
            Update::Told(message) => self.tell(message),
        }
    }

    fn apply_daemon(&mut self, properties: &Dictionary) {
        let data = &mut self.live;
        data.away = None;
        for (key, field) in [
            ("Version", &mut data.version),
            ("State", &mut data.state),
            ("Reason", &mut data.reason),
            ("Device", &mut data.device),
        ] {
            if properties.contains_key(key) {
                *field = text_of(properties, key);
            }
        }
        if let Some(path) = properties.get("ActiveRun").and_then(|path| path.try_clone().ok()) {
            let path = zbus::OwnedObjectPath::try_from(path).unwrap_or_default();
            data.active = path.as_str().rsplit('/').next().unwrap_or_default().to_string();
            self.arrange();
        }
    }

    /// Those that are not over, as the device comes to them; then the last ones that are over.
    fn arrange(&mut self) {
        let active = &self.live.active;
        let (mut over, mut open): (Vec<&Figures>, Vec<&Figures>) =
            self.all.iter().partition(|run| run.is_over());
        let rank = |run: &Figures| match run.state.as_str() {
            _ if run.id == *active => 0,
            "running" | "preparing" | "saving" => 1,
            "queued" | "waiting" => 2,
            _ => 3,
        };
        open.sort_by_key(|run| (rank(run), -i64::from(run.priority), run.created_us));
        over.sort_by_key(|run| std::cmp::Reverse(run.finished_us));
        over.truncate(OVER);
        self.live.unfinished = open.len();
        self.live.runs = open.into_iter().chain(over).cloned().collect();
    }

    fn tell(&mut self, message: String) {
        self.message = Some((message, self.live.now + MESSAGE));
    }

    /// Does what a key means.
    pub fn key(&mut self, key: Key) -> Option<Action> {
        match std::mem::take(&mut self.over) {
            Over::Cancel { id, title } => match key {
                Key::Char('y' | 'Y') => return Some(Action::Order(Order::Cancel, id)),
                Key::Suspend => {
                    self.over = Over::Cancel { id, title };
                    return Some(Action::Suspend);
                }
                _ => self.tell(format!("{title} was not cancelled")),
            },
            Over::Help if key != Key::Suspend => {}
            over => {
                self.over = over;
                return self.browse(key);
            }
        }
        None
    }

    fn browse(&mut self, key: Key) -> Option<Action> {
        match key {
            Key::Quit | Key::Char('q' | 'Q') => return Some(Action::Quit),
            Key::Suspend => return Some(Action::Suspend),
            Key::Up | Key::Char('k') => self.choose(|at, _| at.saturating_sub(1)),
            Key::Down | Key::Char('j') => self.choose(|at, last| (at + 1).min(last)),
            Key::First | Key::Char('g') => self.choose(|_, _| 0),
            Key::Last | Key::Char('G') => self.choose(|_, last| last),
            Key::Char(' ') => {
                self.frozen = match self.frozen.take() {
                    None => Some(Box::new(self.live.clone())),
                    Some(_) => None,
                };
            }
            Key::Char('?' | 'h') => self.over = Over::Help,
            Key::Char('p') => return self.order(Order::Pause),
            Key::Char('r') => return self.order(Order::Resume),
            Key::Char('c') => {
                let run = self.selected()?;
                self.over = Over::Cancel { id: run.id.clone(), title: run.title() };
            }
            Key::Char(_) => {}
        }
        None
    }

    fn order(&mut self, order: Order) -> Option<Action> {
        let id = self.selected()?.id.clone();
        Some(Action::Order(order, id))
    }

    fn choose(&mut self, to: impl Fn(usize, usize) -> usize) {
        let runs = &self.data().runs;
        let Some(last) = runs.len().checked_sub(1) else { return };
        let at = self.selected().and_then(|selected| runs.iter().position(|run| run.id == selected.id));
        let id = runs.get(to(at.unwrap_or(0), last)).map(|run| run.id.clone());
        self.chosen = id;
    }
}

impl Curve {
    fn take(&mut self, record: &Value) {
        let number = |key: &str| record.get(key).and_then(Value::as_f64);
        let Some(step) = number("step").filter(|step| (0.0..LARGEST).contains(step)) else { return };
        let loss = |key| number(key).filter(|loss| loss.abs() < LARGEST);
        if let Some(loss) = loss("loss") {
            self.train.push(step, loss);
        }
        if let Some(loss) = loss("eval_loss") {
            self.eval.push(step, loss);
        }
    }
}

impl Machine {
    /// `62 % of the time (thermal)`, printable.
    pub fn pace(&self) -> String {
        let duty = match self.duty {
            Some(duty) if duty < 0.01 => "nothing computes".to_string(),
            Some(duty) => format!("{:.0} % of the time", duty * 100.0),
            None => "not known".to_string(),
        };
        match some(&self.reason) {
            Some(reason) => format!("{duty} ({})", text::printable(reason)),
            None => duty,
        }
    }
}
