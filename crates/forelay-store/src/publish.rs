//! Publishing a component: chunks into packs, then indexes, last the metadata.
//!
//! Chunks that some pack already holds are not stored again. Everything is written under
//! names nothing refers to yet; the component becomes visible with the last object, so a
//! failure at any point leaves only garbage that `gc` finds.
//!
//! Racing with `gc`: a pack that this publication wants to reuse may be condemned. Packs
//! with a mark are not reused, and before the last step the reused packs are checked
//! again; if one was condemned or deleted meanwhile, publication starts over.
//!
//! Invariant: every chunk read from the image file has the digest that the index names.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use forelay_image::{ChunkIndex, Component, ComponentId, Digest};

use crate::error::StoreError;
use crate::images::check_metadata_bytes;
use crate::layout;
use crate::pack::{FinishedPack, Location, Locations, PackIndex, PackWriter};
use crate::repository::{Body, Put};
use crate::store::Store;

/// How far a publication is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublishProgress {
    /// Bytes of the image that were looked at.
    pub done_bytes: u64,
    /// Bytes of the image.
    pub total_bytes: u64,
    /// Bytes of chunks that the repository already had.
    pub reused_bytes: u64,
    /// Bytes put into packs, as stored (compressed).
    pub stored_bytes: u64,
}

/// What a publication did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// The component.
    pub id: ComponentId,
    /// True if it was not in the repository before.
    pub created: bool,
    /// What went where.
    pub progress: PublishProgress,
}

/// Where chunks are that the repository has already.
pub(crate) type Known = HashMap<Digest, (Digest, Location)>;

/// What publishing the chunks needs, owned, for the blocking thread.
struct Job {
    path: PathBuf,
    index: ChunkIndex,
    known: Known,
    scratch: PathBuf,
}

enum PackingEvent {
    Progress(PublishProgress),
    Pack(FinishedPack),
}

impl Store {
    /// Publishes a component whose image is in the file `image`. When this returns, the
    /// component is durable and visible; when it fails, nothing of it is visible.
    pub async fn publish(
        &self,
        component: &Component,
        image: &Path,
        chunks: &ChunkIndex,
        progress: &(dyn Fn(PublishProgress) + Send + Sync),
    ) -> Result<Published, StoreError> {
        self.check_writable().await?;
        check_consistency(component, chunks)?;
        let id = component.id();
        for _ in 0..2 {
            if let Some(published) = self
                .publish_once(component, image, chunks, progress)
                .await?
            {
                return Ok(Published { id, ..published });
            }
            tracing::warn!(component = %component.name, "gc condemned packs in use; publishing again");
        }
        Err(StoreError::Inconsistent(
            "gc keeps deleting the packs that it shares; try again when gc is done".into(),
        ))
    }

    async fn publish_once(
        &self,
        component: &Component,
        image: &Path,
        chunks: &ChunkIndex,
        progress: &(dyn Fn(PublishProgress) + Send + Sync),
    ) -> Result<Option<Published>, StoreError> {
        let known = self.known_chunks().await?;
        let job = Job {
            path: image.to_owned(),
            index: chunks.clone(),
            known: known.clone(),
            scratch: self.0.scratch.clone(),
        };
        let (sender, mut events) = tokio::sync::mpsc::channel(2);
        let packing = tokio::task::spawn_blocking(move || job.pack(&sender));
        let mut last = PublishProgress::default();
        let mut places: Known = known;
        let mut fresh: HashSet<Digest> = HashSet::new();
        while let Some(event) = events.recv().await {
            match event {
                PackingEvent::Progress(now) => {
                    last = now;
                    progress(now);
                }
                PackingEvent::Pack(pack) => {
                    fresh.insert(pack.index.pack);
                    self.put_pack(&pack).await?;
                    remember(&mut places, &pack.index, true);
                }
            }
        }
        packing
            .await
            .map_err(|error| StoreError::Inconsistent(error.to_string()))??;
        let locations = locate(component, chunks, &places)?;
        let put = self
            .make_visible(component, chunks, &locations, &fresh)
            .await?;
        let Some(put) = put else {
            return Ok(None);
        };
        Ok(Some(Published {
            id: component.id(),
            created: put == Put::Created,
            progress: last,
        }))
    }

    /// The last steps of a publication, after all packs: indexes, then metadata. `None` if gc
    /// took a pack away meanwhile.
    pub(crate) async fn make_visible(
        &self,
        component: &Component,
        chunks: &ChunkIndex,
        locations: &Locations,
        fresh: &HashSet<Digest>,
    ) -> Result<Option<Put>, StoreError> {
        if !self.put_indexes(chunks, locations, fresh).await? {
            return Ok(None);
        }
        let key = layout::component(component.id());
        let metadata = component.canonical_json();
        let put = self
            .0
            .repository
            .put_if_absent(&key, metadata.into())
            .await?;
        // A collector that had listed the image as dead may have been at work: from here
        // on the image is live, so what is there now stays.
        if !self.put_indexes(chunks, locations, fresh).await? {
            return Ok(None);
        }
        self.add_image(component.image)?;
        Ok(Some(put))
    }

