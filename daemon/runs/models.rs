//! The registered models: directories of Hugging Face models that specs name with a word.
//!
//! ```text
//!   <own>/<name>/           added by clients, removed by clients
//!   <own>/.incoming-…       being added          <own>/.removed-…   being removed; both swept at start
//!   <others…>/<name>/       put there by the machine's owner, read only
//! ```
//!
//! A model is a subdirectory with a readable `config.json`. Of two with one name the first counts: the own directory
//! comes first, then the others in the order of the configuration. Nothing is remembered: the directories are the list.

use super::copy::{self, Reader, storage};
use super::view::{ModelView, RequestError};
use crate::config::daemon::LimitsConfig;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const INCOMING: &str = ".incoming-";
const REMOVED: &str = ".removed-";
/// Largest `config.json`.
const MAX_CONFIG: u64 = 4 << 20;

/// The directories of registered models. All methods block.
#[derive(Clone, Debug)]
pub struct Models {
    own: PathBuf,
    others: Vec<PathBuf>,
}

impl Models {
    /// Opens the directory of the daemon's own models, which is created when absent, and sweeps what an interrupted
    /// addition or removal left there. `others` need not exist.
    ///
    /// # Errors
    /// [`RequestError::Storage`] when the own directory cannot be used.
    pub fn open(own: PathBuf, others: Vec<PathBuf>) -> Result<Models, RequestError> {
        std::fs::create_dir_all(&own).map_err(|error| storage("create", &own, error))?;
        let entries = std::fs::read_dir(&own).map_err(|error| storage("list", &own, error))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let left = [INCOMING, REMOVED].iter().any(|prefix| name.to_string_lossy().starts_with(prefix));
            if left && let Err(error) = std::fs::remove_dir_all(entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "a half-copied model cannot be removed");
            }
        }
        Ok(Models { own, others })
    }

    /// The same own directory with other further ones. Copies in progress are left alone.
    pub fn with(&self, others: Vec<PathBuf>) -> Models {
        Models { own: self.own.clone(), others }
    }

    /// All models, by name. What looks like one and cannot be read is left out, with a warning in the log.
    pub fn list(&self) -> Vec<ModelView> {
        let mut found = BTreeMap::new();
        for directory in self.directories() {
            let entries = match std::fs::read_dir(directory) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    tracing::warn!(path = %directory.display(), %error, "models cannot be listed");
                    continue;
                }
            };
            for entry in entries.flatten() {
                let Ok(name) = entry.file_name().into_string() else { continue };
                if name.starts_with('.') || found.contains_key(&name) || !entry.path().is_dir() {
                    continue;
                }
                let seen = check_name(&name).and_then(|()| view(&name, &entry.path()));
                match seen {
                    Ok(model) => drop(found.insert(name, model)),
                    Err(problem) => {
                        tracing::warn!(path = %entry.path().display(), problem, "not a model, left out");
                    }
                }
            }
        }
        found.into_values().collect()
    }

    /// The directory of the model with this name.
    pub fn get(&self, name: &str) -> Option<PathBuf> {
        check_name(name).ok()?;
        self.directories().map(|directory| directory.join(name)).find(|path| view(name, path).is_ok())
    }

    /// Copies the model in `directory` to the own ones. It appears whole or not at all.
    ///
    /// # Errors
    /// [`RequestError::InvalidInput`] for a name that is taken or none, and for a directory that is no model;
    /// [`RequestError::Limit`]; [`RequestError::Storage`].
    pub fn add(
        &self,
        name: &str,
        directory: OwnedFd,
        limits: &LimitsConfig,
    ) -> Result<ModelView, RequestError> {
        check_name(name).map_err(RequestError::InvalidInput)?;
        self.refuse_taken(name)?;
        let what = format!("the model {name}");
        copy::check_directory(&what, directory.as_fd())?;
        let place = self.own.join(name);
        let incoming = self.beside(INCOMING, name);
        copy::create_directory(&incoming)?;
        let copied = copy::copy_model(
            &what,
            directory.as_fd(),
            Reader::Administrator,
            &incoming,
            limits.model_bytes,
            &mut |_, _| Ok(()),
        )
        .and_then(|()| {
            view(name, &incoming).map_err(|problem| RequestError::InvalidInput(format!("{what}: {problem}")))
        })
        .and_then(|_| self.publish(name, &incoming, &place));
        if copied.is_err() {
            let _ = std::fs::remove_dir_all(&incoming);
        }
        copied?;
        copy::sync_directory(&self.own)?;
        view(name, &place).map_err(|problem| RequestError::InvalidInput(format!("{what}: {problem}")))
    }

    fn publish(&self, name: &str, incoming: &Path, place: &Path) -> Result<(), RequestError> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, incoming, CWD, place, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::EXIST) => Err(taken(name, &self.own)),
            Err(error) => Err(storage("rename into place", place, error.into())),
        }
    }

    /// Deletes a model of the own directory. That no run needs it is the caller's to know.
    ///
    /// # Errors
    /// [`RequestError::NoSuchModel`]; [`RequestError::InvalidInput`] for a model of another directory;
    /// [`RequestError::Storage`].
    pub fn remove(&self, name: &str) -> Result<(), RequestError> {
        check_name(name).map_err(RequestError::InvalidInput)?;
        let place = self.own.join(name);
        let aside = self.beside(REMOVED, name);
        match std::fs::rename(&place, &aside) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(match self.get(name) {
                    Some(path) => RequestError::InvalidInput(format!(
                        "the model {name} lies in {}, which is not the daemon's to change; remove it there",
                        path.display()
                    )),
                    None => self.no_such(name),
                });
            }
            Err(error) => return Err(storage("remove", &place, error)),
        }
        copy::sync_directory(&self.own)?;
        std::fs::remove_dir_all(&aside).map_err(|error| storage("remove", &aside, error))
    }

    /// The error for a name that no model has; it lists those that there are.
    pub fn no_such(&self, name: &str) -> RequestError {
        let names: Vec<String> = self.list().into_iter().map(|model| model.name).collect();
        let known = if names.is_empty() { "none is".to_string() } else { names.join(", ") };
        RequestError::NoSuchModel(format!("no model {name:?} is registered; registered: {known}"))
    }

    fn directories(&self) -> impl Iterator<Item = &Path> {
        std::iter::once(self.own.as_path()).chain(self.others.iter().map(PathBuf::as_path))
    }

    fn refuse_taken(&self, name: &str) -> Result<(), RequestError> {
        let place = self.own.join(name);
        // Whatever stands there: also what is no model is not ours to replace.
        if place.symlink_metadata().is_ok() {
            return Err(taken(name, &self.own));
        }
        match self.get(name) {
            Some(path) => Err(taken(name, path.parent().unwrap_or(&path))),
            None => Ok(()),
        }
    }

    /// A name that nothing has: two additions of one model do not meet before one of them is published.
    fn beside(&self, prefix: &str, name: &str) -> PathBuf {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        self.own.join(format!("{prefix}{name}-{}-{number}", std::process::id()))
    }
}

