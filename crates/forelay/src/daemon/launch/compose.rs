//! Composing: the map image of one VM as a file, and the kernel that it boots with.
//!
//! Refuses to know shared memory and VMMs. Invariant: a map image file is whole when it is
//! handed out; no two VMs get the same file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forelay_image::erofs::merge::{Composed, MapLayout};
use forelay_image::extent::PMEM_ALIGN_BYTES;
use forelay_image::lock::{Lock, LockedComponent};
use forelay_image::{Digest, ImageUuid};
use forelay_store::Store;
use parking_lot::Mutex;
use tokio::task::JoinHandle;

use crate::daemon::error::HostError;
use crate::daemon::order::{DeviceRecord, Order};
use crate::recipe::{KernelFiles, Recipe, kernel_files};

/// Recipes of recent locks that are kept, and most bytes of their metadata.
const KEEP_RECIPES: usize = 64;
const KEEP_RECIPES_BYTES: u64 = 1 << 30;

/// Composes map images.
pub struct Composer {
    store: Store,
    /// Where kernels are extracted to, each in a directory of its own.
    kernels_dir: PathBuf,
    recipes: Mutex<HashMap<Digest, Arc<Recipe>>>,
}

/// A composed map image as a file.
#[derive(Clone, Debug)]
pub struct MapImage {
    /// The device that it becomes.
    pub record: DeviceRecord,
    /// UUID of its superblock.
    pub uuid: ImageUuid,
    /// What the VM does not have as its components have it.
    pub notes: Vec<String>,
}

impl Composer {
    /// Composes from what `store` has; kernels go below `kernels_dir`.
    pub fn new(store: Store, kernels_dir: PathBuf) -> Self {
        Self {
            store,
            kernels_dir,
            recipes: Mutex::default(),
        }
    }

    /// Begins to read what composing the order's map image and starting its kernel take.
    pub fn read_ahead(self: Arc<Self>, order: &Order) -> JoinHandle<()> {
        let (lock, full_system) = (order.lock.clone(), order.manifest.init.is_some());
        tokio::spawn(async move {
            let recipe = self.recipe(&lock, full_system);
            let _ = tokio::join!(recipe, self.kernel(&lock.kernel));
        })
    }

    async fn recipe(&self, lock: &Lock, full_system: bool) -> Result<Arc<Recipe>, HostError> {
        let digest = lock.digest();
        if let Some(recipe) = self.recipes.lock().get(&digest) {
            return Ok(Arc::clone(recipe));
        }
        let recipe = Recipe::load(&self.store, lock, full_system)
            .await
            .map_err(HostError::failed)?;
        let recipe = Arc::new(recipe);
        let mut recipes = self.recipes.lock();
        let kept_bytes: u64 = recipes.values().map(|one| one.metadata_bytes()).sum();
        if recipes.len() >= KEEP_RECIPES
            || kept_bytes + recipe.metadata_bytes() > KEEP_RECIPES_BYTES
        {
            recipes.clear();
        }
        recipes.insert(digest, Arc::clone(&recipe));
        Ok(recipe)
    }

    /// Composes the map image of a VM that calls itself `hostname` into a file.
    pub async fn compose(
        &self,
        order: &Order,
        hostname: &str,
        path: PathBuf,
    ) -> Result<MapImage, HostError> {
        let recipe = self
            .recipe(&order.lock, order.manifest.init.is_some())
            .await?;
        let (manifest, bundle) = (order.manifest.clone(), order.bundle.clone());
        let hostname = hostname.to_owned();
        // Opened before the task, which outlives a launch that is cancelled: it must not
        // write into the file that the next launch of this name has at this path.
        let file = std::fs::File::create(&path).map_err(|error| unwritten(&path, &error))?;
        let composed = tokio::task::spawn_blocking(move || {
            let composed =
                recipe.compose(&manifest, &hostname, MapLayout::Devices, bundle.as_ref());
            let composed = composed.map_err(HostError::failed)?;
            let notes = recipe.notes(&composed);
            write_map_image(&composed, notes, file, &path)
        });
        composed.await.map_err(HostError::failed)?
    }

    /// Kernel and initramfs of a kernel component as host files. Kept by its id, which pins the
    /// bytes: an image's digest alone is what its publisher claims.
    pub async fn kernel(&self, kernel: &LockedComponent) -> Result<KernelFiles, HostError> {
        let dir = self.kernels_dir.join(kernel.id.hex());
        let files = kernel_files(&self.store, kernel, &dir).await;
        files.map_err(HostError::failed)
    }
}

fn unwritten(path: &Path, error: &std::io::Error) -> HostError {
    HostError::Failed(format!(
        "cannot write the map image {}: {error}",
        path.display()
    ))
}

/// Writes a map image into `file`, which was made at `path`.
fn write_map_image(
    composed: &Composed,
    notes: Vec<String>,
    mut file: std::fs::File,
    path: &Path,
) -> Result<MapImage, HostError> {
    let mut write = || -> std::io::Result<u64> {
        use std::io::Write as _;
        file.write_all(&composed.map_image)?;
        let device_bytes = (composed.map_image.len() as u64).next_multiple_of(PMEM_ALIGN_BYTES);
        file.set_len(device_bytes)?;
        Ok(device_bytes)
    };
    let device_bytes = write().map_err(|error| unwritten(path, &error))?;
    let record = DeviceRecord {
        image: composed.digest,
        image_bytes: composed.map_image.len() as u64,
        device_bytes,
        path: path.to_path_buf(),
        component: "map image".to_owned(),
        members: Vec::new(),
        memory: false,
        holds: Vec::new(),
    };
    Ok(MapImage {
        record,
        uuid: composed.digest.image_uuid(),
        notes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_composition_that_outlives_its_launch_writes_into_no_other_launchs_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("map.img");
        let file = std::fs::File::create(&path).unwrap();
        // Its launch is cancelled, and the next one of this name has its own file there.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "the next launch's").unwrap();
        let composed = Composed {
            map_image: vec![7; 4096],
            metadata_bytes: 4096,
            digest: Digest::of(b"composed"),
            devices: Vec::new(),
            inodes: 0,
            conflicts: Vec::new(),
        };
        let written = write_map_image(&composed, Vec::new(), file, &path).unwrap();
        assert_eq!(written.record.device_bytes, PMEM_ALIGN_BYTES);
        assert_eq!(std::fs::read(&path).unwrap(), b"the next launch's");
    }
}
