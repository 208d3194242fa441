//! Trees laid over each other: what composing gives is what overlayfs shows (for entries that
//! are marked as replacing) and what `dpkg -i` leaves in a chroot (for all others).
//!
//! The trees are random: few names, so that they collide, links to directories among them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::Command;

use forelay_image::Digest;
use forelay_image::erofs::merge::{ComposeError, ComposeOptions, Layer, compose};
use forelay_image::erofs::read::{Image, ReadAt};
use forelay_image::erofs::write::write_image;
use forelay_image::erofs::xattr::{OPAQUE, REPLACES};
use forelay_image::tree::{Attributes, FileData, Kind, Node, NodeId, ROOT, Tree};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::dir::{Ownership, read_directory};
use crate::tests::{base, give, missing, sandbox, test_cache};
use crate::unpack::write_directory;
use crate::users::UserRange;

/// What can be seen of a path: kind with content, mode, owner.
type Seen = BTreeMap<String, (String, u16, (u32, u32))>;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// What kinds a random tree has.
#[derive(Clone, Copy)]
struct Wanted {
    whiteouts: bool,
    /// Directory names of the tree's place; absolute links begin with it.
    place: &'static str,
}

fn attributes(random: &mut ChaCha8Rng, modes: &[u16]) -> Attributes {
    let owner = [0, 0, 1000][random.random_range(0..3)];
    Attributes::with_mode(modes[random.random_range(0..modes.len())])
        .owned_by(owner, owner)
        .modified_at(1_700_000_000)
}

fn random_path(random: &mut ChaCha8Rng, longest: usize) -> Vec<&'static str> {
    let parts = random.random_range(1..=longest);
    (0..parts)
        .map(|_| NAMES[random.random_range(0..NAMES.len())])
        .collect()
}

fn random_tree(random: &mut ChaCha8Rng, nodes: usize, wanted: Wanted) -> Tree {
    let mut tree = Tree::new();
    let plain = Attributes::with_mode(0o755).modified_at(1_700_000_000);
    if !wanted.place.is_empty() {
        let kind = Kind::Directory(BTreeMap::new());
        let attributes = plain.clone();
        tree.insert_path(wanted.place.as_bytes(), Node { attributes, kind })
            .unwrap();
    }
    for _ in 0..nodes {
        let path = random_path(random, 3);
        let path = [&[wanted.place][..], &path].concat().join("/");
        if tree.lookup(path.as_bytes()).is_some() {
            continue;
        }
        let files = [0o644, 0o600, 0o4755];
        let directories = [0o755, 0o700, 0o1777, 0o2775];
        let (attributes, kind) = match random.random_range(0..10) {
            0..=3 => {
                let bytes = [random.random_range(b'0'..=b'9'); 5];
                (
                    attributes(random, &files),
                    Kind::File(FileData::Bytes(bytes.as_slice().into())),
                )
            }
            4..=6 => (
                attributes(random, &directories),
                Kind::Directory(BTreeMap::new()),
            ),
            7 if wanted.whiteouts => (
                Attributes::with_mode(0),
                Kind::CharDevice { major: 0, minor: 0 },
            ),
            _ => {
                let to = random_path(random, 2).join("/");
                let place = wanted.place.trim_end_matches('/');
                let separator = if place.is_empty() { "" } else { "/" };
                let to = format!("/{place}{separator}{to}");
                // Of a link to where the one before leads dpkg makes nothing.
                if to.trim_start_matches('/') == path {
                    continue;
                }
                (
                    Attributes::with_mode(0o777).modified_at(1),
                    Kind::Symlink(to.into_bytes()),
                )
            }
        };
        // A path through a file is refused; that is fine here.
        let _ = tree.insert_path(path.as_bytes(), Node { attributes, kind });
    }
    // Directories on the way are as the host would make them.
    for index in 0..tree.len() {
        let attributes = &mut tree.node_mut(NodeId(index as u32)).attributes;
        if attributes.mtime_s == 0 {
            attributes.mtime_s = 1_700_000_000;
        }
    }
    tree
}

