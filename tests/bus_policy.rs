//! What the bus lets through, by the policy file that is shipped, and what polkit then decides. On a bus of the test's own.

#[path = "bus_policy/private_bus.rs"]
#[allow(dead_code)]
mod private_bus;

use finetuned::bus::authority::{Action, Authority, Origin};
use finetuned::config::daemon::{Authorization, AuthorizationConfig};
use private_bus::{NAME, PrivateBus};
use std::time::Duration;
use zbus::connection::Builder;
use zbus::message::Header;
use zbus::{Connection, interface};

/// Users that every Linux distribution has; a message bus turns away uids without an entry in passwd.
const FINETUNED: u32 = 1;
const ADA: u32 = 2;
const BOB: u32 = 3;

/// How long polkit is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

const ROOT: &str = "/org/finetuned/Finetuned1";
const LOG: &str = "/org/freedesktop/LogControl1";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// Stands for the manager: it asks the daemon's authority.
struct Manager(Authority);

#[interface(name = "org.finetuned.Finetuned1.Manager")]
impl Manager {
    /// Asks whether the caller may do it: the last part of an action's name, or `run` and `read` of the owner's.
    async fn ask(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        what: String,
        owner: u32,
    ) -> Result<u32, finetuned::bus::Error> {
        let caller = match what.as_str() {
            "run" => self.0.allow_run(owner, &header, connection).await?,
            "read" => self.0.allow_reading(owner, &header, connection).await?,
            name => {
                let named = |action: &Action| action.id() == format!("{NAME}.{name}");
                let action = Action::ALL.into_iter().find(named).unwrap();
                self.0.allow(action, &header, connection).await?
            }
        };
        Ok(caller.uid)
    }

    #[zbus(property)]
    fn version(&self) -> String {
        "1".into()
    }

    #[zbus(property)]
    fn set_version(&self, _version: String) {}
}

/// An interface that the policy does not know.
struct Secret;

#[interface(name = "org.finetuned.Finetuned1.Secret")]
impl Secret {
    fn tell(&self) -> String {
        "nothing".into()
    }
}

struct Run;

#[interface(name = "org.finetuned.Finetuned1.Run")]
impl Run {
    fn pause(&self) {}
}

struct Log;

#[interface(name = "org.freedesktop.LogControl1")]
impl Log {
    #[zbus(property)]
    fn log_level(&self) -> String {
        "info".into()
    }
    #[zbus(property)]
    fn set_log_level(&self, _level: String) {}
}

/// Serves the stand-ins in the place of the daemon.
async fn serve(bus: &PrivateBus, method: Authorization) -> Connection {
    let config = AuthorizationConfig { method, group: "finetuned".into() };
    Builder::address(bus.address().as_str())
        .serve_at(ROOT, Manager(Authority::new(config, Origin::SystemBus).with_patience(PATIENCE)))
        .serve_at(ROOT, Secret)
        .serve_at(ROOT, Run)
        .serve_at(ROOT, zbus::fdo::ObjectManager)
        .serve_at(LOG, Log)
        .name(NAME)
        .build()
        .await
        .unwrap()
}

/// Calls from a thread of its own, so that what is served here can answer.
async fn call(
    bus: &PrivateBus,
    uid: u32,
    path: &str,
    method: &str,
    arguments: &[&str],
) -> Result<String, String> {
    let mut command = tokio::process::Command::from(bus.command(uid, NAME, path, method, arguments));
    let output = command.output().await.unwrap();
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout).unwrap().trim().to_string());
    }
    Err(String::from_utf8(output.stderr).unwrap())
}

#[test]
fn only_the_daemons_user_has_the_name() {
    let Some(bus) = PrivateBus::start(FINETUNED) else { return };
    let request = |uid| {
        let method = "org.freedesktop.DBus.RequestName";
        bus.call_to(uid, "org.freedesktop.DBus", "/org/freedesktop/DBus", method, &[NAME, "uint32 4"])
    };
    for uid in [0, ADA] {
        let (name, _) = request(uid).unwrap_err();
        assert_eq!(name, "org.freedesktop.DBus.Error.AccessDenied", "{uid}");
    }
    assert_eq!(request(FINETUNED).unwrap(), "(uint32 1,)");
}

