//! Several users on the bus, with the shipped policy and a stand-in for polkit: who may submit, and whose run is whose.

use crate::daemon::{Daemon, Transport};
use crate::fixture::shared;
use crate::private_bus::{PrivateBus, skip};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Users that every Linux distribution has.
const ADA: u32 = 2;
const BOB: u32 = 3;

/// finetunectl, a spec and its files where every user can read them.
struct Office {
    home: tempfile::TempDir,
    address: String,
}

impl Office {
    fn open(address: String) -> Office {
        let home = tempfile::tempdir().unwrap();
        let all =
            |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        all(home.path(), 0o755);
        let copy = |from: PathBuf, to: &str, mode| {
            std::fs::copy(&from, home.path().join(to)).unwrap();
            all(&home.path().join(to), mode);
        };
        copy(env!("CARGO_BIN_EXE_finetunectl").into(), "finetunectl", 0o755);
        copy(shared().path("train.jsonl"), "train.jsonl", 0o644);
        copy(shared().path("spec.toml"), "spec.toml", 0o644);
        std::fs::create_dir(home.path().join("model")).unwrap();
        all(&home.path().join("model"), 0o755);
        for file in std::fs::read_dir(shared().path("model")).unwrap() {
            let file = file.unwrap();
            copy(file.path(), &format!("model/{}", file.file_name().to_str().unwrap()), 0o644);
        }
        Office { home, address }
    }

    fn ctl(&self, uid: u32, arguments: &[&str]) -> Output {
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={uid}"))
            .args(["--clear-groups", "--"])
            .arg(self.home.path().join("finetunectl"));
        command.args(arguments).current_dir(self.home.path()).env("DBUS_SYSTEM_BUS_ADDRESS", &self.address);
        command.output().unwrap()
    }

    /// The command must end with this code; what it printed.
    fn expect(&self, code: i32, uid: u32, arguments: &[&str]) -> String {
        let output = self.ctl(uid, arguments);
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "user {uid}: {arguments:?}:\n{out}{err}");
        if code == 0 { out.into_owned() } else { err.into_owned() }
    }
}

#[test]
fn polkit_decides_and_a_run_belongs_to_who_submitted_it() {
    // Root is in the place of the user `finetuned`.
    let Some(mut bus) = PrivateBus::start(0) else { return };
    if !crate::private_bus::is_there("setpriv") {
        return skip("setpriv is missing, and with it other users");
    }
    let daemon = Daemon::start_on(Transport::Bus(bus.address()), "");
    let office = Office::open(bus.address());
    let submit = ["submit", "spec.toml", "--hold"];

    let said = office.expect(5, ADA, &submit);
    assert!(said.contains("polkit"), "without polkit nobody but root may: {said}");
    office.expect(0, ADA, &["list"]);
    let roots = office.expect(0, 0, &submit);
    office.expect(0, 0, &["cancel", roots.trim()]);
    office.expect(0, 0, &["remove", "--yes", roots.trim()]);

    if !bus.start_polkit() {
        return;
    }
    office.expect(5, ADA, &submit);
    bus.allow(&["submit", "manage-own"]);
    let id = office.expect(0, ADA, &submit);
    let id = id.trim();
    assert!(
        std::fs::read_to_string(daemon.run_directory(id).join("state.json"))
            .unwrap()
            .contains("\"owner\": 2")
    );
    office.expect(0, ADA, &["logs", id]);
    // Everybody sees that there is a run; what is in it is its owner's.
    office.expect(0, BOB, &["list"]);
    for private in
        [&["logs", id][..], &["metrics", id], &["resume", id], &["cancel", id], &["priority", id, "-1"]]
    {
        office.expect(5, BOB, private);
    }
    office.expect(5, ADA, &["priority", id, "7"]);
    office.expect(0, ADA, &["priority", id, "-1"]);
    office.expect(5, BOB, &["inhibit", "--why", "a test", "--", "true"]);
    office.expect(5, ADA, &["model", "add", "mine", "model"]);
    assert!(office.expect(0, BOB, &["budget", "show"]).contains("budget.power"), "reading is for everybody");
    for change in [&["budget", "set", "power=25W"][..], &["budget", "reset", "--yes"]] {
        let said = office.expect(5, ADA, change);
        assert!(said.contains("may not change models or settings"), "{said}");
    }
    office.expect(5, BOB, &["deadline", id, "+8h"]);
    office.expect(0, ADA, &["deadline", id, "+8h"]);
    bus.allow(&["configure"]);
    office.expect(0, ADA, &["budget", "set", "power=25W"]);
    assert!(
        daemon.log().contains("budget.power was \"none\" and is \"25W\": changed by user 2"),
        "{}",
        daemon.log()
    );
    bus.allow(&["manage-all", "inhibit"]);
    office.expect(0, BOB, &["inhibit", "--why", "a test", "--", "true"]);
    office.expect(0, BOB, &["cancel", id]);
    office.expect(0, ADA, &["show", id]);
    bus.stop_polkit();
    office.expect(5, BOB, &["remove", "--yes", id]);
    office.expect(0, 0, &["remove", "--yes", id]);
}
