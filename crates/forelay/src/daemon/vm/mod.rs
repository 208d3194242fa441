//! VMs that exist: their registry, supervision and hot attach.

pub(super) mod attach;
pub(super) mod directory;
pub(super) mod registry;
pub(super) mod supervise;
