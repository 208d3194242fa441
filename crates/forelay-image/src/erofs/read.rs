//! Reads component images and map images, from any source of bytes.
//!
//! Owns lookup, directories, file content, extended attributes and where a file's bytes
//! lie. Knows plain, inline and chunk-based inodes, device ids and unified addresses;
//! refuses compression. Refuses to trust a byte: every offset is checked before it is
//! used, memory is bounded by the size of what is asked for or of the image, and a
//! directory that contains itself is an error, not a loop.

use std::collections::BTreeSet;
use std::io;

use super::directory::BlockEntries;
use super::layout::{
    BLOCK_BYTES, DEVICE_SLOT_BYTES, DeviceSlot, FileType, INODE_BYTES, INODE_SLOT_BYTES,
    InodeRecord, LayoutError, SUPERBLOCK_BYTES, SUPERBLOCK_OFFSET, Superblock,
};
use super::xattr;
use crate::Digest;
use crate::tree::split_path;

mod extents;
mod mapping;
mod source;
mod tree;

pub use extents::{FileExtents, PlacedExtent};
pub use source::ReadAt;
pub use tree::{SharedSource, tree_over};

/// Longest path that a walk follows, in bytes: deeper trees are taken for an attack.
const PATH_BYTES_MAX: usize = 16 << 10;

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The source of bytes failed.
    #[error("cannot read the image at byte {offset}")]
    Io {
        /// Where.
        offset: u64,
        /// What the source said.
        source: io::Error,
    },
    /// Superblock or device table are bad.
    #[error("not an image that Forelay reads")]
    Superblock(#[source] LayoutError),
    /// An inode, or what belongs to it, is bad.
    #[error("inode {nid} is corrupt")]
    Inode {
        /// Inode number.
        nid: u64,
        /// What is wrong.
        source: LayoutError,
    },
    /// Bytes lie outside the image or device.
    #[error("inode {nid}: its data lies outside the image (byte {offset}, {bytes} bytes)")]
    OutOfBounds {
        /// Inode number.
        nid: u64,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        bytes: u64,
    },
    /// A directory is reachable twice.
    #[error("directory inode {nid} is reachable by two paths")]
    Loop {
        /// Inode number.
        nid: u64,
    },
    /// The operation does not fit the inode's type.
    #[error("inode {nid} is a {found:?}, not a {expected:?}")]
    WrongType {
        /// Inode number.
        nid: u64,
        /// What was needed.
        expected: FileType,
        /// What it is.
        found: FileType,
    },
    /// Content lies on a device that was not given.
    #[error("inode {nid}: its content is on component image {tag}, which was not opened")]
    DeviceMissing {
        /// Inode number.
        nid: u64,
        /// Tag of the device slot.
        tag: String,
    },
    /// A file is longer than the caller allows.
    #[error("inode {nid} has {bytes} bytes, more than the {limit} allowed here")]
    TooLong {
        /// Inode number.
        nid: u64,
        /// Its size in bytes.
        bytes: u64,
        /// The limit in bytes.
        limit: u64,
    },
}

/// An inode of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Inode number: its offset in 32-byte slots.
    pub nid: u64,
    /// Its fields.
    pub record: InodeRecord,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// File name.
    pub name: Vec<u8>,
    /// Inode number.
    pub nid: u64,
}

struct Device<'a> {
    slot: DeviceSlot,
    source: Option<&'a dyn ReadAt>,
}

/// An open image.
pub struct Image<'a> {
    source: &'a dyn ReadAt,
    bytes: u64,
    superblock: Superblock,
    devices: Vec<Device<'a>>,
}

impl<'a> Image<'a> {
    /// Opens a component image, or a map image of which only metadata and per-VM files
    /// are to be read.
    pub fn open(source: &'a dyn ReadAt) -> Result<Self, ReadError> {
        Self::open_multi(source, &[])
    }

