//! Pages of one image: their numbers, counts, runs and sets.
//!
//! Owns the conversion between bytes and pages, so that neither a byte offset nor a bare
//! number is taken for a page. Refuses to know what being in a set means (resident, touched,
//! pinned).
//!
//! Page numbers have 32 bits: an image ends at 16 TiB, and byte offsets beyond that count as
//! the last page number.

mod set;
#[cfg(test)]
mod tests;

use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub, SubAssign};

use crate::extent::{Extent, PAGE_BYTES};

pub use set::{PageSet, Runs};

/// Number of a page of an image; the first one is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNo(pub u32);

impl PageNo {
    /// The page after the last one that an image can have.
    pub const END: Self = Self(u32::MAX);

    /// The page that holds byte `offset`.
    pub const fn containing(offset: u64) -> Self {
        Self(saturated(offset / PAGE_BYTES))
    }

    /// Its first byte.
    pub const fn offset(self) -> u64 {
        self.0 as u64 * PAGE_BYTES
    }

    /// Its place in a list of all pages of an image.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl Add<Pages> for PageNo {
    type Output = Self;

    /// Cut at [`PageNo::END`].
    fn add(self, pages: Pages) -> Self {
        Self(self.0.saturating_add(pages.0))
    }
}

impl Sub for PageNo {
    type Output = Pages;

    fn sub(self, earlier: Self) -> Pages {
        Pages(self.0 - earlier.0)
    }
}

/// A number of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pages(pub u32);

impl Pages {
    /// No page.
    pub const NONE: Self = Self(0);

    /// The pages that `bytes` bytes from a page's border on take, the last one in part.
    pub const fn covering(bytes: u64) -> Self {
        Self(saturated(bytes.div_ceil(PAGE_BYTES)))
    }

    /// Their bytes.
    pub const fn bytes(self) -> u64 {
        self.0 as u64 * PAGE_BYTES
    }
}

impl Add for Pages {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl Sub for Pages {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl AddAssign for Pages {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl SubAssign for Pages {
    fn sub_assign(&mut self, other: Self) {
        self.0 -= other.0;
    }
}

impl Sum for Pages {
    fn sum<I: Iterator<Item = Self>>(pages: I) -> Self {
        pages.fold(Self::NONE, Add::add)
    }
}

const fn saturated(pages: u64) -> u32 {
    if pages > u32::MAX as u64 {
        u32::MAX
    } else {
        pages as u32
    }
}

/// Pages `start..end` of an image, half open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRun {
    /// First page.
    pub start: PageNo,
    /// The page after the last one.
    pub end: PageNo,
}

impl PageRun {
    /// Every page that an image can have.
    pub const ALL: Self = Self::new(PageNo(0), PageNo::END);

    /// The pages `start..end`; empty if `end <= start`.
    pub const fn new(start: PageNo, end: PageNo) -> Self {
        Self { start, end }
    }

    /// All pages of an image of `bytes` bytes.
    pub const fn whole(bytes: u64) -> Self {
        Self::new(PageNo(0), PageNo(Pages::covering(bytes).0))
    }

    /// All pages that `extent` touches.
    pub const fn covering(extent: Extent) -> Self {
        let start = PageNo::containing(extent.offset);
        if extent.len == 0 {
            return Self::new(start, start);
        }
        Self::new(start, PageNo(Pages::covering(extent.end()).0))
    }

    /// The bytes of these pages.
    pub const fn extent(self) -> Extent {
        Extent::new(self.start.offset(), self.pages().bytes())
    }

    /// How many pages.
    pub const fn pages(self) -> Pages {
        Pages(self.end.0.saturating_sub(self.start.0))
    }

    /// Whether there is no page in it.
    pub const fn is_empty(self) -> bool {
        self.end.0 <= self.start.0
    }

    /// The pages that both have; may be empty.
    pub fn intersection(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self::new(start, self.end.min(other.end).max(start))
    }
}

impl From<std::ops::Range<u32>> for PageRun {
    fn from(pages: std::ops::Range<u32>) -> Self {
        Self::new(PageNo(pages.start), PageNo(pages.end))
    }
}
