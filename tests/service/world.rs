//! A simulated AGX Orin around a real daemon and its real workers: the tree of a board, a thermal plant that heats by the
//! processor time which the worker really takes, and the daemon's clock, a step at a time.
//!
//! ```text
//!   worker ──processor time──► Plant ──► files of the board ──► governor ──► owner ──permit──► worker
//!                                │                                 ▲ │
//!                                └──► clock file (a step further) ─┘ └──► clock.waits: its round is done
//! ```
//!
//! A step is taken when the governor has made its round and the worker has had the real time that belongs to the step. So
//! a loaded machine makes the simulation slow and not different: no round is left out, and nothing is read half written.
//! While no worker computes, steps are long and follow each other as fast as the governor makes its rounds.

use crate::daemon::children;
use crate::plant::{DT, Fault, Plant, Random};
use crate::tree::Tree;
use finetuned::clock::simulated::{Anchor, waited_for};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A step while a worker computes: the governor's interval, s.
pub const STEP: f64 = 1.0;
/// A step while none does, s. Less than what a meter or a zone may be silent.
const LEAP: f64 = 4.0;
/// No worker has computed for so long (real): steps become long. A worker at the smallest duty rests less than that.
const RESTED: Duration = Duration::from_millis(150);
/// Share of a step below which a worker counts as resting: its beat, and its looking for permits.
const RESTS: f64 = 0.02;
/// Longest real time that a governor may take for its round.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where an AGX Orin begins to throttle, and where it switches itself off, °C.
const THROTTLES: f64 = 99.0;
pub const CRITICAL: f64 = 104.5;

/// What surrounds the machine. Whoever holds the world changes it at any time.
#[derive(Clone, Debug)]
pub struct Surroundings {
    /// Mean of the air, and how far the afternoon lies above and the early morning below it, °C.
    pub air: f64,
    pub day: f64,
    /// Power of somebody else's work, W.
    pub other: f64,
    /// The fan stands.
    pub fan_stands: bool,
    /// External power is there.
    pub plugged: bool,
    /// What the sensor of the junction does wrong.
    pub fault: Option<Fault>,
    /// Load of others on the GPU, 0 to 1.
    pub gpu: f64,
}

impl Surroundings {
    /// Nothing is wrong, at this temperature.
    pub fn calm(air: f64, day: f64) -> Surroundings {
        Surroundings { air, day, other: 0.0, fan_stands: false, plugged: true, fault: None, gpu: 0.0 }
    }
}

/// What happened in a step.
#[derive(Clone, Copy, Debug)]
pub struct Tick {
    /// Microseconds since 1970 at its end.
    pub wall_us: u64,
    /// Its length, s.
    pub seconds: f64,
    /// Mean power, W.
    pub power: f64,
    /// Processor time of workers, s.
    pub computed: f64,
    /// Temperature of the die at its end, °C.
    pub die: f64,
    /// A daemon was there to meter it.
    pub metered: bool,
}

struct Orders {
    around: Surroundings,
    /// The daemon, while there is one.
    daemon: Option<u32>,
    /// Simulated seconds in a real one, while a worker computes.
    rate: f64,
    /// Until when to go, in microseconds since 1970.
    until_us: u64,
    /// Seconds for which the machine is to sleep.
    sleep: f64,
}

struct Shared {
    orders: Mutex<Orders>,
    ticks: Mutex<Vec<Tick>>,
    now_us: AtomicU64,
    ended: AtomicBool,
}

