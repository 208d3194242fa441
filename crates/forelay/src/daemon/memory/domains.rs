//! Trust domains: one shared memory (FUSE mount) each, and the answer to its faults.
//!
//! Owns the mounts of this daemon and how a fault gets its bytes: from the disk cache on
//! the reader's thread, else from the repository with demand priority. Refuses to decide
//! what is prefetched or evicted.
//!
//! Invariant: a fault that cannot be answered stays pending and is tried again; it is
//! never answered with an error, which would kill the VM.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use forelay_cache::plan::SharedExtent;
use forelay_cache::{Domain, PlannerEvent, SharedImage};
use forelay_image::component::ImageRef;
use forelay_image::{Digest, Extent};
use forelay_memory::{AddFileError, Fault, FaultHandler, FileSpec, SharedMemory};
use forelay_store::Scheduler;
use parking_lot::{Mutex, RwLock};

use crate::daemon::error::HostError;
use crate::daemon::events::Events;
use crate::daemon::memory::faults::Attribution;
use crate::daemon::memory::origins::{self, Origins};
use crate::daemon::memory::planner::PlannerSender;
use crate::daemon::memory::sessions::Sessions;
use crate::daemon::memory::users::DomainUsers;
use crate::daemon::memory::waiting::{WaitLog, longest_waits};

/// Shared memory of one trust domain.
#[derive(Debug)]
pub struct DomainMemory {
    /// Its name.
    pub domain: Domain,
    /// Its mount.
    pub shared: SharedMemory,
    /// Whose bytes the pages of its files are.
    origins: Origins,
    /// Its images that are the memory of snapshots, and what they are called: a forecast may have
    /// loaded them for VMs that there are not yet.
    pub snapshots: Mutex<BTreeMap<Digest, String>>,
}

impl DomainMemory {
    /// Stores bytes that were verified by a chunk index, unless the file is of another; whether
    /// it did.
    pub fn push(&self, image: &Digest, chunk_index: Digest, offset: u64, bytes: &[u8]) -> bool {
        self.origins.store(image, chunk_index, || {
            let pushed = self.shared.push(image, offset, bytes);
            if let Err(error) = &pushed {
                tracing::warn!(%image, %error, "push failed");
            }
            pushed.is_ok()
        })
    }

    /// Makes an empty file of what may be another's, which no VM maps any more.
    fn clear(&self, image: &Digest, spec: FileSpec) -> Result<(), HostError> {
        let evict = |bytes: u64| {
            let evicted = self.shared.evict(image, &[Extent::new(0, bytes)]);
            evicted.map(drop).map_err(HostError::failed)
        };
        match self.shared.add_file(*image, spec) {
            Err(AddFileError::Differs { spec: other, .. }) => {
                evict(other.device_bytes)?;
                self.shared.remove_file(image).map_err(HostError::failed)?;
                let added = self.shared.add_file(*image, spec);
                added.map_err(HostError::failed)?;
            }
            other => other.map_err(HostError::failed)?,
        }
        evict(spec.device_bytes)?;
        let reads = self.shared.waiting_reads();
        match reads.iter().any(|read| read.file == *image) {
            true => Err(HostError::Busy(format!(
                "pages of image {image} that another component left are being read: try again"
            ))),
            false => Ok(()),
        }
    }

    /// Pins resident extents, or takes the pins off.
    pub fn set_pinned(
        &self,
        image: &Digest,
        extents: &[Extent],
        on: bool,
    ) -> Result<(), forelay_memory::MemoryError> {
        match on {
            true => self.shared.pin(image, extents).map(drop),
            false => self.shared.unpin(image, extents).map(drop),
        }
    }
}

/// Answers the faults of one domain.
struct DomainFaults {
    domain: Domain,
    scheduler: Scheduler,
    planner: PlannerSender,
    attribution: Arc<Attribution>,
}

