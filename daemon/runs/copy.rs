//! Copies what a client passed: a file, or the files of a model's or an adapter's directory.
//!
//! The daemon runs as another user than its clients and must not become their deputy: it reads nothing for a client
//! that the client could not read alone.
//!
//! * A file comes as a descriptor that the client opened for reading. That the client could open it is the proof that
//!   it may read it; a descriptor that proves nothing (`O_PATH`, write-only) is refused.
//! * A directory comes as a descriptor, too, but the files in it are opened here, by this process's user. Therefore
//!   names are resolved beneath the directory only (`openat2(2)`, `RESOLVE_BENEATH`: a symbolic link that leaves it is
//!   refused, also one to a place the client may well read, since that cannot be known here), and a file must belong
//!   to the client or be readable by everybody. Hugging Face's cache is made of links that leave their directory; the
//!   refusal says how to resolve them.
//!
//! What is copied may change under our hands. What counts is the copy: it is hashed while it is written, and nothing
//! looks at the source again. Reading is at explicit offsets, so that an offset shared with the client plays no part.
//! A source that blocks (a file system in user space) hangs the thread that copies and nothing else.

use super::view::RequestError;
use crate::units::Bytes;
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Bytes read at once.
const PIECE: usize = 1 << 20;
/// Largest `model.safetensors.index.json`.
const MAX_INDEX: usize = 64 << 20;
/// Most files of a model: more than any model has, few enough to be listed.
const MAX_SHARDS: usize = 4096;

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// What the engine reads of a model beside its weights, where it is there.
const BESIDE: [&str; 6] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
];
/// What the engine reads of an adapter.
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// For whom the files of a directory are opened.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reader {
    /// A client with this uid.
    Client(u32),
    /// Somebody who may register models for everybody, and is trusted with what the daemon can read.
    Administrator,
}

/// A copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Copied {
    /// Size.
    pub bytes: u64,
    /// SHA-256 of what was written, in lower-case hexadecimal.
    pub sha256: String,
}

/// Our disk's error, with the path and the system's words.
pub(super) fn storage(action: &str, path: &Path, error: io::Error) -> RequestError {
    let path = path.display();
    RequestError::Storage(match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!("the disk is full: cannot {action} {path} ({error}); free some space and try again")
        }
        _ => format!("cannot {action} {path}: {error}"),
    })
}

/// A directory of ours, for this user and its group.
pub(super) fn create_directory(path: &Path) -> Result<(), RequestError> {
    DirBuilder::new().mode(0o750).create(path).map_err(|error| storage("create", path, error))
}

/// Makes the names in a directory durable.
pub(super) fn sync_directory(path: &Path) -> Result<(), RequestError> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(|error| storage("fsync", path, error))
}

fn kind(file_type: FileType) -> &'static str {
    match file_type {
        FileType::Directory => "a directory",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Symlink => "a symbolic link",
        _ => "not a file",
    }
}

/// What the descriptor stands for, and that it was opened for reading.
fn opened_for_reading(what: &str, fd: BorrowedFd<'_>) -> Result<(FileType, u64), RequestError> {
    let refuse = |problem: &str| Err(RequestError::InvalidInput(format!("{what}: {problem}")));
    let flags = match rustix::fs::fcntl_getfl(fd) {
        Ok(flags) => flags,
        Err(error) => return refuse(&format!("the descriptor cannot be asked for its flags: {error}")),
    };
    if flags.contains(OFlags::PATH) {
        return refuse("was opened with O_PATH, which proves no right to read it; open it for reading");
    }
    if flags & OFlags::RWMODE == OFlags::WRONLY {
        return refuse("was opened for writing only; open it for reading");
    }
    let stat = match rustix::fs::fstat(fd) {
        Ok(stat) => stat,
        Err(error) => return refuse(&format!("cannot be looked at: {error}")),
    };
    Ok((FileType::from_raw_mode(stat.st_mode), stat.st_size.max(0) as u64))
}

