//! All snapshots of this host: found, read, listed, removed.
//!
//! Invariants: a snapshot is used in its own trust domain alone; the VMM sees none of it before
//! all of it was verified; none that a VM maps is removed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use forelay_cache::{Domain, PlannerEvent, SharedImage};
use forelay_guest_protocol::snapshot::Tier;
use forelay_image::{ChunkIndex, Component, ComponentId, Digest};
use forelay_store::{ImageHold, ImageMap, Priority, Store};

use crate::api::{self, EventKind};
use crate::daemon::error::HostError;
use crate::daemon::events::Happening;
use crate::daemon::memory::domains::Domains;
use crate::daemon::memory::planner::{PlannerHandle, now_ms};
use crate::daemon::order::{DeviceRecord, Order};
use crate::daemon::snapshot::kept::{Kept, NotResumed};
use crate::daemon::snapshot::origin::{Runtime, latest_tier, origin};
use crate::daemon::snapshot::shelf::Shelf;
use crate::daemon::vm::registry::VmRegistry;
use crate::host_stats::HostStats;

/// See the module's header.
pub struct Snapshots {
    pub dir: PathBuf,
    /// How long the disk that they are on may take for an answer.
    pub timeout: Duration,
    /// The host's store, through which all images are read.
    pub store: Store,
    pub domains: Arc<Domains>,
    pub memory: Arc<PlannerHandle>,
    pub registry: Arc<VmRegistry>,
    pub holders: Arc<dyn HoldsSnapshots>,
    pub shelves: tokio::sync::Mutex<BTreeMap<Domain, Arc<Shelf>>>,
    /// Read by who makes the snapshot of a VM that nobody runs on yet.
    pub saving: tokio::sync::RwLock<()>,
}

/// Who holds snapshots for launches that nobody has asked for yet.
#[async_trait]
pub trait HoldsSnapshots: Send + Sync {
    /// Lets go of one; returns when nothing maps it.
    async fn let_go(&self, snapshot: ComponentId);
}

/// A snapshot that a launch can resume from: all of it is right, its memory can be mapped.
pub struct Resumable {
    pub kept: Kept,
    /// State of the devices.
    pub state: Bytes,
    /// The memory image as the VMM opens it.
    pub memory: DeviceRecord,
    /// Until the VM's own record says that it maps it.
    _hold: Arc<()>,
}

/// What opening a snapshot came to.
pub enum Opened<T> {
    Here(T),
    /// Nobody has read all of it since its files changed.
    Unverified,
    /// It was removed a moment ago, or its domain's mount is one that an earlier version made.
    Unreachable,
}

impl Resumable {
    /// How far its maker had come.
    pub fn tier(&self) -> Tier {
        self.kept.of.origin.tier
    }

    /// A clone finds its devices where its maker had them.
    pub fn check_devices(&self, devices: &[DeviceRecord]) -> Result<(), HostError> {
        let here = devices.iter().map(|one| (one.image, one.device_bytes));
        let there = self.kept.of.devices.iter().copied();
        match self.tier() == Tier::Kernel || here.eq(there) {
            true => Ok(()),
            false => Err(HostError::Failed(
                "what this version composes for it is not what it was made with".to_owned(),
            )),
        }
    }
}

/// What a launch says of a snapshot that was of no use to it.
pub fn failure(tier: Tier, error: &NotResumed, aside: bool) -> String {
    let aside = if aside { ", which is set aside" } else { "" };
    format!(
        "not resumed from the snapshot at {}{aside}: {error}",
        tier.name()
    )
}

impl Snapshots {
    /// The snapshots of a domain.
    pub async fn shelf(&self, domain: &Domain) -> Result<Arc<Shelf>, HostError> {
        let mut shelves = self.shelves.lock().await;
        if let Some(shelf) = shelves.get(domain) {
            return Ok(Arc::clone(shelf));
        }
        let shelf = Arc::new(Shelf::open(&self.dir, domain, self.timeout).await?);
        shelves.insert(domain.clone(), Arc::clone(&shelf));
        Ok(shelf)
    }

