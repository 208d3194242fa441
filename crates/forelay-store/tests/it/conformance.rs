//! What every repository must do, wherever it is: one suite, run against each that there is.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use forelay_image::{Digest, Extent};
use forelay_store::gc::GcOptions;
use forelay_store::repository::{Body, Put};
use forelay_store::{
    DirectoryRepository, FetchConfig, Priority, Repository, RepositoryError, Store, StoreConfig,
    layout,
};
use futures_util::FutureExt as _;
use futures_util::future::join_all;

use crate::support::{Faulty, Sample, content, sample};

/// Opens the place under test, which is empty at first, as one more client of it.
pub type Open<'a> = &'a (dyn Fn() -> Arc<dyn Repository> + Sync);

/// More than any object here has.
pub const MOST: u64 = 64 << 20;

/// The suite. `open` may be called any number of times.
pub async fn conforms(open: Open<'_>) {
    let dir = tempfile::tempdir().unwrap();
    objects_are_put_once_and_read_in_parts(open).await;
    large_objects_are_whole(open, dir.path()).await;
    clients_agree(open).await;
    what_is_cut_short_is_not_there(open).await;
    let host = Hosts { open, dir: &dir };
    components_live(&host).await;
    failures_leave_nothing_visible(&host).await;
    wrong_bytes_are_refused(&host).await;
}

async fn objects_are_put_once_and_read_in_parts(open: Open<'_>) {
    let (one, other) = (open(), open());
    assert!(one.get("a/absent", MOST).await.unwrap_err().is_not_found());
    let absent = one.get_range("a/absent", Extent::new(0, 1)).await;
    assert!(absent.unwrap_err().is_not_found());
    assert!(one.inspect("a/absent").await.unwrap_err().is_not_found());
    one.delete("a/absent").await.unwrap();
    assert_eq!(one.list("a/").await.unwrap(), Vec::<String>::new());
    for key in ["", "a//b", "../a", "a/../b", "/a", "a/", "a/.b", "a b"] {
        let refused = one.get(key, MOST).await;
        assert!(matches!(refused, Err(RepositoryError::Key(_))), "{key:?}");
        let refused = one.put_if_absent(key, vec![1].into()).await;
        assert!(matches!(refused, Err(RepositoryError::Key(_))), "{key:?}");
    }

    let bytes = content(1, 300_000);
    let put = one.put_if_absent("a/one.x", bytes.clone().into()).await;
    assert_eq!(put.unwrap(), Put::Created);
    let again = other.put_if_absent("a/one.x", vec![7; 10].into()).await;
    assert_eq!(again.unwrap(), Put::Present);
    assert_eq!(other.get("a/one.x", MOST).await.unwrap(), bytes);
    assert_eq!(other.get("a/one.x", 300_000).await.unwrap(), bytes);
    let larger = other.get("a/one.x", 299_999).await.unwrap_err();
    assert!(
        matches!(larger, RepositoryError::TooLarge { .. }),
        "{larger}"
    );
    for (offset, len) in [
        (0, 1),
        (0, 300_000),
        (4095, 2),
        (123_456, 70_000),
        (299_999, 1),
    ] {
        let part = other.get_range("a/one.x", Extent::new(offset, len)).await;
        assert_eq!(
            part.unwrap(),
            bytes[offset as usize..(offset + len) as usize]
        );
    }
    for (offset, len) in [(0, 300_001), (299_999, 2), (300_000, 1), (1 << 40, 9)] {
        let beyond = other.get_range("a/one.x", Extent::new(offset, len)).await;
        let beyond = beyond.unwrap_err();
        assert!(
            matches!(beyond, RepositoryError::Truncated { .. }),
            "{beyond}"
        );
    }
    let found = other.inspect("a/one.x").await.unwrap();
    assert_eq!(found.bytes, 300_000);
    let now = SystemTime::now();
    let day = Duration::from_secs(24 * 3600);
    assert!(found.modified > now - day && found.modified < now + day);

    // Empty objects exist; folders are apart; listings are sorted.
    for key in ["a/two", "b/one.x", "a/b/c", "top", "a/empty"] {
        let body = if key == "a/empty" {
            vec![]
        } else {
            vec![1, 2, 3]
        };
        one.put_if_absent(key, body.into()).await.unwrap();
    }
    assert_eq!(other.get("a/empty", MOST).await.unwrap().len(), 0);
    assert_eq!(other.inspect("a/empty").await.unwrap().bytes, 0);
    let listed = other.list("a/").await.unwrap();
    assert_eq!(listed, ["a/empty", "a/one.x", "a/two"]);
    assert_eq!(other.list("b/").await.unwrap(), ["b/one.x"]);

    // Same bytes, another key: deleting one leaves the other.
    one.delete("a/two").await.unwrap();
    one.delete("a/two").await.unwrap();
    assert!(open().get("a/two", MOST).await.unwrap_err().is_not_found());
    assert_eq!(open().get("b/one.x", MOST).await.unwrap()[..], [1, 2, 3]);
    assert_eq!(open().list("a/").await.unwrap(), ["a/empty", "a/one.x"]);
    let back = one.put_if_absent("a/two", vec![9].into()).await.unwrap();
    assert_eq!(back, Put::Created);
    assert_eq!(one.get("a/two", MOST).await.unwrap()[..], [9]);
    assert_eq!(open().get("a/two", MOST).await.unwrap()[..], [9]);
}

