//! The copyright file of the package: our licence, then every crate that is linked in with its notices, each text once.
//!
//! Where a crate may be had under MIT, that is what it is taken under, and its notice is given along; Apache 2.0 is given
//! by reference, since every Debian and Ubuntu has its text, and a NOTICE file is given along whatever the licence.

use crate::crates::{Crate, Crates};
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// Beginnings of the names of files with a licence or a notice.
const NAMES: [&str; 5] = ["LICENSE", "LICENCE", "COPYING", "NOTICE", "UNLICENSE"];

/// A crate whose archive has no licence file is given with the usual text of MIT and the authors of its manifest.
const MIT: &str = "\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the \"Software\"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED \"AS IS\", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
";

/// The file.
pub fn copyright(crates: &Crates) -> Result<String> {
    let mut out = String::new();
    let root = &crates.root;
    let _ = writeln!(
        out,
        "finetuned {}\n\n{}.\nThe text of the Apache License 2.0 is in /usr/share/common-licenses/Apache-2.0; that of the \
         MIT License:\n",
        root.version, root.licence
    );
    let ours = root.directory.join("LICENSE-MIT");
    let text = fs::read_to_string(&ours).with_context(|| format!("cannot read {}", ours.display()))?;
    out.push_str(text.trim_end());
    out.push_str(
        "\n\nThe programs contain the standard library of Rust, Copyright The Rust Project Developers (see\n\
         https://thanks.rust-lang.org), under MIT OR Apache-2.0, and the crates below.\n",
    );

    let mut texts: BTreeMap<String, Vec<&Crate>> = BTreeMap::new();
    for one in crates.others.iter().filter(|one| !one.is_ours()) {
        let _ = writeln!(out, "\n{} {}: {}", one.name, one.version, one.licence);
        if !one.authors.is_empty() {
            let _ = writeln!(out, "  {}", one.authors.join(", "));
        }
        for text in notices(one)? {
            texts.entry(text).or_default().push(one);
        }
    }
    for (text, users) in &texts {
        let names: Vec<&str> = users.iter().map(|one| one.name.as_str()).collect();
        let _ = writeln!(out, "\n{}\n{}\n\n{}", "-".repeat(80), names.join(", "), text.trim());
    }
    Ok(out)
}

/// The texts to be given along with a crate.
fn notices(one: &Crate) -> Result<Vec<String>> {
    let mut files = Vec::new();
    let directory = fs::read_dir(&one.directory)
        .with_context(|| format!("cannot read {}: run `cargo fetch`", one.directory.display()))?;
    for entry in directory {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if NAMES.iter().any(|start| name.to_uppercase().starts_with(start)) {
            files.push(name);
        }
    }
    files.sort();
    let mut texts = Vec::new();
    for name in files {
        let path = one.directory.join(&name);
        if path.is_file() {
            let text = read(&path)?;
            if !is_apache(&text) && wanted(one, &name) {
                texts.push(text);
            }
        }
    }
    let choices: Vec<&str> =
        one.licence.split(" OR ").map(|choice| choice.trim_matches(['(', ')', ' '])).collect();
    let by_reference = choices.contains(&"Apache-2.0");
    if texts.is_empty() && choices.contains(&"MIT") {
        let holders = if one.authors.is_empty() { "its authors".into() } else { one.authors.join(", ") };
        texts.push(format!("Copyright (c) {holders}\n\n{MIT}"));
    } else if texts.is_empty() && !by_reference {
        bail!("{} {} ({}) has no text of its licence to give along", one.name, one.version, one.licence);
    }
    Ok(texts)
}

/// Of several licences to choose from, only MIT's text is needed; a notice is needed always.
fn wanted(one: &Crate, name: &str) -> bool {
    let name = name.to_uppercase();
    let other = ["APACHE", "UNLICENSE", "BSL", "BOOST", "ZLIB"].iter().any(|other| name.contains(other));
    name.starts_with("NOTICE") || !(one.licence.contains("MIT") && one.licence.contains(" OR ") && other)
}

/// The text that every Debian and Ubuntu has.
fn is_apache(text: &str) -> bool {
    text.contains("TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION")
}

fn read(path: &Path) -> Result<String> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).replace("\r\n", "\n").trim_start_matches('\u{feff}').to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_directory(files: &[(&str, &str)], licence: &str) -> (tempfile::TempDir, Crate) {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        let mut one = crate::crates::tests::example().others[0].clone();
        one.directory = directory.path().to_path_buf();
        one.licence = licence.to_string();
        (directory, one)
    }

    #[test]
    fn of_two_licences_the_notice_of_mit_is_given() {
        let apache = "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION";
        let (_directory, one) = in_directory(
            &[("LICENSE-APACHE", apache), ("LICENSE-MIT", "Copyright Ada\r\n"), ("NOTICE", "By Ada.")],
            "MIT OR Apache-2.0",
        );
        assert_eq!(notices(&one).unwrap(), ["Copyright Ada\n", "By Ada."]);
    }

    #[test]
    fn a_crate_without_files_is_given_with_its_authors_or_refused() {
        let (_directory, one) = in_directory(&[], "MIT");
        assert!(notices(&one).unwrap()[0].starts_with("Copyright (c) Ada\n\nPermission is hereby granted"));
        let (_directory, one) = in_directory(&[], "Apache-2.0");
        assert!(notices(&one).unwrap().is_empty());
        let (_directory, one) = in_directory(&[], "Zlib");
        assert!(notices(&one).unwrap_err().to_string().contains("alpha 1.0.0 (Zlib)"));
    }
}
