//! What is told of changes, when, and how often.

use super::*;
use crate::reason::Reason;
use crate::runs::fake::{id, queued};
use crate::runs::{Change, State};
use futures_util::StreamExt;
use std::collections::HashMap;
use std::num::NonZeroUsize;
use tokio::time::{Instant, sleep, timeout};
use zbus::{MatchRule, MessageStream, OwnedVariant, Variant, fdo};

/// Signals with this name that arrive.
async fn signals(client: &Client, name: &'static str) -> MessageStream {
    let rule = MatchRule::builder().msg_type(zbus::message::Type::Signal).member(name).build().unwrap();
    MessageStream::for_match_rule(rule, &client.connection, NonZeroUsize::new(1000)).await.unwrap()
}

/// A PropertiesChanged.
#[derive(Debug)]
struct Told {
    path: String,
    changed: HashMap<String, OwnedVariant>,
}

impl Told {
    fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.changed.keys().map(String::as_str).collect();
        names.sort();
        names
    }
}

async fn told(stream: &mut MessageStream) -> Told {
    let message = timeout(Duration::from_secs(5), stream.next()).await.expect("a signal").unwrap().unwrap();
    let path = message.header().path().unwrap().to_string();
    let (_, changed, invalidated): (String, HashMap<String, OwnedVariant>, Vec<String>) =
        message.body().deserialize().unwrap();
    assert!(invalidated.is_empty());
    Told { path, changed }
}

async fn nothing(stream: &mut MessageStream, wait: Duration) {
    if let Ok(message) = timeout(wait, stream.next()).await {
        panic!("{message:?}");
    }
}

#[tokio::test]
async fn figures_are_told_together_and_now_and_then() {
    let bench = Bench::new(Authorization::Owner);
    bench.fake.add(queued(1, ADA));
    let client = bench.client(EVE, &[]).await;
    let mut changes = signals(&client, "PropertiesChanged").await;
    sleep(bench.service.pace.figures).await;
    let begin = Instant::now();
    let steps = 60;
    for step in 1..=steps {
        let figures = |view: &mut crate::runs::RunView| {
            (view.step, view.loss, view.tokens_per_second) = (step, Some(1.0 / step as f64), Some(100.0));
        };
        bench.fake.update(&id(1), figures, Change::Figures);
        sleep(Duration::from_millis(10)).await;
    }
    let mut all = Vec::new();
    loop {
        let one = told(&mut changes).await;
        assert_eq!(one.path, path_of(1));
        let last = u64::try_from(&one.changed["Step"]).unwrap();
        all.push(one);
        if last == steps {
            break;
        }
    }
    let most = begin.elapsed().as_millis() / bench.service.pace.figures.as_millis() + 2;
    assert!(all.len() >= 3 && all.len() as u128 <= most, "{} signals, {most} at most", all.len());
    assert_eq!(all[0].names(), ["Loss", "Step", "TokensPerSecond"]);
    assert!(all[1..].iter().all(|one| one.names() == ["Loss", "Step"]), "{all:?}");
    nothing(&mut changes, bench.service.pace.figures * 2).await;
}

#[tokio::test]
async fn a_state_is_told_at_once_with_the_figures_that_wait() {
    let mut bench = Bench::new(Authorization::Owner);
    bench.service.pace.figures = Duration::from_secs(1);
    bench.fake.add(queued(1, ADA));
    let client = bench.client(EVE, &[]).await;
    let mut changes = signals(&client, "PropertiesChanged").await;
    sleep(bench.service.pace.figures).await;
    bench.fake.update(&id(1), |view| view.step = 1, Change::Figures);
    assert_eq!(told(&mut changes).await.names(), ["Step"]);
    bench.fake.update(&id(1), |view| view.step = 2, Change::Figures);
    let hold = |view: &mut crate::runs::RunView| {
        (view.state, view.reason) = (State::Waiting, Some(Reason::Inhibited));
    };
    bench.fake.update(&id(1), hold, Change::State);
    let at = Instant::now();
    let one = told(&mut changes).await;
    assert!(at.elapsed() < bench.service.pace.figures / 2, "{:?}", at.elapsed());
    assert_eq!(one.names(), ["Reason", "State", "Step"]);
    assert_eq!(<&str>::try_from(&one.changed["State"]).unwrap(), "waiting");
    assert_eq!(<&str>::try_from(&one.changed["Reason"]).unwrap(), "inhibited");
    // The figures that waited have been told; a change of nothing is no change.
    bench.fake.update(&id(1), |_| {}, Change::State);
    bench.fake.update(&id(1), |_| {}, Change::Figures);
    bench.fake.status(|_| {});
    nothing(&mut changes, bench.service.pace.figures * 2).await;
}

