//! The models in memory: when (arrivals), what (needs), which parts (working sets), how much
//! memory (resources).
//!
//! Owns them and the one way in which each fact reaches them, used both online and when the
//! history is replayed at start ([`crate::daemon::forecast::replay`]); so a daemon that was restarted forecasts
//! what its predecessor did. Refuses to know the clock, the database and what becomes of a
//! forecast.
//!
//! Invariant: a VM's components are learned once, when it stops; until then it is open, and what
//! is attached to it is added.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use forelay_image::{Digest, Touch};
use forelay_predict::arrivals::{self, Forecaster};
use forelay_predict::needs::{self, Attachments, Context};
use forelay_predict::resources::Demand;
use forelay_predict::time::Timestamp;
use forelay_predict::working_set::{self, Expectation, Plans, WorkingSets};
use parking_lot::Mutex;

use crate::daemon::forecast::inherit::Lineage;
use crate::history::{ComponentRef, LaunchId, ProfileRef, ResourceSample};

/// Cap on replays of one rolled-up composition.
const MOST_REPEATS: f64 = 32.0;
/// Launches at a history's end over which the model is fitted as often as it was when they
/// happened; fits before that are superseded, and skipped.
const FITTED_IN_REPLAY: usize = 160;
/// Memory of a profile whose manifest is not known, in MiB.
const USUAL_MEMORY_MIB: u32 = 512;

/// The name under which models know a profile: two owners may use the same name.
pub fn model_key(of: &ProfileRef) -> String {
    format!("{}/{}", of.owner, of.profile)
}

/// The profile that models know under a name.
pub fn profile_of(key: &str) -> ProfileRef {
    let (owner, profile) = key.split_once('/').unwrap_or(("", key));
    ProfileRef::new(profile, owner)
}

/// All models of a host.
pub struct Models {
    /// Which parts.
    pub sets: Mutex<WorkingSets>,
    plans: Mutex<Plans>,
    /// When.
    pub forecaster: Mutex<Forecaster>,
    /// What.
    pub needs: Mutex<Needs>,
    /// Which versions components have had.
    pub lineage: Mutex<Lineage>,
    /// How much memory.
    pub demand: Mutex<Demand>,
    /// One fit at a time: a model whose training set is not the last one is not installed.
    fitting: Mutex<()>,
}

/// Which components, and when those come that a launch does not bring.
pub struct Needs {
    /// Which.
    pub model: needs::Model,
    /// When.
    pub attachments: Attachments,
    open: BTreeMap<LaunchId, OpenVm>,
    /// During a replay: the last compositions, not observed yet.
    held_back: Option<VecDeque<OpenVm>>,
    /// Memory by profile, as their manifests say.
    memory_mib: HashMap<String, u32>,
}

/// A VM that has not stopped.
struct OpenVm {
    context: Context,
    components: Vec<String>,
}

impl Models {
    /// Models that know nothing but the memory that profiles' manifests ask for.
    pub fn new(
        sets: working_set::WorkingSetConfig,
        forecasting: bool,
        memory_mib: HashMap<String, u32>,
    ) -> Self {
        let sets = WorkingSets::new(sets);
        let forecaster = Forecaster::new(arrivals::ArrivalsConfig {
            forecasting,
            ..arrivals::ArrivalsConfig::default()
        });
        Self {
            sets: Mutex::new(sets),
            plans: Mutex::default(),
            forecaster: Mutex::new(forecaster),
            needs: Mutex::new(Needs {
                model: needs::Model::new(needs::NeedsConfig::default()),
                attachments: Attachments::new(),
                open: BTreeMap::new(),
                held_back: None,
                memory_mib,
            }),
            lineage: Mutex::default(),
            demand: Mutex::new(Demand::new()),
            fitting: Mutex::default(),
        }
    }

    /// What is known of a launch of a profile at a time.
    pub fn context(&self, of: &ProfileRef, at: Timestamp) -> Context {
        self.needs.lock().context(of, at)
    }

