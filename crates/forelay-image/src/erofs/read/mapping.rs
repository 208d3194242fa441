//! From a file offset to a device and a byte on it.
//!
//! Owns the three data layouts and the two ways to address devices. Invariant: a piece
//! that is returned lies wholly within its device as far as the image says.

use super::{Image, Inode, ReadError, read_exact};
use crate::erofs::layout::{BLOCK_BYTES, DataLayout, LayoutError, u16_at, u32_at};

const CHUNK_BITS_MASK: u32 = 0x1F;
const CHUNK_INDEXES: u32 = 0x20;
const CHUNK_FORMAT_MASK: u32 = CHUNK_BITS_MASK | CHUNK_INDEXES;
const HOLE: u32 = u32::MAX;

/// A run of file bytes in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// `None` for a hole (zeros); device 0 is the image itself, k the k-th slot.
    pub place: Option<(u16, u64)>,
    /// Bytes from the asked offset on.
    pub len: u64,
}

impl Image<'_> {
    /// Reads file, directory or symlink data; `offset + buffer.len()` is within the size.
    pub(super) fn read_data(
        &self,
        inode: &Inode,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), ReadError> {
        let mut done = 0;
        while done < buffer.len() {
            let piece = self.piece(inode, offset + done as u64)?;
            let len = piece.len.min((buffer.len() - done) as u64) as usize;
            let part = &mut buffer[done..done + len];
            match piece.place {
                None => part.fill(0),
                Some((0, at)) => read_exact(self.source, part, at)?,
                Some((device, at)) => {
                    let device = &self.devices[usize::from(device) - 1];
                    let source = device.source.ok_or_else(|| ReadError::DeviceMissing {
                        nid: inode.nid,
                        tag: String::from_utf8_lossy(&device.slot.tag).into_owned(),
                    })?;
                    read_exact(source, part, at)?;
                }
            }
            done += len;
        }
        Ok(())
    }

    /// The piece that starts at `offset`, which is less than the inode's size.
    pub(super) fn piece(&self, inode: &Inode, offset: u64) -> Result<Piece, ReadError> {
        let size = inode.record.size;
        let first = u64::from(inode.record.union) * BLOCK_BYTES;
        match inode.record.layout {
            DataLayout::Plain => self.placed(inode, 0, first, offset, size - offset),
            DataLayout::Inline => {
                let whole = size / BLOCK_BYTES * BLOCK_BYTES;
                if offset < whole {
                    return self.placed(inode, 0, first, offset, whole - offset);
                }
                let tail = self.tail_offset(inode)?;
                if tail % BLOCK_BYTES + size % BLOCK_BYTES > BLOCK_BYTES {
                    return Err(corrupt(inode, "inline data crosses a block", tail));
                }
                let (at, len) = (tail + offset - whole, size - offset);
                self.check(inode, at, len, self.bytes)?;
                let place = Some((0, at));
                Ok(Piece { place, len })
            }
            DataLayout::Chunked => self.chunk_piece(inode, offset),
        }
    }

    fn tail_offset(&self, inode: &Inode) -> Result<u64, ReadError> {
        let record = &inode.record;
        Ok(self.inode_offset(inode.nid)? + record.header_bytes + record.xattr_bytes)
    }

    fn chunk_piece(&self, inode: &Inode, offset: u64) -> Result<Piece, ReadError> {
        let format = inode.record.union & 0xFFFF;
        if format & !CHUNK_FORMAT_MASK != 0 {
            return Err(corrupt(inode, "chunk format", format.into()));
        }
        let chunk_bytes = BLOCK_BYTES << (format & CHUNK_BITS_MASK);
        let unit: u64 = if format & CHUNK_INDEXES != 0 { 8 } else { 4 };
        let within = offset % chunk_bytes;
        let at = (offset / chunk_bytes)
            .checked_mul(unit)
            .and_then(|at| at.checked_add(self.tail_offset(inode).ok()?.next_multiple_of(unit)));
        let at = at.ok_or_else(|| corrupt(inode, "chunk array", offset))?;
        self.check(inode, at, unit, self.bytes)?;
        let mut entry = [0; 8];
        read_exact(self.source, &mut entry[..unit as usize], at)?;
        let (device, block) = match unit {
            8 => (u16_at(&entry, 2), u32_at(&entry, 4)),
            _ => (0, u32_at(&entry, 0)),
        };
        let len = (chunk_bytes - within).min(inode.record.size - offset);
        if block == HOLE {
            return Ok(Piece { place: None, len });
        }
        // As in the kernel, bits of the device id that no device needs are ignored.
        let mask = (self.devices.len() + 1).next_power_of_two() as u64 - 1;
        let device = (u64::from(device) & mask) as u16;
        self.placed(inode, device, u64::from(block) * BLOCK_BYTES, within, len)
    }

    /// Resolves `first + offset` on `device`; on device 0 it may be a unified address.
    fn placed(
        &self,
        inode: &Inode,
        device: u16,
        first: u64,
        offset: u64,
        len: u64,
    ) -> Result<Piece, ReadError> {
        let at = first
            .checked_add(offset)
            .ok_or_else(|| corrupt(inode, "block address", first))?;
        if device > 0 {
            let Some(slot) = self.devices.get(usize::from(device) - 1) else {
                return Err(corrupt(inode, "device id", device.into()));
            };
            let end = u64::from(slot.slot.blocks) * BLOCK_BYTES;
            self.check(inode, at, len, end)?;
            let place = Some((device, at));
            return Ok(Piece { place, len });
        }
        for (index, device) in self.devices.iter().enumerate() {
            let start = u64::from(device.slot.mapped_block) * BLOCK_BYTES;
            let bytes = u64::from(device.slot.blocks) * BLOCK_BYTES;
            if start != 0 && at >= start && at - start < bytes {
                self.check(inode, at - start, len, bytes)?;
                let place = Some((index as u16 + 1, at - start));
                return Ok(Piece { place, len });
            }
        }
        self.check(inode, at, len, self.bytes)?;
        let place = Some((0, at));
        Ok(Piece { place, len })
    }

    fn check(&self, inode: &Inode, offset: u64, bytes: u64, end: u64) -> Result<(), ReadError> {
        if offset.checked_add(bytes).is_none_or(|last| last > end) {
            let nid = inode.nid;
            return Err(ReadError::OutOfBounds { nid, offset, bytes });
        }
        Ok(())
    }
}

fn corrupt(inode: &Inode, what: &'static str, value: u64) -> ReadError {
    let nid = inode.nid;
    let source = LayoutError::corrupt(what, value);
    ReadError::Inode { nid, source }
}
