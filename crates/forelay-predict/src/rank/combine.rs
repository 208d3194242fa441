//! Arrivals, needs and working sets combined: per VM the components it will want, and of each the
//! extents, ranked.

use forelay_image::{Digest, Extent};
use serde::{Deserialize, Serialize};

use super::{Candidate, Costs, Ranked, Tier, Why, rank};
use crate::arrivals::LaunchForecast;
use crate::needs;
use crate::time::Timestamp;
use crate::working_set::WorkingSets;

/// Components less likely than this are not listed.
const LEAST_PROBABILITY: f64 = 0.02;

/// A VM to forecast for: one that may launch, or one that runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Subject {
    /// What is known of it.
    pub context: needs::Context,
    /// Probability that it launches within the forecast's horizon; 1 for a running VM.
    pub probability: f64,
    /// Seconds until it launches; 0 for a running VM.
    pub until_s: f64,
    /// Why it is expected.
    pub reasons: Vec<Why>,
    /// Components it is certain to have: the lock's, or those of the running VM.
    pub components: Vec<String>,
    /// Whether it runs already.
    pub running: bool,
}

impl Subject {
    /// A VM that is forecast to launch with the components of its profile's lock (none, if no
    /// lock is known).
    pub fn upcoming(
        launch: &LaunchForecast,
        context: needs::Context,
        now: Timestamp,
        locked: Vec<String>,
    ) -> Self {
        let reasons = launch.reasons.iter().map(|reason| Why::Launch {
            probability: launch.probability,
            reason: reason.to_string(),
        });
        Self {
            context,
            probability: launch.probability,
            until_s: launch.expected_at.seconds_since(now).max(0.0),
            reasons: reasons.collect(),
            components: locked,
            running: false,
        }
    }

    /// A running VM, which may be given further components.
    pub fn running(context: needs::Context, present: Vec<String>) -> Self {
        Self {
            context,
            probability: 1.0,
            until_s: 0.0,
            reasons: vec![Why::Running],
            components: present,
            running: true,
        }
    }
}

/// A component's present version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// Its image.
    pub image: Digest,
    /// Size of the image, in bytes.
    pub image_bytes: u64,
}

/// A component that a VM will want.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ComponentForecast {
    /// Its name.
    pub component: String,
    /// Its image.
    pub image: Digest,
    /// Probability that it is needed within the horizon.
    pub probability: f64,
    /// Bytes of it likely to be touched (each extent weighted by its probability).
    pub expected_bytes: u64,
    /// Why.
    pub reasons: Vec<Why>,
}

/// The forecast for one VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmForecast {
    /// Its profile.
    pub profile: String,
    /// Its owner.
    pub owner: String,
    /// Whether it runs already.
    pub running: bool,
    /// Probability that it launches within the horizon.
    pub probability: f64,
    /// Seconds until it does.
    pub until_s: f64,
    /// Components, the likeliest first.
    pub components: Vec<ComponentForecast>,
    /// Extents of all of them, by worth.
    pub extents: Vec<Ranked>,
}

/// Forecasts what each subject will need. `locate` gives a component's present image, `tier` where
/// an extent's bytes are. Subjects keep their order.
pub fn forecast(
    subjects: &[Subject],
    needs: &needs::Model,
    sets: &WorkingSets,
    costs: &Costs,
    locate: &dyn Fn(&str) -> Option<Located>,
    tier: &dyn Fn(&Digest, &Extent) -> Tier,
) -> Vec<VmForecast> {
    subjects
        .iter()
        .map(|subject| forecast_one(subject, needs, sets, costs, locate, tier))
        .collect()
}

fn forecast_one(
    subject: &Subject,
    needs: &needs::Model,
    sets: &WorkingSets,
    costs: &Costs,
    locate: &dyn Fn(&str) -> Option<Located>,
    tier: &dyn Fn(&Digest, &Extent) -> Tier,
) -> VmForecast {
    let present: Vec<&str> = subject.components.iter().map(String::as_str).collect();
    // (name, probability given the launch, why)
    let mut wanted: Vec<(String, f64, Why)> = Vec::new();
    if !subject.running {
        let locked = present
            .iter()
            .map(|name| ((*name).to_owned(), 1.0, Why::Locked));
        wanted.extend(locked);
    }
    for (name, probability) in needs.rank(&subject.context, &present) {
        if probability >= LEAST_PROBABILITY {
            wanted.push((name.to_string(), probability, Why::Needed { probability }));
        }
    }
    let located: Vec<(Located, String, f64, Why)> = wanted
        .into_iter()
        .filter_map(|(name, p, why)| Some((locate(&name)?, name, p, why)))
        .collect();
    let images: Vec<Digest> = located.iter().map(|(at, ..)| at.image).collect();
    let plan = sets.plan(&subject.context.profile, &images, None);
    let mut components = Vec::with_capacity(located.len());
    let mut candidates = Vec::new();
    for (at, component, given_launch, why) in located {
        let probability = subject.probability * given_launch;
        let mut reasons = subject.reasons.clone();
        reasons.push(why);
        let mut expected_bytes = 0.0;
        let mut known = false;
        for planned in plan.iter().filter(|planned| planned.image == at.image) {
            known = true;
            let touched = f64::from(planned.probability);
            expected_bytes += touched * planned.extent.len as f64;
            let mut reasons = reasons.clone();
            reasons.push(Why::Touched(planned.basis));
            candidates.push(Candidate {
                image: at.image,
                extent: planned.extent,
                probability: probability * touched,
                until_need_s: subject.until_s + f64::from(planned.first_touch_ms) / 1000.0,
                tier: tier(&at.image, &planned.extent),
                reasons,
            });
        }
        if !known {
            reasons.push(Why::Untouched);
        }
        components.push(ComponentForecast {
            component,
            image: at.image,
            probability,
            expected_bytes: (expected_bytes as u64).min(at.image_bytes),
            reasons,
        });
    }
    components.sort_by(|a, b| {
        b.probability
            .total_cmp(&a.probability)
            .then_with(|| a.component.cmp(&b.component))
    });
    VmForecast {
        profile: subject.context.profile.clone(),
        owner: subject.context.owner.clone(),
        running: subject.running,
        probability: subject.probability,
        until_s: subject.until_s,
        components,
        extents: rank(candidates, costs),
    }
}
