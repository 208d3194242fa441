//! Binary form of a chunk index.
//!
//! Owns the bytes of `chunks/<image>.idx`. Refuses to trust them: everything is checked
//! by length, checksum and [`ChunkIndex::validate`] before an index is returned, and memory
//! is bounded by the input's length. Chunks are contiguous, so offsets are not stored.
//!
//! ```text
//! 0   magic "FRLYCHNK"
//! 8   version (1), header_bytes (80 or more: later versions may append)
//! 16  features: compatible, read-only compatible, incompatible
//! 28  number of chunks
//! 32  image digest (32 bytes)
//! 64  image bytes (8), reserved (8)
//! header_bytes   per chunk: length (4), digest (32)
//! end - 32       SHA-256 of all before
//! ```
//! Integers are little-endian. An unknown compatible feature may be ignored, with an
//! unknown read-only compatible one the index may be used but not rewritten, an unknown
//! incompatible one forbids both.

use super::ChunkIndexError;
use crate::{Chunk, ChunkIndex, Digest};

const MAGIC: &[u8; 8] = b"FRLYCHNK";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 80;
const ENTRY_BYTES: usize = 36;
const CHECKSUM_BYTES: usize = 32;
/// Incompatible features that this version knows: none yet.
const KNOWN_INCOMPATIBLE: u32 = 0;

