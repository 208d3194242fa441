//! The table of instances, and what a later daemon finds of each on disk.
//!
//! Invariants: a name belongs to at most one live instance; an instance's record is on
//! disk before its VMM starts and goes when the instance has ended and is forgotten.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forelay_predict::rank::Present;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::api::{Vm, VmComponent};
use crate::daemon::error::HostError;
use crate::daemon::events::Events;
use crate::daemon::forecast::forecasts::{LiveVm, LiveVms};
use crate::daemon::memory::residency::RunningVmm;
use crate::daemon::order::DeviceRecord;
use crate::daemon::vm::directory::{RECORD, VmDir};
use crate::daemon::vm::instance::{Instance, SavedRecord, VmData, VmEnd};
use crate::history::LaunchId;

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
    /// How it was saved whole, if it hibernates or goes on from that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved: Option<SavedRecord>,
}

/// All instances by name.
#[derive(Debug, Default)]
pub struct VmRegistry {
    table: Mutex<InstanceTable>,
    events: Events,
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
    pub fn end(mut self, end: VmEnd) {
        self.kept = true;
        self.instance.end(end);
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.kept {
            let error = "its launch was interrupted".to_owned();
            self.instance.end(VmEnd::Failed { error });
        }
    }
}

impl VmRegistry {
    /// No instance yet; what becomes of them is told to `events`.
    pub fn new(events: Events) -> Self {
        Self {
            table: Mutex::default(),
            events,
        }
    }

    /// Where it is told what becomes of instances.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Claims a name for a launch, of which `make` says what it is; refuses a name that a live
    /// instance has.
    pub fn claim(
        &self,
        wanted: WantedName<'_>,
        make: impl FnOnce(&str) -> Result<VmData, HostError>,
    ) -> Result<Claim, HostError> {
        let mut table = self.table.lock();
        table.check_open()?;
        let name = match wanted {
            WantedName::Given(name) => name.to_owned(),
            WantedName::OfProfile(profile) => table.free_name(profile),
        };
        let instance = Arc::new(Instance::launching(&name, make(&name)?));
        table.insert(Arc::clone(&instance))?;
        instance.tell_to(&self.events);
        instance.tell();
        Ok(Claim {
            instance,
            kept: false,
        })
    }

    /// Adds an instance that an earlier daemon launched.
    pub fn insert(&self, instance: Arc<Instance>) -> Result<(), HostError> {
        let mut table = self.table.lock();
        table.insert(Arc::clone(&instance))?;
        instance.tell_to(&self.events);
        Ok(())
    }

    /// Keeps names from launches for as long as there is a record that nobody can read.
    pub fn keep_names(&self, unusable: Vec<UnusableRecord>) {
        let unknown = unusable.into_iter().map(|record| (record.name(), record));
        self.table.lock().unknown.extend(unknown);
    }

    /// Has a VM that hibernates be what a VMM has that was made of it. Refused when VMs are not
    /// started any more: who ends them all has looked which there are.
    pub fn wake(
        &self,
        instance: &Instance,
        pid: u32,
        devices: Vec<DeviceRecord>,
    ) -> Result<(), HostError> {
        let table = self.table.lock();
        table.check_open()?;
        match instance.wake(pid, devices) {
            true => Ok(()),
            false => Err(HostError::Cancelled),
        }
    }

    /// Refuses to start a VM when none is to be any more.
    pub fn check_open(&self) -> Result<(), HostError> {
        self.table.lock().check_open()
    }

    /// Directories of VMs that may run, or hibernate, and cannot be known.
    pub fn unknown_dirs(&self) -> Vec<PathBuf> {
        let table = self.table.lock();
        let there = table.unknown.values().filter(|record| record.path.exists());
        there.map(|record| record.dir().to_owned()).collect()
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
                pid: instance.pid()?,
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
    fn check_open(&self) -> Result<(), HostError> {
        match self.closed {
            true => Err(HostError::Busy(
                "the daemon ends: nothing is launched".to_owned(),
            )),
            false => Ok(()),
        }
    }

    /// The VM that has this name, and goes on.
    fn live(&self, name: &str) -> Option<&Arc<Instance>> {
        let lives = |other: &&Arc<Instance>| !other.state().has_ended();
        self.instances.get(name).filter(lives)
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
            let state = other.state();
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
            .filter(|instance| instance.state().has_ended());
        let mut ended: Vec<_> = ended
            .map(|instance| (instance.read(|vm| vm.launched_ms), Arc::clone(instance)))
            .collect();
        ended.sort_by(|(a, one), (b, other)| (a, one.name()).cmp(&(b, other.name())));
        let excess = ended.len().saturating_sub(KEEP_ENDED);
        for (_, instance) in ended.into_iter().take(excess) {
            self.instances.remove(instance.name());
            if let Ok(dir) = instance.dir()
                && let Err(error) = dir.remove()
            {
                tracing::warn!(vm = instance.name(), %error, "what an ended VM left stays");
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

    /// Why it cannot be used.
    pub fn problem(&self) -> &str {
        &self.problem
    }

    /// The name of the VM.
    pub fn name(&self) -> String {
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
    use crate::api::VmState;
    use crate::daemon::vm::instance::tests::data;

    fn instance(name: &str, dir: &Path) -> Arc<Instance> {
        Arc::new(Instance::launching(name, data(name, dir)))
    }

    #[test]
    fn a_vm_that_hibernates_stays_so_once_nothing_is_started_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let registry = VmRegistry::default();
        let mut record = instance("web", dir.path()).record();
        record.vm.state = VmState::Hibernated;
        let sleeper = || Arc::new(Instance::left(record.clone(), None));
        let woken = sleeper();
        registry.insert(Arc::clone(&woken)).unwrap();
        registry.wake(&woken, 42, vec![]).unwrap();
        assert_eq!((woken.state(), woken.pid()), (VmState::Ready, Some(42)));
        let again = registry.wake(&woken, 43, vec![]);
        assert!(matches!(again, Err(HostError::Cancelled)));
        let late = sleeper();
        assert_eq!(registry.close().len(), 1);
        let refused = registry.wake(&late, 44, vec![]);
        assert!(matches!(refused, Err(HostError::Busy(_))));
        assert_eq!(late.state(), VmState::Hibernated);
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
        first.end(VmEnd::Stopped { note: None });
        assert_eq!(instances.free_name("web"), "web");
        instances.insert(instance("web", dir.path())).unwrap();
    }

    #[tokio::test]
    async fn a_claim_that_is_let_go_frees_its_name_and_a_closed_registry_claims_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let registry = VmRegistry::default();
        let make = |name: &str| Ok(data(name, dir.path()));
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
            .map(|one| one.name().to_owned())
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
            one.update(|vm| vm.launched_ms = number as i64);
            one.save().unwrap();
            one.end(VmEnd::Stopped { note: None });
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
        let mut record = newer.record();
        record.format = RECORD_FORMAT + 1;
        let path = record.vm.runtime_dir.join(RECORD);
        std::fs::write(path, serde_json::to_vec(&record).unwrap()).unwrap();
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
