//! The mapping table: (domain, VM, device, component image, extent) -> (state, place,
//! references), with rows for VMs that do not exist yet.
//!
//! Owns which VM can reach which image, and where every page of every image is. Refuses
//! to know how pages get there, what they are worth, what time it is: it is told.
//!
//! Residency is kept once for each image and domain ([`image_row`]); a VM's row only
//! refers to images and holds the pages that VM has touched. So 1,000 VMs cost 1,000
//! touch sets, not 1,000 residency maps.
//!
//! Invariants (checked by [`MappingTable::validate`]): those of [`image_row`]; an
//! image's `mapped_by` is the number of device rows that refer to it; no image row is
//! kept about which nothing is known. Lookups allocate nothing.

mod image_row;
pub mod journal;
#[cfg(test)]
mod model_test;
mod pages;
mod reading;
mod reconcile;
mod shared;

use std::collections::BTreeMap;

use forelay_image::pages::{PageRun, PageSet, Pages};
use forelay_image::{Digest, Extent};
use serde::{Deserialize, Serialize};

use crate::names::{DeviceImage, Domain, ProfileName, SharedImage, VmName};

pub(crate) use image_row::ImageRow;
use journal::TableRecord;
pub use reconcile::{Disagreement, KernelTruth, Reconciliation};
pub use shared::{SharedTable, TableLock};

/// State of a page of an image in one domain's shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PageState {
    /// No bytes, and no VM that could reach them.
    Absent,
    /// Mapped ahead of any byte.
    Reserved,
    /// On its way into shared memory.
    Fetching,
    /// In shared memory.
    Resident,
}

/// Whether a row's VM exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Mapped ahead: devices are set up, no VMM runs.
    Premapped,
    /// The VMM runs.
    Running,
}

/// How bytes came into shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arrival {
    /// A VM waited for them.
    Demand,
    /// They were pushed before anyone asked.
    Prefetch,
}

/// Why the table refused an operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// No row for this VM.
    #[error("VM {0} is not in the mapping table")]
    UnknownVm(VmName),
    /// A row for this VM exists already.
    #[error("VM {0} is in the mapping table already")]
    VmExists(VmName),
    /// The VM has no device for this image.
    #[error("VM {vm} has no device for image {image}")]
    NoDevice {
        /// The VM.
        vm: VmName,
        /// The image.
        image: Digest,
    },
    /// Nothing is known about this image.
    #[error("image {image} is not in the mapping table of domain {domain}")]
    UnknownImage {
        /// The trust domain.
        domain: Domain,
        /// The image.
        image: Digest,
    },
    /// The image is known with another size.
    #[error("image {image} has {known_bytes} bytes, not {claimed_bytes}")]
    SizeMismatch {
        /// The image.
        image: Digest,
        /// Its size as the table knows it, in bytes.
        known_bytes: u64,
        /// The size that was claimed, in bytes.
        claimed_bytes: u64,
    },
    /// The extent reaches past the image.
    #[error("bytes {}..{} are not within image {image} of {image_bytes} bytes", extent.offset, extent.end())]
    OutOfImage {
        /// The image.
        image: Digest,
        /// The offending extent.
        extent: Extent,
        /// The image's size in bytes.
        image_bytes: u64,
    },
}

/// Answer of [`MappingTable::lookup`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry<'a> {
    /// Image and the domain whose shared memory holds it.
    pub image: &'a SharedImage,
    /// State of the page asked about.
    pub state: PageState,
    /// The longest extent around it in the same state.
    pub extent: Extent,
    /// VMs that can reach it.
    pub references: u32,
    /// Pins on the page.
    pub pins: u32,
    /// Whether this VM has touched the page.
    pub touched: bool,
}

/// A part of what was asked for that is not resident.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absent {
    /// Whole pages.
    pub extent: Extent,
    /// Whether it is on its way.
    pub fetching: bool,
}

/// Answer of [`MappingTable::touch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TouchOutcome {
    /// Bytes that the table did not know to be resident.
    pub learned_bytes: u64,
    /// Bytes that this VM had not touched before.
    pub first_touch_bytes: u64,
}

/// A VM's row.
#[derive(Clone, Debug)]
pub(crate) struct VmRow {
    /// Whatever it is called, and never another row's.
    pub(crate) number: u64,
    pub(crate) domain: Domain,
    pub(crate) profile: ProfileName,
    pub(crate) phase: Phase,
    pub(crate) devices: Vec<DeviceRow>,
}

#[derive(Clone, Debug)]
pub(crate) struct DeviceRow {
    /// Index into `MappingTable::images`.
    pub(crate) image: u32,
    pub(crate) touched: PageSet,
}

/// Why a row is there.
const LIVE_ROW: &str =
    "indexes come from by_key or device rows, which validate() holds to live rows";

