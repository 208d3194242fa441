//! The disk cache: verified chunks, uncompressed, in front of a repository.
//!
//! ```text
//! <dir>/segments/<number>.data    chunks, each from a 4 KiB border
//! <dir>/segments/<number>.log     one record per chunk written or dropped
//! ```
//! A chunk enters after its SHA-256 was verified. Its record carries one xxh3 checksum
//! per 64 KiB block, so a demand fault reads and checks only the blocks that it needs, in
//! one `pread`. Dropping a chunk logs it and punches a hole where it was; a segment
//! without chunks is deleted.
//!
//! A segment is written by the one process that created it and read by any, so a daemon
//! can start while its killed predecessor still holds files open, without any lock.
//!
//! Crashes: records follow their data and carry a checksum; a torn record ends a log,
//! and data that did not reach the disk fails its checksum when read. Nothing is synced:
//! losing a cached chunk costs one fetch.
//!
//! Refuses to know where chunks come from. Invariants: bytes returned by
//! [`DiskCache::read`] matched their checksums in this very read; `cached_bytes` is at
//! most the cap after every insertion.

mod record;
mod segment;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use forelay_image::{Chunk, Digest, Extent, PAGE_BYTES};
use parking_lot::{Mutex, RwLock};
use twox_hash::XxHash3_64;

use segment::{Segment, SegmentWriter};

/// Chunks are checked in blocks of this many bytes.
pub const BLOCK_BYTES: usize = 64 << 10;

/// A segment is closed once it has this many bytes.
const SEGMENT_BYTES: u64 = 256 << 20;

/// Why the cache directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the cache directory {} cannot be used", path.display())]
pub struct DiskCacheError {
    /// The file or directory concerned.
    pub path: PathBuf,
    /// The cause.
    pub source: io::Error,
}

/// Counters of a cache since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskCacheCounters {
    /// Chunks in the cache.
    pub chunks: u64,
    /// Bytes that they occupy, in whole pages.
    pub cached_bytes: u64,
    /// Reads answered.
    pub hits: u64,
    /// Reads of chunks that are not there.
    pub misses: u64,
    /// Chunks dropped because their bytes did not match the checksum.
    pub corrupt: u64,
    /// Chunks dropped to stay under the cap.
    pub evicted: u64,
}

struct CachedChunk {
    segment: Arc<Segment>,
    offset: u64,
    len: u32,
    sums: Box<[u64]>,
    used: AtomicU64,
}

/// Verified chunks on the local disk.
pub struct DiskCache {
    folder: PathBuf,
    cap_bytes: u64,
    entries: RwLock<HashMap<Digest, Arc<CachedChunk>>>,
    writer: Mutex<Option<SegmentWriter>>,
    /// Counts changes of `entries`, each while it is locked.
    generation: AtomicU64,
    cached_bytes: AtomicU64,
    clock: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    corrupt: AtomicU64,
    evicted: AtomicU64,
}

