//! Prefetched bytes on their way into shared memory.
//!
//! Owns which of the planner's fetches are under way, and their handles in the store. Chunks
//! arrive, are stored, and the fetch ends with what of it is here. Refuses to know why bytes
//! are wanted.
//!
//! Invariants: each fetch ends in exactly one [`PlannerEvent::FetchEnded`]; after a fetch was
//! cancelled nothing more of it is stored but what was being stored at that moment, and that
//! is told with its end.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use forelay_cache::plan::{Fetch, FetchEnded, FetchId};
use forelay_cache::{Domain, PlannerEvent, SharedImage};
use forelay_image::Extent;
use forelay_image::extent::normalise;
use forelay_store::{FetchError, ImagePart, Prefetch, PrefetchCanceller, PrefetchItem, Scheduler};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use crate::daemon::memory::domains::{DomainMemory, Domains};
use crate::daemon::memory::planner::PlannerSender;

/// See the module's header.
pub struct Prefetcher {
    domains: Arc<Domains>,
    scheduler: Scheduler,
    planner: PlannerSender,
    ledger: Arc<Ledger>,
    runtime: Handle,
}

impl Prefetcher {
    /// Nothing is under way; uses the current runtime.
    pub fn new(domains: Arc<Domains>, scheduler: Scheduler, planner: PlannerSender) -> Self {
        Self {
            domains,
            scheduler,
            planner,
            ledger: Arc::default(),
            runtime: Handle::current(),
        }
    }

    /// Starts fetches, in order.
    pub fn start(&self, fetches: Vec<Fetch>) {
        let mut by_domain: BTreeMap<Domain, Vec<Fetch>> = BTreeMap::new();
        for fetch in fetches {
            let domain = fetch.image.domain.clone();
            by_domain.entry(domain).or_default().push(fetch);
        }
        for (domain, fetches) in by_domain {
            let Some(memory) = self.domains.get(&domain) else {
                for Fetch { id, .. } in fetches {
                    let here = Vec::new();
                    let ended = FetchEnded { id, here };
                    self.planner.tell(PlannerEvent::FetchEnded(ended));
                }
                continue;
            };
            let plan = fetches.iter().map(|one| (one.image.image, one.extent));
            let stream = self.scheduler.prefetch(plan.collect());
            let ids: Vec<FetchId> = fetches.iter().map(|one| one.id).collect();
            self.ledger.open(&ids, &stream.canceller());
            let arrivals = Arrivals {
                memory,
                ids,
                domains: Arc::clone(&self.domains),
                planner: self.planner.clone(),
                ledger: Arc::clone(&self.ledger),
            };
            self.runtime.spawn(arrivals.take_all(stream));
        }
    }

    /// Gives a fetch up; its end is told as that of any other.
    pub fn cancel(&self, id: FetchId) {
        if let Some((canceller, request)) = self.ledger.cancel(id) {
            canceller.cancel(request);
        }
    }
}

/// Fetches under way.
struct Ledger<C = PrefetchCanceller>(Mutex<HashMap<FetchId, OpenFetch<C>>>);

/// A fetch under way.
struct OpenFetch<C> {
    canceller: C,
    /// Its place in its plan.
    request: usize,
    cancelled: bool,
    /// What of it is in shared memory.
    here: Vec<Extent>,
}

impl<C> Default for Ledger<C> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<C: Clone> Ledger<C> {
    fn open(&self, ids: &[FetchId], canceller: &C) {
        let mut open = self.0.lock();
        open.extend(ids.iter().enumerate().map(|(request, id)| {
            let fetch = OpenFetch {
                canceller: canceller.clone(),
                request,
                cancelled: false,
                here: Vec::new(),
            };
            (*id, fetch)
        }));
    }

    /// Nothing more of the fetch is to be stored; returns how to stop it.
    fn cancel(&self, id: FetchId) -> Option<(C, usize)> {
        let mut open = self.0.lock();
        let fetch = open.get_mut(&id)?;
        fetch.cancelled = true;
        Some((fetch.canceller.clone(), fetch.request))
    }

