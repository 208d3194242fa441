//! A launch as a transaction: resolve, admit, map, prefetch, compose, start, hand over.
//!
//! [`LaunchService::launch`] resolves and admits, [`LaunchService::run`] is the spine of the
//! rest; each step is a function of its own, and a file of
//! its own where it takes more than a few lines:
//!
//! ```text
//! resolve   manifest -> lock, devices            resolve.rs
//! admit     the name is claimed, then history    admit.rs
//! map       images reachable in shared memory    here
//! prefetch  the planner is told of the launch    prefetch.rs
//! compose   map image, kernel                    compose.rs   (or taken from prepared.rs)
//! start     VM's directory, record, VMM          start.rs
//! resume    instead, from a snapshot             restore.rs   (made by maker.rs, found by find.rs)
//!           by a VMM that stands by              standby.rs
//! hand_over record again, supervision            here
//! ```
//! The prefetch is asked for before anything is composed, so that it runs beside the rest
//! of the launch and beside the guest kernel's boot.
//!
//! Invariants: a launch that is refused leaves no trace. Whatever step fails, and whenever
//! the launch is cancelled, its VMM is ended, the planner hears that the VM is gone, and
//! the instance ends with the reason.
//!
//! What is done with a VM that runs is no launch: it is saved (saving.rs), to go on later
//! (hibernate.rs) or as several (fork.rs).

pub(super) mod admit;
pub(super) mod ahead;
pub(super) mod compose;
pub(super) mod confinement;
pub(super) mod find;
mod fork;
mod hibernate;
pub(super) mod kept;
pub(super) mod maker;
pub(super) mod prefetch;
pub(super) mod prepared;
pub(super) mod resolve;
pub(super) mod restore;
mod saving;
pub(super) mod standby;
pub(super) mod start;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use forelay_guest_protocol::snapshot::Tier;
use forelay_image::NameOf;
use forelay_image::component::{Component, Role};
use forelay_image::extent::total_bytes;
use forelay_image::lock::LockedComponent;
use forelay_vm::VmSpec;
use forelay_vm::process::Process;
use futures_util::future::join_all;
use tokio::sync::mpsc::Sender;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::api::{
    LaunchRequest, LaunchTimings, PrefetchMode, PrefetchRequest, SnapshotRequest, Vm,
};
use crate::daemon::error::HostError;
use crate::daemon::memory::mapper::Mapper;
use crate::daemon::memory::planner::now_ms;
use crate::daemon::order::{DeviceRecord, Order};
use crate::daemon::snapshot::kept::{Kept, NotResumed};
use crate::daemon::snapshot::service::{Resumable, Snapshots, failure};
use crate::daemon::vm::directory::{MAP_IMAGE, VmDir, VmDirError};
use crate::daemon::vm::instance::{VmData, VmEnd};
use crate::daemon::vm::registry::Claim;
use crate::daemon::vm::supervise::{ExpectedLaunch, Supervisor};
use crate::recipe::KernelFiles;
use admit::Admission;
use ahead::{Improvable, unasked_tier};
use compose::{Composer, MapImage};
use find::SnapshotFinder;
use maker::Maker;
use prefetch::{LaunchPrefetcher, PrefetchPlan};
use prepared::{InsideName, Preparation, Preparations, hostname};
use resolve::Resolver;
use standby::Standby;
use start::{KILL_LIMIT, StartedVmm, Starter};

/// Launches VMs.
pub struct LaunchService {
    pub resolver: Resolver,
    pub admission: Admission,
    pub mapper: Arc<Mapper>,
    pub prefetcher: LaunchPrefetcher,
    pub composer: Arc<Composer>,
    pub preparations: Arc<Preparations>,
    pub starter: Arc<Starter>,
    pub snapshots: Arc<Snapshots>,
    pub finder: Arc<SnapshotFinder>,
    pub maker: Arc<Maker>,
    /// Takes launches of which snapshots may be made, where any are unasked.
    pub improvable: Option<Sender<Improvable>>,
    pub supervisor: Arc<Supervisor>,
}

/// A launch that was admitted.
struct Launch {
    order: Order,
    claim: Claim,
    mode: PrefetchMode,
    asked: Instant,
    /// Repository bytes before it.
    repository_before: u64,
    /// Whether the VM's directory is this launch's.
    made_dir: AtomicBool,
}

