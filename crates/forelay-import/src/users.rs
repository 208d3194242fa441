//! The users that builds run as: a range of the host's user ids, which are nobody's there and
//! 0 to 65535 within a build.
//!
//! Owns the translation between the two: owners, access lists and file capabilities (whose
//! third form has a root user; see capabilities(7) and acl(5)) are shifted when a base is
//! unpacked for builds and shifted back when what a build made is read. So any file system
//! with owners serves, whatever the kernel's version, and a base's set-uid programs are root's
//! nowhere on the host.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use forelay_image::tree::{Attributes, Tree};

use crate::dir::{Ownership, read_directory};
use crate::error::{ImportError, archive_error};

/// First of the range, unless the operator says otherwise: behind the VMMs' range.
pub const DEFAULT_FIRST_USER: u32 = 2_100_200_000;

const CAPABILITIES: &[u8] = b"security.capability";
const ACCESS_LISTS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];
/// `VFS_CAP_REVISION_2` and `_3` of `linux/capability.h`, in the highest byte, and the bytes
/// of both.
const REVISION_2: (u8, usize) = (2, 20);
const REVISION_3: (u8, usize) = (3, 24);
/// Entries of an access list that name a user or a group.
const NAMING_TAGS: [u16; 2] = [0x02, 0x08];

/// A range of user and group ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserRange {
    first: u32,
}

impl UserRange {
    /// How many ids a build has.
    pub const COUNT: u32 = 1 << 16;

    /// The range that begins with `first` (0: the host's own ids).
    pub fn new(first: u32) -> Self {
        Self { first }
    }

    /// What a build's root is on the host.
    pub fn first(self) -> u32 {
        self.first
    }

    /// A build's id as the host's.
    pub(crate) fn outward(self, id: u32) -> Option<u32> {
        (id < Self::COUNT).then(|| self.first.checked_add(id))?
    }

    /// One of the host's ids as a build's.
    pub(crate) fn inward(self, id: u32) -> Option<u32> {
        id.checked_sub(self.first).filter(|id| *id < Self::COUNT)
    }

    /// The value of an extended attribute for the host; `None` if it names an id beyond.
    pub(crate) fn xattr_outward(self, name: &[u8], value: &[u8]) -> Option<Vec<u8>> {
        if name == CAPABILITIES && is_revision(value, REVISION_2) {
            if self.first == 0 {
                return Some(value.to_vec());
            }
            let mut value = [value, &self.first.to_le_bytes()].concat();
            value[3] = REVISION_3.0;
            return Some(value);
        }
        shift(name, value, |id| self.outward(id)).map(Cow::into_owned)
    }

    /// The value of one of the host's extended attributes as a build's.
    pub(crate) fn xattr_inward(self, name: &[u8], value: &[u8]) -> Option<Vec<u8>> {
        if name == CAPABILITIES
            && is_revision(value, REVISION_3)
            && value[20..] == self.first.to_le_bytes()
        {
            let mut value = value[..REVISION_2.1].to_vec();
            value[3] = REVISION_2.0;
            return Some(value);
        }
        shift(name, value, |id| self.inward(id)).map(Cow::into_owned)
    }

    /// All extended attributes as a build's.
    pub(crate) fn xattrs_inward(
        self,
        xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    ) -> Option<BTreeMap<Vec<u8>, Vec<u8>>> {
        let translated = xattrs.into_iter().map(|(name, value)| {
            let value = self.xattr_inward(&name, &value)?;
            Some((name, value))
        });
        translated.collect()
    }

    /// Reads a directory that a build wrote.
    pub(crate) fn read(self, root: &Path) -> Result<Tree, ImportError> {
        let mut tree = read_directory(root, Ownership::Keep)?.tree;
        for id in tree.reachable() {
            let whiteout = tree.node(id).kind.is_whiteout();
            let attributes = &mut tree.node_mut(id).attributes;
            // The kernel makes them, whose owner means nothing.
            if whiteout {
                (attributes.uid, attributes.gid) = (0, 0);
                continue;
            }
            let owner = (attributes.uid, attributes.gid);
            if self.translate(attributes).is_none() {
                let (uid, gid) = owner;
                let problem = format!("holds a file of user {uid}, group {gid}: not a build's");
                return Err(archive_error(root, problem));
            }
        }
        Ok(tree)
    }

    fn translate(self, attributes: &mut Attributes) -> Option<()> {
        attributes.uid = self.inward(attributes.uid)?;
        attributes.gid = self.inward(attributes.gid)?;
        attributes.xattrs = self.xattrs_inward(std::mem::take(&mut attributes.xattrs))?;
        Some(())
    }
}

fn is_revision(value: &[u8], (revision, bytes): (u8, usize)) -> bool {
    value.len() == bytes && value[3] == revision
}

/// Passes the ids that a value names through `to`.
fn shift<'a>(
    name: &[u8],
    value: &'a [u8],
    to: impl Fn(u32) -> Option<u32>,
) -> Option<Cow<'a, [u8]>> {
    let at: Vec<usize> = if name == CAPABILITIES && is_revision(value, REVISION_3) {
        vec![REVISION_2.1]
    } else if ACCESS_LISTS.contains(&name) {
        // A header of four bytes, then entries of tag (2), rights (2) and id (4).
        let entries = (4..value.len().saturating_sub(7)).step_by(8);
        let names = |at: &usize| {
            let tag = u16::from_le_bytes([value[*at], value[at + 1]]);
            NAMING_TAGS.contains(&tag)
        };
        entries.filter(names).map(|at| at + 4).collect()
    } else {
        Vec::new()
    };
    let mut shifted = Cow::Borrowed(value);
    for at in at {
        let id = <[u8; 4]>::try_from(&value[at..at + 4]).ok()?;
        let id = to(u32::from_le_bytes(id))?.to_le_bytes();
        shifted.to_mut()[at..at + 4].copy_from_slice(&id);
    }
    Some(shifted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_names_users_is_shifted_and_shifted_back() {
        let users = UserRange::new(100_000);
        assert_eq!(users.outward(33), Some(100_033));
        assert_eq!(users.outward(65_536), None);
        assert_eq!(users.inward(0), None);
        assert_eq!(users.inward(165_535), Some(65_535));
        assert_eq!(users.inward(165_536), None);
        let capability = [&[1, 0, 0, 2][..], &[7; 16]].concat();
        let list = [
            &2u32.to_le_bytes()[..],
            &[1, 0, 7, 0, 0xff, 0xff, 0xff, 0xff],
            &[2, 0, 7, 0, 33, 0, 0, 0],
            &[8, 0, 7, 0, 34, 0, 0, 0],
            &[0x20, 0, 7, 0, 0xff, 0xff, 0xff, 0xff],
        ]
        .concat();
        let cases = [
            (CAPABILITIES, capability),
            (ACCESS_LISTS[0], list.clone()),
            (&b"user.x"[..], vec![2, 0, 7, 0, 33, 0, 0, 0]),
        ];
        for (name, value) in cases {
            let there = users.xattr_outward(name, &value).unwrap();
            assert_eq!(there == value, name == b"user.x");
            assert_eq!(users.xattr_inward(name, &there).unwrap(), value);
            let host = UserRange::new(0);
            assert_eq!(host.xattr_outward(name, &value).unwrap(), value);
        }
        // The host's own users are no build's; and what is cut short is no panic.
        assert!(users.xattr_inward(ACCESS_LISTS[0], &list).is_none());
        for length in 0..list.len() {
            users.xattr_outward(ACCESS_LISTS[0], &list[..length]);
            users.xattr_inward(CAPABILITIES, &list[..length.min(24)]);
        }
    }
}
