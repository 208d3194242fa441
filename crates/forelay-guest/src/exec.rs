//! Programs that the host runs in the guest, with their standard streams on the channel.
//!
//! ```text
//! channel reader --stdin, credit, end--> Inbox --> thread of the program --> Port
//!         reaper --exit status---------->            |  poll(2)
//!                                                    +--> pipes of the program
//! ```
//! One thread serves one program. Output is read from a pipe only as far as the host gave
//! credit for it, so that a program whose output nobody takes waits, and nothing piles up.
//!
//! Invariants: all that a program itself has written before it ended is sent before its end
//! is; what children of it that live on write later goes nowhere and blocks nobody. A
//! program whose host or client is gone is ended.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forelay_guest_protocol::frames::{self, MAX_DATA_BYTES, Stream, WINDOW_BYTES};
use forelay_guest_protocol::messages::{
    ErrorKind, Exec, ExitStatus, GuestMessage, Reply, TerminalSize, encode_line,
};

use crate::process::{self, Reaper};
use crate::sys::{self, WakeUp};
use crate::terminal::{self, Terminal};

/// Programs that may run at once.
const MAX_RUNNING: usize = 64;
/// How long a program may take to end when it is asked to, before it is killed.
const END_GRACE: Duration = Duration::from_secs(10);
/// Stack of a thread that serves a program.
const STACK_BYTES: usize = 128 << 10;

/// The port of the guest channel, for whole lines of any thread.
pub struct Port(Mutex<File>);

impl Port {
    /// Owns the writing side of an open port.
    pub fn new(file: File) -> Self {
        Self(Mutex::new(file))
    }

    /// Sends a message. It starts on a new line, whatever was cut when a host went away.
    pub fn send(&self, message: &GuestMessage) {
        let mut line = vec![b'\n'];
        line.extend(encode_line(message));
        self.write(&line);
    }

    /// While no host is connected the write blocks; other errors lose one line.
    pub fn write(&self, line: &[u8]) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = file.write_all(line);
    }
}

/// What the host and the reaper say to the thread that serves a program.
struct Inbox {
    news: Mutex<News>,
    wake: WakeUp,
}

#[derive(Default)]
struct News {
    stdin: Vec<u8>,
    /// Bytes of standard input that the host has sent and the program has not taken.
    stdin_held: usize,
    stdin_ended: bool,
    stdout_credit: u64,
    stderr_credit: u64,
    /// The terminal's new size.
    size: Option<TerminalSize>,
    end: bool,
    exited: Option<ExitStatus>,
}

impl Inbox {
    fn news(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, what: impl FnOnce(&mut News)) {
        what(&mut self.news());
        self.wake.set();
    }
}

/// The programs whose end the host was not told yet.
#[derive(Default)]
pub struct Execs {
    running: Mutex<HashMap<u64, Arc<Inbox>>>,
    orphans: Mutex<Orphans>,
}

/// Pipes of programs that have ended, in the hands of children that live on.
#[derive(Default)]
struct Orphans {
    added: Vec<File>,
    /// Wakes the thread that reads them all; none if there are none.
    reader: Option<Arc<Inbox>>,
}

