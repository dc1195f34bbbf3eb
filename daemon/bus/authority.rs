//! Who may do what.

use super::error::Result;
use crate::config::daemon::AuthorizationConfig;
use zbus::Connection;
use zbus::message::Header;

/// What a call does, as polkit knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Put a run into the queue.
    Submit,
    /// Steer one's own run.
    ManageOwn,
    /// Steer anybody's run.
    ManageAll,
    /// Add and remove models, reload the configuration.
    Configure,
    /// Hold all training.
    Inhibit,
}

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Uid.
    pub uid: u32,
    /// Unique name on the bus, or a name of ours for a peer's connection.
    pub sender: String,
}

/// The judge.
#[derive(Debug)]
pub struct Authority {
    #[allow(dead_code)]
    config: AuthorizationConfig,
}

impl Authority {
    /// Lets the caller do `action`, or says why not.
    pub async fn allow(
        &self,
        _action: Action,
        _header: &Header<'_>,
        _connection: &Connection,
    ) -> Result<Caller> {
        Err(super::Error::NotAuthorized("not built yet".into()))
    }

    /// Lets the caller steer a run of `owner`: its own under [`Action::ManageOwn`], another's under
    /// [`Action::ManageAll`].
    pub async fn allow_run(
        &self,
        _owner: u32,
        _header: &Header<'_>,
        _connection: &Connection,
    ) -> Result<Caller> {
        Err(super::Error::NotAuthorized("not built yet".into()))
    }
}
