//! A daemon for tests: the objects of the bus with canned answers, at the other end of a socket pair.

use super::connect::Transport;
use super::console::Console;
use super::context::{Context, Interrupts};
use super::figures::Figures;
use crate::bus::{Dictionary, Error, NAME, ROOT};
use crate::clock::Clock;
use jiff::tz::TimeZone;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Seek, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};
use tokio::sync::Notify;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, Guid, OwnedFd, OwnedObjectPath, OwnedVariant, Variant, interface};

/// The time of every test, in microseconds since 1970.
pub const NOW_US: u64 = 1_700_000_000_000_000;

/// A minute, in microseconds.
pub const MINUTE: u64 = 60_000_000;

/// What the daemon holds.
#[derive(Default)]
pub struct World {
    pub runs: Vec<Figures>,
    pub active: Option<String>,
    pub state: &'static str,
    pub reason: &'static str,
    pub inhibitors: Vec<(String, String, u32, u64)>,
    pub models: Vec<(&'static str, u64)>,
    /// What the governor wants a person to know.
    pub notes: Vec<String>,
    /// The budget: key, value, value of the files, source.
    pub budget: Vec<(&'static str, String, &'static str, &'static str)>,
    /// Calls that change something are answered with this error.
    pub refusal: Option<fn(String) -> Error>,
    /// What the owner gets to see; others are refused.
    pub details: Option<Vec<(&'static str, String)>>,
    pub metrics: String,
    pub journal: String,
    /// Reports on nights, by what is asked for.
    pub nights: Vec<(&'static str, String)>,
    /// Calls that changed something.
    pub calls: Vec<String>,
    /// Contents of the files of a submission.
    pub submitted: Vec<(String, String)>,
    /// The other end of the holds that were given out.
    pub holds: Vec<PipeReader>,
}

#[derive(Clone)]
pub struct Shared(Arc<Mutex<World>>, Arc<Notify>, Arc<Notify>);

impl Shared {
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }

    fn act(&self, call: String) -> Result<(), Error> {
        let mut world = self.world();
        if let Some(refusal) = world.refusal {
            return Err(refusal("it is refused".into()));
        }
        world.calls.push(call);
        Ok(())
    }

    fn figures(&self, id: &str) -> Figures {
        self.world().runs.iter().find(|run| run.id == id).unwrap().clone()
    }
}

fn path(id: &str) -> OwnedObjectPath {
    OwnedObjectPath::try_from(format!("{ROOT}/Run/{id}")).unwrap()
}

fn value(variant: impl Into<Variant<'static>>) -> OwnedVariant {
    OwnedVariant::try_from(variant.into()).unwrap()
}

fn file(text: &str) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.rewind().unwrap();
    std::os::fd::OwnedFd::from(file).into()
}

/// The properties of a run, with the values that the bus has for what is absent.
pub fn properties(run: &Figures) -> Dictionary {
    let text = |text: &str| value(text.to_string());
    [
        ("Id", text(&run.id)),
        ("Name", text(&run.name)),
        ("Owner", value(run.owner)),
        ("Created", value(run.created_us)),
        ("Started", value(run.started_us.unwrap_or(0))),
        ("Finished", value(run.finished_us.unwrap_or(0))),
        ("State", text(&run.state)),
        ("Reason", text(&run.reason)),
        ("Priority", value(run.priority)),
        ("Step", value(run.step)),
        ("TotalSteps", value(run.total_steps.unwrap_or(0))),
        ("Epoch", value(run.epoch)),
        ("Loss", value(run.loss.unwrap_or(f64::NAN))),
        ("EvalLoss", value(run.eval_loss.unwrap_or(f64::NAN))),
        ("TokensPerSecond", value(run.tokens_per_second.unwrap_or(f64::NAN))),
        ("Progress", value(run.progress)),
        ("RemainingSeconds", value(run.remaining_seconds.unwrap_or(u64::MAX))),
        ("Attempts", value(run.attempts)),
        ("CheckpointStep", value(run.checkpoint_step.unwrap_or(u64::MAX))),
        ("MemoryBytes", value(run.memory_bytes)),
        ("Energy", value(run.energy_j.unwrap_or(f64::NAN))),
        ("EnergyAboveIdle", value(run.energy_above_idle_j.unwrap_or(f64::NAN))),
        ("JoulesPerToken", value(run.joules_per_token.unwrap_or(f64::NAN))),
        ("StepEnergy", value(run.step_energy_j.unwrap_or(f64::NAN))),
        ("Deadline", value(run.deadline_us.unwrap_or(0))),
        ("DeadlineAtRisk", value(run.deadline_at_risk)),
    ]
    .map(|(name, value)| (name.to_string(), value))
    .into()
}

struct FakeManager(Shared);

#[interface(name = "org.finetuned.Finetuned1.Manager")]
impl FakeManager {
    async fn submit(
        &self,
        spec: String,
        files: HashMap<String, OwnedFd>,
        options: Dictionary,
    ) -> Result<OwnedObjectPath, Error> {
        let (hold, priority) = (bool::try_from(&options["hold"]), i32::try_from(&options["priority"]));
        let name = <&str>::try_from(&options["spec-name"]).unwrap();
        let deadline = options.get("deadline").map(|deadline| u64::try_from(deadline).unwrap());
        let deadline = deadline.map_or(String::new(), |deadline| format!(" deadline={deadline}"));
        self.0.act(format!(
            "Submit hold={} priority={} spec-name={name}{deadline}",
            hold.unwrap(),
            priority.unwrap()
        ))?;
        let mut world = self.0.world();
        world.submitted.push(("spec".into(), spec));
        for (name, file) in files {
            let mut text = String::new();
            // A directory has no text.
            let _ = File::from(std::os::fd::OwnedFd::from(file)).read_to_string(&mut text);
            world.submitted.push((name, text));
        }
        Ok(path(&world.runs[0].id))
    }

    async fn list_runs(&self, _options: Dictionary) -> Vec<Dictionary> {
        self.0.world().runs.iter().map(properties).collect()
    }

    async fn find_run(&self, name: String) -> Result<OwnedObjectPath, Error> {
        let world = self.0.world();
        let found: Vec<&Figures> =
            world.runs.iter().filter(|run| run.name == name || run.id.starts_with(&name)).collect();
        match found[..] {
            [] => Err(Error::NoSuchRun(format!("there is no run {name}"))),
            [one] => Ok(path(&one.id)),
            _ => Err(Error::AmbiguousRun(format!("{name:?} fits several runs"))),
        }
    }

    async fn set_priority(&self, run: OwnedObjectPath, priority: i32) -> Result<(), Error> {
        self.0.act(format!("SetPriority {priority}"))?;
        let mut world = self.0.world();
        let run = world.runs.iter_mut().find(|of| run.as_str().ends_with(&of.id)).unwrap();
        run.priority = priority;
        Ok(())
    }

    async fn inhibit(
        &self,
        what: String,
        who: String,
        why: String,
        _options: Dictionary,
    ) -> Result<OwnedFd, Error> {
        self.0.act(format!("Inhibit {what} {who} {why}"))?;
        let (reader, writer): (PipeReader, PipeWriter) = std::io::pipe().unwrap();
        self.0.world().holds.push(reader);
        Ok(std::os::fd::OwnedFd::from(writer).into())
    }

    async fn list_inhibitors(&self) -> Vec<(String, String, u32, u64)> {
        self.0.world().inhibitors.clone()
    }

    async fn list_models(&self) -> Vec<Dictionary> {
        let model = |(name, bytes): &(&str, u64)| {
            Dictionary::from([
                ("Name".into(), value(name.to_string())),
                ("Directory".into(), value(format!("/models/{name}"))),
                ("Bytes".into(), value(*bytes)),
                ("Architecture".into(), value("LlamaForCausalLM")),
            ])
        };
        self.0.world().models.iter().map(model).collect()
    }

    async fn add_model(&self, name: String, directory: OwnedFd, _options: Dictionary) -> Result<(), Error> {
        let directory = File::from(std::os::fd::OwnedFd::from(directory));
        assert!(directory.metadata().unwrap().is_dir());
        self.0.act(format!("AddModel {name}"))
    }

    async fn remove_model(&self, name: String) -> Result<(), Error> {
        self.0.act(format!("RemoveModel {name}"))
    }

    #[zbus(property)]
    fn version(&self) -> String {
        "0.1.0".into()
    }

    #[zbus(property)]
    fn device(&self) -> String {
        "CPU (2 threads)".into()
    }

    #[zbus(property)]
    fn active_run(&self) -> OwnedObjectPath {
        let none = || OwnedObjectPath::try_from("/").unwrap();
        self.0.world().active.as_ref().map_or_else(none, |id| path(id))
    }

    #[zbus(property)]
    fn state(&self) -> String {
        self.0.world().state.into()
    }

    #[zbus(property)]
    fn reason(&self) -> String {
        self.0.world().reason.into()
    }

    #[zbus(property)]
    fn unfinished_runs(&self) -> u32 {
        self.0.world().runs.iter().filter(|run| !run.is_over()).count() as u32
    }
}

struct FakeGovernor(Shared);

impl FakeGovernor {
    fn set(&self, key: &str, value: Option<&str>, source: &'static str) {
        let mut world = self.0.world();
        let entry = world.budget.iter_mut().find(|(of, ..)| *of == key).unwrap();
        entry.3 = if value.is_some() { source } else { "file" };
        entry.1 = value.unwrap_or(entry.2).to_string();
    }
}

#[interface(name = "org.finetuned.Finetuned1.Governor")]
impl FakeGovernor {
    async fn get_readings(&self) -> Dictionary {
        Dictionary::from([("Notes".into(), value(self.0.world().notes.clone()))])
    }

    async fn get_budget(&self) -> Vec<Dictionary> {
        let text = |text: &str| value(text.to_string());
        let entry = |(key, now, files, source): &(&str, String, &str, &str)| {
            let mut entry = Dictionary::from([
                ("Key".into(), text(key)),
                ("Value".into(), text(now)),
                ("Default".into(), text("\"none\"")),
                ("Files".into(), text(files)),
                ("Source".into(), text(source)),
                (
                    "Place".into(),
                    text(if *source == "file" { "/etc/finetuned/finetuned.toml:3" } else { "" }),
                ),
            ]);
            if ["set", "runtime"].contains(source) {
                entry.insert("Uid".into(), value(1000u32));
                entry.insert("Time".into(), value(NOW_US - 5 * MINUTE));
            }
            entry
        };
        self.0.world().budget.iter().map(entry).collect()
    }

    async fn set_budget(&self, changes: HashMap<String, String>, options: Dictionary) -> Result<(), Error> {
        let runtime = options.contains_key("runtime");
        let mut changes: Vec<_> = changes.into_iter().collect();
        changes.sort();
        self.0.act(format!("SetBudget {changes:?} runtime={runtime}"))?;
        for (key, value) in changes {
            self.set(&key, Some(&format!("{value:?}")), if runtime { "runtime" } else { "set" });
        }
        Ok(())
    }

    async fn reset_budget(&self, keys: Vec<String>) -> Result<(), Error> {
        self.0.act(format!("ResetBudget {keys:?}"))?;
        let all = || self.0.world().budget.iter().map(|(key, ..)| key.to_string()).collect();
        for key in if keys.is_empty() { all() } else { keys } {
            self.set(&key, None, "file");
        }
        Ok(())
    }

    async fn get_night(&self, date: String, _options: Dictionary) -> Result<String, Error> {
        let nights = &self.0.world().nights;
        let found = nights.iter().find(|(wanted, _)| *wanted == date).map(|(_, report)| report.clone());
        found.ok_or_else(|| Error::NoSuchNight(format!("there is no record of the night {date}")))
    }

    async fn list_nights(&self) -> Vec<String> {
        vec!["2023-11-12".into(), "2023-11-13".into()]
    }
}

struct FakeRun(Shared, String);

impl FakeRun {
    fn become_(&self, call: &str, state: &str) -> Result<(), Error> {
        self.0.act(format!("{call} {}", self.1))?;
        let mut world = self.0.world();
        let run = world.runs.iter_mut().find(|run| run.id == self.1).unwrap();
        run.state = state.into();
        run.reason = if state == "queued" { String::new() } else { "user".into() };
        Ok(())
    }

    fn figures(&self) -> Figures {
        self.0.figures(&self.1)
    }
}

#[interface(name = "org.finetuned.Finetuned1.Run")]
impl FakeRun {
    async fn pause(&self, _options: Dictionary) -> Result<(), Error> {
        self.become_("Pause", "saving")
    }

    async fn resume(&self, _options: Dictionary) -> Result<(), Error> {
        self.become_("Resume", "queued")
    }

    async fn cancel(&self, _options: Dictionary) -> Result<(), Error> {
        self.become_("Cancel", "cancelled")
    }

    async fn remove(&self, _options: Dictionary) -> Result<(), Error> {
        self.0.act(format!("Remove {}", self.1))
    }

    async fn checkpoint(&self, _options: Dictionary) -> Result<u64, Error> {
        self.0.act(format!("Checkpoint {}", self.1))?;
        Ok(47)
    }

    async fn evaluate(&self, _options: Dictionary) -> Result<f64, Error> {
        self.0.act(format!("Evaluate {}", self.1))?;
        Ok(1.25)
    }

    async fn set_deadline(&self, deadline: u64) -> Result<(), Error> {
        self.0.act(format!("SetDeadline {} {deadline}", self.1))?;
        let mut world = self.0.world();
        let run = world.runs.iter_mut().find(|run| run.id == self.1).unwrap();
        run.deadline_us = Some(deadline).filter(|deadline| *deadline > 0);
        Ok(())
    }

    async fn wait(&self) -> Result<(String, String), Error> {
        loop {
            let run = self.figures();
            if run.is_over() {
                return Ok((run.state, run.reason));
            }
            self.0.2.notified().await;
        }
    }

    async fn describe(&self) -> Result<Dictionary, Error> {
        let world = self.0.world();
        let details = world.details.as_ref().ok_or_else(|| Error::NotAuthorized("not yours".into()))?;
        Ok(details.iter().map(|(key, text)| (key.to_string(), value(text.clone()))).collect())
    }

    async fn open_metrics(&self, _options: Dictionary) -> Result<OwnedFd, Error> {
        self.0.act(format!("OpenMetrics {}", self.1))?;
        Ok(file(&self.0.world().metrics))
    }

    async fn open_log(&self, _options: Dictionary) -> Result<OwnedFd, Error> {
        self.0.act(format!("OpenLog {}", self.1))?;
        Ok(file(&self.0.world().journal))
    }

    async fn open_adapter(&self, _options: Dictionary) -> Result<HashMap<String, OwnedFd>, Error> {
        self.0.act(format!("OpenAdapter {}", self.1))?;
        Ok([("adapter_config.json", "{}"), ("adapter_model.safetensors", "weights")]
            .map(|(name, text)| (name.to_string(), file(text)))
            .into())
    }

    #[zbus(property)]
    fn id(&self) -> String {
        self.figures().id
    }
    #[zbus(property)]
    fn name(&self) -> String {
        self.figures().name
    }
    #[zbus(property)]
    fn owner(&self) -> u32 {
        self.figures().owner
    }
    #[zbus(property)]
    fn created(&self) -> u64 {
        self.figures().created_us
    }
    #[zbus(property)]
    fn started(&self) -> u64 {
        self.figures().started_us.unwrap_or(0)
    }
    #[zbus(property)]
    fn finished(&self) -> u64 {
        self.figures().finished_us.unwrap_or(0)
    }
    #[zbus(property)]
    fn state(&self) -> String {
        self.0.1.notify_one();
        self.figures().state
    }
    #[zbus(property)]
    fn reason(&self) -> String {
        self.figures().reason
    }
    #[zbus(property)]
    fn priority(&self) -> i32 {
        self.figures().priority
    }
    #[zbus(property)]
    fn step(&self) -> u64 {
        self.figures().step
    }
    #[zbus(property)]
    fn total_steps(&self) -> u64 {
        self.figures().total_steps.unwrap_or(0)
    }
    #[zbus(property)]
    fn epoch(&self) -> f64 {
        self.figures().epoch
    }
    #[zbus(property)]
    fn loss(&self) -> f64 {
        self.figures().loss.unwrap_or(f64::NAN)
    }
    #[zbus(property)]
    fn eval_loss(&self) -> f64 {
        self.figures().eval_loss.unwrap_or(f64::NAN)
    }
    #[zbus(property)]
    fn tokens_per_second(&self) -> f64 {
        self.figures().tokens_per_second.unwrap_or(f64::NAN)
    }
    #[zbus(property)]
    fn progress(&self) -> f64 {
        self.figures().progress
    }
    #[zbus(property)]
    fn remaining_seconds(&self) -> u64 {
        self.figures().remaining_seconds.unwrap_or(u64::MAX)
    }
    #[zbus(property)]
    fn attempts(&self) -> u32 {
        self.figures().attempts
    }
    #[zbus(property)]
    fn checkpoint_step(&self) -> u64 {
        self.figures().checkpoint_step.unwrap_or(u64::MAX)
    }
    #[zbus(property)]
    fn memory_bytes(&self) -> u64 {
        self.figures().memory_bytes
    }
    #[zbus(property)]
    fn energy(&self) -> f64 {
        self.figures().energy_j.unwrap_or(f64::NAN)
    }
    #[zbus(property)]
    fn energy_above_idle(&self) -> f64 {
        self.figures().energy_above_idle_j.unwrap_or(f64::NAN)
    }
    #[zbus(property)]
    fn joules_per_token(&self) -> f64 {
        self.figures().joules_per_token.unwrap_or(f64::NAN)
    }
    #[zbus(property)]
    fn step_energy(&self) -> f64 {
        self.figures().step_energy_j.unwrap_or(f64::NAN)
    }
    #[zbus(property)]
    fn deadline(&self) -> u64 {
        self.figures().deadline_us.unwrap_or(0)
    }
    #[zbus(property)]
    fn deadline_at_risk(&self) -> bool {
        self.figures().deadline_at_risk
    }
}

/// What a command came to.
#[derive(Debug, PartialEq)]
pub struct Ran {
    pub code: u8,
    pub out: String,
    pub err: String,
}

struct Still;

impl Clock for Still {
    fn monotonic(&self) -> Duration {
        Duration::from_secs(1)
    }
    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_micros(NOW_US)
    }
    fn sleep(&self, _: Duration) {}
}

/// The daemon at one end of a socket.
async fn serve(shared: &Shared, socket: UnixStream) -> zbus::Result<Connection> {
    let mut server = zbus::connection::Builder::unix_stream(socket)
        .server(Guid::generate())
        .p2p()
        .serve_at(ROOT, FakeManager(shared.clone()))
        .serve_at(ROOT, FakeGovernor(shared.clone()));
    let ids: Vec<String> = shared.world().runs.iter().map(|run| run.id.clone()).collect();
    for id in ids {
        server = server.serve_at(path(&id), FakeRun(shared.clone(), id));
    }
    server.build().await
}

/// A daemon and a way to run commands against it.
pub struct Bench {
    pub shared: Shared,
    pub interrupt: Arc<Notify>,
    client: Connection,
    server: Connection,
    root: tempfile::TempDir,
}

impl Bench {
    pub async fn new(world: World) -> Bench {
        let shared = Shared(Arc::new(Mutex::new(world)), Arc::default(), Arc::default());
        let (ours, theirs) = UnixStream::pair().unwrap();
        let client = zbus::connection::Builder::unix_stream(ours).p2p();
        let (server, client) = tokio::try_join!(serve(&shared, theirs), client.build()).unwrap();
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/passwd"), "root:x:0:0::/:\nrobot:x:1000:1000::/:\n").unwrap();
        Bench { shared, interrupt: Arc::default(), client, server, root }
    }

