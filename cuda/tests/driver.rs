//! The driver's launcher, over the stand-in for `libcuda.so.1`: the same bits as the stand-in for the GPU, and every way in
//! which CUDA can fail. A library is loaded once in a process and a lost context stays lost, so every case is a process of
//! its own: this binary again, with only the test `child`.

use finetuned_cuda::cubins::Cubins;
use finetuned_cuda::driver::{self, Driver};
use finetuned_cuda::kernels;
use finetuned_cuda::launcher::{Argument, Launch, Launcher};
use finetuned_cuda::libcuda::{self, Libcuda};
use finetuned_cuda::ops::{adamw, elementwise, nf4, rms_norm, swiglu};
use finetuned_cuda::simt::Simt;
use finetuned_cuda::source::FILES;
use finetuned_cuda::{Buffer, Device, Error};
use half::bf16;
use sha2::{Digest, Sha256};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Which part the child plays.
const PART: &str = "FINETUNED_TEST_PART";
/// Where it finds its cubins.
const CUBINS: &str = "FINETUNED_TEST_CUBINS";
/// The longest that a child may take: what does not end by then hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// The codes after which CUDA wants the process to end.
const STICKY: [u32; 10] = [700, 702, 709, 710, 714, 715, 716, 717, 718, 719];

// ── The child ──

#[test]
fn child() {
    let Ok(part) = std::env::var(PART) else { return };
    let open = || Driver::open(0, &Cubins::new(vec![std::env::var_os(CUBINS).unwrap().into()], None, None));
    match &part[..] {
        "work" => match open() {
            Ok(driver) => {
                at_work(&driver);
                drop(driver);
            }
            Err(error) => say("open", Err::<(), _>(error)),
        },
        "properties" => match driver::properties(0) {
            Ok(properties) => println!("# {properties:?}"),
            Err(error) => say("properties", Err::<(), _>(error)),
        },
        "time" => time(&open().unwrap()),
        "bandwidth" => say("bandwidth", driver::memory_bandwidth(0)),
        "beyond" | "freed" | "misaligned" => break_out(&part, &open().unwrap()),
        other => panic!("{other}"),
    }
    println!("# ended");
}

/// Works, and after a failure tries everything once more.
fn at_work(driver: &Arc<Driver>) {
    let device = Device::new(driver.clone());
    let mut kept = Buffer::<f32>::from_slice(&device, &[1.0; 300]);
    let worked = work(&device);
    let failed = worked.is_err();
    say("work", worked);
    if !failed {
        return;
    }
    if let Ok(kept) = &mut kept {
        say("launch", elementwise::scale(300, 2.0, kept));
        say("write", kept.write(&[2.0]));
        say("read", kept.read(1).map(|_| ()));
        say("fill", kept.fill(0));
    }
    say("allocate", Buffer::<f32>::new(&device, 5).map(|_| ()));
    say("synchronize", device.synchronize());
}

/// A launch between two marks.
fn time(driver: &Arc<Driver>) {
    let device = Device::new(driver.clone());
    let mut x = Buffer::<f32>::from_slice(&device, &[1.0; 300]).unwrap();
    let mut timed = || {
        let from = device.mark()?;
        elementwise::scale(300, 2.0, &mut x)?;
        let to = device.mark()?;
        device.elapsed(from, to)
    };
    say("time", timed().map(|seconds| seconds > 0.0 && seconds < 60.0));
}

fn say(what: &str, outcome: Result<impl std::fmt::Debug, Error>) {
    match outcome {
        Ok(value) => println!("# {what}: fine {value:?}"),
        Err(error) => println!(
            "# {what}: sticky={} memory={} {error}",
            u8::from(error.is_sticky()),
            u8::from(error.is_out_of_memory())
        ),
    }
}

