//! Byte ranges of a component image, the unit in which touches are observed and
//! prefetches are planned.
//!
//! Invariant of extents that describe residency or touches: offset and length are
//! multiples of [`PAGE_BYTES`].

use serde::{Deserialize, Serialize};

/// Size of a page and of an EROFS block, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// pmem devices are sized in multiples of this, in bytes.
pub const PMEM_ALIGN_BYTES: u64 = 2 << 20;

/// `len` bytes from `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl Extent {
    /// The extent of `len` bytes from `offset`.
    pub const fn new(offset: u64, len: u64) -> Self {
        Self { offset, len }
    }

    /// The byte after the last one.
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// The bytes that both have, if any.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let offset = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        (offset < end).then(|| Self::new(offset, end - offset))
    }

    /// This extent widened to page borders.
    pub fn page_aligned(&self) -> Self {
        let offset = self.offset / PAGE_BYTES * PAGE_BYTES;
        Self::new(offset, self.end().next_multiple_of(PAGE_BYTES) - offset)
    }
}

/// Sorts extents and joins those that overlap or touch.
pub fn normalise(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.retain(|extent| extent.len > 0);
    extents.sort_unstable();
    let mut out: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        match out.last_mut() {
            Some(last) if extent.offset <= last.end() => {
                last.len = last.end().max(extent.end()) - last.offset;
            }
            _ => out.push(extent),
        }
    }
    out
}

/// Bytes covered by `extents` (which must not overlap).
pub fn total_bytes(extents: &[Extent]) -> u64 {
    extents.iter().map(|extent| extent.len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalise_joins_touching_and_overlapping_extents() {
        let joined = normalise(vec![
            Extent::new(8192, 4096),
            Extent::new(0, 4096),
            Extent::new(4096, 4096),
            Extent::new(20480, 0),
            Extent::new(32768, 8192),
            Extent::new(36864, 4096),
        ]);
        assert_eq!(joined, [Extent::new(0, 12288), Extent::new(32768, 8192)]);
        assert_eq!(total_bytes(&joined), 20480);
    }

    #[test]
    fn page_aligned_widens() {
        assert_eq!(Extent::new(4097, 1).page_aligned(), Extent::new(4096, 4096));
        assert_eq!(Extent::new(4095, 2).page_aligned(), Extent::new(0, 8192));
    }
}
