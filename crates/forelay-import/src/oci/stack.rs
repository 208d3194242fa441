//! What a layer says of the layers below it, settled: hard links to files that they have,
//! and opaque directories that keep their attributes.
//!
//! A file that a layer below has and that gets another name is copied up with all its names,
//! as overlayfs does, so that they stay names of one file. Such a layer is not what it would
//! be on others.
//!
//! Owns looking up a path in a stack of layers: their deletions hold, links are followed.

use std::collections::{BTreeSet, HashMap, HashSet};

use forelay_image::erofs::xattr::{OPAQUE, REPLACES};
use forelay_image::tree::{Attributes, Kind, NodeId, ROOT, Tree, TreeError, split_path};

use super::document::Refused;
use crate::tar::{ImageLayer, mark};

/// Most links that lead to one path, as for the kernel.
const MAX_LINKS: usize = 40;
/// Most bytes, and most files of a folder, of an [`excerpt`](Stack::excerpt).
const MAX_EXCERPT_BYTES: u64 = 16 << 20;
const MAX_EXCERPT_FILES: usize = 64 << 10;

/// What became of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LaidLayer {
    /// It is what it would be anywhere.
    AsItIs,
    /// It is what it is on these layers.
    Settled,
    /// It hides all layers below, which its tree does not say.
    Alone,
}

/// Layers over each other.
#[derive(Debug, Default)]
pub(super) struct Stack {
    /// The lowest first.
    pub trees: Vec<Tree>,
    /// Names of files that have several, by layer, made when they are needed.
    names: HashMap<usize, NodeNames>,
}

/// A node of one of the layers.
type InLayer = (usize, NodeId);

impl Stack {
    /// Lays a layer on top.
    pub fn push(&mut self, layer: ImageLayer) -> Result<LaidLayer, Refused> {
        let ImageLayer {
            mut tree,
            links,
            bare,
            ..
        } = layer;
        self.keep_attributes(&mut tree, &bare)?;
        // What it says of them is not in its tree.
        let mut changed = !bare.is_empty();
        let named: HashSet<NodeId> = tree.reachable().into_iter().collect();
        let mut copied = HashMap::new();
        let mut same = HashMap::new();
        for (id, target) in links.iter().filter(|(id, _)| named.contains(id)) {
            let found = self.file(target)?;
            match copied.get(&found) {
                Some(&first) => drop(same.insert(*id, first)),
                None => {
                    self.copy_up(&mut tree, *id, found)?;
                    copied.insert(found, *id);
                }
            }
            changed = true;
        }
        rename(&mut tree, &same);
        changed |= self.forget_deletions(&mut tree, ROOT, b"");
        let root = &mut tree.node_mut(ROOT).attributes.xattrs;
        let is_alone = root.remove(OPAQUE).is_some();
        if is_alone {
            // Nothing of the layers below is left.
            self.trees.iter_mut().for_each(|below| *below = Tree::new());
            self.names.clear();
        }
        self.trees.push(tree);
        Ok(match (is_alone, changed) {
            (true, _) => LaidLayer::Alone,
            (false, true) => LaidLayer::Settled,
            (false, false) => LaidLayer::AsItIs,
        })
    }

    /// Those of some files, and of the files of a folder, that the layers have and that are no
    /// larger than a text may be, as a tree.
    pub fn excerpt(&self, paths: &[&str], folder: &str) -> Result<Tree, TreeError> {
        let mut tree = Tree::new();
        let mut left = MAX_EXCERPT_BYTES;
        let paths = paths.iter().map(|path| path.as_bytes().to_vec());
        let in_folder = match self.resolve(folder.as_bytes()) {
            AtPath::Directories(all) => all,
            _ => Vec::new(),
        };
        let names: BTreeSet<&Vec<u8>> = in_folder
            .iter()
            .filter_map(|&(layer, id)| self.trees[layer].entries(id))
            .flat_map(|entries| entries.keys())
            .take(MAX_EXCERPT_FILES)
            .collect();
        let in_folder = names
            .into_iter()
            .map(|name| [folder.as_bytes(), b"/", name].concat());
        for path in paths.chain(in_folder) {
            let AtPath::Leaf((layer, id)) = self.resolve(&path) else {
                continue;
            };
            let node = self.trees[layer].node(id);
            let Kind::File(data) = &node.kind else {
                continue;
            };
            if let Some(rest) = left.checked_sub(data.len()) {
                left = rest;
                tree.insert_path(&path, node.clone())?;
            }
        }
        Ok(tree)
    }

