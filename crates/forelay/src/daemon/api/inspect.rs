//! What clients may look at: the mapping table of a VM. Memory is in `accounts`.
//!
//! Residency is told from the kernel (the pages of the files themselves), not from the
//! planner's belief.

use std::collections::BTreeMap;
use std::sync::Arc;

use forelay_cache::plan::SharedExtent;
use forelay_cache::{Domain, PlannerEvent, SharedImage};
use forelay_image::erofs::read::{Image, ReadError};
use forelay_image::extent::total_bytes;
use forelay_image::pages::{PageRun, PageSet, Pages};
use forelay_image::{Digest, Extent};
use forelay_store::Store;

use crate::api::{MapDevice, MapFile, Prefetched, Touch, VmMap};
use crate::daemon::error::HostError;
use crate::daemon::launch::PrefetchedLaunch;
use crate::daemon::memory::domains::Domains;
use crate::daemon::memory::planner::PlannerHandle;
use crate::daemon::order::DeviceRecord;
use crate::daemon::vm::instance::Instance;
use crate::daemon::vm::registry::VmRegistry;
use crate::recipe::Reader;

/// Parts of a residency bar.
const BAR_PARTS: u64 = 48;

/// Looks into the mapping tables of VMs.
pub struct VmMaps {
    pub store: Store,
    pub domains: Arc<Domains>,
    pub memory: Arc<PlannerHandle>,
    pub registry: Arc<VmRegistry>,
}

impl VmMaps {
    /// A device as clients see it.
    fn map_device(
        &self,
        domain: &Domain,
        slot: usize,
        record: &DeviceRecord,
        touched_bytes: u64,
    ) -> MapDevice {
        let resident = self.resident(domain, &record.image);
        MapDevice {
            slot,
            component: record.component.clone(),
            image: record.image,
            path: record.path.clone(),
            image_bytes: record.image_bytes,
            resident_bytes: total_bytes(&resident),
            touched_bytes,
            bar: bar(record.image_bytes, &resident),
        }
    }

    /// A launch that was prefetched, as clients see it.
    pub fn prefetched(&self, launch: &PrefetchedLaunch, took_s: f64) -> Prefetched {
        let PrefetchedLaunch {
            order,
            devices,
            planned_bytes,
        } = launch;
        let devices = devices.iter().enumerate();
        let devices = devices.map(|(index, one)| self.map_device(&order.domain, index + 1, one, 0));
        Prefetched {
            profile: order.of.profile.clone(),
            domain: order.domain.as_str().to_owned(),
            devices: devices.collect(),
            planned_bytes: *planned_bytes,
            took_s,
        }
    }

    /// Resident extents of an image, as the kernel has them.
    fn resident(&self, domain: &Domain, image: &Digest) -> Vec<Extent> {
        let memory = self.domains.get(domain);
        memory
            .and_then(|memory| memory.shared.resident(image).ok())
            .unwrap_or_default()
    }

    /// The mapping table of one VM.
    pub async fn map(self: &Arc<Self>, instance: &Instance) -> Result<VmMap, HostError> {
        let name = instance.name().to_owned();
        let domain = instance.domain();
        let devices = instance.devices();
        let touches = touches(instance);
        let touched = touched(&touches);
        let mut readers = Vec::new();
        let devices_with_files = devices.iter().enumerate().skip(1);
        for (slot, record) in devices_with_files.filter(|(_, one)| !one.memory) {
            let whole = [(record.image, record.image_bytes)];
            let members = if record.members.is_empty() {
                &whole[..]
            } else {
                &record.members
            };
            let mut base = 0;
            for &(image, bytes) in members {
                let image = self.store.open_image(image).await;
                let reader = self.store.image_reader(image.map_err(HostError::failed)?);
                readers.push((slot, base, reader));
                base += bytes;
            }
        }
        let this = Arc::clone(self);
        let work = tokio::task::spawn_blocking(move || {
            let mut shown = Vec::new();
            let mut files = Vec::new();
            for (slot, record) in devices.iter().enumerate() {
                let pages = touched.get(&record.image).cloned().unwrap_or_default();
                shown.push(this.map_device(&domain, slot, record, pages.bytes()));
            }
            for (slot, base, reader) in readers {
                let record = &devices[slot];
                let resident = this.resident(&domain, &record.image);
                let resident = resident.into_iter().collect();
                let pages = touched.get(&record.image).cloned().unwrap_or_default();
                let reader = Reader(reader);
                let found = map_files(&reader, slot, base, &resident, &pages);
                files.extend(found.map_err(HostError::failed)?);
            }
            files.sort_by(|a, b| (&a.path, a.slot).cmp(&(&b.path, b.slot)));
            Ok(VmMap {
                vm: name,
                devices: shown,
                files,
                touches,
            })
        });
        work.await.map_err(HostError::failed)?
    }

