//! Packs: repository objects that hold many compressed chunks.
//!
//! A pack is nothing but frames one after another; what is where stands in its index and
//! in the locations of the images that use it. Chunks lie in image order, so that
//! neighbours in an image are neighbours in a pack.
//!
//! Invariant: a stored length equal to the chunk's length means "stored as is"; a
//! compressed frame is always shorter.

mod index;
mod locations;
mod writer;

pub use index::{PackEntry, PackIndex};
pub use locations::{Location, Locations};
pub use writer::{FinishedPack, PackWriter};

use forelay_image::Digest;

/// A pack is closed once it has this many bytes.
pub const PACK_TARGET_BYTES: u64 = 32 << 20;

/// A pack is closed once it has so many chunks, so that its index stays small
/// ([`crate::layout::most_bytes`]).
pub const PACK_MOST_CHUNKS: usize = 1 << 18;

/// zstd's level: its default, fast enough that publishing is bound by reading and hashing.
pub const ZSTD_LEVEL: i32 = 3;

/// Why a frame does not give its chunk.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Not a zstd frame of that chunk.
    #[error("the frame cannot be decompressed")]
    Decompress(#[source] std::io::Error),
    /// The bytes are not those of the chunk.
    #[error("the bytes have digest {found}, not {expected}")]
    Digest {
        /// The chunk's digest.
        expected: Digest,
        /// Digest of what arrived.
        found: Digest,
    },
}

/// Decompresses a frame and checks that it is the chunk `digest` of `len` bytes.
pub fn open_frame(frame: &[u8], len: u32, digest: Digest) -> Result<Vec<u8>, FrameError> {
    let bytes = if frame.len() == len as usize {
        frame.to_vec()
    } else {
        zstd::bulk::decompress(frame, len as usize).map_err(FrameError::Decompress)?
    };
    let found = Digest::of(&bytes);
    if found != digest {
        return Err(FrameError::Digest {
            expected: digest,
            found,
        });
    }
    Ok(bytes)
}
