//! The checkpoints of one run: a directory of directories.
//!
//! ```text
//!   checkpoints/
//!     00000100/        after step 100            adapter.safetensors   optimizer.safetensors
//!     00000117.5/      in step 118, after 5      state.json            MANIFEST.json
//!                      of its sequences          gradients.safetensors (only inside a step)
//!     quarantine/      what did not verify; never deleted by finetuned
//! ```
//!
//! Names order by number: (step, sequences into the next step). A checkpoint is written by `commit`'s protocol, so it is
//! there whole or not at all; it is verified against its manifest when it is read, and the newest one that verifies is
//! the state of the run. One process at a time works on a store ([`super::OutputLock`]).

use super::commit::{self, FileError, NewDirectory};
use super::filesystem::{Disk, FileSystem, Freshness};
use super::manifest::{self, ManifestError};
use super::state::TrainingState;
use super::tensors::{self, NamedTensor, TensorError, TensorRef};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const ADAPTER: &str = "adapter.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const GRADIENTS: &str = "gradients.safetensors";
const STATE: &str = "state.json";
const QUARANTINE: &str = "quarantine";

/// Prefixes of the moments in optimizer.safetensors: torch's names for them.
const FIRST_MOMENT: &str = "exp_avg.";
const SECOND_MOMENT: &str = "exp_avg_sq.";

/// Everything a run needs to go on as if it had never stopped.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Counters, sums, history, identity.
    pub state: TrainingState,
    /// Master weights, under the names PEFT gives them.
    pub parameters: Vec<NamedTensor>,
    /// AdamW's first moments, one for each parameter.
    pub adam_m: Vec<NamedTensor>,
    /// AdamW's second moments.
    pub adam_v: Vec<NamedTensor>,
    /// Gradient accumulators; empty between two steps.
    pub gradients: Vec<NamedTensor>,
}

impl Checkpoint {
    /// Borrows it.
    pub fn as_ref(&self) -> CheckpointRef<'_> {
        fn borrow(tensors: &[NamedTensor]) -> Vec<TensorRef<'_>> {
            tensors.iter().map(NamedTensor::as_ref).collect()
        }
        CheckpointRef {
            state: &self.state,
            parameters: borrow(&self.parameters),
            adam_m: borrow(&self.adam_m),
            adam_v: borrow(&self.adam_v),
            gradients: borrow(&self.gradients),
        }
    }
}

/// A [`Checkpoint`] that borrows the trainer's tensors, to be written without a copy of them.
#[derive(Clone, Debug)]
pub struct CheckpointRef<'a> {
    /// Counters, sums, history, identity.
    pub state: &'a TrainingState,
    /// Master weights, under the names PEFT gives them.
    pub parameters: Vec<TensorRef<'a>>,
    /// AdamW's first moments, one for each parameter.
    pub adam_m: Vec<TensorRef<'a>>,
    /// AdamW's second moments.
    pub adam_v: Vec<TensorRef<'a>>,
    /// Gradient accumulators; empty between two steps.
    pub gradients: Vec<TensorRef<'a>>,
}

/// Why a checkpoint was not written, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// The tensors handed over cannot be written.
    #[error("cannot write a checkpoint of these tensors: {0}")]
    Tensor(#[from] TensorError),
    /// The state cannot be written as JSON.
    #[error("cannot write the training state: {0}")]
    State(#[from] serde_json::Error),
    /// The one checkpoint that is wanted does not verify.
    #[error("checkpoint {path} is damaged: {why}", path = .path.display())]
    Damaged {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A newer version wrote it. Nothing was touched.
    #[error(
        "{path} was written by a newer finetuned (format {format}; this one reads up to {known}): use that version, \
         or another --output",
        path = .path.display(),
        known = manifest::FORMAT
    )]
    Newer {
        /// The checkpoint.
        path: PathBuf,
        /// Its format.
        format: u64,
    },
}

/// A checkpoint that did not verify.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantined {
    /// Where it stood.
    pub path: PathBuf,
    /// Where it is now; `None` when it could not be moved and stands where it stood.
    pub moved_to: Option<PathBuf>,
    /// What is wrong with it.
    pub why: String,
}

/// What a store holds.
#[derive(Debug, Default)]
pub struct Recovered {
    /// The newest checkpoint that verified.
    pub latest: Option<(PathBuf, Checkpoint)>,
    /// Newer ones that did not.
    pub quarantined: Vec<Quarantined>,
}