fn taken(name: &str, directory: &Path) -> RequestError {
    RequestError::InvalidInput(format!(
        "a model {name} is registered already, in {}; remove it first, or choose another name",
        directory.display()
    ))
}

/// 1 to 64 letters, digits, `.`, `_` and `-`, not beginning with a dot: a plain file name everywhere.
fn check_name(name: &str) -> Result<(), String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if (1..=64).contains(&name.len()) && !name.starts_with('.') && name.chars().all(plain) {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(format!(
        "{shown:?} is no name for a model: 1 to 64 of A-Z, a-z, 0-9, `.`, `_` and `-`, not beginning with a dot"
    ))
}

/// The model in `directory`, or why it is none.
fn view(name: &str, directory: &Path) -> Result<ModelView, String> {
    let path = directory.join("config.json");
    let cannot = |error: io::Error| format!("cannot read {}: {error}", path.display());
    // Not `File::open` at once: a pipe under this name would hold us for ever.
    if !std::fs::metadata(&path).map_err(cannot)?.is_file() {
        return Err(format!("{} is not a file", path.display()));
    }
    let mut text = Vec::new();
    std::fs::File::open(&path)
        .and_then(|file| file.take(MAX_CONFIG).read_to_end(&mut text))
        .map_err(cannot)?;
    let config: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&text)
        .map_err(|error| format!("{} is not the config of a model: {error}", path.display()))?;
    let entries = std::fs::read_dir(directory)
        .map_err(|error| format!("cannot list {}: {error}", directory.display()))?;
    let bytes = entries
        .flatten()
        .filter_map(|entry| std::fs::metadata(entry.path()).ok())
        .filter(|metadata| metadata.is_file())
        .map(|metadata| metadata.len())
        .sum();
    Ok(ModelView {
        name: name.to_string(),
        directory: directory.display().to_string(),
        bytes,
        architecture: config
            .get("architectures")
            .and_then(|architectures| architectures.get(0)?.as_str())
            .unwrap_or_default()
            .to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::copy::tests::model_in;
    use super::*;
    use std::fs::File;

    fn directory(path: &Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    #[test]
    fn a_model_is_added_listed_found_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let source = model_in(dir.path(), "source");
        let models = Models::open(dir.path().join("state/models"), vec![dir.path().join("absent")]).unwrap();
        assert_eq!(models.list(), []);
        let limits = LimitsConfig::default();
        let added = models.add("Smol-1.7B", directory(&source), &limits).unwrap();
        assert_eq!((added.name.as_str(), added.architecture.as_str()), ("Smol-1.7B", "LlamaForCausalLM"));
        assert_eq!(added.bytes, 39 + 7 + 2, "config, weights, tokenizer");
        assert_eq!(models.list(), std::slice::from_ref(&added));
        assert_eq!(models.get("Smol-1.7B").unwrap().display().to_string(), added.directory);
        assert_eq!(std::fs::read_dir(dir.path().join("state/models")).unwrap().count(), 1);
        let again = models.add("Smol-1.7B", directory(&source), &limits).unwrap_err().to_string();
        assert!(again.contains("is registered already"), "{again}");
        models.remove("Smol-1.7B").unwrap();
        assert_eq!((models.list(), models.get("Smol-1.7B")), (vec![], None));
        let error = models.remove("Smol-1.7B").unwrap_err();
        assert!(
            matches!(&error, RequestError::NoSuchModel(m) if m.contains("registered: none is")),
            "{error}"
        );
    }

    #[test]
    fn the_own_directory_comes_first_and_the_others_are_read_only() {
        let dir = tempfile::tempdir().unwrap();
        let (own, site, vendor) =
            (dir.path().join("own"), dir.path().join("site"), dir.path().join("vendor"));
        model_in(&own, "a");
        model_in(&site, "a");
        model_in(&site, "b");
        model_in(&vendor, "b");
        let broken = model_in(&vendor, "broken");
        std::fs::write(broken.join("config.json"), "{").unwrap();
        std::fs::create_dir(vendor.join("empty")).unwrap();
        model_in(&vendor, "not a name");
        let models = Models::open(own.clone(), vec![site.clone(), vendor]).unwrap();
        let found: Vec<(String, String)> = models.list().into_iter().map(|m| (m.name, m.directory)).collect();
        let at = |path: &Path, name: &str| (name.to_string(), path.join(name).display().to_string());
        assert_eq!(found, [at(&own, "a"), at(&site, "b")]);
        let error = models.remove("b").unwrap_err().to_string();
        assert!(error.contains("not the daemon's to change"), "{error}");
        let source = model_in(dir.path(), "source");
        let error = models.add("b", directory(&source), &LimitsConfig::default()).unwrap_err().to_string();
        assert!(error.contains("is registered already, in"), "{error}");
        assert_eq!(models.get("empty"), None);
        assert!(models.no_such("x").to_string().ends_with("registered: a, b"), "{}", models.no_such("x"));
    }

    #[test]
    fn names_that_are_none_are_refused_and_never_become_paths() {
        let dir = tempfile::tempdir().unwrap();
        let source = model_in(dir.path(), "source");
        let models = Models::open(dir.path().join("own"), vec![]).unwrap();
        for name in ["", ".", "..", "../source", "/etc", "a/b", ".hidden", "a b", "é", &"x".repeat(65)] {
            assert_eq!(models.get(name), None, "{name}");
            let error = models.add(name, directory(&source), &LimitsConfig::default()).unwrap_err();
            assert!(error.to_string().contains("is no name for a model"), "{error}");
            assert!(models.remove(name).is_err());
        }
        assert!(source.exists());
    }

    #[test]
    fn what_fails_leaves_nothing_and_what_was_interrupted_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("own");
        let source = model_in(dir.path(), "source");
        let models = Models::open(own.clone(), vec![]).unwrap();
        let tight = LimitsConfig { model_bytes: 40, ..LimitsConfig::default() };
        let error = models.add("m", directory(&source), &tight).unwrap_err();
        assert!(matches!(error, RequestError::Limit(_)), "{error}");
        let file = File::open(source.join("config.json")).unwrap();
        let error = models.add("m", file.into(), &LimitsConfig::default()).unwrap_err().to_string();
        assert!(error.contains("is a file; pass the directory"), "{error}");
        std::fs::write(source.join("config.json"), "[]").unwrap();
        let error = models.add("m", directory(&source), &LimitsConfig::default()).unwrap_err().to_string();
        assert!(error.contains("is not the config of a model"), "{error}");
        assert_eq!(std::fs::read_dir(&own).unwrap().count(), 0);
        std::fs::create_dir(own.join(".incoming-m-1-0")).unwrap();
        std::fs::create_dir(own.join(".removed-m-1-0")).unwrap();
        Models::open(own.clone(), vec![]).unwrap();
        assert_eq!(std::fs::read_dir(&own).unwrap().count(), 0);
    }
}
