//! The queue of prefetches: those that wait and those under way.
//!
//! The only one: what waits, in which order, how many bytes are under way at a time, and
//! when nothing starts, is decided here and by the planner. The store starts at once what it
//! is handed. Refuses to know whether a prefetch is worth it.
//!
//! ```text
//!            push                pop, start             ended
//!   (none) --------> waiting -----------------> under way ------> (none)
//!                      ^                          |    | cancel
//!                      +---- deferred until ------+    v
//!                            its end            cancelled ------> (none)
//! ```
//! Invariants: a request is either waiting, deferred or under way; fetches under way do not
//! overlap; a cancelled fetch counts as under way until it has ended; what forecasts want
//! again costs nothing for what waits on others' behalf.

use std::collections::{BTreeMap, BTreeSet};

use forelay_image::{Digest, Extent};

use crate::names::{Domain, ProfileName, SharedImage, VmName};

use super::decisions::FetchId;

/// What a forecast is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ForecastKey {
    /// The next launch of a profile.
    Launch(Domain, ProfileName),
    /// That a running VM will be given an image.
    Attach(VmName, Digest),
}

/// On whose behalf bytes are fetched.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Requester {
    /// A launch that was asked for.
    Launch(VmName),
    /// A forecast.
    Forecast(ForecastKey),
}

/// Why a prefetch is made; launches go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum PrefetchClass {
    /// A launch was asked for and will touch it soon.
    Launch,
    /// It is forecast.
    Forecast,
}

/// Order in which prefetches start: smaller is sooner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Urgency {
    pub(super) class: PrefetchClass,
    /// Within the class: expected first touch (launch) or worth (forecast).
    pub(super) order: u64,
}

/// One prefetch.
#[derive(Clone, Debug)]
pub(super) struct PrefetchRequest {
    pub(super) image: SharedImage,
    pub(super) image_bytes: u64,
    pub(super) extent: Extent,
    pub(super) urgency: Urgency,
    pub(super) requester: Requester,
    /// What is worth less than this, in seconds per byte, may go for it.
    pub(super) displaces_below: f64,
    pub(super) pin: bool,
}

/// A fetch that was started.
#[derive(Clone, Debug)]
pub(super) struct UnderWay {
    pub(super) request: PrefetchRequest,
    pub(super) cancelled: bool,
    /// Requests for bytes of it, to be looked at when it has ended.
    deferred: Vec<PrefetchRequest>,
}

/// Place of a waiting request.
type Turn = (Urgency, u64);

/// Waiting requests by urgency, and fetches under way by place.
#[derive(Clone, Debug, Default)]
pub(super) struct PrefetchQueue {
    waiting: BTreeMap<Turn, PrefetchRequest>,
    waiting_bytes: u64,
    /// The turns of what waits, by requester.
    by_requester: BTreeMap<Requester, BTreeSet<Turn>>,
    under_way: BTreeMap<FetchId, UnderWay>,
    /// Fetches under way by image and offset.
    by_place: BTreeMap<(SharedImage, u64), FetchId>,
    under_way_bytes: u64,
    next_turn: u64,
    next_id: u64,
}

impl PrefetchQueue {
    pub(super) fn push(&mut self, request: PrefetchRequest) {
        self.next_turn += 1;
        self.wait((request.urgency, self.next_turn), request);
    }

    fn wait(&mut self, turn: Turn, request: PrefetchRequest) {
        self.waiting_bytes += request.extent.len;
        match self.by_requester.get_mut(&request.requester) {
            Some(turns) => {
                turns.insert(turn);
            }
            None => {
                let turns = BTreeSet::from([turn]);
                self.by_requester.insert(request.requester.clone(), turns);
            }
        }
        if let Some(replaced) = self.waiting.insert(turn, request) {
            self.waiting_bytes -= replaced.extent.len;
        }
    }

