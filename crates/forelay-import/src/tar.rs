//! Tar archives (plain, gzip, xz, zstd) as a [`Tree`].
//!
//! Owns the entry loop: GNU and PAX long names, PAX attributes (owner, times, sizes,
//! `SCHILY.xattr.*`), hard links, devices, old GNU sparse files. Header fields are
//! decoded by the `tar` crate; its entry iterator is not used because it splits PAX
//! records at newlines, which breaks binary attribute values. Nothing is unpacked onto
//! the host: content stays in the (decompressed) archive and is read from there.
//!
//! Invariants: names with `..` are refused; absolute names lose their `/`; no entry is
//! placed through a symbolic link; content lies within the archive's size.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use forelay_image::tree::{Attributes, FileData, Kind, Node, NodeId, ROOT, Tree, split_path};
use tar::{EntryType, GnuExtSparseHeader, Header};

use crate::dir::Ownership;
use crate::error::{ImportError, archive_error, io_error, tree_error};
use crate::spool::{Compression, Spool, read_up_to};

const BLOCK_BYTES: u64 = 512;
/// Longest accepted name, link target or set of PAX records.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;
const MAX_ENTRIES: u64 = 16 << 20;
const MAX_DEPTH: usize = 512;

/// Reads the archive at `path`; a compressed one is decompressed into `spool` first.
pub fn read_tar(path: &Path, spool: &mut Spool, owner: Ownership) -> Result<Tree, ImportError> {
    let mut file = File::open(path).map_err(io_error("opening", path))?;
    let mut first = [0; 8];
    let count = read_up_to(&mut file, &mut first).map_err(io_error("reading", path))?;
    file.rewind().map_err(io_error("reading", path))?;
    let compression = Compression::detect(&first[..count]);
    if compression == Compression::None {
        return read_plain(path, path, spool, owner);
    }
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
) -> Result<Tree, ImportError> {
    let file = File::open(plain).map_err(io_error("opening", plain))?;
    let archive_bytes = file.metadata().map_err(io_error("reading", plain))?.len();
    let mut reader = TarReader {
        file,
        plain: plain.to_owned(),
        shown: shown.to_owned(),
        archive_bytes,
        next: 0,
        spool,
        owner,
        tree: Tree::new(),
    };
    let mut entries = 0u64;
    while reader.entry()? {
        entries += 1;
        if entries > MAX_ENTRIES {
            return Err(ImportError::TooLarge {
                path: shown.to_owned(),
                limit: MAX_ENTRIES,
                unit: "entries",
            });
        }
    }
    if entries == 0 && archive_bytes < 2 * BLOCK_BYTES {
        return Err(archive_error(shown, "not a tar archive"));
    }
    Ok(reader.tree)
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
}

/// What extension headers said about the entry that follows them.
#[derive(Default)]
struct Extensions {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Extensions {
    fn number(&self, key: &[u8]) -> Option<u64> {
        let text = std::str::from_utf8(self.pax.get(key)?).ok()?;
        text.parse().ok()
    }
}

impl TarReader<'_> {
    fn damaged(&self, problem: impl Into<String>) -> ImportError {
        archive_error(&self.shown, problem)
    }

