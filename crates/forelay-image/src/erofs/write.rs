//! Writes a tree as a component image.
//!
//! Order of work: plan inodes breadth-first (children of a directory lie together),
//! place metadata, find identical files, give out data blocks in path order, then stream:
//! metadata, then each file in pieces of at most 1 MiB. Only metadata is held in memory.
//!
//! Chunks follow file boundaries: a file's blocks are cut into chunks of at most 1 MiB,
//! its last one includes the padding of its last block. Small neighbours are *not*
//! merged: a chunk is then always (part of) one file's content, so that the same file in
//! another image or version is the same chunk. The price is one index entry a small file;
//! packs, not chunks, are what makes transfers large.
//!
//! Files with identical content share their blocks within the image.
//!
//! Invariants: same tree, same bytes; the image covers metadata, then data, without gaps.

use std::io::{self, Seek, SeekFrom, Write};
use std::path::PathBuf;

use sha2::{Digest as _, Sha256};

use super::alloc::{InodePlaces, Split, split};
use super::directory::{Dirent, Packing, pack_block};
use super::layout::{
    BLOCK_BYTES, DataLayout, FILE_BYTES_MAX, FileType, INODE_BYTES, INODE_SLOT_BYTES, InodeRecord,
    MAJOR_MAX, MINOR_MAX, SUPERBLOCK_BYTES, SUPERBLOCK_OFFSET, Superblock, UUID_OFFSET, blocks_of,
    encode_device,
};
use super::xattr::{self, XattrError};
use crate::chunk::MAX_CHUNK_BYTES;
use crate::component::ImageRef;
use crate::tree::{FileData, Kind, NodeId, ROOT, Tree};
use crate::{Chunk, ChunkIndex, Digest};

mod data;

pub use data::SourceError;
use data::{DataPlan, Source};

const BLOCK: usize = BLOCK_BYTES as usize;
/// Longest symlink target that Linux follows, in bytes.
const SYMLINK_BYTES_MAX: usize = 4095;

/// Why an image could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// An extended attribute cannot be stored.
    #[error("{path}: cannot store its extended attributes")]
    Xattr {
        /// Path in the tree.
        path: String,
        /// What is wrong with them.
        source: XattrError,
    },
    /// A device number does not fit the format.
    #[error("{path}: device {major}:{minor} is out of range (largest is 4095:1048575)")]
    Device {
        /// Path in the tree.
        path: String,
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A symlink target is empty or too long.
    #[error("{path}: a symlink target has 1 to 4095 bytes, not {bytes}")]
    Symlink {
        /// Path in the tree.
        path: String,
        /// Its length in bytes.
        bytes: usize,
    },
    /// A directory has two names, or contains itself.
    #[error("{path}: a directory cannot have a second name")]
    DirectoryLink {
        /// Path in the tree.
        path: String,
    },
    /// The image would exceed what 32-bit block addresses reach.
    #[error("the image would have {blocks} blocks; EROFS holds at most 4294967295 (16 TiB)")]
    TooLarge {
        /// Number of blocks.
        blocks: u64,
    },
    /// A file's content could not be read.
    #[error("{path}: cannot read its content")]
    Source {
        /// Path in the tree.
        path: String,
        /// What happened.
        source: SourceError,
    },
    /// The image could not be written out.
    #[error("cannot write the image")]
    Write(#[from] io::Error),
}

/// An image that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Identity and sizes.
    pub image: ImageRef,
    /// Its chunks, metadata first.
    pub chunks: ChunkIndex,
}

/// One inode to be.
struct Planned {
    id: NodeId,
    /// Index of the directory that named it first; the root's is itself.
    parent: u32,
    nlink: u32,
    file_type: FileType,
    xattr_area: Vec<u8>,
    size: u64,
    split: Split,
    /// Byte offset of the inode.
    offset: u64,
    /// First block of its data.
    block: u64,
}

struct Plan<'a> {
    tree: &'a Tree,
    nodes: Vec<Planned>,
    /// Tree node to planned inode; `u32::MAX` for nodes without a name.
    index_of: Vec<u32>,
    metadata_blocks: u64,
}

