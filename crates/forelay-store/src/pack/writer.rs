//! Writes one pack into a temporary file.
//!
//! Refuses to know where the pack will be published. Invariant: [`PackWriter::finish`]
//! returns an index that describes exactly the bytes of the file.

use std::io::{self, BufWriter, Seek, Write};
use std::path::Path;

use forelay_image::Digest;
use forelay_image::digest::Hasher;
use tempfile::NamedTempFile;

use super::{PACK_MOST_CHUNKS, PACK_TARGET_BYTES, PackEntry, PackIndex, ZSTD_LEVEL};

/// A pack that is being filled.
pub struct PackWriter {
    file: BufWriter<NamedTempFile>,
    compressor: zstd::bulk::Compressor<'static>,
    hasher: Hasher,
    bytes: u64,
    entries: Vec<PackEntry>,
}

/// A complete pack in a temporary file, which goes when this is dropped.
pub struct FinishedPack {
    /// The pack.
    pub file: NamedTempFile,
    /// Its index.
    pub index: PackIndex,
}

impl PackWriter {
    /// An empty pack in a new temporary file in `folder`.
    pub fn new_in(folder: &Path) -> io::Result<Self> {
        Ok(Self {
            file: BufWriter::with_capacity(1 << 20, NamedTempFile::new_in(folder)?),
            compressor: zstd::bulk::Compressor::new(ZSTD_LEVEL)?,
            hasher: Hasher::new(),
            bytes: 0,
            entries: Vec::new(),
        })
    }

    /// Appends a chunk.
    pub fn append(&mut self, chunk: Digest, bytes: &[u8]) -> io::Result<PackEntry> {
        let frame = self.compressor.compress(bytes)?;
        let frame = if frame.len() < bytes.len() {
            frame.as_slice()
        } else {
            bytes
        };
        self.file.write_all(frame)?;
        self.hasher.update(frame);
        let entry = PackEntry {
            chunk,
            offset: self.bytes as u32,
            stored_bytes: frame.len() as u32,
            chunk_bytes: bytes.len() as u32,
        };
        self.bytes += frame.len() as u64;
        self.entries.push(entry);
        Ok(entry)
    }

    /// True once the pack has its target size, or as many chunks as one may have.
    pub fn is_full(&self) -> bool {
        self.bytes >= PACK_TARGET_BYTES || self.entries.len() >= PACK_MOST_CHUNKS
    }

    /// Closes the pack.
    pub fn finish(self) -> io::Result<FinishedPack> {
        let mut file = self.file.into_inner().map_err(|error| error.into_error())?;
        file.rewind()?;
        let index = PackIndex {
            pack: self.hasher.finish(),
            pack_bytes: self.bytes,
            entries: self.entries,
        };
        Ok(FinishedPack { file, index })
    }
}
