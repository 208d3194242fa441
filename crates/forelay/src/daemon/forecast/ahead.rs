//! Ahead of need: what is likely to be wanted next is told to the planner in time.
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
use forelay_cache::{DeviceImage, PlannerEvent};
use forelay_predict::arrivals::LaunchForecast;

use crate::daemon::forecast::foresight::{Catalogue, Foreseen};
use crate::daemon::forecast::models::model_key;
use crate::daemon::launch::resolve::PlannedDevice;
use crate::daemon::{Host, HostError};

/// How often forecasts are made anew, on the forecaster's clock.
const EVERY: Duration = Duration::from_secs(5);
/// The same on the wall clock, at the most.
const EVERY_AT_MOST: Duration = Duration::from_millis(250);
/// How often the list of components is read anew.
const CATALOGUE_EVERY: Duration = Duration::from_secs(60);
/// Launches less likely than this within the horizon are not told to the planner.
const LEAST_PROBABILITY: f64 = 0.01;
/// Attachments less likely than this are not.
const LEAST_ATTACH_PROBABILITY: f64 = 0.1;

/// An announced forecast that still holds is announced anew this long after: what was loaded
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
    vms: BTreeSet<String>,
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

impl Host {
    /// Looks ahead for as long as the daemon lives.
    pub(in crate::daemon) async fn look_ahead(self: Arc<Self>) {
        let mut announced = Announced::default();
        let every = self.learner.clock().wall(EVERY).max(EVERY_AT_MOST);
        let mut interval = tokio::time::interval(every);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut catalogue = Catalogue::default();
        let mut read_at: Option<Instant> = None;
        loop {
            interval.tick().await;
            if read_at.is_none_or(|at| at.elapsed() >= CATALOGUE_EVERY) {
                match self.catalogue().await {
                    Ok(fresh) => {
                        self.follow_versions(&fresh).await;
                        let (launches, listed) = (Arc::clone(&self.launches), fresh.listed.clone());
                        tokio::spawn(async move { launches.prepare_kernels(&listed).await });
                        catalogue = fresh;
                    }
                    Err(error) => tracing::warn!(%error, "cannot list components"),
                }
                read_at = Some(Instant::now());
            }
            self.look_ahead_once(&catalogue, &mut announced).await;
        }
    }

    async fn look_ahead_once(self: &Arc<Self>, catalogue: &Catalogue, announced: &mut Announced) {
        let now = self.learner.clock().now();
        let mut next = Announced::default();
        let renew_after = self.learner.clock().wall(RENEW_EVERY);
        for foreseen in self.foresee(now, LEAST_PROBABILITY, catalogue) {
            let done = match (&foreseen.vm, &foreseen.launch) {
                (Some(vm), _) => {
                    let done = self.announce_attachments(&foreseen, vm, catalogue).await;
                    if matches!(done, Ok(true)) {
                        next.vms.insert(vm.clone());
                    }
                    done.map(drop)
                }
                (None, Some(launch)) if !launch.fallen_back => {
                    let key = model_key(&foreseen.of);
                    let before = announced.launches.remove(&key);
                    let before = before.filter(|(_, at)| at.elapsed() < renew_after);
                    let told = self.announce_launch(&foreseen, launch, before).await;
                    told.map(|told| next.launches.extend(told.map(|told| (key, told))))
                }
                _ => Ok(()),
            };
            if let Err(error) = done {
                let profile = &foreseen.of.profile;
                tracing::warn!(profile, %error, "cannot prepare what is foreseen");
            }
        }
        // What became unlikely is told once more, so that the planner lets go of it.
        for key in announced.launches.keys() {
            if !next.launches.contains_key(key) {
                self.withdraw_launch(key);
            }
        }
        for vm in announced.vms.difference(&next.vms) {
            self.withdraw_attachments(vm);
        }
        *announced = next;
    }

    /// Announces the next launch of a profile, unless what was announced `before` still holds.
    /// Returns what counts as announced now.
    async fn announce_launch(
        self: &Arc<Self>,
        foreseen: &Foreseen,
        launch: &LaunchForecast,
        before: Option<(ProfileForecast, Instant)>,
    ) -> Result<Option<(ProfileForecast, Instant)>, HostError> {
        let Some(order) = &foreseen.order else {
            return Ok(None);
        };
        let forecast = ProfileForecast {
            domain: foreseen.domain.clone(),
            profile: foreseen.of.profile.as_str().into(),
            working_set: foreseen.working_set(),
            devices: order.device_images(),
            launch_probability: launch.probability,
            next_launch_ms: Some(self.learner.clock().wall_ms(launch.expected_at)),
        };
        self.premaps.offer(order);
        if let Some(before) = before.filter(|(before, _)| is_same(before, &forecast)) {
            return Ok(Some(before));
        }
        self.mapper.map_images(order).await?;
        let told = PlannerEvent::ProfileForecast(forecast.clone());
        self.memory.tell(told);
        Ok(Some((forecast, Instant::now())))
    }

    fn withdraw_launch(&self, key: &str) {
        if let Some(order) = self.last_launches.get(key) {
            self.memory
                .tell(PlannerEvent::ProfileForecast(ProfileForecast {
                    domain: order.domain.clone(),
                    profile: order.of.profile.as_str().into(),
                    devices: order.device_images(),
                    launch_probability: 0.0,
                    next_launch_ms: None,
                    working_set: Vec::new(),
                }));
        }
    }

    /// Announces what a running VM is likely to be given; whether there was anything to announce.
    async fn announce_attachments(
        self: &Arc<Self>,
        foreseen: &Foreseen,
        vm: &str,
        catalogue: &Catalogue,
    ) -> Result<bool, HostError> {
        let likely: Vec<_> = foreseen
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
                .map_component(&foreseen.domain, id, device)
                .await?;
        }
        let clock = self.learner.clock();
        let attachments = likely.into_iter().map(|one| Attachment {
            device: DeviceImage {
                image: one.image,
                image_bytes: one.image_bytes,
            },
            probability: one.probability,
            expected_ms: Some(clock.wall_ms(clock.now().plus_seconds(one.until_s))),
            working_set: one.extents.clone(),
        });
        self.memory
            .tell(PlannerEvent::AttachForecast(AttachForecast {
                vm: vm.into(),
                domain: foreseen.domain.clone(),
                attachments: attachments.collect(),
            }));
        Ok(true)
    }

    fn withdraw_attachments(&self, vm: &str) {
        let Ok(instance) = self.instance(vm) else {
            return;
        };
        // The planner forgets by itself what a VM that is gone was expected to be given.
        if instance.vm().state.is_live() {
            self.memory
                .tell(PlannerEvent::AttachForecast(AttachForecast {
                    vm: vm.into(),
                    domain: instance.vm().domain.as_str().into(),
                    attachments: Vec::new(),
                }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forecast_is_announced_anew_only_if_the_planner_would_act_otherwise() {
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
