//! Checked access to one layer's metadata.
//!
//! Owns bounds: whatever it returns lies within the metadata bytes, whatever block address
//! it lets pass lies within the image. Remembers which inodes were used, so that none is
//! used twice.

use std::ops::Range;

use super::{ComposeError, Layer};
use crate::Digest;
use crate::erofs::directory::BlockEntries;
use crate::erofs::layout::{
    BLOCK_BYTES, DataLayout, FileType, INODE_SLOT_BYTES, InodeRecord, LayoutError, Superblock,
    blocks_of,
};
use crate::erofs::xattr;

/// One layer, checked as far as its superblock goes.
pub(super) struct Source<'a> {
    pub image: Digest,
    pub metadata: &'a [u8],
    pub layer: Layer<'a>,
    superblock: Superblock,
    image_blocks: u64,
    used: Vec<u64>,
    directory_bytes: u64,
}

/// What an inode says about what lies below it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Marks {
    /// A directory that hides what lies below.
    pub opaque: bool,
    /// Is what it is, whatever lies below.
    pub replaces: bool,
}

impl<'a> Source<'a> {
    pub(super) fn new(layer: &Layer<'a>) -> Result<Self, ComposeError> {
        let image = layer.image;
        let fail = |source| ComposeError::Layer {
            image,
            offset: 0,
            source,
        };
        let superblock = Superblock::decode(layer.metadata).map_err(fail)?;
        if superblock.uuid != image.uuid() {
            return Err(ComposeError::Identity { image });
        }
        let corrupt = |what, value| Err(fail(LayoutError::corrupt(what, value)));
        if superblock.feature_incompat != 0 || superblock.meta_block != 0 {
            return corrupt(
                "features of a component",
                superblock.feature_incompat.into(),
            );
        }
        let image_blocks = layer.image_bytes / BLOCK_BYTES;
        if image_blocks > u32::MAX.into() || u64::from(superblock.blocks) != image_blocks {
            return corrupt("number of blocks", superblock.blocks.into());
        }
        let bytes = layer.metadata.len() as u64;
        if bytes > layer.image_bytes || bytes > u32::MAX.into() {
            return corrupt("metadata size", bytes);
        }
        let slots = layer.metadata.len() / INODE_SLOT_BYTES as usize;
        Ok(Self {
            image,
            metadata: layer.metadata,
            layer: *layer,
            superblock,
            image_blocks,
            used: vec![0; slots / 64 + 1],
            directory_bytes: 0,
        })
    }

    pub(super) fn root_offset(&self) -> u64 {
        u64::from(self.superblock.root_nid) * INODE_SLOT_BYTES
    }

    pub(super) fn error(&self, offset: u64, source: LayoutError) -> ComposeError {
        let image = self.image;
        ComposeError::Layer {
            image,
            offset,
            source,
        }
    }

    fn corrupt(&self, at: u32, what: &'static str, value: u64) -> ComposeError {
        self.error(at.into(), LayoutError::corrupt(what, value))
    }

