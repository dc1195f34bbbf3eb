//! SIGKILL at random moments, of the worker and of the daemon: nothing is lost, and the result has the same bits.

use crate::daemon::{Daemon, block_on, eventually, signal, submit};
use crate::fixture::{Bits, shared};
use finetuned::backend::philox::Philox;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Long enough for some kills, short enough to be run several times.
const RUN: &[&str] = &["train.max_steps=300", "train.checkpoint_every=3", "train.evaluate_every=50"];

/// No wait between attempts: it is the kills that are tested here.
const AT_ONCE: &str = "[worker]\nbackoff = \"10ms\"\nbackoff_limit = \"20ms\"\nattempts = 100\n";

fn undisturbed() -> Bits {
    let output = shared().output();
    shared().finish(&shared().spec(RUN), output.path(), false);
    Bits::of(output.path())
}

/// Kills `kills` times, over as many runs as that takes, and compares each of them.
fn survives(kills: usize, seed: u64, mut kill: impl FnMut(&mut Daemon)) {
    let expected = undisturbed();
    let mut random = Philox::new(seed, 0);
    let mut daemon = Daemon::peer(AT_ONCE);
    let (mut done, mut runs) = (0, 0);
    let began = Instant::now();
    while done < kills {
        runs += 1;
        let id = block_on(async {
            let manager = daemon.manager().await;
            let path = submit(&manager, shared(), RUN, HashMap::new()).await.unwrap();
            path.as_str().rsplit('/').next().unwrap().to_string()
        });
        loop {
            let wait = 30 + u64::from(random.next_u32() % 400);
            std::thread::sleep(Duration::from_millis(wait));
            let over = block_on(async {
                let manager = daemon.manager().await;
                let path = manager.find_run(id.clone()).await.unwrap();
                let run = daemon.run(&manager, &path).await;
                let state = run.state().await.unwrap();
                assert!(!["failed", "cancelled", "paused"].contains(&state.as_str()), "{state}");
                state == "succeeded"
            });
            if over || done == kills {
                break;
            }
            kill(&mut daemon);
            done += 1;
        }
        block_on(async {
            let manager = daemon.manager().await;
            let run = daemon.run(&manager, &manager.find_run(id.clone()).await.unwrap()).await;
            eventually("the end of the run", || async {
                let state = run.state().await.unwrap();
                assert_ne!(state, "failed", "{:?}", run.describe().await);
                (state == "succeeded").then_some(())
            })
            .await;
        });
        assert_eq!(Bits::of(&daemon.run_directory(&id)), expected, "after {done} kills");
    }
    println!("{done} kills over {runs} runs in {:.0} s: the same bits", began.elapsed().as_secs_f64());
}

#[test]
fn fifty_kills_of_the_worker_change_no_bit() {
    survives(50, 11, |daemon| {
        for worker in daemon.workers() {
            signal(worker, "KILL");
        }
    });
}

#[test]
fn fifty_kills_of_the_daemon_change_no_bit() {
    survives(50, 12, |daemon| {
        daemon.kill();
        daemon.start();
    });
}

#[test]
fn kills_of_both_at_once_change_no_bit() {
    survives(10, 13, |daemon| {
        let workers = daemon.workers();
        daemon.kill();
        for worker in workers {
            signal(worker, "KILL");
        }
        daemon.start();
    });
}

#[test]
fn a_worker_that_hangs_is_ended_and_the_run_goes_on() {
    let daemon = Daemon::peer(AT_ONCE);
    block_on(async {
        let manager = daemon.manager().await;
        let path = submit(&manager, shared(), RUN, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        crate::daemon::reaches(&run, &["running"]).await;
        let worker = daemon.workers()[0];
        signal(worker, "STOP");
        let began = Instant::now();
        eventually("the end of the worker", || async { (!crate::daemon::alive(worker)).then_some(()) }).await;
        println!("a stopped worker was ended after {:.1} s", began.elapsed().as_secs_f64());
        assert_eq!(run.wait().await.unwrap().0, "succeeded");
        assert!(run.attempts().await.unwrap() >= 2);
    });
}

#[test]
fn attempts_without_progress_end_with_the_reason() {
    let daemon = Daemon::peer("[worker]\nbackoff = \"10ms\"\nattempts = 3\n");
    block_on(async {
        let manager = daemon.manager().await;
        let path = submit(&manager, shared(), RUN, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        eventually("the failure", || async {
            for worker in daemon.workers() {
                signal(worker, "KILL");
            }
            (run.state().await.unwrap() == "failed").then_some(())
        })
        .await;
        assert_eq!(run.reason().await.unwrap(), "crashed");
        assert_eq!(run.attempts().await.unwrap(), 3);
        let details = run.describe().await.unwrap();
        let message: String = details["Message"].try_clone().unwrap().try_into().unwrap();
        assert!(message.contains("3 attempts") && message.contains("SIGKILL"), "{message}");
    });
}
