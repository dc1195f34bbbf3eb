//! Who may do what.
//!
//! ```text
//!   call ──► who is it? ───────────────────► may it?
//!            bus: the broker says (uid,       root: yes
//!            groups), once per unique name    owner:  the daemon's own user
//!            peer: SO_PEERCRED                group:  members of a group, but only their own runs
//!                                             polkit: polkit says, with the sender as subject
//! ```
//!
//! polkit knows senders of the system bus only. On the session bus and on a peer's socket, the method `polkit` therefore
//! means `owner`. Root is asked nowhere: it could do everything anyway.

use super::error::{Error, Result};
use super::slots::Slots;
use crate::config::daemon::{Authorization, AuthorizationConfig};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::timeout;
use zbus::message::{Flags, Header};
use zbus::names::BusName;
use zbus::{Connection, fdo};
use zbus_polkit::policykit1::{AuthorityProxy, CheckAuthorizationFlags, Subject};

/// Longest wait for polkit when nobody is asked.
const PATIENCE: Duration = Duration::from_secs(10);

/// Longest wait for polkit when a person is asked for a password.
const PATIENCE_WITH_PEOPLE: Duration = Duration::from_secs(120);

/// Longest wait for the broker to say who a caller is.
const PATIENCE_WITH_BROKER: Duration = Duration::from_secs(10);

/// Questions to polkit that one user, and all together, may have open.
const CHECKS: (u32, u32) = (8, 64);

/// Callers that are remembered. A unique name is never given twice, so forgetting is only about memory.
const REMEMBERED: usize = 512;

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

impl Action {
    /// Every action.
    pub const ALL: [Action; 5] =
        [Action::Submit, Action::ManageOwn, Action::ManageAll, Action::Configure, Action::Inhibit];

    /// The name in `org.finetuned.Finetuned1.policy`.
    pub fn id(self) -> &'static str {
        match self {
            Action::Submit => "org.finetuned.Finetuned1.submit",
            Action::ManageOwn => "org.finetuned.Finetuned1.manage-own",
            Action::ManageAll => "org.finetuned.Finetuned1.manage-all",
            Action::Configure => "org.finetuned.Finetuned1.configure",
            Action::Inhibit => "org.finetuned.Finetuned1.inhibit",
        }
    }

    /// What the caller wanted, after "may not".
    fn words(self) -> &'static str {
        match self {
            Action::Submit => "submit runs",
            Action::ManageOwn => "manage its own runs",
            Action::ManageAll => "see into or manage runs of other users",
            Action::Configure => "change models or settings of the daemon",
            Action::Inhibit => "hold all training",
        }
    }

    /// Whether a member of the group may do it without being root.
    fn is_for_members(self) -> bool {
        matches!(self, Action::Submit | Action::ManageOwn | Action::Inhibit)
    }
}

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Uid.
    pub uid: u32,
    /// Unique name on the bus, or a name of ours for a peer's connection.
    pub sender: String,
}

/// Where the calls come from that an [`Authority`] judges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A bus on which polkit knows the senders: the system bus.
    SystemBus,
    /// Another bus.
    Bus,
    /// The socket of one peer, and our name for it.
    Peer(String),
}

/// What is known of a caller.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    uid: u32,
    /// Primary and supplementary groups; absent where they could not be found out.
    groups: Option<Vec<u32>>,
}

/// A uid and its groups, for tests to change.
#[cfg(test)]
pub(super) type Posed = std::sync::Arc<Mutex<(u32, Vec<u32>)>>;

/// The judge of the calls on one connection.
#[derive(Debug)]
pub struct Authority {
    config: AuthorizationConfig,
    origin: Origin,
    /// The daemon's own user.
    own: u32,
    known: Mutex<HashMap<String, Identity>>,
    checks: Slots,
    patience: Duration,
    /// Distinguishes questions to polkit, so that they can be taken back.
    questions: AtomicU64,
    group_file: PathBuf,
    /// Whom tests pose as, instead of who they are.
    #[cfg(test)]
    posed: Option<Posed>,
}

impl Authority {
    /// The judge of calls from `origin`.
    pub fn new(config: AuthorizationConfig, origin: Origin) -> Authority {
        Authority {
            config,
            origin,
            own: rustix::process::geteuid().as_raw(),
            known: Mutex::default(),
            checks: Slots::new(CHECKS.0, CHECKS.1),
            patience: PATIENCE,
            questions: AtomicU64::new(0),
            group_file: "/etc/group".into(),
            #[cfg(test)]
            posed: None,
        }
    }

    /// Waits this long for polkit, when nobody is asked for a password.
    pub fn with_patience(self, patience: Duration) -> Authority {
        Authority { patience, ..self }
    }

    /// A judge that takes every caller for `who` (uid and groups), as the daemon of the user `own`.
    #[cfg(test)]
    pub(super) fn posing(
        config: AuthorizationConfig,
        own: u32,
        who: Posed,
        group_file: &std::path::Path,
    ) -> Authority {
        Authority {
            own,
            posed: Some(who),
            group_file: group_file.into(),
            ..Authority::new(config, Origin::Peer("peer-0".into()))
        }
    }

