//! Operations of the mapping table on pages: fetching, arriving, leaving, pins.
//!
//! Transitions are drawn in [`super::image_row`]. Invariant: an operation that is
//! refused changes nothing.

use forelay_image::Extent;
use forelay_image::pages::{PageRun, Pages};

use crate::names::{DeviceImage, Domain, SharedImage};

use super::journal::TableRecord;
use super::{Arrival, MappingTable, TableError};

impl MappingTable {
    /// Makes an image known before any VM maps it, so that it can be prefetched.
    pub fn add_image(&mut self, domain: &Domain, device: &DeviceImage) -> Result<(), TableError> {
        self.check_size(domain, device)?;
        let key = SharedImage::new(domain.clone(), device.image);
        if !self.by_key.contains_key(&key) {
            self.insert_image(key, device.image_bytes);
        }
        Ok(())
    }

    /// Marks the pages of `extent` that are neither resident nor on their way as being
    /// fetched, and returns exactly those.
    pub fn begin_fetch(
        &mut self,
        image: &SharedImage,
        extent: Extent,
    ) -> Result<Vec<Extent>, TableError> {
        let index = self.index(image)?;
        let run = self.run_in(index, extent)?;
        let row = self.row_mut(index);
        let missing: Vec<PageRun> = row
            .resident
            .gaps_within(run)
            .flat_map(|gap| row.fetching.gaps_within(gap))
            .collect();
        let mut pages = Pages::NONE;
        for &run in &missing {
            pages += row.fetching.insert(run);
        }
        self.fetching_bytes += pages.bytes();
        Ok(missing.into_iter().map(PageRun::extent).collect())
    }

    /// The bytes of `extent` are in shared memory now; returns how many are new.
    pub fn complete_fetch(
        &mut self,
        image: &SharedImage,
        extent: Extent,
        arrival: Arrival,
    ) -> Result<u64, TableError> {
        let index = self.index(image)?;
        let run = self.run_in(index, extent)?;
        let row = self.row_mut(index);
        let fetched = row.fetching.remove(run);
        if arrival == Arrival::Prefetch {
            let new: Vec<PageRun> = row.resident.gaps_within(run).collect();
            row.prefetched_unused.extend(new);
        }
        let arrived = row.resident.insert(run);
        self.fetching_bytes -= fetched.bytes();
        self.resident_bytes += arrived.bytes();
        Ok(arrived.bytes())
    }

    /// A fetch failed or was cancelled; returns the bytes that were on their way.
    pub fn abort_fetch(&mut self, image: &SharedImage, extent: Extent) -> Result<u64, TableError> {
        let index = self.index(image)?;
        let run = self.run_in(index, extent)?;
        let stopped = self.row_mut(index).fetching.remove(run).bytes();
        self.fetching_bytes -= stopped;
        self.drop_if_unused(index);
        Ok(stopped)
    }

    /// Pages of `extent` were given back; pinned ones stay. Returns the bytes freed.
    pub fn evict(&mut self, image: &SharedImage, extent: Extent) -> Result<u64, TableError> {
        let index = self.index(image)?;
        let run = self.run_in(index, extent)?;
        let row = self.row_mut(index);
        let mut pages = Pages::NONE;
        for run in row.evictable(run) {
            pages += row.resident.remove(run);
            row.prefetched_unused.remove(run);
        }
        self.resident_bytes -= pages.bytes();
        self.drop_if_unused(index);
        Ok(pages.bytes())
    }

    /// Adds one pin to every page of `extent`.
    pub fn pin(&mut self, image: &SharedImage, extent: Extent) -> Result<(), TableError> {
        let index = self.index(image)?;
        let run = self.run_in(index, extent)?;
        if !run.is_empty() {
            self.row_mut(index).pin(run);
            let image_bytes = self.row_mut(index).image_bytes;
            self.note(|| TableRecord::Pinned {
                image: image.clone(),
                image_bytes,
                extent,
            });
        }
        Ok(())
    }

    /// Takes one pin off every page of `extent` that has one; returns those bytes.
    pub fn unpin(&mut self, image: &SharedImage, extent: Extent) -> Result<u64, TableError> {
        let index = self.index(image)?;
        let run = self.run_in(index, extent)?;
        let unpinned = self.row_mut(index).unpin(run).bytes();
        self.note(|| TableRecord::Unpinned {
            image: image.clone(),
            extent,
        });
        self.drop_if_unused(index);
        Ok(unpinned)
    }
}