    /// Reads one entry with its extension headers; false at the end of the archive.
    fn entry(&mut self) -> Result<bool, ImportError> {
        let mut extensions = Extensions::default();
        loop {
            let Some(header) = self.header()? else {
                return Ok(false);
            };
            let bad_size = |error| self.damaged(format!("bad size: {error}"));
            let stored = header.entry_size().map_err(bad_size)?;
            match header.entry_type() {
                EntryType::GNULongName => {
                    extensions.name = Some(until_nul(&self.extension(stored)?));
                }
                EntryType::GNULongLink => {
                    extensions.link = Some(until_nul(&self.extension(stored)?));
                }
                EntryType::XHeader => {
                    let records = self.extension(stored)?;
                    let parsed = parse_pax(&records);
                    extensions.pax = parsed.ok_or_else(|| self.damaged("malformed PAX records"))?;
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

    fn header(&mut self) -> Result<Option<Header>, ImportError> {
        if self.next >= self.archive_bytes {
            return Ok(None);
        }
        let mut header = Header::new_old();
        let at = self.next;
        self.file
            .read_exact_at(header.as_mut_bytes(), at)
            .map_err(|_| self.damaged("cut off within a header"))?;
        self.next += BLOCK_BYTES;
        if header.as_bytes().iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
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
        if stored > MAX_EXTENSION_BYTES {
            return Err(self.damaged(format!("an extension header of {stored} bytes")));
        }
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
        let path = match (extensions.pax.get(&b"path"[..]), &extensions.name) {
            (Some(path), _) => path.clone(),
            (None, Some(name)) => name.clone(),
            (None, None) => header.path_bytes().into_owned(),
        };
        let depth = split_path(&path).count();
        if split_path(&path).any(|part| part == b"..") || depth > MAX_DEPTH {
            let shown = String::from_utf8_lossy(&path).into_owned();
            return Err(self.damaged(format!("the name {shown:?} leaves the archive")));
        }
        let attributes = self.attributes(header, extensions)?;
        let kind = match header.entry_type() {
            EntryType::Link => {
                let target = self.link_target(header, extensions);
                return self.hard_link(&path, &target);
            }
            EntryType::Symlink => Kind::Symlink(self.link_target(header, extensions)),
            EntryType::Directory => return self.directory(&path, attributes),
            EntryType::Char => {
                self.device(header, |major, minor| Kind::CharDevice { major, minor })?
            }
            EntryType::Block => {
                self.device(header, |major, minor| Kind::BlockDevice { major, minor })?
            }
            EntryType::Fifo => Kind::Fifo,
            EntryType::GNUSparse => Kind::File(self.sparse(header, stored)?),
            EntryType::Regular | EntryType::Continuous if path.ends_with(b"/") => {
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
        if depth == 0 {
            return Err(self.damaged("an entry without a name"));
        }
        self.tree
            .insert_path(&path, Node { attributes, kind })
            .map(drop)
            .map_err(tree_error(&self.shown))
    }

    fn plain_file(
        &mut self,
        extensions: &Extensions,
        stored: u64,
    ) -> Result<FileData, ImportError> {
        if extensions
            .pax
            .keys()
            .any(|key| key.starts_with(b"GNU.sparse."))
        {
            let problem = "sparse files in PAX form are not supported; repack with --format=gnu";
            return Err(self.damaged(problem));
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
        let Some(target_id) = self.tree.lookup(target) else {
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

    fn directory(&mut self, path: &[u8], attributes: Attributes) -> Result<(), ImportError> {
        let existing: Option<NodeId> = match split_path(path).next() {
            None => Some(ROOT),
            Some(_) => self.tree.lookup(path),
        };
        if let Some(id) = existing
            && self.tree.entries(id).is_some()
        {
            self.tree.node_mut(id).attributes = attributes;
            return Ok(());
        }
        let kind = Kind::Directory(BTreeMap::new());
        self.tree
            .insert_path(path, Node { attributes, kind })
            .map(drop)
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

    fn attributes(
        &self,
        header: &Header,
        extensions: &Extensions,
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
        let mut xattrs = BTreeMap::new();
        for (key, value) in &extensions.pax {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                xattrs.insert(name.to_vec(), value.clone());
            }
        }
        Ok(Attributes {
            mode: (or_blank(&old.mode, header.mode().map(u64::from)).map_err(bad)? & 0o7777) as u16,
            uid,
            gid,
            mtime_s,
            mtime_ns,
            xattrs,
        })
    }

    /// An old GNU sparse file, expanded into the spool (its holes stay holes there).
    fn sparse(&mut self, header: &Header, stored: u64) -> Result<FileData, ImportError> {
        let Some(gnu) = header.as_gnu() else {
            return Err(self.damaged("a sparse file without a GNU header"));
        };
        let bad = |error: std::io::Error| archive_error(&self.shown, format!("sparse: {error}"));
        let len = gnu.real_size().map_err(bad)?;
        let mut blocks = Vec::new();
        for block in gnu.sparse.iter().filter(|block| !block.is_empty()) {
            blocks.push((block.offset().map_err(bad)?, block.length().map_err(bad)?));
        }
        let mut more = gnu.is_extended();
        while more {
            let mut extended = GnuExtSparseHeader::new();
            let read = self.file.read_exact_at(extended.as_mut_bytes(), self.next);
            read.map_err(bad)?;
            self.next += BLOCK_BYTES;
            for block in extended.sparse.iter().filter(|block| !block.is_empty()) {
                blocks.push((block.offset().map_err(bad)?, block.length().map_err(bad)?));
            }
            more = extended.is_extended();
        }
        let mut from = self.content(stored)?;
        let (path, _) = self.spool.store(&mut std::io::empty(), &self.shown)?;
        let mut out = File::options()
            .write(true)
            .open(&path)
            .map_err(io_error("opening", &path))?;
        out.set_len(len).map_err(io_error("growing", &path))?;
        for (offset, count) in blocks {
            let end = offset.checked_add(count);
            if end.is_none_or(|end| end > len) || from + count > self.next {
                return Err(self.damaged("a sparse block outside its file"));
            }
            out.seek(SeekFrom::Start(offset))
                .map_err(io_error("writing", &path))?;
            copy_range(&self.file, from, count, &mut out).map_err(io_error("writing", &path))?;
            from += count;
        }
        Ok(FileData::HostFile {
            path,
            offset: 0,
            len,
        })
    }
}

fn copy_range(from: &File, offset: u64, len: u64, out: &mut File) -> std::io::Result<()> {
    let mut from = from.try_clone()?;
    from.seek(SeekFrom::Start(offset))?;
    let mut buffer = vec![0; 64 << 10];
    let mut limited = from.take(len);
    loop {
        let count = limited.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        out.write_all(&buffer[..count])?;
    }
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

/// PAX records: `<length> <key>=<value>\n`, the length counting the whole record.
fn parse_pax(mut records: &[u8]) -> Option<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut parsed = BTreeMap::new();
    while !records.is_empty() && records[0] != 0 {
        let space = records.iter().position(|&byte| byte == b' ')?;
        let length: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
        let record = records.get(space + 1..length)?;
        let record = record.strip_suffix(b"\n")?;
        let equals = record.iter().position(|&byte| byte == b'=')?;
        parsed.insert(record[..equals].to_vec(), record[equals + 1..].to_vec());
        records = &records[length..];
    }
    Some(parsed)
}

/// `-12.5` as whole seconds (rounded down) and nanoseconds.
fn parse_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}

#[cfg(test)]
#[path = "tar_tests.rs"]
mod tests;
