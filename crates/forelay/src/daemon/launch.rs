//! A launch, step by step: resolve, map, prefetch, compose, start the VMM.
//!
//! The prefetch is asked for as soon as the lock is known, before anything is composed,
//! so that it runs beside the rest of the launch and beside the guest kernel's boot.
//!
//! Invariant: whatever step fails, the instance ends as `Failed` with the reason, the
//! planner hears that the VM is gone, and nothing of it stays mapped.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forelay_cache::plan::{Event, PlannedExtent};
use forelay_cache::{DeviceImage, Domain, SharedImage};
use forelay_image::bundle::Bundle;
use forelay_image::erofs::merge::{Composed, MapLayout};
use forelay_image::extent::{PMEM_ALIGN_BYTES, total_bytes};
use forelay_image::lock::{Lock, LockedComponent};
use forelay_image::manifest::{Manifest, Scratch};
use forelay_image::solve::solve;
use forelay_image::{Digest, Extent};
use forelay_memory::command_hints::Hints;
use forelay_vm::{Boot, Forward, PmemDevice, Upper, VmSpec, VmmDriver as _, Wrap};

use super::instances::{DeviceRecord, Instance, Record};
use super::memory::now_ms;
use super::{Host, HostError, KEEP_RECIPES};
use crate::api::{
    LaunchFigures, LaunchMode, LaunchRequest, MapDevice, PrefetchMode, PrefetchRequest, Prefetched,
    Vm, VmComponent, VmState,
};
use crate::history::ProfileRef;
use crate::recipe::{KernelFiles, Recipe, kernel_files};

/// Owner of manifests that name none.
const DEFAULT_OWNER: &str = "default";
/// How long a launch waits for what it is told to have resident first.
const RESIDENT_PATIENCE: Duration = Duration::from_secs(600);
/// First host port given to a forward that names none.
const FIRST_AUTO_PORT: u16 = 20_000;

/// A request, understood.
#[derive(Clone)]
pub(super) struct Order {
    pub manifest: Manifest,
    pub lock: Lock,
    pub of: ProfileRef,
    pub domain: Domain,
    /// pmem devices of the components, in slot order.
    pub devices: Vec<PlannedDevice>,
    /// The device that several small components share, if there are too many.
    pub bundle: Option<Bundle>,
    pub solve_s: f64,
}

/// A device of an order: one component's image, or the bundle.
#[derive(Clone)]
pub(super) struct PlannedDevice {
    pub image: Digest,
    pub image_bytes: u64,
    pub label: String,
    /// Images and sizes of the bundle's members, in order.
    pub members: Vec<(Digest, u64)>,
}

impl Order {
    /// What a manifest and its lock ask for, on a VMM with so many pmem slots.
    pub(super) fn new(
        manifest: Manifest,
        lock: Lock,
        solve_s: f64,
        pmem_slots: usize,
    ) -> Result<Self, HostError> {
        let owner = manifest
            .owner
            .clone()
            .unwrap_or_else(|| DEFAULT_OWNER.to_owned());
        let domain = domain_name(&owner)?;
        let of = ProfileRef::new(manifest.profile_name(), owner);
        // The map image takes the first slot.
        let bundle = bundle_smallest(&lock, pmem_slots.saturating_sub(1).max(1));
        let alone = lock.components.iter().filter(|one| {
            bundle
                .as_ref()
                .is_none_or(|bundle| bundle.offset_of(&one.image).is_none())
        });
        let mut devices: Vec<PlannedDevice> = alone.map(PlannedDevice::from).collect();
        devices.extend(bundle.as_ref().map(|bundle| {
            PlannedDevice {
                image: bundle.digest(),
                image_bytes: bundle.bytes(),
                label: format!("bundle of {}", bundle.members().len()),
                members: bundle
                    .members()
                    .iter()
                    .map(|one| (one.image, one.bytes))
                    .collect(),
            }
        }));
        Ok(Self {
            manifest,
            lock,
            of,
            domain,
            devices,
            bundle,
            solve_s,
        })
    }

    /// The images of its devices.
    pub(super) fn images(&self) -> Vec<Digest> {
        self.devices.iter().map(|device| device.image).collect()
    }

    /// Its devices as the planner names them.
    pub(super) fn device_images(&self) -> Vec<DeviceImage> {
        let devices = self.devices.iter();
        devices
            .map(|one| DeviceImage {
                image: one.image,
                image_bytes: one.image_bytes,
            })
            .collect()
    }
}

