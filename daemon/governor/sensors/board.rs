//! Boards: what must be there, what is what, and which rails make the power.
//!
//! Sources, by what they are good for. Modules: the part number in the device tree's `compatible`, as NVIDIA numbers its
//! modules. Zones and rails of the AGX Orin: the upstream device tree of p3701 and what JetPack 6 shows on a device.
//! JetPack of an L4T release: NVIDIA's release notes. Trips, clocks and power modes are not here: they differ between
//! releases and are read from the running machine.

use super::files::{ATTRIBUTE, CONFIGURATION, Fault, Files};
use crate::governor::readings::ZoneRole;

/// What is known of a board before it is looked at.
#[derive(Debug, PartialEq)]
pub struct BoardTable {
    /// Name in `[board] name`.
    pub name: &'static str,
    /// Name for people.
    pub title: &'static str,
    /// Part numbers of its modules, as they stand in `compatible`.
    pub modules: &'static [&'static str],
    /// Zones by the beginning of their type.
    pub zones: &'static [ZoneRule],
    /// Labels of the rails that are counted, all of which must be there; empty: see `rails`.
    pub rails: &'static [&'static str],
}

/// What a zone is.
#[derive(Debug, PartialEq)]
pub struct ZoneRule {
    /// The type up to its first `-`, in lower case: `tj` for `tj-thermal` and `TJ-therm`.
    pub prefix: &'static str,
    /// What its temperature is of.
    pub role: ZoneRole,
    /// Whether it must be there.
    pub required: bool,
}

const fn zone(prefix: &'static str, role: ZoneRole, required: bool) -> ZoneRule {
    ZoneRule { prefix, role, required }
}

/// Zones of every Orin module. `tj` is the maximum of the chip's, computed by the boot processor. `cpu` and `gpu` must
/// be there because they stand in for a `tj` that is disabled. `cv0` to `cv2` are gated most of the time.
const ORIN_ZONES: &[ZoneRule] = &[
    zone("tj", ZoneRole::Junction, true),
    zone("cpu", ZoneRole::Die, true),
    zone("gpu", ZoneRole::Die, true),
    zone("cv0", ZoneRole::Die, false),
    zone("cv1", ZoneRole::Die, false),
    zone("cv2", ZoneRole::Die, false),
    zone("soc0", ZoneRole::Die, false),
    zone("soc1", ZoneRole::Die, false),
    zone("soc2", ZoneRole::Die, false),
    zone("tboard", ZoneRole::Board, false),
    zone("tdiode", ZoneRole::Board, false),
];

/// Rails of AGX Orin: INA3221 1-0040 channels 1 to 3 and 1-0041 channel 2. There is none for the whole module. Whether
/// `VIN_SYS_5V0` feeds `VDDQ_VDD2_1V8AO` and so counts it twice is not documented; counting both errs to the safe side.
const AGX_RAILS: &[&str] = &["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"];

/// Orin NX and Nano measure the whole module in one rail; the other two are parts of it.
const NX_RAILS: &[&str] = &["VDD_IN"];

/// Zones of any other Linux machine, by the names that drivers in the kernel give. The firmware's `acpitz` is near the
/// processor on most machines, and on many it is all there is.
const GENERIC_ZONES: &[ZoneRule] = &[
    zone("tj", ZoneRole::Junction, false),
    zone("x86_pkg_temp", ZoneRole::Junction, false),
    zone("package", ZoneRole::Junction, false),
    zone("cpu", ZoneRole::Die, false),
    zone("cpu0", ZoneRole::Die, false),
    zone("cpu_thermal", ZoneRole::Die, false),
    zone("gpu", ZoneRole::Die, false),
    zone("gpu_thermal", ZoneRole::Die, false),
    zone("soc", ZoneRole::Die, false),
    zone("soc0", ZoneRole::Die, false),
    zone("soc1", ZoneRole::Die, false),
    zone("soc2", ZoneRole::Die, false),
    zone("soc_thermal", ZoneRole::Die, false),
    zone("bigcore", ZoneRole::Die, false),
    zone("bigcore0", ZoneRole::Die, false),
    zone("bigcore1", ZoneRole::Die, false),
    zone("littlecore", ZoneRole::Die, false),
    zone("acpitz", ZoneRole::Die, false),
    zone("b0d4", ZoneRole::Die, false),
    zone("tcpu", ZoneRole::Die, false),
];

