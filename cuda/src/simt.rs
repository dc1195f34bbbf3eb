//! The stand-in: the kernels of `kernels/*.cu`, compiled as host C++ against `simt/`, behind the same [`Launcher`].
//!
//! For tests. It needs a C++ compiler (g++ or clang++) where it runs; [`Simt::new`] says so when there is none. What it
//! checks and counts is described at the head of `simt/simt.h`.
//!
//! Each .cu file becomes a shared library, when its first kernel is launched; libraries are kept beside the running
//! program (in Cargo's target directory) under the hash of everything that went into them.

use crate::device::{Device, Properties};
use crate::error::Error;
use crate::kernels::Kernel;
use crate::launcher::{Address, Argument, Launch, Launcher, Mark};
use crate::source::{self, HEADERS, Source};
use libloading::{Library, Symbol};
use sha2::{Digest, Sha256};
use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The host's side of the kernels' headers.
const HOST_HEADERS: &[Source] = &[
    Source { name: "simt.h", text: include_str!("../simt/simt.h") },
    Source { name: "device.cuh", text: include_str!("../simt/device.cuh") },
    Source { name: "ptx.cuh", text: include_str!("../simt/ptx.cuh") },
];

/// Kernels that show what the stand-in finds; no part of the product.
pub const SELF_TEST: &[Source] =
    &[Source { name: "self_test.cu", text: include_str!("../simt/self_test.cu") }];

/// `-ffp-contract=off` is NVRTC's `--fmad=false`; hidden symbols keep the libraries' copies of the machine apart.
const FLAGS: &[&str] = &[
    "-std=c++17",
    "-g1",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
];

/// The sanitizers' flags; a process that loads such a library has to be started with their runtime preloaded.
const SANITIZE: &[&str] = &[
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-shared-libasan",
];

/// In which order blocks and threads run. A result must not depend on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// By index.
    #[default]
    Ascending,
    /// Against it.
    Descending,
    /// Shuffled, by this seed.
    Shuffled(u64),
}

/// What a kernel did, summed over its launches. See `Counters` in `simt/simt.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Threads that ran.
    pub threads: u64,
    /// `__syncthreads`, once a block.
    pub barriers: u64,
    /// Shuffles, votes, mma, ldmatrix: once a warp.
    pub warp_operations: u64,
    /// mma.m16n8k16, of 4096 floating-point operations each.
    pub mma: u64,
    /// ldmatrix.
    pub ldmatrix: u64,
    /// cp.async, once a thread.
    pub cp_async: u64,
    /// Loads from global memory, once a warp.
    pub global_loads: u64,
    /// Stores to it.
    pub global_stores: u64,
    /// Bytes that the threads asked for.
    pub global_load_bytes: u64,
    /// Bytes that they stored.
    pub global_store_bytes: u64,
    /// 32-byte sectors that the loads of warps touch.
    pub global_load_sectors: u64,
    /// And the stores.
    pub global_store_sectors: u64,
    /// Different sectors read in a launch: what crosses the bus at least.
    pub unique_load_sectors: u64,
    /// Different sectors written.
    pub unique_store_sectors: u64,
    /// Accesses to shared memory, once a warp.
    pub shared_accesses: u64,
    /// Passes through its banks.
    pub shared_wavefronts: u64,
    /// Passes beyond those that the width of the access needs.
    pub bank_conflicts: u64,
    /// Shared memory of a block; the most of all launches.
    pub shared_bytes: u64,
}

impl Counters {
    fn add(&mut self, other: &Counters) {
        let most = self.shared_bytes.max(other.shared_bytes);
        macro_rules! sum { ($($field:ident)*) => { $(self.$field += other.$field;)* } }
        sum! {
            threads barriers warp_operations mma ldmatrix cp_async global_loads global_stores global_load_bytes
            global_store_bytes global_load_sectors global_store_sectors unique_load_sectors unique_store_sectors
            shared_accesses shared_wavefronts bank_conflicts
        }
        self.shared_bytes = most;
    }

    /// Bytes of the different sectors, read and written: to be held against the bytes of a kernel's head comment.
    pub fn bus_bytes(&self) -> u64 {
        32 * (self.unique_load_sectors + self.unique_store_sectors)
    }
}

#[repr(C)]
struct Region {
    begin: u64,
    end: u64,
    writable: u32,
    padding: u32,
}

#[repr(C)]
struct Config {
    grid: [u32; 3],
    threads: u32,
    dynamic_shared: u32,
    order: u32,
    count: u32,
    seed: u64,
    regions: *const Region,
    region_count: u32,
    argument_count: u32,
    arguments: *const *const c_void,
    argument_regions: *const i32,
}

