//! Mounting and unmounting by syscall, stale mounts, readahead of the mount.
//!
//! Invariant: a mount made here is read-only, without setuid and devices, and carries
//! the source name [`SOURCE`], so that nobody else's mount is ever taken for ours.

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

/// How `/proc/self/mountinfo` names our mounts.
pub const SOURCE: &str = "forelay";

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
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},allow_other,default_permissions",
        fd.as_raw_fd(),
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let data = CString::new(data).unwrap_or_default();
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount(SOURCE, mountpoint, "fuse.forelay", flags, data.as_c_str())
        .map_err(|error| MountError::Mount(mountpoint.to_owned(), error.into()))?;
    Ok(fd.into())
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

/// Takes the mount out of the tree; open files and mappings keep it alive until closed.
pub fn unmount_lazily(mountpoint: &Path) -> io::Result<()> {
    match rustix::mount::unmount(mountpoint, UnmountFlags::DETACH) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes mounts of ours on `mountpoint` that nobody serves any more.
pub fn clear_stale(mountpoint: &Path) -> Result<(), MountError> {
    let fail = |error| MountError::Mountpoint(mountpoint.to_owned(), error);
    for _ in 0..64 {
        if find(mountpoint).map_err(fail)?.is_none() {
            return Ok(());
        }
        if is_served(mountpoint) {
            return Err(MountError::Busy(mountpoint.to_owned()));
        }
        tracing::warn!(mountpoint = %mountpoint.display(), "removing a stale mount");
        unmount_lazily(mountpoint).map_err(fail)?;
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
    let mut right = right.split(' ');
    Some(MountInfo {
        device,
        mountpoint,
        fs_type: right.next()?.to_owned(),
        source: right.next()?.to_owned(),
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
        assert_eq!(parse_mountinfo("nonsense - x"), None);
    }
}
