//! The mapping table's residency against the kernel's.
//!
//! The kernel may reclaim pages of shared memory without asking, and a predecessor may
//! have left some. Looks are taken beside the planner, so each is compared in the order
//! that cannot invent a loss: the table first, the kernel after it.
//!
//! Invariant: a page is reported lost only if the kernel did not have it after the table
//! had said it was there; found only if two looks in a row saw it.

use std::collections::BTreeMap;

use forelay_cache::SharedImage;
use forelay_cache::VmName;
use forelay_cache::mapping_table::{Disagreement, KernelTruth, PageState, SharedTable};
use forelay_cache::page_set::{PageRun, PageSet};
use forelay_cache::plan::Event;
use forelay_image::Extent;

use super::Host;
use super::domains::Domains;

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
        for (image, _, spec) in memory.shared.files() {
            let key = SharedImage::new(memory.domain.clone(), image);
            let believed = pages(table.read(|table| table.resident(&key).collect()));
            let Ok(resident) = memory.shared.resident(&image) else {
                continue;
            };
            let whole = PageRun::covering(Extent::new(0, spec.image_bytes));
            let kernel = pages(resident);
            for run in believed.runs() {
                let gone = kernel.gaps_within(run);
                look.lost
                    .extend(gone.map(|run| (key.clone(), run.extent())));
            }
            let mut found = PageSet::new();
            for run in kernel.runs_within(whole) {
                for run in believed.gaps_within(run) {
                    found.insert(run);
                }
            }
            if !found.is_empty() {
                look.found.insert(key, found);
            }
        }
    }
    look
}

/// The events that bring the table in line, given the look before this one.
pub fn corrections(table: &SharedTable, before: &Look, now: &Look) -> Vec<Event> {
    let mut events = Vec::new();
    for (image, extent) in now.lost.iter().cloned() {
        events.push(Event::Evicted { image, extent });
    }
    for (image, found) in &now.found {
        let Some(earlier) = before.found.get(image) else {
            continue;
        };
        for run in found.runs().flat_map(|run| earlier.runs_within(run)) {
            let states = table.read(|table| table.states(image, run.extent()));
            for (extent, state) in states {
                if matches!(state, PageState::Absent | PageState::Reserved) {
                    let image = image.clone();
                    events.push(Event::Fetched { image, extent });
                }
            }
        }
    }
    events
}

fn pages(extents: Vec<Extent>) -> PageSet {
    let mut pages = PageSet::new();
    for extent in extents {
        pages.insert(PageRun::covering(extent));
    }
    pages
}

impl Host {
    /// Waits until the planner has heard of all running VMs.
    pub(super) async fn wait_until_mapped(&self) {
        for _ in 0..200 {
            let live = self.instances.live();
            let known = self.memory.table().read(|table| {
                let mut names = live.iter().map(|one| one.vm().name);
                names.all(|name| table.vm_identity(&name).is_some())
            });
            if known {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }

    /// After a takeover, when nothing is being fetched yet: the table takes over what the
    /// kernel says. Returns every difference that there was.
    pub(super) fn reconcile(&self) -> Vec<Disagreement> {
        let mut truth = KernelTruth::default();
        for memory in self.domains.all() {
            for (image, _, spec) in memory.shared.files() {
                let key = SharedImage::new(memory.domain.clone(), image);
                let resident = memory.shared.resident(&image).unwrap_or_default();
                truth.resident.insert(key, (spec.image_bytes, resident));
            }
        }
        for instance in self.instances.live() {
            let devices = instance.devices();
            let images = devices.iter().skip(1).map(|one| one.image).collect();
            let name = VmName::from(instance.vm().name.as_str());
            truth.running.insert(name, images);
        }
        let report = self.memory.table().write(|table| table.reconcile(&truth));
        report.disagreements
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forelay_cache::mapping_table::{Arrival, MappingTable};
    use forelay_cache::{DeviceImage, Domain};
    use forelay_image::Digest;

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
        let found = pages(vec![Extent::new(0, 4096), Extent::new(65536, 4096)]);
        now.found.insert(image.clone(), found);
        let lost = Event::Evicted {
            image: image.clone(),
            extent: Extent::new(4096, 4096),
        };
        let first = corrections(&table, &Look::default(), &now);
        assert_eq!(first, std::slice::from_ref(&lost));
        let extent = Extent::new(65536, 4096);
        let second = corrections(&table, &now, &now);
        assert_eq!(second, [lost, Event::Fetched { image, extent }]);
    }
}
