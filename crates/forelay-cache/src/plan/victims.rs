//! Who leaves memory: the literal baseline rule and the rule by worth.
//!
//! Refuses to evict anything pinned. Components that a VM can reach are victims only
//! when the caller's [`Reach`] says so, and never under the baseline rule.

use std::collections::BTreeMap;

use forelay_image::{Extent, PAGE_BYTES};

use crate::mapping_table::MappingTable;
use crate::names::SharedImage;
use crate::page_set::{PageRun, PageSet};
use crate::policy::least_used;

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
    /// How far the choice goes.
    pub(super) reach: Reach,
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
    fn candidates(&self, image: &SharedImage, touched: Option<&PageSet>) -> Vec<PageRun> {
        let bytes = self.table.image_bytes(image).unwrap_or(0);
        let extents = self.table.evictable(image, Extent::new(0, bytes));
        let runs = extents.into_iter().map(PageRun::covering);
        let runs: Vec<PageRun> = match self.leaving.get(image) {
            None => runs.collect(),
            Some(leaving) => runs.flat_map(|run| leaving.gaps_within(run)).collect(),
        };
        match self.reach {
            Reach::Untouched => {
                let runs = self.awaited.without(image, self.guard.without(image, runs));
                let untouched = |run| match touched {
                    None => vec![run],
                    Some(touched) => touched.gaps_within(run).collect(),
                };
                runs.into_iter().flat_map(untouched).collect()
            }
            Reach::Idle => self.awaited.without(image, self.guard.without(image, runs)),
            Reach::Unused => self.guard.without(image, runs),
            Reach::Unmapped | Reach::All => runs,
        }
    }

    /// Least-used unpinned, unmapped components, whole, until `needed_bytes` are covered.
    /// Empty if they cannot cover it: then nothing is gained by evicting.
    pub(super) fn least_used(&self, needed_bytes: u64) -> Victims {
        let mut runs_of = BTreeMap::new();
        let mut candidates = Vec::new();
        for image in self.table.known_images() {
            if self.table.mapped_by(image) > 0 || self.table.pinned_bytes_of(image) > 0 {
                continue;
            }
            let runs = self.candidates(image, None);
            let bytes = runs.iter().map(|run| run.extent().len).sum();
            let (uses, last_use_ms) = self.worth.component_uses(image);
            candidates.push(least_used::Candidate {
                key: image,
                bytes,
                uses,
                last_use_ms,
            });
            runs_of.insert(image, runs);
        }
        let chosen = least_used::choose(candidates, needed_bytes);
        let extents = |image: &SharedImage| runs_of[image].iter().map(|run| run.extent()).collect();
        chosen
            .into_iter()
            .map(|image| (image.clone(), extents(image)))
            .collect()
    }

    /// Extents worth least per byte, but less than `below` seconds per byte, until
    /// `needed_bytes` are covered or there are no more.
    pub(super) fn by_worth(&self, needed_bytes: u64, below: f64) -> Victims {
        let mut valued = Vec::new();
        let images: Vec<&SharedImage> = self.table.known_images().collect();
        let touched = match self.reach {
            Reach::Untouched => self.table.touched_by_running(),
            _ => BTreeMap::new(),
        };
        for (at, image) in images.iter().enumerate() {
            if self.reach == Reach::Unmapped && self.table.mapped_by(image) > 0 {
                continue;
            }
            let candidates = self.candidates(image, touched.get(image));
            let runs = self.worth.value(image, &candidates, self.now_ms);
            valued.extend(runs.into_iter().map(|valued| (valued, at)));
        }
        valued.retain(|(valued, _)| valued.seconds_per_byte < below);
        valued.sort_by(|(a, image_a), (b, image_b)| {
            let by_worth = a.seconds_per_byte.total_cmp(&b.seconds_per_byte);
            by_worth.then((image_a, a.run).cmp(&(image_b, b.run)))
        });
        let mut left_pages = needed_bytes.div_ceil(PAGE_BYTES);
        let mut chosen: BTreeMap<usize, PageSet> = BTreeMap::new();
        for (valued, image) in valued {
            if left_pages == 0 {
                break;
            }
            // Stop as soon as it is safe: the last run is cut.
            let pages = u64::from(valued.run.pages()).min(left_pages);
            left_pages -= pages;
            let run = PageRun::new(valued.run.start, valued.run.start + pages as u32);
            chosen.entry(image).or_default().insert(run);
        }
        let extents = |set: PageSet| set.runs().map(PageRun::extent).collect();
        chosen
            .into_iter()
            .map(|(at, set)| (images[at].clone(), extents(set)))
            .collect()
    }
}
