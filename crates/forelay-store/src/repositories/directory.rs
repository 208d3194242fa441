//! A repository in a directory: one file per object.
//!
//! Publication is atomic: bytes go to `.tmp/<unique>` in the same file system, are
//! synced, then *linked* to their key, which fails if the key is taken; last the
//! directory is synced. A crash leaves at most a file in `.tmp`, which nothing reads and
//! [`DirectoryRepository::create`] removes when it is older than a day. Any number of
//! processes may publish into one directory.
//!
//! Refuses to know what the objects contain.
//!
//! Invariant: a file under its key is complete and never changes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use forelay_image::Extent;
use rustix::fs::{Advice, OFlags};
use tokio::sync::Semaphore;

use crate::repository::{Body, Description, Object, Put, Repository, RepositoryError, check_key};

const TEMPORARY: &str = ".tmp";
const STALE: Duration = Duration::from_secs(24 * 3600);

/// Operations at a time. Each has a thread; one that hangs (a dead file server) keeps it, so
/// that without a bound a few time limits later all of the process's threads would hang.
const AT_ONCE: usize = 128;

/// A repository in a directory.
#[derive(Clone, Debug)]
pub struct DirectoryRepository {
    root: PathBuf,
    turns: Arc<Semaphore>,
}

impl DirectoryRepository {
    /// The repository in `root`. Nothing is looked at or made: a directory that is not there
    /// may be a file system that is not mounted yet.
    pub fn open(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            turns: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    /// As [`DirectoryRepository::open`], after making the directory if it does not exist.
    pub fn create(root: impl Into<PathBuf>) -> Result<Self, RepositoryError> {
        let root = root.into();
        let temporary = root.join(TEMPORARY);
        fs::create_dir_all(&temporary).map_err(|source| RepositoryError::Permanent {
            operation: "creation",
            key: root.display().to_string(),
            source: source.into(),
        })?;
        remove_stale(&temporary);
        Ok(Self::open(root))
    }

    fn path(&self, key: &str) -> Result<PathBuf, RepositoryError> {
        check_key(key)?;
        Ok(self.root.join(key))
    }

    /// Runs blocking file work off the async threads.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, RepositoryError> + Send + 'static,
    ) -> Result<T, RepositoryError> {
        let failed = |source| RepositoryError::Transient {
            operation: "file access",
            key: self.root.display().to_string(),
            source,
        };
        let turn = Arc::clone(&self.turns).acquire_owned().await;
        let turn = turn.map_err(|error| failed(error.into()))?;
        let this = self.clone();
        let working = tokio::task::spawn_blocking(move || {
            let result = work(&this);
            drop(turn);
            result
        });
        working
            .await
            .unwrap_or_else(|error| Err(failed(error.into())))
    }

    fn read(&self, key: &str, most_bytes: u64) -> Result<Bytes, RepositoryError> {
        let path = self.path(key)?;
        let failed = |source| classify("reading", key, &path, 0, source);
        let (file, bytes) = open_regular(&path).map_err(failed)?;
        if bytes > most_bytes {
            return Err(RepositoryError::TooLarge {
                key: key.to_owned(),
                most_bytes,
            });
        }
        let mut buffer = vec![0; bytes as usize];
        file.read_exact_at(&mut buffer, 0).map_err(failed)?;
        Ok(buffer.into())
    }

    fn read_range(&self, key: &str, extent: Extent) -> Result<Bytes, RepositoryError> {
        let path = self.path(key)?;
        let failed = |source| classify("reading", key, &path, 0, source);
        let (file, bytes) = open_regular(&path).map_err(failed)?;
        if extent.end() > bytes {
            return Err(RepositoryError::Truncated {
                key: key.to_owned(),
                bytes,
                extent,
            });
        }
        let mut buffer = vec![0; extent.len as usize];
        file.read_exact_at(&mut buffer, extent.offset)
            .map_err(failed)?;
        // A part of a pack goes to the disk cache; its pages here would be a third copy.
        let len = std::num::NonZeroU64::new(extent.len);
        let _ = rustix::fs::fadvise(&file, extent.offset, len, Advice::DontNeed);
        Ok(buffer.into())
    }

    fn write(&self, key: &str, body: &Body) -> Result<Put, RepositoryError> {
        let path = self.path(key)?;
        if path.exists() {
            return Ok(Put::Present);
        }
        let bytes = match body {
            Body::Bytes(bytes) => bytes.len() as u64,
            Body::File(path) => fs::metadata(path).map_or(0, |metadata| metadata.len()),
        };
        let failed = |source| classify("writing", key, &path, bytes, source);
        let folder = path.parent().unwrap_or(&self.root);
        // Never the root itself: see `open`.
        fs::metadata(&self.root).map_err(failed)?;
        fs::create_dir_all(folder).map_err(failed)?;
        let (temporary, mut file) = self.temporary().map_err(failed)?;
        let result = fill(&mut file, body)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::hard_link(&temporary, &path));
        drop(file);
        // A temporary that cannot be removed is harmless.
        let _ = fs::remove_file(&temporary);
        match result {
            Ok(()) => {
                File::open(folder)
                    .and_then(|folder| folder.sync_all())
                    .map_err(failed)?;
                Ok(Put::Created)
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(Put::Present),
            Err(error) => Err(failed(error)),
        }
    }

    fn temporary(&self) -> io::Result<(PathBuf, File)> {
        match fs::create_dir(self.root.join(TEMPORARY)) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        loop {
            let count = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = self
                .root
                .join(TEMPORARY)
                .join(format!("{}-{count}", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok((path, file)),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error),
            }
        }
    }
}

