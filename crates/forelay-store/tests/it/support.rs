//! What the tests share: images of reproducible bytes, a store in a temporary directory,
//! and a repository that misbehaves on request.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use forelay_image::component::{ImageRef, Role};
use forelay_image::{Chunk, ChunkIndex, Component, Digest, Extent};
use forelay_store::publish::Published;
use forelay_store::repository::{Body, Description, Object, Put};
use forelay_store::{
    DirectoryRepository, FetchConfig, Limits, Priority, Repository, RepositoryError, Store,
    StoreConfig,
};
use parking_lot::Mutex;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// Reproducible bytes, half of them compressible.
pub fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut out = Vec::with_capacity(len + 16);
    while out.len() < len {
        out.extend_from_slice(&random.next_u64().to_le_bytes());
        out.extend_from_slice(b"the same");
    }
    out.truncate(len);
    out
}

/// An image made of the contents with these seeds and lengths, one chunk each.
pub struct Sample {
    pub component: Component,
    pub index: ChunkIndex,
    pub bytes: Vec<u8>,
    pub path: PathBuf,
}

impl Sample {
    pub fn image(&self) -> Digest {
        self.component.image.digest
    }

    pub fn extent(&self, chunk_no: usize) -> Extent {
        self.index.chunks[chunk_no].extent()
    }

    pub async fn publish_to(&self, store: &Store) -> Published {
        let published = store.publish(&self.component, &self.path, &self.index, &|_| {});
        published.await.unwrap()
    }

    /// The whole image as a store reads it.
    pub async fn read_from(&self, store: &Store) -> Bytes {
        let whole = Extent::new(0, self.bytes.len() as u64);
        let read = store.read_image(self.image(), whole, Priority::Demand);
        read.await.unwrap()
    }

    pub fn part(&self, extent: Extent) -> &[u8] {
        &self.bytes[extent.offset as usize..extent.end() as usize]
    }
}

pub fn sample(dir: &Path, name: &str, chunks: &[(u64, usize)]) -> Sample {
    let mut bytes = Vec::new();
    let mut list = Vec::new();
    for (seed, len) in chunks {
        let chunk = content(*seed, *len);
        list.push(Chunk {
            offset: bytes.len() as u64,
            len: *len as u32,
            digest: Digest::of(&chunk),
        });
        bytes.extend_from_slice(&chunk);
    }
    let image = Digest::of(&bytes);
    let index = ChunkIndex {
        image,
        image_bytes: bytes.len() as u64,
        chunks: list,
    };
    let path = dir.join(format!("{name}.erofs"));
    std::fs::write(&path, &bytes).unwrap();
    let component = Component::new(
        name,
        "1",
        Role::Package,
        "amd64",
        ImageRef {
            digest: image,
            bytes: bytes.len() as u64,
            metadata_bytes: chunks[0].1 as u64,
            inodes: 1,
            chunk_index: index.digest(),
        },
    );
    Sample {
        component,
        index,
        bytes,
        path,
    }
}

pub struct Bench {
    pub dir: tempfile::TempDir,
    pub faults: Arc<Faulty>,
    /// Images of the samples made so far.
    images: Mutex<Vec<ImageRef>>,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let inner = DirectoryRepository::create(dir.path().join("repository")).unwrap();
        let faults = Arc::new(Faulty::new(Arc::new(inner)));
        Self {
            dir,
            faults,
            images: Mutex::default(),
        }
    }

    pub fn repository_path(&self) -> PathBuf {
        self.dir.path().join("repository")
    }

    /// A store with a new, empty cache, to which all samples so far are known.
    pub async fn store(&self) -> Store {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let cache = self
            .dir
            .path()
            .join(format!("cache-{}", COUNT.fetch_add(1, Ordering::Relaxed)));
        self.store_in(&cache).await
    }

    pub async fn store_in(&self, cache: &Path) -> Store {
        self.store_with(cache, Limits::default()).await
    }

    pub async fn store_with(&self, cache: &Path, limits: Limits) -> Store {
        let fetch = FetchConfig {
            limits,
            first_backoff: Duration::from_millis(1),
            longest_backoff: Duration::from_millis(4),
            ..FetchConfig::default()
        };
        let config = StoreConfig {
            repository: self.faults.clone(),
            cache_dir: cache.to_owned(),
            cache_cap_bytes: 1 << 30,
            fetch,
        };
        let store = Store::open(config).await.unwrap();
        store.initialise().await.unwrap();
        for image in self.images.lock().iter() {
            store.add_image(*image).unwrap();
        }
        store
    }

    pub fn sample(&self, name: &str, chunks: &[(u64, usize)]) -> Sample {
        let sample = sample(self.dir.path(), name, chunks);
        self.images.lock().push(sample.component.image);
        sample
    }

    /// A published image of `count` chunks of `len` bytes.
    pub async fn published(&self, store: &Store, name: &str, count: u64, len: usize) -> Sample {
        let seed = u64::from(Digest::of(name.as_bytes()).as_bytes()[0]) << 32;
        let chunks: Vec<(u64, usize)> = (0..count).map(|number| (seed + number, len)).collect();
        let sample = self.sample(name, &chunks);
        sample.publish_to(store).await;
        sample
    }

    pub fn packs(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.repository_path().join("packs")) else {
            return vec![];
        };
        let mut packs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        packs.retain(|path| path.extension().is_some_and(|name| name == "pack"));
        packs.sort();
        packs
    }
}