fn seen(tree: &Tree, place: &str) -> Seen {
    let mut seen = Seen::new();
    let start = tree.lookup(place.as_bytes()).unwrap_or(ROOT);
    let mut pending = vec![(String::new(), start)];
    while let Some((path, id)) = pending.pop() {
        let node = tree.node(id);
        let kind = match &node.kind {
            Kind::File(data) => format!("file {:?}", data.read().unwrap()),
            Kind::Directory(entries) => {
                for (name, &child) in entries {
                    let name = String::from_utf8_lossy(name);
                    pending.push((format!("{path}/{name}"), child));
                }
                "directory".to_owned()
            }
            Kind::Symlink(to) => format!("link to {}", String::from_utf8_lossy(to)),
            other => format!("{other:?}"),
        };
        let Attributes { mode, uid, gid, .. } = node.attributes;
        seen.insert(path, (kind, mode, (uid, gid)));
    }
    seen
}

/// What composing these trees gives, or where it is refused.
pub(crate) fn composed(trees: &[Tree]) -> Result<Tree, String> {
    let images: Vec<_> = trees
        .iter()
        .map(|tree| {
            let mut out = Cursor::new(Vec::new());
            let written = write_image(tree, &mut out).unwrap();
            (out.into_inner(), written)
        })
        .collect();
    let layers: Vec<Layer<'_>> = images
        .iter()
        .map(|(bytes, written)| Layer {
            image: written.image.digest,
            image_bytes: written.image.bytes,
            metadata: &bytes[..written.image.metadata_bytes as usize],
            chunks: Some(&written.chunks),
            bundle: None,
        })
        .collect();
    let composed = match compose(&layers, &Tree::new(), ComposeOptions::default()) {
        Err(ComposeError::OverDirectory { path, .. }) => return Err(path),
        other => other.unwrap(),
    };
    let sources: Vec<(Digest, &dyn ReadAt)> = images
        .iter()
        .map(|(bytes, written)| (written.image.digest, bytes as &dyn ReadAt))
        .collect();
    let image = Image::open_multi(&composed.map_image, &sources).unwrap();
    Ok(image.to_tree(1 << 20).unwrap())
}

fn assert_same(found: &Seen, expected: &Seen, case: u64) {
    let differing = expected
        .iter()
        .filter(|(path, what)| found.get(*path) != Some(what));
    let differing: Vec<_> = differing
        .map(|(path, what)| (path, what, found.get(path)))
        .collect();
    let further: Vec<_> = found
        .keys()
        .filter(|path| !expected.contains_key(*path))
        .collect();
    assert!(
        differing.is_empty() && further.is_empty(),
        "case {case}: path, referee, composed: {differing:#?}; only composed: {further:?}"
    );
}

