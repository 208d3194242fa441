//! What a host knows of the images it uses: chunks and where they are.
//!
//! Chunk indexes, locations and component metadata are small and immutable, so they are
//! kept as files in the cache directory and in memory. Files there are written under a
//! temporary name and renamed; one that does not decode is fetched again.
//!
//! A component's metadata pins the chunk index; an image opens only after its component
//! was made known ([`Images::add`]), so a repository cannot pass off another index. An image
//! may come from a repository of its own (a snapshot's does); all else comes from the host's.
//!
//! Invariant: an [`ImageMap`]'s chunk index is valid, the one that was pinned, and has as
//! many chunks as locations.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use forelay_image::bundle::Bundle;
use forelay_image::component::ImageRef;
use forelay_image::{Chunk, ChunkIndex, Digest, Extent};
use parking_lot::RwLock;

use crate::error::StoreError;
use crate::layout;
use crate::pack::{Location, Locations};
use crate::repository::Repository;

/// Chunks of an image and where they are.
#[derive(Debug)]
pub struct ImageMap {
    /// The image, as its component pins it.
    pub image: ImageRef,
    /// The chunks.
    pub index: ChunkIndex,
    /// Where each is.
    pub locations: Locations,
}

impl ImageMap {
    /// Pairs an index, known to be the pinned one, with locations, if they fit.
    pub fn new(
        image: ImageRef,
        index: ChunkIndex,
        locations: Locations,
    ) -> Result<Self, &'static str> {
        if index.validate().is_err() {
            return Err("the chunk index is not valid");
        }
        if index.image != image.digest || index.image_bytes != image.bytes {
            return Err("the chunk index is of another image");
        }
        if locations.chunk_index != image.chunk_index {
            return Err("the locations are of another chunk index");
        }
        if image.metadata_bytes > image.bytes {
            return Err("the image's metadata is longer than the image");
        }
        if index.chunks.len() != locations.chunks.len() {
            return Err("the chunk index and the locations count different chunks");
        }
        Ok(Self {
            image,
            index,
            locations,
        })
    }

    /// Numbers of the chunks that overlap `extent`.
    pub fn chunk_numbers(&self, extent: Extent) -> Range<u32> {
        let chunks = &self.index.chunks;
        let first = chunks.partition_point(|chunk| chunk.extent().end() <= extent.offset);
        let last = chunks.partition_point(|chunk| chunk.offset < extent.end());
        first.min(last) as u32..last as u32
    }

    /// A chunk by number.
    pub fn chunk(&self, chunk_no: u32) -> Option<&Chunk> {
        self.index.chunks.get(chunk_no as usize)
    }

    /// The pack that a chunk is in, and where in it.
    pub fn location(&self, chunk_no: u32) -> Option<(Digest, Location)> {
        let location = *self.locations.chunks.get(chunk_no as usize)?;
        let pack = *self.locations.packs.get(location.pack as usize)?;
        Some((pack, location))
    }
}

/// An image that may be opened.
struct KnownImage {
    image: ImageRef,
    /// Where its objects and packs are.
    repository: Arc<dyn Repository>,
}

/// The images in use on this host.
pub(crate) struct Images {
    repository: Arc<dyn Repository>,
    folder: PathBuf,
    open: RwLock<HashMap<Digest, Arc<ImageMap>>>,
    known: RwLock<HashMap<Digest, KnownImage>>,
    bundles: RwLock<HashMap<Digest, Bundle>>,
}

impl Images {
    pub(crate) fn new(
        repository: Arc<dyn Repository>,
        cache_dir: &Path,
    ) -> Result<Self, StoreError> {
        let folder = cache_dir.join("objects");
        fs::create_dir_all(&folder).map_err(|source| StoreError::CacheDirectory {
            path: folder.clone(),
            source,
        })?;
        Ok(Self {
            repository,
            folder,
            open: RwLock::default(),
            known: RwLock::default(),
            bundles: RwLock::default(),
        })
    }

