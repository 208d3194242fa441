//! Tests of the disk cache: against a model, after crashes, with corrupted files.

use proptest::prelude::*;
use rand::SeedableRng as _;
use rand_chacha::ChaCha8Rng;

use super::*;

/// Distinct, reproducible bytes.
fn content(seed: u32, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    ChaCha8Rng::seed_from_u64(seed.into()).fill_bytes(&mut out);
    out
}

fn chunk_len(seed: u32) -> usize {
    [1, 4096, 5000, 65_536, 65_537, 200_000][seed as usize % 6]
}

fn chunk(seed: u32) -> (Digest, Vec<u8>) {
    let bytes = content(seed, chunk_len(seed));
    (Digest::of(&bytes), bytes)
}

fn whole(cache: &DiskCache, seed: u32) -> Option<Bytes> {
    let (digest, bytes) = chunk(seed);
    let found = cache.read(digest, 0, bytes.len() as u32)?;
    assert_eq!(found, bytes, "chunk {seed}");
    Some(found)
}

fn disk_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(dir.join("segments")).unwrap().flatten();
    let data = entries.filter(|entry| entry.path().extension().is_some_and(|name| name == "data"));
    data.map(|entry| entry.metadata().unwrap().blocks() * 512)
        .sum()
}

#[test]
fn parts_of_chunks_are_checked_block_by_block() {
    let dir = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(dir.path(), 10 << 20).unwrap();
    let (digest, bytes) = chunk(5);
    cache.insert(digest, &bytes).unwrap();
    for (start, len) in [
        (0, 1),
        (65_535, 2),
        (65_536, 65_536),
        (131_000, 69_000),
        (199_999, 1),
        (0, 200_000),
    ] {
        let found = cache.read(digest, start, len).unwrap();
        assert_eq!(
            found,
            bytes[start as usize..(start + len) as usize],
            "{start} {len}"
        );
    }
    assert!(cache.read(digest, 199_999, 2).is_none(), "beyond the end");
    assert!(cache.read(digest, u32::MAX, u32::MAX).is_none());
    assert_eq!(cache.counters().corrupt, 0);
}

#[test]
fn a_corrupt_chunk_is_dropped_and_can_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(dir.path(), 10 << 20).unwrap();
    for seed in 0..6 {
        let (digest, bytes) = chunk(seed);
        cache.insert(digest, &bytes).unwrap();
    }
    let path = dir.path().join("segments/000000000000.data");
    let mut data = std::fs::read(&path).unwrap();
    // The last chunk is 200,000 bytes from a 4 KiB border to the file's end.
    let at = data.len() - 100;
    data[at] ^= 1;
    std::fs::write(&path, &data).unwrap();
    let (digest, bytes) = chunk(5);
    assert!(
        cache.read(digest, 0, 4096).is_some(),
        "this block is intact"
    );
    assert!(cache.read(digest, 199_000, 1000).is_none());
    assert!(!cache.contains(digest));
    assert_eq!(cache.counters().corrupt, 1);
    cache.insert(digest, &bytes).unwrap();
    for seed in 0..6 {
        assert!(whole(&cache, seed).is_some());
    }
}

#[test]
fn the_least_recently_used_go_first_and_their_space_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let cache = DiskCache::open(dir.path(), 1 << 20).unwrap();
    let seeds: Vec<u32> = (0..4).map(|index| index * 6 + 5).collect();
    for seed in &seeds {
        let (digest, bytes) = chunk(*seed);
        cache.insert(digest, &bytes).unwrap();
    }
    whole(&cache, seeds[0]).unwrap();
    for index in 4..6 {
        let (digest, bytes) = chunk(index * 6 + 5);
        cache.insert(digest, &bytes).unwrap();
    }
    assert!(whole(&cache, seeds[0]).is_some(), "just used");
    assert!(whole(&cache, seeds[1]).is_none(), "the oldest");
    let counters = cache.counters();
    assert!(counters.evicted >= 1 && counters.cached_bytes <= 1 << 20);
    assert!(disk_bytes(dir.path()) <= 1 << 20);
    assert_eq!(chunk(9999 * 6 + 5).1.len(), 200_000);
}

#[test]
fn two_processes_on_one_directory_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let first = DiskCache::open(dir.path(), 10 << 20).unwrap();
    first.insert(chunk(1).0, &chunk(1).1).unwrap();
    let second = DiskCache::open(dir.path(), 10 << 20).unwrap();
    for seed in 2..10 {
        let (digest, bytes) = chunk(seed);
        if seed % 2 == 0 { &first } else { &second }
            .insert(digest, &bytes)
            .unwrap();
    }
    assert!(whole(&second, 1).is_some());
    second.evict_to(0);
    assert!(whole(&first, 1).is_none(), "the hole is noticed");
    assert!(whole(&first, 2).is_some());
    drop((first, second));
    let third = DiskCache::open(dir.path(), 10 << 20).unwrap();
    for seed in [2, 4, 6, 8] {
        assert!(whole(&third, seed).is_some(), "{seed}");
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Insert(u32),
    Read(u32),
    Reopen,
    /// Cuts this many bytes off the newest log and continues in a new process.
    TearLog(usize),
    /// Changes a byte of the newest data file.
    Corrupt(usize),
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let one = prop_oneof![
        8 => (0..24u32).prop_map(Operation::Insert),
        8 => (0..24u32).prop_map(Operation::Read),
        1 => Just(Operation::Reopen),
        1 => (0..300usize).prop_map(Operation::TearLog),
        1 => (0..1_000_000usize).prop_map(Operation::Corrupt),
    ];
    prop::collection::vec(one, 1..60)
}

fn newest(dir: &Path, extension: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir.join("segments")).unwrap().flatten();
    let paths = entries.map(|entry| entry.path());
    paths
        .filter(|path| path.extension().is_some_and(|name| name == extension))
        .max()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever happens, what is read is right, and the cap holds.
    #[test]
    fn never_a_wrong_byte(operations in operations(), cap_kib in 300..2000u64) {
        let dir = tempfile::tempdir().unwrap();
        let cap = cap_kib << 10;
        let mut cache = DiskCache::open(dir.path(), cap).unwrap();
        for operation in operations {
            match operation {
                Operation::Insert(seed) => {
                    let (digest, bytes) = chunk(seed);
                    cache.insert(digest, &bytes).unwrap();
                    prop_assert!(whole(&cache, seed).is_some() || cache.counters().corrupt > 0);
                }
                Operation::Read(seed) => drop(whole(&cache, seed)),
                Operation::Reopen => {
                    drop(cache);
                    cache = DiskCache::open(dir.path(), cap).unwrap();
                }
                Operation::TearLog(bytes) => {
                    drop(cache);
                    if let Some(path) = newest(dir.path(), "log") {
                        let len = std::fs::metadata(&path).unwrap().len();
                        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
                        file.set_len(len.saturating_sub(bytes as u64)).unwrap();
                    }
                    cache = DiskCache::open(dir.path(), cap).unwrap();
                }
                Operation::Corrupt(at) => {
                    if let Some(path) = newest(dir.path(), "data") {
                        use std::os::unix::fs::FileExt;
                        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
                        let len = file.metadata().unwrap().len();
                        if len > 0 {
                            let at = at as u64 % len;
                            let mut byte = [0];
                            file.read_exact_at(&mut byte, at).unwrap();
                            file.write_all_at(&[byte[0] ^ 0x20], at).unwrap();
                        }
                    }
                }
            }
            prop_assert!(cache.counters().cached_bytes <= cap);
        }
    }

    #[test]
    fn logs_of_any_bytes_parse_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        record::parse(&bytes);
    }
}
