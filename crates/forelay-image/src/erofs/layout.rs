//! On-disk structures: superblock, device slots, inodes, chunk indexes.
//!
//! Owns field offsets and encodings, nothing about where structures lie. All integers
//! are little-endian; encoding and decoding is by hand, without unsafe code.

use crate::tree::Kind;

/// Bytes of a block.
pub const BLOCK_BYTES: u64 = 4096;
/// log2 of [`BLOCK_BYTES`].
pub const BLOCK_BITS: u8 = 12;
/// Where the superblock starts.
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// Bytes of the superblock.
pub const SUPERBLOCK_BYTES: u64 = 128;
/// Where the 16-byte UUID lies in the image; zeroed while the identity is hashed.
pub const UUID_OFFSET: u64 = SUPERBLOCK_OFFSET + 48;
/// Bytes of a device slot.
pub const DEVICE_SLOT_BYTES: u64 = 128;
/// Bytes of an inode slot: inode numbers count these.
pub const INODE_SLOT_BYTES: u64 = 32;
/// Bytes of an extended inode.
pub const INODE_BYTES: u64 = 64;
/// Bytes of a directory entry without its name.
pub const DIRENT_BYTES: usize = 12;
/// Longest file name in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// Largest regular file in bytes (32-bit block addresses).
pub const FILE_BYTES_MAX: u64 = BLOCK_BYTES * u32::MAX as u64;

const MAGIC: u32 = 0xE0F5_E1E2;

/// Compatible feature: inode times are modification times.
pub const FEATURE_COMPAT_MTIME: u32 = 0x2;
/// Incompatible feature: chunk-based files.
pub const FEATURE_INCOMPAT_CHUNKED_FILE: u32 = 0x4;
/// Incompatible feature: a device table.
pub const FEATURE_INCOMPAT_DEVICE_TABLE: u32 = 0x8;

