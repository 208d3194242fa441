//! Hot attach and detach: a component's files appear in a running VM, and go again.
//!
//! The manifest with the further component is solved as a whole, keeping what the VM
//! has, so that conflicts and missing dependencies are told before anything is plugged;
//! dependencies that the VM lacks are attached first.
//!
//! Invariant: a refused attach leaves the VM as it was.

use std::sync::Arc;

use forelay_cache::plan::Event;
use forelay_cache::{DeviceImage, Domain};
use forelay_image::component::NameRange;
use forelay_image::lock::{Lock, LockedComponent};
use forelay_image::manifest::Manifest;
use forelay_image::solve::relock;
use forelay_vm::guest_protocol::Attach;

use super::instances::{DeviceRecord, Instance};
use super::launch::{PlannedDevice, pmem_device, vm_component};
use super::{Host, HostError};
use crate::api::{Vm, VmComponent};
use crate::history::{ComponentRef, ProfileRef};

impl Host {
    /// Attaches a component (`name` or `name@range`) and what it needs to a running VM.
    pub async fn attach(self: &Arc<Self>, name: &str, wanted: &str) -> Result<Vm, HostError> {
        let instance = self.instance(name)?;
        let handle = self.handle(name)?;
        let range = parse_wanted(wanted)?;
        if has(&instance.vm(), &range.name) {
            return Err(HostError::Busy(format!(
                "{} is in VM {name} already",
                range.name
            )));
        }
        let (mut manifest, lock) = self.with_component(&instance, range).await?;
        let present: Vec<_> = instance
            .vm()
            .components
            .iter()
            .map(|one| one.image)
            .collect();
        let added = lock
            .components
            .iter()
            .filter(|one| !present.contains(&one.image));
        for component in added.cloned().collect::<Vec<_>>() {
            let record = self.map_attached(&instance, &component).await?;
            let device = pmem_device(&record);
            let request = Attach {
                uuid: component.image.hex()[..32].to_owned(),
                name: component.name.clone(),
                etc: true,
                timeout_ms: 0,
            };
            let attached = handle
                .attach(&device, request)
                .await
                .map_err(HostError::failed)?;
            tracing::info!(
                vm = name,
                component = component.name,
                device_wait_ms = attached.device_wait_ms,
                graft_ms = attached.graft_ms,
                "attached"
            );
            self.note_attached(&instance, &component, record).await;
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
        instance.update_record(|record| {
            record.manifest = manifest.to_toml();
            record.lock = lock.to_toml();
        });
        instance.save().map_err(HostError::failed)?;
        Ok(instance.vm())
    }

    /// The VM's manifest and lock with a further component.
    async fn with_component(
        &self,
        instance: &Instance,
        range: NameRange,
    ) -> Result<(Manifest, Lock), HostError> {
        let (manifest, lock) = instance.order();
        let mut manifest = Manifest::parse(&manifest).map_err(HostError::failed)?;
        let previous = Lock::parse(&lock).map_err(HostError::failed)?;
        manifest.components.push(range);
        let components = self.store.components().await.map_err(HostError::failed)?;
        let components: Vec<_> = components.iter().map(|one| (**one).clone()).collect();
        let lock = relock(&manifest, &components, &previous).map_err(HostError::invalid)?;
        let kept = |one: &LockedComponent| lock.components.iter().any(|new| new.id == one.id);
        if let Some(changed) = previous.components.iter().find(|one| !kept(one)) {
            return Err(HostError::Invalid(format!(
                "attaching it would replace {} {}, which the running VM uses: launch the VM \
                 anew with both",
                changed.name, changed.version
            )));
        }
        Ok((manifest, lock))
    }

    async fn map_attached(
        self: &Arc<Self>,
        instance: &Instance,
        component: &LockedComponent,
    ) -> Result<DeviceRecord, HostError> {
        self.store
            .open_image(component.image)
            .await
            .map_err(HostError::failed)?;
        let domain = Domain::from(instance.vm().domain.as_str());
        let (host, component) = (Arc::clone(self), component.clone());
        let mapped = tokio::task::spawn_blocking(move || {
            let memory = host.domains.ensure(&domain)?;
            host.map_image(&memory, &PlannedDevice::from(&component))
        });
        mapped.await.map_err(HostError::failed)?
    }

    async fn note_attached(
        &self,
        instance: &Instance,
        component: &LockedComponent,
        record: DeviceRecord,
    ) {
        let vm = instance.vm();
        let device = DeviceImage {
            image: component.image,
            image_bytes: component.image_bytes,
        };
        self.memory.tell(Event::Attached {
            vm: vm.name.as_str().into(),
            device,
        });
        let observed = self.observers.lock().get(&vm.name).cloned();
        if let Some(observed) = observed {
            let (image, path) = (record.image, record.path.clone());
            let watching =
                tokio::task::spawn_blocking(move || observed.lock().observer.watch(image, &path));
            if !matches!(watching.await, Ok(Ok(()))) {
                tracing::warn!(vm = vm.name, "cannot observe the attached device");
            }
        }
        instance.update_record(|old| old.devices.push(record));
        instance.update(|vm| {
            vm.components.push(VmComponent {
                attached: true,
                ..vm_component(component)
            });
        });
        let of = ProfileRef::new(vm.profile, vm.owner);
        let component = ComponentRef {
            name: component.name.clone(),
            image: component.image,
        };
        self.learner
            .attached(&of, instance.launch_id(), component)
            .await;
    }

    /// Detaches a component that was attached; the guest refuses while it is in use.
    pub async fn detach(self: &Arc<Self>, name: &str, wanted: &str) -> Result<Vm, HostError> {
        let instance = self.instance(name)?;
        let handle = self.handle(name)?;
        let vm = instance.vm();
        let found = vm.components.iter().find(|one| one.name == wanted);
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
        let uuid = image.hex()[..32].to_owned();
        let detached = handle.detach(&pmem_device(record).id, &uuid).await;
        detached.map_err(|error| HostError::Busy(super::chain(&error)))?;
        self.memory.tell(Event::Detached {
            vm: name.into(),
            image,
        });
        if let Some(observed) = self.observers.lock().get(name) {
            observed.lock().observer.unwatch(&image);
        }
        instance.update_record(|record| {
            record.devices.retain(|device| device.image != image);
            if let Ok(mut manifest) = Manifest::parse(&record.manifest) {
                manifest.components.retain(|one| one.name != wanted);
                record.manifest = manifest.to_toml();
            }
            // Else what excludes it could never be attached.
            if let Ok(mut lock) = Lock::parse(&record.lock) {
                lock.components.retain(|one| one.image != image);
                record.lock = lock.to_toml();
            }
        });
        instance.update(|vm| vm.components.retain(|one| one.image != image));
        instance.save().map_err(HostError::failed)?;
        Ok(instance.vm())
    }
}

fn has(vm: &Vm, name: &str) -> bool {
    vm.components.iter().any(|component| component.name == name)
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
