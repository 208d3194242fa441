//! What an overlay's upper directory really changes in the layers below it.
//!
//! overlayfs copies a file up when it is opened for writing and a directory when a
//! temporary file is made in it; neither is a change. Such copies are taken out, so that
//! a component holds what its packages add and nothing of the base. What scripts changed of
//! the base's directories (their owner, or that they are directories) is marked, since
//! composing leaves directories that exist as they are.
//!
//! Invariant: base + result, composed, shows the same files, content and attributes (times
//! of directories aside) as base + upper directory under overlayfs.

use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use forelay_image::erofs::xattr::REPLACES;
use forelay_image::tree::{Attributes, FileData, Kind, NodeId, ROOT, Tree};

use crate::dir::read_xattrs;
use crate::error::{ImportError, io_error};
use crate::users::UserRange;

/// Removes from `upper` what is the same in the directory `base`, whose owners are shifted
/// into `users`; returns how many entries went.
pub fn remove_unchanged(
    upper: &mut Tree,
    base: &Path,
    users: UserRange,
) -> Result<usize, ImportError> {
    let mut removed = 0;
    prune(upper, ROOT, base, users, &mut removed)?;
    Ok(removed)
}

fn prune(
    upper: &mut Tree,
    directory: NodeId,
    base: &Path,
    users: UserRange,
    removed: &mut usize,
) -> Result<(), ImportError> {
    let entries = upper.entries(directory).cloned().unwrap_or_default();
    for (name, id) in entries {
        let path: PathBuf = base.join(std::ffi::OsStr::from_bytes(&name));
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        let opaque = b"trusted.overlay.opaque";
        let is_directory = upper.entries(id).is_some();
        let same = same_attributes(&upper.node(id).attributes, &path, &metadata, users)?;
        let whiteout = upper.node(id).kind.is_whiteout();
        if metadata.is_dir() && !whiteout && !(is_directory && same) {
            let attributes = &mut upper.node_mut(id).attributes;
            attributes.xattrs.insert(REPLACES.to_vec(), b"y".to_vec());
        }
        // Never through a link of the base, which may lead anywhere.
        let below = is_directory && metadata.is_dir();
        if below && !upper.node(id).attributes.xattrs.contains_key(&opaque[..]) {
            prune(upper, id, &path, users, removed)?;
        }
        if same && same_kind(upper, id, &path, &metadata)? {
            upper.remove(directory, &name);
            *removed += 1;
        }
    }
    Ok(())
}

/// True for what has the same content; for a directory, which holds nothing that is new.
fn same_kind(upper: &Tree, id: NodeId, path: &Path, base: &Metadata) -> Result<bool, ImportError> {
    match &upper.node(id).kind {
        Kind::Directory(entries) => Ok(entries.is_empty() && base.is_dir()),
        Kind::Symlink(target) => {
            let old = fs::read_link(path).ok();
            Ok(old.is_some_and(|old| old.as_os_str().as_bytes() == &target[..]))
        }
        Kind::File(data) if base.is_file() && data.len() == base.len() => same_content(data, path),
        _ => Ok(false),
    }
}

fn same_attributes(
    attributes: &Attributes,
    path: &Path,
    base: &Metadata,
    users: UserRange,
) -> Result<bool, ImportError> {
    let same = u32::from(attributes.mode) == base.mode() & 0o7777
        && users.outward(attributes.uid) == Some(base.uid())
        && users.outward(attributes.gid) == Some(base.gid());
    let xattrs = users.xattrs_inward(read_xattrs(path)?);
    Ok(same && xattrs.as_ref() == Some(&attributes.xattrs))
}