impl From<&LockedComponent> for PlannedDevice {
    fn from(component: &LockedComponent) -> Self {
        let LockedComponent {
            image, image_bytes, ..
        } = *component;
        Self {
            image,
            image_bytes,
            label: label(component),
            members: Vec::new(),
        }
    }
}

/// The smallest components as one bundle, as many as it takes to fit `slots` devices.
fn bundle_smallest(lock: &Lock, slots: usize) -> Option<Bundle> {
    let mut images: Vec<(Digest, u64)> = Vec::new();
    for component in &lock.components {
        if !images.iter().any(|(image, _)| *image == component.image) {
            images.push((component.image, component.image_bytes));
        }
    }
    let excess = images
        .len()
        .checked_sub(slots)
        .filter(|&excess| excess > 0)?;
    let mut by_size = images.clone();
    by_size.sort_by_key(|&(image, bytes)| (bytes, image));
    let small: Vec<Digest> = by_size[..=excess].iter().map(|(image, _)| *image).collect();
    images.retain(|(image, _)| small.contains(image));
    Bundle::new(&images)
}

/// What a launch wants in shared memory.
struct Wanted {
    mode: LaunchMode,
    working_set: Vec<PlannedExtent>,
    /// Of it, what was not there.
    missing: Vec<(Digest, Extent)>,
}

