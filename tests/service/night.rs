//! A night in a minute or two: the real daemon and its real workers on a simulated AGX Orin, by a simulated clock. Whatever
//! the night brings, nothing computes that must not, and not one bit of the result changes. The figures are printed
//! (`cargo test --test service night -- --nocapture`).

use crate::daemon::{Daemon, block_on, submit};
use crate::fixture::{Bits, shared};
use crate::plant::{Fault, Random};
use crate::world::{CRITICAL, STEP, Surroundings, Tick, World};
use finetuned::bus::{GovernorProxy, ManagerProxy, RunProxy};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Longest real time that anything may take which the simulated time does not hold up.
const PATIENCE: Duration = Duration::from_secs(120);

/// Simulated seconds in a real one while a worker computes: ten milliseconds from a decision to the worker are a second
/// and a half, which a chip's time constant of some seconds bears.
const RATE: f64 = 150.0;
/// The same where a moment is looked at.
const SLOWLY: f64 = 20.0;

/// Steps of the run: more than are done before the quota is used up, even where a loaded machine makes the simulation slow.
const STEPS: u64 = 3000;

/// Quota of the night, Wh; and what is left of it when somebody lowers it after midnight.
const QUOTA: f64 = 200.0;
const LEFT: f64 = 3.0;

/// What a worker may compute after a hold was seen, s of processor time: beats, looking for permits, and, where it is
/// held for long, its last checkpoint and its end.
const AT_REST: f64 = 0.5;

fn configuration(quota: f64) -> String {
    format!(
        "[board]\ninterval = \"1s\"\n[window]\ntimes = [\"15:00-16:15\", \"22:00-06:00\"]\n\
         [conditions]\nexternal_power = true\n[budget]\nenergy_per_night = \"{quota}Wh\"\n[worker]\nthreads = 1\nnice = 0\n"
    )
}

/// A daemon in its world, and the run that the night is about.
struct Night {
    daemon: Daemon,
    world: World,
    run: Option<(RunProxy<'static>, GovernorProxy<'static>, ManagerProxy<'static>)>,
    id: String,
}

/// A hold that was seen.
struct Hold {
    reason: &'static str,
    tick: usize,
    step: u64,
}

impl Night {
    fn new(seed: u64, time: &str, around: Surroundings, config: &str) -> Night {
        let world = World::new(seed, time, around);
        let daemon = Daemon::simulated(world.root(), world.clock(), config);
        world.daemon(Some(daemon.pid()));
        Night { daemon, world, run: None, id: String::new() }
    }

    async fn submit(&mut self, overrides: &[&str]) {
        let manager = self.daemon.manager().await;
        let path = submit(&manager, shared(), overrides, HashMap::new()).await.unwrap();
        self.id = path.as_str().rsplit('/').next().unwrap().to_string();
        self.connect().await;
    }

    /// Connects, to this daemon or the next.
    async fn connect(&mut self) {
        let manager = self.daemon.manager().await;
        let path = manager.find_run(self.id.clone()).await.unwrap();
        let run = self.daemon.run(&manager, &path).await;
        let governor = GovernorProxy::builder(manager.inner().connection())
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .unwrap();
        self.run = Some((run, governor, manager));
    }

    fn run(&self) -> &RunProxy<'static> {
        &self.run.as_ref().unwrap().0
    }

