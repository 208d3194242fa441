//! Hot attach and detach: a component's files appear in a running VM, and go again.
//!
//! The manifest with the further component is solved as a whole, keeping what the VM
//! has, so that conflicts and missing dependencies are told before anything is plugged;
//! dependencies that the VM lacks are attached first.
//!
//! Invariant: an attach that is refused or fails leaves the VM as it was, dependencies
//! included.

use std::sync::Arc;
use std::time::Instant;

use forelay_cache::{DeviceImage, PlannerEvent};
use forelay_guest_protocol::messages::Attach;
use forelay_image::Digest;
use forelay_image::component::NameRange;
use forelay_image::lock::{Lock, LockedComponent};
use forelay_image::manifest::Manifest;
use forelay_image::solve::relock;
use forelay_store::Store;
use forelay_vm::{AttachError, VmHandle};

use crate::api::{AttachFigures, Vm, VmComponent, VmState};
use crate::daemon::error::HostError;
use crate::daemon::forecast::learning::Learner;
use crate::daemon::memory::mapper::Mapper;
use crate::daemon::memory::planner::PlannerHandle;
use crate::daemon::order::{DeviceRecord, PlannedDevice, vm_component};
use crate::daemon::vm::instance::Instance;
use crate::daemon::vm::supervise::Supervisor;
use crate::history::ComponentRef;
use crate::recipe::solve_for_this_host;

/// Most files that a guest may say it left out of one component; its agent says no more than a
/// few dozen.
const MOST_LEFT_OUT: usize = 100;

/// Attaches components to running VMs, and detaches them.
pub struct AttachService {
    pub store: Store,
    pub mapper: Arc<Mapper>,
    pub memory: Arc<PlannerHandle>,
    pub learner: Arc<Learner>,
    pub supervisor: Arc<Supervisor>,
}

impl AttachService {
    /// Attaches a component (`name` or `name@range`) and what it needs to a running VM:
    /// all of it, or nothing.
    pub async fn attach(&self, instance: &Arc<Instance>, wanted: &str) -> Result<Vm, HostError> {
        let asked = Instant::now();
        let name = instance.name();
        let handle = running(instance)?;
        let range = parse_wanted(wanted)?;
        if has(instance, &range.name) {
            return Err(HostError::Busy(format!(
                "{} is in VM {name} already",
                range.name
            )));
        }
        let (mut manifest, lock) = self.with_component(instance, range).await?;
        let plan_s = asked.elapsed().as_secs_f64();
        let components = instance.read(|vm| vm.components.clone());
        let present = |image| components.iter().any(|one| one.image == image);
        let added = lock.components.iter().filter(|one| !present(one.image));
        let mut done: Vec<&LockedComponent> = Vec::new();
        for component in added {
            let attached = self.attach_one(instance, &handle, component, plan_s);
            if let Err(error) = attached.await {
                self.take_back(instance, &handle, &done).await;
                return Err(error);
            }
            done.push(component);
            // What came as a dependency stays, too, when what needed it is detached.
            if manifest
                .components
                .iter()
                .all(|one| one.name != component.name)
            {
                manifest.components.push(NameRange {
                    name: component.name.clone(),
                    range: String::new(),
                });
            }
        }
        let before = instance.read(|vm| (vm.manifest.clone(), vm.lock.clone()));
        instance.update(|vm| (vm.manifest, vm.lock) = (manifest.to_toml(), lock.to_toml()));
        if let Err(error) = instance.save() {
            // A later daemon would not know of them.
            instance.update(|vm| (vm.manifest, vm.lock) = before);
            self.take_back(instance, &handle, &done).await;
            return Err(HostError::Failed(format!(
                "the record of VM {name} cannot be written: {error}; nothing was attached"
            )));
        }
        self.record(instance, &done).await;
        Ok(instance.vm())
    }

    /// Records what was attached in the history.
    async fn record(&self, instance: &Instance, done: &[&LockedComponent]) {
        let of = instance.profile();
        for component in done {
            let component = ComponentRef {
                name: component.name.clone(),
                image: component.image,
            };
            let launch_id = instance.launch_id();
            self.learner.attached(&of, launch_id, component).await;
        }
    }