/// A launch that was prefetched, not made.
pub struct PrefetchedLaunch {
    pub order: Arc<Order>,
    /// Its components' devices, in slot order.
    pub devices: Vec<DeviceRecord>,
    /// What it is expected to touch.
    pub planned_bytes: u64,
}

/// What a launch resumes from.
struct Resuming {
    from: Arc<Resumable>,
    /// The VMM that stands by for it, if one does.
    standby: Option<Standby>,
}

/// What a VM boots from.
struct Boots {
    map: MapImage,
    kernel: KernelFiles,
}

impl LaunchService {
    /// Starts a launch; returns as soon as the instance exists.
    pub async fn launch(self: &Arc<Self>, request: LaunchRequest) -> Result<Vm, HostError> {
        let (asked, launched_ms) = (Instant::now(), now_ms());
        if let Some(name) = &request.name {
            NameOf::Vm.check(name).map_err(HostError::invalid)?;
        }
        let resolving = self
            .resolver
            .resolve(&request.manifest, request.lock.as_deref());
        let order = resolving.await?;
        let service = Arc::clone(self);
        if let Some(vm) = service.wake_named(&order, &request).await? {
            return Ok(vm);
        }
        // Of its own: what was claimed is not left half recorded when the client goes away.
        let admitting = tokio::spawn(async move {
            let claim = service
                .admission
                .admit(&order, &request, launched_ms)
                .await?;
            let vm = claim.instance().vm();
            let launch = Launch {
                order,
                claim,
                mode: request.prefetch,
                asked,
                repository_before: service.supervisor.repository_bytes(),
                made_dir: AtomicBool::new(false),
            };
            launch.note_step(|timings| &mut timings.request_s);
            tokio::spawn(service.conduct(launch));
            Ok(vm)
        });
        admitting.await.map_err(HostError::failed)?
    }

    /// Prepares kernels whenever other components are listed.
    pub async fn keep_kernels_prepared(
        self: Arc<Self>,
        mut listed: watch::Receiver<Vec<Arc<Component>>>,
    ) {
        while listed.changed().await.is_ok() {
            let components = listed.borrow_and_update().clone();
            self.prepare_kernels(&components).await;
        }
    }

    /// Has the kernels of the repository ready before a launch asks for one: the newest of each
    /// name is extracted and unpacked, and found out what its VMs run under.
    pub async fn prepare_kernels(&self, listed: &[Arc<Component>]) {
        let kernels = listed.iter().filter(|one| one.role == Role::Kernel);
        // Listed by name and version: the newest stays.
        let newest: BTreeMap<&str, _> = kernels.map(|one| (one.name.as_str(), one)).collect();
        for kernel in newest.into_values() {
            match self
                .composer
                .kernel(&LockedComponent::from(&**kernel))
                .await
            {
                Ok(files) => self.starter.prepare(&files.kernel).await,
                Err(error) => {
                    tracing::warn!(kernel = kernel.name, %error, "not prepared ahead of launches");
                }
            }
        }
    }

    /// Maps a manifest's devices and loads what a launch is expected to touch.
    pub async fn prefetch_only(
        &self,
        request: PrefetchRequest,
    ) -> Result<PrefetchedLaunch, HostError> {
        let resolving = self
            .resolver
            .resolve(&request.manifest, request.lock.as_deref());
        let order = Arc::new(resolving.await?);
        let devices = self.mapper.map_images(&order).await?;
        let found = self.finder.open(&order).await;
        let from = found.ok().and_then(|(from, _)| from);
        let memory = from.as_ref().map(|from| &from.memory);
        let plan = self.prefetcher.plan(&order, memory, request.mode);
        self.prefetcher.announce(&order, memory, &plan);
        if request.wait {
            let waiting = self
                .prefetcher
                .wait_resident(&order.domain, &plan.working_set);
            waiting.await;
        }
        let planned: Vec<_> = plan.working_set.iter().map(|one| one.extent).collect();
        Ok(PrefetchedLaunch {
            order,
            devices,
            planned_bytes: total_bytes(&planned),
        })
    }

