//! One VM as an object: what it is, and what there is of it in the stage that it is in.
//!
//! ```text
//! Launching -> Started -> Running -> Ended
//!     |           |          |         ^
//!     |           +-> Unreachable ----+|
//!     +---------------------------------+
//! Running <-> Hibernated (no VMM) -> Ended
//! ```
//! `Started` is a VMM that nobody supervises: its launch has not handed it over, or an earlier
//! daemon left it. Clients see a [`Vm`] made of this, a later daemon reads a [`Record`].
//!
//! Invariant: what has ended stays ended.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use forelay_cache::Domain;
use forelay_image::{ComponentId, NameError};
use forelay_vm::{Forward, SavedMachine, VmHandle};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::api::{EventKind, LaunchFigures, Vm, VmComponent, VmState, Waits};
use crate::daemon::events::{Events, Happening};
use crate::daemon::order::DeviceRecord;
use crate::daemon::vm::directory::{RECORD, VmDir};
use crate::daemon::vm::launch_figures::start_of;
use crate::daemon::vm::registry::{RECORD_FORMAT, Record};
use crate::daemon::vm::supervise::Observed;
use crate::history::{LaunchId, ProfileRef};

/// What a VM is, whatever stage it is in.
#[derive(Clone, Debug)]
pub struct VmData {
    /// Profile and owner.
    pub of: ProfileRef,
    /// Trust domain.
    pub domain: Domain,
    /// Its launch in the history.
    pub launch_id: LaunchId,
    /// When the launch was asked for, milliseconds since the epoch.
    pub launched_ms: i64,
    /// Where it keeps its files.
    pub runtime_dir: PathBuf,
    /// The manifest (TOML), with what was attached since.
    pub manifest: String,
    /// Its lock (TOML).
    pub lock: String,
    /// Components in compose order, then what was attached.
    pub components: Vec<VmComponent>,
    /// pmem devices in slot order, map image first.
    pub devices: Vec<DeviceRecord>,
    /// Port forwards.
    pub forwards: Vec<Forward>,
    /// Figures of the launch.
    pub launch: LaunchFigures,
    /// What it waited for in all its life.
    pub waits: Waits,
    /// Exit status of the entrypoint, once it ended.
    pub exit_status: Option<i32>,
    /// Its CPUs stand still, as asked.
    pub paused: bool,
    /// How it was last saved whole, if it hibernates or goes on from that.
    pub saved: Option<SavedRecord>,
    /// The VM that it is a fork of.
    pub forked_from: Option<String>,
}

/// A VM that was saved whole, as far as its memory image does not say it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedRecord {
    /// The snapshot with its memory and the state of its devices.
    pub snapshot: ComponentId,
    /// The machine that it was saved on.
    pub machine: SavedMachine,
    /// The VMM and its version.
    pub vmm: String,
    /// What it ran under.
    pub accelerator: String,
}

/// How far the guest has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestStage {
    /// It has not mounted its image yet.
    Booting,
    /// It has.
    Mounted,
    /// It says that its work is ready.
    Ready,
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEnd {
    /// As asked, or by itself with success.
    Stopped {
        /// What there is to say about it.
        note: Option<String>,
    },
    /// By an error.
    Failed {
        /// Which.
        error: String,
    },
}

/// What there is of a VM.
enum VmStage {
    /// No VMM.
    Launching,
    /// A VMM that nobody supervises.
    Started { pid: Option<u32>, guest: GuestStage },
    /// A VMM that lives and does not answer.
    Unreachable {
        pid: Option<u32>,
        guest: GuestStage,
        why: String,
    },
    /// A VMM that is supervised.
    Running {
        handle: VmHandle,
        guest: GuestStage,
        /// What it has touched, once observation has begun.
        observed: Option<Arc<Mutex<Observed>>>,
    },
    /// No VMM, all of it saved.
    Hibernated,
    /// No VMM any more.
    Ended(VmEnd),
}

impl VmStage {
    fn state(&self, paused: bool) -> VmState {
        match self {
            Self::Launching => VmState::Launching,
            Self::Hibernated => VmState::Hibernated,
            Self::Started { .. } | Self::Running { .. } if paused => VmState::Paused,
            Self::Unreachable { .. } => VmState::Unreachable,
            Self::Started { guest, .. } | Self::Running { guest, .. } => match guest {
                GuestStage::Booting => VmState::Booting,
                GuestStage::Mounted => VmState::Mounted,
                GuestStage::Ready => VmState::Ready,
            },
            Self::Ended(VmEnd::Stopped { .. }) => VmState::Stopped,
            Self::Ended(VmEnd::Failed { .. }) => VmState::Failed,
        }
    }

