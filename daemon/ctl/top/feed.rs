//! News from the daemon, for as long as the page is open.
//!
//! ```text
//!            ┌───────────────── a second later ◄────────────────┐
//!            ▼                                                  │
//!   connect, listen ──► list runs, holds, daemon ──► follow ──► away
//!                                                      │
//!     PropertiesChanged of a run or of the daemon ─────┤
//!     InterfacesAdded, InterfacesRemoved: list again ──┤
//!     each interval: the governor; new lines of the ───┘
//!     selected run's metrics, from a descriptor
//! ```
//!
//! The daemon is asked two questions an interval; the metrics are read from a file, which asks it nothing.

use super::model::{Machine, Update};
use crate::bus::{Dictionary, GovernorProxy, NAME, ROOT, RunProxy};
use crate::ctl::connect::Client;
use crate::ctl::context::Context;
use crate::ctl::exit::{Exit, Failure};
use crate::ctl::list;
use crate::ctl::records::Tail;
use crate::ctl::steer::Order;
use serde_json::Value;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep};
use zbus::export::ordered_stream::OrderedStreamExt;
use zbus::message::Type;
use zbus::proxy::CacheProperties;
use zbus::{MatchRule, Message, MessageStream, OwnedObjectPath};

/// How long the daemon may take to answer before it counts as away.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often a daemon that is away is looked for.
const RETRY: Duration = Duration::from_secs(1);

/// Intervals between two looks at what should have been signalled.
const LOOKS: u32 = 10;

/// The page is closed.
pub struct Closed;

/// Where the news goes.
type News = mpsc::Sender<Update>;

async fn tell(news: &News, update: Update) -> Result<(), Closed> {
    news.send(update).await.map_err(|_| Closed)
}

/// Why following has ended.
enum End {
    Closed,
    Lost(Failure),
}

impl From<Closed> for End {
    fn from(_: Closed) -> End {
        End::Closed
    }
}

impl From<Failure> for End {
    fn from(failure: Failure) -> End {
        End::Lost(failure)
    }
}

/// Connects to the daemon.
pub async fn connect(context: &Context) -> Result<Client, Failure> {
    let patience = context.timeout.unwrap_or(PATIENCE);
    let connection = context.transport.connect(patience).await?;
    Client::new(connection, patience, patience, context.ask_password).await
}

/// Sends news until the page is closed. `first` is a connection that is there already.
pub async fn feed(
    context: &Context,
    first: Client,
    every: Duration,
    news: News,
    selected: watch::Receiver<Option<String>>,
) -> Closed {
    let mut client = Some(first);
    loop {
        let connected = match client.take() {
            Some(client) => Ok(client),
            None => connect(context).await,
        };
        let end = match connected {
            Ok(client) => Follower::follow(&client, every, &news, selected.clone()).await,
            Err(failure) => Err(End::Lost(failure)),
        };
        match end {
            Err(End::Closed) => return Closed,
            Err(End::Lost(failure)) => {
                if tell(&news, Update::Away(failure.summary())).await.is_err() {
                    return Closed;
                }
            }
            Ok(()) => {}
        }
        sleep(RETRY).await;
    }
}

/// Everything once.
pub async fn once(client: &Client, news: &News) -> Result<(), Failure> {
    let mut follower = Follower::new(client, news).await?;
    match follower.look().await {
        Err(End::Lost(failure)) => Err(failure),
        Ok(()) | Err(End::Closed) => Ok(()),
    }
}

/// The loss of a run, once.
pub async fn curve(client: &Client, news: &News, id: &str) -> Result<(), Failure> {
    let mut follower = Follower::new(client, news).await?;
    match follower.select(Some(id.to_string())).await {
        Err(End::Lost(failure)) => Err(failure),
        Ok(()) | Err(End::Closed) => Ok(()),
    }
}

struct Follower<'a> {
    client: &'a Client,
    governor: GovernorProxy<'static>,
    news: &'a News,
    /// The run whose loss is shown, and its metrics once they could be opened.
    run: Option<(String, Option<Tail>)>,
}

