//! What an error of the trainer means to the daemon: a reason, whether another attempt may do better, and all of it in
//! words.

use super::protocol::Failed;
use crate::checkpoint::CheckpointError;
use crate::config::spec::SpecError;
use crate::data::DataError;
use crate::reason::Reason;
use crate::train::prepare::PrepareError;
use crate::train::run::RunError;
use std::error::Error;
use std::io;

/// Longest text of a report, in bytes: a model may have thousands of tensors that do not fit.
pub const MAX_TEXT: usize = 16 * 1024;

/// Of a run that ended without a result.
pub fn of_run(error: &RunError) -> Failed {
    let (reason, retry) = match error {
        RunError::Prepare(error) => of_preparation(error),
        RunError::TooLarge { .. } => (Reason::DoesNotFit, false),
        RunError::Lock(_) => (Reason::Launch, true),
        // Cannot be: a worker always resumes.
        RunError::Occupied { .. } => (Reason::InvalidInput, false),
        RunError::Changed { .. } | RunError::Misfit { .. } => (Reason::Changed, false),
        RunError::Checkpoint(CheckpointError::Newer { .. }) => (Reason::Changed, false),
        RunError::Checkpoint(_) | RunError::File(_) | RunError::Metrics(_) | RunError::Adapter(_) => {
            (Reason::Storage, true)
        }
        RunError::Diverged { .. } => (Reason::Diverged, false),
    };
    Failed { reason, message: with_causes(error), retry }
}

/// Of a GPU that cannot go on. The next attempt has a new context; where memory ran out, there may be more of it then.
pub fn of_device(error: &finetuned_cuda::Error) -> Failed {
    let reason = if error.is_out_of_memory() { Reason::OutOfMemory } else { Reason::Device };
    Failed { reason, message: shortened(error.to_string()), retry: true }
}

/// Of a spec that cannot be read.
pub fn of_spec(error: &SpecError) -> Failed {
    Failed { reason: Reason::InvalidInput, message: with_causes(error), retry: false }
}

/// The exit code of a worker whose GPU cannot go on, as in docs/cli.md. The daemon goes by the report.
pub fn exit_code(error: &finetuned_cuda::Error) -> i32 {
    if error.is_out_of_memory() { 9 } else { 4 }
}

fn of_preparation(error: &PrepareError) -> (Reason, bool) {
    if let Some(of_machine) = causes(error).find_map(|cause| of_system(cause.downcast_ref()?)) {
        return (of_machine, true);
    }
    match error {
        PrepareError::Data(DataError::Write { .. } | DataError::Store(_)) => (Reason::Storage, true),
        PrepareError::Device(error) => {
            let failed = of_device(error);
            // What is missing is not there the next time either.
            (failed.reason, matches!(error, finetuned_cuda::Error::Cuda { .. }))
        }
        _ => (Reason::InvalidInput, false),
    }
}

/// Errors of the system that say nothing about the input.
fn of_system(error: &io::Error) -> Option<Reason> {
    use io::ErrorKind::{OutOfMemory, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    match error.kind() {
        StorageFull | QuotaExceeded | ReadOnlyFilesystem => Some(Reason::Storage),
        OutOfMemory => Some(Reason::OutOfMemory),
        _ if error.raw_os_error() == Some(libc::EIO) => Some(Reason::Storage),
        _ => None,
    }
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn Error + 'static)| (*error).source())
}

/// An error with those of its causes that it does not quote itself.
pub fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error).skip(1).map(|cause| cause.to_string()) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// A text that fits in a report.
pub fn shortened(mut text: String) -> String {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
        text.push_str(" … (the rest is left out)");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{LockError, MetricsError};
    use crate::units::Bytes;
    use std::path::PathBuf;

    fn write(errno: i32) -> PrepareError {
        DataError::Write { path: "/cache/tokens".into(), source: io::Error::from_raw_os_error(errno) }.into()
    }

    fn cuda(code: u32) -> finetuned_cuda::Error {
        finetuned_cuda::Error::Cuda { during: "opening Orin".into(), code, name: "CUDA_ERROR".into() }
    }

    #[test]
    fn every_error_has_its_reason() {
        let path = PathBuf::from("/runs/a");
        let unfit = PrepareError::Unfit { key: "lora.layers", value: "9".into(), why: "too many".into() };
        let cases: [(RunError, Reason, bool); 12] = [
            (write(libc::ENOSPC).into(), Reason::Storage, true),
            (write(libc::EDQUOT).into(), Reason::Storage, true),
            (write(libc::EACCES).into(), Reason::Storage, true),
            (write(libc::ENOMEM).into(), Reason::OutOfMemory, true),
            (PrepareError::Device(finetuned_cuda::Error::NoDriver).into(), Reason::Device, false),
            (PrepareError::Device(cuda(999)).into(), Reason::Device, true),
            (PrepareError::Device(cuda(2)).into(), Reason::OutOfMemory, true),
            (unfit.into(), Reason::InvalidInput, false),
            (RunError::TooLarge { needed: Bytes(2), total: Bytes(1) }, Reason::DoesNotFit, false),
            (LockError::Held { directory: path.clone(), pid: Some(7) }.into(), Reason::Launch, true),
            (
                RunError::Misfit { checkpoint: path.clone(), why: "other tensors".into() },
                Reason::Changed,
                false,
            ),
            (CheckpointError::Newer { path: path.clone(), format: 9 }.into(), Reason::Changed, false),
        ];
        for (error, reason, retry) in cases {
            let failed = of_run(&error);
            assert_eq!((failed.reason, failed.retry), (reason, retry), "{error}");
            assert!(failed.message.contains(&error.to_string()));
        }
    }

    #[test]
    fn a_cause_is_told_once_and_a_long_text_is_cut() {
        let error = write(libc::ENOSPC);
        assert_eq!(with_causes(&error).matches("No space left").count(), 1, "{}", with_causes(&error));
        let long = shortened("ä".repeat(MAX_TEXT));
        assert!(long.len() < MAX_TEXT + 64 && long.ends_with("left out)"));
        assert_eq!(shortened("short".into()), "short");
        let _ = |error: MetricsError| of_run(&error.into());
    }
}
