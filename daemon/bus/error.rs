//! The errors of the interface, `org.finetuned.Finetuned1.Error.*`. Their names are stable, their texts are for people.

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
    /// Something else went wrong.
    Failed(String),
    /// The daemon is going down.
    ShuttingDown(String),
}

/// The answer to a call.
pub type Result<T> = std::result::Result<T, Error>;
