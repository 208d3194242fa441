//! Copying a component from one repository to another.
//!
//! Whole packs are moved, as they are, and of those only such as hold a chunk that the other
//! side has nowhere; what was moved before is not moved again, so that a copy which was cut
//! short goes on with the pack that it was at. Everything is checked on the way: the metadata by
//! its id, the chunk index by the metadata, a pack by its name.
//!
//! Invariant: the component becomes visible last, by the steps of a publication.

use std::collections::HashSet;
use std::io::Write as _;

use forelay_image::digest::Hasher;
use forelay_image::{ComponentId, Digest, Extent};
use futures_util::StreamExt as _;

use crate::error::StoreError;
use crate::images::{ImageMap, decode_chunk_index};
use crate::layout;
use crate::pack::{FinishedPack, Locations};
use crate::publish::{Known, PublishProgress, Published, locate, remember};
use crate::repository::Put;
use crate::store::Store;

/// A pack is read in parts of this many bytes, of which so many are under way at a time.
const PART_BYTES: u64 = 4 << 20;
const PARTS_AHEAD: usize = 4;

impl Store {
    /// Copies a component from another store's repository into this one's. When this returns,
    /// it is durable and visible here.
    pub async fn copy_from(
        &self,
        from: &Self,
        id: ComponentId,
        progress: &(dyn Fn(PublishProgress) + Send + Sync),
    ) -> Result<Published, StoreError> {
        self.check_writable().await?;
        for _ in 0..2 {
            if let Some(published) = self.copy_once(from, id, progress).await? {
                return Ok(published);
            }
            tracing::warn!(component = %id, "gc condemned packs in use; copying again");
        }
        Err(StoreError::Inconsistent(
            "gc keeps deleting the packs that it shares; try again when gc is done".into(),
        ))
    }

    async fn copy_once(
        &self,
        from: &Self,
        id: ComponentId,
        progress: &(dyn Fn(PublishProgress) + Send + Sync),
    ) -> Result<Option<Published>, StoreError> {
        let component = from.component(id).await?;
        let map = from.map_of(&component).await?;
        let mut places = self.known_chunks().await?;
        let mut fresh: HashSet<Digest> = HashSet::new();
        let mut done = PublishProgress {
            total_bytes: component.image.bytes,
            ..PublishProgress::default()
        };
        for (number, pack) in map.locations.packs.iter().enumerate() {
            let chunks = map.index.chunks.iter().zip(&map.locations.chunks);
            let here = chunks.filter(|(_, location)| location.pack as usize == number);
            let (mut all_bytes, mut lacking) = (0, false);
            for (chunk, _) in here {
                all_bytes += u64::from(chunk.len);
                lacking |= !places.contains_key(&chunk.digest);
            }
            match lacking {
                true => {
                    done.stored_bytes += self.copy_pack(from, *pack, &mut places).await?;
                    fresh.insert(*pack);
                }
                false => done.reused_bytes += all_bytes,
            }
            done.done_bytes += all_bytes;
            progress(done);
        }
        let locations = locate(&component, &map.index, &places)?;
        let put = self.make_visible(&component, &map.index, &locations, &fresh);
        let Some(put) = put.await? else {
            return Ok(None);
        };
        Ok(Some(Published {
            id,
            created: put == Put::Created,
            progress: done,
        }))
    }

    /// The chunks of a component's image and where they are, asked of the repository.
    async fn map_of(&self, component: &forelay_image::Component) -> Result<ImageMap, StoreError> {
        let pinned = component.image.chunk_index;
        let corrupted = |key: &str, problem: String| StoreError::Corrupted {
            key: key.to_owned(),
            problem,
        };
        let (index_key, locations_key) = (layout::chunk_index(pinned), layout::locations(pinned));
        let (index, locations) = tokio::try_join!(self.get(&index_key), self.get(&locations_key))?;
        let index = decode_chunk_index(pinned, &index);
        let index = index.map_err(|problem| corrupted(&index_key, problem))?;
        let locations = Locations::decode(&locations);
        let locations = locations.map_err(|error| corrupted(&locations_key, error.to_string()))?;
        ImageMap::new(component.image, index, locations)
            .map_err(|problem| corrupted(&locations_key, problem.to_owned()))
    }

    /// Moves a pack, and notes what is in it. Returns its size.
    async fn copy_pack(
        &self,
        from: &Self,
        pack: Digest,
        places: &mut Known,
    ) -> Result<u64, StoreError> {
        let key = layout::pack(pack);
        let index = from.pack_index(pack).await?;
        let bytes = index
            .entries
            .iter()
            .map(|one| u64::from(one.offset) + u64::from(one.stored_bytes));
        let bytes = bytes.max().unwrap_or(0);
        let writing = |source| StoreError::File {
            doing: "writing a pack in",
            path: self.0.scratch.clone(),
            source,
        };
        let mut file = tempfile::NamedTempFile::new_in(&self.0.scratch).map_err(writing)?;
        let mut hasher = Hasher::new();
        let whole = Extent::new(0, bytes);
        let parts = (0..bytes.div_ceil(PART_BYTES)).map(|number| {
            let part = Extent::new(number * PART_BYTES, PART_BYTES);
            let part = part.intersection(&whole).unwrap_or(part);
            from.0.repository.get_range(&key, part)
        });
        let mut parts = futures_util::stream::iter(parts).buffered(PARTS_AHEAD);
        while let Some(part) = parts.next().await {
            let part = part?;
            hasher.update(&part);
            file.write_all(&part).map_err(writing)?;
        }
        drop(parts);
        if hasher.finish() != pack {
            let problem = "its bytes do not have the digest that its name says".to_owned();
            from.0.repository.doubt(&key, &problem);
            return Err(StoreError::Corrupted { key, problem });
        }
        let finished = FinishedPack { file, index };
        self.put_pack(&finished).await?;
        remember(places, &finished.index, true);
        Ok(bytes)
    }
}
