//! Programs in the guest, with their standard streams: the host's end.
//!
//! ```text
//! channel --output, credit, end--> Inbox --next()--> caller
//! caller --stdin(), drop--> channel
//! ```
//! The guest is not trusted: of each output stream no more than a window is held, which the
//! guest may fill again only after the caller has taken what was there; a guest that sends
//! more, or sends frames without bytes, loses the program. Dropping an [`Execution`] ends the
//! program in the guest.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forelay_guest_protocol::frames::{self, Frame, MAX_DATA_BYTES, Stream, WINDOW_BYTES};
use forelay_guest_protocol::messages::{ExitStatus, GuestCommand, GuestRequest, encode_line};
use tokio::sync::{Notify, mpsc};

use crate::channel::ChannelError;

/// A program's output is asked for again when so much of it was taken.
const CREDIT_STEP_BYTES: u32 = WINDOW_BYTES / 4;

/// What a program did.
#[derive(Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// It wrote to its standard output.
    Stdout(Vec<u8>),
    /// It wrote to its standard error.
    Stderr(Vec<u8>),
    /// It may be sent so many further bytes of its standard input.
    StdinCredit(u32),
    /// It ended; nothing follows.
    Ended(ExitStatus),
}

/// What the guest has sent of one program and nobody has taken.
#[derive(Default)]
struct Received {
    stdout: Output,
    stderr: Output,
    stdin_credit: u32,
    end: Option<Result<ExitStatus, ChannelError>>,
}

#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    /// Taken since the guest was given credit last.
    taken: u32,
}

impl Output {
    /// Adds what the guest has sent; false if it may not.
    fn add(&mut self, bytes: &[u8]) -> bool {
        let held = self.bytes.len() + self.taken as usize + bytes.len();
        let fits = !bytes.is_empty() && held <= WINDOW_BYTES as usize;
        if fits {
            self.bytes.extend_from_slice(bytes);
        }
        fits
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        if self.bytes.is_empty() {
            return None;
        }
        self.taken += self.bytes.len() as u32;
        Some(std::mem::take(&mut self.bytes))
    }

    fn credit(&mut self) -> u32 {
        if self.taken < CREDIT_STEP_BYTES {
            return 0;
        }
        std::mem::take(&mut self.taken)
    }
}

#[derive(Default)]
struct Inbox {
    received: Mutex<Received>,
    news: Notify,
}

impl Inbox {
    fn received(&self) -> MutexGuard<'_, Received> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, how: Result<ExitStatus, ChannelError>) {
        self.received().end.get_or_insert(how);
        self.news.notify_one();
    }
}

/// The programs of one guest.
#[derive(Default)]
pub(crate) struct Execs {
    running: Mutex<HashMap<u64, Arc<Inbox>>>,
}

impl std::fmt::Debug for Execs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Execs({})", self.running().len())
    }
}

impl Execs {
    fn running(&self) -> MutexGuard<'_, HashMap<u64, Arc<Inbox>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A program that is about to be started; what the guest says of `id` is its.
    pub(crate) fn expect(self: &Arc<Self>, id: u64, outgoing: mpsc::Sender<Vec<u8>>) -> Execution {
        let inbox = Arc::new(Inbox::default());
        self.running().insert(id, Arc::clone(&inbox));
        Execution {
            id,
            inbox,
            execs: Arc::clone(self),
            outgoing,
        }
    }

    /// Output of a program; what nobody expects is dropped.
    pub(crate) fn output(&self, frame: &Frame) {
        self.tell(frame.id, |inbox| {
            let mut received = inbox.received();
            let output = match frame.stream {
                Stream::Stdout => &mut received.stdout,
                Stream::Stderr => &mut received.stderr,
                Stream::Stdin => return false,
            };
            output.add(&frame.bytes)
        });
    }

    /// A program takes more of its standard input.
    pub(crate) fn stdin_credit(&self, id: u64, bytes: u32) {
        self.tell(id, |inbox| {
            let mut received = inbox.received();
            received.stdin_credit = received.stdin_credit.saturating_add(bytes);
            received.stdin_credit <= WINDOW_BYTES
        });
    }

