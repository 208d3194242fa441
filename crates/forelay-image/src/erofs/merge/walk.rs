//! First pass: decides what stands at every path.
//!
//! Owns the three arrays that the merged tree consists of. Invariants: the children of a
//! directory are consecutive in `entries`, sorted by name, with `.` and `..`; node 0 is the
//! root; a node's directory comes before it.

use std::collections::HashMap;

use super::conflict::{self, Candidate};
use super::layer::Source;
use super::{ComposeError, FileConflict};
use crate::erofs::directory::Packing;
use crate::erofs::layout::{FileType, InodeRecord, LayoutError};
use crate::erofs::xattr;

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
}

impl Merged {
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
    nid: u64,
}

fn key(name: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let len = name.len().min(8);
    bytes[..len].copy_from_slice(&name[..len]);
    u64::from_be_bytes(bytes)
}

struct Walker<'s, 'a> {
    sources: &'s mut [Source<'a>],
    out: Merged,
    /// Layer and inode offset of each directory that is merged into another one.
    contributors: Vec<(u16, u32)>,
    /// Inodes with several names: to the merged node.
    linked: HashMap<(u16, u32), u32>,
}

pub(super) fn walk(sources: &mut [Source<'_>]) -> Result<Merged, ComposeError> {
    if sources.len() > usize::from(DOTS) {
        return Err(ComposeError::TooLarge("more than 65534 layers"));
    }
    let mut walker = Walker {
        sources,
        out: Merged {
            nodes: Vec::new(),
            directories: Vec::new(),
            entries: Vec::new(),
            rewritten: Vec::new(),
            conflicts: Vec::new(),
        },
        contributors: Vec::new(),
        linked: HashMap::new(),
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
        let name = Name {
            at: 0,
            layer: DOTS,
            len: 0,
        };
        group.reverse();
        self.add_directory(&group, 0, name)?;
        Ok(())
    }

    /// Reads the entries of all directories that stand at one path, sorted by name and layer.
    fn read_directory(&mut self, index: usize, raw: &mut Vec<Raw<'a>>) -> Result<(), ComposeError> {
        let directory = &self.out.directories[index];
        let range = directory.first_contributor as usize..directory.end_contributor as usize;
        let several = range.len() > 1;
        for &(layer, at) in &self.contributors[range] {
            let source = &mut self.sources[usize::from(layer)];
            let record = source.checked_inode(at);
            source.entries(at, &record, |at, name, nid| {
                raw.push(Raw {
                    key: key(name),
                    name,
                    at,
                    layer,
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

    /// Decides one name, which `group` has in one or more layers, lowest first.
    fn decide(&mut self, index: u32, group: &[Raw<'a>]) -> Result<Option<u32>, ComposeError> {
        let top = &group[group.len() - 1];
        let (at, record) = self.sources[usize::from(top.layer)].inode(top.nid)?;
        if group.len() == 1 {
            return self.add(index, top, at, record);
        }
        let mut candidates = Vec::with_capacity(group.len());
        candidates.push((top.layer, at, record));
        for lower in group.iter().rev().skip(1) {
            let (at, record) = self.sources[usize::from(lower.layer)].inode(lower.nid)?;
            candidates.push((lower.layer, at, record));
        }
        self.note_conflicts(index, top, &candidates);
        if record.file_type != FileType::Directory {
            return self.add(index, top, at, record);
        }
        let mut visible = 0;
        for &(layer, at, record) in &candidates {
            if record.file_type != FileType::Directory {
                break;
            }
            visible += 1;
            if self.sources[usize::from(layer)].is_opaque(at, &record) {
                break;
            }
        }
        let node = self.add_directory(&candidates[..visible], index, name_of(top))?;
        Ok(Some(node))
    }

    fn add(
        &mut self,
        index: u32,
        raw: &Raw<'a>,
        at: u32,
        record: InodeRecord,
    ) -> Result<Option<u32>, ComposeError> {
        if record.is_whiteout() {
            return Ok(None);
        }
        if record.file_type == FileType::Directory {
            let group = [(raw.layer, at, record)];
            return Ok(Some(self.add_directory(&group, index, name_of(raw))?));
        }
        let node = self.out.nodes.len() as u32;
        if record.nlink > 1 {
            if let Some(&node) = self.linked.get(&(raw.layer, at)) {
                self.out.nodes[node as usize].nlink += 1;
                return Ok(Some(node));
            }
            self.linked.insert((raw.layer, at), node);
        } else {
            self.sources[usize::from(raw.layer)].use_once(at)?;
        }
        self.out.nodes.push(Node {
            layer: raw.layer,
            file_type: record.file_type,
            at,
            nlink: 1,
            extra: match record.file_type {
                FileType::Symlink => record.size as u32,
                _ => 0,
            },
            xattr_bytes: record.xattr_bytes as u32,
            rewritten: 0,
        });
        Ok(Some(node))
    }

    /// Appends a directory that merges `group`, highest layer first.
    fn add_directory(
        &mut self,
        group: &[(u16, u32, InodeRecord)],
        parent: u32,
        name: Name,
    ) -> Result<u32, ComposeError> {
        let first_contributor = self.contributors.len() as u32;
        for &(layer, at, _) in group.iter().rev() {
            self.sources[usize::from(layer)].use_once(at)?;
            self.contributors.push((layer, at));
        }
        let explicit = group.iter().find(|(_, _, record)| !is_implied(record));
        let &(layer, at, record) = explicit.unwrap_or(&group[group.len() - 1]);
        let node = self.out.nodes.len() as u32;
        let source = &self.sources[usize::from(layer)];
        let mut xattr_bytes = record.xattr_bytes as u32;
        let mut rewritten = 0;
        if source.is_opaque(at, &record) {
            let area = without_opaque(source.xattr_area(at, &record))
                .map_err(|error| source.error(at.into(), error))?;
            xattr_bytes = area.len() as u32;
            self.out.rewritten.push(area);
            rewritten = self.out.rewritten.len() as u32;
        }
        self.out.nodes.push(Node {
            layer,
            file_type: FileType::Directory,
            at,
            nlink: 2,
            extra: self.out.directories.len() as u32,
            xattr_bytes,
            rewritten,
        });
        self.out.directories.push(Directory {
            node,
            first_entry: 0,
            end_entry: 0,
            size: 0,
            parent,
            name,
            first_contributor,
            end_contributor: self.contributors.len() as u32,
        });
        Ok(node)
    }

    fn note_conflicts(&mut self, index: u32, top: &Raw<'a>, group: &[(u16, u32, InodeRecord)]) {
        let candidate = |&(layer, at, record): &(u16, u32, InodeRecord)| Candidate {
            source: &self.sources[usize::from(layer)],
            at,
            record,
        };
        // The VM's own files are meant to win.
        if usize::from(top.layer) + 1 == self.sources.len() || group[0].2.is_whiteout() {
            return;
        }
        let winner = candidate(&group[0]);
        let mut losers = Vec::new();
        for lower in &group[1..] {
            if lower.2.is_whiteout() {
                break;
            }
            if conflict::differ(&winner, &candidate(lower)) {
                losers.push(usize::from(lower.0));
            }
        }
        for loser in losers {
            let path = self.path(index, top.name);
            let winner = usize::from(top.layer);
            self.out.conflicts.push(FileConflict {
                path,
                winner,
                loser,
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

/// True for the attributes that [`crate::tree::Tree::make_directories`] gives.
fn is_implied(record: &InodeRecord) -> bool {
    record.mode == 0o755
        && (record.uid, record.gid) == (0, 0)
        && (record.mtime_s, record.mtime_ns) == (0, 0)
        && record.xattr_bytes == 0
}

fn without_opaque(area: &[u8]) -> Result<Vec<u8>, LayoutError> {
    let mut xattrs = xattr::decode(area)?;
    xattrs.remove(xattr::OPAQUE);
    xattr::encode(&xattrs).map_err(|_| LayoutError::corrupt("extended attributes", 0))
}
