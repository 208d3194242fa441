//! Hostile images: no panic, no endless loop, no memory out of proportion.
//!
//! The same entry points as the fuzz targets in `fuzz/`, with a few thousand random
//! mutations, so that every test run covers them.

use forelay_image::erofs::layout::UUID_OFFSET;
use forelay_image::erofs::merge::{ComposeOptions, Layer, compose};
use forelay_image::erofs::read::{Image, ReadError};
use forelay_image::tree::Tree;
use proptest::prelude::*;

use crate::compose::{Built, build, compose_all, tree};
use crate::images::one_of_everything;
use forelay_image::erofs::merge::MapLayout;

/// Reads everything; errors are fine as long as they are errors.
fn read_all(bytes: &[u8]) -> Result<(), ReadError> {
    let image = Image::open(&bytes)?;
    let _ = image.file_extents();
    let _ = image.lookup(b"/usr/share/many/name-0500");
    let _ = image.to_tree(8 << 20);
    image.walk(|_, inode| {
        let _ = image.xattrs(inode);
        match image.read_link(inode) {
            Err(ReadError::WrongType { .. }) => Ok(()),
            other => other.map(drop),
        }
    })
}

fn compose_one(built: &Built, metadata: &[u8]) -> bool {
    let layer = Layer {
        image: built.written.image.digest,
        image_bytes: built.written.image.bytes,
        metadata,
        chunks: Some(&built.written.chunks),
        bundle: None,
    };
    let other = build(&tree(&[("/etc/passwd", b"other"), ("/dev/x/y", b"")]));
    let layers = [layer, other.layer(), layer];
    let composed = compose(&layers, &Tree::new(), ComposeOptions::default());
    if let Ok(composed) = &composed {
        // Whatever passes the checks gives a map image that reads.
        let image = Image::open(&composed.map_image).unwrap();
        image.file_extents().unwrap();
    }
    composed.is_ok()
}

fn small() -> Built {
    let mut tree = one_of_everything();
    let share = tree.lookup(b"/usr/share/many").unwrap();
    for index in 100..1000 {
        tree.remove(share, format!("name-{index:04}").as_bytes());
    }
    build(&tree)
}

#[test]
fn truncated_images_are_errors() {
    let built = small();
    let metadata = built.written.image.metadata_bytes as usize;
    assert!(read_all(&built.bytes).is_ok());
    // The last directory or inode block is needed, whatever lies in it.
    for len in (0..metadata - 4096).step_by(61) {
        assert!(read_all(&built.bytes[..len]).is_err(), "cut at {len}");
        assert!(!compose_one(&built, &built.bytes[..len]), "cut at {len}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn changed_bytes_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        superblock_too in any::<bool>(),
    ) {
        let built = small();
        let metadata = built.written.image.metadata_bytes as usize;
        let mut bytes = built.bytes.clone();
        for (at, value) in &changes {
            let at = at.index(metadata);
            let in_superblock = (1024..1152).contains(&at);
            let in_uuid = (UUID_OFFSET as usize..UUID_OFFSET as usize + 16).contains(&at);
            if !in_uuid && (superblock_too || !in_superblock) {
                bytes[at] = *value;
            }
        }
        let _ = read_all(&bytes);
        compose_one(&built, &bytes[..metadata]);
    }

    #[test]
    fn changed_map_images_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let one = build(&tree(&[("/a/b", b"a"), ("/c", &[1; 5000])]));
        let mut map = compose_all(&[&one], &tree(&[("/o", b"own")]), MapLayout::Devices).map_image;
        for (at, value) in &changes {
            // The first KiB is unused.
            let at = 1024 + at.index(map.len() - 1024);
            map[at] = *value;
        }
        let components: [(_, &dyn forelay_image::erofs::read::ReadAt); 1] =
            [(one.written.image.digest, &one.bytes)];
        if let Ok(image) = Image::open_multi(&map, &components) {
            let _ = image.to_tree(1 << 20);
            let _ = image.file_extents();
        }
    }
}

/// Points entry `name` of the root directory at inode `nid`.
fn redirect(bytes: &mut [u8], name: &[u8], nid: u64) {
    let root = 36 * 32 + 64;
    let names = usize::from(u16::from_le_bytes([bytes[root + 8], bytes[root + 9]]));
    for slot in 0..names / 12 {
        let at = root + slot * 12;
        let start = usize::from(u16::from_le_bytes([bytes[at + 8], bytes[at + 9]]));
        if bytes[root + start..].starts_with(name) {
            bytes[at..at + 8].copy_from_slice(&nid.to_le_bytes());
            return;
        }
    }
    panic!("no such name");
}

#[test]
fn a_directory_that_contains_itself_is_an_error() {
    let mut built = build(&tree(&[("/aaa/x", b""), ("/bbb", b"")]));
    redirect(&mut built.bytes, b"bbb", 36);
    assert!(matches!(
        read_all(&built.bytes),
        Err(ReadError::Loop { nid: 36 })
    ));
    let metadata = built.written.image.metadata_bytes as usize;
    assert!(!compose_one(&built, &built.bytes[..metadata]));
}

#[test]
fn an_inode_with_more_names_than_links_is_not_multiplied() {
    let mut built = build(&tree(&[("/aaa", b"1"), ("/bbb", b"2")]));
    let image = Image::open(&built.bytes).unwrap();
    let nid = image.lookup(b"/aaa").unwrap().unwrap().nid;
    redirect(&mut built.bytes, b"bbb", nid);
    let metadata = built.written.image.metadata_bytes as usize;
    assert!(!compose_one(&built, &built.bytes[..metadata]));
}
