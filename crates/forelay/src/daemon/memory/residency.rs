//! The mapping table's residency against the kernel's.
//!
//! The kernel may reclaim pages of shared memory without asking, and a predecessor may
//! have left some. Looks are taken beside the planner, so each is compared in the order
//! that cannot invent a loss: the table first, the kernel after it.
//!
//! Invariant: a page is reported lost only if the kernel did not have it after the table
//! had said it was there; found only if two looks in a row saw it.

use std::collections::BTreeMap;
use std::sync::Arc;

use forelay_cache::mapping_table::{Disagreement, KernelTruth, PageState, SharedTable};
use forelay_cache::plan::SharedExtent;
use forelay_cache::{Domain, PlannerEvent, SharedImage, VmName};
use forelay_image::pages::{PageRun, PageSet};
use forelay_image::{Digest, Extent};

use crate::api::Takeover;
use crate::daemon::memory::domains::{DomainMemory, Domains};
use crate::daemon::memory::journal::Replayed;
use crate::daemon::memory::planner::PlannerHandle;
use crate::host_stats::HostStats;

/// What one look at the kernel found.
#[derive(Debug, Default)]
pub struct Look {
    /// In the table, not in memory.
    lost: Vec<(SharedImage, Extent)>,
    /// In memory, not in the table.
    found: BTreeMap<SharedImage, PageSet>,
}

/// Looks at every file. Takes some milliseconds: not on async threads.
pub fn look(table: &SharedTable, domains: &Domains) -> Look {
    let mut look = Look::default();
    for memory in domains.all() {
        for (image, spec) in memory.shared.files() {
            let key = SharedImage::new(memory.domain.clone(), image);
            let believed: PageSet = table.read(|table| table.resident(&key).collect());
            let Ok(resident) = memory.shared.resident(&image) else {
                continue;
            };
            let kernel: PageSet = resident.into_iter().collect();
            let lost = &believed - &kernel;
            let lost = lost.extents().map(|extent| (key.clone(), extent));
            look.lost.extend(lost);
            // Not the padding behind the image's end.
            let whole = PageRun::whole(spec.image_bytes);
            let kernel: PageSet = kernel.runs_within(whole).collect();
            let found = &kernel - &believed;
            if !found.is_empty() {
                look.found.insert(key, found);
            }
        }
    }
    look
}

/// The events that bring the table in line, given the look before this one.
pub fn corrections(table: &SharedTable, before: &Look, now: &Look) -> Vec<PlannerEvent> {
    let mut events = Vec::new();
    for (image, extent) in now.lost.iter().cloned() {
        events.push(PlannerEvent::Evicted(SharedExtent::new(image, extent)));
    }
    for (image, found) in &now.found {
        let Some(earlier) = before.found.get(image) else {
            continue;
        };
        for extent in (found & earlier).extents() {
            let states = table.read(|table| table.states(image, extent));
            for (extent, state) in states {
                if matches!(state, PageState::Absent | PageState::Reserved) {
                    let image = image.clone();
                    events.push(PlannerEvent::Fetched(SharedExtent::new(image, extent)));
                }
            }
        }
    }
    events
}

/// A VMM that runs, as the kernel's truth needs to know it.
#[derive(Clone, Debug)]
pub struct RunningVmm {
    /// Name of its VM.
    pub vm: VmName,
    /// Trust domain of that.
    pub domain: Domain,
    /// Its process.
    pub pid: u32,
}

/// Brings the mapping table in line with the kernel after a takeover.
pub struct Reconciler {
    /// The mounts.
    pub domains: Arc<Domains>,
    /// Whose table it is.
    pub planner: Arc<PlannerHandle>,
}

