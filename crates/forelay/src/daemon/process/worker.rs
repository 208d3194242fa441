//! Processes of the daemon: the holder that stays, the pinner, the worker that may die.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use forelay_cache::budget::BudgetConfig;
use forelay_cache::mapping_table::SharedTable;
use forelay_cache::plan::{PlanConfig, RunningVm};
use forelay_cache::{DeviceImage, Domain, Planner, PlannerEvent};
use forelay_image::bundle::Bundle;
use forelay_image::lock::Lock;
use forelay_memory::{holder, pinner, pressure};
use forelay_store::{
    DirectoryRepository, FetchConfig, Limited, Repository, Store, StoreConfig, Throttled,
};
use forelay_vm::qemu::QemuDriver;
use forelay_vm::{Accelerator, VmHandle, VmmDriver as _};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::api::VmState;
use crate::config::{Config, RepositoryConfig};
use crate::daemon::api::{connections, server};
use crate::daemon::forecast::clock::ForecastClock;
use crate::daemon::forecast::last_launches::LastLaunches;
use crate::daemon::forecast::learning::Learner;
use crate::daemon::launch::prepared::Premaps;
use crate::daemon::memory::domains::Domains;
use crate::daemon::memory::executors::Executors;
use crate::daemon::memory::planner::{PlannerHandle, PlannerParts, planner_channel};
use crate::daemon::memory::samples::{Sampler, total_bytes};
use crate::daemon::process::journal::{Journal, JournalWriter, Replayed};
use crate::daemon::process::sessions::Sessions;
use crate::daemon::vm::directory::RECORD;
use crate::daemon::vm::registry::{Instance, Record, load_records};
use crate::daemon::{Host, Parts};
use crate::history::ProfileRef;

/// Share of the host's memory that an adaptive budget may take at most.
const ADAPTIVE_SHARE: f64 = 0.5;

/// `forelay daemon`: holds the FUSE sessions and keeps a worker running.
pub fn run_holder(config: Config, path: Option<&Path>) -> Result<()> {
    log();
    keep_private();
    refuse_second(&config.socket())?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut daemon = vec![program.clone().into_os_string()];
    if let Some(path) = path {
        daemon.push("--config".into());
        daemon.push(path.canonicalize()?.into_os_string());
    }
    daemon.push("internal-worker".into());
    let pinner = vec![program.into_os_string(), "internal-pinner".into()];
    let code = holder::run(holder::HolderConfig { daemon, pinner })?;
    if code != 0 {
        bail!("the daemon ended with exit code {code}");
    }
    Ok(())
}

/// What this process and its children make is root's alone, whatever umask it was started
/// with: records, logs and images hold what VMs are given, sockets lead to their VMMs.
fn keep_private() {
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
}

/// Makes a directory of ours, or takes from others what they may do in one that is there.
fn private_dir(dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
}

/// The pinner's process.
pub fn run_pinner() -> Result<()> {
    let socket = holder::pinner_socket()?.context("`forelay daemon` starts this")?;
    Ok(pinner::run(socket)?)
}

/// The worker's process.
pub fn run_worker(config: Config) -> Result<()> {
    log();
    keep_private();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(serve(config));
    runtime.shutdown_background();
    result
}

fn log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("FORELAY_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // Fails only if a test has set one already.
    let _ = match std::env::var("FORELAY_LOG_FORMAT").as_deref() {
        Ok("json") => builder.json().try_init(),
        _ => builder.with_ansi(false).try_init(),
    };
}

