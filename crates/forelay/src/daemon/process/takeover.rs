//! What an earlier worker left: mounts whose faults wait, files that VMs map, VMs.
//!
//! ```text
//! mounts: readers run -> images reserved for the VMs that map them -> known, files added:
//!   faults are answered -> API, ready
//!   -> VMs, side by side: reattached | ended | unreachable (tried again)
//! ```
//! Invariants: no path below a mount is touched before its readers run; a VM whose process
//! lives is never given up because it does not answer.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use forelay_cache::{Domain, PlannerEvent};
use forelay_image::Digest;
use forelay_image::bundle::Bundle;
use forelay_image::lock::Lock;
use forelay_store::{ImageHold, ImageMap};
use forelay_vm::process::Process;
use forelay_vm::state::VmState as VmmState;
use forelay_vm::{ReattachError, VmHandle, VmmDriver as _};
use futures_util::future::join_all;

use super::health::Dependency;
use super::startup::memory_settings;
use crate::api::VmState;
use crate::daemon::Host;
use crate::daemon::error::HostError;
use crate::daemon::launch::start::KILL_LIMIT;
use crate::daemon::memory::journal::Replayed;
use crate::daemon::vm::instance::{Instance, VmData, VmEnd};
use crate::daemon::vm::pause::settle;
use crate::daemon::vm::registry::{Record, load_records};
use crate::daemon::vm::service::kill_recorded;

/// How long opening a VM's components may keep its files waiting.
const OPEN_LIMIT: Duration = Duration::from_secs(2);
/// How long a VMM may take to answer before its VM counts as unreachable.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long one of the later attempts may take, and the pause between two.
const LATER_LIMIT: Duration = Duration::from_secs(60);
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// Between attempts at components that could not be opened.
const REOPEN_EVERY: Duration = Duration::from_secs(5);

/// What is there to take over.
pub struct Inherited {
    records: Vec<Record>,
    /// Domains whose mounts were held; other mounts are gone.
    held: BTreeSet<String>,
    journalled: Replayed,
}

/// Serves the mounts that the holder holds. When this returns, faults of what earlier VMs
/// map are answered, as far as the disk cache or the repository has the bytes.
pub async fn serve_mounts(host: &Arc<Host>, journalled: Replayed) -> Result<Inherited> {
    let held: BTreeSet<String> = host.domains.sessions().held()?.into_iter().collect();
    let (serving, names) = (Arc::clone(host), held.clone());
    tokio::task::spawn_blocking(move || {
        for name in names {
            if let Err(error) = serving.domains.ensure(&Domain::from(name.as_str())) {
                let problem = format!("domain {name}: {error}");
                serving.health.lack(Dependency::Mounts, problem);
            }
        }
    })
    .await?;
    let (records, unusable) = load_records(&host.config.vms_dir());
    host.instances.keep_names(unusable);
    let inherited = Inherited {
        records,
        held,
        journalled,
    };
    let with_memory = inherited.records.iter();
    // One that hibernates maps nothing.
    let with_memory = with_memory.filter(|record| record.vm.state != VmState::Hibernated);
    let with_memory = with_memory.filter(|record| inherited.held.contains(&record.vm.domain));
    with_memory.clone().for_each(|record| reserve(host, record));
    let opened = join_all(with_memory.map(|record| open_files(host, record))).await;
    let unopened: Vec<Record> = opened.into_iter().flatten().collect();
    if !unopened.is_empty() {
        tokio::spawn(reopen(Arc::clone(host), unopened));
    }
    Ok(inherited)
}

/// Keeps the images of a VM for what it was launched with: no other that claims their digests
/// gets them, also if they cannot be opened yet.
fn reserve(host: &Host, record: &Record) {
    let lock = Lock::parse(&record.lock);
    for component in lock.iter().flat_map(|lock| &lock.components) {
        host.store
            .reserve_image(component.image, Some(component.id));
    }
    for device in record.devices.iter().filter(|device| device.memory) {
        host.store.reserve_image(device.image, None);
    }
}

/// The chunk indexes of a VM's images, as far as they are known.
type Indexes = HashMap<Digest, Digest>;

