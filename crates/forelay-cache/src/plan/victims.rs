//! Who may leave memory; what is worth least is found by [`super::ranking`].
//!
//! Refuses to evict anything pinned. Components that a VM can class are victims only
//! when the caller's [`VictimClass`] says so.

use std::collections::BTreeMap;

use forelay_image::Extent;
use forelay_image::pages::{PageRun, PageSet};

use crate::mapping_table::MappingTable;
use crate::names::SharedImage;

use super::benefit::BenefitModel;
use super::recent_use::RecentUse;

/// Extents of one image to be given back.
pub(super) type Victims = Vec<(SharedImage, Vec<Extent>)>;

/// What the context depends on.
pub(super) struct EvictionContext<'a> {
    pub(super) table: &'a MappingTable,
    pub(super) benefit: &'a BenefitModel,
    /// Already on their way out.
    pub(super) evicting: &'a BTreeMap<SharedImage, PageSet>,
    /// In use.
    pub(super) recently_used: &'a RecentUse,
    /// About to be touched by a VM that is being launched.
    pub(super) soon_used: &'a RecentUse,
    pub(super) now_ms: i64,
}

/// How far a context of victims goes; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum VictimClass {
    /// Components that no VM can class.
    Unmapped,
    /// And what VMs can class but none that runs has touched or fetched lately, nor will at
    /// once because it is being launched.
    Untouched,
    /// And what they have touched but did not use lately.
    Idle,
    /// And what a launch awaits.
    Unused,
    /// And what they use.
    All,
}

impl EvictionContext<'_> {
    /// The parts of an image that are neither pinned nor on their way out.
    pub(super) fn free(&self, image: &SharedImage) -> Vec<PageRun> {
        let bytes = self.table.image_bytes(image).unwrap_or(0);
        let extents = self.table.evictable(image, Extent::new(0, bytes));
        let runs = extents.into_iter().map(PageRun::covering);
        match self.evicting.get(image) {
            None => runs.collect(),
            Some(evicting) => runs.flat_map(|run| evicting.gaps_within(run)).collect(),
        }
    }

    /// The parts of what is free of an image that a context of this class may take. `touched`
    /// is what running VMs have touched of it.
    pub(super) fn of_class(
        &self,
        image: &SharedImage,
        free: &[PageRun],
        class: VictimClass,
        touched: Option<&PageSet>,
    ) -> Vec<PageRun> {
        let runs = free.to_vec();
        match class {
            VictimClass::Untouched => {
                let runs = self
                    .soon_used
                    .without(image, self.recently_used.without(image, runs));
                match touched {
                    None => runs,
                    Some(touched) => runs
                        .into_iter()
                        .flat_map(|run| touched.gaps_within(run))
                        .collect(),
                }
            }
            VictimClass::Idle => self
                .soon_used
                .without(image, self.recently_used.without(image, runs)),
            VictimClass::Unused => self.recently_used.without(image, runs),
            VictimClass::Unmapped | VictimClass::All => runs,
        }
    }
}
