//! What a VMM can reach: a file tree of what it was given, as a user without rights.
//!
//! A thread made for it enters new namespaces (mounts, processes, IPC, host name), builds the
//! tree from a list of paths, makes it its root and forks the VMM there:
//!
//! ```text
//! thread:  unshare -> copies of the mounts of what is given -> tmpfs -> pivot_root -> fork
//! child:   control groups -> /proc -> user, no capabilities, no new rights -> Landlock -> exec
//! ```
//! Each path lies in the tree where it lies on the host, so that command lines stay as they are.
//! Directories above them are new ones: nobody has to open those of the host. A kernel without
//! Landlock confines by namespaces and user alone ([`landlock_version`] tells); whatever else
//! cannot be done is an error, and no VMM runs.
//!
//! Invariant: between fork and exec there are system calls alone, on memory allocated before.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Component, Path, PathBuf};
use std::process::{Child, Command};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::fuse::mount::{MountAttributes, set_mount_attributes};

/// Of the host, for every VMM: programs, their libraries and data.
const PROGRAMS: &str = "/usr";
/// Links into it on hosts whose `/usr` is merged, directories on others.
const LINKS: [&str; 5] = ["/bin", "/sbin", "/lib", "/lib64", "/lib32"];
/// Files of the host for every VMM, where they are.
const SYSTEM_FILES: [&str; 2] = ["/etc/ld.so.cache", "/etc/resolv.conf"];
/// Devices that do nothing to the host.
const DEVICES: [&str; 4] = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"];

/// A VMM's user and what it is given of the host.
#[derive(Clone, Debug, Default)]
pub struct Confinement {
    /// Its user and its only group; neither needs a name.
    pub user: u32,
    /// Files and directories that it may read, as far as that user may.
    pub read: Vec<PathBuf>,
    /// Files and directories that it may also write, as far as that user may.
    pub write: Vec<PathBuf>,
    /// Devices made for it alone.
    pub devices: Vec<PathBuf>,
    /// Descriptors that it inherits.
    pub fds: Vec<RawFd>,
    /// `cgroup.procs` of the control groups that it is put into.
    pub groups: Vec<PathBuf>,
}

/// Why a VMM could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A step failed; nothing was started.
    #[error("cannot {step} for a confined VMM")]
    Step {
        /// The step.
        step: String,
        /// Why.
        source: io::Error,
    },
    /// The program did not start.
    #[error("cannot start {program} confined")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
}

fn step<E: Into<io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> ConfineError {
    move |source| ConfineError::Step {
        step: step.into(),
        source: source.into(),
    }
}

impl Confinement {
    /// Starts `command`, whose program is an absolute path. Its environment, output and what
    /// else it says hold; its working directory is the root of its own tree.
    pub fn spawn(&self, command: &mut Command) -> Result<Child, ConfineError> {
        on_thread(|| self.spawn_here(command))
    }

    /// Takes this thread out of the host's namespaces for good.
    fn spawn_here(&self, command: &mut Command) -> Result<Child, ConfineError> {
        let program = PathBuf::from(command.get_program());
        let child = InChild {
            groups: self.open_groups()?,
            fds: self.fds.clone(),
            landlock: landlock_ruleset().map_err(step("prepare Landlock"))?,
            user: self.user,
        };
        let namespaces = UnshareFlags::NEWNS
            | UnshareFlags::NEWPID
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS;
        // SAFETY: without CLONE_FILES nobody's descriptors change; what the file system looks
        // like changes for this thread, which ends with this call, alone.
        unsafe { rustix::thread::unshare_unsafe(namespaces) }.map_err(step("make namespaces"))?;
        rustix::system::sethostname(b"vmm").map_err(step("set a host name"))?;
        self.enter_tree(&program)?;
        // SAFETY: the closure makes system calls on memory allocated before the fork: no
        // allocation, no locks.
        unsafe { command.pre_exec(move || child.prepare()) };
        command.spawn().map_err(|source| ConfineError::Start {
            program: program.display().to_string(),
            source,
        })
    }

    fn open_groups(&self) -> Result<Vec<OwnedFd>, ConfineError> {
        let open = |path: &PathBuf| {
            let opened = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
            opened.map_err(step(format!("open {}", path.display())))
        };
        self.groups.iter().map(open).collect()
    }

