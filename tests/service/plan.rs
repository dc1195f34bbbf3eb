//! Plans of the daemon: from what its runs took, inside its hours, and never in a run's way.

use crate::daemon::{Daemon, alive, block_on, eventually, name, opened, reaches, signal, spec_text, submit};
use crate::fixture::shared;
use finetuned::bus::{GovernorProxy, ManagerProxy};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

pub type Planned = finetuned::bus::error::Result<String>;

pub async fn plan(manager: &ManagerProxy<'static>, probe: bool) -> Planned {
    let fixture = shared();
    let files = [fixture.path("model"), fixture.path("train.jsonl")];
    let files = files.map(|path| (path.display().to_string(), zbus::OwnedFd::from(opened(&path))));
    let options = HashMap::from([("probe".to_string(), probe.into())]);
    manager.plan(spec_text(fixture, &[]), files.into(), options).await
}

fn page(planned: Planned) -> Value {
    serde_json::from_str(&planned.unwrap()).unwrap()
}

/// No copies of inputs are left, but those of runs.
async fn is_swept(daemon: &Daemon) {
    let incoming = || {
        let runs = std::fs::read_dir(daemon.path("state/runs")).unwrap();
        runs.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with('.')).count()
    };
    eventually("the end of the copies", || async { (incoming() == 0).then_some(()) }).await;
}

/// Stops a plan's worker as soon as it is there: it goes on only when it is killed.
pub async fn stop_worker(daemon: &Daemon) -> u32 {
    let worker = eventually("the worker", || async { daemon.workers().first().copied() }).await;
    signal(worker, "STOP");
    worker
}

const ENDLESS: &[&str] = &["train.max_steps=100000", "train.checkpoint_every=0", "train.evaluate_every=0"];

#[test]
fn a_plan_learns_from_the_daemons_runs_and_from_probes() {
    let mut daemon = Daemon::peer("");
    let run = block_on(async {
        let manager = daemon.manager().await;
        let nothing = page(plan(&manager, false).await);
        assert_eq!((&nothing["time"], &nothing["steps"]["total"]), (&Value::Null, &Value::from(7)));
        let path = submit(&manager, shared(), &[], HashMap::new()).await.unwrap();
        reaches(&daemon.run(&manager, &path).await, &["succeeded"]).await;
        let known = page(plan(&manager, false).await);
        assert_eq!(known["time"]["basis"], "same");
        assert_eq!(known["calendar"]["nights"][0]["steps"], 7);
        let probed = page(plan(&manager, true).await);
        assert_eq!(probed["time"]["basis"], "probe");
        is_swept(&daemon).await;
        assert!(daemon.workers().is_empty());
        path.as_str().rsplit('/').next().unwrap().to_string()
    });
    let spec = daemon.path("spec.toml");
    std::fs::write(&spec, spec_text(shared(), &[])).unwrap();
    let spec = spec.to_str().unwrap();
    let said = daemon.ctl(&["plan", spec]);
    let text = String::from_utf8(said.stdout).unwrap();
    assert!(said.status.success(), "{text}");
    for part in ["memory     base", "speed      ", "nights     ", "finish     "] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let said = daemon.ctl(&["plan", spec, "--before", "2020-01-01 06:00"]);
    let errors = String::from_utf8(said.stderr).unwrap();
    assert_eq!(said.status.code(), Some(9), "{errors}");
    assert!(errors.contains("error: it would be complete at ") && errors.contains("help: "), "{errors}");
    let said = daemon.ctl(&["plan", spec, "--set", "lora.r=0"]);
    assert_eq!(said.status.code(), Some(2));
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), Some(0));
    let ledger = std::fs::read_to_string(daemon.path("state/energy.jsonl")).unwrap();
    let lines = ledger.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let booked: BTreeSet<String> = lines.filter_map(|line| Some(line["run"].as_str()?.to_string())).collect();
    let expected = BTreeSet::from([run, "000000000000".to_string()]);
    assert!(booked.is_subset(&expected), "plans are booked under one id: {booked:?}");
}

