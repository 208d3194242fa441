//! Garbage collection: deletes what no component refers to.
//!
//! Roots are all visible components and the images that the caller names (those of locks
//! in use). Live are the chunk index and locations of each root image and the packs that
//! live locations name; of everything else the collector first only *condemns*: it puts
//! a mark `condemned/<digest>`. A later run deletes what is still dead once its mark is
//! older than the grace period. Publishers do not reuse condemned packs, take marks off
//! what they revive, and look again before and after they make a component visible, so a
//! publication is safe unless it takes longer than the grace period.
//!
//! Refuses to rewrite packs: a pack with one live chunk stays whole.
//!
//! Invariant: locations go before the packs that they name, so nothing visible ever
//! names a pack that gc has deleted.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, SystemTime};

use forelay_image::Digest;
use forelay_image::component::ImageRef;

use crate::error::StoreError;
use crate::layout;
use crate::pack::Locations;
use crate::repository::{Object, Put, RepositoryError};
use crate::store::{Store, decode_component};

/// What to collect.
#[derive(Clone, Debug)]
pub struct GcOptions {
    /// Images that are in use besides those of visible components.
    pub images_in_use: Vec<ImageRef>,
    /// How long something must have been condemned before it is deleted. Must exceed
    /// the longest publication.
    pub grace: Duration,
    /// Changes nothing, and tells what a run would do.
    pub dry_run: bool,
}

impl Default for GcOptions {
    fn default() -> Self {
        Self {
            images_in_use: Vec::new(),
            grace: Duration::from_secs(24 * 3600),
            dry_run: false,
        }
    }
}

/// What a collection did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct GcReport {
    /// Visible components.
    pub components: u64,
    /// Images that are live.
    pub live_images: u64,
    /// Packs that are live.
    pub live_packs: u64,
    /// Images and packs condemned by this run.
    pub condemned: u64,
    /// Images and packs deleted.
    pub deleted: u64,
    /// Bytes given back.
    pub freed_bytes: u64,
    /// Images and packs that were condemned and are live again.
    pub revived: u64,
    /// Images and packs that nothing live refers to, whatever their age: what runs to come will
    /// delete. Told by a dry run alone.
    pub unused: u64,
    /// Their bytes.
    pub unused_bytes: u64,
}

/// Keys of objects by the digest in them.
type Objects = BTreeMap<Digest, Vec<String>>;

impl Store {
    /// Collects garbage. The first run condemns, a run after the grace period deletes.
    pub async fn gc(&self, options: &GcOptions) -> Result<GcReport, StoreError> {
        if !options.dry_run {
            self.check_writable().await?;
        }
        let mut report = GcReport::default();
        // Listed before the roots: what is published meanwhile is not in these lists.
        let mut images = self.objects(layout::CHUNKS, &[".idx"]).await?;
        for (image, objects) in self.objects(layout::LOCATIONS, &[".loc"]).await? {
            images.entry(image).or_default().extend(objects);
        }
        let packs = self.objects(layout::PACKS, &[".pack", ".idx"]).await?;
        let marks = self.objects(layout::CONDEMNED, &[""]).await?;

        let mut live_images = self.root_images(&mut report).await?;
        live_images.extend(options.images_in_use.iter().map(|image| image.chunk_index));
        let mut live_packs = BTreeSet::new();
        let mut used_packs: BTreeSet<Digest> = BTreeSet::new();
        for image in images.keys() {
            // Also of dead images: their packs fall when they have.
            let packs = self.packs_of(*image).await?;
            if live_images.contains(image) {
                used_packs.extend(&packs);
            }
            live_packs.extend(packs);
        }
        report.live_images = images
            .keys()
            .filter(|image| live_images.contains(image))
            .count() as u64;
        report.live_packs = packs
            .keys()
            .filter(|pack| live_packs.contains(pack))
            .count() as u64;

        let sweep = Sweep {
            store: self,
            marks: &marks,
            options,
        };
        if options.dry_run {
            let is_used = |image: &Digest| live_images.contains(image);
            sweep.add_unused(&images, is_used, &mut report).await?;
            let is_used = |pack: &Digest| used_packs.contains(pack);
            sweep.add_unused(&packs, is_used, &mut report).await?;
        }
        // Locations before chunk indexes, so that half a deletion leaves no locations.
        for objects in images.values_mut() {
            objects.reverse();
        }
        sweep
            .run(&images, |image| live_images.contains(image), &mut report)
            .await?;
        sweep
            .run(&packs, |pack| live_packs.contains(pack), &mut report)
            .await?;
        Ok(report)
    }

