//! Composing: compared with the plain model, and rule by rule.

use forelay_image::Digest;
use forelay_image::erofs::merge::{
    ComposeError, ComposeOptions, Composed, FileConflict, MapLayout, compose,
};
use forelay_image::erofs::read::{Image, ReadAt, ReadError};
use forelay_image::tree::{Attributes, Kind, Node, Tree};
use proptest::prelude::*;

use crate::compose::{Built, build, compose_all, file, tree};
use crate::images::{check_links, one_of_everything};
use crate::model::{self, Model};

fn components(built: &[&Built]) -> Vec<(Digest, Vec<u8>)> {
    let pairs = built.iter();
    pairs
        .map(|built| (built.written.image.digest, built.bytes.clone()))
        .collect()
}

/// Opens a composed image with its components and hands it to `check`.
fn with_image<R>(composed: &Composed, built: &[&Built], check: impl FnOnce(&Image<'_>) -> R) -> R {
    let components = components(built);
    let sources: Vec<(Digest, &dyn ReadAt)> = components
        .iter()
        .map(|(digest, bytes)| (*digest, bytes as &dyn ReadAt))
        .collect();
    check(&Image::open_multi(&composed.map_image, &sources).unwrap())
}

/// The flat disk: the map image, then each component at its place.
pub fn flat_disk(composed: &Composed, built: &[&Built]) -> Vec<u8> {
    let mut disk = composed.map_image.clone();
    for device in &composed.devices {
        let component = built
            .iter()
            .find(|built| built.written.image.digest == device.image);
        disk.resize(device.mapped_block as usize * 4096, 0);
        disk.extend(&component.unwrap().bytes);
    }
    disk
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn composed_layers_equal_the_model(
        base in model::layer(25),
        trees in prop::collection::vec(model::layer(10), 0..4),
        own in model::layer(5),
    ) {
        let mut laid = vec![&base];
        for tree in &trees {
            laid.push(tree);
            if Model::stack(laid.iter().copied().chain([&Tree::new()])).is_err() {
                check_refused(&laid, &Tree::new())?;
                laid.pop();
            }
        }
        match Model::stack(laid.iter().copied().chain([&own])) {
            Ok(expected) => check_composed(&laid, &own, &expected.describe())?,
            Err(_) => check_refused(&laid, &own)?,
        }
    }
}

fn check_refused(trees: &[&Tree], own: &Tree) -> Result<(), TestCaseError> {
    let built: Vec<Built> = trees.iter().map(|tree| build(tree)).collect();
    let layers: Vec<_> = built.iter().map(Built::layer).collect();
    let composed = compose(&layers, own, ComposeOptions::default());
    let refused = matches!(composed, Err(ComposeError::OverDirectory { .. }));
    prop_assert!(refused, "composed: {:?}", composed.map(|one| one.digest));
    Ok(())
}

fn check_composed(
    trees: &[&Tree],
    own: &Tree,
    expected: &model::Description,
) -> Result<(), TestCaseError> {
    let built: Vec<Built> = trees.iter().map(|tree| build(tree)).collect();
    let built: Vec<&Built> = built.iter().collect();
    let composed = compose_all(&built, own, MapLayout::Devices);
    let read = with_image(&composed, &built, |image| {
        check_links(image);
        image.to_tree(1 << 30).unwrap()
    });
    prop_assert_eq!(&model::describe(&read), expected);
    let flat = compose_all(&built, own, MapLayout::Flat);
    let disk = flat_disk(&flat, &built);
    let read = Image::open(&disk).unwrap().to_tree(1 << 30).unwrap();
    prop_assert_eq!(&model::describe(&read), expected);
    let again = compose_all(&built, own, MapLayout::Devices);
    prop_assert_eq!(again.digest, composed.digest);
    prop_assert_eq!(again.map_image, composed.map_image);
    Ok(())
}

fn with_attributes(mode: u16, xattr: Option<(&str, &str)>, kind: Kind) -> Node {
    let mut attributes = Attributes::with_mode(mode);
    attributes.mtime_s = 1;
    let xattr = xattr.into_iter();
    attributes
        .xattrs
        .extend(xattr.map(|(name, value)| (name.into(), value.into())));
    Node { attributes, kind }
}

fn paths(composed: &Composed, built: &[&Built]) -> Vec<String> {
    with_image(composed, built, |image| {
        let mut paths = Vec::new();
        let walked = image.walk(|path, _| {
            paths.push(String::from_utf8_lossy(path).into_owned());
            Ok::<(), ReadError>(())
        });
        walked.unwrap();
        paths
    })
}

#[test]
fn whiteouts_and_opaque_directories_hide_what_lies_below() {
    let base = tree(&[("/a/1", b"1"), ("/a/2", b"2"), ("/b/1", b"1"), ("/c", b"c")]);
    let mut top = tree(&[("/b/2", b"2")]);
    let whiteout = Kind::CharDevice { major: 0, minor: 0 };
    for path in [&b"/a/1"[..], b"/c", b"/never-there"] {
        let node = with_attributes(0, None, whiteout.clone());
        top.insert_path(path, node).unwrap();
    }
    let b = top.lookup(b"/b").unwrap();
    let opaque = (b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
    top.node_mut(b).attributes.xattrs.extend([opaque]);
    let (base, top) = (build(&base), build(&top));
    let composed = compose_all(&[&base, &top], &Tree::new(), MapLayout::Devices);
    assert_eq!(
        paths(&composed, &[&base, &top]),
        ["", "/a", "/a/2", "/b", "/b/2"]
    );
    assert!(composed.conflicts.is_empty());
}

#[test]
fn a_directory_that_is_only_implied_keeps_the_attributes_below() {
    let mut base = Tree::new();
    let sticky = with_attributes(0o1777, None, Kind::Directory(Default::default()));
    base.insert_path(b"/tmp", sticky).unwrap();
    let base = build(&base);
    let own = tree(&[("/tmp/file", b"x")]);
    let composed = compose_all(&[&base], &own, MapLayout::Devices);
    with_image(&composed, &[&base], |image| {
        let tmp = image.lookup(b"/tmp").unwrap().unwrap();
        assert_eq!(tmp.record.mode, 0o1777);
    });
}

fn link(to: &str) -> Node {
    with_attributes(0o777, None, Kind::Symlink(to.into()))
}

fn with_links(files: &[(&str, &[u8])], links: &[(&str, &str)]) -> Tree {
    let mut tree = tree(files);
    for (path, to) in links {
        tree.insert_path(path.as_bytes(), link(to)).unwrap();
    }
    tree
}

#[test]
fn directories_go_through_links_to_directories() {
    let base = with_links(
        &[
            ("/usr/bin/sh", b"sh"),
            ("/usr/lib/x/1", b""),
            ("/run/0", b""),
        ],
        &[
            ("/bin", "usr/bin"),
            ("/lib", "/usr/lib"),
            ("/lib64", "lib"),
            ("/var/run", "/run"),
            ("/var/lock", "/run/lock"),
            ("/usr/lib/y", "x"),
            ("/up/here", "../usr"),
            ("/loop", "loop"),
            ("/file", "usr/bin/sh"),
        ],
    );
    let top = tree(&[
        ("/bin/tool", b"1"),
        ("/lib64/y/2", b"2"),
        ("/var/run/pid", b"3"),
        ("/var/lock/l", b"hidden in every VM"),
        ("/up/here/bin/up", b"4"),
        ("/loop/5", b"5"),
        ("/file/6", b"6"),
    ]);
    let (base, top) = (build(&base), build(&top));
    let own = tree(&[("/bin/own", b"own")]);
    let composed = compose_all(&[&base, &top], &own, MapLayout::Devices);
    let found = paths(&composed, &[&base, &top]);
    for path in [
        "/usr/bin/tool",
        "/usr/bin/own",
        "/usr/bin/up",
        "/usr/lib/x/2",
        "/run/pid",
        "/loop/5",
        "/file/6",
    ] {
        assert!(found.iter().any(|one| one == path), "{path}: {found:?}");
    }
    for path in [
        "/bin/tool",
        "/lib64/y",
        "/run/lock",
        "/var/lock/l",
        "/up/here/bin",
    ] {
        assert!(!found.iter().any(|one| one == path), "{path}: {found:?}");
    }
    let told: Vec<_> = composed
        .conflicts
        .iter()
        .map(|one| (String::from_utf8_lossy(&one.path).into_owned(), one.winner))
        .collect();
    let expected = [("/file", 1), ("/loop", 1), ("/var/lock", 0)];
    assert_eq!(
        told,
        expected.map(|(path, winner)| (path.to_owned(), winner))
    );
}

#[test]
fn a_link_is_followed_as_the_layers_below_have_it() {
    let base = build(&with_links(
        &[("/a/1", b""), ("/b/1", b"")],
        &[("/to", "a")],
    ));
    let first = build(&tree(&[("/to/first", b"")]));
    let moved = build(&with_links(&[], &[("/to", "b")]));
    let last = build(&tree(&[("/to/last", b"")]));
    let layers = [&base, &first, &moved, &last];
    let composed = compose_all(&layers, &Tree::new(), MapLayout::Devices);
    let expected = ["", "/a", "/a/1", "/a/first", "/b", "/b/1", "/b/last", "/to"];
    assert_eq!(paths(&composed, &layers), expected);
}

#[test]
fn what_went_through_a_link_stays_when_a_later_layer_removes_the_link() {
    let base = build(&with_links(&[("/srv/x/1", b"")], &[("/opt/x", "/srv/x")]));
    let first = build(&tree(&[("/opt/x/file", b"")]));
    for (removed, left) in [("/opt/x", &["", "/opt"][..]), ("/opt", &[""])] {
        let mut top = Tree::new();
        let whiteout = with_attributes(0, None, Kind::CharDevice { major: 0, minor: 0 });
        top.insert_path(removed.as_bytes(), whiteout).unwrap();
        let layers = [&base, &first, &build(&top)];
        let composed = compose_all(&layers, &Tree::new(), MapLayout::Devices);
        let stay = ["/srv", "/srv/x", "/srv/x/1", "/srv/x/file"];
        assert_eq!(paths(&composed, &layers), [left, &stay].concat());
    }
}

#[test]
fn a_directory_that_may_be_removed_through_a_link_is_not_in_the_way() {
    let base = build(&with_links(&[("/a/b/1", b"")], &[("/x", "a")]));
    let mut first = Tree::new();
    let whiteout = with_attributes(0, None, Kind::CharDevice { major: 0, minor: 0 });
    first.insert_path(b"/x/b", whiteout).unwrap();
    let layers = [&base, &build(&first), &build(&tree(&[("/a/b", b"")]))];
    let composed = compose_all(&layers, &Tree::new(), MapLayout::Devices);
    assert_eq!(paths(&composed, &layers), ["", "/a", "/a/b", "/x"]);
}

#[test]
fn a_directory_that_exists_keeps_its_owner_and_a_file_never_takes_its_place() {
    let mut base = tree(&[("/etc/a", b"a"), ("/usr/bin/id", b"id")]);
    let directory = with_attributes(0o755, None, Kind::Directory(Default::default()));
    let mut by_a_user = tree(&[("/etc/b", b"b"), ("/usr/bin/mine", b"mine")]);
    for path in ["/etc", "/usr", "/usr/bin"] {
        let id = base.lookup(path.as_bytes()).unwrap();
        base.node_mut(id).attributes = directory.attributes.clone();
        let id = by_a_user.lookup(path.as_bytes()).unwrap();
        by_a_user.node_mut(id).attributes = Attributes::with_mode(0o775)
            .owned_by(1000, 1000)
            .modified_at(5);
    }
    by_a_user.node_mut(forelay_image::tree::ROOT).attributes = Attributes::with_mode(0o700)
        .owned_by(1000, 1000)
        .modified_at(5);
    let mut marked = by_a_user.clone();
    let etc = marked.lookup(b"/etc").unwrap();
    let replaces = (b"trusted.forelay.replaces".to_vec(), b"y".to_vec());
    marked.node_mut(etc).attributes.xattrs.extend([replaces]);
    let (base, top) = (build(&base), build(&by_a_user));
    let mode = |top: &Built, path: &str| {
        let composed = compose_all(&[&base, top], &Tree::new(), MapLayout::Devices);
        with_image(&composed, &[&base, top], |image| {
            let inode = image.lookup(path.as_bytes()).unwrap().unwrap();
            assert!(
                image.xattrs(&inode).unwrap().is_empty(),
                "marks are for composing"
            );
            (inode.record.mode, inode.record.uid)
        })
    };
    for path in ["", "/etc", "/usr", "/usr/bin"] {
        assert_eq!(mode(&top, path), (0o755, 0), "{path:?}");
    }
    let marked = build(&marked);
    assert_eq!(mode(&marked, "/etc"), (0o775, 1000));
    assert_eq!(mode(&marked, "/usr"), (0o755, 0));

    let refused = |layers: &[&Built], own: &Tree| {
        let layers: Vec<_> = layers.iter().map(|built| built.layer()).collect();
        compose(&layers, own, ComposeOptions::default()).unwrap_err()
    };
    let file = tree(&[("/etc", b"a file")]);
    let error = refused(&[&base, &top], &file);
    assert!(
        matches!(&error, ComposeError::OverDirectory { path, layer: 2, below: 1 } if path == "/etc"),
        "{error}"
    );
    let error = refused(&[&base, &build(&file), &top], &Tree::new());
    assert!(matches!(
        error,
        ComposeError::OverDirectory {
            layer: 1,
            below: 0,
            ..
        }
    ));
}

#[test]
fn directories_deeper_than_any_path_are_refused() {
    let deep = |levels: usize| {
        let path = ["/a".repeat(levels).as_bytes(), b"/file"].concat();
        let mut tree = Tree::new();
        tree.insert_path(&path, file(b"x")).unwrap();
        build(&tree)
    };
    let (most, more) = (deep(2048), deep(2049));
    compose(&[most.layer()], &Tree::new(), ComposeOptions::default()).unwrap();
    let error = compose(&[more.layer()], &Tree::new(), ComposeOptions::default()).unwrap_err();
    let ComposeError::Layer { image, source, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(image, more.written.image.digest);
    assert!(
        source.to_string().contains("more than 4096 bytes"),
        "{source}"
    );
}

#[test]
fn conflicts_are_differences_that_matter() {
    let mut early = file(b"same");
    early.attributes.mtime_s = 1;
    let mut base = tree(&[("/differs", b"one"), ("/size", b"12"), ("/own", b"base")]);
    let mut top = tree(&[("/differs", b"two"), ("/size", b"123"), ("/same", b"same")]);
    base.insert_path(b"/same", early).unwrap();
    base.insert_path(b"/mode", with_attributes(0o644, None, file(b"m").kind))
        .unwrap();
    top.insert_path(b"/mode", with_attributes(0o755, None, file(b"m").kind))
        .unwrap();
    let xattr = Some(("user.x", "1"));
    base.insert_path(b"/xattr", with_attributes(0o644, xattr, file(b"m").kind))
        .unwrap();
    top.insert_path(b"/xattr", with_attributes(0o644, None, file(b"m").kind))
        .unwrap();
    // usrmerge: a package that ships /lib as a directory over the base's symlink.
    let link = Kind::Symlink(b"usr/lib".to_vec());
    base.insert_path(b"/lib", with_attributes(0o777, None, link.clone()))
        .unwrap();
    base.insert_path(b"/link", with_attributes(0o777, None, link.clone()))
        .unwrap();
    top.insert_path(b"/link", with_attributes(0o777, None, link))
        .unwrap();
    top.insert_path(b"/lib/x", file(b"")).unwrap();
    let (base, top) = (build(&base), build(&top));
    let own = tree(&[("/own", b"own")]);
    let composed = compose_all(&[&base, &top], &own, MapLayout::Devices);
    let expected: Vec<FileConflict> = ["/differs", "/lib", "/mode", "/size", "/xattr"]
        .iter()
        .map(|path| FileConflict {
            path: path.as_bytes().to_vec(),
            winner: 1,
            loser: 0,
        })
        .collect();
    assert_eq!(composed.conflicts, expected);
    // Without chunk indexes equal content cannot be known.
    let mut layers = [base.layer(), top.layer()];
    layers[1].chunks = None;
    let blind = compose(&layers, &own, ComposeOptions::default()).unwrap();
    assert_eq!(blind.conflicts.len(), expected.len() + 1);
}

#[test]
fn a_component_given_twice_is_one_device() {
    let one = build(&tree(&[("/a", b"a")]));
    let composed = compose_all(&[&one, &one], &Tree::new(), MapLayout::Devices);
    assert_eq!(composed.devices.len(), 1);
    assert_eq!(paths(&composed, &[&one]), ["", "/a"]);
}

#[test]
fn content_of_a_component_that_is_not_open_names_it() {
    let one = build(&tree(&[("/a", b"a")]));
    let composed = compose_all(&[&one], &Tree::new(), MapLayout::Devices);
    let image = Image::open(&composed.map_image).unwrap();
    let inode = image.lookup(b"/a").unwrap().unwrap();
    let error = image.read_whole(&inode, 100).unwrap_err();
    let hex = one.written.image.digest.hex();
    assert!(matches!(error, ReadError::DeviceMissing { tag, .. } if tag == hex));
    let extents = image.extents_of(&inode).unwrap();
    assert_eq!(extents[0].device, 1);
    assert_eq!(extents[0].extent.offset, one.written.image.metadata_bytes);
}

#[test]
fn metadata_of_another_image_is_refused() {
    let one = build(&tree(&[("/a", b"a")]));
    let mut layer = one.layer();
    layer.image = Digest::of(b"other");
    let error = compose(&[layer], &Tree::new(), ComposeOptions::default()).unwrap_err();
    assert!(matches!(error, ComposeError::Identity { .. }));
}

#[test]
fn golden_digest_of_a_map_image() {
    let base = build(&one_of_everything());
    let top = build(&tree(&[("/usr/share/many/name-0001", b"top")]));
    let own = tree(&[("/etc/hostname", b"vm")]);
    let composed = compose_all(&[&base, &top], &own, MapLayout::Devices);
    assert_eq!(
        composed.digest.to_string(),
        "sha256:91808569f8e8b303ffb8e3da4093560d1549dc1ff2f1cc4f5d1edfe29a2cab2a"
    );
}
