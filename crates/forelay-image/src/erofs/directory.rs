//! Directory blocks: sorted entries, then their names.
//!
//! Owns the packing of entries into blocks and its inverse. Entries are in byte order of
//! their names over all blocks, `.` and `..` among them. Refuses to know where blocks lie.

use std::ops::Range;

use super::layout::{BLOCK_BYTES, DIRENT_BYTES, LayoutError, NAME_BYTES_MAX, u16_at, u64_at};

const BLOCK: usize = BLOCK_BYTES as usize;

/// Adds up the bytes that a directory's entries take.
#[derive(Clone, Copy, Debug, Default)]
pub struct Packing {
    full_blocks: u64,
    used: usize,
}

impl Packing {
    /// Accounts for the next entry.
    pub const fn add(&mut self, name_len: usize) {
        let need = DIRENT_BYTES + name_len;
        if self.used + need > BLOCK {
            self.full_blocks += 1;
            self.used = 0;
        }
        self.used += need;
    }

    /// Size of the directory in bytes.
    pub const fn size(&self) -> u64 {
        self.full_blocks * BLOCK_BYTES + self.used as u64
    }
}

/// One entry to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dirent<'a> {
    /// File name.
    pub name: &'a [u8],
    /// Inode number.
    pub nid: u64,
    /// Type code of the entry.
    pub file_type: u8,
}

/// Writes the entries of one block from `range.start` on into `out` (zeroed, at most one
/// block) and returns the range that fitted.
pub fn pack_block<'a>(
    range: Range<usize>,
    entry: impl Fn(usize) -> Dirent<'a>,
    out: &mut [u8],
) -> Range<usize> {
    let mut used = 0;
    let mut end = range.start;
    while end < range.end {
        let need = DIRENT_BYTES + entry(end).name.len();
        if used + need > BLOCK {
            break;
        }
        used += need;
        end += 1;
    }
    let mut name_at = (end - range.start) * DIRENT_BYTES;
    for (slot, index) in (range.start..end).enumerate() {
        let Dirent {
            name,
            nid,
            file_type,
        } = entry(index);
        let at = slot * DIRENT_BYTES;
        out[at..at + 8].copy_from_slice(&nid.to_le_bytes());
        out[at + 8..at + 10].copy_from_slice(&(name_at as u16).to_le_bytes());
        out[at + 10] = file_type;
        out[name_at..name_at + name.len()].copy_from_slice(name);
        name_at += name.len();
    }
    range.start..end
}

/// Entries of one directory block, checked one by one.
#[derive(Clone, Debug)]
pub struct BlockEntries<'a> {
    block: &'a [u8],
    count: usize,
    next: usize,
}

impl<'a> BlockEntries<'a> {
    /// Starts reading `block` (the last one of a directory may be short).
    pub fn new(block: &'a [u8]) -> Result<Self, LayoutError> {
        if block.len() < DIRENT_BYTES || block.len() > BLOCK {
            return Err(LayoutError::Truncated("a directory block"));
        }
        let names = usize::from(u16_at(block, 8));
        if names < DIRENT_BYTES || names % DIRENT_BYTES != 0 || names >= block.len() {
            let value = names as u64;
            return Err(LayoutError::corrupt("offset of the first name", value));
        }
        Ok(Self {
            block,
            count: names / DIRENT_BYTES,
            next: 0,
        })
    }

    fn entry(&self, index: usize) -> Result<Dirent<'a>, LayoutError> {
        let at = index * DIRENT_BYTES;
        let start = usize::from(u16_at(self.block, at + 8));
        let last = index + 1 == self.count;
        let end = if last {
            self.block.len()
        } else {
            usize::from(u16_at(self.block, at + DIRENT_BYTES + 8))
        };
        let bad = |value: usize| LayoutError::corrupt("name of a directory entry", value as u64);
        if start < self.count * DIRENT_BYTES || start >= end || end > self.block.len() {
            return Err(bad(start));
        }
        let mut name = &self.block[start..end];
        if last {
            let len = name.iter().position(|&byte| byte == 0);
            name = &name[..len.unwrap_or(name.len())];
        }
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(bad(name.len()));
        }
        if name.iter().any(|&byte| byte == 0 || byte == b'/') {
            return Err(bad(start));
        }
        Ok(Dirent {
            name,
            nid: u64_at(self.block, at),
            file_type: self.block[at + 10],
        })
    }
}

impl<'a> Iterator for BlockEntries<'a> {
    type Item = Result<Dirent<'a>, LayoutError>;

    fn next(&mut self) -> Option<Self::Item> {
        let index = self.next;
        if index >= self.count {
            return None;
        }
        self.next += 1;
        let entry = self.entry(index);
        if entry.is_err() {
            self.next = self.count;
        }
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_entries_read_back_over_several_blocks() {
        let names: Vec<String> = (0..700).map(|i| format!("name-{i:05}")).collect();
        let mut packing = Packing::default();
        names.iter().for_each(|name| packing.add(name.len()));
        let size = packing.size() as usize;
        assert!(size > 3 * BLOCK);
        let mut bytes = vec![0; size];
        let entry = |index: usize| Dirent {
            name: names[index].as_bytes(),
            nid: index as u64 + (1 << 40),
            file_type: 1,
        };
        let mut done = 0;
        for block in bytes.chunks_mut(BLOCK) {
            done = pack_block(done..names.len(), entry, block).end;
        }
        assert_eq!(done, names.len());
        let read: Vec<_> = bytes
            .chunks(BLOCK)
            .flat_map(|block| BlockEntries::new(block).unwrap())
            .map(Result::unwrap)
            .collect();
        assert_eq!(read, (0..700).map(entry).collect::<Vec<_>>());
    }

    #[test]
    fn bad_blocks_are_refused() {
        assert!(BlockEntries::new(&[0; 8]).is_err());
        assert!(BlockEntries::new(&[0; 64]).is_err());
        let mut block = vec![0; 64];
        let entry = |_| Dirent {
            name: b"a/b",
            nid: 1,
            file_type: 1,
        };
        pack_block(0..1, entry, &mut block);
        assert!(BlockEntries::new(&block).unwrap().next().unwrap().is_err());
    }
}
