//! What the VM tests share: kernel, initramfs, component images, a guard that ends VMs.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use forelay_guest_protocol::config::VmConfig;
use forelay_image::component::ImageRef;
use forelay_image::erofs::merge::{ComposeOptions, Composed, Layer, MapLayout, compose};
use forelay_image::erofs::write::write_image;
use forelay_image::tree::{Attributes, FileData, Kind, Node, NodeId, ROOT, Tree};
use forelay_vm::qemu::QemuDriver;
use forelay_vm::{Boot, Disk, DiskFormat, PmemDevice, Progress, VmHandle, VmSpec, VmmDriver};

/// Time for anything a guest does; only hangs take that long.
pub const LIMIT: Duration = Duration::from_secs(240);

/// Modules the guest needs besides what they depend on, in load order.
const MODULES: [&str; 9] = [
    "virtio_pci",
    "virtio_pmem",
    "nd_pmem",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio_balloon",
    "erofs",
    "overlay",
];

/// Kernel, initramfs and busybox.
pub struct Assets {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub busybox: PathBuf,
}

/// The assets, or `None` after a loud line.
pub fn assets(test: &str) -> Option<&'static Assets> {
    static ASSETS: OnceLock<Result<Assets, String>> = OnceLock::new();
    match ASSETS.get_or_init(prepare) {
        Ok(assets) => Some(assets),
        Err(why) => {
            println!("SKIPPED {test}: {why}");
            None
        }
    }
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn prepare() -> Result<Assets, String> {
    run(Command::new("qemu-system-x86_64").arg("--version"))?;
    let cache = workspace().join("target/test-cache");
    std::fs::create_dir_all(&cache).map_err(|error| error.to_string())?;
    let cache = cache.canonicalize().map_err(|error| error.to_string())?;
    // Other crates' tests fill the same cache.
    let lock = std::fs::File::create(cache.join("lock")).map_err(|error| error.to_string())?;
    lock.lock().map_err(|error| error.to_string())?;
    let kernel_package =
        run(Command::new("apt-cache").args(["depends", "linux-image-cloud-amd64"]))?
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: ").map(str::to_owned))
            .ok_or("apt knows no cloud kernel: run apt-get update")?;
    let kernel_files = unpack(&cache, &kernel_package)?;
    let busybox = unpack(&cache, "busybox-static")?.join("bin/busybox");
    let version = kernel_package.trim_start_matches("linux-image-");
    let kernel = kernel_files.join(format!("boot/vmlinuz-{version}"));
    let guest = guest_binary()?;
    let initrd = cache.join(format!("vm-initrd-{}.cpio", std::process::id()));
    let modules = kernel_files.join("lib/modules").join(version);
    let archive = initramfs(&modules, &guest).map_err(|error| error.to_string())?;
    std::fs::write(&initrd, archive).map_err(|error| error.to_string())?;
    // Tests of one process share it; the next process replaces it under its own name.
    let stable = cache.join("vm-initrd.cpio");
    std::fs::rename(&initrd, &stable).map_err(|error| error.to_string())?;
    Ok(Assets {
        kernel,
        initrd: stable,
        busybox,
    })
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        ))
    }
}

/// Downloads and unpacks a Debian package once.
fn unpack(cache: &Path, package: &str) -> Result<PathBuf, String> {
    let target = cache.join(package);
    if target.exists() {
        return Ok(target);
    }
    let temporary = cache.join(format!("{package}.new"));
    let _ = std::fs::remove_dir_all(&temporary);
    std::fs::create_dir_all(&temporary).map_err(|error| error.to_string())?;
    run(Command::new("apt-get")
        .args(["-q", "download", package])
        .current_dir(&temporary))?;
    let entries = std::fs::read_dir(&temporary).map_err(|error| error.to_string())?;
    let package_file = entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .ok_or_else(|| format!("apt-get download {package} left no file"))?;
    run(Command::new("dpkg-deb")
        .arg("-x")
        .args([&package_file, &temporary]))?;
    let _ = std::fs::remove_file(package_file);
    std::fs::rename(&temporary, &target).map_err(|error| error.to_string())?;
    Ok(target)
}

