//! Forks: clones of a VM that runs, each a machine of its own that goes on from where it was.
//!
//! ```text
//! names -> the VM is held -> copied -> let go -> stored -> clones: VMM, state restored
//!   -> told who they are -> they go on
//! ```
//! Invariant: whatever fails, the VM goes on; a clone that cannot be made leaves nothing.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use forelay_guest_protocol::snapshot::Tier;
use forelay_image::NameOf;
use forelay_vm::{Forward, SavedMachine};
use futures_util::StreamExt as _;
use rustix::fs::{SeekFrom, ioctl_ficlone, seek};

use super::LaunchService;
use super::restore::identity;
use super::saving::{SavedCopy, and_stands, check_room, let_go, ready, restore_into, saved_spec};
use super::start::StartedVmm;
use crate::api::{ForkRequest, Forked, LaunchFigures, Vm, Waits};
use crate::daemon::error::HostError;
use crate::daemon::memory::planner::now_ms;
use crate::daemon::order::{DeviceRecord, Order};
use crate::daemon::snapshot::service::Resumable;
use crate::daemon::vm::directory::{MAP_IMAGE, SCRATCH, VmDir};
use crate::daemon::vm::instance::{Instance, VmData, VmEnd};
use crate::daemon::vm::registry::{Claim, WantedName};
use crate::history::LaunchId;

/// Most clones of one request.
const MOST: u32 = 64;
/// Clones that are started side by side.
const AT_ONCE: usize = 4;

/// A clone that is being made.
struct Fork {
    claim: Claim,
    /// Its directory is its own; what is in one that it did not make is another's.
    made_dir: bool,
}

impl Fork {
    fn instance(&self) -> &Arc<Instance> {
        self.claim.instance()
    }

    fn scratch(&self) -> PathBuf {
        self.instance().read(|vm| vm.runtime_dir.join(SCRATCH))
    }

    /// Makes its directory. From then on a later daemon knows of it.
    fn make_dir(&mut self) -> Result<PathBuf, HostError> {
        let dir = self.instance().dir().map_err(HostError::invalid)?;
        dir.make().map_err(HostError::failed)?;
        self.made_dir = true;
        self.instance().save().map_err(HostError::failed)?;
        Ok(dir.path())
    }

    /// Ends it, and leaves nothing of it.
    fn undo(self, error: &HostError) {
        if self.made_dir
            && let Ok(dir) = self.instance().dir()
        {
            // A VMM that did not end in time has its disk there.
            if let Err(error) = forelay_vm::stray::end_all(&dir.path()) {
                tracing::error!(fork = self.instance().name(), %error, "its VMM lives on");
            }
            dir.clear();
        }
        let error = error.to_string();
        self.claim.end(VmEnd::Failed { error });
    }
}

/// A VM that was held for its clones.
struct HeldSource {
    /// Its devices then.
    devices: Vec<DeviceRecord>,
    /// How long it stood still.
    seconds: f64,
    /// Why it may still do so.
    stands: Option<HostError>,
}

/// All that the clones of a VM have in common.
struct Mould {
    order: Order,
    machine: SavedMachine,
    /// Devices of the VM, its memory aside.
    devices: Vec<DeviceRecord>,
    asked: Instant,
}

impl LaunchService {
    /// Makes clones of a VM.
    pub async fn fork(
        &self,
        source: &Arc<Instance>,
        request: ForkRequest,
    ) -> Result<Forked, HostError> {
        let asked = Instant::now();
        let _turn = source.device_turn().await;
        ready(source)?;
        let order = self.order_of(source)?;
        check(source, &order, &request)?;
        let mut forks = self.claim_forks(source, &request)?;
        let made = self.make_forks(source, order, &mut forks, asked).await;
        let (made, held) = match made {
            Ok(made) => made,
            Err(error) => {
                for fork in forks {
                    fork.undo(&error);
                }
                return Err(error);
            }
        };
        let mut forked = Forked {
            vms: Vec::new(),
            failed: held.stands.iter().map(HostError::to_string).collect(),
            held_s: held.seconds,
            took_s: 0.0,
        };
        for (fork, made) in forks.into_iter().zip(made) {
            match made {
                Ok(vm) => {
                    fork.claim.keep();
                    forked.vms.push(vm);
                }
                Err(error) => {
                    let name = fork.instance().name();
                    forked.failed.push(format!("{name}: {error}"));
                    fork.undo(&error);
                }
            }
        }
        forked.took_s = asked.elapsed().as_secs_f64();
        if forked.vms.is_empty() {
            return Err(HostError::Failed(forked.failed.join("; ")));
        }
        Ok(forked)
    }

