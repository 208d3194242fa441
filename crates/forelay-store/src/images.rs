//! What a host knows of the images it uses: chunks and where they are.
//!
//! Chunk indexes, locations and component metadata are small and immutable, so they are
//! kept as files in the cache directory and in memory. Files there are written under a
//! temporary name and renamed; one that does not decode is fetched again.
//!
//! A component's metadata pins the chunk index, so a repository cannot pass off another; the
//! image's digest is what its publisher claims. So who reads a component's bytes here and
//! now reads them by its own map ([`Images::map_of`]). Shared memory has images by their digest
//! alone: such an image opens only after its component was made known ([`Images::add`]), and on
//! one host the first counts. An image may come from a repository of its own (a snapshot's
//! does); all else comes from the host's.
//!
//! Invariant: an [`ImageMap`]'s chunk index is valid, the one that was pinned, and has as
//! many chunks as locations, each stored in 1 byte to the chunk's length; its metadata is
//! within the image and [`MAX_METADATA_BYTES`].

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use forelay_image::bundle::Bundle;
use forelay_image::component::ImageRef;
use forelay_image::digest::Hasher;
use forelay_image::{Chunk, ChunkIndex, ComponentId, Digest, Extent};
use parking_lot::RwLock;

use crate::error::StoreError;
use crate::layout;
use crate::pack::{Location, Locations};
use crate::repository::Repository;

/// Most metadata of an image in bytes, which is read whole: some millions of files.
pub const MAX_METADATA_BYTES: u64 = 512 << 20;

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
        check_metadata_bytes(&image)?;
        if index.chunks.len() != locations.chunks.len() {
            return Err("the chunk index and the locations count different chunks");
        }
        // Nothing pins the locations; requests take memory by them.
        let placed = index.chunks.iter().zip(&locations.chunks);
        let mut lengths = placed.map(|(chunk, at)| (at.stored_bytes, chunk.len));
        if lengths.any(|(stored, len)| stored == 0 || stored > len) {
            return Err("a frame is empty or longer than its chunk");
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

/// Refuses metadata that is longer than the image, or than a host reads at once.
pub(crate) fn check_metadata_bytes(image: &ImageRef) -> Result<(), &'static str> {
    if image.metadata_bytes > image.bytes {
        return Err("the image's metadata is longer than the image");
    }
    if image.metadata_bytes > MAX_METADATA_BYTES {
        return Err("the image has more than 512 MiB of metadata");
    }
    Ok(())
}

/// An image that may be opened.
struct KnownImage {
    image: ImageRef,
    /// Where its objects and packs are.
    repository: Arc<dyn Repository>,
    /// Whether anybody relies on its digest opening as this image.
    hold: ImageHold,
}

/// Who has one relies on an image's digest opening as it did: nothing else that claims the
/// digest takes its place.
#[derive(Clone, Debug, Default)]
pub struct ImageHold(Arc<()>);

/// The images in use on this host.
pub(crate) struct Images {
    repository: Arc<dyn Repository>,
    folder: PathBuf,
    open: RwLock<HashMap<Digest, Arc<ImageMap>>>,
    known: RwLock<HashMap<Digest, KnownImage>>,
    bundles: RwLock<HashMap<Digest, Bundle>>,
    /// Images of VMs that were taken over, not known yet: the component each is of, `None` for
    /// one that is in a repository of its own.
    reserved: RwLock<HashMap<Digest, Option<ComponentId>>>,
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
            reserved: RwLock::default(),
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
    pub(crate) async fn reload(&self, image: ImageRef) -> Result<Arc<ImageMap>, StoreError> {
        let known = self.known.read().get(&image.digest).map(|one| one.image);
        if known == Some(image) || self.bundles.read().contains_key(&image.digest) {
            return self.load(image.digest, false).await;
        }
        let map = self.load_image(image, &self.repository, false).await?;
        Ok(Arc::new(map))
    }

    /// The map of a component's image in the host's repository. Makes nothing known.
    pub(crate) async fn map_of(&self, image: ImageRef) -> Result<Arc<ImageMap>, StoreError> {
        if let Some(map) = self.get(image.digest).filter(|map| map.image == image) {
            return Ok(map);
        }
        let map = self.load_image(image, &self.repository, true).await?;
        Ok(Arc::new(map))
    }

    /// Keeps an image for a component until it is known: no other that claims it gets it.
    pub(crate) fn reserve(&self, image: Digest, component: Option<ComponentId>) {
        self.reserved.write().insert(image, component);
    }

    /// As [`Images::add`], of the image of `component`, whose map is there.
    pub(crate) fn add_map(
        &self,
        map: &Arc<ImageMap>,
        component: ComponentId,
    ) -> Result<ImageHold, StoreError> {
        let hold = self.add_from(map.image, &self.repository, Some(component))?;
        self.keep_open(map);
        Ok(hold)
    }

