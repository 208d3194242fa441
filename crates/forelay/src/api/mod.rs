//! What the daemon and its clients say to each other: JSON over HTTP on a Unix socket.
//!
//! Fields are stable: new ones may be added, none changes its meaning. Times are seconds
//! (`_s`) or milliseconds since the epoch (`_ms`), sizes are bytes.

mod events;
mod exec;
mod forecasts;
mod health;
mod launch;
mod maps;
mod memory;
mod snapshots;
mod vms;

pub use events::{EventKind, HostEvent};
pub use exec::{ExecEnd, ExecRequest, ExecResult, ExecTerminal};
pub use forecasts::{ForecastEntry, HistoryEntry, SelfControl};
pub use health::{
    ApiError, Degraded, Health, NOT_PROBED, PendingFault, WaitCulprit, WaitingVm, dashboard_name,
};
pub use launch::{
    LaunchFigures, LaunchMode, LaunchRequest, LaunchTimings, PrefetchMode, PrefetchRequest,
    Prefetched,
};
pub use maps::{MapDevice, MapFile, Touch, VmMap};
pub use memory::{
    ComponentMemory, DomainMemory, MemoryReport, MemorySource, Shortage, Takeover, Totals, VmMemory,
};
pub use snapshots::{Snapshot, SnapshotRequest};
pub use vms::{
    AttachFigures, AttachRequest, ForkRequest, Forked, Vm, VmComponent, VmState, WaitCauses, Waits,
};
