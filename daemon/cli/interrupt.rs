//! Ctrl-C and SIGTERM while a run is in the foreground.
//!
//! ```text
//!                    SIGINT or SIGTERM                      SIGINT
//!   preparing ──────────────────────────► exit 130
//!       │ training starts
//!       ▼
//!   training ───────────────────────────► stopping ───────────────────► exit 130
//!                                            │ checkpoint written
//!                                            ▼
//!                                         exit 130
//! ```
//!
//! While a run is being prepared there is nothing to lose: the process just ends. Later the first signal raises a flag
//! that the gate reads before the next micro-step, and the second Ctrl-C ends the process where it stands (checkpoints
//! are written so that this does no harm). A second SIGTERM changes nothing: service managers may send several.

use super::console;
use super::exit::{Exit, Failure};
use crate::train::gate::UntilRaised;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Listens to signals.
pub struct Interrupt {
    nothing_to_lose: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    messages: signal_hook::iterator::Handle,
}

impl Interrupt {
    /// Starts listening, in the state "preparing".
    pub fn listen() -> Result<Interrupt, Failure> {
        Self::register()
            .map_err(|error| Failure::new(anyhow::Error::from(error).context("cannot listen to signals")))
    }

    fn register() -> std::io::Result<Interrupt> {
        use signal_hook::flag;
        let nothing_to_lose = Arc::new(AtomicBool::new(true));
        let stop = Arc::new(AtomicBool::new(false));
        let code = Exit::Interrupted as i32;
        // Handlers of one signal run in the order in which they were registered: the flag is raised last, so that the
        // first signal does not see it.
        for signal in [SIGINT, SIGTERM] {
            flag::register_conditional_shutdown(signal, code, nothing_to_lose.clone())?;
        }
        flag::register_conditional_shutdown(SIGINT, code, stop.clone())?;
        for signal in [SIGINT, SIGTERM] {
            flag::register(signal, stop.clone())?;
        }
        // A micro-step can take a while: the answer to the key press must not.
        let mut signals = Signals::new([SIGINT, SIGTERM])?;
        let messages = signals.handle();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            if signals.forever().next().is_some() {
                console::message(
                    "stopping: the current micro-step is finished and a checkpoint is written \
                     (Ctrl-C again: stop at once, without a checkpoint)",
                );
            }
        })?;
        Ok(Interrupt { nothing_to_lose, stop, messages })
    }

    /// From now on there is something to lose.
    pub fn training_starts(&self) {
        self.nothing_to_lose.store(false, Ordering::SeqCst);
    }

    /// The gate that closes when a signal came.
    pub fn gate(&self) -> UntilRaised {
        UntilRaised(self.stop.clone())
    }
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        self.messages.close();
        // What follows may be interrupted at once.
        self.nothing_to_lose.store(true, Ordering::SeqCst);
    }
}