/// Changes what arrives.
pub type Mangle = Box<dyn Fn(&str, Bytes) -> Bytes + Send + Sync>;

/// A repository that fails, waits and lies on request, and remembers its requests.
pub struct Faulty {
    inner: Arc<dyn Repository>,
    /// Calls that still succeed; negative: no limit.
    pub calls_left: AtomicI64,
    /// Calls that fail after that, before all succeed again; negative: no end.
    pub failures_left: AtomicI64,
    pub mangle: Mutex<Option<Mangle>>,
    pub ranges: Mutex<Vec<(String, Extent)>>,
    /// Ranged GETs wait for a permit if there is a gate.
    pub gate: Mutex<Option<Arc<tokio::sync::Semaphore>>>,
}

impl Faulty {
    pub fn new(inner: Arc<dyn Repository>) -> Self {
        Self {
            inner,
            calls_left: AtomicI64::new(-1),
            failures_left: AtomicI64::new(0),
            mangle: Mutex::new(None),
            ranges: Mutex::default(),
            gate: Mutex::new(None),
        }
    }

    /// Lets `calls` calls through, then fails `failures` (negative: for ever).
    pub fn fail_after(&self, calls: i64, failures: i64) {
        self.failures_left.store(failures, Ordering::SeqCst);
        self.calls_left.store(calls, Ordering::SeqCst);
    }

    pub fn heal(&self) {
        self.calls_left.store(-1, Ordering::SeqCst);
        *self.mangle.lock() = None;
    }

    fn call(&self, operation: &'static str, key: &str) -> Result<(), RepositoryError> {
        let left = self.calls_left.load(Ordering::SeqCst);
        if left < 0 {
            return Ok(());
        }
        if left > 0 {
            self.calls_left.fetch_sub(1, Ordering::SeqCst);
            return Ok(());
        }
        let failures = self.failures_left.load(Ordering::SeqCst);
        if failures == 0 {
            self.calls_left.store(-1, Ordering::SeqCst);
            return Ok(());
        }
        if failures > 0 {
            self.failures_left.fetch_sub(1, Ordering::SeqCst);
        }
        Err(RepositoryError::Transient {
            operation,
            key: key.to_owned(),
            source: "injected".into(),
        })
    }

    fn mangled(&self, key: &str, bytes: Bytes) -> Bytes {
        match &*self.mangle.lock() {
            Some(mangle) => mangle(key, bytes),
            None => bytes,
        }
    }
}

#[async_trait]
impl Repository for Faulty {
    fn describe(&self) -> Description {
        self.inner.describe()
    }

    async fn get(&self, key: &str, most_bytes: u64) -> Result<Bytes, RepositoryError> {
        self.call("reading", key)?;
        Ok(self.mangled(key, self.inner.get(key, most_bytes).await?))
    }

    async fn get_range(&self, key: &str, extent: Extent) -> Result<Bytes, RepositoryError> {
        self.ranges.lock().push((key.to_owned(), extent));
        let gate = self.gate.lock().clone();
        if let Some(gate) = gate {
            gate.acquire().await.unwrap().forget();
        }
        self.call("reading", key)?;
        Ok(self.mangled(key, self.inner.get_range(key, extent).await?))
    }

    async fn put_if_absent(&self, key: &str, body: Body) -> Result<Put, RepositoryError> {
        self.call("writing", key)?;
        self.inner.put_if_absent(key, body).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        self.call("listing", prefix)?;
        self.inner.list(prefix).await
    }

    async fn inspect(&self, key: &str) -> Result<Object, RepositoryError> {
        self.call("reading", key)?;
        self.inner.inspect(key).await
    }

    async fn delete(&self, key: &str) -> Result<(), RepositoryError> {
        self.call("deletion", key)?;
        self.inner.delete(key).await
    }
}

/// Whether all of an extent is in a host's disk cache.
pub fn is_on_disk(host: &forelay_store::Store, image: Digest, extent: Extent) -> bool {
    let absent = host.scheduler().absent_on_disk(image);
    absent.is_some_and(|absent| absent.iter().all(|one| one.intersection(&extent).is_none()))
}
