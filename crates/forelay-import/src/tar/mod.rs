//! Tar archives (plain, gzip, xz, zstd) as a [`Tree`].
//!
//! Owns the entry loop: GNU and PAX long names, PAX attributes (owner, times, sizes,
//! `SCHILY.xattr.*`, access control lists), hard links, devices, sparse files, deletions of
//! image layers, and what a layer's entries say of the layers below it ([`ImageLayer`]). Header
//! fields are decoded by the `tar` crate; its entry iterator is not used because it splits
//! PAX records at newlines, which breaks binary attribute values. Nothing is unpacked onto
//! the host: content stays in the (decompressed) archive and is read from there.
//!
//! Invariants: names with `..` are refused; absolute names lose their `/`; an entry goes
//! through a symbolic link only if the archive made the link before and, as for GNU tar,
//! the link neither is absolute nor has `..`; content lies within the archive's size. A
//! layer of an image is unpacked into a root of its own, so its links lead anywhere in that.

mod acl;
mod layers;
mod pax;
mod sparse;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Seek;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use forelay_image::tree::{Attributes, FileData, Kind, Node, NodeId, ROOT, Tree, split_path};
use tar::{EntryType, Header};

use crate::dir::{Ownership, kept_xattr};
use crate::draft::Files;
use crate::error::{ImportError, archive_error, io_error, tree_error};
use crate::spool::{Compression, Spool, read_up_to};
use layers::{Deletions, Own, Said, is_image_archive};
pub(crate) use layers::{ImageLayer, mark};
use pax::{Extensions, parse_time};

const BLOCK_BYTES: u64 = 512;
/// Longest accepted extension headers of an entry, all together.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;
/// Most files and directories of an archive, with those that its names make on the way.
const MAX_NODES: usize = 8 << 20;
/// Most bytes of names, link targets and attributes: they are all held in memory.
const MAX_HELD_BYTES: u64 = 1 << 30;
/// Most of them of one entry.
const MAX_ENTRY_BYTES: u64 = 256 << 10;
/// Longest target of a link, as for the kernel.
const MAX_TARGET_BYTES: usize = 4095;
/// Names of attributes that are told as left out.
const LEFT_OUT_TOLD: usize = 16;
const MAX_DEPTH: usize = 512;
/// Most symbolic links that lead to one entry, as for the kernel.
const MAX_LINKS: u32 = 40;

/// What archives that belong together may still hold in memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TarRoom {
    nodes: usize,
    held_bytes: u64,
}

impl Default for TarRoom {
    fn default() -> Self {
        Self {
            nodes: MAX_NODES,
            held_bytes: MAX_HELD_BYTES,
        }
    }
}

/// Reads the archive at `path`; a compressed one is decompressed into `spool` first.
pub fn read_tar(path: &Path, spool: &mut Spool, owner: Ownership) -> Result<Files, ImportError> {
    let mut file = File::open(path).map_err(io_error("opening", path))?;
    let mut first = [0; 8];
    let count = read_up_to(&mut file, &mut first).map_err(io_error("reading", path))?;
    file.rewind().map_err(io_error("reading", path))?;
    let compression = Compression::detect(&first[..count]);
    match compression {
        Compression::None => read_plain(path, path, spool, owner),
        _ => read_compressed(file, compression, path, spool, owner),
    }
}

/// Reads the archive at `path` as a tree of files; one of container images is refused.
pub fn read_files(path: &Path, spool: &mut Spool, owner: Ownership) -> Result<Files, ImportError> {
    let unpacked = read_tar(path, spool, owner)?;
    if is_image_archive(&unpacked.tree) {
        let problem = "holds container images (as `docker save` writes them), no file tree: \
                       build it with `--oci`";
        return Err(archive_error(path, problem));
    }
    Ok(unpacked)
}

fn read_compressed(
    file: File,
    compression: Compression,
    path: &Path,
    spool: &mut Spool,
    owner: Ownership,
) -> Result<Files, ImportError> {
    let mut reader = compression
        .reader(file)
        .map_err(io_error("reading", path))?;
    let (plain, _) = spool.store(&mut reader, path)?;
    read_plain(&plain, path, spool, owner)
}

