//! Workers that are killed, or hang.

use crate::daemon::{Daemon, Leave};
use crate::fixture::{Bits, expected, shared};
use finetuned::backend::philox::Philox;
use finetuned::reason::Reason;
use finetuned::worker::launch::Exit;
use finetuned::worker::protocol::{Finished, Report, Request};
use rustix::process::Signal;
use std::time::{Duration, Instant};

#[test]
fn kills_at_random_moments() {
    const KILLS: usize = 8;
    let (mut random, mut kills, mut runs) = (Philox::new(0x6b, 0), 0, 0);
    while kills < KILLS {
        let output = shared().output();
        let mut requests = 0;
        loop {
            let mut daemon = Daemon::running(output.path(), &["train.checkpoint_every=1"], Leave::Run);
            let killed_at = Instant::now()
                + Duration::from_millis(20)
                + Duration::from_millis(600).mul_f32(random.next_f32());
            let complete = loop {
                let Some(left) = killed_at.checked_duration_since(Instant::now()) else { break false };
                match daemon.next_within(left.min(Duration::from_millis(25))) {
                    Some(Ok(Report::Finished(Finished::Complete { .. }))) => break true,
                    Some(Ok(Report::Failed(failed))) => panic!("{failed:?}"),
                    Some(Ok(_)) => {}
                    Some(Err(error)) => panic!("{error}"),
                    // What is asked in between changes nothing.
                    None => {
                        requests += 1;
                        daemon.send(&Request::Checkpoint { request: requests });
                        daemon.send(&Request::Evaluate { request: requests });
                    }
                }
            };
            if complete {
                break;
            }
            daemon.process.kill();
            let exit = daemon.exit();
            if exit != Exit::Code(0) {
                assert_eq!(exit, Exit::Signal(9));
                assert_eq!(daemon.process.reason(exit), Reason::Crashed, "it was us");
                kills += 1;
            }
        }
        assert_eq!(&Bits::of(output.path()), expected(), "after {kills} kills");
        runs += 1;
        assert!(runs < 50, "only {kills} kills came in time");
    }
}

#[test]
fn a_worker_that_hangs() {
    let output = shared().output();
    let mut daemon = Daemon::in_training(output.path());
    daemon.signal(Signal::STOP);
    daemon.during(Duration::from_millis(500)); // what was under way
    let heard = daemon.during(Duration::from_millis(2200));
    assert!(heard.is_empty(), "{heard:?}");
    daemon.process.kill();
    let exit = daemon.exit();
    assert_eq!(exit.to_string(), "killed by signal 9 (SIGKILL)");

    let mut daemon = Daemon::in_training(output.path());
    daemon.process.abort();
    let exit = daemon.exit();
    assert_eq!(exit.to_string(), "killed by signal 6 (SIGABRT)");
    assert_eq!(daemon.process.reason(exit), Reason::Crashed);
}
