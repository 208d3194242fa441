//! Arrivals, needs and working sets combined: per VM the components that it will want, and
//! of each the extents.

use std::sync::Arc;

use forelay_image::{Digest, PlannedExtent};
use serde::{Deserialize, Serialize};

use super::Why;
use crate::arrivals::LaunchForecast;
use crate::needs;
use crate::time::Timestamp;
use crate::working_set::Expectation;

/// Components less likely than this are not listed.
const LEAST_PROBABILITY: f64 = 0.02;

/// A component (or several that share a device) at hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Present {
    /// What people call it.
    pub label: String,
    /// Names of the components in it.
    pub names: Vec<String>,
    /// Its image.
    pub image: Digest,
    /// Size of the image, in bytes.
    pub image_bytes: u64,
}

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
    /// What it is certain to have: the lock's components, or those of the running VM.
    pub present: Vec<Present>,
    /// Seconds since its launch, if it runs already.
    pub age_s: Option<f64>,
}

impl Subject {
    /// A VM that is forecast to launch with the components of its profile's lock (none, if no
    /// lock is known).
    pub fn upcoming(
        launch: &LaunchForecast,
        context: needs::Context,
        now: Timestamp,
        locked: Vec<Present>,
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
            present: locked,
            age_s: None,
        }
    }

    /// A running VM, which may be given further components.
    pub fn running(context: needs::Context, present: Vec<Present>, age_s: f64) -> Self {
        Self {
            context,
            probability: 1.0,
            until_s: 0.0,
            reasons: vec![Why::Running],
            present,
            age_s: Some(age_s.max(0.0)),
        }
    }
}

/// What a launch of a profile touches of images.
pub type PlanOf<'a> = dyn Fn(&str, &[Digest]) -> Arc<[Expectation]> + 'a;

/// Everything a forecast rests on.
#[derive(Clone, Copy)]
pub struct Knowledge<'a> {
    /// Which components.
    pub needs: &'a needs::Model,
    /// When those come that a launch does not bring.
    pub attachments: &'a needs::Attachments,
    /// Which parts: what a launch of a profile touches of images, in first-touch order.
    pub plan: &'a PlanOf<'a>,
    /// How far ahead attachments count, in seconds.
    pub horizon_s: f64,
    /// A component's present version by name.
    pub locate: &'a dyn Fn(&str) -> Option<Present>,
}

/// A component that a VM will want.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ComponentForecast {
    /// What people call it.
    pub component: String,
    /// Its image.
    pub image: Digest,
    /// Size of the image, in bytes.
    pub image_bytes: u64,
    /// True if it is expected to be attached, not launched with.
    pub attached: bool,
    /// Probability that it is needed within the horizon, given that the VM launches or runs.
    pub probability: f64,
    /// Seconds until it is needed.
    pub until_s: f64,
    /// What will be touched of it, given that it is needed.
    pub extents: Vec<PlannedExtent>,
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
}

/// A component that a subject may want, before extents are looked at.
struct WantedComponent {
    what: Present,
    attached: bool,
    /// Given the launch.
    probability: f64,
    until_s: f64,
    why: Vec<Why>,
}

/// Forecasts what a subject will need.
pub fn forecast(subject: &Subject, known: &Knowledge) -> VmForecast {
    let wanted = wanted(subject, known);
    let images: Vec<Digest> = wanted.iter().map(|one| one.what.image).collect();
    let plan = (known.plan)(&subject.context.profile, &images);
    let forecasts = wanted.into_iter().map(|one| {
        let image = one.what.image;
        let of_image = plan.iter().filter(|one| one.planned.image == image);
        let likeliest = of_image.clone().reduce(|best, one| {
            if one.planned.probability > best.planned.probability {
                one
            } else {
                best
            }
        });
        let mut reasons = subject.reasons.clone();
        reasons.extend(one.why);
        reasons.push(likeliest.map_or(Why::Untouched, |one| Why::Touched(one.basis)));
        ComponentForecast {
            component: one.what.label,
            image,
            image_bytes: one.what.image_bytes,
            attached: one.attached,
            probability: one.probability,
            until_s: one.until_s,
            extents: of_image.map(|one| one.planned).collect(),
            reasons,
        }
    });
    let mut components: Vec<ComponentForecast> = forecasts.collect();
    components.sort_by(|a, b| {
        b.probability
            .total_cmp(&a.probability)
            .then_with(|| a.component.cmp(&b.component))
    });
    VmForecast {
        profile: subject.context.profile.clone(),
        owner: subject.context.owner.clone(),
        running: subject.age_s.is_some(),
        probability: subject.probability,
        until_s: subject.until_s,
        components,
    }
}

/// What a subject's launch brings, and what is likely to be attached.
fn wanted(subject: &Subject, known: &Knowledge) -> Vec<WantedComponent> {
    let mut wanted: Vec<WantedComponent> = Vec::new();
    if subject.age_s.is_none() {
        wanted.extend(subject.present.iter().map(|one| WantedComponent {
            what: one.clone(),
            attached: false,
            probability: 1.0,
            until_s: subject.until_s,
            why: vec![Why::Locked],
        }));
    }
    let names = subject.present.iter().flat_map(|one| &one.names);
    let names: Vec<&str> = names.map(String::as_str).collect();
    let has = |image: &Digest| subject.present.iter().any(|one| one.image == *image);
    // A launch that is yet to come has a negative age.
    let age_s = subject.age_s.unwrap_or(-subject.until_s);
    for (name, ever) in known.needs.rank(&subject.context, &names) {
        let Some(what) = (known.locate)(&name) else {
            continue;
        };
        if has(&what.image) {
            continue;
        }
        let mut why = vec![Why::Needed { probability: ever }];
        let profile = &subject.context.profile;
        let horizon_s = known.horizon_s;
        let outlook = known.attachments.outlook(profile, &name, age_s, horizon_s);
        let (probability, until_s) = match outlook {
            // Nothing is known of what launches bring: all that VMs like it have counts.
            _ if subject.present.is_empty() => (ever, subject.until_s),
            // A lock pins what a launch brings; the rest can only be attached.
            Some(outlook) if outlook.attachments > 0 => {
                why.push(Why::Attached {
                    attachments: outlook.attachments,
                    usual_delay_s: outlook.usual_delay_s,
                });
                (outlook.within_horizon(ever), outlook.until_s)
            }
            _ => continue,
        };
        if probability >= LEAST_PROBABILITY {
            wanted.push(WantedComponent {
                what,
                attached: !subject.present.is_empty(),
                probability,
                until_s,
                why,
            });
        }
    }
    wanted
}
