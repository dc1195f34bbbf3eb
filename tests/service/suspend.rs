//! The machine sleeps and goes down: a logind that keeps to the real one's rules, on a private bus.

use crate::daemon::{
    Bus, Daemon, PATIENCE, Transport, alive, block_on, eventually, name, reaches, signal, submit,
};
use crate::fixture::{Bits, checkpoints, shared};
use crate::plan::{plan, stop_worker};
use finetuned::bus::RunProxy;
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use zbus::{Connection, OwnedFd, fdo, interface};

const NAME: &str = "org.freedesktop.login1";
const PATH: &str = "/org/freedesktop/login1";

/// Descriptors of one lock: for sleep, and for shutdown.
const LOCK: usize = 2;

const ENDLESS: &[&str] = &["train.max_steps=100000", "train.checkpoint_every=0", "train.evaluate_every=0"];

/// Who may do what is not the subject: this works for any user.
const OWNER: &str = "[authorization]\nmethod = \"owner\"\n";

/// What logind keeps: its ends of the locks, and what it is about to do.
#[derive(Default)]
struct Kept {
    locks: Vec<std::os::fd::OwnedFd>,
    asked: Vec<[String; 4]>,
    limit: Duration,
    sleep: bool,
    shutdown: bool,
}

struct Manager(Arc<Mutex<Kept>>);

#[interface(name = "org.freedesktop.login1.Manager")]
impl Manager {
    fn inhibit(&self, what: String, who: String, why: String, mode: String) -> fdo::Result<OwnedFd> {
        if !["sleep", "shutdown"].contains(&what.as_str()) {
            // For several at once the real one asks polkit for inhibit-handle-lid-switch, which a service does not get.
            return Err(fdo::Error::AccessDenied("Permission denied".into()));
        }
        let mut kept = self.0.lock().unwrap();
        if kept.sleep || kept.shutdown {
            return Err(fdo::Error::Failed("the operation is already running".into()));
        }
        let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        kept.locks.push(ours);
        kept.asked.push([what, who, why, mode]);
        Ok(theirs.into())
    }

    #[zbus(property, name = "InhibitDelayMaxUSec")]
    fn inhibit_delay_max_usec(&self) -> u64 {
        self.0.lock().unwrap().limit.as_micros() as u64
    }

    #[zbus(property)]
    fn preparing_for_sleep(&self) -> bool {
        self.0.lock().unwrap().sleep
    }

    #[zbus(property)]
    fn preparing_for_shutdown(&self) -> bool {
        self.0.lock().unwrap().shutdown
    }
}

/// A logind.
struct Logind {
    connection: Connection,
    kept: Arc<Mutex<Kept>>,
}

impl Logind {
    async fn start(bus: &Bus, limit: Duration) -> Logind {
        let kept = Arc::new(Mutex::new(Kept { limit, ..Kept::default() }));
        let connection = zbus::connection::Builder::address(bus.address.as_str())
            .serve_at(PATH, Manager(kept.clone()))
            .name(NAME)
            .build()
            .await
            .unwrap();
        Logind { connection, kept }
    }

    /// Locks that are not closed.
    fn locks(&self) -> usize {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        self.kept.lock().unwrap().locks.retain(|lock| {
            let mut asked = [PollFd::new(lock, PollFlags::IN)];
            poll(&mut asked, Some(&now)).unwrap();
            !asked[0].revents().contains(PollFlags::HUP)
        });
        self.kept.lock().unwrap().locks.len()
    }

    async fn is_locked(&self) {
        eventually("the lock", || async { (self.locks() == LOCK).then_some(()) }).await;
    }

    async fn tell(&self, signal: &str, start: bool) {
        {
            let mut kept = self.kept.lock().unwrap();
            match signal {
                "PrepareForSleep" => kept.sleep = start,
                _ => kept.shutdown = start,
            }
        }
        let no: Option<&str> = None;
        let interface = "org.freedesktop.login1.Manager";
        self.connection.emit_signal(no, PATH, interface, signal, &start).await.unwrap();
    }