/// A few operations: pointers, values, structures, pointers in structures, copies on the device. Returns a hash of what
/// they left.
fn work(device: &Device) -> Result<String, Error> {
    let (rows, cols) = (5, 72);
    let len = rows * cols;
    let values = |seed: usize| -> Vec<f32> {
        (0..len).map(|i| ((i * 37 + seed * 11) % 101) as f32 / 25.0 - 2.0).collect()
    };
    let narrow = |seed| values(seed).into_iter().map(bf16::from_f32).collect::<Vec<bf16>>();
    let mut hash = Sha256::new();

    let x = Buffer::from_slice(device, &narrow(1))?;
    let weight = Buffer::from_slice(device, &values(2)[..cols])?;
    let mut y = Buffer::<bf16>::new(device, len)?;
    rms_norm::rms_norm(rms_norm::Shape { rows, cols, epsilon: 1e-5 }, &x, &weight, &mut y)?;
    let mut out = Buffer::<bf16>::new(device, 2 * len)?;
    out.fill(0)?;
    swiglu::swiglu(len, &x, &y, &mut out)?;
    out.copy_from(&y, len, len)?;
    hash.update(bytemuck::cast_slice::<bf16, u8>(&out.read(2 * len)?));

    let wide = Buffer::from_slice(device, &values(3))?;
    let mut codes = Buffer::<u8>::new(device, len / 2)?;
    let mut absmax = Buffer::<f32>::new(device, len.div_ceil(nf4::BLOCK))?;
    nf4::quantize(len, &wide, &mut codes, &mut absmax)?;
    nf4::dequantize(len, nf4::BLOCK, &codes, &nf4::Absmax::Plain(absmax), &mut y)?;
    hash.update(bytemuck::cast_slice::<bf16, u8>(&y.read(len)?));

    let zeros = || Buffer::from_slice(device, &vec![0.0f32; len]);
    let mut parameters = adamw::Parameters { value: zeros()?, working: y, m: zeros()?, v: zeros()? };
    let mut partial = Buffer::<f64>::new(device, adamw::PARTIALS)?;
    let mut norm = Buffer::<f64>::new(device, 1)?;
    let step = adamw::Step {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.01,
        step: 1,
        scale: 0.5,
        max_norm: 1.0,
    };
    adamw::adamw(step, len, &wide, &mut parameters, &mut partial, &mut norm)?;
    hash.update(bytemuck::cast_slice::<f32, u8>(&parameters.value.read(len)?));
    hash.update(norm.read(1)?[0].to_le_bytes());
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Launches that no operation would make.
fn break_out(part: &str, driver: &Arc<Driver>) {
    let device = Device::new(driver.clone());
    let x = Buffer::<f32>::from_slice(&device, &[1.0; 256]).unwrap();
    let (mut at, mut count) = (x.address(), 256);
    match part {
        "beyond" => count = 4096,
        "misaligned" => at.0 += 4,
        _ => drop(x),
    }
    let arguments = [Argument::Out(at, 0), Argument::F32(2.0), Argument::U64(count)];
    let kernel = &kernels::scale_f32;
    let launch = Launch { kernel, grid: [4, 1, 1], shared: 0, arguments: &arguments, within: &[] };
    // SAFETY: there is none; the stand-in looks at every access before it is made.
    say("launch", unsafe { driver.launch(&launch) });
    say("synchronize", device.synchronize());
}

// ── Starting it ──

/// The stand-in; without a compiler it says that it is skipped.
fn stand_in() -> Option<&'static Libcuda> {
    static BUILT: OnceLock<Option<Libcuda>> = OnceLock::new();
    let build = || match Libcuda::build() {
        Ok(built) => Some(built),
        Err(why) => {
            let required = std::env::var("FINETUNED_REQUIRE")
                .is_ok_and(|list| list.split(',').any(|name| name == "simt"));
            assert!(!required, "{why}");
            eprintln!("SKIPPED: the driver's launcher is not tested: {why}");
            None
        }
    };
    BUILT.get_or_init(build).as_ref()
}

/// What a child said, and the calls that it made, each as (function, detail, code).
struct Said {
    lines: Vec<String>,
    calls: Vec<(String, String, i32)>,
    error: String,
}

impl Said {
    /// The line that begins with this.
    #[track_caller]
    fn of(&self, what: &str) -> &str {
        let start = format!("{what}: ");
        self.lines
            .iter()
            .find_map(|line| line.strip_prefix(&start))
            .unwrap_or_else(|| panic!("nothing of {what} in {:?}\n{}", self.lines, self.error))
    }
}

