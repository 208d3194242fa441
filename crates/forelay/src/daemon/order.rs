//! What a launch asks for, understood: manifest, lock, trust domain and the devices that a VM
//! of it gets.
//!
//! Every folder may know it; it refuses to know them. Invariant: an order's devices hold
//! every component of its lock, each image once, in at most as many slots as the VMM has.

use std::path::PathBuf;

use forelay_cache::{DeviceImage, Domain};
use forelay_image::bundle::Bundle;
use forelay_image::lock::{Lock, LockedComponent};
use forelay_image::manifest::Manifest;
use forelay_image::{Digest, NameOf};
use forelay_store::ImageHold;
use forelay_vm::PmemDevice;
use serde::{Deserialize, Serialize};

use crate::api::VmComponent;
use crate::daemon::error::HostError;
use crate::history::ProfileRef;

/// Owner of manifests that name none.
const DEFAULT_OWNER: &str = "default";

/// A request, understood.
#[derive(Clone, Debug)]
pub struct Order {
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
#[derive(Clone, Debug)]
pub struct PlannedDevice {
    pub image: Digest,
    pub image_bytes: u64,
    pub label: String,
    /// Images and sizes of the bundle's members, in order.
    pub members: Vec<(Digest, u64)>,
}

/// Whose VM a manifest asks for.
pub fn owner_of(manifest: &Manifest) -> String {
    let owner = manifest.owner.as_deref();
    owner.unwrap_or(DEFAULT_OWNER).to_owned()
}

impl Order {
    /// What a manifest and its lock ask for, on a VMM with so many pmem slots.
    pub fn new(
        manifest: Manifest,
        lock: Lock,
        solve_s: f64,
        pmem_slots: usize,
    ) -> Result<Self, HostError> {
        let owner = owner_of(&manifest);
        // A lock or a record may hold a manifest that an earlier version accepted.
        NameOf::Owner.check(&owner).map_err(HostError::invalid)?;
        let domain = Domain::from(owner.as_str());
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

    /// Memory of its VM.
    pub fn memory_mib(&self) -> u32 {
        u32::try_from(self.manifest.vm.memory_mib).unwrap_or(u32::MAX)
    }

    /// An order from what was kept; `None` if it does not parse any more.
    pub fn remembered(manifest: &str, lock: &str, pmem_slots: usize) -> Option<Self> {
        let manifest = Manifest::parse(manifest).ok()?;
        Self::new(manifest, Lock::parse(lock).ok()?, 0.0, pmem_slots).ok()
    }

    /// The images of its devices.
    pub fn images(&self) -> Vec<Digest> {
        self.devices.iter().map(|device| device.image).collect()
    }

    /// Its devices as the planner names them.
    pub fn device_images(&self) -> Vec<DeviceImage> {
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

/// One pmem device, or the VM's memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Image, the key of shared memory.
    pub image: Digest,
    /// Size of the image.
    pub image_bytes: u64,
    /// Size of the device.
    pub device_bytes: u64,
    /// Host path that the VMM maps.
    pub path: PathBuf,
    /// Component name and version, or `map image`.
    pub component: String,
    /// Images and sizes of a bundle's members, in order; empty for a plain image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<(Digest, u64)>,
    /// No device: a snapshot's memory, from which the VM's own is copied on write.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub memory: bool,
    /// Has its images stay what they are for as long as somebody has this.
    #[serde(skip)]
    pub holds: Vec<ImageHold>,
}

impl DeviceRecord {
    /// The device as the VMM knows it.
    pub fn pmem(&self) -> PmemDevice {
        PmemDevice {
            id: format!("c{}", &self.image.hex()[..24]),
            path: self.path.clone(),
            bytes: self.device_bytes,
        }
    }
}

pub fn label(component: &LockedComponent) -> String {
    format!("{} {}", component.name, component.version)
}

pub fn vm_component(component: &LockedComponent) -> VmComponent {
    VmComponent {
        name: component.name.clone(),
        version: component.version.clone(),
        id: component.id,
        image: component.image,
        image_bytes: component.image_bytes,
        attached: false,
        attach: None,
        left_out: Vec::new(),
    }
}

#[cfg(test)]
pub mod tests {
    use forelay_image::component::Role;

    use super::*;

    /// The order of a manifest of this profile, with a base image of this name.
    pub fn order(profile: &str, further: &str, image: &str) -> Order {
        let text = format!("base = \"debian\"\nprofile = \"{profile}\"\n{further}");
        let manifest = Manifest::parse(&text).unwrap();
        let locked = |name: &str, role| LockedComponent {
            name: name.into(),
            version: "1".into(),
            role,
            id: Digest::of(name.as_bytes()),
            image: Digest::of(name.as_bytes()),
            image_bytes: 4096,
            metadata_bytes: 4096,
        };
        let lock = Lock {
            format: 1,
            manifest_digest: manifest.digest(),
            kernel: locked("kernel", Role::Kernel),
            components: vec![locked(image, Role::Base)],
        };
        Order::new(manifest, lock, 0.0, 8).unwrap()
    }

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
}
