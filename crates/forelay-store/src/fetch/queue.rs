//! Which chunk is fetched next, and with which neighbours: decisions without I/O.
//!
//! ```text
//!             submit                     next_request                 delivered           finished
//! (absent) ------------> Queued(Prefetch) ----------> InFlight -----------------> Delivered -------> (absent)
//!                          |  submit(Demand)             |  submit: joins             |  submit: answered at once
//!                          v                             |
//!                        Queued(Demand) ---------------->+
//! ```
//! Demand has slots of its own, so it never waits for a prefetch to end; a demand for a
//! queued prefetch promotes it; a demand for one in flight joins it. Prefetch is limited
//! by bytes in flight, more tightly while demand is in flight. Which prefetches there are,
//! and when there are none, is decided elsewhere ([`super::prefetch`]).
//!
//! Refuses to know time, packs' contents and who waits (`W` is opaque).
//!
//! Invariants: a chunk has at most one flight; every waiter is handed out exactly once,
//! by [`Queue::delivered`], [`Queue::failed`] or [`Queue::cancel`].

use std::collections::{HashMap, HashSet, VecDeque};

use bytes::Bytes;
use forelay_image::component::ImageRef;
use forelay_image::{Digest, Extent};

use super::Priority;

/// A waiter's group, by which it can be cancelled.
pub type Group = u64;

/// The group of those that cannot be cancelled; always open.
pub const NO_GROUP: Group = 0;

/// The group of what comes along with a demand: in its order, on its slots and in its
/// requests, but nobody waits for it, and so it is given up like a prefetch. Always open.
pub const ALONG: Group = Group::MAX;

/// Where a chunk comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSource {
    /// The image on whose behalf it is fetched.
    pub image: ImageRef,
    /// Its number in that image.
    pub chunk_no: u32,
    /// Its digest.
    pub chunk: Digest,
    /// Its length in bytes.
    pub chunk_bytes: u32,
    /// The pack that holds it.
    pub pack: Digest,
    /// Where its frame starts in the pack.
    pub offset: u32,
    /// Length of the frame in bytes.
    pub stored_bytes: u32,
}

impl ChunkSource {
    /// Where its frame ends in the pack.
    pub fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.stored_bytes)
    }

    /// Whether it lies within so many stored bytes behind `last` in the same pack. What lies
    /// before it (a part shared with an image published earlier) does not.
    pub fn follows(&self, last: &Self, stored_bytes: u64) -> bool {
        self.pack == last.pack && self.end() > last.end() && self.end() - last.end() <= stored_bytes
    }
}

/// Limits of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Requests that demand may have in flight.
    pub demand_requests: usize,
    /// Requests that prefetch may have in flight.
    pub prefetch_requests: usize,
    /// Bytes that prefetch may have in flight.
    pub prefetch_bytes: u64,
    /// No prefetch request is longer (unless a single chunk is).
    pub request_bytes: u64,
    /// Two chunks are fetched by one request if at most this many bytes lie between them.
    pub gap_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            demand_requests: 32,
            prefetch_requests: 64,
            // Twice what 20 ms at 100 MB/s hold: more would only make demand wait longer.
            prefetch_bytes: 4 << 20,
            request_bytes: 1 << 20,
            gap_bytes: 32 << 10,
        }
    }
}

/// One ranged GET.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeRequest {
    /// The pack.
    pub pack: Digest,
    /// The range of it.
    pub extent: Extent,
    /// The chunks in the range that are wanted, by offset.
    pub parts: Vec<ChunkSource>,
    /// On whose slots it runs.
    pub priority: Priority,
}

/// What became of a submission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Submitted<W> {
    /// A new flight was queued.
    Queued,
    /// It joined a flight.
    Joined,
    /// It joined a queued prefetch, which is now a demand.
    Promoted,
    /// The chunk has just arrived; the waiter is handed back.
    Here(W, Bytes),
    /// Its group was cancelled; the waiter is handed back.
    Cancelled(W),
}

enum FlightState {
    Queued(Priority),
    InFlight,
    Delivered(Bytes),
}

struct Flight<W> {
    source: ChunkSource,
    state: FlightState,
    demanded: bool,
    waiters: Vec<(Group, W)>,
}

/// Flights and the order in which they start.
pub struct Queue<W> {
    limits: Limits,
    flights: HashMap<Digest, Flight<W>>,
    /// Groups that may ask, with the number of their waiters: who asks for one can be a step
    /// behind its cancelling.
    open: HashMap<Group, usize>,
    demand: VecDeque<Digest>,
    prefetch: VecDeque<Digest>,
    demand_active: usize,
    prefetch_active: usize,
    prefetch_bytes_active: u64,
}

