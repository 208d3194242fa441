//! Prefetches: extents that are brought in order, each of which can be cancelled by itself.
//!
//! There is one queue of prefetches, and it is the planner's: it owns what waits, in which
//! order, how many bytes are handed over at a time, and when none are. All that is handed
//! over starts here at once. Only the line to the repository is paced, by [`super::queue`],
//! which alone knows what demand is in flight. Bytes are yielded as they arrive.
//!
//! Invariants: each chunk of a request is yielded once, with exactly the wanted range of it;
//! each request ends once, after its last part; a cancelled one ends at once, and nothing
//! new starts on its behalf.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use forelay_image::{Digest, Extent};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::queue::{ChunkSource, Group};
use super::{FetchError, Priority, Scheduler, parts};
use crate::images::ImageMap;

/// A part of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImagePart {
    /// The image.
    pub image: Digest,
    /// The chunk index by which it was verified.
    pub chunk_index: Digest,
    /// Where it is in the image.
    pub extent: Extent,
    /// Its bytes.
    pub bytes: Bytes,
}

/// What becomes of a request, which is named by its place in the plan.
#[derive(Debug)]
pub enum PrefetchItem {
    /// The wanted range of one chunk.
    Arrived {
        /// The request.
        request: usize,
        /// The bytes.
        part: ImagePart,
    },
    /// A chunk, or the whole image, cannot be had.
    Failed {
        /// The request.
        request: usize,
        /// Why.
        error: FetchError,
    },
    /// All of the request has arrived or failed, or it was cancelled.
    Ended {
        /// The request.
        request: usize,
    },
}

/// A plan under way. Dropping it cancels all of it.
pub struct Prefetch {
    canceller: PrefetchCanceller,
    producer: JoinHandle<()>,
    items: mpsc::UnboundedReceiver<PrefetchItem>,
    /// Requests that have not ended.
    open: usize,
}

/// Cancels single requests of a plan.
#[derive(Clone)]
pub struct PrefetchCanceller {
    scheduler: Scheduler,
    tickets: Arc<[Arc<Ticket>]>,
}

/// One request of a plan.
struct Ticket {
    request: usize,
    image: Digest,
    extent: Extent,
    group: Group,
    items: mpsc::UnboundedSender<PrefetchItem>,
    /// Parts that have neither arrived nor failed.
    outstanding: AtomicUsize,
    ended: AtomicBool,
}

/// The wanted range of one chunk, on behalf of a request.
struct WantedPart {
    ticket: Arc<Ticket>,
    source: ChunkSource,
    /// Where the chunk starts in the image.
    chunk_offset: u64,
    /// Which range of the chunk is wanted.
    range: Extent,
}

/// Cached chunks are read in batches of about this many bytes.
const BATCH_BYTES: u64 = 2 << 20;

impl Prefetch {
    pub(super) fn start(scheduler: Scheduler, plan: Vec<(Digest, Extent)>) -> Self {
        let (sender, items) = mpsc::unbounded_channel();
        let groups = scheduler.open_groups(plan.len());
        let tickets = plan.into_iter().zip(groups).enumerate();
        let tickets = tickets.map(|(request, ((image, extent), group))| {
            Arc::new(Ticket {
                request,
                image,
                extent,
                group,
                items: sender.clone(),
                outstanding: AtomicUsize::new(0),
                ended: AtomicBool::new(false),
            })
        });
        let tickets: Arc<[Arc<Ticket>]> = tickets.collect();
        let producer = Producer {
            scheduler: scheduler.clone(),
            batch: Batch::default(),
        };
        let handle = scheduler.0.handle.clone();
        let producer = handle.spawn(producer.run(Arc::clone(&tickets)));
        let open = tickets.len();
        let canceller = PrefetchCanceller { scheduler, tickets };
        Self {
            open,
            canceller,
            producer,
            items,
        }
    }

    /// What happens next; `None` once every request has ended.
    pub async fn next(&mut self) -> Option<PrefetchItem> {
        if self.open == 0 {
            return None;
        }
        let item = self.items.recv().await?;
        if matches!(item, PrefetchItem::Ended { .. }) {
            self.open -= 1;
        }
        Some(item)
    }

    /// Cancels requests of this plan, also after the plan was handed to whoever drains it.
    pub fn canceller(&self) -> PrefetchCanceller {
        self.canceller.clone()
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.producer.abort();
        self.items.close();
        let tickets = &self.canceller.tickets;
        let groups: Vec<Group> = tickets.iter().map(|ticket| ticket.group).collect();
        self.canceller.scheduler.cancel(&groups);
    }
}

impl PrefetchCanceller {
    /// Ends a request now: nothing starts on its behalf any more, and what was under way is
    /// not yielded. What has been yielded already is the consumer's.
    pub fn cancel(&self, request: usize) {
        if let Some(ticket) = self.tickets.get(request) {
            ticket.end();
            self.scheduler.cancel(&[ticket.group]);
        }
    }
}

