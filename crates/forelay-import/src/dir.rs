//! A host directory as a [`Tree`].
//!
//! Owns the walk: entries in byte order of their names, hard links by (device, inode),
//! extended attributes, device nodes. Refuses to follow symbolic links, also those that appear
//! while it walks, to enter other file systems (a `/proc` that is mounted there) and to read
//! content: files stay on the host until the image is written, and are read only if they are
//! what they were.
//!
//! Invariant: the result depends only on the directory's content, not on its path, its
//! inode numbers or the order in which the host lists names.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use forelay_image::tree::{Attributes, FileData, Kind, Node, NodeId, ROOT, Tree};
use forelay_image::watched::WatchedFile;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::draft::Files;
use crate::error::{ImportError, io_error, tree_error};

/// Who owns the files of the imported tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ownership {
    /// As on the host or in the archive.
    #[default]
    Keep,
    /// Everything belongs to this user and group.
    Fixed {
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
}

impl Ownership {
    /// The owner and group to record for a file of `uid` and `gid`.
    pub fn apply(self, uid: u32, gid: u32) -> (u32, u32) {
        match self {
            Self::Keep => (uid, gid),
            Self::Fixed { uid, gid } => (uid, gid),
        }
    }
}

/// Reads the directory `root` into a tree. `root` itself may be a link.
pub fn read_directory(root: &Path, ownership: Ownership) -> Result<Files, ImportError> {
    let metadata = fs::metadata(root).map_err(io_error("reading", root))?;
    if !metadata.is_dir() {
        let problem = "not a directory";
        return Err(crate::error::archive_error(root, problem));
    }
    let root = &root.canonicalize().map_err(io_error("reading", root))?;
    let mut walk = Walk {
        tree: Tree::new(),
        ownership,
        links: BTreeMap::new(),
        root: open_directory(root)?,
        file_system: metadata.dev(),
        not_entered: Vec::new(),
    };
    walk.tree.node_mut(ROOT).attributes = walk.attributes(root, &metadata)?;
    let mut pending = vec![(root.to_owned(), ROOT)];
    while let Some((path, id)) = pending.pop() {
        walk.directory(root, &path, id, &mut pending)?;
    }
    let notes = walk.not_entered.iter().map(|path| {
        let path = path.strip_prefix(root).unwrap_or(path);
        format!("left out: the file system mounted on /{}", path.display())
    });
    Ok(Files {
        notes: notes.collect(),
        tree: walk.tree,
    })
}

struct Walk {
    tree: Tree,
    ownership: Ownership,
    links: BTreeMap<(u64, u64), NodeId>,
    root: OwnedFd,
    file_system: u64,
    /// Where other file systems are mounted.
    not_entered: Vec<PathBuf>,
}

impl Walk {
    fn directory(
        &mut self,
        root: &Path,
        path: &Path,
        id: NodeId,
        pending: &mut Vec<(PathBuf, NodeId)>,
    ) -> Result<(), ImportError> {
        // The directory itself, whatever takes its place from now on.
        let directory = self.open_below(root, path)?;
        let opened = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
        let mut names = Vec::new();
        for entry in fs::read_dir(&opened).map_err(io_error("listing", path))? {
            names.push(entry.map_err(io_error("listing", path))?.file_name());
        }
        names.sort_unstable();
        // Last in first out: reverse, so that directories are walked in name order.
        let mut directories = Vec::new();
        for name in names {
            let child = EntryPath {
                path: path.join(&name),
                opened: opened.join(&name),
            };
            let metadata = fs::symlink_metadata(&child.opened);
            let metadata = metadata.map_err(io_error("reading", &child.path))?;
            let elsewhere = self.is_elsewhere(&child.opened, &metadata);
            if elsewhere {
                self.not_entered.push(child.path.clone());
                if !metadata.is_dir() {
                    continue;
                }
            }
            if let Some(directory) = self.entry(id, &name, &child, &metadata)?
                && !elsewhere
            {
                directories.push((child.path, directory));
            }
        }
        pending.extend(directories.into_iter().rev());
        Ok(())
    }