impl FaultHandler for DomainFaults {
    fn fault(&self, fault: Fault) {
        let file = fault.file;
        let extent = Extent::new(fault.offset, u64::from(fault.len));
        let image = SharedImage::new(self.domain.clone(), file);
        let fetched = PlannerEvent::Fetched(SharedExtent::new(image.clone(), extent));
        let arrived = Instant::now();
        let vm = self.attribution.vm_of(fault.thread);
        if let Some(bytes) = self.scheduler.try_cached(file, extent) {
            let stall = arrived.elapsed();
            answer(fault, &bytes);
            if holds_something(&bytes) {
                self.attribution
                    .answered(vm.as_deref(), &image, extent, stall);
            }
            self.planner.tell(fetched);
            return;
        }
        let planned = vm.as_ref().is_some_and(|vm| vm.foresaw(&file));
        let (planner, attribution) = (self.planner.clone(), Arc::clone(&self.attribution));
        let answered = move |result: Result<bytes::Bytes, forelay_store::FetchError>| match result {
            Ok(bytes) => {
                let stall = arrived.elapsed();
                answer(fault, &bytes);
                if holds_something(&bytes) {
                    attribution.answered(vm.as_deref(), &image, extent, stall);
                }
                planner.tell(fetched);
            }
            // It stays pending and is retried on a timer; a wait that lasts is logged.
            Err(error) => fault.reply.postpone(Arc::new(error)),
        };
        self.scheduler
            .demand(file, extent, !planned, Box::new(answered));
    }
}

/// Empty pages of a snapshot's memory are on no disk and in no repository: a guest that begins to
/// use one waits for no fetch.
fn holds_something(bytes: &[u8]) -> bool {
    bytes.iter().any(|byte| *byte != 0)
}

fn answer(fault: Fault, bytes: &[u8]) {
    let (file, offset) = (fault.file, fault.offset);
    if let Err(error) = fault.reply.data(bytes) {
        tracing::error!(image = %file, offset, %error, "an answer to a fault was not taken");
    }
}

/// All trust domains of this daemon.
pub struct Domains {
    mounts_dir: PathBuf,
    /// Users of the domains' VMMs, where they have any.
    users: Option<DomainUsers>,
    scheduler: Scheduler,
    planner: PlannerSender,
    sessions: Sessions,
    attribution: Arc<Attribution>,
    wait_log: Mutex<WaitLog>,
    events: Events,
    table: RwLock<BTreeMap<Domain, Arc<DomainMemory>>>,
}

impl Domains {
    /// No domain yet; mounts go below `mounts_dir`.
    pub fn new(
        mounts_dir: &Path,
        users: Option<DomainUsers>,
        scheduler: Scheduler,
        planner: PlannerSender,
        sessions: Sessions,
        events: Events,
    ) -> Self {
        let mounts_dir = mounts_dir.to_path_buf();
        let attribution = Arc::default();
        Self {
            mounts_dir,
            users,
            scheduler,
            planner,
            sessions,
            attribution,
            wait_log: Mutex::default(),
            events,
            table: RwLock::default(),
        }
    }

    /// Where sessions and pins live.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// Where it is told what happens.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Whose faults were they.
    pub fn attribution(&self) -> &Attribution {
        &self.attribution
    }

    /// The domain of this name, mounted if it was not. May take a moment: call it off the
    /// async threads.
    pub fn ensure(&self, domain: &Domain) -> Result<Arc<DomainMemory>, HostError> {
        if let Some(memory) = self.get(domain) {
            return Ok(memory);
        }
        let mut table = self.table.write();
        if let Some(memory) = table.get(domain) {
            return Ok(Arc::clone(memory));
        }
        let mountpoint = self.mountpoint(domain);
        let session = self.sessions.open(domain.as_str(), &mountpoint)?;
        let handler = DomainFaults {
            domain: domain.clone(),
            scheduler: self.scheduler.clone(),
            planner: self.planner.clone(),
            attribution: Arc::clone(&self.attribution),
        };
        let mut config = forelay_memory::Config::new(mountpoint, session);
        config.gid = self.user_of(domain)?;
        config.domain = domain.as_str().to_owned();
        config.pinner = Some(Arc::clone(self.sessions.pinner()));
        let shared = SharedMemory::start(config, Arc::new(handler)).map_err(HostError::failed)?;
        let origins = origins::path(&self.mounts_dir, domain.as_str());
        let memory = Arc::new(DomainMemory {
            domain: domain.clone(),
            shared,
            origins: Origins::open(origins).map_err(HostError::failed)?,
            snapshots: Mutex::default(),
        });
        table.insert(domain.clone(), Arc::clone(&memory));
        Ok(memory)
    }

