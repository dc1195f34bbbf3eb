//! The program over the stand-in for the driver.

use crate::fixture::{Bits, checkpoints, shared};
use finetuned_cuda::libcuda::Libcuda;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_finetuned");

/// A run of a second or two: every kernel of a step is launched, dropout and packing are on.
pub const SHORT: [&str; 7] = [
    "train.backend=cuda",
    "data.sequence_length=144",
    "train.max_steps=3",
    "train.micro_batch_size=1",
    "train.gradient_accumulation_steps=1",
    "train.evaluate_every=0",
    "train.checkpoint_every=1",
];

/// The stand-in; without a C++ compiler it says that it is skipped.
pub fn stand_in() -> Option<&'static Libcuda> {
    static BUILT: OnceLock<Option<Libcuda>> = OnceLock::new();
    let build = || match Libcuda::build() {
        Ok(built) => Some(built),
        Err(why) => {
            let required = std::env::var("FINETUNED_REQUIRE")
                .is_ok_and(|list| list.split(',').any(|name| name == "simt"));
            assert!(!required, "{why}");
            eprintln!("SKIPPED: runs with backend = \"cuda\": {why}");
            None
        }
    };
    BUILT.get_or_init(build).as_ref()
}

/// Puts the cubins where the program looks for those that it has compiled.
pub fn give_cubins(stand_in: &Libcuda, cache: &Path) {
    let kernels = cache.join("kernels");
    std::fs::create_dir_all(&kernels).unwrap();
    for entry in std::fs::read_dir(stand_in.cubins()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, kernels.join(path.file_name().unwrap())).unwrap();
    }
}

/// The cache of all runs in the foreground.
fn cache(stand_in: &Libcuda) -> &'static Path {
    static CACHE: OnceLock<PathBuf> = OnceLock::new();
    CACHE.get_or_init(|| {
        let cache = shared().path("cache-of-cuda");
        give_cubins(stand_in, &cache);
        cache
    })
}

/// What the program said, and the calls of the driver that it made: name, kernel or bytes, code.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
    pub calls: Vec<(String, String, i32)>,
}

impl Said {
    /// How often a function was called.
    pub fn count(&self, function: &str) -> usize {
        self.calls.iter().filter(|(name, ..)| name.trim_end_matches("_v2") == function).count()
    }

    /// Its messages, after it ended with this code.
    #[track_caller]
    pub fn refusal(&self, code: i32) -> &str {
        assert_eq!(self.code, Some(code), "{}\n{}", self.out, self.err);
        assert!(self.err.starts_with("error: ") && !self.err.contains("panicked"), "{}", self.err);
        &self.err
    }
}

/// Calls the program.
pub fn call(stand_in: &Libcuda, arguments: &[&str], environment: &[(&str, &str)]) -> Said {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let mut command = Command::new(PROGRAM);
    stand_in.put_before(&mut command).args(arguments).current_dir(shared().path(""));
    command.env("FINETUNED_CACHE_DIR", cache(stand_in)).env("FINETUNED_LIBCUDA_LOG", &log);
    command.env_remove("FINETUNED_LOG").env_remove("FINETUNED_CUDA_SYNC").envs(environment.iter().copied());
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let call = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let last = words.len() - 1;
        (words[1].to_string(), words[2..last].join(" "), words[last].parse().unwrap())
    };
    let calls = std::fs::read_to_string(&log).unwrap_or_default().lines().map(call).collect();
    Said { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr), calls }
}

/// Trains in `output`; begins where there is nothing and goes on where there is.
pub fn train(stand_in: &Libcuda, output: &Path, more: &[&str], environment: &[(&str, &str)]) -> Said {
    let mut arguments = vec!["run", "spec.toml", "--resume", "--output", output.to_str().unwrap()];
    for key in SHORT.iter().chain(more) {
        arguments.extend(["--set", key]);
    }
    call(stand_in, &arguments, environment)
}

/// A run in which nothing fails: its bits, and how it went.
pub fn undisturbed(stand_in: &Libcuda) -> &'static (Bits, Said) {
    static UNDISTURBED: OnceLock<(Bits, Said)> = OnceLock::new();
    UNDISTURBED.get_or_init(|| {
        let output = shared().output();
        let said = train(stand_in, output.path(), &[], &[]);
        assert_eq!(said.code, Some(0), "{}\n{}", said.out, said.err);
        (Bits::of(output.path()), said)
    })
}

/// Nothing was published: no adapter, no half-written file, and no checkpoint but those that were announced.
#[track_caller]
pub fn assert_nothing_published(output: &Path, announced: usize) {
    assert!(!output.join("adapter").exists(), "an adapter");
    assert!(!output.join("summary.json").exists(), "a summary");
    assert_eq!(checkpoints(output).len(), announced, "checkpoints");
}
