//! The forecast policy: what is least likely to be needed soon, per second of load time
//! and byte, leaves first; and, if asked to, what is likelier comes back before it is
//! requested.
//!
//! Value of an object = E[2^(-time to next use / half-life)] x load time / size. The
//! expectation is learned online: features of known objects are sampled now, how long they
//! waited is known when the object is requested or the window has passed, and boosted trees
//! ([`super::trees`]) are refitted now and then on the samples so far. This is relaxed Belady
//! learning (Song et al., NSDI 2020) with a discounted outcome instead of a log distance.
//!
//! What "soon" means follows from the memory: the half-life is the time in which misses would
//! fill it once. Since what counts is who leaves, half of the samples are taken from what is
//! worth least. Until the first fit, [`super::s3_fifo`] decides.
//!
//! Invariants: decisions depend on past requests alone; scores are refreshed at the
//! latest when an object's age has grown by an eighth; a prefetch only ever replaces what
//! is worth clearly less, within the same memory.

use std::collections::{BTreeSet, HashMap, VecDeque};

use super::history::{FEATURES, History};
use super::lesson::{self, Learned, Lesson};
use super::ranked::Ranked;
use super::s3_fifo::S3Fifo;
use super::trees::{FitSettings, Samples, Trees};
use super::{Kind, Policy, Request};

const HOUR_MS: f64 = 3_600_000.0;

/// Misses older than this count half where the half-life is measured, in milliseconds.
const TURNOVER_MEMORY_MS: f64 = 8.0 * HOUR_MS;

/// Settings of the forecast policy; one set serves all traces and sizes.
#[derive(Clone, Copy, Debug)]
pub struct ForecastConfig {
    /// The half-life before misses have been counted, in milliseconds.
    pub first_half_life_ms: f64,
    /// Shortest and longest half-life, in milliseconds.
    pub half_life_range_ms: (f64, f64),
    /// After so many half-lives without a request a sample's outcome is "not needed".
    pub window_half_lives: f64,
    /// Objects of which the least valuable is sampled.
    pub contestants: usize,
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
            first_half_life_ms: 2.0 * HOUR_MS,
            half_life_range_ms: (HOUR_MS / 6.0, 24.0 * HOUR_MS),
            window_half_lives: 4.0,
            contestants: 5,
            most_samples: 300_000,
            first_fit_samples: 12_000,
            refit_samples: 16_000,
            fit: FitSettings {
                trees: 50,
                depth: 5,
                rate: 0.14,
                shrink: 10.0,
                row_stride: 3,
                tree_samples: 25_000,
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

/// How fast the memory turns over: bytes missed and the time in which they were, both decayed.
#[derive(Clone, Copy, Debug, Default)]
struct Turnover {
    missed_bytes: f64,
    elapsed_ms: f64,
    now_ms: i64,
}

impl Turnover {
    fn note(&mut self, missed_bytes: u64, now_ms: i64) {
        let passed_ms = (now_ms - self.now_ms).max(0) as f64;
        let decay = (-passed_ms / TURNOVER_MEMORY_MS).exp2();
        self.now_ms = now_ms;
        self.elapsed_ms = self.elapsed_ms * decay + passed_ms;
        self.missed_bytes = self.missed_bytes * decay + missed_bytes as f64;
    }

    /// The time in which misses fill so many bytes.
    fn fills_in_ms(&self, bytes: u64) -> Option<f64> {
        (self.missed_bytes > 0.0).then(|| bytes as f64 / self.missed_bytes * self.elapsed_ms)
    }
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
    /// Outcome: milliseconds until the request, infinite if the window passed first.
    samples: Samples,
    half_life_ms: f64,
    turnover: Turnover,
    sampled: u64,
    complete: u64,
    next_fit: u64,
    expired: u64,
    /// When samples were last taken: one a moment, however many objects a launch asks for.
    sampled_ms: i64,
    random: u64,
    prefetched_bytes: u64,
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
            half_life_ms: config.first_half_life_ms,
            turnover: Turnover::default(),
            sampled: 0,
            complete: 0,
            next_fit: config.first_fit_samples,
            expired: 0,
            sampled_ms: i64::MIN,
            random: 0x2545_f491_4f6c_dd1d,
            prefetched_bytes: 0,
        }
    }

