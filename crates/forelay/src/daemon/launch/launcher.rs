//! A launch, step by step: resolve, map, prefetch, compose, start the VMM.
//!
//! The prefetch is asked for as soon as the lock is known, before anything is composed,
//! so that it runs beside the rest of the launch and beside the guest kernel's boot.
//!
//! Invariant: whatever step fails, the instance ends as `Failed` with the reason, the
//! planner hears that the VM is gone, and nothing of it stays mapped.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forelay_cache::mapping_table::Absent;
use forelay_cache::plan::{LaunchRequested, ProfileForecast};
use forelay_cache::{Domain, PlannerEvent, SharedImage};
use forelay_image::erofs::merge::{Composed, MapLayout};
use forelay_image::extent::{PMEM_ALIGN_BYTES, total_bytes};
use forelay_image::lock::{Lock, LockedComponent};
use forelay_image::manifest::{Manifest, Scratch};
use forelay_image::{Digest, Extent, NameOf, PlannedExtent};
use forelay_memory::command_hints::Hints;
use forelay_vm::{Boot, Forward, PmemDevice, Upper, VmSpec, VmmDriver as _, Wrap};

use crate::api::{
    LaunchFigures, LaunchMode, LaunchRequest, MapDevice, PrefetchMode, PrefetchRequest, Prefetched,
    Vm, VmState,
};
use crate::daemon::launch::prepared::hostname;
use crate::daemon::launch::resolve::{Order, PlannedDevice, label, vm_component};
use crate::daemon::memory::planner::now_ms;
use crate::daemon::vm::directory::{MAP_IMAGE, SCRATCH, VmDir};
use crate::daemon::vm::registry::{DeviceRecord, Instance, Record};
use crate::daemon::{Host, HostError, KEEP_RECIPES};
use crate::recipe::{KernelFiles, Recipe, kernel_files};

/// How long a launch waits for what it is told to have resident first.
const RESIDENT_PATIENCE: Duration = Duration::from_secs(600);
/// First host port given to a forward that names none.
const FIRST_AUTO_PORT: u16 = 20_000;

/// What a launch wants in shared memory.
pub(in crate::daemon) struct Wanted {
    mode: LaunchMode,
    pub(in crate::daemon) working_set: Vec<PlannedExtent>,
    /// Of it, what was neither there nor on its way.
    pub(in crate::daemon) missing: Vec<(Digest, Extent)>,
    /// Of it, what was not there.
    pub(in crate::daemon) absent: Vec<(Digest, Extent)>,
}

