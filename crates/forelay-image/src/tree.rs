//! A file tree in memory: what component images are built from.
//!
//! Nodes live in an arena; a directory maps names to node ids, so two names with the
//! same id are hard links. Content may stay in host files until the image is written.
//!
//! Invariants: node 0 is the root directory; a directory has exactly one parent; names
//! are 1 to 255 bytes, neither `.` nor `..`, without `/` and NUL.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;

use crate::watched::WatchedFile;

/// Index of a node in its [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

/// The root directory of every tree.
pub const ROOT: NodeId = NodeId(0);

/// Ownership, permissions and extended attributes of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits with set-uid, set-gid and sticky (07777), without the file type.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since the epoch.
    pub mtime_s: i64,
    /// Nanoseconds part of the modification time.
    pub mtime_ns: u32,
    /// Extended attributes by full name (`security.capability`).
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Attributes {
    /// Root-owned, mode `mode`, time 0, no extended attributes.
    pub fn with_mode(mode: u16) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            mtime_s: 0,
            mtime_ns: 0,
            xattrs: BTreeMap::new(),
        }
    }

    /// The same with another owner.
    pub fn owned_by(self, uid: u32, gid: u32) -> Self {
        Self { uid, gid, ..self }
    }

    /// The same with another modification time.
    pub fn modified_at(self, mtime_s: i64) -> Self {
        Self { mtime_s, ..self }
    }
}

/// Bytes of one file that are had when they are asked for.
pub trait FileBytes: std::fmt::Debug + Send + Sync {
    /// Reads up to `buffer.len()` bytes from `offset`; 0 at the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
}

/// Where a regular file's bytes are.
#[derive(Clone, Debug)]
pub enum FileData {
    /// In memory.
    Bytes(Arc<[u8]>),
    /// In a host file, from `offset`, `len` bytes; read when the image is written.
    HostFile {
        /// Path on the host.
        path: PathBuf,
        /// First byte in the host file.
        offset: u64,
        /// Number of bytes.
        len: u64,
    },
    /// All of a host file that others may change meanwhile; read when the image is written.
    Watched(WatchedFile),
    /// Elsewhere, `len` bytes; read when the image is written.
    Elsewhere {
        /// Who has them.
        source: Arc<dyn FileBytes>,
        /// Number of bytes.
        len: u64,
    },
}

/// [`FileBytes`] from the start on.
struct FromStart<'a> {
    source: &'a dyn FileBytes,
    offset: u64,
    left: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let len = (out.len() as u64).min(self.left) as usize;
        let count = match len {
            0 => 0,
            _ => self.source.read_at(&mut out[..len], self.offset)?,
        };
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

impl FileData {
    /// Number of bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::HostFile { len, .. } | Self::Elsewhere { len, .. } => *len,
            Self::Watched(file) => file.bytes(),
        }
    }

    /// True for an empty file.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All bytes, in memory.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.reader()?.read_to_end(&mut bytes)?;
        if bytes.len() as u64 != self.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(bytes)
    }

    /// Reads its bytes from the start; fewer than [`FileData::len`] if a host file was cut.
    pub fn reader(&self) -> io::Result<Box<dyn Read + '_>> {
        let (mut file, offset) = match self {
            Self::Bytes(bytes) => return Ok(Box::new(&bytes[..])),
            Self::Elsewhere { source, len } => {
                return Ok(Box::new(FromStart {
                    source: &**source,
                    offset: 0,
                    left: *len,
                }));
            }
            Self::HostFile { path, offset, .. } => (File::open(path)?, *offset),
            Self::Watched(watched) => {
                let changed = || io::Error::other("it changed after it was looked at");
                (watched.open()?.ok_or_else(changed)?, 0)
            }
        };
        file.seek(SeekFrom::Start(offset))?;
        Ok(Box::new(file.take(self.len())))
    }
}

/// What a node is. An overlayfs whiteout is a character device 0/0.
#[derive(Clone, Debug)]
pub enum Kind {
    /// Regular file.
    File(FileData),
    /// Directory: name to node.
    Directory(BTreeMap<Vec<u8>, NodeId>),
    /// Symbolic link with its target.
    Symlink(Vec<u8>),
    /// Character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
}

impl Kind {
    /// True for an overlayfs whiteout (character device 0/0).
    pub fn is_whiteout(&self) -> bool {
        matches!(self, Self::CharDevice { major: 0, minor: 0 })
    }
}

/// One file system object.
#[derive(Clone, Debug)]
pub struct Node {
    /// Ownership, permissions, times, extended attributes.
    pub attributes: Attributes,
    /// Type and content.
    pub kind: Kind,
}

/// A file tree.
#[derive(Clone, Debug)]
pub struct Tree {
    nodes: Vec<Node>,
}

