//! The snapshots of one trust domain: a store of its own, which nobody else can read.
//!
//! ```text
//! state_dir/snapshots/<domain>/repository/   as any repository's
//!                              cache/        of its metadata
//!                              aside.json    what does not restore, and why
//!                              used/<id>     changed when a launch last resumed from it
//! ```
//! Invariant: a snapshot that was set aside is not used again, by no daemon, until another takes
//! its place. What is published and what is removed wait for each other: what a publication has
//! stored so far looks like nobody's.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use forelay_cache::Domain;
use forelay_image::{ChunkIndex, Component, ComponentId, Digest};
use forelay_store::gc::GcOptions;
use forelay_store::{DirectoryRepository, FetchConfig, Limited, Store, StoreConfig};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::daemon::error::HostError;
use crate::daemon::memory::planner::now_ms;
use crate::daemon::snapshot::kept::{Kept, NotResumed};
use crate::daemon::snapshot::on_disk::{
    USED, failed, files, look, private_dir, read_aside, used_file, used_ms,
};

/// What a store of snapshots may keep of them a second time: nothing is read through it.
const CACHE_BYTES: u64 = 1 << 20;

/// Looks at files at a time. One at a disk that does not answer keeps its thread.
const LOOKS_AT_ONCE: usize = 16;

/// Failed launches in a row after which a snapshot is not tried again, whatever the causes were.
const MOST_FAILURES: u32 = 3;

/// See the module's header.
pub struct Shelf {
    domain: Domain,
    pub(super) dir: PathBuf,
    store: Store,
    pub(super) kept: Mutex<BTreeMap<ComponentId, Kept>>,
    /// Held by who changes what the store has.
    turn: tokio::sync::Mutex<()>,
    /// Held by who saves a VM that runs: each takes as much disk as the VM has memory.
    pub saving: tokio::sync::Mutex<()>,
    /// Held while one is verified.
    pub(super) verifying: tokio::sync::Mutex<()>,
    pub(super) looks: Arc<Semaphore>,
}

impl Shelf {
    /// Opens a domain's, made if there is none; its disk may take so long for each answer. VMs
    /// that run may wait for this: nothing is written if all is there.
    pub async fn open(
        snapshots_dir: &Path,
        domain: &Domain,
        limit: Duration,
    ) -> Result<Self, HostError> {
        let dir = snapshots_dir.join(domain.as_str());
        let looks = Arc::new(Semaphore::new(LOOKS_AT_ONCE));
        let there = dir.clone();
        let (repository, mut aside, used_ms) = look(&looks, move || {
            for dir in [&there, &there.join(USED)] {
                private_dir(dir).map_err(|error| failed("make", dir, &error))?;
            }
            let repository = DirectoryRepository::create(there.join("repository"));
            let repository = repository.map_err(HostError::failed)?;
            Ok::<_, HostError>((repository, read_aside(&there), used_ms(&there)))
        })
        .await??;
        let opening = Store::open(StoreConfig {
            repository: Arc::new(Limited::new(Arc::new(repository), limit)),
            cache_dir: dir.join("cache"),
            cache_cap_bytes: CACHE_BYTES,
            fetch: FetchConfig::default(),
        });
        let store = opening.await.map_err(HostError::failed)?;
        store.initialise().await.map_err(HostError::failed)?;
        let listed = store.components().await.map_err(HostError::failed)?;
        let mut kept = BTreeMap::new();
        for component in listed {
            let id = component.id();
            match Kept::new(domain, id, component) {
                Ok(mut one) => {
                    one.aside = aside.remove(&id);
                    one.last_used_ms = used_ms.get(&id.hex()).copied().unwrap_or(0);
                    kept.insert(id, one);
                }
                Err(problem) => tracing::warn!(snapshot = %id, problem, "left alone"),
            }
        }
        Ok(Self {
            domain: domain.clone(),
            dir,
            store,
            kept: Mutex::new(kept),
            turn: Default::default(),
            saving: Default::default(),
            verifying: Default::default(),
            looks,
        })
    }

    /// Deletes what a daemon has stored that ended before it had published it.
    pub async fn clear(&self) {
        let _turn = self.turn.lock().await;
        self.collect_or_warn().await;
    }

    /// Where its snapshots' bytes are.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// All there are.
    pub fn all(&self) -> Vec<Kept> {
        self.kept.lock().values().cloned().collect()
    }