impl Host {
    /// Starts a launch; returns as soon as the instance exists.
    pub async fn launch(self: &Arc<Self>, request: LaunchRequest) -> Result<Vm, HostError> {
        let asked = Instant::now();
        let launched_ms = now_ms();
        if let Some(name) = &request.name {
            NameOf::Vm.check(name).map_err(HostError::invalid)?;
        }
        let order = self
            .order(&request.manifest, request.lock.as_deref())
            .await?;
        let name = match request.name.or_else(|| order.manifest.name.clone()) {
            Some(name) => name,
            None => self.instances.free_name(&order.of.profile),
        };
        let dir = VmDir::of(&self.config.vms_dir(), &name).map_err(HostError::invalid)?;
        let vm = Vm {
            runtime_dir: dir.path(),
            name: name.clone(),
            profile: order.of.profile.clone(),
            owner: order.of.owner.clone(),
            domain: order.domain.as_str().to_owned(),
            state: VmState::Launching,
            pid: None,
            launched_ms,
            forwards: Default::default(),
            components: order.lock.components.iter().map(vm_component).collect(),
            launch: LaunchFigures {
                solve_s: order.solve_s,
                image_bytes: order.lock.image_bytes(),
                ..LaunchFigures::default()
            },
            waits: Default::default(),
            error: None,
            exit_status: None,
        };
        let launch_id = self
            .learner
            .launched(&order.of, &vm, order.memory_mib())
            .await;
        self.last_launches.remember(&order);
        let instance = Arc::new(Instance::new(Record {
            vm: vm.clone(),
            launch_id,
            manifest: request.manifest.clone(),
            lock: order.lock.to_toml(),
            devices: vec![],
        }));
        if let Err(other) = self.instances.insert(Arc::clone(&instance)) {
            let other = other.vm();
            return Err(HostError::Busy(format!(
                "a VM called {name} is {:?} already: stop it with `forelay stop {name}`, or give \
                 this one another name with --name",
                other.state
            )));
        }
        let host = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = host.boot(&instance, order, request.prefetch, asked).await {
                tracing::error!(vm = instance.vm().name, %error, "launch failed");
                let name = instance.vm().name.into();
                host.memory.tell(PlannerEvent::VmStopped(name));
                host.note_stopped(&instance).await;
                instance.update(|vm| {
                    vm.error = Some(error.to_string());
                    vm.state = VmState::Failed;
                });
            }
        });
        Ok(vm)
    }

    async fn boot(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        order: Order,
        mode: PrefetchMode,
        asked: Instant,
    ) -> Result<(), HostError> {
        let vm = instance.vm();
        let before = self.store.scheduler().counters().repository_bytes();
        let premapped = self.premaps.take(&order, &vm.name);
        // Read beside the mapping: behind an empty disk cache both are mostly waiting.
        let parts = premapped.is_none().then(|| self.read_parts(&order));
        let devices = match &premapped {
            Some(premapped) => premapped.devices.clone(),
            None => self.map_images(&order).await?,
        };
        let wanted = self.wanted(&order, mode);
        instance.update(|vm| {
            vm.launch.mode = Some(wanted.mode);
            vm.launch.premapped = premapped.is_some();
            vm.launch.prefetched_bytes = wanted.missing.iter().map(|(_, extent)| extent.len).sum();
        });
        self.memory
            .tell(PlannerEvent::LaunchRequested(LaunchRequested {
                vm: vm.name.as_str().into(),
                domain: order.domain.clone(),
                profile: order.of.profile.as_str().into(),
                devices: order.device_images(),
                working_set: wanted.working_set.clone(),
            }));
        if matches!(mode, PrefetchMode::Everything | PrefetchMode::ForecastFirst) {
            self.wait_resident(&order.domain, &wanted.working_set).await;
        }
        let dir = VmDir::of(&self.config.vms_dir(), &vm.name).map_err(HostError::invalid)?;
        dir.make().map_err(HostError::failed)?;
        let composing = Instant::now();
        let path = vm.runtime_dir.join(MAP_IMAGE);
        let (map, kernel) = match premapped {
            Some(premapped) => {
                let moved = premapped.move_map(&path);
                (moved.map_err(HostError::failed)?, premapped.kernel.clone())
            }
            None => {
                if let Some(parts) = parts {
                    // What failed there fails below, with its reason.
                    let _ = parts.await;
                }
                let hostname = hostname(&order, &vm.name);
                let map = self.compose(&order, &hostname, path).await?;
                (map, self.kernel(&order.lock.kernel).await?)
            }
        };
        instance.update(|vm| {
            vm.launch.compose_s = composing.elapsed().as_secs_f64();
            vm.launch.map_bytes = map.record.image_bytes;
        });
        let forwards = self.forwards(&order.manifest)?;
        let mut records = vec![map.record];
        records.extend(devices);
        let spec = self.spec(&order, &vm, &records, &map.uuid, kernel, &forwards);
        // Before the VMM starts: a daemon that dies in between is to be found out.
        instance.update_record(|record| record.devices = records);
        instance.save().map_err(HostError::failed)?;
        let prepared_s = asked.elapsed().as_secs_f64();
        let handle = self.driver.launch(&spec).await.map_err(HostError::failed)?;
        *self.accelerator.lock() = Some(handle.state().accelerator.clone());
        let vmm_started_s = asked.elapsed().as_secs_f64();
        let started = vm.name.as_str().into();
        self.memory.tell(PlannerEvent::VmStarted(started));
        instance.update(|vm| {
            vm.pid = Some(handle.pid());
            vm.forwards.clone_from(&forwards);
            vm.launch.prepared_s = prepared_s;
            vm.launch.vmm_started_s = vmm_started_s;
            vm.state = VmState::Booting;
        });
        instance.save().map_err(HostError::failed)?;
        self.handles.lock().insert(vm.name.clone(), handle.clone());
        self.supervise(Arc::clone(instance), handle, order.of, wanted, before);
        Ok(())
    }

    /// Begins to read what composing the order's map image and starting its kernel take.
    fn read_parts(self: &Arc<Self>, order: &Order) -> tokio::task::JoinHandle<()> {
        let (host, lock) = (Arc::clone(self), order.lock.clone());
        let full_system = order.manifest.init.is_some();
        tokio::spawn(async move {
            let recipe = host.recipe(&lock, full_system);
            let _ = tokio::join!(recipe, host.kernel(&lock.kernel));
        })
    }

    /// Makes the lock's images reachable in the domain's shared memory.
    pub(in crate::daemon) async fn map_images(
        self: &Arc<Self>,
        order: &Order,
    ) -> Result<Vec<DeviceRecord>, HostError> {
        let opening = order.lock.components.iter().map(|component| async move {
            // A component that vanished is told now, not as a stuck fault later.
            let opened = self.store.open_component(component.id).await;
            opened.map(drop).map_err(|error| {
                let cause = crate::daemon::chain(&error);
                HostError::Failed(format!("component {}: {cause}", label(component)))
            })
        });
        futures_util::future::try_join_all(opening).await?;
        let (host, domain) = (Arc::clone(self), order.domain.clone());
        let (devices, bundle) = (order.devices.clone(), order.bundle.clone());
        let mapped = tokio::task::spawn_blocking(move || {
            let memory = host.domains.ensure(&domain)?;
            if let Some(bundle) = bundle {
                host.store.add_bundle(bundle);
            }
            devices
                .iter()
                .map(|one| host.map_image(&memory, one))
                .collect()
        });
        mapped.await.map_err(HostError::failed)?
    }

    pub(in crate::daemon) fn map_image(
        &self,
        memory: &crate::daemon::memory::domains::DomainMemory,
        device: &PlannedDevice,
    ) -> Result<DeviceRecord, HostError> {
        let PlannedDevice {
            image, image_bytes, ..
        } = *device;
        let (path, device_bytes) = self.domains.add_image(memory, image, image_bytes)?;
        let component = device.label.clone();
        Ok(DeviceRecord {
            image,
            image_bytes,
            device_bytes,
            path,
            component,
            members: device.members.clone(),
        })
    }

    fn wanted(&self, order: &Order, mode: PrefetchMode) -> Wanted {
        let images = order.images();
        let working_set = match mode {
            PrefetchMode::None => Vec::new(),
            _ if !self.config.forecast.prefetch && mode != PrefetchMode::Everything => Vec::new(),
            PrefetchMode::Everything => order
                .devices
                .iter()
                .map(|device| PlannedExtent {
                    image: device.image,
                    extent: Extent::new(0, device.image_bytes),
                    probability: 1.0,
                    first_touch_ms: 0,
                })
                .collect(),
            PrefetchMode::Forecast | PrefetchMode::ForecastFirst => {
                self.learner.plan(&order.of, &images)
            }
        };
        let absent = self.absent(&order.domain, &working_set);
        let missing = parts(&absent, |part| !part.fetching);
        let mode = match mode {
            _ if working_set.is_empty() => LaunchMode::Cold,
            // What other profiles touch of the same components helps, but is no forecast.
            PrefetchMode::Forecast if !self.learner.knows(&order.of) => LaunchMode::Cold,
            _ if !missing.is_empty() => LaunchMode::Predicted,
            _ if self.prefetched_ahead(order, &working_set) => LaunchMode::Predicted,
            _ => LaunchMode::Warm,
        };
        Wanted {
            mode,
            working_set,
            missing,
            absent: parts(&absent, |_| true),
        }
    }

    /// True if most of a resident plan was prefetched and waits for its first touch.
    fn prefetched_ahead(&self, order: &Order, plan: &[PlannedExtent]) -> bool {
        self.memory.table().read(|table| {
            let (mut unused, mut all) = (0, 0);
            for planned in plan {
                let image = SharedImage::new(order.domain.clone(), planned.image);
                unused += table.prefetched_unused_bytes(&image, planned.extent);
                all += planned.extent.len;
            }
            unused * 2 > all
        })
    }

    /// What of a plan is not in shared memory.
    fn absent(&self, domain: &Domain, plan: &[PlannedExtent]) -> Vec<(Digest, Absent)> {
        self.memory.table().read(|table| {
            let mut absent = Vec::new();
            for planned in plan {
                let image = SharedImage::new(domain.clone(), planned.image);
                let parts = table.absent(&image, planned.extent).into_iter();
                absent.extend(parts.map(|part| (planned.image, part)));
            }
            absent
        })
    }

    /// Waits until a plan is resident, or until the planner has given up on the rest.
    async fn wait_resident(&self, domain: &Domain, plan: &[PlannedExtent]) {
        let deadline = Instant::now() + RESIDENT_PATIENCE;
        let mut idle = 0;
        while Instant::now() < deadline && idle < 20 {
            let fetching = self.memory.table().read(|table| table.fetching_bytes());
            if fetching == 0 && self.absent(domain, plan).is_empty() {
                return;
            }
            let status = self.memory.status();
            idle = if status.queued_bytes == 0 && fetching == 0 {
                idle + 1
            } else {
                0
            };
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(in crate::daemon) async fn recipe(
        &self,
        lock: &Lock,
        full_system: bool,
    ) -> Result<Arc<Recipe>, HostError> {
        let digest = lock.digest();
        if let Some(recipe) = self.recipes.lock().get(&digest) {
            return Ok(Arc::clone(recipe));
        }
        let recipe = Recipe::load(&self.store, lock, full_system)
            .await
            .map_err(HostError::failed)?;
        let recipe = Arc::new(recipe);
        let mut recipes = self.recipes.lock();
        if recipes.len() >= KEEP_RECIPES {
            recipes.clear();
        }
        recipes.insert(digest, Arc::clone(&recipe));
        Ok(recipe)
    }

    /// Composes the map image of a VM that calls itself `hostname` into a file.
    pub(in crate::daemon) async fn compose(
        &self,
        order: &Order,
        hostname: &str,
        path: PathBuf,
    ) -> Result<MapImage, HostError> {
        let recipe = self
            .recipe(&order.lock, order.manifest.init.is_some())
            .await?;
        let (manifest, bundle) = (order.manifest.clone(), order.bundle.clone());
        let hostname = hostname.to_owned();
        let composed = tokio::task::spawn_blocking(move || {
            let composed =
                recipe.compose(&manifest, &hostname, MapLayout::Devices, bundle.as_ref());
            let composed = composed.map_err(HostError::failed)?;
            write_map_image(&composed, &path)
        });
        composed.await.map_err(HostError::failed)?
    }

    /// Kernel and initramfs of a kernel component as host files.
    pub(in crate::daemon) async fn kernel(
        &self,
        kernel: &LockedComponent,
    ) -> Result<KernelFiles, HostError> {
        let dir = self
            .config
            .state_dir
            .join("kernels")
            .join(kernel.image.hex());
        kernel_files(&self.store, kernel, &dir)
            .await
            .map_err(HostError::failed)
    }

    fn forwards(&self, manifest: &Manifest) -> Result<Vec<Forward>, HostError> {
        let mut forwards = Vec::new();
        for forward in &manifest.vm.forward {
            let host = match forward.host {
                0 => self.free_port(forward.udp)?,
                port => port,
            };
            forwards.push(Forward {
                host,
                guest: forward.guest,
                udp: forward.udp,
            });
        }
        Ok(forwards)
    }

    fn free_port(&self, udp: bool) -> Result<u16, HostError> {
        let mut next = self.next_port.lock();
        for _ in 0..10_000 {
            let port = (*next).max(FIRST_AUTO_PORT);
            *next = port.checked_add(1).unwrap_or(FIRST_AUTO_PORT);
            let address = ("127.0.0.1", port);
            let free = if udp {
                std::net::UdpSocket::bind(address).is_ok()
            } else {
                std::net::TcpListener::bind(address).is_ok()
            };
            if free {
                return Ok(port);
            }
        }
        Err(HostError::Failed("no port is free on 127.0.0.1".to_owned()))
    }

    fn spec(
        &self,
        order: &Order,
        vm: &Vm,
        devices: &[DeviceRecord],
        uuid: &str,
        kernel: KernelFiles,
        forwards: &[Forward],
    ) -> VmSpec {
        let settings = &order.manifest.vm;
        let boot = Boot::Map {
            uuid: uuid.to_owned(),
        };
        let mut spec = VmSpec::new(vm.name.clone(), kernel.kernel, kernel.initrd, boot);
        spec.memory_mib = u32::try_from(settings.memory_mib).unwrap_or(u32::MAX);
        spec.cpus = settings.cpus;
        spec.console_log = vm.runtime_dir.join("console.log");
        spec.runtime_dir.clone_from(&vm.runtime_dir);
        spec.forwards = forwards.to_vec();
        spec.upper = match settings.scratch {
            Scratch::Tmpfs => Upper::Tmpfs,
            Scratch::Disk { bytes } => Upper::Scratch {
                path: vm.runtime_dir.join(SCRATCH),
                bytes,
            },
        };
        spec.pmem = devices.iter().map(pmem_device).collect();
        let guest_ram_bytes = Some(settings.memory_mib << 20);
        spec.wrap = Some(Wrap(Arc::new(move |command| {
            Hints {
                guest_ram_bytes,
                ..Hints::default()
            }
            .apply(command);
        })));
        spec
    }

    /// Maps a manifest's devices and loads what a launch is expected to touch.
    pub async fn prefetch(
        self: &Arc<Self>,
        request: PrefetchRequest,
    ) -> Result<Prefetched, HostError> {
        let started = Instant::now();
        let order = self
            .order(&request.manifest, request.lock.as_deref())
            .await?;
        let order = Arc::new(order);
        let records = self.map_images(&order).await?;
        let wanted = self.wanted(&order, request.mode);
        self.premaps.offer(&order);
        let planned: Vec<Extent> = wanted.working_set.iter().map(|one| one.extent).collect();
        self.memory
            .tell(PlannerEvent::ProfileForecast(ProfileForecast {
                domain: order.domain.clone(),
                profile: order.of.profile.as_str().into(),
                devices: order.device_images(),
                launch_probability: 1.0,
                next_launch_ms: Some(now_ms()),
                working_set: wanted.working_set.clone(),
            }));
        if request.wait {
            self.wait_resident(&order.domain, &wanted.working_set).await;
        }
        let devices = records.iter().enumerate();
        let devices: Vec<MapDevice> = devices
            .map(|(index, one)| self.map_device(&order.domain, index + 1, one, 0))
            .collect();
        Ok(Prefetched {
            profile: order.of.profile.clone(),
            domain: order.domain.as_str().to_owned(),
            devices,
            planned_bytes: total_bytes(&planned),
            took_s: started.elapsed().as_secs_f64(),
        })
    }
}

/// The extents of those parts of a plan that are wanted.
fn parts(absent: &[(Digest, Absent)], wanted: impl Fn(&Absent) -> bool) -> Vec<(Digest, Extent)> {
    let wanted = absent.iter().filter(|(_, part)| wanted(part));
    wanted.map(|(image, part)| (*image, part.extent)).collect()
}

/// A composed map image as a file.
#[derive(Clone, Debug)]
pub(in crate::daemon) struct MapImage {
    /// The device that it becomes.
    pub record: DeviceRecord,
    /// UUID of its superblock, in hex.
    pub uuid: String,
}

fn write_map_image(composed: &Composed, path: &Path) -> Result<MapImage, HostError> {
    let write = || -> std::io::Result<u64> {
        use std::io::Write as _;
        let mut file = std::fs::File::create(path)?;
        file.write_all(&composed.map_image)?;
        let device_bytes = (composed.map_image.len() as u64).next_multiple_of(PMEM_ALIGN_BYTES);
        file.set_len(device_bytes)?;
        Ok(device_bytes)
    };
    let device_bytes = write().map_err(|error| {
        HostError::Failed(format!(
            "cannot write the map image {}: {error}",
            path.display()
        ))
    })?;
    let record = DeviceRecord {
        image: composed.digest,
        image_bytes: composed.map_image.len() as u64,
        device_bytes,
        path: path.to_path_buf(),
        component: "map image".to_owned(),
        members: Vec::new(),
    };
    Ok(MapImage {
        record,
        uuid: composed.digest.hex()[..32].to_owned(),
    })
}

pub(in crate::daemon) fn pmem_device(record: &DeviceRecord) -> PmemDevice {
    let id = format!("c{}", &record.image.hex()[..24]);
    PmemDevice {
        id,
        path: record.path.clone(),
        bytes: record.device_bytes,
    }
}