/// The checkpoints of one run.
pub struct Store {
    directory: PathBuf,
    files: Arc<dyn FileSystem>,
}

/// Position in a run: steps completed, sequences completed within the next one.
type Position = (u64, u64);

fn name_of((step, micro_step): Position) -> String {
    if micro_step == 0 { format!("{step:08}") } else { format!("{step:08}.{micro_step}") }
}

fn position_of(name: &str) -> Option<Position> {
    let (step, micro_step) = name.split_once('.').unwrap_or((name, "0"));
    let position = (step.parse().ok()?, micro_step.parse().ok()?);
    // Only names that this store gives: one position has one name.
    (name_of(position) == name).then_some(position)
}

/// Tensors with a prefix for their names.
fn under<'a>(prefix: &'static str, tensors: &[TensorRef<'a>]) -> Vec<(&'static str, TensorRef<'a>)> {
    tensors.iter().map(|tensor| (prefix, *tensor)).collect()
}

enum LoadError {
    Corrupt(String),
    Newer(u64),
    File(FileError),
}

impl Store {
    /// Opens the store in `directory` (created when absent) and removes what an interrupted write left behind.
    pub fn open(directory: &Path) -> Result<Store, CheckpointError> {
        Store::open_on(Arc::new(Disk), directory)
    }

    /// [`Store::open`] on any file system.
    pub fn open_on(files: Arc<dyn FileSystem>, directory: &Path) -> Result<Store, CheckpointError> {
        ensure_directory(&*files, directory)?;
        commit::sweep(&*files, directory)?;
        Ok(Store { directory: directory.to_path_buf(), files })
    }

    /// Writes a checkpoint. When this returns `Ok`, it is durable and has been read back; after an error, the store
    /// holds what it held before. A checkpoint of the same position is replaced.
    pub fn commit(&self, checkpoint: &CheckpointRef<'_>) -> Result<PathBuf, CheckpointError> {
        let name = name_of((checkpoint.state.step, checkpoint.state.micro_step));
        let place = self.directory.join(&name);
        let adapter = under("", &checkpoint.parameters);
        let mut optimizer = under(FIRST_MOMENT, &checkpoint.adam_m);
        optimizer.extend(under(SECOND_MOMENT, &checkpoint.adam_v));
        let gradients = under("", &checkpoint.gradients);
        // Everything that can be wrong with the content is found before the first file exists.
        let mut parts = vec![(ADAPTER, &adapter), (OPTIMIZER, &optimizer)];
        if !gradients.is_empty() {
            parts.push((GRADIENTS, &gradients));
        }
        let headers =
            parts.iter().map(|(_, tensors)| tensors::header(tensors)).collect::<Result<Vec<_>, _>>()?;
        let state = serde_json::to_vec_pretty(checkpoint.state)?;

        let mut directory = NewDirectory::begin(&*self.files, &place)?;
        for ((file, tensors), header) in parts.iter().zip(&headers) {
            directory.file(file, |out| tensors::write(out, header, tensors))?;
        }
        directory.file(STATE, |out| out.write_all(&state))?;
        let manifest = manifest::render(&name, directory.records());
        directory.file(manifest::NAME, |out| out.write_all(manifest.as_bytes()))?;
        directory.publish()?;
        Ok(place)
    }

    /// The newest checkpoint that verifies. Newer ones that do not are moved to `quarantine/` and reported as
    /// warnings; [`Self::recover`] returns them.
    pub fn load_latest(&self) -> Result<Option<(PathBuf, Checkpoint)>, CheckpointError> {
        let recovered = self.recover()?;
        for bad in &recovered.quarantined {
            let moved = match &bad.moved_to {
                Some(path) => format!("moved to {}", path.display()),
                None => "left where it is".to_string(),
            };
            tracing::warn!("checkpoint {} is damaged ({}); {moved}", bad.path.display(), bad.why);
        }
        Ok(recovered.latest)
    }

    /// The checkpoint taken after `step`.
    ///
    /// # Errors
    /// When it is absent, or does not verify.
    pub fn at_step(&self, step: u64) -> Result<Checkpoint, CheckpointError> {
        let name = name_of((step, 0));
        let path = self.directory.join(&name);
        self.load(&path, &name).map_err(|error| match error {
            LoadError::Corrupt(why) => CheckpointError::Damaged { path, why },
            LoadError::Newer(format) => CheckpointError::Newer { path, format },
            LoadError::File(error) => error.into(),
        })
    }

