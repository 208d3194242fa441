//! Component images: what is written reads back, and the same tree gives the same bytes.

use std::collections::BTreeMap;
use std::io::Cursor;

use forelay_image::erofs::layout::UUID_OFFSET;
use forelay_image::erofs::read::Image;
use forelay_image::erofs::write::{WriteError, write_image};
use forelay_image::tree::{Attributes, FileData, Kind, Node, ROOT, Tree};
use forelay_image::{Digest, Extent};
use proptest::prelude::*;

use crate::compose::{Built, build, file, tree};
use crate::model;

fn check_chunks(built: &Built) {
    let chunks = &built.written.chunks;
    chunks.validate().unwrap();
    assert_eq!(chunks.image, built.written.image.digest);
    for chunk in &chunks.chunks {
        let bytes = &built.bytes[chunk.offset as usize..chunk.extent().end() as usize];
        assert_eq!(Digest::of(bytes), chunk.digest);
    }
}

fn check_identity(built: &Built) {
    let mut bytes = built.bytes.clone();
    let uuid = UUID_OFFSET as usize..UUID_OFFSET as usize + 16;
    assert_eq!(bytes[uuid.clone()], built.written.image.digest.uuid());
    bytes[uuid].fill(0);
    assert_eq!(Digest::of(&bytes), built.written.image.digest);
}

/// Each inode's link count is the number of its names.
pub fn check_links(image: &Image<'_>) {
    let mut names: BTreeMap<u64, (u32, u32)> = BTreeMap::new();
    let mut subdirectories: BTreeMap<u64, u32> = BTreeMap::new();
    image
        .walk(|_, inode| {
            let entry = names.entry(inode.nid).or_insert((0, inode.record.nlink));
            entry.0 += 1;
            if let Ok(entries) = image.read_dir(inode) {
                let children = entries.iter().map(|entry| image.inode(entry.nid).unwrap());
                let is_directory = |child: &_| image.read_dir(child).is_ok();
                let count = children.filter(is_directory).count() as u32;
                subdirectories.insert(inode.nid, count);
            }
            Ok::<(), forelay_image::erofs::read::ReadError>(())
        })
        .unwrap();
    for (nid, (found, nlink)) in names {
        let expected = subdirectories.get(&nid).map_or(found, |count| count + 2);
        assert_eq!(nlink, expected, "inode {nid}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_tree_reads_back_as_it_was_written(tree in model::tree(40)) {
        let built = build(&tree);
        let image = Image::open(&built.bytes).unwrap();
        let read = image.to_tree(1 << 30).unwrap();
        prop_assert_eq!(model::describe(&read), model::describe(&tree));
        check_chunks(&built);
        check_identity(&built);
        check_links(&image);
        let again = build(&read);
        prop_assert_eq!(again.written, built.written);
    }
}

#[test]
fn chunks_follow_file_boundaries_and_content() {
    let big: Vec<u8> = (0..(5 << 19)).map(|i: u32| (i >> 12) as u8).collect();
    let one = build(&tree(&[("/a", b"small"), ("/big", &big), ("/z", b"last")]));
    let mut renamed = tree(&[("/b/big", &big), ("/b/small", b"small"), ("/b/zz", b"new")]);
    renamed.node_mut(ROOT).attributes.mtime_s = 5;
    let two = build(&renamed);
    let digests = |built: &Built| -> Vec<Digest> {
        let metadata = built.written.image.metadata_bytes;
        let chunks = built.written.chunks.chunks.iter();
        let chunks = chunks.filter(|chunk| chunk.offset >= metadata);
        chunks.map(|chunk| chunk.digest).collect()
    };
    let (one, two) = (digests(&one), digests(&two));
    // small; 2.5 MiB in three pieces; last
    assert_eq!(one.len(), 5);
    assert_eq!(two[..3], one[1..4]);
    assert_eq!(two[3], one[0]);
    assert_ne!(two[4], one[4]);
}

#[test]
fn files_with_equal_content_share_their_blocks() {
    let built = build(&tree(&[
        ("/a", &[1; 9000]),
        ("/b", &[2; 9000]),
        ("/c", &[1; 9000]),
    ]));
    let image = Image::open(&built.bytes).unwrap();
    let extents = image.file_extents().unwrap();
    let of = |path: &str| {
        let file = extents.iter().find(|file| file.path == path.as_bytes());
        file.unwrap().extents.clone()
    };
    assert_eq!(of("/a"), of("/c"));
    assert_ne!(of("/a"), of("/b"));
    let data = built.written.image.bytes - built.written.image.metadata_bytes;
    assert_eq!(data, 6 * 4096);
}

#[test]
fn extents_are_told_by_path() {
    let built = build(&tree(&[("/etc/a", &[1; 5000]), ("/etc/b", &[2; 10])]));
    let image = Image::open(&built.bytes).unwrap();
    let extents = image.file_extents().unwrap();
    let start = built.written.image.metadata_bytes;
    assert_eq!(extents[0].path, b"/etc/a");
    assert_eq!(extents[0].extents, [Extent::new(start, 5000)]);
    assert_eq!(extents[1].extents, [Extent::new(start + 8192, 10)]);
}

#[test]
fn large_directories_span_many_blocks() {
    let mut tree = Tree::new();
    for index in 0..20_000 {
        let path = format!("/many/file-with-a-name-{index}");
        tree.insert_path(path.as_bytes(), file(b"")).unwrap();
    }
    let built = build(&tree);
    let image = Image::open(&built.bytes).unwrap();
    let many = image.lookup(b"/many").unwrap().unwrap();
    assert!(many.record.size > 100 * 4096);
    assert_eq!(image.read_dir(&many).unwrap().len(), 20_000);
    assert!(
        image
            .lookup(b"/many/file-with-a-name-19999")
            .unwrap()
            .is_some()
    );
    assert!(
        image
            .lookup(b"/many/file-with-a-name-20000")
            .unwrap()
            .is_none()
    );
}

#[test]
fn a_host_file_that_shrank_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, b"short").unwrap();
    let mut tree = Tree::new();
    let kind = Kind::File(FileData::HostFile {
        path,
        offset: 0,
        len: 100,
    });
    let attributes = Attributes::with_mode(0o644);
    tree.insert_path(b"/x", Node { attributes, kind }).unwrap();
    let error = write_image(&tree, &mut Cursor::new(Vec::new())).unwrap_err();
    assert!(matches!(error, WriteError::Source { path, .. } if path == "/x"));
}

