//! When: the next launches of each profile, as a hazard over the coming horizon.
//!
//! Owns the statistics of launch times, and the account of whether forecasting pays against the
//! simple rule. Refuses to know components, extents, bytes and clocks.
//!
//! How a forecast is made, module by module:
//!
//! ```text
//!  launch -> record    the profile's last gaps (ring), decayed histogram, expert weights
//!            experts   which past gaps speak about the next one: recent, after the same previous
//!                      gap, at the same time of day, after the same series, on the same grid ...
//!            pool      what the owner's other profiles and all profiles did (for sparse profiles)
//!            outlook   the experts' mixture over the next gap, weighted by their past likelihood
//!            atoms     its heaviest candidates, evaluated all at once
//!  other  -> triggers  "B follows A within seconds": lead-lag pairs inside one owner
//!  both   -> walk      hazard in segments of time, recalibrated online by hazard_scale
//!            rule      hazard against a price of memory; regret against the simple rule
//!            forecaster / reasons    the face towards daemon and simulator
//! ```
//!
//! Invariants: nothing here looks past the moment it is asked about; a profile's state has a fixed
//! upper size (under 2 KiB); all maps are indexed, so the answers do not depend on hash order.

mod atoms;
mod bins;
mod config;
mod experts;
mod forecaster;
mod hazard_scale;
mod kernel;
mod outlook;
mod pool;
mod reasons;
mod record;
mod rule;
mod triggers;
mod walk;

#[cfg(test)]
mod tests;

pub use config::ArrivalsConfig;
pub use forecaster::{Forecaster, Observed, OwnerKey, ProfileKey};
pub use reasons::{LaunchForecast, Reason};
pub use rule::{Regret, Rule};
pub use walk::Segment;
