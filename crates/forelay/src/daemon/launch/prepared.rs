//! Launches set up before they are asked for: when the planner says that a launch of a
//! profile is likely, its devices are mapped and its map image is composed, so that the
//! launch itself only starts the VMM; and if it will go on from a snapshot, that stands by too.
//!
//! ```text
//!   announced (an order is known) --Prepare--> prepared [--> its VMM stands by] --launch--> taken
//!                                                 |
//!          Release, shortage, a newer Prepare, too many ---> dropped
//! ```
//! What is prepared belongs to one lock, one manifest and one host name: that of all clones where
//! there is a snapshot of the image, else the manifest's, or the name that the next VM of the
//! profile would get. A launch that differs in any of them composes for itself.
//!
//! Refuses to decide which launches are likely. Invariants: a prepared map image is given
//! to at most one VM; nothing prepared outlives the daemon that prepared it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use forelay_cache::plan::PreparedLaunch;
use forelay_guest_protocol::snapshot::Tier;
use forelay_image::{ComponentId, Digest};
use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::MissedTickBehavior;

use crate::daemon::error::HostError;
use crate::daemon::forecast::announced::{AnnouncedLaunches, ProfileId};
use crate::daemon::launch::compose::{Composer, MapImage};
use crate::daemon::launch::find::SnapshotFinder;
use crate::daemon::launch::restore::HOSTNAME;
use crate::daemon::launch::standby::{Standby, StandbyStarter};
use crate::daemon::memory::mapper::Mapper;
use crate::daemon::order::{DeviceRecord, Order};
use crate::daemon::snapshot::service::{HoldsSnapshots, Resumable};
use crate::daemon::vm::registry::VmRegistry;
use crate::recipe::KernelFiles;

/// Launches that are kept prepared at a time; about a megabyte each, VMMs aside.
const KEEP: usize = 32;
/// Between two looks which of them lacks a VMM, or has one that is to go.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The name that a map image gives to its VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InsideName {
    /// Its own.
    Own(String),
    /// None that counts: a clone is told its own.
    OfClones,
}

impl InsideName {
    /// What a VM of this name needs, if it goes on from a snapshot at this tier.
    pub fn of(order: &Order, vm_name: &str, tier: Option<Tier>) -> Self {
        match tier {
            None | Some(Tier::Kernel) => Self::Own(hostname(order, vm_name)),
            Some(Tier::Composed | Tier::Ready) => Self::OfClones,
        }
    }

    /// In words.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Own(name) => name,
            Self::OfClones => HOSTNAME,
        }
    }
}

/// What a launch needs before its VMM can start.
#[derive(Clone, Debug)]
pub struct PreparedFiles {
    /// Devices of the components, in slot order.
    pub devices: Vec<DeviceRecord>,
    /// Kernel and initramfs.
    pub kernel: KernelFiles,
    /// Map image.
    pub map: MapImage,
}

/// A launch that is prepared.
pub struct Preparation {
    manifest: Digest,
    lock: Digest,
    /// The name in its map image.
    pub inside: InsideName,
    /// Its files.
    pub files: PreparedFiles,
    /// Its VMM, if one stands by.
    pub standby: Option<Standby>,
    /// A VMM was to stand by and could not.
    failed: bool,
}

impl Preparation {
    /// The map image, moved to where the VM's own files are.
    pub fn move_map(&self, to: &Path) -> std::io::Result<MapImage> {
        std::fs::rename(&self.files.map.record.path, to)?;
        let mut map = self.files.map.clone();
        to.clone_into(&mut map.record.path);
        Ok(map)
    }
}

impl Drop for Preparation {
    fn drop(&mut self) {
        // Not there any more if a VM has it.
        let _ = std::fs::remove_file(&self.files.map.record.path);
    }
}

/// The name that a VM of this order has inside.
pub fn hostname(order: &Order, vm_name: &str) -> String {
    let own = order.manifest.hostname.clone();
    own.unwrap_or_else(|| vm_name.to_owned())
}

/// What is known of likely launches, and what is prepared for them.
pub struct Preparations {
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// With a number that grows, to tell the oldest.
    prepared: BTreeMap<ProfileId, (u64, Preparation)>,
    next: u64,
    /// Nothing is prepared any more.
    closed: bool,
}

