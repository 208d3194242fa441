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
mod error;
mod events;
mod forecast;
mod launch;
mod memory;
mod order;
mod process;
#[cfg(test)]
mod scale_tests;
#[cfg(test)]
mod service_tests;
mod snapshot;
#[cfg(test)]
mod spine_tests;
mod vm;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::AtomicI64;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use forelay_cache::Domain;
use forelay_image::Digest;
use forelay_store::{ImageHold, Store};
use forelay_vm::qemu::QemuDriver;
use parking_lot::Mutex;
use tokio::sync::mpsc::{Sender, UnboundedReceiver, channel};
use tokio::sync::watch;

use crate::api::{Degraded, Takeover};
use crate::config::Config;
use api::accounts::MemoryAccounts;
use api::audit::Audit;
use api::inspect::VmMaps;
use forecast::announced::AnnouncedLaunches;
use forecast::forecasts::Forecasts;
use forecast::inherit::Inheritance;
use forecast::last_launches::LastLaunches;
use forecast::learning::Learner;
use forecast::observation::LearningTasks;
use forecast::prefetch_loop::PrefetchLoop;
use forelay_cache::plan::PreparedLaunch;
use launch::LaunchService;
use launch::admit::Admission;
use launch::ahead::{Improvable, MOST_WAITING, SnapshotsAhead};
use launch::compose::Composer;
use launch::confinement::Confiner;
use launch::find::SnapshotFinder;
use launch::maker::Maker;
use launch::prefetch::LaunchPrefetcher;
use launch::prepared::{Preparations, Preparer};
use launch::resolve::Resolver;
use launch::standby::StandbyStarter;
use launch::start::Starter;
use memory::domains::Domains;
use memory::mapper::Mapper;
use memory::planner::{PlannerHandle, PlannerSender};
use memory::residency::Reconciler;
use memory::samples::ForecastDemand;
use process::health::Health;
use snapshot::service::Snapshots;
use vm::attach::AttachService;
use vm::logs::keep_bounded;
use vm::registry::VmRegistry;
use vm::service::VmService;
use vm::supervise::Supervisor;
use vm::usage::UsageSampler;
use vm::vmm_groups::VmmGroups;

pub use forecast::learning::HISTORY_FILE;
pub use launch::kept::images_in_use;
pub use process::holder::{run_check, run_holder, run_pinner};
pub use process::startup::{create_store, open_first_store, open_other_store, open_store};
pub use process::worker::run_worker;

/// How long learning may take that the daemon's end cuts short.
const LEARN_GRACE: Duration = Duration::from_secs(5);