#[repr(C)]
struct Report {
    counters: Counters,
    fault: [c_char; 1000],
}

#[repr(C)]
struct Parameter {
    bytes: u32,
    pointer: u32,
}

#[repr(C)]
struct Entry {
    parameters: *const Parameter,
    count: u32,
    body: *const c_void,
}

type Run = unsafe extern "C" fn(*const Entry, *const Config, *mut Report) -> c_int;

/// The stand-in for a GPU.
pub struct Simt {
    compiler: Compiler,
    properties: Properties,
    settings: Mutex<Settings>,
    libraries: Mutex<BTreeMap<&'static str, Arc<Library>>>,
    allocations: Mutex<BTreeMap<u64, Layout>>,
    counters: Mutex<BTreeMap<&'static str, Counters>>,
}

#[derive(Clone, Copy, Default)]
struct Settings {
    order: Order,
    count: bool,
}

pub(crate) struct Compiler {
    program: String,
    version: String,
    directory: PathBuf,
    sanitize: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Simt {
    /// The stand-in, or a sentence that says why there is none. With `FINETUNED_SIMT_SANITIZE=1` in the environment the
    /// kernels are compiled with the address and undefined-behaviour sanitizers, whose runtime has to be preloaded.
    pub fn new() -> Result<Arc<Simt>, String> {
        Ok(Arc::new(Simt {
            compiler: Compiler::find()?,
            properties: orin(),
            settings: Mutex::default(),
            libraries: Mutex::default(),
            allocations: Mutex::default(),
            counters: Mutex::default(),
        }))
    }

    /// As a device.
    pub fn device(self: &Arc<Simt>) -> Device {
        Device::new(self.clone())
    }

    /// Blocks and threads of later launches run in this order.
    pub fn set_order(&self, order: Order) {
        lock(&self.settings).order = order;
    }

    /// Later launches count memory accesses, too; it takes several times as long.
    pub fn count(&self, count: bool) {
        lock(&self.settings).count = count;
    }

    /// What every kernel did since the last call.
    pub fn take_counters(&self) -> BTreeMap<&'static str, Counters> {
        std::mem::take(&mut lock(&self.counters))
    }

    fn library(&self, kernel: &'static Kernel) -> Result<Arc<Library>, Error> {
        let mut libraries = lock(&self.libraries);
        if let Some(library) = libraries.get(kernel.file) {
            return Ok(library.clone());
        }
        let source = source::file(kernel.file)
            .ok_or(Error::MissingKernel { file: kernel.file, kernel: kernel.name })?;
        let path = self.compiler.build(source)?;
        // SAFETY: compiled from our own sources; its initialisers fill the table of entries.
        let library = unsafe { Library::new(&path) };
        let library =
            Arc::new(library.map_err(|error| file_error(&path, std::io::Error::other(error.to_string())))?);
        libraries.insert(kernel.file, library.clone());
        Ok(library)
    }
}

/// The machine that is stood in for: an AGX Orin in MAXN, so that tiles and grids are chosen as there. (Its memory is
/// the host's, and never asked for in earnest.)
fn orin() -> Properties {
    Properties {
        name: "SIMT stand-in".into(),
        sm: 87,
        multiprocessors: 16,
        clock_khz: 1_300_500,
        shared_per_block: 163 * 1024,
        shared_per_multiprocessor: 164 * 1024,
        l2: 4 << 20,
        integrated: true,
        memory: 64 << 30,
        driver: 0,
    }
}

fn find_compiler() -> Result<(String, String), String> {
    let asked = std::env::var("CXX").ok().filter(|name| !name.is_empty());
    let names: Vec<String> = asked.into_iter().chain(["c++", "g++", "clang++"].map(String::from)).collect();
    for name in &names {
        if let Ok(output) = Command::new(name).arg("--version").output()
            && output.status.success()
        {
            let text = String::from_utf8_lossy(&output.stdout);
            return Ok((name.clone(), text.lines().next().unwrap_or_default().to_string()));
        }
    }
    Err(format!("there is no C++ compiler (tried {})", names.join(", ")))
}

fn foreign_mark() -> Error {
    Error::Shape { operation: "elapsed time", what: "a mark of another device".into() }
}

pub(crate) fn file_error(path: &Path, source: std::io::Error) -> Error {
    Error::File { path: path.to_path_buf(), source }
}

