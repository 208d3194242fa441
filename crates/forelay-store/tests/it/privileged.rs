//! Tests that need root: a full disk, on a tiny tmpfs of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use forelay_image::Extent;
use forelay_store::{
    DirectoryRepository, Priority, RepositoryError, Store, StoreConfig, StoreError,
};

use crate::support::{Bench, sample};

/// A mounted tmpfs that goes when this is dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(path: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(path)
            .output();
        mount
            .is_ok_and(|output| output.status.success())
            .then(|| Self(path.to_owned()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn config(repository: Arc<DirectoryRepository>, cache_dir: PathBuf) -> StoreConfig {
    StoreConfig {
        repository,
        cache_dir,
        cache_cap_bytes: 1 << 30,
        fetch: Default::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_full_repository_disk_publishes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Tmpfs::mount(&dir.path().join("small"), "1M") else {
        println!(
            "SKIPPED privileged_a_full_repository_disk_publishes_nothing: cannot mount a tmpfs"
        );
        return;
    };
    let repository = Arc::new(DirectoryRepository::create(disk.0.join("repository")).unwrap());
    let store = Store::open(config(repository, dir.path().join("cache")))
        .await
        .unwrap();
    store.initialise().await.unwrap();
    let small = sample(dir.path(), "small", &[(1, 4096), (2, 100_000)]);
    small.publish_to(&store).await;
    let big = sample(
        dir.path(),
        "big",
        &[(3, 1 << 20), (4, 1 << 20), (5, 1 << 20)],
    );
    let error = store
        .publish(&big.component, &big.path, &big.index, &|_| {})
        .await
        .unwrap_err();
    let StoreError::Repository(RepositoryError::NoSpace { path, bytes, .. }) = &error else {
        panic!("{error}")
    };
    assert!(path.starts_with(&disk.0) && *bytes > 1 << 20, "{error}");
    assert!(error.to_string().contains("nothing was published"));
    assert_eq!(store.components().await.unwrap().len(), 1);
    assert_eq!(
        std::fs::read_dir(disk.0.join("repository/.tmp"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(store.verify(&|_| {}).await.unwrap().findings, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_full_cache_disk_only_costs_caching() {
    let bench = Bench::new();
    let Some(disk) = Tmpfs::mount(&bench.dir.path().join("small"), "1M") else {
        println!("SKIPPED privileged_a_full_cache_disk_only_costs_caching: cannot mount a tmpfs");
        return;
    };
    let sample = bench
        .published(&bench.store().await, "app", 8, 400_000)
        .await;
    let store = bench.store_in(&disk.0.join("cache")).await;
    let whole = Extent::new(0, sample.bytes.len() as u64);
    for _ in 0..2 {
        let read = store
            .read_image(sample.image(), whole, Priority::Demand)
            .await
            .unwrap();
        assert_eq!(read, sample.bytes);
    }
    // Bytes are handed out first and kept on disk after that: here, as many as fit.
    while store.disk_cache().counters().chunks == 0 {
        tokio::task::yield_now().await;
    }
}
