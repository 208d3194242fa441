//! The prefetch loop: what is likely to be needed next is announced to the planner in time.
//!
//! At intervals of the forecaster's clock asks for forecasts and announces those that have
//! changed to the planner, which decides: for profiles' next launches, and for
//! components that running VMs will be given.
//!
//! Invariants: nothing here loads or evicts by itself; a profile for which forecasting did harm
//! is not told, so that the simpler rule (load at the launch's request) is in force.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forelay_cache::plan::{AttachForecast, Attachment, ProfileForecast};
use forelay_cache::{DeviceImage, Domain, PlannerEvent};
use forelay_predict::arrivals::LaunchForecast;

use crate::daemon::error::HostError;
use crate::daemon::forecast::announced::{
    AnnouncedLaunches, LaunchChance, ResumedMemory, profile_forecast,
};
use crate::daemon::forecast::forecasts::{Catalogue, Forecasts, Need, Upcoming};
use crate::daemon::forecast::models::model_key;
use crate::daemon::memory::mapper::Mapper;
use crate::daemon::order::{Order, PlannedDevice};

/// How often forecasts are made, on the forecaster's clock.
const EVERY: Duration = Duration::from_secs(5);
/// The same on the wall clock, at the most.
const EVERY_AT_MOST: Duration = Duration::from_millis(250);
/// How often the list of components is read again.
const CATALOGUE_EVERY: Duration = Duration::from_secs(60);
/// Launches less likely than this within the horizon are not told to the planner.
const LEAST_PROBABILITY: f64 = 0.01;
/// Attachments less likely than this are not.
const LEAST_ATTACH_PROBABILITY: f64 = 0.1;

/// An announced forecast that still holds is announced again this long after: what was loaded
/// for it may have been evicted or reclaimed since.
const RENEW_EVERY: Duration = Duration::from_secs(20);
/// A probability that differs by less than this share is the same to the planner, which
/// displaces only for a quarter more.
const SAME_SHARE: f64 = 0.1;
/// And so is a time that differs by less than this, in milliseconds.
const SAME_MS: i64 = 15_000;

/// Forecasts announced and not yet withdrawn.
#[derive(Default)]
struct Announced {
    launches: BTreeMap<String, (ProfileForecast, Instant)>,
    vms: BTreeMap<String, Domain>,
}

/// Whether the planner would do the same for both.
fn is_same(a: &ProfileForecast, b: &ProfileForecast) -> bool {
    let (p, q) = (a.launch_probability, b.launch_probability);
    let same_time = match (a.next_launch_ms, b.next_launch_ms) {
        (Some(a), Some(b)) => a.abs_diff(b) < SAME_MS.unsigned_abs(),
        (a, b) => a == b,
    };
    (p - q).abs() <= p.max(q) * SAME_SHARE
        && same_time
        && a.devices == b.devices
        && a.working_set == b.working_set
}

/// Announces forecasts to the planner in time.
pub struct PrefetchLoop {
    pub forecasts: Arc<Forecasts>,
    pub announced: Arc<AnnouncedLaunches>,
    pub mapper: Arc<Mapper>,
    pub resumed: Arc<dyn ResumedMemory>,
}

impl PrefetchLoop {
    /// Runs for as long as the daemon lives.
    pub async fn run(self) {
        let mut before = Announced::default();
        let clock = self.forecasts.learner.clock();
        let mut interval = tokio::time::interval(clock.wall(EVERY).max(EVERY_AT_MOST));
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut catalogue = Catalogue::default();
        let mut read_at: Option<Instant> = None;
        loop {
            interval.tick().await;
            if read_at.is_none_or(|at| at.elapsed() >= CATALOGUE_EVERY) {
                match self.forecasts.catalogue().await {
                    Ok(fresh) => {
                        self.forecasts.follow_versions(&fresh).await;
                        catalogue = fresh;
                    }
                    Err(error) => tracing::warn!(%error, "cannot list components"),
                }
                read_at = Some(Instant::now());
            }
            self.run_once(&catalogue, &mut before).await;
        }
    }

    async fn run_once(&self, catalogue: &Catalogue, before: &mut Announced) {
        let clock = self.forecasts.learner.clock();
        let mut next = Announced::default();
        let renew_after = clock.wall(RENEW_EVERY);
        let upcoming = self
            .forecasts
            .upcoming(clock.now(), LEAST_PROBABILITY, catalogue);
        for one in upcoming {
            let done = match &one.need {
                Need::Attachments(vm) => {
                    let done = self.announce_attachments(&one, vm, catalogue).await;
                    if matches!(done, Ok(true)) {
                        next.vms.insert(vm.clone(), one.domain.clone());
                    }
                    done.map(drop)
                }
                Need::Launch(order, launch) if !launch.fallen_back => {
                    let key = model_key(&one.of);
                    let held = before.launches.remove(&key);
                    let held = held.filter(|(_, at)| at.elapsed() < renew_after);
                    let announced = self.announce_launch(&one, order, launch, held).await;
                    announced.map(|announced| drop(next.launches.insert(key, announced)))
                }
                Need::Launch(..) => Ok(()),
            };
            if let Err(error) = done {
                let profile = &one.of.profile;
                tracing::warn!(profile, %error, "cannot announce a forecast");
            }
        }
        // What became unlikely is told once more, so that the planner lets go of it.
        for key in before.launches.keys() {
            if !next.launches.contains_key(key)
                && let Some(order) = self.forecasts.last_launches.get(key)
            {
                self.announced.withdraw(&order);
            }
        }
        before.vms.retain(|vm, _| !next.vms.contains_key(vm));
        self.withdraw_attachments(&before.vms);
        *before = next;
    }

