//! Host files that others may change while an image is made of them, such as those of a user's
//! directory that root builds a component of.
//!
//! Invariant: bytes are only read of the very file that was seen, never of what a link leads to
//! that took its place, or the place of a directory above it.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// A host file as it was seen.
#[derive(Clone, Debug)]
pub struct WatchedFile {
    path: PathBuf,
    seen: Seen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Seen {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

impl WatchedFile {
    /// The regular file at `path`, which has no link in it, as `metadata` shows it.
    pub fn new(path: PathBuf, metadata: &Metadata) -> Self {
        let seen = Seen::of(metadata);
        Self { path, seen }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.seen.bytes
    }

    /// Opens it; `None` if something else is there now, or it was changed.
    pub fn open(&self) -> io::Result<Option<File>> {
        // Not waiting for a pipe's writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let resolve = ResolveFlags::NO_SYMLINKS;
        let opened = match rustix::fs::openat2(CWD, &self.path, flags, Mode::empty(), resolve) {
            Ok(opened) => File::from(opened),
            Err(Errno::LOOP | Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        Ok(self.is_unchanged(&opened)?.then_some(opened))
    }

    /// Whether it is now as it was seen, after it was read.
    pub fn is_unchanged(&self, opened: &File) -> io::Result<bool> {
        let metadata = opened.metadata()?;
        Ok(metadata.is_file() && Seen::of(&metadata) == self.seen)
    }
}
