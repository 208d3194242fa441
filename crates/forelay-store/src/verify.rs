//! Verification: reads everything in a repository and checks that it is what it says.
//!
//! Every pack is hashed and every chunk in it unpacked; every component, chunk index and
//! locations object is decoded and checked against the packs. Goes on after a problem,
//! so that one run finds all of them.
//!
//! Refuses to repair. Invariant: a repository without problems can serve every byte of
//! every component.

use std::collections::HashMap;

use forelay_image::{ComponentId, Digest};

use crate::error::StoreError;
use crate::images::{ImageMap, decode_chunk_index};
use crate::layout;
use crate::pack::{Locations, PackIndex, open_frame};
use crate::repository::RepositoryError;
use crate::store::{Store, decode_component};

/// How far a verification is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct VerifyProgress {
    /// Packs read.
    pub packs: u64,
    /// Packs that there are.
    pub total_packs: u64,
    /// Chunks unpacked and hashed.
    pub chunks: u64,
    /// Bytes read from the repository.
    pub bytes: u64,
    /// Components checked.
    pub components: u64,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// Key of the object.
    pub key: String,
    /// What is wrong with it.
    pub problem: String,
    /// It, or what its check takes, could not be read: it may be right.
    pub unreadable: bool,
}

/// What is wrong with an object that has no finding yet.
struct Problem {
    text: String,
    unreadable: bool,
}

impl Problem {
    fn at(self, key: String) -> Finding {
        Finding {
            key,
            problem: self.text,
            unreadable: self.unreadable,
        }
    }
}

impl From<String> for Problem {
    fn from(text: String) -> Self {
        Self {
            text,
            unreadable: false,
        }
    }
}

impl From<RepositoryError> for Problem {
    fn from(error: RepositoryError) -> Self {
        use RepositoryError::{NotFound, Truncated};
        Self {
            text: error.to_string(),
            unreadable: !matches!(error, NotFound { .. } | Truncated { .. }),
        }
    }
}

/// What a verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct VerifyReport {
    /// What was read.
    pub progress: VerifyProgress,
    /// What is wrong, in the order of keys.
    pub findings: Vec<Finding>,
}

impl Store {
    /// Reads and checks the whole repository. Fails only if it cannot be listed.
    pub async fn verify(
        &self,
        progress: &(dyn Fn(VerifyProgress) + Send + Sync),
    ) -> Result<VerifyReport, StoreError> {
        let mut report = VerifyReport::default();
        let mut indexes: HashMap<Digest, PackIndex> = HashMap::new();
        // Components first: what is published meanwhile is looked at by a later run.
        let components = self.0.repository.list(layout::COMPONENTS).await?;
        let listed = self.0.repository.list(layout::PACKS).await?;
        let packs: Vec<Digest> = listed
            .iter()
            .filter_map(|key| layout::digest_in(key, layout::PACKS, ".idx"))
            .collect();
        report.progress.total_packs = packs.len() as u64;
        for pack in packs {
            if let Some(index) = self.verify_pack(pack, &mut report).await {
                indexes.insert(pack, index);
            }
            report.progress.packs += 1;
            progress(report.progress);
        }
        for key in components {
            let problem = match layout::digest_in(&key, layout::COMPONENTS, ".json") {
                Some(id) => self.verify_component(id, &indexes, &report).await.err(),
                None => Some("its name is not that of a component".to_owned().into()),
            };
            report
                .findings
                .extend(problem.map(|problem| problem.at(key)));
            report.progress.components += 1;
            progress(report.progress);
        }
        report.findings.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(report)
    }

    /// Reads and checks one component with the packs that its bytes are in.
    pub async fn verify_one(&self, id: ComponentId) -> Result<VerifyReport, StoreError> {
        let mut report = VerifyReport::default();
        let mut indexes = HashMap::new();
        let component = self.component(id).await?;
        let key = layout::locations(component.image.chunk_index);
        let problem = match Locations::decode(&self.get(&key).await?) {
            Ok(locations) => {
                for pack in locations.packs {
                    if let Some(index) = self.verify_pack(pack, &mut report).await {
                        indexes.insert(pack, index);
                    }
                }
                self.verify_component(id, &indexes, &report).await.err()
            }
            Err(error) => Some(error.to_string().into()),
        };
        let found = problem.map(|problem| problem.at(layout::component(id)));
        report.findings.extend(found);
        Ok(report)
    }

