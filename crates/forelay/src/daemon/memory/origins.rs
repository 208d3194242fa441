//! Whose bytes the pages of a domain's files are.
//!
//! Shared memory names files by their images' digests, which publishers claim; what was verified
//! is the chunk index. Pages outlive the worker that filled them, so which index they are of is
//! kept beside the mounts, one line for each file whose pages changed hands.
//!
//! Invariants: while a file is of one index nothing of another is stored in it; before it becomes
//! another's its pages go. A worker that dies in between finds the older index and has them go
//! again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forelay_image::Digest;
use parking_lot::{Mutex, RwLock};

use crate::daemon::error::HostError;

/// Which chunk index the pages of one file are of, if that is known. Held while pages are stored.
type Origin = Arc<RwLock<Option<Digest>>>;

/// See the module's header.
#[derive(Debug)]
pub struct Origins {
    path: PathBuf,
    /// What is kept, to be added to.
    kept: Mutex<File>,
    files: RwLock<HashMap<Digest, Origin>>,
}

impl Origins {
    /// Those that earlier workers kept at `path`.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            other => other?,
        };
        // The last line of a file counts; one that was cut says nothing.
        let mut known = HashMap::new();
        for line in text.lines() {
            if let Some((image, index)) = line.split_once(' ')
                && let (Ok(image), Ok(index)) = (image.parse(), index.parse())
            {
                known.insert(image, index);
            }
        }
        let lines: String = known
            .iter()
            .map(|(image, index)| line(image, index))
            .collect();
        forelay_host::atomic_write(&path, lines.as_bytes())?;
        let kept = OpenOptions::new().append(true).open(&path)?;
        let files = known.into_iter();
        let files = files.map(|(image, index)| (image, Arc::new(RwLock::new(Some(index)))));
        Ok(Self {
            path,
            kept: Mutex::new(kept),
            files: RwLock::new(files.collect()),
        })
    }

    fn of(&self, image: &Digest) -> Origin {
        if let Some(known) = self.files.read().get(image) {
            return Arc::clone(known);
        }
        Arc::clone(self.files.write().entry(*image).or_default())
    }

    /// Makes a file one of this index. Unless it was, `evict` has its pages go first.
    pub fn set(
        &self,
        image: &Digest,
        index: Digest,
        evict: impl FnOnce() -> Result<(), HostError>,
    ) -> Result<(), HostError> {
        let origin = self.of(image);
        if *origin.read() == Some(index) {
            return Ok(());
        }
        let mut origin = origin.write();
        if *origin == Some(index) {
            return Ok(());
        }
        *origin = None;
        evict()?;
        self.keep(image, &index).map_err(HostError::failed)?;
        *origin = Some(index);
        Ok(())
    }

    /// Makes a file one of this index whose pages a live VM has, unless it is known what they
    /// are of.
    pub fn set_if_unknown(&self, image: &Digest, index: Digest) -> io::Result<()> {
        let origin = self.of(image);
        let mut origin = origin.write();
        if origin.is_none() {
            self.keep(image, &index)?;
            *origin = Some(index);
        }
        Ok(())
    }

    /// Stores by `store` what is of this index, if the file is; whether it did.
    pub fn store(&self, image: &Digest, index: Digest, store: impl FnOnce() -> bool) -> bool {
        let origin = self.of(image);
        let origin = origin.read();
        *origin == Some(index) && store()
    }

    fn keep(&self, image: &Digest, index: &Digest) -> io::Result<()> {
        let written = self.kept.lock().write_all(line(image, index).as_bytes());
        written.map_err(|error| {
            let path = self.path.display();
            io::Error::new(error.kind(), format!("cannot write {path}: {error}"))
        })
    }
}

/// Where the origins of a domain's files are kept.
pub fn path(mounts_dir: &Path, domain: &str) -> PathBuf {
    mounts_dir.with_file_name("origins").join(domain)
}

fn line(image: &Digest, index: &Digest) -> String {
    format!("{} {}\n", image.hex(), index.hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_go_before_a_file_becomes_anothers_also_across_workers() {
        let dir = tempfile::tempdir().unwrap();
        let path = || dir.path().join("origins/me");
        let [image, good, evil] = [&b"image"[..], b"good", b"evil"].map(Digest::of);
        let evicted = |origins: &Origins, index| {
            let mut evicted = false;
            let evict = || {
                evicted = true;
                Ok(())
            };
            origins.set(&image, index, evict).unwrap();
            evicted
        };
        let worker = Origins::open(path()).unwrap();
        assert!(!worker.store(&image, evil, || panic!("nobody's")));
        // What an unknown predecessor left may be anything.
        assert!(evicted(&worker, evil));
        assert!(!evicted(&worker, evil));
        assert!(worker.store(&image, evil, || true));

        let next = Origins::open(path()).unwrap();
        next.set_if_unknown(&image, good).unwrap();
        assert!(!evicted(&next, evil), "it is known");
        assert!(evicted(&next, good));
        assert!(!next.store(&image, evil, || panic!("another's")));
        // If the pages cannot go the file is nobody's, and what is kept is the index before.
        let failed = next.set(&image, evil, || Err(HostError::Failed("no".to_owned())));
        assert!(failed.is_err());
        assert!(!next.store(&image, good, || panic!("nobody's")));
        assert!(evicted(&next, good));

        std::fs::write(path(), format!("{}{}", line(&image, &good), "0123")).unwrap();
        let last = Origins::open(path()).unwrap();
        assert!(!evicted(&last, good));
        assert!(evicted(&last, evil));
        assert!(!evicted(&Origins::open(path()).unwrap(), evil));
    }
}
