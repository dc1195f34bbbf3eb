//! `finetuned worker`: one attempt of one run, for the daemon at the other end of standard input.
//!
//! ```text
//!   priorities ─► ready ─► wait for start ─► wait for the run's lock ─► prepare ─► train ─► finished | failed ─► exit
//!                             (30 s)          (an earlier worker may       the gate is the permit
//!                                              still be saving: 60 s)
//! ```
//!
//! | thread | does |
//! |---|---|
//! | main | trains |
//! | `daemon` | hears the daemon, and notices when it does not: after [`SILENCE`] it stops the run, after [`ORPHANED`] it ends the process, whatever the others do |
//! | `beat` | tells once a second that the worker is alive |
//! | `signals` | SIGTERM stops the run; SIGINT and SIGHUP are for the daemon, which shares the terminal |
//!
//! Standard output says nothing, standard error is the log. A panic ends the process; the daemon sees it end.

use super::failure::{self, shortened};
use super::link::{Link, PermitGate, Stop, Teller};
use super::priorities::Priorities;
use super::protocol::{Failed, Finished, ORPHANED, Ready, Report, SILENCE, Start, VERSION};
use super::survey;
use super::wire::{Input, Output, WireError};
use crate::backend::cuda;
use crate::checkpoint::LockError;
use crate::clock::SystemClock;
use crate::config::spec::Spec;
use crate::reason::Reason;
use crate::train::device;
use crate::train::run::{Outcome, RunError, RunPaths, run};
use rustix::net::{AddressFamily, SocketType, sockopt};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// How long the worker waits for `start`.
const START: Duration = Duration::from_secs(30);

/// How long it waits for an earlier worker of the run to end.
const LOCK: Duration = Duration::from_secs(60);

/// How often it looks whether it has.
const LOOK: Duration = Duration::from_millis(100);

/// How often the `daemon` thread looks at the clock.
const PATIENCE: Duration = Duration::from_millis(250);

/// Why the process is no worker.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Nobody is there to work for.
    #[error(
        "standard input is not a stream UNIX socket: `finetuned worker` is started by the daemon; to train in the \
         foreground use `finetuned run`"
    )]
    NoSocket,
    /// The system refused.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn system(what: &'static str) -> impl Fn(io::Error) -> WorkerError {
    move |source| WorkerError::System { what, source }
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Complete, or stopped with its state saved.
    Well,
    /// With a failure, of which the daemon was told.
    Badly,
}

/// Works for the daemon at standard input. Call it before any thread is started.
pub fn main(priorities: Priorities) -> Result<Ended, WorkerError> {
    let refused = priorities.apply();
    let stream = take_standard_input()?;
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(system("listen to signals"))?;
    let clone = stream.try_clone().map_err(system("share the connection"))?;
    let output = Output::new(clone).map_err(system("set up the connection"))?;
    let input = Input::new(stream, PATIENCE).map_err(system("set up the connection"))?;
    let link = Arc::new(Link::new(output, Box::new(SystemClock::new())));

    link.say(&Report::Ready(Ready { version: VERSION, pid: std::process::id(), device: device::device() }));
    for text in refused {
        tracing::warn!("{text}");
        link.say(&Report::Note { text });
    }
    let teller = link.clone();
    cuda::failure::set_last_word(Box::new(move |error| {
        let failed = failure::of_device(error);
        tracing::error!("{}: {}", failed.reason, failed.message);
        teller.last_word(&Report::Failed(failed));
        failure::exit_code(error)
    }));
    spawn("daemon", &link, move |link| listen(link, input))?;
    spawn("signals", &link, move |link| obey(link, signals))?;
    spawn("beat", &link, Link::beat)?;

    let last = match attempt(&link) {
        Ok(finished) => Report::Finished(finished),
        Err(failed) => Report::Failed(Failed { message: shortened(failed.message), ..failed }),
    };
    if let Report::Failed(Failed { reason, message, .. }) = &last {
        tracing::error!("{reason}: {message}");
    }
    link.last_word(&last);
    Ok(if matches!(last, Report::Finished(_)) { Ended::Well } else { Ended::Badly })
}