    /// A program has ended.
    pub(crate) fn ended(&self, id: u64, status: ExitStatus) {
        if let Some(inbox) = self.running().remove(&id) {
            inbox.end(Ok(status));
        }
    }

    /// The channel is gone, and with it all programs.
    pub(crate) fn closed(&self) {
        for (_, inbox) in self.running().drain() {
            inbox.end(Err(ChannelError::Closed));
        }
    }

    /// Tells a program's inbox; one whose guest breaks the rules is given up.
    fn tell(&self, id: u64, what: impl FnOnce(&Inbox) -> bool) {
        let mut running = self.running();
        let Some(inbox) = running.get(&id).cloned() else {
            return;
        };
        if what(&inbox) {
            inbox.news.notify_one();
        } else {
            running.remove(&id);
            inbox.end(Err(ChannelError::Unexpected));
        }
    }
}

/// A program that runs in a guest. Dropping it ends the program.
#[derive(Debug)]
pub struct Execution {
    id: u64,
    inbox: Arc<Inbox>,
    execs: Arc<Execs>,
    outgoing: mpsc::Sender<Vec<u8>>,
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Inbox")
    }
}

impl Execution {
    /// What the program did next. Until this is called again, the guest holds back what is
    /// beyond a window. May be dropped while it waits.
    pub async fn next(&self) -> Result<ExecEvent, ChannelError> {
        loop {
            self.give_credit().await?;
            if let Some(event) = self.take() {
                return event;
            }
            self.inbox.news.notified().await;
        }
    }

    fn take(&self) -> Option<Result<ExecEvent, ChannelError>> {
        let mut received = self.inbox.received();
        if let Some(bytes) = received.stdout.take() {
            return Some(Ok(ExecEvent::Stdout(bytes)));
        }
        if let Some(bytes) = received.stderr.take() {
            return Some(Ok(ExecEvent::Stderr(bytes)));
        }
        let end = received.end.take();
        if end.is_some() {
            return end.map(|end| end.map(ExecEvent::Ended));
        }
        let credit = std::mem::take(&mut received.stdin_credit);
        (credit > 0).then_some(Ok(ExecEvent::StdinCredit(credit)))
    }

    async fn give_credit(&self) -> Result<(), ChannelError> {
        let permit = self.outgoing.reserve();
        let permit = permit.await.map_err(|_| ChannelError::Closed)?;
        let (stdout, stderr) = {
            let mut received = self.inbox.received();
            (received.stdout.credit(), received.stderr.credit())
        };
        if stdout > 0 || stderr > 0 {
            permit.send(self.request(GuestCommand::Credit { stdout, stderr }));
        }
        Ok(())
    }

    fn request(&self, command: GuestCommand) -> Vec<u8> {
        let id = self.id;
        encode_line(&GuestRequest { id, command })
    }

    /// Sends bytes for the program's standard input, or its end if there are none. The caller
    /// keeps to the credit: a window at first, then as much as events give.
    pub async fn stdin(&self, bytes: &[u8]) -> Result<(), ChannelError> {
        let mut rest = bytes;
        loop {
            let (part, further) = rest.split_at(rest.len().min(MAX_DATA_BYTES));
            let line = frames::encode(Stream::Stdin, self.id, part);
            let sent = self.outgoing.send(line).await;
            sent.map_err(|_| ChannelError::Closed)?;
            if further.is_empty() {
                return Ok(());
            }
            rest = further;
        }
    }
}

impl Drop for Execution {
    fn drop(&mut self) {
        if self.execs.running().remove(&self.id).is_none() {
            return;
        }
        let line = self.request(GuestCommand::End);
        let outgoing = self.outgoing.clone();
        if let Err(mpsc::error::TrySendError::Full(line)) = outgoing.try_send(line)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move { outgoing.send(line).await });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn started() -> (Arc<Execs>, Execution, mpsc::Receiver<Vec<u8>>) {
        let (outgoing, sent) = mpsc::channel(64);
        let execs = Arc::new(Execs::default());
        let execution = execs.expect(7, outgoing);
        (execs, execution, sent)
    }

