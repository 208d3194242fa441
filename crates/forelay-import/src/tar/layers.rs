//! Layers of container images: deletions become those of overlayfs, and what an entry says
//! of the layers below is kept for those who know them.
//!
//! A layer deletes `NAME` of the layers below it by a file `.wh.NAME`, and all that is in
//! a directory below it by `.wh..wh..opq` (OCI image specification, "Whiteouts"). Neither
//! concerns what the layer itself has.

use std::collections::{BTreeSet, HashSet};

use forelay_image::erofs::xattr::{OPAQUE, REPLACES};
use forelay_image::tree::{Attributes, Kind, Node, NodeId, ROOT, Tree, TreeError, split_path};

const PREFIX: &[u8] = b".wh.";
const OPAQUE_MARK: &[u8] = b".wh..wh..opq";

/// A layer of a container image. What it has stands as it is, whatever lies below; a
/// directory that names only lead through is not the layer's.
#[derive(Debug)]
pub(crate) struct ImageLayer {
    /// The files.
    pub tree: Tree,
    /// What is not in the tree as it is in the archive, in words.
    pub notes: Vec<String>,
    /// Nodes that are other names of what the layers below have at a path.
    pub links: Vec<(NodeId, Vec<u8>)>,
    /// Opaque directories that keep the attributes that they have below.
    pub bare: Vec<Vec<u8>>,
}

/// What the entries of a layer say, beside the tree.
#[derive(Debug, Default)]
pub(super) struct Own {
    /// Directories that have an entry.
    pub directories: HashSet<NodeId>,
    /// See [`ImageLayer::links`].
    pub links: Vec<(NodeId, Vec<u8>)>,
}

/// Deletions that an archive's names ask for.
#[derive(Debug, Default)]
pub(super) struct Deletions {
    paths: BTreeSet<Vec<u8>>,
    opaque: BTreeSet<Vec<u8>>,
    most_nodes: usize,
}

/// What a name says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Nothing: it is a file's.
    Nothing,
    /// A deletion, or a mark of AUFS's own, which means nothing here.
    Taken,
    /// Deletes what has no name.
    Malformed,
}

impl Deletions {
    /// Takes note of the entry at `path`.
    pub(super) fn note(&mut self, path: &[u8]) -> Said {
        let parts: Vec<&[u8]> = split_path(path).collect();
        let Some((name, parents)) = parts.split_last() else {
            return Said::Nothing;
        };
        let Some(deleted) = name.strip_prefix(PREFIX) else {
            return Said::Nothing;
        };
        self.most_nodes += parts.len();
        let parent = parents.join(&b'/');
        if *name == OPAQUE_MARK {
            self.opaque.insert(parent);
        } else if deleted.is_empty() || matches!(deleted, b"." | b"..") {
            return Said::Malformed;
        } else if !deleted.starts_with(PREFIX) {
            let separator: &[u8] = if parents.is_empty() { b"" } else { b"/" };
            self.paths
                .insert([&parent[..], separator, deleted].concat());
        }
        Said::Taken
    }

    /// How many files and directories they add to a tree at most.
    pub(super) fn most_nodes(&self) -> usize {
        self.most_nodes
    }

    /// Puts them into the tree that the archive gave; returns a note if there are any. An
    /// archive that deletes is a layer: what it has stands as it is, whatever lies below.
    pub(super) fn apply(self, tree: &mut Tree) -> Result<Option<String>, TreeError> {
        let count = self.paths.len() + self.opaque.len();
        if count == 0 {
            return Ok(None);
        }
        for id in tree.reachable().into_iter().skip(1) {
            let attributes = &tree.node(id).attributes;
            // A directory that names only lead through is not the archive's.
            if *attributes != Attributes::with_mode(0o755) || tree.entries(id).is_none() {
                mark(tree, id, REPLACES);
            }
        }
        self.delete(tree)?;
        Ok(Some(format!(
            "deletes {count} names below it, as a layer of an image"
        )))
    }

    /// The same for a layer, whose `directories` have entries. Returns opaque directories
    /// that have none; those that are not in the tree are for layers below to tell.
    pub(super) fn apply_layer(
        mut self,
        tree: &mut Tree,
        directories: &HashSet<NodeId>,
    ) -> Result<Vec<Vec<u8>>, TreeError> {
        for id in tree.reachable() {
            if tree.entries(id).is_none() || directories.contains(&id) {
                mark(tree, id, REPLACES);
            }
        }
        let opaque = std::mem::take(&mut self.opaque);
        self.delete(tree)?;
        let mut bare = Vec::new();
        for path in opaque {
            let id = tree.lookup(&path).filter(|&id| tree.entries(id).is_some());
            if let Some(id) = id {
                mark(tree, id, OPAQUE);
            }
            let has_entry = id.is_some_and(|id| directories.contains(&id));
            if !has_entry && !is_hidden(tree, &path) {
                bare.push(path);
            }
        }
        Ok(bare)
    }

    fn delete(self, tree: &mut Tree) -> Result<(), TreeError> {
        for path in self.paths {
            match tree.lookup(&path) {
                // Nothing of a directory that was deleted and made again is merged.
                Some(id) if tree.entries(id).is_some() => mark(tree, id, OPAQUE),
                Some(_) => {}
                None if is_hidden(tree, &path) => {}
                None => {
                    let attributes = Attributes::with_mode(0);
                    let kind = Kind::CharDevice { major: 0, minor: 0 };
                    tree.insert_path(&path, Node { attributes, kind })?;
                }
            }
        }
        for path in self.opaque {
            if !is_hidden(tree, &path) {
                let id = tree.make_directories(&path)?;
                mark(tree, id, OPAQUE);
            }
        }
        Ok(())
    }
}

/// True if the layer has no directory where a path leads, so that nothing of it is left.
fn is_hidden(tree: &Tree, path: &[u8]) -> bool {
    let mut at = Some(ROOT);
    for name in split_path(path) {
        let Some(id) = at else { return false };
        let Some(entries) = tree.entries(id) else {
            return true;
        };
        at = entries.get(name).copied();
    }
    at.is_some_and(|id| tree.entries(id).is_none())
}

pub(crate) fn mark(tree: &mut Tree, id: NodeId, name: &[u8]) {
    let xattrs = &mut tree.node_mut(id).attributes.xattrs;
    xattrs.insert(name.to_vec(), b"y".to_vec());
}

/// True for what `docker save` and its like write: an archive of whole images.
pub(super) fn is_image_archive(tree: &Tree) -> bool {
    let file = |name: &str| tree.file(name.as_bytes()).is_some();
    let names_layers = || {
        let manifest = tree.text_of("manifest.json").ok().flatten();
        manifest.is_some_and(|text| text.contains("\"Layers\""))
    };
    (file("oci-layout") && file("index.json")) || (file("manifest.json") && names_layers())
}
