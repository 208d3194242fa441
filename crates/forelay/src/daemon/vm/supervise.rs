//! Watching over one VM from its start to its end.
//!
//! One task per VM follows the guest's reports, scans touched pages, closes the
//! observation when the launch's window has passed, and cleans up when the VMM is gone.
//!
//! Invariant: the outcome of a launch is recorded once, at the window's end, the VM's or the
//! daemon's, whichever is first.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forelay_cache::PlannerEvent;
use forelay_cache::plan::TouchReport;
use forelay_image::{Digest, Extent, Touch};
use forelay_vm::{Cause, Ended, Phase, Progress, VmHandle};
use parking_lot::Mutex;

use crate::api::VmState;
use crate::daemon::Host;
use crate::daemon::forecast::learning::LaunchOutcome;
use crate::daemon::forecast::lessons::Notebook;
use crate::daemon::forecast::observer::{NewTouches, Observer};
use crate::daemon::launch::launcher::Wanted;
use crate::daemon::memory::faults::{Plan, Waits};
use crate::daemon::memory::planner::now_ms;
use crate::daemon::vm::directory::{MAP_IMAGE, RECORD, SCRATCH};
use crate::daemon::vm::registry::Instance;
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
    /// Touches since the launch, in first-touch order.
    pub touches: Vec<Touch>,
    /// Of them, what is to be learned.
    pub notes: Notebook,
}

/// A launch under observation.
struct Launch {
    of: ProfileRef,
    waits: Arc<Waits>,
    /// What was prefetched for it.
    planned: Vec<(Digest, Extent)>,
    /// Repository bytes before it.
    repository_before: u64,
    recorded: bool,
    ready_at: Option<Instant>,
}

impl Host {
    /// Watches over a VM that was just launched.
    pub(in crate::daemon) fn supervise(
        self: &Arc<Self>,
        instance: Arc<Instance>,
        handle: VmHandle,
        of: ProfileRef,
        wanted: Wanted,
        repository_before: u64,
    ) {
        let all = wanted.working_set.iter();
        let all = all.map(|one| (one.image, one.extent));
        let plan = Plan::new(all, wanted.absent.iter().copied());
        let waits = self.domains.attribution().add(handle.pid(), plan);
        let launch = Launch {
            of,
            waits,
            planned: wanted.missing,
            repository_before,
            recorded: false,
            ready_at: None,
        };
        let watching = Arc::clone(self).watch_over(instance, handle, launch);
        self.lessons.spawn(watching);
    }

    /// Watches over a VM that an earlier daemon launched. Its launch is not recorded
    /// again.
    pub(in crate::daemon) fn supervise_reattached(
        self: &Arc<Self>,
        instance: Arc<Instance>,
        handle: VmHandle,
        of: ProfileRef,
    ) {
        let plan = Plan::default();
        let waits = self.domains.attribution().add(handle.pid(), plan);
        let launch = Launch {
            of,
            waits,
            planned: Vec::new(),
            repository_before: 0,
            recorded: true,
            ready_at: None,
        };
        let watching = Arc::clone(self).watch_over(instance, handle, launch);
        self.lessons.spawn(watching);
    }

