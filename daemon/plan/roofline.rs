//! How fast a device can be at most, from its multiprocessors, its clock and its memory: the roofline (Williams, Waterman,
//! Patterson, CACM 52(4), 2009).
//!
//! ```text
//!   bound       max(operations / peak, bytes / bandwidth)
//!   prediction  bound / 0.6
//!   peak        multiprocessors · 2 · multiply-adds a clock · clock      dense bf16, sums in fp32, mma.sync
//! ```
//!
//! [`EFFICIENCY`] is what a careful kernel is planned to reach, not what one was seen to reach: a prediction is where nothing
//! was measured, says so, and is taken to be wrong by a factor of two.
//!
//! # Devices
//!
//! Multiprocessors, clocks and memory clocks of the power modes are those of NVIDIA's configuration of nvpmodel
//! (`nvpmodel_p3701_0000.conf`, `nvpmodel_p3701_0004.conf`); a set bit of its mask switches two multiprocessors off. An Orin
//! does 1,024 multiply-adds a clock and multiprocessor, as an A100 does: its 85 dense INT8 TOPS are 512 a tensor core.

use super::throughput::{Machine, Setup, Workload};

/// Share of the bound that is planned with.
pub const EFFICIENCY: f64 = 0.6;
/// Share of the memory's bandwidth that a stream is taken to reach.
pub const STREAM: f64 = 0.8;
/// Bytes that dequantising a weight moves: 0.516 read, 2 written.
pub const DEQUANTISE: f64 = 0.515_869_140_625 + 2.0;

/// What bounds a device.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    /// Device and power mode, in words.
    pub name: String,
    /// Peak of dense products of bf16 with sums in fp32, FLOP/s.
    pub flops: f64,
    /// Peak of its memory, B/s.
    pub bandwidth: f64,
}

/// A power mode of a board.
#[derive(Debug)]
struct Mode {
    board: &'static str,
    mode: &'static str,
    multiprocessors: u32,
    megahertz: f64,
    /// Clock of the memory, in MHz.
    memory: f64,
}

const fn mode(
    board: &'static str,
    mode: &'static str,
    multiprocessors: u32,
    megahertz: f64,
    memory: f64,
) -> Mode {
    Mode { board, mode, multiprocessors, megahertz, memory }
}

/// Every mode that is known; of a board the first is the one it is shipped with. The highest clock of the 32 GB module is in
/// no file that was read, so its MAXN is not here: on the board itself the clock is read.
const MODES: &[Mode] = &[
    mode("agx-orin-64gb", "MODE_30W", 8, 612.0, 3200.0),
    mode("agx-orin-64gb", "MAXN", 16, 1300.5, 3200.0),
    mode("agx-orin-64gb", "MODE_50W", 16, 816.0, 3200.0),
    mode("agx-orin-64gb", "MODE_15W", 6, 408.0, 2133.0),
    mode("agx-orin-32gb", "MODE_30W", 8, 612.0, 3200.0),
    mode("agx-orin-32gb", "MODE_40W", 14, 816.0, 3200.0),
    mode("agx-orin-32gb", "MODE_15W", 6, 408.0, 2133.0),
];

/// Bytes a second of an AGX Orin's memory for each MHz: 256 bits, twice a clock; 204.8 GB/s at 3,200 MHz.
const ORIN_BANDWIDTH: f64 = 204.8e9 / 3200.0;

/// An H200 at the ceiling of `mma.sync`, 63 % of its 989 TFLOP/s (arXiv 2501.12084 has it for the H800): these kernels have no
/// `wgmma`.
const H200: (&str, f64, f64) = ("H200", 623e12, 4.8e12);

/// Multiply-adds of bf16 that a multiprocessor does a clock through `mma.sync`, by compute capability.
fn multiply_adds(sm: u32) -> Option<f64> {
    match sm {
        80 | 87 => Some(1024.0),
        86 => Some(512.0),
        // 2,048 with wgmma.
        90 => Some(2048.0 * 0.63),
        _ => None,
    }
}

impl Device {
    /// A GPU of compute capability `sm` (10 · major + minor) with so many multiprocessors at this clock, in Hz, and a memory
    /// of this bandwidth, in B/s. `None` where the rate of its tensor cores is not known.
    pub fn of_gpu(name: &str, sm: u32, multiprocessors: u32, clock: f64, bandwidth: f64) -> Option<Device> {
        let peak = f64::from(multiprocessors) * 2.0 * multiply_adds(sm)? * clock;
        let sound = peak.is_finite() && peak > 0.0 && bandwidth.is_finite() && bandwidth > 0.0;
        sound.then(|| Device { name: name.into(), flops: peak, bandwidth })
    }

