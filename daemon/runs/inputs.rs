//! From a submission to a run's inputs: what the spec names is copied, so that a run depends on nothing that its owner
//! may change, delete or unmount before the night.
//!
//! ```text
//!   spec text ── parse under /spec ──► paths ──┐
//!   descriptors, by path ─────────────────────┴─ every path has one, every one a path ──► copies ──► spec with the
//!   registered models, by name ───────────────┘                                                      copies' paths
//!
//!   <run>/inputs/train-0-<name>  eval-<name>  init_from/…  model/…     hard links to
//!   <store>/<sha256>                                                   one file per content
//! ```
//!
//! A spec's relative paths mean something to the client only. Here they start at a directory that does not exist,
//! `/spec`, and serve as names of the descriptors that came along; no path of a spec is ever opened.
//!
//! A copy is written to its place in the run, and only then linked into the store. So the store never holds a file
//! that no run has, except after a run was removed; [`sweep`] takes those out, and may do so at any time.

use super::copy::{self, Copied, Reader, storage};
use super::models::Models;
use super::view::{RequestError, Submission};
use crate::config::daemon::LimitsConfig;
use crate::config::spec::Spec;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Longest text of a spec. A spec with every key has 2 KiB.
const MAX_SPEC: usize = 64 << 10;
/// Where relative paths start; nothing is there.
const BASE: &str = "/spec";
/// Longest file name of an input's copy that is taken from the client, in bytes.
const MAX_NAME: usize = 100;
/// Folder of the inputs in a run's directory.
const INPUTS: &str = "inputs";

/// A submission whose inputs are copied.
#[derive(Clone, Debug, PartialEq)]
pub struct Taken {
    /// The spec; its paths are those of the copies, or of a registered model.
    pub spec: Spec,
    /// The run's name.
    pub name: String,
    /// The base: the name of a registered model, or the directory of the copy.
    pub model: String,
}

/// Takes what the submission's spec names into `building`, an existing directory that will be renamed to `place`.
/// `store` is on the same file system. Blocks while it copies. On an error, `building` is as it was.
///
/// # Errors
/// [`RequestError::InvalidSpec`], [`RequestError::InvalidInput`] and [`RequestError::NoSuchModel`] with every mistake
/// of their kind; [`RequestError::Limit`]; [`RequestError::Storage`].
pub fn take(
    submission: &Submission,
    building: &Path,
    place: &Path,
    store: &Path,
    models: &Models,
    limits: &LimitsConfig,
) -> Result<Taken, RequestError> {
    let mut spec = parse(&submission.spec, &submission.spec_name)?;
    let files = by_path(&submission.files)?;
    let plan = plan(&spec, &files, models, limits)?;

    let mut copies = Copies { store, linked: Vec::new() };
    let inputs = building.join(INPUTS);
    let copied = copy::create_directory(&inputs)
        .and_then(|()| create_store(store))
        .and_then(|()| copies.all(&plan, &inputs, submission.owner, limits))
        .and_then(|()| copy::sync_directory(&inputs))
        .and_then(|()| copy::sync_directory(building));
    if let Err(error) = copied {
        let _ = std::fs::remove_dir_all(&inputs);
        copies.undo();
        return Err(error);
    }

    let kept = place.join(INPUTS);
    let mut model = spec.model.base.display().to_string();
    spec.data.train.clear();
    for item in &plan {
        let path = kept.join(&item.name);
        match &item.source {
            Source::Train(_) => spec.data.train.push(path),
            Source::Eval(_) => spec.data.eval = Some(path),
            Source::Adapter(_) => spec.lora.init_from = Some(path),
            Source::Model(_) => {
                model = path.display().to_string();
                spec.model.base = path;
            }
            Source::Registered(directory) => {
                model = item.name.clone();
                spec.model.base = directory.clone();
            }
        }
    }
    Ok(Taken { name: spec.run.name.clone(), spec, model })
}

