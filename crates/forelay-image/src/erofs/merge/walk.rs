//! First pass: decides what stands at every path.
//!
//! Owns the three arrays that the merged tree consists of. Invariants: the children of a
//! directory are consecutive in `entries`, sorted by name, with `.` and `..`; node 0 is the
//! root; a node's directory comes before it.

use std::collections::{BTreeSet, HashMap};

use super::conflict::{self, Candidate};
use super::layer::{Marks, Source};
use super::links::{Landing, Ways};
use super::stack::{Item, Shape, lay};
use super::{ComposeError, FileConflict};
use crate::erofs::directory::Packing;
use crate::erofs::layout::{FileType, InodeRecord, LayoutError};
use crate::erofs::xattr;
use crate::tree::{PATH_LIMIT_BYTES, split_path};

/// Value of [`WalkEntry::layer`] for `.` and `..`.
const DOTS: u16 = u16::MAX;

/// A merged inode: which layer's inode it copies.
pub(super) struct Node {
    pub layer: u16,
    pub file_type: FileType,
    /// Byte offset of the inode in its layer.
    pub at: u32,
    pub nlink: u32,
    /// Index of the directory, for directories; length of the target, for symlinks.
    pub extra: u32,
    /// Bytes of the attribute area in the output.
    pub xattr_bytes: u32,
    /// Index into [`Merged::rewritten`] plus 1 if the attribute area is not the layer's.
    pub rewritten: u32,
}

/// A merged directory.
pub(super) struct Directory {
    pub node: u32,
    pub first_entry: u32,
    pub end_entry: u32,
    /// Size of its packed entries in bytes.
    pub size: u64,
    parent: u32,
    name: Name,
    /// Length of its path.
    path_bytes: u32,
    /// Range of `contributors`, lowest layer first.
    first_contributor: u32,
    end_contributor: u32,
}

/// A name, where it stands in a layer's metadata.
#[derive(Clone, Copy)]
struct Name {
    at: u32,
    layer: u16,
    len: u8,
}

/// A name in a merged directory.
pub(super) struct WalkEntry {
    name: Name,
    pub node: u32,
}

/// The merged tree.
pub(super) struct Merged {
    pub nodes: Vec<Node>,
    pub directories: Vec<Directory>,
    pub entries: Vec<WalkEntry>,
    /// Attribute areas that differ from the layer's.
    pub rewritten: Vec<Vec<u8>>,
    pub conflicts: Vec<FileConflict>,
    /// Directories that were left out, since it is not known yet where they go.
    pub open: Vec<OpenDirectory>,
    /// Layers that hide directories of several layers below them.
    pub hiders: BTreeSet<u16>,
    /// Why it cannot be, unless what is open changes that.
    pub refused: Option<ComposeError>,
}

/// A layer's directory that stands on a link of the layers below.
pub(super) struct OpenDirectory {
    pub layer: u16,
    /// Byte offset of its inode.
    pub at: u32,
    /// Where it stands in its layer.
    pub from: Vec<u8>,
    /// Where the link is.
    pub path: Vec<u8>,
}

impl Merged {
    /// What `name` is in a directory.
    pub(super) fn child(
        &self,
        sources: &[Source<'_>],
        directory: u32,
        name: &[u8],
    ) -> Option<&Node> {
        let directory = &self.directories[directory as usize];
        let range = directory.first_entry as usize..directory.end_entry as usize;
        let entries = &self.entries[range];
        let found = entries.binary_search_by(|entry| self.name(sources, entry).cmp(name));
        found.ok().map(|at| &self.nodes[entries[at].node as usize])
    }

    /// Where a symbolic link points.
    pub(super) fn target(&self, sources: &[Source<'_>], link: &Node) -> Vec<u8> {
        let source = &sources[usize::from(link.layer)];
        source.target(link.at, &source.checked_inode(link.at))
    }

    pub(super) fn name<'a>(&self, sources: &[Source<'a>], entry: &WalkEntry) -> &'a [u8] {
        name_bytes(sources, entry.name)
    }
}