#[tokio::test]
async fn the_manager_tells_its_status() {
    let bench = Bench::new(Authorization::Owner);
    bench.fake.add(queued(1, ADA));
    let client = bench.client(EVE, &[]).await;
    let manager = client.manager().await;
    assert_eq!(manager.version().await.unwrap(), env!("CARGO_PKG_VERSION"));
    assert_eq!(manager.active_run().await.unwrap().as_str(), "/");
    let mut changes = signals(&client, "PropertiesChanged").await;
    bench.fake.status(|status| {
        (status.active, status.state, status.unfinished) = (Some(id(1)), "active", 1);
        status.device = "CPU".into();
    });
    let one = told(&mut changes).await;
    assert_eq!(one.path, ROOT);
    assert_eq!(one.names(), ["ActiveRun", "Device", "State", "UnfinishedRuns"]);
    assert_eq!(manager.active_run().await.unwrap().as_str(), path_of(1));
    assert_eq!(manager.device().await.unwrap(), "CPU");
    assert_eq!(manager.state().await.unwrap(), "active");
    assert_eq!(manager.reason().await.unwrap(), "");
    assert_eq!(manager.unfinished_runs().await.unwrap(), 1);
}

#[tokio::test]
async fn objects_come_and_go_on_every_connection() {
    let bench = Bench::new(Authorization::Owner);
    bench.fake.add(queued(1, ADA));
    let (one, other) = (bench.client(EVE, &[]).await, bench.client(BOB, &[]).await);
    for client in [&one, &other] {
        let manager = fdo::ObjectManagerProxy::builder(&client.connection)
            .destination("org.finetuned.Finetuned1")
            .path(ROOT)
            .build()
            .await
            .unwrap();
        let managed = manager.get_managed_objects().await.unwrap();
        assert!(managed.keys().any(|path| path.as_str() == path_of(1)), "{managed:?}");
        let mut added = signals(client, "InterfacesAdded").await;
        let mut removed = signals(client, "InterfacesRemoved").await;
        bench.fake.add(queued(2, ADA));
        let message = timeout(Duration::from_secs(5), added.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(message.header().path().unwrap().as_str(), ROOT);
        type Interfaces = HashMap<String, HashMap<String, OwnedVariant>>;
        let (path, interfaces): (zbus::OwnedObjectPath, Interfaces) = message.body().deserialize().unwrap();
        assert_eq!(path.as_str(), path_of(2));
        let name = Variant::from(interfaces["org.finetuned.Finetuned1.Run"]["Name"].try_clone().unwrap());
        assert_eq!(name, Variant::from("run-2"));
        bench.fake.remove(&id(2));
        let message = timeout(Duration::from_secs(5), removed.next()).await.unwrap().unwrap().unwrap();
        let (path, interfaces): (zbus::OwnedObjectPath, Vec<String>) = message.body().deserialize().unwrap();
        assert_eq!(path.as_str(), path_of(2));
        assert_eq!(interfaces, ["org.finetuned.Finetuned1.Run"]);
        nothing(&mut added, Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn who_lags_behind_looks_again() {
    // Two changes may wait; all of these come before the publisher is asked.
    let bench = Bench::with(Authorization::Owner, 2, LimitsConfig::default());
    bench.fake.add(queued(1, ADA));
    bench.fake.add(queued(2, ADA));
    let client = bench.client(EVE, &[]).await;
    let run = client.run(&id(2)).await;
    assert_eq!(run.state().await.unwrap(), "queued");
    let mut changes = signals(&client, "PropertiesChanged").await;
    bench.fake.remove(&id(1));
    bench.fake.update(&id(2), |view| view.state = State::Running, Change::State);
    bench.fake.add(queued(3, ADA));
    for step in 1..10 {
        bench.fake.update(&id(2), |view| view.step = step, Change::Figures);
    }
    bench.fake.status(|status| status.unfinished = 2);
    bench.fake.status(|_| {});
    bench.fake.status(|_| {});
    let one = told(&mut changes).await;
    assert_eq!((one.path.as_str(), one.names()), (path_of(2).as_str(), vec!["State", "Step"]));
    let one = told(&mut changes).await;
    assert_eq!((one.path.as_str(), one.names()), (ROOT, vec!["UnfinishedRuns"]));
    let (first, third) = (client.run(&id(1)).await, client.run(&id(3)).await);
    eventually("the third is there", async || third.state().await.is_ok()).await;
    eventually("the first is gone", async || first.state().await.is_err()).await;
}

#[tokio::test]
async fn a_change_of_the_budget_is_told_with_its_keys() {
    let bench = Bench::new(Authorization::Owner);
    let client = bench.client(OWN, &[]).await;
    let listener = bench.client(EVE, &[]).await;
    let mut changes = signals(&listener, "BudgetChanged").await;
    let governor = client.governor().await;
    let change = |value: &str| HashMap::from([("budget.power".to_string(), value.to_string())]);
    governor.set_budget(change("25W"), HashMap::new()).await.unwrap();
    let message = timeout(Duration::from_secs(5), changes.next()).await.expect("a signal").unwrap().unwrap();
    let keys: Vec<String> = message.body().deserialize().unwrap();
    assert_eq!(keys, ["budget.power"]);
    governor.reset_budget(vec!["window.times".into()]).await.unwrap();
    nothing(&mut changes, Duration::from_millis(200)).await;
}
