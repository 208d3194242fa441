//! What to load first: expected seconds saved per byte, with the reasons.
//!
//! Owns the arithmetic that turns "will launch" (arrivals), "will have" (needs) and "will touch"
//! (working sets) into one ranked list per VM. Refuses to decide how much of it is loaded: that is
//! the planner's, who has the budget.
//!
//! score = P(launch) x P(component | launch) x P(extent | component)
//!         x (latency + bytes / bandwidth of the tier the bytes are in)
//!         / bytes / (1 + time until need / horizon)
//!
//! Invariant: scores are finite and not negative; equal input gives equal order.

mod combine;

use std::fmt;

use forelay_image::{Digest, Extent};
use serde::{Deserialize, Serialize};

use crate::working_set::Basis;

pub use combine::{ComponentForecast, Knowledge, PlanOf, Present, Subject, VmForecast, forecast};

/// Where bytes are now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// In shared memory: nothing is left to save.
    Memory,
    /// In the host's disk cache.
    Disk,
    /// In the repository.
    Repository,
}

/// What fetching from a tier takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TierCost {
    /// Time to the first byte, in seconds.
    pub latency_s: f64,
    /// Bytes a second after that.
    pub bytes_per_s: f64,
}

impl TierCost {
    /// Seconds that `bytes` take.
    pub fn seconds(&self, bytes: u64) -> f64 {
        self.latency_s.max(0.0) + bytes as f64 / self.bytes_per_s.max(1.0)
    }
}

/// Costs measured on this host, and how far ahead loading is worth it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Costs {
    /// Of the disk cache.
    pub disk: TierCost,
    /// Of the repository.
    pub repository: TierCost,
    /// Bytes needed this many seconds from now are worth half of bytes needed now, since memory
    /// waits with them.
    pub horizon_s: f64,
}

impl Default for Costs {
    fn default() -> Self {
        Self {
            disk: TierCost {
                latency_s: 200e-6,
                bytes_per_s: 500e6,
            },
            repository: TierCost {
                latency_s: 0.02,
                bytes_per_s: 50e6,
            },
            horizon_s: 600.0,
        }
    }
}

/// Why an entry is in the list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The launch forecast's reason, in its words.
    Launch {
        /// Probability of the launch.
        probability: f64,
        /// Why it is expected.
        reason: String,
    },
    /// The VM runs already.
    Running,
    /// The profile's lock names the component.
    Locked,
    /// VMs like it have the component.
    Needed {
        /// Probability given the launch.
        probability: f64,
    },
    /// VMs like it are given the component while they run.
    Attached {
        /// Attachments seen.
        attachments: u32,
        /// Their usual delay after the launch, in seconds.
        usual_delay_s: f64,
    },
    /// The extent was touched before.
    Touched(Basis),
    /// Nothing is known of what this component's users touch.
    Untouched,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Launch {
                probability,
                reason,
            } => write!(f, "{reason}, {probability:.2}"),
            Self::Running => f.write_str("runs now"),
            Self::Locked => f.write_str("in the profile's lock"),
            Self::Needed { probability } => {
                write!(f, "VMs like it have it, {probability:.2}")
            }
            Self::Attached {
                attachments,
                usual_delay_s,
            } => write!(
                f,
                "attached to VMs like it {attachments} times, usually {usual_delay_s:.0} s after \
                 their launch"
            ),
            Self::Touched(Basis::Own { hits, launches }) => {
                write!(f, "touched in {hits} of {launches} launches")
            }
            Self::Touched(Basis::Predecessor { hits, launches, .. }) => write!(
                f,
                "same file touched in {hits} of {launches} launches before the upgrade"
            ),
            Self::Touched(Basis::OtherProfiles { profiles, launches }) => write!(
                f,
                "touched by others ({profiles} profiles, {launches} launches)"
            ),
            Self::Untouched => f.write_str("not seen in use yet"),
        }
    }
}

/// Bytes that may be worth loading.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Image they belong to.
    pub image: Digest,
    /// Which bytes.
    pub extent: Extent,
    /// Probability that they are needed.
    pub probability: f64,
    /// Expected seconds until they are needed.
    pub until_need_s: f64,
    /// Where they are.
    pub tier: Tier,
}

/// A candidate with its worth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ranked {
    /// What.
    #[serde(flatten)]
    pub candidate: Candidate,
    /// Expected seconds that loading it ahead saves.
    pub seconds_saved: f64,
    /// Seconds saved per MiB, discounted by the time until need: the order of the list.
    pub score: f64,
}

/// Orders candidates by worth, best first.
pub fn rank(candidates: Vec<Candidate>, costs: &Costs) -> Vec<Ranked> {
    let mut ranked: Vec<Ranked> = candidates
        .into_iter()
        .map(|candidate| value(candidate, costs))
        .collect();
    ranked.sort_by(|a, b| {
        b.score.total_cmp(&a.score).then_with(|| {
            let key = |r: &Ranked| (r.candidate.image, r.candidate.extent);
            key(a).cmp(&key(b))
        })
    });
    ranked
}

fn value(candidate: Candidate, costs: &Costs) -> Ranked {
    let bytes = candidate.extent.len;
    let load_s = match candidate.tier {
        Tier::Memory => 0.0,
        Tier::Disk => costs.disk.seconds(bytes),
        // From the repository bytes go through the disk cache.
        Tier::Repository => costs.repository.seconds(bytes),
    };
    let probability = if candidate.probability.is_finite() {
        candidate.probability.clamp(0.0, 1.0)
    } else {
        0.0
    };
    let seconds_saved = probability * load_s;
    let until = candidate.until_need_s.max(0.0);
    let discount =
        1.0 + if until.is_finite() { until } else { f64::MAX } / costs.horizon_s.max(1.0);
    let mib = bytes.max(1) as f64 / f64::from(1 << 20);
    Ranked {
        candidate,
        seconds_saved,
        score: seconds_saved / mib / discount,
    }
}

#[cfg(test)]
mod tests;