    /// A board in a power mode: `agx-orin-64gb` and `MODE_50W`, `50W` or `50w`; without a mode, in the one it is shipped with.
    pub fn of_board(board: &str, mode: Option<&str>) -> Option<Device> {
        let plain = |mode: &str| {
            let upper = mode.to_ascii_uppercase();
            upper.strip_prefix("MODE_").unwrap_or(&upper).to_string()
        };
        if board.eq_ignore_ascii_case(H200.0) && mode.is_none() {
            let (name, flops, bandwidth) = H200;
            return Some(Device { name: name.into(), flops, bandwidth });
        }
        let of_board = MODES.iter().filter(|row| row.board == board);
        let row = of_board.into_iter().find(|row| mode.is_none_or(|mode| plain(row.mode) == plain(mode)))?;
        let name = format!("{} in {}", row.board, row.mode);
        let bandwidth = ORIN_BANDWIDTH * row.memory;
        Device::of_gpu(&name, 87, row.multiprocessors, row.megahertz * 1e6, bandwidth)
    }

    /// The board and the mode that `text` names: `agx-orin-64gb`, `agx-orin-64gb:MODE_50W`.
    ///
    /// # Errors
    /// The names that there are.
    pub fn parse(text: &str) -> Result<Device, String> {
        let (board, mode) = text.split_once(':').map_or((text, None), |(board, mode)| (board, Some(mode)));
        Device::of_board(board, mode).ok_or_else(|| {
            let names: Vec<String> = MODES.iter().map(|row| format!("{}:{}", row.board, row.mode)).collect();
            format!("no figures of {text:?}; there are {}, {}", names.join(", "), H200.0)
        })
    }

    /// What the daemon knows of the GPU of a machine from its board and power mode, when a run computes on it.
    pub fn of_machine(setup: &Setup, machine: &Machine) -> Option<Device> {
        let on_gpu = setup.backend.starts_with("cuda");
        machine
            .board
            .as_deref()
            .filter(|_| on_gpu)
            .zip(machine.mode.as_deref())
            .and_then(|(board, mode)| Device::of_board(board, Some(mode)))
    }

    /// An AGX Orin whose memory has this clock, in Hz: its bandwidth.
    pub fn orin_bandwidth(memory_clock: f64) -> f64 {
        ORIN_BANDWIDTH * memory_clock / 1e6
    }

    /// The least time for so much arithmetic (GFLOP) and so many bytes (GB), in s.
    pub fn bound(&self, gflop: f64, gigabytes: f64) -> f64 {
        (gflop * 1e9 / self.flops).max(gigabytes * 1e9 / self.bandwidth)
    }

    /// The time that is predicted for it, in s.
    pub fn predict(&self, gflop: f64, gigabytes: f64) -> f64 {
        self.bound(gflop, gigabytes) / EFFICIENCY
    }

    /// Seconds of training and of all evaluations of a run, as predicted.
    pub fn predict_workload(&self, work: &Workload) -> (f64, f64) {
        (
            self.predict(work.train.gflop, work.train.gigabytes),
            self.predict(work.eval.gflop, work.eval.gigabytes),
        )
    }

    /// Seconds in which `weights` weights are dequantised `times` times, with nothing beside it.
    pub fn dequantise(&self, weights: f64, times: f64) -> f64 {
        times * weights * DEQUANTISE / (STREAM * self.bandwidth)
    }

    /// The number of rows (tokens) M* up to which it is faster to dequantise a 4-bit weight inside the product than to write
    /// it out and multiply with that: where
    ///
    /// ```text
    ///   2·M/(e·F) = 2·M/F + 2.516/(0.8·BW)        M* = 2.516·F/(2·0.8·BW) · e/(1 − e)
    /// ```
    ///
    /// with F = `plain` · peak what the plain product reaches and e = `fused`, the fused product's share of F. Without end
    /// where the fused product is no slower.
    pub fn crossover(&self, plain: f64, fused: f64) -> f64 {
        if fused >= 1.0 {
            return f64::INFINITY;
        }
        DEQUANTISE * plain * self.flops / (2.0 * STREAM * self.bandwidth) * fused.max(0.0) / (1.0 - fused)
    }
}

