//! Second and third pass: places for all inodes, then the bytes.
//!
//! Owns the map image's layout. Invariant: the output is written once and its size is
//! known before the first byte.

use super::layer::Source;
use super::walk::{Directory, Merged};
use super::{ComposeError, Device};
use crate::erofs::alloc::{InodePlaces, Split, split};
use crate::erofs::directory::{Dirent, pack_block};
use crate::erofs::layout::{
    BLOCK_BYTES, DEVICE_SLOT_BYTES, DataLayout, DeviceSlot, FEATURE_INCOMPAT_DEVICE_TABLE,
    FileType, INODE_BYTES, INODE_SLOT_BYTES, InodeRecord, SUPERBLOCK_BYTES, SUPERBLOCK_OFFSET,
    Superblock,
};

const BLOCK: usize = BLOCK_BYTES as usize;
const TABLE_OFFSET: u64 = SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES;

/// Where one node goes.
struct Place {
    /// Byte offset of the inode.
    at: u32,
    /// First block of a directory or symlink.
    block: u32,
    split: Split,
}

/// Where everything goes.
pub(super) struct Places {
    nodes: Vec<Place>,
    pub metadata_blocks: u64,
}

impl Places {
    pub(super) fn new(
        sources: &[Source<'_>],
        merged: &Merged,
        table_slots: usize,
    ) -> Result<Self, ComposeError> {
        let start = TABLE_OFFSET + table_slots as u64 * DEVICE_SLOT_BYTES;
        if start / INODE_SLOT_BYTES > u16::MAX.into() {
            return Err(ComposeError::TooLarge("too many devices"));
        }
        let mut places = InodePlaces::new(start);
        let mut nodes = Vec::with_capacity(merged.nodes.len());
        for node in &merged.nodes {
            let xattr_bytes = u64::from(node.xattr_bytes);
            let split = match node.file_type {
                FileType::Directory => {
                    let size = merged.directories[node.extra as usize].size;
                    split(size, xattr_bytes)
                }
                FileType::Symlink => split(node.extra.into(), xattr_bytes),
                _ => split(0, 0),
            };
            let at = places.place(INODE_BYTES + xattr_bytes + split.inline_bytes);
            // Overlapping inodes of a hostile layer must not blow up the output.
            if at >= u32::MAX.into() {
                return Err(ComposeError::TooLarge("more than 4 GiB of metadata"));
            }
            nodes.push(Place {
                at: at as u32,
                block: 0,
                split,
            });
        }
        let mut block = places.end_block();
        for place in nodes.iter_mut().filter(|place| place.split.blocks > 0) {
            place.block = block as u32;
            block += place.split.blocks;
        }
        let input: usize = sources.iter().map(|source| source.metadata.len()).sum();
        if block * BLOCK_BYTES > 4 * input as u64 + start + (1 << 20) {
            return Err(ComposeError::TooLarge("layers whose inodes overlap"));
        }
        Ok(Self {
            nodes,
            metadata_blocks: block,
        })
    }
}

/// Writes the map image.
pub(super) struct Emitter<'s, 'a> {
    pub sources: &'s [Source<'a>],
    pub merged: &'s Merged,
    pub places: &'s Places,
    /// What to add to the block addresses of each source.
    pub shifts: &'s [i64],
}