/// Writes `tree` as an EROFS image to `out`, which must be empty (long runs of zeros are
/// skipped by seeking, so that a file stays sparse).
pub fn write_image(tree: &Tree, out: &mut (impl Write + Seek)) -> Result<Written, WriteError> {
    let mut plan = Plan::new(tree)?;
    plan.place()?;
    let data = plan.place_data()?;
    let metadata = plan.encode(data.end_block)?;
    let mut hasher = Sha256::new();
    hasher.update(&metadata);
    out.seek(SeekFrom::Start(metadata.len() as u64))?;
    let mut data_chunks = Vec::new();
    let mut writer = data::Writer::new(out, &mut hasher, metadata.len() as u64, &mut data_chunks);
    for &(index, block) in &data.files {
        writer
            .file(plan.source(index), block)
            .map_err(|error| error.at(|| plan.path(index as usize)))?;
    }
    writer.finish()?;
    let digest = Digest::from_bytes(hasher.finalize().into());
    let chunks = chunks_with_metadata(metadata, digest, data_chunks, out)?;
    let bytes = data.end_block * BLOCK_BYTES;
    let chunks = ChunkIndex {
        image: digest,
        image_bytes: bytes,
        chunks,
    };
    Ok(Written {
        image: ImageRef {
            digest,
            bytes,
            metadata_bytes: plan.metadata_blocks * BLOCK_BYTES,
            inodes: plan.nodes.len() as u64,
            chunk_index: chunks.digest(),
        },
        chunks,
    })
}

/// Sets the UUID in `metadata`, writes it to the front of `out` and prepends its chunks.
fn chunks_with_metadata(
    mut metadata: Vec<u8>,
    digest: Digest,
    data_chunks: Vec<Chunk>,
    out: &mut (impl Write + Seek),
) -> Result<Vec<Chunk>, WriteError> {
    let at = UUID_OFFSET as usize;
    metadata[at..at + 16].copy_from_slice(&digest.uuid());
    out.seek(SeekFrom::Start(0))?;
    out.write_all(&metadata)?;
    out.flush()?;
    let mut offset = 0;
    let mut chunks = Vec::with_capacity(data_chunks.len() + 1);
    for piece in metadata.chunks(MAX_CHUNK_BYTES as usize) {
        chunks.push(Chunk {
            offset,
            len: piece.len() as u32,
            digest: Digest::of(piece),
        });
        offset += piece.len() as u64;
    }
    chunks.extend(data_chunks);
    Ok(chunks)
}

impl<'a> Plan<'a> {
    /// Walks the tree breadth-first and checks what can be checked without reading data.
    fn new(tree: &'a Tree) -> Result<Self, WriteError> {
        let mut plan = Self {
            tree,
            nodes: Vec::with_capacity(tree.len()),
            index_of: vec![u32::MAX; tree.len()],
            metadata_blocks: 0,
        };
        plan.add(ROOT, 0)?;
        let mut next = 0;
        while next < plan.nodes.len() {
            let id = plan.nodes[next].id;
            if let Some(entries) = tree.entries(id) {
                plan.add_entries(next as u32, entries.values().copied())?;
            }
            next += 1;
        }
        Ok(plan)
    }

    fn add_entries(
        &mut self,
        parent: u32,
        ids: impl Iterator<Item = NodeId>,
    ) -> Result<(), WriteError> {
        for id in ids {
            let known = self.index_of[id.0 as usize];
            if known == u32::MAX {
                self.add(id, parent)?;
                if self.tree.entries(id).is_some() {
                    self.nodes[parent as usize].nlink += 1;
                }
            } else if self.tree.entries(id).is_some() {
                let path = self.path(known as usize);
                return Err(WriteError::DirectoryLink { path });
            } else {
                self.nodes[known as usize].nlink += 1;
            }
        }
        Ok(())
    }

    fn add(&mut self, id: NodeId, parent: u32) -> Result<(), WriteError> {
        let index = self.nodes.len();
        self.index_of[id.0 as usize] = index as u32;
        let node = self.tree.node(id);
        let is_directory = matches!(node.kind, Kind::Directory(_));
        self.nodes.push(Planned {
            id,
            parent,
            nlink: if is_directory { 2 } else { 1 },
            file_type: FileType::of(&node.kind),
            xattr_area: Vec::new(),
            size: 0,
            split: split(0, 0),
            offset: 0,
            block: 0,
        });
        let xattr_area = xattr::encode(&node.attributes.xattrs).map_err(|source| {
            let path = self.path(index);
            WriteError::Xattr { path, source }
        })?;
        let size = self.checked_size(index)?;
        let planned = &mut self.nodes[index];
        if matches!(node.kind, Kind::Directory(_) | Kind::Symlink(_)) {
            planned.split = split(size, xattr_area.len() as u64);
        }
        planned.size = size;
        planned.xattr_area = xattr_area;
        Ok(())
    }

