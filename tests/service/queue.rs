//! Several runs: their order, their limits, and what is refused.

use crate::daemon::{Daemon, block_on, eventually, name, opened, reaches, spec_text, submit};
use crate::fixture::shared;
use finetuned::bus::RunProxy;
use std::collections::HashMap;
use zbus::OwnedVariant;

const ENDLESS: &[&str] = &["train.max_steps=100000", "train.checkpoint_every=0", "train.evaluate_every=0"];

fn options(list: &[(&str, OwnedVariant)]) -> HashMap<String, OwnedVariant> {
    list.iter().map(|(key, value)| (key.to_string(), value.try_clone().unwrap())).collect()
}

fn priority(value: i32) -> HashMap<String, OwnedVariant> {
    options(&[("priority", value.into())])
}

#[test]
fn one_run_at_a_time_the_highest_priority_first() {
    let daemon = Daemon::peer("");
    block_on(async {
        let manager = daemon.manager().await;
        let mut runs: Vec<RunProxy> = Vec::new();
        for _ in 0..2 {
            let path = submit(&manager, shared(), ENDLESS, HashMap::new()).await.unwrap();
            runs.push(daemon.run(&manager, &path).await);
        }
        reaches(&runs[0], &["running"]).await;
        assert_eq!(runs[1].state().await.unwrap(), "queued");
        // A third with a higher priority takes the device, without a loss.
        let path = submit(&manager, shared(), ENDLESS, priority(5)).await.unwrap();
        runs.push(daemon.run(&manager, &path).await);
        reaches(&runs[2], &["running"]).await;
        assert!(["queued", "waiting"].contains(&runs[0].state().await.unwrap().as_str()));
        assert_eq!(daemon.workers().len(), 1);
        assert_eq!(manager.active_run().await.unwrap(), path);
        // The first comes back when it is over, although the second has waited as long.
        runs[2].cancel(HashMap::new()).await.unwrap();
        reaches(&runs[0], &["running"]).await;
        // Until the second is raised above it.
        let second = runs[1].inner().path().to_owned();
        manager.set_priority(second.into(), 1).await.unwrap();
        reaches(&runs[1], &["running"]).await;
        for run in &runs[..2] {
            run.cancel(HashMap::new()).await.unwrap();
            run.wait().await.unwrap();
        }
        eventually("idleness", || async { (manager.state().await.unwrap() == "idle").then_some(()) }).await;
        assert_eq!(manager.unfinished_runs().await.unwrap(), 0);
    });
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let daemon = Daemon::peer("[limits]\nruns_per_user = 2\n");
    block_on(async {
        let manager = daemon.manager().await;
        let held = || options(&[("hold", true.into())]);
        let path = submit(&manager, shared(), ENDLESS, held()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        assert_eq!(run.state().await.unwrap(), "paused");
        assert_eq!(name(run.pause(HashMap::new()).await), "AlreadyPaused");
        assert_eq!(name(run.checkpoint(HashMap::new()).await), "NotActive");
        assert_eq!(name(run.evaluate(HashMap::new()).await), "NotActive");
        assert_eq!(name(run.remove(HashMap::new()).await), "NotOver");
        assert_eq!(name(run.open_adapter(HashMap::new()).await), "Failed");
        assert_eq!(name(run.pause(options(&[("now", true.into())])).await), "InvalidInput");
        assert_eq!(name(manager.find_run("nobody".into()).await), "NoSuchRun");
        let spec = spec_text(shared(), &[]);
        let model = shared().path("model");
        let model = || HashMap::from([(model.display().to_string(), opened(&model).into())]);
        assert_eq!(name(manager.submit(spec, model(), HashMap::new()).await), "InvalidInput");
        assert_eq!(
            name(manager.submit("[model".into(), HashMap::new(), HashMap::new()).await),
            "InvalidSpec"
        );
        let named = "[model]\nbase = \"nothing\"\n[data]\ntrain = \"x\"\n".to_string();
        let file = || HashMap::from([("x".to_string(), opened(&shared().path("train.jsonl")).into())]);
        assert_eq!(name(manager.submit(named, file(), HashMap::new()).await), "NoSuchModel");
        submit(&manager, shared(), ENDLESS, held()).await.unwrap();
        assert_eq!(name(submit(&manager, shared(), ENDLESS, held()).await), "LimitExceeded");
        assert_eq!(name(manager.find_run("tiny".into()).await), "AmbiguousRun");
        run.cancel(HashMap::new()).await.unwrap();
        assert_eq!(name(run.resume(HashMap::new()).await), "AlreadyOver");
        assert_eq!(name(manager.set_priority(path, 3).await), "AlreadyOver");
        // What was refused left nothing behind.
        assert_eq!(std::fs::read_dir(daemon.path("state/runs")).unwrap().count(), 2);
    });
}

#[test]
fn a_failed_run_says_why_and_is_not_tried_again() {
    let daemon = Daemon::peer("");
    block_on(async {
        let manager = daemon.manager().await;
        let data = daemon.path("bad.jsonl");
        std::fs::write(&data, "{\"text\": \"fine\"}\n{\"text\": 7}\n").unwrap();
        let spec = format!(
            "[model]\nbase = \"model\"\n[data]\ntrain = \"bad.jsonl\"\n{}",
            "[train]\nmax_steps = 1\n"
        );
        let files = HashMap::from([
            ("model".to_string(), opened(&shared().path("model")).into()),
            ("bad.jsonl".to_string(), opened(&data).into()),
        ]);
        let path = manager.submit(spec, files, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        assert_eq!(run.wait().await.unwrap(), ("failed".to_string(), "invalid-input".to_string()));
        assert_eq!(run.attempts().await.unwrap(), 1);
        let details = run.describe().await.unwrap();
        let message: String = details["Message"].try_clone().unwrap().try_into().unwrap();
        assert!(message.contains("bad.jsonl:2"), "{message}");
    });
}

#[test]
fn a_random_storm_of_requests_keeps_every_run_legal() {
    use finetuned::backend::philox::Philox;
    let mut daemon = Daemon::peer("[limits]\nruns_per_user = 100\n");
    let mut random = Philox::new(5, 0);
    let short = ["train.max_steps=20", "train.checkpoint_every=0", "train.evaluate_every=0"];
    for round in 0..3 {
        block_on(async {
            let manager = daemon.manager().await;
            let mut runs: Vec<RunProxy> = Vec::new();
            for _ in 0..5 {
                let path = submit(&manager, shared(), &short, HashMap::new()).await.unwrap();
                runs.push(daemon.run(&manager, &path).await);
            }
            let mut refusals = 0;
            for _ in 0..120 {
                let run = &runs[random.next_u32() as usize % runs.len()];
                let answer = match random.next_u32() % 8 {
                    0 | 1 => run.pause(HashMap::new()).await,
                    2 | 3 => run.resume(HashMap::new()).await,
                    4 if random.next_u32().is_multiple_of(8) => run.cancel(HashMap::new()).await,
                    5 => run.checkpoint(HashMap::new()).await.map(drop),
                    6 => {
                        let path = run.inner().path().to_owned();
                        manager.set_priority(path.into(), (random.next_u32() % 3) as i32).await
                    }
                    _ => {
                        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                        Ok(())
                    }
                };
                if let Err(error) = answer {
                    refusals += 1;
                    let known = [
                        "AlreadyPaused",
                        "NotPaused",
                        "NotActive",
                        "AlreadyOver",
                        "BeingCancelled",
                        "Failed",
                    ];
                    let name = name::<()>(Err(error));
                    assert!(known.contains(&name.as_str()), "{name}");
                }
                assert!(daemon.workers().len() <= 1, "two workers at once");
            }
            assert!(refusals > 0, "no request was refused: nothing was tested");
            if round < 2 {
                return;
            }
            for run in &runs {
                // Whatever they went through, they can be brought to their end.
                let _ = run.resume(HashMap::new()).await;
                let end = run.wait().await.unwrap();
                assert!(["succeeded", "cancelled"].contains(&end.0.as_str()), "{end:?}");
            }
        });
        // The journals and records of all of it are read by a new daemon.
        daemon.kill();
        daemon.start();
        block_on(async {
            let manager = daemon.manager().await;
            assert_eq!(manager.list_runs(HashMap::new()).await.unwrap().len(), 5 * (round + 1));
            assert!(!daemon.log().contains("left alone"), "{}", daemon.log());
        });
    }
}
