//! What the planner is told and what it answers.
//!
//! Every time is in milliseconds since the Unix epoch (`now_ms`) unless its name says
//! otherwise. Extents are widened to whole pages.

use forelay_image::{Digest, Extent, PlannedExtent};
use serde::{Deserialize, Serialize};

use crate::budget::MemorySample;
use crate::names::{DeviceImage, Domain, ProfileName, SharedImage, VmName};

use super::reuse::{Learned, Lesson};

/// A launch of the past.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PastLaunch {
    /// When, in milliseconds since the epoch.
    pub at_ms: i64,
    /// The trust domain.
    pub domain: Domain,
    /// The profile.
    pub profile: ProfileName,
    /// The VM's pmem devices in order.
    pub devices: Vec<DeviceImage>,
}

/// How short of memory the host is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PressureLevel {
    /// Nothing needs to be given back.
    #[default]
    Plenty,
    /// No more prefetching from forecasts, nothing is evicted yet.
    Low,
    /// Memory must be given back now.
    Critical,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event {
    /// Launches that an earlier daemon saw, oldest first; told before all else.
    LaunchesRemembered {
        /// The launches.
        launches: Vec<PastLaunch>,
    },
    /// What [`Action::Study`] asked for is learned. Nothing to be written down.
    #[serde(skip)]
    Learned {
        /// What the lesson taught.
        learned: Box<Learned>,
    },
    /// A launch is asked for; its VMM does not run yet.
    LaunchRequested {
        /// The new VM.
        vm: VmName,
        /// Its trust domain.
        domain: Domain,
        /// Its profile.
        profile: ProfileName,
        /// Its pmem devices in order.
        devices: Vec<DeviceImage>,
        /// What it is expected to touch.
        working_set: Vec<PlannedExtent>,
    },
    /// The forecast for a profile has changed.
    ForecastChanged {
        /// The trust domain of its launches.
        domain: Domain,
        /// The profile.
        profile: ProfileName,
        /// The devices that a launch would have.
        devices: Vec<DeviceImage>,
        /// Probability of a launch within the forecast's horizon.
        launch_probability: f64,
        /// When the next launch is expected, if anything can be said.
        next_launch_ms: Option<i64>,
        /// What a launch is expected to touch.
        working_set: Vec<PlannedExtent>,
    },
    /// What a running VM is expected to be given next has changed. Nothing is mapped ahead
    /// for it; when the VM stops, it is forgotten.
    AttachForecast {
        /// The VM.
        vm: VmName,
        /// Its trust domain.
        domain: Domain,
        /// The devices that may be attached.
        devices: Vec<DeviceImage>,
        /// Probability that any of them is attached within the forecast's horizon.
        probability: f64,
        /// When that is expected.
        expected_ms: Option<i64>,
        /// What is expected to be touched of them then.
        working_set: Vec<PlannedExtent>,
    },
    /// A VM that an earlier daemon launched runs.
    VmFound {
        /// The VM.
        vm: VmName,
        /// Its trust domain.
        domain: Domain,
        /// Its profile.
        profile: ProfileName,
        /// Its pmem devices in order.
        devices: Vec<DeviceImage>,
    },
    /// The VMM runs.
    VmStarted {
        /// The VM.
        vm: VmName,
    },
    /// The VM is gone, or its launch failed.
    VmStopped {
        /// The VM.
        vm: VmName,
    },
    /// A device was hot-plugged.
    Attached {
        /// The VM.
        vm: VmName,
        /// The new device.
        device: DeviceImage,
    },
    /// A device was unplugged.
    Detached {
        /// The VM.
        vm: VmName,
        /// The image it showed.
        image: Digest,
    },
    /// A VM was seen to have touched pages.
    Touched {
        /// The VM.
        vm: VmName,
        /// The component image.
        image: Digest,
        /// Pages touched since the last report, or all so far.
        extents: Vec<Extent>,
    },
    /// A demand fetch has put bytes into shared memory.
    Fetched {
        /// Where.
        image: SharedImage,
        /// Which bytes.
        extent: Extent,
    },
    /// A prefetch has put bytes into shared memory.
    Pushed {
        /// Where.
        image: SharedImage,
        /// Which bytes.
        extent: Extent,
    },
    /// A prefetch failed; it is not tried again before the next launch or forecast.
    PushFailed {
        /// Where.
        image: SharedImage,
        /// Which bytes.
        extent: Extent,
    },
    /// Bytes leave shared memory, or the kernel has taken them. Of an eviction it is told
    /// before the bytes go, so that a fault that brings them back is told after it.
    Evicted {
        /// Where.
        image: SharedImage,
        /// Which bytes.
        extent: Extent,
    },
    /// An eviction has been carried out; its bytes may be back already.
    EvictionEnded {
        /// Where.
        image: SharedImage,
        /// Which bytes.
        extent: Extent,
    },
    /// Bytes are pinned now.
    Pinned {
        /// Where.
        image: SharedImage,
        /// Which bytes.
        extent: Extent,
    },
    /// A pin is off.
    Unpinned {
        /// Where.
        image: SharedImage,
        /// Which bytes.
        extent: Extent,
    },
    /// Memory pressure was measured.
    Pressure {
        /// How bad.
        level: PressureLevel,
        /// Bytes to give back to be safe again.
        deficit_bytes: u64,
    },
    /// A person or the configuration set the most that shared memory may take.
    BudgetChanged {
        /// The new cap in bytes.
        budget_bytes: u64,
    },
    /// Host memory was sampled; adapts the budget and may raise pressure by itself.
    MemorySampled(MemorySample),
    /// The repository's speed was measured.
    FetchCostMeasured {
        /// Time to the first byte, in milliseconds.
        latency_ms: f64,
        /// Bytes per second after that.
        bandwidth_bytes_per_s: f64,
    },
    /// Time has passed.
    Tick,
}

