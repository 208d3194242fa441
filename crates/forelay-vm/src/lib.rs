//! Running VMs: descriptions, VMM drivers, lifecycle, the guest channel.
//!
//! ```text
//! VmSpec --VmmDriver::launch--> VmHandle --exec, attach, stop--> guest (channel)
//!                                  |      --hot-plug, quit-----> VMM   (VmControl)
//!                                  +------- reattach(runtime_dir) by the next daemon
//! ```
//! A VM outlives the daemon that started it: the VMM owns the server end of every socket
//! (VMM monitor, guest channel, console), and `vm-state.json` in the runtime directory says
//! what a successor needs. Nothing here kills a VM because a handle is dropped.
//!
//! This crate knows neither components nor shared memory: it is given files and tells the
//! VMM to map them. How the VMM process is confined is decided by the caller through
//! [`spec::Wrap`] (seccomp, session) and [`confined::Confined`] (user, namespaces).

#![forbid(unsafe_code)]

pub mod accelerator;
pub mod channel;
pub mod confined;
pub mod driver;
pub mod exec;
pub mod handle;
pub mod kernel;
pub mod lifecycle;
pub mod lines;
pub mod logs;
pub mod process;
pub mod qemu;
pub mod saved;
pub mod scratch;
pub mod snapshot;
pub mod spec;
pub mod state;
pub mod stray;

pub use accelerator::{Accelerator, Probe, probe_accelerator};
pub use confined::{Confined, VmmNeeds};
pub use driver::{AttachError, Detachment, LaunchError, ReattachError, VmmDriver};
pub use exec::{ExecEvent, Execution};
pub use handle::{HotAttached, ProgramOutput, VmError, VmHandle};
pub use lifecycle::{Cause, Ended, Moment, Phase, Progress};
/// Logs in the runtime directory of a VM: its console, and what its VMM says.
pub const LOG_FILES: [&str; 2] = ["console.log", qemu::LOG_FILE];

/// Files that a launched VM may leave in its runtime directory.
pub const RUNTIME_FILES: [&str; 9] = [
    state::STATE_FILE,
    state::UNFINISHED_STATE_FILE,
    "console.log",
    qemu::LOG_FILE,
    qemu::command_line::MONITOR_SOCKET,
    qemu::command_line::CHANNEL_SOCKET,
    qemu::command_line::CONSOLE_SOCKET,
    qemu::migration::STATE_SOCKET,
    qemu::saved::DEVICES_FILE,
];

pub use saved::{SavedMachine, SavedVm};
pub use snapshot::SnapshotError;
pub use spec::{
    Boot, Disk, DiskFormat, Forward, GuestMemory, PmemDevice, Reach, Upper, VmSpec, Wrap,
};