impl<'a> Follower<'a> {
    async fn new(client: &'a Client, news: &'a News) -> Result<Follower<'a>, Failure> {
        let governor = GovernorProxy::builder(&client.connection)
            .cache_properties(CacheProperties::No)
            .build()
            .await
            .map_err(Failure::from)?;
        Ok(Follower { client, governor, news, run: None })
    }

    async fn follow(
        client: &Client,
        every: Duration,
        news: &News,
        mut selected: watch::Receiver<Option<String>>,
    ) -> Result<(), End> {
        // First listen, then look: nothing that changes between the two is missed.
        let mut signals = signals(client).await?;
        let mut follower = Follower::new(client, news).await?;
        follower.look().await?;
        selected.mark_changed();
        let mut ticks = interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looks = 0;
        loop {
            tokio::select! {
                message = signals.recv() => match message {
                    Some(message) => follower.hear(&message.map_err(Failure::from)?).await?,
                    None => return Err(cut().into()),
                },
                changed = selected.changed() => {
                    changed.map_err(|_| Closed)?;
                    let id = selected.borrow_and_update().clone();
                    follower.select(id).await?;
                }
                _ = ticks.tick() => {
                    looks += 1;
                    if looks % LOOKS == 0 {
                        follower.look().await?;
                        follower.open_late().await?;
                    } else {
                        follower.measure().await?;
                    }
                    follower.read(false).await?;
                }
            }
        }
    }

    /// Asks for everything.
    async fn look(&mut self) -> Result<(), End> {
        let daemon = self.client.properties(self.client.manager.inner()).await?;
        tell(self.news, Update::Daemon(daemon)).await?;
        self.list().await?;
        self.holds().await?;
        self.measure().await
    }

    async fn list(&self) -> Result<(), End> {
        let runs = list::runs(self.client).await?;
        Ok(tell(self.news, Update::Runs(runs)).await?)
    }

    async fn holds(&self) -> Result<(), End> {
        let holds = self.client.answer(self.client.manager.list_inhibitors()).await?;
        let holds = holds.into_iter().map(|(who, why, _, _)| (who, why)).collect();
        Ok(tell(self.news, Update::Holds(holds)).await?)
    }

    /// Asks the governor.
    async fn measure(&self) -> Result<(), End> {
        let properties = match self.client.properties(self.governor.inner()).await {
            Ok(properties) => properties,
            // A daemon that has no governor is one to be shown, too.
            Err(failure) if failure.exit == Exit::Error => return Ok(()),
            Err(failure) => return Err(failure.into()),
        };
        let readings = match self.client.answer(self.governor.get_readings()).await {
            Ok(readings) => readings,
            Err(failure) if failure.exit == Exit::Error => Dictionary::new(),
            Err(failure) => return Err(failure.into()),
        };
        let machine = Box::new(Machine::new(&properties, &readings));
        Ok(tell(self.news, Update::Machine(machine)).await?)
    }

    /// Follows a signal.
    async fn hear(&mut self, message: &Message) -> Result<(), End> {
        let header = message.header();
        let member = header.member().map(|member| member.to_string()).unwrap_or_default();
        if matches!(member.as_str(), "InterfacesAdded" | "InterfacesRemoved") {
            return self.list().await;
        }
        let path = header.path().map(|path| path.to_string()).unwrap_or_default();
        let changed: Result<(String, Dictionary, Vec<String>), _> = message.body().deserialize();
        let Ok((_, changed, _)) = changed else { return Ok(()) };
        match path.strip_prefix(ROOT) {
            Some("") => {
                tell(self.news, Update::Daemon(changed)).await?;
                self.holds().await
            }
            Some(run) => {
                let id = run.trim_start_matches("/Run/").to_string();
                // A new attempt cuts off what its checkpoint does not know, which makes another file of metrics.
                let again = changed.contains_key("Attempts")
                    && self.run.as_ref().is_some_and(|(selected, _)| *selected == id);
                tell(self.news, Update::Run(id.clone(), changed)).await?;
                if again { self.select(Some(id)).await } else { Ok(()) }
            }
            None => Ok(()),
        }
    }

    /// Shows the loss of this run from now on.
    async fn select(&mut self, id: Option<String>) -> Result<(), End> {
        self.run = None;
        let Some(id) = id else { return Ok(()) };
        let run = run(self.client, &id).await?;
        // For those who may see it; nobody is asked for a password.
        match self.client.answer(run.open_metrics(Dictionary::new())).await {
            Ok(file) => {
                self.run = Some((id, Some(Tail::new(file))));
                self.read(true).await
            }
            Err(failure) if matches!(failure.exit, Exit::Unreachable | Exit::Timeout) => Err(failure.into()),
            Err(failure) => {
                self.run = Some((id.clone(), None));
                let why = match failure.exit {
                    Exit::NotAuthorized => "its loss is shown to its owner only".into(),
                    _ => failure.summary(),
                };
                Ok(tell(self.news, Update::NoMetrics(id, why)).await?)
            }
        }
    }

    /// Tries again to open metrics that were not there.
    async fn open_late(&mut self) -> Result<(), End> {
        match &self.run {
            Some((id, None)) => self.select(Some(id.clone())).await,
            _ => Ok(()),
        }
    }

    /// Reads what was added to the metrics.
    async fn read(&mut self, anew: bool) -> Result<(), End> {
        let Some((id, Some(tail))) = &mut self.run else { return Ok(()) };
        // What cannot be read now may be later.
        let lines = tail.lines(false).unwrap_or_default();
        if lines.is_empty() && !anew {
            return Ok(());
        }
        let records: Vec<Value> = lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
        Ok(tell(self.news, Update::Metrics(id.clone(), records, anew)).await?)
    }
}

