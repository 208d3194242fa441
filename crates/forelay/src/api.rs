//! What the daemon and its clients say to each other: JSON over HTTP on a Unix socket.
//!
//! Fields are stable: new ones may be added, none changes its meaning. Times are seconds
//! (`_s`) or milliseconds since the epoch (`_ms`), sizes are bytes.

use std::path::PathBuf;

use forelay_guest_protocol::messages::BootSteps;
use forelay_guest_protocol::snapshot::Tier;
use forelay_image::Digest;
use forelay_image::snapshot::SnapshotOrigin;
use forelay_vm::Forward;
use serde::{Deserialize, Serialize};

/// Version of the API, the first part of every path.
pub const VERSION: &str = "v1";

/// An accelerator that is not known: no kernel has been listed yet.
pub const NOT_PROBED: &str = "not probed yet";

/// The daemon's state of health.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Health {
    /// Version of the daemon.
    pub version: String,
    /// Process that answers.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: f64,
    /// What VMs run under, or [`NOT_PROBED`].
    pub accelerator: String,
    /// What the daemon does without; empty if all is well.
    #[serde(default)]
    pub degraded: Vec<Degraded>,
    /// VMs that wait for bytes.
    #[serde(default)]
    pub waiting: Vec<WaitingVm>,
}

/// A VM that waits for bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WaitingVm {
    /// Its name.
    pub vm: String,
    /// What it waits for.
    #[serde(flatten)]
    pub wait: PendingFault,
}

/// Something that the daemon does without.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Degraded {
    /// What is missing.
    pub what: String,
    /// What is wrong with it.
    pub problem: String,
    /// Since when, milliseconds since the epoch.
    pub since_ms: i64,
}

/// A request to launch a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LaunchRequest {
    /// The manifest's text (TOML).
    pub manifest: String,
    /// A lock's text, to launch exactly what it pins; solved again if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<String>,
    /// Name of the instance; made from the profile if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How much to have in shared memory before the launch.
    #[serde(default)]
    pub prefetch: PrefetchMode,
}

/// A request to map a manifest's devices and fill shared memory ahead of a launch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PrefetchRequest {
    /// The manifest's text (TOML).
    pub manifest: String,
    /// A lock's text; solved again if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<String>,
    /// What to load.
    #[serde(default)]
    pub mode: PrefetchMode,
    /// Answer when it is loaded instead of when it is planned.
    #[serde(default)]
    pub wait: bool,
}

/// What a [`PrefetchRequest`] did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Prefetched {
    /// Profile.
    pub profile: String,
    /// Trust domain.
    pub domain: String,
    /// Devices that a VM of this manifest would have; the map image is not among them.
    pub devices: Vec<MapDevice>,
    /// Bytes that the plan wants in shared memory.
    pub planned_bytes: u64,
    /// Seconds from the request to the answer.
    pub took_s: f64,
}

/// How a launch fills shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrefetchMode {
    /// The forecast working set, in first-touch order, beside the launch.
    #[default]
    Forecast,
    /// The forecast working set, resident before the VMM starts.
    ForecastFirst,
    /// Nothing: every page is a demand fetch.
    None,
    /// All bytes of all components, resident before the VMM starts.
    Everything,
}

/// Where an instance is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// Resolving, composing, starting the VMM.
    Launching,
    /// The VMM runs; the guest has not mounted its image yet.
    Booting,
    /// The guest has mounted its image.
    Mounted,
    /// The guest says that its work is ready.
    Ready,
    /// The VMM lives and does not answer; `error` says how. It is tried again.
    Unreachable,
    /// Stopped as asked, or ended by itself with success.
    Stopped,
    /// Ended by an error; `error` says which.
    Failed,
}

impl VmState {
    /// True while a VMM process may exist.
    pub const fn is_live(self) -> bool {
        matches!(
            self,
            Self::Launching | Self::Booting | Self::Mounted | Self::Ready | Self::Unreachable
        )
    }
}

/// Whether a launch found its bytes in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LaunchMode {
    /// No working set was known or used.
    Cold,
    /// A forecast working set was prefetched.
    Predicted,
    /// All that was planned was resident already.
    Warm,
}

