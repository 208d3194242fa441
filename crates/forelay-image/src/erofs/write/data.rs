//! File data of an image: where it goes and how it streams out.
//!
//! Owns content reading, the search for identical files and the cutting into chunks.
//! Refuses to know about inodes. Invariant: pieces reach the hasher in image order.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::WriteError;
use crate::chunk::MAX_CHUNK_BYTES;
use crate::erofs::layout::{BLOCK_BYTES, blocks_of};
use crate::tree::FileBytes;
use crate::watched::WatchedFile;
use crate::{Chunk, Digest};

/// Why a file's content could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The host file cannot be opened or read.
    #[error("cannot read {path}")]
    Io {
        /// Path on the host.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The host file is not what it was when the tree was made.
    #[error("{path} changed while the image was written: build again when nobody changes it")]
    Changed {
        /// Path on the host.
        path: String,
    },
}

/// An error before the tree path is known.
pub(super) enum DataError {
    Source(SourceError),
    Write(io::Error),
}

impl DataError {
    pub(super) fn at(self, path: impl Fn() -> String) -> WriteError {
        match self {
            Self::Source(source) => WriteError::Source {
                path: path(),
                source,
            },
            Self::Write(error) => WriteError::Write(error),
        }
    }
}

impl From<io::Error> for DataError {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}

/// Where one file's bytes are.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    Bytes(&'a [u8]),
    Host {
        path: &'a Path,
        offset: u64,
        len: u64,
    },
    Watched(&'a WatchedFile),
    Elsewhere(&'a dyn FileBytes, u64),
}

impl Source<'_> {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Host { len, .. } | Self::Elsewhere(_, len) => *len,
            Self::Watched(file) => file.bytes(),
        }
    }

    /// Calls `visit` with pieces of at most 1 MiB in order; `buffer` is scratch space.
    fn pieces(
        &self,
        buffer: &mut Vec<u8>,
        mut visit: impl FnMut(&[u8]) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let (path, offset, len) = match *self {
            Self::Bytes(bytes) => {
                return bytes.chunks(MAX_CHUNK_BYTES as usize).try_for_each(visit);
            }
            Self::Host { path, offset, len } => (path, offset, len),
            Self::Elsewhere(file, len) => return pieces_of(file, len, buffer, visit),
            Self::Watched(file) => (file.path(), 0, file.bytes()),
        };
        let shown = || path.display().to_string();
        let changed = || DataError::Source(SourceError::Changed { path: shown() });
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::UnexpectedEof => changed(),
            _ => DataError::Source(SourceError::Io {
                path: shown(),
                source,
            }),
        };
        let file = match self {
            Self::Watched(watched) => watched.open().map_err(failed)?.ok_or_else(changed)?,
            _ => File::open(path).map_err(failed)?,
        };
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(MAX_CHUNK_BYTES) as usize;
            buffer.resize(piece, 0);
            file.read_exact_at(buffer, offset.saturating_add(done))
                .map_err(failed)?;
            visit(buffer)?;
            done += piece as u64;
        }
        if let Self::Watched(watched) = self
            && !watched.is_unchanged(&file).map_err(failed)?
        {
            return Err(changed());
        }
        Ok(())
    }
}

/// The same of a file that is read by who has it.
fn pieces_of(
    file: &dyn FileBytes,
    len: u64,
    buffer: &mut Vec<u8>,
    mut visit: impl FnMut(&[u8]) -> Result<(), DataError>,
) -> Result<(), DataError> {
    let failed = |source: io::Error| {
        let path = format!("{file:?}");
        DataError::Source(match source.kind() {
            io::ErrorKind::UnexpectedEof => SourceError::Changed { path },
            _ => SourceError::Io { path, source },
        })
    };
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(MAX_CHUNK_BYTES) as usize;
        buffer.resize(piece, 0);
        let mut got = 0;
        while got < piece {
            let at = done + got as u64;
            match file.read_at(&mut buffer[got..], at).map_err(failed)? {
                0 => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                count => got += count,
            }
        }
        visit(buffer)?;
        done += piece as u64;
    }
    Ok(())
}

/// Block addresses of all files with data.
pub(super) struct DataPlan {
    /// Files that own their blocks, in image order: caller's key, first block.
    pub files: Vec<(u32, u64)>,
    /// Files that share the blocks of an earlier, identical one.
    pub shared: Vec<(u32, u64)>,
    /// The block after the last one.
    pub end_block: u64,
}

