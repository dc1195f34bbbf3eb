//! `tiles.json` of the cache: which kernel is the fastest for how many rows, as `finetuned bench` has measured it, for each
//! device in each state.
//!
//! ```json
//! {"schema": 1, "devices": [{
//!   "device": "Orin", "sm": 87, "multiprocessors": 16, "clock_khz": 1300500,
//!   "measured": "2026-11-28T10:00:00Z", "mode": "MAXN",
//!   "tiles": [{"operation": "linear", "up_to": 256, "kernel": "gemm_nf4_nt_64x64"},
//!             {"operation": "linear", "up_to": null, "kernel": "gemm_nt_128x128"}]}]}
//! ```
//!
//! Name, architecture, multiprocessors and clock have to be those of the device as it is now; what there is of another one is
//! left alone. The choice changes no result, only time: a file that is missing, damaged or about another device costs the
//! program's own choice, and a warning where it says something that cannot be.

use finetuned_cuda::Properties;
use finetuned_cuda::tuned::{Choice, Key, Tuned};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Name of the file, in the cache directory.
pub const NAME: &str = "tiles.json";
/// Version of the file.
const SCHEMA: u32 = 1;
/// Nobody writes more; what is longer is not read.
const MOST: u64 = 1 << 20;

/// The file.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Content {
    schema: u32,
    devices: Vec<Entry>,
}

/// What was measured on a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The maker's name.
    pub device: String,
    /// Compute capability, 10 · major + minor.
    pub sm: u32,
    /// Multiprocessors that were switched on.
    pub multiprocessors: u32,
    /// Highest clock, in kHz.
    pub clock_khz: u32,
    /// When, in RFC 3339.
    pub measured: String,
    /// Power mode, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    /// The tables.
    pub tiles: Vec<Tile>,
}

/// A line of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tile {
    /// Which table (`finetuned_cuda::tuned::TABLES`).
    pub operation: String,
    /// For products of up to so many rows; `None` for all.
    pub up_to: Option<usize>,
    /// Name of the kernel.
    pub kernel: String,
}

impl Entry {
    /// An entry for a device as it is now.
    pub fn new(device: &Properties, measured: String, mode: Option<String>, choices: &[Choice]) -> Entry {
        let Key { device, sm, multiprocessors, clock_khz } = Key::of(device);
        let tile = |choice: &Choice| {
            let Choice { operation, up_to, kernel } = choice.clone();
            Tile { operation, up_to, kernel }
        };
        let tiles = choices.iter().map(tile).collect();
        Entry { device, sm, multiprocessors, clock_khz, measured, mode, tiles }
    }

    fn key(&self) -> Key {
        let Entry { device, sm, multiprocessors, clock_khz, .. } = self;
        Key { device: device.clone(), sm: *sm, multiprocessors: *multiprocessors, clock_khz: *clock_khz }
    }
}

/// Why the tables cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TilesError {
    /// The file system.
    #[error("cannot {action} {path}: {source}", path = .path.display())]
    File {
        /// `read`, `write`
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No such file.
    #[error("{path} is not a table of tiles ({why}): delete it, and measure again with `finetuned bench`", path = .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// The tables for a device as it is now, and what in them cannot be. A missing file, or one about other devices, is empty.
///
/// # Errors
/// [`TilesError`]; the program's own tables then do.
pub fn read(path: &Path, device: &Properties) -> Result<(Tuned, Vec<String>), TilesError> {
    let key = Key::of(device);
    let Some(entry) = load(path)?.devices.into_iter().find(|entry| entry.key() == key) else {
        return Ok((Tuned::default(), Vec::new()));
    };
    let choice = |tile: Tile| Choice { operation: tile.operation, up_to: tile.up_to, kernel: tile.kernel };
    let choices: Vec<Choice> = entry.tiles.into_iter().map(choice).collect();
    Ok(Tuned::new(&choices))
}

/// Puts an entry in the place of that of the same device, or beside the others. The file is written whole or not at all; one
/// that cannot be read is replaced.
///
/// # Errors
/// The file system refuses.
pub fn write(path: &Path, entry: Entry) -> Result<(), TilesError> {
    let mut content = load(path).unwrap_or_default();
    content.schema = SCHEMA;
    content.devices.retain(|other| other.key() != entry.key());
    content.devices.push(entry);
    let fail = |source| TilesError::File { action: "write", path: path.to_path_buf(), source };
    let text = serde_json::to_vec_pretty(&content).map_err(|error| fail(io::Error::other(error)))?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory).map_err(fail)?;
    let beside = path.with_extension(format!("json.{}", std::process::id()));
    let written = File::create(&beside)
        .and_then(|mut file| {
            file.write_all(&text)?;
            file.write_all(b"\n")?;
            file.sync_all()
        })
        .and_then(|()| std::fs::rename(&beside, path))
        .and_then(|()| File::open(directory)?.sync_all());
    if written.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    written.map_err(fail)
}

