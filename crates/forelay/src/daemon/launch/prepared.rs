//! Launches set up before they are asked for: when the planner says that a launch of a
//! profile is likely, its devices are mapped and its map image is composed, so that the
//! launch itself only starts the VMM.
//!
//! ```text
//!   announced (an order is known) --Prepare--> prepared --launch--> taken
//!                                                 |
//!          Release, shortage, a newer Prepare, too many ---> dropped
//! ```
//! What is prepared belongs to one lock, one manifest and one host name (the manifest's,
//! or the name that the next VM of the profile would get); a launch that differs in any of
//! them composes for itself.
//!
//! Refuses to decide which launches are likely. Invariants: a prepared map image is given
//! to at most one VM; nothing prepared outlives the daemon that prepared it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forelay_cache::plan::PreparedLaunch;
use forelay_image::Digest;
use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::daemon::error::HostError;
use crate::daemon::forecast::announced::{AnnouncedLaunches, ProfileId};
use crate::daemon::launch::compose::{Composer, MapImage};
use crate::daemon::memory::mapper::Mapper;
use crate::daemon::order::{DeviceRecord, Order};
use crate::daemon::vm::registry::VmRegistry;
use crate::recipe::KernelFiles;

/// Launches that are kept prepared at a time; about a megabyte each.
const KEEP: usize = 32;

/// All that a launch needs before its VMM can start.
#[derive(Debug)]
pub struct Preparation {
    manifest: Digest,
    lock: Digest,
    hostname: String,
    /// Devices of the components, in slot order.
    pub devices: Vec<DeviceRecord>,
    /// Kernel and initramfs.
    pub kernel: KernelFiles,
    map: MapImage,
}

impl Preparation {
    /// The map image, moved to where the VM's own files are.
    pub fn move_map(&self, to: &Path) -> std::io::Result<MapImage> {
        std::fs::rename(&self.map.record.path, to)?;
        let mut map = self.map.clone();
        to.clone_into(&mut map.record.path);
        Ok(map)
    }
}

impl Drop for Preparation {
    fn drop(&mut self) {
        // Not there any more if a VM has it.
        let _ = std::fs::remove_file(&self.map.record.path);
    }
}

/// The name that a VM of this order has inside.
pub fn hostname(order: &Order, vm_name: &str) -> String {
    let own = order.manifest.hostname.clone();
    own.unwrap_or_else(|| vm_name.to_owned())
}

/// What is known of likely launches, and what is prepared for them.
#[derive(Debug)]
pub struct Preparations {
    dir: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// With a number that grows, to tell the oldest.
    prepared: BTreeMap<ProfileId, (u64, Preparation)>,
    next: u64,
}

impl Preparations {
    /// Nothing is prepared; what an earlier daemon prepared in `dir` is removed.
    pub fn open(dir: PathBuf) -> Self {
        let clear = || -> std::io::Result<()> {
            std::fs::create_dir_all(&dir)?;
            for entry in std::fs::read_dir(&dir)? {
                let path = entry?.path();
                if path.extension().is_some_and(|ending| ending == "img") {
                    std::fs::remove_file(path)?;
                }
            }
            Ok(())
        };
        if let Err(error) = clear() {
            // Preparing may fail, launches will not.
            tracing::error!(%error, path = %dir.display(), "prepared launches of before are left");
        }
        Self {
            dir,
            state: Mutex::default(),
        }
    }

    /// What was prepared for this launch, if it is what the launch needs. Anything else
    /// prepared for its profile is dropped.
    pub fn take(&self, order: &Order, vm_name: &str) -> Option<Preparation> {
        let (_, prepared) = self.state.lock().prepared.remove(&ProfileId::of(order))?;
        let fits = prepared.lock == order.lock.digest()
            && prepared.manifest == order.manifest.digest()
            && prepared.hostname == hostname(order, vm_name);
        fits.then_some(prepared)
    }

    /// Launches that are prepared now.
    pub fn len(&self) -> usize {
        self.state.lock().prepared.len()
    }

    /// Drops what is prepared for the order's profile; a number that nothing prepared has had.
    fn replace(&self, order: &Order) -> u64 {
        let mut state = self.state.lock();
        state.prepared.remove(&ProfileId::of(order));
        state.next += 1;
        state.next
    }

    fn keep(&self, order: &Order, prepared: Preparation) {
        let mut state = self.state.lock();
        state.next += 1;
        let number = state.next;
        state
            .prepared
            .insert(ProfileId::of(order), (number, prepared));
        while state.prepared.len() > KEEP {
            let oldest = state.prepared.iter().min_by_key(|(_, (number, _))| number);
            let Some(oldest) = oldest.map(|(key, _)| key.clone()) else {
                return;
            };
            state.prepared.remove(&oldest);
        }
    }
}

