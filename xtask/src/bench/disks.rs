//! Composed images as plain files and disks, to compare with: mounted by the host's own
//! EROFS, and as qcow2 images with the same files in ext4.
//!
//! Mounts are made in a mount namespace of their own and loop devices are given back.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::host::Host;
use crate::process::{output, run, run_quiet, target_dir};

/// Mounts the composed image `$1` at `$1/tree`.
const MOUNT: &str = r#"
options=ro
loops=
trap 'cd /; umount "$1/tree" 2>/dev/null || true; for d in $loops; do losetup -d "$d"; done' EXIT
n=1
while [ -e "$1/$n.img" ]; do
  d=$(losetup --find --show --read-only "$1/$n.img")
  loops="$loops $d"; options="$options,device=$d"; n=$((n + 1))
done
map=$(losetup --find --show --read-only "$1/map.img")
loops="$loops $map"
mkdir -p "$1/tree"
mount -t erofs -o "$options" "$map" "$1/tree"
"#;

/// Copies the mounted tree into the ext4 image `$2`.
const COPY_TO_EXT4: &str = r#"
kib=$(du -sk "$1/tree" | cut -f1)
rm -f "$2"
truncate -s "$((kib * 3 / 2 + 131072))K" "$2"
mkfs.ext4 -q -F -d "$1/tree" "$2"
"#;

/// Writes a manifest's composed image as files to `layout`.
pub fn compose(host: &Host, manifest: &Path, layout: &Path) -> Result<()> {
    let mut compose = host.forelay(["compose", "--emit", "files", "--out"]);
    output(compose.arg(layout).arg(manifest)).map(drop)
}

/// A shell that runs `script` with the image in `layout` mounted at `$1/tree`.
pub fn in_tree(layout: &Path, script: &str) -> Command {
    let mut shell = Command::new("unshare");
    let script = format!("{MOUNT}{script}");
    shell
        .args(["--mount", "sh", "-euc", &script, "sh"])
        .arg(layout);
    shell
}

/// Makes a disk with an ext4 file system of the image in `layout`.
pub fn make_raw(layout: &Path, raw: &Path) -> Result<()> {
    run(in_tree(layout, COPY_TO_EXT4).arg(raw))
}

/// Makes a qcow2 image, for backing files, of the image in `layout`.
pub fn make_qcow2(layout: &Path, image: &Path) -> Result<()> {
    let raw = image.with_extension("raw");
    make_raw(layout, &raw)?;
    run_quiet(
        Command::new("qemu-img")
            .args(["convert", "-O", "qcow2"])
            .arg(&raw)
            .arg(image),
    )?;
    Ok(std::fs::remove_file(&raw)?)
}

/// Makes an empty qcow2 overlay on the qcow2 image `backing`.
pub fn make_overlay(backing: &Path, overlay: &Path) -> Result<()> {
    make_overlay_of(&backing.to_string_lossy(), "qcow2", overlay)
}

/// Makes an empty qcow2 overlay on what QEMU finds at `backing`.
pub fn make_overlay_of(backing: &str, format: &str, overlay: &Path) -> Result<()> {
    run_quiet(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", format, "-b", backing])
            .arg(overlay),
    )
}

/// The root file system of a manifest as a qcow2 image, with an overlay for each boot.
pub struct PlainDisk {
    dir: PathBuf,
    boot_disk: PathBuf,
}

impl PlainDisk {
    /// Makes it in `target/bench/NAME`.
    pub fn make(host: &Host, manifest: &Path, name: &str) -> Result<Self> {
        let dir = target_dir().join("bench").join(name);
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir)?;
        let boot_disk = super::build_example("forelay-vm", "boot_disk")?;
        let disk = Self { dir, boot_disk };
        compose(host, manifest, &disk.composed())?;
        make_qcow2(&disk.composed(), &disk.backing())?;
        Ok(disk)
    }

    fn composed(&self) -> PathBuf {
        self.dir.join("composed")
    }

    /// The image below the overlays.
    pub fn backing(&self) -> PathBuf {
        self.dir.join("root.qcow2")
    }

    /// Boots a VM from a new overlay; what it took.
    pub fn boot(&self) -> Result<Value> {
        let overlay = self.dir.join("overlay.qcow2");
        make_overlay(&self.backing(), &overlay)?;
        let mut boot = Command::new(&self.boot_disk);
        boot.arg(self.composed().join("vmlinuz"));
        boot.arg(self.composed().join("initrd")).arg(&overlay);
        let text = output(boot.stderr(Stdio::inherit()))?;
        serde_json::from_slice(&text).context("boot_disk printed no JSON")
    }
}
