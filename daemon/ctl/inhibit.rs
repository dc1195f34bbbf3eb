//! `finetunectl inhibit`: holds all training while a command runs, or until Ctrl-C. The hold is a descriptor of this
//! process; the command does not inherit it, and the kernel closes it whatever happens to this process.

use super::context::{Context, Interrupt};
use super::exit::{Code, Exit, Failure};
use crate::bus::Dictionary;
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use tokio::process::Command;
use zbus::OwnedFd;

/// Arguments of `finetunectl inhibit`.
#[derive(Args, Debug)]
pub struct InhibitArguments {
    /// The purpose, for people
    #[arg(long, value_name = "TEXT")]
    why: String,
    /// The program, for people [default: the command, else finetunectl]
    #[arg(long, value_name = "NAME")]
    who: Option<String>,
    /// What to run meanwhile [default: wait for Ctrl-C]
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Runs the command.
pub async fn command(arguments: &InhibitArguments, context: &Context) -> Result<Code, Failure> {
    let client = context.client().await?;
    let program = arguments.command.first();
    let who = arguments.who.clone().or_else(|| program.map(|program| program.to_string_lossy().into_owned()));
    let who = who.unwrap_or_else(|| "finetunectl".into());
    let body = ("run", who.as_str(), arguments.why.as_str(), Dictionary::new());
    let hold: OwnedFd = client.call(client.manager.inner(), "Inhibit", &body, None).await?;
    let ended = match program {
        Some(program) => run(program, &arguments.command[1..], context).await,
        None => {
            context.console.message("training is held; Ctrl-C lets it go on");
            // As for any command that is ended so, but it is how this one is meant to end.
            let _ = context.interrupts.next().await;
            Ok(Exit::Done.into())
        }
    };
    drop(hold);
    ended
}

/// Runs a command to its end; the exit code is its own, as a shell reports it.
async fn run(program: &OsString, arguments: &[OsString], context: &Context) -> Result<Code, Failure> {
    // Listening starts before the command does: from the first poll on Ctrl-C does not end this process.
    let mut interrupted = Box::pin(context.interrupts.next());
    tokio::select! {
        biased;
        _ = &mut interrupted => return Err(Failure::silent(Exit::Interrupted)),
        () = std::future::ready(()) => {}
    }
    let mut child = match Command::new(program).args(arguments).spawn() {
        Ok(child) => child,
        Err(error) => {
            let failure = Failure::new(Exit::Error, format!("cannot run {}", program.to_string_lossy()));
            context.console.failure(&failure.because(&error));
            return Ok(Code(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 }));
        }
    };
    loop {
        tokio::select! {
            status = child.wait() => {
                let status = status
                    .map_err(|error| Failure::new(Exit::Error, "cannot wait for the command").because(error))?;
                return Ok(code(status));
            }
            interrupt = &mut interrupted => {
                // The terminal sends Ctrl-C to the command itself; a signal for this process is passed on.
                let pid = child.id().and_then(|pid| Pid::from_raw(pid as i32));
                if let (Interrupt::Terminate, Some(pid)) = (interrupt, pid) {
                    let _ = kill_process(pid, Signal::TERM);
                }
                interrupted = Box::pin(context.interrupts.next());
            }
        }
    }
}

fn code(status: ExitStatus) -> Code {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Code(u8::try_from(code).unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_a_shell() {
        assert_eq!(code(ExitStatus::from_raw(3 << 8)), Code(3));
        assert_eq!(code(ExitStatus::from_raw(15)), Code(143));
    }
}
