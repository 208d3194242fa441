//! Where metadata goes: inodes first, then the directory and symlink blocks that do not
//! fit behind their inode.
//!
//! Owns offsets only, no bytes. Invariant: an inode with what is stored behind it never
//! crosses a block border unless it is longer than a block (then nothing is inline).

use super::layout::{BLOCK_BYTES, INODE_BYTES, INODE_SLOT_BYTES};

/// How a directory's or symlink's bytes are split between blocks and the inode's tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Split {
    /// Whole blocks in the block area.
    pub blocks: u64,
    /// Bytes behind the inode; 0 if everything is in blocks.
    pub inline_bytes: u64,
}

/// Decides the split for `size` bytes behind an inode with `xattr_bytes` of attributes.
pub(super) const fn split(size: u64, xattr_bytes: u64) -> Split {
    let tail = size % BLOCK_BYTES;
    if tail != 0 && INODE_BYTES + xattr_bytes + tail <= BLOCK_BYTES {
        return Split {
            blocks: size / BLOCK_BYTES,
            inline_bytes: tail,
        };
    }
    Split {
        blocks: size.div_ceil(BLOCK_BYTES),
        inline_bytes: 0,
    }
}

/// Hands out places for inode records in order.
#[derive(Clone, Copy, Debug)]
pub(super) struct InodePlaces {
    cursor: u64,
}

impl InodePlaces {
    /// Places start at `offset`, which is slot-aligned.
    pub const fn new(offset: u64) -> Self {
        Self { cursor: offset }
    }

    /// The byte offset for a record of `bytes`.
    pub const fn place(&mut self, bytes: u64) -> u64 {
        let room = BLOCK_BYTES - self.cursor % BLOCK_BYTES;
        if bytes > room && bytes <= BLOCK_BYTES {
            self.cursor += room;
        }
        let at = self.cursor;
        self.cursor = (at + bytes).next_multiple_of(INODE_SLOT_BYTES);
        at
    }

    /// The first block behind all records.
    pub const fn end_block(&self) -> u64 {
        self.cursor.div_ceil(BLOCK_BYTES)
    }
}