    fn guest(&self) -> GuestStage {
        match self {
            Self::Started { guest, .. }
            | Self::Unreachable { guest, .. }
            | Self::Running { guest, .. } => *guest,
            // Only what is ready hibernates.
            Self::Hibernated => GuestStage::Ready,
            Self::Launching | Self::Ended(_) => GuestStage::Booting,
        }
    }

    fn pid(&self) -> Option<u32> {
        match self {
            Self::Started { pid, .. } | Self::Unreachable { pid, .. } => *pid,
            Self::Running { handle, .. } => Some(handle.pid()),
            Self::Launching | Self::Hibernated | Self::Ended(_) => None,
        }
    }

    fn error(&self) -> Option<String> {
        match self {
            Self::Unreachable { why, .. } => {
                Some(format!("its VMM lives and does not answer: {why}"))
            }
            Self::Ended(VmEnd::Failed { error }) => Some(error.clone()),
            Self::Ended(VmEnd::Stopped { note }) => note.clone(),
            Self::Launching | Self::Started { .. } | Self::Running { .. } | Self::Hibernated => {
                None
            }
        }
    }

    /// What a record says of it; a VMM of it may have run since.
    fn recorded(vm: &Vm, pid: Option<u32>) -> Self {
        let guest = match vm.state {
            VmState::Hibernated => return Self::Hibernated,
            VmState::Paused if vm.launch.ready_s.is_some() => GuestStage::Ready,
            VmState::Paused if vm.launch.mounted_s.is_some() => GuestStage::Mounted,
            VmState::Mounted => GuestStage::Mounted,
            VmState::Ready => GuestStage::Ready,
            _ => GuestStage::Booting,
        };
        Self::Started { pid, guest }
    }
}

/// What there is to say of a VM that came to this stage.
fn happening(data: &VmData, stage: &VmStage) -> Happening {
    let state = stage.state(data.paused);
    let (kind, message) = match state {
        VmState::Launching => (EventKind::Launching, "a launch was asked for".to_owned()),
        VmState::Booting => (EventKind::Started, "its VMM runs".to_owned()),
        VmState::Mounted => (EventKind::Mounted, "it has mounted its image".to_owned()),
        VmState::Ready => (EventKind::Ready, ready_message(&data.launch)),
        VmState::Paused => (EventKind::Paused, "its CPUs stand still".to_owned()),
        VmState::Hibernated => (
            EventKind::Hibernated,
            "it is kept as a snapshot of its own".to_owned(),
        ),
        VmState::Unreachable => (EventKind::Unreachable, stage.error().unwrap_or_default()),
        VmState::Stopped => {
            let note = stage.error().unwrap_or_else(|| "it has stopped".to_owned());
            (EventKind::Stopped, note)
        }
        VmState::Failed => (EventKind::Failed, stage.error().unwrap_or_default()),
    };
    let happening = Happening::new(kind, message);
    match data.launch.ready_s.filter(|_| state == VmState::Ready) {
        Some(ready_s) => happening.seconds(ready_s),
        None => happening,
    }
}

fn ready_message(launch: &LaunchFigures) -> String {
    let start = start_of(launch);
    let from = launch
        .resumed
        .map(|tier| format!(" from its snapshot at `{}`", tier.name()));
    let ready = launch
        .ready_s
        .map(|ready_s| format!(" after {ready_s:.2} s"));
    format!(
        "ready{}: {start}{}",
        ready.unwrap_or_default(),
        from.unwrap_or_default()
    )
}

/// One VM.
pub struct Instance {
    name: String,
    now: watch::Sender<(VmData, VmStage)>,
    cancel: watch::Sender<bool>,
    /// Held by the attach or detach under way.
    devices_change: tokio::sync::Mutex<()>,
    /// Held by who watches over its VMM: one after the other, where it has several in its life.
    watch: Arc<tokio::sync::Mutex<()>>,
    /// Held by who writes its record: an earlier one never takes a later one's place.
    record: Mutex<()>,
    /// An earlier daemon may have stopped its programs, and they are not known to go on.
    may_be_held: watch::Sender<bool>,
    /// Where it is told what becomes of it.
    events: OnceLock<Events>,
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Instance({}, {:?})", self.name, self.state())
    }
}

