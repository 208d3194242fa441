//! The fetch scheduler: brings chunks from the disk cache or the repository.
//!
//! Demand (a VM waits in a page fault) goes before prefetch: see [`queue`] for the
//! order, [`transfer`] for how a request runs, [`prefetch`] for plans.
//!
//! Refuses to know shared memory: it hands bytes to callbacks and streams.
//!
//! Invariants: bytes handed out were verified, by SHA-256 if they came from the
//! repository and by the cache's checksum if they came from the disk; every demand's
//! callback is called exactly once, unless the runtime is shut down before.

mod counters;
mod prefetch;
mod presence;
mod queue;
mod transfer;

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use forelay_image::{Digest, Extent};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

pub use counters::FetchCounters;
pub use prefetch::{ImagePart, Prefetch, PrefetchCanceller, PrefetchItem};
pub use queue::Limits;

use crate::disk_cache::DiskCache;
use crate::error::StoreError;
use crate::images::{ImageMap, Images};
use crate::repository::Repository;
use presence::Presence;
use queue::{ALONG, ChunkSource, Group, NO_GROUP, Queue, Submitted};

/// Why a chunk is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// A VM waits for it.
    Demand,
    /// It will probably be needed.
    Prefetch,
}

/// How the scheduler behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchConfig {
    /// Slots and sizes of requests.
    pub limits: Limits,
    /// Attempts after which a prefetch is given up.
    pub prefetch_attempts: u32,
    /// Failed attempts after which a demand counts as in trouble. It is tried on.
    pub demand_trouble_attempts: u32,
    /// Wait before the second attempt; doubles with each further one.
    pub first_backoff: Duration,
    /// Longest wait between attempts.
    pub longest_backoff: Duration,
}

impl Default for FetchConfig {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            prefetch_attempts: 5,
            demand_trouble_attempts: 6,
            first_backoff: Duration::from_millis(50),
            longest_backoff: Duration::from_secs(5),
        }
    }
}

/// Why a chunk could not be fetched. Cheap to clone, since several may wait for one chunk.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    /// The image's index cannot be read, or the image is gone.
    #[error("image {image} cannot be opened")]
    Image {
        /// The image.
        image: Digest,
        /// The cause.
        source: Arc<StoreError>,
    },
    /// The image has no such chunk.
    #[error("image {image} has no chunk {chunk_no}")]
    NoSuchChunk {
        /// The image.
        image: Digest,
        /// The number asked for.
        chunk_no: u32,
    },
    /// The pack that holds the chunk is gone.
    #[error(
        "chunk {chunk_no} of image {image} is gone: the repository has no pack {pack}; build the component again"
    )]
    Vanished {
        /// The image.
        image: Digest,
        /// The chunk's number.
        chunk_no: u32,
        /// The pack.
        pack: Digest,
    },
    /// The repository has other bytes than it should.
    #[error(
        "chunk {chunk_no} of image {image} is corrupted in pack {pack}: {problem}; run `forelay verify`"
    )]
    Corrupted {
        /// The image.
        image: Digest,
        /// The chunk's number.
        chunk_no: u32,
        /// The pack.
        pack: Digest,
        /// What is wrong.
        problem: String,
    },
    /// The repository failed.
    #[error("chunk {chunk_no} of image {image} cannot be fetched after {attempts} attempts")]
    Repository {
        /// The image.
        image: Digest,
        /// The chunk's number.
        chunk_no: u32,
        /// Attempts made.
        attempts: u32,
        /// The cause.
        source: Arc<crate::repository::RepositoryError>,
    },
    /// The prefetch was cancelled, or the scheduler is shutting down.
    #[error("the fetch was cancelled")]
    Cancelled,
}

/// How far a widened demand reaches behind what was asked for, in stored bytes: as much as a
/// fast line brings in a millisecond or two, where each request takes ten times that. Reaching
/// further was tried on the touches of `examples/web.toml`: few requests less, many bytes more.
const AHEAD_BYTES: u64 = 128 << 10;
/// The most chunks that come along with one.
const MOST_ALONG: usize = 256;

/// Takes the outcome of a demand.
pub type Callback = Box<dyn FnOnce(Result<Bytes, FetchError>) + Send>;

