//! From an image back to a tree.
//!
//! Owns the inverse of `write`. Invariant: hard links stay hard links; memory is bounded
//! by the caller's limit on content bytes, or content stays where it is.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;

use super::{Image, Inode, ReadAt, ReadError};
use crate::erofs::layout::{FileType, LayoutError, decode_device};
use crate::tree::{Attributes, FileBytes, FileData, Kind, Node, NodeId, ROOT, Tree, TreeError};

/// A source of an image's bytes that trees may share.
pub type SharedSource = Arc<dyn ReadAt + Send + Sync>;

/// A file's content in an image.
struct InImage {
    source: SharedSource,
    nid: u64,
}

impl fmt::Debug for InImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inode {} of a component's image", self.nid)
    }
}

impl FileBytes for InImage {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let image = Image::open(&*self.source).map_err(io::Error::other)?;
        let inode = image.inode(self.nid).map_err(io::Error::other)?;
        let read = image.read_file(&inode, offset, buffer);
        read.map_err(io::Error::other)
    }
}

/// An image as a tree whose files are read from `source` when they are asked for.
pub fn tree_over(source: &SharedSource) -> Result<Tree, ReadError> {
    let image = Image::open(&**source)?;
    image.tree_with(&mut |inode| {
        // A place that is none is told now.
        image.extents_of(inode)?;
        let (source, nid) = (Arc::clone(source), inode.nid);
        Ok(FileData::Elsewhere {
            source: Arc::new(InImage { source, nid }),
            len: inode.record.size,
        })
    })
}

impl Image<'_> {
    /// The whole image as a tree in memory, if its files have at most `limit_bytes`.
    pub fn to_tree(&self, limit_bytes: u64) -> Result<Tree, ReadError> {
        let mut left = limit_bytes;
        self.tree_with(&mut |inode| {
            let bytes = self.read_whole(inode, left)?;
            left -= bytes.len() as u64;
            Ok(FileData::Bytes(bytes.into()))
        })
    }

    /// The whole image as a tree; `content` says where a file's bytes are.
    fn tree_with(
        &self,
        content: &mut dyn FnMut(&Inode) -> Result<FileData, ReadError>,
    ) -> Result<Tree, ReadError> {
        let mut tree = Tree::new();
        let mut linked: BTreeMap<u64, NodeId> = BTreeMap::new();
        let mut parents: Vec<(usize, NodeId)> = Vec::new();
        self.walk(|path, inode| {
            let Some(slash) = path.iter().rposition(|&byte| byte == b'/') else {
                tree.node_mut(ROOT).attributes = self.attributes(inode)?;
                parents.push((0, ROOT));
                return Ok(());
            };
            while parents.last().is_some_and(|(len, _)| *len > slash) {
                parents.pop();
            }
            let parent = parents.last().map_or(ROOT, |(_, id)| *id);
            let name = &path[slash + 1..];
            let bad = |_: TreeError| {
                let source = LayoutError::corrupt("file name", slash as u64);
                let nid = inode.nid;
                ReadError::Inode { nid, source }
            };
            if let Some(&target) = linked.get(&inode.nid) {
                return tree.link(parent, name, target).map_err(bad);
            }
            let node = Node {
                attributes: self.attributes(inode)?,
                kind: self.kind(inode, content)?,
            };
            let id = tree.insert(parent, name, node).map_err(bad)?;
            if inode.record.file_type == FileType::Directory {
                parents.push((path.len(), id));
            } else if inode.record.nlink > 1 {
                linked.insert(inode.nid, id);
            }
            Ok::<(), ReadError>(())
        })?;
        Ok(tree)
    }

    /// Ownership, permissions, time and extended attributes of an inode.
    pub fn attributes(&self, inode: &Inode) -> Result<Attributes, ReadError> {
        let record = &inode.record;
        Ok(Attributes {
            mode: record.mode,
            uid: record.uid,
            gid: record.gid,
            mtime_s: record.mtime_s,
            mtime_ns: record.mtime_ns,
            xattrs: self.xattrs(inode)?,
        })
    }

    fn kind(
        &self,
        inode: &Inode,
        content: &mut dyn FnMut(&Inode) -> Result<FileData, ReadError>,
    ) -> Result<Kind, ReadError> {
        let (major, minor) = decode_device(inode.record.union);
        Ok(match inode.record.file_type {
            FileType::File => Kind::File(content(inode)?),
            FileType::Directory => Kind::Directory(BTreeMap::new()),
            FileType::Symlink => Kind::Symlink(self.read_link(inode)?),
            FileType::CharDevice => Kind::CharDevice { major, minor },
            FileType::BlockDevice => Kind::BlockDevice { major, minor },
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
        })
    }
}