fn load(path: &Path) -> Result<Content, TilesError> {
    let mut text = Vec::new();
    match File::open(path).and_then(|file| file.take(MOST + 1).read_to_end(&mut text)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Content::default()),
        Err(source) => return Err(TilesError::File { action: "read", path: path.to_path_buf(), source }),
        Ok(_) => {}
    }
    let wrong = |why: String| TilesError::Content { path: path.to_path_buf(), why };
    if text.len() as u64 > MOST {
        return Err(wrong(format!("more than {MOST} bytes")));
    }
    let content: Content = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    match content.schema {
        SCHEMA => Ok(content),
        other => Err(wrong(format!("schema {other}, and {SCHEMA} is known"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(multiprocessors: u32) -> Properties {
        Properties {
            name: "Orin".into(),
            sm: 87,
            multiprocessors,
            clock_khz: 612_000,
            shared_per_block: 0,
            shared_per_multiprocessor: 0,
            l2: 0,
            integrated: true,
            memory: 0,
            driver: 12_060,
        }
    }

    fn entry(multiprocessors: u32, kernel: &str) -> Entry {
        let choice = Choice { operation: "linear".into(), up_to: None, kernel: kernel.into() };
        Entry::new(&device(multiprocessors), "2026-11-28T10:00:00Z".into(), Some("MAXN".into()), &[choice])
    }

    fn kernel(path: &Path, multiprocessors: u32) -> Option<&'static str> {
        let (tuned, problems) = read(path, &device(multiprocessors)).unwrap();
        assert!(problems.is_empty(), "{problems:?}");
        tuned.row("linear", 7).map(|row| row.kernel.name)
    }

    #[test]
    fn a_table_is_for_its_device_in_its_state() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cache").join(NAME);
        assert_eq!(kernel(&path, 16), None, "no file");
        write(&path, entry(16, "gemm_nf4_nt_64x64")).unwrap();
        write(&path, entry(8, "gemm_nf4_nt_32x64")).unwrap();
        assert_eq!(kernel(&path, 16), Some("gemm_nf4_nt_64x64"));
        assert_eq!(kernel(&path, 8), Some("gemm_nf4_nt_32x64"));
        assert_eq!(kernel(&path, 6), None, "another power mode");
        // Measured again: in the place of the old one.
        write(&path, entry(16, "gemm_nt_128x128")).unwrap();
        assert_eq!(kernel(&path, 16), Some("gemm_nt_128x128"));
        assert_eq!(load(&path).unwrap().devices.len(), 2);
        assert_eq!(
            std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "nothing is left beside it"
        );
    }

    #[test]
    fn what_cannot_be_is_left_out_with_a_word() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(NAME);
        write(&path, entry(16, "gemm_of_tomorrow")).unwrap();
        let (tuned, problems) = read(&path, &device(16)).unwrap();
        assert!(tuned.is_empty());
        assert_eq!(problems, ["linear: no kernel \"gemm_of_tomorrow\" in its table"]);
        for (text, why) in [
            ("", "EOF"),
            ("{\"schema\": 1, \"devices\": [{}]}", "missing field"),
            ("{\"schema\": 7, \"devices\": []}", "schema 7, and 1 is known"),
            ("[]", "invalid"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = read(&path, &device(16)).err().unwrap().to_string();
            assert!(error.contains(why) && error.contains("finetuned bench"), "{text}: {error}");
        }
        // Measuring again replaces it.
        write(&path, entry(16, "gemm_nt_128x128")).unwrap();
        assert_eq!(kernel(&path, 16), Some("gemm_nt_128x128"));
    }
}