    /// The inode with this number: its byte offset and fields, with every address checked.
    pub(super) fn inode(&self, nid: u64) -> Result<(u32, InodeRecord), ComposeError> {
        let offset = nid.saturating_mul(INODE_SLOT_BYTES);
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|at| self.metadata.get(at..))
            .ok_or_else(|| self.error(offset, LayoutError::corrupt("inode number", nid)))?;
        let record = InodeRecord::decode(bytes, &self.superblock)
            .map_err(|source| self.error(offset, source))?;
        let at = offset as u32;
        self.check(at, &record)?;
        Ok((at, record))
    }

    /// An inode that [`Self::inode`] has checked before.
    pub(super) fn checked_inode(&self, at: u32) -> InodeRecord {
        InodeRecord::decode(&self.metadata[at as usize..], &self.superblock)
            .expect("this inode was decoded before")
    }

    fn check(&self, at: u32, record: &InodeRecord) -> Result<(), ComposeError> {
        let tail = u64::from(at) + record.header_bytes + record.xattr_bytes;
        let blocks = blocks_of(record.size);
        let block = u64::from(record.union);
        let fits = match (record.file_type, record.layout) {
            (_, DataLayout::Chunked) => false,
            (FileType::File, DataLayout::Inline) => false,
            (FileType::File, DataLayout::Plain) => {
                record.size == 0 || block + blocks <= self.image_blocks
            }
            (FileType::Directory | FileType::Symlink, layout) => {
                let inline = layout == DataLayout::Inline;
                let tail_bytes = if inline { record.size % BLOCK_BYTES } else { 0 };
                let in_blocks = if inline {
                    record.size / BLOCK_BYTES
                } else {
                    blocks
                };
                let end = (block + in_blocks).saturating_mul(BLOCK_BYTES);
                (in_blocks == 0 || end <= self.metadata.len() as u64)
                    && tail + tail_bytes <= self.metadata.len() as u64
            }
            _ => true,
        };
        if !fits || tail > self.metadata.len() as u64 {
            return Err(self.corrupt(at, "data of an inode", record.size));
        }
        if record.file_type == FileType::Symlink && record.size > BLOCK_BYTES {
            return Err(self.corrupt(at, "symlink length", record.size));
        }
        if record.xattr_bytes > 0 {
            xattr::visit(self.xattr_area(at, record), |_| ())
                .map_err(|source| self.error(at.into(), source))?;
        }
        Ok(())
    }

    /// The attribute area of a checked inode.
    pub(super) fn xattr_area(&self, at: u32, record: &InodeRecord) -> &'a [u8] {
        let start = at as usize + record.header_bytes as usize;
        &self.metadata[start..start + record.xattr_bytes as usize]
    }

    /// What a checked inode says about what lies below it.
    pub(super) fn marks(&self, at: u32, record: &InodeRecord) -> Marks {
        let mut marks = Marks::default();
        if record.xattr_bytes > 0 {
            // The area was checked together with the inode.
            let _ = xattr::visit(self.xattr_area(at, record), |(prefix, name, value)| {
                let is = |full: &[u8]| full.strip_prefix(prefix) == Some(name) && value == b"y";
                let is_directory = record.file_type == FileType::Directory;
                marks.opaque |= is_directory && is(xattr::OPAQUE);
                marks.replaces |= is(xattr::REPLACES);
            });
        }
        marks
    }

    /// Where a checked symbolic link points.
    pub(super) fn target(&self, at: u32, record: &InodeRecord) -> Vec<u8> {
        let parts = self.data(at, record).into_iter();
        parts
            .flat_map(|part| &self.metadata[part])
            .copied()
            .collect()
    }

    /// Forgets what was used, for another pass.
    pub(super) fn reset(&mut self) {
        self.used.fill(0);
        self.directory_bytes = 0;
    }

    /// Takes note that the inode is used; an error if it was before.
    pub(super) fn use_once(&mut self, at: u32) -> Result<(), ComposeError> {
        let slot = at as usize / INODE_SLOT_BYTES as usize;
        let (word, bit) = (slot / 64, 1u64 << (slot % 64));
        if self.used[word] & bit != 0 {
            return Err(self.corrupt(at, "inode with more names than links", at.into()));
        }
        self.used[word] |= bit;
        Ok(())
    }

    /// Where the data of a checked directory or symlink lies: whole blocks, then the tail.
    pub(super) fn data(&self, at: u32, record: &InodeRecord) -> [Range<usize>; 2] {
        let size = record.size as usize;
        let tail_len = match record.layout {
            DataLayout::Inline => size % BLOCK_BYTES as usize,
            _ => 0,
        };
        // Without whole blocks the block address means nothing.
        let start = match size - tail_len {
            0 => 0,
            _ => record.union as usize * BLOCK_BYTES as usize,
        };
        let tail = match tail_len {
            0 => 0,
            _ => at as usize + (record.header_bytes + record.xattr_bytes) as usize,
        };
        [start..start + size - tail_len, tail..tail + tail_len]
    }

    /// Visits the entries of a checked directory in order: name position, name, inode number.
    pub(super) fn entries(
        &mut self,
        at: u32,
        record: &InodeRecord,
        mut visit: impl FnMut(u32, &'a [u8], u64),
    ) -> Result<(), ComposeError> {
        self.directory_bytes += record.size;
        if self.directory_bytes > self.metadata.len() as u64 {
            return Err(self.corrupt(at, "directories that overlap", record.size));
        }
        let metadata = self.metadata;
        let base = metadata.as_ptr() as usize;
        let mut last: &[u8] = b"";
        for part in self.data(at, record) {
            for block in metadata[part].chunks(BLOCK_BYTES as usize) {
                let fail = |source| self.error(at.into(), source);
                for entry in BlockEntries::new(block).map_err(fail)? {
                    let entry = entry.map_err(fail)?;
                    if entry.name <= last {
                        let what = "order of directory entries";
                        return Err(self.corrupt(at, what, entry.nid));
                    }
                    last = entry.name;
                    if entry.name != b"." && entry.name != b".." {
                        // Position of the borrowed name within the metadata: no copy.
                        let position = entry.name.as_ptr() as usize - base;
                        visit(position as u32, entry.name, entry.nid);
                    }
                }
            }
        }
        Ok(())
    }
}