async fn large_objects_are_whole(open: Open<'_>, dir: &Path) {
    let bytes = content(2, (24 << 20) + 777);
    let path = dir.join("large");
    std::fs::write(&path, &bytes).unwrap();
    let put = open().put_if_absent("large/one", Body::File(path)).await;
    assert_eq!(put.unwrap(), Put::Created);
    let other = open();
    assert_eq!(
        Digest::of(&other.get("large/one", MOST).await.unwrap()),
        Digest::of(&bytes)
    );
    let parts = (0..6).map(|number| {
        let extent = Extent::new(number * (4 << 20) + 33, 1 << 20);
        let other = &other;
        async move { (extent, other.get_range("large/one", extent).await.unwrap()) }
    });
    for (extent, part) in join_all(parts).await {
        assert!(part == bytes[extent.offset as usize..extent.end() as usize]);
    }
    other.delete("large/one").await.unwrap();
}

async fn clients_agree(open: Open<'_>) {
    let clients: Vec<_> = (0..8).map(|_| open()).collect();
    // The same bytes by all: all succeed.
    let same = content(3, 100_000);
    let puts = clients
        .iter()
        .map(|one| one.put_if_absent("race/same", same.clone().into()));
    let puts: Vec<Put> = join_all(puts)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert!(puts.contains(&Put::Created));
    assert_eq!(open().get("race/same", MOST).await.unwrap(), same);
    // Different bytes: what is there afterwards is one writer's, whole.
    let bodies: Vec<_> = (0..8).map(|seed| content(10 + seed, 50_000)).collect();
    let puts = clients.iter().zip(&bodies);
    let puts = puts.map(|(one, body)| one.put_if_absent("race/other", body.clone().into()));
    let puts: Vec<Put> = join_all(puts)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    assert!(puts.contains(&Put::Created));
    let found = open().get("race/other", MOST).await.unwrap();
    assert!(bodies.iter().any(|body| *body == found));
    assert_eq!(
        open().list("race/").await.unwrap(),
        ["race/other", "race/same"]
    );
}

async fn what_is_cut_short_is_not_there(open: Open<'_>) {
    let bytes = content(4, 3 << 20);
    let one = open();
    for polls in 0..6 {
        let put = one.put_if_absent("cut/short", bytes.clone().into());
        let mut put = Box::pin(put);
        for _ in 0..polls {
            if (&mut put).now_or_never().is_some() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(put);
        match open().get("cut/short", MOST).await {
            Ok(found) => assert_eq!(found, bytes),
            Err(error) => assert!(error.is_not_found(), "{error}"),
        }
    }
    one.put_if_absent("cut/short", bytes.clone().into())
        .await
        .unwrap();
    assert_eq!(open().get("cut/short", MOST).await.unwrap(), bytes);
}

/// Hosts with empty caches, whose repository is the place under test.
struct Hosts<'a> {
    open: Open<'a>,
    dir: &'a tempfile::TempDir,
}

impl Hosts<'_> {
    async fn with(&self, repository: Arc<dyn Repository>) -> Store {
        let fetch = FetchConfig {
            first_backoff: Duration::from_millis(1),
            longest_backoff: Duration::from_millis(4),
            ..FetchConfig::default()
        };
        let config = StoreConfig {
            repository,
            cache_dir: tempfile::tempdir_in(self.dir).unwrap().keep(),
            cache_cap_bytes: 1 << 30,
            fetch,
        };
        Store::open(config).await.unwrap()
    }

    async fn one(&self) -> Store {
        let store = self.with((self.open)()).await;
        store.initialise().await.unwrap();
        store
    }

    fn sample(&self, name: &str, chunks: &[(u64, usize)]) -> Sample {
        sample(self.dir.path(), name, chunks)
    }
}

async fn ids(store: &Store) -> BTreeSet<Digest> {
    let listed = store.components().await.unwrap();
    listed.iter().map(|component| component.id()).collect()
}

