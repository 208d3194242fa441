//! The host's end of the guest channel: requests with replies, events into [`Progress`].
//!
//! The guest is not trusted: lines are bounded, what does not parse is skipped, replies
//! nobody waits for are dropped, every request has a time limit. The guest's lines are read
//! whether or not it reads the host's: two that wait for each other would wait for ever.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forelay_guest_protocol::frames;
use forelay_guest_protocol::messages::{
    BootSteps, ErrorKind, Exec, GuestCommand, GuestMessage, GuestRequest, Line, MAX_MESSAGE_BYTES,
    MAX_REQUEST_BYTES, Mounted, Reply, Status, encode_line,
};
use forelay_guest_protocol::snapshot::{MAX_FAILURES, Tier};
use tokio::sync::{mpsc, oneshot, watch};

use crate::exec::{Execs, Execution};
use crate::lifecycle::{Moment, Phase, Progress};
use crate::lines::LineConnection;

/// Longest text of the guest that is kept or logged.
const MAX_TEXT_BYTES: usize = 4096;

/// Why a request got no useful reply.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The VMM closed the channel.
    #[error("the guest channel is closed: the VM has ended or another daemon has taken it")]
    Closed,
    /// No reply in time.
    #[error("the guest did not answer within {0:?}")]
    TimedOut(Duration),
    /// The guest refused.
    #[error("the guest refused: {text}")]
    Refused {
        /// Kind of failure.
        kind: ErrorKind,
        /// The guest's words.
        text: String,
    },
    /// The guest sent another kind of reply.
    #[error("the guest gave an answer that does not fit the request")]
    Unexpected,
    /// The request is longer than a guest accepts.
    #[error("the request has {0} bytes, and a guest accepts {MAX_REQUEST_BYTES}")]
    TooLong(usize),
    /// A program wrote more than is collected.
    #[error(
        "the program wrote more than {} bytes, which is the most that is collected: stream it",
        crate::handle::MAX_COLLECTED_BYTES
    )]
    TooMuchOutput,
    /// A program with a time limit has not ended, and the guest has not ended it.
    #[error("the guest did not say within {0:?} that the program has ended")]
    Overdue(Duration),
    /// The guest's agent does not know how to.
    #[error(
        "the agent in the VM speaks version {0} of the guest channel and cannot do this: build \
         the kernel component anew and launch the VM again"
    )]
    Outdated(u32),
}

/// How much longer than a program may run the guest may take to end it and say so.
const END_LIMIT: Duration = Duration::from_secs(70);
/// First version of the protocol with programs whose streams are frames.
const STREAMS_SINCE: u32 = 2;
/// First version of the protocol with terminals.
const TERMINALS_SINCE: u32 = 5;

/// Who waits for replies.
#[derive(Debug, Default)]
struct Waiting(Mutex<Replies>);

#[derive(Debug, Default)]
struct Replies {
    /// By the request's id.
    senders: HashMap<u64, oneshot::Sender<Reply>>,
    /// No reply comes any more.
    is_closed: bool,
}

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, Replies> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lines of a guest's that are logged at once; after that, one a second.
const LOG_BURST: u64 = 20;

/// How much of what a guest says is logged.
#[derive(Debug)]
struct LogBudget {
    left: u64,
    /// Since when nothing was added to it.
    since: Instant,
    dropped: u64,
}

impl LogBudget {
    fn new(now: Instant) -> Self {
        let (left, since, dropped) = (LOG_BURST, now, 0);
        Self {
            left,
            since,
            dropped,
        }
    }

    /// Whether a line is logged now, and how many were not since the last one.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let seconds = now.saturating_duration_since(self.since).as_secs();
        self.since += Duration::from_secs(seconds);
        self.left = self.left.saturating_add(seconds).min(LOG_BURST);
        let Some(left) = self.left.checked_sub(1) else {
            self.dropped += 1;
            return None;
        };
        self.left = left;
        Some(std::mem::take(&mut self.dropped))
    }
}

/// A connection to one guest's agent.
#[derive(Debug)]
pub struct Channel {
    outgoing: mpsc::Sender<Vec<u8>>,
    waiting: Arc<Waiting>,
    execs: Arc<Execs>,
    next_id: AtomicU64,
    /// Version that the guest speaks, once it has said so.
    version: watch::Receiver<Option<u32>>,
    launched: Arc<Mutex<Instant>>,
}