    /// Says what is coming and waits until every lock is closed; how long it took, within what is allowed.
    async fn prepare(&self, signal: &str) -> Duration {
        self.is_locked().await;
        let began = Instant::now();
        self.tell(signal, true).await;
        let limit = self.kept.lock().unwrap().limit;
        while self.locks() > 0 {
            assert!(began.elapsed() < limit, "the machine sleeps although there is a lock");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        began.elapsed()
    }
}

/// A bus with a logind, and a daemon on it.
fn with_logind<F: Future<Output = ()>>(limit: u64, test: impl FnOnce(Daemon, Logind) -> F) {
    let Some(bus) = bus() else { return };
    // One for all of it: a connection lives in the runtime that made it.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let logind = runtime.block_on(Logind::start(&bus, Duration::from_secs(limit)));
    let daemon = Daemon::start_on(Transport::Bus(bus.address.clone()), OWNER);
    runtime.block_on(test(daemon, logind));
}

fn bus() -> Option<Bus> {
    Bus::start(&format!("<allow own=\"{NAME}\"/><allow send_destination=\"{NAME}\"/>"))
}

async fn submitted(daemon: &Daemon, overrides: &[&str]) -> RunProxy<'static> {
    let manager = daemon.manager().await;
    let path = submit(&manager, shared(), overrides, HashMap::new()).await.unwrap();
    daemon.run(&manager, &path).await
}

/// The number of steps in the newest checkpoint.
fn saved(daemon: &Daemon, run: &RunProxy<'static>) -> Option<u64> {
    let newest = checkpoints(&daemon.run_directory(&id(run))).pop()?;
    newest.file_name()?.to_str()?.get(..8)?.parse().ok()
}

fn id(run: &RunProxy<'static>) -> String {
    run.inner().path().as_str().rsplit('/').next().unwrap().to_string()
}

#[test]
fn twenty_suspends_change_no_bit_and_none_comes_before_the_checkpoint() {
    with_logind(60, |daemon, logind| async move {
        logind.is_locked().await;
        for (what, asked) in ["sleep", "shutdown"].iter().zip(&logind.kept.lock().unwrap().asked) {
            assert_eq!([&asked[0], &asked[1], &asked[3]], [what, "finetuned", "delay"]);
        }
        let steps = ["train.max_steps=400", "train.checkpoint_every=0", "train.evaluate_every=0"];
        let run = submitted(&daemon, &steps).await;
        let mut took = Vec::new();
        for n in 0..20u64 {
            // Every third while the next worker prepares, the others while it trains: the generator of Knuth.
            let pause =
                n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407) >> 56;
            reaches(&run, if n % 3 == 2 { &["preparing", "running"] } else { &["running"] }).await;
            tokio::time::sleep(Duration::from_millis(pause)).await;
            let before = run.step().await.unwrap();
            took.push(logind.prepare("PrepareForSleep").await);
            assert!(daemon.workers().is_empty(), "a worker is left in a sleeping machine");
            assert!(saved(&daemon, &run).unwrap_or(0) >= before, "less is saved than was trained");
            let state = (run.state().await.unwrap(), run.reason().await.unwrap());
            assert_eq!(state, ("waiting".into(), "suspend".into()));
            if n % 5 == 0 {
                tokio::time::sleep(Duration::from_millis(1500)).await;
                assert!(daemon.workers().is_empty(), "something begins in a sleeping machine");
            }
            logind.tell("PrepareForSleep", false).await;
        }
        took.sort();
        println!("saved and gone within {:.0?} (median of 20), {:.0?} (longest)", took[10], took[19]);
        reaches(&run, &["succeeded"]).await;
        let output = shared().output();
        shared().finish(&shared().spec(&steps), output.path(), false);
        assert_eq!(Bits::of(&daemon.run_directory(&id(&run))), Bits::of(output.path()));
    });
}

#[test]
fn a_worker_that_cannot_save_does_not_keep_the_machine_awake() {
    with_logind(4, |daemon, logind| async move {
        let run = submitted(&daemon, ENDLESS).await;
        reaches(&run, &["running"]).await;
        run.checkpoint(HashMap::new()).await.unwrap();
        let worker = daemon.workers()[0];
        signal(worker, "STOP");
        let took = logind.prepare("PrepareForSleep").await;
        assert!(took > Duration::from_secs(2), "it was given up after {took:?}");
        assert!(daemon.log().contains("InhibitDelayMaxSec"), "nothing is said");
        assert_eq!(run.state().await.unwrap(), "saving");
        // It wakes in the middle of it, saves, and the next one begins.
        logind.tell("PrepareForSleep", false).await;
        signal(worker, "CONT");
        reaches(&run, &["running"]).await;
        assert_ne!(daemon.workers(), [worker]);
        logind.is_locked().await;
    });
}