async fn reads_back(host: &Store, sample: &Sample) {
    let _held = host.hold_component(sample.component.id()).await.unwrap();
    assert!(sample.read_from(host).await == sample.bytes);
}

async fn components_live(hosts: &Hosts<'_>) {
    let (one, other) = tokio::join!(hosts.one(), hosts.one());
    let shared: &[(u64, usize)] = &[(1, 4096), (2, 700_000), (3, 300_000)];
    let both = hosts.sample("both", shared);
    let apart = hosts.sample("apart", &[(21, 4096), (2, 700_000), (22, 1 << 20)]);
    tokio::join!(both.publish_to(&one), both.publish_to(&other));
    let second = apart.publish_to(&other).await;
    assert_eq!(
        second.progress.reused_bytes, 700_000,
        "chunks are stored once"
    );
    let host = hosts.one().await;
    let all: BTreeSet<_> = [both.component.id(), apart.component.id()].into();
    assert_eq!(ids(&host).await, all);
    tokio::join!(reads_back(&host, &both), reads_back(&host, &apart));
    assert_eq!(host.verify(&|_| {}).await.unwrap().findings, []);

    host.remove_component(apart.component.id()).await.unwrap();
    assert_eq!(ids(&one).await, [both.component.id()].into());
    let now = GcOptions {
        images_in_use: Vec::new(),
        grace: Duration::ZERO,
        dry_run: false,
    };
    // Chunks, locations, then the pack that they named: each is condemned, then deleted.
    let mut deleted = 0;
    for _ in 0..4 {
        deleted += one.gc(&now).await.unwrap().deleted;
    }
    assert_eq!(deleted, 2, "the image and its pack");
    let host = hosts.one().await;
    reads_back(&host, &both).await;
    assert_eq!(host.verify(&|_| {}).await.unwrap().findings, []);
}

/// A publication that fails at any of its calls leaves nothing visible, and goes on later.
async fn failures_leave_nothing_visible(hosts: &Hosts<'_>) {
    let before = ids(&hosts.one().await).await;
    let watcher = hosts.one().await;
    let late = hosts.sample("late", &[(31, 4096), (32, 200_000)]);
    let mut calls = 0;
    let published = loop {
        let faults = Arc::new(Faulty::new((hosts.open)()));
        let store = hosts.with(faults.clone()).await;
        faults.fail_after(calls, -1);
        let put = store
            .publish(&late.component, &late.path, &late.index, &|_| {})
            .await;
        match put {
            Ok(published) => break published,
            Err(error) => {
                let seen = ids(&watcher).await;
                // What comes after the last step only looks once more.
                if seen != before {
                    assert!(seen.contains(&late.component.id()), "{error}");
                    reads_back(&hosts.one().await, &late).await;
                }
            }
        }
        calls += 1;
        assert!(calls < 100, "never published");
    };
    assert!(calls > 5, "{calls} calls only");
    assert_eq!(published.id, late.component.id());
    reads_back(&hosts.one().await, &late).await;
    let report = watcher.verify(&|_| {}).await.unwrap();
    assert_eq!(report.findings, []);
}

async fn wrong_bytes_are_refused(hosts: &Hosts<'_>) {
    let repository = (hosts.open)();
    let sample = hosts.sample("wrong", &[(41, 4096), (42, 100_000)]);
    let publisher = hosts.one().await;
    sample.publish_to(&publisher).await;
    let map = publisher.open_image(sample.image()).await.unwrap();
    let key = layout::pack(map.locations.packs[0]);
    let good = repository.get(&key, MOST).await.unwrap();
    let mut flipped = good.to_vec();
    flipped[5000] ^= 1;
    let short = good[..good.len() - 1000].to_vec();
    for bad in [Some(flipped), Some(short), None] {
        repository.delete(&key).await.unwrap();
        if let Some(bad) = bad {
            repository.put_if_absent(&key, bad.into()).await.unwrap();
        }
        let host = hosts.one().await;
        let _held = host.hold_component(sample.component.id()).await.unwrap();
        let whole = Extent::new(0, sample.bytes.len() as u64);
        let read = host
            .read_image(sample.image(), whole, Priority::Demand)
            .await;
        let error = read.unwrap_err().to_string();
        assert!(
            error.contains("corrupted") || error.contains("gone"),
            "{error}"
        );
    }
    repository
        .put_if_absent(&key, good.to_vec().into())
        .await
        .unwrap();
    reads_back(&hosts.one().await, &sample).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("repository");
    conforms(&|| Arc::new(DirectoryRepository::create(&path).unwrap())).await;
}
