//! [`SharedMemory`]: one mount, one copy of each image in the host's page cache.
//!
//! Owns the reader threads and tells the kernel which pages to take (push) and to drop
//! (evict). Knows neither where bytes come from nor which of them are worth their place.
//!
//! Invariants: notifications are sent on the caller's thread, never on a reader's; each
//! file is held open and mapped while it is here, because the page cache of an inode
//! that nobody holds may go any time.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use forelay_image::extent::{Extent, PAGE_BYTES, normalise, total_bytes};
use forelay_image::pages::{PageRun, Pages};
use parking_lot::Mutex;
use rustix::event::EventfdFlags;
use rustix::io::Errno;

use crate::counters::Counters;
use crate::files::{AddFileError, FileKey, FileSpec, SharedFile, file_name};
use crate::fuse::abi::{self, notify};
use crate::fuse::connection::{Connection, Waiter};
use crate::fuse::mount::{self, MountError};
use crate::mapping::FileMapping;
use crate::pinner::{self, PinError};
use crate::session::{Core, FaultHandler, Settings, WaitingRead, zero_parts};

/// Largest piece of one STORE.
const STORE_BYTES: usize = 1 << 20;
/// When a successor asks for unanswered requests, counted from its start.
const RESEND_DELAYS: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(200),
    Duration::from_secs(1),
    Duration::from_secs(5),
];

/// Where the FUSE session comes from.
#[derive(Debug)]
pub enum Session {
    /// Mount here and now; unmount when dropped.
    New,
    /// Serve a mount that somebody else holds, whether fresh or with requests in flight;
    /// leave it mounted when dropped.
    Takeover(OwnedFd),
}

/// How to serve a mount.
#[derive(Debug)]
pub struct Config {
    /// The directory that shows the files.
    pub mountpoint: PathBuf,
    /// New or held.
    pub session: Session,
    /// Threads that receive and answer requests.
    pub read_threads: usize,
    /// How far the kernel reads around a fault, in KiB.
    pub readahead_kib: u32,
    /// Group that may read the files besides the owner.
    pub gid: Option<u32>,
    /// Trust domain, the pinner's name for this mount.
    pub domain: String,
    /// Who holds locks; without one, nothing can be pinned.
    pub pinner: Option<Arc<pinner::PinnerClient>>,
    /// How long after a takeover lookups of unknown files wait for the file to be added.
    pub unknown_file_grace: Duration,
}

impl Config {
    /// The usual settings: 128 KiB around a fault, two reader threads.
    pub fn new(mountpoint: impl Into<PathBuf>, session: Session) -> Self {
        Self {
            mountpoint: mountpoint.into(),
            session,
            read_threads: 2,
            readahead_kib: 128,
            gid: None,
            domain: "default".to_owned(),
            pinner: None,
            unknown_file_grace: Duration::from_secs(10),
        }
    }
}