    /// Makes a snapshot, or finds the one that there is.
    pub async fn make_snapshot(&self, request: SnapshotRequest) -> Result<Kept, HostError> {
        let lock = request.lock.as_deref();
        let order = self.resolver.resolve(&request.manifest, lock).await?;
        let at = request.at.or(order.manifest.snapshot.at);
        self.maker.make(&order, at.unwrap_or(Tier::Composed)).await
    }

    /// Runs a launch to its end: handed over, or undone.
    async fn conduct(self: Arc<Self>, launch: Launch) {
        let instance = Arc::clone(launch.claim.instance());
        let ended = tokio::select! {
            ended = self.run(&launch) => ended,
            () = instance.cancelled() => Err(HostError::Cancelled),
        };
        match ended {
            Ok(()) => launch.claim.keep(),
            Err(error) => self.undo(launch, error).await,
        }
    }

    /// The way of a page from the lock to a VMM that maps it.
    async fn run(&self, launch: &Launch) -> Result<(), HostError> {
        let mut prepared = self.preparations.take(&launch.order, launch.name());
        let standby = prepared.as_mut().and_then(|one| one.standby.take());
        let resuming = self.find_snapshot(launch, standby).await;
        launch.note_step(|timings| &mut timings.find_s);
        let tier = resuming.as_ref().map(|one| one.from.tier());
        let inside = InsideName::of(&launch.order, launch.name(), tier);
        let prepared = prepared.filter(|one| one.inside == inside);
        let reading = self.read_ahead(launch, prepared.as_ref());
        let mapped = self.map(launch, prepared.as_ref()).await?;
        launch.note_step(|timings| &mut timings.map_s);
        let memory = resuming.as_ref().map(|one| &one.from.memory);
        let plan = self.prefetch(launch, prepared.is_some(), memory).await;
        launch.note_step(|timings| &mut timings.plan_s);
        launch.make_dir()?;
        let boots = self.compose(launch, prepared, reading, &inside).await?;
        launch.note_step(|timings| &mut timings.compose_s);
        let Some(resuming) = resuming else {
            let vmm = self.start(launch, &mapped, boots).await?;
            return self.hand_over(launch, vmm, plan).await;
        };
        let from = Arc::clone(&resuming.from);
        let vmm = match self.resume(launch, &mapped, &boots, resuming).await {
            Ok(vmm) => vmm,
            Err(error) => {
                let booting = self.boot_instead(launch, &mapped, boots, inside);
                let booted = booting.await;
                self.note_not_resumed(launch, &from, &error, booted.is_ok())
                    .await;
                booted?
            }
        };
        self.hand_over(launch, vmm, plan).await
    }

    /// The best snapshot that there is for a launch, and the VMM that stands by to go on from it.
    /// A launch that there is none for boots.
    async fn find_snapshot(&self, launch: &Launch, standby: Option<Standby>) -> Option<Resuming> {
        if let Some(standby) = standby {
            let first = self.finder.is_first(&launch.order, &standby.from.kept);
            if standby.pid().is_some() && first.await.unwrap_or(false) {
                return Some(Resuming {
                    from: Arc::clone(&standby.from),
                    standby: Some(standby),
                });
            }
        }
        match self.finder.open(&launch.order).await {
            Ok((found, problems)) => {
                launch.note_problems(problems);
                found.map(|from| Resuming {
                    from: Arc::new(from),
                    standby: None,
                })
            }
            Err(error) => {
                launch.note_problems([format!("snapshots cannot be used: {error}")]);
                None
            }
        }
    }

    /// Has the VM go on from a snapshot. If that fails nothing of it is left, and it can boot.
    async fn resume(
        &self,
        launch: &Launch,
        mapped: &[DeviceRecord],
        boots: &Boots,
        resuming: Resuming,
    ) -> Result<StartedVmm, NotResumed> {
        let from = Arc::clone(&resuming.from);
        let resumed = self.try_resume(launch, mapped, boots, resuming).await;
        if resumed.is_ok() {
            self.snapshots.note_use(&from.kept).await;
            let update = |vm: &mut VmData| vm.launch.resumed = Some(from.tier());
            launch.claim.instance().update(update);
        } else {
            let image = from.memory.image;
            self.prefetcher.without_memory(launch.name(), image);
            launch.note_step(|timings| &mut timings.restore_s);
        }
        resumed
    }

