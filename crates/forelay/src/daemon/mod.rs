//! The host daemon: everything that runs VMs from shared memory, behind one API.
//!
//! ```text
//! forelay daemon = holder (FUSE sessions) -> pinner (locks)
//!                                         -> worker: this module
//! worker:  server (API) -> Host -> launch -> recipe, domains, planner, VMM
//!          faults -> domains -> disk cache, repository
//!          observer -> learning -> plan of the next launch -> planner -> prefetcher
//! ```
//! The worker may die at any time: the holder starts another, which finds the instances'
//! records, serves the same mounts and reattaches the VMs.
//!
//! Invariants: no VM ever sees an error for a page; what a client is told to have
//! happened is on disk or in the kernel.

mod api;
mod forecast;
mod launch;
mod memory;
mod process;
#[cfg(test)]
mod spine_tests;
mod vm;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forelay_host::error_chain;
use forelay_store::Store;
use forelay_vm::qemu::QemuDriver;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::api::{PrefetchRequest, Prefetched, Vm, VmState};
use crate::config::Config;
use api::accounts::MemoryAccounts;
use api::inspect::VmMaps;
use forecast::inherit::Inheritance;
use forecast::last_launches::LastLaunches;
use forecast::learning::Learner;
use forecast::observation::LearningTasks;
use launch::LaunchService;
use launch::admit::Admission;
use launch::compose::Composer;
use launch::map::Mapper;
use launch::prefetch::LaunchPrefetcher;
use launch::prepared::{Premaps, Preparer};
use launch::resolve::Resolver;
use launch::start::Starter;
use memory::domains::Domains;
use memory::planner::PlannerHandle;
use memory::waiting::{PendingWait, longest_waits};
use process::health::Health;
use vm::attach::AttachService;
use vm::registry::{Instance, VmRegistry};
use vm::supervise::Supervisor;

pub use forecast::learning::HISTORY_FILE;
pub use process::holder::{run_check, run_holder, run_pinner};
pub use process::startup::{create_store, open_store};
pub use process::worker::run_worker;

/// How long a guest may take to power itself off.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// How long a VMM that was killed may take to be seen gone.
const KILL_LIMIT: Duration = Duration::from_secs(20);
/// How long all VMs may take to stop when the daemon ends.
const STOP_ALL: Duration = Duration::from_secs(30);
/// How long learning may take that the daemon's end cuts short.
const LEARN_GRACE: Duration = Duration::from_secs(5);

/// Why the daemon did not do as asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HostError {
    /// No instance of this name.
    #[error("no VM is called {0:?}: `forelay ps --all` lists them")]
    NoSuchVm(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The thing is in use, or not in a state for this.
    #[error("{0}")]
    Busy(String),
    /// Something did not work.
    #[error("{0}")]
    Failed(String),
    /// A launch was told to end.
    #[error("it was stopped before its VMM ran")]
    Cancelled,
}

impl HostError {
    /// A failure with all its causes.
    pub fn failed(error: impl std::error::Error) -> Self {
        Self::Failed(error_chain(&error))
    }

    /// A refusal with all its causes.
    pub fn invalid(error: impl std::error::Error) -> Self {
        Self::Invalid(error_chain(&error))
    }
}

/// Everything the daemon has, wired together: what does the work are the services.
pub struct Host {
    config: Config,
    started: Instant,
    health: Health,
    /// VMs of before were looked for, and the history was read or found missing.
    settled: watch::Sender<bool>,
    store: Store,
    domains: Arc<Domains>,
    memory: Arc<PlannerHandle>,
    learner: Arc<Learner>,
    learning_tasks: Arc<LearningTasks>,
    inheritance: Arc<Inheritance>,
    last_launches: Arc<LastLaunches>,
    demand: memory::samples::ForecastDemand,
    instances: Arc<VmRegistry>,
    driver: Arc<QemuDriver>,
    takeover: Arc<Mutex<Option<crate::api::Takeover>>>,
    premaps: Arc<Premaps>,
    mapper: Arc<Mapper>,
    supervisor: Arc<Supervisor>,
    launches: Arc<LaunchService>,
    attachments: AttachService,
    accounts: Arc<MemoryAccounts>,
    maps: Arc<VmMaps>,
}

