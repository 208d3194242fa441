//! Which parts of a component a profile touches, how likely, and when after the launch.
//!
//! Owns the touch statistics of every (profile, component image) pair and the plan made from
//! them. Refuses to know how touches were seen (page scans, the READ log) and where the bytes
//! are now: it speaks of image digests, byte extents and milliseconds since the launch.
//!
//! ```text
//! observe(launch), observe_late(the same launch, later)
//!                 --> own counts of (profile, image) --+
//!                                                      +--> shrink own towards pooled --> plan
//! counts of other profiles for the same image ---------+
//! inherit(old image -> new image, by file path) ---> counts that start a patched component
//! ```
//!
//! Invariants:
//! - the extents of a set are page-aligned, disjoint and sorted, at most [`WorkingSetConfig::max_spans`];
//! - counts decay per launch of their profile, never with the clock: a profile that rests keeps
//!   its working set;
//! - a page's probability is the mean of a Beta posterior whose prior is what other profiles
//!   touched, so that little evidence never says 0 or 1.

mod inherit;
mod plans;
mod pool;
mod set;
mod snapshot;
mod spans;

use std::collections::BTreeMap;
use std::sync::Arc;

use forelay_image::{Digest, PlannedExtent, Touch};
use serde::{Deserialize, Serialize};

pub use inherit::FileLayout;
pub use plans::Plans;
pub use set::WorkingSet;
pub use snapshot::SnapshotError;

/// Bounds and rates; one setting serves every profile.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WorkingSetConfig {
    /// Launches of a profile after which an observation counts half.
    pub half_life_launches: f32,
    /// Touches later than this after the launch do not belong to the working set, in
    /// milliseconds.
    pub window_ms: u32,
    /// Spans kept per pair; beyond it the most alike neighbours are joined.
    pub max_spans: usize,
    /// Extents less likely than this stay out of a plan.
    pub min_probability: f32,
    /// Other profiles asked about one image, the best-known first.
    pub max_pooled_profiles: usize,
    /// Ask profiles of other owners too. A profile's owner is what stands before the `/` in its
    /// name; what one owner is forecast to touch then tells of the others.
    pub pool_across_owners: bool,
    /// Launches that an inherited set may count as, at most.
    pub inherited_launches: f32,
}

impl Default for WorkingSetConfig {
    fn default() -> Self {
        Self {
            half_life_launches: 32.0,
            window_ms: 600_000,
            max_spans: 2048,
            min_probability: 0.05,
            max_pooled_profiles: 64,
            pool_across_owners: false,
            inherited_launches: 4.0,
        }
    }
}

/// Where a planned extent's probability comes from.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "basis")]
pub enum Basis {
    /// Launches of this very profile touched it.
    Own {
        /// Launches that touched it.
        hits: u32,
        /// Launches that had the image.
        launches: u32,
    },
    /// Only launches before an upgrade of the component touched it, in the same files.
    Predecessor {
        /// Image before the upgrade.
        image: Digest,
        /// Launches that touched it, before the upgrade.
        hits: u32,
        /// Launches that had the predecessor.
        launches: u32,
    },
    /// This profile never touched it; others did.
    OtherProfiles {
        /// Profiles asked.
        profiles: u32,
        /// Their launches.
        launches: u32,
    },
}

/// An extent worth having in memory, and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Expectation {
    /// What and when.
    pub planned: PlannedExtent,
    /// What the probability rests on.
    pub basis: Basis,
}

/// The working sets of all profiles on a host.
#[derive(Clone, Debug, Default)]
pub struct WorkingSets {
    config: WorkingSetConfig,
    /// Pairs by image first: pooling over profiles is then one walk.
    images: BTreeMap<Digest, BTreeMap<Arc<str>, WorkingSet>>,
    /// How often anything of it changed.
    revision: u64,
}

impl WorkingSets {
    /// No observations yet.
    pub fn new(config: WorkingSetConfig) -> Self {
        Self {
            config,
            images: BTreeMap::new(),
            revision: 0,
        }
    }

