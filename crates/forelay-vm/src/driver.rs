//! What a VMM driver must do. One implementation so far: [`crate::qemu::QemuDriver`].
//!
//! Order of calls: `launch` once for each VM; later, possibly from another process,
//! `reattach`; the [`VmControl`] inside the handle is used until the VMM's process has ended.
//! A driver keeps nothing in memory that `reattach` could not read from the runtime
//! directory.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;

use crate::channel::ChannelError;
use crate::handle::VmHandle;
use crate::lifecycle::Ended;
use crate::qemu::QmpError;
use crate::saved::SavedVm;
use crate::snapshot::SnapshotError;
use crate::spec::{PmemDevice, VmSpec};
use crate::state::VmState;

/// A kind of VMM.
#[async_trait]
pub trait VmmDriver: Send + Sync {
    /// Name for people: `qemu`.
    fn name(&self) -> &'static str;

    /// The command that `launch` would run, program first.
    async fn command_line(&self, spec: &VmSpec) -> Result<Vec<OsString>, LaunchError>;

    /// Starts the VMM; returns when it runs, not when the guest does.
    async fn launch(&self, spec: &VmSpec) -> Result<VmHandle, LaunchError>;

    /// Takes over a VM that an earlier process launched.
    async fn reattach(&self, runtime_dir: &Path) -> Result<VmHandle, ReattachError>;
}

/// A running VMM.
#[async_trait]
pub trait VmControl: Send + Sync {
    /// Hot-plugs a pmem device; nothing happens if a device of this id and path is there.
    async fn attach_pmem(&self, device: &PmemDevice) -> Result<(), AttachError>;

    /// Takes a pmem device away that the guest no longer uses.
    async fn detach_pmem(&self, id: &str) -> Result<Detachment, AttachError>;

    /// Ids of hot-plugged devices.
    async fn hotplugged(&self) -> Vec<String>;

    /// Stops the guest for good and returns the state of its devices; its memory stays in
    /// the file of [`crate::GuestMemory::Shared`].
    async fn save(&self) -> Result<Vec<u8>, SnapshotError>;

    /// Gives a VMM that waits for it a state that [`Self::save`] returned, and lets the guest
    /// run.
    async fn restore(&self, state: &[u8]) -> Result<(), SnapshotError>;

    /// Stops the guest's CPUs; its clock stands still meanwhile.
    async fn pause(&self) -> Result<(), AttachError>;

    /// Lets them run on.
    async fn run_on(&self) -> Result<(), AttachError>;

    /// Makes the VMM that of another VM: with its ports, its state file in `runtime_dir`. Its
    /// sockets are there already.
    async fn rename(&self, state: VmState, runtime_dir: &Path) -> Result<(), AttachError>;

    /// Whether the guest's CPUs stand still.
    async fn is_paused(&self) -> Result<bool, QmpError>;

    /// Stops the guest's CPUs and returns all of the VM but its memory.
    async fn save_whole(&self) -> Result<SavedVm, SnapshotError>;

    /// Gives a VMM that waits for it a state that [`Self::save_whole`] returned.
    async fn restore_whole(&self, state: &[u8]) -> Result<(), SnapshotError>;

    /// Hot-plugs all devices of a launch, the scratch disk with them if there is one.
    async fn plug_all(
        &self,
        devices: &[PmemDevice],
        scratch: Option<&Path>,
    ) -> Result<(), AttachError>;

    /// Tells the VMM to end without asking the guest.
    async fn quit(&self) -> Result<(), AttachError>;

    /// Why the VMM ended, if it said so: waits until all that it said is read.
    async fn last_words(&self) -> Option<crate::lifecycle::Cause>;
}

/// What became of a detached device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detachment {
    /// Gone from the VM.
    Removed,
    /// The VMM cannot unplug this kind of device: it stays, unused by the guest, until the VM
    /// ends; its pages can be evicted. Attaching the same component again uses it.
    Retained,
}

/// Why a VM could not be launched.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The description makes no sense.
    #[error("VM {name}: {reason}")]
    Spec {
        /// The VM.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A file that the VM needs is missing or unreadable.
    #[error("VM {name}: {}", path.display())]
    File {
        /// The VM.
        name: String,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VMM could not be started.
    #[error("cannot start {program}: install it or set its path")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// The VMM ended before it could be talked to.
    #[error("VM {name}: the VMM did not start ({ended}): {output}")]
    Died {
        /// The VM.
        name: String,
        /// How it ended.
        ended: Ended,
        /// The end of what it printed.
        output: String,
    },
    /// The VMM's monitor did not answer.
    #[error("VM {name}: the VMM's monitor")]
    Monitor {
        /// The VM.
        name: String,
        /// Why.
        source: crate::qemu::QmpError,
    },
    /// The scratch disk could not be made.
    #[error("VM {name}: scratch disk")]
    Scratch {
        /// The VM.
        name: String,
        /// Why.
        source: crate::scratch::ScratchError,
    },
}

/// Why a VM could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum ReattachError {
    /// No readable state file.
    #[error("no VM state in {}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The VMM's process has ended meanwhile.
    #[error("VM {name} has ended")]
    Ended {
        /// The VM.
        name: String,
    },
    /// The process could not be held or its sockets not reached.
    #[error("VM {name}: {what}")]
    Connect {
        /// The VM.
        name: String,
        /// What failed.
        what: String,
        /// Why.
        source: io::Error,
    },
}

/// Why a hot-plug or hot-unplug failed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The device description makes no sense.
    #[error("{0}")]
    Device(String),
    /// No free slot.
    #[error("the VM has no free device slot: {used} hot-plugged devices are the most")]
    NoSlot {
        /// Hot-plugged devices.
        used: usize,
    },
    /// No such device.
    #[error("no hot-plugged device {0:?}")]
    Unknown(String),
    /// The VMM refused or did not answer.
    #[error("the VMM's monitor")]
    Monitor(#[from] crate::qemu::QmpError),
    /// The state file could not be written.
    #[error("the VM's state file")]
    State(#[source] io::Error),
    /// A port of the host could not be led into the guest.
    #[error("port {port} of the host: {text}")]
    Forward {
        /// The port.
        port: u16,
        /// The VMM's words.
        text: String,
    },
    /// The guest refused or did not answer; the device has been unplugged if possible.
    #[error(transparent)]
    Guest(#[from] ChannelError),
}