/// One instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Vm {
    /// Unique name on this host.
    pub name: String,
    /// The workload's name.
    pub profile: String,
    /// Owner; the trust domain is derived from it.
    pub owner: String,
    /// Trust domain.
    pub domain: String,
    /// State.
    pub state: VmState,
    /// Process id of the VMM, while there is one.
    pub pid: Option<u32>,
    /// Launch asked for, milliseconds since the epoch.
    pub launched_ms: i64,
    /// Port forwards, host ports as given.
    pub forwards: Vec<Forward>,
    /// Components in compose order.
    pub components: Vec<VmComponent>,
    /// Figures of the launch.
    pub launch: LaunchFigures,
    /// What it waited for in all its life so far.
    #[serde(default)]
    pub waits: Waits,
    /// What it has been waiting for at this moment for longer than a fetch takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<PendingFault>,
    /// Directory with sockets and logs.
    pub runtime_dir: PathBuf,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Exit status of the entrypoint, once it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_status: Option<i32>,
}

/// Bytes that a VM waits for; its vCPU stands still until they are there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PendingFault {
    /// Since when, milliseconds since the epoch. A daemon that took the VM over counts from
    /// then.
    pub since_ms: i64,
    /// For how long.
    pub waited_s: f64,
    /// Component that the bytes belong to.
    pub component: Option<String>,
    /// Its image.
    pub image: Digest,
    /// First byte in the image.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// What holds them up.
    pub culprit: WaitCulprit,
    /// What the last attempt failed with; absent while the first one has not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What holds up bytes that a VM waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitCulprit {
    /// The repository is unreachable, does not answer, or lacks them.
    Repository,
    /// The repository has other bytes than it should.
    Content,
    /// The disk cache does not answer.
    DiskCache,
    /// Something else; `error` says what.
    Other,
}

impl std::fmt::Display for WaitCulprit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Repository => "the repository",
            Self::Content => "the repository's content",
            Self::DiskCache => "the disk cache",
            Self::Other => "the daemon",
        })
    }
}

impl std::fmt::Display for PendingFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let component = self.component.as_deref().unwrap_or("its image");
        let Self {
            waited_s,
            len,
            offset,
            culprit,
            ..
        } = self;
        write!(
            f,
            "waits {waited_s:.1} s for {len} bytes of {component} at {offset}: {culprit}"
        )?;
        match &self.error {
            Some(error) => write!(f, " fails: {error}"),
            None => f.write_str(" has not answered"),
        }
    }
}

/// What a VM waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Waits {
    /// Faults that had to wait for bytes not in shared memory.
    pub demand_fetches: u64,
    /// Bytes they asked for.
    pub demand_bytes: u64,
    /// Sum of the times they waited.
    pub stall_s: f64,
    /// Why they had to wait.
    #[serde(default)]
    pub causes: WaitCauses,
}

/// Demand fetches of a VM by their cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitCauses {
    /// The launch's plan did not have these bytes.
    pub unforeseen: u64,
    /// The plan had them, they were not in shared memory when the launch was asked for, and
    /// they were not loaded in time (or there was no room).
    pub late: u64,
    /// They were in shared memory when the launch was asked for and were given back since.
    pub evicted: u64,
    /// They were in shared memory, and the kernel reclaimed them.
    pub reclaimed: u64,
}

/// A component of an instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmComponent {
    /// Name.
    pub name: String,
    /// Version.
    pub version: String,
    /// Component id.
    pub id: Digest,
    /// Image digest, the key of shared memory.
    pub image: Digest,
    /// Size of the image.
    pub image_bytes: u64,
    /// Attached while the VM was running.
    #[serde(default)]
    pub attached: bool,
    /// What attaching it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attach: Option<AttachFigures>,
    /// Files of it that the VM was not given when it was attached, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<String>,
}

/// Where the time of a hot attach went, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AttachFigures {
    /// From the request to the solved lock; shared by the components of one request.
    pub plan_s: f64,
    /// Making the component's file reachable in shared memory.
    pub map_s: f64,
    /// The VMM's part: backend and device.
    pub plug_s: f64,
    /// The guest kernel's part: from the plug until it has found the device.
    pub probe_s: f64,
    /// Mounting the component in the guest and showing its files: the guest kernel's part.
    #[serde(rename = "graft_s")]
    pub mount_s: f64,
    /// The guest's agent's own part of that.
    pub agent_s: f64,
    /// The rest of the guest's answer: its channel.
    pub channel_s: f64,
    /// Writing it down.
    pub note_s: f64,
}

