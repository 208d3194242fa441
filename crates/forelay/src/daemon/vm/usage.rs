//! What each VM uses, and what all of them are forecast to need.
//!
//! Samples the VMM's process (CPU, memory that is its own, disk I/O), its control group where it
//! has one to itself ([`super::vmm_cgroup`]), and asks the guest what its network carried: what
//! a VMM's user-mode network moves no counter of the kernel tells. Hands the samples to the
//! history and the models, and from them the forecast demand to the memory samples that adapt
//! the budget.
//!
//! Component pages are shared files and no VM's own: they are not part of a VM's memory here.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use forelay_guest_protocol::messages::Traffic;
use forelay_predict::resources::HORIZONS_MS;

use crate::api::VmState;
use crate::daemon::forecast::forecasts::Forecasts;
use crate::daemon::forecast::learning::Learner;
use crate::daemon::memory::planner::now_ms;
use crate::daemon::memory::samples::ForecastDemand;
use crate::daemon::vm::instance::Instance;
use crate::daemon::vm::registry::VmRegistry;
use crate::daemon::vm::vmm_cgroup::{Charged, Groups};
use crate::history::{LaunchId, ResourceSample};
use crate::host_stats::{HostStats, ProcessUsage};

/// How often VMs are sampled, on the wall clock.
const EVERY: Duration = Duration::from_secs(15);
/// Most that a VM's network can have carried between two samples: 100 Gbit/s for 20 s.
const MOST_CARRIED_BYTES: u64 = 250_000_000_000;
/// How long a guest may take to say what its network carried.
const ANSWER: Duration = Duration::from_secs(2);
/// The quantile of the host's demand for which there shall be room.
const QUANTILE: f64 = 0.95;
/// Launches less likely than this do not count to the demand.
const LEAST_PROBABILITY: f64 = 0.05;

/// Counters of a process as the kernel gives them, since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Usage {
    process: ProcessUsage,
    /// As the guest says, so a wrong figure costs its own forecast at most.
    network: Traffic,
}

impl Usage {
    /// Of the process `pid`; `None` if it is gone.
    fn of(pid: u32) -> Option<Self> {
        let process = HostStats::default().usage(pid)?;
        Some(Self {
            process,
            ..Self::default()
        })
    }

    /// With what the VMM's control group was charged, where that is more.
    fn with(mut self, charged: &Charged) -> Self {
        let (read, written) = charged.io_bytes.unwrap_or_default();
        let own = &mut self.process;
        own.cpu_ms = own.cpu_ms.max(charged.cpu_ms.unwrap_or(0));
        own.memory_bytes = own.memory_bytes.max(charged.memory_bytes.unwrap_or(0));
        own.read_bytes = own.read_bytes.max(read);
        own.written_bytes = own.written_bytes.max(written);
        self
    }

    /// What was used between an earlier look and this one.
    fn since(&self, earlier: &Self, since_launch_ms: u64) -> ResourceSample {
        let (now, before) = (&self.process, &earlier.process);
        // The guest says what it likes.
        let carried = |now: u64, before: u64| now.saturating_sub(before).min(MOST_CARRIED_BYTES);
        let (network, carried_before) = (&self.network, &earlier.network);
        ResourceSample {
            since_launch_ms,
            cpu_ms: now.cpu_ms.saturating_sub(before.cpu_ms),
            memory_bytes: now.memory_bytes,
            read_bytes: now.read_bytes.saturating_sub(before.read_bytes),
            written_bytes: now.written_bytes.saturating_sub(before.written_bytes),
            received_bytes: carried(network.received_bytes, carried_before.received_bytes),
            sent_bytes: carried(network.sent_bytes, carried_before.sent_bytes),
        }
    }
}

/// How long a VM that is not ready is not asked what its network carried.
const STARTING_MS: i64 = 60_000;

/// Samples what VMs use.
pub struct UsageSampler {
    pub registry: Arc<VmRegistry>,
    pub learner: Arc<Learner>,
    pub forecasts: Arc<Forecasts>,
    /// Where the forecast demand goes.
    pub demand: ForecastDemand,
}