    fn claim_forks(
        &self,
        source: &Instance,
        request: &ForkRequest,
    ) -> Result<Vec<Fork>, HostError> {
        let registry = &self.admission.registry;
        let mut forks: Vec<Fork> = Vec::new();
        for number in 1..=request.count {
            let name = match &request.name {
                Some(name) if request.count > 1 => Some(format!("{name}-{number}")),
                name => name.clone(),
            };
            let wanted = match &name {
                Some(name) => WantedName::Given(name),
                None => WantedName::OfProfile(source.name()),
            };
            let claimed = registry.claim(wanted, |name| {
                let dir = VmDir::of(&self.admission.vms_dir, name);
                let dir = dir.map_err(HostError::invalid)?;
                Ok(fork_of(source, &dir))
            });
            match claimed {
                Ok(claim) => forks.push(Fork {
                    claim,
                    made_dir: false,
                }),
                Err(error) => {
                    for fork in forks {
                        fork.undo(&error);
                    }
                    return Err(error);
                }
            }
        }
        Ok(forks)
    }

    /// The clones, each made or not, and how long the VM stood still for them.
    async fn make_forks(
        &self,
        source: &Arc<Instance>,
        order: Order,
        forks: &mut [Fork],
        asked: Instant,
    ) -> Result<(Vec<Result<Vm, HostError>>, HeldSource), HostError> {
        let from = source.dir().map_err(HostError::invalid)?.path();
        for fork in &mut *forks {
            let dir = fork.make_dir()?;
            copy_beside(from.join(MAP_IMAGE), dir.join(MAP_IMAGE)).await?;
        }
        let runtime = self.runtime_of(source, &order).await?;
        let shelf = self.snapshots.shelf(&order.domain).await?;
        let one_save = shelf.saving.lock().await;
        let _unused_yet = self.snapshots.saving.read().await;
        let (copy, held) = self.copy_source(source, &order, &forks[0]).await?;
        if from.join(SCRATCH).exists() {
            let first = forks[0].scratch();
            for fork in &forks[1..] {
                copy_beside(first.clone(), fork.scratch()).await?;
            }
        }
        let mut devices = held.devices.clone();
        let machine = copy.vm.machine.clone();
        let kept = self.store(source, &order, &runtime, copy).await?;
        drop(one_save);
        devices.retain(|device| !device.memory);
        let mould = Mould {
            order,
            machine,
            devices,
            asked,
        };
        let (mould, domain) = (&mould, &mould.order.domain);
        let making = forks.iter().map(|fork| async move {
            let from = self.snapshots.of_vm(domain, kept.id).await?;
            self.make_fork(mould, fork.instance(), &from).await
        });
        let making: Vec<_> = making.collect();
        let made = futures_util::stream::iter(making).buffered(AT_ONCE);
        Ok((made.collect().await, held))
    }

    /// Copies the VM, its scratch disk into the first clone's directory, and lets it go on.
    async fn copy_source(
        &self,
        source: &Arc<Instance>,
        order: &Order,
        first: &Fork,
    ) -> Result<(SavedCopy, HeldSource), HostError> {
        let since = Instant::now();
        let (handle, frozen) = Self::hold(source, false).await?;
        let copying = async {
            if !frozen.all {
                return Err(own_init(source));
            }
            let copy = self.copy(source, &handle, order).await?;
            let disk = source.read(|vm| vm.runtime_dir.join(SCRATCH));
            if disk.exists() {
                copy_beside(disk, first.scratch()).await?;
            }
            // As they are in what was copied, whatever becomes of the VM afterwards.
            Ok((copy, source.devices()))
        };
        let copied = copying.await;
        let stands = let_go(source, &handle).await.err();
        let (copy, devices) = match copied {
            Ok(copied) => copied,
            Err(error) => return Err(and_stands(error, stands)),
        };
        let held = HeldSource {
            devices,
            seconds: since.elapsed().as_secs_f64(),
            stands,
        };
        Ok((copy, held))
    }

    async fn make_fork(
        &self,
        mould: &Mould,
        instance: &Arc<Instance>,
        from: &Resumable,
    ) -> Result<Vm, HostError> {
        let dir = instance.read(|vm| vm.runtime_dir.clone());
        let forwards = self.own_ports(instance)?;
        let mut devices = mould.devices.clone();
        if let Some(map) = devices.first_mut() {
            map.path = dir.join(MAP_IMAGE);
        }
        devices.push(from.memory.clone());
        instance.update(|vm| (vm.devices, vm.forwards) = (devices, forwards.clone()));
        // Before the VMM is executed, as that of every launch.
        instance.save().map_err(HostError::failed)?;
        let kernel = self.composer.kernel(&mould.order.lock.kernel).await?;
        let place = (instance.name(), dir.as_path());
        let (machine, memory) = (&mould.machine, &from.memory);
        let mut spec = saved_spec(&mould.order, place, machine, memory, kernel, &forwards);
        spec.mergeable = self.starter.merges(&mould.order.domain);
        let vmm = self.starter.start(&spec).await?;
        instance.update(|vm| vm.launch.vmm_started_s = mould.asked.elapsed().as_secs_f64());
        let going_on = async {
            restore_into(vmm.handle(), &from.state).await?;
            vmm.handle().unpause().await.map_err(HostError::failed)?;
            let who = identity(&spec, instance.name(), None)?;
            let resumed = vmm.handle().resume(who).await;
            Ok(resumed.map_err(HostError::failed)?.failures)
        };
        match going_on.await {
            Ok(failures) => self.hand_fork_over(instance, vmm, failures).await,
            Err(error) => {
                vmm.end().await;
                Err(error)
            }
        }
    }

