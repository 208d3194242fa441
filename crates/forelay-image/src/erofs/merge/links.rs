//! Directories that stand where lower layers have a link to a directory: a package's
//! `/bin/tool` on a system where `/bin` is a link to `usr/bin`.
//!
//! Their entries belong to the directory that the link leads to. Where that is, only the
//! merged layers below tell; so the layers are merged without such directories, the links
//! are followed in the result, and the layers are merged once more with what was found, until
//! nothing is open. Before what a layer hides, all that is below that layer is settled. Images that were built on their base have no such directories, and are
//! merged once.
//!
//! Owns where links lead. Invariant: a layer's directory goes where its link leads in the
//! layers below it, whatever later layers do.

use std::collections::HashMap;

use super::ComposeError;
use super::layer::Source;
use super::walk::{Merged, OpenDirectory, walk};
use crate::erofs::layout::FileType;
use crate::tree::split_path;

/// Most links that are followed for one path, as for the kernel.
const MAX_LINKS: usize = 40;
/// Where every VM has a file system of its own, which hides what an image has there.
const HIDDEN: &[u8] = b"run";

/// What becomes of a layer's directory that stands on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Its entries are in the directory at this path, without leading `/`.
    Through(Vec<u8>),
    /// The link leads to what only a running VM has (`/run/lock`): there is no place for it.
    Nowhere,
    /// It takes the place of the link, which leads to no directory.
    Replaces,
}

/// A directory that goes to another path.
#[derive(Clone, Debug)]
pub(super) struct Landing {
    pub layer: u16,
    /// Byte offset of its inode.
    pub at: u32,
    /// Where it stands in its layer.
    pub from: Vec<u8>,
}

/// What is known of directories that stand on links.
#[derive(Debug, Default)]
pub(super) struct Ways {
    by_directory: HashMap<(u16, u32), Way>,
    by_target: HashMap<Vec<u8>, Vec<Landing>>,
}

impl Ways {
    pub(super) fn is_empty(&self) -> bool {
        self.by_directory.is_empty()
    }

    pub(super) fn of(&self, layer: u16, at: u32) -> Option<&Way> {
        self.by_directory.get(&(layer, at))
    }

    /// What comes to the directory at `path`.
    pub(super) fn landings(&self, path: &[u8]) -> &[Landing] {
        self.by_target.get(path).map_or(&[], Vec::as_slice)
    }

    fn learn(&mut self, open: OpenDirectory, way: Way) {
        let OpenDirectory {
            layer, at, from, ..
        } = open;
        if let Way::Through(target) = &way {
            let landings = self.by_target.entry(target.clone()).or_default();
            landings.push(Landing { layer, at, from });
        }
        self.by_directory.insert((layer, at), way);
    }
}

/// Merges all `sources`, the last of which is the VM's own.
pub(super) fn merge(sources: &mut [Source<'_>]) -> Result<Merged, ComposeError> {
    let mut search = Search {
        ways: Ways::default(),
        own: sources.len() - 1,
        settled: vec![false; sources.len()],
        // Each round settles a layer's directories at one depth.
        rounds: sources.len() * 4 + 64,
    };
    search.merge(sources)
}

struct Search {
    ways: Ways,
    own: usize,
    /// Layers below which no directory is open.
    settled: Vec<bool>,
    /// How often the layers may still be merged.
    rounds: usize,
}

impl Search {
    /// Merges the lowest layers, finding all ways in them.
    fn merge(&mut self, sources: &mut [Source<'_>]) -> Result<Merged, ComposeError> {
        while self.rounds > 0 {
            self.rounds -= 1;
            let mut merged = walk(sources, &self.ways, self.own)?;
            let unsettled = |hider: &&u16| !self.settled[usize::from(**hider)];
            if let Some(&hider) = merged.hiders.iter().find(unsettled) {
                let below = &mut sources[..usize::from(hider)];
                below.iter_mut().for_each(Source::reset);
                self.merge(below)?;
                self.settled[usize::from(hider)] = true;
            } else {
                let open = std::mem::take(&mut merged.open);
                let Some(lowest) = open.iter().map(|open| open.layer).min() else {
                    return merged.refused.take().map_or(Ok(merged), Err);
                };
                let below = &mut sources[..usize::from(lowest)];
                below.iter_mut().for_each(Source::reset);
                let merged = walk(below, &self.ways, self.own)?;
                for open in open.into_iter().filter(|open| open.layer == lowest) {
                    let way = follow(&merged, below, &open.path);
                    self.ways.learn(open, way);
                }
            }
            sources.iter_mut().for_each(Source::reset);
        }
        Err(ComposeError::TooLarge(
            "directories on links to directories, too deep",
        ))
    }
}

/// Where the link at `path` leads in the merged layers.
fn follow(merged: &Merged, sources: &[Source<'_>], path: &[u8]) -> Way {
    let mut pending: Vec<Vec<u8>> = split_path(path).map(<[u8]>::to_vec).collect();
    pending.reverse();
    // The directories that lead to where we are, and their names.
    let mut at: Vec<(u32, Vec<u8>)> = Vec::new();
    let mut links = 0;
    while let Some(name) = pending.pop() {
        if name == b".." {
            at.pop();
            continue;
        }
        let directory = at.last().map_or(0, |(directory, _)| *directory);
        let Some(node) = merged.child(sources, directory, &name) else {
            let mut missing = at.iter().map(|(_, name)| &name[..]).chain([&name[..]]);
            return match missing.next() {
                Some(HIDDEN) => Way::Nowhere,
                _ => Way::Replaces,
            };
        };
        match node.file_type {
            FileType::Directory => at.push((node.extra, name)),
            FileType::Symlink if links < MAX_LINKS => {
                links += 1;
                let target = merged.target(sources, node);
                if target.starts_with(b"/") {
                    at.clear();
                }
                let parts = split_path(&target).map(<[u8]>::to_vec);
                pending.extend(parts.collect::<Vec<_>>().into_iter().rev());
            }
            _ => return Way::Replaces,
        }
    }
    let names: Vec<Vec<u8>> = at.into_iter().map(|(_, name)| name).collect();
    Way::Through(names.join(&b'/'))
}