/// The socket at standard input, which is empty from now on; so is standard output.
fn take_standard_input() -> Result<UnixStream, WorkerError> {
    let stdin = io::stdin();
    let is_stream = sockopt::socket_domain(stdin.as_fd()) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(stdin.as_fd()) == Ok(SocketType::STREAM);
    if !is_stream {
        return Err(WorkerError::NoSocket);
    }
    let socket = stdin.as_fd().try_clone_to_owned().map_err(system("take the connection"))?;
    let stream = UnixStream::from(socket);
    // Whoever accepted it may have left it otherwise.
    stream.set_nonblocking(false).map_err(system("set up the connection"))?;
    let null = File::options().read(true).write(true).open("/dev/null").map_err(system("open /dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(io::Error::from).map_err(system("close standard input"))?;
    rustix::stdio::dup2_stdout(&null).map_err(io::Error::from).map_err(system("close standard output"))?;
    Ok(stream)
}

fn spawn(name: &str, link: &Arc<Link>, work: impl FnOnce(&Link) + Send + 'static) -> Result<(), WorkerError> {
    let link = link.clone();
    let thread = std::thread::Builder::new().name(name.into()).spawn(move || work(&link));
    thread.map(drop).map_err(system("start a thread"))
}

/// Hears the daemon until the process ends.
fn listen(link: &Link, mut input: Input) {
    let lost = || Stop { reason: Reason::DaemonLost, failure: None };
    let mut heard = link.clock().monotonic();
    let mut open = true;
    loop {
        if !open {
            link.clock().sleep(PATIENCE);
        } else {
            match input.request() {
                Ok(Some(request)) => {
                    heard = link.clock().monotonic();
                    link.receive(request);
                }
                Ok(None) => {}
                Err(error) => {
                    open = false;
                    link.stop(match error {
                        WireError::Closed | WireError::Cut { .. } => lost(),
                        error => Stop { reason: Reason::Protocol, failure: Some(error.to_string()) },
                    });
                }
            }
        }
        let silence = link.clock().monotonic().saturating_sub(heard);
        if silence >= ORPHANED {
            tracing::error!("nothing heard from the daemon for {} s: the worker ends", silence.as_secs());
            std::process::exit(1);
        }
        if open && silence >= SILENCE {
            link.stop(lost());
        }
    }
}

/// Obeys signals until the process ends.
fn obey(link: &Link, mut signals: Signals) {
    for signal in signals.forever() {
        if signal == SIGTERM {
            link.stop(Stop { reason: Reason::Shutdown, failure: None });
        }
    }
}

/// The attempt, from `start` to the last word.
fn attempt(link: &Link) -> Result<Finished, Failed> {
    let failed = |reason, message: String, retry| Failed { reason, message, retry };
    let Some(start) = link.wait_for_start(START) else {
        let message = format!("the daemon has not sent `start` within {} s", START.as_secs());
        return Err(failed(Reason::Protocol, message, true));
    };
    if start.version != VERSION {
        let message = format!(
            "the daemon speaks version {} of the worker's protocol, this worker version {VERSION}: they are of two \
             installations; restart the daemon",
            start.version
        );
        return Err(failed(Reason::Protocol, message, false));
    }
    if let Some(threads) = start.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        pool.map_err(|error| {
            failed(Reason::Launch, format!("cannot start {threads} threads: {error}"), true)
        })?;
    }
    let spec = Spec::parse(&start.spec, &format!("{}.toml", start.run), &start.directory, &[]);
    let spec = spec.map_err(|error| failure::of_spec(&error))?;
    if let Some(order) = start.survey {
        return survey::survey(&spec, &start, order, link);
    }
    match run_when_free(&spec, &start, link) {
        Ok(Outcome::Finished { summary, .. }) => Ok(Finished::Complete { summary }),
        // What stopped it may be a failure of its own, for all that the state is saved.
        Ok(Outcome::Stopped { reason, .. }) => match link.stopped().and_then(|stop| stop.failure) {
            Some(message) => Err(failed(reason, message, true)),
            None => Ok(Finished::Stopped { reason }),
        },
        Err(error) => Err(failure::of_run(&error)),
    }
}

/// Runs, as soon as an earlier worker of the same run (its daemon was killed, perhaps, and it still saves) has ended.
fn run_when_free(spec: &Spec, start: &Start, link: &Link) -> Result<Outcome, RunError> {
    let paths = RunPaths { output: start.directory.clone(), cache: start.cache.clone() };
    let deadline = link.clock().monotonic() + LOCK;
    loop {
        match run(spec, &paths, true, &mut PermitGate::new(link), &mut Teller(link), link.clock()) {
            Err(RunError::Lock(LockError::Held { .. })) if link.clock().monotonic() < deadline => {
                link.tick();
                link.clock().sleep(LOOK);
            }
            outcome => return outcome,
        }
    }
}
