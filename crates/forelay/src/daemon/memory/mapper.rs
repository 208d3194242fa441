//! Mapping: a lock's images become files of the trust domain's mount, which VMMs map.
//!
//! Refuses to know VMs. Invariant: an image is reachable only after its component was
//! opened, so that one that vanished is told now and not as a stuck fault later.

use std::sync::Arc;

use forelay_cache::Domain;
use forelay_image::ComponentId;
use forelay_store::Store;

use crate::daemon::error::HostError;
use crate::daemon::memory::domains::{DomainMemory, Domains};
use crate::daemon::order::{DeviceRecord, Order, PlannedDevice, label};

/// Makes images reachable in shared memory.
pub struct Mapper {
    pub store: Store,
    pub domains: Arc<Domains>,
}

impl Mapper {
    /// Makes the images of an order's lock reachable in its domain.
    pub async fn map_images(&self, order: &Order) -> Result<Vec<DeviceRecord>, HostError> {
        let opening = order.lock.components.iter().map(|component| async move {
            let opened = self.store.open_component(component.id).await;
            opened.map(drop).map_err(|error| {
                let cause = forelay_host::error_chain(&error);
                HostError::Failed(format!("component {}: {cause}", label(component)))
            })
        });
        futures_util::future::try_join_all(opening).await?;
        let (store, domains) = (self.store.clone(), Arc::clone(&self.domains));
        let (domain, bundle) = (order.domain.clone(), order.bundle.clone());
        let devices = order.devices.clone();
        let mapped = tokio::task::spawn_blocking(move || {
            let memory = domains.ensure(&domain)?;
            if let Some(bundle) = bundle {
                store.add_bundle(bundle);
            }
            let devices = devices.iter();
            devices.map(|one| add(&domains, &memory, one)).collect()
        });
        mapped.await.map_err(HostError::failed)?
    }

    /// Makes a device that may be, or is about to be, attached reachable in a domain.
    pub async fn map_component(
        &self,
        domain: &Domain,
        component: ComponentId,
        device: PlannedDevice,
    ) -> Result<DeviceRecord, HostError> {
        let opened = self.store.open_component(component).await;
        opened.map_err(HostError::failed)?;
        let (domains, domain) = (Arc::clone(&self.domains), domain.clone());
        let mapped = tokio::task::spawn_blocking(move || {
            let memory = domains.ensure(&domain)?;
            add(&domains, &memory, &device)
        });
        mapped.await.map_err(HostError::failed)?
    }
}

fn add(
    domains: &Domains,
    memory: &DomainMemory,
    device: &PlannedDevice,
) -> Result<DeviceRecord, HostError> {
    let PlannedDevice {
        image, image_bytes, ..
    } = *device;
    let (path, device_bytes) = domains.add_image(memory, image, image_bytes)?;
    Ok(DeviceRecord {
        image,
        image_bytes,
        device_bytes,
        path,
        component: device.label.clone(),
        members: device.members.clone(),
        memory: false,
    })
}
