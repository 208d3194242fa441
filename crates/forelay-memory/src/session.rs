//! Requests in, answers out: the reader threads' side of a mount.
//!
//! States of a READ:
//! ```text
//!   received ──known file──▶ waiting ──data()──▶ answered
//!      │                      │  ▲  ╲─push covers it─▶ answered
//!      │ unknown file         │  │ retry
//!      ▼                      ▼  │
//!   deferred ──file added──▶ abandoned (its Reply was dropped)
//! ```
//! Invariants: a READ is answered in full or not at all (a short answer truncates the
//! file, an error is a SIGBUS in the VMM), by the one who takes it out of the waiting table.
//! Reader threads receive, reply and call the handler; they never notify.

use std::collections::{HashMap, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use forelay_image::extent::Extent;
use forelay_image::pages::PageSet;
use parking_lot::{Condvar, Mutex, RwLock};
use rustix::io::Errno;

use crate::counters::Tally;
use crate::files::{FileKey, Files, SharedFile};
use crate::fuse::abi::{
    self, Attributes, GetXattrIn, InitIn, ReadIn, RequestHeader, notify, opcode,
};
use crate::fuse::connection::{Connection, REQUEST_BYTES, Received, Waiter};

/// Answers READs that the page cache could not.
pub trait FaultHandler: Send + Sync {
    /// Someone waits for `fault`'s bytes. Called on reader threads (and by
    /// `retry_pending` and `add_file` on theirs); must hand the work on, not wait.
    fn fault(&self, fault: Fault);
}

impl<F: Fn(Fault) + Send + Sync> FaultHandler for F {
    fn fault(&self, fault: Fault) {
        self(fault);
    }
}

/// Bytes of an image that someone waits for.
#[derive(Debug)]
pub struct Fault {
    /// The image.
    pub file: FileKey,
    /// First byte, a multiple of the page size.
    pub offset: u64,
    /// Bytes; never reaches past the image's end.
    pub len: u32,
    /// Thread that waits (or whose fault made the kernel read ahead).
    pub thread: u32,
    /// Where the bytes go.
    pub reply: Reply,
}

/// Why an answer was not accepted. The READ stays pending.
#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    /// Too few or too many bytes.
    #[error("a READ of {wanted} bytes cannot be answered with {given}")]
    Length {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes given.
        given: usize,
    },
    /// The kernel did not take it.
    #[error("the kernel did not take the answer to a READ")]
    Kernel(#[source] std::io::Error),
}

/// Why an attempt to answer failed.
pub type AnswerFailure = Arc<dyn std::error::Error + Send + Sync>;

/// A READ that waits for an answer.
#[derive(Clone, Debug)]
pub struct WaitingRead {
    /// The image.
    pub file: FileKey,
    /// Which bytes of the image's content.
    pub extent: Extent,
    /// Thread that waits (or whose fault made the kernel read ahead).
    pub thread: u32,
    /// When the kernel delivered it to this process.
    pub since: Instant,
    /// Whether the handler has returned, and the work lies with whom it was handed on to.
    pub handed_on: bool,
    /// Why the last attempt failed, if one did.
    pub failure: Option<AnswerFailure>,
}

/// The duty to answer one READ. Dropped unanswered, the READ stays pending: for
/// [`retry_pending`](crate::SharedMemory::retry_pending), for a push that covers it, or
/// for the next daemon.
#[derive(Debug)]
pub struct Reply {
    core: Arc<Core>,
    unique: u64,
    content_len: usize,
    answered: bool,
}

impl Reply {
    /// Answers with exactly the fault's bytes.
    pub fn data(self, data: &[u8]) -> Result<(), ReplyError> {
        self.data_parts(&[data])
    }

    /// Answers with the fault's bytes, given in pieces.
    pub fn data_parts(mut self, parts: &[&[u8]]) -> Result<(), ReplyError> {
        let given = parts.iter().map(|part| part.len()).sum();
        if given != self.content_len {
            return Err(ReplyError::Length {
                wanted: self.content_len,
                given,
            });
        }
        let Some(waiting) = self.core.waiting.lock().remove(&self.unique) else {
            self.answered = true; // a push was faster
            return Ok(());
        };
        self.answered = true;
        self.core.answer(&waiting, parts).map_err(|error| {
            // The kernel may have it still: a retry finds out.
            let abandoned = Waiting {
                abandoned: true,
                ..waiting
            };
            self.core.waiting.lock().insert(self.unique, abandoned);
            ReplyError::Kernel(error.into())
        })
    }

    /// Leaves the READ pending, and says why.
    pub fn postpone(self, why: AnswerFailure) {
        if let Some(waiting) = self.core.waiting.lock().get_mut(&self.unique) {
            waiting.failure = Some(why);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        if let Some(waiting) = self.core.waiting.lock().get_mut(&self.unique) {
            waiting.abandoned = true;
        }
    }
}

/// A READ that waits.
#[derive(Debug)]
struct Waiting {
    file: Arc<SharedFile>,
    thread: u32,
    /// `unique` as last delivered, with the resend bit if it was.
    wire_unique: u64,
    extent: Extent,
    arrived: Instant,
    abandoned: bool,
    /// As in [`WaitingRead`].
    handed_on: bool,
    failure: Option<AnswerFailure>,
}

impl Waiting {
    /// How much of it is image content; the rest is padding.
    fn content_len(&self) -> usize {
        let end = self.extent.end().min(self.file.spec.image_bytes);
        end.saturating_sub(self.extent.offset) as usize
    }
}

#[derive(Debug)]
struct Deferred {
    request: Vec<u8>,
    /// When to give up; READs are never given up.
    deadline: Option<Instant>,
}

#[derive(Debug, Default)]
struct Timers {
    deferred: Vec<Deferred>,
    resend_at: VecDeque<Instant>,
    stop: bool,
}

/// What one reader thread is at.
#[derive(Debug, Default)]
pub(crate) struct ReaderThread {
    /// Since when it serves the request that it has.
    pub busy_since: Mutex<Option<Instant>>,
    /// It ended although requests may come.
    pub ended: AtomicBool,
}

/// What reader threads, replies and the public handle share.
pub(crate) struct Core {
    pub connection: Connection,
    pub readers: Mutex<Vec<Arc<ReaderThread>>>,
    pub files: RwLock<Files>,
    pub total: Tally,
    pub settings: Settings,
    handler: Arc<dyn FaultHandler>,
    waiting: Mutex<HashMap<u64, Waiting>>,
    timers: Mutex<Timers>,
    timers_changed: Condvar,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").finish_non_exhaustive()
    }
}

/// What does not change during a session.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    pub uid: u32,
    pub gid: u32,
    pub max_readahead_bytes: u32,
    /// Until then a request for an unknown file waits for the file to be added.
    pub grace_until: Option<Instant>,
}

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Slices of zeros that add up to `len` bytes.
pub(crate) fn zero_parts<'a>(len: usize) -> impl Iterator<Item = &'a [u8]> {
    let full = std::iter::repeat_n(&ZEROS[..], len / ZEROS.len());
    full.chain(std::iter::once(&ZEROS[..len % ZEROS.len()]))
}

