//! `finetuned sensors` and `finetuned record-sensors`.

use crate::tree::Tree;
use finetuned::governor::sensors::trace;
use finetuned::units::Celsius;
use std::process::{Command, Output};

fn call(tree: &Tree, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_finetuned"))
        .args(arguments)
        .arg("--root")
        .arg(tree.root())
        .output()
        .unwrap()
}

#[track_caller]
fn success(output: &Output) -> String {
    assert!(output.status.success(), "{output:#?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn what_is_there_is_shown() {
    let tree = Tree::agx_orin_jp6();
    let text = success(&call(&tree, &["sensors"]));
    for part in [
        "52.2 °C, throttles at 99, off at 104 (junction)",
        "VDD_GPU_SOC*             7.92 W",
        "306 of 612 MHz",
        "MODE_30W",
        "agx-orin-64gb: NVIDIA Jetson AGX Orin Developer Kit, module p3701-0005, L4T 36.4.3, JetPack 6.2",
        "A round takes ",
    ] {
        assert!(text.contains(part), "{part:?} is missing in:\n{text}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&success(&call(&tree, &["sensors", "--json"]))).unwrap();
    assert_eq!(json["schema"], 1);
    assert_eq!(json["board"], "agx-orin-64gb");
    let zones = json["readings"]["zones"].as_array().unwrap();
    let tj = zones.iter().find(|zone| zone["name"] == "tj-thermal").unwrap();
    assert_eq!((&tj["temperature"], &tj["role"]), (&52.25.into(), &"junction".into()));
    assert_eq!(json["limits"]["gated_tpcs"], 4);
    let rails = json["readings"]["rails"].as_array().unwrap();
    assert_eq!(rails[0]["power"], 7.92);
}

#[test]
fn a_record_is_read_back() {
    let tree = Tree::agx_orin_jp6();
    let file = tree.path("night.csv");
    let output = file.to_str().unwrap();
    let arguments = ["record-sensors", "--output", output, "--interval", "50ms", "--duration", "500ms"];
    success(&call(&tree, &arguments));
    let rounds: Vec<_> = trace::read(std::fs::File::open(&file).unwrap()).collect::<Result<_, _>>().unwrap();
    // A busy machine leaves rounds out.
    assert!((2..=10).contains(&rounds.len()), "{} rounds", rounds.len());
    assert!(rounds.windows(2).all(|pair| pair[0].at < pair[1].at));
    let tj = rounds[0].zones.iter().find(|zone| zone.name == "tj-thermal").unwrap();
    assert_eq!(tj.critical_trip, Some(Celsius(104.5)));
    assert_eq!(crate::tree::degrees(tj.temperature), 52.25);
    // Nothing is overwritten.
    let again = call(&tree, &arguments);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("help: "), "{again:#?}");
}

#[test]
fn mistakes_are_named() {
    let tree = Tree::pc();
    for (arguments, said) in [
        (vec!["sensors", "--board", "toaster"], "there are agx-orin-64gb"),
        (vec!["record-sensors", "--output", "x", "--interval", "soon"], "500ms"),
    ] {
        let output = call(&tree, &arguments);
        assert_eq!(output.status.code(), Some(2), "{output:#?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(said), "{output:#?}");
    }
    let output = Command::new(env!("CARGO_BIN_EXE_finetuned"))
        .args(["sensors", "--root"])
        .arg(tree.path("nowhere"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
}
