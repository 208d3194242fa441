//! Decoders of what comes from a repository: round trips, and no panic on any bytes.

use forelay_image::lock::Lock;
use forelay_image::manifest::Manifest;
use forelay_image::{ChunkIndex, Digest};
use forelay_store::layout::Descriptor;
use forelay_store::pack::{Location, Locations, PackEntry, PackIndex, open_frame};
use forelay_store::sealed::seal;
use proptest::prelude::*;

fn pack_index() -> impl Strategy<Value = PackIndex> {
    prop::collection::vec(
        (
            any::<[u8; 32]>(),
            1..1_000_000u32,
            1..1_048_576u32,
            0..5000u32,
        ),
        0..40,
    )
    .prop_map(|chunks| {
        let mut offset = 0;
        let mut entries = Vec::new();
        for (chunk, stored, len, gap) in chunks {
            let stored_bytes = stored.min(len);
            entries.push(PackEntry {
                chunk: Digest::from_bytes(chunk),
                offset,
                stored_bytes,
                chunk_bytes: len,
            });
            offset += stored_bytes + gap;
        }
        PackIndex {
            pack: Digest::of(b"pack"),
            pack_bytes: u64::from(offset),
            entries,
        }
    })
}

fn locations() -> impl Strategy<Value = Locations> {
    (
        1..5u32,
        prop::collection::vec((0..5u32, any::<u32>(), any::<u32>()), 0..40),
    )
        .prop_map(|(packs, chunks)| Locations {
            chunk_index: Digest::of(b"index"),
            packs: (0..packs)
                .map(|number| Digest::of(&number.to_le_bytes()))
                .collect(),
            chunks: chunks
                .into_iter()
                .map(|(pack, offset, stored_bytes)| Location {
                    pack: pack % packs,
                    offset,
                    stored_bytes,
                })
                .collect(),
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn pack_indexes_round_trip(index in pack_index()) {
        prop_assert_eq!(PackIndex::decode(&index.encode()).unwrap(), index);
    }

    #[test]
    fn locations_round_trip(locations in locations()) {
        prop_assert_eq!(Locations::decode(&locations.encode()).unwrap(), locations);
    }

    /// Well-sealed nonsense gets past the checksum and must be stopped by the checks.
    #[test]
    fn sealed_nonsense_is_refused_without_panic(body in prop::collection::vec(any::<u8>(), 0..400), count in 0..12u32) {
        let mut counted = body.clone();
        if counted.len() >= 44 {
            counted[40..44].copy_from_slice(&count.to_le_bytes());
        }
        for body in [body, counted] {
            let _ = PackIndex::decode(&seal(b"FLPACKIX", &body));
            let _ = Locations::decode(&seal(b"FLLOCATE", &body));
        }
    }

    #[test]
    fn any_bytes_are_refused_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(PackIndex::decode(&bytes).is_err());
        prop_assert!(Locations::decode(&bytes).is_err());
        prop_assert!(ChunkIndex::decode(&bytes).is_err());
        prop_assert!(Descriptor::parse(&bytes).is_err());
        prop_assert!(open_frame(&bytes, 4096, Digest::of(b"other")).is_err());
        let text = String::from_utf8_lossy(&bytes);
        prop_assert!(Lock::parse(&text).is_err());
        let _ = Manifest::parse(&text);
    }

    /// Near-manifests: real lines in any order, some cut.
    #[test]
    fn mangled_manifests_are_refused_without_panic(
        lines in prop::collection::vec((0..MANIFEST.len(), 0..60usize), 0..14),
    ) {
        let cut = |(line, at): &(usize, usize)| MANIFEST[*line].chars().take(20 + at).collect::<String>();
        let text = lines.iter().map(cut).collect::<Vec<_>>().join("\n");
        if let Err(error) = Manifest::parse(&text) {
            prop_assert!(error.line >= 1 && error.line <= lines.len().max(1) && error.column >= 1);
        }
        let _ = Lock::parse(&text);
    }
}

const MANIFEST: [&str; 14] = [
    "base = 'debian@>= 12'",
    "components = ['nginx@>=1.22', 'x@']",
    "[vm]",
    "memory_mib = 99999999999999999999",
    "forward = ['8080:80', '1:99999']",
    "scratch = '99999999999T'",
    "[files.'/etc/ä']",
    "content = 'ä'",
    "mode = '9'",
    "ready = { tcp = 80, exec = [] }",
    "init = 7",
    "format = 1",
    "[[component]]",
    "manifest_digest = 'sha256:'",
];
