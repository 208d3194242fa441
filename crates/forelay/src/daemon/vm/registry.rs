//! The table of instances: what clients see of each VM, and what a later daemon needs to
//! take it over, kept on disk.
//!
//! ```text
//! Launching -> Booting -> Mounted -> Ready -> Stopped
//!     |           |          |         |
//!     +-----------+----------+---------+---> Failed
//! ```
//! Invariants: a name belongs to at most one live instance; an instance's record is on
//! disk before its VMM starts and goes when the instance has ended and is forgotten.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forelay_cache::Domain;
use forelay_image::NameError;
use forelay_predict::rank::Present;
use forelay_vm::VmHandle;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::api::{Vm, VmComponent, VmState};
use crate::daemon::error::HostError;
use crate::daemon::forecast::forecasts::{LiveVm, LiveVms};
use crate::daemon::memory::residency::RunningVmm;
use crate::daemon::order::DeviceRecord;
use crate::daemon::vm::directory::{RECORD, VmDir};
use crate::daemon::vm::supervise::Observed;
use crate::history::{LaunchId, ProfileRef};

/// Ended instances that are still listed, so that `logs` and `ps --all` work.
const KEEP_ENDED: usize = 100;

/// Format of records that this code writes, and the newest that it reads.
pub const RECORD_FORMAT: u32 = 1;

/// What a later daemon needs to know of an instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Format of the record; 0 for those of before there was a number.
    #[serde(default)]
    pub format: u32,
    /// What clients see.
    pub vm: Vm,
    /// Row of the launch in the history.
    pub launch_id: LaunchId,
    /// The manifest (TOML), with what was attached since.
    pub manifest: String,
    /// Its lock (TOML).
    pub lock: String,
    /// pmem devices in slot order, map image first.
    pub devices: Vec<DeviceRecord>,
}

/// One instance.
#[derive(Debug)]
pub struct Instance {
    name: String,
    state: watch::Sender<Vm>,
    record: Mutex<Record>,
    phase: Mutex<VmPhase>,
    cancel: watch::Sender<bool>,
    /// Held by the attach or detach under way.
    devices_change: tokio::sync::Mutex<()>,
}

/// What there is of a VM, besides what clients see.
#[derive(Debug)]
enum VmPhase {
    /// No VMM yet, or one that the launch has not handed over.
    Launching,
    /// A VMM that is supervised.
    Running(RunningVm),
    /// None any more.
    Ended,
}

/// A VMM that is supervised.
struct RunningVm {
    handle: VmHandle,
    /// What it has touched, once observation has begun.
    observed: Option<Arc<Mutex<Observed>>>,
}

impl std::fmt::Debug for RunningVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RunningVm({})", self.handle.pid())
    }
}

impl Instance {
    /// An instance that is being launched.
    pub fn new(record: Record) -> Self {
        Self {
            name: record.vm.name.clone(),
            state: watch::Sender::new(record.vm.clone()),
            record: Mutex::new(record),
            phase: Mutex::new(VmPhase::Launching),
            cancel: watch::Sender::new(false),
            devices_change: tokio::sync::Mutex::default(),
        }
    }

    /// Waits until nobody else changes the VM's devices: an attach reads what there is,
    /// changes it and writes the record.
    pub async fn device_turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.devices_change.lock().await
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it keeps its files.
    pub fn dir(&self) -> Result<VmDir, NameError> {
        let path = self.read(|vm| vm.runtime_dir.clone());
        VmDir::of(path.parent().unwrap_or(&path), &self.name)
    }

    /// True while a VMM may exist.
    pub fn is_live(&self) -> bool {
        self.read(|vm| vm.state.is_live())
    }

    /// Tells its launch to end, if it is not handed over yet.
    pub fn cancel(&self) {
        self.cancel.send_replace(true);
    }

    /// Waits until its launch is told to end.
    pub async fn cancelled(&self) {
        // The sender lives in this instance.
        let _ = self.cancel.subscribe().wait_for(|cancel| *cancel).await;
    }

    /// Its VMM is supervised from now on.
    pub fn run(&self, handle: VmHandle) {
        *self.phase.lock() = VmPhase::Running(RunningVm {
            handle,
            observed: None,
        });
        self.state.send_modify(|_| {});
    }

    /// Its touches are observed from now on.
    pub fn observe(&self, observed: Arc<Mutex<Observed>>) {
        if let VmPhase::Running(running) = &mut *self.phase.lock() {
            running.observed = Some(observed);
        }
    }

