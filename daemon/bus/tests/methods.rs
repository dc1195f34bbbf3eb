//! Each method: what it does, and whom and what it refuses.

use super::*;
use crate::bus::Dictionary;
use crate::reason::Reason;
use crate::runs::fake::{file, id, queued};
use crate::runs::{Change, ModelView, State};
use std::collections::HashMap;
use std::io::Read;
use zbus::message::Flags;
use zbus::{OwnedFd, OwnedObjectPath, Variant, fdo};

fn options(entries: &[(&str, Variant<'_>)]) -> Dictionary {
    entries.iter().map(|(k, v)| (k.to_string(), v.try_to_owned().unwrap())).collect()
}

fn read(file: OwnedFd) -> String {
    let mut text = String::new();
    std::fs::File::from(std::os::fd::OwnedFd::from(file)).read_to_string(&mut text).unwrap();
    text
}

fn files(named: &[(&str, &str)]) -> HashMap<String, OwnedFd> {
    named.iter().map(|(name, content)| (name.to_string(), file(content).into())).collect()
}

#[tokio::test]
async fn a_run_is_submitted_and_there_at_once() {
    let bench = Bench::new(Authorization::Group);
    let ada = bench.client(ADA, &[7, MEMBERS]).await;
    let manager = ada.manager().await;
    let given = options(&[
        ("spec-name", "chat.toml".into()),
        ("priority", (-3).into()),
        ("hold", true.into()),
        ("deadline", 77u64.into()),
    ]);
    let spec = "[model]\nname = \"tiny\"\n".to_string();
    let path =
        manager.submit(spec, files(&[("train.jsonl", "T"), ("eval.jsonl", "E")]), given).await.unwrap();
    assert_eq!(
        bench.fake.heard(),
        [format!(
            "submit \"chat.toml\" by {ADA} files [eval.jsonl=E train.jsonl=T] priority -3 deadline 77 hold true spec \
             \"[model]\\nname = \\\"tiny\\\"\\n\""
        )]
    );
    let run = RunProxy::builder(&ada.connection).path(path.clone()).build().await.unwrap();
    assert_eq!(run.state().await.unwrap(), "queued");
    assert_eq!(run.owner().await.unwrap(), ADA);
    assert_eq!(manager.find_run("run-100".into()).await.unwrap(), path);
    assert_eq!(manager.find_run(id(100).to_string()).await.unwrap(), path);
    assert_eq!(refusal(manager.find_run("nothing".into()).await).0, "NoSuchRun");
    assert_eq!(refusal(manager.find_run("a\u{1b}b".into()).await).0, "InvalidInput");
    bench.fake.add(queued(1, ADA));
    let (name, text) = refusal(manager.find_run("ab".into()).await);
    assert_eq!(name, "AmbiguousRun");
    assert!(text.contains("run-1"), "{text}");
}

#[tokio::test]
async fn a_submission_is_checked_before_it_is_passed_on() {
    let bench = Bench::new(Authorization::Group);
    let ada = bench.client(ADA, &[MEMBERS]).await;
    let manager = ada.manager().await;
    let none = Dictionary::new;
    let submit = |spec: &str, files, options| manager.submit(spec.to_string(), files, options);

    let (name, text) = refusal(submit("wrong", files(&[]), none()).await);
    assert_eq!((name.as_str(), text.as_str()), ("InvalidSpec", "line 1: wrong"));
    assert_eq!(bench.fake.heard().len(), 1);

    let (name, text) = refusal(submit("", files(&[]), options(&[("hodl", true.into())])).await);
    assert_eq!(name, "InvalidInput");
    assert_eq!(text, "\"hodl\" is no option: this call knows spec-name, priority, deadline, hold");
    let (name, text) = refusal(submit("", files(&[]), options(&[("hold", "yes".into())])).await);
    assert_eq!((name.as_str(), text.contains("\"s\"")), ("InvalidInput", true), "{text}");

    let (name, text) = refusal(submit(&"x".repeat(65_537), files(&[]), none()).await);
    assert_eq!((name.as_str(), text.contains("65536")), ("InvalidSpec", true), "{text}");
    let many: HashMap<String, OwnedFd> = (0..17).map(|n| (n.to_string(), file("").into())).collect();
    let (name, text) = refusal(submit("", many, none()).await);
    assert_eq!((name.as_str(), text.contains("17 files")), ("InvalidInput", true), "{text}");
    for bad in ["a\nb", "a\u{202e}b", ""] {
        assert_eq!(refusal(submit("", files(&[(bad, "")]), none()).await).0, "InvalidInput", "{bad:?}");
    }
    let long = "x".repeat(4097);
    assert_eq!(refusal(submit("", files(&[(&long, "")]), none()).await).0, "InvalidInput");
    let named = options(&[("spec-name", "a\u{1b}[2J".into())]);
    assert_eq!(refusal(submit("", files(&[]), named).await).0, "InvalidInput");
    assert_eq!(bench.fake.heard().len(), 1, "none of these went further");
    submit(&"x".repeat(65_536), files(&[]), none()).await.unwrap();
}

#[tokio::test]
async fn a_plan_takes_what_a_submission_takes() {
    let bench = Bench::new(Authorization::Group);
    let ada = bench.client(ADA, &[MEMBERS]).await;
    let manager = ada.manager().await;
    let plan = |spec: &str, options| manager.plan(spec.to_string(), files(&[("t.jsonl", "T")]), options);
    let given = options(&[("spec-name", "a.toml".into()), ("probe", true.into()), ("before", 7u64.into())]);
    assert_eq!(plan("[model]", given).await.unwrap(), "{\"schema\":1}");
    assert_eq!(
        bench.fake.heard(),
        [format!("plan \"a.toml\" by {ADA} files [\"t.jsonl\"] probe true before Some(7)")]
    );
    assert_eq!(refusal(plan("wrong", Dictionary::new()).await).0, "InvalidSpec");
    assert_eq!(refusal(plan(&"x".repeat(70_000), Dictionary::new()).await).0, "InvalidSpec");
    assert_eq!(refusal(plan("", options(&[("priority", 1.into())])).await).0, "InvalidInput");
    ada.becomes(EVE, &[7]);
    assert_eq!(refusal(plan("", Dictionary::new()).await).0, "NotAuthorized");
}

#[tokio::test]
async fn a_plan_whose_client_is_gone_is_given_up() {
    let bench = Bench::new(Authorization::Group);
    let ada = bench.client(ADA, &[MEMBERS]).await;
    let manager = ada.manager().await;
    let asked =
        tokio::spawn(async move { manager.plan("endless".into(), files(&[]), Dictionary::new()).await });
    eventually("the plan", async || bench.fake.endless() == (1, 0)).await;
    asked.abort();
    let _ = asked.await;
    drop(ada);
    eventually("its end", async || bench.fake.endless() == (1, 1)).await;
}

#[tokio::test]
async fn runs_are_steered() {
    let bench = Bench::new(Authorization::Group);
    bench.fake.add(queued(1, ADA));
    let ada = bench.client(ADA, &[MEMBERS]).await;
    let (manager, run) = (ada.manager().await, ada.run(&id(1)).await);
    let none = Dictionary::new;

    run.set_deadline(9).await.unwrap();
    assert_eq!((run.deadline().await.unwrap(), run.deadline_at_risk().await.unwrap()), (9, false));
    assert_eq!(refusal(run.resume(none()).await).0, "NotPaused");
    run.pause(none()).await.unwrap();
    assert_eq!(run.state().await.unwrap(), "paused");
    assert_eq!(run.reason().await.unwrap(), "user");
    assert_eq!(refusal(run.pause(none()).await).0, "AlreadyPaused");
    run.resume(none()).await.unwrap();
    assert_eq!(run.state().await.unwrap(), "queued");

    assert_eq!(refusal(run.checkpoint(none()).await).0, "NotActive");
    assert_eq!(refusal(run.evaluate(none()).await).0, "NotActive");
    bench.fake.update(&id(1), |view| (view.state, view.step) = (State::Running, 12), Change::State);
    assert_eq!(run.checkpoint(none()).await.unwrap(), 12);
    assert_eq!(run.evaluate(none()).await.unwrap(), 1.25);

    let own = || crate::bus::run::path(Some(&id(1)));
    manager.set_priority(own(), -5).await.unwrap();
    assert_eq!(run.priority().await.unwrap(), -5);
    // Before the runs of others only by leave of who manages all.
    assert_eq!(refusal(manager.set_priority(own(), 1).await).0, "NotAuthorized");
    for bad in ["/", "/org/finetuned/Finetuned1/Run/ab0000000009", "/org/other/Run/ab0000000001"] {
        let bad = OwnedObjectPath::try_from(bad).unwrap();
        assert_eq!(refusal(manager.set_priority(bad, -5).await).0, "NoSuchRun");
    }

    assert_eq!(refusal(run.remove(none()).await).0, "NotOver");
    assert_eq!(refusal(run.open_adapter(none()).await).0, "NotOver");
    bench.fake.update(&id(1), |view| view.state = State::Succeeded, Change::State);
    assert_eq!(refusal(run.cancel(none()).await).0, "AlreadyOver");
    assert_eq!(read(run.open_metrics(none()).await.unwrap()), "metrics\n");
    assert_eq!(read(run.open_log(none()).await.unwrap()), "journal\n");
    let mut adapter = run.open_adapter(none()).await.unwrap();
    assert_eq!(read(adapter.remove("adapter_config.json").unwrap()), "{}");
    let details = run.describe().await.unwrap();
    assert_eq!(<&str>::try_from(&details["Spec"]).unwrap(), "# run-1");
    let mut keys: Vec<&str> = details.keys().map(String::as_str).collect();
    keys.sort();
    assert_eq!(keys, ["Directory", "Message", "Model", "ResolvedSpec", "Spec", "Summary"]);

    let unknown = || options(&[("force", true.into())]);
    assert_eq!(refusal(run.pause(unknown()).await).0, "InvalidInput");
    assert_eq!(refusal(run.open_metrics(unknown()).await).0, "InvalidInput");
    run.remove(none()).await.unwrap();
    eventually("the object is gone", async || run.describe().await.is_err()).await;
}

#[tokio::test]
async fn a_cancelled_run_is_over() {
    let bench = Bench::new(Authorization::Group);
    bench.fake.add(queued(1, ADA));
    let ada = bench.client(ADA, &[MEMBERS]).await;
    let run = ada.run(&id(1)).await;
    run.cancel(Dictionary::new()).await.unwrap();
    assert_eq!(run.wait().await.unwrap(), ("cancelled".into(), "user".into()));
}

#[tokio::test]
async fn inhibitors_and_models() {
    let bench = Bench::new(Authorization::Group);
    let ada = bench.client(ADA, &[MEMBERS]).await;
    let manager = ada.manager().await;
    let inhibit = |what: &str, who: &str, why: &str| {
        manager.inhibit(what.into(), who.into(), why.into(), Dictionary::new())
    };
    drop(inhibit("run", "navigation", "driving").await.unwrap());
    assert_eq!(bench.fake.heard(), ["inhibit by peer-0"]);
    assert_eq!(
        manager.list_inhibitors().await.unwrap(),
        [("navigation".to_string(), "driving".to_string(), ADA, 7)]
    );
    assert_eq!(refusal(inhibit("sleep", "a", "b").await).0, "InvalidInput");
    assert_eq!(refusal(inhibit("run", "", "b").await).0, "InvalidInput");
    assert_eq!(refusal(inhibit("run", "a", "b\u{7}").await).0, "InvalidInput");
    assert_eq!(refusal(inhibit("run", "a", &"b".repeat(1025)).await).0, "InvalidInput");
    assert_eq!(bench.fake.heard().len(), 1);

    let directory = || OwnedFd::from(std::os::fd::OwnedFd::from(std::fs::File::open("/").unwrap()));
    let add = |name: &str| manager.add_model(name.into(), directory(), Dictionary::new());
    assert_eq!(refusal(add("tiny").await).0, "NotAuthorized");
    ada.becomes(0, &[]);
    assert_eq!(refusal(add("a\nb").await).0, "InvalidInput");
    add("tiny").await.unwrap();
    bench.fake.model(ModelView {
        name: "big".into(),
        directory: "/models/big".into(),
        bytes: 1 << 40,
        architecture: "LlamaForCausalLM".into(),
    });
    let listed = manager.list_models().await.unwrap();
    assert_eq!(listed.len(), 2);
    assert_eq!(<&str>::try_from(&listed[1]["Name"]).unwrap(), "big");
    assert_eq!(u64::try_from(&listed[1]["Bytes"]).unwrap(), 1 << 40);
    assert_eq!(<&str>::try_from(&listed[1]["Architecture"]).unwrap(), "LlamaForCausalLM");
    manager.remove_model("tiny".into()).await.unwrap();
    assert_eq!(refusal(manager.remove_model("tiny".into()).await).0, "NoSuchModel");
}

#[tokio::test]
async fn runs_are_listed_with_their_properties() {
    let bench = Bench::new(Authorization::Group);
    let mut view = queued(1, ADA);
    (view.state, view.reason) = (State::Failed, Some(Reason::Diverged));
    (view.loss, view.checkpoint_step, view.remaining_seconds) = (Some(2.5), Some(40), Some(9));
    bench.fake.add(view.clone());
    bench.fake.add(queued(2, BOB));
    // Everybody may look.
    let eve = bench.client(EVE, &[]).await;
    let manager = eve.manager().await;
    let listed = manager.list_runs(Dictionary::new()).await.unwrap();
    let paths: Vec<&zbus::ObjectPath> = listed.iter().map(|run| (&run["Path"]).try_into().unwrap()).collect();
    assert_eq!(paths, [path_of(1).as_str(), path_of(2).as_str()]);
    let unfinished = manager.list_runs(options(&[("unfinished", true.into())])).await.unwrap();
    assert_eq!(unfinished.len(), 1);
    assert_eq!(<&str>::try_from(&unfinished[0]["Name"]).unwrap(), "run-2");
    assert_eq!(refusal(manager.list_runs(options(&[("all", true.into())])).await).0, "InvalidInput");

    // What is listed is what the properties say.
    let properties = fdo::PropertiesProxy::builder(&eve.connection)
        .destination("org.finetuned.Finetuned1")
        .path(path_of(1))
        .build()
        .await
        .unwrap();
    let mut read = properties.get_all("org.finetuned.Finetuned1.Run".try_into().unwrap()).await.unwrap();
    assert_eq!(read.len(), crate::bus::run::properties(&view).len());
    for (name, value) in crate::bus::run::properties(&view) {
        let read = Variant::from(read.remove(name).unwrap());
        assert!(crate::bus::same(&read, &value), "{name}: {read:?}, {value:?}");
        let listed = Variant::from(listed[0][name].try_clone().unwrap());
        assert!(crate::bus::same(&listed, &value), "{name}: {listed:?}, {value:?}");
    }
}

#[tokio::test]
async fn wait_is_answered_at_the_end_and_capped() {
    let limits = LimitsConfig { waits_per_sender: 2, ..LimitsConfig::default() };
    let bench = Bench::with(Authorization::Group, 64, limits);
    bench.fake.add(queued(1, ADA));
    let eve = bench.client(EVE, &[]).await;
    let run = eve.run(&id(1)).await;
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let run = run.clone();
            tokio::spawn(async move { run.wait().await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (name, text) = refusal(run.wait().await);
    assert_eq!((name.as_str(), text.contains("waits_per_sender")), ("LimitExceeded", true), "{text}");
    assert!(waiting.iter().all(|call| !call.is_finished()));
    let end = |view: &mut crate::runs::RunView| {
        (view.state, view.reason) = (State::Succeeded, Some(Reason::EarlyStopping));
    };
    bench.fake.update(&id(1), end, Change::State);
    for call in waiting {
        assert_eq!(call.await.unwrap().unwrap(), ("succeeded".into(), "early-stopping".into()));
    }
    run.wait().await.unwrap();
}

#[tokio::test]
async fn who_leaves_waits_no_longer() {
    let limits = LimitsConfig { waits_per_sender: 1, ..LimitsConfig::default() };
    let bench = Bench::with(Authorization::Group, 64, limits);
    bench.fake.add(queued(1, ADA));
    let eve = bench.client(EVE, &[]).await;
    let run = eve.run(&id(1)).await;
    let call = tokio::spawn(async move { run.wait().await });
    eventually("the call waits", async || bench.service.waits.take("peer-0").is_none()).await;
    call.abort();
    let _ = call.await;
    drop(eve.connection);
    eventually("the place is free", async || bench.service.waits.take("peer-0").is_some()).await;
    assert!(matches!(eve.server.await.unwrap(), Ok(Ended::Closed)));
}

/// A call that needs an authorization, and what it answers, in short.
async fn attempt(client: &Client, what: &str) -> String {
    let (manager, none) = (client.manager().await, Dictionary::new);
    let run = client.run(&id(1)).await;
    let answer = match what {
        "Submit" => manager.submit("x".into(), HashMap::new(), none()).await.map(drop),
        "Inhibit" => manager.inhibit("run".into(), "a".into(), "b".into(), none()).await.map(drop),
        "RemoveModel" => manager.remove_model("m".into()).await,
        "SetPriority" => manager.set_priority(crate::bus::run::path(Some(&id(1))), 0).await,
        "Pause" => run.pause(none()).await,
        "Resume" => run.resume(none()).await,
        "Cancel" => run.cancel(none()).await,
        "Checkpoint" => run.checkpoint(none()).await.map(drop),
        "Evaluate" => run.evaluate(none()).await.map(drop),
        "Remove" => run.remove(none()).await,
        "Describe" => run.describe().await.map(drop),
        "OpenMetrics" => run.open_metrics(none()).await.map(drop),
        "OpenLog" => run.open_log(none()).await.map(drop),
        "OpenAdapter" => run.open_adapter(none()).await.map(drop),
        other => panic!("{other}"),
    };
    match answer {
        Err(Error::NotAuthorized(text)) => {
            assert!(text.starts_with("user "), "{text}");
            "no".into()
        }
        Err(Error::ZBus(error)) => panic!("{what}: {error:?}"),
        // The run's state may forbid it; the caller was let through.
        _ => "yes".into(),
    }
}

#[tokio::test]
async fn every_method_knows_who_may() {
    let steering = ["SetPriority", "Pause", "Resume", "Cancel", "Checkpoint", "Evaluate", "Remove"];
    let reading = ["Describe", "OpenMetrics", "OpenLog", "OpenAdapter"];
    // Root, the daemon's user, the run's owner as a member and not, another member, somebody.
    let callers: [(u32, &[u32]); 6] =
        [(0, &[]), (OWN, &[]), (ADA, &[MEMBERS]), (ADA, &[]), (BOB, &[MEMBERS]), (EVE, &[7])];
    let table = [
        (Authorization::Group, vec!["Submit", "Inhibit"], ["yes", "no", "yes", "no", "yes", "no"]),
        (Authorization::Group, vec!["RemoveModel"], ["yes", "no", "no", "no", "no", "no"]),
        (Authorization::Group, steering.to_vec(), ["yes", "no", "yes", "no", "no", "no"]),
        (Authorization::Group, reading.to_vec(), ["yes", "no", "yes", "yes", "no", "no"]),
        (
            Authorization::Owner,
            vec!["Submit", "Inhibit", "RemoveModel"],
            ["yes", "yes", "no", "no", "no", "no"],
        ),
        (Authorization::Owner, steering.to_vec(), ["yes", "yes", "no", "no", "no", "no"]),
        (Authorization::Owner, reading.to_vec(), ["yes", "yes", "yes", "yes", "no", "no"]),
        // Without the system bus, polkit knows nobody: the owner's rules.
        (Authorization::Polkit, steering.to_vec(), ["yes", "yes", "no", "no", "no", "no"]),
    ];
    for (method, calls, answers) in table {
        let bench = Bench::new(method);
        let client = bench.client(0, &[]).await;
        for call in calls {
            for ((uid, groups), expected) in callers.iter().zip(answers) {
                if bench.service.runs.view(&id(1)).is_ok() {
                    bench.fake.remove(&id(1));
                }
                bench.fake.add(queued(1, ADA));
                client.becomes(*uid, groups);
                let known = async || client.manager().await.find_run("run-1".into()).await.is_ok();
                eventually("the run is there", known).await;
                let answer = attempt(&client, call).await;
                assert_eq!(answer, expected, "{method:?}: {call} by {uid} with {groups:?}");
            }
        }
    }
}

#[tokio::test]
async fn the_group_must_exist() {
    let bench = Bench::new(Authorization::Group);
    std::fs::write(bench.group_file.path(), "audio:x:29:\n").unwrap();
    let ada = bench.client(ADA, &[MEMBERS]).await;
    let (name, text) =
        refusal(ada.manager().await.submit("x".into(), HashMap::new(), Dictionary::new()).await);
    assert_eq!(name, "NotAuthorized");
    assert!(text.contains("no group \"finetuned\""), "{text}");
}

#[tokio::test]
async fn the_log_is_turned_by_root_only() {
    let bench = Bench::new(Authorization::Group);
    let ada = bench.client(ADA, &[MEMBERS]).await;
    let log = zbus::Proxy::new(
        &ada.connection,
        "org.finetuned.Finetuned1",
        "/org/freedesktop/LogControl1",
        "org.freedesktop.LogControl1",
    )
    .await
    .unwrap();
    let read = async |name: &'static str| -> String {
        let reader = fdo::PropertiesProxy::builder(&ada.connection)
            .destination("org.finetuned.Finetuned1")
            .path("/org/freedesktop/LogControl1")
            .build()
            .await
            .unwrap();
        let value = reader.get("org.freedesktop.LogControl1".try_into().unwrap(), name).await.unwrap();
        String::try_from(value).unwrap()
    };
    assert_eq!(read("LogLevel").await, "info");
    assert_eq!(read("LogTarget").await, "console");
    assert_eq!(read("SyslogIdentifier").await, "finetuned");
    let refused = async |name: &'static str, value: &'static str| -> String {
        match log.set_property(name, value).await.unwrap_err() {
            fdo::Error::ZBus(error) => refusal(Err::<(), _>(Error::from(error))).0,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused("LogLevel", "debug").await, "NotAuthorized");
    assert_eq!(read("LogLevel").await, "info");
    ada.becomes(0, &[]);
    for (set, got) in [("debug", "debug"), ("emerg", "err"), ("notice", "info"), ("warning", "warning")] {
        log.set_property("LogLevel", set).await.unwrap();
        assert_eq!(read("LogLevel").await, got);
    }
    assert_eq!(refused("LogLevel", "verbose").await, "InvalidInput");
    log.set_property("LogTarget", "null").await.unwrap();
    assert_eq!(read("LogTarget").await, "null");
    assert_eq!(refused("LogTarget", "kmsg").await, "InvalidInput");
    assert_eq!(refused("LogTarget", "journal").await, "Failed");
    assert!(log.set_property("SyslogIdentifier", "x").await.is_err());
}

#[tokio::test]
async fn a_sender_that_a_peer_makes_up_counts_for_nothing() {
    // The socket says who this is, whatever the message's header says.
    let bench = Bench::new(Authorization::Owner);
    let eve = bench.client(EVE, &[]).await;
    let call = zbus::Message::method_call(ROOT, "Submit")
        .interface("org.finetuned.Finetuned1.Manager")
        .sender(":1.0")
        .with_flags(Flags::ALLOW_INTERACTIVE_AUTH)
        .build(&("x", HashMap::<String, OwnedFd>::new(), Dictionary::new()))
        .unwrap();
    let mut answers = zbus::MessageStream::from(&eve.connection);
    eve.connection.send(&call).await.unwrap();
    loop {
        let answer = futures_util::StreamExt::next(&mut answers).await.unwrap().unwrap();
        if answer.header().reply_serial() == Some(call.primary_header().serial_num()) {
            let name = answer.header().error_name().unwrap().to_string();
            assert_eq!(name, "org.finetuned.Finetuned1.Error.NotAuthorized");
            return;
        }
    }
}

#[tokio::test]
async fn the_budget_is_read_by_all_and_changed_by_who_may_configure() {
    let bench = Bench::new(Authorization::Group);
    let eve = bench.client(EVE, &[]).await;
    let governor = eve.governor().await;
    let none = Dictionary::new;
    let text = |entry: &Dictionary, name: &str| String::try_from(entry[name].try_clone().unwrap()).unwrap();
    let power = async || {
        let budget = governor.get_budget().await.unwrap();
        budget.into_iter().find(|entry| text(entry, "Key") == "budget.power").unwrap()
    };
    let first = power().await;
    assert_eq!(["Value", "Source", "Place"].map(|name| text(&first, name)), ["\"none\"", "default", ""]);
    assert!(!first.contains_key("Uid"));
    let change = |value: &str| HashMap::from([("budget.power".to_string(), value.to_string())]);
    for (who, groups) in [(EVE, &[][..]), (ADA, &[MEMBERS])] {
        eve.becomes(who, groups);
        let (name, text) = refusal(governor.set_budget(change("25W"), none()).await);
        assert_eq!(name, "NotAuthorized");
        assert!(text.contains("may not change models or settings"), "{text}");
        assert_eq!(refusal(governor.reset_budget(Vec::new()).await).0, "NotAuthorized");
    }
    eve.becomes(0, &[]);
    let (name, text_of) = refusal(governor.set_budget(change("25V"), none()).await);
    assert_eq!(name, "InvalidInput");
    assert!(text_of.starts_with("budget.power = 25V: allowed: \"none\", or a power"), "{text_of}");
    let (_, text_of) = refusal(governor.set_budget(change("25W"), options(&[("once", true.into())])).await);
    assert_eq!(text_of, "\"once\" is no option: this call knows runtime");

    governor.set_budget(change("25W"), none()).await.unwrap();
    let set = power().await;
    assert_eq!(["Value", "Files", "Source"].map(|name| text(&set, name)), ["\"25W\"", "\"none\"", "set"]);
    assert_eq!((u32::try_from(&set["Uid"]), u64::try_from(&set["Time"])), (Ok(0), Ok(7)));
    governor.set_budget(change("20W"), options(&[("runtime", true.into())])).await.unwrap();
    assert_eq!(text(&power().await, "Source"), "runtime");
    governor.set_budget(change(""), none()).await.unwrap();
    assert_eq!(text(&power().await, "Source"), "default", "an empty value takes it back");
    governor.set_budget(change("25W"), none()).await.unwrap();
    assert_eq!(refusal(governor.reset_budget(vec!["budget.powr".into()]).await).0, "InvalidInput");
    governor.reset_budget(vec!["budget.power".into()]).await.unwrap();
    governor.reset_budget(Vec::new()).await.unwrap();
    assert_eq!(text(&power().await, "Source"), "default");
}

#[tokio::test]
async fn nights_are_reported_to_everybody() {
    use crate::bus::GovernorProxy;
    use crate::night::{Account, Nights, Record, Span, Store};
    let directory = tempfile::tempdir().unwrap();
    let mut bench = Bench::new(Authorization::Group);
    let nights = Nights::new(directory.path().into());
    bench.service = bench.service.with_nights(nights.clone());
    let eve = bench.client(EVE, &[]).await;
    let governor = GovernorProxy::builder(&eve.connection).build().await.unwrap();
    let night = |date: &str| governor.get_night(date.into(), Dictionary::new());
    assert_eq!(refusal(night("").await).0, "NoSuchNight");
    let record =
        |date: &str, from| Record::new(date.parse().unwrap(), Span { from, to: from + 10 }, "UTC".into());
    Store::new(directory.path().into()).sync(&mut record("2026-11-23", 0)).unwrap();
    *nights.live() = Some(Account::new(record("2026-11-24", 10)));
    let report: serde_json::Value = serde_json::from_str(&night("now").await.unwrap()).unwrap();
    assert_eq!((&report["schema"], &report["night"]), (&1.into(), &"2026-11-24".into()));
    let report: serde_json::Value = serde_json::from_str(&night("2026-11-23").await.unwrap()).unwrap();
    assert_eq!(report["window"]["uses"][0]["what"], "off");
    assert_eq!(governor.list_nights().await.unwrap(), ["2026-11-23", "2026-11-24"]);
    let (name, text) = refusal(night("yesteryear").await);
    assert!(name == "InvalidInput" && text.contains("yesteryear") && text.contains("2026-11-24"), "{text}");
    let (name, text) = refusal(night("2026-11-22").await);
    assert!(name == "NoSuchNight" && text.contains("2026-11-22"), "{text}");
    let given = options(&[("format", "html".into())]);
    let (name, text) = refusal(governor.get_night("".into(), given).await);
    assert!(name == "InvalidInput" && text.contains("format"), "{text}");
}
