//! Mounting and unmounting by syscall, stale mounts, readahead of the mount.
//!
//! A session is mounted twice. The mount that everybody sees is read-only; beside it, behind a
//! directory that only its owner may enter, the same files can be *opened* for writing
//! ([`writable_path`]): VMMs that map a file privately insist on that (QEMU before 8.2). The
//! session refuses each request that would change something.
//!
//! A matter for those who confine VMMs: by a *shared* writable mapping of a file that is open
//! there a process changes what all who map it see, until those pages are dropped: the kernel
//! asks no file system before such a page is dirty. (write(2) is refused before it has changed
//! anything; a test shows both.) So the second mount is for VMMs of its trust domain alone.
//!
//! Invariant: a mount made here is without setuid and devices, and carries the source name
//! [`SOURCE`], so that nobody else's mount is ever taken for ours.

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

/// How `/proc/self/mountinfo` names our mounts.
pub const SOURCE: &str = "forelay";
/// Directory beside the mountpoints, behind which files can be opened for writing; a trust
/// domain's name does not begin with a dot.
const WRITABLE: &str = ".writable";

/// Why a session could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// No `/dev/fuse`, or no right to it.
    #[error("cannot open /dev/fuse: load the fuse module and run as root")]
    Device(#[source] io::Error),
    /// The mountpoint cannot be made or read.
    #[error("cannot use {0} as mountpoint")]
    Mountpoint(PathBuf, #[source] io::Error),
    /// Somebody serves this mountpoint already.
    #[error("{0} is served already: another daemon is running")]
    Busy(PathBuf),
    /// The kernel refused.
    #[error("mount on {0} failed")]
    Mount(PathBuf, #[source] io::Error),
}

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    /// `major:minor` of the mount's device.
    pub device: String,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// File system type.
    pub fs_type: String,
    /// What was mounted.
    pub source: String,
    /// Whether files can be opened for writing there.
    pub writable: bool,
}

/// Opens `/dev/fuse` and mounts it; the session still has to answer INIT.
pub fn mount(mountpoint: &Path) -> Result<OwnedFd, MountError> {
    make_mountpoint(mountpoint)
        .map_err(|error| MountError::Mountpoint(mountpoint.to_owned(), error))?;
    clear_stale(mountpoint)?;
    let fd = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(MountError::Device)?;
    attach(&fd, mountpoint)
        .map_err(|error| MountError::Mount(mountpoint.to_owned(), error.into()))?;
    Ok(fd.into())
}

/// Mounts the session of `fuse` twice; without the second mount it serves all but VMMs that want
/// to open for writing.
fn attach(fuse: &std::fs::File, mountpoint: &Path) -> rustix::io::Result<()> {
    use rustix::mount as kernel;
    let context = kernel::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let settings = [
        ("source", SOURCE.to_owned()),
        ("subtype", SOURCE.to_owned()),
        ("fd", fuse.as_raw_fd().to_string()),
        ("rootmode", "40000".to_owned()),
        ("user_id", rustix::process::geteuid().as_raw().to_string()),
        ("group_id", rustix::process::getegid().as_raw().to_string()),
    ];
    for (key, value) in settings {
        kernel::fsconfig_set_string(&context, key, value)?;
    }
    for flag in ["allow_other", "default_permissions"] {
        kernel::fsconfig_set_flag(&context, flag)?;
    }
    kernel::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    let mount = kernel::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_to(&mount, mountpoint)?;
    if let Err(error) = attach_writable(&mount, mountpoint) {
        tracing::warn!(%error, mountpoint = %mountpoint.display(), "no VM can resume from a snapshot here");
    }
    Ok(())
}

fn move_to(mount: &OwnedFd, path: &Path) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", rustix::fs::CWD, path, flags)
}

