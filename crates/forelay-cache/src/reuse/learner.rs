//! What the forecast policy learns: how needed an object is, E[2^(-time to next use /
//! half-life)], from samples of what was known about objects and how long they then waited.
//!
//! Owns the past of objects and the model; refuses to know what is held, but for its bytes.
//! What "soon" means follows from the memory: the half-life is the time in which misses would
//! fill it once.
//!
//! Invariant: what is said at a time depends on requests up to then alone.

use std::collections::{HashMap, VecDeque};

use super::features::{FEATURES, RequestHistory};
use super::training::{FitInput, FittedReuse, Outcome, ReuseTraining, Samples, WaitingSamples};
use super::trees::Trees;
use super::{HOUR_MS, ObjectRequest, ReuseSettings};

/// Misses older than this count half where the half-life is measured, in milliseconds.
const TURNOVER_MEMORY_MS: f64 = 8.0 * HOUR_MS;

/// A sample that has waited for less than this many half-lives says nothing yet.
const LEAST_WAIT_HALF_LIVES: f64 = 0.25;

/// Least and most that is expected.
const NEED: (f64, f64) = (1e-4, 1.0);

/// FitInput fast the memory turns over: bytes missed and the time in which they were, both decayed.
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

/// See the module's header.
#[derive(Clone, Debug)]
pub(super) struct Learner {
    config: ReuseSettings,
    history: RequestHistory,
    model: Option<Trees>,
    half_life_ms: f64,
    turnover: Turnover,
    open: HashMap<u64, Open>,
    open_by_object: HashMap<u32, Vec<u64>>,
    open_order: VecDeque<(i64, u64)>,
    samples: Samples,
    sampled: u64,
    complete: u64,
    next_fit: u64,
    given_up: u64,
}

impl Learner {
    pub(super) fn new(config: ReuseSettings) -> Self {
        Self {
            config,
            history: RequestHistory::default(),
            model: None,
            half_life_ms: config.first_half_life_ms,
            turnover: Turnover::default(),
            open: HashMap::new(),
            open_by_object: HashMap::new(),
            open_order: VecDeque::new(),
            samples: Samples::default(),
            sampled: 0,
            complete: 0,
            next_fit: config.first_fit_samples,
            given_up: 0,
        }
    }

    /// In milliseconds.
    pub(super) const fn half_life_ms(&self) -> f64 {
        self.half_life_ms
    }

    /// Whether anything was learned yet.
    pub(super) const fn has_model(&self) -> bool {
        self.model.is_some()
    }

    /// Milliseconds since the object's last request, zero if there was none.
    pub(super) fn age_ms(&self, object: u32, now_ms: i64) -> i64 {
        (self.history.age_s(object, now_ms).unwrap_or(0.0) * 1e3) as i64
    }

    /// FitInput needed an object is. Nothing before the first fit, and for an object that was
    /// never requested.
    pub(super) fn need(&self, object: u32, now_ms: i64) -> Option<f64> {
        let need = self.score(object, now_ms)?;
        Some(f64::from(need).clamp(NEED.0, NEED.1))
    }

    fn score(&self, object: u32, now_ms: i64) -> Option<f32> {
        let model = self.model.as_ref()?;
        Some(model.score(&self.history.features(object, now_ms)?))
    }

    /// Takes a request into account that missed so many bytes.
    pub(super) fn observe(&mut self, request: &ObjectRequest, missed_bytes: u64) {
        let now_ms = request.now_ms;
        for id in self
            .open_by_object
            .remove(&request.object)
            .unwrap_or_default()
        {
            if let Some(open) = self.open.remove(&id) {
                self.complete(&open, 1.0, now_ms);
            }
        }
        self.give_up(now_ms);
        self.turnover.note(missed_bytes, now_ms);
        self.history.observe(request);
    }

