//! The store: a repository, the disk cache in front of it and the scheduler between.
//!
//! Owns the life of components on a host: publishing, finding, reading. Refuses to know
//! VMs and shared memory.
//!
//! Invariant: a component that [`Store::components`] lists was whole when it was
//! published, and `gc` keeps all that it refers to.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use forelay_image::bundle::Bundle;
use forelay_image::component::ImageRef;
use forelay_image::lock::LockedComponent;
use forelay_image::{Component, ComponentId, Digest, Extent};
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use crate::disk_cache::DiskCache;
use crate::error::StoreError;
use crate::fetch::{FetchConfig, Priority, Scheduler};
use crate::images::{ImageHold, ImageMap, Images};
use crate::layout::{self, Access, Descriptor};
use crate::listing::LastListing;
use crate::repository::{Repository, RepositoryError, SetAside};

/// A whole image is read in windows of this many bytes...
const WINDOW_BYTES: u64 = 4 << 20;
/// ...of which so many are under way at a time.
const WINDOWS_AHEAD: usize = 4;

/// What a store is made of.
pub struct StoreConfig {
    /// Where components are published.
    pub repository: Arc<dyn Repository>,
    /// Directory of this host's caches.
    pub cache_dir: PathBuf,
    /// Bytes of chunks that the disk cache may hold.
    pub cache_cap_bytes: u64,
    /// How chunks are fetched.
    pub fetch: FetchConfig,
}

pub(crate) struct StoreInner {
    pub(crate) repository: Arc<dyn Repository>,
    pub(crate) images: Arc<Images>,
    pub(crate) scratch: PathBuf,
    access: OnceCell<Access>,
    cache: Arc<DiskCache>,
    scheduler: Scheduler,
    components: Mutex<BTreeMap<ComponentId, Arc<Component>>>,
    listing: LastListing,
}

/// A repository with this host's caches. Cheap to clone.
#[derive(Clone)]
pub struct Store(pub(crate) Arc<StoreInner>);

impl Store {
    /// Opens a store on the current tokio runtime. The repository is not asked, so that what
    /// the disk cache has is served while the repository is away.
    pub async fn open(config: StoreConfig) -> Result<Self, StoreError> {
        let StoreConfig {
            repository,
            cache_dir,
            cache_cap_bytes,
            fetch,
        } = config;
        let scratch = cache_dir.join("publishing");
        std::fs::create_dir_all(&scratch).map_err(|source| StoreError::CacheDirectory {
            path: scratch.clone(),
            source,
        })?;
        let cache = Arc::new(DiskCache::open(&cache_dir, cache_cap_bytes)?);
        let images = Arc::new(Images::new(repository.clone(), &cache_dir)?);
        let scheduler = Scheduler::new(repository.clone(), cache.clone(), images.clone(), fetch);
        let components = Mutex::default();
        let listing = LastListing::new(&cache_dir, repository.describe().location);
        Ok(Self(Arc::new(StoreInner {
            repository,
            images,
            scratch,
            access: OnceCell::new(),
            cache,
            scheduler,
            components,
            listing,
        })))
    }

    /// The fetch scheduler.
    pub fn scheduler(&self) -> &Scheduler {
        &self.0.scheduler
    }

    /// The disk cache.
    pub fn disk_cache(&self) -> &DiskCache {
        &self.0.cache
    }

    /// Makes the repository one, if it is not yet.
    pub async fn initialise(&self) -> Result<(), StoreError> {
        let new = Descriptor::current().to_json();
        let repository = &self.0.repository;
        // Another process may have been first: what counts is what is there.
        repository
            .put_if_absent(layout::DESCRIPTOR, new.into())
            .await?;
        self.access().await.map(drop)
    }

    /// Asks whether the repository is there and understood.
    pub async fn probe(&self) -> Result<(), StoreError> {
        read_descriptor(&*self.0.repository).await.map(drop)
    }

    /// Which of the repository and its mirrors are set aside at the moment.
    pub fn set_aside(&self) -> Vec<SetAside> {
        self.0.repository.set_aside()
    }

    /// What the repository permits, asked once.
    async fn access(&self) -> Result<&Access, StoreError> {
        let read = || read_descriptor(&*self.0.repository);
        self.0.access.get_or_try_init(read).await
    }

