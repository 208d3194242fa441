//! Ahead of need: what is likely to be wanted next is told to the planner in time.
//!
//! At intervals of the forecaster's clock asks for what is foreseen and hands probability,
//! devices and extents to the planner, which decides: for profiles' next launches, and for
//! components that running VMs will be given.
//!
//! Invariants: nothing here loads or evicts by itself; a profile for which forecasting did harm
//! is not told, so that the simpler rule (load at the launch's request) is in force.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forelay_cache::PlannerEvent;
use forelay_cache::plan::{AttachForecast, ProfileForecast};

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

/// What the planner was told of, and not told off again.
#[derive(Default)]
struct Told {
    launches: BTreeSet<String>,
    vms: BTreeSet<String>,
}

impl Host {
    /// Looks ahead for as long as the daemon lives.
    pub(in crate::daemon) async fn look_ahead(self: Arc<Self>) {
        let mut told = Told::default();
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
                        catalogue = fresh;
                    }
                    Err(error) => tracing::warn!(%error, "cannot list components"),
                }
                read_at = Some(Instant::now());
            }
            self.look_ahead_once(&catalogue, &mut told).await;
        }
    }

    async fn look_ahead_once(self: &Arc<Self>, catalogue: &Catalogue, told: &mut Told) {
        let now = self.learner.clock().now();
        let mut next = Told::default();
        for foreseen in self.foresee(now, LEAST_PROBABILITY, catalogue) {
            let done = match (&foreseen.vm, &foreseen.launch) {
                (Some(vm), _) => {
                    let done = self.tell_attachments(&foreseen, vm, catalogue).await;
                    if matches!(done, Ok(true)) {
                        next.vms.insert(vm.clone());
                    }
                    done.map(drop)
                }
                (None, Some(launch)) if !launch.fallen_back => {
                    next.launches.insert(model_key(&foreseen.of));
                    self.tell_launch(&foreseen, launch.probability).await
                }
                _ => Ok(()),
            };
            if let Err(error) = done {
                let profile = &foreseen.of.profile;
                tracing::warn!(profile, %error, "cannot prepare what is foreseen");
            }
        }
        // What became unlikely is told once more, so that the planner lets go of it.
        for key in told.launches.difference(&next.launches) {
            self.tell_off_launch(key);
        }
        for vm in told.vms.difference(&next.vms) {
            self.tell_off_attachments(vm);
        }
        *told = next;
    }

    async fn tell_launch(
        self: &Arc<Self>,
        foreseen: &Foreseen,
        probability: f64,
    ) -> Result<(), HostError> {
        let Some(order) = &foreseen.order else {
            return Ok(());
        };
        self.mapper.map_images(order).await?;
        self.premaps.offer(order);
        let clock = self.learner.clock();
        let expected = foreseen.launch.as_ref().map(|one| one.expected_at);
        let devices = order.device_images();
        self.memory
            .tell(PlannerEvent::ProfileForecast(ProfileForecast {
                domain: foreseen.domain.clone(),
                profile: foreseen.of.profile.as_str().into(),
                working_set: foreseen.extents(&devices, probability),
                devices,
                launch_probability: probability,
                next_launch_ms: expected.map(|at| clock.wall_ms(at)),
            }));
        Ok(())
    }

    fn tell_off_launch(&self, key: &str) {
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

    /// Tells what a running VM is likely to be given; whether there was anything to tell.
    async fn tell_attachments(
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
        let Some(likeliest) = likely.first() else {
            return Ok(false);
        };
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
        let expected = clock.now().plus_seconds(likeliest.until_s);
        let probability = likeliest.probability;
        let devices = foreseen.devices(|one| likely.iter().any(|two| two.image == one.image));
        self.memory
            .tell(PlannerEvent::AttachForecast(AttachForecast {
                vm: vm.into(),
                domain: foreseen.domain.clone(),
                working_set: foreseen.extents(&devices, probability),
                devices,
                probability,
                expected_ms: Some(clock.wall_ms(expected)),
            }));
        Ok(true)
    }

    fn tell_off_attachments(&self, vm: &str) {
        let Ok(instance) = self.instance(vm) else {
            return;
        };
        // The planner forgets by itself what a VM that is gone was expected to be given.
        if instance.vm().state.is_live() {
            self.memory
                .tell(PlannerEvent::AttachForecast(AttachForecast {
                    vm: vm.into(),
                    domain: instance.vm().domain.as_str().into(),
                    devices: Vec::new(),
                    probability: 0.0,
                    expected_ms: None,
                    working_set: Vec::new(),
                }));
        }
    }
}