/// Runs a part in a process of its own, which must end by itself and well, whatever fails in it.
fn run(stand_in: &Libcuda, part: &str, environment: &[(&str, &str)]) -> Said {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    stand_in.put_before(&mut command).env_remove("FINETUNED_CUDA_SYNC");
    command.env(PART, part).env(CUBINS, stand_in.cubins()).env("FINETUNED_LIBCUDA_LOG", &log);
    command.envs(environment.iter().copied());
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{part} hangs with {environment:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{part} with {environment:?}: {}\n{text}\n{error}", output.status);
    let lines: Vec<String> = text.lines().filter_map(|line| Some(line.split_once("# ")?.1.into())).collect();
    assert_eq!(lines.last().map(|line| &line[..]), Some("ended"), "{text}");
    let calls = std::fs::read_to_string(&log)
        .unwrap_or_default()
        .lines()
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            let code = words.last().unwrap().parse().unwrap();
            (words[1].to_string(), words[2..words.len() - 1].join(" "), code)
        })
        .collect();
    Said { lines, calls, error }
}

/// Does something with every item, on all processors.
fn for_all<T: Sync>(items: &[T], work: impl Fn(&T) + Sync) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    work(item);
                }
            });
        }
    });
}

/// What the work leaves on the stand-in for the GPU, as a child says it.
fn expected() -> String {
    format!("fine {:?}", work(&Simt::new().unwrap().device()).unwrap())
}

// ── What goes well ──

#[test]
fn the_driver_gives_the_bits_of_the_stand_in_and_gives_everything_back() {
    let Some(stand_in) = stand_in() else { return };
    let settings: [&[(&str, &str)]; 5] = [
        &[],
        &[("FINETUNED_CUDA_SYNC", "1")],
        &[("FINETUNED_LIBCUDA_DEVICE", "depth=0")],
        &[("FINETUNED_LIBCUDA_DEVICE", "sm=90,multiprocessors=132,integrated=0")],
        &[("FINETUNED_LIBCUDA_DEVICE", "sm=80,depth=2")],
    ];
    for environment in settings {
        let said = run(stand_in, "work", environment);
        assert_eq!(said.of("work"), expected(), "{environment:?}");
        let (name, detail, _) = said.calls.last().unwrap();
        assert_eq!(
            (&name[..], &detail[..]),
            ("cuDevicePrimaryCtxRelease_v2", "allocations=0 modules=0 streams=0")
        );
        let failed: Vec<_> = said.calls.iter().filter(|(_, _, code)| *code != 0).collect();
        assert!(failed.is_empty(), "{failed:?}");
    }
}

/// With the cubins of the compiler, where it is: what `cuModuleLoadData` is given then are the files of a Jetson.
#[test]
fn the_cubins_of_the_compiler_are_loaded_as_well() {
    let Some(stand_in) = stand_in() else { return };
    let directory = tempfile::tempdir().unwrap();
    let cubins = Cubins::new(Vec::new(), Some(directory.path().into()), None);
    if let Err(error) = cubins.compiler() {
        let required =
            std::env::var("FINETUNED_REQUIRE").is_ok_and(|list| list.split(',').any(|name| name == "nvrtc"));
        assert!(!required, "{error}");
        eprintln!("SKIPPED: the cubins of the compiler are not loaded: {error}");
        return;
    }
    // The compiler is slow: the files that the work takes kernels of, and for the others what the stand-in has.
    let used = ["adamw", "elementwise", "nf4", "rms_norm", "swiglu"];
    for source in FILES.iter().filter(|source| used.contains(&source.stem())) {
        assert!(cubins.find(source, 87).unwrap().compiler.starts_with("nvrtc"));
    }
    for entry in std::fs::read_dir(stand_in.cubins()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !used.iter().any(|used| name.starts_with(&format!("{used}-"))) {
            std::fs::copy(&path, directory.path().join(name)).unwrap();
        }
    }
    let said = run(stand_in, "work", &[(CUBINS, directory.path().to_str().unwrap())]);
    assert_eq!(said.of("work"), expected());
}

#[test]
fn a_device_says_what_it_is() {
    let Some(stand_in) = stand_in() else { return };
    let device = "sm=87,multiprocessors=8,memory=1000000,integrated=1,driver=12060";
    let said = run(stand_in, "properties", &[("FINETUNED_LIBCUDA_DEVICE", device)]);
    let expected = "Properties { name: \"stand-in of sm_87\", sm: 87, multiprocessors: 8, clock_khz: 1300500, \
                    shared_per_block: 166912, shared_per_multiprocessor: 167936, l2: 4194304, integrated: true, memory: \
                    1000000, driver: 12060 }";
    assert_eq!(said.lines[0], expected);
    // No context is made for that: on a Jetson it would take memory.
    assert!(said.calls.iter().all(|(name, _, _)| !name.contains("Ctx")), "{:?}", said.calls);
}