    /// A whole object of the host's repository.
    pub(crate) async fn get(&self, key: &str) -> Result<Bytes, RepositoryError> {
        self.0.repository.get(key, layout::most_bytes(key)).await
    }

    pub(crate) async fn check_writable(&self) -> Result<(), StoreError> {
        match self.access().await? {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly(features) => Err(StoreError::ReadOnly {
                features: features.clone(),
            }),
        }
    }

    /// From now on what the repository listed last stands in for a repository that cannot be
    /// asked, also what it listed for a process before this one.
    pub fn accept_last_listing(&self) {
        self.0.listing.want();
    }

    async fn listed(&self) -> Result<Vec<ComponentId>, StoreError> {
        self.access().await?;
        let listed = self.0.repository.list(layout::COMPONENTS).await?;
        let ids = listed
            .iter()
            .filter_map(|key| layout::digest_in(key, layout::COMPONENTS, ".json"));
        Ok(ids.collect())
    }

    /// All published components, by name and version. Metadata that is corrupted, too large or
    /// vanishes meanwhile is left out with a warning, so that one bad object does not
    /// hide the others.
    pub async fn components(&self) -> Result<Vec<Arc<Component>>, StoreError> {
        let (ids, is_now) = match self.listed().await {
            Ok(ids) => {
                self.0.listing.keep(&ids);
                (ids, true)
            }
            Err(StoreError::Repository(error)) if error.is_transient() => {
                let last = self.0.listing.last().ok_or(error)?;
                (last, false)
            }
            Err(error) => return Err(error),
        };
        let mut components = Vec::new();
        for group in ids.chunks(32) {
            let fetched =
                futures_util::future::join_all(group.iter().map(|id| self.pinned_component(*id)))
                    .await;
            for (id, component) in group.iter().zip(fetched) {
                match component {
                    Ok(component) => components.push(component),
                    Err(
                        error @ (StoreError::Corrupted { .. }
                        | StoreError::ComponentMissing { .. }
                        | StoreError::Repository(RepositoryError::TooLarge { .. })),
                    ) => {
                        tracing::warn!(component = %id, %error, "leaving out a component");
                    }
                    // Of what this host never asked for it has nothing.
                    Err(StoreError::Repository(error)) if !is_now && error.is_transient() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        self.0.components.lock().retain(|id, _| ids.contains(id));
        components.sort_by(|a, b| {
            a.name
                .cmp(&b.name)
                .then_with(|| forelay_image::version::compare(&a.version, &b.version))
                .then_with(|| a.image.digest.cmp(&b.image.digest))
        });
        Ok(components)
    }

    /// One component. Asks the repository, so one that was removed is reported missing.
    pub async fn component(&self, id: ComponentId) -> Result<Arc<Component>, StoreError> {
        self.access().await?;
        let key = layout::component(id);
        let bytes = self.get(&key).await.map_err(|error| missing(error, id))?;
        let component = decode_component(id, &bytes)
            .map_err(|problem| StoreError::Corrupted { key, problem })?;
        Ok(Arc::new(component))
    }

    /// Like [`Store::component`], but content with this host's copy: its id pins it.
    pub async fn pinned_component(&self, id: ComponentId) -> Result<Arc<Component>, StoreError> {
        let known = self.0.components.lock().get(&id).cloned();
        if let Some(component) = known {
            return Ok(component);
        }
        let key = layout::component(id);
        let component = self
            .0
            .images
            .object(&key, true, |bytes| decode_component(id, bytes))
            .await;
        let component = Arc::new(component.map_err(|error| match error {
            StoreError::Repository(error) => missing(error, id),
            other => other,
        })?);
        self.0.components.lock().insert(id, component.clone());
        Ok(component)
    }

    /// Makes a component invisible. `gc` later deletes what nothing else refers to.
    pub async fn remove_component(&self, id: ComponentId) -> Result<(), StoreError> {
        self.check_writable().await?;
        self.component(id).await?;
        self.0.repository.delete(&layout::component(id)).await?;
        self.0.components.lock().remove(&id);
        Ok(())
    }

    /// Makes a component's image known: from now on its digest opens, reads and prefetches,
    /// checked against the chunk index that the component pins.
    pub fn add_image(&self, image: ImageRef) -> Result<(), StoreError> {
        self.0.images.add(image)
    }

    /// As [`Store::add_image`], of an image whose bytes come from another store's repository.
    pub fn add_image_of(&self, image: ImageRef, of: &Self) -> Result<ImageHold, StoreError> {
        let add = || self.0.images.add_from(image, &of.0.repository, None);
        match add() {
            Err(StoreError::Disputed { image }) if self.forget_unheld_image(image) => add(),
            other => other,
        }
    }

    /// Keeps an image that VMs map for the component that they have it of (`None`: for another
    /// store's repository) until that is opened.
    pub fn reserve_image(&self, image: Digest, component: Option<ComponentId>) {
        self.0.images.reserve(image, component);
    }

    /// Forgets an image unless somebody holds it, so that another component may have it whose
    /// publisher claims the same digest. Whether it did.
    pub fn forget_unheld_image(&self, image: Digest) -> bool {
        self.0.images.forget_unheld(image)
    }

    /// Forgets an image whose bytes are about to go; nothing may map it.
    pub fn forget_image(&self, image: ImageRef) {
        self.0.images.forget(image);
    }

    /// A component's image by the component's id, which pins all of it, for who reads it here and
    /// now. Content with this host's copy of the metadata.
    pub async fn component_image(&self, id: ComponentId) -> Result<Arc<ImageMap>, StoreError> {
        let image = self.pinned_component(id).await?.image;
        self.0.images.map_of(image).await
    }

    /// As [`Store::component_image`], and makes the image known to shared memory, by its digest
    /// alone, for as long as somebody has the hold. Of two that claim one digest the first
    /// counts, unless nobody holds it.
    pub async fn hold_component(
        &self,
        id: ComponentId,
    ) -> Result<(Arc<ImageMap>, ImageHold), StoreError> {
        let map = self.component_image(id).await?;
        let add = || self.0.images.add_map(&map, id);
        let hold = match add() {
            Err(StoreError::Disputed { image }) if self.forget_unheld_image(image) => add(),
            other => other,
        }?;
        Ok((map, hold))
    }

    /// A locked component. A lock pins it by its id; what else the lock says of it must be what
    /// its metadata says.
    pub async fn locked_component(
        &self,
        locked: &LockedComponent,
    ) -> Result<Arc<Component>, StoreError> {
        let component = self.pinned_component(locked.id).await?;
        if !locked.describes(&component) {
            return Err(StoreError::NotAsLocked {
                name: locked.name.clone(),
                version: locked.version.clone(),
            });
        }
        Ok(component)
    }

    /// As [`Store::hold_component`] of what [`Store::locked_component`] accepts.
    pub async fn hold_locked(
        &self,
        locked: &LockedComponent,
    ) -> Result<(Arc<ImageMap>, ImageHold), StoreError> {
        self.locked_component(locked).await?;
        self.hold_component(locked.id).await
    }

    /// Chunks of an image that was made known, and where they are.
    pub async fn open_image(&self, image: Digest) -> Result<Arc<ImageMap>, StoreError> {
        self.0.images.open(image).await
    }

    /// Makes a bundle known: its digest then opens, reads and prefetches like an image's.
    pub fn add_bundle(&self, bundle: Bundle) -> Result<(), StoreError> {
        self.0.images.add_bundle(bundle)
    }

    /// All metadata of an image: its first `metadata_bytes`, for compose.
    pub async fn image_metadata(&self, image: &ImageMap) -> Result<Bytes, StoreError> {
        let metadata = Extent::new(0, image.image.metadata_bytes);
        let read = self
            .0
            .scheduler
            .read_map(image, metadata, Priority::Demand, 0);
        Ok(read.await?)
    }

    /// A range of an image.
    pub async fn read_image(
        &self,
        image: Digest,
        extent: Extent,
        priority: Priority,
    ) -> Result<Bytes, StoreError> {
        let map = self.open_image(image).await?;
        let image_bytes = map.image.bytes;
        if extent.end() > image_bytes {
            let (offset, end) = (extent.offset, extent.end());
            return Err(StoreError::BeyondEnd {
                image,
                image_bytes,
                offset,
                end,
            });
        }
        Ok(self.0.scheduler.read(image, extent, priority).await?)
    }

    /// A range of an image if all of it is in the disk cache, read on the calling thread.
    pub fn try_cached(&self, image: Digest, extent: Extent) -> Option<Bytes> {
        self.0.scheduler.try_cached(image, extent)
    }

    /// Writes a whole image to `path`, which appears only when it is complete.
    pub async fn materialise(&self, image: Digest, path: &Path) -> Result<(), StoreError> {
        let map = self.open_image(image).await?;
        let failed = |source| StoreError::File {
            doing: "writing",
            path: path.to_owned(),
            source,
        };
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        let file =
            tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new("."))).map_err(failed)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let whole = Extent::new(0, map.image.bytes);
        let mut windows = futures_util::stream::iter(0..whole.len.div_ceil(WINDOW_BYTES))
            .map(|window| {
                let window = Extent::new(window * WINDOW_BYTES, WINDOW_BYTES);
                let extent = window.intersection(&whole).unwrap_or(window);
                self.0.scheduler.read(image, extent, Priority::Prefetch)
            })
            .buffered(WINDOWS_AHEAD);
        while let Some(bytes) = windows.next().await {
            out.write_all(&bytes?).map_err(failed)?;
        }
        let file = out
            .into_inner()
            .map_err(|error| failed(error.into_error()))?;
        let written = file.as_file().metadata().map_err(failed)?.len();
        if written != whole.len {
            return Err(StoreError::Fetch(crate::fetch::FetchError::Cancelled));
        }
        file.persist(path).map_err(|error| failed(error.error))?;
        Ok(())
    }

    /// Random access to an image through [`forelay_image`]'s readers, on a thread that may
    /// block. To be called on the runtime that fetches.
    pub fn image_reader(&self, image: Arc<ImageMap>) -> ImageReader {
        ImageReader {
            scheduler: self.0.scheduler.clone(),
            handle: tokio::runtime::Handle::current(),
            image,
        }
    }
}

/// Blocking random access to an image.
pub struct ImageReader {
    scheduler: Scheduler,
    handle: tokio::runtime::Handle,
    image: Arc<ImageMap>,
}

impl ImageReader {
    /// Size of the image in bytes.
    pub fn image_bytes(&self) -> u64 {
        self.image.image.bytes
    }