/// Whether a passed descriptor is a file to read, of at most `limit` bytes so far. `what` names it in messages, `key`
/// the limit. Returns its size.
pub(super) fn check_file(what: &str, fd: BorrowedFd<'_>, limit: u64, key: &str) -> Result<u64, RequestError> {
    let refuse = |problem: String| Err(RequestError::InvalidInput(format!("{what}: {problem}")));
    match opened_for_reading(what, fd)? {
        (FileType::RegularFile, _)
            if rustix::fs::fstatfs(fd).is_ok_and(|fs| fs.f_type == rustix::fs::PROC_SUPER_MAGIC) =>
        {
            refuse("is a file of /proc, whose content depends on who reads it; pass a copy".into())
        }
        (FileType::RegularFile, size) if size > limit => Err(too_large(what, Some(size), limit, key)),
        (FileType::RegularFile, size) => Ok(size),
        (FileType::Directory, _) => refuse("is a directory; name a file in it".into()),
        (other, _) => {
            refuse(format!("is {}; pass a regular file (write its content to one first)", kind(other)))
        }
    }
}

/// Whether a passed descriptor is a directory to read.
pub(super) fn check_directory(what: &str, fd: BorrowedFd<'_>) -> Result<(), RequestError> {
    match opened_for_reading(what, fd)? {
        (FileType::Directory, _) => Ok(()),
        (FileType::RegularFile, _) => {
            Err(RequestError::InvalidInput(format!("{what}: is a file; pass the directory it lies in")))
        }
        (other, _) => {
            Err(RequestError::InvalidInput(format!("{what}: is {}; pass a directory", kind(other))))
        }
    }
}

fn too_large(what: &str, size: Option<u64>, limit: u64, key: &str) -> RequestError {
    let limit = Bytes(limit);
    let size = size.map_or("grew while it was copied".to_string(), |size| format!("has {}", Bytes(size)));
    RequestError::Limit(format!("{what}: {size}; at most {limit} are taken ({key} in finetuned.toml)"))
}

/// Copies a file to `to`, which must not exist: at most `limit` bytes, hashed on the way, durable when this returns
/// (but for its name). On an error nothing is left behind.
pub(super) fn copy_file(
    what: &str,
    from: BorrowedFd<'_>,
    to: &Path,
    limit: u64,
    key: &str,
) -> Result<Copied, RequestError> {
    // Read-only for everybody: one copy may serve several runs.
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o440)
        .open(to)
        .map_err(|error| storage("create", to, error))?;
    let copied = copy_into(what, from, &mut file, to, limit, key);
    if copied.is_err() {
        let _ = std::fs::remove_file(to);
    }
    copied
}

fn copy_into(
    what: &str,
    from: BorrowedFd<'_>,
    file: &mut File,
    to: &Path,
    limit: u64,
    key: &str,
) -> Result<Copied, RequestError> {
    let mut hasher = Sha256::new();
    let mut bytes = 0u64;
    let mut buffer = vec![0; PIECE];
    loop {
        let read = match rustix::io::pread(from, &mut buffer, bytes) {
            Ok(0) => break,
            Ok(read) => read,
            Err(Errno::INTR) => continue,
            Err(error) => {
                let error = io::Error::from(error);
                return Err(RequestError::InvalidInput(format!("{what}: cannot be read: {error}")));
            }
        };
        bytes += read as u64;
        if bytes > limit {
            return Err(too_large(what, None, limit, key));
        }
        hasher.update(&buffer[..read]);
        file.write_all(&buffer[..read]).map_err(|error| storage("write", to, error))?;
    }
    file.sync_all().map_err(|error| storage("fsync", to, error))?;
    Ok(Copied { bytes, sha256: hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect() })
}

