//! Measures the store on this machine: publishing, a cold prefetch and cold demands over
//! a throttled repository (20 ms, 100 MB/s), warm reads from the disk cache.
//!
//! `cargo run --release -p forelay-store --example fetch_speed -- [MiB]`

use std::sync::Arc;
use std::time::{Duration, Instant};

use forelay_image::component::{ImageRef, Role};
use forelay_image::{Chunk, ChunkIndex, Component, Digest, Extent};
use forelay_store::{
    DirectoryRepository, Prefetch, PrefetchItem, Priority, Repository, Store, StoreConfig,
    Throttled,
};
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

const LATENCY: Duration = Duration::from_millis(20);
const BANDWIDTH_BYTES_PER_S: u64 = 100_000_000;

/// Bytes that do not compress, so that stored bytes are image bytes.
fn noise(bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    ChaCha8Rng::seed_from_u64(1).fill_bytes(&mut out);
    out
}

fn component(bytes: &[u8], chunk_bytes: &[usize]) -> (Component, ChunkIndex) {
    let mut chunks = Vec::new();
    let mut offset = 0;
    for len in chunk_bytes.iter().cycle() {
        let len = (*len).min(bytes.len() - offset);
        if len == 0 {
            break;
        }
        let digest = Digest::of(&bytes[offset..offset + len]);
        chunks.push(Chunk {
            offset: offset as u64,
            len: len as u32,
            digest,
        });
        offset += len;
    }
    let digest = Digest::of(bytes);
    let index = ChunkIndex {
        image: digest,
        image_bytes: bytes.len() as u64,
        chunks,
    };
    let image = ImageRef {
        digest,
        bytes: bytes.len() as u64,
        metadata_bytes: 4096,
        inodes: 1,
        chunk_index: index.digest(),
    };
    let component = Component::new("speed", "1", Role::Package, "amd64", image);
    (component, index)
}

fn report(what: &str, bytes: u64, took: Duration) {
    let rate = bytes as f64 / 1e6 / took.as_secs_f64();
    println!(
        "{what:<44} {:>9.1} ms {rate:>9.1} MB/s",
        took.as_secs_f64() * 1e3
    );
}

async fn drain(mut stream: Prefetch) -> u64 {
    let mut bytes = 0;
    while let Some(item) = stream.next().await {
        match item {
            PrefetchItem::Arrived { part, .. } => bytes += part.bytes.len() as u64,
            PrefetchItem::Failed { error, .. } => panic!("{error}"),
            PrefetchItem::Ended { .. } => {}
        }
    }
    bytes
}

#[tokio::main]
async fn main() {
    let mib: usize = std::env::args()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(128);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let bytes = noise(mib << 20);
    let path = dir.path().join("image");
    std::fs::write(&path, &bytes).expect("writing the image");
    // Sizes such as files have: many small, some large.
    let (component, index) =
        component(&bytes, &[4096, 12288, 40960, 8192, 262_144, 20480, 1 << 20]);
    let inner: Arc<dyn Repository> =
        Arc::new(DirectoryRepository::create(dir.path().join("repository")).expect("a repository"));
    let open = |name: &str, repository: Arc<dyn Repository>| {
        Store::open(StoreConfig {
            repository,
            cache_dir: dir.path().join(name),
            cache_cap_bytes: 8 << 30,
            fetch: Default::default(),
        })
    };
    let publisher = open("publisher", inner.clone()).await.expect("a store");
    publisher.initialise().await.expect("a new repository");
    let start = Instant::now();
    publisher
        .publish(&component, &path, &index, &|_| {})
        .await
        .expect("published");
    report(
        "publish (hash, zstd, sync)",
        bytes.len() as u64,
        start.elapsed(),
    );

    let image = component.image.digest;
    let whole = Extent::new(0, component.image.bytes);
    let slow = Arc::new(Throttled::new(inner, LATENCY, Some(BANDWIDTH_BYTES_PER_S)));
    let host = open("host", slow.clone()).await.expect("a store");
    host.add_image(component.image).expect("the only one");
    let start = Instant::now();
    let got = drain(host.scheduler().prefetch(vec![(image, whole)])).await;
    report("cold prefetch, in sequence", got, start.elapsed());
    println!(
        "  {} requests for {} chunks",
        host.scheduler().counters().prefetch_requests,
        index.chunks.len()
    );

    for round in ["warm stream", "warm stream again"] {
        let start = Instant::now();
        let got = drain(host.scheduler().prefetch(vec![(image, whole)])).await;
        report(round, got, start.elapsed());
    }
    let start = Instant::now();
    let mut offset = 0;
    while offset < whole.len {
        let extent = Extent::new(offset, (4 << 20).min(whole.len - offset));
        assert!(host.try_cached(image, extent).is_some());
        offset += extent.len;
    }
    report(
        "warm try_cached, 4 MiB, one thread",
        whole.len,
        start.elapsed(),
    );
    let start = Instant::now();
    let count = 2000u64;
    for number in 0..count {
        let offset = (number * 7_919 * 4096) % (whole.len - 131_072);
        assert!(
            host.try_cached(image, Extent::new(offset, 131_072))
                .is_some()
        );
    }
    println!(
        "warm try_cached, 128 KiB at random: {:.1} us each",
        start.elapsed().as_secs_f64() * 1e6 / count as f64
    );

    let scattered: Vec<(Digest, Extent)> = (0..400)
        .map(|number| {
            (
                image,
                Extent::new(
                    number * 7_919 * 4096 % (whole.len - 65536) / 4096 * 4096,
                    65536,
                ),
            )
        })
        .collect();
    let host = open("scattered", slow.clone()).await.expect("a store");
    host.add_image(component.image).expect("the only one");
    let start = Instant::now();
    drain(host.scheduler().prefetch(scattered)).await;
    let counters = host.scheduler().counters();
    report(
        "cold prefetch, 400 scattered extents",
        counters.repository_bytes(),
        start.elapsed(),
    );
    println!(
        "  {} requests for {} chunks",
        counters.prefetch_requests, counters.prefetch_chunks
    );

    for (what, busy) in [("idle", false), ("during a prefetch", true)] {
        let host = open(&format!("demand-{busy}"), slow.clone())
            .await
            .expect("a store");
        host.open_image(image).await.expect("opened");
        let stream =
            busy.then(|| tokio::spawn(drain(host.scheduler().prefetch(vec![(image, whole)]))));
        let mut took = Vec::new();
        for number in 0..20u64 {
            let offset = whole.len - (number + 1) * 2_000_000;
            let start = Instant::now();
            host.read_image(image, Extent::new(offset, 4096), Priority::Demand)
                .await
                .expect("read");
            took.push(start.elapsed());
        }
        took.sort();
        println!(
            "cold demand of one page, {what}: median {:.1} ms, worst {:.1} ms",
            took[10].as_secs_f64() * 1e3,
            took[19].as_secs_f64() * 1e3
        );
        if let Some(stream) = stream {
            stream.abort();
        }
    }
}
