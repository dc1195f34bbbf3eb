//! The units as they are installed: only what systemd 249 knows, the whole sandbox, and paths that the package fills.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The oldest systemd that is supported: that of Ubuntu 22.04, JetPack 6.
const OLDEST: u32 = 249;

/// Every directive that a unit may use, by section, with the version of systemd that brought it (its NEWS; 1 where it is
/// older than all that matter). One that is not here is looked up there before it is used.
const DIRECTIVES: &[(&str, &[(&str, u32)])] = &[
    (
        "Unit",
        &[
            ("Description", 1),
            ("Documentation", 1),
            ("Requires", 1),
            ("Wants", 1),
            ("After", 1),
            ("Before", 1),
            ("CollectMode", 236),
            ("StartLimitIntervalSec", 230),
            ("StartLimitBurst", 230),
        ],
    ),
    (
        "Service",
        &[
            ("Type", 1),
            ("NotifyAccess", 1),
            ("BusName", 1),
            ("ExecStart", 1),
            ("ExecReload", 1),
            ("Environment", 1),
            ("User", 1),
            ("Group", 1),
            ("SupplementaryGroups", 1),
            ("UMask", 1),
            ("StateDirectory", 235),
            ("StateDirectoryMode", 235),
            ("CacheDirectory", 235),
            ("CacheDirectoryMode", 235),
            ("WatchdogSec", 1),
            ("Restart", 1),
            ("RestartSec", 1),
            ("RestartPreventExitStatus", 1),
            ("TimeoutStopSec", 1),
            ("KillMode", 1),
            ("StandardInput", 1),
            ("StandardOutput", 1),
            ("StandardError", 1),
            ("SyslogIdentifier", 1),
            ("Slice", 205),
            ("Nice", 1),
            ("CPUSchedulingPolicy", 1),
            ("IOSchedulingClass", 1),
            ("OOMScoreAdjust", 1),
            ("OOMPolicy", 243),
            ("MemoryMax", 231),
            ("TasksMax", 227),
            ("LimitNOFILE", 1),
            ("LimitCORE", 1),
            ("DevicePolicy", 208),
            ("DeviceAllow", 208),
            ("CapabilityBoundingSet", 1),
            ("AmbientCapabilities", 229),
            ("NoNewPrivileges", 1),
            ("PrivateDevices", 209),
            ("PrivateNetwork", 1),
            ("PrivateMounts", 239),
            ("PrivateTmp", 1),
            ("PrivateIPC", 248),
            ("IPAddressDeny", 235),
            ("RestrictAddressFamilies", 211),
            ("ProtectSystem", 214),
            ("ProtectHome", 214),
            ("ProtectClock", 245),
            ("ProtectControlGroups", 232),
            ("ProtectHostname", 242),
            ("ProtectKernelLogs", 244),
            ("ProtectKernelModules", 232),
            ("ProtectKernelTunables", 232),
            ("ProtectProc", 247),
            ("RestrictNamespaces", 233),
            ("RestrictRealtime", 231),
            ("RestrictSUIDSGID", 242),
            ("LockPersonality", 235),
            ("MemoryDenyWriteExecute", 231),
            ("RemoveIPC", 232),
            ("KeyringMode", 235),
            ("SystemCallArchitectures", 209),
            ("SystemCallFilter", 187),
            ("SystemCallErrorNumber", 209),
        ],
    ),
    (
        "Socket",
        &[
            ("ListenStream", 1),
            ("SocketUser", 214),
            ("SocketGroup", 214),
            ("SocketMode", 1),
            ("Accept", 1),
            ("MaxConnections", 1),
        ],
    ),
    ("Slice", &[("CPUWeight", 232), ("IOWeight", 230), ("MemoryMax", 231)]),
    ("Install", &[("WantedBy", 1), ("Alias", 1)]),
];

