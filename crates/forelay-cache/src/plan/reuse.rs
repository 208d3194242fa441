//! When a component will be used again, learned from the launches so far: the estimate of
//! [`crate::reuse`], for what no launch is forecast to need.
//!
//! Each launch is a request for its components; the policy's own memory is a shadow of the
//! planner's budget, of which only the estimates are used. A model is fitted by whoever fits
//! it to [`ReuseSamples`], beside all else.
//!
//! Invariants: bounded memory (a learner that has met [`MOST_OBJECTS`] images begins again);
//! time is monotonic here; a model is installed unless a newer one is, or its samples were
//! forgotten.

use std::collections::HashMap;

use crate::names::{DeviceImage, Domain, ProfileName, SharedImage};
use crate::reuse::training::{FittedReuse, ReuseTraining};
use crate::reuse::{EvictionPolicy as _, ObjectRequest, ReuseMemory, ReuseSettings};

/// Images after which all is forgotten: each has a past of some hundred bytes.
const MOST_OBJECTS: usize = 1 << 16;
/// Samples that are remembered, up to four a launch: with 43 features each they take 36 MB.
const MOST_SAMPLES: usize = 200_000;
/// A clock that goes back this far was set again, and so is the learner, in milliseconds.
const SET_BACK_MS: i64 = 3_600_000;

/// Samples of launches. Fitting a model to them takes about half a second of any thread.
#[derive(Clone, Debug, PartialEq)]
pub struct ReuseSamples {
    number: u64,
    training: ReuseTraining,
}

/// A model fitted to [`ReuseSamples`].
#[derive(Clone, Debug, PartialEq)]
pub struct ReuseFit {
    number: u64,
    fitted: FittedReuse,
}

impl ReuseSamples {
    /// Fits a model of when components are used again.
    pub fn fit(&self) -> ReuseFit {
        ReuseFit {
            number: self.number,
            fitted: self.training.fit(),
        }
    }
}

/// See the module's header.
#[derive(Clone, Debug)]
pub(super) struct Reuse {
    learner: ReuseMemory,
    objects: HashMap<SharedImage, u32>,
    owners: HashMap<(Domain, ProfileName), u32>,
    now_ms: i64,
    /// Samples taken, and the last ones whose model was installed or came to nothing.
    taken: u64,
    installed: u64,
}

impl Reuse {
    /// A learner for a memory of `capacity_bytes`.
    pub(super) fn new(capacity_bytes: u64) -> Self {
        let config = ReuseSettings {
            most_samples: MOST_SAMPLES,
            ..ReuseSettings::default()
        };
        Self {
            learner: ReuseMemory::new(capacity_bytes, config),
            objects: HashMap::new(),
            owners: HashMap::new(),
            now_ms: i64::MIN,
            taken: 0,
            installed: 0,
        }
    }

    /// A VM of `profile` is launched with these devices; fetching all of one from the
    /// repository takes `latency_s` and its bytes times `seconds_per_byte`.
    pub(super) fn launched(
        &mut self,
        domain: &Domain,
        profile: &ProfileName,
        devices: &[DeviceImage],
        (latency_s, seconds_per_byte): (f64, f64),
        now_ms: i64,
    ) {
        let set_back = self.now_ms.saturating_sub(now_ms) > SET_BACK_MS && self.now_ms > i64::MIN;
        if set_back || self.objects.len() >= MOST_OBJECTS || self.owners.len() >= MOST_OBJECTS {
            *self = Self {
                taken: self.taken,
                installed: self.taken,
                ..Self::new(self.learner.capacity_bytes())
            };
        }
        self.now_ms = self.now_ms.max(now_ms);
        let owners = self.owners.len() as u32;
        let owner = (domain.clone(), profile.clone());
        let owner = *self.owners.entry(owner).or_insert(owners);
        for device in devices {
            let objects = self.objects.len() as u32;
            let image = SharedImage::new(domain.clone(), device.image);
            let object = *self.objects.entry(image).or_insert(objects);
            self.learner.observe(&ObjectRequest {
                object,
                owner,
                bytes: device.image_bytes,
                load_s: latency_s + device.image_bytes as f64 * seconds_per_byte,
                now_ms: self.now_ms,
            });
        }
    }

    /// Samples of the launches so far, if enough is new.
    pub(super) fn samples(&mut self) -> Option<ReuseSamples> {
        let training = self.learner.training_set(self.now_ms)?;
        self.taken += 1;
        let number = self.taken;
        Some(ReuseSamples { number, training })
    }

    /// Estimates by a fitted model from now on.
    pub(super) fn install(&mut self, ReuseFit { number, fitted }: ReuseFit) {
        if number > self.installed {
            self.installed = number;
            self.learner.install(fitted, self.now_ms);
        }
    }

