//! Plans of the daemon: from what its runs took, inside its hours, and never in a run's way.

use crate::daemon::{Daemon, block_on, eventually, name, opened, reaches, spec_text, submit};
use crate::fixture::shared;
use finetuned::bus::{GovernorProxy, ManagerProxy};
use serde_json::Value;
use std::collections::HashMap;

type Planned = finetuned::bus::error::Result<String>;

async fn plan(manager: &ManagerProxy<'static>, probe: bool) -> Planned {
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

const ENDLESS: &[&str] = &["train.max_steps=100000", "train.checkpoint_every=0", "train.evaluate_every=0"];

#[test]
fn a_plan_learns_from_the_daemons_runs_and_from_probes() {
    let daemon = Daemon::peer("");
    block_on(async {
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
        assert_eq!(page(plan(&manager, false).await)["schema"], 1, "and the next one is made");
        is_swept(&daemon).await;
    });
}