    /// Has a map open by its digest, unless the image was forgotten meanwhile.
    fn keep_open(&self, map: &Arc<ImageMap>) {
        let known = self.known.read();
        let image = map.image.digest;
        let is_current = match self.bundles.read().get(&image) {
            Some(bundle) => index_of(bundle, &known) == Some(map.image.chunk_index),
            None => known.get(&image).is_some_and(|one| one.image == map.image),
        };
        if is_current {
            self.open.write().insert(image, Arc::clone(map));
        }
    }

    /// Makes an image known: from now on its digest opens, by the index pinned here.
    /// Two components may have the same image cut into different chunks; on one host the
    /// first counts, since both would fill the same shared memory.
    pub(crate) fn add(&self, image: ImageRef) -> Result<(), StoreError> {
        self.add_from(image, &self.repository, None).map(drop)
    }

    /// As [`Images::add`], of the image of a component, or of one in another repository.
    pub(crate) fn add_from(
        &self,
        image: ImageRef,
        repository: &Arc<dyn Repository>,
        component: Option<ComponentId>,
    ) -> Result<ImageHold, StoreError> {
        let disputed = StoreError::Disputed {
            image: image.digest,
        };
        let mut known = self.known.write();
        let reserved = self.reserved.read().get(&image.digest).copied();
        if reserved.is_some_and(|only| only != component)
            || self.bundles.read().contains_key(&image.digest)
        {
            return Err(disputed);
        }
        let first = known.entry(image.digest).or_insert_with(|| KnownImage {
            image,
            repository: Arc::clone(repository),
            hold: ImageHold::default(),
        });
        if first.image != image || !is_same(&first.repository, repository) {
            return Err(disputed);
        }
        // From now on it is known what the image is.
        if reserved.is_some() {
            self.reserved.write().remove(&image.digest);
        }
        Ok(first.hold.clone())
    }

    /// Forgets an image if nobody holds it; whether it did.
    pub(crate) fn forget_unheld(&self, image: Digest) -> bool {
        let mut known = self.known.write();
        let Some(one) = known.get(&image) else {
            return false;
        };
        if Arc::strong_count(&one.hold.0) > 1 {
            return false;
        }
        known.remove(&image);
        // Bundles are made of what their members' digests open as.
        let bundles = self.bundles.read();
        let is_part = |other: &Digest| {
            let bundle = bundles.get(other);
            bundle.is_some_and(|bundle| bundle.offset_of(&image).is_some())
        };
        let mut open = self.open.write();
        open.retain(|other, _| *other != image && !is_part(other));
        true
    }

    /// Forgets an image, also on disk: published again, it may lie in other packs.
    pub(crate) fn forget(&self, image: ImageRef) {
        let mut known = self.known.write();
        known.remove(&image.digest);
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
        !is_same(&self.repository_of(image), &self.repository)
    }

    /// Where an image's bytes come from.
    pub(crate) fn repository_of(&self, image: Digest) -> Arc<dyn Repository> {
        let known = self.known.read();
        let repository = known
            .get(&image)
            .map_or(&self.repository, |one| &one.repository);
        Arc::clone(repository)
    }

    /// Makes a bundle known: from now on its digest opens like an image's. The digest says
    /// nothing of its members' sizes: another takes its place only if it has those of the images
    /// that are known.
    pub(crate) fn add_bundle(&self, bundle: Bundle) -> Result<(), StoreError> {
        let image = bundle.digest();
        // No image has a bundle's digest; but one may claim it.
        if self.known.read().contains_key(&image) && !self.forget_unheld(image) {
            return Err(StoreError::Disputed { image });
        }
        let known = self.known.read();
        let mut bundles = self.bundles.write();
        let first = bundles.entry(image).or_insert_with(|| bundle.clone());
        if *first == bundle {
            return Ok(());
        }
        let fits = bundle.members().iter().all(|member| {
            let one = known.get(&member.image);
            one.is_some_and(|one| one.image.bytes == member.bytes)
        });
        if !fits {
            return Err(StoreError::Disputed { image });
        }
        *first = bundle;
        self.open.write().remove(&image);
        Ok(())
    }

    async fn load(&self, image: Digest, cached: bool) -> Result<Arc<ImageMap>, StoreError> {
        let bundle = self.bundles.read().get(&image).cloned();
        let map = match bundle {
            Some(bundle) => self.join(&bundle, cached).await?,
            None => self.load_known(image, cached).await?,
        };
        let map = Arc::new(map);
        self.keep_open(&map);
        Ok(map)
    }

