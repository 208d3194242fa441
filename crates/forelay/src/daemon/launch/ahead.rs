//! Snapshots that are made before anybody asks: of what is launched again and again.
//!
//! A launch that booted, though a snapshot could have served it, is handed here. Once its VM is
//! ready, its profile has been launched before, memory is plentiful and no other launch is under
//! way, the snapshots that its next launch will look for are made.
//!
//! Refuses to be in anybody's way: whatever fails is logged, and not tried again for that profile
//! while this daemon runs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use forelay_cache::budget::PressureLevel;
use forelay_guest_protocol::snapshot::Tier;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::api::VmState;
use crate::daemon::forecast::announced::ProfileId;
use crate::daemon::forecast::learning::Learner;
use crate::daemon::launch::maker::Maker;
use crate::daemon::memory::planner::PlannerHandle;
use crate::daemon::order::Order;
use crate::daemon::snapshot::origin::latest_tier;
use crate::daemon::vm::instance::Instance;
use crate::daemon::vm::registry::VmRegistry;

/// Launches of a profile after which another one is likely enough.
const LAUNCHES: u64 = 2;
/// Between two looks whether the host has time for a maker.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A launch that booted.
pub struct Booted {
    pub order: Order,
    pub instance: Arc<Instance>,
}

/// See the module's header.
pub struct SnapshotsAhead {
    pub maker: Arc<Maker>,
    pub learner: Arc<Learner>,
    pub memory: Arc<PlannerHandle>,
    pub registry: Arc<VmRegistry>,
}

impl SnapshotsAhead {
    /// Makes what launches lack, one after the other.
    pub async fn run(self, mut booted: UnboundedReceiver<Booted>) {
        let mut given_up = BTreeSet::new();
        while let Some(Booted { order, instance }) = booted.recv().await {
            let profile = ProfileId::of(&order);
            let Some(latest) = latest_tier(&order) else {
                continue;
            };
            if given_up.contains(&profile) || !self.will_return(&order, &instance).await {
                continue;
            }
            // The kernel's serves whatever else is launched.
            for tier in [Tier::Kernel, latest] {
                self.wait_for_quiet().await;
                if let Err(error) = self.maker.make(&order, tier).await {
                    let (profile_name, tier) = (&order.of.profile, tier.name());
                    tracing::warn!(profile = profile_name, tier, %error, "no snapshot is made");
                    given_up.insert(profile);
                    break;
                }
            }
        }
    }

    /// Whether a launch came to be ready, of a profile that is launched again.
    async fn will_return(&self, order: &Order, instance: &Instance) -> bool {
        while matches!(
            instance.state(),
            VmState::Launching | VmState::Booting | VmState::Mounted
        ) {
            instance.state_changed().await;
        }
        let was_ready = instance.read(|vm| vm.launch.ready_s.is_some());
        let entries = self.learner.entries(Some(&order.of.profile)).await;
        let entries = entries.unwrap_or_default();
        let mut own = entries.iter().filter(|one| one.owner == order.of.owner);
        was_ready && own.any(|one| one.launches >= LAUNCHES)
    }

    async fn wait_for_quiet(&self) {
        loop {
            let starting = |state| {
                matches!(
                    state,
                    VmState::Launching | VmState::Booting | VmState::Mounted
                )
            };
            let live = self.registry.live();
            let quiet = !live.iter().any(|instance| starting(instance.state()));
            if quiet && self.memory.status().level == PressureLevel::Plenty {
                return;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}
