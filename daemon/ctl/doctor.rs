//! `finetunectl doctor`: what may keep this machine from training, and what to do about it.
//!
//! First facts are gathered, from files below a root and from the bus; then they are judged, which needs neither.

use super::connect::{Transport, within};
use super::console::Colour;
use super::context::{Context, name_of};
use super::exit::{Code, Exit, Failure};
use super::text;
use crate::bus::NAME;
use crate::units::Bytes;
use rustix::process::{getegid, geteuid, getgroups};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use zbus::fdo::DBusProxy;
use zbus::names::{BusName, OwnedBusName};

/// polkit's name on the bus.
const POLKIT: &str = "org.freedesktop.PolicyKit1";

/// The group whose members may submit.
const GROUP: &str = "finetuned";

/// What CUDA opens on a Jetson Orin, and whose group owns it there.
const NODES: [(&str, &str); 4] = [
    ("/dev/nvmap", "video"),
    ("/dev/nvgpu/igpu0/ctrl", "video"),
    ("/dev/host1x-fence", "video"),
    ("/dev/dri/renderD128", "render"),
];

/// Where the driver's library lies, beside what the linker's cache lists.
const LIBRARIES: [&str; 4] = [
    "/usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1",
    "/usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1",
    "/usr/lib/aarch64-linux-gnu/libcuda.so.1",
    "/usr/lib/x86_64-linux-gnu/libcuda.so.1",
];

/// Less memory than this trains nothing but toys.
const LITTLE_MEMORY: Bytes = Bytes(4 << 30);

/// Less room than this holds no run.
const NO_ROOM: Bytes = Bytes(1 << 30);

