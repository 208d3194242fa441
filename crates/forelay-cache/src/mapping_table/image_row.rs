//! What the mapping table keeps for one image in one domain's shared memory.
//!
//! Residency lives here, once for all VMs of the domain; VM rows only refer to it.
//!
//! ```text
//!             map                begin_fetch            complete_fetch
//!  Absent ----------> Reserved ---------------> Fetching -------------> Resident
//!    ^                    ^                         |                       |
//!    |       unmap        |       abort_fetch       |         evict         |
//!    +--------------------+<------------------------+<----------------------+
//! ```
//! Reserved is Absent plus at least one VM (running, or mapped ahead of its launch)
//! that can reach the page; so it needs no storage of its own.
//!
//! Invariants: `fetching` and `resident` share no page; `prefetched_unused` and every
//! pinned page are within the image; `prefetched_unused` is within `resident`.

use forelay_image::pages::{PageNo, PageRun, PageSet, Pages};

use crate::names::SharedImage;

use super::PageState;

/// One image of one domain.
#[derive(Clone, Debug)]
pub(crate) struct ImageRow {
    pub(crate) key: SharedImage,
    pub(crate) image_bytes: u64,
    /// VMs (running or mapped ahead) that have a device for this image.
    pub(crate) mapped_by: u32,
    pub(crate) resident: PageSet,
    pub(crate) fetching: PageSet,
    pub(crate) prefetched_unused: PageSet,
    /// `pins[k]` holds the pages with more than `k` pins.
    pub(crate) pins: Vec<PageSet>,
    /// Grows whenever anything of this changes, or what a VM has touched of it, and is never
    /// what it was for another image.
    pub(crate) changed: u64,
}

impl ImageRow {
    pub(crate) fn new(key: SharedImage, image_bytes: u64) -> Self {
        Self {
            key,
            image_bytes,
            mapped_by: 0,
            resident: PageSet::new(),
            fetching: PageSet::new(),
            prefetched_unused: PageSet::new(),
            pins: Vec::new(),
            changed: 0,
        }
    }

    /// All pages of the image.
    pub(crate) fn whole(&self) -> PageRun {
        PageRun::whole(self.image_bytes)
    }

    pub(crate) fn state(&self, page: PageNo) -> PageState {
        if self.resident.contains(page) {
            PageState::Resident
        } else if self.fetching.contains(page) {
            PageState::Fetching
        } else if self.mapped_by > 0 {
            PageState::Reserved
        } else {
            PageState::Absent
        }
    }

    /// The longest run around `page` whose pages are all in the same state.
    pub(crate) fn run_around(&self, page: PageNo) -> PageRun {
        let whole = self.whole();
        if self.resident.contains(page) {
            return self.resident.run_around(page, whole);
        }
        if self.fetching.contains(page) {
            return self.fetching.run_around(page, whole);
        }
        let outside = self.resident.run_around(page, whole);
        self.fetching.run_around(page, outside)
    }

    pub(crate) fn pin_count(&self, page: PageNo) -> u32 {
        self.pins.partition_point(|layer| layer.contains(page)) as u32
    }

    pub(crate) fn pinned(&self) -> Option<&PageSet> {
        self.pins.first()
    }

    pub(crate) fn pinned_bytes(&self) -> u64 {
        self.pinned().map_or(0, PageSet::bytes)
    }

    pub(crate) fn pin(&mut self, run: PageRun) {
        let mut carry = vec![run];
        for layer in &mut self.pins {
            let mut next = Vec::new();
            for &run in &carry {
                next.extend(layer.runs_within(run));
                layer.insert(run);
            }
            carry = next;
            if carry.is_empty() {
                return;
            }
        }
        self.pins.push(carry.into_iter().collect());
    }

    /// Takes one pin off every page of `run` that has one; returns how many had.
    pub(crate) fn unpin(&mut self, run: PageRun) -> Pages {
        let mut unpinned = Pages::NONE;
        let mut left = vec![run];
        for layer in self.pins.iter_mut().rev() {
            let mut next = Vec::new();
            for &run in &left {
                let held: Vec<_> = layer.runs_within(run).collect();
                next.extend(layer.gaps_within(run));
                for run in held {
                    unpinned += layer.remove(run);
                }
            }
            left = next;
        }
        while self.pins.last().is_some_and(PageSet::is_empty) {
            self.pins.pop();
        }
        unpinned
    }

    /// Unpinned resident pages of `run`.
    pub(crate) fn evictable(&self, run: PageRun) -> Vec<PageRun> {
        let resident = self.resident.runs_within(run);
        match self.pinned() {
            None => resident.collect(),
            Some(pinned) => resident.flat_map(|run| pinned.gaps_within(run)).collect(),
        }
    }

    /// Whether nothing is known about the image any more.
    pub(crate) fn is_unused(&self) -> bool {
        self.mapped_by == 0
            && self.resident.is_empty()
            && self.fetching.is_empty()
            && self.pins.is_empty()
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        let sets = [&self.resident, &self.fetching, &self.prefetched_unused];
        let sets = sets.into_iter().chain(&self.pins);
        sets.map(PageSet::heap_bytes).sum::<usize>() + self.pins.capacity() * size_of::<PageSet>()
    }

    pub(crate) fn validate(&self) -> Result<(), String> {
        let named = |what: &str, cause: String| format!("{what} of {}: {cause}", self.key.image);
        let sets = [&self.resident, &self.fetching, &self.prefetched_unused];
        for set in sets.into_iter().chain(&self.pins) {
            set.validate().map_err(|cause| named("a set", cause))?;
            if set.runs().any(|run| run.end > self.whole().end) {
                return Err(named("a set", "reaches past the image".into()));
            }
        }
        if !(&self.resident & &self.fetching).is_empty() {
            return Err(named("fetching", "has resident pages".into()));
        }
        if !(&self.prefetched_unused - &self.resident).is_empty() {
            return Err(named("prefetched_unused", "has pages not resident".into()));
        }
        for pair in self.pins.windows(2) {
            if !(&pair[1] - &pair[0]).is_empty() {
                return Err(named(
                    "pins",
                    "a deeper layer is not within its parent".into(),
                ));
            }
        }
        Ok(())
    }
}
