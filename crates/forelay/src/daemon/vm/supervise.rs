//! Watching over one VM from its start to its end.
//!
//! One task per VM follows the guest's reports, scans touched pages, closes the
//! observation when the launch's window has passed, and cleans up when the VMM is gone.
//!
//! Invariant: the outcome of a launch is recorded once, at the window's end, the VM's or the
//! daemon's, whichever is first.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forelay_cache::plan::{RunningVm, TouchReport};
use forelay_cache::{DeviceImage, PlannerEvent};
use forelay_image::{Digest, Extent, Touch};
use forelay_store::Store;
use forelay_vm::{Cause, Ended, Moment, Phase, Progress, VmHandle};
use parking_lot::Mutex;

use crate::api::{LaunchFigures, VmState};
use crate::daemon::forecast::learning::{LaunchOutcome, Learner};
use crate::daemon::forecast::observation::{LearningTasks, TouchBuffer};
use crate::daemon::forecast::observer::{NewTouches, Observer};
use crate::daemon::memory::domains::Domains;
use crate::daemon::memory::faults::{Plan, Waits};
use crate::daemon::memory::planner::{PlannerHandle, now_ms};
use crate::daemon::vm::instance::{GuestStage, Instance, VmData, VmEnd};
use crate::daemon::vm::launch_figures::LaunchHistograms;
use crate::daemon::vm::vmm_groups::VmmGroups;
use crate::history::ProfileRef;

/// Between scans while a launch is observed.
const SCAN_YOUNG: Duration = Duration::from_millis(50);
/// Between scans afterwards.
const SCAN_OLD: Duration = Duration::from_secs(2);

/// How long after an attach, besides the launch's window, its touches are waited for: nothing
/// says when what was attached is in use.
const ATTACH_PATIENCE: Duration = Duration::from_secs(5);

/// What is known of a VM's touches.
#[derive(Debug)]
pub struct Observed {
    /// The scanner.
    pub observer: Observer,
    /// Touches since the launch, and which of them are to be learned.
    pub buffer: TouchBuffer,
}

/// What was expected of a launch.
pub struct ExpectedLaunch {
    /// What it was expected to touch.
    pub plan: Plan,
    /// Of it, what has to be prefetched.
    pub missing: Vec<(Digest, Extent)>,
    /// Repository bytes before it.
    pub repository_before: u64,
    /// From the request to the start of the VMM, from which its handle counts.
    pub before_vmm_s: f64,
}

/// A launch under observation.
struct WatchedLaunch {
    of: ProfileRef,
    waits: Arc<Waits>,
    /// What was prefetched for it.
    planned: Vec<(Digest, Extent)>,
    /// Repository bytes before it.
    repository_before: u64,
    /// From the request to the moment from which the VMM's handle counts.
    before_vmm_s: f64,
    recorded: bool,
    ready_at: Option<Instant>,
}

/// Watches over VMs.
pub struct Supervisor {
    /// Of VMMs, where they are confined.
    pub groups: Option<Arc<VmmGroups>>,
    pub store: Store,
    pub domains: Arc<Domains>,
    pub memory: Arc<PlannerHandle>,
    pub learner: Arc<Learner>,
    pub learning_tasks: Arc<LearningTasks>,
    pub histograms: Arc<LaunchHistograms>,
    /// How long after `ready` touches still count to a launch.
    pub window: Duration,
}

impl Supervisor {
    /// Watches over a VM that was just launched.
    pub fn supervise(
        self: &Arc<Self>,
        instance: Arc<Instance>,
        handle: VmHandle,
        expected: ExpectedLaunch,
    ) {
        let launch = WatchedLaunch {
            of: instance.profile(),
            waits: self.attribute(&instance, &handle, expected.plan),
            planned: expected.missing,
            repository_before: expected.repository_before,
            before_vmm_s: expected.before_vmm_s,
            recorded: false,
            ready_at: None,
        };
        self.begin(instance, handle, launch);
    }

    fn attribute(&self, instance: &Instance, handle: &VmHandle, plan: Plan) -> Arc<Waits> {
        let attribution = self.domains.attribution();
        attribution.add(handle.pid(), instance.name(), plan)
    }

