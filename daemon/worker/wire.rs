//! The conversation as bytes: lines of JSON over a stream UNIX socket, the blocking half of the worker and the half of
//! the daemon, which never blocks.
//!
//! ```text
//!   worker   Input  ◄──── lines ────┐  ┌──── try_write ──── send ── Connection   daemon
//!            Output ── write_all ───┼──┴──► lines ────────► next ──     ▲
//!                                   └────────────── what the socket did not take yet
//! ```
//!
//! Both sides are suspicious: a line has a longest length, text that is no message is quoted in the error (escaped, and
//! not much of it), and a peer that does not read is an error after [`STALL`]. What JSON cannot carry (a float that is
//! not finite) is refused by the sender, since the reader would see something else.

use super::protocol::{MAX_LINE, Report, Request};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tokio::io::Interest;
use tokio::time::Instant;

/// A peer that takes nothing for this long is gone, or as good as gone.
pub const STALL: Duration = Duration::from_secs(5);

/// Most bytes that wait for a worker that does not read.
const MAX_PENDING: usize = 2 * MAX_LINE;

/// Characters of a bad line that an error quotes.
const EXCERPT: usize = 80;

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other side has closed the connection, or its process has ended.
    #[error("the connection was closed by the other side")]
    Closed,
    /// It was closed in the middle of a message.
    #[error("the connection was closed in the middle of a message: {excerpt}")]
    Cut {
        /// What there is of it.
        excerpt: Excerpt,
    },
    /// A line is longer than [`MAX_LINE`].
    #[error("a message is longer than {MAX_LINE} bytes: {excerpt}")]
    TooLong {
        /// Its beginning.
        excerpt: Excerpt,
    },
    /// A line is no message of this protocol.
    #[error("not a message of the worker's protocol ({why}): {excerpt}")]
    Unknown {
        /// The line's beginning.
        excerpt: Excerpt,
        /// What is wrong with it.
        why: String,
    },
    /// A message of ours cannot be sent: it is too long, or holds a number that JSON does not have.
    #[error("a message cannot be sent as a line of JSON: {why}")]
    Unsendable {
        /// What is wrong with it.
        why: String,
    },
    /// The other side does not read.
    #[error("the other side has not read its messages for {} seconds", STALL.as_secs())]
    Stalled,
    /// The socket refused.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
}

/// The beginning of a line, for a person: quoted, with everything escaped that is not plain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excerpt(String);

impl Excerpt {
    fn of(line: &[u8]) -> Excerpt {
        let shown = &line[..line.len().min(EXCERPT)];
        let dots = if line.len() > EXCERPT { "…" } else { "" };
        Excerpt(format!("\"{}\"{dots}", shown.escape_ascii()))
    }
}

impl fmt::Display for Excerpt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A message as a line, its end included.
///
/// # Errors
/// [`WireError::Unsendable`] where the reader would not get what was meant: the line is read back here to know.
pub fn encode<M: Serialize + DeserializeOwned + PartialEq>(message: &M) -> Result<Vec<u8>, WireError> {
    let unsendable = |why: String| WireError::Unsendable { why };
    let mut line = serde_json::to_vec(message).map_err(|error| unsendable(error.to_string()))?;
    if line.len() > MAX_LINE {
        return Err(unsendable(format!("it has {} bytes, {MAX_LINE} are allowed", line.len())));
    }
    // NaN and infinity become null, and null is no number, or is "absent".
    if decode::<M>(&line).ok().as_ref() != Some(message) {
        let why =
            format!("it does not read back as it was (a number is not finite?): {}", Excerpt::of(&line));
        return Err(unsendable(why));
    }
    line.push(b'\n');
    Ok(line)
}

/// The message of a line, without its end.
pub fn decode<M: DeserializeOwned>(line: &[u8]) -> Result<M, WireError> {
    let unknown = |why: String| WireError::Unknown { excerpt: Excerpt::of(line), why };
    let text = std::str::from_utf8(line).map_err(|error| unknown(error.to_string()))?;
    serde_json::from_str(text).map_err(|error| unknown(error.to_string()))
}

/// Bytes as they come, cut into lines.
#[derive(Debug, Default)]
pub struct Lines {
    buffer: Vec<u8>,
    /// Before this there is no line's end.
    searched: usize,
}