    /// Ends samples that have waited for the whole window, and the oldest of more than may be
    /// remembered, with what is expected of them.
    fn give_up(&mut self, now_ms: i64) {
        let window_ms = self.config.window_half_lives * self.half_life_ms;
        while let Some(&(at_ms, id)) = self.open_order.front() {
            let in_window = ((now_ms - at_ms) as f64) < window_ms;
            if in_window && self.open_order.len() <= self.config.most_samples {
                return;
            }
            self.open_order.pop_front();
            let Some(open) = self.open.remove(&id) else {
                continue;
            };
            self.given_up += 1;
            let then = self.score(open.object, now_ms).unwrap_or(0.0);
            self.complete(&open, then, now_ms);
            if let Some(ids) = self.open_by_object.get_mut(&open.object) {
                ids.retain(|other| *other != id);
            }
        }
    }

    fn complete(&mut self, open: &Open, then: f32, now_ms: i64) {
        self.complete += 1;
        let wait_ms = (now_ms - open.at_ms).max(0) as f32;
        let outcome = Outcome { wait_ms, then };
        self.samples
            .add(open.features, outcome, self.config.most_samples);
    }

    /// Remembers what is known of an object now, to learn from how long it waits.
    pub(super) fn sample(&mut self, object: u32, now_ms: i64) {
        let Some(features) = self.history.features(object, now_ms) else {
            return;
        };
        self.sampled += 1;
        let id = self.sampled;
        let open = Open {
            object,
            at_ms: now_ms,
            features,
        };
        self.open.insert(id, open);
        self.open_by_object.entry(object).or_default().push(id);
        self.open_order.push_back((now_ms, id));
    }

    /// What a model is to be fitted to while so much is held, once there is enough that was not
    /// there the last time.
    pub(super) fn training_set(&mut self, held_bytes: u64, now_ms: i64) -> Option<ReuseTraining> {
        let input = self.input_if_due(held_bytes, now_ms)?;
        let samples = self.samples.clone();
        Some(ReuseTraining { samples, input })
    }

    /// Fits at once, if that is due; true if a model was fitted.
    pub(super) fn fit_if_due(&mut self, held_bytes: u64, now_ms: i64) -> bool {
        let Some(input) = self.input_if_due(held_bytes, now_ms) else {
            return false;
        };
        let fitted = input.fit(&self.samples);
        self.install(fitted);
        true
    }

    /// Expects what a fitted model says from now on.
    pub(super) fn install(&mut self, fitted: FittedReuse) {
        self.half_life_ms = fitted.half_life_ms;
        self.model = fitted.model;
    }

    fn input_if_due(&mut self, held_bytes: u64, now_ms: i64) -> Option<FitInput> {
        if self.complete < self.next_fit {
            return None;
        }
        let waiting = self.waiting(now_ms);
        // Without those that wait long, everything looks needed.
        let long = waiting.longer_than(self.half_life_ms) as u64;
        let enough = self.given_up + long >= self.config.first_fit_samples / 8;
        let later = match enough {
            true => (self.complete / 3).min(self.config.refit_samples),
            false => self.config.first_fit_samples / 8,
        };
        self.next_fit = self.complete + later;
        let (least_ms, most_ms) = self.config.half_life_range_ms;
        let fills_in_ms = self.turnover.fills_in_ms(held_bytes);
        let half_life_ms = fills_in_ms.map_or(self.half_life_ms, |ms| ms.clamp(least_ms, most_ms));
        enough.then(|| FitInput {
            waiting,
            before: self.model.clone(),
            half_life_ms,
            settings: self.config.fit,
        })
    }

    fn waiting(&self, now_ms: i64) -> WaitingSamples {
        let mut waiting = WaitingSamples::default();
        let mut place_of = HashMap::new();
        let least_ms = LEAST_WAIT_HALF_LIVES * self.half_life_ms;
        for (at_ms, id) in &self.open_order {
            let wait_ms = (now_ms - at_ms) as f64;
            if wait_ms < least_ms {
                break;
            }
            let Some(open) = self.open.get(id) else {
                continue;
            };
            let place = *place_of.entry(open.object).or_insert_with(|| {
                let now = self.history.features(open.object, now_ms);
                waiting.now.push(now.unwrap_or(open.features));
                waiting.now.len() - 1
            });
            let sample = (open.features, wait_ms as f32, place);
            waiting.samples.push(sample);
        }
        waiting
    }
}