    /// Drops everything that no VM maps and nothing pins.
    pub async fn drop_memory(self: &Arc<Self>) -> Result<(), HostError> {
        let this = Arc::clone(self);
        let work = tokio::task::spawn_blocking(move || this.drop_idle());
        work.await.map_err(HostError::failed)?
    }

    fn drop_idle(&self) -> Result<(), HostError> {
        let live = self.registry.live();
        for memory in self.domains.all() {
            for (image, _) in memory.shared.files() {
                if live.iter().any(|one| has_image(one, &image)) {
                    continue;
                }
                let resident = memory.shared.resident(&image).map_err(HostError::failed)?;
                // Told first: a launch may bring them back before the last of them is gone.
                for &extent in &resident {
                    let image = SharedImage::new(memory.domain.clone(), image);
                    let evicted = SharedExtent::new(image, extent);
                    self.memory.tell(PlannerEvent::Evicted(evicted));
                }
                memory
                    .shared
                    .evict(&image, &resident)
                    .map_err(HostError::failed)?;
            }
        }
        Ok(())
    }
}

/// Pages of each image that were touched.
fn touched(touches: &[Touch]) -> BTreeMap<Digest, PageSet> {
    let mut by_image: BTreeMap<Digest, PageSet> = BTreeMap::new();
    for touch in touches {
        let extent = Extent::new(touch.offset, touch.len);
        by_image.entry(touch.image).or_default().extend([extent]);
    }
    by_image
}

/// What a VM has touched so far, in first-touch order.
fn touches(instance: &Instance) -> Vec<Touch> {
    let Some(observed) = instance.observed() else {
        return Vec::new();
    };
    let observed = observed.lock();
    let touches = observed.buffer.touches().iter().map(|touch| Touch {
        image: touch.image,
        offset: touch.extent.offset,
        len: touch.extent.len,
        first_touch_ms: touch.first_touch_ms.into(),
    });
    touches.collect()
}

fn has_image(instance: &Instance, image: &Digest) -> bool {
    instance
        .devices()
        .iter()
        .any(|device| device.image == *image)
}

/// Fill of each part of an image, from 0 to 8.
fn bar(image_bytes: u64, resident: &[Extent]) -> Vec<u8> {
    let pages = Pages::covering(image_bytes);
    let parts = BAR_PARTS.min(pages.0.into()).max(1);
    let part = |index: u64| {
        let start = image_bytes * index / parts;
        let whole = Extent::new(start, image_bytes * (index + 1) / parts - start);
        let inside = resident
            .iter()
            .filter_map(|extent| extent.intersection(&whole));
        let bytes: u64 = inside.map(|extent| extent.len).sum();
        // A little is more than nothing.
        (bytes * 8).div_ceil(whole.len.max(1)).min(8) as u8
    };
    (0..parts).map(part).collect()
}

/// Files of the image that starts at byte `base` of device `slot`.
fn map_files(
    reader: &Reader,
    slot: usize,
    base: u64,
    resident: &PageSet,
    touched: &PageSet,
) -> Result<Vec<MapFile>, ReadError> {
    let image = Image::open(reader)?;
    let mut files = Vec::new();
    for file in image.file_extents()? {
        let Some(first) = file.extents.first() else {
            continue;
        };
        let bytes = total_bytes(&file.extents);
        let within = |pages: &PageSet| -> u64 {
            let placed = file
                .extents
                .iter()
                .map(|one| Extent::new(one.offset + base, one.len));
            let runs = placed.map(PageRun::covering);
            let found: Pages = runs.map(|run| pages.count_within(run)).sum();
            found.min(Pages::covering(bytes)).bytes()
        };
        files.push(MapFile {
            path: String::from_utf8_lossy(&file.path).into_owned(),
            slot,
            offset: first.offset + base,
            bytes,
            resident_bytes: within(resident),
            touched_bytes: within(touched),
        });
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_shows_none_some_and_all() {
        let shown = bar(
            48 * 4096,
            &[Extent::new(0, 4096), Extent::new(4096 * 47, 4096)],
        );
        assert_eq!(shown.len(), 48);
        assert_eq!((shown[0], shown[1], shown[47]), (8, 0, 8));
        assert_eq!(bar(4096, &[]), [0]);
    }
}