async fn serve(config: Config) -> Result<()> {
    // The holder has looked whether another daemon answers on the socket. Here it would be
    // wrong to: a predecessor that was killed a moment ago may not have closed it yet.
    let socket = config.socket();
    for dir in [
        &config.state_dir,
        &config.runtime_dir,
        &config.vms_dir(),
        &config.mounts_dir(),
    ] {
        private_dir(dir).with_context(|| format!("cannot make the directory {}", dir.display()))?;
    }
    // From now on: a signal that comes while VMs are taken over must not end this process
    // before they can be stopped.
    let signals = StopSignals::install()?;
    let (host, journalled) = open(config).await?;
    take_over(&host, journalled).await?;
    let listener = connections::listen(&socket)
        .with_context(|| format!("cannot listen on {}", socket.display()))?;
    host.domains.sessions().ready()?;
    tracing::info!(socket = %socket.display(), "ready");
    host.start_foresight();
    let router = server::router(Arc::clone(&host));
    let restart = tokio::select! {
        () = connections::serve(listener, router, connections::Limits::default()) => false,
        restart = signals.arrived() => restart,
    };
    let _ = std::fs::remove_file(&socket);
    if restart {
        tracing::info!("restarting; VMs go on");
        host.finish_learning().await;
        host.domains.sessions().restart()?;
        // The exit code of a restart is not looked at.
        return Ok(());
    }
    tracing::info!("stopping all VMs");
    host.stop_all().await;
    host.finish_learning().await;
    Ok(())
}

/// Signals that end this process.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl StopSignals {
    fn install() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for SIGTERM or SIGINT (stop: false) or SIGHUP (restart: true).
    async fn arrived(mut self) -> bool {
        tokio::select! {
            _ = self.terminate.recv() => false,
            _ = self.interrupt.recv() => false,
            _ = self.hangup.recv() => true,
        }
    }
}

/// A socket on which somebody answers belongs to another daemon.
fn refuse_second(socket: &Path) -> Result<()> {
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        bail!(
            "a daemon answers on {} already: stop it first, or give this one its own \
             `runtime_dir` in the configuration",
            socket.display()
        );
    }
    Ok(())
}

/// The store as configured.
pub async fn open_store(config: &Config) -> Result<Store> {
    let path = config.repository_path();
    let directory = DirectoryRepository::open(&path)
        .with_context(|| format!("cannot open the repository {}", path.display()))?;
    let limit = config.repository.timeout();
    let directory: Arc<dyn Repository> = Arc::new(Limited::new(Arc::new(directory), limit));
    let RepositoryConfig {
        latency_ms,
        bandwidth_bytes_per_s,
        ..
    } = &config.repository;
    let repository: Arc<dyn Repository> = if *latency_ms > 0 || *bandwidth_bytes_per_s > 0 {
        let latency = std::time::Duration::from_millis(*latency_ms);
        let bandwidth = (*bandwidth_bytes_per_s > 0).then_some(*bandwidth_bytes_per_s);
        Arc::new(Throttled::new(directory, latency, bandwidth))
    } else {
        directory
    };
    let config = StoreConfig {
        repository,
        cache_dir: config.cache_path(),
        cache_cap_bytes: config.cache.cap_bytes,
        fetch: FetchConfig::default(),
    };
    Ok(Store::open(config).await?)
}