impl State {
    fn standbys(&mut self) -> impl Iterator<Item = &mut Option<Standby>> {
        self.prepared.values_mut().map(|(_, one)| &mut one.standby)
    }
}

impl Preparations {
    /// Nothing is prepared; what an earlier daemon prepared in `dir` is removed.
    pub fn open(dir: PathBuf) -> Self {
        let clear = || -> std::io::Result<()> {
            std::fs::create_dir_all(&dir)?;
            for entry in std::fs::read_dir(&dir)? {
                let path = entry?.path();
                if path.extension().is_some_and(|ending| ending == "img") {
                    std::fs::remove_file(path)?;
                }
            }
            Ok(())
        };
        if let Err(error) = clear() {
            // Preparing may fail, launches will not.
            tracing::error!(%error, path = %dir.display(), "prepared launches of before are left");
        }
        Self {
            dir,
            state: Mutex::default(),
        }
    }

    /// What was prepared for this launch, if it is what the launch needs. Anything else
    /// prepared for its profile is dropped.
    pub fn take(&self, order: &Order, vm_name: &str) -> Option<Preparation> {
        let (_, prepared) = self.state.lock().prepared.remove(&ProfileId::of(order))?;
        let fits = prepared.lock == order.lock.digest()
            && prepared.manifest == order.manifest.digest()
            && match &prepared.inside {
                InsideName::Own(name) => *name == hostname(order, vm_name),
                InsideName::OfClones => true,
            };
        fits.then_some(prepared)
    }

    /// Launches that are prepared now.
    pub fn len(&self) -> usize {
        self.state.lock().prepared.len()
    }

    /// Processes of the VMMs that stand by.
    pub fn standby_pids(&self) -> Vec<u32> {
        let mut state = self.state.lock();
        let standbys = state.standbys().flatten();
        standbys.filter_map(|one| one.pid()).collect()
    }

    /// Prepares nothing any more, and lets go of all that is.
    pub async fn close(&self) {
        self.state.lock().closed = true;
        self.end_standbys(|_| true).await;
        let gone = std::mem::take(&mut self.state.lock().prepared);
        drop(gone);
    }

    /// Ends those VMMs that are not to stand by.
    async fn end_standbys(&self, unwanted: impl Fn(&Standby) -> bool) {
        let mut gone = Vec::new();
        for standby in self.state.lock().standbys() {
            gone.extend(standby.take_if(|one| unwanted(one)));
        }
        join_all(gone.into_iter().map(Standby::end)).await;
    }

    /// Drops what is prepared for the order's profile; a number that nothing prepared has had.
    fn replace(&self, order: &Order) -> u64 {
        let mut state = self.state.lock();
        state.prepared.remove(&ProfileId::of(order));
        state.next += 1;
        state.next
    }

    fn keep(&self, order: &Order, prepared: Preparation) {
        let mut state = self.state.lock();
        if state.closed {
            return;
        }
        state.next += 1;
        let number = state.next;
        state
            .prepared
            .insert(ProfileId::of(order), (number, prepared));
        while state.prepared.len() > KEEP {
            let oldest = state.prepared.iter().min_by_key(|(_, (number, _))| number);
            let Some(oldest) = oldest.map(|(key, _)| key.clone()) else {
                return;
            };
            state.prepared.remove(&oldest);
        }
    }

    /// Prepared launches whose VMM does not stand by, oldest first.
    fn without_standby(&self) -> Vec<WithoutStandby> {
        let state = self.state.lock();
        let all = state.prepared.iter();
        let lacking = all.filter(|(_, (_, one))| one.standby.is_none() && !one.failed);
        let mut lacking: Vec<_> = lacking
            .map(|(id, (number, one))| WithoutStandby {
                id: id.clone(),
                number: *number,
                inside: one.inside.clone(),
                files: one.files.clone(),
            })
            .collect();
        lacking.sort_by_key(|one| one.number);
        lacking
    }

    /// Has a VMM stand by for the launch that it was started for, if that is prepared still.
    fn keep_standby(&self, of: &WithoutStandby, standby: Option<Standby>) {
        let mut state = self.state.lock();
        let found = state.prepared.get_mut(&of.id);
        if let Some((_, one)) = found.filter(|(number, _)| *number == of.number) {
            one.failed = standby.is_none();
            one.standby = standby;
        }
    }
}

