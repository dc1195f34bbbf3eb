//! `finetunectl adapter`: what runs have made.
//!
//! An export is written beside its place and renamed into it when it is complete and synced, so that a directory of that
//! name holds either nothing or a whole adapter.

use super::context::Context;
use super::exit::{Code, Exit, Failure};
use super::figures::Figures;
use super::{list, text};
use crate::bus::Dictionary;
use crate::units::Bytes;
use clap::Subcommand;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Seek};
use std::path::{Path, PathBuf};
use std::time::Duration;
use zbus::OwnedFd;

/// What a directory must hold to be replaced by `--force`.
const CONFIG: &str = "adapter_config.json";

/// Commands about adapters.
#[derive(Subcommand, Debug)]
pub enum AdapterCommand {
    /// List the runs that have an adapter
    List,
    /// Copy a run's adapter (PEFT layout) to a new directory
    Export {
        /// Name, id, or the beginning of an id
        run: String,
        /// The directory to make
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Replace an adapter that lies there
        #[arg(long)]
        force: bool,
    },
}

/// Runs the command.
pub async fn command(command: &AdapterCommand, context: &Context) -> Result<Code, Failure> {
    match command {
        AdapterCommand::List => list_adapters(context).await,
        AdapterCommand::Export { run, directory, force } => {
            let place = Place::new(directory, *force)?;
            let client = context.client().await?;
            let run = client.find(run).await?;
            let figures = Figures::new(&client.properties(run.inner()).await?);
            let files: HashMap<String, OwnedFd> =
                client.call(run.inner(), "OpenAdapter", &Dictionary::new(), None).await?;
            let sizes = place.write(files)?;
            if context.json {
                let files: Vec<Value> =
                    sizes.iter().map(|(name, bytes)| json!({ "name": name, "bytes": bytes })).collect();
                let directory = directory.to_string_lossy();
                context.console.json(json!({ "run": figures.id, "directory": directory, "files": files }))?;
            } else {
                let bytes: Bytes = sizes.values().map(|&bytes| Bytes(bytes)).sum();
                let shown = text::printable(&directory.to_string_lossy());
                let files = text::count(sizes.len(), "file");
                context.console.line(&format!("{}: {shown}, {files}, {bytes}", figures.title()))?;
            }
            Ok(Exit::Done.into())
        }
    }
}

async fn list_adapters(context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let runs = list::runs(&client).await?;
    let digits = text::digits(runs.iter().map(|run| run.id.as_str()));
    let made: Vec<&Figures> = runs.iter().filter(|run| run.state == "succeeded").collect();
    if context.json {
        let adapters: Vec<Value> = made
            .iter()
            .map(|run| {
                json!({
                    "run": run.id,
                    "name": run.name,
                    "step": run.step,
                    "eval_loss": run.eval_loss,
                    "finished_us": run.finished_us,
                })
            })
            .collect();
        context.console.json(json!({ "adapters": adapters }))?;
        return Ok(Exit::Done.into());
    }
    if made.is_empty() {
        context.console.message("no adapters: no run has succeeded yet");
        return Ok(Exit::Done.into());
    }
    let now = context.now_us();
    let rows: Vec<[String; 5]> = made
        .iter()
        .map(|run| {
            [
                text::prefix(&run.id, digits).to_string(),
                run.name.clone(),
                run.step.to_string(),
                run.eval_loss.map_or_else(|| "-".into(), |loss| format!("{loss:.4}")),
                text::age(Duration::from_micros(now.saturating_sub(run.finished_us.unwrap_or(now)))),
            ]
        })
        .collect();
    context.console.result(&text::table(["ID", "NAME", "STEPS", "EVAL", "AGE"], &rows))?;
    Ok(Exit::Done.into())
}

/// Where an export goes.
#[derive(Debug)]
struct Place {
    target: PathBuf,
    /// Beside the target, hidden, and this process's own.
    partial: PathBuf,
    force: bool,
}