    /// Those of all domains that have any.
    pub async fn all_shelves(&self) -> Vec<Arc<Shelf>> {
        let mut shelves = Vec::new();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
                continue;
            };
            match self.shelf(&Domain::from(name.as_str())).await {
                Ok(shelf) => shelves.push(shelf),
                Err(error) => tracing::warn!(domain = name, %error, "its snapshots are not read"),
            }
        }
        shelves
    }

    /// Whether there may be a snapshot for a launch. Most domains have none; a launch makes no
    /// place for them.
    pub fn any(&self, order: &Order) -> bool {
        latest_tier(order).is_some() && self.dir.join(order.domain.as_str()).exists()
    }

    /// The best snapshot that this launch can resume from at once; and why others cannot be.
    pub async fn best(
        self: &Arc<Self>,
        order: &Order,
        runtime: &Runtime,
    ) -> Result<(Option<Resumable>, Vec<String>), HostError> {
        let shelf = self.shelf(&order.domain).await?;
        let mut problems = Vec::new();
        for kept in self.candidates(&shelf, order, runtime) {
            let tier = kept.of.origin.tier;
            match self.open(&shelf, kept.clone()).await {
                Ok(Opened::Here(found)) => return Ok((Some(found), problems)),
                Ok(Opened::Unverified) => {
                    let name = tier.name();
                    problems.push(format!("the snapshot at {name} is not verified yet"));
                    self.verify_later(&shelf, kept, |_| true);
                }
                Ok(Opened::Unreachable) => break,
                Err(error) => {
                    let aside = shelf.note_failure(kept.id, &error);
                    problems.push(failure(tier, &error, aside));
                }
            }
        }
        Ok((None, problems))
    }

    /// The memory image that a launch would go on from now, made reachable. Asked again and again,
    /// so it counts against none that it cannot be opened, or verified, at this moment.
    pub async fn memory_of(
        self: &Arc<Self>,
        order: &Order,
        runtime: &Runtime,
    ) -> Option<DeviceRecord> {
        let shelf = self.shelf(&order.domain).await.ok()?;
        for kept in self.candidates(&shelf, order, runtime) {
            match self.reach(&shelf, &kept).await {
                Ok(Opened::Here((memory, _))) => return Some(memory),
                Ok(Opened::Unverified) => self.verify_later(&shelf, kept, |error| {
                    matches!(error, NotResumed::Snapshot(_))
                }),
                Ok(Opened::Unreachable) => break,
                Err(error) => tracing::debug!(snapshot = %kept.id, %error, "not forecast"),
            }
        }
        None
    }

    /// What a launch may resume from, the best first.
    pub fn candidates(
        &self,
        shelf: &Shelf,
        order: &Order,
        runtime: &Runtime,
    ) -> impl Iterator<Item = Kept> {
        let latest = latest_tier(order);
        let tiers = Tier::ALL.into_iter().rev();
        let tiers = tiers.filter(move |tier| Some(*tier) <= latest);
        tiers.filter_map(|tier| shelf.find(origin(order, tier, runtime).key()))
    }

    /// Verifies one beside what found it, unless that shelf is being verified; a failure that
    /// `counts` is noted.
    fn verify_later(
        self: &Arc<Self>,
        shelf: &Arc<Shelf>,
        kept: Kept,
        counts: impl Fn(&NotResumed) -> bool + Send + 'static,
    ) {
        if shelf.is_verifying() {
            return;
        }
        let (this, shelf) = (Arc::clone(self), Arc::clone(shelf));
        tokio::spawn(async move {
            let verified = this.verify(&shelf, &kept).await;
            if let Some(error) = verified.err().filter(counts) {
                shelf.note_failure(kept.id, &error);
            }
        });
    }

    /// Deletes what a daemon of before has left, and verifies all snapshots, so that no launch
    /// has to: each is read once.
    pub async fn verify_all(&self) {
        for shelf in self.all_shelves().await {
            shelf.clear().await;
            self.verify_shelf(&shelf).await;
        }
    }

    async fn verify_shelf(&self, shelf: &Shelf) {
        for kept in shelf.all().into_iter().filter(|one| one.aside.is_none()) {
            if let Err(error) = self.verify(shelf, &kept).await {
                shelf.note_failure(kept.id, &error);
            }
        }
    }

    /// Verifies one, unless that was done before.
    pub async fn verify(&self, shelf: &Shelf, kept: &Kept) -> Result<(), NotResumed> {
        let (map, _hold) = self.map_of(shelf, kept).await?;
        shelf.verify(kept, &map.locations.packs).await
    }

    async fn map_of(
        &self,
        shelf: &Shelf,
        kept: &Kept,
    ) -> Result<(Arc<ImageMap>, ImageHold), HostError> {
        let image = kept.component.image;
        let hold = self.store.add_image_of(image, shelf.store());
        let hold = hold.map_err(HostError::failed)?;
        let opened = self.store.open_image(image.digest).await;
        Ok((opened.map_err(HostError::failed)?, hold))
    }

    /// Makes the memory of a snapshot reachable that was verified, and reads its state.
    pub async fn open(&self, shelf: &Shelf, kept: Kept) -> Result<Opened<Resumable>, NotResumed> {
        let (memory, hold) = match self.reach(shelf, &kept).await? {
            Opened::Here(reached) => reached,
            Opened::Unverified => return Ok(Opened::Unverified),
            Opened::Unreachable => return Ok(Opened::Unreachable),
        };
        let reading = self
            .store
            .read_image(memory.image, kept.of.state(), Priority::Demand);
        let state = reading.await.map_err(HostError::failed)?;
        Ok(Opened::Here(Resumable {
            kept,
            state,
            memory,
            _hold: hold,
        }))
    }

    /// Makes the memory of a snapshot reachable that was verified; with what keeps it from being
    /// removed.
    async fn reach(
        &self,
        shelf: &Shelf,
        kept: &Kept,
    ) -> Result<Opened<(DeviceRecord, Arc<()>)>, NotResumed> {
        let (map, image_hold) = self.map_of(shelf, kept).await?;
        if !shelf.is_verified(kept.id, &map.locations.packs).await? {
            return Ok(Opened::Unverified);
        }
        let Some(hold) = shelf.hold(kept.id) else {
            return Ok(Opened::Unreachable);
        };
        let image = kept.component.image;
        let component = format!("memory at {}", kept.of.origin.tier.name());
        let label = component.clone();
        let (domains, domain) = (Arc::clone(&self.domains), kept.domain.clone());
        let mapped = tokio::task::spawn_blocking(move || {
            let memory = domains.ensure(&domain)?;
            let (_, device_bytes) = domains.add_image(&memory, &image)?;
            memory.snapshots.lock().insert(image.digest, label);
            let path = memory.shared.private_path(&image.digest);
            Ok::<_, HostError>(path.map(|path| (path, device_bytes)))
        });
        let mapped = mapped.await.map_err(HostError::failed)??;
        let Some((path, device_bytes)) = mapped else {
            return Ok(Opened::Unreachable);
        };
        let memory = DeviceRecord {
            image: image.digest,
            image_bytes: image.bytes,
            device_bytes,
            path,
            component,
            members: Vec::new(),
            memory: true,
            holds: vec![image_hold],
        };
        Ok(Opened::Here((memory, hold)))
    }

    /// Makes the memory image of a VM that runs known again; `None` if it is not there.
    pub async fn know(
        &self,
        domain: &Domain,
        image: Digest,
    ) -> Result<Option<(Arc<ImageMap>, ImageHold)>, HostError> {
        let shelf = self.shelf(domain).await?;
        let Some(kept) = shelf.of_image(image) else {
            return Ok(None);
        };
        self.map_of(&shelf, &kept).await.map(Some)
    }

    /// All snapshots, as clients see them, by domain and age.
    pub async fn list(&self) -> Vec<api::Snapshot> {
        let mut listed = Vec::new();
        for shelf in self.all_shelves().await {
            let stored_bytes = shelf.stored_bytes().await;
            let mut all = shelf.all();
            all.sort_by_key(Kept::made_ms);
            listed.extend(all.iter().map(|kept| self.view(kept, stored_bytes)));
        }
        listed
    }

    /// One snapshot, as clients see it.
    pub async fn show(&self, kept: &Kept) -> Result<api::Snapshot, HostError> {
        let shelf = self.shelf(&kept.domain).await?;
        Ok(self.view(kept, shelf.stored_bytes().await))
    }

    fn view(&self, kept: &Kept, domain_stored_bytes: u64) -> api::Snapshot {
        api::Snapshot {
            id: kept.id,
            tier: kept.of.origin.tier,
            domain: kept.domain.as_str().to_owned(),
            made_of: kept.component.description.clone(),
            made_ms: kept.made_ms(),
            image: kept.component.image.digest,
            image_bytes: kept.component.image.bytes,
            state_bytes: kept.of.state_bytes,
            domain_stored_bytes,
            origin: kept.of.origin.clone(),
            uses: kept.uses,
            vms: self.users(kept),
            verified: kept.was_verified(),
            problem: kept.aside.clone(),
        }
    }

    /// VMs that run on a snapshot's memory.
    pub fn users(&self, kept: &Kept) -> Vec<String> {
        let image = kept.component.image.digest;
        let uses = |vm: &crate::daemon::vm::instance::VmData| {
            vm.devices
                .iter()
                .any(|device| device.memory && device.image == image)
        };
        let all = self.registry.all().into_iter();
        let exist = all.filter(|instance| !instance.state().has_ended());
        let known = exist.filter(|instance| instance.read(uses));
        let mut users: Vec<String> = known.map(|instance| instance.name().to_owned()).collect();
        // Of others the kernel knows what they map, but not whether they hibernate.
        let is_of_vm = kept.of.origin.vm.is_some();
        let unknown = self.registry.unknown_dirs().into_iter();
        let unknown = unknown.filter(|dir| is_of_vm || vmm_maps(dir, &image));
        users.extend(unknown.filter_map(|dir| {
            let name = dir.file_name()?.to_string_lossy().into_owned();
            Some(format!("{name} (whose record cannot be used)"))
        }));
        users
    }

    /// The one whose id begins with `prefix`.
    pub async fn named(&self, prefix: &str) -> Result<(Arc<Shelf>, Kept), HostError> {
        let wanted = prefix.strip_prefix("sha256:").unwrap_or(prefix);
        let mut found = Vec::new();
        for shelf in self.all_shelves().await {
            let all = shelf.all().into_iter();
            let matching = all.filter(|one| !wanted.is_empty() && one.id.hex().starts_with(wanted));
            found.extend(matching.map(|one| (Arc::clone(&shelf), one)));
        }
        match found.len() {
            1 => Ok(found.swap_remove(0)),
            0 => Err(HostError::Invalid(format!(
                "no snapshot's id begins with {prefix:?}: `forelay snapshot list` shows them"
            ))),
            count => Err(HostError::Invalid(format!(
                "the ids of {count} snapshots begin with {prefix:?}: give more of it"
            ))),
        }
    }

    /// Removes a snapshot that no VM runs on.
    pub async fn remove(&self, shelf: &Shelf, kept: &Kept) -> Result<(), HostError> {
        self.holders.let_go(kept.id).await;
        // From here on no launch finds it; those that did are in the registry.
        let taken = shelf.take(kept.id).ok_or_else(|| {
            HostError::Busy("a launch is resuming from this snapshot: try again".to_owned())
        })?;
        let removed = match &*self.users(kept) {
            [] => {
                self.forget(kept);
                shelf.remove(kept.id).await
            }
            users => Err(HostError::Busy(format!(
                "the memory of {} comes from this snapshot: stop them first",
                users.join(", ")
            ))),
        };
        removed.inspect_err(|_| shelf.put_back(taken))
    }

    /// Takes a snapshot's image out of shared memory.
    fn forget(&self, kept: &Kept) {
        let image = kept.component.image;
        if let Some(memory) = self.domains.get(&kept.domain) {
            // Only if a launch looked at it since the daemon started.
            let _ = memory.shared.remove_file(&image.digest);
            memory.snapshots.lock().remove(&image.digest);
        }
        self.memory.tell(PlannerEvent::Removed(SharedImage {
            domain: kept.domain.clone(),
            image: image.digest,
        }));
        self.store.forget_image(image);
    }

    /// Publishes a snapshot in place of those like it that were set aside, and verifies it.
    pub async fn publish(
        &self,
        shelf: &Shelf,
        component: &Component,
        image: &Path,
        chunks: &ChunkIndex,
    ) -> Result<Kept, HostError> {
        let key = component.snapshot.as_ref().map(|of| of.origin.key());
        self.remove_aside(shelf, |one| Some(one.of.origin.key()) == key)
            .await;
        let kept = shelf.publish(component, image, chunks).await?;
        let Err(error) = self.verify(shelf, &kept).await else {
            self.tell_made(component);
            return Ok(kept);
        };
        // It shares what is damaged with others: all that is goes, and it is written again.
        shelf.set_aside(kept.id, &error.to_string());
        shelf.doubt_all();
        self.verify_shelf(shelf).await;
        self.remove_aside(shelf, |_| true).await;
        let kept = shelf.publish(component, image, chunks).await?;
        self.verify(shelf, &kept).await?;
        self.tell_made(component);
        Ok(kept)
    }

    fn tell_made(&self, component: &Component) {
        let tier = component.snapshot.as_ref().map(|of| of.origin.tier.name());
        let message = format!(
            "a snapshot was made of {}, at `{}`",
            component.name,
            tier.unwrap_or_default()
        );
        let made = Happening::new(EventKind::SnapshotMade, message);
        self.registry
            .events()
            .tell(made.bytes(component.image.bytes));
    }

    async fn remove_aside(&self, shelf: &Shelf, wanted: impl Fn(&Kept) -> bool) {
        let all = shelf.all().into_iter();
        for kept in all.filter(|one| one.aside.is_some() && wanted(one)) {
            if let Err(error) = self.remove(shelf, &kept).await {
                tracing::warn!(snapshot = %kept.id, %error, "what was set aside stays");
            }
        }
    }

    /// Removes those snapshots of a domain that were of no use for longest until all take at most
    /// `cap_bytes`. If `made` cannot fit, it goes itself, and no other for it.
    pub async fn keep_within(
        &self,
        shelf: &Shelf,
        made: &Kept,
        cap_bytes: u64,
    ) -> Result<(), HostError> {
        let map = self.store.open_image(made.component.image.digest).await;
        let packs = map.map_err(HostError::failed)?.locations.packs.clone();
        let own_bytes = shelf.bytes_of(&packs).await?;
        let told = |bytes: u64| {
            format!(
                "snapshots of {} would take {} MiB on disk with this one, and `cap_bytes` in \
                 [snapshots] of the configuration allows {}: raise it",
                made.domain,
                bytes >> 20,
                cap_bytes >> 20
            )
        };
        if own_bytes > cap_bytes {
            self.remove(shelf, made).await?;
            return Err(HostError::Invalid(told(own_bytes)));
        }
        for kept in expendable(shelf.all(), made.id, now_ms()) {
            if shelf.stored_bytes().await <= cap_bytes {
                return Ok(());
            }
            match self.remove(shelf, &kept).await {
                Ok(()) => tracing::info!(snapshot = %kept.id, "removed: snapshots take too much"),
                Err(error) => tracing::info!(snapshot = %kept.id, %error, "kept"),
            }
        }
        let stored_bytes = shelf.stored_bytes().await;
        if stored_bytes <= cap_bytes {
            return Ok(());
        }
        self.remove(shelf, made).await?;
        let told = told(stored_bytes);
        Err(HostError::Busy(told + ", or stop VMs that run on others"))
    }

    /// A launch could not resume from a snapshot. True if it is set aside for that.
    pub async fn note_failure(&self, kept: &Kept, error: &NotResumed) -> bool {
        let message = format!(
            "a launch did not resume from snapshot {}: {error}",
            kept.id.short()
        );
        let failed = Happening::new(EventKind::SnapshotFailed, message);
        self.registry.events().tell(failed);
        let aside = match self.shelf(&kept.domain).await {
            Ok(shelf) => shelf.note_failure(kept.id, error),
            Err(error) => {
                tracing::error!(%error, "what a snapshot is worth cannot be noted");
                false
            }
        };
        if aside {
            self.holders.let_go(kept.id).await;
        }
        aside
    }

    /// A launch resumed from it.
    pub async fn note_use(&self, kept: &Kept) {
        if let Ok(shelf) = self.shelf(&kept.domain).await {
            tokio::spawn(shelf.note_use(kept.id));
        }
    }
}

