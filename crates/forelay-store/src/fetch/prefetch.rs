//! A plan as a stream: its extents in order, from the disk cache or the repository.
//!
//! The stream runs ahead of its consumer by a window of bytes, so that memory stays
//! bounded and requests coalesce. Chunks on the local disk are read in batches, those in
//! the repository go through the queue like everything else.
//!
//! Invariants: each chunk of the plan is yielded once, at the place where the plan first
//! names it, with exactly the wanted ranges of it; after [`Prefetch`] is dropped nothing
//! new starts on its behalf.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use forelay_image::extent::normalise;
use forelay_image::{Digest, Extent};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::queue::{Group, Source};
use super::{FetchError, Priority, Scheduler, parts};

/// A part of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it is in the image.
    pub extent: Extent,
    /// Its bytes.
    pub bytes: Bytes,
}

/// What a stream yields: the wanted ranges of one chunk.
#[derive(Debug)]
pub struct PrefetchItem {
    /// The image.
    pub image: Digest,
    /// Number of the chunk; `u32::MAX` if the image could not be opened.
    pub chunk_no: u32,
    /// The wanted ranges in image order, or why they could not be had.
    pub pieces: Result<Vec<Piece>, FetchError>,
}

type Slot = (
    Digest,
    u32,
    oneshot::Receiver<Result<Vec<Piece>, FetchError>>,
    Option<OwnedSemaphorePermit>,
);

/// A plan under way. Dropping it cancels what has not started.
pub struct Prefetch {
    scheduler: Scheduler,
    group: Group,
    producer: JoinHandle<()>,
    slots: mpsc::UnboundedReceiver<Slot>,
}

/// One chunk of a plan.
struct Wanted {
    source: Source,
    /// Where the chunk starts in the image.
    chunk_offset: u64,
    /// Wanted ranges of the chunk.
    ranges: Vec<Extent>,
}

/// Cached chunks are read in batches of about this many bytes.
const BATCH_BYTES: u64 = 2 << 20;

/// The window is counted in units of this many bytes.
const UNIT_BYTES: u64 = 4096;

impl Prefetch {
    pub(super) fn start(scheduler: Scheduler, plan: Vec<(Digest, Extent)>) -> Self {
        let group = scheduler.new_group();
        let (sender, slots) = mpsc::unbounded_channel();
        let producer = Producer {
            scheduler: scheduler.clone(),
            group,
            slots: sender,
        };
        let producer = scheduler.0.handle.spawn(producer.run(plan));
        Self {
            scheduler,
            group,
            producer,
            slots,
        }
    }

    /// The next chunk's wanted ranges, in the plan's order; `None` at the plan's end.
    pub async fn next(&mut self) -> Option<PrefetchItem> {
        let (image, chunk_no, receiver, permit) = self.slots.recv().await?;
        let pieces = receiver.await.unwrap_or(Err(FetchError::Cancelled));
        drop(permit);
        Some(PrefetchItem {
            image,
            chunk_no,
            pieces,
        })
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.producer.abort();
        self.slots.close();
        self.scheduler.cancel(self.group);
    }
}

struct Producer {
    scheduler: Scheduler,
    group: Group,
    slots: mpsc::UnboundedSender<Slot>,
}

impl Producer {
    async fn run(self, plan: Vec<(Digest, Extent)>) {
        let wanted = self.expand(plan).await;
        let window_bytes = self.scheduler.0.config.stream_window_bytes.max(2 << 20);
        let units = (window_bytes / UNIT_BYTES).min(u32::MAX.into()) as u32;
        let window = Arc::new(Semaphore::new(units as usize));
        let mut batch = Batch::default();
        for wanted in wanted {
            let need = u64::from(wanted.source.chunk_bytes).div_ceil(UNIT_BYTES) as u32;
            let permit = match window.clone().try_acquire_many_owned(need) {
                Ok(permit) => permit,
                Err(_) => {
                    // Waiting for the consumer: what it waits for must be under way.
                    batch.start(&self);
                    let Ok(permit) = window.clone().acquire_many_owned(need).await else {
                        return;
                    };
                    permit
                }
            };
            let (sender, receiver) = oneshot::channel();
            let (image, chunk_no) = (wanted.source.image, wanted.source.chunk_no);
            if self
                .slots
                .send((image, chunk_no, receiver, Some(permit)))
                .is_err()
            {
                return;
            }
            if self.scheduler.0.cache.contains(wanted.source.chunk) {
                batch.push(wanted, sender, &self);
            } else {
                submit(&self.scheduler, self.group, wanted, sender);
            }
        }
        batch.start(&self);
    }

