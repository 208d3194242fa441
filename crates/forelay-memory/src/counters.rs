//! What shared memory did, in numbers that only grow (but for the gauges).
//!
//! Each file counts for itself and the mount counts the sum; both are written by reader
//! and push threads without locks, so a snapshot may be torn by one event.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::time::Duration;

/// Buckets of the stall histogram: bucket `n` holds stalls below `2^n` microseconds
/// that the bucket before does not; the last holds all longer ones.
pub const STALL_BUCKETS: usize = 28;

/// A snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// READ requests that had to ask the fault handler. The kernel does not say which of
    /// them are readahead, so all count.
    pub demand_faults: u64,
    /// Bytes of image asked for by those.
    pub demand_bytes: u64,
    /// READ requests wholly in the padding behind an image, answered with zeros.
    pub padding_reads: u64,
    /// READ requests that a push answered before the fault handler did.
    pub answered_by_push: u64,
    /// Bytes stored ahead of any touch.
    pub pushed_bytes: u64,
    /// Pushed bytes that an observation later found touched.
    pub pushed_used_bytes: u64,
    /// Bytes that evictions freed.
    pub evicted_bytes: u64,
    /// READ requests that wait for an answer now.
    pub in_flight: u64,
    /// Sum of the times between a READ's arrival and its answer.
    pub stall_ns: u64,
    /// The longest of those times.
    pub stall_ns_max: u64,
    /// How many READs waited how long: see [`STALL_BUCKETS`].
    pub stall_histogram: [u64; STALL_BUCKETS],
}

/// The live form of [`Counters`].
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub demand_faults: AtomicU64,
    pub demand_bytes: AtomicU64,
    pub padding_reads: AtomicU64,
    pub answered_by_push: AtomicU64,
    pub pushed_bytes: AtomicU64,
    pub pushed_used_bytes: AtomicU64,
    pub evicted_bytes: AtomicU64,
    in_flight: AtomicU64,
    stall_ns: AtomicU64,
    stall_ns_max: AtomicU64,
    stall_histogram: [AtomicU64; STALL_BUCKETS],
}

impl Tally {
    pub fn fault(&self, bytes: u64) {
        self.demand_faults.fetch_add(1, Relaxed);
        self.demand_bytes.fetch_add(bytes, Relaxed);
        self.in_flight.fetch_add(1, Relaxed);
    }

    pub fn answered(&self, stall: Duration) {
        let stall_ns = u64::try_from(stall.as_nanos()).unwrap_or(u64::MAX);
        self.stall_ns.fetch_add(stall_ns, Relaxed);
        self.stall_ns_max.fetch_max(stall_ns, Relaxed);
        self.stall_histogram[stall_bucket(stall_ns)].fetch_add(1, Relaxed);
        // Last, so that who sees none in flight sees all of them counted.
        self.in_flight.fetch_sub(1, Release);
    }

    pub fn snapshot(&self) -> Counters {
        Counters {
            demand_faults: self.demand_faults.load(Relaxed),
            demand_bytes: self.demand_bytes.load(Relaxed),
            padding_reads: self.padding_reads.load(Relaxed),
            answered_by_push: self.answered_by_push.load(Relaxed),
            pushed_bytes: self.pushed_bytes.load(Relaxed),
            pushed_used_bytes: self.pushed_used_bytes.load(Relaxed),
            evicted_bytes: self.evicted_bytes.load(Relaxed),
            in_flight: self.in_flight.load(Relaxed),
            stall_ns: self.stall_ns.load(Relaxed),
            stall_ns_max: self.stall_ns_max.load(Relaxed),
            stall_histogram: std::array::from_fn(|n| self.stall_histogram[n].load(Relaxed)),
        }
    }
}

fn stall_bucket(stall_ns: u64) -> usize {
    let micros = stall_ns / 1000;
    ((u64::BITS - micros.leading_zeros()) as usize).min(STALL_BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalls_fall_into_power_of_two_buckets() {
        assert_eq!(stall_bucket(999), 0);
        assert_eq!(stall_bucket(1_000), 1);
        assert_eq!(stall_bucket(3_999), 2);
        assert_eq!(stall_bucket(u64::MAX), STALL_BUCKETS - 1);
    }

    #[test]
    fn in_flight_returns_to_zero() {
        let tally = Tally::default();
        tally.fault(4096);
        assert_eq!(tally.snapshot().in_flight, 1);
        tally.answered(Duration::from_micros(5));
        let counters = tally.snapshot();
        assert_eq!((counters.in_flight, counters.stall_ns), (0, 5_000));
        assert_eq!(counters.stall_histogram[3], 1);
    }
}