/// Does what the page asks for, one after the other, and tells what became of it.
pub async fn obey(context: &Context, mut orders: mpsc::Receiver<(Order, String, String)>, news: News) {
    while let Some((order, id, title)) = orders.recv().await {
        let done = async {
            let client = context.client().await?;
            let run = run(&client, &id).await?;
            client.call::<()>(run.inner(), order.method(), &Dictionary::new(), None).await
        };
        let words = match done.await {
            Ok(()) => format!("{title}: {} is under way", order.word()),
            Err(failure) => format!("cannot {} {title}: {}", order.word(), failure.summary()),
        };
        if tell(&news, Update::Told(words)).await.is_err() {
            return;
        }
    }
}

async fn run(client: &Client, id: &str) -> Result<RunProxy<'static>, Failure> {
    let path = OwnedObjectPath::try_from(format!("{ROOT}/Run/{id}"))
        .map_err(|_| Failure::new(Exit::NotFound, format!("{id:?} is no run")))?;
    client.run(path).await
}

/// The connection was closed at the other end.
fn cut() -> Failure {
    zbus::Error::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset)).into()
}

/// Every signal of the daemon's objects.
///
/// They are taken off the connection by a task of their own: what it keeps for who does not look is bounded, and answers
/// would wait behind it.
async fn signals(client: &Client) -> Result<mpsc::UnboundedReceiver<zbus::Result<Message>>, Failure> {
    let rule = MatchRule::builder().msg_type(Type::Signal).path_namespace(ROOT);
    // On a bus anybody may send signals. Without one nobody else can, and none has a sender.
    let rule = if client.connection.is_bus() { rule.sender(NAME) } else { rule };
    let rule = rule.build().map_err(Failure::from)?;
    let mut stream = client.answer(MessageStream::for_match_rule(rule, &client.connection, None)).await?;
    let (sender, signals) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let message = tokio::select! {
                message = stream.next() => message,
                () = sender.closed() => return,
            };
            let Some(message) = message else { return };
            if sender.send(message).is_err() {
                return;
            }
        }
    });
    Ok(signals)
}