    async fn attach_one(
        &self,
        instance: &Arc<Instance>,
        handle: &VmHandle,
        component: &LockedComponent,
        plan_s: f64,
    ) -> Result<(), HostError> {
        let started = Instant::now();
        let domain = instance.domain();
        let record = self
            .mapper
            .map_component(&domain, component.id, PlannedDevice::from(component))
            .await?;
        let map_s = started.elapsed().as_secs_f64();
        let request = Attach {
            uuid: uuid(component),
            name: component.name.clone(),
            etc: true,
            timeout_ms: 0,
        };
        let attached = handle.attach(&record.pmem(), request).await;
        let attached = attached.map_err(HostError::failed)?;
        let plugged = Instant::now();
        self.note_attached(instance, component, record).await;
        // The guest may say any number.
        let guest_ms = attached.guest.device_wait_ms;
        let guest_ms = guest_ms.saturating_add(attached.guest.graft_ms);
        let figures = AttachFigures {
            plan_s,
            map_s,
            plug_s: attached.plug.as_secs_f64(),
            probe_s: attached.guest.device_wait_ms as f64 / 1e3,
            mount_s: attached
                .guest
                .graft_ms
                .saturating_sub(attached.guest.agent_ms) as f64
                / 1e3,
            agent_s: attached.guest.agent_ms as f64 / 1e3,
            channel_s: (attached.guest_answer.as_secs_f64() - guest_ms as f64 / 1e3).max(0.0),
            note_s: plugged.elapsed().as_secs_f64(),
        };
        tracing::info!(
            vm = handle.name(),
            component = component.name,
            ?figures,
            "attached"
        );
        instance.update(|vm| {
            let new = vm.components.iter_mut().rfind(|one| one.id == component.id);
            if let Some(new) = new {
                new.attach = Some(figures);
                new.left_out = left_out(attached.guest.left_out);
            }
        });
        Ok(())
    }

    /// Detaches what a failed attach has attached already, last first.
    async fn take_back(&self, instance: &Instance, handle: &VmHandle, done: &[&LockedComponent]) {
        for component in done.iter().rev() {
            let devices = instance.devices();
            let record = devices.iter().find(|one| one.image == component.image);
            let Some(device) = record.map(DeviceRecord::pmem) else {
                continue;
            };
            // Nothing is learned of what is taken back.
            if let Some(observed) = instance.observed() {
                observed.lock().buffer.take_attached(&component.image);
            }
            match handle.detach(&device.id, &uuid(component)).await {
                // Without its state file it is detached all the same.
                Ok(_) | Err(AttachError::State(_)) => self.note_detached(instance, component.image),
                Err(error) => tracing::error!(
                    vm = handle.name(),
                    component = component.name,
                    error = forelay_host::error_chain(&error),
                    "a component of a failed attach stays attached"
                ),
            }
        }
        // Supervision may have written the record meanwhile.
        if let Err(error) = instance.save() {
            tracing::warn!(vm = handle.name(), %error, "cannot save an instance's record");
        }
    }

    /// The VM's manifest and lock with a further component.
    async fn with_component(
        &self,
        instance: &Instance,
        range: NameRange,
    ) -> Result<(Manifest, Lock), HostError> {
        let (manifest, lock) = instance.read(|vm| (vm.manifest.clone(), vm.lock.clone()));
        let mut manifest = Manifest::parse(&manifest).map_err(HostError::failed)?;
        let previous = Lock::parse(&lock).map_err(HostError::failed)?;
        manifest.components.push(range);
        let components = self.store.components().await.map_err(HostError::failed)?;
        let solve = |components: &'_ _| relock(&manifest, components, &previous);
        let lock = solve_for_this_host(&components, solve).map_err(HostError::invalid)?;
        let kept = |one: &LockedComponent| lock.components.iter().any(|new| new.id == one.id);
        if let Some(changed) = previous.components.iter().find(|one| !kept(one)) {
            return Err(HostError::Invalid(format!(
                "attaching it would replace {} {}, which the running VM uses: launch the VM \
                 again with both",
                changed.name, changed.version
            )));
        }
        Ok((manifest, lock))
    }

    async fn note_attached(
        &self,
        instance: &Arc<Instance>,
        component: &LockedComponent,
        record: DeviceRecord,
    ) {
        let device = DeviceImage {
            image: component.image,
            image_bytes: component.image_bytes,
        };
        let name = instance.name().into();
        self.memory.tell(PlannerEvent::Attached(name, device));
        if let Some(observed) = instance.observed() {
            self.supervisor
                .learn_attached(instance, &observed, component.image);
            let (image, path) = (record.image, record.path.clone());
            let watching =
                tokio::task::spawn_blocking(move || observed.lock().observer.watch(image, &path));
            if !matches!(watching.await, Ok(Ok(()))) {
                tracing::warn!(vm = instance.name(), "cannot observe the attached device");
            }
        }
        instance.update(|vm| {
            vm.devices.push(record);
            vm.components.push(VmComponent {
                attached: true,
                ..vm_component(component)
            });
        });
    }

