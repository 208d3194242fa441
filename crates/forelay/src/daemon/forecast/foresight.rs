//! Forecasts put together: for each profile's next launch and each running VM, the components
//! it will want and of each the extents, with conditional probabilities.
//!
//! Owns the questions to the models; the combination is [`forelay_predict::rank`]'s. Also
//! answers `forelay forecast`, for which the planner says where bytes are and what they are
//! worth. Refuses to act: that is `ahead`'s, and in the end the planner's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use forelay_cache::plan::{Appraisal, Prospect};
use forelay_cache::{DeviceImage, Domain};
use forelay_image::component::{Component, Role};
use forelay_image::{ComponentId, Digest, PlannedExtent};
use forelay_predict::arrivals::LaunchForecast;
use forelay_predict::rank::{
    self, ComponentForecast, Knowledge, Present, Subject, VmForecast, Why,
};
use forelay_predict::time::Timestamp;
use forelay_predict::working_set::Basis;

use crate::api::{ForecastEntry, SelfControl};
use crate::daemon::forecast::inherit::ComponentVersion;
use crate::daemon::forecast::models::model_key;
use crate::daemon::launch::resolve::{Order, PlannedDevice};
use crate::daemon::vm::registry::Instance;
use crate::daemon::{Host, HostError};
use crate::history::ProfileRef;

/// How long new versions' inheritance may hold up forecasts of one profile.
const INHERIT_AHEAD_LIMIT: Duration = Duration::from_secs(5);

/// The newest version of each component that can be attached.
#[derive(Clone, Default)]
pub(in crate::daemon) struct Catalogue {
    /// Every version of every component.
    pub listed: Vec<Arc<Component>>,
    by_name: BTreeMap<String, Present>,
    ids: BTreeMap<Digest, ComponentId>,
}

impl Catalogue {
    /// The component that has this image.
    pub fn id(&self, image: &Digest) -> Option<ComponentId> {
        self.ids.get(image).copied()
    }

    /// Name and version of the component that has this image.
    fn label(&self, image: &Digest) -> Option<String> {
        let one = self.listed.iter().find(|one| one.image.digest == *image)?;
        Some(format!("{} {}", one.name, one.version))
    }

    /// What can be attached.
    fn versions(&self) -> impl Iterator<Item = ComponentVersion> + '_ {
        self.by_name.iter().filter_map(|(name, present)| {
            Some(ComponentVersion {
                name: name.clone(),
                id: self.id(&present.image)?,
                image: present.image,
            })
        })
    }
}

/// The forecast of one profile's next launch, or of one running VM.
pub(in crate::daemon) struct Foreseen {
    pub of: ProfileRef,
    pub domain: Domain,
    /// What the next launch will ask for.
    pub order: Option<Arc<Order>>,
    /// The running VM.
    pub vm: Option<String>,
    /// Why the launch is expected; none for a running VM, or if nothing can be said.
    pub launch: Option<LaunchForecast>,
    pub forecast: VmForecast,
}

impl Foreseen {
    /// What the launch itself would touch of its devices.
    pub fn working_set(&self) -> Vec<PlannedExtent> {
        let components = self.forecast.components.iter();
        let launched = components.filter(|one| !one.attached);
        launched
            .flat_map(|one| one.extents.iter().copied())
            .collect()
    }

    /// Probability that a component is needed within the horizon.
    fn probability(&self, component: &ComponentForecast) -> f64 {
        self.forecast.probability * component.probability
    }

    /// What is asked of the planner for `forelay forecast`.
    fn prospect(&self, component: &ComponentForecast, now_ms: i64) -> Prospect {
        Prospect {
            domain: self.domain.clone(),
            device: DeviceImage {
                image: component.image,
                image_bytes: component.image_bytes,
            },
            probability: self.probability(component),
            expected_ms: Some(now_ms.saturating_add((component.until_s * 1e3) as i64)),
            working_set: component.extents.clone(),
        }
    }
}