    /// A manifest's memory, told before its launch is.
    pub fn note_memory(&self, of: &ProfileRef, memory_mib: u32) {
        let mut needs = self.needs.lock();
        needs.memory_mib.insert(model_key(of), memory_mib);
    }

    /// Launches of a profile.
    pub fn launches(&self, of: &ProfileRef, at: Timestamp, count: u32) {
        let mut forecaster = self.forecaster.lock();
        let profile = forecaster.profile(&model_key(of));
        let owner = forecaster.owner(&of.owner);
        forecaster.observe_launch(profile, owner, at, count.saturating_sub(1));
    }

    /// What a VM was launched with.
    pub fn launched_with<'a>(
        &self,
        of: &ProfileRef,
        at: Timestamp,
        vm: LaunchId,
        components: impl Iterator<Item = &'a ComponentRef>,
    ) {
        let components: Vec<String> = components.map(|one| self.note_version(one)).collect();
        let mut needs = self.needs.lock();
        let context = needs.context(of, at);
        for name in &components {
            needs.attachments.launched_with(&context.profile, name);
        }
        let open = OpenVm {
            context,
            components,
        };
        needs.open.insert(vm, open);
    }

    /// VMs of a profile that had these components, in so many launches.
    pub fn compositions(
        &self,
        of: &ProfileRef,
        at: Timestamp,
        components: &[ComponentRef],
        launches: f64,
    ) {
        let names: Vec<String> = components
            .iter()
            .map(|one| self.note_version(one))
            .collect();
        let mut needs = self.needs.lock();
        let context = needs.context(of, at);
        for _ in 0..launches.clamp(1.0, MOST_REPEATS) as u32 {
            needs.observe(OpenVm {
                context: context.clone(),
                components: names.clone(),
            });
        }
    }

    /// A running VM was given a component.
    pub fn attached(&self, at: Timestamp, vm: LaunchId, component: &ComponentRef) {
        let component = &self.note_version(component);
        let mut needs = self.needs.lock();
        let Some(open) = needs.open.get_mut(&vm) else {
            return;
        };
        open.components.push(component.to_owned());
        let delay_s = at.seconds_since(open.context.at);
        let profile = open.context.profile.clone();
        needs.attachments.attached(&profile, component, delay_s);
    }

    /// Notes which image a component has; returns its name.
    fn note_version(&self, component: &ComponentRef) -> String {
        let mut lineage = self.lineage.lock();
        lineage.note(&component.name, component.image);
        component.name.clone()
    }

    /// What a launch of a profile (by its key) touches of images, in first-touch order.
    pub fn plan(&self, profile: &str, images: &[Digest]) -> Arc<[Expectation]> {
        let sets = self.sets.lock();
        self.plans.lock().plan(&sets, profile, images)
    }

    /// What a VM touched of images that it had.
    pub fn touched(&self, of: &ProfileRef, images: &[Digest], touches: &[Touch]) {
        let mut sets = self.sets.lock();
        sets.observe(&model_key(of), images, touches);
    }

    /// What a VM touched of them after that.
    pub fn touched_late(&self, of: &ProfileRef, touches: &[Touch]) {
        self.sets.lock().observe_late(&model_key(of), touches);
    }

    /// What a VM used.
    pub fn sampled(&self, of: &ProfileRef, at: Timestamp, vm: LaunchId, sample: &ResourceSample) {
        let bytes = sample.memory_bytes as f64;
        self.demand.lock().observe(&model_key(of), vm.0, at, bytes);
    }

    /// A VM is gone. Its components may make a fit due.
    pub fn stopped(&self, vm: LaunchId) {
        self.demand.lock().stopped(vm.0);
        self.needs.lock().close(vm);
    }

    /// Whether there is enough that was not there at the last fit.
    pub fn fit_due(&self) -> bool {
        self.needs.lock().model.fit_due()
    }

    /// Fits again how components depend on each other, if that is due. Takes milliseconds to a
    /// few seconds of this thread, through which forecasts are made and events learned.
    pub fn fit_if_due(&self) {
        let Some(_fitting) = self.fitting.try_lock() else {
            return;
        };
        let training = {
            let mut needs = self.needs.lock();
            if !needs.model.fit_due() {
                return;
            }
            needs.model.training_set()
        };
        let fitted = training.fit();
        self.needs.lock().model.install(fitted);
    }

    /// A history is about to be replayed: of the fits that were made while it happened only the
    /// last few matter at its end.
    pub fn begin_replay(&self) {
        self.needs.lock().held_back.get_or_insert_default();
    }

    /// The history was replayed to its end. Makes its last fits: not on async threads.
    pub fn end_replay(&self) {
        let held_back = self.needs.lock().held_back.take();
        for vm in held_back.into_iter().flatten() {
            self.needs.lock().observe_now(&vm);
            self.fit_if_due();
        }
    }

    /// Closes VMs that do not run, whose end nobody saw.
    pub fn keep_running(&self, runs: impl Fn(LaunchId) -> bool) {
        self.demand.lock().keep_running(|vm| runs(LaunchId(vm)));
        let mut needs = self.needs.lock();
        let gone: Vec<LaunchId> = needs.open.keys().copied().filter(|vm| !runs(*vm)).collect();
        for vm in gone {
            needs.close(vm);
        }
        drop(needs);
        self.fit_if_due();
    }
}