#[tokio::test]
async fn only_what_is_listed_gets_through() {
    let Some(bus) = PrivateBus::start(0) else { return };
    let _daemon = serve(&bus, Authorization::Owner).await;
    let manager = format!("{NAME}.Manager");
    let (get, set) = (format!("{PROPERTIES}.Get"), format!("{PROPERTIES}.Set"));
    let through: &[(u32, &str, &str, &[&str], &str)] = &[
        (ADA, ROOT, &format!("{manager}.Ask"), &["read", &ADA.to_string()], "(uint32 2,)"),
        (ADA, ROOT, &format!("{NAME}.Run.Pause"), &[], "()"),
        (ADA, ROOT, "org.freedesktop.DBus.Introspectable.Introspect", &[], "<node"),
        (ADA, ROOT, "org.freedesktop.DBus.Peer.Ping", &[], "()"),
        (ADA, ROOT, &get, &[&manager, "Version"], "'1'"),
        (ADA, ROOT, &format!("{PROPERTIES}.GetAll"), &[&manager], "'Version'"),
        (ADA, ROOT, "org.freedesktop.DBus.ObjectManager.GetManagedObjects", &[], "{}"),
        (ADA, LOG, &get, &["org.freedesktop.LogControl1", "LogLevel"], "'info'"),
        (0, LOG, &set, &["org.freedesktop.LogControl1", "LogLevel", "<'debug'>"], "()"),
    ];
    for (uid, path, method, arguments, expected) in through {
        let answer = call(&bus, *uid, path, method, arguments).await;
        assert!(answer.as_ref().is_ok_and(|text| text.contains(expected)), "{uid} {method}: {answer:?}");
    }
    let denied: &[(u32, &str, &str, &[&str])] = &[
        (ADA, ROOT, &format!("{NAME}.Secret.Tell"), &[]),
        (0, ROOT, &format!("{NAME}.Secret.Tell"), &[]),
        (ADA, ROOT, "org.example.Unknown.Method", &[]),
        (ADA, ROOT, &set, &[&manager, "Version", "<'2'>"]),
        (0, ROOT, &set, &[&manager, "Version", "<'2'>"]),
        (ADA, LOG, &set, &["org.freedesktop.LogControl1", "LogLevel", "<'debug'>"]),
    ];
    for (uid, path, method, arguments) in denied {
        let text = call(&bus, *uid, path, method, arguments).await.unwrap_err();
        assert!(text.contains("org.freedesktop.DBus.Error.AccessDenied"), "{uid} {method}: {text}");
    }
}

#[tokio::test]
async fn polkit_decides() {
    let Some(mut bus) = PrivateBus::start(0) else { return };
    if !bus.start_polkit() {
        return;
    }
    let _daemon = serve(&bus, Authorization::Polkit).await;
    let ask = async |bus: &PrivateBus, uid: u32, what: &str, owner: u32| {
        let method = format!("{NAME}.Manager.Ask");
        call(bus, uid, ROOT, &method, &[what, &owner.to_string()]).await
    };
    let refused = |answer: Result<String, String>, part: &str| {
        let text = answer.unwrap_err();
        assert!(text.contains(&format!("{NAME}.Error.NotAuthorized")) && text.contains(part), "{text}");
    };
    // Nothing is allowed: root alone is not asked for.
    refused(ask(&bus, ADA, "submit", 0).await, "polkit says no");
    refused(ask(&bus, ADA, "run", ADA).await, "manage-own");
    ask(&bus, 0, "submit", 0).await.unwrap();
    ask(&bus, 0, "run", ADA).await.unwrap();
    // What is private of one's own run is one's own.
    assert_eq!(ask(&bus, ADA, "read", ADA).await.unwrap(), format!("(uint32 {ADA},)"));
    refused(ask(&bus, BOB, "read", ADA).await, "manage-all");

    bus.allow(&["submit", "manage-own"]);
    ask(&bus, ADA, "submit", 0).await.unwrap();
    ask(&bus, ADA, "run", ADA).await.unwrap();
    refused(ask(&bus, BOB, "run", ADA).await, "manage-all");
    refused(ask(&bus, ADA, "inhibit", 0).await, "inhibit");
    refused(ask(&bus, ADA, "configure", 0).await, "configure");

    // Who may manage all may manage its own.
    bus.allow(&["manage-all"]);
    ask(&bus, BOB, "run", ADA).await.unwrap();
    ask(&bus, BOB, "read", ADA).await.unwrap();
    ask(&bus, ADA, "run", ADA).await.unwrap();

    // A polkit that does not answer is one that says no.
    bus.hang_polkit();
    refused(ask(&bus, BOB, "run", ADA).await, "no answer within 2 s");
    ask(&bus, 0, "run", ADA).await.unwrap();

    // Without polkit, root alone gets through, and the others are told what to do.
    bus.stop_polkit();
    refused(ask(&bus, ADA, "submit", 0).await, "[authorization] method");
    refused(ask(&bus, ADA, "run", ADA).await, "polkit did not decide");
    ask(&bus, 0, "submit", 0).await.unwrap();
}
