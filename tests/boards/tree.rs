//! Builds the tree of a board in a temporary directory, and lets single files fail in ways that a plain file cannot.

use finetuned::clock::Clock;
use finetuned::config::budget;
use finetuned::governor::readings::{Reading, Readings, Zone};
use finetuned::governor::sensors::Sensors;
use finetuned::governor::sensors::files::{Below, Fault, Files};
use finetuned::units::Celsius;
use std::collections::HashMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

/// A tree, a clock that stands still, and faults.
pub struct Tree {
    directory: tempfile::TempDir,
    pub clock: Arc<StillClock>,
    faults: Arc<Mutex<HashMap<String, Fault>>>,
}

/// Moves only when it is told to.
#[derive(Default)]
pub struct StillClock(Mutex<Duration>);

impl StillClock {
    pub fn advance(&self, time: Duration) {
        *self.0.lock().unwrap() += time;
    }

    pub fn set(&self, time: Duration) {
        *self.0.lock().unwrap() = time;
    }
}

impl Clock for StillClock {
    fn monotonic(&self) -> Duration {
        *self.0.lock().unwrap()
    }
    fn wall(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + self.monotonic()
    }
    fn sleep(&self, duration: Duration) {
        self.advance(duration);
    }
}

struct Faulty {
    below: Below,
    faults: Arc<Mutex<HashMap<String, Fault>>>,
}

impl Files for Faulty {
    fn read(&self, path: &str, limit: usize) -> Result<Vec<u8>, Fault> {
        match self.faults.lock().unwrap().get(path) {
            Some(fault) => Err(fault.clone()),
            None => self.below.read(path, limit),
        }
    }
    fn list(&self, path: &str) -> Vec<String> {
        self.below.list(path)
    }
}

/// Types and temperatures (m°C) of the zones of an AGX Orin, JetPack 6.
const ORIN_ZONES: [(&str, &str); 11] = [
    ("cpu-thermal", "51000"),
    ("gpu-thermal", "49500"),
    ("cv0-thermal", "0"),
    ("cv1-thermal", "0"),
    ("cv2-thermal", "0"),
    ("soc0-thermal", "48000"),
    ("soc1-thermal", "48500"),
    ("soc2-thermal", "47000"),
    ("tj-thermal", "52250"),
    ("tboard-thermal", "38000"),
    ("tdiode-thermal", "39250"),
];

impl Tree {
    pub fn empty() -> Tree {
        let clock = Arc::new(StillClock::default());
        clock.advance(Duration::from_secs(100));
        Tree { directory: tempfile::tempdir().unwrap(), clock, faults: Arc::default() }
    }

