//! Nothing that a file can hold is fatal, and no nonsense becomes a temperature or a power.

use crate::tree::Tree;
use finetuned::governor::readings::{Reading, Readings};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Every regular file of a tree, relative to it.
pub fn files(root: &Path) -> Vec<PathBuf> {
    fn collect(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            match entry.file_type().unwrap() {
                kind if kind.is_dir() => collect(&entry.path(), found),
                kind if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    let mut found = Vec::new();
    collect(root, &mut found);
    found.sort();
    found
}

fn content() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..40),
        any::<i64>().prop_map(|number| number.to_string().into_bytes()),
        "[-+ 0-9a-fx.,=:\n]{0,20}".prop_map(String::into_bytes),
        proptest::sample::select(vec![
            "NaN",
            "inf",
            "",
            "0",
            "-1",
            "9999999999999999999",
            "POWER_MODEL",
            "R36"
        ])
        .prop_map(|text| text.as_bytes().to_vec()),
    ]
}

pub fn check(readings: &Readings) {
    for zone in &readings.zones {
        if let Reading::Value { value, .. } = zone.temperature {
            assert!((-40.0..=150.0).contains(&value.0), "{zone:?}");
        }
        for trip in [zone.passive_trip, zone.critical_trip].into_iter().flatten() {
            assert!((-40.0..=150.0).contains(&trip.0), "{zone:?}");
        }
        assert!(!zone.name.is_empty() && zone.name.chars().all(|c| c.is_ascii_graphic() || c == ' '));
    }
    let powers = readings.rails.iter().map(|rail| rail.power).chain(readings.power);
    for power in powers {
        if let Reading::Value { value, .. } = power {
            assert!(value.0.is_finite() && value.0 >= 0.0, "{power:?}");
        }
    }
    for share in [readings.gpu_load, readings.fan, readings.battery, readings.memory_pressure] {
        assert!(share.is_none_or(|share| (0.0..=1.0).contains(&share)), "{share:?}");
    }
    assert!(readings.load.is_none_or(|load| load.is_finite() && load >= 0.0));
    if let Some(rates) = readings.over_current {
        for rate in [rates.under_voltage, rates.average, rates.instantaneous] {
            assert!(rate.is_finite() && rate >= 0.0, "{rates:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Some files are replaced before the start, some while it runs.
    #[test]
    fn no_content_is_fatal(
        which in 0usize..4,
        // Half of the time everything, half of the time one file in ten.
        every in prop_oneof![Just(1u32), Just(10)],
        contents in proptest::collection::vec((content(), 0u32..10), 250),
    ) {
        let tree = [Tree::agx_orin_jp6, Tree::agx_orin_jp5, Tree::orin_nx, Tree::pc][which]();
        let files = files(tree.root());
        prop_assert!(files.len() <= contents.len());
        let replace = |remainder: usize| {
            for (n, (file, (content, draw))) in files.iter().zip(&contents).enumerate() {
                if n % 2 == remainder && draw % every == 0 {
                    std::fs::write(file, content).unwrap();
                }
            }
        };
        replace(0);
        let mut sensors = tree.sensors();
        check(&sensors.read());
        replace(1);
        for _ in 0..3 {
            tree.clock.advance(Duration::from_secs(20));
            check(&sensors.read());
        }
        for (what, probe) in sensors.probe() {
            let said = format!("{what}: {probe:?}");
            prop_assert!(said.chars().all(|c| !c.is_control()), "{said}");
        }
    }
}
