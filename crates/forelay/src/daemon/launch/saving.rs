//! Saving a VM that runs: its programs are stopped, its CPUs after them, and all of it copied.
//!
//! ```text
//! hold: programs stand still -> copy: CPUs stand still, devices, the VMM's own pages
//!   -> let_go (the VM of a fork) ... store: pages of the snapshot that it was made of -> chunks
//!   -> the trust domain's shelf -> the VM of a hibernation ends
//! ```
//! Invariant: a VM that was held is let go, unless what it was saved as has taken its place.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use forelay_guest_protocol::snapshot::Frozen;
use forelay_image::Extent;
use forelay_image::snapshot::SnapshotOf;
use forelay_memory::command_hints::Hints;
use forelay_memory::pressure::Probe;
use forelay_memory::private_pages::{OwnMemory, pieces, write_pages};
use forelay_store::Priority;
use forelay_vm::{Forward, GuestMemory, SavedMachine, SavedVm, VmHandle, VmSpec};

use super::LaunchService;
use super::maker::{describe, path_of};
use super::start::{self, wrapped};
use crate::api::VmState;
use crate::daemon::error::HostError;
use crate::daemon::order::{DeviceRecord, Order};
use crate::daemon::snapshot::kept::Kept;
use crate::daemon::snapshot::origin::{Runtime, origin_of_running};
use crate::daemon::vm::attach::running;
use crate::daemon::vm::directory::MAP_IMAGE;
use crate::daemon::vm::instance::Instance;
use crate::daemon::vm::pause::{go_on, keep_letting_go};
use crate::recipe::KernelFiles;

/// What is read at once of the snapshot that a VM was made of.
const WINDOW_BYTES: u64 = 1 << 20;
/// Memory that must be left for each VM that goes on: its VMM, and what it writes at first.
const ROOM_BYTES: u64 = 64 << 20;
/// Disk that is left for others.
const SPARE_DISK_BYTES: u64 = 64 << 20;
/// How long a VMM may take to have a state restored into it.
const RESTORE_LIMIT: Duration = Duration::from_secs(30);

/// All of a VM at one moment.
pub struct SavedCopy {
    pub vm: SavedVm,
    /// Its memory, in a file without a name.
    memory: File,
    /// What of it is the VM's own; the rest is as in what the VM was made of.
    own: Vec<Extent>,
}

impl LaunchService {
    /// What a VM was launched from, with what was attached since.
    pub(super) fn order_of(&self, instance: &Instance) -> Result<Order, HostError> {
        let (manifest, lock) = instance.read(|vm| (vm.manifest.clone(), vm.lock.clone()));
        let order = Order::remembered(&manifest, &lock, self.resolver.pmem_slots);
        order.ok_or_else(|| {
            let name = instance.name();
            HostError::Failed(format!("what VM {name} was launched from makes no sense"))
        })
    }

    /// How a VM that is to be saved runs. What was saved goes on under the same VMM alone, so one
    /// that could not go on under that which is there now is not saved.
    pub(super) async fn runtime_of(
        &self,
        instance: &Instance,
        order: &Order,
    ) -> Result<Runtime, HostError> {
        let handle = ready(instance)?;
        let kernel = self.composer.kernel(&order.lock.kernel).await?;
        let now = self.starter.runtime(&kernel.kernel).await?;
        let state = handle.state();
        same_vmm(
            &format!("VM {} runs", instance.name()),
            (&state.vmm, &state.accelerator),
            &now,
        )?;
        Ok(now)
    }

    /// Has the programs of a VM stand still. It is to be let go, whatever comes of it.
    pub(super) async fn hold(
        instance: &Arc<Instance>,
        give_back: bool,
    ) -> Result<(VmHandle, Frozen), HostError> {
        let handle = ready(instance)?;
        match handle.freeze(give_back).await {
            Ok(frozen) => Ok((handle, frozen)),
            Err(error) => {
                let stands = let_go(instance, &handle).await.err();
                Err(and_stands(HostError::failed(error), stands))
            }
        }
    }

