//! Temporary files that hold what importers unpack, until the image is written.
//!
//! Invariant: a spool's files live exactly as long as the [`Spool`]; trees that point
//! into it must not outlive it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use liblzma::read::XzDecoder;
use liblzma::stream::Stream;
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

    /// A new file of `len` bytes, all of it a hole; `source` is named in errors.
    pub(crate) fn sparse_file(&mut self, len: u64, source: &Path) -> Result<PathBuf, ImportError> {
        if len > self.limit_bytes {
            return Err(self.too_large(source));
        }
        let (path, _) = self.store(&mut io::empty(), source)?;
        let file = File::options().write(true).open(&path);
        file.and_then(|file| file.set_len(len))
            .map_err(io_error("growing", &path))?;
        Ok(path)
    }

    fn too_large(&self, source: &Path) -> ImportError {
        ImportError::TooLarge {
            path: source.to_owned(),
            limit: self.limit_bytes,
            unit: "bytes when unpacked",
        }
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
                return Err(self.too_large(source));
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
    /// bzip2.
    Bzip2,
    /// LZMA alone, without xz's container.
    Lzma,
    /// One that is not read, by its name.
    Unread(&'static str),
}

/// What begins with these bytes is not read.
const UNREAD: &[(&[u8], &str)] = &[
    (b"LZIP", "lzip"),
    (b"\x89LZO", "lzop"),
    (b"\x1f\x9d", "compress (.Z)"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
    (b"7z\xbc\xaf", "7-Zip"),
];

impl Compression {
    /// Told from the first bytes, not from the name.
    pub fn detect(first: &[u8]) -> Self {
        if first.starts_with(&[0x1f, 0x8b]) {
            Self::Gzip
        } else if first.starts_with(b"\xfd7zXZ\0") {
            Self::Xz
        } else if first.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            Self::Zstd
        } else if first.starts_with(b"BZh") {
            Self::Bzip2
        } else if let [0x5d, 0, 0, low, high, ..] = first
            && (*low, *high) != (0, 0)
        {
            Self::Lzma
        } else {
            let known = UNREAD.iter().find(|(magic, _)| first.starts_with(magic));
            known.map_or(Self::None, |(_, name)| Self::Unread(name))
        }
    }

    /// A reader of what `from` decompresses to.
    pub fn reader<'a>(self, from: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::None => Box::new(from),
            Self::Gzip => Box::new(MultiGzDecoder::new(from)),
            Self::Xz => Box::new(XzDecoder::new_multi_decoder(from)),
            Self::Zstd => Box::new(zstd::stream::read::Decoder::new(from)?),
            Self::Bzip2 => Box::new(bzip2::read::MultiBzDecoder::new(from)),
            Self::Lzma => {
                let stream = Stream::new_lzma_decoder(u64::MAX).map_err(io::Error::other)?;
                Box::new(XzDecoder::new_stream(from, stream))
            }
            Self::Unread(name) => {
                let problem = format!("{name} is not read: unpack it, and pack the files as a tar");
                return Err(io::Error::new(io::ErrorKind::Unsupported, problem));
            }
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