impl Channel {
    /// Serves a connection of the VM `vm`; what the guest reports goes into `progress`. One that may
    /// have talked to another host before is asked what was missed.
    pub fn start(
        vm: &str,
        connection: LineConnection,
        is_new: bool,
        launched: Instant,
        progress: watch::Sender<Progress>,
    ) -> Self {
        let LineConnection { incoming, outgoing } = connection;
        let (version_sender, version) = watch::channel(None);
        let (waiting, execs) = (Arc::<Waiting>::default(), Arc::<Execs>::default());
        let launched = Arc::new(Mutex::new(launched));
        if !is_new {
            tokio::spawn(catch_up(outgoing.clone()));
        }
        let receiver = Receiver {
            waiting: Arc::clone(&waiting),
            execs: Arc::clone(&execs),
            version: version_sender,
            events: Events::new(vm, Arc::clone(&launched), progress),
        };
        tokio::spawn(receiver.serve(incoming));
        // Ids of an earlier daemon's requests may still be answered: start elsewhere.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let seed = now.map_or(1, |now| (now.as_nanos() as u64) >> 8 << 20 >> 11 | 1);
        Self {
            outgoing,
            waiting,
            execs,
            next_id: AtomicU64::new(seed),
            version,
            launched,
        }
    }

    /// What the guest reports from now on is counted from this moment.
    pub fn count_from(&self, launched: Instant) {
        *self.launched.lock().unwrap_or_else(PoisonError::into_inner) = launched;
    }

    /// Sends a command and waits for its reply.
    pub async fn request(
        &self,
        command: GuestCommand,
        limit: Duration,
    ) -> Result<Reply, ChannelError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        self.request_as(id, command, limit).await
    }

    async fn request_as(
        &self,
        id: u64,
        command: GuestCommand,
        limit: Duration,
    ) -> Result<Reply, ChannelError> {
        let line = encode_line(&GuestRequest { id, command });
        if line.len() > MAX_REQUEST_BYTES {
            return Err(ChannelError::TooLong(line.len()));
        }
        let (sender, reply) = oneshot::channel();
        let exchange = async {
            {
                let mut waiting = self.waiting.lock();
                if waiting.is_closed {
                    return Err(ChannelError::Closed);
                }
                waiting.senders.retain(|_, sender| !sender.is_closed());
                waiting.senders.insert(id, sender);
            }
            let sent = self.outgoing.send(line).await;
            sent.map_err(|_| ChannelError::Closed)?;
            reply.await.map_err(|_| ChannelError::Closed)
        };
        match tokio::time::timeout(limit, exchange).await {
            Ok(Ok(Reply::Error { kind, text })) => Err(ChannelError::Refused {
                kind,
                text: bounded(text),
            }),
            Ok(result) => result,
            Err(_) => Err(ChannelError::TimedOut(limit)),
        }
    }

    /// Until the guest's end of the channel is closed and all that came over it is handled.
    pub fn closed(&self) -> impl Future<Output = ()> + use<> {
        let mut version = self.version.clone();
        // Its sender goes with the receiver of the guest's lines.
        async move { while version.changed().await.is_ok() {} }
    }

    /// Sends a command that has no reply, or whose reply is an event to this host.
    pub async fn tell(&self, command: GuestCommand) {
        let line = encode_line(&GuestRequest { id: 0, command });
        // A connection that is gone is noticed by who reads from it.
        let _ = self.outgoing.send(line).await;
    }

    /// Which version the guest speaks, once it has said so.
    pub fn version(&self) -> Option<u32> {
        *self.version.borrow()
    }

    /// Waits until the guest has said which version it speaks, and refuses one before `since`.
    pub async fn require(&self, since: u32, limit: Duration) -> Result<(), ChannelError> {
        let mut version = self.version.clone();
        let known = tokio::time::timeout(limit, version.wait_for(Option::is_some)).await;
        let known = known.map_err(|_| ChannelError::TimedOut(limit))?;
        let known = known.map_err(|_| ChannelError::Closed)?.unwrap_or(0);
        match known < since {
            true => Err(ChannelError::Outdated(known)),
            false => Ok(()),
        }
    }

    /// Starts a program; `limit` is for the start alone.
    pub async fn start_program(
        &self,
        exec: Exec,
        limit: Duration,
    ) -> Result<Execution, ChannelError> {
        if self.version.borrow().is_none() {
            self.tell(GuestCommand::Status).await;
        }
        let since = match exec.terminal {
            Some(_) => TERMINALS_SINCE,
            None => STREAMS_SINCE,
        };
        self.require(since, limit).await?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let run_limit = (exec.timeout_ms > 0).then(|| Duration::from_millis(exec.timeout_ms));
        let patience = run_limit.map(|limit| limit.saturating_add(END_LIMIT));
        let execution = self.execs.expect(id, patience, self.outgoing.clone());
        match self
            .request_as(id, GuestCommand::Start(exec), limit)
            .await?
        {
            Reply::Started => Ok(execution),
            _ => Err(ChannelError::Unexpected),
        }
    }
}

