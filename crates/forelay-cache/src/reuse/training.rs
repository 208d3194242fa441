//! The training set of expected reuse and the fit to it, apart from the memory that it is for.
//!
//! The outcome of a sample is discounted: 2^(-wait / half-life) for one that was requested
//! again. One that still waits counts as what is expected of its object now, discounted by
//! how long it has waited: what to expect is learned from what is expected later, as in
//! temporal-difference learning (Sutton, 1988), so that nothing has to be waited for. Without
//! a model, the fit bootstraps with one that treats long waiters as not needed.
//!
//! Refuses to know objects: a training set holds features and how long was waited. A fit takes
//! tenths of a second, needs nothing but its training set and may run on any thread.

use std::fmt;

use super::features::FEATURES;
use super::trees::{self, FitSettings, Trees};

/// What became of a sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Outcome {
    /// How long was waited, in milliseconds.
    pub(super) wait_ms: f32,
    /// What the wait ended with: 1 for a request, what was expected then if it was given up.
    pub(super) then: f32,
}

/// What was known of an object, and what became of it.
pub(super) type Samples = trees::Samples<Outcome, FEATURES>;

/// Samples that still wait.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct WaitingSamples {
    /// What was known when each was taken, how long it has waited in milliseconds, and the
    /// place of its object in `now`.
    pub(super) samples: Vec<([f32; FEATURES], f32, usize)>,
    /// What is known now of each object that is waited for.
    pub(super) now: Vec<[f32; FEATURES]>,
}

impl WaitingSamples {
    /// Those that have waited for so long.
    pub(super) fn longer_than(&self, wait_ms: f64) -> usize {
        self.patient(wait_ms).count()
    }

    fn patient(&self, wait_ms: f64) -> impl Iterator<Item = &([f32; FEATURES], f32, usize)> {
        let long = move |waiting: &&([f32; FEATURES], f32, usize)| f64::from(waiting.1) >= wait_ms;
        self.samples.iter().filter(long)
    }

    /// Those that have waited for so long, as not needed.
    fn not_needed(&self, wait_ms: f64) -> Samples {
        let mut samples = Samples::default();
        for &(features, wait_ms, _) in self.patient(wait_ms) {
            samples.add(features, Outcome { wait_ms, then: 0.0 }, usize::MAX);
        }
        samples
    }

    /// All of them, as needed as the model expects of them now.
    fn expected(&self, model: &Trees) -> Samples {
        let need = |features: &[f32; FEATURES]| model.score(features);
        let now: Vec<f32> = self.now.iter().map(need).collect();
        let mut samples = Samples::default();
        for &(features, wait_ms, object) in &self.samples {
            let then = now[object];
            samples.add(features, Outcome { wait_ms, then }, usize::MAX);
        }
        samples
    }
}

/// A training set, as [`super::ReuseMemory::training_set`] gives it.
#[derive(Clone, PartialEq)]
pub struct ReuseTraining {
    pub(super) samples: Samples,
    pub(super) input: FitInput,
}

/// What there is to know about a fit beside the samples that are complete.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct FitInput {
    pub(super) waiting: WaitingSamples,
    /// The model so far.
    pub(super) before: Option<Trees>,
    pub(super) half_life_ms: f64,
    pub(super) settings: FitSettings,
}

/// A fitted model of expected reuse.
#[derive(Clone, Debug, PartialEq)]
pub struct FittedReuse {
    pub(super) model: Option<Trees>,
    pub(super) half_life_ms: f64,
}

impl ReuseTraining {
    /// Fits a model.
    pub fn fit(&self) -> FittedReuse {
        self.input.fit(&self.samples)
    }
}

impl fmt::Debug for ReuseTraining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "training set of {} samples", self.samples.len())
    }
}

impl FitInput {
    /// Fits a model to the complete samples and to those that wait.
    pub(super) fn fit(&self, samples: &Samples) -> FittedReuse {
        let half_life_ms = self.half_life_ms as f32;
        let discounted = |outcome: Outcome| outcome.then * (-outcome.wait_ms / half_life_ms).exp2();
        let fit = |waiting: &Samples| Trees::fit(&[samples, waiting], discounted, &self.settings);
        let first = match self.before {
            Some(_) => None,
            None => fit(&self.waiting.not_needed(self.half_life_ms)),
        };
        let before = self.before.as_ref().or(first.as_ref());
        FittedReuse {
            model: before.and_then(|before| fit(&self.waiting.expected(before))),
            half_life_ms: self.half_life_ms,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF_LIFE_MS: f64 = 1e6;

    fn features(kind: f32) -> [f32; FEATURES] {
        let mut features = [0.0; FEATURES];
        features[0] = kind;
        features
    }

    /// Objects of kind 1 were requested after a half-life; those of kind 2 still wait, for
    /// half a one, and are of kind 1 now; those of kind 3 have waited for three and are as
    /// they were.
    fn how(before: Option<Trees>) -> (Samples, FitInput) {
        let mut samples = Samples::default();
        let mut waiting = WaitingSamples {
            samples: Vec::new(),
            now: vec![features(1.0), features(3.0)],
        };
        for _ in 0..400 {
            let outcome = Outcome {
                wait_ms: HALF_LIFE_MS as f32,
                then: 1.0,
            };
            samples.add(features(1.0), outcome, usize::MAX);
            let wait_ms = HALF_LIFE_MS as f32;
            waiting.samples.push((features(2.0), wait_ms / 2.0, 0));
            waiting.samples.push((features(3.0), wait_ms * 3.0, 1));
        }
        let fit = FitSettings {
            trees: 100,
            depth: 2,
            rate: 0.3,
            shrink: 0.1,
            row_stride: 1,
            tree_samples: 10_000,
            feature_share: 1.0,
        };
        let half_life_ms = HALF_LIFE_MS;
        let how = FitInput {
            waiting,
            before,
            half_life_ms,
            settings: fit,
        };
        (samples, how)
    }

    #[test]
    fn who_waits_counts_as_what_is_expected_now() {
        let (samples, first) = how(None);
        let learned = first.fit(&samples);
        let model = learned.model.unwrap();
        let need = |model: &Trees, kind| model.score(&features(kind));
        assert!((need(&model, 1.0) - 0.5).abs() < 0.02);
        let waits = need(&model, 2.0);
        assert!((waits - 0.5 * 0.5f32.sqrt()).abs() < 0.03, "{waits}");
        assert!(need(&model, 3.0) < 0.05, "not needed as far as is known");
        // A model that expects more of kind 1 makes more be expected of those who wait.
        let sure = Outcome {
            wait_ms: 0.0,
            then: 1.0,
        };
        let mut all = Samples::default();
        all.add(features(1.0), sure, 1);
        let before = Trees::fit(&[&all], |outcome| outcome.then, &first.settings);
        let model = how(before).1.fit(&samples).model.unwrap();
        let waits = need(&model, 2.0);
        assert!((waits - 0.5f32.sqrt()).abs() < 0.03, "{waits}");
    }
}