impl Place {
    /// A place that may be written to; looks at it before anything is fetched.
    fn new(target: &Path, force: bool) -> Result<Place, Failure> {
        let shown = target.display();
        let name = target
            .file_name()
            .ok_or_else(|| Failure::new(Exit::Usage, format!("{shown} is no name for a new directory")))?;
        let partial = target.with_file_name(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
        let place = Place { target: target.to_path_buf(), partial, force };
        place.check()?;
        Ok(place)
    }

    /// Refuses a target that must not be replaced.
    fn check(&self) -> Result<(), Failure> {
        let shown = self.target.display();
        if fs::symlink_metadata(&self.target).is_err() {
            return Ok(());
        }
        let exists = Failure::new(Exit::Error, format!("{shown} exists"));
        let adapter = fs::symlink_metadata(&self.target).is_ok_and(|metadata| metadata.is_dir())
            && self.target.join(CONFIG).is_file();
        match (adapter, self.force) {
            (true, true) => Ok(()),
            (true, false) => Err(exists.help("name another directory, or replace it with --force")),
            // Somebody's home may have been meant by mistake.
            (false, _) => Err(exists
                .because(format!("it is no adapter (a directory with {CONFIG}), and is not replaced"))
                .help("name another directory")),
        }
    }

    /// Copies the files; their sizes, by name.
    fn write(&self, files: HashMap<String, OwnedFd>) -> Result<BTreeMap<String, u64>, Failure> {
        let cannot = |what: &Path| {
            let error = format!("cannot write {}", what.display());
            move |cause: io::Error| Failure::new(Exit::Error, error).because(cause)
        };
        for name in files.keys() {
            let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']);
            if !plain {
                let error = format!("the daemon sent a file with the name {name:?}, which no adapter has");
                return Err(Failure::new(Exit::Error, error));
            }
        }
        fs::create_dir(&self.partial).map_err(cannot(&self.partial))?;
        let partial = Partial(&self.partial);
        let mut sizes = BTreeMap::new();
        for (name, file) in files {
            let path = self.partial.join(&name);
            let copy = || -> io::Result<u64> {
                let mut from = File::from(std::os::fd::OwnedFd::from(file));
                // The offset belongs to whoever has the descriptor, too.
                from.rewind()?;
                let mut to = File::create_new(&path)?;
                let bytes = io::copy(&mut from, &mut to)?;
                to.sync_all()?;
                Ok(bytes)
            };
            let bytes = copy().map_err(cannot(&self.target.join(&name)))?;
            sizes.insert(name, bytes);
        }
        let synced = |path: &Path| File::open(path).and_then(|directory| directory.sync_all());
        synced(&self.partial).map_err(cannot(&self.partial))?;
        self.publish().map_err(cannot(&self.target))?;
        // After an exchange the old adapter lies there; without one, nothing.
        drop(partial);
        let parent = self.target.parent().filter(|parent| !parent.as_os_str().is_empty());
        synced(parent.unwrap_or(Path::new("."))).map_err(cannot(&self.target))?;
        Ok(sizes)
    }

    /// Puts the new directory in its place, in one step where the file system can.
    fn publish(&self) -> io::Result<()> {
        let rename = |flags| renameat_with(CWD, &self.partial, CWD, &self.target, flags);
        let exists = fs::symlink_metadata(&self.target).is_ok();
        let flags = if exists && self.force { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
        match rename(flags) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) if exists && self.force => {
                fs::remove_dir_all(&self.target)?;
                fs::rename(&self.partial, &self.target)
            }
            // A directory can only replace an empty one.
            Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => fs::rename(&self.partial, &self.target),
            other => Ok(other?),
        }
    }
}

/// What is removed at the end, however it comes.
struct Partial<'a>(&'a Path);

impl Drop for Partial<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn files(config: &str) -> HashMap<String, OwnedFd> {
        let file = |text: &str| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            OwnedFd::from(std::os::fd::OwnedFd::from(file))
        };
        HashMap::from([(CONFIG.into(), file(config)), ("adapter_model.safetensors".into(), file("weights"))])
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn an_export_is_whole_and_replaces_nothing_unasked() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        let sizes = Place::new(&target, false).unwrap().write(files("one")).unwrap();
        assert_eq!(sizes, BTreeMap::from([(CONFIG.into(), 3), ("adapter_model.safetensors".into(), 7)]));
        assert_eq!(names(directory.path()), ["out"]);
        let failure = Place::new(&target, false).unwrap_err();
        assert_eq!(failure.exit, Exit::Error);
        assert!(failure.help[0].contains("--force"));
        // What appears between the look and the rename is not replaced either.
        let other = directory.path().join("other");
        let place = Place::new(&other, false).unwrap();
        fs::create_dir_all(other.join("mine")).unwrap();
        assert!(place.write(files("x")).is_err());
        assert_eq!(
            (names(directory.path()), names(&other)),
            (vec!["other".into(), "out".into()], vec!["mine".into()])
        );
    }

    #[test]
    fn force_replaces_an_adapter_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        Place::new(&target, true).unwrap().write(files("one")).unwrap();
        fs::write(target.join("old"), "").unwrap();
        Place::new(&target, true).unwrap().write(files("two")).unwrap();
        assert_eq!(names(&target), ["adapter_config.json", "adapter_model.safetensors"]);
        assert_eq!(fs::read_to_string(target.join(CONFIG)).unwrap(), "two");
        assert_eq!(names(directory.path()), ["out"]);
        assert!(Place::new(directory.path(), true).unwrap_err().causes[0].contains("is no adapter"));
        assert_eq!(Place::new(Path::new("/"), true).unwrap_err().exit, Exit::Usage);
    }

    #[test]
    fn names_from_the_daemon_stay_in_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("out");
        for name in ["../evil", "", "..", "a/b", ".hidden"] {
            let (_, file) = files("x").into_iter().next().unwrap();
            let place = Place::new(&target, false).unwrap();
            let failure = place.write(HashMap::from([(name.to_string(), file)])).unwrap_err();
            assert!(failure.errors[0].contains("which no adapter has"), "{name}");
        }
        assert!(names(directory.path()).is_empty());
    }
}
