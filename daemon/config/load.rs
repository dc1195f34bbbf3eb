//! Finds the files of the daemon's configuration and reads them: every key's type, range and default.
//!
//! ```text
//!   defaults (of the mode, of the environment) ──► finetuned.toml ──► drop-ins, by file name ──► command line
//!                                  a later one replaces single keys of an earlier one
//! ```
//!
//! Drop-ins follow systemd's rule: those of `/etc` and of `/usr/lib` are sorted together by file name, and one in `/etc`
//! replaces the one of the same name in `/usr/lib`. A missing file is an empty one, unless it was asked for by name.
//! Mistakes are collected over all files; with one, there is no configuration.

use super::budget::{BOARDS, Board, Budget, Conditions, Window};
use super::daemon::*;
use super::document::{Document, Entry, Mistake, Place, Value, nearest};
use super::times::Hours;
use crate::units::{Celsius, Joules, Watts};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write;
use std::io;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Documents the keys.
const PAGE: &str = "docs/configuration.md";
/// Largest file.
const MAX_BYTES: usize = 1 << 20;
/// File name of the configuration; drop-ins lie in the directory of this name with `.d`.
const NAME: &str = "finetuned.toml";

/// The word for what is not limited.
const NONE: &str = "none";
/// The word for what is found out.
const AUTO: &str = "auto";
/// Largest power and energy that are taken for meant, in watts and watt-hours.
const POWERS: RangeInclusive<f64> = 1.0..=10_000.0;
const ENERGIES: RangeInclusive<f64> = 0.001..=1_000_000.0;

const LEVELS: &[(&str, &str)] =
    &[("error", "error"), ("warn", "warn"), ("info", "info"), ("debug", "debug"), ("trace", "trace")];
const METHODS: &[(&str, Authorization)] =
    &[("polkit", Authorization::Polkit), ("group", Authorization::Group), ("owner", Authorization::Owner)];
/// Units of durations, the largest first.
const DURATIONS: &[(&str, u64)] = &[("h", 3_600_000), ("min", 60_000), ("s", 1000), ("ms", 1)];
/// Units of sizes, the largest first.
const SIZES: &[(&str, u64)] =
    &[("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// What the daemon is started for; decides where its files lie when nobody says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The machine: system bus, `/etc`, `/var`.
    System,
    /// One user: session bus, or peers only; the XDG directories.
    Session,
}

/// Looks up a variable of the environment.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file or a directory of drop-ins could not be read.
    #[error("cannot read the configuration {path}: {source}", path = .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// Everything that is wrong, a line each.
    #[error("{}", .0.iter().map(Mistake::to_string).collect::<Vec<_>>().join("\n"))]
    Invalid(Vec<Mistake>),
}

impl DaemonConfig {
    /// What is in force where no file says anything. A directory that cannot be known, for want of `HOME`, is empty.
    pub fn defaults(mode: Mode, environment: Environment<'_>) -> DaemonConfig {
        let directory = |given: &str, system: &str, xdg: &str, home: &str| {
            // systemd sets these for StateDirectory= and CacheDirectory=; several are separated by colons.
            let given = environment(given).and_then(|paths| std::env::split_paths(&paths).next());
            match (given, mode) {
                (Some(path), _) if path.is_absolute() => path,
                (_, Mode::System) => PathBuf::from(system),
                (_, Mode::Session) => user_directory(environment, xdg, home).unwrap_or_default(),
            }
        };
        let models = ["/usr/share/finetuned/models", "/etc/finetuned/models"];
        DaemonConfig {
            storage: StorageConfig {
                state_directory: directory(
                    "STATE_DIRECTORY",
                    "/var/lib/finetuned",
                    "XDG_STATE_HOME",
                    ".local/state",
                ),
                cache_directory: directory(
                    "CACHE_DIRECTORY",
                    "/var/cache/finetuned",
                    "XDG_CACHE_HOME",
                    ".cache",
                ),
                model_directories: match mode {
                    Mode::System => models.map(PathBuf::from).to_vec(),
                    Mode::Session => Vec::new(),
                },
            },
            limits: LimitsConfig::default(),
            worker: WorkerConfig::default(),
            authorization: AuthorizationConfig {
                method: match mode {
                    Mode::System => Authorization::Polkit,
                    Mode::Session => Authorization::Owner,
                },
                group: "finetuned".into(),
            },
            log: LogConfig { level: "info".into() },
            budget: Budget::default(),
            window: Window::default(),
            conditions: Conditions::default(),
            board: Board::default(),
            settings_lost: None,
        }
    }

    /// Reads the configuration: of one file, or of the mode's files and drop-ins.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] has all mistakes of all files.
    pub fn load(
        file: Option<&Path>,
        mode: Mode,
        environment: Environment<'_>,
    ) -> Result<DaemonConfig, ConfigError> {
        Loaded::load(file, mode, environment).map(|loaded| loaded.config)
    }
}

/// A configuration, and where its keys come from.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// What is in force.
    pub config: DaemonConfig,
    /// Where each key stands, `section.key`, that a file gives.
    pub places: BTreeMap<String, Place>,
}

impl Loaded {
    /// As [`DaemonConfig::load`].
    ///
    /// # Errors
    /// As there.
    pub fn load(
        file: Option<&Path>,
        mode: Mode,
        environment: Environment<'_>,
    ) -> Result<Loaded, ConfigError> {
        let files = match file {
            Some(file) => vec![(file.to_path_buf(), true)],
            None => {
                let roots = match mode {
                    Mode::System => {
                        vec![PathBuf::from("/usr/lib/finetuned"), PathBuf::from("/etc/finetuned")]
                    }
                    Mode::Session => {
                        user_directory(environment, "XDG_CONFIG_HOME", ".config").into_iter().collect()
                    }
                };
                find(&roots)?
            }
        };
        let mut config = DaemonConfig::defaults(mode, environment);
        let (mut mistakes, mut places) = (Vec::new(), BTreeMap::new());
        for (path, required) in &files {
            match read(path) {
                Ok(text) => {
                    let file = path.display().to_string();
                    places.extend(config.apply(&text, &file, &mut mistakes));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound && !required => {}
                Err(source) => return Err(ConfigError::Read { path: path.clone(), source }),
            }
        }
        let all = files.first().map_or(NAME.to_string(), |(path, _)| path.display().to_string());
        config.check(&Place::Whole(all), &mut mistakes);
        if mistakes.is_empty() { Ok(Loaded { config, places }) } else { Err(ConfigError::Invalid(mistakes)) }
    }
}

impl DaemonConfig {
    /// Takes over what a file says; the keys, `section.key`, that it gives.
    fn apply(&mut self, text: &str, file: &str, mistakes: &mut Vec<Mistake>) -> Vec<(String, Place)> {
        let mut document = Document::new(text, file, PAGE, &[]);
        if let Some(errors) = document.syntax_errors() {
            mistakes.extend(errors);
            return Vec::new();
        }
        self.take(&mut document);
        let taken = document.taken().iter();
        let given = taken.map(|(section, key, place)| (format!("{section}.{key}"), place.clone())).collect();
        mistakes.extend(document.finish());
        given
    }