/// What both services must have. What one of them leaves out it names in a comment, with the reason.
const SANDBOX: &[(&str, &str)] = &[
    ("AmbientCapabilities", ""),
    ("CapabilityBoundingSet", ""),
    ("DevicePolicy", "closed"),
    ("IPAddressDeny", "any"),
    ("KeyringMode", "private"),
    ("LimitCORE", "0"),
    ("LockPersonality", "yes"),
    ("MemoryDenyWriteExecute", "yes"),
    ("NoNewPrivileges", "yes"),
    ("PrivateDevices", "yes"),
    ("PrivateIPC", "yes"),
    ("PrivateMounts", "yes"),
    ("PrivateNetwork", "yes"),
    ("PrivateTmp", "yes"),
    ("PrivateUsers", "yes"),
    ("ProcSubset", "pid"),
    ("ProtectClock", "yes"),
    ("ProtectControlGroups", "yes"),
    ("ProtectHome", "yes"),
    ("ProtectHostname", "yes"),
    ("ProtectKernelLogs", "yes"),
    ("ProtectKernelModules", "yes"),
    ("ProtectKernelTunables", "yes"),
    ("ProtectProc", "invisible"),
    ("ProtectSystem", "strict"),
    ("RemoveIPC", "yes"),
    ("RestrictAddressFamilies", "AF_UNIX"),
    ("RestrictNamespaces", "yes"),
    ("RestrictRealtime", "yes"),
    ("RestrictSUIDSGID", "yes"),
    ("SystemCallArchitectures", "native"),
    ("SystemCallErrorNumber", "EPERM"),
    ("SystemCallFilter", "@system-service"),
    ("UMask", "0077"),
    ("User", "finetuned"),
];

/// What the services may leave out of it.
const LEFT_OUT: &[(&str, &[&str])] = &[
    ("finetuned.service", &["PrivateUsers", "ProcSubset"]),
    (
        "finetuned-worker@.service",
        &["PrivateDevices", "MemoryDenyWriteExecute", "PrivateUsers", "ProcSubset"],
    ),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A unit: its name, and section, directive and value of every line.
struct Unit {
    name: String,
    text: String,
    lines: Vec<(String, String, String)>,
}

impl Unit {
    fn read(path: &Path) -> Unit {
        let text = std::fs::read_to_string(path).unwrap();
        let mut section = String::new();
        let mut lines = Vec::new();
        for line in
            text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';']))
        {
            if let Some(name) = line.strip_prefix('[') {
                section = name.trim_end_matches(']').to_string();
            } else {
                let (directive, value) =
                    line.split_once('=').unwrap_or_else(|| panic!("{}: {line}", path.display()));
                lines.push((section.clone(), directive.to_string(), value.to_string()));
            }
        }
        Unit { name: path.file_name().unwrap().to_str().unwrap().to_string(), text, lines }
    }

    fn values(&self, directive: &str) -> Vec<&str> {
        self.lines.iter().filter(|(_, name, _)| name == directive).map(|(.., value)| value.as_str()).collect()
    }
}

fn units() -> Vec<Unit> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(root().join("systemd"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            // Activation of D-Bus has the ending of a service, too.
            [".service", ".socket", ".slice", ".timer", ".target"].iter().any(|end| name.ends_with(end))
                && !name.starts_with("org.")
        })
        .collect();
    paths.sort();
    assert!(paths.len() >= 4, "{paths:?}");
    paths.iter().map(|path| Unit::read(path)).collect()
}

fn unit(name: &str) -> Unit {
    Unit::read(&root().join("systemd").join(name))
}

#[test]
fn units_use_only_what_the_oldest_systemd_knows() {
    for unit in units() {
        for (section, directive, _) in &unit.lines {
            let known =
                DIRECTIVES.iter().find(|(name, _)| name == section).map_or(&[][..], |(_, known)| known);
            let since = known.iter().find(|(name, _)| name == directive).map(|(_, since)| *since);
            let place = format!("{} [{section}] {directive}", unit.name);
            assert!(
                since.is_some_and(|since| since <= OLDEST),
                "{place}: not in systemd {OLDEST}, or not looked up"
            );
        }
        // notify-reload came with 253.
        for kind in unit.values("Type") {
            assert!(["simple", "exec", "notify", "oneshot"].contains(&kind), "{}: Type={kind}", unit.name);
        }
    }
}

#[test]
fn both_services_have_the_whole_sandbox_or_say_why_not() {
    for (name, left_out) in LEFT_OUT {
        let unit = unit(name);
        for (directive, value) in SANDBOX {
            if left_out.contains(directive) {
                assert!(unit.values(directive).is_empty(), "{name}: {directive} is said to be left out");
                assert!(unit.text.contains(&format!("#   {directive}=")), "{name}: why no {directive}?");
            } else {
                assert_eq!(unit.values(directive).first(), Some(value), "{name}: {directive}");
            }
        }
    }
    let filters = unit("finetuned.service");
    assert_eq!(filters.values("SystemCallFilter"), ["@system-service", "~@privileged @resources"]);
    assert_eq!(
        unit("finetuned-worker@.service").values("SystemCallFilter"),
        ["@system-service", "~@privileged"]
    );
    assert!(filters.values("DeviceAllow").is_empty(), "the daemon has no devices");
}

