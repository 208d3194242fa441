//! How short memory is: the host's, and that of the cgroup we are charged in. And the host's CPUs.
//!
//! A [`Probe`] samples what the kernel says; a [`Trigger`] waits for the kernel to say
//! that tasks stall. Neither judges: thresholds belong to the cache policy. What a host
//! lacks (pressure-stall information, a memory cgroup, a limit) is `None`, not an error.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use procfs::{
    CpuPressure, FromRead, LoadAverage, Meminfo, MemoryPressure, MountEntry, ProcessCGroups,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// One look at memory.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// The host's memory.
    pub mem_total_bytes: u64,
    /// What the kernel could give without swapping.
    pub mem_available_bytes: u64,
    /// The memory cgroup that binds us, if any has a limit.
    pub cgroup: Option<CgroupMemory>,
    /// Pressure-stall information, where the kernel keeps it.
    pub stall: Option<Stall>,
}

/// What a memory cgroup uses and may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupMemory {
    /// Charged memory, page cache included.
    pub usage_bytes: u64,
    /// The smallest limit on the way to the root.
    pub limit_bytes: Option<u64>,
    /// Page cache in it that was not used lately: reclaimed before anything suffers.
    pub inactive_file_bytes: u64,
}

/// `/proc/pressure/memory`: share of time in the last 10 s in which tasks waited.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stall {
    /// At least one task waited, in percent.
    pub some_avg10: f64,
    /// All tasks waited, in percent.
    pub full_avg10: f64,
    /// Total time at least one task waited, in microseconds.
    pub some_total_us: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Cgroup {
    V1(Vec<PathBuf>),
    V2(Vec<PathBuf>),
}

/// Samples memory. Finds its cgroup once; make a new one after moving between cgroups.
#[derive(Clone, Debug)]
pub struct Probe {
    proc: PathBuf,
    cgroup: Option<Cgroup>,
}

impl Probe {
    /// A probe of this host and this process's cgroup.
    pub fn new() -> Self {
        Self::at(Path::new("/"))
    }

    /// A probe of the `proc` and `sys` trees below `root`.
    pub fn at(root: &Path) -> Self {
        let proc = root.join("proc");
        let cgroup = find_cgroup(&proc, root);
        Self { proc, cgroup }
    }

    /// Looks once; a few small reads.
    pub fn sample(&self) -> io::Result<Sample> {
        let meminfo = Meminfo::from_file(self.proc.join("meminfo")).map_err(io::Error::other)?;
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "meminfo without MemAvailable");
        let stall = MemoryPressure::from_file(self.proc.join("pressure/memory"));
        Ok(Sample {
            mem_total_bytes: meminfo.mem_total,
            mem_available_bytes: meminfo.mem_available.ok_or_else(missing)?,
            cgroup: self.cgroup.as_ref().and_then(Cgroup::read),
            stall: stall.ok().map(|stall| Stall {
                some_avg10: stall.some.avg10.into(),
                full_avg10: stall.full.avg10.into(),
                some_total_us: stall.some.total,
            }),
        })
    }

    /// Share of the last 10 s in which some task waited for one of `cpus` CPUs, in percent. Where
    /// the kernel does not say: the share of the tasks of the last minute that had none.
    pub fn cpu_stall(&self, cpus: usize) -> Option<f64> {
        let told = CpuPressure::from_file(self.proc.join("pressure/cpu"));
        let told = told.ok().map(|pressure| pressure.some.avg10.into());
        told.or_else(|| {
            let load = LoadAverage::from_file(self.proc.join("loadavg")).ok()?;
            let tasks = f64::from(load.one).max(cpus as f64);
            Some(100.0 * (1.0 - cpus as f64 / tasks))
        })
    }
}

impl Default for Probe {
    fn default() -> Self {
        Self::new()
    }
}

/// The cgroup of this process that accounts memory, its directory first, then its
/// ancestors'.
fn find_cgroup(proc: &Path, root: &Path) -> Option<Cgroup> {
    let membership = ProcessCGroups::from_file(proc.join("self/cgroup")).ok()?;
    let mounts: Vec<MountEntry> = FromRead::from_file(proc.join("self/mounts")).ok()?;
    let mounted = |wanted: &dyn Fn(&MountEntry) -> bool| {
        let mount = mounts.iter().find(|mount| wanted(mount))?;
        Some(root.join(mount.fs_file.trim_start_matches('/')))
    };
    let mut v2 = None;
    for group in membership {
        let path = &group.pathname;
        if group.controllers.iter().any(|one| one == "memory") {
            let mount = mounted(&|mount| {
                mount.fs_vfstype == "cgroup" && mount.fs_mntops.contains_key("memory")
            })?;
            return Some(Cgroup::V1(ancestry(&mount, path, "memory.usage_in_bytes")));
        }
        if group.controllers.is_empty()
            && let Some(mount) = mounted(&|mount| mount.fs_vfstype == "cgroup2")
        {
            let dirs = ancestry(&mount, path, "memory.current");
            v2 = (!dirs.is_empty()).then_some(Cgroup::V2(dirs));
        }
    }
    v2
}