    /// Copies a VM that is held; its CPUs stand still from then on.
    pub(super) async fn copy(
        &self,
        instance: &Instance,
        handle: &VmHandle,
        order: &Order,
    ) -> Result<SavedCopy, HostError> {
        let vm = handle.save_whole().await.map_err(HostError::failed)?;
        if vm.machine.hotplugged.iter().any(|one| one.retained) {
            return Err(HostError::Invalid(format!(
                "VM {} has devices of components that were detached, which its VMM cannot let go: \
                 a VM with such cannot be saved",
                instance.name()
            )));
        }
        let shelf = self.snapshots.dir.join(order.domain.as_str());
        let (vmm, address) = (handle.clone(), vm.ram_address);
        let bytes = u64::from(order.memory_mib()) << 20;
        let copying = tokio::task::spawn_blocking(move || {
            let memory = unnamed(&shelf)?;
            let from = OwnMemory::open(vmm.pid())?;
            if !vmm.is_running() {
                return Err(io::Error::other("its VMM has ended"));
            }
            let own = from.own_pages(address, bytes)?;
            let own_bytes = own.iter().map(|extent| extent.len).sum();
            let free = rustix::fs::fstatvfs(&memory)?;
            has_disk(own_bytes, free.f_bavail.saturating_mul(free.f_frsize))?;
            from.copy(&own, address, &memory)?;
            Ok::<_, io::Error>((memory, own))
        });
        let copied = copying.await.map_err(HostError::failed)?;
        let (memory, own) = copied.map_err(|error| {
            HostError::Failed(format!("the memory of VM {}: {error}", instance.name()))
        })?;
        Ok(SavedCopy { vm, memory, own })
    }

    /// Stores what was copied of a VM in its trust domain.
    pub(super) async fn store(
        &self,
        instance: &Instance,
        order: &Order,
        runtime: &Runtime,
        copy: SavedCopy,
    ) -> Result<Kept, HostError> {
        let ram_bytes = u64::from(order.memory_mib()) << 20;
        let devices = instance.devices();
        if let Some(from) = devices.iter().find(|device| device.memory) {
            self.fill(&copy, ram_bytes, from).await?;
        }
        let devices = devices.iter().filter(|device| !device.memory);
        let of = SnapshotOf {
            ram_bytes,
            state_bytes: copy.vm.state.len() as u64,
            map: instance.read(|vm| vm.devices.first().map(|map| map.image)),
            devices: devices.map(|one| (one.image, one.device_bytes)).collect(),
            origin: origin_of_running(order, runtime, instance.name()),
        };
        let made_of = format!("VM {}", instance.name());
        let described = describe(of, made_of, copy.memory, copy.vm.state);
        let (component, index, memory) = described.await?;
        let shelf = self.snapshots.shelf(&order.domain).await?;
        let path = path_of(&memory);
        let publishing = self.snapshots.publish(&shelf, &component, &path, &index);
        let kept = publishing.await?;
        let cap_bytes = self.maker.cap_bytes;
        self.snapshots.keep_within(&shelf, &kept, cap_bytes).await?;
        Ok(kept)
    }

    /// Adds what a VM has not written of the snapshot that it was made of.
    async fn fill(
        &self,
        copy: &SavedCopy,
        ram_bytes: u64,
        from: &DeviceRecord,
    ) -> Result<(), HostError> {
        let missing = gaps(&copy.own, ram_bytes);
        for window in pieces(Extent::new(0, ram_bytes), WINDOW_BYTES) {
            let parts: Vec<Extent> = missing
                .iter()
                .filter_map(|gap| gap.intersection(&window))
                .collect();
            if parts.is_empty() {
                continue;
            }
            let store = &self.snapshots.store;
            let read = store.read_image(from.image, window, Priority::Demand);
            let bytes = read.await.map_err(HostError::failed)?;
            let memory = copy.memory.try_clone().map_err(HostError::failed)?;
            let writing = tokio::task::spawn_blocking(move || {
                parts.iter().try_for_each(|part| {
                    let start = (part.offset - window.offset) as usize;
                    write_pages(
                        &memory,
                        &bytes[start..start + part.len as usize],
                        part.offset,
                    )
                })
            });
            let written = writing.await.map_err(HostError::failed)?;
            written.map_err(HostError::failed)?;
        }
        Ok(())
    }
}

