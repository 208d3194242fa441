//! The forecast policy: what is least likely to be needed soon, per second of load time
//! and byte, leaves first; and, if asked to, what is likelier comes back before it is
//! requested.
//!
//! Value of an object = E[2^(-time to next use / half-life)] x load time / size. The
//! expectation is learned online: features of known objects are sampled now, their
//! outcome is known when the object is requested or the window has passed, and boosted
//! trees ([`super::trees`]) are refitted now and then on the samples so far. This is
//! relaxed Belady learning (Song et al., NSDI 2020) with a discounted outcome instead of
//! a log distance. Until the first fit, [`super::s3_fifo`] decides.
//!
//! Invariants: decisions depend on past requests alone; scores are refreshed at the
//! latest when an object's age has grown by an eighth; a prefetch only ever replaces what
//! is worth clearly less, within the same memory.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::history::{FEATURES, History};
use super::ranked::Ranked;
use super::s3_fifo::S3Fifo;
use super::trees::{FitSettings, Samples, Trees};
use super::{Policy, Request};

/// Settings of the forecast policy; one set serves all traces and sizes.
#[derive(Clone, Copy, Debug)]
pub struct ForecastConfig {
    /// A use this much later counts half, in milliseconds.
    pub half_life_ms: i64,
    /// After this long without a request a sample's outcome is "not needed".
    pub window_ms: i64,
    /// Samples that are remembered.
    pub most_samples: usize,
    /// Samples after which the first model is fitted.
    pub first_fit_samples: u64,
    /// A model is refitted when this many more samples are complete.
    pub refit_samples: u64,
    /// How models are fitted.
    pub fit: FitSettings,
    /// Whether objects come back before they are requested.
    pub prefetch: bool,
    /// A prefetched object must be worth this many times what it replaces.
    pub displace_factor: f64,
    /// Objects not requested for so long are not prefetched, in milliseconds.
    pub forget_ms: i64,
}