    /// A bundle's map: its members' maps one after the other.
    async fn join(&self, bundle: &Bundle, cached: bool) -> Result<ImageMap, StoreError> {
        let mut chunks = Vec::new();
        let mut indexes = Vec::new();
        let mut locations = Locations {
            chunk_index: bundle.digest(),
            packs: Vec::new(),
            chunks: Vec::new(),
        };
        for member in bundle.members() {
            let map = self.load_known(member.image, cached).await?;
            indexes.push(map.image.chunk_index);
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
        locations.chunk_index = joined_index(&indexes);
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
            chunk_index: locations.chunk_index,
        };
        ImageMap::new(joined, index, locations).map_err(|problem| StoreError::Corrupted {
            key: format!("bundle {image}"),
            problem: problem.to_owned(),
        })
    }

    async fn load_known(&self, image: Digest, cached: bool) -> Result<ImageMap, StoreError> {
        let known = self.known.read().get(&image).map(|one| one.image);
        let known = known.ok_or(StoreError::ImageUnknown { image })?;
        let repository = self.repository_of(image);
        self.load_image(known, &repository, cached).await
    }

    async fn load_image(
        &self,
        image: ImageRef,
        repository: &Arc<dyn Repository>,
        cached: bool,
    ) -> Result<ImageMap, StoreError> {
        let missing = |error: StoreError| match error {
            StoreError::Repository(source) if source.is_not_found() => StoreError::ImageMissing {
                image: image.digest,
            },
            other => other,
        };
        let index_key = layout::chunk_index(image.chunk_index);
        let locations_key = layout::locations(image.chunk_index);
        let decode_index = |bytes: &[u8]| decode_chunk_index(image.chunk_index, bytes);
        let decode_locations =
            |bytes: &[u8]| Locations::decode(bytes).map_err(|error| error.to_string());
        let (index, locations) = tokio::try_join!(
            self.object_of(repository, &index_key, cached, decode_index),
            self.object_of(repository, &locations_key, cached, decode_locations),
        )
        .map_err(missing)?;
        ImageMap::new(image, index, locations).map_err(|problem| StoreError::Corrupted {
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
        let bytes: Bytes = repository.get(key, layout::most_bytes(key)).await?;
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

/// What stands for the chunk index of a bundle of images with these.
fn joined_index(indexes: &[Digest]) -> Digest {
    let mut hasher = Hasher::new();
    indexes.iter().for_each(|one| hasher.update(one.as_bytes()));
    hasher.finish()
}

/// The same of a bundle whose members are all known.
fn index_of(bundle: &Bundle, known: &HashMap<Digest, KnownImage>) -> Option<Digest> {
    let members = bundle.members().iter();
    let indexes = members.map(|one| Some(known.get(&one.image)?.image.chunk_index));
    Some(joined_index(&indexes.collect::<Option<Vec<_>>>()?))
}

fn is_same(one: &Arc<dyn Repository>, other: &Arc<dyn Repository>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(one), Arc::as_ptr(other))
}

/// Decodes a chunk index that must be the one of this digest.
pub(crate) fn decode_chunk_index(pinned: Digest, bytes: &[u8]) -> Result<ChunkIndex, String> {
    if Digest::of(bytes) != pinned {
        return Err("it is not the chunk index that the component pins".into());
    }
    ChunkIndex::decode(bytes).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_that_no_publication_has_are_refused() {
        let digest = Digest::of(b"zeros");
        let chunks = |count: u64| {
            let len = 1 << 20;
            let numbers = 0..count;
            numbers.map(move |number| Chunk {
                offset: number * u64::from(len),
                len,
                digest,
            })
        };
        let map = |count: u64, metadata_bytes: u64, stored_bytes: u32| {
            let index = ChunkIndex {
                image: Digest::of(b"image"),
                image_bytes: count << 20,
                chunks: chunks(count).collect(),
            };
            let image = ImageRef {
                digest: index.image,
                bytes: index.image_bytes,
                metadata_bytes,
                inodes: 1,
                chunk_index: Digest::of(b"index"),
            };
            let at = Location {
                pack: 0,
                offset: 0,
                stored_bytes,
            };
            let locations = Locations {
                chunk_index: image.chunk_index,
                packs: vec![Digest::of(b"pack")],
                chunks: vec![at; count as usize],
            };
            ImageMap::new(image, index, locations).map(drop)
        };
        assert_eq!(map(2, 4096, 1), Ok(()));
        assert_eq!(map(2, 4096, 1 << 20), Ok(()));
        let frame = Err("a frame is empty or longer than its chunk");
        assert_eq!(map(2, 4096, u32::MAX), frame);
        assert_eq!(map(2, 4096, 0), frame);
        // One repeated chunk makes as much as one likes.
        assert_eq!(map(600, MAX_METADATA_BYTES, 30), Ok(()));
        let metadata = Err("the image has more than 512 MiB of metadata");
        assert_eq!(map(600, 513 << 20, 30), metadata);
    }
}