/// Why bytes are not a chunk index that can be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChunkCodecError {
    /// Some other file.
    #[error("not a chunk index")]
    Magic,
    /// Written by a later Forelay.
    #[error("chunk index has version {0}; this Forelay reads version 1: update it")]
    Version(u32),
    /// Written by a later Forelay, with features that this one must not ignore.
    #[error("chunk index uses features {0:#x} that this Forelay does not know: update it")]
    Features(u32),
    /// Cut off, or with bytes too many.
    #[error("chunk index has {found} bytes, its header says {expected}")]
    Length {
        /// Bytes expected.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// Bytes changed.
    #[error("chunk index is corrupt: wrong checksum")]
    Checksum,
    /// Well-formed, but not a possible index.
    #[error("chunk index is not valid")]
    Invalid(#[from] ChunkIndexError),
}

impl ChunkIndex {
    /// The binary form. `self` should be valid, or nobody will read it.
    pub fn encode(&self) -> Vec<u8> {
        let bytes = HEADER_BYTES + self.chunks.len() * ENTRY_BYTES + CHECKSUM_BYTES;
        let mut out = Vec::with_capacity(bytes);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((HEADER_BYTES as u32).to_le_bytes());
        out.extend([0; 12]);
        out.extend((self.chunks.len() as u32).to_le_bytes());
        out.extend(self.image.as_bytes());
        out.extend(self.image_bytes.to_le_bytes());
        out.extend([0; 8]);
        for chunk in &self.chunks {
            out.extend(chunk.len.to_le_bytes());
            out.extend(chunk.digest.as_bytes());
        }
        let checksum = Digest::of(&out);
        out.extend(checksum.as_bytes());
        out
    }

    /// Reads the binary form.
    pub fn decode(bytes: &[u8]) -> Result<Self, ChunkCodecError> {
        if bytes.get(..8) != Some(MAGIC) {
            return Err(ChunkCodecError::Magic);
        }
        let found = bytes.len() as u64;
        let wrong_length = |expected| ChunkCodecError::Length { expected, found };
        let minimum = HEADER_BYTES + CHECKSUM_BYTES;
        if bytes.len() < minimum {
            return Err(wrong_length(minimum as u64));
        }
        let (body, checksum) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
        if u32_at(body, 8) != VERSION {
            return Err(ChunkCodecError::Version(u32_at(body, 8)));
        }
        let incompatible = u32_at(body, 24) & !KNOWN_INCOMPATIBLE;
        if incompatible != 0 {
            return Err(ChunkCodecError::Features(incompatible));
        }
        let header_bytes = u64::from(u32_at(body, 12));
        let count = u64::from(u32_at(body, 28));
        let expected = header_bytes + count * ENTRY_BYTES as u64 + CHECKSUM_BYTES as u64;
        if header_bytes < HEADER_BYTES as u64 || expected != found {
            return Err(wrong_length(expected.max(minimum as u64)));
        }
        if Digest::of(body).as_bytes() != checksum {
            return Err(ChunkCodecError::Checksum);
        }
        let mut offset = 0u64;
        let entries = body[header_bytes as usize..].chunks_exact(ENTRY_BYTES);
        let chunks = entries.map(|entry| {
            let chunk = Chunk {
                offset,
                len: u32_at(entry, 0),
                digest: digest_at(entry, 4),
            };
            offset += u64::from(chunk.len);
            chunk
        });
        let index = Self {
            chunks: chunks.collect(),
            image: digest_at(body, 32),
            image_bytes: u64::from(u32_at(body, 64)) | u64::from(u32_at(body, 68)) << 32,
        };
        index.validate()?;
        Ok(index)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn digest_at(bytes: &[u8], at: usize) -> Digest {
    let mut digest = [0; 32];
    digest.copy_from_slice(&bytes[at..at + 32]);
    Digest::from_bytes(digest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn index(lengths: &[u32]) -> ChunkIndex {
        let mut offset = 0;
        let chunks: Vec<Chunk> = lengths
            .iter()
            .map(|&len| {
                let digest = Digest::of(&[len as u8]);
                let chunk = Chunk {
                    offset,
                    len,
                    digest,
                };
                offset += u64::from(len);
                chunk
            })
            .collect();
        ChunkIndex {
            image: Digest::of(b"image"),
            image_bytes: offset,
            chunks,
        }
    }

    /// Bytes with a field changed and the checksum made right again.
    fn patched(at: usize, value: u32) -> Vec<u8> {
        let mut bytes = index(&[4096, 8192]).encode();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let body = bytes.len() - CHECKSUM_BYTES;
        let checksum = *Digest::of(&bytes[..body]).as_bytes();
        bytes[body..].copy_from_slice(&checksum);
        bytes
    }

    #[test]
    fn feature_flags_mean_what_they_say() {
        assert!(ChunkIndex::decode(&patched(16, 1)).is_ok(), "compatible");
        let unknown = patched(20, 1);
        assert!(ChunkIndex::decode(&unknown).is_ok(), "read-only compatible");
        assert_eq!(
            ChunkIndex::decode(&patched(24, 2)),
            Err(ChunkCodecError::Features(2))
        );
        assert_eq!(
            ChunkIndex::decode(&patched(8, 2)),
            Err(ChunkCodecError::Version(2))
        );
        assert!(matches!(
            ChunkIndex::decode(&patched(28, u32::MAX)),
            Err(ChunkCodecError::Length { .. })
        ));
        assert!(matches!(
            ChunkIndex::decode(&patched(80, 0)),
            Err(ChunkCodecError::Invalid(_))
        ));
    }

    #[test]
    fn binary_form_is_stable() {
        let digest = Digest::of(&index(&[4096, 1 << 20]).encode());
        let golden = "sha256:dc232743c48d27266bf9f591f7d9215bd102e9f3bb722b57f977dd3b10063b23";
        assert_eq!(digest.to_string(), golden);
    }

    proptest! {
        #[test]
        fn round_trips_and_every_changed_byte_is_noticed(
            lengths in prop::collection::vec(1u32..=1 << 20, 0..20),
            at in any::<prop::sample::Index>(),
            flip in 1u8..,
        ) {
            let index = index(&lengths);
            let mut bytes = index.encode();
            prop_assert_eq!(ChunkIndex::decode(&bytes), Ok(index));
            let at = at.index(bytes.len());
            prop_assert!(ChunkIndex::decode(&bytes[..at]).is_err());
            bytes[at] ^= flip;
            prop_assert!(ChunkIndex::decode(&bytes).is_err());
        }
    }
}
