//! The file tree in which a build runs, made by a thread that leaves the host for good.
//!
//! ```text
//! thread: unshare -> tmpfs with the host's programs, the scratch root -> pivot_root -> filter
//! child:  waits for its limits -> /proc -> user namespace -> fewer capabilities -> command
//! ```
//! The scratch root is at [`TARGET`]; the host's `/usr`, read-only, is there for the tools that
//! work on it. Whatever gets out of the scratch root finds that and nothing else.
//!
//! Invariant: mounts go onto directories of the scratch root alone, never through a link.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, makedev, mknodat};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use super::filter;
use crate::error::{ImportError, io_error};
use crate::users::UserRange;

/// Where the scratch root is.
pub(crate) const TARGET: &str = "/target";
/// Where apt's cache is, read-only.
pub(crate) const APT: &str = "/apt";
/// What apt keeps of a run; gone with it.
pub(crate) const APT_STATE: &str = "/tmp/apt";
/// apt's archives within the scratch root.
pub(crate) const ARCHIVES: &str = "var/cache/apt/archives";

/// The first program of a build's process namespace, still the host's root: it is the host's
/// shell, becomes the build's root, and then the command. Arguments: descriptor for reports or
/// nothing, command.
const ENTER: &str = r#"set -eu
read -r _ </go
for place in /proc /target/proc; do
    mount -t proc -o nosuid,nodev,noexec proc "$place"
done
for file in /proc/self/fd/*; do
    number=${file##*/}
    if [ "$number" -gt 2 ]; then
        eval "exec $number>&-"
    fi
done
exec nsenter --user=/proc/self/fd/0 -- setpriv --pdeathsig KILL --no-new-privs \
    --inh-caps=-all --bounding-set=-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,\
+setuid,+setfcap,+setpcap,+net_bind_service,+sys_chroot -- sh -c 'exec </dev/null
# Programs report on descriptor 3, which is what our caller reads; what scripts print goes to
# standard error, which is open, and is kept for when something fails.
if [ -n "$1" ]; then
    exec 3>&1 >&2
fi
shift
exec "$@"' sh "$@"
"#;

/// Directories of the scratch root that something is mounted on.
const MOUNT_POINTS: [&str; 6] = ["proc", "sys", "dev", "run", "tmp", ARCHIVES];
/// Devices that do nothing to the host: name, minor number (of the major 1).
const DEVICES: [(&str, u32); 5] = [
    ("null", 3),
    ("zero", 5),
    ("full", 7),
    ("random", 8),
    ("urandom", 9),
];
/// Of the host's `/etc`, for the host's programs.
const HOST_FILES: [&str; 4] = ["passwd", "group", "nsswitch.conf", "ld.so.cache"];

/// What a build is shown.
pub(super) struct Jail {
    /// An empty directory for it.
    pub place: PathBuf,
    /// Options of the scratch root's overlay.
    pub overlay: String,
    /// The directory of apt's cache, if the build uses it.
    pub apt: Option<PathBuf>,
    /// Who the build is.
    pub users: UserRange,
}

/// A command that waits to be let go in its jail.
struct GatedChild {
    child: Child,
    gate: File,
}

impl Jail {
    /// The host's program that a command begins with, and its arguments before the command's.
    pub fn enter_words(reports: bool) -> [&'static str; 5] {
        ["bash", "-c", ENTER, "bash", if reports { "3" } else { "" }]
    }

