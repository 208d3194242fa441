//! A VMM that somebody else starts, confined: what it needs, and what it is lent.
//!
//! Nothing in the runtime directory is the VMM's but its console's log and its scratch disk:
//! the sockets are made here and inherited, so that nobody who connects to one can be led
//! elsewhere. How a VMM is confined is the caller's part ([`Confined::spawn`]).

use std::fmt;
use std::fs::Permissions;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;

use crate::accelerator::Accelerator;
use crate::qemu::command_line::{CHANNEL_SOCKET, CONSOLE_SOCKET, MONITOR_SOCKET};
use crate::spec::{Boot, GuestMemory, Upper, VmSpec};

/// QEMU's own filter of system calls.
pub(crate) const SANDBOX: &str =
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// Where a process finds its descriptors.
const INHERITED: &str = "/proc/self/fd";
/// Where programs are, for a VMM that is a script.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Starts a VMM's command with what it needs, and with nothing else.
pub type Spawn = dyn Fn(&mut Command, VmmNeeds) -> io::Result<Child> + Send + Sync;

/// How a VMM is confined.
#[derive(Clone)]
pub struct Confined {
    /// Its user, and its only group.
    pub user: u32,
    /// Starts it.
    pub spawn: Arc<Spawn>,
}

impl Confined {
    /// Lends the VMM's user what it needs and makes its sockets.
    pub(crate) fn prepare(&self, spec: &VmSpec) -> Result<Sockets, (PathBuf, io::Error)> {
        lend(spec, self.user)?;
        Sockets::make(spec)
    }
}

impl fmt::Debug for Confined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut confined = f.debug_struct("Confined");
        confined.field("user", &self.user).finish_non_exhaustive()
    }
}

/// What of the host a VMM needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmmNeeds {
    /// Files that it reads.
    pub read: Vec<PathBuf>,
    /// Files that it opens for writing, and the runtime directory.
    pub write: Vec<PathBuf>,
    /// Devices.
    pub devices: Vec<PathBuf>,
    /// Descriptors that it inherits.
    pub fds: Vec<RawFd>,
}

impl VmmNeeds {
    /// Those of a VM, its sockets aside.
    pub fn of(spec: &VmSpec, accelerator: Accelerator) -> Self {
        let mut needs = Self {
            write: vec![spec.runtime_dir.clone(), spec.console_log.clone()],
            ..Self::default()
        };
        match &spec.memory {
            GuestMemory::Private => {}
            GuestMemory::Shared { path }
            | GuestMemory::Snapshot { path }
            | GuestMemory::Saved { path, .. } => match inherited(path) {
                Some(fd) => needs.fds.push(fd),
                None => needs.write.push(path.clone()),
            },
        }
        if !spec.memory.is_restored() {
            needs
                .read
                .extend([spec.kernel.clone(), spec.initrd.clone()]);
        }
        needs
            .read
            .extend(spec.pmem.iter().map(|device| device.path.clone()));
        match &spec.boot {
            Boot::Map { .. } => {}
            Boot::Flat { path } => needs.read.push(path.clone()),
            Boot::Root(disk) => needs.write.push(disk.path.clone()),
        }
        if let Upper::Scratch { path, .. } = &spec.upper {
            needs.write.push(path.clone());
        }
        for disk in &spec.disks {
            let disks = if disk.read_only {
                &mut needs.read
            } else {
                &mut needs.write
            };
            disks.push(disk.path.clone());
        }
        if accelerator == Accelerator::Kvm {
            needs.devices.push("/dev/kvm".into());
        }
        needs
    }
}

/// Names a descriptor of ours, which a file without a name is, as the VMM does that inherits it.
pub(crate) fn inherit_memory(spec: &mut VmSpec) {
    if let GuestMemory::Shared { path }
    | GuestMemory::Snapshot { path }
    | GuestMemory::Saved { path, .. } = &mut spec.memory
        && let Ok(descriptor) = path.strip_prefix(format!("/proc/{}/fd", std::process::id()))
    {
        *path = Path::new(INHERITED).join(descriptor);
    }
}

/// The descriptor of ours that a path names for a VMM that inherits it.
fn inherited(path: &Path) -> Option<RawFd> {
    path.strip_prefix(INHERITED).ok()?.to_str()?.parse().ok()
}

fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    std::fs::set_permissions(path, Permissions::from_mode(mode))
}

fn to_group(path: &Path, group: u32, mode: u32) -> io::Result<()> {
    std::os::unix::fs::lchown(path, None, Some(group))?;
    set_mode(path, mode)
}