impl UsageSampler {
    /// Runs for as long as the daemon lives.
    pub async fn run(self) {
        let mut before: HashMap<LaunchId, Usage> = HashMap::new();
        let groups = Groups::new();
        let mut interval = tokio::time::interval(EVERY);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let mut now = HashMap::new();
            let live = self.registry.live();
            let networks = futures_util::future::join_all(live.iter().map(|one| traffic(one)));
            for (instance, network) in live.iter().zip(networks.await) {
                let launched_ms = instance.read(|vm| vm.launched_ms);
                let pid = instance.pid();
                let Some((pid, usage)) = pid.and_then(|pid| Some((pid, Usage::of(pid)?))) else {
                    continue;
                };
                let mut usage = usage.with(&groups.charged(pid));
                let id = instance.launch_id();
                let since_launch_ms = u64::try_from(now_ms() - launched_ms).unwrap_or(0);
                let earlier = before.get(&id).copied();
                // A guest that does not answer has carried nothing since.
                usage.network = network.unwrap_or(earlier.unwrap_or_default().network);
                if earlier.is_none() && u128::from(since_launch_ms) > 2 * EVERY.as_millis() {
                    // An earlier worker sampled what its counters say so far.
                    now.insert(id, usage);
                    continue;
                }
                let earlier = earlier.unwrap_or_default();
                let sample = usage.since(&earlier, since_launch_ms);
                self.learner.sampled(&instance.profile(), id, sample).await;
                now.insert(id, usage);
            }
            before = now;
            self.demand.set(self.forecast_demand());
        }
    }

    /// Memory that VMs, running and coming, will need beyond what they use now.
    fn forecast_demand(&self) -> u64 {
        let now = self.learner.clock().now();
        let coming = self.forecasts.next_launches(now, LEAST_PROBABILITY);
        let coming: Vec<(&str, f64)> = coming
            .iter()
            .map(|launch| (launch.profile.as_str(), launch.probability))
            .collect();
        let models = self.learner.models();
        let demand = models.demand.lock();
        let high = demand.host(HORIZONS_MS[0], &coming).quantile(QUANTILE);
        (high - demand.in_use()).max(0.0) as u64
    }
}

/// What a guest's network has carried; `None` if it does not say: it boots, it hangs, or
/// its kernel component is older than the question.
async fn traffic(instance: &Instance) -> Option<Traffic> {
    // One that is about to be ready has something better to do.
    let is_asked = match instance.state() {
        VmState::Ready => true,
        VmState::Mounted => now_ms() - instance.read(|vm| vm.launched_ms) > STARTING_MS,
        _ => false,
    };
    if !is_asked {
        return None;
    }
    let handle = instance.handle()?;
    handle.traffic(ANSWER).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_group_counts_where_it_says_more() {
        let process = ProcessUsage {
            cpu_ms: 100,
            memory_bytes: 5000,
            read_bytes: 7,
            written_bytes: 9,
        };
        let usage = Usage {
            process,
            ..Usage::default()
        };
        assert_eq!(usage.with(&Charged::default()), usage);
        let charged = Charged {
            cpu_ms: Some(120),
            memory_bytes: Some(4000),
            io_bytes: Some((8, 3)),
        };
        let both = ProcessUsage {
            cpu_ms: 120,
            read_bytes: 8,
            ..process
        };
        assert_eq!(usage.with(&charged).process, both);
    }

    #[test]
    fn samples_are_differences() {
        let network = |received_bytes, sent_bytes| Traffic {
            received_bytes,
            sent_bytes,
        };
        let used = |cpu_ms, memory_bytes, network| Usage {
            process: ProcessUsage {
                cpu_ms,
                memory_bytes,
                ..ProcessUsage::default()
            },
            network,
        };
        let earlier = used(100, 0, network(10, 0));
        let now = used(250, 4096, network(30, 5));
        let sample = now.since(&earlier, 9);
        assert_eq!((sample.cpu_ms, sample.memory_bytes), (150, 4096));
        assert_eq!((sample.received_bytes, sample.sent_bytes), (20, 5));
        let absurd = used(250, 4096, network(u64::MAX, u64::MAX));
        let sample = absurd.since(&earlier, 9);
        let most = MOST_CARRIED_BYTES;
        assert_eq!((sample.received_bytes, sample.sent_bytes), (most, most));
        // A counter that went back is another process: nothing is known.
        assert_eq!(earlier.since(&now, 9).cpu_ms, 0);
    }
}