    /// A number that is another one whenever a plan may be another one.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Learns from one finished (or observed long enough) launch of `profile`: `images` are all
    /// component images it had, `touches` what it touched of them in any order. An image without
    /// touches counts as untouched; a touch of an image not listed is ignored.
    pub fn observe(&mut self, profile: &str, images: &[Digest], touches: &[Touch]) {
        self.revision += 1;
        let profile: Arc<str> = profile.into();
        for (image, seen) in self.by_image(images, touches) {
            let set = self.images.entry(image).or_default();
            set.entry(profile.clone())
                .or_default()
                .observe(spans::disjoint(seen), &self.config);
        }
    }

    /// Learns what a launch that was observed already touched of its images after that: it counts
    /// as no further launch. Pairs that were never observed stay so.
    pub fn observe_late(&mut self, profile: &str, touches: &[Touch]) {
        self.revision += 1;
        let images: Vec<Digest> = touches.iter().map(|touch| touch.image).collect();
        for (image, seen) in self.by_image(&images, touches) {
            let set = self.images.get_mut(&image);
            if let Some(set) = set.and_then(|sets| sets.get_mut(profile)) {
                set.observe_late(&spans::disjoint(seen), &self.config);
            }
        }
    }

    /// The touches of each of `images` that lie in the window.
    fn by_image(&self, images: &[Digest], touches: &[Touch]) -> BTreeMap<Digest, Vec<spans::Seen>> {
        let mut by_image: BTreeMap<Digest, Vec<spans::Seen>> =
            images.iter().map(|image| (*image, Vec::new())).collect();
        for touch in touches {
            if touch.first_touch_ms > self.config.window_ms {
                continue;
            }
            if let Some(list) = by_image.get_mut(&touch.image) {
                list.extend(spans::Seen::new(touch.extent, touch.first_touch_ms));
            }
        }
        by_image
    }

    /// Of `predecessors`, the first that has what a launch of `profile` with `image` lacks: the
    /// profile's own set; or, where nobody launched `image` yet, anyone's.
    pub fn predecessor(
        &self,
        profile: &str,
        image: &Digest,
        predecessors: impl Iterator<Item = Digest>,
    ) -> Option<Digest> {
        let known = self.images.get(image);
        if known.is_some_and(|sets| sets.contains_key(profile)) {
            return None;
        }
        let is_new = known.is_none_or(BTreeMap::is_empty);
        let mut of_others = None;
        for predecessor in predecessors.filter(|one| one != image) {
            let Some(sets) = self.images.get(&predecessor) else {
                continue;
            };
            if sets.contains_key(profile) {
                return Some(predecessor);
            }
            if is_new && !sets.is_empty() {
                of_others = of_others.or(Some(predecessor));
            }
        }
        of_others
    }

    /// The statistics of one pair, if it was ever observed or inherited.
    pub fn get(&self, profile: &str, image: &Digest) -> Option<&WorkingSet> {
        self.images.get(image)?.get(profile)
    }

    /// Puts a pair's statistics in place, as a host that replays its history does.
    pub fn insert(&mut self, profile: &str, image: Digest, set: WorkingSet) {
        self.revision += 1;
        self.images
            .entry(image)
            .or_default()
            .insert(profile.into(), set);
    }

    /// Every pair, ordered by image and profile.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &Digest, &WorkingSet)> {
        self.images.iter().flat_map(|(image, sets)| {
            sets.iter()
                .map(move |(profile, set)| (&**profile, image, set))
        })
    }

    /// What the next launch of `profile` with `components` will touch, in order of first touch.
    pub fn plan(&self, profile: &str, components: &[Digest]) -> Vec<Expectation> {
        let mut planned = Vec::new();
        let mut images = components.to_vec();
        images.sort_unstable();
        images.dedup();
        let similarity = pool::Similarity::new(&self.images, profile, &images, &self.config);
        for image in &images {
            let Some(sets) = self.images.get(image) else {
                continue;
            };
            let pooled = pool::pool(sets, profile, image, &similarity, &self.config);
            let own = sets.get(profile);
            planned.extend(pool::blend(*image, own, &pooled, &self.config));
        }
        planned.sort_by_key(|Expectation { planned, .. }| {
            (planned.first_touch_ms, planned.image, planned.extent)
        });
        planned
    }
}

#[cfg(test)]
mod tests;
