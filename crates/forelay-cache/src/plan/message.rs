//! What the planner is told: the events, each with its payload.
//!
//! Every time is in milliseconds since the Unix epoch (`now_ms`) unless its name says
//! otherwise. Extents are widened to whole pages.

use forelay_image::{Digest, Extent, PlannedExtent};
use serde::{Deserialize, Serialize};

use crate::budget::{MemorySample, PressureLevel};
use crate::names::{DeviceImage, Domain, ProfileName, SharedImage, VmName};

use super::decisions::FetchId;
use super::reuse::ReuseFit;

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

/// A launch that is asked for; its VMM does not run yet.
#[derive(Clone, Debug, PartialEq)]
pub struct LaunchRequested {
    /// The new VM.
    pub vm: VmName,
    /// Its trust domain.
    pub domain: Domain,
    /// Its profile.
    pub profile: ProfileName,
    /// Its pmem devices in order.
    pub devices: Vec<DeviceImage>,
    /// What it is expected to touch.
    pub working_set: Vec<PlannedExtent>,
}

/// What is forecast of a profile's next launch.
#[derive(Clone, Debug, PartialEq)]
pub struct ProfileForecast {
    /// The trust domain of its launches.
    pub domain: Domain,
    /// The profile.
    pub profile: ProfileName,
    /// The devices that a launch would have.
    pub devices: Vec<DeviceImage>,
    /// Probability of a launch within the forecast's horizon.
    pub launch_probability: f64,
    /// When the next launch is expected, if anything can be said.
    pub next_launch_ms: Option<i64>,
    /// What a launch is expected to touch.
    pub working_set: Vec<PlannedExtent>,
}

/// All that a running VM is expected to be given. Nothing is mapped ahead for it; when the
/// VM stops, it is forgotten.
#[derive(Clone, Debug, PartialEq)]
pub struct AttachForecast {
    /// The VM.
    pub vm: VmName,
    /// Its trust domain.
    pub domain: Domain,
    /// What may be attached.
    pub attachments: Vec<Attachment>,
}

/// One component that a VM may be given.
#[derive(Clone, Debug, PartialEq)]
pub struct Attachment {
    /// The device.
    pub device: DeviceImage,
    /// Probability that it is attached within the forecast's horizon.
    pub probability: f64,
    /// When that is expected.
    pub expected_ms: Option<i64>,
    /// What is expected to be touched of it then.
    pub working_set: Vec<PlannedExtent>,
}

/// A VM that an earlier daemon launched and that runs.
#[derive(Clone, Debug, PartialEq)]
pub struct RunningVm {
    /// The VM.
    pub vm: VmName,
    /// Its trust domain.
    pub domain: Domain,
    /// Its profile.
    pub profile: ProfileName,
    /// Its pmem devices in order.
    pub devices: Vec<DeviceImage>,
}

/// Pages that a VM was seen to have touched.
#[derive(Clone, Debug, PartialEq)]
pub struct TouchReport {
    /// The VM.
    pub vm: VmName,
    /// The component image.
    pub image: Digest,
    /// Pages touched since the last report, or all so far.
    pub extents: Vec<Extent>,
}

/// Bytes of an image in a domain's shared memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedExtent {
    /// The image.
    pub image: SharedImage,
    /// The bytes.
    pub extent: Extent,
}

/// The end of a fetch.
#[derive(Clone, Debug, PartialEq)]
pub struct FetchEnded {
    /// Which fetch.
    pub id: FetchId,
    /// What of it is in shared memory now: all of it, if nothing failed and it was not
    /// cancelled.
    pub here: Vec<Extent>,
}

/// How short of memory the host is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pressure {
    /// How bad.
    pub level: PressureLevel,
    /// Bytes to give back to be safe again.
    pub deficit_bytes: u64,
}

/// What the host's disk cache lacks of an image; all else of it is there.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskContent {
    /// The image.
    pub image: Digest,
    /// What would have to come from the repository.
    pub absent: Vec<Extent>,
}

/// The repository's speed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FetchCost {
    /// Time to the first byte, in milliseconds.
    pub latency_ms: f64,
    /// Bytes per second after that.
    pub bandwidth_bytes_per_s: f64,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum PlannerEvent {
    /// Launches that an earlier daemon saw, oldest first; told before all else.
    LaunchesRemembered(Vec<PastLaunch>),
    /// The fit that [`super::Decisions::fit`] asked for is done.
    ReuseFitted(Box<ReuseFit>),
    /// A launch is asked for.
    LaunchRequested(LaunchRequested),
    /// The forecast for a profile has changed.
    ProfileForecast(ProfileForecast),
    /// The forecast of what a running VM will be given has changed.
    AttachForecast(AttachForecast),
    /// A VM of an earlier daemon runs.
    VmFound(RunningVm),
    /// The VMM runs.
    VmStarted(VmName),
    /// The VM is gone, or its launch failed.
    VmStopped(VmName),
    /// A device was hot-plugged.
    Attached(VmName, DeviceImage),
    /// The device that showed an image was unplugged.
    Detached(VmName, Digest),
    /// A VM has touched pages.
    Touched(TouchReport),
    /// A demand fetch has put bytes into shared memory.
    Fetched(SharedExtent),
    /// A prefetch has ended: its bytes arrived, it failed, or it was cancelled.
    FetchEnded(FetchEnded),
    /// Bytes leave shared memory, or the kernel has taken them. Of an eviction it is told
    /// before the bytes go, so that a fault that brings them back is told after it.
    Evicted(SharedExtent),
    /// An image is gone for good, and its bytes with it: nothing had to leave for want of room.
    Removed(SharedImage),
    /// An eviction has been carried out; its bytes may be back already.
    EvictionEnded(SharedExtent),
    /// Bytes are pinned now.
    Pinned(SharedExtent),
    /// A pin is off.
    Unpinned(SharedExtent),
    /// Memory pressure was measured.
    Pressure(Pressure),
    /// A person or the configuration set the most that shared memory may take, in bytes.
    BudgetChanged(u64),
    /// Host memory was sampled; adapts the budget and may raise pressure by itself.
    MemorySampled(MemorySample),
    /// The repository's speed was measured.
    FetchCostMeasured(FetchCost),
    /// The disk cache has other parts of an image than before.
    DiskCacheChanged(DiskContent),
    /// Time has passed.
    Tick,
}

impl SharedExtent {
    /// These bytes of this image.
    pub const fn new(image: SharedImage, extent: Extent) -> Self {
        Self { image, extent }
    }
}