    /// What is expected of an object's next request: the mean of 2^(-wait / half-life), and
    /// that half-life in milliseconds. `None` before the first fit, and for an object that
    /// was never requested.
    pub fn need(&self, object: u32, now_ms: i64) -> Option<(f64, f64)> {
        let model = self.model.as_ref()?;
        let need = if self.held.contains(object) {
            // Refreshed often enough; see the module's invariants.
            self.known.get(&object)?.need
        } else {
            f64::from(model.score(&self.history.features(object, now_ms)?)).clamp(1e-4, 1.0)
        };
        Some((need, self.half_life_ms))
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// As [`Policy::request`], but learns nothing from it until a [`Self::lesson`] is studied.
    pub fn observe(&mut self, request: &Request) -> bool {
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
        self.turnover
            .note(if hit { 0 } else { request.bytes }, now_ms);
        if !hit && request.bytes <= self.held.capacity_bytes() {
            let known = *known;
            self.make_room(request.bytes);
            self.insert(object, &known);
        }
        self.score(object, now_ms);
        self.take_samples(now_ms);
        hit
    }

    // ---- learning --------------------------------------------------------------

    /// Outcomes that the request decides, and those that the window does.
    fn close_samples(&mut self, object: u32, now_ms: i64) {
        for id in self.open_by_object.remove(&object).unwrap_or_default() {
            if let Some(open) = self.open.remove(&id) {
                self.complete(&open.features, (now_ms - open.at_ms).max(0) as f32);
            }
        }
        while let Some(&(at_ms, id)) = self.open_order.front() {
            if !self.has_waited(at_ms, self.config.window_half_lives, now_ms) {
                break;
            }
            self.open_order.pop_front();
            if let Some(open) = self.open.remove(&id) {
                self.expired += 1;
                self.complete(&open.features, f32::INFINITY);
                if let Some(ids) = self.open_by_object.get_mut(&open.object) {
                    ids.retain(|other| *other != id);
                }
            }
        }
    }

    fn has_waited(&self, since_ms: i64, half_lives: f64, now_ms: i64) -> bool {
        (now_ms - since_ms) as f64 >= half_lives * self.half_life_ms
    }

    fn complete(&mut self, features: &[f32; FEATURES], wait_ms: f32) {
        self.complete += 1;
        self.samples
            .add(features, wait_ms, self.config.most_samples);
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
        self.sample(any, now_ms);
        let contestants = (0..self.config.contestants).map(|_| self.any_member());
        let contestants: Vec<u32> = contestants.collect();
        let need = |object: &u32| self.known.get(object).map_or(0.0, |known| known.need);
        if let Some(least) = contestants
            .into_iter()
            .min_by(|a, b| need(a).total_cmp(&need(b)))
        {
            self.sample(least, now_ms);
        }
        if self.config.prefetch {
            // What may be prefetched must be among what is learned from.
            let pick = self.random() as u32;
            let known = self.known.len() as u32;
            self.sample(pick % known.max(1), now_ms);
        }
    }

    /// What is to be learned, once there is enough that was not there the last time. What it
    /// teaches is for [`Self::adopt`].
    pub fn lesson(&mut self, now_ms: i64) -> Option<Lesson> {
        let fit = self.config.fit;
        self.if_due(now_ms, |samples, half_life_ms| Lesson {
            samples: samples.clone(),
            half_life_ms,
            fit,
        })
    }

    fn if_due<R>(&mut self, now_ms: i64, take: impl FnOnce(&Samples, f64) -> R) -> Option<R> {
        if self.complete < self.next_fit {
            return None;
        }
        // Samples that still wait, but for long, say "not needed" until they know better:
        // without them everything looks needed.
        let complete = self.samples.len();
        for (at_ms, id) in &self.open_order {
            if let Some(open) = self.open.get(id)
                && self.has_waited(*at_ms, self.config.window_half_lives / 2.0, now_ms)
            {
                self.samples.add(&open.features, f32::INFINITY, usize::MAX);
            }
        }
        let waiting = (self.samples.len() - complete) as u64;
        let enough = self.expired + waiting >= self.config.first_fit_samples / 8;
        let later = match enough {
            true => (self.complete / 3).min(self.config.refit_samples),
            false => self.config.first_fit_samples / 8,
        };
        self.next_fit = self.complete + later;
        let taken = enough.then(|| {
            let (least, most) = self.config.half_life_range_ms;
            let fills_in_ms = self.turnover.fills_in_ms(self.held.used_bytes());
            let half_life_ms = fills_in_ms.map_or(self.half_life_ms, |ms| ms.clamp(least, most));
            take(&self.samples, half_life_ms)
        });
        self.samples.truncate::<FEATURES>(complete);
        taken
    }

    /// Scores by what a lesson taught from now on.
    pub fn adopt(&mut self, learned: Learned, now_ms: i64) {
        self.half_life_ms = learned.half_life_ms;
        self.model = learned.model;
        for object in self.members.clone() {
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
            Kind::ForecastPrefetch.name()
        } else {
            Kind::Forecast.name()
        }
    }

    fn request(&mut self, request: &Request) -> bool {
        let hit = self.observe(request);
        let fit = self.config.fit;
        let learned = self.if_due(request.now_ms, |samples, half_life_ms| {
            lesson::study(samples, half_life_ms, &fit)
        });
        if let Some(learned) = learned {
            self.adopt(learned, request.now_ms);
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
            first_half_life_ms: 600_000.0,
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