/// Removes the files of the store that no run has any more; how many, and their bytes. What cannot be removed stays,
/// with a warning in the log.
pub fn sweep(store: &Path) -> Result<(u64, u64), RequestError> {
    let entries = match std::fs::read_dir(store) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((0, 0)),
        Err(error) => return Err(storage("list", store, error)),
    };
    let (mut files, mut bytes) = (0, 0);
    for entry in entries.flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        if !metadata.is_file() || metadata.nlink() != 1 {
            continue;
        }
        // A run may link to it between these lines. It then keeps the content; only the next one has to copy again.
        match std::fs::remove_file(entry.path()) {
            Ok(()) => {
                files += 1;
                bytes += metadata.len();
            }
            Err(error) => {
                tracing::warn!(path = %entry.path().display(), %error, "an input that no run has cannot be removed");
            }
        }
    }
    Ok((files, bytes))
}

fn create_store(store: &Path) -> Result<(), RequestError> {
    match copy::create_directory(store) {
        Err(_) if store.is_dir() => Ok(()),
        created => created,
    }
}

fn parse(text: &str, file_name: &str) -> Result<Spec, RequestError> {
    if text.len() > MAX_SPEC {
        let problem =
            format!("the spec has {} bytes, at most {MAX_SPEC} are taken; is it a data file?", text.len());
        return Err(RequestError::InvalidSpec(problem));
    }
    let file_name = plain_name(file_name, "spec.toml");
    Spec::parse(text, &file_name, Path::new(BASE), &[])
        .map_err(|error| RequestError::InvalidSpec(error.to_string()))
}

/// A path as a spec writes it, as the spec's paths are after parsing.
fn absolute(path: &str) -> PathBuf {
    Path::new(BASE).join(path).components().collect()
}

/// A path of a parsed spec, as a person knows it. Control characters of a client have no place in messages and logs.
fn shown(path: &Path) -> String {
    let path = path.strip_prefix(BASE).unwrap_or(path).to_string_lossy();
    path.replace(char::is_control, "\u{fffd}")
}

type Files<'a> = BTreeMap<PathBuf, &'a OwnedFd>;

fn by_path(files: &[(String, OwnedFd)]) -> Result<Files<'_>, RequestError> {
    let mut found = BTreeMap::new();
    for (path, fd) in files {
        if found.insert(absolute(path), fd).is_some() {
            let problem = format!("{}: was passed twice; pass one descriptor for it", shown(&absolute(path)));
            return Err(RequestError::InvalidInput(problem));
        }
    }
    Ok(found)
}

/// One input: where it comes from, and its name in `inputs/` (for a registered model, its own name).
struct Item<'a> {
    what: String,
    name: String,
    source: Source<'a>,
}

