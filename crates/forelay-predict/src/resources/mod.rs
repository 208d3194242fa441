//! How much memory a VM and the host will want, as quantiles.
//!
//! Owns the statistics of resource samples. Refuses to know how samples are taken (cgroup,
//! `/proc`) and what is done with the headroom.

mod demand;
mod sketch;

pub use demand::{Demand, Distribution, HORIZONS_MS};
pub use sketch::Sketch;