impl Compiler {
    /// The compiler of this machine, and where its libraries are kept.
    pub(crate) fn find() -> Result<Compiler, String> {
        let sanitize = std::env::var_os("FINETUNED_SIMT_SANITIZE").is_some_and(|value| value == "1");
        let directory = std::env::current_exe()
            .ok()
            .and_then(|program| Some(program.parent()?.join("simt")))
            .unwrap_or_else(|| std::env::temp_dir().join("finetuned-simt"));
        let (program, version) = find_compiler()?;
        Ok(Compiler { program, version, directory, sanitize })
    }

    fn flags(&self) -> impl Iterator<Item = &'static str> {
        // clang++ needs to be told to use the shared runtime, g++ does by itself and does not know the option.
        let clang = self.version.contains("clang");
        let sanitize = SANITIZE.iter().filter(move |flag| clang || **flag != "-shared-libasan");
        // The sanitizers' checks cost the compiler more than they gain from its second level.
        let optimise = if self.sanitize { "-O1" } else { "-O2" };
        FLAGS
            .iter()
            .chain(sanitize.take(if self.sanitize { usize::MAX } else { 0 }))
            .copied()
            .chain([optimise])
    }

    /// Where libraries are kept.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The library of a source, compiled if it is not there.
    pub(crate) fn build(&self, source: &Source) -> Result<PathBuf, Error> {
        let mut hash = Sha256::new();
        hash.update(source.hash());
        HOST_HEADERS.iter().for_each(|header| hash.update(header.text));
        self.flags().for_each(|flag| hash.update(flag));
        hash.update(&self.version);
        let hash: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let directory = self.directory.join(format!("{}-{hash}", source.stem()));
        let library = directory.join("kernels.so");
        let building = building(&directory);
        let _alone = lock(&building);
        if library.exists() {
            return Ok(library);
        }
        // Another process may be compiling the same: everything is written under a name of its own and renamed.
        for (part, sources) in
            [("kernels", HEADERS), ("kernels", std::slice::from_ref(source)), ("simt", HOST_HEADERS)]
        {
            let directory = directory.join(part);
            std::fs::create_dir_all(&directory).map_err(|error| file_error(&directory, error))?;
            for source in sources {
                write_whole(&directory.join(source.name), source.text.as_bytes())?;
            }
        }
        let half_done = directory.join(format!("kernels.{}.so", unique()));
        let output = Command::new(&self.program)
            .args(self.flags())
            .arg("-I")
            .arg(directory.join("simt"))
            .arg("-I")
            .arg(directory.join("kernels"))
            .args(["-x", "c++"])
            .arg(directory.join("kernels").join(source.name))
            .arg("-o")
            .arg(&half_done)
            .output()
            .map_err(|error| file_error(Path::new(&self.program), error))?;
        if !output.status.success() {
            let log = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(Error::Fault { kernel: "stand-in", shape: String::new(), fault: log });
        }
        std::fs::rename(&half_done, &library).map_err(|error| file_error(&library, error))?;
        Ok(library)
    }
}

/// Held by the test that compiles what goes into a directory, so that the others wait for it.
fn building(directory: &Path) -> Arc<Mutex<()>> {
    static ALL: Mutex<BTreeMap<PathBuf, Arc<Mutex<()>>>> = Mutex::new(BTreeMap::new());
    lock(&ALL).entry(directory.to_path_buf()).or_default().clone()
}

pub(crate) fn unique() -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let half_done = path.with_extension(unique());
    std::fs::write(&half_done, bytes)
        .and_then(|()| std::fs::rename(&half_done, path))
        .map_err(|error| file_error(path, error))
}

/// An argument as the kernel's parameter: its bytes, and its region.
enum Passed<'a> {
    Word([u8; 8], Option<usize>),
    Bytes(&'a [u8]),
}

impl Simt {
    fn fault(launch: &Launch<'_>, fault: impl Into<String>) -> Error {
        Error::Fault { kernel: launch.kernel.name, shape: launch.shape(), fault: fault.into() }
    }