    /// Puts chunk index and locations, and checks that what they name stands. Indexes
    /// found in the repository are another publication's, and as good if they stand.
    async fn put_indexes(
        &self,
        chunks: &ChunkIndex,
        locations: &Locations,
        fresh: &HashSet<Digest>,
    ) -> Result<bool, StoreError> {
        let repository = &self.0.repository;
        let index = locations.chunk_index;
        repository.delete(&layout::condemned(index)).await?;
        repository
            .put_if_absent(&layout::chunk_index(index), chunks.encode().into())
            .await?;
        let key = layout::locations(index);
        let put = repository
            .put_if_absent(&key, locations.encode().into())
            .await?;
        let standing = match put {
            Put::Created => self.all_standing(&locations.packs, fresh).await?,
            Put::Present => match Locations::decode(&self.get(&key).await?) {
                Ok(found) => self.all_standing(&found.packs, fresh).await?,
                Err(_) => false,
            },
        };
        if !standing {
            repository.delete(&key).await?;
        }
        Ok(standing)
    }

    pub(crate) async fn put_pack(&self, pack: &FinishedPack) -> Result<(), StoreError> {
        let repository = &self.0.repository;
        let body = Body::File(pack.file.path().to_owned());
        repository
            .put_if_absent(&layout::pack(pack.index.pack), body)
            .await?;
        let index = pack.index.encode();
        repository
            .put_if_absent(&layout::pack_index(pack.index.pack), index.into())
            .await?;
        // The same bytes may have been a pack before, and condemned.
        repository
            .delete(&layout::condemned(pack.index.pack))
            .await?;
        Ok(())
    }

    /// Chunks of all packs that are not condemned.
    pub(crate) async fn known_chunks(&self) -> Result<Known, StoreError> {
        let repository = &self.0.repository;
        let condemned = self.condemned().await?;
        let listed = repository.list(layout::PACKS).await?;
        let packs: Vec<Digest> = listed
            .iter()
            .filter_map(|key| layout::digest_in(key, layout::PACKS, ".idx"))
            .filter(|pack| !condemned.contains(pack))
            .collect();
        let mut known = Known::new();
        for group in packs.chunks(32) {
            let indexes = group.iter().map(|pack| self.pack_index(*pack));
            for index in futures_util::future::join_all(indexes).await {
                match index {
                    Ok(index) => remember(&mut known, &index, false),
                    // Reuse is an economy: what cannot be read is stored again.
                    Err(error) => tracing::warn!(%error, "not reusing a pack"),
                }
            }
        }
        Ok(known)
    }

    pub(crate) async fn pack_index(&self, pack: Digest) -> Result<PackIndex, StoreError> {
        let decode = |bytes: &[u8]| {
            let index = PackIndex::decode(bytes).map_err(|error| error.to_string())?;
            if index.pack == pack {
                Ok(index)
            } else {
                Err("it is the index of another pack".to_owned())
            }
        };
        self.0
            .images
            .object(&layout::pack_index(pack), true, decode)
            .await
    }

    pub(crate) async fn condemned(&self) -> Result<HashSet<Digest>, StoreError> {
        let listed = self.0.repository.list(layout::CONDEMNED).await?;
        Ok(listed
            .iter()
            .filter_map(|key| layout::digest_in(key, layout::CONDEMNED, ""))
            .collect())
    }

    /// True if none of the packs is condemned or gone; `fresh` ones have just been put.
    async fn all_standing(
        &self,
        packs: &[Digest],
        fresh: &HashSet<Digest>,
    ) -> Result<bool, StoreError> {
        if packs.iter().all(|pack| fresh.contains(pack)) {
            return Ok(true);
        }
        let condemned = self.condemned().await?;
        let listed = self.0.repository.list(layout::PACKS).await?;
        let present: HashSet<Digest> = listed
            .iter()
            .filter_map(|key| layout::digest_in(key, layout::PACKS, ".pack"))
            .collect();
        Ok(packs
            .iter()
            .all(|pack| present.contains(pack) && !condemned.contains(pack)))
    }
}