impl DiskCache {
    /// Opens the cache in `dir`, taking over what earlier processes left there.
    pub fn open(dir: &Path, cap_bytes: u64) -> Result<Self, DiskCacheError> {
        let folder = dir.join("segments");
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| DiskCacheError { path, source }
        };
        std::fs::create_dir_all(&folder).map_err(at(&folder))?;
        let cache = Self {
            folder: folder.clone(),
            cap_bytes,
            entries: RwLock::default(),
            writer: Mutex::new(None),
            generation: AtomicU64::new(0),
            cached_bytes: AtomicU64::new(0),
            clock: AtomicU64::new(1),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        };
        for number in segment::list(&folder).map_err(at(&folder))? {
            cache.load(number);
        }
        cache.evict_to(cap_bytes);
        Ok(cache)
    }

    /// Takes over one segment; one that cannot be read is left alone.
    fn load(&self, number: u64) {
        let Ok((segment, log)) = Segment::open(&self.folder, number) else {
            return;
        };
        let segment = Arc::new(segment);
        let mut entries = self.entries.write();
        for record in record::live(&log).into_values() {
            let chunk = record.chunk;
            let end = record.offset + u64::from(record.len);
            if end > segment.data_bytes() || entries.contains_key(&chunk) {
                continue;
            }
            segment.add_chunk();
            self.cached_bytes
                .fetch_add(occupied(record.len), Ordering::Relaxed);
            let entry = CachedChunk {
                segment: segment.clone(),
                offset: record.offset,
                len: record.len,
                sums: record.sums,
                used: AtomicU64::new(self.tick()),
            };
            entries.insert(chunk, Arc::new(entry));
        }
        drop(entries);
        segment.remove_if_empty();
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    /// True if the chunk is there (its bytes may still turn out to be corrupt).
    pub fn contains(&self, chunk: Digest) -> bool {
        self.entries.read().contains_key(&chunk)
    }

    /// A number that is another one whenever chunks have come or gone.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Where those of `chunks` are that are not there.
    pub fn missing(&self, chunks: &[Chunk]) -> Vec<Extent> {
        let entries = self.entries.read();
        let missing = chunks
            .iter()
            .filter(|chunk| !entries.contains_key(&chunk.digest));
        missing.map(Chunk::extent).collect()
    }

    /// `len` bytes of the chunk from `start`, if the chunk is there and intact.
    pub fn read(&self, chunk: Digest, start: u32, len: u32) -> Option<Bytes> {
        let entry = self.entries.read().get(&chunk).cloned();
        let Some(entry) =
            entry.filter(|entry| u64::from(start) + u64::from(len) <= u64::from(entry.len))
        else {
            self.misses.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        let first_block = start as usize / BLOCK_BYTES;
        let block_start = first_block * BLOCK_BYTES;
        let end = start as usize + len as usize;
        let block_end = end.next_multiple_of(BLOCK_BYTES).min(entry.len as usize);
        let read = entry
            .segment
            .read(entry.offset + block_start as u64, block_end - block_start);
        let intact = read.ok().filter(|bytes| {
            let sums = entry.sums.iter().skip(first_block);
            bytes
                .chunks(BLOCK_BYTES)
                .zip(sums)
                .all(|(block, sum)| XxHash3_64::oneshot(block) == *sum)
        });
        let Some(bytes) = intact else {
            self.corrupt.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%chunk, "a cached chunk is corrupt; it will be fetched again");
            self.drop_entry(chunk, &entry);
            return None;
        };
        entry.used.store(self.tick(), Ordering::Relaxed);
        self.hits.fetch_add(1, Ordering::Relaxed);
        Some(Bytes::from(bytes).slice(start as usize - block_start..end - block_start))
    }

    /// Takes in a chunk whose digest the caller has verified.
    pub fn insert(&self, chunk: Digest, bytes: &[u8]) -> io::Result<()> {
        let space = occupied(bytes.len() as u32);
        if self.contains(chunk) || space > self.cap_bytes || bytes.is_empty() {
            return Ok(());
        }
        if self.cached_bytes.load(Ordering::Relaxed) + space > self.cap_bytes {
            // Make room for more than one chunk, so that the sort below is paid rarely.
            let target = self.cap_bytes - (self.cap_bytes / 32).max(space).min(self.cap_bytes);
            self.evict_to(target);
        }
        let sums: Box<[u64]> = bytes.chunks(BLOCK_BYTES).map(XxHash3_64::oneshot).collect();
        let (segment, offset) = {
            let mut slot = self.writer.lock();
            if self.contains(chunk) {
                return Ok(());
            }
            if slot
                .as_ref()
                .is_none_or(|writer| writer.end() >= SEGMENT_BYTES)
            {
                *slot = Some(SegmentWriter::create(&self.folder)?);
            }
            let Some(writer) = slot.as_mut() else {
                return Ok(());
            };
            let written = writer.append(chunk, bytes, &sums);
            if written.is_err() {
                // What follows a failed write is uncertain: go on in a new segment.
                *slot = None;
            }
            written?
        };
        let entry = CachedChunk {
            segment,
            offset,
            len: bytes.len() as u32,
            sums,
            used: AtomicU64::new(self.tick()),
        };
        self.cached_bytes.fetch_add(space, Ordering::Relaxed);
        {
            let mut entries = self.entries.write();
            entries.insert(chunk, Arc::new(entry));
            self.generation.fetch_add(1, Ordering::Release);
        }
        if self.cached_bytes.load(Ordering::Relaxed) > self.cap_bytes {
            self.evict_to(self.cap_bytes);
        }
        Ok(())
    }

    /// Drops the least recently used chunks until at most `target` bytes are left.
    fn evict_to(&self, target: u64) {
        if self.cached_bytes.load(Ordering::Relaxed) <= target {
            return;
        }
        let mut candidates: Vec<_> = {
            let entries = self.entries.read();
            entries
                .iter()
                .map(|(chunk, entry)| (entry.used.load(Ordering::Relaxed), *chunk))
                .collect()
        };
        candidates.sort_unstable();
        for (_, chunk) in candidates {
            if self.cached_bytes.load(Ordering::Relaxed) <= target {
                break;
            }
            let entry = self.entries.read().get(&chunk).cloned();
            if let Some(entry) = entry {
                self.evicted.fetch_add(1, Ordering::Relaxed);
                self.drop_entry(chunk, &entry);
            }
        }
    }

    fn drop_entry(&self, chunk: Digest, entry: &Arc<CachedChunk>) {
        {
            let mut entries = self.entries.write();
            match entries.get(&chunk) {
                Some(current) if Arc::ptr_eq(current, entry) => entries.remove(&chunk),
                _ => return,
            };
            self.generation.fetch_add(1, Ordering::Release);
        }
        self.cached_bytes
            .fetch_sub(occupied(entry.len), Ordering::Relaxed);
        entry.segment.drop_chunk(chunk, entry.offset, entry.len);
    }

    /// Lets the kernel have the page cache of the cache's files. What is in shared memory
    /// needs no second copy there; what was written a moment ago stays until it is on disk.
    pub fn give_back_pages(&self) {
        let mut segments: Vec<Arc<Segment>> = Vec::new();
        for entry in self.entries.read().values() {
            if !segments.iter().any(|one| Arc::ptr_eq(one, &entry.segment)) {
                segments.push(entry.segment.clone());
            }
        }
        for segment in segments {
            segment.give_back_pages();
        }
    }

    /// Counters since the cache was opened.
    pub fn counters(&self) -> DiskCacheCounters {
        DiskCacheCounters {
            chunks: self.entries.read().len() as u64,
            cached_bytes: self.cached_bytes.load(Ordering::Relaxed),
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            corrupt: self.corrupt.load(Ordering::Relaxed),
            evicted: self.evicted.load(Ordering::Relaxed),
        }
    }
}

/// Bytes of disk that a chunk occupies.
fn occupied(len: u32) -> u64 {
    u64::from(len).next_multiple_of(PAGE_BYTES)
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
