//! From a manifest to a running VMM: resolve, prepare, launch.

pub(in crate::daemon) mod launcher;
pub(in crate::daemon) mod prepared;
pub(in crate::daemon) mod resolve;
