//! Peers that boot from a disk: local, over a line, or pulled over it first.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;

use super::line::ThrottledLine;
use super::{PORT, Served, page};
use crate::bench::boot::WebBench;
use crate::bench::disks;
use crate::process::{output, run_quiet, target_dir};

/// Where the disk's content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// A qcow2 image on this host.
    Local,
    /// Over the line, as it is asked for.
    Nbd,
    /// Over the line, compressed, all of it before the boot; warm, it was pulled before.
    Pulled,
}

impl DiskSource {
    pub const ALL: [Self; 3] = [Self::Local, Self::Nbd, Self::Pulled];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Local => "qcow2",
            Self::Nbd => "qcow2 over NBD",
            Self::Pulled => "pull, then boot",
        }
    }
}

/// The image's files as disks.
pub struct Disks {
    dir: PathBuf,
    boot_disk: PathBuf,
}

impl Disks {
    /// Makes them, and boots once so that the kernel is unpacked before anything is measured.
    pub fn make(bench: &WebBench) -> Result<Self> {
        let dir = target_dir().join("bench/peers-disk");
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir)?;
        let layout = dir.join("composed");
        disks::compose(&bench.host()?, bench.manifest(), &layout)?;
        disks::make_raw(&layout, &dir.join("root.raw"))?;
        let convert = ["convert", "-f", "raw", "-O", "qcow2"];
        run_quiet(
            Command::new("qemu-img")
                .args(convert)
                .args([dir.join("root.raw"), dir.join("root.qcow2")]),
        )?;
        run_quiet(
            Command::new("zstd")
                .args(["-q", "-f"])
                .arg(dir.join("root.raw"))
                .arg("-o")
                .arg(dir.join("root.zst")),
        )?;
        let boot_disk = crate::bench::build_example("forelay-vm", "boot_disk")?;
        let disks = Self { dir, boot_disk };
        disks.boot(DiskSource::Local, true)?;
        disks.boot(DiskSource::Pulled, false)?;
        Ok(disks)
    }

    /// A file of theirs.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Boots once.
    pub fn boot(&self, source: DiskSource, warm: bool) -> Result<Served> {
        let scratch = tempdir()?;
        let served = self.boot_in(&scratch, source, warm);
        let _ = std::fs::remove_dir_all(&scratch);
        served
    }

    fn boot_in(&self, scratch: &Path, source: DiskSource, warm: bool) -> Result<Served> {
        let overlay = self.path("overlay.qcow2");
        let cached = match source {
            DiskSource::Local => "root.qcow2",
            DiskSource::Nbd => "root.raw",
            DiskSource::Pulled => "pulled.raw",
        };
        let line = match source {
            DiskSource::Local => None,
            DiskSource::Nbd => Some(ThrottledLine::to(&self.path("root.raw"), scratch)?),
            DiskSource::Pulled if warm => None,
            DiskSource::Pulled => Some(ThrottledLine::to(&self.path("root.zst"), scratch)?),
        };
        if warm || source == DiskSource::Nbd {
            keep_in_page_cache(&self.path(cached))?;
        } else if source == DiskSource::Local {
            drop_from_page_cache(&self.path(cached))?;
        }
        let children_before_s = crate::cpu::of_ended_children();
        let asked = Instant::now();
        match (&line, source) {
            (Some(line), DiskSource::Pulled) => self.pull(line)?,
            (Some(line), _) => disks::make_overlay_of(&line.address(), "raw", &overlay)?,
            (None, _) => {}
        }
        match source {
            DiskSource::Local => disks::make_overlay(&self.path(cached), &overlay)?,
            DiskSource::Pulled => {
                disks::make_overlay_of(&self.path(cached).to_string_lossy(), "raw", &overlay)?
            }
            DiskSource::Nbd => {}
        }
        let children_s = crate::cpu::of_ended_children() - children_before_s;
        let mut vm = self.start(&overlay, Some(PORT), 256)?;
        let page_s = page::wait(PORT, asked, || vm.failed())?;
        let said = vm.ready()?;
        let figure = |name: &str| said[name].as_f64().unwrap_or(f64::NAN);
        let (ready_s, cpu_s) = (figure("ready_s"), figure("cpu_s") + children_s);
        vm.end()?;
        let (bytes, requests) = line.map_or(Ok((0, 0)), ThrottledLine::end)?;
        Ok(Served {
            ready_s,
            page_s,
            cpu_s,
            bytes,
            requests,
        })
    }

    /// What a user does who has an image far away.
    fn pull(&self, line: &ThrottledLine) -> Result<()> {
        let (compressed, raw) = (self.path("pulled.zst"), self.path("pulled.raw"));
        let _ = std::fs::remove_file(&raw);
        let convert = ["convert", "-f", "raw", "-O", "raw"];
        run_quiet(
            Command::new("qemu-img")
                .args(convert)
                .arg(line.address())
                .arg(&compressed),
        )?;
        // qemu-img copies whole sectors.
        let bytes = std::fs::metadata(self.path("root.zst"))?.len();
        std::fs::OpenOptions::new()
            .write(true)
            .open(&compressed)?
            .set_len(bytes)?;
        run_quiet(
            Command::new("zstd")
                .args(["-q", "-d", "-f"])
                .arg(&compressed)
                .arg("-o")
                .arg(&raw),
        )
    }

    /// Starts a VM that lives until it is ended.
    pub fn start(&self, overlay: &Path, port: Option<u16>, memory_mib: u64) -> Result<HeldVm> {
        let composed = self.path("composed");
        let mut command = Command::new(&self.boot_disk);
        command
            .arg(composed.join("vmlinuz"))
            .arg(composed.join("initrd"))
            .arg(overlay);
        command.arg(memory_mib.to_string()).arg("--hold");
        if let Some(port) = port {
            command.args(["--forward", &port.to_string()]);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(HeldVm {
            input: child.stdin.take(),
            child,
        })
    }
}

/// A VM of `boot_disk --hold`: ends with this.
pub struct HeldVm {
    child: Child,
    input: Option<ChildStdin>,
}

impl HeldVm {
    /// Why it ended, if it did.
    fn failed(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok().flatten()?;
        Some(status.to_string())
    }

    /// What it says once it is ready.
    pub fn ready(&mut self) -> Result<Value> {
        let mut line = String::new();
        let answers = self.child.stdout.take().context("it is asked once")?;
        BufReader::new(answers).read_line(&mut line)?;
        serde_json::from_str(&line).context("boot_disk printed no JSON")
    }

    /// Ends it.
    pub fn end(mut self) -> Result<()> {
        drop(self.input.take());
        self.child.wait().map(drop).context("a VM does not end")
    }
}

impl Drop for HeldVm {
    fn drop(&mut self) {
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

/// A directory whose name is short enough for sockets.
pub fn tempdir() -> Result<PathBuf> {
    let dir = std::env::temp_dir().join(format!("forelay-peer-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir)?;
    Ok(dir)
}

/// Reads a file, so that all of it is in the page cache.
fn keep_in_page_cache(file: &Path) -> Result<()> {
    run_quiet(
        Command::new("dd")
            .arg(format!("if={}", file.display()))
            .args(["of=/dev/null", "bs=1M", "status=none"]),
    )
}

/// Takes a file out of the page cache.
pub fn drop_from_page_cache(file: &Path) -> Result<()> {
    output(
        Command::new("dd")
            .arg(format!("of={}", file.display()))
            .args([
                "oflag=nocache",
                "conv=notrunc,fdatasync",
                "count=0",
                "status=none",
            ]),
    )
    .map(drop)
}