/// Makes images and files of a VM known; the record, if it has to be tried again.
async fn open_files(host: &Arc<Host>, record: &Record) -> Option<Record> {
    let mut indexes = Indexes::new();
    let know = tokio::time::timeout(OPEN_LIMIT, know_images(host, record, &mut indexes));
    let known = matches!(know.await, Ok(true));
    let (serving, record) = (Arc::clone(host), record.clone());
    let added = tokio::task::spawn_blocking(move || {
        let added = add_files(&serving, &record, &indexes);
        if let Err(error) = &added {
            let problem = format!("VM {}: {error}", record.vm.name);
            serving.health.lack(Dependency::Mounts, problem);
        }
        (!known || added.is_err()).then_some(record)
    });
    added.await.ok().flatten()
}

async fn reopen(host: Arc<Host>, mut records: Vec<Record>) {
    while !records.is_empty() {
        let names: Vec<&str> = records.iter().map(|one| one.vm.name.as_str()).collect();
        let problem = format!("of {}; see the log", names.join(", "));
        host.health.lack(Dependency::Components, problem);
        tokio::time::sleep(REOPEN_EVERY).await;
        let again = join_all(records.iter().map(|record| open_files(&host, record))).await;
        records = again.into_iter().flatten().collect();
    }
    host.health.has(Dependency::Components);
}

/// Makes the images of a VM's lock known again, before anything can fault on them. False if
/// that has to be tried again.
async fn know_images(host: &Host, record: &Record, indexes: &mut Indexes) -> bool {
    let lock = match Lock::parse(&record.lock) {
        Ok(lock) => lock,
        Err(error) => {
            tracing::error!(vm = record.vm.name, %error, "the lock of a running VM is lost");
            return true;
        }
    };
    let mut all = true;
    for component in &lock.components {
        match host.store.hold_component(component.id).await {
            Ok(held) => note_held(host, held, indexes),
            Err(error) => {
                let why = forelay_host::error_chain(&error);
                tracing::error!(
                    vm = record.vm.name,
                    component = component.name,
                    error = why,
                    "a running VM's component cannot be opened"
                );
                all = false;
            }
        }
    }
    all & know_memory(host, record, indexes).await
}

/// An image of a VM that was taken over stays what it is for as long as this daemon runs.
fn note_held(host: &Host, (map, hold): (Arc<ImageMap>, ImageHold), indexes: &mut Indexes) {
    indexes.insert(map.image.digest, map.image.chunk_index);
    host.inherited_holds.lock().insert(map.image.digest, hold);
}

/// The same of the memory that a VM resumed from.
async fn know_memory(host: &Host, record: &Record, indexes: &mut Indexes) -> bool {
    let domain = Domain::from(record.vm.domain.as_str());
    let mut all = true;
    for device in record.devices.iter().filter(|device| device.memory) {
        match host.snapshots.know(&domain, device.image).await {
            Ok(Some(held)) => note_held(host, held, indexes),
            other => {
                let (vm, why) = (&record.vm.name, other.err().map(|error| error.to_string()));
                tracing::error!(vm, why, "a running VM's snapshot cannot be opened");
                all = false;
            }
        }
    }
    all
}

fn add_files(host: &Host, record: &Record, indexes: &Indexes) -> Result<(), HostError> {
    let domain = Domain::from(record.vm.domain.as_str());
    let memory = host.domains.ensure(&domain)?;
    for device in record.devices.iter().skip(1) {
        if let Some(bundle) = Bundle::new(&device.members) {
            host.store.add_bundle(bundle).map_err(HostError::failed)?;
        }
        let file = (device.image, device.image_bytes);
        let index = indexes.get(&device.image).copied();
        host.domains.add_inherited(&memory, file, index)?;
    }
    Ok(())
}

/// What an attempt to talk to a VMM again came to.
enum Attempt {
    Reattached(VmHandle),
    /// Its process has ended.
    Ended(String),
    /// Its process lives and does not answer.
    Unreachable(String),
}

