//! Expected reuse: how soon an object is needed again, learned from the requests so far, and a
//! memory managed by it. What is least likely to be needed soon, per second of load time and
//! byte, leaves first; and, if asked to, what is likelier comes back before it is requested.
//!
//! The planner asks for the estimates alone: its memory here is a shadow of the budget, by which
//! samples are taken and the half-life is measured. The simulator judges the whole as a policy.
//!
//! Value of an object = E[2^(-time to next use / half-life)] x load time / size. The
//! expectation is learned online ([`learner`]): features of known objects are sampled now, how
//! long they waited is known when the object is requested, and boosted trees
//! ([`trees`]) are fitted now and then to the samples so far ([`training`]). This is
//! relaxed Belady learning (Song et al., NSDI 2020) with a discounted outcome instead of a log
//! distance.
//!
//! Since what counts is who leaves, samples are taken of what is worth least too, and of what
//! has left: a model that never saw an object grow old overrates what does not return. Until
//! the first fit, and while values do worse, [`s3_fifo`] decides ([`duel`]).
//!
//! Invariants: decisions depend on past requests alone; scores are refreshed at the
//! latest when an object's age has grown by an eighth; a prefetch only ever replaces what
//! is worth clearly less, within the same memory.

mod duel;
mod features;
mod learner;
pub mod ranked;
pub mod s3_fifo;
pub mod training;
pub mod trees;

use std::collections::{BTreeSet, HashMap, VecDeque};

use self::duel::Duel;
use self::learner::Learner;
use self::ranked::Ranked;
use self::training::{FittedReuse, ReuseTraining};
use self::trees::FitSettings;

const HOUR_MS: f64 = 3_600_000.0;

/// One request for an object.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ObjectRequest {
    /// The object, as a small dense number.
    pub object: u32,
    /// Who asks, as a small dense number.
    pub owner: u32,
    /// Size of the object in bytes; 1 for unit slots.
    pub bytes: u64,
    /// What a miss costs, in seconds; 1 for unit slots.
    pub load_s: f64,
    /// When, in milliseconds since the epoch.
    pub now_ms: i64,
}

/// Decides which objects stay in a bounded memory: what the simulator compares.
pub trait EvictionPolicy {
    /// Serves a request; true if the object was held already.
    fn request(&mut self, request: &ObjectRequest) -> bool;
    /// Whether an object is held.
    fn contains(&self, object: u32) -> bool;
    /// Bytes held.
    fn used_bytes(&self) -> u64;
    /// Most bytes that may be held.
    fn capacity_bytes(&self) -> u64;
    /// Bytes brought in before they were requested; most policies never do that.
    fn prefetched_bytes(&self) -> u64 {
        0
    }
}

/// Settings; one set serves all traces and sizes.
#[derive(Clone, Copy, Debug)]
pub struct ReuseSettings {
    /// The half-life before misses have been counted, in milliseconds.
    pub first_half_life_ms: f64,
    /// Shortest and longest half-life, in milliseconds.
    pub half_life_range_ms: (f64, f64),
    /// After so many half-lives without a request a sample's outcome is what is expected then.
    pub window_half_lives: f64,
    /// Objects of which the least valuable is sampled.
    pub contestants: usize,
    /// Samples taken of what has left, at each moment at which samples are taken.
    pub gone_samples: usize,
    /// How many objects that have left are remembered, in objects held.
    pub gone_memories: usize,
    /// Samples that are remembered.
    pub most_samples: usize,
    /// Samples after which the first model is fitted.
    pub first_fit_samples: u64,
    /// A model is refitted when this many more samples are complete.
    pub refit_samples: u64,
    /// How models are fitted.
    pub fit: FitSettings,
    /// Random choices follow from it.
    pub seed: u64,
    /// Whether objects come back before they are requested.
    pub prefetch: bool,
    /// A prefetched object must be worth this many times what it replaces.
    pub displace_factor: f64,
    /// Objects not requested for so long are not prefetched, in milliseconds.
    pub forget_ms: i64,
}