    /// Opens a directory of the walk, if no link has taken its place or that of one above it.
    fn open_below(&self, root: &Path, path: &Path) -> Result<OwnedFd, ImportError> {
        let below = path.strip_prefix(root).unwrap_or(path);
        let below = match below.as_os_str().is_empty() {
            true => Path::new("."),
            false => below,
        };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let opened = rustix::fs::openat2(&self.root, below, DIRECTORY, Mode::empty(), resolve);
        opened.map_err(|error| io_error("listing", path)(error.into()))
    }

    /// True for where another file system is mounted. (Files of an overlay have the device
    /// numbers of its layers.)
    fn is_elsewhere(&self, path: &Path, metadata: &fs::Metadata) -> bool {
        metadata.dev() != self.file_system && (metadata.is_dir() || is_mount_point(path))
    }

    /// Adds one entry; returns its id if it is a directory to be walked.
    fn entry(
        &mut self,
        parent: NodeId,
        name: &OsStr,
        place: &EntryPath,
        metadata: &fs::Metadata,
    ) -> Result<Option<NodeId>, ImportError> {
        let path = &place.path;
        let linked = !metadata.is_dir() && metadata.nlink() > 1;
        let key = (metadata.dev(), metadata.ino());
        if linked && let Some(&target) = self.links.get(&key) {
            let link = self.tree.link(parent, name.as_bytes(), target);
            return link.map(|()| None).map_err(tree_error(path));
        }
        let node = Node {
            attributes: self.attributes(&place.opened, metadata)?,
            kind: kind_of(place, metadata)?,
        };
        let id = self
            .tree
            .insert(parent, name.as_bytes(), node)
            .map_err(tree_error(path))?;
        if linked {
            self.links.insert(key, id);
        }
        Ok(metadata.is_dir().then_some(id))
    }

    fn attributes(&self, path: &Path, metadata: &fs::Metadata) -> Result<Attributes, ImportError> {
        let (uid, gid) = self.ownership.apply(metadata.uid(), metadata.gid());
        Ok(Attributes {
            mode: (metadata.mode() & 0o7777) as u16,
            uid,
            gid,
            mtime_s: metadata.mtime(),
            mtime_ns: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
            xattrs: read_xattrs(path)?,
        })
    }
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC);

fn open_directory(path: &Path) -> Result<OwnedFd, ImportError> {
    let opened = rustix::fs::open(path, DIRECTORY, Mode::empty());
    opened.map_err(|error| io_error("listing", path)(error.into()))
}

/// Where an entry is.
struct EntryPath {
    /// On the host.
    path: PathBuf,
    /// In the directory that is open, through which it is looked at.
    opened: PathBuf,
}

fn is_mount_point(path: &Path) -> bool {
    let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW | rustix::fs::AtFlags::NO_AUTOMOUNT;
    let asked = rustix::fs::StatxFlags::BASIC_STATS;
    let found = rustix::fs::statx(rustix::fs::CWD, path, flags, asked);
    found.is_ok_and(|found| {
        let attributes = found.stx_attributes & found.stx_attributes_mask;
        attributes.contains(rustix::fs::StatxAttributes::MOUNT_ROOT)
    })
}

fn kind_of(place: &EntryPath, metadata: &fs::Metadata) -> Result<Kind, ImportError> {
    let path = &place.path;
    let file_type = metadata.file_type();
    let rdev = metadata.rdev();
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    Ok(if file_type.is_dir() {
        Kind::Directory(BTreeMap::new())
    } else if file_type.is_symlink() {
        let target = fs::read_link(&place.opened).map_err(io_error("reading", path))?;
        Kind::Symlink(target.into_os_string().into_vec())
    } else if file_type.is_file() {
        Kind::File(match metadata.len() {
            0 => FileData::Bytes(Vec::new().into()),
            _ => FileData::Watched(WatchedFile::new(path.clone(), metadata)),
        })
    } else if file_type.is_char_device() {
        Kind::CharDevice { major, minor }
    } else if file_type.is_block_device() {
        Kind::BlockDevice { major, minor }
    } else if file_type.is_fifo() {
        Kind::Fifo
    } else {
        Kind::Socket
    })
}