    /// The one with this id.
    pub fn get(&self, id: ComponentId) -> Option<Kept> {
        self.kept.lock().get(&id).cloned()
    }

    /// The newest with this key that was not set aside.
    pub fn find(&self, key: Digest) -> Option<Kept> {
        let all = self.all().into_iter();
        let usable = all.filter(|one| one.aside.is_none() && one.of.origin.key() == key);
        usable.max_by_key(Kept::made_ms)
    }

    /// Keeps one from being removed, for as long as what is returned lives.
    pub fn hold(&self, id: ComponentId) -> Option<Arc<()>> {
        let mut kept = self.kept.lock();
        let one = kept.get_mut(&id)?;
        let hold = one.held.upgrade().unwrap_or_default();
        one.held = Arc::downgrade(&hold);
        Some(hold)
    }

    /// Has no launch find one any more, unless one is about to resume from it.
    pub fn take(&self, id: ComponentId) -> Option<Kept> {
        let mut kept = self.kept.lock();
        let is_held = kept.get(&id)?.held.strong_count() > 0;
        (!is_held).then(|| kept.remove(&id))?
    }

    /// Undoes [`Shelf::take`].
    pub fn put_back(&self, kept: Kept) {
        self.kept.lock().insert(kept.id, kept);
    }

    /// The one with this image.
    pub fn of_image(&self, image: Digest) -> Option<Kept> {
        let mut all = self.all().into_iter();
        all.find(|one| one.component.image.digest == image)
    }

    /// A launch resumed from it. What is returned tells the next daemon, for which the launch
    /// does not wait.
    pub fn note_use(&self, id: ComponentId) -> impl Future<Output = ()> + Send + use<> {
        let mut kept = self.kept.lock();
        if let Some(one) = kept.get_mut(&id) {
            one.uses += 1;
            one.failures = 0;
            one.last_used_ms = now_ms();
        }
        // Its time is all there is to it.
        let file = kept.contains_key(&id).then(|| used_file(&self.dir, id));
        let looks = Arc::clone(&self.looks);
        async move {
            let Some(file) = file else { return };
            let written = look(&looks, move || std::fs::write(file, "")).await;
            if !matches!(written, Ok(Ok(()))) {
                tracing::warn!(
                    ?written,
                    "the next daemon will not know that a snapshot was used"
                );
            }
        }
    }

    /// A launch could not resume from it. True if it is set aside for that.
    pub fn note_failure(&self, id: ComponentId, error: &NotResumed) -> bool {
        let failures = match (error, self.kept.lock().get_mut(&id)) {
            (NotResumed::Other(_), Some(one)) => {
                one.failures += 1;
                one.failures
            }
            (NotResumed::Snapshot(_), Some(_)) => MOST_FAILURES,
            // It was removed meanwhile.
            (_, None) => return false,
        };
        if failures < MOST_FAILURES {
            tracing::warn!(snapshot = %id, %error, failures, "a launch could not resume from it");
            return false;
        }
        self.set_aside(id, &error.to_string());
        true
    }

    /// Uses a snapshot no more.
    pub fn set_aside(&self, id: ComponentId, why: &str) {
        tracing::error!(snapshot = %id, domain = %self.domain, why, "a snapshot is set aside");
        if let Some(one) = self.kept.lock().get_mut(&id) {
            one.aside = Some(why.to_owned());
        }
        self.save_aside();
    }

    fn save_aside(&self) {
        let all = self.all().into_iter();
        let aside: BTreeMap<ComponentId, String> = all
            .filter_map(|one| one.aside.map(|why| (one.id, why)))
            .collect();
        let save = || -> std::io::Result<()> {
            let text = serde_json::to_vec(&aside)?;
            forelay_host::atomic_write(&self.dir.join("aside.json"), &text).map(drop)
        };
        if let Err(error) = save() {
            tracing::warn!(%error, "the next daemon will try what was set aside once more");
        }
    }

    /// Publishes a snapshot whose image is in the file `image`.
    pub async fn publish(
        &self,
        component: &Component,
        image: &Path,
        chunks: &ChunkIndex,
    ) -> Result<Kept, HostError> {
        let id = component.id();
        let component = Arc::new(component.clone());
        let kept = Kept::new(&self.domain, id, component).map_err(HostError::Failed)?;
        let _turn = self.turn.lock().await;
        let publishing = self.store.publish(&kept.component, image, chunks, &|_| {});
        if let Err(error) = publishing.await {
            self.collect_or_warn().await;
            return Err(HostError::failed(error));
        }
        self.close_files().await;
        self.kept.lock().insert(id, kept.clone());
        Ok(kept)
    }

