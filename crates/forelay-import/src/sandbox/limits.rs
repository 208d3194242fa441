//! What a build may take of the host, and what ends one that takes more.
//!
//! Processes and memory are a control group's to bound (version 1 or 2), where the host lets
//! us have one. Elsewhere resource limits stand in: of processes for each user of the build, of
//! memory for each process. Time, what is printed and what is written are watched.
//!
//! Invariant: a build that is ended is ended whole: its first process is killed, and with it
//! all that are in its process namespace.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal};

/// How often a build is looked at.
const TICK: Duration = Duration::from_millis(500);
/// Room that a build leaves on the disk.
const SPARE_BYTES: u64 = 256 << 20;
/// How deep directories are followed when a build's files are summed up.
const DEPTH: usize = 256;

/// What a build may take. The defaults suit the largest packages of Debian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildLimits {
    /// Time for installing.
    pub time: Duration,
    /// Memory of all its processes, with what they write to `/tmp` and the like.
    pub memory_bytes: u64,
    /// Processes and threads.
    pub processes: u32,
    /// Bytes that it prints.
    pub output_bytes: u64,
    /// Bytes that it writes to the disk; more than one file must not have either.
    pub disk_bytes: u64,
    /// Files that it makes.
    pub files: u64,
}

impl Default for BuildLimits {
    fn default() -> Self {
        let host = rustix::system::sysinfo();
        let memory = (host.totalram as u64).saturating_mul(host.mem_unit.into());
        Self {
            time: Duration::from_secs(2 * 3600),
            memory_bytes: (memory / 2).max(1 << 30),
            processes: 4096,
            output_bytes: 64 << 20,
            disk_bytes: 64 << 30,
            files: 4_000_000,
        }
    }
}

/// Watches over one build.
#[derive(Debug)]
pub(crate) struct Watch {
    limits: BuildLimits,
    /// Where it writes.
    upper: PathBuf,
    printed: AtomicU64,
    exceeded: Mutex<Option<String>>,
    process: Mutex<Option<OwnedFd>>,
    group: Mutex<Option<Group>>,
}

impl Watch {
    pub fn new(limits: BuildLimits, upper: PathBuf) -> Self {
        Self {
            limits,
            upper,
            printed: AtomicU64::new(0),
            exceeded: Mutex::default(),
            process: Mutex::default(),
            group: Mutex::default(),
        }
    }