/// Whether a VMM of this directory maps an image's file.
fn vmm_maps(dir: &Path, image: &Digest) -> bool {
    let hex = image.hex();
    let is_of_image = |file: &PathBuf| {
        let name = file.file_name().unwrap_or_default();
        name.to_string_lossy().contains(&hex)
    };
    let vmms = forelay_vm::stray::find(dir).into_iter();
    let mut files = vmms.flat_map(|vmm| HostStats::default().mapped_files(vmm.pid));
    files.any(|file| is_of_image(&file))
}

/// All but one and those of VMs, those that go first at first: what was set aside is of no use at
/// all.
fn expendable(mut all: Vec<Kept>, but: ComponentId, now_ms: i64) -> Vec<Kept> {
    all.retain(|one| one.id != but && one.of.origin.vm.is_none());
    all.sort_by_key(|one| {
        // A date that is to come is of a clock that was wrong, and says nothing.
        let dates = [one.made_ms(), one.last_used_ms].into_iter();
        let last_ms = dates.filter(|ms| *ms <= now_ms).max();
        (one.aside.is_none(), last_ms)
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::snapshot::samples::kept;

    #[test]
    fn what_was_set_aside_goes_first_and_nothing_is_kept_for_a_date_to_come() {
        let dir = tempfile::tempdir().unwrap();
        let kept = |name: &str, made_ms, last_used_ms| {
            let mut kept = kept(dir.path(), name, made_ms);
            kept.last_used_ms = last_used_ms;
            kept
        };
        let now_ms = 1000;
        let ahead = kept("ahead", 90_000, 80_000);
        let used = kept("used", 10, 1000);
        let old = kept("old", 20, 0);
        let mut aside = kept("aside", 999, 999);
        aside.aside = Some("wrong".to_owned());
        let made = kept("made", 1000, 0);
        let all = vec![
            made.clone(),
            used.clone(),
            ahead.clone(),
            old.clone(),
            aside.clone(),
        ];
        let going = expendable(all, made.id, now_ms);
        let ids: Vec<ComponentId> = going.iter().map(|one| one.id).collect();
        assert_eq!(ids, [aside.id, ahead.id, old.id, used.id]);
    }
}