/// `path` below `mount` and its ancestors, as far as they have `file`. In a cgroup
/// namespace the path may not exist below the mount; then the mount's root is it.
fn ancestry(mount: &Path, path: &str, file: &str) -> Vec<PathBuf> {
    let own = mount.join(path.trim_start_matches('/'));
    let own = if own.join(file).exists() {
        own
    } else {
        mount.to_owned()
    };
    own.ancestors()
        .take_while(|dir| dir.starts_with(mount))
        .filter(|dir| dir.join(file).exists())
        .map(Path::to_owned)
        .collect()
}

impl Cgroup {
    fn read(&self) -> Option<CgroupMemory> {
        let (dirs, usage, limits, inactive) = match self {
            Self::V1(dirs) => (
                dirs,
                "memory.usage_in_bytes",
                &["memory.limit_in_bytes"][..],
                "total_inactive_file ",
            ),
            Self::V2(dirs) => (
                dirs,
                "memory.current",
                &["memory.max", "memory.high"][..],
                "inactive_file ",
            ),
        };
        // Of the cgroups that have a limit, the one with the least room binds.
        let read = |dir: &PathBuf| {
            let limit_bytes = limits
                .iter()
                .filter_map(|file| number(&dir.join(file)))
                .min();
            let stat = std::fs::read_to_string(dir.join("memory.stat")).ok()?;
            let inactive_file = stat.lines().find_map(|line| line.strip_prefix(inactive));
            Some(CgroupMemory {
                usage_bytes: number(&dir.join(usage))?,
                limit_bytes: limit_bytes.filter(|&limit| limit < UNLIMITED_BYTES),
                inactive_file_bytes: inactive_file?.parse().ok()?,
            })
        };
        let all: Vec<CgroupMemory> = dirs.iter().filter_map(read).collect();
        let limited = all.iter().filter(|cgroup| cgroup.limit_bytes.is_some());
        limited
            .min_by_key(|cgroup| {
                cgroup
                    .limit_bytes
                    .map(|limit| limit.saturating_sub(cgroup.usage_bytes))
            })
            .or(all.first())
            .copied()
    }
}

/// cgroup v1 writes "no limit" as the largest page-aligned number.
const UNLIMITED_BYTES: u64 = 1 << 60;

fn number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Why the kernel sends no pressure events.
#[derive(Debug, thiserror::Error)]
#[error("no pressure-stall events from {path}: poll MemAvailable instead")]
pub struct TriggerError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Wakes when tasks stalled on memory for longer than a threshold within a window.
#[derive(Debug)]
pub struct Trigger(File);

impl Trigger {
    /// Host-wide trigger: `stall` within `window` (0.5 to 10 s; rounded up to a multiple of
    /// 2 s for who lacks CAP_SYS_RESOURCE).
    pub fn arm(stall: Duration, window: Duration) -> Result<Self, TriggerError> {
        Self::arm_at(Path::new("/proc/pressure/memory"), stall, window)
    }

    /// Trigger of one cgroup (v2): its `memory.pressure` file.
    pub fn arm_at(path: &Path, stall: Duration, window: Duration) -> Result<Self, TriggerError> {
        let fail = |source| TriggerError {
            path: path.to_owned(),
            source,
        };
        let mut file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(fail)?;
        let mut order = |window: Duration| {
            let order = format!("some {} {}\0", stall.as_micros(), window.as_micros());
            file.write_all(order.as_bytes())
        };
        // Without CAP_SYS_RESOURCE only windows of whole multiples of 2 s are granted.
        let granted = window.as_millis().div_ceil(1000) as u64;
        order(window)
            .or_else(|_| order(Duration::from_secs(granted.next_multiple_of(2))))
            .map_err(fail)?;
        Ok(Self(file))
    }