    /// Bounds a build that has not begun yet.
    pub fn limit(&self, child: &Child) -> io::Result<()> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        let group = Group::fill(child.id(), &self.limits);
        let mut resources = vec![
            (Resource::Core, 0),
            (Resource::Fsize, self.limits.disk_bytes),
        ];
        let bounds = |controller| {
            let group = group.as_ref();
            group.is_some_and(|group| group.controllers.contains(&controller))
        };
        if !bounds("pids") {
            resources.push((Resource::Nproc, self.limits.processes.into()));
        }
        if !bounds("memory") {
            resources.push((Resource::As, self.limits.memory_bytes));
        }
        for (resource, most) in resources {
            let limit = Rlimit {
                current: Some(most),
                maximum: Some(most),
            };
            rustix::process::prlimit(Some(pid), resource, limit)?;
        }
        *lock(&self.process) = Some(process);
        *lock(&self.group) = group;
        Ok(())
    }

    /// Counts what it printed.
    pub fn printed(&self, bytes: u64) {
        let before = self.printed.fetch_add(bytes, Ordering::Relaxed);
        let most = self.limits.output_bytes;
        if before <= most && before + bytes > most {
            self.end(format!("printed more than {most} bytes"));
        }
    }

    /// Looks at it until it has ended.
    pub fn keep(&self, ended: &Receiver<()>) {
        let began = Instant::now();
        let at_first = Usage::of(&self.upper);
        while ended.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            if began.elapsed() > self.limits.time {
                let most = self.limits.time.as_secs_f64();
                self.end(format!("took longer than {most} seconds"));
            }
            if let (Some(before), Some(now)) = (&at_first, Usage::of(&self.upper)) {
                self.look_at_disk(before, &now);
            }
        }
    }

    /// Others write to the disk, too: what it wrote itself is summed up only if it can be that.
    fn look_at_disk(&self, before: &Usage, now: &Usage) {
        let (bytes, files) = (self.limits.disk_bytes, self.limits.files);
        if now.free_bytes < SPARE_BYTES.min(before.free_bytes / 2) {
            self.end("No space left on device".to_owned());
        }
        let may_be = before.free_bytes.saturating_sub(now.free_bytes) > bytes
            || before.free_files.saturating_sub(now.free_files) > files;
        if may_be && lock(&self.exceeded).is_none() {
            let (written, made) = sum_up(&self.upper);
            if written > bytes {
                self.end(format!("wrote more than {bytes} bytes"));
            } else if made > files {
                self.end(format!("made more than {files} files"));
            }
        }
    }

    fn end(&self, why: String) {
        lock(&self.exceeded).get_or_insert(why);
        if let Some(process) = &*lock(&self.process) {
            let _ = rustix::process::pidfd_send_signal(process, Signal::KILL);
        }
    }

    /// What it exceeded; of what the kernel refused, only if it `failed`.
    pub fn exceeded(&self, failed: bool) -> Option<String> {
        let told = lock(&self.exceeded).clone();
        told.or_else(|| {
            let group = lock(&self.group);
            group.as_ref().filter(|_| failed)?.refused(&self.limits)
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What is free on a file system.
struct Usage {
    free_bytes: u64,
    free_files: u64,
}

impl Usage {
    fn of(path: &Path) -> Option<Self> {
        let found = rustix::fs::statvfs(path).ok()?;
        Some(Self {
            free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
            free_files: found.f_favail,
        })
    }
}

/// Bytes on the disk and number of the files in a directory that changes meanwhile.
fn sum_up(path: &Path) -> (u64, u64) {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Ok(root) = rustix::fs::open(path, flags, Mode::empty()) else {
        return (0, 0);
    };
    let (mut bytes, mut files) = (0u64, 0);
    let mut open = vec![Dir::new(root)];
    while let Some(last) = open.last_mut() {
        let next = last.as_mut().ok().and_then(|dir| {
            let entry = dir.read()?.ok()?;
            let parent = dir.fd().ok()?;
            let found = rustix::fs::statat(parent, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW);
            let is_directory = found
                .as_ref()
                .is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Directory);
            let name = entry.file_name();
            let below = is_directory && ![c".", c".."].contains(&name);
            let below = below.then(|| rustix::fs::openat(parent, name, flags, Mode::empty()));
            Some((found.map_or(0, |found| found.st_blocks), below))
        });
        let Some((blocks, below)) = next else {
            open.pop();
            continue;
        };
        bytes += u64::try_from(blocks).unwrap_or(0) * 512;
        files += 1;
        if let Some(Ok(below)) = below
            && open.len() < DEPTH
        {
            open.push(Dir::new(below));
        }
    }
    (bytes, files)
}

/// Our directory in a hierarchy of control groups.
const GROUPS: &str = "forelay-build";

/// The control groups of one build; removed when it has ended.
#[derive(Debug)]
struct Group {
    directories: Vec<PathBuf>,
    /// What it bounds.
    controllers: Vec<&'static str>,
}

impl Group {
    /// Puts a process into groups of its own, where that can be done.
    fn fill(pid: u32, limits: &BuildLimits) -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}", std::process::id());
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let mut group = Self {
            directories: Vec::new(),
            controllers: Vec::new(),
        };
        let memory = limits.memory_bytes.to_string();
        let processes = limits.processes.to_string();
        for (controller, file, most) in [
            ("memory", ["memory.max", "memory.limit_in_bytes"], memory),
            ("pids", ["pids.max", "pids.max"], processes),
        ] {
            let Some((parent, unified)) = hierarchy(controller, &mounts, &own) else {
                continue;
            };
            sweep(&parent);
            let directory = parent.join(&name);
            let file = file[usize::from(!unified)];
            let set = fs::create_dir_all(&directory)
                .and_then(|()| fs::write(directory.join(file), &most))
                .and_then(|()| fs::write(directory.join("cgroup.procs"), pid.to_string()));
            // One process less would leave half a build; version 1 does not know it.
            let _ = fs::write(directory.join("memory.oom.group"), "1");
            if set.is_ok() {
                group.controllers.push(controller);
            }
            if !group.directories.contains(&directory) {
                group.directories.push(directory);
            }
        }
        Some(group)
    }

    /// What the kernel refused.
    fn refused(&self, limits: &BuildLimits) -> Option<String> {
        let count = |file: &str, key: &str| {
            let mut texts = self.directories.iter().filter_map(|directory| {
                let text = fs::read_to_string(directory.join(file)).ok()?;
                let line = text.lines().find_map(|line| line.strip_prefix(key))?;
                line.trim().parse::<u64>().ok()
            });
            texts.any(|count| count > 0)
        };
        if count("memory.events", "oom_kill ") || count("memory.oom_control", "oom_kill ") {
            return Some(format!(
                "took more than {} bytes of memory",
                limits.memory_bytes
            ));
        }
        let many = count("pids.events", "max ");
        many.then(|| format!("had more than {} processes", limits.processes))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for directory in &self.directories {
            let _ = fs::remove_dir(directory);
        }
    }
}

/// Where our groups are that a controller bounds, and whether that is version 2: there below
/// its root, since the group that we are in has processes.
fn hierarchy(controller: &str, mounts: &str, own: &str) -> Option<(PathBuf, bool)> {
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, place, kind, options, ..] = fields[..] else {
            continue;
        };
        if kind == "cgroup" && options.split(',').any(|option| option == controller) {
            let path = own.lines().find_map(|line| {
                let (_, rest) = line.split_once(':')?;
                let (controllers, path) = rest.split_once(':')?;
                controllers
                    .split(',')
                    .any(|one| one == controller)
                    .then_some(path)
            })?;
            let path = Path::new(place).join(path.trim_start_matches('/'));
            return Some((path.join(GROUPS), false));
        }
        let given = fs::read_to_string(Path::new(place).join("cgroup.controllers"));
        let has = |text: String| text.split_whitespace().any(|one| one == controller);
        if kind == "cgroup2" && given.is_ok_and(has) {
            let ours = Path::new(place).join(GROUPS);
            let _ = fs::create_dir(&ours);
            for above in [Path::new(place), &ours] {
                let _ = fs::write(
                    above.join("cgroup.subtree_control"),
                    format!("+{controller}"),
                );
            }
            return Some((ours, true));
        }
    }
    None
}

/// Removes groups of programs that were killed.
fn sweep(groups: &Path) {
    for entry in fs::read_dir(groups).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.split_once('-'));
        let owner = owner.and_then(|(pid, _)| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // Nothing is removed in which something runs.
            let _ = fs::remove_dir(entry.path());
        }
    }
}
