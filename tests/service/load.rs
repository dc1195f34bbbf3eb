//! Many runs and many clients. The test holds the daemon to generous bounds; the ignored one measures and prints
//! (`cargo test --release --test service -- --ignored --nocapture measure`).

use crate::daemon::{Daemon, block_on, submit};
use crate::fixture::shared;
use futures_util::StreamExt;
use std::collections::HashMap;
use std::time::{Duration, Instant};

struct Figures {
    submissions: Vec<Duration>,
    reads: Vec<Duration>,
    resident_mib: f64,
    idle_percent: f64,
}

fn load(runs: usize, clients: usize, reads: usize, idle: Duration) -> Figures {
    let daemon = Daemon::peer("[limits]\nruns_per_user = 500\nruns = 500\n");
    let tick = |pid: u32| -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    block_on(async {
        let manager = daemon.manager().await;
        let mut submissions = Vec::new();
        let mut paths = Vec::new();
        for _ in 0..runs {
            let began = Instant::now();
            let hold = HashMap::from([("hold".to_string(), true.into())]);
            paths.push(submit(&manager, shared(), &[], hold).await.unwrap());
            submissions.push(began.elapsed());
        }
        let mut watchers = Vec::new();
        for _ in 0..clients {
            let connection = daemon.connection().await.unwrap();
            let stream = zbus::MessageStream::from(&connection);
            watchers.push((
                connection,
                tokio::spawn(async move {
                    let mut stream = stream;
                    while stream.next().await.is_some() {}
                }),
            ));
        }
        let began = Instant::now();
        let before = tick(daemon.pid());
        tokio::time::sleep(idle).await;
        let idle_percent = (tick(daemon.pid()) - before) as f64 / began.elapsed().as_secs_f64();
        let mut latencies = Vec::new();
        for n in 0..reads {
            let run = daemon.run(&manager, &paths[n % paths.len()]).await;
            let began = Instant::now();
            assert_eq!(run.state().await.unwrap(), "paused");
            latencies.push(began.elapsed());
        }
        for (_, watcher) in watchers {
            watcher.abort();
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let resident: f64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
        submissions.sort();
        latencies.sort();
        Figures { submissions, reads: latencies, resident_mib: resident / 1024.0, idle_percent }
    })
}

fn at(sorted: &[Duration], percent: usize) -> f64 {
    sorted[(sorted.len() - 1) * percent / 100].as_secs_f64() * 1e3
}

#[test]
fn many_runs_and_clients_do_not_slow_it_down() {
    let figures = load(40, 10, 400, Duration::from_secs(1));
    assert!(at(&figures.reads, 50) < 20.0, "median of a read: {} ms", at(&figures.reads, 50));
    assert!(figures.resident_mib < 100.0, "{} MiB", figures.resident_mib);
}

#[test]
#[ignore = "a measurement: prints figures for docs/results.md"]
fn measure() {
    let figures = load(200, 20, 10_000, Duration::from_secs(20));
    for (name, sorted) in [("submit", &figures.submissions), ("read of a property", &figures.reads)] {
        println!(
            "{name}: median {:.3} ms, 90 % {:.3}, 99 % {:.3}, longest {:.3} ({} times)",
            at(sorted, 50),
            at(sorted, 90),
            at(sorted, 99),
            at(sorted, 100),
            sorted.len()
        );
    }
    println!(
        "daemon: {:.1} MiB resident, {:.2} % of a core when idle",
        figures.resident_mib, figures.idle_percent
    );
}