    /// The map of an image that was opened before.
    pub(crate) fn get(&self, image: Digest) -> Option<Arc<ImageMap>> {
        self.open.read().get(&image).cloned()
    }

    /// The images that were opened before.
    pub(crate) fn opened(&self) -> Vec<Digest> {
        self.open.read().keys().copied().collect()
    }

    /// The map of an image, from memory, the cache directory or the repository.
    pub(crate) async fn open(&self, image: Digest) -> Result<Arc<ImageMap>, StoreError> {
        if let Some(map) = self.get(image) {
            return Ok(map);
        }
        self.load(image, true).await
    }

    /// Fetches the locations again, after a pack was found to be gone.
    pub(crate) async fn reload(&self, image: Digest) -> Result<Arc<ImageMap>, StoreError> {
        self.load(image, false).await
    }

    /// Makes an image known: from now on its digest opens, by the index pinned here.
    /// Two components may have the same image cut into different chunks; on one host the
    /// first counts, since both would fill the same shared memory.
    pub(crate) fn add(&self, image: ImageRef) -> Result<(), StoreError> {
        self.add_from(image, &self.repository)
    }

    /// As [`Images::add`], of an image that comes from another repository.
    pub(crate) fn add_from(
        &self,
        image: ImageRef,
        repository: &Arc<dyn Repository>,
    ) -> Result<(), StoreError> {
        let mut known = self.known.write();
        let first = known.entry(image.digest).or_insert_with(|| KnownImage {
            image,
            repository: Arc::clone(repository),
        });
        let first = first.image;
        if first == image {
            return Ok(());
        }
        Err(StoreError::Disputed {
            image: image.digest,
        })
    }

    /// Forgets an image, also on disk: published again, it may lie in other packs.
    pub(crate) fn forget(&self, image: ImageRef) {
        self.known.write().remove(&image.digest);
        self.open.write().remove(&image.digest);
        let index = image.chunk_index;
        for key in [layout::chunk_index(index), layout::locations(index)] {
            // It may never have been opened.
            let _ = fs::remove_file(self.kept_path(&key));
        }
    }

    /// Whether an image's bytes are on this host already, in a repository of its own: they are
    /// kept nowhere else, and say nothing of the host's repository.
    pub(crate) fn is_elsewhere(&self, image: Digest) -> bool {
        !std::ptr::addr_eq(
            Arc::as_ptr(&self.repository_of(image)),
            Arc::as_ptr(&self.repository),
        )
    }

    /// Where an image's bytes come from.
    pub(crate) fn repository_of(&self, image: Digest) -> Arc<dyn Repository> {
        let known = self.known.read();
        let repository = known
            .get(&image)
            .map_or(&self.repository, |one| &one.repository);
        Arc::clone(repository)
    }

    /// Makes a bundle known: from now on its digest opens like an image's.
    pub(crate) fn add_bundle(&self, bundle: Bundle) {
        self.bundles.write().insert(bundle.digest(), bundle);
    }

    async fn load(&self, image: Digest, cached: bool) -> Result<Arc<ImageMap>, StoreError> {
        let bundle = self.bundles.read().get(&image).cloned();
        let map = match bundle {
            Some(bundle) => self.join(&bundle, cached).await?,
            None => self.load_image(image, cached).await?,
        };
        let map = Arc::new(map);
        self.open.write().insert(image, map.clone());
        Ok(map)
    }