impl Host {
    /// What components there are to attach.
    pub(in crate::daemon) async fn catalogue(&self) -> Result<Catalogue, HostError> {
        let components = self.store.components().await.map_err(HostError::failed)?;
        // Sorted by name and version: the newest stays.
        let attachable = components
            .iter()
            .filter(|one| !matches!(one.role, Role::Base | Role::Kernel));
        let mut catalogue = Catalogue::default();
        for one in attachable {
            let present = Present {
                label: format!("{} {}", one.name, one.version),
                names: vec![one.name.clone()],
                image: one.image.digest,
                image_bytes: one.image.bytes,
            };
            catalogue.ids.insert(present.image, one.id());
            catalogue.by_name.insert(one.name.clone(), present);
        }
        catalogue.listed = components;
        Ok(catalogue)
    }

    /// Takes new versions of components into account: in what next launches will ask for, and in
    /// what is known of the versions' use.
    pub(in crate::daemon) async fn follow_versions(self: &Arc<Self>, catalogue: &Catalogue) {
        let (host, listed) = (Arc::clone(self), catalogue.listed.clone());
        let resolved =
            tokio::task::spawn_blocking(move || host.last_launches.resolve_anew(&listed)).await;
        if let Err(error) = resolved {
            tracing::error!(%error, "next launches were not resolved anew");
        }
        for order in self.last_launches.all() {
            self.inheritance
                .prepare_order(&order, INHERIT_AHEAD_LIMIT)
                .await;
        }
        let running = self.instances.live();
        let running: BTreeSet<(String, String)> = running
            .iter()
            .map(|one| one.vm())
            .map(|vm| (vm.profile, vm.owner))
            .collect();
        for (profile, owner) in running {
            let of = ProfileRef::new(profile, owner);
            let versions = catalogue.versions();
            self.inheritance
                .prepare(&of, versions, INHERIT_AHEAD_LIMIT)
                .await;
        }
    }

    /// How far ahead needs are foreseen, in seconds; the planner's horizon is the same.
    pub(in crate::daemon) fn horizon_s(&self) -> f64 {
        self.config.forecast.horizon().as_secs_f64()
    }

    /// What the next launches of profiles will want, those at least so likely, and running VMs.
    pub(in crate::daemon) fn foresee(
        &self,
        now: Timestamp,
        least_probability: f64,
        catalogue: &Catalogue,
    ) -> Vec<Foreseen> {
        let launches = self
            .learner
            .next_launches(now, self.horizon_s(), least_probability);
        let mut subjects = Vec::new();
        for order in self.last_launches.all() {
            let key = model_key(&order.of);
            let launch = launches.iter().find(|one| one.profile == key);
            if let Some(launch) = launch.filter(|one| one.probability > 0.0) {
                let (of, domain) = (order.of.clone(), order.domain.clone());
                subjects.push((of, domain, Some(order), None, Some(launch.clone())));
            }
        }
        for instance in self.instances.live() {
            let vm = instance.vm();
            let of = ProfileRef::new(vm.profile.clone(), vm.owner.clone());
            let domain = Domain::from(vm.domain.as_str());
            subjects.push((of, domain, None, Some(instance), None));
        }
        let foreseen = subjects.into_iter();
        foreseen
            .map(|(of, domain, order, instance, launch)| {
                let context = self.learner.models().context(&of, now);
                let subject = match (&launch, &order, &instance) {
                    (Some(launch), Some(order), _) => {
                        Subject::upcoming(launch, context, now, order.present())
                    }
                    (_, _, Some(instance)) => {
                        let launched = self.learner.clock().of(instance.vm().launched_ms);
                        let age_s = now.seconds_since(launched);
                        Subject::running(context, components_of(instance), age_s)
                    }
                    _ => Subject::running(context, Vec::new(), 0.0),
                };
                let forecast = self.foresee_one(&subject, catalogue);
                Foreseen {
                    of,
                    domain,
                    order,
                    vm: instance.map(|one| one.vm().name),
                    launch,
                    forecast,
                }
            })
            .collect()
    }

