//! Devices, numbers and tolerances of the operation table.

use finetuned_cuda::cubins::Cubins;
use finetuned_cuda::driver::Driver;
use finetuned_cuda::simt::{Counters, Order, Simt};
use finetuned_cuda::{Buffer, Device, Element, Error};
use half::bf16;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

/// Whether this column has to run.
pub fn required(column: &str) -> bool {
    std::env::var("FINETUNED_REQUIRE").is_ok_and(|columns| columns.split(',').any(|name| name == column))
}

/// Says that a column is left out.
pub fn skipped(column: &str, why: &str) {
    assert!(!required(column), "{column} is required: {why}");
    eprintln!("SKIPPED: the column `{column}`: {why}");
}

/// The stand-in, once for each test: its counters are the test's own.
pub fn simt() -> Option<Arc<Simt>> {
    static MISSING: OnceLock<()> = OnceLock::new();
    match Simt::new() {
        Ok(simt) => Some(simt),
        Err(why) => {
            MISSING.get_or_init(|| skipped("simt", &why));
            None
        }
    }
}

/// What an operation left: names and values.
pub type Outputs = Vec<(&'static str, Values)>;

/// The values of one output.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    U8(Vec<u8>),
}

impl Values {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Values::Bf16(values) => bytemuck::cast_slice(values),
            Values::F32(values) => bytemuck::cast_slice(values),
            Values::F64(values) => bytemuck::cast_slice(values),
            Values::U8(values) => values,
        }
    }

    pub fn f64(&self) -> Vec<f64> {
        match self {
            Values::Bf16(values) => values.iter().map(|v| v.to_f64()).collect(),
            Values::F32(values) => values.iter().map(|&v| v.into()).collect(),
            Values::F64(values) => values.clone(),
            Values::U8(values) => values.iter().map(|&v| v.into()).collect(),
        }
    }
}

/// Reads back all of a buffer.
pub trait ReadBack {
    fn all(&self) -> Values;
}
macro_rules! read_back {
    ($($t:ty => $variant:ident),*) => {
        $(impl ReadBack for Buffer<$t> {
            fn all(&self) -> Values { Values::$variant(self.read(self.len()).unwrap()) }
        })*
    };
}
read_back!(bf16 => Bf16, f32 => F32, f64 => F64, u8 => U8);

/// Runs an operation on every device; calls `check` with what each left.
pub fn everywhere(body: impl Fn(&Device) -> Result<Outputs, Error>, check: impl Fn(&str, &Outputs)) {
    if let Some(simt) = simt() {
        let device = simt.device();
        let ascending = body(&device).unwrap();
        check("simt", &ascending);
        // What the sanitizers look for does not depend on the order.
        let sanitized = std::env::var_os("FINETUNED_SIMT_SANITIZE").is_some();
        let orders: &[Order] = if sanitized { &[] } else { &[Order::Descending, Order::Shuffled(1)] };
        for &order in orders {
            simt.set_order(order);
            let other = body(&device).unwrap();
            for ((name, a), (_, b)) in ascending.iter().zip(&other) {
                assert!(a.bytes() == b.bytes(), "{name} depends on the schedule ({order:?})");
            }
        }
    }
    match gpu() {
        Ok(device) => check("gpu", &body(device).unwrap()),
        Err(why) => {
            static SAID: OnceLock<()> = OnceLock::new();
            SAID.get_or_init(|| skipped("gpu", why));
        }
    }
}

/// The GPU of this machine. Cubins are looked for in `FINETUNED_KERNELS`, a directory, and else compiled.
pub fn gpu() -> Result<&'static Device, &'static str> {
    static GPU: OnceLock<Result<Device, String>> = OnceLock::new();
    let open = || {
        let shipped = std::env::var_os("FINETUNED_KERNELS").map(PathBuf::from).into_iter().collect();
        let driver = Driver::open(0, &Cubins::new(shipped, None, None)).map_err(|error| error.to_string())?;
        Ok(Device::new(driver))
    };
    GPU.get_or_init(open).as_ref().map_err(String::as_str)
}

/// What every kernel of an operation did on the stand-in.
pub fn counted(body: impl FnOnce(&Device) -> Result<(), Error>) -> Option<BTreeMap<&'static str, Counters>> {
    let simt = simt()?;
    let device = simt.device();
    simt.count(true);
    body(&device).unwrap();
    Some(simt.take_counters())
}

/// A buffer whose content is NaN.
pub fn poisoned<T: Element>(device: &Device, len: usize) -> Buffer<T> {
    let mut buffer = Buffer::new(device, len).unwrap();
    buffer.fill(0xff).unwrap();
    buffer
}

/// A buffer with these values, rounded to bf16.
pub fn upload(device: &Device, values: &[f64]) -> Buffer<bf16> {
    let values: Vec<bf16> = values.iter().map(|&v| bf16::from_f64(v)).collect();
    Buffer::from_slice(device, &values).unwrap()
}

/// A buffer with these values, rounded to f32.
pub fn upload_f32(device: &Device, values: &[f64]) -> Buffer<f32> {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    Buffer::from_slice(device, &values).unwrap()
}

/// Numbers with a normal distribution, each a bf16.
pub fn random(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let mut normal = || (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    (0..count).map(|_| round(normal())).collect()
}

/// Nearest bf16.
pub fn round(value: f64) -> f64 {
    bf16::from_f64(value).to_f64()
}

/// ‖a − b‖ / ‖b‖
pub fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
    let size: f64 = b.iter().map(|b| b * b).sum();
    if difference == 0.0 { 0.0 } else { (difference / size).sqrt() }
}

/// That the error against the oracle is at most twice that of the naive computation.
#[track_caller]
pub fn close(what: &str, found: &[f64], oracle: &[f64], naive: &[f64]) {
    let (error, allowed) = (relative_error(found, oracle), 2.0 * relative_error(naive, oracle));
    assert!(error <= allowed, "{what}: error {error:.3e}, allowed are {allowed:.3e}");
}

/// That the error against the oracle is at most twice that of one rounding to bf16: for formulas whose intermediate
/// results are floats.
#[track_caller]
pub fn rounded_once(what: &str, found: &[f64], oracle: &[f64]) {
    close(what, found, oracle, &oracle.iter().map(|&v| round(v)).collect::<Vec<_>>());
}

/// That two outputs are the same, bit for bit.
#[track_caller]
pub fn same_bits(what: &str, found: &Values, expected: &Values) {
    if found.bytes() != expected.bytes() {
        let (a, b) = (found.f64(), expected.f64());
        let at = a.iter().zip(&b).position(|(a, b)| a.to_bits() != b.to_bits());
        let shown = at.map(|i| format!("element {i} is {} and not {}", a[i], b[i]));
        panic!("{what}: {}", shown.unwrap_or_else(|| format!("{} values and not {}", a.len(), b.len())));
    }
}