impl Default for ReuseSettings {
    fn default() -> Self {
        Self {
            first_half_life_ms: 2.0 * HOUR_MS,
            half_life_range_ms: (HOUR_MS / 6.0, 24.0 * HOUR_MS),
            window_half_lives: 2.0,
            contestants: 20,
            gone_samples: 2,
            gone_memories: 4,
            most_samples: 600_000,
            first_fit_samples: 6_000,
            refit_samples: 16_000,
            fit: FitSettings {
                trees: 50,
                depth: 5,
                rate: 0.14,
                shrink: 3.0,
                row_stride: 3,
                tree_samples: 25_000,
                feature_share: 0.6,
            },
            seed: 0,
            prefetch: false,
            displace_factor: 1.5,
            forget_ms: 3 * 86_400_000,
        }
    }
}

/// What is known about an object that was requested once.
#[derive(Clone, Copy, Debug)]
struct Known {
    bytes: u64,
    load_s: f64,
    due_ms: i64,
    /// As last scored.
    need: f64,
}

impl Known {
    fn value(&self) -> f64 {
        self.need * self.load_s.max(0.0) / self.bytes.max(1) as f64
    }

    /// Bits of the value, which is not negative.
    fn rank(&self) -> u64 {
        self.value().to_bits()
    }
}

/// The policy of the module's header.
#[derive(Clone, Debug)]
pub struct ReuseMemory {
    config: ReuseSettings,
    learner: Learner,
    held: Ranked<u64>,
    known: HashMap<u32, Known>,
    due: BTreeSet<(i64, u32)>,
    members: Vec<u32>,
    member_at: HashMap<u32, usize>,
    /// What left last, newest last.
    gone: VecDeque<u32>,
    /// Ends with the first fit where objects are prefetched: what is simulated is not.
    duel: Option<Duel>,
    /// When samples were last taken: one a moment, however many objects a launch asks for.
    sampled_ms: i64,
    random: u64,
    prefetched_bytes: u64,
}

impl ReuseMemory {
    /// An empty memory of `capacity_bytes`.
    pub fn new(capacity_bytes: u64, config: ReuseSettings) -> Self {
        Self {
            config,
            learner: Learner::new(config),
            held: Ranked::new(capacity_bytes),
            known: HashMap::new(),
            due: BTreeSet::new(),
            members: Vec::new(),
            member_at: HashMap::new(),
            gone: VecDeque::new(),
            duel: Some(Duel::new(capacity_bytes)),
            sampled_ms: i64::MIN,
            random: 0x2545_f491_4f6c_dd1d ^ config.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            prefetched_bytes: 0,
        }
    }

    /// What is expected of an object's next request: the mean of 2^(-wait / half-life), and
    /// that half-life in milliseconds. `None` before the first fit, and for an object that
    /// was never requested.
    pub fn need(&self, object: u32, now_ms: i64) -> Option<(f64, f64)> {
        let known = self.known.get(&object)?;
        let need = if self.held.contains(object) && self.learner.has_model() {
            // Refreshed often enough; see the module's invariants. The planner asks this of
            // every image while it holds the table.
            known.need
        } else {
            self.learner.need(object, now_ms)?
        };
        Some((need, self.learner.half_life_ms()))
    }

    /// As [`Self::request`], but fits nothing to it: see [`Self::training_set`].
    pub fn observe(&mut self, request: &ObjectRequest) -> bool {
        let (object, now_ms) = (request.object, request.now_ms);
        self.refresh(now_ms);
        let hit = self.held.contains(object);
        let missed_bytes = if hit { 0 } else { request.bytes };
        self.learner.observe(request, missed_bytes);
        let known = self.known.entry(object).or_insert(Known {
            bytes: request.bytes,
            load_s: request.load_s,
            due_ms: now_ms,
            need: 1.0,
        });
        known.load_s = request.load_s;
        let known = *known;
        if let Some(duel) = &mut self.duel {
            duel.request(request, known.rank(), &self.held);
        }
        if !hit && request.bytes <= self.held.capacity_bytes() {
            self.make_room(request.bytes);
            self.insert(object, &known);
        }
        self.score(object, now_ms);
        self.take_samples(now_ms);
        hit
    }

