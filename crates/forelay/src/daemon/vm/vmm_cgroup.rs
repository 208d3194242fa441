//! What the kernel charges to a VMM's control group, if the VMM has one to itself: page cache
//! of its disks, kernel memory, helpers (vhost threads, child processes) are in no figure of the
//! process alone.
//!
//! Owns finding that group (cgroup v1, v2 or both) and reading it. Refuses to start or move
//! anything: libvirt, systemd-run and container runtimes make such groups.
//!
//! Invariant: a group in which anything else runs is not used. Nothing else are the VMM, its
//! descendants and kernel threads; so the daemon's own group, its ancestors and the root never
//! are.

use std::path::{Path, PathBuf};

use crate::host_stats::HostStats;

/// What a group was charged since it was made; `None` for what its controllers do not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Charged {
    /// CPU time, in milliseconds.
    pub cpu_ms: Option<u64>,
    /// Memory in use now, without mapped files: those of a VMM are shared component pages.
    pub memory_bytes: Option<u64>,
    /// Bytes read from and written to block devices.
    pub io_bytes: Option<(u64, u64)>,
}

/// Where groups are mounted.
#[derive(Clone, Debug, Default)]
pub struct Groups {
    host: HostStats,
    /// Mount points of v1 hierarchies with their controllers; v2's has none.
    mounts: Vec<(Vec<String>, PathBuf)>,
}

impl Groups {
    /// Those of this host.
    pub fn new() -> Self {
        Self::at(Path::new("/"))
    }

    /// Those of the `proc` and `sys` trees below `root`.
    fn at(root: &Path) -> Self {
        let host = HostStats::at(root);
        let mounts = host.mounts().into_iter().filter_map(|mount| {
            let controllers = match mount.fs_vfstype.as_str() {
                "cgroup" => mount.fs_mntops.into_keys().collect(),
                "cgroup2" => Vec::new(),
                _ => return None,
            };
            Some((
                controllers,
                root.join(mount.fs_file.trim_start_matches('/')),
            ))
        });
        Self {
            mounts: mounts.collect(),
            host,
        }
    }

    /// What the groups that the process `vmm` has to itself were charged.
    pub fn charged(&self, vmm: u32) -> Charged {
        let mut charged = Charged::default();
        for (controllers, path) in self.host.control_groups(vmm) {
            let mounted = self.mounts.iter().find(|(mounted, _)| {
                mounted.is_empty() == controllers.is_empty()
                    && controllers
                        .iter()
                        .all(|one| mounted.iter().any(|two| one == two))
            });
            let Some(dir) = mounted.and_then(|(_, mount)| self.own(mount, &path, vmm)) else {
                continue;
            };
            let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
            let has =
                |name: &str| controllers.is_empty() || controllers.iter().any(|one| one == name);
            if has("memory") {
                charged.memory_bytes = charged.memory_bytes.or_else(|| memory_bytes(&read));
            }
            if has("cpuacct") {
                charged.cpu_ms = charged.cpu_ms.or_else(|| cpu_ms(&read));
            }
            if has("blkio") {
                charged.io_bytes = charged.io_bytes.or_else(|| io_bytes(&read));
            }
        }
        charged
    }

    /// The largest group around `path` that `vmm` has to itself: VMMs may be spread over
    /// groups below their own.
    fn own(&self, mount: &Path, path: &str, vmm: u32) -> Option<PathBuf> {
        // A group outside of our namespace has no path here.
        if path.split('/').any(|part| part == "..") {
            return None;
        }
        let mut dir = mount.join(path.trim_start_matches('/'));
        let mut own = None;
        while dir != mount && dir.starts_with(mount) {
            match self.holds(&dir, vmm) {
                None => break,
                Some(true) => own = Some(dir.clone()),
                // Of a threaded group only the parent tells the process.
                Some(false) => {}
            }
            dir.pop();
        }
        own
    }