/// The guest binary: `FORELAY_GUEST`, or built here.
fn guest_binary() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("FORELAY_GUEST") {
        return Ok(path.into());
    }
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| workspace().join("target"), PathBuf::from)
        .join("guest");
    let triple = "x86_64-unknown-linux-gnu";
    run(Command::new(env!("CARGO"))
        .args([
            "build",
            "--quiet",
            "-p",
            "forelay-guest",
            "--bin",
            "forelay-guest",
        ])
        .args(["--profile", "guest", "--target", triple, "--target-dir"])
        .arg(&target)
        .current_dir(workspace())
        .env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    Ok(target.join(triple).join("guest/forelay-guest"))
}

fn initramfs(modules: &Path, guest: &Path) -> std::io::Result<Vec<u8>> {
    let mut files = Vec::new();
    collect_modules(&modules.join("kernel"), &mut files)?;
    let mut order = Vec::new();
    for name in MODULES {
        add_module(name, &files, &mut order)?;
    }
    let directory = |name: &str| (entry(name, 0o040_755), Vec::new());
    let mut entries = vec![directory("modules"), directory("dev")];
    let mut list = String::new();
    for path in &order {
        let name = format!("modules/{}", path.file_name().unwrap().to_string_lossy());
        list.push_str(&format!("/{name}\n"));
        entries.push((entry(&name, 0o100_644), std::fs::read(path)?));
    }
    entries.push((entry("modules.list", 0o100_644), list.into_bytes()));
    entries.push((entry("init", 0o100_755), std::fs::read(guest)?));
    let entries = entries
        .into_iter()
        .map(|(builder, bytes)| (builder, std::io::Cursor::new(bytes)));
    cpio::write_cpio(entries, Vec::new())
}

fn entry(name: &str, mode: u32) -> cpio::NewcBuilder {
    cpio::NewcBuilder::new(name).mode(mode)
}

fn collect_modules(directory: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect_modules(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "ko") {
            files.push(path);
        }
    }
    Ok(())
}

/// Adds a module behind what its `depends=` names.
fn add_module(name: &str, files: &[PathBuf], order: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let normal = |text: &str| text.replace('-', "_");
    let stem = |path: &Path| normal(&path.file_stem().unwrap().to_string_lossy());
    let Some(path) = files.iter().find(|path| stem(path) == normal(name)) else {
        // Built into this kernel.
        return Ok(());
    };
    if order.contains(path) {
        return Ok(());
    }
    let bytes = std::fs::read(path)?;
    let key = b"\0depends=";
    let start = bytes
        .windows(key.len())
        .position(|window| window == key)
        .unwrap()
        + key.len();
    let depends = bytes[start..].split(|&byte| byte == 0).next().unwrap();
    for dependency in String::from_utf8_lossy(depends)
        .split(',')
        .filter(|name| !name.is_empty())
    {
        add_module(dependency, files, order)?;
    }
    order.push(path.clone());
    Ok(())
}

/// A regular file with this mode.
pub fn file(bytes: impl AsRef<[u8]>, mode: u16) -> Node {
    let kind = Kind::File(FileData::Bytes(bytes.as_ref().into()));
    Node {
        attributes: Attributes::with_mode(mode),
        kind,
    }
}

/// A symbolic link.
pub fn symlink(target: &str) -> Node {
    let kind = Kind::Symlink(target.as_bytes().to_vec());
    Node {
        attributes: Attributes::with_mode(0o777),
        kind,
    }
}