    fn governor(&self) -> &GovernorProxy<'static> {
        &self.run.as_ref().unwrap().1
    }

    async fn condition(&self) -> (String, String) {
        (self.run().state().await.unwrap(), self.run().reason().await.unwrap())
    }

    /// Waits until something is so, while the simulated time goes on.
    async fn until(&self, what: &str, so: impl AsyncFn(&Night) -> bool) {
        let began = Instant::now();
        while !so(self).await {
            if began.elapsed() > PATIENCE {
                panic!(
                    "waited in vain for {what}; it is {}, the run {:?} at step {}, {:?}\n{}\n{}",
                    time(self.world.now_us()),
                    self.condition().await,
                    self.run().step().await.unwrap(),
                    self.world.tick(),
                    String::from_utf8_lossy(&self.daemon.ctl(&["status"]).stdout),
                    self.told()
                );
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn reaches(&self, states: &[&str]) -> String {
        self.until(&format!("{states:?}"), async |night| {
            let (state, reason) = night.condition().await;
            let over = ["failed", "cancelled", "succeeded"].contains(&state.as_str());
            assert!(!over || states.contains(&state.as_str()), "the run is {state} ({reason})");
            states.contains(&state.as_str())
        })
        .await;
        self.condition().await.0
    }

    /// Waits until the run is held for this reason.
    async fn held(&self, reason: &'static str) -> Hold {
        match self.held_or_over(reason).await {
            Some(hold) => hold,
            None => panic!("the run was over before it was held for {reason}"),
        }
    }

    /// The same of a run that may be over before.
    async fn held_or_over(&self, reason: &'static str) -> Option<Hold> {
        self.until(&format!("a hold for {reason}"), async |night| {
            let (state, now) = night.condition().await;
            assert!(!["failed", "cancelled"].contains(&state.as_str()), "{state} ({now}), not {reason}");
            state == "succeeded" || (state == "waiting" && now == reason)
        })
        .await;
        let hold = Hold { reason, tick: self.world.ticks().len(), step: self.run().step().await.unwrap() };
        (self.condition().await.0 != "succeeded").then_some(hold)
    }

    /// Since that hold was seen nothing has computed.
    async fn rested(&self, hold: &Hold) {
        let ticks = self.world.ticks();
        let computed: f64 = ticks[hold.tick..].iter().map(|tick| tick.computed).sum();
        assert!(computed <= AT_REST, "{computed:.2} s computed while {}", hold.reason);
        // A step that was done may be told a moment later.
        let step = self.run().step().await.unwrap();
        assert!(step <= hold.step + 1, "from step {} to {step} while {}", hold.step, hold.reason);
    }

    /// Ends the daemon as the service manager does, and starts it again.
    async fn restart(&mut self) {
        self.run = None;
        self.world.daemon(None);
        self.daemon.signal("TERM");
        assert_eq!(self.daemon.wait(), Some(0));
        self.start().await;
    }

    /// Starts the next daemon.
    async fn start(&mut self) {
        // It waits on a runtime of its own, which needs a thread of its own.
        std::thread::scope(|scope| scope.spawn(|| self.daemon.start()).join().unwrap());
        self.world.daemon(Some(self.daemon.pid()));
        self.connect().await;
    }

    fn journal(&self) -> Vec<Value> {
        lines(&self.daemon.run_directory(&self.id).join("journal.jsonl"))
    }

    /// The journal, for people.
    fn told(&self) -> String {
        let line = |line: &Value| {
            let word = |key: &str| line[key].as_str().unwrap_or("").to_string();
            let at = time(line["time_us"].as_u64().unwrap());
            format!(
                "  {at} {:10} {:15} {:>5} {}\n",
                word("state"),
                word("reason"),
                line["step"],
                word("message")
            )
        };
        self.journal().iter().map(line).collect()
    }

    /// The reasons that the run waited or stopped for.
    fn reasons(&self) -> BTreeSet<String> {
        self.journal().iter().filter_map(|line| Some(line["reason"].as_str()?.to_string())).collect()
    }

    /// Ends the daemon; what its ledger says in all, and of the run, J.
    fn ledger(&mut self) -> (f64, f64) {
        self.run = None;
        self.world.daemon(None);
        self.daemon.signal("TERM");
        assert_eq!(self.daemon.wait(), Some(0));
        let mut last = BTreeMap::new();
        for line in lines(&self.daemon.path("state/energy.jsonl")) {
            last.insert(
                (line["night"].to_string(), line["run"].to_string()),
                line["gross_j"].as_f64().unwrap(),
            );
        }
        let of_run = |run: &str| run.contains(&self.id);
        (last.values().sum(), last.iter().filter(|((_, run), _)| of_run(run)).map(|(_, joules)| joules).sum())
    }

    /// Stretches of time in which the run had a worker that was not parked, as its journal has them.
    fn worked(&self) -> Vec<(u64, u64)> {
        let mut stretches = Vec::new();
        let mut since = None;
        for line in self.journal() {
            let (Some(state), Some(at)) = (line["state"].as_str(), line["time_us"].as_u64()) else {
                continue;
            };
            let works = ["preparing", "running", "saving"].contains(&state);
            match (since, works) {
                (None, true) => since = Some(at),
                (Some(from), false) => {
                    stretches.push((from, at));
                    since = None;
                }
                _ => {}
            }
        }
        stretches
    }
}

fn lines(path: &std::path::Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Date and time, UTC.
fn time(us: u64) -> String {
    jiff::Timestamp::from_microsecond(us as i64).unwrap().strftime("%d %H:%M:%S").to_string()
}

fn joules<'a>(ticks: impl IntoIterator<Item = &'a Tick>) -> f64 {
    ticks.into_iter().map(|tick| tick.power * tick.seconds).sum()
}

/// The bits of the same run when nothing disturbs it.
fn undisturbed(overrides: &[&str]) -> Bits {
    let output = shared().output();
    shared().finish(&shared().spec(overrides), output.path(), false);
    Bits::of(output.path())
}

#[test]
fn a_whole_night() {
    let began = Instant::now();
    let steps = format!("train.max_steps={STEPS}");
    let spec = [steps.as_str(), "train.checkpoint_every=250", "train.evaluate_every=0"];
    // A hot afternoon: 40 °C in the cabinet.
    let around = Surroundings::calm(30.0, 10.0);
    let mut night = Night::new(1, "2026-07-14T15:00:00Z", around, &configuration(QUOTA));
    block_on(async {
        night.submit(&spec).await;
        let readings = night.governor().get_readings().await.unwrap();
        let notes: Vec<String> = readings["Notes"].try_clone().unwrap().try_into().unwrap();
        assert!(notes.iter().any(|note| note.contains("SIMULATED")), "{notes:?}");
        night.world.pace(RATE);
        night.reaches(&["running"]).await;
        night.world.go("2026-07-14T15:15:00Z", RATE).await;

        // The fan stands, and the robot works: there is no room for training.
        night.world.change(|around| (around.fan_stands, around.other) = (true, 11.0));
        night.world.pace(RATE);
        let hot = night.held("thermal").await;
        night.world.go("2026-07-14T15:45:00Z", RATE).await;
        night.rested(&hot).await;
        night.world.change(|around| (around.fan_stands, around.other) = (false, 0.0));
        night.world.pace(RATE);
        night.reaches(&["running"]).await;

        // The hours end, and begin.
        night.world.go("2026-07-14T16:15:00Z", RATE).await;
        night.world.pace(RATE);
        let closed = night.held("outside-window").await;
        night.world.go("2026-07-14T21:59:50Z", RATE).await;
        night.rested(&closed).await;
        assert!(night.daemon.workers().is_empty(), "its memory was given back hours ago");
        night.world.pace(RATE);
        night.reaches(&["running"]).await;
        night.world.go("2026-07-14T22:10:00Z", RATE).await;

        // Somebody takes the cable.
        night.world.change(|around| around.plugged = false);
        night.world.pace(RATE);
        let unplugged = night.held("on-battery").await;
        night.world.go("2026-07-14T23:10:00Z", RATE).await;
        night.rested(&unplugged).await;
        night.world.change(|around| around.plugged = true);
        night.world.pace(RATE);
        night.reaches(&["running"]).await;
        night.world.go("2026-07-14T23:20:00Z", RATE).await;

        println!("{:.0} s until the leases", began.elapsed().as_secs_f64());
        lease_storm(&night).await;

        // The sensor of the junction goes, and comes back.
        night.world.pace(RATE);
        night.reaches(&["running"]).await;
        night.world.change(|around| around.fault = Some(Fault::Missing));
        let blind = night.held("sensor-lost").await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        night.rested(&blind).await;
        night.world.change(|around| around.fault = None);
        night.reaches(&["running"]).await;

        // The machine sleeps for an hour, in the middle of a step.
        night.world.pace(SLOWLY);
        night
            .until("a level above boot", async |night| night.governor().level().await.unwrap() != "boot")
            .await;
        let before = night.world.now_us();
        night.world.suspend(3600.0);
        night
            .until("a cautious beginning", async |night| night.governor().level().await.unwrap() == "boot")
            .await;
        println!("{:.0} s until the sleep", began.elapsed().as_secs_f64());
        println!("slept from {} to {}", time(before), time(night.world.now_us()));
        night.world.pace(RATE);
        night.reaches(&["running"]).await;

        // The daemon is updated.
        night.restart().await;
        night.reaches(&["running"]).await;

        // Somebody lowers the quota, and it is used up before the morning.
        let quota = night.governor().night_energy().await.unwrap() + LEFT;
        night.daemon.configure(&configuration(quota));
        night.daemon.signal("HUP");
        let near = async |night: &Night| night.governor().night_energy().await.unwrap() > quota - 0.3;
        night.until("the end of the quota", near).await;
        night.world.pace(SLOWLY);
        let spent = night.held("energy-quota").await;
        let energy = night.governor().night_energy().await.unwrap();
        println!(
            "quota of {quota:.4} Wh used up at {}: {energy:.4} Wh, step {}",
            time(night.world.now_us()),
            spent.step
        );
        assert!(spent.step < STEPS);
        // What the last round did not know of, and what was under way.
        let ticks = night.world.ticks();
        let strongest = ticks.iter().map(|tick| tick.power).fold(0.0, f64::max);
        let micro_step = ticks.iter().map(|tick| tick.computed).sum::<f64>() / (spent.step * 4) as f64;
        let most = strongest * (2.0 * STEP + micro_step * SLOWLY) / 3600.0;
        println!(
            "above the quota: {:.4} Wh, at most {most:.4}; a micro-step of {micro_step:.4} s",
            energy - quota
        );
        assert!(
            (quota - 1e-6..=quota + most).contains(&energy),
            "{energy} Wh of {quota:.4} Wh, and at most {most} more"
        );
        night.world.go("2026-07-15T05:00:00Z", RATE).await;
        night.rested(&spent).await;

        // A person gives it more.
        night.daemon.configure(&configuration(QUOTA));
        night.daemon.signal("HUP");
        night.world.pace(SLOWLY);
        night.reaches(&["succeeded"]).await;
        println!("finished at {}", time(night.world.now_us()));
    });
    report(&mut night, began);
    assert_eq!(Bits::of(&night.daemon.run_directory(&night.id)), undisturbed(&spec));
}

/// Sixty applications ask for the device, alone and together; some are killed while they hold it.
async fn lease_storm(night: &Night) {
    night.world.pace(SLOWLY);
    let mut latest = Vec::new();
    for round in 0..20 {
        night.reaches(&["running"]).await;
        let began = Instant::now();
        let mut leases = Vec::new();
        for number in 0..3 {
            let who = format!("planner-{round}-{number}");
            let lease =
                night.governor().acquire_lease(who, "a question".into(), HashMap::new()).await.unwrap();
            leases.push(std::os::fd::OwnedFd::from(lease));
        }
        let hold = night.held("leased").await;
        latest.push(began.elapsed().as_secs_f64());
        if round % 4 == 0 {
            // The last holder is a process of its own, which is killed.
            let last = leases.pop().unwrap();
            let mut holder = Command::new("sleep").arg("600").stdin(Stdio::from(last)).spawn().unwrap();
            drop(leases);
            tokio::time::sleep(Duration::from_millis(20)).await;
            assert_eq!(night.condition().await.1, "leased", "a holder is left");
            night.rested(&hold).await;
            holder.kill().unwrap();
            holder.wait().unwrap();
        } else {
            night.rested(&hold).await;
            drop(leases);
        }
    }
    night.reaches(&["running"]).await;
    latest.sort_by(f64::total_cmp);
    println!(
        "60 leases: parked after {:.0} ms (median), {:.0} ms (latest), real time",
        latest[10] * 1e3,
        latest[19] * 1e3
    );
}

/// Prints the night, and holds it to what must be so.
fn report(night: &mut Night, began: Instant) {
    let ticks = night.world.ticks();
    let hottest = ticks.iter().map(|tick| tick.die).fold(0.0, f64::max);
    let computed: f64 = ticks.iter().map(|tick| tick.computed).sum();
    let first = ticks[0].wall_us;
    let last = ticks[ticks.len() - 1].wall_us;
    println!(
        "{:.1} h in {:.0} s, {} steps of the simulation, {computed:.1} s computed; hottest {hottest:.1} °C",
        (last - first) as f64 / 3.6e9,
        began.elapsed().as_secs_f64(),
        ticks.len()
    );
    print!("{}", night.told());
    let reasons = night.reasons();
    println!("reasons: {reasons:?}");
    let worked = night.worked();
    let (booked, of_run) = night.ledger();
    let metered = joules(ticks.iter().filter(|tick| tick.metered));
    let at_work = |tick: &&Tick| worked.iter().any(|(from, to)| (*from..*to).contains(&tick.wall_us));
    let by_run = joules(ticks.iter().filter(at_work));
    println!(
        "energy: {booked:.0} J booked, {metered:.0} J metered; the run {of_run:.0} J booked, {by_run:.0} J at work"
    );
    assert!(hottest < CRITICAL, "{hottest}");
    for reason in ["thermal", "outside-window", "on-battery", "leased", "sensor-lost", "energy-quota"] {
        assert!(reasons.contains(reason), "no {reason} in {reasons:?}");
    }
    // A daemon that begins or ends meters a part of a step.
    assert!((booked - metered).abs() <= 0.01 * metered, "{booked} J booked of {metered} J");
    let strongest = ticks.iter().map(|tick| tick.power).fold(0.0, f64::max);
    let slack = 0.01 * by_run + 2.0 * STEP * strongest * worked.len() as f64;
    assert!((of_run - by_run).abs() <= slack, "{of_run} J booked, {by_run} J taken, slack {slack:.0} J");
}

/// A run of some seconds, for nights that are made by chance.
const SHORT: &[&str] = &["train.max_steps=800", "train.checkpoint_every=100", "train.evaluate_every=300"];

/// What may happen to a machine.
#[derive(Clone, Copy, Debug)]
enum Incident {
    Unplugged,
    Fault(Fault),
    Leased,
    /// The fan stands, and somebody else works.
    Stuffy,
    /// Somebody else's work on the GPU.
    Busy,
    Asleep,
    DaemonKilled,
    DaemonRestarted,
    WorkerKilled,
}

const INCIDENTS: [Incident; 13] = [
    Incident::Unplugged,
    Incident::Fault(Fault::Missing),
    Incident::Fault(Fault::Stuck),
    Incident::Fault(Fault::Jump(50.0)),
    Incident::Fault(Fault::Jump(-50.0)),
    Incident::Fault(Fault::Says(-256.0)),
    Incident::Leased,
    Incident::Stuffy,
    Incident::Busy,
    Incident::Asleep,
    Incident::DaemonKilled,
    Incident::DaemonRestarted,
    Incident::WorkerKilled,
];

#[test]
fn nights_that_chance_makes() {
    let nights = std::env::var("FINETUNED_NIGHTS").map_or(1, |nights| nights.parse().unwrap());
    let first = std::env::var("FINETUNED_NIGHT_SEED").map_or(0, |seed| seed.parse().unwrap());
    let expected = undisturbed(SHORT);
    for seed in first..first + nights {
        println!("night {seed} (FINETUNED_NIGHT_SEED={seed} FINETUNED_NIGHTS=1 to see it again)");
        let night = by_chance(seed);
        assert_eq!(Bits::of(&night.daemon.run_directory(&night.id)), expected, "night {seed}");
    }
}

fn by_chance(seed: u64) -> Night {
    let began = Instant::now();
    let mut random = Random(seed ^ 0x6e69_6768_7473);
    let around = Surroundings::calm(random.uniform(10.0, 40.0), random.uniform(0.0, 5.0));
    let config = "[board]\ninterval = \"1s\"\n[window]\ntimes = [\"22:00-06:00\"]\n[conditions]\nexternal_power = true\n\
                  maximum_gpu_load = 0.5\n[worker]\nthreads = 1\nnice = 0\nbackoff = \"10ms\"\nattempts = 20\n";
    let mut night = Night::new(seed, "2026-07-14T21:55:00Z", around, config);
    block_on(async {
        night.submit(SHORT).await;
        night.world.pace(RATE);
        for _ in 0..6 {
            night.reaches(&["running", "succeeded"]).await;
            night.world.go_for(random.uniform(60.0, 240.0) as u64, RATE).await;
            let incident = INCIDENTS[(random.next() % INCIDENTS.len() as u64) as usize];
            let seconds = random.uniform(60.0, 600.0) as u64;
            let (state, _) = night.condition().await;
            println!("  {} {incident:?} for {seconds} s while {state}", time(night.world.now_us()));
            if state == "succeeded" {
                return;
            }
            befall(&mut night, incident, seconds).await;
            night.world.pace(RATE);
        }
        night.reaches(&["succeeded"]).await;
    });
    let ticks = night.world.ticks();
    let hottest = ticks.iter().map(|tick| tick.die).fold(0.0, f64::max);
    print!("{}", night.told());
    println!("  hottest {hottest:.1} °C; {:.0} s", began.elapsed().as_secs_f64());
    assert!(hottest < CRITICAL, "night {seed}: {hottest}");
    night
}

/// Lets something happen for a while, and mends it.
async fn befall(night: &mut Night, incident: Incident, seconds: u64) {
    let world = &night.world;
    match incident {
        Incident::Unplugged => {
            world.change(|around| around.plugged = false);
            lasts(night, Some("on-battery"), seconds).await;
        }
        Incident::Fault(fault) => {
            world.change(|around| around.fault = Some(fault));
            let reason = matches!(fault, Fault::Missing | Fault::Says(_)).then_some("sensor-lost");
            lasts(night, reason, seconds).await;
        }
        Incident::Leased => {
            let lease = night.governor().acquire_lease("robot".into(), "work".into(), HashMap::new());
            let lease = lease.await.unwrap();
            lasts(night, Some("leased"), seconds).await;
            drop(lease);
        }
        Incident::Stuffy => {
            world.change(|around| (around.fan_stands, around.other) = (true, 11.0));
            lasts(night, None, seconds).await;
        }
        Incident::Busy => {
            world.change(|around| around.gpu = 0.9);
            lasts(night, None, seconds).await;
        }
        Incident::Asleep => world.suspend(seconds as f64),
        Incident::DaemonKilled => {
            night.run = None;
            world.daemon(None);
            night.daemon.kill();
            night.start().await;
        }
        Incident::DaemonRestarted => night.restart().await,
        Incident::WorkerKilled => {
            night.daemon.workers().into_iter().for_each(|worker| crate::daemon::signal(worker, "KILL"));
        }
    }
    night.world.change(|around| *around = Surroundings::calm(around.air, around.day));
}

/// Lets time pass; with a reason, the run waits for it before long, and nothing computes until then.
async fn lasts(night: &Night, reason: Option<&'static str>, seconds: u64) {
    night.world.pace(RATE);
    let (state, _) = night.condition().await;
    let held = match reason {
        Some(reason) if state == "running" => night.held_or_over(reason).await,
        _ => None,
    };
    night.world.go_for(seconds, RATE).await;
    if let Some(hold) = held {
        night.rested(&hold).await;
    }
}
