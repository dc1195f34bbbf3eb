//! The launcher of a GPU, on the CUDA driver.
//!
//! Everything runs on one stream of the device's primary context. All kernels are loaded when the device is opened, so
//! that a step finds everything in place. An error that a kernel causes is reported by a later call; the message names
//! the last kernel launched before it, and with `FINETUNED_CUDA_SYNC=1` every launch is waited for, so that it names the
//! right one.
//!
//! After a sticky error ([`Error::is_sticky`]) the context is lost: the process has to end. Nothing is repaired here.

use crate::cubins::Cubins;
use crate::device::Properties;
use crate::error::Error;
use crate::kernels::{self, Kernel};
use crate::launcher::{Address, Argument, Launch, Launcher, Mark};
use crate::source::FILES;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::sync::{Arc, Mutex, PoisonError};

/// CUDA 12.2, the driver of JetPack 6.0.
const OLDEST_DRIVER: i32 = 12_020;
/// Ampere: mma on bf16, cp.async.
const OLDEST_SM: u32 = 80;

/// `CU_CTX_SCHED_BLOCKING_SYNC`
const BLOCKING_SYNC: u32 = 4;

/// A GPU.
pub struct Driver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    functions: HashMap<&'static str, sys::CUfunction>,
    modules: Vec<sys::CUmodule>,
    properties: Properties,
    compilers: Vec<String>,
    wait_for_each: bool,
    last: Mutex<&'static str>,
}

// SAFETY: handles of the driver may be used from any thread in whose turn the context is current, and every call makes
// it so first.
unsafe impl Send for Driver {}
// SAFETY: as above; the driver's calls are thread-safe.
unsafe impl Sync for Driver {}

/// Whether this machine has a driver. cudarc panics when its first call finds none, so nothing is called before this.
pub fn is_there() -> bool {
    // SAFETY: loads the library, whose initialisers have no conditions.
    unsafe { sys::is_culib_present() }
}

fn cuda<T>(result: Result<T, DriverError>, during: impl FnOnce() -> String) -> Result<T, Error> {
    result.map_err(|error| Error::Cuda {
        during: during(),
        code: error.0 as u32,
        name: error
            .error_name()
            .map_or_else(|_| "unknown".into(), |name| name.to_string_lossy().into_owned()),
    })
}

/// What CUDA says of device `index`, without making a context on it.
pub fn properties(index: usize) -> Result<Properties, Error> {
    Ok(look_at(index)?.1)
}

/// Peak of the memory of device `index`, in B/s: its width times two transfers a clock.
pub fn memory_bandwidth(index: usize) -> Result<u64, Error> {
    let (device, _) = look_at(index)?;
    let attribute = |attribute: Attribute| {
        // SAFETY: a device that the driver has handed out.
        let value = unsafe { result::device::get_attribute(device, attribute) };
        cuda(value, || format!("reading {attribute:?}")).map(|value| value.max(0) as u64)
    };
    let kilohertz = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
    let bits = attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?;
    Ok(2 * 1000 * kilohertz * bits / 8)
}

fn look_at(index: usize) -> Result<(sys::CUdevice, Properties), Error> {
    if !is_there() {
        return Err(Error::NoDriver);
    }
    let mut driver = 0;
    // SAFETY: a number to write to.
    let version = unsafe { sys::cuDriverGetVersion(&mut driver) }.result();
    cuda(version, || "reading the driver's version".into())?;
    if driver < OLDEST_DRIVER {
        return Err(Error::OldDriver { found: driver });
    }
    let count = match result::init().and_then(|()| result::device::get_count()) {
        // The driver is installed, the hardware is not.
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => 0,
        count => cuda(count, || "initialising CUDA".into())?,
    };
    if index >= count as usize {
        return Err(Error::NoDevice { index, count: count as usize });
    }
    let device = cuda(result::device::get(index as c_int), || format!("opening device {index}"))?;
    let properties = read_properties(device, driver as u32)?;
    if properties.sm < OLDEST_SM {
        return Err(Error::OldDevice { name: properties.name, sm: properties.sm });
    }
    Ok((device, properties))
}