    /// The most urgent waiting request.
    pub(super) fn pop(&mut self) -> Option<PrefetchRequest> {
        let (turn, request) = self.waiting.pop_first()?;
        self.waiting_bytes -= request.extent.len;
        if let Some(turns) = self.by_requester.get_mut(&request.requester) {
            turns.remove(&turn);
            if turns.is_empty() {
                self.by_requester.remove(&request.requester);
            }
        }
        Some(request)
    }

    /// Puts a request back before all others of its urgency.
    pub(super) fn unpop(&mut self, request: PrefetchRequest) {
        self.wait((request.urgency, 0), request);
    }

    pub(super) fn first_class(&self) -> Option<PrefetchClass> {
        let first = self.waiting.first_key_value();
        first.map(|((urgency, _), _)| urgency.class)
    }

    /// Drops waiting requests of a class.
    pub(super) fn drop_class(&mut self, class: PrefetchClass) {
        let stays = |(urgency, _): &Turn| urgency.class != class;
        self.waiting.retain(|turn, _| stays(turn));
        self.by_requester.retain(|_, turns| {
            turns.retain(stays);
            !turns.is_empty()
        });
        let waiting = self.waiting.values();
        self.waiting_bytes = waiting.map(|request| request.extent.len).sum();
    }

    /// Drops what waits on behalf of `requester`.
    pub(super) fn drop_requester(&mut self, requester: &Requester) {
        for turn in self.by_requester.remove(requester).unwrap_or_default() {
            if let Some(request) = self.waiting.remove(&turn) {
                self.waiting_bytes -= request.extent.len;
            }
        }
        for fetch in self.under_way.values_mut() {
            fetch.deferred.retain(|one| one.requester != *requester);
        }
    }

    /// Notes that a request's bytes are being fetched from now on.
    pub(super) fn start(&mut self, request: PrefetchRequest) -> FetchId {
        self.next_id += 1;
        let id = FetchId(self.next_id);
        self.under_way_bytes += request.extent.len;
        let place = (request.image.clone(), request.extent.offset);
        self.by_place.insert(place, id);
        let fetch = UnderWay {
            request,
            cancelled: false,
            deferred: Vec::new(),
        };
        self.under_way.insert(id, fetch);
        id
    }

    /// The last fetch under way that has bytes of `extent`.
    pub(super) fn overlapping(&self, image: &SharedImage, extent: Extent) -> Option<FetchId> {
        let before = (image.clone(), 0)..(image.clone(), extent.end());
        let (_, id) = self.by_place.range(before).next_back()?;
        let end = self.under_way.get(id)?.request.extent.end();
        (end > extent.offset).then_some(*id)
    }

    pub(super) fn is_cancelled(&self, id: FetchId) -> bool {
        self.under_way.get(&id).is_some_and(|fetch| fetch.cancelled)
    }

    /// Looks at a request again when this fetch has ended.
    pub(super) fn defer(&mut self, id: FetchId, request: PrefetchRequest) {
        match self.under_way.get_mut(&id) {
            Some(fetch) => fetch.deferred.push(request),
            None => self.push(request),
        }
    }

    /// Cancels the fetches for which `unwanted` holds and that were not cancelled before.
    pub(super) fn cancel(
        &mut self,
        unwanted: impl Fn(&PrefetchRequest) -> bool,
    ) -> Vec<(FetchId, PrefetchRequest)> {
        let mut cancelled = Vec::new();
        for (id, fetch) in &mut self.under_way {
            if !fetch.cancelled && unwanted(&fetch.request) {
                fetch.cancelled = true;
                cancelled.push((*id, fetch.request.clone()));
            }
        }
        cancelled
    }

    /// Cancels the fetches of an image that lie within `extent`.
    pub(super) fn cancel_within(&mut self, image: &SharedImage, extent: Extent) -> Vec<FetchId> {
        let within = (image.clone(), extent.offset)..(image.clone(), extent.end());
        let ids: Vec<FetchId> = self.by_place.range(within).map(|(_, id)| *id).collect();
        let mut cancelled = Vec::new();
        for id in ids {
            if let Some(fetch) = self.under_way.get_mut(&id)
                && !fetch.cancelled
                && fetch.request.extent.end() <= extent.end()
            {
                fetch.cancelled = true;
                cancelled.push(id);
            }
        }
        cancelled
    }

