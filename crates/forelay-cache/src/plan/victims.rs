//! Who may leave memory; what is worth least is found by [`super::ranking`].
//!
//! Refuses to evict anything pinned. Components that a VM can reach are victims only
//! when the caller's [`Reach`] says so.

use std::collections::BTreeMap;

use forelay_image::Extent;
use forelay_image::pages::{PageRun, PageSet};

use crate::mapping_table::MappingTable;
use crate::names::SharedImage;

use super::guard::Guard;
use super::worth::Worth;

/// Extents of one image to be given back.
pub(super) type Victims = Vec<(SharedImage, Vec<Extent>)>;

/// What the choice depends on.
pub(super) struct Choice<'a> {
    pub(super) table: &'a MappingTable,
    pub(super) worth: &'a Worth,
    /// Already on their way out.
    pub(super) leaving: &'a BTreeMap<SharedImage, PageSet>,
    /// In use.
    pub(super) guard: &'a Guard,
    /// About to be touched by a VM that is being launched.
    pub(super) awaited: &'a Guard,
    pub(super) now_ms: i64,
}

/// How far a choice of victims goes; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reach {
    /// Components that no VM can reach.
    Unmapped,
    /// And what VMs can reach but none that runs has touched or fetched lately, nor will at
    /// once because it is being launched.
    Untouched,
    /// And what they have touched but did not use lately.
    Idle,
    /// And what a launch awaits.
    Unused,
    /// And what they use.
    All,
}

impl Choice<'_> {
    /// The parts of an image that are neither pinned nor on their way out.
    pub(super) fn free(&self, image: &SharedImage) -> Vec<PageRun> {
        let bytes = self.table.image_bytes(image).unwrap_or(0);
        let extents = self.table.evictable(image, Extent::new(0, bytes));
        let runs = extents.into_iter().map(PageRun::covering);
        match self.leaving.get(image) {
            None => runs.collect(),
            Some(leaving) => runs.flat_map(|run| leaving.gaps_within(run)).collect(),
        }
    }

    /// The parts of what is free of an image that a choice of this reach may take. `touched`
    /// is what running VMs have touched of it.
    pub(super) fn within_reach(
        &self,
        image: &SharedImage,
        free: &[PageRun],
        reach: Reach,
        touched: Option<&PageSet>,
    ) -> Vec<PageRun> {
        let runs = free.to_vec();
        match reach {
            Reach::Untouched => {
                let runs = self.awaited.without(image, self.guard.without(image, runs));
                match touched {
                    None => runs,
                    Some(touched) => runs
                        .into_iter()
                        .flat_map(|run| touched.gaps_within(run))
                        .collect(),
                }
            }
            Reach::Idle => self.awaited.without(image, self.guard.without(image, runs)),
            Reach::Unused => self.guard.without(image, runs),
            Reach::Unmapped | Reach::All => runs,
        }
    }
}
