//! What the threads of a worker share: the permit and the requests that came, the progress that the beats tell, and the
//! right to the last word.
//!
//! ```text
//!             start, prepared               stop, or the end of the run
//!   harmless ───────────────► training ────────────────────────────────► over
//!       │                                                                 ▲
//!       └── stop: there is nothing to save; the process ends at once ─────┘
//! ```
//!
//! Whoever makes the step to `over` says the last word; nobody says anything after it.

use super::failure::shortened;
use super::protocol::{BEAT, Beat, Failed, Finished, PERMIT, Permit, Phase, Report, Request, Start, Started};
use super::wire::{Output, WireError};
use crate::clock::Clock;
use crate::reason::Reason;
use crate::train::gate::{self, Gate, Pace};
use crate::train::observer::{Event, Observer};
use crate::train::prepare;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a parked trainer sleeps when nothing happens.
const NAP: Duration = Duration::from_millis(500);

/// Smallest duty that is kept to; a daemon that wants less gives no permit.
const SMALLEST_DUTY: f64 = 0.01;

/// What the threads share.
pub struct Link {
    clock: Box<dyn Clock>,
    asked: Mutex<Asked>,
    /// Something in [`Asked`] has changed.
    changed: Condvar,
    progress: Mutex<Progress>,
    /// Closed after the last word, or when nobody listens.
    output: Mutex<Option<Output>>,
}

/// What came from the daemon.
struct Asked {
    stage: Stage,
    start: Option<Start>,
    /// Until when there is leave to compute; zero for none.
    until: Duration,
    /// Share of the time that may be computed.
    duty: f64,
    /// Number of the hold; zero while there is none.
    hold: u64,
    requests: VecDeque<gate::Request>,
    stop: Option<Stop>,
}

/// See the head of this file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Harmless,
    Training,
    Over,
}

/// Why the worker ends before its run does.
#[derive(Clone, Debug)]
pub struct Stop {
    /// The reason.
    pub reason: Reason,
    /// What went wrong, where something did.
    pub failure: Option<String>,
}

impl Stop {
    /// The last word of a worker that has stopped.
    pub fn last_word(self) -> Report {
        let Stop { reason, failure } = self;
        match failure {
            None => Report::Finished(Finished::Stopped { reason }),
            Some(message) => Report::Failed(Failed { reason, message, retry: true }),
        }
    }
}

/// What the beats tell.
#[derive(Clone, Copy)]
struct Progress {
    phase: Phase,
    ticks: u64,
    step: u64,
    done: u64,
    of: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    /// A link that speaks into `output`.
    pub fn new(output: Output, clock: Box<dyn Clock>) -> Link {
        let asked = Asked {
            stage: Stage::Harmless,
            start: None,
            until: Duration::ZERO,
            duty: 1.0,
            hold: 0,
            requests: VecDeque::new(),
            stop: None,
        };
        let progress = Progress { phase: Phase::Starting, ticks: 0, step: 0, done: 0, of: 0 };
        Link {
            clock,
            asked: Mutex::new(asked),
            changed: Condvar::new(),
            progress: Mutex::new(progress),
            output: Mutex::new(Some(output)),
        }
    }

    /// The time.
    pub fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    /// A request came.
    pub fn receive(&self, request: Request) {
        let mut asked = lock(&self.asked);
        match request {
            Request::Start(start) if asked.start.is_none() && asked.stage == Stage::Harmless => {
                asked.start = Some(start);
            }
            Request::Start(_) => {
                drop(asked);
                let failure = Some("the daemon sent `start` twice".to_string());
                return self.stop(Stop { reason: Reason::Protocol, failure });
            }
            Request::Permit(Permit { run: false, hold, .. }) => {
                (asked.until, asked.hold) = (Duration::ZERO, hold);
            }
            // However far ahead it says: a daemon that fails must not leave us running.
            Request::Permit(Permit { until_ms, duty, .. }) => {
                asked.duty = if duty.is_finite() { duty.clamp(SMALLEST_DUTY, 1.0) } else { SMALLEST_DUTY };
                asked.until = Duration::from_millis(until_ms).min(self.clock.monotonic() + PERMIT);
                asked.hold = 0;
            }
            Request::Checkpoint { request } => asked.requests.push_back(gate::Request::Checkpoint(request)),
            Request::Evaluate { request } => asked.requests.push_back(gate::Request::Evaluate(request)),
            Request::Stop { reason } => {
                drop(asked);
                return self.stop(Stop { reason, failure: None });
            }
        }
        drop(asked);
        self.changed.notify_all();
    }

