//! Leases of the device, measured: how late one is granted, and how soon training goes on when its holder is killed.
//! `--nocapture` prints the figures.

use crate::daemon::{Daemon, block_on, eventually, reaches, signal, submit};
use crate::fixture::shared;
use finetuned::bus::{GovernorProxy, ManagerProxy, RunProxy};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use zbus::OwnedVariant;

/// Micro-steps of one sequence, eight to a step.
const ENDLESS: &[&str] = &[
    "train.max_steps=1000000",
    "train.micro_batch_size=1",
    "train.gradient_accumulation_steps=8",
    "train.checkpoint_every=0",
    "train.evaluate_every=0",
];
const MICRO_STEPS: f64 = 8.0;

/// What the machine's other work may cost in the worst case. The figures that are printed have no such allowance.
const SLACK: Duration = Duration::from_millis(500);

struct Bench {
    daemon: Daemon,
    governor: GovernorProxy<'static>,
    run: RunProxy<'static>,
}

impl Bench {
    async fn training(daemon: Daemon) -> Bench {
        let manager: ManagerProxy<'static> = daemon.manager().await;
        let path = submit(&manager, shared(), ENDLESS, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        reaches(&run, &["running"]).await;
        let governor = GovernorProxy::builder(manager.inner().connection())
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
            .unwrap();
        Bench { daemon, governor, run }
    }

    async fn lease(&self, options: &[(&str, bool)]) -> finetuned::bus::error::Result<OwnedFd> {
        let options: HashMap<String, OwnedVariant> =
            options.iter().map(|(name, value)| (name.to_string(), (*value).into())).collect();
        self.governor.acquire_lease("planner".into(), "a question".into(), options).await.map(OwnedFd::from)
    }

    /// Processor time of the worker's threads.
    fn computed(&self) -> Duration {
        let mut nanoseconds = 0;
        for worker in self.daemon.workers() {
            for task in std::fs::read_dir(format!("/proc/{worker}/task")).into_iter().flatten().flatten() {
                let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
                nanoseconds += text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0u64);
            }
        }
        Duration::from_nanos(nanoseconds)
    }

