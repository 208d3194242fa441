//! Who pays for shared memory: `forelay memory`, and the same for those who look often.
//!
//! `forelay memory` is told from the kernel: a mapping table is built from what it says at
//! this moment (resident pages of the files, pages in the VMMs' page tables, locks), and
//! `forelay_cache::accounting` sums it up. A look into the page tables costs some 10 us for
//! each device of each VM; where there are many, and for metrics and the dashboard, the
//! planner's table says it, which the kernel corrects every two seconds. That is never held
//! for longer than a few images take.
//!
//! Invariant: charges of VMs plus unclaimed bytes are the resident bytes, exactly.

use std::collections::HashMap;
use std::sync::Arc;

use forelay_cache::accounting::{Accountant, Accounting, ImageAccount, account};
use forelay_cache::mapping_table::{Arrival, MappingTable, Phase};
use forelay_cache::{DeviceImage, Domain, SharedImage};
use forelay_image::{Digest, Extent, PAGE_BYTES};
use forelay_memory::observe::{self, FileIdentity};
use forelay_memory::pressure::Probe;
use forelay_store::Store;
use parking_lot::Mutex;

use crate::api;
use crate::daemon::error::HostError;
use crate::daemon::launch::prepared::Preparations;
use crate::daemon::memory::domains::{DomainMemory, Domains};
use crate::daemon::memory::planner::PlannerHandle;
use crate::daemon::order::DeviceRecord;
use crate::daemon::vm::instance::Instance;
use crate::daemon::vm::registry::VmRegistry;
use crate::host_stats::HostStats;

/// Devices of VMs that are looked at in page tables while a client waits.
const MOST_LOOKED_AT: usize = 1_000;

/// What is known of an image by its devices.
#[derive(Clone, Debug)]
struct Label {
    component: String,
    /// It is a snapshot's memory.
    snapshot: bool,
}

/// Tells what shared memory is used for.
pub struct MemoryAccounts {
    pub store: Store,
    pub domains: Arc<Domains>,
    pub memory: Arc<PlannerHandle>,
    pub registry: Arc<VmRegistry>,
    pub preparations: Arc<Preparations>,
    /// How this daemon took over from an earlier one.
    pub takeover: Arc<Mutex<Option<api::Takeover>>>,
    /// Knows the last account of the mapping table.
    pub accountant: Mutex<Accountant>,
}

impl MemoryAccounts {
    /// What components take in memory, and who uses them.
    pub async fn report(self: &Arc<Self>) -> Result<api::MemoryReport, HostError> {
        let this = Arc::clone(self);
        let work = tokio::task::spawn_blocking(move || {
            let live = this.registry.live();
            let devices = live.iter().map(|one| one.read(|vm| vm.devices.len()));
            match devices.sum::<usize>() <= MOST_LOOKED_AT {
                true => this.report_of(&this.look(&live), api::MemorySource::Kernel),
                false => this.told_by_table(),
            }
        });
        work.await.map_err(HostError::failed)
    }

    /// The same as the mapping table has it. May take a moment: call it off the async threads.
    pub fn told_by_table(&self) -> api::MemoryReport {
        // Who looks at the same time waits, and finds it made.
        let accounting = self.accountant.lock().account(self.memory.table());
        self.report_of(&accounting, api::MemorySource::Table)
    }