/// Everything the daemon has, wired together: what does the work are the services.
pub struct Host {
    config: Config,
    started: Instant,
    /// Where the API is served over TCP.
    dashboard: OnceLock<SocketAddr>,
    health: Health,
    /// Who changed what.
    audit: Audit,
    /// VMs of before were looked for, and the history was read or found missing.
    settled: watch::Sender<bool>,
    store: Store,
    domains: Arc<Domains>,
    memory: Arc<PlannerHandle>,
    learning_tasks: Arc<LearningTasks>,
    demand: ForecastDemand,
    instances: Arc<VmRegistry>,
    driver: Arc<QemuDriver>,
    takeover: Arc<Mutex<Option<Takeover>>>,
    /// Images of VMs that were taken over: they stay what they are.
    inherited_holds: Mutex<HashMap<Digest, ImageHold>>,
    announced: Arc<AnnouncedLaunches>,
    mapper: Arc<Mapper>,
    forecasts: Arc<Forecasts>,
    supervisor: Arc<Supervisor>,
    snapshots: Arc<Snapshots>,
    preparations: Arc<Preparations>,
    standby: Arc<tokio::sync::Mutex<StandbyStarter>>,
    launches: Arc<LaunchService>,
    attachments: AttachService,
    vms: VmService,
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
    planner: PlannerSender,
    /// Launches that the planner would have prepared.
    likely: UnboundedReceiver<PreparedLaunch>,
    learner: Arc<Learner>,
    last_launches: Arc<LastLaunches>,
    demand: ForecastDemand,
    driver: Arc<QemuDriver>,
    /// Of VMMs, where they are confined.
    groups: Option<Arc<VmmGroups>>,
    preparations: Arc<Preparations>,
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
            groups: self.groups.clone(),
            store: self.store.clone(),
            domains: Arc::clone(&self.domains),
            memory: Arc::clone(&self.memory),
            learner: Arc::clone(&self.learner),
            learning_tasks: Arc::clone(&self.learning_tasks),
            histograms: Arc::default(),
            window: Duration::from_secs_f64(self.config.forecast.window_s.max(0.0)),
        })
    }

    fn forecasts(&self) -> Arc<Forecasts> {
        let inheritance = Inheritance::new(self.store.clone(), Arc::clone(&self.learner));
        Arc::new(Forecasts {
            store: self.store.clone(),
            learner: Arc::clone(&self.learner),
            last_launches: Arc::clone(&self.last_launches),
            inheritance: Arc::new(inheritance),
            live: Arc::clone(&self.instances) as _,
            planner: Arc::clone(&self.memory),
            horizon: self.config.forecast.horizon(),
            listed: watch::Sender::default(),
        })
    }

    fn snapshots(&self) -> Arc<Snapshots> {
        Arc::new(Snapshots {
            dir: self.config.snapshots_dir(),
            timeout: self.config.repository.timeout(),
            store: self.store.clone(),
            domains: Arc::clone(&self.domains),
            memory: Arc::clone(&self.memory),
            registry: Arc::clone(&self.instances),
            holders: Arc::clone(&self.preparations) as _,
            shelves: Default::default(),
            saving: Default::default(),
        })
    }

    fn finder(&self) -> Arc<SnapshotFinder> {
        Arc::new(SnapshotFinder {
            composer: self.composer(),
            starter: Arc::new(Starter::new(
                Arc::clone(&self.driver),
                Confiner {
                    domains: Arc::clone(&self.domains),
                    groups: self.groups.clone(),
                },
                self.config.memory.ksm.as_deref().map(Domain::from),
            )),
            snapshots: self.snapshots(),
        })
    }

    fn preparer(
        &self,
        mapper: &Arc<Mapper>,
        announced: &Arc<AnnouncedLaunches>,
        finder: &Arc<SnapshotFinder>,
    ) -> Preparer {
        let standby = StandbyStarter {
            dir: self.config.standby_dir(),
            most: self.config.snapshots.standby,
            cpu_stall: self.config.snapshots.cpu_stall,
            starter: Arc::clone(&finder.starter),
            memory: Arc::clone(&self.memory),
            registry: Arc::clone(&self.instances),
            next: AtomicI64::default(),
        };
        Preparer {
            preparations: Arc::clone(&self.preparations),
            announced: Arc::clone(announced),
            mapper: Arc::clone(mapper),
            composer: Arc::clone(&finder.composer),
            registry: Arc::clone(&self.instances),
            finder: Arc::clone(finder),
            standby: Arc::new(tokio::sync::Mutex::new(standby)),
        }
    }

    fn maker(&self, mapper: &Arc<Mapper>, finder: &SnapshotFinder) -> Arc<Maker> {
        Arc::new(Maker {
            dir: self.config.makers_dir(),
            cap_bytes: self.config.snapshots.cap_bytes,
            held_limit: self.config.snapshots.maker_limit(),
            composer: Arc::clone(&finder.composer),
            mapper: Arc::clone(mapper),
            starter: Arc::clone(&finder.starter),
            snapshots: Arc::clone(&finder.snapshots),
            turn: Default::default(),
            closed: Default::default(),
        })
    }

    /// Has snapshots made of the launches that are sent.
    fn keep_snapshots(&self, maker: &Arc<Maker>) -> Sender<Improvable> {
        let (sender, launches) = channel(MOST_WAITING);
        let ahead = SnapshotsAhead {
            maker: Arc::clone(maker),
            learner: Arc::clone(&self.learner),
            memory: Arc::clone(&self.memory),
            registry: Arc::clone(&self.instances),
            cpu_stall: self.config.snapshots.cpu_stall,
        };
        tokio::spawn(ahead.run(launches));
        sender
    }

    fn launches(
        &self,
        mapper: &Arc<Mapper>,
        supervisor: &Arc<Supervisor>,
        forecasts: &Forecasts,
        announced: &Arc<AnnouncedLaunches>,
        finder: &Arc<SnapshotFinder>,
    ) -> Arc<LaunchService> {
        let maker = self.maker(mapper, finder);
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
                inheritance: Arc::clone(&forecasts.inheritance),
                announced: Arc::clone(announced),
                enabled: self.config.forecast.prefetch,
            },
            composer: Arc::clone(&finder.composer),
            preparations: Arc::clone(&self.preparations),
            starter: Arc::clone(&finder.starter),
            snapshots: Arc::clone(&finder.snapshots),
            finder: Arc::clone(finder),
            improvable: self
                .config
                .snapshots
                .make
                .then(|| self.keep_snapshots(&maker)),
            maker,
            supervisor: Arc::clone(supervisor),
        })
    }

    fn accounts(&self, takeover: &Arc<Mutex<Option<Takeover>>>) -> MemoryAccounts {
        MemoryAccounts {
            store: self.store.clone(),
            domains: Arc::clone(&self.domains),
            memory: Arc::clone(&self.memory),
            registry: Arc::clone(&self.instances),
            preparations: Arc::clone(&self.preparations),
            takeover: Arc::clone(takeover),
            accountant: Mutex::default(),
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
    /// Puts the services together, and starts the one that prepares likely launches.
    fn new(parts: Parts) -> Self {
        let mapper = parts.mapper();
        let (supervisor, forecasts) = (parts.supervisor(), parts.forecasts());
        let announced = Arc::new(AnnouncedLaunches::new(parts.planner.clone()));
        let takeover = Arc::default();
        let finder = parts.finder();
        let preparer = parts.preparer(&mapper, &announced, &finder);
        let snapshots = Arc::clone(&finder.snapshots);
        let launches = parts.launches(&mapper, &supervisor, &forecasts, &announced, &finder);
        let (accounts, maps) = (parts.accounts(&takeover), parts.maps());
        let standby = Arc::clone(&preparer.standby);
        tokio::spawn(preparer.run(parts.likely));
        Self {
            started: Instant::now(),
            dashboard: OnceLock::new(),
            settled: watch::Sender::new(false),
            accounts: Arc::new(accounts),
            maps: Arc::new(maps),
            attachments: AttachService {
                store: parts.store.clone(),
                mapper: Arc::clone(&mapper),
                memory: Arc::clone(&parts.memory),
                learner: parts.learner,
                supervisor: Arc::clone(&supervisor),
            },
            vms: VmService {
                registry: Arc::clone(&parts.instances),
                domains: Arc::clone(&parts.domains),
                supervisor: Arc::clone(&supervisor),
            },
            audit: Audit::new(&parts.config.state_dir),
            config: parts.config,
            health: parts.health,
            store: parts.store,
            domains: parts.domains,
            memory: parts.memory,
            learning_tasks: parts.learning_tasks,
            demand: parts.demand,
            instances: parts.instances,
            driver: parts.driver,
            takeover,
            inherited_holds: Mutex::default(),
            announced,
            mapper,
            forecasts,
            supervisor,
            snapshots,
            preparations: parts.preparations,
            standby,
            launches,
        }
    }

    /// Starts what runs beside requests, once VMs and history are known.
    fn start_background(&self) {
        let config = &self.config.forecast;
        if config.prefetch && config.ahead {
            let prefetch_loop = PrefetchLoop {
                forecasts: Arc::clone(&self.forecasts),
                announced: Arc::clone(&self.announced),
                mapper: Arc::clone(&self.mapper),
                resumed: Arc::clone(&self.launches.finder) as _,
            };
            tokio::spawn(prefetch_loop.run());
        }
        let launches = Arc::clone(&self.launches);
        tokio::spawn(launches.keep_kernels_prepared(self.forecasts.listed.subscribe()));
        let snapshots = Arc::clone(&self.snapshots);
        for instance in self.instances.all() {
            snapshots.remove_after(instance);
        }
        tokio::spawn(async move {
            snapshots.remove_unused().await;
            snapshots.verify_all().await;
        });
        let sampler = UsageSampler {
            registry: Arc::clone(&self.instances),
            learner: Arc::clone(&self.forecasts.learner),
            forecasts: Arc::clone(&self.forecasts),
            demand: self.demand.clone(),
        };
        tokio::spawn(sampler.run());
        let learner = Arc::clone(&self.forecasts.learner);
        tokio::spawn(async move { learner.keep_history().await });
        let config = &self.config;
        let parents = [config.vms_dir(), config.makers_dir(), config.standby_dir()];
        tokio::spawn(keep_bounded(parents.into(), config.vmm.log_bytes));
    }

    /// What brings the mapping table in line with the kernel after a takeover.
    fn reconciler(&self) -> Reconciler {
        Reconciler {
            domains: Arc::clone(&self.domains),
            planner: Arc::clone(&self.memory),
        }
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

    /// Where the API is served over TCP, if it is.
    pub fn dashboard(&self) -> Option<SocketAddr> {
        self.dashboard.get().copied()
    }

    /// It is served there from now on.
    pub fn set_dashboard(&self, address: SocketAddr) {
        let _ = self.dashboard.set(address);
    }

    /// Where it is told what happens.
    pub fn events(&self) -> &events::Events {
        self.health.events()
    }

    /// What this daemon does without.
    pub fn degraded(&self) -> Vec<Degraded> {
        self.health.missing()
    }

    /// Waits until the VMs of before were looked for and the history was read, if it could be.
    pub async fn settled(&self) {
        // The sender lives as long as this.
        let _ = self.settled.subscribe().wait_for(|settled| *settled).await;
    }

    /// Finishes what is being learned; this daemon ends.
    pub async fn finish_learning(&self) {
        if !self.learning_tasks.finish(LEARN_GRACE).await {
            tracing::error!("some of what was touched lately is not learned: it took too long");
        }
    }
}