/// What a host is made of.
struct Parts {
    config: Config,
    health: Health,
    store: Store,
    domains: Arc<Domains>,
    memory: Arc<PlannerHandle>,
    learner: Arc<Learner>,
    last_launches: Arc<LastLaunches>,
    demand: memory::samples::ForecastDemand,
    driver: Arc<QemuDriver>,
    premaps: Arc<Premaps>,
    /// Instances, none yet.
    instances: Arc<VmRegistry>,
    learning_tasks: Arc<LearningTasks>,
}

impl Parts {
    fn mapper(&self) -> Arc<Mapper> {
        Arc::new(Mapper {
            store: self.store.clone(),
            domains: Arc::clone(&self.domains),
        })
    }

    fn composer(&self) -> Arc<Composer> {
        let kernels = self.config.state_dir.join("kernels");
        Arc::new(Composer::new(self.store.clone(), kernels))
    }

    fn supervisor(&self) -> Arc<Supervisor> {
        Arc::new(Supervisor {
            store: self.store.clone(),
            domains: Arc::clone(&self.domains),
            memory: Arc::clone(&self.memory),
            learner: Arc::clone(&self.learner),
            learning_tasks: Arc::clone(&self.learning_tasks),
            window: Duration::from_secs_f64(self.config.forecast.window_s.max(0.0)),
        })
    }

    fn launches(
        &self,
        mapper: &Arc<Mapper>,
        composer: &Arc<Composer>,
        supervisor: &Arc<Supervisor>,
        inheritance: &Arc<Inheritance>,
    ) -> Arc<LaunchService> {
        Arc::new(LaunchService {
            resolver: Resolver {
                store: self.store.clone(),
                pmem_slots: self.config.vmm.pmem_slots,
            },
            admission: Admission {
                registry: Arc::clone(&self.instances),
                learner: Arc::clone(&self.learner),
                last_launches: Arc::clone(&self.last_launches),
                vms_dir: self.config.vms_dir(),
            },
            mapper: Arc::clone(mapper),
            prefetcher: LaunchPrefetcher {
                memory: Arc::clone(&self.memory),
                learner: Arc::clone(&self.learner),
                inheritance: Arc::clone(inheritance),
                enabled: self.config.forecast.prefetch,
            },
            composer: Arc::clone(composer),
            premaps: Arc::clone(&self.premaps),
            starter: Starter::new(Arc::clone(&self.driver)),
            supervisor: Arc::clone(supervisor),
        })
    }

    fn accounts(&self, takeover: &Arc<Mutex<Option<crate::api::Takeover>>>) -> MemoryAccounts {
        MemoryAccounts {
            store: self.store.clone(),
            domains: Arc::clone(&self.domains),
            memory: Arc::clone(&self.memory),
            registry: Arc::clone(&self.instances),
            premaps: Arc::clone(&self.premaps),
            takeover: Arc::clone(takeover),
        }
    }

    fn maps(&self) -> VmMaps {
        VmMaps {
            store: self.store.clone(),
            domains: Arc::clone(&self.domains),
            memory: Arc::clone(&self.memory),
            registry: Arc::clone(&self.instances),
        }
    }
}

