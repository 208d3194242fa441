//! VMs that exist: their registry, supervision, use of the host, and hot attach.

pub(super) mod attach;
pub(super) mod directory;
pub(super) mod instance;
pub(super) mod launch_figures;
pub(super) mod logs;
pub(super) mod pause;
pub(super) mod registry;
pub(super) mod service;
pub(super) mod supervise;
pub(super) mod usage;
pub(super) mod vmm_cgroup;
pub(super) mod vmm_groups;