/// The VMM of a VM that can be saved.
pub(super) fn ready(instance: &Instance) -> Result<VmHandle, HostError> {
    let handle = running(instance)?;
    let (name, state) = (instance.name(), instance.state());
    if state != VmState::Ready {
        return Err(HostError::Busy(format!(
            "VM {name} is {state:?}, and only one that is ready can be saved"
        )));
    }
    Ok(handle)
}

/// Has a VM go on that was held, as far as it was. Where it does not, it is tried again for as
/// long as the VM lives, and the error says so.
pub(super) async fn let_go(instance: &Arc<Instance>, handle: &VmHandle) -> Result<(), HostError> {
    let gone_on = go_on(handle).await;
    gone_on.map_err(|error| {
        tokio::spawn(keep_letting_go(Arc::clone(instance), handle.clone()));
        HostError::Failed(format!(
            "VM {} may stand still ({error}); letting it go is tried again until it goes on",
            instance.name()
        ))
    })
}

/// An error of what a VM was held for, with that of letting it go, if there is one.
pub(super) fn and_stands(error: HostError, stands: Option<HostError>) -> HostError {
    match stands {
        Some(stands) => HostError::Failed(format!("{error}; {stands}")),
        None => error,
    }
}

/// Refuses what was or would be saved under one VMM and gone on with under another.
pub(super) fn same_vmm(
    what: &str,
    (vmm, accelerator): (&str, &str),
    now: &Runtime,
) -> Result<(), HostError> {
    let there = now.accelerator.to_string();
    if vmm == now.vmm && accelerator == there {
        return Ok(());
    }
    let vmm = match vmm {
        "" => "a VMM of which no version is known",
        vmm => vmm,
    };
    Err(HostError::Invalid(format!(
        "{what} under {vmm} ({accelerator}), and VMs are started under {} ({there}) now: a saved \
         VM goes on under the same alone",
        now.vmm
    )))
}

/// Restores a state into a VMM; the guest's CPUs stand still.
pub(super) async fn restore_into(handle: &VmHandle, state: &[u8]) -> Result<(), HostError> {
    let restoring = tokio::time::timeout(RESTORE_LIMIT, handle.restore_whole(state));
    match restoring.await {
        Ok(restored) => restored.map_err(HostError::failed),
        Err(_) => Err(HostError::Failed(format!(
            "its VMM did not take the state of its devices within {RESTORE_LIMIT:?}"
        ))),
    }
}

/// A VM with the machine that one was saved on, its memory copied on write.
pub(super) fn saved_spec(
    order: &Order,
    (name, dir): (&str, &Path),
    machine: &SavedMachine,
    memory: &DeviceRecord,
    kernel: KernelFiles,
    forwards: &[Forward],
) -> VmSpec {
    let mut machine = machine.clone();
    if let Some(map) = machine.pmem.first_mut() {
        map.path = dir.join(MAP_IMAGE);
    }
    let mut spec = start::spec(order, (name, dir), &[], None, kernel);
    spec.hold = machine.hold;
    spec.pmem.clone_from(&machine.pmem);
    spec.forwards = forwards.to_vec();
    spec.memory = GuestMemory::Saved {
        path: memory.path.clone(),
        machine: Box::new(machine),
    };
    spec.wrap = Some(wrapped(Hints {
        copies_memory: true,
        ..Hints::default()
    }));
    spec
}

/// Refuses to have so many VMs, called so, go on where there is no memory for them.
pub(super) fn check_room(vms: u32, what: &str) -> Result<(), HostError> {
    let sample = Probe::new().sample().map_err(HostError::failed)?;
    has_room(vms, what, sample.mem_available_bytes)
}

