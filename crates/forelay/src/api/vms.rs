//! VMs: their state, components and waits.

use std::path::PathBuf;

use forelay_image::Digest;
use forelay_vm::Forward;
use serde::{Deserialize, Serialize};

use super::{LaunchFigures, PendingFault};

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
    /// Its CPUs stand still, as asked.
    Paused,
    /// Kept as a snapshot of its own; it has no VMM and takes no memory.
    Hibernated,
    /// The VMM lives and does not answer; `error` says how. It is tried again.
    Unreachable,
    /// Stopped as asked, or ended by itself with success.
    Stopped,
    /// Ended by an error; `error` says which.
    Failed,
}

impl VmState {
    /// All states, in the order of a life.
    pub const ALL: [Self; 9] = [
        Self::Launching,
        Self::Booting,
        Self::Mounted,
        Self::Ready,
        Self::Paused,
        Self::Hibernated,
        Self::Unreachable,
        Self::Stopped,
        Self::Failed,
    ];

    /// As in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Launching => "launching",
            Self::Booting => "booting",
            Self::Mounted => "mounted",
            Self::Ready => "ready",
            Self::Paused => "paused",
            Self::Hibernated => "hibernated",
            Self::Unreachable => "unreachable",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }

    /// True while a VMM process may exist.
    pub const fn is_live(self) -> bool {
        matches!(
            self,
            Self::Launching
                | Self::Booting
                | Self::Mounted
                | Self::Ready
                | Self::Paused
                | Self::Unreachable
        )
    }

    /// True when there is nothing left of it to go on with.
    pub const fn has_ended(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed)
    }
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
    /// The VM that it is a fork of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forked_from: Option<String>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Exit status of the entrypoint, once it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_status: Option<i32>,
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

/// Demand fetches by their cause.
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

impl WaitCauses {
    /// The causes with their names.
    pub const fn named(&self) -> [(&'static str, u64); 4] {
        [
            ("unforeseen", self.unforeseen),
            ("late", self.late),
            ("evicted", self.evicted),
            ("reclaimed", self.reclaimed),
        ]
    }
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

/// A component to hot-attach or detach.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AttachRequest {
    /// Name, optionally `name@range`.
    pub component: String,
}

/// Clones to make of a running VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ForkRequest {
    /// How many.
    #[serde(default = "one")]
    pub count: u32,
    /// Name of the clone, with a number behind it if there are several; made from the VM's own if
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

const fn one() -> u32 {
    1
}

/// What a fork did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Forked {
    /// The clones.
    pub vms: Vec<Vm>,
    /// Clones that could not be made, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<String>,
    /// How long the VM stood still.
    pub held_s: f64,
    /// From the request until the clones went on.
    pub took_s: f64,
}