/// Why a prefetch is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrefetchClass {
    /// A launch was asked for and will touch it soon.
    Launch,
    /// A launch is forecast.
    Forecast,
}

/// Order in which prefetches should be served: smaller is sooner, and every one of them
/// after any demand fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Urgency {
    /// Why.
    pub class: PrefetchClass,
    /// Within the class: expected first touch (launch) or worth (forecast).
    pub order: u64,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "action")]
pub enum Action {
    /// Fetch these bytes and push them into shared memory; answer with
    /// [`Event::Pushed`] or [`Event::PushFailed`].
    Prefetch {
        /// Where to.
        image: SharedImage,
        /// Which bytes.
        extent: Extent,
        /// When.
        priority: Urgency,
    },
    /// A prefetch is not wanted any more; no answer is expected, and one that comes
    /// anyway is harmless.
    CancelPrefetch {
        /// Where to.
        image: SharedImage,
        /// Which bytes.
        extent: Extent,
    },
    /// Keep these resident bytes from being reclaimed; answer with [`Event::Pinned`].
    Pin {
        /// Where.
        image: SharedImage,
        /// Which bytes.
        extents: Vec<Extent>,
    },
    /// Take the pin off; answer with [`Event::Unpinned`].
    Unpin {
        /// Where.
        image: SharedImage,
        /// Which bytes.
        extents: Vec<Extent>,
    },
    /// Give these bytes back; tell [`Event::Evicted`] for each extent
    /// before it goes and [`Event::EvictionEnded`] after it.
    Evict {
        /// Where.
        image: SharedImage,
        /// Which bytes.
        extents: Vec<Extent>,
    },
    /// Start no prefetch until told otherwise.
    PausePrefetch,
    /// Prefetch again.
    ResumePrefetch,
    /// Compose the map image and set up devices for a launch that is likely.
    Reserve {
        /// The trust domain.
        domain: Domain,
        /// The profile.
        profile: ProfileName,
        /// The devices, in order.
        devices: Vec<DeviceImage>,
    },
    /// Study what there is to learn from, on a thread of its own, and tell [`Event::Learned`].
    /// If that never comes, the next lesson does.
    #[serde(skip)]
    Study {
        /// The launches so far.
        lesson: Box<Lesson>,
    },
    /// The launch that [`Action::Reserve`] prepared is not likely any more.
    Release {
        /// The trust domain.
        domain: Domain,
        /// The profile.
        profile: ProfileName,
    },
}

/// Which rule chooses what leaves memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EvictionRule {
    /// Baseline: the least-used unpinned, unmapped component, whole, until it fits.
    LeastUsed,
    /// Extents, least expected seconds saved per byte first.
    #[default]
    Worth,
}

/// The planner's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlanConfig {
    /// Most that shared memory may take, in bytes.
    pub budget_bytes: u64,
    /// Most bytes of prefetches under way at a time, so that demand finds the line free.
    pub inflight_bytes: u64,
    /// Largest single prefetch, in bytes.
    pub piece_bytes: u64,
    /// How victims are chosen.
    pub rule: EvictionRule,
    /// Extents less likely to be needed than this are not prefetched.
    pub prefetch_probability: f64,
    /// A launch more likely than this is mapped ahead; released below half of it.
    pub reserve_probability: f64,
    /// Extents of a requested launch at least this likely are pinned until it has started.
    pub pin_probability: f64,
    /// Share of the budget that the planner itself may pin.
    pub pin_share: f64,
    /// How long pins stay after the VMM has started, in milliseconds.
    pub pin_hold_ms: i64,
    /// What a running VM was seen to use this recently does not leave under pressure, in
    /// milliseconds: it would come back at once.
    pub use_hold_ms: i64,
    /// A prefetch displaces resident bytes only if it is worth this many times as much.
    pub displace_factor: f64,
    /// Half-life of past uses and of forecasts that are not renewed, in milliseconds.
    pub half_life_ms: i64,
    /// How far ahead uses count, in milliseconds; the horizon of `launch_probability`.
    pub horizon_ms: i64,
    /// How long pressure must be gone before prefetching resumes, in milliseconds.
    pub calm_ms: i64,
    /// Time to the first byte from the repository until measured, in milliseconds.
    pub latency_ms: f64,
    /// Repository bandwidth until measured, in bytes per second.
    pub bandwidth_bytes_per_s: f64,
}

impl Default for PlanConfig {
    fn default() -> Self {
        Self {
            budget_bytes: 1 << 30,
            inflight_bytes: 16 << 20,
            piece_bytes: 1 << 20,
            rule: EvictionRule::Worth,
            prefetch_probability: 0.1,
            reserve_probability: 0.5,
            pin_probability: 0.5,
            pin_share: 0.25,
            pin_hold_ms: 30_000,
            use_hold_ms: 30_000,
            displace_factor: 1.25,
            half_life_ms: 6 * 3_600_000,
            horizon_ms: 600_000,
            calm_ms: 5_000,
            latency_ms: 20.0,
            bandwidth_bytes_per_s: 100e6,
        }
    }
}
