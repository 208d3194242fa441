//! Any bytes as a chunk index: what decodes encodes to the same index.

use forelay_image::ChunkIndex;

/// Takes one input.
pub fn run(bytes: &[u8]) {
    if let Ok(index) = ChunkIndex::decode(bytes) {
        assert_eq!(ChunkIndex::decode(&index.encode()).as_ref(), Ok(&index));
    }
}