/// Copies what the engine needs of the model in `from` into `to`, an existing directory: `config.json`, the weights
/// (`model.safetensors`, else what the index names) and, where they are there, tokenizer and templates. `keep` is told
/// of every copy.
pub(super) fn copy_model(
    what: &str,
    from: BorrowedFd<'_>,
    reader: Reader,
    to: &Path,
    limit: u64,
    keep: &mut dyn FnMut(&Path, &Copied) -> Result<(), RequestError>,
) -> Result<(), RequestError> {
    let missing = |problem: &str| Err(RequestError::InvalidInput(format!("{what}: {problem}")));
    let there = |name: &str| open_in(what, from, name, reader).map(|file| file.is_some());
    if !there(CONFIG)? {
        return missing("has no config.json; pass the directory of a Hugging Face model");
    }
    let mut names = vec![CONFIG.to_string()];
    if there(SINGLE)? {
        names.push(SINGLE.into());
    } else if let Some(index) = open_in(what, from, INDEX, reader)? {
        names.push(INDEX.into());
        for shard in shards(what, index.as_fd())? {
            if !there(&shard)? {
                return missing(&format!("has no {shard}, which its {INDEX} names; complete the download"));
            }
            names.push(shard);
        }
    } else {
        return missing(&format!("has neither {SINGLE} nor {INDEX}; convert the model to safetensors"));
    }
    for name in BESIDE {
        if there(name)? {
            names.push(name.into());
        }
    }
    copy_all(what, from, reader, &names, to, limit, keep)
}

/// Copies the two files of the PEFT adapter in `from` into `to`, an existing directory.
pub(super) fn copy_adapter(
    what: &str,
    from: BorrowedFd<'_>,
    reader: Reader,
    to: &Path,
    limit: u64,
    keep: &mut dyn FnMut(&Path, &Copied) -> Result<(), RequestError>,
) -> Result<(), RequestError> {
    for name in ADAPTER {
        if open_in(what, from, name, reader)?.is_none() {
            let problem = format!("{what}: has no {name}; pass the directory of a PEFT adapter");
            return Err(RequestError::InvalidInput(problem));
        }
    }
    copy_all(what, from, reader, &ADAPTER.map(String::from), to, limit, keep)
}

fn copy_all(
    what: &str,
    from: BorrowedFd<'_>,
    reader: Reader,
    names: &[String],
    to: &Path,
    limit: u64,
    keep: &mut dyn FnMut(&Path, &Copied) -> Result<(), RequestError>,
) -> Result<(), RequestError> {
    const KEY: &str = "limits.model_bytes";
    let open = |name: &str| {
        open_in(what, from, name, reader)?
            .ok_or_else(|| RequestError::InvalidInput(format!("{what}: {name} vanished while it was copied")))
    };
    // Look at all sizes first: better no copy than half a copy of what is too large.
    let mut total = 0u64;
    for name in names {
        total = total.saturating_add(rustix::fs::fstat(&open(name)?).map_or(0, |s| s.st_size.max(0) as u64));
    }
    if total > limit {
        return Err(too_large(what, Some(total), limit, KEY));
    }
    let mut left = limit;
    for name in names {
        let path = to.join(name);
        if let Some((folder, _)) = name.split_once('/') {
            create_directory(&to.join(folder))?;
        }
        let copied = copy_file(&format!("{what}: {name}"), open(name)?.as_fd(), &path, left, KEY)?;
        left = left.saturating_sub(copied.bytes);
        keep(&path, &copied)?;
        if let Some((folder, _)) = name.split_once('/') {
            sync_directory(&to.join(folder))?;
        }
    }
    sync_directory(to)
}

