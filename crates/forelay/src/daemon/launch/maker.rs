//! Making snapshots: a VM of nobody is started, held where the snapshot is to be, and saved.
//!
//! ```text
//! order -> devices, map image -> VMM, its memory in a file of this process -> held -> saved
//!       -> chunks -> published in the trust domain's shelf
//! ```
//! Invariants: one maker at a time; a maker's VMM ends with this task, and what one left that ended
//! with its daemon is ended by the next ([`Maker::clear`]); its memory has no name in any file
//! system.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use forelay_guest_protocol::snapshot::Tier;
use forelay_image::component::{Component, ImageRef, Role};
use forelay_image::snapshot::SnapshotOf;
use forelay_image::{ChunkIndex, Digest};
use forelay_memory::command_hints::Hints;
use forelay_memory::pressure::Probe;
use forelay_vm::process::Process;
use forelay_vm::{GuestMemory, Upper, VmSpec};
use futures_util::future::join_all;
use tokio::sync::watch;

use crate::daemon::error::HostError;
use crate::daemon::launch::compose::{Composer, MapImage};
use crate::daemon::launch::restore::HOSTNAME;
use crate::daemon::launch::start::{KILL_LIMIT, Starter, spec, wrapped};
use crate::daemon::memory::mapper::Mapper;
use crate::daemon::memory::planner::now_ms;
use crate::daemon::order::Order;
use crate::daemon::snapshot::kept::Kept;
use crate::daemon::snapshot::origin::{latest_tier, origin};
use crate::daemon::snapshot::service::Snapshots;
use crate::daemon::vm::directory::{MAP_IMAGE, VmDir};
use crate::recipe::KernelFiles;

/// How memory images are cut. Measured on the memory of `examples/web.toml` at two tiers: see
/// ARCHITECTURE.md.
const CHUNK_BYTES: u32 = 64 << 10;
/// Name of the maker's VM; there is one.
const NAME: &str = "maker";
/// What a maker takes besides its guest's memory, and what is left to others.
const BESIDE_BYTES: u64 = 256 << 20;

/// See the module's header.
pub struct Maker {
    pub dir: PathBuf,
    pub cap_bytes: u64,
    /// How long a VM may take until it is held.
    pub held_limit: Duration,
    pub composer: Arc<Composer>,
    pub mapper: Arc<Mapper>,
    pub starter: Arc<Starter>,
    pub snapshots: Arc<Snapshots>,
    pub turn: tokio::sync::Mutex<()>,
    /// Set when none is to be made any more.
    pub closed: watch::Sender<bool>,
}

/// What a maker was saved as.
struct Saved {
    memory: File,
    state: Vec<u8>,
    map: Option<MapImage>,
    devices: Vec<(Digest, u64)>,
}

impl Maker {
    /// Ends what a maker left whose daemon died.
    pub fn clear(&self) {
        let dir = self.dir.join(NAME);
        match forelay_vm::stray::end_all(&dir) {
            Ok(ended) if !ended.is_empty() => tracing::warn!("ended a maker's VM of before"),
            Ok(_) => {}
            Err(error) => tracing::error!(%error, "a maker's VM of before lives on"),
        }
    }

    /// Makes none any more, and ends the one that is being made.
    pub async fn close(&self) {
        self.closed.send_replace(true);
        // Its task kills it; it is gone when that has given its turn back.
        let _turn = tokio::time::timeout(KILL_LIMIT, self.turn.lock()).await;
        let ended = forelay_vm::stray::end_all(&self.dir.join(NAME)).unwrap_or_default();
        let gone = join_all(ended.iter().map(Process::wait));
        if tokio::time::timeout(KILL_LIMIT, gone).await.is_err() {
            tracing::error!("a maker's VMM was killed and does not end");
        }
    }

