//! What a worker does with and without leave, and without a daemon.

use crate::daemon::{Daemon, LONG, Leave, assert_saved, is_parked};
use crate::fixture::{Bits, checkpoints, expected, shared};
use finetuned::clock::{Clock, SystemClock};
use finetuned::reason::Reason;
use finetuned::worker::launch::Exit;
use finetuned::worker::protocol::{Beat, Finished, Permit, Phase, Report, Request, Started};
use rustix::process::Signal;
use std::time::{Duration, Instant};

fn is_step(report: &Report) -> bool {
    matches!(report, Report::Step(_))
}

fn stopped(reason: Reason) -> Report {
    Report::Finished(Finished::Stopped { reason })
}

#[test]
fn it_trains_to_the_end() {
    let output = shared().output();
    let mut daemon = Daemon::running(output.path(), &[], Leave::Run);
    daemon.complete();
    assert_eq!(&Bits::of(output.path()), expected());
    let started = Started { step: 0, within: 0, total: 7, resumed: false };
    let reports: Vec<&Report> = daemon.heard.iter().map(|(_, report)| report).collect();
    assert!(reports.contains(&&Report::Started(started)));
    let steps: Vec<u64> =
        reports.iter().filter_map(|r| if let Report::Step(s) = r { Some(s.step) } else { None }).collect();
    assert_eq!(steps, [1, 2, 3, 4, 5, 6, 7]);
    let of = |wanted: fn(&Report) -> bool| reports.iter().filter(|r| wanted(r)).count();
    assert_eq!(of(|r| matches!(r, Report::Evaluated { request: None, .. })), 4, "steps 0, 3, 6, 7");
    assert!(of(|r| matches!(r, Report::Committed { request: None, within: 0, .. })) >= 4);
    assert!(of(|r| matches!(r, Report::Beat(Beat { memory: 1_000_000.., .. }))) > 0);

    // Once more: nothing is left to train, and it ends the same.
    let mut again = Daemon::running(output.path(), &[], Leave::Hold);
    again.complete();
    assert_eq!((again.steps(), &Bits::of(output.path())), (0, expected()));
}

#[test]
fn no_permit_no_step() {
    let output = shared().output();
    let mut daemon = Daemon::running(output.path(), &LONG, Leave::Hold);
    daemon.until(is_parked);
    // A parked worker is alive, and does nothing.
    let heard = daemon.during(Duration::from_millis(2300));
    let ticks: Vec<u64> =
        heard.iter().filter_map(|r| if let Report::Beat(b) = r { Some(b.ticks) } else { None }).collect();
    assert!(ticks.len() >= 2 && ticks.windows(2).all(|two| two[0] < two[1]), "{ticks:?}");
    assert!(heard.iter().all(is_parked), "{heard:?}");
    // It can still save, since that computes nothing; an evaluation waits.
    daemon.send(&Request::Evaluate { request: 5 });
    daemon.send(&Request::Checkpoint { request: 6 });
    daemon.until(|r| matches!(r, Report::Committed { step: 0, within: 0, request: Some(6) }));
    daemon.leave = Leave::Run;
    daemon.until(|r| matches!(r, Report::Evaluated { request: Some(5), .. }));
    daemon.until(is_step);
    // The permit is withdrawn: at most the micro-step that runs is finished.
    daemon.leave = Leave::Hold;
    daemon.until(is_parked);
    let before = daemon.steps();
    assert!(daemon.during(Duration::from_millis(1200)).iter().all(is_parked));
    assert_eq!(daemon.steps(), before);
    // A permit that ends by itself: some milliseconds from now, and one far ahead, which counts for 2 s at most.
    daemon.leave = Leave::Silence;
    for ahead in [300, 1_000_000] {
        let until = SystemClock::new().monotonic() + Duration::from_millis(ahead);
        daemon.send(&Request::Permit(Permit {
            run: true,
            duty: 1.0,
            until_ms: until.as_millis() as u64,
            hold: 0,
        }));
        let given = Instant::now();
        daemon.until(is_step);
        let parked = daemon.until(is_parked);
        assert!(given.elapsed() < Duration::from_millis(ahead.min(2000) + 1800), "{parked:?}");
    }
    // And goes on after all that, and stops when told to.
    daemon.leave = Leave::Run;
    daemon.until(is_step);
    daemon.send(&Request::Checkpoint { request: 7 });
    daemon.until(|r| matches!(r, Report::Committed { request: Some(7), .. }));
    daemon.send(&Request::Stop { reason: Reason::User });
    assert_eq!(daemon.last_word(), stopped(Reason::User));
    assert_eq!(daemon.exit(), Exit::Code(0));
    assert_saved(output.path());
}