    /// The newest checkpoint that verifies, and what was quarantined on the way to it.
    pub fn recover(&self) -> Result<Recovered, CheckpointError> {
        let mut recovered = Recovered::default();
        for position in self.positions()?.into_iter().rev() {
            let name = name_of(position);
            let path = self.directory.join(&name);
            match self.load(&path, &name) {
                Ok(checkpoint) => {
                    recovered.latest = Some((path, checkpoint));
                    break;
                }
                Err(LoadError::Corrupt(why)) => {
                    let moved_to = self.quarantine(&path, &name);
                    recovered.quarantined.push(Quarantined { path, moved_to, why });
                }
                Err(LoadError::Newer(format)) => return Err(CheckpointError::Newer { path, format }),
                Err(LoadError::File(error)) => return Err(error.into()),
            }
        }
        Ok(recovered)
    }

    /// Removes all but the newest `keep` checkpoints (at least one) and, where `best_step` is given, the one taken after
    /// that step. Checkpoints inside a step only serve resuming: all but the newest go, and do not count.
    pub fn prune(&self, keep: usize, best_step: Option<u64>) -> Result<(), CheckpointError> {
        let positions = self.positions()?;
        let newest = positions.last().copied();
        let worth: Vec<Position> =
            positions.iter().copied().filter(|p| p.1 == 0 || Some(*p) == newest).collect();
        let kept = &worth[worth.len().saturating_sub(keep.max(1))..];
        let is_kept = |p: &Position| kept.contains(p) || best_step.is_some_and(|best| *p == (best, 0));
        let mut removed = Vec::new();
        for position in positions.iter().filter(|p| !is_kept(p)) {
            let path = self.directory.join(name_of(*position));
            removed.push(commit::set_aside_for_removal(&*self.files, &path)?);
        }
        if !removed.is_empty() {
            let directory = &self.directory;
            self.files.sync_dir(directory).map_err(|source| FileError::new("fsync", directory, source))?;
        }
        for path in removed {
            commit::remove_tree(&*self.files, &path)?;
        }
        Ok(())
    }

    /// Positions of the checkpoints, oldest first.
    fn positions(&self) -> Result<Vec<Position>, FileError> {
        let names = self
            .files
            .list(&self.directory)
            .map_err(|source| FileError::new("list", &self.directory, source))?;
        let mut positions: Vec<Position> = names
            .iter()
            .filter(|name| name.is_directory)
            .filter_map(|name| position_of(name.name.to_str()?))
            .collect();
        positions.sort();
        Ok(positions)
    }

    fn load(&self, path: &Path, name: &str) -> Result<Checkpoint, LoadError> {
        let limit = manifest::MAX_BYTES as u64;
        let (bytes, ..) = self.read(path, manifest::NAME, limit)?;
        let records = manifest::parse(&bytes, name).map_err(|error| match error {
            ManifestError::Corrupt(why) => LoadError::Corrupt(why),
            ManifestError::Newer(format) => LoadError::Newer(format),
        })?;
        // What is parsed is what was hashed: each file is read once.
        let mut parts: Vec<(&str, Vec<u8>)> = Vec::new();
        for record in &records {
            let known =
                [ADAPTER, OPTIMIZER, GRADIENTS, STATE].into_iter().find(|known| *known == record.name);
            let Some(known) = known else {
                return Err(LoadError::Corrupt(format!("{} lists {}", manifest::NAME, record.name)));
            };
            let (bytes, size, sha256) = self.read(path, known, record.size)?;
            if size != record.size {
                let than = if size > record.size { "longer" } else { "shorter" };
                return Err(LoadError::Corrupt(format!(
                    "{known} is {than} than the {} bytes written",
                    record.size
                )));
            }
            if sha256 != record.sha256 {
                let written = &record.sha256;
                return Err(LoadError::Corrupt(format!(
                    "{known} has SHA-256 {sha256}, written was {written}"
                )));
            }
            parts.push((known, bytes));
        }
        let mut take = |name: &str| {
            let at = parts.iter().position(|(known, _)| *known == name)?;
            Some(parts.swap_remove(at).1)
        };
        let mut required = |name: &str| {
            take(name).ok_or_else(|| LoadError::Corrupt(format!("{} lists no {name}", manifest::NAME)))
        };
        let read = |name: &str, bytes: &[u8]| {
            tensors::parse(bytes).map_err(|error| LoadError::Corrupt(format!("{name}: {error}")))
        };
        let state = serde_json::from_slice(&required(STATE)?)
            .map_err(|error| LoadError::Corrupt(format!("{STATE}: {error}")))?;
        let parameters = read(ADAPTER, &required(ADAPTER)?)?;
        let (mut adam_m, mut adam_v) = (Vec::new(), Vec::new());
        for mut tensor in read(OPTIMIZER, &required(OPTIMIZER)?)? {
            let (moments, name) = if let Some(name) = tensor.name.strip_prefix(FIRST_MOMENT) {
                (&mut adam_m, name.to_string())
            } else if let Some(name) = tensor.name.strip_prefix(SECOND_MOMENT) {
                (&mut adam_v, name.to_string())
            } else {
                return Err(LoadError::Corrupt(format!("{OPTIMIZER}: unknown tensor {}", tensor.name)));
            };
            tensor.name = name;
            moments.push(tensor);
        }
        let gradients = match take(GRADIENTS) {
            Some(bytes) => read(GRADIENTS, &bytes)?,
            None => Vec::new(),
        };
        Ok(Checkpoint { state, parameters, adam_m, adam_v, gradients })
    }