    async fn closing(&self) {
        let mut closed = self.closed.subscribe();
        // It lives as long as this does.
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// The snapshot of this order at a tier: the one there is, or one that is made now.
    pub async fn make(&self, order: &Order, tier: Tier) -> Result<Kept, HostError> {
        check_tier(order, tier)?;
        let _turn = self.turn.lock().await;
        let kernel = self.composer.kernel(&order.lock.kernel).await?;
        let runtime = self.starter.runtime(&kernel.kernel).await?;
        let origin = origin(order, tier, &runtime);
        let shelf = self.snapshots.shelf(&order.domain).await?;
        if let Some(kept) = shelf.find(origin.key()) {
            return Ok(kept);
        }
        check_memory(order, "making this snapshot")?;
        let saved = tokio::select! {
            biased;
            () = self.closing() => Err(HostError::Busy("the daemon is stopping".to_owned())),
            saved = self.save(order, tier, kernel) => saved,
        };
        // Whatever became of it, its files are of no use.
        let cleared = self
            .vm_dir()
            .and_then(|dir| dir.remove().map_err(HostError::failed));
        let saved = saved?;
        cleared?;
        let of = SnapshotOf {
            ram_bytes: u64::from(order.memory_mib()) << 20,
            state_bytes: saved.state.len() as u64,
            map: saved.map.as_ref().map(|map| map.record.image),
            devices: saved.devices,
            origin,
        };
        let made_of = match tier {
            Tier::Kernel => &order.lock.kernel.name,
            Tier::Composed | Tier::Ready => &order.of.profile,
        };
        let (component, index, memory) =
            describe(of, made_of.clone(), saved.memory, saved.state).await?;
        let path = path_of(&memory);
        let publishing = self.snapshots.publish(&shelf, &component, &path, &index);
        let kept = publishing.await?;
        let fitting = self.snapshots.keep_within(&shelf, &kept, self.cap_bytes);
        fitting.await?;
        Ok(kept)
    }

    /// The key of this order's snapshot at a tier, if there is none.
    pub async fn lacks(&self, order: &Order, tier: Tier) -> Result<Option<Digest>, HostError> {
        let kernel = self.composer.kernel(&order.lock.kernel).await?;
        let runtime = self.starter.runtime(&kernel.kernel).await?;
        let key = origin(order, tier, &runtime).key();
        let shelf = self.snapshots.shelf(&order.domain).await?;
        Ok(shelf.find(key).is_none().then_some(key))
    }

    fn vm_dir(&self) -> Result<VmDir, HostError> {
        VmDir::of(&self.dir, NAME).map_err(HostError::invalid)
    }

    /// Runs the VM until it is held, and takes what it is then.
    async fn save(
        &self,
        order: &Order,
        tier: Tier,
        kernel: KernelFiles,
    ) -> Result<Saved, HostError> {
        std::fs::create_dir_all(&self.dir).map_err(HostError::failed)?;
        let dir = self.vm_dir()?;
        dir.make().map_err(HostError::failed)?;
        let memory = rustix::fs::memfd_create(c"forelay-maker", rustix::fs::MemfdFlags::CLOEXEC);
        let memory = File::from(memory.map_err(HostError::failed)?);
        let mut records = Vec::new();
        let map = match tier {
            Tier::Kernel => None,
            Tier::Composed | Tier::Ready => {
                let path = dir.path().join(MAP_IMAGE);
                let map = self.composer.compose(order, HOSTNAME, path).await?;
                records.push(map.record.clone());
                records.extend(self.mapper.map_images(order).await?);
                Some(map)
            }
        };
        let mut spec = spec(order, (NAME, &dir.path()), &records, map.as_ref(), kernel);
        as_maker(&mut spec, tier, path_of(&memory));
        let vmm = self.starter.start(&spec).await?;
        let held = async {
            let handle = vmm.handle();
            handle
                .wait_held(self.held_limit)
                .await
                .map_err(HostError::failed)?;
            handle.save().await.map_err(HostError::failed)
        };
        let state = held.await;
        vmm.end().await;
        Ok(Saved {
            state: state?,
            memory,
            map,
            devices: records
                .iter()
                .map(|one| (one.image, one.device_bytes))
                .collect(),
        })
    }
}

/// Refuses a tier at which this order's VMs have no snapshot.
fn check_tier(order: &Order, tier: Tier) -> Result<(), HostError> {
    let allowed = latest_tier(order).ok_or_else(|| {
        HostError::Invalid("the manifest says `at = \"off\"` in [snapshot]".to_owned())
    })?;
    if tier <= allowed {
        return Ok(());
    }
    Err(HostError::Invalid(format!(
        "this manifest's VMs have snapshots up to tier {}: see [snapshot] in it; a scratch disk \
         allows `kernel`, an init of the image `composed`",
        allowed.name()
    )))
}

/// A path by which the VMM and the store open a file without a name.
pub(super) fn path_of(file: &File) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()
}

fn as_maker(spec: &mut VmSpec, tier: Tier, memory: PathBuf) {
    spec.hold = Some(tier);
    spec.memory = GuestMemory::Shared { path: memory };
    spec.forwards.clear();
    spec.upper = Upper::Tmpfs;
    // Its memory is a file: without huge pages, so that what the guest frees leaves holes.
    spec.wrap = Some(wrapped(Hints {
        background: true,
        ..Hints::default()
    }));
}

/// Refuses what runs a VM of this order for nobody if there is no memory for it; it is called so.
pub fn check_memory(order: &Order, what: &str) -> Result<(), HostError> {
    let sample = Probe::new().sample().map_err(HostError::failed)?;
    let available = sample.mem_available_bytes;
    // Its memory, and for a while what is read of it for publication.
    let needed = (u64::from(order.memory_mib()) << 20) + BESIDE_BYTES;
    if needed <= available {
        return Ok(());
    }
    Err(HostError::Busy(format!(
        "{what} takes {} MiB of memory, and {} MiB are available: try again when VMs have ended",
        needed >> 20,
        available >> 20
    )))
}