pub(crate) struct State {
    queue: Queue<Callback>,
    counters: FetchCounters,
    next_group: Group,
    /// Bandwidth estimate: bytes since the line became busy.
    busy_since: Option<Instant>,
    busy_bytes: u64,
}

pub(crate) struct Inner {
    pub(crate) repository: Arc<dyn Repository>,
    pub(crate) cache: Arc<DiskCache>,
    pub(crate) images: Arc<Images>,
    config: FetchConfig,
    handle: Handle,
    presence: Presence,
    state: Mutex<State>,
}

/// Brings chunks from the disk cache or the repository.
#[derive(Clone)]
pub struct Scheduler(pub(crate) Arc<Inner>);

impl Scheduler {
    /// Starts a scheduler on the current tokio runtime.
    pub(crate) fn new(
        repository: Arc<dyn Repository>,
        cache: Arc<DiskCache>,
        images: Arc<Images>,
        config: FetchConfig,
    ) -> Self {
        let state = State {
            queue: Queue::new(config.limits),
            counters: FetchCounters::default(),
            next_group: NO_GROUP + 1,
            busy_since: None,
            busy_bytes: 0,
        };
        let handle = Handle::current();
        let state = Mutex::new(state);
        Self(Arc::new(Inner {
            repository,
            cache,
            images,
            config,
            handle,
            presence: Presence::default(),
            state,
        }))
    }

    /// One chunk of an image, from the disk cache or the repository.
    pub async fn fetch(
        &self,
        image: Digest,
        chunk_no: u32,
        priority: Priority,
    ) -> Result<Bytes, FetchError> {
        let map = self.open(image).await?;
        let source = source(&map, chunk_no)?;
        if let Some(bytes) = self
            .read_cached(vec![(source.chunk, 0, source.chunk_bytes)])
            .await
            .pop()
            .flatten()
        {
            return Ok(bytes);
        }
        let mut fetched = self
            .fetch_sources(vec![source], Vec::new(), priority)
            .await?;
        fetched.pop().ok_or(FetchError::Cancelled)
    }

    /// A range of an image for a thread that must not block, such as one that serves
    /// faults; `callback` is called on another thread, once, with exactly the range.
    /// The part of `extent` beyond the image's end reads as zeros (device padding).
    ///
    /// Where nothing is known of what will be wanted next, `widened` lets what follows in the
    /// image come along: it is in the disk cache when it is asked for.
    pub fn demand(&self, image: Digest, extent: Extent, widened: bool, callback: Callback) {
        let this = self.clone();
        let widened = widened && !self.0.images.is_elsewhere(image);
        let ahead_bytes = if widened { AHEAD_BYTES } else { 0 };
        self.0.handle.spawn(async move {
            let read = this.read_with(image, extent, Priority::Demand, ahead_bytes);
            callback(read.await);
        });
    }

    /// A range of an image; beyond the image's end it reads as zeros.
    pub async fn read(
        &self,
        image: Digest,
        extent: Extent,
        priority: Priority,
    ) -> Result<Bytes, FetchError> {
        self.read_with(image, extent, priority, 0).await
    }

    async fn read_with(
        &self,
        image: Digest,
        extent: Extent,
        priority: Priority,
        ahead_bytes: u64,
    ) -> Result<Bytes, FetchError> {
        let map = self.open(image).await?;
        self.read_map(&map, extent, priority, ahead_bytes).await
    }

    /// A range of an image by a map, which need not be the one that its digest opens as.
    pub(crate) async fn read_map(
        &self,
        map: &ImageMap,
        extent: Extent,
        priority: Priority,
        ahead_bytes: u64,
    ) -> Result<Bytes, FetchError> {
        let wanted: Vec<(ChunkSource, Extent)> = parts(map, extent)?;
        let reads = wanted
            .iter()
            .map(|(source, part)| (source.chunk, part.offset as u32, part.len as u32));
        let cached = self.read_cached(reads.collect()).await;
        let lacking = wanted
            .iter()
            .zip(&cached)
            .filter(|(_, cached)| cached.is_none());
        let lacking: Vec<ChunkSource> = lacking.map(|((source, _), _)| *source).collect();
        let ahead = self.following(map, lacking.last(), ahead_bytes);
        let fetched = self.fetch_sources(lacking, ahead, priority).await?;
        let mut fetched = fetched.into_iter();
        let pieces = wanted.iter().zip(cached).filter_map(|((_, part), cached)| {
            let cut = |chunk: Bytes| chunk.slice(part.offset as usize..part.end() as usize);
            cached.or_else(|| fetched.next().map(cut))
        });
        Ok(assemble(pieces.collect(), extent.len as usize))
    }