/// Why a mount cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Mounting failed.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// Threads or descriptors ran out.
    #[error("cannot start serving {mountpoint}")]
    Threads {
        /// The mount.
        mountpoint: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Why pages could not be pushed, evicted or asked about.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No such file in this mount.
    #[error("{0} is not in this mount")]
    UnknownFile(FileKey),
    /// Bytes that are not whole pages of the image.
    #[error("{key}: {len} bytes at {offset} are not whole pages of the image")]
    Unaligned {
        /// The file.
        key: FileKey,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// This mount was started without a pinner.
    #[error("{0} cannot be pinned: there is no pinner")]
    NoPinner(FileKey),
    /// The pinner could not do it.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The kernel refused.
    #[error("{key}: {what} at {offset} failed")]
    Kernel {
        /// The file.
        key: FileKey,
        /// What was tried.
        what: &'static str,
        /// Where.
        offset: u64,
        /// Why.
        source: std::io::Error,
    },
}

/// A mount that is being served.
#[derive(Debug)]
pub struct SharedMemory {
    core: Arc<Core>,
    mountpoint: PathBuf,
    /// Where its files can be opened for writing, though not written.
    writable: Option<PathBuf>,
    unmount_on_drop: bool,
    domain: String,
    pinner: Option<Arc<pinner::PinnerClient>>,
    /// Pins that an earlier daemon left, of files not added yet.
    inherited_pins: Mutex<BTreeMap<FileKey, Vec<Extent>>>,
    /// Whether a file was closed yet: see [`SharedMemory::open`].
    closed_once: AtomicBool,
    stop: OwnedFd,
    threads: Vec<JoinHandle<()>>,
}

impl SharedMemory {
    /// Mounts (or takes over) and starts answering.
    pub fn start(mut config: Config, handler: Arc<dyn FaultHandler>) -> Result<Self, StartError> {
        let session = std::mem::replace(&mut config.session, Session::New);
        let (fd, is_new) = match session {
            Session::New => (mount::mount(&config.mountpoint)?, true),
            Session::Takeover(fd) => (fd, false),
        };
        let mut memory = Self::serve(fd, is_new, &config, handler).map_err(|error| {
            if is_new && let Err(error) = mount::unmount_lazily(&config.mountpoint) {
                tracing::warn!(%error, "a mount stays behind");
            }
            StartError::Threads {
                mountpoint: config.mountpoint.clone(),
                source: error,
            }
        })?;
        memory.unmount_on_drop = is_new;
        if !is_new {
            memory.core.resend(&RESEND_DELAYS);
            memory.refresh_attributes(abi::ROOT_NODE);
        }
        if let Err(error) = memory.tune(config.readahead_kib) {
            tracing::warn!(%error, "readahead of the mount keeps the kernel's default");
        }
        Ok(memory)
    }

    fn serve(
        fd: OwnedFd,
        is_new: bool,
        config: &Config,
        handler: Arc<dyn FaultHandler>,
    ) -> std::io::Result<Self> {
        let settings = Settings {
            uid: rustix::process::geteuid().as_raw(),
            gid: config.gid.unwrap_or(rustix::process::getegid().as_raw()),
            max_readahead_bytes: 1 << 20,
            grace_until: (!is_new).then(|| Instant::now() + config.unknown_file_grace),
        };
        let core = Arc::new(Core::new(Connection::new(fd)?, settings, handler));
        let mut memory = Self {
            stop: rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?,
            mountpoint: config.mountpoint.clone(),
            writable: mount::writable_path(&config.mountpoint)?,
            unmount_on_drop: false,
            closed_once: AtomicBool::new(false),
            domain: config.domain.clone(),
            pinner: config.pinner.clone(),
            inherited_pins: Mutex::default(),
            threads: Vec::new(),
            core,
        };
        for n in 0..config.read_threads.max(1) {
            let waiter = Waiter::new(&memory.core.connection, &memory.stop)?;
            let core = Arc::clone(&memory.core);
            let reader = core.new_reader();
            memory.spawn(format!("fuse-read-{n}"), move || {
                // A mount that is gone asks for nothing: another daemon could not do better.
                let ended_well = core.read_requests(&waiter, &reader);
                reader.ended.store(!ended_well, Relaxed);
            })?;
        }
        let core = Arc::clone(&memory.core);
        memory.spawn("fuse-timers".to_owned(), move || core.run_timers())?;
        // Only now: what the pinner is at may itself wait for a page that is served here.
        memory.inherited_pins = Mutex::new(inherited_pins(config, is_new));
        Ok(memory)
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let thread = std::thread::Builder::new().name(name).spawn(body)?;
        self.threads.push(thread);
        Ok(())
    }

    /// Waits until INIT is done (any answered request shows that), then sets readahead:
    /// INIT would overwrite it.
    fn tune(&self, readahead_kib: u32) -> std::io::Result<()> {
        rustix::fs::statvfs(&self.mountpoint)?;
        mount::set_readahead(&self.mountpoint, readahead_kib)
    }

    /// The session, for the process that serves the mount next.
    pub fn session(&self) -> BorrowedFd<'_> {
        self.core.connection.fd()
    }

    /// True while all reader threads run and none has been at one request for `limit`.
    pub fn is_served(&self, limit: Duration) -> bool {
        self.core.readers.lock().iter().all(|reader| {
            let since = *reader.busy_since.lock();
            !reader.ended.load(Relaxed) && since.is_none_or(|since| since.elapsed() < limit)
        })
    }

    /// The directory that shows the files.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Where `key` is, once added.
    pub fn path(&self, key: &FileKey) -> PathBuf {
        self.mountpoint.join(file_name(key))
    }

    /// Where a VMM opens `key` that maps it privately and insists on opening it for writing;
    /// `None` in a mount that an earlier version made.
    pub fn private_path(&self, key: &FileKey) -> Option<PathBuf> {
        Some(self.writable.as_ref()?.join(file_name(key)))
    }

    /// Adds the file of an image; adding it again with equal sizes changes nothing. Call
    /// it from no thread that answers faults: it opens the file through the mount.
    pub fn add_file(&self, key: FileKey, spec: FileSpec) -> Result<(), AddFileError> {
        let file = self.core.files.write().add(key, spec)?;
        if let Some(extents) = self.inherited_pins.lock().remove(&key) {
            file.pinned.lock().extend(extents);
        }
        self.core.serve_deferred();
        if !self.unmount_on_drop {
            self.refresh_attributes(file.node);
        }
        if file.mapping.lock().is_none() {
            let mapping = self
                .open(&key)
                .and_then(|open| FileMapping::new(open, spec.device_bytes))
                .map_err(|source| AddFileError::Open { key, source })?;
            *file.mapping.lock() = Some(Arc::new(mapping));
        }
        Ok(())
    }

    /// Has the kernel ask again whose a node is: an earlier daemon may have said another group.
    fn refresh_attributes(&self, node: u64) {
        // From before its first byte on: no page is dropped.
        let body = abi::inval_inode_body(node, u64::MAX, 0);
        match self.core.connection.notify(notify::INVAL_INODE, &[&body]) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => tracing::warn!(%error, node, "who may read a file stays as it was"),
        }
    }

    /// Opens a file through the mount. The first close in a session asks whether anybody
    /// minds (FLUSH); it is done here, while readers answer, so that no later close waits.
    fn open(&self, key: &FileKey) -> std::io::Result<File> {
        if !self.closed_once.swap(true, Relaxed) {
            drop(File::open(self.path(key))?);
        }
        File::open(self.path(key))
    }

    /// Takes a file away; its pages go with its last user. READs that its users may still
    /// cause wait until it is added again, so remove only what nothing maps.
    pub fn remove_file(&self, key: &FileKey) -> Result<(), MemoryError> {
        let removed = self.core.files.write().remove(key);
        let file = removed.ok_or(MemoryError::UnknownFile(*key))?;
        file.mapping.lock().take();
        if let Some(pinner) = &self.pinner {
            pinner.forget(&self.domain, *key)?;
        }
        let body = abi::inval_entry_body(file_name(key).as_bytes());
        match self.core.connection.notify(notify::INVAL_ENTRY, &[&body]) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(MemoryError::Kernel {
                key: *key,
                what: "removing the entry",
                offset: file.node,
                source: error.into(),
            }),
        }
    }

    /// The files in this mount, by node id.
    pub fn files(&self) -> Vec<(FileKey, FileSpec)> {
        let files = self.core.files.read();
        files.iter().map(|file| (file.key, file.spec)).collect()
    }

    fn file(&self, key: &FileKey) -> Result<Arc<SharedFile>, MemoryError> {
        let files = self.core.files.read();
        let file = files.by_key(key).ok_or(MemoryError::UnknownFile(*key))?;
        Ok(Arc::clone(file))
    }

    /// Puts bytes of an image into the page cache ahead of any touch. `offset` is a
    /// multiple of the page size, and so is the length unless the image ends there.
    /// READs that wait for these bytes are answered with them.
    ///
    /// Blocks while a READ that overlaps is unanswered: never call it on a thread that
    /// answers faults.
    pub fn push(&self, key: &FileKey, offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        let file = self.file(key)?;
        let end = offset.saturating_add(data.len() as u64);
        let whole_pages = end.is_multiple_of(PAGE_BYTES) || end == file.spec.image_bytes;
        if !offset.is_multiple_of(PAGE_BYTES) || !whole_pages || end > file.content_bytes() {
            return Err(MemoryError::Unaligned {
                key: *key,
                offset,
                len: data.len() as u64,
            });
        }
        if data.is_empty() {
            return Ok(());
        }
        let extent = Extent::new(offset, data.len() as u64);
        // READs hold their pages locked: take those that the data answers out of the
        // way, and leave the others' pages to their answers.
        let locked = self.core.locked_by_reads(&file);
        self.core.answer_from(&file, offset, data);
        for gap in locked.gaps_within(PageRun::covering(extent)) {
            // The image's last page may be one in part.
            let Some(gap) = gap.extent().intersection(&extent) else {
                continue;
            };
            let start = (gap.offset - offset) as usize;
            self.store(&file, gap.offset, &data[start..start + gap.len as usize])?;
        }
        file.pushed.lock().insert(PageRun::covering(extent));
        self.core.total.pushed_bytes.fetch_add(extent.len, Relaxed);
        Ok(())
    }

    fn store(&self, file: &SharedFile, offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        let mut at = offset;
        for piece in data.chunks(STORE_BYTES) {
            let padding = piece.len().next_multiple_of(PAGE_BYTES as usize) - piece.len();
            let body = abi::store_body(file.node, at, (piece.len() + padding) as u32);
            let mut parts: Vec<&[u8]> = vec![&body, piece];
            parts.extend(zero_parts(padding));
            self.core
                .connection
                .notify(notify::STORE, &parts)
                .map_err(|error| MemoryError::Kernel {
                    key: file.key,
                    what: "storing pages",
                    offset: at,
                    source: error.into(),
                })?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Keeps those pages of `extents` that are in memory now from being reclaimed, also
    /// when this process dies. Returns the bytes newly pinned.
    pub fn pin(&self, key: &FileKey, extents: &[Extent]) -> Result<u64, MemoryError> {
        let file = self.file(key)?;
        let pinner = self.pinner.as_ref().ok_or(MemoryError::NoPinner(*key))?;
        let mut resident = Vec::new();
        for extent in normalise(
            extents
                .iter()
                .filter_map(|extent| file.clip(*extent))
                .collect(),
        ) {
            resident.extend(self.resident_within(&file, extent)?);
        }
        if resident.is_empty() {
            return Ok(0);
        }
        if !file.pinner_knows.load(Relaxed)
            && let Some(mapping) = file.mapping.lock().clone()
        {
            pinner.add(&self.domain, *key, mapping.file(), mapping.len())?;
            file.pinner_knows.store(true, Relaxed);
        }
        // Noted first: what is noted is at least what is locked.
        file.pinned.lock().extend(resident.iter().copied());
        Ok(pinner.pin(&self.domain, *key, &resident)?)
    }

    /// Lets go of pins; the pages stay until evicted or reclaimed. Returns the bytes that
    /// were pinned.
    pub fn unpin(&self, key: &FileKey, extents: &[Extent]) -> Result<u64, MemoryError> {
        let file = self.file(key)?;
        let clipped = extents.iter().filter_map(|extent| file.clip(*extent));
        self.unpin_clipped(&file, &normalise(clipped.collect()))
    }

    fn unpin_clipped(&self, file: &SharedFile, extents: &[Extent]) -> Result<u64, MemoryError> {
        let pinned: Vec<Extent> = {
            let set = file.pinned.lock();
            let runs = extents.iter().map(|extent| PageRun::covering(*extent));
            let pinned = runs.flat_map(|run| set.runs_within(run));
            pinned.map(PageRun::extent).collect()
        };
        if pinned.is_empty() {
            return Ok(0);
        }
        let pinner = self
            .pinner
            .as_ref()
            .ok_or(MemoryError::NoPinner(file.key))?;
        let unpinned_bytes = pinner.unpin(&self.domain, file.key, &pinned)?;
        let mut set = file.pinned.lock();
        for extent in pinned {
            set.remove(PageRun::covering(extent));
        }
        Ok(unpinned_bytes)
    }

    /// Pins again what a pinner that is gone had pinned, as far as it is in memory still.
    /// Returns the bytes pinned.
    pub fn pin_again(&self) -> Result<u64, MemoryError> {
        let files: Vec<_> = self.core.files.read().iter().cloned().collect();
        let mut pinned_bytes = 0;
        for file in files {
            let pinned = std::mem::take(&mut *file.pinned.lock());
            let extents: Vec<Extent> = pinned.extents().collect();
            file.pinner_knows.store(false, Relaxed);
            if !extents.is_empty() {
                pinned_bytes += self.pin(&file.key, &extents)?;
            }
        }
        Ok(pinned_bytes)
    }

    /// What is pinned of a file.
    pub fn pinned(&self, key: &FileKey) -> Result<Vec<Extent>, MemoryError> {
        Ok(self.file(key)?.pinned.lock().extents().collect())
    }

    /// Drops pages from the page cache, also those that VMs map: they fault them back.
    /// Pins on them are let go first. Pages that unanswered READs are about to fill stay. Returns the bytes freed, by
    /// residency before and after.
    pub fn evict(&self, key: &FileKey, extents: &[Extent]) -> Result<u64, MemoryError> {
        let file = self.file(key)?;
        let clipped = extents.iter().filter_map(|extent| file.clip(*extent));
        let locked = self.core.locked_by_reads(&file);
        let extents = normalise(clipped.collect());
        self.unpin_clipped(&file, &extents)?;
        let mut freed_bytes = 0;
        for extent in extents {
            let before = total_bytes(&self.resident_within(&file, extent)?);
            for gap in locked.gaps_within(PageRun::covering(extent)) {
                self.invalidate(&file, gap.extent())?;
                file.pushed.lock().remove(gap);
                file.used.lock().remove(gap);
            }
            let after = total_bytes(&self.resident_within(&file, extent)?);
            freed_bytes += before.saturating_sub(after);
        }
        self.core
            .total
            .evicted_bytes
            .fetch_add(freed_bytes, Relaxed);
        Ok(freed_bytes)
    }

    fn invalidate(&self, file: &SharedFile, extent: Extent) -> Result<(), MemoryError> {
        let body = abi::inval_inode_body(file.node, extent.offset, extent.len);
        match self.core.connection.notify(notify::INVAL_INODE, &[&body]) {
            // Not looked up: nothing is cached.
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(MemoryError::Kernel {
                key: file.key,
                what: "dropping pages",
                offset: extent.offset,
                source: error.into(),
            }),
        }
    }

    /// Which pages of a file are in memory, exactly, padding included.
    pub fn resident(&self, key: &FileKey) -> Result<Vec<Extent>, MemoryError> {
        let file = self.file(key)?;
        self.resident_within(&file, Extent::new(0, file.spec.device_bytes))
    }

    fn resident_within(
        &self,
        file: &SharedFile,
        within: Extent,
    ) -> Result<Vec<Extent>, MemoryError> {
        let Some(mapping) = file.mapping.lock().clone() else {
            return Ok(Vec::new());
        };
        mapping
            .resident(within)
            .map_err(|source| MemoryError::Kernel {
                key: file.key,
                what: "asking for residency",
                offset: within.offset,
                source,
            })
    }

    /// Tells that an observation found `touched` pages, so that pushed bytes count as used.
    pub fn note_touched(&self, key: &FileKey, touched: &[Extent]) -> Result<(), MemoryError> {
        let file = self.file(key)?;
        let pushed = file.pushed.lock();
        let mut used = file.used.lock();
        let runs = touched.iter().map(|extent| PageRun::covering(*extent));
        let hits = runs.flat_map(|run| pushed.runs_within(run));
        let used_bytes = hits.map(|hit| used.insert(hit)).sum::<Pages>().bytes();
        self.core
            .total
            .pushed_used_bytes
            .fetch_add(used_bytes, Relaxed);
        Ok(())
    }

    /// Asks the handler again for each READ whose reply was dropped; returns how many.
    pub fn retry_pending(&self) -> usize {
        self.core.retry_abandoned()
    }

    /// READs that wait for an answer now, oldest first.
    pub fn waiting_reads(&self) -> Vec<WaitingRead> {
        self.core.waiting_reads()
    }

    /// Counters of the whole mount.
    pub fn counters(&self) -> Counters {
        self.core.total.snapshot()
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // While readers still answer: closing a file may ask them, and our own mappings
        // would keep the mount busy.
        for file in self.core.files.read().iter() {
            file.mapping.lock().take();
        }
        if self.unmount_on_drop
            && let Err(error) = mount::unmount_lazily(&self.mountpoint)
        {
            tracing::warn!(%error, mountpoint = %self.mountpoint.display(), "cannot unmount");
        }
        self.core.stop_timers();
        if let Err(error) = rustix::io::write(&self.stop, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "cannot stop the reader threads");
            return;
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a FUSE thread panicked");
            }
        }
    }
}

/// What the pinner still holds of this domain. A new mount inherits nothing: the pinner
/// replaces files of an earlier one when they are added.
fn inherited_pins(config: &Config, is_new: bool) -> BTreeMap<FileKey, Vec<Extent>> {
    let Some(pinner) = config.pinner.as_ref().filter(|_| !is_new) else {
        return BTreeMap::new();
    };
    match pinner.table() {
        Ok(rows) => rows
            .into_iter()
            .filter(|row| row.domain == config.domain)
            .map(|row| (row.key, row.extents))
            .collect(),
        Err(error) => {
            tracing::error!(%error, "pins of the daemon before are not known");
            BTreeMap::new()
        }
    }
}