#[test]
fn privileged_marked_trees_are_laid_as_overlayfs_lays_them() {
    if let Some(why) = missing() {
        println!("SKIPPED privileged_marked_trees_are_laid_as_overlayfs_lays_them: {why}");
        return;
    }
    let mut kinds = [0; 2];
    for case in 0..48 {
        let mut random = ChaCha8Rng::seed_from_u64(case);
        let whiteouts = Wanted {
            whiteouts: true,
            place: "",
        };
        let mut trees = vec![random_tree(
            &mut random,
            14,
            Wanted {
                whiteouts: false,
                ..whiteouts
            },
        )];
        for _ in 0..random.random_range(1..=2) {
            let mut tree = random_tree(&mut random, 10, whiteouts);
            sensible_whiteouts(&mut tree, &composed(&marked(&trees)).unwrap());
            for index in 1..tree.len() {
                let id = NodeId(index as u32);
                kinds[1] += usize::from(tree.node(id).kind.is_whiteout());
                if has_only_files(&tree, id) && random.random_range(0..3) == 0 {
                    let xattrs = &mut tree.node_mut(id).attributes.xattrs;
                    xattrs.insert(OPAQUE.to_vec(), b"y".to_vec());
                    kinds[0] += 1;
                }
            }
            trees.push(tree);
        }
        let host = tempfile::tempdir_in(test_cache()).unwrap();
        let directories: Vec<PathBuf> = trees
            .iter()
            .enumerate()
            .map(|(number, tree)| {
                let directory = host.path().join(number.to_string());
                fs::create_dir(&directory).unwrap();
                write_directory(tree, &directory, UserRange::new(0)).unwrap();
                directory
            })
            .collect();
        let expected = seen(&overlay(&directories, &host.path().join("mnt")), "");
        let found = composed(&marked(&trees)).expect("nothing that is marked is refused");
        assert_same(&seen(&found, ""), &expected, case);
    }
    assert!(kinds.iter().all(|count| *count > 10), "{kinds:?}");
}

/// These trees with all but the lowest marked as replacing what lies below.
fn marked(trees: &[Tree]) -> Vec<Tree> {
    let mut trees = trees.to_vec();
    for tree in &mut trees[1..] {
        for index in 0..tree.len() {
            let node = tree.node_mut(NodeId(index as u32));
            if !node.kind.is_whiteout() {
                let xattrs = &mut node.attributes.xattrs;
                xattrs.insert(REPLACES.to_vec(), b"y".to_vec());
            }
        }
    }
    trees
}

/// True for a directory without directories and whiteouts.
fn has_only_files(tree: &Tree, id: NodeId) -> bool {
    let is_file = |child: &NodeId| {
        let kind = &tree.node(*child).kind;
        !kind.is_whiteout() && !matches!(kind, Kind::Directory(_))
    };
    tree.entries(id)
        .is_some_and(|entries| entries.values().all(is_file))
}

/// Leaves whiteouts only where there is something to remove: overlayfs shows those that are
/// in a directory of their layer alone.
fn sensible_whiteouts(tree: &mut Tree, below: &Tree) {
    let mut pending = vec![(String::new(), ROOT)];
    while let Some((path, id)) = pending.pop() {
        for (name, child) in tree.entries(id).cloned().unwrap_or_default() {
            let path = format!("{path}/{}", String::from_utf8_lossy(&name));
            if tree.node(child).kind.is_whiteout() && below.lookup(path.as_bytes()).is_none() {
                tree.remove(id, &name);
            } else {
                pending.push((path, child));
            }
        }
    }
}

/// What overlayfs shows of these directories, the first lowest.
fn overlay(directories: &[PathBuf], mount: &Path) -> Tree {
    fs::create_dir(mount).unwrap();
    let layers: Vec<String> = directories
        .iter()
        .rev()
        .map(|one| one.display().to_string())
        .collect();
    let options = format!("lowerdir={}", layers.join(":"));
    let mounted = Command::new("mount")
        .args(["-t", "overlay", "-o", &options, "overlay"])
        .arg(mount)
        .status();
    assert!(mounted.unwrap().success());
    let shown = read_directory(mount, Ownership::Keep);
    // Content is read while the mount is there.
    let shown = shown.map(|files| in_memory(files.tree));
    assert!(
        Command::new("umount")
            .arg(mount)
            .status()
            .unwrap()
            .success()
    );
    shown.unwrap()
}

fn in_memory(mut tree: Tree) -> Tree {
    for index in 0..tree.len() {
        if let Kind::File(data) = &mut tree.node_mut(NodeId(index as u32)).kind {
            *data = FileData::Bytes(data.read().unwrap().into());
        }
    }
    tree
}

const CASES: u64 = 40;