    /// Tells why a launch did not resume. That counts against the snapshot only if the VM has
    /// booted since: a port that is taken, or memory that is short, fails a boot as well.
    async fn note_not_resumed(
        &self,
        launch: &Launch,
        from: &Resumable,
        error: &NotResumed,
        has_booted: bool,
    ) {
        let aside = match (error, has_booted) {
            (NotResumed::Other(_), false) => false,
            _ => self.snapshots.note_failure(&from.kept, error).await,
        };
        launch.note_problems([failure(from.tier(), error, aside)]);
    }

    async fn try_resume(
        &self,
        launch: &Launch,
        mapped: &[DeviceRecord],
        boots: &Boots,
        resuming: Resuming,
    ) -> Result<StartedVmm, NotResumed> {
        let from = Arc::clone(&resuming.from);
        let spec = self.record(launch, mapped, boots, Some(&from))?;
        let vmm = self.restored(launch, &spec, resuming).await?;
        launch.note_step(|timings| &mut timings.restore_s);
        launch.note_started();
        let steps = async {
            restore::plug(&vmm, &spec, &from).await?;
            launch.note_step(|timings| &mut timings.restore_s);
            let own = hostname(&launch.order, launch.name());
            restore::resume(&vmm, &spec, &own, &from).await
        };
        match steps.await {
            Ok(failures) => {
                let update = |vm: &mut VmData| vm.launch.notes.extend(failures);
                launch.claim.instance().update(update);
                Ok(vmm)
            }
            Err(error) => {
                vmm.end().await;
                Err(error.into())
            }
        }
    }

    /// The VMM of a clone whose guest runs and does not know yet who it is: the one that stands by
    /// or, if there is none or it is of no use, another.
    async fn restored(
        &self,
        launch: &Launch,
        spec: &VmSpec,
        resuming: Resuming,
    ) -> Result<StartedVmm, NotResumed> {
        let Resuming { from, standby } = resuming;
        let spec = restore::clone_of(spec, &from);
        if let Some(standby) = standby {
            match standby.launch_as(&spec).await {
                Ok(vmm) => {
                    launch.note_step(|timings| &mut timings.vmm_s);
                    let update = |vm: &mut VmData| vm.launch.stood_by = true;
                    launch.claim.instance().update(update);
                    return Ok(vmm);
                }
                Err(error) => {
                    launch.note_problems([format!("the VMM that stood by is not used: {error}")]);
                }
            }
        }
        let vmm = self.starter.start(&spec).await?;
        launch.note_step(|timings| &mut timings.vmm_s);
        match restore::take_state(&vmm, &from).await {
            Ok(()) => Ok(vmm),
            Err(error) => {
                vmm.end().await;
                Err(error)
            }
        }
    }

    /// Boots a VM that could not resume; what was composed for a clone is no other's.
    async fn boot_instead(
        &self,
        launch: &Launch,
        mapped: &[DeviceRecord],
        mut boots: Boots,
        inside: InsideName,
    ) -> Result<StartedVmm, HostError> {
        let own = InsideName::of(&launch.order, launch.name(), None);
        if inside != own {
            boots = self.compose_files(launch, &own).await?;
            launch.note_step(|timings| &mut timings.compose_s);
        }
        self.start(launch, mapped, boots).await
    }

    /// Begins to read what composing takes, beside the mapping: behind an empty disk cache
    /// both are mostly waiting.
    fn read_ahead(
        &self,
        launch: &Launch,
        prepared: Option<&Preparation>,
    ) -> Option<JoinHandle<()>> {
        let composer = Arc::clone(&self.composer);
        prepared
            .is_none()
            .then(|| composer.read_ahead(&launch.order))
    }

    /// Makes the images reachable in the trust domain's shared memory.
    async fn map(
        &self,
        launch: &Launch,
        prepared: Option<&Preparation>,
    ) -> Result<Vec<DeviceRecord>, HostError> {
        match prepared {
            Some(prepared) => Ok(prepared.files.devices.clone()),
            None => self.mapper.map_images(&launch.order).await,
        }
    }