    /// A bundle's map: its members' maps one after the other.
    async fn join(&self, bundle: &Bundle, cached: bool) -> Result<ImageMap, StoreError> {
        let mut chunks = Vec::new();
        let mut locations = Locations {
            chunk_index: bundle.digest(),
            packs: Vec::new(),
            chunks: Vec::new(),
        };
        for member in bundle.members() {
            let map = self.load_image(member.image, cached).await?;
            let packs = locations.packs.len() as u32;
            locations.packs.extend_from_slice(&map.locations.packs);
            let placed = map.locations.chunks.iter();
            locations.chunks.extend(placed.map(|one| Location {
                pack: one.pack + packs,
                ..*one
            }));
            let shifted = map.index.chunks.iter();
            chunks.extend(shifted.map(|one| Chunk {
                offset: one.offset + member.offset,
                ..*one
            }));
        }
        let (image, image_bytes) = (bundle.digest(), bundle.bytes());
        let index = ChunkIndex {
            image,
            image_bytes,
            chunks,
        };
        let joined = ImageRef {
            digest: image,
            bytes: image_bytes,
            metadata_bytes: 0,
            inodes: 0,
            // Made here from pinned indexes, so there is none to be fetched and checked.
            chunk_index: image,
        };
        ImageMap::new(joined, index, locations).map_err(|problem| StoreError::Corrupted {
            key: format!("bundle {image}"),
            problem: problem.to_owned(),
        })
    }

    async fn load_image(&self, image: Digest, cached: bool) -> Result<ImageMap, StoreError> {
        let missing = |error: StoreError| match error {
            StoreError::Repository(source) if source.is_not_found() => {
                StoreError::ImageMissing { image }
            }
            other => other,
        };
        let known = self.known.read().get(&image).map(|one| one.image);
        let known = known.ok_or(StoreError::ImageUnknown { image })?;
        let index_key = layout::chunk_index(known.chunk_index);
        let locations_key = layout::locations(known.chunk_index);
        let decode_index = |bytes: &[u8]| decode_chunk_index(known.chunk_index, bytes);
        let decode_locations =
            |bytes: &[u8]| Locations::decode(bytes).map_err(|error| error.to_string());
        let repository = self.repository_of(image);
        let (index, locations) = tokio::try_join!(
            self.object_of(&repository, &index_key, cached, decode_index),
            self.object_of(&repository, &locations_key, cached, decode_locations),
        )
        .map_err(missing)?;
        ImageMap::new(known, index, locations).map_err(|problem| StoreError::Corrupted {
            key: locations_key,
            problem: problem.to_owned(),
        })
    }

    /// A small immutable object, decoded; from the cache directory if `cached`.
    pub(crate) async fn object<T>(
        &self,
        key: &str,
        cached: bool,
        decode: impl Fn(&[u8]) -> Result<T, String>,
    ) -> Result<T, StoreError> {
        self.object_of(&self.repository, key, cached, decode).await
    }

    async fn object_of<T>(
        &self,
        repository: &Arc<dyn Repository>,
        key: &str,
        cached: bool,
        decode: impl Fn(&[u8]) -> Result<T, String>,
    ) -> Result<T, StoreError> {
        let path = self.kept_path(key);
        if cached {
            let local = fs::read(&path).ok().and_then(|bytes| decode(&bytes).ok());
            if let Some(value) = local {
                return Ok(value);
            }
        }
        let bytes: Bytes = repository.get(key).await?;
        let value = decode(&bytes).map_err(|problem| StoreError::Corrupted {
            key: key.to_owned(),
            problem,
        })?;
        if let Err(error) = self.keep(&path, &bytes) {
            tracing::warn!(path = %path.display(), %error, "cannot keep an index in the cache directory");
        }
        Ok(value)
    }

    /// This host's copy of an object.
    fn kept_path(&self, key: &str) -> PathBuf {
        self.folder.join(key.replace('/', "-"))
    }

    fn keep(&self, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
        forelay_host::atomic_write(path, bytes).map(drop)
    }
}

/// Decodes a chunk index that must be the one of this digest.
pub(crate) fn decode_chunk_index(pinned: Digest, bytes: &[u8]) -> Result<ChunkIndex, String> {
    if Digest::of(bytes) != pinned {
        return Err("it is not the chunk index that the component pins".into());
    }
    ChunkIndex::decode(bytes).map_err(|error| error.to_string())
}
