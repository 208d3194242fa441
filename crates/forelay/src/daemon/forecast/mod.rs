//! What is learned and forecast: observation, models, announcements.

pub(super) mod announced;
pub(super) mod clock;
pub(super) mod forecasts;
pub(super) mod inherit;
pub(super) mod last_launches;
pub(super) mod learning;
pub(super) mod models;
pub(super) mod observation;
pub(super) mod observer;
pub(super) mod prefetch_loop;
pub(super) mod replay;
