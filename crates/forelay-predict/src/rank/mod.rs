//! What VMs will want, put together: when (arrivals), which components (needs), which parts
//! of them (working sets), each with its reasons.
//!
//! Owns the combination. Every probability is conditional: of a launch, of a component given
//! the VM, of an extent given the component. Refuses to know what loading costs, where bytes
//! are and which of them are worth it: that is the planner's.
//!
//! Invariant: equal input gives equal order.

mod combine;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::working_set::Basis;

pub use combine::{ComponentForecast, Knowledge, PlanOf, Present, Subject, VmForecast, forecast};

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

#[cfg(test)]
mod tests;
