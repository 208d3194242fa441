//! The life of a component: published, listed, read back, shared, removed.

use forelay_image::Extent;
use forelay_store::{Priority, StoreError};

use crate::support::{Bench, is_on_disk};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_reads_back_from_another_host() {
    let bench = Bench::new();
    let publisher = bench.store().await;
    let sample = bench.sample(
        "app",
        &[(1, 4096), (2, 1 << 20), (3, 8192), (4, 100_000), (1, 4096)],
    );
    let published = sample.publish_to(&publisher).await;
    assert!(published.created);
    assert_eq!(published.progress.done_bytes, sample.bytes.len() as u64);
    assert_eq!(
        published.progress.reused_bytes, 4096,
        "the last chunk is the first again"
    );
    assert!(published.progress.stored_bytes < sample.bytes.len() as u64);

    let host = bench.store().await;
    let listed = host.components().await.unwrap();
    assert_eq!(
        listed.iter().map(|one| one.id()).collect::<Vec<_>>(),
        [published.id]
    );
    assert_eq!(
        *host.component(published.id).await.unwrap(),
        sample.component
    );
    assert_eq!(
        host.image_metadata(&host.open_image(sample.image()).await.unwrap())
            .await
            .unwrap(),
        sample.bytes[..4096]
    );
    for extent in [
        Extent::new(0, 1),
        Extent::new(4000, 2_000),
        Extent::new(1_060_000, 100_000),
        Extent::new(0, sample.bytes.len() as u64),
    ] {
        let read = host
            .read_image(sample.image(), extent, Priority::Demand)
            .await
            .unwrap();
        assert_eq!(read, sample.part(extent));
        // Bytes are handed out first and kept on disk right after.
        while !is_on_disk(&host, sample.image(), extent) {
            tokio::task::yield_now().await;
        }
        assert_eq!(
            host.try_cached(sample.image(), extent).unwrap(),
            sample.part(extent)
        );
    }
    let end = Extent::new(sample.bytes.len() as u64 - 10, 20);
    let beyond = host.read_image(sample.image(), end, Priority::Demand).await;
    assert!(matches!(beyond, Err(StoreError::BeyondEnd { .. })));
    // Faults may touch a device's padding.
    let padded = host
        .scheduler()
        .read(sample.image(), end, Priority::Demand)
        .await
        .unwrap();
    assert_eq!(padded[..10], sample.bytes[sample.bytes.len() - 10..]);
    assert_eq!(padded[10..], [0; 10]);

    let out = bench.dir.path().join("materialised");
    host.materialise(sample.image(), &out).await.unwrap();
    assert_eq!(std::fs::read(&out).unwrap(), sample.bytes);
    let reader = host.image_reader(host.open_image(sample.image()).await.unwrap());
    let expected = sample.bytes[1_000_000..1_100_000].to_vec();
    tokio::task::spawn_blocking(move || {
        let mut buffer = vec![0; 100_000];
        assert_eq!(
            reader.read_at(&mut buffer, 1_000_000).unwrap(),
            buffer.len()
        );
        assert_eq!(buffer, expected);
        assert_eq!(
            reader.read_at(&mut buffer, reader.image_bytes()).unwrap(),
            0
        );
    })
    .await
    .unwrap();
    assert_eq!(host.verify(&|_| {}).await.unwrap().findings, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_shared_between_images() {
    let bench = Bench::new();
    let store = bench.store().await;
    let one = bench.sample("one", &[(1, 4096), (2, 500_000), (3, 500_000)]);
    let two = bench.sample("two", &[(9, 4096), (3, 500_000), (2, 500_000)]);
    one.publish_to(&store).await;
    let second = two.publish_to(&store).await;
    assert_eq!(second.progress.reused_bytes, 1_000_000);
    assert!(second.progress.stored_bytes <= 4096);
    let again = two.publish_to(&store).await;
    assert!(!again.created);
    assert_eq!(bench.packs().len(), 2);
    let host = bench.store().await;
    assert_eq!(two.read_from(&host).await, two.bytes);
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_publishers_agree() {
    let bench = Bench::new();
    let stores = futures_util::future::join_all((0..6).map(|_| bench.store())).await;
    // Each publishes an image of its own and one that all publish.
    let shared = bench.sample("shared", &[(1, 4096), (2, 700_000), (3, 300_000)]);
    let own: Vec<_> = (0..6)
        .map(|number| {
            bench.sample(
                &format!("own{number}"),
                &[(100 + number, 4096), (2, 700_000), (7, 4096)],
            )
        })
        .collect();
    let work = stores.iter().zip(&own).map(|(store, own)| {
        let shared = &shared;
        async move {
            for sample in [own, shared] {
                sample.publish_to(store).await;
            }
        }
    });
    futures_util::future::join_all(work).await;
    let host = bench.store().await;
    assert_eq!(host.components().await.unwrap().len(), 7);
    for sample in own.iter().chain([&shared]) {
        assert_eq!(sample.read_from(&host).await, sample.bytes);
    }
    assert_eq!(host.verify(&|_| {}).await.unwrap().findings, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changed_is_not_published() {
    let bench = Bench::new();
    let store = bench.store().await;
    let sample = bench.sample("app", &[(1, 4096), (2, 4096)]);
    let mut bytes = sample.bytes.clone();
    bytes[5000] ^= 1;
    std::fs::write(&sample.path, &bytes).unwrap();
    let changed = store
        .publish(&sample.component, &sample.path, &sample.index, &|_| {})
        .await;
    assert!(matches!(
        changed,
        Err(StoreError::ImageChanged { chunk_no: 1, .. })
    ));
    std::fs::write(&sample.path, &bytes[..5000]).unwrap();
    let short = store
        .publish(&sample.component, &sample.path, &sample.index, &|_| {})
        .await;
    assert!(matches!(
        short,
        Err(StoreError::ImageChanged { chunk_no: 1, .. })
    ));
    let mut other = sample.component.clone();
    other.image.bytes += 4096;
    let inconsistent = store
        .publish(&other, &sample.path, &sample.index, &|_| {})
        .await;
    assert!(matches!(inconsistent, Err(StoreError::Inconsistent(_))));
    assert!(store.components().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn vanished_components_and_images_are_named() {
    let bench = Bench::new();
    let store = bench.store().await;
    let sample = bench.published(&store, "app", 3, 4096).await;
    let id = sample.component.id();
    store.remove_component(id).await.unwrap();
    assert!(
        matches!(store.component(id).await, Err(StoreError::ComponentMissing { id: gone }) if gone == id)
    );
    assert!(matches!(
        store.remove_component(id).await,
        Err(StoreError::ComponentMissing { .. })
    ));
    assert!(store.components().await.unwrap().is_empty());
    let nowhere = bench.sample("nowhere", &[(9, 4096)]);
    let unknown = store.open_image(nowhere.image()).await;
    assert!(matches!(unknown, Err(StoreError::ImageUnknown { .. })));
    store.add_image(nowhere.component.image).unwrap();
    let nowhere = nowhere.image();
    let error = store
        .read_image(nowhere, Extent::new(0, 1), Priority::Demand)
        .await
        .unwrap_err();
    assert!(
        matches!(error, StoreError::ImageMissing { image } if image == nowhere),
        "{error}"
    );
    assert!(error.to_string().contains("lock again"));
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_features_are_respected() {
    let bench = Bench::new();
    let sample = bench.published(&bench.store().await, "app", 3, 4096).await;
    let path = bench.repository_path().join("forelay-repository.json");
    let original = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        original.replace(
            "\"ro_compatible\": []",
            "\"ro_compatible\": [\"signatures\"]",
        ),
    )
    .unwrap();
    let store = bench.store().await;
    assert_eq!(store.components().await.unwrap().len(), 1);
    let refused = store
        .publish(&sample.component, &sample.path, &sample.index, &|_| {})
        .await;
    assert!(
        matches!(refused, Err(StoreError::ReadOnly { features }) if features == ["signatures"])
    );
    std::fs::write(
        &path,
        original.replace("\"sha256\"", "\"sha256\", \"blake9\""),
    )
    .unwrap();
    let config = forelay_store::StoreConfig {
        repository: bench.faults.clone(),
        cache_dir: bench.dir.path().join("c"),
        cache_cap_bytes: 1 << 20,
        fetch: Default::default(),
    };
    let store = forelay_store::Store::open(config).await.unwrap();
    let error = store.components().await.expect_err("it must be refused");
    assert!(store.probe().await.is_err());
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(
        cause.contains("blake9") && cause.contains("update forelay"),
        "{cause}"
    );
}

#[tokio::test]
async fn a_repository_that_is_away_is_told_and_nothing_is_made_in_its_place() {
    let bench = Bench::new();
    let sample = bench.sample("a", &[(1, 100_000)]);
    let store = bench.store().await;
    sample.publish_to(&store).await;
    let (here, away) = (bench.repository_path(), bench.dir.path().join("away"));
    std::fs::rename(&here, &away).unwrap();
    let other = bench.dir.path().join("other-cache");
    let config = forelay_store::StoreConfig {
        repository: bench.faults.clone(),
        cache_dir: other,
        cache_cap_bytes: 1 << 20,
        fetch: Default::default(),
    };
    let store = forelay_store::Store::open(config).await.unwrap();
    let refused = [
        store.components().await.map(drop),
        store.component(sample.component.id()).await.map(drop),
        store.gc(&Default::default()).await.map(drop),
        store
            .publish(&sample.component, &sample.path, &sample.index, &|_| {})
            .await
            .map(drop),
        store.probe().await,
    ];
    for refused in refused {
        assert!(
            matches!(refused, Err(StoreError::NoRepository { .. })),
            "{refused:?}"
        );
    }
    assert!(!here.exists(), "nothing is made");
    assert!(store.initialise().await.is_err() && !here.exists());
    std::fs::rename(&away, &here).unwrap();
    assert_eq!(store.components().await.unwrap().len(), 1);
}