impl Default for ForecastConfig {
    fn default() -> Self {
        Self {
            half_life_ms: 120 * 60_000,
            window_ms: 10 * 3_600_000,
            most_samples: 300_000,
            first_fit_samples: 4_000,
            refit_samples: 16_000,
            fit: FitSettings {
                trees: 50,
                depth: 5,
                rate: 0.14,
                shrink: 10.0,
                row_stride: 3,
                feature_share: 0.6,
            },
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
    /// Expected discounted use, as last scored.
    need: f64,
}

/// A sample whose outcome is not known yet.
#[derive(Clone, Debug)]
struct Open {
    object: u32,
    at_ms: i64,
    features: [f32; FEATURES],
}

/// The policy of the module's header.
#[derive(Clone, Debug)]
pub struct Forecast {
    config: ForecastConfig,
    history: History,
    /// Rank: bits of the value, which is not negative.
    held: Ranked<u64>,
    known: HashMap<u32, Known>,
    due: BTreeSet<(i64, u32)>,
    members: Vec<u32>,
    member_at: HashMap<u32, usize>,
    fallback: S3Fifo,
    model: Option<Trees>,
    open: HashMap<u64, Open>,
    open_by_object: HashMap<u32, Vec<u64>>,
    open_order: VecDeque<(i64, u64)>,
    samples: Samples,
    sampled: u64,
    complete: u64,
    next_fit: u64,
    expired: u64,
    /// When samples were last taken: one a moment, however many objects a launch asks for.
    sampled_ms: i64,
    random: u64,
    prefetched_bytes: u64,
    prefetched_s: f64,
}

impl Forecast {
    /// An empty memory of `capacity_bytes`.
    pub fn new(capacity_bytes: u64, config: ForecastConfig) -> Self {
        Self {
            config,
            history: History::default(),
            held: Ranked::new(capacity_bytes),
            known: HashMap::new(),
            due: BTreeSet::new(),
            members: Vec::new(),
            member_at: HashMap::new(),
            fallback: S3Fifo::new(capacity_bytes),
            model: None,
            open: HashMap::new(),
            open_by_object: HashMap::new(),
            open_order: VecDeque::new(),
            samples: Samples::default(),
            sampled: 0,
            complete: 0,
            next_fit: config.first_fit_samples,
            expired: 0,
            sampled_ms: i64::MIN,
            random: 0x2545_f491_4f6c_dd1d,
            prefetched_bytes: 0,
            prefetched_s: 0.0,
        }
    }

    /// Bytes brought in before they were requested.
    pub const fn prefetched_bytes(&self) -> u64 {
        self.prefetched_bytes
    }

    /// Load time of what was brought in before it was requested, in seconds.
    pub const fn prefetched_s(&self) -> f64 {
        self.prefetched_s
    }

    /// A forecast from elsewhere: the expected discounted use of an object, valid until
    /// its score is due again.
    pub fn forecast(&mut self, object: u32, need: f64) {
        if let Some(known) = self.known.get_mut(&object) {
            known.need = if need.is_finite() {
                need.clamp(0.0, 1.0)
            } else {
                0.0
            };
            let rank = rank(known);
            self.held.set_rank(object, rank);
        }
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    // ---- learning --------------------------------------------------------------

    /// Outcomes that the request decides, and those that the window does.
    fn close_samples(&mut self, object: u32, now_ms: i64) {
        for id in self.open_by_object.remove(&object).unwrap_or_default() {
            if let Some(open) = self.open.remove(&id) {
                let late = (now_ms - open.at_ms).max(0) as f64 / self.config.half_life_ms as f64;
                self.complete(&open.features, (-late).exp2() as f32);
            }
        }
        while let Some(&(at_ms, id)) = self.open_order.front() {
            if at_ms + self.config.window_ms > now_ms {
                break;
            }
            self.open_order.pop_front();
            if let Some(open) = self.open.remove(&id) {
                self.expired += 1;
                self.complete(&open.features, 0.0);
                if let Some(ids) = self.open_by_object.get_mut(&open.object) {
                    ids.retain(|other| *other != id);
                }
            }
        }
    }

    fn complete(&mut self, features: &[f32; FEATURES], outcome: f32) {
        self.complete += 1;
        self.samples
            .add(features, outcome, self.config.most_samples);
    }

    fn sample(&mut self, object: u32, now_ms: i64) {
        let Some(features) = self.history.features(object, now_ms) else {
            return;
        };
        self.sampled += 1;
        let id = self.sampled;
        self.open.insert(
            id,
            Open {
                object,
                at_ms: now_ms,
                features,
            },
        );
        self.open_by_object.entry(object).or_default().push(id);
        self.open_order.push_back((now_ms, id));
    }

    fn take_samples(&mut self, now_ms: i64) {
        if self.members.is_empty() || self.sampled_ms == now_ms {
            return;
        }
        self.sampled_ms = now_ms;
        let at = self.random() as usize % self.members.len();
        self.sample(self.members[at], now_ms);
        if self.config.prefetch {
            // What may be prefetched must be among what is learned from.
            let pick = self.random() as u32;
            let known = self.known.len() as u32;
            self.sample(pick % known.max(1), now_ms);
        }
    }

    fn fit_if_due(&mut self, now_ms: i64) {
        // Outcomes of "not needed" come last: without them everything looks needed.
        if self.complete < self.next_fit || self.expired < self.config.first_fit_samples / 8 {
            return;
        }
        self.next_fit = self.complete + (self.complete / 3).min(self.config.refit_samples);
        self.model = Trees::fit(&self.samples, &self.config.fit);
        let objects = self.members.clone();
        for object in objects {
            self.score(object, now_ms);
        }
    }

    // ---- scoring ---------------------------------------------------------------

    fn score(&mut self, object: u32, now_ms: i64) {
        let Some(model) = &self.model else { return };
        let Some(features) = self.history.features(object, now_ms) else {
            return;
        };
        let Some(known) = self.known.get_mut(&object) else {
            return;
        };
        known.need = f64::from(model.score(&features)).clamp(1e-4, 1.0);
        let age_ms = self.history.age_s(object, now_ms).unwrap_or(0.0) * 1e3;
        self.due.remove(&(known.due_ms, object));
        known.due_ms = now_ms + (age_ms as i64 / 8).max(20_000);
        self.due.insert((known.due_ms, object));
        let rank = rank(known);
        self.held.set_rank(object, rank);
    }

    fn refresh(&mut self, now_ms: i64) {
        while let Some(&(due_ms, object)) = self.due.first() {
            if due_ms > now_ms {
                return;
            }
            let held = self.held.contains(object);
            let age_ms = self.history.age_s(object, now_ms).unwrap_or(0.0) * 1e3;
            if !held && (!self.config.prefetch || age_ms as i64 > self.config.forget_ms) {
                self.due.pop_first();
                continue;
            }
            self.score(object, now_ms);
            if !held {
                self.prefetch(object);
            }
        }
    }

    /// Brings an object back if what must leave for it is worth clearly less.
    fn prefetch(&mut self, object: u32) {
        let Some(&known) = self.known.get(&object) else {
            return;
        };
        let worth = value(&known);
        let most = (worth / self.config.displace_factor).to_bits();
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
        self.prefetched_s += known.load_s;
    }

    // ---- holding ---------------------------------------------------------------

    fn insert(&mut self, object: u32, known: &Known) {
        self.held.insert(object, rank(known), known.bytes);
        self.member_at.insert(object, self.members.len());
        self.members.push(object);
    }

    fn make_room(&mut self, bytes: u64) {
        while !self.held.fits(bytes) {
            if self.model.is_none() {
                self.rank_like_fallback();
            }
            let Some((_, object)) = self.held.pop() else {
                return;
            };
            if let Some(at) = self.member_at.remove(&object) {
                self.members.swap_remove(at);
                if let Some(&moved) = self.members.get(at) {
                    self.member_at.insert(moved, at);
                }
            }
        }
    }

    /// Puts an object that S3-FIFO has dropped to the front of those to leave.
    fn rank_like_fallback(&mut self) {
        let dropped = self
            .members
            .iter()
            .copied()
            .find(|&o| !self.fallback.contains(o));
        if let Some(object) = dropped {
            self.held.set_rank(object, 0);
        }
    }
}

fn value(known: &Known) -> f64 {
    known.need * known.load_s.max(0.0) / known.bytes.max(1) as f64
}

fn rank(known: &Known) -> u64 {
    value(known).to_bits()
}

impl Policy for Forecast {
    fn name(&self) -> &'static str {
        if self.config.prefetch {
            "forecast+prefetch"
        } else {
            "forecast"
        }
    }

    fn request(&mut self, request: &Request) -> bool {
        let (object, now_ms) = (request.object, request.now_ms);
        self.close_samples(object, now_ms);
        self.refresh(now_ms);
        self.history.observe(request);
        if self.model.is_none() {
            self.fallback.request(request);
        }
        let known = self.known.entry(object).or_insert(Known {
            bytes: request.bytes,
            load_s: request.load_s,
            due_ms: now_ms,
            need: 1.0,
        });
        known.load_s = request.load_s;
        let hit = self.held.contains(object);
        if !hit && request.bytes <= self.held.capacity_bytes() {
            let known = *known;
            self.make_room(request.bytes);
            self.insert(object, &known);
        }
        self.score(object, now_ms);
        self.take_samples(now_ms);
        self.fit_if_due(now_ms);
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::lru::Lru;

    /// 60 objects requested every 10 minutes in turn, and as many one-off objects.
    fn periodic_with_noise() -> Vec<Request> {
        let mut requests = Vec::new();
        for at in 0..12_000u32 {
            let object = if at % 2 == 0 { at / 2 % 60 } else { 60 + at };
            let owner = u32::from(at % 2 == 0);
            let now_ms = i64::from(at) * 5_000;
            requests.push(Request {
                object,
                owner,
                bytes: 1,
                load_s: 1.0,
                now_ms,
            });
        }
        requests
    }

    fn late_misses(policy: &mut dyn Policy, requests: &[Request]) -> u32 {
        let half = requests.len() / 2;
        let miss = |(at, request): (usize, &Request)| {
            u32::from(!policy.request(request) && at >= half && request.object < 60)
        };
        requests.iter().enumerate().map(miss).sum()
    }

    fn config() -> ForecastConfig {
        let config = ForecastConfig::default();
        ForecastConfig {
            fit: FitSettings {
                trees: 20,
                ..config.fit
            },
            half_life_ms: 600_000,
            window_ms: 3_600_000,
            first_fit_samples: 1_000,
            ..config
        }
    }

    #[test]
    fn it_learns_what_returns_and_what_does_not() {
        let requests = periodic_with_noise();
        let ours = late_misses(&mut Forecast::new(64, config()), &requests);
        let lru = late_misses(&mut Lru::new(64), &requests);
        assert!(lru == 3_000 && ours < 300, "ours {ours}, LRU {lru}");
    }

    #[test]
    fn prefetch_brings_periodic_objects_back_before_they_are_requested() {
        let requests = periodic_with_noise();
        let with = ForecastConfig {
            prefetch: true,
            ..config()
        };
        let mut prefetching = Forecast::new(30, with);
        let without = late_misses(&mut Forecast::new(30, config()), &requests);
        let with = late_misses(&mut prefetching, &requests);
        assert!(with < without, "with {with}, without {without}");
        assert!(prefetching.prefetched_bytes() > 0);
    }
}