#[test]
fn privileged_trees_are_laid_as_dpkg_lays_packages() {
    if let Some(why) = missing() {
        println!("SKIPPED privileged_trees_are_laid_as_dpkg_lays_packages: {why}");
        return;
    }
    let scratch = tempfile::tempdir_in(test_cache()).unwrap();
    let sandbox = sandbox(scratch.path(), &[&base().directory]);
    let (packages, mut script) = (
        sandbox.upper().join("packages"),
        String::from("cd /packages\n"),
    );
    fs::create_dir_all(&packages).unwrap();
    let mut cases = Vec::new();
    for case in 0..CASES {
        let mut random = ChaCha8Rng::seed_from_u64(1000 + case);
        let place: &'static str = format!("case{case}").leak();
        let wanted = Wanted {
            whiteouts: false,
            place,
        };
        let mut trees = vec![random_tree(&mut random, 16, wanted)];
        for _ in 0..random.random_range(1..=3) {
            trees.push(random_tree(&mut random, 7, wanted));
        }
        for (number, tree) in trees.iter().enumerate() {
            let name = format!("{place}-{number}");
            build_package(tree, &name, &packages);
            let _ = writeln!(
                script,
                "dpkg --force-overwrite --force-unsafe-io -i {name}.deb >>log 2>&1 \
                 && echo {name} ok || {{ echo {name} refused; dpkg --force-all -P {name} >>log 2>&1; }}"
            );
        }
        cases.push((place, trees));
    }
    give(&packages);
    let said = sandbox.run(&script).unwrap();
    let tree = sandbox.changes().unwrap();
    let mut counts = [0; 3];
    for (case, (place, trees)) in cases.into_iter().enumerate() {
        let accepted = |number: usize| said.contains(&format!("{place}-{number} ok\n"));
        let Some((laid, refused)) = laid_as_accepted(trees, place, accepted) else {
            counts[0] += 1;
            continue;
        };
        counts[1] += laid.len();
        counts[2] += refused;
        let found = composed(&laid).unwrap();
        assert_same(&seen(&found, place), &seen(&tree, place), case as u64);
    }
    // Cases that dpkg does not see through, packages laid, packages refused.
    assert!(
        counts[0] < 5 && counts[1] > 60 && counts[2] > 5,
        "{counts:?}"
    );
}

/// The packages that composing accepts, as dpkg does, and how many both refuse. `None` if a
/// file comes to a directory by way of a link: dpkg knows the path's owner by its name, and
/// removes the directory with all that other packages have in it.
fn laid_as_accepted(
    trees: Vec<Tree>,
    place: &str,
    accepted: impl Fn(usize) -> bool,
) -> Option<(Vec<Tree>, usize)> {
    let mut laid: Vec<Tree> = Vec::new();
    let mut refused = 0;
    for (number, tree) in trees.into_iter().enumerate() {
        laid.push(tree);
        match (composed(&laid), accepted(number)) {
            (Ok(_), true) => {}
            (Err(_), false) => {
                laid.pop();
                refused += 1;
            }
            (Err(path), true) if laid[number - refused].lookup(path.as_bytes()).is_none() => {
                return None;
            }
            (found, _) => panic!(
                "{place}-{number}: composed {:?}, {:#?}",
                found.err(),
                laid.iter()
                    .map(|tree| seen(tree, place))
                    .collect::<Vec<_>>()
            ),
        }
    }
    Some((laid, refused))
}

fn build_package(tree: &Tree, name: &str, to: &Path) {
    let root = to.join(name);
    fs::create_dir(&root).unwrap();
    write_directory(tree, &root, UserRange::new(0)).unwrap();
    fs::create_dir(root.join("DEBIAN")).unwrap();
    let control = format!(
        "Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: a tree\n"
    );
    fs::write(root.join("DEBIAN/control"), control).unwrap();
    let made = Command::new("dpkg-deb")
        .args(["-Znone", "--build"])
        .arg(&root)
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    fs::remove_dir_all(&root).unwrap();
}
