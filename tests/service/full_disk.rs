//! A state directory without room: requests are refused by name and change nothing, a run waits for space, and goes on to
//! the same bits. The disk is a small tmpfs in a mount namespace of its own, which takes the superuser or unprivileged
//! user namespaces; without either the test says that it was skipped.

use crate::daemon::spec_text;
use crate::fixture::{Bits, expected, shared};
use std::process::Command;

/// `$1` is finetuned, `$2` finetunectl.
const SCRIPT: &str = r#"
set -e
mkdir disk
mount -t tmpfs -o size=20m none disk
export FINETUNED_ADDRESS=unix:path=$PWD/socket
"$1" --config finetuned.toml --peer $FINETUNED_ADDRESS --state-dir disk/state --cache-dir cache 2>log &
daemon=$!
trap 'kill $daemon' EXIT
for i in $(seq 300); do "$2" list >/dev/null 2>&1 && break; sleep 0.1; done
id=$("$2" submit spec.toml --hold)
dd if=/dev/zero of=disk/fill bs=4096 2>/dev/null || true
set +e
"$2" resume $id >refused 2>&1
echo $? >refused.code
"$2" submit spec.toml --hold >refused.submit 2>&1
echo $? >refused.submit.code
set -e
"$2" show $id --json >still
ls -A disk/state/runs >runs
truncate -s -60K disk/fill
"$2" resume $id
for i in $(seq 600); do
    "$2" show $id --json >held
    grep -q '"reason":"storage"' held && break
    sleep 0.1
done
rm disk/fill
"$2" wait $id
"$2" show $id --json >done
cp -r disk/state/runs/$id run
"#;

#[test]
fn a_full_disk_is_waited_for() {
    let allowed = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"])
        .output()
        .is_ok_and(|output| output.status.success());
    if !allowed {
        return crate::private_bus::skip("mounting a tmpfs in a namespace of its own is not allowed here");
    }
    let home = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(home.path().join(name), text).unwrap();
    write("spec.toml", &spec_text(shared(), &[]));
    write("finetuned.toml", "[worker]\nbackoff = \"100ms\"\n");
    let output = Command::new("unshare")
        .args(["--map-root-user", "--mount", "sh", "-c", SCRIPT, "sh"])
        .args([env!("CARGO_BIN_EXE_finetuned"), env!("CARGO_BIN_EXE_finetunectl")])
        .current_dir(home.path())
        .output()
        .unwrap();
    let read = |name: &str| std::fs::read_to_string(home.path().join(name)).unwrap_or_default();
    let said = format!("{}\n{}", String::from_utf8_lossy(&output.stderr), read("log"));
    assert!(output.status.success(), "{said}");
    for refused in ["refused", "refused.submit"] {
        assert_eq!(read(&format!("{refused}.code")).trim(), "1", "{}", read(refused));
        assert!(read(refused).contains("the disk is full"), "{}", read(refused));
    }
    assert!(
        read("still").contains("\"state\":\"paused\""),
        "what was refused has changed nothing: {}",
        read("still")
    );
    assert_eq!(
        read("runs").lines().count(),
        1,
        "what was copied for a refused run is gone: {}",
        read("runs")
    );
    assert!(read("held").contains("\"reason\":\"storage\""), "{}\n{said}", read("held"));
    assert!(read("done").contains("\"state\":\"succeeded\""), "{}", read("done"));
    assert_eq!(Bits::of(&home.path().join("run")), *expected());
    assert!(!read("log").contains("panicked"), "{}", read("log"));
}