/// Opens an object and tells its size. Anything but a file (a pipe holds who opens it, and
/// with it a turn) is refused; links too, which lead out of the repository.
fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW;
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(
            ErrorKind::InvalidInput,
            "it is not a regular file",
        ));
    }
    Ok((file, metadata.len()))
}

fn fill(file: &mut File, body: &Body) -> io::Result<()> {
    match body {
        Body::Bytes(bytes) => file.write_all(bytes),
        Body::File(path) => io::copy(&mut File::open(path)?, file).map(drop),
    }
}

fn remove_stale(temporary: &Path) {
    let Ok(entries) = fs::read_dir(temporary) else {
        return;
    };
    for entry in entries.flatten() {
        let modified = entry.metadata().and_then(|metadata| metadata.modified());
        let age = modified
            .ok()
            .and_then(|time| SystemTime::now().duration_since(time).ok());
        if age.is_some_and(|age| age > STALE) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn classify(
    operation: &'static str,
    key: &str,
    path: &Path,
    bytes: u64,
    source: io::Error,
) -> RepositoryError {
    let key = key.to_owned();
    match source.kind() {
        ErrorKind::NotFound if operation != "writing" => RepositoryError::NotFound { key },
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => RepositoryError::NoSpace {
            path: path.to_owned(),
            bytes,
            source,
        },
        ErrorKind::Interrupted
        | ErrorKind::TimedOut
        | ErrorKind::WouldBlock
        | ErrorKind::StaleNetworkFileHandle
        | ErrorKind::UnexpectedEof => RepositoryError::Transient {
            operation,
            key,
            source: source.into(),
        },
        _ => RepositoryError::Permanent {
            operation,
            key,
            source: source.into(),
        },
    }
}

#[async_trait]
impl Repository for DirectoryRepository {
    fn describe(&self) -> Description {
        Description {
            kind: "directory",
            location: self.root.display().to_string(),
        }
    }

    async fn get(&self, key: &str, most_bytes: u64) -> Result<Bytes, RepositoryError> {
        let key = key.to_owned();
        self.blocking(move |this| this.read(&key, most_bytes)).await
    }

    async fn get_range(&self, key: &str, extent: Extent) -> Result<Bytes, RepositoryError> {
        let key = key.to_owned();
        self.blocking(move |this| this.read_range(&key, extent))
            .await
    }

    async fn put_if_absent(&self, key: &str, body: Body) -> Result<Put, RepositoryError> {
        let key = key.to_owned();
        self.blocking(move |this| this.write(&key, &body)).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        let prefix = prefix.trim_end_matches('/').to_owned();
        self.blocking(move |this| {
            let folder = this.path(&prefix)?;
            let failed = |source| classify("listing", &prefix, &folder, 0, source);
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
                Err(error) => return Err(failed(error)),
            };
            let mut keys = Vec::new();
            for entry in entries {
                let entry = entry.map_err(failed)?;
                let Ok(name) = entry.file_name().into_string() else {
                    continue;
                };
                let is_file = match entry.file_type() {
                    Ok(kind) => kind.is_file(),
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    Err(error) => return Err(failed(error)),
                };
                let key = format!("{prefix}/{name}");
                if is_file && check_key(&key).is_ok() {
                    keys.push(key);
                }
            }
            keys.sort();
            Ok(keys)
        })
        .await
    }

    async fn inspect(&self, key: &str) -> Result<Object, RepositoryError> {
        let key = key.to_owned();
        self.blocking(move |this| {
            let path = this.path(&key)?;
            let failed = |source| classify("reading", &key, &path, 0, source);
            let metadata = fs::metadata(&path).map_err(failed)?;
            let modified = metadata.modified().map_err(failed)?;
            Ok(Object {
                bytes: metadata.len(),
                modified,
            })
        })
        .await
    }

    async fn delete(&self, key: &str) -> Result<(), RepositoryError> {
        let key = key.to_owned();
        self.blocking(move |this| {
            let path = this.path(&key)?;
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    Err(classify("deletion", &key, &path, 0, error))
                }
                _ => Ok(()),
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_no_file_or_too_large_is_refused_before_it_is_waited_or_taken_memory_for() {
        let dir = tempfile::tempdir().unwrap();
        let repository = DirectoryRepository::create(dir.path()).unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("good"), "good").unwrap();
        std::os::unix::fs::symlink(at("good"), at("link")).unwrap();
        fs::create_dir(at("folder")).unwrap();
        let made = std::process::Command::new("mkfifo")
            .arg(at("pipe"))
            .status();
        assert!(made.unwrap().success());
        for key in ["link", "folder", "pipe"] {
            let whole = repository.get(key, 100);
            let whole = tokio::time::timeout(Duration::from_secs(60), whole).await;
            if whole.is_err() {
                // Lets the thread go that waits for a writer.
                let _ = OpenOptions::new().read(true).write(true).open(at(key));
            }
            let refused = whole.expect("nobody waits for a pipe").unwrap_err();
            assert!(
                matches!(refused, RepositoryError::Permanent { .. }),
                "{key}: {refused}"
            );
            let part = repository.get_range(key, Extent::new(0, 1)).await;
            let refused = part.unwrap_err();
            assert!(
                matches!(refused, RepositoryError::Permanent { .. }),
                "{key}: {refused}"
            );
        }
        // Sparse: nothing is written, and memory for it would not be had.
        let huge = File::create(at("huge")).unwrap();
        huge.set_len(8 << 40).unwrap();
        let refused = repository.get("huge", 64 << 20).await.unwrap_err();
        assert!(
            matches!(refused, RepositoryError::TooLarge { .. }),
            "{refused}"
        );
        assert_eq!(&repository.get("good", 4).await.unwrap()[..], b"good");
        assert!(repository.get("good", 3).await.is_err());
    }
}
