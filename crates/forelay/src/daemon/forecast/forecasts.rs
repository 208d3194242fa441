//! Forecasts put together: for each profile's next launch and each running VM, the components
//! it will want and of each the extents, with conditional probabilities.
//!
//! Owns the questions to the models; the combination is [`forelay_predict::rank`]'s. Also
//! answers `forelay forecast`, for which the planner says where bytes are and what they are
//! worth. Refuses to act: that is the prefetch loop's, and in the end the planner's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forelay_cache::plan::{Appraisal, Prospect};
use forelay_cache::{DeviceImage, Domain, PlannerEvent};
use forelay_image::component::{Component, Role};
use forelay_image::{ComponentId, Digest, PlannedExtent};
use forelay_predict::arrivals::LaunchForecast;
use forelay_predict::rank::{
    self, ComponentForecast, Knowledge, Present, Subject, VmForecast, Why,
};
use forelay_predict::time::Timestamp;
use forelay_predict::working_set::Basis;
use forelay_store::Store;
use tokio::sync::watch;

use crate::api::{ForecastEntry, SelfControl};
use crate::daemon::error::HostError;
use crate::daemon::forecast::inherit::{ComponentVersion, Inheritance};
use crate::daemon::forecast::last_launches::LastLaunches;
use crate::daemon::forecast::learning::Learner;
use crate::daemon::forecast::models::model_key;
use crate::daemon::memory::planner::PlannerHandle;
use crate::daemon::order::{Order, PlannedDevice};
use crate::history::{LaunchId, ProfileRef};

/// How long new versions' inheritance may hold up forecasts of one profile.
const INHERIT_AHEAD_LIMIT: Duration = Duration::from_secs(5);

/// The newest version of each component that can be attached.
#[derive(Clone, Default)]
pub struct Catalogue {
    /// Every version of every component.
    listed: Vec<Arc<Component>>,
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
pub struct Upcoming {
    pub of: ProfileRef,
    pub domain: Domain,
    pub need: Need,
    pub forecast: VmForecast,
}

/// For what components will be needed.
pub enum Need {
    /// The next launch of a profile: what it will ask for, and why it is expected.
    Launch(Arc<Order>, LaunchForecast),
    /// Attachments to the running VM of this name.
    Attachments(String),
}

impl Upcoming {
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

/// A VM that runs, as forecasts need to know it.
#[derive(Clone, Debug)]
pub struct LiveVm {
    /// Its name.
    pub name: String,
    /// Its profile.
    pub of: ProfileRef,
    /// Its trust domain.
    pub domain: Domain,
    /// Its launch in the history.
    pub launch_id: LaunchId,
    /// When its launch was asked for, milliseconds since the epoch.
    pub launched_ms: i64,
    /// The components that it has.
    pub components: Vec<Present>,
}

/// Says which VMs run.
pub trait LiveVms: Send + Sync {
    /// Those that live now.
    fn live_vms(&self) -> Vec<LiveVm>;
}

/// Asks the models what is needed next.
pub struct Forecasts {
    pub store: Store,
    pub learner: Arc<Learner>,
    pub last_launches: Arc<LastLaunches>,
    pub inheritance: Arc<Inheritance>,
    pub live: Arc<dyn LiveVms>,
    pub planner: Arc<PlannerHandle>,
    /// How far ahead needs are forecast; the planner's horizon is the same.
    pub horizon: Duration,
    /// The components that were last listed, for those who prepare something of them.
    pub listed: watch::Sender<Vec<Arc<Component>>>,
}

impl Forecasts {
    /// Opens the history, and tells the planner of past launches.
    pub async fn open_history(&self) -> Result<(), HostError> {
        let recent = self.learner.open_history().await?;
        let live = self.live.live_vms();
        let live: Vec<LaunchId> = live.iter().map(|one| one.launch_id).collect();
        self.learner.models().keep_running(|vm| live.contains(&vm));
        let launches = self.last_launches.past(&recent, self.learner.clock());
        self.planner
            .tell(PlannerEvent::LaunchesRemembered(launches));
        Ok(())
    }

    /// What components there are to attach.
    pub async fn catalogue(&self) -> Result<Catalogue, HostError> {
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
        self.listed.send_if_modified(|listed| {
            let same = *listed == components;
            listed.clone_from(&components);
            !same
        });
        catalogue.listed = components;
        Ok(catalogue)
    }

    /// Takes new versions of components into account: in what next launches will ask for, and in
    /// what is known of the versions' use.
    pub async fn follow_versions(&self, catalogue: &Catalogue) {
        let (launches, listed) = (Arc::clone(&self.last_launches), catalogue.listed.clone());
        let resolved = tokio::task::spawn_blocking(move || launches.resolve_again(&listed)).await;
        if let Err(error) = resolved {
            tracing::error!(%error, "next launches were not resolved again");
        }
        for order in self.last_launches.all() {
            self.inheritance
                .prepare_order(&order, INHERIT_AHEAD_LIMIT)
                .await;
        }
        let running = self.live.live_vms().into_iter();
        let running: BTreeMap<String, ProfileRef> =
            running.map(|vm| (model_key(&vm.of), vm.of)).collect();
        for of in running.values() {
            let versions = catalogue.versions();
            self.inheritance
                .prepare(of, versions, INHERIT_AHEAD_LIMIT)
                .await;
        }
    }