impl Execs {
    fn running(&self) -> MutexGuard<'_, HashMap<u64, Arc<Inbox>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, id: u64, what: impl FnOnce(&mut News)) {
        let inbox = self.running().get(&id).cloned();
        // One that has just ended needs nothing any more.
        if let Some(inbox) = inbox {
            inbox.tell(what);
        }
    }

    /// Bytes for a program's standard input; none are its end.
    pub fn stdin(&self, id: u64, bytes: &[u8]) {
        self.tell(id, |news| {
            news.stdin_held += bytes.len();
            if news.stdin_held > WINDOW_BYTES as usize {
                // More than it was allowed: such a host is not to be helped.
                news.end = true;
                return;
            }
            news.stdin_ended |= bytes.is_empty();
            news.stdin.extend_from_slice(bytes);
        });
    }

    /// Lets a program write more.
    pub fn credit(&self, id: u64, stdout: u32, stderr: u32) {
        self.tell(id, |news| {
            news.stdout_credit = news.stdout_credit.saturating_add(stdout.into());
            news.stderr_credit = news.stderr_credit.saturating_add(stderr.into());
        });
    }

    /// Tells a program's terminal its size.
    pub fn resize(&self, id: u64, size: TerminalSize) {
        self.tell(id, |news| news.size = Some(size));
    }

    /// Ends a program whose client has gone.
    pub fn end(&self, id: u64) {
        self.tell(id, |news| news.end = true);
    }

    /// Ends all: they were started for a host that has gone.
    pub fn end_all(&self) {
        for inbox in self.running().values() {
            inbox.tell(|news| news.end = true);
        }
    }

    /// Starts a program; everything after that is said on the port.
    pub fn start(
        self: &Arc<Self>,
        id: u64,
        exec: Exec,
        env: &BTreeMap<String, String>,
        reaper: &Arc<Reaper>,
        port: &Arc<Port>,
    ) -> Result<(), (ErrorKind, String)> {
        let failed = |error: io::Error| (ErrorKind::Failed, error.to_string());
        let inbox = Arc::new(Inbox {
            news: Mutex::default(),
            wake: WakeUp::new().map_err(failed)?,
        });
        {
            let mut running = self.running();
            if running.len() >= MAX_RUNNING {
                let text = format!("{MAX_RUNNING} programs of `exec` run already");
                return Err((ErrorKind::Busy, text));
            }
            running.insert(id, Arc::clone(&inbox));
        }
        let mut all = env.clone();
        all.extend(exec.env.clone());
        let (execs, reaper, port) = (Arc::clone(self), Arc::clone(reaper), Arc::clone(port));
        let started = std::thread::Builder::new()
            .name("exec".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let program = Program::spawn(id, &exec, &all, &reaper, &inbox, &port);
                let mut program = match program {
                    Ok(program) => program,
                    Err((kind, text)) => {
                        execs.running().remove(&id);
                        let result = Reply::Error { kind, text };
                        return port.send(&GuestMessage::Reply { id, result });
                    }
                };
                let result = Reply::Started;
                port.send(&GuestMessage::Reply { id, result });
                let status = program.serve();
                let pipes = program.outputs.into_iter().filter_map(|output| output.pipe);
                let pipes = pipes.collect();
                execs.running().remove(&id);
                port.send(&GuestMessage::Ended { id, status });
                execs.discard(pipes, &inbox);
            });
        if let Err(error) = started {
            self.running().remove(&id);
            return Err(failed(error));
        }
        Ok(())
    }

    fn orphans(&self) -> MutexGuard<'_, Orphans> {
        self.orphans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has read what children of a program that live on write, so that they are not ended by
    /// a pipe without a reader. One thread does it for all programs: this one, if there is
    /// none yet.
    fn discard(&self, pipes: Vec<File>, inbox: &Arc<Inbox>) {
        {
            let mut orphans = self.orphans();
            orphans.added.extend(pipes);
            if let Some(reader) = &orphans.reader {
                return reader.wake.set();
            }
            orphans.reader = Some(Arc::clone(inbox));
        }
        let mut pipes = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            inbox.wake.clear();
            {
                let mut orphans = self.orphans();
                pipes.append(&mut orphans.added);
                if pipes.is_empty() {
                    orphans.reader = None;
                    return;
                }
            }
            let each = pipes.iter().map(File::as_fd);
            let watched = each.chain([inbox.wake.as_fd()]);
            let watched: Vec<_> = watched.map(|fd| (Some(fd), libc::POLLIN)).collect();
            let mut ready = sys::poll(&watched, None).into_iter();
            pipes.retain_mut(|pipe| {
                ready.next() != Some(true) || matches!(pipe.read(&mut buffer), Ok(1..))
            });
        }
    }
}

/// A program that runs, or whose last output is being sent.
struct Program<'a> {
    id: u64,
    pid: i32,
    reaper: &'a Reaper,
    inbox: &'a Inbox,
    port: &'a Port,
    stdin: Input,
    outputs: [Output; 2],
    /// Its streams are a terminal.
    in_terminal: bool,
    exited: Option<ExitStatus>,
    deadline: Option<Instant>,
    timed_out: bool,
    /// The host wants to know nothing more of it.
    unwanted: bool,
    /// When to kill it, after it was asked to end.
    kill_at: Option<Instant>,
}

#[derive(Default)]
struct Input {
    pipe: Option<File>,
    pending: VecDeque<u8>,
    ended: bool,
    /// Written since the host was told last.
    written: u32,
}

struct Output {
    stream: Stream,
    pipe: Option<File>,
    credit: u64,
    /// Bytes that are still to be sent, once the program has ended.
    left: Option<u64>,
}

impl Output {
    fn new(stream: Stream, pipe: Option<impl Into<OwnedFd>>) -> Self {
        Self {
            stream,
            pipe: pipe.map(|pipe| File::from(pipe.into())),
            credit: WINDOW_BYTES.into(),
            left: None,
        }
    }