#[test]
fn it_says_once_for_every_hold_that_nothing_computes_any_more() {
    let output = shared().output();
    let mut daemon = Daemon::in_training(output.path());
    let said = |report: &Report| matches!(report, Report::Parked { .. });
    for hold in [7, 8] {
        daemon.leave = Leave::Silence;
        for _ in 0..3 {
            daemon.send(&Request::Permit(Permit { run: false, duty: 1.0, until_ms: 0, hold }));
        }
        let parked = daemon.until(said);
        assert!(matches!(parked, Report::Parked { hold: of } if of == hold), "{parked:?}");
        let after = daemon.during(Duration::from_millis(700));
        assert!(!after.iter().any(|report| said(report) || is_step(report)), "{after:?}");
        // Its second number without leave in between is another hold, too.
        daemon.send(&Request::Permit(Permit { run: false, duty: 1.0, until_ms: 0, hold: hold + 10 }));
        assert!(matches!(daemon.until(said), Report::Parked { hold: of } if of == hold + 10));
        daemon.leave = Leave::Run;
        daemon.until(is_step);
    }
}

#[test]
fn a_silent_daemon() {
    let output = shared().output();
    let mut daemon = Daemon::in_training(output.path());
    daemon.leave = Leave::Silence;
    let silent = Instant::now();
    assert_eq!(daemon.last_word(), stopped(Reason::DaemonLost));
    let lasted = silent.elapsed();
    assert!((9.0..14.0).contains(&lasted.as_secs_f64()), "{lasted:?}");
    let last_step = daemon.heard.iter().rev().find(|(_, r)| is_step(r)).unwrap().0;
    let computed = last_step.saturating_duration_since(silent);
    assert!(computed < Duration::from_millis(2500), "it computed for {computed:?} without a daemon");
    assert_eq!(daemon.exit(), Exit::Code(0));
    assert_saved(output.path());
}

#[test]
fn a_daemon_that_is_gone() {
    let output = shared().output();
    let mut daemon = Daemon::in_training(output.path());
    let steps = daemon.steps();
    daemon.connection = None;
    let gone = Instant::now();
    assert_eq!(daemon.exit(), Exit::Code(0));
    assert!(gone.elapsed() < Duration::from_secs(5), "{:?}", gone.elapsed());
    assert_saved(output.path());
    let last = checkpoints(output.path()).pop().unwrap();
    let step: usize = last.file_name().unwrap().to_str().unwrap()[..8].parse().unwrap();
    assert!(step >= steps, "saved {step} of {steps} steps");
}

#[test]
fn signals() {
    let output = shared().output();
    let mut daemon = Daemon::in_training(output.path());
    daemon.signal(Signal::INT);
    daemon.signal(Signal::HUP);
    daemon.until(is_step);
    daemon.during(Duration::from_millis(300));
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.last_word(), stopped(Reason::Shutdown));
    assert_eq!(daemon.exit(), Exit::Code(0));
    assert_saved(output.path());
}

#[test]
fn stopped_before_there_is_anything_to_save() {
    let output = shared().output();
    let mut daemon = Daemon::start();
    daemon.ready();
    daemon.send(&Request::Stop { reason: Reason::Preempted });
    assert_eq!(daemon.last_word(), stopped(Reason::Preempted));
    assert_eq!(daemon.exit(), Exit::Code(0));
    // While it waits for the run's lock, too.
    let mut first = Daemon::running(output.path(), &LONG, Leave::Hold);
    first.until(is_parked);
    let mut second = Daemon::running(output.path(), &LONG, Leave::Run);
    second.until(|r| matches!(r, Report::Beat(Beat { phase: Phase::Starting, .. })));
    second.send(&Request::Stop { reason: Reason::User });
    assert_eq!(second.last_word(), stopped(Reason::User));
    assert_eq!(second.exit(), Exit::Code(0));
    assert!(first.during(Duration::from_millis(200)).iter().all(is_parked));
}

#[test]
fn the_next_worker_waits_for_the_one_before() {
    let output = shared().output();
    let mut first = Daemon::running(output.path(), &[], Leave::Run);
    first.until(is_step);
    first.leave = Leave::Hold;
    let mut second = Daemon::running(output.path(), &[], Leave::Run);
    let mut ticks = Vec::new();
    let waiting = Instant::now();
    while waiting.elapsed() < Duration::from_millis(2300) {
        first.during(Duration::from_millis(50));
        for report in second.during(Duration::from_millis(50)) {
            let Report::Beat(Beat { phase: Phase::Starting, ticks: now, .. }) = report else {
                panic!("{report:?}")
            };
            ticks.push(now);
        }
    }
    assert!(ticks.len() >= 2 && ticks.windows(2).all(|two| two[0] < two[1]), "{ticks:?}");
    first.connection = None;
    let started = second.until(|r| matches!(r, Report::Started(_)));
    let Report::Started(started) = started else { unreachable!() };
    assert!(started.resumed && started.step >= 1, "{started:?}");
    second.complete();
    assert_eq!(&Bits::of(output.path()), expected());
}