    /// Content, size and SHA-256 of a file. What the medium cannot deliver counts as damage; what the system refuses
    /// for another reason (no permission, no memory) is an error that says nothing about the checkpoint.
    fn read(&self, directory: &Path, name: &str, limit: u64) -> Result<(Vec<u8>, u64, String), LoadError> {
        let path = directory.join(name);
        let mut bytes = Vec::new();
        match commit::read_and_hash(&*self.files, &path, Freshness::Cached, limit, |piece| {
            bytes.extend(piece)
        }) {
            Ok((size, sha256)) => Ok((bytes, size, sha256)),
            Err(source) => {
                let medium = source.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
                    || source.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error());
                match source.kind() {
                    io::ErrorKind::NotFound => Err(LoadError::Corrupt(format!("{name} is missing"))),
                    io::ErrorKind::InvalidInput | io::ErrorKind::IsADirectory => {
                        Err(LoadError::Corrupt(format!("{name} is not a file")))
                    }
                    _ if medium => Err(LoadError::Corrupt(format!("{name} cannot be read: {source}"))),
                    _ => Err(LoadError::File(FileError::new("read", &path, source))),
                }
            }
        }
    }

    /// Moves a bad checkpoint away. Failing to is no reason not to go on with a good one.
    fn quarantine(&self, path: &Path, name: &str) -> Option<PathBuf> {
        let quarantine = self.directory.join(QUARANTINE);
        ensure_directory(&*self.files, &quarantine).ok()?;
        for attempt in 0..100 {
            let name = if attempt == 0 { name.to_string() } else { format!("{name}-{attempt}") };
            let target = quarantine.join(name);
            match self.files.rename_new(path, &target) {
                Ok(()) => {
                    let _ = self.files.sync_dir(&quarantine);
                    let _ = self.files.sync_dir(&self.directory);
                    return Some(target);
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty
                    ) => {}
                Err(_) => return None,
            }
        }
        None
    }
}