    /// Whether `vmm` is in a group or below it; `None` if something else is.
    fn holds(&self, dir: &Path, vmm: u32) -> Option<bool> {
        let mut found = false;
        // Not readable in a threaded group.
        let members = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for pid in members.lines() {
            // Zero is a process outside of our namespace.
            let pid = pid.parse::<u32>().ok().filter(|pid| *pid > 0)?;
            found |= pid == vmm;
            if !self.belongs(pid, vmm) {
                return None;
            }
        }
        for entry in std::fs::read_dir(dir).ok()?.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found |= self.holds(&entry.path(), vmm)?;
            }
        }
        Some(found)
    }

    /// Whether a process is the VMM, one of its descendants, a kernel thread, or has ended.
    fn belongs(&self, mut pid: u32, vmm: u32) -> bool {
        let has_memory = self
            .host
            .parent(pid)
            .is_some_and(|(_, has_memory)| has_memory);
        if !has_memory {
            return true;
        }
        // Parents may change while we look: no chain is this long.
        for _ in 0..64 {
            if pid == vmm {
                return true;
            }
            match self.host.parent(pid) {
                Some((parent, _)) if parent > 1 => pid = parent,
                _ => return false,
            }
        }
        false
    }
}

/// A `name value` line.
fn value(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(one, _)| *one == name)?.1.trim().parse().ok()
}

fn memory_bytes(read: &impl Fn(&str) -> Option<String>) -> Option<u64> {
    let stat = read("memory.stat")?;
    let (charged, mapped, shmem) = match read("memory.current") {
        Some(current) => (current, "file_mapped", "shmem"),
        None => (
            read("memory.usage_in_bytes")?,
            "total_mapped_file",
            "total_shmem",
        ),
    };
    // Guest memory may be shared memory, which counts as a mapped file.
    let components = value(&stat, mapped)?.saturating_sub(value(&stat, shmem)?);
    let charged: u64 = charged.trim().parse().ok()?;
    Some(charged.saturating_sub(components))
}

fn cpu_ms(read: &impl Fn(&str) -> Option<String>) -> Option<u64> {
    match read("cpuacct.usage") {
        Some(ns) => Some(ns.trim().parse::<u64>().ok()? / 1_000_000),
        None => Some(value(&read("cpu.stat")?, "usage_usec")? / 1_000),
    }
}