    /// The pack's index, if the index itself is good.
    async fn verify_pack(&self, pack: Digest, report: &mut VerifyReport) -> Option<PackIndex> {
        let mut found = |key: String, problem: Problem| report.findings.push(problem.at(key));
        let key = layout::pack_index(pack);
        let decoded = match self.get(&key).await {
            Ok(bytes) => PackIndex::decode(&bytes).map_err(|error| error.to_string().into()),
            Err(error) => Err(error.into()),
        };
        let index = match decoded {
            Ok(index) if index.pack == pack => index,
            Ok(_) => {
                found(key, "it is the index of another pack".to_owned().into());
                return None;
            }
            Err(problem) => {
                found(key, problem);
                return None;
            }
        };
        let key = layout::pack(pack);
        let bytes = match self.get(&key).await {
            Ok(bytes) => bytes,
            Err(error) => {
                found(key, error.into());
                return Some(index);
            }
        };
        report.progress.bytes += bytes.len() as u64;
        let work = move || {
            let mut problems = Vec::new();
            if Digest::of(&bytes) != pack {
                problems.push(format!(
                    "its {} bytes do not have the digest that its name says",
                    bytes.len()
                ));
            }
            for entry in &index.entries {
                let range =
                    entry.offset as usize..entry.offset as usize + entry.stored_bytes as usize;
                let opened = bytes
                    .get(range)
                    .ok_or_else(|| "it lies beyond the pack's end".to_owned())
                    .and_then(|frame| {
                        open_frame(frame, entry.chunk_bytes, entry.chunk)
                            .map_err(|error| error.to_string())
                    });
                if let Err(problem) = opened {
                    problems.push(format!(
                        "chunk {} at byte {}: {problem}",
                        entry.chunk, entry.offset
                    ));
                }
            }
            (index, problems)
        };
        let (index, problems) = tokio::task::spawn_blocking(work).await.ok()?;
        report.progress.chunks += index.entries.len() as u64;
        let problems = problems.into_iter().map(Problem::from);
        let found = problems.map(|problem| problem.at(key.clone()));
        report.findings.extend(found);
        Some(index)
    }

    async fn verify_component(
        &self,
        id: Digest,
        indexes: &HashMap<Digest, PackIndex>,
        of_packs: &VerifyReport,
    ) -> Result<(), Problem> {
        let get = async |key: String| self.get(&key).await;
        let component = decode_component(id, &get(layout::component(id)).await?)?;
        let (image, pinned) = (component.image.digest, component.image.chunk_index);
        let index = decode_chunk_index(pinned, &get(layout::chunk_index(pinned)).await?)
            .map_err(|problem| format!("chunk index of image {image}: {problem}"))?;
        let locations = Locations::decode(&get(layout::locations(pinned)).await?)
            .map_err(|error| format!("locations of image {image}: {error}"))?;
        let map = ImageMap::new(component.image, index, locations).map_err(str::to_owned)?;
        for (chunk_no, chunk) in map.index.chunks.iter().enumerate() {
            let located = map.location(chunk_no as u32);
            let there = located.is_some_and(|(pack, location)| {
                indexes.get(&pack).is_some_and(|index| {
                    let at = index
                        .entries
                        .binary_search_by_key(&location.offset, |entry| entry.offset);
                    at.is_ok_and(|at| {
                        let entry = index.entries[at];
                        entry.chunk == chunk.digest
                            && entry.stored_bytes == location.stored_bytes
                            && entry.chunk_bytes == chunk.len
                    })
                })
            });
            if !there {
                let key = located.map(|(pack, _)| layout::pack_index(pack));
                let mut unread = of_packs.findings.iter().filter(|one| one.unreadable);
                return Err(Problem {
                    text: format!("chunk {chunk_no} of image {image} is in no readable pack"),
                    unreadable: unread.any(|one| Some(&one.key) == key.as_ref()),
                });
            }
        }
        Ok(())
    }
}