impl Instance {
    fn new(name: String, data: VmData, stage: VmStage) -> Self {
        Self {
            name,
            now: watch::Sender::new((data, stage)),
            cancel: watch::Sender::new(false),
            devices_change: tokio::sync::Mutex::default(),
            watch: Arc::default(),
            record: Mutex::default(),
            may_be_held: watch::Sender::new(false),
            events: OnceLock::new(),
        }
    }

    /// From now on it is told to `events` what becomes of it.
    pub fn tell_to(&self, events: &Events) {
        let _ = self.events.set(events.clone());
    }

    /// Tells what has become of it.
    pub fn tell(&self) {
        let Some(events) = self.events.get() else {
            return;
        };
        let happening = {
            let (data, stage) = &*self.now.borrow();
            happening(data, stage)
                .of_vm(&self.name)
                .of_profile(&data.of.profile)
        };
        events.tell(happening);
    }

    /// One that is being launched.
    pub fn launching(name: &str, data: VmData) -> Self {
        Self::new(name.to_owned(), data, VmStage::Launching)
    }

    /// One that an earlier daemon left, with the process of its VMM as far as that is known.
    pub fn left(record: Record, pid: Option<u32>) -> Self {
        let stage = VmStage::recorded(&record.vm, pid);
        let vm = record.vm;
        let data = VmData {
            of: ProfileRef::new(vm.profile, vm.owner),
            domain: vm.domain.as_str().into(),
            launch_id: record.launch_id,
            launched_ms: vm.launched_ms,
            runtime_dir: vm.runtime_dir,
            manifest: record.manifest,
            lock: record.lock,
            components: vm.components,
            devices: record.devices,
            forwards: vm.forwards,
            launch: vm.launch,
            waits: vm.waits,
            exit_status: vm.exit_status,
            paused: vm.state == VmState::Paused,
            saved: record.saved,
            forked_from: vm.forked_from,
        };
        Self::new(vm.name, data, stage)
    }

    /// Waits until nobody else changes the VM's devices: an attach reads what there is,
    /// changes it and writes the record.
    pub async fn device_turn(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.devices_change.lock().await
    }

    /// Whether an earlier daemon may have stopped its programs.
    pub fn may_be_held(&self, held: bool) {
        self.may_be_held.send_replace(held);
    }

    /// Waits until its programs go on, if an earlier daemon may have stopped them.
    pub async fn let_go(&self) {
        // The sender lives in this instance.
        let _ = self.may_be_held.subscribe().wait_for(|held| !*held).await;
    }