/// How far into the queue a request looks for neighbours.
const LOOK_AHEAD: usize = 512;

impl<W> Queue<W> {
    /// An empty queue.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            flights: HashMap::new(),
            open: HashMap::from([(NO_GROUP, 0), (ALONG, 0)]),
            demand: VecDeque::new(),
            prefetch: VecDeque::new(),
            demand_active: 0,
            prefetch_active: 0,
            prefetch_bytes_active: 0,
        }
    }

    /// Lets a group ask, until it is cancelled.
    pub fn open(&mut self, group: Group) {
        self.open.entry(group).or_default();
    }

    /// Asks for a chunk.
    pub fn submit(
        &mut self,
        source: ChunkSource,
        priority: Priority,
        group: Group,
        waiter: W,
    ) -> Submitted<W> {
        let Some(waiting) = self.open.get_mut(&group) else {
            return Submitted::Cancelled(waiter);
        };
        let Some(flight) = self.flights.get_mut(&source.chunk) else {
            *waiting += 1;
            let demanded = priority == Priority::Demand && group != ALONG;
            let waiters = vec![(group, waiter)];
            let state = FlightState::Queued(priority);
            self.flights.insert(
                source.chunk,
                Flight {
                    source,
                    state,
                    demanded,
                    waiters,
                },
            );
            self.enqueue(source.chunk, priority);
            return Submitted::Queued;
        };
        if let FlightState::Delivered(bytes) = &flight.state {
            return Submitted::Here(waiter, bytes.clone());
        }
        *waiting += 1;
        flight.waiters.push((group, waiter));
        if priority == Priority::Demand && group != ALONG {
            flight.demanded = true;
            if matches!(flight.state, FlightState::Queued(Priority::Prefetch)) {
                flight.state = FlightState::Queued(Priority::Demand);
                self.demand.push_back(source.chunk);
                return Submitted::Promoted;
            }
        }
        Submitted::Joined
    }

    fn enqueue(&mut self, chunk: Digest, priority: Priority) {
        match priority {
            Priority::Demand => self.demand.push_back(chunk),
            Priority::Prefetch => self.prefetch.push_back(chunk),
        }
    }

    /// The next request to start, if any may start now.
    pub fn next_request(&mut self) -> Option<RangeRequest> {
        if self.demand_active < self.limits.demand_requests
            && let Some(request) = self.take(Priority::Demand)
        {
            self.demand_active += 1;
            return Some(request);
        }
        if !self.prefetch_has_room() {
            return None;
        }
        let request = self.take(Priority::Prefetch)?;
        self.prefetch_active += 1;
        self.prefetch_bytes_active += request.extent.len;
        Some(request)
    }

    /// While demand is in flight prefetch keeps to a quarter of its limits, so that most
    /// of the bandwidth is demand's but a stream of demands does not starve prefetch.
    fn prefetch_has_room(&self) -> bool {
        let share = if self.demand_active > 0 || !self.demand.is_empty() {
            4
        } else {
            1
        };
        let requests = (self.limits.prefetch_requests / share).max(1);
        let bytes = self.limits.prefetch_bytes / share as u64;
        self.prefetch_active < requests
            && (self.prefetch_active == 0 || self.prefetch_bytes_active < bytes)
    }

    fn is_queued(&self, chunk: &Digest, priority: Priority) -> Option<ChunkSource> {
        let flight = self.flights.get(chunk)?;
        let queued = matches!(flight.state, FlightState::Queued(queued) if queued == priority);
        queued.then_some(flight.source)
    }

    fn take(&mut self, priority: Priority) -> Option<RangeRequest> {
        let head = loop {
            let chunk = match priority {
                Priority::Demand => self.demand.pop_front()?,
                Priority::Prefetch => self.prefetch.pop_front()?,
            };
            // Promoted, cancelled or already taken as a neighbour: nothing left to do.
            if let Some(source) = self.is_queued(&chunk, priority) {
                break source;
            }
        };
        let parts = self.neighbours(head, priority);
        for part in &parts {
            if let Some(flight) = self.flights.get_mut(&part.chunk) {
                flight.state = FlightState::InFlight;
            }
        }
        let start = parts.first().map_or(0, |part| u64::from(part.offset));
        let end = parts.iter().map(ChunkSource::end).max().unwrap_or(start);
        Some(RangeRequest {
            pack: head.pack,
            extent: Extent::new(start, end - start),
            parts,
            priority,
        })
    }

    /// The head and those queued chunks near it in its pack that fit into one request.
    fn neighbours(&self, head: ChunkSource, priority: Priority) -> Vec<ChunkSource> {
        let queue = match priority {
            Priority::Demand => &self.demand,
            Priority::Prefetch => &self.prefetch,
        };
        let mut near: Vec<ChunkSource> = queue
            .iter()
            .take(LOOK_AHEAD)
            .filter_map(|chunk| self.is_queued(chunk, priority))
            .filter(|source| source.pack == head.pack && source.chunk != head.chunk)
            .collect();
        near.push(head);
        near.sort_unstable_by_key(|source| (source.offset, source.chunk));
        near.dedup_by_key(|source| source.chunk);
        let at = near
            .iter()
            .position(|source| source.chunk == head.chunk)
            .unwrap_or(0);
        let (mut first, mut last) = (at, at);
        let gap = |a: &ChunkSource, b: &ChunkSource| u64::from(b.offset).saturating_sub(a.end());
        loop {
            let fits = |first: usize, last: usize| {
                near[last].end() - u64::from(near[first].offset) <= self.limits.request_bytes
            };
            let after = last + 1 < near.len()
                && gap(&near[last], &near[last + 1]) <= self.limits.gap_bytes
                && fits(first, last + 1);
            let before = first > 0
                && gap(&near[first - 1], &near[first]) <= self.limits.gap_bytes
                && fits(first - 1, last);
            match (after, before) {
                (true, _) => last += 1,
                (false, true) => first -= 1,
                (false, false) => return near[first..=last].to_vec(),
            }
        }
    }

    /// Gives a request's slot back.
    pub fn request_ended(&mut self, request: &RangeRequest) {
        match request.priority {
            Priority::Demand => self.demand_active -= 1,
            Priority::Prefetch => {
                self.prefetch_active -= 1;
                self.prefetch_bytes_active -= request.extent.len;
            }
        }
    }

    /// A chunk has arrived: hands out its waiters. Later submissions are answered at once
    /// until [`Queue::finished`].
    pub fn delivered(&mut self, chunk: Digest, bytes: Bytes) -> Vec<W> {
        let Some(flight) = self.flights.get_mut(&chunk) else {
            return Vec::new();
        };
        flight.state = FlightState::Delivered(bytes);
        let waiters = std::mem::take(&mut flight.waiters);
        self.hand_out(waiters)
    }

    fn hand_out(&mut self, waiters: Vec<(Group, W)>) -> Vec<W> {
        let handed_out = waiters.into_iter().map(|(group, waiter)| {
            if let Some(waiting) = self.open.get_mut(&group) {
                *waiting -= 1;
            }
            waiter
        });
        handed_out.collect()
    }

    /// The chunk can be found elsewhere from now on.
    pub fn finished(&mut self, chunk: Digest) {
        self.flights.remove(&chunk);
    }

    /// A chunk cannot be fetched: hands out its waiters.
    pub fn failed(&mut self, chunk: Digest) -> Vec<W> {
        let flight = self.flights.remove(&chunk);
        flight.map_or_else(Vec::new, |flight| self.hand_out(flight.waiters))
    }

    /// A request for one chunk that is in flight already, outside the queue's order.
    pub fn alone(&mut self, source: ChunkSource) -> RangeRequest {
        self.demand_active += 1;
        let extent = Extent::new(u64::from(source.offset), u64::from(source.stored_bytes));
        RangeRequest {
            pack: source.pack,
            extent,
            parts: vec![source],
            priority: Priority::Demand,
        }
    }

    /// True if a demand waits for the chunk.
    pub fn is_demanded(&self, chunk: Digest) -> bool {
        self.flights
            .get(&chunk)
            .is_some_and(|flight| flight.demanded)
    }

    /// Closes groups and hands out their waiters. Flights that have not started and that
    /// nobody waits for any more are forgotten; those in flight end by themselves.
    pub fn cancel(&mut self, groups: &[Group]) -> Vec<W> {
        let mut waiting = 0;
        for group in groups {
            waiting += self.open.remove(group).unwrap_or(0);
        }
        let mut cancelled = Vec::with_capacity(waiting);
        if waiting == 0 {
            return cancelled;
        }
        let groups: HashSet<&Group> = groups.iter().collect();
        self.flights.retain(|_, flight| {
            let gone = flight
                .waiters
                .extract_if(.., |(group, _)| groups.contains(group));
            cancelled.extend(gone.map(|(_, waiter)| waiter));
            !flight.waiters.is_empty() || !matches!(flight.state, FlightState::Queued(_))
        });
        cancelled
    }

    /// Requests in flight: demand and prefetch.
    pub fn active(&self) -> (usize, usize) {
        (self.demand_active, self.prefetch_active)
    }

    /// Chunks that have not started.
    #[cfg(test)]
    pub fn queued(&self) -> usize {
        self.flights
            .values()
            .filter(|flight| matches!(flight.state, FlightState::Queued(_)))
            .count()
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
