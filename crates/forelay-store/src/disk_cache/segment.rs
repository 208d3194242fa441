//! One segment of the cache: a data file and its log.
//!
//! Invariant: only the process that created a segment appends chunks to it; any process
//! may drop chunks from it (an `O_APPEND` record, then a hole).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forelay_image::{Digest, PAGE_BYTES};
use rustix::fs::FallocateFlags;

use super::record::{self, CacheRecord};

/// A segment that chunks are read and dropped from.
pub struct Segment {
    data: File,
    log: File,
    data_path: PathBuf,
    log_path: PathBuf,
    chunks: AtomicU64,
    /// Set while chunks may still be appended, so that it is not deleted when empty.
    open: std::sync::atomic::AtomicBool,
}

/// Numbers of the segments in `folder`, oldest first.
pub fn list(folder: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_suffix(".data"));
        numbers.extend(number.and_then(|number| number.parse::<u64>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn paths(folder: &Path, number: u64) -> (PathBuf, PathBuf) {
    (
        folder.join(format!("{number:012}.data")),
        folder.join(format!("{number:012}.log")),
    )
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

impl Segment {
    /// Opens a segment for reading and dropping; also returns its log.
    pub fn open(folder: &Path, number: u64) -> io::Result<(Self, Vec<u8>)> {
        let (data_path, log_path) = paths(folder, number);
        let data = OpenOptions::new().read(true).write(true).open(&data_path)?;
        let log = open_log(&log_path)?;
        let records = fs::read(&log_path)?;
        let (chunks, open) = Default::default();
        Ok((
            Self {
                data,
                log,
                data_path,
                log_path,
                chunks,
                open,
            },
            records,
        ))
    }

    /// Size of the data file.
    pub fn data_bytes(&self) -> u64 {
        self.data.metadata().map_or(0, |metadata| metadata.len())
    }

    /// Counts one more live chunk.
    pub fn add_chunk(&self) {
        self.chunks.fetch_add(1, Ordering::Relaxed);
    }

    /// Exactly `len` bytes from `offset`.
    pub fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let at = offset + bytes.len() as u64;
            // Straight into spare capacity: zeroing first would cost as much as reading.
            let read =
                rustix::io::pread(&self.data, rustix::buffer::spare_capacity(&mut bytes), at)?;
            if read == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        bytes.truncate(len);
        Ok(bytes)
    }

    /// Lets the kernel have the data file's page cache, as far as it is written.
    pub fn give_back_pages(&self) {
        // Advice: nothing is lost if it is not taken.
        let _ = rustix::fs::fadvise(&self.data, 0, None, rustix::fs::Advice::DontNeed);
    }

    /// Drops a chunk: logs it and gives its space back.
    pub fn drop_chunk(&self, chunk: Digest, offset: u64, len: u32) {
        let record = CacheRecord {
            chunk,
            offset,
            len,
            dropped: true,
            sums: Box::default(),
        };
        // Without the record or the hole, the next reader finds the chunk again or pays
        // a failed checksum: no harm.
        let _ = (&self.log).write_all(&record.encode());
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let space = u64::from(len).next_multiple_of(PAGE_BYTES);
        let _ = rustix::fs::fallocate(&self.data, flags, offset, space);
        self.chunks.fetch_sub(1, Ordering::Relaxed);
        self.remove_if_empty();
    }

    /// Deletes the files of a segment that has no chunks and gets none. The log is asked
    /// again, since another process may have appended what this one does not know.
    pub fn remove_if_empty(&self) {
        if self.chunks.load(Ordering::Relaxed) > 0 || self.open.load(Ordering::Relaxed) {
            return;
        }
        if fs::read(&self.log_path).is_ok_and(|log| record::live(&log).is_empty()) {
            let _ = fs::remove_file(&self.data_path);
            let _ = fs::remove_file(&self.log_path);
        }
    }
}

/// The right to append to a segment.
pub struct SegmentWriter {
    segment: Arc<Segment>,
    end: u64,
}

impl SegmentWriter {
    /// Creates the next segment of `folder`.
    pub fn create(folder: &Path) -> io::Result<Self> {
        let mut number = list(folder)?.last().map_or(0, |last| last + 1);
        loop {
            let (data_path, log_path) = paths(folder, number);
            let created = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&data_path);
            match created {
                Ok(data) => {
                    let log = open_log(&log_path)?;
                    let (chunks, open) = (AtomicU64::new(0), true.into());
                    let segment = Segment {
                        data,
                        log,
                        data_path,
                        log_path,
                        chunks,
                        open,
                    };
                    return Ok(Self {
                        segment: Arc::new(segment),
                        end: 0,
                    });
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Bytes written so far.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Writes a chunk and then its record.
    pub fn append(
        &mut self,
        chunk: Digest,
        bytes: &[u8],
        sums: &[u64],
    ) -> io::Result<(Arc<Segment>, u64)> {
        let offset = self.end;
        self.segment.data.write_all_at(bytes, offset)?;
        let record = CacheRecord {
            chunk,
            offset,
            len: bytes.len() as u32,
            dropped: false,
            sums: sums.into(),
        };
        (&self.segment.log).write_all(&record.encode())?;
        self.end = (offset + bytes.len() as u64).next_multiple_of(PAGE_BYTES);
        self.segment.add_chunk();
        Ok((self.segment.clone(), offset))
    }
}

impl Drop for SegmentWriter {
    fn drop(&mut self) {
        self.segment.open.store(false, Ordering::Relaxed);
        self.segment.remove_if_empty();
    }
}