/// A tree with one of everything; its digest must never change by accident.
pub fn one_of_everything() -> Tree {
    let mut tree = tree(&[
        ("/etc/passwd", b"root:x:0:0"),
        ("/usr/lib/blob", &[0xAB; 70_000]),
    ]);
    let with = |kind| {
        let mut node = file(b"");
        node.kind = kind;
        node
    };
    let symlink = |len| with(Kind::Symlink(vec![b'x'; len]));
    let mut capable = file(b"ping");
    // Revision 2, effective; cap_net_raw permitted.
    let mut value = vec![1, 0, 0, 2, 0, 0x20];
    value.resize(20, 0);
    let capability = (b"security.capability".to_vec(), value);
    capable
        .attributes
        .xattrs
        .extend([capability, (b"user.comment".to_vec(), vec![b'c'; 5000])]);
    capable.attributes.mode = 0o4755;
    capable.attributes.uid = 1_000_000;
    capable.attributes.mtime_s = 1 << 33;
    capable.attributes.mtime_ns = 123_456_789;
    let major = 259;
    let minor = 65_539;
    for (path, node) in [
        ("/bin", with(Kind::Symlink(b"usr/bin".to_vec()))),
        ("/long", symlink(4000)),
        ("/longest", symlink(4095)),
        ("/usr/bin/ping", capable),
        ("/dev/null", with(Kind::CharDevice { major: 1, minor: 3 })),
        ("/dev/disk", with(Kind::BlockDevice { major, minor })),
        ("/dev/fifo", with(Kind::Fifo)),
        ("/dev/socket", with(Kind::Socket)),
        ("/dev/.-between-the-dots", file(b"")),
        ("/dev/!before-the-dots", file(b"1")),
    ] {
        tree.insert_path(path.as_bytes(), node).unwrap();
    }
    let ping = tree.lookup(b"/usr/bin/ping").unwrap();
    let bin = tree.lookup(b"/usr/bin").unwrap();
    tree.link(bin, b"ping6", ping).unwrap();
    for index in 0..1000 {
        let path = format!("/usr/share/many/name-{index:04}");
        let content = vec![index as u8; index];
        tree.insert_path(path.as_bytes(), file(&content)).unwrap();
    }
    tree
}

#[test]
fn golden_digest() {
    let built = build(&one_of_everything());
    let golden = "sha256:c9aec7e41dbc48f6b681e50c5aee08c7cda9d979c0dd5bcb7e882e452eaad2da";
    assert_eq!(built.written.image.digest.to_string(), golden);
}

#[test]
fn what_cannot_be_stored_is_refused_with_its_path() {
    let refused = |kind| {
        let mut tree = Tree::new();
        let attributes = Attributes::with_mode(0o644);
        tree.insert_path(b"/d/x", Node { attributes, kind })
            .unwrap();
        let error = write_image(&tree, &mut Cursor::new(Vec::new())).unwrap_err();
        error.to_string()
    };
    let (major, minor) = (5000, 0);
    for kind in [
        Kind::Symlink(vec![]),
        Kind::Symlink(vec![b'x'; 4096]),
        Kind::CharDevice { major, minor },
    ] {
        assert!(refused(kind).starts_with("/d/x: "));
    }
}
