//! Launches: what is asked for, and what they cost.

use forelay_guest_protocol::messages::BootSteps;
use forelay_guest_protocol::snapshot::Tier;
use serde::{Deserialize, Serialize};

use super::{MapDevice, WaitCauses};

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

/// What a launch cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LaunchFigures {
    /// Whether its bytes were there.
    pub mode: Option<LaunchMode>,
    /// The snapshot that the VM resumed from, if it did not boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed: Option<Tier>,
    /// The VMM that it resumed in was started before the launch was asked for.
    #[serde(default)]
    pub stood_by: bool,
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
    /// Looking for a snapshot to resume from.
    pub find_s: f64,
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
    pub fn steps(&self) -> [(&'static str, f64); 17] {
        [
            ("solve", self.solve_s),
            ("request", self.request_s),
            ("find", self.find_s),
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
            0., 0., 0., 0., 0., 0., 0., 0., 600., 1000., 300., 10., 40., 10., 10., 30., 500.,
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