    fn report_of(&self, accounting: &Accounting, source: api::MemorySource) -> api::MemoryReport {
        let status = self.memory.status();
        let sample = Probe::new().sample().unwrap_or_default();
        let host = &accounting.host;
        let labels = self.labels();
        let domains: Vec<_> = accounting
            .domains
            .keys()
            .map(|domain| self.domain_report(domain, accounting, &labels))
            .collect();
        let components = domains.iter().flat_map(|one| &one.components);
        let of_snapshots = components.clone().filter(|one| one.snapshot);
        let snapshot_resident_bytes = of_snapshots.map(|one| one.resident_bytes).sum();
        let prefetched_unused_bytes = components.map(|one| one.prefetched_unused_bytes).sum();
        let standbys = self.preparations.standby_pids();
        let usage = standbys
            .iter()
            .filter_map(|pid| HostStats::default().usage(*pid));
        api::MemoryReport {
            source,
            standby_vmms: standbys.len(),
            standby_private_bytes: usage.map(|one| one.memory_bytes).sum(),
            budget_bytes: status.budget_bytes,
            resident_bytes: host.resident_bytes,
            pinned_bytes: host.pinned_bytes,
            prefetched_unused_bytes,
            charged_bytes: host.charged_bytes,
            unclaimed_bytes: host.unclaimed_bytes,
            snapshot_resident_bytes,
            mapped_sum_bytes: accounting.vms.iter().map(|vm| vm.resident_bytes).sum(),
            available_bytes: sample.mem_available_bytes,
            cgroup_usage_bytes: sample.cgroup.map(|cgroup| cgroup.usage_bytes),
            pressure: format!("{:?}", status.level).to_lowercase(),
            prefetch_paused: status.paused,
            prepared_launches: self.preparations.len(),
            domains,
            vms: accounting.vms.iter().map(vm_report).collect(),
            takeover: self.takeover.lock().clone(),
            shortages: self.memory.shortages(),
            totals: self.totals(),
        }
    }

    /// The account of what the kernel says now.
    fn look(&self, live: &[Arc<Instance>]) -> Accounting {
        let mut table = MappingTable::new();
        for memory in self.domains.all() {
            add_resident(&mut table, &memory);
            for instance in live {
                if instance.domain() == memory.domain {
                    add_vm(&mut table, &memory.domain, instance);
                }
            }
        }
        account(&table)
    }

    fn domain_report(
        &self,
        domain: &Domain,
        accounting: &Accounting,
        labels: &HashMap<Digest, Label>,
    ) -> api::DomainMemory {
        let images = accounting.images.iter();
        let components = images
            .filter(|one| one.image.domain == *domain)
            .map(|one| self.component_report(one, labels.get(&one.image.image)))
            .collect();
        api::DomainMemory {
            domain: domain.as_str().to_owned(),
            components,
        }
    }

    fn component_report(
        &self,
        account: &ImageAccount,
        label: Option<&Label>,
    ) -> api::ComponentMemory {
        let image = &account.image;
        // The kernel does not know what was prefetched; the table does.
        let (image_bytes, unused) = self.memory.table().read(|table| {
            let image_bytes = table.image_bytes(image).unwrap_or(0);
            let whole = Extent::new(0, image_bytes);
            (image_bytes, table.prefetched_unused_bytes(image, whole))
        });
        api::ComponentMemory {
            snapshot: label.is_some_and(|label| label.snapshot),
            component: label.map_or_else(|| image.image.short(), |label| label.component.clone()),
            image: image.image,
            image_bytes: image_bytes
                .max(account.mapped_bytes / u64::from(account.mapped_by.max(1))),
            resident_bytes: account.resident_bytes,
            pinned_bytes: account.pinned_bytes,
            prefetched_unused_bytes: unused,
            mapped_by: account.mapped_by as usize,
            mapped_bytes: account.resident_bytes - account.unclaimed_bytes,
            shared_bytes: account.shared_bytes,
        }
    }

    /// What images are called, by the devices of the VMs that have or had them, and what snapshots'
    /// are that none has yet.
    fn labels(&self) -> HashMap<Digest, Label> {
        let mut labels = HashMap::new();
        let mut add = |device: &DeviceRecord| {
            let known = labels.entry(device.image);
            known.or_insert_with(|| Label {
                component: device.component.clone(),
                snapshot: device.memory,
            });
        };
        for instance in self.registry.all() {
            instance.read(|vm| vm.devices.iter().for_each(&mut add));
        }
        for memory in self.domains.all() {
            for (image, component) in &*memory.snapshots.lock() {
                let component = component.clone();
                let snapshot = true;
                labels.entry(*image).or_insert(Label {
                    component,
                    snapshot,
                });
            }
        }
        labels
    }