/// Extended attributes that an image can hold and that mean something in one. overlayfs's
/// own bookkeeping is left out, except the mark of an opaque directory; so are the labels
/// of the host's security modules, which say nothing about another machine, names of other
/// systems (`com.apple.provenance`), and what is said to Forelay itself.
pub(crate) fn kept_xattr(name: &[u8]) -> bool {
    match name {
        b"trusted.overlay.opaque" | b"system.posix_acl_access" | b"system.posix_acl_default" => {
            true
        }
        b"security.selinux" | b"security.SMACK64" => false,
        _ if name.starts_with(b"trusted.overlay.") || name.starts_with(b"trusted.forelay.") => {
            false
        }
        _ => [&b"user."[..], b"trusted.", b"security."]
            .iter()
            .any(|namespace| name.starts_with(namespace) && name.len() > namespace.len()),
    }
}

/// The extended attributes of what is at `path`, not following a link, that are kept.
pub(crate) fn read_xattrs(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, ImportError> {
    let mut xattrs = BTreeMap::new();
    let mut names = vec![0u8; 256];
    let used = loop {
        match rustix::fs::llistxattr(path, &mut names[..]) {
            Ok(used) => break used,
            Err(rustix::io::Errno::RANGE) => names.resize(names.len() * 4, 0),
            Err(rustix::io::Errno::OPNOTSUPP) => return Ok(xattrs),
            Err(error) => return Err(io_error("reading attributes of", path)(error.into())),
        }
    };
    for name in names[..used].split(|&byte| byte == 0) {
        if name.is_empty() || !kept_xattr(name) {
            continue;
        }
        let mut value = vec![0u8; 256];
        loop {
            match rustix::fs::lgetxattr(path, name, &mut value[..]) {
                Ok(used) => {
                    value.truncate(used);
                    xattrs.insert(name.to_vec(), value);
                    break;
                }
                Err(rustix::io::Errno::RANGE) => value.resize(value.len() * 4, 0),
                Err(rustix::io::Errno::NODATA) => break,
                Err(error) => return Err(io_error("reading attributes of", path)(error.into())),
            }
        }
    }
    Ok(xattrs)
}

/// The last part of `path`, as a name for a component built from it.
pub(crate) fn name_from_path(path: &Path) -> String {
    let name = path.file_name().map(OsString::from).unwrap_or_default();
    let name = name.to_string_lossy();
    let name = name.split(".tar").next().unwrap_or(&name);
    name.trim_end_matches(".tgz")
        .trim_end_matches(".deb")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use forelay_image::erofs::write::{SourceError, WriteError, write_image};

    use super::*;

    #[test]
    fn a_directory_is_read_with_links_and_sizes() {
        let host = tempfile::tempdir().unwrap();
        let root = host.path();
        fs::create_dir(root.join("b")).unwrap();
        fs::write(root.join("b/file"), b"hello").unwrap();
        fs::write(root.join("b/empty"), b"").unwrap();
        fs::hard_link(root.join("b/file"), root.join("a-link")).unwrap();
        symlink("../etc/passwd", root.join("soft")).unwrap();
        let owner = Ownership::Fixed { uid: 7, gid: 8 };
        let tree = read_directory(root, owner).unwrap().tree;
        let file = tree.lookup(b"b/file").unwrap();
        assert_eq!(tree.lookup(b"a-link"), Some(file));
        assert_eq!(tree.node(file).attributes.uid, 7);
        assert_eq!(tree.node(file).attributes.gid, 8);
        assert!(matches!(&tree.node(file).kind, Kind::File(data) if data.len() == 5));
        let soft = tree.lookup(b"soft").unwrap();
        assert!(matches!(&tree.node(soft).kind, Kind::Symlink(to) if to == b"../etc/passwd"));
    }

    /// Mounts need a mount namespace of their own, which a thread can have.
    #[test]
    fn privileged_other_file_systems_are_not_entered() {
        let host = tempfile::tempdir().unwrap();
        let root = host.path().join("root");
        for directory in ["proc", "mnt", "same"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::write(root.join("file"), b"below").unwrap();
        fs::write(root.join("mnt/hidden"), b"").unwrap();
        let script = "set -e; mount -t proc proc \"$1/proc\"; mount -t tmpfs tmpfs \"$1/mnt\"; \
                      touch \"$1/mnt/x\"; mount --bind \"$1/mnt/x\" \"$1/file\"; \
                      mount --bind \"$1\" \"$1/same\"; exec \"$2\" --exact --nocapture \
                      dir::tests::reads_what_is_mounted";
        let program = std::env::current_exe().unwrap();
        let ran = std::process::Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                script,
                "sh",
            ])
            .args([&root, &program])
            .env("FORELAY_TEST_MOUNTED", &root)
            .output();
        match ran {
            Ok(ran) if ran.status.success() => {
                let said = String::from_utf8_lossy(&ran.stdout);
                assert!(said.contains("looked at what is mounted"), "{said}");
            }
            Ok(ran) if rustix::process::geteuid().is_root() => {
                panic!(
                    "{}{}",
                    String::from_utf8_lossy(&ran.stdout),
                    String::from_utf8_lossy(&ran.stderr)
                )
            }
            _ => println!("SKIPPED privileged_other_file_systems_are_not_entered: no mounts here"),
        }
    }

    /// The other half, inside the namespace.
    #[test]
    fn reads_what_is_mounted() {
        let Some(root) = std::env::var_os("FORELAY_TEST_MOUNTED") else {
            return;
        };
        let link = Path::new(&root).with_file_name("link");
        symlink(&root, &link).unwrap();
        let files = read_directory(&link, Ownership::Keep).unwrap();
        let names = |path: &[u8]| {
            let id = files.tree.lookup(path)?;
            let entries = files.tree.entries(id)?.keys();
            Some(
                entries
                    .map(|name| String::from_utf8_lossy(name).into_owned())
                    .collect(),
            )
        };
        assert_eq!(names(b"proc"), Some(Vec::<String>::new()));
        assert_eq!(names(b"mnt"), Some(vec![]));
        // A bind mount of the same file system is a directory like any other.
        assert_eq!(names(b"same").map(|names| names.len()), Some(4));
        assert!(files.tree.lookup(b"file").is_none());
        let mut notes = files.notes.clone();
        notes.sort();
        let mounted = ["file", "mnt", "proc"];
        let expected = mounted.map(|path| format!("left out: the file system mounted on /{path}"));
        assert_eq!(notes, expected);
        println!("looked at what is mounted");
    }

    #[test]
    fn what_takes_the_place_of_a_file_is_not_read() {
        let host = tempfile::tempdir().unwrap();
        let (root, secret) = (host.path().join("root"), host.path().join("secret"));
        fs::create_dir(&secret).unwrap();
        fs::write(secret.join("file"), b"root's own").unwrap();
        let given = || {
            let _ = fs::remove_dir_all(&root);
            fs::create_dir_all(root.join("dir")).unwrap();
            fs::write(root.join("dir/file"), b"the user's").unwrap();
            read_directory(&root, Ownership::Keep).unwrap().tree
        };
        let written = |tree: &Tree| {
            let mut out = std::io::Cursor::new(Vec::new());
            write_image(tree, &mut out).map(drop)
        };
        written(&given()).unwrap();
        let spoils: [fn(&Path, &Path); 4] = [
            |root, secret| {
                fs::remove_file(root.join("dir/file")).unwrap();
                symlink(secret.join("file"), root.join("dir/file")).unwrap();
            },
            |root, secret| {
                fs::rename(root.join("dir"), root.join("moved")).unwrap();
                symlink(secret, root.join("dir")).unwrap();
            },
            |root, secret| {
                fs::remove_file(root.join("dir/file")).unwrap();
                fs::hard_link(secret.join("file"), root.join("dir/file")).unwrap();
            },
            |root, _| fs::remove_file(root.join("dir/file")).unwrap(),
        ];
        for spoil in spoils {
            let tree = given();
            spoil(&root, &secret);
            let error = written(&tree).unwrap_err();
            let changed = matches!(
                &error,
                WriteError::Source {
                    source: SourceError::Changed { .. },
                    ..
                }
            );
            assert!(changed, "{error}");
        }
    }

    #[test]
    fn a_file_is_not_a_directory() {
        let host = tempfile::NamedTempFile::new().unwrap();
        let error = read_directory(host.path(), Ownership::Keep).unwrap_err();
        assert!(error.to_string().contains("not a directory"), "{error}");
    }

    #[test]
    fn overlay_bookkeeping_is_left_out_but_opaque_stays() {
        assert!(kept_xattr(b"security.capability"));
        assert!(kept_xattr(b"user.note"));
        assert!(kept_xattr(b"trusted.overlay.opaque"));
        assert!(!kept_xattr(b"trusted.overlay.origin"));
    }
}