    /// Goes on with a VM that an earlier daemon launched. Its launch is not recorded again.
    pub fn resume(self: &Arc<Self>, instance: Arc<Instance>, handle: VmHandle) {
        let of = instance.profile();
        let devices = instance.devices();
        let devices = devices.iter().skip(1).map(|one| DeviceImage {
            image: one.image,
            image_bytes: one.image_bytes,
        });
        self.memory.tell(PlannerEvent::VmFound(RunningVm {
            vm: instance.name().into(),
            domain: instance.domain(),
            profile: of.profile.as_str().into(),
            devices: devices.collect(),
        }));
        let launch = WatchedLaunch {
            of,
            waits: self.attribute(&instance, &handle, Plan::default()),
            planned: Vec::new(),
            repository_before: 0,
            before_vmm_s: instance.read(|vm| vm.launch.vmm_started_s),
            recorded: true,
            ready_at: None,
        };
        self.begin(instance, handle, launch);
    }

    fn begin(self: &Arc<Self>, instance: Arc<Instance>, handle: VmHandle, launch: WatchedLaunch) {
        instance.run(handle.clone());
        let watching = Arc::clone(self).watch_over(instance, handle, launch);
        self.learning_tasks.spawn(watching);
    }

    /// Bytes read from the repository so far.
    pub fn repository_bytes(&self) -> u64 {
        self.store.scheduler().counters().repository_bytes()
    }

    async fn watch_over(
        self: Arc<Self>,
        instance: Arc<Instance>,
        handle: VmHandle,
        mut launch: WatchedLaunch,
    ) {
        let _watch = instance.watch_turn().await;
        let observed = self.observe_devices(&instance, handle.pid()).await;
        if launch.recorded {
            // What was touched before this daemon came is another daemon's to learn.
            observed.lock().buffer = TouchBuffer::of_reattached();
            self.scan(&instance, &observed).await;
        }
        instance.observe(Arc::clone(&observed));
        let mut progress = handle.watch();
        let mut next_scan = Instant::now();
        loop {
            let now = progress.borrow_and_update().clone();
            self.note_progress(&instance, &now, &mut launch);
            if let Some(ended) = &now.ended {
                self.record(&instance, &observed, &mut launch).await;
                self.ended(&instance, &handle, ended).await;
                return;
            }
            let pause = if launch.recorded {
                SCAN_OLD
            } else {
                SCAN_YOUNG
            };
            tokio::select! {
                changed = progress.changed() => {
                    if changed.is_err() {
                        // The handle's own task is gone; the process is what counts.
                        handle.wait_ended().await;
                    }
                }
                () = self.learning_tasks.shutdown() => {
                    if launch.ready_at.is_some() {
                        self.scan(&instance, &observed).await;
                        self.record(&instance, &observed, &mut launch).await;
                    }
                    return;
                }
                () = tokio::time::sleep_until((next_scan + pause).into()) => {
                    next_scan = Instant::now();
                    self.scan(&instance, &observed).await;
                    self.note_figures(&instance, &observed, &launch);
                    if launch.ready_at.is_some_and(|ready| ready.elapsed() >= self.window) {
                        self.record(&instance, &observed, &mut launch).await;
                    }
                }
            }
        }
    }

    async fn observe_devices(&self, instance: &Instance, pid: u32) -> Arc<Mutex<Observed>> {
        // The map image belongs to this VM alone: nothing to learn from it.
        let devices = instance.devices().into_iter().skip(1);
        let devices: Vec<_> = devices.map(|device| (device.image, device.path)).collect();
        let observer = tokio::task::spawn_blocking(move || {
            let mut observer = Observer::new(pid);
            for (image, path) in devices {
                if let Err(error) = observer.watch(image, &path) {
                    tracing::warn!(path = %path.display(), %error, "cannot observe a device");
                }
            }
            observer
        });
        let observer = observer.await.unwrap_or_else(|_| Observer::new(pid));
        Arc::new(Mutex::new(Observed {
            observer,
            buffer: TouchBuffer::default(),
        }))
    }

