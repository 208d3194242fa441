//! Snapshots as components: what a VM's memory was kept from, and what lies where in the image.
//!
//! ```text
//! image: memory of the VM | state of its devices | zeros up to the alignment of devices
//! ```
//! Invariant: a [`SnapshotOf`] that [`SnapshotOf::check`] accepts has both parts within its image.

use forelay_guest_protocol::snapshot::Tier;
use serde::{Deserialize, Serialize};

use crate::component::ImageRef;
use crate::extent::PMEM_ALIGN_BYTES;
use crate::{Digest, Extent};

/// Longest state of devices, memory aside.
const MAX_STATE_BYTES: u64 = 16 << 20;

/// All that must be the same in a launch that resumes from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOrigin {
    /// How far the VM had come.
    pub tier: Tier,
    /// Component of the kernel, which has the guest's agent.
    pub kernel: Digest,
    /// Components of the lock; none in tier `kernel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub components: Option<Digest>,
    /// The manifest as far as the machine shows it; none in tier `kernel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest: Option<Digest>,
    /// Memory of the VM.
    pub memory_mib: u32,
    /// Its CPUs.
    pub cpus: u32,
    /// What its VMs run under.
    pub accelerator: String,
    /// Machine and CPU model.
    pub machine: String,
    /// The VMM and its version.
    pub vmm: String,
    /// The VM that was saved while it ran, and which time that was: no launch resumes from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
}

impl SnapshotOrigin {
    /// What tells it from every other.
    pub fn key(&self) -> Digest {
        Digest::of(&serde_json::to_vec(self).expect("an origin always serialises"))
    }
}

/// What a component of role `snapshot` holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOf {
    /// What it was made from.
    pub origin: SnapshotOrigin,
    /// Bytes of memory, from the image's start.
    pub ram_bytes: u64,
    /// Bytes of device state after that.
    pub state_bytes: u64,
    /// The map image; none in tier `kernel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub map: Option<Digest>,
    /// Images and sizes of the VM's pmem devices in order, the map image first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<(Digest, u64)>,
}

impl SnapshotOf {
    /// Size of the image.
    pub fn image_bytes(&self) -> u64 {
        (self.ram_bytes + self.state_bytes).next_multiple_of(PMEM_ALIGN_BYTES)
    }

    /// Where the state of the devices is.
    pub fn state(&self) -> Extent {
        Extent::new(self.ram_bytes, self.state_bytes)
    }

    /// Checks it against its image and its own origin; the error says what is wrong.
    pub fn check(&self, image: &ImageRef) -> Result<(), &'static str> {
        if self.ram_bytes != u64::from(self.origin.memory_mib) << 20 {
            return Err("its memory has another size than its VM's");
        }
        if self.state_bytes == 0 || self.state_bytes > MAX_STATE_BYTES {
            return Err("its device state has no possible size");
        }
        match self.image_bytes() == image.bytes {
            true => Ok(()),
            false => Err("its image has another size than its parts"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_do_not_fit_are_refused_and_everything_is_in_the_key() {
        let origin = SnapshotOrigin {
            tier: Tier::Kernel,
            kernel: Digest::of(b"kernel"),
            components: None,
            manifest: None,
            memory_mib: 64,
            cpus: 1,
            accelerator: "tcg".into(),
            machine: "q35".into(),
            vmm: "7.2".into(),
            vm: None,
        };
        let of = SnapshotOf {
            origin: origin.clone(),
            ram_bytes: 64 << 20,
            state_bytes: 1000,
            map: None,
            devices: Vec::new(),
        };
        let image = ImageRef {
            digest: Digest::of(b"image"),
            bytes: 66 << 20,
            metadata_bytes: 0,
            inodes: 0,
            chunk_index: Digest::of(b"index"),
        };
        assert_eq!(of.check(&image), Ok(()));
        type Spoil = fn(&mut SnapshotOf, &mut ImageRef);
        let spoils: [Spoil; 5] = [
            |of, _| of.ram_bytes += 4096,
            |of, _| of.state_bytes = 0,
            |of, _| of.state_bytes = 3 << 20,
            |of, _| of.state_bytes = u64::MAX,
            |_, image| image.bytes -= 2 << 20,
        ];
        for spoil in spoils {
            let (mut of, mut image) = (of.clone(), image);
            spoil(&mut of, &mut image);
            assert!(of.check(&image).is_err(), "{of:?}");
        }
        let changes: [fn(&mut SnapshotOrigin); 10] = [
            |one| one.tier = Tier::Composed,
            |one| one.kernel = Digest::of(b"other"),
            |one| one.components = Some(Digest::of(b"lock")),
            |one| one.manifest = Some(Digest::of(b"manifest")),
            |one| one.memory_mib += 1,
            |one| one.cpus += 1,
            |one| one.accelerator = "kvm".into(),
            |one| one.machine = "pc".into(),
            |one| one.vmm = "8.2".into(),
            |one| one.vm = Some("web".into()),
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let mut other = origin.clone();
            change(&mut other);
            assert_ne!(other.key(), origin.key(), "{index}");
        }
    }
}