    /// Opens a map image with the component images that `components` names by digest;
    /// content on others gives [`ReadError::DeviceMissing`].
    pub fn open_multi(
        source: &'a dyn ReadAt,
        components: &[(Digest, &'a dyn ReadAt)],
    ) -> Result<Self, ReadError> {
        let bytes = source
            .size()
            .map_err(|source| ReadError::Io { offset: 0, source })?;
        let mut head = [0; (SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES) as usize];
        let end = (bytes as usize).min(head.len());
        read_exact(source, &mut head[..end], 0)?;
        let superblock = Superblock::decode(&head[..end]).map_err(ReadError::Superblock)?;
        let mut image = Self {
            source,
            bytes,
            superblock,
            devices: Vec::new(),
        };
        image.read_devices(components)?;
        Ok(image)
    }

    fn read_devices(&mut self, components: &[(Digest, &'a dyn ReadAt)]) -> Result<(), ReadError> {
        let count = u64::from(self.superblock.extra_devices);
        let start = u64::from(self.superblock.device_table_slot) * DEVICE_SLOT_BYTES;
        if start + count * DEVICE_SLOT_BYTES > self.bytes {
            return Err(ReadError::Superblock(LayoutError::Truncated(
                "the device table",
            )));
        }
        let hex: Vec<_> = components
            .iter()
            .map(|(digest, source)| (digest.hex(), *source))
            .collect();
        for index in 0..count {
            let mut bytes = [0; DEVICE_SLOT_BYTES as usize];
            read_exact(self.source, &mut bytes, start + index * DEVICE_SLOT_BYTES)?;
            let slot = DeviceSlot::decode(&bytes);
            let source = hex
                .iter()
                .find(|(hex, _)| hex.as_bytes() == slot.tag)
                .map(|(_, source)| *source);
            self.devices.push(Device { slot, source });
        }
        Ok(())
    }

    /// The root directory.
    pub fn root(&self) -> Result<Inode, ReadError> {
        self.directory(self.superblock.root_nid.into())
    }

    fn directory(&self, nid: u64) -> Result<Inode, ReadError> {
        let inode = self.inode(nid)?;
        self.expect(&inode, FileType::Directory)?;
        Ok(inode)
    }

    fn expect(&self, inode: &Inode, expected: FileType) -> Result<(), ReadError> {
        let found = inode.record.file_type;
        if found != expected {
            let nid = inode.nid;
            return Err(ReadError::WrongType {
                nid,
                expected,
                found,
            });
        }
        Ok(())
    }

    fn inode_offset(&self, nid: u64) -> Result<u64, ReadError> {
        let base = u64::from(self.superblock.meta_block) * BLOCK_BYTES;
        nid.checked_mul(INODE_SLOT_BYTES)
            .and_then(|offset| offset.checked_add(base))
            .filter(|&offset| offset < self.bytes)
            .ok_or(ReadError::OutOfBounds {
                nid,
                offset: nid,
                bytes: INODE_BYTES,
            })
    }

    /// The inode with this number.
    pub fn inode(&self, nid: u64) -> Result<Inode, ReadError> {
        let offset = self.inode_offset(nid)?;
        let mut bytes = [0; INODE_BYTES as usize];
        let len = (self.bytes - offset).min(INODE_BYTES) as usize;
        read_exact(self.source, &mut bytes[..len], offset)?;
        let record = InodeRecord::decode(&bytes[..len], &self.superblock)
            .map_err(|source| ReadError::Inode { nid, source })?;
        Ok(Inode { nid, record })
    }

    /// Finds a path, without following symbolic links.
    pub fn lookup(&self, path: &[u8]) -> Result<Option<Inode>, ReadError> {
        let mut inode = self.root()?;
        for name in split_path(path) {
            match self.child(&inode, name)? {
                Some(child) => inode = child,
                None => return Ok(None),
            }
        }
        Ok(Some(inode))
    }

    /// The entry `name` of a directory; `None` for anything that is not a directory.
    fn child(&self, inode: &Inode, name: &[u8]) -> Result<Option<Inode>, ReadError> {
        if inode.record.file_type != FileType::Directory {
            return Ok(None);
        }
        let mut found = None;
        self.visit_dir(inode, |entry_name, nid| {
            if entry_name == name {
                found = Some(nid);
            }
        })?;
        found.map(|nid| self.inode(nid)).transpose()
    }

    /// The entries of a directory in name order, without `.` and `..`.
    pub fn read_dir(&self, inode: &Inode) -> Result<Vec<Entry>, ReadError> {
        let mut entries = Vec::new();
        self.visit_dir(inode, |name, nid| {
            if name != b"." && name != b".." {
                let name = name.to_vec();
                entries.push(Entry { name, nid });
            }
        })?;
        Ok(entries)
    }

    fn visit_dir(&self, inode: &Inode, mut visit: impl FnMut(&[u8], u64)) -> Result<(), ReadError> {
        self.expect(inode, FileType::Directory)?;
        let nid = inode.nid;
        let size = inode.record.size;
        if size > self.bytes {
            return Err(ReadError::OutOfBounds {
                nid,
                offset: 0,
                bytes: size,
            });
        }
        let mut last_name = Vec::new();
        let mut buffer = [0; BLOCK_BYTES as usize];
        let mut offset = 0;
        while offset < size {
            let len = (size - offset).min(BLOCK_BYTES) as usize;
            let block = &mut buffer[..len];
            self.read_data(inode, offset, block)?;
            let corrupt = |source| ReadError::Inode { nid, source };
            for entry in BlockEntries::new(block).map_err(corrupt)? {
                let entry = entry.map_err(corrupt)?;
                if entry.name <= last_name.as_slice() {
                    let what = "order of directory entries";
                    return Err(corrupt(LayoutError::corrupt(what, offset)));
                }
                last_name.clear();
                last_name.extend_from_slice(entry.name);
                visit(entry.name, entry.nid);
            }
            offset += len as u64;
        }
        Ok(())
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, inode: &Inode) -> Result<Vec<u8>, ReadError> {
        self.expect(inode, FileType::Symlink)?;
        self.read_limited(inode, BLOCK_BYTES)
    }

    /// Reads a regular file from `offset`; returns how many bytes, 0 at its end.
    pub fn read_file(
        &self,
        inode: &Inode,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<usize, ReadError> {
        self.expect(inode, FileType::File)?;
        let left = inode.record.size.saturating_sub(offset);
        let len = (buffer.len() as u64).min(left) as usize;
        self.read_data(inode, offset, &mut buffer[..len])?;
        Ok(len)
    }

    /// A whole regular file of at most `limit_bytes`.
    pub fn read_whole(&self, inode: &Inode, limit_bytes: u64) -> Result<Vec<u8>, ReadError> {
        self.expect(inode, FileType::File)?;
        self.read_limited(inode, limit_bytes)
    }

    fn read_limited(&self, inode: &Inode, limit: u64) -> Result<Vec<u8>, ReadError> {
        let (nid, bytes) = (inode.nid, inode.record.size);
        if bytes > limit {
            return Err(ReadError::TooLong { nid, bytes, limit });
        }
        // Check the place before memory is taken: a hostile size must not cost any.
        self.extents_of(inode)?;
        let mut out = vec![0; bytes as usize];
        self.read_data(inode, 0, &mut out)?;
        Ok(out)
    }

    /// Extended attributes by full name.
    pub fn xattrs(
        &self,
        inode: &Inode,
    ) -> Result<std::collections::BTreeMap<Vec<u8>, Vec<u8>>, ReadError> {
        let nid = inode.nid;
        let offset = self.inode_offset(nid)? + inode.record.header_bytes;
        let bytes = inode.record.xattr_bytes;
        if offset + bytes > self.bytes {
            return Err(ReadError::OutOfBounds { nid, offset, bytes });
        }
        let mut area = vec![0; bytes as usize];
        read_exact(self.source, &mut area, offset)?;
        xattr::decode(&area).map_err(|source| ReadError::Inode { nid, source })
    }

    /// Visits every path depth-first in name order, the root first as an empty path.
    pub fn walk<E: From<ReadError>>(
        &self,
        mut visit: impl FnMut(&[u8], &Inode) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut seen = BTreeSet::new();
        let mut directory_bytes = 0u64;
        let mut path = Vec::new();
        let mut stack = vec![(0, Vec::new(), u64::from(self.superblock.root_nid))];
        while let Some((parent_len, name, nid)) = stack.pop() {
            path.truncate(parent_len);
            if !name.is_empty() {
                path.push(b'/');
                path.extend_from_slice(&name);
            }
            let inode = self.inode(nid)?;
            visit(&path, &inode)?;
            if inode.record.file_type != FileType::Directory {
                continue;
            }
            if !seen.insert(nid) {
                return Err(ReadError::Loop { nid }.into());
            }
            directory_bytes = directory_bytes.saturating_add(inode.record.size);
            if directory_bytes > self.bytes || path.len() > PATH_BYTES_MAX {
                let source = LayoutError::corrupt("directories overlap or nest without end", nid);
                return Err(ReadError::Inode { nid, source }.into());
            }
            let entries = self.read_dir(&inode)?.into_iter().rev();
            stack.extend(entries.map(|entry| (path.len(), entry.name, entry.nid)));
        }
        Ok(())
    }
}

fn read_exact(
    source: &dyn ReadAt,
    mut buffer: &mut [u8],
    mut offset: u64,
) -> Result<(), ReadError> {
    while !buffer.is_empty() {
        let failed = |source| ReadError::Io { offset, source };
        match source.read_at(buffer, offset) {
            Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
            Ok(len) => {
                let len = len.min(buffer.len());
                buffer = &mut buffer[len..];
                offset += len as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(())
}
