//! Makes what the package contains beside the programs. `cross/build` calls it; it never ships.
//!
//! ```text
//!   pages      clap declarations, docs/*.md, docs/dbus/*.xml ─► manual pages (roff)
//!              clap declarations ─► completions for bash, zsh and fish
//!   licences   cargo metadata, the crates' own files         ─► copyright
//!   sbom       cargo metadata, Cargo.lock                    ─► CycloneDX
//!   manifest   the tree of the package                       ─► sizes, modes and sha256 of what is in it
//! ```
//!
//! Everything is a function of the source: the only date is the one that is passed.

#[cfg(test)]
mod commands;
mod completions;
mod crates;
mod interface;
mod licences;
mod manifest;
mod manual;
mod markdown;
mod roff;
mod sbom;

use anyhow::{Context, Result};
use clap::{Args, Parser};
use jiff::Timestamp;
use std::fs;
use std::path::{Path, PathBuf};

/// Makes what the package contains beside the programs.
#[derive(Parser)]
#[command(name = "finetuned-package")]
enum Command {
    /// Manual pages and completions
    Pages {
        /// Root of the package's tree
        #[arg(long)]
        tree: PathBuf,
        /// Time of the source, in seconds since 1970
        #[arg(long, value_parser = seconds)]
        epoch: Timestamp,
    },
    /// The copyright file: our own, and that of every crate that is linked in
    Licences {
        #[command(flatten)]
        crates: CrateArguments,
        /// File to write
        #[arg(long)]
        output: PathBuf,
    },
    /// The bill of materials (CycloneDX 1.5, JSON)
    Sbom {
        #[command(flatten)]
        crates: CrateArguments,
        /// Time of the source, in seconds since 1970
        #[arg(long, value_parser = seconds)]
        epoch: Timestamp,
        /// First line of `rustc --version`
        #[arg(long)]
        rustc: String,
        /// File to write
        #[arg(long)]
        output: PathBuf,
    },
    /// Versions, and size, mode and sha256 of every file of the tree
    Manifest {
        /// Root of the package's tree
        #[arg(long)]
        tree: PathBuf,
        /// KEY=VALUE, written first, in the order given
        #[arg(long = "with", value_name = "KEY=VALUE")]
        with: Vec<String>,
        /// File to write; it is not part of itself
        #[arg(long)]
        output: PathBuf,
    },
}

/// Where the crates are known from.
#[derive(Args)]
struct CrateArguments {
    /// What `cargo metadata --format-version 1 --filter-platform TARGET` printed
    #[arg(long)]
    metadata: PathBuf,
    /// Cargo.lock, for the checksums
    #[arg(long)]
    lock: PathBuf,
}

impl CrateArguments {
    fn load(&self) -> Result<crates::Crates> {
        let metadata = read(&self.metadata)?;
        let lock = read(&self.lock)?;
        crates::Crates::from(&metadata, &lock).with_context(|| format!("in {}", self.metadata.display()))
    }
}

/// Seconds since 1970, as `SOURCE_DATE_EPOCH` has them.
fn seconds(text: &str) -> Result<Timestamp, String> {
    let seconds = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    Timestamp::from_second(seconds).map_err(|error| error.to_string())
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Pages { tree, epoch } => {
            for page in manual::pages(epoch)? {
                write(&tree.join(page.path()), page.text.as_bytes())?;
            }
            for (path, text) in completions::all() {
                write(&tree.join(path), &text)?;
            }
            Ok(())
        }
        Command::Licences { crates, output } => {
            write(&output, licences::copyright(&crates.load()?)?.as_bytes())
        }
        Command::Sbom { crates, epoch, rustc, output } => {
            write(&output, sbom::cyclonedx(&crates.load()?, epoch, &rustc).as_bytes())
        }
        Command::Manifest { tree, with, output } => {
            write(&output, manifest::manifest(&tree, &with)?.as_bytes())
        }
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    }
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))
}
