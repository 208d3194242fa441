//! The simulator: launch traces, a virtual clock, baselines, and reports.
//!
//! Owns the judging of Forelay's forecasts on recorded and synthetic launches. It runs the very
//! decision code of the daemon (`forelay-predict`, `forelay-cache`) and refuses to know the
//! daemon, the host and real time. Invariants: no policy but the clairvoyant sees a launch before
//! it has decided; the same trace and settings give the same report, byte for byte.
#![forbid(unsafe_code)]

pub mod eviction;
pub mod launch_rows;
pub mod trace;

mod bounded;
mod html;
mod needs;
mod policy;
mod report;
mod sides;
mod sweep;
mod tally;
mod windows;

pub use needs::{Found, NeedsOutcome};
pub use policy::{Policy, PolicyError};
pub use report::{ProfileOutcome, Report, SimulateError};
pub use sides::{SharedComponents, Sides, SidesError};
pub use tally::{Half, Row};

use forelay_predict::arrivals::ArrivalsConfig;
use launch_rows::OnBadRow;
use std::path::PathBuf;

/// What to simulate.
#[derive(Debug, Clone)]
pub struct SimulateConfig {
    /// The trace file.
    pub trace: PathBuf,
    /// Policies, in the order of the report; empty for the usual set.
    pub policies: Vec<Policy>,
    /// Profiles with fewer launches are left out of the figures (the policies see them all).
    pub min_launches: u64,
    /// Profiles with more launches are left out of the figures.
    pub max_launches: u64,
    /// Whether the report has each profile's outcome.
    pub per_profile: bool,
    /// What to do with unreadable rows.
    pub on_bad_row: OnBadRow,
    /// Side file: `profile,component,bytes[,load_s]`.
    pub components: Option<PathBuf>,
    /// Time a load takes, for every profile, in seconds.
    pub load_s: f64,
    /// Settings of the forecaster.
    pub forecast: ArrivalsConfig,
}

impl SimulateConfig {
    /// The usual policies over a trace.
    #[must_use]
    pub fn new(trace: PathBuf) -> Self {
        Self {
            trace,
            policies: Vec::new(),
            min_launches: 1,
            max_launches: u64::MAX,
            per_profile: false,
            on_bad_row: OnBadRow::Stop,
            components: None,
            load_s: 0.0,
            forecast: ArrivalsConfig::default(),
        }
    }
}

/// Reads the trace and runs the policies over it.
///
/// # Errors
/// If the trace or a side file cannot be read.
pub fn simulate(config: &SimulateConfig) -> Result<Report, SimulateError> {
    let trace = trace::Trace::read(&config.trace, config.on_bad_row)?;
    simulate_trace(&trace, config)
}

/// Runs the policies over a trace in memory (`config.trace` only names it).
///
/// # Errors
/// If a side file cannot be read.
pub fn simulate_trace(
    trace: &trace::Trace,
    config: &SimulateConfig,
) -> Result<Report, SimulateError> {
    report::run(trace, config)
}