#[test]
fn time_is_taken_by_events_that_are_given_back() {
    let Some(stand_in) = stand_in() else { return };
    let said = run(stand_in, "time", &[]);
    assert_eq!(said.of("time"), "fine true");
    let calls = |name: &str| said.calls.iter().filter(|(of, ..)| of == name).count();
    assert_eq!(["cuEventCreate", "cuEventRecord", "cuEventDestroy_v2"].map(calls), [2, 2, 2]);
    // Both are given back when what is between them fails.
    let said = run(stand_in, "time", &[("FINETUNED_LIBCUDA_FAIL", "999~cuLaunchKernel:1")]);
    assert!(said.of("time").contains("timing, after scale_f32: CUDA error 999"), "{}", said.of("time"));
    let calls = |name: &str| said.calls.iter().filter(|(of, ..)| of == name).count();
    assert_eq!(["cuEventCreate", "cuEventDestroy_v2"].map(calls), [2, 2]);
    // A mark that cannot be made is an error, and leaves none.
    let said = run(stand_in, "time", &[("FINETUNED_LIBCUDA_FAIL", "400@cuEventRecord:1")]);
    assert!(said.of("time").contains("marking a place on the stream"), "{}", said.of("time"));
    let calls = |name: &str| said.calls.iter().filter(|(of, ..)| of == name).count();
    assert_eq!(["cuEventCreate", "cuEventDestroy_v2"].map(calls), [1, 1]);
}

/// 256 bits at twice 3,200 MHz.
#[test]
fn the_bandwidth_is_that_of_the_memorys_clock_and_width() {
    let Some(stand_in) = stand_in() else { return };
    assert_eq!(run(stand_in, "bandwidth", &[]).of("bandwidth"), "fine 204800000000");
}

// ── What is not there ──

#[test]
fn what_is_missing_is_said_in_a_sentence() {
    let Some(stand_in) = stand_in() else { return };
    let cases = [
        ("driver=11040", "the CUDA driver supports 11.4, and 12.2 (JetPack 6) is needed"),
        ("devices=0", "no CUDA device 0: the driver knows 0"),
        ("sm=72", "stand-in of sm_72 has compute capability 7.2, and 8.0 (Ampere) is needed"),
    ];
    for (device, sentence) in cases {
        for part in ["work", "properties"] {
            let said = run(stand_in, part, &[("FINETUNED_LIBCUDA_DEVICE", device)]);
            let what = if part == "work" { "open" } else { part };
            assert_eq!(said.of(what), format!("sticky=0 memory=0 {sentence}"));
        }
    }
}

/// A file that is named for this GPU and was compiled for another.
#[test]
fn a_cubin_of_another_architecture_is_refused_by_the_driver() {
    let Some(stand_in) = stand_in() else { return };
    let directory = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(stand_in.cubins()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.contains("sm_90") {
            std::fs::copy(&path, directory.path().join(name.replace("sm_90", "sm_87"))).unwrap();
        }
    }
    let said = run(stand_in, "work", &[(CUBINS, directory.path().to_str().unwrap())]);
    assert_eq!(
        said.of("open"),
        format!(
            "sticky=0 memory=0 loading {} for sm_87: CUDA error 209 (CUDA_ERROR_NO_BINARY_FOR_GPU): the cubin is not for \
             this GPU or this driver",
            FILES[0].name
        )
    );
}

#[test]
fn a_kernel_that_its_cubin_lacks_is_named() {
    let Some(stand_in) = stand_in() else { return };
    let directory = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(stand_in.cubins()).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let to = directory.path().join(name);
        if name.starts_with("rope-") {
            std::fs::write(to, libcuda::cubin(&[&kernels::rope_8], 87)).unwrap();
        } else {
            std::fs::copy(&path, to).unwrap();
        }
    }
    let said = run(stand_in, "work", &[(CUBINS, directory.path().to_str().unwrap())]);
    assert_eq!(said.of("open"), "sticky=0 memory=0 the cubin of rope.cu has no kernel rope_1");
}