    /// Most bytes that may be read from the pipe now.
    fn room(&self) -> usize {
        let room = self.left.unwrap_or(u64::MAX).min(self.credit);
        room.min(MAX_DATA_BYTES as u64) as usize
    }

    /// The pipe, if something may be read from it.
    fn readable(&self) -> Option<BorrowedFd<'_>> {
        let pipe = self.pipe.as_ref().filter(|_| self.room() > 0);
        pipe.map(AsFd::as_fd)
    }

    fn is_done(&self) -> bool {
        self.pipe.is_none() || self.left == Some(0)
    }

    /// Sends what the pipe has, as far as it may.
    fn forward(&mut self, id: u64, port: &Port, buffer: &mut [u8]) {
        let room = self.room();
        let Some(pipe) = &mut self.pipe else { return };
        match pipe.read(&mut buffer[..room]) {
            Ok(count @ 1..) => {
                self.credit -= count as u64;
                self.left = self.left.map(|left| left - count as u64);
                port.write(&frames::encode(self.stream, id, &buffer[..count]));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // Of a terminal that nobody has open any more it is an error.
            Ok(0) | Err(_) => self.pipe = None,
        }
    }
}

impl<'a> Program<'a> {
    fn spawn(
        id: u64,
        exec: &Exec,
        env: &BTreeMap<String, String>,
        reaper: &'a Reaper,
        inbox: &'a Arc<Inbox>,
        port: &'a Port,
    ) -> Result<Self, (ErrorKind, String)> {
        let program = exec.argv.first().map_or("", String::as_str);
        let refused = |error: io::Error| {
            let text = format!("{program:.200}: {error}");
            // The error may name what the host has sent, which fits no message.
            (start_failure(&error), format!("{text:.1000}"))
        };
        let in_terminal = exec.terminal.is_some();
        let command = process::command(&exec.argv, env, &exec.cwd, &exec.user, in_terminal);
        let mut command = command.map_err(refused)?;
        let terminal = exec.terminal.map(Terminal::open).transpose();
        let terminal = terminal.map_err(refused)?;
        match &terminal {
            Some(terminal) => terminal.give_to(&mut command).map_err(refused)?,
            None => {
                let piped = [Stdio::null as fn() -> Stdio, Stdio::piped];
                command.stdin(piped[usize::from(exec.stdin)]());
                command.stdout(Stdio::piped()).stderr(Stdio::piped());
            }
        }
        let for_reaper = Arc::clone(inbox);
        let ended = move |status| for_reaper.tell(|news| news.exited = Some(status));
        let mut child = reaper.spawn(&mut command, ended).map_err(refused)?;
        // Else its own side of the terminal would stay open here.
        drop(command);
        let file = |pipe: OwnedFd| File::from(pipe);
        let stdin = child.stdin.take().map(|pipe| file(pipe.into()));
        let stdout = child.stdout.take().map(|pipe| file(pipe.into()));
        let (stdin, stdout) = match terminal {
            Some(terminal) => {
                let (typed, shown) = terminal.sides(exec.stdin).map_err(refused)?;
                (typed, Some(shown))
            }
            None => (stdin, stdout),
        };
        if let Some(pipe) = &stdin {
            let _ = sys::set_nonblocking(pipe.as_fd());
        }
        let limit = Duration::from_millis(exec.timeout_ms);
        Ok(Self {
            id,
            pid: child.id() as i32,
            reaper,
            inbox,
            port,
            stdin: Input {
                pipe: stdin,
                ..Input::default()
            },
            outputs: [
                Output::new(Stream::Stdout, stdout),
                Output::new(Stream::Stderr, child.stderr.take()),
            ],
            in_terminal,
            exited: None,
            deadline: (!limit.is_zero())
                .then(|| Instant::now().checked_add(limit))
                .flatten(),
            timed_out: false,
            unwanted: false,
            kill_at: None,
        })
    }

    /// Until it has ended and all that it wrote is sent.
    fn serve(&mut self) -> ExitStatus {
        let mut buffer = vec![0; MAX_DATA_BYTES];
        loop {
            self.take_news();
            self.end_if_due();
            if let Some(status) = self.exited
                && (self.unwanted || self.outputs.iter().all(Output::is_done))
            {
                return if self.timed_out {
                    ExitStatus::TimedOut
                } else {
                    status
                };
            }
            let ready = self.wait();
            if ready[1] {
                self.feed();
            }
            for (output, ready) in self.outputs.iter_mut().zip(&ready[2..]) {
                if *ready {
                    output.forward(self.id, self.port, &mut buffer);
                }
            }
        }
    }

