//! What is in the package, as JSON: versions, then every file with mode, size and sha256, and every link with its target.

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The document, with a final line feed.
pub fn manifest(tree: &Path, with: &[String]) -> Result<String> {
    let mut document = Map::new();
    for pair in with {
        let Some((key, value)) = pair.split_once('=') else { bail!("{pair}: not KEY=VALUE") };
        document.insert(key.to_string(), value.into());
    }
    let mut paths = Vec::new();
    collect(tree, &mut paths)?;
    // What dpkg reads is not installed.
    paths.retain(|path| !path.starts_with(tree.join("DEBIAN")));
    paths.sort();
    let files = paths.iter().map(|path| entry(tree, path)).collect::<Result<Vec<_>>>()?;
    document.insert("files".to_string(), files.into());
    Ok(serde_json::to_string_pretty(&Value::Object(document))? + "\n")
}

fn collect(directory: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    let unread = || format!("cannot read {}", directory.display());
    for entry in fs::read_dir(directory).with_context(unread)? {
        let entry = entry.with_context(unread)?;
        if entry.file_type().with_context(unread)?.is_dir() {
            collect(&entry.path(), paths)?;
        } else {
            paths.push(entry.path());
        }
    }
    Ok(())
}

fn entry(tree: &Path, path: &Path) -> Result<Value> {
    let unread = || format!("cannot read {}", path.display());
    let installed = format!("/{}", path.strip_prefix(tree).with_context(unread)?.display());
    let metadata = fs::symlink_metadata(path).with_context(unread)?;
    if metadata.is_symlink() {
        let target = fs::read_link(path).with_context(unread)?;
        return Ok(json!({"path": installed, "link": target.display().to_string()}));
    }
    let content = fs::read(path).with_context(unread)?;
    let digest: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
    let mode = format!("{:04o}", metadata.permissions().mode() & 0o7777);
    Ok(json!({"path": installed, "mode": mode, "size": content.len(), "sha256": digest}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_listed_in_order_with_what_is_in_them() {
        let tree = tempfile::tempdir().unwrap();
        let program = tree.path().join("usr/bin/b");
        fs::create_dir_all(program.parent().unwrap()).unwrap();
        fs::write(&program, "abc").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink("b", tree.path().join("usr/bin/a")).unwrap();
        fs::create_dir(tree.path().join("DEBIAN")).unwrap();
        fs::write(tree.path().join("DEBIAN/control"), "").unwrap();
        let text = manifest(tree.path(), &["version=1".into(), "target=t=u".into()]).unwrap();
        let document: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(document["target"], "t=u");
        assert_eq!(document["files"].as_array().unwrap().len(), 2);
        assert_eq!(document["files"][0], json!({"path": "/usr/bin/a", "link": "b"}));
        assert_eq!(
            document["files"][1],
            json!({"path": "/usr/bin/b", "mode": "0755", "size": 3,
                "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"})
        );
        assert!(manifest(tree.path(), &["nothing".into()]).is_err());
    }
}