fn same_content(data: &FileData, path: &Path) -> Result<bool, ImportError> {
    let mut old = File::open(path).map_err(io_error("reading", path))?;
    let mut new = data.reader().map_err(io_error("reading", path))?;
    let (mut one, mut other) = (vec![0u8; 64 << 10], vec![0u8; 64 << 10]);
    let mut left = data.len();
    while left > 0 {
        let count = left.min(one.len() as u64) as usize;
        new.read_exact(&mut one[..count])
            .and_then(|()| old.read_exact(&mut other[..count]))
            .map_err(io_error("comparing", path))?;
        if one[..count] != other[..count] {
            return Ok(false);
        }
        left -= count as u64;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dir::{Ownership, read_directory};

    #[test]
    fn what_became_of_directories_is_marked() {
        let host = tempfile::tempdir().unwrap();
        let (base, upper) = (host.path().join("base"), host.path().join("upper"));
        for directory in ["same", "mode", "link", "file", "gone"] {
            fs::create_dir_all(base.join(directory)).unwrap();
        }
        for directory in ["same", "mode", "new"] {
            fs::create_dir_all(upper.join(directory)).unwrap();
            fs::write(upper.join(directory).join("file"), b"new").unwrap();
        }
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        fs::set_permissions(upper.join("mode"), open).unwrap();
        std::os::unix::fs::symlink("mode", upper.join("link")).unwrap();
        fs::write(upper.join("file"), b"file").unwrap();
        let mut tree = read_directory(&upper, Ownership::Keep).unwrap().tree;
        remove_unchanged(&mut tree, &base, UserRange::new(0)).unwrap();
        let marked = |path: &str| {
            let id = tree.lookup(path.as_bytes()).unwrap();
            tree.node(id).attributes.xattrs.contains_key(REPLACES)
        };
        let paths = ["same", "mode", "new", "link", "file", "mode/file"];
        assert_eq!(paths.map(marked), [false, true, false, true, true, false]);
    }

    #[test]
    fn extended_attributes_that_came_or_went_are_changes() {
        use rustix::fs::{XattrFlags, lsetxattr};
        let host = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (base, upper) = (host.path().join("base"), host.path().join("upper"));
        for root in [&base, &upper] {
            for directory in ["came.d", "went.d", "same.d"] {
                fs::create_dir_all(root.join(directory)).unwrap();
            }
            for file in ["came", "went", "same", "other"] {
                fs::write(root.join(file), b"tool").unwrap();
            }
        }
        let set = |root: &Path, path: &str, value: &[u8]| {
            lsetxattr(root.join(path), "user.mark", value, XattrFlags::empty())
        };
        if set(&upper, "came", b"1").is_err() {
            println!("SKIPPED extended_attributes_that_came: not on this file system");
            return;
        }
        set(&upper, "came.d", b"1").unwrap();
        for (path, here) in [("went", b"1"), ("went.d", b"1"), ("other", b"1")] {
            set(&base, path, here).unwrap();
        }
        set(&upper, "other", b"2").unwrap();
        for root in [&base, &upper] {
            set(root, "same", b"1").unwrap();
            set(root, "same.d", b"1").unwrap();
        }
        let mut tree = read_directory(&upper, Ownership::Keep).unwrap().tree;
        assert_eq!(
            remove_unchanged(&mut tree, &base, UserRange::new(0)).unwrap(),
            2
        );
        let left: Vec<_> = tree.entries(ROOT).unwrap().iter().collect();
        let left = left.into_iter().map(|(name, &id)| {
            let marked = tree.node(id).attributes.xattrs.contains_key(REPLACES);
            (String::from_utf8_lossy(name).into_owned(), marked)
        });
        let expected = [
            ("came", false),
            ("came.d", true),
            ("other", false),
            ("went", false),
            ("went.d", true),
        ];
        let expected = expected.map(|(name, marked)| (name.to_owned(), marked));
        assert_eq!(left.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn copies_go_and_changes_stay() {
        let host = tempfile::tempdir().unwrap();
        let (base, upper) = (host.path().join("base"), host.path().join("upper"));
        for root in [&base, &upper] {
            fs::create_dir_all(root.join("etc/empty")).unwrap();
            fs::create_dir_all(root.join("var")).unwrap();
            fs::write(root.join("etc/same"), b"same").unwrap();
            std::os::unix::fs::symlink("to", root.join("etc/link")).unwrap();
        }
        fs::write(base.join("etc/changed"), b"one").unwrap();
        fs::write(upper.join("etc/changed"), b"two").unwrap();
        fs::write(upper.join("etc/new"), b"new").unwrap();
        let mut tree = read_directory(&upper, Ownership::Keep).unwrap().tree;
        let removed = remove_unchanged(&mut tree, &base, UserRange::new(0)).unwrap();
        assert_eq!(removed, 4);
        assert!(tree.lookup(b"etc/changed").is_some());
        assert!(tree.lookup(b"etc/new").is_some());
        for gone in ["etc/same", "etc/link", "etc/empty", "var"] {
            assert!(tree.lookup(gone.as_bytes()).is_none(), "{gone}");
        }
    }
}