    /// Waits until the worker computes again, more than its threads need to listen and beat.
    async fn goes_on(&self) -> Duration {
        let (began, before) = (Instant::now(), self.computed());
        while self.computed() - before < Duration::from_millis(3) {
            assert!(began.elapsed() < Duration::from_secs(30), "it does not go on");
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
        began.elapsed()
    }

    /// How long a micro-step takes here and now.
    async fn micro_step(&self) -> Duration {
        let (began, from) = (Instant::now(), self.run.step().await.unwrap());
        tokio::time::sleep(Duration::from_secs(1)).await;
        let steps = self.run.step().await.unwrap() - from;
        began.elapsed().div_f64(steps.max(1) as f64 * MICRO_STEPS)
    }
}

/// The value below which this share of all lies.
fn at(sorted: &[Duration], share: f64) -> Duration {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

fn print(what: &str, all: &mut [Duration]) {
    all.sort();
    let [median, p99, longest] = [at(all, 0.5), at(all, 0.99), at(all, 1.0)].map(|d| d.as_secs_f64() * 1e3);
    println!("{what}: p50 {median:.2} ms, p99 {p99:.2} ms, longest {longest:.2} ms ({} times)", all.len());
}

#[test]
fn a_lease_is_granted_after_at_most_one_micro_step_and_nothing_computes_under_it() {
    let daemon = Daemon::peer("");
    block_on(async {
        let bench = Bench::training(daemon).await;
        let micro_step = bench.micro_step().await;
        let (mut granted, mut busy, mut resumed) = (Vec::new(), Vec::new(), Vec::new());
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..120 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            tokio::time::sleep(Duration::from_micros(random >> 50)).await;
            let asked = Instant::now();
            let lease = bench.lease(&[]).await.unwrap();
            granted.push(asked.elapsed());
            let before = bench.computed();
            tokio::time::sleep(Duration::from_millis(20)).await;
            busy.push(bench.computed() - before);
            drop(lease);
            resumed.push(bench.goes_on().await);
        }
        println!("a micro-step takes {:.2} ms", micro_step.as_secs_f64() * 1e3);
        print("from the call to the grant", &mut granted);
        print("processor time of the worker in 20 ms under a lease", &mut busy);
        print("from the end of the lease to 3 ms of work", &mut resumed);
        let late = at(&granted, 0.99);
        assert!(
            late < 2 * micro_step + SLACK,
            "p99 of a grant: {late:?}, with micro-steps of {micro_step:?}"
        );
        // Its threads that listen and beat are not what a lease is about.
        assert!(at(&busy, 0.9) < Duration::from_millis(2), "it computes under a lease: {busy:?}");
        assert!(at(&resumed, 0.99) < Duration::from_secs(1), "{resumed:?}");
    });
}

#[test]
fn a_killed_holder_gives_the_device_back_within_a_second() {
    let daemon = Daemon::peer("");
    block_on(async {
        let bench = Bench::training(daemon).await;
        let mut resumed = Vec::new();
        for _ in 0..20 {
            // A process that has the only copy.
            let lease = bench.lease(&[]).await.unwrap();
            let mut holder = Command::new("sleep").arg("1000").stdin(Stdio::from(lease)).spawn().unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert_eq!(bench.run.reason().await.unwrap(), "leased");
            let killed = Instant::now();
            holder.kill().unwrap();
            bench.goes_on().await;
            resumed.push(killed.elapsed());
            holder.wait().unwrap();
        }
        print("from SIGKILL of the holder to 3 ms of work", &mut resumed);
        assert!(at(&resumed, 1.0) < Duration::from_secs(1), "{resumed:?}");
    });
}

#[test]
fn memory_is_free_when_it_was_asked_for_and_a_run_that_prepares_does_not_stand_in_the_way() {
    let daemon = Daemon::peer("");
    block_on(async {
        let bench = Bench::training(daemon).await;
        let lease = bench.lease(&[("release-memory", true)]).await.unwrap();
        assert!(bench.daemon.workers().is_empty());
        drop(lease);
        eventually("the next worker", || async { (!bench.daemon.workers().is_empty()).then_some(()) }).await;
        let asked = Instant::now();
        let lease = bench.lease(&[]).await.unwrap();
        assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
        let before = bench.computed();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let busy = bench.computed().saturating_sub(before);
        assert!(busy < Duration::from_millis(30), "it computes under a lease: {busy:?} in 300 ms");
        drop(lease);
        reaches(&bench.run, &["running"]).await;
    });
}

#[test]
fn what_does_not_let_go_is_busy_and_nothing_is_held() {
    let daemon = Daemon::peer("");
    block_on(async {
        let bench = Bench::training(daemon).await;
        let worker = bench.daemon.workers()[0];
        signal(worker, "STOP");
        // Who does not want to wait has it at once.
        let asked = Instant::now();
        drop(bench.lease(&[("wait", false)]).await.unwrap());
        assert!(asked.elapsed() < Duration::from_secs(5));
        let refused = bench.lease(&[]).await.unwrap_err();
        assert_eq!(zbus::DBusError::name(&refused).as_str(), "org.finetuned.Finetuned1.Error.Busy");
        assert!((19.0..24.0).contains(&asked.elapsed().as_secs_f64()), "{:?}", asked.elapsed());
        signal(worker, "CONT");
        reaches(&bench.run, &["running"]).await;
        let manager = bench.daemon.manager().await;
        assert_eq!(manager.list_inhibitors().await.unwrap().len(), 0);
        // Nor does it hold anything in the night's account.
        let leased = || async {
            let night = bench.governor.get_night("now".into(), HashMap::new()).await.unwrap();
            let night: serde_json::Value = serde_json::from_str(&night).unwrap();
            night["leases"][0]["seconds"].as_f64().unwrap()
        };
        tokio::time::sleep(Duration::from_secs(2)).await;
        let before = leased().await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(leased().await, before);
    });
}