/// Shows a mount a second time, where its files can be opened for writing.
fn attach_writable(mount: &OwnedFd, mountpoint: &Path) -> io::Result<()> {
    let path = writable_mountpoint(mountpoint).ok_or(io::ErrorKind::InvalidInput)?;
    if let Some(parent) = path.parent() {
        match DirBuilder::new().mode(0o700).create(parent) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                std::fs::set_permissions(parent, Permissions::from_mode(0o700))?;
            }
            other => other?,
        }
    }
    make_mountpoint(&path)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let second = rustix::mount::open_tree(mount, "", flags)?;
    clear_read_only(&second)?;
    Ok(move_to(&second, &path)?)
}

/// `struct mount_attr` of `linux/mount.h`.
#[repr(C)]
pub(crate) struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

impl MountAttributes {
    /// To set these.
    pub fn set(flags: MountAttrFlags) -> Self {
        Self {
            set: u64::from(flags.bits()),
            clear: 0,
            propagation: 0,
            userns_fd: 0,
        }
    }
}

/// Lets files of one mount be opened for writing; others of its file system stay as they are.
fn clear_read_only(mount: &OwnedFd) -> io::Result<()> {
    let change = MountAttributes {
        clear: u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()),
        ..MountAttributes::set(MountAttrFlags::empty())
    };
    set_mount_attributes(mount, change, false)
}