/// Prepares launches that are likely.
pub struct Preparer {
    pub preparations: Arc<Preparations>,
    pub announced: Arc<AnnouncedLaunches>,
    pub mapper: Arc<Mapper>,
    pub composer: Arc<Composer>,
    pub registry: Arc<VmRegistry>,
}

impl Preparer {
    /// Carries out the planner's reservations, in order, for as long as it makes any.
    pub async fn run(self, mut launches: UnboundedReceiver<PreparedLaunch>) {
        while let Some(launch) = launches.recv().await {
            match launch {
                PreparedLaunch::Prepare(domain, profile) => {
                    let id = ProfileId { domain, profile };
                    let Some(order) = self.announced.order(&id) else {
                        continue;
                    };
                    match self.prepare(&order).await {
                        Ok(prepared) => {
                            let name = prepared.hostname.clone();
                            self.preparations.keep(&order, prepared);
                            tracing::info!(profile = order.of.profile, name, "prepared");
                        }
                        Err(error) => {
                            tracing::warn!(profile = order.of.profile, %error, "not prepared");
                        }
                    }
                }
                PreparedLaunch::Release(domain, profile) => {
                    let id = ProfileId { domain, profile };
                    self.announced.forget(&id);
                    self.preparations.state.lock().prepared.remove(&id);
                }
                // Memory is short: of all there is, this is the easiest to make again.
                PreparedLaunch::ReleaseAll => self.preparations.state.lock().prepared.clear(),
            }
        }
    }

    async fn prepare(&self, order: &Order) -> Result<Preparation, HostError> {
        let name = match &order.manifest.name {
            Some(name) => name.clone(),
            None => self.registry.free_name(&order.of.profile),
        };
        let hostname = hostname(order, &name);
        let devices = self.mapper.map_images(order).await?;
        let file = Digest::of(format!("{}/{}", order.domain, order.of.profile).as_bytes());
        // A path of its own: the one before may be taken already and not be moved yet.
        let number = self.preparations.replace(order);
        let path = self
            .preparations
            .dir
            .join(format!("{}-{number}.img", file.hex()));
        let map = self.composer.compose(order, &hostname, path).await?;
        let kernel = self.composer.kernel(&order.lock.kernel).await?;
        Ok(Preparation {
            manifest: order.manifest.digest(),
            lock: order.lock.digest(),
            hostname,
            devices,
            kernel,
            map,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::order::tests::order;

    fn preparation(dir: &Path, order: &Order, name: &str) -> Preparation {
        let path = dir.join(format!("{name}.img"));
        std::fs::write(&path, name).unwrap();
        let record = DeviceRecord {
            image: Digest::of(b"map"),
            image_bytes: 4096,
            device_bytes: 4096,
            path,
            component: String::new(),
            members: vec![],
            memory: false,
        };
        Preparation {
            manifest: order.manifest.digest(),
            lock: order.lock.digest(),
            hostname: hostname(order, name),
            devices: vec![],
            kernel: KernelFiles {
                kernel: PathBuf::new(),
                initrd: PathBuf::new(),
            },
            map: MapImage {
                record,
                uuid: Digest::of(b"map").image_uuid(),
                notes: vec![],
            },
        }
    }

    #[test]
    fn only_the_very_launch_that_was_prepared_gets_it_and_only_once() {
        let dir = tempfile::tempdir().unwrap();
        let preparations = Preparations::open(dir.path().join("premapped"));
        let web = order("web", "", "base");
        let keep = |name| preparations.keep(&web, preparation(dir.path(), &web, name));
        keep("web");
        let taken = preparations.take(&web, "web").unwrap();
        let there = dir.path().join("there");
        assert_eq!(taken.move_map(&there).unwrap().record.path, there);
        drop(taken);
        assert_eq!(std::fs::read(&there).unwrap(), b"web", "the VM has it now");
        assert!(preparations.take(&web, "web").is_none());

        // Another name, another lock, other files of the VM's own: all compose again.
        keep("web");
        assert!(preparations.take(&web, "web-2").is_none());
        assert!(!dir.path().join("web.img").exists(), "what is stale goes");
        keep("web");
        assert!(
            preparations
                .take(&order("web", "", "newer base"), "web")
                .is_none()
        );
        keep("web");
        let key = "ssh_keys = [\"ssh-ed25519 AAAA\"]";
        assert!(
            preparations
                .take(&order("web", key, "base"), "web")
                .is_none()
        );
        assert_eq!(preparations.len(), 0);
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many_and_all_go_with_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("premapped");
        let preparations = Preparations::open(own.clone());
        for number in 0..=KEEP {
            let order = order(&format!("p{number}"), "", "base");
            preparations.keep(&order, preparation(&own, &order, &format!("p{number}")));
        }
        assert_eq!(preparations.len(), KEEP);
        assert!(!own.join("p0.img").exists() && own.join("p1.img").exists());
        std::mem::forget(preparations);
        Preparations::open(own.clone());
        assert_eq!(std::fs::read_dir(own).unwrap().count(), 0);
    }
}
