//! The worker's place in line: last for the processor and the disk, first for the out-of-memory killer.
//!
//! All of it is set by the worker itself, so that it holds however the worker was started, and before it starts a
//! thread: nice level and I/O class belong to a thread, and a new thread takes those of the one that starts it. Nothing
//! here takes more than the launcher gave: a nice level or a score that is higher already stays.

use std::io;

/// What the launcher asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Priorities {
    /// Nice level, 0 to 19.
    pub nice: i32,
    /// `oom_score_adj`, 0 to 1000.
    pub oom_score_adjust: i32,
}

impl Default for Priorities {
    fn default() -> Self {
        Priorities { nice: 10, oom_score_adjust: 900 }
    }
}

impl Priorities {
    /// Puts them in force for the calling thread, those it will start, and the process. What the system refuses is
    /// returned in words; training is possible without.
    pub fn apply(self) -> Vec<String> {
        let mut refused = Vec::new();
        let mut note = |what: &str, result: io::Result<()>| {
            if let Err(error) = result {
                refused.push(format!("{what} stays as it was: {error}"));
            }
        };
        note("the nice level", raise_nice(self.nice));
        note("the out-of-memory score", raise_oom_score(self.oom_score_adjust));
        note("the I/O class", io_class_idle());
        refused
    }
}

fn raise_nice(level: i32) -> io::Result<()> {
    if rustix::process::getpriority_process(None)? < level {
        rustix::process::setpriority_process(None, level)?;
    }
    Ok(())
}

/// proc_pid_oom_score_adj(5): raising needs no privilege.
fn raise_oom_score(score: i32) -> io::Result<()> {
    const FILE: &str = "/proc/self/oom_score_adj";
    let now = std::fs::read_to_string(FILE)?;
    if now.trim().parse::<i32>().is_ok_and(|now| now >= score) {
        return Ok(());
    }
    std::fs::write(FILE, score.to_string())
}

/// ioprio_set(2), which has no wrapper in libc: the calling thread reads and writes when nobody else does.
fn io_class_idle() -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_CLASS_IDLE: libc::c_int = 3;
    const IOPRIO_CLASS_SHIFT: libc::c_int = 13;
    let calling_thread: libc::c_int = 0;
    let priority = IOPRIO_CLASS_IDLE << IOPRIO_CLASS_SHIFT;
    // SAFETY: ioprio_set takes three integers, by value, and touches no memory of this process.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, calling_thread, priority) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