    /// The plan by chunks. Images that cannot be opened yield their error at once.
    async fn expand(&self, plan: Vec<(Digest, Extent)>) -> Vec<Wanted> {
        let mut at: HashMap<(Digest, u32), usize> = HashMap::new();
        let mut failed: Vec<Digest> = Vec::new();
        let mut all: Vec<Wanted> = Vec::new();
        for (image, extent) in plan {
            if failed.contains(&image) {
                continue;
            }
            let expanded = match self.scheduler.open(image).await {
                Ok(map) => parts(&map, extent).map(|parts| (map, parts)),
                Err(error) => Err(error),
            };
            let (map, parts) = match expanded {
                Ok(expanded) => expanded,
                Err(error) => {
                    failed.push(image);
                    let (sender, receiver) = oneshot::channel();
                    let _ = sender.send(Err(error));
                    let _ = self.slots.send((image, u32::MAX, receiver, None));
                    continue;
                }
            };
            for (source, range) in parts {
                let chunk_offset = map.chunk(source.chunk_no).map_or(0, |chunk| chunk.offset);
                let index = *at.entry((image, source.chunk_no)).or_insert_with(|| {
                    all.push(Wanted {
                        source,
                        chunk_offset,
                        ranges: Vec::new(),
                    });
                    all.len() - 1
                });
                all[index].ranges.push(range);
            }
        }
        for wanted in &mut all {
            wanted.ranges = normalise(std::mem::take(&mut wanted.ranges));
        }
        all
    }
}

type Outcome = oneshot::Sender<Result<Vec<Piece>, FetchError>>;

/// Asks the repository for a chunk of the plan.
fn submit(scheduler: &Scheduler, group: Group, wanted: Wanted, outcome: Outcome) {
    let source = wanted.source;
    let callback = move |result: Result<Bytes, FetchError>| {
        let _ = outcome.send(result.map(|bytes| {
            wanted.cut(|range| bytes.slice(range.offset as usize..range.end() as usize))
        }));
    };
    scheduler.submit(source, Priority::Prefetch, group, Box::new(callback));
}

impl Wanted {
    fn cut(&self, bytes_of: impl Fn(&Extent) -> Bytes) -> Vec<Piece> {
        let piece = |range: &Extent| Piece {
            extent: Extent::new(self.chunk_offset + range.offset, range.len),
            bytes: bytes_of(range),
        };
        self.ranges.iter().map(piece).collect()
    }

    fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len).sum()
    }
}

/// Chunks to be read from the disk cache together.
#[derive(Default)]
struct Batch {
    reads: Vec<(Wanted, Outcome)>,
    bytes: u64,
}

impl Batch {
    fn push(&mut self, wanted: Wanted, outcome: Outcome, producer: &Producer) {
        self.bytes += wanted.bytes();
        self.reads.push((wanted, outcome));
        if self.bytes >= BATCH_BYTES {
            self.start(producer);
        }
    }

    fn start(&mut self, producer: &Producer) {
        let reads = std::mem::take(&mut self.reads);
        self.bytes = 0;
        if reads.is_empty() {
            return;
        }
        let (scheduler, group) = (producer.scheduler.clone(), producer.group);
        producer.scheduler.0.handle.spawn_blocking(move || {
            for (wanted, outcome) in reads {
                if outcome.is_closed() {
                    continue;
                }
                let read = |range: &Extent| {
                    scheduler.0.cache.read(
                        wanted.source.chunk,
                        range.offset as u32,
                        range.len as u32,
                    )
                };
                match wanted
                    .ranges
                    .iter()
                    .map(read)
                    .collect::<Option<Vec<Bytes>>>()
                {
                    Some(read) => {
                        scheduler.0.state.lock().counters.cache_hits += 1;
                        let pieces = wanted.ranges.iter().zip(read).map(|(range, bytes)| Piece {
                            extent: Extent::new(wanted.chunk_offset + range.offset, range.len),
                            bytes,
                        });
                        let _ = outcome.send(Ok(pieces.collect()));
                    }
                    None => submit(&scheduler, group, wanted, outcome),
                }
            }
        });
    }
}