fn read_properties(device: sys::CUdevice, driver: u32) -> Result<Properties, Error> {
    let attribute = |attribute: Attribute| {
        // SAFETY: a device that the driver has handed out.
        let value = unsafe { result::device::get_attribute(device, attribute) };
        cuda(value, || format!("reading {attribute:?}")).map(|value| value as u32)
    };
    // SAFETY: as above.
    let memory =
        cuda(unsafe { result::device::total_mem(device) }, || "reading the size of its memory".into())?;
    Ok(Properties {
        name: cuda(result::device::get_name(device), || "reading its name".into())?,
        sm: 10 * attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        clock_khz: attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
        shared_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        shared_per_multiprocessor: attribute(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
        )?,
        l2: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        integrated: attribute(Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0,
        memory: memory as u64,
        driver,
    })
}

impl Driver {
    /// Opens device `index` and loads every kernel for it.
    ///
    /// # Errors
    /// One sentence that says what is missing, or what CUDA said.
    pub fn open(index: usize, cubins: &Cubins) -> Result<Arc<Driver>, Error> {
        let (device, properties) = look_at(index)?;
        if properties.integrated {
            // A thread that waits for a Jetson's GPU sleeps: by default it spins, which costs a core of the power budget.
            // SAFETY: a device that the driver has handed out.
            let set = unsafe { sys::cuDevicePrimaryCtxSetFlags_v2(device, BLOCKING_SYNC) }.result();
            cuda(set, || format!("setting up {}", properties.name))?;
        }
        // SAFETY: a device that the driver has handed out.
        let context =
            cuda(unsafe { result::primary_ctx::retain(device) }, || format!("opening {}", properties.name))?;
        let mut driver = Driver {
            device,
            context,
            stream: std::ptr::null_mut(),
            functions: HashMap::new(),
            modules: Vec::new(),
            properties,
            compilers: Vec::new(),
            wait_for_each: std::env::var_os("FINETUNED_CUDA_SYNC").is_some_and(|value| value == "1"),
            last: Mutex::new(""),
        };
        driver.bind()?;
        driver.stream = cuda(result::stream::create(result::stream::StreamKind::NonBlocking), || {
            "making a stream".into()
        })?;
        for source in FILES {
            let cubin = cubins.find(source, driver.properties.sm)?;
            let during = || format!("loading {} for sm_{}", source.name, driver.properties.sm);
            // SAFETY: a whole ELF file: `Cubins` has read it to its end.
            let module = cuda(unsafe { result::module::load_data(cubin.bytes.as_ptr().cast()) }, during)?;
            driver.modules.push(module);
            driver.compilers.push(cubin.compiler);
            for kernel in kernels::ALL.iter().filter(|kernel| kernel.file == source.name) {
                driver.load(module, kernel)?;
            }
        }
        driver.compilers.sort();
        driver.compilers.dedup();
        Ok(Arc::new(driver))
    }

    /// Compilers of the kernels in use: a part of what the bits depend on.
    pub fn compilers(&self) -> &[String] {
        &self.compilers
    }

    fn load(&mut self, module: sys::CUmodule, kernel: &'static Kernel) -> Result<(), Error> {
        let missing = || Error::MissingKernel { file: kernel.file, kernel: kernel.name };
        let name = CString::new(kernel.name).map_err(|_| missing())?;
        // SAFETY: a module that is loaded.
        let function = match unsafe { result::module::get_function(module, name) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND)) => return Err(missing()),
            function => cuda(function, || format!("loading {}", kernel.name))?,
        };
        if kernel.dynamic_shared > DEFAULT_SHARED {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a module that stays loaded.
            let set = unsafe {
                result::function::set_function_attribute(function, attribute, kernel.dynamic_shared as c_int)
            };
            cuda(set, || format!("giving {} {} bytes of shared memory", kernel.name, kernel.dynamic_shared))?;
        }
        self.functions.insert(kernel.name, function);
        Ok(())
    }

    fn bind(&self) -> Result<(), Error> {
        // SAFETY: retained until this is dropped.
        cuda(unsafe { result::ctx::set_current(self.context) }, || {
            // The first call after a kernel that failed is often this one.
            self.after(&format!("using {}", self.properties.name))
        })
    }

    /// What a failed call was about: the call, and the launch that may be to blame.
    fn after(&self, call: &str) -> String {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_empty() { call.to_string() } else { format!("{call}, after {last}") }
    }
}

