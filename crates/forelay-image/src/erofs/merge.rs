//! Merges component images into one map image, from their metadata alone.
//!
//! Three passes over flat arrays; no node of the merged tree is an object on the heap:
//! 1. `walk`: breadth-first, the directories that stand at one path are read in layer
//!    order, their entries sorted together, and each name decided: nodes, directories and
//!    entries are appended to three arrays; names stay where they are, in the layers.
//! 2. `emit::Places`: every inode and directory gets its place.
//! 3. `emit`: the output is written once, front to back.
//!
//! Rules: layers are laid over each other as dpkg unpacks packages (`stack` has the table):
//! the later layer wins; directories merge, through links to directories if need be
//! (`links`), and keep the attributes of the first; nothing but a directory takes a
//! directory's place. A whiteout (character device 0/0) removes what lies below it and does
//! not appear itself; an opaque directory hides what lies below it; an entry marked as
//! replacing ([`super::xattr::REPLACES`]) is what it is, as in overlayfs. A directory that
//! looks implied (0755, root, time 0, no attributes) takes its attributes from whichever
//! layer means some; the VM's own files may give a directory others. Hard links stay hard
//! links within their layer.
//!
//! Refuses to trust a layer: bad metadata is an error, and time and output stay within a
//! small multiple of the input. Same layers, same bytes.

use std::io::Cursor;

use sha2::{Digest as _, Sha256};

use super::layout::{BLOCK_BYTES, LayoutError, UUID_OFFSET};
use super::write::{WriteError, write_image};
use crate::extent::PMEM_ALIGN_BYTES;
use crate::{ChunkIndex, Digest, bundle::Bundle, tree::Tree};

mod conflict;
mod emit;
mod layer;
mod links;
mod stack;
mod walk;

use layer::Source;

/// Device addresses are aligned to this, so that a flat disk is made of the same 2 MiB
/// padded files as pmem devices are.
const DEVICE_ALIGN_BLOCKS: u64 = PMEM_ALIGN_BYTES / BLOCK_BYTES;

/// One component image to merge.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// Identity of the image.
    pub image: Digest,
    /// Size of the image in bytes.
    pub image_bytes: u64,
    /// Its first `metadata_bytes` bytes.
    pub metadata: &'a [u8],
    /// Its chunks, if at hand: with them, files of equal content are not conflicts.
    pub chunks: Option<&'a ChunkIndex>,
    /// The bundle that the image is a member of, if it has no device of its own.
    pub bundle: Option<&'a Bundle>,
}

impl Layer<'_> {
    /// Tag and size of the device that holds the image.
    fn device(&self) -> (Digest, u64) {
        match self.bundle {
            Some(bundle) => (bundle.tag(), bundle.bytes()),
            None => (self.image, self.image_bytes),
        }
    }
}

/// How the guest gets at the components.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MapLayout {
    /// One device for the map image and one for each component (virtio-pmem). From Linux
    /// 6.4 on the same image can be mounted as one flat disk, too.
    #[default]
    Devices,
    /// One disk: the map image, then each component at its mapped block. No device table,
    /// so any kernel with EROFS mounts it.
    Flat,
}

/// Settings of [`compose`].
#[derive(Clone, Copy, Debug, Default)]
pub struct ComposeOptions {
    /// How the guest gets at the components.
    pub layout: MapLayout,
}

/// A component image as a device of the map image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Identity of the image, or of a bundle's first member; in hex the device slot's tag.
    pub image: Digest,
    /// Size in bytes.
    pub image_bytes: u64,
    /// Size in blocks.
    pub blocks: u32,
    /// Unified address of its first block; on a flat disk its place.
    pub mapped_block: u32,
}

/// A path that two components fill differently.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileConflict {
    /// Absolute path.
    pub path: Vec<u8>,
    /// Index of the layer whose file is used.
    pub winner: usize,
    /// Index of the layer whose file is hidden.
    pub loser: usize,
}

/// A composed map image.
#[derive(Clone, Debug)]
pub struct Composed {
    /// The image: metadata, then per-VM files; a multiple of 4 KiB.
    pub map_image: Vec<u8>,
    /// Bytes of it that are metadata.
    pub metadata_bytes: u64,
    /// Its identity.
    pub digest: Digest,
    /// Devices 1 to N.
    pub devices: Vec<Device>,
    /// Number of inodes.
    pub inodes: u64,
    /// Paths that were decided by layer order alone, sorted.
    pub conflicts: Vec<FileConflict>,
}

