//! Images in huge pages: a tmpfs that hands out 2 MiB pages, for components that are
//! wholly resident and hot.
//!
//! A file here has no daemon in its fault path and maps with large page-table entries
//! (a VMM has to align its mapping to 2 MiB: QEMU's `align=2M`). The price: all of it is
//! in memory, it is a second copy beside the page cache's, and it cannot be evicted while
//! a VM maps it. So it serves VMs launched from then on, or none.
//!
//! Layout of the pool's directory (mode 0700): `pool/` the tmpfs, `images/` the same
//! mounted read-only, where VMs find `<digest>.img`. Both outlive the daemon; the next
//! one finds them. Invariants: a file appears under its name only when complete, and
//! never changes afterwards. Pages are charged to the cgroup of whoever promotes.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

use crate::files::{FileKey, FileSpec, file_name, key_of};

/// How much is asked of the filler at a time: one huge page.
const PIECE_BYTES: usize = 2 << 20;
const SOURCE: &str = "forelay-huge";

/// Why the pool or a file in it could not be made.
#[derive(Debug, thiserror::Error)]
pub enum HugeError {
    /// The kernel has no huge pages for tmpfs, or mounting failed otherwise.
    #[error("no huge-page pool on {dir}")]
    Mount {
        /// The pool's directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Reading the image or writing the copy failed.
    #[error("cannot copy {key} into huge pages")]
    Promote {
        /// The image.
        key: FileKey,
        /// Why.
        source: io::Error,
    },
    /// A file could not be taken away.
    #[error("cannot take {key} out of huge pages")]
    Demote {
        /// The image.
        key: FileKey,
        /// Why.
        source: io::Error,
    },
}

/// The pool.
#[derive(Debug)]
pub struct Pool {
    dir: PathBuf,
}

impl Pool {
    /// Opens the pool in `dir`, mounting it unless an earlier daemon did.
    pub fn open(dir: &Path, capacity_bytes: u64) -> Result<Self, HugeError> {
        let pool = Self {
            dir: dir.to_owned(),
        };
        pool.mount(capacity_bytes)
            .map_err(|source| HugeError::Mount {
                dir: dir.to_owned(),
                source,
            })?;
        Ok(pool)
    }

    fn mount(&self, capacity_bytes: u64) -> io::Result<()> {
        let (pool, images) = (self.pool(), self.images());
        std::fs::create_dir_all(&pool)?;
        std::fs::create_dir_all(&images)?;
        std::fs::set_permissions(&self.dir, Permissions::from_mode(0o711))?;
        std::fs::set_permissions(&pool, Permissions::from_mode(0o700))?;
        let own = std::fs::metadata(&self.dir)?.dev();
        if std::fs::metadata(&pool)?.dev() == own {
            let options = format!("huge=always,mode=0750,size={capacity_bytes}");
            let options = std::ffi::CString::new(options)?;
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            rustix::mount::mount(SOURCE, &pool, "tmpfs", flags, options.as_c_str())?;
        }
        if std::fs::metadata(&images)?.dev() == own {
            rustix::mount::mount_bind(&pool, &images)?;
            let flags = MountFlags::BIND
                | MountFlags::RDONLY
                | MountFlags::NOSUID
                | MountFlags::NODEV
                | MountFlags::NOEXEC;
            rustix::mount::mount_remount(&images, flags, c"")?;
        }
        // What a daemon died over is no image.
        for entry in std::fs::read_dir(&pool)? {
            let entry = entry?;
            if entry.path().extension().is_some_and(|name| name == "part") {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    fn pool(&self) -> PathBuf {
        self.dir.join("pool")
    }

    fn images(&self) -> PathBuf {
        self.dir.join("images")
    }

    /// Where VMs find the image, if it is here.
    pub fn path(&self, key: &FileKey) -> Option<PathBuf> {
        let path = self.images().join(file_name(key));
        path.exists().then_some(path)
    }

    /// Copies an image into huge pages, unless it is here already. `fill` is called with
    /// an offset and the bytes to fill, in order, up to the image's end.
    pub fn promote(
        &self,
        key: &FileKey,
        spec: FileSpec,
        mut fill: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> Result<PathBuf, HugeError> {
        if let Some(path) = self.path(key) {
            return Ok(path);
        }
        let part = self.pool().join(format!("{}.part", key.hex()));
        let copied = copy(&part, spec, &mut fill)
            .and_then(|()| std::fs::rename(&part, self.pool().join(file_name(key))));
        copied.map_err(|source| {
            // The copy's failure is what counts.
            let _ = std::fs::remove_file(&part);
            HugeError::Promote { key: *key, source }
        })?;
        Ok(self.images().join(file_name(key)))
    }

    /// Takes an image away. Its memory is free once nobody maps it. Returns the bytes it
    /// held, 0 if it was not here.
    pub fn demote(&self, key: &FileKey) -> Result<u64, HugeError> {
        let path = self.pool().join(file_name(key));
        let fail = |source| HugeError::Demote { key: *key, source };
        let meta = match std::fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            other => other.map_err(fail)?,
        };
        std::fs::remove_file(&path).map_err(fail)?;
        Ok(meta.blocks() * 512)
    }

    /// The images here and the bytes each holds.
    pub fn files(&self) -> io::Result<Vec<(FileKey, u64)>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(self.pool())? {
            let entry = entry?;
            let name = entry.file_name();
            if let Some(key) = key_of(name.as_encoded_bytes()) {
                files.push((key, entry.metadata()?.blocks() * 512));
            }
        }
        files.sort_unstable();
        Ok(files)
    }

    /// Unmounts lazily: mappings that exist stay good.
    pub fn close(self) -> io::Result<()> {
        rustix::mount::unmount(self.images(), UnmountFlags::DETACH)?;
        rustix::mount::unmount(self.pool(), UnmountFlags::DETACH)?;
        Ok(())
    }
}

fn copy(
    part: &Path,
    spec: FileSpec,
    fill: &mut dyn FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .open(part)?;
    file.set_permissions(Permissions::from_mode(0o440))?;
    file.set_len(spec.device_bytes)?;
    let mut piece = vec![0; PIECE_BYTES];
    let mut offset = 0;
    while offset < spec.image_bytes {
        let len = (spec.image_bytes - offset).min(PIECE_BYTES as u64) as usize;
        // Whole huge pages are written, so that the tail gets one, too.
        piece[len..].fill(0);
        fill(offset, &mut piece[..len])?;
        file.write_all_at(&piece, offset)?;
        offset += PIECE_BYTES as u64;
    }
    Ok(())
}