    fn take_news(&mut self) {
        self.inbox.wake.clear();
        let mut news = self.inbox.news();
        self.stdin.pending.extend(std::mem::take(&mut news.stdin));
        self.stdin.ended |= news.stdin_ended;
        self.outputs[0].credit += std::mem::take(&mut news.stdout_credit);
        self.outputs[1].credit += std::mem::take(&mut news.stderr_credit);
        self.unwanted |= news.end;
        let exited = news.exited.take();
        let size = news.size.take().filter(|_| self.in_terminal);
        drop(news);
        if let (Some(size), Some(shown)) = (size, &self.outputs[0].pipe) {
            terminal::resize(shown, size);
        }
        if exited.is_some() {
            self.exited = exited;
            self.stdin = Input::default();
            // What is left of a terminal ends by itself.
            let pipes = self.outputs.iter_mut().filter(|_| !self.in_terminal);
            for output in pipes {
                let held = output
                    .pipe
                    .as_ref()
                    .map(|pipe| sys::readable_bytes(pipe.as_fd()));
                output.left = Some(held.unwrap_or(0));
            }
        }
        if self.stdin.ended && self.stdin.pending.is_empty() {
            self.stdin.pipe = None;
        }
    }

    /// Asks a program to end that nobody wants or whose time is over, later kills it.
    fn end_if_due(&mut self) {
        if self.exited.is_some() {
            return;
        }
        let now = Instant::now();
        self.timed_out |= self.deadline.is_some_and(|deadline| deadline <= now);
        match self.kill_at {
            None if self.unwanted || self.timed_out => {
                // Shells that talk to somebody are deaf to SIGTERM.
                let signal = [libc::SIGTERM, libc::SIGHUP][usize::from(self.in_terminal)];
                self.reaper.signal_group(self.pid, signal);
                self.kill_at = Some(now + END_GRACE);
            }
            Some(at) if at <= now => self.reaper.signal_group(self.pid, libc::SIGKILL),
            _ => {}
        }
    }

    /// Waits for anything to do; which of wake, stdin, stdout and stderr have something.
    fn wait(&self) -> Vec<bool> {
        let stdin = self.stdin.pipe.as_ref();
        let stdin = stdin.filter(|_| !self.stdin.pending.is_empty());
        let due = if self.exited.is_some() {
            None
        } else {
            self.kill_at.or(self.deadline)
        };
        // A killed program may take its time; it is looked at again.
        let limit = due.map(|due| due.saturating_duration_since(Instant::now()));
        let limit = limit.map(|limit| limit.max(Duration::from_millis(10)));
        sys::poll(
            &[
                (Some(self.inbox.wake.as_fd()), libc::POLLIN),
                (stdin.map(AsFd::as_fd), libc::POLLOUT),
                (self.outputs[0].readable(), libc::POLLIN),
                (self.outputs[1].readable(), libc::POLLIN),
            ],
            limit,
        )
    }

    /// Gives the program what its pipe takes of its standard input.
    fn feed(&mut self) {
        let Some(pipe) = &mut self.stdin.pipe else {
            return;
        };
        match pipe.write(self.stdin.pending.as_slices().0) {
            Ok(count) => {
                self.stdin.pending.drain(..count);
                self.stdin.written += count as u32;
                self.inbox.news().stdin_held -= count;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The program has closed it: what else comes waits for its end.
            Err(_) => {
                self.stdin.pipe = None;
                self.stdin.pending = VecDeque::new();
            }
        }
        if self.stdin.pending.is_empty() || self.stdin.written >= WINDOW_BYTES / 4 {
            let (id, bytes) = (self.id, std::mem::take(&mut self.stdin.written));
            if bytes > 0 {
                self.port.send(&GuestMessage::StdinCredit { id, bytes });
            }
        }
    }
}

/// What kept a program from being started, as shells tell it apart.
pub fn start_failure(error: &io::Error) -> ErrorKind {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => ErrorKind::NotFound,
        Some(
            libc::E2BIG
            | libc::EACCES
            | libc::EINVAL
            | libc::EISDIR
            | libc::ELIBBAD
            | libc::ELOOP
            | libc::ENAMETOOLONG
            | libc::ENOEXEC
            | libc::EPERM
            | libc::ETXTBSY,
        ) => ErrorKind::NotExecutable,
        // Its directory or its user is none.
        None => ErrorKind::NotExecutable,
        Some(_) => ErrorKind::Failed,
    }
}

#[cfg(test)]
mod tests;