fn io_bytes(read: &impl Fn(&str) -> Option<String>) -> Option<(u64, u64)> {
    let (mut bytes_read, mut written) = (0, 0);
    if let Some(stat) = read("io.stat") {
        for word in stat.split_whitespace() {
            match word.split_once('=') {
                Some(("rbytes", count)) => bytes_read += count.parse().unwrap_or(0),
                Some(("wbytes", count)) => written += count.parse().unwrap_or(0),
                _ => {}
            }
        }
        return Some((bytes_read, written));
    }
    for line in read("blkio.throttle.io_service_bytes_recursive")?.lines() {
        let mut fields = line.split_whitespace().skip(1);
        let count = |field: Option<&str>| field.and_then(|field| field.parse().ok()).unwrap_or(0);
        match fields.next() {
            Some("Read") => bytes_read += count(fields.next()),
            Some("Write") => written += count(fields.next()),
            _ => {}
        }
    }
    Some((bytes_read, written))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree of files as `/proc` and `/sys/fs/cgroup` are; of a `stat` just the parent and
    /// the size of the address space are given.
    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let text = match text.split_once(' ') {
                Some((parent, size)) if path.ends_with("stat") => {
                    let zeros = "0 ".repeat(29);
                    format!(
                        "9 (a) b) S {parent} 0 0 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 7 {size} {zeros}"
                    )
                }
                _ => (*text).to_owned(),
            };
            std::fs::write(path, text).unwrap();
        }
        root
    }

    const V2: &[(&str, &str)] = &[
        (
            "proc/self/mounts",
            "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n",
        ),
        // The VMM, its helper, a kernel thread and a shell.
        ("proc/40/stat", "1 9216"),
        ("proc/41/stat", "40 9216"),
        ("proc/42/stat", "2 0"),
        ("proc/50/stat", "1 9216"),
        // As libvirt lays it out: threaded groups below one that has the process.
        (
            "proc/40/cgroup",
            "0::/machine.slice/vm.scope/libvirt/emulator\n",
        ),
        (
            "sys/fs/cgroup/machine.slice/vm.scope/libvirt/cgroup.procs",
            "40\n41\n42\n",
        ),
        (
            "sys/fs/cgroup/machine.slice/vm.scope/libvirt/emulator/cgroup.type",
            "threaded\n",
        ),
        (
            "sys/fs/cgroup/machine.slice/other.scope/cgroup.procs",
            "50\n",
        ),
        (
            "sys/fs/cgroup/machine.slice/cpu.stat",
            "usage_usec 99058090\nuser_usec 96011590\nsystem_usec 3046500\n",
        ),
        (
            "sys/fs/cgroup/machine.slice/vm.scope/cpu.stat",
            "usage_usec 7058090\nuser_usec 6011590\nsystem_usec 1046500\nnice_usec 0\n",
        ),
        (
            "sys/fs/cgroup/machine.slice/vm.scope/memory.current",
            "281018368\n",
        ),
        (
            "sys/fs/cgroup/machine.slice/vm.scope/memory.stat",
            "anon 12582912\nfile 260046848\nkernel 8388608\nshmem 167772160\n\
             file_mapped 209715200\nfile_dirty 0\ninactive_anon 0\n",
        ),
        (
            "sys/fs/cgroup/machine.slice/vm.scope/io.stat",
            "8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0\n\
             8:0 rbytes=90430464 wbytes=299008000 rios=8950 wios=1252 dbytes=50331648 dios=3021\n",
        ),
    ];

    #[test]
    fn a_group_of_version_2_is_found_around_its_threads_and_read() {
        let root = host(V2);
        let charged = Groups::at(root.path()).charged(40);
        let expected = Charged {
            cpu_ms: Some(7_058),
            memory_bytes: Some(281_018_368 - (209_715_200 - 167_772_160)),
            io_bytes: Some((91_889_664, 613_781_504)),
        };
        assert_eq!(charged, expected);
    }

    #[test]
    fn what_others_run_in_is_not_used() {
        let scope = "sys/fs/cgroup/machine.slice/vm.scope";
        let shared = [
            // A shell in the same group, below it, one that nobody here can see.
            (format!("{scope}/libvirt/cgroup.procs"), "40\n50\n"),
            (format!("{scope}/libvirt/vcpu0/cgroup.procs"), "50\n"),
            (format!("{scope}/libvirt/cgroup.procs"), "40\n0\n"),
            ("proc/40/cgroup".to_owned(), "0::/\n"),
            ("proc/40/cgroup".to_owned(), "0::/../vm.scope\n"),
            ("proc/40/cgroup".to_owned(), "nonsense\n"),
        ];
        for (path, text) in shared {
            let root = host(V2);
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            let charged = Groups::at(root.path()).charged(40);
            assert_eq!(charged, Charged::default(), "{text:?} in {path:?}");
        }
        // This process shares its group with who started it, or is in the root.
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let charged = Groups::new().charged(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(charged, Charged::default());
    }

    #[test]
    fn privileged_a_group_of_version_1_tells_what_a_child_used() {
        let name = format!("forelay-test-{}", std::process::id());
        let dirs = ["memory", "cpuacct", "blkio"].map(|controller| {
            let mount = Path::new("/sys/fs/cgroup").join(controller);
            mount.join(&name)
        });
        if !dirs.iter().all(|dir| std::fs::create_dir(dir).is_ok()) {
            for dir in &dirs {
                let _ = std::fs::remove_dir(dir);
            }
            println!(
                "SKIPPED privileged_a_group_of_version_1_tells_what_a_child_used: no cgroup v1"
            );
            return;
        }
        // Waits until it is in its group; then its child works, and both stay.
        let mut vmm = std::process::Command::new("sh")
            .arg("-c")
            .arg("read go; sh -c 'i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo done; read x'; :")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let join = |pid: u32| {
            for dir in &dirs {
                std::fs::write(dir.join("cgroup.procs"), pid.to_string()).unwrap();
            }
        };
        join(vmm.id());
        use std::io::{BufRead as _, Write as _};
        let mut input = vmm.stdin.take().unwrap();
        input.write_all(b"go\n").unwrap();
        let mut line = String::new();
        let mut output = std::io::BufReader::new(vmm.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let alone = Groups::new().charged(vmm.id());
        let mut stranger = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        join(stranger.id());
        let shared = Groups::new().charged(vmm.id());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        drop(input);
        vmm.wait().unwrap();
        for dir in &dirs {
            std::fs::remove_dir(dir).unwrap();
        }
        assert_eq!(line, "done\n");
        // The work was the child's: the process alone tells nothing of it before the child ends.
        assert!(alone.cpu_ms > Some(0), "{alone:?}");
        assert!(
            alone.memory_bytes > Some(0) && alone.io_bytes.is_some(),
            "{alone:?}"
        );
        assert_eq!(shared, Charged::default());
    }
}