    /// The configuration with single keys replaced: `section.key`, its value as an override has it, and where it was
    /// given. `whole` is the place of what no single key can be blamed for.
    ///
    /// # Errors
    /// Every mistake.
    pub(super) fn with<'a>(
        &self,
        values: impl Iterator<Item = (&'a str, &'a str, Place)>,
        whole: &Place,
    ) -> Result<DaemonConfig, Vec<Mistake>> {
        let mut document = Document::new("", "", PAGE, &[]);
        for (key, value, place) in values {
            document.insert(key, value, place);
        }
        let mut config = self.clone();
        config.take(&mut document);
        let mut mistakes = document.finish();
        config.check(whole, &mut mistakes);
        if mistakes.is_empty() { Ok(config) } else { Err(mistakes) }
    }

    /// Every key, in the order of `docs/configuration.md`.
    fn take(&mut self, document: &mut Document) {
        let mut keys = Keys { document };
        let storage = &mut self.storage;
        keys.path("storage", "state_directory", &mut storage.state_directory);
        keys.path("storage", "cache_directory", &mut storage.cache_directory);
        keys.paths("storage", "model_directories", &mut storage.model_directories);
        let limits = &mut self.limits;
        keys.integer("limits", "runs_per_user", 1..=100_000, &mut limits.runs_per_user);
        keys.integer("limits", "runs", 1..=100_000, &mut limits.runs);
        keys.size("limits", "input_bytes", &mut limits.input_bytes);
        keys.size("limits", "model_bytes", &mut limits.model_bytes);
        keys.integer("limits", "inhibitors_per_sender", 1..=10_000, &mut limits.inhibitors_per_sender);
        keys.integer("limits", "inhibitors", 1..=10_000, &mut limits.inhibitors);
        keys.integer("limits", "waits_per_sender", 1..=10_000, &mut limits.waits_per_sender);
        let worker = &mut self.worker;
        keys.launch("worker", "launch", &mut worker.launch);
        keys.threads("worker", "threads", &mut worker.threads);
        keys.integer("worker", "nice", 0..=19, &mut worker.nice);
        keys.integer("worker", "oom_score_adjust", 0..=1000, &mut worker.oom_score_adjust);
        keys.integer("worker", "attempts", 1..=1000, &mut worker.attempts);
        keys.duration("worker", "backoff", 0..=86_400, &mut worker.backoff);
        keys.duration("worker", "backoff_limit", 0..=86_400, &mut worker.backoff_limit);
        keys.duration("worker", "prepare_timeout", 1..=86_400, &mut worker.prepare_timeout);
        keys.duration("worker", "step_timeout", 1..=86_400, &mut worker.step_timeout);
        keys.duration("worker", "save_timeout", 1..=86_400, &mut worker.save_timeout);
        keys.duration("worker", "keep_when_held", 0..=604_800, &mut worker.keep_when_held);
        keys.choice("authorization", "method", METHODS, &mut self.authorization.method);
        keys.group("authorization", "group", &mut self.authorization.group);
        let mut level = self.log.level.as_str();
        keys.choice("log", "level", LEVELS, &mut level);
        self.log.level = level.to_string();
        let budget = &mut self.budget;
        keys.celsius("budget", "temperature", 30.0..=94.0, &mut budget.temperature);
        keys.celsius("budget", "temperature_stop", 31.0..=Budget::STOP_LIMIT.0, &mut budget.temperature_stop);
        keys.celsius("budget", "temperature_resume", 20.0..=93.0, &mut budget.temperature_resume);
        keys.power("budget", "power", &mut budget.power);
        keys.energy("budget", "energy_per_night", &mut budget.energy_per_night);
        keys.energy("budget", "energy_per_run", &mut budget.energy_per_run);
        keys.boolean("budget", "energy_gross", &mut budget.energy_gross);
        keys.size("budget", "memory_floor", &mut budget.memory_floor.0);
        keys.share("budget", "duty_floor", 0.01..=0.9, &mut budget.duty_floor);
        let window = &mut self.window;
        keys.hours("window", "times", &mut window.times);
        keys.hours("window", "quiet", &mut window.quiet);
        keys.share("window", "quiet_fan", 0.0..=1.0, &mut window.quiet_fan);
        let conditions = &mut self.conditions;
        keys.boolean("conditions", "external_power", &mut conditions.external_power);
        keys.share("conditions", "minimum_battery", 0.0..=1.0, &mut conditions.minimum_battery);
        keys.share("conditions", "maximum_gpu_load", 0.0..=1.0, &mut conditions.maximum_gpu_load);
        keys.load("conditions", "maximum_load", &mut conditions.maximum_load);
        let board = &mut self.board;
        keys.board("board", "name", &mut board.name);
        keys.rails("board", "rails", &mut board.rails);
        keys.number("board", "power_factor", 0.1..=10.0, &mut board.power_factor);
        keys.offset("board", "power_offset", &mut board.power_offset);
        keys.interval("board", "interval", &mut board.interval);
    }

    /// What no single key can be blamed for.
    fn check(&self, whole: &Place, mistakes: &mut Vec<Mistake>) {
        let mut complain = |key: &str, problem: &str| {
            let (key, problem) = (key.to_string(), problem.to_string());
            mistakes.push(Mistake { place: whole.clone(), key, value: None, problem });
        };
        if self.worker.backoff_limit < self.worker.backoff {
            complain("worker.backoff_limit", "is shorter than worker.backoff; make it at least as long");
        }
        let Budget { temperature, temperature_stop, temperature_resume, .. } = self.budget;
        if temperature_resume >= temperature {
            complain(
                "budget.temperature_resume",
                &format!("is {temperature_resume}, not below budget.temperature, {temperature}; lower it"),
            );
        }
        if temperature >= temperature_stop {
            complain(
                "budget.temperature",
                &format!("is {temperature}, not below budget.temperature_stop, {temperature_stop}; lower it"),
            );
        }
        for (key, path) in [
            ("storage.state_directory", &self.storage.state_directory),
            ("storage.cache_directory", &self.storage.cache_directory),
        ] {
            if path.as_os_str().is_empty() {
                complain(key, "required where HOME is not set: an absolute path");
            }
        }
    }

