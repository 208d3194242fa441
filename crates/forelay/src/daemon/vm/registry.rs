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

use forelay_image::Digest;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::api::Vm;
use crate::daemon::vm::directory::{RECORD, UNFINISHED_RECORD, VmDir};

/// Ended instances that are still listed, so that `logs` and `ps --all` work.
const KEEP_ENDED: usize = 100;

/// What a later daemon needs to know of an instance.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// What clients see.
    pub vm: Vm,
    /// Row of the launch in the history.
    pub launch_id: i64,
    /// The manifest (TOML), with what was attached since.
    pub manifest: String,
    /// Its lock (TOML).
    pub lock: String,
    /// pmem devices in slot order, map image first.
    pub devices: Vec<DeviceRecord>,
}

/// One pmem device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Image, the key of shared memory.
    pub image: Digest,
    /// Size of the image.
    pub image_bytes: u64,
    /// Size of the device.
    pub device_bytes: u64,
    /// Host path that the VMM maps.
    pub path: PathBuf,
    /// Component name and version, or `map image`.
    pub component: String,
    /// Images and sizes of a bundle's members, in order; empty for a plain image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<(Digest, u64)>,
}

/// One instance.
#[derive(Debug)]
pub struct Instance {
    state: watch::Sender<Vm>,
    record: Mutex<Record>,
}

impl Instance {
    /// An instance that is being launched.
    pub fn new(record: Record) -> Self {
        Self {
            state: watch::Sender::new(record.vm.clone()),
            record: Mutex::new(record),
        }
    }

    /// What clients see.
    pub fn vm(&self) -> Vm {
        self.state.borrow().clone()
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

    /// Row of the launch in the history.
    pub fn launch_id(&self) -> i64 {
        self.record.lock().launch_id
    }

    /// Writes the record to the instance's directory, whole or not at all.
    pub fn save(&self) -> std::io::Result<()> {
        let mut record = self.record.lock().clone();
        record.vm = self.vm();
        let dir = &record.vm.runtime_dir;
        let text = serde_json::to_vec_pretty(&record)?;
        let unfinished = dir.join(UNFINISHED_RECORD);
        std::fs::write(&unfinished, text)?;
        std::fs::rename(unfinished, dir.join(RECORD))
    }
}

/// All instances by name.
#[derive(Debug, Default)]
pub struct Instances {
    table: Mutex<BTreeMap<String, Arc<Instance>>>,
}

impl Instances {
    /// Adds an instance; refuses a name that a live one has.
    pub fn insert(&self, instance: Arc<Instance>) -> Result<(), Arc<Instance>> {
        let name = instance.vm().name;
        let mut table = self.table.lock();
        if let Some(other) = table.get(&name)
            && other.vm().state.is_live()
        {
            return Err(Arc::clone(other));
        }
        table.insert(name, instance);
        forget_oldest_ended(&mut table);
        Ok(())
    }

    /// The instance of this name.
    pub fn get(&self, name: &str) -> Option<Arc<Instance>> {
        self.table.lock().get(name).cloned()
    }

    /// All instances, by name.
    pub fn all(&self) -> Vec<Arc<Instance>> {
        self.table.lock().values().cloned().collect()
    }

    /// Those whose VMM may run.
    pub fn live(&self) -> Vec<Arc<Instance>> {
        self.all()
            .into_iter()
            .filter(|instance| instance.vm().state.is_live())
            .collect()
    }

    /// A name that no live instance has: `profile`, `profile-2`, `profile-3`...
    pub fn free_name(&self, profile: &str) -> String {
        let table = self.table.lock();
        let taken = |name: &str| {
            table
                .get(name)
                .is_some_and(|other| other.vm().state.is_live())
        };
        let numbered = (2u32..).map(|number| format!("{profile}-{number}"));
        std::iter::once(profile.to_owned())
            .chain(numbered)
            .find(|name| !taken(name))
            .unwrap_or_else(|| profile.to_owned())
    }
}

fn forget_oldest_ended(table: &mut BTreeMap<String, Arc<Instance>>) {
    let mut ended: Vec<_> = table
        .values()
        .map(|instance| instance.vm())
        .filter(|vm| !vm.state.is_live())
        .map(|vm| (vm.launched_ms, vm.name, vm.runtime_dir))
        .collect();
    ended.sort();
    let excess = ended.len().saturating_sub(KEEP_ENDED);
    for (_, name, path) in ended.into_iter().take(excess) {
        table.remove(&name);
        let dir = path.parent().and_then(|vms| VmDir::of(vms, &name).ok());
        if let Some(Err(error)) = dir.map(|dir| dir.remove()) {
            tracing::warn!(vm = name, %error, "what an ended VM left stays");
        }
    }
}

/// Reads the records that an earlier daemon left below `vms_dir`. Unreadable ones are
/// skipped with a warning: they belong to launches that never got a VMM.
pub fn load_records(vms_dir: &Path) -> Vec<Record> {
    let Ok(entries) = std::fs::read_dir(vms_dir) else {
        return Vec::new();
    };
    let mut records = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path().join(RECORD);
        let Ok(text) = std::fs::read(&path) else {
            continue;
        };
        match serde_json::from_slice::<Record>(&text) {
            Ok(record)
                if VmDir::of(vms_dir, &record.vm.name).is_ok_and(|dir| {
                    dir.path() == record.vm.runtime_dir && dir.path() == entry.path()
                }) =>
            {
                records.push(record)
            }
            Ok(record) => {
                tracing::warn!(path = %path.display(), name = record.vm.name, "a record of another VM's");
            }
            Err(error) => tracing::warn!(path = %path.display(), %error, "unreadable record"),
        }
    }
    records.sort_by_key(|record| record.vm.launched_ms);
    records
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{LaunchFigures, VmState};

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
            error: None,
            exit_status: None,
        };
        std::fs::create_dir_all(&vm.runtime_dir).unwrap();
        Arc::new(Instance::new(Record {
            vm,
            launch_id: 7,
            manifest: String::new(),
            lock: String::new(),
            devices: vec![],
        }))
    }

    #[test]
    fn a_live_name_is_taken_and_an_ended_one_is_free_again() {
        let dir = tempfile::tempdir().unwrap();
        let instances = Instances::default();
        let first = instance("web", dir.path());
        instances.insert(Arc::clone(&first)).unwrap();
        assert!(instances.insert(instance("web", dir.path())).is_err());
        assert_eq!(instances.free_name("web"), "web-2");
        first.update(|vm| vm.state = VmState::Stopped);
        assert_eq!(instances.free_name("web"), "web");
        first.update(|vm| vm.state = VmState::Ready);
        assert_eq!(first.vm().state, VmState::Stopped);
    }

    #[test]
    fn what_is_forgotten_takes_only_its_own_files_along() {
        let dir = tempfile::tempdir().unwrap();
        let instances = Instances::default();
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
    fn records_survive_and_garbage_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        instance("web", dir.path()).save().unwrap();
        std::fs::create_dir(dir.path().join("bad")).unwrap();
        std::fs::write(dir.path().join("bad/instance.json"), "{").unwrap();
        // What is in another's directory was not put there by a daemon.
        std::fs::create_dir(dir.path().join("other")).unwrap();
        let record = dir.path().join("web").join(RECORD);
        std::fs::copy(record, dir.path().join("other").join(RECORD)).unwrap();
        let records = load_records(dir.path());
        assert_eq!(records.len(), 1);
        assert_eq!(records[0].launch_id, 7);
    }
}
