//! `vm-state.json`: what the next daemon needs to take a VM over.
//!
//! Written before the launch is reported and after each hot-plug, always by rename, so a
//! reader sees a whole file. The file is host-private; the guest cannot reach it.
//!
//! Not a part of the daemon's record of the VM (`instance.json`), though both name its devices
//! and ports: this crate takes a VMM over without knowing what runs in it, and what it needs
//! for that must be on disk at other moments (before the guest is heard of, and between a plug
//! and its answer) than a daemon's record is whole.

use std::io;
use std::path::{Path, PathBuf};

use forelay_guest_protocol::snapshot::Tier;
use forelay_host::atomic_write;
use serde::{Deserialize, Serialize};

use crate::process::ProcessId;
use crate::qemu::command_line::HotplugBus;
use crate::spec::{Forward, PmemDevice};

/// Name of the file in the runtime directory.
pub const STATE_FILE: &str = "vm-state.json";
/// The file while it is written.
pub const UNFINISHED_STATE_FILE: &str = "vm-state.json.new";

/// A launched VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// Name of the VM.
    pub name: String,
    /// Kind of VMM.
    pub driver: String,
    /// The VMM's process.
    pub process: ProcessId,
    /// The VMM's user, if it has one of its own.
    #[serde(default)]
    pub user: Option<u32>,
    /// When it was launched, milliseconds since the epoch.
    pub launched_ms: u64,
    /// Accelerator in use.
    pub accelerator: String,
    /// What the VMM's program said of its version; empty for VMs of earlier versions.
    #[serde(default)]
    pub vmm: String,
    /// Serial console log.
    pub console_log: PathBuf,
    /// pmem devices from the launch.
    pub pmem: Vec<PmemDevice>,
    /// Ports.
    pub forwards: Vec<Forward>,
    /// Where its boot, or its maker's, was to be held for a snapshot.
    #[serde(default)]
    pub hold: Option<Tier>,
    /// Slots that devices of the launch have there, from the first on.
    #[serde(default)]
    pub launch_slots: u8,
    /// Where it takes more of them.
    #[serde(default)]
    pub hotplug_bus: HotplugBus,
    /// pmem devices plugged in since, with their slots.
    pub hotplugged: Vec<Hotplugged>,
    /// Its devices are such that it can be saved while it runs; VMs of earlier versions cannot.
    #[serde(default)]
    pub can_be_saved: bool,
}

/// A hot-plugged device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hotplugged {
    /// The device.
    pub device: PmemDevice,
    /// Its PCI slot.
    pub slot: u8,
    /// Detached by the guest, but the VMM could not unplug it.
    pub retained: bool,
}

impl VmState {
    /// Reads the state file of a runtime directory.
    pub fn read(runtime_dir: &Path) -> io::Result<Self> {
        let bytes = std::fs::read(runtime_dir.join(STATE_FILE))?;
        serde_json::from_slice(&bytes).map_err(io::Error::other)
    }

    /// Writes it.
    pub fn write(&self, runtime_dir: &Path) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        atomic_write(&runtime_dir.join(STATE_FILE), &text).map(drop)
    }
}
