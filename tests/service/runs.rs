//! One run through the service, from submission to adapter.

use crate::daemon::{Bus, Daemon, Transport, block_on, eventually, name, reaches, spec_text, submit};
use crate::fixture::{Bits, expected, shared};
use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// Slow enough to be interrupted: some hundred micro-steps of a few milliseconds.
const LONG: &[&str] = &["train.max_steps=80", "train.checkpoint_every=5", "train.evaluate_every=0"];

fn id_of(path: &zbus::OwnedObjectPath) -> String {
    path.as_str().rsplit('/').next().unwrap().to_string()
}

fn through_finetunectl(daemon: &Daemon) {
    let home = tempfile::tempdir().unwrap();
    let spec = home.path().join("tiny.toml");
    std::fs::write(&spec, spec_text(shared(), &[])).unwrap();
    let done = daemon.ctl(&["submit", spec.to_str().unwrap(), "--wait"]);
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{out}\n{err}\n{}", daemon.log());
    let id = out.split_whitespace().next().unwrap().to_string();
    assert_eq!(Bits::of(&daemon.run_directory(&id)), *expected(), "not the bits of `finetuned run`");
    let exported = home.path().join("adapter");
    let done = daemon.ctl(&["adapter", "export", &id, exported.to_str().unwrap()]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let read = |directory: &Path| std::fs::read(directory.join("adapter_model.safetensors")).unwrap();
    assert!(read(&exported) == read(&daemon.run_directory(&id).join("adapter")));
}

#[test]
fn a_run_over_a_socket_leaves_the_bits_of_finetuned_run() {
    through_finetunectl(&Daemon::peer(""));
}

#[test]
fn a_run_over_the_bus_leaves_the_bits_of_finetuned_run() {
    let Some(bus) = Bus::start("") else { return };
    through_finetunectl(&Daemon::start_on(
        Transport::Bus(bus.address.clone()),
        "[authorization]\nmethod = \"owner\"",
    ));
}

#[test]
fn paused_resumed_evaluated_and_checkpointed_over_a_socket_it_leaves_the_same_bits() {
    interrupted(&Daemon::peer(""));
}

#[test]
fn paused_resumed_evaluated_and_checkpointed_over_the_bus_it_leaves_the_same_bits() {
    let Some(bus) = Bus::start("") else { return };
    interrupted(&Daemon::start_on(
        Transport::Bus(bus.address.clone()),
        "[authorization]\nmethod = \"owner\"",
    ));
}

fn interrupted(daemon: &Daemon) {
    block_on(async {
        let manager = daemon.manager().await;
        let plain = submit(&manager, shared(), LONG, HashMap::new()).await.unwrap();
        let plain = daemon.run(&manager, &plain).await;
        assert_eq!(reaches(&plain, &["succeeded"]).await, "succeeded");

        let path = submit(&manager, shared(), LONG, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        reaches(&run, &["running"]).await;
        for pause in 0..3 {
            eventually("a step", || async { (run.step().await.unwrap() > 3 * pause).then_some(()) }).await;
            let step = run.checkpoint(HashMap::new()).await.unwrap();
            assert_eq!(run.checkpoint_step().await.unwrap(), step);
            let loss = run.evaluate(HashMap::new()).await.unwrap();
            assert!(loss.is_finite() && loss > 0.0);
            run.pause(HashMap::new()).await.unwrap();
            assert_eq!(reaches(&run, &["paused"]).await, "paused");
            assert_eq!(run.reason().await.unwrap(), "user");
            eventually("the end of the worker", || async { daemon.workers().is_empty().then_some(()) }).await;
            run.resume(HashMap::new()).await.unwrap();
            reaches(&run, &["running"]).await;
        }
        assert_eq!(run.wait().await.unwrap(), ("succeeded".to_string(), String::new()));
        assert_eq!(run.attempts().await.unwrap(), 4);
        let bits = |id: String| Bits::of(&daemon.run_directory(&id));
        let (plain, run) = (bits(plain.id().await.unwrap()), bits(run.id().await.unwrap()));
        assert_eq!(plain.adapter, run.adapter);
        assert_eq!(plain.last, run.last);
    });
}

#[test]
fn a_cancelled_run_ends_and_can_be_removed() {
    let daemon = Daemon::peer("");
    block_on(async {
        let manager = daemon.manager().await;
        let path = submit(&manager, shared(), LONG, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        reaches(&run, &["running"]).await;
        assert_eq!(name(run.remove(HashMap::new()).await), "NotOver");
        run.cancel(HashMap::new()).await.unwrap();
        assert_eq!(run.wait().await.unwrap().0, "cancelled");
        assert_eq!(name(run.resume(HashMap::new()).await), "AlreadyOver");
        let directory = daemon.run_directory(&id_of(&path));
        assert!(directory.exists());
        run.remove(HashMap::new()).await.unwrap();
        eventually("the directory's end", || async { (!directory.exists()).then_some(()) }).await;
        eventually("the inputs' end", || async {
            let inputs = std::fs::read_dir(daemon.path("state/inputs")).unwrap();
            (inputs.count() == 0).then_some(())
        })
        .await;
        assert!(run.state().await.is_err(), "the object is gone");
    });
}

#[test]
fn an_inhibitor_parks_the_run_and_ends_with_its_holder() {
    let daemon = Daemon::peer("");
    block_on(async {
        let manager = daemon.manager().await;
        let path = submit(&manager, shared(), LONG, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        reaches(&run, &["running"]).await;
        let mut holder =
            daemon.ctl_command(&["inhibit", "--why", "a test", "--", "sleep", "60"]).spawn().unwrap();
        assert_eq!(reaches(&run, &["waiting"]).await, "waiting");
        assert_eq!(run.reason().await.unwrap(), "inhibited");
        assert_eq!(manager.list_inhibitors().await.unwrap().len(), 1);
        let parked = run.step().await.unwrap();
        tokio::time::sleep(Duration::from_millis(700)).await;
        assert_eq!(run.step().await.unwrap(), parked, "it trains although it is inhibited");
        assert_eq!(daemon.workers().len(), 1, "a short wait keeps the worker");
        // It vanishes without a word: its descriptor is closed by the kernel.
        for child in crate::daemon::children(holder.id()) {
            crate::daemon::signal(child, "KILL");
        }
        holder.kill().unwrap();
        holder.wait().unwrap();
        reaches(&run, &["running", "succeeded"]).await;
        assert!(manager.list_inhibitors().await.unwrap().is_empty());
        run.cancel(HashMap::new()).await.unwrap();
    });
}

#[test]
fn a_daemon_told_to_go_saves_first_and_the_next_one_goes_on() {
    let mut daemon = Daemon::peer("");
    let (id, step) = block_on(async {
        let manager = daemon.manager().await;
        let path =
            submit(&manager, shared(), &["train.max_steps=80", "train.checkpoint_every=0"], HashMap::new());
        let path = path.await.unwrap();
        let run = daemon.run(&manager, &path).await;
        reaches(&run, &["running"]).await;
        eventually("a step", || async { (run.step().await.unwrap() >= 2).then_some(()) }).await;
        (id_of(&path), run.step().await.unwrap())
    });
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), Some(0));
    let saved = crate::fixture::checkpoints(&daemon.run_directory(&id));
    assert!(step_of(saved.last().unwrap()) >= step, "it was told to go, and has not saved: {saved:?}");
    daemon.start();
    block_on(async {
        let manager = daemon.manager().await;
        let run = daemon.run(&manager, &manager.find_run(id[..4].to_string()).await.unwrap()).await;
        reaches(&run, &["running", "succeeded"]).await;
        assert!(run.step().await.unwrap() >= step, "it began anew");
        assert_eq!(run.wait().await.unwrap().0, "succeeded");
    });
}

#[test]
fn a_stopped_daemon_leaves_no_orphan() {
    let daemon = Daemon::peer("");
    let worker = block_on(async {
        let manager = daemon.manager().await;
        let overrides = ["train.max_steps=100000", "train.checkpoint_every=0", "train.evaluate_every=0"];
        let path = submit(&manager, shared(), &overrides, HashMap::new()).await.unwrap();
        let run = daemon.run(&manager, &path).await;
        reaches(&run, &["running"]).await;
        daemon.workers()[0]
    });
    let runs = std::fs::read_dir(daemon.path("state/runs")).unwrap();
    let directory = runs.map(|entry| entry.unwrap().path()).next().unwrap();
    daemon.signal("STOP");
    let stopped = Instant::now();
    // The permit runs out after 2 s; a micro-step takes milliseconds. From then on no processor time is used.
    std::thread::sleep(Duration::from_millis(2500));
    let used = processor_ticks(worker);
    std::thread::sleep(Duration::from_millis(1500));
    let idle = processor_ticks(worker) - used;
    assert!(idle <= 15, "the worker used {idle} ticks of 10 ms in 1.5 s without a permit");
    while crate::daemon::alive(worker) {
        assert!(stopped.elapsed() < Duration::from_secs(60), "an orphan after a minute");
        std::thread::sleep(Duration::from_millis(50));
    }
    println!("the worker of a stopped daemon was gone after {:.1} s", stopped.elapsed().as_secs_f64());
    let saved = crate::fixture::checkpoints(&directory);
    assert!(step_of(saved.last().unwrap()) > 0, "it has not saved before it went: {saved:?}");
    daemon.signal("CONT");
    // The daemon goes on: it finds the worker gone and begins the next attempt where that one stopped.
    block_on(async {
        let manager = daemon.manager().await;
        let id = directory.file_name().unwrap().to_str().unwrap().to_string();
        let run = daemon.run(&manager, &manager.find_run(id).await.unwrap()).await;
        eventually("the second attempt", || async { (run.attempts().await.unwrap() >= 2).then_some(()) })
            .await;
        reaches(&run, &["running"]).await;
        run.cancel(HashMap::new()).await.unwrap();
        run.wait().await.unwrap();
    });
}

/// The completed steps of a checkpoint, by its name (`00000117` or `00000117.5`).
fn step_of(checkpoint: &Path) -> u64 {
    let name = checkpoint.file_name().unwrap().to_str().unwrap();
    name.split('.').next().unwrap().parse().unwrap()
}

/// Processor time of a process, in ticks of 10 ms.
fn processor_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}