    /// Lets the caller do `action`, or says why not.
    pub async fn allow(
        &self,
        action: Action,
        header: &Header<'_>,
        connection: &Connection,
    ) -> Result<Caller> {
        let (caller, identity) = self.identify(header, connection).await?;
        let interactive = header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
        self.judge(action, &identity, header, connection, interactive).await?;
        Ok(caller)
    }

    /// Lets the caller steer a run of `owner`: its own under [`Action::ManageOwn`], another's under
    /// [`Action::ManageAll`].
    pub async fn allow_run(
        &self,
        owner: u32,
        header: &Header<'_>,
        connection: &Connection,
    ) -> Result<Caller> {
        let (caller, identity) = self.identify(header, connection).await?;
        let interactive = header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
        if identity.uid != owner {
            self.judge(Action::ManageAll, &identity, header, connection, interactive).await?;
            return Ok(caller);
        }
        let refusal = match self.judge(Action::ManageOwn, &identity, header, connection, interactive).await {
            Ok(()) => return Ok(caller),
            Err(refusal) => refusal,
        };
        // Who may manage all may manage its own; a person who has just said no is not asked again.
        match self.judge(Action::ManageAll, &identity, header, connection, false).await {
            Ok(()) => Ok(caller),
            Err(_) => Err(refusal),
        }
    }

    /// Lets the caller read what is private in a run of `owner`: its own always, another's under
    /// [`Action::ManageAll`].
    pub async fn allow_reading(
        &self,
        owner: u32,
        header: &Header<'_>,
        connection: &Connection,
    ) -> Result<Caller> {
        let (caller, identity) = self.identify(header, connection).await?;
        if identity.uid != owner {
            let interactive = header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
            self.judge(Action::ManageAll, &identity, header, connection, interactive).await?;
        }
        Ok(caller)
    }

    /// Who calls, whatever it may do.
    pub async fn caller(&self, header: &Header<'_>, connection: &Connection) -> Result<Caller> {
        Ok(self.identify(header, connection).await?.0)
    }

