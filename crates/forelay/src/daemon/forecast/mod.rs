//! What is learned and forecast: observation, models, announcements.

pub(super) mod ahead;
pub(super) mod clock;
pub(super) mod foresight;
pub(super) mod inherit;
pub(super) mod last_launches;
pub(super) mod learning;
pub(super) mod models;
pub(super) mod observation;
pub(super) mod observer;
pub(super) mod replay;
pub(super) mod resources;
pub(super) mod vmm_cgroup;
