//! Do two layers mean the same by one path?
//!
//! Owns the comparison. Times are not compared: rebuilt packages differ in them without
//! anyone caring. Content is compared by chunk digests; without a chunk index on both
//! sides it counts as different.

use super::layer::Source;
use crate::erofs::layout::{BLOCK_BYTES, FileType, InodeRecord};
use crate::{Digest, Extent};

/// What one layer has at the path.
pub(super) struct Candidate<'s, 'a> {
    pub source: &'s Source<'a>,
    pub at: u32,
    pub record: InodeRecord,
}

impl Candidate<'_, '_> {
    /// Digests of the file's chunks, which start and end with it.
    fn content(&self) -> Option<Vec<Digest>> {
        let offset = u64::from(self.record.union) * BLOCK_BYTES;
        let len = self.record.size.next_multiple_of(BLOCK_BYTES);
        let chunks = self.source.layer.chunks?;
        let of_file = chunks.overlapping(Extent::new(offset, len));
        Some(of_file.iter().map(|chunk| chunk.digest).collect())
    }
}

/// True if it matters which of the two is used. Two directories never differ: they merge.
pub(super) fn differ(a: &Candidate<'_, '_>, b: &Candidate<'_, '_>) -> bool {
    if a.record.file_type != b.record.file_type {
        return true;
    }
    let owner = |record: &InodeRecord| (record.mode, record.uid, record.gid);
    match a.record.file_type {
        FileType::Directory => false,
        FileType::Symlink => a.source.target(a.at, &a.record) != b.source.target(b.at, &b.record),
        FileType::File => {
            owner(&a.record) != owner(&b.record)
                || a.source.xattr_area(a.at, &a.record) != b.source.xattr_area(b.at, &b.record)
                || a.record.size != b.record.size
                || (a.record.size > 0 && (a.content().is_none() || a.content() != b.content()))
        }
        _ => owner(&a.record) != owner(&b.record) || a.record.union != b.record.union,
    }
}
