//! A Debian package archive (`.deb`): its control data and its files as a [`Tree`].
//!
//! Owns the `ar` container and the choice of members (the `ar` crate, 0.9, panics at an
//! index beyond its name table and allocates what a header says, so a hostile package
//! would end the build). Refuses to run maintainer scripts:
//! it names them, so that a caller can say that their results are missing.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use forelay_image::tree::{Kind, NodeId, ROOT, Tree, TreeError, split_path};

use crate::dir::Ownership;
use crate::error::{ImportError, archive_error, io_error, tree_error};
use crate::spool::{Compression, Spool, read_up_to};
use crate::tar::read_plain;
use forelay_image::control::{Paragraph, parse_paragraphs};

const HEADER_BYTES: usize = 60;

/// A package archive that was read.
#[derive(Debug)]
pub struct Deb {
    /// The control file's paragraph.
    pub control: Paragraph,
    /// Maintainer scripts it carries (`postinst` and the like), which were not run.
    pub scripts: Vec<String>,
    /// Its files.
    pub tree: Tree,
}

/// Reads the package at `path`; its files are unpacked into `spool`.
pub fn read_deb(path: &Path, spool: &mut Spool) -> Result<Deb, ImportError> {
    let mut file = File::open(path).map_err(io_error("opening", path))?;
    let mut magic = [0; 8];
    let count = read_up_to(&mut file, &mut magic).map_err(io_error("reading", path))?;
    if &magic[..count] != b"!<arch>\n" {
        return Err(archive_error(path, "not a Debian package"));
    }
    let (mut control, mut data) = (None, None);
    while let Some((name, bytes)) = next_member(&mut file, path)? {
        let start = file.stream_position().map_err(io_error("reading", path))?;
        if name.starts_with("control.tar") {
            control = Some(member_tree(&file, bytes, path, spool)?);
        } else if name.starts_with("data.tar") {
            data = Some(member_tree(&file, bytes, path, spool)?);
        }
        let next = start + bytes.next_multiple_of(2);
        file.seek(SeekFrom::Start(next))
            .map_err(io_error("reading", path))?;
    }
    let (Some(control), Some(tree)) = (control, data) else {
        return Err(archive_error(path, "has no control.tar or no data.tar"));
    };
    let text = read_small_file(&control, b"control", path)?;
    let paragraph = parse_paragraphs(&String::from_utf8_lossy(&text))
        .into_iter()
        .next();
    let paragraph = paragraph.filter(|paragraph| paragraph.get("Package").is_some());
    let Some(paragraph) = paragraph else {
        return Err(archive_error(path, "its control file names no package"));
    };
    let scripts = ["preinst", "postinst", "prerm", "postrm", "triggers"]
        .into_iter()
        .filter(|script| control.lookup(script.as_bytes()).is_some())
        .map(str::to_owned)
        .collect();
    Ok(Deb {
        control: paragraph,
        scripts,
        tree,
    })
}

fn next_member(file: &mut File, path: &Path) -> Result<Option<(String, u64)>, ImportError> {
    let mut header = [0; HEADER_BYTES];
    let count = read_up_to(file, &mut header).map_err(io_error("reading", path))?;
    if count == 0 {
        return Ok(None);
    }
    let text = |range: std::ops::Range<usize>| String::from_utf8_lossy(&header[range]).into_owned();
    if count < HEADER_BYTES || &header[58..] != b"`\n" {
        return Err(archive_error(
            path,
            "cut off, or damaged between its members",
        ));
    }
    let name = text(0..16);
    let bytes = text(48..58).trim().parse::<u64>();
    let bytes = bytes.map_err(|_| archive_error(path, "a member has no size"))?;
    Ok(Some((
        name.trim_end().trim_end_matches('/').to_owned(),
        bytes,
    )))
}

fn member_tree(
    file: &File,
    bytes: u64,
    path: &Path,
    spool: &mut Spool,
) -> Result<Tree, ImportError> {
    let mut member = file.take(bytes);
    let mut first = [0; 8];
    let count = read_up_to(&mut member, &mut first).map_err(io_error("reading", path))?;
    let first = &first[..count];
    let mut reader = Compression::detect(first)
        .reader(first.chain(member))
        .map_err(io_error("reading", path))?;
    let (plain, _) = spool.store(&mut reader, path)?;
    Ok(read_plain(&plain, path, spool, Ownership::Keep)?.tree)
}