    /// Launches of profiles within the horizon, those at least so likely.
    pub fn next_launches(&self, now: Timestamp, least_probability: f64) -> Vec<LaunchForecast> {
        let horizon_s = self.horizon.as_secs_f64();
        self.learner
            .next_launches(now, horizon_s, least_probability)
    }

    /// What the next launches of profiles will want, those at least so likely, and running VMs.
    pub fn upcoming(
        &self,
        now: Timestamp,
        least_probability: f64,
        catalogue: &Catalogue,
    ) -> Vec<Upcoming> {
        let launches = self.next_launches(now, least_probability);
        let orders = self.last_launches.all().into_iter().filter_map(|order| {
            let key = model_key(&order.of);
            let launch = launches.iter().find(|one| one.profile == key);
            let launch = launch.filter(|one| one.probability > 0.0)?;
            Some(self.upcoming_launch(now, order, launch, catalogue))
        });
        let mut upcoming: Vec<Upcoming> = orders.collect();
        let running = self.live.live_vms().into_iter();
        upcoming.extend(running.map(|vm| self.upcoming_attachments(now, vm, catalogue)));
        upcoming
    }

    fn upcoming_launch(
        &self,
        now: Timestamp,
        order: Arc<Order>,
        launch: &LaunchForecast,
        catalogue: &Catalogue,
    ) -> Upcoming {
        let context = self.learner.models().context(&order.of, now);
        let subject = Subject::upcoming(launch, context, now, present(&order));
        Upcoming {
            of: order.of.clone(),
            domain: order.domain.clone(),
            forecast: self.ask(&subject, catalogue),
            need: Need::Launch(order, launch.clone()),
        }
    }

    fn upcoming_attachments(&self, now: Timestamp, vm: LiveVm, catalogue: &Catalogue) -> Upcoming {
        let context = self.learner.models().context(&vm.of, now);
        let age_s = now.seconds_since(self.learner.clock().of(vm.launched_ms));
        let subject = Subject::running(context, vm.components, age_s);
        Upcoming {
            of: vm.of,
            domain: vm.domain,
            forecast: self.ask(&subject, catalogue),
            need: Need::Attachments(vm.name),
        }
    }

    fn ask(&self, subject: &Subject, catalogue: &Catalogue) -> VmForecast {
        let models = self.learner.models();
        let needs = models.needs.lock();
        let known = Knowledge {
            needs: &needs.model,
            attachments: &needs.attachments,
            plan: &|profile, images| models.plan(profile, images),
            horizon_s: self.horizon.as_secs_f64(),
            locate: &|name| catalogue.by_name.get(name).cloned(),
        };
        rank::forecast(subject, &known)
    }

    /// What is expected to be needed next, most valuable first.
    pub async fn report(&self, profile: Option<&str>) -> Result<Vec<ForecastEntry>, HostError> {
        let now = self.learner.clock().now();
        let catalogue = self.catalogue().await?;
        self.follow_versions(&catalogue).await;
        let mut upcoming = self.upcoming(now, 0.0, &catalogue);
        upcoming.retain(|one| profile.is_none_or(|name| name == one.of.profile));
        let wall_ms = self.learner.clock().wall_ms(now);
        let mut prospects = Vec::new();
        for one in &upcoming {
            let components = one.forecast.components.iter();
            prospects.extend(components.map(|component| one.prospect(component, wall_ms)));
        }
        let worth = self.planner.appraise(prospects).await;
        let worth = worth.ok_or_else(|| HostError::Failed("there is no planner".to_owned()))?;
        let mut worth = worth.iter();
        let mut entries = Vec::new();
        for one in &upcoming {
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
    upcoming: &Upcoming,
    component: &ComponentForecast,
    worth: &Appraisal,
    control: SelfControl,
    catalogue: &Catalogue,
) -> ForecastEntry {
    let vm = match &upcoming.need {
        Need::Launch(..) => None,
        Need::Attachments(vm) => Some(vm.clone()),
    };
    ForecastEntry {
        profile: upcoming.of.profile.clone(),
        owner: upcoming.of.owner.clone(),
        vm,
        component: component.component.clone(),
        image: component.image,
        attached: component.attached,
        probability: upcoming.probability(component),
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

/// An order's devices, as forecasts speak of them.
fn present(order: &Order) -> Vec<Present> {
    let names = |device: &PlannedDevice| {
        let inside = |image: &Digest| {
            *image == device.image || device.members.iter().any(|(member, _)| member == image)
        };
        let components = order.lock.components.iter();
        components
            .filter(|one| inside(&one.image))
            .map(|one| one.name.clone())
            .collect()
    };
    let devices = order.devices.iter();
    devices
        .map(|device| Present {
            label: device.label.clone(),
            names: names(device),
            image: device.image,
            image_bytes: device.image_bytes,
        })
        .collect()
}
