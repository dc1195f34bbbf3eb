//! Settings: single keys of `[budget]`, `[window]` and `[conditions]` that are changed while the daemon runs.
//!
//! ```text
//!   defaults ──► files ──► settings that last (budget.toml in the state directory) ──► settings until the next start
//!                        a later one replaces single keys of an earlier one; all of it is checked together
//! ```
//!
//! A setting is read and checked as a key of a file is. What was set must not be forgotten silently: a file that cannot be
//! read, or that no longer goes together with the others, leaves the files in force and [`DaemonConfig::settings_lost`]
//! set, which holds all training until a person has looked.
//!
//! Pure but for [`read`]: who writes the file is the service.

use super::daemon::DaemonConfig;
use super::document::{Mistake, Place};
use super::load::{Loaded, Mode};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};

/// Name of the file in the state directory.
pub const FILE: &str = "budget.toml";
/// What can be set.
const SECTIONS: [&str; 3] = ["budget", "window", "conditions"];
/// Largest file: every key many times over.
const MAX_BYTES: u64 = 1 << 16;
/// Longest key and value, in bytes, and most keys of one request.
const MAX_KEY: usize = 64;
const MAX_VALUE: usize = 4096;
const MAX_KEYS: usize = 64;

/// What stands at the head of the file.
const HEAD: &str = "\
# What was set while finetuned ran (`finetunectl budget set`). It goes before the files of the configuration.
# The daemon writes this file anew with every change: `finetunectl budget reset KEY` takes a key back.
";

/// One key's value, and who gave it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// Value, as TOML has it.
    pub value: toml::Value,
    /// Who.
    pub uid: u32,
    /// When, in microseconds since 1970.
    pub time_us: u64,
}

/// Settings by key, `section.key`.
pub type Settings = BTreeMap<String, Setting>;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Nobody has said anything.
    Default,
    /// A file of the configuration.
    File(Place),
    /// It was set, and lasts.
    Set(Setting),
    /// It was set, and lasts until the daemon starts again.
    Runtime(Setting),
}

impl Source {
    /// The stable word.
    pub fn word(&self) -> &'static str {
        match self {
            Source::Default => "default",
            Source::File(_) => "file",
            Source::Set(_) => "set",
            Source::Runtime(_) => "runtime",
        }
    }
}

/// A key that can be set, as it is now. Values are TOML.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// `section.key`.
    pub key: String,
    /// What is in force.
    pub value: String,
    /// What would be if nobody said anything.
    pub default: String,
    /// What would be without settings.
    pub files: String,
    /// Where the value in force comes from.
    pub source: Source,
}

/// What a change asks for: a key's new value, as TOML or as a bare word, or `None` for the value of the files.
pub type Changes = BTreeMap<String, Option<String>>;

/// A key that has changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Changed {
    /// `section.key`.
    pub key: String,
    /// The value before, as TOML.
    pub before: String,
    /// The value now.
    pub now: String,
}

/// The files and what lies above them.
#[derive(Clone, Debug)]
pub struct Layers {
    files: Loaded,
    mode: Mode,
    /// The file of settings.
    path: PathBuf,
    lasting: Settings,
    runtime: Settings,
    /// What is wrong with the settings that last.
    lost: Option<String>,
    /// They are lost because the file cannot be read: what stood in it is not known.
    unreadable: bool,
}

/// Reads the file of settings; one that is not there has none.
///
/// # Errors
/// What is wrong with it, with its place.
pub fn read(path: &Path) -> Result<Settings, String> {
    use io::Read;
    let wrong = |problem: String| format!("{}: {problem}", path.display());
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Settings::new()),
        opened => opened.map_err(|error| wrong(error.to_string()))?,
    };
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(|error| wrong(error.to_string()))?;
    if text.len() as u64 > MAX_BYTES {
        return Err(wrong("it is larger than 64 KiB".into()));
    }
    toml::from_str(&text).map_err(|error| {
        let line = error
            .span()
            .and_then(|span| text.get(..span.start))
            .map(|before| before.matches('\n').count() + 1);
        let line = line.map_or(String::new(), |line| format!(":{line}"));
        format!("{}{line}: {}", path.display(), error.message())
    })
}