    /// A range of an image if all of it is in the disk cache, read on the calling
    /// thread. For warm reads from threads that may wait for the local disk.
    pub fn try_cached(&self, image: Digest, extent: Extent) -> Option<Bytes> {
        let map = self.0.images.get(image)?;
        self.try_cached_map(&map, extent)
    }

    /// As [`Scheduler::try_cached`], by a map.
    pub(crate) fn try_cached_map(&self, map: &ImageMap, extent: Extent) -> Option<Bytes> {
        let wanted = parts(map, extent).ok()?;
        if !wanted
            .iter()
            .all(|(source, _)| self.0.cache.contains(source.chunk))
        {
            return None;
        }
        let read = |(source, part): &(ChunkSource, Extent)| {
            self.0
                .cache
                .read(source.chunk, part.offset as u32, part.len as u32)
        };
        let pieces = wanted.iter().map(read).collect::<Option<Vec<_>>>()?;
        self.0.state.lock().counters.cache_hits += pieces.len() as u64;
        Some(assemble(pieces, extent.len as usize))
    }

    /// What the disk cache lacks of an image that is open, disjoint and sorted (what it has
    /// may still turn out corrupt); nothing of one that is on this host anyway. Cheap to ask again while the cache does not change.
    pub fn absent_on_disk(&self, image: Digest) -> Option<Arc<[Extent]>> {
        let map = self.0.images.get(image)?;
        if self.0.images.is_elsewhere(image) {
            return Some(Arc::new([]));
        }
        Some(self.0.presence.absent(&self.0.cache, &map))
    }

    /// A number that differs whenever the disk cache has other chunks.
    pub fn disk_generation(&self) -> u64 {
        self.0.cache.generation()
    }

    /// The images that are open on this host.
    pub fn open_images(&self) -> Vec<Digest> {
        self.0.images.opened()
    }

    /// Brings a plan's extents as a stream: all of them start, in the plan's order, and come
    /// as they arrive. Whoever asks bounds the bytes of what is under way.
    pub fn prefetch(&self, plan: Vec<(Digest, Extent)>) -> Prefetch {
        Prefetch::start(self.clone(), plan)
    }

    /// Lets the kernel have the page cache of the disk cache's files.
    pub fn give_back_pages(&self) {
        self.0.cache.give_back_pages();
    }

    /// Counters since the scheduler started.
    pub fn counters(&self) -> FetchCounters {
        self.0.state.lock().counters.clone()
    }

    /// The chunks of an image, opening it if need be.
    pub async fn open(&self, image: Digest) -> Result<Arc<ImageMap>, FetchError> {
        let opened = self.0.images.open(image).await;
        opened.map_err(|source| FetchError::Image {
            image,
            source: Arc::new(source),
        })
    }

    /// Reads parts of chunks from the disk cache, off the async threads.
    pub(super) async fn read_cached(&self, reads: Vec<(Digest, u32, u32)>) -> Vec<Option<Bytes>> {
        let count = reads.len();
        if !reads
            .iter()
            .any(|(chunk, ..)| self.0.cache.contains(*chunk))
        {
            return vec![None; count];
        }
        let cache = self.0.cache.clone();
        let read = move || {
            reads
                .into_iter()
                .map(|(chunk, start, len)| cache.read(chunk, start, len))
                .collect::<Vec<_>>()
        };
        let pieces = tokio::task::spawn_blocking(read)
            .await
            .unwrap_or_else(|_| vec![None; count]);
        self.0.state.lock().counters.cache_hits += pieces.iter().flatten().count() as u64;
        pieces
    }

