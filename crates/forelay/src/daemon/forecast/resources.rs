//! What each VM uses, and what all of them are forecast to need.
//!
//! Samples the VMM's process (CPU, memory that is its own, disk I/O), its control group where it
//! has one to itself ([`crate::daemon::forecast::vmm_cgroup`]), and asks the guest what its network carried: what
//! a VMM's user-mode network moves no counter of the kernel tells. Hands the samples to the
//! history and the models, and from them the forecast demand to the memory samples that adapt
//! the budget.
//!
//! Component pages are shared files and no VM's own: they are not part of a VM's memory here.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use forelay_cache::PlannerEvent;
use forelay_guest_protocol::messages::Traffic;
use forelay_predict::resources::HORIZONS_MS;

use crate::api::VmState;
use crate::daemon::Host;
use crate::daemon::forecast::vmm_cgroup::{Charged, Groups};
use crate::daemon::memory::planner::now_ms;
use crate::daemon::vm::registry::Instance;
use crate::history::{ProfileRef, ResourceSample};

/// How often VMs are sampled, on the wall clock.
const EVERY: Duration = Duration::from_secs(15);
/// How long a guest may take to say what its network carried.
const ANSWER: Duration = Duration::from_secs(2);
/// The quantile of the host's demand for which there shall be room.
const QUANTILE: f64 = 0.95;
/// Launches less likely than this do not count to the demand.
const LEAST_PROBABILITY: f64 = 0.05;

/// Counters of a process as the kernel gives them, since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Usage {
    cpu_ms: u64,
    memory_bytes: u64,
    read_bytes: u64,
    written_bytes: u64,
    /// As the guest says, so a wrong figure costs its own forecast at most.
    network: Traffic,
}

impl Usage {
    /// Of the process `pid`; `None` if it is gone.
    fn of(pid: u32) -> Option<Self> {
        let dir = Path::new("/proc").join(pid.to_string());
        let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
        let mut usage = Self {
            cpu_ms: cpu_ms(&read("stat")?)?,
            memory_bytes: own_memory(&read("status")?),
            ..Self::default()
        };
        // Only its owner and root may read this.
        let io = read("io").unwrap_or_default();
        usage.read_bytes = field(&io, "read_bytes:");
        usage.written_bytes = field(&io, "write_bytes:");
        Some(usage)
    }

    /// With what the VMM's control group was charged, where that is more.
    fn with(mut self, charged: &Charged) -> Self {
        let (read, written) = charged.io_bytes.unwrap_or_default();
        self.cpu_ms = self.cpu_ms.max(charged.cpu_ms.unwrap_or(0));
        self.memory_bytes = self.memory_bytes.max(charged.memory_bytes.unwrap_or(0));
        self.read_bytes = self.read_bytes.max(read);
        self.written_bytes = self.written_bytes.max(written);
        self
    }

    /// What was used between an earlier look and this one.
    fn since(&self, earlier: &Self, since_launch_ms: u64) -> ResourceSample {
        ResourceSample {
            since_launch_ms,
            cpu_ms: self.cpu_ms.saturating_sub(earlier.cpu_ms),
            memory_bytes: self.memory_bytes,
            read_bytes: self.read_bytes.saturating_sub(earlier.read_bytes),
            written_bytes: self.written_bytes.saturating_sub(earlier.written_bytes),
            received_bytes: (self.network.received_bytes)
                .saturating_sub(earlier.network.received_bytes),
            sent_bytes: (self.network.sent_bytes).saturating_sub(earlier.network.sent_bytes),
        }
    }
}

/// A `name value` field, zero if it is missing.
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|rest| rest.split_whitespace().next());
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// Anonymous memory and shared memory that is no file's: a guest's RAM either way.
fn own_memory(status: &str) -> u64 {
    (field(status, "RssAnon:") + field(status, "RssShmem:") + field(status, "VmSwap:")) << 10
}

/// User and system time of `/proc/PID/stat`. The program's name may hold anything.
fn cpu_ms(stat: &str) -> Option<u64> {
    let rest = &stat[stat.rfind(')')? + 1..];
    let mut fields = rest.split_whitespace().skip(11);
    let mut ticks = || fields.next().and_then(|field| field.parse::<u64>().ok());
    let (user, system) = (ticks()?, ticks()?);
    // USER_HZ is 100 on every Linux that there is.
    Some((user + system) * 10)
}

