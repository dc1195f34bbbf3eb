//! What can happen to a file, in every place that matters.

use crate::tree::{Tree, degrees, zone};
use finetuned::governor::readings::{Reading, Readings};
use finetuned::governor::sensors::files::Fault;
use finetuned::governor::sensors::{RESCAN, STAND_IN, Sensors};
use rustix::io::Errno;
use std::time::Duration;

/// A file, and what is read from it.
struct Role {
    name: &'static str,
    path: &'static str,
    state: fn(&Readings) -> State,
}

/// What became of a reading.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    There,
    Offline,
    Lost,
    /// Readings that are `Option`s know no more than that.
    Absent,
}

fn state<T>(reading: Reading<T>) -> State {
    match reading {
        Reading::Value { .. } => State::There,
        Reading::Offline => State::Offline,
        Reading::Lost { .. } => State::Lost,
    }
}

fn option<T>(value: Option<T>) -> State {
    if value.is_some() { State::There } else { State::Absent }
}

fn zone_state(readings: &Readings, name: &str) -> State {
    state(zone(readings, name).temperature)
}

const ROLES: &[Role] = &[
    Role {
        name: "junction",
        path: "sys/class/thermal/thermal_zone8/temp",
        state: |r| zone_state(r, "tj-thermal"),
    },
    Role {
        name: "die",
        path: "sys/class/thermal/thermal_zone1/temp",
        state: |r| zone_state(r, "gpu-thermal"),
    },
    Role {
        name: "board",
        path: "sys/class/thermal/thermal_zone9/temp",
        state: |r| zone_state(r, "tboard-thermal"),
    },
    Role {
        name: "voltage",
        path: "sys/class/hwmon/hwmon3/in1_input",
        state: |r| r.power.map_or(State::Absent, state),
    },
    Role {
        name: "current",
        path: "sys/class/hwmon/hwmon4/curr2_input",
        state: |r| r.power.map_or(State::Absent, state),
    },
    Role {
        name: "GPU load",
        path: "sys/class/devfreq/17000000.gpu/device/load",
        state: |r| option(r.gpu_load),
    },
    Role {
        name: "GPU clock",
        path: "sys/class/devfreq/17000000.gpu/cur_freq",
        state: |r| option(r.gpu_clock),
    },
    Role { name: "fan", path: "sys/class/hwmon/hwmon0/pwm1", state: |r| option(r.fan) },
    Role { name: "memory", path: "proc/meminfo", state: |r| option(r.available_memory) },
    Role { name: "pressure", path: "proc/pressure/memory", state: |r| option(r.memory_pressure) },
    Role { name: "load", path: "proc/loadavg", state: |r| option(r.load) },
];

/// What the reading becomes for each fault: temperature and power are lost, an `Option` is absent.
fn expected(role: &Role, offline: bool) -> State {
    match role.name {
        "junction" | "die" | "board" if offline => State::Offline,
        "voltage" | "current" if offline => State::There, // what is switched off takes nothing
        "junction" | "die" | "board" | "voltage" | "current" => State::Lost,
        _ => State::Absent,
    }
}

#[test]
fn every_fault_in_every_role_is_seen_and_passes() {
    let contents =
        ["", "nan", "warm", "-999999999", "1000000000000", "\u{0}\u{1}", "99999999999999999999999"];
    let faults = [
        Fault::Missing,
        Fault::Offline,
        Fault::Failed(Errno::IO),
        Fault::Failed(Errno::NODEV),
        Fault::Denied,
    ];
    let tree = Tree::agx_orin_jp6();
    let mut cases = 0;
    for role in ROLES {
        let good = std::fs::read(tree.path(role.path)).unwrap();
        let mut sensors = tree.sensors();
        let state = |sensors: &mut Sensors| (role.state)(&tree.round(sensors));
        assert_eq!(state(&mut sensors), State::There, "{}", role.name);
        for content in contents {
            tree.write(role.path, content);
            assert_eq!(state(&mut sensors), expected(role, false), "{}: {content:?}", role.name);
            tree.write(role.path, &good);
            assert_eq!(state(&mut sensors), State::There, "{} after {content:?}", role.name);
            cases += 1;
        }
        for fault in &faults {
            tree.fail(role.path, fault.clone());
            let offline = *fault == Fault::Offline;
            assert_eq!(state(&mut sensors), expected(role, offline), "{}: {fault}", role.name);
            tree.heal(role.path);
            assert_eq!(state(&mut sensors), State::There, "{} after {fault}", role.name);
            cases += 1;
        }
        // Something else stands where the file was: the driver of a real file system answers.
        tree.remove(role.path);
        std::fs::create_dir(tree.path(role.path)).unwrap();
        assert_eq!(state(&mut sensors), expected(role, false), "{}: a directory", role.name);
        tree.remove(role.path);
        rustix::fs::mkfifoat(rustix::fs::CWD, tree.path(role.path), rustix::fs::Mode::RUSR).unwrap();
        assert_eq!(state(&mut sensors), expected(role, false), "{}: a FIFO", role.name);
        tree.remove(role.path);
        assert_eq!(state(&mut sensors), expected(role, false), "{}: removed", role.name);
        // Some are looked for again before they are read.
        tree.write(role.path, &good);
        tree.clock.advance(RESCAN);
        assert_eq!(state(&mut sensors), State::There, "{} after it was away", role.name);
        cases += 3;
    }
    assert!(cases >= 150, "only {cases} cases");
}

