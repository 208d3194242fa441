//! A peer that shares a directory of the host with its guest: virtiofsd over a local tree.
//!
//! Its guest boots with the kernel and the modules of the others from an initramfs of its own:
//! modules, mount, an overlay for writes, and the service, with nothing else in the way.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::disk::{Disks, drop_from_page_cache, tempdir};
use super::line::terminate;
use super::{PORT, Served, page};
use crate::bench::boot::WebBench;
use crate::process::{output, run_quiet};

const PROGRAM: &str = "/usr/lib/qemu/virtiofsd";

/// Puts the initramfs `$2` of the composed image, with another init and the modules that it
/// lacks (from the kernel's package), to `$1/initrd`.
const MAKE_INITRD: &str = r#"
rm -rf "$1"; mkdir -p "$1/root/bin" "$1/root/virtiofs" "$1/package"
cd "$1/root"
cpio -idm --quiet < "$2"
cp /bin/busybox bin/busybox
release=$(ls lib/modules)
(cd "$1/package" && apt-get -q download "linux-image-$release" && dpkg-deb -x linux-image-*.deb .) >&2
for m in fuse virtiofs; do cp "$(find "$1/package" -name "$m.ko" | head -n 1)" "virtiofs/$m.ko"; done
cat > init <<'INIT'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys; $b mount -t devtmpfs dev /dev
while read m; do $b insmod "/$m"; done < /modules.list
$b insmod /virtiofs/fuse.ko; $b insmod /virtiofs/virtiofs.ko
$b mkdir -p /lower /upper /root
$b mount -t virtiofs -o ro root /lower
$b mount -t tmpfs upper /upper; $b mkdir /upper/data /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work root /root
$b ip link set lo up; $b ip addr add 10.0.2.15/24 dev eth0; $b ip link set eth0 up
$b mount -o bind /dev /root/dev; $b mount -o bind /proc /root/proc; $b mount -t tmpfs run /root/run
exec $b chroot /root /usr/sbin/nginx -g 'daemon off;'
INIT
chmod 755 init
find . | cpio -o -H newc --quiet > "$1/initrd"
rm -rf "$1/package"
"#;

/// The image's files in a directory.
pub struct SharedTree {
    image: PathBuf,
    tree: PathBuf,
    initrd: PathBuf,
    /// Machine, accelerator, CPU and kernel of the peers from a disk.
    machine: Vec<String>,
}

impl SharedTree {
    /// Mounts the tree of `disks` and makes the guest's initramfs.
    pub fn make(_bench: &WebBench, disks: &Disks) -> Result<Self> {
        let shared = Self {
            image: disks.path("root.raw"),
            tree: disks.path("shared-tree"),
            initrd: disks.path("virtiofs/initrd"),
            machine: machine(disks)?,
        };
        std::fs::create_dir_all(&shared.tree)?;
        shared.mount()?;
        output(
            Command::new("sh")
                .args(["-euc", MAKE_INITRD, "sh"])
                .arg(disks.path("virtiofs"))
                .arg(disks.path("composed/initrd")),
        )?;
        shared.boot(true)?;
        Ok(shared)
    }

    /// The mounted tree.
    pub fn path(&self) -> &Path {
        &self.tree
    }

    fn mount(&self) -> Result<()> {
        // The page cache of the files alone, not of the disk below them too.
        run_quiet(
            Command::new("mount")
                .args(["-o", "ro,loop,noatime"])
                .arg(&self.image)
                .arg(&self.tree),
        )
    }

    fn unmount(&self) -> Result<()> {
        run_quiet(Command::new("umount").arg(&self.tree))
    }

    /// Boots once.
    pub fn boot(&self, warm: bool) -> Result<Served> {
        if !warm {
            self.unmount()?;
            drop_from_page_cache(&self.image)?;
            self.mount()?;
        }
        let scratch = tempdir()?;
        let asked = Instant::now();
        let mut vm = self.start(&scratch, Some(PORT), 256)?;
        let page_s = page::wait(PORT, asked, || vm.failed())?;
        let cpu_s = vm.cpu_s();
        vm.end()?;
        let _ = std::fs::remove_dir_all(&scratch);
        Ok(Served {
            page_s,
            cpu_s,
            ..Served::default()
        })
    }