/// The simulation. It goes on until it is dropped.
pub struct World {
    root: PathBuf,
    clock: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn micros(time: &str) -> u64 {
    let time: jiff::Timestamp = time.parse().unwrap_or_else(|error| panic!("{time}: {error}"));
    time.as_microsecond() as u64
}

/// Hours since midnight, UTC.
fn hour(wall_us: u64) -> f64 {
    (wall_us / 1_000_000 % 86_400) as f64 / 3600.0
}

impl World {
    /// A machine at `time` (`2026-07-14T15:00:00Z`), with everything that chance decides drawn from `seed`. Its time
    /// stands until [`World::daemon`] says that somebody is there.
    pub fn new(seed: u64, time: &str, around: Surroundings) -> World {
        let tree = Tree::agx_orin_jp6();
        let (root, clock) = (tree.root().to_path_buf(), tree.path("clock"));
        let wall_us = micros(time);
        let orders = Orders { around, daemon: None, rate: 60.0, until_us: wall_us, sleep: 0.0 };
        let shared = Arc::new(Shared {
            orders: Mutex::new(orders),
            ticks: Mutex::new(Vec::new()),
            now_us: AtomicU64::new(wall_us),
            ended: AtomicBool::new(false),
        });
        let mut machine = Machine::new(seed, tree, wall_us, shared.clone());
        machine.show(0.0);
        machine.set_clock();
        let thread = std::thread::spawn(move || machine.live());
        World { root, clock, shared, thread: Some(thread) }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The daemon's clock file.
    pub fn clock(&self) -> &Path {
        &self.clock
    }

    /// Who governs; `None` while nobody does.
    pub fn daemon(&self, pid: Option<u32>) {
        lock(&self.shared.orders).daemon = pid;
    }

    pub fn change(&self, change: impl FnOnce(&mut Surroundings)) {
        change(&mut lock(&self.shared.orders).around);
    }

    /// The machine sleeps.
    pub fn suspend(&self, seconds: f64) {
        lock(&self.shared.orders).sleep += seconds;
    }

    /// How fast time goes while a worker computes, and without end.
    pub fn pace(&self, rate: f64) {
        let mut orders = lock(&self.shared.orders);
        (orders.rate, orders.until_us) = (rate, u64::MAX);
    }

    /// Goes on to a moment, and stands there.
    pub async fn go(&self, time: &str, rate: f64) {
        self.go_to(micros(time), rate).await;
    }

    /// The same for so many seconds.
    pub async fn go_for(&self, seconds: u64, rate: f64) {
        self.go_to(self.now_us() + seconds * 1_000_000, rate).await;
    }

    async fn go_to(&self, until_us: u64, rate: f64) {
        {
            let mut orders = lock(&self.shared.orders);
            (orders.rate, orders.until_us) = (rate, until_us);
        }
        while self.now_us() < until_us {
            self.check();
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Panics when the simulation has failed.
    fn check(&self) {
        assert!(!self.thread.as_ref().unwrap().is_finished(), "the simulation has failed: see above");
    }

    /// Microseconds since 1970, at the last step.
    pub fn now_us(&self) -> u64 {
        self.shared.now_us.load(Ordering::Relaxed)
    }

    /// Everything so far.
    pub fn ticks(&self) -> Vec<Tick> {
        lock(&self.shared.ticks).clone()
    }

    /// The last step.
    pub fn tick(&self) -> Tick {
        *lock(&self.shared.ticks).last().unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread's own.
struct Machine {
    tree: Tree,
    plant: Plant,
    random: Random,
    shared: Arc<Shared>,
    monotonic_us: u64,
    wall_us: u64,
    charge: f64,
    fan: f64,
    /// Processor time of every worker that was seen, s.
    workers: HashMap<u32, f64>,
    /// Processor time that no step has been charged with.
    owed: f64,
    /// When the step before ended, and when a worker last computed.
    ticked: Instant,
    busy: Instant,
    /// What the junction's sensor said when it got stuck.
    stuck: Option<f64>,
    /// What the files say.
    written: HashMap<String, String>,
}

impl Machine {
    fn new(seed: u64, tree: Tree, wall_us: u64, shared: Arc<Shared>) -> Machine {
        let mut random = Random(seed);
        // An AGX Orin on its developer kit's sink.
        let mut plant = Plant {
            idle: random.uniform(7.0, 9.0),
            full: random.uniform(30.0, 36.0),
            other: 0.0,
            die_resistance: random.uniform(0.15, 0.25),
            sink_resistance: random.uniform(1.1, 1.3),
            die_time: random.uniform(3.0, 6.0),
            sink_capacity: random.uniform(300.0, 450.0),
            ambient: 0.0,
            drift: 0.0,
            fan: 1.0,
            die: 0.0,
            sink: 0.0,
            at: 0.0,
        };
        let around = lock(&shared.orders).around.clone();
        plant.ambient = air(&around, wall_us);
        plant.sink = plant.ambient + plant.idle * plant.sink_resistance;
        plant.die = plant.idle * plant.die_resistance;
        // Blocks that are switched off answer with EAGAIN, which no file can.
        for zone in 2..5 {
            tree.remove(&format!("sys/class/thermal/thermal_zone{zone}"));
        }
        tree.write("sys/class/hwmon/hwmon6/name", "pwm_tach\n");
        let calm = "avg10=0.00 avg60=0.00 avg300=0.00 total=0";
        tree.write("proc/pressure/memory", format!("some {calm}\nfull {calm}\n"));
        tree.supply("AC", &[("type", "Mains"), ("online", "1")]);
        tree.supply("BAT0", &[("type", "Battery"), ("capacity", "90"), ("status", "Full")]);
        Machine {
            tree,
            plant,
            random,
            shared,
            monotonic_us: 1_000_000_000,
            wall_us,
            charge: 90.0,
            fan: 0.4,
            workers: HashMap::new(),
            owed: 0.0,
            ticked: Instant::now(),
            busy: Instant::now(),
            stuck: None,
            written: HashMap::new(),
        }
    }

    fn live(&mut self) {
        while !self.shared.ended.load(Ordering::Relaxed) {
            let (daemon, rate, until_us, sleep) = {
                let mut orders = lock(&self.shared.orders);
                (orders.daemon, orders.rate, orders.until_us, std::mem::take(&mut orders.sleep))
            };
            if sleep > 0.0 {
                self.sleep(sleep);
            }
            if self.wall_us >= until_us {
                std::thread::sleep(Duration::from_micros(200));
                continue;
            }
            if daemon.is_some() && !self.governed(daemon) {
                continue;
            }
            self.step(daemon, rate, until_us);
        }
    }

    /// Waits until the governor has made its round; false when there is another one, or an end.
    fn governed(&self, daemon: Option<u32>) -> bool {
        let began = Instant::now();
        while waited_for(&self.tree.path("clock"))
            .is_none_or(|until| until.as_micros() as u64 <= self.monotonic_us)
        {
            if self.shared.ended.load(Ordering::Relaxed) || lock(&self.shared.orders).daemon != daemon {
                return false;
            }
            assert!(began.elapsed() < PATIENCE, "the governor makes no round");
            std::thread::sleep(Duration::from_micros(50));
        }
        true
    }

    fn step(&mut self, daemon: Option<u32>, rate: f64, until_us: u64) {
        let rested = daemon.is_some() && self.busy.elapsed() >= RESTED;
        let left = (until_us - self.wall_us) as f64 / 1e6;
        let seconds = if rested { LEAP } else { STEP }.min(left);
        if !rested {
            let due = self.ticked + Duration::from_secs_f64(seconds / rate);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        let now = Instant::now();
        let real = now.duration_since(self.ticked).as_secs_f64();
        self.ticked = now;
        let computed = self.processor_time(daemon);
        // A step cannot hold more than itself; what is left over is the next one's, within reason.
        let charged = (self.owed + computed).min(real);
        self.owed = (self.owed + computed - charged).min(real);
        let share = charged / real;
        if computed / real > RESTS {
            self.busy = now;
        }
        let power = self.heat(seconds, share);
        self.monotonic_us += (seconds * 1e6) as u64;
        self.wall_us += (seconds * 1e6) as u64;
        self.show(power);
        let die = self.plant.temperature();
        let metered = daemon.is_some();
        let tick = Tick { wall_us: self.wall_us, seconds, power, computed, die, metered };
        lock(&self.shared.ticks).push(tick);
        self.set_clock();
    }

    /// Lets the plant go on; the mean power.
    fn heat(&mut self, seconds: f64, share: f64) -> f64 {
        let around = lock(&self.shared.orders).around.clone();
        self.plant.ambient = air(&around, self.wall_us);
        self.plant.other = around.other;
        // A fan with five steps that follows the sink, as the fan profiles of L4T do.
        let wanted = ((self.plant.sink - 35.0) / 35.0).clamp(0.0, 1.0);
        self.fan = if around.fan_stands { 0.0 } else { (wanted * 5.0).round() / 5.0 };
        self.plant.fan = if around.fan_stands { 2.4 } else { 1.5 - 0.8 * self.fan };
        for _ in 0..(seconds / DT).round() as usize {
            self.plant.step(share);
        }
        let hours = seconds / 3600.0;
        let rate = if around.plugged { 25.0 } else { -15.0 };
        self.charge = (self.charge + rate * hours).clamp(0.0, 100.0);
        self.plant.power(share)
    }

    /// Nothing computes, nothing is metered, the sink cools, and the monotonic clock stands.
    fn sleep(&mut self, seconds: f64) {
        let (idle, other) = (self.plant.idle, self.plant.other);
        (self.plant.idle, self.plant.other) = (0.5, 0.0);
        for _ in 0..(seconds / DT).round() as usize {
            self.plant.step(0.0);
        }
        (self.plant.idle, self.plant.other) = (idle, other);
        self.wall_us += (seconds * 1e6) as u64;
        self.show(idle);
        self.set_clock();
    }

    /// What the daemon's workers have computed since the last time, s.
    fn processor_time(&mut self, daemon: Option<u32>) -> f64 {
        let Some(daemon) = daemon else { return self.look_at_workers() };
        // Those that have ended stay known: one that nobody has waited for yet is still a child.
        for pid in workers_of(daemon) {
            self.workers.entry(pid).or_insert(0.0);
        }
        self.look_at_workers()
    }

    fn look_at_workers(&mut self) -> f64 {
        let mut computed = 0.0;
        for (pid, before) in &mut self.workers {
            // One that has just ended keeps what it was seen to have computed.
            let total = process_seconds(*pid).unwrap_or(*before);
            computed += (total - *before).max(0.0);
            *before = total;
        }
        computed
    }

    /// Writes the files of the board.
    fn show(&mut self, power: f64) {
        let around = lock(&self.shared.orders).around.clone();
        let die = self.plant.temperature();
        let mut hottest = f64::NEG_INFINITY;
        for (zone, below) in [(0, 0.5), (1, 0.0), (5, 2.5), (6, 3.0), (7, 4.0)] {
            let value = self.sensed(die - below);
            hottest = hottest.max(value);
            self.write(
                &format!("sys/class/thermal/thermal_zone{zone}/temp"),
                format!("{value:.0}\n", value = value * 1000.0),
            );
        }
        for (zone, below) in [(9, 12.0), (10, 9.0)] {
            let value = self.sensed(self.plant.sink - below) * 1000.0;
            self.write(&format!("sys/class/thermal/thermal_zone{zone}/temp"), format!("{value:.0}\n"));
        }
        self.show_junction(around.fault, hottest);

        // The rails of the module, by their voltages in the tree, mV.
        let rails = [
            ("hwmon3/curr1", 19_800.0, 0.55),
            ("hwmon3/curr2", 19_760.0, 0.2),
            ("hwmon3/curr3", 5_000.0, 0.2),
        ];
        let mut left = power;
        for (file, voltage, share) in rails {
            let current = (power * share / voltage * 1e6).round();
            left -= current * voltage / 1e6;
            self.write(&format!("sys/class/hwmon/{file}_input"), format!("{current:.0}\n"));
        }
        self.write("sys/class/hwmon/hwmon4/curr2_input", format!("{:.0}\n", (left / 5_000.0 * 1e6).max(0.0)));

        self.write("sys/class/hwmon/hwmon0/pwm1", format!("{:.0}\n", self.fan * 255.0));
        self.write("sys/class/hwmon/hwmon6/rpm", format!("{:.0}\n", self.fan * 4000.0));
        let throttles = u8::from(die > THROTTLES);
        self.write("sys/class/thermal/cooling_device2/cur_state", format!("{throttles}\n"));
        self.write("sys/class/power_supply/AC/online", format!("{}\n", u8::from(around.plugged)));
        let status = match (around.plugged, self.charge < 100.0) {
            (true, true) => "Charging\n",
            (true, false) => "Full\n",
            (false, _) => "Discharging\n",
        };
        self.write("sys/class/power_supply/BAT0/status", status.into());
        self.write("sys/class/power_supply/BAT0/capacity", format!("{:.0}\n", self.charge.floor()));
        let gpu = "sys/devices/platform/17000000.gpu";
        self.write(&format!("{gpu}/load"), format!("{:.0}\n", around.gpu * 1000.0));
        let clock = if around.gpu > 0.0 { 612_000_000 } else { 306_000_000 };
        self.write(&format!("{gpu}/devfreq/17000000.gpu/cur_freq"), format!("{clock}\n"));
    }

    /// The zone `tj`, with what is wrong with it.
    fn show_junction(&mut self, fault: Option<Fault>, truth: f64) {
        let file = "sys/class/thermal/thermal_zone8/temp";
        if fault != Some(Fault::Stuck) {
            self.stuck = None;
        }
        let value = match fault {
            None => truth,
            Some(Fault::Jump(by)) => truth + by,
            Some(Fault::Says(value)) => value,
            Some(Fault::Stuck) => *self.stuck.get_or_insert(truth),
            Some(Fault::Missing | Fault::Vanished | Fault::Offline | Fault::Stale) => {
                if self.written.remove(file).is_some() {
                    self.tree.remove(file);
                }
                return;
            }
        };
        self.write(file, format!("{:.0}\n", value * 1000.0));
    }

    /// A temperature as a sensor of the chip tells it: noise, and steps of a 32nd of a degree.
    fn sensed(&mut self, truth: f64) -> f64 {
        ((truth + self.random.noise(0.1)) * 32.0).round() / 32.0
    }

    /// Replaces a file whole, if it is to say something else.
    fn write(&mut self, path: &str, content: String) {
        if self.written.get(path) == Some(&content) {
            return;
        }
        let beside = format!("{path}.next");
        self.tree.write(&beside, &content);
        self.tree.rename(&beside, path);
        self.written.insert(path.to_string(), content);
    }

    fn set_clock(&self) {
        let (monotonic_us, wall_us) = (self.monotonic_us, self.wall_us);
        self.shared.now_us.store(wall_us, Ordering::Relaxed);
        Anchor { origin_us: 0, monotonic_us, wall_us, rate: 0.0 }.write(&self.tree.path("clock")).unwrap();
    }
}

/// The air, warmest at three in the afternoon.
fn air(around: &Surroundings, wall_us: u64) -> f64 {
    around.air + around.day * ((hour(wall_us) - 15.0) / 24.0 * std::f64::consts::TAU).cos()
}

/// The children of a process, from the kernel where it tells.
fn workers_of(daemon: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{daemon}/task")) else { return Vec::new() };
    let lists: Vec<String> = tasks
        .flatten()
        .map_while(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .collect();
    if lists.is_empty() {
        return children(daemon);
    }
    lists.iter().flat_map(|list| list.split_ascii_whitespace()).filter_map(|pid| pid.parse().ok()).collect()
}

/// Processor time of a process and its threads, s. (`/proc/<pid>/stat` counts in hundredths, a few steps of ours.)
fn process_seconds(pid: u32) -> Option<f64> {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both calls write to the integers that they are given, which live on this stack.
    let got = unsafe {
        libc::clock_getcpuclockid(pid as libc::pid_t, &mut clock) == 0
            && libc::clock_gettime(clock, &mut time) == 0
    };
    got.then(|| time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}