enum Source<'a> {
    Train(&'a OwnedFd),
    Eval(&'a OwnedFd),
    Adapter(&'a OwnedFd),
    Model(&'a OwnedFd),
    Registered(PathBuf),
}

/// Pairs paths with descriptors and looks at all of them, before anything is copied.
fn plan<'a>(
    spec: &Spec,
    files: &Files<'a>,
    models: &Models,
    limits: &LimitsConfig,
) -> Result<Vec<Item<'a>>, RequestError> {
    let mut planner =
        Planner { files, used: Vec::new(), items: Vec::new(), problems: Vec::new(), limit: None };
    planner.model(&spec.model.base, models)?;
    for (at, path) in spec.data.train.iter().enumerate() {
        planner.file("data.train", path, &format!("train-{at}-"), Source::Train, limits);
    }
    if let Some(path) = &spec.data.eval {
        planner.file("data.eval", path, "eval-", Source::Eval, limits);
    }
    if let Some(path) = &spec.lora.init_from {
        planner.directory("lora.init_from", path, "init_from", Source::Adapter);
    }
    for path in files.keys().filter(|path| !planner.used.contains(path)) {
        planner.problems.push(format!(
            "{}: was passed, but the spec does not name it; pass what the spec names, spelt as it is there",
            shown(path)
        ));
    }
    match (planner.problems.is_empty(), planner.limit) {
        (false, _) => Err(RequestError::InvalidInput(planner.problems.join("\n"))),
        (true, Some(limit)) => Err(limit),
        (true, None) => Ok(planner.items),
    }
}

struct Planner<'a, 'f> {
    files: &'f Files<'a>,
    used: Vec<PathBuf>,
    items: Vec<Item<'a>>,
    problems: Vec<String>,
    /// A limit that was met: told when nothing else is wrong.
    limit: Option<RequestError>,
}

impl<'a> Planner<'a, '_> {
    fn passed(&mut self, path: &Path) -> Option<&'a OwnedFd> {
        self.used.push(path.to_path_buf());
        self.files.get(path).copied()
    }

    fn missing(&mut self, what: String) {
        self.problems.push(format!(
            "{what}: was not passed; a client opens the files of a spec and passes their descriptors, as finetunectl \
             does"
        ));
    }

    fn note(&mut self, error: RequestError) {
        match error {
            RequestError::Limit(_) => self.limit = Some(error),
            other => self.problems.push(other.to_string()),
        }
    }

    fn file(
        &mut self,
        key: &str,
        path: &Path,
        prefix: &str,
        source: fn(&'a OwnedFd) -> Source<'a>,
        limits: &LimitsConfig,
    ) {
        let what = format!("{key}: {}", shown(path));
        let Some(fd) = self.passed(path) else { return self.missing(what) };
        if let Err(error) = copy::check_file(&what, fd.as_fd(), limits.input_bytes, "limits.input_bytes") {
            return self.note(error);
        }
        let name = format!("{prefix}{}", plain_name(&path.to_string_lossy(), "data"));
        self.items.push(Item { what, name, source: source(fd) });
    }

    fn directory(&mut self, key: &str, path: &Path, name: &str, source: fn(&'a OwnedFd) -> Source<'a>) {
        let what = format!("{key}: {}", shown(path));
        let Some(fd) = self.passed(path) else { return self.missing(what) };
        if let Err(error) = copy::check_directory(&what, fd.as_fd()) {
            return self.note(error);
        }
        self.items.push(Item { what, name: name.to_string(), source: source(fd) });
    }

    fn model(&mut self, path: &Path, models: &Models) -> Result<(), RequestError> {
        let what = format!("model.base: {}", shown(path));
        if self.files.contains_key(path) {
            self.directory("model.base", path, "model", Source::Model);
            return Ok(());
        }
        let name = shown(path);
        match models.get(&name) {
            Some(directory) => {
                self.items.push(Item { what, name, source: Source::Registered(directory) });
                Ok(())
            }
            None => Err(RequestError::NoSuchModel(format!(
                "model.base: {}; a directory must be passed as a descriptor, as finetunectl does",
                models.no_such(&name)
            ))),
        }
    }
}

/// Copies in the making, and the names that were added to the store.
struct Copies<'a> {
    store: &'a Path,
    linked: Vec<PathBuf>,
}

