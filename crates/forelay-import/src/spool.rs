//! Temporary files that hold what importers unpack, until the image is written.
//!
//! Invariant: a spool's files live exactly as long as the [`Spool`]; trees that point
//! into it must not outlive it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use tempfile::TempDir;

use crate::error::{ImportError, archive_error, io_error};

/// Most bytes that an archive may unpack to, unless the caller says otherwise.
pub const DEFAULT_LIMIT_BYTES: u64 = 64 << 30;

const COPY_BYTES: usize = 256 << 10;

/// A temporary directory for unpacked content.
#[derive(Debug)]
pub struct Spool {
    directory: TempDir,
    files: u32,
    limit_bytes: u64,
}

impl Spool {
    /// A spool in `parent`, which takes at most `limit_bytes` for each file.
    pub fn new(parent: &Path, limit_bytes: u64) -> Result<Self, ImportError> {
        std::fs::create_dir_all(parent).map_err(io_error("creating", parent))?;
        let directory = tempfile::Builder::new()
            .prefix("spool-")
            .tempdir_in(parent)
            .map_err(io_error("creating a directory in", parent))?;
        Ok(Self {
            directory,
            files: 0,
            limit_bytes,
        })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Copies `from` (named `source` in errors) into a new file; returns its path and size.
    pub fn store(
        &mut self,
        from: &mut dyn Read,
        source: &Path,
    ) -> Result<(PathBuf, u64), ImportError> {
        let path = self.directory.path().join(self.files.to_string());
        self.files += 1;
        let mut out = File::create(&path).map_err(io_error("creating", &path))?;
        let mut buffer = vec![0u8; COPY_BYTES];
        let mut total = 0u64;
        loop {
            let count = match from.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(archive_error(source, format!("damaged: {error}"))),
            };
            total += count as u64;
            if total > self.limit_bytes {
                return Err(ImportError::TooLarge {
                    path: source.to_owned(),
                    limit: self.limit_bytes,
                    unit: "bytes when unpacked",
                });
            }
            out.write_all(&buffer[..count])
                .map_err(io_error("writing", &path))?;
        }
        Ok((path, total))
    }
}

/// How an archive is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// Told from the first bytes, not from the name.
    pub fn detect(first: &[u8]) -> Self {
        if first.starts_with(&[0x1f, 0x8b]) {
            Self::Gzip
        } else if first.starts_with(b"\xfd7zXZ\0") {
            Self::Xz
        } else if first.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            Self::Zstd
        } else {
            Self::None
        }
    }

    /// A reader of what `from` decompresses to.
    pub fn reader<'a>(self, from: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::None => Box::new(from),
            Self::Gzip => Box::new(MultiGzDecoder::new(from)),
            Self::Xz => Box::new(liblzma::read::XzDecoder::new_multi_decoder(from)),
            Self::Zstd => Box::new(zstd::stream::read::Decoder::new(from)?),
        })
    }
}

/// Reads up to `out.len()` bytes; less only at the end.
pub(crate) fn read_up_to(from: &mut impl Read, out: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < out.len() {
        match from.read(&mut out[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