    async fn hand_fork_over(
        &self,
        instance: &Arc<Instance>,
        vmm: StartedVmm,
        failures: Vec<String>,
    ) -> Result<Vm, HostError> {
        instance.update(|vm| {
            vm.launch.resumed = Some(Tier::Ready);
            vm.launch.notes.extend(failures);
        });
        instance.started(vmm.handle().pid());
        if let Err(error) = instance.save() {
            vmm.end().await;
            return Err(HostError::failed(error));
        }
        self.supervisor.resume(Arc::clone(instance), vmm.commit());
        self.snapshots.remove_after(Arc::clone(instance));
        Ok(instance.vm())
    }

    /// The ports of the VM that it is a fork of, each at one of the host's that is free.
    fn own_ports(&self, instance: &Instance) -> Result<Vec<Forward>, HostError> {
        let forwards = instance.read(|vm| vm.forwards.clone());
        let own = forwards.into_iter().map(|forward| {
            let host = self.starter.ports.free_port(forward.udp)?;
            Ok(Forward { host, ..forward })
        });
        own.collect()
    }
}

fn check(source: &Instance, order: &Order, request: &ForkRequest) -> Result<(), HostError> {
    if request.count == 0 || request.count > MOST {
        let text = format!("{} forks: 1 to {MOST} can be made at a time", request.count);
        return Err(HostError::Invalid(text));
    }
    if let Some(name) = &request.name {
        NameOf::Vm.check(name).map_err(HostError::invalid)?;
    }
    if order.manifest.init.is_some() {
        return Err(own_init(source));
    }
    check_room(request.count, &format!("{} forks", request.count))
}

fn own_init(source: &Instance) -> HostError {
    HostError::Invalid(format!(
        "VM {} has an init of its own, which cannot be told that it is another machine now",
        source.name()
    ))
}

/// What a fork is before it is made. It is in no history: nobody launched it.
fn fork_of(source: &Instance, dir: &VmDir) -> VmData {
    let mut number = [0; 8];
    // Whatever they are, the ids of the history's launches are others.
    let _ = rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty());
    source.read(|vm| VmData {
        launch_id: LaunchId(u64::from_le_bytes(number)),
        launched_ms: now_ms(),
        runtime_dir: dir.path(),
        devices: Vec::new(),
        launch: LaunchFigures::default(),
        waits: Waits::default(),
        exit_status: None,
        paused: false,
        saved: None,
        forked_from: Some(source.name().to_owned()),
        ..vm.clone()
    })
}

async fn copy_beside(from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<(), HostError> {
    let (from, to) = (from.as_ref().to_owned(), to.as_ref().to_owned());
    let copying = tokio::task::spawn_blocking(move || {
        copy_sparse(&from, &to)
            .map_err(|error| HostError::Failed(format!("cannot copy {}: {error}", from.display())))
    });
    copying.await.map_err(HostError::failed)?
}

/// A copy that takes no more room than the file does, where the file system can none at all.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let (mut from, mut to) = (File::open(from)?, File::create(to)?);
    if ioctl_ficlone(&to, &from).is_ok() {
        return Ok(());
    }
    let bytes = from.metadata()?.len();
    to.set_len(bytes)?;
    let mut at = 0;
    while at < bytes {
        let data = match seek(&from, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = seek(&from, SeekFrom::Hole(data))?;
        seek(&from, SeekFrom::Start(data))?;
        seek(&to, SeekFrom::Start(data))?;
        io::copy(&mut io::Read::take(&mut from, end - data), &mut to)?;
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use super::*;

    #[test]
    fn a_copy_has_the_files_bytes_and_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let disk = File::create(path("disk")).unwrap();
        disk.set_len(64 << 20).unwrap();
        disk.write_all_at(b"first", 1 << 20).unwrap();
        disk.write_all_at(b"second", 40 << 20).unwrap();
        copy_sparse(&path("disk"), &path("copy")).unwrap();
        let copy = std::fs::read(path("copy")).unwrap();
        assert!(copy == std::fs::read(path("disk")).unwrap());
        let used = std::fs::metadata(path("copy")).unwrap().blocks() * 512;
        assert!(used < 4 << 20, "{used} bytes");
    }
}
