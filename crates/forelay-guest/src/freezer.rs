//! The control group of what the image runs: frozen while the VM is held, so that a clone is a
//! machine of its own before any of it runs on.
//!
//! A VM that is to be held when it is ready has it from the start; one that is held while it
//! runs puts its processes there first.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use crate::boot::context;
use crate::devices;

const ROOT: &str = "/sys/fs/cgroup";
const IMAGE: &str = "/sys/fs/cgroup/image";
/// How long processes may take to stand still: one waits for a disk at the longest.
const FREEZE: Duration = Duration::from_secs(10);

/// What the groups that stand still are let go by.
static FROZEN: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// What processes write themselves into.
static PROCESSES: OnceLock<File> = OnceLock::new();

/// Has the image's processes started in a group of their own from now on.
pub fn separate() -> io::Result<()> {
    fs::create_dir_all(IMAGE).map_err(context(IMAGE))?;
    let path = Path::new(IMAGE).join("cgroup.procs");
    let processes = File::options().write(true).open(path)?;
    let _ = PROCESSES.set(processes);
    Ok(())
}

/// Where a process of the image is to write its number, if it has a group.
pub fn processes() -> Option<RawFd> {
    Some(PROCESSES.get()?.as_raw_fd())
}

/// How often processes are looked for that were started meanwhile.
const MOST_PASSES: u32 = 1000;

/// Puts all processes that are in no group into the image's, the agent aside.
pub fn gather() -> io::Result<()> {
    fs::create_dir_all(IMAGE).map_err(context(IMAGE))?;
    let group = Path::new(IMAGE).join("cgroup.procs");
    let own = std::process::id().to_string();
    for _ in 0..MOST_PASSES {
        let listed = fs::read_to_string(Path::new(ROOT).join("cgroup.procs"));
        let listed = listed.map_err(context(ROOT))?;
        // Threads of the kernel have no program, nor has what just ended.
        let runs = |pid: &&str| **pid != own && fs::read_link(format!("/proc/{pid}/exe")).is_ok();
        let found: Vec<&str> = listed.lines().filter(runs).collect();
        if found.is_empty() {
            return Ok(());
        }
        for pid in found {
            match fs::write(&group, pid) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                written => written.map_err(context(group.display()))?,
            }
        }
    }
    Err(io::Error::other(
        "programs are started faster than they can be stopped",
    ))
}

/// Stops all processes but the agent; returns when they stand still. Groups that the image
/// has made stand beside its own.
pub fn freeze() -> io::Result<()> {
    let groups = groups()?;
    let mut frozen = Vec::new();
    for group in &groups {
        let file = group.join("cgroup.freeze");
        match File::options().write(true).open(&file) {
            Ok(switch) => {
                set(&switch, "1").map_err(context(file.display()))?;
                frozen.push(switch);
            }
            // It was removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(context(file.display())(error)),
        }
    }
    *FROZEN.lock().unwrap_or_else(PoisonError::into_inner) = frozen;
    let is_frozen = |group: &PathBuf| {
        fs::read_to_string(group.join("cgroup.events"))
            .is_ok_and(|events| events.lines().any(|line| line == "frozen 1"))
    };
    let all = || groups.iter().all(is_frozen).then_some(());
    devices::wait_for(FREEZE, all)
        .ok_or_else(|| io::Error::other(format!("not all processes stopped in {FREEZE:?}")))
}

/// Lets them go on.
pub fn thaw() -> io::Result<()> {
    let frozen = FROZEN.lock().unwrap_or_else(PoisonError::into_inner);
    frozen.iter().try_for_each(|switch| set(switch, "0"))
}

fn groups() -> io::Result<Vec<PathBuf>> {
    let mut groups = Vec::new();
    for entry in fs::read_dir(ROOT)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            groups.push(entry.path());
        }
    }
    Ok(groups)
}

fn set(switch: &File, value: &str) -> io::Result<()> {
    match switch.write_all_at(value.as_bytes(), 0) {
        // Its group was removed meanwhile.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        written => written,
    }
}
