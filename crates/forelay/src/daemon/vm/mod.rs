//! VMs that exist: their registry, supervision and hot attach.

pub(in crate::daemon) mod attach;
pub(in crate::daemon) mod directory;
pub(in crate::daemon) mod registry;
pub(in crate::daemon) mod supervise;
