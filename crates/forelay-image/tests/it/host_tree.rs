//! Reads a host directory into a tree, with hard links, devices and extended attributes.
//!
//! The importer in forelay-store does this for users; this one keeps the tests of this
//! crate on their own.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use forelay_image::tree::{Attributes, FileData, Kind, Node, NodeId, ROOT, Tree};

/// The tree under `root`.
pub fn read_host_tree(root: &Path) -> Tree {
    let mut tree = Tree::new();
    tree.node_mut(ROOT).attributes = attributes(root, &fs::symlink_metadata(root).unwrap());
    read_directory(root, ROOT, &mut tree, &mut HashMap::new());
    tree
}

fn read_directory(
    path: &Path,
    parent: NodeId,
    tree: &mut Tree,
    linked: &mut HashMap<(u64, u64), NodeId>,
) {
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        let path = entry.path();
        let name = entry.file_name();
        let metadata = fs::symlink_metadata(&path).unwrap();
        let key = (metadata.dev(), metadata.ino());
        if let Some(&target) = linked.get(&key) {
            tree.link(parent, name.as_bytes(), target).unwrap();
            continue;
        }
        let node = Node {
            attributes: attributes(&path, &metadata),
            kind: kind(&path, &metadata),
        };
        let id = tree.insert(parent, name.as_bytes(), node).unwrap();
        if !metadata.is_dir() && metadata.nlink() > 1 {
            linked.insert(key, id);
        }
        if metadata.is_dir() {
            read_directory(&path, id, tree, linked);
        }
    }
}

/// Ownership, permissions, time and extended attributes of a host file.
pub fn attributes(path: &Path, metadata: &fs::Metadata) -> Attributes {
    Attributes {
        mode: (metadata.mode() & 0o7777) as u16,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime_s: metadata.mtime(),
        mtime_ns: metadata.mtime_nsec() as u32,
        xattrs: xattrs(path),
    }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65536];
    let len = rustix::fs::llistxattr(path, names.as_mut_slice()).unwrap_or(0);
    names.truncate(len);
    let names = names.split(|&byte| byte == 0);
    names
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0; 65536];
            let len = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
            value.truncate(len);
            (name.to_vec(), value)
        })
        .collect()
}

fn kind(path: &Path, metadata: &fs::Metadata) -> Kind {
    let rdev = metadata.rdev();
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let file_type = metadata.file_type();
    if file_type.is_dir() {
        Kind::Directory(BTreeMap::new())
    } else if file_type.is_symlink() {
        Kind::Symlink(fs::read_link(path).unwrap().into_os_string().into_vec())
    } else if file_type.is_char_device() {
        Kind::CharDevice { major, minor }
    } else if file_type.is_block_device() {
        Kind::BlockDevice { major, minor }
    } else if file_type.is_fifo() {
        Kind::Fifo
    } else if file_type.is_socket() {
        Kind::Socket
    } else {
        Kind::File(FileData::HostFile {
            path: path.to_owned(),
            offset: 0,
            len: metadata.len(),
        })
    }
}
