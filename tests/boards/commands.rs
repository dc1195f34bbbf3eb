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
fn the_board_is_what_the_configuration_says() {
    let tree = Tree::agx_orin_jp6();
    let file = tree.path("finetuned.toml");
    let config = file.to_str().unwrap();
    let write = |text: &str| std::fs::write(&file, text).unwrap();
    let power = |arguments: &[&str]| {
        let json: serde_json::Value = serde_json::from_str(&success(&call(&tree, arguments))).unwrap();
        (json["board"].as_str().unwrap().to_string(), json["readings"]["power"].as_f64().unwrap())
    };
    write(
        "[board]\nname = \"generic\"\nrails = [\"VDD_GPU_SOC\"]\npower_factor = 2\npower_offset = \"1W\"\n",
    );
    let (board, watts) = power(&["sensors", "--json", "--config", config]);
    assert_eq!(board, "generic");
    assert!((watts - (2.0 * 7.92 + 1.0)).abs() < 1e-9, "{watts}");
    let (board, _) = power(&["sensors", "--json", "--config", config, "--board", "orin-nx"]);
    assert_eq!(board, "orin-nx", "what is typed goes first");
    assert_eq!(
        power(&["sensors", "--json"]).0,
        "agx-orin-64gb",
        "another machine's tree has no configuration"
    );
    write("[board]\nname = \"agx-orin-64\"\n");
    for arguments in
        [vec!["sensors", "--config", config], vec!["record-sensors", "--output", "x", "--config", config]]
    {
        let output = call(&tree, &arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("finetuned.toml:2:1: board.name = \"agx-orin-64\""), "{said}");
        assert!(said.contains("\"generic\"; did you mean \"agx-orin-64gb\"?"), "{said}");
    }
    // The daemon, and who asks on its behalf, say the same.
    for arguments in
        [vec!["config", "check", config], vec!["--config", config, "--peer", "unix:path=/nowhere"]]
    {
        let output = Command::new(env!("CARGO_BIN_EXE_finetuned")).args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains("did you mean \"agx-orin-64gb\"?"), "{said}");
    }
}

#[test]
fn what_was_set_is_part_of_what_is_checked() {
    let tree = Tree::pc();
    let file = tree.path("finetuned.toml");
    let settings = tree.path("budget.toml");
    std::fs::write(&file, "[budget]\ntemperature_resume = 60\n[conditions]\nminimum_battery = 0\n").unwrap();
    let check = |code: i32| {
        let directory = file.parent().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_finetuned"));
        command.args(["config", "check"]).arg(&file).arg("--state-dir").arg(directory);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{output:#?}");
        [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap())
    };
    let [text, notes] = check(0);
    assert!(text.contains("\ntemperature = 85\n"), "{text}");
    assert!(
        notes.contains("note: [conditions] minimum_battery lets training drain a battery to 0 %"),
        "{notes}"
    );
    let set = |celsius: u32| {
        std::fs::write(
            &settings,
            format!("[\"budget.temperature\"]\nvalue = {celsius}\nuid = 7\ntime_us = 1000000\n"),
        )
        .unwrap();
    };
    set(70);
    let [text, _] = check(0);
    assert!(text.contains("\ntemperature = 70  # set by user 7 at 1970-01-01T00:00:01Z\n"), "{text}");
    set(50);
    let [_, said] = check(2);
    assert!(
        said.contains("budget.toml: budget.temperature_resume: is 60.0 °C, not below budget.temperature"),
        "{said}"
    );
    assert!(said.contains("help: the daemon starts, but nothing trains"), "{said}");
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
