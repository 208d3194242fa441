//! Programs in the guest, with their standard streams: the host's end.
//!
//! ```text
//! channel --output, credit, end--> Inbox --next()--> caller
//! caller --stdin(), drop--> channel
//! ```
//! The guest is not trusted: of each output stream no more than a window is held, which the
//! guest may fill again only after the caller has taken what was there; a guest that sends
//! more, sends frames without bytes, or gives credit for input that it was not sent, loses
//! the program. With a time limit the guest is waited for so long and no longer. Dropping an
//! [`Execution`] ends the program in the guest.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forelay_guest_protocol::frames::{self, Frame, MAX_DATA_BYTES, Stream, WINDOW_BYTES};
use forelay_guest_protocol::messages::{
    ExitStatus, GuestCommand, GuestRequest, TerminalSize, encode_line,
};
use tokio::sync::mpsc::error::TrySendError;
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
    /// Whose turn it is: a flood on one stream does not keep the other back.
    stderr_is_next: bool,
    /// Sent to the guest and not given back as credit.
    stdin_sent: u64,
    stdin_credit: u32,
    end: Option<Result<ExitStatus, ChannelError>>,
    /// How long the guest was waited for.
    waited: Duration,
}

impl Received {
    fn take_output(&mut self) -> Option<ExecEvent> {
        for _ in 0..2 {
            self.stderr_is_next = !self.stderr_is_next;
            let event = if self.stderr_is_next {
                self.stdout.take().map(ExecEvent::Stdout)
            } else {
                self.stderr.take().map(ExecEvent::Stderr)
            };
            if event.is_some() {
                return event;
            }
        }
        None
    }
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

