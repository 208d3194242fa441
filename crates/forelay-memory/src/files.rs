//! The files of a mount: one per image, flat, named by digest.
//!
//! Invariant: a file's node id follows from its key, so that every later daemon derives
//! the same. (Of two digests with equal leading 63 bits, which nobody will see, the second
//! one added gets another.)

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use forelay_image::digest::Digest;
use forelay_image::extent::{Extent, PAGE_BYTES, PMEM_ALIGN_BYTES};
use forelay_image::pages::PageSet;
use parking_lot::Mutex;

use crate::fuse::abi;
use crate::mapping::FileMapping;

/// Which file: the digest of the image it holds.
pub type FileKey = Digest;

/// Sizes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSpec {
    /// Bytes of the image; what follows is zeros.
    pub image_bytes: u64,
    /// Size of the file, a multiple of 2 MiB: see [`FileSpec::padded`].
    pub device_bytes: u64,
}

impl FileSpec {
    /// The spec of an image padded to the next size a pmem device may have.
    pub fn padded(image_bytes: u64) -> Self {
        Self {
            image_bytes,
            device_bytes: image_bytes.max(1).next_multiple_of(PMEM_ALIGN_BYTES),
        }
    }

    fn is_sound(&self) -> bool {
        self.device_bytes > 0
            && self.device_bytes.is_multiple_of(PMEM_ALIGN_BYTES)
            && self.device_bytes <= i64::MAX as u64
            && self.image_bytes <= self.device_bytes
    }
}

/// Why a file could not be added.
#[derive(Debug, thiserror::Error)]
pub enum AddFileError {
    /// Sizes that no device can have.
    #[error(
        "{key}: {spec:?} is not a size of a pmem device (a multiple of 2 MiB, not less than the image)"
    )]
    Size {
        /// The file.
        key: FileKey,
        /// Its sizes.
        spec: FileSpec,
    },
    /// The file is there with other sizes.
    #[error("{key} is there already with other sizes: {spec:?}")]
    Differs {
        /// The file.
        key: FileKey,
        /// The sizes it has.
        spec: FileSpec,
    },
    /// Each node id that can be derived from the digest is another file's.
    #[error("{0}: no free node id")]
    NoNodeId(FileKey),
    /// The file cannot be opened through the mount.
    #[error("{key} cannot be opened through the mount")]
    Open {
        /// The file.
        key: FileKey,
        /// Why.
        source: std::io::Error,
    },
}

/// A file of the mount.
#[derive(Debug)]
pub(crate) struct SharedFile {
    pub key: FileKey,
    /// Its node id, also its inode number in the mount.
    pub node: u64,
    pub spec: FileSpec,
    /// What was pushed and not evicted since.
    pub pushed: Mutex<PageSet>,
    /// What of it was seen touched.
    pub used: Mutex<PageSet>,
    /// No less than what the pinner has locked.
    pub pinned: Mutex<PageSet>,
    /// Whether the pinner knows the file.
    pub pinner_knows: AtomicBool,
    /// Keeps the inode, and with it the pages, and answers residency.
    pub mapping: Mutex<Option<Arc<FileMapping>>>,
}

impl SharedFile {
    /// `extent` in whole pages inside the device.
    pub fn clip(&self, extent: Extent) -> Option<Extent> {
        extent
            .page_aligned()
            .intersection(&Extent::new(0, self.spec.device_bytes))
    }

    /// Bytes up to which an image has content, in whole pages.
    pub fn content_bytes(&self) -> u64 {
        self.spec.image_bytes.next_multiple_of(PAGE_BYTES)
    }
}

/// File name of `key` in the mount.
pub fn file_name(key: &FileKey) -> String {
    format!("{}.img", key.hex())
}

pub(crate) fn key_of(name: &[u8]) -> Option<FileKey> {
    let hex = std::str::from_utf8(name).ok()?.strip_suffix(".img")?;
    // Only the canonical spelling: one name for one node.
    let canonical = hex.len() == 64 && !hex.bytes().any(|byte| byte.is_ascii_uppercase());
    canonical.then(|| hex.parse().ok()).flatten()
}

/// The directory.
#[derive(Debug, Default)]
pub(crate) struct Files {
    by_node: BTreeMap<u64, Arc<SharedFile>>,
    by_key: HashMap<FileKey, Arc<SharedFile>>,
}

/// Node ids below this are the root, `.` and `..`.
const FIRST_NODE: u64 = 16;

/// The node ids a key may have, best first: the four 63-bit words of its digest.
fn candidates(key: &FileKey) -> impl Iterator<Item = u64> + '_ {
    key.as_bytes()
        .chunks_exact(8)
        .filter_map(|word| Some(u64::from_be_bytes(word.try_into().ok()?) & !(1 << 63)))
        .filter(|&node| node >= FIRST_NODE)
}

