//! The directory of one VM: made for it alone, emptied and removed by name.
//!
//! Refuses to know what the files are for. Invariants: the directory is one checked
//! component below the VMs' directory, never reached through a link; nothing is removed
//! but files that a VM's directory can have, and only if there is nothing else in it.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use forelay_image::{NameError, NameOf};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Map image of the VM.
pub const MAP_IMAGE: &str = "map.img";
/// Scratch disk of the VM.
pub const SCRATCH: &str = "scratch.img";
/// The scratch disk while it is made.
const UNFINISHED_SCRATCH: &str = "scratch.formatting";
/// What a later daemon needs to know of the VM.
pub const RECORD: &str = "instance.json";
/// The record while it is written.
pub const UNFINISHED_RECORD: &str = "instance.json.new";

/// Where one VM keeps its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDir {
    parent: PathBuf,
    name: String,
}

/// Why a VM's directory could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum VmDirError {
    /// There is something else in its place.
    #[error(
        "{} is not what a VM left behind ({found} is in it): move it away, or give the VM \
         another name with --name", path.display()
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// What no VM has.
        found: String,
    },
    /// A VMM runs there.
    #[error(
        "a VMM that this daemon does not know runs in {} (process {pid}): end it, or give the VM \
         another name with --name", path.display()
    )]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The VMM.
        pid: u32,
    },
    /// The system refused.
    #[error("cannot {doing} the VM's directory {}", path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
}

impl VmDir {
    /// The directory of the VM `name` below `vms_dir`.
    pub fn of(vms_dir: &Path, name: &str) -> Result<Self, NameError> {
        NameOf::Vm.check(name)?;
        Ok(Self {
            parent: vms_dir.to_owned(),
            name: name.to_owned(),
        })
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        self.parent.join(&self.name)
    }

    /// Makes it, empty and closed to others; what an ended VM left there goes.
    pub fn make(&self) -> Result<(), VmDirError> {
        let path = self.path();
        if path.exists()
            && let Some(vmm) = forelay_vm::stray::find(&path).first()
        {
            let pid = vmm.pid;
            return Err(VmDirError::InUse { path, pid });
        }
        self.remove()?;
        let parent = self.open_parent()?;
        let made = rustix::fs::mkdirat(&parent, &self.name, Mode::RWXU);
        made.map_err(|error| self.failed("make", error))
    }

    /// Removes it with what a VM leaves. One that is not there counts as removed.
    pub fn remove(&self) -> Result<(), VmDirError> {
        let parent = match self.open_parent() {
            Err(VmDirError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Ok(());
            }
            other => other?,
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let beneath =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let dir = match rustix::fs::openat2(&parent, &self.name, flags, Mode::empty(), beneath) {
            Err(Errno::NOENT) => return Ok(()),
            other => other.map_err(|error| self.failed("open", error))?,
        };
        // All of it is looked at before any of it goes.
        let files = self.own_files(&dir)?;
        for file in files {
            let removed = rustix::fs::unlinkat(&dir, file, AtFlags::empty());
            removed.map_err(|error| self.failed("empty", error))?;
        }
        let removed = rustix::fs::unlinkat(&parent, &self.name, AtFlags::REMOVEDIR);
        removed.map_err(|error| self.failed("remove", error))
    }

    /// Removes what an ended VM has no use for; its logs stay.
    pub fn clear(&self) {
        for file in [MAP_IMAGE, SCRATCH, RECORD] {
            // Most ended VMs lack one or the other.
            let _ = std::fs::remove_file(self.path().join(file));
        }
    }

    /// Names of the files in it, if a VM's directory can have all of them.
    fn own_files(&self, dir: &OwnedFd) -> Result<Vec<&'static str>, VmDirError> {
        let failed = |error| self.failed("list", error);
        let known = [
            MAP_IMAGE,
            SCRATCH,
            UNFINISHED_SCRATCH,
            RECORD,
            UNFINISHED_RECORD,
        ];
        let known = known.iter().chain(&forelay_vm::RUNTIME_FILES);
        let known: Vec<&'static str> = known.copied().collect();
        let mut own = Vec::new();
        for entry in Dir::read_from(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name: &CStr = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let ours = known.iter().find(|one| one.as_bytes() == name.to_bytes());
            match ours {
                Some(ours) if entry.file_type() != FileType::Directory => own.push(*ours),
                _ => {
                    return Err(VmDirError::Foreign {
                        path: self.path(),
                        found: format!("{name:?}"),
                    });
                }
            }
        }
        Ok(own)
    }