async fn attempt(host: &Host, runtime_dir: &Path, limit: Duration) -> Attempt {
    let why = match tokio::time::timeout(limit, host.driver.reattach(runtime_dir)).await {
        Ok(Ok(handle)) => return Attempt::Reattached(handle),
        Ok(Err(error @ ReattachError::Ended { .. })) => {
            return Attempt::Ended(forelay_host::error_chain(&error));
        }
        Ok(Err(error)) => forelay_host::error_chain(&error),
        Err(_) => format!("its monitor did not answer within {limit:?}"),
    };
    match VmmState::read(runtime_dir) {
        Ok(state) if state.process.is_running() => Attempt::Unreachable(why),
        Ok(_) => Attempt::Ended(why),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // Started a moment before the worker died, so that nobody knows how to talk to it.
            end_unknown(runtime_dir).await;
            Attempt::Ended(why)
        }
        // Which process it is, its mark tells.
        Err(_) if forelay_vm::stray::find(runtime_dir).is_empty() => Attempt::Ended(why),
        Err(_) => Attempt::Unreachable(why),
    }
}

/// Lists the VMs that were left, so that names are taken and clients see them at once.
pub fn list_vms(host: &Host, inherited: &Inherited) -> Vec<Arc<Instance>> {
    let mut listed = Vec::new();
    for record in &inherited.records {
        let pid = VmmState::read(&record.vm.runtime_dir).map(|state| state.process.pid);
        let instance = Arc::new(Instance::left(record.clone(), pid.ok()));
        if host.instances.insert(Arc::clone(&instance)).is_ok() {
            listed.push(instance);
        }
    }
    listed
}

/// Finds the VMMs again, all side by side, and brings the mapping table in line with the
/// kernel. Those that do not answer are tried again for as long as they live.
pub async fn find_vms(host: Arc<Host>, inherited: Inherited, instances: Vec<Arc<Instance>>) {
    let taken_over = !inherited.records.is_empty() || inherited.journalled != Replayed::default();
    let held = &inherited.held;
    let (hibernated, instances): (Vec<_>, Vec<_>) = instances
        .into_iter()
        .partition(|one| one.state() == VmState::Hibernated);
    // What was made of them a moment before the daemon died has not run.
    join_all(hibernated.iter().map(|one| async {
        let dir = one.read(|vm| vm.runtime_dir.clone());
        end_unknown(&dir).await;
    }))
    .await;
    let first = join_all(instances.iter().map(|instance| async {
        let vm = instance.vm();
        let runs = VmmState::read(&vm.runtime_dir).is_ok_and(|vmm| vmm.process.is_running());
        if runs && !held.contains(&vm.domain) {
            if let Err(error) = kill_recorded(&vm.runtime_dir) {
                tracing::error!(%error, vm = vm.name, "its VMM cannot be killed");
            }
            return Attempt::Ended(
                "its memory is gone: the daemon's holder ended while it ran, and with it the \
                 mount that it maps"
                    .to_owned(),
            );
        }
        if instance.read(is_half_resumed) {
            end_unknown(&vm.runtime_dir).await;
            return Attempt::Ended(HALF_RESUMED.to_owned());
        }
        attempt(&host, &vm.runtime_dir, ANSWER_LIMIT).await
    }));
    let mut reattached = Vec::new();
    for (instance, attempt) in instances.iter().zip(first.await) {
        match attempt {
            Attempt::Reattached(handle) => {
                note_reattached(instance, &handle);
                reattached.push((Arc::clone(instance), handle));
            }
            Attempt::Ended(why) => note_ended(&host, instance, why).await,
            Attempt::Unreachable(why) => {
                let trying = keep_trying(Arc::clone(&host), Arc::clone(instance), why);
                tokio::spawn(trying);
            }
        }
    }
    if taken_over {
        let (reconciler, journalled) = (host.reconciler(), inherited.journalled);
        let running = host.instances.running_vmms();
        let reconcile = move || reconciler.reconcile(journalled, &running);
        if let Ok(takeover) = tokio::task::spawn_blocking(reconcile).await {
            tracing::info!(?takeover, "the mapping table is the kernel's again");
            *host.takeover.lock() = Some(takeover);
        }
    }
    for (instance, handle) in reattached {
        tokio::spawn(settle(Arc::clone(&instance), handle.clone()));
        host.supervisor.resume(instance, handle);
    }
    if taken_over {
        // What the predecessor could not do any more.
        let budget_bytes = memory_settings(&host.config).0.budget_bytes;
        host.memory.tell(PlannerEvent::BudgetChanged(budget_bytes));
    }
}