/// Reads the uncompressed archive `plain`; errors name `shown`.
pub(crate) fn read_plain(
    plain: &Path,
    shown: &Path,
    spool: &mut Spool,
    owner: Ownership,
) -> Result<Files, ImportError> {
    read_within(plain, shown, spool, owner, TarRoom::default())
}

/// Reads the uncompressed layer `plain` of a container image, whose layers share `room`; errors
/// name `shown`.
pub(crate) fn read_layer(
    plain: &Path,
    shown: &Path,
    spool: &mut Spool,
    room: &mut TarRoom,
) -> Result<ImageLayer, ImportError> {
    let mut reader = TarReader::open(plain, shown, spool, Ownership::Keep, *room)?;
    reader.own = Some(Own::default());
    reader.entries()?;
    room.held_bytes = reader.room.held_bytes;
    let layer = reader.finish_layer()?;
    room.nodes = room.nodes.saturating_sub(layer.tree.len());
    Ok(layer)
}

fn read_within(
    plain: &Path,
    shown: &Path,
    spool: &mut Spool,
    owner: Ownership,
    room: TarRoom,
) -> Result<Files, ImportError> {
    let mut reader = TarReader::open(plain, shown, spool, owner, room)?;
    reader.entries()?;
    reader.finish()
}

struct TarReader<'a> {
    file: File,
    plain: PathBuf,
    shown: PathBuf,
    archive_bytes: u64,
    next: u64,
    spool: &'a mut Spool,
    owner: Ownership,
    tree: Tree,
    deletions: Deletions,
    /// What the entries of a layer say of those below it; `None` for other archives.
    own: Option<Own>,
    room: TarRoom,
    /// Whether the last block was one of zeros, as at the end.
    ended: bool,
    /// Names of attributes that were left out.
    left_out: BTreeSet<String>,
}

impl<'a> TarReader<'a> {
    fn open(
        plain: &Path,
        shown: &Path,
        spool: &'a mut Spool,
        owner: Ownership,
        room: TarRoom,
    ) -> Result<Self, ImportError> {
        let file = File::open(plain).map_err(io_error("opening", plain))?;
        let archive_bytes = file.metadata().map_err(io_error("reading", plain))?.len();
        Ok(Self {
            file,
            plain: plain.to_owned(),
            shown: shown.to_owned(),
            archive_bytes,
            next: 0,
            spool,
            owner,
            tree: Tree::new(),
            deletions: Deletions::default(),
            own: None,
            room,
            ended: false,
            left_out: BTreeSet::new(),
        })
    }

    /// Reads all entries.
    fn entries(&mut self) -> Result<(), ImportError> {
        let max_nodes = self.room.nodes;
        let mut entries = 0;
        while self.entry()? {
            entries += 1;
            let made = self.tree.len() + self.deletions.most_nodes();
            if made.max(entries) > max_nodes {
                return Err(ImportError::TooLarge {
                    path: self.shown.clone(),
                    limit: max_nodes as u64,
                    unit: "files and directories",
                });
            }
        }
        if entries == 0 && self.archive_bytes < 2 * BLOCK_BYTES {
            return Err(self.damaged("not a tar archive"));
        }
        Ok(())
    }
}

