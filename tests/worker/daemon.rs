//! The daemon's side, scripted: it renews a permit, or not, and listens until something happens.

use crate::fixture::{Fixture, checkpoints, shared};
use finetuned::clock::{Clock, SystemClock};
use finetuned::worker::launch::{ChildLauncher, Exit, Launcher, Process, Worker};
use finetuned::worker::priorities::Priorities;
use finetuned::worker::protocol::{
    Beat, Finished, PERMIT, Permit, Phase, Ready, Report, Request, Start, VERSION,
};
use finetuned::worker::wire::{Connection, WireError};
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_finetuned");

/// Longer than anything here takes, on a busy machine too.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How often the permit is renewed here.
const RENEWAL: Duration = Duration::from_millis(100);

/// A run that does not end by itself within a test: micro-steps of one sequence, no evaluation after the first.
pub const LONG: [&str; 5] = [
    "train.max_steps=100000",
    "train.micro_batch_size=1",
    "train.gradient_accumulation_steps=8",
    "train.evaluate_every=0",
    "train.checkpoint_every=0",
];

/// What the daemon sends while it listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// Permits to compute.
    Run,
    /// Permits not to.
    Hold,
    /// Nothing at all.
    Silence,
}

/// One daemon and its worker.
pub struct Daemon {
    pub runtime: Runtime,
    pub connection: Option<Connection>,
    pub process: Process,
    pub leave: Leave,
    /// Everything that was reported, with the moment.
    pub heard: Vec<(Instant, Report)>,
}

impl Daemon {
    /// A worker as a child.
    pub fn start() -> Daemon {
        let priorities = Priorities::default();
        Daemon::launch(&ChildLauncher::new(PROGRAM.into(), priorities))
    }

    /// A worker from a launcher.
    pub fn launch(launcher: &dyn Launcher) -> Daemon {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let Worker { connection, process } = runtime.block_on(launcher.launch()).unwrap();
        Daemon { runtime, connection: Some(connection), process, leave: Leave::Hold, heard: Vec::new() }
    }

    /// A worker that was told to run the fixture into `output`.
    pub fn running(output: &Path, overrides: &[&str], leave: Leave) -> Daemon {
        let mut daemon = Daemon::start();
        daemon.ready();
        daemon.send(&start(shared(), output, overrides));
        daemon.leave = leave;
        daemon
    }

    /// A worker that has trained a step of the long run.
    pub fn in_training(output: &Path) -> Daemon {
        let mut daemon = Daemon::running(output, &LONG, Leave::Run);
        daemon.until(|report| matches!(report, Report::Step(_)));
        daemon
    }

    pub fn ready(&mut self) -> Ready {
        match self.next().unwrap() {
            Report::Ready(ready) => ready,
            other => panic!("{other:?} before ready"),
        }
    }

    pub fn send(&mut self, request: &Request) {
        // The socket must be registered with the runtime that is entered.
        let _guard = self.runtime.enter();
        self.connection.as_mut().unwrap().send(request).unwrap();
    }

    /// The next report, or how the conversation ended; renews the permit meanwhile.
    pub fn next(&mut self) -> Result<Report, WireError> {
        self.next_within(PATIENCE).unwrap_or_else(|| panic!("nothing for {PATIENCE:?}: {:#?}", self.heard))
    }

    /// The next report within some time.
    pub fn next_within(&mut self, patience: Duration) -> Option<Result<Report, WireError>> {
        let deadline = Instant::now() + patience;
        let leave = self.leave;
        let connection = self.connection.as_mut().unwrap();
        let found = self.runtime.block_on(async {
            loop {
                if leave != Leave::Silence {
                    let until = SystemClock::new().monotonic() + PERMIT;
                    let (run, until_ms) = (leave == Leave::Run, until.as_millis() as u64);
                    let permit = Permit { run, duty: 1.0, until_ms, hold: 0 };
                    connection.send(&Request::Permit(permit)).unwrap();
                }
                let left = deadline.checked_duration_since(Instant::now())?;
                if let Ok(found) = tokio::time::timeout(left.min(RENEWAL), connection.next()).await {
                    return Some(found);
                }
            }
        });
        if let Some(Ok(report)) = &found {
            self.heard.push((Instant::now(), report.clone()));
        }
        found
    }

    /// Listens until a report is what is waited for.
    pub fn until(&mut self, wanted: impl Fn(&Report) -> bool) -> Report {
        loop {
            match self.next() {
                Ok(report) if wanted(&report) => return report,
                Ok(report @ (Report::Failed(_) | Report::Finished(_))) => panic!("{report:?}"),
                Ok(_) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Listens for a while; what was reported.
    pub fn during(&mut self, time: Duration) -> Vec<Report> {
        let deadline = Instant::now() + time;
        let from = self.heard.len();
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match self.next_within(left) {
                Some(Ok(_)) => {}
                Some(Err(error)) => panic!("{error}"),
                None => break,
            }
        }
        self.heard[from..].iter().map(|(_, report)| report.clone()).collect()
    }

    /// Listens to the end: the last word. The connection is closed after it.
    pub fn last_word(&mut self) -> Report {
        loop {
            let report = self.next().unwrap();
            if matches!(report, Report::Failed(_) | Report::Finished(_)) {
                let end = self.next();
                assert!(matches!(end, Err(WireError::Closed)), "{end:?} after the last word");
                return report;
            }
        }
    }

    /// Listens to the end of a run that completes.
    pub fn complete(&mut self) {
        let last = self.last_word();
        assert!(matches!(last, Report::Finished(Finished::Complete { .. })), "{last:?}");
        assert_eq!(self.exit(), Exit::Code(0));
    }

    /// How the process ended.
    pub fn exit(&mut self) -> Exit {
        self.runtime.block_on(async {
            tokio::time::timeout(PATIENCE, self.process.wait()).await.expect("the worker does not end")
        })
    }

    /// A signal.
    pub fn signal(&self, signal: Signal) {
        let pid = self.process.id().unwrap();
        kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
    }

    /// How many steps were reported.
    pub fn steps(&self) -> usize {
        self.heard.iter().filter(|(_, report)| matches!(report, Report::Step(_))).count()
    }
}

impl Drop for Daemon {
    /// Where a test has failed.
    fn drop(&mut self) {
        self.process.kill();
    }
}

/// The request that starts a run of the fixture.
pub fn start(fixture: &Fixture, output: &Path, overrides: &[&str]) -> Request {
    Request::Start(Start {
        version: VERSION,
        run: "tiny".into(),
        directory: output.to_path_buf(),
        cache: fixture.path("cache-of-the-worker"),
        spec: fixture.spec(overrides).to_toml(),
        threads: Some(2),
        survey: None,
    })
}

pub fn is_parked(report: &Report) -> bool {
    matches!(report, Report::Beat(Beat { phase: Phase::Parked, .. }))
}

/// There is a checkpoint, and nothing half written beside it.
pub fn assert_saved(output: &Path) {
    assert!(!checkpoints(output).is_empty(), "{} has no checkpoint", output.display());
    for directory in [output.to_path_buf(), output.join("checkpoints")] {
        for entry in std::fs::read_dir(directory).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(!name.starts_with(".tmp-") && !name.starts_with(".old-"), "{name} is left");
        }
    }
}