    /// A fetch has ended; what was deferred until then waits again.
    pub(super) fn ended(&mut self, id: FetchId) -> Option<UnderWay> {
        let mut fetch = self.under_way.remove(&id)?;
        let request = &fetch.request;
        self.under_way_bytes -= request.extent.len;
        let place = (request.image.clone(), request.extent.offset);
        self.by_place.remove(&place);
        for request in std::mem::take(&mut fetch.deferred) {
            self.push(request);
        }
        Some(fetch)
    }

    /// Bytes of fetches that have not ended.
    pub(super) const fn under_way_bytes(&self) -> u64 {
        self.under_way_bytes
    }

    /// Bytes of the first requests that may displace whatever is worth less than `below`, but
    /// no more than `most`.
    pub(super) fn waiting_bytes_above(&self, below: f64, most: u64) -> u64 {
        let first = self.waiting.values();
        let mut bytes = 0;
        for request in first.take_while(|request| request.displaces_below >= below) {
            bytes += request.extent.len;
            if bytes >= most {
                return most;
            }
        }
        bytes
    }

    pub(super) const fn waiting_bytes(&self) -> u64 {
        self.waiting_bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(requester: u8, order: u64, class: PrefetchClass) -> PrefetchRequest {
        let name = format!("p{requester}");
        let domain = Domain::from("d");
        let key = ForecastKey::Launch(domain.clone(), name.as_str().into());
        let requester = match class {
            PrefetchClass::Launch => Requester::Launch(name.into()),
            PrefetchClass::Forecast => Requester::Forecast(key),
        };
        PrefetchRequest {
            image: SharedImage::new(domain, Digest::of(b"image")),
            image_bytes: 1 << 20,
            extent: Extent::new(order * 4096, 4096 * (1 + order)),
            urgency: Urgency { class, order },
            requester,
            displaces_below: 1.0,
            pin: false,
        }
    }

    proptest! {
        /// What waits is what a plain list would hold, and the sums are its sums.
        #[test]
        fn the_queue_is_a_sorted_list(steps in prop::collection::vec((0..8u8, 0..4u8, 0..5u64), 0..60)) {
            let mut queue = PrefetchQueue::default();
            let mut plain: Vec<(Turn, PrefetchRequest)> = Vec::new();
            let mut next = 0;
            for (step, reason, order) in steps {
                let class = if reason == 0 { PrefetchClass::Launch } else { PrefetchClass::Forecast };
                match step {
                    0..=3 => {
                        next += 1;
                        let piece = request(reason, order, class);
                        plain.push(((piece.urgency, next), piece.clone()));
                        queue.push(piece);
                    }
                    4 | 5 => {
                        plain.sort_by_key(|(turn, _)| *turn);
                        let first = (!plain.is_empty()).then(|| plain.remove(0).1);
                        let popped = queue.pop();
                        prop_assert_eq!(popped.as_ref().map(|one| one.extent), first.as_ref().map(|one| one.extent));
                        if let Some(piece) = popped.filter(|_| step == 5) {
                            plain.push(((piece.urgency, 0), piece.clone()));
                            queue.unpop(piece);
                        }
                    }
                    6 => {
                        let requester = request(reason, order, class).requester;
                        plain.retain(|(_, one)| one.requester != requester);
                        queue.drop_requester(&requester);
                    }
                    _ => {
                        plain.retain(|(turn, _)| turn.0.class != class);
                        queue.drop_class(class);
                    }
                }
                let bytes: u64 = plain.iter().map(|(_, one)| one.extent.len).sum();
                prop_assert_eq!(queue.waiting_bytes(), bytes);
                prop_assert_eq!(queue.waiting.len(), plain.len());
                let turns: usize = queue.by_requester.values().map(BTreeSet::len).sum();
                prop_assert_eq!(turns, plain.len());
                prop_assert!(queue.by_requester.values().all(|turns| !turns.is_empty()));
            }
        }
    }
}