/// What a launch cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LaunchFigures {
    /// Whether its bytes were there.
    pub mode: Option<LaunchMode>,
    /// The snapshot that the VM resumed from, if it did not boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<Tier>,
    /// Snapshots that it should have resumed from and did not, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshot_problems: Vec<String>,
    /// Solving the manifest, if no lock was given.
    pub solve_s: f64,
    /// Composing the map image and its devices.
    pub compose_s: f64,
    /// Devices and map image were set up before the launch was asked for.
    #[serde(default, rename = "premapped")]
    pub prepared: bool,
    /// From the request to the moment at which the VMM could be started.
    #[serde(default)]
    pub prepared_s: f64,
    /// From the request to the VMM answering on its monitor.
    pub vmm_started_s: f64,
    /// From the request to the guest having mounted its image.
    pub mounted_s: Option<f64>,
    /// From the request to `ready`.
    pub ready_s: Option<f64>,
    /// Where that time went.
    #[serde(default)]
    pub timings: LaunchTimings,
    /// Faults that had to wait for a byte that was not in shared memory.
    pub demand_fetches: u64,
    /// Bytes those faults asked for.
    pub demand_bytes: u64,
    /// Sum of the time those faults waited.
    pub stall_s: f64,
    /// Why they had to wait.
    #[serde(default)]
    pub demand_causes: WaitCauses,
    /// Bytes prefetched into shared memory for this launch.
    pub prefetched_bytes: u64,
    /// Compressed bytes read from the repository during the launch.
    pub repository_bytes: u64,
    /// Sum of the images' sizes.
    pub image_bytes: u64,
    /// Bytes of the map image.
    pub map_bytes: u64,
    /// Bytes of component images that the guest touched.
    pub touched_bytes: u64,
    /// What the VM does not have as its components have it, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// The steps of a launch in seconds, in the order in which they are taken; together they are
/// its `ready_s`. The guest's own steps are by its word and its clock, held to the time that
/// the host saw pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LaunchTimings {
    /// Understanding the manifest and solving it.
    pub solve_s: f64,
    /// Claiming the name and writing the launch down.
    pub request_s: f64,
    /// Making the images reachable in shared memory.
    pub map_s: f64,
    /// Asking what to prefetch, and for it.
    pub plan_s: f64,
    /// Composing the map image, extracting the kernel.
    pub compose_s: f64,
    /// Starting the VMM, until its monitor answers.
    pub vmm_s: f64,
    /// Restoring a snapshot, and plugging devices into it; 0 for a boot.
    pub restore_s: f64,
    /// Firmware, and the kernel until it has a clock.
    pub firmware_s: f64,
    /// The kernel, until it starts the guest's init.
    pub kernel_s: f64,
    /// Modules, and the devices of the root.
    pub devices_s: f64,
    /// Mounting the image.
    pub mount_s: f64,
    /// The writable overlay and what is mounted in it.
    pub overlay_s: f64,
    /// The network's configuration.
    pub network_s: f64,
    /// Starting the agent.
    pub agent_s: f64,
    /// Starting the entrypoint, or the image's own init.
    pub entrypoint_s: f64,
    /// What runs then, until it is ready and the host has heard so.
    pub ready_s: f64,
}