    async fn objects(&self, folder: &str, suffixes: &[&str]) -> Result<Objects, StoreError> {
        let mut objects = Objects::new();
        for key in self.0.repository.list(folder).await? {
            let digest = suffixes
                .iter()
                .find_map(|suffix| layout::digest_in(&key, folder, suffix));
            if let Some(digest) = digest {
                objects.entry(digest).or_default().push(key);
            }
        }
        Ok(objects)
    }

    /// Chunk indexes of visible components. Metadata that cannot be read stops the collection:
    /// what it refers to is not known.
    async fn root_images(&self, report: &mut GcReport) -> Result<HashSet<Digest>, StoreError> {
        let mut images = HashSet::new();
        for id in self
            .objects(layout::COMPONENTS, &[".json"])
            .await?
            .into_keys()
        {
            let key = layout::component(id);
            let bytes = match self.get(&key).await {
                Err(error) if error.is_not_found() => continue,
                other => other?,
            };
            let component = decode_component(id, &bytes)
                .map_err(|problem| StoreError::Corrupted { key, problem })?;
            images.insert(component.image.chunk_index);
            report.components += 1;
        }
        Ok(images)
    }

    async fn packs_of(&self, index: Digest) -> Result<Vec<Digest>, StoreError> {
        let key = layout::locations(index);
        let bytes = match self.get(&key).await {
            Err(error) if error.is_not_found() => return Ok(Vec::new()),
            other => other?,
        };
        let locations = Locations::decode(&bytes).map_err(|error| StoreError::Corrupted {
            key,
            problem: error.to_string(),
        })?;
        Ok(locations.packs)
    }
}

struct Sweep<'a> {
    store: &'a Store,
    marks: &'a Objects,
    options: &'a GcOptions,
}

impl Sweep<'_> {
    /// Adds what is not used to the report.
    async fn add_unused(
        &self,
        objects: &Objects,
        is_used: impl Fn(&Digest) -> bool,
        report: &mut GcReport,
    ) -> Result<(), StoreError> {
        for (_, keys) in objects.iter().filter(|(digest, _)| !is_used(digest)) {
            let found = self.inspect(keys).await?;
            report.unused += 1;
            report.unused_bytes += bytes(&found);
        }
        Ok(())
    }

    async fn run(
        &self,
        objects: &Objects,
        is_live: impl Fn(&Digest) -> bool,
        report: &mut GcReport,
    ) -> Result<(), StoreError> {
        let repository = &self.store.0.repository;
        for (digest, keys) in objects {
            let mark = layout::condemned(*digest);
            match (is_live(digest), self.marks.contains_key(digest)) {
                (true, false) => {}
                (true, true) => {
                    if !self.options.dry_run {
                        repository.delete(&mark).await?;
                    }
                    report.revived += 1;
                }
                (false, false) => {
                    // Objects younger than the grace period may belong to a publication.
                    let found = self.inspect(keys).await?;
                    let is_old = |one: &Object| age(one) >= self.options.grace;
                    if !found.iter().flatten().all(is_old) {
                        continue;
                    }
                    let put = match self.options.dry_run {
                        true => Put::Created,
                        false => repository.put_if_absent(&mark, Vec::new().into()).await?,
                    };
                    report.condemned += u64::from(put == Put::Created);
                }
                (false, true) => {
                    let found = self.inspect(keys).await?;
                    // A publisher may have taken the mark off since it was listed.
                    match repository.inspect(&mark).await {
                        Ok(mark) if age(&mark) >= self.options.grace => {}
                        _ => continue,
                    }
                    for key in keys.iter().chain([&mark]) {
                        if !self.options.dry_run {
                            repository.delete(key).await?;
                        }
                    }
                    report.freed_bytes += bytes(&found);
                    report.deleted += 1;
                }
            }
        }
        Ok(())
    }

    /// Size and age of each object that is there still.
    async fn inspect(&self, keys: &[String]) -> Result<Vec<Option<Object>>, RepositoryError> {
        let mut found = Vec::new();
        for key in keys {
            match self.store.0.repository.inspect(key).await {
                Ok(object) => found.push(Some(object)),
                Err(error) if error.is_not_found() => found.push(None),
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}

/// Bytes of those that are there.
fn bytes(found: &[Option<Object>]) -> u64 {
    found.iter().flatten().map(|one| one.bytes).sum()
}

fn age(object: &Object) -> Duration {
    SystemTime::now()
        .duration_since(object.modified)
        .unwrap_or_default()
}
