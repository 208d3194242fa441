//! Mapping: a lock's images become files of the trust domain's mount, which VMMs map.
//!
//! Refuses to know VMs. Invariant: an image is reachable only after its component was
//! opened, so that one that vanished is told now and not as a stuck fault later, and as its
//! metadata describes it, whatever the lock says; it stays the same image for as long as
//! somebody has its device's record.

use std::collections::HashMap;
use std::sync::Arc;

use forelay_cache::Domain;
use forelay_image::bundle::Bundle;
use forelay_image::component::ImageRef;
use forelay_image::{ComponentId, Digest};
use forelay_store::{ImageHold, Store};

use crate::daemon::error::HostError;
use crate::daemon::memory::domains::Domains;
use crate::daemon::order::{DeviceRecord, Order, PlannedDevice, label};

/// Makes images reachable in shared memory.
pub struct Mapper {
    pub store: Store,
    pub domains: Arc<Domains>,
}

/// What is open of the images of devices.
type OpenImages = HashMap<Digest, (ImageRef, Vec<ImageHold>)>;

impl Mapper {
    /// Makes the images of an order's lock reachable in its domain.
    pub async fn map_images(&self, order: &Order) -> Result<Vec<DeviceRecord>, HostError> {
        let store = &self.store;
        let opening = order.lock.components.iter().map(|component| async move {
            let opened = store.hold_locked(component).await;
            let (map, hold) = opened.map_err(|error| {
                let cause = forelay_host::error_chain(&error);
                HostError::Failed(format!("component {}: {cause}", label(component)))
            })?;
            Ok::<_, HostError>((map.image.digest, (map.image, vec![hold])))
        });
        let kernel = async {
            let checked = store.locked_component(&order.lock.kernel).await;
            checked.map(drop).map_err(HostError::failed)
        };
        let opened = futures_util::future::try_join_all(opening);
        let (opened, ()) = futures_util::future::try_join(opened, kernel).await?;
        let mut held: OpenImages = opened.into_iter().collect();
        if let Some(bundle) = &order.bundle {
            let digest = bundle.digest();
            let added = store.add_bundle(bundle.clone());
            added.map_err(HostError::failed)?;
            let map = store.open_image(digest).await.map_err(HostError::failed)?;
            let members = bundle.members().iter();
            let holds = members.filter_map(|one| held.get(&one.image));
            let holds = holds.flat_map(|(_, holds)| holds.clone()).collect();
            held.insert(digest, (map.image, holds));
        }
        self.add(&order.domain, order.devices.clone(), held).await
    }

    /// Makes the components' devices of a VM that was launched once reachable again.
    pub async fn map_again(
        &self,
        order: &Order,
        devices: &[DeviceRecord],
    ) -> Result<Vec<DeviceRecord>, HostError> {
        let store = &self.store;
        let mut held = OpenImages::new();
        for component in &order.lock.components {
            let opened = store.hold_locked(component).await;
            let (map, hold) = opened.map_err(HostError::failed)?;
            held.insert(map.image.digest, (map.image, vec![hold]));
        }
        for device in devices {
            let Some(bundle) = Bundle::new(&device.members) else {
                continue;
            };
            let members = device.members.iter();
            let holds = members.filter_map(|(image, _)| held.get(image));
            let holds = holds.flat_map(|(_, holds)| holds.clone()).collect();
            store.add_bundle(bundle).map_err(HostError::failed)?;
            let map = store.open_image(device.image).await;
            let map = map.map_err(HostError::failed)?;
            held.insert(device.image, (map.image, holds));
        }
        let planned = devices.iter().map(|device| PlannedDevice {
            image: device.image,
            image_bytes: device.image_bytes,
            label: device.component.clone(),
            members: device.members.clone(),
        });
        self.add(&order.domain, planned.collect(), held).await
    }

    /// Makes a device that may be, or is about to be, attached reachable in a domain.
    pub async fn map_component(
        &self,
        domain: &Domain,
        component: ComponentId,
        device: PlannedDevice,
    ) -> Result<DeviceRecord, HostError> {
        let opened = self.store.hold_component(component).await;
        let (map, hold) = opened.map_err(HostError::failed)?;
        let image = map.image;
        if (image.digest, image.bytes) != (device.image, device.image_bytes) {
            return Err(HostError::Failed(format!(
                "{} is not the image that component {component} has",
                device.label
            )));
        }
        let held = HashMap::from([(image.digest, (image, vec![hold]))]);
        let mut mapped = self.add(domain, vec![device], held).await?;
        let lost = || HostError::Failed("its device was not mapped".to_owned());
        mapped.pop().ok_or_else(lost)
    }

    async fn add(
        &self,
        domain: &Domain,
        devices: Vec<PlannedDevice>,
        held: OpenImages,
    ) -> Result<Vec<DeviceRecord>, HostError> {
        let (domains, domain) = (Arc::clone(&self.domains), domain.clone());
        let mapped = tokio::task::spawn_blocking(move || {
            let memory = domains.ensure(&domain)?;
            let add = |device: PlannedDevice| {
                let Some((image, holds)) = held.get(&device.image) else {
                    let label = &device.label;
                    return Err(HostError::Failed(format!("{label} was not opened")));
                };
                let (path, device_bytes) = domains.add_image(&memory, image)?;
                Ok(DeviceRecord {
                    image: image.digest,
                    image_bytes: image.bytes,
                    device_bytes,
                    path,
                    component: device.label,
                    members: device.members,
                    memory: false,
                    holds: holds.clone(),
                })
            };
            devices.into_iter().map(add).collect()
        });
        mapped.await.map_err(HostError::failed)?
    }
}
