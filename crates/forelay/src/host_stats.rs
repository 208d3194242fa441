//! What the kernel tells of processes under `/proc`.
//!
//! Owns every reading of another process's figures; the parsing is procfs'. Refuses to know
//! what a process is to us. A process that has ended, or that we may not look at, is `None`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use procfs::process::{MMapPath, Process, Stat, Status};
use procfs::{FromRead, MountEntry, ProcessCGroups};

/// A process's counters since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessUsage {
    /// User and system time.
    pub cpu_ms: u64,
    /// Anonymous memory and shared memory that is no file's, swapped out or not: a guest's
    /// RAM either way.
    pub memory_bytes: u64,
    /// Read from block devices; zero if only its owner may know.
    pub read_bytes: u64,
    /// Written to block devices, likewise.
    pub written_bytes: u64,
}

/// The `proc` tree of a host.
#[derive(Clone, Debug)]
pub struct HostStats {
    proc: PathBuf,
}

impl Default for HostStats {
    fn default() -> Self {
        Self::at(Path::new("/"))
    }
}

impl HostStats {
    /// That of the host whose root directory is `root`.
    pub fn at(root: &Path) -> Self {
        let proc = root.join("proc");
        Self { proc }
    }

    fn dir(&self, pid: u32) -> PathBuf {
        self.proc.join(pid.to_string())
    }

    fn stat(&self, pid: u32) -> Option<Stat> {
        Stat::from_file(self.dir(pid).join("stat")).ok()
    }

    fn status(&self, pid: u32) -> Option<Status> {
        Status::from_file(self.dir(pid).join("status")).ok()
    }

    /// What a process has used.
    pub fn usage(&self, pid: u32) -> Option<ProcessUsage> {
        let (stat, status) = (self.stat(pid)?, self.status(pid)?);
        let process = Process::new_with_root(self.dir(pid)).ok()?;
        let io = process.io().ok();
        let kib = [status.rssanon, status.rssshmem, status.vmswap];
        Some(ProcessUsage {
            cpu_ms: (stat.utime + stat.stime) * 1000 / procfs::ticks_per_second(),
            memory_bytes: kib.into_iter().flatten().sum::<u64>() << 10,
            read_bytes: io.as_ref().map_or(0, |io| io.read_bytes),
            written_bytes: io.as_ref().map_or(0, |io| io.write_bytes),
        })
    }

    /// The process that a thread belongs to.
    pub fn process_of(&self, thread: u32) -> Option<u32> {
        u32::try_from(self.status(thread)?.tgid).ok()
    }

    /// The parent of a process, and whether the process has memory of its own: what has none
    /// runs no program, such as a kernel thread or a zombie.
    pub fn parent(&self, pid: u32) -> Option<(u32, bool)> {
        let stat = self.stat(pid)?;
        Some((u32::try_from(stat.ppid).ok()?, stat.vsize > 0))
    }

    /// Files that a process maps, by the paths it opened them at.
    pub fn mapped_files(&self, pid: u32) -> BTreeSet<PathBuf> {
        let process = Process::new_with_root(self.dir(pid));
        let maps = process.and_then(|process| process.maps());
        let maps = maps.into_iter().flatten();
        let files = maps.filter_map(|map| match map.pathname {
            MMapPath::Path(path) => Some(path),
            _ => None,
        });
        files.collect()
    }

    /// The control groups that a process is in: controllers (none in version 2) and path.
    pub fn control_groups(&self, pid: u32) -> Vec<(Vec<String>, String)> {
        let groups = ProcessCGroups::from_file(self.dir(pid).join("cgroup"));
        let groups = groups.into_iter().flatten();
        groups
            .map(|group| (group.controllers, group.pathname))
            .collect()
    }

    /// This process's mounts.
    pub fn mounts(&self) -> Vec<MountEntry> {
        FromRead::from_file(self.proc.join("self/mounts")).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen_and_one_that_is_not_there_is_not() {
        let (host, own) = (HostStats::default(), std::process::id());
        assert!(host.usage(own).unwrap().memory_bytes > 0);
        assert_eq!(host.process_of(own), Some(own));
        let of_thread = std::thread::spawn(move || {
            let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
            assert_ne!(thread, own);
            HostStats::default().process_of(thread)
        });
        assert_eq!(of_thread.join().unwrap(), Some(own));
        assert_eq!(
            host.parent(own),
            Some((std::os::unix::process::parent_id(), true))
        );
        let program = std::env::current_exe().unwrap();
        assert!(host.mapped_files(own).contains(&program));
        assert!(!host.control_groups(own).is_empty() && !host.mounts().is_empty());
        assert_eq!(host.usage(u32::MAX), None);
        assert!(host.mapped_files(u32::MAX).is_empty());
    }
}