#[async_trait]
impl HoldsSnapshots for Preparations {
    async fn let_go(&self, snapshot: ComponentId) {
        self.end_standbys(|one| one.from.kept.id == snapshot).await;
    }
}

/// A prepared launch whose VMM does not stand by.
struct WithoutStandby {
    id: ProfileId,
    number: u64,
    inside: InsideName,
    files: PreparedFiles,
}

/// Prepares launches that are likely.
pub struct Preparer {
    pub preparations: Arc<Preparations>,
    pub announced: Arc<AnnouncedLaunches>,
    pub mapper: Arc<Mapper>,
    pub composer: Arc<Composer>,
    pub registry: Arc<VmRegistry>,
    pub finder: Arc<SnapshotFinder>,
    /// Starts VMMs that stand by; the lock is held by who starts one.
    pub standby: Arc<tokio::sync::Mutex<StandbyStarter>>,
}

impl Preparer {
    /// Carries out the planner's reservations, in order, for as long as it makes any.
    pub async fn run(self, mut launches: UnboundedReceiver<PreparedLaunch>) {
        let this = Arc::new(self);
        // It looks at every process, and waits for those that wait for a page.
        let standby = Arc::clone(&this.standby);
        let clearing = tokio::task::spawn_blocking(move || standby.blocking_lock().clear());
        if let Err(error) = clearing.await {
            tracing::error!(%error, "VMMs may live on that stood by for a daemon of before");
        }
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                launch = launches.recv() => match launch {
                    Some(launch) => this.carry_out(launch).await,
                    None => return,
                },
                _ = looks.tick() => this.look().await,
            }
        }
    }

    async fn carry_out(&self, launch: PreparedLaunch) {
        match launch {
            PreparedLaunch::Prepare(domain, profile) => {
                let id = ProfileId { domain, profile };
                if let Some(order) = self.announced.order(&id) {
                    self.prepare(&order).await;
                }
            }
            PreparedLaunch::Release(domain, profile) => {
                let id = ProfileId { domain, profile };
                self.announced.forget(&id);
                let gone = self.preparations.state.lock().prepared.remove(&id);
                drop(gone);
            }
            // Memory is short: of all there is, this is the easiest to make again.
            PreparedLaunch::ReleaseAll => {
                let gone = std::mem::take(&mut self.preparations.state.lock().prepared);
                drop(gone);
            }
        }
    }

    async fn prepare(&self, order: &Order) {
        let tier = self.open(order).await.map(|from| from.tier());
        match self.prepare_files(order, tier).await {
            Ok(prepared) => {
                let name = prepared.inside.as_str().to_owned();
                self.preparations.keep(order, prepared);
                tracing::info!(profile = order.of.profile, name, "prepared");
            }
            Err(error) => {
                tracing::warn!(profile = order.of.profile, %error, "not prepared");
            }
        }
    }

    /// The snapshot that a launch of this order would go on from now.
    async fn open(&self, order: &Order) -> Option<Resumable> {
        let found = self.finder.open(order).await;
        found.ok().and_then(|(found, _)| found)
    }

    async fn prepare_files(
        &self,
        order: &Order,
        tier: Option<Tier>,
    ) -> Result<Preparation, HostError> {
        let name = match &order.manifest.name {
            Some(name) => name.clone(),
            None => self.registry.free_name(&order.of.profile),
        };
        let inside = InsideName::of(order, &name, tier);
        let devices = self.mapper.map_images(order).await?;
        let file = Digest::of(format!("{}/{}", order.domain, order.of.profile).as_bytes());
        // A path of its own: the one before may be taken already and not be moved yet.
        let number = self.preparations.replace(order);
        let path = self
            .preparations
            .dir
            .join(format!("{}-{number}.img", file.hex()));
        let map = self.composer.compose(order, inside.as_str(), path).await?;
        let kernel = self.composer.kernel(&order.lock.kernel).await?;
        Ok(Preparation {
            manifest: order.manifest.digest(),
            lock: order.lock.digest(),
            inside,
            files: PreparedFiles {
                devices,
                kernel,
                map,
            },
            standby: None,
            failed: false,
        })
    }

    /// Ends VMMs that are not to stand by any more, and begins to start one that is to.
    async fn look(self: &Arc<Self>) {
        // One that is being started is looked at when it stands by.
        let Ok(starter) = Arc::clone(&self.standby).try_lock_owned() else {
            return;
        };
        let has_memory = starter.has_memory();
        let unwanted = |one: &Standby| !has_memory || one.pid().is_none();
        self.preparations.end_standbys(unwanted).await;
        let standing_by = self.preparations.standby_pids().len();
        if !starter.may_start(standing_by) {
            return;
        }
        for lacking in self.preparations.without_standby() {
            let Some(order) = self.announced.order(&lacking.id) else {
                continue;
            };
            let Some(from) = self.open(&order).await else {
                continue;
            };
            if InsideName::of(&order, lacking.inside.as_str(), Some(from.tier())) != lacking.inside
            {
                // The snapshot is newer than what was prepared.
                return self.prepare(&order).await;
            }
            let preparations = Arc::clone(&self.preparations);
            tokio::spawn(async move {
                let starting = starter.start(&order, &lacking.files, Arc::new(from));
                let started = starting.await.inspect_err(|error| {
                    let profile = &order.of.profile;
                    tracing::warn!(profile, %error, "no VMM stands by for its launch");
                });
                preparations.keep_standby(&lacking, started.ok());
            });
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::order::tests::order;

    fn preparation(dir: &Path, order: &Order, name: &str) -> Preparation {
        let path = dir.join(format!("{name}.img"));
        std::fs::write(&path, name).unwrap();
        let record = DeviceRecord {
            image: Digest::of(b"map"),
            image_bytes: 4096,
            device_bytes: 4096,
            path,
            component: String::new(),
            members: vec![],
            memory: false,
            holds: vec![],
        };
        Preparation {
            manifest: order.manifest.digest(),
            lock: order.lock.digest(),
            inside: InsideName::Own(hostname(order, name)),
            files: PreparedFiles {
                devices: vec![],
                kernel: KernelFiles {
                    kernel: PathBuf::new(),
                    initrd: PathBuf::new(),
                },
                map: MapImage {
                    record,
                    uuid: Digest::of(b"map").image_uuid(),
                    notes: vec![],
                },
            },
            standby: None,
            failed: false,
        }
    }

    #[test]
    fn only_the_very_launch_that_was_prepared_gets_it_and_only_once() {
        let dir = tempfile::tempdir().unwrap();
        let preparations = Preparations::open(dir.path().join("premapped"));
        let web = order("web", "", "base");
        let keep = |name| preparations.keep(&web, preparation(dir.path(), &web, name));
        keep("web");
        let taken = preparations.take(&web, "web").unwrap();
        let there = dir.path().join("there");
        assert_eq!(taken.move_map(&there).unwrap().record.path, there);
        drop(taken);
        assert_eq!(std::fs::read(&there).unwrap(), b"web", "the VM has it now");
        assert!(preparations.take(&web, "web").is_none());

        // Another name, another lock, other files of the VM's own: all compose again.
        keep("web");
        assert!(preparations.take(&web, "web-2").is_none());
        assert!(!dir.path().join("web.img").exists(), "what is stale goes");
        keep("web");
        assert!(
            preparations
                .take(&order("web", "", "newer base"), "web")
                .is_none()
        );
        keep("web");
        let key = "ssh_keys = [\"ssh-ed25519 AAAA\"]";
        assert!(
            preparations
                .take(&order("web", key, "base"), "web")
                .is_none()
        );
        assert_eq!(preparations.len(), 0);
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many_and_all_go_with_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("premapped");
        let preparations = Preparations::open(own.clone());
        for number in 0..=KEEP {
            let order = order(&format!("p{number}"), "", "base");
            preparations.keep(&order, preparation(&own, &order, &format!("p{number}")));
        }
        assert_eq!(preparations.len(), KEEP);
        assert!(!own.join("p0.img").exists() && own.join("p1.img").exists());
        std::mem::forget(preparations);
        Preparations::open(own.clone());
        assert_eq!(std::fs::read_dir(own).unwrap().count(), 0);
    }
}