/// Reads a file of at most 16 MiB out of a tree; missing files are errors.
pub(crate) fn read_small_file(
    tree: &Tree,
    name: &[u8],
    path: &Path,
) -> Result<Vec<u8>, ImportError> {
    let shown = String::from_utf8_lossy(name);
    let Some(data) = tree.file(name) else {
        return Err(archive_error(path, format!("has no file {shown:?}")));
    };
    if data.len() > 16 << 20 {
        return Err(archive_error(path, format!("{shown:?} is too large")));
    }
    data.read().map_err(io_error("reading", path))
}

/// Moves what is in `/bin`, `/sbin` and `/lib*` under `/usr`, as on a merged-usr system,
/// where those are symbolic links; a directory in their place would hide the base's.
/// Returns the names of what was moved.
pub fn merge_usr(tree: &mut Tree, path: &Path) -> Result<Vec<&'static str>, ImportError> {
    let mut moved = Vec::new();
    for name in ["bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
        let Some(from) = tree.lookup(name.as_bytes()) else {
            continue;
        };
        if tree.entries(from).is_none() {
            continue;
        }
        tree.remove(ROOT, name.as_bytes());
        let usr = tree.make_directories(b"usr").map_err(tree_error(path))?;
        let name_bytes = name.as_bytes();
        move_into(tree, usr, &[name_bytes], from).map_err(tree_error(path))?;
        moved.push(name);
    }
    Ok(moved)
}

/// Puts node `from`, which was at the path `names`, into `parent`; two directories are merged,
/// `from` wins otherwise, unless it only leads to what is there or deletes it.
fn move_into(
    tree: &mut Tree,
    parent: NodeId,
    names: &[&[u8]],
    from: NodeId,
) -> Result<(), TreeError> {
    let name = names[names.len() - 1];
    let existing = tree
        .entries(parent)
        .and_then(|entries| entries.get(name))
        .copied();
    let (to, children) = match (existing, tree.entries(from).cloned()) {
        (Some(to), None) if stands_back(tree, to, names, from) => return Ok(()),
        (_, None) => return tree.link(parent, name, from),
        (Some(to), Some(children)) if tree.entries(to).is_some() => (to, children),
        (_, Some(children)) => {
            let mut node = tree.node(from).clone();
            node.kind = Kind::Directory(Default::default());
            (tree.insert(parent, name, node)?, children)
        }
    };
    for (child, id) in children {
        move_into(tree, to, &[names, &[&child[..]]].concat(), id)?;
    }
    Ok(())
}