/// The file names in an index's `weight_map`.
fn shards(what: &str, index: BorrowedFd<'_>) -> Result<BTreeSet<String>, RequestError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let wrong = |problem: String| RequestError::InvalidInput(format!("{what}: {INDEX}: {problem}"));
    let mut text = Vec::new();
    let mut buffer = vec![0; PIECE];
    loop {
        match rustix::io::pread(index, &mut buffer, text.len() as u64) {
            Ok(0) => break,
            Ok(read) => text.extend_from_slice(&buffer[..read]),
            Err(Errno::INTR) => continue,
            Err(error) => return Err(wrong(format!("cannot be read: {}", io::Error::from(error)))),
        }
        if text.len() > MAX_INDEX {
            return Err(wrong("is larger than 64 MiB".into()));
        }
    }
    let index: Index = serde_json::from_slice(&text).map_err(|error| {
        wrong(format!("is no index of safetensors files (`weight_map` of names): {error}"))
    })?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    if names.is_empty() || names.len() > MAX_SHARDS {
        return Err(wrong(format!("names {} files; 1 to {MAX_SHARDS} are taken", names.len())));
    }
    // Only the names of weights: an index must neither leave the directory nor write over another file of the model.
    match names.iter().find(|name| !(is_plain(name) && name.ends_with(".safetensors"))) {
        Some(name) => Err(wrong(format!("names {name:?}, which is not a plain name of a .safetensors file"))),
        None => Ok(names),
    }
}

fn is_plain(name: &str) -> bool {
    name.len() <= 255 && !name.starts_with('.') && !name.chars().any(|c| c == '/' || c.is_control())
}

/// Opens a regular file beneath a directory for `reader`; `None` where there is none of this name.
fn open_in(
    what: &str,
    directory: BorrowedFd<'_>,
    name: &str,
    reader: Reader,
) -> Result<Option<OwnedFd>, RequestError> {
    let refuse = |problem: String| Err(RequestError::InvalidInput(format!("{what}: {name}: {problem}")));
    let opened = match open_beneath(directory, name) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::XDEV | Errno::LOOP) => {
            return refuse(
                "is a symbolic link that leaves the directory, and links are not followed with the daemon's rights; \
                 resolve the links with `cp -rL DIRECTORY COPY` and pass the copy, or register the copy once with \
                 `finetunectl model add`"
                    .into(),
            );
        }
        Err(Errno::ACCESS | Errno::PERM) => {
            return refuse(
                "the daemon, which opens the files of a directory as its own user, may not read it; make it \
                 readable for others (chmod o+r, and o+x for its directory), or pass a copy that is"
                    .into(),
            );
        }
        Err(error) => return refuse(format!("cannot be opened: {}", io::Error::from(error))),
    };
    let stat = match rustix::fs::fstat(&opened) {
        Ok(stat) => stat,
        Err(error) => return refuse(format!("cannot be looked at: {}", io::Error::from(error))),
    };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        other => return refuse(format!("is {}; a regular file is needed", kind(other))),
    }
    let readable = match reader {
        Reader::Administrator | Reader::Client(0) => true,
        Reader::Client(uid) => {
            uid == stat.st_uid || stat.st_mode & 0o004 != 0 || uid == rustix::process::geteuid().as_raw()
        }
    };
    if !readable {
        return refuse(format!(
            "belongs to user {}, and not everybody may read it; pass a directory of files that are yours or \
             readable by all",
            stat.st_uid
        ));
    }
    Ok(Some(opened))
}

fn open_beneath(directory: BorrowedFd<'_>, name: &str) -> rustix::io::Result<OwnedFd> {
    // Not blocking: a pipe under this name must not hold us before we see that it is one.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..16 {
        match rustix::fs::openat2(directory, name, flags, Mode::empty(), resolve) {
            // Something was renamed meanwhile, and the kernel could not be sure.
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::NOSYS) => return open_without_links(directory, name, flags),
            done => return done,
        }
    }
    Err(Errno::AGAIN)
}