/// Why images could not be composed.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// A layer's metadata is bad.
    #[error("component image {image}: bad metadata at byte {offset}")]
    Layer {
        /// Identity of the image.
        image: Digest,
        /// Where.
        offset: u64,
        /// What is wrong.
        source: LayoutError,
    },
    /// The metadata is not of the image that it is said to be of.
    #[error("the metadata given for component image {image} is of another image")]
    Identity {
        /// Identity expected.
        image: Digest,
    },
    /// The per-VM files cannot be stored.
    #[error("cannot store the VM's own files")]
    PerVm(#[source] WriteError),
    /// A file, or the like, stands where an earlier layer has a directory.
    #[error("{path} is a directory in layer {below} and something else in layer {layer}")]
    OverDirectory {
        /// Absolute path.
        path: String,
        /// The layer whose entry cannot be there; the VM's own files come after the last.
        layer: usize,
        /// The layer that has the directory.
        below: usize,
    },
    /// The result would exceed what the format holds.
    #[error("the composed image would be too large: {0}")]
    TooLarge(&'static str),
}

/// Merges `layers`, first to last, and `per_vm` above them.
pub fn compose(
    layers: &[Layer<'_>],
    per_vm: &Tree,
    options: ComposeOptions,
) -> Result<Composed, ComposeError> {
    let mut own = Cursor::new(Vec::new());
    let written = write_image(per_vm, &mut own).map_err(ComposeError::PerVm)?;
    let own = own.into_inner();
    let (own_metadata, own_data) = own.split_at(written.image.metadata_bytes as usize);
    let mut sources = Vec::with_capacity(layers.len() + 1);
    for layer in layers {
        sources.push(Source::new(layer)?);
    }
    sources.push(Source::new(&Layer {
        image: written.image.digest,
        image_bytes: written.image.bytes,
        metadata: own_metadata,
        chunks: Some(&written.chunks),
        bundle: None,
    })?);
    let mut devices = devices_of(layers);
    let merged = links::merge(&mut sources)?;
    let table_slots = match options.layout {
        MapLayout::Devices => devices.len(),
        MapLayout::Flat => 0,
    };
    let places = emit::Places::new(&sources, &merged, table_slots)?;
    let own_blocks = own_data.len() as u64 / BLOCK_BYTES;
    let map_blocks = places.metadata_blocks + own_blocks;
    let end_block = map_devices(&mut devices, map_blocks)?;
    let shifts = shifts_of(layers, &devices, &places, own_metadata.len());
    let mut map_image = emit::Emitter {
        sources: &sources,
        merged: &merged,
        places: &places,
        shifts: &shifts,
    }
    .image(map_blocks, &devices[..table_slots], end_block);
    map_image[(places.metadata_blocks * BLOCK_BYTES) as usize..].copy_from_slice(own_data);
    let digest = Digest::from_bytes(Sha256::digest(&map_image).into());
    let at = UUID_OFFSET as usize;
    map_image[at..at + 16].copy_from_slice(&digest.uuid());
    let mut conflicts = merged.conflicts;
    conflicts.sort_by(|a, b| (&a.path, a.winner, a.loser).cmp(&(&b.path, b.winner, b.loser)));
    Ok(Composed {
        map_image,
        metadata_bytes: places.metadata_blocks * BLOCK_BYTES,
        digest,
        devices,
        inodes: merged.nodes.len() as u64,
        conflicts,
    })
}

/// One device for each image or bundle; a layer that occurs twice is one device.
fn devices_of(layers: &[Layer<'_>]) -> Vec<Device> {
    let mut devices: Vec<Device> = Vec::with_capacity(layers.len());
    for layer in layers {
        let (tag, bytes) = layer.device();
        if !devices.iter().any(|device| device.image == tag) {
            devices.push(Device {
                image: tag,
                image_bytes: bytes,
                blocks: (bytes / BLOCK_BYTES) as u32,
                mapped_block: 0,
            });
        }
    }
    devices
}

/// Gives the devices their addresses behind the map image; returns the end of the last.
fn map_devices(devices: &mut [Device], map_blocks: u64) -> Result<u64, ComposeError> {
    let mut block = map_blocks;
    for device in devices {
        let start = block.next_multiple_of(DEVICE_ALIGN_BLOCKS);
        block = start + u64::from(device.blocks);
        if block > u64::from(u32::MAX) {
            return Err(ComposeError::TooLarge("more than 16 TiB of components"));
        }
        device.mapped_block = start as u32;
    }
    Ok(block)
}

/// What to add to the block addresses of each source.
fn shifts_of(
    layers: &[Layer<'_>],
    devices: &[Device],
    places: &emit::Places,
    own_metadata_bytes: usize,
) -> Vec<i64> {
    let mapped = |layer: &Layer<'_>| {
        let (tag, _) = layer.device();
        let device = devices.iter().find(|device| device.image == tag);
        let within = layer
            .bundle
            .and_then(|bundle| bundle.offset_of(&layer.image))
            .unwrap_or(0);
        device.map_or(0, |device| {
            i64::from(device.mapped_block) + (within / BLOCK_BYTES) as i64
        })
    };
    let own_blocks = own_metadata_bytes as i64 / BLOCK_BYTES as i64;
    let own = places.metadata_blocks as i64 - own_blocks;
    layers.iter().map(mapped).chain([own]).collect()
}