impl Job {
    /// Reads the image chunk by chunk and packs what is new.
    fn pack(self, events: &tokio::sync::mpsc::Sender<PackingEvent>) -> Result<(), StoreError> {
        let reading = |source| StoreError::File {
            doing: "reading",
            path: self.path.clone(),
            source,
        };
        let writing = |source| StoreError::File {
            doing: "writing a pack in",
            path: self.scratch.clone(),
            source,
        };
        let file = File::open(&self.path).map_err(reading)?;
        let mut progress = PublishProgress {
            total_bytes: self.index.image_bytes,
            ..Default::default()
        };
        let mut writer: Option<PackWriter> = None;
        let mut added: HashSet<Digest> = HashSet::new();
        let mut buffer = Vec::new();
        for (chunk_no, chunk) in self.index.chunks.iter().enumerate() {
            buffer.resize(chunk.len as usize, 0);
            let read = file.read_exact_at(&mut buffer, chunk.offset);
            let changed = || StoreError::ImageChanged {
                path: self.path.clone(),
                chunk_no,
            };
            match read {
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                    return Err(changed());
                }
                other => other.map_err(reading)?,
            }
            if Digest::of(&buffer) != chunk.digest {
                return Err(changed());
            }
            progress.done_bytes += u64::from(chunk.len);
            if self.known.contains_key(&chunk.digest) || !added.insert(chunk.digest) {
                progress.reused_bytes += u64::from(chunk.len);
            } else {
                let mut open = match writer.take() {
                    Some(open) => open,
                    None => PackWriter::new_in(&self.scratch).map_err(writing)?,
                };
                let entry = open.append(chunk.digest, &buffer).map_err(writing)?;
                progress.stored_bytes += u64::from(entry.stored_bytes);
                if open.is_full() {
                    let _ =
                        events.blocking_send(PackingEvent::Pack(open.finish().map_err(writing)?));
                } else {
                    writer = Some(open);
                }
            }
            if chunk_no % 64 == 0 {
                // A receiver that is gone has failed; this thread then ends by itself.
                if events
                    .blocking_send(PackingEvent::Progress(progress))
                    .is_err()
                {
                    return Ok(());
                }
            }
        }
        if let Some(open) = writer {
            let _ = events.blocking_send(PackingEvent::Pack(open.finish().map_err(writing)?));
        }
        let _ = events.blocking_send(PackingEvent::Progress(progress));
        Ok(())
    }
}

pub(crate) fn remember(known: &mut Known, index: &PackIndex, replace: bool) {
    for entry in &index.entries {
        let location = Location {
            pack: 0,
            offset: entry.offset,
            stored_bytes: entry.stored_bytes,
        };
        if replace {
            known.insert(entry.chunk, (index.pack, location));
        } else {
            known.entry(entry.chunk).or_insert((index.pack, location));
        }
    }
}

pub(crate) fn locate(
    component: &Component,
    chunks: &ChunkIndex,
    places: &Known,
) -> Result<Locations, StoreError> {
    let mut packs: Vec<Digest> = Vec::new();
    let mut numbers: HashMap<Digest, u32> = HashMap::new();
    let mut located = Vec::with_capacity(chunks.chunks.len());
    for chunk in &chunks.chunks {
        let Some((pack, location)) = places.get(&chunk.digest) else {
            return Err(StoreError::Inconsistent(format!(
                "chunk {} was not stored",
                chunk.digest
            )));
        };
        let number = *numbers.entry(*pack).or_insert_with(|| {
            packs.push(*pack);
            packs.len() as u32 - 1
        });
        located.push(Location {
            pack: number,
            ..*location
        });
    }
    Ok(Locations {
        chunk_index: component.image.chunk_index,
        packs,
        chunks: located,
    })
}

fn check_consistency(component: &Component, chunks: &ChunkIndex) -> Result<(), StoreError> {
    let inconsistent = |text: String| Err(StoreError::Inconsistent(text));
    if let Err(error) = chunks.validate() {
        return inconsistent(error.to_string());
    }
    if chunks.image != component.image.digest || chunks.image_bytes != component.image.bytes {
        return inconsistent("its chunk index is of another image".into());
    }
    let (encoded, pinned) = (chunks.encode(), component.image.chunk_index);
    if Digest::of(&encoded) != pinned {
        return inconsistent("it pins another chunk index".into());
    }
    if let Err(problem) = check_metadata_bytes(&component.image) {
        return inconsistent(problem.into());
    }
    let metadata = (
        layout::component(component.id()),
        component.canonical_json(),
    );
    for (key, bytes) in [(layout::chunk_index(pinned), encoded), metadata] {
        if bytes.len() as u64 > layout::most_bytes(&key) {
            return inconsistent(format!("{key} would have {} bytes", bytes.len()));
        }
    }
    if let Err(error) = component.check_names() {
        return inconsistent(error.to_string());
    }
    let ranges = component
        .requires
        .iter()
        .flatten()
        .chain(&component.conflicts);
    for range in ranges {
        if let Err(error) = range.range.parse::<forelay_image::version::Range>() {
            return inconsistent(format!("its relation to {}: {error}", range.name));
        }
    }
    Ok(())
}
