//! The whole server on a message bus: its name, its callers, its end. Skipped, with a line that says so, where there
//! cannot be a bus of one's own.

#[path = "../../../tests/bus_policy/private_bus.rs"]
#[allow(dead_code)]
mod private_bus;

use super::*;
use crate::bus::server::{Endpoint, ServeError, Server};
use crate::night::{Account, Nights, Record, Span};
use crate::runs::fake::queued;
use private_bus::PrivateBus;
use tokio::time::timeout;

/// A user that every Linux distribution has (`bin`); a message bus turns away uids without an entry in passwd.
const NOBODY: u32 = 2;

/// Calls as this user.
fn call(bus: &PrivateBus, uid: u32, path: &str, method: &str, arguments: &[&str]) -> tokio::process::Command {
    let mut command: tokio::process::Command = bus
        .command(uid, crate::bus::NAME, path, &format!("org.finetuned.Finetuned1.{method}"), arguments)
        .into();
    command.kill_on_drop(true);
    command
}

async fn says(bus: &PrivateBus, uid: u32, path: &str, method: &str, arguments: &[&str]) -> String {
    let output = call(bus, uid, path, method, arguments).output().await.unwrap();
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

#[tokio::test]
async fn the_server_lives_on_a_bus() {
    let Some(mut bus) = PrivateBus::start(0) else { return };
    let limits = LimitsConfig { waits_per_sender: 1, ..LimitsConfig::default() };
    let bench = Bench::with(Authorization::Owner, 64, limits);
    bench.fake.add(queued(1, NOBODY));
    bench.fake.add(queued(2, ADA));
    let endpoint = [Endpoint::Bus(bus.address())];
    let mut server = Server::start(&endpoint, bench.service.clone()).await.unwrap();
    match Server::start(&endpoint, bench.service.clone()).await.err().unwrap() {
        error @ ServeError::NameTaken { .. } => assert!(error.to_string().contains("another finetuned runs")),
        other => panic!("{other}"),
    }

    // The broker says who calls: one's own run may be read, another's may not.
    let text = says(&bus, NOBODY, &path_of(1), "Run.Describe", &[]).await;
    assert!(text.contains("# run-1"), "{text}");
    let text = says(&bus, NOBODY, &path_of(2), "Run.Describe", &[]).await;
    assert!(text.contains("Error.NotAuthorized"), "{text}");
    let text = says(&bus, NOBODY, ROOT, "Manager.SetPriority", &[&path_of(1), "1"]).await;
    // polkit would decide; this daemon trusts its own user, and nobody else.
    assert!(text.contains("Error.NotAuthorized"), "{text}");
    let text = says(&bus, 0, ROOT, "Manager.SetPriority", &[&path_of(1), "1"]).await;
    assert!(text.starts_with("()"), "{text}");

    // Who waits and leaves gives its place back, though the run goes on. The unique name is the next one.
    let free = || bench.service.waits.is_free();
    let mut waiting = call(&bus, NOBODY, &path_of(1), "Run.Wait", &[]).spawn().unwrap();
    eventually("somebody waits", async || !free()).await;
    waiting.kill().await.unwrap();
    eventually("nobody waits", async || free()).await;

    bus.kill();
    match timeout(Duration::from_secs(5), server.failed()).await.unwrap() {
        ServeError::Lost { why, .. } => assert!(why.contains("closed"), "{why}"),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn the_name_is_given_back_and_may_be_refused() {
    let Some(bus) = PrivateBus::start(0) else { return };
    let bench = Bench::new(Authorization::Owner);
    let endpoint = [Endpoint::Bus(bus.address())];
    for _ in 0..2 {
        Server::start(&endpoint, bench.service.clone()).await.unwrap().stop().await;
    }
    // On this bus, another user is the daemon's.
    let Some(bus) = PrivateBus::start(NOBODY) else { return };
    let refused = Server::start(&[Endpoint::Bus(bus.address())], bench.service.clone()).await.err().unwrap();
    assert!(matches!(&refused, ServeError::NameRefused { .. }), "{refused}");
    assert!(refused.to_string().contains("org.finetuned.Finetuned1.conf"), "{refused}");
    let nowhere = [Endpoint::Bus("unix:path=/nonexistent".into())];
    let refused = Server::start(&nowhere, bench.service.clone()).await.err().unwrap();
    assert!(matches!(refused, ServeError::Connect { .. }), "{refused}");
}

/// The blocks of the overview in this language.
fn examples(language: &str) -> Vec<String> {
    let overview = include_str!("../../../docs/dbus/README.md");
    let fence = format!("```{language}\n");
    let blocks = overview.split(&fence).skip(1);
    blocks.map(|block| block.split("```").next().unwrap().to_string()).collect()
}

#[tokio::test]
async fn the_examples_of_the_documentation_work() {
    let Some(bus) = PrivateBus::start(0) else { return };
    let bench = Bench::new(Authorization::Owner);
    let mut night = queued(1, ADA);
    night.name = "night".into();
    bench.fake.add(night);
    let directory = tempfile::tempdir().unwrap();
    let nights = Nights::new(directory.path().join("nights"));
    let noons = Span { from: 0, to: 10 };
    *nights.live() = Some(Account::new(Record::new("2026-11-24".parse().unwrap(), noons, "UTC".into())));
    let service = bench.service.clone().with_nights(nights);
    let _server = Server::start(&[Endpoint::Bus(bus.address())], service).await.unwrap();
    std::fs::write(directory.path().join("night.toml"), "SPEC").unwrap();
    std::fs::write(directory.path().join("train.jsonl"), "ROWS").unwrap();
    let run = async |program: &str, arguments: &[&str]| {
        let output = tokio::process::Command::new(program)
            .args(arguments)
            .current_dir(directory.path())
            .env("DBUS_SYSTEM_BUS_ADDRESS", bus.address())
            .output()
            .await
            .unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(output.status.success(), "{arguments:?}: {text}");
        text
    };
    if private_bus::is_there("busctl") {
        let shell = examples("sh");
        assert_eq!(shell.len(), 3);
        let text = run("sh", &["-ec", &shell[0]]).await;
        assert_eq!(text.matches("night").count(), 2, "both list the run: {text}");
        // What watches goes on for ever.
        let watched = shell[1].replace("\ngdbus monitor", "\ntimeout 1 gdbus monitor");
        assert_ne!(watched, shell[1]);
        let text = run("sh", &["-ec", &format!("{} || test $? = 124", watched.trim_end())]).await;
        assert!(text.contains("s \"paused\"\ns \"user\"\n"), "{text}");
        let text = run("sh", &["-ec", &shell[2]]).await;
        assert!(text.contains("2026-11-24") && text.contains("schema"), "{text}");
    } else {
        private_bus::skip("there is no busctl");
    }
    let python = "/usr/bin/python3";
    if std::process::Command::new(python).args(["-c", "import dbus"]).status().is_ok_and(|s| s.success()) {
        let blocks = examples("python");
        assert_eq!(blocks.len(), 2);
        assert!(include_str!("../../../docs/dbus/submit.py").ends_with(&blocks[0]));
        let text = run(python, &["-c", &blocks.concat()]).await;
        assert_eq!(text.trim(), path_of(101));
        let heard = bench.fake.heard();
        assert!(heard[0].starts_with("submit \"night.toml\" by 0 files [train.jsonl=ROWS]"), "{heard:?}");
        assert!(heard[1].starts_with("inhibit by :1."), "{heard:?}");
    } else {
        private_bus::skip("there is no python3-dbus");
    }
}