#[test]
fn lost_tells_since_when() {
    let tree = Tree::agx_orin_jp6();
    let mut sensors = tree.sensors();
    let temperature = |readings: &Readings| zone(readings, "tj-thermal").temperature;
    tree.round(&mut sensors);
    tree.write("sys/class/thermal/thermal_zone8/temp", "-256000\n");
    let first = tree.round(&mut sensors);
    let lost = Reading::Lost { since: first.at };
    assert_eq!(temperature(&first), lost);
    assert_eq!(temperature(&tree.round(&mut sensors)), lost);
    tree.write("sys/class/thermal/thermal_zone8/temp", "60000\n");
    tree.round(&mut sensors);
    tree.write("sys/class/thermal/thermal_zone8/temp", "x\n");
    let again = tree.round(&mut sensors);
    assert_eq!(temperature(&again), Reading::Lost { since: again.at });
}

#[test]
fn a_required_zone_that_was_never_there_is_lost_until_it_comes() {
    let tree = Tree::agx_orin_jp6();
    tree.rename("sys/class/thermal/thermal_zone8", "aside");
    let mut sensors = tree.sensors();
    let readings = tree.round(&mut sensors);
    let tj = zone(&readings, "tj-thermal");
    assert!(tj.required && matches!(tj.temperature, Reading::Lost { .. }));
    assert!(readings.zones.iter().all(|zone| zone.name != STAND_IN), "missing is not disabled");
    // Under another spelling and another number.
    tree.rename("aside", "sys/class/thermal/thermal_zone17");
    tree.write("sys/class/thermal/thermal_zone17/type", "TJ-therm\n");
    tree.clock.advance(RESCAN);
    let readings = tree.round(&mut sensors);
    assert_eq!(degrees(zone(&readings, "tj-therm").temperature), 52.25);
    assert!(readings.zones.iter().all(|zone| zone.name != "tj-thermal"));
}

#[test]
fn zones_and_monitors_are_found_under_another_number() {
    let tree = Tree::agx_orin_jp6();
    let mut sensors = tree.sensors();
    let before = tree.round(&mut sensors);
    // Two zones change places: no temperature may be taken for the other's, not for one round.
    tree.rename("sys/class/thermal/thermal_zone8", "aside");
    tree.rename("sys/class/thermal/thermal_zone9", "sys/class/thermal/thermal_zone8");
    tree.rename("aside", "sys/class/thermal/thermal_zone9");
    tree.rename("sys/class/hwmon/hwmon3", "sys/class/hwmon/hwmon13");
    let readings = tree.round(&mut sensors);
    assert!(matches!(zone(&readings, "tj-thermal").temperature, Reading::Lost { .. }));
    assert!(matches!(readings.power, Some(Reading::Lost { .. })));
    tree.clock.advance(Duration::from_secs(1));
    let readings = tree.round(&mut sensors);
    assert_eq!(degrees(zone(&readings, "tj-thermal").temperature), 52.25);
    assert_eq!(readings.zones.len(), before.zones.len());
    assert!(matches!(readings.power, Some(Reading::Value { .. })));
    assert_eq!(readings.rails.len(), before.rails.len());
}

#[test]
fn monitors_that_change_places_do_not_change_rails() {
    let tree = Tree::agx_orin_jp6();
    let mut sensors = tree.sensors();
    let before = tree.round(&mut sensors).rails;
    tree.rename("sys/class/hwmon/hwmon3", "aside");
    tree.rename("sys/class/hwmon/hwmon4", "sys/class/hwmon/hwmon3");
    tree.rename("aside", "sys/class/hwmon/hwmon4");
    let readings = tree.round(&mut sensors);
    assert!(matches!(readings.rails[0].power, Reading::Lost { .. }), "{:?}", readings.rails);
    assert!(matches!(readings.power, Some(Reading::Lost { .. })));
    tree.clock.advance(Duration::from_secs(1));
    let value = |power| match power {
        Reading::Value { value, .. } => Some(value),
        _ => None,
    };
    for (before, after) in before.iter().zip(tree.round(&mut sensors).rails) {
        assert_eq!((&before.name, value(before.power)), (&after.name, value(after.power)));
        assert!(value(after.power).is_some());
    }
}

#[test]
fn a_stand_in_is_as_good_as_the_zones_that_it_needs() {
    let tree = Tree::orin_nx();
    let mut sensors = tree.sensors();
    let gpu = "sys/class/thermal/thermal_zone1/temp";
    let cpu = "sys/class/thermal/thermal_zone0/temp";
    assert_eq!(degrees(zone(&tree.round(&mut sensors), STAND_IN).temperature), 51.0);
    tree.fail(gpu, Fault::Offline);
    assert_eq!(degrees(zone(&tree.round(&mut sensors), STAND_IN).temperature), 51.0);
    tree.fail(cpu, Fault::Failed(Errno::IO));
    assert!(matches!(zone(&tree.round(&mut sensors), STAND_IN).temperature, Reading::Lost { .. }));
}

#[test]
fn lost_parts_are_looked_for_ever_less_often() {
    let tree = Tree::agx_orin_jp6();
    tree.remove("sys/class/thermal/thermal_zone8");
    let mut sensors = tree.sensors();
    let mut scans = 0;
    for _ in 0..120 {
        tree.round(&mut sensors);
        // A zone that appears is only seen by a search.
        let probe = format!("extra{scans}-thermal");
        if !sensors.read().zones.iter().any(|zone| zone.name == probe) {
            tree.zone(20, &probe, "20000");
        } else {
            scans += 1;
        }
    }
    assert!((3..=8).contains(&scans), "{scans} searches in a minute");
}
