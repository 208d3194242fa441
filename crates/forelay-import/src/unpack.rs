//! Writing a [`Tree`] into a host directory: the lower layer that packages are installed
//! on top of.
//!
//! Owns order: owner before permissions (changing the owner clears set-uid), permissions
//! before attributes, directory times last. Refuses to write outside the directory: the
//! tree has no `..` and every parent is a directory that was just made.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use forelay_image::tree::{Attributes, FileData, Kind, NodeId, ROOT, Tree};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, lsetxattr, makedev, mknodat,
    utimensat,
};

use crate::error::{ImportError, io_error};
use crate::users::UserRange;

/// Writes `tree` into the existing directory `to`, its owners shifted into `users`. Needs root.
pub fn write_directory(tree: &Tree, to: &Path, users: UserRange) -> Result<(), ImportError> {
    let mut written: BTreeMap<NodeId, PathBuf> = BTreeMap::new();
    let mut directories = vec![(ROOT, to.to_owned())];
    let mut at = 0;
    while at < directories.len() {
        let (id, path) = directories[at].clone();
        at += 1;
        let entries = tree.entries(id).into_iter().flatten();
        for (name, &child) in entries {
            let child_path = path.join(OsStr::from_bytes(name));
            if let Some(first) = written.get(&child) {
                fs::hard_link(first, &child_path).map_err(io_error("linking", &child_path))?;
                continue;
            }
            make(tree, child, &child_path, users).map_err(io_error("writing", &child_path))?;
            if tree.entries(child).is_some() {
                directories.push((child, child_path));
            } else {
                written.insert(child, child_path);
            }
        }
    }
    for (id, path) in directories.iter().rev() {
        let attributes = &tree.node(*id).attributes;
        set_attributes(path, attributes, true, users).map_err(io_error("writing", path))?;
    }
    Ok(())
}

fn make(tree: &Tree, id: NodeId, path: &Path, users: UserRange) -> io::Result<()> {
    let node = tree.node(id);
    let device = |kind, major, minor| {
        let mode = Mode::from_raw_mode(0o600);
        mknodat(CWD, path, kind, mode, makedev(major, minor))
    };
    match &node.kind {
        // Attributes follow once the directory is filled.
        Kind::Directory(_) => return fs::create_dir(path),
        Kind::Symlink(target) => {
            symlink(OsStr::from_bytes(target), path)?;
            return set_attributes(path, &node.attributes, false, users);
        }
        Kind::File(data) => write_file(data, path)?,
        Kind::CharDevice { major, minor } => device(FileType::CharacterDevice, *major, *minor)?,
        Kind::BlockDevice { major, minor } => device(FileType::BlockDevice, *major, *minor)?,
        Kind::Fifo => device(FileType::Fifo, 0, 0)?,
        Kind::Socket => device(FileType::Socket, 0, 0)?,
    }
    set_attributes(path, &node.attributes, true, users)
}

fn write_file(data: &FileData, path: &Path) -> io::Result<()> {
    let mut out = File::create_new(path)?;
    let copied = io::copy(&mut data.reader()?, &mut out)?;
    if copied < data.len() {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
    }
    Ok(())
}

fn set_attributes(
    path: &Path,
    attributes: &Attributes,
    follow: bool,
    users: UserRange,
) -> io::Result<()> {
    let owner = (users.outward(attributes.uid), users.outward(attributes.gid));
    let (Some(uid), Some(gid)) = owner else {
        let (uid, gid) = (attributes.uid, attributes.gid);
        let problem = format!("its owner {uid}:{gid} is beyond 65535, the last that builds have");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    };
    lchown(path, Some(uid), Some(gid))?;
    if follow {
        let mode = fs::Permissions::from_mode(u32::from(attributes.mode));
        fs::set_permissions(path, mode)?;
    }
    for (name, value) in &attributes.xattrs {
        let value = users.xattr_outward(name, value).ok_or_else(|| {
            let problem = "an access list or capability names a user beyond 65535";
            io::Error::new(io::ErrorKind::InvalidInput, problem)
        })?;
        lsetxattr(path, &name[..], &value, XattrFlags::empty())?;
    }
    let time = Timespec {
        tv_sec: attributes.mtime_s,
        tv_nsec: attributes.mtime_ns.into(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dir::{Ownership, read_directory};
    use forelay_image::tree::Node;

    fn sample() -> Tree {
        let mut tree = Tree::new();
        let mut add = |path: &str, mode: u16, kind: Kind| {
            let mut attributes = Attributes::with_mode(mode);
            (attributes.uid, attributes.gid) = (33, 34);
            (attributes.mtime_s, attributes.mtime_ns) = (1_000_000, 5);
            if matches!(kind, Kind::Directory(_)) {
                attributes
                    .xattrs
                    .insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
            }
            tree.insert_path(path.as_bytes(), Node { attributes, kind })
                .unwrap()
        };
        add("d", 0o2750, Kind::Directory(BTreeMap::new()));
        let bytes = FileData::Bytes(b"text".as_slice().into());
        let file = add("d/file", 0o4755, Kind::File(bytes));
        add("soft", 0o777, Kind::Symlink(b"nowhere".to_vec()));
        add("gone", 0, Kind::CharDevice { major: 0, minor: 0 });
        add("disk", 0o660, Kind::BlockDevice { major: 8, minor: 1 });
        add("pipe", 0o644, Kind::Fifo);
        tree.link(ROOT, b"hard", file).unwrap();
        tree
    }

    /// Directory -> tree is the referee: what was written reads back the same.
    #[test]
    fn privileged_a_tree_survives_the_way_through_a_directory() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED privileged_a_tree_survives_the_way_through_a_directory: not root");
            return;
        }
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let tree = sample();
        let users = UserRange::new(300_000);
        write_directory(&tree, directory.path(), users).unwrap();
        let there = read_directory(directory.path(), Ownership::Keep).unwrap();
        let file = there.tree.lookup(b"d/file").unwrap();
        assert_eq!(there.tree.node(file).attributes.uid, 300_033);
        let again = users.read(directory.path()).unwrap();
        for path in ["d", "d/file", "soft", "gone", "disk", "pipe", "hard"] {
            let one = tree.node(tree.lookup(path.as_bytes()).unwrap());
            let other = again.node(again.lookup(path.as_bytes()).unwrap());
            // Whose a whiteout is means nothing.
            let whiteout = one.kind.is_whiteout();
            assert!(whiteout || one.attributes == other.attributes, "{path}");
            let same = std::mem::discriminant(&one.kind) == std::mem::discriminant(&other.kind);
            assert!(same, "{path}: {:?} {:?}", one.kind, other.kind);
        }
        assert_eq!(again.lookup(b"hard"), again.lookup(b"d/file"));
        let gone = again.lookup(b"gone").unwrap();
        assert!(again.node(gone).kind.is_whiteout());
    }
}