    fn note_progress(&self, instance: &Instance, progress: &Progress, launch: &mut WatchedLaunch) {
        let seen = || {
            let times = |vm: &VmData| (vm.launch.mounted_s, vm.launch.ready_s, vm.exit_status);
            (instance.state(), instance.read(times))
        };
        let before = seen();
        if progress.ready.is_some() && launch.ready_at.is_none() {
            launch.ready_at = Some(Instant::now());
            if !launch.recorded {
                self.note_waits(instance, launch);
            }
        }
        instance.update(|vm| note_guest(vm, progress, launch.before_vmm_s));
        if launch.ready_at.is_some() && before.1.1.is_none() && !launch.recorded {
            instance.read(|vm| self.histograms.ready(&vm.launch));
        }
        match progress.phase {
            // Just launched, or taken over and not heard of yet: what is known stands.
            Phase::Starting | Phase::Stopping | Phase::Ended => {}
            Phase::Mounted => instance.note_guest(GuestStage::Mounted),
            Phase::Ready => {
                // Both may come at once; nobody is to miss the first.
                if instance.state() == VmState::Booting {
                    instance.note_guest(GuestStage::Mounted);
                }
                instance.note_guest(GuestStage::Ready);
            }
        }
        if seen() != before {
            save(instance);
        }
    }

    /// Figures of the launch, until it is recorded.
    fn note_figures(
        &self,
        instance: &Instance,
        observed: &Mutex<Observed>,
        launch: &WatchedLaunch,
    ) {
        let touched_bytes = observed.lock().observer.touched_bytes();
        instance.update(|vm| vm.launch.touched_bytes = touched_bytes);
        if !launch.recorded {
            self.note_waits(instance, launch);
        }
    }

    fn note_waits(&self, instance: &Instance, launch: &WatchedLaunch) {
        let waits = launch.waits.figures();
        let fetched = self.repository_bytes();
        instance.update(|vm| {
            vm.launch.demand_fetches = waits.fetches;
            vm.launch.demand_bytes = waits.bytes;
            vm.launch.stall_s = waits.stall_ns as f64 / 1e9;
            vm.launch.demand_causes = waits.causes;
            vm.launch.repository_bytes = fetched.saturating_sub(launch.repository_before);
        });
    }

    /// Looks what a VM has touched just now: what it maps is about to go.
    pub async fn scan_now(&self, instance: &Instance) {
        if let Some(observed) = instance.observed() {
            self.scan(instance, &observed).await;
        }
    }

    /// Scans once and tells the planner what is new.
    async fn scan(&self, instance: &Instance, observed: &Arc<Mutex<Observed>>) {
        let since_launch_ms = since_launch_ms(instance);
        let observed = Arc::clone(observed);
        let domain = self.domains.get(&instance.domain());
        let scanned = tokio::task::spawn_blocking(move || {
            let mut observed = observed.lock();
            let found = observed.observer.scan();
            for NewTouches { image, extents } in &found {
                if let Some(domain) = &domain {
                    // Refused only for a file that is gone.
                    let _ = domain.shared.note_touched(image, extents);
                }
                let touches = extents.iter().map(|&extent| Touch {
                    image: *image,
                    extent,
                    first_touch_ms: since_launch_ms,
                });
                observed.buffer.note(touches);
            }
            found
        });
        for NewTouches { image, extents } in scanned.await.unwrap_or_default() {
            self.memory.tell(PlannerEvent::Touched(TouchReport {
                vm: instance.name().into(),
                image,
                extents,
            }));
        }
    }

    /// Records what the launch did, once.
    async fn record(
        &self,
        instance: &Instance,
        observed: &Arc<Mutex<Observed>>,
        launch: &mut WatchedLaunch,
    ) {
        if std::mem::replace(&mut launch.recorded, true) {
            return;
        }
        self.note_waits(instance, launch);
        let figures = instance.read(|vm| vm.launch.clone());
        let millis = |seconds: f64| (seconds * 1e3) as u64;
        let images = launched_images(instance);
        let outcome = LaunchOutcome {
            launch_id: instance.launch_id(),
            of: launch.of.clone(),
            touches: observed.lock().buffer.take_launch(&images),
            images,
            waits: launch.waits.figures(),
            planned: std::mem::take(&mut launch.planned),
            mounted_ms: figures.mounted_s.map(millis),
            ready_ms: figures.ready_s.map(millis),
        };
        // With the launch's figures, which stay as they are from now on.
        save(instance);
        self.learner.observed(outcome).await;
    }