/// Bytes that are not a structure of the format, or one that Forelay does not know.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// Not an EROFS image.
    #[error("no EROFS superblock (magic {0:#010x})")]
    Magic(u32),
    /// A feature that Forelay does not read.
    #[error("unsupported EROFS feature: {what} ({value:#x})")]
    Unsupported {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A field with an impossible value.
    #[error("corrupt EROFS metadata: {what} ({value:#x})")]
    Corrupt {
        /// What is wrong.
        what: &'static str,
        /// The value found.
        value: u64,
    },
    /// A structure ends beyond the bytes given.
    #[error("EROFS metadata is cut off in {0}")]
    Truncated(&'static str),
}

impl LayoutError {
    pub(crate) const fn corrupt(what: &'static str, value: u64) -> Self {
        Self::Corrupt { what, value }
    }
}

#[inline]
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

#[inline]
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

#[inline]
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

#[inline]
fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The superblock, as far as Forelay uses it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Superblock {
    /// Incompatible features.
    pub feature_incompat: u32,
    /// Inode number of the root directory.
    pub root_nid: u16,
    /// Number of inodes.
    pub inodes: u64,
    /// Time of compact inodes, seconds.
    pub build_time_s: u64,
    /// Time of compact inodes, nanoseconds part.
    pub build_time_ns: u32,
    /// Blocks of the primary device.
    pub blocks: u32,
    /// Block from which inode numbers count.
    pub meta_block: u32,
    /// Block of shared extended attributes.
    pub xattr_block: u32,
    /// Volume id.
    pub uuid: [u8; 16],
    /// Number of device slots.
    pub extra_devices: u16,
    /// Offset of the device table in slots.
    pub device_table_slot: u16,
}

impl Superblock {
    /// The bytes at [`SUPERBLOCK_OFFSET`].
    pub fn encode(&self) -> [u8; SUPERBLOCK_BYTES as usize] {
        let mut out = [0; SUPERBLOCK_BYTES as usize];
        put(&mut out, 0, &MAGIC.to_le_bytes());
        put(&mut out, 8, &FEATURE_COMPAT_MTIME.to_le_bytes());
        out[12] = BLOCK_BITS;
        put(&mut out, 14, &self.root_nid.to_le_bytes());
        put(&mut out, 16, &self.inodes.to_le_bytes());
        put(&mut out, 24, &self.build_time_s.to_le_bytes());
        put(&mut out, 32, &self.build_time_ns.to_le_bytes());
        put(&mut out, 36, &self.blocks.to_le_bytes());
        put(&mut out, 40, &self.meta_block.to_le_bytes());
        put(&mut out, 44, &self.xattr_block.to_le_bytes());
        put(&mut out, 48, &self.uuid);
        put(&mut out, 80, &self.feature_incompat.to_le_bytes());
        put(&mut out, 86, &self.extra_devices.to_le_bytes());
        put(&mut out, 88, &self.device_table_slot.to_le_bytes());
        out
    }

    /// Reads the superblock out of the first bytes of an image.
    pub fn decode(image: &[u8]) -> Result<Self, LayoutError> {
        let end = (SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES) as usize;
        let bytes = image
            .get(SUPERBLOCK_OFFSET as usize..end)
            .ok_or(LayoutError::Truncated("the superblock"))?;
        let magic = u32_at(bytes, 0);
        if magic != MAGIC {
            return Err(LayoutError::Magic(magic));
        }
        let unsupported = |what, value| Err(LayoutError::Unsupported { what, value });
        if bytes[12] != BLOCK_BITS {
            return unsupported("block size bits", bytes[12].into());
        }
        let feature_incompat = u32_at(bytes, 80);
        let known = FEATURE_INCOMPAT_CHUNKED_FILE | FEATURE_INCOMPAT_DEVICE_TABLE;
        if feature_incompat & !known != 0 {
            return unsupported("incompatible features", feature_incompat.into());
        }
        if bytes[90] != 0 {
            return unsupported("directory block size bits", bytes[90].into());
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[48..64]);
        let has_devices = feature_incompat & FEATURE_INCOMPAT_DEVICE_TABLE != 0;
        Ok(Self {
            feature_incompat,
            root_nid: u16_at(bytes, 14),
            inodes: u64_at(bytes, 16),
            build_time_s: u64_at(bytes, 24),
            build_time_ns: u32_at(bytes, 32),
            blocks: u32_at(bytes, 36),
            meta_block: u32_at(bytes, 40),
            xattr_block: u32_at(bytes, 44),
            uuid,
            extra_devices: if has_devices { u16_at(bytes, 86) } else { 0 },
            device_table_slot: u16_at(bytes, 88),
        })
    }
}

/// One device of a multi-device image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSlot {
    /// Content tag: the component image's digest in hex.
    pub tag: [u8; 64],
    /// Size in blocks.
    pub blocks: u32,
    /// Unified address of its first block; 0 if it has none.
    pub mapped_block: u32,
}

impl DeviceSlot {
    /// The slot's bytes.
    pub fn encode(&self) -> [u8; DEVICE_SLOT_BYTES as usize] {
        let mut out = [0; DEVICE_SLOT_BYTES as usize];
        put(&mut out, 0, &self.tag);
        put(&mut out, 64, &self.blocks.to_le_bytes());
        put(&mut out, 68, &self.mapped_block.to_le_bytes());
        out
    }

    /// Reads a slot.
    pub fn decode(bytes: &[u8; DEVICE_SLOT_BYTES as usize]) -> Self {
        let mut tag = [0; 64];
        tag.copy_from_slice(&bytes[..64]);
        Self {
            tag,
            blocks: u32_at(bytes, 64),
            mapped_block: u32_at(bytes, 68),
        }
    }
}

/// File type, in the mode's upper bits and in directory entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileType {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
}

impl FileType {
    /// From the mode's upper four bits.
    pub const fn from_mode(mode: u16) -> Option<Self> {
        Some(match mode & 0o170000 {
            0o100000 => Self::File,
            0o040000 => Self::Directory,
            0o120000 => Self::Symlink,
            0o020000 => Self::CharDevice,
            0o060000 => Self::BlockDevice,
            0o010000 => Self::Fifo,
            0o140000 => Self::Socket,
            _ => return None,
        })
    }

    /// The mode's upper four bits.
    pub const fn mode_bits(self) -> u16 {
        match self {
            Self::File => 0o100000,
            Self::Directory => 0o040000,
            Self::Symlink => 0o120000,
            Self::CharDevice => 0o020000,
            Self::BlockDevice => 0o060000,
            Self::Fifo => 0o010000,
            Self::Socket => 0o140000,
        }
    }

