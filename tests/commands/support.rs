//! Calls the program and listens to it.

use crate::fixture::Fixture;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The program.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_finetuned");

/// A directory with a tiny model (`model`), data (`train.jsonl`) and a spec (`spec.toml`), and the program in it.
pub struct Bench {
    fixture: Fixture,
}

impl Bench {
    /// A fresh one. The seeds are the same every time.
    pub fn new() -> Bench {
        Bench { fixture: Fixture::new(1, 1) }
    }

    /// A file of it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.fixture.path(name)
    }

    /// The program, called in this directory. No terminal, no settings of whoever runs the tests.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments)
            .current_dir(self.path(""))
            .env("FINETUNED_CACHE_DIR", self.path("cache"))
            .env_remove("FINETUNED_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Calls the program to its end.
    pub fn call(&self, arguments: &[&str]) -> Said {
        Said::of(self.command(arguments).output().unwrap())
    }

    /// Changes a file.
    pub fn change(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.path(name);
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
    }
}

/// What the program said.
#[derive(Debug)]
pub struct Said {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Said {
    /// What a finished process said. Whatever it was given, it must not have panicked.
    pub fn of(output: Output) -> Said {
        let said = Said {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        };
        assert!(!said.err.contains("panicked"), "{said:#?}");
        said
    }

    /// Its output, after a success.
    #[track_caller]
    pub fn success(self) -> String {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self.out
    }

    /// Its output as JSON, after a success.
    #[track_caller]
    pub fn json(self) -> Value {
        serde_json::from_str(&self.success()).unwrap()
    }

    /// Its messages, after it ended with `code`; nothing of them went to standard output.
    #[track_caller]
    pub fn refusal(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert!(self.err.starts_with("error: ") && !self.out.contains("error: "), "{self:#?}");
        self.err
    }
}

/// Asserts that a text holds all of these.
#[track_caller]
pub fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
}

/// Every file below a directory with its content, but for the lock, which tells who was there last.
pub fn tree(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(tree(&path));
        } else if !path.ends_with("lock") {
            let bytes = std::fs::read(&path).unwrap();
            files.push((path, bytes));
        }
    }
    files.sort();
    files
}