impl LaunchTimings {
    /// The steps with their names.
    pub fn steps(&self) -> [(&'static str, f64); 16] {
        [
            ("solve", self.solve_s),
            ("request", self.request_s),
            ("map", self.map_s),
            ("plan", self.plan_s),
            ("compose", self.compose_s),
            ("VMM", self.vmm_s),
            ("restore", self.restore_s),
            ("firmware", self.firmware_s),
            ("kernel", self.kernel_s),
            ("devices", self.devices_s),
            ("mount", self.mount_s),
            ("overlay", self.overlay_s),
            ("network", self.network_s),
            ("agent", self.agent_s),
            ("entrypoint", self.entrypoint_s),
            ("ready", self.ready_s),
        ]
    }

    /// Notes what the guest did: it was ready `ready_after_s` after its VMM answered, `ready_us`
    /// after its kernel started.
    pub fn note_guest(&mut self, steps: BootSteps, ready_us: u64, ready_after_s: f64) {
        let limit_us = (ready_after_s.max(0.0) * 1e6) as u64;
        let ready_us = ready_us.min(limit_us);
        let steps = steps.in_order(ready_us);
        let since = |from_us: u64, to_us: u64| to_us.saturating_sub(from_us) as f64 / 1e6;
        self.firmware_s = since(ready_us, limit_us);
        self.kernel_s = since(0, steps.kernel_us);
        self.devices_s = since(steps.kernel_us, steps.devices_us);
        self.mount_s = since(steps.devices_us, steps.mount_us);
        self.overlay_s = since(steps.mount_us, steps.overlay_us);
        self.network_s = since(steps.overlay_us, steps.network_us);
        self.agent_s = since(steps.network_us, steps.agent_us);
        self.entrypoint_s = since(steps.agent_us, steps.entrypoint_us);
        self.ready_s = since(steps.entrypoint_us, ready_us);
    }
}

/// A snapshot to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// The manifest's text (TOML).
    pub manifest: String,
    /// A lock's text; solved again if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<String>,
    /// How far its VM is to come; as far as the manifest says if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Tier>,
}

/// A snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its component's id.
    pub id: Digest,
    /// How far its VM had come.
    pub tier: Tier,
    /// Trust domain, which alone may use it.
    pub domain: String,
    /// Profile or kernel that it was made of.
    pub made_of: String,
    /// When, milliseconds since the epoch.
    pub made_ms: i64,
    /// Its memory image, the key of shared memory.
    pub image: Digest,
    /// Size of the memory image.
    pub image_bytes: u64,
    /// Bytes of it that are the state of devices.
    pub state_bytes: u64,
    /// Bytes on disk of all snapshots of the domain, which share what is the same in them.
    pub domain_stored_bytes: u64,
    /// All that a launch must have the same.
    pub origin: SnapshotOrigin,
    /// Launches that resumed from it since the daemon started.
    pub uses: u64,
    /// VMs that run on its memory.
    pub vms: Vec<String>,
    /// Why it is not used any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A command to run in the guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments.
    pub command: Vec<String>,
    /// End it after this many seconds.
    #[serde(default)]
    pub timeout_s: Option<f64>,
    /// The client sends its standard input; else it is empty. Needs an upgrade.
    #[serde(default)]
    pub stdin: bool,
}

/// The end of a program whose streams were sent as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecEnd {
    /// Exit status; 128 + signal if killed, 124 if its time was up, 126 or 127 if it could
    /// not be executed or does not exist.
    pub status: i32,
    /// Why it was not started, or was lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What the command did. Output that is too much or no text is an error.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExecResult {
    /// Exit status, as in [`ExecEnd`].
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error; also why it was not started.
    pub stderr: String,
}

/// A component to hot-attach or detach.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttachRequest {
    /// Name, optionally `name@range`.
    pub component: String,
}

/// Shared memory on this host.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct MemoryReport {
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

/// A touched extent of a component image.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Touch {
    /// Component image.
    pub image: Digest,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// First seen touched, milliseconds after the launch was asked for.
    pub first_touch_ms: u64,
}

/// The mapping table of one VM: guest file -> component -> where its bytes are now.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmMap {
    /// Instance.
    pub vm: String,
    /// Devices in slot order; the first is the map image.
    pub devices: Vec<MapDevice>,
    /// Files with data in a component, by guest path.
    pub files: Vec<MapFile>,
    /// Extents touched so far, in first-touch order.
    pub touches: Vec<Touch>,
}

/// One pmem device of a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MapDevice {
    /// Slot; 0 is the map image.
    pub slot: usize,
    /// Component name and version, or `map image`.
    pub component: String,
    /// Image digest.
    pub image: Digest,
    /// Host path that the VMM maps.
    pub path: PathBuf,
    /// Size of the image.
    pub image_bytes: u64,
    /// Bytes in shared memory.
    pub resident_bytes: u64,
    /// Bytes that this VM touched.
    pub touched_bytes: u64,
    /// Residency of the device in equal parts, from 0 (none) to 8 (all).
    pub bar: Vec<u8>,
}

/// One guest file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MapFile {
    /// Path in the guest.
    pub path: String,
    /// Device slot.
    pub slot: usize,
    /// First byte in the component image.
    pub offset: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// Bytes of it in shared memory.
    pub resident_bytes: u64,
    /// Bytes of it that this VM touched.
    pub touched_bytes: u64,
}

