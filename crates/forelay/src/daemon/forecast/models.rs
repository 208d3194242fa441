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

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use forelay_image::{Digest, Touch};
use forelay_predict::arrivals::{self, Forecaster};
use forelay_predict::needs::{self, Attachments, Context};
use forelay_predict::resources::Demand;
use forelay_predict::time::Timestamp;
use forelay_predict::working_set::{self, Expectation, Plans, WorkingSets};
use parking_lot::Mutex;

use crate::history::{ComponentRef, ProfileRef, ResourceSample};

/// Most times that a rolled-up composition is told to the model.
const MOST_REPEATS: f64 = 32.0;
/// Memory of a profile whose manifest is not known, in MiB.
const USUAL_MEMORY_MIB: u32 = 512;

/// The name under which models know a profile: two owners may use the same name.
pub fn model_key(of: &ProfileRef) -> String {
    format!("{}/{}", of.owner, of.profile)
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
    /// How much memory.
    pub demand: Mutex<Demand>,
}

/// Which components, and when those come that a launch does not bring.
pub struct Needs {
    /// Which.
    pub model: needs::Model,
    /// When.
    pub attachments: Attachments,
    open: BTreeMap<u64, OpenVm>,
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
    pub fn new(window_ms: u32, forecasting: bool, memory_mib: HashMap<String, u32>) -> Self {
        let sets = WorkingSets::new(working_set::Config {
            window_ms,
            ..working_set::Config::default()
        });
        let forecaster = Forecaster::new(arrivals::Config {
            forecasting,
            ..arrivals::Config::default()
        });
        Self {
            sets: Mutex::new(sets),
            plans: Mutex::default(),
            forecaster: Mutex::new(forecaster),
            needs: Mutex::new(Needs {
                model: needs::Model::new(needs::Config::default()),
                attachments: Attachments::new(),
                open: BTreeMap::new(),
                memory_mib,
            }),
            demand: Mutex::new(Demand::new()),
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
        vm: u64,
        components: impl Iterator<Item = &'a str>,
    ) {
        let mut needs = self.needs.lock();
        let context = needs.context(of, at);
        let components: Vec<String> = components.map(str::to_owned).collect();
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
        let mut needs = self.needs.lock();
        let context = needs.context(of, at);
        let names: Vec<String> = components.iter().map(|one| one.name.clone()).collect();
        for _ in 0..launches.clamp(1.0, MOST_REPEATS) as u32 {
            needs.observe(&context, &names);
        }
        drop(needs);
        self.relearn();
    }

    /// A running VM was given a component.
    pub fn attached(&self, at: Timestamp, vm: u64, component: &str) {
        let mut needs = self.needs.lock();
        let Some(open) = needs.open.get_mut(&vm) else {
            return;
        };
        open.components.push(component.to_owned());
        let delay_s = at.seconds_since(open.context.at);
        let profile = open.context.profile.clone();
        needs.attachments.attached(&profile, component, delay_s);
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
    pub fn sampled(&self, of: &ProfileRef, at: Timestamp, vm: u64, sample: &ResourceSample) {
        let bytes = sample.memory_bytes as f64;
        self.demand.lock().observe(&model_key(of), vm, at, bytes);
    }

    /// A VM is gone. Its components may make [`Self::relearn`] due.
    pub fn stopped(&self, vm: u64) {
        self.demand.lock().stopped(vm);
        self.needs.lock().close(vm);
    }

    /// Whether there is enough that was not there at the last relearning.
    pub fn relearn_due(&self) -> bool {
        self.needs.lock().model.relearn_due()
    }

    /// Learns anew how components depend on each other, if that is due. Takes up to tens of
    /// milliseconds, through which forecasts are made and events learned.
    pub fn relearn(&self) {
        let lesson = {
            let mut needs = self.needs.lock();
            if !needs.model.relearn_due() {
                return;
            }
            needs.model.lesson()
        };
        let learned = lesson.study();
        self.needs.lock().model.adopt(learned);
    }

    /// Closes VMs that do not run, whose end nobody saw.
    pub fn keep_running(&self, runs: impl Fn(u64) -> bool) {
        self.demand.lock().keep_running(&runs);
        let mut needs = self.needs.lock();
        let gone: Vec<u64> = needs.open.keys().copied().filter(|vm| !runs(*vm)).collect();
        for vm in gone {
            needs.close(vm);
        }
        drop(needs);
        self.relearn();
    }
}

impl Needs {
    pub(in crate::daemon) fn context(&self, of: &ProfileRef, at: Timestamp) -> Context {
        let profile = model_key(of);
        let memory_mib = self.memory_mib.get(&profile).copied();
        Context {
            memory_mib: memory_mib.unwrap_or(USUAL_MEMORY_MIB),
            owner: of.owner.clone(),
            profile,
            at,
        }
    }

    fn close(&mut self, vm: u64) {
        if let Some(open) = self.open.remove(&vm) {
            self.observe(&open.context, &open.components);
        }
    }

    fn observe(&mut self, context: &Context, components: &[String]) {
        let names = components.iter().map(String::as_str);
        self.model.observe(context, names);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_MS: i64 = 3_600_000;

    fn models() -> Models {
        let memory = HashMap::from([("ann/web".to_owned(), 256)]);
        Models::new(60_000, true, memory)
    }

    #[test]
    fn what_is_attached_to_a_vm_counts_to_it_and_an_unknown_vm_is_left_out() {
        let models = models();
        let of = ProfileRef::new("web", "ann");
        for number in 0..20_u64 {
            let at = Timestamp(number as i64 * HOUR_MS);
            models.launched_with(&of, at, number, ["base"].into_iter());
            models.attached(at.plus_ms(30_000), number, "tool");
            models.attached(at, 99, "stray");
            models.stopped(number);
            models.stopped(number);
            models.relearn();
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
