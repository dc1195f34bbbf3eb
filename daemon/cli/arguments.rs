//! Arguments that several commands share.

use super::exit::{Exit, Failure};
use crate::config::spec::Spec;
use clap::Args;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// A spec with overrides.
#[derive(Args, Clone, Debug)]
pub struct SpecArguments {
    /// The run's spec, a TOML file (docs/spec.md)
    #[arg(value_name = "SPEC")]
    pub path: PathBuf,
    /// Override a key of the spec, such as train.max_steps=10; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

impl SpecArguments {
    /// Reads the spec.
    pub fn load(&self) -> Result<Spec, Failure> {
        let failure = |error| Failure::from(error);
        let spec = Spec::load(&self.path, &self.set).map_err(failure)?;
        tracing::debug!(spec = %spec.to_toml(), "resolved");
        Ok(spec)
    }

    /// The arguments that name the same spec again.
    pub fn again(&self) -> Vec<OsString> {
        let set = self.set.iter().flat_map(|set| ["--set".into(), set.into()]);
        std::iter::once(self.path.clone().into()).chain(set).collect()
    }
}

/// How many threads compute.
#[derive(Args, Clone, Copy, Debug)]
pub struct ThreadArguments {
    /// Threads to compute with [default: one per core]; does not change the result
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

impl ThreadArguments {
    /// Sets up the pool. Call it before anything computes.
    pub fn apply(self) -> Result<(), Failure> {
        let Some(threads) = self.threads else { return Ok(()) };
        rayon::ThreadPoolBuilder::new().num_threads(threads.into()).build_global().map_err(|error| {
            Failure::new(anyhow::Error::from(error).context(format!("cannot start {threads} threads")))
        })
    }

    /// The arguments that ask for the same again.
    pub fn again(self) -> Vec<OsString> {
        self.threads.into_iter().flat_map(|n| ["--threads".into(), n.to_string().into()]).collect()
    }
}

/// Where quantised bases and tokens are kept: `$FINETUNED_CACHE_DIR`, else `$XDG_CACHE_HOME/finetuned`, else
/// `~/.cache/finetuned`. Everything in it can be deleted; it will be made again.
pub fn cache_dir() -> Result<PathBuf, Failure> {
    cache_dir_from(|name| std::env::var_os(name)).ok_or_else(|| {
        Failure::new(anyhow::anyhow!("there is no home directory to keep the cache in"))
            .exit(Exit::Usage)
            .help("set FINETUNED_CACHE_DIR")
    })
}

fn cache_dir_from(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let path = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    // The XDG base directory specification: a relative path is to be ignored.
    let absolute = |name: &str| path(name).filter(|path| path.is_absolute());
    path("FINETUNED_CACHE_DIR")
        .or_else(|| absolute("XDG_CACHE_HOME").map(|dir| dir.join("finetuned")))
        .or_else(|| absolute("HOME").map(|dir| dir.join(".cache/finetuned")))
}

/// A run's name as the name of a directory: a run may be called `2026/night`, its directory may not.
pub fn directory_name(run: &str) -> String {
    let name = run.replace('/', "-");
    match name.strip_prefix('.') {
        Some(rest) => format!("-{rest}"),
        None => name,
    }
}

/// A command line as a person would type it into a shell.
pub fn command_line<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>) -> String {
    words.into_iter().map(|word| quoted(word.as_ref())).collect::<Vec<_>>().join(" ")
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "-_./=+:,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.into_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The program as it was called.
pub fn program() -> OsString {
    std::env::args_os().next().unwrap_or_else(|| "finetuned".into())
}

/// A path as it reads best: relative to the working directory where it lies below it.
pub fn shown(path: &Path) -> String {
    let here = std::env::current_dir().ok();
    let below = here.and_then(|here| path.strip_prefix(here).map(Path::to_path_buf).ok());
    match below {
        Some(below) if !below.as_os_str().is_empty() => below.display().to_string(),
        _ => path.display().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_where_the_environment_says() {
        let dir = |set: &[(&str, &str)]| {
            cache_dir_from(|name| set.iter().find(|(n, _)| *n == name).map(|(_, v)| v.into()))
                .map(|path| path.display().to_string())
        };
        let all = [("FINETUNED_CACHE_DIR", "mine"), ("XDG_CACHE_HOME", "/xdg"), ("HOME", "/home/a")];
        assert_eq!(dir(&all).as_deref(), Some("mine"));
        assert_eq!(dir(&all[1..]).as_deref(), Some("/xdg/finetuned"));
        assert_eq!(dir(&all[2..]).as_deref(), Some("/home/a/.cache/finetuned"));
        assert_eq!(dir(&[("XDG_CACHE_HOME", "xdg"), ("HOME", "/a")]).as_deref(), Some("/a/.cache/finetuned"));
        assert_eq!(
            dir(&[("FINETUNED_CACHE_DIR", ""), ("HOME", "/a")]).as_deref(),
            Some("/a/.cache/finetuned")
        );
        assert_eq!(dir(&[]), None);
    }

    #[test]
    fn a_run_name_stays_in_its_directory() {
        assert_eq!(directory_name("night"), "night");
        assert_eq!(directory_name("2026/night"), "2026-night");
        assert_eq!(directory_name(".."), "-.");
        assert_eq!(directory_name("../../etc"), "-.-..-etc");
    }

    #[test]
    fn command_lines_survive_a_shell() {
        assert_eq!(command_line(["finetuned", "run", "a.toml"]), "finetuned run a.toml");
        assert_eq!(command_line(["a b", "it's", "", "x=[1]"]), r"'a b' 'it'\''s' '' 'x=[1]'");
    }
}
