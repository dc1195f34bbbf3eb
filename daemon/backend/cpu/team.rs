//! A team of threads that share the tasks of one operation at a time.
//!
//! A training step is some thousand short parallel sections (tens of microseconds to a few milliseconds), one after the
//! other. A general pool puts its idle threads to sleep between them, and a wake-up costs as much as a section; here a
//! member spins for [`SPINS`] turns before it sleeps.
//!
//! ```text
//!   caller:  write job ─► state = (generation, open, 0) ─► take tasks ─► close ─► wait until nobody is inside
//!   member:  spin ─► join (state + 1, if open and new) ─► take tasks ─► leave (state − 1) ─► spin … ─► sleep
//! ```
//!
//! A member that comes late (its core does something else) is not waited for: it finds the job closed. Which member
//! does which task is left to chance, so a task's result must not depend on it.
//!
//! Every calling thread has its own team, as large as rayon's pool for that thread says; a section inside a task runs
//! on the thread that meets it.

use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Turns that a member spins for before it sleeps: about 50 µs, longer than the code between two sections.
const SPINS: u32 = 8_000;

/// Bit of the state that says that members may join. The generation stands above it, the number inside below.
const OPEN: u64 = 1 << 31;

/// What a section does: `call(data, task)`.
#[derive(Clone, Copy)]
struct Job {
    data: *const (),
    call: unsafe fn(*const (), usize),
    tasks: usize,
}

struct Shared {
    state: AtomicU64,
    /// The caller's job, on its stack; valid while the state is open or somebody is inside.
    job: AtomicPtr<Job>,
    next: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

struct Team {
    /// Threads asked for, the caller included; there are fewer where the system gave fewer.
    size: usize,
    shared: Arc<Shared>,
    members: Vec<JoinHandle<()>>,
}

thread_local! {
    static TEAM: RefCell<Option<Team>> = const { RefCell::new(None) };
    /// Whether this thread is doing a task of a section.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Threads that a section started here would use.
pub fn threads() -> usize {
    if INSIDE.get() { 1 } else { rayon::current_num_threads() }
}

/// Does `task(0)` … `task(tasks - 1)`, in any order, on all threads of the team; returns when all are done.
///
/// # Panics
/// When a task panicked.
pub fn run<F: Fn(usize) + Sync>(tasks: usize, task: F) {
    let size = threads();
    if size <= 1 || tasks <= 1 {
        (0..tasks).for_each(task);
        return;
    }
    TEAM.with_borrow_mut(|team| {
        if team.as_ref().is_none_or(|team| team.size != size) {
            *team = None; // ends the old members first
            *team = Some(Team::new(size));
        }
        if let Some(team) = team {
            team.run(tasks, &task);
        }
    });
}

impl Team {
    fn new(size: usize) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: AtomicPtr::new(std::ptr::null_mut()),
            next: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        // Where no thread can be started the team is smaller; the results are the same.
        let members = (1..size)
            .filter_map(|i| {
                let shared = shared.clone();
                let name = format!("compute-{i}");
                std::thread::Builder::new().name(name).spawn(move || shared.serve()).ok()
            })
            .collect();
        Self { size, shared, members }
    }

    fn run<F: Fn(usize) + Sync>(&self, tasks: usize, task: &F) {
        unsafe fn call<F: Fn(usize)>(data: *const (), i: usize) {
            // SAFETY: `data` is the `&F` below, alive until everybody has left.
            unsafe { (*data.cast::<F>())(i) }
        }
        let shared = &*self.shared;
        let mut job = Job { data: std::ptr::from_ref(task).cast(), call: call::<F>, tasks };
        shared.job.store(&mut job, Ordering::Relaxed);
        shared.next.store(0, Ordering::Relaxed);
        shared.panicked.store(false, Ordering::Relaxed);
        let generation = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        let closing = Closing(shared);
        shared.state.store(generation << 32 | OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        shared.work(job);
        drop(closing);
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a task of a parallel section panicked");
    }
}

/// Closes the section and waits for those inside, even when the caller's own task panics: the job is on its stack.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut turns = 0u32;
        while self.0.state.load(Ordering::Acquire) & (OPEN - 1) != 0 {
            turns += 1;
            if turns < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

impl Shared {
    /// Takes tasks until none is left.
    fn work(&self, job: Job) {
        INSIDE.set(true);
        struct Outside;
        impl Drop for Outside {
            fn drop(&mut self) {
                INSIDE.set(false);
            }
        }
        let _outside = Outside;
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= job.tasks {
                return;
            }
            // SAFETY: the job is alive: this thread is the caller, or inside.
            unsafe { (job.call)(job.data, i) };
        }
    }

    /// The life of a member.
    fn serve(&self) {
        let mut done = 0;
        loop {
            let Some(state) = self.next_section(done) else { return };
            done = state >> 32;
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                // Closed, or another member joined in between: look again (the generation is not done then).
                done = done.wrapping_sub(1);
                continue;
            }
            // SAFETY: joined while it was open, so the job stays until this thread leaves.
            let job = unsafe { *self.job.load(Ordering::Relaxed) };
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.work(job)));
            if outcome.is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Waits for an open section newer than `done`; `None` when the team ends.
    fn next_section(&self, done: u64) -> Option<u64> {
        let new = |state: u64| state & OPEN != 0 && state >> 32 != done;
        for _ in 0..SPINS {
            let state = self.state.load(Ordering::Acquire);
            if new(state) {
                return Some(state);
            }
            std::hint::spin_loop();
        }
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let found = loop {
            if self.stop.load(Ordering::SeqCst) {
                break None;
            }
            let state = self.state.load(Ordering::SeqCst);
            if new(state) {
                break Some(state);
            }
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        found
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _guard = self.shared.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for member in self.members.drain(..) {
            let _ = member.join();
        }
    }
}

/// Mutable slices of equal chunks, handed to the tasks of a section.
struct Chunks<T> {
    data: *mut T,
    len: usize,
    chunk: usize,
}

// SAFETY: it stands for an exclusive borrow; tasks take disjoint chunks.
unsafe impl<T: Send> Sync for Chunks<T> {}

impl<T> Chunks<T> {
    fn new(data: &mut [T], chunk: usize) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), chunk }
    }

    fn count(&self) -> usize {
        self.len.div_ceil(self.chunk)
    }

    /// # Safety
    /// Each chunk is taken once.
    #[allow(clippy::mut_from_ref)] // that is what the contract is about
    unsafe fn take(&self, i: usize) -> &mut [T] {
        let start = i * self.chunk;
        assert!(start < self.len);
        // SAFETY: inside the slice, disjoint from the other chunks.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), self.chunk.min(self.len - start)) }
    }
}