    async fn watch_over(
        self: Arc<Self>,
        instance: Arc<Instance>,
        handle: VmHandle,
        mut launch: Launch,
    ) {
        let name = instance.vm().name;
        let observed = self.observe_devices(&instance, handle.pid()).await;
        if launch.recorded {
            // What was touched before this daemon came is no lesson of its.
            observed.lock().notes = Notebook::of_reattached();
            self.scan(&instance, &observed).await;
        }
        self.observers
            .lock()
            .insert(name.clone(), Arc::clone(&observed));
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
                () = self.lessons.hurried() => {
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
                    let window = Duration::from_secs_f64(self.config.forecast.window_s.max(0.0));
                    if launch.ready_at.is_some_and(|ready| ready.elapsed() >= window) {
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
            touches: Vec::new(),
            notes: Notebook::default(),
        }))
    }

    fn note_progress(&self, instance: &Instance, progress: &Progress, launch: &mut Launch) {
        let started = instance.vm().launch.vmm_started_s;
        let state = match progress.phase {
            // Just launched, or taken over and not heard of yet: what is known stands.
            Phase::Starting => instance.vm().state,
            Phase::Mounted => VmState::Mounted,
            Phase::Ready => VmState::Ready,
            Phase::Stopping | Phase::Ended => instance.vm().state,
        };
        if progress.ready.is_some() && launch.ready_at.is_none() {
            launch.ready_at = Some(Instant::now());
            if !launch.recorded {
                self.note_waits(instance, launch);
            }
        }
        let seconds = |moment: forelay_vm::Moment| started + moment.since_launch.as_secs_f64();
        instance.update(|vm| {
            vm.state = state;
            if vm.launch.mounted_s.is_none() {
                vm.launch.mounted_s = progress.mounted.map(seconds);
            }
            if vm.launch.ready_s.is_none() {
                vm.launch.ready_s = progress.ready.map(seconds);
            }
            vm.exit_status = progress.entrypoint.map(|status| match status {
                forelay_guest_protocol::messages::ExitStatus::Code(code) => code,
                forelay_guest_protocol::messages::ExitStatus::Signal(signal) => 128 + signal,
                forelay_guest_protocol::messages::ExitStatus::TimedOut => 124,
            });
        });
        let changed = instance.vm().state == state && state != VmState::Booting;
        if changed && let Err(error) = instance.save() {
            tracing::warn!(%error, "cannot save an instance's record");
        }
    }

    /// Figures of the launch, until it is recorded.
    fn note_figures(&self, instance: &Instance, observed: &Mutex<Observed>, launch: &Launch) {
        let touched_bytes = observed.lock().observer.touched_bytes();
        instance.update(|vm| vm.launch.touched_bytes = touched_bytes);
        if !launch.recorded {
            self.note_waits(instance, launch);
        }
    }

    fn note_waits(&self, instance: &Instance, launch: &Launch) {
        let waits = launch.waits.figures();
        let fetched = self.store.scheduler().counters().repository_bytes();
        instance.update(|vm| {
            vm.launch.demand_fetches = waits.fetches;
            vm.launch.demand_bytes = waits.bytes;
            vm.launch.stall_s = waits.stall_ns as f64 / 1e9;
            vm.launch.demand_causes = waits.causes;
            vm.launch.repository_bytes = fetched.saturating_sub(launch.repository_before);
        });
    }

    /// Looks what a VM has touched just now: what it maps is about to go.
    pub(in crate::daemon) async fn scan_now(&self, instance: &Instance) {
        let observed = self.observers.lock().get(&instance.vm().name).cloned();
        if let Some(observed) = observed {
            self.scan(instance, &observed).await;
        }
    }

    /// Scans once and tells the planner what is new.
    async fn scan(&self, instance: &Instance, observed: &Arc<Mutex<Observed>>) {
        let vm = instance.vm();
        let since_launch_ms = since_launch_ms(instance);
        let observed = Arc::clone(observed);
        let domain = self.domains.get(&vm.domain.as_str().into());
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
                observed.notes.note(touches.clone());
                observed.touches.extend(touches);
            }
            found
        });
        for NewTouches { image, extents } in scanned.await.unwrap_or_default() {
            self.memory.tell(PlannerEvent::Touched(TouchReport {
                vm: vm.name.as_str().into(),
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
        launch: &mut Launch,
    ) {
        if std::mem::replace(&mut launch.recorded, true) {
            return;
        }
        self.note_waits(instance, launch);
        let vm = instance.vm();
        let millis = |seconds: f64| (seconds * 1e3) as u64;
        let images = launched_images(instance);
        let outcome = LaunchOutcome {
            launch_id: instance.launch_id(),
            of: launch.of.clone(),
            touches: observed.lock().notes.take_launch(&images),
            images,
            waits: launch.waits.figures(),
            planned: std::mem::take(&mut launch.planned),
            mounted_ms: vm.launch.mounted_s.map(millis),
            ready_ms: vm.launch.ready_s.map(millis),
        };
        self.learner.observed(outcome).await;
    }

    /// Learns what a VM touches of a component that it was just given, and of the others
    /// meanwhile, when the window after that has passed (or the VM or the daemon ends).
    pub(in crate::daemon) fn learn_attached(
        self: &Arc<Self>,
        instance: &Arc<Instance>,
        observed: &Arc<Mutex<Observed>>,
        image: Digest,
    ) {
        let (host, instance) = (Arc::clone(self), Arc::clone(instance));
        let observed = Arc::clone(observed);
        observed
            .lock()
            .notes
            .attached(image, since_launch_ms(&instance));
        self.lessons.spawn(async move {
            let window = Duration::from_secs_f64(host.config.forecast.window_s.max(0.0));
            let ended = host.wait_until_ended(&instance);
            tokio::select! {
                () = tokio::time::sleep(window + ATTACH_PATIENCE) => {}
                () = ended => {}
                () = host.lessons.hurried() => {}
            }
            host.scan(&instance, &observed).await;
            let Some(lesson) = observed.lock().notes.take_attached(&image) else {
                return;
            };
            let vm = instance.vm();
            let of = ProfileRef::new(vm.profile, vm.owner);
            let learning = host
                .learner
                .attached_touched(&of, instance.launch_id(), image, lesson);
            learning.await;
        });
    }

    /// Records that a VM is gone.
    pub(in crate::daemon) async fn note_stopped(&self, instance: &Instance) {
        let vm = instance.vm();
        let ran_ms = u64::try_from(now_ms() - vm.launched_ms).unwrap_or(0);
        let of = ProfileRef::new(vm.profile, vm.owner);
        let stopped = self.learner.stopped(&of, instance.launch_id(), ran_ms);
        stopped.await;
    }

    /// Cleans up after a VM and says how it ended.
    async fn ended(&self, instance: &Instance, handle: &VmHandle, ended: &Ended) {
        let vm = instance.vm();
        let name = vm.name.as_str();
        let waits = self.domains.attribution().figures(handle.pid());
        self.domains.attribution().remove(handle.pid());
        instance.update(|vm| vm.waits = waits.unwrap_or_default().into());
        self.memory.tell(PlannerEvent::VmStopped(name.into()));
        self.observers.lock().remove(name);
        self.note_stopped(instance).await;
        for file in [MAP_IMAGE, SCRATCH, RECORD] {
            let _ = std::fs::remove_file(vm.runtime_dir.join(file));
        }
        let asked = ended.cause == Cause::HostQuit;
        let good = asked || (ended.cause == Cause::GuestPoweroff && vm.launch.mounted_s.is_some());
        let failure = handle.progress().failure;
        self.handles.lock().remove(name);
        instance.update(|vm| {
            vm.pid = None;
            if good && failure.is_none() {
                vm.state = VmState::Stopped;
                return;
            }
            let reason = failure.map_or_else(String::new, |text| format!(": {text}"));
            let console = handle.console_tail();
            vm.error = Some(format!("{ended}{reason}; last console lines:\n{console}"));
            vm.state = VmState::Failed;
        });
    }
}

fn since_launch_ms(instance: &Instance) -> u32 {
    u32::try_from(now_ms() - instance.vm().launched_ms).unwrap_or(u32::MAX)
}

/// Images that the VM was launched with; what was attached is learned by itself.
fn launched_images(instance: &Instance) -> Vec<Digest> {
    let vm = instance.vm();
    let attached = |image: &Digest| {
        let mut components = vm.components.iter();
        components.any(|one| one.attached && one.image == *image)
    };
    let devices = instance.devices();
    let images = devices.iter().skip(1).map(|device| device.image);
    images.filter(|image| !attached(image)).collect()
}