/// Less room than this may not hold the tokens and the quantised base of the next run.
const LITTLE_ROOM: Bytes = Bytes(10 << 30);

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "fail",
        }
    }

    fn colour(self) -> Colour {
        match self {
            Verdict::Ok => Colour::Green,
            Verdict::Warn => Colour::Yellow,
            Verdict::Fail => Colour::Red,
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    message: String,
    /// What to do; empty where all is well.
    help: String,
}

fn ok(name: &'static str, message: impl Into<String>) -> Check {
    Check { name, verdict: Verdict::Ok, message: message.into(), help: String::new() }
}

fn warn(name: &'static str, message: impl Into<String>, help: impl Into<String>) -> Check {
    Check { name, verdict: Verdict::Warn, message: message.into(), help: help.into() }
}

fn fail(name: &'static str, message: impl Into<String>, help: impl Into<String>) -> Check {
    Check { verdict: Verdict::Fail, ..warn(name, message, help) }
}

/// Runs the command.
pub async fn command(context: &Context) -> Result<Code, Failure> {
    let mut checks = daemon_checks(&Answers::gather(context).await, &context.transport.describe());
    checks.extend(machine_checks(&Machine::gather(context)));
    let failed = checks.iter().any(|check| check.verdict == Verdict::Fail);
    if context.json {
        let checks: Vec<Value> = checks
            .iter()
            .map(|check| {
                let help = Some(&check.help).filter(|help| !help.is_empty());
                json!({
                    "name": check.name,
                    "verdict": check.verdict.word(),
                    "message": check.message,
                    "help": help,
                })
            })
            .collect();
        context.console.json(json!({ "checks": checks }))?;
    } else {
        for check in &checks {
            let word = context.console.paint(check.verdict.colour(), &format!("{:<4}", check.verdict.word()));
            context.console.line(&format!(
                "{word}  {:<10}  {}",
                check.name,
                text::printable(&check.message)
            ))?;
            if !check.help.is_empty() {
                context.console.line(&format!("{:18}help: {}", "", text::printable(&check.help)))?;
            }
        }
    }
    Ok(if failed { Exit::Error } else { Exit::Done }.into())
}

/// What the bus and the daemon say.
#[derive(Debug, Default)]
struct Answers {
    /// Why there is no connection.
    unreachable: Option<String>,
    /// A bus is between; else the daemon itself is at the other end.
    bus: bool,
    /// It is the system bus, where polkit decides.
    system: bool,
    /// The daemon's name has an owner.
    owned: bool,
    /// The daemon can be started by a call.
    activatable: bool,
    /// polkit is there, or can be started.
    polkit: bool,
    /// The daemon's version, or why there is no answer.
    version: Option<Result<String, String>>,
    /// What the governor wants a person to know.
    notes: Vec<String>,
}

impl Answers {
    async fn gather(context: &Context) -> Answers {
        let system = matches!(context.transport, Transport::System);
        let mut answers = Answers { system, ..Answers::default() };
        let client = match context.client().await {
            Ok(client) => client,
            Err(failure) => {
                answers.unreachable =
                    Some(failure.causes.into_iter().chain(failure.errors).next().unwrap_or_default());
                return answers;
            }
        };
        answers.bus = client.connection.is_bus();
        if answers.bus
            && let Ok(bus) = DBusProxy::new(&client.connection).await
        {
            let activatable = within(context.limit(), bus.list_activatable_names()).await.unwrap_or_default();
            let names = within(context.limit(), bus.list_names()).await.unwrap_or_default();
            let has = |names: &[OwnedBusName], name: &str| {
                BusName::try_from(name)
                    .is_ok_and(|name| names.iter().any(|known| known.as_str() == name.as_str()))
            };
            answers.owned = has(&names, NAME);
            answers.activatable = has(&activatable, NAME);
            answers.polkit = has(&names, POLKIT) || has(&activatable, POLKIT);
        }
        if !answers.bus || answers.owned || answers.activatable {
            let version = client.answer(client.manager.version()).await;
            answers.version = Some(version.map_err(|failure: Failure| failure.lines().join("; ")));
            answers.notes = client.notes().await;
        }
        answers
    }
}

fn daemon_checks(answers: &Answers, at: &str) -> Vec<Check> {
    let mut checks = Vec::new();
    if let Some(why) = &answers.unreachable {
        let help = if answers.bus || answers.system {
            "is the bus there? `systemctl status dbus`; in a container its socket must be mounted"
        } else {
            "is the daemon running, and is this its address?"
        };
        return vec![fail("bus", format!("{at} cannot be reached: {why}"), help)];
    }
    checks.push(ok("bus", at));
    if answers.bus {
        checks.push(match (answers.owned, answers.activatable) {
            (true, _) => ok("name", format!("{NAME} has an owner")),
            (false, true) => ok("name", format!("{NAME} starts when it is called")),
            (false, false) => fail(
                "name",
                format!("nobody owns {NAME}, and the bus does not know how to start it"),
                "is the package installed? `systemctl enable --now finetuned`; for a daemon of your own: --session",
            ),
        });
    }
    let own = env!("CARGO_PKG_VERSION");
    checks.extend(answers.version.as_ref().map(|version| match version {
        Ok(version) if version == own => ok("daemon", format!("version {version}, as this program")),
        Ok(version) => warn(
            "daemon",
            format!("version {version}; this program is {own}"),
            "after an update the daemon must be started again: `systemctl restart finetuned` (its run goes on)",
        ),
        Err(why) => fail("daemon", format!("does not answer: {why}"), "`journalctl -u finetuned` may say why"),
    }));
    checks.extend(answers.notes.iter().map(|note| {
        warn(
            "governor",
            note.clone(),
            "`finetunectl budget show` has every limit, `finetuned sensors` what is measured",
        )
    }));
    if let (Some(Ok(_)), []) = (&answers.version, &answers.notes[..]) {
        checks.push(ok("governor", "keeps every limit that is set"));
    }
    if answers.system {
        checks.push(if answers.polkit {
            ok("polkit", "decides who may do what")
        } else {
            warn(
                "polkit",
                "is not there: only root may steer the daemon",
                "install polkitd, or set [authorization] method = \"group\" in finetuned.toml",
            )
        });
    }
    checks
}

/// What the machine is.
#[derive(Debug, Default)]
struct Machine {
    root: bool,
    user: String,
    groups: Vec<String>,
    /// The board and its release, if it is a Jetson.
    jetson: Option<String>,
    /// It is an Orin.
    orin: bool,
    /// Nodes of the GPU that are missing.
    missing: Vec<&'static str>,
    /// libcuda is there.
    cuda: bool,
    available: Option<Bytes>,
    /// Where runs lie, and how much room there is.
    room: Option<(String, Bytes)>,
    kernel: String,
    glibc: Option<String>,
}

impl Machine {
    fn gather(context: &Context) -> Machine {
        let uid = geteuid();
        let read = |path: &str| fs::read(context.file(path)).ok();
        let text = |path: &str| read(path).map(|bytes| String::from_utf8_lossy(&bytes).replace('\0', " "));
        let group = context.file("/etc/group");
        let mut groups = getgroups().unwrap_or_default();
        groups.push(getegid());
        let compatible = text("/proc/device-tree/compatible").unwrap_or_default();
        let orin = compatible.contains("nvidia,tegra234");
        let release = text("/etc/nv_tegra_release");
        let jetson = (orin || release.is_some()).then(|| {
            let model = text("/proc/device-tree/model").unwrap_or_else(|| "a Jetson".into());
            let release = release.unwrap_or_else(|| "L4T unknown".into());
            let release = release.lines().next().unwrap_or_default();
            let release: Vec<&str> = release.trim_start_matches(['#', ' ']).split(", ").take(2).collect();
            format!("{}, {}", model.trim(), release.join(", "))
        });
        let listed = || {
            let cache = read("/etc/ld.so.cache").unwrap_or_default();
            cache.windows(12).any(|window| window == b"libcuda.so.1")
        };
        let state = ["/var/lib/finetuned", "/var/lib"].into_iter().find(|path| context.file(path).is_dir());
        Machine {
            root: uid.is_root(),
            user: context.user(uid.as_raw()),
            groups: groups.iter().filter_map(|gid| name_of(&group, gid.as_raw())).collect(),
            jetson,
            orin,
            missing: NODES
                .iter()
                .map(|(node, _)| *node)
                .filter(|node| !context.file(node).exists())
                .collect(),
            cuda: LIBRARIES.iter().any(|path| context.file(path).exists()) || listed(),
            available: text("/proc/meminfo").and_then(|text| available(&text)),
            room: state.and_then(|path| Some((path.to_string(), room(&context.file(path))?))),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            glibc: text("/proc/self/maps").and_then(|maps| glibc(&maps)),
        }
    }
}

/// `MemAvailable` of `/proc/meminfo`.
fn available(text: &str) -> Option<Bytes> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kib.saturating_mul(1024)))
}

