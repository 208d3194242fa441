//! What happens when the repository fails, lies or loses things.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use forelay_image::bundle::Bundle;
use forelay_image::component::ImageRef;
use forelay_image::{Digest, Extent};
use forelay_store::{FetchError, Priority, Store, StoreError};

use crate::support::{Bench, sample};

#[tokio::test(flavor = "multi_thread")]
async fn publication_is_all_or_nothing_wherever_it_fails() {
    let bench = Bench::new();
    let store = bench.store().await;
    let old = bench.published(&store, "old", 4, 60_000).await;
    let new = bench.sample("new", &[(1, 4096), (2, 400_000), (3, 70_000)]);
    let mut calls = 0;
    loop {
        bench.faults.fail_after(calls, -1);
        let result = store
            .publish(&new.component, &new.path, &new.index, &|_| {})
            .await;
        bench.faults.heal();
        let reader = bench.store().await;
        let listed = reader.components().await.unwrap();
        assert!(
            reader.verify(&|_| {}).await.unwrap().findings.is_empty(),
            "after {calls} calls"
        );
        let visible = listed.iter().any(|one| one.id() == new.component.id());
        if visible {
            assert_eq!(new.read_from(&reader).await, new.bytes);
        }
        assert!(listed.iter().any(|one| one.id() == old.component.id()));
        match result {
            Ok(_) => {
                assert!(visible);
                break;
            }
            // The last steps only look after an image that is visible already.
            Err(error) => assert!(matches!(error, StoreError::Repository(_)), "{error}"),
        }
        calls += 1;
        assert!(calls < 100);
    }
    assert!(
        calls > 5,
        "the test must have failed at several places, not {calls}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn demand_outlasts_transient_failures_and_prefetch_gives_up() {
    let bench = Bench::new();
    let sample = bench
        .published(&bench.store().await, "app", 4, 30_000)
        .await;
    let host = bench.store().await;
    host.open_image(sample.image()).await.unwrap();
    bench.faults.fail_after(0, 20);
    let read = host
        .read_image(sample.image(), sample.extent(1), Priority::Demand)
        .await
        .unwrap();
    assert_eq!(read, sample.part(sample.extent(1)));
    let counters = host.scheduler().counters();
    assert_eq!((counters.retries, counters.demands_in_trouble), (20, 0));
    bench.faults.fail_after(0, -1);
    let failed = host
        .scheduler()
        .fetch(sample.image(), 2, Priority::Prefetch)
        .await;
    assert!(
        matches!(
            failed,
            Err(FetchError::Repository {
                chunk_no: 2,
                attempts: 5,
                ..
            })
        ),
        "{failed:?}"
    );
    bench.faults.heal();
    assert!(
        host.scheduler()
            .fetch(sample.image(), 2, Priority::Prefetch)
            .await
            .is_ok()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_fetched_again_and_never_handed_out() {
    let bench = Bench::new();
    let sample = bench
        .published(&bench.store().await, "app", 4, 30_000)
        .await;
    let host = bench.store().await;
    let lies = Arc::new(AtomicU32::new(1));
    let left = lies.clone();
    *bench.faults.mangle.lock() = Some(Box::new(move |key, bytes| {
        let lie = key.ends_with(".pack")
            && left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                    left.checked_sub(1)
                })
                .is_ok();
        if !lie {
            return bytes;
        }
        let mut changed = bytes.to_vec();
        let middle = changed.len() / 2;
        changed[middle] ^= 0x10;
        changed.into()
    }));
    // One lie: the second look succeeds.
    let read = host
        .read_image(sample.image(), sample.extent(0), Priority::Demand)
        .await
        .unwrap();
    assert_eq!(read, sample.part(sample.extent(0)));
    // Lies for ever: a typed error, soon.
    lies.store(u32::MAX, Ordering::SeqCst);
    let failed = host
        .scheduler()
        .fetch(sample.image(), 1, Priority::Demand)
        .await
        .unwrap_err();
    assert!(
        matches!(failed, FetchError::Corrupted { image, chunk_no: 1, .. } if image == sample.image()),
        "{failed}"
    );
    assert!(failed.to_string().contains("forelay verify"));
    // Shorter answers than asked for.
    *bench.faults.mangle.lock() = Some(Box::new(|key, bytes| {
        if key.ends_with(".pack") {
            bytes.slice(..bytes.len() / 2)
        } else {
            bytes
        }
    }));
    let failed = host
        .scheduler()
        .fetch(sample.image(), 2, Priority::Demand)
        .await
        .unwrap_err();
    assert!(
        matches!(failed, FetchError::Corrupted { chunk_no: 2, .. }),
        "{failed}"
    );
    bench.faults.heal();
    assert!(
        host.scheduler()
            .fetch(sample.image(), 2, Priority::Demand)
            .await
            .is_ok()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn truncated_and_vanished_packs_are_named_and_found_by_verify() {
    let bench = Bench::new();
    let sample = bench
        .published(&bench.store().await, "app", 10, 30_000)
        .await;
    let host = bench.store().await;
    let pack = bench.packs().remove(0);
    let bytes = std::fs::read(&pack).unwrap();
    std::fs::write(&pack, &bytes[..bytes.len() / 2]).unwrap();
    assert!(
        host.scheduler()
            .fetch(sample.image(), 0, Priority::Demand)
            .await
            .is_ok()
    );
    let failed = host
        .scheduler()
        .fetch(sample.image(), 9, Priority::Demand)
        .await
        .unwrap_err();
    assert!(
        matches!(failed, FetchError::Corrupted { chunk_no: 9, .. }),
        "{failed}"
    );
    let report = host.verify(&|_| {}).await.unwrap();
    assert!(
        report
            .findings
            .iter()
            .any(|one| one.problem.contains("do not have the digest")),
        "{report:?}"
    );

    let mut changed = bytes.clone();
    changed[100] ^= 1;
    std::fs::write(&pack, &changed).unwrap();
    let report = host.verify(&|_| {}).await.unwrap();
    assert_eq!(
        report.findings.len(),
        2,
        "the pack, and the chunk in it: {report:?}"
    );

    // What cannot be read may be right: index and pack, with the component that needs them.
    std::fs::write(&pack, &bytes).unwrap();
    let id = sample.component.id();
    for (reads, unreadable) in [(2, 2), (3, 1)] {
        bench.faults.fail_after(reads, 1);
        let report = host.verify_one(id).await.unwrap();
        let all_unreadable = report.findings.iter().all(|one| one.unreadable);
        assert!(all_unreadable, "after {reads} reads: {report:?}");
        assert_eq!(report.findings.len(), unreadable, "{report:?}");
        assert_eq!(host.verify_one(id).await.unwrap().findings, []);
    }

    std::fs::remove_file(&pack).unwrap();
    let report = host.verify_one(id).await.unwrap();
    let [gone] = &report.findings[..] else {
        panic!("{report:?}");
    };
    assert!(
        !gone.unreadable,
        "nobody can read what is not there: {gone:?}"
    );
    let failed = host
        .scheduler()
        .fetch(sample.image(), 5, Priority::Demand)
        .await
        .unwrap_err();
    assert!(
        matches!(failed, FetchError::Vanished { chunk_no: 5, .. }),
        "{failed}"
    );
    std::fs::write(&pack, &bytes).unwrap();
    assert!(host.verify(&|_| {}).await.unwrap().findings.is_empty());
    let index = pack.with_extension("idx");
    let index_bytes = std::fs::read(&index).unwrap();
    std::fs::write(&index, &index_bytes[..index_bytes.len() - 7]).unwrap();
    let report = host.verify(&|_| {}).await.unwrap();
    assert!(
        report.findings[1].problem.contains("truncated")
            || report.findings[0].problem.contains("in no readable pack"),
        "{report:?}"
    );
    assert_eq!(report.findings.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repacked_image_is_found_again() {
    let bench = Bench::new();
    let publisher = bench.store().await;
    let sample = bench.published(&publisher, "app", 4, 30_000).await;
    let host = bench.store().await;
    host.open_image(sample.image()).await.unwrap();
    // The image goes and comes back in another pack (with one more image's chunks).
    std::fs::remove_dir_all(bench.repository_path().join("packs")).unwrap();
    std::fs::remove_dir_all(bench.repository_path().join("locations")).unwrap();
    let mut chunks: Vec<(u64, usize)> = vec![(77, 90_000)];
    let seed = u64::from(forelay_image::Digest::of(b"app").as_bytes()[0]) << 32;
    chunks.extend((0..4).map(|number| (seed + number, 30_000)));
    let other = bench.sample("other", &chunks);
    let again = bench.store().await;
    other.publish_to(&again).await;
    sample.publish_to(&again).await;
    let read = host
        .read_image(sample.image(), sample.extent(3), Priority::Demand)
        .await
        .unwrap();
    assert_eq!(read, sample.part(sample.extent(3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_chunk_index_than_the_pinned_one_is_refused() {
    let bench = Bench::new();
    let store = bench.store().await;
    let good = bench.published(&store, "good", 2, 4096).await;
    // A whole and consistent index of the same image that names other bytes.
    let evil = bench.published(&store, "evil", 2, 4096).await;
    let mut index = evil.index.clone();
    index.image = good.image();
    let path = |index: forelay_image::Digest| {
        bench
            .repository_path()
            .join(format!("chunks/{}.idx", index.hex()))
    };
    std::fs::write(path(good.component.image.chunk_index), index.encode()).unwrap();
    let host = bench.store().await;
    let error = host.open_image(good.image()).await.unwrap_err();
    assert!(error.to_string().contains("pins"), "{error}");
    let report = host.verify(&|_| {}).await.unwrap();
    assert_eq!(report.findings.len(), 1, "{report:?}");
    // A component that pins the other index for this image does not get in beside it.
    let mut forged = evil.component.image;
    (forged.digest, forged.chunk_index) = (good.image(), index.digest());
    let error = host.add_image(forged).unwrap_err();
    assert!(matches!(error, StoreError::Disputed { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_bad_metadata_object_does_not_hide_the_others() {
    let bench = Bench::new();
    let store = bench.store().await;
    let good = bench.published(&store, "good", 2, 4096).await;
    let bad = bench.published(&store, "bad", 2, 4096).await;
    let path = bench
        .repository_path()
        .join(format!("components/{}.json", bad.component.id().hex()));
    std::fs::write(&path, b"{}").unwrap();
    // Sparse, and larger than any component: memory for it would not be had.
    let huge = bench
        .repository_path()
        .join(format!("components/{}.json", Digest::of(b"huge").hex()));
    std::fs::File::create(&huge)
        .unwrap()
        .set_len(8 << 40)
        .unwrap();
    let host = bench.store().await;
    let listed = host.components().await.unwrap();
    assert_eq!(
        listed.iter().map(|one| one.id()).collect::<Vec<_>>(),
        [good.component.id()]
    );
    let error = host.component(bad.component.id()).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupted { .. }), "{error}");
    let index = bench.repository_path().join(format!(
        "chunks/{}.idx",
        good.component.image.chunk_index.hex()
    ));
    let bytes = std::fs::read(&index).unwrap();
    std::fs::write(&index, &bytes[..bytes.len() / 2]).unwrap();
    let error = host.open_image(good.image()).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupted { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_component_that_claims_anothers_image_keeps_it_out_of_nothing() {
    let bench = Bench::new();
    let publisher = bench.store().await;
    let dir = bench.dir.path();
    let good = sample(dir, "good", &[(1, 8192), (2, 4096)]);
    let evil = sample(dir, "evil", &[(3, 8192), (4, 4096)]);
    good.publish_to(&publisher).await;
    evil.publish_to(&publisher).await;
    // One whose chunk index nobody has, and one that names other bytes.
    let mut without = good.component.clone();
    without.name = "without".to_owned();
    without.image.chunk_index = Digest::of(b"no index");
    let path = format!("components/{}.json", without.id().hex());
    let path = bench.repository_path().join(path);
    std::fs::write(path, without.canonical_json()).unwrap();
    let (mut forged, mut index) = (evil.component.clone(), evil.index.clone());
    index.image = good.image();
    (forged.image.digest, forged.image.chunk_index) = (good.image(), index.digest());
    let publisher = bench.store().await;
    let published = publisher.publish(&forged, &evil.path, &index, &|_| {});
    published.await.unwrap();

    let host = bench.store().await;
    let error = host.hold_component(without.id()).await.unwrap_err();
    assert!(matches!(error, StoreError::ImageMissing { .. }), "{error}");
    let metadata = async |id| {
        let image = host.component_image(id).await.unwrap();
        host.image_metadata(&image).await.unwrap()
    };
    assert_eq!(metadata(forged.id()).await, evil.bytes[..8192]);
    assert_eq!(metadata(good.component.id()).await, good.bytes[..8192]);
    let (_, hold) = host.hold_component(good.component.id()).await.unwrap();
    // Each is read by its own map, whichever shared memory has.
    assert_eq!(metadata(forged.id()).await, evil.bytes[..8192]);
    assert_eq!(good.read_from(&host).await, good.bytes);
    let error = host.hold_component(forged.id()).await.unwrap_err();
    assert!(matches!(error, StoreError::Disputed { .. }), "{error}");
    // What nobody holds makes room.
    drop(hold);
    host.hold_component(forged.id()).await.unwrap();
    assert_eq!(
        evil.bytes,
        read(&host, good.image(), evil.bytes.len()).await
    );
    host.hold_component(good.component.id()).await.unwrap();
    assert_eq!(good.read_from(&host).await, good.bytes);

    // A host that was taken over keeps the image for what its VM was launched with.
    let next = bench.store().await;
    next.reserve_image(good.image(), Some(good.component.id()));
    let error = next.hold_component(forged.id()).await.unwrap_err();
    assert!(matches!(error, StoreError::Disputed { .. }), "{error}");
    assert!(next.add_image(forged.image).is_err());
    assert!(next.add_image_of(good.component.image, &publisher).is_err());
    let (_, hold) = next.hold_component(good.component.id()).await.unwrap();
    assert!(next.hold_component(forged.id()).await.is_err());
    drop(hold);
    next.hold_component(forged.id()).await.unwrap();
}

async fn read(host: &Store, image: Digest, bytes: usize) -> bytes::Bytes {
    let whole = Extent::new(0, bytes as u64);
    let read = host.read_image(image, whole, Priority::Demand);
    read.await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_another_repository_is_not_the_same_image() {
    let (here, other) = (Bench::new(), Bench::new());
    let (host, other) = (here.store().await, other.store().await);
    let image = sample(here.dir.path(), "one", &[(1, 4096)]).component.image;
    let _hold = host.add_image_of(image, &other).unwrap();
    host.add_image_of(image, &other).unwrap();
    let error = host.add_image(image).unwrap_err();
    assert!(matches!(error, StoreError::Disputed { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_with_other_sizes_is_not_the_same_bundle() {
    let host = Bench::new().store().await;
    let images = |bytes: u64| [(Digest::of(b"a"), bytes), (Digest::of(b"b"), 4096)];
    let bundle = |bytes| Bundle::new(&images(bytes)).unwrap();
    host.add_bundle(bundle(4096)).unwrap();
    host.add_bundle(bundle(4096)).unwrap();
    assert!(host.add_bundle(bundle(8192)).is_err());
    // Nor has an image a bundle's digest.
    let claimed = ImageRef {
        digest: bundle(4096).digest(),
        bytes: 8192,
        metadata_bytes: 4096,
        inodes: 1,
        chunk_index: Digest::of(b"index"),
    };
    assert!(host.add_image(claimed).is_err());
}
