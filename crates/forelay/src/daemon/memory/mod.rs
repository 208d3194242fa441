//! Shared memory: the planner's thread, its executors, faults, residency.

pub(super) mod domains;
pub(super) mod executors;
pub(super) mod faults;
pub(super) mod journal;
pub(super) mod mapper;
pub(super) mod origins;
pub(super) mod planner;
pub(super) mod prefetcher;
pub(super) mod residency;
pub(super) mod samples;
pub(super) mod sessions;
pub(super) mod users;
pub(super) mod waiting;
