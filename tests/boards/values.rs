//! Every value of every board.

use crate::tree::{Tree, degrees, zone};
use finetuned::clock::SystemClock;
use finetuned::config::budget;
use finetuned::governor::readings::{OverCurrent, Reading, Readings, ZoneRole};
use finetuned::governor::sensors::{Limits, Probe, STAND_IN, Sensors};
use finetuned::units::{Bytes, Celsius, Watts};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

#[track_caller]
fn watts(reading: Option<Reading<Watts>>) -> f64 {
    match reading {
        // Sums of decimal fractions.
        Some(Reading::Value { value, .. }) => (value.0 * 1e6).round() / 1e6,
        other => panic!("{other:?} is no power"),
    }
}

fn rail(readings: &Readings, name: &str) -> Option<Reading<Watts>> {
    readings.rails.iter().find(|rail| rail.name == name).map(|rail| rail.power)
}

#[test]
fn an_agx_orin_with_jetpack_6() {
    let tree = Tree::agx_orin_jp6();
    let mut sensors = tree.sensors();
    assert_eq!(sensors.board().name, "agx-orin-64gb");
    assert_eq!(sensors.identity().l4t.as_deref(), Some("36.4.3"));
    assert_eq!(sensors.identity().jetpack, Some("6.2"));
    let readings = tree.round(&mut sensors);
    assert_eq!(readings.zones.len(), 11);
    let tj = zone(&readings, "tj-thermal");
    assert_eq!((tj.role, tj.required, degrees(tj.temperature)), (ZoneRole::Junction, true, 52.25));
    // Not the 70 °C at which somebody is warned of a hot surface.
    assert_eq!((tj.passive_trip, tj.critical_trip), (Some(Celsius(99.0)), Some(Celsius(104.5))));
    assert_eq!(zone(&readings, "cv1-thermal").temperature, Reading::Offline);
    assert_eq!(zone(&readings, "tboard-thermal").role, ZoneRole::Board);
    let names: Vec<&str> = readings.rails.iter().map(|rail| rail.name.as_str()).collect();
    assert_eq!(names, ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"]);
    assert!(readings.rails.iter().all(|rail| rail.counted));
    assert_eq!(watts(rail(&readings, "VDD_GPU_SOC")), 7.92);
    assert_eq!(watts(readings.power), 7.92 + 1.976 + 3.0 + 1.0);
    assert_eq!(readings.gpu_load, Some(0.437));
    assert_eq!(readings.gpu_clock, Some((306_000_000, 612_000_000)));
    assert!(!readings.throttled, "the fan and the hot surface do not throttle");
    assert_eq!(readings.over_current, Some(OverCurrent::default()));
    assert_eq!(readings.fan, Some(0.4));
    assert_eq!(readings.external_power, None, "USB is off line on a board that is fed by its jack");
    assert_eq!(readings.battery, None);
    assert_eq!(readings.available_memory, Some(Bytes(32_000_000 * 1024)));
    assert_eq!(readings.memory_pressure, Some(0.125));
    assert_eq!(readings.load, Some(0.5));
    assert_eq!(readings.mode.as_deref(), Some("MODE_30W"));
    let limits = Limits {
        gpu_minimum: Some(0),
        gpu_maximum: Some(612_000_000),
        gated: Some(240),
        memory: Some(3_199_000_000),
    };
    assert_eq!(sensors.limits(), limits);
    for (what, probe) in sensors.probe() {
        assert!(matches!(probe, Probe::Yes(_)), "{what}: {probe:?}");
    }
}

#[test]
fn an_agx_orin_with_jetpack_5() {
    let tree = Tree::agx_orin_jp5();
    let mut sensors = tree.sensors();
    assert_eq!(sensors.board().name, "agx-orin-64gb");
    assert_eq!(sensors.identity().jetpack, Some("5.1.5"));
    let readings = tree.round(&mut sensors);
    assert_eq!(degrees(zone(&readings, "tj-therm").temperature), 52.25);
    assert_eq!(zone(&readings, "gpu-therm").role, ZoneRole::Die);
    assert_eq!(zone(&readings, "tboard_tegra").role, ZoneRole::Board);
    assert_eq!(readings.zones.iter().filter(|zone| zone.required).count(), 3);
    assert_eq!(watts(readings.power), 7.92 + 1.976 + 3.0 + 0.18);
    assert_eq!(readings.gpu_load, Some(0.437));
    assert_eq!(sensors.limits().memory, Some(2_133_000_000));
}

#[test]
fn an_orin_nx_whose_junction_is_disabled() {
    let tree = Tree::orin_nx();
    let mut sensors = tree.sensors();
    assert_eq!(sensors.board().name, "orin-nx");
    let readings = tree.round(&mut sensors);
    assert!(readings.zones.iter().all(|zone| zone.name != "tj-thermal"));
    let stand_in = zone(&readings, STAND_IN);
    assert_eq!((stand_in.role, stand_in.required), (ZoneRole::Junction, true));
    assert_eq!(degrees(stand_in.temperature), 51.0);
    assert_eq!(stand_in.passive_trip, Some(Celsius(99.0)));
    // The rail of the whole module counts, its parts do not.
    assert_eq!(readings.rails.len(), 3);
    assert_eq!(watts(readings.power), 7.488);
    // As soon as it is enabled it is the junction.
    tree.write("sys/class/thermal/thermal_zone8/temp", "60000\n");
    let readings = tree.round(&mut sensors);
    assert_eq!(degrees(zone(&readings, "tj-thermal").temperature), 60.0);
    assert!(readings.zones.iter().all(|zone| zone.name != STAND_IN));
    // It was there: empty is lost now, not disabled.
    tree.write("sys/class/thermal/thermal_zone8/temp", "");
    let readings = tree.round(&mut sensors);
    assert!(matches!(zone(&readings, "tj-thermal").temperature, Reading::Lost { .. }));
    assert!(readings.zones.iter().all(|zone| zone.name != STAND_IN));
}

#[test]
fn a_notebook() {
    let tree = Tree::pc();
    let mut sensors = tree.sensors();
    assert_eq!(sensors.board().name, "generic");
    tree.write("sys/class/powercap/intel-rapl:0/energy_uj", "6000000\n");
    let readings = tree.round(&mut sensors);
    let names: Vec<(&str, ZoneRole)> =
        readings.zones.iter().map(|zone| (zone.name.as_str(), zone.role)).collect();
    assert_eq!(
        names,
        [
            ("acpitz", ZoneRole::Die),
            ("x86_pkg_temp", ZoneRole::Junction),
            ("acpitz#2", ZoneRole::Die),
            ("iwlwifi_1", ZoneRole::Board)
        ]
    );
    assert_eq!(watts(rail(&readings, "package-0")), 10.0, "5 J in half a second");
    assert_eq!(watts(rail(&readings, "BAT0")), 12.5);
    assert_eq!(watts(readings.power), 10.0, "the battery has the package in it");
    assert_eq!((readings.external_power, readings.battery), (Some(true), Some(0.83)));
    assert_eq!((readings.gpu_load, readings.over_current, readings.mode), (None, None, None));
    tree.supply("AC", &[("online", "0")]);
    assert_eq!(tree.round(&mut sensors).external_power, Some(false));
}

#[test]
fn an_energy_counter_wraps() {
    let tree = Tree::pc();
    let energy = |joules: f64| {
        tree.write("sys/class/powercap/intel-rapl:0/energy_uj", format!("{}\n", (joules * 1e6) as u64));
    };
    energy(262_140.328_85);
    let mut sensors = tree.sensors();
    // 3 J to the end of its range, 2 J after it.
    energy(2.0);
    assert_eq!(watts(tree.round(&mut sensors).power), 10.0);
    // Two rounds at the same time make no figure, and lose none.
    energy(4.0);
    assert_eq!(watts(sensors.read().power), 10.0);
    assert_eq!(watts(tree.round(&mut sensors).power), 4.0);
    // A jump that no processor takes.
    energy(200_000.0);
    assert!(matches!(tree.round(&mut sensors).power, Some(Reading::Lost { .. })));
}

#[test]
fn a_processor_without_a_zone_is_read_from_its_monitor() {
    let tree = Tree::pc();
    tree.remove("sys/class/thermal/thermal_zone1");
    tree.write("sys/class/hwmon/hwmon2/name", "coretemp\n");
    for (n, label, temperature) in [(1, "Package id 0", "70000"), (2, "Core 0", "71000")] {
        tree.write(&format!("sys/class/hwmon/hwmon2/temp{n}_label"), label);
        tree.write(&format!("sys/class/hwmon/hwmon2/temp{n}_input"), temperature);
        tree.write(&format!("sys/class/hwmon/hwmon2/temp{n}_crit"), "100000");
    }
    let readings = tree.round(&mut tree.sensors());
    let package = zone(&readings, "coretemp package id 0");
    assert_eq!((package.role, degrees(package.temperature)), (ZoneRole::Junction, 70.0));
    assert_eq!(package.critical_trip, Some(Celsius(100.0)));
    assert_eq!(readings.zones.iter().filter(|zone| zone.role == ZoneRole::Junction).count(), 1);
}

#[test]
fn the_configuration_has_the_last_word() {
    let tree = Tree::agx_orin_jp6();
    let board = budget::Board {
        name: Some("generic".into()),
        rails: Some(vec!["VDD_GPU_SOC".into(), "VIN_SYS_5V0".into()]),
        power_factor: 1.5,
        power_offset: Watts(2.0),
        ..budget::Board::default()
    };
    let mut sensors = tree.sensors_of(&board);
    let readings = tree.round(&mut sensors);
    assert_eq!(watts(readings.power), 1.5 * (7.92 + 3.0) + 2.0);
    assert!(readings.zones.iter().all(|zone| !zone.required));
    // A rail that is not there is no rail of zero watts.
    let board = budget::Board { rails: Some(vec!["VDD_GPU".into()]), ..budget::Board::default() };
    let mut sensors = tree.sensors_of(&board);
    assert!(matches!(tree.round(&mut sensors).power, Some(Reading::Lost { .. })));
    let board = budget::Board { name: Some("toaster".into()), ..budget::Board::default() };
    let sensors = tree.sensors_of(&board);
    assert_eq!(sensors.board().name, "agx-orin-64gb");
    assert!(matches!(&sensors.probe()[0].1, Probe::No(why) if why.contains("toaster")));
}

#[test]
fn alarms_are_rates() {
    let tree = Tree::agx_orin_jp6();
    let mut sensors = tree.sensors();
    tree.write("sys/class/hwmon/hwmon5/oc1_event_cnt", "1\n");
    tree.write("sys/class/hwmon/hwmon5/oc3_event_cnt", "27400\n");
    let rates = tree.round(&mut sensors).over_current.unwrap();
    assert_eq!((rates.under_voltage, rates.average, rates.instantaneous), (2.0, 0.0, 20.0));
    // The driver was loaded again and starts from 0.
    tree.write("sys/class/hwmon/hwmon5/oc3_event_cnt", "3\n");
    assert_eq!(tree.round(&mut sensors).over_current, Some(OverCurrent::default()));
    tree.write("sys/class/hwmon/hwmon5/oc3_event_cnt", "4\n");
    assert_eq!(tree.round(&mut sensors).over_current.unwrap().instantaneous, 2.0);
}

#[test]
fn throttling_is_seen() {
    let tree = Tree::agx_orin_jp6();
    let mut sensors = tree.sensors();
    for device in 0..3 {
        let state = format!("sys/class/thermal/cooling_device{device}/cur_state");
        tree.write(&state, "2\n");
        assert!(tree.round(&mut sensors).throttled, "{state}");
        tree.write(&state, "0\n");
        assert!(!tree.round(&mut sensors).throttled, "{state}");
    }
}

#[test]
fn slow_registers_are_read_at_a_bounded_rate() {
    let tree = Tree::agx_orin_jp6();
    let mut sensors = tree.sensors();
    let first = tree.round(&mut sensors);
    tree.write("sys/class/hwmon/hwmon3/curr1_input", "500\n");
    tree.clock.advance(Duration::from_millis(10));
    let soon = sensors.read();
    assert_eq!(soon.power, first.power, "with the age that it has");
    assert!(soon.at > first.at);
    assert_ne!(tree.round(&mut sensors).power, first.power);
}

#[test]
fn this_machine_is_read_without_an_error() {
    let mut sensors = Sensors::open(Path::new("/"), &budget::Board::default(), Arc::new(SystemClock::new()));
    let readings = sensors.read();
    assert!(readings.available_memory.is_some_and(|bytes| bytes > Bytes(1 << 20)));
    assert!(sensors.probe().len() > 10);
    assert!(sensors.cost().total() < Duration::from_secs(5));
    assert!(!sensors.cost().machine.is_zero(), "a round takes some time");
}