impl Host {
    /// Starts a launch; returns as soon as the instance exists.
    pub async fn launch(self: &Arc<Self>, request: LaunchRequest) -> Result<Vm, HostError> {
        let asked = Instant::now();
        let launched_ms = now_ms();
        let order = self
            .order(&request.manifest, request.lock.as_deref())
            .await?;
        let name = match request.name.or_else(|| order.manifest.name.clone()) {
            Some(name) => name,
            None => self.instances.free_name(&order.of.profile),
        };
        let vm = Vm {
            runtime_dir: self.config.vms_dir().join(&name),
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
            error: None,
            exit_status: None,
        };
        let launch_id = self.learner.launched(&order.of, &vm).await;
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
                host.memory.tell(Event::VmStopped {
                    vm: instance.vm().name.into(),
                });
                instance.update(|vm| {
                    vm.error = Some(error.to_string());
                    vm.state = VmState::Failed;
                });
            }
        });
        Ok(vm)
    }

    /// Understands a manifest and resolves it, unless a lock does.
    pub(super) async fn order(&self, text: &str, lock: Option<&str>) -> Result<Order, HostError> {
        let manifest = Manifest::parse(text).map_err(HostError::invalid)?;
        let started = Instant::now();
        let lock = match lock {
            Some(text) => {
                let lock = Lock::parse(text).map_err(HostError::invalid)?;
                if lock.manifest_digest != manifest.digest() {
                    return Err(HostError::Invalid(
                        "the lock is of another manifest: run `forelay lock` again".to_owned(),
                    ));
                }
                lock
            }
            None => {
                let components = self.store.components().await.map_err(HostError::failed)?;
                let components: Vec<_> = components.iter().map(|one| (**one).clone()).collect();
                solve(&manifest, &components).map_err(HostError::invalid)?
            }
        };
        let solve_s = started.elapsed().as_secs_f64();
        Order::new(manifest, lock, solve_s, self.config.vmm.pmem_slots)
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
        let devices = self.map_images(&order).await?;
        let wanted = self.wanted(&order, mode);
        instance.update(|vm| {
            vm.launch.mode = Some(wanted.mode);
            vm.launch.prefetched_bytes = wanted.missing.iter().map(|(_, extent)| extent.len).sum();
        });
        self.memory.tell(Event::LaunchRequested {
            vm: vm.name.as_str().into(),
            domain: order.domain.clone(),
            profile: order.of.profile.as_str().into(),
            devices: order.device_images(),
            working_set: wanted.working_set.clone(),
        });
        if matches!(mode, PrefetchMode::Everything | PrefetchMode::ForecastFirst) {
            self.wait_resident(&order.domain, &wanted.working_set).await;
        }
        make_runtime_dir(&vm.runtime_dir)?;
        let composing = Instant::now();
        let map = self.compose(&order, &vm).await?;
        instance.update(|vm| {
            vm.launch.compose_s = composing.elapsed().as_secs_f64();
            vm.launch.map_bytes = map.record.image_bytes;
        });
        let kernel = self.kernel(&order.lock.kernel).await?;
        let forwards = self.forwards(&order.manifest)?;
        let mut records = vec![map.record];
        records.extend(devices);
        let spec = self.spec(&order, &vm, &records, &map.uuid, kernel, &forwards);
        let handle = self.driver.launch(&spec).await.map_err(HostError::failed)?;
        *self.accelerator.lock() = Some(handle.state().accelerator.clone());
        let vmm_started_s = asked.elapsed().as_secs_f64();
        self.memory.tell(Event::VmStarted {
            vm: vm.name.as_str().into(),
        });
        instance.update_record(|record| record.devices = records);
        instance.update(|vm| {
            vm.pid = Some(handle.pid());
            vm.forwards = forwards.iter().map(|one| (one.host, one.guest)).collect();
            vm.launch.vmm_started_s = vmm_started_s;
            vm.state = VmState::Booting;
        });
        instance.save().map_err(HostError::failed)?;
        self.handles.lock().insert(vm.name.clone(), handle.clone());
        self.supervise(
            Arc::clone(instance),
            handle,
            order.of,
            wanted.missing,
            before,
        );
        Ok(())
    }

    /// Makes the lock's images reachable in the domain's shared memory.
    pub(super) async fn map_images(
        self: &Arc<Self>,
        order: &Order,
    ) -> Result<Vec<DeviceRecord>, HostError> {
        for component in &order.lock.components {
            // A component that vanished is told now, not as a stuck fault later.
            let opened = self.store.open_image(component.image).await;
            opened.map_err(|error| {
                let cause = super::chain(&error);
                HostError::Failed(format!("component {}: {cause}", label(component)))
            })?;
        }
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

    pub(super) fn map_image(
        &self,
        memory: &super::domains::DomainMemory,
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
        let missing = self.missing(&order.domain, &working_set);
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
    pub(super) fn missing(&self, domain: &Domain, plan: &[PlannedExtent]) -> Vec<(Digest, Extent)> {
        self.memory.table().read(|table| {
            let mut missing = Vec::new();
            for planned in plan {
                let image = SharedImage::new(domain.clone(), planned.image);
                let gaps = table.missing(&image, planned.extent);
                missing.extend(gaps.into_iter().map(|extent| (planned.image, extent)));
            }
            missing
        })
    }

    /// Waits until a plan is resident, or until the planner has given up on the rest.
    async fn wait_resident(&self, domain: &Domain, plan: &[PlannedExtent]) {
        let deadline = Instant::now() + RESIDENT_PATIENCE;
        let mut idle = 0;
        while Instant::now() < deadline && idle < 20 {
            let fetching = self.memory.table().read(|table| table.fetching_bytes());
            if fetching == 0 && self.missing(domain, plan).is_empty() {
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

    pub(super) async fn recipe(&self, lock: &Lock) -> Result<Arc<Recipe>, HostError> {
        let digest = lock.digest();
        if let Some(recipe) = self.recipes.lock().get(&digest) {
            return Ok(Arc::clone(recipe));
        }
        let recipe = Recipe::load(&self.store, lock)
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

    async fn compose(&self, order: &Order, vm: &Vm) -> Result<MapImage, HostError> {
        let recipe = self.recipe(&order.lock).await?;
        let (manifest, bundle) = (order.manifest.clone(), order.bundle.clone());
        let hostname = manifest.hostname.clone().unwrap_or_else(|| vm.name.clone());
        let path = vm.runtime_dir.join("map.img");
        let composed = tokio::task::spawn_blocking(move || {
            let composed =
                recipe.compose(&manifest, &hostname, MapLayout::Devices, bundle.as_ref());
            let composed = composed.map_err(HostError::failed)?;
            write_map_image(&composed, &path)
        });
        composed.await.map_err(HostError::failed)?
    }

    /// Kernel and initramfs of a kernel component as host files.
    async fn kernel(&self, kernel: &LockedComponent) -> Result<KernelFiles, HostError> {
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
            if forward.udp {
                return Err(HostError::Invalid(format!(
                    "UDP port {} cannot be forwarded yet: only TCP can",
                    forward.guest
                )));
            }
            let host = match forward.host {
                0 => self.free_port()?,
                port => port,
            };
            forwards.push(Forward {
                host,
                guest: forward.guest,
            });
        }
        Ok(forwards)
    }

    fn free_port(&self) -> Result<u16, HostError> {
        let mut next = self.next_port.lock();
        for _ in 0..10_000 {
            let port = (*next).max(FIRST_AUTO_PORT);
            *next = port.checked_add(1).unwrap_or(FIRST_AUTO_PORT);
            if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
                return Ok(port);
            }
        }
        Err(HostError::Failed(
            "no TCP port is free on 127.0.0.1".to_owned(),
        ))
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
                path: vm.runtime_dir.join("scratch.img"),
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
        let records = self.map_images(&order).await?;
        let wanted = self.wanted(&order, request.mode);
        let planned: Vec<Extent> = wanted.working_set.iter().map(|one| one.extent).collect();
        self.memory.tell(Event::ForecastChanged {
            domain: order.domain.clone(),
            profile: order.of.profile.as_str().into(),
            devices: order.device_images(),
            launch_probability: 1.0,
            next_launch_ms: Some(now_ms()),
            working_set: wanted.working_set.clone(),
        });
        if request.wait {
            self.wait_resident(&order.domain, &wanted.working_set).await;
        }
        let devices = records.iter().enumerate();
        let devices: Vec<MapDevice> = devices
            .map(|(index, one)| self.map_device(&order.domain, index + 1, one, 0))
            .collect();
        Ok(Prefetched {
            profile: order.of.profile,
            domain: order.domain.as_str().to_owned(),
            devices,
            planned_bytes: total_bytes(&planned),
            took_s: started.elapsed().as_secs_f64(),
        })
    }
}

struct MapImage {
    record: DeviceRecord,
    uuid: String,
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

fn make_runtime_dir(dir: &Path) -> Result<(), HostError> {
    let made = match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => std::fs::create_dir_all(dir),
    };
    made.map_err(|error| {
        HostError::Failed(format!(
            "cannot make the VM's directory {}: {error}",
            dir.display()
        ))
    })
}

pub(super) fn label(component: &LockedComponent) -> String {
    format!("{} {}", component.name, component.version)
}

pub(super) fn vm_component(component: &LockedComponent) -> VmComponent {
    VmComponent {
        name: component.name.clone(),
        version: component.version.clone(),
        id: component.id,
        image: component.image,
        image_bytes: component.image_bytes,
        attached: false,
    }
}

pub(super) fn pmem_device(record: &DeviceRecord) -> PmemDevice {
    let id = format!("c{}", &record.image.hex()[..24]);
    PmemDevice {
        id,
        path: record.path.clone(),
        bytes: record.device_bytes,
    }
}

/// The trust domain of an owner; it names a directory.
fn domain_name(owner: &str) -> Result<Domain, HostError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.@".contains(&byte);
    let ok = !owner.is_empty()
        && owner.len() <= 64
        && owner.bytes().all(plain)
        && !owner.starts_with('.');
    if ok {
        return Ok(Domain::from(owner));
    }
    Err(HostError::Invalid(format!(
        "{owner:?} cannot be an owner: 1 to 64 letters, digits, `-`, `_`, `.`, `@`, not \
         starting with a dot"
    )))
}

#[cfg(test)]
mod tests {
    use forelay_image::component::Role;

    use super::*;

    fn locked(name: &str, role: Role, image_bytes: u64) -> LockedComponent {
        let image = Digest::of(name.as_bytes());
        LockedComponent {
            name: name.into(),
            version: "1".into(),
            role,
            id: image,
            image,
            image_bytes,
            metadata_bytes: 4096,
        }
    }

    #[test]
    fn too_many_components_share_a_device_the_smallest_first() {
        let lock = Lock {
            format: 1,
            manifest_digest: Digest::of(b"manifest"),
            kernel: locked("kernel", Role::Kernel, 1 << 20),
            components: vec![
                locked("base", Role::Base, 1 << 30),
                locked("small", Role::Library, 4096),
                locked("large", Role::Package, 1 << 20),
                locked("smaller", Role::Library, 8192),
            ],
        };
        assert_eq!(bundle_smallest(&lock, 4), None);
        let bundle = bundle_smallest(&lock, 3).unwrap();
        let small = ["small", "smaller"].map(|name| Digest::of(name.as_bytes()));
        assert_eq!(
            bundle
                .members()
                .iter()
                .map(|one| one.image)
                .collect::<Vec<_>>(),
            small
        );
        assert_eq!(bundle_smallest(&lock, 2).unwrap().members().len(), 3);
    }

    #[test]
    fn owners_that_could_leave_the_mount_directory_are_refused() {
        assert!(domain_name("alice@example.org").is_ok());
        for bad in ["", "..", ".hidden", "a/b", "a b", &"x".repeat(65)] {
            assert!(domain_name(bad).is_err(), "{bad:?}");
        }
    }
}