impl Files {
    /// Adds a file, or finds it if it is there with the same sizes.
    pub fn add(&mut self, key: FileKey, spec: FileSpec) -> Result<Arc<SharedFile>, AddFileError> {
        if !spec.is_sound() {
            return Err(AddFileError::Size { key, spec });
        }
        if let Some(file) = self.by_key.get(&key) {
            if file.spec != spec {
                return Err(AddFileError::Differs {
                    key,
                    spec: file.spec,
                });
            }
            return Ok(Arc::clone(file));
        }
        let free = |node: &u64| *node >= FIRST_NODE && !self.by_node.contains_key(node);
        let node = candidates(&key).find(free);
        let node = node.ok_or(AddFileError::NoNodeId(key))?;
        let file = Arc::new(SharedFile {
            key,
            node,
            spec,
            pushed: Mutex::default(),
            used: Mutex::default(),
            pinned: Mutex::default(),
            pinner_knows: AtomicBool::new(false),
            mapping: Mutex::default(),
        });
        self.by_node.insert(node, Arc::clone(&file));
        self.by_key.insert(key, Arc::clone(&file));
        Ok(file)
    }

    pub fn remove(&mut self, key: &FileKey) -> Option<Arc<SharedFile>> {
        let file = self.by_key.remove(key)?;
        self.by_node.remove(&file.node);
        Some(file)
    }

    pub fn by_key(&self, key: &FileKey) -> Option<&Arc<SharedFile>> {
        self.by_key.get(key)
    }

    pub fn by_node(&self, node: u64) -> Option<&Arc<SharedFile>> {
        self.by_node.get(&node)
    }

    /// What a LOOKUP of `name` in the root finds; `Err` if no file can have that name.
    pub fn by_name(&self, name: &[u8]) -> Result<Option<&Arc<SharedFile>>, NoSuchName> {
        let key = key_of(name).ok_or(NoSuchName)?;
        Ok(self.by_key.get(&key))
    }

    pub fn len(&self) -> usize {
        self.by_node.len()
    }

    /// All files, by node id.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<SharedFile>> {
        self.by_node.values()
    }

    /// A READDIR reply of at most `limit` bytes that goes on behind `cookie`. The node id
    /// is the cookie, so entries that come and go meanwhile repeat or hide no others.
    pub fn read_dir(&self, cookie: u64, limit: usize) -> Vec<u8> {
        const DIRECTORY: u32 = 4;
        const REGULAR: u32 = 8;
        let mut out = Vec::new();
        let dots = [(1, &b"."[..]), (2, &b".."[..])];
        for (own_cookie, name) in dots.into_iter().filter(|(own, _)| *own > cookie) {
            let entry = (abi::ROOT_NODE, own_cookie, DIRECTORY, name);
            if !abi::push_dirent(&mut out, limit, entry) {
                return out;
            }
        }
        let behind = cookie.saturating_add(1).max(FIRST_NODE);
        for (&node, file) in self.by_node.range(behind..) {
            let name = file_name(&file.key);
            if !abi::push_dirent(&mut out, limit, (node, node, REGULAR, name.as_bytes())) {
                break;
            }
        }
        out
    }
}

/// A name that no file of the mount can have.
#[derive(Debug)]
pub(crate) struct NoSuchName;

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> FileSpec {
        FileSpec::padded(5000)
    }

    #[test]
    fn node_ids_follow_from_the_digest_and_survive_collisions() {
        let mut files = Files::default();
        let mut bytes = *Digest::of(b"one").as_bytes();
        let first = files.add(Digest::from_bytes(bytes), spec()).unwrap();
        bytes[31] ^= 1;
        let second = files.add(Digest::from_bytes(bytes), spec()).unwrap();
        assert_ne!(first.node, second.node);
        assert_eq!(first.node >> 63, 0);

        let mut later = Files::default();
        bytes[31] ^= 1;
        let same = later.add(Digest::from_bytes(bytes), spec()).unwrap();
        assert_eq!(same.node, first.node);
    }

    #[test]
    fn unsound_sizes_and_changed_sizes_are_refused() {
        let mut files = Files::default();
        let key = Digest::of(b"x");
        let unpadded = FileSpec {
            image_bytes: 1,
            device_bytes: 4096,
        };
        assert!(matches!(
            files.add(key, unpadded),
            Err(AddFileError::Size { .. })
        ));
        files.add(key, spec()).unwrap();
        assert!(files.add(key, spec()).is_ok());
        assert!(matches!(
            files.add(key, FileSpec::padded(3 << 20)),
            Err(AddFileError::Differs { .. })
        ));
    }

    #[test]
    fn a_directory_is_listed_completely_in_small_pieces() {
        let mut files = Files::default();
        for n in 0..50u32 {
            files.add(Digest::of(&n.to_le_bytes()), spec()).unwrap();
        }
        let (mut cookie, mut names) = (0, 0);
        loop {
            let piece = files.read_dir(cookie, 300);
            if piece.is_empty() {
                break;
            }
            let mut at = 0;
            while at < piece.len() {
                cookie = u64::from_ne_bytes(piece[at + 8..at + 16].try_into().unwrap());
                let len = u32::from_ne_bytes(piece[at + 16..at + 20].try_into().unwrap());
                at += (24 + len as usize).next_multiple_of(8);
                names += 1;
            }
        }
        assert_eq!(names, 52);
    }

    #[test]
    fn only_canonical_names_are_names() {
        let name = file_name(&Digest::of(b"x"));
        assert!(key_of(name.as_bytes()).is_some());
        assert!(key_of(name.to_uppercase().as_bytes()).is_none());
        assert!(key_of(b"..").is_none());
        assert!(key_of(&[0xff; 68]).is_none());
    }
}