/// The mapping table. See the module's header.
#[derive(Clone, Debug, Default)]
pub struct MappingTable {
    pub(crate) by_key: BTreeMap<SharedImage, u32>,
    pub(crate) images: Vec<Option<ImageRow>>,
    free: Vec<u32>,
    /// Changes since the last drain, if the table is journalled.
    records: Option<Vec<TableRecord>>,
    pub(crate) vms: BTreeMap<VmName, VmRow>,
    pub(crate) resident_bytes: u64,
    pub(crate) fetching_bytes: u64,
    /// Rows of VMs that there have been.
    numbers: u64,
    /// Changes of images so far: see [`ImageRow::changed`].
    changes: u64,
}

impl MappingTable {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    // ---- VMs -----------------------------------------------------------------

    /// Adds a VM with its devices in order. With [`Phase::Premapped`] this is done from a
    /// forecast, before the launch is asked for.
    pub fn map(
        &mut self,
        vm: &VmName,
        domain: &Domain,
        profile: &ProfileName,
        devices: &[DeviceImage],
        phase: Phase,
    ) -> Result<(), TableError> {
        if self.vms.contains_key(vm) {
            return Err(TableError::VmExists(vm.clone()));
        }
        for device in devices {
            self.check_size(domain, device)?;
        }
        let rows = devices
            .iter()
            .map(|device| self.refer(domain, device))
            .collect();
        self.numbers += 1;
        let row = VmRow {
            number: self.numbers,
            domain: domain.clone(),
            profile: profile.clone(),
            phase,
            devices: rows,
        };
        self.vms.insert(vm.clone(), row);
        self.note(|| TableRecord::Mapped {
            vm: vm.clone(),
            domain: domain.clone(),
            profile: profile.clone(),
            devices: devices.to_vec(),
            phase,
        });
        Ok(())
    }

    /// The VM's VMM runs now.
    pub fn start(&mut self, vm: &VmName) -> Result<(), TableError> {
        self.vm_mut(vm)?.phase = Phase::Running;
        self.note(|| TableRecord::Started { vm: vm.clone() });
        Ok(())
    }

    /// Gives a row mapped ahead to the VM that is launched now, under its own name.
    pub fn rename(&mut self, from: &VmName, to: &VmName) -> Result<(), TableError> {
        if self.vms.contains_key(to) {
            return Err(TableError::VmExists(to.clone()));
        }
        let row = self.vms.remove(from);
        let row = row.ok_or_else(|| TableError::UnknownVm(from.clone()))?;
        self.vms.insert(to.clone(), row);
        self.note(|| TableRecord::Renamed {
            from: from.clone(),
            to: to.clone(),
        });
        Ok(())
    }

    /// Removes a VM. Its images stay resident.
    pub fn unmap(&mut self, vm: &VmName) -> Result<(), TableError> {
        let row = self.vms.remove(vm);
        let row = row.ok_or_else(|| TableError::UnknownVm(vm.clone()))?;
        for device in row.devices {
            self.release(device.image);
        }
        self.note(|| TableRecord::Unmapped { vm: vm.clone() });
        Ok(())
    }

    /// Adds a device to a VM (hot attach).
    pub fn attach(&mut self, vm: &VmName, device: &DeviceImage) -> Result<(), TableError> {
        let domain = self.vm(vm)?.domain.clone();
        self.check_size(&domain, device)?;
        let row = self.refer(&domain, device);
        self.vm_mut(vm)?.devices.push(row);
        self.note(|| TableRecord::Attached {
            vm: vm.clone(),
            device: *device,
        });
        Ok(())
    }

    /// Removes a VM's last device for `image` (hot detach).
    pub fn detach(&mut self, vm: &VmName, image: &Digest) -> Result<(), TableError> {
        let at = self.device_index(vm, image)?;
        let device = self.vm_mut(vm)?.devices.remove(at);
        self.release(device.image);
        self.note(|| TableRecord::Detached {
            vm: vm.clone(),
            image: *image,
        });
        Ok(())
    }

    /// Records that `vm` has touched pages of `image`, which are resident by definition.
    pub fn touch(
        &mut self,
        vm: &VmName,
        image: &Digest,
        extent: Extent,
    ) -> Result<TouchOutcome, TableError> {
        let at = self.device_index(vm, image)?;
        let index = self.vm(vm)?.devices[at].image;
        let run = self.run_in(index, extent)?;
        let first = self.vm_mut(vm)?.devices[at].touched.insert(run);
        let known = self.row(index).resident.count_within(run).bytes();
        if first == Pages::NONE && known == run.extent().len {
            return Ok(TouchOutcome {
                learned_bytes: 0,
                first_touch_bytes: 0,
            });
        }
        let row = self.row_mut(index);
        row.prefetched_unused.remove(run);
        let fetched = row.fetching.remove(run);
        let learned = row.resident.insert(run);
        self.fetching_bytes -= fetched.bytes();
        self.resident_bytes += learned.bytes();
        Ok(TouchOutcome {
            learned_bytes: learned.bytes(),
            first_touch_bytes: first.bytes(),
        })
    }