/// The text of the file.
pub fn render(settings: &Settings) -> String {
    let mut text = HEAD.to_string();
    for (key, Setting { value, uid, time_us }) in settings {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n[{key:?}]\nvalue = {value}\nuid = {uid}\ntime_us = {time_us}\n");
    }
    text
}

impl Layers {
    /// The files with the settings of their state directory above them.
    pub fn open(files: Loaded, mode: Mode) -> Layers {
        let path = files.config.storage.state_directory.join(FILE);
        let (lasting, lost) = match read(&path) {
            Ok(settings) => (settings, None),
            Err(problem) => (Settings::new(), Some(problem)),
        };
        let (runtime, unreadable) = (Settings::new(), lost.is_some());
        let mut layers = Layers { files, mode, path, lasting, runtime, lost, unreadable };
        if let Err(mistakes) = layers.merge(&Changes::new()) {
            layers.lost = Some(lines(&mistakes));
        }
        layers
    }

    /// The same with files, and the file of settings, read anew. What was set until the next start stays.
    ///
    /// # Errors
    /// What is wrong with the settings; then nothing has changed.
    pub fn reopened(&self, files: Loaded) -> Result<Layers, String> {
        // The state directory stays what it was at the start, whatever the files say now.
        let lasting = read(&self.path)?;
        let next = Layers { files, lasting, lost: None, unreadable: false, ..self.clone() };
        next.check(&Changes::new()).map_err(|mistakes| lines(&mistakes))?;
        Ok(next)
    }

    /// The file of settings.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The settings that last.
    pub fn lasting(&self) -> &Settings {
        &self.lasting
    }

