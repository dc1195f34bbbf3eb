//! The governor at work: a machine whose sensors are files, hours, leases. Whatever holds a run changes no bit of it.

use crate::daemon::{Daemon, block_on, eventually, reaches, submit};
use crate::fixture::{Bits, shared};
use finetuned::bus::{GovernorProxy, ManagerProxy};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LONG: &[&str] = &["train.max_steps=150", "train.checkpoint_every=20", "train.evaluate_every=0"];

/// A machine with one thermal zone.
struct Machine {
    root: tempfile::TempDir,
}

impl Machine {
    fn new() -> Machine {
        let machine = Machine { root: tempfile::tempdir().unwrap() };
        std::fs::create_dir_all(machine.zone()).unwrap();
        std::fs::write(machine.zone().join("type"), "x86_pkg_temp\n").unwrap();
        machine.is_at(45.0);
        machine
    }

    fn zone(&self) -> PathBuf {
        self.root.path().join("sys/class/thermal/thermal_zone0")
    }

    fn is_at(&self, celsius: f64) {
        // Replaced whole: a reader never sees half of it.
        let beside = self.zone().join("next");
        std::fs::write(&beside, format!("{:.0}\n", celsius * 1000.0)).unwrap();
        std::fs::rename(&beside, self.zone().join("temp")).unwrap();
    }

    fn path(&self) -> &Path {
        self.root.path()
    }
}

async fn governor(manager: &ManagerProxy<'static>) -> GovernorProxy<'static> {
    GovernorProxy::builder(manager.inner().connection())
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await
        .unwrap()
}

#[test]
fn heat_pauses_and_coolness_goes_on_with_the_same_bits() {
    let machine = Machine::new();
    let daemon = Daemon::governed(machine.path(), "");
    let id = block_on(async {
        let manager = daemon.manager().await;
        let governor = governor(&manager).await;
        assert!(!governor.blind().await.unwrap());
        assert!((governor.temperature().await.unwrap() - 45.0).abs() < 0.1);
        let path = submit(&manager, shared(), LONG, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        reaches(&run, &["running"]).await;
        let began = Instant::now();
        machine.is_at(97.0);
        assert_eq!(reaches(&run, &["waiting"]).await, "waiting");
        println!("parked {:.2} s after the temperature rose", began.elapsed().as_secs_f64());
        assert_eq!(run.reason().await.unwrap(), "thermal");
        assert_eq!(governor.duty().await.unwrap(), 0.0);
        let step = run.step().await.unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(run.step().await.unwrap(), step, "it trains although it is too warm");
        // It cools, as a chip does. (A fall of 40 °C within half a second would not be believed.)
        for celsius in (46..97).rev().step_by(3) {
            machine.is_at(f64::from(celsius));
            tokio::time::sleep(Duration::from_millis(600)).await;
        }
        reaches(&run, &["running", "succeeded"]).await;
        // The sensor wanders a little, as sensors do.
        let mut flip = false;
        eventually("the end of the run", || {
            flip = !flip;
            machine.is_at(if flip { 46.0 } else { 46.5 });
            let run = &run;
            async move { (run.state().await.unwrap() == "succeeded").then_some(()) }
        })
        .await;
        path.as_str().rsplit('/').next().unwrap().to_string()
    });
    let output = shared().output();
    shared().finish(&shared().spec(LONG), output.path(), false);
    assert_eq!(Bits::of(&daemon.run_directory(&id)), Bits::of(output.path()));
}

#[test]
fn a_sensor_that_vanishes_is_a_pause() {
    let machine = Machine::new();
    let daemon = Daemon::governed(machine.path(), "");
    block_on(async {
        let manager = daemon.manager().await;
        let endless = ["train.max_steps=100000", "train.checkpoint_every=0", "train.evaluate_every=0"];
        let path = submit(&manager, shared(), &endless, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        reaches(&run, &["running"]).await;
        std::fs::remove_file(machine.zone().join("temp")).unwrap();
        let began = Instant::now();
        reaches(&run, &["waiting"]).await;
        let took = began.elapsed();
        assert!(took < Duration::from_secs(10), "blind for {took:?}");
        assert_eq!(run.reason().await.unwrap(), "sensor-lost");
        run.cancel(HashMap::new()).await.unwrap();
        run.wait().await.unwrap();
    });
}

#[test]
fn outside_its_hours_a_run_waits_and_a_reload_opens_them() {
    // An hour that is far from now, whatever the time.
    let hour = jiff::ZonedDateTime::now().hour();
    let closed = format!("[window]\ntimes = [\"{:02}:00-{:02}:00\"]\n", (hour + 10) % 24, (hour + 11) % 24);
    let daemon = Daemon::peer(&closed);
    block_on(async {
        let manager = daemon.manager().await;
        let path = submit(&manager, shared(), &[], HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        reaches(&run, &["waiting"]).await;
        assert_eq!(run.reason().await.unwrap(), "outside-window");
        assert_eq!(run.attempts().await.unwrap(), 0, "no worker is started outside the hours");
        assert_eq!(manager.state().await.unwrap(), "waiting");
        daemon.configure("");
        daemon.signal("HUP");
        reaches(&run, &["succeeded"]).await;
    });
}

#[test]
fn a_lease_parks_the_run_until_it_is_given_back() {
    let daemon = Daemon::peer("");
    block_on(async {
        let manager = daemon.manager().await;
        let governor = governor(&manager).await;
        let endless = ["train.max_steps=100000", "train.checkpoint_every=0", "train.evaluate_every=0"];
        let path = submit(&manager, shared(), &endless, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        reaches(&run, &["running"]).await;
        let lease =
            governor.acquire_lease("planner".into(), "a question".into(), HashMap::new()).await.unwrap();
        reaches(&run, &["waiting"]).await;
        assert_eq!(run.reason().await.unwrap(), "leased");
        assert_eq!(daemon.workers().len(), 1, "its memory stays");
        drop(lease);
        let began = Instant::now();
        reaches(&run, &["running"]).await;
        assert!(began.elapsed() < Duration::from_secs(1), "it goes on at once");
        // With its memory: the worker saves and ends.
        let release = HashMap::from([("release-memory".to_string(), true.into())]);
        let lease = governor.acquire_lease("planner".into(), "a long one".into(), release).await.unwrap();
        eventually("the end of the worker", || async { daemon.workers().is_empty().then_some(()) }).await;
        reaches(&run, &["waiting"]).await;
        drop(lease);
        reaches(&run, &["running"]).await;
        run.cancel(HashMap::new()).await.unwrap();
        run.wait().await.unwrap();
    });
}