/// Gives out blocks in the order of `sources` from `first_block` on. Files are compared
/// by digest, which only those need whose length is not unique.
pub(super) fn plan(
    sources: &[(u32, Source<'_>)],
    first_block: u64,
) -> Result<DataPlan, (u32, DataError)> {
    let mut count_by_len: BTreeMap<u64, u32> = BTreeMap::new();
    for (_, source) in sources {
        *count_by_len.entry(source.len()).or_default() += 1;
    }
    let mut block_by_content: BTreeMap<(u64, Digest), u64> = BTreeMap::new();
    let mut out = DataPlan {
        files: Vec::with_capacity(sources.len()),
        shared: Vec::new(),
        end_block: first_block,
    };
    let mut buffer = Vec::new();
    for &(key, source) in sources {
        let len = source.len();
        if count_by_len[&len] > 1 {
            let mut hasher = Sha256::new();
            let hash = source.pieces(&mut buffer, |piece| {
                hasher.update(piece);
                Ok(())
            });
            hash.map_err(|error| (key, error))?;
            let content = (len, Digest::from_bytes(hasher.finalize().into()));
            if let Some(&block) = block_by_content.get(&content) {
                out.shared.push((key, block));
                continue;
            }
            block_by_content.insert(content, out.end_block);
        }
        out.files.push((key, out.end_block));
        out.end_block = out.end_block.saturating_add(blocks_of(len));
    }
    Ok(out)
}

/// Streams file data behind the metadata.
pub(super) struct Writer<'a, W> {
    out: &'a mut W,
    hasher: &'a mut Sha256,
    chunks: &'a mut Vec<Chunk>,
    /// Next byte of the image.
    offset: u64,
    /// Where the output's own cursor stands.
    cursor: u64,
    buffer: Vec<u8>,
    padded: Vec<u8>,
    /// Digest of a full piece of zeros: huge sparse files have many.
    zeros: Option<Digest>,
}

impl<'a, W: Write + Seek> Writer<'a, W> {
    pub(super) fn new(
        out: &'a mut W,
        hasher: &'a mut Sha256,
        offset: u64,
        chunks: &'a mut Vec<Chunk>,
    ) -> Self {
        Self {
            out,
            hasher,
            chunks,
            offset,
            cursor: offset,
            buffer: Vec::new(),
            padded: Vec::new(),
            zeros: None,
        }
    }

    /// Writes one file, which starts at `block`.
    pub(super) fn file(&mut self, source: Source<'_>, block: u64) -> Result<(), DataError> {
        debug_assert_eq!(self.offset, block * BLOCK_BYTES);
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = source.pieces(&mut buffer, |piece| Ok(self.piece(piece)?));
        self.buffer = buffer;
        result
    }

    fn piece(&mut self, piece: &[u8]) -> io::Result<()> {
        let padded_len = piece.len().next_multiple_of(BLOCK_BYTES as usize);
        let mut padded = std::mem::take(&mut self.padded);
        let bytes = if padded_len == piece.len() {
            piece
        } else {
            padded.clear();
            padded.extend_from_slice(piece);
            padded.resize(padded_len, 0);
            &padded
        };
        self.hasher.update(bytes);
        let is_zero = bytes.iter().all(|&byte| byte == 0);
        let digest = if is_zero && bytes.len() as u64 == MAX_CHUNK_BYTES {
            *self.zeros.get_or_insert_with(|| Digest::of(bytes))
        } else {
            Digest::of(bytes)
        };
        self.chunks.push(Chunk {
            offset: self.offset,
            len: bytes.len() as u32,
            digest,
        });
        if !is_zero {
            if self.cursor != self.offset {
                self.out.seek(SeekFrom::Start(self.offset))?;
            }
            self.out.write_all(bytes)?;
            self.cursor = self.offset + bytes.len() as u64;
        }
        self.offset += bytes.len() as u64;
        self.padded = padded;
        Ok(())
    }

    /// Makes the output as long as the image if that ends in zeros.
    pub(super) fn finish(self) -> io::Result<()> {
        if self.cursor != self.offset {
            self.out.seek(SeekFrom::Start(self.offset - 1))?;
            self.out.write_all(&[0])?;
        }
        Ok(())
    }
}