    /// What a model is to be fitted to, once there is enough that was not there the last time.
    /// The fitted model is for [`Self::install`].
    pub fn training_set(&mut self, now_ms: i64) -> Option<ReuseTraining> {
        self.learner.training_set(self.held.used_bytes(), now_ms)
    }

    /// Scores by a fitted model from now on.
    pub fn install(&mut self, fitted: FittedReuse, now_ms: i64) {
        self.learner.install(fitted);
        self.score_all(now_ms);
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// A held object at random; there must be one.
    fn any_member(&mut self) -> u32 {
        let at = self.random() as usize % self.members.len();
        self.members[at]
    }

    fn take_samples(&mut self, now_ms: i64) {
        if self.members.is_empty() || self.sampled_ms == now_ms {
            return;
        }
        self.sampled_ms = now_ms;
        let any = self.any_member();
        self.learner.sample(any, now_ms);
        let contestants = (0..self.config.contestants).map(|_| self.any_member());
        let contestants: Vec<u32> = contestants.collect();
        let need = |object: &u32| self.known.get(object).map_or(0.0, |known| known.need);
        if let Some(least) = contestants
            .into_iter()
            .min_by(|a, b| need(a).total_cmp(&need(b)))
        {
            self.learner.sample(least, now_ms);
        }
        for _ in 0..self.config.gone_samples.min(self.gone.len()) {
            let at = self.random() as usize % self.gone.len();
            let object = self.gone[at];
            if !self.held.contains(object) {
                self.learner.sample(object, now_ms);
            }
        }
        if self.config.prefetch {
            // What may be prefetched must be among what is learned from.
            let pick = self.random() as u32;
            let known = self.known.len() as u32;
            self.learner.sample(pick % known.max(1), now_ms);
        }
    }

    // ---- scoring ---------------------------------------------------------------

    fn score(&mut self, object: u32, now_ms: i64) {
        let Some(need) = self.learner.need(object, now_ms) else {
            return;
        };
        let Some(known) = self.known.get_mut(&object) else {
            return;
        };
        known.need = need;
        self.due.remove(&(known.due_ms, object));
        let age_ms = self.learner.age_ms(object, now_ms);
        known.due_ms = now_ms + (age_ms / 8).max(20_000);
        self.due.insert((known.due_ms, object));
        let rank = known.rank();
        self.held.set_rank(object, rank);
        if let Some(duel) = &mut self.duel {
            duel.set_rank(object, rank);
        }
    }

    /// There is a new model.
    fn score_all(&mut self, now_ms: i64) {
        match &mut self.duel {
            Some(_) if self.config.prefetch => self.duel = None,
            Some(duel) => duel.begin(&self.held),
            None => {}
        }
        let ranked = self.duel.iter().flat_map(Duel::ranked);
        let all: BTreeSet<u32> = self.members.iter().copied().chain(ranked).collect();
        for object in all {
            self.score(object, now_ms);
        }
    }

    fn refresh(&mut self, now_ms: i64) {
        while let Some(&(due_ms, object)) = self.due.first() {
            if due_ms > now_ms {
                return;
            }
            let held = self.held.contains(object);
            let ranked = held || self.duel.as_ref().is_some_and(|duel| duel.ranks(object));
            let forgotten = || self.learner.age_ms(object, now_ms) > self.config.forget_ms;
            if !ranked && (!self.config.prefetch || forgotten()) {
                self.due.pop_first();
                continue;
            }
            self.score(object, now_ms);
            if self.config.prefetch && !held {
                self.prefetch(object);
            }
        }
    }

    /// Brings an object back if what must leave for it is worth clearly less.
    fn prefetch(&mut self, object: u32) {
        let Some(&known) = self.known.get(&object) else {
            return;
        };
        let most = (known.value() / self.config.displace_factor).to_bits();
        if known.need < 0.05 || known.bytes > self.held.capacity_bytes() {
            return;
        }
        let mut lowest = self.held.ascending();
        let mut room = self.held.capacity_bytes() - self.held.used_bytes();
        while room < known.bytes {
            match lowest.next() {
                Some((rank, bytes)) if rank < most => room += bytes,
                _ => return,
            }
        }
        drop(lowest);
        self.make_room(known.bytes);
        self.insert(object, &known);
        self.prefetched_bytes += known.bytes;
    }

    // ---- holding ---------------------------------------------------------------

    fn insert(&mut self, object: u32, known: &Known) {
        self.held.insert(object, known.rank(), known.bytes);
        self.member_at.insert(object, self.members.len());
        self.members.push(object);
    }

    fn make_room(&mut self, bytes: u64) {
        while !self.held.fits(bytes) {
            let lowest = self.held.lowest().map(|(_, object)| object);
            let chosen = self.duel.as_ref().and_then(|duel| duel.victim(&self.held));
            let Some(object) = chosen.or(lowest) else {
                return;
            };
            self.remove(object);
        }
    }

    fn remove(&mut self, object: u32) {
        self.held.remove(object);
        if let Some(duel) = &mut self.duel {
            duel.left(object);
        }
        if let Some(at) = self.member_at.remove(&object) {
            self.members.swap_remove(at);
            if let Some(&moved) = self.members.get(at) {
                self.member_at.insert(moved, at);
            }
        }
        self.gone.push_back(object);
        if self.gone.len() > self.config.gone_memories * self.members.len().max(1) {
            self.gone.pop_front();
        }
    }
}

impl EvictionPolicy for ReuseMemory {
    fn request(&mut self, request: &ObjectRequest) -> bool {
        let hit = self.observe(request);
        if self
            .learner
            .fit_if_due(self.held.used_bytes(), request.now_ms)
        {
            self.score_all(request.now_ms);
        }
        hit
    }

