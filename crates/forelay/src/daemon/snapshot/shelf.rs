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
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use forelay_cache::Domain;
use forelay_image::snapshot::SnapshotOf;
use forelay_image::{ChunkIndex, Component, ComponentId, Digest};
use forelay_store::gc::GcOptions;
use forelay_store::{DirectoryRepository, FetchConfig, Limited, Store, StoreConfig};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::daemon::error::HostError;
use crate::daemon::memory::planner::now_ms;

/// What a store of snapshots may keep of them a second time: nothing is read through it.
const CACHE_BYTES: u64 = 1 << 20;

/// Looks at files at a time. One at a disk that does not answer keeps its thread.
const LOOKS_AT_ONCE: usize = 16;

/// Failed launches in a row after which a snapshot is not tried again, whatever the causes were.
const MOST_FAILURES: u32 = 3;

/// Why a launch could not resume from a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum NotResumed {
    /// It is wrong: it is not to be tried again.
    #[error("{0}")]
    Snapshot(HostError),
    /// Something else, such as the host or what the guest did.
    #[error("{0}")]
    Other(HostError),
}

impl From<HostError> for NotResumed {
    fn from(error: HostError) -> Self {
        Self::Other(error)
    }
}

impl From<NotResumed> for HostError {
    fn from(error: NotResumed) -> Self {
        match error {
            NotResumed::Snapshot(error) | NotResumed::Other(error) => error,
        }
    }
}

/// A snapshot that there is.
#[derive(Clone, Debug)]
pub struct Kept {
    pub domain: Domain,
    pub id: ComponentId,
    pub component: Arc<Component>,
    pub of: SnapshotOf,
    /// Why it is not used any more.
    pub aside: Option<String>,
    /// Launches that resumed from it since this daemon started.
    pub uses: u64,
    /// When the last one did, whatever daemon it was of; 0 if none has.
    pub last_used_ms: i64,
    /// Launches that could not resume from it since one did.
    failures: u32,
    /// The files that hold it, as they were when all of them were right.
    verified: Vec<FileStamp>,
    /// Launches that are about to resume from it.
    held: Weak<()>,
}

impl Kept {
    /// A component as one; in words why it is none.
    fn new(domain: &Domain, id: ComponentId, component: Arc<Component>) -> Result<Self, String> {
        let of = component.snapshot.as_deref().cloned();
        let of = of.ok_or("it is no snapshot")?;
        of.check(&component.image)?;
        Ok(Self {
            domain: domain.clone(),
            id,
            component,
            of,
            aside: None,
            uses: 0,
            last_used_ms: 0,
            failures: 0,
            verified: Vec::new(),
            held: Weak::new(),
        })
    }

    /// Whether all of it was found to be right since this daemon started.
    pub fn was_verified(&self) -> bool {
        !self.verified.is_empty()
    }

    /// When it was made, milliseconds since the epoch.
    pub fn made_ms(&self) -> i64 {
        self.component.version.parse().unwrap_or(0)
    }
}

/// What a file looked like.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FileStamp {
    inode: u64,
    bytes: u64,
    changed_ns: (i64, i64),
}

