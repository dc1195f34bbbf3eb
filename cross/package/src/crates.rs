//! The crates that are linked into the programs: what `cargo metadata` resolves for the target, from `finetuned` along
//! ordinary dependencies. Macros and what builds run are not in the programs, nor are tests' crates.

use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// The package at the root.
const ROOT: &str = "finetuned";

/// A crate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crate {
    /// Name.
    pub name: String,
    /// Version.
    pub version: String,
    /// SPDX expression.
    pub licence: String,
    /// As its manifest lists them.
    pub authors: Vec<String>,
    /// Where its source is developed.
    pub repository: Option<String>,
    /// Its source on this machine.
    pub directory: PathBuf,
    /// SHA-256 of its archive in the registry; none for our own.
    pub checksum: Option<String>,
    /// Those that it is linked with, by name and version.
    pub needs: Vec<(String, String)>,
}

impl Crate {
    /// Name and version.
    pub fn key(&self) -> (String, String) {
        (self.name.clone(), self.version.clone())
    }

    /// Whether it is part of this source.
    pub fn is_ours(&self) -> bool {
        self.checksum.is_none()
    }
}

/// All of them, by name and version; the root comes first.
#[derive(Clone, Debug)]
pub struct Crates {
    /// `finetuned`.
    pub root: Crate,
    /// The others, in order.
    pub others: Vec<Crate>,
}

impl Crates {
    /// From the output of `cargo metadata` and the text of `Cargo.lock`.
    pub fn from(metadata: &str, lock: &str) -> Result<Crates> {
        let metadata: Value = serde_json::from_str(metadata).context("not the JSON of cargo metadata")?;
        let checksums = checksums(lock)?;
        let packages: BTreeMap<&str, &Value> = list(&metadata["packages"])
            .filter_map(|package| Some((package["id"].as_str()?, package)))
            .collect();
        let edges: BTreeMap<&str, Vec<&str>> = list(&metadata["resolve"]["nodes"])
            .filter_map(|node| Some((node["id"].as_str()?, linked(node, &packages))))
            .collect();
        let root = packages
            .iter()
            .find(|(_, package)| package["name"] == ROOT)
            .map(|(id, _)| *id)
            .with_context(|| format!("no package {ROOT}"))?;
        let mut seen = BTreeSet::from([root]);
        let mut open = vec![root];
        while let Some(id) = open.pop() {
            for next in edges.get(id).into_iter().flatten() {
                if seen.insert(next) {
                    open.push(next);
                }
            }
        }
        let read = |id: &str| {
            let needs = edges.get(id).into_iter().flatten().filter_map(|id| packages.get(id));
            one(packages[id], needs.map(|package| key(package)).collect(), &checksums)
        };
        let mut others =
            seen.iter().filter(|id| **id != root).map(|id| read(id)).collect::<Result<Vec<_>>>()?;
        others.sort_by_key(Crate::key);
        Ok(Crates { root: read(root)?, others })
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_string()
}

fn key(package: &Value) -> (String, String) {
    (text(&package["name"]), text(&package["version"]))
}

/// The ids of what a node is linked with.
fn linked<'a>(node: &'a Value, packages: &BTreeMap<&str, &Value>) -> Vec<&'a str> {
    let ordinary = |dependency: &&Value| list(&dependency["dep_kinds"]).any(|kind| kind["kind"].is_null());
    let is_macro = |id: &str| {
        packages.get(id).is_some_and(|package| {
            list(&package["targets"]).any(|target| list(&target["kind"]).any(|kind| kind == "proc-macro"))
        })
    };
    list(&node["deps"])
        .filter(ordinary)
        .filter_map(|dependency| dependency["pkg"].as_str())
        .filter(|id| !is_macro(id))
        .collect()
}