    /// Stops the run; of several stops the first counts. Ends the process where there is nothing to save.
    pub fn stop(&self, stop: Stop) {
        let mut asked = lock(&self.asked);
        let harmless = asked.stage == Stage::Harmless;
        let stop = asked.stop.get_or_insert(stop).clone();
        drop(asked);
        self.changed.notify_all();
        if harmless {
            let code = i32::from(stop.failure.is_some());
            self.last_word(&stop.last_word());
            std::process::exit(code);
        }
    }

    /// The stop that came, if one did.
    pub fn stopped(&self) -> Option<Stop> {
        lock(&self.asked).stop.clone()
    }

    /// Waits for `start`.
    pub fn wait_for_start(&self, patience: Duration) -> Option<Start> {
        let asked = lock(&self.asked);
        let waited = self.changed.wait_timeout_while(asked, patience, |asked| asked.start.is_none());
        let (asked, _) = waited.unwrap_or_else(PoisonError::into_inner);
        asked.start.clone()
    }

    /// From now on there is something to save.
    fn training_starts(&self) {
        let mut asked = lock(&self.asked);
        if asked.stage == Stage::Over {
            drop(asked);
            wait_for_the_end();
        }
        asked.stage = Stage::Training;
    }

    /// Says something. Nothing is said after the last word, or when nobody listens any more; whether anything can be
    /// said after this.
    pub fn say(&self, report: &Report) -> bool {
        let mut output = lock(&self.output);
        let Some(open) = output.as_mut() else { return false };
        match open.send(report) {
            Ok(()) => true,
            Err(error @ WireError::Unsendable { .. }) => {
                tracing::error!("{error}");
                true
            }
            Err(error) => {
                *output = None;
                drop(output);
                tracing::warn!("the daemon cannot be told anything any more: {error}");
                self.stop(Stop { reason: Reason::DaemonLost, failure: None });
                false
            }
        }
    }

    /// Says something and closes the connection. The first last word is the last; a thread that comes too late waits
    /// here for the end of the process.
    pub fn last_word(&self, report: &Report) {
        let mut asked = lock(&self.asked);
        let late = asked.stage == Stage::Over;
        asked.stage = Stage::Over;
        drop(asked);
        if late {
            wait_for_the_end();
        }
        let mut output = lock(&self.output);
        let Some(mut open) = output.take() else { return };
        let sent = open.send(report).or_else(|error| match error {
            WireError::Unsendable { .. } => {
                let message = format!("the result cannot be told: {error}");
                open.send(&Report::Failed(Failed { reason: Reason::Protocol, message, retry: false }))
            }
            error => Err(error),
        });
        if let Err(error) = sent {
            tracing::warn!("the daemon does not hear how the attempt ended: {error}");
        }
        open.close();
    }

    /// The trainer's thread is alive.
    pub fn tick(&self) {
        lock(&self.progress).ticks += 1;
    }

    /// Beats until nobody listens.
    pub fn beat(&self) {
        loop {
            let Progress { phase, ticks, step, done, of } = *lock(&self.progress);
            let memory = prepare::resident_memory().map_or(0, |bytes| bytes.0);
            if !self.say(&Report::Beat(Beat { phase, ticks, step, done, of, memory })) {
                return;
            }
            self.clock.sleep(BEAT);
        }
    }

    fn progress(&self, phase: Phase, done: u64, of: u64) {
        let mut progress = lock(&self.progress);
        *progress = Progress { phase, ticks: progress.ticks + 1, step: progress.step, done, of };
    }

    fn enter(&self, phase: Phase) {
        let mut progress = lock(&self.progress);
        progress.phase = phase;
        progress.ticks += 1;
    }

    fn at_step(&self, step: u64) {
        lock(&self.progress).step = step;
    }
}

/// Another thread has said the last word and ends the process.
fn wait_for_the_end() -> ! {
    loop {
        std::thread::park();
    }
}