    /// Waits until nobody watches over a VMM of it: what the end of one brings with it is done.
    pub async fn watch_turn(&self) -> tokio::sync::OwnedMutexGuard<()> {
        Arc::clone(&self.watch).lock_owned().await
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

    /// Its state as clients see it.
    pub fn state(&self) -> VmState {
        let (data, stage) = &*self.now.borrow();
        stage.state(data.paused)
    }

    /// True while a VMM may exist.
    pub fn is_live(&self) -> bool {
        self.state().is_live()
    }

    /// Process of its VMM, while there is one.
    pub fn pid(&self) -> Option<u32> {
        self.now.borrow().1.pid()
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

    /// Goes on to the stage that `next` makes of the one before, unless it has ended.
    fn go_on(&self, next: impl FnOnce(&VmStage) -> VmStage) {
        let mut changed = false;
        self.now.send_if_modified(|(data, stage)| {
            let ended = matches!(stage, VmStage::Ended(_));
            if !ended {
                let before = stage.state(data.paused);
                *stage = next(stage);
                changed = stage.state(data.paused) != before;
            }
            !ended
        });
        if changed {
            self.tell();
        }
    }

    /// Its VMM runs; nobody supervises it yet.
    pub fn started(&self, pid: u32) {
        self.go_on(|before| VmStage::Started {
            pid: Some(pid),
            guest: before.guest(),
        });
    }

    /// Its VMM lives and does not answer.
    pub fn unreachable(&self, why: String) {
        self.go_on(|before| VmStage::Unreachable {
            pid: before.pid(),
            guest: before.guest(),
            why,
        });
    }

    /// Its CPUs stand still from now on, or do so no longer.
    pub fn pause(&self, paused: bool) {
        self.update(|vm| vm.paused = paused);
        self.tell();
    }

    /// Its VMM is supervised from now on.
    pub fn run(&self, handle: VmHandle) {
        self.go_on(|before| VmStage::Running {
            handle,
            guest: before.guest(),
            observed: None,
        });
    }

    /// Its touches are observed from now on.
    pub fn observe(&self, new: Arc<Mutex<Observed>>) {
        self.now.send_modify(|(_, stage)| {
            if let VmStage::Running { observed, .. } = stage {
                *observed = Some(new);
            }
        });
    }

    /// The guest has come so far.
    pub fn note_guest(&self, come: GuestStage) {
        let changed = self.now.send_if_modified(|(_, stage)| match stage {
            VmStage::Running { guest, .. } => std::mem::replace(guest, come) != come,
            _ => false,
        });
        if changed {
            self.tell();
        }
    }

    /// It is what was saved from now on, and its VMM nothing: on disk, or not at all.
    pub fn hibernate(&self, saved: SavedRecord, devices: Vec<DeviceRecord>) -> std::io::Result<()> {
        let mut before = None;
        self.now.send_if_modified(|(data, stage)| {
            let runs = matches!(stage, VmStage::Running { .. });
            if runs {
                let stage = std::mem::replace(stage, VmStage::Hibernated);
                let devices = std::mem::replace(&mut data.devices, devices);
                before = Some((stage, devices, data.saved.replace(saved)));
            }
            runs
        });
        let Some(before) = before else {
            return Err(std::io::Error::other("it has ended meanwhile"));
        };
        self.save().inspect_err(|_| {
            self.now.send_modify(|(data, stage)| {
                (*stage, data.devices, data.saved) = before;
            });
            // Another part of this daemon may have written down what was not to be.
            let _ = self.save();
        })?;
        self.tell();
        Ok(())
    }

    /// It is what a VMM has that was made of what was saved; false if it does not hibernate.
    pub fn wake(&self, pid: u32, devices: Vec<DeviceRecord>) -> bool {
        let woken = self.now.send_if_modified(|(data, stage)| {
            let hibernates = matches!(stage, VmStage::Hibernated);
            if hibernates {
                data.devices = devices;
                let guest = GuestStage::Ready;
                let pid = Some(pid);
                *stage = VmStage::Started { pid, guest };
            }
            hibernates
        });
        if woken {
            self.tell();
        }
        woken
    }

    /// Undoes [`Instance::wake`], where nothing has run since.
    pub fn sleep_on(&self) {
        self.go_on(|_| VmStage::Hibernated);
    }

    /// Its VMM is gone.
    pub fn end(&self, end: VmEnd) {
        self.go_on(|_| VmStage::Ended(end));
        // Nothing maps them any more.
        self.update(|vm| vm.devices.iter_mut().for_each(|one| one.holds.clear()));
    }

    /// Its VMM, while that is supervised.
    pub fn handle(&self) -> Option<VmHandle> {
        match &self.now.borrow().1 {
            VmStage::Running { handle, .. } => Some(handle.clone()),
            _ => None,
        }
    }

    /// What its VMM has touched, while that is observed.
    pub fn observed(&self) -> Option<Arc<Mutex<Observed>>> {
        match &self.now.borrow().1 {
            VmStage::Running { observed, .. } => observed.clone(),
            _ => None,
        }
    }

    /// Waits until its VMM is supervised or it has ended.
    pub async fn launched(&self) -> Option<VmHandle> {
        let settled = |(_, stage): &(VmData, VmStage)| {
            matches!(stage, VmStage::Running { .. } | VmStage::Ended(_))
        };
        // The sender lives in this instance.
        let _ = self.now.subscribe().wait_for(settled).await;
        self.handle()
    }

    /// Waits until it has ended.
    pub async fn ended(&self) {
        let ended = |(_, stage): &(VmData, VmStage)| matches!(stage, VmStage::Ended(_));
        // The sender lives in this instance.
        let _ = self.now.subscribe().wait_for(ended).await;
    }

    /// Waits until it has no VMM and will have none unless it is asked for: it has ended, or
    /// hibernates.
    pub async fn ended_or_hibernated(&self) {
        let over = |(_, stage): &(VmData, VmStage)| {
            matches!(stage, VmStage::Hibernated | VmStage::Ended(_))
        };
        // The sender lives in this instance.
        let _ = self.now.subscribe().wait_for(over).await;
    }

    /// Waits until its state is another than now.
    pub async fn state_changed(&self) {
        let before = self.state();
        let changed = |(data, stage): &(VmData, VmStage)| stage.state(data.paused) != before;
        // The sender lives in this instance.
        let _ = self.now.subscribe().wait_for(changed).await;
    }

    /// Looks at it without a copy. `look` must not change the instance.
    pub fn read<T>(&self, look: impl FnOnce(&VmData) -> T) -> T {
        look(&self.now.borrow().0)
    }

    /// Changes it; [`Instance::save`] writes that down.
    pub fn update(&self, change: impl FnOnce(&mut VmData)) {
        self.now.send_modify(|(data, _)| change(data));
    }

    /// Its profile and owner.
    pub fn profile(&self) -> ProfileRef {
        self.read(|vm| vm.of.clone())
    }

    /// Its trust domain.
    pub fn domain(&self) -> Domain {
        self.read(|vm| vm.domain.clone())
    }

    /// The pmem devices in slot order.
    pub fn devices(&self) -> Vec<DeviceRecord> {
        self.read(|vm| vm.devices.clone())
    }

    /// Its launch in the history.
    pub fn launch_id(&self) -> LaunchId {
        self.read(|vm| vm.launch_id)
    }

    /// What clients see of it; what it waits for at this moment is not in it.
    pub fn vm(&self) -> Vm {
        let (data, stage) = &*self.now.borrow();
        Vm {
            name: self.name.clone(),
            profile: data.of.profile.clone(),
            owner: data.of.owner.clone(),
            domain: data.domain.as_str().to_owned(),
            state: stage.state(data.paused),
            pid: stage.pid(),
            launched_ms: data.launched_ms,
            forwards: data.forwards.clone(),
            components: data.components.clone(),
            launch: data.launch.clone(),
            waits: data.waits,
            waiting: None,
            runtime_dir: data.runtime_dir.clone(),
            error: stage.error(),
            exit_status: data.exit_status,
            forked_from: data.forked_from.clone(),
        }
    }

    /// What a later daemon needs to know of it.
    pub fn record(&self) -> Record {
        let vm = self.vm();
        self.read(|data| Record {
            format: RECORD_FORMAT,
            vm,
            launch_id: data.launch_id,
            manifest: data.manifest.clone(),
            lock: data.lock.clone(),
            devices: data.devices.clone(),
            saved: data.saved.clone(),
        })
    }

    /// Writes the record to the instance's directory, whole or not at all.
    pub fn save(&self) -> std::io::Result<()> {
        let _one_after_the_other = self.record.lock();
        let record = self.record();
        let text = serde_json::to_vec_pretty(&record)?;
        forelay_host::atomic_write(&record.vm.runtime_dir.join(RECORD), &text).map(drop)
    }
}

#[cfg(test)]
pub mod tests {
    use std::path::Path;

    use super::*;

    /// What a VM of this name has in a directory below `dir`, which is made.
    pub fn data(name: &str, dir: &Path) -> VmData {
        let runtime_dir = dir.join(name);
        std::fs::create_dir_all(&runtime_dir).unwrap();
        VmData {
            of: ProfileRef::new("web", "me"),
            domain: "me".into(),
            launch_id: LaunchId(7),
            launched_ms: 1,
            runtime_dir,
            manifest: String::new(),
            lock: String::new(),
            components: vec![],
            devices: vec![],
            forwards: vec![],
            launch: LaunchFigures::default(),
            waits: Waits::default(),
            exit_status: None,
            paused: false,
            saved: None,
            forked_from: None,
        }
    }

    #[tokio::test]
    async fn a_vm_that_is_not_reached_keeps_what_is_known_of_it_and_stays_ended() {
        let dir = tempfile::tempdir().unwrap();
        let launching = Instance::launching("web", data("web", dir.path()));
        assert_eq!(launching.state(), VmState::Launching);
        launching.started(42);
        let seen = launching.vm();
        assert_eq!((seen.state, seen.pid), (VmState::Booting, Some(42)));
        let mut record = launching.record();
        record.vm.state = VmState::Ready;

        let left = Instance::left(record, Some(42));
        assert_eq!(left.state(), VmState::Ready);
        left.unreachable("no answer".to_owned());
        let seen = left.vm();
        assert_eq!((seen.state, seen.pid), (VmState::Unreachable, Some(42)));
        assert!(seen.error.unwrap().ends_with("no answer"));
        left.started(42);
        assert_eq!((left.state(), left.vm().error), (VmState::Ready, None));
        left.end(VmEnd::Failed {
            error: "gone".to_owned(),
        });
        left.ended().await;
        left.started(43);
        left.unreachable("late".to_owned());
        left.end(VmEnd::Stopped { note: None });
        let seen = left.vm();
        assert_eq!((seen.state, seen.pid), (VmState::Failed, None));
        assert_eq!(seen.error.as_deref(), Some("gone"));
        assert!(left.launched().await.is_none());
    }
}
