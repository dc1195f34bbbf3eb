//! Whole runs with `backend = "cuda"`, over the stand-in for the driver: the real program and its real workers, whose CUDA
//! fails. What must hold: the exit code is that of docs/cli.md, nothing is published after the failure, and the next
//! attempt goes on from the last checkpoint to the bits of a run in which nothing failed.

#[path = "worker/daemon.rs"]
#[allow(dead_code, reason = "the daemon of the worker's tests, of which these use a part")]
mod daemon;
#[path = "exactness/fixture.rs"]
#[allow(dead_code, reason = "the fixture of the exactness tests, of which these use a part")]
mod fixture;
#[path = "cuda/foreground.rs"]
mod foreground;
#[path = "cuda/support.rs"]
mod support;
#[path = "cuda/under_the_daemon.rs"]
mod under_the_daemon;
