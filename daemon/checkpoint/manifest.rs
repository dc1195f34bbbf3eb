//! MANIFEST.json: what a checkpoint's directory must hold, down to the byte.
//!
//! ```text
//! {
//!   "format": 1,
//!   "name": "00000100",                  the directory: two checkpoints cannot change places unnoticed
//!   "files": [ { "name": "adapter.safetensors", "size": 4812, "sha256": "…" }, … ],
//!   "manifest_sha256": "…"               of every byte of this file before this line
//! }
//! ```
//!
//! The digest is checked first, on bytes, before anything is parsed, so that a damaged manifest is told apart from one
//! that a newer version wrote: the first is quarantined, the second is refused and left alone.

use super::commit::{FileRecord, hex};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The format this version writes and reads.
pub(super) const FORMAT: u64 = 1;
/// Name of the file.
pub(super) const NAME: &str = "MANIFEST.json";
/// Largest manifest that is read; a real one is a few hundred bytes.
pub(super) const MAX_BYTES: usize = 1 << 20;

const MARK: &str = ",\n  \"manifest_sha256\": \"";
const END: &str = "\"\n}\n";

/// Why a manifest is not usable.
pub(super) enum ManifestError {
    /// Not what was written.
    Corrupt(String),
    /// Written by a newer version.
    Newer(u64),
}

/// The text of a manifest.
pub(super) fn render(name: &str, files: &[FileRecord]) -> String {
    let list: Vec<Value> = files
        .iter()
        .map(|file| serde_json::json!({"name": file.name, "size": file.size, "sha256": file.sha256}))
        .collect();
    let body = serde_json::json!({"format": FORMAT, "name": name, "files": list});
    let mut text = format!("{body:#}");
    text.truncate(text.trim_end_matches(['\n', '}']).len());
    let text = text.trim_end().to_string();
    let digest = hex(&Sha256::digest(&text));
    format!("{text}{MARK}{digest}{END}")
}

/// The files a manifest lists, when it is whole and belongs to the directory `name`.
pub(super) fn parse(bytes: &[u8], name: &str) -> Result<Vec<FileRecord>, ManifestError> {
    let corrupt = |why: &str| ManifestError::Corrupt(format!("{NAME}: {why}"));
    let text = std::str::from_utf8(bytes).map_err(|_| corrupt("not UTF-8"))?;
    let (body, tail) = text.rsplit_once(MARK).ok_or_else(|| corrupt("it has no digest"))?;
    if tail != format!("{}{END}", hex(&Sha256::digest(body))) {
        return Err(corrupt("its digest does not match"));
    }
    let value: Value = serde_json::from_str(text).map_err(|error| corrupt(&error.to_string()))?;
    match value["format"].as_u64() {
        Some(FORMAT) => {}
        Some(newer) if newer > FORMAT => return Err(ManifestError::Newer(newer)),
        _ => return Err(corrupt("it has no known format")),
    }
    if value["name"] != name {
        return Err(corrupt(&format!("it belongs to a checkpoint called {}", value["name"])));
    }
    let list = value["files"].as_array().ok_or_else(|| corrupt("it lists no files"))?;
    list.iter()
        .map(|file| {
            let text = |key: &str| file[key].as_str().map(String::from);
            Some(FileRecord { name: text("name")?, size: file["size"].as_u64()?, sha256: text("sha256")? })
        })
        .collect::<Option<_>>()
        .ok_or_else(|| corrupt("its list of files is incomplete"))
}

/// A whole manifest of another format.
#[cfg(test)]
pub(super) fn with_format(text: &str, format: u64) -> String {
    let (body, _) = text.rsplit_once(MARK).unwrap();
    let body = body.replace("\"format\": 1", &format!("\"format\": {format}"));
    format!("{body}{MARK}{}{END}", hex(&Sha256::digest(&body)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> Vec<FileRecord> {
        vec![
            FileRecord { name: "a".into(), size: 3, sha256: hex(&Sha256::digest("abc")) },
            FileRecord { name: "b".into(), size: 0, sha256: hex(&Sha256::digest("")) },
        ]
    }

    #[test]
    fn a_manifest_is_json_and_reads_back() {
        let text = render("00000001", &files());
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["files"][0]["size"], 3);
        assert!(matches!(parse(text.as_bytes(), "00000001"), Ok(read) if read == files()));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let text = render("00000001", &files()).into_bytes();
        for at in 0..text.len() {
            for bit in 0..8 {
                let mut damaged = text.clone();
                damaged[at] ^= 1 << bit;
                assert!(
                    matches!(parse(&damaged, "00000001"), Err(ManifestError::Corrupt(_))),
                    "byte {at}, bit {bit}"
                );
            }
            assert!(matches!(parse(&text[..at], "00000001"), Err(ManifestError::Corrupt(_))), "cut at {at}");
        }
        let longer = [text, b"\n".to_vec()].concat();
        assert!(matches!(parse(&longer, "00000001"), Err(ManifestError::Corrupt(_))));
    }

    #[test]
    fn another_checkpoints_manifest_and_a_newer_format_are_told_apart() {
        let text = render("00000001", &files());
        assert!(matches!(parse(text.as_bytes(), "00000002"), Err(ManifestError::Corrupt(_))));
        let newer = with_format(&text, 7);
        assert!(matches!(parse(newer.as_bytes(), "00000001"), Err(ManifestError::Newer(7))));
    }
}