/// Why a VM ends whose daemon died before it had made it of its snapshot.
const HALF_RESUMED: &str = "the daemon ended while this VM was resuming from a snapshot, which \
                            nobody can go on with: launch it again";

/// Whether a VM's guest waits to be restored or to be told who it is: its launch writes down that
/// it resumed only after that.
fn is_half_resumed(vm: &VmData) -> bool {
    let is_clone = vm.devices.iter().any(|device| device.memory);
    is_clone && vm.launch.resumed.is_none() && vm.saved.is_none()
}

fn note_reattached(instance: &Instance, handle: &VmHandle) {
    tracing::info!(vm = instance.name(), pid = handle.pid(), "reattached");
    instance.may_be_held(true);
    instance.started(handle.pid());
}

async fn note_ended(host: &Host, instance: &Instance, why: String) {
    let vm = instance.vm();
    tracing::warn!(vm = vm.name, error = why, "a VM ended while no daemon ran");
    // What a launch had made there so far is of no use to anyone.
    if let Ok(dir) = instance.dir() {
        dir.clear();
    }
    host.supervisor.note_stopped(instance).await;
    instance.end(VmEnd::Failed { error: why });
}

/// Goes on trying to reach a VMM that lives.
async fn keep_trying(host: Arc<Host>, instance: Arc<Instance>, mut why: String) {
    let before = instance.vm();
    loop {
        tracing::warn!(
            vm = before.name,
            error = why,
            "a VM is unreachable; trying again"
        );
        instance.unreachable(why);
        tokio::time::sleep(RETRY_EVERY).await;
        match attempt(&host, &before.runtime_dir, LATER_LIMIT).await {
            Attempt::Reattached(handle) => {
                note_reattached(&instance, &handle);
                tokio::spawn(settle(Arc::clone(&instance), handle.clone()));
                return host.supervisor.resume(instance, handle);
            }
            Attempt::Ended(why) => return note_ended(&host, &instance, why).await,
            Attempt::Unreachable(again) => why = again,
        }
    }
}

/// Ends a VMM that was started in `runtime_dir` a moment before the daemon died, so that
/// nobody can go on with it.
async fn end_unknown(runtime_dir: &Path) {
    let dir = runtime_dir.display();
    let ended = match forelay_vm::stray::end_all(runtime_dir) {
        Ok(ended) => ended,
        Err(error) => {
            return tracing::error!(%error, %dir, "a VMM that nobody knows lives on");
        }
    };
    for pid in ended.iter().map(|process| process.id().pid) {
        tracing::warn!(pid, "ended a VMM that nobody knows");
    }
    let gone = join_all(ended.iter().map(Process::wait));
    if tokio::time::timeout(KILL_LIMIT, gone).await.is_err() {
        tracing::error!(%dir, "its VMM was killed and does not end");
    }
}

#[cfg(test)]
mod tests {
    use forelay_guest_protocol::snapshot::Tier;
    use forelay_image::Digest;

    use super::*;
    use crate::daemon::order::DeviceRecord;
    use crate::daemon::vm::instance::tests::data;

    #[test]
    fn a_clone_is_half_resumed_until_its_record_says_from_what() {
        let dir = tempfile::tempdir().unwrap();
        let mut vm = data("web", dir.path());
        let device = |memory| DeviceRecord {
            image: Digest::of(b"image"),
            image_bytes: 4096,
            device_bytes: 4096,
            path: "/image".into(),
            component: String::new(),
            members: Vec::new(),
            memory,
            holds: Vec::new(),
        };
        vm.devices = vec![device(false)];
        assert!(!is_half_resumed(&vm), "it boots");
        vm.devices.push(device(true));
        assert!(is_half_resumed(&vm));
        vm.launch.resumed = Some(Tier::Kernel);
        assert!(!is_half_resumed(&vm));
    }
}
