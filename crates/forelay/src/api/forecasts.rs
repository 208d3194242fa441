//! Forecasts and history of profiles.

use forelay_image::Digest;
use serde::{Deserialize, Serialize};

/// A component that a profile is expected to need.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForecastEntry {
    /// Profile.
    pub profile: String,
    /// Owner.
    pub owner: String,
    /// The running VM that may be given the component; absent for a profile's next launch.
    pub vm: Option<String>,
    /// Component name and version.
    pub component: String,
    /// Image digest.
    pub image: Digest,
    /// True if it is expected to be attached to the running VM, not launched with.
    pub attached: bool,
    /// Probability that it is needed within the horizon (`forecast.horizon_s`).
    pub probability: f64,
    /// Seconds until the expected need.
    pub expected_in_s: Option<f64>,
    /// Bytes of it that may be touched.
    pub bytes: u64,
    /// Of those, bytes in shared memory now.
    pub resident_bytes: u64,
    /// Of those, bytes in the host's disk cache; the rest is in the repository.
    pub disk_bytes: u64,
    /// Expected seconds that loading it ahead saves.
    pub seconds_saved: f64,
    /// Expected seconds saved per MiB, less for what is needed later: the order of the list.
    pub score: f64,
    /// Why, in words.
    pub reasons: Vec<String>,
    /// How forecasting does for the profile.
    pub control: SelfControl,
}

/// How forecasting does for a profile, by its own account.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SelfControl {
    /// Forecasts of "launches within ten minutes" judged, those of the last three days again at a restart.
    pub judged: u64,
    /// Their mean squared error.
    pub brier_score: f64,
    /// Reliability: mean probability told, share that came true, number of forecasts.
    pub reliability: Vec<(f64, f64, u64)>,
    /// Cold starts that forecasting cost more than the simpler rule; negative if it saves.
    pub regret_cold_starts: f64,
    /// Forecasting did harm here: nothing is loaded before a launch is asked for.
    pub fallen_back: bool,
    /// The configuration switched forecasting off.
    pub switched_off: bool,
}

/// What is known of a profile's past.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// Profile.
    pub profile: String,
    /// Owner.
    pub owner: String,
    /// Launches recorded.
    pub launches: u64,
    /// The last one, milliseconds since the epoch.
    pub last_launch_ms: Option<i64>,
    /// Share of launches that needed no demand fetch.
    pub warm_share: f64,
    /// Median seconds to ready.
    pub ready_p50_s: Option<f64>,
    /// Bytes of its working set.
    pub working_set_bytes: u64,
    /// How forecasting does for it.
    pub control: SelfControl,
}
