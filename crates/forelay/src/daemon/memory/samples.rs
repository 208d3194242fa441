//! Memory samples for the planner, from the kernel's figures.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use forelay_cache::budget::MemorySample;
use forelay_memory::pressure::{CgroupMemory, Probe, Sample};

/// Stretch of time over which stalls are summed: the kernel's own averages look back too
/// far to say when a shortage is over.
const STALL_STRETCH: Duration = Duration::from_secs(1);
/// Memory that VMs are forecast to need beyond what they use now, in bytes. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct ForecastDemand(Arc<AtomicU64>);

impl ForecastDemand {
    /// Sets it; samples taken from now on carry it.
    pub fn set(&self, bytes: u64) {
        self.0.store(bytes, Relaxed);
    }
}

/// Samples the host's memory.
#[derive(Clone, Debug, Default)]
pub struct Sampler {
    probe: Probe,
    stalls: Stalls,
    demand: ForecastDemand,
}

/// The share of time stalled over the last whole stretch.
#[derive(Clone, Copy, Debug, Default)]
struct Stalls {
    since: Option<(Instant, u64)>,
    pct: f64,
}

impl Stalls {
    fn pct(&mut self, total_us: u64, now: Instant) -> f64 {
        let Some((from, before_us)) = self.since else {
            self.since = Some((now, total_us));
            return self.pct;
        };
        let stretch = now.saturating_duration_since(from);
        if stretch >= STALL_STRETCH {
            let stalled_us = total_us.saturating_sub(before_us) as f64;
            self.pct = (stalled_us / stretch.as_micros() as f64 * 100.0).min(100.0);
            self.since = Some((now, total_us));
        }
        self.pct
    }
}

impl Sampler {
    /// A sampler of this host and this process's cgroup.
    pub fn new() -> Self {
        Self::default()
    }

    /// The forecast that goes into each sample.
    pub fn demand(&self) -> ForecastDemand {
        self.demand.clone()
    }

    /// Looks once. `pool_bytes` and `pinned_bytes` are what shared memory holds. If the
    /// kernel tells nothing, all memory counts as available.
    pub fn sample(&mut self, pool_bytes: u64, pinned_bytes: u64) -> MemorySample {
        let sample = self.probe.sample().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot read the host's memory figures");
            Sample {
                mem_total_bytes: u64::MAX / 2,
                mem_available_bytes: u64::MAX / 2,
                ..Default::default()
            }
        });
        let room = sample.cgroup.and_then(|cgroup| {
            Some(
                cgroup
                    .limit_bytes?
                    .saturating_sub(used(&cgroup, pool_bytes)),
            )
        });
        MemorySample {
            total_bytes: total_bytes(&sample),
            available_bytes: sample.mem_available_bytes,
            pool_bytes,
            pinned_bytes,
            cgroup_room_bytes: room,
            stall_pct: sample
                .stall
                .map(|stall| self.stalls.pct(stall.some_total_us, Instant::now())),
            forecast_demand_bytes: self.demand.0.load(Relaxed),
        }
    }
}

/// Memory that counts as all there is: the host's, or a cgroup's limit below that.
pub fn total_bytes(sample: &Sample) -> u64 {
    let limit = sample.cgroup.and_then(|cgroup| cgroup.limit_bytes);
    sample.mem_total_bytes.min(limit.unwrap_or(u64::MAX))
}

/// What of a cgroup's usage cannot be had back: not the page cache of other files. The
/// pool's own pages may be among the inactive ones and count as used.
const fn used(cgroup: &CgroupMemory, pool_bytes: u64) -> u64 {
    let others = cgroup.inactive_file_bytes.saturating_sub(pool_bytes);
    cgroup.usage_bytes.saturating_sub(others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stalls_are_told_for_the_last_whole_second() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut stalls = Stalls::default();
        assert_eq!(stalls.pct(5_000_000, at(0)), 0.0);
        assert_eq!(stalls.pct(5_400_000, at(500)), 0.0);
        assert_eq!(stalls.pct(5_500_000, at(1000)), 50.0);
        assert_eq!(stalls.pct(5_500_000, at(1500)), 50.0);
        assert_eq!(stalls.pct(5_500_000, at(2000)), 0.0);
    }

    #[test]
    fn what_vms_are_forecast_to_need_goes_into_each_sample() {
        let mut sampler = Sampler::new();
        assert_eq!(sampler.sample(0, 0).forecast_demand_bytes, 0);
        sampler.demand().set(3 << 30);
        assert_eq!(sampler.sample(0, 0).forecast_demand_bytes, 3 << 30);
    }

    #[test]
    fn cached_files_of_others_are_no_usage_but_the_pool_is() {
        let cgroup = CgroupMemory {
            usage_bytes: 1000,
            limit_bytes: Some(2000),
            inactive_file_bytes: 300,
        };
        assert_eq!(used(&cgroup, 0), 700);
        assert_eq!(used(&cgroup, 200), 900);
        assert_eq!(used(&cgroup, 500), 1000);
        let sample = Sample {
            mem_total_bytes: 5000,
            cgroup: Some(cgroup),
            ..Sample::default()
        };
        assert_eq!(total_bytes(&sample), 2000);
    }
}