    /// Announces the next launch of a profile, unless what was announced `before` still holds.
    /// Returns what counts as announced now.
    async fn announce_launch(
        &self,
        upcoming: &Upcoming,
        order: &Arc<Order>,
        launch: &LaunchForecast,
        before: Option<(ProfileForecast, Instant)>,
    ) -> Result<(ProfileForecast, Instant), HostError> {
        let chance = LaunchChance {
            probability: launch.probability,
            at_ms: Some(self.forecasts.learner.clock().wall_ms(launch.expected_at)),
        };
        let memory = self.resumed.memory_of(order).await;
        // First: a clone needs its own memory before anything else.
        let images: Vec<_> = memory.iter().map(|one| one.image).collect();
        let mut working_set = self.forecasts.learner.plan(&order.of, &images);
        working_set.extend(upcoming.working_set());
        let forecast = profile_forecast(order, memory, chance, working_set);
        self.announced.offer(order);
        if let Some(before) = before.filter(|(before, _)| is_same(before, &forecast)) {
            return Ok(before);
        }
        self.mapper.map_images(order).await?;
        self.announced.announce(forecast.clone());
        Ok((forecast, Instant::now()))
    }

    /// Announces what a running VM is likely to be given; whether there was anything to announce.
    async fn announce_attachments(
        &self,
        upcoming: &Upcoming,
        vm: &str,
        catalogue: &Catalogue,
    ) -> Result<bool, HostError> {
        let likely: Vec<_> = upcoming
            .forecast
            .components
            .iter()
            .filter(|one| one.attached && one.probability >= LEAST_ATTACH_PROBABILITY)
            .collect();
        if likely.is_empty() {
            return Ok(false);
        }
        for one in &likely {
            let Some(id) = catalogue.id(&one.image) else {
                continue;
            };
            let device = PlannedDevice {
                image: one.image,
                image_bytes: one.image_bytes,
                label: one.component.clone(),
                members: Vec::new(),
            };
            self.mapper
                .map_component(&upcoming.domain, id, device)
                .await?;
        }
        let clock = self.forecasts.learner.clock();
        let attachments = likely.into_iter().map(|one| Attachment {
            device: DeviceImage {
                image: one.image,
                image_bytes: one.image_bytes,
            },
            probability: one.probability,
            expected_ms: Some(clock.wall_ms(clock.now().plus_seconds(one.until_s))),
            working_set: one.extents.clone(),
        });
        self.tell_attachments(vm, &upcoming.domain, attachments.collect());
        Ok(true)
    }

    /// The planner forgets by itself what a VM that is gone was expected to be given.
    fn withdraw_attachments(&self, vms: &BTreeMap<String, Domain>) {
        if vms.is_empty() {
            return;
        }
        let running = self.forecasts.live.live_vms();
        let running: BTreeSet<&str> = running.iter().map(|vm| vm.name.as_str()).collect();
        for (vm, domain) in vms.iter().filter(|(vm, _)| running.contains(vm.as_str())) {
            self.tell_attachments(vm, domain, Vec::new());
        }
    }

    fn tell_attachments(&self, vm: &str, domain: &Domain, attachments: Vec<Attachment>) {
        let forecast = AttachForecast {
            vm: vm.into(),
            domain: domain.clone(),
            attachments,
        };
        let planner = &self.forecasts.planner;
        planner.tell(PlannerEvent::AttachForecast(forecast));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forecast_is_announced_again_only_if_the_planner_would_act_otherwise() {
        let forecast = |launch_probability, next_launch_ms| ProfileForecast {
            domain: "d".into(),
            profile: "p".into(),
            devices: Vec::new(),
            launch_probability,
            next_launch_ms,
            working_set: Vec::new(),
        };
        let before = forecast(0.5, Some(60_000));
        assert!(is_same(&before, &forecast(0.52, Some(61_000))));
        assert!(!is_same(&before, &forecast(0.7, Some(60_000))));
        assert!(!is_same(&before, &forecast(0.0, Some(60_000))));
        assert!(!is_same(&before, &forecast(0.5, Some(600_000))));
        assert!(!is_same(&before, &forecast(0.5, None)));
        let image = forelay_image::Digest::of(b"image");
        let touched = ProfileForecast {
            devices: vec![DeviceImage {
                image,
                image_bytes: 4096,
            }],
            ..before.clone()
        };
        assert!(!is_same(&before, &touched));
    }
}
