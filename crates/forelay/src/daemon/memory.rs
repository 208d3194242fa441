//! The memory manager: carries out what the planner decides.
//!
//! Owns the planner's task. Events come in from launches, faults, observation and
//! memory samples; actions go out to the fetch scheduler (prefetch), shared memory
//! (push, pin, evict) and back come events that say what happened. Decides nothing.
//!
//! Invariant: every prefetch that the planner starts ends in exactly one `Pushed` or
//! `PushFailed`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use forelay_cache::mapping_table::SharedTable;
use forelay_cache::plan::{Action, Event, PlanCounters, Planner, PressureLevel};
use forelay_cache::{Domain, SharedImage};
use forelay_image::{Digest, Extent};
use forelay_store::{PrefetchItem, Scheduler};
use parking_lot::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use super::domains::Domains;
use super::samples::Sampler;

/// How often memory is sampled.
const SAMPLE_EVERY: Duration = Duration::from_millis(250);
/// How often the planner and pending faults are given a chance.
const TICK_EVERY: Duration = Duration::from_secs(1);

/// Milliseconds since the epoch.
pub fn now_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// What the planner last said of itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlanStatus {
    /// Most that shared memory may take now, in bytes.
    pub budget_bytes: u64,
    /// How short of memory the host is.
    pub level: PressureLevel,
    /// Bytes of prefetches that wait or are under way.
    pub queued_bytes: u64,
    /// What was done so far.
    pub counters: PlanCounters,
}

/// Handle on the planner's task.
pub struct Memory {
    events: UnboundedSender<Event>,
    table: Arc<SharedTable>,
    status: Arc<Mutex<PlanStatus>>,
}

impl Memory {
    /// Starts the planner's task on the current runtime.
    pub fn start(
        planner: Planner,
        domains: Arc<Domains>,
        scheduler: Scheduler,
        sampler: Sampler,
        channel: (UnboundedSender<Event>, UnboundedReceiver<Event>),
        reserve: UnboundedSender<Action>,
    ) -> Self {
        let (events, incoming) = channel;
        let table = Arc::clone(planner.table());
        let status = Arc::new(Mutex::new(PlanStatus::default()));
        let worker = Worker {
            planner,
            domains,
            scheduler,
            sampler,
            events: events.clone(),
            status: Arc::clone(&status),
            reserve,
        };
        tokio::spawn(worker.run(incoming));
        Self {
            events,
            table,
            status,
        }
    }

    /// Tells the planner something. Never blocks.
    pub fn tell(&self, event: Event) {
        // Fails only when the daemon shuts down.
        let _ = self.events.send(event);
    }

    /// The mapping table.
    pub fn table(&self) -> &SharedTable {
        &self.table
    }

    /// What the planner last said of itself.
    pub fn status(&self) -> PlanStatus {
        *self.status.lock()
    }
}

struct Worker {
    planner: Planner,
    domains: Arc<Domains>,
    scheduler: Scheduler,
    sampler: Sampler,
    events: UnboundedSender<Event>,
    status: Arc<Mutex<PlanStatus>>,
    reserve: UnboundedSender<Action>,
}

