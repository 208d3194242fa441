//! Inheritance: a version of a component that has no history starts with its predecessor's
//! working set, carried over by file path.
//!
//! Owns which images a component name has had, as launches told, and the reading of where files
//! lie in both images. The arithmetic is [`WorkingSets::inherit`]'s.
//!
//! ```text
//! lock of a launch, or components that may be attached
//!   -> versions without a set of this profile -> their predecessors -> file layouts of both
//!   -> WorkingSets::inherit -> the plan has extents with Basis::Predecessor
//! ```
//!
//! Invariants: nobody waits longer than the limit given, what takes longer is done for the next
//! one; a pair of images that cannot be read is left alone for a while.
//!
//! [`WorkingSets::inherit`]: forelay_predict::working_set::WorkingSets::inherit

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use forelay_image::component::Component;
use forelay_image::erofs::read::{FileExtents, Image, ReadAt};
use forelay_image::{ComponentId, Digest};
use forelay_predict::working_set::FileLayout;
use forelay_store::Store;
use parking_lot::Mutex;

use crate::daemon::error::HostError;
use crate::daemon::forecast::learning::Learner;
use crate::daemon::forecast::models::model_key;
use crate::daemon::order::Order;
use crate::history::ProfileRef;

/// Versions remembered of one component.
const MOST_VERSIONS: usize = 4;
/// Components remembered by name.
const MOST_NAMES: usize = 4096;
/// A pair of images that could not be read is not looked at again for so long.
const RETRY_AFTER: Duration = Duration::from_secs(600);

/// The images that component names have had, the last launched last.
#[derive(Default)]
pub struct Lineage {
    by_name: BTreeMap<String, VecDeque<Digest>>,
}

impl Lineage {
    /// A VM has an image of this component.
    pub fn note(&mut self, name: &str, image: Digest) {
        if !self.by_name.contains_key(name) && self.by_name.len() >= MOST_NAMES {
            self.by_name.pop_first();
        }
        let images = self.by_name.entry(name.to_owned()).or_default();
        images.retain(|one| *one != image);
        images.push_back(image);
        if images.len() > MOST_VERSIONS {
            images.pop_front();
        }
    }

    /// Images of this component, the last launched first.
    pub fn images(&self, name: &str) -> impl Iterator<Item = Digest> + '_ {
        let images = self.by_name.get(name).into_iter().flatten();
        images.rev().copied()
    }
}

/// A version of a component that a VM will have.
#[derive(Clone, Debug)]
pub struct ComponentVersion {
    /// Component name.
    pub name: String,
    /// Its metadata's digest, by which its image opens.
    pub id: ComponentId,
    /// Its image.
    pub image: Digest,
}

/// Carries working sets over to new versions. See the module's header.
pub struct Inheritance {
    store: Store,
    learner: Arc<Learner>,
    unreadable: Mutex<BTreeMap<(Digest, Digest), Instant>>,
}

impl Inheritance {
    /// Nothing was inherited yet.
    pub fn new(store: Store, learner: Arc<Learner>) -> Self {
        Self {
            store,
            learner,
            unreadable: Mutex::default(),
        }
    }

    /// Those of `versions` for which launches of a profile lack a working set that a predecessor
    /// has, with that predecessor's image.
    fn heirs(
        &self,
        of: &ProfileRef,
        versions: impl Iterator<Item = ComponentVersion>,
    ) -> Vec<(ComponentVersion, Digest)> {
        let profile = model_key(of);
        let models = self.learner.models();
        let (lineage, sets) = (models.lineage.lock(), models.sets.lock());
        let mut unreadable = self.unreadable.lock();
        unreadable.retain(|_, since| since.elapsed() < RETRY_AFTER);
        versions
            .filter_map(|version| {
                let earlier = lineage.images(&version.name);
                let predecessor = sets.predecessor(&profile, &version.image, earlier)?;
                let pair = (predecessor, version.image);
                (!unreadable.contains_key(&pair)).then_some((version, predecessor))
            })
            .collect()
    }

    /// Lets the components of an order inherit what its profile knows of their predecessors;
    /// returns after `limit` at the latest.
    pub async fn prepare_order(self: &Arc<Self>, order: &Order, limit: Duration) {
        let alone = order.lock.components.iter().filter(|component| {
            // Of what is in a bundle, the bundle's pages are learned, not the members'.
            order.devices.iter().any(|one| one.image == component.image)
        });
        let versions = alone.map(|component| ComponentVersion {
            name: component.name.clone(),
            id: component.id,
            image: component.image,
        });
        self.prepare(&order.of, versions, limit).await;
    }