/// The component of a snapshot, with its chunks and the file that has its bytes.
pub(super) async fn describe(
    of: SnapshotOf,
    made_of: String,
    memory: File,
    state: Vec<u8>,
) -> Result<(Component, ChunkIndex, File), HostError> {
    let describing = tokio::task::spawn_blocking(move || -> io::Result<_> {
        memory.write_all_at(&state, of.ram_bytes)?;
        memory.set_len(of.image_bytes())?;
        let read = |buffer: &mut [u8], offset| memory.read_exact_at(buffer, offset);
        let index = ChunkIndex::of_plain(of.image_bytes(), CHUNK_BYTES, read)?;
        let image = ImageRef {
            digest: index.image,
            bytes: index.image_bytes,
            metadata_bytes: 0,
            inodes: 0,
            chunk_index: index.digest(),
        };
        let name = match of.origin.vm {
            Some(_) => "snapshot-vm".to_owned(),
            None => format!("snapshot-{}", of.origin.tier.name()),
        };
        let architecture = forelay_import::host_architecture();
        let version = now_ms().to_string();
        let mut component = Component::new(&name, &version, Role::Snapshot, architecture, image);
        component.description = made_of;
        component.snapshot = Some(Box::new(of));
        Ok((component, index, memory))
    });
    let described = describing.await.map_err(HostError::failed)?;
    described.map_err(HostError::failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use forelay_vm::Forward;

    use super::*;
    use crate::daemon::order::tests::order;
    use crate::daemon::snapshot::origin::tests::of_kernel;

    #[test]
    fn what_is_no_tier_of_a_manifest_is_refused_in_its_words() {
        let refused = |further: &str, tier| {
            let checked = check_tier(&order("web", further, "base"), tier);
            checked.err().map(|error| {
                assert!(matches!(error, HostError::Invalid(_)), "{error}");
                error.to_string()
            })
        };
        let at = |tier: &str| format!("[snapshot]\nat = {tier:?}\n");
        assert_eq!(refused("", Tier::Composed), None);
        assert_eq!(refused(&at("ready"), Tier::Ready), None);
        let off = refused(&at("off"), Tier::Kernel).unwrap();
        assert!(off.contains("off"), "{off}");
        for (further, tier, allowed) in [
            (String::new(), Tier::Ready, "composed"),
            (at("kernel"), Tier::Composed, "kernel"),
            (
                format!("init = true\n{}", at("ready")),
                Tier::Ready,
                "composed",
            ),
            (
                "[vm]\nscratch = \"64M\"\n".to_owned(),
                Tier::Composed,
                "kernel",
            ),
        ] {
            let told = refused(&further, tier).unwrap();
            assert!(told.contains(&format!("up to tier {allowed}")), "{told}");
        }
    }

    #[test]
    fn a_maker_that_there_is_no_memory_for_is_refused() {
        let order = |mib: u32| order("web", &format!("[vm]\nmemory_mib = {mib}\n"), "base");
        let error = check_memory(&order(16 << 20), "this").unwrap_err();
        let told = error.to_string();
        assert!(matches!(error, HostError::Busy(_)), "{told}");
        assert!(told.starts_with("this takes 16777472 MiB"), "{told}");
    }

    #[test]
    fn a_maker_has_nothing_that_its_clones_must_not_share() {
        let order = order("web", "[vm]\nscratch = \"64M\"\n", "base");
        let kernel = KernelFiles {
            kernel: "kernel".into(),
            initrd: "initrd".into(),
        };
        let place = (NAME, std::path::Path::new("/dir"));
        let mut made = spec(&order, place, &[], None, kernel);
        assert!(matches!(made.upper, Upper::Scratch { .. }));
        made.forwards.push(Forward {
            host: 8080,
            guest: 80,
            udp: false,
        });
        as_maker(&mut made, Tier::Kernel, "memory".into());
        assert_eq!((made.hold, made.forwards.len()), (Some(Tier::Kernel), 0));
        assert!(matches!(made.upper, Upper::Tmpfs));
        assert!(matches!(made.memory, GuestMemory::Shared { path } if path == *"memory"));
    }

    #[tokio::test]
    async fn a_snapshot_is_memory_and_then_the_state_of_devices() {
        let of = SnapshotOf {
            origin: of_kernel(Digest::of(b"kernel")),
            ram_bytes: 2 << 20,
            state_bytes: 5,
            map: None,
            devices: Vec::new(),
        };
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(2 << 20).unwrap();
        memory.write_all_at(b"memory", 4096).unwrap();
        let describing = describe(of.clone(), "web".into(), memory, b"state".to_vec());
        let (component, index, file) = describing.await.unwrap();
        assert_eq!(of.check(&component.image), Ok(()));
        let mut bytes = vec![0; component.image.bytes as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(file.metadata().unwrap().len(), component.image.bytes);
        assert_eq!(&bytes[4096..4102], b"memory");
        assert_eq!(&bytes[2 << 20..][..6], b"state\0");
        let mut at = 0;
        for chunk in &index.chunks {
            let end = at + chunk.len as usize;
            assert_eq!(Digest::of(&bytes[at..end]), chunk.digest);
            at = end;
        }
        assert_eq!(at, bytes.len());
        let image = component.image;
        assert_eq!(
            (image.digest, image.chunk_index),
            (index.image, index.digest())
        );
        assert_eq!(component.description, "web");
        assert_eq!(component.snapshot.as_deref(), Some(&of));
    }
}
