//! What a VM consists of, independent of the VMM.
//!
//! Invariants checked by [`VmSpec::validate`]: device ids are unique and plain, pmem sizes
//! are multiples of 2 MiB (the guest maps them with huge pages, the VMM insists), socket
//! paths fit `sun_path`.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use forelay_guest_protocol::snapshot::Tier;
use serde::{Deserialize, Serialize};

use crate::confined::{Confined, Listening};
use crate::saved::SavedMachine;

/// Sizes of pmem devices are multiples of this.
pub const PMEM_ALIGN_BYTES: u64 = 2 << 20;

/// Longest path of a Unix socket.
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// A VM to launch.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// Name for people and for the VMM's process title.
    pub name: String,
    /// Size of the guest's memory.
    pub memory_mib: u32,
    /// Where that memory lies.
    pub memory: GuestMemory,
    /// The host's kernel may keep pages of its memory once that are the same as others'.
    pub mergeable: bool,
    /// Where the boot is held for a snapshot; for a clone, where its maker was.
    pub hold: Option<Tier>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Kernel: a bzImage, or an ELF image with a PVH entry (faster to boot).
    pub kernel: PathBuf,
    /// Initramfs with the guest init.
    pub initrd: PathBuf,
    /// More words for the kernel command line.
    pub append: Vec<String>,
    /// What the root comes from.
    pub boot: Boot,
    /// pmem devices in order; with [`Boot::Map`] the map image and one per component.
    pub pmem: Vec<PmemDevice>,
    /// Where the root's writes go.
    pub upper: Upper,
    /// TCP ports of the host that lead into the guest.
    pub forwards: Vec<Forward>,
    /// False leaves the VM without a network device.
    pub network: bool,
    /// What the guest can connect to through it.
    pub reach: Reach,
    /// Serial console log, appended to.
    pub console_log: PathBuf,
    /// Directory for sockets and the state file; made if missing.
    pub runtime_dir: PathBuf,
    /// More disks, in order `/dev/vda`, `/dev/vdb` and so on.
    pub disks: Vec<Disk>,
    /// Address space kept free for hot-plugged pmem; 0 if none will be.
    pub hotplug_bytes: u64,
    /// Applied to the VMM's command just before it starts.
    pub wrap: Option<Wrap>,
    /// Whose pages its VMM may map; VMMs of one trust domain run as one user.
    pub trust_domain: String,
    /// Who starts the VMM's command, with what it may reach; by itself it may reach anything.
    pub confined: Option<Confined>,
    /// Sockets that the VMM inherits; it makes its own if there are none.
    pub listening: Option<Listening>,
}

impl VmSpec {
    /// A VM with 512 MiB and one CPU and no devices.
    pub fn new(name: impl Into<String>, kernel: PathBuf, initrd: PathBuf, boot: Boot) -> Self {
        let name = name.into();
        let runtime_dir = PathBuf::from("/run/forelay/vms").join(&name);
        Self {
            memory_mib: 512,
            memory: GuestMemory::Private,
            mergeable: false,
            hold: None,
            cpus: 1,
            kernel,
            initrd,
            append: Vec::new(),
            boot,
            pmem: Vec::new(),
            upper: Upper::Tmpfs,
            forwards: Vec::new(),
            network: true,
            reach: Reach::Host,
            console_log: runtime_dir.join("console.log"),
            runtime_dir,
            disks: Vec::new(),
            hotplug_bytes: 16 << 30,
            wrap: None,
            trust_domain: String::new(),
            confined: None,
            listening: None,
            name,
        }
    }

    /// Checks what no VMM could run; the error says what to change.
    pub fn validate(&self) -> Result<(), String> {
        let plain = |id: &str| {
            !id.is_empty()
                && id.len() <= 64
                && id
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        if !plain(&self.name) {
            return Err(format!(
                "the VM name {:?} is not 1 to 64 letters, digits, `-`, `_`, `.`",
                self.name
            ));
        }
        if self.cpus == 0 || self.memory_mib < 64 {
            return Err("a VM needs at least 1 CPU and 64 MiB".to_owned());
        }
        let mut ids = BTreeSet::new();
        for device in &self.pmem {
            device.validate()?;
            if !ids.insert(&device.id) {
                return Err(format!("two pmem devices are called {:?}", device.id));
            }
        }
        self.validate_hold()?;
        let socket = self.runtime_dir.join("console.sock");
        if socket.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
            return Err(format!(
                "{} is longer than the {MAX_SOCKET_PATH_BYTES} bytes a Unix socket path may \
                 have: use a shorter runtime directory",
                socket.display()
            ));
        }
        Ok(())
    }
}

