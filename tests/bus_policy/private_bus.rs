//! A message bus of one's own with the policy that finetuned ships, callers of any uid, and a polkit that says what it is
//! told to. It takes root, `dbus-daemon`, `gdbus` and `setpriv`; polkit takes python3-dbusmock.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The name that the policy is about.
pub const NAME: &str = "org.finetuned.Finetuned1";

/// Where polkit is, and what controls its stand-in.
const POLKIT: [&str; 2] = ["org.freedesktop.PolicyKit1", "/org/freedesktop/PolicyKit1/Authority"];

/// The bus's own configuration: that of a system bus, and whatever polkit's stand-in needs.
const CONFIG: &str = r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <auth>EXTERNAL</auth>
  <listen>unix:path=@DIRECTORY@/bus</listen>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Introspectable"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Properties"/>
    <allow send_destination="org.freedesktop.PolicyKit1"/>
  </policy>
  <policy user="root">
    <allow own="org.freedesktop.PolicyKit1"/>
  </policy>
  <include>@DIRECTORY@/finetuned.conf</include>
</busconfig>
"#;

/// A process that ends with its handle.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The bus.
pub struct PrivateBus {
    directory: tempfile::TempDir,
    daemon: Process,
    polkit: Option<Process>,
}

/// Says that a test does not take place, and why; written past the test harness, which hides what a passing test prints.
pub fn skip(why: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_string();
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {why}");
}

/// Whether a program is installed.
pub fn is_there(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|p| p.join(program).exists()))
}

impl PrivateBus {
    /// A bus on which the user with this uid, who must exist, is in the place of the user `finetuned`. None,
    /// and a line that says why, where there cannot be one.
    pub fn start(finetuned: u32) -> Option<PrivateBus> {
        if !rustix::process::geteuid().is_root() {
            skip("callers of several uids take root");
            return None;
        }
        if let Some(missing) = ["dbus-daemon", "gdbus", "setpriv"].iter().find(|name| !is_there(name)) {
            skip(&format!("there is no {missing}"));
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        // Callers of other uids come to the socket in it.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("systemd/org.finetuned.Finetuned1.conf");
        let shipped = std::fs::read_to_string(shipped).unwrap();
        let substituted =
            shipped.replace("<policy user=\"finetuned\">", &format!("<policy user=\"{finetuned}\">"));
        assert_ne!(shipped, substituted, "the policy names the user finetuned");
        std::fs::write(directory.path().join("finetuned.conf"), substituted).unwrap();
        let config = CONFIG.replace("@DIRECTORY@", directory.path().to_str().unwrap());
        let file = directory.path().join("bus.conf");
        std::fs::write(&file, config).unwrap();
        let daemon = Command::new("dbus-daemon")
            .arg(format!("--config-file={}", file.display()))
            .args(["--nofork", "--print-address"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut daemon = Process(daemon);
        let mut line = String::new();
        BufReader::new(daemon.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("unix:"), "dbus-daemon says {line:?}");
        Some(PrivateBus { directory, daemon, polkit: None })
    }

    /// Its address.
    pub fn address(&self) -> String {
        format!("unix:path={}", self.socket().display())
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("bus")
    }

    /// Ends the bus, under everybody's feet.
    pub fn kill(&mut self) {
        self.daemon.0.kill().unwrap();
        self.daemon.0.wait().unwrap();
    }

    /// The command that calls a method as this user: `method` with its interface, arguments as GVariant texts.
    pub fn command(
        &self,
        uid: u32,
        destination: &str,
        path: &str,
        method: &str,
        arguments: &[&str],
    ) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args([format!("--reuid={uid}"), format!("--regid={uid}")])
            .args(["--clear-groups", "gdbus", "call", "--timeout=20", "--address"])
            .arg(self.address())
            .args(["--dest", destination, "--object-path", path, "--method", method])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Calls a method as this user: the answer as a GVariant text, or the name of the error and its text.
    pub fn call_to(
        &self,
        uid: u32,
        destination: &str,
        path: &str,
        method: &str,
        arguments: &[&str],
    ) -> Result<String, (String, String)> {
        let output = self.command(uid, destination, path, method, arguments).output().unwrap();
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim().to_string());
        }
        // "Error: GDBus.Error:org.example.Error.Name: text"
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let (name, text) = text
            .split_once("GDBus.Error:")
            .and_then(|(_, rest)| rest.split_once(": "))
            .unwrap_or_else(|| panic!("gdbus says {text:?}"));
        Err((name.to_string(), text.trim().to_string()))
    }

    /// As [`PrivateBus::call_to`], of finetuned.
    pub fn call(
        &self,
        uid: u32,
        path: &str,
        method: &str,
        arguments: &[&str],
    ) -> Result<String, (String, String)> {
        self.call_to(uid, NAME, path, method, arguments)
    }

    /// Starts a polkit that allows nothing yet. False, and a line that says why, where there is no python3-dbusmock.
    pub fn start_polkit(&mut self) -> bool {
        let known = Command::new("/usr/bin/python3").args(["-c", "import dbusmock"]).output();
        if !known.is_ok_and(|output| output.status.success()) {
            skip("there is no python3-dbusmock");
            return false;
        }
        let mock = Command::new("/usr/bin/python3")
            .args(["-m", "dbusmock", "--system", "--template", "polkitd"])
            .env("DBUS_SYSTEM_BUS_ADDRESS", self.address())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        self.polkit = Some(Process(mock));
        let begin = Instant::now();
        while self.tell_polkit("SetAllowed", "@as []").is_err() {
            assert!(begin.elapsed() < Duration::from_secs(20), "polkit's stand-in does not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        true
    }

    /// Ends polkit.
    pub fn stop_polkit(&mut self) {
        self.polkit = None;
    }

    /// Has polkit allow these actions, to everybody, and no others.
    pub fn allow(&self, actions: &[&str]) {
        let actions: Vec<String> = actions.iter().map(|name| format!("'{NAME}.{name}'")).collect();
        self.tell_polkit("SetAllowed", &format!("@as [{}]", actions.join(", "))).unwrap();
    }

    /// Has polkit answer nobody.
    pub fn hang_polkit(&self) {
        self.tell_polkit("SimulateHang", "true").unwrap();
    }

    fn tell_polkit(&self, method: &str, argument: &str) -> Result<String, (String, String)> {
        let method = format!("org.freedesktop.DBus.Mock.{method}");
        self.call_to(0, POLKIT[0], POLKIT[1], &method, &[argument])
    }
}
