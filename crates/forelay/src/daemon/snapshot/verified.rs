//! Whether a shelf's snapshots are right: all of one is read and checked once, and again when a
//! file of it changed.

use std::path::PathBuf;

use forelay_image::{ComponentId, Digest};

use crate::daemon::error::HostError;
use crate::daemon::snapshot::kept::{Kept, NotResumed};
use crate::daemon::snapshot::on_disk::{FileStamp, look};
use crate::daemon::snapshot::shelf::Shelf;

impl Shelf {
    /// Whether a snapshot's files are as they were when all of it was read and checked.
    pub async fn is_verified(&self, id: ComponentId, packs: &[Digest]) -> Result<bool, HostError> {
        let stamps = self.stamps(packs).await?;
        let kept = self.kept.lock();
        Ok(kept.get(&id).is_some_and(|one| one.verified == stamps))
    }

    /// Has all of them read again: a disk may have other bytes in files that did not change.
    pub fn doubt_all(&self) {
        for one in self.kept.lock().values_mut() {
            one.verified.clear();
        }
    }

    /// Whether one is being verified.
    pub fn is_verifying(&self) -> bool {
        self.verifying.try_lock().is_err()
    }

    /// Reads all of a snapshot and checks it, unless that was done before; one after the other.
    pub async fn verify(&self, kept: &Kept, packs: &[Digest]) -> Result<(), NotResumed> {
        let _turn = self.verifying.lock().await;
        if self.is_verified(kept.id, packs).await? {
            return Ok(());
        }
        let stamps = self.stamps(packs).await?;
        let report = self.store().verify_one(kept.id).await;
        let report = report.map_err(HostError::failed)?;
        let wrong = report.findings.iter().find(|one| !one.unreadable);
        if let Some(found) = wrong.or(report.findings.first()) {
            let text = HostError::Failed(format!("{}: {}", found.key, found.problem));
            // What cannot be read now may be right.
            return Err(match wrong {
                Some(_) => NotResumed::Snapshot(text),
                None => NotResumed::Other(text),
            });
        }
        if let Some(one) = self.kept.lock().get_mut(&kept.id) {
            one.verified = stamps;
        }
        Ok(())
    }

    async fn stamps(&self, packs: &[Digest]) -> Result<Vec<FileStamp>, HostError> {
        let dir = self.dir.join("repository/packs");
        let files = packs.iter().map(|pack| format!("{}.pack", pack.hex()));
        let paths: Vec<PathBuf> = files.map(|file| dir.join(file)).collect();
        look(&self.looks, move || {
            paths.iter().map(|path| FileStamp::of(path)).collect()
        })
        .await?
    }

    /// Bytes of packs, as they are on disk.
    pub async fn bytes_of(&self, packs: &[Digest]) -> Result<u64, HostError> {
        let stamps = self.stamps(packs).await?;
        Ok(stamps.iter().map(|stamp| stamp.bytes).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::snapshot::samples::{only_pack, with_one};

    #[tokio::test]
    async fn one_that_was_verified_is_not_read_again_until_its_files_change() {
        let dir = tempfile::tempdir().unwrap();
        let (shelf, kept) = with_one(dir.path()).await;
        let (pack, packs) = only_pack(dir.path());
        let is_verified = async || shelf.is_verified(kept.id, &packs).await.unwrap();
        assert!(!is_verified().await);
        shelf.verify(&kept, &packs).await.unwrap();
        shelf.close_files().await;
        assert!(is_verified().await, "closed before");
        let right = std::fs::read(&pack).unwrap();
        let middle = right.len() / 2;
        let mut flipped = right.clone();
        flipped[middle] ^= 1;
        for wrong in [
            &flipped[..],
            &right[..middle],
            &right[..right.len() - 1],
            &[],
        ] {
            std::fs::write(&pack, wrong).unwrap();
            assert!(!is_verified().await);
            let found = shelf.verify(&kept, &packs).await;
            assert!(matches!(found, Err(NotResumed::Snapshot(_))), "{found:?}");
        }
        std::fs::write(&pack, right).unwrap();
        shelf.verify(&kept, &packs).await.unwrap();
        assert!(is_verified().await);
    }

    #[tokio::test]
    async fn what_cannot_be_read_now_is_not_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let (shelf, kept) = with_one(dir.path()).await;
        let (pack, packs) = only_pack(dir.path());
        let away = dir.path().join("away");
        std::fs::rename(&pack, &away).unwrap();
        // Reading a directory is an error, for which the bytes are not to blame.
        std::fs::create_dir(&pack).unwrap();
        let found = shelf.verify(&kept, &packs).await;
        assert!(matches!(found, Err(NotResumed::Other(_))), "{found:?}");
        std::fs::remove_dir(&pack).unwrap();
        std::fs::rename(&away, &pack).unwrap();
        shelf.verify(&kept, &packs).await.unwrap();
        assert!(shelf.is_verified(kept.id, &packs).await.unwrap());
    }
}