/// Creates a directory and its parents durably; one that exists is fine.
fn ensure_directory(files: &dyn FileSystem, path: &Path) -> Result<(), FileError> {
    match files.list(path) {
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(FileError::new("open", path, source)),
    }
    let parent = commit::parent(path);
    ensure_directory(files, parent)?;
    match files.create_dir(path) {
        Ok(()) => files.sync_dir(parent).map_err(|source| FileError::new("fsync", parent, source)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(source) => Err(FileError::new("create", path, source)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::simulated::{Fault, Faulty, Medium};
    use super::super::state::tests::state;
    use super::*;
    use rustix::io::Errno;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    fn tensors(names: &[&str], seed: f32) -> Vec<NamedTensor> {
        let tensor = |at: usize, name: &str| NamedTensor {
            name: name.to_string(),
            shape: vec![2, 3],
            data: (0..6).map(|i| seed + (at * 6 + i) as f32 / 7.0).collect(),
        };
        names.iter().enumerate().map(|(at, name)| tensor(at, name)).collect()
    }

    fn checkpoint(step: u64, micro_step: u64, seed: f32) -> Checkpoint {
        let names = ["layer.lora_B", "layer.lora_A"];
        Checkpoint {
            state: state(step, micro_step),
            parameters: tensors(&names, seed),
            adam_m: tensors(&names, seed + 0.25),
            adam_v: tensors(&names, seed + 0.5),
            gradients: if micro_step == 0 { Vec::new() } else { tensors(&names, seed + 0.75) },
        }
    }

    fn open(files: impl FileSystem + 'static) -> Store {
        Store::open_on(Arc::new(files), Path::new("/run/checkpoints")).unwrap()
    }

    fn names(store: &Store) -> Vec<String> {
        let names = store.files.list(&store.directory).unwrap();
        names.into_iter().map(|name| name.name.to_string_lossy().into_owned()).collect()
    }

    /// The newest checkpoint; nothing may have been damaged and nothing may be left over.
    fn latest(store: &Store) -> Option<Checkpoint> {
        let recovered = store.recover().unwrap();
        assert!(recovered.quarantined.is_empty(), "{:?}", recovered.quarantined);
        for name in names(store) {
            assert!(position_of(&name).is_some(), "left over: {name}");
        }
        recovered.latest.map(|(_, checkpoint)| checkpoint)
    }

    #[test]
    fn a_checkpoint_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("new/checkpoints")).unwrap();
        assert!(store.load_latest().unwrap().is_none());
        for (step, micro_step, name) in
            [(9, 0, "00000009"), (9, 11, "00000009.11"), (100_000_000, 0, "100000000")]
        {
            let checkpoint = checkpoint(step, micro_step, 1.0);
            let path = store.commit(&checkpoint.as_ref()).unwrap();
            assert_eq!(path, dir.path().join("new/checkpoints").join(name));
            let (found, loaded) = store.load_latest().unwrap().unwrap();
            assert_eq!((found, &loaded), (path.clone(), &checkpoint));
            assert_eq!(path.join(GRADIENTS).exists(), micro_step > 0);
        }
    }

    #[test]
    fn names_order_by_number() {
        let positions = [(2, 0), (2, 9), (2, 10), (3, 0), (99_999_999, 0), (100_000_000, 0)];
        for position in positions {
            assert_eq!(position_of(&name_of(position)), Some(position));
        }
        for other in
            ["", "2", "00000002.0", "00000002.", "00000002.01", "best", "+0000002", "00000002.x", ".5"]
        {
            assert_eq!(position_of(other), None, "{other:?}");
        }
        let store = open(Medium::new(true));
        for (step, micro_step) in positions.iter().rev() {
            store.commit(&checkpoint(*step, *micro_step, 0.0).as_ref()).unwrap();
        }
        assert_eq!(store.positions().unwrap(), positions);
    }

    #[test]
    fn a_checkpoint_of_the_same_position_is_replaced() {
        for can_exchange in [true, false] {
            let store = open(Medium::new(can_exchange));
            store.commit(&checkpoint(5, 0, 1.0).as_ref()).unwrap();
            store.commit(&checkpoint(5, 0, 2.0).as_ref()).unwrap();
            assert_eq!(latest(&store), Some(checkpoint(5, 0, 2.0)));
        }
    }

    #[test]
    fn pruning_keeps_the_newest_and_the_best() {
        let kept = |keep, best, positions: &[Position]| {
            let store = open(Medium::new(true));
            for (step, micro_step) in positions {
                store.commit(&checkpoint(*step, *micro_step, 0.0).as_ref()).unwrap();
            }
            store.prune(keep, best).unwrap();
            latest(&store);
            store.positions().unwrap()
        };
        let steps = [(1, 0), (2, 0), (3, 0), (4, 0)];
        assert_eq!(kept(2, None, &steps), [(3, 0), (4, 0)]);
        assert_eq!(kept(1, Some(2), &steps), [(2, 0), (4, 0)]);
        assert_eq!(kept(2, Some(4), &steps), [(3, 0), (4, 0)]);
        assert_eq!(kept(0, None, &steps), [(4, 0)]);
        assert_eq!(kept(9, Some(7), &steps), steps);
        assert_eq!(kept(2, None, &[(1, 0), (1, 5), (2, 0), (2, 3), (2, 4)]), [(2, 0), (2, 4)]);
        assert_eq!(kept(2, None, &[(1, 0), (1, 5), (2, 0)]), [(1, 0), (2, 0)]);
    }

    /// What is done to a store that holds the checkpoint of step 1, and the checkpoints it may hold afterwards.
    type Scenario = (&'static str, fn(&Store) -> Result<(), CheckpointError>, Checkpoint);

    fn scenarios() -> Vec<Scenario> {
        vec![
            ("new", |store| store.commit(&checkpoint(1, 3, 2.0).as_ref()).map(drop), checkpoint(1, 3, 2.0)),
            (
                "replace",
                |store| store.commit(&checkpoint(1, 0, 3.0).as_ref()).map(drop),
                checkpoint(1, 0, 3.0),
            ),
            (
                "new, then prune",
                |store| {
                    store.commit(&checkpoint(2, 0, 4.0).as_ref())?;
                    store.prune(1, None)
                },
                checkpoint(2, 0, 4.0),
            ),
        ]
    }

    fn old() -> Checkpoint {
        checkpoint(1, 0, 1.0)
    }

    fn with_old(can_exchange: bool) -> Medium {
        let medium = Medium::new(can_exchange);
        open(medium.clone()).commit(&old().as_ref()).unwrap();
        medium
    }

    /// Runs a scenario on `files` up to a fault; `true` when it was acknowledged.
    fn run(files: &Faulty, act: fn(&Store) -> Result<(), CheckpointError>) -> bool {
        let store = Store::open_on(Arc::new(files.clone()), Path::new("/run/checkpoints"));
        store.and_then(|store| act(&store)).is_ok()
    }

    #[test]
    fn power_may_fail_at_any_operation() {
        let mut images = 0;
        for can_exchange in [true, false] {
            for (what, act, new) in scenarios() {
                let healthy = Faulty::new(Arc::new(with_old(can_exchange)), Fault::Never);
                assert!(run(&healthy, act));
                for operation in 0..=healthy.count() {
                    let medium = with_old(can_exchange);
                    let acknowledged =
                        run(&Faulty::new(Arc::new(medium.clone()), Fault::Dead(operation)), act);
                    assert!(acknowledged || operation < healthy.count(), "{what}, {operation}");
                    for seed in 0..40 {
                        let store = open(medium.power_cut(seed));
                        let found = latest(&store);
                        let case =
                            format!("{what}, exchange {can_exchange}, operation {operation}, seed {seed}");
                        if acknowledged {
                            assert_eq!(found.as_ref(), Some(&new), "{case}");
                        } else {
                            assert!(
                                found == Some(old()) || found.as_ref() == Some(&new),
                                "{case}: {found:?}"
                            );
                        }
                        images += 1;
                    }
                    // The process alone may die, too.
                    let found = latest(&open(medium));
                    assert!(found == Some(old()) || found.as_ref() == Some(&new), "{what}, {operation}");
                }
            }
        }
        assert!(images > 5000, "{images}");
    }

    /// The test above must be able to fail: without any one of the fsyncs before the acknowledgement, some power cut
    /// loses the checkpoint.
    #[test]
    fn no_fsync_is_there_for_nothing() {
        let healthy = with_old(true);
        let before = healthy.syncs();
        let commit = |medium: &Medium| {
            open(medium.clone()).commit(&checkpoint(2, 1, 5.0).as_ref()).unwrap();
        };
        commit(&healthy);
        // Five files, the temporary directory, the store's directory.
        assert_eq!(healthy.syncs() - before, 7);
        for sync in before..healthy.syncs() {
            let medium = with_old(true);
            medium.lie_at_sync(sync);
            commit(&medium);
            let lost = (0..200).any(|seed| {
                let recovered = open(medium.power_cut(seed)).recover().unwrap();
                recovered.latest.map(|(_, found)| found) != Some(checkpoint(2, 1, 5.0))
            });
            assert!(lost, "nobody misses fsync {sync}");
        }
    }

    #[test]
    fn an_operation_that_fails_leaves_what_was_there() {
        for errno in [Errno::NOSPC, Errno::IO, Errno::DQUOT, Errno::ROFS] {
            for can_exchange in [true, false] {
                for (what, act, new) in scenarios() {
                    let healthy = Faulty::new(Arc::new(with_old(can_exchange)), Fault::Never);
                    assert!(run(&healthy, act));
                    for operation in 0..healthy.count() {
                        let medium = with_old(can_exchange);
                        let files = Faulty::new(Arc::new(medium.clone()), Fault::Fails(operation, errno));
                        let store = Store::open_on(Arc::new(files), Path::new("/run/checkpoints")).unwrap();
                        let result = act(&store);
                        let case =
                            format!("{what}, exchange {can_exchange}, operation {operation}: {result:?}");
                        if let Err(CheckpointError::File(error)) = &result {
                            let full = matches!(errno, Errno::NOSPC | Errno::DQUOT);
                            assert_eq!(matches!(error, FileError::DiskFull { .. }), full, "{case}");
                            assert!(error.to_string().contains("/run/checkpoints"), "{case}");
                        }
                        // Nothing is left over without a restart, where nothing but this one operation failed.
                        if what != "new, then prune" && result.is_err() {
                            assert_eq!(latest(&store), Some(old()), "{case}");
                        }
                        let store = open(medium);
                        let found = latest(&store);
                        let held = if result.is_ok() {
                            vec![Some(new.clone())]
                        } else {
                            vec![Some(old()), Some(new.clone())]
                        };
                        assert!(held.contains(&found), "{case}");
                        act(&store).unwrap();
                        assert_eq!(latest(&store), Some(new.clone()), "{case}");
                    }
                }
            }
        }
    }

    /// The same protocol on the machine's own file system, killed at every operation.
    #[test]
    fn a_kill_on_the_real_disk() {
        let fresh = || {
            let dir = tempfile::tempdir().unwrap();
            Store::open(dir.path()).unwrap().commit(&old().as_ref()).unwrap();
            dir
        };
        for (what, act, new) in scenarios() {
            let attempt = |fault| {
                let dir = fresh();
                let files = Faulty::new(Arc::new(Disk), fault);
                let store = Store::open_on(Arc::new(files.clone()), dir.path());
                let acknowledged = store.and_then(|store| act(&store)).is_ok();
                (dir, files.count(), acknowledged)
            };
            let (_, operations, acknowledged) = attempt(Fault::Never);
            assert!(acknowledged, "{what}");
            for operation in 0..=operations {
                let (dir, _, acknowledged) = attempt(Fault::Dead(operation));
                let found = latest(&Store::open(dir.path()).unwrap());
                if acknowledged {
                    assert_eq!(found, Some(new.clone()), "{what}, {operation}");
                } else {
                    assert!(found == Some(old()) || found == Some(new.clone()), "{what}, {operation}");
                }
            }
        }
    }

    #[test]
    fn damage_is_noticed_and_the_previous_checkpoint_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut cases = 0;
        let mut damage = |what: &str, act: &dyn Fn(&Path)| {
            let _ = std::fs::remove_dir_all(dir.path());
            let store = Store::open(dir.path()).unwrap();
            store.commit(&old().as_ref()).unwrap();
            let path = store.commit(&checkpoint(2, 1, 9.0).as_ref()).unwrap();
            act(&path);
            let recovered = store.recover().unwrap();
            assert_eq!(recovered.latest.map(|(_, found)| found), Some(old()), "{what}");
            let [bad] = &recovered.quarantined[..] else { panic!("{what}: {:?}", recovered.quarantined) };
            assert_eq!((bad.path.as_path(), path.exists()), (path.as_path(), false), "{what}");
            let moved_to = bad.moved_to.as_ref().unwrap();
            assert_eq!(moved_to, &dir.path().join("quarantine/00000002.1"), "{what}");
            assert!(moved_to.exists(), "{what}");
            cases += 1;
        };
        for name in [ADAPTER, OPTIMIZER, GRADIENTS, STATE, manifest::NAME] {
            let size = {
                store.commit(&checkpoint(2, 1, 9.0).as_ref()).unwrap();
                std::fs::metadata(dir.path().join("00000002.1").join(name)).unwrap().len()
            };
            for at in [0, 7, 8, size / 3, size / 2, size - 1] {
                for bit in [0, 5] {
                    damage(&format!("{name}: bit {bit} of byte {at}"), &|path| {
                        let file = File::options().read(true).write(true).open(path.join(name)).unwrap();
                        let mut byte = [0];
                        file.read_exact_at(&mut byte, at).unwrap();
                        file.write_all_at(&[byte[0] ^ (1 << bit)], at).unwrap();
                    });
                }
            }
            for length in [0, 1, size / 2, size - 1, size + 1, size + (1 << 20)] {
                damage(&format!("{name}: {length} of {size} bytes"), &|path| {
                    File::options().write(true).open(path.join(name)).unwrap().set_len(length).unwrap();
                });
            }
            damage(&format!("{name}: gone"), &|path| std::fs::remove_file(path.join(name)).unwrap());
            damage(&format!("{name}: a directory"), &|path| {
                std::fs::remove_file(path.join(name)).unwrap();
                std::fs::create_dir(path.join(name)).unwrap();
            });
            damage(&format!("{name}: a link"), &|path| {
                std::fs::rename(path.join(name), path.join("elsewhere")).unwrap();
                std::os::unix::fs::symlink("elsewhere", path.join(name)).unwrap();
            });
        }
        damage("another checkpoint under this name", &|path| {
            std::fs::remove_dir_all(path).unwrap();
            std::fs::create_dir(path).unwrap();
            for entry in std::fs::read_dir(path.with_file_name("00000001")).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), path.join(entry.file_name())).unwrap();
            }
        });
        damage("an empty directory", &|path| {
            std::fs::remove_dir_all(path).unwrap();
            std::fs::create_dir(path).unwrap();
        });
        assert_eq!(cases, 5 * (12 + 6 + 3) + 2);
    }

    #[test]
    fn a_second_bad_checkpoint_of_one_name_does_not_replace_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        for _ in 0..2 {
            let path = store.commit(&checkpoint(2, 0, 9.0).as_ref()).unwrap();
            std::fs::remove_file(path.join(STATE)).unwrap();
            assert!(store.load_latest().unwrap().is_none());
        }
        assert!(dir.path().join("quarantine/00000002").exists());
        assert!(dir.path().join("quarantine/00000002-1").exists());
    }

    #[test]
    fn a_checkpoint_of_a_newer_version_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.commit(&old().as_ref()).unwrap();
        let path = store.commit(&checkpoint(2, 0, 9.0).as_ref()).unwrap();
        let text = std::fs::read_to_string(path.join(manifest::NAME)).unwrap();
        std::fs::write(path.join(manifest::NAME), manifest::with_format(&text, 2)).unwrap();
        match store.load_latest() {
            Err(error @ CheckpointError::Newer { format: 2, .. }) => {
                assert!(error.to_string().contains("newer finetuned"), "{error}")
            }
            other => panic!("{other:?}"),
        }
        assert!(path.exists());
    }

    #[test]
    fn tensors_that_cannot_be_written_are_refused_before_anything_is() {
        let store = open(Medium::new(true));
        let mut bad = checkpoint(1, 0, 0.0);
        bad.adam_v[1].shape = vec![7];
        assert!(matches!(
            store.commit(&bad.as_ref()),
            Err(CheckpointError::Tensor(TensorError::Shape { .. }))
        ));
        assert_eq!(latest(&store), None);
    }

    /// A file system with no room for a second checkpoint. Needs the right to mount; says so where it is not given.
    #[test]
    fn a_full_disk() {
        struct Mounted(tempfile::TempDir);
        impl Drop for Mounted {
            fn drop(&mut self) {
                let _ = std::process::Command::new("umount").arg(self.0.path()).status();
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
            .arg(dir.path())
            .output();
        if !mount.is_ok_and(|output| output.status.success()) {
            eprintln!("SKIPPED a_full_disk: this process may not mount a tmpfs");
            return;
        }
        let mounted = Mounted(dir);
        let store = Store::open(&mounted.0.path().join("checkpoints")).unwrap();
        store.commit(&old().as_ref()).unwrap();
        let mut large = checkpoint(2, 0, 9.0);
        let tensor = NamedTensor { name: "large".into(), shape: vec![1 << 15], data: vec![1.0; 1 << 15] };
        large.parameters.push(tensor);
        match store.commit(&large.as_ref()) {
            Err(CheckpointError::File(error @ FileError::DiskFull { .. })) => {
                let text = error.to_string();
                assert!(text.contains("the disk is full") && text.contains(ADAPTER), "{text}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(latest(&store), Some(old()));
        store.commit(&checkpoint(2, 0, 9.0).as_ref()).unwrap();
        assert_eq!(latest(&store), Some(checkpoint(2, 0, 9.0)));
    }
}
