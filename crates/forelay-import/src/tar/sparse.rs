//! Sparse files: the old GNU form and the three versions of the PAX form, expanded into
//! the spool (their holes stay holes there).
//!
//! ```text
//! old GNU   pieces in the header and in blocks behind it
//! PAX 0.0   pieces as repeated records GNU.sparse.offset and GNU.sparse.numbytes
//! PAX 0.1   pieces as one record GNU.sparse.map; the name is GNU.sparse.name
//! PAX 1.0   pieces as lines of decimal numbers before the content, padded to a block
//! ```
//! (GNU tar's manual, "Storing Sparse Files".) Invariant: a piece lies within its file
//! and its bytes within the entry; the files take no more than the spool allows in all, however
//! few bytes of them are in the archive.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use forelay_image::tree::FileData;
use tar::{GnuExtSparseHeader, Header};

use super::pax::Extensions;
use super::{BLOCK_BYTES, TarReader};
use crate::error::{ImportError, archive_error, io_error};

/// More pieces than a sensible file has.
const MAX_PIECES: u64 = 1 << 20;

/// Where a piece is in the file, and its bytes.
type SparsePiece = (u64, u64);

impl TarReader<'_> {
    /// An old GNU sparse file of `stored` bytes.
    pub(super) fn old_sparse(
        &mut self,
        header: &Header,
        stored: u64,
    ) -> Result<FileData, ImportError> {
        let Some(gnu) = header.as_gnu() else {
            return Err(self.damaged("a sparse file without a GNU header"));
        };
        let bad = |error: std::io::Error| archive_error(&self.shown, format!("sparse: {error}"));
        let len = gnu.real_size().map_err(bad)?;
        let mut pieces = Vec::new();
        for piece in gnu.sparse.iter().filter(|piece| !piece.is_empty()) {
            pieces.push((piece.offset().map_err(bad)?, piece.length().map_err(bad)?));
        }
        let mut more = gnu.is_extended();
        while more {
            let mut extended = GnuExtSparseHeader::new();
            let read = self.file.read_exact_at(extended.as_mut_bytes(), self.next);
            read.map_err(bad)?;
            self.next += BLOCK_BYTES;
            for piece in extended.sparse.iter().filter(|piece| !piece.is_empty()) {
                pieces.push((piece.offset().map_err(bad)?, piece.length().map_err(bad)?));
            }
            more = extended.is_extended();
            if pieces.len() as u64 > MAX_PIECES {
                return Err(self.damaged("a sparse file of too many pieces"));
            }
        }
        let from = self.content(stored)?;
        self.expand(len, &pieces, from, from + stored)
    }

    /// A sparse file of the PAX form; `None` if `extensions` speak of none.
    pub(super) fn pax_sparse(
        &mut self,
        extensions: &Extensions,
        stored: u64,
    ) -> Result<Option<FileData>, ImportError> {
        let number = |key: &[u8]| extensions.number(key);
        let len = number(b"GNU.sparse.realsize").or(number(b"GNU.sparse.size"));
        let mut keys = extensions.pax.keys();
        let Some(len) = len else {
            return match keys.any(|key| key.starts_with(b"GNU.sparse.")) {
                true => Err(self.damaged("a sparse file without its size")),
                false => Ok(None),
            };
        };
        let mut from = self.content(stored)?;
        let end = from + stored;
        let pieces = match (
            number(b"GNU.sparse.major"),
            extensions.pax.get(&b"GNU.sparse.map"[..]),
        ) {
            (Some(1), _) => self.leading_map(&mut from, end)?,
            (Some(version), _) => {
                let problem = format!("a sparse file of form {version}, which is not known");
                return Err(self.damaged(problem));
            }
            (None, Some(map)) => {
                let text = String::from_utf8_lossy(map);
                let numbers = text.split(',').filter(|part| !part.is_empty());
                let numbers: Option<Vec<u64>> = numbers.map(|part| part.parse().ok()).collect();
                let numbers = numbers.ok_or_else(|| self.damaged("a sparse file's bad map"))?;
                pairs(&numbers)
            }
            (None, None) => pairs(&extensions.pieces),
        };
        self.expand(len, &pieces, from, end).map(Some)
    }

    /// The map before the content: how many pieces, then offset and bytes of each, a line
    /// for each number. Leaves `from` at the content.
    fn leading_map(&self, from: &mut u64, end: u64) -> Result<Vec<SparsePiece>, ImportError> {
        let start = *from;
        let mut at = start;
        let mut block = Vec::new();
        let mut number = || -> Option<u64> {
            let mut value: u64 = 0;
            let mut digits = 0;
            loop {
                let within = ((at - start) % BLOCK_BYTES) as usize;
                if within == 0 {
                    block.resize(BLOCK_BYTES as usize, 0);
                    (at + BLOCK_BYTES <= end).then_some(())?;
                    self.file.read_exact_at(&mut block, at).ok()?;
                }
                at += 1;
                match block[within] {
                    digit @ b'0'..=b'9' => {
                        value = value.checked_mul(10)?.checked_add((digit - b'0').into())?;
                        digits += 1;
                    }
                    b'\n' if digits > 0 => return Some(value),
                    _ => return None,
                }
            }
        };
        let mut map = || -> Option<Vec<SparsePiece>> {
            let count = number().filter(|&count| count <= MAX_PIECES)?;
            (0..count).map(|_| Some((number()?, number()?))).collect()
        };
        let pieces = map().ok_or_else(|| self.damaged("a sparse file's bad map"))?;
        *from = start + (at - start).next_multiple_of(BLOCK_BYTES);
        Ok(pieces)
    }

    /// Writes the pieces, whose bytes are in the archive from `from` to `end`, into a spool
    /// file of `len` bytes.
    fn expand(
        &mut self,
        len: u64,
        pieces: &[SparsePiece],
        mut from: u64,
        end: u64,
    ) -> Result<FileData, ImportError> {
        let path = self.spool.sparse_file(len, &self.shown)?;
        let mut out = File::options()
            .write(true)
            .open(&path)
            .map_err(io_error("opening", &path))?;
        for &(offset, count) in pieces {
            let within = offset.checked_add(count).is_some_and(|end| end <= len);
            if !within || from.checked_add(count).is_none_or(|last| last > end) {
                return Err(self.damaged("a sparse piece outside its file"));
            }
            out.seek(SeekFrom::Start(offset))
                .map_err(io_error("writing", &path))?;
            copy_range(&self.file, from, count, &mut out).map_err(io_error("writing", &path))?;
            from += count;
        }
        Ok(FileData::HostFile {
            path,
            offset: 0,
            len,
        })
    }
}

fn pairs(numbers: &[u64]) -> Vec<SparsePiece> {
    let pairs = numbers.chunks(2);
    pairs
        .map(|pair| (pair[0], pair.get(1).copied().unwrap_or(0)))
        .collect()
}

fn copy_range(from: &File, offset: u64, len: u64, out: &mut File) -> std::io::Result<()> {
    let mut from = from.try_clone()?;
    from.seek(SeekFrom::Start(offset))?;
    let copied = std::io::copy(&mut from.take(len), out)?;
    match copied == len {
        true => out.flush(),
        false => Err(std::io::ErrorKind::UnexpectedEof.into()),
    }
}