    /// Makes the tree and this thread's root of it.
    fn enter_tree(&self, program: &Path) -> Result<(), ConfineError> {
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).map_err(step("part with the host's mounts"))?;
        let given = self.copy_given(program)?;
        let tree = FileTree::new()?;
        for one in &given {
            tree.show(one)?;
        }
        for link in LINKS {
            if let Ok(target) = std::fs::read_link(link) {
                let made = rustix::fs::symlinkat(&target, &tree.root, relative(Path::new(link)));
                made.map_err(step(format!("make the link {link}")))?;
            }
        }
        for device in &self.devices {
            tree.make_device(device, self.user)?;
        }
        tree.make_directory(Path::new("proc"))?;
        tree.enter()
    }

    /// Copies of the mounts of all that is given, outer ones first, none within another.
    fn copy_given(&self, program: &Path) -> Result<Vec<Given>, ConfineError> {
        let read_only = |path: &Path| Wanted {
            path: path.to_owned(),
            writable: false,
            optional: false,
        };
        let mut wanted: Vec<Wanted> = self.read.iter().map(|path| read_only(path)).collect();
        wanted.extend([
            read_only(Path::new(PROGRAMS)),
            read_only(&behind_link(program)),
        ]);
        let directories = LINKS
            .map(Path::new)
            .into_iter()
            .filter(|link| std::fs::symlink_metadata(link).is_ok_and(|meta| meta.is_dir()));
        wanted.extend(directories.map(read_only));
        let optional = |path: &&str| Wanted {
            optional: true,
            ..read_only(Path::new(path))
        };
        wanted.extend(SYSTEM_FILES.iter().map(optional));
        let writable = |path: &Path| Wanted {
            writable: true,
            ..read_only(path)
        };
        wanted.extend(DEVICES.iter().map(|path| writable(Path::new(path))));
        wanted.extend(self.write.iter().map(|path| writable(path)));
        // What can be written comes first of the same path.
        wanted.sort_by(|one, two| (&one.path, !one.writable).cmp(&(&two.path, !two.writable)));
        let mut given: Vec<Given> = Vec::new();
        for one in wanted {
            let covered = |outer: &Given| {
                one.path.starts_with(&outer.path) && (outer.writable || !one.writable)
            };
            if given.iter().any(covered) {
                continue;
            }
            match Given::copy(&one) {
                Err(_) if one.optional => {}
                copied => given.push(copied?),
            }
        }
        Ok(given)
    }
}

/// Shows a VMM that runs, confined, one more directory, which it may write as far as its user
/// may.
pub fn show(pid: u32, directory: &Path) -> Result<(), ConfineError> {
    let showing = || {
        let given = Given::copy(&Wanted {
            path: directory.to_owned(),
            writable: true,
            optional: false,
        })?;
        let namespace = std::fs::File::open(format!("/proc/{pid}/ns/mnt"));
        let namespace = namespace.map_err(step("find the VMM's file tree"))?;
        // SAFETY: no descriptor is involved; the root and working directory of this thread, which
        // ends with this call, become its own.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
            .map_err(step("part with the host's root"))?;
        let mount = Some(LinkNameSpaceType::Mount);
        rustix::thread::move_into_link_name_space(namespace.as_fd(), mount)
            .map_err(step("enter the VMM's file tree"))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open("/", flags, Mode::empty());
        let root = root.map_err(step("open the VMM's file tree"))?;
        FileTree { root }.show(&given)
    };
    on_thread(showing)
}

/// Runs `work` on a thread made for it, whose namespaces end with it.
fn on_thread<T: Send>(
    work: impl FnOnce() -> Result<T, ConfineError> + Send,
) -> Result<T, ConfineError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("confine".to_owned());
        let working = thread.spawn_scoped(scope, work);
        let working = working.map_err(step("start a thread"))?;
        working.join().unwrap_or_else(|_| {
            let source = io::Error::other("its thread panicked");
            Err(step("set things up")(source))
        })
    })
}

/// A path that a VMM is to have.
struct Wanted {
    path: PathBuf,
    writable: bool,
    /// Left out where it is not.
    optional: bool,
}

/// A copy of the mount of one path, at no place yet.
struct Given {
    path: PathBuf,
    is_directory: bool,
    writable: bool,
    mount: OwnedFd,
}