    fn contains(&self, object: u32) -> bool {
        self.held.contains(object)
    }

    fn used_bytes(&self) -> u64 {
        self.held.used_bytes()
    }

    fn capacity_bytes(&self) -> u64 {
        self.held.capacity_bytes()
    }

    fn prefetched_bytes(&self) -> u64 {
        self.prefetched_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 60 objects requested every 10 minutes in turn, and as many one-off objects.
    fn periodic_with_noise() -> Vec<ObjectRequest> {
        let mut requests = Vec::new();
        for at in 0..12_000u32 {
            let object = if at % 2 == 0 { at / 2 % 60 } else { 60 + at };
            let owner = u32::from(at % 2 == 0);
            let now_ms = i64::from(at) * 5_000;
            requests.push(ObjectRequest {
                object,
                owner,
                bytes: 1,
                load_s: 1.0,
                now_ms,
            });
        }
        requests
    }

    /// Of the later half's 3,000 requests for the 60; LRU would miss every one.
    fn late_misses(memory: &mut ReuseMemory, requests: &[ObjectRequest]) -> u32 {
        let half = requests.len() / 2;
        let miss = |(at, request): (usize, &ObjectRequest)| {
            u32::from(!memory.request(request) && at >= half && request.object < 60)
        };
        requests.iter().enumerate().map(miss).sum()
    }

    fn config() -> ReuseSettings {
        let config = ReuseSettings::default();
        ReuseSettings {
            fit: FitSettings {
                trees: 20,
                ..config.fit
            },
            first_half_life_ms: 600_000.0,
            first_fit_samples: 1_000,
            ..config
        }
    }

    #[test]
    fn it_learns_what_returns_and_what_does_not() {
        let requests = periodic_with_noise();
        let misses = late_misses(&mut ReuseMemory::new(64, config()), &requests);
        assert!(misses < 300, "{misses}");
    }

    #[test]
    fn prefetch_brings_periodic_objects_back_before_they_are_requested() {
        let requests = periodic_with_noise();
        let with = ReuseSettings {
            prefetch: true,
            ..config()
        };
        let mut prefetching = ReuseMemory::new(30, with);
        let without = late_misses(&mut ReuseMemory::new(30, config()), &requests);
        let with = late_misses(&mut prefetching, &requests);
        assert!(with < without, "with {with}, without {without}");
        assert!(prefetching.prefetched_bytes() > 0);
    }
}
