//! Reading the mapping table: lookups, summaries, its own size, its invariants.

use std::collections::BTreeMap;

use forelay_image::pages::{PageNo, PageRun, PageSet};
use forelay_image::{Digest, Extent};

use crate::names::{DeviceImage, Domain, ProfileName, SharedImage, VmName};

use super::{Absent, DeviceRow, ImageRow, MappingTable, PageState, Phase, TableEntry, VmRow};

impl MappingTable {
    /// Where byte `offset` of `image` is for `vm`. Allocates nothing.
    pub fn lookup(&self, vm: &str, image: &Digest, offset: u64) -> Option<TableEntry<'_>> {
        let row = self.vms.get(vm)?;
        row.devices
            .iter()
            .find_map(|device| self.entry(device, offset, image))
    }

    fn entry(&self, device: &DeviceRow, offset: u64, image: &Digest) -> Option<TableEntry<'_>> {
        let row = self.images.get(device.image as usize)?.as_ref()?;
        if *image != row.key.image || offset >= row.image_bytes {
            return None;
        }
        let page = PageNo::containing(offset);
        Some(TableEntry {
            image: &row.key,
            state: row.state(page),
            extent: row.run_around(page).extent(),
            references: row.mapped_by,
            pins: row.pin_count(page),
            touched: device.touched.contains(page),
        })
    }

    /// State of one byte's page; [`PageState::Absent`] for an unknown image.
    pub fn state(&self, image: &SharedImage, offset: u64) -> PageState {
        let page = PageNo::containing(offset);
        self.image_row(image)
            .map_or(PageState::Absent, |row| row.state(page))
    }

    /// Resident extents of an image, in order.
    pub fn resident(&self, image: &SharedImage) -> impl Iterator<Item = Extent> + '_ {
        let row = self.image_row(image);
        row.into_iter().flat_map(|row| row.resident.extents())
    }

    /// Bytes of `extent` that were prefetched and that no VM has touched yet.
    pub fn prefetched_unused_bytes(&self, image: &SharedImage, extent: Extent) -> u64 {
        let row = self.image_row(image);
        let run = PageRun::covering(extent);
        row.map_or(0, |row| row.prefetched_unused.count_within(run).bytes())
    }

    /// Resident and unpinned parts of `extent`.
    pub fn evictable(&self, image: &SharedImage, extent: Extent) -> Vec<Extent> {
        let row = self.image_row(image);
        row.map_or_else(Vec::new, |row| {
            let runs = row.evictable(PageRun::covering(extent));
            runs.into_iter().map(PageRun::extent).collect()
        })
    }

    /// Parts of `extent` that are not resident, in order, and whether they are on their way.
    pub fn absent(&self, image: &SharedImage, extent: Extent) -> Vec<Absent> {
        let part = |run: PageRun, fetching| Absent {
            extent: run.extent(),
            fetching,
        };
        let Some(row) = self.image_row(image) else {
            let extent = extent.page_aligned();
            return vec![Absent {
                extent,
                fetching: false,
            }];
        };
        let mut parts = Vec::new();
        let run = PageRun::covering(extent).intersection(row.whole());
        for gap in row.resident.gaps_within(run) {
            let mut from = gap.start;
            for under_way in row.fetching.runs_within(gap) {
                if from < under_way.start {
                    parts.push(part(PageRun::new(from, under_way.start), false));
                }
                parts.push(part(under_way, true));
                from = under_way.end;
            }
            if from < gap.end {
                parts.push(part(PageRun::new(from, gap.end), false));
            }
        }
        parts
    }

    /// State of every page run of an image within `extent`.
    pub fn states(&self, image: &SharedImage, extent: Extent) -> Vec<(Extent, PageState)> {
        let Some(row) = self.image_row(image) else {
            return vec![(extent.page_aligned(), PageState::Absent)];
        };
        let window = PageRun::covering(extent).intersection(row.whole());
        let mut states = Vec::new();
        let mut page = window.start;
        while page < window.end {
            let run = row.run_around(page).intersection(window);
            states.push((run.extent(), row.state(page)));
            page = run.end;
        }
        states
    }

    /// What running VMs have touched of each image, as far as it was observed.
    pub fn touched_by_running(&self) -> BTreeMap<&SharedImage, PageSet> {
        let mut touched: BTreeMap<&SharedImage, PageSet> = BTreeMap::new();
        let running = self.vms.values().filter(|row| row.phase == Phase::Running);
        for device in running.flat_map(|row| &row.devices) {
            let image = self.images.get(device.image as usize);
            if let Some(row) = image.and_then(Option::as_ref) {
                *touched.entry(&row.key).or_default() |= &device.touched;
            }
        }
        touched
    }

    /// Images that the table knows, in order.
    pub fn known_images(&self) -> impl Iterator<Item = &SharedImage> {
        self.by_key.keys()
    }

    /// VMs in the table with their phase, in order of names.
    pub fn known_vms(&self) -> impl Iterator<Item = (&VmName, Phase)> {
        self.vms.iter().map(|(name, row)| (name, row.phase))
    }

    /// Domain and profile of a VM.
    pub fn vm_identity(&self, vm: &str) -> Option<(&Domain, &ProfileName)> {
        self.vms.get(vm).map(|row| (&row.domain, &row.profile))
    }

    /// Images of a VM's devices, in device order.
    pub fn devices(&self, vm: &str) -> impl Iterator<Item = DeviceImage> + '_ {
        let devices = self.vms.get(vm).map_or(&[][..], |row| &row.devices);
        devices.iter().filter_map(|device| {
            let row = self.images[device.image as usize].as_ref()?;
            Some(DeviceImage {
                image: row.key.image,
                image_bytes: row.image_bytes,
            })
        })
    }

    /// VMs (running or mapped ahead) that can reach an image.
    pub fn mapped_by(&self, image: &SharedImage) -> u32 {
        self.image_row(image).map_or(0, |row| row.mapped_by)
    }

    /// Size of a known image in bytes.
    pub fn image_bytes(&self, image: &SharedImage) -> Option<u64> {
        self.image_row(image).map(|row| row.image_bytes)
    }

    /// Pinned bytes of one image, resident or not.
    pub fn pinned_bytes_of(&self, image: &SharedImage) -> u64 {
        self.image_row(image).map_or(0, ImageRow::pinned_bytes)
    }

    /// Bytes in shared memory, over all domains.
    pub const fn resident_bytes(&self) -> u64 {
        self.resident_bytes
    }

    /// Bytes on their way into shared memory, over all domains.
    pub const fn fetching_bytes(&self) -> u64 {
        self.fetching_bytes
    }

    /// Memory that the table itself takes, in bytes, without its names.
    pub fn heap_bytes(&self) -> usize {
        let images = self.images.iter().flatten().map(ImageRow::heap_bytes);
        let rows = self.images.capacity() * size_of::<Option<ImageRow>>();
        // A B-tree node holds up to 11 entries and is on average about 70% full.
        let keys = self.by_key.len() * (size_of::<SharedImage>() + 4) * 3 / 2;
        let vms = self.vms.values().map(|row| {
            let touched = row.devices.iter().map(|device| device.touched.heap_bytes());
            let devices = row.devices.capacity() * size_of::<DeviceRow>();
            touched.sum::<usize>() + devices + size_of::<(VmName, VmRow)>() * 3 / 2
        });
        images.sum::<usize>() + rows + keys + vms.sum::<usize>()
    }

    /// Chooses the smallest form of every set.
    pub fn compact(&mut self) {
        for row in self.images.iter_mut().flatten() {
            row.resident.compact();
            row.fetching.compact();
            row.prefetched_unused.compact();
        }
        for row in self.vms.values_mut() {
            for device in &mut row.devices {
                device.touched.compact();
            }
            row.devices.shrink_to_fit();
        }
    }

    /// Checks the invariants named in the module's header; the error says which broke.
    pub fn validate(&self) -> Result<(), String> {
        let mut references = vec![0u32; self.images.len()];
        for (name, row) in &self.vms {
            for device in &row.devices {
                let Some(Some(image)) = self.images.get(device.image as usize) else {
                    return Err(format!("VM {name} refers to a missing image row"));
                };
                if image.key.domain != row.domain {
                    return Err(format!("VM {name} reaches into another domain"));
                }
                device.touched.validate()?;
                references[device.image as usize] += 1;
            }
        }
        let (mut resident, mut fetching) = (0, 0);
        for (row, expected) in self.images.iter().zip(references) {
            let Some(row) = row else { continue };
            row.validate()?;
            if row.mapped_by != expected {
                return Err(format!(
                    "{} counts {} VMs, not {expected}",
                    row.key.image, row.mapped_by
                ));
            }
            resident += row.resident.bytes();
            fetching += row.fetching.bytes();
        }
        if (resident, fetching) != (self.resident_bytes, self.fetching_bytes) {
            return Err("sums of resident or fetching bytes are off".into());
        }
        if self.by_key.len() + self.free.len() != self.images.len() {
            return Err("image rows and keys disagree".into());
        }
        Ok(())
    }
}