// ── What fails ──

/// Everything that is tried after the context was lost fails with the same code.
#[track_caller]
fn assert_lost(said: &Said, code: u32) {
    for what in ["allocate", "synchronize"] {
        said.of(what);
    }
    let tried = ["launch", "write", "read", "fill", "allocate", "synchronize"];
    for line in said.lines.iter().filter(|line| tried.iter().any(|what| line.starts_with(what))) {
        assert!(
            line.contains("sticky=1 memory=0 ") && line.contains(&format!("CUDA error {code} (")),
            "{line}"
        );
    }
}

/// Every kind of call while the device is opened and every single call of the work fails once, with the sticky codes in
/// turn.
#[test]
fn a_sticky_code_at_any_call_is_the_end() {
    let Some(stand_in) = stand_in() else { return };
    let calls = run(stand_in, "work", &[]).calls;
    let name = |i: usize| calls[i].0.trim_end_matches("_v2");
    let opened = (0..calls.len()).find(|&i| name(i) == "cuMemAlloc").unwrap();
    let read = (0..calls.len())
        .rfind(|&i| name(i) == "cuStreamSynchronize" && name(i - 1) == "cuMemcpyDtoHAsync")
        .unwrap();
    let chosen: Vec<usize> =
        (0..calls.len()).filter(|&i| i >= opened || (0..i).all(|j| name(j) != name(i))).collect();
    assert!(chosen.len() > 60, "{chosen:?}");
    for_all(&chosen, |&i| {
        let code = STICKY[i % STICKY.len()];
        let said = run(stand_in, "work", &[("FINETUNED_LIBCUDA_FAIL", &format!("{code}@{}", i + 1))]);
        let context = format!("{code} at call {} ({}): {:?}", i + 1, name(i), said.lines);
        if i > read {
            // All there was to say had been said; the end must still come.
            assert!(said.of("work").starts_with("fine"), "{context}");
            return;
        }
        let line = said.of(if i < opened { "open" } else { "work" }).to_string();
        // The child begins with a buffer of its own.
        assert!(
            line.starts_with("sticky=1 memory=0 ")
                && line.contains(&format!("CUDA error {code} (CUDA_ERROR_")),
            "{context}"
        );
        if i >= opened {
            assert_lost(&said, code);
        }
        // The kernel that is launched, or else the last before.
        let blamed = (0..=i).rev().find(|&j| name(j) == "cuLaunchKernel");
        if let Some(blamed) = blamed {
            assert!(line.contains(&calls[blamed].1), "{context}");
        }
        // Nothing reaches the device any more.
        let after = said.calls.iter().skip(i + 1).find(|(_, _, code)| *code == 0);
        assert!(i < opened || after.is_none(), "{context}: {after:?}");
    });
}

/// A kernel fails on the device: the launch goes well and somebody later hears of it, who names the kernels that may be
/// to blame; with FINETUNED_CUDA_SYNC=1 it is the right one.
#[test]
fn a_kernel_that_fails_is_reported_by_a_later_call() {
    let Some(stand_in) = stand_in() else { return };
    let launched: Vec<String> = run(stand_in, "work", &[])
        .calls
        .into_iter()
        .filter(|(name, _, _)| name == "cuLaunchKernel")
        .map(|(_, kernel, _)| kernel)
        .collect();
    assert_eq!(
        launched,
        ["rms_norm_8", "swiglu", "nf4_quantize_f32", "nf4_dequantize", "square_sum", "adamw"]
    );
    let cases: Vec<(u32, &str)> =
        STICKY.iter().flat_map(|&code| ["waits", "depth", "sync"].map(|how| (code, how))).collect();
    for_all(&cases, |&(code, how)| {
        let number = code as usize % launched.len();
        let fail = format!("{code}~cuLaunchKernel:{}", number + 1);
        let mut environment = vec![("FINETUNED_LIBCUDA_FAIL", &fail[..])];
        match how {
            "depth" => environment.push(("FINETUNED_LIBCUDA_DEVICE", "depth=0")),
            "sync" => environment.push(("FINETUNED_CUDA_SYNC", "1")),
            _ => {}
        }
        let said = run(stand_in, "work", &environment);
        let line = said.of("work");
        assert!(
            line.starts_with("sticky=1") && line.contains(&format!("CUDA error {code} (")),
            "{how}: {line}"
        );
        assert_lost(&said, code);
        match how {
            // The failed one is the last that was launched.
            "sync" => assert!(line.contains(&format!("{}<<<", launched[number])), "{line}"),
            "depth" => assert!(line.contains(&format!("after {}: ", launched[number])), "{line}"),
            _ => assert!(
                launched[number..].iter().any(|kernel| line.contains(&format!("after {kernel}: "))),
                "{line}"
            ),
        }
    });
}