pub(crate) fn bounded(mut text: String) -> String {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// What a clone could not be given, as much as is listened to.
pub(crate) fn bounded_failures(mut failures: Vec<String>) -> Vec<String> {
    failures.truncate(MAX_FAILURES);
    failures.into_iter().map(bounded).collect()
}

/// Ends what a predecessor has left, half a line and programs, then asks what was missed.
async fn catch_up(outgoing: mpsc::Sender<Vec<u8>>) {
    let mut first = vec![b'\n'];
    for command in [GuestCommand::EndAll, GuestCommand::Status] {
        first.extend(encode_line(&GuestRequest { id: 0, command }));
    }
    // A connection that is gone is noticed by who reads from it.
    let _ = outgoing.send(first).await;
}

/// Takes what the guest says to where it belongs; waits for nobody.
struct Receiver {
    waiting: Arc<Waiting>,
    execs: Arc<Execs>,
    version: watch::Sender<Option<u32>>,
    events: Events,
}

impl Receiver {
    async fn serve(self, mut incoming: mpsc::Receiver<Line>) {
        while let Some(line) = incoming.recv().await {
            self.handle(line);
        }
        *self.waiting.lock() = Replies {
            is_closed: true,
            ..Replies::default()
        };
        self.execs.closed();
    }

    fn handle(&self, line: Line) {
        let Line::Complete(line) = line else {
            return tracing::debug!(max = MAX_MESSAGE_BYTES, "skipped a line that is too long");
        };
        if let Some(frame) = frames::decode(&line) {
            return self.execs.output(&frame);
        }
        match serde_json::from_slice::<GuestMessage>(&line) {
            Ok(GuestMessage::Reply {
                id: 0,
                result: Reply::Status(status),
            }) => {
                self.version.send_replace(Some(status.protocol));
                self.events.status(status);
            }
            Ok(GuestMessage::Reply { id, result }) => {
                let waiting = self.waiting.lock().senders.remove(&id);
                if let Some(sender) = waiting {
                    let _ = sender.send(result);
                }
            }
            Ok(GuestMessage::Ended { id, status }) => self.execs.ended(id, status),
            Ok(GuestMessage::StdinCredit { id, bytes }) => self.execs.stdin_credit(id, bytes),
            Ok(event) => self.events.apply(event),
            Err(_) => tracing::debug!("skipped a line that is no guest message"),
        }
    }
}

struct Events {
    vm: String,
    launched: Arc<Mutex<Instant>>,
    progress: watch::Sender<Progress>,
    log: Mutex<LogBudget>,
}

impl Events {
    fn new(vm: &str, launched: Arc<Mutex<Instant>>, progress: watch::Sender<Progress>) -> Self {
        let log = Mutex::new(LogBudget::new(Instant::now()));
        Self {
            vm: vm.to_owned(),
            launched,
            progress,
            log,
        }
    }

    /// Logs what the guest says: not all that one may say, and no line that looks like one of
    /// the host's.
    fn log(&self, text: String) {
        let mut budget = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(dropped) = budget.take(Instant::now()) {
            let text = bounded(text);
            tracing::info!(target: "guest", vm = self.vm, dropped, "{}", text.escape_debug());
        }
    }

    fn moment(&self, uptime_ms: u64) -> Moment {
        let launched = *self.launched.lock().unwrap_or_else(PoisonError::into_inner);
        Moment {
            since_launch: launched.elapsed(),
            guest_uptime: Duration::from_millis(uptime_ms),
        }
    }

    fn apply(&self, event: GuestMessage) {
        match event {
            GuestMessage::Mounted(mounted) => self.mounted(mounted),
            GuestMessage::Ready { uptime_ms, steps } => self.ready(uptime_ms, steps),
            GuestMessage::Held { tier } => self.held(tier),
            GuestMessage::Exited(status) => {
                self.progress.send_modify(|progress| {
                    progress.entrypoint.get_or_insert(status);
                });
            }
            GuestMessage::Failed { text } => {
                self.progress.send_modify(|progress| {
                    progress.failure.get_or_insert(bounded(text));
                });
            }
            GuestMessage::Log { text } => self.log(text),
            GuestMessage::Reply { .. }
            | GuestMessage::Ended { .. }
            | GuestMessage::StdinCredit { .. } => {}
        }
    }

    fn mounted(&self, mut mounted: Mounted) {
        let moment = self.moment(mounted.uptime_ms);
        mounted.source = bounded(mounted.source);
        mounted.failures = bounded_failures(mounted.failures);
        self.progress.send_modify(|progress| {
            progress.mounted.get_or_insert(moment);
            progress.root.get_or_insert(mounted);
            progress.advance(Phase::Mounted);
        });
    }

    fn ready(&self, uptime_ms: u64, steps: BootSteps) {
        let moment = self.moment(uptime_ms);
        self.progress.send_modify(|progress| {
            progress.ready.get_or_insert(moment);
            progress
                .steps
                .get_or_insert(steps.in_order(uptime_ms.saturating_mul(1000)));
            progress.advance(Phase::Ready);
        });
    }

    fn held(&self, tier: Tier) {
        self.progress
            .send_modify(|progress| progress.held = Some(tier));
    }

    fn status(&self, status: Status) {
        if let Some(tier) = status.held {
            return self.held(tier);
        }
        let steps = status.mounted.steps;
        self.mounted(status.mounted);
        if let Some(uptime_ms) = status.ready_uptime_ms {
            self.ready(uptime_ms, steps);
        }
        if let Some(exit) = status.exited {
            self.apply(GuestMessage::Exited(exit));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    /// For what is answered at once, on a machine that is as busy as can be.
    const LONG: Duration = Duration::from_secs(600);

    fn channel(stream: UnixStream) -> (Channel, watch::Receiver<Progress>) {
        let (sender, progress) = watch::channel(Progress::default());
        let connection = crate::lines::over(stream, 1 << 16);
        let channel = Channel::start("web", connection, false, Instant::now(), sender);
        (channel, progress)
    }

    #[tokio::test]
    async fn garbage_before_and_between_messages_is_skipped() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let (channel, mut progress) = channel(host);
        guest
            .write_all(b"\xff\xfe{\"reply\":\nnull\n{}\n[[[[")
            .await
            .unwrap();
        guest.write_all(&vec![b'x'; 1 << 17]).await.unwrap();
        guest
            .write_all(b"\n{\"reply\":{\"id\":77,\"result\":\"detached\"}}\n")
            .await
            .unwrap();
        guest
            .write_all(b"{\"ready\":{\"uptime_ms\":5}}\n")
            .await
            .unwrap();
        progress
            .wait_for(|progress| progress.phase == Phase::Ready)
            .await
            .unwrap();

        let answer = async {
            let mut buffer = vec![0; 4096];
            let mut text = String::new();
            let id = loop {
                let count = guest.read(&mut buffer).await.unwrap();
                text.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
                let mut requests = text.lines().filter_map(|line| {
                    serde_json::from_str::<GuestRequest>(line)
                        .ok()
                        .filter(|request| request.id != 0)
                });
                if let Some(request) = requests.next_back() {
                    break request.id;
                }
            };
            let reply = GuestMessage::Reply {
                id,
                result: Reply::Detached,
            };
            guest.write_all(&encode_line(&reply)).await.unwrap();
        };
        let command = GuestCommand::Detach {
            uuid: String::new(),
        };
        let (reply, ()) = tokio::join!(channel.request(command, LONG), answer);
        assert_eq!(reply.unwrap(), Reply::Detached);
    }

    #[tokio::test]
    async fn silence_and_a_closed_channel_are_errors() {
        let (host, guest) = UnixStream::pair().unwrap();
        let (channel, _progress) = channel(host);
        let silent = channel
            .request(GuestCommand::Status, Duration::from_millis(20))
            .await;
        assert!(matches!(silent, Err(ChannelError::TimedOut(_))));
        drop(guest);
        // Also one that comes when all who waited were told.
        channel.closed().await;
        let closed = channel.request(GuestCommand::Status, LONG).await;
        assert!(matches!(closed, Err(ChannelError::Closed)), "{closed:?}");
    }

    #[test]
    fn a_guest_that_talks_without_end_is_logged_in_parts() {
        let start = Instant::now();
        let mut budget = LogBudget::new(start);
        let at = |seconds| start + Duration::from_secs(seconds);
        let logged = |budget: &mut LogBudget, now, lines| {
            (0..lines)
                .filter_map(|_| budget.take(now))
                .collect::<Vec<_>>()
        };
        assert_eq!(logged(&mut budget, at(0), 100), [0; LOG_BURST as usize]);
        assert_eq!(logged(&mut budget, at(2), 100), [80, 0]);
        assert_eq!(logged(&mut budget, at(1000), 100).len(), LOG_BURST as usize);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_line_is_handled(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            id in 0u64..3,
            uptime_ms in any::<u64>(),
        ) {
            let (progress, seen) = watch::channel(Progress::default());
            let receiver = Receiver {
                waiting: Arc::default(),
                execs: Arc::default(),
                version: watch::channel(None).0,
                events: Events::new("web", Arc::new(Mutex::new(Instant::now())), progress),
            };
            receiver.handle(Line::Complete(bytes));
            receiver.handle(Line::TooLong);
            let status = Status { ready_uptime_ms: Some(uptime_ms), ..Status::default() };
            let reply = GuestMessage::Reply { id, result: Reply::Status(status) };
            receiver.handle(Line::Complete(encode_line(&reply)));
            let phase = seen.borrow().phase;
            prop_assert_eq!(phase == Phase::Ready, id == 0);
        }
    }
}
