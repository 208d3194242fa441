//! Installs the Debian packages that building components and booting VMs needs.
//!
//! Does nothing when every program is there already; without root it says what to
//! install and goes on, so that the tests that need none of it still run.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::process::{run, target_dir};

/// Programs and the packages that bring them, in installation order: `qemu-img` comes
/// after the emulator, whose version of it fits.
const NEEDED: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("mmdebstrap", "mmdebstrap"),
    ("fsck.erofs", "erofs-utils"),
    ("mkfs.ext4", "e2fsprogs"),
    ("cc", "gcc"),
    ("dpkg-deb", "dpkg"),
    ("unshare", "util-linux"),
    ("losetup", "mount"),
    ("ssh-keygen", "openssh-client"),
    ("skopeo", "skopeo"),
    ("umoci", "umoci"),
    ("buildah", "buildah"),
    ("docker-registry", "docker-registry"),
    ("busybox", "busybox-static"),
];

/// What the tests alone need beside those: what judges metrics, a terminal, a browser.
const OF_TESTS: &[(&str, &str)] = &[
    ("promtool", "prometheus"),
    ("tmux", "tmux"),
    ("chromium", "chromium"),
];

/// What `bench peers` compares with, beside those.
const PEERS: &[(&str, &str)] = &[
    ("nbdkit", "nbdkit"),
    ("zstd", "zstd"),
    ("cpio", "cpio"),
    ("busybox", "busybox-static"),
];

/// The S3 server of the tests, and what of it that takes, from PyPI.
const S3_SERVER: [&str; 3] = ["moto[s3]==5.2.5", "flask", "flask-cors"];

/// What drives the browser, and what judges how accessible pages are, from PyPI.
const BROWSER: [&str; 2] = ["playwright==1.65.2", "axe-playwright-python==0.1.8"];

/// Installs whatever is missing.
pub fn install() -> Result<()> {
    install_missing(NEEDED)
}

/// Installs what the tests alone need.
pub fn install_for_tests() -> Result<()> {
    install_missing(OF_TESTS)?;
    install_s3_server();
    install_python("browser", "bin/playwright", &BROWSER);
    Ok(())
}

/// Installs moto.
pub fn install_s3_server() {
    install_python("moto", "bin/moto_server", &S3_SERVER);
}

/// Installs Python packages in a virtual environment below `target`; without Python or the network
/// the tests that need them are skipped.
fn install_python(name: &str, program: &str, packages: &[&str]) {
    let dir = target_dir().join("test-cache").join(name);
    if dir.join(program).exists() {
        return;
    }
    let python = dir.join("bin/python");
    let make = Command::new("python3")
        .arg("-m")
        .arg("venv")
        .arg(&dir)
        .status();
    let mut pip = Command::new(&python);
    pip.args(["-m", "pip", "install", "--quiet", "--no-compile"]);
    let installed = make.is_ok_and(|status| status.success())
        && pip
            .args(packages)
            .status()
            .is_ok_and(|status| status.success());
    if !installed {
        eprintln!(
            "NOT INSTALLED: {}. Tests that need them are skipped.",
            packages.join(", ")
        );
        let _ = std::fs::remove_dir_all(&dir);
    }
}

/// Installs what of the peers is missing.
pub fn install_peers() -> Result<()> {
    install_missing(PEERS)
}

fn install_missing(needed: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> = needed
        .iter()
        .filter(|(program, _)| !on_path(program))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    if !is_root() || !on_path("apt-get") {
        eprintln!(
            "NOT INSTALLED: {}. Tests that need them are skipped; install them as root with \
             `apt-get install {}`.",
            packages.join(", "),
            packages.join(" ")
        );
        return Ok(());
    }
    run(apt().arg("update").arg("-qq"))?;
    for package in packages {
        // One at a time: a preinstalled qemu-img of another release gives way to the
        // emulator's, and is then replaced by the one that fits it.
        run(apt()
            .args(["install", "-qq", "-y", "--no-install-recommends"])
            .arg(package))?;
    }
    // The emulator's installation may have removed a qemu-img that was there at the start.
    if !on_path("qemu-img") {
        run(apt().args([
            "install",
            "-qq",
            "-y",
            "--no-install-recommends",
            "qemu-utils",
        ]))?;
    }
    Ok(())
}

/// True if this process runs as root.
pub fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|metadata| {
        use std::os::unix::fs::MetadataExt as _;
        metadata.uid() == 0
    })
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let sbin = ["/usr/sbin", "/sbin"].map(Path::new);
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
        || sbin.iter().any(|dir| dir.join(program).is_file())
}