/// See the module's header.
pub struct Shelf {
    domain: Domain,
    dir: PathBuf,
    store: Store,
    kept: Mutex<BTreeMap<ComponentId, Kept>>,
    /// Held by who changes what the store has.
    turn: tokio::sync::Mutex<()>,
    /// Held while one is verified.
    verifying: tokio::sync::Mutex<()>,
    looks: Arc<Semaphore>,
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
        let report = self.store.verify_one(kept.id).await;
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
        let stamp = |path: &PathBuf| {
            let meta = std::fs::metadata(path).map_err(|error| failed("find", path, &error))?;
            Ok(FileStamp {
                inode: meta.ino(),
                bytes: meta.len(),
                changed_ns: (meta.ctime(), meta.ctime_nsec()),
            })
        };
        look(&self.looks, move || paths.iter().map(stamp).collect()).await?
    }

    /// Bytes of packs, as they are on disk.
    pub async fn bytes_of(&self, packs: &[Digest]) -> Result<u64, HostError> {
        let stamps = self.stamps(packs).await?;
        Ok(stamps.iter().map(|stamp| stamp.bytes).sum())
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
    async fn close_files(&self) {
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

/// Looks at files on a thread of its own: a disk that does not answer holds up nobody else.
async fn look<T: Send + 'static>(
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
const USED: &str = "used";

fn used_file(shelf: &Path, id: ComponentId) -> PathBuf {
    shelf.join(USED).join(id.hex())
}

/// When each was used last, by the names of the files.
fn used_ms(shelf: &Path) -> BTreeMap<String, i64> {
    let used = |path: PathBuf| {
        let meta = path.metadata().ok()?;
        let name = path.file_name()?.to_str()?.to_owned();
        Some((name, meta.mtime() * 1000 + meta.mtime_nsec() / 1_000_000))
    };
    let all = files(&shelf.join(USED)).into_iter();
    all.filter_map(used).collect()
}

/// What does not restore, and why.
fn read_aside(shelf: &Path) -> BTreeMap<ComponentId, String> {
    let text = std::fs::read(shelf.join("aside.json")).ok();
    text.and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default()
}

fn failed(doing: &str, path: &Path, error: &std::io::Error) -> HostError {
    HostError::Failed(format!("cannot {doing} {}: {error}", path.display()))
}

fn private_dir(dir: &Path) -> std::io::Result<()> {
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
fn files(dir: &Path) -> Vec<PathBuf> {
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

#[cfg(test)]
pub mod tests {
    use forelay_guest_protocol::snapshot::Tier;
    use forelay_image::component::{ImageRef, Role};
    use forelay_image::snapshot::SnapshotOrigin;

    use super::*;

    /// A snapshot of nobody's that is like no other, made at a time; its image is in `dir`.
    pub fn snapshot(dir: &Path, name: &str, made_ms: i64) -> (Component, PathBuf, ChunkIndex) {
        sharing(dir, name, made_ms, name)
    }

    /// As [`snapshot`], known to the shelf that has it.
    pub fn kept(dir: &Path, name: &str, made_ms: i64) -> Kept {
        let (component, ..) = snapshot(dir, name, made_ms);
        Kept::new(&Domain::from("me"), component.id(), Arc::new(component)).unwrap()
    }

    /// As [`snapshot`], with the first half of its bytes like those of all that say so.
    pub fn sharing(
        dir: &Path,
        name: &str,
        made_ms: i64,
        half: &str,
    ) -> (Component, PathBuf, ChunkIndex) {
        let origin = SnapshotOrigin {
            tier: Tier::Kernel,
            kernel: Digest::of(name.as_bytes()),
            components: None,
            manifest: None,
            memory_mib: 2,
            cpus: 1,
            accelerator: "tcg".into(),
            machine: "q35".into(),
            vmm: "7.2".into(),
            vm: None,
        };
        of_origin(dir, (name, half), made_ms, origin)
    }

    /// As [`sharing`], made from what a launch may look for.
    pub fn of_origin(
        dir: &Path,
        (name, half): (&str, &str),
        made_ms: i64,
        origin: SnapshotOrigin,
    ) -> (Component, PathBuf, ChunkIndex) {
        let of = SnapshotOf {
            ram_bytes: u64::from(origin.memory_mib) << 20,
            origin,
            state_bytes: 1000,
            map: None,
            devices: Vec::new(),
        };
        // Nothing that can be compressed.
        let words = (2 << 20) / 64_u64;
        let word = |number: u64| {
            let of = if number < words / 2 { half } else { name };
            Digest::of(format!("{of} {number}").as_bytes()).hex()
        };
        let mut image: Vec<u8> = (0..words).map(word).flat_map(String::into_bytes).collect();
        image.resize(of.image_bytes() as usize, 0);
        let path = dir.join(name);
        std::fs::write(&path, &image).unwrap();
        let read = |buffer: &mut [u8], offset: u64| {
            let there = &image[offset as usize..];
            buffer.copy_from_slice(&there[..buffer.len()]);
            Ok(())
        };
        let index = ChunkIndex::of_plain(of.image_bytes(), 64 << 10, read).unwrap();
        let image = ImageRef {
            digest: index.image,
            bytes: index.image_bytes,
            metadata_bytes: 0,
            inodes: 0,
            chunk_index: index.digest(),
        };
        let version = made_ms.to_string();
        let mut component = Component::new("kept", &version, Role::Snapshot, "amd64", image);
        component.snapshot = Some(Box::new(of));
        (component, path, index)
    }

    /// Flips a byte in the first half of each pack, and has the files look as they were.
    pub fn damage_and_trust(shelf: &Shelf, id: ComponentId) {
        let mut packs = files(&shelf.dir.join("repository/packs"));
        packs.retain(|path| path.extension().is_some_and(|end| end == "pack"));
        for path in packs {
            let mut bytes = std::fs::read(&path).unwrap();
            let quarter = bytes.len() / 4;
            bytes[quarter] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            let meta = path.metadata().unwrap();
            let mut kept = shelf.kept.lock();
            let stamps = kept.get_mut(&id).unwrap().verified.iter_mut();
            let mut stamps = stamps.filter(|stamp| stamp.inode == meta.ino());
            let stamp = stamps.next().expect("a pack that was verified");
            stamp.changed_ns = (meta.ctime(), meta.ctime_nsec());
        }
    }

    async fn open(dir: &Path) -> Shelf {
        let (dir, domain) = (dir.join("snapshots"), Domain::from("me"));
        let limit = Duration::from_secs(60);
        Shelf::open(&dir, &domain, limit).await.unwrap()
    }

    async fn publish(shelf: &Shelf, dir: &Path, name: &str) -> Kept {
        let (component, image, index) = snapshot(dir, name, 1);
        let publishing = shelf.publish(&component, &image, &index);
        publishing.await.unwrap()
    }

    /// The pack of the one snapshot that there is.
    fn only_pack(dir: &Path) -> (PathBuf, [Digest; 1]) {
        let mut found = files(&dir.join("snapshots/me/repository/packs"));
        found.retain(|path| path.extension().is_some_and(|end| end == "pack"));
        let [pack] = &found[..] else {
            panic!("{found:?}");
        };
        let hex = pack.file_stem().unwrap().to_str().unwrap();
        let digest = format!("sha256:{hex}").parse().unwrap();
        (pack.clone(), [digest])
    }

    async fn with_one(dir: &Path) -> (Shelf, Kept) {
        let shelf = open(dir).await;
        let kept = publish(&shelf, dir, "one").await;
        (shelf, kept)
    }

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