/// A component that a profile is expected to need.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForecastEntry {
    /// Profile.
    pub profile: String,
    /// Owner.
    pub owner: String,
    /// The running VM that may be given the component; absent for a profile's next launch.
    pub vm: Option<String>,
    /// Component name and version.
    pub component: String,
    /// Image digest.
    pub image: Digest,
    /// True if it is expected to be attached to the running VM, not launched with.
    pub attached: bool,
    /// Probability that it is needed within the horizon (`forecast.horizon_s`).
    pub probability: f64,
    /// Seconds until the expected need.
    pub expected_in_s: Option<f64>,
    /// Bytes of it that may be touched.
    pub bytes: u64,
    /// Of those, bytes in shared memory now.
    pub resident_bytes: u64,
    /// Of those, bytes in the host's disk cache; the rest is in the repository.
    pub disk_bytes: u64,
    /// Expected seconds that loading it ahead saves.
    pub seconds_saved: f64,
    /// Expected seconds saved per MiB, less for what is needed later: the order of the list.
    pub score: f64,
    /// Why, in words.
    pub reasons: Vec<String>,
    /// How forecasting does for the profile.
    pub control: SelfControl,
}

/// How forecasting does for a profile, by its own account.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SelfControl {
    /// Forecasts of "launches within ten minutes" judged, those of the last three days again at a restart.
    pub judged: u64,
    /// Their mean squared error.
    pub brier_score: f64,
    /// Reliability: mean probability told, share that came true, number of forecasts.
    pub reliability: Vec<(f64, f64, u64)>,
    /// Cold starts that forecasting cost more than the simpler rule; negative if it saves.
    pub regret_cold_starts: f64,
    /// Forecasting did harm here: nothing is loaded before a launch is asked for.
    pub fallen_back: bool,
    /// The configuration switched forecasting off.
    pub switched_off: bool,
}

/// What is known of a profile's past.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// Profile.
    pub profile: String,
    /// Owner.
    pub owner: String,
    /// Launches recorded.
    pub launches: u64,
    /// The last one, milliseconds since the epoch.
    pub last_launch_ms: Option<i64>,
    /// Share of launches that needed no demand fetch.
    pub warm_share: f64,
    /// Median seconds to ready.
    pub ready_p50_s: Option<f64>,
    /// Bytes of its working set.
    pub working_set_bytes: u64,
    /// How forecasting does for it.
    pub control: SelfControl,
}

/// An error as the API reports it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ApiError {
    /// What failed, why, and what to do.
    pub error: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_guests_steps_are_told_apart() {
        let steps = BootSteps {
            kernel_us: 1_000_000,
            devices_us: 1_300_000,
            mount_us: 1_310_000,
            overlay_us: 1_350_000,
            network_us: 1_360_000,
            agent_us: 1_370_000,
            entrypoint_us: 1_400_000,
        };
        let mut timings = LaunchTimings::default();
        timings.note_guest(steps, 1_900_000, 2.5);
        let told = timings.steps().map(|(_, s)| (s * 1e3).round());
        let expected = [
            0., 0., 0., 0., 0., 0., 0., 600., 1000., 300., 10., 40., 10., 10., 30., 500.,
        ];
        assert_eq!(told, expected);
    }

    proptest! {
        /// Whatever a guest says, no step is negative and they are what the host saw pass.
        #[test]
        fn a_guest_cannot_say_more_than_the_host_saw(
            said in any::<[u64; 7]>(),
            ready_us in any::<u64>(),
            after_s in 0.0..100.0f64,
        ) {
            let [kernel_us, devices_us, mount_us, overlay_us, network_us, agent_us, entrypoint_us] =
                said;
            let steps = BootSteps {
                kernel_us, devices_us, mount_us, overlay_us, network_us, agent_us, entrypoint_us,
            };
            let mut timings = LaunchTimings::default();
            timings.note_guest(steps, ready_us, after_s);
            let told = timings.steps();
            prop_assert!(told.iter().all(|(_, s)| *s >= 0.0));
            let sum: f64 = told.iter().map(|(_, s)| s).sum();
            prop_assert!((sum - after_s).abs() < 1e-5, "{sum} of {after_s}");
        }
    }
}