    fn checked_size(&self, index: usize) -> Result<u64, WriteError> {
        match &self.tree.node(self.nodes[index].id).kind {
            Kind::Directory(entries) => {
                let mut packing = Packing::default();
                let mut names: Vec<&[u8]> = entries.keys().map(Vec::as_slice).collect();
                // Where the dots stand among the names matters for block borders; names
                // such as `.-` lie between them.
                for dots in [&b"."[..], b".."] {
                    let at = names.partition_point(|name| *name < dots);
                    names.insert(at, dots);
                }
                names.iter().for_each(|name| packing.add(name.len()));
                Ok(packing.size())
            }
            Kind::Symlink(target) if target.is_empty() || target.len() > SYMLINK_BYTES_MAX => {
                let (path, bytes) = (self.path(index), target.len());
                Err(WriteError::Symlink { path, bytes })
            }
            Kind::Symlink(target) => Ok(target.len() as u64),
            Kind::File(data) if data.len() > FILE_BYTES_MAX => {
                let blocks = blocks_of(data.len());
                Err(WriteError::TooLarge { blocks })
            }
            Kind::File(data) => Ok(data.len()),
            &(Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor })
                if major > MAJOR_MAX || minor > MINOR_MAX =>
            {
                let path = self.path(index);
                Err(WriteError::Device { path, major, minor })
            }
            _ => Ok(0),
        }
    }

    /// Gives every inode and every metadata block its place.
    fn place(&mut self) -> Result<(), WriteError> {
        let mut places = InodePlaces::new(SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES);
        for node in &mut self.nodes {
            let tail = node.xattr_area.len() as u64 + node.split.inline_bytes;
            node.offset = places.place(INODE_BYTES + tail);
        }
        let mut block = places.end_block();
        for node in &mut self.nodes {
            if node.split.blocks > 0 {
                node.block = block;
                block += node.split.blocks;
            }
        }
        self.metadata_blocks = block;
        check_blocks(block)
    }

    /// Gives file data its blocks, in path order; identical files share theirs.
    fn place_data(&mut self) -> Result<DataPlan, WriteError> {
        let order = self.files_in_path_order();
        let sources: Vec<(u32, Source<'a>)> = order
            .into_iter()
            .map(|index| (index, self.source(index)))
            .collect();
        let plan = data::plan(&sources, self.metadata_blocks)
            .map_err(|(index, error)| error.at(|| self.path(index as usize)))?;
        check_blocks(plan.end_block)?;
        for &(index, block) in plan.files.iter().chain(&plan.shared) {
            self.nodes[index as usize].block = block;
        }
        Ok(plan)
    }

    /// Non-empty regular files, depth-first by name.
    fn files_in_path_order(&self) -> Vec<u32> {
        let mut files = Vec::new();
        let mut seen = vec![false; self.nodes.len()];
        let mut stack = vec![ROOT];
        while let Some(id) = stack.pop() {
            let index = self.index_of[id.0 as usize];
            match &self.tree.node(id).kind {
                Kind::Directory(entries) => stack.extend(entries.values().rev()),
                Kind::File(data)
                    if !data.is_empty() && !std::mem::replace(&mut seen[index as usize], true) =>
                {
                    files.push(index);
                }
                _ => {}
            }
        }
        files
    }

    fn source(&self, index: u32) -> Source<'a> {
        match &self.tree.node(self.nodes[index as usize].id).kind {
            Kind::File(FileData::Bytes(bytes)) => Source::Bytes(bytes),
            Kind::File(FileData::HostFile { path, offset, len }) => Source::Host {
                path,
                offset: *offset,
                len: *len,
            },
            Kind::File(FileData::Watched(file)) => Source::Watched(file),
            Kind::File(FileData::Elsewhere { source, len }) => Source::Elsewhere(&**source, *len),
            _ => Source::Bytes(&[]),
        }
    }

    /// The path of a planned inode, for messages.
    fn path(&self, mut index: usize) -> String {
        let mut path = PathBuf::new();
        let mut names = Vec::new();
        while index != 0 {
            let parent = self.nodes[index].parent as usize;
            let id = self.nodes[index].id;
            let entries = self.tree.entries(self.nodes[parent].id);
            let name = entries
                .into_iter()
                .flatten()
                .find(|(_, child)| **child == id);
            names.extend(name.map(|(name, _)| String::from_utf8_lossy(name).into_owned()));
            index = parent;
        }
        path.push("/");
        path.extend(names.into_iter().rev());
        path.display().to_string()
    }

    /// All metadata, UUID zero.
    fn encode(&self, end_block: u64) -> Result<Vec<u8>, WriteError> {
        let mut out = vec![0; self.metadata_blocks as usize * BLOCK];
        let root = &self.nodes[0];
        let superblock = Superblock {
            root_nid: (root.offset / INODE_SLOT_BYTES) as u16,
            inodes: self.nodes.len() as u64,
            blocks: end_block as u32,
            ..Superblock::default()
        };
        let at = SUPERBLOCK_OFFSET as usize;
        out[at..at + SUPERBLOCK_BYTES as usize].copy_from_slice(&superblock.encode());
        for (index, node) in self.nodes.iter().enumerate() {
            self.encode_inode(index, node, &mut out);
        }
        Ok(out)
    }

    fn encode_inode(&self, index: usize, node: &Planned, out: &mut [u8]) {
        let attributes = &self.tree.node(node.id).attributes;
        let kind = &self.tree.node(node.id).kind;
        let inline = node.split.inline_bytes > 0;
        let record = InodeRecord {
            header_bytes: INODE_BYTES,
            layout: if inline {
                DataLayout::Inline
            } else {
                DataLayout::Plain
            },
            xattr_bytes: node.xattr_area.len() as u64,
            file_type: node.file_type,
            mode: attributes.mode & 0o7777,
            size: node.size,
            union: match *kind {
                Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                    encode_device(major, minor)
                }
                _ => node.block as u32,
            },
            ino: index as u32 + 1,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime_s: attributes.mtime_s,
            mtime_ns: attributes.mtime_ns,
            nlink: node.nlink,
        };
        let tail_at = record.place(&node.xattr_area, node.offset as usize, out);
        let block_at = node.block as usize * BLOCK;
        match kind {
            Kind::Symlink(target) => {
                let at = if inline { tail_at } else { block_at };
                out[at..at + target.len()].copy_from_slice(target);
            }
            Kind::Directory(_) => self.encode_directory(index, block_at, tail_at, out),
            _ => {}
        }
    }

    fn encode_directory(&self, index: usize, block_at: usize, tail_at: usize, out: &mut [u8]) {
        let node = &self.nodes[index];
        let entries = self.tree.entries(node.id).into_iter().flatten();
        let mut list: Vec<Dirent<'_>> = entries
            .map(|(name, id)| self.dirent(name, self.index_of[id.0 as usize]))
            .collect();
        for dots in [
            self.dirent(b".", index as u32),
            self.dirent(b"..", node.parent),
        ] {
            let at = list.partition_point(|entry| entry.name < dots.name);
            list.insert(at, dots);
        }
        let mut done = 0;
        for block in 0..node.split.blocks as usize {
            let at = block_at + block * BLOCK;
            let range = done..list.len();
            done = pack_block(range, |i| list[i], &mut out[at..at + BLOCK]).end;
        }
        let tail = &mut out[tail_at..tail_at + node.split.inline_bytes as usize];
        pack_block(done..list.len(), |i| list[i], tail);
    }

    fn dirent<'n>(&self, name: &'n [u8], index: u32) -> Dirent<'n> {
        let node = &self.nodes[index as usize];
        Dirent {
            name,
            nid: node.offset / INODE_SLOT_BYTES,
            file_type: node.file_type.dirent_type(),
        }
    }
}

fn check_blocks(blocks: u64) -> Result<(), WriteError> {
    if blocks > u64::from(u32::MAX) {
        return Err(WriteError::TooLarge { blocks });
    }
    Ok(())
}