    fn frame(stream: Stream, bytes: Vec<u8>) -> Frame {
        let id = 7;
        Frame { stream, id, bytes }
    }

    fn command(line: &[u8]) -> GuestCommand {
        serde_json::from_slice::<GuestRequest>(line)
            .unwrap()
            .command
    }

    #[tokio::test]
    async fn a_reader_that_is_slow_keeps_the_guest_waiting() {
        let (execs, execution, mut sent) = started();
        let part = || frame(Stream::Stdout, vec![1; CREDIT_STEP_BYTES as usize]);
        for _ in 0..4 {
            execs.output(&part());
        }
        // All that was allowed; nothing is given before something is taken.
        let ExecEvent::Stdout(bytes) = execution.next().await.unwrap() else {
            panic!("no output");
        };
        assert_eq!(bytes.len(), WINDOW_BYTES as usize);
        assert!(sent.try_recv().is_err());
        execs.stdin_credit(7, 5);
        assert_eq!(execution.next().await.unwrap(), ExecEvent::StdinCredit(5));
        let credit = GuestCommand::Credit {
            stdout: WINDOW_BYTES,
            stderr: 0,
        };
        assert_eq!(command(&sent.try_recv().unwrap()), credit);
        execs.output(&part());
        execs.ended(7, ExitStatus::Code(3));
        assert!(matches!(execution.next().await, Ok(ExecEvent::Stdout(_))));
        assert_eq!(
            execution.next().await.unwrap(),
            ExecEvent::Ended(ExitStatus::Code(3))
        );
        drop(execution);
        assert!(sent.try_recv().is_ok(), "the credit of the last part");
        assert!(
            sent.try_recv().is_err(),
            "one that has ended is not ended again"
        );
    }

    #[tokio::test]
    async fn a_guest_that_sends_more_than_it_may_loses_the_program() {
        for (credit, bytes) in [
            (0, vec![]),
            (0, vec![1; 40_000]),
            (WINDOW_BYTES + 1, vec![1]),
        ] {
            let (execs, execution, mut sent) = started();
            for _ in 0..20 {
                execs.output(&frame(Stream::Stderr, bytes.clone()));
                execs.stdin_credit(7, credit);
            }
            while matches!(execution.next().await, Ok(ExecEvent::Stderr(_))) {}
            assert!(execs.running().is_empty());
            drop(execution);
            while sent.try_recv().is_ok() {}
        }
    }

    #[tokio::test]
    async fn who_is_gone_ends_the_program() {
        let (execs, execution, mut sent) = started();
        execution.stdin(&vec![1; MAX_DATA_BYTES + 1]).await.unwrap();
        for expected in [MAX_DATA_BYTES, 1] {
            let line = sent.try_recv().unwrap();
            let frame = frames::decode(&line[..line.len() - 1]).unwrap();
            assert_eq!((frame.stream, frame.bytes.len()), (Stream::Stdin, expected));
        }
        drop(execution);
        assert_eq!(command(&sent.try_recv().unwrap()), GuestCommand::End);
        let (_, execution, _sent) = started();
        execution.execs.closed();
        assert!(matches!(execution.next().await, Err(ChannelError::Closed)));
        execs.output(&frame(Stream::Stdout, vec![1]));
        assert!(execs.running().is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_more_than_a_window_is_held(
            parts in proptest::collection::vec((0usize..60_000, any::<bool>()), 0..40),
        ) {
            let mut output = Output::default();
            for (len, taken) in parts {
                let fits = output.add(&vec![0; len]);
                prop_assert!(output.bytes.len() <= WINDOW_BYTES as usize);
                prop_assert!(fits || len == 0 || output.taken as usize + output.bytes.len() + len > WINDOW_BYTES as usize);
                if taken {
                    output.take();
                    output.credit();
                }
            }
        }
    }
}