    /// Lets `versions` inherit what launches of a profile lack of them. Returns when that is done,
    /// at the latest after `limit`.
    pub async fn prepare(
        self: &Arc<Self>,
        of: &ProfileRef,
        versions: impl Iterator<Item = ComponentVersion>,
        limit: Duration,
    ) {
        let heirs = self.heirs(of, versions);
        if heirs.is_empty() {
            return;
        }
        let inheritance = Arc::clone(self);
        let work = tokio::spawn(async move {
            for (version, predecessor) in heirs {
                inheritance.inherit(&version, predecessor).await;
            }
        });
        if tokio::time::timeout(limit, work).await.is_err() {
            let profile = &of.profile;
            tracing::info!(
                profile,
                "predecessors' working sets come too late for a launch"
            );
        }
    }

    async fn inherit(&self, version: &ComponentVersion, predecessor: Digest) {
        match self.carry(version, predecessor).await {
            Ok(profiles) => {
                let (name, image) = (&version.name, version.image);
                tracing::info!(name, %image, %predecessor, profiles, "a working set was inherited");
            }
            Err(error) => {
                let name = &version.name;
                tracing::warn!(name, %predecessor, %error, "a working set cannot be inherited");
                let pair = (predecessor, version.image);
                self.unreadable.lock().insert(pair, Instant::now());
            }
        }
    }

    async fn carry(
        &self,
        version: &ComponentVersion,
        predecessor: Digest,
    ) -> Result<usize, HostError> {
        let store = &self.store;
        let components = store.components().await.map_err(HostError::failed)?;
        let of_image = |one: &&Arc<Component>| one.image.digest == predecessor;
        let old_id = components.iter().find(of_image).map(|one| one.id());
        let old_id = old_id.ok_or_else(|| {
            HostError::Failed(format!("image {predecessor} is in no component any more"))
        })?;
        let (old, new) = tokio::try_join!(
            MetadataRegion::read(store, old_id),
            MetadataRegion::read(store, version.id),
        )?;
        let (models, image) = (self.learner.models(), version.image);
        let work = tokio::task::spawn_blocking(move || {
            let (old, new) = (old.files()?, new.files()?);
            let mut sets = models.sets.lock();
            Ok(sets.inherit(&predecessor, &layouts(&old), &image, &layouts(&new)))
        });
        work.await.map_err(HostError::failed)?
    }
}

fn layouts(files: &[FileExtents]) -> Vec<FileLayout<'_>> {
    let layouts = files.iter().map(|file| FileLayout {
        path: &file.path,
        extents: &file.extents,
    });
    layouts.collect()
}

/// All metadata of an image, which tells where its files lie.
struct MetadataRegion {
    bytes: Bytes,
    image_bytes: u64,
}

impl MetadataRegion {
    async fn read(store: &Store, id: ComponentId) -> Result<Self, HostError> {
        let image = store.component_image(id).await;
        let image = image.map_err(HostError::failed)?;
        let bytes = store.image_metadata(&image).await;
        Ok(Self {
            bytes: bytes.map_err(HostError::failed)?,
            image_bytes: image.image.bytes,
        })
    }

    fn files(&self) -> Result<Vec<FileExtents>, HostError> {
        let image = Image::open(self).map_err(HostError::failed)?;
        image.file_extents().map_err(HostError::failed)
    }
}

impl ReadAt for MetadataRegion {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        self.bytes[..].read_at(buffer, offset)
    }

    fn size(&self) -> std::io::Result<u64> {
        Ok(self.image_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lineage_knows_the_last_versions_the_last_launched_first() {
        let image = |number: u64| Digest::of(&number.to_le_bytes());
        let mut lineage = Lineage::default();
        for number in 0..6 {
            lineage.note("nginx", image(number));
        }
        lineage.note("nginx", image(3));
        lineage.note("redis", image(99));
        let images: Vec<Digest> = lineage.images("nginx").collect();
        assert_eq!(images, [3, 5, 4, 2].map(image));
        assert_eq!(lineage.images("absent").count(), 0);
        for number in 0..MOST_NAMES {
            lineage.note(&format!("name{number}"), image(1));
        }
        assert_eq!(lineage.by_name.len(), MOST_NAMES);
    }
}
