//! The planner's settings.

use serde::{Deserialize, Serialize};

/// The planner's settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlanConfig {
    /// Most that shared memory may take, in bytes.
    pub budget_bytes: u64,
    /// Most bytes of prefetches under way at a time, so that demand finds the line free.
    pub inflight_bytes: u64,
    /// Largest single prefetch, in bytes.
    pub piece_bytes: u64,
    /// Extents less likely to be needed than this are not prefetched.
    pub prefetch_probability: f64,
    /// A launch more likely than this is mapped ahead; released below half of it.
    pub prepare_probability: f64,
    /// Extents of a requested launch at least this likely are pinned until it has started.
    pub pin_probability: f64,
    /// Share of the budget that the planner itself may pin.
    pub pin_share: f64,
    /// How long pins stay after the VMM has started, in milliseconds.
    pub pin_hold_ms: i64,
    /// What a running VM was seen to use this recently does not leave under pressure, in
    /// milliseconds: it would come back at once.
    pub use_hold_ms: i64,
    /// A prefetch displaces resident bytes only if it is worth this many times as much.
    pub displace_factor: f64,
    /// Half-life of past uses and of forecasts that are not renewed, in milliseconds.
    pub half_life_ms: i64,
    /// How far ahead uses count, in milliseconds; the horizon of `launch_probability`.
    pub horizon_ms: i64,
    /// How long pressure must be gone before prefetching resumes, in milliseconds.
    pub calm_ms: i64,
    /// Time to the first byte from the repository until measured, in milliseconds.
    pub latency_ms: f64,
    /// Repository bandwidth until measured, in bytes per second.
    pub bandwidth_bytes_per_s: f64,
    /// Time to the first byte from the disk cache, in milliseconds.
    pub disk_latency_ms: f64,
    /// Bandwidth of the disk cache, in bytes per second.
    pub disk_bandwidth_bytes_per_s: f64,
}

impl Default for PlanConfig {
    fn default() -> Self {
        Self {
            budget_bytes: 1 << 30,
            inflight_bytes: 16 << 20,
            piece_bytes: 1 << 20,
            prefetch_probability: 0.1,
            prepare_probability: 0.5,
            pin_probability: 0.5,
            pin_share: 0.25,
            pin_hold_ms: 30_000,
            use_hold_ms: 30_000,
            displace_factor: 1.25,
            half_life_ms: 6 * 3_600_000,
            horizon_ms: 600_000,
            calm_ms: 5_000,
            latency_ms: 20.0,
            bandwidth_bytes_per_s: 100e6,
            disk_latency_ms: 0.2,
            disk_bandwidth_bytes_per_s: 500e6,
        }
    }
}