    /// Chunks from the repository, in order. They and what is to come along with them are
    /// asked for before any request starts, so that neighbours share one.
    async fn fetch_sources(
        &self,
        wanted: Vec<ChunkSource>,
        ahead: Vec<ChunkSource>,
        priority: Priority,
    ) -> Result<Vec<Bytes>, FetchError> {
        let mut receivers = Vec::with_capacity(wanted.len());
        let wanted = wanted.into_iter().map(|source| {
            let (sender, receiver) = oneshot::channel();
            receivers.push(async move { receiver.await.unwrap_or(Err(FetchError::Cancelled)) });
            let callback: Callback = Box::new(move |result| drop(sender.send(result)));
            (source, NO_GROUP, callback)
        });
        // Nobody waits for these: they are kept on disk.
        let ahead = ahead
            .into_iter()
            .map(|source| (source, ALONG, Box::new(drop) as Callback));
        let all: Vec<_> = wanted.chain(ahead).collect();
        self.submit(all, priority);
        futures_util::future::try_join_all(receivers).await
    }

    /// What follows a chunk in its image and its pack and is not on disk, as far as so many
    /// stored bytes reach.
    fn following(
        &self,
        map: &ImageMap,
        last: Option<&ChunkSource>,
        stored_bytes: u64,
    ) -> Vec<ChunkSource> {
        let Some(last) = last else {
            return Vec::new();
        };
        let near = |next: &ChunkSource| next.follows(last, stored_bytes);
        (last.chunk_no + 1..)
            .take(MOST_ALONG)
            .map_while(|chunk_no| source(map, chunk_no).ok().filter(near))
            .filter(|next| !self.0.cache.contains(next.chunk))
            .collect()
    }

    /// Asks for chunks from the repository. A group that was cancelled is refused.
    pub(super) fn submit(
        &self,
        wanted: impl IntoIterator<Item = (ChunkSource, Group, Callback)>,
        priority: Priority,
    ) {
        let mut state = self.0.state.lock();
        let mut answered: Vec<(Callback, Result<Bytes, FetchError>)> = Vec::new();
        for (source, group, callback) in wanted {
            match state.queue.submit(source, priority, group, callback) {
                Submitted::Joined => state.counters.joined += 1,
                Submitted::Promoted => state.counters.promoted += 1,
                Submitted::Queued => {}
                Submitted::Here(callback, bytes) => answered.push((callback, Ok(bytes))),
                Submitted::Cancelled(callback) => {
                    answered.push((callback, Err(FetchError::Cancelled)));
                }
            }
        }
        drop(state);
        for (callback, answer) in answered {
            callback(answer);
        }
        self.pump();
    }

    /// Groups that may ask until they are cancelled.
    pub(super) fn open_groups(&self, count: usize) -> std::ops::Range<Group> {
        let mut state = self.0.state.lock();
        let first = state.next_group;
        state.next_group += count as Group;
        let groups = first..state.next_group;
        for group in groups.clone() {
            state.queue.open(group);
        }
        groups
    }

    pub(super) fn cancel(&self, groups: &[Group]) {
        let cancelled = self.0.state.lock().queue.cancel(groups);
        for callback in cancelled {
            callback(Err(FetchError::Cancelled));
        }
    }
}

/// The source of a chunk.
fn source(map: &ImageMap, chunk_no: u32) -> Result<ChunkSource, FetchError> {
    let image = map.image;
    let found = map.chunk(chunk_no).zip(map.location(chunk_no));
    let (chunk, (pack, location)) = found.ok_or(FetchError::NoSuchChunk {
        image: image.digest,
        chunk_no,
    })?;
    Ok(ChunkSource {
        image,
        chunk_no,
        chunk: chunk.digest,
        chunk_bytes: chunk.len,
        pack,
        offset: location.offset,
        stored_bytes: location.stored_bytes,
    })
}

/// The chunks of a range, each with the range of it that is wanted.
fn parts(map: &ImageMap, extent: Extent) -> Result<Vec<(ChunkSource, Extent)>, FetchError> {
    map.chunk_numbers(extent)
        .filter_map(|chunk_no| {
            let covered = map.chunk(chunk_no)?.extent();
            let part = covered.intersection(&extent)?;
            let within = Extent::new(part.offset - covered.offset, part.len);
            Some(source(map, chunk_no).map(|source| (source, within)))
        })
        .collect()
}

/// Joins consecutive pieces and pads with zeros to `len` bytes.
fn assemble(mut pieces: Vec<Bytes>, len: usize) -> Bytes {
    if pieces.len() == 1 && pieces[0].len() == len {
        return pieces.remove(0);
    }
    let mut out = BytesMut::with_capacity(len);
    for piece in pieces {
        out.extend_from_slice(&piece);
    }
    out.resize(len, 0);
    out.freeze()
}