impl Needs {
    pub fn context(&self, of: &ProfileRef, at: Timestamp) -> Context {
        let profile = model_key(of);
        let memory_mib = self.memory_mib.get(&profile).copied();
        Context {
            memory_mib: memory_mib.unwrap_or(USUAL_MEMORY_MIB),
            owner: of.owner.clone(),
            profile,
            at,
        }
    }

    fn close(&mut self, vm: LaunchId) {
        if let Some(open) = self.open.remove(&vm) {
            self.observe(open);
        }
    }

    fn observe(&mut self, vm: OpenVm) {
        let Some(held_back) = &mut self.held_back else {
            self.observe_now(&vm);
            return;
        };
        held_back.push_back(vm);
        if held_back.len() > FITTED_IN_REPLAY
            && let Some(oldest) = held_back.pop_front()
        {
            self.observe_now(&oldest);
            if self.model.fit_due() {
                self.model.skip_fit();
            }
        }
    }

    fn observe_now(&mut self, vm: &OpenVm) {
        let names = vm.components.iter().map(String::as_str);
        self.model.observe(&vm.context, names);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_MS: i64 = 3_600_000;

    fn component(name: &str) -> ComponentRef {
        ComponentRef {
            name: name.into(),
            image: Digest::of(name.as_bytes()),
        }
    }

    fn models() -> Models {
        let memory = HashMap::from([("ann/web".to_owned(), 256)]);
        Models::new(Default::default(), true, memory)
    }

    #[test]
    fn what_is_attached_to_a_vm_counts_to_it_and_an_unknown_vm_is_left_out() {
        let models = models();
        let of = ProfileRef::new("web", "ann");
        for number in 0..20_u64 {
            let at = Timestamp(number as i64 * HOUR_MS);
            let vm = LaunchId(number);
            models.launched_with(&of, at, vm, [component("base")].iter());
            models.attached(at.plus_ms(30_000), vm, &component("tool"));
            models.attached(at, LaunchId(99), &component("stray"));
            models.stopped(vm);
            models.stopped(vm);
            models.fit_if_due();
        }
        let needs = models.needs.lock();
        assert_eq!(needs.model.observed(), 20);
        let context = needs.context(&of, Timestamp(21 * HOUR_MS));
        assert_eq!(context.memory_mib, 256);
        let ranked = needs.model.rank(&context, &["base"]);
        assert!(
            ranked.iter().any(|(name, p)| &**name == "tool" && *p > 0.8),
            "{ranked:?}"
        );
        assert!(ranked.iter().all(|(name, _)| &**name != "stray"));
        // Another owner's profile of the same name is another profile.
        let other = ProfileRef::new("web", "bob");
        assert_eq!(
            needs.context(&other, Timestamp(0)).memory_mib,
            USUAL_MEMORY_MIB
        );
    }
}