/// A root with busybox.
pub fn base_tree(assets: &Assets) -> Tree {
    let mut tree = Tree::new();
    let busybox = file(std::fs::read(&assets.busybox).unwrap(), 0o755);
    tree.insert_path(b"usr/bin/busybox", busybox).unwrap();
    for name in [
        "sh", "ls", "cat", "sleep", "mount", "dd", "httpd", "id", "touch", "df", "stat",
    ] {
        tree.insert_path(format!("usr/bin/{name}").as_bytes(), symlink("busybox"))
            .unwrap();
    }
    for (name, target) in [("bin", "usr/bin"), ("sbin", "usr/bin"), ("lib", "usr/lib")] {
        tree.insert_path(name.as_bytes(), symlink(target)).unwrap();
    }
    for directory in [
        "dev", "proc", "sys", "run", "tmp", "root", "opt", "usr/lib", "var",
    ] {
        tree.make_directories(directory.as_bytes()).unwrap();
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/:/bin/sh\n";
    tree.insert_path(b"etc/passwd", file(passwd, 0o644))
        .unwrap();
    tree.insert_path(b"etc/group", file("root:x:0:\nweb:x:33:\n", 0o644))
        .unwrap();
    tree.insert_path(b"etc/motd", file("from base\n", 0o644))
        .unwrap();
    tree
}

/// A minimal Debian with systemd, made once by mmdebstrap; `None` after a loud line.
pub fn systemd_root(test: &str) -> Option<PathBuf> {
    let made = || -> Result<PathBuf, String> {
        let cache = workspace().join("target/test-cache");
        let lock = std::fs::File::create(cache.join("lock")).map_err(|error| error.to_string())?;
        lock.lock().map_err(|error| error.to_string())?;
        let root = cache.join("systemd-root");
        if root.exists() {
            return Ok(root);
        }
        let temporary = cache.join("systemd-root.new");
        let _ = std::fs::remove_dir_all(&temporary);
        run(Command::new("mmdebstrap")
            .args([
                "--quiet",
                "--mode=root",
                "--variant=essential",
                "--include=systemd-sysv",
            ])
            .args(
                ["man", "doc", "locale"]
                    .map(|name| format!("--dpkgopt=path-exclude=/usr/share/{name}/*")),
            )
            .args(["--dpkgopt=force-unsafe-io", "bookworm"])
            .arg(&temporary))?;
        std::fs::rename(&temporary, &root).map_err(|error| error.to_string())?;
        Ok(root)
    };
    made().map_err(|why| println!("SKIPPED {test}: {why}")).ok()
}

/// The tree of a host directory, as it is.
pub fn directory_tree(directory: &Path) -> Tree {
    let mut tree = Tree::new();
    add_directory(&mut tree, ROOT, directory);
    tree
}

fn add_directory(tree: &mut Tree, parent: NodeId, directory: &Path) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let found = std::fs::symlink_metadata(&path).unwrap();
        let kind = if found.is_dir() {
            Kind::Directory(BTreeMap::new())
        } else if found.is_symlink() {
            let target = std::fs::read_link(&path).unwrap();
            Kind::Symlink(target.into_os_string().into_encoded_bytes())
        } else if found.is_file() {
            Kind::File(FileData::HostFile {
                path: path.clone(),
                offset: 0,
                len: found.len(),
            })
        } else {
            continue;
        };
        let mut attributes = Attributes::with_mode((found.mode() & 0o7777) as u16);
        (attributes.uid, attributes.gid) = (found.uid(), found.gid());
        attributes.mtime_s = found.mtime();
        let name = path.file_name().unwrap().as_encoded_bytes();
        let id = tree
            .insert(parent, name, Node { attributes, kind })
            .unwrap();
        if found.is_dir() {
            add_directory(tree, id, &path);
        }
    }
}

/// A component image on disk, padded as a pmem device.
pub struct Image {
    pub reference: ImageRef,
    pub metadata: Vec<u8>,
    pub device: PmemDevice,
}

impl Image {
    pub fn uuid(&self) -> String {
        self.reference.digest.hex()[..32].to_owned()
    }
}