fn one(
    package: &Value,
    mut needs: Vec<(String, String)>,
    checksums: &BTreeMap<(String, String), String>,
) -> Result<Crate> {
    let (name, version) = key(package);
    let licence =
        package["license"].as_str().with_context(|| format!("{name} {version} names no licence"))?;
    let manifest = PathBuf::from(text(&package["manifest_path"]));
    needs.sort();
    Ok(Crate {
        // The slash is what Cargo wrote before SPDX.
        licence: licence.replace('/', " OR "),
        authors: list(&package["authors"]).map(text).collect(),
        repository: package["repository"].as_str().map(str::to_string),
        directory: manifest.parent().context("a manifest without a directory")?.to_path_buf(),
        checksum: checksums.get(&(name.clone(), version.clone())).cloned(),
        needs,
        name,
        version,
    })
}

fn checksums(lock: &str) -> Result<BTreeMap<(String, String), String>> {
    let lock: toml::Table = lock.parse().context("Cargo.lock")?;
    let packages =
        lock.get("package").and_then(|packages| packages.as_array()).context("Cargo.lock has no packages")?;
    let field = |package: &toml::Value, name: &str| Some(package.get(name)?.as_str()?.to_string());
    Ok(packages
        .iter()
        .filter_map(|package| {
            Some(((field(package, "name")?, field(package, "version")?), field(package, "checksum")?))
        })
        .collect())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// finetuned 1.0 is linked with alpha, which is linked with beta; a macro, a build's and a test's crate stay out.
    pub fn example() -> Crates {
        let package = |name: &str, kind: &str| {
            serde_json::json!({"id": name, "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0",
                "authors": ["Ada"], "repository": null, "manifest_path": format!("/src/{name}/Cargo.toml"),
                "targets": [{"kind": [kind]}]})
        };
        let needs = |name: &str, kind: Value| serde_json::json!({"pkg": name, "dep_kinds": [{"kind": kind}]});
        let metadata = serde_json::json!({
            "packages": [package("finetuned", "lib"), package("alpha", "lib"), package("beta", "lib"),
                package("derive", "proc-macro"), package("builder", "lib"), package("tester", "lib")],
            "resolve": {"nodes": [
                {"id": "finetuned", "deps": [needs("alpha", Value::Null), needs("derive", Value::Null),
                    needs("builder", "build".into()), needs("tester", "dev".into())]},
                {"id": "alpha", "deps": [needs("beta", Value::Null)]},
                {"id": "beta", "deps": []},
                {"id": "derive", "deps": [needs("tester", Value::Null)]},
            ]},
        });
        let lock = "[[package]]\nname = \"alpha\"\nversion = \"1.0.0\"\nchecksum = \"aa\"\n\n[[package]]\nname = \"beta\"\n\
                    version = \"1.0.0\"\nchecksum = \"bb\"\n\n[[package]]\nname = \"finetuned\"\nversion = \"1.0.0\"\n";
        Crates::from(&metadata.to_string(), lock).unwrap()
    }

    #[test]
    fn only_what_is_linked_counts() {
        let crates = example();
        assert_eq!(crates.root.name, "finetuned");
        assert!(crates.root.is_ours());
        let names: Vec<_> = crates.others.iter().map(|c| (c.name.as_str(), c.checksum.as_deref())).collect();
        assert_eq!(names, [("alpha", Some("aa")), ("beta", Some("bb"))]);
        assert_eq!(crates.others[0].licence, "MIT OR Apache-2.0");
        assert_eq!(crates.others[0].needs, [("beta".to_string(), "1.0.0".to_string())]);
    }

    #[test]
    fn a_crate_without_a_licence_is_refused() {
        let metadata = r#"{"packages": [{"id": "f", "name": "finetuned", "version": "1.0.0",
            "manifest_path": "/f/Cargo.toml"}], "resolve": {"nodes": []}}"#;
        let error = Crates::from(metadata, "package = []").unwrap_err();
        assert_eq!(error.to_string(), "finetuned 1.0.0 names no licence");
    }
}