impl Given {
    fn copy(wanted: &Wanted) -> Result<Self, ConfineError> {
        let path = &wanted.path;
        let is_plain =
            |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
        if !path.is_absolute() || !path.components().all(is_plain) {
            let source = io::ErrorKind::InvalidInput;
            return Err(step(format!("use the path {}", path.display()))(source));
        }
        let failed = || step::<io::Error>(format!("show {}", path.display()));
        let meta = std::fs::metadata(path).map_err(failed())?;
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if meta.is_dir() {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let mount = rustix::mount::open_tree(CWD, path, flags)
            .map_err(step(format!("copy the mount of {}", path.display())))?;
        let is_device = !meta.is_dir() && !meta.is_file();
        let mut set = MountAttrFlags::MOUNT_ATTR_NOSUID;
        if !is_device {
            set |= MountAttrFlags::MOUNT_ATTR_NODEV;
        }
        if !wanted.writable {
            set |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        set_mount_attributes(&mount, MountAttributes::set(set), meta.is_dir()).map_err(failed())?;
        Ok(Self {
            path: path.clone(),
            is_directory: meta.is_dir(),
            writable: wanted.writable,
            mount,
        })
    }
}

/// The tree while it is made.
struct FileTree {
    root: OwnedFd,
}

impl FileTree {
    /// An empty one, mounted where it covers what the thread needs no more.
    fn new() -> Result<Self, ConfineError> {
        let make = || -> rustix::io::Result<OwnedFd> {
            use rustix::mount as kernel;
            let context = kernel::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
            kernel::fsconfig_set_string(&context, "mode", "0755")?;
            kernel::fsconfig_set_string(&context, "size", "1m")?;
            kernel::fsconfig_create(&context)?;
            let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
            let root = kernel::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            kernel::move_mount(&root, "", CWD, PROGRAMS, flags)?;
            Ok(root)
        };
        let root = make().map_err(step("make a file tree"))?;
        Ok(Self { root })
    }

    /// Makes a directory of the tree, with those above it.
    fn make_directory(&self, path: &Path) -> Result<(), ConfineError> {
        let mut made = PathBuf::new();
        for part in path.components() {
            made.push(part);
            match rustix::fs::mkdirat(&self.root, &made, Mode::from_raw_mode(0o755)) {
                Ok(()) => self.set_mode(&made, 0o755)?,
                Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(step(format!("make {}", made.display()))(error)),
            }
        }
        Ok(())
    }

    /// The process's umask leaves nothing for the VMM's user.
    fn set_mode(&self, path: &Path, mode: u32) -> Result<(), ConfineError> {
        let mode = Mode::from_raw_mode(mode);
        rustix::fs::chmodat(&self.root, path, mode, AtFlags::empty())
            .map_err(step(format!("open {} to it", path.display())))
    }

    fn show(&self, given: &Given) -> Result<(), ConfineError> {
        let place = relative(&given.path);
        let failed = || step::<rustix::io::Errno>(format!("show {}", given.path.display()));
        if given.is_directory {
            self.make_directory(place)?;
        } else {
            self.make_directory(place.parent().unwrap_or(Path::new("")))?;
            let mode = Mode::from_raw_mode(0o600);
            match rustix::fs::mknodat(&self.root, place, FileType::RegularFile, mode, 0) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(failed()(error)),
            }
        }
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&given.mount, "", &self.root, place, flags).map_err(failed())
    }

    /// A device node of the user's own; the host's is left alone.
    fn make_device(&self, path: &Path, user: u32) -> Result<(), ConfineError> {
        let place = relative(path);
        let failed = || step::<io::Error>(format!("make the device {}", path.display()));
        let device = std::fs::metadata(path).map_err(failed())?.rdev();
        self.make_directory(place.parent().unwrap_or(Path::new("")))?;
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(&self.root, place, FileType::CharacterDevice, mode, device)
            .map_err(|error| failed()(error.into()))?;
        let owner = (Uid::from_raw(user), Gid::from_raw(user));
        let (owner, group) = (Some(owner.0), Some(owner.1));
        rustix::fs::chownat(&self.root, place, owner, group, AtFlags::empty())
            .map_err(|error| failed()(error.into()))
    }

    /// Makes it the root of this thread; nothing else of the host's mounts is left. Its
    /// directories are root's: who has no rights changes nothing in it.
    fn enter(self) -> Result<(), ConfineError> {
        let enter = || -> rustix::io::Result<()> {
            rustix::process::fchdir(&self.root)?;
            // The old root is then on top of the new one, where it can be taken away.
            rustix::process::pivot_root(".", ".")?;
            rustix::mount::unmount(".", UnmountFlags::DETACH)?;
            rustix::process::chdir("/")
        };
        enter().map_err(step("enter the file tree"))
    }
}