    /// What is wrong with the settings that last, in words, a line each.
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }

    /// The file of settings cannot be read.
    pub fn is_unreadable(&self) -> bool {
        self.unreadable
    }

    /// What is in force. Without the settings where they are lost, and then nothing may compute.
    pub fn config(&self) -> DaemonConfig {
        match (self.merge(&Changes::new()), &self.lost) {
            (Ok(config), None) => config,
            (_, lost) => {
                let why = lost.clone().unwrap_or_default();
                DaemonConfig { settings_lost: Some(why), ..self.files.config.clone() }
            }
        }
    }

    /// The files with all settings above them. Complaints about what is in `request` are for its caller, others name the
    /// file of settings.
    fn merge(&self, request: &Changes) -> Result<DaemonConfig, Vec<Mistake>> {
        let file = Place::Whole(self.path.display().to_string());
        let whole = if request.is_empty() { file.clone() } else { Place::Request };
        let settings = self.lasting.iter().chain(&self.runtime);
        let values: BTreeMap<&str, String> =
            settings.map(|(key, setting)| (key.as_str(), setting.value.to_string())).collect();
        let fixed: Vec<Mistake> =
            values.keys().filter(|key| self.is_fixed(key)).map(|key| fixed(key, file.clone())).collect();
        if !fixed.is_empty() {
            return Err(fixed);
        }
        let values = values.iter().map(|(key, value)| match request.get(*key) {
            // What was typed says more in a complaint than what became of it.
            Some(typed) => (*key, typed.as_deref().unwrap_or(value), Place::Request),
            None => (*key, value.as_str(), file.clone()),
        });
        self.files.config.with(values, &whole)
    }

    /// What is in force, if it goes together, and what lasts of it does, too: else the next start would find settings lost.
    fn check(&self, request: &Changes) -> Result<DaemonConfig, Vec<Mistake>> {
        let config = self.merge(request)?;
        if !self.runtime.is_empty() {
            let next_start = Layers { runtime: Settings::new(), ..self.clone() };
            next_start.merge(request).map_err(|mut mistakes| {
                for mistake in &mut mistakes {
                    mistake.problem.push_str(" (once what is set until the next start is gone)");
                }
                mistakes
            })?;
        }
        Ok(config)
    }

    fn is_key(&self, key: &str) -> bool {
        self.files.config.keys().iter().any(|(section, name, _)| is(key, section, name))
    }

    /// Whether it is a key, and not one that can be set.
    fn is_fixed(&self, key: &str) -> bool {
        self.is_key(key) && !SECTIONS.iter().any(|section| key.split('.').next() == Some(section))
    }

    /// Every key that can be set, in the order of the documentation.
    pub fn entries(&self) -> Vec<Entry> {
        let default = DaemonConfig::defaults(self.mode, &|_| None).keys();
        let (files, now) = (self.files.config.keys(), self.config().keys());
        let rows = default.into_iter().zip(files).zip(now);
        let settable = rows.filter(|(((section, ..), _), _)| SECTIONS.contains(section));
        settable
            .map(|(((section, key, default), (.., files)), (.., value))| {
                let key = format!("{section}.{key}");
                let source = self.source(&key);
                Entry { key, value, default, files, source }
            })
            .collect()
    }

    fn source(&self, key: &str) -> Source {
        let in_force = self.lost.is_none();
        match (self.runtime.get(key), self.lasting.get(key), self.files.places.get(key)) {
            (Some(setting), ..) if in_force => Source::Runtime(setting.clone()),
            (None, Some(setting), _) if in_force => Source::Set(setting.clone()),
            (.., Some(place)) => Source::File(place.clone()),
            (.., None) => Source::Default,
        }
    }

    /// The layers after a change, and what it changes; all of it or nothing. `runtime` is until the next start. A key
    /// that is given a value that lasts, or none, loses what it was given until then.
    ///
    /// # Errors
    /// Every mistake. Of settings that are lost, only what takes them away is taken.
    pub fn changed(
        &self,
        changes: &Changes,
        runtime: bool,
        (uid, time_us): (u32, u64),
    ) -> Result<(Layers, Vec<Changed>), Vec<Mistake>> {
        self.check_names(changes)?;
        let mut next = self.clone();
        for (key, value) in changes {
            next.runtime.remove(key);
            if !runtime || value.is_none() {
                next.lasting.remove(key);
            }
            if let Some(text) = value {
                let setting = Setting { value: typed(text), uid, time_us };
                let layer = if runtime { &mut next.runtime } else { &mut next.lasting };
                layer.insert(key.clone(), setting);
            }
        }
        // Of settings that do not go together, some can be taken away; of a file that cannot be read, only all.
        let repairs = !self.unreadable && changes.values().all(Option::is_none);
        if let Some(problem) = self.lost.as_deref().filter(|_| !repairs) {
            let problem = format!(
                "what was set earlier cannot be kept to ({problem}): take it back with `finetunectl budget reset`, then set \
                 what you want"
            );
            return Err(vec![Mistake { place: Place::Request, key: String::new(), value: None, problem }]);
        }
        let config = next.check(changes)?;
        next.lost = None;
        // What was typed is kept as the configuration writes it.
        let written =
            config.keys().into_iter().map(|(section, key, text)| (format!("{section}.{key}"), text));
        let layer = if runtime { &mut next.runtime } else { &mut next.lasting };
        for (key, text) in written.filter(|(key, _)| changes.get(key).is_some_and(Option::is_some)) {
            if let Some(setting) = layer.get_mut(&key) {
                setting.value = typed(&text);
            }
        }
        let changed = differences(&self.entries(), &next.entries());
        Ok((next, changed))
    }

    /// The layers without any setting, and what that changes.
    pub fn cleared(&self) -> (Layers, Vec<Changed>) {
        let (lasting, runtime) = (Settings::new(), Settings::new());
        let next = Layers { lasting, runtime, lost: None, unreadable: false, ..self.clone() };
        let changed = differences(&self.entries(), &next.entries());
        (next, changed)
    }

    fn check_names(&self, changes: &Changes) -> Result<(), Vec<Mistake>> {
        let mistake = |key: &str, problem: &str| Mistake {
            place: Place::Request,
            key: key.chars().take(64).collect(),
            value: None,
            problem: problem.into(),
        };
        if changes.len() > MAX_KEYS {
            return Err(vec![mistake("", "more than 64 keys in one request")]);
        }
        let mut mistakes = Vec::new();
        for (key, value) in changes {
            if key.len() > MAX_KEY {
                mistakes.push(mistake(key, "is no key: it is longer than any"));
            } else if value.as_ref().is_some_and(|value| value.len() > MAX_VALUE) {
                mistakes.push(mistake(key, "the value is longer than 4096 bytes"));
            } else if self.is_fixed(key) {
                mistakes.push(fixed(key, Place::Request));
            }
        }
        // A key to be taken back has no value that the reader of values could complain about.
        let names = changes
            .iter()
            .filter(|(key, value)| value.is_none() && !self.is_key(key) && !self.lasting.contains_key(*key));
        let unknown = names.map(|(key, _)| (key.as_str(), "0", Place::Request));
        mistakes.extend(self.files.config.with(unknown, &Place::Request).err().unwrap_or_default());
        if mistakes.is_empty() { Ok(()) } else { Err(mistakes) }
    }
}