impl Host {
    /// Samples VMs for as long as the daemon lives.
    pub(in crate::daemon) async fn sample_vms(self: Arc<Self>) {
        let mut before: HashMap<i64, Usage> = HashMap::new();
        let groups = Groups::new();
        let mut interval = tokio::time::interval(EVERY);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let mut now = HashMap::new();
            let live = self.instances.live();
            let networks =
                futures_util::future::join_all(live.iter().map(|instance| self.traffic(instance)));
            for (instance, network) in live.iter().zip(networks.await) {
                let vm = instance.vm();
                let Some((pid, usage)) = vm.pid.and_then(|pid| Some((pid, Usage::of(pid)?))) else {
                    continue;
                };
                let mut usage = usage.with(&groups.charged(pid));
                let id = instance.launch_id();
                let earlier = before.get(&id).copied().unwrap_or_default();
                // A guest that does not answer has carried nothing since.
                usage.network = network.unwrap_or(earlier.network);
                let since_launch_ms = u64::try_from(now_ms() - vm.launched_ms).unwrap_or(0);
                let of = ProfileRef::new(vm.profile, vm.owner);
                let sample = usage.since(&earlier, since_launch_ms);
                self.learner.sampled(&of, id, sample).await;
                now.insert(id, usage);
            }
            before = now;
            self.demand.set(self.forecast_demand());
        }
    }

    /// What a guest's network has carried; `None` if it does not say: it boots, it hangs, or
    /// its kernel component is older than the question.
    async fn traffic(&self, instance: &Instance) -> Option<Traffic> {
        let vm = instance.vm();
        if !matches!(vm.state, VmState::Mounted | VmState::Ready) {
            return None;
        }
        let handle = instance.handle()?;
        handle.traffic(ANSWER).await.ok()
    }

    /// Memory that VMs, running and coming, will need beyond what they use now.
    fn forecast_demand(&self) -> u64 {
        let now = self.learner.clock().now();
        let coming = self
            .learner
            .next_launches(now, self.horizon_s(), LEAST_PROBABILITY);
        let coming: Vec<(&str, f64)> = coming
            .iter()
            .map(|launch| (launch.profile.as_str(), launch.probability))
            .collect();
        let models = self.learner.models();
        let demand = models.demand.lock();
        let high = demand.host(HORIZONS_MS[0], &coming).quantile(QUANTILE);
        (high - demand.in_use()).max(0.0) as u64
    }

    /// Starts what looks ahead and what keeps the history.
    pub(in crate::daemon) fn start_foresight(self: &Arc<Self>) {
        let config = &self.config.forecast;
        if config.prefetch && config.ahead {
            tokio::spawn(Arc::clone(self).look_ahead());
        }
        tokio::spawn(Arc::clone(self).sample_vms());
        let host = Arc::clone(self);
        tokio::spawn(async move { host.learner.keep_history().await });
    }

    /// Opens the history, and tells the planner of past launches.
    pub(in crate::daemon) async fn open_history(&self) -> Result<(), crate::daemon::HostError> {
        let recent = self.learner.open_history().await?;
        let live = self.instances.live();
        let live: Vec<u64> = live.iter().map(|one| one.launch_id() as u64).collect();
        self.learner.models().keep_running(|vm| live.contains(&vm));
        let launches = self.last_launches.past(&recent, self.learner.clock());
        self.memory.tell(PlannerEvent::LaunchesRemembered(launches));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_whatever_its_name() {
        let stat = "42 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0";
        assert_eq!(cpu_ms(stat), Some(2_000));
        assert_eq!(cpu_ms("42 nonsense"), None);
        let status = "Name:\tx\nRssAnon:\t    100 kB\nRssFile:\t 999 kB\nRssShmem:\t 28 kB\n";
        assert_eq!(own_memory(status), 128 << 10);
        let usage = Usage::of(std::process::id()).unwrap();
        assert!(usage.memory_bytes > 0);
        assert!(Usage::of(u32::MAX).is_none());
    }

    #[test]
    fn a_control_group_counts_where_it_says_more() {
        let usage = Usage {
            cpu_ms: 100,
            memory_bytes: 5000,
            read_bytes: 7,
            written_bytes: 9,
            ..Usage::default()
        };
        assert_eq!(usage.with(&Charged::default()), usage);
        let charged = Charged {
            cpu_ms: Some(120),
            memory_bytes: Some(4000),
            io_bytes: Some((8, 3)),
        };
        let both = Usage {
            cpu_ms: 120,
            read_bytes: 8,
            ..usage
        };
        assert_eq!(usage.with(&charged), both);
    }

    #[test]
    fn samples_are_differences() {
        let network = |received_bytes, sent_bytes| Traffic {
            received_bytes,
            sent_bytes,
        };
        let earlier = Usage {
            cpu_ms: 100,
            network: network(10, 0),
            ..Usage::default()
        };
        let now = Usage {
            cpu_ms: 250,
            memory_bytes: 4096,
            network: network(30, 5),
            ..Usage::default()
        };
        let sample = now.since(&earlier, 9);
        assert_eq!((sample.cpu_ms, sample.memory_bytes), (150, 4096));
        assert_eq!((sample.received_bytes, sample.sent_bytes), (20, 5));
        // A counter that went back is another process: nothing is known.
        assert_eq!(earlier.since(&now, 9).cpu_ms, 0);
    }
}