    /// Learns what a VM touches of a component that it was just given, and of the others
    /// meanwhile, when the window after that has passed (or the VM or the daemon ends).
    pub fn learn_attached(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        observed: &Arc<Mutex<Observed>>,
        image: Digest,
    ) {
        let (this, instance) = (Arc::clone(self), Arc::clone(instance));
        let observed = Arc::clone(observed);
        observed
            .lock()
            .buffer
            .attached(image, since_launch_ms(&instance));
        self.learning_tasks.spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(this.window + ATTACH_PATIENCE) => {}
                () = instance.ended() => {}
                () = this.learning_tasks.shutdown() => {}
            }
            this.scan(&instance, &observed).await;
            let Some(touches) = observed.lock().buffer.take_attached(&image) else {
                return;
            };
            let of = instance.profile();
            let learning = this
                .learner
                .attached_touched(&of, instance.launch_id(), image, touches);
            learning.await;
        });
    }

    /// Records that a VM is gone.
    pub async fn note_stopped(&self, instance: &Instance) {
        let launched_ms = instance.read(|vm| vm.launched_ms);
        let ran_ms = u64::try_from(now_ms() - launched_ms).unwrap_or(0);
        let of = instance.profile();
        let stopped = self.learner.stopped(&of, instance.launch_id(), ran_ms);
        stopped.await;
    }

    /// Cleans up after a VM and says how it ended.
    async fn ended(&self, instance: &Instance, handle: &VmHandle, ended: &Ended) {
        let waits = self.domains.attribution().figures(handle.pid());
        self.domains.attribution().remove(handle.pid());
        instance.update(|vm| vm.waits = waits.unwrap_or_default().into());
        self.memory
            .tell(PlannerEvent::VmStopped(instance.name().into()));
        self.note_stopped(instance).await;
        if let Some(groups) = &self.groups {
            groups.sweep();
        }
        if instance.state() == VmState::Hibernated {
            // Its files are what it goes on with.
            return;
        }
        if let Ok(dir) = instance.dir() {
            dir.clear();
        }
        let failure = handle.progress().failure;
        let console = || handle.console_tail();
        let launch = instance.read(|vm| vm.launch.clone());
        let end = end_of(&launch, ended, failure, console);
        if matches!(end, VmEnd::Failed { .. }) && launch.ready_s.is_none() {
            self.histograms.failed();
        }
        instance.end(end);
    }
}

/// How a VM ended: well if it was told to, or powered itself off after it had begun.
fn end_of(
    launch: &LaunchFigures,
    ended: &Ended,
    failure: Option<String>,
    console: impl FnOnce() -> String,
) -> VmEnd {
    let asked = ended.cause == Cause::HostQuit;
    let good = asked || (ended.cause == Cause::GuestPoweroff && launch.mounted_s.is_some());
    if good && failure.is_none() {
        return VmEnd::Stopped { note: None };
    }
    let reason = failure.map_or_else(String::new, |text| format!(": {text}"));
    let console = console();
    VmEnd::Failed {
        error: format!("{ended}{reason}; last console lines:\n{console}"),
    }
}

/// Notes what the guest has said so far: each thing counts from when it was said first.
fn note_guest(vm: &mut VmData, progress: &Progress, before_vmm_s: f64) {
    let seconds = |moment: Moment| before_vmm_s + moment.since_launch.as_secs_f64();
    if vm.launch.mounted_s.is_none() {
        vm.launch.mounted_s = progress.mounted.map(seconds);
        // Told with it, and so noted once.
        let failures = progress.root.iter().flat_map(|root| &root.failures);
        vm.launch.notes.extend(failures.cloned());
    }
    if vm.launch.ready_s.is_none() {
        vm.launch.ready_s = progress.ready.map(seconds);
        note_guest_steps(&mut vm.launch, progress);
    }
    vm.exit_status = progress.entrypoint.map(|status| status.code());
}

/// Notes the guest's part of a launch, once it is ready.
fn note_guest_steps(launch: &mut LaunchFigures, progress: &Progress) {
    if let (Some(ready_s), Some(ready), Some(steps)) =
        (launch.ready_s, progress.ready, progress.steps)
    {
        let ready_us = u64::try_from(ready.guest_uptime.as_micros()).unwrap_or(u64::MAX);
        let after_s = ready_s - launch.vmm_started_s;
        launch.timings.note_guest(steps, ready_us, after_s);
    }
}