    /// The user of a domain's VMMs; `None` if they are root's.
    pub fn user_of(&self, domain: &Domain) -> Result<Option<u32>, HostError> {
        let users = self.users.as_ref();
        users.map(|users| users.of(domain)).transpose()
    }

    /// Where a domain is mounted.
    pub fn mountpoint(&self, domain: &Domain) -> PathBuf {
        self.mounts_dir.join(domain.as_str())
    }

    /// The domain of this name, if it is mounted.
    pub fn get(&self, domain: &Domain) -> Option<Arc<DomainMemory>> {
        self.table.read().get(domain).cloned()
    }

    /// All mounted domains.
    pub fn all(&self) -> Vec<Arc<DomainMemory>> {
        self.table.read().values().cloned().collect()
    }

    /// Makes an image that is open reachable in a domain; returns the path that a VMM maps and
    /// the device's size in bytes. What is there of another that claimed its digest goes.
    pub fn add_image(
        &self,
        memory: &DomainMemory,
        image: &ImageRef,
    ) -> Result<(PathBuf, u64), HostError> {
        let (digest, spec) = (image.digest, FileSpec::padded(image.bytes));
        let clear = || memory.clear(&digest, spec);
        memory.origins.set(&digest, image.chunk_index, clear)?;
        let added = memory.shared.add_file(digest, spec);
        added.map_err(HostError::failed)?;
        Ok((memory.shared.path(&digest), spec.device_bytes))
    }

    /// Makes an image reachable that a live VM maps, also if it cannot be opened now: then
    /// without its chunk index.
    pub fn add_inherited(
        &self,
        memory: &DomainMemory,
        (image, image_bytes): (Digest, u64),
        chunk_index: Option<Digest>,
    ) -> Result<(), HostError> {
        let added = memory.shared.add_file(image, FileSpec::padded(image_bytes));
        added.map_err(HostError::failed)?;
        let note = |index| memory.origins.set_if_unknown(&image, index);
        chunk_index.map_or(Ok(()), note).map_err(HostError::failed)
    }

    /// Has the next pinner hold what the last one did, if that has ended.
    pub fn keep_pinned(&self) {
        match self.sessions.renew_pinner() {
            Ok(false) => return,
            Ok(true) => {}
            Err(error) => {
                tracing::error!(%error, "there is no pinner");
                return;
            }
        }
        for memory in self.all() {
            match memory.shared.pin_again() {
                Ok(bytes) => {
                    tracing::warn!(domain = %memory.domain, bytes, "the pinner ended; pinned again")
                }
                Err(error) => {
                    let error = forelay_host::error_chain(&error);
                    tracing::error!(domain = %memory.domain, error, "pins are lost");
                }
            }
        }
    }

    /// Tries again what could not be answered, and logs who has to wait.
    pub fn retry_pending(&self) {
        for memory in self.all() {
            memory.shared.retry_pending();
        }
        let waits = longest_waits(self);
        self.wait_log.lock().note(waits, &self.events);
    }

    /// What the repository says, while demands for its bytes fail again and again.
    pub fn last_repository_failure(&self) -> Option<String> {
        let counters = self.scheduler.counters();
        counters
            .last_failure
            .filter(|_| counters.demands_in_trouble > 0)
    }
}