/// Every file has file capabilities as far as the kernel asks before a write(2): it must take
/// them off first, and that is refused, before any byte has reached the page cache that others
/// map. Nobody reads or runs these files by them: the mount is `nosuid`.
fn guarding_attribute(body: &[u8]) -> Result<Vec<u8>, Errno> {
    const CAPABILITIES: &[u8] = b"security.capability";
    const CAPABILITY_BYTES: usize = 20;
    let asked = GetXattrIn::parse(body).ok_or(Errno::INVAL)?;
    match asked.room {
        _ if asked.name != CAPABILITIES => Err(Errno::NODATA),
        0 => Ok(abi::xattr_size_reply(CAPABILITY_BYTES as u32)),
        _ => Err(Errno::RANGE),
    }
}

impl Core {
    pub fn new(connection: Connection, settings: Settings, handler: Arc<dyn FaultHandler>) -> Self {
        Self {
            connection,
            readers: Mutex::default(),
            files: RwLock::default(),
            total: Tally::default(),
            settings,
            handler,
            waiting: Mutex::default(),
            timers: Mutex::default(),
            timers_changed: Condvar::new(),
        }
    }

    /// A further reader thread's state.
    pub fn new_reader(&self) -> Arc<ReaderThread> {
        let reader = Arc::<ReaderThread>::default();
        self.readers.lock().push(Arc::clone(&reader));
        reader
    }