/// Writes a running VM's record again; the one before serves a later daemon as well.
fn save(instance: &Instance) {
    if let Err(error) = instance.save() {
        tracing::warn!(vm = instance.name(), %error, "cannot save an instance's record");
    }
}

fn since_launch_ms(instance: &Instance) -> u32 {
    u32::try_from(now_ms() - instance.read(|vm| vm.launched_ms)).unwrap_or(u32::MAX)
}

/// Images that the VM was launched with; what was attached is learned by itself.
fn launched_images(instance: &Instance) -> Vec<Digest> {
    let attached: Vec<Digest> = instance.read(|vm| {
        let attached = vm.components.iter().filter(|one| one.attached);
        attached.map(|one| one.image).collect()
    });
    let devices = instance.devices();
    let images = devices.iter().skip(1).map(|device| device.image);
    images.filter(|image| !attached.contains(image)).collect()
}

#[cfg(test)]
mod tests {
    use forelay_guest_protocol::messages::{ExitStatus, Mounted};

    use super::*;
    use crate::daemon::vm::instance::tests::data;

    #[test]
    fn what_a_guest_says_counts_from_when_it_said_so_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut vm = data("web", dir.path());
        let at = |seconds| {
            Some(Moment {
                since_launch: Duration::from_secs(seconds),
                guest_uptime: Duration::from_secs(seconds),
            })
        };
        let mut progress = Progress::default();
        note_guest(&mut vm, &progress, 1.0);
        assert_eq!((vm.launch.mounted_s, vm.launch.ready_s), (None, None));
        progress.mounted = at(2);
        progress.root = Some(Mounted {
            failures: vec!["a hook failed".to_owned()],
            ..Mounted::default()
        });
        note_guest(&mut vm, &progress, 1.0);
        assert_eq!((vm.launch.mounted_s, vm.launch.ready_s), (Some(3.0), None));
        progress.ready = at(4);
        progress.entrypoint = Some(ExitStatus::Code(3));
        note_guest(&mut vm, &progress, 1.0);
        // Another daemon hears of all of it again, and later.
        (progress.mounted, progress.ready) = (at(60), at(60));
        note_guest(&mut vm, &progress, 0.0);
        let launch = &vm.launch;
        assert_eq!((launch.mounted_s, launch.ready_s), (Some(3.0), Some(5.0)));
        assert_eq!(
            (&launch.notes[..], vm.exit_status),
            (&["a hook failed".to_owned()][..], Some(3))
        );
    }

    #[test]
    fn a_vm_has_failed_unless_it_was_told_to_end_or_did_after_it_had_begun() {
        let end = |cause, mounted_s, failure: Option<&str>| {
            let launch = LaunchFigures {
                mounted_s,
                ..LaunchFigures::default()
            };
            let ended = Ended {
                cause,
                exit_code: Some(0),
                signal: None,
            };
            let failure = failure.map(str::to_owned);
            match end_of(&launch, &ended, failure, || "the console".to_owned()) {
                VmEnd::Stopped { note } => note,
                VmEnd::Failed { error } => {
                    assert!(
                        error.ends_with("last console lines:\nthe console"),
                        "{error}"
                    );
                    Some(error)
                }
            }
        };
        assert_eq!(end(Cause::HostQuit, None, None), None);
        assert_eq!(end(Cause::GuestPoweroff, Some(1.0), None), None);
        for (cause, mounted_s, failure, word) in [
            (Cause::GuestPoweroff, None, None, "powered off"),
            (Cause::GuestReset, Some(1.0), None, "kernel panic"),
            (Cause::VmmDied, Some(1.0), None, "exited with code 0"),
            (Cause::HostQuit, Some(1.0), Some("no root"), ": no root;"),
            (
                Cause::GuestPoweroff,
                Some(1.0),
                Some("no root"),
                ": no root;",
            ),
        ] {
            let told = end(cause, mounted_s, failure).unwrap();
            assert!(told.contains(word), "{told}");
        }
    }
}
