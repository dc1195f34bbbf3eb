//! What a worker says to a daemon that talks nonsense, and to specs and inputs that cannot be used.

use crate::daemon::{Daemon, LONG, Leave, PATIENCE, PROGRAM, assert_saved, start};
use crate::fixture::shared;
use finetuned::reason::Reason;
use finetuned::worker::launch::Exit;
use finetuned::worker::protocol::{Failed, MAX_LINE, Permit, Report, Request, VERSION};
use finetuned::worker::wire::{Input, encode};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

fn failed(report: Report) -> Failed {
    match report {
        Report::Failed(failed) => failed,
        other => panic!("{other:?}"),
    }
}

/// What a worker answers to these bytes, after `ready`; and its exit code.
fn answer(bytes: &[u8]) -> (Vec<Report>, Option<i32>) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(PROGRAM);
    command.arg("worker").stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    drop(command); // which holds their end
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours.write_all(bytes).unwrap();
    let mut said = String::new();
    ours.read_to_string(&mut said).unwrap();
    (said.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), child.wait().unwrap().code())
}

#[test]
fn nonsense_before_the_start() {
    let cases: [(Vec<u8>, &str); 6] = [
        (b"hello\n".to_vec(), "hello"),
        (b"{\"dance\":{}}\n".to_vec(), "dance"),
        (b"\xff\xfe\n".to_vec(), r"\xff\xfe"),
        (b"{\"stop\":{\"reason\":\"bored\"}}\n".to_vec(), "bored"),
        (b"{\"permit\":{\"run\":true}}\n".to_vec(), "until_ms"),
        (vec![b'x'; MAX_LINE + 2], "longer than"),
    ];
    for (bytes, quoted) in cases {
        let (reports, code) = answer(&bytes);
        assert!(matches!(&reports[0], Report::Ready(_)), "{reports:?}");
        let failed = failed(reports.last().unwrap().clone());
        assert_eq!((failed.reason, failed.retry), (Reason::Protocol, true));
        assert!(failed.message.contains(quoted), "{}", failed.message);
        assert!(failed.message.len() < 1000);
        assert_eq!(code, Some(1));
    }
}

#[test]
fn nonsense_while_it_trains() {
    let output = shared().output();
    let mut daemon = Daemon::in_training(output.path());
    // A second start is nonsense too: whose run is it?
    daemon.send(&start(shared(), output.path(), &LONG));
    let last = failed(daemon.last_word());
    assert_eq!((last.reason, last.retry), (Reason::Protocol, true));
    assert!(last.message.contains("twice"), "{}", last.message);
    assert_eq!(daemon.exit(), Exit::Code(1));
    assert_saved(output.path());
}

#[test]
fn a_garbage_line_while_it_trains() {
    let output = shared().output();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(PROGRAM);
    command.arg("worker").stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut write = ours.try_clone().unwrap();
    write.write_all(&encode(&start(shared(), output.path(), &LONG)).unwrap()).unwrap();
    let permit =
        encode(&Request::Permit(Permit { run: true, duty: 1.0, until_ms: u64::MAX, hold: 0 })).unwrap();
    write.write_all(&permit).unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(ours));
    let mut next = || -> Report { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    while !matches!(next(), Report::Step(_)) {
        write.write_all(&permit).unwrap();
    }
    write.write_all(b"{\"permit\":\x00}\n").unwrap();
    let mut committed = false;
    let last = loop {
        match next() {
            Report::Failed(failed) => break failed,
            Report::Committed { .. } => committed = true,
            _ => {}
        }
    };
    assert!(committed);
    assert_eq!(last.reason, Reason::Protocol);
    assert!(last.message.contains(r"\x00"), "{}", last.message);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_saved(output.path());
}

#[test]
fn a_daemon_of_another_version() {
    let output = shared().output();
    let Request::Start(mut wrong) = start(shared(), output.path(), &[]) else { unreachable!() };
    wrong.version = VERSION + 1;
    let (reports, code) = answer(&encode(&Request::Start(wrong)).unwrap());
    let last = failed(reports.last().unwrap().clone());
    assert_eq!((last.reason, last.retry), (Reason::Protocol, false));
    let theirs = format!("version {}", VERSION + 1);
    assert!(last.message.contains(&theirs) && last.message.contains("restart"), "{}", last.message);
    assert_eq!(code, Some(1));
    assert_eq!(std::fs::read_dir(output.path()).unwrap().count(), 0, "nothing was written");
}

#[test]
fn input_that_cannot_be_used() {
    let output = shared().output();
    let Request::Start(good) = start(shared(), output.path(), &[]) else { unreachable!() };
    let gone = shared().path("gone").display().to_string();
    let model = format!("model.base={gone}");
    let Request::Start(no_model) = start(shared(), output.path(), &[&model]) else { unreachable!() };
    let mut no_spec = good.clone();
    no_spec.spec = "[run]\nname = 3\n".into();
    for (start, quoted) in [(no_model, gone.as_str()), (no_spec, "tiny.toml")] {
        let mut daemon = Daemon::start();
        daemon.ready();
        daemon.leave = Leave::Run;
        daemon.send(&Request::Start(start));
        let last = failed(daemon.last_word());
        assert_eq!((last.reason, last.retry), (Reason::InvalidInput, false), "{}", last.message);
        assert!(last.message.contains(quoted), "{}", last.message);
        assert_eq!(daemon.exit(), Exit::Code(1));
    }
    // A run whose spec has changed under it.
    let mut daemon = Daemon::running(output.path(), &[], Leave::Run);
    daemon.complete();
    let mut daemon = Daemon::running(output.path(), &["run.seed=8"], Leave::Run);
    let last = failed(daemon.last_word());
    assert_eq!((last.reason, last.retry), (Reason::Changed, false));
    assert!(last.message.contains("run.seed"), "{}", last.message);
}

#[test]
fn it_is_not_for_people() {
    let out = Command::new(PROGRAM).arg("worker").stdin(Stdio::null()).output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(said.contains("finetuned run") && said.contains("UNIX socket"), "{said}");
    let help = Command::new(PROGRAM).arg("--help").output().unwrap();
    assert!(!String::from_utf8(help.stdout).unwrap().contains("worker"));
}

/// A daemon that goes away before it has asked for anything.
#[test]
fn the_daemon_that_closes_before_the_start_is_no_failure() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(PROGRAM);
    command.arg("worker").stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut input = Input::new(ours, Duration::from_secs(10)).unwrap();
    // `ready` is no request: the worker's half refuses to take itself for a daemon.
    assert!(input.request().is_err());
    drop(input);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