    /// Body of a reader thread: until told to stop or unmounted. False if it ends although
    /// requests may come.
    pub fn read_requests(self: &Arc<Self>, waiter: &Waiter, reader: &ReaderThread) -> bool {
        let mut buffer = vec![0; REQUEST_BYTES];
        loop {
            match self.connection.receive(&mut buffer) {
                Ok(Received::Request(len)) => {
                    *reader.busy_since.lock() = Some(Instant::now());
                    self.handle(&buffer[..len]);
                    *reader.busy_since.lock() = None;
                }
                Ok(Received::Unmounted) => return true,
                Ok(Received::Empty) => match waiter.wait() {
                    Ok(true) => {}
                    Ok(false) => return true,
                    Err(error) => {
                        tracing::error!(%error, "cannot wait for FUSE requests");
                        return false;
                    }
                },
                Err(error) => {
                    tracing::error!(%error, "cannot read FUSE requests");
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// Serves one request.
    fn handle(self: &Arc<Self>, request: &[u8]) {
        let Some((header, body)) = RequestHeader::parse(request) else {
            tracing::error!(bytes = request.len(), "a FUSE request that is cut short");
            return;
        };
        let unique = header.unique;
        let answer = match header.opcode {
            opcode::READ => {
                self.read(header, body, request);
                return;
            }
            opcode::FORGET | opcode::BATCH_FORGET => return,
            opcode::INIT => self.init(body),
            opcode::LOOKUP => match self.lookup(header, body, request) {
                Some(answer) => answer,
                None => return,
            },
            opcode::GETATTR | opcode::STATX => match self.attributes_of(header, request) {
                Some(Ok(found)) if header.opcode == opcode::STATX => Ok(found.statx_reply()),
                Some(found) => found.map(|found| found.attr_reply()),
                None => return,
            },
            opcode::OPENDIR => Ok(abi::opendir_reply().to_vec()),
            opcode::READDIR => match ReadIn::parse(body) {
                Some(read) => Ok(self.files.read().read_dir(read.offset, read.len as usize)),
                None => Err(Errno::INVAL),
            },
            opcode::STATFS => Ok(abi::statfs_reply(self.files.read().len() as u64)),
            opcode::RELEASE | opcode::RELEASEDIR | opcode::DESTROY => Ok(Vec::new()),
            opcode::GETXATTR => guarding_attribute(body),
            opcode::SETATTR
            | opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::WRITE
            | opcode::FSYNC
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::CREATE
            | opcode::FALLOCATE => Err(Errno::ROFS),
            // OPEN among them: no handles. The kernel then stops asking.
            _ => Err(Errno::NOSYS),
        };
        let sent = match &answer {
            Ok(body) => self.connection.reply(unique, &[body]),
            Err(errno) => self.connection.reply_error(unique, *errno),
        };
        if let Err(error) = sent {
            tracing::warn!(%error, opcode = header.opcode, "a FUSE reply was not taken");
        }
    }

    fn init(&self, body: &[u8]) -> Result<Vec<u8>, Errno> {
        let init = InitIn::parse(body).ok_or(Errno::INVAL)?;
        if init.major != abi::MAJOR || init.minor < 23 {
            tracing::error!(?init, "this kernel's FUSE is too old");
            return Err(Errno::PROTO);
        }
        Ok(init.answer(self.settings.max_readahead_bytes))
    }

    fn root(&self) -> Attributes {
        Attributes {
            node: abi::ROOT_NODE,
            size_bytes: 0,
            mode: libc::S_IFDIR | 0o550,
            uid: self.settings.uid,
            gid: self.settings.gid,
        }
    }

    fn attributes(&self, file: &SharedFile) -> Attributes {
        Attributes {
            node: file.node,
            size_bytes: file.spec.device_bytes,
            // Its group may open it for writing where the mount is not read-only.
            mode: libc::S_IFREG | 0o460,
            ..self.root()
        }
    }

    /// `None` if the request was deferred.
    fn lookup(
        &self,
        header: RequestHeader,
        body: &[u8],
        request: &[u8],
    ) -> Option<Result<Vec<u8>, Errno>> {
        let name = abi::name(body).filter(|_| header.node == abi::ROOT_NODE);
        let files = self.files.read();
        match name.map(|name| files.by_name(name)) {
            Some(Ok(Some(file))) => Some(Ok(self.attributes(file).entry_reply())),
            Some(Ok(None)) if self.defer(request, true) => None,
            _ => Some(Err(Errno::NOENT)),
        }
    }

    /// `None` if the request was deferred.
    fn attributes_of(
        &self,
        header: RequestHeader,
        request: &[u8],
    ) -> Option<Result<Attributes, Errno>> {
        if header.node == abi::ROOT_NODE {
            return Some(Ok(self.root()));
        }
        let files = self.files.read();
        match files.by_node(header.node) {
            Some(file) => Some(Ok(self.attributes(file))),
            None if self.defer(request, true) => None,
            None => Some(Err(Errno::NOENT)),
        }
    }

    fn read(self: &Arc<Self>, header: RequestHeader, body: &[u8], request: &[u8]) {
        let Some(read) = ReadIn::parse(body) else {
            tracing::error!("a READ that is cut short");
            return;
        };
        // Deferred under the lock of `files`, so that `add` cannot slip in between.
        let files = self.files.read();
        let Some(file) = files.by_node(header.node).cloned() else {
            self.defer(request, false);
            return;
        };
        drop(files);
        let waiting = Waiting {
            extent: Extent::new(read.offset, u64::from(read.len)),
            wire_unique: header.unique,
            thread: header.thread,
            arrived: Instant::now(),
            abandoned: false,
            handed_on: false,
            failure: None,
            file,
        };
        let content_len = waiting.content_len();
        if content_len == 0 {
            self.total.padding_reads.fetch_add(1, Relaxed);
            // A refusal was logged, and the kernel keeps no READ that it refused.
            let _ = self.send_full(&waiting, &[], 0);
            return;
        }
        let unique = header.unique & !abi::UNIQUE_RESEND;
        let key = waiting.file.key;
        {
            let mut table = self.waiting.lock();
            if let Some(known) = table.get_mut(&unique) {
                known.wire_unique = header.unique; // delivered again; its Reply lives
                return;
            }
            self.total.fault(content_len as u64);
            table.insert(unique, waiting);
        }
        self.call_handler(key, read.offset, content_len, header.thread, unique);
    }

    fn call_handler(
        self: &Arc<Self>,
        file: FileKey,
        offset: u64,
        content_len: usize,
        thread: u32,
        unique: u64,
    ) {
        let reply = Reply {
            core: Arc::clone(self),
            unique,
            content_len,
            answered: false,
        };
        let fault = Fault {
            file,
            offset,
            len: content_len as u32,
            thread,
            reply,
        };
        let called = std::panic::catch_unwind(AssertUnwindSafe(|| self.handler.fault(fault)));
        if called.is_err() {
            tracing::error!(%file, offset, "the fault handler panicked; the READ stays pending");
        }
        if let Some(waiting) = self.waiting.lock().get_mut(&unique) {
            waiting.handed_on = true;
        }
    }

    fn answer(&self, waiting: &Waiting, parts: &[&[u8]]) -> rustix::io::Result<()> {
        let stall = waiting.arrived.elapsed();
        let padding = waiting.extent.len as usize - waiting.content_len();
        // Counted first: the one who waits may look at the counters right after.
        self.total.answered(stall);
        if padding == 0 {
            self.connection.reply(waiting.wire_unique, parts)
        } else {
            self.send_full(waiting, parts, waiting.content_len())
        }
    }

    /// Sends `parts`, `given` bytes together, and zeros up to the full length.
    fn send_full(
        &self,
        waiting: &Waiting,
        parts: &[&[u8]],
        given: usize,
    ) -> rustix::io::Result<()> {
        let mut all = parts.to_vec();
        all.extend(zero_parts(waiting.extent.len as usize - given));
        let sent = self.connection.reply(waiting.wire_unique, &all);
        if let Err(error) = &sent {
            tracing::warn!(%error, key = %waiting.file.key, "an answer was not taken");
        }
        sent
    }

    /// Calls the handler again for each READ whose Reply was dropped; returns how many.
    pub fn retry_abandoned(self: &Arc<Self>) -> usize {
        let mut again = Vec::new();
        for (&unique, waiting) in self.waiting.lock().iter_mut() {
            if std::mem::take(&mut waiting.abandoned) {
                again.push((
                    waiting.arrived,
                    unique,
                    waiting.file.key,
                    waiting.extent.offset,
                    waiting.content_len(),
                    waiting.thread,
                ));
            }
        }
        again.sort_unstable_by_key(|&(arrived, unique, ..)| (arrived, unique));
        for &(_, unique, key, offset, content_len, thread) in &again {
            self.call_handler(key, offset, content_len, thread, unique);
        }
        again.len()
    }

    /// Answers the READs of `file` that `data` (at `offset`) covers in full.
    pub fn answer_from(&self, file: &SharedFile, offset: u64, data: &[u8]) {
        let pushed = Extent::new(offset, data.len() as u64);
        let covered: Vec<Waiting> = {
            let mut table = self.waiting.lock();
            let uniques: Vec<u64> = table
                .iter()
                .filter(|(_, waiting)| {
                    waiting.file.node == file.node
                        && waiting.extent.offset >= offset
                        && waiting.extent.offset + waiting.content_len() as u64 <= pushed.end()
                })
                .map(|(&unique, _)| unique)
                .collect();
            uniques
                .iter()
                .filter_map(|unique| table.remove(unique))
                .collect()
        };
        for waiting in covered {
            let start = (waiting.extent.offset - offset) as usize;
            let content = &data[start..start + waiting.content_len()];
            self.total.answered_by_push.fetch_add(1, Relaxed);
            // A refusal was logged, and the kernel keeps no READ that it refused.
            let _ = self.answer(&waiting, &[content]);
        }
    }

    /// The pages of `file` that unanswered READs hold locked.
    pub fn locked_by_reads(&self, file: &SharedFile) -> PageSet {
        let table = self.waiting.lock();
        let reads = table
            .values()
            .filter(|waiting| waiting.file.node == file.node);
        reads.map(|waiting| waiting.extent).collect()
    }

    /// READs that wait, oldest first.
    pub fn waiting_reads(&self) -> Vec<WaitingRead> {
        let table = self.waiting.lock();
        let reads = table.values().map(|waiting| WaitingRead {
            file: waiting.file.key,
            extent: Extent::new(waiting.extent.offset, waiting.content_len() as u64),
            thread: waiting.thread,
            since: waiting.arrived,
            handed_on: waiting.handed_on,
            failure: waiting.failure.clone(),
        });
        let mut reads: Vec<WaitingRead> = reads.collect();
        reads.sort_unstable_by_key(|read| (read.since, read.file, read.extent));
        reads
    }

    /// Keeps a request for a file not added yet; `false` if the grace period is over.
    fn defer(&self, request: &[u8], may_expire: bool) -> bool {
        let deadline = self.settings.grace_until;
        if may_expire && deadline.is_none_or(|deadline| deadline <= Instant::now()) {
            return false;
        }
        if !may_expire {
            tracing::warn!("a READ of an unknown file waits for the file to be added");
        }
        self.timers.lock().deferred.push(Deferred {
            request: request.to_vec(),
            deadline: deadline.filter(|_| may_expire),
        });
        self.timers_changed.notify_all();
        true
    }

    /// Serves all deferred requests again, now that a file was added.
    pub fn serve_deferred(self: &Arc<Self>) {
        let deferred = std::mem::take(&mut self.timers.lock().deferred);
        for deferred in deferred {
            self.handle(&deferred.request);
        }
    }

    /// Has the kernel deliver unanswered requests again, now and after the delays: a
    /// dying predecessor may still take requests off the queue for a moment.
    pub fn resend(&self, delays: &[Duration]) {
        let now = Instant::now();
        self.timers.lock().resend_at = delays.iter().map(|delay| now + *delay).collect();
        self.timers_changed.notify_all();
    }

    /// Body of the timers thread: grace periods and resends.
    pub fn run_timers(self: &Arc<Self>) {
        let mut timers = self.timers.lock();
        while !timers.stop {
            let now = Instant::now();
            let resend = timers.resend_at.front().is_some_and(|&at| at <= now);
            if resend {
                timers.resend_at.pop_front();
            }
            let due = |deferred: &mut Deferred| deferred.deadline.is_some_and(|at| at <= now);
            let expired: Vec<Deferred> = timers.deferred.extract_if(.., due).collect();
            let next = timers
                .deferred
                .iter()
                .filter_map(|deferred| deferred.deadline);
            let next = next.chain(timers.resend_at.front().copied()).min();
            if !resend && expired.is_empty() {
                match next {
                    Some(at) => drop(self.timers_changed.wait_until(&mut timers, at)),
                    None => self.timers_changed.wait(&mut timers),
                }
                continue;
            }
            drop(timers);
            for deferred in expired {
                self.handle(&deferred.request);
            }
            if resend && let Err(error) = self.connection.notify(notify::RESEND, &[]) {
                // Before Linux 6.9; or nothing was ever mounted.
                tracing::warn!(%error, "the kernel does not deliver requests again");
            }
            timers = self.timers.lock();
        }
    }

    pub fn stop_timers(&self) {
        self.timers.lock().stop = true;
        self.timers_changed.notify_all();
    }
}