impl VmSpec {
    fn validate_hold(&self) -> Result<(), String> {
        let has_image = !self.pmem.is_empty();
        if let GuestMemory::Saved { machine, .. } = &self.memory {
            machine
                .hotplugged
                .iter()
                .try_for_each(|one| one.device.validate())?;
            return match (machine.hold == self.hold, has_image) {
                (true, true) => Ok(()),
                _ => Err("a VM that was saved needs the machine that it was saved on".to_owned()),
            };
        }
        match (self.hold, &self.memory) {
            (Some(Tier::Kernel), _) if has_image => {
                Err("a VM that is held without an image gets its devices later".to_owned())
            }
            (None, _) | (Some(Tier::Composed | Tier::Ready), _)
                if matches!(self.boot, Boot::Map { .. }) && !has_image =>
            {
                Err("a VM that boots from a map image needs its pmem device".to_owned())
            }
            (None, GuestMemory::Shared { .. } | GuestMemory::Snapshot { .. }) => {
                Err("a snapshot's VM needs the tier at which it is held".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// Where a VM's memory lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestMemory {
    /// With the VMM alone.
    Private,
    /// In a file that is made (sparse) for it: of a VM from which a snapshot is made.
    Shared {
        /// The file, on a tmpfs.
        path: PathBuf,
    },
    /// A copy on write of a snapshot's memory. The VMM waits for the rest of the snapshot
    /// ([`crate::VmHandle::restore`]).
    Snapshot {
        /// The file.
        path: PathBuf,
    },
    /// The same of a VM that was saved while it ran ([`crate::VmHandle::restore_whole`]).
    Saved {
        /// The file.
        path: PathBuf,
        /// What it was saved on.
        machine: Box<SavedMachine>,
    },
}

impl GuestMemory {
    /// Whether the VMM waits for a state, and needs no kernel.
    pub(crate) fn is_restored(&self) -> bool {
        matches!(self, Self::Snapshot { .. } | Self::Saved { .. })
    }
}

/// What the root comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Boot {
    /// The map image with this UUID (32 hex digits), on a pmem device.
    Map {
        /// UUID of the map image.
        uuid: String,
    },
    /// A flat image on a disk: for guests without pmem.
    Flat {
        /// The image file.
        path: PathBuf,
    },
    /// A disk with an ext4 root, writable: what VMs without Forelay use.
    Root(Disk),
}

/// A pmem device: a file mapped read-only and shared into the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemDevice {
    /// Name, unique in the VM: letters, digits, `-`, `_`, `.`.
    pub id: String,
    /// The file.
    pub path: PathBuf,
    /// Its size, a multiple of [`PMEM_ALIGN_BYTES`].
    pub bytes: u64,
}

impl PmemDevice {
    /// Checks id and size.
    pub fn validate(&self) -> Result<(), String> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if self.id.is_empty() || self.id.len() > 100 || !self.id.bytes().all(plain) {
            return Err(format!(
                "the device id {:?} is not 1 to 100 letters, digits, `-`, `_`, `.`",
                self.id
            ));
        }
        if self.bytes == 0 || !self.bytes.is_multiple_of(PMEM_ALIGN_BYTES) {
            return Err(format!(
                "pmem device {}: {} bytes are not a multiple of 2 MiB",
                self.id, self.bytes
            ));
        }
        Ok(())
    }
}

/// Where the root's writes go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Upper {
    /// Guest memory; gone with the VM.
    Tmpfs,
    /// An ext4 file on the host; made (sparse) if missing.
    Scratch {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
}

/// What a guest can connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// What the host can, its own loopback included: the gateway's address leads there.
    Host,
    /// What the host can, but not the host's loopback. The VMM lets a guest connect to anything:
    /// the one who confines it sees to that.
    Network,
    /// Nothing; ports of the host still lead into the guest.
    Nothing,
}

/// A TCP port of the host that leads into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// Port on 127.0.0.1 of the host.
    pub host: u16,
    /// Port in the guest.
    pub guest: u16,
    /// UDP instead of TCP.
    #[serde(default)]
    pub udp: bool,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// Not writable by the guest.
    pub read_only: bool,
}

/// Format of a disk file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// Plain bytes.
    Raw,
    /// qcow2, possibly with a backing file.
    Qcow2,
}

/// Changes the VMM's command before it starts (seccomp, session, cgroup, limits).
#[derive(Clone)]
pub struct Wrap(pub Arc<dyn Fn(&mut Command) + Send + Sync>);

impl fmt::Debug for Wrap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wrap")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        let boot = Boot::Map {
            uuid: "0".repeat(32),
        };
        let mut spec = VmSpec::new("vm-1", "/k".into(), "/i".into(), boot);
        let device = PmemDevice {
            id: "map".into(),
            path: "/m".into(),
            bytes: PMEM_ALIGN_BYTES,
        };
        spec.pmem.push(device);
        spec
    }

    #[test]
    fn bad_specs_are_refused_with_what_to_change() {
        assert_eq!(spec().validate(), Ok(()));
        type Change = fn(&mut VmSpec);
        let cases: [(Change, &str); 8] = [
            (|spec| spec.hold = Some(Tier::Kernel), "later"),
            (
                |spec| spec.memory = GuestMemory::Shared { path: "/m".into() },
                "tier",
            ),
            (|spec| spec.name = "a,b".into(), "name"),
            (|spec| spec.cpus = 0, "CPU"),
            (|spec| spec.pmem[0].bytes += 4096, "2 MiB"),
            (|spec| spec.pmem.push(spec.pmem[0].clone()), "two pmem"),
            (|spec| spec.pmem.clear(), "pmem device"),
            (
                |spec| spec.runtime_dir = format!("/{}", "x".repeat(100)).into(),
                "shorter",
            ),
        ];
        for (change, word) in cases {
            let mut bad = spec();
            change(&mut bad);
            let text = bad.validate().unwrap_err();
            assert!(text.contains(word), "{text}");
        }
    }
}