    /// Starts a VM that lives until it is ended.
    pub fn start(&self, scratch: &Path, port: Option<u16>, memory_mib: u64) -> Result<SharingVm> {
        let socket = scratch.join("virtiofs.sock");
        let _ = std::fs::remove_file(&socket);
        let server = Command::new(PROGRAM)
            .arg(format!("--socket-path={}", socket.display()))
            .arg("-o")
            .arg(format!("source={},cache=always", self.tree.display()))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(scratch.join("virtiofsd.log"))?)
            .spawn()
            .context("cannot start virtiofsd")?;
        let mut vm = SharingVm {
            server,
            vmm: None,
            console: scratch.join("console.log"),
        };
        let started = Instant::now();
        while !socket.exists() {
            ensure!(
                started.elapsed() < Duration::from_secs(10),
                "virtiofsd does not serve"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        let forward = port.map_or_else(String::new, |port| {
            format!(",hostfwd=tcp:127.0.0.1:{port}-:80")
        });
        let vmm = Command::new("qemu-system-x86_64")
            .args(&self.machine)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-m", &format!("{memory_mib}M")])
            .arg("-object")
            .arg(format!("memory-backend-memfd,id=ram,size={memory_mib}M,share=on"))
            .args(["-numa", "node,memdev=ram", "-initrd"])
            .arg(&self.initrd)
            .args(["-append", "console=ttyS0 quiet panic=-1 net.ifnames=0 random.trust_cpu=on \
                   swiotlb=noforce no_timer_check cryptomgr.notests mitigations=off noreplace-smp tsc=reliable"])
            .arg("-serial")
            .arg(format!("file:{}", vm.console.display()))
            .args(["-chardev", &format!("socket,id=fs,path={}", socket.display())])
            .args(["-device", "vhost-user-fs-pci,chardev=fs,tag=root,queue-size=1024"])
            .args(["-netdev", &format!("user,id=network,ipv6=off{forward}")])
            .args(["-device", "virtio-net-pci,netdev=network,romfile="])
            .args(["-device", "virtio-rng-pci"])
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start QEMU")?;
        vm.vmm = Some(vmm);
        Ok(vm)
    }
}

impl Drop for SharedTree {
    fn drop(&mut self) {
        let _ = self.unmount();
    }
}

/// A VM and its virtiofsd; they end with this.
pub struct SharingVm {
    server: Child,
    vmm: Option<Child>,
    console: PathBuf,
}

impl SharingVm {
    fn failed(&mut self) -> Option<String> {
        let status = self.vmm.as_mut()?.try_wait().ok().flatten()?;
        let console = std::fs::read_to_string(&self.console).unwrap_or_default();
        Some(format!("{status}\n{console}"))
    }

    /// Pids of the VMM and of virtiofsd, which runs as parent and child.
    pub fn pids(&self) -> Vec<u64> {
        let vmm = self.vmm.as_ref().map(|vmm| u64::from(vmm.id()));
        let servers = crate::cpu::family(u64::from(self.server.id()));
        vmm.into_iter().chain(servers).collect()
    }

    fn cpu_s(&self) -> f64 {
        self.pids()
            .into_iter()
            .filter_map(crate::cpu::of_process)
            .sum()
    }

    /// Waits until its service answers within the guest, by its console.
    pub fn end(mut self) -> Result<()> {
        if let Some(vmm) = &mut self.vmm {
            terminate(vmm)?;
        }
        // It ends with its VMM.
        self.server
            .wait()
            .map(drop)
            .context("virtiofsd does not end")
    }
}

impl Drop for SharingVm {
    fn drop(&mut self) {
        if let Some(vmm) = &mut self.vmm {
            let _ = vmm.kill();
            let _ = vmm.wait();
        }
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// The options of a QEMU that boots from a disk which say what machine it is.
fn machine(disks: &Disks) -> Result<Vec<String>> {
    let overlay = disks.path("overlay.qcow2");
    crate::bench::disks::make_overlay(&disks.path("root.qcow2"), &overlay)?;
    let mut vm = disks.start(&overlay, None, 256)?;
    let pid = vm.ready()?["pid"]
        .as_u64()
        .context("a running VM has a pid")?;
    let line = std::fs::read(format!("/proc/{pid}/cmdline"))?;
    vm.end()?;
    let words = line.split(|&byte| byte == 0);
    let words: Vec<String> = words
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    let mut machine = Vec::new();
    for option in ["-M", "-accel", "-cpu", "-smp", "-kernel"] {
        let at = words.iter().position(|word| word == option);
        let Some(value) = at.and_then(|at| words.get(at + 1)) else {
            bail!("QEMU runs without {option}");
        };
        machine.extend([option.to_owned(), value.clone()]);
    }
    Ok(machine)
}