#[test]
fn the_worker_has_the_nodes_of_the_gpu_and_no_others() {
    let unit = unit("finetuned-worker@.service");
    let allowed = unit.values("DeviceAllow");
    assert!(allowed.len() > 10);
    for device in allowed {
        let node = device.split(' ').next().unwrap();
        let is_the_gpus = ["/dev/nvmap", "/dev/host1x-fence", "char-drm"].contains(&node)
            || node.starts_with("/dev/nvgpu/igpu0/")
            || node.starts_with("/dev/nvhost-");
        // What debuggers and profilers open is not needed to compute.
        let for_tools = ["dbg", "prof", "ctxsw", "sched"].iter().any(|part| node.ends_with(part));
        assert!(is_the_gpus && (!for_tools || device == "/dev/nvgpu/igpu0/nvsched r"), "{device}");
    }
}

#[test]
fn what_units_and_configuration_refer_to_is_what_the_package_installs() {
    let build = std::fs::read_to_string(root().join("cross/build")).unwrap();
    let installs =
        |path: &str| build.contains(&format!(" {path}\n")) || build.contains(&format!(" {path} 755\n"));
    for unit in units() {
        assert!(build.contains(&unit.name), "cross/build does not install {}", unit.name);
        for command in unit.values("ExecStart") {
            let program = command.split(' ').next().unwrap();
            let program = program.strip_prefix("/usr/bin/").unwrap();
            assert!(
                build.contains("usr/bin/$program 755") && build.contains(program),
                "{}: {program}",
                unit.name
            );
        }
    }
    // The daemon connects where the socket listens.
    let vendor: toml::Table =
        std::fs::read_to_string(root().join("systemd/finetuned.vendor.toml")).unwrap().parse().unwrap();
    let launch = vendor["worker"]["launch"].as_str().unwrap();
    let socket = unit("finetuned-worker.socket");
    assert_eq!(socket.values("ListenStream"), [launch.strip_prefix("unix:").unwrap()]);
    assert!(installs("usr/lib/finetuned/finetuned.toml"));
    // Bus activation names the alias of the daemon's unit, and the name that it takes.
    let activation = Unit::read(&root().join("systemd/org.finetuned.Finetuned1.service"));
    let daemon = unit("finetuned.service");
    assert_eq!(activation.values("SystemdService"), daemon.values("Alias"));
    assert_eq!(activation.values("Name"), daemon.values("BusName"));
    // Directories and users are those of the units.
    for (file, words) in [("finetuned.sysusers", "u finetuned"), ("finetuned.tmpfiles", "/var/lib/finetuned")]
    {
        let text = std::fs::read_to_string(root().join("systemd").join(file)).unwrap();
        assert!(text.lines().any(|line| line.contains(words) && !line.starts_with('#')), "{file}");
    }
    for group in unit("finetuned-worker@.service").values("SupplementaryGroups")[0].split(' ') {
        let users = std::fs::read_to_string(root().join("systemd/finetuned.sysusers")).unwrap();
        assert!(users.lines().any(|line| line.split_whitespace().take(2).eq(["g", group])), "group {group}");
    }
}

#[test]
fn everything_in_systemd_is_installed() {
    let build = std::fs::read_to_string(root().join("cross/build")).unwrap();
    let missing: BTreeSet<String> = std::fs::read_dir(root().join("systemd"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !build.contains(name.as_str()))
        .collect();
    assert!(missing.is_empty(), "cross/build does not install {missing:?}");
}

/// polkit answers questions about others only to root and to the owner of the action.
#[test]
fn the_daemon_may_ask_polkit_about_every_action() {
    let policy = root().join("systemd/org.finetuned.Finetuned1.policy");
    let policy = std::fs::read_to_string(policy).unwrap();
    let user = unit("finetuned.service").values("User")[0].to_string();
    let owner = format!("<annotate key=\"org.freedesktop.policykit.owner\">unix-user:{user}</annotate>");
    let actions: Vec<&str> = policy.split("<action id=").skip(1).collect();
    assert_eq!(actions.len(), finetuned::bus::authority::Action::ALL.len());
    for action in actions {
        assert!(action.contains(&owner), "no owner: {}", action.lines().next().unwrap());
    }
}
