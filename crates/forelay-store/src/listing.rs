//! What the repository listed last, for launches while it cannot be asked.
//!
//! Owns the file that says it. Refuses to know components: it has their ids, which pin them.
//!
//! Invariant: what one repository listed is never taken for what another has.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use forelay_image::ComponentId;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// A longer file is none of ours.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// A list of components as the repository at `location` had it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KeptList {
    location: String,
    components: Vec<ComponentId>,
}

/// The last list that a repository gave.
pub(crate) struct LastListing {
    path: PathBuf,
    location: String,
    is_wanted: AtomicBool,
    written: Mutex<Option<KeptList>>,
}

impl LastListing {
    /// Of the repository at `location`, kept in `cache_dir`. Reads nothing yet.
    pub(crate) fn new(cache_dir: &Path, location: String) -> Self {
        Self {
            path: cache_dir.join("listing.json"),
            location,
            is_wanted: AtomicBool::new(false),
            written: Mutex::default(),
        }
    }

    /// From now on it stands in for a repository that cannot be asked.
    pub(crate) fn want(&self) {
        self.is_wanted.store(true, Ordering::Relaxed);
    }

    /// Keeps what the repository lists now.
    pub(crate) fn keep(&self, components: &[ComponentId]) {
        let now = KeptList {
            location: self.location.clone(),
            components: components.to_vec(),
        };
        let mut written = self.written.lock();
        if written.as_ref() == Some(&now) {
            return;
        }
        let bytes = serde_json::to_vec(&now).unwrap_or_default();
        if bytes.len() as u64 > MAX_FILE_BYTES {
            // What was kept before would be wrong from now on.
            let _ = std::fs::remove_file(&self.path);
            tracing::warn!(components = components.len(), "a list so long is not kept");
            *written = None;
            return;
        }
        match forelay_host::atomic_write(&self.path, &bytes) {
            Ok(_) => *written = Some(now),
            Err(error) => {
                let path = self.path.display();
                tracing::warn!(%path, %error, "cannot keep what the repository lists");
            }
        }
    }

    /// What was kept, by this process or one before it, if it is wanted.
    pub(crate) fn last(&self) -> Option<Vec<ComponentId>> {
        if !self.is_wanted.load(Ordering::Relaxed) {
            return None;
        }
        let bytes = std::fs::metadata(&self.path).ok()?.len();
        let text = (bytes <= MAX_FILE_BYTES).then(|| std::fs::read(&self.path));
        let listed: KeptList = serde_json::from_slice(&text?.ok()?).ok()?;
        (listed.location == self.location).then_some(listed.components)
    }
}

#[cfg(test)]
mod tests {
    use forelay_image::Digest;

    use super::*;

    #[test]
    fn a_list_is_given_only_for_the_repository_that_gave_it_and_only_to_who_wants_it() {
        let dir = tempfile::tempdir().unwrap();
        let of = |location: &str| LastListing::new(dir.path(), location.to_owned());
        let ids = vec![Digest::of(b"one"), Digest::of(b"two")];
        let here = of("s3://here");
        here.want();
        assert_eq!(here.last(), None);
        here.keep(&ids);
        assert_eq!(here.last(), Some(ids.clone()));
        let again = of("s3://here");
        assert_eq!(again.last(), None, "nobody wants it");
        again.want();
        assert_eq!(again.last(), Some(ids));
        let elsewhere = of("s3://elsewhere");
        elsewhere.want();
        assert_eq!(elsewhere.last(), None);
        std::fs::write(dir.path().join("listing.json"), b"{").unwrap();
        assert_eq!(again.last(), None);
    }
}
