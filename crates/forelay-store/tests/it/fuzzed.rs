//! The bodies of the fuzz targets, on a few changed samples each: what the fuzzer runs is
//! compiled and run with every suite.

use std::path::Path;

use forelay_image::erofs::read::Image;
use forelay_image::erofs::write::write_image;
use forelay_image::tree::{Attributes, FileData, Kind, Node, Tree};
use forelay_image::{ChunkIndex, Digest};
use forelay_store::pack::{Location, Locations, PackEntry, PackIndex};
use proptest::prelude::*;

#[path = "../../../../fuzz/bodies/chunk_index.rs"]
mod chunk_index;
#[path = "../../../../fuzz/bodies/compose.rs"]
mod compose;
#[path = "../../../../fuzz/bodies/erofs_read.rs"]
mod erofs_read;
#[path = "../../../../fuzz/bodies/manifest.rs"]
mod manifest;
#[path = "../../../../fuzz/bodies/pack_index.rs"]
mod pack_index;

/// An image and its chunks.
fn image() -> (Vec<u8>, ChunkIndex) {
    let mut tree = Tree::new();
    let mut add = |path: &str, kind| {
        let attributes = Attributes::with_mode(0o755);
        let node = Node { attributes, kind };
        tree.insert_path(path.as_bytes(), node).unwrap();
    };
    add(
        "usr/bin/x",
        Kind::File(FileData::Bytes(vec![7; 9_000].into())),
    );
    add("usr/bin/y", Kind::Symlink(b"x".to_vec()));
    add("dev/z", Kind::CharDevice { major: 1, minor: 3 });
    let mut out = std::io::Cursor::new(Vec::new());
    let written = write_image(&tree, &mut out).unwrap();
    (out.into_inner(), written.chunks)
}

fn pack() -> (Vec<u8>, Vec<u8>) {
    let digest = Digest::of(b"x");
    let entry = |number: u32| PackEntry {
        chunk: Digest::of(&number.to_le_bytes()),
        offset: number * 100,
        stored_bytes: 90,
        chunk_bytes: 4096,
    };
    let index = PackIndex {
        pack: digest,
        pack_bytes: 300,
        entries: (0..3).map(entry).collect(),
    };
    let location = |number: u32| Location {
        pack: 0,
        offset: number * 100,
        stored_bytes: 90,
    };
    let locations = Locations {
        chunk_index: digest,
        packs: vec![digest],
        chunks: (0..3).map(location).collect(),
    };
    (index.encode(), locations.encode())
}

#[test]
fn the_samples_are_taken() {
    let (image, chunks) = image();
    assert!(Image::open(&image).unwrap().file_extents().is_ok());
    assert_eq!(ChunkIndex::decode(&chunks.encode()), Ok(chunks));
    let (index, locations) = pack();
    assert!(PackIndex::decode(&index).is_ok() && Locations::decode(&locations).is_ok());
}

type Changes = Vec<(prop::sample::Index, u8)>;

fn changed(bytes: &[u8], changes: &Changes, cut: Option<prop::sample::Index>) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (at, value) in changes {
        let at = at.index(bytes.len());
        bytes[at] = *value;
    }
    if let Some(cut) = cut {
        bytes.truncate(cut.index(bytes.len()));
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_fuzz_targets_take_changed_samples(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (image, chunks) = image();
        let image = changed(&image, &changes, cut);
        erofs_read::run(&image);
        compose::run(&image);
        chunk_index::run(&changed(&chunks.encode(), &changes, cut));
        let (index, locations) = pack();
        for sealed in [index, locations] {
            pack_index::run(&changed(&sealed, &changes, cut));
            // Without its seal: the target puts on its own.
            pack_index::run(&changed(&sealed[32..sealed.len() - 32], &changes, cut));
        }
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
        let text = std::fs::read(examples.join("web.toml")).unwrap();
        if let Ok(text) = String::from_utf8(changed(&text, &changes, cut)) {
            manifest::run(&text);
        }
    }
}
