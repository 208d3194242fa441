//! Shared memory: the planner's task, its executors, faults, residency.

pub(in crate::daemon) mod domains;
pub(in crate::daemon) mod faults;
pub(in crate::daemon) mod planner_task;
pub(in crate::daemon) mod pushes;
pub(in crate::daemon) mod residency;
pub(in crate::daemon) mod samples;