    /// Takes out deletions of what the layers below do not have, with the directories that
    /// lead to nothing else; true if there were any.
    fn forget_deletions(&self, tree: &mut Tree, directory: NodeId, path: &[u8]) -> bool {
        let mut forgotten = false;
        for (name, id) in tree.entries(directory).cloned().unwrap_or_default() {
            let path = [path, b"/", &name].concat();
            let gone = if tree.node(id).kind.is_whiteout() {
                matches!(self.resolve(&path), AtPath::Missing)
            } else {
                let leads = tree.entries(id).is_some()
                    && tree.node(id).attributes == Attributes::with_mode(0o755);
                let below = self.forget_deletions(tree, id, &path);
                forgotten |= below;
                below && leads && tree.entries(id).is_some_and(|left| left.is_empty())
            };
            if gone {
                tree.remove(directory, &name);
                forgotten = true;
            }
        }
        forgotten
    }

    /// Gives opaque directories of `tree` the attributes that they have below.
    fn keep_attributes(&self, tree: &mut Tree, bare: &[Vec<u8>]) -> Result<(), Refused> {
        for path in bare {
            let below = match self.resolve(path) {
                AtPath::Directories(below) if !below.is_empty() => below,
                _ => continue,
            };
            let made = tree.make_directories(path);
            let id = made.map_err(|error| error.to_string())?;
            let attributes = |&(layer, id): &InLayer| &self.trees[layer].node(id).attributes;
            let mut all = below.iter().map(attributes);
            if let Some(meant) = all.find(|one| one.xattrs.contains_key(REPLACES)) {
                tree.node_mut(id).attributes.clone_from(meant);
            }
            mark(tree, id, OPAQUE);
        }
        Ok(())
    }

    /// The file, or the like, that a hard link is another name of.
    fn file(&self, target: &[u8]) -> Result<InLayer, Refused> {
        match self.resolve(target) {
            AtPath::Leaf(found) => Ok(found),
            AtPath::Missing | AtPath::Directories(_) => Err(format!(
                "hard link to {:?}, which is no file of it or of a layer below",
                String::from_utf8_lossy(target)
            )),
        }
    }

