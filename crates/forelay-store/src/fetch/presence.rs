//! What of each image is in the disk cache, kept until the cache's content changes: who asks
//! of many extents every few seconds costs nothing while nothing happens.
//!
//! Invariant: an answer is the one that asking the cache for every chunk would give, at some
//! moment of the call.

use std::collections::HashMap;
use std::sync::Arc;

use forelay_image::extent::normalise;
use forelay_image::{Digest, Extent};
use parking_lot::Mutex;

use crate::disk_cache::DiskCache;
use crate::images::ImageMap;

/// What an image lacks in the disk cache.
struct Kept {
    /// Of which generation of the cache.
    generation: u64,
    /// Disjoint and sorted.
    absent: Arc<[Extent]>,
}

/// See the module's header.
#[derive(Default)]
pub(super) struct Presence(Mutex<HashMap<Digest, Kept>>);

impl Presence {
    /// What the cache lacks of an image, disjoint and sorted.
    pub(super) fn absent(&self, cache: &DiskCache, map: &ImageMap) -> Arc<[Extent]> {
        // Before the chunks are looked at: what changes meanwhile is looked at again.
        let generation = cache.generation();
        let image = map.image.digest;
        if let Some(kept) = self.0.lock().get(&image)
            && kept.generation == generation
        {
            return Arc::clone(&kept.absent);
        }
        let missing = cache.missing(&map.index.chunks);
        let absent: Arc<[Extent]> = normalise(missing).into();
        let kept = Kept {
            generation,
            absent: Arc::clone(&absent),
        };
        self.0.lock().insert(image, kept);
        absent
    }
}

#[cfg(test)]
mod tests {
    use forelay_image::component::ImageRef;
    use forelay_image::{Chunk, ChunkIndex};
    use proptest::prelude::*;

    use super::*;
    use crate::pack::Locations;

    const CHUNK_BYTES: u64 = 4096;
    const CHUNKS: u64 = 12;

    fn bytes(number: u64) -> Vec<u8> {
        // Every third chunk has the same content as the one before it.
        let content = if number % 3 == 2 { number - 1 } else { number };
        vec![content as u8; CHUNK_BYTES as usize]
    }

    fn image() -> ImageMap {
        let chunk = |number| Chunk {
            offset: number * CHUNK_BYTES,
            len: CHUNK_BYTES as u32,
            digest: Digest::of(&bytes(number)),
        };
        let digest = Digest::of(b"image");
        ImageMap {
            image: ImageRef {
                digest,
                bytes: CHUNKS * CHUNK_BYTES,
                metadata_bytes: 0,
                inodes: 0,
                chunk_index: digest,
            },
            index: ChunkIndex {
                image: digest,
                image_bytes: CHUNKS * CHUNK_BYTES,
                chunks: (0..CHUNKS).map(chunk).collect(),
            },
            locations: Locations {
                chunk_index: digest,
                packs: Vec::new(),
                chunks: Vec::new(),
            },
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn it_says_what_asking_for_every_chunk_says(
            steps in prop::collection::vec((0..CHUNKS, 0..60_000_u64, 0..20_000_u64), 1..40)
        ) {
            let dir = tempfile::tempdir().unwrap();
            // Six of the chunks: the others are evicted.
            let cache = DiskCache::open(dir.path(), 6 * CHUNK_BYTES).unwrap();
            let (map, presence) = (image(), Presence::default());
            for (number, offset, len) in steps {
                cache.insert(Digest::of(&bytes(number)), &bytes(number)).unwrap();
                let extent = Extent::new(offset, len);
                let naive = map.chunk_numbers(extent).all(|number| {
                    let chunk = &map.index.chunks[number as usize];
                    chunk.extent().intersection(&extent).is_none() || cache.contains(chunk.digest)
                });
                prop_assert_eq!(!presence.absent(&cache, &map).iter().any(|one| one.intersection(&extent).is_some()), naive, "{:?}", extent);
                let again = presence.absent(&cache, &map);
                prop_assert!(Arc::ptr_eq(&again, &presence.absent(&cache, &map)), "kept");
            }
        }
    }
}