#[test]
fn a_shutdown_may_be_called_off() {
    with_logind(60, |daemon, logind| async move {
        let run = submitted(&daemon, ENDLESS).await;
        reaches(&run, &["running"]).await;
        logind.prepare("PrepareForShutdown").await;
        assert_eq!(run.reason().await.unwrap(), "shutdown");
        // A sleep that comes and goes meanwhile ends nothing.
        logind.tell("PrepareForSleep", true).await;
        logind.tell("PrepareForSleep", false).await;
        tokio::time::sleep(Duration::from_millis(1200)).await;
        assert_eq!(run.state().await.unwrap(), "waiting");
        logind.tell("PrepareForShutdown", false).await;
        reaches(&run, &["running"]).await;
        logind.is_locked().await;
    });
}

#[test]
fn the_worker_of_a_plan_is_gone_before_the_machine_sleeps() {
    with_logind(60, |daemon, logind| async move {
        let manager = daemon.manager().await;
        let asleep = async {
            let worker = stop_worker(&daemon).await;
            logind.prepare("PrepareForSleep").await;
            assert!(!alive(worker), "a worker is left in a sleeping machine");
        };
        let (planned, ()) = tokio::join!(plan(&manager, false), asleep);
        assert_eq!(name(planned), "Busy");
    });
}

#[test]
fn a_logind_that_starts_again_gives_a_new_lock_and_holds_nothing() {
    with_logind(60, |daemon, logind| async move {
        let run = submitted(&daemon, ENDLESS).await;
        reaches(&run, &["running"]).await;
        logind.is_locked().await;
        // Between two sleeps: the lock is taken anew, and the old one closed.
        logind.connection.release_name(NAME).await.unwrap();
        logind.connection.request_name(NAME).await.unwrap();
        let asked = || logind.kept.lock().unwrap().asked.len();
        eventually("a new lock", || async { (asked() == 2 * LOCK && logind.locks() == LOCK).then_some(()) })
            .await;
        assert_eq!(run.state().await.unwrap(), "running");
        // In the middle of one, which it forgets.
        logind.prepare("PrepareForSleep").await;
        logind.connection.release_name(NAME).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(run.state().await.unwrap(), "waiting", "a restart is no end of the sleep");
        logind.kept.lock().unwrap().sleep = false;
        logind.connection.request_name(NAME).await.unwrap();
        reaches(&run, &["running"]).await;
        logind.is_locked().await;
        // It goes in the middle of one and does not come back.
        logind.prepare("PrepareForSleep").await;
        logind.connection.release_name(NAME).await.unwrap();
        let gone = Instant::now();
        reaches(&run, &["running"]).await;
        assert!(gone.elapsed() > Duration::from_secs(5));
    });
}

#[test]
fn without_logind_everything_goes_on_and_one_that_comes_later_is_found() {
    let Some(bus) = bus() else { return };
    let daemon = Daemon::start_on(Transport::Bus(bus.address.clone()), OWNER);
    block_on(async {
        let run = submitted(&daemon, ENDLESS).await;
        reaches(&run, &["running"]).await;
        let logind = Logind::start(&bus, PATIENCE).await;
        logind.prepare("PrepareForSleep").await;
        assert_eq!(run.reason().await.unwrap(), "suspend");
        logind.tell("PrepareForSleep", false).await;
        reaches(&run, &["running"]).await;
        run.cancel(HashMap::new()).await.unwrap();
        run.wait().await.unwrap();
    });
}

#[test]
fn a_stranger_does_not_put_the_daemon_to_sleep() {
    let Some(bus) = bus() else { return };
    let daemon = Daemon::start_on(Transport::Bus(bus.address.clone()), OWNER);
    block_on(async {
        let run = submitted(&daemon, ENDLESS).await;
        reaches(&run, &["running"]).await;
        let logind = Logind::start(&bus, PATIENCE).await;
        logind.is_locked().await;
        let stranger = daemon.connection().await.unwrap();
        let no: Option<&str> = None;
        let interface = "org.freedesktop.login1.Manager";
        stranger.emit_signal(no, PATH, interface, "PrepareForSleep", &true).await.unwrap();
        tokio::time::sleep(Duration::from_millis(700)).await;
        assert_eq!((logind.locks(), run.state().await.unwrap()), (LOCK, "running".into()));
    });
}
