//! Hibernation: a VM becomes a snapshot of its own, which takes no memory, and the VM again.
//!
//! ```text
//! hold -> copy -> store -> record: hibernated -> VMM ends
//! VMM, state restored -> record: runs -> CPUs, programs go on
//! ```
//! Invariant: at each moment the record on disk says which of both the VM is, the VMM or what it
//! was saved as, and that one is whole. The other, if it is there, has not run since and goes.

use std::sync::Arc;

use forelay_image::ComponentId;
use forelay_vm::VmHandle;

use super::LaunchService;
use super::saving::{and_stands, check_room, let_go, restore_into, same_vmm, saved_spec};
use super::start::{KILL_LIMIT, StartedVmm};
use crate::api::{LaunchRequest, Vm, VmState};
use crate::daemon::error::HostError;
use crate::daemon::order::{DeviceRecord, Order};
use crate::daemon::snapshot::origin::Runtime;
use crate::daemon::snapshot::service::Resumable;
use crate::daemon::vm::instance::{Instance, SavedRecord};
use crate::history::ProfileRef;

impl LaunchService {
    /// Has a VM hibernate.
    pub async fn hibernate(&self, instance: &Arc<Instance>) -> Result<Vm, HostError> {
        let _turn = instance.device_turn().await;
        let order = self.order_of(instance)?;
        let runtime = self.runtime_of(instance, &order).await?;
        let shelf = self.snapshots.shelf(&order.domain).await?;
        // What has to be waited for is, before the VM stands still.
        let one_save = shelf.saving.lock().await;
        let unused_yet = self.snapshots.saving.read().await;
        let (handle, _) = Self::hold(instance, true).await?;
        let saving = self.hibernate_held(instance, &handle, &order, &runtime);
        if let Err(error) = saving.await {
            let stands = let_go(instance, &handle).await.err();
            let error = HostError::Failed(format!(
                "VM {} could not be saved and goes on: {error}",
                instance.name()
            ));
            return Err(and_stands(error, stands));
        }
        drop((one_save, unused_yet));
        if let Err(error) = handle.kill() {
            tracing::error!(vm = instance.name(), %error, "its VMM lives on");
        }
        if no_vmm(instance).await.is_err() {
            tracing::error!(vm = instance.name(), "its VMM was killed and does not end");
        }
        Ok(instance.vm())
    }

    async fn hibernate_held(
        &self,
        instance: &Instance,
        handle: &VmHandle,
        order: &Order,
        runtime: &Runtime,
    ) -> Result<(), HostError> {
        let copy = self.copy(instance, handle, order).await?;
        let machine = copy.vm.machine.clone();
        let kept = self.store(instance, order, runtime, copy).await?;
        let found = self.snapshots.of_vm(&order.domain, kept.id).await?;
        let mut devices = instance.devices();
        devices.retain(|device| !device.memory);
        devices.push(found.memory.clone());
        let saved = SavedRecord {
            snapshot: kept.id,
            machine,
            vmm: runtime.vmm.clone(),
            accelerator: runtime.accelerator.to_string(),
        };
        let written = instance.hibernate(saved, devices);
        written.map_err(|error| HostError::Failed(format!("its record: {error}")))
    }

    /// Has a VM go on that hibernates.
    pub async fn wake(&self, instance: &Arc<Instance>) -> Result<Vm, HostError> {
        let _turn = instance.device_turn().await;
        let name = instance.name();
        let saved = instance.read(|vm| vm.saved.clone());
        let saved = saved.filter(|_| instance.state() == VmState::Hibernated);
        let saved = saved.ok_or_else(|| {
            let state = instance.state();
            HostError::Busy(format!("VM {name} does not hibernate: it is {state:?}"))
        })?;
        self.admission.registry.check_open()?;
        no_vmm(instance).await?;
        check_room(1, &format!("VM {name}"))?;
        let order = self.order_of(instance)?;
        let restoring = async {
            let (from, devices) = self.find_saved(instance, &order, &saved).await?;
            let vmm = self.restore_saved(instance, &order, &saved, &from).await?;
            Ok((vmm, devices))
        };
        let (vmm, devices) = restoring.await.map_err(|error: HostError| {
            HostError::Failed(format!(
                "VM {name} cannot go on, and stays as it is: {error}; `forelay resume {name}` \
                 tries again, `forelay stop {name}` deletes it"
            ))
        })?;
        let handle = vmm.handle().clone();
        let registry = &self.admission.registry;
        if let Err(error) = registry.wake(instance, handle.pid(), devices) {
            // What was saved is as it was.
            vmm.end().await;
            return Err(error);
        }
        let going_on = async {
            instance.save().map_err(HostError::failed)?;
            handle.unpause().await.map_err(HostError::failed)
        };
        if let Err(error) = going_on.await {
            // None of it has run.
            vmm.end().await;
            instance.sleep_on();
            if let Err(error) = instance.save() {
                tracing::error!(vm = name, %error, "its record says that it runs");
            }
            return Err(error);
        }
        let handle = vmm.commit();
        let goes_on = let_go(instance, &handle).await;
        self.supervisor.resume(Arc::clone(instance), handle);
        self.snapshots.remove_after(Arc::clone(instance));
        goes_on.map(|()| instance.vm())
    }