impl Lines {
    /// More bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole line, without its end.
    ///
    /// # Errors
    /// [`WireError::TooLong`] as soon as the line is, whether it has an end or not.
    pub fn pop(&mut self) -> Result<Option<Vec<u8>>, WireError> {
        let end = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n');
        let length = end.map_or(self.buffer.len(), |end| self.searched + end);
        if length > MAX_LINE {
            return Err(WireError::TooLong { excerpt: Excerpt::of(&self.buffer[..length]) });
        }
        self.searched = length;
        if end.is_none() {
            return Ok(None);
        }
        let mut line: Vec<u8> = self.buffer.drain(..=length).collect();
        line.pop();
        self.searched = 0;
        Ok(Some(line))
    }

    /// How the conversation ended when no more bytes come.
    pub fn end(&self) -> WireError {
        if self.buffer.is_empty() {
            WireError::Closed
        } else {
            WireError::Cut { excerpt: Excerpt::of(&self.buffer) }
        }
    }
}

/// Whether an error says that nobody is at the other end.
fn is_gone(error: &io::Error) -> bool {
    // A UNIX socket whose peer left something unread gives "connection reset" in place of the end.
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// What the worker hears.
#[derive(Debug)]
pub struct Input {
    stream: UnixStream,
    lines: Lines,
}

impl Input {
    /// Listens to this stream, which must be a blocking one. A call of [`Self::request`] waits no longer than `patience`.
    pub fn new(stream: UnixStream, patience: Duration) -> io::Result<Input> {
        stream.set_read_timeout(Some(patience))?;
        Ok(Input { stream, lines: Lines::default() })
    }

    /// The next request; `None` when there was none for a while.
    pub fn request(&mut self) -> Result<Option<Request>, WireError> {
        loop {
            if let Some(line) = self.lines.pop()? {
                return decode(&line).map(Some);
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(self.lines.end()),
                Ok(n) => self.lines.push(&bytes[..n]),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return Ok(None),
                    _ if is_gone(&error) => return Err(self.lines.end()),
                    _ => return Err(error.into()),
                },
            }
        }
    }
}

/// What the worker says.
#[derive(Debug)]
pub struct Output {
    stream: UnixStream,
}

impl Output {
    /// Speaks into this stream, which must be a blocking one.
    pub fn new(stream: UnixStream) -> io::Result<Output> {
        stream.set_write_timeout(Some(STALL))?;
        Ok(Output { stream })
    }

    /// Sends a report. After an error other than [`WireError::Unsendable`] nothing more can be said: half a line may be
    /// out.
    pub fn send(&mut self, report: &Report) -> Result<(), WireError> {
        let line = encode(report)?;
        self.stream.write_all(&line).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => WireError::Stalled,
            _ if is_gone(&error) => WireError::Closed,
            _ => WireError::Io(error),
        })
    }

    /// Nothing more will be said. What was sent stays readable for the daemon.
    pub fn close(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
    }
}

/// The daemon's end of the conversation with one worker.
#[derive(Debug)]
pub struct Connection {
    stream: tokio::net::UnixStream,
    lines: Lines,
    /// Bytes that the socket did not take yet.
    pending: Vec<u8>,
    /// When it last took some while there were any.
    moved: Instant,
    /// The worker reads no more. Its last words may still be there.
    deaf: bool,
}

impl Connection {
    /// A conversation over this stream.
    pub fn new(stream: tokio::net::UnixStream) -> Connection {
        Connection {
            stream,
            lines: Lines::default(),
            pending: Vec::new(),
            moved: Instant::now(),
            deaf: false,
        }
    }

    /// Sends a request, without ever waiting: what the socket does not take now is sent by [`Self::next`] or by the next
    /// call of this. To a worker that has closed its end it is lost without an error, since the worker's last words
    /// come first; [`Self::next`] says how it ended.
    ///
    /// # Errors
    /// [`WireError::Stalled`] for a worker that does not read, [`WireError::Unsendable`], or the socket's own.
    pub fn send(&mut self, request: &Request) -> Result<(), WireError> {
        let line = encode(request)?;
        if self.deaf {
            return Ok(());
        }
        if self.pending.is_empty() {
            self.moved = Instant::now();
        }
        self.pending.extend_from_slice(&line);
        self.flush()?;
        if self.pending.len() > MAX_PENDING { Err(WireError::Stalled) } else { Ok(()) }
    }