    /// Starts `command` (which begins with [`Self::enter_words`]) in the jail, gives it to
    /// `limit`, lets it go, and gives it to `follow`, which waits for its end.
    pub fn run<T>(
        &self,
        command: &mut Command,
        limit: impl FnOnce(&Child) -> io::Result<()>,
        follow: impl FnOnce(Child) -> Result<T, ImportError>,
    ) -> Result<T, ImportError> {
        let namespace = user_namespace(self.users)?;
        command.stdin(Stdio::from(namespace));
        let (started, starting) = mpsc::channel();
        // The kernel ends the command with the thread that started it.
        let (ended, end) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("build".to_owned());
            let work = move || {
                let _ = started.send(self.start(command));
                let _ = end.recv();
            };
            let spawned = thread.spawn_scoped(scope, work);
            spawned.map_err(io_error("starting a thread for", &self.place))?;
            let waiting = starting.recv().map_err(|_| {
                let error = io::Error::other("its thread panicked");
                io_error("making a scratch root in", &self.place)(error)
            })?;
            let GatedChild {
                mut child,
                mut gate,
            } = waiting?;
            let let_go = limit(&child).and_then(|()| gate.write_all(b"\n"));
            if let Err(error) = let_go {
                let _ = child.kill();
                let _ = child.wait();
                return Err(io_error("limiting a build in", &self.place)(error));
            }
            let followed = follow(child);
            drop(ended);
            followed
        })
    }

    /// Takes this thread out of the host's namespaces for good.
    fn start(&self, command: &mut Command) -> Result<GatedChild, ImportError> {
        let failed = || io_error("making a scratch root in", &self.place);
        let namespaces = UnshareFlags::NEWNS
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS
            | UnshareFlags::NEWNET;
        unshare(namespaces).map_err(failed())?;
        rustix::process::umask(Mode::from_raw_mode(0o022));
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", private).map_err(|error| failed()(error.into()))?;
        rustix::system::sethostname(b"debian").map_err(|error| failed()(error.into()))?;
        set_up_network();
        self.make_tree().map_err(failed())?;
        self.mount_target()?;
        let gate = self.make_gate().map_err(failed())?;
        self.enter().map_err(failed())?;
        // Who is started from here on is the first of its processes.
        unshare(UnshareFlags::NEWPID).map_err(failed())?;
        filter::install().map_err(|error| failed()(io::Error::other(error)))?;
        let child = command.spawn().map_err(io_error("running", "bash"))?;
        Ok(GatedChild { child, gate })
    }

    /// Everything but the scratch root.
    fn make_tree(&self) -> io::Result<()> {
        let plain = MountFlags::NOSUID | MountFlags::NODEV;
        self.mount(
            "tmpfs",
            &self.place,
            plain | MountFlags::NOEXEC,
            "mode=755,size=1m",
        )?;
        let at = |name: &str| self.place.join(name);
        for name in ["usr", "proc", "dev", "etc", "tmp", "target", "apt"] {
            fs::create_dir(at(name))?;
        }
        self.show(Path::new("/usr"), &at("usr"))?;
        for name in ["bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
            let host = Path::new("/").join(name);
            match fs::symlink_metadata(&host) {
                Ok(found) if found.is_symlink() => symlink(fs::read_link(&host)?, at(name))?,
                Ok(found) if found.is_dir() => {
                    fs::create_dir(at(name))?;
                    self.show(&host, &at(name))?;
                }
                _ => {}
            }
        }
        for name in HOST_FILES {
            if let Ok(bytes) = fs::read(Path::new("/etc").join(name)) {
                fs::write(at("etc").join(name), bytes)?;
            }
        }
        // apt's tables of all packages are there.
        let tmp = format!("size=512m,{}", self.owned(0o1777));
        self.mount("tmpfs", &at("tmp"), plain | MountFlags::NOEXEC, &tmp)?;
        let state = self.place.join(relative(APT_STATE));
        self.make_directory(&state, 0o755)?;
        self.make_directory(&state.join("log"), 0o755)?;
        if let Some(apt) = &self.apt {
            self.show(apt, &at("apt"))?;
        }
        Ok(())
    }

    /// The scratch root with what scripts expect to be mounted.
    fn mount_target(&self) -> Result<(), ImportError> {
        let target = self.place.join(relative(TARGET));
        let failed = || io_error("mounting the scratch root at", &self.place);
        let plain = MountFlags::NOSUID | MountFlags::NODEV;
        self.mount("overlay", &target, plain, &self.overlay)
            .map_err(failed())?;
        let root = rustix::fs::open(&target, PLACE, Mode::empty());
        let root = root.map_err(|error| failed()(error.into()))?;
        for name in MOUNT_POINTS {
            self.make_mount_point(&root, name)?;
        }
        let quiet = plain | MountFlags::NOEXEC;
        let mount = |kind: &str, name: &str, flags, options: &str| -> Result<(), ImportError> {
            let place = open_beneath(&root, name)?;
            self.mount(kind, &by_descriptor(&place), flags, options)
                .map_err(failed())
        };
        mount("sysfs", "sys", quiet | MountFlags::RDONLY, "")?;
        let dev = format!("size=1m,{}", self.owned(0o755));
        mount(
            "tmpfs",
            "dev",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            &dev,
        )?;
        self.fill_dev(&target.join("dev")).map_err(failed())?;
        mount(
            "tmpfs",
            "run",
            plain,
            &format!("size=64m,{}", self.owned(0o755)),
        )?;
        let lock = target.join("run/lock");
        self.make_directory(&lock, 0o1777).map_err(failed())?;
        mount(
            "tmpfs",
            "tmp",
            plain,
            &format!("size=1g,{}", self.owned(0o1777)),
        )?;
        if let Some(apt) = &self.apt {
            let archives = apt.join("archives");
            let place = open_beneath(&root, ARCHIVES)?;
            self.show(&archives, &by_descriptor(&place))
                .map_err(failed())?;
        }
        let dev = self.place.join("dev");
        rustix::mount::mount_bind(target.join("dev"), &dev).map_err(|error| failed()(error.into()))
    }

    /// `/dev` with what scripts look for.
    fn fill_dev(&self, dev: &Path) -> io::Result<()> {
        let device = |name: &str, major, minor| -> io::Result<()> {
            let path = dev.join(name);
            let mode = Mode::from_raw_mode(0o666);
            mknodat(
                CWD,
                &path,
                FileType::CharacterDevice,
                mode,
                makedev(major, minor),
            )?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o666))
        };
        for (name, minor) in DEVICES {
            device(name, 1, minor)?;
        }
        device("tty", 5, 0)?;
        self.make_directory(&dev.join("pts"), 0o755)?;
        self.make_directory(&dev.join("shm"), 0o1777)?;
        let quiet = MountFlags::NOSUID | MountFlags::NOEXEC;
        let terminals = self.users.first() + 5;
        let options = format!("newinstance,ptmxmode=0666,mode=620,gid={terminals}");
        self.mount("devpts", &dev.join("pts"), quiet, &options)?;
        let shm = format!("size=256m,{}", self.owned(0o1777));
        let quiet = quiet | MountFlags::NODEV;
        self.mount("tmpfs", &dev.join("shm"), quiet, &shm)?;
        for (name, to) in [
            ("ptmx", "pts/ptmx"),
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
        ] {
            symlink(to, dev.join(name))?;
        }
        Ok(())
    }

    /// Makes the directories of `name` in the scratch root that are not there.
    fn make_mount_point(&self, root: &OwnedFd, name: &str) -> Result<(), ImportError> {
        let mut at = PathBuf::new();
        let mut parent = open_beneath(root, ".")?;
        for part in Path::new(name) {
            at.push(part);
            let made = rustix::fs::mkdirat(&parent, part, Mode::from_raw_mode(0o755));
            parent = open_beneath(root, &at)?;
            if made.is_ok() {
                let owner = Some(self.users.first());
                chown(by_descriptor(&parent), owner, owner)
                    .map_err(io_error("making the scratch root's", &at))?;
            }
        }
        Ok(())
    }

    fn make_directory(&self, path: &Path, mode: u32) -> io::Result<()> {
        fs::create_dir(path)?;
        let owner = Some(self.users.first());
        chown(path, owner, owner)?;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    }

    /// Options of a tmpfs that the build's root owns.
    fn owned(&self, mode: u32) -> String {
        let root = self.users.first();
        format!("mode={mode:o},uid={root},gid={root}")
    }

    fn mount(&self, kind: &str, at: &Path, flags: MountFlags, options: &str) -> io::Result<()> {
        let options = CString::new(options)?;
        Ok(rustix::mount::mount(kind, at, kind, flags, &*options)?)
    }

    /// Shows a directory of the host, to be read.
    fn show(&self, host: &Path, at: &Path) -> io::Result<()> {
        rustix::mount::mount_bind(host, at)?;
        // The mount is on top of what `at` led to: by its name it is found again.
        let at = fs::read_link(at).unwrap_or_else(|_| at.to_owned());
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        Ok(rustix::mount::mount_remount(at, flags, c"")?)
    }

    /// What the command waits at, until its limits are set.
    fn make_gate(&self) -> io::Result<File> {
        let gate = self.place.join("go");
        mknodat(CWD, &gate, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
        File::options().read(true).write(true).open(gate)
    }

    /// Makes the tree this thread's root; no path leads to the host from here on.
    fn enter(&self) -> io::Result<()> {
        let flags = MountFlags::BIND
            | MountFlags::RDONLY
            | MountFlags::NOSUID
            | MountFlags::NODEV
            | MountFlags::NOEXEC;
        rustix::mount::mount_remount(&self.place, flags, c"")?;
        rustix::process::chdir(&self.place)?;
        // The old root is then on top of the new one, where it can be taken away.
        rustix::process::pivot_root(".", ".")?;
        rustix::mount::unmount(".", UnmountFlags::DETACH)?;
        Ok(rustix::process::chdir("/")?)
    }
}