impl Host {
    /// Puts the services together; also returns the one that prepares likely launches.
    fn new(parts: Parts) -> (Self, Preparer) {
        let (mapper, composer) = (parts.mapper(), parts.composer());
        let supervisor = parts.supervisor();
        let inheritance = Inheritance::new(parts.store.clone(), Arc::clone(&parts.learner));
        let inheritance = Arc::new(inheritance);
        let launches = parts.launches(&mapper, &composer, &supervisor, &inheritance);
        let takeover = Arc::default();
        let preparer = Preparer {
            premaps: Arc::clone(&parts.premaps),
            mapper: Arc::clone(&mapper),
            composer,
            registry: Arc::clone(&parts.instances),
        };
        let host = Self {
            started: Instant::now(),
            settled: watch::Sender::new(false),
            accounts: Arc::new(parts.accounts(&takeover)),
            maps: Arc::new(parts.maps()),
            attachments: AttachService {
                store: parts.store.clone(),
                mapper: Arc::clone(&mapper),
                memory: Arc::clone(&parts.memory),
                learner: Arc::clone(&parts.learner),
                supervisor: Arc::clone(&supervisor),
            },
            config: parts.config,
            health: parts.health,
            store: parts.store,
            domains: parts.domains,
            memory: parts.memory,
            learner: parts.learner,
            learning_tasks: parts.learning_tasks,
            inheritance,
            last_launches: parts.last_launches,
            demand: parts.demand,
            instances: parts.instances,
            driver: parts.driver,
            takeover,
            premaps: parts.premaps,
            mapper,
            supervisor,
            launches,
        };
        (host, preparer)
    }

    /// Time since this daemon started.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// What VMs run under, once a kernel is known.
    pub fn accelerator(&self) -> String {
        let known = self.launches.starter.accelerator();
        known.unwrap_or_else(|| crate::api::NOT_PROBED.to_owned())
    }

    /// What this daemon does without.
    pub fn degraded(&self) -> Vec<crate::api::Degraded> {
        self.health.missing()
    }

    /// Waits until the VMs of before were looked for and the history was read, if it could be.
    pub async fn settled(&self) {
        // The sender lives as long as this.
        let _ = self.settled.subscribe().wait_for(|settled| *settled).await;
    }

    /// All instances.
    pub fn vms(&self) -> Vec<Vm> {
        let all = self.instances.all();
        let waiting = longest_waits(&self.domains);
        let shown = all.iter().map(|one| self.with_waits(one, &waiting));
        let mut vms: Vec<Vm> = shown.collect();
        vms.sort_by(|a, b| (a.launched_ms, &a.name).cmp(&(b.launched_ms, &b.name)));
        vms
    }

    /// A VM with what it waited for until now, and what it waits for.
    fn with_waits(&self, instance: &Instance, waiting: &BTreeMap<u32, PendingWait>) -> Vm {
        let mut vm = instance.vm();
        if let Some(pid) = vm.pid {
            if let Some(waits) = self.domains.attribution().figures(pid) {
                vm.waits = waits.into();
            }
            vm.waiting = waiting.get(&pid).map(|wait| {
                let mut devices = instance.devices().into_iter();
                let device = devices.find(|device| device.image == wait.image());
                wait.view(device.map(|device| device.component))
            });
        }
        vm
    }

    fn instance(&self, name: &str) -> Result<Arc<Instance>, HostError> {
        self.instances
            .get(name)
            .ok_or_else(|| HostError::NoSuchVm(name.to_owned()))
    }

