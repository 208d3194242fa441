//! Archives of container images: a layer's deletions become those of overlayfs, and an
//! archive of whole images is refused with the word for it.
//!
//! A layer deletes `NAME` of the layers below it by a file `.wh.NAME`, and all that is in
//! a directory below it by `.wh..wh..opq` (OCI image specification, "Whiteouts"). Neither
//! concerns what the layer itself has.

use std::collections::BTreeSet;

use forelay_image::erofs::xattr::{OPAQUE, REPLACES};
use forelay_image::tree::{Attributes, Kind, Node, NodeId, Tree, TreeError};

const PREFIX: &[u8] = b".wh.";
const OPAQUE_MARK: &[u8] = b".wh..wh..opq";

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
        let parts: Vec<&[u8]> = forelay_image::tree::split_path(path).collect();
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
        for path in self.paths {
            match tree.lookup(&path) {
                // Nothing of a directory that was deleted and made again is merged.
                Some(id) if tree.entries(id).is_some() => mark(tree, id, OPAQUE),
                Some(_) => {}
                None => {
                    let attributes = Attributes::with_mode(0);
                    let kind = Kind::CharDevice { major: 0, minor: 0 };
                    tree.insert_path(&path, Node { attributes, kind })?;
                }
            }
        }
        for path in self.opaque {
            let id = tree.make_directories(&path)?;
            mark(tree, id, OPAQUE);
        }
        Ok(Some(format!(
            "deletes {count} names below it, as a layer of an image"
        )))
    }
}

fn mark(tree: &mut Tree, id: NodeId, name: &[u8]) {
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