#[test]
fn a_lease_is_granted_when_the_worker_of_a_plan_is_gone() {
    let daemon = Daemon::peer("");
    block_on(async {
        let manager = daemon.manager().await;
        let governor = GovernorProxy::new(daemon.manager().await.inner().connection()).await.unwrap();
        for options in [HashMap::new(), HashMap::from([("release-memory".to_string(), true.into())])] {
            let lease = async {
                let worker = stop_worker(&daemon).await;
                let lease =
                    governor.acquire_lease("planner".into(), "a question".into(), options).await.unwrap();
                assert!(!alive(worker), "the device was given away while it was there");
                drop(lease);
            };
            let (planned, ()) = tokio::join!(plan(&manager, false), lease);
            assert_eq!(name(planned), "Busy");
            is_swept(&daemon).await;
        }
    });
}

#[test]
fn a_plan_whose_client_is_gone_is_ended() {
    let daemon = Daemon::peer("");
    block_on(async {
        let manager = daemon.manager().await;
        let worker = tokio::select! {
            planned = plan(&manager, true) => panic!("{planned:?}"),
            worker = stop_worker(&daemon) => worker,
        };
        drop(manager);
        // Far sooner than a worker that says nothing is given up.
        tokio::time::timeout(Duration::from_secs(10), async {
            while alive(worker) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .expect("it still has the device");
        is_swept(&daemon).await;
        let manager = daemon.manager().await;
        assert_eq!(page(plan(&manager, false).await)["schema"], 1);
    });
}

#[test]
fn a_run_that_begins_while_the_files_of_a_probe_are_copied_has_the_device() {
    let daemon = Daemon::peer("");
    block_on(async {
        let manager = daemon.manager().await;
        let mut refused = 0;
        for _ in 0..5 {
            let submitted = submit(&manager, shared(), ENDLESS, HashMap::new());
            let (path, planned) = tokio::join!(submitted, async {
                let mut planned = std::pin::pin!(plan(&manager, true));
                loop {
                    tokio::select! {
                        planned = &mut planned => return planned,
                        () = tokio::time::sleep(Duration::from_millis(5)) => {
                            let workers = daemon.workers();
                            assert!(workers.len() < 2, "two workers at once: {workers:?}");
                        }
                    }
                }
            });
            refused += usize::from(planned.is_err_and(|error| name::<()>(Err(error)) == "Busy"));
            let run = daemon.run(&manager, &path.unwrap()).await;
            run.cancel(HashMap::new()).await.unwrap();
            run.wait().await.unwrap();
            eventually("the end of its worker", || async { daemon.workers().is_empty().then_some(()) }).await;
        }
        assert!(refused > 0, "no run began first");
    });
}

#[test]
fn what_forbids_a_survey_does_so_outside_the_hours_too() {
    let machine = tempfile::tempdir().unwrap();
    let battery = machine.path().join("sys/class/power_supply/BAT0");
    std::fs::create_dir_all(&battery).unwrap();
    let write = |file: &str, text: &str| std::fs::write(battery.join(file), format!("{text}\n")).unwrap();
    for (file, text) in [("type", "Battery"), ("status", "Discharging"), ("capacity", "10")] {
        write(file, text);
    }
    let hour = jiff::ZonedDateTime::now().hour();
    let (from, to) = ((hour + 10) % 24, (hour + 11) % 24);
    let daemon =
        Daemon::governed(machine.path(), &format!("[window]\ntimes = [\"{from:02}:00-{to:02}:00\"]\n"));
    block_on(async {
        let manager = daemon.manager().await;
        let refused = plan(&manager, false).await.unwrap_err().to_string();
        assert!(refused.contains("battery-low"), "{refused}");
        write("capacity", "90");
        eventually("a battery that is charged", || async { plan(&manager, false).await.ok() }).await;
    });
}

#[test]
fn a_plan_is_made_beside_a_run_but_no_probe() {
    let daemon = Daemon::peer("");
    block_on(async {
        let manager = daemon.manager().await;
        let path = submit(&manager, shared(), ENDLESS, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        reaches(&run, &["running"]).await;
        assert_eq!(name(plan(&manager, true).await), "Busy");
        assert_eq!(page(plan(&manager, false).await)["steps"]["total"], 7);
        assert_eq!(run.state().await.unwrap(), "running");
        assert_eq!(daemon.workers().len(), 1);
        is_swept(&daemon).await;
        run.cancel(HashMap::new()).await.unwrap();
        run.wait().await.unwrap();
    });
}

#[test]
fn hours_bind_the_calendar_and_a_lease_ends_a_probe() {
    let hour = jiff::ZonedDateTime::now().hour();
    let (from, to) = ((hour + 10) % 24, (hour + 11) % 24);
    let closed = format!("[window]\ntimes = [\"{from:02}:00-{to:02}:00\"]\n");
    let daemon = Daemon::peer(&closed);
    block_on(async {
        let manager = daemon.manager().await;
        assert_eq!(name(plan(&manager, true).await), "Busy", "a probe trains");
        daemon.configure("");
        daemon.signal("HUP");
        eventually("the open hours", || async { plan(&manager, true).await.ok() }).await;
        daemon.configure(&closed);
        daemon.signal("HUP");
        let begins =
            |page: &Value| page["calendar"]["nights"][0]["from"].as_str().unwrap()[11..16].to_string();
        let expected = format!("{from:02}:00");
        eventually("the hours", || async {
            let page = page(plan(&manager, false).await);
            (begins(&page) == expected).then_some(())
        })
        .await;
        daemon.configure("");
        daemon.signal("HUP");

        // One at a time; and whoever leases the device has it.
        let governor = GovernorProxy::new(manager.inner().connection()).await.unwrap();
        let other = daemon.manager().await;
        eventually("a plan that is ended by a lease", || async {
            let probe = plan(&manager, true);
            let lease = async {
                tokio::time::sleep(std::time::Duration::from_millis(500)).await;
                let second = plan(&other, false).await;
                let lease =
                    governor.acquire_lease("planner".into(), "a question".into(), HashMap::new()).await;
                (second, lease.unwrap())
            };
            let (probed, (second, lease)) = tokio::join!(probe, lease);
            let ended = probed.err().map(|error| name::<()>(Err(error)));
            let second = second.err().map(|error| name::<()>(Err(error)));
            drop(lease);
            (ended.as_deref() == Some("Busy") && second.as_deref() == Some("Busy")).then_some(())
        })
        .await;
        is_swept(&daemon).await;
        eventually("the end of the worker", || async { daemon.workers().is_empty().then_some(()) }).await;
        let path = submit(&manager, shared(), &[], HashMap::new()).await.unwrap();
        reaches(&daemon.run(&manager, &path).await, &["succeeded"]).await;
    });
}

#[test]
fn what_is_wrong_with_a_spec_is_said_as_to_a_submission() {
    let daemon = Daemon::peer("");
    block_on(async {
        let manager = daemon.manager().await;
        let wrong = manager.plan("[model]\nbsae = 1\n".into(), HashMap::new(), HashMap::new()).await;
        assert_eq!(name(wrong), "InvalidSpec");
        let missing = manager.plan(spec_text(shared(), &[]), HashMap::new(), HashMap::new()).await;
        assert_eq!(name(missing), "NoSuchModel");
        let option = HashMap::from([("prove".to_string(), true.into())]);
        let unknown = manager.plan(spec_text(shared(), &[]), HashMap::new(), option).await;
        assert_eq!(name(unknown), "InvalidInput");
        let far = HashMap::from([("before".to_string(), u64::MAX.into())]);
        let far = manager.plan(spec_text(shared(), &[]), HashMap::new(), far).await.unwrap_err().to_string();
        assert!(far.contains("beyond the calendar"), "{far}");
        assert_eq!(page(plan(&manager, false).await)["schema"], 1, "and the next one is made");
        is_swept(&daemon).await;
    });
}