    /// One instance; waits up to `patience` for its state to change.
    pub async fn vm(&self, name: &str, patience: Duration) -> Result<Vm, HostError> {
        let instance = self.instance(name)?;
        let mut watch = instance.watch();
        let before = watch.borrow_and_update().state;
        let changed = async {
            while watch.changed().await.is_ok() {
                if watch.borrow_and_update().state != before {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(patience, changed).await;
        Ok(self.with_waits(&instance, &longest_waits(&self.domains)))
    }

    /// Stops an instance; one that has ended already is left as it is, and one that is
    /// being launched is cancelled.
    pub async fn stop(&self, name: &str) -> Result<Vm, HostError> {
        let instance = self.instance(name)?;
        self.stop_instance(&instance).await?;
        Ok(instance.vm())
    }

    async fn stop_instance(&self, instance: &Instance) -> Result<(), HostError> {
        instance.cancel();
        let vm = instance.vm();
        if vm.state == VmState::Unreachable {
            // It cannot be asked.
            let killed = process::takeover::kill_recorded(&vm.runtime_dir);
            let ended = tokio::time::timeout(KILL_LIMIT, instance.ended()).await;
            return ended.map_err(|_| not_ended(&vm, killed.err()));
        }
        // A launch that was handed over a moment ago cannot be cancelled any more.
        if let Some(handle) = instance.launched().await {
            self.supervisor.scan_now(instance).await;
            handle.stop(STOP_GRACE).await.map_err(HostError::failed)?;
            instance.ended().await;
        }
        Ok(())
    }

    /// Stops all instances, and lets no further one start. What has not stopped by itself
    /// after [`STOP_ALL`] is killed.
    pub async fn stop_all(&self) {
        let live = self.instances.close();
        let stops = live.iter().map(|instance| self.stop_instance(instance));
        let stops = futures_util::future::join_all(stops);
        let Ok(stopped) = tokio::time::timeout(STOP_ALL, stops).await else {
            for instance in live.iter().filter(|instance| instance.is_live()) {
                tracing::error!(vm = instance.name(), "a VM did not stop in time: killed");
                if let Some(Err(error)) = instance.handle().map(|handle| handle.kill()) {
                    tracing::error!(vm = instance.name(), %error, "it lives on");
                }
            }
            return;
        };
        for error in stopped.into_iter().filter_map(Result::err) {
            tracing::error!(%error, "a VM did not stop");
        }
    }

    /// Finishes what is being learned; this daemon ends.
    pub async fn finish_learning(&self) {
        if !self.learning_tasks.finish(LEARN_GRACE).await {
            tracing::error!("some of what was touched lately is not learned: it took too long");
        }
    }

    /// Maps a manifest's devices and loads what a launch is expected to touch.
    pub async fn prefetch(&self, request: PrefetchRequest) -> Result<Prefetched, HostError> {
        let started = Instant::now();
        let LaunchService {
            resolver,
            prefetcher,
            ..
        } = &*self.launches;
        let resolving = resolver.resolve(&request.manifest, request.lock.as_deref());
        let order = Arc::new(resolving.await?);
        let records = self.mapper.map_images(&order).await?;
        let plan = prefetcher.plan(&order, request.mode);
        self.premaps.offer(&order);
        prefetcher.announce(&order, &plan);
        if request.wait {
            let waiting = prefetcher.wait_resident(&order.domain, &plan.working_set);
            waiting.await;
        }
        let planned: Vec<_> = plan.working_set.iter().map(|one| one.extent).collect();
        let devices = records.iter().enumerate();
        let devices =
            devices.map(|(index, one)| self.maps.map_device(&order.domain, index + 1, one, 0));
        Ok(Prefetched {
            profile: order.of.profile.clone(),
            domain: order.domain.as_str().to_owned(),
            devices: devices.collect(),
            planned_bytes: forelay_image::extent::total_bytes(&planned),
            took_s: started.elapsed().as_secs_f64(),
        })
    }

    /// What is known of profiles' past.
    pub async fn history(
        &self,
        profile: Option<&str>,
    ) -> Result<Vec<crate::api::HistoryEntry>, HostError> {
        self.learner.entries(profile).await
    }
}

/// Why a VM lives on that was to be killed, and what is left to do.
fn not_ended(vm: &Vm, error: Option<std::io::Error>) -> HostError {
    let why = error.map_or_else(
        || format!("was killed and has not ended in {KILL_LIMIT:?}, so it hangs in the kernel"),
        |error| format!("cannot be killed: {error}"),
    );
    let pid = vm.pid.map_or("PID".to_owned(), |pid| pid.to_string());
    HostError::Failed(format!(
        "the VMM of {} {why}: `cat /proc/{pid}/stack` tells what it waits for, and `grep -l {} \
         /proc/*/environ` which process it is",
        vm.name,
        vm.runtime_dir.display()
    ))
}
