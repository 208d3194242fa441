//! The host's end of the guest channel: requests with replies, events into [`Progress`].
//!
//! The guest is not trusted: lines are bounded, what does not parse is counted and skipped,
//! replies nobody waits for are dropped, every request has a time limit.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forelay_guest_protocol::messages::{
    BootSteps, ErrorKind, GuestCommand, GuestMessage, GuestRequest, Line, MAX_LINE_BYTES, Mounted,
    Reply, Status, encode_line,
};
use tokio::sync::{mpsc, oneshot, watch};

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
}

type Waiting = oneshot::Sender<Reply>;

/// A connection to one guest's agent.
#[derive(Debug)]
pub struct Channel {
    requests: mpsc::Sender<(GuestRequest, Waiting)>,
    next_id: AtomicU64,
}

impl Channel {
    /// Serves a connection; what the guest reports goes into `progress`.
    pub fn start(
        connection: LineConnection,
        launched: Instant,
        progress: watch::Sender<Progress>,
    ) -> Self {
        let (requests, queue) = mpsc::channel(64);
        tokio::spawn(serve(connection, queue, Events { launched, progress }));
        // Ids of an earlier daemon's requests may still be answered: start elsewhere.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let seed = now.map_or(1, |now| (now.as_nanos() as u64) >> 8 << 20 >> 11 | 1);
        Self {
            requests,
            next_id: AtomicU64::new(seed),
        }
    }

    /// Sends a command and waits for its reply.
    pub async fn request(
        &self,
        command: GuestCommand,
        limit: Duration,
    ) -> Result<Reply, ChannelError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, reply) = oneshot::channel();
        let exchange = async {
            let sent = self
                .requests
                .send((GuestRequest { id, command }, sender))
                .await;
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
}

fn bounded(mut text: String) -> String {
    let mut end = text.len().min(MAX_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

async fn serve(
    mut connection: LineConnection,
    mut queue: mpsc::Receiver<(GuestRequest, Waiting)>,
    events: Events,
) {
    // Ends what a predecessor may have left half-written, then asks what was missed.
    let catch_up = GuestRequest {
        id: 0,
        command: GuestCommand::Status,
    };
    let mut first = vec![b'\n'];
    first.extend(encode_line(&catch_up));
    if connection.outgoing.send(first).await.is_err() {
        return;
    }
    let mut waiting: HashMap<u64, Waiting> = HashMap::new();
    loop {
        tokio::select! {
            line = connection.incoming.recv() => match line {
                Some(line) => handle(line, &mut waiting, &events),
                None => return,
            },
            request = queue.recv() => {
                let Some((request, sender)) = request else { return };
                waiting.retain(|_, sender| !sender.is_closed());
                waiting.insert(request.id, sender);
                if connection.outgoing.send(encode_line(&request)).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn handle(line: Line, waiting: &mut HashMap<u64, Waiting>, events: &Events) {
    let message = match &line {
        Line::Complete(bytes) => serde_json::from_slice::<GuestMessage>(bytes).ok(),
        Line::TooLong => None,
    };
    match message {
        Some(GuestMessage::Reply {
            id: 0,
            result: Reply::Status(status),
        }) => {
            events.status(status);
        }
        Some(GuestMessage::Reply { id, result }) => {
            if let Some(sender) = waiting.remove(&id) {
                let _ = sender.send(result);
            }
        }
        Some(event) => events.apply(event),
        None => tracing::debug!(
            max = MAX_LINE_BYTES,
            "skipped a line that is no guest message"
        ),
    }
}

struct Events {
    launched: Instant,
    progress: watch::Sender<Progress>,
}

impl Events {
    fn moment(&self, uptime_ms: u64) -> Moment {
        Moment {
            since_launch: self.launched.elapsed(),
            guest_uptime: Duration::from_millis(uptime_ms),
        }
    }

    fn apply(&self, event: GuestMessage) {
        match event {
            GuestMessage::Mounted(mounted) => self.mounted(mounted),
            GuestMessage::Ready { uptime_ms, steps } => self.ready(uptime_ms, steps),
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
            GuestMessage::Log { text } => tracing::info!(target: "guest", "{}", bounded(text)),
            GuestMessage::Reply { .. } => {}
        }
    }

    fn mounted(&self, mut mounted: Mounted) {
        let moment = self.moment(mounted.uptime_ms);
        mounted.source = bounded(mounted.source);
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

    fn status(&self, status: Status) {
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

    fn channel(stream: UnixStream) -> (Channel, watch::Receiver<Progress>) {
        let (sender, progress) = watch::channel(Progress::default());
        let connection = crate::lines::over(stream, 1 << 16);
        (Channel::start(connection, Instant::now(), sender), progress)
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
        let (reply, ()) = tokio::join!(channel.request(command, Duration::from_secs(10)), answer);
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
        let closed = channel
            .request(GuestCommand::Status, Duration::from_secs(10))
            .await;
        assert!(matches!(closed, Err(ChannelError::Closed)), "{closed:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_line_is_handled(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            id in 0u64..3,
            uptime_ms in any::<u64>(),
        ) {
            let (progress, _receiver) = watch::channel(Progress::default());
            let events = Events { launched: Instant::now(), progress };
            let mut waiting = HashMap::new();
            handle(Line::Complete(bytes), &mut waiting, &events);
            handle(Line::TooLong, &mut waiting, &events);
            let status = Status { ready_uptime_ms: Some(uptime_ms), ..Status::default() };
            let reply = GuestMessage::Reply { id, result: Reply::Status(status) };
            handle(Line::Complete(encode_line(&reply)), &mut waiting, &events);
            let phase = events.progress.borrow().phase;
            prop_assert_eq!(phase == Phase::Ready, id == 0);
        }
    }
}