    /// Every key with the value in force, as TOML that reads back to the same.
    pub fn to_toml(&self) -> String {
        self.to_toml_with(&|_| None)
    }

    /// The same with a remark beside some keys, `section.key`: one line of text each.
    pub fn to_toml_with(&self, remark: &dyn Fn(&str) -> Option<String>) -> String {
        let mut text = String::new();
        let mut current = "";
        for (section, key, value) in self.keys() {
            if section != current {
                let gap = if current.is_empty() { "" } else { "\n" };
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{gap}[{section}]");
                current = section;
            }
            let remark =
                remark(&format!("{section}.{key}")).map_or(String::new(), |text| format!("  # {text}"));
            let _ = writeln!(text, "{key} = {value}{remark}");
        }
        text
    }

    /// The keys, `section.key`, in which two configurations differ.
    pub fn differences(&self, other: &DaemonConfig) -> Vec<String> {
        let (a, b) = (self.keys(), other.keys());
        let differ = a.iter().zip(&b).filter(|((_, _, before), (_, _, now))| before != now);
        differ.map(|((section, key, _), _)| format!("{section}.{key}")).collect()
    }

    /// Every key: section, key, and the value as TOML.
    pub(super) fn keys(&self) -> Vec<(&'static str, &'static str, String)> {
        let DaemonConfig { storage, limits, worker, authorization, log, .. } = self;
        let DaemonConfig { budget, window, conditions, board, .. } = self;
        let strings = |texts: &[String]| {
            format!("[{}]", texts.iter().map(|text| string(text)).collect::<Vec<_>>().join(", "))
        };
        let energy = |energy: Option<Joules>| {
            energy.map_or(string(NONE), |energy| string(&format!("{}Wh", decimal(energy.watt_hours()))))
        };
        let path = |path: &Path| string(&path.to_string_lossy());
        let paths: Vec<String> = storage.model_directories.iter().map(|directory| path(directory)).collect();
        let word = METHODS.iter().find(|(_, method)| *method == authorization.method).map_or("", |(w, _)| w);
        vec![
            ("storage", "state_directory", path(&storage.state_directory)),
            ("storage", "cache_directory", path(&storage.cache_directory)),
            ("storage", "model_directories", format!("[{}]", paths.join(", "))),
            ("limits", "runs_per_user", limits.runs_per_user.to_string()),
            ("limits", "runs", limits.runs.to_string()),
            ("limits", "input_bytes", with_unit(limits.input_bytes, SIZES)),
            ("limits", "model_bytes", with_unit(limits.model_bytes, SIZES)),
            ("limits", "inhibitors_per_sender", limits.inhibitors_per_sender.to_string()),
            ("limits", "inhibitors", limits.inhibitors.to_string()),
            ("limits", "waits_per_sender", limits.waits_per_sender.to_string()),
            (
                "worker",
                "launch",
                match &worker.launch {
                    Launch::Child => string("child"),
                    Launch::Socket(socket) => string(&format!("unix:{}", socket.to_string_lossy())),
                },
            ),
            ("worker", "threads", worker.threads.map_or(string("auto"), |threads| threads.to_string())),
            ("worker", "nice", worker.nice.to_string()),
            ("worker", "oom_score_adjust", worker.oom_score_adjust.to_string()),
            ("worker", "attempts", worker.attempts.to_string()),
            ("worker", "backoff", duration(worker.backoff)),
            ("worker", "backoff_limit", duration(worker.backoff_limit)),
            ("worker", "prepare_timeout", duration(worker.prepare_timeout)),
            ("worker", "step_timeout", duration(worker.step_timeout)),
            ("worker", "save_timeout", duration(worker.save_timeout)),
            ("worker", "keep_when_held", duration(worker.keep_when_held)),
            ("authorization", "method", string(word)),
            ("authorization", "group", string(&authorization.group)),
            ("log", "level", string(&log.level)),
            ("budget", "temperature", decimal(budget.temperature.0)),
            ("budget", "temperature_stop", decimal(budget.temperature_stop.0)),
            ("budget", "temperature_resume", decimal(budget.temperature_resume.0)),
            ("budget", "power", budget.power.map_or(string(NONE), watts)),
            ("budget", "energy_per_night", energy(budget.energy_per_night)),
            ("budget", "energy_per_run", energy(budget.energy_per_run)),
            ("budget", "energy_gross", budget.energy_gross.to_string()),
            ("budget", "memory_floor", with_unit(budget.memory_floor.0, SIZES)),
            ("budget", "duty_floor", decimal(budget.duty_floor)),
            ("window", "times", strings(&window.times)),
            ("window", "quiet", strings(&window.quiet)),
            ("window", "quiet_fan", decimal(window.quiet_fan)),
            ("conditions", "external_power", conditions.external_power.to_string()),
            ("conditions", "minimum_battery", decimal(conditions.minimum_battery)),
            ("conditions", "maximum_gpu_load", decimal(conditions.maximum_gpu_load)),
            ("conditions", "maximum_load", conditions.maximum_load.map_or(string(NONE), decimal)),
            ("board", "name", string(board.name.as_deref().unwrap_or(AUTO))),
            ("board", "rails", board.rails.as_deref().map_or(string(AUTO), strings)),
            ("board", "power_factor", decimal(board.power_factor)),
            ("board", "power_offset", watts(board.power_offset)),
            ("board", "interval", duration(board.interval)),
        ]
    }
}

fn string(text: &str) -> String {
    toml::Value::String(text.to_string()).to_string()
}

fn watts(power: Watts) -> String {
    string(&format!("{}W", decimal(power.0)))
}

