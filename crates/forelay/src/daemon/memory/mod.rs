//! Shared memory: the planner's thread, its executors, faults, residency.

pub(in crate::daemon) mod domains;
pub(in crate::daemon) mod executors;
pub(in crate::daemon) mod faults;
pub(in crate::daemon) mod planner;
pub(in crate::daemon) mod prefetcher;
pub(in crate::daemon) mod residency;
pub(in crate::daemon) mod samples;
pub(in crate::daemon) mod waiting;