impl Copies<'_> {
    fn all(
        &mut self,
        plan: &[Item<'_>],
        inputs: &Path,
        owner: u32,
        limits: &LimitsConfig,
    ) -> Result<(), RequestError> {
        let reader = Reader::Client(owner);
        for item in plan {
            let to = inputs.join(&item.name);
            match &item.source {
                Source::Train(fd) | Source::Eval(fd) => {
                    let limit = limits.input_bytes;
                    let copied = copy::copy_file(&item.what, fd.as_fd(), &to, limit, "limits.input_bytes")?;
                    self.keep(&to, &copied)?;
                }
                Source::Adapter(fd) | Source::Model(fd) => {
                    copy::create_directory(&to)?;
                    let copy = match item.source {
                        Source::Adapter(_) => copy::copy_adapter,
                        _ => copy::copy_model,
                    };
                    let mut keep = |path: &Path, copied: &Copied| self.keep(path, copied);
                    copy(&item.what, fd.as_fd(), reader, &to, limits.model_bytes, &mut keep)?;
                }
                Source::Registered(_) => {}
            }
        }
        copy::sync_directory(self.store)
    }

    /// Makes `path` and the store's file of this content one file.
    fn keep(&mut self, path: &Path, copied: &Copied) -> Result<(), RequestError> {
        let stored = self.store.join(&copied.sha256);
        let beside = path.with_file_name(".linked");
        // Twice at most in practice: a sweep may take the stored file away between our two looks at it.
        for _ in 0..16 {
            match std::fs::hard_link(path, &stored) {
                Ok(()) => {
                    self.linked.push(stored);
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return without_link(path, error),
            }
            match std::fs::symlink_metadata(&stored) {
                Ok(metadata) if metadata.is_file() && metadata.len() == copied.bytes => {}
                Ok(_) => {
                    // Not what its name says: a damaged disk. Ours takes its place, runs that have it keep it.
                    tracing::warn!(path = %stored.display(), "a stored input had another size, replaced");
                    std::fs::remove_file(&stored).map_err(|error| storage("remove", &stored, error))?;
                    continue;
                }
                Err(_) => continue,
            }
            match std::fs::hard_link(&stored, &beside) {
                Ok(()) => {
                    return std::fs::rename(&beside, path)
                        .map_err(|error| storage("rename into place", path, error));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return without_link(path, error),
            }
        }
        Ok(())
    }

    /// Takes back what was added to the store and is no run's.
    fn undo(&self) {
        for path in &self.linked {
            if std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.nlink() == 1) {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

/// A file that cannot be linked (a file system without hard links, too many links) is kept as a copy of its own.
fn without_link(path: &Path, error: io::Error) -> Result<(), RequestError> {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Err(storage("link", path, error)),
        _ => {
            tracing::debug!(path = %path.display(), %error, "kept as a copy of its own");
            Ok(())
        }
    }
}

/// The last component of a client's path as a file name of at most [`MAX_NAME`] bytes: no control characters, and the
/// extension stays, since the format of data is decided by it.
fn plain_name(path: &str, otherwise: &str) -> String {
    let last = path.rsplit('/').find(|part| !part.is_empty()).unwrap_or_default();
    let name: String = last.chars().map(|c| if c.is_control() { '_' } else { c }).collect();
    if name.trim_matches(['.', ' ']).is_empty() {
        return otherwise.to_string();
    }
    let extension = match name.rfind('.') {
        Some(at) if at > 0 && name.len() - at <= 16 => &name[at..],
        _ => "",
    };
    let mut end = name.len() - extension.len();
    while end + extension.len() > MAX_NAME || !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{extension}", &name[..end])
}

#[cfg(test)]
mod tests {
    use super::super::copy::tests::model_in;
    use super::*;
    use rustix::fs::{FileType, MemfdFlags, Mode, OFlags};
    use std::fs::File;
    use std::io::{Seek, Write};

    const SPEC: &str = "[model]\nbase = \"smol\"\n[data]\ntrain = [\"rows.jsonl\"]\n";

    struct Room {
        dir: tempfile::TempDir,
        models: Models,
        limits: LimitsConfig,
    }

    impl Room {
        fn new() -> Room {
            let dir = tempfile::tempdir().unwrap();
            model_in(&dir.path().join("models"), "smol");
            let models = Models::open(dir.path().join("models"), vec![]).unwrap();
            std::fs::create_dir(dir.path().join("client")).unwrap();
            Room { dir, models, limits: LimitsConfig { input_bytes: 1 << 20, ..LimitsConfig::default() } }
        }

        fn client(&self, name: &str) -> PathBuf {
            self.dir.path().join("client").join(name)
        }

        fn store(&self) -> PathBuf {
            self.dir.path().join("store")
        }

        fn file(&self, name: &str, text: &str) -> OwnedFd {
            std::fs::write(self.client(name), text).unwrap();
            File::open(self.client(name)).unwrap().into()
        }

        /// Takes a submission; a failed one must leave nothing.
        fn take(&self, run: &str, spec: &str, files: Vec<(&str, OwnedFd)>) -> Result<Taken, RequestError> {
            let building = self.dir.path().join(format!("building-{run}"));
            std::fs::create_dir(&building).unwrap();
            let place = self.dir.path().join(run);
            let submission = Submission {
                spec: spec.to_string(),
                spec_name: "night.toml".into(),
                files: files.into_iter().map(|(name, fd)| (name.to_string(), fd)).collect(),
                owner: rustix::process::geteuid().as_raw(),
                priority: 0,
                deadline_us: 0,
                hold: false,
            };
            let before = self.stored();
            let taken = take(&submission, &building, &place, &self.store(), &self.models, &self.limits);
            match &taken {
                Ok(_) => std::fs::rename(&building, &place).unwrap(),
                Err(_) => {
                    assert_eq!(std::fs::read_dir(&building).unwrap().count(), 0, "left in the run");
                    assert_eq!(self.stored(), before, "left in the store");
                    std::fs::remove_dir(&building).unwrap();
                }
            }
            taken
        }

        fn refuse(&self, spec: &str, files: Vec<(&str, OwnedFd)>) -> String {
            self.take("refused", spec, files).unwrap_err().to_string()
        }

        fn stored(&self) -> usize {
            std::fs::read_dir(self.store()).map_or(0, |entries| entries.count())
        }
    }

    #[test]
    fn a_spec_gets_the_paths_of_its_copies() {
        let room = Room::new();
        let adapter = room.client("last-night");
        std::fs::create_dir(&adapter).unwrap();
        std::fs::write(adapter.join("adapter_config.json"), "{}").unwrap();
        std::fs::write(adapter.join("adapter_model.safetensors"), "a").unwrap();
        std::fs::write(adapter.join("checkpoint.bin"), "not taken").unwrap();
        let model = model_in(room.dir.path(), "client/elsewhere");
        let spec = "[model]\nbase = \"../elsewhere\"\n[lora]\ninit_from = \"/home/a/./last-night\"\n[data]\n\
                    train = [\"./rows.jsonl\", \"sub/rows.jsonl\"]\neval = \"held.csv\"\n";
        let taken = room
            .take(
                "run",
                spec,
                vec![
                    ("rows.jsonl", room.file("1", "one")),
                    ("./sub//rows.jsonl", room.file("2", "two")),
                    ("held.csv", room.file("3", "three")),
                    ("../elsewhere", File::open(&model).unwrap().into()),
                    ("/home/a/last-night", File::open(&adapter).unwrap().into()),
                ],
            )
            .unwrap();
        let inputs = room.dir.path().join("run/inputs");
        assert_eq!(
            taken.spec.data.train,
            [inputs.join("train-0-rows.jsonl"), inputs.join("train-1-rows.jsonl")]
        );
        assert_eq!(std::fs::read_to_string(&taken.spec.data.train[1]).unwrap(), "two");
        assert_eq!(std::fs::read_to_string(taken.spec.data.eval.unwrap()).unwrap(), "three");
        assert_eq!(taken.spec.model.base, inputs.join("model"));
        assert_eq!(taken.model, inputs.join("model").display().to_string());
        assert!(inputs.join("model/additional_chat_templates/tool_use.jinja").is_file());
        assert_eq!(taken.spec.lora.init_from, Some(inputs.join("init_from")));
        assert_eq!(std::fs::read_dir(inputs.join("init_from")).unwrap().count(), 2);
        assert_eq!(taken.name, "night");
    }

    #[test]
    fn a_registered_model_is_named() {
        let room = Room::new();
        let taken = room.take("run", SPEC, vec![("rows.jsonl", room.file("r", "x"))]).unwrap();
        assert_eq!(
            (taken.model.as_str(), taken.spec.model.base),
            ("smol", room.dir.path().join("models/smol"))
        );
        let other = SPEC.replace("smol", "big");
        let error = room.take("b", &other, vec![("rows.jsonl", room.file("r", "x"))]).unwrap_err();
        assert!(matches!(error, RequestError::NoSuchModel(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains("registered: smol") && text.contains("as a descriptor"), "{text}");
    }

    #[test]
    fn one_content_is_stored_once_until_its_last_run_is_gone() {
        let room = Room::new();
        let one = room.take("one", SPEC, vec![("rows.jsonl", room.file("a", "same"))]).unwrap();
        let two = room.take("two", SPEC, vec![("rows.jsonl", room.file("b", "same"))]).unwrap();
        let three = room.take("three", SPEC, vec![("rows.jsonl", room.file("c", "other"))]).unwrap();
        let inode = |taken: &Taken| std::fs::metadata(&taken.spec.data.train[0]).unwrap().ino();
        assert_eq!(inode(&one), inode(&two));
        assert_ne!(inode(&one), inode(&three));
        assert_eq!(room.stored(), 2);
        assert_eq!(std::fs::read_dir(room.dir.path().join("two/inputs")).unwrap().count(), 1);
        assert_eq!(sweep(&room.store()).unwrap(), (0, 0));
        std::fs::remove_dir_all(room.dir.path().join("one")).unwrap();
        assert_eq!(sweep(&room.store()).unwrap(), (0, 0));
        std::fs::remove_dir_all(room.dir.path().join("two")).unwrap();
        assert_eq!(sweep(&room.store()).unwrap(), (1, 4));
        assert_eq!(std::fs::read_to_string(&three.spec.data.train[0]).unwrap(), "other");
        assert_eq!(sweep(&room.dir.path().join("absent")).unwrap(), (0, 0));
    }

    #[test]
    fn a_stored_file_of_another_size_is_replaced() {
        let room = Room::new();
        room.take("one", SPEC, vec![("rows.jsonl", room.file("a", "same"))]).unwrap();
        let stored = std::fs::read_dir(room.store()).unwrap().next().unwrap().unwrap().path();
        std::fs::remove_file(&stored).unwrap();
        std::fs::write(&stored, "sa").unwrap();
        let two = room.take("two", SPEC, vec![("rows.jsonl", room.file("b", "same"))]).unwrap();
        assert_eq!(std::fs::read_to_string(&two.spec.data.train[0]).unwrap(), "same");
        assert_eq!(std::fs::read_to_string(&stored).unwrap(), "same");
    }

    #[test]
    fn every_descriptor_that_is_no_file_to_read_is_named() {
        let room = Room::new();
        let path = room.client("x");
        std::fs::write(&path, "x").unwrap();
        let refuse = |fd: OwnedFd| room.refuse(SPEC, vec![("rows.jsonl", fd)]);
        let open = |flags| rustix::fs::open(&path, flags, Mode::empty()).unwrap();
        let fifo = room.client("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let fifo = rustix::fs::open(&fifo, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let (pipe, _writer) = rustix::pipe::pipe().unwrap();
        let cases: [(OwnedFd, &str); 8] = [
            (open(OFlags::PATH), "was opened with O_PATH"),
            (open(OFlags::WRONLY), "was opened for writing only"),
            (File::open(room.dir.path()).unwrap().into(), "is a directory; name a file in it"),
            (fifo, "is a pipe"),
            (pipe, "is a pipe"),
            (socket.into(), "is a socket"),
            (File::open("/dev/null").unwrap().into(), "is a device"),
            (File::open("/proc/self/status").unwrap().into(), "is a file of /proc"),
        ];
        for (fd, words) in cases {
            let refused = refuse(fd);
            assert!(refused.starts_with("data.train: rows.jsonl: "), "{refused}");
            assert!(refused.contains(words), "{words}: {refused}");
        }
    }

    #[test]
    fn sizes_are_limits() {
        let room = Room::new();
        room.file("big", "");
        File::options().write(true).open(room.client("big")).unwrap().set_len((1 << 20) + 1).unwrap();
        let big = || -> OwnedFd { File::open(room.client("big")).unwrap().into() };
        let error = room.take("r", SPEC, vec![("rows.jsonl", big())]).unwrap_err();
        assert!(
            matches!(&error, RequestError::Limit(m) if m.contains("1.0 MiB are taken (limits.input")),
            "{error}"
        );
    }

    #[test]
    fn a_memory_file_and_an_offset_at_the_end_are_fine() {
        let room = Room::new();
        let mut memory = File::from(rustix::fs::memfd_create("rows", MemfdFlags::CLOEXEC).unwrap());
        memory.write_all(b"in memory").unwrap();
        let taken = room.take("m", SPEC, vec![("rows.jsonl", memory.try_clone().unwrap().into())]).unwrap();
        assert_eq!(std::fs::read_to_string(&taken.spec.data.train[0]).unwrap(), "in memory");
        assert_eq!(memory.stream_position().unwrap(), 9, "the client's offset stays");
    }

    #[test]
    fn what_is_missing_extra_or_twice_is_named_together() {
        let room = Room::new();
        let spec = SPEC.replace("[data]", "[lora]\ninit_from = \"old\"\n[data]");
        let refused = room.refuse(&spec, vec![("row.jsonl", room.file("r", "x"))]);
        let lines: Vec<&str> = refused.lines().collect();
        assert_eq!(lines.len(), 3, "{refused}");
        assert!(lines[0].starts_with("data.train: rows.jsonl: was not passed"), "{refused}");
        assert!(lines[1].starts_with("lora.init_from: old: was not passed"), "{refused}");
        assert!(lines[2].starts_with("row.jsonl: was passed, but the spec does not name it"), "{refused}");
        let rude = vec![("rows.jsonl", room.file("r", "x")), ("\u{1b}[2J\n", room.file("s", "x"))];
        let refused = room.refuse(SPEC, rude);
        assert!(refused.starts_with("\u{fffd}[2J\u{fffd}: was passed, but"), "{refused}");
        let twice = vec![("rows.jsonl", room.file("r", "x")), ("./rows.jsonl", room.file("r", "x"))];
        assert!(room.refuse(SPEC, twice).contains("rows.jsonl: was passed twice"));
        let file = vec![("rows.jsonl", room.file("r", "x")), ("smol", room.file("s", "x"))];
        assert!(room.refuse(SPEC, file).contains("model.base: smol: is a file; pass the directory"));
        let path: OwnedFd =
            rustix::fs::open(room.dir.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let refused = room.refuse(SPEC, vec![("rows.jsonl", room.file("r", "x")), ("smol", path)]);
        assert!(refused.contains("model.base: smol: was opened with O_PATH"), "{refused}");
        let empty: OwnedFd = File::open(room.dir.path()).unwrap().into();
        let files = vec![("rows.jsonl", room.file("r", "x")), ("old", empty)];
        assert!(room.refuse(&spec, files).contains("lora.init_from: old: has no adapter_config.json"));
    }

    #[test]
    fn a_wrong_spec_is_refused_with_all_its_mistakes() {
        let room = Room::new();
        let error = room.take("w", "[lora]\nr = 0\nalpha = -1\n", vec![]).unwrap_err();
        let RequestError::InvalidSpec(text) = error else { panic!("{error}") };
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(text.contains("night.toml:2:1: lora.r"), "{text}");
        let long = room.refuse(&"#".repeat(MAX_SPEC + 1), vec![]);
        assert!(long.contains("is it a data file"), "{long}");
        assert!(room.refuse("a = \u{0}", vec![]).contains("not valid TOML"));
    }

    #[test]
    fn a_disk_that_refuses_is_named() {
        let room = Room::new();
        std::fs::write(room.store(), "in the way").unwrap();
        let error = room.take("d", SPEC, vec![("rows.jsonl", room.file("r", "x"))]).unwrap_err();
        assert!(
            matches!(&error, RequestError::Storage(m) if m.starts_with("cannot create") && m.contains("/store")),
            "{error}"
        );
    }

    #[test]
    fn names_of_clients_become_plain_file_names() {
        for (path, name) in [
            ("/a/b/rows.jsonl", "rows.jsonl"),
            ("rows\n.csv", "rows_.csv"),
            ("/a/..", "data"),
            ("", "data"),
            ("/", "data"),
            ("données.jsonl", "données.jsonl"),
        ] {
            assert_eq!(plain_name(path, "data"), name);
        }
        let long = plain_name(&format!("{}.jsonl", "é".repeat(200)), "data");
        assert!(long.len() <= MAX_NAME && long.len() > MAX_NAME - 3 && long.ends_with("é.jsonl"), "{long}");
    }
}