    /// Fails when the arguments are not those that the kernel declares.
    fn check(launch: &Launch<'_>, parameters: &[Parameter]) -> Result<(), Error> {
        let given = launch.arguments.len();
        if given != parameters.len() {
            return Err(Self::fault(
                launch,
                format!("{given} arguments for {} parameters", parameters.len()),
            ));
        }
        for (i, (argument, parameter)) in launch.arguments.iter().zip(parameters).enumerate() {
            let fits = match argument {
                Argument::In(..) => parameter.pointer == 1,
                Argument::Out(..) => parameter.pointer == 2,
                Argument::Null => parameter.pointer != 0,
                Argument::U32(_) | Argument::I32(_) | Argument::F32(_) => {
                    parameter.pointer == 0 && parameter.bytes == 4
                }
                Argument::U64(_) | Argument::F64(_) => parameter.pointer == 0 && parameter.bytes == 8,
                Argument::Struct(bytes) => parameter.pointer == 0 && parameter.bytes as usize == bytes.len(),
            };
            if !fits {
                let kind = ["a value", "an input", "an output"][parameter.pointer.min(2) as usize];
                let what = format!(
                    "argument {i} is {argument:?}, the parameter {kind} of {} bytes",
                    parameter.bytes
                );
                return Err(Self::fault(launch, what));
            }
        }
        Ok(())
    }

    /// Buffers of the launch; those of the arguments first, in order.
    fn regions(launch: &Launch<'_>) -> Result<Vec<Region>, Error> {
        let mut regions = Vec::new();
        for argument in launch.arguments.iter().chain(launch.within) {
            let (address, bytes, writable) = match argument {
                Argument::In(address, bytes) => (address.0, *bytes, 0),
                Argument::Out(address, bytes) => (address.0, *bytes, 1),
                _ => continue,
            };
            regions.push(Region { begin: address, end: address + bytes, writable, padding: 0 });
        }
        let overlap = |a: &Region, b: &Region| a.begin < b.end && b.begin < a.end;
        for input in regions.iter().filter(|region| region.writable == 0) {
            if regions.iter().any(|other| other.writable == 1 && overlap(input, other)) {
                return Err(Self::fault(
                    launch,
                    "an input overlaps an output: it is read through the read-only path",
                ));
            }
        }
        Ok(regions)
    }

    fn passed<'a>(launch: &Launch<'a>) -> Vec<Passed<'a>> {
        let mut region = 0;
        let word = |bytes: &[u8], region| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            Passed::Word(word, region)
        };
        launch
            .arguments
            .iter()
            .map(|argument| match argument {
                Argument::In(address, _) | Argument::Out(address, _) => {
                    region += 1;
                    word(&address.0.to_ne_bytes(), Some(region - 1))
                }
                Argument::Null => word(&0u64.to_ne_bytes(), None),
                Argument::U32(value) => word(&value.to_ne_bytes(), None),
                Argument::I32(value) => word(&value.to_ne_bytes(), None),
                Argument::U64(value) => word(&value.to_ne_bytes(), None),
                Argument::F32(value) => word(&value.to_ne_bytes(), None),
                Argument::F64(value) => word(&value.to_ne_bytes(), None),
                Argument::Struct(bytes) => Passed::Bytes(bytes),
            })
            .collect()
    }
}

