//! Prefetch for a launch: what it is expected to touch, asked of the planner.
//!
//! Refuses to move bytes: the planner decides and its task does.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forelay_cache::mapping_table::Absent;
use forelay_cache::plan::LaunchRequested;
use forelay_cache::{DeviceImage, Domain, PlannerEvent, SharedImage};
use forelay_image::component::Role;
use forelay_image::{Digest, Extent, PlannedExtent};

use crate::api::{LaunchMode, PrefetchMode};
use crate::daemon::forecast::announced::{AnnouncedLaunches, LaunchChance, profile_forecast};
use crate::daemon::forecast::inherit::Inheritance;
use crate::daemon::forecast::learning::Learner;
use crate::daemon::memory::faults::Plan;
use crate::daemon::memory::planner::{PlannerHandle, now_ms};
use crate::daemon::order::{DeviceRecord, Order};

/// How long a launch waits for what it is told to have resident first.
const RESIDENT_PATIENCE: Duration = Duration::from_secs(600);

/// Most bytes of components that are brought whole since nothing is known of them.
const WHOLE_BYTES: u64 = 16 << 20;

/// How long a launch waits for what its components inherit from their predecessors.
const INHERIT_LIMIT: Duration = Duration::from_secs(1);

/// What a launch wants in shared memory.
pub struct PrefetchPlan {
    pub mode: LaunchMode,
    pub working_set: Vec<PlannedExtent>,
    /// Of it, what was neither there nor on its way.
    pub missing: Vec<(Digest, Extent)>,
    /// Of it, what was not there.
    pub absent: Vec<(Digest, Extent)>,
}

impl PrefetchPlan {
    /// The plan as faults are told apart by it.
    pub fn expected(&self) -> Plan {
        let all = self.working_set.iter().map(|one| (one.image, one.extent));
        Plan::new(all, self.absent.iter().copied())
    }

    /// Bytes that have to be loaded for it.
    pub fn missing_bytes(&self) -> u64 {
        self.missing.iter().map(|(_, extent)| extent.len).sum()
    }
}

/// Asks for what launches will touch.
pub struct LaunchPrefetcher {
    pub memory: Arc<PlannerHandle>,
    pub learner: Arc<Learner>,
    pub inheritance: Arc<Inheritance>,
    pub announced: Arc<AnnouncedLaunches>,
    /// `forecast.prefetch` of the configuration.
    pub enabled: bool,
}

impl LaunchPrefetcher {
    /// Lets components of the order that are new to its profile inherit what is known of their
    /// predecessors, if that takes not too long.
    pub async fn inherit(&self, order: &Order) {
        self.inheritance.prepare_order(order, INHERIT_LIMIT).await;
    }

    /// Tells the planner that a launch was asked for, which may resume from `memory`.
    pub fn request(
        &self,
        vm: &str,
        order: &Order,
        memory: Option<&DeviceRecord>,
        plan: &PrefetchPlan,
    ) {
        let devices = order.device_images().into_iter();
        let devices = devices.chain(memory.map(device_of));
        let requested = LaunchRequested {
            vm: vm.into(),
            domain: order.domain.clone(),
            profile: order.of.profile.as_str().into(),
            devices: devices.collect(),
            working_set: plan.working_set.clone(),
        };
        self.memory.tell(PlannerEvent::LaunchRequested(requested));
    }

    /// Tells the planner that a launch, which will resume from `memory` if there is one, is
    /// certain, and when: now.
    pub fn announce(&self, order: &Arc<Order>, memory: Option<&DeviceRecord>, plan: &PrefetchPlan) {
        let certain = LaunchChance {
            probability: 1.0,
            at_ms: Some(now_ms()),
        };
        self.announced.offer(order);
        let forecast = profile_forecast(
            order,
            memory.map(device_of),
            certain,
            plan.working_set.clone(),
        );
        self.announced.announce(forecast);
    }

    /// Tells the planner that a VM's VMM runs.
    pub fn started(&self, vm: &str) {
        self.memory.tell(PlannerEvent::VmStarted(vm.into()));
    }

    /// Tells the planner that a VM is gone.
    pub fn stopped(&self, vm: &str) {
        self.memory.tell(PlannerEvent::VmStopped(vm.into()));
    }

    /// Tells the planner that a launch boots which was to resume from a memory image.
    pub fn without_memory(&self, vm: &str, image: Digest) {
        self.memory.tell(PlannerEvent::Detached(vm.into(), image));
    }

    /// What a launch of this order wants in shared memory, if it resumes from `memory`.
    pub fn plan(
        &self,
        order: &Order,
        memory: Option<&DeviceRecord>,
        mode: PrefetchMode,
    ) -> PrefetchPlan {
        let mut images = order.images();
        // First: a clone needs its own memory before anything else.
        images.splice(0..0, memory.map(|one| one.image));
        let working_set = match mode {
            PrefetchMode::None => Vec::new(),
            _ if !self.enabled && mode != PrefetchMode::Everything => Vec::new(),
            PrefetchMode::Everything => order
                .devices
                .iter()
                .map(|device| PlannedExtent {
                    image: device.image,
                    extent: Extent::new(0, device.image_bytes),
                    probability: 1.0,
                    first_touch_ms: 0,
                })
                .collect(),
            PrefetchMode::Forecast => {
                let mut plan = self.learner.plan(&order.of, &images);
                plan.extend(unheard_of(order, &plan));
                plan
            }
            PrefetchMode::ForecastFirst => self.learner.plan(&order.of, &images),
        };
        let absent = self.absent(&order.domain, &working_set);
        let missing = parts(&absent, |part| !part.fetching);
        let mode = match mode {
            _ if working_set.is_empty() => LaunchMode::Cold,
            // What other profiles touch of the same components helps, but is no forecast.
            PrefetchMode::Forecast if !self.learner.knows(&order.of) => LaunchMode::Cold,
            _ if !missing.is_empty() => LaunchMode::Predicted,
            _ if self.prefetched_ahead(order, &working_set) => LaunchMode::Predicted,
            _ => LaunchMode::Warm,
        };
        PrefetchPlan {
            mode,
            working_set,
            missing,
            absent: parts(&absent, |_| true),
        }
    }

