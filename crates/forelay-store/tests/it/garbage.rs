//! Garbage collection.

use std::path::PathBuf;
use std::time::Duration;

use forelay_store::gc::GcOptions;

use crate::support::Bench;

fn at_once() -> GcOptions {
    GcOptions {
        grace: Duration::ZERO,
        ..GcOptions::default()
    }
}

/// All files of the repository.
fn files(bench: &Bench) -> Vec<PathBuf> {
    let mut pending = vec![bench.repository_path()];
    let mut files = Vec::new();
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => pending.push(path),
                false => files.push(path),
            }
        }
    }
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nothing_refers_to_goes_in_two_steps() {
    let bench = Bench::new();
    let store = bench.store().await;
    let kept = bench.sample("kept", &[(1, 4096), (2, 200_000)]);
    let gone = bench.sample("gone", &[(5, 4096), (6, 300_000), (2, 200_000)]);
    for sample in [&kept, &gone] {
        sample.publish_to(&store).await;
    }
    let nothing = store.gc(&at_once()).await.unwrap();
    assert_eq!(
        (nothing.condemned, nothing.deleted, nothing.live_images),
        (0, 0, 2)
    );
    store.remove_component(gone.component.id()).await.unwrap();
    // In use by a lock: stays.
    let in_use = GcOptions {
        images_in_use: vec![gone.component.image],
        ..at_once()
    };
    assert_eq!(store.gc(&in_use).await.unwrap().condemned, 0);
    // What a run would do is told, as often as one asks, and not done.
    let dry = GcOptions {
        dry_run: true,
        ..at_once()
    };
    let before = files(&bench);
    let told = store.gc(&dry).await.unwrap();
    assert_eq!((told.condemned, told.deleted), (1, 0), "{told:?}");
    // The image and the pack that it has for itself; the other is the kept one's, too.
    assert_eq!(told.unused, 2, "{told:?}");
    assert!(told.unused_bytes > 100_000, "{told:?}");
    assert_eq!(store.gc(&dry).await.unwrap(), told);
    assert_eq!(files(&bench), before);
    // The locations hold the packs, so images go first.
    assert_eq!(store.gc(&at_once()).await.unwrap().condemned, 1);
    let before = files(&bench);
    let told = store.gc(&dry).await.unwrap();
    assert_eq!((told.condemned, told.deleted), (0, 1), "{told:?}");
    assert_eq!(files(&bench), before);
    let second = store.gc(&at_once()).await.unwrap();
    assert_eq!((second.deleted, second.unused), (1, 0));
    assert_eq!(second.freed_bytes, told.freed_bytes);
    assert_eq!(store.gc(&at_once()).await.unwrap().condemned, 1);
    let last = store.gc(&at_once()).await.unwrap();
    assert!(last.deleted == 1 && last.freed_bytes > 100_000, "{last:?}");
    assert_eq!(bench.packs().len(), 1);
    let host = bench.store().await;
    assert_eq!(kept.read_from(&host).await, kept.bytes);
    assert_eq!(host.verify(&|_| {}).await.unwrap().findings, []);
    assert!(host.open_image(gone.image()).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn grace_protects_the_young_and_publication_revives() {
    let bench = Bench::new();
    let store = bench.store().await;
    let sample = bench.published(&store, "app", 5, 50_000).await;
    store.remove_component(sample.component.id()).await.unwrap();
    let patient = GcOptions {
        grace: Duration::from_secs(3600),
        ..GcOptions::default()
    };
    assert_eq!(store.gc(&patient).await.unwrap().condemned, 0);
    for _ in 0..3 {
        store.gc(&at_once()).await.unwrap();
    }
    // The image is deleted, its pack condemned: the pack is not reused but put again.
    let again = sample.publish_to(&store).await;
    assert_eq!(again.progress.reused_bytes, 0);
    for _ in 0..4 {
        store.gc(&at_once()).await.unwrap();
    }
    let host = bench.store().await;
    assert_eq!(sample.read_from(&host).await, sample.bytes);
    assert_eq!(host.verify(&|_| {}).await.unwrap().findings, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn unreadable_metadata_stops_the_collection() {
    let bench = Bench::new();
    let store = bench.store().await;
    let sample = bench.published(&store, "app", 2, 4096).await;
    let path = bench
        .repository_path()
        .join(format!("components/{}.json", sample.component.id().hex()));
    std::fs::write(&path, b"{}").unwrap();
    assert!(store.gc(&at_once()).await.is_err());
    assert_eq!(bench.packs().len(), 1);
}