    /// Removes a snapshot that was taken, which no VM may map, and its bytes.
    pub async fn remove(&self, id: ComponentId) -> Result<(), HostError> {
        let _turn = self.turn.lock().await;
        let removing = self.store.remove_component(id);
        removing.await.map_err(HostError::failed)?;
        self.save_aside();
        // It may never have been used.
        let _ = std::fs::remove_file(used_file(&self.dir, id));
        self.collect_or_warn().await;
        Ok(())
    }

    async fn collect_or_warn(&self) {
        if let Err(error) = self.collect().await {
            let domain = &self.domain;
            tracing::warn!(%domain, %error, "bytes of no snapshot may be left");
        }
    }

    /// Deletes the bytes of no snapshot. This daemon alone publishes here, and has the turn.
    async fn collect(&self) -> Result<(), HostError> {
        let at_once = GcOptions {
            grace: Duration::ZERO,
            ..GcOptions::default()
        };
        // One run condemns an image, the next deletes it; then the same for its packs.
        for _ in 0..4 {
            self.store.gc(&at_once).await.map_err(HostError::failed)?;
        }
        Ok(())
    }

    /// Bytes that its snapshots take on disk, as far as that can be seen.
    pub async fn stored_bytes(&self) -> u64 {
        let dir = self.dir.join("repository");
        let counting = look(&self.looks, move || {
            let metas = files(&dir)
                .into_iter()
                .filter_map(|path| path.metadata().ok());
            metas.map(|meta| meta.len()).sum()
        });
        counting.await.unwrap_or(0)
    }

