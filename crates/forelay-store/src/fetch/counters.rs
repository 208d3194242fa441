//! What the scheduler counts and how it estimates the repository's latency and bandwidth.
//!
//! Invariant: counters only grow; estimates are of what was seen, `None` before that.

use std::time::Duration;

use serde::Serialize;

use super::Priority;

/// Counters since the scheduler started.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FetchCounters {
    /// Ranged GETs of each priority.
    pub demand_requests: u64,
    /// Ranged GETs for prefetch.
    pub prefetch_requests: u64,
    /// Bytes that came from the repository for demand, as stored (compressed).
    pub demand_repository_bytes: u64,
    /// Bytes that came from the repository for prefetch, as stored (compressed).
    pub prefetch_repository_bytes: u64,
    /// Chunks fetched for demand.
    pub demand_chunks: u64,
    /// Chunks fetched for prefetch.
    pub prefetch_chunks: u64,
    /// Queued prefetches that became demands.
    pub promoted: u64,
    /// Demands and prefetches that joined a fetch under way.
    pub joined: u64,
    /// Reads answered by the disk cache.
    pub cache_hits: u64,
    /// Attempts that failed and were repeated.
    pub retries: u64,
    /// Chunks given up on.
    pub failures: u64,
    /// Demands in flight that have failed often and are still being tried.
    pub demands_in_trouble: u64,
    /// The last failure in words.
    pub last_failure: Option<String>,
    /// Estimated latency of a request in nanoseconds.
    pub latency_ns: Option<u64>,
    /// Estimated bandwidth in bytes per second.
    pub bandwidth_bytes_per_s: Option<u64>,
}

impl FetchCounters {
    /// Bytes that came from the repository, as stored.
    pub fn repository_bytes(&self) -> u64 {
        self.demand_repository_bytes + self.prefetch_repository_bytes
    }

    pub(super) fn request(&mut self, priority: Priority, bytes: u64, chunks: u64) {
        match priority {
            Priority::Demand => {
                self.demand_requests += 1;
                self.demand_repository_bytes += bytes;
                self.demand_chunks += chunks;
            }
            Priority::Prefetch => {
                self.prefetch_requests += 1;
                self.prefetch_repository_bytes += bytes;
                self.prefetch_chunks += chunks;
            }
        }
    }

    /// Learns from a request. Short requests tell the latency; the bandwidth is what
    /// arrived while at least one long request was under way.
    pub(super) fn observe(&mut self, bytes: u64, took: Duration, busy: Option<(u64, Duration)>) {
        if bytes <= 64 << 10 {
            self.latency_ns = Some(average(self.latency_ns, took.as_nanos() as u64));
        }
        if let Some((bytes, time)) = busy {
            let rate = bytes as f64 / time.as_secs_f64().max(1e-6);
            self.bandwidth_bytes_per_s = Some(average(self.bandwidth_bytes_per_s, rate as u64));
        }
    }
}

/// Exponentially weighted: the newest observation counts for an eighth.
fn average(old: Option<u64>, new: u64) -> u64 {
    old.map_or(new, |old| old - old / 8 + new / 8)
}