async fn open(config: Config) -> Result<(Arc<Host>, Replayed)> {
    let store = open_store(&config).await?;
    let scheduler = store.scheduler().clone();
    let (sender, inbox) = planner_channel();
    let domains = Arc::new(Domains::new(
        &config.mounts_dir(),
        scheduler.clone(),
        sender.clone(),
        Sessions::connect()?,
    ));
    let (plan, budget) = memory_settings(&config);
    let journal = config.runtime_dir.join("mapping-table.journal");
    let (journal, table, journalled) = Journal::open(journal)?;
    let table = Arc::new(SharedTable::new(table));
    let journal = JournalWriter::start(journal, Arc::clone(&table))?;
    let planner = Planner::new(plan, budget, table);
    let (reserve, reserved) = mpsc::unbounded_channel();
    let sampler = Sampler::new();
    let demand = sampler.demand();
    let executors = Executors::start(&domains, scheduler.clone(), &sender, reserve)?;
    let parts = PlannerParts {
        planner,
        domains: Arc::clone(&domains),
        scheduler,
        sampler,
        executors,
        journal,
    };
    let memory = PlannerHandle::start(parts, sender, inbox)?;
    let last_launches = LastLaunches::open(&config.state_dir, config.vmm.pmem_slots)?;
    let memory_mib = last_launches.memory_mib();
    let (learner, recent) = Learner::open(&config.state_dir, &config.forecast, memory_mib).await?;
    let launches = last_launches.past(&recent, learner.clock());
    memory.tell(PlannerEvent::LaunchesRemembered(launches));
    let mut driver = QemuDriver::new(&config.state_dir);
    driver.binary.clone_from(&config.vmm.qemu);
    driver.accelerator = match config.vmm.accelerator.as_str() {
        "auto" => None,
        "kvm" => Some(Accelerator::Kvm),
        "tcg" => Some(Accelerator::Tcg),
        other => bail!("vmm.accelerator is {other:?}: it can be auto, kvm or tcg"),
    };
    let premaps = Premaps::open(config.runtime_dir.join("premapped"))?;
    let (host, preparer) = Host::new(Parts {
        config,
        store,
        domains,
        memory: Arc::new(memory),
        learner: Arc::new(learner),
        last_launches: Arc::new(last_launches),
        demand,
        driver: Arc::new(driver),
        premaps: Arc::new(premaps),
        instances: Arc::default(),
        lessons: Arc::default(),
    });
    let host = Arc::new(host);
    tokio::spawn(preparer.premap_likely(reserved));
    // So that the first launch finds the components' metadata on this host. If it cannot be
    // had now, whoever needs it says so.
    let listing = host.store.clone();
    tokio::spawn(async move { drop(listing.components().await) });
    Ok((host, journalled))
}

fn memory_settings(config: &Config) -> (PlanConfig, BudgetConfig) {
    let total = pressure::Probe::new()
        .sample()
        .map_or(1 << 30, |sample| total_bytes(&sample));
    let cap_bytes = match config.memory.budget_bytes {
        0 => (total as f64 * ADAPTIVE_SHARE) as u64,
        bytes => bytes,
    };
    let mut budget = BudgetConfig {
        cap_bytes,
        ..BudgetConfig::default()
    };
    if config.memory.critical_bytes > 0 && total > 0 {
        let critical = config.memory.critical_bytes as f64 / total as f64;
        budget.headroom_share = critical / budget.critical_share;
    }
    // The planner lives on the wall clock; how far it looks ahead and how long it remembers
    // belong to the forecaster's.
    let clock = ForecastClock::new(&config.forecast);
    let usual = PlanConfig::default();
    let wall_ms = |stretch: std::time::Duration| {
        i64::try_from(clock.wall(stretch).as_millis()).unwrap_or(i64::MAX)
    };
    let half_life = std::time::Duration::from_millis(usual.half_life_ms.unsigned_abs());
    let plan = PlanConfig {
        budget_bytes: cap_bytes,
        horizon_ms: wall_ms(config.forecast.horizon()),
        half_life_ms: wall_ms(half_life),
        ..usual
    };
    (plan, budget)
}

/// Serves what an earlier daemon left: mounts with their files, then the VMs.
async fn take_over(host: &Arc<Host>, journalled: Replayed) -> Result<()> {
    let records = load_records(&host.config.vms_dir());
    let mut names: Vec<String> = records
        .iter()
        .map(|record| record.vm.domain.clone())
        .collect();
    names.extend(host.domains.sessions().held()?);
    names.sort();
    names.dedup();
    for record in &records {
        know_images(host, record).await;
    }
    let (serving, files) = (Arc::clone(host), records.clone());
    tokio::task::spawn_blocking(move || -> Result<(), crate::daemon::HostError> {
        for name in names {
            let memory = serving.domains.ensure(&Domain::from(name.as_str()))?;
            for record in files.iter().filter(|record| record.vm.domain == name) {
                for device in record.devices.iter().skip(1) {
                    if let Some(bundle) = Bundle::new(&device.members) {
                        serving.store.add_bundle(bundle);
                    }
                    serving
                        .domains
                        .add_image(&memory, device.image, device.image_bytes)?;
                }
            }
        }
        Ok(())
    })
    .await??;
    let taken_over = !records.is_empty() || journalled != Replayed::default();
    let mut handles = Vec::new();
    for record in records {
        handles.extend(reattach(host, record).await);
    }
    if taken_over {
        let reconciling = Arc::clone(host);
        let takeover =
            tokio::task::spawn_blocking(move || reconciling.reconcile(journalled)).await?;
        tracing::info!(?takeover, "the mapping table is the kernel's again");
        *host.takeover.lock() = Some(takeover);
    }
    for (instance, handle) in handles {
        host.resume(instance, handle);
    }
    if taken_over {
        // What the predecessor could not do any more.
        let budget_bytes = memory_settings(&host.config).0.budget_bytes;
        host.memory.tell(PlannerEvent::BudgetChanged(budget_bytes));
    }
    Ok(())
}