impl Ticket {
    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// A part has arrived or failed.
    fn part(&self, outcome: Result<ImagePart, FetchError>) {
        if self.has_ended() {
            return;
        }
        let request = self.request;
        // Sending fails only when nobody listens any more.
        let _ = self.items.send(match outcome {
            Ok(part) => PrefetchItem::Arrived { request, part },
            Err(error) => PrefetchItem::Failed { request, error },
        });
        if self.outstanding.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.end();
        }
    }

    /// Nothing of the request can be had.
    fn fail(&self, error: FetchError) {
        let request = self.request;
        let _ = self.items.send(PrefetchItem::Failed { request, error });
        self.end();
    }

    fn end(&self) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            let request = self.request;
            let _ = self.items.send(PrefetchItem::Ended { request });
        }
    }
}

struct Producer {
    scheduler: Scheduler,
    batch: Batch,
}

impl Producer {
    async fn run(mut self, tickets: Arc<[Arc<Ticket>]>) {
        let mut unopened: HashMap<Digest, Vec<Arc<Ticket>>> = HashMap::new();
        for ticket in tickets.iter() {
            match self.scheduler.0.images.get(ticket.image) {
                Some(map) => self.request(&map, ticket),
                None => {
                    let waiting = unopened.entry(ticket.image).or_default();
                    waiting.push(Arc::clone(ticket));
                }
            }
        }
        self.batch.start(&self.scheduler);
        // An image whose index is slow to come holds up nobody else.
        let opening = unopened.into_iter().map(|(image, tickets)| {
            let scheduler = self.scheduler.clone();
            async move {
                let opened = scheduler.open(image).await;
                let batch = Batch::default();
                let mut producer = Self { scheduler, batch };
                for ticket in tickets {
                    match &opened {
                        Ok(map) => producer.request(map, &ticket),
                        Err(error) => ticket.fail(error.clone()),
                    }
                }
                producer.batch.start(&producer.scheduler);
            }
        });
        futures_util::future::join_all(opening).await;
    }

    /// Starts all parts of a request.
    fn request(&mut self, map: &ImageMap, ticket: &Arc<Ticket>) {
        let parts = match parts(map, ticket.extent) {
            Ok(parts) => parts,
            Err(error) => return ticket.fail(error),
        };
        if parts.is_empty() || ticket.has_ended() {
            return ticket.end();
        }
        ticket.outstanding.store(parts.len(), Ordering::Release);
        for (source, range) in parts {
            let wanted = WantedPart {
                ticket: Arc::clone(ticket),
                source,
                chunk_offset: map.chunk(source.chunk_no).map_or(0, |chunk| chunk.offset),
                range,
            };
            if self.scheduler.0.cache.contains(source.chunk) {
                self.batch.push(wanted, &self.scheduler);
            } else {
                wanted.submit(&self.scheduler);
            }
        }
    }
}

impl WantedPart {
    /// Asks the repository.
    fn submit(self, scheduler: &Scheduler) {
        let (source, group) = (self.source, self.ticket.group);
        let callback = move |result: Result<Bytes, FetchError>| {
            let range = self.range.offset as usize..self.range.end() as usize;
            // A slice keeps the whole chunk in memory until it is stored.
            let cut = |chunk: Bytes| match self.range.len * 2 < chunk.len() as u64 {
                true => Bytes::copy_from_slice(&chunk[range]),
                false => chunk.slice(range),
            };
            self.ticket
                .part(result.map(cut).map(|bytes| self.part(bytes)));
        };
        let callback: super::Callback = Box::new(callback);
        scheduler.submit([(source, group, callback)], Priority::Prefetch);
    }

    fn part(&self, bytes: Bytes) -> ImagePart {
        ImagePart {
            image: self.source.image.digest,
            chunk_index: self.source.image.chunk_index,
            extent: Extent::new(self.chunk_offset + self.range.offset, self.range.len),
            bytes,
        }
    }

    /// Reads from the disk cache; what is not there after all comes from the repository.
    fn read(self, scheduler: &Scheduler) {
        if self.ticket.has_ended() {
            return;
        }
        let (offset, len) = (self.range.offset as u32, self.range.len as u32);
        match scheduler.0.cache.read(self.source.chunk, offset, len) {
            Some(bytes) => {
                scheduler.0.state.lock().counters.cache_hits += 1;
                self.ticket.part(Ok(self.part(bytes)));
            }
            None => self.submit(scheduler),
        }
    }
}

/// Chunks to be read from the disk cache together.
#[derive(Default)]
struct Batch {
    reads: Vec<WantedPart>,
    bytes: u64,
}

impl Batch {
    fn push(&mut self, wanted: WantedPart, scheduler: &Scheduler) {
        self.bytes += wanted.range.len;
        self.reads.push(wanted);
        if self.bytes >= BATCH_BYTES {
            self.start(scheduler);
        }
    }

    fn start(&mut self, scheduler: &Scheduler) {
        self.bytes = 0;
        let reads = std::mem::take(&mut self.reads);
        if !reads.is_empty() {
            let handle = scheduler.0.handle.clone();
            let scheduler = scheduler.clone();
            handle.spawn_blocking(move || {
                for wanted in reads {
                    wanted.read(&scheduler);
                }
            });
        }
    }
}