    /// AGX Orin 64 GB with JetPack 6.2, at 30 W.
    pub fn agx_orin_jp6() -> Tree {
        let tree = Tree::empty();
        tree.identity("NVIDIA Jetson AGX Orin Developer Kit", "p3737-0000+p3701-0005", "R36", "4.3");
        for (n, (kind, temperature)) in ORIN_ZONES.iter().enumerate() {
            tree.orin_zone(n, kind, temperature);
        }
        for n in 2..5 {
            tree.fail(&format!("sys/class/thermal/thermal_zone{n}/temp"), Fault::Offline);
        }
        tree.ina(
            3,
            &[("VDD_GPU_SOC", 19_800, 400), ("VDD_CPU_CV", 19_760, 100), ("VIN_SYS_5V0", 5_000, 600)],
        );
        tree.ina(4, &[("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5_000, 200), ("NC", 0, 0)]);
        tree.write("sys/class/hwmon/hwmon4/in7_label", "sum of shunt voltages");
        tree.orin_machine("17000000.gpu", "gpu");
        tree.write("sys/kernel/nvpmodel_clk_cap/emc", "3199000000\n");
        tree
    }

    /// The same with JetPack 5.1.5: other spellings and paths.
    pub fn agx_orin_jp5() -> Tree {
        let tree = Tree::empty();
        tree.identity("Jetson AGX Orin", "p3737-0000+p3701-0000", "R35", "6.1");
        for (n, (kind, temperature)) in ORIN_ZONES.iter().enumerate() {
            let kind = match kind.strip_suffix("-thermal").unwrap() {
                "tboard" => "Tboard_tegra".to_string(),
                "tdiode" => "Tdiode_tegra".to_string(),
                "tj" => "tj-therm".to_string(),
                part => format!("{}-therm", part.to_uppercase()),
            };
            tree.orin_zone(n, &kind, temperature);
        }
        // The monitors are below the driver only.
        let driver = "sys/bus/i2c/drivers/ina3221";
        tree.ina_at(
            &format!("{driver}/1-0040/hwmon/hwmon2"),
            &[("VDD_GPU_SOC", 19_800, 400), ("VDD_CPU_CV", 19_760, 100), ("VIN_SYS_5V0", 5_000, 600)],
        );
        tree.ina_at(
            &format!("{driver}/1-0041/hwmon/hwmon3"),
            &[("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 1_800, 100)],
        );
        tree.orin_machine("17000000.ga10b", "ga10b");
        tree.write("sys/kernel/nvpmodel_emc_cap/emc_iso_cap", "2133000000\n");
        tree
    }

    /// Orin NX 16 GB, whose tj zone is disabled.
    pub fn orin_nx() -> Tree {
        let tree = Tree::empty();
        tree.identity("NVIDIA Jetson Orin NX", "p3768-0000+p3767-0000", "R36", "4.7");
        for (n, (kind, temperature)) in ORIN_ZONES.iter().take(9).enumerate() {
            tree.orin_zone(n, kind, temperature);
        }
        tree.write("sys/class/thermal/thermal_zone8/temp", "");
        tree.ina(1, &[("VDD_IN", 4_992, 1_500), ("VDD_CPU_GPU_CV", 4_992, 400), ("VDD_SOC", 4_992, 300)]);
        tree.orin_machine("17000000.gpu", "gpu");
        tree
    }

    /// A notebook: package temperature, RAPL, mains and battery.
    pub fn pc() -> Tree {
        let tree = Tree::empty();
        for (n, (kind, temperature)) in
            [("acpitz", "27800"), ("x86_pkg_temp", "61000"), ("acpitz", "29800"), ("iwlwifi_1", "40000")]
                .iter()
                .enumerate()
        {
            tree.zone(n, kind, temperature);
        }
        let rapl = "sys/class/powercap/intel-rapl:0";
        tree.write(&format!("{rapl}/name"), "package-0\n");
        tree.write(&format!("{rapl}/energy_uj"), "1000000\n");
        tree.write(&format!("{rapl}/max_energy_range_uj"), "262143328850\n");
        tree.write(&format!("{rapl}:0/name"), "core\n");
        tree.write(&format!("{rapl}:0/energy_uj"), "5\n");
        tree.supply("AC", &[("type", "Mains"), ("online", "1")]);
        tree.supply(
            "BAT0",
            &[("type", "Battery"), ("capacity", "83"), ("status", "Discharging"), ("power_now", "12500000")],
        );
        tree.supply("hid-mouse", &[("type", "Battery"), ("scope", "Device"), ("capacity", "3")]);
        tree.system();
        tree
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }

    pub fn root(&self) -> &Path {
        self.directory.path()
    }

    pub fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    pub fn remove(&self, path: &str) {
        let path = self.path(path);
        if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
    }

    pub fn rename(&self, from: &str, to: &str) {
        std::fs::rename(self.path(from), self.path(to)).unwrap();
    }

    /// Reading this file fails from now on.
    pub fn fail(&self, path: &str, fault: Fault) {
        self.faults.lock().unwrap().insert(path.to_string(), fault);
    }

    /// Reading it works again.
    pub fn heal(&self, path: &str) {
        self.faults.lock().unwrap().remove(path);
    }

    pub fn sensors(&self) -> Sensors {
        self.sensors_of(&budget::Board::default())
    }

    pub fn sensors_of(&self, board: &budget::Board) -> Sensors {
        let below = Below::new(self.root());
        let files = Faulty { below, faults: self.faults.clone() };
        Sensors::over(Box::new(files), board, self.clock.clone())
    }

    /// A round, half a second later.
    pub fn round(&self, sensors: &mut Sensors) -> Readings {
        self.clock.advance(Duration::from_millis(500));
        sensors.read()
    }

    pub fn zone(&self, n: usize, kind: &str, temperature: &str) {
        let zone = format!("sys/class/thermal/thermal_zone{n}");
        self.write(&format!("{zone}/type"), format!("{kind}\n"));
        self.write(&format!("{zone}/temp"), format!("{temperature}\n"));
    }

    /// A zone with the trips of L4T: a notice at 70 °C, throttling at 99, off at 104.5.
    fn orin_zone(&self, n: usize, kind: &str, temperature: &str) {
        self.zone(n, kind, temperature);
        let zone = format!("sys/class/thermal/thermal_zone{n}");
        let trips = [("passive", "99000"), ("critical", "104500"), ("passive", "70000"), ("active", "35000")];
        for (k, (kind, trip)) in trips.iter().enumerate() {
            self.write(&format!("{zone}/trip_point_{k}_type"), kind);
            self.write(&format!("{zone}/trip_point_{k}_temp"), trip);
        }
        for (k, (kind, trip)) in [("cpu-throttle-alert", "0"), ("hot-surface-alert", "2")].iter().enumerate()
        {
            self.write(&format!("{zone}/cdev{k}/type"), kind);
            self.write(&format!("{zone}/cdev{k}_trip_point"), trip);
        }
    }

    /// A monitor with its channels: label, mV, mA.
    pub fn ina(&self, n: usize, channels: &[(&str, u32, u32)]) {
        let directory = format!("sys/class/hwmon/hwmon{n}");
        self.write(&format!("{directory}/name"), "ina3221\n");
        self.ina_at(&directory, channels);
    }

    fn ina_at(&self, directory: &str, channels: &[(&str, u32, u32)]) {
        for (n, (label, voltage, current)) in (1..).zip(channels) {
            self.write(&format!("{directory}/in{n}_label"), format!("{label}\n"));
            self.write(&format!("{directory}/in{n}_input"), format!("{voltage}\n"));
            self.write(&format!("{directory}/curr{n}_input"), format!("{current}\n"));
        }
    }

    pub fn supply(&self, name: &str, files: &[(&str, &str)]) {
        for (file, content) in files {
            self.write(&format!("sys/class/power_supply/{name}/{file}"), format!("{content}\n"));
        }
    }

    fn identity(&self, model: &str, compatible: &str, release: &str, revision: &str) {
        let tree = "sys/firmware/devicetree/base";
        self.write(&format!("{tree}/model"), format!("{model}\0"));
        self.write(&format!("{tree}/compatible"), format!("nvidia,{compatible}\0nvidia,tegra234\0"));
        // As the kernel has it: an absolute link, which must not lead out of the tree.
        std::fs::create_dir_all(self.path("proc")).unwrap();
        symlink("/sys/firmware/devicetree/base", self.path("proc/device-tree")).unwrap();
        let line = format!("# {release} (release), REVISION: {revision}, GCID: 1, BOARD: generic\n");
        self.write("etc/nv_tegra_release", line);
    }

    /// What all Orins have, with the GPU under this name.
    fn orin_machine(&self, gpu: &str, node: &str) {
        let device = format!("sys/devices/platform/{gpu}");
        self.write(&format!("{device}/of_node/name"), format!("{node}\0"));
        self.write(&format!("{device}/load"), "437\n");
        self.write(&format!("{device}/tpc_pg_mask"), "240\n");
        for (file, clock) in [("cur_freq", "306000000"), ("min_freq", "0"), ("max_freq", "612000000")] {
            self.write(&format!("{device}/devfreq/{gpu}/{file}"), format!("{clock}\n"));
        }
        symlink(format!("../../../{gpu}"), self.path(&format!("{device}/devfreq/{gpu}/device"))).unwrap();
        std::fs::create_dir_all(self.path("sys/class/devfreq")).unwrap();
        let link = format!("../../devices/platform/{gpu}/devfreq/{gpu}");
        symlink(link, self.path(&format!("sys/class/devfreq/{gpu}"))).unwrap();
        self.write("sys/class/devfreq/1000.emc/cur_freq", "1\n");
        let cooling =
            ["cpufreq-cpu0", "devfreq-17000000.gpu", "cpu-throttle-alert", "hot-surface-alert", "pwm-fan"];
        for (n, kind) in cooling.iter().enumerate() {
            let state = if n < 3 { "0\n" } else { "1\n" };
            self.write(&format!("sys/class/thermal/cooling_device{n}/type"), kind);
            self.write(&format!("sys/class/thermal/cooling_device{n}/cur_state"), state);
        }
        self.write("sys/class/hwmon/hwmon0/name", "pwmfan\n");
        self.write("sys/class/hwmon/hwmon0/pwm1", "102\n");
        self.write("sys/class/hwmon/hwmon5/name", "soctherm_oc\n");
        for (n, events) in [(1, 0), (2, 4), (3, 27_390)] {
            self.write(&format!("sys/class/hwmon/hwmon5/oc{n}_event_cnt"), format!("{events}\n"));
        }
        self.write("var/lib/nvpmodel/status", "pmode:0002");
        self.write(
            "etc/nvpmodel/nvpmodel_p3701_0000.conf",
            "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=MODE_30W >\nGPU MAX_FREQ 612000000\n",
        );
        symlink("/etc/nvpmodel/nvpmodel_p3701_0000.conf", self.path("etc/nvpmodel.conf")).unwrap();
        self.supply("ucsi-source-psy-ucsi_ccg1", &[("type", "USB"), ("online", "0")]);
        self.system();
    }

    fn system(&self) {
        self.write("proc/meminfo", "MemTotal:  64000000 kB\nMemFree: 1 kB\nMemAvailable:   32000000 kB\n");
        self.write(
            "proc/pressure/memory",
            "some avg10=12.50 avg60=3.00 avg300=1.00 total=7\nfull avg10=9.00 avg60=0 avg300=0 total=3\n",
        );
        self.write("proc/loadavg", "4.00 3.00 2.00 1/234 5678\n");
        self.write("sys/devices/system/cpu/online", "0-7\n");
    }
}

/// The zone with this name.
#[track_caller]
pub fn zone<'a>(readings: &'a Readings, name: &str) -> &'a Zone {
    match readings.zones.iter().find(|zone| zone.name == name) {
        Some(zone) => zone,
        None => panic!("no zone {name} in {:#?}", readings.zones),
    }
}

/// A temperature that was read.
#[track_caller]
pub fn degrees(reading: Reading<Celsius>) -> f64 {
    match reading {
        Reading::Value { value, .. } => value.0,
        other => panic!("{other:?} is no value"),
    }
}