    /// Its VMM, while that is supervised.
    pub fn handle(&self) -> Option<VmHandle> {
        match &*self.phase.lock() {
            VmPhase::Running(running) => Some(running.handle.clone()),
            VmPhase::Launching | VmPhase::Ended => None,
        }
    }

    /// What its VMM has touched, while that is observed.
    pub fn observed(&self) -> Option<Arc<Mutex<Observed>>> {
        match &*self.phase.lock() {
            VmPhase::Running(running) => running.observed.clone(),
            VmPhase::Launching | VmPhase::Ended => None,
        }
    }

    /// Its VMM is gone; `change` says what clients see of that.
    pub fn end(&self, change: impl FnOnce(&mut Vm)) {
        *self.phase.lock() = VmPhase::Ended;
        self.update(|vm| {
            vm.pid = None;
            change(vm);
        });
    }

    /// Waits until its VMM is supervised or it has ended.
    pub async fn launched(&self) -> Option<VmHandle> {
        let mut watch = self.state.subscribe();
        loop {
            let live = watch.borrow_and_update().state.is_live();
            let handle = self.handle();
            if handle.is_some() || !live || watch.changed().await.is_err() {
                return handle;
            }
        }
    }

    /// Waits until it has ended.
    pub async fn ended(&self) {
        // The sender lives in this instance.
        let _ = self
            .state
            .subscribe()
            .wait_for(|vm| !vm.state.is_live())
            .await;
    }

    /// What clients see.
    pub fn vm(&self) -> Vm {
        self.state.borrow().clone()
    }

    /// Looks at what clients see, without a copy. `look` must not change the instance.
    pub fn read<T>(&self, look: impl FnOnce(&Vm) -> T) -> T {
        look(&self.state.borrow())
    }

    /// Its profile and owner.
    pub fn profile(&self) -> ProfileRef {
        self.read(|vm| ProfileRef::new(vm.profile.as_str(), vm.owner.as_str()))
    }

    /// Its trust domain.
    pub fn domain(&self) -> Domain {
        self.read(|vm| vm.domain.as_str().into())
    }

    /// Follows what clients see.
    pub fn watch(&self) -> watch::Receiver<Vm> {
        self.state.subscribe()
    }

    /// Changes what clients see. A state that has ended does not come back to life.
    pub fn update(&self, change: impl FnOnce(&mut Vm)) {
        self.state.send_modify(|vm| {
            let before = vm.state;
            change(vm);
            if !before.is_live() {
                vm.state = before;
            }
        });
    }

    /// The pmem devices in slot order.
    pub fn devices(&self) -> Vec<DeviceRecord> {
        self.record.lock().devices.clone()
    }

    /// Changes what is kept on disk; [`Instance::save`] writes it.
    pub fn update_record(&self, change: impl FnOnce(&mut Record)) {
        change(&mut self.record.lock());
    }

    /// Manifest and lock, with what was attached since.
    pub fn order(&self) -> (String, String) {
        let record = self.record.lock();
        (record.manifest.clone(), record.lock.clone())
    }

    /// Changes what [`Instance::order`] says.
    pub fn set_order(&self, manifest: String, lock: String) {
        let mut record = self.record.lock();
        record.manifest = manifest;
        record.lock = lock;
    }

    /// Row of the launch in the history.
    pub fn launch_id(&self) -> LaunchId {
        self.record.lock().launch_id
    }

    /// Writes the record to the instance's directory, whole or not at all.
    pub fn save(&self) -> std::io::Result<()> {
        let mut record = self.record.lock().clone();
        record.vm = self.vm();
        let dir = &record.vm.runtime_dir;
        let text = serde_json::to_vec_pretty(&record)?;
        forelay_host::atomic_write(&dir.join(RECORD), &text).map(drop)
    }
}

/// All instances by name.
#[derive(Debug, Default)]
pub struct VmRegistry {
    table: Mutex<InstanceTable>,
}

#[derive(Debug, Default)]
struct InstanceTable {
    instances: BTreeMap<String, Arc<Instance>>,
    /// Names of VMs that may run and cannot be known, each with its record.
    unknown: BTreeMap<String, UnusableRecord>,
    /// Nothing is launched any more.
    closed: bool,
}