    /// Tells the planner of the launch, and waits for its bytes if that was asked for.
    async fn prefetch(
        &self,
        launch: &Launch,
        prepared: bool,
        memory: Option<&DeviceRecord>,
    ) -> PrefetchPlan {
        self.prefetcher.inherit(&launch.order).await;
        let plan = self.prefetcher.plan(&launch.order, memory, launch.mode);
        launch.claim.instance().update(|vm| {
            vm.launch.mode = Some(plan.mode);
            vm.launch.prepared = prepared;
            vm.launch.prefetched_bytes = plan.missing_bytes();
        });
        let order = &launch.order;
        self.prefetcher.request(launch.name(), order, memory, &plan);
        if matches!(
            launch.mode,
            PrefetchMode::Everything | PrefetchMode::ForecastFirst
        ) {
            let domain = &launch.order.domain;
            self.prefetcher
                .wait_resident(domain, &plan.working_set)
                .await;
        }
        plan
    }

    /// Makes the map image that the VM boots from, and its kernel.
    async fn compose(
        &self,
        launch: &Launch,
        prepared: Option<Preparation>,
        reading: Option<JoinHandle<()>>,
        inside: &InsideName,
    ) -> Result<Boots, HostError> {
        let Some(prepared) = prepared else {
            if let Some(reading) = reading {
                // What failed there fails below, with its reason.
                let _ = reading.await;
            }
            return self.compose_files(launch, inside).await;
        };
        let path = launch.dir()?.path().join(MAP_IMAGE);
        let boots = Boots {
            map: prepared.move_map(&path).map_err(HostError::failed)?,
            kernel: prepared.files.kernel.clone(),
        };
        launch.note_composed(&boots, Duration::ZERO);
        Ok(boots)
    }

    /// Composes the map image of a VM that calls itself so.
    async fn compose_files(
        &self,
        launch: &Launch,
        inside: &InsideName,
    ) -> Result<Boots, HostError> {
        let composing = Instant::now();
        let (order, path) = (&launch.order, launch.dir()?.path().join(MAP_IMAGE));
        let boots = Boots {
            map: self.composer.compose(order, inside.as_str(), path).await?,
            kernel: self.composer.kernel(&order.lock.kernel).await?,
        };
        launch.note_composed(&boots, composing.elapsed());
        Ok(boots)
    }

    /// Writes down what the VM will have. The record is on disk before its VMM is executed: a
    /// daemon that dies in between is found out by its successor.
    fn record(
        &self,
        launch: &Launch,
        mapped: &[DeviceRecord],
        boots: &Boots,
        from: Option<&Resumable>,
    ) -> Result<VmSpec, NotResumed> {
        let instance = launch.claim.instance();
        let forwards = self.starter.ports.forwards(&launch.order.manifest)?;
        let mut devices = vec![boots.map.record.clone()];
        devices.extend_from_slice(mapped);
        if let Some(from) = from {
            from.check_devices(&devices).map_err(NotResumed::Snapshot)?;
        }
        let (order, kernel) = (&launch.order, boots.kernel.clone());
        let dir = launch.dir()?.path();
        let place = (launch.name(), dir.as_path());
        let mut spec = start::spec(order, place, &devices, Some(&boots.map), kernel);
        spec.mergeable = self.starter.merges(&order.domain);
        spec.forwards.clone_from(&forwards);
        devices.extend(from.map(|from| from.memory.clone()));
        instance.update(|vm| vm.devices = devices);
        instance.save().map_err(HostError::failed)?;
        instance.update(|vm| {
            vm.forwards = forwards;
            vm.launch.prepared_s = launch.asked.elapsed().as_secs_f64();
        });
        Ok(spec)
    }

    /// Starts a VMM that boots.
    async fn start(
        &self,
        launch: &Launch,
        mapped: &[DeviceRecord],
        boots: Boots,
    ) -> Result<StartedVmm, HostError> {
        let spec = self.record(launch, mapped, &boots, None);
        let vmm = self.starter.start(&spec.map_err(HostError::from)?).await?;
        launch.note_step(|timings| &mut timings.vmm_s);
        launch.note_started();
        Ok(vmm)
    }