/// Where a sandbox has no `openat2`: no symbolic link at all is followed, which is safe and a little stricter.
fn open_without_links(directory: BorrowedFd<'_>, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW;
    match name.split_once('/') {
        None => rustix::fs::openat(directory, name, flags, Mode::empty()),
        Some((folder, name)) => {
            let folder = rustix::fs::openat(directory, folder, flags | OFlags::DIRECTORY, Mode::empty())?;
            open_without_links(folder.as_fd(), name, flags)
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::path::PathBuf;

    /// A directory with the files of a small model (not one that the engine could load).
    pub(in crate::runs) fn model_in(parent: &Path, name: &str) -> PathBuf {
        let directory = parent.join(name);
        std::fs::create_dir_all(directory.join("additional_chat_templates")).unwrap();
        for (file, text) in [
            ("config.json", r#"{"architectures": ["LlamaForCausalLM"]}"#),
            ("model.safetensors", "weights"),
            ("tokenizer.json", "{}"),
            ("additional_chat_templates/tool_use.jinja", "tools"),
            ("README.md", "not needed"),
            ("pytorch_model.bin", "not needed"),
        ] {
            std::fs::write(directory.join(file), text).unwrap();
        }
        directory
    }

    fn copy(from: &Path, reader: Reader, limit: u64) -> Result<Vec<String>, String> {
        let target = tempfile::tempdir().unwrap();
        let directory = File::open(from).unwrap();
        let mut names = Vec::new();
        let mut keep = |path: &Path, copied: &Copied| {
            assert_eq!(std::fs::metadata(path).unwrap().len(), copied.bytes);
            names.push(path.strip_prefix(target.path()).unwrap().to_str().unwrap().to_string());
            Ok(())
        };
        let copied = copy_model("model.base: m", directory.as_fd(), reader, target.path(), limit, &mut keep);
        copied.map(|()| names).map_err(|error| error.to_string())
    }

    fn refusal(from: &Path) -> String {
        copy(from, Reader::Client(rustix::process::geteuid().as_raw()), 1 << 20).unwrap_err()
    }

    #[test]
    fn of_a_model_what_the_engine_reads_is_copied_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let model = model_in(dir.path(), "m");
        assert_eq!(
            copy(&model, Reader::Administrator, 1 << 20).unwrap(),
            [
                "config.json",
                "model.safetensors",
                "tokenizer.json",
                "additional_chat_templates/tool_use.jinja"
            ]
        );
        std::fs::remove_file(model.join("model.safetensors")).unwrap();
        let index =
            r#"{"weight_map": {"a": "x-2.safetensors", "b": "x-1.safetensors", "c": "x-1.safetensors"}}"#;
        std::fs::write(model.join(INDEX), index).unwrap();
        std::fs::write(model.join("x-1.safetensors"), "1").unwrap();
        assert!(refusal(&model).contains("has no x-2.safetensors, which its"), "{}", refusal(&model));
        std::fs::write(model.join("x-2.safetensors"), "2").unwrap();
        std::fs::write(model.join("consolidated.safetensors"), "the same again").unwrap();
        assert_eq!(
            copy(&model, Reader::Administrator, 1 << 20).unwrap()[..4],
            ["config.json", INDEX, "x-1.safetensors", "x-2.safetensors"]
        );
        for name in ["../x.safetensors", "config.json", ".x.safetensors"] {
            std::fs::write(model.join(INDEX), format!("{{\"weight_map\": {{\"a\": \"{name}\"}}}}")).unwrap();
            assert!(refusal(&model).contains("not a plain name"), "{}", refusal(&model));
        }
        std::fs::write(model.join(INDEX), "[]").unwrap();
        assert!(refusal(&model).contains("is no index"), "{}", refusal(&model));
        std::fs::remove_file(model.join(INDEX)).unwrap();
        assert!(refusal(&model).contains("has neither model.safetensors"), "{}", refusal(&model));
        std::fs::remove_file(model.join(CONFIG)).unwrap();
        assert!(refusal(&model).contains("has no config.json"), "{}", refusal(&model));
    }

    #[test]
    fn links_are_followed_within_the_directory_and_never_out_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let model = model_in(dir.path(), "m");
        let weights = model.join(SINGLE);
        std::fs::rename(&weights, model.join("blob")).unwrap();
        let inside = std::os::unix::fs::symlink("blob", &weights);
        inside.unwrap();
        copy(&model, Reader::Administrator, 1 << 20).unwrap();
        std::fs::write(dir.path().join("outside"), "secret").unwrap();
        for target in ["../outside".to_string(), dir.path().join("outside").display().to_string()] {
            std::fs::remove_file(&weights).unwrap();
            std::os::unix::fs::symlink(target, &weights).unwrap();
            let refused = refusal(&model);
            assert!(refused.contains("leaves the directory") && refused.contains("cp -rL"), "{refused}");
        }
    }

    #[test]
    fn what_is_not_a_readable_regular_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let model = model_in(dir.path(), "m");
        let weights = model.join(SINGLE);
        std::fs::remove_file(&weights).unwrap();
        std::fs::create_dir(&weights).unwrap();
        assert!(refusal(&model).contains("model.safetensors: is a directory"), "{}", refusal(&model));
        std::fs::remove_dir(&weights).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &weights, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(refusal(&model).contains("model.safetensors: is a pipe"), "{}", refusal(&model));
    }

    /// The daemon's user can read this file, another client may not.
    #[test]
    fn a_file_that_the_client_could_not_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let model = model_in(dir.path(), "m");
        let uid = rustix::process::geteuid().as_raw() + 4321;
        copy(&model, Reader::Client(uid), 1 << 20).unwrap();
        let private = std::fs::Permissions::from_mode(0o640);
        std::fs::set_permissions(model.join("tokenizer.json"), private).unwrap();
        let refused = copy(&model, Reader::Client(uid), 1 << 20).unwrap_err();
        assert!(refused.contains("tokenizer.json: belongs to user"), "{refused}");
        copy(&model, Reader::Client(0), 1 << 20).unwrap();
    }

    #[test]
    fn a_model_is_measured_before_it_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let model = model_in(dir.path(), "m");
        File::options().write(true).open(model.join(SINGLE)).unwrap().set_len(1 << 40).unwrap();
        let refused = refusal(&model);
        assert!(refused.contains("has 1.0 TiB") || refused.contains("has 1024.0 GiB"), "{refused}");
        assert!(refused.contains("limits.model_bytes"), "{refused}");
    }

    #[test]
    fn a_full_disk_leaves_nothing_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        std::fs::write(&source, "content").unwrap();
        let file = File::open(&source).unwrap();
        let nowhere = dir.path().join("absent/copy");
        let error = copy_file("x", file.as_fd(), &nowhere, 100, "k").unwrap_err();
        assert!(matches!(&error, RequestError::Storage(m) if m.contains("absent/copy")), "{error}");
        let error = storage("write", &nowhere, io::Error::from(Errno::NOSPC));
        assert!(error.to_string().contains("the disk is full: cannot write"), "{error}");
        let to = dir.path().join("copy");
        let error = copy_file("x", file.as_fd(), &to, 3, "k").unwrap_err();
        assert!(matches!(&error, RequestError::Limit(m) if m.contains("grew")), "{error}");
        assert!(!to.exists());
    }

    /// Other file systems answer a read beyond a shrunken file with end of file, too: the copy is what was there.
    #[test]
    fn a_file_that_shrinks_while_it_is_copied_yields_what_was_read() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        std::fs::write(&source, vec![7u8; 64 << 20]).unwrap();
        let file = File::open(&source).unwrap();
        let to = dir.path().join("copy");
        let cut = std::thread::spawn({
            let (source, to) = (source.clone(), to.clone());
            move || {
                while std::fs::metadata(&to).map_or(0, |m| m.len()) < 2 << 20 {
                    std::thread::yield_now();
                }
                File::options().write(true).open(source).unwrap().set_len(1 << 20).unwrap();
            }
        });
        let copied = copy_file("x", file.as_fd(), &to, 1 << 30, "k").unwrap();
        cut.join().unwrap();
        let bytes = std::fs::read(&to).unwrap();
        assert!(copied.bytes >= 2 << 20 && bytes.len() as u64 == copied.bytes, "{copied:?}");
        let again = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(copied.sha256, again);
    }
}