const PLACE: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Opens a directory of the scratch root, if no link is on the way to it.
fn open_beneath(root: &OwnedFd, name: impl AsRef<Path>) -> Result<OwnedFd, ImportError> {
    let name = name.as_ref();
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let opened = rustix::fs::openat2(root, name, PLACE, Mode::empty(), resolve);
    opened.map_err(|error| match error {
        rustix::io::Errno::LOOP | rustix::io::Errno::NOTDIR => ImportError::Request(format!(
            "the base has a link or a file where the directory /{} must be: nothing can be \
             installed on it",
            name.display()
        )),
        other => io_error("opening the scratch root's", name)(other.into()),
    })
}

fn by_descriptor(opened: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()))
}

fn relative(path: &str) -> &Path {
    Path::new(path.trim_start_matches('/'))
}

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    #[expect(
        deprecated,
        reason = "what is unsafe of it concerns descriptors, which are never parted with here"
    )]
    Ok(rustix::thread::unshare(flags)?)
}

/// The loopback, so that the host's name resolves to an address that is there, and its low
/// ports, which a build's root lacks the capability for. Scripts do without, too.
fn set_up_network() {
    let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    let _ = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// A user namespace in which `users` are 0 and on.
fn user_namespace(users: UserRange) -> Result<OwnedFd, ImportError> {
    let failed = || {
        io_error(
            "making a user namespace for builds (`sysctl user.max_user_namespaces` must not be 0) \
             with",
            "unshare",
        )
    };
    // It says a line once it is in a namespace of its own, and ends with its input.
    let spawned = Command::new("unshare")
        .args(["--user", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut helper = spawned.map_err(failed())?;
    let mut make = || -> io::Result<OwnedFd> {
        let (Some(input), Some(output)) = (&mut helper.stdin, &mut helper.stdout) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        input.write_all(b"\n")?;
        let mut line = String::new();
        if BufReader::new(output).read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let of = PathBuf::from(format!("/proc/{}", helper.id()));
        let map = format!("0 {} {}\n", users.first(), UserRange::COUNT);
        fs::write(of.join("uid_map"), &map)?;
        fs::write(of.join("gid_map"), &map)?;
        Ok(File::open(of.join("ns/user"))?.into())
    };
    let made = make();
    drop(helper.stdin.take());
    let ended = helper.wait();
    let made = made.map_err(failed())?;
    ended.map_err(failed())?;
    Ok(made)
}
