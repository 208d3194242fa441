//! Chunk index: the ordered list of chunks that a component image is made of.
//!
//! Invariants (checked by [`ChunkIndex::validate`]): chunks are contiguous from byte 0
//! to the image's end, none is empty or longer than [`MAX_CHUNK_BYTES`].

use std::io;

use serde::{Deserialize, Serialize};

use crate::digest::Hasher;
use crate::{Digest, Extent};

mod codec;

pub use codec::ChunkCodecError;

/// Largest chunk, in bytes. Small enough for an IPFS block.
pub const MAX_CHUNK_BYTES: u64 = 1 << 20;

/// One chunk: a range of the image, named by the digest of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// First byte in the image.
    pub offset: u64,
    /// Length in bytes, at most [`MAX_CHUNK_BYTES`].
    pub len: u32,
    /// SHA-256 of the uncompressed bytes.
    pub digest: Digest,
}

impl Chunk {
    /// The range of the image that this chunk covers.
    pub const fn extent(&self) -> Extent {
        Extent::new(self.offset, self.len as u64)
    }
}

/// All chunks of one component image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkIndex {
    /// Identity of the image.
    pub image: Digest,
    /// Size of the image in bytes.
    pub image_bytes: u64,
    /// Contiguous chunks in image order.
    pub chunks: Vec<Chunk>,
}

/// Why a chunk index is not valid.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChunkIndexError {
    /// Chunks leave a gap or overlap.
    #[error("chunk {index} of image {image} starts at byte {found}, expected {expected}")]
    Gap {
        /// Identity of the image.
        image: Digest,
        /// Position of the chunk in the index.
        index: usize,
        /// Where the chunk should start.
        expected: u64,
        /// Where it starts.
        found: u64,
    },
    /// A chunk is empty or too long.
    #[error("chunk {index} of image {image} has {len} bytes; allowed are 1 to 1 MiB")]
    Length {
        /// Identity of the image.
        image: Digest,
        /// Position of the chunk in the index.
        index: usize,
        /// Its length in bytes.
        len: u32,
    },
    /// The chunks end before or after the image does.
    #[error("the chunks of image {image} end at byte {found}, but the image has {expected} bytes")]
    End {
        /// Identity of the image.
        image: Digest,
        /// The image's size in bytes.
        expected: u64,
        /// Where the last chunk ends.
        found: u64,
    },
}

impl ChunkIndex {
    /// The index of an image without files, cut into chunks of `chunk_bytes` each; `read` fills a
    /// buffer from an offset. The image's digest is that of its bytes.
    pub fn of_plain(
        image_bytes: u64,
        chunk_bytes: u32,
        mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<Self> {
        let mut whole = Hasher::new();
        let mut buffer = vec![0; chunk_bytes as usize];
        let zeros = Digest::of(&buffer);
        let mut chunks = Vec::new();
        for offset in (0..image_bytes).step_by(chunk_bytes as usize) {
            let len = u64::from(chunk_bytes).min(image_bytes - offset) as usize;
            let bytes = &mut buffer[..len];
            read(bytes, offset)?;
            whole.update(bytes);
            let is_zero = len == chunk_bytes as usize && bytes.iter().all(|byte| *byte == 0);
            chunks.push(Chunk {
                offset,
                len: len as u32,
                digest: if is_zero { zeros } else { Digest::of(bytes) },
            });
        }
        Ok(Self {
            image: whole.finish(),
            image_bytes,
            chunks,
        })
    }

    /// SHA-256 of the encoded index.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.encode())
    }

    /// Checks the invariants named in the module's header.
    pub fn validate(&self) -> Result<(), ChunkIndexError> {
        let image = self.image;
        let mut expected = 0u64;
        for (index, chunk) in self.chunks.iter().enumerate() {
            if chunk.offset != expected {
                let found = chunk.offset;
                return Err(ChunkIndexError::Gap {
                    image,
                    index,
                    expected,
                    found,
                });
            }
            if chunk.len == 0 || u64::from(chunk.len) > MAX_CHUNK_BYTES {
                return Err(ChunkIndexError::Length {
                    image,
                    index,
                    len: chunk.len,
                });
            }
            expected = expected.saturating_add(u64::from(chunk.len));
        }
        if expected != self.image_bytes {
            let found = expected;
            return Err(ChunkIndexError::End {
                image,
                expected: self.image_bytes,
                found,
            });
        }
        Ok(())
    }

    /// The chunks that overlap `extent`, in image order. `self` must be valid.
    pub fn overlapping(&self, extent: Extent) -> &[Chunk] {
        let first = self
            .chunks
            .partition_point(|chunk| chunk.extent().end() <= extent.offset);
        let last = self
            .chunks
            .partition_point(|chunk| chunk.offset < extent.end());
        &self.chunks[first.min(last)..last]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(lengths: &[u32]) -> ChunkIndex {
        let mut offset = 0;
        let chunks: Vec<_> = lengths
            .iter()
            .map(|&len| {
                let chunk = Chunk {
                    offset,
                    len,
                    digest: Digest::of(&offset.to_le_bytes()),
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

    #[test]
    fn a_plain_image_is_cut_into_equal_chunks_and_its_last_may_be_shorter() {
        let mut image = vec![0; 10_000];
        image[5000] = 1;
        let read = |buffer: &mut [u8], at: u64| {
            buffer.copy_from_slice(&image[at as usize..][..buffer.len()]);
            Ok(())
        };
        let index = ChunkIndex::of_plain(10_000, 4096, read).unwrap();
        index.validate().unwrap();
        assert_eq!(index.image, Digest::of(&image));
        let lengths: Vec<u32> = index.chunks.iter().map(|one| one.len).collect();
        assert_eq!(lengths, [4096, 4096, 1808]);
        assert!(index.chunks.iter().all(|one| {
            one.digest == Digest::of(&image[one.offset as usize..one.extent().end() as usize])
        }));
    }

    #[test]
    fn overlapping_finds_exactly_the_chunks_of_a_range() {
        let index = index(&[4096, 8192, 4096]);
        index.validate().unwrap();
        let offsets = |offset, len| {
            let found = index.overlapping(Extent::new(offset, len));
            found.iter().map(|chunk| chunk.offset).collect::<Vec<_>>()
        };
        assert_eq!(offsets(0, 4096), [0]);
        assert_eq!(offsets(4095, 2), [0, 4096]);
        assert_eq!(offsets(0, 16384), [0, 4096, 12288]);
        assert_eq!(offsets(16384, 4096), [0u64; 0]);
    }

    #[test]
    fn validate_refuses_gaps_and_bad_lengths() {
        let mut gap = index(&[4096, 4096]);
        gap.chunks[1].offset = 8192;
        assert!(matches!(
            gap.validate(),
            Err(ChunkIndexError::Gap { index: 1, .. })
        ));
        assert!(matches!(
            index(&[0]).validate(),
            Err(ChunkIndexError::Length { .. })
        ));
        let mut short = index(&[4096]);
        short.image_bytes = 8192;
        assert!(matches!(short.validate(), Err(ChunkIndexError::End { .. })));
    }
}