/// `task(i, chunk i of a)` for chunks of `chunk` elements, on all threads.
pub fn chunks<T: Send>(chunk: usize, a: &mut [T], task: impl Fn(usize, &mut [T]) + Sync) {
    let a = Chunks::new(a, chunk);
    // SAFETY: `run` does each task once.
    run(a.count(), |i| task(i, unsafe { a.take(i) }));
}

/// [`chunks`] of two slices at once.
pub fn chunks2<T: Send>(
    chunk: usize,
    a: &mut [T],
    b: &mut [T],
    task: impl Fn(usize, &mut [T], &mut [T]) + Sync,
) {
    assert_eq!(a.len(), b.len());
    let (a, b) = (Chunks::new(a, chunk), Chunks::new(b, chunk));
    // SAFETY: `run` does each task once.
    run(a.count(), |i| unsafe { task(i, a.take(i), b.take(i)) });
}

/// [`chunks`] of three slices at once.
pub fn chunks3<T: Send>(
    chunk: usize,
    a: &mut [T],
    b: &mut [T],
    c: &mut [T],
    task: impl Fn(usize, &mut [T], &mut [T], &mut [T]) + Sync,
) {
    assert!(a.len() == b.len() && a.len() == c.len());
    let (a, b, c) = (Chunks::new(a, chunk), Chunks::new(b, chunk), Chunks::new(c, chunk));
    // SAFETY: `run` does each task once.
    run(a.count(), |i| unsafe { task(i, a.take(i), b.take(i), c.take(i)) });
}

/// Chunk `i` of a slice that is only read.
pub fn chunk_of<T>(chunk: usize, i: usize, x: &[T]) -> &[T] {
    &x[i * chunk..((i + 1) * chunk).min(x.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_pool(threads: usize, f: impl FnOnce() + Send) {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f);
    }

    #[test]
    fn every_task_is_done_once_however_many_threads_there_are() {
        for threads in [1, 2, 7] {
            in_pool(threads, || {
                for tasks in (0..200).chain([5_000]) {
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    run(tasks, |i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{tasks} tasks");
                }
            });
        }
    }

    #[test]
    fn members_that_fell_asleep_come_back() {
        in_pool(3, || {
            for _ in 0..5 {
                let total = AtomicUsize::new(0);
                run(64, |i| {
                    total.fetch_add(i, Ordering::Relaxed);
                });
                assert_eq!(total.into_inner(), 64 * 63 / 2);
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        });
    }

    #[test]
    fn a_section_inside_a_task_runs_where_it_is() {
        in_pool(4, || {
            let total = AtomicUsize::new(0);
            run(10, |_| {
                let here = std::thread::current().id();
                assert_eq!(threads(), 1);
                run(10, |_| {
                    assert_eq!(std::thread::current().id(), here);
                    total.fetch_add(1, Ordering::Relaxed);
                });
            });
            assert_eq!(total.into_inner(), 100);
        });
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller() {
        in_pool(2, || {
            let panics = std::panic::catch_unwind(|| {
                run(50, |i| {
                    std::thread::sleep(std::time::Duration::from_micros(200));
                    assert!(i != 30);
                })
            });
            assert!(panics.is_err());
            // And the team goes on.
            run(50, |_| {});
        });
    }
}