    /// They hold memory: for their owner alone, wherever somebody may move them.
    pub(super) async fn close_files(&self) {
        let dir = self.dir.clone();
        let closing = look(&self.looks, move || {
            for path in files(&dir) {
                // Those that are keep their stamps. One that went meanwhile is closed enough.
                let is_open = |meta: std::fs::Metadata| meta.mode() & 0o077 != 0;
                if path.metadata().is_ok_and(is_open) {
                    let _ = std::fs::set_permissions(path, Permissions::from_mode(0o600));
                }
            }
        });
        if let Err(error) = closing.await {
            tracing::error!(%error, "files of snapshots may be open to others");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::DirBuilderExt as _;

    use super::*;
    use crate::daemon::snapshot::samples::{only_pack, open, publish, with_one};

    #[tokio::test]
    async fn what_is_published_while_another_is_removed_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = open(dir.path()).await;
        let mut before = publish(&shelf, dir.path(), "first").await;
        for round in 0..8 {
            let name = format!("round {round}");
            let publishing = publish(&shelf, dir.path(), &name);
            let (next, removed) = tokio::join!(publishing, shelf.remove(before.id));
            removed.unwrap();
            // What the removal left condemned would go now.
            shelf.collect().await.unwrap();
            let report = shelf.store.verify_one(next.id).await.unwrap();
            assert!(report.findings.is_empty(), "{:?}", report.findings);
            let condemned = dir.path().join("snapshots/me/repository/condemned");
            assert_eq!(files(&condemned), Vec::<PathBuf>::new());
            before = next;
        }
    }

    #[tokio::test]
    async fn the_next_daemon_knows_what_was_used_and_deletes_what_is_nobodys() {
        let dir = tempfile::tempdir().unwrap();
        let shelf = open(dir.path()).await;
        let used = publish(&shelf, dir.path(), "used").await;
        shelf.note_use(used.id).await;
        let at = |ms| std::time::UNIX_EPOCH + Duration::from_millis(ms);
        let set = |ms| {
            let file = std::fs::File::options()
                .write(true)
                .open(used_file(&shelf.dir, used.id));
            file.unwrap().set_modified(at(ms)).unwrap();
        };
        set(1_234_567);
        let whole_bytes = shelf.stored_bytes().await;
        // One that was not published to its end.
        let lost = publish(&shelf, dir.path(), "lost").await;
        let listed = shelf.dir.join("repository/components");
        std::fs::remove_file(listed.join(format!("{}.json", lost.id.hex()))).unwrap();
        assert!(shelf.stored_bytes().await > whole_bytes * 3 / 2);

        let next = open(dir.path()).await;
        let [kept] = &next.all()[..] else {
            panic!("{:?}", next.all());
        };
        assert_eq!((kept.id, kept.last_used_ms), (used.id, 1_234_567));
        // Not while VMs may be waiting for it to open.
        assert!(next.stored_bytes().await > whole_bytes * 3 / 2);
        next.clear().await;
        assert_eq!(next.stored_bytes().await, whole_bytes);
        next.note_use(used.id).await;
        assert!(used_ms(&next.dir)[&used.id.hex()] > 1_234_567);
        next.remove(used.id).await.unwrap();
        assert!(used_ms(&next.dir).is_empty());
    }

    #[tokio::test]
    async fn the_third_failure_in_a_row_or_a_wrong_byte_sets_aside_for_good() {
        let dir = tempfile::tempdir().unwrap();
        let (shelf, kept) = with_one(dir.path()).await;
        let key = kept.of.origin.key();
        let late = || NotResumed::Other(HostError::Failed("too late".to_owned()));
        let fails = || shelf.note_failure(kept.id, &late());
        assert_eq!([fails(), fails()], [false, false]);
        shelf.note_use(kept.id).await;
        assert_eq!([fails(), fails(), fails()], [false, false, true]);
        assert!(shelf.find(key).is_none());
        let next = open(dir.path()).await;
        assert!(next.find(key).is_none(), "nor does the next daemon");

        let dir = tempfile::tempdir().unwrap();
        let (shelf, kept) = with_one(dir.path()).await;
        let wrong = NotResumed::Snapshot(HostError::Failed("wrong".to_owned()));
        assert!(shelf.note_failure(kept.id, &wrong));
        let gone = shelf.take(kept.id).unwrap();
        assert!(
            !shelf.note_failure(gone.id, &wrong),
            "nothing is left of it"
        );
    }

    #[tokio::test]
    async fn what_a_launch_is_about_to_resume_from_is_not_removed_and_what_goes_is_not_found() {
        let dir = tempfile::tempdir().unwrap();
        let (shelf, kept) = with_one(dir.path()).await;
        let key = kept.of.origin.key();
        let holds = (shelf.hold(kept.id), shelf.hold(kept.id));
        assert!(shelf.take(kept.id).is_none());
        drop(holds.0);
        assert!(shelf.take(kept.id).is_none(), "another launch holds it");
        drop(holds.1);
        let taken = shelf.take(kept.id).unwrap();
        assert!(shelf.find(key).is_none() && shelf.hold(kept.id).is_none());
        shelf.put_back(taken);
        assert!(shelf.find(key).is_some());
    }

    #[tokio::test]
    async fn snapshots_are_for_their_owner_alone_and_nothing_is_written_to_open_a_shelf() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = dir.path().join("snapshots");
        for open in [snapshots.join("me"), snapshots.join("me/repository")] {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(open)
                .unwrap();
        }
        let (shelf, kept) = with_one(dir.path()).await;
        shelf.note_use(kept.id).await;
        shelf.set_aside(kept.id, "for a test");
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o777;
        assert_eq!(mode(&shelf.dir), 0o700);
        let stored = files(&shelf.dir.join("repository"));
        assert!(stored.len() > 3, "{stored:?}");
        for path in stored {
            assert_eq!(mode(&path), 0o600, "{}", path.display());
        }
        let changed = || {
            let meta = shelf.dir.metadata().unwrap();
            (meta.ctime(), meta.ctime_nsec())
        };
        let before = changed();
        open(dir.path()).await;
        assert_eq!(
            changed(),
            before,
            "nothing would be written to a read-only disk"
        );
    }

    #[tokio::test]
    async fn a_disk_that_does_not_answer_holds_up_no_launch() {
        let dir = tempfile::tempdir().unwrap();
        let (shelf, kept) = with_one(dir.path()).await;
        // As many looks as there may be hang.
        let turns = u32::try_from(LOOKS_AT_ONCE).unwrap();
        let hang = shelf.looks.acquire_many(turns).await.unwrap();
        let noted = tokio::spawn(shelf.note_use(kept.id));
        let used = shelf.find(kept.of.origin.key()).unwrap();
        assert_eq!(used.uses, 1, "known at once");
        let (_, packs) = only_pack(dir.path());
        let looking = shelf.is_verified(kept.id, &packs);
        let given_up = tokio::time::timeout(Duration::from_millis(1), looking).await;
        assert!(given_up.is_err(), "a launch that waits for it can give up");
        drop(hang);
        noted.await.unwrap();
        assert!(used_ms(&shelf.dir).contains_key(&kept.id.hex()));
    }
}