    /// What a VM was saved as, and its devices, all of which are reachable from then on.
    async fn find_saved(
        &self,
        instance: &Instance,
        order: &Order,
        saved: &SavedRecord,
    ) -> Result<(Resumable, Vec<DeviceRecord>), HostError> {
        let kernel = self.composer.kernel(&order.lock.kernel).await?;
        let runtime = self.starter.runtime(&kernel.kernel).await?;
        same_vmm("it was saved", (&saved.vmm, &saved.accelerator), &runtime)?;
        let (map, own): (Vec<_>, Vec<_>) = {
            let devices = instance.devices().into_iter().filter(|one| !one.memory);
            devices.enumerate().partition(|(slot, _)| *slot == 0)
        };
        let own: Vec<DeviceRecord> = own.into_iter().map(|(_, device)| device).collect();
        let mapped = self.mapper.map_again(order, &own).await?;
        let from = self.snapshots.of_vm(&order.domain, saved.snapshot).await?;
        let mut devices: Vec<DeviceRecord> = map.into_iter().map(|(_, device)| device).collect();
        devices.extend(mapped);
        devices.push(from.memory.clone());
        Ok((from, devices))
    }

    /// A VMM that is what was saved, its CPUs standing still.
    async fn restore_saved(
        &self,
        instance: &Instance,
        order: &Order,
        saved: &SavedRecord,
        from: &Resumable,
    ) -> Result<StartedVmm, HostError> {
        let kernel = self.composer.kernel(&order.lock.kernel).await?;
        let dir = instance.dir().map_err(HostError::invalid)?.path();
        let forwards = instance.read(|vm| vm.forwards.clone());
        let place = (instance.name(), dir.as_path());
        let machine = &saved.machine;
        let mut spec = saved_spec(order, place, machine, &from.memory, kernel, &forwards);
        spec.mergeable = self.starter.merges(&order.domain);
        let vmm = self.starter.start(&spec).await?;
        match restore_into(vmm.handle(), &from.state).await {
            Ok(()) => Ok(vmm),
            Err(error) => {
                vmm.end().await;
                Err(error)
            }
        }
    }

    /// Has the VM go on that a launch names, if it hibernates.
    pub(super) async fn wake_named(
        self: &Arc<Self>,
        order: &Order,
        request: &LaunchRequest,
    ) -> Result<Option<Vm>, HostError> {
        let Some(name) = request.name.as_ref().or(order.manifest.name.as_ref()) else {
            return Ok(None);
        };
        let found = self.admission.registry.get(name);
        let Some(instance) = wakes(found, &order.of)? else {
            return Ok(None);
        };
        if asks_for_another(order, &self.order_of(&instance)?, &instance) {
            let name = instance.name();
            let note = format!(
                "it goes on as it was saved, and what it was launched from has changed since: \
                 `forelay stop {name}` first launches it again"
            );
            instance.update(|vm| {
                vm.launch.notes.retain(|one| *one != note);
                vm.launch.notes.push(note);
            });
        }
        let service = Arc::clone(self);
        // A client that goes away must not leave it half done.
        let waking = tokio::spawn(async move { service.wake(&instance).await });
        waking.await.map_err(HostError::failed)?.map(Some)
    }
}

/// Waits until the VMM that a VM had before is gone, and all that its end brings with it done.
async fn no_vmm(instance: &Instance) -> Result<(), HostError> {
    let watched = tokio::time::timeout(KILL_LIMIT, instance.watch_turn()).await;
    watched.map(drop).map_err(|_| {
        let name = instance.name();
        HostError::Busy(format!(
            "the VMM that VM {name} had has not ended: try again"
        ))
    })
}

/// Whether a launch asks for another machine or other components than those of a VM that hibernates.
/// (With what was attached to that, its components say nothing.)
fn asks_for_another(order: &Order, saved: &Order, instance: &Instance) -> bool {
    let ids = |order: &Order| -> Vec<ComponentId> {
        order.lock.components.iter().map(|one| one.id).collect()
    };
    let attached = instance.read(|vm| vm.components.iter().any(|one| one.attached));
    order.manifest.machine_digest() != saved.manifest.machine_digest()
        || (!attached && ids(order) != ids(saved))
}

/// The VM that a launch of this profile has go on, of all that have the name that it wants.
fn wakes(
    found: Option<Arc<Instance>>,
    of: &ProfileRef,
) -> Result<Option<Arc<Instance>>, HostError> {
    let Some(instance) = found.filter(|one| one.state() == VmState::Hibernated) else {
        return Ok(None);
    };
    let (name, own) = (instance.name(), instance.profile());
    if own == *of {
        return Ok(Some(instance));
    }
    if own.owner != of.owner {
        // The launch hears that the name is taken, and no more.
        return Ok(None);
    }
    Err(HostError::Busy(format!(
        "a VM called {name} hibernates that is of profile {}: `forelay resume {name}` lets it go \
         on, `forelay stop {name}` deletes it",
        own.profile
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::vm::instance::tests::data;

    #[test]
    fn a_launch_wakes_its_own_profiles_vm_alone_and_hears_nothing_of_other_owners() {
        let dir = tempfile::tempdir().unwrap();
        let instance = |state| {
            let mut record = Instance::launching("web", data("web", dir.path())).record();
            record.vm.state = state;
            Some(Arc::new(Instance::left(record, None)))
        };
        let own = ProfileRef::new("web", "me");
        let hibernates = instance(VmState::Hibernated);
        let woken = wakes(hibernates.clone(), &own).unwrap();
        assert_eq!(woken.unwrap().name(), "web");
        for state in [VmState::Ready, VmState::Paused] {
            assert!(wakes(instance(state), &own).unwrap().is_none());
        }
        assert!(wakes(None, &own).unwrap().is_none());
        let other = wakes(hibernates.clone(), &ProfileRef::new("other", "me"));
        let told = other.unwrap_err().to_string();
        assert!(told.contains("forelay resume web"), "{told}");
        let others = wakes(hibernates, &ProfileRef::new("web", "you"));
        assert!(others.unwrap().is_none());
    }
}