    fn foresee_one(&self, subject: &Subject, catalogue: &Catalogue) -> VmForecast {
        let models = self.learner.models();
        let needs = models.needs.lock();
        let known = Knowledge {
            needs: &needs.model,
            attachments: &needs.attachments,
            plan: &|profile, images| models.plan(profile, images),
            horizon_s: self.horizon_s(),
            locate: &|name| catalogue.by_name.get(name).cloned(),
        };
        rank::forecast(subject, &known)
    }

    /// What is expected to be needed next, most valuable first.
    pub async fn forecast(
        self: &Arc<Self>,
        profile: Option<&str>,
    ) -> Result<Vec<ForecastEntry>, HostError> {
        let now = self.learner.clock().now();
        let catalogue = self.catalogue().await?;
        self.follow_versions(&catalogue).await;
        let mut foreseen = self.foresee(now, 0.0, &catalogue);
        foreseen.retain(|one| profile.is_none_or(|name| name == one.of.profile));
        let wall_ms = self.learner.clock().wall_ms(now);
        let mut prospects = Vec::new();
        for one in &foreseen {
            let components = one.forecast.components.iter();
            prospects.extend(components.map(|component| one.prospect(component, wall_ms)));
        }
        let worth = self.memory.appraise(prospects).await;
        let worth = worth.ok_or_else(|| HostError::Failed("there is no planner".to_owned()))?;
        let mut worth = worth.iter();
        let mut entries = Vec::new();
        for one in &foreseen {
            let control = self.learner.self_control(&one.of);
            for (component, worth) in one.forecast.components.iter().zip(&mut worth) {
                entries.push(entry_of(one, component, worth, control.clone(), &catalogue));
            }
        }
        entries.sort_by(|a, b| {
            b.score
                .total_cmp(&a.score)
                .then_with(|| b.probability.total_cmp(&a.probability))
                .then_with(|| {
                    (&a.profile, &a.vm, &a.component).cmp(&(&b.profile, &b.vm, &b.component))
                })
        });
        Ok(entries)
    }
}

/// A reason in words; what is inherited names the version that it is from.
fn reason(why: &Why, catalogue: &Catalogue) -> String {
    match why {
        Why::Touched(Basis::Predecessor { image, .. }) => {
            let label = catalogue.label(image);
            let label = label.as_deref().unwrap_or("a version that is gone");
            format!("inherited from {label}: {why}")
        }
        _ => why.to_string(),
    }
}

fn entry_of(
    foreseen: &Foreseen,
    component: &ComponentForecast,
    worth: &Appraisal,
    control: SelfControl,
    catalogue: &Catalogue,
) -> ForecastEntry {
    ForecastEntry {
        profile: foreseen.of.profile.clone(),
        owner: foreseen.of.owner.clone(),
        vm: foreseen.vm.clone(),
        component: component.component.clone(),
        image: component.image,
        attached: component.attached,
        probability: foreseen.probability(component),
        expected_in_s: Some(component.until_s),
        bytes: worth.bytes,
        resident_bytes: worth.resident_bytes,
        disk_bytes: worth.disk_bytes,
        seconds_saved: worth.seconds_saved,
        score: worth.seconds_per_mib(),
        reasons: component
            .reasons
            .iter()
            .map(|why| reason(why, catalogue))
            .collect(),
        control,
    }
}

impl Order {
    /// Its devices, as forecasts speak of them.
    fn present(&self) -> Vec<Present> {
        let names = |device: &PlannedDevice| {
            let inside = |image: &Digest| {
                *image == device.image || device.members.iter().any(|(member, _)| member == image)
            };
            let components = self.lock.components.iter();
            components
                .filter(|one| inside(&one.image))
                .map(|one| one.name.clone())
                .collect()
        };
        let devices = self.devices.iter();
        devices
            .map(|device| Present {
                label: device.label.clone(),
                names: names(device),
                image: device.image,
                image_bytes: device.image_bytes,
            })
            .collect()
    }
}

/// What a running VM has.
fn components_of(instance: &Instance) -> Vec<Present> {
    let components = instance.vm().components;
    components
        .into_iter()
        .map(|one| Present {
            label: format!("{} {}", one.name, one.version),
            names: vec![one.name],
            image: one.image,
            image_bytes: one.image_bytes,
        })
        .collect()
}