fn name_bytes<'a>(sources: &[Source<'a>], name: Name) -> &'a [u8] {
    if name.layer == DOTS {
        return &b".."[..usize::from(name.len)];
    }
    let start = name.at as usize;
    &sources[usize::from(name.layer)].metadata[start..start + usize::from(name.len)]
}

/// One entry of one layer's directory, before names are decided.
struct Raw<'a> {
    /// The name's first eight bytes, big-endian: decides most comparisons.
    key: u64,
    name: &'a [u8],
    at: u32,
    layer: u16,
    /// Byte offset of the inode of the layer's directory.
    directory: u32,
    nid: u64,
}

fn key(name: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let len = name.len().min(8);
    bytes[..len].copy_from_slice(&name[..len]);
    u64::from_be_bytes(bytes)
}

/// What one layer has at a path.
type Found = (u16, u32, InodeRecord);

struct Walker<'s, 'a> {
    sources: &'s mut [Source<'a>],
    ways: &'s Ways,
    /// The layer of the VM's own files, which are meant to win.
    own: usize,
    out: Merged,
    /// Layer and inode offset of each directory that is merged into another one.
    contributors: Vec<(u16, u32)>,
    /// Inodes with several names: to the merged node.
    linked: HashMap<(u16, u32), u32>,
    /// Where directories that come from elsewhere stand in their layers.
    from: HashMap<(u16, u32), Vec<u8>>,
}