/// Every board, the generic one last.
pub const BOARDS: &[BoardTable] = &[
    BoardTable {
        name: "agx-orin-64gb",
        title: "Jetson AGX Orin 64 GB",
        // -0000 is the module of the early developer kit, -0002 that of the IGX Orin developer kit.
        modules: &["p3701-0005", "p3701-0000", "p3701-0002"],
        zones: ORIN_ZONES,
        rails: AGX_RAILS,
    },
    BoardTable {
        name: "agx-orin-32gb",
        title: "Jetson AGX Orin 32 GB",
        modules: &["p3701-0004"],
        zones: ORIN_ZONES,
        rails: AGX_RAILS,
    },
    BoardTable {
        name: "agx-orin-industrial",
        title: "Jetson AGX Orin Industrial",
        modules: &["p3701-0008"],
        zones: ORIN_ZONES,
        rails: AGX_RAILS,
    },
    BoardTable {
        name: "orin-nx",
        title: "Jetson Orin NX",
        modules: &["p3767-0000", "p3767-0001"],
        zones: ORIN_ZONES,
        rails: NX_RAILS,
    },
    BoardTable {
        name: "orin-nano",
        title: "Jetson Orin Nano",
        modules: &["p3767-0003", "p3767-0004", "p3767-0005"],
        zones: ORIN_ZONES,
        rails: NX_RAILS,
    },
    BoardTable { name: "generic", title: "Linux machine", modules: &[], zones: GENERIC_ZONES, rails: &[] },
];

/// Any machine that is no other.
const GENERIC: &BoardTable = &BOARDS[BOARDS.len() - 1];

impl BoardTable {
    /// The board with this name.
    pub fn named(name: &str) -> Option<&'static BoardTable> {
        BOARDS.iter().find(|board| board.name == name)
    }

    /// The board of a machine; `generic` where it is not known.
    pub fn of(identity: &Identity) -> &'static BoardTable {
        let module = identity.module.as_deref();
        BOARDS
            .iter()
            .find(|board| module.is_some_and(|module| board.modules.contains(&module)))
            .unwrap_or(GENERIC)
    }

    /// Whether this is no board that is known.
    pub fn is_generic(&self) -> bool {
        self.name == GENERIC.name
    }

    /// What the zone with this type (lower case) is; a zone nobody knows is of the board.
    pub fn zone(&self, kind: &str) -> (ZoneRole, bool) {
        let prefix = prefix(kind);
        let rule = self.zones.iter().find(|rule| rule.prefix == prefix);
        rule.map_or((ZoneRole::Board, false), |rule| (rule.role, rule.required))
    }
}

/// What of a zone's type tells which zone it is: `cpu` of `cpu-thermal` and `cpu-therm`, `tboard` of `tboard_tegra`.
pub fn prefix(kind: &str) -> &str {
    let prefix = kind.split('-').next().unwrap_or(kind);
    prefix.strip_suffix("_tegra").unwrap_or(prefix)
}

/// What a machine says that it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Identity {
    /// `NVIDIA Jetson AGX Orin Developer Kit`.
    pub model: Option<String>,
    /// `nvidia,p3737-0000+p3701-0005`, `nvidia,tegra234`.
    pub compatible: Vec<String>,
    /// Part number of the module: `p3701-0005`.
    pub module: Option<String>,
    /// Release of Jetson Linux: `36.4.3`.
    pub l4t: Option<String>,
    /// JetPack with that release: `6.2`.
    pub jetpack: Option<&'static str>,
}

impl Identity {
    /// Asks the machine. On a PC nothing is known.
    pub fn read(files: &dyn Files) -> Identity {
        let model = files.name("proc/device-tree/model").ok();
        let compatible: Vec<String> = files
            .read("proc/device-tree/compatible", ATTRIBUTE)
            .unwrap_or_default()
            .split(|&byte| byte == 0)
            .filter_map(|name| std::str::from_utf8(name).ok())
            .filter(|name| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic()))
            .map(str::to_string)
            .collect();
        let l4t = files.text("etc/nv_tegra_release", CONFIGURATION).ok().and_then(|text| l4t(&text));
        let jetpack = l4t.as_deref().and_then(jetpack);
        Identity { model, module: module(&compatible), compatible, l4t, jetpack }
    }

    /// Why nothing is known, or in words what is.
    pub fn describe(&self) -> Result<String, Fault> {
        let mut parts: Vec<String> = self.model.iter().cloned().collect();
        parts.extend(self.module.as_ref().map(|module| format!("module {module}")));
        parts.extend(self.l4t.as_ref().map(|l4t| format!("L4T {l4t}")));
        parts.extend(self.jetpack.map(|jetpack| format!("JetPack {jetpack}")));
        if parts.is_empty() { Err(Fault::Missing) } else { Ok(parts.join(", ")) }
    }
}

/// The module's part number: `p` and four digits, `-` and four digits, of a family of modules (37xx is Orin's: a
/// carrier, as p3737 or p3768, is not one).
fn module(compatible: &[String]) -> Option<String> {
    let parts = compatible.iter().flat_map(|name| name.split([',', '+']));
    let is_module = |part: &&str| {
        let digits = |text: &str| text.len() == 4 && text.bytes().all(|byte| byte.is_ascii_digit());
        part.strip_prefix('p')
            .and_then(|numbers| numbers.split_once('-'))
            .is_some_and(|(family, variant)| ["3701", "3767"].contains(&family) && digits(variant))
    };
    parts.into_iter().find(is_module).map(str::to_string)
}

