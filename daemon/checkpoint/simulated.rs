//! File systems for tests: one that loses power, and one that stops or fails at a chosen operation.
//!
//! [`Medium`] keeps two states: what a running process sees, and what would be found after a power cut. fsync of a file
//! moves its content from the first to the second; fsync of a directory moves the changes of its names. At a cut, each
//! change of a name that was not synced has happened or not, independently of the others (no order is promised), and
//! each file that was not synced has its old content, the new one, a part of it, or holes of zeros in it. A cut takes a
//! seed, so that a failing case can be repeated.

use super::filesystem::{FileSystem, Freshness, Name, NewFile};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Read};
use std::path::{Component, Path};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

#[derive(Clone)]
enum Node {
    File { seen: Vec<u8>, durable: Vec<u8> },
    Directory { seen: BTreeMap<OsString, usize>, durable: BTreeMap<OsString, usize> },
}

/// A name in a directory now means this node, or nothing.
#[derive(Clone)]
struct Change {
    directory: usize,
    name: OsString,
    node: Option<usize>,
}

#[derive(Clone)]
struct State {
    nodes: Vec<Node>,
    /// Changes of names that are not durable yet, in order; those of one operation happen together.
    pending: Vec<Vec<Change>>,
    can_exchange: bool,
    syncs: usize,
    /// The fsync, by number, that says it worked and does nothing.
    lying_sync: Option<usize>,
}

/// A disk in memory.
#[derive(Clone)]
pub struct Medium(Arc<Mutex<State>>);