    fn credit_is_due(&self) -> bool {
        self.taken >= CREDIT_STEP_BYTES
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
    /// The guest is waited for until it ended, at most `patience` in all.
    pub(crate) fn expect(
        self: &Arc<Self>,
        id: u64,
        patience: Option<Duration>,
        outgoing: mpsc::Sender<Vec<u8>>,
    ) -> Execution {
        let inbox = Arc::new(Inbox::default());
        self.running().insert(id, Arc::clone(&inbox));
        Execution {
            id,
            inbox,
            patience,
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
            // Else it could have the caller send, and hold, what it never takes.
            let Some(rest) = received.stdin_sent.checked_sub(bytes.into()) else {
                return false;
            };
            received.stdin_sent = rest;
            received.stdin_credit = received.stdin_credit.saturating_add(bytes);
            true
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
    patience: Option<Duration>,
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
        let Some(patience) = self.patience else {
            return self.event().await;
        };
        // The time that the caller takes is not the guest's.
        let (started, before) = (Instant::now(), self.inbox.received().waited);
        let event = tokio::time::timeout(patience.saturating_sub(before), self.event()).await;
        self.inbox.received().waited += started.elapsed();
        event.unwrap_or(Err(ChannelError::Overdue(patience)))
    }

    async fn event(&self) -> Result<ExecEvent, ChannelError> {
        loop {
            let is_given = self.give_credit();
            if let Some(event) = self.take() {
                return event;
            }
            tokio::select! {
                permit = self.outgoing.reserve(), if !is_given => {
                    if let Ok(permit) = permit {
                        self.send_credit(permit);
                    }
                }
                () = self.inbox.news.notified() => {}
            }
        }
    }

    fn take(&self) -> Option<Result<ExecEvent, ChannelError>> {
        let mut received = self.inbox.received();
        let credit = std::mem::take(&mut received.stdin_credit);
        if credit > 0 {
            return Some(Ok(ExecEvent::StdinCredit(credit)));
        }
        if let Some(output) = received.take_output() {
            return Some(Ok(output));
        }
        let end = received.end.take();
        end.map(|end| end.map(ExecEvent::Ended))
    }

    /// Lets the guest send more if enough was taken; false if there is no room to say so now.
    fn give_credit(&self) -> bool {
        let is_due = {
            let received = self.inbox.received();
            received.stdout.credit_is_due() || received.stderr.credit_is_due()
        };
        if !is_due {
            return true;
        }
        match self.outgoing.try_reserve() {
            Ok(permit) => self.send_credit(permit),
            // What has come is still to be taken; the end is told by who reads.
            Err(TrySendError::Closed(())) => {}
            Err(TrySendError::Full(())) => return false,
        }
        true
    }

    fn send_credit(&self, permit: mpsc::Permit<'_, Vec<u8>>) {
        let (stdout, stderr) = {
            let mut received = self.inbox.received();
            let stdout = std::mem::take(&mut received.stdout.taken);
            (stdout, std::mem::take(&mut received.stderr.taken))
        };
        permit.send(self.request(GuestCommand::Credit { stdout, stderr }));
    }

    fn request(&self, command: GuestCommand) -> Vec<u8> {
        let id = self.id;
        encode_line(&GuestRequest { id, command })
    }

    /// Tells the program's terminal its size.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), ChannelError> {
        let line = self.request(GuestCommand::Resize(size));
        let sent = self.outgoing.send(line).await;
        sent.map_err(|_| ChannelError::Closed)
    }

    /// Sends bytes for the program's standard input, or its end if there are none. The caller
    /// keeps to the credit: a window at first, then as much as events give.
    pub async fn stdin(&self, bytes: &[u8]) -> Result<(), ChannelError> {
        let mut rest = bytes;
        loop {
            let (part, further) = rest.split_at(rest.len().min(MAX_DATA_BYTES));
            let line = frames::encode(Stream::Stdin, self.id, part);
            self.inbox.received().stdin_sent += part.len() as u64;
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
        if let Err(TrySendError::Full(line)) = outgoing.try_send(line)
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
        let (outgoing, sent) = mpsc::channel(8);
        let execs = Arc::new(Execs::default());
        let execution = execs.expect(7, None, outgoing);
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
        execution.stdin(&[1; 5]).await.unwrap();
        assert!(sent.try_recv().is_ok());
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
            // It was sent no input.
            (1, vec![1]),
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
    async fn what_has_come_is_told_though_the_guest_takes_no_credit() {
        for is_closed in [false, true] {
            let (execs, execution, mut sent) = started();
            execs.output(&frame(Stream::Stdout, vec![1; CREDIT_STEP_BYTES as usize]));
            assert!(matches!(execution.next().await, Ok(ExecEvent::Stdout(_))));
            while execution.outgoing.try_send(Vec::new()).is_ok() {}
            if is_closed {
                sent.close();
                while sent.recv().await.is_some() {}
            }
            execs.output(&frame(Stream::Stderr, vec![2]));
            execs.ended(7, ExitStatus::Code(3));
            assert_eq!(execution.next().await.unwrap(), ExecEvent::Stderr(vec![2]));
            let end = ExecEvent::Ended(ExitStatus::Code(3));
            assert_eq!(execution.next().await.unwrap(), end);
        }
        // The credit follows when there is room; one that waits is told what comes meanwhile.
        let (execs, execution, mut sent) = started();
        execs.output(&frame(Stream::Stdout, vec![1; CREDIT_STEP_BYTES as usize]));
        assert!(matches!(execution.next().await, Ok(ExecEvent::Stdout(_))));
        while execution.outgoing.try_send(Vec::new()).is_ok() {}
        let (event, ()) = tokio::join!(execution.next(), async {
            execs.output(&frame(Stream::Stderr, vec![2]));
        });
        assert_eq!(event.unwrap(), ExecEvent::Stderr(vec![2]));
        let (event, ()) = tokio::join!(execution.next(), async {
            while sent.recv().await.unwrap().is_empty() {}
            execs.output(&frame(Stream::Stderr, vec![2]));
        });
        assert_eq!(event.unwrap(), ExecEvent::Stderr(vec![2]));
    }

    #[tokio::test]
    async fn a_flood_on_one_stream_keeps_nothing_else_back() {
        let (execs, execution, _sent) = started();
        execution.stdin(&[1; 5]).await.unwrap();
        let mut told = Vec::new();
        for _ in 0..3 {
            for stream in [Stream::Stdout, Stream::Stderr] {
                execs.output(&frame(stream, vec![1]));
            }
            execs.stdin_credit(7, 1);
            told.push(execution.next().await.unwrap());
            told.push(execution.next().await.unwrap());
        }
        assert_eq!(
            told.iter()
                .filter(|event| matches!(event, ExecEvent::StdinCredit(1)))
                .count(),
            3
        );
        assert!(
            told.iter()
                .any(|event| matches!(event, ExecEvent::Stderr(_))),
            "{told:?}"
        );
    }

    #[tokio::test]
    async fn a_guest_that_says_nothing_is_waited_for_so_long_and_no_longer() {
        let (outgoing, _sent) = mpsc::channel(8);
        let execs = Arc::new(Execs::default());
        let patience = Some(Duration::from_millis(50));
        let execution = execs.expect(7, patience, outgoing);
        // Not even if it says something time and again.
        let dribble = async {
            loop {
                execs.output(&frame(Stream::Stdout, vec![1]));
                tokio::task::yield_now().await;
            }
        };
        let wait = async {
            loop {
                if let Err(error) = execution.next().await {
                    return error;
                }
            }
        };
        let overdue = tokio::select! {
            error = wait => error,
            () = dribble => unreachable!(),
        };
        assert!(matches!(overdue, ChannelError::Overdue(_)));
        // What has come is told even then.
        execs.ended(7, ExitStatus::TimedOut);
        while !matches!(execution.next().await.unwrap(), ExecEvent::Ended(_)) {}
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
                    output.taken = 0;
                }
            }
        }
    }
}
