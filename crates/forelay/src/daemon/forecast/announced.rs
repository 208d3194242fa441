//! Launches announced to the planner, with what each would ask for.
//!
//! The planner knows a launch by domain and profile only; who prepares one that it thinks
//! likely finds here what that launch is.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use forelay_cache::plan::ProfileForecast;
use forelay_cache::{DeviceImage, Domain, PlannerEvent, ProfileName};
use forelay_image::PlannedExtent;
use parking_lot::Mutex;

use crate::daemon::memory::planner::PlannerSender;
use crate::daemon::order::Order;

/// A profile as the planner names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProfileId {
    /// Its trust domain.
    pub domain: Domain,
    /// Its name there.
    pub profile: ProfileName,
}

impl ProfileId {
    /// The profile of an order.
    pub fn of(order: &Order) -> Self {
        Self {
            domain: order.domain.clone(),
            profile: order.of.profile.as_str().into(),
        }
    }
}

/// How likely the launch of an order is, and when it comes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LaunchChance {
    /// Probability within the planner's horizon.
    pub probability: f64,
    /// When, milliseconds since the epoch.
    pub at_ms: Option<i64>,
}

/// Says what launches will resume from.
#[async_trait]
pub trait ResumedMemory: Send + Sync {
    /// The memory image that a launch of this order would go on from now, made reachable in
    /// shared memory.
    async fn memory_of(&self, order: &Order) -> Option<DeviceImage>;
}

/// The forecast of an order's launch, which will resume from `memory` if there is one, for the
/// planner.
pub fn profile_forecast(
    order: &Order,
    memory: Option<DeviceImage>,
    chance: LaunchChance,
    working_set: Vec<PlannedExtent>,
) -> ProfileForecast {
    let ProfileId { domain, profile } = ProfileId::of(order);
    ProfileForecast {
        domain,
        profile,
        working_set,
        devices: order.device_images().into_iter().chain(memory).collect(),
        launch_probability: chance.probability,
        next_launch_ms: chance.at_ms,
    }
}

/// Announces launches to the planner.
pub struct AnnouncedLaunches {
    planner: PlannerSender,
    orders: Mutex<BTreeMap<ProfileId, Arc<Order>>>,
}

impl AnnouncedLaunches {
    /// Nothing is announced yet.
    pub fn new(planner: PlannerSender) -> Self {
        Self {
            planner,
            orders: Mutex::default(),
        }
    }

    /// Says what the launch of a profile would be, before the planner hears of it.
    pub fn offer(&self, order: &Arc<Order>) {
        let mut orders = self.orders.lock();
        orders.insert(ProfileId::of(order), Arc::clone(order));
    }

    /// Tells the planner of a launch.
    pub fn announce(&self, forecast: ProfileForecast) {
        self.planner.tell(PlannerEvent::ProfileForecast(forecast));
    }

    /// Tells the planner that the launch of an order is not likely any more.
    pub fn withdraw(&self, order: &Order) {
        let never = LaunchChance {
            probability: 0.0,
            at_ms: None,
        };
        self.announce(profile_forecast(order, None, never, Vec::new()));
    }

    /// What the launch of a profile would be.
    pub fn order(&self, id: &ProfileId) -> Option<Arc<Order>> {
        self.orders.lock().get(id).cloned()
    }

    /// The planner has let go of a profile's launch.
    pub fn forget(&self, id: &ProfileId) {
        self.orders.lock().remove(id);
    }
}