    /// Probability that a launch within `horizon_ms` needs the image; `None` while too
    /// little was seen.
    pub(super) fn probability(&self, image: &SharedImage, horizon_ms: i64) -> Option<f64> {
        let object = *self.objects.get(image)?;
        let (need, half_life_ms) = self.learner.need(object, self.now_ms)?;
        // Were the next use exponentially distributed with rate r, then
        // E[2^(-t / h)] = r / (r + ln 2 / h).
        let need = need.clamp(0.0, 0.9999);
        let rate = need / (1.0 - need) * std::f64::consts::LN_2 / half_life_ms.max(1.0);
        Some(1.0 - (-rate * horizon_ms as f64).exp())
    }
}

#[cfg(test)]
mod tests {
    use forelay_image::Digest;

    use super::*;

    const COST: (f64, f64) = (0.02, 1e-8);

    fn device(number: u32) -> DeviceImage {
        DeviceImage {
            image: Digest::of(&number.to_le_bytes()),
            image_bytes: 1 << 20,
        }
    }

    /// Every 5 s a launch: in turn one of 60 components that come back every ten minutes,
    /// and one that never does.
    fn launch(reuse: &mut Reuse, domain: &Domain, at: u32) -> i64 {
        let (profile, component) = if at.is_multiple_of(2) {
            ("returns", at / 2 % 60)
        } else {
            ("once", 1_000 + at)
        };
        let now_ms = i64::from(at) * 5_000;
        reuse.launched(domain, &profile.into(), &[device(component)], COST, now_ms);
        now_ms
    }

    fn study(reuse: &mut Reuse) {
        if let Some(samples) = reuse.samples() {
            reuse.install(samples.fit());
        }
    }

    #[test]
    fn what_comes_back_is_expected_and_what_does_not_is_not() {
        let domain = Domain::from("ci");
        let image = |number| SharedImage::new(domain.clone(), device(number).image);
        let mut reuse = Reuse::new(64 << 20);
        let launches = 24_000;
        for at in 0..launches {
            launch(&mut reuse, &domain, at);
            study(&mut reuse);
            if at == 1_000 {
                assert_eq!(reuse.probability(&image(7), 600_000), None, "too early");
            }
        }
        let soon = |number| reuse.probability(&image(number), 600_000).unwrap();
        let returns: f64 = (0..60).map(soon).sum::<f64>() / 60.0;
        let once: f64 = (0..60)
            .map(|back| soon(1_000 + launches - 1 - 2 * back))
            .sum::<f64>()
            / 60.0;
        assert!(
            returns > 0.3 && once < returns / 4.0,
            "{returns} and {once}"
        );
        let elsewhere = SharedImage::new("other".into(), device(7).image);
        assert_eq!(reuse.probability(&elsewhere, 600_000), None);
    }

    #[test]
    fn samples_are_taken_once_and_their_model_counts_for_the_past_that_they_are_of() {
        let domain = Domain::from("ci");
        let image = SharedImage::new(domain.clone(), device(7).image);
        let mut reuse = Reuse::new(64 << 20);
        let mut next = 0;
        let mut take = |reuse: &mut Reuse| {
            loop {
                launch(reuse, &domain, next);
                next += 1;
                if let Some(samples) = reuse.samples() {
                    return samples;
                }
            }
        };
        let first = take(&mut reuse);
        assert_eq!(reuse.samples(), None, "until enough is new");
        assert_eq!(reuse.probability(&image, 600_000), None, "not studied");
        let second = take(&mut reuse);
        let (first, second) = (first.fit(), second.fit());
        let mut in_order = reuse.clone();
        in_order.install(first.clone());
        let early = in_order.probability(&image, 600_000);
        assert!(early.is_some());
        in_order.install(second.clone());
        let late = in_order.probability(&image, 600_000);
        assert_ne!(late, early);
        let mut overtaken = reuse.clone();
        overtaken.install(second.clone());
        overtaken.install(first);
        assert_eq!(overtaken.probability(&image, 600_000), late);
        // The clock is set back while the model is fitted.
        launch(&mut reuse, &domain, 0);
        reuse.install(second);
        assert_eq!(reuse.probability(&image, 600_000), None);
    }

    #[test]
    fn a_clock_that_was_set_back_starts_a_new_past() {
        let domain = Domain::from("ci");
        let mut reuse = Reuse::new(64 << 20);
        for at in 1_000..1_010 {
            launch(&mut reuse, &domain, at);
        }
        assert_eq!(reuse.objects.len(), 10);
        // A little is a correction; more is another time.
        launch(&mut reuse, &domain, 990);
        assert_eq!(reuse.objects.len(), 11);
        let now_ms = launch(&mut reuse, &domain, 0);
        assert_eq!((reuse.objects.len(), reuse.now_ms), (1, now_ms));
    }
}