    // ---- journal -------------------------------------------------------------

    /// Notes changes from now on, for [`MappingTable::drain_records`].
    pub fn start_journal(&mut self) {
        self.records.get_or_insert_default();
    }

    /// The changes since the last call, in order; to be appended to the journal.
    pub fn drain_records(&mut self) -> Vec<TableRecord> {
        self.records.as_mut().map_or_else(Vec::new, std::mem::take)
    }

    fn note(&mut self, record: impl FnOnce() -> TableRecord) {
        if let Some(records) = &mut self.records {
            records.push(record());
        }
    }

    // ---- inside --------------------------------------------------------------

    fn vm(&self, vm: &VmName) -> Result<&VmRow, TableError> {
        let row = self.vms.get(vm);
        row.ok_or_else(|| TableError::UnknownVm(vm.clone()))
    }

    fn vm_mut(&mut self, vm: &VmName) -> Result<&mut VmRow, TableError> {
        let row = self.vms.get_mut(vm);
        row.ok_or_else(|| TableError::UnknownVm(vm.clone()))
    }

    fn device_index(&self, vm: &VmName, image: &Digest) -> Result<usize, TableError> {
        let devices = &self.vm(vm)?.devices;
        let is = |device: &DeviceRow| {
            let row = self.images[device.image as usize].as_ref();
            row.is_some_and(|row| row.key.image == *image)
        };
        devices.iter().rposition(is).ok_or(TableError::NoDevice {
            vm: vm.clone(),
            image: *image,
        })
    }

    fn index(&self, image: &SharedImage) -> Result<u32, TableError> {
        let index = self.by_key.get(image).copied();
        index.ok_or_else(|| TableError::UnknownImage {
            domain: image.domain.clone(),
            image: image.image,
        })
    }

    /// The row of a known image, if there is one.
    pub(crate) fn image_row(&self, image: &SharedImage) -> Option<&ImageRow> {
        self.images[*self.by_key.get(image)? as usize].as_ref()
    }

    fn row(&self, index: u32) -> &ImageRow {
        self.images[index as usize].as_ref().expect(LIVE_ROW)
    }

    /// The row, to be changed.
    fn row_mut(&mut self, index: u32) -> &mut ImageRow {
        self.changes += 1;
        let row = self.images[index as usize].as_mut().expect(LIVE_ROW);
        row.changed = self.changes;
        row
    }

    fn run_in(&self, index: u32, extent: Extent) -> Result<PageRun, TableError> {
        let row = self.row(index);
        let run = PageRun::covering(extent);
        if run.end > row.whole().end || extent.end() > row.whole().end.offset() {
            return Err(TableError::OutOfImage {
                image: row.key.image,
                extent,
                image_bytes: row.image_bytes,
            });
        }
        Ok(run)
    }

    fn check_size(&self, domain: &Domain, device: &DeviceImage) -> Result<(), TableError> {
        let key = SharedImage::new(domain.clone(), device.image);
        match self.image_bytes(&key) {
            Some(known_bytes) if known_bytes != device.image_bytes => {
                Err(TableError::SizeMismatch {
                    image: device.image,
                    known_bytes,
                    claimed_bytes: device.image_bytes,
                })
            }
            _ => Ok(()),
        }
    }

    fn refer(&mut self, domain: &Domain, device: &DeviceImage) -> DeviceRow {
        let key = SharedImage::new(domain.clone(), device.image);
        let image = match self.by_key.get(&key) {
            Some(&index) => index,
            None => self.insert_image(key, device.image_bytes),
        };
        self.row_mut(image).mapped_by += 1;
        DeviceRow {
            image,
            touched: PageSet::new(),
        }
    }

    fn release(&mut self, index: u32) {
        self.row_mut(index).mapped_by -= 1;
        self.drop_if_unused(index);
    }

    fn insert_image(&mut self, key: SharedImage, image_bytes: u64) -> u32 {
        let row = Some(ImageRow::new(key.clone(), image_bytes));
        let index = match self.free.pop() {
            Some(index) => {
                self.images[index as usize] = row;
                index
            }
            None => {
                self.images.push(row);
                u32::try_from(self.images.len() - 1).expect("fewer than 2^32 images fit in memory")
            }
        };
        self.by_key.insert(key, index);
        index
    }

    fn drop_if_unused(&mut self, index: u32) {
        let row = self.images[index as usize].take_if(|row| row.is_unused());
        if let Some(row) = row {
            self.by_key.remove(&row.key);
            self.free.push(index);
        }
    }
}