/// Why a node could not be added to a [`Tree`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TreeError {
    /// Empty, too long, `.`, `..`, or with `/` or NUL.
    #[error("{0:?} cannot be a file name: 1 to 255 bytes, not `.` or `..`, no `/`, no NUL")]
    Name(String),
    /// The parent of a path is missing or is not a directory.
    #[error("{0:?}: the parent is not a directory of this tree")]
    Parent(String),
    /// A directory cannot be hard-linked.
    #[error("{0:?}: a directory cannot have a second name")]
    DirectoryLink(String),
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Splits `a/b/c` (leading `/` and `./` allowed) into its components; `.` is skipped.
pub fn split_path(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
}

/// Longest path that is followed or made, in bytes, as for the kernel.
pub(crate) const PATH_LIMIT_BYTES: usize = 4096;

/// True for the absolute path of something below the root as it is written plainly.
pub(crate) fn is_plain_path(path: &str) -> bool {
    let names = path.strip_prefix('/').map(|names| names.split('/'));
    path.len() <= PATH_LIMIT_BYTES && names.is_some_and(|mut names| names.all(is_plain_name))
}

/// True for a name that a directory's entry can have, other than `.` and `..`.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains(['/', '\0'])
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// A tree with an empty root directory (mode 0755).
    pub fn new() -> Self {
        let attributes = Attributes::with_mode(0o755);
        Self {
            nodes: vec![Node {
                attributes,
                kind: Kind::Directory(BTreeMap::new()),
            }],
        }
    }

    /// Number of nodes, including the root and any that lost their last name.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// True if only the root exists.
    pub fn is_empty(&self) -> bool {
        self.nodes.len() == 1
    }

    /// The node with this id.
    ///
    /// # Panics
    /// If `id` is not of this tree.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    /// The node with this id, to change its attributes or content.
    ///
    /// # Panics
    /// If `id` is not of this tree.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    /// Entries of a directory; `None` for anything else.
    pub fn entries(&self, id: NodeId) -> Option<&BTreeMap<Vec<u8>, NodeId>> {
        match &self.node(id).kind {
            Kind::Directory(entries) => Some(entries),
            _ => None,
        }
    }

    /// Finds a node by path, without following symbolic links.
    pub fn lookup(&self, path: &[u8]) -> Option<NodeId> {
        split_path(path).try_fold(ROOT, |id, name| self.entries(id)?.get(name).copied())
    }

    /// Adds `node` as `name` in directory `parent`; an existing entry is replaced.
    pub fn insert(&mut self, parent: NodeId, name: &[u8], node: Node) -> Result<NodeId, TreeError> {
        let id = NodeId(self.nodes.len() as u32);
        self.set_entry(parent, name, id)?;
        self.nodes.push(node);
        Ok(id)
    }

    /// Gives the non-directory `target` another name (a hard link).
    pub fn link(&mut self, parent: NodeId, name: &[u8], target: NodeId) -> Result<(), TreeError> {
        if matches!(self.node(target).kind, Kind::Directory(_)) {
            return Err(TreeError::DirectoryLink(lossy(name)));
        }
        self.set_entry(parent, name, target)
    }

    /// Removes `name` from directory `parent`; returns the node it named.
    pub fn remove(&mut self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        match &mut self.node_mut(parent).kind {
            Kind::Directory(entries) => entries.remove(name),
            _ => None,
        }
    }

    /// Finds or makes the directory `path` (new ones get mode 0755, root-owned).
    pub fn make_directories(&mut self, path: &[u8]) -> Result<NodeId, TreeError> {
        let mut id = ROOT;
        for name in split_path(path) {
            let Some(entries) = self.entries(id) else {
                return Err(TreeError::Parent(lossy(path)));
            };
            id = match entries.get(name) {
                Some(&next) => next,
                None => {
                    let attributes = Attributes::with_mode(0o755);
                    let kind = Kind::Directory(BTreeMap::new());
                    self.insert(id, name, Node { attributes, kind })?
                }
            };
        }
        if self.entries(id).is_none() {
            return Err(TreeError::Parent(lossy(path)));
        }
        Ok(id)
    }

    /// Adds `node` at `path`, making missing parent directories.
    pub fn insert_path(&mut self, path: &[u8], node: Node) -> Result<NodeId, TreeError> {
        let parts: Vec<&[u8]> = split_path(path).collect();
        let Some((name, parents)) = parts.split_last() else {
            return Err(TreeError::Name(lossy(path)));
        };
        let parent = self.make_directories(&parents.join(&b'/'))?;
        self.insert(parent, name, node)
    }

    /// Adds or replaces a regular file, making missing parent directories.
    pub fn put_file(
        &mut self,
        path: &str,
        bytes: impl Into<Arc<[u8]>>,
        attributes: Attributes,
    ) -> Result<NodeId, TreeError> {
        let kind = Kind::File(FileData::Bytes(bytes.into()));
        self.insert_path(path.as_bytes(), Node { attributes, kind })
    }

    /// The content of the regular file at `path`, if there is one.
    pub fn file(&self, path: &[u8]) -> Option<&FileData> {
        match &self.node(self.lookup(path)?).kind {
            Kind::File(data) => Some(data),
            _ => None,
        }
    }

    /// The text of the regular file at `path`, if there is one.
    pub fn text_of(&self, path: &str) -> io::Result<Option<String>> {
        let bytes = self.file(path.as_bytes()).map(FileData::read).transpose()?;
        Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Replaces a regular file's content, keeping its attributes and all its names; does
    /// nothing if there is none at `path`.
    pub fn replace_content(&mut self, path: &str, bytes: impl Into<Arc<[u8]>>) {
        if let Some(id) = self.lookup(path.as_bytes())
            && let Kind::File(data) = &mut self.node_mut(id).kind
        {
            *data = FileData::Bytes(bytes.into());
        }
    }

    /// Removes the entry at `path`; returns the node it named.
    pub fn remove_path(&mut self, path: &[u8]) -> Option<NodeId> {
        let (parent, name) = match path.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => (self.lookup(&path[..slash])?, &path[slash + 1..]),
            None => (ROOT, path),
        };
        self.remove(parent, name)
    }

    /// Every node that has a name, the root first.
    pub fn reachable(&self) -> Vec<NodeId> {
        let mut seen = vec![false; self.len()];
        let mut found = Vec::new();
        let mut pending = vec![ROOT];
        while let Some(id) = pending.pop() {
            if std::mem::replace(&mut seen[id.0 as usize], true) {
                continue;
            }
            found.push(id);
            if let Some(entries) = self.entries(id) {
                pending.extend(entries.values().copied());
            }
        }
        found
    }

    fn set_entry(&mut self, parent: NodeId, name: &[u8], id: NodeId) -> Result<(), TreeError> {
        let bad = name.is_empty() || name.len() > 255 || name == b"." || name == b"..";
        if bad || name.contains(&b'/') || name.contains(&0) {
            return Err(TreeError::Name(lossy(name)));
        }
        match &mut self.node_mut(parent).kind {
            Kind::Directory(entries) => {
                entries.insert(name.to_vec(), id);
                Ok(())
            }
            _ => Err(TreeError::Parent(lossy(name))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> Node {
        let kind = Kind::File(FileData::Bytes(bytes.into()));
        Node {
            attributes: Attributes::with_mode(0o644),
            kind,
        }
    }

    #[test]
    fn paths_are_made_found_linked_and_removed() {
        let mut tree = Tree::new();
        let id = tree.insert_path(b"/usr/bin/tool", file(b"x")).unwrap();
        assert_eq!(tree.lookup(b"usr/./bin/tool"), Some(id));
        let bin = tree.lookup(b"usr/bin").unwrap();
        tree.link(bin, b"alias", id).unwrap();
        assert_eq!(tree.lookup(b"/usr/bin/alias"), Some(id));
        assert_eq!(tree.remove(bin, b"tool"), Some(id));
        assert_eq!(tree.lookup(b"/usr/bin/tool"), None);
        assert!(matches!(
            tree.link(ROOT, b"b", bin),
            Err(TreeError::DirectoryLink(_))
        ));
    }

    #[test]
    fn files_are_put_read_replaced_and_removed_by_path() {
        let mut tree = Tree::new();
        let attributes = Attributes::with_mode(0o640).owned_by(1, 2).modified_at(3);
        let id = tree.put_file("etc/a", *b"one", attributes.clone()).unwrap();
        assert_eq!(tree.text_of("etc/a").unwrap().as_deref(), Some("one"));
        tree.link(tree.lookup(b"etc").unwrap(), b"b", id).unwrap();
        tree.replace_content("etc/b", *b"two");
        assert_eq!(tree.text_of("/etc/a").unwrap().as_deref(), Some("two"));
        assert_eq!(tree.node(id).attributes, attributes);
        tree.replace_content("etc", *b"x");
        assert_eq!(tree.text_of("etc").unwrap(), None);
        assert_eq!(tree.reachable().len(), 3);
        assert_eq!(tree.remove_path(b"etc/a"), Some(id));
        assert_eq!(tree.remove_path(b"etc/a"), None);
        assert_eq!(tree.remove_path(b"gone/a"), None);
        assert!(tree.remove_path(b"etc").is_some());
        assert_eq!(tree.reachable(), [ROOT]);
    }

    #[test]
    fn a_part_of_a_host_file_is_read() {
        let host = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(host.path(), b"0123456789").unwrap();
        let data = |offset, len| FileData::HostFile {
            path: host.path().to_owned(),
            offset,
            len,
        };
        assert_eq!(data(2, 3).read().unwrap(), b"234");
        assert!(data(8, 3).read().is_err());
    }

    #[test]
    fn bad_names_and_parents_are_refused() {
        let mut tree = Tree::new();
        tree.insert_path(b"/file", file(b"")).unwrap();
        assert!(matches!(
            tree.insert_path(b"/file/x", file(b"")),
            Err(TreeError::Parent(_))
        ));
        for name in [&b""[..], b"..", b"a/b", b"a\0b", &[b'a'; 256]] {
            assert!(matches!(
                tree.insert(ROOT, name, file(b"")),
                Err(TreeError::Name(_))
            ));
        }
    }
}
