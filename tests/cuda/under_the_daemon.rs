//! `finetuned worker` under a scripted daemon, and under the real one.

use crate::daemon::{Daemon, Leave, start};
use crate::fixture::{Bits, shared};
use crate::support::{PROGRAM, SHORT, assert_nothing_published, give_cubins, stand_in, undisturbed};
use finetuned::reason::Reason;
use finetuned::worker::launch::{ChildLauncher, Exit};
use finetuned::worker::priorities::Priorities;
use finetuned::worker::protocol::{Failed, Finished, Report};
use finetuned_cuda::libcuda::Libcuda;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A program that is `finetuned` with this environment.
fn program(directory: &Path, stand_in: &Libcuda, environment: &[(&str, &str)]) -> PathBuf {
    let path = directory.join("finetuned");
    let mut script = format!("#!/bin/sh\nexport LD_LIBRARY_PATH='{}'\n", stand_in.directory().display());
    for (name, value) in environment {
        script += &format!("export {name}='{value}'\n");
    }
    script += &format!("exec '{PROGRAM}' \"$@\"\n");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// An attempt under a scripted daemon.
fn attempt(stand_in: &Libcuda, output: &Path, environment: &[(&str, &str)]) -> Daemon {
    let directory = tempfile::tempdir().unwrap();
    let launcher =
        ChildLauncher::new(program(directory.path(), stand_in, environment), Priorities::default());
    let mut daemon = Daemon::launch(&launcher);
    let ready = daemon.ready();
    assert!(ready.device.contains("stand-in of sm_87"), "{}", ready.device);
    daemon.send(&start(shared(), output, &SHORT));
    daemon.leave = Leave::Run;
    daemon
}

#[test]
fn a_worker_says_what_the_gpu_said_and_the_next_one_goes_on() {
    let Some(stand_in) = stand_in() else { return };
    give_cubins(stand_in, &shared().path("cache-of-the-worker"));
    let undisturbed = undisturbed(stand_in);
    let launches = undisturbed.1.count("cuLaunchKernel");
    let output = shared().output();

    let fail = format!("716~cuLaunchKernel:{}", launches * 3 / 4);
    let mut daemon = attempt(stand_in, output.path(), &[("FINETUNED_LIBCUDA_FAIL", &fail)]);
    let last = daemon.last_word();
    let Report::Failed(Failed { reason, message, retry }) = &last else { panic!("{last:?}") };
    assert_eq!((*reason, *retry), (Reason::Device, true), "{message}");
    assert!(message.contains("CUDA error 716 (CUDA_ERROR_MISALIGNED_ADDRESS)"), "{message}");
    assert_eq!(daemon.exit(), Exit::Code(4));
    let committed = |daemon: &Daemon| {
        daemon.heard.iter().filter(|(_, report)| matches!(report, Report::Committed { .. })).count()
    };
    assert!(committed(&daemon) > 0);
    assert_nothing_published(output.path(), committed(&daemon));

    let fail = "2@cuMemAlloc:1";
    let mut daemon = attempt(stand_in, output.path(), &[("FINETUNED_LIBCUDA_FAIL", fail)]);
    let last = daemon.last_word();
    let Report::Failed(Failed { reason, retry, .. }) = &last else { panic!("{last:?}") };
    assert_eq!((*reason, *retry), (Reason::OutOfMemory, true));
    assert_eq!(daemon.exit(), Exit::Code(9));

    let mut daemon = attempt(stand_in, output.path(), &[]);
    let last = daemon.last_word();
    assert!(matches!(last, Report::Finished(Finished::Complete { .. })), "{last:?}");
    assert_eq!(daemon.exit(), Exit::Code(0));
    assert_eq!(Bits::of(output.path()), undisturbed.0);
}

/// The real daemon, on a socket.
struct Service {
    home: tempfile::TempDir,
    process: Child,
}

impl Service {
    fn start(stand_in: &Libcuda, environment: &[(&str, &str)]) -> Service {
        let home = tempfile::tempdir().unwrap();
        let path = |name: &str| home.path().join(name);
        give_cubins(stand_in, &path("cache"));
        let config = "[authorization]\nmethod = \"owner\"\n[worker]\nbackoff = \"10ms\"\n";
        std::fs::write(path("finetuned.toml"), config).unwrap();
        let mut command = Command::new(PROGRAM);
        stand_in.put_before(&mut command).arg("--config").arg(path("finetuned.toml"));
        command.arg("--state-dir").arg(path("state")).arg("--cache-dir").arg(path("cache"));
        command.arg("--peer").arg(address(home.path()));
        command.env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}", path("no-bus").display()));
        command.envs(environment.iter().copied()).stdin(Stdio::null()).stdout(Stdio::null());
        let process = command.stderr(std::fs::File::create(path("log")).unwrap()).spawn().unwrap();
        let service = Service { home, process };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !service.ctl(&["status"]).status.success() {
            assert!(Instant::now() < deadline, "the daemon does not answer:\n{}", service.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        service
    }

    fn ctl(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_finetunectl"));
        command.arg("--peer").arg(address(self.home.path())).args(arguments).stdin(Stdio::null());
        command.output().unwrap()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.home.path().join("log")).unwrap_or_default()
    }
}

fn address(home: &Path) -> String {
    format!("unix:path={}", home.join("socket").display())
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_run_whose_first_attempt_fails_on_the_gpu_succeeds_at_the_second() {
    let Some(stand_in) = stand_in() else { return };
    let undisturbed = undisturbed(stand_in);
    let directory = tempfile::tempdir().unwrap();
    let once = directory.path().join("once");
    let fail = format!("700~cuLaunchKernel:{}", undisturbed.1.count("cuLaunchKernel") * 3 / 4);
    let service = Service::start(
        stand_in,
        &[("FINETUNED_LIBCUDA_FAIL", &fail), ("FINETUNED_LIBCUDA_ONCE", once.to_str().unwrap())],
    );
    let spec = directory.path().join("short.toml");
    std::fs::write(&spec, shared().spec(&SHORT).to_toml()).unwrap();
    let done = service.ctl(&["submit", spec.to_str().unwrap(), "--wait"]);
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{out}\n{err}\n{}", service.log());
    assert!(once.exists(), "nothing failed:\n{}", service.log());
    let id = out.split_whitespace().next().unwrap();
    let run = service.home.path().join("state/runs").join(id);
    assert_eq!(Bits::of(&run), undisturbed.0);
    let journal = std::fs::read_to_string(run.join("journal.jsonl")).unwrap();
    assert!(journal.contains("CUDA error 700 (CUDA_ERROR_ILLEGAL_ADDRESS)"), "{journal}");
}
