//! Where a cubin comes from: shipped with the package, cached by an earlier start, or compiled now and cached.
//!
//! ```text
//!   shipped directories ──found──► use it
//!        │ not there
//!   cache directory ─────found──► use it
//!        │ not there, or damaged
//!   NVRTC ──► write to the cache (beside its place, fsync, rename) ──► use it
//! ```
//!
//! A file is named by everything it was made from: `rms_norm-0123456789abcdef-sm_87-nvrtc12.6.cubin` is the source's name,
//! the hash of source, headers and options, the architecture and the compiler. A cubin of another compiler of the same
//! source serves as well; of several the newest compiler's is taken. Nothing is ever handed to the driver as PTX.

use crate::compile::Compiler;
use crate::cubin;
use crate::error::Error;
use crate::source::Source;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Where packages put cubins.
pub const SHIPPED: &str = "/usr/lib/finetuned/kernels";

/// Code for one file of kernels and one architecture.
#[derive(Debug)]
pub struct Cubin {
    /// The ELF file.
    pub bytes: Vec<u8>,
    /// The compiler that made it, such as `nvrtc12.6`.
    pub compiler: String,
    /// The file that it was read from; `None` when it was compiled now.
    pub path: Option<PathBuf>,
}

/// The places to look at.
#[derive(Default)]
pub struct Cubins {
    shipped: Vec<PathBuf>,
    cache: Option<PathBuf>,
    nvrtc: Option<PathBuf>,
    compiler: OnceLock<Compiler>,
}

impl Cubins {
    /// Looks into `shipped`, then into `cache`, then compiles with the NVRTC at `nvrtc` or where [`Compiler::load`] finds
    /// one.
    pub fn new(shipped: Vec<PathBuf>, cache: Option<PathBuf>, nvrtc: Option<PathBuf>) -> Cubins {
        Cubins { shipped, cache, nvrtc, compiler: OnceLock::new() }
    }

    /// The compiler, loaded at the first call.
    ///
    /// # Errors
    /// [`Error::NoCompiler`]
    pub fn compiler(&self) -> Result<&Compiler, Error> {
        if let Some(compiler) = self.compiler.get() {
            return Ok(compiler);
        }
        let compiler = Compiler::load(self.nvrtc.as_deref())?;
        Ok(self.compiler.get_or_init(|| compiler))
    }

    /// The cubin of a source for an architecture.
    ///
    /// # Errors
    /// [`Error::NoCubin`] when there is none and no compiler; [`Error::Compile`].
    pub fn find(&self, source: &'static Source, sm: u32) -> Result<Cubin, Error> {
        for directory in self.shipped.iter().chain(&self.cache) {
            if let Some(cubin) = newest(directory, source, sm) {
                return Ok(cubin);
            }
        }
        let compiler = self.compiler().map_err(|cause| Error::NoCubin {
            file: source.name,
            sm,
            searched: self.shipped.iter().chain(&self.cache).cloned().collect(),
            cause: Box::new(cause),
        })?;
        let bytes = compiler.compile(source, sm)?;
        if let Some(cache) = &self.cache {
            // Without a cache every start compiles: slow, not wrong.
            let _ = write(&cache.join(file_name(source, sm, &compiler_name(compiler))), &bytes);
        }
        Ok(Cubin { bytes, compiler: compiler_name(compiler), path: None })
    }
}

/// Compiles a source and writes it under its name to `directory`.
///
/// # Errors
/// [`Error::Compile`], [`Error::File`]
pub fn build(
    compiler: &Compiler,
    source: &'static Source,
    sm: u32,
    directory: &Path,
) -> Result<(PathBuf, Vec<u8>), Error> {
    let bytes = compiler.compile(source, sm)?;
    let path = directory.join(file_name(source, sm, &compiler_name(compiler)));
    write(&path, &bytes)?;
    Ok((path, bytes))
}

fn compiler_name(compiler: &Compiler) -> String {
    let (major, minor) = compiler.version();
    format!("nvrtc{major}.{minor}")
}

pub(crate) fn file_name(source: &Source, sm: u32, compiler: &str) -> String {
    format!("{}{compiler}.cubin", prefix(source, sm))
}

fn prefix(source: &Source, sm: u32) -> String {
    format!("{}-{}-sm_{sm}-", source.stem(), source.hash())
}

/// The whole cubin of the newest compiler in a directory.
fn newest(directory: &Path, source: &Source, sm: u32) -> Option<Cubin> {
    let prefix = prefix(source, sm);
    let mut found: Vec<(Vec<u32>, String, PathBuf)> = fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let compiler =
                path.file_name()?.to_str()?.strip_prefix(&prefix)?.strip_suffix(".cubin")?.to_string();
            let version =
                compiler.trim_start_matches("nvrtc").split('.').map(|n| n.parse().unwrap_or(0)).collect();
            Some((version, compiler, path))
        })
        .collect();
    found.sort();
    found.into_iter().rev().find_map(|(_, compiler, path)| {
        let bytes = fs::read(&path).ok()?;
        cubin::usage(&path.display().to_string(), &bytes).ok()?;
        Some(Cubin { bytes, compiler, path: Some(path) })
    })
}

/// Writes a whole file or none.
fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let error = |source| Error::File { path: path.to_path_buf(), source };
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(error)?;
    let beside = path.with_extension(format!("cubin.{}", std::process::id()));
    let written = File::create(&beside)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&beside, path))
        .and_then(|()| File::open(directory)?.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written.map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::FILES;

    #[test]
    fn without_cubin_and_compiler_the_places_are_named() {
        let cubins = Cubins::new(vec!["/nowhere".into()], None, Some("/nowhere/libnvrtc.so".into()));
        let error = cubins.find(&FILES[0], 87).unwrap_err().to_string();
        assert!(
            error.starts_with("no cubin of adamw.cu for sm_87 in /nowhere: NVRTC was not found"),
            "{error}"
        );
    }

    #[test]
    fn a_damaged_file_is_passed_over() {
        let directory = tempfile::tempdir().unwrap();
        let name = file_name(&FILES[0], 87, "nvrtc12.6");
        write(&directory.path().join(&name), b"\x7fELF").unwrap();
        assert!(newest(directory.path(), &FILES[0], 87).is_none());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
