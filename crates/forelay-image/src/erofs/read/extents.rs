//! Which bytes of an image belong to which file, and the reverse.
//!
//! Owns the answers that `map VM`, working sets and reports need. Invariant: each regular
//! file with content appears once, under its first path in name order.

use std::collections::BTreeSet;

use super::{Image, Inode, ReadError};
use crate::Extent;
use crate::erofs::layout::{DataLayout, FileType, LayoutError};

/// A run of a file's bytes on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedExtent {
    /// 0 for the image itself, k for the k-th device slot.
    pub device: u16,
    /// Where the run starts in the file.
    pub file_offset: u64,
    /// Bytes on the device.
    pub extent: Extent,
}

/// Where a regular file's bytes lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileExtents {
    /// Absolute path (the first one, for hard links).
    pub path: Vec<u8>,
    /// Inode number.
    pub inode: u64,
    /// Ranges of the image in file order. Of a map image: those in the map image itself.
    pub extents: Vec<Extent>,
}

impl Image<'_> {
    /// Where an inode's data lies, in file order, neighbours joined. Holes are left out.
    pub fn extents_of(&self, inode: &Inode) -> Result<Vec<PlacedExtent>, ReadError> {
        self.extents_within(inode, &mut self.pieces_max())
    }

    /// No honest image has more pieces than this: each takes at least 4 bytes of it.
    fn pieces_max(&self) -> u64 {
        self.bytes / 4
    }

    /// As [`Image::extents_of`]; takes the number of pieces looked at from `budget`, since
    /// many inodes of a hostile image may share one large chunk array.
    fn extents_within(
        &self,
        inode: &Inode,
        budget: &mut u64,
    ) -> Result<Vec<PlacedExtent>, ReadError> {
        let size = inode.record.size;
        let mut out: Vec<PlacedExtent> = Vec::new();
        let mut offset = 0;
        if inode.record.layout == DataLayout::Chunked && size > 0 {
            // The last chunk's entry must exist: this bounds the loop by the image's size.
            self.piece(inode, size - 1)?;
        }
        while offset < size {
            let piece = self.piece(inode, offset)?;
            *budget = budget.checked_sub(1).ok_or_else(|| {
                let source = LayoutError::corrupt("chunk arrays that overlap", size);
                let nid = inode.nid;
                ReadError::Inode { nid, source }
            })?;
            if let Some((device, at)) = piece.place {
                match out.last_mut() {
                    Some(last)
                        if last.device == device
                            && last.extent.end() == at
                            && last.file_offset + last.extent.len == offset =>
                    {
                        last.extent.len += piece.len;
                    }
                    _ => out.push(PlacedExtent {
                        device,
                        file_offset: offset,
                        extent: Extent::new(at, piece.len),
                    }),
                }
            }
            offset += piece.len;
        }
        Ok(out)
    }

    /// Regular files with content and where it lies in this image, by path.
    pub fn file_extents(&self) -> Result<Vec<FileExtents>, ReadError> {
        let mut out = Vec::new();
        let mut budget = self.pieces_max();
        self.visit_files(|path, inode| {
            let extents: Vec<_> = self
                .extents_within(inode, &mut budget)?
                .into_iter()
                .filter(|placed| placed.device == 0)
                .map(|placed| placed.extent)
                .collect();
            if !extents.is_empty() {
                out.push(FileExtents {
                    path: path.to_vec(),
                    inode: inode.nid,
                    extents,
                });
            }
            Ok(())
        })?;
        Ok(out)
    }

    /// Visits each regular file once, under its first path.
    pub fn visit_files(
        &self,
        mut visit: impl FnMut(&[u8], &Inode) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        let mut linked = BTreeSet::new();
        self.walk(|path, inode| {
            let is_file = inode.record.file_type == FileType::File;
            if is_file && (inode.record.nlink == 1 || linked.insert(inode.nid)) {
                visit(path, inode)?;
            }
            Ok(())
        })
    }
}
