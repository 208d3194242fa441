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
//! by bytes in flight, more tightly while demand is in flight, and can be paused.
//!
//! Refuses to know time, packs' contents and who waits (`W` is opaque).
//!
//! Invariants: a chunk has at most one flight; every waiter is handed out exactly once,
//! by [`Queue::delivered`], [`Queue::failed`] or [`Queue::cancel`].

use std::collections::{HashMap, HashSet, VecDeque};

use bytes::Bytes;
use forelay_image::{Digest, Extent};

use super::Priority;

/// A waiter's group, by which it can be cancelled.
pub type Group = u64;

/// The group of those that cannot be cancelled; always open.
pub const NO_GROUP: Group = 0;

/// Where a chunk comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The image on whose behalf it is fetched.
    pub image: Digest,
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

impl Source {
    fn end(&self) -> u64 {
        u64::from(self.offset) + u64::from(self.stored_bytes)
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
pub struct Request {
    /// The pack.
    pub pack: Digest,
    /// The range of it.
    pub extent: Extent,
    /// The chunks in the range that are wanted, by offset.
    pub parts: Vec<Source>,
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

enum State {
    Queued(Priority),
    InFlight,
    Delivered(Bytes),
}

struct Flight<W> {
    source: Source,
    state: State,
    demanded: bool,
    waiters: Vec<(Group, W)>,
}

/// Flights and the order in which they start.
pub struct Queue<W> {
    limits: Limits,
    flights: HashMap<Digest, Flight<W>>,
    /// Groups that may ask: who asks for one can be a step behind its cancelling.
    open: HashSet<Group>,
    demand: VecDeque<Digest>,
    prefetch: VecDeque<Digest>,
    demand_active: usize,
    prefetch_active: usize,
    prefetch_bytes_active: u64,
    paused: bool,
}

/// How far into the queue a request looks for neighbours.
const LOOK_AHEAD: usize = 512;

impl<W> Queue<W> {
    /// An empty queue.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            flights: HashMap::new(),
            open: HashSet::from([NO_GROUP]),
            demand: VecDeque::new(),
            prefetch: VecDeque::new(),
            demand_active: 0,
            prefetch_active: 0,
            prefetch_bytes_active: 0,
            paused: false,
        }
    }

    /// Lets a group ask, until it is cancelled.
    pub fn open(&mut self, group: Group) {
        self.open.insert(group);
    }

    /// Asks for a chunk.
    pub fn submit(
        &mut self,
        source: Source,
        priority: Priority,
        group: Group,
        waiter: W,
    ) -> Submitted<W> {
        if !self.open.contains(&group) {
            return Submitted::Cancelled(waiter);
        }
        let Some(flight) = self.flights.get_mut(&source.chunk) else {
            let demanded = priority == Priority::Demand;
            let waiters = vec![(group, waiter)];
            let state = State::Queued(priority);
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
        if let State::Delivered(bytes) = &flight.state {
            return Submitted::Here(waiter, bytes.clone());
        }
        flight.waiters.push((group, waiter));
        if priority == Priority::Demand {
            flight.demanded = true;
            if matches!(flight.state, State::Queued(Priority::Prefetch)) {
                flight.state = State::Queued(Priority::Demand);
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

    /// Stops or resumes the start of prefetch requests.
    pub fn pause_prefetch(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// The next request to start, if any may start now; `prefetch_allowed` is the rate
    /// limiter's word.
    pub fn next_request(&mut self, prefetch_allowed: bool) -> Option<Request> {
        if self.demand_active < self.limits.demand_requests
            && let Some(request) = self.take(Priority::Demand)
        {
            self.demand_active += 1;
            return Some(request);
        }
        if !prefetch_allowed || self.paused || !self.prefetch_has_room() {
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

    fn is_queued(&self, chunk: &Digest, priority: Priority) -> Option<Source> {
        let flight = self.flights.get(chunk)?;
        let queued = matches!(flight.state, State::Queued(queued) if queued == priority);
        queued.then_some(flight.source)
    }

    fn take(&mut self, priority: Priority) -> Option<Request> {
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
                flight.state = State::InFlight;
            }
        }
        let start = parts.first().map_or(0, |part| u64::from(part.offset));
        let end = parts.iter().map(Source::end).max().unwrap_or(start);
        Some(Request {
            pack: head.pack,
            extent: Extent::new(start, end - start),
            parts,
            priority,
        })
    }

    /// The head and those queued chunks near it in its pack that fit into one request.
    fn neighbours(&self, head: Source, priority: Priority) -> Vec<Source> {
        let queue = match priority {
            Priority::Demand => &self.demand,
            Priority::Prefetch => &self.prefetch,
        };
        let mut near: Vec<Source> = queue
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
        let gap = |a: &Source, b: &Source| u64::from(b.offset).saturating_sub(a.end());
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
    pub fn request_ended(&mut self, request: &Request) {
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
        flight.state = State::Delivered(bytes);
        flight.waiters.drain(..).map(|(_, waiter)| waiter).collect()
    }

    /// The chunk can be found elsewhere from now on.
    pub fn finished(&mut self, chunk: Digest) {
        self.flights.remove(&chunk);
    }

    /// A chunk cannot be fetched: hands out its waiters.
    pub fn failed(&mut self, chunk: Digest) -> Vec<W> {
        let flight = self.flights.remove(&chunk);
        flight
            .map(|flight| {
                flight
                    .waiters
                    .into_iter()
                    .map(|(_, waiter)| waiter)
                    .collect()
            })
            .unwrap_or_default()
    }

    /// A request for one chunk that is in flight already, outside the queue's order.
    pub fn alone(&mut self, source: Source) -> Request {
        self.demand_active += 1;
        let extent = Extent::new(u64::from(source.offset), u64::from(source.stored_bytes));
        Request {
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

    /// Closes a group: removes its waiters from what has not started, and hands them out.
    /// Flights that nobody waits for any more are forgotten.
    pub fn cancel(&mut self, group: Group) -> Vec<W> {
        self.open.remove(&group);
        let mut cancelled = Vec::new();
        self.flights.retain(|_, flight| {
            if !matches!(flight.state, State::Queued(_)) {
                return true;
            }
            cancelled.extend(
                flight
                    .waiters
                    .extract_if(.., |(of, _)| *of == group)
                    .map(|(_, waiter)| waiter),
            );
            !flight.waiters.is_empty()
        });
        cancelled
    }

    /// Requests in flight: demand and prefetch.
    pub fn active(&self) -> (usize, usize) {
        (self.demand_active, self.prefetch_active)
    }

    /// Chunks that have not started.
    pub fn queued(&self) -> usize {
        self.flights
            .values()
            .filter(|flight| matches!(flight.state, State::Queued(_)))
            .count()
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