impl Worker {
    async fn run(mut self, mut incoming: UnboundedReceiver<Event>) {
        let mut sample = tokio::time::interval(SAMPLE_EVERY);
        let mut tick = tokio::time::interval(TICK_EVERY);
        sample.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = incoming.recv() => match event {
                    Some(event) => self.step(event),
                    None => return,
                },
                _ = sample.tick() => {
                    let (pool, pinned) = self.pool_bytes();
                    let sample = self.sampler.sample(pool, pinned);
                    self.step(Event::MemorySampled(sample));
                }
                _ = tick.tick() => self.tick(),
            }
        }
    }

    fn tick(&mut self) {
        let counters = self.scheduler.counters();
        if let (Some(latency_ns), Some(bandwidth)) =
            (counters.latency_ns, counters.bandwidth_bytes_per_s)
        {
            self.step(Event::FetchCostMeasured {
                latency_ms: latency_ns as f64 / 1e6,
                bandwidth_bytes_per_s: bandwidth as f64,
            });
        }
        self.step(Event::Tick);
        let domains = Arc::clone(&self.domains);
        tokio::task::spawn_blocking(move || domains.retry_pending());
    }

    fn pool_bytes(&self) -> (u64, u64) {
        self.planner.table().read(|table| {
            let pinned = table
                .known_images()
                .map(|image| table.pinned_bytes_of(image))
                .sum();
            (table.resident_bytes(), pinned)
        })
    }

    fn step(&mut self, event: Event) {
        let mut pending = vec![event];
        while let Some(event) = pending.pop() {
            let actions = self.planner.step(event, now_ms());
            self.carry_out(actions, &mut pending);
        }
        *self.status.lock() = PlanStatus {
            budget_bytes: self.planner.budget_bytes(),
            level: self.planner.pressure(),
            queued_bytes: self.planner.queued_bytes(),
            counters: self.planner.counters(),
        };
    }

    fn carry_out(&mut self, actions: Vec<Action>, pending: &mut Vec<Event>) {
        let mut batches: HashMap<Domain, Vec<(Digest, Extent)>> = HashMap::new();
        for action in actions {
            match action {
                Action::Prefetch { image, extent, .. } => {
                    batches
                        .entry(image.domain)
                        .or_default()
                        .push((image.image, extent));
                }
                // What is under way is about to arrive; its answer is harmless.
                Action::CancelPrefetch { .. } => {}
                Action::Pin { image, extents } => self.pin(image, extents, true),
                Action::Unpin { image, extents } => self.pin(image, extents, false),
                Action::Evict { image, extents } => self.evict(image, extents),
                Action::PausePrefetch => self.scheduler.pause_prefetch(true),
                Action::ResumePrefetch => self.scheduler.pause_prefetch(false),
                action @ (Action::Reserve { .. } | Action::Release { .. }) => {
                    let _ = self.reserve.send(action);
                }
            }
        }
        for (domain, plan) in batches {
            match self.domains.get(&domain) {
                Some(_) => self.prefetch(domain, plan),
                None => pending.extend(plan.into_iter().map(|(image, extent)| {
                    let image = SharedImage::new(domain.clone(), image);
                    Event::PushFailed { image, extent }
                })),
            }
        }
    }

    /// Fetches a batch in order and pushes its pieces as they arrive.
    fn prefetch(&self, domain: Domain, plan: Vec<(Digest, Extent)>) {
        let domains = Arc::clone(&self.domains);
        let events = self.events.clone();
        let mut stream = self.scheduler.prefetch(plan.clone());
        tokio::spawn(async move {
            let mut open = OpenPushes::new(domain.clone(), plan);
            while let Some(item) = stream.next().await {
                let Some(memory) = domains.get(&domain) else {
                    break;
                };
                let pushed = tokio::task::spawn_blocking(move || push(&memory.shared, item)).await;
                for event in pushed.map_or_else(|_| Vec::new(), |done| open.take(done)) {
                    let _ = events.send(event);
                }
            }
            for event in open.fail_rest() {
                let _ = events.send(event);
            }
        });
    }

    fn evict(&self, image: SharedImage, extents: Vec<Extent>) {
        let domains = Arc::clone(&self.domains);
        let events = self.events.clone();
        tokio::task::spawn_blocking(move || {
            if let Some(memory) = domains.get(&image.domain)
                && let Err(error) = memory.shared.evict(&image.image, &extents)
            {
                tracing::warn!(image = %image.image, %error, "eviction failed");
            }
            for extent in extents {
                let _ = events.send(Event::Evicted {
                    image: image.clone(),
                    extent,
                });
            }
        });
    }

    fn pin(&self, image: SharedImage, extents: Vec<Extent>, on: bool) {
        let domains = Arc::clone(&self.domains);
        let events = self.events.clone();
        tokio::task::spawn_blocking(move || {
            let Some(memory) = domains.get(&image.domain) else {
                return;
            };
            match memory.set_pinned(&image.image, &extents, on) {
                Ok(()) => {
                    for extent in extents {
                        let image = image.clone();
                        let _ = events.send(match on {
                            true => Event::Pinned { image, extent },
                            false => Event::Unpinned { image, extent },
                        });
                    }
                }
                Err(error) => tracing::warn!(image = %image.image, %error, on, "pinning failed"),
            }
        });
    }
}