    async fn identify(&self, header: &Header<'_>, connection: &Connection) -> Result<(Caller, Identity)> {
        #[cfg(test)]
        if let Some(posed) = &self.posed {
            let (uid, groups) = posed.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let caller = Caller { uid, sender: "peer-0".into() };
            return Ok((caller, Identity { uid, groups: Some(groups) }));
        }
        let unknown = |why: String| Error::NotAuthorized(format!("cannot find out who is calling: {why}"));
        if let Origin::Peer(name) = &self.origin {
            // What a peer writes as its sender is only its word; the socket's credentials are the kernel's.
            let credentials = connection.peer_creds().await.map_err(|error| unknown(error.to_string()))?;
            let uid =
                credentials.unix_user_id().ok_or_else(|| unknown("the socket has no credentials".into()))?;
            let identity = Identity { uid, groups: credentials.unix_group_ids().cloned() };
            return Ok((Caller { uid, sender: name.clone() }, identity));
        }
        let Some(sender) = header.sender() else {
            return Err(unknown("the message names no sender".into()));
        };
        if let Some(identity) = self.known().get(sender.as_str()) {
            return Ok((Caller { uid: identity.uid, sender: sender.to_string() }, identity.clone()));
        }
        let ask = async {
            let bus = fdo::DBusProxy::new(connection).await?;
            bus.get_connection_credentials(BusName::Unique(sender.clone())).await
        };
        let credentials = timeout(PATIENCE_WITH_BROKER, ask)
            .await
            .map_err(|_| unknown("the message bus does not answer".into()))?
            .map_err(|error| unknown(error.to_string()))?;
        let uid = credentials
            .unix_user_id()
            .ok_or_else(|| unknown("the message bus does not know the user".into()))?;
        let identity = Identity { uid, groups: credentials.into_unix_group_ids() };
        let mut known = self.known();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(sender.to_string(), identity.clone());
        Ok((Caller { uid, sender: sender.to_string() }, identity))
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Identity>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn judge(
        &self,
        action: Action,
        who: &Identity,
        header: &Header<'_>,
        connection: &Connection,
        interactive: bool,
    ) -> Result<()> {
        if who.uid == 0 {
            return Ok(());
        }
        let refuse = |why: String| {
            Err(Error::NotAuthorized(format!("user {} may not {}: {why}", who.uid, action.words())))
        };
        let own = who.uid == self.own;
        match self.config.method {
            Authorization::Polkit if self.origin == Origin::SystemBus => {
                self.ask_polkit(action, who, header, connection, interactive).await
            }
            Authorization::Polkit | Authorization::Owner if own => Ok(()),
            Authorization::Polkit | Authorization::Owner => refuse(format!(
                "only user {}, as which the daemon runs, and root may, on this connection",
                self.own
            )),
            Authorization::Group => {
                let group = &self.config.group;
                if !action.is_for_members() {
                    return refuse("only root may".into());
                }
                let found = tokio::fs::read_to_string(&self.group_file).await;
                let gid = match found.as_deref().map(|text| gid_of(text, group)) {
                    Ok(Some(gid)) => gid,
                    Ok(None) => {
                        return refuse(format!(
                            "its members may, but there is no group {group:?} in {}: create it, or set \
                             [authorization] group in finetuned.toml",
                            self.group_file.display()
                        ));
                    }
                    Err(error) => {
                        return refuse(format!("{} cannot be read: {error}", self.group_file.display()));
                    }
                };
                match &who.groups {
                    Some(groups) if groups.contains(&gid) => Ok(()),
                    Some(_) => refuse(format!(
                        "only members of the group {group:?} and root may (a membership counts from the next \
                         login on)"
                    )),
                    None => refuse(format!(
                        "only members of the group {group:?} and root may, and this connection does not tell \
                         the caller's groups"
                    )),
                }
            }
        }
    }

    async fn ask_polkit(
        &self,
        action: Action,
        who: &Identity,
        header: &Header<'_>,
        connection: &Connection,
        interactive: bool,
    ) -> Result<()> {
        let refuse = |why: String| {
            Err(Error::NotAuthorized(format!(
                "user {} may not {} ({}): {why}",
                who.uid,
                action.words(),
                action.id()
            )))
        };
        let Some(_slot) = self.checks.take(&who.uid.to_string()) else {
            return Err(Error::LimitExceeded(format!(
                "user {} waits for {} answers of polkit already: try again later",
                who.uid,
                self.checks.each()
            )));
        };
        let subject = match Subject::new_for_message_header(header) {
            Ok(subject) => subject,
            Err(error) => return refuse(error.to_string()),
        };
        let (flags, patience) = match interactive {
            true => (CheckAuthorizationFlags::ALLOW_USER_INTERACTION, PATIENCE_WITH_PEOPLE),
            false => (CheckAuthorizationFlags::empty(), self.patience),
        };
        let question = format!("finetuned-{}", self.questions.fetch_add(1, Ordering::Relaxed));
        let no_details = HashMap::new();
        let polkit = AuthorityProxy::builder(connection).cache_properties(zbus::proxy::CacheProperties::No);
        let polkit = match timeout(PATIENCE, polkit.build()).await {
            Ok(Ok(polkit)) => polkit,
            Ok(Err(error)) => return refuse(unreachable_polkit(&error.to_string())),
            Err(_) => return refuse(unreachable_polkit("no answer")),
        };
        let asked = polkit.check_authorization(&subject, action.id(), &no_details, flags, &question);
        match timeout(patience, asked).await {
            Ok(Ok(answer)) if answer.is_authorized => Ok(()),
            Ok(Ok(answer)) if answer.details.contains_key("polkit.dismissed") => {
                refuse("the question for a password was dismissed".into())
            }
            Ok(Ok(answer)) if answer.is_challenge && interactive => refuse(
                "it takes a password, and no authentication agent asked for one (start one, for example \
                 `pkttyagent`, or join the group that the daemon trusts)"
                    .into(),
            ),
            Ok(Ok(answer)) if answer.is_challenge => refuse(
                "it takes a password, and the call does not allow that somebody is asked for it".into(),
            ),
            Ok(Ok(_)) => refuse("polkit says no".into()),
            Ok(Err(error)) => refuse(unreachable_polkit(&error.to_string())),
            Err(_) => {
                // Takes the question back; whether that is heard makes no difference here.
                let taken_back = polkit.cancel_check_authorization(&question);
                let _ = timeout(Duration::from_secs(1), taken_back).await;
                refuse(unreachable_polkit(&format!("no answer within {} s", patience.as_secs_f32())))
            }
        }
    }
}

fn unreachable_polkit(why: &str) -> String {
    format!(
        "polkit did not decide ({why}). Check that polkit is installed and runs and that finetuned's policy file is \
         there, or set [authorization] method = \"group\" in finetuned.toml"
    )
}

/// The number of the group `name` in the text of `/etc/group` (group(5): `name:password:gid:members`).
fn gid_of(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next()? == name;
        let gid = fields.nth(1)?.parse().ok()?;
        found.then_some(gid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_by_their_whole_name() {
        let text = "root:x:0:\nfine:x:11:\n# broken\nbad:x:no:\nfinetuned:x:990:ada,grace\n";
        assert_eq!(gid_of(text, "finetuned"), Some(990));
        assert_eq!(gid_of(text, "fine"), Some(11));
        assert_eq!(gid_of(text, "bad"), None);
        assert_eq!(gid_of(text, "tuned"), None);
        assert_eq!(gid_of("", "finetuned"), None);
    }

    #[test]
    fn the_policy_file_has_every_action_and_no_other() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd/org.finetuned.Finetuned1.policy");
        let text = std::fs::read_to_string(file).unwrap();
        let mut listed: Vec<&str> =
            text.split("<action id=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        let mut known: Vec<&str> = Action::ALL.iter().map(|action| action.id()).collect();
        listed.sort();
        known.sort();
        assert_eq!(listed, known);
    }
}