impl Emitter<'_, '_> {
    /// The image with zero UUID; per-VM data is still zero. `table` are the device slots,
    /// `end_block` is the end of the flat disk.
    pub(super) fn image(&self, map_blocks: u64, table: &[Device], end_block: u64) -> Vec<u8> {
        let mut out = vec![0; map_blocks as usize * BLOCK];
        let has_table = !table.is_empty();
        let superblock = Superblock {
            feature_incompat: if has_table {
                FEATURE_INCOMPAT_DEVICE_TABLE
            } else {
                0
            },
            root_nid: self.nid(0) as u16,
            inodes: self.merged.nodes.len() as u64,
            blocks: if has_table { map_blocks } else { end_block } as u32,
            extra_devices: table.len() as u16,
            device_table_slot: if has_table {
                (TABLE_OFFSET / DEVICE_SLOT_BYTES) as u16
            } else {
                0
            },
            ..Superblock::default()
        };
        let at = SUPERBLOCK_OFFSET as usize;
        out[at..at + SUPERBLOCK_BYTES as usize].copy_from_slice(&superblock.encode());
        let slots = out[TABLE_OFFSET as usize..].chunks_mut(DEVICE_SLOT_BYTES as usize);
        for (slot, device) in slots.zip(table) {
            let mut tag = [0; 64];
            tag.copy_from_slice(device.image.hex().as_bytes());
            let device = DeviceSlot {
                tag,
                blocks: device.blocks,
                mapped_block: device.mapped_block,
            };
            slot.copy_from_slice(&device.encode());
        }
        for index in 0..self.merged.nodes.len() {
            self.node(index, &mut out);
        }
        out
    }

    fn nid(&self, node: u32) -> u64 {
        u64::from(self.places.nodes[node as usize].at) / INODE_SLOT_BYTES
    }

    fn node(&self, index: usize, out: &mut [u8]) {
        let node = &self.merged.nodes[index];
        let place = &self.places.nodes[index];
        let source = &self.sources[usize::from(node.layer)];
        let old = source.checked_inode(node.at);
        let area = match (node.xattr_bytes, node.rewritten) {
            (0, _) => &[],
            (_, 0) => source.xattr_area(node.at, &old),
            (_, rewritten) => self.merged.rewritten[rewritten as usize - 1].as_slice(),
        };
        let directory = match node.file_type {
            FileType::Directory => Some(&self.merged.directories[node.extra as usize]),
            _ => None,
        };
        let shifted = i64::from(old.union) + self.shifts[usize::from(node.layer)];
        let record = InodeRecord {
            header_bytes: INODE_BYTES,
            layout: if place.split.inline_bytes > 0 {
                DataLayout::Inline
            } else {
                DataLayout::Plain
            },
            xattr_bytes: area.len() as u64,
            size: directory.map_or(old.size, |directory| directory.size),
            union: match node.file_type {
                FileType::File if old.size == 0 => 0,
                FileType::File => shifted as u32,
                FileType::Directory | FileType::Symlink => place.block,
                _ => old.union,
            },
            ino: index as u32 + 1,
            nlink: node.nlink,
            ..old
        };
        let tail_at = record.place(area, place.at as usize, out);
        match directory {
            Some(directory) => self.directory(directory, place, tail_at, out),
            None if node.file_type == FileType::Symlink => {
                let inline = place.split.inline_bytes > 0;
                let mut to = if inline {
                    tail_at
                } else {
                    place.block as usize * BLOCK
                };
                for part in source.data(node.at, &old) {
                    let bytes = &source.metadata[part];
                    out[to..to + bytes.len()].copy_from_slice(bytes);
                    to += bytes.len();
                }
            }
            None => {}
        }
    }

    fn directory(&self, directory: &Directory, place: &Place, tail_at: usize, out: &mut [u8]) {
        let entry = |index: usize| {
            let entry = &self.merged.entries[index];
            let node = &self.merged.nodes[entry.node as usize];
            Dirent {
                name: self.merged.name(self.sources, entry),
                nid: self.nid(entry.node),
                file_type: node.file_type.dirent_type(),
            }
        };
        let end = directory.end_entry as usize;
        let mut done = directory.first_entry as usize;
        let first = place.block as usize * BLOCK;
        for block in 0..place.split.blocks as usize {
            let at = first + block * BLOCK;
            done = pack_block(done..end, entry, &mut out[at..at + BLOCK]).end;
        }
        let tail = &mut out[tail_at..tail_at + place.split.inline_bytes as usize];
        pack_block(done..end, entry, tail);
    }
}