/// What became of one chunk of a batch.
struct Pushed {
    image: Digest,
    /// Extents that are in shared memory now.
    here: Vec<Extent>,
    /// The image as a whole cannot be fetched.
    image_failed: bool,
}

fn push(shared: &forelay_memory::SharedMemory, item: PrefetchItem) -> Pushed {
    let image = item.image;
    match item.pieces {
        Ok(pieces) => {
            let mut here = Vec::new();
            for piece in pieces {
                match shared.push(&image, piece.extent.offset, &piece.bytes) {
                    Ok(()) => here.push(piece.extent),
                    Err(error) => tracing::warn!(%image, %error, "push failed"),
                }
            }
            Pushed {
                image,
                here,
                image_failed: false,
            }
        }
        Err(error) => {
            let image_failed = item.chunk_no == u32::MAX;
            tracing::warn!(%image, error = %super::chain(&error), "prefetch failed");
            Pushed {
                image,
                here: Vec::new(),
                image_failed,
            }
        }
    }
}

/// The extents of a batch that have not arrived in full yet.
struct OpenPushes {
    domain: Domain,
    /// Image, extent as planned, bytes still missing.
    open: Vec<(Digest, Extent, u64)>,
}

impl OpenPushes {
    fn new(domain: Domain, plan: Vec<(Digest, Extent)>) -> Self {
        let open = plan
            .into_iter()
            .map(|(image, extent)| (image, extent, extent.len))
            .collect();
        Self { domain, open }
    }

    /// Accounts for a chunk; returns the events of extents that are complete now.
    fn take(&mut self, pushed: Pushed) -> Vec<Event> {
        for here in &pushed.here {
            for (image, extent, missing) in &mut self.open {
                if *image == pushed.image
                    && let Some(part) = extent.intersection(here)
                {
                    *missing = missing.saturating_sub(part.len);
                }
            }
        }
        let domain = self.domain.clone();
        let gone = |(image, _, missing): &mut (Digest, Extent, u64)| {
            *missing == 0 || (pushed.image_failed && *image == pushed.image)
        };
        let ended = self.open.extract_if(.., gone);
        ended
            .map(|(image, extent, missing)| outcome(&domain, image, extent, missing))
            .collect()
    }

    fn fail_rest(self) -> Vec<Event> {
        let Self { domain, open } = self;
        let failed = open.into_iter();
        failed
            .map(|(image, extent, missing)| outcome(&domain, image, extent, missing))
            .collect()
    }
}

fn outcome(domain: &Domain, image: Digest, extent: Extent, missing: u64) -> Event {
    let image = SharedImage::new(domain.clone(), image);
    if missing == 0 {
        Event::Pushed { image, extent }
    } else {
        Event::PushFailed { image, extent }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_over_several_chunks_ends_once_with_its_last_piece() {
        let image = Digest::of(b"image");
        let plan = vec![
            (image, Extent::new(0, 12288)),
            (image, Extent::new(16384, 4096)),
        ];
        let mut open = OpenPushes::new("d".into(), plan);
        let part = |offset, len| Pushed {
            image,
            here: vec![Extent::new(offset, len)],
            image_failed: false,
        };
        assert!(open.take(part(0, 8192)).is_empty());
        let events = open.take(part(8192, 4096));
        assert!(
            matches!(&events[..], [Event::Pushed { extent, .. }] if *extent == Extent::new(0, 12288))
        );
        let rest = open.fail_rest();
        assert!(matches!(&rest[..], [Event::PushFailed { extent, .. }] if extent.offset == 16384));
    }
}
