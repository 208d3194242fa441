//! Temporary files that hold what importers unpack, until the image is written.
//!
//! Invariant: a spool's files live exactly as long as the [`Spool`]; trees that point
//! into it must not outlive it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use bzip2::bufread::BzDecoder;
use flate2::bufread::GzDecoder;
use liblzma::read::XzDecoder;
use liblzma::stream::{CONCATENATED, Stream};
use tempfile::TempDir;

use crate::error::{ImportError, archive_error, io_error};

/// Most bytes that a source may unpack to, unless the caller says otherwise.
pub const DEFAULT_LIMIT_BYTES: u64 = 64 << 30;

const COPY_BYTES: usize = 256 << 10;

/// Most memory that decompressing xz and LZMA may take (`xz -9` takes 65 MiB); zstd's own
/// limit is a window of 128 MiB, and the others need next to nothing.
const LZMA_MEMORY_BYTES: u64 = 512 << 20;

/// A temporary directory for unpacked content.
#[derive(Debug)]
pub struct Spool {
    directory: TempDir,
    files: u32,
    limit_bytes: u64,
    /// What all files may still take, holes included: the image is to hold them in full.
    left_bytes: u64,
}

impl Spool {
    /// A spool in `parent`, which takes at most `limit_bytes` in all its files.
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
            left_bytes: limit_bytes,
        })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A new file of `len` bytes, all of it a hole; `source` is named in errors.
    pub(crate) fn sparse_file(&mut self, len: u64, source: &Path) -> Result<PathBuf, ImportError> {
        self.left_bytes = match self.left_bytes.checked_sub(len) {
            Some(left) => left,
            None => return Err(self.too_large(source)),
        };
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
                Err(error) => return Err(archive_error(source, what_is_wrong(&error))),
            };
            total += count as u64;
            if total > self.left_bytes {
                return Err(self.too_large(source));
            }
            out.write_all(&buffer[..count])
                .map_err(io_error("writing", &path))?;
        }
        self.left_bytes -= total;
        Ok((path, total))
    }
}

/// Refuses what needs so many bytes in a directory whose file system has no room for them.
pub(crate) fn check_free(dir: &Path, bytes: u64, source: &Path) -> Result<(), ImportError> {
    // Where it cannot be told, a full disk is told when it is full.
    let Ok(found) = rustix::fs::statvfs(dir) else {
        return Ok(());
    };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    match bytes <= free {
        true => Ok(()),
        false => Err(ImportError::NoRoom {
            source_path: source.to_owned(),
            bytes,
            dir: dir.to_owned(),
            free,
        }),
    }
}

/// Why an archive cannot be decompressed.
fn what_is_wrong(error: &io::Error) -> String {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    match cause {
        Some(liblzma::stream::Error::MemLimit) => {
            let limit = LZMA_MEMORY_BYTES >> 20;
            format!("takes more than {limit} MiB of memory to decompress: compress it with `xz -9`")
        }
        _ => format!("damaged: {error}"),
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
        } else if is_zstd(first) {
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
            Self::Xz => {
                let stream = Stream::new_stream_decoder(LZMA_MEMORY_BYTES, CONCATENATED);
                Box::new(XzDecoder::new_stream(from, stream?))
            }
            Self::Gzip | Self::Zstd | Self::Bzip2 => Box::new(Members {
                compression: self,
                at: Member::Between(BufReader::with_capacity(COPY_BYTES, from)),
            }),
            Self::Lzma => {
                let stream = Stream::new_lzma_decoder(LZMA_MEMORY_BYTES);
                Box::new(XzDecoder::new_stream(from, stream?))
            }
            Self::Unread(name) => {
                let problem = format!("{name} is not read: unpack it, and pack the files as a tar");
                return Err(io::Error::new(io::ErrorKind::Unsupported, problem));
            }
        })
    }
}

/// A frame of zstd, or one that says that it is to be skipped (pzstd begins with such).
fn is_zstd(first: &[u8]) -> bool {
    let skipped = matches!(first, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]);
    skipped || first.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
}

/// The members of a compressed file one after the other, with zeros behind them if a tape's
/// blocks were filled up.
struct Members<'a, R> {
    compression: Compression,
    at: Member<'a, R>,
}

enum Member<'a, R> {
    Between(BufReader<R>),
    Gzip(GzDecoder<BufReader<R>>),
    Bzip2(BzDecoder<BufReader<R>>),
    Zstd(zstd::stream::read::Decoder<'a, BufReader<R>>),
    End,
}

impl<R: Read> Read for Members<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = match &mut self.at {
                Member::Gzip(member) => member.read(out)?,
                Member::Bzip2(member) => member.read(out)?,
                Member::Zstd(member) => member.read(out)?,
                Member::Between(_) => 0,
                Member::End => return Ok(0),
            };
            if count > 0 || out.is_empty() {
                return Ok(count);
            }
            let rest = match std::mem::replace(&mut self.at, Member::End) {
                Member::Gzip(member) => member.into_inner(),
                Member::Bzip2(member) => member.into_inner(),
                Member::Zstd(member) => member.finish(),
                Member::Between(rest) => rest,
                Member::End => return Ok(0),
            };
            self.begin(rest)?;
        }
    }
}

impl<R: Read> Members<'_, R> {
    /// Begins the next member, if there is one.
    fn begin(&mut self, mut from: BufReader<R>) -> io::Result<()> {
        match from.fill_buf()? {
            [] => return Ok(()),
            [0, ..] => return only_zeros(from),
            _ => {}
        }
        self.at = match self.compression {
            Compression::Gzip => Member::Gzip(GzDecoder::new(from)),
            Compression::Bzip2 => Member::Bzip2(BzDecoder::new(from)),
            _ => Member::Zstd(zstd::stream::read::Decoder::with_buffer(from)?.single_frame()),
        };
        Ok(())
    }
}

fn only_zeros(mut from: impl BufRead) -> io::Result<()> {
    loop {
        let bytes = from.fill_buf()?;
        if bytes.iter().any(|&byte| byte != 0) {
            let problem = "something else follows the compressed content";
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        match bytes.len() {
            0 => return Ok(()),
            count => from.consume(count),
        }
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