    /// Reads up to `buf.len()` bytes from `offset`; fewer only at the image's end. Must
    /// not be called on an async thread.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let len = (buf.len() as u64).min(self.image_bytes().saturating_sub(offset));
        if len == 0 {
            return Ok(0);
        }
        let extent = Extent::new(offset, len);
        let bytes = match self.scheduler.try_cached_map(&self.image, extent) {
            Some(bytes) => bytes,
            None => {
                let demand = Priority::Demand;
                let read = self.scheduler.read_map(&self.image, extent, demand, 0);
                self.handle.block_on(read).map_err(std::io::Error::other)?
            }
        };
        buf[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }
}

fn missing(error: RepositoryError, id: ComponentId) -> StoreError {
    if error.is_not_found() {
        StoreError::ComponentMissing { id }
    } else {
        error.into()
    }
}

pub(crate) fn decode_component(id: ComponentId, bytes: &[u8]) -> Result<Component, String> {
    if Digest::of(bytes) != id {
        return Err("its bytes do not have the digest that its name says".into());
    }
    let component: Component = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    component.check_names().map_err(|error| error.to_string())?;
    Ok(component)
}

async fn read_descriptor(repository: &dyn Repository) -> Result<Access, StoreError> {
    let location = || repository.describe().location;
    let most_bytes = layout::most_bytes(layout::DESCRIPTOR);
    let bytes = repository.get(layout::DESCRIPTOR, most_bytes).await;
    let bytes = bytes.map_err(|error| match error.is_not_found() {
        true => StoreError::NoRepository {
            location: location(),
        },
        false => error.into(),
    })?;
    let parsed = Descriptor::parse(&bytes);
    let (_, access) = parsed.map_err(|source| StoreError::Descriptor {
        location: location(),
        source,
    })?;
    Ok(access)
}