/// At most six decimals, and none that is zero: what was read from such a text reads back to the same.
fn decimal(value: f64) -> String {
    let text = format!("{value:.6}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// A share: a number, or a text of a percentage, within the range of the number.
fn share(value: &Value, range: &RangeInclusive<f64>) -> Option<f64> {
    match value {
        Value::String(_) => {
            let percent = quantity(value, "%", &(range.start() * 100.0..=range.end() * 100.0))?;
            Some(percent / 100.0)
        }
        number => quantity(number, "", range),
    }
}

/// A number, or a text of a number and this unit, within the range.
fn quantity(value: &Value, unit: &str, range: &RangeInclusive<f64>) -> Option<f64> {
    let number = match value {
        Value::Integer(number) => *number as f64,
        Value::Float(number) => *number,
        Value::String(text) => text.trim().strip_suffix(unit)?.trim_end().parse().ok()?,
        _ => return None,
    };
    // A NaN is in no range.
    range.contains(&number).then_some(number)
}

fn duration(duration: Duration) -> String {
    with_unit(duration.as_millis() as u64, DURATIONS)
}

/// In the largest unit that leaves no fraction.
fn with_unit(value: u64, units: &[(&str, u64)]) -> String {
    let unit = units.iter().find(|(_, factor)| value >= *factor && value.is_multiple_of(*factor));
    match unit.or(units.iter().find(|(unit, _)| ["s", "B"].contains(unit))) {
        Some((unit, factor)) => string(&format!("{}{unit}", value / factor)),
        None => value.to_string(),
    }
}

/// `1h30min`, `4 GiB`: whole numbers, each with its unit.
fn parse_units(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let mut rest = text.trim();
    let mut total = 0u64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        rest = rest[digits..].trim_start();
        let end = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let (_, factor) = units.iter().find(|(unit, _)| *unit == &rest[..end])?;
        total = total.checked_add(number.checked_mul(*factor)?)?;
        rest = rest[end..].trim_start();
    }
    Some(total)
}

fn user_directory(environment: Environment<'_>, xdg: &str, home: &str) -> Option<PathBuf> {
    // The XDG specification: a relative path is to be ignored.
    let absolute = |name: &str| environment(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(xdg).or_else(|| absolute("HOME").map(|at| at.join(home))).map(|path| path.join("finetuned"))
}

/// The files below `roots`, in the order in which they are read: main files, then all drop-ins by file name. A later
/// root's drop-in replaces one of the same name.
fn find(roots: &[PathBuf]) -> Result<Vec<(PathBuf, bool)>, ConfigError> {
    let mut files: Vec<(PathBuf, bool)> = roots.iter().map(|root| (root.join(NAME), false)).collect();
    let mut drop_ins = BTreeMap::new();
    for root in roots {
        let directory = root.join(format!("{NAME}.d"));
        let fail = |source| ConfigError::Read { path: directory.clone(), source };
        let entries = match std::fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(fail(source)),
        };
        for entry in entries {
            let path = entry.map_err(fail)?.path();
            let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if let (Some("toml"), false) = (path.extension().and_then(|e| e.to_str()), hidden) {
                drop_ins.insert(path.file_name().unwrap_or_default().to_os_string(), path);
            }
        }
    }
    files.extend(drop_ins.into_values().map(|path| (path, true)));
    Ok(files)
}

fn read(path: &Path) -> io::Result<String> {
    use std::io::Read;
    let wrong = |problem: &str| io::Error::new(io::ErrorKind::InvalidData, problem.to_string());
    let file = std::fs::File::open(path)?;
    if !file.metadata()?.is_file() {
        // `/dev/null` in the place of a drop-in masks it, as with systemd's units.
        return if path.canonicalize()? == Path::new("/dev/null") {
            Ok(String::new())
        } else {
            Err(wrong("it is not a regular file"))
        };
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > MAX_BYTES {
        return Err(wrong("it is larger than 1 MiB"));
    }
    String::from_utf8(bytes).map_err(|_| wrong("it is not UTF-8 text"))
}

/// Typed access to a document's keys: each method leaves `value` alone where the key is absent or wrong.
struct Keys<'a> {
    document: &'a mut Document,
}

impl Keys<'_> {
    fn set<T>(
        &mut self,
        section: &'static str,
        key: &'static str,
        allowed: &str,
        value: &mut T,
        read: impl Fn(&Value) -> Option<T>,
    ) {
        let Some(entry) = self.document.take(section, key) else { return };
        match read(&entry.value) {
            Some(read) => *value = read,
            None => self.wrong(section, key, &entry, allowed),
        }
    }

    fn wrong(&mut self, section: &str, key: &str, entry: &Entry, allowed: &str) {
        self.document.complain_value(section, key, entry, format!("allowed: {allowed}"));
    }

    fn integer<T: TryFrom<i64>>(
        &mut self,
        section: &'static str,
        key: &'static str,
        range: RangeInclusive<i64>,
        value: &mut T,
    ) {
        let allowed = format!("a whole number from {} to {}", range.start(), range.end());
        self.set(section, key, &allowed, value, |given| match given {
            Value::Integer(number) if range.contains(number) => T::try_from(*number).ok(),
            _ => None,
        });
    }

    fn size(&mut self, section: &'static str, key: &'static str, value: &mut u64) {
        let allowed = "a size above 0, such as \"4GiB\" (B, KiB, MiB, GiB, TiB), or a number of bytes";
        self.set(section, key, allowed, value, |given| {
            let bytes = match given {
                Value::Integer(bytes) => u64::try_from(*bytes).ok(),
                Value::String(text) => parse_units(text, SIZES),
                _ => None,
            };
            bytes.filter(|bytes| (1..=i64::MAX as u64).contains(bytes))
        });
    }

    fn duration(
        &mut self,
        section: &'static str,
        key: &'static str,
        seconds: RangeInclusive<u64>,
        value: &mut Duration,
    ) {
        let allowed = format!(
            "a duration such as \"5s\" or \"1h30min\" (ms, s, min, h), from {} to {} seconds",
            seconds.start(),
            seconds.end()
        );
        self.set(section, key, &allowed, value, |given| match given {
            Value::String(text) => parse_units(text, DURATIONS)
                .filter(|ms| (seconds.start() * 1000..=seconds.end() * 1000).contains(ms))
                .map(Duration::from_millis),
            _ => None,
        });
    }

    fn boolean(&mut self, section: &'static str, key: &'static str, value: &mut bool) {
        self.set(section, key, "true, false", value, |given| match given {
            Value::Boolean(boolean) => Some(*boolean),
            _ => None,
        });
    }

    fn number(
        &mut self,
        section: &'static str,
        key: &'static str,
        range: RangeInclusive<f64>,
        value: &mut f64,
    ) {
        let allowed = format!("a number from {} to {}", range.start(), range.end());
        self.set(section, key, &allowed, value, |given| match given {
            Value::String(_) => None,
            number => quantity(number, "", &range),
        });
    }

    fn share(
        &mut self,
        section: &'static str,
        key: &'static str,
        range: RangeInclusive<f64>,
        value: &mut f64,
    ) {
        let allowed =
            format!("a number from {} to {}, or a percentage such as \"30%\"", range.start(), range.end());
        self.set(section, key, &allowed, value, |given| share(given, &range));
    }

    fn celsius(
        &mut self,
        section: &'static str,
        key: &'static str,
        range: RangeInclusive<f64>,
        value: &mut Celsius,
    ) {
        let allowed = format!("a number of °C from {} to {}, or \"80°C\"", range.start(), range.end());
        self.set(section, key, &allowed, value, |given| quantity(given, "°C", &range).map(Celsius));
    }

    fn power(&mut self, section: &'static str, key: &'static str, value: &mut Option<Watts>) {
        let allowed = "\"none\", or a power such as \"25W\" or a number of watts, from 1 to 10000";
        self.set(section, key, allowed, value, |given| match given {
            Value::String(word) if word == NONE => Some(None),
            power => quantity(power, "W", &POWERS).map(|watts| Some(Watts(watts))),
        });
    }

    fn offset(&mut self, section: &'static str, key: &'static str, value: &mut Watts) {
        let allowed = "a power such as \"2.5W\" or a number of watts, from -100 to 100";
        self.set(section, key, allowed, value, |given| quantity(given, "W", &(-100.0..=100.0)).map(Watts));
    }

    fn energy(&mut self, section: &'static str, key: &'static str, value: &mut Option<Joules>) {
        let allowed =
            "\"none\", or an energy such as \"40Wh\" or a number of watt-hours, from 0.001 to 1000000";
        self.set(section, key, allowed, value, |given| match given {
            Value::String(word) if word == NONE => Some(None),
            energy => quantity(energy, "Wh", &ENERGIES).map(|hours| Some(Joules::from_watt_hours(hours))),
        });
    }

    fn load(&mut self, section: &'static str, key: &'static str, value: &mut Option<f64>) {
        let allowed = "\"none\", or a number from 0 to 1000";
        self.set(section, key, allowed, value, |given| match given {
            Value::String(word) if word == NONE => Some(None),
            Value::String(_) => None,
            number => quantity(number, "", &(0.0..=1000.0)).map(Some),
        });
    }

    fn hours(&mut self, section: &'static str, key: &'static str, value: &mut Vec<String>) {
        let Some(entry) = self.document.take(section, key) else { return };
        let items = match &entry.value {
            Value::Array(items) => items.as_slice(),
            // In a shell, one pair of hours needs no brackets.
            one @ Value::String(_) if entry.override_text.is_some() => std::slice::from_ref(one),
            _ => return self.wrong(section, key, &entry, "a list of strings such as \"22:00-06:00\""),
        };
        let mut read = Vec::new();
        for item in items {
            let Value::String(text) = item else {
                return self.wrong(section, key, &entry, "a list of strings such as \"22:00-06:00\"");
            };
            match Hours::parse(text) {
                Ok(_) => read.push(text.clone()),
                Err(error) => {
                    return self.document.complain_value(section, key, &entry, error.to_string());
                }
            }
        }
        *value = read;
    }

    fn board(&mut self, section: &'static str, key: &'static str, value: &mut Option<String>) {
        let names = BOARDS.iter().map(|name| (*name, Some(*name)));
        let table: Vec<(&str, Option<&str>)> = std::iter::once((AUTO, None)).chain(names).collect();
        let mut chosen = BOARDS.iter().copied().find(|name| Some(*name) == value.as_deref());
        self.choice(section, key, &table, &mut chosen);
        *value = chosen.map(str::to_string);
    }

    fn rails(&mut self, section: &'static str, key: &'static str, value: &mut Option<Vec<String>>) {
        // None at all would be a meter that reads nothing, and a limit of power that holds nothing.
        let allowed = "\"auto\", or a list of rails' labels, one at least";
        self.set(section, key, allowed, value, |given| match given {
            Value::String(word) if word == AUTO => Some(None),
            Value::Array(items) if !items.is_empty() => items
                .iter()
                .map(|item| match item {
                    Value::String(label) if !label.is_empty() => Some(label.clone()),
                    _ => None,
                })
                .collect::<Option<Vec<_>>>()
                .map(Some),
            _ => None,
        });
    }

    fn interval(&mut self, section: &'static str, key: &'static str, value: &mut Duration) {
        let allowed = "a duration such as \"500ms\" (ms, s), from 100 to 1000 ms";
        self.set(section, key, allowed, value, |given| match given {
            Value::String(text) => {
                parse_units(text, DURATIONS).filter(|ms| (100..=1000).contains(ms)).map(Duration::from_millis)
            }
            _ => None,
        });
    }

    fn choice<T: Copy>(
        &mut self,
        section: &'static str,
        key: &'static str,
        table: &[(&str, T)],
        value: &mut T,
    ) {
        let words = table.iter().map(|(word, _)| format!("\"{word}\"")).collect::<Vec<_>>().join(", ");
        let Some(entry) = self.document.take(section, key) else { return };
        let given = match &entry.value {
            Value::String(word) => word.as_str(),
            _ => return self.wrong(section, key, &entry, &words),
        };
        match table.iter().find(|(word, _)| *word == given) {
            Some((_, chosen)) => *value = *chosen,
            None => {
                let near = nearest(given, table.iter().map(|(word, _)| *word));
                let hint = near.map_or(String::new(), |near| format!("; did you mean \"{near}\"?"));
                self.wrong(section, key, &entry, &format!("{words}{hint}"));
            }
        }
    }

    fn path(&mut self, section: &'static str, key: &'static str, value: &mut PathBuf) {
        self.set(section, key, "an absolute path, as a string", value, absolute);
    }

    fn paths(&mut self, section: &'static str, key: &'static str, value: &mut Vec<PathBuf>) {
        self.set(section, key, "a list of absolute paths", value, |given| match given {
            Value::Array(items) => items.iter().map(absolute).collect(),
            _ => None,
        });
    }

    fn launch(&mut self, section: &'static str, key: &'static str, value: &mut Launch) {
        let allowed = "\"child\", or \"unix:\" and the absolute path of a socket";
        self.set(section, key, allowed, value, |given| match given {
            Value::String(word) if word == "child" => Some(Launch::Child),
            Value::String(text) => {
                let path = text.strip_prefix("unix:").map(|path| Value::String(path.to_string()));
                path.as_ref().and_then(absolute).map(Launch::Socket)
            }
            _ => None,
        });
    }

    fn threads(&mut self, section: &'static str, key: &'static str, value: &mut Option<usize>) {
        let allowed = "\"auto\", or a whole number from 1 to 1024";
        self.set(section, key, allowed, value, |given| match given {
            Value::String(word) if word == "auto" => Some(None),
            Value::Integer(threads @ 1..=1024) => Some(Some(*threads as usize)),
            _ => None,
        });
    }

    fn group(&mut self, section: &'static str, key: &'static str, value: &mut String) {
        let allowed = "the name of a group: 1 to 32 of a-z, A-Z, 0-9, `_` and `-`";
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        self.set(section, key, allowed, value, |given| match given {
            Value::String(name) if (1..=32).contains(&name.len()) && name.chars().all(plain) => {
                Some(name.clone())
            }
            _ => None,
        });
    }
}