    /// From here on the VM is supervised, and lives whatever becomes of this daemon.
    async fn hand_over(
        &self,
        launch: &Launch,
        vmm: StartedVmm,
        plan: PrefetchPlan,
    ) -> Result<(), HostError> {
        let instance = launch.claim.instance();
        instance.started(vmm.handle().pid());
        if let Err(error) = instance.save() {
            vmm.end().await;
            return Err(HostError::failed(error));
        }
        self.prefetcher.started(launch.name());
        if let Some(improvable) = &self.improvable
            && instance.read(|vm| vm.launch.resumed) < unasked_tier(&launch.order)
        {
            let (order, instance) = (launch.order.clone(), Arc::clone(instance));
            // Nobody takes it: the daemon ends, or many wait.
            let _ = improvable.try_send(Improvable { order, instance });
        }
        let (instance, handle) = (Arc::clone(instance), vmm.commit());
        let expected = ExpectedLaunch {
            plan: plan.expected(),
            missing: plan.missing,
            repository_before: launch.repository_before,
            before_vmm_s: (handle.launched() - launch.asked).as_secs_f64(),
        };
        self.supervisor.supervise(instance, handle, expected);
        Ok(())
    }

    /// Ends what is left of a launch that failed or was cancelled, and says why.
    async fn undo(&self, launch: Launch, error: HostError) {
        let instance = launch.claim.instance();
        let vm = instance.vm();
        tracing::error!(vm = vm.name, %error, "launch failed");
        self.prefetcher.stopped(&vm.name);
        self.supervisor.note_stopped(instance).await;
        if launch.made_dir.load(Ordering::Relaxed)
            && let Ok(dir) = launch.dir()
        {
            // Killed by its guard, and gone before its name is free: see `VmDir::make`.
            let ended = forelay_vm::stray::end_all(&dir.path()).unwrap_or_default();
            let gone = join_all(ended.iter().map(Process::wait));
            if tokio::time::timeout(KILL_LIMIT, gone).await.is_err() {
                tracing::error!(vm = vm.name, "its VMM was killed and does not end");
            }
            dir.clear();
        }
        if !matches!(error, HostError::Cancelled) {
            self.supervisor.histograms.failed();
        }
        let text = error.to_string();
        launch.claim.end(match error {
            HostError::Cancelled => VmEnd::Stopped { note: Some(text) },
            _ => VmEnd::Failed { error: text },
        });
    }
}

impl Launch {
    /// Notes that a step is done: what passed since the one before is its.
    fn note_step(&self, step: fn(&mut LaunchTimings) -> &mut f64) {
        let now_s = self.asked.elapsed().as_secs_f64();
        self.claim.instance().update(|vm| {
            let timings = &mut vm.launch.timings;
            let before_s: f64 = timings.steps().iter().map(|(_, s)| s).sum();
            *step(timings) += (now_s - before_s).max(0.0);
        });
    }

    /// Notes that the guest runs from here on, on its own or from where it was.
    fn note_started(&self) {
        let now_s = self.asked.elapsed().as_secs_f64();
        let instance = self.claim.instance();
        instance.update(|vm| vm.launch.vmm_started_s = now_s);
    }

    fn note_composed(&self, boots: &Boots, took: Duration) {
        self.claim.instance().update(|vm| {
            vm.launch.compose_s = took.as_secs_f64();
            vm.launch.map_bytes = boots.map.record.image_bytes;
            vm.launch.notes.clone_from(&boots.map.notes);
        });
    }

    fn note_problems(&self, problems: impl IntoIterator<Item = String>) {
        let instance = self.claim.instance();
        instance.update(|vm| vm.launch.snapshot_problems.extend(problems));
    }

    /// Makes the VM's directory.
    fn make_dir(&self) -> Result<(), HostError> {
        self.dir()?.make().map_err(|error| match error {
            VmDirError::InUse { .. } => HostError::Busy(error.to_string()),
            error => HostError::failed(error),
        })?;
        self.made_dir.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn name(&self) -> &str {
        self.claim.instance().name()
    }

    fn dir(&self) -> Result<VmDir, HostError> {
        self.claim.instance().dir().map_err(HostError::invalid)
    }
}