/// True for a whiteout, and for a link that would take the place of what it stands for:
/// `/bin/tool` that leads to `/usr/bin/tool`.
fn stands_back(tree: &Tree, to: NodeId, names: &[&[u8]], from: NodeId) -> bool {
    let Kind::Symlink(target) = &tree.node(from).kind else {
        return tree.node(from).kind.is_whiteout();
    };
    if !matches!(tree.node(to).kind, Kind::Symlink(_)) {
        return true;
    }
    let mut led: Vec<&[u8]> = match target.first() {
        Some(b'/') => Vec::new(),
        _ => names[..names.len() - 1].to_vec(),
    };
    for part in split_path(target) {
        match part {
            b".." => drop(led.pop()),
            part => led.push(part),
        }
    }
    led.split_first() == Some((&&b"usr"[..], names))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    /// Builds a package with dpkg-deb, the referee for the format.
    fn build(directory: &Path, compression: &str) -> Option<std::path::PathBuf> {
        let root = directory.join("root");
        fs::create_dir_all(root.join("DEBIAN")).unwrap();
        fs::create_dir_all(root.join("lib/x")).unwrap();
        fs::create_dir_all(root.join("usr/lib/y")).unwrap();
        fs::write(root.join("lib/x/file"), b"content").unwrap();
        let control = "Package: tool\nVersion: 1:2-3\nArchitecture: all\nMaintainer: a <a@b>\n\
                       Description: a tool\n that does things\n";
        fs::write(root.join("DEBIAN/control"), control).unwrap();
        let script = root.join("DEBIAN/postinst");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let out = directory.join(format!("{compression}.deb"));
        let made = Command::new("dpkg-deb")
            .args([&format!("-Z{compression}"), "--root-owner-group", "--build"])
            .args([&root, &out])
            .output();
        matches!(&made, Ok(made) if made.status.success()).then_some(out)
    }

    #[test]
    fn packages_of_dpkg_deb_are_read_in_every_compression() {
        let directory = tempfile::tempdir().unwrap();
        for compression in ["xz", "gzip", "zstd", "none"] {
            let Some(path) = build(directory.path(), compression) else {
                eprintln!("SKIPPED packages_of_dpkg_deb ({compression}): no dpkg-deb for it");
                continue;
            };
            let mut spool = Spool::new(directory.path(), 1 << 24).unwrap();
            let mut deb = read_deb(&path, &mut spool).unwrap();
            assert_eq!(deb.control.field("version"), "1:2-3");
            assert_eq!(deb.control.summary(), "a tool");
            assert_eq!(deb.scripts, ["postinst"]);
            let bytes = read_small_file(&deb.tree, b"lib/x/file", &path).unwrap();
            assert_eq!(bytes, b"content");
            merge_usr(&mut deb.tree, &path).unwrap();
            assert!(deb.tree.lookup(b"lib").is_none());
            assert!(deb.tree.lookup(b"usr/lib/x/file").is_some());
            assert!(deb.tree.lookup(b"usr/lib/y").is_some());
        }
    }

    #[test]
    fn links_into_usr_give_way_to_what_they_lead_to() {
        use forelay_image::tree::{Attributes, FileData, Node};
        let mut tree = Tree::new();
        let file = || Kind::File(FileData::Bytes((*b"x").into()));
        let link = |to: &str| Kind::Symlink(to.into());
        for (path, kind) in [
            ("bin/tool", link("/usr/bin/tool")),
            ("usr/bin/tool", file()),
            ("bin/up", link("../usr/bin/up")),
            ("usr/bin/up", file()),
            ("bin/chain", link("../usr/bin/chain")),
            ("usr/bin/chain", link("chain-1")),
            ("bin/back", link("back-1")),
            ("usr/bin/back", link("/bin/back")),
            ("lib/d/real", file()),
            ("usr/lib/d/real", link("/lib/d/real")),
            ("lib/d/l", link("/usr/lib/d/l")),
            ("usr/lib/d/l/file", file()),
            ("sbin/gone", Kind::CharDevice { major: 0, minor: 0 }),
            ("usr/sbin/gone", file()),
        ] {
            let attributes = Attributes::with_mode(0o755);
            let node = Node { attributes, kind };
            tree.insert_path(path.as_bytes(), node).unwrap();
        }
        merge_usr(&mut tree, Path::new("a.tar")).unwrap();
        for path in [
            "bin/tool",
            "bin/up",
            "lib/d/real",
            "lib/d/l/file",
            "sbin/gone",
        ] {
            assert!(
                tree.file(format!("usr/{path}").as_bytes()).is_some(),
                "{path}"
            );
        }
        for (path, expected) in [("usr/bin/chain", "chain-1"), ("usr/bin/back", "back-1")] {
            let kind = &tree.node(tree.lookup(path.as_bytes()).unwrap()).kind;
            let leads = matches!(kind, Kind::Symlink(to) if to == expected.as_bytes());
            assert!(leads, "{path}: {kind:?}");
        }
    }

    #[test]
    fn damaged_packages_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(directory.path(), 1 << 24).unwrap();
        let path = directory.path().join("bad.deb");
        let header = format!("{:<48}{:<10}`\n", "control.tar.xz", 5);
        let members: [&[u8]; 4] = [
            b"",
            b"!<arch>\nshort",
            b"!<arch>\n",
            &[b"!<arch>\n", header.as_bytes(), b"hello "].concat(),
        ];
        for bytes in members {
            fs::write(&path, bytes).unwrap();
            let error = read_deb(&path, &mut spool).unwrap_err();
            assert!(matches!(error, ImportError::Archive { .. }), "{error}");
        }
    }
}