    /// True if most of a resident plan was prefetched and waits for its first touch.
    fn prefetched_ahead(&self, order: &Order, plan: &[PlannedExtent]) -> bool {
        self.memory.table().read(|table| {
            let (mut unused, mut all) = (0, 0);
            for planned in plan {
                let image = SharedImage::new(order.domain.clone(), planned.image);
                unused += table.prefetched_unused_bytes(&image, planned.extent);
                all += planned.extent.len;
            }
            unused * 2 > all
        })
    }

    /// What of a plan is not in shared memory.
    fn absent(&self, domain: &Domain, plan: &[PlannedExtent]) -> Vec<(Digest, Absent)> {
        self.memory.table().read(|table| {
            let mut absent = Vec::new();
            for planned in plan {
                let image = SharedImage::new(domain.clone(), planned.image);
                let parts = table.absent(&image, planned.extent).into_iter();
                absent.extend(parts.map(|part| (planned.image, part)));
            }
            absent
        })
    }

    /// Waits until a plan is resident, or until the planner has given up on the rest.
    pub async fn wait_resident(&self, domain: &Domain, plan: &[PlannedExtent]) {
        let deadline = Instant::now() + RESIDENT_PATIENCE;
        let mut idle = 0;
        while Instant::now() < deadline && idle < 20 {
            let fetching = self.memory.table().read(|table| table.fetching_bytes());
            if fetching == 0 && self.absent(domain, plan).is_empty() {
                return;
            }
            let status = self.memory.status();
            idle = if status.queued_bytes == 0 && fetching == 0 {
                idle + 1
            } else {
                0
            };
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// A device as the planner names it.
pub fn device_of(record: &DeviceRecord) -> DeviceImage {
    DeviceImage {
        image: record.image,
        image_bytes: record.image_bytes,
    }
}

/// Small components of an order of which no launch has touched anything yet, whole: what a
/// manifest names is what its VM is for, and while the guest's kernel boots the line is idle.
/// A base is only ever touched in parts.
fn unheard_of(order: &Order, plan: &[PlannedExtent]) -> Vec<PlannedExtent> {
    let known: BTreeSet<Digest> = plan.iter().map(|one| one.image).collect();
    let devices = order.images();
    let named = order.lock.components.iter();
    let named = named.filter(|one| one.role != Role::Base && devices.contains(&one.image));
    let mut bytes = 0;
    let small = named
        .filter(|one| !known.contains(&one.image))
        .filter(|one| {
            let fits = one.image_bytes <= WHOLE_BYTES - bytes;
            bytes += if fits { one.image_bytes } else { 0 };
            fits
        });
    small
        .map(|one| PlannedExtent {
            image: one.image,
            extent: Extent::new(0, one.image_bytes),
            probability: 0.5,
            first_touch_ms: 0,
        })
        .collect()
}

/// The extents of those parts of a plan that are wanted.
fn parts(absent: &[(Digest, Absent)], wanted: impl Fn(&Absent) -> bool) -> Vec<(Digest, Extent)> {
    let wanted = absent.iter().filter(|(_, part)| wanted(part));
    wanted.map(|(image, part)| (*image, part.extent)).collect()
}

#[cfg(test)]
mod tests {
    use forelay_image::lock::LockedComponent;

    use super::*;
    use crate::daemon::order::tests::order;

    #[test]
    fn small_components_that_nobody_has_touched_come_whole_and_bases_do_not() {
        let mut order = order("web", "", "base");
        let base = order.lock.components[0].clone();
        let component = |name: &str, image_bytes| LockedComponent {
            name: name.into(),
            role: Role::Package,
            image: Digest::of(name.as_bytes()),
            image_bytes,
            ..base.clone()
        };
        let sizes = [
            ("large", WHOLE_BYTES + 1),
            ("known", 1 << 20),
            ("small", 2 << 20),
        ];
        let components = sizes.map(|(name, bytes)| component(name, bytes));
        let sizes = [("second", WHOLE_BYTES - (2 << 20)), ("third", 4096)];
        let more = sizes.map(|(name, bytes)| component(name, bytes));
        order
            .lock
            .components
            .extend(components.into_iter().chain(more));
        order.devices = order.lock.components.iter().map(Into::into).collect();
        let planned = |image: Digest| PlannedExtent {
            image,
            extent: Extent::new(0, 4096),
            probability: 1.0,
            first_touch_ms: 0,
        };
        let whole = unheard_of(&order, &[planned(Digest::of(b"known"))]);
        let told: Vec<_> = whole
            .iter()
            .map(|one| (one.image, one.extent.len))
            .collect();
        let expected = [
            (Digest::of(b"small"), 2 << 20),
            (Digest::of(b"second"), WHOLE_BYTES - (2 << 20)),
        ];
        assert_eq!(told, expected);
    }
}