impl TarReader<'_> {
    fn damaged(&self, problem: impl Into<String>) -> ImportError {
        archive_error(&self.shown, problem)
    }

    /// Reads one entry with its extension headers; false at the end of the archive.
    fn entry(&mut self) -> Result<bool, ImportError> {
        let mut extensions = Extensions::default();
        let mut extension_bytes = 0_u64;
        loop {
            let Some(header) = self.header()? else {
                return Ok(false);
            };
            let bad_size = |error| self.damaged(format!("bad size: {error}"));
            let stored = header.entry_size().map_err(bad_size)?;
            if is_extension(header.entry_type()) {
                extension_bytes = extension_bytes.saturating_add(stored);
                if extension_bytes > MAX_EXTENSION_BYTES {
                    let problem = format!("extension headers of {extension_bytes} bytes");
                    return Err(self.damaged(problem));
                }
            }
            match header.entry_type() {
                EntryType::GNULongName => {
                    extensions.name = Some(until_nul(&self.extension(stored)?));
                }
                EntryType::GNULongLink => {
                    extensions.link = Some(until_nul(&self.extension(stored)?));
                }
                EntryType::XHeader => {
                    let records = self.extension(stored)?;
                    let added = extensions.add_pax(&records);
                    added.ok_or_else(|| self.damaged("malformed PAX records"))?;
                }
                EntryType::XGlobalHeader => drop(self.extension(stored)?),
                _ => {
                    let size = extensions.number(b"size").unwrap_or(stored);
                    self.place(&header, &extensions, size)?;
                    return Ok(true);
                }
            }
        }
    }

    fn finish(mut self) -> Result<Files, ImportError> {
        acl::encode_all(&mut self.tree, &mut self.left_out);
        let deletions = std::mem::take(&mut self.deletions);
        let deleted = deletions.apply(&mut self.tree);
        let deleted = deleted.map_err(tree_error(&self.shown))?;
        let mut notes: Vec<String> = deleted.into_iter().collect();
        notes.append(&mut self.notes());
        Ok(Files {
            tree: self.tree,
            notes,
        })
    }

    fn finish_layer(mut self) -> Result<ImageLayer, ImportError> {
        acl::encode_all(&mut self.tree, &mut self.left_out);
        let own = self.own.take().unwrap_or_default();
        let deletions = std::mem::take(&mut self.deletions);
        let bare = deletions.apply_layer(&mut self.tree, &own.directories);
        Ok(ImageLayer {
            bare: bare.map_err(tree_error(&self.shown))?,
            notes: self.notes(),
            tree: self.tree,
            links: own.links,
        })
    }

    /// What is not in the tree as it is in the archive, in words.
    fn notes(&mut self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.ended {
            notes.push("the archive has no end: it may be cut off".to_owned());
        }
        if !self.left_out.is_empty() {
            let names: Vec<String> = std::mem::take(&mut self.left_out).into_iter().collect();
            notes.push(format!("attributes left out: {}", names.join(", ")));
        }
        notes
    }

    /// `path` with the links that lead to its last part replaced by what they name, in an
    /// archive that is no layer as far as GNU tar follows them.
    fn through_links(&self, path: Vec<u8>) -> Vec<u8> {
        let mut pending: Vec<Vec<u8>> = split_path(&path).map(<[u8]>::to_vec).collect();
        pending.reverse();
        let (mut at, mut done) = (ROOT, Vec::new());
        let mut links = 0;
        while let Some(name) = pending.pop() {
            if name == b".." {
                done.pop();
                at = self.tree.lookup(&done.join(&b'/')).unwrap_or(ROOT);
                continue;
            }
            let child = self
                .tree
                .entries(at)
                .and_then(|all| all.get(&name))
                .copied();
            let target = match child.map(|child| &self.tree.node(child).kind) {
                Some(Kind::Symlink(target)) if !pending.is_empty() => target,
                // What is not there yet, a directory, or the last part.
                found => {
                    let missing = found.is_none();
                    done.push(name);
                    if missing {
                        break;
                    }
                    at = child.unwrap_or(at);
                    continue;
                }
            };
            links += 1;
            let absolute = target.starts_with(b"/");
            let leaves = absolute || split_path(target).any(|part| part == b"..");
            if leaves && self.own.is_none() || links > MAX_LINKS {
                return path;
            }
            if absolute {
                (at, done) = (ROOT, Vec::new());
            }
            pending.extend(
                split_path(target)
                    .map(<[u8]>::to_vec)
                    .collect::<Vec<_>>()
                    .into_iter()
                    .rev(),
            );
        }
        done.extend(pending.into_iter().rev());
        done.join(&b'/')
    }

    fn header(&mut self) -> Result<Option<Header>, ImportError> {
        let mut header = Header::new_old();
        let at = loop {
            if self.next >= self.archive_bytes {
                return Ok(None);
            }
            let at = self.next;
            self.file
                .read_exact_at(header.as_mut_bytes(), at)
                .map_err(|_| self.damaged("cut off within a header"))?;
            self.next += BLOCK_BYTES;
            if header.as_bytes().iter().any(|&byte| byte != 0) {
                break at;
            }
            // Two blocks of zeros are the end, one alone is nothing.
            if std::mem::replace(&mut self.ended, true) {
                return Ok(None);
            }
        };
        self.ended = false;
        let bytes = header.as_bytes();
        let sum = bytes[..148].iter().chain(&bytes[156..]);
        let sum = sum.fold(8 * 32u32, |sum, &byte| sum + u32::from(byte));
        if header.cksum().ok() != Some(sum) {
            let problem = format!("not a tar archive, or damaged: bad header at byte {at}");
            return Err(self.damaged(problem));
        }
        Ok(Some(header))
    }

    /// Skips `stored` bytes of content, checking that they are there; returns their start.
    fn content(&mut self, stored: u64) -> Result<u64, ImportError> {
        let offset = self.next;
        let end = offset.checked_add(stored);
        match end {
            Some(end) if end <= self.archive_bytes => {
                self.next = end.next_multiple_of(BLOCK_BYTES);
                Ok(offset)
            }
            _ => Err(self.damaged("cut off within a file's content")),
        }
    }

    fn extension(&mut self, stored: u64) -> Result<Vec<u8>, ImportError> {
        let offset = self.content(stored)?;
        let mut bytes = vec![0; stored as usize];
        self.file
            .read_exact_at(&mut bytes, offset)
            .map_err(io_error("reading", &self.plain))?;
        Ok(bytes)
    }

    fn place(
        &mut self,
        header: &Header,
        extensions: &Extensions,
        stored: u64,
    ) -> Result<(), ImportError> {
        let named = |key: &[u8]| extensions.pax.get(key).cloned();
        let path = named(b"GNU.sparse.name").or_else(|| named(b"path"));
        let path = path.or_else(|| extensions.name.clone());
        let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
        if split_path(&path).any(|part| part == b"..") {
            let shown = String::from_utf8_lossy(&path).into_owned();
            return Err(self.damaged(format!("the name {shown:?} leaves the archive")));
        }
        self.check_depth(&path)?;
        self.hold(header, extensions, &path)?;
        let deleted = match self.own {
            Some(_) => self.through_links(path.clone()),
            None => path.clone(),
        };
        match self.deletions.note(&deleted) {
            Said::Nothing => {}
            Said::Taken => return self.content(stored).map(drop),
            Said::Malformed => return Err(self.damaged("a deletion (`.wh.`) without a name")),
        }
        let is_directory = path.ends_with(b"/");
        let path = self.through_links(path);
        self.check_depth(&path)?;
        let xattrs = self.xattrs(extensions);
        let mut attributes = self.attributes(header, extensions, xattrs)?;
        let kind = match header.entry_type() {
            EntryType::Link => {
                let target = self.link_target(header, extensions);
                return self.hard_link(&path, &target);
            }
            EntryType::Symlink => {
                // Linux has no other.
                attributes.mode = 0o777;
                Kind::Symlink(self.link_target(header, extensions))
            }
            EntryType::Directory => return self.directory(&path, attributes),
            EntryType::Char => {
                self.device(header, |major, minor| Kind::CharDevice { major, minor })?
            }
            EntryType::Block => {
                self.device(header, |major, minor| Kind::BlockDevice { major, minor })?
            }
            EntryType::Fifo => Kind::Fifo,
            EntryType::GNUSparse => Kind::File(self.old_sparse(header, stored)?),
            EntryType::Regular | EntryType::Continuous if is_directory => {
                return self.directory(&path, attributes);
            }
            EntryType::Regular | EntryType::Continuous => {
                Kind::File(self.plain_file(extensions, stored)?)
            }
            other => {
                let kind = char::from(other.as_byte());
                return Err(self.damaged(format!("entries of type {kind:?} are not known")));
            }
        };
        if split_path(&path).next().is_none() {
            return Err(self.damaged("an entry without a name"));
        }
        self.tree
            .insert_path(&path, Node { attributes, kind })
            .map(drop)
            .map_err(tree_error(&self.shown))
    }

    fn check_depth(&self, path: &[u8]) -> Result<(), ImportError> {
        if split_path(path).count() <= MAX_DEPTH {
            return Ok(());
        }
        let start = String::from_utf8_lossy(&path[..path.len().min(80)]).into_owned();
        let problem = format!("a name more than {MAX_DEPTH} directories deep: {start:?}...");
        Err(self.damaged(problem))
    }

    fn plain_file(
        &mut self,
        extensions: &Extensions,
        stored: u64,
    ) -> Result<FileData, ImportError> {
        if let Some(data) = self.pax_sparse(extensions, stored)? {
            return Ok(data);
        }
        let offset = self.content(stored)?;
        Ok(match stored {
            0 => FileData::Bytes(Vec::new().into()),
            len => FileData::HostFile {
                path: self.plain.clone(),
                offset,
                len,
            },
        })
    }

    fn link_target(&self, header: &Header, extensions: &Extensions) -> Vec<u8> {
        match (extensions.pax.get(&b"linkpath"[..]), &extensions.link) {
            (Some(path), _) => path.clone(),
            (None, Some(link)) => link.clone(),
            (None, None) => header.link_name_bytes().unwrap_or_default().into_owned(),
        }
    }

    fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<(), ImportError> {
        let target = &self.through_links(target.to_vec())[..];
        let Some(target_id) = self.tree.lookup(target) else {
            if self.own.is_some() {
                return self.link_below(path, target);
            }
            let shown = String::from_utf8_lossy(target).into_owned();
            return Err(self.damaged(format!("hard link to {shown:?}, which is not before it")));
        };
        if self.tree.lookup(path) == Some(target_id) {
            return Ok(());
        }
        let parts: Vec<&[u8]> = split_path(path).collect();
        let Some((name, parents)) = parts.split_last() else {
            return Err(self.damaged("a hard link without a name"));
        };
        let parent = self.tree.make_directories(&parents.join(&b'/'));
        let parent = parent.map_err(tree_error(&self.shown))?;
        let linked = self.tree.link(parent, name, target_id);
        linked.map_err(tree_error(&self.shown))
    }

    /// A hard link to what a layer below has: a node that is filled in when that is known.
    fn link_below(&mut self, path: &[u8], target: &[u8]) -> Result<(), ImportError> {
        let node = Node {
            attributes: Attributes::with_mode(0),
            kind: Kind::Fifo,
        };
        let id = self.tree.insert_path(path, node);
        let id = id.map_err(tree_error(&self.shown))?;
        if let Some(own) = &mut self.own {
            own.links.push((id, target.to_vec()));
        }
        Ok(())
    }

    fn directory(&mut self, path: &[u8], attributes: Attributes) -> Result<(), ImportError> {
        let id = self.directory_node(path, attributes)?;
        if let Some(own) = &mut self.own {
            own.directories.insert(id);
        }
        Ok(())
    }

    fn directory_node(
        &mut self,
        path: &[u8],
        attributes: Attributes,
    ) -> Result<NodeId, ImportError> {
        let existing: Option<NodeId> = match split_path(path).next() {
            None => Some(ROOT),
            Some(_) => self.tree.lookup(path),
        };
        if let Some(id) = existing
            && self.tree.entries(id).is_some()
        {
            self.tree.node_mut(id).attributes = attributes;
            return Ok(id);
        }
        let kind = Kind::Directory(BTreeMap::new());
        self.tree
            .insert_path(path, Node { attributes, kind })
            .map_err(tree_error(&self.shown))
    }

    fn device(
        &self,
        header: &Header,
        make: impl Fn(u32, u32) -> Kind,
    ) -> Result<Kind, ImportError> {
        let number = |value: std::io::Result<Option<u32>>| -> Result<u32, ImportError> {
            let value = value.map_err(|error| self.damaged(format!("bad device: {error}")))?;
            Ok(value.unwrap_or(0))
        };
        let major = number(header.device_major())?;
        let minor = number(header.device_minor())?;
        Ok(make(major, minor))
    }

    /// Takes room in memory for an entry.
    fn hold(
        &mut self,
        header: &Header,
        extensions: &Extensions,
        path: &[u8],
    ) -> Result<(), ImportError> {
        let target = match header.entry_type() {
            EntryType::Link | EntryType::Symlink => self.link_target(header, extensions).len(),
            _ => 0,
        };
        let records = extensions.pax.iter();
        let records = records.filter(|(key, _)| key.starts_with(b"SCHILY."));
        let records: usize = records.map(|(key, value)| key.len() + value.len()).sum();
        let bytes = (path.len() + target + records) as u64;
        if target > MAX_TARGET_BYTES {
            return Err(self.damaged(format!("a link to a name of {target} bytes")));
        }
        if bytes > MAX_ENTRY_BYTES {
            let problem = format!("an entry with {bytes} bytes of names and attributes");
            return Err(self.damaged(problem));
        }
        match self.room.held_bytes.checked_sub(bytes) {
            Some(left) => self.room.held_bytes = left,
            None => {
                return Err(ImportError::TooLarge {
                    path: self.shown.clone(),
                    limit: MAX_HELD_BYTES,
                    unit: "bytes of names, links and attributes",
                });
            }
        }
        Ok(())
    }

    /// Notes that an attribute is left out.
    fn leave_out(&mut self, name: String) {
        let told: String = name.chars().take(80).collect();
        if self.left_out.len() < LEFT_OUT_TOLD {
            self.left_out.insert(told);
        }
    }

    /// The attributes that an image keeps; access control lists are texts until the end.
    fn xattrs(&mut self, extensions: &Extensions) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut xattrs = BTreeMap::new();
        for (key, value) in &extensions.pax {
            match key.strip_prefix(b"SCHILY.xattr.") {
                Some(name) if kept_xattr(name) => {
                    xattrs.insert(name.to_vec(), value.clone());
                }
                Some(name) => {
                    self.leave_out(String::from_utf8_lossy(name).into_owned());
                }
                None if acl::is_list(key) => drop(xattrs.insert(key.clone(), value.clone())),
                None => {
                    if let Some(kind) = key.strip_prefix(b"SCHILY.acl.") {
                        let kind = String::from_utf8_lossy(kind);
                        self.leave_out(format!("access control lists of kind {kind:?}"));
                    }
                }
            }
        }
        xattrs
    }

    fn attributes(
        &self,
        header: &Header,
        extensions: &Extensions,
        xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    ) -> Result<Attributes, ImportError> {
        let bad = |error: std::io::Error| self.damaged(format!("bad header: {error}"));
        let old = header.as_old();
        let id = |key: &[u8], field: std::io::Result<u64>| -> Result<u32, ImportError> {
            let value = match (extensions.number(key), field) {
                (Some(value), _) | (None, Ok(value)) => value,
                (None, Err(error)) => return Err(bad(error)),
            };
            u32::try_from(value).map_err(|_| self.damaged(format!("user or group id {value}")))
        };
        let (uid, gid) = self.owner.apply(
            id(b"uid", or_blank(&old.uid, header.uid()))?,
            id(b"gid", or_blank(&old.gid, header.gid()))?,
        );
        let (mtime_s, mtime_ns) = match extensions.pax.get(&b"mtime"[..]) {
            Some(text) => parse_time(text).ok_or_else(|| self.damaged("bad modification time"))?,
            None => (or_blank(&old.mtime, header.mtime()).map_err(bad)? as i64, 0),
        };
        Ok(Attributes {
            mode: (or_blank(&old.mode, header.mode().map(u64::from)).map_err(bad)? & 0o7777) as u16,
            uid,
            gid,
            mtime_s,
            mtime_ns,
            xattrs,
        })
    }
}

/// True for headers that say something of the entry that follows.
fn is_extension(kind: EntryType) -> bool {
    let names = kind.is_gnu_longname() || kind.is_gnu_longlink();
    names || kind.is_pax_local_extensions() || kind.is_pax_global_extensions()
}

/// A numeric field that was left blank counts as 0.
fn or_blank(field: &[u8], parsed: std::io::Result<u64>) -> std::io::Result<u64> {
    let blank = field.iter().all(|&byte| byte == 0 || byte == b' ');
    if blank { Ok(0) } else { parsed }
}

fn until_nul(bytes: &[u8]) -> Vec<u8> {
    let end = bytes.iter().position(|&byte| byte == 0);
    bytes[..end.unwrap_or(bytes.len())].to_vec()
}

#[cfg(test)]
mod referee_tests;
#[cfg(test)]
mod tests;
