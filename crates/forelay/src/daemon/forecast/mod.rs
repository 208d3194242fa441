//! What is learned and forecast: observation, models, announcements.

pub(in crate::daemon) mod ahead;
pub(in crate::daemon) mod clock;
pub(in crate::daemon) mod foresight;
pub(in crate::daemon) mod inherit;
pub(in crate::daemon) mod last_launches;
pub(in crate::daemon) mod learning;
pub(in crate::daemon) mod models;
pub(in crate::daemon) mod observation;
pub(in crate::daemon) mod observer;
pub(in crate::daemon) mod replay;
pub(in crate::daemon) mod resources;
pub(in crate::daemon) mod vmm_cgroup;