    /// Makes node `id` of `tree` what the layers below have, with all names of that.
    fn copy_up(
        &mut self,
        tree: &mut Tree,
        id: NodeId,
        (layer, below): InLayer,
    ) -> Result<(), Refused> {
        *tree.node_mut(id) = self.trees[layer].node(below).clone();
        mark(tree, id, REPLACES);
        let trees = &self.trees;
        let names = self.names.entry(layer);
        let names = names
            .or_insert_with(|| NodeNames::of(&trees[layer]))
            .paths(below);
        for name in names {
            let visible =
                matches!(self.resolve(&name), AtPath::Leaf(found) if found == (layer, below));
            if visible && is_free(tree, &name) {
                let parts: Vec<&[u8]> = split_path(&name).collect();
                let Some((last, parents)) = parts.split_last() else {
                    continue;
                };
                let parent = tree.make_directories(&parents.join(&b'/'));
                let linked = parent.and_then(|parent| tree.link(parent, last, id));
                linked.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    /// What the layers have at `path`; nothing, if links lead to no end.
    fn resolve(&self, path: &[u8]) -> AtPath {
        let mut pending: Vec<Vec<u8>> = split_path(path).map(<[u8]>::to_vec).collect();
        pending.reverse();
        let mut done: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        let mut at = self.roots();
        while let Some(name) = pending.pop() {
            if name == b".." {
                done.pop();
                at = self.directories(&done);
                continue;
            }
            match self.step(&at, &name) {
                AtPath::Missing => return AtPath::Missing,
                AtPath::Directories(next) => {
                    done.push(name);
                    at = next;
                }
                AtPath::Leaf(found) if pending.is_empty() => return AtPath::Leaf(found),
                AtPath::Leaf((layer, id)) => {
                    let Kind::Symlink(target) = &self.trees[layer].node(id).kind else {
                        return AtPath::Missing;
                    };
                    links += 1;
                    if links > MAX_LINKS {
                        return AtPath::Missing;
                    }
                    if target.starts_with(b"/") {
                        done.clear();
                    }
                    at = self.directories(&done);
                    let parts: Vec<Vec<u8>> = split_path(target).map(<[u8]>::to_vec).collect();
                    pending.extend(parts.into_iter().rev());
                }
            }
        }
        AtPath::Directories(at)
    }

    /// All layers' roots, the highest first.
    fn roots(&self) -> Vec<InLayer> {
        (0..self.trees.len())
            .rev()
            .map(|layer| (layer, ROOT))
            .collect()
    }

    /// The directories at a path without links.
    fn directories(&self, path: &[Vec<u8>]) -> Vec<InLayer> {
        let step = |at: Vec<InLayer>, name: &Vec<u8>| match self.step(&at, name) {
            AtPath::Directories(next) => next,
            _ => Vec::new(),
        };
        path.iter().fold(self.roots(), step)
    }

    /// From directories that are merged, the highest first, to what they have by a name.
    fn step(&self, at: &[InLayer], name: &[u8]) -> AtPath {
        let mut directories = Vec::new();
        for &(layer, directory) in at {
            let tree = &self.trees[layer];
            let Some(&id) = tree.entries(directory).and_then(|all| all.get(name)) else {
                continue;
            };
            let node = tree.node(id);
            match &node.kind {
                kind if kind.is_whiteout() => break,
                Kind::Directory(_) => {
                    directories.push((layer, id));
                    if node.attributes.xattrs.contains_key(OPAQUE) {
                        break;
                    }
                }
                _ if directories.is_empty() => return AtPath::Leaf((layer, id)),
                _ => break,
            }
        }
        match directories.is_empty() {
            true => AtPath::Missing,
            false => AtPath::Directories(directories),
        }
    }
}

/// What is at a path.
enum AtPath {
    Missing,
    /// Directories that are merged, the highest first.
    Directories(Vec<InLayer>),
    /// Anything else.
    Leaf(InLayer),
}

/// Gives the names of some nodes to others.
fn rename(tree: &mut Tree, others: &HashMap<NodeId, NodeId>) {
    if others.is_empty() {
        return;
    }
    for id in tree.reachable() {
        if let Kind::Directory(entries) = &mut tree.node_mut(id).kind {
            for node in entries.values_mut() {
                *node = others.get(node).copied().unwrap_or(*node);
            }
        }
    }
}

/// True if a layer leaves a name to those below: it neither has it nor hides it.
fn is_free(tree: &Tree, path: &[u8]) -> bool {
    let mut at = ROOT;
    for name in split_path(path) {
        let node = tree.node(at);
        let Some(entries) = tree.entries(at) else {
            return false;
        };
        if node.attributes.xattrs.contains_key(OPAQUE) {
            return false;
        }
        match entries.get(name) {
            Some(&next) => at = next,
            None => return true,
        }
    }
    false
}

/// Where the nodes of a tree have their names.
#[derive(Debug, Default)]
struct NodeNames(HashMap<NodeId, Vec<(NodeId, Vec<u8>)>>);

impl NodeNames {
    fn of(tree: &Tree) -> Self {
        let mut names = Self::default();
        for directory in tree.reachable() {
            for (name, &child) in tree.entries(directory).into_iter().flatten() {
                let all = names.0.entry(child).or_default();
                all.push((directory, name.clone()));
            }
        }
        names
    }

    fn paths(&self, id: NodeId) -> Vec<Vec<u8>> {
        let names = self.0.get(&id).into_iter().flatten();
        let path = |(directory, name): &(NodeId, Vec<u8>)| {
            let mut parts: Vec<&[u8]> = vec![name];
            let mut at = *directory;
            while let Some((parent, name)) = self.0.get(&at).and_then(|all| all.first()) {
                parts.push(name);
                at = *parent;
            }
            parts.reverse();
            parts.join(&b'/')
        };
        names.map(path).collect()
    }
}
