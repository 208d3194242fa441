//! The constants of the arrival model, one set for every workload.
//!
//! Owns their names, units and default values. None is specific to a trace or a profile.

use serde::{Deserialize, Serialize};

/// Settings of a [`super::Forecaster`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ArrivalsConfig {
    /// False is the kill switch: nothing is loaded ahead of a launch that is asked for.
    pub forecasting: bool,
    /// The simpler rule fallen back to: stay loaded this long after a launch.
    pub keep_alive_min: f64,
    /// Launches per minute from which holding pays, for the regret kept inside the forecaster.
    pub reference_price_per_min: f64,
    /// Shortest stretch of time that is decided about, in minutes: about what a load takes, so
    /// that a decision to load is worth making that long ahead.
    pub tick_min: f64,
    /// Growth of the stretches with the time since the last launch.
    pub tick_growth: f64,
    /// Weight of a past gap relative to the one after it.
    pub gap_decay: f64,
    /// Share of an expert's weight that returns to the pooled prior at each launch.
    pub share: f64,
    /// How many launches of a profile outweigh what its pool says about gap lengths.
    pub pool_strength: f64,
    /// Decay of a profile's gap histogram per launch.
    pub histogram_decay: f64,
    /// How far the phase of a schedule follows each deviation from it.
    pub phase_gain: f64,
    /// Time over which further launches of a burst are taken to spread, in minutes. Zero: they come
    /// with the first one, so that staying loaded for a tick serves them.
    pub repeat_span_min: f64,
    /// Longest lag between a launch and another launch it may announce, in minutes.
    pub trigger_window_min: f64,
    /// Gaps longer than this teach nothing (host was off, clock jumped), in minutes.
    pub longest_gap_min: f64,
    /// A clock step back of more than this restarts a profile's timeline, in minutes.
    pub late_tolerance_min: f64,
}

impl Default for ArrivalsConfig {
    fn default() -> Self {
        Self {
            forecasting: true,
            keep_alive_min: 10.0,
            reference_price_per_min: 0.01,
            tick_min: 1.0 / 6.0,
            tick_growth: 0.15,
            gap_decay: 0.9,
            share: 0.05,
            pool_strength: 2.0,
            histogram_decay: 0.98,
            phase_gain: 0.3,
            repeat_span_min: 0.0,
            trigger_window_min: 30.0,
            longest_gap_min: 90.0 * 1440.0,
            late_tolerance_min: 60.0,
        }
    }
}
