//! What shelves look at on disk: each look on a thread of its own, as a disk may not answer.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forelay_image::ComponentId;
use tokio::sync::Semaphore;

use crate::daemon::error::HostError;

/// What a file looked like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStamp {
    pub inode: u64,
    pub bytes: u64,
    pub changed_ns: (i64, i64),
}

impl FileStamp {
    /// Of the file that is there now.
    pub fn of(path: &Path) -> Result<Self, HostError> {
        let meta = std::fs::metadata(path).map_err(|error| failed("find", path, &error))?;
        Ok(Self {
            inode: meta.ino(),
            bytes: meta.len(),
            changed_ns: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// Looks at files on a thread of its own: a disk that does not answer holds up nobody else.
pub async fn look<T: Send + 'static>(
    looks: &Arc<Semaphore>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, HostError> {
    let turn = Arc::clone(looks).acquire_owned().await;
    let turn = turn.map_err(HostError::failed)?;
    let looking = tokio::task::spawn_blocking(move || {
        let seen = work();
        drop(turn);
        seen
    });
    looking.await.map_err(HostError::failed)
}

/// Folder of the files that say when snapshots were used.
pub const USED: &str = "used";

/// The one of a snapshot.
pub fn used_file(shelf: &Path, id: ComponentId) -> PathBuf {
    shelf.join(USED).join(id.hex())
}

/// When each was used last, by the names of the files.
pub fn used_ms(shelf: &Path) -> BTreeMap<String, i64> {
    let used = |path: PathBuf| {
        let meta = path.metadata().ok()?;
        let name = path.file_name()?.to_str()?.to_owned();
        Some((name, meta.mtime() * 1000 + meta.mtime_nsec() / 1_000_000))
    };
    let all = files(&shelf.join(USED)).into_iter();
    all.filter_map(used).collect()
}

/// What does not restore, and why.
pub fn read_aside(shelf: &Path) -> BTreeMap<ComponentId, String> {
    let text = std::fs::read(shelf.join("aside.json")).ok();
    text.and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default()
}

/// What could not be done to a file or directory.
pub fn failed(doing: &str, path: &Path, error: &std::io::Error) -> HostError {
    HostError::Failed(format!("cannot {doing} {}: {error}", path.display()))
}

/// Makes a directory, with those above it, that nobody but its owner can read.
pub fn private_dir(dir: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)?;
    // Only where it changes anything: on a file system that is read-only now nothing can.
    if dir.metadata()?.mode() & 0o777 == 0o700 {
        return Ok(());
    }
    std::fs::set_permissions(dir, Permissions::from_mode(0o700))
}

/// The regular files below a directory.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found
}