/// A directory with a VM's files.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub driver: QemuDriver,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("forelay-vm-")
            .tempdir_in("/tmp")
            .unwrap();
        let driver = QemuDriver::new(workspace().join("target/test-cache"));
        Self { dir, driver }
    }

    fn store(&self, id: &str, bytes: &[u8]) -> PmemDevice {
        let path = self.dir.path().join(id);
        let padded = (bytes.len() as u64).next_multiple_of(2 << 20);
        // Read-only as on the daemon's mount, where even root cannot open for writing.
        let mut options = std::fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o440)
            .open(&path)
            .unwrap();
        file.write_all(bytes).unwrap();
        file.set_len(padded).unwrap();
        PmemDevice {
            id: id.to_owned(),
            path,
            bytes: padded,
        }
    }

    /// Writes a component image.
    pub fn image(&self, id: &str, tree: &Tree) -> Image {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let written = write_image(tree, &mut bytes).unwrap();
        let bytes = bytes.into_inner();
        let metadata = bytes[..written.image.metadata_bytes as usize].to_vec();
        Image {
            reference: written.image,
            metadata,
            device: self.store(id, &bytes),
        }
    }

    fn compose(&self, images: &[&Image], config: &VmConfig, layout: MapLayout) -> Composed {
        let layers: Vec<Layer<'_>> = images
            .iter()
            .map(|image| Layer {
                image: image.reference.digest,
                image_bytes: image.reference.bytes,
                metadata: &image.metadata,
                chunks: None,
                bundle: None,
            })
            .collect();
        let mut own = Tree::new();
        let json = serde_json::to_vec(config).unwrap();
        own.insert_path(b".forelay/vm.json", file(json, 0o600))
            .unwrap();
        compose(&layers, &own, ComposeOptions { layout }).unwrap()
    }

    /// A VM that boots from the merged images.
    pub fn spec(&self, assets: &Assets, images: &[&Image], config: &VmConfig) -> VmSpec {
        let composed = self.compose(images, config, MapLayout::Devices);
        let boot = Boot::Map {
            uuid: composed.digest.hex()[..32].to_owned(),
        };
        let mut spec = self.plain_spec(assets, boot);
        spec.pmem.push(self.store("map", &composed.map_image));
        // Not in slot order: the guest goes by UUID.
        spec.pmem
            .extend(images.iter().rev().map(|image| image.device.clone()));
        spec
    }

    /// A VM that boots from the same tree as one flat disk.
    pub fn flat_spec(&self, assets: &Assets, images: &[&Image], config: &VmConfig) -> VmSpec {
        let composed = self.compose(images, config, MapLayout::Flat);
        let path = self.dir.path().join("flat");
        let disk = std::fs::File::create(&path).unwrap();
        disk.write_all_at(&composed.map_image, 0).unwrap();
        for (device, image) in composed.devices.iter().zip(images) {
            let bytes = std::fs::read(&image.device.path).unwrap();
            disk.write_all_at(&bytes, u64::from(device.mapped_block) * 4096)
                .unwrap();
        }
        self.plain_spec(assets, Boot::Flat { path })
    }

    /// A VM that boots from a qcow2 overlay over an ext4 disk with the files of `directory`.
    pub fn root_spec(&self, assets: &Assets, directory: &Path) -> VmSpec {
        let disk = self.dir.path().join("root.ext4");
        let overlay = self.dir.path().join("root.qcow2");
        std::fs::File::create(&disk)
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
        run(Command::new("mkfs.ext4")
            .args(["-q", "-d"])
            .arg(directory)
            .arg(&disk))
        .unwrap();
        run(Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&disk, &overlay]))
        .unwrap();
        let boot = Boot::Root(Disk {
            path: overlay,
            format: DiskFormat::Qcow2,
            read_only: false,
        });
        self.plain_spec(assets, boot)
    }

    pub fn plain_spec(&self, assets: &Assets, boot: Boot) -> VmSpec {
        let mut spec = VmSpec::new("test", assets.kernel.clone(), assets.initrd.clone(), boot);
        spec.memory_mib = 256;
        spec.runtime_dir = self.dir.path().join("run");
        spec.console_log = self.dir.path().join("console.log");
        spec
    }

    /// Launches and waits until ready; the guard ends the VM.
    pub async fn ready(&self, spec: &VmSpec) -> Guard {
        let vm = Guard(self.driver.launch(spec).await.unwrap());
        vm.wait_ready(LIMIT)
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        vm
    }
}

/// Waits until the VM has come so far.
pub async fn reached(vm: &VmHandle, so_far: impl Fn(&Progress) -> bool) -> Progress {
    let mut progress = vm.watch();
    let found = tokio::time::timeout(LIMIT, progress.wait_for(so_far)).await;
    let console = || format!("in {LIMIT:?}; console:\n{}", vm.console_tail());
    found
        .unwrap_or_else(|_| panic!("{}", console()))
        .unwrap()
        .clone()
}

/// Kills the VM when a test ends or fails.
pub struct Guard(pub VmHandle);

impl std::ops::Deref for Guard {
    type Target = VmHandle;

    fn deref(&self) -> &VmHandle {
        &self.0
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}

/// Runs a shell command in the guest; gives its output, fails if it fails.
pub async fn sh(vm: &VmHandle, script: &str) -> String {
    let result = vm.exec(&["sh", "-c", script], LIMIT).await.unwrap();
    assert!(result.status.success(), "{script}: {result:?}");
    String::from_utf8(result.stdout).unwrap()
}