    /// The value in a directory entry.
    pub const fn dirent_type(self) -> u8 {
        match self {
            Self::File => 1,
            Self::Directory => 2,
            Self::CharDevice => 3,
            Self::BlockDevice => 4,
            Self::Fifo => 5,
            Self::Socket => 6,
            Self::Symlink => 7,
        }
    }

    /// The type of a tree node.
    pub const fn of(kind: &Kind) -> Self {
        match kind {
            Kind::File(_) => Self::File,
            Kind::Directory(_) => Self::Directory,
            Kind::Symlink(_) => Self::Symlink,
            Kind::CharDevice { .. } => Self::CharDevice,
            Kind::BlockDevice { .. } => Self::BlockDevice,
            Kind::Fifo => Self::Fifo,
            Kind::Socket => Self::Socket,
        }
    }
}

/// How an inode's data is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataLayout {
    /// Contiguous blocks.
    Plain,
    /// Contiguous blocks, the last partial one behind the inode.
    Inline,
    /// An array of chunk addresses behind the inode.
    Chunked,
}

/// An inode, decoded from either on-disk form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InodeRecord {
    /// Bytes of the on-disk inode: 32 or 64.
    pub header_bytes: u64,
    /// Layout of its data.
    pub layout: DataLayout,
    /// Bytes of extended attributes behind the inode.
    pub xattr_bytes: u64,
    /// File type.
    pub file_type: FileType,
    /// Permission bits (07777).
    pub mode: u16,
    /// Size in bytes.
    pub size: u64,
    /// First block, device number or chunk format, by type and layout.
    pub union: u32,
    /// Number for 32-bit `stat`.
    pub ino: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds.
    pub mtime_s: i64,
    /// Modification time, nanoseconds part.
    pub mtime_ns: u32,
    /// Number of names.
    pub nlink: u32,
}

const XATTR_HEADER_BYTES: u64 = 12;

impl InodeRecord {
    /// Reads the inode that starts at the front of `bytes`.
    #[inline]
    pub fn decode(bytes: &[u8], superblock: &Superblock) -> Result<Self, LayoutError> {
        const CUT: LayoutError = LayoutError::Truncated("an inode");
        let short: &[u8; 32] = bytes.first_chunk().ok_or(CUT)?;
        let format = u16_at(short, 0);
        let layout = match (format >> 1 & 7, format & !0xF) {
            (0, 0) => DataLayout::Plain,
            (2, 0) => DataLayout::Inline,
            (4, 0) => DataLayout::Chunked,
            _ => {
                let value = format.into();
                let what = "inode format";
                return Err(LayoutError::Unsupported { what, value });
            }
        };
        let mode = u16_at(short, 4);
        let file_type =
            FileType::from_mode(mode).ok_or(LayoutError::corrupt("file type", mode.into()))?;
        let record = Self {
            header_bytes: INODE_BYTES,
            layout,
            xattr_bytes: match u64::from(u16_at(short, 2)) {
                0 => 0,
                count => XATTR_HEADER_BYTES + 4 * (count - 1),
            },
            file_type,
            mode: mode & 0o7777,
            size: u64_at(short, 8),
            union: u32_at(short, 16),
            ino: u32_at(short, 20),
            uid: u32_at(short, 24),
            gid: u32_at(short, 28),
            mtime_s: superblock.build_time_s as i64,
            mtime_ns: superblock.build_time_ns,
            nlink: u16_at(short, 6).into(),
        };
        if format & 1 == 0 {
            return Ok(Self {
                header_bytes: 32,
                size: u32_at(short, 8).into(),
                uid: u16_at(short, 24).into(),
                gid: u16_at(short, 26).into(),
                ..record
            });
        }
        let long: &[u8; INODE_BYTES as usize] = bytes.first_chunk().ok_or(CUT)?;
        Ok(Self {
            mtime_s: u64_at(long, 32) as i64,
            mtime_ns: u32_at(long, 40),
            nlink: u32_at(long, 44),
            ..record
        })
    }

