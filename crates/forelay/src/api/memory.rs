//! Shared memory: who uses it and who pays for it.

use forelay_image::Digest;
use serde::{Deserialize, Serialize};

use super::WaitCauses;

/// Who says what is in memory and what VMs have touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemorySource {
    /// The kernel, at this moment.
    #[default]
    Kernel,
    /// The mapping table, which the kernel corrects every two seconds.
    Table,
}

/// Shared memory on this host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct MemoryReport {
    /// Who says so: the kernel, unless VMs have so many devices that asking it takes long.
    #[serde(default)]
    pub source: MemorySource,
    /// Bytes that components may take.
    pub budget_bytes: u64,
    /// Bytes that components take now.
    pub resident_bytes: u64,
    /// Of those, pinned.
    pub pinned_bytes: u64,
    /// Of those, prefetched and not touched yet.
    pub prefetched_unused_bytes: u64,
    /// Charged to VMs, each its proportional share.
    pub charged_bytes: u64,
    /// Resident and mapped by no VM; with what is charged this is all that is resident.
    pub unclaimed_bytes: u64,
    /// Of what is resident, bytes of snapshots' memory images.
    #[serde(default)]
    pub snapshot_resident_bytes: u64,
    /// Sum over VMs of what they map, as if nothing were shared.
    pub mapped_sum_bytes: u64,
    /// Host's available memory.
    pub available_bytes: u64,
    /// Memory charged to the daemon's cgroup, page cache included.
    pub cgroup_usage_bytes: Option<u64>,
    /// `plenty`, `low` or `critical`.
    pub pressure: String,
    /// Prefetching waits until memory is plentiful again.
    pub prefetch_paused: bool,
    /// Likely launches whose devices and map image are set up.
    #[serde(default, rename = "premapped_launches")]
    pub prepared_launches: usize,
    /// VMMs that were started before a launch of theirs was asked for.
    #[serde(default)]
    pub standby_vmms: usize,
    /// Private memory of those.
    #[serde(default)]
    pub standby_private_bytes: u64,
    /// Per trust domain.
    pub domains: Vec<DomainMemory>,
    /// Per VM: its proportional share.
    pub vms: Vec<VmMemory>,
    /// What the mapping table looked like after the takeover from an earlier daemon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub takeover: Option<Takeover>,
    /// The last shortages that are over, oldest first.
    #[serde(default)]
    pub shortages: Vec<Shortage>,
    /// Since the daemon's start.
    pub totals: Totals,
}

/// The mapping table rebuilt from its journal, against what the kernel says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Takeover {
    /// VMs that the journal says run.
    pub journalled_vms: usize,
    /// Launches that had not started; they are gone.
    pub unstarted: usize,
    /// Records of the journal that contradicted those before them.
    pub refused_records: usize,
    /// Bytes of the journal that were torn.
    pub dropped_bytes: u64,
    /// VMs that run.
    pub running_vms: usize,
    /// Bytes that were in memory; the journal leaves it to the kernel to say which.
    pub resident_bytes: u64,
    /// Bytes whose pins of the earlier daemon were taken off.
    pub unpinned_bytes: u64,
    /// Where journal and kernel disagreed on VMs and their devices; the kernel is right.
    pub disagreements: Vec<String>,
}

/// A time in which bytes had to leave because memory was short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Shortage {
    /// From the sample that found it until all that was asked for had left, in seconds.
    pub took_s: f64,
    /// Bytes that were asked to leave.
    pub evicted_bytes: u64,
}

/// Shared memory of a trust domain.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DomainMemory {
    /// Name.
    pub domain: String,
    /// Per component image.
    pub components: Vec<ComponentMemory>,
}

/// Shared memory of a component in one domain.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ComponentMemory {
    /// Name and version.
    pub component: String,
    /// Image digest.
    pub image: Digest,
    /// Size of the image.
    pub image_bytes: u64,
    /// Bytes in memory.
    pub resident_bytes: u64,
    /// Bytes pinned.
    pub pinned_bytes: u64,
    /// Bytes prefetched and not touched yet.
    pub prefetched_unused_bytes: u64,
    /// It is a snapshot's memory, not a component's files.
    #[serde(default)]
    pub snapshot: bool,
    /// Number of VMs that map it.
    pub mapped_by: usize,
    /// Bytes mapped by at least one VM.
    pub mapped_bytes: u64,
    /// Bytes mapped by two VMs or more.
    pub shared_bytes: u64,
}

/// A VM's share of shared memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmMemory {
    /// Instance.
    pub vm: String,
    /// Its trust domain.
    pub domain: String,
    /// Bytes of component images that it maps.
    pub mapped_bytes: u64,
    /// Of those, mapped by another VM too.
    pub shared_bytes: u64,
    /// Its proportional share of them: each page divided by the VMs that map it.
    pub charged_bytes: u64,
}

/// Counters since the daemon's start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Faults that had to wait for bytes.
    pub demand_fetches: u64,
    /// Bytes they asked for.
    pub demand_bytes: u64,
    /// Why VMs had to wait.
    #[serde(default)]
    pub demand_causes: WaitCauses,
    /// Bytes that they asked for, by the same causes.
    #[serde(default)]
    pub demand_cause_bytes: WaitCauses,
    /// Bytes pushed ahead of any touch.
    pub pushed_bytes: u64,
    /// Of those, bytes that a VM touched later.
    pub pushed_used_bytes: u64,
    /// Time that faults waited.
    pub stall_s: f64,
    /// Compressed bytes read from the repository.
    pub repository_bytes: u64,
    /// Requests made to the repository.
    pub repository_requests: u64,
    /// Bytes evicted.
    pub evicted_bytes: u64,
    /// Asked to leave to stay within the budget.
    pub budget_evicted_bytes: u64,
    /// Asked to leave at the critical level.
    pub pressure_evicted_bytes: u64,
    /// Evicted, and soon after fetched again because a VM wanted it.
    pub refetched_bytes: u64,
    /// Reclaimed by the kernel, unasked.
    #[serde(default)]
    pub reclaimed_bytes: u64,
}