/// Makes the images of a VM's lock known again, before anything can fault on them.
async fn know_images(host: &Host, record: &Record) {
    let lock = match Lock::parse(&record.lock) {
        Ok(lock) => lock,
        Err(error) => {
            tracing::error!(vm = record.vm.name, %error, "the lock of a running VM is lost");
            return;
        }
    };
    for component in &lock.components {
        if let Err(error) = host.store.open_component(component.id).await {
            let why = forelay_host::error_chain(&error);
            tracing::error!(
                vm = record.vm.name,
                component = component.name,
                error = why,
                "a running VM's component cannot be opened"
            );
        }
    }
}

/// Finds the VMM of a record again; a VM that has ended is listed as failed.
async fn reattach(host: &Arc<Host>, record: Record) -> Option<(Arc<Instance>, VmHandle)> {
    let instance = Arc::new(Instance::new(record));
    let vm = instance.vm();
    host.instances.insert(Arc::clone(&instance)).ok()?;
    match host.driver.reattach(&vm.runtime_dir).await {
        Ok(handle) => {
            tracing::info!(vm = vm.name, pid = handle.pid(), "reattached");
            instance.update(|vm| vm.pid = Some(handle.pid()));
            Some((instance, handle))
        }
        Err(error) => {
            let why = forelay_host::error_chain(&error);
            tracing::warn!(vm = vm.name, error = why, "a VM ended while no daemon ran");
            end_unknown(&vm.runtime_dir);
            let _ = std::fs::remove_file(vm.runtime_dir.join(RECORD));
            host.supervisor.note_stopped(&instance).await;
            instance.end(|vm| {
                vm.error = Some(why);
                vm.state = VmState::Failed;
            });
            None
        }
    }
}

/// Ends a VMM that was started in `runtime_dir` a moment before the daemon died, so that
/// nobody knows how to talk to it.
fn end_unknown(runtime_dir: &Path) {
    match forelay_vm::stray::end_all(runtime_dir) {
        Ok(pids) if pids.is_empty() => {}
        Ok(pids) => tracing::warn!(?pids, "ended a VMM that nobody knows"),
        Err(error) => {
            let dir = runtime_dir.display();
            tracing::error!(%error, %dir, "a VMM that nobody knows lives on");
        }
    }
}

impl Host {
    /// Goes on with a VM that an earlier daemon launched.
    fn resume(self: &Arc<Self>, instance: Arc<Instance>, handle: VmHandle) {
        let vm = instance.vm();
        let devices = instance.devices();
        let devices = devices.iter().skip(1).map(|one| DeviceImage {
            image: one.image,
            image_bytes: one.image_bytes,
        });
        self.memory.tell(PlannerEvent::VmFound(RunningVm {
            vm: vm.name.as_str().into(),
            domain: vm.domain.as_str().into(),
            profile: vm.profile.as_str().into(),
            devices: devices.collect(),
        }));
        let of = ProfileRef::new(vm.profile, vm.owner);
        self.supervisor.supervise_reattached(instance, handle, of);
    }
}