/// The value of a text that is TOML, or a bare word.
fn typed(text: &str) -> toml::Value {
    text.parse().unwrap_or_else(|_| toml::Value::String(text.to_string()))
}

fn is(key: &str, section: &str, name: &str) -> bool {
    key.split_once('.') == Some((section, name))
}

fn fixed(key: &str, place: Place) -> Mistake {
    let problem = if key.starts_with("board.") {
        "is read at the start: write it into finetuned.toml and start the daemon again"
    } else {
        "cannot be set while the daemon runs, [budget], [window] and [conditions] can: write it into finetuned.toml"
    };
    Mistake { place, key: key.to_string(), value: None, problem: problem.into() }
}

fn lines(mistakes: &[Mistake]) -> String {
    mistakes.iter().map(Mistake::to_string).collect::<Vec<_>>().join("\n")
}

/// The keys whose values differ.
fn differences(before: &[Entry], now: &[Entry]) -> Vec<Changed> {
    let pairs = before.iter().zip(now).filter(|(before, now)| before.value != now.value);
    pairs
        .map(|(before, now)| Changed {
            key: now.key.clone(),
            before: before.value.clone(),
            now: now.value.clone(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Celsius, Watts};

    struct Home(tempfile::TempDir);

    impl Home {
        /// A configuration file with this text, and a state directory.
        fn new(text: &str) -> Home {
            let home = Home(tempfile::tempdir().unwrap());
            home.write(text);
            home
        }

        fn write(&self, text: &str) {
            let state = format!("[storage]\nstate_directory = {:?}\n", self.0.path().display().to_string());
            std::fs::write(self.0.path().join("finetuned.toml"), state + text).unwrap();
        }

        fn files(&self) -> Loaded {
            Loaded::load(Some(&self.0.path().join("finetuned.toml")), Mode::System, &|_| None).unwrap()
        }

        fn open(&self) -> Layers {
            Layers::open(self.files(), Mode::System)
        }

        fn save(&self, layers: &Layers) {
            std::fs::write(layers.path(), render(layers.lasting())).unwrap();
        }
    }

    fn changes(list: &[(&str, &str)]) -> Changes {
        let value = |text: &str| Some(text.to_string()).filter(|text| !text.is_empty());
        list.iter().map(|(key, text)| (key.to_string(), value(text))).collect()
    }

    fn set(layers: &Layers, list: &[(&str, &str)]) -> Layers {
        layers.changed(&changes(list), false, (1000, 7)).unwrap().0
    }

    fn refused(layers: &Layers, list: &[(&str, &str)]) -> Vec<String> {
        let mistakes = layers.changed(&changes(list), false, (1000, 7)).unwrap_err();
        mistakes.iter().map(Mistake::to_string).collect()
    }

    fn entry(layers: &Layers, key: &str) -> Entry {
        layers.entries().into_iter().find(|entry| entry.key == key).unwrap()
    }

    #[test]
    fn a_setting_lies_above_the_files_and_comes_back_from_its_file() {
        let home = Home::new("[budget]\ntemperature = 80\npower = 30\n");
        let layers = home.open();
        assert_eq!(layers.entries().len(), 16, "every key of three sections");
        let place = Place::File {
            file: layers.path().with_file_name("finetuned.toml").display().to_string(),
            line: 5,
            column: 1,
        };
        assert_eq!(entry(&layers, "budget.power").source, Source::File(place));
        assert_eq!(entry(&layers, "budget.duty_floor").source, Source::Default);

        let list =
            [("budget.power", "25W"), ("window.times", "22:00-06:00"), ("conditions.minimum_battery", "45%")];
        let (layers, changed) = layers.changed(&changes(&list), false, (1000, 7)).unwrap();
        let told: Vec<String> =
            changed.iter().map(|c| format!("{}: {} -> {}", c.key, c.before, c.now)).collect();
        assert_eq!(
            told,
            [
                "budget.power: \"30W\" -> \"25W\"",
                "window.times: [] -> [\"22:00-06:00\"]",
                "conditions.minimum_battery: 0.3 -> 0.45"
            ]
        );
        home.save(&layers);
        let text = std::fs::read_to_string(layers.path()).unwrap();
        assert!(
            text.starts_with("# What was set")
                && text.contains("[\"budget.power\"]\nvalue = \"25W\"\nuid = 1000\n"),
            "{text}"
        );
        let again = home.open();
        assert_eq!((again.entries(), again.lost()), (layers.entries(), None));
        let config = again.config();
        assert_eq!((config.budget.power, config.budget.temperature), (Some(Watts(25.0)), Celsius(80.0)));
        assert_eq!(config.window.times, ["22:00-06:00"]);
        let power = entry(&again, "budget.power");
        assert_eq!((power.files.as_str(), power.default.as_str()), ("\"30W\"", "\"none\""));
        assert_eq!(
            power.source,
            Source::Set(Setting { value: toml::Value::String("25W".into()), uid: 1000, time_us: 7 })
        );
        let back = set(&again, &[("budget.power", "")]);
        assert_eq!(back.config().budget.power, Some(Watts(30.0)), "the file's value, not the default");
        assert_eq!(again.cleared().0.config(), home.files().config);
    }

    #[test]
    fn what_is_set_until_the_next_start_hides_what_lasts() {
        let home = Home::new("");
        let lasting = set(&home.open(), &[("budget.power", "25")]);
        let runtime = lasting.changed(&changes(&[("budget.power", "10")]), true, (0, 8)).unwrap().0;
        assert_eq!(runtime.config().budget.power, Some(Watts(10.0)));
        assert_eq!(runtime.lasting(), lasting.lasting(), "the file stays");
        assert_eq!(entry(&runtime, "budget.power").source.word(), "runtime");
        let again = set(&runtime, &[("budget.power", "20")]);
        assert_eq!(again.config().budget.power, Some(Watts(20.0)), "the last word counts");
        assert_eq!(set(&runtime, &[("budget.power", "")]).config().budget.power, None);
        let reloaded = runtime.reopened(home.files()).unwrap();
        assert_eq!(reloaded.config().budget.power, Some(Watts(10.0)), "a reload is no start");
    }

    #[test]
    fn what_lasts_must_go_together_without_what_does_not() {
        let layers = Home::new("").open();
        let resume = changes(&[("budget.temperature_resume", "60")]);
        let layers = layers.changed(&resume, true, (0, 8)).unwrap().0;
        assert_eq!(
            refused(&layers, &[("budget.temperature", "70")]),
            [
                "budget.temperature_resume: is 75.0 °C, not below budget.temperature, 70.0 °C; lower it (once what is set \
                 until the next start is gone)"
            ]
        );
        let both = set(&layers, &[("budget.temperature", "70"), ("budget.temperature_resume", "60")]);
        assert_eq!(both.config().budget.temperature, Celsius(70.0));
    }

    #[test]
    fn a_request_is_judged_as_a_file_is_and_as_a_whole() {
        let layers = Home::new("").open();
        assert_eq!(
            refused(
                &layers,
                &[("budget.powr", "25W"), ("budget.temperature", "99"), ("window.times", "22:00-26:00")]
            ),
            [
                "budget.temperature = 99: allowed: a number of °C from 30 to 94, or \"80°C\"",
                "window.times = 22:00-26:00: \"22:00-26:00\": at character 7: a time from 00:00 to 24:00 is expected, two digits each; allowed: \
                 \"22:00-06:00\", or with days before it, \"mon-fri 18:30-07:00\", \"sat,sun 00:00-24:00\"",
                "budget.powr: unknown key; did you mean `power`?",
            ]
        );
        assert_eq!(
            refused(&layers, &[("budget.temperature", "70")]),
            ["budget.temperature_resume: is 75.0 °C, not below budget.temperature, 70.0 °C; lower it"]
        );
        let both = [("budget.temperature", "70°C"), ("budget.temperature_resume", "60")];
        assert_eq!(set(&layers, &both).config().budget.temperature, Celsius(70.0));
        assert_eq!(
            refused(&layers, &[("board.name", "generic")]),
            ["board.name: is read at the start: write it into finetuned.toml and start the daemon again"]
        );
        assert!(refused(&layers, &[("limits.runs", "")])[0].contains("cannot be set while the daemon runs"));
        assert_eq!(
            refused(&layers, &[("budget.powr", "")]),
            ["budget.powr: unknown key; did you mean `power`?"]
        );
        assert_eq!(refused(&layers, &[("power", "1")]), ["power: expected section.key"]);
        assert!(refused(&layers, &[("budget.power", &"9".repeat(5000))])[0].contains("longer than 4096"));
        assert!(refused(&layers, &[(&"k".repeat(65), "1")])[0].contains("longer than any"));
        assert!(refused(&layers, &[("budget.power", "\"\u{1b}")])[0].contains("not valid TOML"));
    }

    #[test]
    fn settings_that_cannot_be_kept_to_hold_everything_until_they_are_taken_back() {
        let home = Home::new("[budget]\npower = 30\n");
        let path = home.open().path().to_path_buf();
        for (text, words) in [
            ("[\"budget.power\"\n", "budget.toml:1: "),
            ("[\"budget.power\"]\nvalue = 25\n", "missing field `uid`"),
            (
                "[\"budget.power\"]\nvalue = 0\nuid = 1\ntime_us = 1\n",
                "budget.toml: budget.power = 0: allowed",
            ),
            ("[\"budget.watts\"]\nvalue = 1\nuid = 1\ntime_us = 1\n", "budget.watts: unknown key"),
            ("[\"limits.runs\"]\nvalue = 1\nuid = 1\ntime_us = 1\n", "limits.runs: cannot be set"),
            (&"#".repeat(70_000), "larger than 64 KiB"),
        ] {
            std::fs::write(&path, text).unwrap();
            let layers = home.open();
            assert!(layers.lost().unwrap().contains(words), "{:?}", layers.lost());
            let config = layers.config();
            assert!(config.settings_lost.is_some(), "{text}");
            assert_eq!(config.budget.power, Some(Watts(30.0)), "the files stay in force");
            assert!(refused(&layers, &[("budget.power", "20")])[0].contains("finetunectl budget reset"));
            let (cleared, _) = layers.cleared();
            assert_eq!((cleared.lost(), cleared.config()), (None, home.files().config));
            assert!(cleared.reopened(home.files()).is_err(), "a reload does not forget it either");
        }
        // A key that no longer goes with the files can be taken back alone, whatever it is called.
        std::fs::write(&path, "[\"budget.watts\"]\nvalue = 1\nuid = 1\ntime_us = 1\n").unwrap();
        assert_eq!(set(&home.open(), &[("budget.watts", "")]).lost(), None);
        std::fs::write(&path, "[").unwrap();
        assert!(refused(&home.open(), &[("budget.power", "")])[0].contains("finetunectl budget reset"));
    }
}