/// The gate over the daemon's permit.
pub struct PermitGate<'a> {
    link: &'a Link,
    /// When the piece of work that was let through last began.
    began: Option<Duration>,
    /// When it ended, and how long it took: what the rest is reckoned from.
    ended: Option<(Duration, Duration)>,
    /// The hold under which the daemon was told that the trainer is parked.
    told: u64,
}

impl<'a> PermitGate<'a> {
    /// A gate over what comes through `link`.
    pub fn new(link: &'a Link) -> PermitGate<'a> {
        PermitGate { link, began: None, ended: None, told: 0 }
    }

    /// How much of the rest after the last piece of work is left, with this duty.
    fn rest(&mut self, duty: f64, now: Duration) -> Duration {
        if let Some(began) = self.began.take() {
            self.ended = Some((now, now.saturating_sub(began)));
        }
        let Some((ended, busy)) = self.ended else { return Duration::ZERO };
        let rest = busy.mul_f64((1.0 - duty) / duty);
        (ended + rest).saturating_sub(now)
    }
}

impl Gate for PermitGate<'_> {
    /// Waits in here, on the condition variable, so that what comes is answered at once; then asks to be asked again.
    fn pace(&mut self) -> Pace {
        let link = self.link;
        let asked = lock(&link.asked);
        if let Some(stop) = &asked.stop {
            return Pace::Stop(stop.reason);
        }
        let now = link.clock.monotonic();
        // Reckoned anew each time: a duty that has changed meanwhile holds for the rest that is left.
        let rest = self.rest(asked.duty, now);
        if now < asked.until {
            if rest.is_zero() {
                drop(asked);
                let mut progress = lock(&link.progress);
                if progress.phase == Phase::Parked {
                    progress.phase = Phase::Training;
                }
                drop(progress);
                self.began = Some(now);
                self.ended = None;
                return Pace::Run;
            }
            link.tick();
        } else {
            link.enter(Phase::Parked);
            let hold = asked.hold;
            if hold != std::mem::replace(&mut self.told, hold) && hold != 0 {
                drop(asked);
                link.say(&Report::Parked { hold });
                return Pace::Wait(Duration::ZERO);
            }
        }
        if asked.requests.is_empty() {
            let nap = if now < asked.until { rest.min(NAP) } else { NAP };
            drop(link.changed.wait_timeout(asked, nap));
        }
        Pace::Wait(Duration::ZERO)
    }

    fn request(&mut self) -> Option<gate::Request> {
        let mut asked = lock(&self.link.asked);
        // A stop goes before everything; the daemon answers what is left.
        if asked.stop.is_some() { None } else { asked.requests.pop_front() }
    }
}

/// The observer that tells the daemon.
pub struct Teller<'a>(pub &'a Link);

impl Observer for Teller<'_> {
    fn observe(&mut self, event: Event) {
        let link = self.0;
        match event {
            Event::Preparing { done, total, .. } => link.progress(Phase::Preparing, done, total),
            Event::Note(text) => {
                link.tick();
                link.say(&Report::Note { text: shortened(text) });
            }
            Event::Started { step, within, total, resumed } => {
                link.training_starts();
                link.at_step(step);
                link.progress(Phase::Training, within, 0);
                link.say(&Report::Started(Started { step, within, total, resumed }));
            }
            Event::MicroStep { step, done, of, .. } => {
                link.at_step(step);
                link.progress(Phase::Training, done as u64, of as u64);
            }
            Event::Step(record) => {
                link.at_step(record.step);
                link.progress(Phase::Training, 0, 0);
                link.say(&Report::Step(record));
            }
            Event::Evaluating(done, of) => link.progress(Phase::Evaluating, done as u64, of as u64),
            Event::Evaluated { record, request } => {
                link.enter(Phase::Training);
                link.say(&Report::Evaluated { record, request });
            }
            Event::Saving => link.progress(Phase::Saving, 0, 0),
            Event::Committed { step, within, request, .. } => {
                link.enter(Phase::Training);
                link.say(&Report::Committed { step, within, request });
            }
            Event::Refused { request, why } => {
                link.enter(Phase::Training);
                link.say(&Report::Refused { request, why: shortened(why) });
            }
            Event::Measured(measured) => {
                link.say(&Report::Measured(measured));
            }
            Event::Stopped(_) => link.tick(),
        }
    }
}