/// Changes one mount, or with all that are below it.
pub(crate) fn set_mount_attributes(
    mount: &OwnedFd,
    change: MountAttributes,
    recursive: bool,
) -> io::Result<()> {
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is an empty C string and `change` is of the size that is passed; the
    // kernel reads both and keeps neither.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(&change),
            size_of::<MountAttributes>(),
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn writable_mountpoint(mountpoint: &Path) -> Option<PathBuf> {
    let (parent, name) = (mountpoint.parent()?, mountpoint.file_name()?);
    Some(parent.join(WRITABLE).join(name))
}

/// Where the files of the mount on `mountpoint` can be opened for writing, if they can: not in
/// one that an earlier version made.
pub fn writable_path(mountpoint: &Path) -> io::Result<Option<PathBuf>> {
    let Some(path) = writable_mountpoint(mountpoint).filter(|path| {
        // Its own directory, not what is mounted there: that may have nobody who answers.
        path.parent().is_some_and(Path::is_dir)
    }) else {
        return Ok(None);
    };
    let (public, second) = (find(mountpoint)?, find(&path)?);
    let same = |second: &MountInfo| public.is_some_and(|one| one.device == second.device);
    Ok(second.filter(same).filter(|one| one.writable).map(|_| path))
}

/// Makes the directory. What is there already is not looked at: a mount that nobody serves
/// at the moment would never answer, and a dead one not even say that it is a directory.
fn make_mountpoint(mountpoint: &Path) -> io::Result<()> {
    if let Some(parent) = mountpoint.parent() {
        std::fs::create_dir_all(parent)?;
    }
    match rustix::fs::mkdir(mountpoint, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Takes both mounts out of the tree; open files and mappings keep them alive until closed.
pub fn unmount_lazily(mountpoint: &Path) -> io::Result<()> {
    if let Some(second) = writable_mountpoint(mountpoint) {
        detach(&second)?;
    }
    detach(mountpoint)
}

fn detach(mountpoint: &Path) -> io::Result<()> {
    match rustix::mount::unmount(mountpoint, UnmountFlags::DETACH) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes mounts of ours on `mountpoint` that nobody serves any more, and their second ones.
pub fn clear_stale(mountpoint: &Path) -> Result<(), MountError> {
    if let Some(second) = writable_mountpoint(mountpoint)
        && second.parent().is_some_and(Path::is_dir)
    {
        clear_stale_at(&second)?;
    }
    clear_stale_at(mountpoint)
}

fn clear_stale_at(mountpoint: &Path) -> Result<(), MountError> {
    let fail = |error| MountError::Mountpoint(mountpoint.to_owned(), error);
    for _ in 0..64 {
        if find(mountpoint).map_err(fail)?.is_none() {
            return Ok(());
        }
        if is_served(mountpoint) {
            return Err(MountError::Busy(mountpoint.to_owned()));
        }
        tracing::warn!(mountpoint = %mountpoint.display(), "removing a stale mount");
        detach(mountpoint).map_err(fail)?;
    }
    Err(MountError::Busy(mountpoint.to_owned()))
}

/// Our mount on `mountpoint`, the topmost if there are several.
pub fn find(mountpoint: &Path) -> io::Result<Option<MountInfo>> {
    // The parent is resolved, the mountpoint itself not: asking a dead mount fails.
    let resolved = match (mountpoint.parent(), mountpoint.file_name()) {
        (Some(parent), Some(name)) if !parent.as_os_str().is_empty() => {
            parent.canonicalize()?.join(name)
        }
        _ => mountpoint.to_owned(),
    };
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(text
        .lines()
        .filter_map(parse_mountinfo)
        .rfind(|info| info.source == SOURCE && info.mountpoint == resolved))
}

fn parse_mountinfo(line: &str) -> Option<MountInfo> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ').skip(2);
    let device = left.next()?.to_owned();
    let mountpoint = unescape(left.nth(1)?);
    let mut right_fields = right.split(' ');
    let (fs_type, source) = (right_fields.next()?, right_fields.next()?);
    // Of this mount, and of its file system.
    let mut options = [left.next()?, right_fields.next()?].into_iter();
    Some(MountInfo {
        device,
        mountpoint,
        fs_type: fs_type.to_owned(),
        source: source.to_owned(),
        writable: options.all(|options| options.split(',').any(|option| option == "rw")),
    })
}

/// Undoes the octal escapes of mountinfo (space, tab, newline, backslash).
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    let mut bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    while let Some((&first, rest)) = bytes.split_first() {
        let octal = |digits: &[u8]| {
            let text = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(text, 8).ok()
        };
        match rest.get(..3).and_then(octal) {
            Some(value) if first == b'\\' => {
                out.push(value);
                bytes = &rest[3..];
            }
            _ => {
                out.push(first);
                bytes = rest;
            }
        }
    }
    std::ffi::OsString::from_vec(out).into()
}

/// Asks the mount something that only its daemon can answer. A mount that hangs counts
/// as served: a holder may be waiting for its next daemon.
fn is_served(mountpoint: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxFlags};
    let (sender, receiver) = mpsc::channel();
    let mountpoint = mountpoint.to_owned();
    std::thread::spawn(move || {
        let flags = AtFlags::STATX_FORCE_SYNC;
        let answer = rustix::fs::statx(CWD, &mountpoint, flags, StatxFlags::SIZE);
        // The asker may have stopped waiting.
        let _ = sender.send(!matches!(answer, Err(Errno::NOTCONN | Errno::CONNABORTED)));
    });
    receiver
        .recv_timeout(Duration::from_secs(2))
        .unwrap_or(true)
}

/// Sets how far the kernel reads around a fault on `mountpoint`; holds for files opened
/// afterwards.
pub fn set_readahead(mountpoint: &Path, readahead_kib: u32) -> io::Result<()> {
    let info = find(mountpoint)?.ok_or(io::ErrorKind::NotFound)?;
    std::fs::write(
        format!("/sys/class/bdi/{}/read_ahead_kb", info.device),
        readahead_kib.to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_understood() {
        let line = "41 29 0:38 / /run/for\\040elay rw,relatime shared:7 - fuse.forelay forelay ro";
        let info = parse_mountinfo(line).unwrap();
        assert_eq!(info.device, "0:38");
        assert_eq!(info.mountpoint, Path::new("/run/for elay"));
        assert_eq!(info.source, "forelay");
        assert!(!info.writable, "its file system is not");
        let both = line.replace("forelay ro", "forelay rw,user_id=0");
        assert!(parse_mountinfo(&both).unwrap().writable);
        assert_eq!(parse_mountinfo("nonsense - x"), None);
    }
}
