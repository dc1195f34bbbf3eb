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

/// Hours that are far from now, whatever the time.
fn far_hour() -> String {
    let hour = jiff::ZonedDateTime::now().hour();
    format!("{:02}:00-{:02}:00", (hour + 10) % 24, (hour + 11) % 24)
}

const ENDLESS: &[&str] = &["train.max_steps=100000", "train.checkpoint_every=0", "train.evaluate_every=0"];

/// finetunectl must end with this code; what it printed.
fn ctl(daemon: &Daemon, code: i32, arguments: &[&str]) -> String {
    let output = daemon.ctl(arguments);
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}:\n{text}");
    text
}

/// Starts the daemon again.
fn restart(daemon: &mut Daemon) {
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), Some(0));
    daemon.start();
}

/// Waits until the run, over a new connection, is in this state for this reason.
fn becomes(daemon: &Daemon, path: &zbus::OwnedObjectPath, state: &str, reason: &str) {
    block_on(async {
        let manager = daemon.manager().await;
        let run = daemon.run(&manager, path).await;
        eventually(&format!("{state} ({reason})"), || async {
            let now = (run.state().await.unwrap(), run.reason().await.unwrap());
            (now == (state.into(), reason.into())).then_some(())
        })
        .await;
    });
}

#[test]
fn what_is_set_holds_at_once_and_after_a_restart_and_is_never_forgotten_silently() {
    let mut daemon = Daemon::peer("");
    let path = block_on(async {
        let manager = daemon.manager().await;
        submit(&manager, shared(), ENDLESS, HashMap::new()).await.unwrap()
    });
    becomes(&daemon, &path, "running", "");
    let closed = format!("times={}", far_hour());
    let said = ctl(&daemon, 0, &["budget", "set", &closed, "power=900W"]);
    assert!(
        said.contains("window.times: always → ") && said.contains("budget.power: none → 900 W"),
        "{said}"
    );
    becomes(&daemon, &path, "waiting", "outside-window");
    assert!(daemon.log().contains("window.times was [] and is [\""), "who changed what is logged");
    // All or nothing.
    let said = ctl(&daemon, 2, &["budget", "set", "times=", "budget.powr=1", "temperature=70"]);
    assert!(
        said.contains("did you mean `power`?") && said.contains("budget.temperature_resume: is 75.0 °C"),
        "{said}"
    );
    restart(&mut daemon);
    becomes(&daemon, &path, "waiting", "outside-window");
    daemon.signal("HUP");
    let shown = ctl(&daemon, 0, &["budget", "show", "times"]);
    assert!(shown.contains("set by "), "{shown}");
    ctl(&daemon, 0, &["budget", "reset", "times"]);
    becomes(&daemon, &path, "running", "");
    assert!(ctl(&daemon, 0, &["budget", "show"]).contains("900 W"), "the other key stays");

    ctl(&daemon, 0, &["budget", "set", "--runtime", &closed]);
    becomes(&daemon, &path, "waiting", "outside-window");
    restart(&mut daemon);
    becomes(&daemon, &path, "running", "");

    // A file that cannot be read may have held a stricter limit.
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), Some(0));
    std::fs::write(daemon.path("state/budget.toml"), "[\"budget.power\"\nvalue =").unwrap();
    daemon.start();
    becomes(&daemon, &path, "waiting", "settings-lost");
    for command in [&["status"][..], &["doctor"]] {
        let output = daemon.ctl(command);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            said.contains("settings are lost, so nothing trains") && said.contains("budget.toml:1"),
            "{said}"
        );
    }
    assert!(daemon.log().contains("cannot be kept to, so nothing trains"));
    assert!(ctl(&daemon, 2, &["budget", "set", "power=20W"]).contains("finetunectl budget reset"));
    daemon.signal("HUP");
    becomes(&daemon, &path, "waiting", "settings-lost");
    let output = daemon.ctl(&["budget", "reset"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("the settings that were lost are taken back"), "{said}");
    assert!(daemon.log().contains("settings that were lost were taken back by user"), "who did it is logged");
    becomes(&daemon, &path, "running", "");
    assert!(daemon.path("state/budget.toml.damaged").exists(), "for who wants to know what stood in it");
    ctl(&daemon, 0, &["cancel", path.as_str().rsplit('/').next().unwrap()]);
}

