//! Snapshots of VMs that were saved while they ran: each is of use to those alone that were made
//! of it, the VM itself or its forks, and goes when none is left.

use std::sync::Arc;

use forelay_cache::Domain;
use forelay_image::ComponentId;

use crate::daemon::error::HostError;
use crate::daemon::snapshot::service::{Opened, Resumable, Snapshots};
use crate::daemon::vm::instance::Instance;

impl Snapshots {
    /// The snapshot of a VM, with its memory reachable for VMMs; read whole before, if nobody has.
    /// There is no other, so one that was set aside is looked at again: what was wrong may have
    /// been mended.
    pub async fn of_vm(&self, domain: &Domain, id: ComponentId) -> Result<Resumable, HostError> {
        let shelf = self.shelf(domain).await?;
        let kept = shelf.get(id).ok_or_else(|| {
            HostError::Failed(format!("what it was saved as ({}) is gone", id.short()))
        })?;
        self.verify(&shelf, &kept).await.map_err(|error| {
            HostError::Failed(format!("what it was saved as is damaged: {error}"))
        })?;
        match self.open(&shelf, kept).await? {
            Opened::Here(found) => Ok(found),
            Opened::Unverified | Opened::Unreachable => Err(HostError::Failed(
                "what it was saved as cannot be reached at this moment: try again".to_owned(),
            )),
        }
    }

    /// Removes those that no VM is made of, once a VM has ended that may be.
    pub fn remove_after(self: &Arc<Self>, instance: Arc<Instance>) {
        let is_made_of_one = |vm: &crate::daemon::vm::instance::VmData| {
            vm.devices.iter().any(|device| device.memory)
        };
        if !instance.read(is_made_of_one) {
            return;
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            instance.ended().await;
            this.remove_unused().await;
        });
    }

    /// Removes those that no VM is made of.
    pub async fn remove_unused(&self) {
        let _nobody_saves = self.saving.write().await;
        for shelf in self.all_shelves().await {
            let of_vms = shelf.all().into_iter();
            for kept in of_vms.filter(|one| one.of.origin.vm.is_some()) {
                if !self.users(&kept).is_empty() {
                    continue;
                }
                match self.remove(&shelf, &kept).await {
                    Ok(()) => tracing::info!(snapshot = %kept.id, "removed: no VM is made of it"),
                    Err(error) => tracing::info!(snapshot = %kept.id, %error, "kept"),
                }
            }
        }
    }
}