    /// Waits for an event; `false` if `timeout` passed without one.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let mut fds = [PollFd::new(&self.0, PollFlags::PRI)];
        let timeout = Timespec::try_from(timeout).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => Ok(false),
            Ok(_) if fds[0].revents().contains(PollFlags::ERR) => {
                Err(io::Error::other("the pressure file went away"))
            }
            Ok(_) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Trigger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What may still be used before the nearer of host and cgroup is exhausted.
    fn headroom_bytes(sample: &Sample) -> u64 {
        let cgroup = sample.cgroup.and_then(|cgroup| {
            let used_bytes = cgroup
                .usage_bytes
                .saturating_sub(cgroup.inactive_file_bytes);
            Some(cgroup.limit_bytes?.saturating_sub(used_bytes))
        });
        sample.mem_available_bytes.min(cgroup.unwrap_or(u64::MAX))
    }

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal:       1000 kB\nMemFree: 10 kB\nMemAvailable:    600 kB\nBuffers: 0 kB\n\
         Cached: 0 kB\nSwapCached: 0 kB\nActive: 0 kB\nInactive: 0 kB\nSwapTotal: 0 kB\n\
         SwapFree: 0 kB\nDirty: 0 kB\nWriteback: 0 kB\nMapped: 0 kB\nSlab: 0 kB\n\
         Committed_AS: 0 kB\nVmallocTotal: 0 kB\nVmallocUsed: 0 kB\nVmallocChunk: 0 kB\n",
    );

    #[test]
    fn this_host_is_sane() {
        let sample = Probe::new().sample().unwrap();
        assert!(sample.mem_available_bytes <= sample.mem_total_bytes);
        assert!(headroom_bytes(&sample) <= sample.mem_available_bytes);
        assert!(sample.mem_available_bytes > 0);
    }

    #[test]
    fn privileged_triggers_arm_and_nonsense_is_refused() {
        if !Path::new("/proc/pressure/memory").exists() || !rustix::process::geteuid().is_root() {
            eprintln!(
                "SKIPPED privileged_triggers_arm_and_nonsense_is_refused: needs root and PSI"
            );
            return;
        }
        let second = Duration::from_secs(1);
        let trigger = Trigger::arm(second / 2, second).unwrap();
        // Whether there is pressure right now is not for a test to say.
        trigger.wait(Duration::from_millis(1)).unwrap();
        assert!(Trigger::arm(second * 9, second).is_err());
        assert!(Trigger::arm_at(Path::new("/nonexistent"), second / 2, second).is_err());
    }

    #[test]
    fn a_host_without_cgroups_and_stall_information_still_samples() {
        let root = host(&[MEMINFO]);
        let sample = Probe::at(root.path()).sample().unwrap();
        assert_eq!(headroom_bytes(&sample), 600 * 1024);
        assert_eq!((sample.cgroup, sample.stall), (None, None));
    }

    #[test]
    fn cpus_are_short_as_the_kernel_says_or_as_its_load_tells() {
        let load = ("proc/loadavg", "4.00 1.00 1.00 5/100 4242\n");
        let root = host(&[load]);
        let probe = Probe::at(root.path());
        assert_eq!(probe.cpu_stall(1), Some(75.0));
        assert_eq!(probe.cpu_stall(8), Some(0.0));
        let stall = "some avg10=12.50 avg60=0.00 avg300=0.00 total=77\n\
                     full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
        let root = host(&[load, ("proc/pressure/cpu", stall)]);
        assert_eq!(Probe::at(root.path()).cpu_stall(1), Some(12.5));
        assert_eq!(Probe::at(&root.path().join("none")).cpu_stall(1), None);
    }

    #[test]
    fn cgroup_v2_limits_of_ancestors_bind() {
        let root = host(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/a/b\n"),
            (
                "proc/self/mounts",
                "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n",
            ),
            ("sys/fs/cgroup/a/b/memory.current", "1000\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.stat", "anon 5\ninactive_file 7\n"),
            ("sys/fs/cgroup/a/memory.current", "5000\n"),
            ("sys/fs/cgroup/a/memory.max", "9000\n"),
            ("sys/fs/cgroup/a/memory.high", "8000\n"),
            ("sys/fs/cgroup/a/memory.stat", "inactive_file 100\n"),
            (
                "proc/pressure/memory",
                "some avg10=1.50 avg60=0 avg300=0 total=77\nfull avg10=0.25 avg60=0 avg300=0 total=9\n",
            ),
        ]);
        let sample = Probe::at(root.path()).sample().unwrap();
        let cgroup = sample.cgroup.unwrap();
        assert_eq!((cgroup.usage_bytes, cgroup.limit_bytes), (5000, Some(8000)));
        assert_eq!(headroom_bytes(&sample), 3100);
        let stall = sample.stall.unwrap();
        assert_eq!(
            (stall.some_avg10, stall.full_avg10, stall.some_total_us),
            (1.5, 0.25, 77)
        );
    }

    #[test]
    fn cgroup_v1_without_a_limit_binds_nothing() {
        let root = host(&[
            MEMINFO,
            ("proc/self/cgroup", "4:memory:/x\n0::/\n"),
            (
                "proc/self/mounts",
                "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n",
            ),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "4096\n"),
            (
                "sys/fs/cgroup/memory/x/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
            (
                "sys/fs/cgroup/memory/x/memory.stat",
                "total_inactive_file 0\n",
            ),
        ]);
        let probe = Probe::at(root.path());
        let sample = probe.sample().unwrap();
        assert_eq!(sample.cgroup.unwrap().limit_bytes, None);
        assert_eq!(headroom_bytes(&sample), 600 * 1024);
    }
}