/// Merges `sources`, of which number `own` is the VM's own, if it is among them.
pub(super) fn walk(
    sources: &mut [Source<'_>],
    ways: &Ways,
    own: usize,
) -> Result<Merged, ComposeError> {
    if sources.len() > usize::from(DOTS) {
        return Err(ComposeError::TooLarge("more than 65534 layers"));
    }
    let mut walker = Walker {
        sources,
        ways,
        own,
        out: Merged {
            nodes: Vec::new(),
            directories: Vec::new(),
            entries: Vec::new(),
            rewritten: Vec::new(),
            conflicts: Vec::new(),
            open: Vec::new(),
            hiders: BTreeSet::new(),
            refused: None,
        },
        contributors: Vec::new(),
        linked: HashMap::new(),
        from: HashMap::new(),
    };
    walker.add_root()?;
    let mut raw = Vec::new();
    let mut next = 0;
    while next < walker.out.directories.len() {
        raw.clear();
        walker.read_directory(next, &mut raw)?;
        walker.decide_names(next as u32, &raw)?;
        next += 1;
    }
    Ok(walker.out)
}

impl<'a> Walker<'_, 'a> {
    fn add_root(&mut self) -> Result<(), ComposeError> {
        let mut group = Vec::with_capacity(self.sources.len());
        for (layer, source) in self.sources.iter().enumerate() {
            let (at, record) = source.inode(source.root_offset() / 32)?;
            if record.file_type != FileType::Directory {
                let what = LayoutError::corrupt("root directory", at.into());
                return Err(source.error(at.into(), what));
            }
            group.push((layer as u16, at, record));
        }
        if !self.ways.is_empty() {
            let roots = group.into_iter().map(|root| (Vec::new(), root));
            group = self.with_landings(b"", roots.collect());
        }
        let name = Name {
            at: 0,
            layer: DOTS,
            len: 0,
        };
        self.add_directory(&group, 0, name)?;
        Ok(())
    }

    /// Adds to `group` the directories that come to `path` through links, in the order of
    /// layers and, within one, of the paths that its entries have there: that in which dpkg
    /// unpacks them. `group` is given with those paths.
    fn with_landings(&mut self, path: &[u8], mut group: Vec<(Vec<u8>, Found)>) -> Vec<Found> {
        let there = |landing: &&Landing| usize::from(landing.layer) < self.sources.len();
        let landings = self.ways.landings(path).iter().filter(there);
        group.extend(landings.map(|Landing { layer, at, from }| {
            let record = self.sources[usize::from(*layer)].checked_inode(*at);
            (from.clone(), (*layer, *at, record))
        }));
        group.sort_by(|(one, (a, ..)), (other, (b, ..))| {
            a.cmp(b)
                .then_with(|| split_path(one).cmp(split_path(other)))
        });
        let place = |(from, found): (Vec<u8>, Found)| {
            let moved = from.strip_prefix(b"/").unwrap_or(&from) != path;
            if moved && found.2.file_type == FileType::Directory {
                self.from.insert((found.0, found.1), from);
            }
            found
        };
        group.into_iter().map(place).collect()
    }

    /// Reads the entries of all directories that stand at one path, sorted by name and layer.
    fn read_directory(&mut self, index: usize, raw: &mut Vec<Raw<'a>>) -> Result<(), ComposeError> {
        let directory = &self.out.directories[index];
        let range = directory.first_contributor as usize..directory.end_contributor as usize;
        let several = range.len() > 1;
        for &(layer, directory) in &self.contributors[range] {
            let source = &mut self.sources[usize::from(layer)];
            let record = source.checked_inode(directory);
            source.entries(directory, &record, |at, name, nid| {
                raw.push(Raw {
                    key: key(name),
                    name,
                    at,
                    layer,
                    directory,
                    nid,
                });
            })?;
        }
        if several {
            // Stable and adaptive: the layers' sorted runs are merged.
            raw.sort_by(|a, b| {
                let by_key = a.key.cmp(&b.key);
                by_key.then_with(|| a.name.cmp(b.name))
            });
        }
        Ok(())
    }

    /// Decides each name and appends the directory's entries.
    fn decide_names(&mut self, index: u32, raw: &[Raw<'a>]) -> Result<(), ComposeError> {
        let first_entry = self.out.entries.len();
        let mut subdirectories = 0;
        let mut packing = Packing::default();
        let mut dots_done = 0;
        let mut start = 0;
        while start < raw.len() {
            let name = raw[start].name;
            let mut end = start + 1;
            while end < raw.len() && raw[end].key == raw[start].key && raw[end].name == name {
                end += 1;
            }
            while dots_done < 2 && *name > b".."[..=dots_done] {
                dots_done += 1;
                self.add_dots(index, dots_done, &mut packing);
            }
            if let Some(node) = self.decide(index, &raw[start..end])? {
                let top = &raw[end - 1];
                packing.add(name.len());
                self.out.entries.push(WalkEntry {
                    name: name_of(top),
                    node,
                });
                let file_type = self.out.nodes[node as usize].file_type;
                subdirectories += u32::from(file_type == FileType::Directory);
            }
            start = end;
        }
        while dots_done < 2 {
            dots_done += 1;
            self.add_dots(index, dots_done, &mut packing);
        }
        let end_entry = self.out.entries.len() as u32;
        let directory = &mut self.out.directories[index as usize];
        directory.first_entry = first_entry as u32;
        directory.end_entry = end_entry;
        directory.size = packing.size();
        self.out.nodes[directory.node as usize].nlink = 2 + subdirectories;
        Ok(())
    }

    /// Appends `.` (`len` 1) or `..` (`len` 2); other names may sort between them.
    fn add_dots(&mut self, index: u32, len: usize, packing: &mut Packing) {
        let directory = &self.out.directories[index as usize];
        let parent = &self.out.directories[directory.parent as usize];
        let node = if len == 1 {
            directory.node
        } else {
            parent.node
        };
        packing.add(len);
        let name = Name {
            at: 0,
            layer: DOTS,
            len: len as u8,
        };
        self.out.entries.push(WalkEntry { name, node });
    }

    /// Decides one name, which `raw` has in one or more layers, lowest first.
    fn decide(&mut self, index: u32, raw: &[Raw<'a>]) -> Result<Option<u32>, ComposeError> {
        let name = name_of(&raw[raw.len() - 1]);
        if let [raw] = raw
            && self.ways.is_empty()
        {
            let (at, record) = self.sources[usize::from(raw.layer)].inode(raw.nid)?;
            return match record.is_whiteout() {
                true => Ok(None),
                false => self.add(index, name, &(raw.layer, at, record)).map(Some),
            };
        }
        let mut group = Vec::with_capacity(raw.len());
        for raw in raw {
            let (at, record) = self.sources[usize::from(raw.layer)].inode(raw.nid)?;
            group.push((raw.layer, at, record));
        }
        if !self.ways.is_empty() {
            let path = self.path(index, raw[0].name);
            let from = raw.iter().map(|raw| {
                let directory = self.from.get(&(raw.layer, raw.directory));
                directory.map_or_else(|| path.clone(), |from| [from, raw.name].join(&b'/'))
            });
            let from = from.zip(group).collect();
            group = self.with_landings(&path[1..], from);
        }
        let items: Vec<Item<'_>> = group.iter().map(|found| self.item(found)).collect();
        let laid = match lay(&items) {
            Ok(laid) => laid,
            Err((above, below)) => {
                let layer = |number: usize| usize::from(group[number].0);
                let refused = ComposeError::OverDirectory {
                    path: String::from_utf8_lossy(&self.path(index, raw[0].name)).into_owned(),
                    layer: layer(above),
                    below: layer(below),
                };
                self.out.refused.get_or_insert(refused);
                return Ok(None);
            }
        };
        let hiders = laid.hiders.iter().map(|&number| group[number].0);
        self.out.hiders.extend(hiders);
        for &open in &laid.open {
            let path = self.path(index, raw[0].name);
            let (layer, at, _) = group[open];
            let from = self.from.get(&(layer, at)).unwrap_or(&path).clone();
            self.out.open.push(OpenDirectory {
                layer,
                at,
                from,
                path,
            });
        }
        let Some(&top) = laid.visible.last() else {
            return Ok(None);
        };
        self.note_conflicts(index, raw[0].name, &group[top], &laid.lost, &group);
        if group[top].2.file_type != FileType::Directory {
            return self.add(index, name, &group[top]).map(Some);
        }
        let visible: Vec<Found> = laid.visible.iter().map(|&at| group[at]).collect();
        self.add_directory(&visible, index, name).map(Some)
    }

    fn item(&self, &(layer, at, ref record): &Found) -> Item<'_> {
        let marks = self.sources[usize::from(layer)].marks(at, record);
        Item {
            shape: match record.file_type {
                _ if record.is_whiteout() => Shape::Whiteout,
                FileType::Directory => Shape::Directory,
                FileType::Symlink => Shape::Link,
                _ => Shape::Other,
            },
            opaque: marks.opaque,
            replaces: marks.replaces,
            way: self.ways.of(layer, at),
        }
    }

    /// Appends what one layer has at a path.
    fn add(&mut self, index: u32, name: Name, found: &Found) -> Result<u32, ComposeError> {
        let &(layer, at, record) = found;
        if record.file_type == FileType::Directory {
            return self.add_directory(&[*found], index, name);
        }
        let node = self.out.nodes.len() as u32;
        if record.nlink > 1 {
            if let Some(&node) = self.linked.get(&(layer, at)) {
                self.out.nodes[node as usize].nlink += 1;
                return Ok(node);
            }
            self.linked.insert((layer, at), node);
        } else {
            self.sources[usize::from(layer)].use_once(at)?;
        }
        let extra = match record.file_type {
            FileType::Symlink => record.size as u32,
            _ => 0,
        };
        self.add_node(found, 1, extra)
    }

    /// Appends a node that copies a layer's inode, without the marks for composing.
    fn add_node(
        &mut self,
        &(layer, at, record): &Found,
        nlink: u32,
        extra: u32,
    ) -> Result<u32, ComposeError> {
        let source = &self.sources[usize::from(layer)];
        let mut xattr_bytes = record.xattr_bytes as u32;
        let mut rewritten = 0;
        if source.marks(at, &record) != Marks::default() {
            let area = without_marks(source.xattr_area(at, &record))
                .map_err(|error| source.error(at.into(), error))?;
            xattr_bytes = area.len() as u32;
            self.out.rewritten.push(area);
            rewritten = self.out.rewritten.len() as u32;
        }
        self.out.nodes.push(Node {
            layer,
            file_type: record.file_type,
            at,
            nlink,
            extra,
            xattr_bytes,
            rewritten,
        });
        Ok(self.out.nodes.len() as u32 - 1)
    }

    /// Appends a directory that merges `group`, lowest layer first.
    fn add_directory(
        &mut self,
        group: &[Found],
        parent: u32,
        name: Name,
    ) -> Result<u32, ComposeError> {
        // Every later step may take time and memory of a path's length for each name.
        let above = self.out.directories.get(parent as usize);
        let path_bytes = above.map_or(0, |above| above.path_bytes + 1 + u32::from(name.len));
        if path_bytes > PATH_LIMIT_BYTES as u32 {
            let (layer, at, _) = group[group.len() - 1];
            let what = LayoutError::corrupt("path of more than 4096 bytes", path_bytes.into());
            return Err(self.sources[usize::from(layer)].error(at.into(), what));
        }
        let first_contributor = self.contributors.len() as u32;
        for &(layer, at, _) in group {
            self.sources[usize::from(layer)].use_once(at)?;
            self.contributors.push((layer, at));
        }
        let chosen = group[self.who_says_what(group)];
        let node = self.add_node(&chosen, 2, self.out.directories.len() as u32)?;
        self.out.directories.push(Directory {
            node,
            first_entry: 0,
            end_entry: 0,
            size: 0,
            parent,
            name,
            path_bytes,
            first_contributor,
            end_contributor: self.contributors.len() as u32,
        });
        Ok(node)
    }

    /// Whose attributes a directory has: those of the first that means them, since one that
    /// exists keeps its own, unless the VM's own files or a marked directory say otherwise.
    fn who_says_what(&self, group: &[Found]) -> usize {
        let mut chosen = 0;
        for (number, found) in group.iter().enumerate().skip(1) {
            let &(layer, at, ref record) = found;
            let source = &self.sources[usize::from(layer)];
            let own = usize::from(layer) == self.own;
            let takes = source.marks(at, record).replaces
                || !self.is_implied(found) && (own || self.is_implied(&group[chosen]));
            if takes {
                chosen = number;
            }
        }
        chosen
    }

    /// True for the attributes that [`crate::tree::Tree::make_directories`] gives. The lowest
    /// layer is a whole system, which means what it says.
    fn is_implied(&self, &(layer, at, ref record): &Found) -> bool {
        let source = &self.sources[usize::from(layer)];
        layer > 0
            && record.mode == 0o755
            && (record.uid, record.gid) == (0, 0)
            && (record.mtime_s, record.mtime_ns) == (0, 0)
            && (record.xattr_bytes == 0
                || without_marks(source.xattr_area(at, record)).is_ok_and(|area| area.is_empty()))
    }

    /// Notes which layers' files are not used although they differ from what is.
    fn note_conflicts(
        &mut self,
        index: u32,
        name: &[u8],
        winner: &Found,
        lost: &[usize],
        group: &[Found],
    ) {
        if usize::from(winner.0) == self.own {
            return;
        }
        let candidate = |&(layer, at, record): &Found| Candidate {
            source: &self.sources[usize::from(layer)],
            at,
            record,
        };
        let lost = lost.iter().map(|&number| &group[number]);
        let differing = lost.filter(|lost| conflict::differ(&candidate(winner), &candidate(lost)));
        let losers: Vec<u16> = differing.map(|lost| lost.0).collect();
        for loser in losers {
            let path = self.path(index, name);
            self.out.conflicts.push(FileConflict {
                path,
                winner: winner.0.into(),
                loser: loser.into(),
            });
        }
    }

    fn path(&self, mut directory: u32, name: &[u8]) -> Vec<u8> {
        let mut names = vec![name];
        while directory != 0 {
            let parent = &self.out.directories[directory as usize];
            names.push(name_bytes(self.sources, parent.name));
            directory = parent.parent;
        }
        names.push(b"");
        names.reverse();
        names.join(&b'/')
    }
}

fn name_of(raw: &Raw<'_>) -> Name {
    Name {
        at: raw.at,
        layer: raw.layer,
        len: raw.name.len() as u8,
    }
}

fn without_marks(area: &[u8]) -> Result<Vec<u8>, LayoutError> {
    let mut xattrs = xattr::decode(area)?;
    xattrs.remove(xattr::OPAQUE);
    xattrs.remove(xattr::REPLACES);
    xattr::encode(&xattrs).map_err(|_| LayoutError::corrupt("extended attributes", 0))
}
