//! Memory samples for the planner, from the kernel's figures.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use forelay_cache::budget::MemorySample;
use forelay_memory::pressure::Probe;

/// Samples the host's memory.
#[derive(Clone, Debug, Default)]
pub struct Sampler {
    probe: Probe,
    forecast_demand_bytes: Arc<AtomicU64>,
}

impl Sampler {
    /// A sampler of this host and this process's cgroup.
    pub fn new() -> Self {
        Self::default()
    }

    /// Memory that VMs are forecast to need beyond what they have, in bytes.
    pub fn set_forecast_demand(&self, bytes: u64) {
        self.forecast_demand_bytes.store(bytes, Relaxed);
    }

    /// Looks once. `pool_bytes` and `pinned_bytes` are what shared memory holds. If the
    /// kernel tells nothing, all memory counts as available.
    pub fn sample(&self, pool_bytes: u64, pinned_bytes: u64) -> MemorySample {
        let sample = self.probe.sample().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot read the host's memory figures");
            forelay_memory::pressure::Sample {
                mem_total_bytes: u64::MAX / 2,
                mem_available_bytes: u64::MAX / 2,
                ..Default::default()
            }
        });
        let room = sample
            .cgroup
            .and_then(|cgroup| Some(cgroup.limit_bytes?.saturating_sub(cgroup.usage_bytes)));
        MemorySample {
            total_bytes: sample.mem_total_bytes,
            available_bytes: sample.mem_available_bytes,
            pool_bytes,
            pinned_bytes,
            cgroup_room_bytes: room,
            stall_pct: sample.stall.map(|stall| stall.some_avg10),
            forecast_demand_bytes: self.forecast_demand_bytes.load(Relaxed),
        }
    }
}