    fn open_parent(&self) -> Result<OwnedFd, VmDirError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&self.parent, flags, Mode::empty());
        opened.map_err(|error| self.failed("reach", error))
    }

    fn failed(&self, doing: &'static str, error: Errno) -> VmDirError {
        VmDirError::Io {
            doing,
            path: self.path(),
            source: error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn vms() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let vms = root.path().join("vms");
        std::fs::create_dir(&vms).unwrap();
        (root, vms)
    }

    #[test]
    fn what_an_ended_vm_left_goes_and_the_directory_is_closed_to_others() {
        let (_root, vms) = vms();
        let dir = VmDir::of(&vms, "web").unwrap();
        dir.make().unwrap();
        let mode = std::fs::metadata(dir.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        for name in [
            MAP_IMAGE,
            RECORD,
            "console.log",
            "vm-state.json",
            "qemu.log",
        ] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        dir.make().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        dir.remove().unwrap();
        assert!(!dir.path().exists());
        dir.remove().unwrap();
    }

    #[test]
    fn a_directory_in_which_a_vmm_runs_is_not_made_again() {
        let (_root, vms) = vms();
        let dir = VmDir::of(&vms, "web").unwrap();
        dir.make().unwrap();
        std::fs::write(dir.path().join("console.log"), "kept").unwrap();
        let mut vmm = std::process::Command::new("sleep")
            .arg("600")
            .env(forelay_vm::stray::RUNTIME_DIR_VARIABLE, dir.path())
            .spawn()
            .unwrap();
        // The kernel shows the mark once the program is executed.
        while forelay_vm::stray::find(&dir.path()).is_empty() {
            std::thread::yield_now();
        }
        let refused = dir.make().unwrap_err();
        let pid = vmm.id().to_string();
        assert!(matches!(refused, VmDirError::InUse { .. }) && refused.to_string().contains(&pid));
        assert!(dir.path().join("console.log").exists());
        vmm.kill().unwrap();
        vmm.wait().unwrap();
        dir.make().unwrap();
    }

    #[test]
    fn what_is_not_a_vms_stays_whole() {
        let (_root, vms) = vms();
        let dir = VmDir::of(&vms, "web").unwrap();
        std::fs::create_dir_all(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("console.log"), "kept").unwrap();
        std::fs::write(dir.path().join("sub/file"), "kept").unwrap();
        for refused in [dir.make().unwrap_err(), dir.remove().unwrap_err()] {
            assert!(matches!(refused, VmDirError::Foreign { .. }), "{refused}");
            assert!(refused.to_string().contains("sub"), "{refused}");
        }
        assert_eq!(
            std::fs::read(dir.path().join("console.log")).unwrap(),
            b"kept"
        );
        assert_eq!(std::fs::read(dir.path().join("sub/file")).unwrap(), b"kept");
        // A directory that only has a name of ours is no file of ours.
        std::fs::remove_dir_all(dir.path().join("sub")).unwrap();
        std::fs::create_dir(dir.path().join(MAP_IMAGE)).unwrap();
        assert!(dir.remove().is_err() && dir.path().join(MAP_IMAGE).exists());
    }

    #[test]
    fn no_link_is_followed_out_of_the_vms_directory() {
        let (root, vms) = vms();
        let victim = root.path().join("victim");
        std::fs::create_dir(&victim).unwrap();
        std::fs::write(victim.join("console.log"), "kept").unwrap();
        std::os::unix::fs::symlink(&victim, vms.join("web")).unwrap();
        let dir = VmDir::of(&vms, "web").unwrap();
        assert!(dir.make().is_err() && dir.remove().is_err());
        assert_eq!(std::fs::read(victim.join("console.log")).unwrap(), b"kept");
        for bad in ["..", ".", "", "../victim", victim.to_str().unwrap()] {
            assert!(VmDir::of(&vms, bad).is_err(), "{bad:?}");
        }
    }
}