/// `36.4.3` of `# R36 (release), REVISION: 4.3, GCID: …`.
fn l4t(text: &str) -> Option<String> {
    let line = text.lines().next()?;
    let number = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let number = text[..end].trim_matches('.');
        (!number.is_empty() && number.len() < 16).then(|| number.to_string())
    };
    let major = number(line.split_once("# R")?.1)?;
    let minor = number(line.split_once("REVISION:")?.1.trim_start())?;
    Some(format!("{major}.{minor}"))
}

/// The JetPack that a release of Jetson Linux belongs to.
fn jetpack(l4t: &str) -> Option<&'static str> {
    // From NVIDIA's release notes; a release without an entry here has none in words.
    const RELEASES: &[(&str, &str)] = &[
        ("35.1.0", "5.0.2"),
        ("35.6.0", "5.1.4"),
        ("35.6.1", "5.1.5"),
        ("35.6.2", "5.1.5"),
        ("35.6.3", "5.1.5"),
        ("35.6.4", "5.1.6"),
        ("36.3.0", "6.0"),
        ("36.4.0", "6.1"),
        ("36.4.2", "6.1"),
        ("36.4.3", "6.2"),
        ("36.4.4", "6.2.1"),
        ("36.4.7", "6.2.1"),
        ("36.5.0", "6.2.2"),
        ("38.4.0", "7.1"),
        ("39.2.0", "7.2"),
    ];
    RELEASES.iter().find(|(release, _)| *release == l4t).map(|(_, jetpack)| *jetpack)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(compatible: &[&str]) -> Identity {
        let compatible: Vec<String> = compatible.iter().map(|name| name.to_string()).collect();
        Identity { module: module(&compatible), compatible, ..Identity::default() }
    }

    #[test]
    fn the_module_decides_not_the_carrier() {
        for (compatible, board) in [
            (["nvidia,p3737-0000+p3701-0005", "nvidia,tegra234"], "agx-orin-64gb"),
            (["nvidia,p3737-0000+p3701-0000", "nvidia,p3701-0000"], "agx-orin-64gb"),
            (["nvidia,p3737-0000+p3701-0004", "nvidia,tegra234"], "agx-orin-32gb"),
            (["vendor,box", "nvidia,p3701-0008"], "agx-orin-industrial"),
            (["nvidia,p3768-0000+p3767-0000", "nvidia,p3767-0000"], "orin-nx"),
            (["nvidia,p3768-0000+p3767-0005-super", "nvidia,p3767-0005"], "orin-nano"),
            (["nvidia,p3701-9999", "nvidia,tegra234"], "generic"),
            (["raspberrypi,5-model-b", "brcm,bcm2712"], "generic"),
        ] {
            assert_eq!(BoardTable::of(&identity(&compatible)).name, board, "{compatible:?}");
        }
        assert_eq!(BoardTable::of(&Identity::default()).name, "generic");
    }

    #[test]
    fn boards_are_named_once_and_modules_belong_to_one() {
        for (i, board) in BOARDS.iter().enumerate() {
            assert_eq!(BoardTable::named(board.name), Some(board));
            assert!(!BOARDS[..i].iter().any(|other| other.modules.iter().any(|m| board.modules.contains(m))));
            assert!(board.zones.iter().any(|zone| zone.role == ZoneRole::Junction), "{}", board.name);
        }
        assert_eq!(BoardTable::named("toaster"), None);
        let names: Vec<&str> = BOARDS.iter().map(|board| board.name).collect();
        assert_eq!(names, crate::config::budget::BOARDS, "the names that the configuration takes");
    }

    #[test]
    fn zones_are_known_in_the_spelling_of_every_jetpack() {
        let board = BoardTable::named("agx-orin-64gb").unwrap();
        for (kind, role, required) in [
            ("tj-thermal", ZoneRole::Junction, true),
            ("tj-therm", ZoneRole::Junction, true),
            ("cpu-therm", ZoneRole::Die, true),
            ("tboard_tegra", ZoneRole::Board, false),
            ("hot-surface", ZoneRole::Board, false),
            ("cv10-thermal", ZoneRole::Board, false),
        ] {
            assert_eq!(board.zone(kind), (role, required), "{kind}");
        }
    }

    #[test]
    fn releases_are_read_from_the_first_line() {
        assert_eq!(l4t("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic"), Some("36.4.3".into()));
        assert_eq!(l4t("# R35 (release), REVISION: 6.1\nx"), Some("35.6.1".into()));
        for bad in ["", "R36", "# R (release), REVISION: 4", "# R36 (release)", "# R36, REVISION: \u{fffd}"] {
            assert_eq!(l4t(bad), None, "{bad:?}");
        }
        assert_eq!(jetpack("36.4.3"), Some("6.2"));
        assert_eq!(jetpack("36.9.9"), None);
    }
}