#[test]
fn a_deadline_that_cannot_be_kept_is_told_once() {
    let mut daemon = Daemon::peer(&format!("[window]\ntimes = [{:?}]\n", far_hour()));
    // Long enough not to end here, and done within the hour even where a step takes 150 ms.
    let steps = ["train.max_steps=20000", "train.checkpoint_every=0", "train.evaluate_every=0"];
    let now_us = || std::time::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64;
    let in_hours = |hours: u64| now_us() + hours * 3_600_000_000;
    let path = block_on(async {
        let manager = daemon.manager().await;
        for wrong in [1, in_hours(24 * 400)] {
            let options = HashMap::from([("deadline".to_string(), wrong.into())]);
            assert_eq!(
                crate::daemon::name(submit(&manager, shared(), &steps, options).await),
                "InvalidInput"
            );
        }
        // Its hours begin nine hours from now at the earliest.
        let options = HashMap::from([("deadline".to_string(), in_hours(8).into())]);
        submit(&manager, shared(), &steps, options).await.unwrap()
    });
    let id = path.as_str().rsplit('/').next().unwrap().to_string();
    let at_risk = |daemon: &Daemon, wanted: bool| {
        block_on(async {
            let manager = daemon.manager().await;
            let run = daemon.run(&manager, &path).await;
            eventually(&format!("at risk: {wanted}"), || async {
                (run.deadline_at_risk().await.unwrap() == wanted).then_some(())
            })
            .await;
        });
    };
    let told = |daemon: &Daemon| daemon.log().matches("will not be done by its deadline").count();
    at_risk(&daemon, true);
    assert!(ctl(&daemon, 0, &["list"]).contains(", at risk"));
    restart(&mut daemon);
    at_risk(&daemon, true);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(told(&daemon), 1, "once, and not again after a restart:\n{}", daemon.log());
    // Other hours, another deadline.
    ctl(&daemon, 0, &["budget", "set", "times=[]"]);
    at_risk(&daemon, false);
    ctl(&daemon, 0, &["budget", "reset", "times"]);
    at_risk(&daemon, true);
    let said = ctl(&daemon, 0, &["deadline", &id, "+20h"]);
    assert!(said.contains("(in 19 h 59 min)") || said.contains("(in 20 h 0 min)"), "{said}");
    at_risk(&daemon, false);
    ctl(&daemon, 2, &["deadline", &id, "2001-01-01 00:00"]);
    ctl(&daemon, 0, &["deadline", &id, "none"]);
    ctl(&daemon, 0, &["cancel", &id]);
    becomes(&daemon, &path, "cancelled", "user");
    ctl(&daemon, 8, &["deadline", &id, "+1h"]);
}

