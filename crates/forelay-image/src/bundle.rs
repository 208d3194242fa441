//! Bundles: several small component images as one device, for VMs that would need more
//! pmem devices than their VMM offers.
//!
//! A bundle is its members' images one after the other, byte for byte; images are whole
//! blocks, so every member starts at a block. Nothing is copied or stored: a bundle's
//! chunks are its members' chunks. The guest recognises the device by the UUID at its
//! start, which is the first member's; that member's digest is the device slot's tag.
//!
//! Invariant: the identity depends on the members and their order alone.

use crate::Digest;
use crate::digest::Hasher;

/// Hashed before the members, so that no image can have a bundle's digest.
const DOMAIN: &[u8] = b"forelay bundle 1\n";

/// One image of a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Identity of the image.
    pub image: Digest,
    /// Where it starts in the bundle, in bytes.
    pub offset: u64,
    /// Its size in bytes.
    pub bytes: u64,
}

/// Several images as one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    members: Vec<Member>,
    digest: Digest,
    bytes: u64,
}

impl Bundle {
    /// The bundle of these images (identity and size) in this order; `None` of none.
    pub fn new(images: &[(Digest, u64)]) -> Option<Self> {
        images.first()?;
        let mut hasher = Hasher::new();
        hasher.update(DOMAIN);
        let (mut members, mut offset) = (Vec::with_capacity(images.len()), 0u64);
        for &(image, bytes) in images {
            hasher.update(image.as_bytes());
            members.push(Member {
                image,
                offset,
                bytes,
            });
            offset = offset.saturating_add(bytes);
        }
        Some(Self {
            members,
            digest: hasher.finish(),
            bytes: offset,
        })
    }

    /// Its identity, the key of shared memory.
    pub const fn digest(&self) -> Digest {
        self.digest
    }

    /// Its size in bytes.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What its device slot is tagged with: its first member.
    pub fn tag(&self) -> Digest {
        self.members[0].image
    }

    /// Its images in order.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Where an image starts, if it is a member.
    pub fn offset_of(&self, image: &Digest) -> Option<u64> {
        self.members
            .iter()
            .find(|member| member.image == *image)
            .map(|member| member.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identity_depends_on_members_and_order() {
        let (a, b) = ((Digest::of(b"a"), 4096), (Digest::of(b"b"), 8192));
        let ab = Bundle::new(&[a, b]).unwrap();
        let ba = Bundle::new(&[b, a]).unwrap();
        assert_ne!(ab.digest(), ba.digest());
        assert_eq!(
            (ab.bytes(), ab.tag(), ab.offset_of(&b.0)),
            (12288, a.0, Some(4096))
        );
        assert_eq!(Bundle::new(&[]), None);
    }
}
