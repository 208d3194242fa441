//! Bounds what VMs' consoles and VMMs print: in the runtime directory, which on most hosts is
//! memory, guests that print without an end would fill it.
//!
//! Looks at all directories of VMs from time to time, those of makers and of VMMs that stand by,
//! too. While no worker runs, nothing is bounded; the next one begins with it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use forelay_vm::logs::keep_newest;

/// Between looks; a virtual serial line does not fill more than some MiB meanwhile.
const PAUSE: Duration = Duration::from_secs(1);

/// Keeps the newest `keep_bytes` of each log of VMs, which have a directory each in one of
/// `parents`.
pub async fn keep_bounded(parents: Vec<PathBuf>, keep_bytes: u64) {
    let parents = std::sync::Arc::new(parents);
    let mut told = false;
    loop {
        let parents = std::sync::Arc::clone(&parents);
        let look = move || {
            parents
                .iter()
                .find_map(|one| bound_all(one, keep_bytes).err())
        };
        // What cannot be bounded now can be later; it is told once.
        if let Ok(Some((path, error))) = tokio::task::spawn_blocking(look).await
            && !std::mem::replace(&mut told, true)
        {
            tracing::warn!(path = %path.display(), %error, "a VM's log cannot be bounded");
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// All logs of VMs in a directory; the first that could not be bounded.
fn bound_all(parent: &Path, keep_bytes: u64) -> Result<(), (PathBuf, std::io::Error)> {
    let mut failed = Ok(());
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        for name in forelay_vm::LOG_FILES {
            let path = entry.path().join(name);
            if let Err(error) = keep_newest(&path, keep_bytes)
                && failed.is_ok()
            {
                failed = Err((path, error));
            }
        }
    }
    failed
}