    /// Stores a part by `store`, which says whether it did, unless the fetch was cancelled.
    fn store(&self, id: FetchId, extent: Extent, store: impl FnOnce() -> bool) -> bool {
        let wanted = |open: &HashMap<FetchId, OpenFetch<C>>| {
            open.get(&id).is_some_and(|fetch| !fetch.cancelled)
        };
        // Not under the lock: a store may take a while, and a cancel must not wait for it.
        let stored = wanted(&self.0.lock()) && store();
        if stored && let Some(fetch) = self.0.lock().get_mut(&id) {
            fetch.here.push(extent);
        }
        stored
    }

    /// Forgets a fetch; returns what of it is here.
    fn end(&self, id: FetchId) -> Option<Vec<Extent>> {
        let fetch = self.0.lock().remove(&id)?;
        Some(normalise(fetch.here))
    }
}

/// Takes what arrives of one plan.
struct Arrivals {
    memory: Arc<DomainMemory>,
    /// Fetches by their place in the plan.
    ids: Vec<FetchId>,
    domains: Arc<Domains>,
    planner: PlannerSender,
    ledger: Arc<Ledger>,
}

impl Arrivals {
    async fn take_all(self, mut stream: Prefetch) {
        let arrivals = Arc::new(self);
        while let Some(item) = stream.next().await {
            match item {
                PrefetchItem::Arrived { request, part } => {
                    let (this, id) = (Arc::clone(&arrivals), arrivals.ids[request]);
                    // It fails only when the runtime shuts down.
                    let _ = tokio::task::spawn_blocking(move || this.store(id, &part)).await;
                }
                PrefetchItem::Failed {
                    error: FetchError::Cancelled,
                    ..
                } => {}
                PrefetchItem::Failed { error, .. } => {
                    let error = forelay_host::error_chain(&error);
                    tracing::warn!(error, "prefetch failed");
                }
                PrefetchItem::Ended { request } => arrivals.end(arrivals.ids[request]),
            }
        }
    }

    /// Stores a part. May take a moment: not on async threads.
    fn store(&self, id: FetchId, part: &ImagePart) {
        let ImagePart {
            image,
            chunk_index,
            extent,
            bytes,
        } = part;
        let push = || self.memory.push(image, *chunk_index, extent.offset, bytes);
        if self.ledger.store(id, *extent, push) {
            let image = SharedImage::new(self.memory.domain.clone(), *image);
            self.domains.attribution().returned(&image, *extent);
        }
    }

    fn end(&self, id: FetchId) {
        if let Some(here) = self.ledger.end(id) {
            let ended = FetchEnded { id, here };
            self.planner.tell(PlannerEvent::FetchEnded(ended));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(ids: &[u64]) -> (Ledger<()>, Vec<FetchId>) {
        let ids: Vec<FetchId> = ids.iter().map(|id| FetchId(*id)).collect();
        let ledger = Ledger::default();
        ledger.open(&ids, &());
        (ledger, ids)
    }

    #[test]
    fn a_fetch_ends_once_with_all_that_was_stored_of_it() {
        let (ledger, ids) = open(&[7]);
        let part = |offset, stored| ledger.store(ids[0], Extent::new(offset, 4096), || stored);
        assert!(part(4096, true) && part(0, true) && !part(16384, false));
        assert_eq!(ledger.end(ids[0]), Some(vec![Extent::new(0, 8192)]));
        assert_eq!(ledger.end(ids[0]), None);
    }

    #[test]
    fn nothing_of_a_cancelled_fetch_is_stored_but_what_was_being_stored() {
        let (ledger, ids) = open(&[1, 2]);
        let part = Extent::new(0, 4096);
        let stored = ledger.store(ids[1], part, || {
            // The cancel comes while the kernel takes the bytes.
            assert_eq!(ledger.cancel(ids[1]), Some(((), 1)));
            true
        });
        assert!(stored);
        let later = ledger.store(ids[1], Extent::new(4096, 4096), || panic!("stored"));
        assert!(!later);
        assert_eq!(ledger.end(ids[1]), Some(vec![part]), "and it is told");
        assert!(ledger.store(ids[0], part, || true), "others go on");
        assert_eq!(ledger.cancel(ids[1]), None, "it has ended");
    }
}