    /// Counters since the daemon's start.
    pub fn totals(&self) -> api::Totals {
        let fetched = self.store.scheduler().counters();
        let waits = self.domains.attribution().total.figures();
        let plan = self.memory.status().counters;
        let mut totals = api::Totals {
            demand_fetches: waits.fetches,
            demand_bytes: waits.bytes,
            demand_causes: waits.causes,
            demand_cause_bytes: waits.cause_bytes,
            stall_s: waits.stall_ns as f64 / 1e9,
            repository_bytes: fetched.repository_bytes(),
            repository_requests: fetched.demand_requests + fetched.prefetch_requests,
            budget_evicted_bytes: plan.budget_evicted_bytes,
            pressure_evicted_bytes: plan.pressure_evicted_bytes,
            refetched_bytes: plan.refetched_bytes,
            reclaimed_bytes: plan.reclaimed_bytes,
            ..api::Totals::default()
        };
        for memory in self.domains.all() {
            let counters = memory.shared.counters();
            totals.pushed_bytes += counters.pushed_bytes;
            totals.pushed_used_bytes += counters.pushed_used_bytes;
            totals.evicted_bytes += counters.evicted_bytes;
        }
        totals
    }
}

fn vm_report(vm: &forelay_cache::accounting::VmAccount) -> api::VmMemory {
    api::VmMemory {
        vm: vm.vm.as_str().to_owned(),
        domain: vm.domain.as_str().to_owned(),
        mapped_bytes: vm.resident_bytes,
        shared_bytes: vm.shared_bytes,
        charged_bytes: vm.charged_bytes,
    }
}

/// Adds a domain's images with the pages that the kernel holds and locks.
fn add_resident(table: &mut MappingTable, memory: &DomainMemory) {
    for (image, spec) in memory.shared.files() {
        let device = DeviceImage {
            image,
            image_bytes: spec.image_bytes,
        };
        if table.add_image(&memory.domain, &device).is_err() {
            continue;
        }
        let key = SharedImage::new(memory.domain.clone(), image);
        // An image whose pages cannot be looked at shows none.
        for extent in inside(memory.shared.resident(&image).unwrap_or_default(), &device) {
            let _ = table.complete_fetch(&key, extent, Arrival::Demand);
        }
        for extent in inside(memory.shared.pinned(&image).unwrap_or_default(), &device) {
            let _ = table.pin(&key, extent);
        }
    }
}

/// Adds a VM with the pages that its VMM has in its page tables.
fn add_vm(table: &mut MappingTable, domain: &Domain, instance: &Instance) {
    let profile = instance.read(|vm| vm.of.profile.as_str().into());
    let name = instance.name().into();
    let records = instance.devices();
    let devices: Vec<DeviceImage> = records
        .iter()
        .skip(1)
        .map(|one| DeviceImage {
            image: one.image,
            image_bytes: one.image_bytes,
        })
        .collect();
    if table
        .map(&name, domain, &profile, &devices, Phase::Running)
        .is_err()
    {
        return;
    }
    let Some(pid) = instance.pid() else { return };
    for (record, device) in records.iter().skip(1).zip(&devices) {
        // A VMM that ends meanwhile has no pages.
        let touched = FileIdentity::of(&record.path)
            .ok()
            .and_then(|file| observe::touched(pid, file).ok());
        for extent in inside(touched.unwrap_or_default(), device) {
            let _ = table.touch(&name, &record.image, extent);
        }
    }
}

/// Extents without the padding behind the image's end.
fn inside(extents: Vec<Extent>, device: &DeviceImage) -> impl Iterator<Item = Extent> {
    let whole = Extent::new(0, device.image_bytes.next_multiple_of(PAGE_BYTES));
    extents
        .into_iter()
        .filter_map(move |extent| extent.intersection(&whole))
}