impl Launcher for Simt {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: u64) -> Result<Address, Error> {
        let layout = Layout::from_size_align(bytes.max(1) as usize, 256).map_err(|_| Error::Memory {
            wanted: bytes,
            available: isize::MAX as u64,
            kept: 0,
        })?;
        // SAFETY: the size is not 0.
        let memory = unsafe { std::alloc::alloc(layout) };
        if memory.is_null() {
            return Err(Error::Memory { wanted: bytes, available: 0, kept: 0 });
        }
        // Nobody may count on what is in fresh memory.
        // SAFETY: allocated with this size.
        unsafe { memory.write_bytes(0xff, layout.size()) };
        lock(&self.allocations).insert(memory as u64, layout);
        Ok(Address(memory as u64))
    }

    unsafe fn free(&self, address: Address) {
        if let Some(layout) = lock(&self.allocations).remove(&address.0) {
            // SAFETY: it came from `allocate` with this layout.
            unsafe { std::alloc::dealloc(address.0 as *mut u8, layout) }
        }
    }

    unsafe fn copy_in(&self, to: Address, from: &[u8]) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { (to.0 as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    unsafe fn copy_out(&self, from: Address, to: &mut [u8]) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from.0 as *const u8, to.len()) };
        Ok(())
    }

    unsafe fn copy(&self, to: Address, from: Address, bytes: u64) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { (to.0 as *mut u8).copy_from_nonoverlapping(from.0 as *const u8, bytes as usize) };
        Ok(())
    }

    unsafe fn fill(&self, at: Address, byte: u8, bytes: u64) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { (at.0 as *mut u8).write_bytes(byte, bytes as usize) };
        Ok(())
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        let kernel = launch.kernel;
        if launch.grid.contains(&0) {
            return Err(Self::fault(launch, "a grid without blocks"));
        }
        if launch.shared > kernel.dynamic_shared {
            return Err(Self::fault(
                launch,
                format!("the table allows {} bytes of dynamic shared memory", kernel.dynamic_shared),
            ));
        }
        let library = self.library(kernel)?;
        let missing = |_| Error::MissingKernel { file: kernel.file, kernel: kernel.name };
        // SAFETY: the types are those of simt.h, which the library was compiled with.
        let entry: Symbol<'_, *const Entry> =
            unsafe { library.get(format!("simt_entry_{}", kernel.name)) }.map_err(missing)?;
        // SAFETY: as above.
        let run: Symbol<'_, Run> = unsafe { library.get("simt_run_entry") }.map_err(missing)?;
        // SAFETY: an Entry lives as long as its library, and has `count` parameters.
        let parameters =
            unsafe { std::slice::from_raw_parts((**entry).parameters, (**entry).count as usize) };
        Self::check(launch, parameters)?;
        let regions = Self::regions(launch)?;
        let passed = Self::passed(launch);
        let arguments: Vec<*const c_void> = passed
            .iter()
            .map(|passed| match passed {
                Passed::Word(word, _) => word.as_ptr().cast(),
                Passed::Bytes(bytes) => bytes.as_ptr().cast(),
            })
            .collect();
        let argument_regions: Vec<i32> = passed
            .iter()
            .map(|passed| match passed {
                Passed::Word(_, Some(region)) => *region as i32,
                _ => -1,
            })
            .collect();
        let settings = *lock(&self.settings);
        let (order, seed) = match settings.order {
            Order::Ascending => (0, 0),
            Order::Descending => (1, 0),
            Order::Shuffled(seed) => (2, seed),
        };
        let config = Config {
            grid: launch.grid,
            threads: kernel.threads,
            dynamic_shared: launch.shared,
            order,
            count: settings.count.into(),
            seed,
            regions: regions.as_ptr(),
            region_count: regions.len() as u32,
            argument_count: arguments.len() as u32,
            arguments: arguments.as_ptr(),
            argument_regions: argument_regions.as_ptr(),
        };
        let mut report = Report { counters: Counters::default(), fault: [0; 1000] };
        // SAFETY: everything it points to lives until it returns; the arguments have the types of the parameters.
        if unsafe { run(*entry, &config, &mut report) } != 0 {
            // SAFETY: a text with its terminating zero.
            let fault = unsafe { CStr::from_ptr(report.fault.as_ptr()) };
            return Err(Self::fault(launch, fault.to_string_lossy()));
        }
        lock(&self.counters).entry(kernel.name).or_default().add(&report.counters);
        Ok(())
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }

    fn mark(&self) -> Result<Mark, Error> {
        Ok(Mark::Moment(Instant::now()))
    }

    fn elapsed(&self, from: Mark, to: Mark) -> Result<f64, Error> {
        match (from, to) {
            (Mark::Moment(from), Mark::Moment(to)) => Ok(to.saturating_duration_since(from).as_secs_f64()),
            _ => Err(foreign_mark()),
        }
    }

    fn free_memory(&self) -> Result<u64, Error> {
        Ok(u64::MAX)
    }
}

/// The environment of a process whose stand-in runs under the address and undefined-behaviour sanitizers: a test starts
/// itself once more with it. [`sanitized`] says whether this is that process.
///
/// # Errors
/// When the compiler has no runtime for them.
pub fn sanitizer_environment() -> Result<Vec<(&'static str, String)>, String> {
    let library = |name: &str| {
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let output =
            std::process::Command::new(compiler).arg(format!("-print-file-name={name}")).output().ok()?;
        let path = String::from_utf8(output.stdout).ok()?.trim().to_string();
        // A name that comes back as it went in was not found.
        (path.contains('/') && std::path::Path::new(&path).exists()).then_some(path)
    };
    let (Some(address), Some(undefined)) = (library("libasan.so"), library("libubsan.so")) else {
        return Err("the compiler has no libasan.so and libubsan.so".into());
    };
    Ok(vec![
        ("FINETUNED_SIMT_SANITIZE", "1".into()),
        ("LD_PRELOAD", format!("{address} {undefined}")),
        // Rust's runtime and the fibers' stacks are none of the leak checker's business.
        ("ASAN_OPTIONS", "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=0".into()),
        ("UBSAN_OPTIONS", "print_stacktrace=1:halt_on_error=1".into()),
    ])
}

/// Whether the kernels of this process run under the sanitizers.
pub fn sanitized() -> bool {
    std::env::var_os("FINETUNED_SIMT_SANITIZE").is_some()
}