/// Lets the VMM's user read a file of a device. Those of the domain's mount are its group's
/// already.
pub(crate) fn lend_file(path: &Path, user: u32) -> io::Result<()> {
    let found = std::fs::metadata(path)?;
    if found.gid() == user && found.mode() & 0o040 != 0 {
        return Ok(());
    }
    to_group(path, user, 0o640)
}

/// Lets the VMM's user read what is made for it, and write what is its own: in the runtime
/// directory of this VM, which must be visible to it. What all VMs boot from is a component's, no
/// secret, and is opened to all.
pub fn lend(spec: &VmSpec, user: u32) -> Result<(), (PathBuf, io::Error)> {
    let lent = |path: &Path, done: io::Result<()>| done.map_err(|error| (path.to_owned(), error));
    lent(&spec.runtime_dir, to_group(&spec.runtime_dir, user, 0o710))?;
    for device in &spec.pmem {
        lent(&device.path, lend_file(&device.path, user))?;
    }
    let own = |path: &Path| {
        std::os::unix::fs::lchown(path, Some(user), Some(user)).and_then(|()| set_mode(path, 0o600))
    };
    let mut console = std::fs::File::options();
    let opened = console.append(true).create(true).open(&spec.console_log);
    lent(
        &spec.console_log,
        opened.and_then(|_| own(&spec.console_log)),
    )?;
    if let Upper::Scratch { path, .. } = &spec.upper
        && path.exists()
    {
        lent(path, own(path))?;
    }
    if spec.memory.is_restored() {
        return Ok(());
    }
    for path in [&spec.kernel, &spec.initrd] {
        let open = || {
            let mode = std::fs::metadata(path)?.permissions().mode();
            if mode & 0o004 == 0 {
                set_mode(path, mode | 0o444)?;
            }
            Ok(())
        };
        lent(path, open())?;
    }
    Ok(())
}

/// Numbers of the sockets that a VMM inherits instead of making its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listening {
    /// The monitor's.
    pub monitor: RawFd,
    /// The guest channel's.
    pub channel: RawFd,
    /// The console's.
    pub console: RawFd,
}

/// The sockets of a VMM, until it has inherited them.
pub(crate) struct Sockets {
    monitor: UnixListener,
    channel: UnixListener,
    console: UnixListener,
    /// For a clone: the VMM's end of where its state comes from, and ours.
    state: Option<(UnixStream, UnixStream)>,
}

/// Where a clone's state goes: the VMM's number of its end, and ours.
#[derive(Debug)]
pub struct Incoming {
    pub(crate) theirs: RawFd,
    pub(crate) ours: OwnedFd,
}

impl Sockets {
    /// Makes them in the runtime directory, where there are none.
    pub fn make(spec: &VmSpec) -> Result<Self, (PathBuf, io::Error)> {
        let listen = |name: &str| {
            let path = spec.runtime_dir.join(name);
            UnixListener::bind(&path).map_err(|error| (path, error))
        };
        let state = match spec.memory {
            GuestMemory::Snapshot { .. } | GuestMemory::Saved { .. } => {
                let pair = UnixStream::pair();
                Some(pair.map_err(|error| (spec.runtime_dir.clone(), error))?)
            }
            GuestMemory::Private | GuestMemory::Shared { .. } => None,
        };
        Ok(Self {
            monitor: listen(MONITOR_SOCKET)?,
            channel: listen(CHANNEL_SOCKET)?,
            console: listen(CONSOLE_SOCKET)?,
            state,
        })
    }

    /// Their numbers.
    pub fn numbers(&self) -> Listening {
        Listening {
            monitor: self.monitor.as_raw_fd(),
            channel: self.channel.as_raw_fd(),
            console: self.console.as_raw_fd(),
        }
    }

    /// All that are inherited.
    pub fn inherited(&self) -> impl Iterator<Item = RawFd> {
        let sockets = self.numbers();
        let state = self.state.as_ref().map(|(theirs, _)| theirs.as_raw_fd());
        [sockets.monitor, sockets.channel, sockets.console]
            .into_iter()
            .chain(state)
    }

    /// The VMM has them; what stays here is where a clone's state goes.
    pub fn leave(self) -> Option<Incoming> {
        let (theirs, ours) = self.state?;
        Some(Incoming {
            theirs: theirs.as_raw_fd(),
            ours: ours.into(),
        })
    }
}
