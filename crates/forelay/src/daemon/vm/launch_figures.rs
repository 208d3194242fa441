//! What launches took so far, for those who draw it: histograms by how they were launched.
//!
//! Owns the histograms. A launch is counted when its guest says that it is ready, or when it
//! failed.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};

use crate::api::{LaunchFigures, LaunchMode};

/// Labels of a series.
pub type Labels = Vec<(&'static str, &'static str)>;
/// Histograms by labels.
pub type Histograms = Family<Labels, Histogram, fn() -> Histogram>;

/// A millisecond to four minutes.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 18))
}

/// See the module's header.
#[derive(Debug)]
pub struct LaunchHistograms {
    /// Seconds until ready by `start`: `cold`, `predicted`, `warm` or `resumed`.
    pub ready: Histograms,
    /// Seconds of each `stage` by `start`.
    pub stages: Histograms,
    /// Seconds that the guest stood still for bytes until it was ready, by `start`.
    pub stalls: Histograms,
    failed: AtomicU64,
    snapshot_problems: AtomicU64,
}

impl Default for LaunchHistograms {
    fn default() -> Self {
        let new = || Family::new_with_constructor(seconds as fn() -> Histogram);
        Self {
            ready: new(),
            stages: new(),
            stalls: new(),
            failed: AtomicU64::new(0),
            snapshot_problems: AtomicU64::new(0),
        }
    }
}

/// How a VM was launched, in one word.
pub const fn start_of(launch: &LaunchFigures) -> &'static str {
    match (launch.resumed, launch.mode) {
        (Some(_), _) => "resumed",
        (None, Some(LaunchMode::Predicted)) => "predicted",
        (None, Some(LaunchMode::Warm)) => "warm",
        (None, Some(LaunchMode::Cold) | None) => "cold",
    }
}

impl LaunchHistograms {
    /// A launch is ready.
    pub fn ready(&self, launch: &LaunchFigures) {
        let Some(ready_s) = launch.ready_s else {
            return;
        };
        let start = ("start", start_of(launch));
        self.ready.get_or_create(&vec![start]).observe(ready_s);
        self.stalls
            .get_or_create(&vec![start])
            .observe(launch.stall_s);
        for (stage, seconds) in launch.timings.steps() {
            let labels = vec![start, ("stage", stage)];
            self.stages.get_or_create(&labels).observe(seconds);
        }
        let problems = launch.snapshot_problems.len() as u64;
        self.snapshot_problems.fetch_add(problems, Relaxed);
    }

    /// A launch failed.
    pub fn failed(&self) {
        self.failed.fetch_add(1, Relaxed);
    }

    /// Launches that failed.
    pub fn failures(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    /// Snapshots that a launch which became ready should have resumed from and did not.
    pub fn snapshot_failures(&self) -> u64 {
        self.snapshot_problems.load(Relaxed)
    }
}