    /// Gives the socket what it takes.
    fn flush(&mut self) -> Result<(), WireError> {
        while !self.pending.is_empty() {
            match self.stream.try_write(&self.pending) {
                Ok(written) => {
                    self.pending.drain(..written);
                    self.moved = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let stalled = self.moved.elapsed() >= STALL;
                    return if stalled { Err(WireError::Stalled) } else { Ok(()) };
                }
                Err(error) if is_gone(&error) => {
                    self.deaf = true;
                    self.pending.clear();
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next report. Cancel safe: nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// Any [`WireError`]; the conversation is over then.
    pub async fn next(&mut self) -> Result<Report, WireError> {
        loop {
            if let Some(line) = self.lines.pop()? {
                return decode(&line);
            }
            if self.pending.is_empty() {
                self.stream.ready(Interest::READABLE).await?;
            } else {
                let ready = self.stream.ready(Interest::READABLE | Interest::WRITABLE);
                let deadline = self.moved + STALL;
                if tokio::time::timeout_at(deadline, ready).await.is_err() {
                    return Err(WireError::Stalled);
                }
                self.flush()?;
            }
            let mut bytes = [0; 4096];
            match self.stream.try_read(&mut bytes) {
                Ok(0) => return Err(self.lines.end()),
                Ok(n) => self.lines.push(&bytes[..n]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if is_gone(&error) => return Err(self.lines.end()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::{
        Beat, Failed, Finished, Permit, Phase, Ready, Start, Started, SurveyOrder, VERSION,
    };
    use super::*;
    use crate::reason::Reason;
    use crate::train::observer::{EvaluationRecord, StepRecord};
    use crate::train::run::Summary;
    use proptest::prelude::*;

    fn finite() -> impl Strategy<Value = f64> {
        any::<f64>().prop_filter("finite", |x| x.is_finite())
    }

    fn reason() -> impl Strategy<Value = Reason> {
        prop::sample::select(Reason::ALL)
    }

    fn requests() -> impl Strategy<Value = Request> {
        let start = (any::<u32>(), any::<String>(), any::<String>(), any::<String>(), any::<Option<usize>>());
        prop_oneof![
            start.prop_map(|(version, run, directory, spec, threads)| Request::Start(Start {
                version,
                run,
                directory: directory.clone().into(),
                cache: directory.into(),
                spec,
                threads,
                survey: threads.map(|threads| SurveyOrder { probe: threads % 2 == 0 }),
            })),
            (any::<bool>(), finite(), any::<u64>(), any::<u64>()).prop_map(|(run, duty, until_ms, hold)| {
                Request::Permit(Permit { run, duty, until_ms, hold })
            }),
            any::<u64>().prop_map(|request| Request::Checkpoint { request }),
            any::<u64>().prop_map(|request| Request::Evaluate { request }),
            reason().prop_map(|reason| Request::Stop { reason }),
        ]
    }

    fn summary() -> impl Strategy<Value = Summary> {
        let floats = prop::array::uniform4(finite());
        (any::<String>(), any::<u64>(), floats, prop::option::of(finite()), any::<bool>()).prop_map(
            |(name, steps, [epochs, baseline, seconds, speed], loss, stopped_early)| Summary {
                name,
                steps,
                epochs,
                baseline_eval_loss: Some(baseline),
                best_eval_loss: loss,
                best_step: loss.map(|_| steps),
                last_eval_loss: loss,
                last_loss: loss,
                adapter_step: steps,
                stopped_early,
                tokens: steps,
                seconds,
                tokens_per_second: speed,
                peak_memory_bytes: loss.map(|_| steps),
                planned_memory_bytes: steps,
                trainable_parameters: steps,
                total_parameters: steps,
            },
        )
    }

    fn reports() -> impl Strategy<Value = Report> {
        let phase = prop::sample::select(vec![
            Phase::Starting,
            Phase::Preparing,
            Phase::Parked,
            Phase::Training,
            Phase::Evaluating,
            Phase::Saving,
        ]);
        let number = || any::<Option<u64>>();
        prop_oneof![
            (any::<u32>(), any::<String>())
                .prop_map(|(pid, device)| { Report::Ready(Ready { version: VERSION, pid, device }) }),
            (phase, prop::array::uniform4(any::<u64>())).prop_map(|(phase, [ticks, step, done, memory])| {
                Report::Beat(Beat { phase, ticks, step, done, of: done, memory })
            }),
            (prop::array::uniform3(any::<u64>()), any::<bool>()).prop_map(
                |([step, within, total], resumed)| {
                    Report::Started(Started { step, within, total, resumed })
                }
            ),
            (any::<u64>(), prop::array::uniform5(finite())).prop_map(
                |(step, [epoch, loss, grad_norm, learning_rate, tokens_per_second])| {
                    Report::Step(StepRecord {
                        step,
                        epoch,
                        loss,
                        grad_norm,
                        learning_rate,
                        tokens: step,
                        tokens_per_second,
                    })
                }
            ),
            (any::<u64>(), finite(), number()).prop_map(|(step, eval_loss, request)| {
                Report::Evaluated { record: EvaluationRecord { step, eval_loss }, request }
            }),
            (any::<u64>(), any::<u64>(), number()).prop_map(|(step, within, request)| Report::Committed {
                step,
                within,
                request
            }),
            (any::<u64>(), any::<String>()).prop_map(|(request, why)| Report::Refused { request, why }),
            any::<String>().prop_map(|text| Report::Note { text }),
            summary().prop_map(|s| Report::Finished(Finished::Complete { summary: Box::new(s) })),
            reason().prop_map(|reason| Report::Finished(Finished::Stopped { reason })),
            (reason(), any::<String>(), any::<bool>())
                .prop_map(|(reason, message, retry)| { Report::Failed(Failed { reason, message, retry }) }),
        ]
    }

    /// Everything that comes out of bytes cut into pieces, and how it ended.
    fn read<M: DeserializeOwned>(bytes: &[u8], pieces: usize) -> (Vec<M>, WireError) {
        let (mut lines, mut messages) = (Lines::default(), Vec::new());
        for piece in bytes.chunks(pieces.max(1)) {
            lines.push(piece);
            loop {
                match lines.pop() {
                    Ok(Some(line)) => match decode(&line) {
                        Ok(message) => messages.push(message),
                        Err(error) => return (messages, error),
                    },
                    Ok(None) => break,
                    Err(error) => return (messages, error),
                }
            }
        }
        (messages, lines.end())
    }

    proptest! {
        #[test]
        fn requests_come_through(sent in prop::collection::vec(requests(), 0..8), pieces in 1usize..200) {
            let bytes: Vec<u8> = sent.iter().flat_map(|r| encode(r).unwrap()).collect();
            let (got, end) = read::<Request>(&bytes, pieces);
            prop_assert_eq!(got, sent);
            prop_assert!(matches!(end, WireError::Closed), "{}", end);
        }

        #[test]
        fn reports_come_through(sent in prop::collection::vec(reports(), 0..8), pieces in 1usize..200) {
            let bytes: Vec<u8> = sent.iter().flat_map(|r| encode(r).unwrap()).collect();
            let (got, end) = read::<Report>(&bytes, pieces);
            prop_assert_eq!(got, sent);
            prop_assert!(matches!(end, WireError::Closed), "{}", end);
        }

        #[test]
        fn arbitrary_bytes_are_an_error_and_no_more(bytes in prop::collection::vec(any::<u8>(), 0..2000), pieces in 1usize..99) {
            let (_, end) = read::<Request>(&bytes, pieces);
            prop_assert!(end.to_string().is_ascii() || end.to_string().contains('…'));
            read::<Report>(&bytes, pieces);
        }

        #[test]
        fn a_changed_byte_is_read_or_refused(sent in reports(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
            let mut bytes = encode(&sent).unwrap();
            let at = at.index(bytes.len());
            bytes[at] = to;
            let (got, end) = read::<Report>(&bytes, 64);
            prop_assert!(got.len() <= 1, "{}", end);
        }

        #[test]
        fn nothing_is_sent_that_would_read_otherwise(
            mut sent in summary(),
            bad in prop::sample::select(vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY]),
            which in 0..5,
        ) {
            match which {
                0 => sent.epochs = bad,
                1 => sent.best_eval_loss = Some(bad),
                2 => sent.last_loss = Some(bad),
                3 => sent.seconds = bad,
                _ => sent.tokens_per_second = bad,
            }
            let sent = Report::Finished(Finished::Complete { summary: Box::new(sent) });
            let refused = matches!(encode(&sent), Err(WireError::Unsendable { .. }));
            prop_assert!(refused);
        }
    }

    #[test]
    fn the_longest_line_and_one_byte_more() {
        let long = |bytes: usize| {
            let empty = encode(&Report::Note { text: String::new() }).unwrap().len() - 1;
            Report::Note { text: "x".repeat(bytes - empty) }
        };
        let line = encode(&long(MAX_LINE)).unwrap();
        assert_eq!(line.len(), MAX_LINE + 1);
        assert_eq!(read::<Report>(&line, 4096).0, [long(MAX_LINE)]);
        assert!(matches!(encode(&long(MAX_LINE + 1)), Err(WireError::Unsendable { .. })));
        // Refused while it still comes in: the buffer does not grow without end.
        let mut lines = Lines::default();
        lines.push(&vec![b'y'; MAX_LINE + 1]);
        assert!(matches!(lines.pop(), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn errors_quote_what_came() {
        let (_, error) = read::<Request>(b"{\"permit\":\n", 64);
        assert!(error.to_string().contains(r#""{\"permit\":""#), "{error}");
        let (_, error) = read::<Request>(b"\xff\x1b[2J\n", 64);
        assert!(error.to_string().contains(r"\xff\x1b[2J") && error.to_string().contains("utf-8"), "{error}");
        let (_, error) = read::<Request>(b"{\"checkpoint\":", 64);
        assert!(matches!(error, WireError::Cut { .. }), "{error}");
        // A field too many is what a newer peer may send.
        let line = br#"{"stop":{"reason":"user","since":3}}"#;
        assert_eq!(decode::<Request>(line).unwrap(), Request::Stop { reason: Reason::User });
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Connection::new(tokio::net::UnixStream::from_std(ours).unwrap()), theirs)
    }

    #[test]
    fn last_words_come_through_though_nobody_listened() {
        runtime().block_on(async {
            let (mut daemon, worker) = pair();
            let permit = Request::Permit(Permit { run: true, duty: 1.0, until_ms: 1, hold: 0 });
            daemon.send(&permit).unwrap();
            let mut output = Output::new(worker.try_clone().unwrap()).unwrap();
            let last = Report::Finished(Finished::Stopped { reason: Reason::User });
            output.send(&last).unwrap();
            output.close();
            drop((output, worker)); // with a permit unread
            daemon.send(&permit).unwrap();
            daemon.send(&permit).unwrap();
            assert_eq!(daemon.next().await.unwrap(), last);
            assert!(matches!(daemon.next().await, Err(WireError::Closed)));
        });
    }

    #[test]
    fn a_worker_that_does_not_read_is_an_error_and_blocks_nobody() {
        runtime().block_on(async {
            let (mut daemon, worker) = pair();
            let long = Request::Stop { reason: Reason::User };
            // Before the runtime has looked at it once, a socket seems to take nothing.
            daemon.stream.writable().await.unwrap();
            let mut sent = 0;
            while daemon.pending.is_empty() {
                daemon.send(&long).unwrap();
                sent += 1;
            }
            daemon.moved -= STALL;
            assert!(matches!(daemon.next().await, Err(WireError::Stalled)));
            assert!(matches!(daemon.send(&long), Err(WireError::Stalled)));
            // One that reads after all gets every message, in order.
            let (mut daemon, mut input) = (daemon, Input::new(worker, STALL).unwrap());
            daemon.moved = Instant::now();
            let reader = std::thread::spawn(move || {
                let mut got = 0;
                while got < sent + 1 {
                    assert_eq!(input.request().unwrap(), Some(Request::Stop { reason: Reason::User }));
                    got += 1;
                }
                drop(input);
            });
            assert!(matches!(daemon.next().await, Err(WireError::Closed)));
            reader.join().unwrap();
        });
    }
}