    /// Detaches a component that was attached; the guest refuses while it is in use.
    pub async fn detach(&self, instance: &Arc<Instance>, wanted: &str) -> Result<Vm, HostError> {
        let name = instance.name();
        let handle = running(instance)?;
        let components = instance.read(|vm| vm.components.clone());
        let found = components.iter().find(|one| one.name == wanted);
        let component = found
            .ok_or_else(|| HostError::Invalid(format!("VM {name} has no component {wanted:?}")))?;
        if !component.attached {
            return Err(HostError::Invalid(format!(
                "{wanted} is part of VM {name} since its launch: only attached components can go"
            )));
        }
        let image = component.image;
        let devices = instance.devices();
        let record = devices.iter().find(|device| device.image == image);
        let record = record.ok_or_else(|| HostError::Failed("its device is unknown".to_owned()))?;
        let uuid = image.image_uuid().to_string();
        self.supervisor.scan_now(instance).await;
        let detached = handle.detach(&record.pmem().id, &uuid).await;
        // Without its state file it is detached all the same.
        let unsaved = match detached {
            Err(AttachError::State(error)) => Some(error),
            other => {
                other.map_err(|error| HostError::Busy(forelay_host::error_chain(&error)))?;
                None
            }
        };
        self.note_detached(instance, image);
        instance.update(|vm| {
            if let Ok(mut manifest) = Manifest::parse(&vm.manifest) {
                manifest.components.retain(|one| one.name != wanted);
                vm.manifest = manifest.to_toml();
            }
            // Else what excludes it could never be attached.
            if let Ok(mut lock) = Lock::parse(&vm.lock) {
                lock.components.retain(|one| one.image != image);
                vm.lock = lock.to_toml();
            }
        });
        match instance.save().err().or(unsaved) {
            None => Ok(instance.vm()),
            Some(error) => Err(HostError::Failed(format!(
                "{wanted} is detached, but what a later daemon reads of VM {name} still has it: \
                 {error}"
            ))),
        }
    }

    fn note_detached(&self, instance: &Instance, image: Digest) {
        let name = instance.name().into();
        self.memory.tell(PlannerEvent::Detached(name, image));
        if let Some(observed) = instance.observed() {
            observed.lock().observer.unwatch(&image);
        }
        instance.update(|vm| {
            vm.devices.retain(|device| device.image != image);
            vm.components.retain(|one| one.image != image);
        });
    }
}

/// What the guest says that it left out, as far as it is kept.
fn left_out(mut said: Vec<String>) -> Vec<String> {
    said.truncate(MOST_LEFT_OUT);
    said
}

fn uuid(component: &LockedComponent) -> String {
    component.image.image_uuid().to_string()
}

/// The VMM of a VM that runs.
pub fn running(instance: &Instance) -> Result<VmHandle, HostError> {
    let (name, state) = (instance.name(), instance.state());
    match (state, instance.handle()) {
        (VmState::Paused | VmState::Hibernated, _) | (_, None) => {
            Err(HostError::Busy(not_running(name, state)))
        }
        (_, Some(handle)) => Ok(handle),
    }
}

fn not_running(name: &str, state: VmState) -> String {
    match state {
        VmState::Paused => format!("VM {name} is paused: `forelay resume {name}` lets it go on"),
        VmState::Hibernated => {
            format!("VM {name} hibernates: `forelay resume {name}` lets it go on")
        }
        _ => format!("VM {name} has no VMM to talk to: it is {state:?}"),
    }
}

fn has(instance: &Instance, name: &str) -> bool {
    instance.read(|vm| vm.components.iter().any(|one| one.name == name))
}

/// `name` or `name@range`, as in manifests.
fn parse_wanted(text: &str) -> Result<NameRange, HostError> {
    let manifest = format!("base = \"x\"\ncomponents = [{text:?}]\n");
    let parsed = Manifest::parse(&manifest)
        .ok()
        .and_then(|mut one| one.components.pop());
    parsed.ok_or_else(|| {
        HostError::Invalid(format!(
            "{text:?} is no component: give a name, or name@range"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_it_left_out_is_bounded() {
        assert_eq!(left_out(vec!["x".to_owned(); 10_000]).len(), MOST_LEFT_OUT);
    }

    #[test]
    fn components_are_named_as_in_manifests() {
        assert_eq!(parse_wanted("nginx").unwrap().name, "nginx");
        let ranged = parse_wanted("nginx@>= 1.22").unwrap();
        assert_eq!(
            (ranged.name.as_str(), ranged.range.is_empty()),
            ("nginx", false)
        );
        assert!(parse_wanted("").is_err());
        assert!(parse_wanted("a\"], owner = \"x").is_err());
    }
}
