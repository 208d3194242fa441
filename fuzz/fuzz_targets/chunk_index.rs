//! Any bytes as a chunk index: what decodes encodes to the same index.
#![no_main]

use forelay_image::ChunkIndex;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(index) = ChunkIndex::decode(bytes) {
        assert_eq!(ChunkIndex::decode(&index.encode()).as_ref(), Ok(&index));
    }
});