    /// Writes the extended form and the extended attributes behind it to zero bytes at `at`
    /// of the metadata `out`, which has room for them; returns where they end.
    #[inline]
    pub fn place(&self, xattr_area: &[u8], at: usize, out: &mut [u8]) -> usize {
        let (header, _) = out[at..]
            .split_first_chunk_mut()
            .expect("metadata has room for every inode");
        self.encode_into(header);
        let xattr_at = at + INODE_BYTES as usize;
        let end = xattr_at + xattr_area.len();
        if !xattr_area.is_empty() {
            out[xattr_at..end].copy_from_slice(xattr_area);
        }
        end
    }

    /// Writes the extended form; `out` is 64 zero bytes.
    #[inline]
    pub fn encode_into(&self, out: &mut [u8; INODE_BYTES as usize]) {
        let layout = match self.layout {
            DataLayout::Plain => 0,
            DataLayout::Inline => 2,
            DataLayout::Chunked => 4,
        };
        let format: u16 = 1 | layout << 1;
        let xattr_count = match self.xattr_bytes {
            0 => 0,
            bytes => ((bytes - XATTR_HEADER_BYTES) / 4 + 1) as u16,
        };
        put(out, 0, &format.to_le_bytes());
        put(out, 2, &xattr_count.to_le_bytes());
        put(
            out,
            4,
            &(self.file_type.mode_bits() | self.mode).to_le_bytes(),
        );
        put(out, 8, &self.size.to_le_bytes());
        put(out, 16, &self.union.to_le_bytes());
        put(out, 20, &self.ino.to_le_bytes());
        put(out, 24, &self.uid.to_le_bytes());
        put(out, 28, &self.gid.to_le_bytes());
        put(out, 32, &self.mtime_s.to_le_bytes());
        put(out, 40, &self.mtime_ns.to_le_bytes());
        put(out, 44, &self.nlink.to_le_bytes());
    }

    /// True for an overlayfs whiteout (character device 0/0).
    pub fn is_whiteout(&self) -> bool {
        self.file_type == FileType::CharDevice && self.union == 0
    }
}

/// Largest major device number that the format holds.
pub const MAJOR_MAX: u32 = 0xFFF;
/// Largest minor device number that the format holds.
pub const MINOR_MAX: u32 = 0xF_FFFF;

/// Packs a device number as Linux does.
pub const fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xFF) | (major & MAJOR_MAX) << 8 | (minor & 0xF_FF00) << 12
}

/// Unpacks a device number: major, minor.
pub const fn decode_device(rdev: u32) -> (u32, u32) {
    (rdev >> 8 & MAJOR_MAX, rdev & 0xFF | rdev >> 12 & 0xF_FF00)
}

/// Rounds up to whole blocks.
pub const fn blocks_of(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_round_trip() {
        let superblock = Superblock {
            feature_incompat: FEATURE_INCOMPAT_DEVICE_TABLE,
            root_nid: 36,
            inodes: 1 << 40,
            blocks: 7,
            uuid: [9; 16],
            extra_devices: 3,
            device_table_slot: 9,
            ..Superblock::default()
        };
        let mut image = vec![0; 1024];
        image.extend(superblock.encode());
        assert_eq!(Superblock::decode(&image), Ok(superblock.clone()));
        assert!(Superblock::decode(&image[..1100]).is_err());
        let inode = InodeRecord {
            header_bytes: 64,
            layout: DataLayout::Inline,
            xattr_bytes: 28,
            file_type: FileType::Socket,
            mode: 0o4755,
            size: 1 << 33,
            union: 5,
            ino: 6,
            uid: 70_000,
            gid: 80_000,
            mtime_s: -1,
            mtime_ns: 999_999_999,
            nlink: 70_000,
        };
        let mut bytes = [0; 64];
        inode.encode_into(&mut bytes);
        assert_eq!(InodeRecord::decode(&bytes, &superblock), Ok(inode));
        let slot = DeviceSlot {
            tag: [b'a'; 64],
            blocks: 1,
            mapped_block: 512,
        };
        assert_eq!(DeviceSlot::decode(&slot.encode()), slot);
    }

    #[test]
    fn device_numbers_pack_as_in_linux() {
        // mknod b 259 65539: new_encode_dev gives 0x10010303.
        assert_eq!(encode_device(259, 65_539), 0x1001_0303);
        for (major, minor) in [(0, 0), (8, 1), (MAJOR_MAX, MINOR_MAX), (259, 65_539)] {
            assert_eq!(decode_device(encode_device(major, minor)), (major, minor));
        }
    }
}
