//! What happens when the GPU cannot go on: the process ends, and nothing is published by it.
//!
//! ```text
//!   error of CUDA ──► end ──► the program's last word (a line, or a report to the daemon) ──► _exit(code)
//! ```
//!
//! After a sticky error every later call fails, and what was computed before it cannot be trusted either. So operations
//! do not return errors that a trainer would have to carry to its end past every file it might write on the way: they end
//! the process where the error is seen. The last checkpoint was read back before it was announced and is what the next
//! attempt goes on from. Destructors and exit handlers are left out, because those of the CUDA driver may wait for a
//! device that never answers.

use finetuned_cuda::Error;
use std::io::Write;
use std::sync::{PoisonError, RwLock};

/// Says what happened, and gives the exit code.
pub type LastWord = Box<dyn Fn(&Error) -> i32 + Send + Sync>;

static LAST_WORD: RwLock<Option<LastWord>> = RwLock::new(None);

/// How this program says it; a later call replaces it. A program that has not said anything panics instead, as tests want
/// it.
pub fn set_last_word(last_word: LastWord) {
    *LAST_WORD.write().unwrap_or_else(PoisonError::into_inner) = Some(last_word);
}

/// Ends the process.
pub fn end(error: &Error) -> ! {
    let last_word = LAST_WORD.read().unwrap_or_else(PoisonError::into_inner);
    let Some(last_word) = &*last_word else { panic!("{error}") };
    let code = last_word(error);
    let _ = std::io::stdout().flush();
    // SAFETY: ends the process without running anything.
    unsafe { libc::_exit(code) }
}