fn absolute(value: &Value) -> Option<PathBuf> {
    match value {
        Value::String(text) if text.starts_with('/') && !text.contains('\0') => Some(PathBuf::from(text)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Bytes;
    use proptest::prelude::*;
    use std::time::Duration;

    fn nothing(_: &str) -> Option<OsString> {
        None
    }

    fn system() -> DaemonConfig {
        DaemonConfig::defaults(Mode::System, &nothing)
    }

    /// A configuration from the text of one file.
    fn parse(text: &str) -> Result<DaemonConfig, Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("finetuned.toml");
        std::fs::write(&path, text).unwrap();
        DaemonConfig::load(Some(&path), Mode::System, &nothing).map_err(|error| {
            let directory = format!("{}/", dir.path().display());
            error.to_string().lines().map(|line| line.replace(&directory, "")).collect()
        })
    }

    fn known() -> Vec<(String, String)> {
        let mut document = Document::new("", "", PAGE, &[]);
        system().take(&mut document);
        document.known().iter().map(|(section, key)| (section.to_string(), key.to_string())).collect()
    }

    /// Values of every kind, sensible and not.
    fn value() -> impl Strategy<Value = String> {
        let words = [
            "\"none\"",
            "\"auto\"",
            "\"2 W\"",
            "\"-5Wh\"",
            "\"1e400 W\"",
            "\"22:00-06:00\"",
            "\"99:99\"",
            "nan",
            "-inf",
            "true",
            "[]",
            "[\"\"]",
            "{}",
            "\"",
            "1979-05-27",
            "\"500ms\"",
            "\"١\"",
        ];
        prop_oneof![
            any::<i64>().prop_map(|number| number.to_string()),
            any::<f64>().prop_map(|number| format!("{number:e}")),
            (0.0..120.0f64).prop_map(|number| format!("{number:.1}")),
            prop::sample::select(words.to_vec()).prop_map(String::from),
            "[ -~]{0,12}",
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn no_text_makes_a_budget_that_lets_a_chip_get_too_hot(
            entries in prop::collection::vec((any::<prop::sample::Index>(), value()), 0..6),
            garbage in prop::option::of(prop::collection::vec(any::<u8>(), 0..80)),
        ) {
            let known = known();
            let text: String = entries
                .iter()
                .map(|(which, value)| {
                    let (section, key) = which.get(&known);
                    format!("{section}.{key} = {value}\n")
                })
                .collect();
            let bytes = garbage.unwrap_or_else(|| text.into_bytes());
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("finetuned.toml");
            std::fs::write(&path, &bytes).unwrap();
            match DaemonConfig::load(Some(&path), Mode::System, &nothing) {
                Ok(config) => {
                    let budget = &config.budget;
                    prop_assert!(budget.temperature_stop <= crate::config::budget::Budget::STOP_LIMIT);
                    prop_assert!(budget.temperature < budget.temperature_stop);
                    prop_assert!(budget.temperature_resume < budget.temperature);
                    prop_assert!((0.01..=0.9).contains(&budget.duty_floor));
                    prop_assert!(budget.power.is_none_or(|power| power.0 > 0.0 && power.0.is_finite()));
                    prop_assert!((0.0..=1.0).contains(&config.conditions.minimum_battery));
                    prop_assert!(config.board.interval <= Duration::from_secs(1));
                }
                Err(error) => prop_assert!(error.to_string().contains("finetuned.toml")),
            }
        }
    }

    #[test]
    fn defaults_follow_the_mode_and_the_environment() {
        let config = system();
        assert_eq!(config.storage.state_directory, Path::new("/var/lib/finetuned"));
        assert_eq!(config.storage.cache_directory, Path::new("/var/cache/finetuned"));
        assert_eq!(config.authorization.method, Authorization::Polkit);
        let by_systemd = |name: &str| match name {
            "STATE_DIRECTORY" => Some(OsString::from("/srv/state:/srv/other")),
            "CACHE_DIRECTORY" => Some(OsString::from("/srv/cache")),
            _ => None,
        };
        let config = DaemonConfig::defaults(Mode::System, &by_systemd);
        assert_eq!(config.storage.state_directory, Path::new("/srv/state"));
        assert_eq!(config.storage.cache_directory, Path::new("/srv/cache"));
        let user = |name: &str| match name {
            "HOME" => Some(OsString::from("/home/a")),
            "XDG_CACHE_HOME" => Some(OsString::from("/scratch/a")),
            "XDG_STATE_HOME" => Some(OsString::from("not/absolute")),
            _ => None,
        };
        let config = DaemonConfig::defaults(Mode::Session, &user);
        assert_eq!(config.storage.state_directory, Path::new("/home/a/.local/state/finetuned"));
        assert_eq!(config.storage.cache_directory, Path::new("/scratch/a/finetuned"));
        assert_eq!(config.storage.model_directories, Vec::<PathBuf>::new());
        assert_eq!(config.authorization.method, Authorization::Owner);
        let error = DaemonConfig::load(None, Mode::Session, &nothing).unwrap_err().to_string();
        assert_eq!(error.lines().count(), 2, "{error}");
        assert!(error.contains("storage.state_directory: required where HOME is not set"), "{error}");
    }

    #[test]
    fn every_type_is_read_and_written_back() {
        let text = r#"
            [storage]
            state_directory = "/srv/finetuned"
            model_directories = ["/srv/models", "/opt/models"]
            [limits]
            runs = 3
            input_bytes = 1_000
            model_bytes = "1 GiB 512MiB"
            [worker]
            launch = "unix:/run/finetuned/worker.sock"
            threads = 4
            backoff = "500ms"
            backoff_limit = "1h30min"
            keep_when_held = "0s"
            [authorization]
            method = "group"
            group = "operators"
            [log]
            level = "debug"
            [budget]
            temperature = 72.5
            temperature_resume = 60
            power = "22.5 W"
            energy_per_night = 40
            energy_per_run = "0.7Wh"
            energy_gross = false
            memory_floor = "512MiB"
            [window]
            times = ["22:00-06:00", "sat,sun 00:00-24:00"]
            quiet = ["mon-fri 22:00-06:00"]
            quiet_fan = 0.25
            [conditions]
            external_power = true
            maximum_load = 0.5
            [board]
            name = "agx-orin-64gb"
            rails = ["VDD_GPU_SOC", "VDD_CPU_CV"]
            power_factor = 1.1
            power_offset = "-0.5W"
            interval = "250ms"
        "#;
        let config = parse(text).unwrap();
        assert_eq!(config.storage.model_directories, [Path::new("/srv/models"), Path::new("/opt/models")]);
        assert_eq!((config.limits.runs, config.limits.input_bytes), (3, 1000));
        assert_eq!(config.limits.model_bytes, 3 << 29);
        assert_eq!(config.worker.launch, Launch::Socket("/run/finetuned/worker.sock".into()));
        assert_eq!(config.worker.threads, Some(4));
        assert_eq!(config.worker.backoff, Duration::from_millis(500));
        assert_eq!(config.worker.backoff_limit, Duration::from_secs(5400));
        assert_eq!(config.authorization.method, Authorization::Group);
        assert_eq!(config.log.level, "debug");
        let budget = &config.budget;
        assert_eq!((budget.temperature, budget.temperature_resume), (Celsius(72.5), Celsius(60.0)));
        assert_eq!(budget.temperature_stop, Celsius(95.0));
        assert_eq!((budget.power, budget.energy_per_night), (Some(Watts(22.5)), Some(Joules(144_000.0))));
        assert_eq!((budget.energy_gross, budget.memory_floor), (false, Bytes(512 << 20)));
        assert_eq!(config.window.times, ["22:00-06:00", "sat,sun 00:00-24:00"]);
        assert_eq!((config.conditions.external_power, config.conditions.maximum_load), (true, Some(0.5)));
        assert_eq!(config.board.power_offset, Watts(-0.5));
        assert_eq!(config.board.interval, Duration::from_millis(250));
        assert_eq!(parse(&config.to_toml()), Ok(config.clone()));
        assert_eq!(parse(&system().to_toml()), Ok(system()));
        assert_eq!(parse(""), Ok(system()));
        let mut other = config.clone();
        other.log.level = "info".into();
        other.limits.runs = 4;
        assert_eq!(config.differences(&other), ["limits.runs", "log.level"]);
    }

    #[test]
    fn every_mistake_is_named_with_its_place_and_what_is_allowed() {
        let text = "\
[storage]
state_directory = \"relative\"
[limit]
runs = 3
[limits]
runs = 0
input_bytes = \"4GB\"
model_byts = 3
[worker]
backoff = 5
step_timeout = \"0s\"
nice = -5
launch = \"unix:worker\"
[authorization]
method = \"polkitd\"
[log]
level = 3
zebra = 1
";
        assert_eq!(
            parse(text).unwrap_err(),
            [
                "finetuned.toml:2:1: storage.state_directory = \"relative\": allowed: an absolute path, as a string",
                "finetuned.toml:3:2: [limit]: unknown section; did you mean [limits]?",
                "finetuned.toml:6:1: limits.runs = 0: allowed: a whole number from 1 to 100000",
                "finetuned.toml:7:1: limits.input_bytes = \"4GB\": allowed: a size above 0, such as \"4GiB\" (B, KiB, \
                 MiB, GiB, TiB), or a number of bytes",
                "finetuned.toml:8:1: limits.model_byts: unknown key; did you mean `model_bytes`?",
                "finetuned.toml:10:1: worker.backoff = 5: allowed: a duration such as \"5s\" or \"1h30min\" (ms, s, \
                 min, h), from 0 to 86400 seconds",
                "finetuned.toml:11:1: worker.step_timeout = \"0s\": allowed: a duration such as \"5s\" or \"1h30min\" \
                 (ms, s, min, h), from 1 to 86400 seconds",
                "finetuned.toml:12:1: worker.nice = -5: allowed: a whole number from 0 to 19",
                "finetuned.toml:13:1: worker.launch = \"unix:worker\": allowed: \"child\", or \"unix:\" and the \
                 absolute path of a socket",
                "finetuned.toml:15:1: authorization.method = \"polkitd\": allowed: \"polkit\", \"group\", \"owner\"; \
                 did you mean \"polkit\"?",
                "finetuned.toml:17:1: log.level = 3: allowed: \"error\", \"warn\", \"info\", \"debug\", \"trace\"",
                "finetuned.toml:18:1: log.zebra: unknown key; docs/configuration.md lists every key",
            ]
        );
        assert!(parse("[log\n").unwrap_err()[0].contains("not valid TOML"));
        let limit = parse("[worker]\nbackoff_limit = \"1s\"\n").unwrap_err();
        assert_eq!(
            limit,
            [
                "finetuned.toml: worker.backoff_limit: is shorter than worker.backoff; make it at least as long"
            ]
        );
    }

    #[test]
    fn limits_that_contradict_each_other_are_refused() {
        let order = parse("[budget]\ntemperature = 80\ntemperature_resume = 80\ntemperature_stop = 79\n");
        assert_eq!(
            order.unwrap_err(),
            [
                "finetuned.toml: budget.temperature_resume: is 80.0 °C, not below budget.temperature, 80.0 °C; lower it",
                "finetuned.toml: budget.temperature: is 80.0 °C, not below budget.temperature_stop, 79.0 °C; lower it",
            ]
        );
        for (text, words) in [
            ("[budget]\ntemperature_stop = 96\n", "allowed: a number of °C from 31 to 95"),
            ("[budget]\ntemperature = nan\n", "allowed: a number of °C from 30 to 94"),
            ("[budget]\ntemperature = \"80\"\n", "allowed: a number of °C"),
            ("[budget]\npower = \"25\"\n", "allowed: \"none\", or a power such as \"25W\""),
            ("[budget]\npower = \"infW\"\n", "allowed: \"none\", or a power"),
            ("[budget]\nenergy_per_night = \"40W\"\n", "such as \"40Wh\""),
            ("[window]\ntimes = \"22:00-06:00\"\n", "allowed: a list of strings"),
            ("[window]\ntimes = [\"22:00-26:00\"]\n", "\"22:00-26:00\": at character 7"),
            ("[conditions]\nminimum_battery = 30\n", "allowed: a number from 0 to 1"),
            ("[board]\ninterval = \"5s\"\n", "from 100 to 1000 ms"),
            ("[board]\nrails = []\n", "one at least"),
            ("[board]\nname = \"agx-orin-64\"\n", "\"generic\"; did you mean \"agx-orin-64gb\"?"),
            (
                "[window]\nquiet_fan = \"130%\"\n",
                "allowed: a number from 0 to 1, or a percentage such as \"30%\"",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.len() == 1 && error[0].contains(words), "{error:?}");
        }
        let units = parse("[budget]\ntemperature = \"80 °C\"\n[window]\nquiet_fan = \"25 %\"\n").unwrap();
        assert_eq!((units.budget.temperature, units.window.quiet_fan), (Celsius(80.0), 0.25));
        let mut config = system();
        let mut mistakes = Vec::new();
        config.apply("[budget]\npower = 20\n", "a", &mut mistakes);
        config.apply("[budget]\npower = \"none\"\n", "b", &mut mistakes);
        assert_eq!((config.budget.power, mistakes.len()), (None, 0), "a drop-in takes a limit away");
    }

    #[test]
    fn what_takes_a_protection_away_is_told() {
        assert_eq!(system().cautions(), [""; 0], "out of the box nothing is off");
        let all = "[budget]\nmemory_floor = \"1MiB\"\n[window]\nquiet = [\"22:00-06:00\"]\nquiet_fan = 1\n[conditions]\n\
                   minimum_battery = 0\n[board]\npower_factor = 0.5\n";
        let cautions = parse(all).unwrap().cautions();
        let words = ["power_factor = 0.5", "memory_floor = 1.0 MiB", "to 0 %", "quiet_fan = 1"];
        assert_eq!(cautions.len(), words.len());
        for (caution, words) in cautions.iter().zip(words) {
            assert!(caution.contains(words), "{caution}");
        }
        assert_eq!(parse("[board]\npower_offset = \"-1W\"\n").unwrap().cautions().len(), 1);
    }

    #[test]
    fn drop_ins_go_by_name_and_the_later_root_replaces() {
        let dir = tempfile::tempdir().unwrap();
        let (vendor, site) = (dir.path().join("usr"), dir.path().join("etc"));
        let write = |path: PathBuf, text: &str| {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write(site.join("finetuned.toml"), "[limits]\nruns = 1\ninhibitors = 1\nrunz = 1\n");
        write(vendor.join("finetuned.toml.d/10-a.toml"), "[limits]\nruns = 2\n");
        write(vendor.join("finetuned.toml.d/20-b.toml"), "[limits]\nruns = 3\n");
        write(site.join("finetuned.toml.d/20-b.toml"), "[limits]\nruns_per_user = 4\nrunz = 2\n");
        write(site.join("finetuned.toml.d/notes.txt"), "not read");
        std::os::unix::fs::symlink("/dev/null", site.join("finetuned.toml.d/30-c.toml")).unwrap();
        let files = find(&[vendor.clone(), site.clone()]).unwrap();
        let names: Vec<String> = files
            .iter()
            .map(|(path, _)| path.strip_prefix(dir.path()).unwrap().display().to_string())
            .collect();
        assert_eq!(
            names,
            [
                "usr/finetuned.toml",
                "etc/finetuned.toml",
                "usr/finetuned.toml.d/10-a.toml",
                "etc/finetuned.toml.d/20-b.toml",
                "etc/finetuned.toml.d/30-c.toml"
            ]
        );
        let mut config = system();
        let mut mistakes = Vec::new();
        for (path, _) in &files {
            if let Ok(text) = read(path) {
                config.apply(&text, &path.display().to_string(), &mut mistakes);
            }
        }
        let limits = &config.limits;
        assert_eq!((limits.runs, limits.inhibitors, limits.runs_per_user), (2, 1, 4));
        assert_eq!(mistakes.len(), 2, "of both files: {mistakes:?}");
        assert_eq!(find(&[dir.path().join("absent")]).unwrap().len(), 1);
    }

    #[test]
    fn a_file_that_was_asked_for_must_be_there() {
        let error = DaemonConfig::load(Some(Path::new("/absent.toml")), Mode::System, &nothing).unwrap_err();
        assert!(matches!(&error, ConfigError::Read { path, .. } if path == Path::new("/absent.toml")));
        let dir = tempfile::tempdir().unwrap();
        let error = DaemonConfig::load(Some(dir.path()), Mode::System, &nothing).unwrap_err().to_string();
        assert!(error.contains("it is not a regular file"), "{error}");
        let path = dir.path().join("binary");
        std::fs::write(&path, b"\xff").unwrap();
        let error = DaemonConfig::load(Some(&path), Mode::System, &nothing).unwrap_err().to_string();
        assert!(error.contains("not UTF-8"), "{error}");
    }

    #[test]
    fn units_are_whole_numbers_with_a_unit_each() {
        assert_eq!(parse_units("1h 2min 3s 4ms", DURATIONS), Some(3_723_004));
        let overflow = format!("{}h", u64::MAX);
        for bad in ["", " ", "5", "s", "-1s", "1.5s", "5 parsecs", "5s6", "5é", &overflow] {
            assert_eq!(parse_units(bad, DURATIONS), None, "{bad}");
        }
        assert_eq!(with_unit(0, DURATIONS), "\"0s\"");
        assert_eq!(with_unit(90_000, DURATIONS), "\"90s\"");
        assert_eq!(with_unit(1 << 30, SIZES), "\"1GiB\"");
        assert_eq!(with_unit(1000, SIZES), "\"1000B\"");
    }

    #[test]
    fn the_documentation_lists_every_key_and_no_other() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md"));
        let mut documented = Vec::new();
        let mut section = String::new();
        for line in text.unwrap().lines() {
            if let Some(heading) = line.strip_prefix("## ") {
                section = heading.trim_matches(['`', '[', ']']).to_string();
            } else if let Some((key, _)) = line.strip_prefix("| `").and_then(|row| row.split_once('`')) {
                assert_eq!(line.matches(" | ").count(), 4, "key, type, default, range, effect: {line}");
                documented.push((section.clone(), key.to_string()));
            }
        }
        assert_eq!(documented, known());
    }

    #[test]
    fn the_file_that_is_installed_has_every_key_at_its_default() {
        let text =
            std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/finetuned.toml")).unwrap();
        assert_eq!(parse(&text), Ok(system()), "as installed it says nothing");
        let is_key = |line: &str| {
            line.strip_prefix('#').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()))
        };
        let lines = text.lines().map(|line| if is_key(line) { &line[1..] } else { line });
        let uncommented = lines.collect::<Vec<_>>().join("\n");
        assert_eq!(parse(&uncommented), Ok(system()));
        let mut document = Document::new(&uncommented, "", PAGE, &[]);
        for (section, key) in document_keys() {
            assert!(document.take(section, key).is_some(), "{section}.{key} is not in the file");
        }
    }

    fn document_keys() -> Vec<(&'static str, &'static str)> {
        system().keys().into_iter().map(|(section, key, _)| (section, key)).collect()
    }

    #[test]
    fn what_is_written_is_what_is_known() {
        let written: Vec<(String, String)> =
            document_keys().iter().map(|(section, key)| (section.to_string(), key.to_string())).collect();
        assert_eq!(written, known());
    }
}