/// What a kernel does wrong in earnest, and not because it was asked to.
#[test]
fn a_kernel_that_leaves_its_memory_loses_the_context() {
    let Some(stand_in) = stand_in() else { return };
    for (part, code, fault) in [
        ("beyond", 700, "of a buffer of 1024 bytes"),
        ("freed", 700, "which is in no buffer of this launch"),
        ("misaligned", 716, "which is not aligned to that"),
    ] {
        let said = run(stand_in, part, &[]);
        assert!(said.of("launch").starts_with("fine"), "{:?}", said.lines);
        let line = said.of("synchronize");
        assert!(
            line.starts_with(&format!(
                "sticky=1 memory=0 waiting for the device, after scale_f32: CUDA error {code} ("
            )),
            "{line}"
        );
        assert!(
            said.error.contains(fault) && said.error.contains("scale_f32<<<4x1x1, 256, 0>>>"),
            "{}",
            said.error
        );
    }
}

#[test]
fn memory_that_runs_out_is_told_from_the_rest() {
    let Some(stand_in) = stand_in() else { return };
    let calls = run(stand_in, "work", &[]).calls;
    let sizes: Vec<&String> =
        calls.iter().filter(|(name, _, _)| name == "cuMemAlloc_v2").map(|(_, bytes, _)| bytes).collect();
    assert!(sizes.len() > 10, "{calls:?}");
    let failing: Vec<usize> = (1..sizes.len()).collect();
    for_all(&failing, |&i| {
        let said = run(stand_in, "work", &[("FINETUNED_LIBCUDA_FAIL", &format!("2@cuMemAlloc:{}", i + 1))]);
        let line = said.of("work");
        let start = format!("sticky=0 memory=1 taking {} bytes of device memory", sizes[i]);
        assert!(line.starts_with(&start), "{line}");
        assert!(line.ends_with("CUDA error 2 (CUDA_ERROR_OUT_OF_MEMORY): out of memory"), "{line}");
        for what in ["launch", "write", "read", "fill", "allocate", "synchronize"] {
            assert!(said.of(what).starts_with("fine"), "{:?}", said.lines);
        }
    });
    // And without having been asked: the device is too small.
    let said = run(stand_in, "work", &[("FINETUNED_LIBCUDA_DEVICE", "memory=4000")]);
    assert!(said.of("work").starts_with("sticky=0 memory=1 taking "), "{:?}", said.lines);
}

/// 999 says nothing about the context: the call fails, and no more is claimed.
#[test]
fn a_code_that_is_not_sticky_is_not_called_so() {
    let Some(stand_in) = stand_in() else { return };
    let said = run(stand_in, "work", &[("FINETUNED_LIBCUDA_FAIL", "999@cuLaunchKernel:2")]);
    let line = said.of("work");
    assert!(line.starts_with("sticky=0 memory=0 swiglu<<<"), "{line}");
    assert!(line.ends_with("after rms_norm_8: CUDA error 999 (CUDA_ERROR_UNKNOWN)"), "{line}");
    assert!(said.of("synchronize").starts_with("fine"));
}

/// What the tests of whole runs count on: one attempt fails, the next does not.
#[test]
fn a_failure_may_be_asked_for_once() {
    let Some(stand_in) = stand_in() else { return };
    let directory = tempfile::tempdir().unwrap();
    let once = directory.path().join("once");
    let environment = [
        ("FINETUNED_LIBCUDA_FAIL", "719@cuLaunchKernel:2"),
        ("FINETUNED_LIBCUDA_ONCE", once.to_str().unwrap()),
    ];
    assert!(run(stand_in, "work", &environment).of("work").starts_with("sticky=1"));
    assert_eq!(run(stand_in, "work", &environment).of("work"), expected());
}