fn has_room(vms: u32, what: &str, available: u64) -> Result<(), HostError> {
    let needed = u64::from(vms) * ROOM_BYTES;
    if needed <= available {
        return Ok(());
    }
    Err(HostError::Busy(format!(
        "{what} would take at least {} MiB of memory, and {} MiB are available: try again when \
         VMs have ended",
        needed >> 20,
        available >> 20
    )))
}

/// Refuses to save so much memory where the disk has no room for it: once as it is, once stored.
fn has_disk(own_bytes: u64, free_bytes: u64) -> io::Result<()> {
    let needed = own_bytes.saturating_mul(2).saturating_add(SPARE_DISK_BYTES);
    if needed <= free_bytes {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::StorageFull,
        format!(
            "to save it takes up to {} MiB of disk below `state_dir`, and {} MiB are free: \
             `forelay gc` makes room",
            needed >> 20,
            free_bytes >> 20
        ),
    ))
}

/// A file in a directory that has no name there: gone with the process.
fn unnamed(dir: &Path) -> io::Result<File> {
    std::fs::create_dir_all(dir)?;
    let mut options = File::options();
    let flags = rustix::fs::OFlags::TMPFILE.bits() as i32;
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(flags);
    options.open(dir)
}

/// What sorted extents leave of so many bytes.
fn gaps(extents: &[Extent], bytes: u64) -> Vec<Extent> {
    let mut gaps = Vec::new();
    let mut at = 0;
    for extent in extents {
        if extent.offset > at {
            gaps.push(Extent::new(at, extent.offset - at));
        }
        at = extent.end();
    }
    if at < bytes {
        gaps.push(Extent::new(at, bytes - at));
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vms_that_have_no_room_are_refused_in_words() {
        assert!(has_room(3, "3 forks", 3 * ROOM_BYTES).is_ok());
        let refused = has_room(3, "3 forks", 3 * ROOM_BYTES - 1);
        let told = refused.unwrap_err().to_string();
        assert!(
            told.contains("3 forks") && told.contains("192 MiB"),
            "{told}"
        );
    }

    #[test]
    fn a_vm_is_saved_under_the_vmm_alone_that_could_go_on_with_it_and_where_there_is_room() {
        let now = Runtime {
            accelerator: forelay_vm::Accelerator::Tcg,
            vmm: "QEMU 7.2".to_owned(),
        };
        assert!(same_vmm("VM web runs", ("QEMU 7.2", "tcg"), &now).is_ok());
        for (vmm, accelerator, word) in [
            ("QEMU 7.1", "tcg", "QEMU 7.1 (tcg)"),
            ("QEMU 7.2", "kvm", "QEMU 7.2 (kvm)"),
            ("", "tcg", "no version is known"),
        ] {
            let told = same_vmm("VM web runs", (vmm, accelerator), &now);
            let told = told.unwrap_err().to_string();
            assert!(
                told.contains(word) && told.contains("QEMU 7.2 (tcg) now"),
                "{told}"
            );
        }
        assert!(has_disk(100 << 20, (200 << 20) + SPARE_DISK_BYTES).is_ok());
        let told = has_disk(100 << 20, 200 << 20).unwrap_err().to_string();
        assert!(
            told.contains("264 MiB") && told.contains("200 MiB"),
            "{told}"
        );
        assert!(has_disk(u64::MAX, u64::MAX - 1).is_err());
    }

    #[test]
    fn gaps_are_what_is_left() {
        let own = [Extent::new(4096, 4096), Extent::new(16384, 8192)];
        let expected = [
            Extent::new(0, 4096),
            Extent::new(8192, 8192),
            Extent::new(24576, 4096),
        ];
        assert_eq!(gaps(&own, 28672), expected);
        assert_eq!(gaps(&own, 24576), expected[..2]);
        assert_eq!(gaps(&[], 4096), [Extent::new(0, 4096)]);
    }
}