/// The name that a launch asks for.
#[derive(Clone, Copy, Debug)]
pub enum WantedName<'a> {
    /// This one.
    Given(&'a str),
    /// Any that is free: `profile`, `profile-2`, `profile-3`...
    OfProfile(&'a str),
}

/// A name that a launch has. Its instance ends with the claim, unless that is kept.
#[derive(Debug)]
pub struct Claim {
    instance: Arc<Instance>,
    kept: bool,
}

impl Claim {
    /// The instance.
    pub fn instance(&self) -> &Arc<Instance> {
        &self.instance
    }

    /// The instance lives on without its launch.
    pub fn keep(mut self) {
        self.kept = true;
    }

    /// Ends the instance.
    pub fn end(mut self, state: VmState, error: String) {
        self.kept = true;
        self.instance.end(|vm| {
            vm.error = Some(error);
            vm.state = state;
        });
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.kept {
            self.instance.end(|vm| {
                vm.error = Some("its launch was interrupted".to_owned());
                vm.state = VmState::Failed;
            });
        }
    }
}

impl VmRegistry {
    /// Claims a name for a launch, whose record `make` makes; refuses a name that a live
    /// instance has.
    pub fn claim(
        &self,
        wanted: WantedName<'_>,
        make: impl FnOnce(&str) -> Result<Record, HostError>,
    ) -> Result<Claim, HostError> {
        let mut table = self.table.lock();
        if table.closed {
            return Err(HostError::Busy(
                "the daemon ends: nothing is launched".to_owned(),
            ));
        }
        let name = match wanted {
            WantedName::Given(name) => name.to_owned(),
            WantedName::OfProfile(profile) => table.free_name(profile),
        };
        let instance = Arc::new(Instance::new(make(&name)?));
        table.insert(Arc::clone(&instance))?;
        Ok(Claim {
            instance,
            kept: false,
        })
    }

    /// Adds an instance that an earlier daemon launched.
    pub fn insert(&self, instance: Arc<Instance>) -> Result<(), HostError> {
        self.table.lock().insert(instance)
    }

    /// Keeps names from launches for as long as there is a record that nobody can read.
    pub fn keep_names(&self, unusable: Vec<UnusableRecord>) {
        let unknown = unusable.into_iter().map(|record| (record.name(), record));
        self.table.lock().unknown.extend(unknown);
    }

    /// Refuses launches from now on; returns the instances that live.
    pub fn close(&self) -> Vec<Arc<Instance>> {
        self.table.lock().closed = true;
        self.live()
    }

    /// The instance of this name.
    pub fn get(&self, name: &str) -> Option<Arc<Instance>> {
        self.table.lock().instances.get(name).cloned()
    }

    /// All instances, by name.
    pub fn all(&self) -> Vec<Arc<Instance>> {
        self.table.lock().instances.values().cloned().collect()
    }

    /// Those whose VMM may run.
    pub fn live(&self) -> Vec<Arc<Instance>> {
        self.all()
            .into_iter()
            .filter(|instance| instance.is_live())
            .collect()
    }

    /// The VMMs that run.
    pub fn running_vmms(&self) -> Vec<RunningVmm> {
        let running = |instance: Arc<Instance>| {
            Some(RunningVmm {
                vm: instance.name().into(),
                domain: instance.domain(),
                pid: instance.read(|vm| vm.pid)?,
            })
        };
        self.live().into_iter().filter_map(running).collect()
    }

    /// A name that no live instance has: `profile`, `profile-2`, `profile-3`...
    pub fn free_name(&self, profile: &str) -> String {
        self.table.lock().free_name(profile)
    }
}

impl LiveVms for VmRegistry {
    fn live_vms(&self) -> Vec<LiveVm> {
        let present = |one: &VmComponent| Present {
            label: format!("{} {}", one.name, one.version),
            names: vec![one.name.clone()],
            image: one.image,
            image_bytes: one.image_bytes,
        };
        let running = |instance: Arc<Instance>| LiveVm {
            name: instance.name().to_owned(),
            of: instance.profile(),
            domain: instance.domain(),
            launch_id: instance.launch_id(),
            launched_ms: instance.read(|vm| vm.launched_ms),
            components: instance.read(|vm| vm.components.iter().map(present).collect()),
        };
        self.live().into_iter().map(running).collect()
    }
}

impl InstanceTable {
    fn live(&self, name: &str) -> Option<&Arc<Instance>> {
        self.instances.get(name).filter(|other| other.is_live())
    }

    /// The record that keeps this name, while it is there.
    fn unknown(&self, name: &str) -> Option<&UnusableRecord> {
        let record = self.unknown.get(name)?;
        record.path.exists().then_some(record)
    }

    fn free_name(&self, profile: &str) -> String {
        let numbered = (2u32..).map(|number| format!("{profile}-{number}"));
        std::iter::once(profile.to_owned())
            .chain(numbered)
            .find(|name| self.live(name).is_none() && self.unknown(name).is_none())
            .unwrap_or_else(|| profile.to_owned())
    }

    fn insert(&mut self, instance: Arc<Instance>) -> Result<(), HostError> {
        let name = instance.name();
        if let Some(other) = self.live(name) {
            let state = other.read(|vm| vm.state);
            return Err(HostError::Busy(format!(
                "a VM called {name} is {state:?} already: stop it with `forelay stop {name}`, or \
                 give this one another name with --name"
            )));
        }
        if let Some(record) = self.unknown(name) {
            return Err(HostError::Busy(format!(
                "a VM called {name} may run: {}; give this one another name with --name, or \
                 remove {} once that VM has ended",
                record.problem,
                record.dir().display()
            )));
        }
        self.instances.insert(name.to_owned(), instance);
        self.forget_oldest_ended();
        Ok(())
    }

    fn forget_oldest_ended(&mut self) {
        let ended = self
            .instances
            .values()
            .filter(|instance| !instance.is_live());
        let mut ended: Vec<_> = ended
            .map(|instance| (instance.read(|vm| vm.launched_ms), Arc::clone(instance)))
            .collect();
        ended.sort_by(|(a, one), (b, other)| (a, &one.name).cmp(&(b, &other.name)));
        let excess = ended.len().saturating_sub(KEEP_ENDED);
        for (_, instance) in ended.into_iter().take(excess) {
            self.instances.remove(&instance.name);
            if let Ok(dir) = instance.dir()
                && let Err(error) = dir.remove()
            {
                tracing::warn!(vm = instance.name, %error, "what an ended VM left stays");
            }
        }
    }
}

/// A record that says nothing to this daemon, of a VM that may run all the same.
#[derive(Debug)]
pub struct UnusableRecord {
    path: PathBuf,
    problem: String,
}

impl UnusableRecord {
    fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(&self.path)
    }

    /// The name of the VM.
    fn name(&self) -> String {
        let name = self.dir().file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

/// Reads the records that an earlier daemon left below `vms_dir`, and finds those that
/// cannot be used.
pub fn load_records(vms_dir: &Path) -> (Vec<Record>, Vec<UnusableRecord>) {
    let (mut records, mut unusable) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(vms_dir).into_iter().flatten().flatten() {
        let path = entry.path().join(RECORD);
        match load_record(vms_dir, &path) {
            Ok(record) => records.extend(record),
            Err(problem) => {
                tracing::error!(path = %path.display(), problem, "a VM is left alone");
                unusable.push(UnusableRecord { path, problem });
            }
        }
    }
    records.sort_by_key(|record| record.vm.launched_ms);
    (records, unusable)
}

/// The record at `path`, if there is one; in words why it cannot be used.
fn load_record(vms_dir: &Path, path: &Path) -> Result<Option<Record>, String> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        // What is not a directory holds no VM.
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Ok(None),
        Err(error) => return Err(format!("its record cannot be read ({error})")),
    };
    let record: Record = serde_json::from_slice(&text)
        .map_err(|error| format!("its record makes no sense ({error})"))?;
    if record.format > RECORD_FORMAT {
        let format = record.format;
        return Err(format!(
            "its record is a newer forelay's (format {format}; this one reads {RECORD_FORMAT})"
        ));
    }
    let dir = VmDir::of(vms_dir, &record.vm.name).map(|dir| dir.path());
    if !dir.is_ok_and(|dir| dir == record.vm.runtime_dir && Some(&*dir) == path.parent()) {
        return Err(format!("its record is another VM's ({})", record.vm.name));
    }
    Ok(Some(record))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::LaunchFigures;

    fn instance(name: &str, dir: &Path) -> Arc<Instance> {
        let vm = Vm {
            name: name.into(),
            profile: "web".into(),
            owner: "me".into(),
            domain: "me".into(),
            state: VmState::Launching,
            pid: None,
            launched_ms: 1,
            forwards: Vec::new(),
            components: vec![],
            launch: LaunchFigures::default(),
            runtime_dir: dir.join(name),
            waits: Default::default(),
            waiting: None,
            error: None,
            exit_status: None,
        };
        std::fs::create_dir_all(&vm.runtime_dir).unwrap();
        Arc::new(Instance::new(Record {
            format: RECORD_FORMAT,
            vm,
            launch_id: LaunchId(7),
            manifest: String::new(),
            lock: String::new(),
            devices: vec![],
        }))
    }

    #[test]
    fn a_live_name_is_taken_and_an_ended_one_is_free_again() {
        let dir = tempfile::tempdir().unwrap();
        let instances = VmRegistry::default();
        let first = instance("web", dir.path());
        instances.insert(Arc::clone(&first)).unwrap();
        let refused = instances.insert(instance("web", dir.path()));
        assert!(matches!(refused, Err(HostError::Busy(_))));
        assert_eq!(instances.free_name("web"), "web-2");
        first.update(|vm| vm.state = VmState::Stopped);
        assert_eq!(instances.free_name("web"), "web");
        first.update(|vm| vm.state = VmState::Ready);
        assert_eq!(first.vm().state, VmState::Stopped);
    }

    #[tokio::test]
    async fn a_claim_that_is_let_go_frees_its_name_and_a_closed_registry_claims_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let registry = VmRegistry::default();
        let make = |name: &str| Ok(instance(name, dir.path()).record.lock().clone());
        let first = registry.claim(WantedName::OfProfile("web"), make).unwrap();
        let second = registry.claim(WantedName::OfProfile("web"), make).unwrap();
        assert_eq!(
            (first.instance().name(), second.instance().name()),
            ("web", "web-2")
        );
        let taken = registry.claim(WantedName::Given("web"), make);
        assert!(matches!(taken, Err(HostError::Busy(_))));
        let instance = Arc::clone(first.instance());
        drop(first);
        assert_eq!(instance.vm().state, VmState::Failed);
        assert!(instance.launched().await.is_none());
        instance.ended().await;
        registry
            .claim(WantedName::Given("web"), make)
            .unwrap()
            .keep();
        assert!(registry.get("web").unwrap().is_live());
        let names: Vec<_> = registry
            .close()
            .iter()
            .map(|one| one.name.clone())
            .collect();
        assert_eq!(names, ["web", "web-2"]);
        second.instance().cancel();
        second.instance().cancelled().await;
        let late = registry.claim(WantedName::Given("late"), make);
        assert!(matches!(late, Err(HostError::Busy(_))));
    }

    #[test]
    fn what_is_forgotten_takes_only_its_own_files_along() {
        let dir = tempfile::tempdir().unwrap();
        let instances = VmRegistry::default();
        for number in 0..=KEEP_ENDED + 1 {
            let one = instance(&format!("vm-{number}"), dir.path());
            one.update(|vm| {
                vm.launched_ms = number as i64;
                vm.state = VmState::Stopped;
            });
            one.save().unwrap();
            if number == 0 {
                std::fs::write(dir.path().join("vm-0/precious"), "kept").unwrap();
            }
            instances.insert(one).unwrap();
        }
        assert!(instances.get("vm-0").is_none() && instances.get("vm-1").is_none());
        assert_eq!(
            std::fs::read(dir.path().join("vm-0/precious")).unwrap(),
            b"kept"
        );
        assert!(!dir.path().join("vm-1").exists() && dir.path().join("vm-2").exists());
    }

    #[test]
    fn records_survive_and_those_that_say_nothing_keep_their_names() {
        let dir = tempfile::tempdir().unwrap();
        instance("web", dir.path()).save().unwrap();
        std::fs::create_dir(dir.path().join("bad")).unwrap();
        std::fs::write(dir.path().join("bad/instance.json"), "{").unwrap();
        std::fs::create_dir_all(dir.path().join("unreadable/instance.json")).unwrap();
        // What is in another's directory was not put there by a daemon.
        std::fs::create_dir(dir.path().join("other")).unwrap();
        let record = dir.path().join("web").join(RECORD);
        std::fs::copy(record, dir.path().join("other").join(RECORD)).unwrap();
        // One that a newer version wrote is not for this one to judge.
        let newer = instance("newer", dir.path());
        newer.update_record(|record| record.format = RECORD_FORMAT + 1);
        newer.save().unwrap();
        // A directory without a record is an ended VM's, and a file is nobody's.
        std::fs::create_dir(dir.path().join("ended")).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let (records, unusable) = load_records(dir.path());
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].launch_id, LaunchId(7));

        let registry = VmRegistry::default();
        registry.keep_names(unusable);
        let refused = |name: &str| match registry.insert(instance(name, dir.path())) {
            Err(HostError::Busy(why)) => why,
            other => panic!("{name}: {other:?}"),
        };
        for (name, why) in [
            ("bad", "makes no sense"),
            ("unreadable", "cannot be read"),
            ("other", "another VM's (web)"),
            ("newer", "a newer forelay's (format 2"),
        ] {
            let said = refused(name);
            assert!(said.contains(why) && said.contains("--name"), "{said}");
            assert_eq!(registry.free_name(name), format!("{name}-2"));
        }
        for name in ["ended", "file"] {
            assert_eq!(registry.free_name(name), name);
        }
        std::fs::remove_file(dir.path().join("bad").join(RECORD)).unwrap();
        registry.insert(instance("bad", dir.path())).unwrap();
    }
}