#[test]
fn outside_its_hours_a_run_waits_and_a_reload_opens_them() {
    let daemon = Daemon::peer(&format!("[window]\ntimes = [{:?}]\n", far_hour()));
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

/// Seconds of a use in the account of the whole night.
fn used(report: &serde_json::Value, what: &str) -> f64 {
    let uses = report["whole"]["uses"].as_array().unwrap();
    uses.iter().find(|of| of["what"] == what).map_or(0.0, |of| of["seconds"].as_f64().unwrap())
}

#[test]
fn the_night_says_what_every_second_was_used_for() {
    let hour = jiff::ZonedDateTime::now().hour();
    let closed = format!("[window]\ntimes = [\"{:02}:00-{:02}:00\"]\n", (hour + 10) % 24, (hour + 11) % 24);
    let machine = Machine::new();
    let mut daemon = Daemon::governed(machine.path(), &closed);
    let id = block_on(async {
        let manager = daemon.manager().await;
        let governor = governor(&manager).await;
        let endless = ["train.max_steps=100000", "train.checkpoint_every=0", "train.evaluate_every=0"];
        let path = submit(&manager, shared(), &endless, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        reaches(&run, &["waiting"]).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        daemon.configure("");
        daemon.signal("HUP");
        reaches(&run, &["running"]).await;
        tokio::time::sleep(Duration::from_secs(4)).await;
        let lease =
            governor.acquire_lease("planner".into(), "a question".into(), HashMap::new()).await.unwrap();
        tokio::time::sleep(Duration::from_secs(3)).await;
        drop(lease);
        reaches(&run, &["running"]).await;
        machine.is_at(97.0);
        reaches(&run, &["waiting"]).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        path.as_str().rsplit('/').next().unwrap().to_string()
    });
    let report = |daemon: &Daemon| -> serde_json::Value {
        let text = block_on(async {
            let governor = governor(&daemon.manager().await).await;
            governor.get_night("now".into(), HashMap::new()).await.unwrap()
        });
        serde_json::from_str(&text).unwrap()
    };
    let before = report(&daemon);
    for (what, least, most) in
        [("outside-window", 2.0, 20.0), ("training", 1.0, 20.0), ("leased", 2.0, 6.0), ("thermal", 2.0, 10.0)]
    {
        let seconds = used(&before, what);
        assert!((least..most).contains(&seconds), "{what}: {seconds} s in {before:#}");
    }
    let intervals = before["intervals"].as_array().unwrap();
    let mut at = before["from_us"].as_i64().unwrap();
    for interval in intervals {
        assert_eq!(interval["from_us"], at, "a gap in {intervals:#?}");
        at = interval["to_us"].as_i64().unwrap();
    }
    assert_eq!(before["through_us"], at);
    let now = jiff::Timestamp::now().as_microsecond();
    assert!((now - 3_000_000..=now).contains(&at), "accounted for until {at}, and it is {now}");
    assert_eq!(
        (&before["runs"][0]["id"], &before["runs"][0]["state"]),
        (&id.as_str().into(), &"waiting".into())
    );
    assert!(before["steps"].as_u64().unwrap() > 0 && before["runs"][0]["first_loss"].is_f64(), "{before:#}");
    assert_eq!((&before["leases"][0]["who"], &before["leases"][0]["count"]), (&"planner".into(), &1.into()));
    let leased = before["leases"][0]["seconds"].as_f64().unwrap();
    assert!((leased - used(&before, "leased")).abs() < 1.5, "{leased} s");
    assert_eq!(before["temperature"]["max"], 97.0);
    let text = String::from_utf8(daemon.ctl(&["night", "--date", "now"]).stdout).unwrap();
    assert!(text.contains("thermal") && text.contains("leased") && text.contains("planner"), "{text}");

    // Killed, and started again: what was synced is there, and the time between was off.
    machine.is_at(97.0);
    std::thread::sleep(Duration::from_secs(11));
    daemon.kill();
    std::thread::sleep(Duration::from_secs(3));
    daemon.start();
    let after = report(&daemon);
    assert_eq!(after["starts"], 2);
    for what in ["outside-window", "training", "leased"] {
        let (was, is) = (used(&before, what), used(&after, what));
        assert!((was - is).abs() < 1e-6, "{what}: {was} s before, {is} s after the restart");
    }
    let off = used(&after, "off") - used(&before, "off");
    assert!((2.0..25.0).contains(&off), "off for {off} s");
    assert_eq!(after["damaged"], 0);
}

/// A notebook that discharges says how fast: the meter of a machine without rails.
#[test]
fn a_run_tells_what_it_took() {
    const WATTS: f64 = 12.5;
    let machine = Machine::new();
    let battery = machine.path().join("sys/class/power_supply/BAT0");
    std::fs::create_dir_all(&battery).unwrap();
    for (file, text) in
        [("type", "Battery"), ("capacity", "83"), ("status", "Discharging"), ("power_now", "12500000")]
    {
        std::fs::write(battery.join(file), format!("{text}\n")).unwrap();
    }
    // A battery is counted where the configuration says so: it is silent while it charges.
    let config = "[board]\nrails = [\"BAT0\"]\n\n[conditions]\nexternal_power = false\n";
    let daemon = Daemon::governed(machine.path(), config);
    block_on(async {
        let manager = daemon.manager().await;
        let endless = ["train.max_steps=100000", "train.checkpoint_every=0", "train.evaluate_every=0"];
        let path = submit(&manager, shared(), &endless, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        assert!(run.energy().await.unwrap().is_nan(), "nothing before it has begun");
        reaches(&run, &["running"]).await;
        eventually("some energy", || async { (run.energy().await.unwrap() > 0.0).then_some(()) }).await;
        let (began, before) = (Instant::now(), run.energy().await.unwrap());
        tokio::time::sleep(Duration::from_secs(6)).await;
        let took = run.energy().await.unwrap() - before;
        let expected = WATTS * began.elapsed().as_secs_f64();
        println!("{took:.1} J within {:.2} s at {WATTS} W", began.elapsed().as_secs_f64());
        // Told once a second, of rounds that come every half second.
        assert!((took - expected).abs() < WATTS * 1.8, "{took} J, not {expected}");
        assert!(run.joules_per_token().await.unwrap() > 0.0);
        eventually("a step's energy", || async {
            run.step_energy().await.unwrap().is_finite().then_some(())
        })
        .await;
        run.cancel(HashMap::new()).await.unwrap();
        run.wait().await.unwrap();
        eventually("the last of it", || async {
            let energy = run.energy().await.unwrap();
            tokio::time::sleep(Duration::from_secs(2)).await;
            (run.energy().await.unwrap() == energy).then_some(())
        })
        .await;
    });
}