/// Where a path leads that goes through one of the [`LINKS`].
fn behind_link(path: &Path) -> PathBuf {
    let linked = LINKS.iter().find_map(|link| {
        let rest = path.strip_prefix(link).ok()?;
        Some(
            Path::new("/")
                .join(std::fs::read_link(link).ok()?)
                .join(rest),
        )
    });
    linked.unwrap_or_else(|| path.to_owned())
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// What is done in the child.
struct InChild {
    groups: Vec<OwnedFd>,
    fds: Vec<RawFd>,
    landlock: Option<OwnedFd>,
    user: u32,
}

fn done(result: libc::c_long) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl InChild {
    fn prepare(&self) -> io::Result<()> {
        for group in &self.groups {
            rustix::io::write(group, b"0")?;
        }
        for fd in &self.fds {
            // SAFETY: changes the flags of a descriptor.
            done(unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) }.into())?;
        }
        show_own_processes();
        self.drop_rights()?;
        if let Some(ruleset) = &self.landlock {
            // SAFETY: no memory is involved.
            done(unsafe {
                libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0)
            })?;
        }
        Ok(())
    }

    /// Another user, no capability, no way to either again; what it makes is its own.
    fn drop_rights(&self) -> io::Result<()> {
        let (user, none) = (self.user, std::ptr::null::<libc::gid_t>());
        let no_core = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: these change what this process may do. The raw calls, since the C library's
        // would tell threads of which this child has none. `no_core` outlives its call.
        unsafe {
            libc::umask(0o077);
            done(libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core).into())?;
            // Up to the first that this kernel does not know.
            let mut capability: libc::c_ulong = 0;
            while libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) == 0 {
                capability += 1;
            }
            done(libc::syscall(libc::SYS_setgroups, 0usize, none))?;
            done(libc::syscall(libc::SYS_setresgid, user, user, user))?;
            done(libc::syscall(libc::SYS_setresuid, user, user, user))?;
            let one: libc::c_ulong = 1;
            done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, one, 0, 0, 0).into())
        }
    }
}

/// `/proc` with the processes of its own namespace, which is itself: `/proc/self/fd` is how a
/// VMM opens a file that has no name. Without it a VMM that needs one says so.
fn show_own_processes() {
    let (name, place): (&CStr, &CStr) = (c"proc", c"/proc");
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    // SAFETY: all strings end with zero and outlive the call.
    unsafe {
        let options = c"subset=pid".as_ptr().cast();
        libc::mount(name.as_ptr(), place.as_ptr(), name.as_ptr(), flags, options);
    }
}

/// `struct landlock_ruleset_attr` of `linux/landlock.h`.
#[repr(C)]
struct RulesetAttributes {
    files: u64,
    network: u64,
    scoped: u64,
}

/// Which Landlock this kernel has; 0 for none. From 6 on it keeps signals and abstract sockets
/// within a VMM, too.
pub fn landlock_version() -> u32 {
    const VERSION: u32 = 1;
    let none = std::ptr::null::<RulesetAttributes>();
    // SAFETY: with this flag there are no attributes to read.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0usize, VERSION) };
    u32::try_from(version).unwrap_or(0)
}

/// Nothing is made, removed, linked or renamed anywhere; no other process is traced (that comes
/// with any ruleset), signalled or reached by an abstract socket.
fn landlock_ruleset() -> io::Result<Option<OwnedFd>> {
    // LANDLOCK_ACCESS_FS_REMOVE_DIR to _MAKE_SYM; _REFER came with version 2.
    const CHANGES: u64 = 0b1_1111_1111 << 4;
    const REFER: u64 = 1 << 13;
    const SCOPES: u64 = 0b11;
    let version = landlock_version();
    if version == 0 {
        return Ok(None);
    }
    let attributes = RulesetAttributes {
        files: CHANGES | if version >= 2 { REFER } else { 0 },
        network: 0,
        scoped: if version >= 6 { SCOPES } else { 0 },
    };
    let known_bytes = match version {
        ..4 => size_of::<u64>(),
        4..6 => 2 * size_of::<u64>(),
        _ => size_of::<RulesetAttributes>(),
    };
    // SAFETY: the kernel reads `known_bytes` of `attributes`, which are no more than it has.
    let fd = unsafe {
        let attributes = std::ptr::from_ref(&attributes);
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            attributes,
            known_bytes,
            0,
        )
    };
    done(fd)?;
    // SAFETY: a new descriptor (closed by exec) that nobody else owns.
    let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd as RawFd) };
    Ok(Some(fd))
}
