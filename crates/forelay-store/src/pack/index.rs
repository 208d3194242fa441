//! The index of one pack: which chunks it holds and where.
//!
//! Body: pack digest 32 | pack bytes u64 | count u32 | count x (chunk digest 32 |
//! offset u32 | stored bytes u32 | chunk bytes u32), in pack order.
//!
//! Invariant of a decoded index: entries are in pack order, do not overlap, lie within
//! the pack, and no chunk is longer than [`MAX_CHUNK_BYTES`].

use forelay_image::Digest;
use forelay_image::chunk::MAX_CHUNK_BYTES;

use crate::sealed::{Reader, SealError, seal, unseal};

const MAGIC: &[u8; 8] = b"FLPACKIX";
const ENTRY_BYTES: usize = 44;

/// One chunk of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackEntry {
    /// The chunk.
    pub chunk: Digest,
    /// Where its frame starts in the pack.
    pub offset: u32,
    /// Length of the frame in bytes.
    pub stored_bytes: u32,
    /// Length of the chunk in bytes.
    pub chunk_bytes: u32,
}

/// Which chunks a pack holds and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackIndex {
    /// SHA-256 of the pack.
    pub pack: Digest,
    /// Size of the pack in bytes.
    pub pack_bytes: u64,
    /// Its chunks in pack order.
    pub entries: Vec<PackEntry>,
}

impl PackIndex {
    /// The index as a repository object.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(44 + self.entries.len() * ENTRY_BYTES);
        body.extend_from_slice(self.pack.as_bytes());
        body.extend_from_slice(&self.pack_bytes.to_le_bytes());
        body.extend_from_slice(&(self.entries.len() as u32).to_le_bytes());
        for entry in &self.entries {
            body.extend_from_slice(entry.chunk.as_bytes());
            for field in [entry.offset, entry.stored_bytes, entry.chunk_bytes] {
                body.extend_from_slice(&field.to_le_bytes());
            }
        }
        seal(MAGIC, &body)
    }

    /// Reads an index.
    pub fn decode(bytes: &[u8]) -> Result<Self, SealError> {
        let mut body = Reader(unseal(MAGIC, bytes)?);
        let pack = body.digest()?;
        let pack_bytes = body.u64()?;
        let count = body.count(ENTRY_BYTES)?;
        let mut entries = Vec::with_capacity(count);
        let mut end = 0;
        for _ in 0..count {
            let entry = PackEntry {
                chunk: body.digest()?,
                offset: body.u32()?,
                stored_bytes: body.u32()?,
                chunk_bytes: body.u32()?,
            };
            if u64::from(entry.offset) < end {
                return Err(SealError::Body("chunks overlap"));
            }
            end = u64::from(entry.offset) + u64::from(entry.stored_bytes);
            if end > pack_bytes {
                return Err(SealError::Body("a chunk lies beyond the pack's end"));
            }
            check_lengths(entry.stored_bytes, entry.chunk_bytes)?;
            entries.push(entry);
        }
        body.finish()?;
        Ok(Self {
            pack,
            pack_bytes,
            entries,
        })
    }
}

/// Refuses lengths that no writer produces and that a reader should not allocate for.
pub(super) fn check_lengths(stored_bytes: u32, chunk_bytes: u32) -> Result<(), SealError> {
    if chunk_bytes == 0 || u64::from(chunk_bytes) > MAX_CHUNK_BYTES {
        return Err(SealError::Body("a chunk is empty or longer than 1 MiB"));
    }
    if stored_bytes == 0 || stored_bytes > chunk_bytes {
        return Err(SealError::Body("a frame is empty or longer than its chunk"));
    }
    Ok(())
}