    pub fn directory(&self) -> &std::path::Path {
        self.root.path()
    }

    /// Runs a command line.
    pub async fn run(&self, words: &[&str]) -> Ran {
        let words = std::iter::once("finetunectl").chain(words.iter().copied());
        let arguments = <super::Arguments as clap::Parser>::try_parse_from(words).unwrap();
        let text: Arc<Mutex<(String, String)>> = Arc::default();
        let context = Context {
            transport: Transport::Ready(self.client.clone()),
            console: Console::memory(text.clone()),
            clock: Box::new(Still),
            zone: TimeZone::UTC,
            root: self.root.path().into(),
            interrupts: Interrupts::Notified(self.interrupt.clone()),
            ..arguments.global.context()
        };
        let code = super::finish(super::dispatch(&arguments.command, &context).await, &context).0;
        let (out, err) = text.lock().unwrap().clone();
        Ran { code, out, err }
    }

    /// Another connection to the same daemon.
    pub async fn serve(&self, socket: UnixStream) -> Connection {
        serve(&self.shared, socket).await.unwrap()
    }

    /// The daemon goes away.
    pub async fn hang_up(&self) {
        self.server.clone().close().await.unwrap();
        self.client.closed().await;
    }

    /// Returns when somebody has looked at a run, and has had the time to see it.
    pub async fn looked_at(&self) {
        self.shared.1.notified().await;
        tokio::time::sleep(Duration::from_millis(30)).await;
    }

    /// Changes the first run, and tells.
    pub async fn change(&self, change: impl FnOnce(&mut Figures)) {
        let figures = {
            let mut world = self.shared.world();
            change(&mut world.runs[0]);
            world.runs[0].clone()
        };
        let emitter = SignalEmitter::new(&self.server, path(&figures.id)).unwrap();
        let properties = properties(&figures);
        let changed: HashMap<&str, Variant<'_>> =
            properties.iter().map(|(key, value)| (key.as_str(), value.try_clone().unwrap().into())).collect();
        let interface = zbus::names::InterfaceName::try_from(format!("{NAME}.Run")).unwrap();
        zbus::fdo::Properties::properties_changed(&emitter, interface, changed, Cow::Borrowed(&[]))
            .await
            .unwrap();
        self.shared.2.notify_waiters();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