/// Shared memory that a kernel may use without asking.
const DEFAULT_SHARED: u32 = 48 * 1024;

impl Drop for Driver {
    fn drop(&mut self) {
        // Errors have been reported by the calls that they belong to, and there is nobody to tell here.
        if self.bind().is_err() {
            return;
        }
        // SAFETY: each was made by `open` and is destroyed once; nothing launches any more.
        unsafe {
            if !self.stream.is_null() {
                let _ = result::stream::synchronize(self.stream);
                let _ = result::stream::destroy(self.stream);
            }
            for module in self.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// An argument as `cuLaunchKernel` reads it.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Word([u8; 8]);

fn word<const N: usize>(bytes: [u8; N]) -> Word {
    let mut word = [0; 8];
    word[..N].copy_from_slice(&bytes);
    Word(word)
}

impl Launcher for Driver {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: u64) -> Result<Address, Error> {
        self.bind()?;
        // SAFETY: a context is current.
        let memory = unsafe { result::malloc_sync(bytes.max(1) as usize) };
        cuda(memory, || self.after(&format!("taking {bytes} bytes of device memory"))).map(Address)
    }

    unsafe fn free(&self, address: Address) {
        if self.bind().is_ok() {
            // SAFETY: the caller's promise. `cuMemFree` "may" wait for kernels that use the memory; we do.
            let _ = unsafe {
                result::stream::synchronize(self.stream).and_then(|()| result::free_sync(address.0))
            };
        }
    }

    unsafe fn copy_in(&self, to: Address, from: &[u8]) -> Result<(), Error> {
        if from.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's promise; `from` is not touched before the stream has been waited for.
        let copied = unsafe {
            result::memcpy_htod_async(to.0, from, self.stream)
                .and_then(|()| result::stream::synchronize(self.stream))
        };
        cuda(copied, || self.after(&format!("copying {} bytes to the device", from.len())))
    }

    unsafe fn copy_out(&self, from: Address, to: &mut [u8]) -> Result<(), Error> {
        if to.is_empty() {
            return Ok(());
        }
        self.bind()?;
        let len = to.len();
        // SAFETY: as above.
        let copied = unsafe {
            result::memcpy_dtoh_async(to, from.0, self.stream)
                .and_then(|()| result::stream::synchronize(self.stream))
        };
        cuda(copied, || self.after(&format!("copying {len} bytes from the device")))
    }

    unsafe fn copy(&self, to: Address, from: Address, bytes: u64) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's promise.
        let copied = unsafe { result::memcpy_dtod_async(to.0, from.0, bytes as usize, self.stream) };
        cuda(copied, || self.after(&format!("copying {bytes} bytes on the device")))
    }

    unsafe fn fill(&self, at: Address, byte: u8, bytes: u64) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller's promise.
        let set = unsafe { result::memset_d8_async(at.0, byte, bytes as usize, self.stream) };
        cuda(set, || self.after(&format!("setting {bytes} bytes")))
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        let kernel = launch.kernel;
        let function = self
            .functions
            .get(kernel.name)
            .copied()
            .ok_or(Error::MissingKernel { file: kernel.file, kernel: kernel.name })?;
        self.bind()?;
        let mut words: Vec<Word> = launch
            .arguments
            .iter()
            .map(|argument| match argument {
                Argument::In(address, _) | Argument::Out(address, _) => word(address.0.to_ne_bytes()),
                Argument::Null | Argument::Struct(_) => word([0; 8]),
                Argument::U32(value) => word(value.to_ne_bytes()),
                Argument::I32(value) => word(value.to_ne_bytes()),
                Argument::U64(value) => word(value.to_ne_bytes()),
                Argument::F32(value) => word(value.to_ne_bytes()),
                Argument::F64(value) => word(value.to_ne_bytes()),
            })
            .collect();
        let mut pointers: Vec<*mut c_void> = launch
            .arguments
            .iter()
            .zip(&mut words)
            .map(|(argument, word)| match argument {
                Argument::Struct(bytes) => bytes.as_ptr().cast_mut().cast(),
                _ => (&raw mut *word).cast(),
            })
            .collect();
        let during = || format!("{}{}", kernel.name, launch.shape());
        let (grid, threads) = (launch.grid, (kernel.threads, 1, 1));
        // SAFETY: the caller's promise: these are the kernel's parameters, in its order; they are copied by the call.
        let launched = unsafe {
            result::launch_kernel(
                function,
                (grid[0], grid[1], grid[2]),
                threads,
                launch.shared,
                self.stream,
                &mut pointers,
            )
        };
        cuda(launched, || self.after(&during()))?;
        if self.wait_for_each {
            // SAFETY: our stream.
            cuda(unsafe { result::stream::synchronize(self.stream) }, during)?;
        }
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = kernel.name;
        Ok(())
    }