fn room(path: &Path) -> Option<Bytes> {
    let file_system = rustix::fs::statvfs(path).ok()?;
    Some(Bytes(file_system.f_bavail.saturating_mul(file_system.f_frsize)))
}

/// The version in the banner of the C library that this process has mapped.
fn glibc(maps: &str) -> Option<String> {
    let path = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).find(|path| {
        let name = path.rsplit('/').next().unwrap_or_default();
        name.starts_with("libc.so") || name.starts_with("libc-")
    })?;
    let library = fs::read(path).ok()?;
    let banner = b"stable release version ";
    let at = library.windows(banner.len()).position(|window| window == banner)? + banner.len();
    let version = library[at..].iter().take_while(|byte| byte.is_ascii_digit() || **byte == b'.');
    Some(version.map(|&byte| byte as char).collect::<String>().trim_end_matches('.').to_string())
}

fn machine_checks(machine: &Machine) -> Vec<Check> {
    let member = |group: &str| machine.root || machine.groups.iter().any(|of| of == group);
    let join = |group: &str| format!("`sudo usermod -aG {group} {}`, then log in again", machine.user);
    let mut checks = vec![if member(GROUP) {
        let may = if machine.root {
            "do everything".into()
        } else {
            format!("submit runs: it is in group {GROUP}")
        };
        ok("rights", format!("{} may {may}", machine.user))
    } else {
        warn(
            "rights",
            format!("{} is not in group {GROUP}: polkit may ask for a password", machine.user),
            join(GROUP),
        )
    }];
    match &machine.jetson {
        None => checks.push(ok("board", "no Jetson")),
        // Others have other nodes.
        Some(board) if !machine.orin => checks.push(warn(
            "board",
            format!("{board}: no Orin, the only Jetson that finetuned is made for"),
            "`finetunectl submit` with train.backend = \"cpu\" works on every Linux machine",
        )),
        Some(board) => {
            checks.push(ok("board", board));
            checks.push(if machine.missing.is_empty() {
                ok("nodes", "every node of the GPU is there")
            } else {
                fail(
                    "nodes",
                    format!("missing: {}", machine.missing.join(", ")),
                    "is the NVIDIA driver loaded? `lsmod | grep nv`; in a container the nodes must be passed in",
                )
            });
            let outside: Vec<&str> = ["video", "render"].into_iter().filter(|group| !member(group)).collect();
            checks.push(if outside.is_empty() {
                ok("groups", format!("{} may open the GPU", machine.user))
            } else {
                let groups = outside.join(" and ");
                // The daemon's worker has its own rights.
                let message = format!(
                    "{} is not in {groups}: `finetuned run` cannot open the GPU; runs can",
                    machine.user
                );
                warn("groups", message, join(&outside.join(",")))
            });
        }
    }
    checks.push(match (machine.cuda, machine.jetson.is_some()) {
        (true, _) => ok("cuda", "libcuda.so.1 is there"),
        (false, true) => fail("cuda", "libcuda.so.1 is not there", "`sudo apt install nvidia-l4t-cuda`"),
        (false, false) => warn(
            "cuda",
            "libcuda.so.1 is not there: runs compute on the CPU",
            "with an NVIDIA GPU, install its driver; without one, nothing is wrong",
        ),
    });
    checks.push(match machine.available {
        None => warn("memory", "MemAvailable is not known", "is /proc mounted?"),
        Some(bytes) if bytes < LITTLE_MEMORY => warn(
            "memory",
            format!("{bytes} available"),
            "close what is not needed; `finetuned plan SPEC` says what a run takes",
        ),
        Some(bytes) => ok("memory", format!("{bytes} available")),
    });
    checks.extend(machine.room.as_ref().map(|(path, bytes)| {
        let message = format!("{bytes} free in {path}");
        let help = "`finetunectl remove RUN` deletes runs that are over";
        match *bytes {
            bytes if bytes < NO_ROOM => fail("disk", message, help),
            bytes if bytes < LITTLE_ROOM => warn("disk", message, help),
            _ => ok("disk", message),
        }
    }));
    let glibc =
        machine.glibc.as_ref().map_or_else(|| "no glibc".into(), |version| format!("glibc {version}"));
    checks.push(ok("system", format!("Linux {}, {glibc}", machine.kernel)));
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(checks: &[Check]) -> Vec<String> {
        checks.iter().map(|check| format!("{} {}", check.verdict.word(), check.name)).collect()
    }

    /// Whatever is not well comes with what to do.
    fn assert_helpful(checks: &[Check]) {
        for check in checks {
            assert_eq!(check.help.is_empty(), check.verdict == Verdict::Ok, "{check:?}");
        }
    }

    fn jetson() -> Machine {
        Machine {
            user: "robot".into(),
            groups: vec!["finetuned".into(), "video".into(), "render".into()],
            jetson: Some("NVIDIA Jetson AGX Orin Developer Kit, R36 (release)".into()),
            orin: true,
            cuda: true,
            available: Some(Bytes(40 << 30)),
            room: Some(("/var/lib/finetuned".into(), Bytes(100 << 30))),
            kernel: "5.15.148-tegra".into(),
            glibc: Some("2.35".into()),
            ..Machine::default()
        }
    }

    #[test]
    fn a_jetson_as_it_should_be() {
        let checks = machine_checks(&jetson());
        assert!(checks.iter().all(|check| check.verdict == Verdict::Ok), "{checks:?}");
        assert_helpful(&checks);
    }

    #[test]
    fn a_jetson_as_it_should_not_be() {
        let machine = Machine {
            groups: vec!["video".into()],
            missing: vec!["/dev/nvmap"],
            cuda: false,
            available: Some(Bytes(1 << 30)),
            room: Some(("/var/lib".into(), Bytes(1 << 20))),
            ..jetson()
        };
        let checks = machine_checks(&machine);
        assert_eq!(
            summary(&checks),
            [
                "warn rights",
                "ok board",
                "fail nodes",
                "warn groups",
                "fail cuda",
                "warn memory",
                "fail disk",
                "ok system"
            ]
        );
        assert!(checks[0].help.contains("usermod -aG finetuned robot"));
        assert!(checks[3].help.contains("usermod -aG render robot"));
        assert_helpful(&checks);
    }

    #[test]
    fn another_jetson_is_not_judged_by_the_nodes_of_this_one() {
        let machine = Machine { orin: false, missing: vec!["/dev/nvmap"], ..jetson() };
        let checks = machine_checks(&machine);
        assert_eq!(
            summary(&checks),
            ["ok rights", "warn board", "ok cuda", "ok memory", "ok disk", "ok system"]
        );
        assert_helpful(&checks);
    }

    #[test]
    fn another_machine_computes_on_its_cpu() {
        let machine =
            Machine { jetson: None, orin: false, cuda: false, missing: vec!["/dev/nvmap"], ..jetson() };
        let checks = machine_checks(&machine);
        assert_eq!(
            summary(&checks),
            ["ok rights", "ok board", "warn cuda", "ok memory", "ok disk", "ok system"]
        );
        assert_helpful(&checks);
    }

    #[test]
    fn the_daemon_is_looked_for_step_by_step() {
        let own = || Some(Ok(env!("CARGO_PKG_VERSION").to_string()));
        let well = Answers {
            bus: true,
            system: true,
            owned: true,
            polkit: true,
            version: own(),
            ..Answers::default()
        };
        let of = |answers: &Answers| {
            let checks = daemon_checks(answers, "the system bus");
            assert_helpful(&checks);
            summary(&checks)
        };
        assert_eq!(of(&well), ["ok bus", "ok name", "ok daemon", "ok governor", "ok polkit"]);
        let blind = Answers {
            notes: vec!["it is blind".into()],
            system: false,
            version: own(),
            ..Answers::default()
        };
        assert_eq!(of(&blind), ["ok bus", "ok daemon", "warn governor"]);
        let none = Answers { owned: false, version: None, polkit: false, ..well };
        assert_eq!(of(&none), ["ok bus", "fail name", "warn polkit"]);
        let asleep = Answers { activatable: true, version: Some(Err("no".into())), ..none };
        assert_eq!(of(&asleep), ["ok bus", "ok name", "fail daemon", "warn polkit"]);
        let old = Answers { version: Some(Ok("0.0.1".into())), ..Answers::default() };
        assert_eq!(of(&old), ["ok bus", "warn daemon", "ok governor"]);
        let cut = Answers { unreachable: Some("no socket".into()), ..Answers::default() };
        assert_eq!(of(&cut), ["fail bus"]);
    }

    #[test]
    fn facts_are_read_from_the_kernel() {
        let text = "MemTotal:       64 kB\nMemAvailable:   48 kB\n";
        assert_eq!(available(text), Some(Bytes(48 * 1024)));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
        assert_eq!(available("MemAvailable: x kB\n"), None);
        assert!(room(Path::new("/")).is_some());
        if let Some(version) = glibc(&fs::read_to_string("/proc/self/maps").unwrap()) {
            assert!(version.starts_with("2."), "{version}");
        }
    }
}