impl Reconciler {
    /// After a takeover, before anything else is planned: the table that the journal told
    /// of takes over what the kernel says of VMs, their mappings and residency. Pins of
    /// the earlier daemon go: they only bridged starts that are over.
    pub fn reconcile(&self, journalled: Replayed, running: &[RunningVmm]) -> Takeover {
        let mut truth = KernelTruth::default();
        let mut unpinned_bytes = 0;
        for memory in self.domains.all() {
            for (image, spec) in memory.shared.files() {
                let key = SharedImage::new(memory.domain.clone(), image);
                unpinned_bytes += self.take_pins_off(&memory, &key, spec.image_bytes);
                let resident = memory.shared.resident(&image).unwrap_or_default();
                truth.resident.insert(key, (spec.image_bytes, resident));
            }
        }
        for vmm in running {
            let images = self.mapped_images(&vmm.domain, vmm.pid);
            truth.running.insert(vmm.vm.clone(), images);
        }
        let report = self.planner.table().write(|table| table.reconcile(&truth));
        let of_rows = |one: &&Disagreement| !matches!(one, Disagreement::Residency { .. });
        let disagreements = report.disagreements.iter().filter(of_rows);
        let disagreements: Vec<String> = disagreements
            .map(|one| serde_json::to_string(one).unwrap_or_default())
            .collect();
        for disagreement in &disagreements {
            tracing::warn!(
                disagreement,
                "the mapping table's journal and the kernel differ"
            );
        }
        Takeover {
            journalled_vms: journalled.vms,
            unstarted: journalled.unstarted,
            refused_records: journalled.refused_records,
            dropped_bytes: journalled.dropped_bytes,
            running_vms: truth.running.len(),
            resident_bytes: report.resident_bytes,
            unpinned_bytes,
            disagreements,
        }
    }

    fn take_pins_off(&self, memory: &DomainMemory, key: &SharedImage, image_bytes: u64) -> u64 {
        let whole = Extent::new(0, image_bytes);
        self.planner.table().write(|table| {
            // As often as it was pinned; refused only if the image has no row.
            while table.unpin(key, whole).is_ok_and(|bytes| bytes > 0) {}
        });
        memory
            .shared
            .unpin(&key.image, &[whole])
            .unwrap_or_else(|error| {
                tracing::warn!(error = forelay_host::error_chain(&error), "pins are left");
                0
            })
    }

    /// Images of a domain that a process maps, by its open mappings.
    fn mapped_images(&self, domain: &Domain, pid: u32) -> Vec<Digest> {
        let mapped = HostStats::default().mapped_files(pid);
        let Some(memory) = self.domains.get(domain) else {
            return Vec::new();
        };
        let files = memory.shared.files().into_iter().map(|(image, _)| image);
        let is_mapped = |image: &Digest| {
            let private = memory.shared.private_path(image);
            mapped.contains(&memory.shared.path(image))
                || private.is_some_and(|path| mapped.contains(&path))
        };
        files.filter(is_mapped).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forelay_cache::DeviceImage;
    use forelay_cache::mapping_table::{Arrival, MappingTable};

    #[test]
    fn losses_are_told_at_once_and_finds_when_seen_twice() {
        let device = DeviceImage {
            image: Digest::of(b"image"),
            image_bytes: 1 << 20,
        };
        let domain = Domain::from("d");
        let image = SharedImage::new(domain.clone(), device.image);
        let mut table = MappingTable::new();
        table.add_image(&domain, &device).unwrap();
        let here = Extent::new(0, 8192);
        table.complete_fetch(&image, here, Arrival::Demand).unwrap();
        let table = SharedTable::new(table);
        let mut now = Look::default();
        now.lost.push((image.clone(), Extent::new(4096, 4096)));
        let found = [Extent::new(0, 4096), Extent::new(65536, 4096)];
        let found = found.into_iter().collect();
        now.found.insert(image.clone(), found);
        let lost = PlannerEvent::Evicted(SharedExtent::new(image.clone(), Extent::new(4096, 4096)));
        let first = corrections(&table, &Look::default(), &now);
        assert_eq!(first, std::slice::from_ref(&lost));
        let extent = Extent::new(65536, 4096);
        let second = corrections(&table, &now, &now);
        assert_eq!(
            second,
            [
                lost,
                PlannerEvent::Fetched(SharedExtent::new(image, extent))
            ]
        );
    }
}