    fn synchronize(&self) -> Result<(), Error> {
        self.bind()?;
        // SAFETY: our stream.
        cuda(unsafe { result::stream::synchronize(self.stream) }, || self.after("waiting for the device"))
    }

    fn mark(&self) -> Result<Mark, Error> {
        self.bind()?;
        let event =
            cuda(result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT), || "making an event".into())?;
        // SAFETY: an event that was just made, and our stream.
        let recorded = unsafe { result::event::record(event, self.stream) };
        if recorded.is_err() {
            // SAFETY: made above, and nobody else's.
            let _ = unsafe { result::event::destroy(event) };
        }
        cuda(recorded, || self.after("marking a place on the stream"))?;
        Ok(Mark::Event(event as usize))
    }

    fn elapsed(&self, from: Mark, to: Mark) -> Result<f64, Error> {
        let (Mark::Event(from), Mark::Event(to)) = (from, to) else {
            return Err(Error::Shape { operation: "elapsed time", what: "a mark of another device".into() });
        };
        self.bind()?;
        let (from, to) = (from as sys::CUevent, to as sys::CUevent);
        // SAFETY: events of `mark`, recorded on our stream and destroyed only here: a mark is used up.
        let elapsed = unsafe {
            let elapsed = result::event::synchronize(to).and_then(|()| result::event::elapsed(from, to));
            let _ = result::event::destroy(from);
            let _ = result::event::destroy(to);
            elapsed
        };
        Ok(f64::from(cuda(elapsed, || self.after("timing"))?) / 1e3)
    }

    /// On an integrated GPU device memory is the system's, and what the driver calls free leaves out the page cache:
    /// the kernel's own estimate is taken.
    fn free_memory(&self) -> Result<u64, Error> {
        if self.properties.integrated
            && let Some(available) =
                std::fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(mem_available)
        {
            return Ok(available);
        }
        self.bind()?;
        let (free, _) = cuda(result::mem_get_info(), || self.after("reading free memory"))?;
        Ok(free as u64)
    }
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_as_the_kernel_writes_it() {
        let meminfo =
            "MemTotal:       64349184 kB\nMemFree:         1000000 kB\nMemAvailable:   52428800 kB\n";
        assert_eq!(mem_available(meminfo), Some(50 << 30));
        assert_eq!(mem_available("MemAvailable: many\n"), None);
    }

    /// On a machine with neither driver nor device this is all that can be asked.
    #[test]
    fn a_missing_driver_is_an_error_and_no_panic() {
        if is_there() {
            return;
        }
        assert!(matches!(properties(0), Err(Error::NoDriver)));
        let error = Driver::open(0, &Cubins::default()).err().unwrap();
        assert_eq!(error.to_string(), "no CUDA driver: libcuda.so.1 was not found");
    }
}
