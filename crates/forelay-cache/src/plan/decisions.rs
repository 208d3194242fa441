//! What the planner answers: for each executor a list of its own.
//!
//! The lists of one step may be carried out side by side; each by itself is in order.

use forelay_image::Extent;

use crate::names::{Domain, ProfileName, SharedImage};

use super::reuse::ReuseSamples;

/// Names a fetch for as long as the planner lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FetchId(pub u64);

/// Bytes to bring into shared memory, with less right to the line than any demand. Ends in
/// exactly one [`super::PlannerEvent::FetchEnded`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Its name.
    pub id: FetchId,
    /// Where to.
    pub image: SharedImage,
    /// Which bytes.
    pub extent: Extent,
}

/// Resident bytes to keep from being reclaimed, or not any more; answered with
/// [`super::PlannerEvent::Pinned`] or [`super::PlannerEvent::Unpinned`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinChange {
    /// Where.
    pub image: SharedImage,
    /// Which bytes.
    pub extents: Vec<Extent>,
    /// Whether the pin is put on or taken off.
    pub pinned: bool,
}

/// Bytes to give back. [`super::PlannerEvent::Evicted`] is told of each extent before it
/// goes, [`super::PlannerEvent::EvictionEnded`] after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Eviction {
    /// Where.
    pub image: SharedImage,
    /// Which bytes.
    pub extents: Vec<Extent>,
}

/// A launch to be prepared before it is asked for, or not any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PreparedLaunch {
    /// A launch is likely: compose its map image and set up its devices.
    Prepare(Domain, ProfileName),
    /// The prepared launch is not likely any more.
    Release(Domain, ProfileName),
    /// Memory is short: all that is prepared goes.
    ReleaseAll,
}

/// What to do after one event.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decisions {
    /// Fetches to give up. Each still ends in its event; until then its bytes count.
    pub cancels: Vec<FetchId>,
    /// Fetches to start now, in this order.
    pub fetches: Vec<Fetch>,
    /// Pins to change.
    pub pins: Vec<PinChange>,
    /// Bytes to give back.
    pub evictions: Vec<Eviction>,
    /// Launches to prepare.
    pub launches: Vec<PreparedLaunch>,
    /// A model to fit on a thread of its own; [`super::PlannerEvent::ReuseFitted`] tells the
    /// result. If that never comes, the next samples do.
    pub fit: Option<Box<ReuseSamples>>,
}