#[cfg(test)]
mod tests {
    use super::super::throughput::tests::setup;
    use super::*;

    #[track_caller]
    fn close(value: f64, expected: f64) {
        assert!((value / expected - 1.0).abs() < 0.01, "{value}, not {expected}");
    }

    fn orin(mode: &str) -> Device {
        Device::of_board("agx-orin-64gb", Some(mode)).unwrap()
    }

    #[test]
    fn peaks_are_those_of_the_chip() {
        close(orin("MAXN").flops, 42.6e12);
        close(orin("MODE_50W").flops, 26.7e12);
        close(orin("30W").flops, 10.0e12);
        close(orin("mode_15w").flops, 5.0e12);
        close(orin("MODE_15W").bandwidth, 204.8e9 * 2133.0 / 3200.0);
        // A100: 108 SMs at 1.41 GHz, 312 TFLOP/s.
        close(Device::of_gpu("A100", 80, 108, 1.41e9, 1.555e12).unwrap().flops, 312e12);
        assert_eq!(Device::of_gpu("?", 120, 100, 1e9, 1e12), None);
        assert_eq!(Device::of_gpu("?", 87, 0, 1e9, 1e12), None);
        assert_eq!(Device::of_board("agx-orin-32gb", Some("MAXN")), None);
        assert_eq!(Device::of_board("orin-nano", None), None);
    }

    #[test]
    fn a_board_is_named_with_its_mode() {
        assert_eq!(Device::parse("agx-orin-64gb:50W").unwrap(), orin("MODE_50W"));
        assert_eq!(Device::parse("agx-orin-64gb").unwrap().name, "agx-orin-64gb in MODE_30W");
        assert_eq!(Device::parse("H200").unwrap().flops, 623e12);
        let error = Device::parse("agx-orin-64gb:60W").unwrap_err();
        assert!(error.contains("agx-orin-64gb:MAXN, agx-orin-64gb:MODE_50W"), "{error}");
    }

    /// By hand, of the weights of a model three times, in ms.
    #[test]
    fn dequantising_takes_as_long_as_a_hand_counts() {
        for (weights, milliseconds) in
            [(357.8e6, 16.5), (973.1e6, 44.8), (2818.6e6, 129.9), (6979.3e6, 321.6)]
        {
            close(1e3 * orin("MAXN").dequantise(weights, 3.0), milliseconds);
        }
    }

    #[test]
    fn the_crossover_is_where_both_ways_take_the_same_time() {
        // By hand: 2.516 · 31.96e12 / (1.6 · 204.8e9) = 245.4.
        close(orin("MAXN").crossover(0.75, 0.9), 245.4 * 9.0);
        close(orin("MAXN").crossover(0.75, 0.8), 245.4 * 4.0);
        // An H200 with wgmma beside it, 989 TFLOP/s: 730.
        let wgmma = Device { flops: 989e12, ..Device::of_board("H200", None).unwrap() };
        close(wgmma.crossover(0.75, 0.75), 730.0);
        let device = orin("MODE_50W");
        let (plain, fused) = (0.7, 0.85);
        let rows = device.crossover(plain, fused);
        let product = |share: f64| 2.0 * rows * 1e6 / (share * plain * device.flops);
        close(product(fused), product(1.0) + device.dequantise(1e6, 1.0));
        assert_eq!(device.crossover(0.7, 1.0), f64::INFINITY);
        assert_eq!(device.crossover(0.7, 0.0), 0.0);
        // 4 bits, 8 for every 64 weights, 32 for every 16,384; and a bf16.
        assert_eq!(DEQUANTISE, (4.0 + 8.0 / 64.0 + 32.0 / 16_384.0) / 8.0 + 2.0);
    }

    #[test]
    fn only_a_run_on_the_gpu_is_predicted() {
        let machine = Machine { board: Some("agx-orin-64gb".into()), mode: Some("MODE_30W".into()) };
        let on_gpu = Setup { backend: "cuda sm_87 bf16".into(), ..setup() };
        assert_eq!(Device::of_machine(&on_gpu, &machine), Some(orin("30W")));
        assert_eq!(Device::of_machine(&setup(), &machine), None);
        assert_eq!(Device::of_machine(&on_gpu, &Machine::default()), None);
        let without_mode = Machine { mode: None, ..machine };
        assert_eq!(Device::of_machine(&on_gpu, &without_mode), None);
    }
}
