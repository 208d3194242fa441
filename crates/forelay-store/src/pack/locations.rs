//! The locations of one chunk index: where each of its chunks is.
//!
//! One small object tells a host all it needs to fetch any chunk of an image, whatever
//! packs earlier publications left its chunks in.
//!
//! Body: chunk index 32 | packs u32 | packs x digest 32 | chunks u32 | chunks x (pack number u32 | offset u32 | stored bytes u32).
//!
//! Invariant of decoded locations: every pack number names a pack of the list.

use forelay_image::Digest;

use crate::sealed::{Reader, SealError, seal, unseal};

const MAGIC: &[u8; 8] = b"FLLOCATE";
const ENTRY_BYTES: usize = 12;

/// Where a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// Number of the pack in [`Locations::packs`].
    pub pack: u32,
    /// Where its frame starts in the pack.
    pub offset: u32,
    /// Length of the frame in bytes.
    pub stored_bytes: u32,
}

/// Where each chunk of an index is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locations {
    /// Digest of the chunk index.
    pub chunk_index: Digest,
    /// The packs that hold its chunks.
    pub packs: Vec<Digest>,
    /// One location per chunk, in image order.
    pub chunks: Vec<Location>,
}

impl Locations {
    /// The locations as a repository object.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(64 + self.packs.len() * 32 + self.chunks.len() * 12);
        body.extend_from_slice(self.chunk_index.as_bytes());
        body.extend_from_slice(&(self.packs.len() as u32).to_le_bytes());
        for pack in &self.packs {
            body.extend_from_slice(pack.as_bytes());
        }
        body.extend_from_slice(&(self.chunks.len() as u32).to_le_bytes());
        for chunk in &self.chunks {
            for field in [chunk.pack, chunk.offset, chunk.stored_bytes] {
                body.extend_from_slice(&field.to_le_bytes());
            }
        }
        seal(MAGIC, &body)
    }

    /// Reads locations.
    pub fn decode(bytes: &[u8]) -> Result<Self, SealError> {
        let mut body = Reader(unseal(MAGIC, bytes)?);
        let chunk_index = body.digest()?;
        let count = body.count(32)?;
        let packs = (0..count)
            .map(|_| body.digest())
            .collect::<Result<Vec<_>, _>>()?;
        let count = body.count(ENTRY_BYTES)?;
        let mut chunks = Vec::with_capacity(count);
        for _ in 0..count {
            let location = Location {
                pack: body.u32()?,
                offset: body.u32()?,
                stored_bytes: body.u32()?,
            };
            if location.pack as usize >= packs.len() {
                return Err(SealError::Body("a chunk lies in a pack that is not listed"));
            }
            chunks.push(location);
        }
        body.finish()?;
        Ok(Self {
            chunk_index,
            packs,
            chunks,
        })
    }
}