impl Medium {
    pub fn new(can_exchange: bool) -> Medium {
        let root = Node::Directory { seen: BTreeMap::new(), durable: BTreeMap::new() };
        let (pending, syncs, lying_sync) = (Vec::new(), 0, None);
        Medium(Arc::new(Mutex::new(State { nodes: vec![root], pending, can_exchange, syncs, lying_sync })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Number of fsyncs so far.
    pub fn syncs(&self) -> usize {
        self.state().syncs
    }

    /// Lets the fsync with this number (from 0) do nothing.
    pub fn lie_at_sync(&self, number: usize) {
        self.state().lying_sync = Some(number);
    }

    /// What is there after the power failed now and came back.
    pub fn power_cut(&self, seed: u64) -> Medium {
        let mut random = Random(seed);
        let mut state = self.state().clone();
        for changes in std::mem::take(&mut state.pending) {
            if random.below(2) == 0 {
                state.make_durable(&changes);
            }
        }
        for node in &mut state.nodes {
            match node {
                Node::Directory { seen, durable } => *seen = durable.clone(),
                Node::File { seen, durable } => {
                    if seen != durable {
                        *durable = torn(durable, seen, &mut random);
                    }
                    *seen = durable.clone();
                }
            }
        }
        Medium(Arc::new(Mutex::new(state)))
    }
}

/// Unsynced content as it may lie on the medium.
fn torn(old: &[u8], new: &[u8], random: &mut Random) -> Vec<u8> {
    const SECTOR: usize = 16; // small, because the files of the tests are
    match random.below(4) {
        0 => old.to_vec(),
        1 => new.to_vec(),
        2 => new[..random.below(new.len() + 1)].to_vec(),
        _ => {
            let mut content = new.to_vec();
            for sector in content.chunks_mut(SECTOR) {
                if random.below(2) == 0 {
                    sector.fill(0);
                }
            }
            content
        }
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }
}

impl State {
    fn find(&self, path: &Path) -> io::Result<usize> {
        let mut at = 0;
        for component in path.components() {
            let Component::Normal(name) = component else { continue };
            match &self.nodes[at] {
                Node::Directory { seen, .. } => at = *seen.get(name).ok_or(Errno::NOENT)?,
                Node::File { .. } => return Err(Errno::NOTDIR.into()),
            }
        }
        Ok(at)
    }

    /// The directory that holds `path`, and the name in it.
    fn slot(&self, path: &Path) -> io::Result<(usize, OsString)> {
        let directory = self.find(path.parent().ok_or(Errno::INVAL)?)?;
        Ok((directory, path.file_name().ok_or(Errno::INVAL)?.to_os_string()))
    }

    fn names(&self, node: usize) -> io::Result<&BTreeMap<OsString, usize>> {
        match &self.nodes[node] {
            Node::Directory { seen, .. } => Ok(seen),
            Node::File { .. } => Err(Errno::NOTDIR.into()),
        }
    }

    fn apply(&mut self, changes: Vec<Change>) {
        for change in &changes {
            if let Node::Directory { seen, .. } = &mut self.nodes[change.directory] {
                set(seen, change);
            }
        }
        self.pending.push(changes);
    }

    fn make_durable(&mut self, changes: &[Change]) {
        for change in changes {
            if let Node::Directory { durable, .. } = &mut self.nodes[change.directory] {
                set(durable, change);
            }
        }
    }

    fn add(&mut self, path: &Path, node: Node) -> io::Result<usize> {
        let (directory, name) = self.slot(path)?;
        if self.names(directory)?.contains_key(&name) {
            return Err(Errno::EXIST.into());
        }
        self.nodes.push(node);
        let node = self.nodes.len() - 1;
        self.apply(vec![Change { directory, name, node: Some(node) }]);
        Ok(node)
    }

    /// Whether this sync is one that works.
    fn sync(&mut self) -> bool {
        self.syncs += 1;
        self.lying_sync != Some(self.syncs - 1)
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let node = self.find(from)?;
        let ((from_directory, from_name), (directory, name)) = (self.slot(from)?, self.slot(to)?);
        self.apply(vec![
            Change { directory: from_directory, name: from_name, node: None },
            Change { directory, name, node: Some(node) },
        ]);
        Ok(())
    }
}

fn set(names: &mut BTreeMap<OsString, usize>, change: &Change) {
    match change.node {
        Some(node) => drop(names.insert(change.name.clone(), node)),
        None => drop(names.remove(&change.name)),
    }
}

struct OpenFile {
    medium: Medium,
    node: usize,
}

impl NewFile for OpenFile {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Node::File { seen, .. } = &mut self.medium.state().nodes[self.node] {
            seen.extend_from_slice(bytes);
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut state = self.medium.state();
        if state.sync()
            && let Node::File { seen, durable } = &mut state.nodes[self.node]
        {
            *durable = seen.clone();
        }
        Ok(())
    }
}

impl FileSystem for Medium {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let node = Node::Directory { seen: BTreeMap::new(), durable: BTreeMap::new() };
        self.state().add(path, node).map(drop)
    }

    fn create_file(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        let node = self.state().add(path, Node::File { seen: Vec::new(), durable: Vec::new() })?;
        Ok(Box::new(OpenFile { medium: self.clone(), node }))
    }

    fn open(&self, path: &Path, _: Freshness) -> io::Result<Box<dyn Read>> {
        let state = self.state();
        match &state.nodes[state.find(path)?] {
            Node::File { seen, .. } => Ok(Box::new(io::Cursor::new(seen.clone()))),
            Node::Directory { .. } => Err(Errno::ISDIR.into()),
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Name>> {
        let state = self.state();
        let names = state.names(state.find(path)?)?;
        let is_directory = |node: usize| matches!(state.nodes[node], Node::Directory { .. });
        Ok(names
            .iter()
            .map(|(name, node)| Name { name: name.clone(), is_directory: is_directory(*node) })
            .collect())
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.find(from)?;
        match state.find(to) {
            Ok(_) => Err(Errno::EXIST.into()),
            Err(_) => state.rename(from, to),
        }
    }

    fn rename_over(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.state().rename(from, to)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        let mut state = self.state();
        if !state.can_exchange {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let (node_a, node_b) = (state.find(a)?, state.find(b)?);
        let ((directory_a, name_a), (directory_b, name_b)) = (state.slot(a)?, state.slot(b)?);
        state.apply(vec![
            Change { directory: directory_a, name: name_a, node: Some(node_b) },
            Change { directory: directory_b, name: name_b, node: Some(node_a) },
        ]);
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        let directory = state.find(path)?;
        if state.sync() {
            let (now, later): (Vec<_>, Vec<_>) = std::mem::take(&mut state.pending)
                .into_iter()
                .partition(|changes| changes.iter().any(|change| change.directory == directory));
            state.pending = later;
            for changes in now {
                state.make_durable(&changes);
            }
        }
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.find(path)?;
        let (directory, name) = state.slot(path)?;
        state.apply(vec![Change { directory, name, node: None }]);
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let node = self.state().find(path)?;
        if !self.state().names(node)?.is_empty() {
            return Err(Errno::NOTEMPTY.into());
        }
        self.remove_file(path)
    }
}

/// What happens at an operation.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// Nothing; operations are counted.
    Never,
    /// The process is dead from this operation on; a write at that moment is half done.
    Dead(usize),
    /// This one operation fails.
    Fails(usize, Errno),
}

/// Another file system with a fault. Operations that change nothing are not counted.
#[derive(Clone)]
pub struct Faulty {
    inner: Arc<dyn FileSystem>,
    fault: Fault,
    count: Arc<AtomicUsize>,
}

impl Faulty {
    pub fn new(inner: Arc<dyn FileSystem>, fault: Fault) -> Faulty {
        Faulty { inner, fault, count: Arc::new(AtomicUsize::new(0)) }
    }

    /// Operations so far.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    fn step(&self) -> io::Result<()> {
        let number = self.count.fetch_add(1, Ordering::SeqCst);
        match self.fault {
            Fault::Dead(at) if number >= at => Err(io::Error::other("the process is dead")),
            Fault::Fails(at, errno) if number == at => Err(errno.into()),
            _ => Ok(()),
        }
    }
}

struct FaultyFile {
    inner: Box<dyn NewFile>,
    faulty: Faulty,
}

impl NewFile for FaultyFile {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if let Err(error) = self.faulty.step() {
            if matches!(self.faulty.fault, Fault::Dead(at) if self.faulty.count() == at + 1) {
                self.inner.write_all(&bytes[..bytes.len() / 2])?;
            }
            return Err(error);
        }
        self.inner.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.faulty.step()?;
        self.inner.sync()
    }
}

impl FileSystem for Faulty {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.inner.create_dir(path)
    }
    fn create_file(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        self.step()?;
        Ok(Box::new(FaultyFile { inner: self.inner.create_file(path)?, faulty: self.clone() }))
    }
    fn open(&self, path: &Path, freshness: Freshness) -> io::Result<Box<dyn Read>> {
        self.inner.open(path, freshness)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<Name>> {
        self.inner.list(path)
    }
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        self.inner.rename_new(from, to)
    }
    fn rename_over(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        self.inner.rename_over(from, to)
    }
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        self.step()?;
        self.inner.exchange(a, b)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.inner.sync_dir(path)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.inner.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.inner.remove_dir(path)
    }
}
