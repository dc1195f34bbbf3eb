//! The errors of the interface, `org.finetuned.Finetuned1.Error.*`. Their names are stable, their texts are for people.

use crate::night::NightError;
use crate::runs::{Refusal, RequestError};

/// An error that a call is answered with.
#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.finetuned.Finetuned1.Error")]
pub enum Error {
    /// An error of the bus itself.
    #[zbus(error)]
    ZBus(zbus::Error),
    /// No such run.
    NoSuchRun(String),
    /// A name fits several runs.
    AmbiguousRun(String),
    /// No such model.
    NoSuchModel(String),
    /// No record of such a night.
    NoSuchNight(String),
    /// The spec is wrong.
    InvalidSpec(String),
    /// An argument, or a file that was passed, is wrong.
    InvalidInput(String),
    /// The caller may not do that.
    NotAuthorized(String),
    /// A limit of the configuration.
    LimitExceeded(String),
    /// No space, or the disk refused a write.
    NoSpace(String),
    /// The run has ended.
    AlreadyOver(String),
    /// The run is paused already.
    AlreadyPaused(String),
    /// The run is not paused.
    NotPaused(String),
    /// The run is being cancelled.
    BeingCancelled(String),
    /// The run does not train.
    NotActive(String),
    /// The run has not ended.
    NotOver(String),
    /// The device did not become free in time.
    Busy(String),
    /// Something else went wrong.
    Failed(String),
    /// The daemon is going down.
    ShuttingDown(String),
}

/// The answer to a call.
pub type Result<T> = std::result::Result<T, Error>;

impl From<NightError> for Error {
    fn from(error: NightError) -> Error {
        let text = error.to_string();
        match error {
            NightError::NotADate(_) => Error::InvalidInput(text),
            NightError::NoSuchNight(_) => Error::NoSuchNight(text),
            NightError::File { .. } => Error::Failed(text),
        }
    }
}

impl From<RequestError> for Error {
    fn from(error: RequestError) -> Error {
        let text = error.to_string();
        match error {
            RequestError::NoSuchRun(_) => Error::NoSuchRun(text),
            RequestError::Ambiguous { .. } => Error::AmbiguousRun(text),
            RequestError::NoSuchModel(_) => Error::NoSuchModel(text),
            RequestError::InvalidSpec(_) => Error::InvalidSpec(text),
            RequestError::InvalidInput(_) => Error::InvalidInput(text),
            RequestError::Refused(refusal) => match refusal {
                Refusal::Over(_) => Error::AlreadyOver(text),
                Refusal::AlreadyPaused => Error::AlreadyPaused(text),
                Refusal::NotPaused(_) => Error::NotPaused(text),
                Refusal::BeingCancelled => Error::BeingCancelled(text),
                Refusal::NotActive(_) => Error::NotActive(text),
                Refusal::NotOver(_) => Error::NotOver(text),
                // Nothing that a client asks for leads there.
                Refusal::Impossible { .. } => Error::Failed(text),
            },
            RequestError::Limit(_) => Error::LimitExceeded(text),
            RequestError::Storage(_) => Error::NoSpace(text),
            RequestError::Busy(_) => Error::Busy(text),
            RequestError::Failed(_) => Error::Failed(text),
            RequestError::ShuttingDown => Error::ShuttingDown(text),
        }
    }
}
